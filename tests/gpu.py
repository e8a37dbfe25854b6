"""A first look at a GPU: what breaks, then numbers. At most eight minutes, each part with a limit of its own.

    python -m tests.gpu [--device cpu] [--small] [--only machine,speed] [--out DIR]

Every part is a process: one that crashes the device or hangs does not take the others with it. Each prints a line when
it ends; everything is in `gpu.json` and `gpu.md` of DIR (by default $OUT, else the working directory), written anew
after each part. `--device cpu --small` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests import gpu_fast as fast
from tests import gpu_right as right
from tests.benchmarks.gpu import FOUR_GEMMS
from tests.benchmarks.peers import OURS
from tests.gpu_right import Found
from tests.gpu_trainings import trainings

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"machine": 30, "products": 30, "oracle": 95, "trainings": 115, "speed": 90, "end_to_end": 70, "profile": 50}
"""Seconds of each part, in their order; eight minutes in all."""
SPARE = 25
"""Seconds before its limit after which a part that has many things to try begins none: it ends by itself."""

PARTS: dict[str, Callable[[str, bool, float], Found]] = {
    part.__name__: part
    for part in (
        right.machine, right.products, right.oracle, trainings, fast.speed, fast.end_to_end, fast.profile
    )
}  # fmt: skip


# ---- what is demanded of an H100 or H200 -----------------------------------------------------------------------------


def demands(found: Found) -> Iterator[tuple[str, str, bool]]:
    """What has to hold, what was found, and whether it does; of the parts that have ended."""
    results = {name: one["result"] for name, one in found.items() if "result" in one}
    for name, one in results.get("oracle", {}).items():
        yield f"the loss is right: {name}", f"{one['failed']} of {one['ran']} wrong", one["failed"] == 0
    for name, one in results.get("trainings", {}).items():
        yield f"training: {name}", one if isinstance(one, str) else "another", one == "equal"
    for name, peers in results.get("speed", {}).items():
        yield from _of_loss(name, peers)
    ends = {name: one for name, one in results.get("end_to_end", {}).items() if isinstance(one, dict)}
    if fast.OURS in ends:
        mine = ends[fast.OURS]
        yield (
            "a training's share of the matrix rate, over 50 %",
            f"{mine['utilisation']:.0%}",
            mine["utilisation"] > 0.5,
        )
        if "TRL GKDTrainer" in ends:
            times = mine["tokens_per_second"] / ends["TRL GKDTrainer"]["tokens_per_second"]
            yield "tokens a second, at least 1.5 × TRL GKDTrainer", f"{times:.2f}", times >= 1.5


def _of_loss(name: str, peers: Found) -> Iterator[tuple[str, str, bool]]:
    mine = peers[OURS]
    for other, what, least in (
        (FOUR_GEMMS, "within 1.35 × the four products", 1 / 1.35),
        ("liger_compiled_sup", "at least 1.3 × Liger compiled", 1.3),
        ("trl_chunked_sup", "at least 1.8 × TRL's kernel", 1.8),
    ):
        if isinstance(peers[other]["ms"], float) and isinstance(mine["ms"], float):
            times = peers[other]["ms"] / mine["ms"]
            yield f"loss, {name}: {what}", f"{1 / times if least < 1 else times:.2f}", times >= least
    yield f"loss, {name}: at most 1.8 GiB beside the head's gradient", f"{mine['extra_gib']}", mine["extra_gib"] <= 1.8


# ---- running them ----------------------------------------------------------------------------------------------------


def run_part(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One part in a process of its own; what it had printed by then, where it fails or takes too long."""
    target = options.out / f".{name}.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu", "--part", name, "--device", options.device, "--out", str(options.out)]
    command += ["--small"] if options.small else []
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        limit = LIMITS[name]
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 9)
            process.wait()
        output.seek(0)
        said = output.read().splitlines()
    found = {"seconds": round(time.perf_counter() - began, 1)}
    if target.exists():
        return {**found, "result": json.loads(target.read_text())}
    why = f"over {limit} s" if code is None else f"ended with {code}"
    partly = [line for line in said if line.startswith("{")]
    return {**found, "error": why, "said": said[-6:], "until then": partly}


def write(found: dict[str, Any], out: Path) -> None:
    """Both files."""
    (out / "gpu.json").write_text(json.dumps(found, indent=1))
    rows = [f"| {what} | {value} | {'yes' if holds else 'no'} |" for what, value, holds in demands(found)]
    lines = ["# A look at a GPU", "", "| demanded | found | holds |", "|---|---|---|", *rows, ""]
    for name, one in found.items():
        lines += [f"## {name}: {one.get('error', 'ran')}, {one['seconds']} s", ""]
        if PARTS[name].__doc__:
            lines += [str(PARTS[name].__doc__), ""]
        shown = one.get("result", one)
        lines += [f"- {key}: {json.dumps(value)}" for key, value in shown.items()] + [""]
    (out / "gpu.md").write_text("\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """0 where every part ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        warnings.filterwarnings("ignore")
        result = PARTS[options.part](options.device, options.small, LIMITS[options.part] - SPARE)
        (options.out / f".{options.part}.json").write_text(json.dumps(result))
        return 0
    found: dict[str, Any] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        found[name] = run_part(name, options)
        (options.out / f".{name}.json").unlink(missing_ok=True)
        write(found, options.out)
        print(name, json.dumps(found[name]), flush=True)
    return int(any("error" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
