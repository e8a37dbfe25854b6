"""What the targets of a run depend on, in the words of its config: what a cache is made from, and is compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config import RunConfig
from kdtrain.config.adapters import adapter_base, is_adapter_folder, nearest_with
from kdtrain.config.folders import has_tokenizer
from kdtrain.data.multimodal import image_content, reads_images, tokenizer_content
from kdtrain.errors import PreflightError
from kdtrain.models.hub import is_here
from kdtrain.models.processing import load_tokenizer
from kdtrain.teachers.cached.manifest import identified

NONE = "none"
DTYPE = "rlhf.teacher.dtype"
# Arguments of `from_pretrained` that say where and how fast it runs, and the one that has a line of its own.
_NOT_COMPARED = ("dtype", "torch_dtype", "attn_implementation", "device_map")
_BLOCK = 1 << 24


def made_from(
    config: RunConfig,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    dtype: str | None = None,
    precision: str | None = None,
    drawn: bool = False,
    like: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`Manifest.made_from` of a config, but for the rows.

    What is not known is left out, and so not compared. A run from a cache (`backend: cache`) need not have the teacher:
    its folder may be gone, `rlhf.teacher_model` may be empty, and which backend wrote the cache is not in its config.
    Not compared either: how a server is reached, `rlhf.teacher.top_k`, devices, kernels of attention, the training.

    Args:
        config: of the command that writes a cache, or of a run that trains from one.
        processing: the student's tokenizer or processor, which encodes the rows of both models.
        dtype: of the teacher's weights, once they are loaded; None is what the config says, unless that is `auto`.
        precision: mixed precision of its forward, where a cache is written: "no", "bf16" or "fp16".
        drawn: whether the targets are drawn (`--mode sample`), which `rlhf.kd_temperature` is a part of.
        like: `made_from` of a cache: nothing else is found out then. The files of models are read whole for it.
    """
    facts = {**_of_text(config, processing), **_of_teacher(config, dtype), "mixed precision": lambda: precision}
    if drawn or like is not None:
        facts["rlhf.kd_temperature"] = lambda: config.rlhf.kd_temperature
    if like is not None:  # of imported targets that are normalised over the tokens they name alone
        facts["rlhf.teacher.tail"] = lambda: config.rlhf.teacher.tail
    found = {what: fact() for what, fact in facts.items() if like is None or what in like}
    return {what: value for what, value in found.items() if value is not None}


def made_from_text(config: RunConfig, processing: PreTrainedTokenizerBase | ProcessorMixin) -> dict[str, Any]:
    """The part of it that says what the teacher reads: of targets whose teacher is not known."""
    found = {what: fact() for what, fact in _of_text(config, processing).items()}
    return {what: value for what, value in found.items() if value is not None}


def _of_text(config: RunConfig, processing: Any) -> dict[str, Callable[[], Any]]:
    data, tokenizer = config.data, getattr(processing, "tokenizer", processing)
    cut = data.max_length if data.on_overlength == "truncate" else NONE
    return {
        "tokenizer": lambda: _tokenizer(tokenizer),
        "chat template": lambda: _template(processing.chat_template or tokenizer.chat_template),
        "image processor": lambda: (
            identified(type(processing.image_processor).__name__, _hash(image_content(processing)))
            if reads_images(processing)
            else NONE
        ),
        "data.chat_template_kwargs": lambda: _text(data.chat_template_kwargs),
        "rlhf.teacher.chat_template_kwargs": lambda: _text(config.rlhf.teacher.chat_template_kwargs),
        **{f"data.{name}": partial(getattr, data, name) for name in _HOW_ENCODED},
        "data.max_length that rows are cut at (data.on_overlength: truncate)": lambda: cut,
        "rlhf.max_new_tokens (answers: teacher)": lambda: (
            config.rlhf.most_new_tokens if config.answers_from_teacher else NONE
        ),
        "rlhf.teacher.prefix": lambda: _prefix(config.rlhf.teacher.prefix),
        "rlhf.teacher.prefix_mode": lambda: config.rlhf.teacher.prefix_mode if config.rlhf.teacher.prefix else NONE,
    }


_HOW_ENCODED = ("train_on", "turns", "reasoning", "control_tokens")


