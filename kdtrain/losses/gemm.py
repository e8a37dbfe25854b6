"""The three matrix products of a language-model head.

Shapes: C tokens of one chunk, S of all, H hidden width, V vocabulary.

All of them are PyTorch's default products. No setting of the process is changed for them and none is chosen by what an
earlier product looked like, so that a number depends on the operands alone: not on the processor, not on what was
computed before.

bfloat16 logits would carry a relative error of 2⁻⁹, some hundredths of a nat, and cost 1 to 4 % in the gradient: half
precision goes in, float32 comes out. On a GPU that is one product with `out_dtype=float32` (`product`, `add_product`,
the only lines that a CPU cannot run); on a CPU, whose bfloat16 product can only return bfloat16, slices of the weight
are widened to float32 on the way.

What is made of them is in `gradients.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# Rows of a half-precision weight that are widened at a time on a CPU: few enough to be in its cache when they are used.
_WIDENED_ROWS = 1024
# `addmm` would say it better, but of its forms with `out_dtype` some releases want the addend in half precision, which
# its schema does not tell. `baddbmm`, where it is the one matrix of a batch, takes the float32 one in each of them.
_ADDS_IN_PRODUCT = "dtype_out" in torch.ops.aten.baddbmm.overloads()
# Rows of the total that are added at a time where there is no such form: no temporary of its size.
_ADDED_ROWS = 16384


def on_gpu(device: torch.device) -> bool:
    """Whether products of half precision are the device's own, with float32 results, and kernels are generated."""
    return device.type == "cuda"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which a model would make its logits here, on a GPU under autocast; else None."""
    under_autocast = device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if under_autocast else None


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = a · b on a GPU; both of one dtype, and `out` of that or, of half precision, float32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a · b, likewise, inside the product: the total is read and written once."""
    if _ADDS_IN_PRODUCT:
        batch = total[None]  # one object: of two views the sum would be copied first
        torch.baddbmm(batch, a[None], b[None], out_dtype=total.dtype, out=batch)
        return
    for first in range(0, len(total), _ADDED_ROWS):
        rows = slice(first, first + _ADDED_ROWS)
        total[rows].add_(torch.mm(a[rows], b, out_dtype=total.dtype))


def project(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, out_CV: torch.Tensor) -> torch.Tensor:
    """out = hidden · weightᵀ, [C, V] in float32 (float64 for float64 inputs), written into `out_CV`.

    Both operands of one dtype on a GPU (see `one_dtype`), of any float dtypes on a CPU.
    """
    if on_gpu(hidden_CH.device) and hidden_CH.dtype == weight_VH.dtype:
        return product(hidden_CH, weight_VH.t(), out_CV)
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
    if not on_gpu(hidden.device):
        return hidden, weight
    narrow = [x.dtype for x in (hidden, weight) if x.dtype.itemsize == 2]
    dtype = half or (narrow[0] if narrow else torch.promote_types(hidden.dtype, weight.dtype))
    return hidden.to(dtype), weight.to(dtype)


def hidden_gradient(gradient_CV: torch.Tensor, weight_VH: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · gradient · weight, [C, H] in the dtype of the gradient."""
    if weight_VH.dtype == gradient_CV.dtype:
        return torch.mm(gradient_CV, weight_VH).mul_(scale)
    total = gradient_CV.new_zeros(gradient_CV.shape[0], weight_VH.shape[1])
    for rows, wide in _widened(weight_VH, gradient_CV.dtype):
        total.addmm_(gradient_CV[:, rows], wide, alpha=scale)
    return total


def add_weight_gradient(
    total_VH: torch.Tensor, gradient_CV: torch.Tensor, hidden_CH: torch.Tensor, scale: float
) -> None:
    """total += scale · gradientᵀ · hidden, [V, H]; accumulated in float32 whatever the dtype of the weight."""
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


def _widened(weight_VH: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of the weight's rows in a wider dtype, through one buffer."""
    size = weight_VH.shape[0]
    buffer = weight_VH.new_empty(min(_WIDENED_ROWS, size), weight_VH.shape[1], dtype=dtype)
    for start in range(0, size, _WIDENED_ROWS):
        rows = slice(start, min(start + _WIDENED_ROWS, size))
        yield rows, buffer[: rows.stop - start].copy_(weight_VH[rows])
