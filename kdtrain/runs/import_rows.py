"""Which rows of another tool's file are which rows of a config's data: by their tokens.

A file that has tokens has them compared as they are. One that has conversations has these encoded first, as the
config's own rows are: then everything that targets depend on is compared.

Shapes: L tokens of a row, S of them supervised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config import RunConfig
from kdtrain.data import Source, build_dataset
from kdtrain.data.columns import ROW_COLUMNS, renamed
from kdtrain.data.errors import show
from kdtrain.data.row_key import row_keys
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.runs.cache_plan import CachePlan
from kdtrain.runs.read_data import encoding_options
from kdtrain.teachers.cached.imported import Imported, ImportedRow
from kdtrain.teachers.cached.imports import ImportFile

NO_SUCH_ROW = "no row of the config's data has these tokens"
IMAGES = "rows with images cannot be known by their tokens alone"
_ANY_NUMBER = 10**9


@dataclass(frozen=True)
class Candidate:
    """A row of a file, and the row of the config that it is."""

    place: str
    found: Imported | None
    problem: str
    """Why it is of no use."""
    number: int = -1
    """Of the row in the plan."""
    tokens: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))
    """[L] ids, as the teacher reads them."""
    supervised: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))
    """[S] places in them of the supervised tokens."""


@dataclass(frozen=True)
class Candidates:
    """The rows of a file, each with its row of the plan."""

    file: ImportFile
    plan: CachePlan
    config: RunConfig
    processing: PreTrainedTokenizerBase | ProcessorMixin
    seed: int

    def __iter__(self) -> Iterator[Candidate]:
        for number, row in enumerate(self.file.rows()):
            if row.found is None:
                yield Candidate(row.place, None, row.problem)
                continue
            matches = self._by_tokens(row.found) if row.found.tokens is not None else self._of_chats.get(number, [])
            if not matches:
                yield Candidate(row.place, row.found, NO_SUCH_ROW)
            for match in matches:
                yield self._candidate(row, match)

    def _candidate(self, row: ImportedRow, number: int) -> Candidate:
        wanted = self.plan.row(number)
        if row.found is not None and row.found.tokens is not None and wanted.get("images"):
            return Candidate(row.place, row.found, IMAGES)
        tokens, labels = _as_teacher_reads(wanted)
        supervised = np.flatnonzero(labels[1:] != IGNORE_INDEX) + 1  # nothing predicts the first token
        return Candidate(row.place, row.found, "", number, tokens, supervised)

    def _by_tokens(self, found: Imported) -> Sequence[int]:
        """Rows with the same tokens, or one less: DistillKit adds one of padding, which nothing is stored for."""
        assert found.tokens is not None
        same = self._numbers.get(_digest(found.tokens), [])
        return same or (self._numbers.get(_digest(found.tokens[:-1]), []) if len(found.ids) < len(found.tokens) else [])

    @cached_property
    def _numbers(self) -> Mapping[bytes, list[int]]:
        """The rows of the plan by their tokens: several where they supervise other ones of these."""
        numbers: dict[bytes, list[int]] = {}
        for number in range(len(self.plan)):
            numbers.setdefault(_digest(_as_teacher_reads(self.plan.row(number))[0]), []).append(number)
        return numbers

    @cached_property
    def _of_chats(self) -> Mapping[int, list[int]]:
        """The rows of the plan by the number of the row in the file, which has a conversation."""
        places = {number: row for number, row in enumerate(self.file.rows()) if row.found is not None}
        chats = {number: row.found.chat for number, row in places.items() if row.found is not None and row.found.chat}
        columns = self._columns(next(iter(chats.values())))
        wanted = list(renamed(columns).values()) or None
        rows = [{name: chat[name] for name in wanted or chat if name in chat} for chat in chats.values()]
        options = encoding_options(self.config, self.seed, "train")
        options |= {"held_out": None, "sample_limit": None, "max_bad_rows": _ANY_NUMBER}
        if options["on_overlength"] == "error":
            options["on_overlength"] = "drop"
        source = Source(path=str(self.file.path), columns=columns, rows=rows)
        encoded, _ = build_dataset([source], self.processing, **options)
        in_plan = {key: number for number, key in enumerate(self.plan.keys)}
        by_row: dict[int, list[int]] = {}
        numbers = list(chats)
        for key, name in zip(row_keys(encoded), encoded["row_id"][:], strict=True):
            row = numbers[int(name.split(":")[1])]
            # Of a conversation that became several rows the last one has the targets: its answer was written last.
            by_row[row] = [in_plan[key]] if key in in_plan else []
        return by_row

    def _columns(self, row: Mapping[str, Any]) -> dict[str, str | None] | None:
        """How the columns of a row with a conversation are to be read: as the config reads its own, where it can."""
        for source in (*self.config.data.train, *self.config.data.eval_sources):
            if source.columns and set(renamed(source.columns).values()) <= row.keys():
                return dict(source.columns)
        if set(ROW_COLUMNS) & row.keys():
            return None
        found = [name for name, value in row.items() if _is_conversation(value)]
        if len(found) == 1:
            return {"messages": found[0]}
        raise DataError(
            f"--from {show(str(self.file.path), 400)}: which of the columns "
            f"{', '.join(show(name, 40) for name in row)} is the conversation cannot be told. Call it messages, or as "
            "data.train has it in its `columns`."
        )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) and x.keys() & _ROLES for x in value)


_ROLES = {"role", "from"}


def _as_teacher_reads(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels; those of the teacher where it reads another text."""
    own = row.get("teacher_input_ids")
    names = ("input_ids", "labels") if own is None else ("teacher_input_ids", "teacher_labels")
    ids, labels = (np.asarray(row[name], np.int64) for name in names)
    return ids, labels


def _digest(tokens: np.ndarray) -> bytes:
    return tokens.astype("<i8").tobytes()
