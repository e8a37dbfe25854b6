"""`answers: teacher`: the completions of a data source, generated once by the teacher before training.

This is sequence-level knowledge distillation (Kim and Rush 2016, https://arxiv.org/abs/1606.07947) with the teacher's
greedy answer in place of its beam search. Answers go to the run folder as they are made, so that a run that was
stopped goes on where it was; they are keyed by the prompt, its images and everything that an answer depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from kdtrain.data.errors import RowError, show
from kdtrain.data.images import stored_image
from kdtrain.errors import DataError, KdtrainError, NonFiniteError, TeacherError
from kdtrain.generation.message_answers import MessageEncoder
from kdtrain.generation.writers import Writer, prompt_ids
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.ranks import is_main
from kdtrain.teachers.base import Written

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What is kept of an answer."""

    ids: np.ndarray
    """Token ids, int32: as lists they would take ten times the memory."""
    cut: bool
    refused: str | None = None
    message: Mapping[str, Any] | None = None
    """The answer, where it is not tokens yet: see `message_answers.py`."""
    labels: np.ndarray | None = None
    """int32, where not all of `ids` is supervised."""


class TeacherAnswers:
    """Gets and remembers a teacher's answers.

    Args:
        writer: writes them.
        folder: where answers are kept; made when the first one is.
        identity: whatever names the teacher and its loading; other values are other answers.
        progress: called with the number of answers there are, and how many are needed; on the main process only.
        rows_folder: for the rows with their answers, which are files as well; None is beside the answers.
    """

    def __init__(
        self,
        writer: Writer,
        folder: Path,
        *,
        identity: Mapping[str, Any],
        progress: Callable[[int, int], None] = lambda done, total: None,
        rows_folder: Path | None = None,
    ) -> None:
        self._writer, self._progress, self._state = writer, progress, PartialState()
        settings = {**identity, **writer.settings}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self._folder = folder / digest[:16]
        self._rows_folder = rows_folder or self._folder

    @property
    def name(self) -> str:
        """Of the folder, in `folder`, that these answers are kept in: a hash of all that they depend on."""
        return self._folder.name

    def fill(self, dataset: datasets.Dataset, teacher: str | None = None) -> datasets.Dataset:
        """The data set with an answer in every row whose column `answers` is true, supervised as in `with_completions`.

        A collective: the ranks share the work, and all of them get all answers. A row without a usable answer keeps
        its prompt alone; `refused` has what became of it.

        Args:
            teacher: of several, the one that writes: only rows whose column `teacher` names it.
        """
        self.refused: dict[int, str] = {}
        if "answers" not in dataset.column_names:
            return dataset
        keys = _keys(dataset, self._writer.encoder is not None, teacher)
        wanted = {key: i for i, key in enumerate(keys) if key is not None}
        # Together, before any rank writes: all have to see the same ones missing.
        known = dict(gather_object(list(self._stored().items())))
        missing = [i for key, i in wanted.items() if key not in known]
        if missing and is_main():
            self._writer.announce(dataset, missing)
        made: list[tuple[str, Answer]] = []
        failed: list[KdtrainError] = []
        try:
            made = self._generate(dataset, keys, missing, len(wanted))
        except (NonFiniteError, TeacherError) as error:  # the other ranks would wait for this one
            failed = [error]
        if failures := gather_object(failed):
            raise (failed or failures)[0]
        known |= dict(gather_object(made))
        known |= {key: self._encoded(dataset[i], known[key]) for key, i in wanted.items() if known[key].message}
        self.refused = {i: reason for i, key in enumerate(keys) if key is not None and (reason := known[key].refused)}
        cut = sum(known[key].cut for key in wanted)
        if cut and is_main():
            logger.warning("%d of the teacher's %d answers reached rlhf.max_new_tokens.", cut, len(wanted))
        return self._with_answers(dataset, keys, known)

    def _generate(
        self, dataset: datasets.Dataset, keys: Sequence[str | None], missing: Sequence[int], total: int
    ) -> list[tuple[str, Answer]]:
        """This rank's share of the missing answers, each on disk as soon as it is there."""
        lengths = dataset["prompt_length"][:]
        # The longest first: if memory is short, that is known at once.
        order = sorted(missing, key=lambda i: -lengths[i])
        ranks, made = self._state.num_processes, dict[str, Answer]()
        own = order[self._state.process_index :: ranks]
        if not own:
            return []
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank{self._state.process_index}.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # a killed run has written a part of a line
        with open(path, "ab") as file:
            if torn:
                file.write(b"\n")

            def keep(answers: Sequence[tuple[int, Written]]) -> None:
                for i, written in answers:
                    file.write(_line(str(keys[i]), written))
                    ids = np.array(written.ids, dtype=np.int32)
                    made[str(keys[i])] = Answer(ids, written.cut, written.refused, written.message)
                file.flush()
                os.fsync(file.fileno())
                if is_main():
                    self._progress(min(total - len(missing) + len(made) * ranks, total), total)

            self._writer.write(dataset, own, keys, keep)
        return list(made.items())

    def _stored(self) -> dict[str, Answer]:
        """Answers of an earlier run that was stopped."""
        stored = {}
        for file in sorted(self._folder.glob("rank*.jsonl")):
            records, foreign = _lines(file)
            if foreign and is_main():
                logger.warning(
                    "%s: %d lines are no answers of the teacher, and are left out; what they were of is asked again.",
                    show(str(file), 400),
                    foreign,
                )
            for record in records:
                ids = np.array(record["answer"], dtype=np.int32)
                cut = record.get("cut", self._writer.stops.isdisjoint(record["answer"]))
                stored[record["prompt"]] = Answer(ids, cut, record.get("refused"), record.get("message"))
        return stored

    def _encoded(self, row: Mapping[str, Any], answer: Answer) -> Answer:
        """An answer that is a message, as tokens behind the prompt of a row. What is kept on disk is the message: other
        options of the data make other tokens of it, and it is paid for."""
        assert answer.message is not None
        assert self._writer.encoder is not None, "who writes messages can encode them"
        try:
            ids, labels = self._writer.encoder.encode(row, answer.message, answer.cut)
        except RowError as error:
            return replace(answer, refused=str(error), message=None)
        all_supervised = ids == labels
        of_labels = None if all_supervised else np.array(labels, dtype=np.int32)
        return replace(answer, ids=np.array(ids, dtype=np.int32), message=None, labels=of_labels)

    def _with_answers(
        self, dataset: datasets.Dataset, keys: Sequence[str | None], answers: Mapping[str, Answer]
    ) -> datasets.Dataset:
        """The rows with their answers, in a file of this rank: text for a teacher may be larger than memory."""

        prefixes = ("", "teacher_") if "teacher_input_ids" in dataset.column_names else ("",)

        def answered(row: Mapping[str, Any], i: int) -> dict[str, Any]:
            key, tokens = keys[i], dict(row)
            for prefix in prefixes:
                length = tokens.pop(f"{prefix}prompt_length")
                if key is not None and length is not None:  # the teacher's are null where it reads the student's
                    prompt, answer = row[f"{prefix}input_ids"][:length], answers[key]
                    labels = answer.ids if answer.labels is None else answer.labels
                    tokens[f"{prefix}input_ids"] = prompt + answer.ids.tolist()
                    tokens[f"{prefix}labels"] = [IGNORE_INDEX] * len(prompt) + labels.tolist()
            return tokens

        names = [f"{prefix}{name}" for prefix in prefixes for name in ("input_ids", "labels")]
        lengths = [f"{prefix}prompt_length" for prefix in prefixes]
        tokens = dataset.select_columns([*names, *lengths]).map(
            answered,
            with_indices=True,
            remove_columns=lengths,
            features=datasets.Features({name: dataset.features[name] for name in names}),
            cache_file_name=str(self._rows_folder / f"rows-{len(dataset)}-rank{self._state.process_index}.arrow"),
            load_from_cache_file=False,
            desc="Answers",
        )
        return datasets.concatenate_datasets([dataset.remove_columns(names), tokens], axis=1)


