"""The forward pass of the fused loss: all supervised tokens, chunk by chunk, to sums and finished gradients.

Shapes: N tokens of a call, S of them supervised, C tokens of one chunk, H hidden width, V vocabulary.

Two sizes are cut: the tokens into chunks, whose matrix products are large enough to be fast; a chunk into blocks, whose
element-wise passes stay in a CPU's cache. A chunk's logits live in one tile [C, V], and a block is a view of some of
its rows. The tile changes its meaning in place: logits, then their gradient, then the next chunk's logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kdtrain.losses.gemm import HalfGradients, add_weight_gradient, hidden_gradient, one_dtype, power_of_two_unit
from kdtrain.losses.head import Head
from kdtrain.losses.mixture import Accumulator, MixedHeads
from kdtrain.losses.reduce import kd_share, normaliser
from kdtrain.losses.sampled import SampledTargets, SparseTargets
from kdtrain.losses.sparse_tile import sampled_tile_terms, topk_tile_terms
from kdtrain.losses.tile import (
    Buffers,
    RowWeights,
    TileOptions,
    TileSums,
    tile_terms,
)
from kdtrain.losses.workspace import workspace

# Bytes of the two logit tiles of a chunk together. On a GPU the scratch of the element-wise part is one and a half
# times as much again, on a CPU it is a few blocks.
_TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 384 * 2**20}
# Values of one element-wise block: on a CPU its buffers stay in the cache, on a GPU a block is the whole tile.
_BLOCK_VALUES = 2**20


@dataclass(frozen=True)
class Call:
    """Everything of a call that takes no gradient."""

    student: Head
    teacher: Head | None
    teacher_hidden: torch.Tensor | None
    targets: SparseTargets | None
    options: TileOptions
    ce_token_weights: torch.Tensor | None
    kd_token_weights: torch.Tensor | None
    num_items: torch.Tensor | int | None
    num_kd_items: torch.Tensor | int | None
    chunk_tokens: int | None
    with_gradient: bool
    mixed: MixedHeads | None = None
    """Several teachers in place of one."""
    most_taught: int | None = None
    """See `head_distillation_loss`."""

    @property
    def has_teacher(self) -> bool:
        return self.has_logits or self.targets is not None

    @property
    def has_logits(self) -> bool:
        """Whether the teacher's logits, or those of the mean of several, are made."""
        return self.teacher is not None or self.mixed is not None

    @property
    def has_teacher_entropy(self) -> bool:
        """The entropy of draws is not that of the distribution that they are of."""
        return self.has_teacher and not isinstance(self.targets, SampledTargets)


