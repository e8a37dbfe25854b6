"""Windows of rows of very different lengths, padded and behind each other: tokens that are not padding, per second.

Each window goes from the trainer's collection to the gradients: KD from a larger teacher, AdamW left out. Judged by the
processor's time, of which others on the same cores take none.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.timing import progress

PADDED = "padded"
WAYS: dict[str, dict[str, Any]] = {
    PADDED: {},
    "padding_free": {"padding_free": True},
    "packing": {"packing": True},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
}


@dataclass(frozen=True)
class PackingCase:
    """Rows whose lengths are drawn from a log-normal distribution (σ of the logarithm), cut at the longest."""

    windows: int = 4
    rows: int = 8
    accumulation: int = 2
    longest: int = 512
    median: float = 64
    sigma: float = 1.0
    student: tuple[int, int] = (128, 2)
    teacher: tuple[int, int] = (256, 2)
    vocab: int = 4096

    def __str__(self) -> str:
        return (
            f"{self.accumulation} × {self.rows} rows, lengths of median {self.median:g} (σ {self.sigma:g}) up to "
            f"{self.longest}, {self.student[0]} and {self.teacher[0]} wide, V {self.vocab}"
        )


CASES = [PackingCase()]


def lengths_of(case: PackingCase) -> list[int]:
    draws = np.random.default_rng(0).lognormal(np.log(case.median), case.sigma, _rows(case))
    return [int(length) for length in draws.clip(8, case.longest)]


def measure(case: PackingCase, rounds: int) -> dict[str, Any]:
    """Medians over rounds, in which all ways take turns; each window of a way is another one."""
    windows = {name: _window(case, name) for name in WAYS}
    for window in windows.values():
        window()
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    padding: dict[str, float] = {}
    for i in range(rounds):
        for name in [*WAYS][i % len(WAYS) :] + [*WAYS][: i % len(WAYS)]:
            tokens = positions = seconds = 0.0
            for _ in range(case.windows):
                found = windows[name]()
                tokens, positions, seconds = tokens + found[0], positions + found[1], seconds + found[2]
            speeds[name].append(tokens / seconds)
            padding[name] = 1 - tokens / positions
    peers = {
        name: {
            "tokens_per_s": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, speeds[PADDED], strict=True)),
            "padding": padding[name],
        }
        for name, found in speeds.items()
    }
    progress(f"packing, {case}: " + ", ".join(f"{name} {found['ratio']:.2f}" for name, found in peers.items()))
    machine = describe_machine()
    measured = f"Measured on {machine['cpu']}, {machine['date']}."
    return {"case": vars(case), "title": str(case), "peers": peers, "measured": measured}


def _rows(case: PackingCase) -> int:
    return case.windows * case.rows * case.accumulation


def _window(case: PackingCase, way: str) -> Callable[[], tuple[float, float, float]]:
    """One window after the other: its tokens, the positions of its forwards, and processor seconds."""
    import datasets
    from trl.experimental.gkd import GKDConfig

    from kdtrain.trainer import GKDTrainerWithMetrics
    from tests.benchmarks.step import StepCase, make_model
    from tests.tiny import make_tokenizer

    draw = np.random.default_rng(1)
    ids = [draw.integers(4, case.vocab, length).tolist() for length in lengths_of(case)]
    rows = [{"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]} for row in ids]
    args = GKDConfig(
        output_dir=str(Path(tempfile.mkdtemp(prefix="kdtrain-bench-"))), use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True, lmbda=0.0, max_length=case.longest, max_steps=1,
        per_device_train_batch_size=case.rows, gradient_accumulation_steps=case.accumulation, **WAYS[way],
    )  # fmt: skip
    sizes = (case.student, case.teacher)
    student, teacher = (
        make_model(StepCase(case.vocab, layers=layers), width, seed) for seed, (width, layers) in enumerate(sizes)
    )
    trainer = GKDTrainerWithMetrics(
        student, teacher, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=make_tokenizer()
    )
    state: dict[str, Any] = {"epoch": 0, "batches": iter(())}

    def batches() -> Any:
        found = [next(state["batches"], None) for _ in range(case.accumulation)]
        if found[0] is None:
            trainer.rows.begin_epoch(state["epoch"], loader := trainer.get_train_dataloader())
            state["epoch"], state["batches"] = state["epoch"] + 1, iter(loader)
            return batches()
        return found

    def window() -> tuple[float, float, float]:
        given = batches()
        trainer.model.zero_grad()
        started = time.process_time()
        micro_batches, num_items = trainer.get_batch_samples(iter(given), case.accumulation, torch.device("cpu"))
        for batch in micro_batches:
            trainer.training_step(trainer.model, batch, num_items)
        seconds = time.process_time() - started
        sums = {name: float(sum(trainer._metrics["train"][name])) for name in ("input_tokens", "positions")}
        trainer._metrics["train"].clear()
        return sums["input_tokens"], sums["positions"], seconds

    return window
