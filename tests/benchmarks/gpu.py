"""The same comparison on a CUDA device: times by events, memory by the caching allocator, one size.

The floor is the four matrix products of the loss alone (both models' logits, the gradients of the student's hidden
state and head) over the same supervised tokens, in chunks, without anything between them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.cases import Inputs, LossCase, errors, expected, forward_backward, make_inputs
from tests.benchmarks.peers import IGNORE_INDEX, OURS, PEERS
from tests.benchmarks.timing import cuda_seconds_of, describe, interleave, progress

# Every second token is supervised: 8192 of them.
CASE = LossCase(tokens=16384, vocab=151936, dtype="bfloat16", student_hidden=2048, teacher_hidden=4096)
NAMES = [OURS, "liger_compiled_sup", "trl_chunked_sup", "trl_dense_sup"]
FOUR_GEMMS = "four_gemms"


def four_gemms(inputs: Inputs, chunk: int = 2048) -> Callable[[], None]:
    """The products without the loss; `chunk` rows at a time, as large as cuBLAS needs for its full rate."""
    keep = inputs.labels != IGNORE_INDEX
    student, teacher = inputs.student_hidden.detach()[keep], inputs.teacher_hidden[keep]
    weight, teacher_weight = inputs.student_weight.detach(), inputs.teacher_weight

    def call() -> None:
        grad_hidden, grad_weight = torch.empty_like(student), torch.zeros_like(weight)
        logits = weight.new_empty(chunk, weight.shape[0])
        for start in range(0, len(student), chunk):
            rows = slice(start, min(start + chunk, len(student)))
            tile = logits[: len(student[rows])]
            torch.mm(teacher[rows], teacher_weight.t(), out=tile)
            torch.mm(student[rows], weight.t(), out=tile)
            torch.mm(tile, weight, out=grad_hidden[rows])
            torch.addmm(grad_weight, tile.t(), student[rows], out=grad_weight)

    return call


def measure(case: LossCase, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """Times, and on CUDA the peak extra memory (the head's gradient apart), of each implementation, as one row."""
    torch._dynamo.reset()
    is_cuda = device == "cuda"
    inputs = make_inputs(case, device)
    names = [name for name in NAMES if PEERS[name].installed]
    calls: dict[str, Callable[[], Any]] = {n: forward_backward(PEERS[n], case, inputs) for n in names}
    timings = interleave(
        calls | {FOUR_GEMMS: four_gemms(inputs)},
        rounds=rounds,
        before=inputs.forget_gradients,
        **({"clock": cuda_seconds_of} if is_cuda else {}),
    )
    found = {name: timing.as_dict() for name, timing in timings.items()}
    head_gradient = inputs.student_weight.numel() * inputs.student_weight.element_size()
    for name in names if is_cuda else ():
        inputs.forget_gradients()
        found[name] |= _peak(calls[name], head_gradient)
    found |= {n: {"note": f"{PEERS[n].package} is not installed"} for n in NAMES if n not in names}
    row = {"case": vars(case), "title": str(case), "peers": found}
    row |= {"device": torch.cuda.get_device_name() if is_cuda else "CPU"}
    progress(f"{device}, {case}: " + ", ".join(f"{n} {r.get('ratio', float('nan')):.2f}" for n, r in found.items()))
    return row


def _peak(call: Callable[[], Any], head_gradient: int) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        call()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"memory": {"note": describe(error)}}
    return {"memory": {"bytes": torch.cuda.max_memory_allocated() - before - head_gradient}}


def measure_errors(case: LossCase) -> dict[str, Any]:
    """Errors against float64 at a size where the float64 gradients fit beside the rest."""
    inputs = make_inputs(case, "cuda")
    exact = expected(case, inputs)
    found: dict[str, Any] = {}
    for name in (name for name in NAMES if PEERS[name].installed):
        inputs.forget_gradients()
        found[name] = errors(inputs, forward_backward(PEERS[name], case, inputs)(), exact)
    return {"case": vars(case), "title": str(case), "peers": found}
