"""A config as it was written: values that know the file, line and column they came from.

Merging (`extends`, the command line) works on these trees, so that every message can point at the text that is to be
changed and every relative path at the folder it is relative to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from kdtrain.config.diagnose import Diagnostic, Level, dotted

KeyPath = tuple["str | int", ...]


class Invalid(Enum):
    """Stands for a value that was already reported, so that it is not reported again for what it is not."""

    VALUE = "invalid"


@dataclass(frozen=True)
class SourceFile:
    """A text that values come from."""

    name: str | None
    """As shown to the user; None for a mapping."""
    base: Path
    """Relative paths in it start here."""
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Place:
    """A position in a source; line and col count from 1."""

    source: SourceFile
    line: int | None = None
    col: int | None = None


@dataclass(frozen=True)
class Node:
    """A scalar, a list of nodes, or a map of entries. Shared wherever an alias repeats it, so never changed."""

    value: str | int | float | bool | Invalid | list[Node] | dict[str, Entry] | None
    place: Place
    size: int = 1
    """Nodes below and including this one, aliases expanded."""
    height: int = 0
    """Levels below this one."""


@dataclass(frozen=True)
class Entry:
    """A key of a map with its value."""

    key_place: Place
    node: Node


@dataclass(frozen=True)
class Problem:
    """A finding that is yet to be placed: `path` is looked up in the tree unless `place` is given."""

    path: KeyPath
    message: str
    hint: str = ""
    level: Level = "error"
    on_key: bool = False
    """Point at the key rather than at the value."""
    place: Place | None = None
    missing: bool = False
    """Something has to be written that is not there."""


def child(node: Node, part: str | int) -> Node | None:
    """The node below `part`, also where a list of names or a lone value stands for a map or a list."""
    if isinstance(node.value, dict):
        return node.value[part].node if isinstance(part, str) and part in node.value else None
    if isinstance(node.value, list):
        if isinstance(part, int):
            return node.value[part] if part < len(node.value) else None
        return next((item for item in node.value if item.value == part), None)
    return None


def locate(root: Node, path: KeyPath, on_key: bool = False) -> Place:
    """The place of `path`, or of the nearest part of it that was written."""
    node, place = root, root.place
    for index, part in enumerate(path):
        if part == 0 and not isinstance(node.value, list):
            continue  # one source given where a list of them may stand
        if isinstance(node.value, dict) and isinstance(part, str) and part in node.value and on_key:
            place = node.value[part].key_place
        found = child(node, part)
        if found is None:
            # Missing here: shown at the key above, for that key's value may start lines later.
            return locate(root, path[:index], on_key=True) if index else root.place
        node = found
    return place if on_key else node.place


def get(root: Node, path: KeyPath) -> Node | None:
    """The node at `path`, if written; a lone value counts as the first of a list."""
    node: Node | None = root
    for part in path:
        if node is None:
            return None
        if part == 0 and not isinstance(node.value, list):
            continue
        node = child(node, part)
    return node


class Written:
    """Which options a config sets itself."""

    def __init__(self, root: Node) -> None:
        self.root = root

    def has(self, *path: str | int) -> bool:
        node = get(self.root, path)
        return node is not None and node.value is not None

    def idle(self, names: Sequence[str], reason: str, *section: str | int) -> Iterator[Problem]:
        """One warning for all of `names` that the file sets in `section`, in the file's order."""
        node = get(self.root, section)
        found = [key for key in node.value if key in names] if node and isinstance(node.value, dict) else []
        if found:
            also = f" (the same goes for {', '.join(found[1:])})" if found[1:] else ""
            yield Problem((*section, found[0]), f"has no effect: {reason}{also}", level="warning", on_key=True)


def scalars(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
    """All scalars below `node` with their paths."""
    if isinstance(node.value, dict):
        for key, entry in node.value.items():
            yield from scalars(entry.node, (*path, key))
    elif isinstance(node.value, list):
        for index, item in enumerate(node.value):
            yield from scalars(item, (*path, index))
    else:
        yield path, node


def plain(node: Node) -> Any:
    """The values alone; those already reported as invalid are left out."""
    if isinstance(node.value, dict):
        return {k: plain(e.node) for k, e in node.value.items() if e.node.value is not Invalid.VALUE}
    if isinstance(node.value, list):
        return [plain(item) for item in node.value if item.value is not Invalid.VALUE]
    return node.value


def merge(base: Node, top: Node) -> Node:
    """`top` over `base`: maps are merged key by key, anything else is replaced."""
    if not isinstance(base.value, dict) or not isinstance(top.value, dict):
        return top
    merged = dict(base.value)
    for key, entry in top.value.items():
        below = merged.get(key)
        merged[key] = entry if below is None else Entry(entry.key_place, merge(below.node, entry.node))
    return Node(merged, top.place)


def put(root: Node, path: KeyPath, new: Node, place: Place | None = None) -> Node:
    """A copy of the tree with `new` at `path`, and missing maps on the way. `place` is where the path was written, None
    where `new` only replaces a value."""
    if not path:
        return new
    head, *rest = path
    if isinstance(head, int):
        if not isinstance(root.value, list):  # a lone value stands for the first of a list
            return put(root, tuple(rest), new)
        items = list(root.value)
        items[head] = put(items[head], tuple(rest), new)
        return Node(items, root.place)
    entries = root.value if isinstance(root.value, dict) else {}
    old = entries.get(head) or Entry(place or root.place, Node(None, place or root.place))
    key_place = old.key_place if rest or place is None else place
    return Node({**entries, head: Entry(key_place, put(old.node, tuple(rest), new, place))}, root.place)


def to_diagnostic(problem: Problem, root: Node) -> Diagnostic:
    """The problem with its place."""
    place = problem.place or locate(root, problem.path, problem.on_key)
    lines, line = place.source.lines, place.line
    # Something missing from the whole file has no line worth showing.
    whole_file = problem.place is None and place is root.place
    shown = lines[line - 1] if line and line <= len(lines) and not whole_file else None
    return Diagnostic(
        problem.level, dotted(problem.path), problem.message, problem.hint, place.source.name, line, place.col, shown
    )
