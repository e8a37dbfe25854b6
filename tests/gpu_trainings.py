"""Whether trainings on a GPU are those of a CPU: a part of `python -m tests.gpu`."""

from __future__ import annotations

import functools
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from tests.gpu_right import Found, tell


def compared(kind: str, device: str, folder: Path) -> Found:
    """The loss of a training of `tests.test_waits` on the CPU and on a device, and what the host waits for there."""
    import torch

    from tests import test_waits

    found: Found = {"cpu": test_waits.run(kind, folder / "cpu")["loss"]}
    waits: dict[str, list[list[str]]] = {"micro-batches": [], "steps": []}

    def seen(caught: list[warnings.WarningMessage]) -> list[str]:
        lines = [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
        caught.clear()
        return [line for line in lines if not any(f"/{part}" in line for part in test_waits.UPSTREAM.get(kind, ()))]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def on_event(event: str) -> None:
            if event == "begin":
                caught.clear()
            else:
                waits[event].append(seen(caught))

        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            found["device"] = test_waits.run(kind, folder / device, use_cpu=device == "cpu", on_event=on_event)["loss"]
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    # The first step has what a run does once, and the last one is logged.
    found["waits in micro-batches"] = sorted({line for one in waits["micro-batches"][1:] for line in one})
    found["waits of a step"] = sum(len(one) for one in waits["steps"][1:2])
    return found


def resumed(kind: str, device: str, folder: Path) -> Found:
    """Four steps at once, and two of them taken again from the checkpoint behind the second: the largest difference
    between the weights, of the largest weight; and the last loss of both."""
    import torch

    from tests import test_waits

    def train(at: Path, checkpoint: Path | None = None) -> tuple[dict[str, torch.Tensor], float]:
        trainer = test_waits.ALL_KINDS[kind](
            at, use_cpu=device == "cpu", max_steps=4, logging_steps=1, save_strategy="steps", save_steps=2,
            gradient_accumulation_steps=2, log_level="error",
        )  # fmt: skip
        trainer.startup_checked = trainer.alignment_checked = True
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        weights = {name: p.detach().cpu().float() for name, p in trainer.model.named_parameters()}
        return weights, next(one["loss"] for one in reversed(trainer.state.log_history) if "loss" in one)

    straight, loss = train(folder / "straight")
    again, own = train(folder / "again", folder / "straight" / "checkpoint-2")
    largest = max(float(one.abs().max()) for one in straight.values())
    difference = max(float((straight[name] - again[name]).abs().max()) for name in straight)
    return {"straight": loss, "resumed": own, "difference": difference / largest}


RESUMED = ("KD and CE", "LoRA")
FIRST = ("KD and CE", "images, llava", "images, qwen", "LoRA", "on-policy", "top-k targets", "gradient checkpointing")
"""Trainings that come first, where there is no time for all."""


def trainings(device: str, small: bool, seconds: float) -> Found:
    """Whole trainings on the device beside the CPU, with what the host waits for; and resumed ones."""
    from tests.test_waits import ALL_KINDS as KINDS

    until = time.perf_counter() + seconds
    found: Found = {}
    kinds = [*FIRST, *(kind for kind in KINDS if kind not in FIRST)]
    jobs = [(kind, functools.partial(_training, kind, device)) for kind in (kinds[:3] if small else kinds)]
    resumes = [(f"{kind}, resumed", functools.partial(_resumption, kind, device)) for kind in RESUMED]
    for name, job in [jobs[0], *resumes[: 1 if small else None], *jobs[1:]]:
        if time.perf_counter() > until:
            found[name] = "no time for it"
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = job(Path(folder))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        tell(**{name: found[name]})
    return found


def _training(kind: str, device: str, folder: Path) -> Any:
    one = compared(kind, device, folder)
    good = abs(one["device"] - one["cpu"]) <= 1e-3 * abs(one["cpu"])
    return "equal" if good and not one["waits in micro-batches"] and one["waits of a step"] <= 1 else one


def _resumption(kind: str, device: str, folder: Path) -> Any:
    one = resumed(kind, device, folder)
    # A GPU adds some sums in no fixed order.
    limit = 0.0 if device == "cpu" else 1e-4
    good = one["difference"] <= limit and abs(one["resumed"] - one["straight"]) <= limit * abs(one["straight"])
    return "equal" if good else one
