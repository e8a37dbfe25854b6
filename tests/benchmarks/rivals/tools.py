"""How each tool is started on a job: the files that it reads and its command, as its own documentation has them.

What is set is what the job says and nothing to a tool's favour: no warm-up, no weight decay, no clipping, no dropout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.rivals.job import MAX_LENGTH, Training

Command = list[str]


def shared_options(training: Training) -> dict[str, Any]:
    """Of transformers' TrainingArguments, which all of these tools train with."""
    batch, accumulation, _ = training.layout
    return {
        "output_dir": str(training.out),
        "max_steps": training.steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        training.spelt("learning_rate"): training.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "steps" if training.save_steps else "no",
        "save_steps": training.save_steps or 500,
        "seed": 0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "use_cpu": True,
        "dataloader_num_workers": 0,
    }


def launched(python: str, module: list[str], ranks: int) -> Command:
    """A module, or a script, in one process or on two ranks of one machine."""
    if ranks == 1:
        return [python, *module]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [python, *launch, *module]


def kdtrain(python: str, training: Training) -> Command:
    options = shared_options(training)
    config = {
        "model": {"model": str(training.folder / "student"), "dtype": "float32"},
        "data": {"train": str(training.folder / "train.jsonl"), "max_length": MAX_LENGTH},
        "rlhf": {"teacher_model": str(training.folder / training.teacher), "beta": 0.0, "lmbda": 0.0},
        "training": {**options, "report_to": "none"},
        "launch": {"num_processes": training.layout[2]},
    }
    config["rlhf"][training.spelt("temperature").replace("temp", "kd_temp")] = 1.0
    command = [python, "-m", "kdtrain", "fit", _written(training, config)]
    return [*command, "--resume", "auto"] if training.resume else command


def trl(python: str, training: Training) -> Command:
    """trl's own GKDTrainer by its constructor, as in the example of its documentation."""
    options = {**shared_options(training), "lmbda": 0.0, "beta": 0.0, "max_length": MAX_LENGTH}
    options[training.spelt("temperature")] = 1.0
    job = {
        "student": str(training.folder / "student"),
        "teacher": str(training.folder / training.teacher),
        "rows": str(training.folder / "train.jsonl"),
        "options": options,
        "resume": training.resume,
    }
    script = str(Path(__file__).with_name("trl_script.py"))
    return launched(python, [script, _written(training, job)], training.layout[2])


def swift(python: str, training: Training) -> Command:
    options = shared_options(training)
    del options["report_to"]
    wanted = {
        **options,
        "rlhf_type": "gkd",
        "model": training.folder / "student",
        "teacher_model": training.folder / training.teacher,
        "model_type": "qwen3",
        "teacher_model_type": "qwen3",
        "template": "chatml",
        "dataset": training.folder / "train.jsonl",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "lmbda": 0.0,
        "beta": 0.0,
        training.spelt("temperature"): 1.0,
        "max_length": MAX_LENGTH,
        "split_dataset_ratio": 0,
        "report_to": "none",
    }
    given = [part for name, value in wanted.items() for part in (f"--{name}", _text(value))]
    if training.resume:
        given += ["--resume_from_checkpoint", str(_newest(training.out))]
    return launched(python, ["-m", "swift.cli.rlhf", *given], training.layout[2])


def oumi(python: str, training: Training) -> Command:
    batch, accumulation, ranks = training.layout
    config = {
        "model": {
            "model_name": str(training.folder / "student"),
            "model_max_length": MAX_LENGTH,
            "torch_dtype_str": "float32",
            "device_map": "cpu",
        },
        "data": {
            "train": {
                "datasets": [{
                    "dataset_name": "text_sft_jsonl",
                    "dataset_path": str(training.folder / "train.jsonl"),
                    "dataset_kwargs": {"return_conversations": True, "return_conversations_format": "dict"},
                }],
            },
        },
        "training": {
            "trainer_type": "TRL_GKD",
            "output_dir": str(training.out),
            "max_steps": training.steps,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            training.spelt("learning_rate"): training.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1e9,
            "logging_steps": 1,
            "save_steps": training.save_steps or 0,
            "seed": 0,
            "enable_gradient_checkpointing": False,
            "enable_tensorboard": False,
            "enable_wandb": False,
            "try_resume_from_last_checkpoint": training.resume,
            "gkd": {
                "teacher_model_name_or_path": str(training.folder / training.teacher),
                "teacher_model_init_kwargs": {"dtype": "float32"},
                "lmbda": 0.0, "beta": 0.0, training.spelt("temperature"): 1.0, "max_new_tokens": 8,
            },
        },
    }  # fmt: skip
    return launched(python, ["-m", "oumi", "train", "-c", _written(training, config)], ranks)


def distillkit(python: str, training: Training) -> Command:
    options = shared_options(training)
    del options["output_dir"]
    options["resume_from_checkpoint"] = training.resume
    config = {
        "model": str(training.folder / "student"),
        "output_path": str(training.out),
        "use_flash_attention": False,
        "sequence_length": MAX_LENGTH,
        "dataset": {"train_dataset": {"disk_path": str(training.folder / "train_disk")}, "seed": 0},
        "teacher": {"kind": "hf", "path": str(training.folder / training.teacher)},
        "loss_functions": [{"function": "kl", "weight": 1.0, training.spelt("temperature"): 1.0}],
        "training_args": options,
    }
    return launched(python, ["-m", "distillkit.main", _written(training, config)], training.layout[2])


TOOLS: dict[str, Callable[[str, Training], Command]] = {
    "kdtrain": kdtrain,
    "trl": trl,
    "swift": swift,
    "oumi": oumi,
    "distillkit": distillkit,
}


def _written(training: Training, config: dict[str, Any]) -> str:
    """JSON is YAML: each of these tools reads it."""
    path = training.out.with_name(training.out.name + ".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return str(path)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _newest(out: Path) -> Path | None:
    found = sorted(out.rglob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    return found[-1] if found else None
