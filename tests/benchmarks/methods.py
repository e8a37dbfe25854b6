"""What each method costs of a whole optimizer step: `python -m tests.benchmarks.methods [--rounds N] [--only NAME,…]`.

Both models' forwards, the loss, the backward, clipping and AdamW, all ways in turn on the same models and tokens. A
ratio is the median over rounds of a way's processor time over that of its base in the same round: others on the same
cores take no processor time of ours, though they take its cache, from which the fastest step of each suffered least.
Bases:

    forward KL                all of the plain ones
    two forwards              `mix`: forward KL to the first of two teachers that both run, with both heads' products
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kdtrain.config.hidden_kd import HiddenKdConfig
from kdtrain.config.options import TokenSelection
from kdtrain.data.batch import Batch, StudentChunks, TeacherTokens, received
from kdtrain.teachers import DenseTargets, LocalTeacher, Targets, Teacher
from kdtrain.teachers.base import MixedTargets
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers import IGNORE_INDEX
from tests.benchmarks.step import StepCase, make_model
from tests.benchmarks.timing import progress

CASE = StepCase(vocab=32768, length=256, layers=4)
BASE, TWO_FORWARDS = "forward KL", "two forwards"
CHUNK_TOKENS = 2
"""Tokens of both models in a chunk of `alm`."""


@dataclass(frozen=True)
class Way:
    """A step."""

    options: dict[str, Any] = field(default_factory=dict)
    """What is changed of forward KL's."""
    of_rows: dict[str, Any] = field(default_factory=dict)
    """What a batch has beside its tokens."""
    teachers: str = "one"
    """`one` runs; or two of them: `both` with the first as the teacher, or `mix`."""
    chunks: bool = False
    """Whether the teacher's tokens are others, which chunks of text align with the student's."""
    base: str = BASE


def _divergence(name: str, **more: Any) -> Way:
    return Way({"divergence": name, **more})


WAYS = {
    BASE: Way(),
    "reverse KL": _divergence("jsd", beta=1.0),
    "jsd": _divergence("jsd", beta=0.5),
    "jsd_scaled": _divergence("jsd_scaled", beta=0.5),
    "mixed_kl": _divergence("mixed_kl", beta=0.5),
    "skew_kl": _divergence("skew_kl"),
    "skew_reverse_kl": _divergence("skew_reverse_kl"),
    "alpha_beta": _divergence("alpha_beta"),
    "entropy_aware": _divergence("entropy_aware"),
    "tvd": _divergence("tvd"),
    "kd_temperature 2": Way({"kd_temperature": 2.0}),
    "kd_weight": Way(of_rows={"kd_weights": torch.tensor([1.0, 2.0])}),
    "two divergences in a batch": Way(of_rows={"losses": [("skew_kl", None), (None, None)]}),
    "student_entropy": Way({"token_selection": TokenSelection(by="student_entropy")}),
    "disagreement": Way({"token_selection": TokenSelection(by="disagreement")}),
    "alm": Way({"cross_tokenizer": "alm"}, chunks=True),
    "hidden_kd": Way({"hidden_kd": HiddenKdConfig(enabled=True)}),
    TWO_FORWARDS: Way(teachers="both", base=TWO_FORWARDS),
    "mix": Way(teachers="mix", base=TWO_FORWARDS),
}
ONE_MORE_PRODUCT = ("student_entropy", "disagreement")
"""Those that may cost more: what they need is not in the tile."""


class _Teachers(Teacher):
    """One or two models; `asked` says how they answer."""

    asked = "one"

    def __init__(self, models: list[Any]) -> None:
        self._members = [LocalTeacher(model) for model in models]
        self.module = self._members[0].module
        self.vocab_size = self._members[0].vocab_size

    def targets(self, batch: Batch) -> Targets:
        first = self._members[0].targets(batch)
        if self.asked == "one":
            return first
        second = self._members[1].targets(batch)
        assert isinstance(first.scores, DenseTargets)
        assert isinstance(second.scores, DenseTargets)
        if self.asked == "mix":
            return Targets(MixedTargets((first.scores, second.scores), (0.5, 0.5)))
        with torch.no_grad():
            for hidden in second.scores.hidden.split(64):
                hidden @ second.scores.head.weight.T
        return first