class ChunkedPass:
    """One forward pass over the chunks of the supervised tokens.

    Args:
        hidden_SH, labels_S: of the supervised tokens.
        rows: [S], which tokens of the call these are.
        taught: leading tokens of these that a term teaches; of the others there are sums, and no gradient.
        wanted: whether the gradients of hidden state, weight and bias are.
        half: on a GPU under autocast its dtype, in which the model would have made its logits; else None.
    """

    def __init__(
        self,
        hidden_SH: torch.Tensor,
        labels_S: torch.Tensor,
        rows: torch.Tensor,
        taught: int,
        call: Call,
        wanted: tuple[bool, ...],
        half: torch.dtype | None,
    ) -> None:
        self.labels, self.rows, self.taught, self.call = labels_S, rows, taught, call
        self.hidden, weight = one_dtype(hidden_SH, call.student.weight, half)
        self.student = replace(call.student, weight=weight)
        self.teacher, self.teacher_hidden = call.teacher, call.teacher_hidden
        if call.teacher is not None and call.teacher_hidden is not None:
            self.teacher_hidden, weight = one_dtype(call.teacher_hidden, call.teacher.weight, half)
            self.teacher = replace(call.teacher, weight=weight)
        self._softened: torch.Tensor | None = None  # of the block that is being made
        self.targets_device = None if call.targets is None else call.targets.indices.device
        self.mixed = None if call.mixed is None else _of_one_dtype(call.mixed, half)
        wants_hidden, wants_weight, wants_bias = wanted
        self.with_gradient = any(wanted)
        self.dtype = torch.promote_types(hidden_SH.dtype, torch.float32)
        device = hidden_SH.device
        tokens = torch.full((), len(labels_S), device=device)
        self.num_tokens = tokens
        self.inverse_items = 1 / normaliser(call.num_items, tokens).to(self.dtype)
        ce_rows, kd_rows = (
            None if given is None else given.to(device)[rows].to(self.dtype)
            for given in (call.ce_token_weights, call.kd_token_weights)
        )
        # Where KD has a denominator of its own, D / D_kd is in its weights, so that 1/D is left for both terms.
        self.kd_share = kd_share(kd_rows, call.num_items, call.num_kd_items, tokens)
        self.row_weights = RowWeights(None if kd_rows is None else kd_rows * self.kd_share, ce_rows)
        # A gradient is (g · scale) · left_to_scale: g is the tile's, with the terms' weights in it; `scale` is the
        # head's logit scale, a factor of each product; `left_to_scale`, 1/D, comes last, in backward, as a tensor: so
        # that D, which may still be on its way on a GPU, need not be waited for.
        self.options, self.left_to_scale = call.options, self.inverse_items
        self.scale = float(call.student.logit_scale)
        self.half = None
        if HalfGradients.fit(hidden_SH, call.student.weight) and taught:
            # Products that end as bfloat16 are rounded once: all factors, 1/D as well, go in before that. On a CPU
            # reading D costs nothing. The tile's g is made with weights times `unit`, and `scale` takes it out again.
            factor = self.scale * float(self.inverse_items)
            unit = power_of_two_unit(factor, call.options.ce_weight or call.options.kd_weight)
            self.options, self.scale = call.options.scaled(unit), factor / unit
            self.left_to_scale = torch.ones(())
            self.half = HalfGradients(hidden_SH[:taught], call.student.weight, self.scale, wants_hidden, wants_weight)
        # What is not wanted stays None.
        self.grad_hidden: torch.Tensor | None = None
        self.grad_weight: torch.Tensor | None = None
        self.grad_bias: torch.Tensor | None = None
        if wants_hidden and self.half is None:
            self.grad_hidden = torch.empty_like(hidden_SH[:taught], dtype=self.dtype)
        if wants_weight and self.half is None:
            self.grad_weight = torch.zeros_like(call.student.weight, dtype=self.dtype)
        if wants_bias:
            self.grad_bias = torch.zeros(len(call.student.weight), dtype=self.dtype, device=device)
        self.sums: list[TileSums] = []

    def all_chunks(self) -> None:
        """Compute everything, chunk by chunk, in buffers that are made once."""
        call, vocabulary = self.call, self.call.student.weight.shape[0]
        most = call.chunk_tokens or default_chunk(vocabulary, self.dtype, self.hidden.device)
        parts = self.taught, len(self.labels) - self.taught
        sizes = [size for part in parts for size in chunk_sizes(part, most)]
        if not sizes:
            return
        largest = max(sizes)
        tile = largest, vocabulary, self.dtype, self.hidden.device
        student = workspace.take("student", *tile)
        teacher = workspace.take("teacher", *tile) if call.mixed is not None else None
        if call.teacher is not None:  # whose vocabulary may be another one, see `uld.py`
            teacher = workspace.take("teacher", largest, len(call.teacher.weight), self.dtype, self.hidden.device)
        # Of a mean also a block for one teacher at a time, and one for the mean of the softened ones.
        mixing = [workspace.take(name, *tile) for name in self._mixing_blocks()]
        block = block_rows(vocabulary, student.device, largest)
        scratch = Buffers.like(student, block)
        start = 0
        for size in sizes:  # some chunks are shorter than the buffers
            chunk = slice(start, start + size)
            own = None if teacher is None else teacher[:size]
            self._chunk(chunk, student[:size], own, [one[:size] for one in mixing], block, scratch)
            start += size
        if self.half is not None:
            self.grad_hidden, self.grad_weight = self.half.finish()

    def _mixing_blocks(self) -> tuple[str, ...]:
        if self.mixed is None:
            return ()
        return ("one of several",) if self.options.temperature == 1 else ("one of several", "softened")

    def _mix(self, chunk: slice, teacher: torch.Tensor, one: torch.Tensor, softened: torch.Tensor | None) -> None:
        """The mean of several teachers' distributions for the tokens of a chunk, into `teacher` and `softened`."""
        assert self.mixed is not None
        run = Accumulator(teacher, softened, self.options.temperature)
        for hidden, head, share in zip(*vars(self.mixed).values(), strict=True):
            run.add(head.logits(hidden.index_select(0, self.rows[chunk]), one), share)
        run.finish()

    def _chunk(
        self,
        chunk: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        mixing: list[torch.Tensor],
        block: int,
        scratch: Buffers,
    ) -> None:
        """Logits of a chunk into `student` and `teacher`, their gradient over `student`, then the products of that."""
        head, hidden = self.student, self.hidden[chunk]
        head.logits(hidden, student)
        softened = mixing[1] if len(mixing) > 1 else None
        if teacher is not None and mixing:
            self._mix(chunk, teacher, mixing[0], softened)
        if teacher is not None and self.teacher is not None and self.teacher_hidden is not None:
            # The teacher's hidden states are of all tokens: gathered a chunk at a time, they are never copied whole.
            self.teacher.logits(self.teacher_hidden.index_select(0, self.rows[chunk]), teacher)
        # After this loop `student` holds d loss/d(hidden · weightᵀ + bias), but for `scale` and `left_to_scale`; of
        # tokens that nothing teaches it holds nothing.
        for first in range(0, len(student), block):
            inside = slice(first, min(first + block, len(student)))
            self._block(
                slice(chunk.start + inside.start, chunk.start + inside.stop),
                student[inside],
                None if teacher is None else teacher[inside],
                None if softened is None else softened[inside],
                scratch.rows(inside.stop - inside.start),
            )
        if chunk.start >= self.taught:
            return
        if self.grad_bias is not None:
            self.grad_bias.add_(student.sum(0), alpha=self.scale)
        if self.half is not None:
            self.half.add(chunk, student)
            return
        if self.grad_hidden is not None:
            self.grad_hidden[chunk] = hidden_gradient(student, head.weight, self.scale)
        if self.grad_weight is not None:
            add_weight_gradient(self.grad_weight, student, hidden, self.scale)

    def _block(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        softened: torch.Tensor | None,
        scratch: Buffers,
    ) -> None:
        """All terms of some rows; their gradient with respect to the raw logits is left in `student`."""
        call, options = self.call, self.options
        with_gradient = self.with_gradient and rows.start < self.taught
        if rows.start >= self.taught:  # a divergence that weighs nothing is not looked at
            options = replace(options, kd_weight=0.0, temperature=1.0)
        softcap = call.student.softcap if with_gradient else None
        # The derivative of y = softcap·tanh(x/softcap) is 1 − (y/softcap)². It needs y, which the gradient is about to
        # overwrite.
        slope = None if softcap is None else (student / softcap).square_().neg_().add_(1)
        self._softened = softened
        self._terms(rows, student, teacher, scratch, options, with_gradient)
        if slope is not None:
            student.mul_(slope)

    def _terms(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        scratch: Buffers,
        options: TileOptions,
        with_gradient: bool,
    ) -> None:
        """The sums of some rows into `sums`, and over their logits the gradient with respect to these."""
        call = self.call
        common = (
            self.labels[rows],
            self.row_weights[rows],
            options,
            scratch,
            with_gradient,
        )
        if call.targets is not None:
            # Row i of the targets is token i of the call, as with the teacher's hidden states.
            targets = call.targets[self.rows[rows].to(self.targets_device)].to(student.device)
            if isinstance(targets, SampledTargets):
                self.sums.append(sampled_tile_terms(student, targets, *common))
            else:
                self.sums.append(topk_tile_terms(student, targets, *common))
        else:
            terms = _compiled_tile_terms() if _compiles(student.device) else tile_terms
            self.sums.append(terms(student, teacher, *common, self._softened))

    def packed_sums(self) -> list[torch.Tensor]:
        """kd, ce, tokens, correct, agree, student entropy, teacher entropy: scalars, 0 where there is no teacher."""

        def total(name: str) -> torch.Tensor:
            values = [getattr(one, name) for one in self.sums if getattr(one, name) is not None]
            zero = torch.zeros((), dtype=self.dtype, device=self.labels.device)
            return torch.stack(values).sum() if values else zero

        names = ("kd", "ce", "correct", "agree", "student_entropy", "teacher_entropy")
        kd, ce, correct, agree, student_entropy, teacher_entropy = (total(name) for name in names)
        return [kd / self.kd_share, ce, self.num_tokens, correct, agree, student_entropy, teacher_entropy]


