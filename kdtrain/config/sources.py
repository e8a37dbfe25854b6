"""From a file or mapping to one tree: reading, `extends`, and `key.sub=value` from the command line."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtrain.config.diagnose import COMMAND_LINE, dotted
from kdtrain.config.tree import Entry, Invalid, KeyPath, Node, Place, Problem, SourceFile, get, merge, put
from kdtrain.config.yaml_reader import MAX_BYTES, MAX_DEPTH, MAX_NODES, UnreadableError, check_number, read_yaml

FileOrMapping = str | Path | Mapping[str, Any]
_MAX_FILES = 64
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*|\.\d+|\[\d+\])*")
_PART = re.compile(r"[^.\[\]]+")


class Composer:
    """Reads a config with everything it extends."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.incomplete = False  # a part could not be read, so that nothing can be said about what is missing
        self._files_read = 0

    def compose(self, source: FileOrMapping, overrides: Sequence[str] = ()) -> Node:
        """The merged tree of `source`; an empty map where it cannot be read at all."""
        if isinstance(source, Mapping):
            root, problems = from_mapping(source, SourceFile(None, Path.cwd()))
            self.problems += problems
            root = self._extend(root, ())
        else:
            root = self._file(Path(source), (), Place(SourceFile(str(source), Path.cwd())))
        for override in overrides:
            try:
                root = self._override(root, override)
            except UnreadableError as error:
                self.problems.append(error.problem)
        return root

    def _fail(self, problem: Problem) -> Node:
        self.problems.append(problem)
        self.incomplete = True
        assert problem.place is not None
        return Node({}, problem.place)

    def _file(self, path: Path, chain: tuple[Path, ...], named_at: Place) -> Node:
        """Reads one file and what it extends; `chain` holds the files that led here."""
        try:
            real = path.resolve()
        except (OSError, ValueError, RuntimeError):  # no name of a file, or links in a circle
            return self._fail(Problem((), f"cannot read {path}: not the name of a file", place=named_at))
        if real in chain:
            names = " -> ".join(str(_short(step)) for step in (*chain[chain.index(real) :], real))
            message = f"the files extend each other in a circle: {names}"
            return self._fail(Problem(("extends",), message, place=named_at))
        self._files_read += 1
        if self._files_read > _MAX_FILES:
            return self._fail(Problem(("extends",), f"more than {_MAX_FILES} files", place=named_at))
        try:
            text, source = read_text(path, named_at)
            root, problems = read_yaml(text, source)
        except UnreadableError as error:
            return self._fail(error.problem)
        self.problems += problems
        if not isinstance(root.value, dict):
            if root.value is None:
                return self._fail(Problem((), "the file is empty", place=Place(source)))
            kind = "a list" if isinstance(root.value, list) else "a single value"
            message = f"expected a map of sections such as `model:`, got {kind}"
            return self._fail(Problem((), message, place=root.place))
        return self._extend(root, (*chain, real))

    def _extend(self, root: Node, chain: tuple[Path, ...]) -> Node:
        """`root` over the files it names in `extends`, which is taken out."""
        if not isinstance(root.value, dict) or "extends" not in root.value:
            return root
        own = dict(root.value)
        named = own.pop("extends").node
        names = named.value if isinstance(named.value, list) else [named]
        merged = Node({}, root.place)
        for name in names:
            if not isinstance(name.value, str) or not name.value:
                message = "expected the path of a YAML file, or a list of them"
                self._fail(Problem(("extends",), message, place=name.place))
                continue
            base = Path(os.path.normpath(name.place.source.base / os.path.expanduser(name.value)))
            merged = merge(merged, self._file(_short(base), chain, name.place))
        # The place of the top file stands for the whole: what is missing is to be written there.
        return Node(merge(merged, Node(own, root.place)).value, root.place)

    def _override(self, root: Node, override: str) -> Node:
        source = SourceFile(COMMAND_LINE, Path.cwd(), (override,))
        start = Place(source, 1, 1)
        key, equals, value = override.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UnreadableError(Problem((), "expected key.sub=value", "for example rlhf.beta=0.1", place=start))
        if key == "extends":
            raise UnreadableError(Problem((), "`extends` belongs in a file", place=start))
        path: KeyPath = tuple(int(part) if part.isdigit() else part for part in _PART.findall(key))
        root, path = _source_as_map(root, path)
        # Blanks instead of the key, so that columns are those of the argument.
        padded = " " * (len(key) + 1) + value
        new, problems = read_yaml(padded, source, path) if value.strip() else (Node(None, start), [])
        self.problems += problems
        for depth in range(1, len(path)):
            node = get(root, path[:depth])
            if node and isinstance(path[depth], int):
                _check_index(node, path[: depth + 1], start)
            elif node and node.value is not None and not isinstance(node.value, dict):
                way = dotted(path[:depth])
                kind = "a list" if isinstance(node.value, list) else "a value"
                message = f"cannot set {key}: {way} is {kind}, not a map"
                raise UnreadableError(Problem((), message, f"set {way} as a whole", place=start))
        return put(root, path, new, start)


