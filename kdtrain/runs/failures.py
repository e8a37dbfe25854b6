"""Errors of libraries, devices and disks, turned into `kdtrain.errors` with a way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from trl.experimental.gkd import GKDConfig

from kdtrain.data.errors import said
from kdtrain.errors import CheckpointError, DataError, KdtrainError, PreflightError
from kdtrain.runs.resume import resume_command

# What safetensors and torch.save say of a disk; neither raises an OSError.
_OF_WRITING = re.compile(r"I/O error|PytorchStreamWriter|inline_container")


@contextmanager
def readable_construction() -> Iterator[None]:
    """Turn what a library raises while the trainer is built into an error of the options, not of kdtrain."""
    try:
        yield
    except KdtrainError:
        raise
    except torch.OutOfMemoryError as error:
        raise PreflightError(
            "Out of memory while placing student and teacher on the device. Use a smaller teacher, "
            "rlhf.teacher.device_map: auto, half precision (rlhf.teacher.dtype), or tuner.train_type: lora."
        ) from error
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise PreflightError(
            f"The trainer could not be built: {str(error).strip()}\nThis comes from an option in training or tuner; "
            "--debug shows where it was raised."
        ) from error


@contextmanager
def readable_failures(args: GKDConfig) -> Iterator[None]:
    """Turn errors of the device's memory and the disk into errors that name a way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PreflightError(
            f"Out of memory on {args.device} with {args.per_device_train_batch_size} rows per device and max_length "
            f"{args.max_length}. Lower training.per_device_train_batch_size (and raise gradient_accumulation_steps), "
            "lower data.max_length, or set training.gradient_checkpointing: true."
        ) from error
    except DataError as error:
        if (text := _of_worker(error)) == str(error):
            raise
        raise DataError(text) from error
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise CheckpointError(_not_written(str(error.filename or args.output_dir), error.strerror)) from error
    except (SafetensorError, RuntimeError) as error:
        if not _OF_WRITING.search(str(error)):
            raise
        raise CheckpointError(_not_written(str(args.output_dir), said(error))) from error


def _not_written(where: str, reason: str | None) -> str:
    return (
        f"Writing {where} failed: {reason}. Make room there, or let a run need less: training.save_total_limit, "
        f"training.save_only_model: true, LoRA. Then go on with {resume_command()}"
    )


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
    except torch.OutOfMemoryError as error:
        raise PreflightError(
            f"Out of memory on {args.device} with {args.per_device_eval_batch_size} rows at a time. Lower "
            "training.per_device_eval_batch_size, or give the teacher half precision (rlhf.teacher.dtype)."
        ) from error
