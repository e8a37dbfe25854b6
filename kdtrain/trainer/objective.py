"""One micro-batch to the terms of its loss: the student's forward, without logits where the model allows.

Shapes: B rows, T positions, S supervised tokens, N some of these, H hidden width, V vocabulary, D supervised tokens of
the window.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.data.packing import ForwardInputs
from kdtrain.data.stand_in import as_run, counted_inputs
from kdtrain.feature_kd.hidden import HiddenTerm
from kdtrain.feature_kd.projected import BatchFeatures, FeatureTerm
from kdtrain.feature_kd.term import VisualTerm
from kdtrain.host import on_host
from kdtrain.losses.by_chunks import dense_loss_by_chunks
from kdtrain.losses.comparison import Scores as Predicted
from kdtrain.losses.fused import head_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.losses.mixture import Mixed
from kdtrain.losses.other_tokenizer import ChunkTargets, dense_chunk_loss, head_chunk_loss
from kdtrain.losses.reduce import IGNORE_INDEX, FusedLoss, next_token_labels, normaliser
from kdtrain.losses.sampled import SparseTargets
from kdtrain.losses.tile import TileOptions
from kdtrain.losses.uld import UldTargets, dense_uld_loss, head_uld_loss
from kdtrain.models.experts import load_balancing_loss
from kdtrain.models.known_masks import mask_known
from kdtrain.models.vocabulary import Vocabulary
from kdtrain.teachers import DenseTargets, Targets
from kdtrain.teachers.base import AnyTargets, MixedTargets, Scores, columns_of
from kdtrain.teachers.by_row import part_of, scored
from kdtrain.trainer.parts import NumItems, Part, PartSums, sums_of_parts, with_loss
from kdtrain.trainer.reliance_weights import reliance_weights
from kdtrain.trainer.token_selection import chosen_weights, num_kd_tokens

logger = logging.getLogger(__name__)

TokenTerm = Literal["llm_kd", "sft"]


@dataclass(frozen=True)
class Terms:
    """The loss of one micro-batch and what it is made of."""

    total: torch.Tensor
    """The micro-batch's share of the window's loss; the only field with a graph."""
    named: dict[str, torch.Tensor]
    """Its terms as they enter it, by the names of the log. A term of weight 0 is absent."""
    tokens: PartSums
    """Sums over the supervised tokens, without weights."""
    of_teachers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Of several teachers by name: llm_kd_weight · Σ divergence over the tokens of its own rows, and their number."""
    num_positions: int
    """Of the student's forward, padding included."""
    num_kd_items: torch.Tensor
    """What the divergence of an evaluation's batch is a mean over; of training, its supervised tokens."""


