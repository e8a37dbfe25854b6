"""Where each family of vision-language models keeps its vision encoder, its aligner and their features.

    vit        the vision encoder's tokens as the aligner receives them
    aligner    the projector's, connector's or merger's output: what the language model sees of an image
    deepstack  the outputs of the other mergers of Qwen3-VL, one per tapped layer

One rule fits nearly all families: the aligner is called with a tensor, which is `vit`, and returns a tensor, which is
`aligner`. These are the layer and the tokens that the language model really uses: LLaVA and InternVL drop the class
token before their projector (InternVL also lays 2 × 2 patches side by side), and some read an earlier layer than the
last. What does not fit:

- Qwen2.5-VL computes in the order of its attention windows. Its merger's output is put back into image order only in
  the `pooler_output` of `model.visual`, so that is the tap of `aligner`; its `vit` stays in window order.
- Qwen2-VL, Qwen3-VL and Qwen3.5 keep the patches that will be merged together: their `vit` is in block order.
- Idefics2 has no `vit` here: its encoder computes tokens of padding beside those of smaller images.

Paths are those of the model without wrappers. `find_module` finds them through PEFT, DDP, FSDP and torch.compile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

# The first positional argument; the tensor that is returned; or that attribute of the object that is returned.
What = Literal["input", "output", "pooler_output"]
# How the tokens of an image follow each other: row by row, in blocks that are merged, or in attention windows.
Order = Literal["rows", "blocks", "windows"]
Sizes = Literal["grid_thw", "image_sizes"]


class TokenOrder(NamedTuple):
    """What fixes the order of an image's tokens: equal for two models whose tokens can be compared one by one."""

    kind: Order
    sizes: tuple[int, ...] = ()
    """Of blocks: merge size. Of windows: window size, patch size, merge size."""


@dataclass(frozen=True)
class Tap:
    """One place to read features from: `what` of the module at `path`, in the model without wrappers.

    `explicit`: the config names the path. Its "output" may then also be an object with a `last_hidden_state`, or a
    tuple, of which the first element is taken.
    """

    path: str
    what: What
    explicit: bool = False


@dataclass(frozen=True)
class Layout:
    """Where a family keeps things.

    encoder    path of the vision encoder
    aligner    paths of what stands between it and the language model, parameters included; in Qwen-VL they lie inside
               the encoder and are no part of it
    taps       target -> its place; "{i}" in a path stands for every child of a list
    vit_order  order of the tokens of `vit`; those of the other targets are in rows
    sizes      what a batch says about images whose tokens are packed one after the other; None where every image (or
               crop) is a row of its own
    """

    encoder: str
    aligner: tuple[str, ...]
    taps: Mapping[str, Tap] = field(default_factory=dict)
    vit_order: Order = "rows"
    sizes: Sizes | None = None


def _around(encoder: str, aligner: str, *more: str, sizes: Sizes | None = None) -> Layout:
    taps = {"vit": Tap(aligner, "input"), "aligner": Tap(aligner, "output")}
    return Layout(encoder, (aligner, *more), taps, sizes=sizes)


_QWEN3_5 = replace(_around("model.visual", "model.visual.merger", sizes="grid_thw"), vit_order="blocks")
_QWEN3_VL = replace(
    _QWEN3_5,
    aligner=("model.visual.merger", "model.visual.deepstack_merger_list"),
    taps={**_QWEN3_5.taps, "deepstack": Tap("model.visual.deepstack_merger_list.{i}", "output")},
)
_QWEN2_VL = replace(_QWEN3_5, taps={**_QWEN3_5.taps, "aligner": Tap("model.visual", "pooler_output")})
_QWEN2_5_VL = replace(_QWEN2_VL, vit_order="windows")
_TOWER = _around("model.vision_tower", "model.multi_modal_projector")
_TOWER_NEWLINE = _around("model.vision_tower", "model.multi_modal_projector", "model.image_newline")
_CONNECTOR = _around("model.vision_model", "model.connector")

LAYOUTS: Mapping[str, Layout] = {
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_5_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "llava": _TOWER,
    "llava_next": _TOWER_NEWLINE,
    "llava_onevision": _TOWER_NEWLINE,
    "idefics2": Layout("model.vision_model", ("model.connector",), {"aligner": Tap("model.connector", "output")}),
    "idefics3": _CONNECTOR,
    "smolvlm": _CONNECTOR,
    "gemma3": _TOWER,
    "paligemma": _TOWER,
    "mistral3": _around("model.vision_tower", "model.multi_modal_projector", sizes="image_sizes"),
    "internvl": _TOWER,
}
"""`config.model_type` -> layout."""

# What wraps a module without changing what it computes, and the attribute that holds the module itself.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def model_type(model: nn.Module) -> str:
    """`config.model_type` of a model, wrapped or not; "unknown" without a config."""
    return str(getattr(getattr(unwrapped(model), "config", None), "model_type", "unknown"))


def layout_of(model: nn.Module) -> Layout | None:
    """The layout of a model's family; None for text models and families that are not in the table."""
    layout = LAYOUTS.get(model_type(model))
    if layout is _TOWER and getattr(vision_config(model), "model_type", None) == "pixtral":
        return LAYOUTS["mistral3"]  # Pixtral is a LLaVA with that vision encoder
    return layout


def vision_config(model: nn.Module) -> Any:
    return getattr(getattr(unwrapped(model), "config", None), "vision_config", None)


# ---- finding modules -------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP, FSDP, torch.compile, DeepSpeed and PEFT around it. PEFT's adapter layers stay inside."""
    inner: Any
    while True:
        inner = _without_wrappers(model)
        if hasattr(inner, "get_base_model"):  # a PeftModel
            inner = inner.get_base_model()
        elif not isinstance(inner, PreTrainedModel) and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module  # DDP, DeepSpeed
        if inner is model:
            return model
        model = inner


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path of the model without wrappers, or of the model as it is given; None if there is none."""
    module: nn.Module | None = unwrapped(model)
    for part in path.split("."):
        child = getattr(_active(module), part, None) if module is not None else None
        module = _without_wrappers(child) if isinstance(child, nn.Module) else None
    if module is not None:
        return module
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _without_wrappers(module: nn.Module) -> nn.Module:
    for name in _WRAPPERS:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _without_wrappers(inner)
    return module


def _active(module: nn.Module) -> nn.Module:
    """Where the children are that a forward uses: PEFT's copy of a module that is trained in full."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    wrapper: Any = module
    active = [name for name in wrapper.active_adapters if name in copies]
    return _without_wrappers(copies[active[0]] if active else wrapper.original_module)


def unwrapped_name(name: str, adapters: Sequence[str] = ()) -> str:
    """The name in the model without wrappers. In PEFT's, the name of an adapter follows `modules_to_save`."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(
        part
        for before, part in pairwise(["", *parts])
        if part not in ("modules_to_save", "original_module") and not (before == "modules_to_save" and part in adapters)
    )
