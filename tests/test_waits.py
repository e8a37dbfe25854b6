"""The host waits for the device once for every step of the optimizer, and in no micro-batch.

Whole trainings on a device that counts (`tests/card.py`), each in a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from kdtrain.config.options import TokenSelection
from kdtrain.losses import TopKLogprobs
from kdtrain.losses.sampled import SampledTargets
from kdtrain.teachers import CachedTeacher, LocalTeacher, MixedTeacher, RoutedTeacher, SelfTeacher, Targets, Teacher
from tests import card, tiny, tiny_families
from tests.test_cached_chunks import stored
from tests.test_invariance import models_and_rows
from tests.test_trainer import ROWS, make_trainer
from tests.test_trainer_other_tokenizer import ROWS as OTHER_ROWS
from tests.test_trainer_other_tokenizer import other_trainer

ONCE = "kdtrain/trainer/guard.py"
"""Where the one wait of a step is."""


class Known(Teacher):
    """What a cache or a server gives: some tokens at each position, on the CPU, of some of the supervised tokens."""

    def __init__(self, module: nn.Module, *, drawn: bool = False, covers: bool = True) -> None:
        self._inner, self._drawn, self._covers = LocalTeacher(module), drawn, covers
        self.vocab_size = self._inner.vocab_size

    def targets(self, batch: Any) -> Targets:
        known = torch.Generator().manual_seed(int(batch.num_supervised))
        logprobs = torch.randn(len(batch.labels_S), self.vocab_size, generator=known).log_softmax(-1)
        covered_S = torch.arange(len(logprobs)) % 3 != 0
        if not self._covers:
            logprobs = logprobs[covered_S]
        values, ids = logprobs.topk(8)
        if self._drawn:
            return Targets(SampledTargets(ids, values.softmax(-1)))
        return Targets(TopKLogprobs(ids, values), None if self._covers else covered_S)


def with_bias(model: Any, *, masked: bool = False) -> Any:
    """A model whose head has a bias."""
    head = model.get_output_embeddings()
    model.lm_head = nn.Linear(head.in_features, head.out_features, bias=True)
    model.lm_head.weight = head.weight
    nn.init.normal_(model.lm_head.bias)
    if masked:
        model.lm_head.bias.data[-2:] = -torch.inf
    return model


def text(folder: Any, student: Any = None, teacher: Any = "qwen", **options: Any) -> Any:
    given = tiny.make_qwen3(seed=2, hidden=48) if teacher == "qwen" else teacher
    extra = {"teacher": options.pop("by")} if "by" in options else {}
    defaults = {"sft_alpha": 0.3, "rows": ROWS * 2}
    return make_trainer(
        folder, student or tiny.make_qwen3(seed=1), None if extra else given, extra=extra, **{**defaults, **options}
    )


def visual(folder: Any, family: str, **options: Any) -> Any:
    student, teacher, rows, own = models_and_rows(family)
    return make_trainer(folder, student, teacher, rows=rows * 2, sft_alpha=0.3, **own, **options)


def split() -> Any:
    """A teacher whose head is on the CPU, wherever the rest of it runs."""
    device = os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu")
    model = tiny.make_qwen3(seed=2, hidden=48, tie_word_embeddings=False)
    model.model.to(device)
    model.hf_device_map = {"model": device, "lm_head": "cpu"}
    model.lm_head.register_forward_pre_hook(lambda head, args: (args[0].to(head.weight.device),))
    return model


def two() -> dict[str, LocalTeacher]:
    return {name: LocalTeacher(tiny.make_qwen3(seed=seed, hidden=48)) for name, seed in (("a", 2), ("b", 7))}


NAMED = [{**row, "teacher": "ab"[i % 2]} for i, row in enumerate(ROWS * 2)]
WEIGHED = [{**row, "kd_weight": i % 3 / 2} for i, row in enumerate(ROWS * 2)]
UNLABELLED = [{**row, "ce": i % 2 == 0} for i, row in enumerate(ROWS * 2)]
SOURCES = [{**row, **({"kd_divergence": "tvd"} if i % 2 else {"kd_beta": 0.9})} for i, row in enumerate(ROWS * 2)]
SELECTION = TokenSelection(by="student_entropy", keep=0.5)

KINDS: dict[str, Any] = {
    "KD and CE": text,
    "KD": lambda at, **o: text(at, sft_alpha=0.0, **o),
    "CE": lambda at, **o: text(at, teacher=None, llm_kd_weight=0.0, **o),
    "top-k targets": lambda at, **o: text(at, by=Known(tiny.make_qwen3(seed=2)), **o),
    "top-k targets of some tokens": lambda at, **o: text(at, by=Known(tiny.make_qwen3(seed=2), covers=False), **o),
    "drawn targets": lambda at, **o: text(at, by=Known(tiny.make_qwen3(seed=2), drawn=True), beta=0.0, **o),
    "biased heads": lambda at, **o: text(
        at,
        with_bias(tiny.make_qwen3(seed=1, tie_word_embeddings=False)),
        with_bias(tiny.make_qwen3(seed=2, hidden=48, tie_word_embeddings=False)),
        **o,
    ),
    "capped logits": lambda at, **o: text(at, tiny.make_gemma2(seed=1), tiny.make_gemma2(seed=2), **o),
    "weights of rows": lambda at, **o: text(at, rows=WEIGHED, **o),
    "weights of rows, KD alone": lambda at, **o: text(at, rows=WEIGHED, sft_alpha=0.0, **o),
    "rows without CE": lambda at, **o: text(at, rows=UNLABELLED, **o),
    "divergences by source": lambda at, **o: text(at, rows=SOURCES, **o),
    "token selection": lambda at, **o: text(at, token_selection=SELECTION, **o),
    "token selection by disagreement, KD alone": lambda at, **o: text(
        at, sft_alpha=0.0, token_selection=SELECTION.model_copy(update={"by": "disagreement"}), **o
    ),
    "several teachers": lambda at, **o: text(at, by=RoutedTeacher(two()), rows=NAMED, **o),
    "the mean of several teachers": lambda at, **o: text(
        at, by=MixedTeacher(two(), {"a": 0.3, "b": 0.7}), kd_temperature=2.0, **o
    ),
    "hidden states": lambda at, **o: text(at, hidden_kd={"targets": {"layer": [0.5, 1.0]}}, **o),
    "padding-free": lambda at, **o: text(at, padding_free=True, **o),
    "packing": lambda at, **o: text(at, packing=True, max_length=96, **o),
    "its own average": lambda at, **o: text(at, tiny.make_qwen3(seed=1), by=SelfTeacher("ema", 0.5), **o),
    "on-policy": lambda at, **o: text(at, lmbda=1.0, temperature=1e-6, **o),
    "a teacher's head elsewhere": lambda at, **o: text(at, teacher=split(), **o),
    "gradient checkpointing": lambda at, **o: text(at, gradient_checkpointing=True, **o),
    "experts": lambda at, **o: text(
        at, tiny_families.make("qwen3_moe"), router_aux_loss_coef=0.2, **o
    ),
    "LoRA": lambda at, **o: make_trainer(
        at, None, tiny.make_qwen3(seed=2, hidden=48), rows=ROWS * 2, sft_alpha=0.3,
        extra={"peft_config": tiny.lora_config(rank=2, alpha=4, dropout=0.0)}, **o
    ),
    "another tokenizer, alm": lambda at, **o: other_trainer(at, **o),
    "another tokenizer, from a cache": lambda at, **o: text(
        at, by=CachedTeacher(stored(at / "cache")), rows=OTHER_ROWS, cross_tokenizer="alm", **o
    ),
    "another tokenizer, uld": lambda at, **o: other_trainer(at, cross_tokenizer="uld", **o),
    "images, llava": lambda at, **o: visual(at, "llava", **o),
}  # fmt: skip
ALL_KINDS: dict[str, Any] = {**KINDS, "images, qwen": lambda at, **o: visual(at, "qwen", **o)}
"""With those for a real device alone: a forward of Qwen-VL reads numbers in C++, past the device that counts."""
UPSTREAM = {
    "images, llava": ("transformers/",),
    "images, qwen": ("transformers/",),
    "on-policy": ("transformers/", "kdtrain/generation/", "kdtrain/trainer/samples.py"),
}
"""Waits that are not the loss's: in the forward of models with images, where transformers compares the numbers of image
tokens and features and looks at the mask, and while answers are written."""


class _Count(TrainerCallback):
    """Waits of each micro-batch, and of each step."""

    def __init__(self, waits: card.Waits) -> None:
        self._waits = waits
        self.micro_batches: list[Counter[tuple[str, str]]] = []
        self.steps: list[Counter[tuple[str, str]]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = self._waits.take()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.micro_batches.append(self._waits.take())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(self._begin + self._waits.take())


class _Tell(TrainerCallback):
    """Says when a step begins and ends, and when a micro-batch does."""

    def __init__(self, on_event: Callable[[str], None]) -> None:
        self._on_event = on_event

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._on_event("begin")

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._on_event("micro-batches")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._on_event("steps")


def run(kind: str, folder: Any, *, on_event: Callable[[str], None] | None = None, **options: Any) -> dict[str, Any]:
    """Train for three steps of two micro-batches, of which the last is logged."""
    torch.manual_seed(0)
    options = {
        "max_steps": 3, "logging_steps": 3, "gradient_accumulation_steps": 2, "optim": "adamw_torch_fused",
        "log_level": "error", "train_sampling_strategy": "sequential", **options,
    }  # fmt: skip
    trainer = ALL_KINDS[kind](folder, **options)
    trainer.startup_checked = trainer.alignment_checked = True
    if on_event is not None:
        trainer.add_callback(_Tell(on_event))
    if trainer.args.device.type != card.NAME:
        trainer.train()
        return {"loss": trainer.state.log_history[0]["loss"]}
    counted = _Count(_WAITS[-1])
    trainer.add_callback(counted)
    trainer.train()
    return {
        "micro-batches": [dict(one) for one in counted.micro_batches],
        "steps": [dict(one) for one in counted.steps],
        "loss": trainer.state.log_history[0]["loss"],
    }


_WAITS: list[card.Waits] = []


def _child(queue: Any, kind: str, folder: Any, options: dict[str, Any]) -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{card.NAME}:0"
    torch.set_num_threads(1)
    try:
        with card.waiting() as waits:
            _WAITS.append(waits)
            queue.put((True, run(kind, folder, use_cpu=False, **options)))
    except BaseException:
        queue.put((False, traceback.format_exc()))


def on_card(kind: str, folder: Any, **options: Any) -> dict[str, Any]:
    """`run` on the device that counts: what the host has waited for, by micro-batch and by step, and the loss."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, kind, folder, options))
    process.start()
    try:
        done, found = queue.get(timeout=120)
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
    assert done, found
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", tiny.first_quick(KINDS))
def test_the_host_waits_once_a_step_and_in_no_micro_batch(tmp_path, kind):
    found = on_card(kind, tmp_path / "card")
    ours = lambda waits: {k: n for k, n in waits.items() if not k[1].startswith(UPSTREAM.get(kind, ("-",)))}  # noqa: E731
    # The first step has what a run does once, and the last one is logged.
    assert [ours(one) for one in found["micro-batches"][1:]] == [{}] * 2
    [(what, count)] = ours(found["steps"][1]).items()
    assert what[1].startswith(ONCE)
    assert count == 1
    # The device's numbers are real: they are those of the CPU.
    assert math.isclose(found["loss"], run(kind, tmp_path / "cpu")["loss"], rel_tol=1e-5)
