"""The three matrix products of a language-model head.

Shapes: C tokens of one chunk, S of all, H hidden width, V vocabulary.

bfloat16 logits would carry a relative error of 2⁻⁹, some hundredths of a nat, and cost 1 to 4 % in the gradient: half
precision goes in, float32 comes out. On CUDA that is one `mm(out_dtype=float32)`; on a CPU, whose bfloat16 product can
only return bfloat16, slices of the weight are widened to float32 on the way.

Gradients are float32 until all factors are in, with one exception: those of bfloat16 operands on a CPU
(`HalfGradients`), which end as bfloat16 anyway.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdtrain.losses.workspace import workspace

logger = logging.getLogger(__name__)

# Rows of a half-precision weight that are widened at a time on a CPU: few enough to be in its cache when they are used.
_WIDENED_ROWS = 1024
# Bytes of logits' gradients in bfloat16 that are kept for one product.
_HALF_BYTES = 192 * 2**20
# A product of float32 numbers that is further off than this was not computed in float32.
_FLOAT32_ERROR = 4e-6

# What was seen, by the dtype the left operand came from and the magnitude of the three sizes.
_computes_in_float32: dict[tuple[str | int, ...], bool] = {}


def project(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, out_CV: torch.Tensor) -> torch.Tensor:
    """out = hidden · weightᵀ, [C, V] in float32 (float64 for float64 inputs), written into `out_CV`.

    Both operands of one dtype on a GPU (see `one_dtype`), of any float dtypes on a CPU.
    """
    if hidden_CH.device.type == "cuda" and hidden_CH.dtype != out_CV.dtype:
        return torch.mm(hidden_CH, weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
    wide_hidden, source = hidden_CH.to(out_CV.dtype), (hidden_CH.dtype, weight_VH.dtype)
    if weight_VH.dtype == out_CV.dtype:
        return _mm(wide_hidden, weight_VH.t(), out_CV, source)
    for rows, wide in _widened(weight_VH, out_CV.dtype):
        _mm(wide_hidden, wide.t(), out_CV[:, rows], source)
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
        out = gradient_CV.new_empty(gradient_CV.shape[0], weight_VH.shape[1])
        return _mm(gradient_CV, weight_VH, out).mul_(scale)
    if weight_VH.device.type == "cuda":
        narrow = gradient_CV.to(weight_VH.dtype)
        return torch.mm(narrow, weight_VH, out_dtype=gradient_CV.dtype).mul_(scale)
    total = gradient_CV.new_zeros(gradient_CV.shape[0], weight_VH.shape[1])
    for rows, wide in _widened(weight_VH, gradient_CV.dtype):
        _addmm(total, gradient_CV[:, rows], wide, scale)
    return total


def add_weight_gradient(
    total_VH: torch.Tensor, gradient_CV: torch.Tensor, hidden_CH: torch.Tensor, scale: float, first: bool = False
) -> None:
    """total += scale · gradientᵀ · hidden, [V, H]; accumulated in float32 whatever the dtype of the weight.

    `first` writes instead of adding: what `total` holds then does not matter, and it need not be filled with zeros.
    """
    if first and hidden_CH.device.type == "cpu":
        _mm(gradient_CV.t(), hidden_CH.to(total_VH.dtype), total_VH)
        if scale != 1:
            total_VH.mul_(scale)
        return
    if first:
        total_VH.zero_()
    if hidden_CH.dtype != total_VH.dtype and hidden_CH.device.type == "cuda":
        narrow = gradient_CV.to(hidden_CH.dtype)
        total_VH.add_(torch.mm(narrow.t(), hidden_CH, out_dtype=total_VH.dtype), alpha=scale)
        return
    _addmm(total_VH, gradient_CV.t(), hidden_CH.to(total_VH.dtype), scale)


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
            out = self.grad_hidden[chunk]  # its numbers do not matter: beta is 0
            torch.addmm(out, narrow, self.weight, beta=0, alpha=self.scale, out=out)
        if self.wants_weight:
            self.first = chunk.start if self.filled == 0 else self.first
            self.filled += size

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both gradients; empty where they were not wanted."""
        self._flush()
        empty = self.hidden.new_zeros(0)
        return (
            empty if self.grad_hidden is None else self.grad_hidden,
            empty if self.grad_weight is None else self.grad_weight,
        )

    def _flush(self) -> None:
        if not self.filled or self.gradient is None:
            return
        tokens = slice(self.first, self.first + self.filled)
        product = torch.empty_like(self.weight)
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


def _mm(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, source: tuple[torch.dtype, ...] | None = None
) -> torch.Tensor:
    """out = a · b. `source` are the dtypes that they were widened from; None is their own."""
    key = _key(a, b, source)
    with _onednn(_computes_in_float32.get(key, True)):
        torch.mm(a, b, out=out)
    if key not in _computes_in_float32 and not _look(key, a, b, out):
        torch.mm(a, b, out=out)
    return out


def _addmm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """total += scale · a · b."""
    key = _key(a, b, None)
    if key not in _computes_in_float32:
        part = a[:1024]  # enough rows for the same kernel, without another tensor of the size of `total`
        with _onednn(True):
            product = torch.mm(part, b)
        _look(key, part, b, product)
    with _onednn(_computes_in_float32.get(key, False)):
        total.addmm_(a, b, alpha=scale)


def _key(a: torch.Tensor, b: torch.Tensor, source: tuple[torch.dtype, ...] | None) -> tuple[str | int, ...]:
    """Under what a product is remembered: where its operands came from, and the magnitude of its sizes.

    Operands that came from half precision stand apart: rounding does not change them, so they prove nothing for others.
    """
    return (
        a.device.type,
        str(source or (a.dtype, b.dtype)),
        str(a.dtype),
        *(size.bit_length() for size in (*a.shape, b.shape[1])),
    )


def _look(key: tuple[str | int, ...], a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> bool:
    """Whether a product made by oneDNN is a float32 one, by some of its numbers; remembered for all of its size.

    The default float32 product on a CPU is MKL's, which on AMD processors runs at less than half of oneDNN's rate. The
    public switch that leads to oneDNN also allows it to round its operands to bfloat16, which it does on processors
    with matrix units. So the first product of each size is looked at, and where oneDNN rounds the default is used.
    """
    if a.device.type != "cpu" or a.dtype != torch.float32:
        _computes_in_float32[key] = False  # the switch means nothing to it
        return True
    rows = torch.linspace(0, a.shape[0] - 1, min(8, a.shape[0])).long()
    cols = torch.linspace(0, b.shape[1] - 1, min(64, b.shape[1])).long()
    exact = a[rows].double() @ b[:, cols].double()
    if not 0 < exact.norm() < torch.inf:  # nothing to be seen in a product of zeros, or of NaN
        return True
    _computes_in_float32[key] = bool((product[rows][:, cols] - exact).norm() <= _FLOAT32_ERROR * exact.norm())
    if not _computes_in_float32[key]:
        logger.debug("oneDNN does not compute %s by %s in float32.", tuple(a.shape), tuple(b.shape))
    return _computes_in_float32[key]


@contextmanager
def _onednn(allowed: bool) -> Iterator[None]:
    """Let float32 products of this block go to oneDNN; the setting of the process is restored."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    # A setting of the process: two threads that change and restore it could leave it changed.
    alone = threading.current_thread() is threading.main_thread()
    if not allowed or not alone or matmul is None or not torch.backends.mkldnn.is_available():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
