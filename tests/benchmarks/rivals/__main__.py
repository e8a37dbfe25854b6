"""`python -m tests.benchmarks.rivals`: one small distillation job by kdtrain and by other tools, side by side.

    python -m tests.benchmarks.rivals --python swift=ENV/bin/python oumi=ENV/bin/python distillkit=ENV/bin/python \\
        --work DIR --out results.json        # some minutes for each tool; kdtrain and trl run in this environment

Each tool has an environment of its own (`pip install ms-swift`, `oumi`, DistillKit from its repository) and is started
as its documentation says, on a CPU, without a network. Four questions are asked of each:

- quality: KL(T‖S) on held-out answers after the same number of steps on the same rows
- gradient: the norm at the first step for the same 16 rows, cut as 1 × 16, as 4 × 4, and over two ranks
- faults: a teacher with other tokens (of the same number), and a misspelt option, of transformers' and of the tool's
  own: does it say so, or train?
- interruption: Ctrl-C, then the tool's own way to go on: which steps are done again?
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.rivals.job import LAYOUTS, MISSPELT, STEPS, Training, prepare
from tests.benchmarks.rivals.quality import held_out_kl
from tests.benchmarks.rivals.table import NO_END, RESULTS, table
from tests.benchmarks.rivals.tools import TOOLS

_LIMIT_S = 1800
_LOSS = re.compile(r"""['"]loss['"]:""")
_MANY_STEPS, _SAVED_EVERY, _STOPPED_AFTER = 2000, 5, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", nargs="*", default=[], metavar="TOOL=PATH", help="the python of a tool's environment"
    )
    parser.add_argument("--work", type=Path, default=Path("rivals"), help="folder for models, rows and runs")
    parser.add_argument("--out", type=Path, help="JSON file for the results; tools that it has already are kept")
    parser.add_argument("--only", nargs="*", choices=["quality", "gradient", "faults", "interruption"])
    parser.add_argument("--table", action="store_true", help="measure nothing; write the committed results as markdown")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    pythons = {"kdtrain": sys.executable, "trl": sys.executable, **dict(item.split("=", 1) for item in given.python)}
    folder = given.work.resolve() / "job"
    prepare(folder)
    _as_dataset(folder)
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    for tool, python in pythons.items():
        results[tool] = {**results.get(tool, {}), **measure(tool, python, folder, given.work.resolve(), given.only)}
        print(json.dumps({tool: results[tool]}, indent=2), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=2) + "\n")


def measure(tool: str, python: str, folder: Path, work: Path, only: list[str] | None) -> dict[str, Any]:
    """What is found of one tool."""
    parts = {"quality": quality, "gradient": gradient, "faults": faults, "interruption": interruption}
    found: dict[str, Any] = {"version": version(tool, python), "date": time.strftime("%Y-%m-%d"), "with": with_(python)}
    for name, part in parts.items():
        if not only or name in only:
            found[name] = part(tool, python, Training(folder, work / tool / f"{name}-{int(time.time())}" / "run"))
    return found


def quality(tool: str, python: str, training: Training) -> dict[str, Any]:
    training = replace(training, save_steps=STEPS)
    code, said, seconds = run(tool, python, training)
    if code:
        return {"exit": code, "said": said}
    model = _student(training.out)
    return {"kl": held_out_kl(training.folder, model), "seconds": round(seconds)}


def gradient(tool: str, python: str, training: Training) -> dict[str, Any]:
    """Gradient norms of the first step by layout."""
    norms: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        out = training.out.with_name(f"layout-{len(norms)}")
        code, said, _ = run(tool, python, replace(training, out=out, layout=layout, steps=1, save_steps=1))
        norms[name] = said if code else next((r["grad_norm"] for r in _history(out) if "grad_norm" in r), None)
    return norms


def faults(tool: str, python: str, training: Training) -> dict[str, Any]:
    """What becomes of three mistakes: exit code and the last line that is said."""
    mistakes: dict[str, dict[str, str]] = {
        "other_tokens": {"teacher": "teacher_other_tokens"},
        **{name: {"misspelt": name} for name in MISSPELT},
    }
    found = {}
    for name, fault in mistakes.items():
        code, said, _ = run(tool, python, replace(training, out=training.out.with_name(name), steps=2, **fault))
        found[name] = {"exit": code, "said": said}
    return found


