"""One call of transformers' `generate` that leaves nothing behind: not a mode, a setting, or a random state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.models.experts import without_router_logits
from kdtrain.models.probe import evaluating, own_random_state


def call_generate(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, device: torch.device, **more: Any
) -> tuple[Any, int]:
    """What `model.generate` returns for prompts, and the number of positions P that it begins with."""
    input_ids_BP = left_padded(prompts, config.pad_token_id, device)
    mask_BP = left_padded([[1] * len(prompt) for prompt in prompts], 0, device)
    # In eval mode: dropout, a LoRA adapter's included, must not reach the samples.
    with evaluating(model), _only(model, config), without_router_logits(model), _images_within_forward(model):
        made = model.generate(
            input_ids=input_ids_BP,
            attention_mask=mask_BP,
            generation_config=config,
            synced_gpus=is_sharded(model),
            **more,
        )
    return made, input_ids_BP.shape[1]


def is_sharded(model: nn.Module) -> bool:
    """Sharded, every forward is a collective: all ranks must run as many as the one with the longest answer."""
    return isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled()


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> torch.Tensor:
    """[B, P]: tokens are appended at the right end, so that is where all prompts have to end."""
    width = max(len(row) for row in rows)
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's own generation config, from which `generate` fills in whatever `config` leaves open.

    A checkpoint's repetition penalty would silently bias the samples that the student is judged on.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = owner.generation_config
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = own


@contextmanager
def _images_within_forward(model: Any) -> Iterator[None]:
    """Have a model in pieces of FSDP2 encode images in its forward, where its weights are whole.

    `generate` would call the vision encoder by itself, before the first forward.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    owner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    owner._supports_mm_encoder_outputs = lambda: False
    try:
        yield
    finally:
        del owner._supports_mm_encoder_outputs


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A fixed random state inside, the caller's own one again after."""
    with own_random_state(device):
        torch.manual_seed(seed)
        yield
