"""The rows of a window's batches, dealt anew: which micro-batch a row is in changes neither loss nor gradient.

Both are divided by D, the supervised tokens of the whole window (but for the load balancing of experts, which is a mean
over micro-batches by its definition).

Shapes: B rows, T positions, N rows of all the batches together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import functional

from kdtrain.data.batch import Batch, Rows, StudentChunks, TeacherImages, TeacherTokens
from kdtrain.data.visual_batch import CannotShareError, Owned, images_left, join_visual
from kdtrain.host import on_host, send_known
from kdtrain.losses.reduce import IGNORE_INDEX

# What of Rows names rows one by one, and stands for a row where its batch does not say.
_MISSING: dict[str, Any] = {
    "ids": "",
    "truncated": False,
    "chats": None,
    "answers": None,
    "samples": 0,
    "cut": False,
    "teachers": None,
    "losses": (None, None),
    "pictured": False,
    "images": (),
}


def taken(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, in any order, perhaps more than once, without padding that none of them needs.

    Raises:
        CannotShareError: it is not known which row owns what of a tensor.
    """
    return replace(rows_of([batch], rows, 0, None), stand_in=batch.stand_in)


def dealt_by_length(batches: Sequence[Batch], pad_id: int, multiple: int | None = None) -> list[Batch]:
    """As many batches of as many rows each, with rows of like length together, so that less is padding.

    The longest rows come first, in the batch with the fewest rows: so none is larger, in rows times length, than the
    largest was. Batches with `all_repeated` stay as they are, and so do all where nothing is saved, or where rows
    cannot share a batch.
    """
    at = [i for i, batch in enumerate(batches) if not batch.all_repeated]
    new = [batches[i] for i in at]
    if len(new) < 2:
        return list(batches)
    lengths = row_lengths(new)
    groups = by_length(range(len(lengths)), lengths, [len(batch) for batch in new])
    try:
        dealt = [rows_of(new, rows, pad_id, multiple) for rows in groups]
    except CannotShareError:
        return list(batches)
    if not _saves(new, dealt):
        return list(batches)
    filled = dict(zip(at, dealt, strict=True))
    return [filled.get(i, batch) for i, batch in enumerate(batches)]


def row_lengths(batches: Sequence[Batch]) -> list[int]:
    """Of each row of all batches: the positions up to its last token."""
    return [length for batch in batches for length in _lengths(_per_token(batch)["attention_mask"], batch.labels)]


