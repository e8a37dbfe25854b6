"""From sources to the data set that the trainer sees: read, mix, encode once, count what was wrong.

    read (sources.py) -> limit, weight, sample_limit (mixing.py) -> encode, cached (encoding.py) -> check

Each row is encoded once, however often it appears in an epoch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]

from kdtrain.data.encoding import Limits, encode_cached, folder_of, parse_json
from kdtrain.data.epochs import Epochs
from kdtrain.data.mixing import mix, read_all
from kdtrain.data.rows import Chat, RowError, parse_row, prompt_of, show
from kdtrain.data.sources import RawRow, Source
from kdtrain.data.template import RowEncoder
from kdtrain.errors import DataError

__all__ = ["BuildReport", "Source", "build_dataset"]


@dataclass
class BuildReport:
    """What became of the rows. Rows are counted once; tokens and `rows_per_epoch` as often as the weights repeat them.

    Attributes:
        rows_read: rows looked at, after `limit`, weights below 1 and `sample_limit`.
        rows_kept: those that can be trained on or generated from.
        rows_per_epoch: length of an epoch, and of the data set unless `epochs` says otherwise.
        epochs: which rows of the data set make up each epoch; None: all of them, in every epoch.
        bad_rows: rows left out as unusable.
        first_bad: the first three, as `file:line: reason`.
        truncated: kept rows that were cut at max_length.
        dropped: rows left out because they are too long, or have nothing to train on once truncated.
        supervised_tokens, total_tokens: per epoch.
        prompt_only_rows: kept rows without an answer; they need generation. Those for the teacher are not among them.
        plain_text_rows: kept rows of plain text; nothing can be generated from them.
        teacher_answer_rows: kept rows whose answer the teacher writes.
        image_rows, images: kept rows with images, and their images.
        longest: tokens of the longest row, before truncation.
        stop_tokens_added: rows whose template marks the answer but not the token that ends it; it was added.
        unterminated_rows: rows with a supervised turn that ends without a stop token.
        notes: other things worth a warning.
    """

    rows_read: int = 0
    rows_kept: int = 0
    rows_per_epoch: int = 0
    bad_rows: int = 0
    first_bad: list[str] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    supervised_tokens: int = 0
    total_tokens: int = 0
    prompt_only_rows: int = 0
    plain_text_rows: int = 0
    teacher_answer_rows: int = 0
    image_rows: int = 0
    images: int = 0
    longest: int = 0
    stop_tokens_added: int = 0
    unterminated_rows: int = 0
    notes: list[str] = field(default_factory=list)
    epochs: Epochs | None = None

    def summary(self) -> str:
        """Some lines for people; counts of zero are left out, except the bad rows."""
        share = self.supervised_tokens / max(self.total_tokens, 1)
        lines = [
            f"{self.rows_kept} of {self.rows_read} rows, {self.rows_per_epoch} per epoch; "
            f"{self.supervised_tokens} of {self.total_tokens} tokens supervised ({share:.0%}); "
            f"longest row {self.longest} tokens; {self.bad_rows} bad rows"
        ]
        lines += [f"  bad: {bad}" for bad in self.first_bad]
        counts = (
            (self.truncated, "truncated at max_length"),
            (self.dropped, "dropped: too long, and a cut would leave nothing to train on or take a part of an image"),
            (self.prompt_only_rows, "with a prompt only (usable where an answer is generated)"),
            (self.plain_text_rows, "of plain text (nothing is generated from them)"),
            (self.teacher_answer_rows, "get their answer from the teacher"),
            (self.image_rows, f"with images ({self.images} in all)"),
            (self.stop_tokens_added, "got the end-of-turn token into the mask, which the template's markers leave out"),
            (
                self.unterminated_rows,
                "end a turn without an end-of-turn token: the student will not learn to stop there",
            ),
        )
        lines += [f"  {count} rows {what}" for count, what in counts if count]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def build_dataset(
    sources: Sequence[Source],
    processing_class: Any,
    *,
    max_length: int | None,
    on_overlength: str,
    train_on: str,
    max_bad_rows: int = 0,
    sample_limit: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    new_parts: bool = False,
) -> tuple[datasets.Dataset, BuildReport]:
    """Reads, mixes and encodes sources, in their order and unshuffled.

    Args:
        sources: concatenated after their `limit` and `weight`.
        processing_class: a fast tokenizer, or a processor around one; rows with images need a processor.
        max_length: in tokens; None for no limit.
        on_overlength: `error` refuses, `truncate` cuts from the right, `drop` leaves out longer rows.
        train_on: `assistant`, `last` or `all`, see `encode_row`.
        max_bad_rows: more unusable rows than this are an error.
        sample_limit: n rows of the mixture before encoding, the first of every source in proportion to its share.
        seed: of the random part of fractional weights.
        num_proc: processes; by default one per core up to 8, and one below 2000 rows.
        cache_dir: where encoded rows are stored; by default a folder in the cache of `datasets`. With several ranks
            let one of them call first: the others then read what it stored.
        new_parts: with fractional weights, return all rows once, and in `BuildReport.epochs` which of them make up each
            epoch: other ones every time. Sums are those of the first. Without effect beside `sample_limit`.

    Returns:
        A data set with the columns
        `input_ids`; `labels` (same length, -100 where not supervised, always at position 0); `prompt_length` (leading
        tokens to generate from, 0 for plain text); `ce` (False: no cross-entropy); `row_id` ("source:row" counted from
        0, shared by repetitions). If any row has images, also `text` (the conversation as the processor takes it) and
        `images` (a list of {path, bytes}; none in the other rows): pixels are made by the collator. If any source has
        `answers="teacher"`, also `answers` (True: the row is a prompt that the teacher answers). And the report.

    Raises:
        DataError: nothing to read, too many bad rows, over-long rows with `error`, no row left, or a tokenizer or
            template that cannot serve the rows.
    """
    encoder = RowEncoder(processing_class, train_on)
    limits = Limits(max_length, on_overlength)
    if not sources:
        raise DataError("there is no data source")
    if sample_limit is not None and sample_limit < 1:
        raise DataError(f"sample_limit must be at least 1, not {sample_limit}")
    folder = Path(cache_dir) if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "kdtrain"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Raw rows are mapped from a file; what is returned lives in the cache entry alone.
        with tempfile.TemporaryDirectory(prefix="reading-", dir=folder, ignore_cleanup_errors=True) as scratch:
            raw, sizes = read_all(sources, Path(scratch) / "raw.arrow")
            plan = mix(sources, sizes, sample_limit, seed)
            varies = new_parts and sample_limit is None and any(source.weight % 1 for source in sources)
            used = np.arange(len(raw)) if varies else np.unique(plan)
            chosen = raw.select(used) if len(used) < len(raw) else raw
            encoded = encode_cached(chosen, encoder, sources, limits, num_proc, folder)
            report = _check(encoded, chosen, sources, max_bad_rows, limits)
            report.notes += _template_notes(chosen, encoder, sources)
            kept = np.array(encoded["status"][:]) == "ok"
            if varies:
                full = np.flatnonzero(kept)
                report.epochs = _epochs(chosen, full, sources, seed)
                counted = full[report.epochs.rows(0)]
            else:
                full = counted = (plan := np.searchsorted(used, plan))[kept[plan]]
            return _assemble(encoded, chosen, sources, full, counted, limits, report), report
    except OSError as error:  # sources raise DataError on their own: this is a full or read-only disk
        raise DataError(
            f"cannot write the data cache {show(str(folder), 400)}: {error}. Make room, or set cache_dir"
        ) from error


def _check(
    encoded: datasets.Dataset, raw: datasets.Dataset, sources: Sequence[Source], max_bad_rows: int, limits: Limits
) -> BuildReport:
    """Counts by row and refuses what the options do not allow."""
    status, length = np.array(encoded["status"][:]), np.array(encoded["length"][:])
    report = BuildReport(rows_read=len(encoded), longest=int(length.max()))
    bad, long = np.flatnonzero(status == "bad"), np.flatnonzero(status == "long")
    report.bad_rows, report.dropped = len(bad), int((status == "dropped").sum())
    report.first_bad = [f"{_place(raw, i)}: {encoded[int(i)]['problem']}" for i in bad[:3]]
    if len(bad) > max_bad_rows:
        listed = "\n  ".join(report.first_bad)
        raise DataError(
            f"{len(bad)} of {len(encoded)} rows cannot be used, and max_bad_rows is {max_bad_rows}. The first:\n"
            f"  {listed}\nRepair them, or raise max_bad_rows to leave them out"
        )
    if len(long):
        listed = "\n  ".join(f"{_place(raw, i)}: {length[i]} tokens" for i in long[:3])
        raise DataError(
            f"{len(long)} of {len(encoded)} rows are longer than max_length ({limits.max_length} tokens); the longest "
            f"has {report.longest}. The first:\n  {listed}\nRaise max_length, or set on_overlength to truncate (cuts "
            "from the right) or drop"
        )
    kept = status == "ok"
    if not kept.any():
        listed = "".join(f"\n  {bad}" for bad in report.first_bad)
        raise DataError(f"no row is left of {len(encoded)}: {len(bad)} are bad and {report.dropped} too long{listed}")
    report.rows_kept = int(kept.sum())
    report.truncated = int((kept & (length > (limits.max_length or length.max()))).sum())
    asked = np.array([sources[source].answers == "teacher" for source in raw["source"][:]])
    report.teacher_answer_rows = int((kept & asked).sum())
    report.prompt_only_rows = int((np.array(encoded["prompt_only"][:]) & ~asked).sum())
    report.stop_tokens_added = sum(encoded["extended"][:])
    report.unterminated_rows = sum(encoded["unterminated"][:])
    images = _images_per_row(encoded)
    report.image_rows, report.images = int((images > 0).sum()), int(images.sum())
    report.plain_text_rows = int((kept & (np.array(encoded["kind"][:]) == "text")).sum())
    return report


def _images_per_row(encoded: datasets.Dataset) -> np.ndarray:
    """Counted in Arrow: the images' bytes are not read."""
    lists = encoded.data.column("images")
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0))


