"""A resumed run equals the uninterrupted one bit for bit, from every checkpoint, whatever was computed before.

Micro-batches are rows of 1 to 42 supervised tokens, since matrix kernels change with size. What was computed before is
tried both ways: every run in a process of its own, some of which have computed losses of other sizes first; and all
runs in the same processes, from the checkpoints in no order.
"""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kdtrain.losses import fused_distillation_loss
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.test_trainer import make_args
from tests.tiny import lora_config

STEPS = 12
ROWS = 42
"""A window has four: the eleventh is short, the twelfth belongs to a second epoch."""
NOT_NUMBERS = tiny.MEASURED

CASES = {
    "one process": (1, "full", 0.0),
    "one process, adapters, on-policy": (1, "lora", 0.5),
    "two ranks, on-policy": (2, "full", 0.5),
    "two ranks, adapters": (2, "lora", 0.0),
}


def make_rows() -> list[dict[str, Any]]:
    """Every number of supervised tokens from 1 to 42."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in range(1, ROWS + 1):
        prompt = 1 + count % 3
        ids = torch.randint(4, 320, (prompt + count,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt_length": prompt})
    return rows


@functools.cache
def _tokenizer() -> Any:
    return tiny.make_tokenizer()


def run(folder: Path, tuner: str, lmbda: float, ranks: int, checkpoint: int | None, save: bool = False) -> list[Any]:
    """Train to the end, from a checkpoint or from the beginning; everything that a run leaves, but its times."""
    args = make_args(
        folder / "run" if save else folder / "other", max_steps=STEPS, per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // ranks, lmbda=lmbda, sft_alpha=0.3, beta=0.3, max_new_tokens=8,
        save_strategy="steps" if save else "no", save_steps=1, lr_scheduler_type="cosine", warmup_steps=3,
        logging_steps=1, learning_rate=3e-3,
    )  # fmt: skip
    adapters = lora_config(
        rank=4, alpha=8, dropout=0.0, target_modules="all-linear", modules_to_save=["lm_head"], use_dora=False
    )
    torch.manual_seed(3)
    trainer = GKDTrainerWithMetrics(
        tiny.make_qwen3(seed=1, layers=1, tie_word_embeddings=tuner == "full"),
        tiny.make_qwen3(seed=2, layers=1, hidden=48), args,
        train_dataset=make_rows(), processing_class=_tokenizer(),
        peft_config=adapters if tuner == "lora" else None,
    )  # fmt: skip
    trainer.train(
        resume_from_checkpoint=None if checkpoint is None else str(folder / "run" / f"checkpoint-{checkpoint}")
    )
    assert trainer.state.global_step == STEPS
    records = [
        {key: value for key, value in record.items() if key not in NOT_NUMBERS}
        for record in trainer.state.log_history
        if "loss" in record
    ]
    assert len(records) == STEPS
    moments = [
        (key, value)
        for state in trainer.optimizer.state_dict()["state"].values()
        for key, value in sorted(state.items())
    ]
    weights = [(name, value.clone()) for name, value in sorted(trainer.model.state_dict().items())]
    return [records, moments, weights, trainer.lr_scheduler.state_dict()]


def differences(folder: Path, tuner: str, lmbda: float, ranks: int, checkpoints: list[int | None]) -> list[str]:
    """What differs from the uninterrupted run, by checkpoint; as text. None is a run from the beginning."""
    expected = torch.load(folder / f"expected-{rank()}.pt", weights_only=False)
    found = []
    for checkpoint in checkpoints:
        if ranks == 1 and checkpoint is not None and checkpoint % 2:
            compute_something_else(checkpoint)
        done = run(folder, tuner, lmbda, ranks, checkpoint)
        for what, ours, first in zip(("records", "moments", "weights", "schedule"), done, expected, strict=True):
            if not same(ours, first):
                found.append(f"{what} of the run from {checkpoint or 'the beginning'}: {largest(ours, first)}")
    return found


def uninterrupted(folder: Path, tuner: str, lmbda: float, ranks: int) -> None:
    torch.save(run(folder, tuner, lmbda, ranks, None, save=True), folder / f"expected-{rank()}.pt")


def both(folder: Path, tuner: str, lmbda: float, ranks: int, checkpoints: list[int | None]) -> list[str]:
    uninterrupted(folder, tuner, lmbda, ranks)
    return differences(folder, tuner, lmbda, ranks, checkpoints)


def rank() -> str:
    return os.environ["RANK"]


def compute_something_else(seed: int) -> None:
    """Losses of the same widths and other numbers of tokens than the run begins with."""
    for tokens in (16, 24, 17, 33)[seed // 2 % 4 :]:
        weight = torch.randn(320, 32, requires_grad=True)
        hidden = torch.randn(tokens, 32, requires_grad=True)
        fused_distillation_loss(
            hidden, weight, torch.arange(tokens), torch.randn(tokens, 48), torch.randn(320, 48)
        ).loss.backward()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def largest(a: Any, b: Any) -> str:
    """How far two results are apart: the largest difference, or the first records that differ."""
    if isinstance(a, list) and a and isinstance(a[0], tuple):
        return f"{max(float((x - y).abs().max()) for (_, x), (_, y) in zip(a, b, strict=True)):.1e}"
    pairs = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    return str(pairs[:1])


@pytest.mark.parametrize("name", tiny.first_quick(CASES))
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_one_bit_for_bit(tmp_path, name):
    ranks, tuner, lmbda = CASES[name]
    checkpoints: list[int | None] = [*range(1, STEPS), None]
    random.Random(0).shuffle(checkpoints)
    if ranks > 1:
        assert tiny.run_ranks(both, ranks, tmp_path, tuner, lmbda, ranks, checkpoints, timeout=240) == [[]] * ranks
        return
    tiny.run_ranks(uninterrupted, 1, tmp_path, tuner, lmbda, 1)
    for checkpoint in checkpoints:
        assert tiny.run_ranks(differences, 1, tmp_path, tuner, lmbda, 1, [checkpoint]) == [[]]
