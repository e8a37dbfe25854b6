"""Which models can be made smaller, and what their config says of fewer layers and a narrower width.

Most of a config is about all layers alike. What is about single layers is known here by its name; a config that holds
more of it is refused, before anything is computed or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from kdtrain.errors import ConfigError, NotAvailableError

NARROWED = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Dense decoders: layers can be dropped, and their width cut."""
SHORTENED = (*NARROWED, "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe")
"""Layers can be dropped."""

_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")  # an entry for each layer
_INDICES = ("mlp_only_layers",)  # the numbers of some layers
_COUNTS = ("max_window_layers",)  # how many of the first layers are of a kind
_OTHER_LISTS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "keys_to_ignore_at_inference")
_MULTIPLE = 8  # of the MLP's width: what kernels of products like


def require_known(name: str, model_type: str, *, narrowed: bool) -> None:
    """Refuse an architecture of which it is not known what its config says of single layers, or what its width is.

    Raises:
        NotAvailableError: it is none of those that were tried.
    """
    if model_type not in (NARROWED if narrowed else SHORTENED):
        what = "cutting the width of" if narrowed else "dropping layers of"
        more = " Leave --width out: its layers can be dropped." if narrowed and model_type in SHORTENED else ""
        raise NotAvailableError(
            f"{name} is a {model_type} model: {what} those is not available yet. Known are "
            f"{', '.join(NARROWED if narrowed else SHORTENED)}.{more}"
        )


def check_layers(name: str, config: PreTrainedConfig) -> None:
    """Refuse a config with a list that may be of single layers, and is not known here.

    Raises:
        NotAvailableError: with the name of the list.
    """
    layers = config.num_hidden_layers
    for key, value in config.to_dict().items():
        is_list = isinstance(value, (list, tuple)) and len(value) == layers
        if is_list and key not in (*_LISTS, *_INDICES, *_OTHER_LISTS):
            raise NotAvailableError(
                f"The config of {name} has a list of {layers} values, as many as layers: {key}. What it says of single "
                "layers is not known here, so that dropping some of them is not available yet."
            )


def shortened(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """What a config has to say of a model of which only the layers `kept`, in rising order, are left."""
    old = dict(vars(config))
    if old.get("decoder_sparse_step", 1) != 1:  # which layers have experts goes by their number
        old["mlp_only_layers"] = _dense_layers(config)
    new: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if "decoder_sparse_step" in old:
        new["decoder_sparse_step"] = 1
    for name in _LISTS:
        if values := old.get(name):
            new[name] = [values[layer] for layer in kept]
    for name in _INDICES:
        if indices := old.get(name):
            new[name] = [number for number, layer in enumerate(kept) if layer in indices]
    for name in _COUNTS:
        if (count := old.get(name)) is not None:
            new[name] = sum(layer < count for layer in kept)
    return new


def _dense_layers(config: Any) -> list[int]:
    """The layers without experts, of a config in which every so many have them."""
    step, listed = config.decoder_sparse_step, config.mlp_only_layers
    return [layer for layer in range(config.num_hidden_layers) if (layer + 1) % step or layer in listed]


def inner_size(config: PreTrainedConfig, width: int) -> int:
    """The MLP's width beside a hidden size of `width`: in the same proportion, rounded to a multiple of 8."""
    size = config.intermediate_size * width / config.hidden_size
    return min(config.intermediate_size, max(_MULTIPLE, _MULTIPLE * round(size / _MULTIPLE)))


def check_width(name: str, config: PreTrainedConfig, width: int, head_dim: int) -> None:
    """Refuse a width that is not below the teacher's, or that the config's class does not take.

    Raises:
        ConfigError: with the nearest that can be had.
    """
    if not 0 < width < config.hidden_size:
        most = config.hidden_size
        raise ConfigError(f"--width {width}: {name} is {most} wide. Give 1 to {most - 1}, or leave --width out.")
    heads = config.num_attention_heads
    near = max(heads, heads * round(width / heads))
    near -= heads * (near >= config.hidden_size)
    if refusal := _refusal(config, near or heads, head_dim):
        raise NotAvailableError(
            f"--width {width}: a {config.model_type} config takes no other width beside heads of {head_dim} "
            f"({refusal}): not available yet. Leave --width out."
        )
    if _refusal(config, width, head_dim):
        raise ConfigError(
            f"--width {width} is not a multiple of the {heads} attention heads of {name}, which a {config.model_type} "
            f"config wants. Take {near}."
        )


def _refusal(config: PreTrainedConfig, width: int, head_dim: int) -> str | None:
    """Why a config's class does not take a width; None where it does."""
    try:
        resized(config, hidden_size=width, head_dim=head_dim)
    except (ValueError, StrictDataclassError) as error:
        return str(error).splitlines()[-1].strip()
    return None


def resized(config: PreTrainedConfig, **sizes: int) -> PreTrainedConfig:
    """The config with other sizes, checked as its class checks one that is read from a file."""
    return type(config).from_dict({**config.to_dict(), **sizes})
