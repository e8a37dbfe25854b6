"""Pydantic's findings in our own words: its texts repeat the input, which may be a secret, and name no remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdtrain.config.diagnose import describe, dotted
from kdtrain.config.suggest import unknown_key
from kdtrain.config.training_fields import choice, number_hint
from kdtrain.config.tree import KeyPath, Problem

_EXPECTED = {
    "bool_type": ("true or false", {"bool"}),
    "int_type": ("a whole number", {"int"}),
    "int_from_float": ("a whole number", {"int"}),
    "float_type": ("a number", {"float"}),
    "string_type": ("text", set()),
    "dict_type": ("a map", set()),
    "mapping_type": ("a map", set()),
    "model_type": ("a map", set()),
    "list_type": ("a list", set()),
    "tuple_type": ("a list", set()),
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_REQUIRED = {
    "model.model": "the student, as a model folder or a hub id",
    "data.train": "a file, a hub id, or a list of sources",
}


def to_problem(error: Mapping[str, Any]) -> Problem:
    """One entry of `ValidationError.errors()` as a problem."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx") or {}
    path: KeyPath = tuple(part for part in error["loc"] if part != "[key]")
    name = path[-1] if path else ""
    if kind == "extra_forbidden":
        return Problem(path, *unknown_key(_section(path[:-1]), str(name)), on_key=True)
    if kind == "missing":
        return Problem(path, "is required", _REQUIRED.get(dotted(path), ""), on_key=True)
    if kind == "kdtrain":
        return Problem(path, str(context["text"]))
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return Problem(path, *choice(value, choices, name))
    if kind in _EXPECTED:
        wanted, kinds = _EXPECTED[kind]
        return Problem(path, f"expected {wanted}, got {describe(value, name)}", number_hint(value, kinds))
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
    if names[:1] == ["visual_kd"]:  # of `DistillationOptions`
        names = ["custom", *names]
    return ".".join(names[:3] if names[:3] == ["custom", "visual_kd", "targets"] else names)
