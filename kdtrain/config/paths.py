"""Which values are paths, and what they are relative to: the file that names them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kdtrain.config.diagnose import describe
from kdtrain.config.model_folder import is_hub_id
from kdtrain.config.tree import KeyPath, Node, Problem, get, replace

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_SUFFIXES = {".json", ".jsonl", ".parquet", ".csv", ".arrow"}

_MODELS: tuple[KeyPath, ...] = (("model", "model"), ("rlhf", "teacher_model"), ("rlhf", "teacher", "adapter"))
_PATHS: tuple[KeyPath, ...] = (
    ("training", "output_dir"),
    ("training", "deepspeed"),
    ("training", "fsdp_config"),
    ("training", "accelerator_config"),
    ("launch", "config_file"),
    ("rlhf", "teacher", "path"),
    ("rlhf", "teacher", "prefix"),
)


def resolve_paths(root: Node) -> tuple[Node, list[Problem]]:
    """A copy of the tree with absolute local paths; hub ids stay as they are."""
    problems: list[Problem] = []
    for path in (*_MODELS, *_PATHS, *_data_paths(root)):
        node = get(root, path)
        if node is None or not isinstance(node.value, str) or not node.value:
            continue
        resolved: str | None = None
        if message := _refused(node.value):
            problems.append(Problem(path, message, "download it, and name the file or folder"))
        elif path in _MODELS:
            resolved = _model(node)
            if resolved is None:
                problems.append(Problem(path, *_neither(node)))
        elif path in _PATHS:
            resolved = node.value if node.value.startswith("{") else _absolute(node)  # JSON in a string
        else:
            resolved = _data(node)
        if resolved is not None and resolved != node.value:
            root = replace(root, path, Node(resolved, node.place))
    return root, problems


def _data_paths(root: Node) -> list[KeyPath]:
    """Where data sources name their path: a lone text, a map, or a list of either."""
    found: list[KeyPath] = []
    for name in ("train", "eval"):
        node = get(root, ("data", name))
        items = node.value if node and isinstance(node.value, list) else [node] if node else []
        for index, item in enumerate(items):
            found.append(("data", name, index, "path") if isinstance(item.value, dict) else ("data", name, index))
    return found


def _refused(text: str) -> str:
    return "an address, and nothing is downloaded from addresses" if _URL.match(text) else ""


def _absolute(node: Node) -> str:
    assert isinstance(node.value, str)
    return os.path.abspath(node.place.source.base / os.path.expanduser(node.value))


def _looks_local(node: Node) -> bool:
    """Written as a path, or there is something of that name beside the file that names it."""
    text = str(node.value)
    if text in (".", "..", "~") or text.startswith(("/", "~/", "./", "../")):
        return True
    try:
        return (node.place.source.base / text).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def _model(node: Node) -> str | None:
    """An absolute folder, a hub id, or None where it is neither."""
    text = str(node.value)
    if _looks_local(node):
        return _absolute(node)
    return text if is_hub_id(text) else None


def _neither(node: Node) -> tuple[str, str]:
    base = node.place.source.base
    return f"{describe(node.value)} is neither a folder below {base} nor a hub id", "write ./name, or org/name"


def _data(node: Node) -> str:
    """Existence is left to the preflight: data is often made after the config is written."""
    text = str(node.value)
    local = _looks_local(node) or Path(text).suffix in _DATA_SUFFIXES or not is_hub_id(text)
    return _absolute(node) if local else text
