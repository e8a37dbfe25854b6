"""Loading the student and a local teacher: dtype, trust policy, LoRA, freezing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.errors import NotAvailableError, PreflightError

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

# Attributes of transformers' modules that functional dropout reads.
_DROPOUT_NUMBERS = ("attention_dropout", "attn_dropout", "dropout", "activation_dropout", "hidden_dropout", "dropout_p")


def trust_policy(trust_remote_code: bool = False, revision: str | None = None) -> dict[str, Any]:
    """Keyword arguments that every `from_pretrained` of this project passes; the one place where trust is decided.

    Code from a repository runs only where the config says so; the explicit False also keeps transformers from asking on
    the terminal.
    """
    return {"trust_remote_code": trust_remote_code, "revision": revision or "main"}


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model.

    Raises:
        PreflightError: none there.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **trust_policy(trust_remote_code, revision))
    except (OSError, ValueError) as error:
        raise PreflightError(f"No tokenizer could be loaded from {name}: {_first_line(error)}") from error


def load_causal_lm(
    name: str,
    *,
    dtype: str = "auto",
    trained_in_full: bool = False,
    device: torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A text model with a language-model head, from a folder or the hub, safetensors only.

    Args:
        name: folder or hub id.
        dtype: "auto" or a torch dtype's name; see `resolve_dtype`.
        trained_in_full: whether all its weights are trained.
        device: where it will run, which "auto" depends on; None is the accelerator if there is one.
        init_kwargs: further arguments of `from_pretrained`; they win. Never changed.

    Raises:
        PreflightError: nothing there, weights that are not safetensors, or code that is not trusted.
        NotAvailableError: a vision-language model.
    """
    policy = trust_policy(trust_remote_code, revision)
    try:
        config = AutoConfig.from_pretrained(name, **policy)
        if config.get_text_config() is not config:
            raise NotAvailableError(
                f"{name} is a {config.model_type} model with several modalities: not available yet, text models only."
            )
        kwargs: dict[str, Any] = {"dtype": resolve_dtype(dtype, config.dtype, trained_in_full, device)}
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        kwargs |= {**policy, "use_safetensors": True} | dict(init_kwargs or {})
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except NotAvailableError:
        raise
    except (OSError, ValueError) as error:
        raise PreflightError(f"The model {name} could not be loaded: {_first_line(error)}") from error


def resolve_dtype(
    requested: str, checkpoint: torch.dtype | None, trained_in_full: bool, device: torch.device | None = None
) -> torch.dtype:
    """The dtype of the weights.

    "auto" is float32 for weights that are all trained: AdamW's updates are too small for bfloat16 weights, which would
    swallow most of them; where the hardware has bf16 the forward runs in it by autocast. Frozen weights (a teacher, the
    base of a LoRA) keep the checkpoint's dtype where the hardware computes in it, and are float32 elsewhere.
    """
    if requested != "auto":
        return getattr(torch, requested)
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


def lora_config(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] | None,
    use_dora: bool,
) -> LoraConfig:
    """PEFT's config for a causal language model."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # PEFT says int, and divides it by the rank
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )


def freeze(model: PreTrainedModel, *, llm: bool = False, vit: bool = False, aligner: bool = False) -> None:
    """Take parts of a text model out of training.

    Raises:
        PreflightError: nothing would be left to train.
    """
    name = type(model).__name__
    if llm:
        raise PreflightError(
            f"tuner.freeze_llm: {name} is a text model: with its language model frozen nothing is left to train. "
            "Remove the option."
        )
    for option, wanted in (("freeze_vit", vit), ("freeze_aligner", aligner)):
        if wanted:
            logger.warning("tuner.%s has no effect: %s is a text model.", option, name)


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch off every dropout, also those that are numbers handed to a function (attention), not modules."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_NUMBERS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; tied weights count once."""
    # Under ZeRO-3 a parameter is empty between its uses, and knows its own size.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
