"""The memory plan beside what whole runs take: each a process of its own, with a config, from its data to its model.

Measured is the highest resident memory above the level after a tiny run in the same process, which has loaded the
libraries and built what they keep.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.benchmarks.memory import in_child, peak_extra
from tests.benchmarks.timing import progress

_VOCABULARY = 8192


@dataclass(frozen=True)
class PlanCase:
    """A run of three steps of two accumulated micro-batches."""

    name: str
    rows: int = 4
    length: int = 256
    student: tuple[int, int] = (512, 6)
    """Hidden width and layers."""
    teacher: tuple[int, int] | None = (512, 8)
    lora: bool = False
    checkpointing: bool = False
    new_tokens: int = 0
    """Above 0 all answers are the student's own."""
    accumulation: int = 2
    attention: str = "sdpa"
    average: bool = False
    """The teacher is a moving average of the student."""

    def __str__(self) -> str:
        return self.name


CASES = (
    PlanCase("full"),
    PlanCase("full, checkpointing", checkpointing=True),
    PlanCase("full, one micro-batch", accumulation=1, rows=2, length=512),
    PlanCase("full, small batch", rows=1, length=128, student=(768, 8)),
    PlanCase("full, eager attention", attention="eager"),
    PlanCase("LoRA", lora=True),
    PlanCase("LoRA, checkpointing", lora=True, checkpointing=True),
    PlanCase("CE alone", teacher=None),
    PlanCase("moving average", teacher=None, average=True),
    PlanCase("on-policy, full", new_tokens=96),
    PlanCase("on-policy, LoRA", new_tokens=32, lora=True, length=128, student=(512, 6), checkpointing=True),
)


def measure(case: PlanCase, threads: int) -> dict[str, Any]:
    """Planned and measured bytes, as a row of the results."""
    spec = {"kind": "planned", "case": asdict(case), "threads": threads}
    found = in_child(spec)
    if "bytes" in found:
        found["ratio"] = found["planned"] / found["bytes"]
    progress(f"plan, {case}: {found}")
    return {"title": str(case), **found}


def measure_run(spec: dict[str, Any]) -> dict[str, Any]:
    """In the child process: first the tiny run, then the run, then its dry run and its plan."""
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.preflight.memory import plan_memory
    from kdtrain.preflight.run_setup import setup_of

    case = PlanCase(**{**spec["case"], "student": tuple(spec["case"]["student"])})
    small = replace(
        case, rows=2, length=40, student=(64, 2), teacher=case.teacher and (64, 2), new_tokens=min(case.new_tokens, 8)
    )
    with tempfile.TemporaryDirectory(prefix="kdtrain-plan-") as folder:
        _run(_project(Path(folder) / "tiny", small))
        config = _project(Path(folder) / "run", case)
        watch = _StepSeconds()
        measured = peak_extra(lambda: _run(config, watch))
        told = _dry_run(config)
        arguments = build_train_arguments(config)
        plan = plan_memory(setup_of(config, arguments.training_args, longest=case.length, longest_prompt=_prompt(case)))
    times = {"planned_s": told, "seconds": watch.seconds}
    return {"bytes": measured, "planned": plan.total, "phase": plan.phase, "parts": plan.parts, **times}


class _StepSeconds(TrainerCallback):
    """Processor time from the beginning of the first step to the end of the last."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seconds = -time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.process_time()


def _dry_run(config: Any) -> float:
    """What a dry run says of the time of a run's steps, in processor time."""
    from kdtrain.trainer import dry_run

    before, dry_run.clock = dry_run.clock, time.process_time
    try:
        changed = config.model_copy(update={"training": {**config.training, "output_dir": tempfile.mkdtemp()}})
        return _run(changed, dry_run=True).metrics["run_time_s"]
    finally:
        dry_run.clock = before


def _prompt(case: PlanCase) -> int:
    return case.length - case.new_tokens if case.new_tokens else case.length // 2


def _run(config: Any, *callbacks: TrainerCallback, dry_run: bool = False) -> Any:
    from rich.console import Console

    from kdtrain.cli.progress import ConsoleReporter
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.runs.build import Given
    from kdtrain.runs.fit import fit

    reporter = ConsoleReporter(Console(stderr=True), quiet=True)
    return fit(build_train_arguments(config), reporter, dry_run=dry_run, given=Given(callbacks=callbacks))


def _project(folder: Path, case: PlanCase) -> Any:
    """A config with its models and rows, of which each batch has one of the full length."""
    from kdtrain.config import ConfigLoader
    from tests.tiny import make_tokenizer, save_model

    folder.mkdir()
    tokenizer = make_tokenizer()
    for name, size in (("student", case.student), ("teacher", case.teacher)):
        if size is not None:
            save_model(_model(*size, seed=len(name)), tokenizer, folder / name)
    rows = case.rows * case.accumulation * 3
    prompt = _prompt(case)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(rows):
            answer = case.length - prompt - (0 if i % 2 == 0 else 3)
            row = {"prompt": "~" * prompt, "completion": "~" * (answer - 1)}  # a token each, and one that ends it
            file.write(json.dumps(row) + "\n")
    rlhf: dict[str, Any] = {"lmbda": 1.0 if case.new_tokens else 0.0, "max_new_tokens": max(case.new_tokens, 1)}
    if case.average:
        rlhf |= {"teacher": {"backend": "self", "weights": "ema"}}
    elif case.teacher is None:
        rlhf |= {"llm_kd_weight": 0.0}
    else:
        rlhf |= {"teacher_model": str(folder / "teacher")}
    return ConfigLoader.load({
        "model": {"model": str(folder / "student"), "attn_implementation": case.attention},
        "tuner": {"train_type": "lora" if case.lora else "full"},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": case.length},
        "rlhf": rlhf,
        "training": {
            "output_dir": str(folder / "run"),
            "per_device_train_batch_size": case.rows,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_checkpointing": case.checkpointing,
            "max_steps": 3,
            "save_strategy": "no",
            "learning_rate": 1e-4,
            "use_cpu": True,
        },
    })  # fmt: skip


def _model(width: int, layers: int, seed: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128 or 1,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_id=2,
        pad_token_id=3,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)
