"""YAML text to a tree of positions, by the rules of YAML 1.2.

PyYAML's own loader (1.1) reads `1e-5` as text and `no` as false, keeps the last of two equal keys in silence and
expands aliases until memory is gone. Its event stream is flat, so depth and size are known before anything is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from kdtrain.config.tree import Entry, Invalid, KeyPath, Node, Place, Problem, SourceFile

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 10_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE, _FALSE = {"true", "True", "TRUE"}, {"false", "False", "FALSE"}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class UnreadableError(Exception):
    """Reading stopped; carries the one problem that says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def read_yaml(text: str, source: SourceFile, path: KeyPath = ()) -> tuple[Node, list[Problem]]:
    """Reads one document, which belongs at `path` of the config. Returned are mistakes that leave the rest readable
    (duplicate keys, NaN); others are raised as `UnreadableError`."""
    reader = _Reader(source, path)
    try:
        node = reader.document(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        raise UnreadableError(_syntax_problem(error, source)) from None
    except yaml.YAMLError as error:  # a character YAML does not allow, such as NUL
        before = text[: getattr(error, "position", 0) or 0]
        place = Place(source, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise UnreadableError(Problem((), "a control character, which YAML does not allow", place=place)) from None
    return node, reader.problems


def check_number(value: int | float) -> str:
    """Why a number is refused, or an empty text."""
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**63 else "too large for a whole number"
    return "" if math.isfinite(value) else "not a finite number"


def _syntax_problem(error: yaml.MarkedYAMLError, source: SourceFile) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)
    if mark and mark.line >= len(source.lines) > 0:  # the text ended too soon
        place = Place(source, len(source.lines), len(source.lines[-1]) + 1)
    nearby = source.lines[max(0, mark.line - 1) : mark.line + 1] if mark else []
    if any("\t" in line[: len(line) - len(line.lstrip())] for line in nearby):
        return Problem((), "a tab in the indentation, which YAML does not allow", "indent with spaces", place=place)
    if error.problem == "exceeded maximum nesting depth":  # libyaml's own limit, met while it reads ahead
        return Problem((), f"more than {MAX_DEPTH} levels deep", place=place)
    return Problem((), f"not valid YAML: {error.problem or error.context}", place=place)


class _Reader:
    """Builds the tree of one document from its events."""

    def __init__(self, source: SourceFile, path: KeyPath) -> None:
        self.source = source
        self.path = path
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node | None] = {}  # None while the anchored value is still open
        self.read = 0

    def document(self, events: Iterator[Any]) -> Node:
        root: Node | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self._stop(event, "a second document: a config is one")
                root = self._node(next(events), events, 0)
        return root or Node(None, Place(self.source))

    def _place(self, event: Any) -> Place:
        return Place(self.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _stop(self, event: Any, message: str, hint: str = "") -> UnreadableError:
        return UnreadableError(Problem((), message, hint, place=self._place(event)))

    def _node(self, event: Any, events: Iterator[Any], depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        self.read += 1
        if event.tag is not None:
            raise self._stop(event, "a tag, and tags are not allowed", "write the value alone, in quotes if it is text")
        if depth > MAX_DEPTH:
            raise self._stop(event, f"more than {MAX_DEPTH} levels deep")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(event, events, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, events, depth)
        else:
            node = Node(self._scalar(event), self._place(event))
        if max(node.size, self.read) > MAX_NODES:
            raise self._stop(event, f"more than {MAX_NODES} values once aliases are expanded")
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, event: Any, depth: int) -> Node:
        if event.anchor not in self.anchors:
            raise self._stop(event, f"no anchor &{event.anchor} above this alias")
        node = self.anchors[event.anchor]
        if node is None:
            raise self._stop(event, f"the alias *{event.anchor} contains itself")
        if depth + node.height > MAX_DEPTH:
            raise self._stop(event, f"more than {MAX_DEPTH} levels deep once aliases are expanded")
        return node

    def _below(self, part: str | int, event: Any, events: Iterator[Any], depth: int) -> Node:
        """The value of a key or the item of a list, with `path` at it."""
        outer, self.path = self.path, (*self.path, part)
        node = self._node(event, events, depth + 1)
        self.path = outer
        return node

    def _sequence(self, start: Any, events: Iterator[Any], depth: int) -> Node:
        items: list[Node] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self._below(len(items), event, events, depth))
        return self._collection(items, items, start)

    def _mapping(self, start: Any, events: Iterator[Any], depth: int) -> Node:
        entries: dict[str, Entry] = {}
        total: list[Node] = []
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            place = self._place(event)
            key = self._key(event)
            node = self._below(key, next(events), events, depth)
            total.append(node)
            if key in entries:
                message = f"duplicate key, first given in line {entries[key].key_place.line}"
                self.problems.append(Problem((*self.path, key), message, "keep one of them", place=place))
            else:
                entries[key] = Entry(place, node)
        return self._collection(entries, total, start)

    def _collection(self, value: list[Node] | dict[str, Entry], children: list[Node], start: Any) -> Node:
        size = 1 + sum(node.size for node in children)
        height = 1 + max((node.height for node in children), default=0)
        return Node(value, self._place(start), size, height)

    def _key(self, event: Any) -> str:
        self.read += 1
        if not isinstance(event, yaml.ScalarEvent):
            raise self._stop(event, "a key that is not plain text")
        if event.tag is not None or event.anchor is not None:
            raise self._stop(event, "a key with a tag or an anchor")
        if event.implicit[0] and event.value == "<<":
            hint = "put the shared part into a file for `extends`"
            raise self._stop(event, "merge keys (<<) are not supported", hint)
        if event.implicit[0] and not isinstance(self._resolve(event.value), str):
            raise self._stop(event, "a key that is not text", "put it in quotes")
        return str(event.value)

    def _scalar(self, event: Any) -> str | int | float | bool | Invalid | None:
        if not event.implicit[0]:  # quoted or a block
            return str(event.value)
        value = self._resolve(event.value)
        if isinstance(value, (int, float)) and (message := check_number(value)):
            self.problems.append(Problem(self.path, f"{message}: '{event.value[:40]}'", place=self._place(event)))
            return Invalid.VALUE
        return value

    @staticmethod
    def _resolve(text: str) -> str | int | float | bool | None:
        """The core schema of YAML 1.2: nothing but these forms is anything else than text."""
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _NOT_FINITE.fullmatch(text):
            return float(text.replace(".", ""))
        if _INT.fullmatch(text):
            # Python refuses to read numbers of thousands of digits, which are refused here anyway.
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            return int(text, base) if len(text) < 40 else 10**40
        if _FLOAT.fullmatch(text):
            return float(text)
        return text
