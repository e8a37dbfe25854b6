"""What a trainer is given, checked and brought into the form that upstream's constructor takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.experimental.gkd import GKDConfig

from kdtrain.errors import NotAvailableError, PreflightError
from kdtrain.knobs import Knobs
from kdtrain.models import load_tokenizer
from kdtrain.row_order import refused_loader_options
from kdtrain.teachers import LocalTeacher, Teacher, build_teacher

logger = logging.getLogger(__name__)

_FILLED_IN = {"dtype": "auto"}  # by the config's loader, where nothing was said


@contextmanager
def adapters_on_the_head() -> Iterator[None]:
    """Let SFTTrainer's constructor accept an adapter on `lm_head`.

    It refuses one because its own loss reads the weight of the head past it. Ours goes through the module there.
    """
    from trl.trainer import sft_trainer

    refused, sft_trainer.BaseTunerLayer = sft_trainer.BaseTunerLayer, ()
    try:
        yield
    finally:
        sft_trainer.BaseTunerLayer = refused


def check_teacher_arguments(teacher_model: Any, teacher: Teacher | None, knobs: Knobs) -> None:
    """Raise ValueError where a teacher is needed and missing, or given twice."""
    if teacher_model is not None and teacher is not None:
        raise ValueError("Pass either teacher_model or teacher, not both.")
    if knobs.needs_teacher and teacher_model is None and teacher is None:
        raise ValueError(
            f"llm_kd_weight is {knobs.llm_kd_weight} and visual KD is {'on' if knobs.visual_kd else 'off'}: this needs "
            "a teacher. Pass teacher_model (rlhf.teacher_model), or set llm_kd_weight to 0 for supervised training."
        )
    if not knobs.needs_teacher and (teacher_model is not None or teacher is not None):
        logger.warning("No KD is active (llm_kd_weight is 0, visual KD is off): the teacher is not used.")


def hide_token(args: GKDConfig) -> None:
    """Move a hub token out of the arguments, which upstream pickles beside every checkpoint and pushes to the hub."""
    if args.hub_token is not None:
        os.environ.setdefault("HF_TOKEN", args.hub_token)
        args.hub_token = None


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as they were given: an Arrow table would want one type for all contents, and could not hold a PIL image."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index])


def placeholder(data: Any) -> Any:
    """Upstream's constructor looks at the type and the length, and wants an Arrow table."""
    return Dataset.from_dict({"row": range(len(data))}) if isinstance(data, list) else data


def check_data(train_dataset: Any, args: GKDConfig) -> None:
    """Refuse what would count rows twice, lose some, or train ranks on different things."""
    from torch.utils.data import IterableDataset

    if isinstance(train_dataset, IterableDataset):
        raise NotAvailableError(
            "An IterableDataset (streaming) is not available yet: pass a datasets.Dataset, whose rows can be counted."
        )
    if args.activation_offloading and args.device.type == "cpu":
        raise PreflightError(
            "training.activation_offloading moves activations from the accelerator to the CPU, and this run is on a "
            "CPU: remove it."
        )
    for name, reason, instead in refused_loader_options(args.accelerator_config.to_dict()):
        raise NotAvailableError(f"training.accelerator_config: {name} cannot be had: {reason}. To do: {instead}.")
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise NotAvailableError(
            f"training.train_sampling_strategy: {args.train_sampling_strategy} is not available yet: its order depends "
            "on the state of each rank, so that ranks would skip rows and a resumed run would see others."
        )


def local_teacher(teacher_model: PreTrainedModel | nn.Module | str | None, args: GKDConfig) -> Teacher:
    """A teacher over a model, or over the one that a name stands for."""
    if isinstance(teacher_model, str):
        return build_teacher(
            teacher_model,
            init_kwargs=args.teacher_model_init_kwargs,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
    assert teacher_model is not None
    if (args.teacher_model_init_kwargs or _FILLED_IN) != _FILLED_IN:
        logger.warning("teacher_model_init_kwargs has no effect: the teacher is loaded already.")
    return LocalTeacher(teacher_model)


def tokenizer_or_none(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, where it can be had; its absence is reported by the comparison."""
    if not name:
        return None
    try:
        return load_tokenizer(name)
    except PreflightError:
        return None