def interruption(tool: str, python: str, training: Training) -> dict[str, Any]:
    """Ctrl-C between two checkpoints, and on by the tool's own option: steps that were done, kept, and done then."""
    training = replace(training, steps=_MANY_STEPS, save_steps=_SAVED_EVERY, layout=LAYOUTS["4 × 4"])
    started, process = time.time(), start(tool, python, training)
    while process.poll() is None and _steps(training) < _STOPPED_AFTER and time.time() - started < _LIMIT_S:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=_LIMIT_S)
    done, kept = _steps(training), _last_step(training.out)
    steps = max(done, kept) + _SAVED_EVERY
    again = replace(training, steps=steps, resume=True)
    resume_code, last, _ = run(tool, python, again)
    return {
        "exit": code, "said": _last_line(_log(training).read_text()), "steps_done": done, "step_kept": kept,
        "resumed_to": steps, "resume_exit": resume_code, "reached": _last_step(training.out),
        "steps_then": _steps(again) - (done if _log_of_kdtrain(training) else 0),
        "resume_said": last if resume_code else None,
    }  # fmt: skip


# ---- running -----------------------------------------------------------------------------------------------------


def start(tool: str, python: str, training: Training) -> subprocess.Popen[bytes]:
    names = {"PATH", "HOME", "TMPDIR", "LANG"}
    environment = {name: value for name, value in os.environ.items() if name in names}
    environment |= {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled",
        "DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    environment["PYTHONPATH"] = str(Path(__file__).parents[3]) if tool == "kdtrain" else ""
    command = TOOLS[tool](python, training)
    # A shell starts what runs in the background deaf to Ctrl-C, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    training.out.parent.mkdir(parents=True, exist_ok=True)
    with _log(training).open("w") as log:
        return subprocess.Popen(
            command, env=environment, cwd=training.folder.parent, stdout=log, stderr=subprocess.STDOUT
        )


def run(tool: str, python: str, training: Training) -> tuple[int, str, float]:
    """Exit code, the last line that was said, seconds."""
    started, process = time.time(), start(tool, python, training)
    try:
        code = process.wait(timeout=_LIMIT_S)
        said = _last_line(_log(training).read_text())
    except subprocess.TimeoutExpired:
        process.kill()
        code, said = process.wait(), f"{NO_END} {_LIMIT_S} s"
    return code, said, time.time() - started


def _log(training: Training) -> Path:
    """What a run says, beside its folder."""
    return training.out.with_name(training.out.name + ("-resumed.log" if training.resume else ".log"))


# ---- reading what a run has left -----------------------------------------------------------------------------------


def version(tool: str, python: str) -> str:
    package = {"swift": "ms-swift"}.get(tool, tool)
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def with_(python: str) -> dict[str, str]:
    """The libraries that a tool runs on."""
    code = "import importlib.metadata as m; print(*(m.version(n) for n in ('torch', 'transformers', 'trl')))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(zip(("torch", "transformers", "trl"), said.split(), strict=True))


def _history(out: Path) -> list[dict[str, Any]]:
    """Log records of the newest checkpoint: all of these tools train with transformers' Trainer."""
    states = sorted(out.rglob("trainer_state.json"), key=lambda path: json.loads(path.read_text())["global_step"])
    return json.loads(states[-1].read_text())["log_history"] if states else [{}]


def _last_step(out: Path) -> int:
    states = [json.loads(path.read_text())["global_step"] for path in out.rglob("trainer_state.json")]
    return max(states, default=0)


def _student(out: Path) -> Path:
    """The folder of the newest weights."""
    found = sorted(out.rglob("model.safetensors"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent


def _steps(training: Training) -> int:
    """Steps that were logged: kdtrain has a file of them, which a resumed run goes on with; the others print them."""
    log = _log_of_kdtrain(training) or _log(training)
    return len(_LOSS.findall(log.read_text())) if log.exists() else 0


def _log_of_kdtrain(training: Training) -> Path | None:
    log = training.out / "logging.jsonl"
    return log if log.exists() and '"llm_kd_loss"' in log.read_text() else None


def _last_line(said: str) -> str:
    """Of an error the line that names it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(kdtrain:|[\w.]+(Error|Exception|Interrupt)\b)", line)]
    return (named or lines or [""])[-1][:300]


def _as_dataset(folder: Path) -> None:
    """The rows as DistillKit reads them: a data set saved by `save_to_disk`."""
    from datasets import load_dataset

    if not (folder / "train_disk").exists():
        load_dataset("json", data_files=str(folder / "train.jsonl"), split="train").save_to_disk(folder / "train_disk")


if __name__ == "__main__":
    main()
