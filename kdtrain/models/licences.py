"""The files that a model's licence asks to be passed on with what is made of it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from kdtrain.data.errors import said

_BEGINNINGS = ("license", "licence", "notice", "copying", "use_policy")  # of their names, in capitals or not


def licence_files(model: str, revision: str | None = None) -> tuple[list[Path], str | None]:
    """Those of a model, a folder or an id on the hub; and what to say where they could not be looked at."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            patterns = [f"{way(name)}*" for name in _BEGINNINGS for way in (str.upper, str.lower, str.capitalize)]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        except Exception as error:  # of the network, and of the hub, which have many
            return [], f"The licence of {model} was not copied, it could not be read ({said(error)}): see to it."
    found = (path for path in folder.iterdir() if path.name.lower().startswith(_BEGINNINGS) and path.is_file())
    return sorted(found), None
