"""How well a student does on held-out answers, by one function for all tools."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def held_out_kl(folder: Path, student: Path) -> float:
    """Mean KL(T‖S) over the tokens of held-out answers, their end included; nats per token, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder / "teacher", student)]
    total, count = 0.0, 0
    for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            teacher, learnt = (model(ids).logits[0, start - 1 : -1].double().log_softmax(-1) for model in models)
        total += float((teacher.exp() * (teacher - learnt)).sum())
        count += len(teacher)
    return total / count
