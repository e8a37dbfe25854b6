"""A student in another state for a while, and back: without its adapter, in eval mode, without checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """The model without its adapter, modules that are trained in full with it included; it is back at the end."""
    if _is_in_front(model):
        with model.disable_adapter():
            yield
        return
    # What PEFT's own context does to each layer, and no more: that one also switches `requires_grad` off, and on again
    # for all of the adapter, and walks through the modules five times (0.1 s for 36 layers, for each micro-batch).
    layers: list[Any] = _adapter_layers(model)
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def trained_beside_adapter(model: PeftModel) -> list[str]:
    """Names of trained parameters that stay in the model when the adapter is off, such as biases (`bias: all`)."""
    if _is_in_front(model):
        return []
    layers = _adapter_layers(model)
    adapter = [attrgetter(name)(layer) for layer in layers for name in layer.adapter_layer_names]
    own = {id(p) for part in adapter if isinstance(part, nn.Module) for p in part.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]


def _is_in_front(model: PeftModel) -> bool:
    """Whether the adapter is tokens in front of the rows, and not in layers."""
    config = model.active_peft_config
    return bool(config.is_prompt_learning or config.is_adaption_prompt)


def _adapter_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module that was in train mode is again at the end, and no other."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is off, and at the end on again where it was, as it was.

    transformers' own methods add a hook to the embedding each time that they switch it on again for an adapter: with
    each window that is generated every forward would take longer. And they set it up anew.
    """
    # Their own attributes alone: a PEFT model answers for the model in it.
    modules: list[Any] = [module for module in model.modules() if vars(module).get("gradient_checkpointing")]
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True
