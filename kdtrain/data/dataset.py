"""From sources to the data set that the trainer sees, and a report of what became of the rows.

    read (sources.py) -> limit, weight, sample_limit (epochs.py) -> encode, cached (cache.py) -> check

Each row is encoded once, however often it appears in an epoch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import xxhash

from kdtrain.data.cache import distinct, encode_cached
from kdtrain.data.cache_folder import default_cache_folder
from kdtrain.data.columns import ROUTE_COLUMN
from kdtrain.data.encoded_row import Limits
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.epochs import Epochs, mix
from kdtrain.data.errors import show
from kdtrain.data.held_out import HeldOut
from kdtrain.data.kd_weights import WEIGHT
from kdtrain.data.prefix import OPTION as PREFIX
from kdtrain.data.scratch import scratch_folder
from kdtrain.data.source import LOSS_COLUMNS, source_loss
from kdtrain.data.sources import Source, SourceContent, read_all, unread_of
from kdtrain.data.teacher_view import NO_EFFECT, teacher_option
from kdtrain.disk import writing
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
    teacher_tokens: int = 0  # as `total_tokens`, of the texts that the teacher reads
    tokens_read: int = 0  # of the rows that were kept or dropped, each once and before it was cut
    tokens_cut: int = 0  # of these, beyond max_length or in dropped rows
    chat_rows: int = 0  # kept, rendered by the chat template
    prompt_only_rows: int = 0  # kept, without an answer; those that the teacher answers are not among them
    plain_text_rows: int = 0  # kept; nothing can be generated from them
    promptless_rows: int = 0  # kept, other than plain text: no prompt is left of them, or they had none
    teacher_answer_rows: int = 0  # kept; the teacher writes their answer
    image_rows: int = 0  # kept, with images
    images: int = 0  # of them in all
    longest: int = 0  # tokens of a row before truncation
    stop_tokens_added: int = 0  # rows whose template marks the answer without the token that ends it
    unterminated_rows: int = 0  # with a supervised turn that ends without a stop token
    teacher_text_rows: int = 0  # kept; the teacher reads another text than the student
    weighted_rows: int = 0  # kept, with a weight in the divergence that is not 1, of the row or of some tokens
    teacher_option: str = ""  # which options say so
    notes: list[str] = field(default_factory=list)
    # The rows of the data set with the smallest, largest, narrowest and most elongated image of each source, and where
    # they come from: tried first, so that an image that does not fit a model does not end the run in its middle.
    image_extremes: list[tuple[int, str]] = field(default_factory=list)
    contents: list[SourceContent] = field(default_factory=list)  # of each source, with the sizes of its image files
    streamed: bool = False  # these are the first rows of a stream, and stand for the others
    epochs: Epochs | None = None  # which rows of the data set make up each epoch; None: all, in every epoch

    def summary(self) -> str:
        """Some lines for people; counts of zero are left out, except the bad rows."""
        share = self.supervised_tokens / max(self.total_tokens, 1)
        epoch = "streamed, these are the first" if self.streamed else f"{self.rows_per_epoch} per epoch"
        lines = [
            f"{self.rows_kept} of {self.rows_read} rows, {epoch}; "
            f"{self.supervised_tokens} of {self.total_tokens} tokens supervised ({share:.0%}); "
            f"longest row {self.longest} tokens; {self.bad_rows} bad rows"
        ]
        lines += [f"  bad: {bad}" for bad in self.first_bad]
        counts = (
            (self.truncated, "truncated at max_length"),
            (
                self.dropped,
                "dropped: too long, and not to be cut, or a cut would leave no answer or take a part of an image",
            ),
            (self.prompt_only_rows, "with a prompt only (usable where an answer is generated)"),
            (self.plain_text_rows, "of plain text (nothing is generated from them)"),
            (self.teacher_answer_rows, "get their answer from the teacher"),
            (self.image_rows, f"with images ({self.images} in all)"),
            (self.stop_tokens_added, "got the end-of-turn token into the mask, which the template's markers leave out"),
            (self.unterminated_rows, f"end a turn without an end-of-turn token: {_NO_STOP}"),
            (self.teacher_text_rows, f"have another text for the teacher ({self.teacher_option})"),
            (self.weighted_rows, f"have a weight in the divergence that is not 1 ({WEIGHT})"),
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
    prompts: bool = True,
    image_root: str | None = None,
    keep_chats: bool = False,
    keep_answers: bool = False,
    **options: Any,
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
        prompts: whether rows without an answer can be used. Otherwise they are bad rows, and a conversation that goes
            on after its last answer ends there.
        image_root: folder that relative paths of images are relative to; by default that of the data file.
        keep_chats: rows come with their conversation, for a teacher that reads messages.
        keep_answers: rows come with their column `answer`, which samples are checked against; one without is bad.
        options: see `encode_row`.

    Returns:
        A data set with the columns `input_ids`, `labels` and `prompt_length` as of `EncodedRow`; `ce` (False: no
        cross-entropy); `row_id` ("source:row" counted from 0, shared by repetitions; "source:row:turn" where each
        answer of a conversation is a row). If any row has images, also
        `text` (the conversation as the processor takes it) and `images` (a list of {path, bytes}; none in the other
        rows): pixels are made by the collator. If any source has `answers="teacher"`, also `answers` (True: the row is
        a prompt that the teacher answers). If the teacher reads another text than the student in any row, also
        `teacher_input_ids`, `teacher_labels` and `teacher_prompt_length` (None in the other rows): its supervised
        tokens are those of `labels`, in their order. With `keep_chats` also `chat`, as of `kdtrain.data.conversation`:
        up to the last answer that the row trains, and None for plain text and for rows cut within their first prompt.
        With `keep_answers` also `answer`, with `teachers` also `teacher`; and `kd_divergence` and `kd_beta` if any
        source has its own. If any row has weights in the divergence, also `kd_weight` (of its answer, whoever writes
        it) and `kd_weights` (of each token, in the length of `labels`; None is 1 for all).

    Raises:
        DataError: nothing to read, too many bad rows, over-long rows with `error`, no row left, or a tokenizer or
            template that cannot serve the rows.
    """
    with encode_sources(
        sources,
        processing_class,
        max_length=max_length,
        on_overlength=on_overlength,
        train_on=train_on,
        sample_limit=sample_limit,
        seed=seed,
        num_proc=num_proc,
        cache_dir=cache_dir,
        new_parts=new_parts,
        held_out=held_out,
        prompts=prompts,
        image_root=image_root,
        keep_chats=keep_chats,
        keep_answers=keep_answers,
        **options,
    ) as rows:
        rows.refuse(max_bad_rows)
        return rows.dataset(), rows.report


