"""Several runs in one process, none of which leaves anything to the next: a run has the numbers that it has alone."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState


@contextmanager
def isolated() -> Iterator[None]:
    """Put back what a run or an evaluation sets for the whole process, and free what it held.

    Random numbers need nothing here: trl seeds them before it draws an adapter, and transformers before a run trains.
    """
    environment = dict(os.environ)  # transformers and accelerate hand settings to each other in it
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # a run's own peak is logged
    try:
        yield
    finally:
        _finish_trackers()
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        _put_back(environment)
        # Shared by all Accelerators of a process, which keep the first one's precision and accumulation otherwise.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()  # trainer, callbacks and models refer to each other
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _put_back(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _finish_trackers() -> None:
    """End what stays open for the next run to log into; the others end with their run."""
    for name in ("wandb", "swanlab"):
        tracker = sys.modules.get(name)
        current = getattr(tracker, "run", None) or (name == "swanlab" and tracker and tracker.get_run())
        if tracker is not None and current:
            tracker.finish()
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None and mlflow.active_run():
        mlflow.end_run()
