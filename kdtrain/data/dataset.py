"""From sources to the data set that the trainer sees, and a report of what became of the rows.

    read (sources.py) -> limit, weight, sample_limit (epochs.py) -> encode, cached (cache.py) -> check

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

from kdtrain.data.cache import encode_cached
from kdtrain.data.cache_folder import default_cache_folder
from kdtrain.data.encoded_row import Limits
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.epochs import Epochs, mix
from kdtrain.data.errors import RowError, show
from kdtrain.data.files import folder_of
from kdtrain.data.held_out import HeldOut
from kdtrain.data.rows import Chat, parse_json, parse_row, prompt_of
from kdtrain.data.sources import Source, read_all, unread_of
from kdtrain.errors import DataError

_NO_STOP = "the student will not learn to stop there"


@dataclass
class BuildReport:
    """Rows are counted once; tokens and `rows_per_epoch` as often as the weights repeat them."""

    rows_read: int = 0  # after `limit`, weights below 1 and `sample_limit`
    rows_kept: int = 0  # can be trained on or generated from
    rows_per_epoch: int = 0  # and of the data set, unless `epochs` says otherwise
    bad_rows: int = 0  # left out as unusable
    first_bad: list[str] = field(default_factory=list)  # of three, as `file:line: reason`
    truncated: int = 0  # kept, and cut at max_length
    dropped: int = 0  # left out: too long, or with nothing to train on once truncated
    supervised_tokens: int = 0
    total_tokens: int = 0
    prompt_only_rows: int = 0  # kept, without an answer; those that the teacher answers are not among them
    plain_text_rows: int = 0  # kept; nothing can be generated from them
    teacher_answer_rows: int = 0  # kept; the teacher writes their answer
    image_rows: int = 0  # kept, with images
    images: int = 0  # of them in all
    longest: int = 0  # tokens of a row before truncation
    stop_tokens_added: int = 0  # rows whose template marks the answer without the token that ends it
    unterminated_rows: int = 0  # with a supervised turn that ends without a stop token
    notes: list[str] = field(default_factory=list)
    epochs: Epochs | None = None  # which rows of the data set make up each epoch; None: all, in every epoch

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
            (self.unterminated_rows, f"end a turn without an end-of-turn token: {_NO_STOP}"),
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
    held_out: HeldOut | None = None,
) -> tuple[datasets.Dataset, BuildReport]:
    """Reads, mixes and encodes sources, in their order and unshuffled.

    Args:
        sources: concatenated after their `limit` and `weight`.
        processing_class, train_on: see `encode_row`.
        max_length: in tokens; None for no limit.
        on_overlength: `error` refuses, `truncate` cuts from the right, `drop` leaves out longer rows.
        max_bad_rows: more unusable rows than this are an error.
        sample_limit, seed: see `mix`.
        num_proc: processes; by default one per core up to 8, and one below 2000 rows.
        cache_dir: where encoded rows are stored; by default a folder in the cache of `datasets`, or one for temporary
            files where that cannot be written, which a note says. With several ranks let one of them call first: the
            others then read what it stored.
        new_parts: with fractional weights, return all rows once, and in `BuildReport.epochs` which of them make up each
            epoch: other ones every time. Sums are those of the first. Without effect beside `sample_limit`.
        held_out: which of the rows are read, see `HeldOut`; after `limit` and before `weight`. None reads all.

    Returns:
        A data set with the columns `input_ids`, `labels` and `prompt_length` as of `EncodedRow`; `ce` (False: no
        cross-entropy); `row_id` ("source:row" counted from 0, shared by repetitions). If any row has images, also
        `text` (the conversation as the processor takes it) and `images` (a list of {path, bytes}; none in the other
        rows): pixels are made by the collator. If any source has `answers="teacher"`, also `answers` (True: the row is
        a prompt that the teacher answers).

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
    folder, moved = (Path(cache_dir), "") if cache_dir else default_cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Raw rows are mapped from a file, which need not outlive this call: the result is in the cache entry alone.
        with tempfile.TemporaryDirectory(prefix="reading-", dir=folder, ignore_cleanup_errors=True) as scratch:
            raw, sizes = read_all(sources, Path(scratch) / "raw.arrow", held_out)
            weights = [source.weight for source in sources]
            plan = mix(sizes, weights, sample_limit, seed)
            varies = new_parts and sample_limit is None and any(weight % 1 for weight in weights)
            # Rows of no epoch are not encoded. From here on rows are numbered among those that are.
            used = np.arange(len(raw)) if varies else np.unique(plan)
            plan = np.searchsorted(used, plan)
            raw = raw.select(used) if len(used) < len(raw) else raw
            encoded = encode_cached(raw, encoder, sources, limits, num_proc, folder)
            report = _count(encoded, raw, sources, limits)
            _refuse(encoded, raw, report, max_bad_rows, limits)
            report.notes += (
                ([moved] if moved else [])
                + _unread(sources)
                + _row_notes(encoded, raw)
                + _template_notes(raw, encoder, sources)
            )
            kept = _column(encoded, "status") == "ok"
            if varies:
                rows = np.flatnonzero(kept)
                left = np.bincount(_column(raw, "source")[rows], minlength=len(sources)).tolist()
                report.epochs = Epochs(left, weights, seed)
                epoch = rows[report.epochs.rows(0)]
            else:
                rows = epoch = plan[kept[plan]]
            _count_tokens(encoded, epoch, limits, report)
            return _assemble(encoded, raw, sources, rows, bool(report.images)), report
    except OSError as error:  # sources raise DataError on their own: this is a full or read-only disk
        raise DataError(
            f"cannot write the data cache {show(str(folder), 400)}: {error}. Make room, or set cache_dir"
        ) from error


