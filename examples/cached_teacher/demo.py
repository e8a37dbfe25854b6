"""Trains the quickstart's student from caches of its teacher, and compares bytes with quality.

    python examples/cached_teacher/demo.py [key.sub=value ...]

It runs these commands and prints each of them, so that any of them can be run again by hand:

    ../quickstart/prepare.py     rows, tokenizer and untrained models
    kdtrain fit teacher.yaml     the quickstart's teacher, unless it is there
    kdtrain fit ce.yaml          the student without a teacher                        -> runs/ce
    kdtrain fit distill.yaml     the student with the teacher beside it               -> runs/online
    kdtrain cache distill.yaml   its targets, in five forms                           -> build/<form>
    kdtrain fit distill.yaml     the student from each of them                        -> runs/<form>

All students begin with the same weights and read the same rows in the same order: what differs is what they are told
about each token. Options such as `training.max_steps=2` go to every `fit` and `cache`. The comparison is the
quickstart's: held-out packages, maths written out there and not taken from kdtrain.

Writes `build/table.md` and `build/results.json`, and prints the table.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
BUILD, RUNS = HERE / "build", HERE / "runs"

FORMS = {
    "top-50": ("--mode", "topk", "--top-k", "50"),
    "top-12": ("--mode", "topk", "--top-k", "12"),
    "sample-50": ("--mode", "sample", "--draws", "50"),
    "hidden": ("--mode", "hidden"),
    "hidden-int8": ("--mode", "hidden", "--hidden-dtype", "int8"),
}
WHAT = {
    "before": "before training",
    "ce": "text alone, no teacher",
    "online": "teacher beside the student",
    "top-50": "cache: the 50 most likely tokens",
    "top-12": "cache: the 12 most likely tokens",
    "sample-50": "cache: 50 draws",
    "hidden": "cache: hidden states",
    "hidden-int8": "cache: hidden states in 8 bits",
    "teacher": "the teacher itself",
}


def of_quickstart(name: str) -> ModuleType:
    """A module of the quickstart, under another name than that of this folder's."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


quickstart, compare = of_quickstart("demo"), of_quickstart("compare")


def fit(name: str, config: Path, *options: str) -> float:
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)  # `fit` refuses to write over an earlier run
    return quickstart.run("-m", "kdtrain", "fit", config, f"training.output_dir={folder}", *options)


def cache(form: str, *options: str) -> float:
    folder = BUILD / form
    shutil.rmtree(folder, ignore_errors=True)  # the teacher may have changed since
    return quickstart.run("-m", "kdtrain", "cache", HERE / "distill.yaml", *FORMS[form], "--out", folder, *options)


def cpu_seconds() -> float:
    """Of all commands so far: unlike the clock, it is about the same on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(overrides: list[str], names: Sequence[str] = ("ce", "online", *FORMS)) -> dict[str, float]:
    """Trains students, from caches that are written before; the CPU seconds of each `fit`, its start included."""
    seconds = {}
    for name in names:
        source = []
        if name in FORMS:
            cache(name, *overrides)
            source = ["rlhf.teacher.backend=cache", f"rlhf.teacher.path={BUILD / name}"]
        before = cpu_seconds()
        fit(name, QUICKSTART / "ce.yaml" if name == "ce" else HERE / "distill.yaml", *source, *overrides)
        seconds[name] = cpu_seconds() - before
    return seconds


def size(folder: Path, tokens: int) -> dict[str, float]:
    """Bytes of a cache for each token of its rows, and of its head (of hidden states) for all of them."""
    head = sum(path.stat().st_size for path in folder.glob("head*"))
    whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"bytes_per_token": (whole - head) / tokens, "head_bytes": head}


def results_of(seconds: dict[str, float]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = QUICKSTART / "runs" / "teacher"
    folders = {"before": QUICKSTART / "build" / "student_init"}
    folders |= {name: RUNS / name for name in ("ce", "online", *FORMS)} | {"teacher": teacher}
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for name, path in folders.items()
    }
    rows = compare.read_rows(QUICKSTART / "build" / "heldout.jsonl")
    scores, tokens = compare.score(
        list(models.values()), models["teacher"], rows, AutoTokenizer.from_pretrained(teacher)
    )
    found: dict[str, dict[str, Any]] = {}
    counts = json.loads((QUICKSTART / "build" / "stamp.json").read_text(encoding="utf-8"))["counts"]
    for name, score in zip(models, scores, strict=True):
        found[name] = {"ce": score.ce, "perplexity": score.perplexity, "kl": score.kl, "agreement": score.agreement}
        if name in seconds:
            found[name]["cpu_seconds"] = seconds[name]
        if name in FORMS:
            found[name] |= size(BUILD / name, counts["train_400_supervised"])
    return {"heldout": {"rows": len(rows), "tokens": tokens}, "students": found}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| student | bytes per token | CPU seconds | perplexity | KL from the teacher | agreement |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in results["students"].items():
        size = f"{row['bytes_per_token']:.0f}" if "bytes_per_token" in row else ""
        speed = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
        lines.append(
            f"| {WHAT[name]} | {size} | {speed} | {row['perplexity']:,.0f} | {row['kl']:.4f} | {row['agreement']:.1%} |"
        )
    heldout, head = results["heldout"], results["students"]["hidden"]["head_bytes"]
    lines += [
        "",
        f"Quality on {heldout['tokens']:,} tokens of {heldout['rows']:,} held-out rows, KL in nats per token. Bytes "
        "are all files of a cache by the supervised tokens in it; hidden states also need the teacher's head, "
        f"{head / 1e6:.1f} MB once.",
    ]
    return "\n".join(lines)


def main() -> None:
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return
    if any(item.startswith(("-", "training.output_dir=", "rlhf.teacher")) or "=" not in item for item in overrides):
        sys.exit("usage: demo.py [key.sub=value ...], training.output_dir and rlhf.teacher… excepted")
    started = time.perf_counter()
    quickstart.run(QUICKSTART / "prepare.py")
    quickstart.fit_teacher([])
    results = results_of(train(overrides))
    BUILD.mkdir(exist_ok=True)
    (BUILD / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (BUILD / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    print(f"\n{table(results)}\n\nDone in {time.perf_counter() - started:.0f} s. The table is in {BUILD / 'table.md'}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
