"""A small healthy world for the doctor's tests: a teacher that has learnt its rows, and variants of it with one fault.

Four tiny models are trained for a second or two each; everything is a folder, as a user has it.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.tiny_processors import make_llava, make_llava_model, picture

# Chat models think where `enable_thinking` is not false: the generation prompt then ends with an open block.
THINKING = tiny.CHATML.replace(
    "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
)
ALWAYS_THINKS = tiny.CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
OTHER = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou count.<|im_end|>\\n' }}{% endif %}" + tiny.CHATML
)
ENDLESS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat(i: int, j: int) -> dict[str, Any]:
    question, answer = f"What is {i} and {j}?", f"It is {i + j} in all, as the teacher says."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [chat(i, j) for i in range(8) for j in range(8)]
HELD_OUT = [chat(i, 9) for i in range(8)]


def make_tokenizer() -> Any:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_world(folder: Path) -> Path:
    """`student`, `teacher` and its variants, `train.jsonl`, `eval.jsonl`."""
    tokenizer = make_tokenizer()
    student, teacher = (tiny.make_qwen3(len(tokenizer), hidden, seed=seed) for seed, hidden in ((1, 32), (2, 48)))
    tiny.save_model(student, tokenizer, folder / "student")
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in ROWS]
    _train(teacher, tokenizer, texts, 20)
    tiny.save_model(teacher, tokenizer, folder / "weak")
    _train(teacher, tokenizer, texts, 110)
    tiny.save_model(teacher, tokenizer, folder / "teacher")
    thinks = [text.replace("assistant\n", "assistant\n<think>\nhm\n</think>\n") for text in texts]
    variants = {"thinker": thinks, "endless": [text.removesuffix("<|im_end|>\n") + "<|endoftext|>" for text in texts]}
    for name, own in variants.items():
        variant = copy.deepcopy(teacher)
        _train(variant, tokenizer, own, 40)
        tiny.save_model(variant, tokenizer, folder / name)
    write(folder / "train.jsonl", ROWS)
    write(folder / "eval.jsonl", HELD_OUT)
    return folder


def _train(model: Any, tokenizer: Any, texts: list[str], steps: int) -> None:
    """Plain steps on whole texts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = torch.randperm(len(texts), generator=generator)[:24]
        inputs = {name: values[some] for name, values in batch.items() if name != "token_type_ids"}
        model(**inputs, labels=labels[some]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def healthy(folder: Path) -> dict[str, Any]:
    """A config with nothing to be said of."""
    return {
        "model": {"model": str(folder / "student")},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 64},
        "rlhf": {"teacher_model": str(folder / "teacher"), "sft_alpha": 0.5, "beta": 0.0, "lmbda": 0.0},
        "training": {
            "output_dir": "run",
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "eval_strategy": "steps",
            "save_strategy": "no",
            "use_cpu": True,
        },
    }


def variant(folder: Path, name: str, source: str, **changes: Any) -> str:
    """A copy of a model folder with another chat template or other files; its path.

    Args:
        changes: `chat_template` (None takes it away), or the name of a JSON file without its ending and what to change.
    """
    copied = folder / name
    shutil.copytree(folder / source, copied)
    for file, values in changes.items():
        if file == "chat_template":
            (copied / "chat_template.jinja").unlink()
            if values is not None:
                (copied / "chat_template.jinja").write_text(values)
            continue
        path = copied / f"{file}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | values))
    return str(copied)


def make_pictures(folder: Path) -> None:
    """`vlm_student` and `vlm_teacher`, `blind` (its projector is broken), pictures and `pictures.jsonl`."""
    processor = make_llava()
    for name, seed, text in (("vlm_student", 1, 32), ("vlm_teacher", 2, 48), ("blind", 2, 48)):
        model = make_llava_model(len(processor.tokenizer), seed, text=text)
        if name == "blind":
            torch.nn.init.zeros_(model.model.multi_modal_projector.linear_2.weight)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    rows = []
    for i in range(6):
        picture(i).save(folder / f"{i}.png")
        question = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a thing" + " big" * i}]
        rows.append({"images": [f"{i}.png"], "messages": messages})
    write(folder / "pictures.jsonl", rows)
