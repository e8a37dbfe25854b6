"""A row as tokens: what is known of it, rows that were tokens already, and what becomes of those that are too long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kdtrain.data.conversation import first_messages
from kdtrain.data.errors import RowError, show
from kdtrain.data.images import Image
from kdtrain.data.kd_weights import WEIGHT, read_weight, read_weights
from kdtrain.data.multimodal import Processed
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX

ON_OVERLENGTH = ("error", "truncate", "drop")
# What trl's rows have in place of labels: 1 where a token is supervised.
MASKS = ("completion_mask", "assistant_masks")


@dataclass(frozen=True)
class EncodedRow:
    """One row as tokens.

    `labels` has the length of `input_ids`, -100 where nothing is supervised. `prompt_length` leading tokens are the
    prompt to generate from, up to and including the generation prompt of the last assistant turn: all of them in a
    prompt-only row, 0 in plain text.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    kind: str = "chat"  # chat | completion | text
    prompt_only: bool = False
    turn_starts: tuple[int, ...] = ()  # prompt lengths of the supervised turns, for truncated rows
    turn_messages: tuple[int, ...] = ()  # of the conversation, up to and with each of these turns
    extended: bool = False  # the stop token was outside the template's markers and was added to the mask
    unterminated: bool = False  # a supervised turn ends without a token that would make the model stop
    text: str | None = None  # of a row with images: the rendered conversation, one placeholder per image
    images: tuple[Image, ...] = ()
    notes: tuple[str, ...] = ()  # what the row says and is not used, or where it differs from inference
    sizes: tuple[int, ...] = ()  # width and height of each image in pixels, one behind the other
    answer: str | None = None  # what an answer is checked against, where it is kept
    images_end: int = 0  # leading tokens that must stay, or the model would miss a part of an image
    processed: Processed | None = field(default=None, repr=False, compare=False)  # where `RowEncoder` keeps pixels
    teacher: EncodedRow | None = None  # the row as the teacher reads it, where that is other text; labels are the same
    route: str | None = None  # which of several teachers answers for it
    chat: str | None = None  # as of conversation.py, where `RowEncoder` keeps it
    kd_weight: float = 1.0  # what its divergence counts, whoever writes its answer
    kd_weights: list[float] | None = None  # and that of each of its tokens, as the labels; None is 1 for all

    @property
    def supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def supervised_ids(self) -> list[int]:
        return [label for label in self.labels if label != IGNORE_INDEX]

    def first_tokens(self, count: int, **changes: Any) -> EncodedRow:
        """The row without what follows them."""
        weights = None if self.kd_weights is None else self.kd_weights[:count]
        kept = {"input_ids": self.input_ids[:count], "labels": self.labels[:count], "kd_weights": weights}
        return replace(self, **{**kept, **changes})

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two texts that student and teacher read."""
        return max(len(self.input_ids), 0 if self.teacher is None else len(self.teacher.input_ids))


def tokenised_row(row: Mapping[str, Any]) -> EncodedRow:
    """The tokens of a row with `input_ids`, and `labels` or trl's masks; its images are left out."""
    ids = _ints(row["input_ids"])
    labels = _labels(row, ids)
    if len(ids) != len(labels) or not ids:
        raise DataError(
            f"a tokenised row ({show(row.get('row_id', 'no row_id'))}) needs labels as long as its input_ids: "
            f"{len(ids)} ids, {len(labels)} labels"
        )
    mask = _ints(row.get("completion_mask"))
    before_completion = next((i for i, on in enumerate(mask) if on), len(mask))  # 0 without a mask
    start = int(row.get("prompt_length", before_completion))
    of_row, of_tokens = _weights(row, len(ids))
    encoded = EncodedRow(
        *(ids, labels, start),
        prompt_only=start == len(ids),
        turn_starts=(start,),
        kd_weight=of_row,
        kd_weights=of_tokens,
    )
    return replace(encoded, teacher=_tokenised_teacher(row, encoded))


def _weights(row: Mapping[str, Any], tokens: int) -> tuple[float, list[float] | None]:
    """Of the row, and of its tokens: `kd_weight` is one or the other, `kd_weights` is what the encoder gives."""
    given, of_tokens = _plain(row.get(WEIGHT)), _plain(row.get(f"{WEIGHT}s"))
    try:
        if isinstance(given, list | tuple):
            return 1.0, read_weights(given, tokens)
        return read_weight(given), None if of_tokens is None else read_weights(of_tokens, tokens, f"{WEIGHT}s")
    except RowError as error:
        raise DataError(f"a tokenised row ({show(row.get('row_id', 'no row_id'))}): {error}") from error


