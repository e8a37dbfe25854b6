"""`python -m tests.benchmarks.cached_step`: a training step from a cache beside one of plain fine-tuning.

Forward, loss and backward of the same student over the same batches, with cross-entropy alone or with the divergence
from stored targets beside it, which a thread reads one batch ahead, as in training. The optimizer's step, which all of
them share, is left out. Interleaved; the figures are medians of ratios within a round. From hidden states the logits
are made by a product with the teacher's head: it is timed alone, and its share taken off.

    python -m tests.benchmarks.cached_step                two vocabularies, about five minutes
    python -m tests.benchmarks.cached_step --quick        does everything run?
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdtrain.data import Collator
from kdtrain.losses.head import Head
from kdtrain.losses.sizes import chunk_sizes, default_chunk
from kdtrain.teachers import CachedTeacher, DenseTargets, Targets, Teacher
from kdtrain.teachers.cached.store import Format
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers import OURS
from tests.benchmarks.step import StepCase, make_model
from tests.benchmarks.timing import interleave, progress, seconds_of
from tests.test_trainer import make_trainer
from tests.tiny_cache import write_cache

CASES = (
    StepCase(vocab=49152, length=512, layers=8, student_width=512, teacher_width=1024),
    StepCase(vocab=151936, length=512, layers=8, student_width=512, teacher_width=1024),
)
ENTRIES = 50
BATCHES = 4
ALLOWED = 1.12


class _Random(Teacher):
    """Hidden states as wide as the teacher's and a head that makes some sure distributions of them; no model."""

    def __init__(self, case: StepCase) -> None:
        torch.manual_seed(7)
        self.vocab_size, self.width = case.vocab, case.teacher_width
        self.head = Head(torch.randn(case.vocab, case.teacher_width) * 0.1, None, 1.0, None)

    def targets(self, batch: Any) -> Targets:
        return Targets(DenseTargets(torch.randn(int(batch.num_supervised), self.width), self.head))


def forms(case: StepCase) -> dict[str, Format]:
    hidden = Format("hidden", case.vocab, hidden_size=case.teacher_width, hidden_dtype="float32")
    return {
        "topk": Format("topk", case.vocab, entries=ENTRIES),
        "sample": Format("sample", case.vocab, entries=ENTRIES),
        "hidden": hidden,
        "hidden, int8": replace(hidden, hidden_dtype="int8"),
    }


def make_rows(case: StepCase) -> list[dict[str, Any]]:
    """The second half of each row is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, case.vocab, (BATCHES * case.rows, case.length), generator=generator).tolist()
    half = case.length // 2
    return [{"input_ids": row, "labels": [-100] * half + row[half:], "prompt_length": half} for row in ids]


def measure(
    case: StepCase, rounds: int, folder: Path, clock: Callable[[Callable[[], Any]], float]
) -> dict[str, dict[str, float]]:
    """For each way of training: seconds a step, its ratio to cross-entropy, and the seconds waited for the thread."""
    rows, collator = make_rows(case), Collator(_tokenizer(), row_keys=True)
    batches = [collator(rows[i : i + case.rows]) for i in range(0, len(rows), case.rows)]
    student, teacher = make_model(case, case.student_width, 1), _Random(case)
    options = {"rows": rows, "beta": 0.0, "sft_alpha": 1.0, "tokenizer": _tokenizer()}
    steps: dict[str, Callable[[], None]] = {}
    cached: dict[str, CachedTeacher] = {}
    plain = make_trainer(folder, student, llm_kd_weight=0.0, **options)
    steps[OURS] = _step(plain, batches, None)
    for name, form in forms(case).items():
        cache = write_cache(folder / name, teacher, rows, collator, form, together=case.rows)
        cached[name] = CachedTeacher(cache)
        trainer = make_trainer(folder, student, extra={"teacher": cached[name]}, **options)
        steps[name] = _step(trainer, batches, cached[name])
    steps["product"] = _product(teacher, int(batches[0].num_supervised))
    timings = interleave(steps, rounds=rounds, before=lambda: student.zero_grad(set_to_none=True), clock=clock)
    found = {}
    for name, timing in timings.items():
        taken = timing.as_dict()
        found[name] = {"s": taken["median_s"], "ratio": taken["ratio"]}
        if name in cached:
            found[name]["waited"] = cached[name].waited_s / (rounds + 1)
            cached[name].close()
    shares = zip(timings["hidden"].ratios, timings["product"].ratios, strict=True)
    found["hidden"]["beside the product"] = statistics.median(own - product for own, product in shares)
    shares = zip(timings["hidden, int8"].ratios, timings["product"].ratios, strict=True)
    found["hidden, int8"]["beside the product"] = statistics.median(own - product for own, product in shares)
    return found


def _step(trainer: Any, batches: list[Any], teacher: CachedTeacher | None) -> Callable[[], None]:
    """One batch after the other, the next one of which is being read."""
    if teacher is not None:
        teacher.place(trainer.accelerator)
        teacher.prepare([batches[0]])
    at = 0

    def step() -> None:
        nonlocal at
        trainer.model.train()
        if teacher is not None:
            teacher.wait([batches[at % BATCHES]])
            teacher.prepare([batches[(at + 1) % BATCHES]])
        trainer.compute_loss(trainer.model, batches[at % BATCHES]).backward()
        at += 1

    return step


def _product(teacher: _Random, tokens: int) -> Callable[[], None]:
    """The teacher's logits of a batch, in the chunks in which the loss makes them."""
    hidden = torch.randn(tokens, teacher.width)

    def product() -> None:
        start = 0
        for size in chunk_sizes(tokens, default_chunk(teacher.vocab_size, torch.float32, hidden.device)):
            out = torch.empty(size, teacher.vocab_size)
            teacher.head.logits(hidden[start : start + size], out)
            start += size

    return product


def cpu_seconds_of(call: Callable[[], Any]) -> float:
    """Of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _tokenizer() -> Any:
    from tests.tiny import make_tokenizer

    return make_tokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cached_step", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model: shows that everything runs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab", type=int, help="one of the vocabularies alone")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the processor, those of the reading thread included: on a busy machine",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [StepCase(vocab=2048, length=64, layers=2)] if options.quick else CASES
    cases = [case for case in cases if options.vocab in (None, case.vocab)]
    clock = cpu_seconds_of if options.cpu_time else seconds_of
    print(describe_machine(), "CPU time" if options.cpu_time else "wall time")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(case, options.rounds, Path(folder), clock)
        progress(str(case))
        print(f"\n{case}\n\n| | s a step | beside CE alone | without the product | waited, s |\n|---|--:|--:|--:|--:|")
        for name, row in found.items():
            beside = f"{row['beside the product']:.3f}" if "beside the product" in row else ""
            waited = f"{row['waited']:.4f}" if "waited" in row else ""
            shown = "CE alone" if name == OURS else "the product with the teacher's head" if name == "product" else name
            print(f"| {shown} | {row['s']:.3f} | {row['ratio']:.3f} | {beside} | {waited} |", flush=True)


if __name__ == "__main__":
    main()
