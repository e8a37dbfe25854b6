"""What was probably meant by a key that is not known where it stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, get_args

from kdtrain.config.options import TrainingOptions
from kdtrain.config.other_names import RENAMED_FIELDS, other_key, other_key_anywhere
from kdtrain.config.schema import RunConfig
from kdtrain.config.section import Section
from kdtrain.config.training_fields import training_fields

_LONGEST_KEY = 60
# Sections with keys of others, for some rows or for one of several teachers.
_REPEATS = ("data.train", "rlhf.on_policy", "rlhf.teachers")


@lru_cache(maxsize=1)
def known_keys() -> dict[str, tuple[str, ...]]:
    """The keys of every section, sections by their dotted name, the top level as an empty name."""
    keys = {
        section: tuple(field.alias or name for name, field in model.model_fields.items())
        for section, model in _sections(RunConfig)
    }
    elsewhere = {key for section in ("model", "tuner", "data", "rlhf", "custom") for key in keys[section]}
    of_trl = (n for n in training_fields() if n not in elsewhere and n not in RENAMED_FIELDS)
    keys["training"] = (*of_trl, *TrainingOptions.model_fields)
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


def unknown_key(section: str, key: str, value: Any = None) -> tuple[str, str]:
    """Message and hint for `key` with its value, which `section` does not have."""
    if len(key) > _LONGEST_KEY:
        return f"unknown key '{key[:_LONGEST_KEY]}...'", ""
    keys, where = known_keys(), section or "the config"
    message = f"unknown key '{key}' in {where}"
    *parents, last = f"{section}.{key}".lstrip(".").split(".")
    if "." in key and last in keys.get(".".join(parents), ()):
        nested = ": {".join((*parents, last)) + ": ..." + "}" * len(parents)
        return message, f"nest it, one level per dot: {nested}"
    if hint := other_key(section, key, value):
        return message, hint
    # data.eval has the keys of data.train.
    homes = [home for home in keys if home not in (section, "data.eval") and key in keys[home]]
    homes = [home for home in homes if home not in _REPEATS] or homes
    if homes:
        paths = " or ".join(f"{home}.{key}".lstrip(".") for home in homes)
        return f"'{key}' does not belong in {section or 'the top level'}", f"move it to {paths}"
    if hint := other_key_anywhere(key):
        return message, hint
    own = keys.get(section, ())
    if near := difflib.get_close_matches(key, own, n=1):
        return message, f"did you mean {f'{section}.{near[0]}'.lstrip('.')}?"
    for home, names in keys.items():
        if near := difflib.get_close_matches(key, names, n=1, cutoff=0.8):
            return message, f"did you mean {f'{home}.{near[0]}'.lstrip('.')}?"
    return message, f"the keys are {', '.join(own)}" if 0 < len(own) <= 12 else ""
