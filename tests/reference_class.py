"""Trains by the Python class, as a user's own script would; started by the reference runs with either version.

python tests/reference_class.py INPUTS PART        PART is messages, collators or images; into the current folder
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from trl.experimental.gkd import GKDConfig
from trl.experimental.utils import DataCollatorForChatML

from kdtrain.trainer import GKDTrainerWithMetrics

INPUTS = Path(sys.argv[1])
OPTIONS = {"llm_kd_weight": 0.8, "sft_alpha": 0.3, "divergence": "jsd_scaled", "kd_temperature": 1.5}


def train(name: str, student: Any, teacher: Any, rows: list[dict[str, Any]], processing: Any, **given: Any) -> None:
    """Four steps; the records and the weights go into a folder of that name."""
    settings = {key: given.pop(key) for key in ("lmbda", "seq_kd") if key in given}
    args = GKDConfig(
        output_dir=name, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_steps=1, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=5e-3,
        eval_strategy="steps", eval_steps=2, disable_tqdm=True, max_new_tokens=6, max_length=160,
        **{"lmbda": 0.0, **settings},
    )  # fmt: skip
    for key, value in {**OPTIONS, "visual_kd": given.pop("visual_kd", None)}.items():
        if value is not None:
            setattr(args, key, value)
    trainer = GKDTrainerWithMetrics(
        student, teacher, args, train_dataset=rows, eval_dataset=rows[:5], processing_class=processing, **given
    )
    trainer.train()
    trainer.save_model()
    lines = [json.dumps(record) for record in trainer.state.log_history]
    (Path(name) / "logging.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (INPUTS / name).read_text(encoding="utf-8").splitlines()]


def of_folders(kind: Any, prefix: str = "") -> tuple[Any, Any]:
    return tuple(kind.from_pretrained(INPUTS / f"{prefix}{name}", dtype="float32") for name in ("student", "teacher"))


def messages() -> None:
    """Raw rows through the trainer's own collator: on the data's answers, the student's and the teacher's."""
    tokenizer = AutoTokenizer.from_pretrained(INPUTS / "student")
    rows = read("train.jsonl")
    train("off_policy", *of_folders(AutoModelForCausalLM), rows, tokenizer)
    train("on_policy", *of_folders(AutoModelForCausalLM), rows, tokenizer, lmbda=1.0)
    train("seq_kd", *of_folders(AutoModelForCausalLM), rows, tokenizer, seq_kd=True)


def collators() -> None:
    """A user's own collator, which returns a dict of tensors, and trl's."""
    tokenizer = AutoTokenizer.from_pretrained(INPUTS / "student")

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def column(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
        return {"input_ids": column("input_ids", 3), "labels": column("labels", -100), "attention_mask": mask}

    encoded = [
        {"input_ids": ids, "labels": [-100] * (1 + i % 5) + ids[1 + i % 5 :]}
        for i, row in enumerate(read("train.jsonl"))
        for ids in [tokenizer(row["messages"][1]["content"] + " and so on and on.")["input_ids"]]
    ]
    train("own", *of_folders(AutoModelForCausalLM), encoded, tokenizer, data_collator=padded)
    for lmbda in (0.0, 1.0):
        train(
            f"chatml_{lmbda:.0f}", *of_folders(AutoModelForCausalLM), read("train.jsonl"), tokenizer, lmbda=lmbda,
            data_collator=DataCollatorForChatML(tokenizer, max_length=160),
        )  # fmt: skip


def images() -> None:
    """Raw rows with pictures in memory, and some without."""
    processor = AutoProcessor.from_pretrained(INPUTS / "seeing_student")
    rows = read("seeing.jsonl")
    for row in rows:
        row["images"] = [Image.open(INPUTS / name) for name in row["images"]]
    visual = {"targets": ["aligner"]}
    for lmbda in (0.0, 1.0):
        models = of_folders(AutoModelForImageTextToText, "seeing_")
        train(f"images_{lmbda:.0f}", *models, rows, processor, lmbda=lmbda, visual_kd=visual)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"messages": messages, "collators": collators, "images": images}[sys.argv[2]]()
