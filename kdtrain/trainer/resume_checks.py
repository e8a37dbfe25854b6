"""Whether the optimizer's state of a checkpoint can be loaded by these processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdtrain.errors import CheckpointError
from kdtrain.trainer.data_position import processes_of

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

_ANEW = "or begin anew from its weights, with model.model={folder} and another training.output_dir"


def check_can_be_loaded(trainer: GKDTrainerWithMetrics, checkpoint: Path) -> None:
    """Refuse an optimizer's state that is in pieces for other processes, or of another kind than this run's.

    Upstream begins without a word with a new optimizer where the file it looks for is not there.

    Raises:
        CheckpointError: with what can be done instead.
    """
    here = "deepspeed" if trainer.is_deepspeed_enabled else "fsdp" if trainer.is_fsdp_enabled else None
    found = _kind(checkpoint)
    anew = _ANEW.format(folder=checkpoint)
    if found != here:
        names = {None: "without sharding", "deepspeed": "with DeepSpeed", "fsdp": "with FSDP"}
        raise CheckpointError(
            f"{checkpoint} was saved {names[found]}, and this run is {names[here]}: the optimizer's state cannot be "
            f"loaded. Resume {names[found]}, {anew}."
        )
    before, now = processes_of(checkpoint), trainer.args.world_size
    if here == "deepspeed" and before != now:
        raise CheckpointError(
            f"{checkpoint} has an optimizer's state of DeepSpeed in pieces for {before} processes, and there are "
            f"{now}: it cannot be loaded. Resume on {before}, {anew}."
        )


def _kind(checkpoint: Path) -> str | None:
    if any(checkpoint.glob("global_step*")):
        return "deepspeed"
    return "fsdp" if any(checkpoint.glob("pytorch_model_fsdp*")) else None
