"""Memory of training an adapter with the student as its own teacher, beside fine-tuning alone and a second model.

Each figure is the peak of the whole run (models, optimizer, two steps) above the level before anything was built, in a
process of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.memory import format_result, in_child, peak_extra
from tests.benchmarks.peers import IGNORE_INDEX
from tests.benchmarks.timing import progress

SFT, FORWARD = "sft", "forward"
TITLES = {
    SFT: "LoRA, cross-entropy alone",
    "base": "self, base",
    "ema": "self, ema",
    "hf": "hf, the same model again",
    FORWARD: "one forward without a gradient",
}


@dataclass(frozen=True)
class ItselfCase:
    """A Qwen3 of float32 weights that trains a LoRA adapter of rank 16 on all linear layers."""

    rows: int = 2
    length: int = 256
    vocab: int = 8192
    layers: int = 12
    width: int = 768

    def __str__(self) -> str:
        return f"{self.rows} × {self.length} tokens, V {self.vocab}, {self.layers} layers, {self.width} wide, LoRA 16"


def measure(case: ItselfCase, threads: int) -> dict[str, Any]:
    """Peak memory of each way to train, of one forward, and the bytes of the weights."""
    spec = {"kind": "itself", "case": dataclasses.asdict(case), "threads": threads}
    found = {name: in_child({**spec, "name": name}) for name in TITLES}
    progress(f"self, {case}: " + ", ".join(f"{name} {format_result(result)}" for name, result in found.items()))
    return {"case": vars(case), "title": str(case), "weights": _weights(case), "peers": found}


def _weights(case: ItselfCase) -> int:
    with torch.device("meta"):
        return sum(4 * parameter.numel() for parameter in _model(case).parameters())


def measure_memory(spec: dict[str, Any]) -> int:
    """In the child process: what one way takes at its peak."""
    case, name = ItselfCase(**spec["case"]), spec["name"]
    small = dataclasses.replace(case, vocab=512, length=16, layers=1, width=64)
    if name == FORWARD:
        _forward(small, _model(small))()
        model = _model(case)  # there before
        return peak_extra(_forward(case, model))
    _train(small, name)  # what libraries load once is not the run's
    return peak_extra(lambda: _train(case, name))


def _model(case: ItselfCase) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    heads = case.width // 64
    config = Qwen3Config(
        vocab_size=case.vocab, hidden_size=case.width, intermediate_size=3 * case.width, num_hidden_layers=case.layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=64, tie_word_embeddings=True, eos_token_id=2,
        pad_token_id=3, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def _rows(case: ItselfCase) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, case.vocab, (case.rows, case.length), generator=generator).tolist()
    half = case.length // 2
    return [{"input_ids": row, "labels": [IGNORE_INDEX] * half + row[half:]} for row in ids]


def _forward(case: ItselfCase, model: Any) -> Callable[[], None]:
    ids = torch.tensor([row["input_ids"] for row in _rows(case)])

    def call() -> None:
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)

    return call


def _train(case: ItselfCase, name: str) -> None:
    from trl.experimental.gkd import GKDConfig

    from kdtrain.teachers import SelfTeacher
    from kdtrain.trainer import GKDTrainerWithMetrics
    from tests.tiny import lora_config, make_tokenizer

    args = GKDConfig(
        output_dir=tempfile.mkdtemp(prefix="kdtrain-bench-"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", max_steps=2, disable_tqdm=True, save_strategy="no", lmbda=0.0, max_length=case.length,
        per_device_train_batch_size=case.rows,
    )  # fmt: skip
    args.llm_kd_weight = 0.0 if name == SFT else 1.0  # type: ignore[attr-defined]
    args.sft_alpha = 0.5  # type: ignore[attr-defined]
    teacher = {"teacher": SelfTeacher(name)} if name in ("base", "ema") else {}
    second = {"teacher_model": _model(case)} if name == "hf" else {}
    GKDTrainerWithMetrics(
        _model(case), args=args, train_dataset=_rows(case), processing_class=make_tokenizer(),
        peft_config=lora_config(rank=16, alpha=32, dropout=0.0, target_modules="all-linear"), **teacher, **second,
    ).train()  # fmt: skip
