"""The files that a model's licence asks to be passed on with what is made of it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from kdtrain.data.errors import said

_NAMES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


def licence_files(model: str) -> tuple[list[Path], str | None]:
    """Those of a model, a folder or an id on the hub; and what to say where they could not be looked at."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, allow_patterns=list(_NAMES)))
        except Exception as error:  # of the network, and of the hub, which have many
            return [], f"The licence of {model} was not copied, it could not be read ({said(error)}): see to it."
    return sorted(path for name in _NAMES for path in folder.glob(name) if path.is_file()), None
