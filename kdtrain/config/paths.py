"""Which values are paths, and what they are relative to: the file that names them."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kdtrain.config.diagnose import describe
from kdtrain.config.launching import BUILT_IN
from kdtrain.config.schema import is_share
from kdtrain.config.tree import KeyPath, Node, Problem, get, put

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # of a model or a data set
_WITH_MORE = re.compile(rf"(?P<id>{_HUB_ID.pattern})(?P<sign>[:@])(?P<rest>[^/]+)")
_WITH_SLICE = re.compile(r"(?P<path>.+)(?P<slice>\[-?\d*%?:-?\d*%?\])")
_DATA_SUFFIXES = {
    ".json",
    ".jsonl",
    ".ndjson",
    ".parquet",
    ".csv",
    ".tsv",
    ".arrow",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".zip",
}
_DATA_FOLDERS = ("data", "dataset", "datasets")  # nobody's name on the hub
_MODEL_FOLDERS = (
    "model", "models", "checkpoint", "checkpoints", "ckpt", "ckpts", "run", "runs", "output", "outputs", "out",
    "results", "weights", "saved", "student", "students", "teacher", "teachers", "llm", "llms",
)  # fmt: skip

_MODELS: tuple[KeyPath, ...] = (
    ("model", "model"),
    ("model", "adapter"),
    ("rlhf", "teacher_model"),
    ("rlhf", "teacher", "adapter"),
)
_PATHS: tuple[KeyPath, ...] = (
    ("training", "output_dir"),
    ("data", "image_root"),
    ("training", "deepspeed"),
    ("training", "fsdp_config"),
    ("training", "accelerator_config"),
    ("launch", "config_file"),
    ("data", "cache_dir"),
    ("rlhf", "teacher", "path"),
)


def resolve_paths(root: Node) -> tuple[Node, list[Problem]]:
    """A copy of the tree with absolute local paths; hub ids stay as they are."""
    problems: list[Problem] = []
    several = list(_several_teachers(root))
    models, paths = (
        (*_MODELS, *(path for path, is_model in several if is_model)),
        (*_PATHS, *(p for p, m in several if not m)),
    )
    for path in (*models, *paths, *_data_paths(root)):
        node = get(root, path)
        if node is None or not isinstance(node.value, str) or not node.value:
            continue
        text, base = node.value, node.place.source.base
        if unusable := _no_name(text):
            problems.append(Problem(path, *unusable))
            # Something that leads to no other error.
            root = put(root, path, Node(None if path in paths[1:] else "unnamed", node.place))
            continue
        if _URL.match(text):
            message = "an address, and nothing is downloaded from addresses"
            also = ", or give its id on the hub: org/name" if path[0] in ("data", "model") else ""
            problems.append(Problem(path, message, f"download it, and name the file or folder{also}"))
            continue
        is_hub_id, local = bool(_HUB_ID.fullmatch(text)), _looks_local(text, base)
        if path in models:
            local = local or (is_hub_id and "/" in text and text.partition("/")[0] in _MODEL_FOLDERS)
            problems += _perhaps_folder(path, text, base) if is_hub_id and not local else ()
            if not local and not is_hub_id:
                message = f"{describe(text)} is neither a folder below {base} nor a hub id"
                problems.append(Problem(path, message, "write ./name, or org/name"))
        elif path in paths:
            # JSON in a string, or a file that comes with kdtrain.
            local = not text.startswith("{") and not (path == ("launch", "config_file") and text in BUILT_IN)
        elif is_share(text):
            continue
        else:  # existence is left to the preflight: data is often made after the config is written
            local = _is_local_data(text, base)
            problems += _unlikely_id(path, text, base, local)
        if local:
            root = put(root, path, Node(os.path.abspath(base / os.path.expanduser(text)), node.place))
    return root, problems


def _is_local_data(text: str, base: Path) -> bool:
    is_hub_id, has_suffix = _HUB_ID.fullmatch(text), Path(text).suffix.lower() in _DATA_SUFFIXES
    return _looks_local(text, base) or has_suffix or not is_hub_id or _names_a_folder(text)


def _several_teachers(root: Node) -> Iterator[tuple[KeyPath, bool]]:
    """What each of several teachers names, and whether that is a model."""
    node = get(root, ("rlhf", "teachers"))
    for name, entry in node.value.items() if node and isinstance(node.value, dict) else ():
        below = ("rlhf", "teachers", name)
        yield (*below, "teacher_model"), True
        yield (*below, "adapter"), True
        yield (*below, "path"), False
        backend = get(entry.node, ("backend",))
        if backend is None or backend.value == "hf":  # of a server it is a name
            yield (*below, "model"), True


def _data_paths(root: Node) -> Iterator[KeyPath]:
    """Where data sources name their path: a lone text, a map, or a list of either."""
    for name in ("train", "eval"):
        node = get(root, ("data", name))
        items = node.value if node and isinstance(node.value, list) else [node] if node else []
        for index, item in enumerate(items):
            yield ("data", name, index, "path") if isinstance(item.value, dict) else ("data", name, index)


_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of the file systems that there are


def _no_name(text: str) -> tuple[str, str] | None:
    """Why no file can have this name, and what to do; None where one can."""
    if "\0" in text:
        return "holds a NUL character, which no name of a file can", "remove it"
    encoded = os.fsencode(text) if not text.startswith("{") else b""
    longest = max(map(len, encoded.split(b"/")))
    if longest > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        size, most = (longest, _LONGEST_NAME) if longest > _LONGEST_NAME else (len(encoded), _LONGEST_PATH)
        return f"too long for a file system: {size:,} bytes, and {most:,} are the most", "give it a shorter name"
    return None


def _names_a_folder(text: str) -> bool:
    return text.partition("/")[0] in _DATA_FOLDERS


def _perhaps_folder(path: KeyPath, text: str, base: Path) -> Iterator[Problem]:
    """A hub id that is more likely the name of a folder beside the config, misspelt."""
    above, name = (base / text).parent, Path(text).name
    near = []
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in above.iterdir() if entry.is_dir()) if above.is_dir() else []
        near = difflib.get_close_matches(name, names, n=1)
    if near or ("/" in text and above.is_dir()):
        where = str(Path(text).parent / near[0]) if near else text
        hint = f"did you mean ./{where}?" if near else f"write ./{where} for a folder"
        message = f"looked up on the hub, for there is no folder {base / text}"
        yield Problem(path, message, hint, level="warning")


def _unlikely_id(path: KeyPath, text: str, base: Path, local: bool) -> Iterator[Problem]:
    """What has the form of a data set's id and something behind it, or is more likely a folder that is missing."""
    if (found := _WITH_SLICE.fullmatch(text)) and not os.path.exists(base / text):
        named = f"write {{path: {found['path']}, split: train{found['slice']}}}"
        yield Problem(path, "a slice belongs to the split, not to the path", named)
    elif (found := _WITH_MORE.fullmatch(text)) and not _looks_local(text, base):
        what, do = "revision", f"clone {found['id']} at that revision, and name the folder"
        if found["sign"] == ":":
            what, do = "split", f"write {{path: {found['id']}, split: {found['rest']}}}"
        yield Problem(path, f"no id of a data set on the hub: it has a {what} behind it", do)
    elif not local and "/" in text and os.path.isdir((base / text).parent):
        message = f"looked up on the hub, for the folder {text.partition('/')[0]} has no {text.partition('/')[2]}"
        yield Problem(path, message, f"write ./{text} for a folder", level="warning")


def _looks_local(text: str, base: Path) -> bool:
    """Written as a path, or there is something of that name beside the file that names it."""
    if text in (".", "..", "~") or text.startswith(("/", "~/", "./", "../")):
        return True
    try:
        return (base / text).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False
