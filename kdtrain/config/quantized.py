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
_AWARE: KeyPath = ("model", "quantization_aware")
_TEACHER: KeyPath = ("rlhf", "teacher", "quantization")
_GIVEN = "quantization_config"


def quantized_models(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A quantised student trains an adapter, whole on each device; a model is quantised once, in one place."""
    if (bits := config.model.quantization) is not None:
        yield from _student(config, bits)
        yield from _already(_STUDENT, config.model.model)
    if config.model.quantization_aware is not None:
        yield from _aware(config)
        yield from _already(_AWARE, config.model.model)
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
    yield from _by_vllm(_STUDENT, config, "these are quantised")


def _aware(config: RunConfig) -> Iterator[Problem]:
    """Weights that are rounded in every forward are trained themselves, and whole on each device."""
    if config.tuner.train_type == "lora":
        message = "needs tuner.train_type: full: it is the weights themselves that are trained for their rounding"
        yield Problem(_AWARE, message, "train them in full; or quantise the base of an adapter (model.quantization)")
    for name in ("fsdp", "deepspeed"):
        if config.training.get(name):
            message = "not available yet beside model.quantization_aware"
            yield Problem(("training", name), message, "remove one of them: plain data parallelism has it")
    yield from _by_vllm(_AWARE, config, "they are rounded here alone")


def _by_vllm(option: KeyPath, config: RunConfig, reason: str) -> Iterator[Problem]:
    backend = config.rlhf.generation.backend
    if backend != "transformers" and config.options.lm_kd_active and config.rlhf.lmbda > 0:
        message = f"cannot be combined with rlhf.generation.backend: {backend} yet: vLLM gets weights, and {reason}"
        yield Problem(option, message, "use rlhf.generation.backend: transformers, or remove the option", on_key=True)


def _already(option: KeyPath, name: str) -> Iterator[Problem]:
    try:
        folder = Path(model_below(name))
    except PreflightError:
        return  # found by another rule
    if folder.is_absolute() and _GIVEN in read_map(folder / "config.json"):
        message = f"the weights of {name} are quantised already ({_GIVEN} in its config.json)"
        yield Problem(option, message, "remove the option, or name the model before it was quantised")


def missing_quantizers(config: RunConfig) -> Iterator[Problem]:
    """The packages that quantise, where they are not installed."""
    if config.model.quantization_aware is not None and importlib.util.find_spec("torchao") is None:
        hint = "pip install torchao (the extra quant), or remove the option"
        yield Problem(_AWARE, "needs the package torchao, which is not installed", hint)
    used = [_STUDENT] if config.model.quantization is not None else []
    if config.rlhf.teacher.quantization is not None and config.asks_teacher and config.rlhf.teacher.backend == "hf":
        used.append(_TEACHER)
    if used and importlib.util.find_spec("bitsandbytes") is None:
        for option in used:
            hint = "pip install bitsandbytes (the extra quant), or remove the option"
            yield Problem(option, "needs the package bitsandbytes, which is not installed", hint)
