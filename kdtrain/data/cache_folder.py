"""Where data is kept between runs if nobody says where."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import datasets


def default_cache_folder() -> tuple[Path, str]:
    """A folder in the cache of `datasets`; or one for temporary files where that cannot be written, and a note."""
    usual = Path(datasets.config.HF_DATASETS_CACHE) / "kdtrain"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=usual):
            return usual, ""
    except OSError as error:
        folder = _temporary()
        reason = error.strerror or error
        return folder, f"encoded rows are kept in {folder}: {usual} cannot be written ({reason}). Or set cache_dir"


def _temporary() -> Path:
    """The same for all processes of a user, so that they find what the first of them encoded."""
    user = os.getuid() if hasattr(os, "getuid") else 0  # it need not have a name: containers start with any number
    folder = Path(tempfile.gettempdir()) / f"kdtrain-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    foreign = hasattr(os, "getuid") and folder.lstat().st_uid != user
    return Path(tempfile.mkdtemp(prefix="kdtrain-")) if foreign else folder
