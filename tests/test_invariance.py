"""The table of invariance: the same rows give the same loss and gradient, however they are spread over ranks,
micro-batches and padding. `make invariance` runs all cells.

Each cell trains one window of the same eight rows with cross-entropy, LM KD and visual KD (of text: hidden-state KD)
together, and is compared with one process that takes them in one micro-batch: loss, its terms and the gradient norm to
1e-5, and by way of an SGD step the gradient of every weight, projectors included. Images are of different sizes, and
ranks have different numbers of them: three and one, or some and none.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from kdtrain.generation.generate import prompts_of
from kdtrain.trainer import answers
from tests import tiny
from tests.strategies import ONE, STRATEGIES, Strategy, marks_of, whole_weights
from tests.test_trainer import ROWS, make_trainer
from tests.tiny_processors import FAMILIES, make_model, picture

IMAGES = (1, 0, 2, 0, 0, 0, 1, 0)
RATE = 0.1
COMMON = ("loss", "grad_norm", "llm_kd_loss", "sft_loss")
VISUAL = (*COMMON, "vision_kd_loss", "vision_kd_loss_vit")
HIDDEN = (*COMMON, "hidden_kd_loss", "hidden_kd_loss_layer_0.5")


@dataclass(frozen=True)
class Column:
    """One way to lay rows into batches."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of the trainer."""
    family: str | None = "qwen"
    """Of the models; None is text."""
    weighs: bool = False
    """Whether tokens count by how much the teacher reads them off the images."""


COLUMNS = {
    "padded": Column(),
    "padded to 64": Column({"pad_to_multiple_of": 64}),
    "by visual reliance": Column(weighs=True),
    "text, padded": Column(family=None),
    "text, padded to 64": Column({"pad_to_multiple_of": 64}, family=None),
    "text, padding-free": Column({"padding_free": True}, family=None),
    "text, packed": Column({"packing": True, "max_length": 96}, family=None),
    "text, 64 tokens a forward": Column({"padding_free": True, "per_device_train_tokens": 64}, family=None),
}
"""Another way to lay rows is one more entry, text alone if it takes no images."""
ANSWERS = {"the data's answers": {}, "its own answers": {"lmbda": 1.0}}
SPLITS = {1: [(2, 4)], 2: [(4, 1), (2, 2), (1, 4)], 4: [(2, 1), (1, 2)]}
"""Ranks -> rows of a micro-batch, and micro-batches of a rank."""


def rows_with_images(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows with so many pictures each, of different sizes."""
    rows = []
    for i, (row, count) in enumerate(zip((ROWS * 2)[: len(counts)], counts, strict=True)):
        question = [*[{"type": "image"}] * count, {"type": "text", "text": f"what is {i}?"}]
        pictures = [picture(10 * i + k, 40 + 16 * k + 8 * i, 32) for k in range(count)]
        rows.append({"messages": [{"role": "user", "content": question}, *row["messages"][-1:]], "images": pictures})
    return rows


@contextmanager
def given_samples() -> Iterator[None]:
    """What the student writes is a function of the prompt, so that all cells have the same samples."""
    original = answers._written

    def written(trainer: Any, side: Any, batches: Any, *_: Any) -> list[list[list[int]]]:
        return [
            [random.Random(str(prompt)).choices(range(100, 300), k=3 + len(prompt) % 4) for prompt in prompts_of(batch)]
            for batch in batches
        ]

    answers._written = written
    try:
        yield
    finally:
        answers._written = original


def models_and_rows(family: str | None) -> tuple[Any, Any, Any, dict[str, Any]]:
    """A student, a wider teacher, rows, and what else a trainer of them takes."""
    if family is None:
        rows, options = (ROWS * 2)[: len(IMAGES)], {"hidden_kd": {"targets": {"layer": [0.5, 1.0]}}}
        return tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48, layers=4), rows, options
    processor = FAMILIES[family]()
    student, teacher = make_model(family, processor, 1), make_model(family, processor, 2, width=48)
    options = {"visual_kd": {"targets": ["vit", "aligner"]}, "extra": {"processing_class": processor}}
    return student, teacher, rows_with_images(IMAGES), options


def train(strategy: Strategy, folder: Any, column: Column, split: tuple[int, int], **kwargs: Any) -> Any:
    """The numbers of a window, and every weight after its step."""
    spread = strategy.begin(column.family)
    student, teacher, rows, options = models_and_rows(column.family)
    trainer = make_trainer(
        folder, student, teacher, rows=rows, sft_alpha=0.3, optim="sgd", max_grad_norm=1e9, learning_rate=RATE,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", max_steps=1, log_level="error",
        per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1],
        token_weights={"top": 0.3} if column.weighs else None,
        **options, **column.options, **spread, **kwargs,
    )  # fmt: skip
    trainer.startup_checked = trainer.alignment_checked = True  # they take as long as the window
    with given_samples():
        trainer.train()
    strategy.check(trainer)
    [record] = [record for record in trainer.state.log_history if "loss" in record]
    assert record["on_policy_fraction"] == kwargs.get("lmbda", 0)
    return {name: record[name] for name in {*VISUAL, *HIDDEN} & record.keys()}, whole_weights(trainer)


@functools.cache
def expected(folder: Any, family: str | None, weighs: bool, answers: str) -> Any:
    """Of one process with all rows in one micro-batch, and which parts of the models it trains."""
    numbers, weights = train(ONE, folder, Column(family=family, weighs=weighs), (len(IMAGES), 1), **ANSWERS[answers])
    assert set(numbers) == set(VISUAL if family else HIDDEN)
    assert all(numbers[name] > 1e-3 for name in numbers if name != "sft_loss" or answers != "its own answers")
    untrained, _, _, _ = models_and_rows(family)
    moved = {name for name, p in untrained.named_parameters() if p.detach().flatten().tolist() != weights[name]}
    for part in (
        ("visual.blocks", "visual.merger", "language_model", "projectors") if family else ("layers", "projectors")
    ):
        assert any(part in name for name in (*moved, *(weights.keys() - dict(untrained.named_parameters()).keys())))
    return numbers, weights


CELLS = [
    pytest.param(
        name, column, answers, split,
        id=f"{name}-{column}-{answers}-{split[0]}x{split[1]}", marks=[pytest.mark.slow, *marks_of(name)],
    )
    for name, strategy in STRATEGIES.items()
    for column in COLUMNS
    for answers in ANSWERS
    for split in SPLITS[strategy.ranks]
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "column", "answers", "split"), CELLS)
def test_the_same_rows_give_the_same_loss_and_gradients(tmp_path_factory, tmp_path, name, column, answers, split):
    laid, strategy = COLUMNS[column], STRATEGIES[name]
    numbers, weights = expected(tmp_path_factory.getbasetemp() / "one", laid.family, laid.weighs, answers)
    for ours, our_weights in strategy.run(train, tmp_path, laid, split, **ANSWERS[answers]):
        assert ours == pytest.approx(numbers, rel=1e-5)
        assert our_weights.keys() == weights.keys()
        for weight, values in weights.items():
            assert our_weights[weight] == pytest.approx(values, rel=0, abs=1e-5 * RATE), weight
