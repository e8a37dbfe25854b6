"""Loading the student and a local teacher: trust policy, dtype, what is wrong with their weights, adapters."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from kdtrain.config.adapters import adapter_base, has_file, is_adapter_folder, levels
from kdtrain.config.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, broken_weights, require_sound
from kdtrain.errors import KdtrainError, PreflightError
from kdtrain.memory import is_out_of_memory, peak
from kdtrain.models.generation_defaults import keep_savable
from kdtrain.models.hub import require_model
from kdtrain.models.kinds import refuse_other_kinds, sees_images
from kdtrain.models.load_report import listed, loading_log, refuse_zeros, wrong_weights
from kdtrain.models.merging import merge_adapter
from kdtrain.models.quantization import Bits, bits_and_bytes, refuse_pieces, settle

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_NO_GPU = re.compile(r"not compiled with CUDA|no NVIDIA driver|No CUDA GPUs are available|invalid device ordinal", re.I)
_OWN_CODE = re.compile(r"contains custom code|trust_remote_code")
_UNKNOWN_ARGUMENT = re.compile(r"unexpected keyword argument ('\w+')")


def trust_policy(trust_remote_code: bool = False, revision: str | None = None) -> dict[str, Any]:
    """Arguments of every `from_pretrained` of this project: code from a repository runs only where the config says so.

    The explicit False also keeps transformers from asking on the terminal.
    """
    return {"trust_remote_code": trust_remote_code, "revision": revision or "main"}


def load_config(name: str, policy: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a model that predicts the next token."""
    require_model(name, policy.get("revision"))
    with _readable_loading(name):
        config = AutoConfig.from_pretrained(name, **policy)
    refuse_other_kinds(name, config)
    return config


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    trained_in_full: bool = False,
    device: torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: Bits | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A text or vision-language model with a language-model head, from a folder or the hub, safetensors only.

    `dtype` is "auto" (see `resolve_dtype`, which depends on `trained_in_full` and `device`) or the name of one; of a
    model that is quantised it is that of the weights that are not. `init_kwargs` are further arguments of
    `from_pretrained`; they win.
    """
    require_sound(Path(name))
    if is_adapter_folder(name):
        raise PreflightError(f"{name} is an adapter and no model: it goes on top of {adapter_base(name)}.")
    policy = trust_policy(trust_remote_code, revision)
    config = load_config(name, policy)
    _check_quantization(name, config)
    auto = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    checkpoint = config.dtype or config.get_text_config().dtype
    options = dict(init_kwargs or {})
    dtype = str(options.pop("torch_dtype", dtype)).removeprefix("torch.")  # its name until transformers 5
    kwargs: dict[str, Any] = {"dtype": resolve_dtype(dtype, checkpoint, trained_in_full, device)}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if quantization is not None:
        refuse_pieces(name, quantization)
        with _readable_loading(name):
            kwargs["quantization_config"] = bits_and_bytes(
                name, quantization, config, kwargs["dtype"], trust_remote_code
            )
        # Unless told otherwise transformers takes a GPU that it sees, also for a run on the CPU.
        kwargs["device_map"] = {"": str(device or "cpu")}
    kwargs |= {**policy, "use_safetensors": True, **options}
    model = _with_sound_weights(auto, name, kwargs)
    settle(model)
    keep_savable(model, name)
    if hasattr(config, "quantization_config") and not hasattr(model.config, "quantization_config"):
        _take_expanded(name, model, config.quantization_config, kwargs["dtype"])
    return model


def _with_sound_weights(
    auto: type[AutoModelForCausalLM | AutoModelForImageTextToText], name: str, kwargs: Mapping[str, Any]
) -> PreTrainedModel:
    """`from_pretrained`, but weights that it would fill with random numbers or leave out are an error."""
    # Sizes that differ are let through to be named below; transformers' own error names none.
    more = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _readable_loading(name), loading_log() as log:
        try:
            model, found = auto.from_pretrained(name, **kwargs, **more)
        except RuntimeError:
            if not log.unconverted:
                raise
            broken = [f"incomplete or of another shape: {weight}" for weight in log.unconverted]
            raise _wrong_weights(name, broken) from None
    wrong = wrong_weights(found, model.config)
    if wrong:
        raise _wrong_weights(name, wrong)
    refuse_zeros(model, name)
    if log.not_tied:
        logger.warning(
            "%s: its config says that embedding and head are one weight (tie_word_embeddings), and its files hold two "
            "that differ. Both are used; write tie_word_embeddings: false into config.json, for others believe it.",
            name,
        )
    return model


def _check_quantization(name: str, config: PreTrainedConfig) -> None:
    """Refuse a way of quantising that transformers does not know: it would load the weights as if not quantised."""
    for part in (config, config.get_text_config()):
        options = getattr(part, "quantization_config", None)
        method = options.get("quant_method") if isinstance(options, dict) else None
        known = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}
        if method is not None and method not in known:
            raise PreflightError(
                f"The weights of {name} are quantised in a way that transformers does not know: quant_method "
                f"{method!r} in config.json. It knows {', '.join(sorted(known))}. Name the model before it was "
                "quantised."
            )


def _take_expanded(name: str, model: PreTrainedModel, quantization: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Take quantised weights that transformers has expanded for want of kernels: it always does to bfloat16."""
    method = quantization.get("quant_method")
    if dtype != torch.bfloat16:
        raise PreflightError(
            f"The weights of {name} are quantised ({method}), and this device has no kernels for them: they can be "
            f"expanded to bfloat16 only, and {dtype} is asked for. Set its dtype to bfloat16 (model.dtype, "
            "rlhf.teacher.dtype), use another device, or name the model before it was quantised."
        )
    logger.warning("%s: this device has no kernels for %s weights; they are expanded to bfloat16.", name, method)
    model._weight_conversions = None  # saved as it is now, and not under the names of quantised weights


