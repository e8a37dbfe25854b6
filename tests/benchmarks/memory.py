"""Peak memory above the level just before a call, each in a process of its own: an allocator keeps what it has seen.

`python -m tests.benchmarks.memory JSON` is such a process: it measures what it is told and prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cases import GIB, MEMORY_LIMIT, LossCase, forward_backward, make_inputs
from tests.benchmarks.peers import PEERS
from tests.benchmarks.timing import describe, progress

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Every larger block is mapped and unmapped by itself: what a call frees is gone before the next is measured.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def can_measure() -> bool:
    """Linux, where a process may reset its own peak."""
    return _STATUS.exists() and os.access(_CLEAR_REFS, os.W_OK)


def limit_memory(limit: int = MEMORY_LIMIT) -> None:
    """Make allocations fail once about `limit` bytes are resident.

    The kernel limits addresses, not memory, so what is mapped and was never touched (libraries) is added.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        untouched = _status_bytes("VmSize") - _status_bytes("VmRSS")
        resource.setrlimit(resource.RLIMIT_AS, (untouched + limit, hard))


def peak_extra(call: Callable[[], Any]) -> int:
    """Bytes by which the resident memory rose above its level before the call, at its highest; gradients included."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    limit_memory()  # anew: libraries have been mapped since the last time
    before = _status_bytes("VmRSS")
    _CLEAR_REFS.write_text("5")
    call()
    return _status_bytes("VmHWM") - before


def in_child(spec: dict[str, Any], timeout: float = 900) -> dict[str, Any]:
    """Measure `spec` in a fresh process; a note where it could not be done."""
    if spec["kind"] != "step_times" and not can_measure():
        return {"note": "not measured: needs Linux's /proc/self/clear_refs"}
    command = [sys.executable, "-m", "tests.benchmarks.memory", json.dumps(spec)]
    environment = dict(os.environ) if spec["kind"] == "step_times" else os.environ | _ALLOCATOR
    try:
        child = subprocess.run(
            command, env=environment, cwd=_root(), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"note": f"left out: over {timeout:.0f} s"}
    if child.returncode < 0:
        return {"note": f"killed by signal {-child.returncode}"}
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        return {"note": (child.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    return json.loads(lines[-1])


def memory_of_losses(case: LossCase, names: list[str], threads: int) -> dict[str, Any]:
    """Peak extra memory of each peer in `names`, as a row of the results."""
    found: dict[str, Any] = {}
    for name in names:
        peer = PEERS[name]
        if not peer.installed:
            found[name] = {"note": f"{peer.package} is not installed"}
            continue
        spec = {"kind": "loss", "peer": name, "case": dataclasses.asdict(case), "threads": threads}
        found[name] = in_child(spec)
    text = ", ".join(f"{name} {format_result(result)}" for name, result in found.items())
    progress(f"memory, {case}: {text}")
    return {"case": vars(case), "title": str(case), "peers": found}


def format_result(result: dict[str, Any]) -> str:
    return f"{result['bytes'] / GIB:.2f} GiB" if "bytes" in result else result["note"]


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def _measure_loss(spec: dict[str, Any]) -> int:
    peer, case = PEERS[spec["peer"]], LossCase(**spec["case"])
    # What a library loads or keeps once is not the call's. A compiled peer is compiled for the size that is measured.
    small = dataclasses.replace(case, tokens=16, vocab=256)
    first = case if peer.compiled else small
    forward_backward(peer, first, make_inputs(first))()
    inputs = make_inputs(case)
    return peak_extra(forward_backward(peer, case, inputs))


def _child() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    limit_memory()
    try:
        result = _result(spec)
    except (RuntimeError, MemoryError) as error:
        result = {"note": describe(error)}
    print(json.dumps(result))


def _result(spec: dict[str, Any]) -> dict[str, Any]:
    from tests.benchmarks import itself, planned, step  # they start children by this module

    if spec["kind"] == "planned":
        return planned.measure_run(spec)
    if spec["kind"] == "itself":
        return {"bytes": itself.measure_memory(spec)}
    if spec["kind"] == "loss":
        return {"bytes": _measure_loss(spec)}
    if spec["kind"] == "step":
        return {"bytes": step.measure_memory(spec)}
    return step.measure_times(spec)


if __name__ == "__main__":
    _child()
