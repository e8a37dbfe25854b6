"""Quantised models: what they cannot be combined with, as far as it is seen without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from kdtrain.config.adapters import model_below
from kdtrain.config.model_folder import read_map
from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem, Written
from kdtrain.errors import PreflightError

_STUDENT: KeyPath = ("model", "quantization")
_TEACHER: KeyPath = ("rlhf", "teacher", "quantization")
_GIVEN = "quantization_config"


def quantized_models(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A quantised student trains an adapter, whole on each device; a model is quantised once, in one place."""
    if (bits := config.model.quantization) is not None:
        yield from _student(config, bits)
        yield from _already(_STUDENT, config.model.model)
    of_teacher = config.rlhf.teacher
    if of_teacher.quantization is not None and of_teacher.backend == "hf":
        if _GIVEN in (config.rlhf.teacher_model_init_kwargs or {}):
            path = ("rlhf", "teacher_model_init_kwargs", _GIVEN)
            message = "given together with rlhf.teacher.quantization"
            yield Problem(path, message, "keep one of them: the option for NF4 or LLM.int8()", on_key=True)
        elif config.asks_teacher and config.rlhf.teacher_model:
            yield from _already(_TEACHER, config.rlhf.teacher_model)


def _student(config: RunConfig, bits: str) -> Iterator[Problem]:
    if config.tuner.train_type != "lora":
        message = f"{bits} needs tuner.train_type: lora: quantised weights have no gradients"
        yield Problem(_STUDENT, message, "train an adapter on them (QLoRA), or remove the option")
    if config.training.get("fsdp"):
        message = "a quantised student cannot be cut into pieces by FSDP"
        yield Problem(("training", "fsdp"), message, "remove it: each device then holds the quantised student whole")
    if config.rlhf.generation.backend != "transformers" and config.options.lm_kd_active and config.rlhf.lmbda > 0:
        message = f"cannot be combined with rlhf.generation.backend: {config.rlhf.generation.backend} yet: vLLM gets"
        hint = "use rlhf.generation.backend: transformers, or remove the option"
        yield Problem(_STUDENT, f"{message} weights, and these are quantised", hint, on_key=True)


def _already(option: KeyPath, name: str) -> Iterator[Problem]:
    try:
        folder = Path(model_below(name))
    except PreflightError:
        return  # found by another rule
    if folder.is_absolute() and _GIVEN in read_map(folder / "config.json"):
        message = f"the weights of {name} are quantised already ({_GIVEN} in its config.json)"
        yield Problem(option, message, "remove the option, or name the model before it was quantised")


def missing_bitsandbytes(config: RunConfig) -> Iterator[Problem]:
    """The package that quantises, where it is not installed."""
    used = [_STUDENT] if config.model.quantization is not None else []
    if config.rlhf.teacher.quantization is not None and config.asks_teacher and config.rlhf.teacher.backend == "hf":
        used.append(_TEACHER)
    if used and importlib.util.find_spec("bitsandbytes") is None:
        for option in used:
            hint = "pip install bitsandbytes (the extra quant), or remove the option"
            yield Problem(option, "needs the package bitsandbytes, which is not installed", hint)
