"""A model's forward on a batch whose mask the host knows: it need not ask the device whether there is padding.

transformers reads two numbers from the device at the beginning of a forward, to choose an attention kernel: whether the
mask has padding, and of rows in one line whether there are several. The host would wait there for all that it has
queued before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import masking_utils

from kdtrain.data.packing import ForwardInputs
from kdtrain.host import on_host

_SEEN: ContextVar[ForwardInputs | None] = ContextVar("the batch whose forward runs", default=None)


@contextmanager
def mask_known(seen: ForwardInputs) -> Iterator[None]:
    """Answer from the host inside. Not of batches with images, whose encoders have masks of their own."""
    has_images = any(name.startswith(("pixel_", "image_", "video_")) for name in seen.model_inputs)
    token = _SEEN.set(None if has_images else seen)
    try:
        yield
    finally:
        _SEEN.reset(token)


def _fast_all(mask: torch.Tensor) -> Any:
    """In place of transformers' function of this name: whether a mask, or its first columns, has ones alone."""
    seen = None if torch.compiler.is_compiling() else _SEEN.get()
    if seen is None or seen.mask is None or seen.mask.device.type == "cpu":
        return _original_all(mask)
    if not mask.numel():
        return True
    if mask.shape != seen.mask.shape:  # prompt tuning has put virtual tokens in front
        return _original_all(mask)
    return bool(on_host(seen.mask).all())


def _find_packed(position_ids: torch.Tensor) -> torch.Tensor | None:
    """In place of transformers' function of this name: the number of each position's document in its line."""
    seen = None if torch.compiler.is_compiling() else _SEEN.get()
    if seen is None or not seen.in_lines or position_ids.shape != seen.model_inputs["position_ids"].shape:
        return _original_packed(position_ids)
    if seen.one_each:
        return None
    found: torch.Tensor = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return found


_original_all: Any = getattr(masking_utils, "fast_all", None)
_original_packed = masking_utils.find_packed_sequence_indices
if _original_all is not None:  # releases before it ask in another way, and wait
    masking_utils.fast_all = _fast_all
masking_utils.find_packed_sequence_indices = _find_packed
