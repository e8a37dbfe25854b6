"""Mixture-of-experts students: their router logits, and the load-balancing loss that is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from kdtrain.errors import NotAvailableError, PreflightError
from kdtrain.models.tuning import uses_reentrant_checkpointing

# What trl's constructor writes into a config for good, and so into what is saved.
_WRITTEN = ("output_router_logits", "router_aux_loss_coef")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def router_settings(model: nn.Module) -> dict[str, Any]:
    """What the config of a model says about router logits."""
    text = _text_config(model)
    return {name: getattr(text, name) for name in _WRITTEN if hasattr(text, name)}


def restore_router_settings(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Write back what `router_settings` read."""
    text = model.config.get_text_config()
    for name, value in settings.items():
        setattr(text, name, value)


@contextmanager
def without_router_logits(model: nn.Module) -> Iterator[None]:
    """No router logits while sampling.

    With them a model computes its load-balancing loss in every forward: of the one new token, with a mask of all tokens
    that does not fit it.
    """
    text = _text_config(model)
    if text is None or not getattr(text, "output_router_logits", False):
        yield
        return
    text.output_router_logits = False
    try:
        yield
    finally:
        text.output_router_logits = True


def asks_for_router_logits(model: nn.Module, wanted: bool) -> bool | None:
    """What to pass as `output_router_logits`: True, False, or None where nothing has to be passed."""
    if wanted and has_experts(model):
        return True
    return False if router_settings(model).get("output_router_logits") else None


def has_experts(model: nn.Module) -> bool:
    """Whether any layer of a mixture class routes at all: Granite 4.0 dense, and the smallest Jamba, have no router.

    Configs say so in many ways (no experts, layers that are all dense). So this searches for modules of the classes
    that transformers takes router logits from. A class of models that names none is taken to have experts.
    """
    recorded = [
        target
        for module in model.modules()
        if isinstance(recorders := getattr(module, "_can_record_outputs", None), dict)
        for target in _as_list(recorders.get("router_logits"))
    ]
    if not recorded:
        return hasattr(_text_config(model), "output_router_logits")
    routers = tuple({getattr(target, "target_class", target) for target in recorded})
    return any(isinstance(module, routers) for module in model.modules())


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _text_config(model: nn.Module) -> PreTrainedConfig | None:
    config = getattr(model, "config", None)
    return None if config is None else config.get_text_config()


def check_experts(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse a load-balancing loss that could not be computed, or would be logged and teach nothing."""
    _counts(_text_config(model))
    if uses_reentrant_checkpointing(args):
        raise PreflightError(
            "training.gradient_checkpointing_kwargs: {use_reentrant: true} cuts the router logits off from the graph: "
            "the load-balancing loss of the experts would be logged and teach nothing. Set use_reentrant: false, "
            "gradient_checkpointing: false (PEFT under ZeRO-3 needs the reentrant kind), or router_aux_loss_coef: 0."
        )


def load_balancing_loss(mask: torch.Tensor | None, outputs: Any, model: nn.Module) -> torch.Tensor:
    """The auxiliary loss that a mixture-of-experts model would have returned beside its logits, a scalar.

    Args:
        mask: of the forward's positions, 0 in the padding; None where there is none.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts, per_token = _counts(_text_config(model))
    if not getattr(outputs, "router_logits", None):
        raise NotAvailableError(
            f"{type(model).__name__} returns no router logits. Set training.router_aux_loss_coef: 0."
        )
    value = load_balancing_loss_func(outputs.router_logits, experts, per_token, mask)
    assert isinstance(value, torch.Tensor)
    return value


def _counts(config: PreTrainedConfig | None) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token takes."""
    assert config is not None, "only models with a config have experts"
    experts = next((getattr(config, name) for name in _COUNTS if hasattr(config, name)), None)
    per_token = getattr(config, "num_experts_per_tok", None)
    if experts is None or per_token is None:
        raise NotAvailableError(
            f"The load-balancing loss of {config.model_type} is not available: its config names no number of experts, "
            "or not how many a token takes. Set training.router_aux_loss_coef: 0."
        )
    return experts, per_token
