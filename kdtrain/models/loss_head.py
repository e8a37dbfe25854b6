"""A model's last hidden state and head, handed to a loss inside the model's own forward.

Shapes: B rows, T positions, H hidden width, V vocabulary.

The loss has to run inside the forward of whatever wraps the model: there DDP arms its gradient reduction, autocast is
in force, and sharded parameters are whole. Calling the backbone by itself skips all of that; under DDP nothing would
say so, and every rank would train a model of its own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import maybe_gather_lm_head_ctx

from kdtrain.losses.head import Head, first_masked
from kdtrain.models.experts import without_router_logits
from kdtrain.models.pieces import full_tensor, runs_on
from kdtrain.models.probe import evaluating, few_tokens

LossHead = Callable[[torch.Tensor, Head, Any], Any]
"""(last hidden state [B, T, H], head, the backbone's outputs) -> what the forward returns, tensors in a tuple."""


def add_loss_head(model: nn.Module) -> None:
    """Let `model(..., loss_head=f)` run the backbone and return f(hidden, head, outputs) instead of logits.

    Without the keyword the forward is the one it was. To be called before the model is wrapped; of a PEFT model, on its
    base.
    """
    original = model.forward
    if getattr(original, "takes_loss_head", False):  # the student has it already, where it is the teacher as well
        return

    # The model's own forward is replaced, and no module put around it: parameters keep their names, and whatever wraps
    # the model later (DDP, FSDP, DeepSpeed, torch.compile) has the backbone and the head in one forward.
    @functools.wraps(original)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, loss_head: LossHead | None = None, **kwargs: Any) -> Any:
        if loss_head is None:
            return original(*args, **kwargs)
        outputs = self.base_model(*args, **kwargs)
        module = _head_module(self)
        if module is None:
            return loss_head(outputs.last_hidden_state, _called_head(self, outputs.last_hidden_state), outputs)
        # Under ZeRO-3 each rank holds a piece of the head, and the head's own forward, which would gather it, is not
        # called. It is gathered once for all chunks of the loss, and let go of behind it.
        # One that accelerate keeps in CPU memory or on the disk comes to its device for as long.
        with maybe_gather_lm_head_ctx(module.weight, module.bias), align_module_device(module):
            return loss_head(outputs.last_hidden_state, _head(self, module), outputs)

    forward.takes_loss_head = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    if is_deepspeed_zero3_enabled():
        _gather_within_model(model)


def why_no_loss_head(model: PreTrainedModel, *, calls_head: bool = False) -> str | None:
    """Why a model's loss needs its logits; None if hidden state and head give the same.

    Args:
        calls_head: whether the head may be a module that is called (quantised, an adapter on it): not where it is
            asked for logits after the forward, or has its weights in pieces.

    Runs the model on a few tokens and compares: what a model does to its logits (scales, caps) is known here by the
    names in its config only, and a name that is not known must not become a wrong loss. Under ZeRO-3 weights are in
    pieces until the model is wrapped: there ask `why_wrapped_head_differs` as well, before the first loss.
    """
    if getattr(model, "base_model", model) is model:
        return "it has no backbone apart from its head"
    module = _head_module(model)
    if module is None and not (calls_head and _size_of(model.get_output_embeddings())):
        return "its head is not a plain linear layer"
    if is_deepspeed_zero3_enabled():
        return None
    ids = few_tokens(model, runs_on(model))
    with evaluating(model), without_router_logits(model):
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if module is None:
            return _difference(logits, _called_head(model, hidden).differentiable_logits(hidden), hidden.dtype)
        with align_module_device(module):
            head = _head(model, module)
            from_head = head.differentiable_logits(hidden.to(head.weight.device)).to(logits.device)
    return _difference(logits, from_head, module.weight.dtype)


