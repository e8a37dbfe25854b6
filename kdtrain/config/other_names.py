"""What other trainers, earlier versions of the same ones, and people call the options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields of GKDConfig that this schema has under another name.
RENAMED_FIELDS = {"teacher_model_name_or_path": "rlhf.teacher_model", "model_init_kwargs": "model.init_kwargs"}
_MODEL = (
    "name", "path", "id", "model_id", "model_name", "model_path", "name_or_path", "pretrained", "base", "base_model",
    "checkpoint", "student",
)  # fmt: skip
_TEACHER = (
    "teacher_name", "teacher_path", "teacher_id", "teacher_model_name", "teacher_model_path", "teacher_name_or_path",
)  # fmt: skip
_TRAIN = (
    "train_file", "train_files", "train_path", "train_data", "train_dataset", "path", "file", "files", "name",
    "dataset", "datasets",
)  # fmt: skip
_EVAL = (
    "eval_file", "eval_files", "eval_path", "eval_data", "eval_dataset", "validation", "validation_file", "valid",
    "val", "dev", "test",
)  # fmt: skip
_BATCH = ("per_device_batch_size", "train_batch_size", "micro_batch_size", "micro_batch", "batch_size")
# By section and key; the value is shown as it is.
_IN_SECTION: Mapping[tuple[str, str], str] = {
    **{("", name): "training" for name in ("trainer", "training_args", "training_arguments", "train_args")},
    **{("", name): "tuner" for name in ("lora", "peft", "adapter")},
    **{("", name): "rlhf" for name in ("distillation", "distill", "kd", "gkd", "loss")},
    **{("", name): "data.eval" for name in ("eval", "evaluation")},
    ("", "teacher"): "rlhf.teacher_model",
    **{("model", name): "model.model" for name in _MODEL},
    **{("rlhf", name): "rlhf.teacher_model" for name in _TEACHER},
    **{("data", name): "data.train" for name in _TRAIN},
    **{("data", name): "data.eval" for name in _EVAL},
    **{("tuner", name): "tuner.lora_rank" for name in ("r", "rank")},
    ("tuner", "alpha"): "tuner.lora_alpha",
    ("tuner", "dropout"): "tuner.lora_dropout",
    **{("tuner", name): "tuner.train_type" for name in ("type", "method", "tuner_type")},
    **{("training", name): "training.per_device_train_batch_size" for name in _BATCH},
}
# Whatever the section is.
_ANYWHERE: Mapping[str, str] = {
    "accumulation_steps": "training.gradient_accumulation_steps",
    "alpha": "rlhf.sft_alpha or rlhf.llm_kd_weight",
    "batch_size": "training.per_device_train_batch_size",
    "dataset": "data.train",
    "distillation_weight": "rlhf.llm_kd_weight",
    "early_stopping": "training.early_stopping_patience",
    "epochs": "training.num_train_epochs",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "eval_every": "training.eval_steps",
    "evaluation_strategy": "training.eval_strategy",
    "grad_accum": "training.gradient_accumulation_steps",
    "gradient_accumulation": "training.gradient_accumulation_steps",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "kd_weight": "rlhf.llm_kd_weight",
    "load_in_4bit": "model.quantization: 4bit",
    "load_in_8bit": "model.quantization: 8bit",
    "logging_dir": "training.output_dir, the folder of everything a run writes",
    "lora_r": "tuner.lora_rank",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "max_completion_length": "rlhf.max_new_tokens",
    "max_epochs": "training.num_train_epochs",
    "max_seq_length": "data.max_length",
    "mixed_precision": "training.bf16: true",
    "model_name_or_path": "model.model",
    "no_cuda": "training.use_cpu: true",
    "num_epochs": "training.num_train_epochs",
    "num_generations": "rlhf.samples_per_prompt",
    "num_return_sequences": "rlhf.samples_per_prompt",
    "num_steps": "training.max_steps",
    "optimizer": "training.optim",
    "patience": "training.early_stopping_patience",
    "report_to_wandb": "training.report_to: wandb",
    "save_every": "training.save_steps",
    "scheduler": "training.lr_scheduler_type",
    "student": "model.model",
    "student_model": "model.model",
    "torch_dtype": "model.dtype",
    "use_lora": "tuner.train_type: lora",
    "use_vllm": "rlhf.generation.backend: vllm_server or vllm_colocate",
    "vllm_mode": "rlhf.generation.backend: vllm_server or vllm_colocate",
    "vllm_server_base_url": "rlhf.generation.base_url",
    "warmup_ratio": "training.warmup_steps: a value below 1 is a share of all steps",
    **RENAMED_FIELDS,
}
_REMOVE: Mapping[str, str] = {
    "chat_template": "the chat template is that of the student's tokenizer",
    "fp16_backend": "training.fp16 is enough",
    "half_precision_backend": "training.fp16 is enough",
    "overwrite_output_dir": "no run writes over another; name a new training.output_dir, or go on with --resume auto",
    "save_safetensors": "weights are always saved as safetensors",
    "tokenizer": "the tokenizer is that of model.model",
    "tokenizer_name": "the tokenizer is that of model.model",
    "tokenizer_name_or_path": "the tokenizer is that of model.model",
}
# What a text means that stands where a map is asked for.
_SECTIONS: Mapping[str, str] = {
    "model": "model.model",
    "data": "data.train",
    "tuner": "tuner.train_type",
    "training": "training.output_dir",
    "rlhf.teacher": "rlhf.teacher_model",
}


def other_key(section: str, key: str, value: Any) -> str:
    """What to write instead of a key that other programs have; empty where it is none of those."""
    if (section, key) == ("", "train"):
        return "use training" if isinstance(value, Mapping) else "use data.train"
    name = _IN_SECTION.get((section, key))
    if name is None and (reason := _REMOVE.get(key)):
        return f"remove it: {reason}"
    return f"use {name}" if name else ""


def other_key_anywhere(key: str) -> str:
    """The same for keys that mean one thing, whatever the section."""
    name = _ANYWHERE.get(key)
    return f"use {name}" if name else ""


def for_text(path: str, value: Any) -> str:
    """What to write where a text stands in place of a section."""
    option = _SECTIONS.get(path)
    return f"write {option}: {value}" if option and isinstance(value, str) and len(value) < 200 else ""


def other_value(path: str, value: Any) -> str:
    """What to write instead of a value that other programs have."""
    if path == "tuner.train_type" and value == "qlora":
        return "QLoRA is tuner.train_type: lora beside model.quantization: 4bit"
    if path == "tuner.train_type" and value == "dora":
        return "write tuner.train_type: lora and tuner.use_dora: true"
    return ""
