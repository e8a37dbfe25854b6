"""`logging.jsonl` of a resumed run."""

import json

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from kdtrain.runs.log import JsonlLogger


def test_records_after_the_step_resumed_from_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "logging.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    log, args = JsonlLogger(path), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    log.on_train_begin(args, TrainerState(global_step=1), TrainerControl())
    infinite = {"loss": float("inf"), "grad_norm": torch.tensor(0.5)}
    log.on_log(args, TrainerState(global_step=2), TrainerControl(), logs=infinite)
    log.on_log(args, TrainerState(global_step=2), TrainerControl(), logs={"runtime": 3.0})  # the summary
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None, "grad_norm": 0.5},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["logging.jsonl"]
