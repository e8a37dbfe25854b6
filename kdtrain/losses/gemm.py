"""The three matrix products of a language-model head.

Shapes: C tokens of one chunk, S of all, H hidden width, V vocabulary.

All of them are PyTorch's default products. No setting of the process is changed for them and none is chosen by what an
earlier product looked like, so that a number depends on the operands alone: not on the processor, not on what was
computed before.

bfloat16 logits would carry a relative error of 2⁻⁹, some hundredths of a nat, and cost 1 to 4 % in the gradient: half
precision goes in, float32 comes out. On CUDA that is one `mm(out_dtype=float32)`; on a CPU, whose bfloat16 product can
only return bfloat16, slices of the weight are widened to float32 on the way.

Gradients are float32 until all factors are in, with one exception: those of bfloat16 operands on a CPU
(`HalfGradients`), which end as bfloat16 anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from kdtrain.losses.workspace import workspace

# Rows of a half-precision weight that are widened at a time on a CPU: few enough to be in its cache when they are used.
_WIDENED_ROWS = 1024
# Bytes of logits' gradients in bfloat16 that are kept for one product.
_HALF_BYTES = 192 * 2**20


def project(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, out_CV: torch.Tensor) -> torch.Tensor:
    """out = hidden · weightᵀ, [C, V] in float32 (float64 for float64 inputs), written into `out_CV`.

    Both operands of one dtype on a GPU (see `one_dtype`), of any float dtypes on a CPU.
    """
    if hidden_CH.device.type == "cuda" and hidden_CH.dtype != out_CV.dtype:
        return torch.mm(hidden_CH, weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
    wide_hidden = hidden_CH.to(out_CV.dtype)
    if weight_VH.dtype == out_CV.dtype:
        return torch.mm(wide_hidden, weight_VH.t(), out=out_CV)
    for rows, wide in _widened(weight_VH, out_CV.dtype):
        torch.mm(wide_hidden, wide.t(), out=out_CV[:, rows])
    return out_CV


def one_dtype(
    hidden: torch.Tensor, weight: torch.Tensor, half: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands as a GPU wants them: both in `half`, or where that is None in half precision if either is.

    On a CPU they stay as they are: there products are computed in float32 anyway, and widening is exact.
    """
    if hidden.device.type != "cuda":
        return hidden, weight
    narrow = [x.dtype for x in (hidden, weight) if x.dtype.itemsize == 2]
    dtype = half or (narrow[0] if narrow else torch.promote_types(hidden.dtype, weight.dtype))
    return hidden.to(dtype), weight.to(dtype)