def why_wrapped_head_differs(wrapped: Any) -> str | None:
    """The comparison of `why_no_loss_head` for a wrapped model with a loss head. A collective.

    Two forwards, so that parameters in pieces are put together one layer at a time.
    """
    # transformers evaluates without the wrapper: DeepSpeed's hooks are on the model itself.
    ids = few_tokens(getattr(wrapped, "module", wrapped), next(wrapped.parameters()).device)

    def logits_of(hidden: torch.Tensor, head: Head, outputs: Any) -> tuple[torch.Tensor, torch.dtype]:
        return head.differentiable_logits(hidden), head.weight.dtype

    with evaluating(wrapped):
        logits = wrapped(input_ids=ids, use_cache=False).logits
        from_head, dtype = wrapped(input_ids=ids, use_cache=False, loss_head=logits_of)
    reason = _difference(logits, from_head, dtype)
    # Ranks that went different ways would wait for each other's weights for ever.
    differs = torch.tensor([reason is not None], dtype=torch.int32, device=ids.device)
    torch.distributed.all_reduce(differs, torch.distributed.ReduceOp.MAX)
    return reason or ("it does so on another rank" if differs.item() else None)


def _difference(logits: torch.Tensor, from_head: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why a model's own logits are not those of its hidden state and head, computed in `dtype`."""
    logits = logits.float()
    if logits.shape != from_head.shape:
        return "its logits have another shape than its head gives"
    if not logits.isfinite().all():
        return "its logits are not finite"
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2  # the model makes half-precision logits, and rounds them
    if not (logits - from_head).norm() <= tolerance * logits.norm():
        return "it does more to its logits than its config says"
    return None


def _head_module(model: PreTrainedModel) -> nn.Linear | None:
    """The linear layer of the head; the trained copy where PEFT keeps one, unless its adapter is off."""
    module = model.get_output_embeddings()
    copies = getattr(module, "modules_to_save", None)
    if copies is not None:
        module = module.original_module if module.disable_adapters else copies[module.active_adapters[0]]
    # Quantised layers are subclasses from elsewhere, and adapters wrap the layer: reading `weight` would miss them.
    unmodified = isinstance(module, nn.Linear) and type(module).__module__.startswith("torch.")
    return module if unmodified else None


def _gather_within_model(model: nn.Module) -> None:
    """Have ZeRO-3 put the head's weights together for forward and backward of the model itself, where the loss uses
    them.

    DeepSpeed notices that by itself only where they are in pieces at that moment: after a forward that made logits they
    are whole, and in backward their gradient would find a parameter without rows. Registered before the first forward,
    since DeepSpeed records which parameters a forward needs and expects the same of all later ones.
    """
    import deepspeed

    module = _head_module(model)
    assert module is not None, "checked when the loss head was added"
    for parameter in module.parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


def _head(model: PreTrainedModel, module: nn.Linear) -> Head:
    config = model.config.get_text_config()
    weight, bias = full_tensor(module.weight), None if module.bias is None else full_tensor(module.bias)
    return Head(weight, bias, _logit_scale(config), _softcap(config), _masked_from(module, bias))


def _called_head(model: PreTrainedModel, hidden: torch.Tensor) -> Head:
    """The head of a model that is a module of another kind."""
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    size = _size_of(module)
    assert size is not None, "checked when the loss head was added"
    return Head.of_module(module, size, hidden, _logit_scale(config), _softcap(config))


def _size_of(module: nn.Module | None) -> tuple[int, int] | None:
    """V and H of a head, whose weight may be packed; None where it does not say them."""
    size = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return size if isinstance(size[0], int) and isinstance(size[1], int) else None  # type: ignore[return-value]


def _softcap(config: PreTrainedConfig) -> float | None:
    return getattr(config, "final_logit_softcapping", None)


# By the layer: a column that is masked stays so, whatever the others learn.
_MASKED_FROM: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _masked_from(module: nn.Linear, bias: torch.Tensor | None) -> int | None:
    """See `Head.masked_from`; found once, before the first step."""
    if bias is None:
        return None
    if module not in _MASKED_FROM:
        _MASKED_FROM[module] = first_masked(bias)
    return _MASKED_FROM[module]


def _logit_scale(config: PreTrainedConfig) -> float:
    """What a model multiplies its logits by, under the names that transformers' models have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)