@dataclass(frozen=True)
class Objective:
    """What is the same for all batches of a run."""

    vocabulary: Vocabulary | None
    """None without LM KD; of several teachers what all of them share."""
    fused: bool
    """Whether the student's forward takes a `loss_head` (see `models/loss_head.py`)."""
    router_logits: bool | None
    """Whether a mixture-of-experts model returns what its load-balancing loss needs; None leaves it to its config."""
    aux_weight: float
    """Of that loss."""
    visual: VisualTerm | None
    hidden: HiddenTerm | None = None
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)
    """Of several teachers, by name."""
    asks_together: bool = False
    """Whether the teacher is in pieces, and so has to be asked on all ranks or on none."""

    @property
    def feature_terms(self) -> list[FeatureTerm]:
        """The terms that compare features."""
        return [term for term in (self.visual, self.hidden) if term is not None]

    def features(self, options: DistillationOptions, batch: Batch) -> BatchFeatures:
        """What is captured of a batch, of those of them that it has."""
        return BatchFeatures([term for term in self.feature_terms if term.applies(options, batch)], batch)

    def asks_teacher(self, options: DistillationOptions, batch: Batch) -> bool:
        """Whether the teacher runs on a batch: for its text, or for the features of its images."""
        has_images = batch.has_images or self.asks_together
        of_images = self.visual is not None and options.visual_kd is not None and has_images
        return options.lm_kd_active or options.hidden_kd is not None or of_images

    def weighed(
        self,
        batch: Batch,
        options: DistillationOptions,
        targets: AnyTargets | None,
        teacher_forward: Callable[[Batch], AnyTargets],
        weights_S: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """What the divergence of each supervised token counts: as the data say, and `rlhf.token_weights`."""
        if options.weighing is None or targets is None:
            return weights_S
        if batch.blank_images is None:
            if self.asks_together:  # the other ranks ask about their images
                teacher_forward(replace(batch, targets=None))
            return weights_S
        assert self.vocabulary is not None, "LM KD has compared them"
        return reliance_weights(batch, targets, teacher_forward, options.weighing, self.vocabulary.shared)

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        options: DistillationOptions,
        teacher_forward: Callable[[Batch], AnyTargets],
        num_items: NumItems,
        aux_share: torch.Tensor | float,
        num_kd_items: torch.Tensor | None = None,
    ) -> Terms:
        """total = llm_kd_weight · jsd + c · ce + Σ visual + Σ hidden, and the experts' load balancing.

        Args:
            model: the student, as wrapped for training.
            teacher_forward: called where a term needs it; also fires the hooks on its features.
            num_items: D; None (evaluation, a call of its own) is the batch's own supervised tokens.
            aux_share: the batch's share of the window in the load-balancing loss, which is a mean of micro-batches.
            num_kd_items: D_kd, what the divergence is divided by where tokens of the window have weights of their own,
                or not all are chosen; None is D.
        """
        batch = as_run(batch)
        weights_S = batch.kd_weights_S
        if num_items is None:  # a call of its own, for which what is known of a window does not hold
            num_kd_items = own_kd_items(options, batch)
        elif weights_S is None and num_kd_items is not None:
            weights_S = torch.ones_like(batch.labels_S, dtype=torch.float32)
        features = self.features(options, batch)
        with features.of_teacher():
            targets = teacher_forward(batch) if self.asks_teacher(options, batch) else None
        if not options.lm_kd_active:  # asked for its features alone
            targets = None
        weights_S = self.weighed(batch, options, targets, teacher_forward, weights_S)
        with features.of_student():
            seen = batch.for_forward(model)
            run = StudentForward(self, options, batch, seen, targets, weights_S, num_items, num_kd_items, features)
            tokens, aux_loss, of_features = run.within_forward(model) if run.can_fuse() else run.from_logits(model)
        named = _token_terms(options, batch, tokens, num_items, num_kd_items) | of_features
        if aux_loss is not None and self.router_logits:
            share = 0.0 if batch.all_repeated else aux_share
            named["aux_loss"] = self.aux_weight * (1.0 if num_items is None else share) * aux_loss
        # tokens.loss is llm_kd_weight · jsd + c · ce, made in one pass over the tokens.
        total = tokens.loss + sum(named[term.name] for term in features.of_terms) + named.get("aux_loss", 0.0)
        return Terms(
            total,
            {name: value.detach() for name, value in named.items()},
            tokens,
            {
                name: (options.llm_kd_weight * kd_sum.detach(), count)
                for name, (kd_sum, count) in tokens.of_teachers.items()
            },
            seen.model_inputs["input_ids"].numel(),
            tokens.num_tokens if num_items is not None or num_kd_items is None else num_kd_items,
        )


def own_kd_items(options: DistillationOptions, batch: Batch) -> torch.Tensor | None:
    """D_kd of a batch by itself; None where all its supervised tokens count alike."""
    if batch.num_chunks is not None:
        return weighted_chunks(batch)
    if options.selection is None and batch.kd_weights_BT is None:
        return None
    return num_kd_tokens(batch, options.selection)


