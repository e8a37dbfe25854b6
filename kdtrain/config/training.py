"""The fields of trl's GKDConfig, read from the installed source text.

Importing them would take seconds and pull in torch, which `kdtrain validate` must not; a syntax tree of the four
classes takes some ten milliseconds and carries the same names, types and help texts.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdtrain.config.diagnose import describe

# Package, file and class, base classes first: a later class overrides the fields of an earlier one.
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
    ("trl", "experimental/gkd/gkd_config.py", "GKDConfig"),
)
_ENUM_FILES = (("transformers", "trainer_utils.py"), ("transformers", "training_args.py"))

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "dict": (dict,),
    "list": (list, tuple),
    "None": (type(None),),
}
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a map",
    "list": "a list",
    "None": "null",
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
        if not self.kinds:
            return "", ""
        fits = any(
            isinstance(value, _KINDS[kind]) and (not isinstance(value, bool) or kind == "bool") for kind in self.kinds
        )
        if not fits:
            wanted = " or ".join(_WORDS[kind] for kind in self.kinds if kind != "None")
            return f"expected {wanted}, got {describe(value, self.name)}", number_hint(value, self.kinds)
        if isinstance(value, str) and self.choices and value not in self.choices:
            return choice(value, self.choices, self.name)
        return "", ""


def number_hint(value: Any, kinds: tuple[str, ...] | set[str]) -> str:
    """What was probably meant by text where a number or boolean stands, or by a fraction where a whole number does."""
    if isinstance(value, float) and value.is_integer() and "int" in kinds:
        return f"write {int(value)}"
    if isinstance(value, str):
        if "bool" in kinds and value.lower() in ("yes", "on", "true", "no", "off", "false"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
        if {"int", "float"} & set(kinds):
            try:
                float(value)
            except ValueError:
                return ""
            return "remove the quotes" if value.replace("_", "") == value else "write the digits without _"
    return ""


def choice(value: Any, choices: Sequence[str], name: object) -> tuple[str, str]:
    """Message and hint about a value that is none of `choices`, of which at most a dozen are listed."""
    near: list[str] = []
    if isinstance(value, str) and value:
        near = [option for option in choices if option.startswith(value)] or difflib.get_close_matches(value, choices)
    listed = list(choices) if len(choices) <= 12 else [*(near or choices)[:4], "..."]
    one_of = "one of " if len(choices) > 1 else ""
    hint = f"did you mean '{near[0]}'?" if near else ""
    return f"expected {one_of}{', '.join(listed)}, got {describe(value, name)}", hint


@lru_cache(maxsize=1)
def training_fields() -> dict[str, TrainingField]:
    """Every field of GKDConfig by name."""
    enums = _enums()
    fields: dict[str, TrainingField] = {}
    for package, file, class_name in _CLASSES:
        for statement in _class_body(_tree(package, file), class_name):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
                if not name.startswith("_"):
                    fields[name] = _field(name, statement, enums)
    assert {"learning_rate", "lmbda"} <= set(fields), "the sources of transformers and trl are laid out differently"
    return fields


@lru_cache(maxsize=8)
def _tree(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


def _class_body(tree: ast.Module, name: str) -> list[ast.stmt]:
    return next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), [])


def _enums() -> dict[str, tuple[str, ...]]:
    """The values of the text enums that fields are annotated with, such as SchedulerType."""
    found: dict[str, tuple[str, ...]] = {}
    for package, file in _ENUM_FILES:
        for node in _tree(package, file).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(b, ast.Name) and b.id == "ExplicitEnum" for b in node.bases
            ):
                values = [s.value for s in node.body if isinstance(s, ast.Assign)]
                found[node.name] = tuple(
                    v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)
                )
    return found


def _field(name: str, statement: ast.AnnAssign, enums: dict[str, tuple[str, ...]]) -> TrainingField:
    metadata = _metadata(statement.value)
    choices = tuple(metadata.get("choices") or ())
    kinds: list[str] = []
    for member in _union(statement.annotation):
        kind, values = _kind(member, enums)
        if not kind:
            return TrainingField(name, (), str(metadata.get("help", "")), choices)
        kinds.append(kind)
        choices += values
    return TrainingField(name, tuple(dict.fromkeys(kinds)), str(metadata.get("help", "")), choices)


def _metadata(call: ast.expr | None) -> dict[str, Any]:
    """The literal entries of `field(..., metadata={...})`."""
    keywords = call.keywords if isinstance(call, ast.Call) else []
    entries: dict[str, Any] = {}
    for keyword in keywords:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                try:
                    entries[ast.literal_eval(key)] = ast.literal_eval(value)  # type: ignore[arg-type]
                except (ValueError, TypeError):
                    continue  # help put together from an expression
    return entries


def _union(node: ast.expr) -> Iterator[ast.expr]:
    """The members of `A | B`, `Union[A, B]`, `Optional[A]` and of a quoted annotation."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _union(node.left)
        yield from _union(node.right)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _union(ast.parse(node.value, mode="eval").body)
    elif (
        isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("Union", "Optional")
    ):
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for member in members:
            yield from _union(member)
        if node.value.id == "Optional":
            yield ast.Constant(None)
    else:
        yield node


def _kind(node: ast.expr, enums: dict[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...]]:
    """The kind of one member of a union and the texts it is limited to; no kind where the type is not known."""
    if isinstance(node, ast.Constant) and node.value is None:
        return "None", ()
    if isinstance(node, ast.Subscript):
        head = node.value.id if isinstance(node.value, ast.Name) else ""
        if head == "Literal":
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            literals = [v.value for v in values if isinstance(v, ast.Constant)]
            kind = type(literals[0]).__name__ if literals else ""
            return (kind if kind in _KINDS else ""), tuple(v for v in literals if isinstance(v, str))
        return (head.lower() if head.lower() in _KINDS else ""), ()
    name = node.id if isinstance(node, ast.Name) else ""
    if name in enums:
        return "str", enums[name]
    return (name if name in _KINDS else ""), ()