def _place(raw: datasets.Dataset, i: int) -> str:
    row = raw[int(i)]
    return RawRow(row["file"], row["line"]).place


def _template_notes(raw: datasets.Dataset, encoder: RowEncoder, sources: Sequence[Source]) -> list[str]:
    """trl's training version of a template may render more than the tokenizer's own: looked at on some rows."""
    differing = checked = 0
    for chat in islice(_chats(raw, encoder, sources), 32):
        template = encoder.template(chat.tools is not None)
        if template.replaced is None:
            continue
        checked += 1
        differing += template.own_text(chat) != template.render(chat, encoder.train_on).text
    if not differing:
        return []
    return [
        f"{differing} of the first {checked} conversations are rendered by trl's training version of the chat template "
        "to a text that differs from the tokenizer's own (which drops thinking blocks of earlier turns, for example): "
        "the student is trained on the former"
    ]


def _chats(raw: datasets.Dataset, encoder: RowEncoder, sources: Sequence[Source]) -> Iterator[Chat]:
    for row in raw.select(range(min(len(raw), 64))):
        try:
            source = sources[row["source"]]
            chat = parse_row(parse_json(row["text"], source.columns), folder_of(row["file"]))
            chat = prompt_of(chat) if source.answers == "teacher" else chat
            if isinstance(chat, Chat):
                encoder.template(chat.tools is not None).render(chat, encoder.train_on)
                yield chat
        except RowError:
            continue  # counted among the bad rows