def _wrong_weights(name: str, wrong: list[str]) -> PreflightError:
    number = "1 weight does" if len(wrong) == 1 else f"{len(wrong)} weights do"
    return PreflightError(
        f"The model {name} cannot be used: {number} not fit its architecture, and would be random numbers or left out: "
        f"{listed(wrong)}. Copy or download the folder again, or save it from the class that it was trained with."
    )


@contextmanager
def _readable_loading(name: str) -> Iterator[None]:
    """Whatever a library raises while it loads a model, as an error about that model: their types say nothing of it."""
    try:
        yield
    except KdtrainError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise PreflightError(
                f"Out of memory while loading {name}: {peak(_device())}. Take half precision (model.dtype, "
                "rlhf.teacher.dtype: bfloat16), a smaller model, or for a teacher another device "
                "(rlhf.teacher.device_map: auto) or a cache of its answers (kdtrain cache)."
            ) from error
        if _NO_GPU.search(str(error)):
            raise PreflightError(
                f"{name} is to be placed on a GPU, and torch {torch.__version__} does not see it: {first_line(error)}. "
                "Remove rlhf.teacher.device_map, or run where kdtrain env lists that device, with a torch built for it."
            ) from error
        if isinstance(error, ValueError) and _OWN_CODE.search(str(error)):
            raise PreflightError(
                f"The model {name} could not be loaded: it needs Python code of its own, which runs only where the "
                "config says model.trust_remote_code: true. Read that code first."
            ) from error
        unknown = _UNKNOWN_ARGUMENT.search(str(error)) if isinstance(error, TypeError) else None
        reason = f"neither its class nor its config takes the argument {unknown[1]}" if unknown else first_line(error)
        raise PreflightError(f"The model {name} could not be loaded: {reason}") from error


def _device() -> torch.device | None:
    return torch.device("cuda") if torch.cuda.is_available() else None