@dataclass(frozen=True)
class EncodedSources:
    """Raw rows beside what they became, and which of those are trained on."""

    raw: datasets.Dataset  # as of `read_all`
    encoded: datasets.Dataset  # in the same order, with the columns of cache.py; bad and over-long rows have no tokens
    sources: Sequence[Source]
    limits: Limits
    rows: np.ndarray  # numbers of the encoded rows that make up the data set, as often as it repeats them
    report: BuildReport
    keep_chats: bool = False
    keep_answers: bool = False
    routed: bool = False

    @cached_property
    def made_of(self) -> np.ndarray:
        """The number of the raw row that each encoded one comes from."""
        return _column(self.encoded, "raw")

    def place(self, row: int) -> str:
        """Where an encoded row comes from, as `file:line`."""
        return _place(self.raw, self.made_of[row])

    def source(self, row: int) -> Source:
        """The source of an encoded row."""
        return self.sources[self.raw[int(self.made_of[row])]["source"]]

    def refuse(self, max_bad_rows: int) -> None:
        """Raises the DataError of rows that cannot be trained on."""
        _refuse(self.encoded, self.raw, self.report, max_bad_rows, self.limits)

    def dataset(self) -> datasets.Dataset:
        """What `build_dataset` returns."""
        kept = ["chat"] * self.keep_chats + ["answer"] * self.keep_answers + ["route"] * self.routed
        return _assemble(self.encoded, self.raw, self.sources, self.rows, self.report, kept)


