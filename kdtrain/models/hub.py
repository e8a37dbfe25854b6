"""Whether a model of the hub can be had, asked once before anything is downloaded.

Loaders ask for one file after the other, six times each where nobody answers, and then say that they found nothing.
"""

from __future__ import annotations

import os
from functools import lru_cache

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kdtrain.data.errors import said
from kdtrain.errors import PreflightError

_FILE = "config.json"
_SECONDS = 10


@lru_cache
def require_model(name: str, revision: str | None = None) -> None:
    """Refuse a hub id that is neither in the cache nor to be had; folders are let through.

    Raises:
        PreflightError: with the reason, and where the model may be instead.
    """
    if os.path.isabs(name) or is_here(name, revision):
        return
    where = f"The model {name} is not in the cache ({constants.HF_HUB_CACHE})"
    folder = f" If it is a folder, write its path: ./{name}."
    download = f"Download it where there is a network, hf download {name}, and take the cache along."
    if is_offline_mode():
        raise PreflightError(
            f"{where}, and HF_HUB_OFFLINE is set. Unset it, or d{download[1:]}{_licence(name)}{folder}"
        )
    try:
        _ask(name, revision)
    except GatedRepoError as error:
        raise PreflightError(
            f"The model {name} is gated. Accept its licence on {constants.ENDPOINT}/{name}, and then log in by hf auth "
            "login, or set the environment variable HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise PreflightError(
            f"There is no model {name} on {constants.ENDPOINT} that this user may read. Check its name; for a private "
            f"one log in by hf auth login, or set HF_TOKEN.{folder}"
        ) from error
    except RevisionNotFoundError as error:
        raise PreflightError(f"The model {name} has no revision {revision}. Correct the revision.") from error
    except EntryNotFoundError:
        return  # what it holds instead is said by the loader
    except Exception as error:  # of httpx, of sockets, of proxies
        raise PreflightError(
            f"{where}, and {constants.ENDPOINT} cannot be reached: {said(error)}. {download} Behind a mirror set "
            f"HF_ENDPOINT.{folder}"
        ) from error


def is_here(name: str, revision: str | None = None) -> bool:
    """Whether a model is a folder, or in the cache of the hub."""
    if os.path.isdir(name):
        return True
    if os.path.isabs(name):
        return False
    return isinstance(try_to_load_from_cache(name, _FILE, revision=revision or "main"), str)


def _ask(name: str, revision: str | None) -> None:
    """One request, and a second one where nobody answers: a connection may fail once."""
    url = hf_hub_url(name, _FILE, revision=revision, endpoint=constants.ENDPOINT)
    try:
        get_hf_file_metadata(url, timeout=_SECONDS)
    except httpx2.TransportError:
        get_hf_file_metadata(url, timeout=_SECONDS)


def _licence(name: str) -> str:
    return f" (A gated model also wants its licence accepted on {constants.ENDPOINT}/{name}, and HF_TOKEN.)"
