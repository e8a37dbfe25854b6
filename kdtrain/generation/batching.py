"""Which prompts of a window are written in one call.

As many as may share a batch, the longest first, so that few positions are padding; and no more than there is room for.
What a row gets does not depend on it, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kdtrain.data.visual_batch import images_left
from kdtrain.generation.call import is_sharded
from kdtrain.generation.padding import answered_together
from kdtrain.models.vocabulary import vocabulary_size

CALL_BYTES = 4 * 2**30
"""What the rows of a call take at most: a constant, so that calls do not depend on the machine."""
DRAW_BYTES = 24
"""That drawing a token takes for each one of the vocabulary: scores, probabilities, and sums of these in float64."""


@dataclass(frozen=True)
class Room:
    """How many rows a call may have."""

    rows: int | None = None
    """Of `rlhf.generation.batch_size`; None is as many as have room in `CALL_BYTES`."""
    rows_if_unknown: int = 1
    """Where the model's config does not say what a token takes."""


@dataclass(frozen=True)
class PromptInputs:
    """What a model is given to write one answer."""

    ids: Sequence[int]
    seed: int
    name: str
    """Of the row, for messages."""
    per_token: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """What the model takes for every token beside its id."""
    visual: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Its own entries of the tensors of images."""

    @property
    def has_image(self) -> bool:
        return images_left(self.visual, {name: [len(value)] for name, value in self.visual.items()})


def calls(
    model: Any, groups: Sequence[Sequence[PromptInputs]], new_tokens: int, room: Room, device: torch.device
) -> list[list[tuple[int, int]]]:
    """For each call its prompts, as (group, place in the group).

    Sharded, a collective: all ranks make as many calls for each group, in which those with fewer prompts write one
    once more. So a vision encoder in pieces runs on all of them or on none.

    Args:
        groups: prompts whose images can share a batch. Sharded, as many on every rank, with images in the same ones.
        new_tokens: that each prompt may get.

    Raises:
        PreflightError: of `answered_together`.
    """
    found = [
        [
            [(g, i) for i in call]
            for together in answered_together(model, [prompt.ids for prompt in prompts], device, images=False)
            for call in _parts(model, prompts, together, new_tokens, room)
        ]
        for g, prompts in enumerate(groups)
    ]
    if is_sharded(model):
        found = [_with_an_image(own, prompts) for own, prompts in zip(found, groups, strict=True)]
        most = torch.tensor([len(own) for own in found], device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        for own, count in zip(found, most.tolist(), strict=True):
            own += [own[-1][-1:]] * (count - len(own))
    return [call for own in found for call in own]


def _with_an_image(
    calls_of_group: list[list[tuple[int, int]]], prompts: Sequence[PromptInputs]
) -> list[list[tuple[int, int]]]:
    """The calls of a group, each with an image where any prompt has one, which is then the last one of the call."""
    shown = next((i for i, prompt in enumerate(prompts) if prompt.has_image), None)
    if shown is None:
        return calls_of_group
    found = []
    for call in calls_of_group:
        own = next((one for one in call if prompts[one[1]].has_image), None)
        rest = [one for one in call if one != own]
        found.append([*rest, (call[0][0], shown) if own is None else own])
    return found


def _parts(
    model: Any, prompts: Sequence[PromptInputs], rows: Sequence[int], new_tokens: int, room: Room
) -> Iterator[list[int]]:
    """The rows by falling length, as many at a time as there is room for; at least one."""
    rows = sorted(rows, key=lambda i: -len(prompts[i].ids))
    per_token = cache_bytes(model)
    of_draw = DRAW_BYTES * vocabulary_size(model)
    while rows:
        count = room.rows
        if count is None:
            longest = len(prompts[rows[0]].ids) + new_tokens
            of_row = None if per_token is None else longest * per_token + of_draw
            count = room.rows_if_unknown if of_row is None else max(CALL_BYTES // of_row, 1)
        yield list(rows[:count])
        rows = rows[count:]


def cache_bytes(model: Any) -> int | None:
    """Bytes that keys and values of a token take in all layers; None where the model's config does not say.

    Those of a layer with a window or a state of its own take less.
    """
    config = model.config.get_text_config(decoder=True)
    layers, heads, width = (getattr(config, name, None) for name in _SHAPE)
    if not (layers and heads and width):
        return None
    size = getattr(config, "head_dim", None) or width // heads
    return 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * size * model.dtype.itemsize


_SHAPE = ("num_hidden_layers", "num_attention_heads", "hidden_size")
