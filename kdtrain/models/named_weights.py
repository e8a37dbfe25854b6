"""The student's weights one by one, under the names of the model without an adapter, for an engine that has no adapter.

The adapter is added to a copy of each weight on its way: the student is not merged and unmerged for it, which would
leave other weights than before (w + d - d is not w) and take the memory of a second model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftType
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from kdtrain.errors import NotAvailableError

_BASE = ".base_layer."


def check_mergeable(model: nn.Module, instead: str) -> None:
    """Refuse an adapter that is more than a product added to weights.

    Args:
        instead: what to do, as a sentence.

    Raises:
        NotAvailableError: such as DoRA, a prompt, or several adapters at a time.
    """
    reason = _why_not(model) if is_peft_model(model) else None
    if reason is not None:
        raise NotAvailableError(f"vLLM gets the student's weights and no adapter, and {reason}. {instead}")


def _why_not(model: Any) -> str | None:
    config = model.active_peft_config
    if config.peft_type != PeftType.LORA:
        return f"{getattr(config.peft_type, 'value', config.peft_type)} cannot be written into them yet: use LoRA"
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active at a time, which is not available yet"
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        return "target_parameters cannot be written into them yet: use target_modules"
    for name in ("use_dora", "lora_bias", "trainable_token_indices", "alora_invocation_tokens", "arrow_config"):
        if getattr(config, name, None):
            return f"{name} cannot be written into them yet: use plain LoRA"
    if any(isinstance(module, LoraLayer) and module.merged for module in model.modules()):
        return "its adapter is merged: call unmerge_adapter() first"
    return None


@torch.no_grad()
def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole value of each weight, tied ones once, in a fixed order; under FSDP 2 a collective.

    Of a LoRA layer W + s·B·A, summed in float32 and rounded to the dtype of W once. Values that nothing was added to
    are the parameters' own memory: to be read, never written.

    Args:
        model: what accelerate has unwrapped; passes `check_mergeable`.
    """
    peft: Any = model if is_peft_model(model) else None
    adapter: str | None = None if peft is None else peft.active_adapters[0]
    for name, parameter in model.named_parameters():
        if adapter is not None and (peft.prefix in name or ".original_module." in name):
            continue  # part of the adapter; or what a module that is trained in full stands in for
        value = parameter.detach()
        if adapter is not None and name.endswith(f"{_BASE}weight"):
            value = _with_adapter(model.get_submodule(name[: -len(f"{_BASE}weight")]), value, adapter)
        yield _plain(name, adapter), value.full_tensor() if isinstance(value, DTensor) else value


def _with_adapter(layer: Any, weight: torch.Tensor, adapter: str) -> torch.Tensor:
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or adapter not in layer.scaling:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + layer.get_delta_weight(adapter).to(wide)).to(weight.dtype)


def _plain(name: str, adapter: str | None) -> str:
    name = name.replace("_checkpoint_wrapped_module.", "")
    if adapter is None:
        return name
    return name.removeprefix("base_model.model.").replace(_BASE, ".").replace(f".modules_to_save.{adapter}.", ".")