def _source_as_map(root: Node, path: KeyPath) -> tuple[Node, KeyPath]:
    """`data.train: a.jsonl` as `{path: a.jsonl}` where the command line sets an option of it."""
    if path[:1] != ("data",) or len(path) < 3 or path[1] not in ("train", "eval"):
        return root, path
    node = get(root, path[:2])
    if node is not None and isinstance(node.value, (str, dict)) and path[2] == 0:
        path = (*path[:2], *path[3:])  # a lone source is the first
        if len(path) == 2:  # all of it
            return root, path
    holder = path[:3] if isinstance(path[2], int) else path[:2]
    lone = get(root, holder)
    if lone is None or not isinstance(lone.value, str) or len(path) == len(holder):
        return root, path
    return put(root, holder, Node({"path": Entry(lone.place, lone)}, lone.place)), path


def _check_index(node: Node, path: KeyPath, start: Place) -> None:
    """Refuse the position of a list that has less, or of what is no list."""
    way, wanted = dotted(path[:-1]), path[-1]
    if not isinstance(node.value, list):
        message = f"cannot set {dotted(path)}: {way} is no list"
        raise UnreadableError(Problem((), message, "leave the number out", place=start))
    if isinstance(wanted, int) and wanted >= len(node.value):
        message = f"cannot set {dotted(path)}: {way} has {len(node.value)} entries, of which the first is 0"
        raise UnreadableError(Problem((), message, f"set {way} as a whole to add one", place=start))


def _short(path: Path) -> Path:
    """Relative to the current folder where it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_text(path: Path, named_at: Place) -> tuple[str, SourceFile]:
    """The text of a file, whose own problems are reported where it was named."""
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        message = f"cannot read {name}: {(error.strerror or str(error)).lower()}"
        raise UnreadableError(Problem((), message, _other_config(path), place=named_at)) from None
    here = Place(SourceFile(name, path.parent))
    if len(data) > MAX_BYTES:
        raise UnreadableError(Problem((), "larger than 1 MiB, which no config is", place=here))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = Place(here.source, line)
        raise UnreadableError(Problem((), "not UTF-8 text", "save the file as UTF-8", place=place)) from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return text, SourceFile(name, Path(os.path.abspath(path.parent)), lines)


def _other_config(path: Path) -> str:
    """The config that was meant by the name of a folder, or of a file that is not there."""
    with contextlib.suppress(OSError):  # a name that is too long among others
        folder = path if path.is_dir() else path.parent
        found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
        if path.is_dir():
            return f"name the config in it: {', '.join(str(path / name) for name in found[:3])}" if found else ""
        if near := difflib.get_close_matches(path.name, found, 1):
            return f"did you mean {folder / near[0]}?"
    return ""


def from_mapping(data: Mapping[Any, Any], source: SourceFile) -> tuple[Node, list[Problem]]:
    """A mapping given in Python as a tree, under the same rules as a file."""
    problems: list[Problem] = []
    place = Place(source)
    count = 0

    def build(value: Any, path: KeyPath) -> Node:
        nonlocal count
        count += 1
        message = ""
        if len(path) > MAX_DEPTH or count > MAX_NODES:
            message = f"more than {MAX_DEPTH} levels or {MAX_NODES} values"
        elif isinstance(value, Mapping):
            problems.extend(Problem((*path, str(key)), "keys are text") for key in value if not isinstance(key, str))
            pairs = {k: Entry(place, build(v, (*path, k))) for k, v in value.items() if isinstance(k, str)}
            return Node(pairs, place)
        elif isinstance(value, (list, tuple)):
            return Node([build(item, (*path, index)) for index, item in enumerate(value)], place)
        elif isinstance(value, Path):
            return Node(str(value), place)
        elif not isinstance(value, str | bool | int | float | None):
            message = f"expected plain data, got {type(value).__name__}"
        elif not isinstance(value, str | bool | None):
            message = check_number(value)
        if message:
            problems.append(Problem(path, message))
            return Node(Invalid.VALUE, place)
        return Node(value, place)

    return build(data, ()), problems
