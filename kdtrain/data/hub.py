"""Data sets of the hub, and what looks like the id of one and is not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from kdtrain.data.errors import said, show, suggestion
from kdtrain.data.files import PACKED, SUFFIXES, UNSAFE
from kdtrain.errors import DataError

_WITH_SPLIT = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?P<sign>[:@])(?P<rest>[^/]+)")


def load_from_hub(name: str, config: str | None, split: str) -> Any:
    """A split of a data set that is in the cache or on the hub.

    Raises:
        DataError: the name is no id, or the data set cannot be loaded.
    """
    _check_id(name)
    with _readable(name):
        once = datasets.DownloadConfig(max_retries=1)
        return datasets.load_dataset(name, config, split=split, download_config=once)


def stream_from_hub(name: str, config: str | None, split: str) -> tuple[Any, str]:
    """A split of a data set of the hub, which is read while it is used; and its version.

    Raises:
        DataError: the name is no id, or the data set cannot be found.
    """
    _check_id(name)
    with _readable(name):
        builder = datasets.load_dataset_builder(name, config, download_config=datasets.DownloadConfig(max_retries=1))
        return builder.as_streaming_dataset(split=split), str(builder.hash)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = said(error)
        raise DataError(
            f"cannot load the data set {show(name)} from the hub: {reason}. If it should be a local file or folder, "
            f"give its path, ./{show(name)}. Without a network, put it into the cache first and set HF_HUB_OFFLINE=1; "
            "behind a mirror set HF_ENDPOINT"
        ) from error


def _check_id(name: str) -> None:
    """Refuses what is no `name` or `organisation/name`, and says what it is likely meant to be."""
    path = Path(name)
    if "://" in name:
        raise DataError(
            f"{show(name)} is an address, and nothing is downloaded from addresses: download it and name the file or "
            "folder, or give the id of a data set on the hub, such as org/name"
        )
    if (found := _WITH_SPLIT.fullmatch(name)) and not os.path.isdir(path.parent):
        what = "split" if found["sign"] == ":" else "revision"
        do = (
            f"write {{path: {found['id']}, split: {found['rest']}}}" if what == "split" else "clone it at that revision"
        )
        raise DataError(
            f"{show(name)} is not the id of a data set on the hub: it has a {what} behind it. For that, {do}"
        )
    file_like = path.suffix.lower() in (*PACKED, *SUFFIXES, *UNSAFE)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or file_like:
        siblings = [f.name for f in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise DataError(f"no such file or folder: {show(name, 400)}{suggestion(path.name, siblings)}")
