"""Which fields of trl's GKDConfig a config may set, and to what: those that would be ignored, or that would break the
loss or the guarantees of a run, are refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from kdtrain.config.diagnose import describe
from kdtrain.config.options import TrainingOptions
from kdtrain.config.suggest import known_keys, unknown_key
from kdtrain.config.training_fields import training_fields
from kdtrain.config.translate import to_problem
from kdtrain.config.tree import Problem


@dataclass(frozen=True)
class Refused:
    """Why a field may not be set, and what does instead."""

    reason: str
    instead: str = "remove it"
    harmless: tuple[Any, ...] = (None,)
    """Values that change nothing: they may stand in a config written for another trainer."""
    later: bool = False
    """Whether a later version will honour it."""

    def allows(self, value: Any) -> bool:
        # `True == 1` and `False == 0`: a boolean is harmless only where a boolean is listed.
        return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in self.harmless)


_MASKS = Refused("the supervised tokens are chosen in `data`", "use data.train_on")
_OWN_DATA = Refused("kdtrain prepares the data itself, so this would be ignored")
_METRICS = Refused("evaluation reports its own metrics, so this would be ignored", harmless=(None, False, []))
_LIGER = "Liger kernels replace parts of the model's forward that the loss uses"
_LOSS = "the loss is llm_kd_weight · divergence + sft_alpha · cross-entropy"
_LAUNCHER = Refused("the launcher sets it", "see launch.num_processes and launch.config_file", (None, -1))

REFUSED: dict[str, Refused] = {
    "remove_unused_columns": Refused("columns such as labels and images must reach the loss", harmless=(False,)),
    "dataset_kwargs": _OWN_DATA,
    "dataset_text_field": Refused(_OWN_DATA.reason, "use data.train: {columns: {text: NAME}}", (None, "text")),
    "shuffle_dataset": Refused("rows are shuffled in every epoch anyway", harmless=(None, False)),
    "chat_template_path": Refused("the template of the student's tokenizer is used"),
    "eos_token": Refused("the student's tokenizer decides"),
    "pad_token": Refused("the student's tokenizer decides"),
    "truncation_mode": Refused(
        "rows are cut from the right", "set data.on_overlength, or raise data.max_length", (None, "keep_start")
    ),
    "packing_strategy": Refused(_OWN_DATA.reason, "use data.packing"),
    "eval_packing": Refused(_OWN_DATA.reason, "use data.packing", (None, False)),
    "completion_only_loss": _MASKS,
    "assistant_only_loss": Refused(_MASKS.reason, _MASKS.instead, (None, False)),
    "loss_type": Refused(_LOSS, "set rlhf.llm_kd_weight: 0 for plain cross-entropy", (None, "nll")),
    "label_smoothing_factor": Refused("the loss does not smooth labels", harmless=(None, 0)),
    "average_tokens_across_devices": Refused("the loss would depend on the number of processes", harmless=(True,)),
    "logging_nan_inf_filter": Refused("a run with NaN would be shown as loss 0", harmless=(False,)),
    "auto_find_batch_size": Refused(
        "the batch would change during the run", "set training.per_device_train_batch_size", (None, False)
    ),
    "use_liger_kernel": Refused(_LIGER, harmless=(None, False)),
    "liger_kernel_config": Refused(_LIGER),
    "hub_token": Refused("secrets do not belong in a config", "set the environment variable HF_TOKEN"),
    "enable_jit_checkpoint": Refused(
        "kdtrain saves on SIGTERM itself, with the right exit code", harmless=(None, False)
    ),
    "resume_from_checkpoint": Refused("a run is resumed from the command line", "use kdtrain fit --resume PATH"),
    "prediction_loss_only": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "label_names": Refused("the labels of a batch are called labels", harmless=(None, ["labels"])),
    "use_cache": Refused("a loss needs no cache of keys and values", harmless=(None, False)),
    "parallelism_config": Refused("it is a Python object", "use launch.config_file"),
    "local_rank": _LAUNCHER,
}

_WITHOUT_EFFECT = {
    "disable_tqdm": "kdtrain shows its own progress",
    "do_train": "kdtrain fit always trains",
    "do_eval": "training.eval_strategy decides",
    "do_predict": "kdtrain never predicts while training",
    "length_column_name": "the tokens of rows are counted where rows are grouped by length",
}

# Options of accelerate's data loader: the value that is refused, why, and what to do.
_LOADER = {
    "split_batches": (
        True,
        "rows that fill up an epoch would count twice",
        "remove it, and divide training.per_device_train_batch_size by the number of processes",
    ),
    "dispatch_batches": (True, "the row ids of a batch cannot be sent to other processes", "remove it"),
    "even_batches": (False, "a process that runs out of rows would leave the others waiting", "remove it"),
    "use_seedable_sampler": (False, "a resumed run would read rows in another order", "remove it"),
}

_AT_LEAST_1 = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
    "dataset_num_proc",
    "torch_empty_cache_steps",
)
_NON_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "dataloader_num_workers",
    "seed",
    "data_seed",
)
_ABOVE_0 = ("num_train_epochs", "adam_epsilon", "logging_steps", "eval_steps", "save_steps")


def check_training(training: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with single keys of the `training` section."""
    own = {key: value for key, value in training.items() if key in TrainingOptions.model_fields}
    of_trl = {key: value for key, value in training.items() if key not in own}
    yield from (problem for key, value in of_trl.items() if (problem := _check_key(key, value)))
    yield from _check_own(own)
    loader = training.get("accelerator_config")
    if isinstance(loader, Mapping):
        for name, reason, instead in refused_loader_options(loader):
            path = ("training", "accelerator_config", name)
            yield Problem(path, f"cannot be {str(loader[name]).lower()}: {reason}", instead, on_key=True)


def refused_loader_options(options: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, reason and what to do of each option in an `accelerator_config` that loses rows or counts them twice."""
    for name, (value, reason, instead) in _LOADER.items():
        if options.get(name) is value:
            yield name, reason, instead


def _check_own(options: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        TrainingOptions.model_validate(options)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problem = to_problem(detail)
            yield replace(problem, path=("training", *problem.path))


def _check_key(key: str, value: Any) -> Problem | None:
    path = ("training", key)
    if refused := REFUSED.get(key):
        problem = Problem(path, f"cannot be set: {refused.reason}", refused.instead, on_key=True)
        return None if refused.allows(value) else problem
    if key not in known_keys()["training"]:
        return Problem(path, *unknown_key("training", key, value), on_key=True)
    message, hint = training_fields()[key].check(value)
    if message:
        return Problem(path, message, hint)
    if key in _WITHOUT_EFFECT:
        return Problem(path, f"has no effect: {_WITHOUT_EFFECT[key]}", level="warning", on_key=True)
    if key == "learning_rate" and isinstance(value, int | float) and 1 <= value < math.inf:
        hint = "the minus may be missing: 1e-4 is 0.0001"
        return Problem(path, f"is {value:g}: one step of that breaks the weights of a model", hint, level="warning")
    return _check_range(key, value)


def _check_range(key: str, value: Any) -> Problem | None:
    if value is None:
        return None
    if key == "max_steps" and value < 1 and value != -1:
        wanted = "at least 1, or -1 for no limit"
    elif key in _AT_LEAST_1 and value < 1:
        wanted = "at least 1"
    elif key in _NON_NEGATIVE and value < 0:
        wanted = "non-negative"
    elif key in _ABOVE_0 and value <= 0:
        wanted = "above 0"
    else:
        return None
    return Problem(("training", key), f"must be {wanted}, got {describe(value, key).removeprefix('the number ')}")
