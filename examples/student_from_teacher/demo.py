"""Cuts a student out of the quickstart's teacher, heals it by distillation, and compares it with one of random weights.

    python examples/student_from_teacher/demo.py [key.sub=value ...]

It runs these commands and prints each of them, so that any of them can be run again by hand:

    ../quickstart/prepare.py               rows, tokenizer and untrained models
    kdtrain fit ../quickstart/teacher.yaml the teacher, unless it is there
    kdtrain init --from runs/teacher       three of its four layers, half of its width    -> build/cut
    kdtrain fit heal.yaml                  the cut student, taught by the teacher          -> runs/healed
    kdtrain fit heal.yaml                  the same from random weights                    -> runs/scratch

Both runs read the same rows in the same order. Options such as `training.max_steps=2` go to both. The comparison is the
quickstart's: held-out packages, maths written out there and not taken from kdtrain.

Writes `build/table.md` and `build/results.json`, and prints the table.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
BUILD, RUNS = HERE / "build", HERE / "runs"
TEACHER = QUICKSTART / "runs" / "teacher"
LAYERS, WIDTH = 3, 112
SCRATCH_LEARNING_RATE = "training.learning_rate=2.0e-3"  # the quickstart's, for random weights

MODELS = {
    "teacher": ("teacher", TEACHER),
    "cut": ("cut, not healed", BUILD / "cut"),
    "healed": ("cut and healed", RUNS / "healed"),
    "scratch": ("same size, random weights, distilled alike", RUNS / "scratch"),
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


def cut() -> float:
    """Cuts the student out of the teacher."""
    shutil.rmtree(BUILD / "cut", ignore_errors=True)  # the teacher may have changed since
    sizes = ("--layers", str(LAYERS), "--width", str(WIDTH))
    rows = QUICKSTART / "build" / "train_all.jsonl"
    return quickstart.run("-m", "kdtrain", "init", "--from", TEACHER, *sizes, "--data", rows, BUILD / "cut")


def random_weights() -> None:
    """Saves a model of the cut student's size that knows nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BUILD / "cut")).save_pretrained(BUILD / "random")
    AutoTokenizer.from_pretrained(BUILD / "cut").save_pretrained(BUILD / "random")


def fit(name: str, *options: str) -> float:
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)  # `fit` refuses to write over an earlier run
    return quickstart.run("-m", "kdtrain", "fit", HERE / "heal.yaml", f"training.output_dir={folder}", *options)


def results() -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, (_, path) in MODELS.items()
    }
    rows = compare.read_rows(QUICKSTART / "build" / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    scores, tokens = compare.score(list(models.values()), models["teacher"], rows, tokenizer)
    found = {
        name: {"parameters": model.num_parameters(), "perplexity": one.perplexity, **vars(one)}
        for (name, model), one in zip(models.items(), scores, strict=True)
    }
    return {"heldout": {"rows": len(rows), "tokens": tokens}, "models": found}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| model | parameters | perplexity | KL from the teacher | agreement |", "|---|--:|--:|--:|--:|"]
    for name, row in found["models"].items():
        lines.append(
            f"| {MODELS[name][0]} | {row['parameters']:,} | {row['perplexity']:,.0f} | {row['kl']:.3f} "
            f"| {row['agreement']:.1%} |"
        )
    heldout = found["heldout"]
    lines += ["", f"On {heldout['tokens']:,} tokens of {heldout['rows']:,} held-out rows; KL in nats per token."]
    return "\n".join(lines)


def main() -> None:
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return
    if any(item.startswith(("-", "training.output_dir=", "model.")) or "=" not in item for item in overrides):
        sys.exit("usage: demo.py [key.sub=value ...], training.output_dir and model… excepted")
    quickstart.run(QUICKSTART / "prepare.py")
    quickstart.fit_teacher([])
    started = time.perf_counter()
    cut()
    random_weights()
    fit("healed", *overrides)
    fit("scratch", f"model.model={BUILD / 'random'}", SCRATCH_LEARNING_RATE, *overrides)
    found = results()
    (BUILD / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (BUILD / "table.md").write_text(table(found) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - started
    print(f"\n{table(found)}\n\nDone in {seconds:.0f} s, the teacher left out. The table is in {BUILD / 'table.md'}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
