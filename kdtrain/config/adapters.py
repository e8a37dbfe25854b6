"""The folder of a PEFT adapter, as far as it can be read without torch."""

from __future__ import annotations

import json
import os

from kdtrain.config.model_folder import ADAPTER_CONFIG, INDEX, WEIGHTS
from kdtrain.errors import PreflightError

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