@dataclass(frozen=True)
class StudentForward:
    """The student's forward on one batch, and the terms that are made of it.

    Within the wrapped forward where that is possible: DDP waits for the gradients that it finds from a forward's
    outputs, and a term that was added later is not among them.
    """

    objective: Objective
    options: DistillationOptions
    batch: Batch
    seen: ForwardInputs
    """The batch as the student's forward takes it."""
    targets: AnyTargets | None
    kd_weights_S: torch.Tensor | None
    num_items: NumItems
    num_kd_items: torch.Tensor | None
    features: BatchFeatures
    only: TokenTerm | None = None
    """One of the two token terms, without the other; None is their sum."""

    def can_fuse(self) -> bool:
        """Whether the terms can be made from hidden states: not of plain logits, nor of a head on another device."""
        if isinstance(self.targets, Targets) and self.targets.chunks is not None:
            return self.objective.fused
        found = [] if self.targets is None else scored(self.targets, self.batch)
        needs_logits = any(_needs_logits(one.scores, self.batch.labels.device) for one in found)
        if self.objective.fused and needs_logits:
            _warn_of_teacher_logits()
        return self.objective.fused and not needs_logits

    def within_forward(self, model: nn.Module) -> tuple[PartSums, Any, dict[str, torch.Tensor]]:
        """The terms, the auxiliary loss or None, and the terms of features; all made inside the model's own forward."""
        tokens: list[PartSums] = []
        names: list[str] = []
        router_logits, inner = self.objective.router_logits, getattr(model, "module", model)

        def loss_head(hidden_BTH: torch.Tensor, head: Head, outputs: Any) -> tuple[torch.Tensor, ...]:
            hidden_SH = self.seen.predicting(hidden_BTH)
            chosen = self.at_chosen_tokens(hidden_SH, head)
            tokens.append(chosen.sums(hidden_SH, functools.partial(chosen.loss_from_hidden, head)))
            of_features = self.features.terms(self.seen.predicting, self.num_items)
            names.extend(of_features)
            aux = (load_balancing_loss(self._counted_mask, outputs, inner),) if router_logits else ()
            return tokens[0].loss, *of_features.values(), *aux

        # A wrapper may hang its own hooks on what the forward returns: the loss is made of what comes out of it.
        with mask_known(self.seen):
            loss, *rest = model(**self.inputs(), loss_head=loss_head)
        named = dict(zip(names, rest, strict=False))
        return with_loss(tokens[0], loss), rest[-1] if router_logits else None, named

    def from_logits(self, model: nn.Module) -> tuple[PartSums, Any, dict[str, torch.Tensor]]:
        """The same from the model's logits."""
        with mask_known(self.seen):
            outputs = model(**self.inputs())
        logits_SV = self.seen.predicting(outputs.logits)
        chosen = self.at_chosen_tokens(logits_SV, None)
        tokens = chosen.sums(logits_SV, chosen.loss_from_logits)
        aux_loss = getattr(outputs, "aux_loss", None)
        # A class that records its router logits, and no more; or has counted the tokens of a stand-in, or of padding
        # that no mask has told it of.
        has_counted_more = self.batch.stand_in is not None or self.batch.layout is not None
        if self.objective.router_logits and (aux_loss is None or has_counted_more):
            aux_loss = load_balancing_loss(self._counted_mask, outputs, getattr(model, "module", model))
        return tokens, aux_loss, self.features.terms(self.seen.predicting, self.num_items)

    @property
    def _counted_mask(self) -> torch.Tensor | None:
        """Of the positions that experts are balanced for: neither padding nor a stand-in."""
        if self.batch.stand_in is None:
            return self.seen.mask
        mask: torch.Tensor = counted_inputs(self.batch)["attention_mask"]
        return mask

    def inputs(self) -> dict[str, Any]:
        router_logits = self.objective.router_logits
        extra = {} if router_logits is None else {"output_router_logits": router_logits}
        # With a cache, models let packed documents attend to each other, and it costs memory.
        return {**self.seen.model_inputs, "use_cache": False, **extra}

    def at_chosen_tokens(self, outputs_S: torch.Tensor, head: Head | None) -> StudentForward:
        """The same with weights of 0 where the divergence is not taken (`rlhf.token_selection`).

        Args:
            outputs_S: hidden states, with the head, or logits.
        """
        selection, vocabulary = self.options.selection, self.objective.vocabulary
        if selection is None or self.targets is None or self.only == "sft":
            return self
        assert vocabulary is not None
        student = Predicted(outputs_S.detach(), head, vocabulary.shared)
        return replace(self, kd_weights_S=chosen_weights(self.batch, student, self.targets, selection))

    def sums(self, outputs_S: torch.Tensor, compute: Callable[[Part], FusedLoss]) -> PartSums:
        """The token terms, see `parts.py`."""
        most_chosen = None
        if self.options.selection is not None and self.targets is not None and self.only != "sft":
            most_chosen = int(num_kd_tokens(self.batch, self.options.selection))
        return sums_of_parts(
            outputs_S,
            self.batch,
            self.targets,
            self.kd_weights_S,
            self.num_items,
            self.options,
            compute,
            most_chosen=most_chosen,
        )

    def _tile_options(self, part: Part) -> TileOptions:
        own = self.batch.generated_by == "student"  # a model is not taught its own samples
        options = self.options
        return TileOptions(
            kd_weight=options.llm_kd_weight if part.scores is not None and self.only != "sft" else 0.0,
            ce_weight=0.0 if own or self.only == "llm_kd" else options.ce_weight,
            beta=options.beta,  # those of rows are the part's
            temperature=options.kd_temperature,
            divergence=options.divergence,
            tail=options.tail,
            params=options.divergence_params,
        )

    def loss_from_hidden(self, head: Head, part: Part) -> FusedLoss:
        """The terms of a part from its hidden states."""
        if (chunks := self._chunks) is not None:
            compute = head_uld_loss if isinstance(chunks, UldTargets) else head_chunk_loss
            return self._of_chunks(functools.partial(compute, part.outputs, head), part, chunks)
        scores, dense, mixed, teacher_head = part.scores, None, None, None
        if self.targets is not None:  # padding beyond the shared range takes no part
            vocabulary = self._vocabulary(part)
            if isinstance(scores, DenseTargets):
                dense = scores
                vocabulary.check(len(head.weight), len(dense.head.weight))
                teacher_head = dense.head.first_columns(vocabulary.shared)
            elif isinstance(scores, MixedTargets):
                mixed = scores.heads
                assert mixed is not None, "can_fuse is asked before"
                mixed = replace(mixed, heads=tuple(one.first_columns(vocabulary.shared) for one in mixed.heads))
            head = head.first_columns(vocabulary.shared)
        return head_distillation_loss(
            part.outputs,
            head,
            part.labels,
            self._tile_options(part),
            None if dense is None else dense.hidden,
            teacher_head,
            mixed=mixed,
            targets=scores.to(part.outputs.device) if isinstance(scores, SparseTargets) else None,
            ce_token_weights=part.ce_mask,
            kd_token_weights=part.kd_weights,
            num_items=part.num_items,
            num_kd_items=self.num_kd_items,
            stretches=part.stretches,
        )

    @property
    def _chunks(self) -> ChunkTargets | UldTargets | None:
        return self.targets.chunks if isinstance(self.targets, Targets) else None

    def _of_chunks(
        self, compute: Callable[..., FusedLoss], part: Part, targets: ChunkTargets | UldTargets
    ) -> FusedLoss:
        """Of a teacher with another tokenizer, over the student's whole vocabulary."""
        return compute(
            part.labels,
            self._tile_options(part),
            targets.to(part.outputs.device),
            ce_mask=part.ce_mask,
            kd_token_weights=part.kd_weights,
            num_items=part.num_items,
            num_kd_items=self.num_kd_items,
        )

    def _vocabulary(self, part: Part) -> Vocabulary:
        vocabulary = self.objective.vocabularies.get(part.teacher or "", self.objective.vocabulary)
        assert vocabulary is not None, "LM KD has compared them"
        return vocabulary

    def loss_from_logits(self, part: Part) -> FusedLoss:
        """The terms of a part from whole logits."""
        if (chunks := self._chunks) is not None:
            compute = dense_uld_loss if isinstance(chunks, UldTargets) else dense_chunk_loss
            return self._of_chunks(functools.partial(compute, part.outputs), part, chunks)
        student_NV, teacher = part.outputs, None
        options, scores = self._tile_options(part), part.scores
        if self.targets is not None:  # padding beyond the shared range takes no part
            vocabulary = self._vocabulary(part)
            if scores is not None and not isinstance(scores, SparseTargets):
                vocabulary.check(student_NV.shape[-1], columns_of(scores))
                teacher = functools.partial(_teacher_logits, scores, vocabulary.shared, options.temperature)
            student_NV = student_NV[:, : vocabulary.shared]
        return dense_loss_by_chunks(
            student_NV,
            part.labels,
            options,
            teacher,
            targets=scores.to(student_NV.device) if isinstance(scores, SparseTargets) else None,
            kd_token_weights=part.kd_weights,
            ce_token_weights=part.ce_mask,
            num_items=part.num_items,
            num_kd_items=self.num_kd_items,
            stretches=part.stretches,
        )


