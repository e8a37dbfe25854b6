"""What a run would read, without its models: rows as the student reads them, bad ones with their reason, notes, counts.

    rows of each split, as `fit` reads and encodes them -> some of every kind as text -> what `fit` would refuse

Nothing is written but the cache of encoded rows, which `fit` uses as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]

from kdtrain.config import RunConfig
from kdtrain.config.schema import DataSource
from kdtrain.data import BuildReport
from kdtrain.data.dataset import EncodedSources, encode_sources, images_per_row
from kdtrain.data.multimodal import reads_images
from kdtrain.data.segments import Segment, segments, special_ids
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.models.processing import load_processing
from kdtrain.runs.read_data import check_losses, encoding_options, first_of, sources_of, unread_answers

# Rows that are read of each source unless all are asked for: some seconds, however large the data are. A processor
# takes as long for an image as a tokenizer for hundreds of rows.
FIRST_ROWS = 1000
FIRST_ROWS_WITH_IMAGES = 100


@dataclass(frozen=True)
class View:
    """A row as one of the models reads it."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    segments: list[Segment]


@dataclass(frozen=True)
class ShownRow:
    """A row that is trained or evaluated on."""

    where: str  # file:line
    split: str  # train | eval
    kind: str  # chat | completion | text
    ce: bool
    length: int  # before truncation
    student: View
    teacher: View | None  # where it differs from the student's
    images: list[str]  # files, or how many bytes
    notes: list[str]
    answered_by_teacher: bool
    kd_weight: float  # what the divergence of the row counts
    kd_weights: list[float] | None  # and that of each of the student's tokens; None is 1 for all

    teacher_name: str | None = None  # which of several answers for it

    @property
    def weighted_tokens(self) -> dict[float, int]:
        """How many supervised tokens have each weight of `kd_weights`."""
        pairs = zip(self.kd_weights or (), self.student.labels, strict=False)
        return dict(Counter(weight for weight, label in pairs if label != IGNORE_INDEX))


@dataclass(frozen=True)
class BadRow:
    """A row that is left out."""

    where: str
    split: str
    status: str  # bad | long (over max_length, an error) | dropped
    reason: str


@dataclass(frozen=True)
class Split:
    """The rows of `data.train` or `data.eval`."""

    name: str
    rows: list[ShownRow]
    bad_rows: list[BadRow]
    report: BuildReport
    first_rows: int | None  # only so many were read of each source; None: all
    refusal: str | None  # with what `fit` would refuse them


def preview(config: RunConfig, *, rows: int, all_rows: bool = False) -> list[Split]:
    """The splits of a config, with up to `rows` rows of each to look at.

    Raises:
        DataError, PreflightError: nothing can be read or encoded at all.
    """
    processing = load_processing(
        config.model.model,
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
        processor_kwargs=config.data.processor_kwargs,
        side="student",
    )
    # The seed is GKDConfig's, which is not built here: that would take as long as everything else.
    seed = config.training.get("seed", 42)
    first = None if all_rows else FIRST_ROWS_WITH_IMAGES if reads_images(processing) else FIRST_ROWS
    options = encoding_options(config, seed, "train")
    found = [_split("train", config, config.data.train, processing, options, first, rows)]
    if config.data.eval:
        options = encoding_options(config, seed, "eval")
        sources = config.data.eval_sources or config.data.train  # a share of them
        found.append(_split("eval", config, sources, processing, options, first, rows))
    return found


def _split(
    name: str,
    config: RunConfig,
    configured: Sequence[DataSource],
    processing: Any,
    options: dict[str, Any],
    first: int | None,
    shown: int,
) -> Split:
    sources = sources_of(configured)
    read = [first_of(source, first) for source in sources] if first else sources
    with encode_sources(read, processing, new_parts=name == "train", **options) as rows:
        if name == "train" and (note := unread_answers(config, rows.report)):
            rows.report.notes.append(note)
        partly = any(
            one.rows == first and source.limit != first
            for one, source in zip(rows.report.contents, sources, strict=True)
        )
        apart = special_ids(processing)
        return Split(
            name,
            [_shown(name, rows, row, processing, apart) for row in _chosen(rows, shown)],
            list(_bad_rows(name, rows)),
            rows.report,
            first if partly else None,
            _refusal(name, config, rows, partly),
        )


