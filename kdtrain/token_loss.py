"""The student's forward and the token terms of its loss: without logits where the model allows, with them elsewhere.

Shapes: B rows, T positions, S supervised tokens, H hidden width, V vocabulary, D supervised tokens of the window.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kdtrain.errors import NotAvailableError
from kdtrain.experts import load_balancing_loss
from kdtrain.knobs import Knobs
from kdtrain.losses.dense import dense_distillation_loss
from kdtrain.losses.fused import fused_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.losses.reduce import FusedLoss, next_token_labels, predicting
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers import DenseTargets, Targets
from kdtrain.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenLoss:
    """What the token terms are, for all batches of a run.

    Args:
        knobs: weights and options.
        vocabulary: None without LM KD.
        fused: whether the student's forward takes a `loss_head` (see `lm_head.py`).
        router_logits: whether a mixture-of-experts model returns what its load-balancing loss needs; None leaves it to
            its config, where that does not ask for them.
    """

    knobs: Knobs
    vocabulary: Vocabulary | None
    fused: bool
    router_logits: bool | None

    def forward(
        self,
        model: nn.Module,
        model_inputs: Mapping[str, Any],
        batch: Mapping[str, Any],
        predicts_BT: torch.Tensor,
        targets: Targets | None,
        num_items: torch.Tensor | int | None,
        further: Callable[[], dict[str, torch.Tensor]] = dict,
    ) -> tuple[FusedLoss, Any, dict[str, torch.Tensor]]:
        """Run the student and compute its token terms.

        Args:
            model: as wrapped for training.
            model_inputs: what its forward takes.
            batch: with `labels` [B, T] and, optionally, `ce_rows` [B] and `student_generated`.
            predicts_BT: [B, T−1] bool, positions that predict a supervised token.
            targets: the teacher's, for S tokens; None without LM KD.
            num_items: D, or None.
            further: other terms that can be computed once the backbone has run. Within the wrapped forward where that
                is possible: a gradient that DDP cannot see from the forward's outputs is one it does not wait for.

        Returns:
            The terms, the auxiliary loss of a mixture-of-experts model or None, and the further terms.
        """
        extra = {} if self.router_logits is None else {"output_router_logits": self.router_logits}
        options: dict[str, Any] = {
            "kd_weight": self.knobs.llm_kd_weight,
            # A model is not taught its own samples.
            "ce_weight": 0.0 if batch.get("student_generated", False) else self.knobs.ce_weight,
            "ce_mask": _ce_mask(batch, predicts_BT),
            "beta": self.knobs.beta,
            "temperature": self.knobs.kd_temperature,
            "divergence": self.knobs.divergence,
            "num_items": num_items,
        }
        labels_S = next_token_labels(batch["labels"])[predicts_BT]
        # Without a cache: with one, models let packed documents attend to each other, and it costs memory.
        if not self.fused or _elsewhere(targets, labels_S.device):
            if self.fused:
                _say_once(
                    "The teacher gives logits, or its head is on another device: the student's are made in full too."
                )
            outputs = model(**model_inputs, use_cache=False, **extra)
            logits_SV = predicting(outputs.logits, predicts_BT)[predicts_BT]
            teacher_SV = None if targets is None else _logits(targets).to(logits_SV.device)
            logits_SV, teacher_SV = self._shared_logits(logits_SV, teacher_SV)
            loss = dense_distillation_loss(logits_SV, labels_S, teacher_SV, **options)
            aux_loss = getattr(outputs, "aux_loss", None)
            if self.router_logits and aux_loss is None:  # a class that records its router logits, and no more
                aux_loss = load_balancing_loss(model_inputs, outputs, getattr(model, "module", model))
            return loss, aux_loss, further()

        terms: list[FusedLoss] = []
        names: list[str] = []

        def loss_head(hidden_BTH: torch.Tensor, head: Head, outputs: Any) -> tuple[torch.Tensor, ...]:
            hidden_SH = predicting(hidden_BTH, predicts_BT)[predicts_BT.to(hidden_BTH.device)]
            terms.append(self._fused(hidden_SH, head, labels_S.to(hidden_SH.device), targets, options))
            more = further()
            names.extend(more)
            aux = (load_balancing_loss(model_inputs, outputs, moe),) if self.router_logits else ()
            return terms[0].loss, *more.values(), *aux

        moe: Any = getattr(model, "module", model)
        loss, *rest = model(**model_inputs, use_cache=False, loss_head=loss_head, **extra)
        # All terms as the wrapper returned them: it may have hung its own hooks on them.
        more = dict(zip(names, rest, strict=False))
        return replace(terms[0], loss=loss), rest[-1] if self.router_logits else None, more

    def _fused(
        self,
        hidden_SH: torch.Tensor,
        head: Head,
        labels_S: torch.Tensor,
        targets: Targets | None,
        options: dict[str, Any],
    ) -> FusedLoss:
        student = head
        teacher: dict[str, Any] = {}
        if isinstance(targets, DenseTargets):
            assert self.vocabulary is not None
            self.vocabulary.check(len(head.weight), len(targets.head.weight))
            student = first_columns(head, self.vocabulary.shared)
            shared = first_columns(targets.head, self.vocabulary.shared)
            teacher = {
                "teacher_hidden": targets.hidden,
                "teacher_weight": shared.weight,
                "teacher_bias": shared.bias,
                "teacher_logit_scale": shared.logit_scale,
                "teacher_softcap": shared.softcap,
            }
        elif isinstance(targets, TopKLogprobs):
            assert self.vocabulary is not None
            student = first_columns(head, self.vocabulary.shared)
            teacher = {"targets": targets.to(hidden_SH.device), "tail": self.knobs.tail}
        return fused_distillation_loss(
            hidden_SH,
            student.weight,
            labels_S,
            student_bias=student.bias,
            student_logit_scale=student.logit_scale,
            student_softcap=student.softcap,
            **teacher,
            **(options if targets is not None else options | {"kd_weight": 0.0}),
        )

    def _shared_logits(
        self, student_SV: torch.Tensor, teacher_SV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both logits over the shared range of the vocabulary; padding beyond it takes no part."""
        if teacher_SV is None:
            return student_SV, None
        assert self.vocabulary is not None
        self.vocabulary.check(student_SV.shape[-1], teacher_SV.shape[-1])
        return student_SV[:, : self.vocabulary.shared], teacher_SV[:, : self.vocabulary.shared]


def first_columns(head: Head, count: int) -> Head:
    """The head over the first tokens of the vocabulary only; the same object where that is all of them."""
    if count == len(head.weight):
        return head
    return replace(head, weight=head.weight[:count], bias=None if head.bias is None else head.bias[:count])


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _elsewhere(targets: Targets | None, device: torch.device) -> bool:
    """Whether targets cannot go into the fused loss: plain logits, or a head on another device than the student's."""
    if targets is None or isinstance(targets, TopKLogprobs):
        return False
    return isinstance(targets, torch.Tensor) or targets.head.weight.device != device


def _logits(targets: Targets) -> torch.Tensor:
    if isinstance(targets, TopKLogprobs):
        raise NotAvailableError(
            "A teacher that gives its most likely tokens only needs a student whose head is a plain linear layer."
        )
    return targets if isinstance(targets, torch.Tensor) else targets.logits()


def _ce_mask(batch: Mapping[str, Any], predicts_BT: torch.Tensor) -> torch.Tensor | None:
    """[S] bool: supervised tokens of rows that contribute cross-entropy; None is all."""
    rows = batch.get("ce_rows")
    if rows is None:
        return None
    return rows.to(predicts_BT.device)[:, None].expand_as(predicts_BT)[predicts_BT]
