"""Runs that are killed with -9 and resumed, beside the run that nobody killed: `python -m tests.kills`.

    python -m tests.kills --kills 100 --seed 0            at random times, over all kinds of runs
    python -m tests.kills --points                        at each point inside a save, over all kinds of runs

A run is a process that was forked from this one, which has imported everything; it is killed with a real SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from kdtrain.config.model_folder import ADAPTER_WEIGHTS, WEIGHTS
from kdtrain.runs.folder import MANIFEST
from tests import tiny

STEPS = 8
TIMED = set(tiny.MEASURED)
SAVING = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "logging_steps": 3}
TOLERANCE = {"vision": 1e-9}
"""Of final weights, where they are not bitwise equal: LLaVA's CLIP."""


# ---- projects --------------------------------------------------------------------------------------------------------


def make_project(folder: Path, kind: str) -> Path:
    """A folder with a `config.yaml` of one kind of run: text, lora, on-policy or vision."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "vision":
        return _make_vision(folder)
    tiny.make_project(folder, tiny.make_tokenizer())
    changes: dict[str, dict[str, Any]] = {"training": SAVING, "data": {"eval": None}}
    if kind == "lora":
        changes["tuner"] = {"train_type": "lora", "lora_rank": 4, "lora_dropout": 0.1}
    if kind == "on-policy":
        changes["rlhf"] = {"lmbda": 0.5, "max_new_tokens": 6}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for section, values in changes.items():
        config.setdefault(section, {}).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _make_vision(folder: Path) -> Path:
    from tests import test_vision_fit as vision

    vision.make_models(folder)
    training = {f"training__{name}": value for name, value in (SAVING | {"optim": "adamw_torch"}).items()}
    vision.write_config(folder, folder, **training, training__learning_rate=1e-3)
    return folder


KINDS = ("text", "lora", "on-policy", "vision")


# ---- a run in a process of its own -----------------------------------------------------------------------------------


@dataclass
class Run:
    """A run that was started."""

    pid: int
    output: Path
    code: int | None = None
    """-9 where it was killed."""

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended, within some seconds; without a limit, when it has."""
        until = None if seconds is None else time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, 0 if until is None else os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif until is not None and time.monotonic() > until:
                return False
            else:
                time.sleep(0.005)
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def start(project: Path, *arguments: str, before: Callable[[], None] | None = None) -> Run:
    """`kdtrain fit config.yaml ARGUMENTS` in a forked process, in the project's folder.

    Args:
        before: called in that process first.
    """
    output = project / "output.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Run(pid, output)
    code = 1
    try:
        number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(project)
        torch.set_num_threads(1)
        if before is not None:
            before()
        sys.argv = ["kdtrain", "fit", "config.yaml", *arguments]
        from kdtrain.cli import app

        app.main()
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- points inside a save --------------------------------------------------------------------------------------------


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half(path: str | Path) -> None:
    """Leave the first half of a file, or of a folder's files, and die."""
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.rglob("*"))[::2]:
            if file.is_file():
                file.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    _die()


def _weights(folder: Path) -> Path:
    return next(
        folder / name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).exists()
    )


def _after(owner: Any, name: str, action: Callable[..., Any]) -> None:
    """Call `action` with the arguments of a function, once it has returned."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action(*args)
        return result

    setattr(owner, name, wrapped)


def kill_at(point: str, step: int) -> Callable[[], None]:
    """What makes a process kill itself at a point inside the save of a step."""

    def prepare() -> None:
        from transformers import TrainerState

        from kdtrain.runs import rotation
        from kdtrain.trainer import GKDTrainerWithMetrics, trainer

        def due(folder: str | Path) -> Path | None:
            return path if (path := Path(folder)).name == f"checkpoint-{step}" else None

        def at(owner: Any, name: str, place: int, action: Callable[[Path], None]) -> None:
            _after(owner, name, lambda *args: (folder := due(args[place])) and action(folder))

        if point == "folder made":
            at(rotation.CheckpointKeeper, "begin", 1, _die)
        elif point == "weights half written":
            at(GKDTrainerWithMetrics, "_save_student", 1, lambda folder: _half(_weights(folder)))
        elif point == "weights written":
            at(GKDTrainerWithMetrics, "_save_student", 1, _die)
        elif point == "optimizer half written":
            at(GKDTrainerWithMetrics, "_save_optimizer_and_scheduler", 1, lambda f: _half(f / "optimizer.pt"))
        elif point == "random numbers half written":
            at(trainer, "save_unlogged", 1, lambda folder: _half(folder / "rng_state.pth"))
        elif point == "sums written":
            at(trainer, "save_unlogged", 1, _die)
        elif point == "trainer state half written":
            _after(TrainerState, "save_to_json", lambda _, path: due(Path(path).parent) and _half(path))
        elif point == "before the manifest":
            _after(TrainerState, "save_to_json", lambda _, path: due(Path(path).parent) and _die())
        elif point == "manifest half written":
            replace = os.replace
            os.replace = lambda new, old: (  # type: ignore[assignment]
                _half(new) if Path(old).name == MANIFEST and due(Path(old).parent) else replace(new, old)
            )
        elif point == "manifest written":
            at(rotation, "write_manifest", 0, _die)
        elif point == "an older one half removed":
            remove = rotation._remove
            rotation._remove = lambda path: _remove_half(path, step, remove)
        else:
            raise ValueError(point)

    return prepare


def _remove_half(path: Path, step: int, remove: Callable[[Path], None]) -> None:
    from kdtrain.runs import rotation

    if path.exists() and (path.parent / f"checkpoint-{step}" / MANIFEST).exists():
        _half(path.rename(f"{path}{rotation._REMOVED}"))
    remove(path)


POINTS = (
    "folder made", "weights half written", "weights written", "optimizer half written", "random numbers half written",
    "sums written", "trainer state half written", "before the manifest", "manifest half written", "manifest written",
    "an older one half removed",
)  # fmt: skip


# ---- comparing -------------------------------------------------------------------------------------------------------


def finished(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The trained tensors of a run, projectors included, and its records without their times."""
    tensors: dict[str, torch.Tensor] = {}
    for name in (WEIGHTS, ADAPTER_WEIGHTS, "visual_projectors.safetensors"):
        if (run / name).exists():
            tensors |= load_file(run / name)
    lines = (run / "logging.jsonl").read_text().splitlines()
    records = [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]
    return tensors, [{k: v for k, v in record.items() if k != "time"} for record in records]


