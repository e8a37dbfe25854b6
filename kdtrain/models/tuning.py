"""What of the student is trained, and whether it can be: LoRA, and dropout; before PEFT wraps it, and after.

PEFT ignores most of the names in its config that do not fit the model, and warns where it should refuse.
"""

from __future__ import annotations

import copy
import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers import TrainingArguments

from kdtrain.config.schema import TunerConfig
from kdtrain.errors import PreflightError
from kdtrain.models.parts import adapter_exclusions, check_named_parts
from kdtrain.models.quantization import refuse_trained_copies, require_adapter

logger = logging.getLogger(__name__)

# Modules of these families whose weight is read past the module: PEFT refuses an adapter on out_proj, and one on
# dt_proj would never get a gradient.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_READ_PAST = ("dt_proj", "out_proj")


def adapter_config(tuner: TunerConfig, student: nn.Module) -> LoraConfig | None:
    """The adapter that is made anew; None where all weights train, or the student came with one to go on with."""
    if tuner.train_type != "lora" or is_peft_model(student):
        return None
    targets = () if isinstance(tuner.target_modules, str) else tuner.target_modules
    check_named_parts(student, targets, tuner.modules_to_save or (), **tuner.frozen)
    return LoraConfig(
        r=tuner.lora_rank,
        lora_alpha=tuner.lora_alpha,  # PEFT says int, and divides it by the rank
        lora_dropout=tuner.lora_dropout,
        target_modules=tuner.target_modules,
        modules_to_save=tuner.modules_to_save,
        use_dora=tuner.use_dora,
        exclude_modules=adapter_exclusions(student, **tuner.frozen),
        task_type="CAUSAL_LM",
    )


def fit_student(model: nn.Module, peft_config: PeftConfig | None, args: TrainingArguments) -> PeftConfig | None:
    """What is to be trained, fitted to a loaded student before it is wrapped; its adapter's config comes back."""
    drop_unsupported_checkpointing(model, args)
    require_adapter(model, peft_config is not None or is_peft_model(model))
    return peft_config if peft_config is None or is_peft_model(model) else fitted_adapter(model, peft_config)


def check_trained(model: nn.Module, device: torch.device) -> None:
    """Refuse a student that cannot be trained, as it will be trained: wrapped and with its parts frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PreflightError(
            f"Not one parameter of the student ({type(model).__name__}) is trained: all have requires_grad off. "
            "Unfreeze what is to be trained, or give it an adapter (tuner.train_type: lora, peft_config)."
        )
    config = getattr(model, "config", None)
    if device.type == "cpu" and getattr(config, "_attn_implementation", None) == "flex_attention":
        raise PreflightError(
            "attn_implementation: flex_attention has no backward pass on a CPU. Use sdpa or eager for the student."
        )


def drop_unsupported_checkpointing(model: nn.Module, args: TrainingArguments) -> None:
    """Switch gradient checkpointing off, and say so, where a class of models has none: trl's default is on."""
    if not args.gradient_checkpointing or getattr(model, "supports_gradient_checkpointing", True):
        return
    args.gradient_checkpointing = False
    if hasattr(args, "activation_checkpointing"):  # its new name, of which the old one is a copy
        args.activation_checkpointing = False
    logger.warning(
        "training.gradient_checkpointing has no effect: %s does not support it. All activations are kept.",
        type(model).__name__,
    )


def uses_reentrant_checkpointing(args: TrainingArguments) -> bool:
    """Whether gradient checkpointing is on, of the kind that makes no graph where a block's input has no gradient."""
    return bool(args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))