def _plain(values: Any) -> Any:
    """Data sets with a torch or numpy format give tensors, of no dimension for a number."""
    return values.tolist() if hasattr(values, "tolist") else values


def _tokenised_teacher(row: Mapping[str, Any], student: EncodedRow) -> EncodedRow | None:
    ids = _ints(row.get("teacher_input_ids"))
    if not ids:
        return None
    labels, start = _ints(row["teacher_labels"]), int(row["teacher_prompt_length"])
    teacher = EncodedRow(ids, labels, start, prompt_only=student.prompt_only, turn_starts=(start,))
    if len(labels) != len(ids) or student.supervised_ids != teacher.supervised_ids:
        raise DataError(
            f"a tokenised row ({show(row.get('row_id', 'no row_id'))}) needs teacher_labels as long as its "
            "teacher_input_ids, and with the same supervised tokens as its labels"
        )
    return teacher


def _labels(row: Mapping[str, Any], ids: list[int]) -> list[int]:
    """The labels; without any, the ids where all of trl's masks are 1."""
    masks = [_ints(row[name]) for name in MASKS if row.get(name) is not None]
    if row.get("labels") is not None or not masks:
        return _ints(row.get("labels"))
    return [token if all(on) else IGNORE_INDEX for token, *on in zip(ids, *masks, strict=True)]


def _ints(values: Any) -> list[int]:
    """Data sets with a torch or numpy format give tensors."""
    return [] if values is None else list(_plain(values))


@dataclass(frozen=True)
class Limits:
    """`max_length` in tokens (None: no limit) and what becomes of longer rows."""

    max_length: int | None
    on_overlength: str

    def __post_init__(self) -> None:
        if self.on_overlength not in ON_OVERLENGTH:
            raise DataError(f"on_overlength must be one of {', '.join(ON_OVERLENGTH)}, not {self.on_overlength!r}")
        if self.max_length is not None and self.max_length < 2:
            raise DataError(f"max_length must be at least 2, not {self.max_length}: one token predicts the next")


def truncate(row: EncodedRow, max_length: int) -> EncodedRow | None:
    """Cuts from the right: the system prompt stays, and no end token is made up for an answer without its end.

    The prompt to generate from becomes that of the last turn whose prompt still fits; there is none (0) if no turn's
    does. None when nothing is left to train on or generate from, or a part of an image would be cut off. What the
    teacher's text loses of the supervised tokens, the student's loses too, and the other way round.
    """
    if row.longest <= max_length:
        return row
    if row.teacher is not None:
        return _truncate_both(row, row.teacher, max_length)
    labels = row.labels[:max_length]
    if row.prompt_only or labels.count(IGNORE_INDEX) == max_length or row.images_end > max_length:
        return None
    # All images of the row reach the model, so that a prompt to generate from needs all of their tokens.
    fitting = [start for start in row.turn_starts if row.images_end <= start < max_length]
    start = fitting[-1] if fitting else 0
    cut = row.first_tokens(max_length, prompt_length=start)
    return _with_turns(cut, sum(start < max_length for start in row.turn_starts))


def _truncate_both(row: EncodedRow, teacher: EncodedRow, max_length: int) -> EncodedRow | None:
    views = (row, teacher)
    kept = min(sum(label != IGNORE_INDEX for label in view.labels[:max_length]) for view in views)
    if row.prompt_only or not kept:
        return None
    ends = [_end(view, kept, max_length) for view in views]
    # The prompt is that of the same turn for both: the last one that fits into both.
    starts = zip(*(view.turn_starts for view in views), strict=True)
    fitting = [pair for pair in starts if all(start < end for start, end in zip(pair, ends, strict=True))]
    own, other = (
        view.first_tokens(end, prompt_length=start)
        for view, end, start in zip(views, ends, fitting[-1] if fitting else (0, 0), strict=True)
    )
    return _with_turns(replace(own, teacher=other), len(fitting))


def _with_turns(row: EncodedRow, turns: int) -> EncodedRow:
    """A row that was cut, with the conversation up to the last of its first `turns`, which begin in it."""
    if row.chat is None or (turns and not row.turn_messages):
        return row
    return replace(row, chat=first_messages(row.chat, row.turn_messages[turns - 1]) if turns else None)


def _end(row: EncodedRow, kept: int, max_length: int) -> int:
    """Where a row ends that keeps its first supervised tokens only."""
    if kept == row.supervised:
        return min(len(row.input_ids), max_length)
    return [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX][kept - 1] + 1