def difference(found: tuple[Any, Any], expected: tuple[Any, Any]) -> float:
    """The largest difference of a trained number; infinite where names or the steps of records differ."""
    if found[0].keys() != expected[0].keys() or [r["step"] for r in found[1]] != [r["step"] for r in expected[1]]:
        return float("inf")
    return max(float((found[0][name] - value).abs().max()) for name, value in expected[0].items())


# ---- random kills ----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of the kills of one kind of run."""

    kind: str
    kills: int = 0
    in_a_save: int = 0
    """Of them: a folder was left that is not complete."""
    resumed: int = 0
    """Runs that went on from a checkpoint."""
    clean: int = 0
    """Runs that found none, and began anew."""
    finished: int = 0
    largest: float = 0.0
    """Difference of a final weight from the uninterrupted run's."""
    failures: list[str] = field(default_factory=list)

    def row(self) -> str:
        return (
            f"{self.kind:<10} {self.kills:>6} {self.in_a_save:>9} {self.resumed:>8} {self.clean:>6} "
            f"{self.finished:>9} {self.largest:>11.1e} {len(self.failures):>9}"
        )


HEADER = "run         kills in a save  resumed  clean  finished  difference  failures"


def uninterrupted(project: Path) -> tuple[tuple[Any, Any], float]:
    """What the run leaves that nobody kills, and its seconds."""
    began = time.monotonic()
    run = start(project, "training.output_dir=whole")
    run.wait()
    assert run.code == 0, run.said()
    return finished(project / "whole"), time.monotonic() - began


def kill_at_random(folder: Path, kind: str, kills: int, seed: int) -> Tally:
    """Kill runs of a kind at random times and resume them, until so many were killed; the last one comes to its end."""
    project, draw, tally = make_project(folder / kind, kind), random.Random(f"{seed} {kind}"), Tally(kind)
    expected, seconds = uninterrupted(project)
    while True:
        run = start(project, "--resume", "auto")
        last = tally.kills >= kills
        if not last and not run.wait(draw.uniform(0, 1.1 * seconds)):
            run.kill()
        else:
            run.wait()
        said = run.said()
        tally.resumed += "Resuming from" in said
        tally.clean += "clean start" in said
        if "Traceback" in said or run.code not in (0, -signal.SIGKILL):
            tally.failures.append(said)
            shutil.rmtree(project / "run", ignore_errors=True)
        elif run.code:
            tally.kills += 1
            tally.in_a_save += any((project / "run").glob("checkpoint-*/kdtrain_unfinished"))
        else:
            tally.finished += 1
            tally.largest = max(tally.largest, difference(finished(project / "run"), expected))
            shutil.rmtree(project / "run")
        if last:
            return tally


# ---- kills at every point --------------------------------------------------------------------------------------------


def kill_and_resume(project: Path, point: str, step: int = 4) -> tuple[str, tuple[Any, Any]]:
    """Kill a run inside the save of a step, resume it to its end; what the resumed one said, and what it left."""
    shutil.rmtree(project / "run", ignore_errors=True)
    run = start(project, before=kill_at(point, step))
    run.wait()
    assert run.code == -signal.SIGKILL, f"{point}: {run.said()}"
    again = start(project, "--resume", "auto")
    again.wait()
    said = again.said()
    assert again.code == 0, f"{point}: {said}"
    assert "Traceback" not in said
    return said, finished(project / "run")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="in all, over the kinds (100)")
    parser.add_argument("--seed", type=int, default=0, help="of their times (0)")
    parser.add_argument("--points", action="store_true", help="at each point inside a save instead")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args(arguments)
    prepare()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.points:
            for kind in options.kinds:
                project = make_project(folder / kind, kind)
                expected, _ = uninterrupted(project)
                for point in POINTS:
                    said, left = kill_and_resume(project, point)
                    apart = difference(left, expected)
                    failed |= apart > TOLERANCE.get(kind, 0)
                    resumed = next(line for line in said.splitlines() if "Resuming from" in line)
                    print(f"{kind:<10} {point:<28} {apart:>8.1e}  {resumed[-30:]}", flush=True)
            return int(failed)
        print(HEADER)
        for i, kind in enumerate(options.kinds):
            share = options.kills * (i + 1) // len(options.kinds) - options.kills * i // len(options.kinds)
            tally = kill_at_random(folder, kind, share, options.seed)
            failed |= bool(tally.failures) or tally.largest > TOLERANCE.get(kind, 0)
            print(tally.row(), flush=True)
            print("\n".join(tally.failures), end="")
    return int(failed)


def prepare() -> None:
    """What conftest.py does for tests; and import what runs need before they are forked."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    torch.set_num_threads(1)
    import kdtrain.runs.fit  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
