"""Memory, disk and time of a run: what `fit` looks at before it loads a model, and `validate --deep` lists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdtrain.config import RunConfig
from kdtrain.config.tree import Problem
from kdtrain.data import BuildReport
from kdtrain.preflight.devices import device_memory
from kdtrain.preflight.findings import is_listing
from kdtrain.preflight.resources import disk_findings, in_time, memory_findings, surely_fits
from kdtrain.preflight.run_setup import setup_of
from kdtrain.preflight.strategies import BANDWIDTH, strategy_findings
from kdtrain.runs.read_data import RunData
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.dry_run import timed_windows

if TYPE_CHECKING:
    from trl.experimental.gkd import GKDConfig


@dataclass(frozen=True)
class Planned:
    """Devices that a run is planned for, which need not be here."""

    devices: int | None = None
    memory: int | None = None
    """Bytes of each; None is what is here."""
    bandwidth: float = BANDWIDTH
    """Bytes a second that each sends."""
    step_time: float | None = None
    """Seconds of a step on one of them."""


def planned_findings(config: RunConfig, args: GKDConfig, planned: Planned) -> list[Problem]:
    """Memory and disk from the config and the models' configs alone: no rows are read, no weights loaded."""
    on_cpu = bool(config.training.get("use_cpu"))
    world = planned.devices or config.launch.num_processes or args.world_size
    here = None if (args.device.type == "cpu") != on_cpu else device_memory(args.device, world)
    setup = setup_of(config, args, world=world, on_cpu=on_cpu)
    limit = planned.memory or here
    found = [*memory_findings(setup, limit), *disk_findings(setup, args, _folder(config), None)]
    if planned.devices is not None and planned.devices > 1:
        found += strategy_findings(setup, planned.devices, limit, planned.bandwidth, planned.step_time)
    return found


def resource_findings(config: RunConfig, args: GKDConfig, data: RunData) -> list[Problem]:
    """The same where the run would be, for the rows that it has; what is well is for a list only."""
    world = args.world_size
    prompts = data.train["prompt_length"][:] if "prompt_length" in data.train.column_names else None
    setup = setup_of(
        config,
        args,
        world=world,
        on_cpu=args.device.type == "cpu",
        longest=min(data.report.longest, config.data.max_length) or None,
        longest_prompt=int(np.max(prompts)) if prompts is not None and len(prompts) else None,
    )
    limit = device_memory(args.device, world)
    findings = disk_findings(setup, args, _folder(config), _steps(args, data.report, world))
    if is_listing() or limit is None or not surely_fits(setup, limit):
        findings += memory_findings(setup, limit)
    return findings if is_listing() else [finding for finding in findings if finding.level != "info"]


def _folder(config: RunConfig) -> Path:
    return Path(str(config.training["output_dir"]))


def _steps(args: GKDConfig, report: BuildReport, world: int) -> int:
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    return math.ceil(math.ceil(report.rows_per_epoch / rows) * args.num_train_epochs)


def time_findings(trainer: GKDTrainerWithMetrics, report: BuildReport) -> list[Problem]:
    """How long the run's steps take; see `timed_windows`."""
    _, times = timed_windows(trainer, tokens_per_row(report))
    message = f"The run takes about {in_time(times.run_s)}: {times.steps:,} steps of {times.step_s:.2g} s"
    return [Problem(("training",), f"{message}, beside evaluation and saving", level="info")]


def tokens_per_row(report: BuildReport) -> float:
    """Mean of the rows that a run trains on; 0 where their tokens are not counted."""
    return report.total_tokens / max(report.rows_per_epoch, 1)
