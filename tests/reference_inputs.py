"""Models, rows and base configs of the reference runs; made once, read by both versions of the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests import tiny, tiny_processors

STEPS = 4
TRAINING = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "no",
    "learning_rate": 5e-3,
    "gradient_checkpointing": False,
}


def make_inputs(folder: Path) -> None:
    """Fill a folder with everything that a run reads."""
    folder.mkdir(parents=True)
    _models(folder)
    _write_rows(folder / "train.jsonl", _chats(13))
    _write_rows(folder / "completions.jsonl", [{"prompt": t[:14], "completion": t[14:]} for t in tiny.TEXT * 2])
    _write_rows(folder / "questions.jsonl", [{"messages": row["messages"][:1]} for row in _chats(5)])
    _write_rows(folder / "eval.jsonl", _chats(5))
    _write_config(folder / "text.yaml", "student", "teacher", "train.jsonl", "eval.jsonl")

    for i in range(8):
        tiny_processors.picture(i, width=32 + 8 * (i % 3)).save(folder / f"{i}.png")
    _write_rows(folder / "seeing.jsonl", _image_rows())
    _write_rows(folder / "seeing_eval.jsonl", _image_rows()[2:7])
    visual = {"enabled": True, "weight": 0.5, "targets": ["vit", "aligner"]}
    _write_config(
        folder / "vision.yaml", "seeing_student", "seeing_teacher", "seeing.jsonl", "seeing_eval.jsonl",
        custom={"visual_kd": visual},
    )  # fmt: skip


def _models(folder: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(3)
    experts = Qwen3MoeConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256, initializer_range=0.2,
        num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1, eos_token_id=2, pad_token_id=3,
        bos_token_id=None,
    )  # fmt: skip
    models = {
        "student": tiny.make_qwen3(seed=1),
        "teacher": tiny.make_qwen3(seed=2, hidden=48),
        "padded_teacher": tiny.make_qwen3(seed=2, hidden=48, vocab_size=384, tie_word_embeddings=False),
        "capped_student": tiny.make_gemma2(seed=4),
        "experts": Qwen3MoeForCausalLM(experts),
    }
    for name, model in models.items():
        tiny.save_model(model, tokenizer, folder / name)
    processor = tiny_processors.make_llava()
    vocabulary = len(processor.tokenizer)
    tiny_processors.make_llava_model(vocabulary, seed=1).save_pretrained(folder / "seeing_student")
    tiny_processors.make_llava_model(vocabulary, seed=2, vision=48, text=64).save_pretrained(folder / "seeing_teacher")
    for name in ("seeing_student", "seeing_teacher"):
        processor.save_pretrained(folder / name)


def _chats(count: int) -> list[dict[str, Any]]:
    """Chats of one to three turns with answers of 1 to some 30 tokens: the rows of a batch differ in length."""
    rows = []
    for i in range(count):
        messages = []
        for turn in range(1 + i % 3):
            text = tiny.TEXT[(i + turn) % len(tiny.TEXT)].split()
            messages.append({"role": "user", "content": " ".join(text[: 2 + i % 4]) + f" {i}?"})
            messages.append({"role": "assistant", "content": " ".join(text[: 1 + (3 * i + turn) % 7])})
        rows.append({"messages": messages})
    return rows


def _image_rows() -> list[dict[str, Any]]:
    """Of every three rows two have images, one of them two."""
    rows = []
    for i in range(12):
        images = [f"{(i + k) % 8}.png" for k in range(i % 3)]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": f"what is {i}?"}]
        answer = " ".join(tiny.TEXT[i % 4].split()[: 1 + i % 5])
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": images})
    return rows


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_config(path: Path, student: str, teacher: str, train: str, held_out: str, **more: Any) -> None:
    config = {
        "model": {"model": f"./{student}"},
        "data": {"train": train, "eval": held_out, "max_length": 160},
        "rlhf": {"teacher_model": f"./{teacher}", "sft_alpha": 0.3, "lmbda": 0.0, "max_new_tokens": 8},
        "training": TRAINING,
        **more,
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
