"""Going on with another number of processes than those that wrote a checkpoint."""

from __future__ import annotations

from pathlib import Path

from kdtrain.config import RunConfig
from kdtrain.errors import CheckpointError
from kdtrain.runs.resume import world_size_command
from kdtrain.trainer.data_position import processes_of


def check_world_size(config: RunConfig, checkpoint: Path | None, processes: int, allowed: bool) -> None:
    """Refuse another number of processes with a stream, unless it was asked for.

    Rows that are counted go on rightly on any number of them, and need nobody's word. A stream goes on at its next row
    too; but the rows of a step are then others (`per_device_train_batch_size` is of each process), and a run that takes
    weeks should not change so because a machine was missing when it began again.

    Raises:
        CheckpointError: with the flag that allows it.
    """
    if checkpoint is None or allowed or not config.data.streams:
        return
    before = processes_of(checkpoint)
    if before != processes:
        raise CheckpointError(
            f"{checkpoint} was written by {before} {_processes(before)}, and there {'is' if processes == 1 else 'are'} "
            f"{processes} now: of a stream a step would have other rows. Go on with {before}, or insist, and it goes "
            f"on at the next row:\n  {world_size_command()}"
        )


def _processes(count: int) -> str:
    return "process" if count == 1 else "processes"
