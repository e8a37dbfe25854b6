"""What is wrong with the files of a local model folder, found without torch and without reading a weight: a loader
meets such files late, and says what it stumbled over rather than what the file is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdtrain.config.tree import Problem
from kdtrain.errors import PreflightError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_LFS = b"version https://git-lfs.github.com/spec/"
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors format
# Maps that a loader parses; the large ones (tokenizer.json, vocab.json) are checked for pointers only.
_MAPS = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json", INDEX)
_OTHERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "processor_config.json")

# Importable modules that transformers wants for a way of quantising, as its quantizers say.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "fp_quant": ("fp_quant",),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "quanto": ("optimum",),
    "quark": ("quark",),
    "spqr": ("spqr_quant",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}


def require_sound(folder: Path, whose: str = "model") -> None:
    """Refuse, with the first finding, a folder whose files are not what they should be; other names are let through."""
    for found in findings(folder) if folder.is_dir() else ():
        to_do = f"{found.hint[0].upper()}{found.hint[1:]}"
        raise PreflightError(f"The {whose} {folder} cannot be loaded: {found.message}. {to_do}.")


def findings(folder: Path) -> Iterator[Problem]:
    """What keeps a model folder from being loaded, with empty paths; what depends on a broken file is left out."""
    broken = [finding for name in (*_MAPS, *_OTHERS) if (finding := _broken_file(folder / name, name in _MAPS))]
    yield from broken
    if broken:
        return
    if (folder / ADAPTER_CONFIG).is_file() and weight_files(folder):
        yield _ADAPTER_BESIDE
    yield from (finding for path in weight_files(folder) if (finding := broken_weights(path)))
    yield from _unloadable(read_map(folder / "config.json"))


def has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer or processor that lies in a folder has a chat template, in any of its places."""
    if (folder / "chat_template.jinja").is_file() or (folder / "additional_chat_templates").is_dir():
        return True
    files = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
    return any(read_map(folder / name).get("chat_template") for name in files)


def read_map(path: Path) -> dict[str, Any]:
    """The map in a JSON file; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _broken_file(path: Path, is_map: bool) -> Problem | None:
    """What a text file of a model folder is instead of itself; None also where it is not there."""
    try:
        if not path.is_file():
            return None
        if finding := _no_content(path):
            return finding
        if is_map and not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return _damaged(path, "holds no map")
    except OSError as error:
        return _unreadable(path, error)
    except ValueError as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        return _damaged(path, f"is not valid JSON{where}")
    return None


def _damaged(path: Path, what: str) -> Problem:
    return Problem((), f"{path.name} {what}", "copy or download it again")


def _unreadable(path: Path, error: OSError) -> Problem:
    return Problem((), f"{path.name} cannot be read: {error.strerror}", "check its permissions")


def _no_content(path: Path) -> Problem | None:
    if path.stat().st_size == 0:
        return _damaged(path, "is empty")
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS)) == _LFS
    if is_pointer:
        return Problem(
            (), f"{path.name} is a git-LFS pointer in place of the file", "run git lfs pull in its repository"
        )
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: one, or the shards that the index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    shards = read_map(folder / INDEX).get("weight_map")
    return [folder / name for name in sorted(set(map(str, shards.values())))] if isinstance(shards, dict) else []


def broken_weights(path: Path) -> Problem | None:
    """What a safetensors file is instead of itself; None where it can be read.

    Compares a safetensors file's length with what its header says: eight bytes of length, the header, the data.
    """
    try:
        if not path.is_file():
            return _damaged(path, f"is missing, and {INDEX} names it")
        if finding := _no_content(path):
            return finding
        size = path.stat().st_size
        with path.open("rb") as file:
            begins = file.read(64)
        if len(begins) > 8 and not any(begins[8:]):  # the first eight are a length
            return _damaged(path, "holds zero bytes: a copy, a download or a disk that broke off never wrote it")
        if begins.lstrip().startswith(b"<"):
            return _damaged(path, "is a web page in place of the file, maybe of a login or an error")
        length = int.from_bytes(begins[:8], "little")
        if size < 8 or length > _LARGEST_HEADER:
            return _damaged(path, "is not a safetensors file")
        end = 8 + length
        if end <= size:
            header = read_header(path)
            end += max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except OSError as error:
        return _unreadable(path, error)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return _damaged(path, "is not a safetensors file")
    if size < end:
        return _damaged(path, f"is cut short: it has {size:,} bytes of {end:,}")
    return _damaged(path, f"has {size:,} bytes, and its header speaks of {end:,}") if size > end else None


def read_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors: dtype, shape and place of each; ValueError where it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file")
    return header


# transformers puts an adapter on top of whatever lies beside its config.
_ADAPTER_BESIDE = Problem(
    (),
    f"an adapter ({ADAPTER_CONFIG}) lies beside the weights, and would be put on top of them without a word",
    f"for the weights alone, as after a merge, move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} out of the folder; for "
    "both, merge the adapter into the weights and save the result in a folder of its own",
)


def _unloadable(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What config.json asks for and cannot be had."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        method = _quantization(part)
        missing = [name for name in _PACKAGES.get(method, ()) if importlib.util.find_spec(name) is None]
        if missing:
            packages = " and ".join(name.replace("_", "-") for name in missing)
            are = "is" if len(missing) == 1 else "are"
            message = f"its weights are quantised ({method}), and {packages} {are} not installed"
            yield Problem((), message, f"install {packages}, or name the model before it was quantised")
        pad, size = part.get("pad_token_id"), part.get("vocab_size")
        if isinstance(pad, int) and isinstance(size, int) and pad >= size:
            message = f"config.json says pad_token_id {pad}, beyond the {size} rows of the embedding"
            yield Problem((), message, "set it to the tokenizer's padding token, or to null")


def _quantization(config: Mapping[str, Any]) -> str:
    """The way of quantising that a config names, empty if none."""
    options = config.get("quantization_config")
    if not isinstance(options, dict):
        return ""
    bits = options.get("load_in_8bit") or options.get("load_in_4bit")
    return "bitsandbytes" if bits else str(options.get("quant_method") or "")
