"""Which values are paths, and what they are relative to: the file that names them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from kdtrain.config.diagnose import describe
from kdtrain.config.tree import KeyPath, Node, Problem, get, put

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # of a model or a data set
_DATA_SUFFIXES = {".json", ".jsonl", ".parquet", ".csv", ".arrow"}

_MODELS: tuple[KeyPath, ...] = (("model", "model"), ("rlhf", "teacher_model"), ("rlhf", "teacher", "adapter"))
_PATHS: tuple[KeyPath, ...] = (
    ("training", "output_dir"),
    ("data", "image_root"),
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
        text, base = node.value, node.place.source.base
        if _URL.match(text):
            message = "an address, and nothing is downloaded from addresses"
            problems.append(Problem(path, message, "download it, and name the file or folder"))
            continue
        is_hub_id, local = bool(_HUB_ID.fullmatch(text)), _looks_local(text, base)
        if path in _MODELS:
            if not local and not is_hub_id:
                message = f"{describe(text)} is neither a folder below {base} nor a hub id"
                problems.append(Problem(path, message, "write ./name, or org/name"))
        elif path in _PATHS:
            local = not text.startswith("{")  # JSON in a string
        else:  # existence is left to the preflight: data is often made after the config is written
            local = local or Path(text).suffix in _DATA_SUFFIXES or not is_hub_id
        if local:
            root = put(root, path, Node(os.path.abspath(base / os.path.expanduser(text)), node.place))
    return root, problems


def _data_paths(root: Node) -> Iterator[KeyPath]:
    """Where data sources name their path: a lone text, a map, or a list of either."""
    for name in ("train", "eval"):
        node = get(root, ("data", name))
        items = node.value if node and isinstance(node.value, list) else [node] if node else []
        for index, item in enumerate(items):
            yield ("data", name, index, "path") if isinstance(item.value, dict) else ("data", name, index)


def _looks_local(text: str, base: Path) -> bool:
    """Written as a path, or there is something of that name beside the file that names it."""
    if text in (".", "..", "~") or text.startswith(("/", "~/", "./", "../")):
        return True
    try:
        return (base / text).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False
