"""Keyword arguments that a config hands on to `from_pretrained`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from kdtrain.config.model_folder import read_map
from kdtrain.config.schema import Dtype
from kdtrain.config.training_fields import choice, source_folder
from kdtrain.config.tree import KeyPath, Problem

_TOKEN = ("secrets do not belong in a config", "set the environment variable HF_TOKEN")
_NAMED = ("the model is named in its own option", "remove it")
# What would go round the one decision about custom code, pickles, tokens and random weights.
_REFUSED: Mapping[str, tuple[str, str]] = {
    "trust_remote_code": ("custom code is allowed in one place only", "use model.trust_remote_code"),
    "use_safetensors": ("weights are loaded from safetensors only", "remove it"),
    "token": _TOKEN,
    "use_auth_token": _TOKEN,
    "ignore_mismatched_sizes": ("weights of another shape would be random numbers", "remove it"),
    "output_loading_info": ("it is always checked", "remove it"),
    "pretrained_model_name_or_path": _NAMED,
    "config": _NAMED,
    "state_dict": _NAMED,
}
# Settings of image processors, in every family's own words; no model's config has one of them.
_OF_PROCESSORS = (
    "max_pixels", "min_pixels", "size", "crop_size", "max_image_size", "resized_height", "resized_width",
    "longest_edge", "shortest_edge", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad",
    "do_convert_rgb", "do_image_splitting", "do_pan_and_scan", "image_mean", "image_std", "resample", "use_fast",
)  # fmt: skip
_HARMLESS = {"use_safetensors": True, "ignore_mismatched_sizes": False}
_USUAL = (
    "dtype",
    "revision",
    "device_map",
    "attn_implementation",
    "max_memory",
    "offload_folder",
    "subfolder",
    "variant",
)


def loading_arguments(path: KeyPath, kwargs: Mapping[str, Any], model: str | None) -> Iterator[Problem]:
    """What is wrong with the arguments at `path` for `model`, whose folder tells which names its config has."""
    for name, value in kwargs.items():
        if name in _REFUSED:
            reason, instead = _REFUSED[name]
            if value != _HARMLESS.get(name, ...):
                yield Problem((*path, name), f"cannot be set: {reason}", instead, on_key=True)
        elif name in _OF_PROCESSORS:
            own = " (or rlhf.teacher.processor_kwargs)" if path[0] == "rlhf" else ""
            hint = f"use data.processor_kwargs{own}"
            yield Problem((*path, name), "a setting of the image processor, not of the model", hint, on_key=True)
        elif name in ("dtype", "torch_dtype"):
            if not isinstance(value, str) or value.removeprefix("torch.") not in get_args(Dtype):
                yield Problem((*path, name), *choice(value, get_args(Dtype), name))
        elif not _known(name, model):
            near = difflib.get_close_matches(name, _USUAL, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see from_pretrained in transformers"
            yield Problem((*path, name), "unknown to from_pretrained and to this model's config", hint, on_key=True)
    if "dtype" in kwargs and "torch_dtype" in kwargs:
        yield Problem((*path, "torch_dtype"), "given twice: it is the old name of dtype", "keep dtype", on_key=True)


def processor_arguments(path: KeyPath, kwargs: Mapping[str, Any]) -> Iterator[Problem]:
    """What no setting of a processor may decide; which others it has is known when it is loaded."""
    for name in kwargs:
        if name in _REFUSED:
            reason, instead = _REFUSED[name]
            yield Problem((*path, name), f"cannot be set: {reason}", instead, on_key=True)
        elif name in ("revision", "subfolder", "chat_template", "tokenizer", "use_fast"):
            yield Problem((*path, name), "no setting of the image processor", "remove it", on_key=True)


def _known(name: str, model: str | None) -> bool:
    """Whether the source text that loads a local folder's model has a name in it: importing it would take seconds.

    True also where that cannot be known: a name may be taken for known that is not, never the other way round.
    """
    folder = Path(model) if model else None
    if folder is None or not folder.is_absolute():
        return True
    config = read_map(folder / "config.json")
    texts = _sources(str(config.get("model_type") or ""))
    word = re.compile(rf"\b{re.escape(name)}\b")
    return name in config or not texts or any(word.search(path.read_text(encoding="utf-8")) for path in texts)


def _sources(model_type: str) -> list[Path]:
    """The files of transformers that read a model's arguments; none where the family's are not found."""
    if not model_type:
        return []
    root = source_folder("transformers")
    family = sorted((root / "models" / model_type.replace("-", "_").removesuffix("_text")).glob("*.py"))
    family = [path for path in family if "processing" not in path.name]  # a processor's words are not the model's
    return [*family, root / "modeling_utils.py", root / "configuration_utils.py"] if family else []
