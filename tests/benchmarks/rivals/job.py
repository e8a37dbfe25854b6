"""What every tool is given: a student, a teacher, rows, and what is asked of them.

A job is forward KL on the data's rows and nothing else, with plain AdamW. The folder holds:

    student/, teacher/, teacher_other_tokens/   models of the same size of vocabulary, each with its tokenizer
    train.jsonl, heldout.jsonl                  conversations of one question and one answer
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from tests.tiny import make_qwen3, make_tokenizer

Row = dict[str, object]
VOCABULARY = 320
STEPS = 60
WINDOW = 16
"""Rows of a step, however they are cut up."""
LAYOUTS = {"1 × 16": (16, 1, 1), "4 × 4": (4, 4, 1), "2 ranks": (8, 1, 2)}
"""Rows in a micro-batch, micro-batches of a rank, ranks."""
MISSPELT = {"learning_rate": "learing_rate", "temperature": "temprature"}
"""Letters left out within the word: argparse takes the beginning of an option for the whole."""
MAX_LENGTH = 96
_ROWS, _HELD_OUT = 256, 64
_TEACHER_STEPS = 300


@dataclass(frozen=True)
class Training:
    """One run of a job."""

    folder: Path
    out: Path
    steps: int = STEPS
    layout: tuple[int, int, int] = LAYOUTS["1 × 16"]
    learning_rate: float = 2e-3
    teacher: str = "teacher"
    save_steps: int | None = None
    resume: bool = False
    misspelt: str | None = None
    """One option that is written wrongly: a key of `MISSPELT`."""

    def spelt(self, option: str) -> str:
        """The option as this run writes it."""
        return MISSPELT[option] if option == self.misspelt else option


def prepare(folder: Path) -> None:
    """Write models and rows, the same on every machine but for rounding."""
    if (folder / "heldout.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(VOCABULARY)
    tokenizer.padding_side = "right"
    rows = make_rows(_ROWS + _HELD_OUT)
    student = make_qwen3(VOCABULARY, hidden=48, seed=1)
    teacher = _trained(make_qwen3(VOCABULARY, hidden=96, seed=2), tokenizer, rows)
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    teacher.save_pretrained(folder / "teacher_other_tokens")
    _other_tokens(tokenizer).save_pretrained(folder / "teacher_other_tokens")
    _write(folder / "train.jsonl", rows[:_ROWS])
    _write(folder / "heldout.jsonl", rows[_ROWS:])


def make_rows(count: int) -> list[Row]:
    """Questions with answers of one to twelve words, so that micro-batches differ in their tokens."""
    draw = random.Random(0)
    nouns = ("path", "file", "token", "teacher", "student", "number", "answer")
    verbs = ("returns", "predicts", "reads", "learns", "is")
    rows = []
    for i in range(count):
        sentence = " ".join(f"the {draw.choice(nouns)} {draw.choice(verbs)}" for _ in range(draw.randint(1, 6)))
        turns = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": sentence}]
        rows.append({"messages": turns})
    return rows


def _trained(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> torch.nn.Module:
    """A teacher that has read all rows: plain fine-tuning, in float32 and one thread."""
    torch.manual_seed(0)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    encoded = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(_TEACHER_STEPS):
        chosen = torch.arange(step * 16, step * 16 + 16) % len(rows)
        ids, mask = encoded["input_ids"][chosen], encoded["attention_mask"][chosen]
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def _other_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same vocabulary size, and every merged token another number."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    merged = sorted(
        (token for token in vocabulary if len(token) > 1 and not token.startswith("<|")), key=vocabulary.get
    )
    numbers = [vocabulary[token] for token in merged]
    vocabulary.update(zip(merged, reversed(numbers), strict=True))
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content)),
        eos_token="<|im_end|>", pad_token="<|pad|>",
    )  # fmt: skip
    other.chat_template = tokenizer.chat_template
    return other


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