def _epochs(raw: datasets.Dataset, kept: np.ndarray, sources: Sequence[Source], seed: int) -> Epochs:
    origin = np.array(raw["source"][:])[kept]
    sizes = [int((origin == index).sum()) for index in range(len(sources))]
    return Epochs(sizes, [source.weight for source in sources], seed)


def _assemble(
    encoded: datasets.Dataset,
    raw: datasets.Dataset,
    sources: Sequence[Source],
    rows: np.ndarray,
    epoch: np.ndarray,
    limits: Limits,
    report: BuildReport,
) -> datasets.Dataset:
    """The data set of `rows`; completes the report's sums, which are those of the rows of an `epoch`."""
    origin = raw["source"][:]
    ids = [f"{source}:{row}" for source, row in zip(origin, raw["row"][:], strict=True)]
    full = encoded.add_column("row_id", ids).add_column("ce", [sources[source].ce for source in origin])
    full = full.add_column("answers", [sources[source].answers == "teacher" for source in origin])
    lengths = np.minimum(np.array(encoded["length"][:]), limits.max_length or np.iinfo(np.int32).max)
    report.rows_per_epoch = len(epoch)
    report.supervised_tokens = int(np.array(encoded["supervised"][:])[epoch].sum())
    report.total_tokens = int(lengths[epoch].sum())
    if len(rows) != len(encoded) or (rows != np.arange(len(encoded))).any():
        full = full.select(rows)
    columns = ["input_ids", "labels", "prompt_length", "ce", "row_id"]
    if report.images:
        columns += ["text", "images"]
    if any(source.answers == "teacher" for source in sources):
        columns += ["answers"]
    return full.select_columns(columns)
