"""The folder of a PEFT adapter, as far as it can be read without torch."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from kdtrain.config.model_folder import ADAPTER_CONFIG, INDEX, WEIGHTS
from kdtrain.errors import PreflightError

if TYPE_CHECKING:
    from kdtrain.config.schema import RunConfig

_MODEL_WEIGHTS = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_adapter_folder(name: str) -> bool:
    """Whether a folder holds an adapter and no weights of a model."""
    return has_file(name, ADAPTER_CONFIG) and not any(has_file(name, file) for file in _MODEL_WEIGHTS)


def has_file(folder: str, name: str) -> bool:
    """Whether there is a local folder with a file of this name; a hub id has none."""
    return os.path.isfile(os.path.join(folder, name))


def adapter_base(folder: str) -> str:
    """The folder or hub id of the model that an adapter was trained on."""
    path = os.path.join(folder, ADAPTER_CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise PreflightError(f"{path} cannot be read: {error}") from error
    if not isinstance(base, str) or not base:
        raise PreflightError(f"{path} names no base model: write its folder or hub id into base_model_name_or_path.")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise PreflightError(f"{path}: the base model {base} is not there. Correct base_model_name_or_path.")
    return base


def levels(name: str) -> list[str]:
    """An adapter's folder, the adapters that it stands on, and last the model at the bottom; of a model itself alone.

    Raises:
        PreflightError: one of them names no base, or itself.
    """
    found = [name]
    while is_adapter_folder(found[-1]):
        base = adapter_base(found[-1])
        if any(os.path.realpath(base) == os.path.realpath(one) for one in found):
            path = os.path.join(found[-1], ADAPTER_CONFIG)
            raise PreflightError(f"{path}: the adapter stands on itself. Correct base_model_name_or_path.")
        found.append(base)
    return found


def model_below(name: str) -> str:
    """The model at the bottom of an adapter's folder; of a model its own name."""
    return levels(name)[-1]


def nearest_with(name: str, *files: str) -> str:
    """Of an adapter's folder and those below it the first that holds one of these files; else the model below."""
    if not is_adapter_folder(name) or any(has_file(name, file) for file in files):
        return name  # what stands below may be gone
    return next((folder for folder in levels(name) if any(has_file(folder, file) for file in files)), model_below(name))


def continued_adapter(config: RunConfig) -> str | None:
    """The adapter that a run goes on training: `model.adapter`, or with LoRA a `model.model` that is one itself."""
    if config.model.adapter is not None:
        return config.model.adapter
    goes_on = config.tuner.train_type == "lora" and is_adapter_folder(config.model.model)
    return config.model.model if goes_on else None
