"""The fields of trl's GKDConfig, read from the installed source text: importing them would take seconds and pull in
torch, which `kdtrain validate` must not; a syntax tree of the four classes takes some ten milliseconds."""

from __future__ import annotations

import ast
import builtins
import contextlib
import difflib
import importlib.util
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from kdtrain.config.diagnose import describe

# Package, file and class, base classes first: a later class overrides the fields of an earlier one.
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
    ("trl", "experimental/gkd/gkd_config.py", "GKDConfig"),
)
_ENUM_FILES = (("transformers", "trainer_utils.py"), ("transformers", "training_args.py"))

# A type by its name in annotations: the types of values, the words of a message, the name in JSON Schema.
KINDS: dict[str, tuple[tuple[type, ...], str, str]] = {
    "int": ((int,), "a whole number", "integer"),
    "float": ((int, float), "a number", "number"),
    "bool": ((bool,), "true or false", "boolean"),
    "str": ((str,), "text", "string"),
    "dict": ((dict,), "a map", "object"),
    "list": ((list, tuple), "a list", "array"),
    "None": ((type(None),), "null", "null"),
}


@dataclass(frozen=True)
class TrainingField:
    """One field of GKDConfig."""

    name: str
    kinds: tuple[str, ...]
    """Accepted types out of int, float, str, bool, dict, list, None; empty where anything goes."""
    help: str
    choices: tuple[str, ...] = ()
    """Accepted texts; empty where any text goes."""

    def check(self, value: Any) -> tuple[str, str]:
        """Message and hint about a value of the wrong type; empty texts if it is fine."""
        kinds = self.kinds if not isinstance(value, bool) else {"bool"} & set(self.kinds)
        if self.kinds and not any(isinstance(value, KINDS[kind][0]) for kind in kinds):
            wanted = " or ".join(KINDS[kind][1] for kind in self.kinds if kind != "None")
            return f"expected {wanted}, got {describe(value, self.name)}", number_hint(value, self.kinds)
        if isinstance(value, str) and self.kinds and self.choices and value not in self.choices:
            return choice(value, self.choices, self.name)
        return "", ""


def number_hint(value: Any, kinds: Sequence[str]) -> str:
    """What was probably meant by a value that is none of `kinds`."""
    if isinstance(value, float) and value.is_integer() and "int" in kinds:
        return f"write {int(value)}"
    if isinstance(value, str):
        if "bool" in kinds and value.lower() in ("yes", "on", "true", "no", "off", "false"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
        if {"int", "float"} & set(kinds):
            try:
                number = float(value)
            except ValueError:
                return _decimal_point(value)
            if not math.isfinite(number):
                return "give a finite number"
            return "remove the quotes" if value.replace("_", "") == value else "write the digits without _"
    return ""


def _decimal_point(value: str) -> str:
    """What was meant by 1,5e-4."""
    pointed = value.replace(",", ".", 1)
    with contextlib.suppress(ValueError):
        float(pointed)
        return f"write {pointed}, with a point" if pointed != value else ""
    return ""


_SHORT_TYPES: dict[str, str] = {
    "fp16": "float16", "half": "float16", "float16": "float16", "fp32": "float32", "float": "float32",
    "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16",
}  # fmt: skip


def choice(value: Any, choices: Sequence[str], name: object) -> tuple[str, str]:
    """Message and hint about a value that is none of `choices`."""
    near: list[str] = []
    if isinstance(value, str) and value:
        named = _SHORT_TYPES.get(value.removeprefix("torch."), "")
        starting = [option for option in choices if option.startswith(value)]
        near = [named] if named in choices else starting or difflib.get_close_matches(value, choices)
    listed = list(choices) if len(choices) <= 12 else [*(near or choices)[:4], "..."]
    one_of = "one of " if len(choices) > 1 else ""
    hint = f"did you mean '{near[0]}'?" if near else ""
    return f"expected {one_of}{', '.join(listed)}, got {describe(value, name)}", hint


@lru_cache(maxsize=1)
def training_fields() -> dict[str, TrainingField]:
    """Every field of GKDConfig by name."""
    known = _Known({name: Literal[values] for name, values in _enums()})
    fields: dict[str, TrainingField] = {}
    for package, file, class_name in _CLASSES:
        body = next(node.body for node in _classes(package, file) if node.name == class_name)
        for statement in body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
                if not name.startswith("_"):
                    fields[name] = _field(name, statement, known)
    assert {"learning_rate", "lmbda"} <= set(fields), "the sources of transformers and trl are laid out differently"
    return fields


@lru_cache
def _classes(package: str, file: str) -> list[ast.ClassDef]:
    tree = ast.parse((source_folder(package) / file).read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def source_folder(package: str) -> Path:
    """Where a dependency is installed, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec, f"{package} is not installed"
    assert spec.origin
    return Path(spec.origin).parent


def _enums() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and values of the text enums that fields are annotated with, such as SchedulerType."""
    for package, file in _ENUM_FILES:
        for node in _classes(package, file):
            if "ExplicitEnum" in map(ast.unparse, node.bases):
                values = (getattr(s.value, "value", None) for s in node.body if isinstance(s, ast.Assign))
                yield node.name, tuple(value for value in values if isinstance(value, str))


class _Known(dict[str, Any]):
    """The names in annotations; a class that is not known here may hold anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, getattr(typing, name, Any))


def _field(name: str, statement: ast.AnnAssign, known: _Known) -> TrainingField:
    metadata = _metadata(statement.value)
    kinds: list[str] = []
    choices = tuple(metadata.get("choices") or ())
    annotation = _evaluated(ast.unparse(statement.annotation), known)
    for member in get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]:
        origin, values = get_origin(member) or member, get_args(member)
        if origin is Literal:
            origin, choices = type(values[0]), choices + tuple(value for value in values if isinstance(value, str))
        kinds.append("None" if origin is types.NoneType else getattr(origin, "__name__", ""))
    if not set(kinds) <= set(KINDS):
        kinds, choices = [], tuple(metadata.get("choices") or ())
    return TrainingField(name, tuple(dict.fromkeys(kinds)), str(metadata.get("help", "")), choices)


def _evaluated(annotation: str, known: _Known) -> Any:
    value = eval(annotation, {"__builtins__": {}}, known)
    return _evaluated(value, known) if isinstance(value, str) else value  # quoted, for the class is not imported


def _metadata(call: ast.expr | None) -> dict[str, Any]:
    """The literal entries of `field(..., metadata={...})`."""
    entries: dict[str, Any] = {}
    for keyword in call.keywords if isinstance(call, ast.Call) else []:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                with contextlib.suppress(ValueError, TypeError):  # help put together from an expression
                    entries[ast.literal_eval(key)] = ast.literal_eval(value)  # type: ignore[arg-type]
    return entries
