"""Errors of libraries, devices and disks, turned into `kdtrain.errors` with a way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.experimental.gkd import GKDConfig

from kdtrain.errors import CheckpointError, DataError, KdtrainError, PreflightError


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
        raise DataError(_of_worker(error)) from error
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise CheckpointError(f"Writing {error.filename or args.output_dir} failed: {error.strerror}.") from error


def _of_worker(error: DataError) -> str:
    """What went wrong, without the traceback that a worker process of the data loader sends along as its text."""
    text = str(error)
    if not text.startswith("Caught ") or "\nOriginal Traceback" not in text:
        return text
    kind = type(error)
    return text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip()
