"""A step whose divergence is taken at some tokens (`rlhf.token_selection`), over one at all of them.

Both models' forwards, the loss, and the backward; with cross-entropy at all tokens beside the divergence, and without,
as on the student's own answers. Judged by the processor's time, of which others on the same cores take none.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from kdtrain.config.options import TokenSelection
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers import IGNORE_INDEX, OURS
from tests.benchmarks.step import StepCase, make_model, make_trainer
from tests.benchmarks.timing import progress

ALL = "all tokens"
WAYS = {
    ALL: None,
    "student_entropy": TokenSelection(by="student_entropy", keep=0.5),
    "disagreement": TokenSelection(by="disagreement", keep=0.5),
}


@dataclass(frozen=True)
class SelectionCase:
    """A step of `StepCase`, and the weight of the cross-entropy in it."""

    step: StepCase
    sft_alpha: float = 0.0

    def __str__(self) -> str:
        return f"{self.step}, {'with' if self.sft_alpha else 'no'} cross-entropy"


CASES = [SelectionCase(StepCase(vocab=32768, length=256, layers=4), alpha) for alpha in (0.0, 0.3)]


def measure(case: SelectionCase, rounds: int) -> dict[str, Any]:
    """Medians over rounds, in which all ways take turns on the same models."""
    sizes = case.step
    models = make_model(sizes, sizes.student_width, 1), make_model(sizes, sizes.teacher_width, 2)
    trainer = make_trainer(OURS, *models)
    ids = torch.randint(4, sizes.vocab, (sizes.rows, sizes.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : sizes.length // 2] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def seconds(way: str) -> float:
        trainer.options = trainer.options.model_copy(update={"sft_alpha": case.sft_alpha, "token_selection": WAYS[way]})
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.train()
        started = time.process_time()
        trainer.compute_loss(trainer.model, batch).backward()
        return time.process_time() - started

    for way in WAYS:
        seconds(way)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(rounds):
        for way in [*WAYS][i % len(WAYS) :] + [*WAYS][: i % len(WAYS)]:
            found[way].append(seconds(way))
    peers = {
        way: {
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, found[ALL], strict=True)),
        }
        for way, own in found.items()
    }
    progress(f"selection, {case}: " + ", ".join(f"{way} {one['ratio']:.2f}" for way, one in peers.items()))
    machine = describe_machine()
    measured = f"Measured on {machine['cpu']}, {machine['date']}."
    return {"case": dataclasses.asdict(case), "title": str(case), "peers": peers, "measured": measured}
