"""The three parts of a vision-language model, and taking them out of training.

vit      the vision encoder, without the mergers that Qwen-VL keeps inside it
aligner  projector, connector or mergers (deepstack's too), and the learned line breaks of LLaVA-NeXT
llm      everything else: the language model, its embeddings and its head
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, get_args

from torch import nn

from kdtrain.errors import PreflightError
from kdtrain.models.layouts import LAYOUTS, Layout, layout_of, model_type, unwrapped, unwrapped_name
from kdtrain.models.quantization import size_of

logger = logging.getLogger(__name__)

Part = Literal["llm", "vit", "aligner"]
PARTS: tuple[Part, ...] = get_args(Part)
_OPTIONS: Mapping[Part, str] = {"llm": "tuner.freeze_llm", "vit": "tuner.freeze_vit", "aligner": "tuner.freeze_aligner"}


def part_of(model: nn.Module, part: Part) -> dict[str, nn.Parameter]:
    """The parameters of a part by their names in the model as it is given, adapters included; tied ones once."""
    layout, adapters = _layout(model), _adapters(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if part_of_name(unwrapped_name(name, adapters), layout) == part
    }


def part_of_name(name: str, layout: Layout) -> Part:
    """The part that a parameter or module of the model without wrappers belongs to."""
    if any(_inside(name, path) for path in layout.aligner):
        return "aligner"
    return "vit" if _inside(name, layout.encoder) else "llm"


def freeze_parts(model: nn.Module, *, llm: bool = False, vit: bool = False, aligner: bool = False) -> None:
    """Take parts of a model out of training: `requires_grad` off, for adapters on them as well.

    A text model has an llm only; the other two options then have no effect, and a warning says so.
    """
    frozen, name = _frozen(llm, vit, aligner), type(unwrapped(model)).__name__
    if _is_text_model(model):
        if llm:
            raise PreflightError(
                f"tuner.freeze_llm: {name} is a text model: with its language model frozen nothing is left to train. "
                "Remove the option."
            )
        for part in frozen:
            logger.warning("%s has no effect: %s is a text model.", _OPTIONS[part], name)
        return
    if not frozen:
        return
    left = {id(p) for p in model.parameters() if p.requires_grad}
    parameters = [p for part in frozen for p in part_of(model, part).values()]
    if not left.difference(id(p) for p in parameters):
        more = ", or let tuner.target_modules reach other parts" if _adapters(model) else ""
        raise PreflightError(
            f"With {_options(frozen)} nothing of {name} is left to train. Remove one of the options{more}."
        )
    for parameter in parameters:
        parameter.requires_grad_(False)


def adapter_exclusions(model: nn.Module, *, llm: bool = False, vit: bool = False, aligner: bool = False) -> str | None:
    """A regular expression for `LoraConfig.exclude_modules`: the modules of the frozen parts, which get no adapter.

    None where nothing is frozen, or for a text model. PEFT matches it against whole module names.
    """
    if not (llm or vit or aligner) or _is_text_model(model):
        return None
    layout = _layout(model)
    in_aligner, in_encoder = _pattern(*layout.aligner), _pattern(layout.encoder)
    choices = []
    if aligner:
        choices.append(f"{in_aligner}.*")
    if vit:
        choices.append(f"(?!{in_aligner}){in_encoder}.*")
    if llm:
        choices.append(f"(?!{in_aligner})(?!{in_encoder}).*")
    return "|".join(choices)


def check_named_parts(
    model: nn.Module,
    target_modules: Collection[str],
    modules_to_save: Collection[str],
    *,
    llm: bool = False,
    vit: bool = False,
    aligner: bool = False,
) -> None:
    """Refuse names of modules to train that stand in a part that is to stay frozen.

    A module that is trained in full would be trained all the same, and an adapter would be left out without a word. A
    name of adapters may reach into a frozen part if it reaches others too: that is what freezing is for.
    """
    frozen = set(_frozen(llm, vit, aligner))
    if not frozen or _is_text_model(model):
        return
    layout = _layout(model)
    for option, names in (("modules_to_save", modules_to_save), ("target_modules", target_modules)):
        for name in names:
            parts = _parts_below(model, name, layout)
            wrong = parts & frozen if option == "modules_to_save" or parts <= frozen else set()
            if wrong:
                raise PreflightError(
                    f"tuner.{option}: {name!r} is to be trained, and {_options(sorted(wrong))} keeps it as it is. "
                    "Remove one of the two."
                )


def _parts_below(model: nn.Module, name: str, layout: Layout) -> set[Part]:
    """The parts of all parameters below modules whose name ends in `name`."""
    below = re.compile(rf"(?:^|\.){re.escape(name)}\.")
    return {part_of_name(parameter, layout) for parameter, _ in model.named_parameters() if below.search(parameter)}


def trained_parts(model: nn.Module) -> dict[Part, int]:
    """Trained parameters of each part of a model as it will be trained; empty for a family that is not in the table."""
    if layout_of(model) is None:
        return {}
    return {part: sum(_size(p) for p in part_of(model, part).values() if p.requires_grad) for part in PARTS}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; tied weights count once."""
    sizes = [(_size(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _size(parameter: nn.Parameter) -> int:
    """Under ZeRO-3 a parameter is empty between its uses, and knows its own size."""
    return getattr(parameter, "ds_numel", None) or size_of(parameter)


def _frozen(llm: bool, vit: bool, aligner: bool) -> list[Part]:
    return [part for part, is_frozen in zip(PARTS, (llm, vit, aligner), strict=True) if is_frozen]


def _options(parts: Iterable[Part]) -> str:
    return " and ".join(_OPTIONS[part] for part in parts)


def _pattern(*paths: str) -> str:
    return rf"(?:{'|'.join(map(re.escape, paths))})(?=\.|$)"


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _layout(model: nn.Module) -> Layout:
    layout = layout_of(model)
    if layout is None:
        raise PreflightError(
            f"{type(unwrapped(model)).__name__} (model type {model_type(model)!r}): which of its parts are the vision "
            f"encoder and the aligner is not known here. Known are {', '.join(LAYOUTS)}. Remove tuner.freeze_llm, "
            "tuner.freeze_vit and tuner.freeze_aligner; with LoRA, say what is trained in tuner.target_modules."
        )
    return layout


def _adapters(model: nn.Module) -> tuple[str, ...]:
    for module in model.modules():
        config = getattr(module, "peft_config", None)
        if isinstance(config, dict):
            return tuple(config)
    return ()


def _is_text_model(model: nn.Module) -> bool:
    config = getattr(unwrapped(model), "config", None)
    return layout_of(model) is None and (config is None or config.get_text_config() is config)