def _unread(sources: Sequence[Source]) -> list[str]:
    """Notes of files that lie beside those of a source and that nothing reads."""
    notes = []
    for source in sources:
        names = [show(file.name, 80) for file in unread_of(source)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            notes.append(f"{show(source.path)}: the split {source.split} is read, and not {', '.join(names[:3])}{more}")
    return notes


def _column(table: datasets.Dataset, name: str) -> np.ndarray:
    return np.array(table[name][:])


def _count(encoded: datasets.Dataset, raw: datasets.Dataset, sources: Sequence[Source], limits: Limits) -> BuildReport:
    """The report's numbers that count every row once."""
    status, length = _column(encoded, "status"), _column(encoded, "length")
    bad, kept = np.flatnonzero(status == "bad"), status == "ok"
    by_teacher = np.array([sources[source].answers == "teacher" for source in raw["source"][:]])
    # Counted in Arrow: the images' bytes are not read.
    images = np.asarray(pc.fill_null(pc.list_value_length(encoded.data.column("images")), 0))
    return BuildReport(
        rows_read=len(encoded),
        rows_kept=int(kept.sum()),
        bad_rows=len(bad),
        first_bad=[f"{_place(raw, i)}: {encoded[int(i)]['problem']}" for i in bad[:3]],
        truncated=int((kept & (length > (limits.max_length or length.max()))).sum()),
        dropped=int((status == "dropped").sum()),
        prompt_only_rows=int((_column(encoded, "prompt_only") & ~by_teacher).sum()),
        plain_text_rows=int((kept & (_column(encoded, "kind") == "text")).sum()),
        teacher_answer_rows=int((kept & by_teacher).sum()),
        image_rows=int((images > 0).sum()),
        images=int(images.sum()),
        longest=int(length.max()),
        stop_tokens_added=sum(encoded["extended"][:]),
        unterminated_rows=sum(encoded["unterminated"][:]),
    )


def _refuse(
    encoded: datasets.Dataset, raw: datasets.Dataset, report: BuildReport, max_bad_rows: int, limits: Limits
) -> None:
    if report.bad_rows > max_bad_rows:
        listed = "\n  ".join(report.first_bad)
        raise DataError(
            f"{report.bad_rows} of {len(encoded)} rows cannot be used, and max_bad_rows is {max_bad_rows}. The first:\n"
            f"  {listed}\nRepair them, or raise max_bad_rows to leave them out"
        )
    long = np.flatnonzero(_column(encoded, "status") == "long")
    if len(long):
        listed = "\n  ".join(f"{_place(raw, i)}: {encoded[int(i)]['length']} tokens" for i in long[:3])
        raise DataError(
            f"{len(long)} of {len(encoded)} rows are longer than max_length ({limits.max_length} tokens); the longest "
            f"has {report.longest}. The first:\n  {listed}\nRaise max_length, or set on_overlength to truncate (cuts "
            "from the right) or drop"
        )
    if not report.rows_kept:
        listed = "".join(f"\n  {bad}" for bad in report.first_bad)
        raise DataError(
            f"no row is left of {len(encoded)}: {report.bad_rows} are bad and {report.dropped} too long{listed}"
        )


def _place(raw: datasets.Dataset, i: int) -> str:
    row = raw[int(i)]
    return f"{show(row['file'], 400)}:{row['line']}"


def _row_notes(encoded: datasets.Dataset, raw: datasets.Dataset) -> list[str]:
    """What single rows have to say, each once, with how many rows say it and where the first one stands."""
    rows: dict[str, list[int]] = {}
    counts = pc.fill_null(pc.list_value_length(encoded.data.column("notes")), 0)
    for i in np.flatnonzero(np.asarray(counts)):
        for note in encoded[int(i)]["notes"]:
            rows.setdefault(note, []).append(int(i))
    return [f"{note} ({len(where)} rows, the first: {_place(raw, where[0])})" for note, where in rows.items()]


def _template_notes(raw: datasets.Dataset, encoder: RowEncoder, sources: Sequence[Source]) -> list[str]:
    """trl's training version of a template may render more than the tokenizer's own: both are compared on some rows."""
    differing = checked = 0
    for chat in islice(_chats(raw, sources), 32):
        template = encoder.template(chat.tools is not None)
        if template.replaced is None:
            continue
        try:
            differing += template.own_text(chat) != template.render(chat, encoder.train_on).text
        except RowError:
            continue
        checked += 1
    if not differing:
        return []
    return [
        f"{differing} of the first {checked} conversations are rendered by trl's training version of the chat template "
        "to a text that differs from the tokenizer's own (which drops thinking blocks of earlier turns, for example): "
        "the student is trained on the former"
    ]


def _chats(raw: datasets.Dataset, sources: Sequence[Source]) -> Iterator[Chat]:
    for row in raw.select(range(min(len(raw), 64))):
        source = sources[row["source"]]
        try:
            chat = parse_row(parse_json(row["text"], source.columns), folder_of(row["file"]))
            chat = prompt_of(chat) if source.answers == "teacher" else chat
        except RowError:
            continue  # counted among the bad rows
        if isinstance(chat, Chat):
            yield chat


def _count_tokens(encoded: datasets.Dataset, epoch: np.ndarray, limits: Limits, report: BuildReport) -> None:
    """The report's sums over the rows of an epoch."""
    lengths = np.minimum(_column(encoded, "length"), limits.max_length or np.iinfo(np.int32).max)
    report.rows_per_epoch = len(epoch)
    report.supervised_tokens = int(_column(encoded, "supervised")[epoch].sum())
    report.total_tokens = int(lengths[epoch].sum())


def _assemble(
    encoded: datasets.Dataset, raw: datasets.Dataset, sources: Sequence[Source], rows: np.ndarray, images: bool
) -> datasets.Dataset:
    origin = raw["source"][:]
    ids = [f"{source}:{row}" for source, row in zip(origin, raw["row"][:], strict=True)]
    full = encoded.add_column("row_id", ids).add_column("ce", [sources[source].ce for source in origin])
    full = full.add_column("answers", [sources[source].answers == "teacher" for source in origin])
    if len(rows) != len(encoded) or (rows != np.arange(len(encoded))).any():
        full = full.select(rows)
    columns = ["input_ids", "labels", "prompt_length", "ce", "row_id"]
    columns += ["text", "images"] if images else []
    columns += ["answers"] if any(source.answers == "teacher" for source in sources) else []
    return full.select_columns(columns)