def by_length(rows: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Rows in groups of these sizes: the longest in the smallest one, which comes first; equal ones in their order.

    Args:
        lengths: of all rows, by number.
    """
    order = sorted(rows, key=lambda row: -lengths[row])
    return [order[a:b] for a, b in pairwise(accumulate(sorted(sizes), initial=0))]


def _saves(before: Sequence[Batch], after: Sequence[Batch]) -> bool:
    """Whether batches have fewer positions in all, and the largest no more, for student and teacher."""
    old, new = ([_positions(batch) for batch in part] for part in (before, after))
    largest = [list(map(max, zip(*sizes, strict=True))) for sizes in (old, new)]
    smaller = all(b <= a for a, b in zip(*largest, strict=True))
    return smaller and sum(map(sum, new)) < sum(map(sum, old))


def _positions(batch: Batch) -> tuple[int, int]:
    """B·T, padding included: as the student reads it, and as a teacher does that reads other tokens."""
    return batch.labels.numel(), 0 if batch.teacher_tokens is None else batch.teacher_tokens.labels.numel()


# ---- rows of several batches -----------------------------------------------------------------------------------------


def rows_of(batches: Sequence[Batch], order: Sequence[int], pad_id: int, multiple: int | None) -> Batch:
    """A batch of some rows of several, by their numbers in all of these together, with all that is known of them.

    Raises:
        CannotShareError: their images cannot share a batch, or it is not known which row owns what of a tensor.
    """
    _check(batches)
    visual, sizes = join_visual([Owned(b.model_inputs, b.visual_sizes, len(b)) for b in batches], order)
    tokens = _tokens(batches, order, pad_id, multiple)
    has_images = images_left(visual, sizes)
    return Batch(
        labels=tokens.pop("labels"),
        kd_token_weights=tokens.pop(_WEIGHTS, None),
        model_inputs={**tokens, **(visual if has_images else {})},
        rows=_rows([batch.rows for batch in batches], [len(batch) for batch in batches], order),
        visual_sizes=sizes if has_images else {},
        teacher_images=_images([b.teacher_images for b in batches], batches, order) if has_images else None,
        blank_images=_images([b.blank_images for b in batches], batches, order) if has_images else None,
        teacher_tokens=_teacher_tokens(batches, order, pad_id, multiple),
        student_chunks=_student_chunks(batches, order, multiple),
        generated_by=batches[0].generated_by,
        all_repeated=batches[0].all_repeated,
    )


def _check(batches: Sequence[Batch]) -> None:
    """Refuses what no row can be told to own, and batches of two kinds."""
    for batch in batches:
        unknown = [*batch.unknown_inputs, *(batch.visual.keys() - batch.visual_sizes.keys())]
        for images in (batch.teacher_images, batch.blank_images):
            unknown += [] if images is None else sorted(images.inputs.keys() - images.sizes.keys())
        if unknown:
            raise CannotShareError(
                f"It is not known which entries of {', '.join(unknown)} belong to which row of a batch. Let the "
                "collator say so in `visual_sizes` (see Batch), or leave them out."
            )
    kinds = {(batch.generated_by, batch.all_repeated, tuple(sorted(batch.token_level))) for batch in batches}
    with_images = [batch for batch in batches if batch.visual_sizes]
    of_images = {(batch.teacher_images is None, batch.blank_images is None) for batch in with_images}
    if len(kinds) > 1 or len(of_images) > 1:
        raise CannotShareError("The batches of a window hold different things for their rows.")


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _tokens(batches: Sequence[Batch], order: Sequence[int], pad_id: int, multiple: int | None) -> dict[str, Any]:
    """Ids, mask, labels and what else there is for every token, as long as the longest of the rows."""
    own_rows, back = _by_batch([len(batch) for batch in batches], order)
    weighs = any(batch.kd_token_weights is not None for batch in batches)
    # On the host, where they were made and which rows are wanted is known, and sent together.
    device = batches[0].labels.device
    own = [
        {name: on_host(values)[rows] for name, values in _per_token(batch, weighs=weighs).items()}
        for batch, rows in zip(batches, own_rows, strict=True)
        if rows
    ]
    longest = max(1, *(length for part in own for length in _lengths(part["attention_mask"], part["labels"])))
    width = _rounded(longest, multiple, max(part["labels"].shape[1] for part in own))
    fill = {"input_ids": pad_id, "labels": IGNORE_INDEX, _WEIGHTS: 1}
    joined = {n: torch.cat([_to_width(part[n], width, fill.get(n, 0)) for part in own])[back] for n in own[0]}
    return {name: send_known(values, device) for name, values in joined.items()}


_WEIGHTS = "kd_token_weights"


def _per_token(batch: Batch, *, weighs: bool = False) -> dict[str, torch.Tensor]:
    """By name, [B, T]; with weights in the divergence where some of the batches have any."""
    ids = batch.model_inputs["input_ids"]
    mask = batch.model_inputs.get("attention_mask")
    mask = torch.ones(ids.shape, dtype=ids.dtype) if mask is None else mask
    found = {"input_ids": ids, "attention_mask": mask, **batch.token_level, "labels": batch.labels}
    if weighs:
        ones = torch.ones(batch.labels.shape)
        found[_WEIGHTS] = ones if batch.kd_token_weights is None else batch.kd_token_weights
    return found


def _lengths(mask_BT: torch.Tensor, labels_BT: torch.Tensor) -> list[int]:
    """Of each row: the positions up to its last token."""
    positions = torch.arange(1, mask_BT.shape[1] + 1)
    used_BT = (on_host(mask_BT) != 0) | (on_host(labels_BT) != IGNORE_INDEX)
    return [int(length) for length in (used_BT * positions).amax(1).tolist()]


def _rounded(longest: int, multiple: int | None, there_is: int) -> int:
    """Up to a multiple, as far as it does not make a batch longer than it came."""
    if multiple is None:
        return longest
    return max(longest, min(-(-longest // multiple) * multiple, there_is))


def _to_width(values: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    missing = width - values.shape[1]
    if missing <= 0:
        return values[:, :width]
    return functional.pad(values, (*(0, 0) * (values.dim() - 2), 0, missing), value=fill)


def _by_batch(counts: Sequence[int], order: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Rows by their numbers in all batches: which of each batch's they are, and where each one goes of these."""
    own_rows: list[list[int]] = []
    places: list[int] = []
    start = 0
    for count in counts:
        at = [i for i, row in enumerate(order) if start <= row < start + count]
        own_rows.append([order[i] - start for i in at])
        places += at
        start += count
    return own_rows, sorted(range(len(places)), key=places.__getitem__)


def _chosen(parts: Sequence[torch.Tensor], order: Sequence[int]) -> torch.Tensor:
    own_rows, back = _by_batch([len(part) for part in parts], order)
    chosen = torch.cat([on_host(part)[rows] for part, rows in zip(parts, own_rows, strict=True) if rows])[back]
    return send_known(chosen, parts[0].device)


# ---- the teacher's ---------------------------------------------------------------------------------------------------


def _teacher_tokens(
    batches: Sequence[Batch], order: Sequence[int], pad_id: int, multiple: int | None
) -> TeacherTokens | None:
    """What the teacher reads; of batches that it reads as the student does, the student's."""
    if all(batch.teacher_tokens is None for batch in batches):
        return None
    read = [batch.teacher_tokens or _as_the_student(batch) for batch in batches]
    as_batches = [Batch(model_inputs=tokens.inputs, labels=tokens.labels) for tokens in read]
    if any(tokens.chunks is not None for tokens in read):
        pad_id = 0  # the student's may be no id of the teacher's
    chunks = [tokens.chunks for tokens in read if tokens.chunks is not None]
    if chunks:
        chunks = [_like_labels([tokens.inputs for tokens in read], chunks, order, multiple)]
    return TeacherTokens(
        **_tokens(as_batches, order, pad_id, multiple),
        prompt_lengths=_tensor([tokens.prompt_lengths for tokens in read], order),
        chunks=chunks[0] if chunks else None,
    )


def _student_chunks(batches: Sequence[Batch], order: Sequence[int], multiple: int | None) -> StudentChunks | None:
    chunks = [batch.student_chunks for batch in batches if batch.student_chunks is not None]
    if not chunks:
        return None
    texts = [{key: part[key] for key in ("input_ids", "attention_mask")} for part in map(_per_token, batches)]
    return StudentChunks(
        numbers=_like_labels(texts, [one.numbers for one in chunks], order, multiple),
        aligned_bytes=_chosen([one.aligned_bytes for one in chunks], order),
        answer_bytes=_chosen([one.answer_bytes for one in chunks], order),
    )


def _like_labels(
    texts: Sequence[Mapping[str, Any]], values: Sequence[torch.Tensor], order: Sequence[int], multiple: int | None
) -> torch.Tensor:
    """Numbers of tokens, −100 without one, padded as the tokens are that they belong to."""
    alike = [Batch(model_inputs=text, labels=own) for text, own in zip(texts, values, strict=True)]
    joined: torch.Tensor = _tokens(alike, order, 0, multiple)["labels"]
    return joined


def _as_the_student(batch: Batch) -> TeacherTokens:
    text = {name: value for name, value in _per_token(batch).items() if name in ("input_ids", "attention_mask")}
    return TeacherTokens(**text, labels=batch.labels, prompt_lengths=batch.rows.prompt_lengths)


def _images(
    images: Sequence[TeacherImages | None], batches: Sequence[Batch], order: Sequence[int]
) -> TeacherImages | None:
    """Those of each batch that are not the student's, or None where it has none."""
    if all(of is None for of in images):
        return None
    owned = [
        Owned({}, {}, len(batch)) if of is None else Owned(of.inputs, of.sizes, len(batch))
        for of, batch in zip(images, batches, strict=True)
    ]
    inputs, sizes = join_visual(owned, order)
    return TeacherImages(inputs=inputs, sizes=sizes)


# ---- what is known of the rows ---------------------------------------------------------------------------------------


def _rows(parts: Sequence[Rows], counts: Sequence[int], order: Sequence[int]) -> Rows:
    named = {name: _named(parts, counts, order, name, missing) for name, missing in _MISSING.items()}
    has_keys = all(part.keys for part in parts)  # nothing may stand for a key
    return Rows(
        **named,
        keys=_named(parts, counts, order, "keys", b"") if has_keys else (),
        prompt_lengths=_tensor([part.prompt_lengths for part in parts], order),
        prompts=_prompts([part.prompts for part in parts], order),
        ce=_filled(parts, counts, order, "ce", lambda n: torch.ones(n, dtype=torch.bool)),
        kd_weights=_filled(parts, counts, order, "kd_weights", torch.ones),
        # `places` are of a batch as it was collated, which this is no longer.
    )


def _named(parts: Sequence[Rows], counts: Sequence[int], order: Sequence[int], name: str, missing: Any) -> Any:
    if not any(getattr(part, name) for part in parts):
        return ()
    values = [
        value for part, count in zip(parts, counts, strict=True) for value in getattr(part, name) or [missing] * count
    ]
    return [values[row] for row in order]


def _tensor(parts: Sequence[torch.Tensor | None], order: Sequence[int]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    return _chosen(there, order) if len(there) == len(parts) else None


def _filled(
    parts: Sequence[Rows], counts: Sequence[int], order: Sequence[int], name: str, fill: Callable[[int], torch.Tensor]
) -> torch.Tensor | None:
    values = [getattr(part, name) for part in parts]
    like = next((value for value in values if value is not None), None)
    if like is None:
        return None
    return _chosen(
        [fill(n).to(like) if value is None else value for value, n in zip(values, counts, strict=True)], order
    )


def _prompts(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor] | None], order: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Padded on the left; only prompts that some of the rows need are as long."""
    there = [part for part in parts if part is not None]
    if not there or len(there) < len(parts):
        return None
    width = max(ids.shape[1] for ids, _ in there)
    ids, mask = (_chosen([functional.pad(p[i], (width - p[i].shape[1], 0)) for p in there], order) for i in (0, 1))
    empty = int((on_host(mask).cumsum(1) == 0).sum(1).min())
    return ids[:, min(empty, width - 1) :], mask[:, min(empty, width - 1) :]
