"""Results as Markdown for a reader and JSON for a program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import itself, on_policy, requirements
from tests.benchmarks.angles import TAILS
from tests.benchmarks.cases import GIB, MIB
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


def _self(part: list[dict[str, Any]]) -> str:
    return _table(
        ["case", "weights", *itself.TITLES.values()],
        (
            [row["title"], f"{row['weights'] / GIB:.2f} GiB", *(format_result(row["peers"][n]) for n in itself.TITLES)]
            for row in part
        ),
    )


def _on_policy(part: list[dict[str, Any]]) -> str:
    def shown(found: dict[str, Any]) -> list[str]:
        if "ratio" not in found:
            return [found.get("note", ""), "", "", ""]
        return [
            *(f"{found['median_s']:.2f} s", f"{found['ratio']:.2f}×"),
            *(f"{found['wall_s']:.2f} s", f"{found['wall_ratio']:.2f}×"),
        ]

    contenders = _table(
        ["case", "who", "processor", "theirs / ours", "clock", "theirs / ours"],
        (
            [row["title"], on_policy.CONTENDERS[name], *shown(found)]
            for row in part
            for name, found in row["peers"].items()
        ),
    )
    parts = _table(
        ["case", *on_policy.PARTS.values()],
        ([row["title"], *(f"{row['parts'][name]:.2f} s" for name in on_policy.PARTS)] for row in part if row["parts"]),
    )
    return (
        "An optimizer window of rows that the student writes, from its data loader to the gradients. Judged by the\n"
        "processor's time, of which others on the same cores take none; the same tokens for everybody, no LoRA. The\n"
        f"bare loop keeps rows that have stopped. {part[0]['measured']}\n\n{contenders}\n\nThe bare parts:\n\n{parts}"
    )


def _packing(part: list[dict[str, Any]]) -> str:
    rows = [
        [row["title"], name, f"{found['tokens_per_s']:.0f}", f"{found['ratio']:.2f}×", f"{found['padding']:.0%}"]
        for row in part
        for name, found in row["peers"].items()
    ]
    return (
        "Windows of KD from collection to gradients, sdpa attention; tokens that are not padding per second of the\n"
        f"processor, and the median over rounds of that over padded windows. {part[0]['measured']}\n\n"
    ) + _table(["window", "rows lie", "tokens/s", "over padded", "padding"], rows)


def _selection(part: list[dict[str, Any]]) -> str:
    rows = [
        [row["title"], way, f"{found['seconds']:.2f} s", f"{found['ratio']:.2f}×"]
        for row in part
        for way, found in row["peers"].items()
    ]
    return (
        "Half of the tokens chosen by rlhf.token_selection: processor time of a step, and the median over rounds of\n"
        f"that over a step at all tokens. {part[0]['measured']}\n\n"
    ) + _table(["step", "divergence at", "time", "over all tokens"], rows)


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


def _draws(part: list[dict[str, Any]]) -> str:
    ways = ("mean of the sets", "one set", "truncate", "bucket")
    rows = [
        [
            row["title"],
            f"{row['divergence']:.2f}",
            f"{row['error']:.2%}",
            f"{row['expected']:.2%}",
            *(f"{row['degrees'][way]:.1f}°" for way in ways),
        ]
        for row in part
    ]
    return (
        "The distributions are those of the angles above, or steeper. The error is that of the gradient's mean over\n"
        "all sets, by norm; expected is what the mean of so many draws has if nothing is left out: it falls with more\n"
        "sets, and flatter teachers take more of them. One set alone is noise around the right gradient (the mean\n"
        "angle of twenty), which averages out over steps; what top-k leaves out does not.\n\n"
        + _table(
            ["case", "KL, nats", "error of the mean", "expected", "its angle", "one set", "top-k, truncate", "bucket"],
            rows,
        )
    )


def _cache_size(part: list[dict[str, Any]]) -> str:
    def shown(row: dict[str, Any]) -> list[str]:
        if "unique" in row:
            return [f"{row['unique']:.1f} different ids a token", "exact"]
        if "kl" in row:
            return [f"KL {row['kl']:.1e}, largest {row['kl_max']:.1e}", f"KL ≤ {row['bound_max']:.1e}"]
        return [f"log-probability ≤ {row['error']:.4f} nats", f"{row['difference']:.1e} of {row['loss']:.3f} nats"]

    rows = [[row["title"], f"{row['bytes']:.1f}", f"{row['gzip']:.1f}", *shown(row)] for row in part]
    return (
        "Bytes on the disk with keys, checksums and header, of one small shard, of rows of 100 tokens,\n"
        "and what gzip would make of them. The loss is forward KL from the bucketed top-k, of a student whose\n"
        "logits are 0.5 away; its difference is relative, below 0.05 nats to 0.05. Hidden states have eight wide\n"
        "channels; the KL is that of the distributions they give, with the largest bound of a token.\n\n"
        + _table(["case", "bytes a token", "with gzip", "error", "of the loss"], rows)
    )


def _cuda(part: list[dict[str, Any]]) -> str:
    memory = [
        {"title": row["title"], "peers": {n: f["memory"] for n, f in row["peers"].items() if "memory" in f}}
        for row in part
    ]
    return _times(part) + "\n\nWithout the head's gradient:\n\n" + _memory(memory)


def _plan(part: list[dict[str, Any]]) -> str:
    rows = [
        [row["title"], row["note"], "", "", "", ""]
        if "note" in row
        else [
            row["title"],
            f"{row['planned'] / MIB:.0f} MiB",
            f"{row['bytes'] / MIB:.0f} MiB",
            f"{row['ratio']:.3f}",
            row["phase"],
            f"{row['planned_s'] / row['seconds']:.2f}",
        ]
        for row in part
    ]
    return (
        "Whole runs of `fit` on the CPU in float32, each in a process of its own: the highest resident memory above\n"
        "its level after a tiny run in the same process. The time is processor time, of the run's steps as a dry run\n"
        "tells it, over what they took.\n\n"
    ) + _table(["run", "planned", "measured", "planned / measured", "peak in", "time: told / took"], rows)


def _manifest(part: list[dict[str, Any]]) -> str:
    keys = ("save_s", "sync_s", "manifest_s")
    rows = [[row["title"], *(f"{row[key]:.2f}" for key in keys), f"{row['share']:.1%}"] for row in part]
    return (
        "Seconds of writing the files, of bringing them onto the disk, and of hashing them and writing the manifest;\n"
        "medians, on the disk of this machine.\n\n"
    ) + _table(["checkpoint", "write", "onto the disk", "manifest", "share of all"], rows)


_SECTIONS = [
    ("loss", "Time of the loss", _times),
    ("errors", "Errors", _errors),
    ("memory", "Memory of the loss", _memory),
    ("step", "One training step", _steps),
    ("parts", "Where the time goes in ours", _parts),
    ("visual", "What visual KD adds to a step", _visual),
    ("self", "Peak memory of a run whose teacher is the student itself", _self),
    ("on-policy", "An on-policy window", _on_policy),
    ("packing", "Rows behind each other", _packing),
    ("selection", "A step whose divergence is taken at half of the tokens", _selection),
    ("angles", "Top-k: angle to the gradient of the full distributions", _angles),
    ("cache-size", "A cache: bytes a supervised token, and what storing costs", _cache_size),
    ("draws", "Drawn tokens: the gradient of forward KL, in the mean and of one set", _draws),
    ("plan", "The memory plan beside what runs take", _plan),
    ("manifest", "What the manifest of a checkpoint adds to its save", _manifest),
    ("cuda", "On a GPU", _cuda),
]


def _title(name: str) -> str:
    return "the four GEMMs alone" if name == FOUR_GEMMS else PEERS[name].title


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
