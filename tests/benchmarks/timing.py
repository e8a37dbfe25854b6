"""Interleaved timing: on a machine that others use as well, only ratios within one round mean something."""

from __future__ import annotations

import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.benchmarks.cases import GIB, MEMORY_LIMIT, LossCase, estimated_bytes, forward_backward, make_inputs
from tests.benchmarks.peers import OURS, PEERS

SLOW_SECONDS = 120.0
"""A call that takes longer is left out of the rounds: its ratio to the others is not in doubt."""


@dataclass
class Timing:
    """One implementation in one case. `ratio` is the median over rounds of its time over ours in the same round."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"note": self.note} if self.note else {}
        if self.seconds:
            found |= {"median_s": statistics.median(self.seconds), "seconds": self.seconds}
        if self.ratios:
            found |= {"ratio": statistics.median(self.ratios), "ratios": self.ratios}
        return found


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds_of(call: Callable[[], Any]) -> float:
    """By events on the stream, so that a host that waits for nothing is not charged for starting kernels."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    before: Callable[[], None],
    clock: Callable[[Callable[[], Any]], float] = seconds_of,
) -> dict[str, Timing]:
    """Time every call once per round, in an order that is rotated from round to round.

    Args:
        before: runs untimed before each call (drops gradients).
        clock: seconds of one call.

    The warm-up call compiles what has to be compiled. A call that fails in it, or takes over SLOW_SECONDS, is noted.
    """
    timings = {name: Timing() for name in calls}
    running = []
    for name, call in calls.items():
        before()
        try:
            took = clock(call)
            if took > SLOW_SECONDS:  # perhaps it was the compilation
                before()
                took = clock(call)
        except Exception as error:  # a peer that fails is a result
            timings[name].note = describe(error)
            continue
        if took > SLOW_SECONDS and name != OURS:
            timings[name].note = f"left out: {took:.0f} s a call"
            continue
        running.append(name)
    for i in range(rounds):
        shift = i % max(len(running), 1)
        for name in running[shift:] + running[:shift]:
            before()
            gc.collect()
            timings[name].seconds.append(clock(calls[name]))
    before()
    ours = timings[OURS].seconds if OURS in timings else []
    for timing in timings.values():
        timing.ratios = [theirs / mine for theirs, mine in zip(timing.seconds, ours, strict=False)]
    return timings


def time_loss(
    case: LossCase,
    names: Sequence[str],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[Callable[[], Any]], float] = seconds_of,
) -> dict[str, Any]:
    """Forward and backward of each peer in `names` and of ours, as a row of the results."""
    # Otherwise the eighth size would silently run uncompiled, and a second size would be compiled for any size.
    torch._dynamo.reset()
    torch._dynamo.config.automatic_dynamic_shapes = False
    inputs = make_inputs(case, device)
    calls, notes = {}, {}
    for name in dict.fromkeys([OURS, *names]):
        peer, need = PEERS[name], estimated_bytes(PEERS[name], case)
        if not peer.installed:
            notes[name] = {"note": f"{peer.package} is not installed"}
        elif device == "cpu" and need > MEMORY_LIMIT:
            notes[name] = {"note": f"left out: needs about {need / GIB:.0f} GiB"}
        else:
            calls[name] = forward_backward(peer, case, inputs)
    timings = interleave(calls, rounds=rounds, before=inputs.forget_gradients, clock=clock)
    row = {"case": vars(case), "title": str(case), "peers": {n: t.as_dict() for n, t in timings.items()} | notes}
    ratios = ", ".join(f"{n} {t.as_dict().get('ratio', float('nan')):.2f}" for n, t in timings.items() if n != OURS)
    progress(f"{case}: {ratios}")
    return row


def describe(error: Exception) -> str:
    """One line for the table; a failed allocation has many forms and is called by one name."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or re.search(r"can't allocate memory|out of memory|bad_alloc", text):
        return "out of memory"
    return text.splitlines()[0][:160]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
