"""The element-wise part of the loss as kernels that the compiler writes, for a GPU.

Shapes: R rows (tokens), V vocabulary.

What a CPU does in some thirty passes over blocks that stay in its cache would be thirty passes over memory here. The
same formulas (`tile.py`), traced as a function of the two products hidden · weightᵀ, become one kernel: each logit is
read once for the largest one of its row, once for Σ exp, once for the other sums and once for the gradient, which is
written in half precision where the next matrix product reads it. Nothing of size [R, V] is there beside that.

A kernel serves any number of rows, and any value of the weights, β and temperature: these are scalars on the device.
Others are compiled where a formula changes: another divergence, an end of β, no cross-entropy, no gradient. Each kind
has a code object of its own, so that the compiler's limit on versions of one function is never met.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch

from kdtrain.losses.derivatives import STUDENT_IS_BASE
from kdtrain.losses.head import Head, finish
from kdtrain.losses.tile import Buffers, Numbers, RowWeights, TileOptions, TileSums, tile_terms

logger = logging.getLogger(__name__)

_WEIGHTS = ("kd", "ce")

# A row is one program's, however few there are when a kernel is compiled: in parts, it would be read more often. And
# what is computed from logits is computed again where it is used again: arithmetic waits for memory anyway.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "split_reductions": False,
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 1000,
}


@dataclass(frozen=True)
class _Kind:
    """What kernels are compiled for."""

    options: TileOptions
    """Of the formulas; its weights, β and temperature stand for all that take the same ones."""
    constants: tuple[tuple[str, float], ...]
    """Of `Numbers`: those that are 0, or 1 and no weight. The others are given with each call."""
    student: tuple[float, float | None]
    """Logit scale and soft-cap."""
    teacher: tuple[float, float | None]
    shapes: tuple[object, ...]
    """Columns, dtypes and the arguments that are None: so that nothing else is ever a reason to compile again."""
    with_gradient: bool


def generated_terms(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    rows: RowWeights,
    options: TileOptions,
    heads: tuple[Head, Head | None],
    gradient: torch.Tensor | None,
    softened: torch.Tensor | None = None,
) -> TileSums | None:
    """`tile_terms` in generated kernels; None where this machine cannot generate any, and nothing was done.

    Args:
        student, teacher: [R, V], hidden · weightᵀ, which the heads make logits of. They stay as they are.
        heads: the student's; the teacher's, or None where `teacher` holds logits.
        gradient: [R, V] of any float dtype, or `student`, over which its gradient is then written: the derivative of
            the weighted terms with respect to `student`, but for the head's logit scale. None is no gradient.
    """
    head, other = heads
    numbers = options.numbers
    values = numbers._asdict()
    constants = {name: value for name, value in values.items() if value == 0 or (value == 1 and name not in _WEIGHTS)}
    given = [_scalar(value, student) for name, value in values.items() if name not in constants]
    teacher_bias = None if other is None else other.bias
    out = None if gradient is student else gradient
    tensors = (student, teacher, softened, labels, rows.kd, rows.ce, out)
    described = [None if x is None else (x.shape[1:], x.stride(), x.dtype) for x in (*tensors, head.bias, teacher_bias)]
    kind = _Kind(
        _representative(options),
        tuple(constants.items()),
        (head.logit_scale, head.softcap),
        (1.0, None) if other is None else (other.logit_scale, other.softcap),
        (student.device, *described),
        gradient is not None,
    )
    if kind in _without:
        return None
    for one in tensors:
        if one is not None:
            torch._dynamo.mark_dynamic(one, 0)
    return _run(kind, *tensors, head.bias, teacher_bias, *given)


def can_generate(rows: int, device: torch.device) -> bool:
    """Whether to try: not for one row, which would be a kind of its own."""
    return rows > 1 and device not in _without


_without: dict[torch.device | _Kind, str] = {}
"""Devices for which no kernel could be generated, kinds for which theirs could not, and why."""
_ran: set[_Kind] = set()


def _run(kind: _Kind, *arguments: torch.Tensor | None) -> TileSums | None:
    try:
        found: TileSums = _compiled(kind)(*arguments)
    except Exception as error:
        # A kind that has run before is not short of a compiler. What is wrong with the arguments is said again by the
        # slower way.
        if kind in _ran or any(isinstance(one, torch.OutOfMemoryError) for one in _chain(error)):
            raise
        _give_up(kind, next(one.device for one in arguments if one is not None), _reason(error))
        return None
    _ran.add(kind)
    return found


def _give_up(kind: _Kind, device: torch.device, reason: str) -> None:
    """Do without the kernels of a kind; of all kinds, where none has been compiled for the device yet."""
    if any(device in one.shapes for one in _ran):
        _without[kind] = reason
        logger.warning(
            "The loss with %s runs without generated kernels on %s, which takes more time: they could not be compiled "
            "(%s). Others could.",
            "cross-entropy alone" if ("kd", 0) in kind.constants else kind.options.divergence,
            device,
            reason,
        )
        return
    _without[device] = reason
    logger.warning(
        "The loss runs without generated kernels on %s, which takes more time: they could not be compiled (%s). "
        "Triton and a C compiler make them (a slim image lacks gcc; or set the variable CC).",
        device,
        reason,
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what was behind it: the compiler wraps them."""
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str:
    """One line of what went wrong first; the compiler says "… raised:" before it."""
    *_, error = _chain(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return lines[0] if lines else type(error).__name__


@functools.cache
def _compiled(kind: _Kind) -> Callable[..., TileSums]:
    # Versions are counted by code object. That of `functools.partial` would be one for all kinds.
    code = _tile.__code__.replace(co_name=f"tile_{_compiled.cache_info().currsize}")
    tile = FunctionType(code, _tile.__globals__, code.co_name)
    tile.__kwdefaults__ = {"kind": kind}
    return torch.compile(tile, dynamic=False, fullgraph=True, options=_OPTIONS)


def _tile(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    softened: torch.Tensor | None,
    labels: torch.Tensor,
    kd_rows: torch.Tensor | None,
    ce_rows: torch.Tensor | None,
    out: torch.Tensor | None,
    bias: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    *given: torch.Tensor,
    kind: _Kind,
) -> TileSums:
    """What is compiled. Its copies and scratch are values in registers: nothing of them is ever in memory."""
    numbers = _numbers(kind, given)
    scale, softcap = kind.student
    logits = finish(student.clone(), bias, scale, softcap)
    others = None if teacher is None else finish(teacher.clone(), teacher_bias, *kind.teacher)
    # The derivative of y = softcap·tanh(x/softcap) is 1 − (y/softcap)².
    slope = None if softcap is None else 1 - (logits / softcap).square()
    scratch = Buffers(*(torch.empty_like(logits) for _ in range(3)))
    sums = tile_terms(
        logits,
        others,
        labels,
        RowWeights(kd_rows, ce_rows),
        kind.options,
        scratch,
        kind.with_gradient,
        None if softened is None else softened.clone(),
        numbers,
    )
    if kind.with_gradient:
        (student if out is None else out).copy_(logits if slope is None else logits * slope)
    return sums


def _numbers(kind: _Kind, given: tuple[torch.Tensor, ...]) -> Numbers:
    constants, rest = dict(kind.constants), iter(given)
    return Numbers(*(constants[name] if name in constants else next(rest) for name in Numbers._fields))


def _representative(options: TileOptions) -> TileOptions:
    """The same for all options that have the same formulas."""
    beta = options.beta
    if 0 < beta < 1:
        beta = STUDENT_IS_BASE if beta <= STUDENT_IS_BASE else 0.95
    # The numbers say which of the others are 0 or 1.
    return replace(options, kd_weight=1.0, ce_weight=1.0, temperature=1.0, beta=beta)


def _scalar(value: Any, like: torch.Tensor) -> torch.Tensor:
    """By filling, which needs no copy from the host that would be waited for."""
    return torch.full((), value, dtype=like.dtype, device=like.device)
