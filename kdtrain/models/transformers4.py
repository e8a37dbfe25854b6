"""A saved model folder in the words of transformers 4: servers are often older than trainers.

Only what the folder says is changed, so it is done for the architectures whose weights have the same names in both.

| transformers 5 writes | 4 reads |
|---|---|
| `dtype` | `torch_dtype` |
| `rope_parameters` | `rope_theta`, `rope_scaling`, `partial_rotary_factor`; `rope_local_base_freq` of Gemma 3 |
| `tokenizer_class: TokenizersBackend` | `PreTrainedTokenizerFast` |
| `extra_special_tokens`, a list | `additional_special_tokens` |
| image processor in `processor_config.json` | `preprocessor_config.json` (and `video_preprocessor_config.json`) |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdtrain.config.model_folder import read_map
from kdtrain.errors import NotAvailableError, PreflightError

# Tiny models of these, written by 5.24, load in 4.57.6 with all their weights, and give the same logits (1e-5). Weights
# of some others have other names there, or shapes: 4 would fill them with random numbers.
KNOWN = (
    *("deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "lfm2", "llama"),
    *("mistral", "mixtral", "olmo2", "opt", "phi3", "qwen2", "qwen3", "qwen3_next", "smollm3"),
    *("idefics2", "idefics3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm"),
)
_LAYERS = {"full_attention", "sliding_attention"}


def check_known(model_type: str) -> None:
    """Refuse an architecture of which it is not known that 4 reads its weights."""
    if model_type not in KNOWN:
        raise NotAvailableError(
            f"--transformers 4 of a {model_type} model is not available yet. Leave it out: transformers 5 reads the "
            "folder."
        )


def write_for_transformers_4(folder: Path) -> None:
    """Rewrite the folder's configs in place.

    Raises:
        NotAvailableError: of `check_known`.
        PreflightError: 4 has no words for what the model does.
    """
    config = read_map(folder / "config.json")
    check_known(str(config.get("model_type")))
    _write(folder / "config.json", _model_config(config))
    if tokenizer := read_map(folder / "tokenizer_config.json"):
        _write(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))
    if processor := read_map(folder / "processor_config.json"):
        _split_processor(folder, processor)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_config(config: dict[str, Any]) -> dict[str, Any]:
    found = {name: _model_config(value) if isinstance(value, dict) and name.endswith("_config") else value
             for name, value in config.items()}  # fmt: skip
    if "dtype" in found:
        found["torch_dtype"] = found.pop("dtype")
    rope = found.pop("rope_parameters", None)
    return found if not rope else {**found, **_rope(rope, str(config.get("model_type")))}


def _rope(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Rotary positions as three options; of Gemma 3 those of its local layers as one more."""
    if rope.get("rope_type") == "axial" and rope.get("rope_theta") == 10000.0:
        return {}  # of a vision encoder, where 4 has it in its code
    if not rope.keys() & _LAYERS and rope.get("rope_type") != "longrope":
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        found: dict[str, Any] = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        return {**found, "rope_scaling": None if scaling == {"rope_type": "default"} else scaling}
    local = rope.get("sliding_attention") or {}
    if rope.keys() != _LAYERS or not model_type.startswith("gemma3") or local.get("rope_type") != "default":
        raise PreflightError(
            f"transformers 4 has no words for the rotary positions of this {model_type} model. Leave --transformers 4 "
            "out: transformers 5 reads the folder."
        )
    return {**_rope(rope["full_attention"], model_type), "rope_local_base_freq": local["rope_theta"]}


def _tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in config.items() if name != "backend"}
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def _split_processor(folder: Path, processor: dict[str, Any]) -> None:
    names = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    parts = {part: processor.pop(part) for part in names if isinstance(processor.get(part), dict)}
    for part, config in parts.items():
        kind = str(config.get(f"{part}_type", ""))
        older = kind.removesuffix("Pil") if part == "image_processor" else kind
        _write(
            folder / names[part], {**config, f"{part}_type": older, "processor_class": processor.get("processor_class")}
        )
    _write(folder / "processor_config.json", processor)
