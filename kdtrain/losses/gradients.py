"""From the gradients of the logits, chunk by chunk, to those of hidden state, head and bias.

Shapes: C tokens of one chunk, S of all, H hidden width, V vocabulary.

Gradients are float32 until all factors are in, with one exception: those of bfloat16 operands on a CPU
(`CpuHalfGradients`), which end as bfloat16 anyway.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from kdtrain.losses import gemm
from kdtrain.losses.gemm import add_weight_gradient, hidden_gradient
from kdtrain.losses.workspace import padded, workspace

# Bytes of logits' gradients in bfloat16 that are kept for one product.
_CPU_BYTES = 192 * 2**20
# The same on a GPU: at 152k words 1,536 tokens. Below some 1,000 the product with the hidden state takes longer to read
# and write the float32 total than to compute, and that with the head has too few tiles for all multiprocessors.
_GPU_BYTES = 448 * 2**20
_GPU_TOKENS = 2048
# Rows of the matrix products' tiles on a GPU.
GPU_ROWS = 128


class Wanted(NamedTuple):
    """Which gradients to make."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(Protocol):
    """Takes in the gradients of the chunks' logits, in order; what is not wanted stays None."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def room(self, tokens: int) -> torch.Tensor | None:
        """Where the gradient of the next chunk may be written in place of its logits, [C, V]; None is over these."""

    def add(self, chunk: slice, gradient_CV: torch.Tensor) -> None:
        """Take in the gradient of a chunk's logits, [C, V]: what `room` gave, or float32.

        Args:
            chunk: its tokens.
        """

    def finish(self) -> None:
        """After the last chunk."""


class WideGradients:
    """Float32 products of float32 gradients, whatever the operands' dtype (float64 of float64).

    Args:
        hidden_SH, weight_VH: the operands.
        dtype: of the gradients.
        scale: factor of all of them.
    """

    def __init__(
        self, hidden_SH: torch.Tensor, weight_VH: torch.Tensor, dtype: torch.dtype, scale: float, wanted: Wanted
    ) -> None:
        self._operands, self._scale = (hidden_SH, weight_VH), scale
        self.hidden = torch.empty_like(hidden_SH, dtype=dtype) if wanted.hidden else None
        self.weight = torch.zeros_like(weight_VH, dtype=dtype) if wanted.weight else None
        self.bias = hidden_SH.new_zeros(len(weight_VH), dtype=dtype) if wanted.bias else None

    def room(self, tokens: int) -> None:
        return None

    def add(self, chunk: slice, gradient_CV: torch.Tensor) -> None:
        hidden, weight = self._operands
        if self.bias is not None:
            self.bias.add_(gradient_CV.sum(0), alpha=self._scale)
        if self.hidden is not None:
            self.hidden[chunk] = hidden_gradient(gradient_CV, weight, self._scale)
        if self.weight is not None:
            add_weight_gradient(self.weight, gradient_CV, hidden[chunk], self._scale)

    def finish(self) -> None:
        return None


class GpuHalfGradients:
    """Gradients of half-precision operands on a GPU: half precision goes into the products, float32 comes out.

    The logits' gradients are kept in half precision, in a buffer of their own, until both products are made of many
    tokens together: generated kernels write them there at once. (Not over the logits, half as wide as these: threads
    that are ahead would write where others have yet to read.) They come in a unit in which the weight of the
    cross-entropy is a power of two, see `power_of_two_unit`.

    Args:
        hidden_SH, weight_VH: the operands, of one half-precision dtype.
    """

    def __init__(self, hidden_SH: torch.Tensor, weight_VH: torch.Tensor, wanted: Wanted, least: int) -> None:
        self._operands, self._wanted = (hidden_SH, weight_VH), wanted
        self.hidden = torch.empty_like(hidden_SH, dtype=torch.float32) if wanted.hidden else None
        self.weight: torch.Tensor | None = None
        self.bias = hidden_SH.new_zeros(len(weight_VH), dtype=torch.float32) if wanted.bias else None
        tokens = min(max(half_rows(len(weight_VH)), least), len(hidden_SH))
        columns, dtype, device = len(weight_VH), hidden_SH.dtype, hidden_SH.device
        self._kept = workspace.take("gradient", tokens, columns, dtype, device, padded(columns, device))
        self._first = self._filled = 0

    def room(self, tokens: int) -> torch.Tensor:
        if self._filled + tokens > len(self._kept):
            self._flush()
        return self._kept[self._filled : self._filled + tokens]

    def add(self, chunk: slice, gradient_CV: torch.Tensor) -> None:
        if gradient_CV.dtype != self._kept.dtype:
            gradient_CV = self.room(len(gradient_CV)).copy_(gradient_CV)
        self._first = chunk.start if self._filled == 0 else self._first
        self._filled += len(gradient_CV)

    def finish(self) -> None:
        self._flush()
        del self._kept
        if self._wanted.weight and self.weight is None:
            self.weight = torch.zeros_like(self._operands[1], dtype=torch.float32)

    def _flush(self) -> None:
        if not self._filled:
            return
        hidden, weight = self._operands
        tokens = slice(self._first, self._first + self._filled)
        gradient = self._kept[: self._filled]
        self._filled = 0
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=torch.float32))
        if self.hidden is not None:
            gemm.product(gradient, weight, self.hidden[tokens])
        if self._wanted.weight and self.weight is None:
            self.weight = torch.empty_like(weight, dtype=torch.float32)
            gemm.product(gradient.t(), hidden[tokens], self.weight)
        elif self.weight is not None:
            gemm.add_product(self.weight, gradient.t(), hidden[tokens])


def half_rows(vocabulary: int) -> int:
    """Tokens whose logits' gradients are kept for one product on a GPU."""
    rows = _GPU_BYTES // (2 * vocabulary) // GPU_ROWS * GPU_ROWS
    return min(max(rows, GPU_ROWS), _GPU_TOKENS)