def hidden_gradient(gradient_CV: torch.Tensor, weight_VH: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · gradient · weight, [C, H] in the dtype of the gradient."""
    if weight_VH.dtype == gradient_CV.dtype:
        return torch.mm(gradient_CV, weight_VH).mul_(scale)
    if weight_VH.device.type == "cuda":
        narrow = gradient_CV.to(weight_VH.dtype)
        return torch.mm(narrow, weight_VH, out_dtype=gradient_CV.dtype).mul_(scale)
    total = gradient_CV.new_zeros(gradient_CV.shape[0], weight_VH.shape[1])
    for rows, wide in _widened(weight_VH, gradient_CV.dtype):
        total.addmm_(gradient_CV[:, rows], wide, alpha=scale)
    return total


def add_weight_gradient(
    total_VH: torch.Tensor, gradient_CV: torch.Tensor, hidden_CH: torch.Tensor, scale: float
) -> None:
    """total += scale · gradientᵀ · hidden, [V, H]; accumulated in float32 whatever the dtype of the weight."""
    if hidden_CH.dtype != total_VH.dtype and hidden_CH.device.type == "cuda":
        narrow = gradient_CV.to(hidden_CH.dtype)
        total_VH.add_(torch.mm(narrow.t(), hidden_CH, out_dtype=total_VH.dtype), alpha=scale)
        return
    total_VH.addmm_(gradient_CV.t(), hidden_CH.to(total_VH.dtype), alpha=scale)


def power_of_two_unit(scale: float, weight: float) -> float:
    """The factor that a logits' gradient is multiplied by before it is rounded to bfloat16; the rest comes after.

    The cross-entropy subtracts its weight at every label. Rounded to bfloat16 that one number errs in the same
    direction at every token, by up to 0.4 %, which sums over tokens do not average out. A power of two is exact.

    Args:
        scale: all factors of the gradient but the weights of its terms.
        weight: of the cross-entropy; without one that of the divergence, which does so where the teacher is certain.
    """
    weight = weight or 1.0
    size = abs(scale) * weight
    return 2.0 ** round(math.log2(size)) / weight if 0 < size < math.inf else 1.0


class HalfGradients:
    """Gradients of a bfloat16 hidden state and weight on a CPU, whose bfloat16 products are twice as fast as float32.

    The logits' gradient is rounded to bfloat16 (see `power_of_two_unit`), and each product once more, to what it would
    be handed out as. To keep it at one rounding the weight's product is made for as many tokens together as the buffer
    holds; where that takes several products, they are summed in float32.

    Args:
        hidden_SH, weight_VH: the operands, bfloat16.
        scale: factor of both gradients.
        wants_hidden, wants_weight: which gradients to make.
    """

    def __init__(
        self, hidden_SH: torch.Tensor, weight_VH: torch.Tensor, scale: float, wants_hidden: bool, wants_weight: bool
    ) -> None:
        self.hidden, self.weight, self.scale = hidden_SH, weight_VH, scale
        self.grad_hidden = torch.empty_like(hidden_SH) if wants_hidden else None
        self.grad_weight: torch.Tensor | None = None
        self.wants_weight = wants_weight
        tokens = max(_HALF_BYTES // (weight_VH.shape[0] * weight_VH.itemsize), 1)
        self.tokens = min(tokens, len(hidden_SH)) if wants_weight else 0
        self.gradient: torch.Tensor | None = None
        self.first = self.filled = 0

    @staticmethod
    def fit(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether these operands are of the kind."""
        return hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.bfloat16

    def add(self, chunk: slice, gradient_CV: torch.Tensor) -> None:
        """Take in the gradient of a chunk's logits; chunks come in order.

        Args:
            chunk: its tokens.
            gradient_CV: [C, V] float32.
        """
        size = len(gradient_CV)
        if self.filled + size > self.tokens:
            self._flush()
        if self.gradient is None:
            shape = max(self.tokens, size), self.weight.shape[0]
            self.gradient = workspace.take("gradient", *shape, self.weight.dtype, self.weight.device)
        narrow = self.gradient[self.filled : self.filled + size].copy_(gradient_CV)
        if self.grad_hidden is not None:
            out = self.grad_hidden[chunk]  # a view of uninitialised memory; with beta = 0 it is written and not read
            torch.addmm(out, narrow, self.weight, beta=0, alpha=self.scale, out=out)
        if self.wants_weight:
            self.first = chunk.start if self.filled == 0 else self.first
            self.filled += size

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both gradients; None where they were not wanted."""
        self._flush()
        return self.grad_hidden, self.grad_weight

    def _flush(self) -> None:
        if not self.filled or self.gradient is None:
            return
        tokens = slice(self.first, self.first + self.filled)
        product = torch.empty_like(self.weight)  # written and not read, as above
        gradient = self.gradient[: self.filled].t()
        torch.addmm(product, gradient, self.hidden[tokens], beta=0, alpha=self.scale, out=product)
        self.filled = 0
        if self.grad_weight is None:
            self.grad_weight = product
        else:
            self.grad_weight = self.grad_weight.float().add_(product)


def _widened(weight_VH: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of the weight's rows in a wider dtype, through one buffer."""
    size = weight_VH.shape[0]
    buffer = weight_VH.new_empty(min(_WIDENED_ROWS, size), weight_VH.shape[1], dtype=dtype)
    for start in range(0, size, _WIDENED_ROWS):
        rows = slice(start, min(start + _WIDENED_ROWS, size))
        yield rows, buffer[: rows.stop - start].copy_(weight_VH[rows])
