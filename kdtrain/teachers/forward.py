"""One forward of a model in this process to targets: what the local teacher and the self teacher share.

Shapes: B rows, T positions, S supervised tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.data.batch import Batch
from kdtrain.losses.head import Head
from kdtrain.models.experts import without_router_logits
from kdtrain.models.known_masks import mask_known
from kdtrain.models.loss_head import add_loss_head, why_no_loss_head, why_wrapped_head_differs
from kdtrain.teachers.base import DenseTargets, Targets

logger = logging.getLogger(__name__)


def base_model(model: Any) -> Any:
    """A model without PEFT around it."""
    return model.get_base_model() if is_peft_model(model) else model


class ModelForward:
    """Targets from a model's hidden states and head, or from its logits where it has no head of its own.

    Args:
        model: with the teacher's weights, not wrapped yet but by PEFT. It gets a loss head.
        keeps_head: whether the head never changes, so that one copy of it does for the run where a copy is needed.
    """

    def __init__(self, model: nn.Module, *, keeps_head: bool) -> None:
        base = base_model(model)
        reason = why_no_loss_head(base)
        # Under ZeRO-3 the head can be compared only once the model is wrapped, in the first forward.
        self._head_unchecked = reason is None and is_deepspeed_zero3_enabled()
        self._from_logits = reason is not None
        self._keeps_head = keeps_head
        self._kept_head: Head | None = None
        if reason is None:
            add_loss_head(base)
        else:
            _report_logits(reason)

    def __call__(self, module: nn.Module, batch: Batch) -> Targets:
        """See `Teacher.targets`.

        Args:
            module: the model as it is wrapped now, in eval mode and with the teacher's weights.
        """
        if self._head_unchecked:
            reason = why_wrapped_head_differs(module)
            self._head_unchecked, self._from_logits = False, reason is not None
            if reason is not None:
                _report_logits(reason)
        # Its own tokens predict the same supervised ones, in the same order.
        seen = batch.as_teacher_sees_it().for_forward(module)
        inputs, device = seen.model_inputs, batch.labels.device
        made: list[DenseTargets] = []

        def keep(hidden_BTH: torch.Tensor, head: Head, outputs: Any) -> tuple[torch.Tensor]:
            hidden_SH = seen.predicting(hidden_BTH)
            made.append(DenseTargets(hidden_SH.to(device), self._lasting(module, head, device)))
            return (hidden_SH[:0],)  # a wrapper may cast or copy what a forward returns: that must not be the targets

        with torch.no_grad(), without_router_logits(getattr(module, "module", module)), mask_known(seen):
            if self._from_logits:
                return Targets(seen.predicting(module(**inputs, use_cache=False).logits))
            module(**inputs, use_cache=False, loss_head=keep)
        return Targets(made[0])

    def _lasting(self, module: nn.Module, head: Head, device: torch.device) -> Head:
        """A head that outlives the forward, on the student's device.

        FSDP2 and ZeRO-3 free whole weights after it: there it is a copy. So it is of a head on another GPU: to bring
        it here once is less than to bring logits at every step.
        """
        is_here = head.weight.device == device
        if is_here and not (isinstance(module, FSDPModule) or is_deepspeed_zero3_enabled()):
            return _detached(head, copied=False)
        if self._kept_head is None or not self._keeps_head:
            self._kept_head = _detached(head, copied=is_here, device=device)
        return self._kept_head


def _detached(head: Head, *, copied: bool, device: torch.device | None = None) -> Head:
    """The head as it is now: with other weights put into the parameter later, it keeps these."""

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone() if copied else tensor.detach().to(device)

    return replace(head, weight=taken(head.weight), bias=None if head.bias is None else taken(head.bias))


def _report_logits(reason: str) -> None:
    logger.info("The teacher's logits are made in full, which takes more memory: %s.", reason)