def _refusal(name: str, config: RunConfig, rows: EncodedSources, partly: bool) -> str | None:
    """What `fit` would say of these rows; of a part only what holds for all as well."""
    allowed = config.data.max_bad_rows
    try:
        if partly and rows.report.bad_rows <= allowed and "long" not in rows.encoded["status"][:]:
            return None  # what else is checked needs all rows
        rows.refuse(allowed)
        if name == "train":
            check_losses(config, rows.report)
    except DataError as error:
        return str(error)
    return None


def _chosen(rows: EncodedSources, most: int) -> list[int]:
    """Numbers of up to `most` rows that show the most, in their order."""
    return sorted(islice(dict.fromkeys(_telling(rows, most)), most))


def _telling(rows: EncodedSources, most: int) -> Iterator[int]:
    """The first row of every kind in every source, the longest, the first with each note, then some of all over."""
    usable = np.unique(rows.rows).tolist()
    if not usable:
        return
    names = ["kind", "prompt_only", "length", "notes", "unterminated", "kd_weight"]
    facts = rows.encoded.select_columns(names)[:]
    by_token = np.asarray(pc.is_valid(rows.encoded.data.column("kd_weights")))
    images = (images_per_row(rows.encoded) > 0).tolist()
    sources = np.array(rows.raw["source"][:])[rows.made_of].tolist()
    kinds = list(zip(sources, facts["kind"], facts["prompt_only"], images, strict=True))
    yield from _first_of_each([(i, kinds[i]) for i in usable])
    yield max(usable, key=lambda i: facts["length"][i])
    yield from _first_of_each([(i, note) for i in usable for note in facts["notes"][i] or ()])
    yield from _first_of_each([(i, "unterminated") for i in usable if facts["unterminated"][i]])
    yield from _first_of_each([(i, facts["kd_weight"][i]) for i in usable if facts["kd_weight"][i] != 1])
    yield from _first_of_each([(i, "weights of tokens") for i in usable if by_token[i]])
    yield from (usable[i] for i in np.linspace(0, len(usable) - 1, most).astype(int))
    yield from usable


def _first_of_each(pairs: Sequence[tuple[int, Hashable]]) -> list[int]:
    first: dict[Hashable, int] = {}
    for row, key in pairs:
        first.setdefault(key, row)
    return list(first.values())


def _shown(split: str, rows: EncodedSources, row: int, processing: Any, apart: frozenset[int]) -> ShownRow:
    encoded, source = rows.encoded[row], rows.source(row)
    return ShownRow(
        where=rows.place(row),
        split=split,
        kind=encoded["kind"],
        ce=source.ce,
        length=encoded["length"],
        student=_view(encoded, processing, apart),
        teacher=None if encoded["teacher_input_ids"] is None else _view(encoded, processing, apart, "teacher_"),
        images=[image["path"] or f"{len(image['bytes']):,} bytes" for image in encoded["images"] or ()],
        notes=list(encoded["notes"] or ()),
        answered_by_teacher=source.answers == "teacher",
        kd_weight=encoded["kd_weight"],
        kd_weights=encoded["kd_weights"],
        teacher_name=encoded["route"],
    )


def _view(row: Mapping[str, Any], processing: Any, apart: frozenset[int], prefix: str = "") -> View:
    ids, labels = row[f"{prefix}input_ids"], row[f"{prefix}labels"]
    tokenizer = getattr(processing, "tokenizer", processing)
    return View(ids, labels, row[f"{prefix}prompt_length"], segments(tokenizer, ids, labels, apart))


def _bad_rows(split: str, rows: EncodedSources) -> Iterator[BadRow]:
    status = rows.encoded["status"][:]
    for row in (i for i, one in enumerate(status) if one != "ok"):
        encoded = rows.encoded[row]
        reason = encoded["problem"]
        if status[row] != "bad":  # what is said of it is which of its texts is too long
            reason = f"{encoded['length']} tokens{reason}, and max_length is {rows.limits.max_length}"
        yield BadRow(rows.place(row), split, status[row], reason)
