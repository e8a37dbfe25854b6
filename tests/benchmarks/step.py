"""One training step end to end: both models' forwards, the loss, and the backward down to the embeddings.

KD alone, β 0.5, since TRL's trainers have no cross-entropy. Random Qwen3 models; heads tied to the embeddings, as in
the small Qwen3 models, unless the case says otherwise. Every path sees the same ids and supervises the same tokens.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.memory import format_result, in_child, limit_memory, peak_extra
from tests.benchmarks.peers import IGNORE_INDEX, OURS, PEERS
from tests.benchmarks.timing import interleave, progress

Step = Callable[[], torch.Tensor]

PATHS = {
    OURS: "kdtrain GKDTrainerWithMetrics",
    "trl_gkd": "TRL GKDTrainer",
    "trl_distillation": "TRL DistillationTrainer's loss",
    "liger_compiled": "Liger compiled, all tokens",
    "liger_compiled_sup": "Liger compiled, supervised tokens",
}
BETA = 0.5


@dataclass(frozen=True)
class StepCase:
    """Two rows, the second half of each supervised."""

    vocab: int = 151936
    length: int = 512
    rows: int = 2
    layers: int = 8
    student_width: int = 512
    teacher_width: int = 1024
    dtype: str = "float32"
    tied: bool = True

    def __str__(self) -> str:
        heads = "tied" if self.tied else "untied"
        return (
            f"{self.rows} × {self.length} tokens, V {self.vocab}, {self.layers} layers, {self.student_width} and "
            f"{self.teacher_width} wide, {heads} heads, {self.dtype}"
        )


def make_model(case: StepCase, width: int, seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads = width // 64
    config = Qwen3Config(
        vocab_size=case.vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        tie_word_embeddings=case.tied,
        eos_token_id=2,
        pad_token_id=3,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).to(getattr(torch, case.dtype))


def make_step(path: str, case: StepCase, student: Any, teacher: Any) -> Step:
    """Forward and backward of one path over `student`, which it may wrap; `teacher` is only run."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, case.vocab, (case.rows, case.length), generator=generator)
    labels = ids.clone()
    labels[:, : case.length // 2] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if path in PEERS and path != OURS:
        return _peer_step(path, student, teacher.requires_grad_(False).eval(), batch)
    trainer = make_trainer(path, student, teacher)
    if path == "trl_distillation":
        batch = _as_completions(batch, case.length // 2)

    def step() -> torch.Tensor:
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.detach()

    return step


def _peer_step(path: str, student: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> Step:
    """A loss over hidden states, as one would write it around the two backbones."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:].reshape(-1)

    def hidden(model: Any) -> torch.Tensor:
        states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        return states.reshape(-1, states.shape[-1])

    def step() -> torch.Tensor:
        student.train()
        with torch.no_grad():
            teacher_hidden = hidden(teacher)
        loss = PEERS[path].loss(
            hidden(student), student.lm_head.weight, labels, teacher_hidden, teacher.lm_head.weight, BETA, 1.0, 0.0
        )
        loss.backward()
        return loss.detach()

    return step


def make_trainer(path: str, student: Any, teacher: Any) -> Any:
    """The trainer of a path."""
    import datasets
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from kdtrain.trainer import GKDTrainerWithMetrics
    from tests.tiny import make_tokenizer

    trainer, config = {
        OURS: (GKDTrainerWithMetrics, GKDConfig),
        "trl_gkd": (GKDTrainer, GKDConfig),
        "trl_distillation": (DistillationTrainer, DistillationConfig),
    }[path]
    args = config(
        output_dir=tempfile.mkdtemp(prefix="kdtrain-bench-"),
        beta=BETA,
        use_cpu=True,
        bf16=False,  # no autocast: the models are in the dtype that is measured
        gradient_checkpointing=False,
        report_to="none",
        max_steps=1,
        disable_tqdm=True,
    )
    rows = [{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}]
    dataset = datasets.Dataset.from_list(rows * args.per_device_train_batch_size * args.gradient_accumulation_steps)
    return trainer(student, teacher, args=args, train_dataset=dataset, processing_class=make_tokenizer())


def _as_completions(batch: dict[str, torch.Tensor], split: int) -> dict[str, torch.Tensor]:
    """The same tokens as DistillationTrainer has them after generation."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "prompt_ids": ids[:, :split],
        "prompt_mask": mask[:, :split],
        "completion_ids": ids[:, split:],
        "completion_mask": mask[:, split:],
    }


def measure_step(case: StepCase, paths: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """Times, losses and peak extra memory of each path and of ours, as a row of the results."""
    paths = list(dict.fromkeys([OURS, *paths]))
    found = {name: _not_possible(name) for name in paths}
    common = {"case": dataclasses.asdict(case), "threads": threads}
    possible = [name for name in paths if not found[name]]
    for name in possible:
        found[name] = {"memory": in_child({"kind": "step", "path": name, **common})}
    timed = [name for name in possible if found[name]["memory"].get("note") != "out of memory"]
    # All in one fresh process: the dense paths need nearly all that a process may use.
    times = in_child({"kind": "step_times", "paths": timed, "rounds": rounds, **common}, timeout=3600)
    for name in timed:
        found[name] |= times.get(name, times if "note" in times else {})
    _report(case, found)
    return {"case": vars(case), "title": str(case), "peers": found}


def measure_times(spec: dict[str, Any]) -> dict[str, Any]:
    """In the child process: the paths interleaved, with the loss that each found."""
    case = StepCase(**spec["case"])
    # Ours has a student of its own, since trainers may change theirs. The teacher is run by all and changed by none.
    students = {OURS: make_model(case, case.student_width, 1), "others": make_model(case, case.student_width, 1)}
    teacher = make_model(case, case.teacher_width, 2)
    steps = {name: make_step(name, case, students.get(name, students["others"]), teacher) for name in spec["paths"]}
    limit_memory()
    losses: dict[str, float] = {}

    def recorded(name: str) -> Callable[[], None]:
        def call() -> None:
            losses[name] = steps[name]().item()

        return call

    def forget_gradients() -> None:
        for model in students.values():
            model.zero_grad(set_to_none=True)

    timings = interleave({name: recorded(name) for name in steps}, rounds=spec["rounds"], before=forget_gradients)
    return {name: timing.as_dict() | {"loss": losses.get(name)} for name, timing in timings.items()}


def _report(case: StepCase, found: dict[str, dict[str, Any]]) -> None:
    text = [
        f"{name} {row.get('ratio', float('nan')):.2f} ({format_result(row['memory'])})"
        for name, row in found.items()
        if "memory" in row
    ]
    progress(f"step, {case}: {', '.join(text)}")


def _not_possible(path: str) -> dict[str, Any]:
    if path in PEERS and not PEERS[path].installed:
        return {"note": f"{PEERS[path].package} is not installed"}
    return {}


def measure_memory(spec: dict[str, Any]) -> int:
    """In the child process: peak extra memory of one step; the models and their inputs are there before."""
    case, path = StepCase(**spec["case"]), spec["path"]
    compiled = path in PEERS and PEERS[path].compiled
    first = case if compiled else dataclasses.replace(case, vocab=512, length=16, layers=1)
    student, teacher = make_model(first, first.student_width, 1), make_model(first, first.teacher_width, 2)
    make_step(path, first, student, teacher)()
    if not compiled:
        student, teacher = make_model(case, case.student_width, 1), make_model(case, case.teacher_width, 2)
    student.zero_grad(set_to_none=True)
    step = make_step(path, case, student, teacher)
    return peak_extra(step)
