"""Floating-point operations of a forward, counted from a model's own layers, and how many a device can do.

What is counted: a multiplication and an addition are two operations. Products with weights are 2 · in · out for each
token; attention is 2 · heads · (width of a key + width of a value) for each pair of tokens that it compares: all pairs
of a row, as `torch.utils.flop_counter` and the PaLM paper (arXiv 2204.02311, appendix B) count them, though half of
them are masked. The head is applied to supervised tokens alone. Norms, softmax and rotary positions are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Dense peaks in TFLOP/s, without sparsity, from the vendors' data sheets; the first match counts. A part of a device
# (MIG) has none.
_PEAKS: tuple[tuple[str, Mapping[str, float]], ...] = (
    (r"MIG", {}),
    (r"B200\b", {"bfloat16": 2250, "float16": 2250, "tf32": 1125, "float32": 75}),
    (r"H200 NVL", {"bfloat16": 835.5, "float16": 835.5, "tf32": 417.5, "float32": 60}),
    (r"H100 NVL", {"bfloat16": 835.5, "float16": 835.5, "tf32": 417.5, "float32": 60}),
    (r"H100 PCIe", {"bfloat16": 756, "float16": 756, "tf32": 378, "float32": 51}),
    (r"H[12]00\b", {"bfloat16": 989.5, "float16": 989.5, "tf32": 494.7, "float32": 67}),
    (r"A100\b", {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5}),
    (r"L40S\b", {"bfloat16": 362, "float16": 362, "tf32": 183, "float32": 91.6}),
    (r"L4\b", {"bfloat16": 121, "float16": 121, "tf32": 60, "float32": 30.3}),
    (r"A10\b", {"bfloat16": 125, "float16": 125, "tf32": 62.5, "float32": 31.2}),
    (r"T4\b", {"float16": 65, "float32": 8.1}),
    (r"RTX 4090\b", {"bfloat16": 165.2, "float16": 165.2, "tf32": 82.6, "float32": 82.6}),
    (r"RTX 3090\b(?! Ti)", {"bfloat16": 71, "float16": 71, "tf32": 35.6, "float32": 35.6}),
    (r"V100S", {"float16": 130, "float32": 16.4}),
    (r"V100-PCIE", {"float16": 112, "float32": 14}),
    (r"V100\b", {"float16": 125, "float32": 15.7}),
    (r"MI300X\b", {"bfloat16": 1307.4, "float16": 1307.4, "float32": 163.4}),
    (r"MI250X\b", {"bfloat16": 191.5, "float16": 191.5, "float32": 47.9}),  # a die, which is a device: half of the card
)
# Of configs of experts: which of them a token goes to is not known from the layers.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Of configs of layers that are no attention, or one of other widths.
_OTHER_LAYERS = ("layers_block_type", "hybrid_override_pattern", "attn_layer_indices", "state_size", "qk_rope_head_dim")


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Operations a second that a device can do in `bfloat16`, `float16`, `tf32` or `float32`; None if unknown."""
    for pattern, found in _PEAKS:
        if re.search(rf"(?<![A-Za-z0-9]){pattern}", device_name):
            return found[dtype] * 1e12 if dtype in found else None
    return None


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """The same of a device that is here, for products in `dtype`, which float32 may make with TF32."""
    if device.type != "cuda":
        return None
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and torch.version.hip is None and torch.get_float32_matmul_precision() != "highest":
        name = "tf32"
    return peak_flops(torch.cuda.get_device_name(device), name)


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of a forward."""

    per_token: int
    per_pair: int
    """For each two tokens of a row, in layers of full attention."""
    per_pair_in_window: int
    """The same in layers that look `window` tokens back."""
    window: int
    per_supervised: int
    """The head."""

    def of(self, lengths_R: torch.Tensor, supervised: torch.Tensor | int) -> torch.Tensor:
        """Of rows of so many tokens, without their padding, as a scalar float64 tensor on their device."""
        lengths = lengths_R.to(torch.float64 if lengths_R.device.type != "mps" else torch.float32)
        pairs, near = lengths.square().sum(), (lengths * lengths.clamp(max=self.window)).sum()
        layers = self.per_token * lengths.sum() + self.per_pair * pairs + self.per_pair_in_window * near
        return layers + self.per_supervised * supervised


def forward_flops(model: nn.Module) -> ForwardFlops | None:
    """What a forward of a causal language model takes, adapters included.

    None where the layers do not tell: experts, images, layers that are not attention.
    """
    config: Any = getattr(model, "config", None)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = None if config is None or head is None else _attention(config)
    if kinds is None:
        return None
    inside = {id(module) for module in head.modules()}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_pair, near = 4 * config.num_attention_heads * width, kinds.count("sliding_attention")
    return ForwardFlops(
        per_token=sum(_product(module) for module in model.modules() if id(module) not in inside),
        per_pair=of_pair * (len(kinds) - near),
        per_pair_in_window=of_pair * near,
        window=getattr(config, "sliding_window", None) or 0,
        per_supervised=sum(_product(module) for module in head.modules()),
    )


def _attention(config: Any) -> list[str] | None:
    """Which kind of attention each layer has; None where it has something else, or nobody can tell what it takes."""
    if config.get_text_config() is not config or getattr(config, "is_encoder_decoder", False):
        return None
    if any(getattr(config, name, None) for name in (*_EXPERTS, *_OTHER_LAYERS)):
        return None
    if any(getattr(config, name, None) is None for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # as Mistral, of which all layers are alike
        slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    return list(kinds) if set(kinds) <= {"full_attention", "sliding_attention"} else None


def _product(module: nn.Module) -> int:
    """By the sizes that a layer says it has: its weight may be packed, or in pieces on other devices."""
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * module.out_features
    return 2 * module.nx * module.nf if isinstance(module, Conv1D) else 0
