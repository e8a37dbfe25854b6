"""Rows behind each other in a forward: the loss and the gradient are those of padded batches, whatever lies where."""

import itertools
import json
import random

import pytest
import torch
from datasets import Dataset
from trl.experimental.gkd import GKDConfig

from kdtrain.data.packing import Dealing, Layout, best_fit, in_lines, split_up
from kdtrain.errors import ConfigError, DataError, NotAvailableError, PreflightError
from kdtrain.preflight.packing import why_documents_mix
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.tiny_families import make

NONE = {}
PADDING_FREE = {"padding_free": True}
PACKING = {"packing": True}
TOKENS = {"per_device_train_tokens": 48}
WAYS = {
    "padding-free": PADDING_FREE,
    "packing": PACKING,
    "tokens": TOKENS,
    "padding-free, tokens": {**PADDING_FREE, **TOKENS},
    "packing, tokens": {**PACKING, **TOKENS},
}


def skewed_rows(count=20, longest=40, seed=0):
    """Tokenised rows of very different lengths; some supervise nothing, and one its very first token."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        length = longest if i % 7 == 3 else draw.randint(2, 9)
        ids = [draw.randrange(4, 300) for _ in range(length)]
        labels = ids if i == 5 else [-100] * (length // 2) + ids[length // 2 :]
        rows.append({"input_ids": ids, "labels": [-100] * length if i == 6 else labels, "row_id": f"row-{i}"})
        rows[-1]["ce"] = i % 4 != 1
        rows[-1]["prompt_length"] = max(length // 2, 1)
    return Dataset.from_list(rows)


def args(folder, **options):
    own = {"llm_kd_weight": 0.7, "sft_alpha": 0.3, "disable_dropout": True}
    own |= {name: options.pop(name) for name in list(options) if name not in GKDConfig.__dataclass_fields__}
    config = GKDConfig(
        **{
            "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "max_length": 40,
            "gradient_checkpointing": False, "learning_rate": 1e-2, "optim": "sgd", "logging_steps": 1, "max_steps": 2,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lmbda": 0.0, "save_strategy": "no",
            "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    for name, value in own.items():
        setattr(config, name, value)
    return config


def trained(folder, student, teacher=None, rows=None, tokenizer=None, extra=None, **options):
    """The records of a run, and how far its weights came."""
    trainer = GKDTrainerWithMetrics(
        student, teacher, args(folder, **options), train_dataset=skewed_rows() if rows is None else rows,
        processing_class=tokenizer or tiny.make_tokenizer(), **(extra or {}),
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    moved = torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)])
    return [record for record in trainer.state.log_history if "loss" in record], moved


SAME = ("loss", "grad_norm", "llm_kd_loss", "sft_loss", "token_accuracy", "teacher_agreement", "student_entropy")


def assert_same(one, other):
    (records, moved), (others, moved_too) = one, other
    assert len(records) == len(others)
    for record, same in zip(records, others, strict=True):
        for name in SAME:
            assert (name in record) == (name in same)
            if name in record:
                assert same[name] == pytest.approx(record[name], rel=1e-5, abs=1e-7), name
    assert float((moved - moved_too).norm() / moved.norm()) < 5e-5  # differences of rounded weights


FAMILIES = {
    "qwen3": lambda seed: tiny.make_qwen3(seed=seed),
    "llama": lambda seed: tiny.make_llama(seed=seed),
    "gemma3": lambda seed: make("gemma3", seed),  # a sliding window of 8, in rows of 40
    "gemma2": lambda seed: tiny.make_gemma2(seed=seed),  # soft-capped logits
    "gpt2": lambda seed: make("gpt2", seed),  # a table of 64 positions, in lines of more
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", tiny.first_quick(FAMILIES))
def test_loss_gradient_and_steps_are_those_of_padded_batches(tmp_path, tokenizer, family, way):
    make_one = FAMILIES[family]
    padded = trained(tmp_path / "a", make_one(1), make_one(2), tokenizer=tokenizer)
    other = trained(tmp_path / "b", make_one(1), make_one(2), tokenizer=tokenizer, **WAYS[way])
    assert_same(padded, other)
    assert all(
        len(records) == 2 and record["loss"] > 0.1 and record["grad_norm"] > 0.01
        for records, _ in (padded, other)
        for record in records
    )
    assert other[0][0]["padding_fraction"] < padded[0][0]["padding_fraction"]
