"""Model folders in a form that is not read: which form it is, and the way out of it."""

from __future__ import annotations

from pathlib import Path

from kdtrain.config.model_folder import INDEX, WEIGHTS

_CONVERT = "from transformers import AutoModelForCausalLM as M; M.from_pretrained({0!r}).save_pretrained({0!r})"


def without_weights(folder: Path) -> tuple[str, str]:
    """Message and hint about a folder with a config.json and without weights in safetensors."""
    if found := _other_form(folder):
        return found
    message = f"has no weights, neither {WEIGHTS} nor {INDEX}: {folder}"
    if shards := _first(folder, "model-*-of-*.safetensors"):
        return f"has shards ({shards}) and no {INDEX}: {folder}", f"copy or download {INDEX} too"
    return message, "copy or download them too, or save the model there by save_pretrained"


def without_config(folder: Path) -> tuple[str, str]:
    """Message and hint about a folder that is no model's."""
    message = f"not a model folder, it has no config.json: {folder}"
    places = (f"{depth}/{file}" for depth in ("*", "snapshots/*") for file in ("config.json", "adapter_config.json"))
    inner = sorted({str(file.parent) for place in places for file in folder.glob(place)})
    if inner:
        return message, f"name the folder in it that has one: {', '.join(inner[:3])}"
    return _other_form(folder) or (message, "give a model folder or a hub id")


def _other_form(folder: Path) -> tuple[str, str] | None:
    if name := _first(folder, "*.gguf"):
        hint = "give the folder or hub id of the model that it was converted from"
        return f"holds its weights as GGUF ({name}), which is for llama.cpp and cannot be trained: {folder}", hint
    if name := _first(folder, "consolidated*"):
        hint = "download the files of the same model for transformers: config.json, model*.safetensors, the tokenizer"
        return f"holds its weights in the layout of their authors ({name}): {folder}", hint
    if name := _first(folder, "pytorch_model*.bin") or _first(folder, "*.pt") or _first(folder, "*.pth"):
        hint = f'write safetensors once, if you trust the file: python -c "{_CONVERT.format(str(folder))}"'
        return f"has no safetensors, only pickled weights ({name}), which can run code when read: {folder}", hint
    return None


def _first(folder: Path, pattern: str) -> str:
    """The name of the first file that matches; empty if none does."""
    return min((file.name for file in folder.glob(pattern)), default="")
