"""What the shell completes: options of the config as `KEY.SUB=`, and their values where there are only some.

`kdtrain --install-completion` sets it up, for bash, zsh and fish.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def option(incomplete: str) -> list[str]:
    """Options that begin so; behind `=` the values that one has."""
    from kdtrain.config import json_schema

    schema = json_schema()
    path, equals, value = incomplete.partition("=")
    found = _walk(schema, schema["$defs"])
    if equals:
        return [f"{path}={one}" for key, choices in found if key == path for one in choices if one.startswith(value)]
    return [f"{key}=" for key, _ in found if key.startswith(path)]


def log_format(incomplete: str) -> list[str]:
    """text, json."""
    return [one for one in ("text", "json") if one.startswith(incomplete)]


def changeable(incomplete: str) -> list[str]:
    """What `--allow-changes` takes, behind the last comma."""
    from kdtrain.config.changes import allowable

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in allowable() if name.startswith(last)]


def _walk(node: Mapping[str, Any], named: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Each option below a node of the schema, and its values where they are listed."""
    for key, child in node.get("properties", {}).items():
        here, forms = f"{path}{key}", _forms(child, named)
        sections = [form for form in forms if form.get("properties")]
        for section in sections:
            yield from _walk(section, named, f"{here}.")
        if len(sections) < len(forms):
            yield here, [_text(one) for form in forms for one in _choices(form)]


def _forms(node: Mapping[str, Any], named: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a value may be, one by one; but for null."""
    if "$ref" in node:
        return _forms(named[node["$ref"].rpartition("/")[2]], named)
    if "anyOf" in node:
        return [form for child in node["anyOf"] for form in _forms(child, named)]
    return [] if node.get("type") == "null" else [node]


def _choices(form: Mapping[str, Any]) -> list[Any]:
    if form.get("type") == "boolean":
        return [True, False]
    return [form["const"]] if "const" in form else form.get("enum", [])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
