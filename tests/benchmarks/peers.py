"""Every implementation that is compared, behind one signature and computing one quantity.

    loss = kd_weight · mean JSD_β(teacher, student) + ce_weight · mean CE(student, label)

Both means are over supervised tokens (label other than −100), at temperature 1. Shapes: N tokens, V vocabulary, H
hidden. What each library calls these things, as read in its source and held by `test_peers.py`:

- TRL `generalized_jsd_loss`: β as here, 0 is KL(T‖S), 1 is KL(S‖T), M = (1−β)·S + β·T; divides by the supervised
  tokens. It has no CE, which is added as transformers adds it, in float32.
- TRL `ChunkedDivergenceFunction`: β as here; a value per token, which is masked, summed and divided here as
  `DistillationTrainer` does. It has no CE: `ChunkedLogProbFunction` runs over the same rows.
- Liger `LigerFusedLinearJSDLoss` 0.8: β as here; divides by the supervised tokens; `weight_soft_loss` and
  `weight_hard_loss` are used as they are and need not sum to 1.

So no convention has to be converted, and every one can express β from 0 to 1. Liger computes the head's gradient even
where the head is frozen; TRL's dense loss works in the dtype of the logits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100

LossFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, float, float], torch.Tensor
]
"""(student hidden [N, H] and weight [V, H], labels [N], teacher hidden and weight, β, kd_weight, ce_weight)."""


def trl_dense(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    beta: float,
    kd_weight: float,
    ce_weight: float,
) -> torch.Tensor:
    """What `GKDTrainer` does, plus the cross-entropy of a transformers model on the same logits."""
    from trl.experimental.gkd import GKDTrainer

    student_logits = student_hidden @ student_weight.t()
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_weight.t()
    loss = kd_weight * GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels, beta)
    if ce_weight > 0:
        loss = loss + ce_weight * F.cross_entropy(student_logits.float(), labels, ignore_index=IGNORE_INDEX)
    return loss


def trl_chunked(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    beta: float,
    kd_weight: float,
    ce_weight: float,
) -> torch.Tensor:
    """What `DistillationTrainer` does without Triton (all rows, masked afterwards), plus TRL's chunked CE."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction

    ignored = labels == IGNORE_INDEX
    count = (~ignored).sum().clamp(min=1)
    divergence, _ = ChunkedDivergenceFunction.apply(
        student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, beta
    )
    loss = kd_weight * divergence.masked_fill(ignored, 0).sum() / count
    if ce_weight > 0:
        # No optional output: the cheapest way to ask for a cross-entropy alone.
        log_probs = ChunkedLogProbFunction.apply(
            student_hidden, student_weight, None, labels.clamp(min=0), 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
        )[0]
        loss = loss - ce_weight * log_probs.masked_fill(ignored, 0).sum() / count
    return loss


def _liger(
    compiled: bool,
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    beta: float,
    kd_weight: float,
    ce_weight: float,
) -> torch.Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=ce_weight, weight_soft_loss=kd_weight, beta=beta, ignore_index=IGNORE_INDEX, compiled=compiled
    )
    return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)


def liger_eager(*args: torch.Tensor | float) -> torch.Tensor:
    """Liger's chunked loss with its default chunk of 1024 tokens, without `torch.compile`."""
    return _liger(False, *args)


def liger_compiled(*args: torch.Tensor | float) -> torch.Tensor:
    """Liger's default: each chunk through `torch.compile`."""
    return _liger(True, *args)


def kdtrain_fused(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    beta: float,
    kd_weight: float,
    ce_weight: float,
) -> torch.Tensor:
    """kdtrain's fused loss, all defaults."""
    from kdtrain.losses.fused import fused_distillation_loss

    return fused_distillation_loss(
        student_hidden,
        student_weight,
        labels,
        teacher_hidden,
        teacher_weight,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        beta=beta,
    ).loss


def on_supervised(loss: LossFunction) -> LossFunction:
    """The same loss over the supervised rows only: gathering them is part of what is measured."""

    def supervised(
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        *weights: float,
    ) -> torch.Tensor:
        keep = labels != IGNORE_INDEX
        return loss(student_hidden[keep], student_weight, labels[keep], teacher_hidden[keep], teacher_weight, *weights)

    return supervised


@dataclass(frozen=True)
class Peer:
    """One implementation: its name in the results, the package it needs and how much it costs to try."""

    name: str
    title: str
    loss: LossFunction
    package: str
    compiled: bool = False
    """Uses `torch.compile`: compiled before anything is timed or measured."""
    full_logits: float = 0.0
    """Tensors of [tokens, V] float32 that live at the peak, as a factor; 0 where memory does not grow with tokens."""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


OURS = "kdtrain"

_ALL = [
    Peer(OURS, "kdtrain", kdtrain_fused, "kdtrain"),
    # Measured: 9.9 GiB at 1024 tokens and 151,936 words, a factor of 17; half of that where half the rows are left.
    Peer("trl_dense", "TRL dense", trl_dense, "trl", full_logits=17),
    Peer("trl_dense_sup", "TRL dense, supervised tokens", on_supervised(trl_dense), "trl", full_logits=8.5),
    Peer("trl_chunked", "TRL chunked + CE", trl_chunked, "trl"),
    Peer("trl_chunked_sup", "TRL chunked + CE, supervised tokens", on_supervised(trl_chunked), "trl"),
    Peer("liger", "Liger eager", liger_eager, "liger_kernel"),
    Peer("liger_sup", "Liger eager, supervised tokens", on_supervised(liger_eager), "liger_kernel"),
    Peer("liger_compiled", "Liger compiled", liger_compiled, "liger_kernel", compiled=True),
    Peer(
        "liger_compiled_sup",
        "Liger compiled, supervised tokens",
        on_supervised(liger_compiled),
        "liger_kernel",
        compiled=True,
    ),
]
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