def add_adapter(base: PreTrainedModel, folder: str, *, trained: bool = False) -> PeftModel:
    """A base, itself frozen, with the adapter of a folder or of a hub id; the base's modules are replaced in place."""
    if not os.path.isdir(folder) and _HUB_ID.fullmatch(folder):
        folder = _downloaded(folder)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not has_file(folder, file):
            raise PreflightError(f"{folder} is not the folder of an adapter: it has no {file}.")
    if broken := broken_weights(Path(folder) / ADAPTER_WEIGHTS):
        raise PreflightError(f"The adapter {folder} could not be loaded: {broken.message}. {broken.hint.capitalize()}.")
    try:
        model = PeftModel.from_pretrained(base, folder, is_trainable=trained)
        # Once more, for what PEFT says of it: the names in the file may be older than the model's, and it knows some.
        found = model.load_adapter(folder, model.active_adapter, is_trainable=trained)
    except Exception as error:  # safetensors and each kind of adapter have errors of their own
        raise PreflightError(f"The adapter {folder} could not be loaded: {first_line(error)}") from error
    if missing := found.missing_keys:
        raise PreflightError(
            f"The adapter {folder} lacks {len(missing)} of its weights, which would be random or zero: "
            f"{', '.join(missing[:3])}."
        )
    extra = [name for name in found.unexpected_keys if name != "prompt_embeddings"]  # loaded in another way
    if extra:
        raise PreflightError(
            f"The adapter {folder} holds weights that its base has no place for: {', '.join(extra[:3])}. Is its base "
            f"another model than {adapter_base(folder)}?"
        )
    return model


def load_with_adapter(
    name: str, *, trained: bool = False, revision: str | None = None, **options: Any
) -> PreTrainedModel | PeftModel:
    """A model by `load_model`; of an adapter's folder its base, of that `revision`, with the adapter on it."""
    if not is_adapter_folder(name):
        return load_model(name, revision=revision, **options)
    options["trained_in_full"] = False
    return add_adapter(load_merged(adapter_base(name), revision=revision, **options), name, trained=trained)


def load_merged(name: str, *, revision: str | None = None, **options: Any) -> PreTrainedModel:
    """A model by `load_model`; of an adapter's folder its base with the adapter merged into it, through all levels."""
    *adapters, bottom = levels(name)
    model = load_model(bottom, revision=revision, **options)
    for folder in reversed(adapters):
        model = merge_adapter(add_adapter(model, folder))
    return model


def _downloaded(name: str) -> str:
    """The local copy of a repository's adapter."""
    try:
        return snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    except Exception as error:  # of the network, the hub, or the cache
        raise PreflightError(
            f"The adapter {name} is no folder here, and could not be downloaded from the hub: {first_line(error)}"
        ) from error


def resolve_dtype(
    requested: str, checkpoint: torch.dtype | None, trained_in_full: bool, device: torch.device | None = None
) -> torch.dtype:
    """The dtype of the weights.

    "auto" is float32 for weights that are all trained: AdamW's updates are too small for bfloat16 weights, which would
    swallow most of them; where the hardware has bf16 the forward runs in it by autocast. Frozen weights (a teacher, the
    base of a LoRA) keep the checkpoint's dtype where the hardware computes in it, and are float32 elsewhere.
    """
    if requested != "auto":
        dtype = getattr(torch, requested, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise PreflightError(f"dtype {requested!r}: there is auto, float32, bfloat16 and float16.")
        return dtype
    if trained_in_full or checkpoint is None:
        return torch.float32
    if checkpoint in (torch.bfloat16, torch.float16) and not _computes_in_half(checkpoint, device):
        return torch.float32
    return checkpoint


def _computes_in_half(dtype: torch.dtype, device: torch.device | None) -> bool:
    kind = device.type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return False
    return dtype == torch.float16 or kind != "cuda" or torch.cuda.is_bf16_supported()


def first_line(error: Exception) -> str:
    """What a library's error says first, with its type where the text alone says little: a KeyError's is a name."""
    text = str(error).strip().split("\n", 1)[0]
    says_enough = isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
    return text if says_enough else f"{type(error).__name__}: {text}"