class CpuHalfGradients:
    """Gradients of a bfloat16 hidden state and weight on a CPU, whose bfloat16 products are twice as fast as float32.

    The logits' gradient is rounded to bfloat16 (see `power_of_two_unit`), and each product once more, to what it would
    be handed out as. To keep it at one rounding the weight's product is made for as many tokens together as the buffer
    holds; where that takes several products, they are summed in float32.

    Args:
        hidden_SH, weight_VH: the operands, bfloat16.
        scale: factor of all gradients.
    """

    def __init__(self, hidden_SH: torch.Tensor, weight_VH: torch.Tensor, scale: float, wanted: Wanted) -> None:
        self._operands, self._scale, self._wanted = (hidden_SH, weight_VH), scale, wanted
        self.hidden = torch.empty_like(hidden_SH) if wanted.hidden else None
        self.weight: torch.Tensor | None = None
        self.bias = hidden_SH.new_zeros(len(weight_VH), dtype=torch.float32) if wanted.bias else None
        tokens = max(_CPU_BYTES // (weight_VH.shape[0] * weight_VH.itemsize), 1)
        self._tokens = min(tokens, len(hidden_SH)) if wanted.weight else 0
        self._kept: torch.Tensor | None = None
        self._first = self._filled = 0

    @staticmethod
    def fit(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether these operands are of the kind."""
        is_cpu = hidden.device.type == "cpu" and not gemm.on_gpu(hidden.device)
        return is_cpu and hidden.dtype == weight.dtype == torch.bfloat16

    def room(self, tokens: int) -> None:
        return None

    def add(self, chunk: slice, gradient_CV: torch.Tensor) -> None:
        size, weight = len(gradient_CV), self._operands[1]
        if self.bias is not None:
            self.bias.add_(gradient_CV.sum(0), alpha=self._scale)
        if self._filled + size > self._tokens:
            self._flush()
        if self._kept is None:
            shape = max(self._tokens, size), weight.shape[0]
            self._kept = workspace.take("gradient", *shape, weight.dtype, weight.device)
        narrow = self._kept[self._filled : self._filled + size].copy_(gradient_CV)
        if self.hidden is not None:
            out = self.hidden[chunk]  # a view of uninitialised memory; with beta = 0 it is written and not read
            torch.addmm(out, narrow, weight, beta=0, alpha=self._scale, out=out)
        if self._wanted.weight:
            self._first = chunk.start if self._filled == 0 else self._first
            self._filled += size

    def finish(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if not self._filled or self._kept is None:
            return
        hidden, weight = self._operands
        tokens = slice(self._first, self._first + self._filled)
        product = torch.empty_like(weight)  # written and not read, as above
        gradient = self._kept[: self._filled].t()
        torch.addmm(product, gradient, hidden[tokens], beta=0, alpha=self._scale, out=product)
        self._filled = 0
        if self.weight is None:
            self.weight = product
        else:
            self.weight = self.weight.float().add_(product)