def _teacher_logits(
    scores: DenseTargets | MixedTargets | torch.Tensor, columns: int, temperature: float, rows: slice
) -> Mixed:
    """Of some tokens, over the first columns of the vocabulary."""
    some = part_of(scores, rows)
    if isinstance(some, MixedTargets):
        return some.mixed(columns, temperature)
    assert isinstance(some, DenseTargets | torch.Tensor)
    logits = (some if isinstance(some, torch.Tensor) else some.logits())[:, :columns]
    return Mixed(logits, logits)


def _needs_logits(scores: Scores, device: torch.device) -> bool:
    """Whether a teacher gives logits, or has its head on another device than the batch."""
    if isinstance(scores, MixedTargets):
        return any(_needs_logits(one, device) for one in scores.parts)
    if isinstance(scores, DenseTargets):
        return scores.head.weight.device != device
    return isinstance(scores, torch.Tensor)


def weighted_chunks(batch: Batch) -> torch.Tensor:
    """Chunks of a batch with a token of weight above 0: what the divergence from a teacher with another tokenizer is
    divided by, in place of tokens. A scalar on the CPU."""
    chunks, weights_BT, chunks_B = batch.student_chunks, batch.kd_weights_BT, batch.num_chunks
    assert chunks is not None
    assert chunks_B is not None
    if weights_BT is None:
        return chunks_B.sum()
    chunks_BT = next_token_labels(on_host(chunks.numbers))
    count = chunks_BT.numel()
    first_B1 = torch.arange(len(chunks_BT))[:, None] * chunks_BT.shape[1]
    counted_BT = (chunks_BT != IGNORE_INDEX) & (weights_BT > 0)
    slots_BT = torch.where(counted_BT, chunks_BT + first_B1, count)
    return chunks_BT.new_zeros(count + 1).index_fill_(0, slots_BT.flatten(), 1)[:count].sum()


def _token_terms(
    options: DistillationOptions,
    batch: Batch,
    tokens: PartSums,
    num_items: NumItems,
    num_kd_items: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The token terms as they enter the loss. A term of weight 0 is absent."""
    denominator = normaliser(num_items, tokens.num_tokens)
    terms = {}
    if tokens.kd_sum is not None:
        kd_denominator = denominator if num_kd_items is None else normaliser(num_kd_items, tokens.num_tokens)
        terms["llm_kd_loss"] = options.llm_kd_weight * tokens.kd_sum / kd_denominator
    if options.ce_weight > 0:
        own = batch.generated_by == "student"
        zero = torch.zeros_like(tokens.ce_sum)  # and not 0 · Σ, which may be infinite on the student's own samples
        terms["sft_loss"] = zero if own else options.ce_weight * tokens.ce_sum / denominator
    return terms


def warn_of_logits(reason: str) -> None:
    """Say why the student's logits are made in full."""
    logger.warning("The student's logits are made in full, which takes more time and memory: %s.", reason)


@functools.cache  # once
def _warn_of_teacher_logits() -> None:
    logger.warning("The teacher gives logits, or its head is on another device: the student's are made in full too.")
