"""The student of a config, as `fit`, `cache`, `evaluate` and `export` load it.

Where `model.model` is the folder of an adapter, LoRA goes on training it, on its base; full fine-tuning begins with the
two merged. `model.adapter` is gone on with on top of `model.model`, whatever that is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from kdtrain.config import RunConfig
from kdtrain.config.adapters import adapter_base, continued_adapter, is_adapter_folder, model_below
from kdtrain.config.model_folder import require_sound
from kdtrain.models.fake_quantization import fake_quantize
from kdtrain.models.hub import require_model
from kdtrain.models.loading import add_adapter, load_merged, load_model


def student_config(config: RunConfig) -> PreTrainedConfig:
    """What kind of model the student is, before any of its weights are read."""
    name = model_below(config.model.model)
    require_model(name, config.model.revision)
    found: PreTrainedConfig = AutoConfig.from_pretrained(
        name,
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
    )
    return found


def load_student(config: RunConfig, device: torch.device) -> PreTrainedModel | PeftModel:
    """The student before training: with the adapter that it goes on with, to be trained, where there is one."""
    base, adapter = load_base(config, device), continued_adapter(config)
    if adapter is None:
        return rounded(config, base)
    model = add_adapter(base, adapter, trained=True)
    model.active_peft_config.base_model_name_or_path = _base_name(config)
    return model


def rounded(config: RunConfig, model: PreTrainedModel) -> PreTrainedModel:
    """A student that computes with rounded weights, where the config says so; the same object."""
    if config.model.quantization_aware is not None:
        fake_quantize(model, config.model.quantization_aware)
    return model


def load_own_teacher(config: RunConfig, device: torch.device) -> PreTrainedModel | PeftModel:
    """The student as it begins to be its own teacher; with `weights: base` without an adapter."""
    of_base = config.rlhf.teacher.weights == "base"
    return load_base(config, device) if of_base else load_student(config, device)


def load_base(config: RunConfig, device: torch.device, dtype: str | None = None) -> PreTrainedModel:
    """What an adapter of the run goes on top of; where all weights are trained, what that begins with.

    Args:
        dtype: in place of the config's.
    """
    name = _base_name(config)
    require_sound(Path(model_below(name)), "student")
    options = {**_options(config, device), **({} if dtype is None else {"dtype": dtype})}
    return load_merged(name, **options) if is_adapter_folder(name) else load_model(name, **options)


def load_trained_weights(
    config: RunConfig, device: torch.device, folder: Path, dtype: str | None = None
) -> PreTrainedModel:
    """What a run that trains all weights has made of its student: whole, in a folder."""
    options = {**_options(config, device), **({} if dtype is None else {"dtype": dtype}), "revision": None}
    # Where in a repository a model lies, and in which of its revisions, holds for what was trained alone.
    options["init_kwargs"] = {k: v for k, v in options["init_kwargs"].items() if k not in ("subfolder", "variant")}
    return load_model(str(folder), **options)


def _base_name(config: RunConfig) -> str:
    """The model below the adapter that a run trains; an adapter's folder stands for the two merged."""
    name = config.model.model
    return adapter_base(name) if continued_adapter(config) == name else name


def _options(config: RunConfig, device: torch.device) -> dict[str, Any]:
    options = config.model
    return {
        "dtype": options.dtype,
        "trained_in_full": config.tuner.train_type == "full",
        "device": device,
        "attn_implementation": options.attn_implementation,
        "init_kwargs": options.init_kwargs,
        "trust_remote_code": options.trust_remote_code,
        "revision": options.revision,
        "quantization": options.quantization,
    }
