"""An adapter merged into its base weights: for good, or for a while, and the base weights as they were after.

A token that is generated then costs one product per layer instead of three, and far less of Python.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import nn
from transformers import PreTrainedModel

from kdtrain.errors import PreflightError

WEIGHTS_PER_TOKEN = 8192
"""A layer is merged from so many new tokens on that this times their number reaches its weights. Copying, merging and
putting back takes six passes over the weights; a token saves four small products' overhead, whatever the layer's size.
Measured on a CPU at 256 to 2,048 wide, 1 and 16 rows: it pays from 10,000 to 45,000 weights a token."""


def merge_adapter(model: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The base with its adapter in its weights, and trained copies in place of what they were copied from.

    The adapter's weights are float32, as `add_adapter` loads them; so is each sum, which is rounded to the base's dtype
    once. The base's modules are changed in place.

    Args:
        dtype: that all weights are brought to after; None keeps each as it is.

    Raises:
        PreflightError: the adapter is no part of weights (a prompt), or the weights are quantised.
    """
    config = model.active_peft_config
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise PreflightError(f"A {kind} adapter is no part of a model's weights, and cannot be merged into them.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise PreflightError(
            "The base's weights are quantised: an adapter that is merged into them would be rounded away. Name the "
            "model before it was quantised (model.model=… on the command line)."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that two weights are tied no more, see below
        merged: PreTrainedModel = model.merge_and_unload()
    merged.requires_grad_(True)  # as a model comes that was loaded: PEFT has frozen it
    _untie(merged)
    return merged if dtype is None else merged.to(dtype)


def _untie(model: PreTrainedModel) -> None:
    """Say in the config where embedding and head are two weights since one of them was trained as a copy."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


@contextmanager
def merged(model: nn.Module, new_tokens: int) -> Iterator[None]:
    """Inside, a PEFT model computes without the adapter's own products where that gives the same and is faster.

    W' = W + s·B·A, and W is put back bit by bit after, from a copy: w + d − d is not w. So the weights that an adapter
    is merged into are there twice meanwhile.

    Args:
        model: not wrapped, and not run under autocast, which would round the sum to 16 bit in each product. One that is
            no PEFT model is left as it is, and so are layers of other kinds than plain LoRA on a linear layer of
            float32 or float64: 16 bit would round much of an adapter away (measured: KL 2e-5 between merged and not,
            where the adapter itself had moved the model by 5e-5 after 3 steps, by 4e-4 after 12), quantised weights
            take none, pieces of FSDP and ZeRO-3 are not to be written to, and DoRA and its like are not a sum.
        new_tokens: at most, of each row; see `WEIGHTS_PER_TOKEN`.
    """
    layers = _mergeable(model, new_tokens * WEIGHTS_PER_TOKEN)
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merge()
        yield
    finally:
        with torch.no_grad():
            for layer, weight, kept in zip(layers, weights, before, strict=True):
                weight.copy_(kept)
                layer.merged_adapters.clear()


def _mergeable(model: nn.Module, most_weights: int) -> list[Any]:
    """The layers of an adapter that may be merged, of so many weights each."""
    if not isinstance(model, PeftModel):
        return []
    modules = list(model.modules())
    uses = Counter(id(parameter) for module in modules for parameter in module._parameters.values())
    return [
        module
        for module in modules
        if isinstance(module, Linear)
        and _is_plain(module, uses)
        and module.get_base_layer().weight.numel() <= most_weights
    ]


def _is_plain(layer: Any, uses: Counter[int]) -> bool:
    """Whether an adapter's layer is a sum of two products, and no other module reads the weight of the first."""
    base, active = layer.get_base_layer(), [name for name in layer.active_adapters if name in layer.lora_A]
    weight = getattr(base, "weight", None)
    return (
        type(base) is nn.Linear
        and type(weight) is nn.Parameter  # not quantised, nor a DTensor
        and not hasattr(weight, "ds_id")  # of ZeRO-3
        and not weight.is_meta
        and weight.dtype in (torch.float32, torch.float64)
        and uses[id(weight)] == 1
        and not layer.disable_adapters
        and not layer.merged
        and bool(active)
        and not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in active)
    )
