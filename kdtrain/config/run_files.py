"""Files and packages that a run needs beside models and data: DeepSpeed, FSDP, accelerate, trackers."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from kdtrain.config.launching import accelerate_file, launch_problems
from kdtrain.config.quantized import missing_quantizers
from kdtrain.config.schema import RunConfig
from kdtrain.config.training_fields import choice, source_folder
from kdtrain.config.tree import KeyPath, Problem

_JSON = ("deepspeed", "fsdp_config", "accelerator_config")
# Importable modules of the trackers whose name is not that of their package.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "dagshub": ("dagshub", "mlflow"),
    "flyte": ("flytekit",),
    "kubeflow": (),
}


def run_files(config: RunConfig) -> Iterator[Problem]:
    """What is missing of the files and packages that the options name."""
    training = config.training
    for name in _JSON:
        if isinstance(value := training.get(name), str) and not value.startswith("{"):
            yield from _unreadable(("training", name), Path(value), "JSON")
    if training.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        hint = "pip install deepspeed, or remove the option"
        yield Problem(("training", "deepspeed"), "needs the package deepspeed, which is not installed", hint)
    if (file := config.launch.config_file) is not None:
        yield from _unreadable(("launch", "config_file"), accelerate_file(file), "YAML")
    yield from launch_problems(config)
    yield from _trackers(training.get("report_to"))
    yield from _libraries(config)


# What an optimizer's name has in it, or an attention kernel's, and the modules one of which it needs.
_OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "paged": ("bitsandbytes", "bitsandbytes"),
    "lion": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"),
    "adamw_8bit": ("bitsandbytes", "bitsandbytes"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "anyprecision": ("torchdistx", "torchdistx"),
}
_ATTENTION: Mapping[str, tuple[tuple[str, ...], str]] = {
    "flash_attention_2": (("flash_attn", "kernels"), "flash-attn"),
    "flash_attention_3": (("flash_attn_interface", "kernels"), "flash-attn-3"),
}


def _libraries(config: RunConfig) -> Iterator[Problem]:
    """Packages that an optimizer or an attention kernel needs: they would be missed when the models are loaded."""
    yield from missing_quantizers(config)
    optimizer = str(config.training.get("optim") or "")
    # The longest part that fits: adamw_torch_8bit is torchao's, adamw_8bit is not.
    for part in sorted((part for part in _OPTIMIZERS if part in optimizer), key=len)[-1:]:
        module, package = _OPTIMIZERS[part]
        if importlib.util.find_spec(module) is None:
            yield _missing(("training", "optim"), optimizer, package, "adamw_torch")
    kernels: list[tuple[KeyPath, Any]] = [(("model", "attn_implementation"), config.model.attn_implementation)]
    if config.asks_teacher and config.rlhf.teacher.backend == "hf":
        of_teacher = (config.rlhf.teacher_model_init_kwargs or {}).get("attn_implementation")
        kernels.append((("rlhf", "teacher_model_init_kwargs", "attn_implementation"), of_teacher))
    for path, kernel in kernels:
        modules, package = _ATTENTION.get(str(kernel), ((), ""))
        if modules and all(importlib.util.find_spec(module) is None for module in modules):
            yield _missing(path, str(kernel), package, "sdpa")


def _missing(path: KeyPath, value: str, package: str, other: str) -> Problem:
    message = f"{value} needs the package {package}, which is not installed"
    return Problem(path, message, f"pip install {package}, or write {other}")


def _unreadable(path: KeyPath, file: Path, form: str) -> Iterator[Problem]:
    """What keeps a file from being a map in JSON or YAML."""
    if not file.exists():
        yield Problem(path, f"no such file: {file}", f"correct the name; {_WHERE}")
        return
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text) if form == "JSON" else yaml.safe_load(text)
    except OSError as error:
        yield Problem(path, f"{file} cannot be read: {error.strerror}", "give a file that this user may read")
    except (ValueError, yaml.YAMLError) as error:
        yield Problem(path, f"{file} is not valid {form}{_line(error)}", "correct the file")
    else:
        if not isinstance(value, dict):
            yield Problem(path, f"{file} holds no map of options", "give the file that they are in")


_WHERE = "a relative path begins at the folder of the config file"


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = getattr(error, "lineno", None) or (mark.line + 1 if mark else None)
    return f" (line {line})" if line else ""


def _trackers(value: Any) -> Iterator[Problem]:
    """Trackers that transformers does not know, or whose package is missing."""
    path: KeyPath = ("training", "report_to")
    names = value if isinstance(value, list) else [value]
    known = (*trackers(), "all", "none")
    for number, name in enumerate(names):
        place = (*path, number) if isinstance(value, list) else path
        if name is None or name in ("all", "none"):
            continue
        if name not in known:
            yield Problem(place, *choice(name, known, "report_to"))
        elif missing := [module for module in _modules(name) if importlib.util.find_spec(module) is None]:
            package = missing[0].replace("_", "-")
            hint = f"pip install {package}, or remove it: logging.jsonl has the same numbers"
            yield Problem(place, f"{name} needs the package {package}, which is not installed", hint)


def _modules(tracker: str) -> tuple[str, ...]:
    if tracker == "tensorboard" and importlib.util.find_spec("tensorboardX") is not None:
        return ()
    return _PACKAGES.get(tracker, (tracker,))


@lru_cache(maxsize=1)
def trackers() -> tuple[str, ...]:
    """The names that `report_to` may have, from the source text of transformers."""
    file = source_folder("transformers") / "integrations" / "integration_utils.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK":
            assert isinstance(node.value, ast.Dict)
            return tuple(str(ast.literal_eval(key)) for key in node.value.keys if key)
    raise AssertionError("the sources of transformers are laid out differently")
