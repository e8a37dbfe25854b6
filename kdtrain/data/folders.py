"""Which files a folder or a pattern means: files by split, a cloned data set, its configurations, folders of splits."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kdtrain.data.errors import show
from kdtrain.data.files import FORMATS, SUFFIXES, kind_of
from kdtrain.data.splits import (
    DEFAULT_SPLIT,
    EVERY_SPLIT,
    choose,
    is_split_name,
    listed,
    same_split,
    splits_named,
)
from kdtrain.errors import DataError

# What tools leave beside the data, with endings of data.
_NOT_DATA = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
    "croissant.json",
}


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved it (LLaMA-Factory has a dataset_info.json of its own)."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def files_in(folder: Path, name: str | None, split: str) -> list[Path]:
    """The data files of a folder for a configuration and split, in order.

    A README that says which they are (`configs` of the hub) is followed; else the files that lie in the folder itself
    count, or in its `data`, its only folder, or folders with the names of splits.

    Raises:
        DataError: there are none, or it cannot be told which are meant.
    """
    if configs := _configs(folder):
        described = _described(folder, _config(folder, configs, name), split)
        if described is not None:
            return described
    elif name is not None and name != "default":
        folder = _named(folder, name)
    own = _data_files(folder)
    return choose(own, split, folder) if own else _files_below(folder, split)


def files_matching(pattern: str, split: str) -> list[Path]:
    """The files that a pattern such as `data/*.jsonl` matches, in order; with another split than the default one, those
    of them that are of it.

    Raises:
        DataError: there are none, or they are of several splits and none was asked for.
    """
    matching = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
    files = [file for file in matching if _is_data(file)] or matching
    if not files:
        raise DataError(f"no file matches {show(pattern, 400)}")
    root = Path(os.path.commonpath([file.parent for file in files]))
    if split not in (DEFAULT_SPLIT, EVERY_SPLIT):
        return choose(files, split, root)
    named = {splits_named(file, root) for file in files}
    if split == DEFAULT_SPLIT and len(named) > 1 and any(splits - {DEFAULT_SPLIT} for splits in named):
        raise DataError(
            f"{show(pattern, 400)} matches several splits: {listed(files, root)}. Narrow it, or set split: all reads "
            "all of them"
        )
    return files


def unread_files(folder: Path, name: str | None, split: str) -> list[Path]:
    """Data files that lie beside those of a split and whose names say no split, or several: nothing reads them."""
    if _configs(folder):
        return []  # the README knows whose they are
    chosen = files_in(folder, name, split)
    beside = {file for parent in {file.parent for file in chosen} for file in _data_files(parent)}
    return sorted(file for file in beside.difference(chosen) if len(splits_named(file, file.parent)) != 1)


def _is_data(file: Path) -> bool:
    return kind_of(file) in SUFFIXES and not file.name.startswith(".") and file.name not in _NOT_DATA


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and _is_data(file))


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder that have data somewhere."""
    return [inner for inner in _visible(folder) if next(_deep(inner, (os.path.realpath(folder),)), None)]


def _visible(folder: Path) -> list[Path]:
    """The folders in a folder; hidden ones (.git, .cache, __MACOSX) are another program's."""
    return sorted(inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith((".", "__")))


