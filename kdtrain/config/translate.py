"""Pydantic's findings in our own words: its texts repeat the input, which may be a secret, and name no remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdtrain.config.diagnose import describe, dotted
from kdtrain.config.other_names import for_text, other_value
from kdtrain.config.suggest import unknown_key
from kdtrain.config.training_fields import KINDS, choice, number_hint
from kdtrain.config.tree import KeyPath, Problem

_EXPECTED = {
    "bool_type": "bool",
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "float",
    "string_type": "str",
    "dict_type": "dict",
    "mapping_type": "dict",
    "model_type": "dict",
    "list_type": "list",
    "tuple_type": "list",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
ALTERNATIVE = "[schedule]"
"""In Pydantic's paths: what follows is in a map that stands where a number may stand too."""
_NUMBER = "[number]"
_OR_GROWING = "or write a limit that grows with the steps, {from: 64, to: 512, over: 0.3}"
_TAGS = {"[key]", "[sources]", "[share]", _NUMBER, ALTERNATIVE}
_REQUIRED = {
    "model.model": "the student, as a model folder or a hub id",
    "data.train": "a file, a hub id, or a list of sources",
    "rlhf.max_new_tokens.from": "tokens of the first step, such as 64",
    "rlhf.max_new_tokens.to": "tokens once it has grown, such as 512",
    "rlhf.max_new_tokens.over": "the share of all steps over which it grows, such as 0.3",
}


def to_problem(error: Mapping[str, Any]) -> Problem:
    """One entry of `ValidationError.errors()` as a problem."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx") or {}
    path: KeyPath = tuple(part for part in error["loc"] if part not in _TAGS)
    name = path[-1] if path else ""
    if kind == "extra_forbidden":
        return Problem(path, *unknown_key(_section(path[:-1]), str(name), value), on_key=True)
    if kind == "missing":
        return Problem(path, "is required", _REQUIRED.get(dotted(path), ""), on_key=True, missing=True)
    if kind == "kdtrain":
        return Problem(path, str(context["text"]))
    if kind == "literal_error":
        message, hint = choice(value, re.findall(r"'([^']*)'", context["expected"]), name)
        return Problem(path, message, other_value(dotted(path), value) or hint)
    if kind in _EXPECTED:
        message = f"expected {KINDS[_EXPECTED[kind]][1]}, got {describe(value, name)}"
        if _NUMBER in error["loc"] and not isinstance(value, float):
            return Problem(path, message, number_hint(value, [_EXPECTED[kind]]) or _OR_GROWING)
        return Problem(path, message, number_hint(value, [_EXPECTED[kind]]) or for_text(dotted(path), value))
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        limit = f"{words} {context[bound]:g}" if (kind, context[bound]) != ("greater_than_equal", 0) else "non-negative"
        return Problem(path, f"must be {limit}, got {value}")
    if kind == "string_too_short":
        return Problem(path, "must not be empty")
    if kind == "finite_number":
        return Problem(path, "not a finite number")
    return Problem(path, "not a valid value")


def _section(path: KeyPath) -> str:
    """The section as `suggest` names it: without list positions and target names."""
    names = [part for part in path if isinstance(part, str)]
    if names[:1] in (["visual_kd"], ["hidden_kd"]):  # of `DistillationOptions`
        names = ["custom", *names]
    if names[:2] == ["rlhf", "teachers"] and len(names) > 2:  # without the name of the teacher
        names = [*names[:2], *names[3:]]
    return ".".join(names[:3] if names[:3] == ["custom", "visual_kd", "targets"] else names)
