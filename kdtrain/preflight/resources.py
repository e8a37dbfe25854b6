"""Whether a run fits into memory and onto the disk, as findings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data.errors import show
from kdtrain.disk import in_units
from kdtrain.generation.batching import CALL_BYTES
from kdtrain.preflight.devices import free_disk
from kdtrain.preflight.memory import MemoryPlan, Setup, Simulations, optimizer_bytes, plan_memory
from kdtrain.preflight.remedies import remedies
from kdtrain.preflight.simulated import NotSimulated, student_sizes, weights_of

_MEMORY: KeyPath = ("training", "per_device_train_batch_size")
_DISK: KeyPath = ("training", "output_dir")
_LOSS = 2**30
"""More than the buffers of the loss and what a run keeps beside its models."""
_CLOSE = 1.15
"""The plan is within 15 % of what was measured: up to so much above the limit a run may still fit."""


def memory_findings(setup: Setup, limit: int | None) -> list[Problem]:
    """What each device needs, and what makes the run fit where it does not.

    Args:
        limit: bytes of a device; None where they are not known.

    Returns:
        an error where the run cannot fit, even if the plan is wrong by as much as it may be; a warning where it may
        not, and on a CPU, which can swap; else how much it needs, level "info".
    """
    try:
        simulations = Simulations()
        plan = plan_memory(setup, simulations)
        if limit is None or plan.total <= limit:
            there = "" if limit is None else f"; there are {in_units(limit)}"
            return [Problem(_MEMORY, f"{_described(setup, plan)}{there}", level="info")]
        found = remedies(setup, limit, simulations)
    except NotSimulated as error:
        reason = f"the model's code cannot be run without numbers ({show(str(error), 120)})"
        hint = "kdtrain fit CONFIG --dry-run measures it"
        return [Problem(_MEMORY, f"How much memory the run takes is not known: {reason}", hint, "info")]
    steps = [f"{one.text}: {in_units(one.total)}" for one in found]
    fits = bool(found) and found[-1].total <= limit
    hint = f"{'Cheapest first, until it fits' if fits else 'Not enough, but what helps'}: {'; '.join(steps)}"
    certain = plan.total > _CLOSE * limit and not setup.shape.on_cpu
    message = f"{_described(setup, plan)}; there are {in_units(limit)}"
    hint = hint if found else "Take a smaller model or a larger device"
    return [Problem(_MEMORY, message, hint, "error" if certain else "warning")]


def surely_fits(setup: Setup, limit: int) -> bool:
    """Whether a run needs so little that there is nothing to find out, by a bound that is taken high.

    The plan itself takes a second or more, which a run of small models would wait for.
    """
    try:
        weights, trained = student_sizes(setup.student, setup.tuner)
        teacher = 0 if setup.teacher is None else weights_of(setup.teacher)[0]
    except NotSimulated:
        return False
    text, shape = setup.student.config.get_text_config(), setup.shape
    sizes = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    layers, width, heads = (size or math.inf for size in sizes)
    inner = getattr(text, "intermediate_size", None) or 4 * width
    of_token = layers * (48 * width + 16 * inner + 16 * heads * shape.ids[1]) * 4
    writes = setup.student_writes is not None or setup.teacher_writes is not None
    bound = weights + 6 * trained + 2 * teacher + shape.rows * shape.length * of_token + _LOSS
    return bound + (2 * CALL_BYTES if writes else 0) <= limit


def _described(setup: Setup, plan: MemoryPlan) -> str:
    parts = ", ".join(f"{name} {in_units(size)}" for name, size in plan.parts.items())
    devices = "The run takes" if setup.world == 1 else f"Each of {setup.world} devices takes"
    beside = "" if setup.shape.on_cpu else ", beside what CUDA itself takes"
    images = ", images left out" if setup.student.config.get_text_config() is not setup.student.config else ""
    count, columns = setup.shape.ids
    rows = f"{count} {'lines' if setup.shape.in_lines else 'rows'} of {columns:,} tokens at a time"
    return f"{devices} about {in_units(plan.total)} at the most, in {plan.phase}, {rows}{beside}{images} ({parts})"


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run writes."""

    model: int
    checkpoint: int
    checkpoints: int
    """That are on the disk at a time."""

    @property
    def bytes(self) -> int:
        return self.checkpoints * self.checkpoint + self.model


def disk_need(setup: Setup, args: TrainingArguments, steps: int | None) -> DiskNeed:
    """What checkpoints and the final model take.

    Args:
        steps: of the run, where they are known.

    Raises:
        NotSimulated: the model cannot be built.
    """
    weights, trained = student_sizes(setup.student, setup.tuner)
    model = weights if setup.tuner.train_type == "full" else trained
    average = int(trained * 4 / setup.student.dtype.itemsize) if setup.moving_average else 0
    states = 0 if args.save_only_model else int(optimizer_bytes(setup, trained))
    return DiskNeed(model, model + states + average, _checkpoints(args, steps))


def disk_findings(setup: Setup, args: TrainingArguments, folder: Path, steps: int | None) -> list[Problem]:
    """Whether checkpoints and the final model have room on the disk.

    Args:
        folder: that they are written to, which need not be there.
        steps: of the run, where they are known.
    """
    try:
        need = disk_need(setup, args, steps)
    except NotSimulated:  # loading it says why, and comes next
        return []
    free = free_disk(folder) + written_before(folder)
    what = f"{need.checkpoints} checkpoints of {in_units(need.checkpoint)} and the model of {in_units(need.model)}"
    message = f"What the run writes takes about {in_units(need.bytes)} ({what}); {in_units(free)} are free"
    if need.bytes <= free:
        return [Problem(_DISK, message, level="info")]
    count = need.checkpoints
    less = [] if count <= 2 else ["training.save_total_limit: 1 (with the one that is being written, two are there)"]
    less += [] if args.save_only_model else ["training.save_only_model: true (a resume is then not possible)"]
    return [Problem(_DISK, message, f"Name a folder on a larger disk, or set {' or '.join(less)}")]


def written_before(folder: Path) -> int:
    """Bytes of the checkpoints and the model in a run folder: a run that is resumed has them, or writes over them."""
    kept = f"{PREFIX_CHECKPOINT_DIR}-*.*"  # of a branch that was left, or a user's: nothing removes them
    checkpoints = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if not path.match(kept))
    found = [*(file for path in checkpoints for file in path.rglob("*")), *folder.glob("*.safetensors")]
    return sum(path.stat().st_size for path in found if path.is_file())


def _checkpoints(args: TrainingArguments, steps: int | None) -> int:
    """That are on the disk at a time: a new one is whole before the oldest is removed."""
    if args.save_strategy == SaveStrategy.NO:
        return 0
    most = math.inf if args.save_total_limit is None else args.save_total_limit + 1
    if args.save_strategy == SaveStrategy.EPOCH:
        saved: float = math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
    elif (total := args.max_steps if args.max_steps > 0 else steps) is None:
        saved = 1  # at the end, at least
    else:
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * total)
        saved = math.ceil(total / max(every, 1))
    return int(min(saved, most))


def in_time(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