def make_trainer(teacher: Teacher, student: Any) -> Any:
    """With every term that a way may switch off."""
    from datasets import Dataset

    from kdtrain.trainer import GKDTrainerWithMetrics
    from tests.test_trainer import make_args
    from tests.tiny import make_tokenizer

    args = make_args(
        "/tmp", beta=0.0, hidden_kd={"targets": {"layer": [0.33, 0.66, 1.0]}}, learning_rate=1e-6, log_level="error"
    )
    rows = Dataset.from_list([{"messages": [{"role": "assistant", "content": "a"}]}] * 2)
    trainer = GKDTrainerWithMetrics(
        student, None, args=args, train_dataset=rows, processing_class=make_tokenizer(), teacher=teacher
    )
    trainer.create_optimizer()
    return trainer


def make_batch(case: StepCase, way: Way) -> Batch:
    """The second half of each row is supervised."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, case.vocab, (case.rows, case.length), generator=draw)
    labels = ids.clone()
    labels[:, : case.length // 2] = IGNORE_INDEX
    batch = received({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **way.of_rows}, None)
    if not way.chunks:
        return batch
    chunks = (torch.arange(case.length) - case.length // 2).div(CHUNK_TOKENS, rounding_mode="floor")
    chunks = chunks.clamp(min=-1).where(chunks >= 0, IGNORE_INDEX).expand(case.rows, -1).contiguous()
    some = torch.full((case.rows,), case.length)
    tokens = TeacherTokens(
        input_ids=ids.flip(0), attention_mask=torch.ones_like(ids), chunks=chunks,
        labels=ids.flip(0).where(labels != IGNORE_INDEX, IGNORE_INDEX),
    )  # fmt: skip
    own = StudentChunks(numbers=chunks, aligned_bytes=some, answer_bytes=some)
    return dataclasses.replace(batch, teacher_tokens=tokens, student_chunks=own)


def make_steps(case: StepCase, names: list[str]) -> dict[str, Callable[[], float]]:
    """Steps by name; each gives the seconds of the processor that it took."""
    teachers = _Teachers([make_model(case, case.teacher_width, seed) for seed in (2, 3)])
    trainer = make_trainer(teachers, make_model(case, case.student_width, 1))
    plain = trainer.options.model_copy(update={"hidden_kd": None})

    def step(way: Way, batch: Batch) -> float:
        trainer.options, teachers.asked = plain.model_copy(update=way.options), way.teachers
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.model.train()
        started = time.process_time()
        trainer.compute_loss(trainer.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        seconds = time.process_time() - started
        trainer._metrics["train"].clear()
        return seconds

    return {name: functools.partial(step, WAYS[name], make_batch(case, WAYS[name])) for name in names}


def measure(case: StepCase, rounds: int, only: list[str]) -> dict[str, dict[str, float]]:
    """Medians over rounds, in which all ways take turns."""
    names = [name for name in WAYS if name in only or name in {WAYS[other].base for other in only}]
    steps = make_steps(case, names)
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(steps[name]())
        progress(f"round {i + 1} of {rounds}")
    result = {}
    for name, own in found.items():
        ratios = [a / b for a, b in zip(own, found[WAYS[name].base], strict=True)]
        spread = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        result[name] = {
            "seconds": statistics.median(own), "ratio": spread[1], "low": spread[0], "high": spread[2],
            "fastest": min(own) / min(found[WAYS[name].base]),
        }  # fmt: skip
    return result


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    lines = ["| step | s | over its base | quartiles | the fastest of each |", "|---|--:|--:|---|--:|"]
    lines += [
        f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} "
        f"| {row['fastest']:.2f} |"
        for name, row in found.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.methods")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default=",".join(WAYS), help="names, separated by commas")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - WAYS.keys():
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    machine = describe_machine()
    found = measure(CASE, options.rounds, options.only.split(","))
    print(f"{CASE}; {options.rounds} rounds; {machine['cpu']}, {machine['date']}\n\n{table(found)}")


if __name__ == "__main__":
    main()
