"""Errors of libraries, devices and disks, turned into `kdtrain.errors` with a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from trl.experimental.gkd import GKDConfig

from kdtrain.disk import failure_of, in_units, write_error
from kdtrain.errors import DataError, KdtrainError, PreflightError
from kdtrain.memory import is_out_of_memory, peak
from kdtrain.runs.checkpoints import numbered, step_of
from kdtrain.runs.folder import MANIFEST
from kdtrain.runs.resume import resume_command

if TYPE_CHECKING:
    from kdtrain.trainer import GKDTrainerWithMetrics

_LESS = "Or let a run need less: training.save_total_limit, training.save_only_model: true, LoRA. "


@contextmanager
def readable_construction() -> Iterator[None]:
    """Turn what a library raises while the trainer is built into an error of the options, not of kdtrain."""
    try:
        yield
    except KdtrainError:
        raise
    except (ImportError, ValueError, OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise PreflightError(
                f"Out of memory while student and teacher are placed on the device: {peak()}. Use a smaller teacher, "
                "rlhf.teacher.device_map: auto, half precision (rlhf.teacher.dtype), or tuner.train_type: lora."
            ) from error
        if isinstance(error, MemoryError):
            raise
        raise PreflightError(
            f"The trainer could not be built: {str(error).strip()}\nThis comes from an option in training or tuner; "
            "--debug shows where it was raised."
        ) from error


@contextmanager
def readable_failures(
    args: GKDConfig, wanted: Callable[[], str] | None = None, lost: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Turn errors of the device's memory and the disk into errors that name a way out.

    Args:
        wanted: says how many bytes are to be written, where that is known.
        lost: says what of a run is lost, where it is training that ends.
    """
    try:
        yield
    except DataError as error:
        if (text := _of_worker(error)) == str(error):
            raise
        raise DataError(text) from error
    except KdtrainError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise PreflightError(
                f"Out of memory on {args.device}: {peak(args.device)}, with {args.per_device_train_batch_size} rows "
                f"per device and data.max_length {args.max_length}. Lower training.per_device_train_batch_size (and "
                "raise gradient_accumulation_steps), lower data.max_length, or set training.gradient_checkpointing: "
                "true."
            ) from error
        if (failure := failure_of(error)) is None:
            raise
        then = f"{_LESS if failure.is_full else ''}{lost()}Then go on with {resume_command()}"
        raise write_error(failure, Path(args.output_dir), then, wanted and wanted()) from error


def what_is_lost(trainer: GKDTrainerWithMetrics) -> str:
    """What of a run is lost where a write ends it: the steps since its newest checkpoint."""
    step, run_dir = trainer.state.global_step, Path(trainer.args.output_dir)
    saved = [path for path in numbered(run_dir) if (path / MANIFEST).is_file()]
    if not step or (saved and step_of(saved[-1]) >= step):
        return ""
    if saved:
        return f"The newest checkpoint is {saved[-1].name}: what was trained since, up to step {step}, is lost. "
    strategy = getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)
    return f"No checkpoint was saved (training.save_strategy: {strategy}): all {step} steps are lost. "


def disk_needs(trainer: GKDTrainerWithMetrics) -> str:
    """What a checkpoint takes, in words; nothing where a model lies in pieces."""
    if trainer.is_sharded:
        return ""
    saved = [p for p in trainer.model.parameters() if p.requires_grad or not is_peft_model(trainer.model)]
    optimizer = None if trainer.args.save_only_model else trainer.optimizer
    states = () if optimizer is None else _tensors(optimizer.state_dict())
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*saved, *states))
    return f"a checkpoint takes about {in_units(size)}"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)


def _of_worker(error: DataError) -> str:
    """What went wrong, without the traceback that a worker process of the data loader sends along as its text."""
    text = str(error)
    if not text.startswith("Caught ") or "\nOriginal Traceback" not in text:
        return text
    kind = type(error)
    return text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip()


@contextmanager
def readable_evaluation(args: GKDConfig) -> Iterator[None]:
    """Turn the end of the device's memory into an error that names a way out."""
    try:
        yield
    except KdtrainError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise PreflightError(
            f"Out of memory on {args.device}: {peak(args.device)}, with {args.per_device_eval_batch_size} rows at a "
            "time. Lower training.per_device_eval_batch_size, lower data.max_length, or give the teacher half "
            "precision (rlhf.teacher.dtype)."
        ) from error
