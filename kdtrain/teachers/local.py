"""A teacher in this process: a transformers model, frozen and in eval mode."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp

from kdtrain.data.batch import Batch
from kdtrain.losses.head import Head
from kdtrain.losses.reduce import predicting
from kdtrain.models.experts import without_router_logits
from kdtrain.models.loss_head import add_loss_head, why_no_loss_head, why_wrapped_head_differs
from kdtrain.models.probe import look_at_text
from kdtrain.models.vocabulary import vocabulary_size
from kdtrain.teachers.base import DenseTargets, Targets, Teacher

logger = logging.getLogger(__name__)


class LocalTeacher(Teacher):
    """Teacher over a loaded transformers model with a language-model head, or a PEFT model of one.

    The model is frozen here: `requires_grad` off and eval mode, so that no optimizer, gradient or dropout ever reaches
    it, whatever state it was handed over in.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module | None = module.requires_grad_(False).eval()
        self.vocab_size = vocabulary_size(module)
        self._kept_head: Head | None = None
        base: Any = module
        if is_peft_model(base):
            base = base.get_base_model()
        self.look = look_at_text(base, "teacher")
        reason = why_no_loss_head(base)
        # Under ZeRO-3 the head can be compared only once the model is wrapped, in the first forward.
        self._head_unchecked = reason is None and is_deepspeed_zero3_enabled()
        self._from_logits = reason is not None
        if reason is None:
            add_loss_head(base)
        else:
            _report_logits(reason)

    def place(self, accelerator: Accelerator) -> None:
        """To the device, or into pieces; not wrapped by DDP, since it has no gradients to average."""
        assert self.module is not None
        if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
            self.module = prepare_deepspeed(self.module, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.module = prepare_fsdp(self.module, accelerator)
        elif getattr(self.module, "hf_device_map", None) is None:
            self.module.to(accelerator.device)

    def targets(self, batch: Batch) -> Targets:
        """Hidden states and head, or logits where the model has no head of its own; see `Teacher.targets`."""
        assert self.module is not None
        self.module.eval()  # a caller may have called .train() on a parent
        if self._head_unchecked:
            reason = why_wrapped_head_differs(self.module)
            self._head_unchecked, self._from_logits = False, reason is not None
            if reason is not None:
                _report_logits(reason)
        seen = batch.as_teacher_sees_it()  # its own tokens predict the same supervised ones, in the same order
        inputs, predicts_BT = seen.model_inputs, seen.predicts_BT

        def keep(hidden_BTH: torch.Tensor, head: Head, outputs: Any) -> tuple[torch.Tensor, Head]:
            return predicting(hidden_BTH, predicts_BT)[predicts_BT.to(hidden_BTH.device)], self._lasting(head)

        with torch.no_grad(), without_router_logits(getattr(self.module, "module", self.module)):
            if self._from_logits:
                logits_BTV = predicting(self.module(**inputs, use_cache=False).logits, predicts_BT)
                return Targets(logits_BTV[predicts_BT.to(logits_BTV.device)])
            hidden_SH, head = self.module(**inputs, use_cache=False, loss_head=keep)
        return Targets(DenseTargets(hidden_SH, head))

    def _lasting(self, head: Head) -> Head:
        """A head that outlives the forward. FSDP2 and ZeRO-3 free whole weights after it: there a copy is kept.

        One copy for the run: the teacher never changes.
        """
        if not (isinstance(self.module, FSDPModule) or is_deepspeed_zero3_enabled()):
            return head
        if self._kept_head is None:
            bias = None if head.bias is None else head.bias.clone()
            self._kept_head = replace(head, weight=head.weight.clone(), bias=bias)
        return self._kept_head


def _report_logits(reason: str) -> None:
    logger.info("The teacher's logits are made in full, which takes more memory: %s.", reason)
