"""`rlhf.teacher.prefix`: the messages of a list or a file, checked where they stand.

A file's messages take the place of its path, so that what a run has read is in its config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from kdtrain.config.diagnose import describe, looks_secret
from kdtrain.config.sources import from_mapping, read_text
from kdtrain.config.tree import Entry, Invalid, KeyPath, Node, Place, Problem, get, plain, put
from kdtrain.config.yaml_reader import UnreadableError, read_yaml

PATH: KeyPath = ("rlhf", "teacher", "prefix")
ROLES = ("system", "developer", "user", "assistant")
_KEYS = ("role", "content")
_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_AS_LIST = 'write [{role: system, content: "…"}]'


def read_prefix(root: Node) -> tuple[Node, list[Problem]]:
    """A copy of the tree with the messages of a file that the prefix names, and what is wrong with them."""
    node = get(root, PATH)
    if node is None or node.value is None or node.value is Invalid.VALUE:
        return root, []
    found, problems = _form(node)
    return put(root, PATH, Node(Invalid.VALUE, node.place) if problems else found), problems


def _form(node: Node) -> tuple[Node, list[Problem]]:
    if not isinstance(node.value, dict):
        return _messages(node, PATH)
    if not node.value.keys().isdisjoint(_KEYS):
        return node, [Problem(PATH, "expected a list of messages, got one message", "put it into a list")]
    for key, entry in node.value.items():
        if key not in ("column", "default"):
            hint = "write {column: name}, or {column: name, default: [{role: …, content: …}]}"
            if key in ("path", "file"):
                hint = "name the file itself, prefix: rules.txt"
            return node, [Problem((*PATH, key), "unknown key", hint, place=entry.key_place)]
    column, default = node.value.get("column"), node.value.get("default")
    if column is None or not isinstance(column.node.value, str) or not column.node.value:
        place = node.place if column is None else column.node.place
        return node, [Problem((*PATH, "column"), "expected the name of a column of the data", place=place)]
    if default is None or default.node.value is None:
        return node, []
    messages, problems = _messages(default.node, (*PATH, "default"))
    return Node({"column": column, "default": Entry(default.key_place, messages)}, node.place), problems


def _messages(node: Node, path: KeyPath) -> tuple[Node, list[Problem]]:
    """The messages of a list, or of the file that a text names."""
    if node.value == "":
        return node, [Problem(path, "is empty", f"leave it out, or {_AS_LIST}", place=node.place)]
    if isinstance(node.value, str):
        try:
            node = _of_file(node.value, node.place)
        except UnreadableError as error:
            problem = error.problem
            return node, [Problem(path, problem.message, problem.hint, place=problem.place)]
    return node, list(_wrong(node, path))


def _of_file(name: str, place: Place) -> Node:
    path = Path(os.path.abspath(place.source.base / os.path.expanduser(name)))
    if not _exists(path):
        message = f"there is no file {describe(name).removeprefix('text ')} in {place.source.base}: a text names a file"
        raise UnreadableError(Problem((), message, f"to give one message, {_AS_LIST}", place=place))
    suffix = path.suffix.lower()
    if suffix in _ROWS:
        message, hint = f"a {suffix} file holds rows, not messages", "name a JSON, YAML or text file"
        raise UnreadableError(Problem((), message, hint, place=place))
    text, source = read_text(path, place)
    if suffix in (".yaml", ".yml"):
        node, problems = read_yaml(text, source)
        if problems:
            raise UnreadableError(problems[0])
        return node
    if suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            line, col = getattr(error, "lineno", None), getattr(error, "colno", None)
            message = f"not valid JSON: {getattr(error, 'msg', 'nested too deeply')}"
            raise UnreadableError(Problem((), message, place=Place(source, line, col))) from None
    else:
        value = [{"role": "system", "content": text.strip()}]
    tree, problems = from_mapping({"prefix": value}, source)
    if problems:
        raise UnreadableError(Problem((), problems[0].message, place=Place(source)))
    node = get(tree, ("prefix",)) or tree
    return node


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def _wrong(node: Node, path: KeyPath) -> Iterator[Problem]:
    """What is wrong with messages, each with its place."""
    if not isinstance(node.value, list):
        yield Problem(path, f"expected a list of messages, got {describe(plain(node))}", _AS_LIST, place=node.place)
        return
    if not node.value:
        yield Problem(path, "is empty", f"leave it out, or {_AS_LIST}", place=node.place)
    for number, message in enumerate(node.value):
        yield from _wrong_message(message, (*path, number), first=not number)


def _wrong_message(node: Node, path: KeyPath, first: bool) -> Iterator[Problem]:
    if not isinstance(node.value, dict):
        yield Problem(path, f"expected a message, got {describe(plain(node))}", _AS_LIST, place=node.place)
        return
    for key, entry in node.value.items():
        if key not in _KEYS:
            yield Problem((*path, key), "unknown key", "a message has role and content", place=entry.key_place)
    role, content = (node.value[key].node if key in node.value else None for key in _KEYS)
    known = f"one of {', '.join(ROLES)}"
    if role is None or role.value not in ROLES:
        message = f"is required: {known}" if role is None else f"expected {known}, got {describe(plain(role))}"
        yield Problem((*path, "role"), message, place=node.place if role is None else role.place)
    elif not first and role.value in ROLES[:2]:
        message = f"only the first message can be a {role.value} message"
        yield Problem((*path, "role"), message, "join their texts", place=role.place)
    if content is None or not isinstance(content.value, str):
        message = "is required: text" if content is None else f"expected text, got {describe(plain(content))}"
        yield Problem((*path, "content"), message, place=node.place if content is None else content.place)
    elif not content.value.strip():
        yield Problem((*path, "content"), "is empty", place=content.place)
    elif looks_secret(content.value):  # of a file: a config's own values were looked at before
        message = "looks like a secret, and a run keeps the prefix in its config"
        yield Problem((*path, "content"), message, place=content.place)
