"""Results as Markdown for a reader and JSON for a program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import requirements
from tests.benchmarks.angles import TAILS
from tests.benchmarks.gpu import FOUR_GEMMS
from tests.benchmarks.memory import format_result
from tests.benchmarks.peers import PEERS
from tests.benchmarks.step import PATHS

DATA = "results.json"
_METHOD = """\
Every row is one loss, kd_weight · mean JSD_β + ce_weight · mean CE over supervised tokens, by different code; a test
holds that values and gradients agree. Times are forward and backward, {threads} thread(s), all implementations in one
process, one after the other in rotated order; a ratio is the median over {rounds} rounds of their time over ours in the
same round, so above 1 ours is faster. Memory is the peak above the level just before the call, in a fresh process that
may use 13 GiB, gradients included and inputs not. Errors are relative, by norm, against float64."""


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """`results.md` and `results.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / "results.md", folder / DATA
    markdown.write_text(as_markdown(results))
    data.write_text(json.dumps(results, indent=1, ensure_ascii=False, default=str) + "\n")
    return [markdown, data]


def as_markdown(results: dict[str, Any]) -> str:
    settings = results["settings"]
    parts = [f"# Benchmark of the distillation loss\n\n{_METHOD.format(**settings)}", _machine(results["machine"])]
    if settings["quick"]:
        parts.append("**A quick run at small sizes: it shows that everything runs, and nothing about speed.**")
    elif judged := requirements.rows(results):
        parts.append(_requirements(judged))
    for key, heading, table in _SECTIONS:
        if results.get(key):
            parts.append(f"## {heading}\n\n{table(results[key])}")
    return "\n\n".join(parts) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['blas']}",
        f"- {machine['os']}",
        f"- {versions}, commit {machine['commit']}",
        f"- {machine['date']}, load average {machine['load']} at the start",
    ]
    return "\n".join(lines if not machine["gpu"] else [f"- {machine['gpu']}", *lines])


def _requirements(rows: Sequence[requirements.Row]) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    held = sum(row.holds is True for row in rows)
    table = _table(
        ["measured", "against", "required", "found", "holds"],
        ([row.measured, row.against, row.required, row.value, words[row.holds]] for row in rows),
    )
    return f"## Required\n\n{held} of {len(rows)} hold.\n\n{table}"


def _times(part: list[dict[str, Any]]) -> str:
    rows = []
    for row in part:
        for name, found in row["peers"].items():
            median, ratio = found.get("median_s"), found.get("ratio")
            rows.append([
                row["title"],
                _title(name),
                found.get("note", "") if median is None else f"{median:.3f} s",
                "" if ratio is None else f"{ratio:.2f}×",
            ])  # fmt: skip
    return _table(["case", "implementation", "median", "their time / ours"], rows)


def _errors(part: list[dict[str, Any]]) -> str:
    keys = ("loss", "grad_hidden", "grad_weight")
    return _table(
        ["case", "implementation", "value", "gradient of the hidden state", "gradient of the head"],
        (
            [
                row["title"],
                _title(name),
                *(f"{found[key]:.1e}" if key in found else found.get("note", "") for key in keys),
            ]
            for row in part
            for name, found in row["peers"].items()
        ),
    )


def _memory(part: list[dict[str, Any]]) -> str:
    return _table(
        ["case", "implementation", "peak extra memory"],
        ([row["title"], _title(name), format_result(found)] for row in part for name, found in row["peers"].items()),
    )


def _steps(part: list[dict[str, Any]]) -> str:
    rows = []
    for row in part:
        for name, found in row["peers"].items():
            time = f"{found['median_s']:.2f} s" if "median_s" in found else found.get("note", "")
            ratio = f"{found['ratio']:.2f}×" if "ratio" in found else ""
            loss = "" if found.get("loss") is None else f"{found['loss']:.6f}"
            memory = format_result(found["memory"]) if "memory" in found else ""
            rows.append([row["title"], PATHS[name], time, ratio, memory, loss])
    return "KD alone, β 0.5: TRL's trainers have no cross-entropy.\n\n" + _table(
        ["case", "path", "median", "their time / ours", "peak extra memory", "loss"], rows
    )


def _parts(part: list[dict[str, Any]]) -> str:
    keys = ("gemm_share", "elementwise_share", "rest_share", "gemm_rate")
    heads = ["case", "seconds", "GEMM", "element-wise", "rest", "rate / bare `mm`", "GFLOP/s"]
    return _table(
        heads,
        (
            [row["title"], f"{row['wall_s']:.2f}", *(f"{row[k]:.0%}" for k in keys), f"{row['gemm_gflops']:.0f}"]
            for row in part
        ),
    )


def _visual(part: list[dict[str, Any]]) -> str:
    return _table(
        ["case", "step without", "step with", "overhead"],
        (
            [
                row["title"],
                *(f"{found['median_s']:.3f} s" for found in row["peers"].values()),
                f"{row['overhead']:+.1%}",
            ]
            for row in part
        ),
    )


def _angles(part: list[dict[str, Any]]) -> str:
    rows = [
        [row["title"], f"{row['mass']:.2f}", f"{row['divergence']:.4f}", *(f"{row['degrees'][t]:.1f}°" for t in TAILS)]
        for row in part
    ]
    return (
        "The teacher's probabilities fall as 1/rank, with noise (standard deviation 0.3) on its logits; the student's\n"
        "logits are the teacher's with noise of the size in the first column. Angles are those of the gradients with\n"
        "respect to the student's logits.\n\n"
        + _table(["case", "mass of the K", "divergence, nats", "bucket", "renormalize both", "truncate"], rows)
    )


def _cuda(part: list[dict[str, Any]]) -> str:
    memory = [
        {"title": row["title"], "peers": {n: f["memory"] for n, f in row["peers"].items() if "memory" in f}}
        for row in part
    ]
    return _times(part) + "\n\nWithout the head's gradient:\n\n" + _memory(memory)


_SECTIONS = [
    ("loss", "Time of the loss", _times),
    ("errors", "Errors", _errors),
    ("memory", "Memory of the loss", _memory),
    ("step", "One training step", _steps),
    ("parts", "Where the time goes in ours", _parts),
    ("visual", "What visual KD adds to a step", _visual),
    ("angles", "Top-k: angle to the gradient of the full distributions", _angles),
    ("cuda", "On a GPU", _cuda),
]


def _title(name: str) -> str:
    return "the four GEMMs alone" if name == FOUR_GEMMS else PEERS[name].title


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