def _deep(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The data files of a folder and all below; a link to a folder above is not followed."""
    real = os.path.realpath(folder)
    if real not in above:
        yield from _data_files(folder)
        for inner in _visible(folder):
            yield from _deep(inner, (*above, real))


def _files_below(folder: Path, split: str) -> list[Path]:
    """The files of a folder that has folders only."""
    inner = _folders(folder)
    if not inner:
        raise DataError(f"{show(str(folder), 400)} has no data files. Use {FORMATS}")
    if folder / "data" in inner:
        return files_in(folder / "data", None, split)
    if any(is_split_name(each.name) or same_split(each.name, split) for each in inner):
        above = (os.path.realpath(folder),)
        return choose([file for each in inner for file in _deep(each, above)], split, folder)
    if len(inner) == 1:
        return files_in(inner[0], None, split)
    names = ", ".join(show(each.name, 40) for each in inner)
    raise DataError(
        f"{show(str(folder), 400)} has no data files itself, but its folders {names} have: set name to one of them, or "
        "path to a pattern such as FOLDER/**/*.jsonl"
    )


def _named(folder: Path, name: str) -> Path:
    """The folder of a configuration."""
    for parent in (folder, folder / "data"):
        if name not in (".", "..") and (parent / name).is_dir():
            return parent / name
    found = [inner.name for parent in (folder, folder / "data") if parent.is_dir() for inner in _folders(parent)]
    has = f"its folders are {', '.join(show(one, 40) for one in found)}" if found else "it has no folders with data"
    raise DataError(f"{show(str(folder), 400)} has no configuration {show(name)}: {has}")


def _configs(folder: Path) -> list[Mapping[str, Any]]:
    """What the head of a data set's README says about its files, on the hub and in clones."""
    try:
        text = (folder / "README.md").read_text("utf-8")
        head = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---")) if text.startswith("---\n") else None
    except (OSError, ValueError, yaml.YAMLError):
        return []
    configs = head.get("configs") if isinstance(head, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _config(folder: Path, configs: list[Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    names = [str(config.get("config_name", "default")) for config in configs]
    default = next((n for n, config in zip(names, configs, strict=True) if config.get("default")), "default")
    wanted = name or (names[0] if len(names) == 1 else default)
    if wanted in names:
        return configs[names.index(wanted)]
    listed_names = ", ".join(show(one, 40) for one in names)
    what = f"has no configuration {show(wanted)}, but" if name else "has the configurations"
    raise DataError(f"{show(str(folder), 400)} {what} {listed_names}: set name to one of them")


def _described(folder: Path, config: Mapping[str, Any], split: str) -> list[Path] | None:
    """The files that a configuration names; None where it names none."""
    data_dir, data_files = str(config.get("data_dir", "")), config.get("data_files")
    root = folder / data_dir
    if data_files is None:
        return files_in(root, None, split) if data_dir and root.is_dir() and root != folder else None
    by_split = _by_split(data_files)
    if list(by_split) == [None]:
        return choose(_expand(folder, root, by_split[None]), split, folder)
    chosen = [name for name in by_split if name and (split in (name, EVERY_SPLIT) or same_split(name, split))]
    if not chosen:
        names = ", ".join(show(str(name), 40) for name in by_split)
        raise DataError(f"{show(str(folder), 400)} has no split {show(split)}: its README names {names}")
    exact = [split] if split in chosen else chosen
    return [file for name in exact for file in _expand(folder, root, by_split[name])]


def _by_split(data_files: Any) -> dict[str | None, list[str]]:
    """`data_files` in each of its forms, as patterns by split; without splits below None."""
    if isinstance(data_files, dict):
        return {str(split): _patterns(paths) for split, paths in data_files.items()}
    if isinstance(data_files, list) and data_files and isinstance(data_files[0], dict):
        return {str(one.get("split", DEFAULT_SPLIT)): _patterns(one.get("path")) for one in data_files}
    return {None: _patterns(data_files)}


def _patterns(paths: Any) -> list[str]:
    return [str(path) for path in (paths if isinstance(paths, list) else [paths])]


def _expand(folder: Path, root: Path, patterns: list[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        if os.path.isabs(pattern) or ".." in Path(pattern).parts or "://" in pattern:
            raise DataError(f"{show(str(folder), 400)}: its README names {show(pattern)}, which is not in the folder")
        names = sorted(glob.glob(str(root / pattern), recursive=True))
        found += [Path(name) for name in names if os.path.isfile(name) and Path(name) not in found]
    if not found:
        named = ", ".join(show(pattern, 60) for pattern in patterns)
        raise DataError(
            f"{show(str(folder), 400)}: there is no file {named}, which its README names. Was all of it downloaded?"
        )
    return found
