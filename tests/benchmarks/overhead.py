"""What a step costs beside models, loss and optimizer: kdtrain beside SFTTrainer and GKDTrainer, on tiny models.

    python -m tests.benchmarks.overhead [--rounds 15] [--steps 20]

Each trainer trains the same rows with the same tiny models, one after the other in each round, in processor time, which
other programs on the machine do not add to. `beside` is a step without the forwards (kdtrain's and SFTTrainer's loss is
inside the student's), the backward and the optimizer's step: data, window, counting, metrics, callbacks, the loop. Of a
step of 200 ms 3 % are 6 ms.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from tests import tiny

clock = time.process_time
KINDS = ("kdtrain, CE", "SFTTrainer", "kdtrain, KD", "GKDTrainer")
_FIRST = 4
"""Steps before the clock runs."""


class _Clock(TrainerCallback):
    """Processor time from the beginning of a step to the end of the last one, and the part that is models'."""

    def __init__(self, trainer: Any, teacher: Any) -> None:
        self._trainer, self._teacher = trainer, teacher
        self.whole = self.models = 0.0
        self.steps, self._depth = 0, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer
        for owner, name in ((trainer.model, "forward"), (self._teacher, "forward"), (trainer.accelerator, "backward"),
                            (trainer.optimizer, "step"), (trainer.optimizer, "zero_grad")):  # fmt: skip
            if owner is not None:
                setattr(owner, name, self._timed(getattr(owner, name)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == _FIRST:
            self.models, self._began = 0.0, clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > _FIRST:
            self.whole, self.steps = clock() - self._began, state.global_step - _FIRST

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started, self._depth = clock(), self._depth + 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.models += clock() - started

        return timed


def once(kind: str, steps: int) -> tuple[float, float]:
    """Milliseconds of a step, and of what of it is beside the models."""
    trainer, teacher = _trainer(kind, steps)
    watch = _Clock(trainer, teacher)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return 1e3 * watch.whole / watch.steps, 1e3 * (watch.whole - watch.models) / watch.steps


def _trainer(kind: str, steps: int) -> tuple[Any, Any]:
    import datasets
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from kdtrain.data import Collator
    from kdtrain.trainer import GKDTrainerWithMetrics

    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="kdtrain-bench-"), "max_steps": steps + _FIRST, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "max_length": 64,
        "per_device_train_batch_size": 4, "logging_steps": 10, "disable_tqdm": True, "log_level": "error",
    }  # fmt: skip
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48)
    words, rows = tiny.make_tokenizer(), datasets.Dataset.from_list(tiny.CHATS * 4)
    if kind == "SFTTrainer":
        return SFTTrainer(student, SFTConfig(**common), train_dataset=rows, processing_class=words), None
    args = GKDConfig(**common, lmbda=0.0)
    if kind == "GKDTrainer":
        return GKDTrainer(student, teacher, args=args, train_dataset=rows, processing_class=words), teacher
    args.llm_kd_weight, args.sft_alpha = (1.0, 0.0) if kind == "kdtrain, KD" else (0.0, 1.0)
    asked = teacher if kind == "kdtrain, KD" else None
    collate = Collator(words, max_length=64)
    encoded = [collate([row]) for row in rows]  # before the run, as `kdtrain fit` and the others do
    rows = [
        {"input_ids": one.model_inputs["input_ids"][0].tolist(), "labels": one.labels[0].tolist()} for one in encoded
    ]
    return GKDTrainerWithMetrics(student, asked, args, train_dataset=rows, processing_class=words), asked


def measure(rounds: int, steps: int) -> dict[str, tuple[float, float]]:
    """By trainer the medians over rounds: milliseconds of a step, and those beside the models."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        once(kind, 2)
    for _ in range(rounds):
        for kind in KINDS:
            found[kind].append(once(kind, steps))
    return {
        kind: (median(whole for whole, _ in of_kind), median(beside for _, beside in of_kind))
        for kind, of_kind in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = measure(options.rounds, options.steps)
    print("| trainer | ms a step | beside the models | of a step of 200 ms |\n|---|--:|--:|--:|")
    for kind, (whole, beside) in found.items():
        print(f"| {kind} | {whole:.1f} | {beside:.1f} | {beside / 200:.1%} |")
    pairs = (("kdtrain, CE", "SFTTrainer"), ("kdtrain, KD", "GKDTrainer"))
    print("; ".join(f"{ours} is {found[ours][0] / found[other][0]:.2f} of {other}" for ours, other in pairs))


if __name__ == "__main__":
    main()