def _of_one_dtype(mixed: MixedHeads, half: torch.dtype | None) -> MixedHeads:
    pairs = [one_dtype(h, head.weight, half) for h, head in zip(mixed.hidden, mixed.heads, strict=True)]
    heads = tuple(replace(head, weight=weight) for head, (_, weight) in zip(mixed.heads, pairs, strict=True))
    return MixedHeads(tuple(hidden for hidden, _ in pairs), heads, mixed.shares)


def _compiles(device: torch.device) -> bool:
    """Whether the element-wise part runs as generated kernels: on a GPU some fifteen passes over memory become a few.

    On a CPU the blocks stay in the cache, and compiling would cost seconds and need a compiler.
    """
    return device.type == "cuda"


@functools.cache
def _compiled_tile_terms() -> Callable[..., TileSums]:
    return torch.compile(tile_terms)


def default_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a chunk: as many as two logit tiles of the budget hold, at least 64 and, on a CPU, at most 256."""
    budget = _TILE_BYTES.get(device.type, _TILE_BYTES["cuda"])
    largest = 256 if device.type == "cpu" else 8192
    return min(max(budget // (2 * vocabulary * dtype.itemsize), 64), largest)


def tile_bytes(
    tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_teacher: bool,
    mixing_tiles: int = 0,
) -> int:
    """Bytes of the buffers of one pass over so many supervised tokens: the logits' tiles, and the scratch.

    Args:
        mixing_tiles: further tiles, where the mean of several teachers is made: 3 with the temporary of a softmax, 5
            at another temperature than 1.
    """
    chunk = max(chunk_sizes(tokens, default_chunk(vocabulary, dtype, device)), default=0)
    block = block_rows(vocabulary, device, chunk)
    return dtype.itemsize * vocabulary * ((2 if with_teacher else 1) * chunk + mixing_tiles * chunk + 3 * block)


def block_rows(vocabulary: int, device: torch.device, chunk: int) -> int:
    """Rows of a chunk whose element-wise passes are made together."""
    return min(max(1, _BLOCK_VALUES // vocabulary), chunk) if device.type == "cpu" else chunk


def chunk_sizes(tokens: int, chunk: int) -> list[int]:
    """`tokens` in as few chunks as are needed, as equal as they can be, the larger ones first."""
    count = math.ceil(tokens / chunk)
    return [tokens // count + (i < tokens % count) for i in range(count)]
