"""The text of a row's tokens, cut where supervision begins and ends, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kdtrain.data.multimodal import image_token_ids
from kdtrain.losses.reduce import IGNORE_INDEX


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that are all supervised or all not; with `special`, one special token, `tokens` times."""

    text: str
    tokens: int
    supervised: bool
    special: bool = False


def special_ids(processing_class: Any) -> frozenset[int]:
    """Ids of control tokens and of those that stand for images, which are not text."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(control.union(tokenizer.all_special_ids, image_token_ids(processing_class)))


def segments(
    tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], apart: frozenset[int] = frozenset()
) -> list[Segment]:
    """A row as text. The texts make up the decoded row, special tokens included; those in `apart` stand alone.

    Cut in the decoded row and not decoded apart, because SentencePiece drops the space in front of the first token. A
    character whose bytes lie on both sides of a cut belongs to the token that completes it.
    """
    states = zip(input_ids, labels, strict=True)
    keys = [(label != IGNORE_INDEX, token if token in apart else None) for token, label in states]
    whole, found, end, cut = _decode(tokenizer, input_ids), [], 0, 0
    for (supervised, token), run in groupby(keys):
        count = len(list(run))
        end, start = end + count, cut
        prefix = whole if end == len(keys) else _decode(tokenizer, input_ids[:end])
        while not whole.startswith(prefix):  # it ends in the U+FFFD of an incomplete character
            prefix = prefix[:-1]
        cut = max(cut, len(prefix))
        found.append(Segment(whole[start:cut], count, supervised, token is not None))
    return found


def merged(parts: Sequence[Segment]) -> list[Segment]:
    """The same with special tokens back in the text around them."""
    runs = [(supervised, list(run)) for supervised, run in groupby(parts, key=lambda part: part.supervised)]
    return [
        Segment("".join(part.text for part in run), sum(part.tokens for part in run), supervised)
        for supervised, run in runs
    ]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; the texts make up the decoded whole, special tokens included.

    A character whose bytes several tokens share belongs to the last of them, and the text of the others is empty. Each
    token is decoded behind the few before it, since SentencePiece drops the space in front of the first one.
    """
    texts, start, end = [], 0, 0  # ids[start:end] is the context of what comes next, written already
    for i in range(len(ids)):
        before, now = _decode(tokenizer, ids[start:end]), _decode(tokenizer, ids[start : i + 1])
        unfinished = now.endswith("\ufffd") and i + 1 < len(ids)
        texts.append("" if unfinished else now[len(before) :])
        if not unfinished:
            start, end = end, i + 1
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
