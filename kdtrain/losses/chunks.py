"""The forward pass of the fused loss: all supervised tokens, chunk by chunk, to sums and finished gradients.

Shapes: N tokens of a call, S of them supervised, C tokens of one chunk, H hidden width, V vocabulary.

Two sizes are cut: the tokens into chunks, whose matrix products are large enough to be fast; a chunk into blocks, whose
element-wise passes stay in a CPU's cache. A chunk's logits live in one tile [C, V], and a block is a view of some of
its rows. The tile changes its meaning in place: logits, then their gradient, then the next chunk's logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kdtrain.losses import gemm
from kdtrain.losses.gemm import one_dtype, power_of_two_unit, project
from kdtrain.losses.generated import can_generate, generated_terms
from kdtrain.losses.gradients import CpuHalfGradients, GpuHalfGradients, Gradients, Wanted, WideGradients
from kdtrain.losses.head import Head, finish
from kdtrain.losses.kinds import Stretch
from kdtrain.losses.mixture import Accumulator, MixedHeads
from kdtrain.losses.reduce import kd_share, normaliser
from kdtrain.losses.sampled import SampledTargets, SparseTargets
from kdtrain.losses.sizes import block_rows, chunk_sizes, default_chunk, rows_of_products
from kdtrain.losses.sparse_tile import sampled_tile_terms, topk_tile_terms
from kdtrain.losses.tile import (
    Buffers,
    RowWeights,
    TileOptions,
    TileSums,
    tile_terms,
)
from kdtrain.losses.workspace import padded, workspace

# float16 has steps of 6e-8 near 0: of probabilities of 1e-5, as nearly all of a large vocabulary are, that is half a
# percent, and the same at every token. Sixteen times as large they keep their digits, and 4,000 times the weights of
# the terms is still no overflow. Weights of tokens, and D/D_kd with them, may be larger than that.
_FP16_UNIT = 16.0


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
    stretches: Sequence[Stretch] | None = None
    """See `head_distillation_loss`."""

    @property
    def only_some_are_taught(self) -> bool:
        """Whether no term reaches the tokens whose weight in the divergence is 0."""
        return self.kd_token_weights is not None and self.options.ce_weight == 0

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

    generates = True
    """Whether its terms are those of `tile.py`, which there are generated kernels of."""

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
        self.hidden, self.student = self._operands(hidden_SH, half)
        self.teacher, self.teacher_hidden = call.teacher, call.teacher_hidden
        if call.teacher is not None and call.teacher_hidden is not None:
            self.teacher_hidden, weight = one_dtype(call.teacher_hidden, call.teacher.weight, half)
            self.teacher = replace(call.teacher, weight=weight)
        self._softened: torch.Tensor | None = None  # of the block that is being made
        self.targets_device = None if call.targets is None else call.targets.indices.device
        self.mixed = None if call.mixed is None else _of_one_dtype(call.mixed, half)
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
        self.gradients = self._gradients(hidden_SH[:taught], wanted)
        self.kinds = self._kinds()
        self.sums: list[TileSums] = []

    def _operands(self, hidden_SH: torch.Tensor, half: torch.dtype | None) -> tuple[torch.Tensor, Head]:
        hidden_SH, weight = one_dtype(hidden_SH, self.call.student.weight, half)
        return hidden_SH, replace(self.call.student, weight=weight)

    def _project(self, chunk: slice, out: torch.Tensor) -> None:
        """The student's hidden · weightᵀ of a chunk, [C, V]."""
        project(self.hidden[chunk], self.student.weight, out)

    def _gradients(self, hidden_SH: torch.Tensor, wants: tuple[bool, ...]) -> Gradients:
        """What takes in the chunks' gradients; where they are rounded to half precision, in which unit."""
        wanted = Wanted(*wants)
        scale = float(self.call.student.logit_scale)
        weights = self.options.ce_weight or self.options.kd_weight
        weight_VH = self.call.student.weight
        if CpuHalfGradients.fit(hidden_SH, weight_VH) and self.taught:
            # Products that end as bfloat16 are rounded once: all factors, 1/D as well, go in before that. On a CPU
            # reading D costs nothing. The tile's g is made with weights times `unit`, and `scale` takes it out again.
            factor = scale * float(self.inverse_items)
            unit = power_of_two_unit(factor, weights)
            self.options = self.options.scaled(unit)
            self.left_to_scale = torch.ones(())
            return CpuHalfGradients(hidden_SH, weight_VH, factor / unit, wanted)
        narrow = self.hidden
        if gemm.on_gpu(narrow.device) and narrow.dtype.itemsize == 2 and self.taught and any(wanted):
            self._in_unit(narrow.dtype)
            return GpuHalfGradients(narrow[: self.taught], self.student.weight, wanted, self._most())
        return WideGradients(hidden_SH, weight_VH, self.dtype, scale, wanted)

    def _in_unit(self, dtype: torch.dtype) -> None:
        """Have the logits' gradients made in a unit in which they can be rounded to half precision."""
        options = self.options
        unit = power_of_two_unit(1.0, options.ce_weight or options.kd_weight)
        if dtype == torch.float16 and self.call.kd_token_weights is None:
            unit *= _FP16_UNIT
        self.options = options.scaled(unit)
        self.left_to_scale = self.inverse_items * (float(self.call.student.logit_scale) / unit)

    def _most(self) -> int:
        vocabulary = len(self.call.student.weight)
        return self.call.chunk_tokens or default_chunk(vocabulary, self.dtype, self.hidden.device)

    def all_chunks(self) -> None:
        """Compute everything, chunk by chunk, in buffers that are made once."""
        call, vocabulary = self.call, self.call.student.weight.shape[0]
        device = self.hidden.device
        parts = self.taught, len(self.labels) - self.taught
        sizes = [size for part in parts for size in chunk_sizes(part, self._most(), rows_of_products(device))]
        largest = max(sizes, default=0)
        tile = largest, vocabulary, self.dtype, device, padded(vocabulary, device)
        student = workspace.take("student", *tile)
        teacher = workspace.take("teacher", *tile) if call.mixed is not None else None
        if call.teacher is not None:  # whose vocabulary may be another one, see `uld.py`
            columns = len(call.teacher.weight)
            teacher = workspace.take("teacher", largest, columns, self.dtype, device, padded(columns, device))
        # Of a mean also a block for one teacher at a time, and one for the mean of the softened ones.
        mixing = [workspace.take(name, *tile) for name in self._mixing_blocks()]
        start = 0
        for size in sizes:  # some chunks are shorter than the buffers
            chunk = slice(start, start + size)
            own = None if teacher is None else teacher[:size]
            self._chunk(chunk, student[:size], own, [one[:size] for one in mixing])
            start += size
        self.gradients.finish()

    def _mixing_blocks(self) -> tuple[str, ...]:
        if self.mixed is None:
            return ()
        return ("one of several",) if self.options.temperature == 1 else ("one of several", "softened")

    def _mix(self, chunk: slice, teacher: torch.Tensor, one: torch.Tensor, softened: torch.Tensor | None) -> None:
        """The mean of several teachers' distributions for the tokens of a chunk, into `teacher` and `softened`."""
        assert self.mixed is not None
        block = block_rows(teacher.shape[1], teacher.device, len(teacher))
        parts = [slice(first, min(first + block, len(teacher))) for first in range(0, len(teacher), block)]
        soft = [None if softened is None else softened[part] for part in parts]
        runs = [
            Accumulator(teacher[part], own, self.options.temperature) for part, own in zip(parts, soft, strict=True)
        ]
        for hidden, head, share in zip(*vars(self.mixed).values(), strict=True):
            logits = head.logits(hidden.index_select(0, self.rows[chunk]), one)
            for run, part in zip(runs, parts, strict=True):
                run.add(logits[part], share)
        for run in runs:
            run.finish()

    def _kinds(self) -> list[tuple[int, TileOptions]]:
        """The terms of all tokens: behind the last token that has them, in order."""
        ends: list[tuple[int, TileOptions]] = []
        if self.call.stretches is None:
            ends.append((self.taught, self.options))
        for one in self.call.stretches or ():
            size = one.taught if self.call.only_some_are_taught else one.tokens
            ends.append((size + (ends[-1][0] if ends else 0), self.options.of(one)))
        # A divergence that weighs nothing is not made.
        return [*ends, (len(self.labels), replace(self.options, kd_weight=0.0, temperature=1.0))]

    def _pieces(self, chunk: slice) -> Iterator[tuple[slice, TileOptions]]:
        """The tokens of a chunk, by their terms."""
        start = chunk.start
        for end, options in self.kinds:
            if start < min(end, chunk.stop):
                yield slice(start, min(end, chunk.stop)), options
                start = min(end, chunk.stop)

    def _chunk(
        self, chunk: slice, student: torch.Tensor, teacher: torch.Tensor | None, mixing: list[torch.Tensor]
    ) -> None:
        """Products of a chunk into `student` and `teacher`, the gradient of its logits, then the products of that."""
        self._project(chunk, student)
        softened = mixing[1] if len(mixing) > 1 else None
        if teacher is not None and mixing:
            self._mix(chunk, teacher, mixing[0], softened)
        if teacher is not None and self.teacher is not None and self.teacher_hidden is not None:
            # The teacher's hidden states are of all tokens: gathered a chunk at a time, they are never copied whole.
            project(self.teacher_hidden.index_select(0, self.rows[chunk]), self.teacher.weight, teacher)
        # What follows leaves d loss/d(hidden · weightᵀ + bias), but for `scale` and `left_to_scale`, in `gradient`; of
        # tokens that nothing teaches it leaves nothing.
        wanted = self.with_gradient and chunk.start < self.taught
        room = self.gradients.room(len(student)) if wanted else None
        gradient = student if room is None else room
        for piece, options in self._pieces(chunk):
            own = slice(piece.start - chunk.start, piece.stop - chunk.start)
            tiles = student[own], None if teacher is None else teacher[own], None if softened is None else softened[own]
            if not self._generated(piece, *tiles, gradient[own], options, wanted):
                self._in_blocks(piece, *tiles, options, wanted)
                if room is not None:
                    room[own].copy_(student[own])
        if wanted:
            self.gradients.add(chunk, gradient)

    def _generated(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        softened: torch.Tensor | None,
        gradient: torch.Tensor,
        options: TileOptions,
        wanted: bool,
    ) -> bool:
        """All terms of some rows of a chunk in generated kernels, where there are any for them: if so, True."""
        serves = self.generates and self.call.targets is None
        if not (serves and gemm.on_gpu(student.device) and can_generate(len(student), student.device)):
            return False
        sums = generated_terms(
            student,
            teacher,
            self.labels[rows],
            self.row_weights[rows],
            options,
            (self.student, self.teacher),
            gradient if wanted else None,
            softened,
        )
        if sums is not None:
            self.sums.append(sums)
        return sums is not None

    def _in_blocks(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        softened: torch.Tensor | None,
        options: TileOptions,
        wanted: bool,
    ) -> None:
        """The same in operations on a few rows at a time; the gradient is left in `student`."""
        _finish(self.student, student)
        if teacher is not None and self.teacher is not None:
            _finish(self.teacher, teacher)
        block = block_rows(student.shape[1], student.device, len(student))
        scratch = Buffers.like(student, block)
        for first in range(0, len(student), block):
            inside = slice(first, min(first + block, len(student)))
            self._block(
                slice(rows.start + inside.start, rows.start + inside.stop),
                student[inside],
                None if teacher is None else teacher[inside],
                None if softened is None else softened[inside],
                scratch.rows(inside.stop - inside.start),
                options,
                wanted,
            )

    def _block(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        softened: torch.Tensor | None,
        scratch: Buffers,
        options: TileOptions,
        with_gradient: bool,
    ) -> None:
        """All terms of a block; their gradient with respect to the raw logits is left in `student`."""
        softcap = self.call.student.softcap if with_gradient else None
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
            self.sums.append(tile_terms(student, teacher, *common, self._softened))

    def found_gradients(self) -> list[torch.Tensor | None]:
        """Of hidden state, weight and bias; None where not wanted. They are scaled in place: take them once."""
        return [self.gradients.hidden, self.gradients.weight, self.gradients.bias]

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


def _finish(head: Head, product_CV: torch.Tensor) -> None:
    finish(product_CV, head.bias, head.logit_scale, head.softcap)