@contextmanager
def encode_sources(
    sources: Sequence[Source],
    processing_class: Any,
    *,
    max_length: int | None,
    on_overlength: str,
    train_on: str,
    sample_limit: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    new_parts: bool = False,
    held_out: HeldOut | None = None,
    image_root: str | None = None,
    **options: Any,
) -> Iterator[EncodedSources]:
    """The rows of `build_dataset` before any is refused; the raw ones are gone when the block ends."""
    if image_root is not None and not Path(image_root).is_dir():
        raise DataError(f"image_root is no folder: {show(image_root, 400)}")
    encoder = RowEncoder(processing_class, train_on, image_root=image_root, **options)
    column = encoder.options.teacher_prefix_column
    sources = with_prefix_column(sources, encoder)
    limits = Limits(max_length, on_overlength)
    if not sources:
        raise DataError("there is no data source")
    if sample_limit is not None and sample_limit < 1:
        raise DataError(f"sample_limit must be at least 1, not {sample_limit}")
    folder, moved = (Path(cache_dir), "") if cache_dir else default_cache_folder()
    with writing(folder, "Or set data.cache_dir to another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        # Raw rows are mapped from a file, which need not outlive this call: the result is in the cache entry alone.
        with scratch_folder(folder, "reading-") as scratch:
            raw, contents = read_all(sources, scratch / "raw.arrow", held_out)
            if column is not None and (held_out is None or held_out.training):
                _check_prefix_column(raw, column)
            weights = [source.weight for source in sources]
            plan = mix([content.rows for content in contents], weights, sample_limit, seed)
            varies = new_parts and sample_limit is None and any(weight % 1 for weight in weights)
            # Rows of no epoch are not encoded. From here on rows are numbered among those that are.
            used = np.arange(len(raw)) if varies else np.flatnonzero(np.bincount(plan, minlength=len(raw)))
            plan = np.searchsorted(used, plan)
            content = [f"{one.rows}:{one.content}" for one in contents]
            if len(used) < len(raw):
                raw, content = raw.select(used), [*content, xxhash.xxh3_128(used.astype("<i8").tobytes()).hexdigest()]
            encoded = encode_cached(raw, encoder, sources, limits, content, num_proc, folder)
            report = _count(encoded, raw, sources, limits)
            report.notes += ([moved] if moved else []) + _unread(sources) + _row_notes(encoded, raw)
            report.teacher_option = teacher_option(encoder.options)
            if report.teacher_option and report.rows_kept and not report.teacher_text_rows:
                report.notes.append(NO_EFFECT.format(option=report.teacher_option))
            kept, made_of = _column(encoded, "status") == "ok", _column(encoded, "raw")
            if varies:
                rows = np.flatnonzero(kept)
                left = np.bincount(_source_of(raw)[made_of[rows]], minlength=len(sources)).tolist()
                report.epochs = Epochs(left, weights, seed)
                epoch = rows[report.epochs.rows(0)]
            else:
                planned = _made_of(plan, made_of)
                rows = epoch = planned[kept[planned]]
            _count_tokens(encoded, epoch, limits, report)
            report.contents = _with_images(contents, encoded, raw)
            report.image_extremes = _image_extremes(encoded, raw, rows)
            kept_columns = (encoder.keep_chats, encoder.keep_answers, bool(encoder.teachers))
            yield EncodedSources(raw, encoded, sources, limits, rows, report, *kept_columns)


def encoder_of(
    processing_class: Any,
    *,
    max_length: int | None,
    on_overlength: str,
    train_on: str,
    image_root: str | None = None,
    sample_limit: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    held_out: HeldOut | None = None,
    **options: Any,
) -> tuple[RowEncoder, Limits]:
    """What encodes rows as `build_dataset` does with these arguments, for rows that are read one by one."""
    encoder = RowEncoder(processing_class, train_on, image_root=image_root, **options)
    return encoder, Limits(max_length, on_overlength)


def with_prefix_column(sources: Sequence[Source], encoder: RowEncoder) -> list[Source]:
    """Sources that know the column of the teacher's prefix."""
    column, default = encoder.options.teacher_prefix_column, encoder.options.teacher_prefix is not None
    return [replace(source, prefix_column=column, prefix_default=default) for source in sources]


def _check_prefix_column(raw: datasets.Dataset, column: str) -> None:
    """Refuses a column of the teacher's prefix that no row has: all would get the default. Looked for in the text of
    the rows, which is not parsed yet."""
    names = {re.escape(json.dumps(column, ensure_ascii=ascii_only)) for ascii_only in (True, False)}
    pattern = f"({'|'.join(sorted(names))})\\s*:"
    if not pc.any(pc.match_substring_regex(raw.data.column("text"), pattern)).as_py():
        raise DataError(
            f"no row has the column {show(column)}, which {PREFIX} names: correct its name, or give the messages of "
            "`default` as the prefix itself"
        )


def _made_of(plan: np.ndarray, made_of: np.ndarray) -> np.ndarray:
    """The encoded rows of planned raw rows, in their order: a conversation may have become several."""
    first = np.searchsorted(made_of, plan, side="left")
    counts = np.searchsorted(made_of, plan, side="right") - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within


def _unread(sources: Sequence[Source]) -> list[str]:
    """Notes of files that lie beside those of a source and that nothing reads."""
    notes = []
    for source in sources:
        names = [show(file.name, 80) for file in unread_of(source)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            notes.append(f"{show(source.path)}: the split {source.split} is read, and not {', '.join(names[:3])}{more}")
    return notes


def _column(encoded: datasets.Dataset, name: str) -> np.ndarray:
    """A column without missing values, out of Arrow: `datasets` would make a Python object of each value."""
    return encoded.data.column(name).to_numpy()


def _source_of(raw: datasets.Dataset) -> np.ndarray:
    """The number of each raw row's source."""
    return _numbers(raw, "source")


def _numbers(raw: datasets.Dataset, column: str) -> np.ndarray:
    """A column of rows that may be selected ones, out of Arrow: `datasets` looks at each value."""
    numbers = _column(raw, column)
    return numbers if raw._indices is None else numbers[raw._indices.column(0).to_numpy()]


def _count(encoded: datasets.Dataset, raw: datasets.Dataset, sources: Sequence[Source], limits: Limits) -> BuildReport:
    """The report's numbers that count every row once."""
    status, length = _column(encoded, "status"), _column(encoded, "length")
    bad, kept = np.flatnonzero(status == "bad"), status == "ok"
    made_of = _column(encoded, "raw")
    by_teacher = np.array([source.answers == "teacher" for source in sources])[_source_of(raw)[made_of]]
    images, kind = images_per_row(encoded), _column(encoded, "kind")
    is_text, dropped = kind == "text", status == "dropped"
    beyond = np.where(kept, np.maximum(length - (limits.max_length or length.max()), 0), np.where(dropped, length, 0))
    return BuildReport(
        rows_read=len(raw),
        rows_kept=distinct(made_of[kept]),
        bad_rows=len(bad),
        first_bad=[f"{_place(raw, made_of[i])}: {encoded[int(i)]['problem']}" for i in bad[:3]],
        truncated=int((kept & (length > (limits.max_length or length.max()))).sum()),
        dropped=int(dropped.sum()),
        tokens_read=int(length[kept | dropped].sum()),
        tokens_cut=int(beyond.sum()),
        chat_rows=int((kept & (kind == "chat")).sum()),
        prompt_only_rows=int((_column(encoded, "prompt_only") & ~by_teacher).sum()),
        plain_text_rows=int((kept & is_text).sum()),
        promptless_rows=int((kept & ~is_text & (_column(encoded, "prompt_length") == 0)).sum()),
        teacher_answer_rows=int((kept & by_teacher).sum()),
        image_rows=int((images > 0).sum()),
        images=int(images.sum()),
        longest=int(length.max()),
        stop_tokens_added=int(_column(encoded, "extended").sum()),
        unterminated_rows=int(_column(encoded, "unterminated").sum()),
        weighted_rows=distinct(made_of[kept & _weighs(encoded)]),
        teacher_text_rows=distinct(made_of[np.asarray(pc.is_valid(encoded.data.column("teacher_prompt_length")))]),
    )


def _weighs(encoded: datasets.Dataset) -> np.ndarray:
    """[rows] bool: whether a weight in the divergence is not 1."""
    of_tokens = np.asarray(pc.is_valid(encoded.data.column("kd_weights")))
    weighs: np.ndarray = (_column(encoded, "kd_weight") != 1) | of_tokens
    return weighs


def images_per_row(encoded: datasets.Dataset) -> np.ndarray:
    """Images of every row, counted in Arrow: their bytes are not read."""
    return np.asarray(pc.fill_null(pc.list_value_length(encoded.data.column("images")), 0))


def _with_images(
    contents: Sequence[SourceContent], encoded: datasets.Dataset, raw: datasets.Dataset
) -> list[SourceContent]:
    """What sources have, their image files included: by the size of each, for reading them all would take too long."""
    images = pc.list_flatten(encoded.data.column("images"))
    in_rows = pc.is_valid(pc.struct_field(images, "bytes"))  # these are a part of the text
    paths = pc.if_else(in_rows, None, pc.struct_field(images, "path")).to_pylist()
    if not any(paths):
        return list(contents)
    owner = np.repeat(np.arange(len(encoded)), images_per_row(encoded))
    of_source = _source_of(raw)[_column(encoded, "raw")[owner]]
    found = []
    for number, one in enumerate(contents):
        # Each once: a conversation may have become several rows.
        files = dict.fromkeys(path for path, source in zip(paths, of_source, strict=True) if path and source == number)
        digest = xxhash.xxh3_128(" ".join([one.content, *map(_size, files)]).encode())
        found.append(replace(one, content=digest.hexdigest()) if files else one)
    return found


def _size(path: str) -> str:
    try:
        return str(os.stat(path).st_size)
    except OSError:
        return "missing"


def _refuse(
    encoded: datasets.Dataset, raw: datasets.Dataset, report: BuildReport, max_bad_rows: int, limits: Limits
) -> None:
    if report.bad_rows > max_bad_rows:
        listed = "\n  ".join(report.first_bad)
        raise DataError(
            f"{report.bad_rows} of {len(raw)} rows cannot be used, and data.max_bad_rows is {max_bad_rows}. The "
            f"first:\n  {listed}\nRepair them, or raise data.max_bad_rows to leave them out"
        )
    long = np.flatnonzero(_column(encoded, "status") == "long")
    if len(long):
        first = [encoded[int(i)] for i in long[:3]]
        listed = "\n  ".join(f"{_place(raw, row['raw'])}: {row['length']} tokens{row['problem']}" for row in first)
        raise DataError(
            f"{len(long)} of {len(encoded)} rows are longer than max_length ({limits.max_length} tokens); the "
            f"longest has {report.longest}. The first:\n  {listed}\nRaise data.max_length, or set data.on_overlength "
            "to truncate (cuts from the right) or drop"
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
    rows: dict[str, dict[int, None]] = {}
    counts = pc.fill_null(pc.list_value_length(encoded.data.column("notes")), 0)
    some = encoded.select_columns(["raw", "notes"])
    for i in np.flatnonzero(np.asarray(counts)):
        row = some[int(i)]
        for note in row["notes"]:
            rows.setdefault(note, {})[row["raw"]] = None
    return [f"{note} ({len(where)} rows, the first: {_place(raw, next(iter(where)))})" for note, where in rows.items()]


def _count_tokens(encoded: datasets.Dataset, epoch: np.ndarray, limits: Limits, report: BuildReport) -> None:
    """The report's sums over the rows of an epoch."""
    lengths = np.minimum(_column(encoded, "length"), limits.max_length or np.iinfo(np.int32).max)
    report.rows_per_epoch = len(epoch)
    report.supervised_tokens = int(_column(encoded, "supervised")[epoch].sum())
    report.total_tokens = int(lengths[epoch].sum())
    of_teacher = pc.fill_null(pc.list_value_length(encoded.data.column("teacher_input_ids")), 0)
    report.teacher_tokens = int(np.where(np.asarray(of_teacher) > 0, of_teacher, lengths)[epoch].sum())


def _row_ids(made_of: np.ndarray, source: np.ndarray, number: np.ndarray) -> pa.Array:
    """`source:row`, and `source:row:turn` for each row of a conversation that became several.

    Args:
        made_of: the raw row of each encoded one, in order; `source` and `number` are that one's.
    """
    ids = _joined(source, number)
    turn = np.arange(len(made_of)) - np.searchsorted(made_of, made_of, side="left")
    several = np.searchsorted(made_of, made_of, side="right") - np.searchsorted(made_of, made_of, side="left") > 1
    return pc.if_else(several, _joined(source, number, turn), ids) if several.any() else ids


def _joined(*numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(*(pa.array(one).cast(pa.string()) for one in numbers), ":")


def _image_extremes(encoded: datasets.Dataset, raw: datasets.Dataset, rows: np.ndarray) -> list[tuple[int, str]]:
    """See `BuildReport`; `rows` are those of the data set, among which a row may come more than once."""
    column = encoded.data.column("sizes")
    sides = np.asarray(pc.list_flatten(column)).reshape(-1, 2)
    owner = np.repeat(np.arange(len(encoded)), np.asarray(pc.fill_null(pc.list_value_length(column), 0)) // 2)
    kept = np.isin(owner, rows)
    sides, owner = sides[kept].astype(np.int64), owner[kept]
    made_of = _column(encoded, "raw")
    source = _source_of(raw)[made_of[owner]]
    area, least = sides.prod(1), sides.min(1, initial=2**31)
    chosen: dict[int, None] = {}
    for number in np.unique(source):
        of_source = np.flatnonzero(source == number)
        for worth in (area, -area, least, least / sides.max(1)):
            chosen[int(owner[of_source[worth[of_source].argmin()]])] = None
    first = {int(row): at for at, row in reversed(list(enumerate(rows)))} if chosen else {}
    return [(first[row], _place(raw, made_of[row])) for row in chosen]


def _assemble(
    encoded: datasets.Dataset,
    raw: datasets.Dataset,
    sources: Sequence[Source],
    rows: np.ndarray,
    report: BuildReport,
    kept: list[str],
) -> datasets.Dataset:
    made_of = _column(encoded, "raw")
    origin = _source_of(raw)[made_of]
    new: dict[str, Any] = {
        "row_id": _row_ids(made_of, origin, _numbers(raw, "row")[made_of]),
        "ce": np.array([source.ce for source in sources])[origin],
        "answers": np.array([source.answers == "teacher" for source in sources])[origin],
    }
    losses = [source_loss(source) for source in sources]
    for column in LOSS_COLUMNS if any(losses) else ():
        new[column] = [losses[source].get(column) for source in origin]
        kept = [*kept, column]
    # In one table: with `add_column` each value of a column would be hashed for itself.
    beside = datasets.Dataset(datasets.table.InMemoryTable.from_pydict(new))
    full = datasets.concatenate_datasets([encoded, beside], axis=1)
    if len(rows) != len(encoded) or (rows != np.arange(len(encoded))).any():
        full = full.select(rows)
    columns = ["input_ids", "labels", "prompt_length", "ce", "row_id"]
    columns += ["text", "images"] if report.images else []
    columns += [f"teacher_{name}" for name in ("input_ids", "labels", "prompt_length")] * bool(report.teacher_text_rows)
    columns += ["kd_weight", "kd_weights"] * bool(report.weighted_rows)
    columns += ["answers"] if any(source.answers == "teacher" for source in sources) else []
    full = full.select_columns([*columns, *kept])
    return full.rename_column("route", ROUTE_COLUMN) if "route" in kept else full
