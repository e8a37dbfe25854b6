"""Where the time of our loss goes on a CPU: matrix products, element-wise work, and the rest.

By torch.profiler over one forward and backward. "Element-wise" is every recorded operation that is no matrix product,
copies and reductions included; "rest" is what the profiler does not attribute to an operation, Python above all.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.cases import LossCase, forward_backward, make_inputs
from tests.benchmarks.peers import OURS, PEERS
from tests.benchmarks.timing import progress, seconds_of

_GEMM = re.compile(r"(^|::|_)(mm|addmm|bmm|baddbmm|matmul|linear|linear_pointwise|mkl_linear)(_|\b|$)")
# A compiled region is one event; everything in it that is no product of ours is element-wise.
_OPERATION = re.compile(r"^(aten|mkldnn|mkl|prims|inductor)::|cpp_fused|Compiled")
_DTYPES = {"float": torch.float32, "c10::BFloat16": torch.bfloat16, "c10::Half": torch.float16, "double": torch.float64}

Shape = tuple[int, int, int, torch.dtype]
"""Rows, inner size, columns and dtype of a matrix product."""


def where_time_goes(case: LossCase, rounds: int) -> dict[str, Any]:
    """Shares of the call and the rate of its matrix products against bare ones of the same shapes."""
    inputs = make_inputs(case)
    call = forward_backward(PEERS[OURS], case, inputs)
    call()
    found = []
    for _ in range(rounds):
        inputs.forget_gradients()
        # Bare products right after each call: a neighbour on the machine slows both.
        found.append(_one_round(call))
    shares = {key: statistics.median(round_[key] for round_ in found) for key in found[0] if key != "products"}
    row = {"case": vars(case), "title": str(case), **shares, "products": found[-1]["products"]}
    progress(
        f"parts, {case}: GEMM {row['gemm_share']:.0%}, element-wise {row['elementwise_share']:.0%}, "
        f"rest {row['rest_share']:.0%}, GEMM rate {row['gemm_rate']:.0%} of a bare mm"
    )
    return row


def _one_round(call: Callable[[], Any]) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        wall = seconds_of(call)
    gemm = elementwise = 0.0
    products: Counter[Shape] = Counter()
    for event in profiler.events():
        if _is_gemm(event):
            gemm += event.self_cpu_time_total / 1e6
            if (shape := _shape(event)) is not None:
                products[shape] += 1
        elif _OPERATION.search(event.name):
            elementwise += event.self_cpu_time_total / 1e6
    assert products, "no matrix product was recorded: the profiler's names have changed"
    bare = sum(count * bare_mm_seconds(shape) for shape, count in products.items())
    flops = sum(2 * m * k * n * count for (m, k, n, _), count in products.items())
    return {
        "wall_s": wall,
        "gemm_share": gemm / wall,
        "elementwise_share": elementwise / wall,
        "rest_share": 1 - (gemm + elementwise) / wall,
        "gemm_rate": bare / gemm,
        "gemm_gflops": flops / gemm / 1e9,
        "products": [[*shape[:3], str(shape[3]), count] for shape, count in products.items()],
    }


def _is_gemm(event: FunctionEvent) -> bool:
    return _OPERATION.search(event.name) is not None and _GEMM.search(event.name) is not None


def _shape(event: FunctionEvent) -> Shape | None:
    """The product of the last two matrices among the arguments: addmm's first is what is added to.

    None for an operation that only calls the one that computes (matmul calls mm).
    """
    if any(_is_gemm(child) for child in event.cpu_children):
        return None
    matrices = [
        (shape, dtype)
        for shape, dtype in zip(event.input_shapes, event.input_dtypes, strict=False)
        if len(shape) == 2 and dtype in _DTYPES
    ]
    if event.name.endswith(("mm", "mm_")) and "addmm" not in event.name:
        matrices = matrices[:2]  # a third one is `out`
    elif "addmm" in event.name:
        matrices = matrices[-2:] if len(matrices) < 4 else matrices[1:3]
    if len(matrices) < 2:
        return None
    (a, dtype), (b, _) = matrices[0], matrices[1]
    columns = b[1] if b[0] == a[1] else b[0]  # linear takes its weight transposed
    return a[0], a[1], columns, _DTYPES[dtype]


def bare_mm_seconds(shape: Shape) -> float:
    """Seconds of `torch.mm` into an existing tensor, the best of the operands' four layouts."""
    rows, inner, columns, dtype = shape
    out = torch.empty(rows, columns, dtype=dtype)
    lefts = torch.randn(rows, inner).to(dtype), torch.randn(inner, rows).to(dtype).t()
    rights = torch.randn(inner, columns).to(dtype), torch.randn(columns, inner).to(dtype).t()
    torch.mm(lefts[0], rights[0], out=out)
    return min(seconds_of(lambda a=a, b=b: torch.mm(a, b, out=out)) for a in lefts for b in rights)