def _of_teacher(config: RunConfig, dtype: str | None) -> dict[str, Callable[[], Any]]:
    """Of the backend that asks a teacher what is its own; of `cache`, what may be known of any of them."""
    rlhf, options = config.rlhf, config.rlhf.teacher
    backend, given = options.backend, rlhf.teacher_model_init_kwargs or {}
    said = str(given.get("dtype") or given.get("torch_dtype") or options.dtype).removeprefix("torch.")
    of_model: dict[str, Callable[[], Any]] = {
        "teacher (rlhf.teacher_model)": lambda: rlhf.teacher_model and _model(rlhf.teacher_model, options.revision),
        "rlhf.teacher.adapter": lambda: _model(options.adapter) if options.adapter else NONE,
        "rlhf.teacher.quantization": lambda: options.quantization or NONE,
        "rlhf.teacher_model_init_kwargs": lambda: _text(_compared(given)),
        "rlhf.teacher.processor_kwargs": lambda: (
            "data.processor_kwargs" if options.processor_kwargs is None else _text(options.processor_kwargs)
        ),
    }
    of_server: dict[str, Callable[[], Any]] = {"model of the server (rlhf.teacher.model)": lambda: options.model}
    of_self: dict[str, Callable[[], Any]] = {
        "student that is its own teacher (model.model)": lambda: _model(config.model.model, config.model.revision),
        "model.quantization": lambda: config.model.quantization or NONE,
        "model.init_kwargs": lambda: _text(_compared(config.model.init_kwargs)),
        "rlhf.teacher.weights": lambda: options.weights,
    }
    loaded: dict[str, Callable[[], Any]] = {DTYPE: lambda: dtype or (said if said != "auto" else None)}
    # Of a teacher with another tokenizer, which its server does not name.
    of_tokens: dict[str, Callable[[], Any]] = {
        "tokenizer of the teacher (rlhf.teacher_model)": lambda: _of_tokenizer(config, _tokenizer),
        "chat template of the teacher (rlhf.teacher_model)": lambda: _of_tokenizer(
            config, lambda own: _template(own.chat_template)
        ),
    }
    return {
        "hf": {**of_model, **of_tokens, **loaded},
        "vllm": {**of_server, **of_tokens},
        "openai": {**of_server, **of_tokens},
        "self": {**of_self, **loaded},
        "cache": {**of_model, **of_tokens, **of_server, **of_self, **loaded},
    }[backend]


def _of_tokenizer(config: RunConfig, fact: Callable[[Any], Any]) -> Any:
    """A fact of the tokenizer of a teacher that has another one; None where it is not on this machine."""
    name, revision = config.rlhf.teacher_model, config.rlhf.teacher.revision
    if name is None or not config.options.crosses_tokenizers or not is_here(name, revision):
        return None
    try:
        folder = Path(nearest_with(name, "tokenizer_config.json"))
        if folder.is_dir() and not has_tokenizer(folder):
            return None
        return fact(load_tokenizer(name, trust_remote_code=config.model.trust_remote_code, revision=revision))
    except PreflightError:
        return None


def _compared(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in init_kwargs.items() if name not in _NOT_COMPARED}


def _tokenizer(tokenizer: Any) -> dict[str, str]:
    name = f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens"
    return identified(name, _hash(tokenizer_content(tokenizer)))


def _template(template: str | None) -> Any:
    return NONE if not template else identified(f"{len(template):,} characters", _hash(template))


def _prefix(prefix: Any) -> Any:
    """By its messages. What a column says is a part of the rows, by which targets are found."""
    if isinstance(prefix, Mapping):
        return f"column {prefix['column']}" if not prefix.get("default") else identified(_text(prefix), _hash(prefix))
    return identified(_text(prefix), _hash(prefix)) if prefix else NONE


def _model(name: str, revision: str | None = None) -> dict[str, str] | None:
    """A folder by the content of its config and weights, its base's too where it is an adapter; a hub id by its name.

    None: a folder that is not there.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None if folder.is_absolute() else identified(name, f"hub {name}@{revision or 'main'}")
    files = [
        folder / "config.json",
        folder / "adapter_config.json",
        *sorted(folder.glob("*.safetensors")),
        *sorted(folder.glob("*.gguf")),
    ]
    content = _hash([(file.name, _file_hash(file)) for file in files if file.is_file()])
    if not is_adapter_folder(name):
        return identified(name, content)
    base = _model(adapter_base(name), revision)
    return base and identified(f"{name} on {base['name']}", _hash([content, base["content"]]))


def _file_hash(path: Path) -> str:
    """Fast rather than cryptographic: nobody is deceived here but by mistake."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str) if value else NONE