class StoredAnswers(TeacherAnswers):
    """Answers that a teacher has written before, which is not there any more.

    Args:
        folder: that they are kept in.
        rows_folder: as of `TeacherAnswers`.
    """

    def __init__(self, folder: Path, rows_folder: Path) -> None:
        super().__init__(_Nobody(), folder.parent, identity={}, rows_folder=rows_folder)
        self._folder = folder

    def _generate(
        self, dataset: datasets.Dataset, keys: Sequence[str | None], missing: Sequence[int], total: int
    ) -> list[tuple[str, Answer]]:
        """None; all ranks see the same ones missing.

        Raises:
            DataError: some are missing.
        """
        if missing:
            raise DataError(
                f"{len(missing):,} of {total:,} rows with answers: teacher have no answer in {self._folder.parent} "
                f"(the first: {dataset[missing[0]]['row_id']}): their prompts were added or changed since. Write "
                "answers and targets of the rows as they are into a new folder."
            )
        return []


class _Nobody:
    """Writes no answers."""

    settings: Mapping[str, Any] = {}
    stops: frozenset[int] = frozenset()
    encoder: MessageEncoder | None = None

    def announce(self, dataset: datasets.Dataset, rows: Sequence[int]) -> None:
        """Nothing is asked for."""

    def write(self, dataset: datasets.Dataset, rows: Sequence[int], keys: Sequence[str | None], done: Any) -> None:
        raise NotImplementedError("StoredAnswers refuses before")


def _line(key: str, written: Written) -> bytes:
    record: dict[str, Any] = {"prompt": key, "answer": written.ids, "cut": written.cut}
    record |= {name: value for name in ("refused", "message") if (value := getattr(written, name)) is not None}
    return json.dumps(record).encode() + b"\n"


def _lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The answers in a file, and how many lines are none: of another program, or edited."""
    records, foreign = [], 0
    for line in file.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            foreign += bool(line.strip()) and line[-1:] == b"}"  # else written in part, when the run was killed
            continue
        if _is_answer(record):
            records.append(record)
        else:
            foreign += 1
    return records, foreign


def _is_answer(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return False
    ids = record.get("answer")
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        return False
    of_other_kinds = {"cut": bool, "refused": str, "message": dict}
    return all(name not in record or isinstance(record[name], kind) for name, kind in of_other_kinds.items())


def _keys(dataset: datasets.Dataset, by_message: bool, teacher: str | None) -> list[str | None]:
    """What each row asks, the teacher's prompt or messages and their images; None where it has an answer."""
    columns = ["input_ids", "prompt_length", "answers"]
    more = ("text", "images", "chat", "teacher", "teacher_input_ids", "teacher_prompt_length")
    columns += [name for name in more if name in dataset.column_names]
    return [
        _key(row, by_message) if row["answers"] and teacher in (None, row.get("teacher")) else None
        for row in dataset.select_columns(columns)
    ]


def _key(row: Mapping[str, Any], by_message: bool) -> str:
    asked = row["chat"] if by_message else json.dumps(prompt_ids(row))
    digest = hashlib.sha256(asked.encode())
    for image in row.get("images") or ():
        digest.update(stored_image(image).identity)
    return digest.hexdigest()[:32]
