"""Models whose weights FSDP 2 or ZeRO-3 keep in pieces, or accelerate away from where they run: putting them together
where nobody else does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def runs_on(model: nn.Module) -> torch.device:
    """Where a model's inputs go; accelerate may keep its weights elsewhere, and bring them there when they are used."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return next(model.parameters()).device


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter that FSDP2 has sharded; another one as it is.

    Each rank computes a gradient for all of it, from its own rows. By default `full_tensor` takes these gradients for
    equal copies: the loss would be right and the gradient wrong. FSDP2 averages over ranks, and `Partial("avg")` asks
    for the same here.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


@torch.no_grad()
def fill(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write a whole tensor into a parameter, of which FSDP2 may keep a piece here; a collective then.

    Raises:
        RuntimeError: its shape is another one.
    """
    if parameter.shape != value.shape:
        raise RuntimeError(f"a tensor of {tuple(value.shape)} does not fit one of {tuple(parameter.shape)}")
    if isinstance(parameter, DTensor):
        moved = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Models that are made inside are whole, also in a run of ZeRO-3: it cannot cut one that has no numbers."""
    before = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = before


@contextmanager
def put_together_by_module(model: nn.Module) -> Iterator[None]:
    """Under ZeRO-3, for a model that is not wrapped yet: a module's own weights are whole while it runs.

    A collective: all ranks run the same modules inside. Elsewhere nothing.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    whole: dict[nn.Module, list[AbstractContextManager[Any]]] = {}

    def before(module: nn.Module, args: Any) -> None:
        gathered = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        gathered.__enter__()
        whole.setdefault(module, []).append(gathered)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        whole[module].pop().__exit__(None, None, None)

    handles = []
    try:
        for module in model.modules():
            if any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for left in whole.values():  # of a forward that has failed
            for gathered in left:
                gathered.__exit__(None, None, None)