def fitted_adapter(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """The config for a model that is not wrapped yet, with `all-linear` narrowed to what PEFT can wrap there."""
    _check_names(model, config)
    refuse_trained_copies(model, _listed(getattr(config, "modules_to_save", None)))
    target = getattr(config, "target_modules", None)
    if isinstance(target, str) and target.lower() == "all-linear":
        return _without_tied(model, _without_mamba_projections(model, config))
    _check_tied(model, config)
    return config


# ---- names -----------------------------------------------------------------------------------------------------------


def _check_names(model: nn.Module, config: PeftConfig) -> None:
    """Raise where a listed name matches nothing; patterns and `all-linear` are PEFT's to check.

    One that would be excluded is not missed: a warning, for a config may be shared between kinds of models.
    """
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    lists: tuple[tuple[str, list[str], Callable[[str, str], bool]], ...] = (
        ("target_modules", modules, _ends_in),
        ("target_parameters", parameters, _ends_in),
        ("modules_to_save", modules, str.endswith),
    )
    wrong = [
        _nothing_called(model, option, name, candidates)
        for option, candidates, fits in lists
        for name in _listed(getattr(config, option, None))
        if not any(fits(candidate, name) for candidate in candidates)
    ]
    for name in _listed(getattr(config, "exclude_modules", None)):
        if not any(_ends_in(module, name) for module in modules):
            logger.warning("%s: nothing is left out by it.", _nothing_called(model, "exclude_modules", name, modules))
    wrong += [
        f"target_modules: {name!r} matches modules only that are left out, by tuner.freeze_… or exclude_modules"
        for name in _listed(getattr(config, "target_modules", None))
        if _is_left_out([module for module in modules if _ends_in(module, name)], config)
    ]
    if wrong:
        raise PreflightError(f"The adapter does not fit the model. {'. '.join(wrong)}.")


def _listed(names: Any) -> list[str]:
    return [] if names is None or isinstance(names, str) else sorted(names)


def _ends_in(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _nothing_called(model: nn.Module, option: str, name: str, candidates: Iterable[str]) -> str:
    known = {part for candidate in candidates for part in (candidate, candidate.rpartition(".")[2])}
    near = difflib.get_close_matches(name, sorted(part for part in known if not part.isdigit()), n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{option}: {type(model).__name__} has nothing called {name!r}{meant}"


def _is_left_out(modules: list[str], config: PeftConfig) -> bool:
    excluded = getattr(config, "exclude_modules", None)
    if not excluded or not modules:
        return False
    if isinstance(excluded, str):
        return all(re.fullmatch(excluded, module) for module in modules)
    return all(any(_ends_in(module, name) for name in excluded) for module in modules)


# ---- what an adapter may stand on ------------------------------------------------------------------------------------


def _without_mamba_projections(model: nn.Module, config: PeftConfig) -> PeftConfig:
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in _MAMBA:
        return config
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    left_out = [name for name in _READ_PAST if name in present]
    logger.warning(
        "target_modules: all-linear leaves out %s: %s models read the weight past the module and an adapter on it.",
        " and ".join(left_out),
        family,
    )
    return _excluding(left_out, config)


def _excluding(names: Collection[str], config: PeftConfig) -> PeftConfig:
    fitted: Any = copy.copy(config)
    excluded = fitted.exclude_modules
    if isinstance(excluded, str):
        fitted.exclude_modules = rf"(?:{excluded})|(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"
    else:
        fitted.exclude_modules = [*(excluded or ()), *names]
    return fitted


# An adapter on a weight that another module shares would train on one side of the two; a merge adds it to the shared
# weight, and so to both. PEFT only warns, and with its `ensure_weight_tying` a merge adds it twice.


def _check_tied(model: nn.Module, config: PeftConfig) -> None:
    if getattr(config, "target_modules", None) is None:
        return
    for targeted, modules in _tied_targets(model, config):
        others = sorted(set(modules) - {targeted[0]})
        raise PreflightError(
            f"target_modules: the weight of {targeted[0]} is tied to that of {', '.join(others)}: an adapter on it "
            "would train, and a merge would change both sides. Leave it out; or put it into modules_to_save, which "
            "trains a copy of its own; or use a model without tied weights."
        )


def _without_tied(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """`all-linear` without the weights that modules share, such as the blocks that a Zamba2 repeats."""
    listed = _maybe_include_all_linear_layers(copy.copy(config), model)
    left_out = [module for targeted, _ in _tied_targets(model, listed) for module in targeted]
    if not left_out:
        return config
    logger.warning(
        "target_modules: all-linear leaves out %d modules that share their weight with another (%s%s): a merge would "
        "change both.",
        len(left_out),
        ", ".join(left_out[:3]),
        ", …" if len(left_out) > 3 else "",
    )
    return _excluding(left_out, config)


def _tied_targets(model: nn.Module, config: PeftConfig) -> Iterator[tuple[list[str], list[str]]]:
    """For each shared weight that gets an adapter: the modules that do, and all that use it."""
    users: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    for modules in users.values():
        if len(modules) > 1:
            found = {module: check_target_module_exists(config, module) for module in sorted(modules)}
            targeted = [module for module, match in found.items() if match and not isinstance(match, _ExcludedModule)]
            if targeted:
                yield targeted, sorted(modules)


# ---- dropout --------------------------------------------------------------------------------------------------------

# Attributes of transformers' modules that functional dropout reads.
_DROPOUT_NUMBERS = ("attention_dropout", "attn_dropout", "dropout", "activation_dropout", "hidden_dropout", "dropout_p")


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout, also those that are numbers handed to a function (attention), not modules."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_NUMBERS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
