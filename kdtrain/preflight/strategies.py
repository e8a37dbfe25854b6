"""A run on N devices, by each way of spreading it: memory, bytes that are sent, seconds of a step.

    python -m tests.benchmarks.spread    compares both with what two ranks hold and send

What is sent, by each device and for each optimizer step, of N devices in a ring. G are the bytes of the gradients, W of
the student's weights, U of those that are trained, T of the teacher's, A micro-batches, and f = (N − 1)/N:

| | gradients | weights | the teacher's weights, in pieces |
|---|---|---|---|
| DDP | all-reduce, once: 2·f·G | 0 | A·f·T |
| FSDP 2 | reduce-scatter, once: f·G | gathered for forward and backward: 2·A·f·W | A·f·T |
| ZeRO-2 | all-reduce in each micro-batch: 2·A·f·G | what was trained is gathered once: f·U | A·f·T |
| ZeRO-3 | reduce-scatter in each micro-batch: A·f·G | gathered for forward and backward: 2·A·f·W | A·f·T |

DeepSpeed's stages 1 and 2 keep a piece of each sum and make it by all-reduce (`use_multi_rank_bucket_allreduce`, its
default), which sends twice what a reduce-scatter would. Metrics and D are some hundred bytes. Written answers send
more: each new token of a student in pieces gathers it again. For FSDP 2 it is an upper bound: what stays whole from a
forward to its next use is not gathered again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kdtrain.config.tree import Problem
from kdtrain.disk import in_units
from kdtrain.preflight.memory import MemoryPlan, Setup, Simulations, plan_memory
from kdtrain.preflight.sharding import DEEPSPEED_BUCKET, Kind, Sharding
from kdtrain.preflight.simulated import NotSimulated, weights_of

STRATEGIES: dict[Kind, str] = {"ddp": "DDP", "fsdp": "FSDP 2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
"""By kind, in the order in which they are listed."""
BANDWIDTH = 50e9
"""Bytes a second that a device sends, where nobody says otherwise: a network card of 400 Gbit/s for each."""


@dataclass(frozen=True)
class Spread:
    """A run on its devices, in one way."""

    kind: Kind
    teacher_in_pieces: bool | None
    """None where no teacher is in memory."""
    memory: MemoryPlan
    sent: int
    """Bytes that each device sends for an optimizer step."""


def spreads(setup: Setup, devices: int, simulations: Simulations | None = None) -> Iterator[Spread]:
    """Each strategy on so many devices, with the teacher on each of them and in pieces.

    Raises:
        NotSimulated: a model's code cannot be run without numbers.
    """
    simulations = simulations or Simulations()
    for kind in STRATEGIES:
        for in_pieces in _of_teacher(setup):
            bucket = DEEPSPEED_BUCKET if kind.startswith("zero") else 0
            if kind == setup.sharding.kind:  # as its own file says
                bucket = setup.sharding.bucket
            changed = replace(setup, world=devices, sharding=Sharding(kind, in_pieces, bucket), placement="auto")
            plan = plan_memory(changed, simulations)
            yield Spread(kind, in_pieces, plan, sent_bytes(changed, simulations))


def _of_teacher(setup: Setup) -> tuple[bool | None, ...]:
    """Whether the teacher is in pieces; a quantised one never is."""
    if setup.teacher is None:
        return (None,)
    return (False,) if setup.teacher.quantization is not None else (False, True)


def sent_bytes(setup: Setup, simulations: Simulations) -> int:
    """Bytes that each device sends for an optimizer step; the formula is in the module's head."""
    step = simulations.step(setup)
    scale = setup.sharding.weight_scale(setup.shape.autocast)
    gradients, trained, weights = scale * step.trained, scale * step.trained, scale * step.weights
    batches, kind = setup.shape.micro_batches, setup.sharding.kind
    sent = {
        "ddp": 2 * gradients,
        "zero1": 2 * gradients + trained,
        "zero2": 2 * batches * gradients + trained,
        "zero3": batches * gradients + 2 * batches * weights,
        "fsdp": gradients + 2 * batches * weights,
    }[kind]
    if setup.teacher is not None and setup.teacher_rows and setup.teacher_pieces > 1:
        sent += batches * weights_of(setup.teacher)[0]
    return int(sent * (setup.world - 1) / setup.world)


def step_seconds(spread: Spread, measured: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of a step at the least and at the most: all that is sent while devices compute, or none of it.

    Args:
        measured: seconds of a step of the same rows on one such device.
        bandwidth: bytes a second that a device sends.
    """
    sending = spread.sent / bandwidth
    return max(measured, sending), measured + sending


def strategy_findings(
    setup: Setup, devices: int, limit: int | None, bandwidth: float, measured: float | None
) -> list[Problem]:
    """One line for each strategy: what a device takes, whether that fits, what it sends, how long a step takes."""
    path = ("launch", "num_processes")
    try:
        found = list(spreads(setup, devices))
    except NotSimulated:  # the memory finding says why
        return []
    unit = f"{bandwidth / 1e9:g} GB/s"
    said = [Problem(path, _line(one, devices, limit, bandwidth, measured), level="info") for one in found]
    hint = "" if measured else "; --step-time SECONDS, of one such device, tells how long a step takes"
    what = f"Sent at {unit} a device (--bandwidth), shortest where all of it is hidden behind the computing{hint}"
    return [*said, Problem(path, what, level="info")]


def _line(spread: Spread, devices: int, limit: int | None, bandwidth: float, measured: float | None) -> str:
    teacher = {None: "", False: ", the teacher on each", True: ", the teacher in pieces"}[spread.teacher_in_pieces]
    total = spread.memory.total
    fits = "" if limit is None else f" of {in_units(limit)}, {'fits' if total <= limit else 'does not fit'}"
    parts = ", ".join(f"{name} {in_units(size)}" for name, size in spread.memory.parts.items())
    name = f"{devices} devices, {STRATEGIES[spread.kind]}{teacher}"
    text = f"{name}: {in_units(total)}{fits} ({parts}); sends {in_units(spread.sent)} a step"
    if measured is None:
        return f"{text}, {spread.sent / bandwidth:.2g} s"
    least, most = step_seconds(spread, measured, bandwidth)
    return f"{text}; {least:.2f} to {most:.2f} s a step"
