"""What was probably meant by a key that is not known where it stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, get_args

from kdtrain.config.schema import RunConfig
from kdtrain.config.section import Section
from kdtrain.config.training_fields import training_fields

# Fields of GKDConfig that this schema has under another name.
_RENAMED_FIELDS = {"teacher_model_name_or_path": "rlhf.teacher_model", "model_init_kwargs": "model.init_kwargs"}
# What other trainers, or earlier versions of the same ones, call it. The value is shown as it is.
_OTHER_NAMES = {
    "alpha": "rlhf.sft_alpha or rlhf.llm_kd_weight",
    "batch_size": "training.per_device_train_batch_size",
    "dataset": "data.train",
    "distillation_weight": "rlhf.llm_kd_weight",
    "epochs": "training.num_train_epochs",
    "evaluation_strategy": "training.eval_strategy",
    "kd_weight": "rlhf.llm_kd_weight",
    "logging_dir": "training.output_dir, the folder of everything a run writes",
    "lora_r": "tuner.lora_rank",
    "lr": "training.learning_rate",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.model",
    "report_to_wandb": "training.report_to: wandb",
    "student": "model.model",
    "student_model": "model.model",
    "torch_dtype": "model.dtype",
    "use_lora": "tuner.train_type: lora",
    "warmup_ratio": "training.warmup_steps: a value below 1 is a share of all steps",
    **_RENAMED_FIELDS,
}

_LONGEST_KEY = 60


@lru_cache(maxsize=1)
def known_keys() -> dict[str, tuple[str, ...]]:
    """The keys of every section, sections by their dotted name, the top level as an empty name."""
    keys = {section: tuple(model.model_fields) for section, model in _sections(RunConfig)}
    elsewhere = {key for section in ("model", "tuner", "data", "rlhf", "custom") for key in keys[section]}
    keys["training"] = tuple(n for n in training_fields() if n not in elsewhere and n not in _RENAMED_FIELDS)
    keys[""] = ("extends", *RunConfig.model_fields)
    return keys


def _sections(model: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Dotted name and model of everything below `model`, in lists and maps as well."""
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            yield f"{path}{name}", inner
            yield from _sections(inner, f"{path}{name}.")


def _models_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def unknown_key(section: str, key: str) -> tuple[str, str]:
    """Message and hint for `key`, which `section` does not have."""
    if len(key) > _LONGEST_KEY:
        return f"unknown key '{key[:_LONGEST_KEY]}...'", ""
    keys, where = known_keys(), section or "the config"
    message = f"unknown key '{key}' in {where}"
    *parents, last = f"{section}.{key}".lstrip(".").split(".")
    if "." in key and last in keys.get(".".join(parents), ()):
        nested = ": {".join((*parents, last)) + ": ..." + "}" * len(parents)
        return message, f"nest it, one level per dot: {nested}"
    # data.eval has the keys of data.train.
    homes = [home for home in keys if home not in (section, "data.eval") and key in keys[home]]
    if homes:
        paths = " or ".join(f"{home}.{key}".lstrip(".") for home in homes)
        return f"'{key}' does not belong in {section or 'the top level'}", f"move it to {paths}"
    if key in _OTHER_NAMES:
        return message, f"use {_OTHER_NAMES[key]}"
    own = keys.get(section, ())
    if near := difflib.get_close_matches(key, own, n=1):
        return message, f"did you mean '{near[0]}'?"
    for home, names in keys.items():
        if near := difflib.get_close_matches(key, names, n=1, cutoff=0.8):
            return message, f"did you mean {f'{home}.{near[0]}'.lstrip('.')}?"
    return message, f"the keys are {', '.join(own)}" if 0 < len(own) <= 12 else ""
