"""How hard each term of the loss pulls at the student: gradient norms of one micro-batch, before training and at
evaluations.

    grad_norm_llm_kd     ‖∂ llm_kd_loss / ∂ h‖₂
    grad_norm_sft        ‖∂ sft_loss / ∂ h‖₂          h [S, H]: the last hidden states before the head
    grad_norm_vision_kd  ‖∂ vision_kd_loss / ∂ f‖₂    f: the student's features at their taps
    grad_norm_hidden_kd  ‖∂ hidden_kd_loss / ∂ f‖₂    f: the outputs of its layers

The terms are weighted as they enter the loss, and D is the micro-batch's own supervised tokens. Two terms that are
alike in value may pull very differently: a divergence that has saturated has hardly a gradient. The student runs once
and without a graph; only the head and the terms are differentiated.

Shapes: S supervised tokens, H hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.data.stand_in import as_run
from kdtrain.feature_kd.projected import BatchFeatures, Predicting
from kdtrain.feature_kd.term import VisualTerm
from kdtrain.losses.head import Head
from kdtrain.teachers import DenseTargets
from kdtrain.teachers.base import AnyTargets
from kdtrain.trainer.objective import Objective, StudentForward, TokenTerm, own_kd_items

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

PREFIX = "grad_norm_"


@dataclass(frozen=True)
class TermGradients:
    """One micro-batch."""

    norms: dict[str, float]
    """By the names of the log; a term that the batch does not have is absent."""
    student: DenseTargets | torch.Tensor | None
    """What the student says of the supervised tokens: hidden states and head, or logits [S, V]."""
    targets: AnyTargets | None
    """What the teacher says of them."""


def term_gradients(
    objective: Objective,
    model: nn.Module,
    batch: Batch,
    options: DistillationOptions,
    teacher_forward: Callable[[Batch], AnyTargets],
) -> TermGradients:
    """The gradient norms of a batch's terms; leaves no gradient behind.

    Args:
        model: the student, wrapped or not, in eval mode.
        teacher_forward: as of `Objective`.
    """
    batch = as_run(batch)
    features = objective.features(options, batch)
    with torch.no_grad():
        with features.of_teacher():
            targets = teacher_forward(batch) if objective.asks_teacher(options, batch) else None
        if not options.lm_kd_active:
            targets = None
        weights_S = objective.weighed(batch, options, targets, teacher_forward, batch.kd_weights_S)
        kd_items = own_kd_items(options, batch)
        with features.of_student():
            seen = batch.for_forward(model)
            none = BatchFeatures([], batch)
            forward = StudentForward(objective, options, batch, seen, targets, weights_S, None, kd_items, none)
            student, norms = _of_hidden(forward, model) if forward.can_fuse() else _of_logits(forward, model)
        norms |= _of_features(features, seen.predicting, batch)
    return TermGradients(norms if int(batch.num_supervised) else {}, student, targets)


def _terms(forward: StudentForward) -> list[TokenTerm]:
    terms: list[TokenTerm] = []
    if forward.targets is not None:
        terms.append("llm_kd")
    if forward.options.ce_weight > 0:
        terms.append("sft")
    return terms


def _of_hidden(forward: StudentForward, model: nn.Module) -> tuple[DenseTargets, dict[str, float]]:
    """Within the model's own forward: with weights in pieces the head is whole there alone."""
    kept: list[DenseTargets] = []
    norms: dict[str, float] = {}

    def loss_head(hidden_BTH: torch.Tensor, head: Head, outputs: Any) -> tuple[torch.Tensor]:
        hidden_SH = forward.seen.predicting(hidden_BTH).detach()
        frozen = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        for term in _terms(forward):
            only = replace(forward, only=term).at_chosen_tokens(hidden_SH, frozen)
            with torch.enable_grad():
                leaf = hidden_SH.clone().requires_grad_()
                loss = only.sums(leaf, functools.partial(only.loss_from_hidden, frozen)).loss
                norms[PREFIX + term] = _norm(loss, [leaf])
        kept.append(DenseTargets(hidden_SH, frozen))
        return (hidden_SH[:0],)

    model(**forward.inputs(), loss_head=loss_head)
    return kept[0], norms


def _of_logits(forward: StudentForward, model: nn.Module) -> tuple[torch.Tensor | None, dict[str, float]]:
    """From the model's own logits: the graph begins where its head begins. Without a head that is a module, nothing."""
    inner: Any = getattr(model, "module", model)
    head = inner.get_output_embeddings()
    leaves: list[torch.Tensor] = []
    if head is None:
        return None, {}

    def begin_here(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        leaves.append(args[0].detach().requires_grad_())
        return (leaves[0], *args[1:])

    handle = head.register_forward_pre_hook(begin_here)
    norms = {}
    try:
        with torch.enable_grad():
            logits_SV = forward.seen.predicting(model(**forward.inputs()).logits)
            for term in _terms(forward) if leaves else ():
                only = replace(forward, only=term).at_chosen_tokens(logits_SV, None)
                norms[PREFIX + term] = _norm(only.sums(logits_SV, only.loss_from_logits).loss, leaves[:1])
    finally:
        handle.remove()
    return logits_SV.detach(), norms


def _of_features(features: BatchFeatures, predicting: Predicting, batch: Batch) -> dict[str, float]:
    norms = {}
    for number, (term, student) in enumerate(zip(features.of_terms, features.student, strict=True)):
        with torch.enable_grad():
            leaves = {
                target: [[one.detach().requires_grad_() for one in level] for level in levels]
                for target, levels in student.items()
            }
            loss = features.term(number, leaves, predicting, None)[term.name]
            norm = _norm(loss, [one for levels in leaves.values() for level in levels for one in level])
        if term.name != VisualTerm.name or batch.stand_in is None:
            norms[PREFIX + term.name.removesuffix("_loss")] = norm
    return norms


def _norm(loss: torch.Tensor, leaves: list[torch.Tensor]) -> float:
    if not loss.requires_grad:  # a term that no token has
        return 0.0
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def note_at_evaluation(trainer: GKDTrainerWithMetrics, model: nn.Module, batch: Batch) -> Batch:
    """Keep the norms of an evaluation's first batch among its metrics; the batch with the teacher's answer in it.

    All ranks do this at once, each with its own batch: rank 0 writes the log.
    """
    kept = trainer._metrics["eval"]
    if kept["term_gradients"]:
        return batch
    trainer.student_takes_loss_head(model)
    # As in training, so that these are one curve with those of the beginning.
    options = trainer._options_of(training=False, at_all_tokens=False)
    found = term_gradients(trainer._objective, model, batch, options, trainer._run_teacher_forward)
    kept["term_gradients"].append(torch.tensor(1.0))
    for name, norm in found.norms.items():
        kept[name].append(torch.tensor(norm))
    return batch if found.targets is None else replace(batch, targets=found.targets)
