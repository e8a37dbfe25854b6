"""Sums of the steps since the last record, kept in a checkpoint: `unlogged_<rank>.safetensors`.

A checkpoint may fall between two records. Without these sums the next record of a resumed run would cover only the
steps after it. Beside them is what the warnings of a collapse compare with, see `samples.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.disk import save_tensors
from kdtrain.errors import CheckpointError
from kdtrain.trainer.metrics import SAME_ON_ALL_RANKS

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

_METRIC = "metric."
_SAMPLES = "samples."


def _file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"unlogged_{rank}.safetensors"


def save_unlogged(trainer: GKDTrainerWithMetrics, folder: str | Path) -> None:
    """Write this rank's sums since the last record, in full precision."""
    state = {
        "loss": trainer._tr_loss.detach().cpu(),
        "logged_loss": torch.tensor(trainer._total_loss_scalar, dtype=torch.float64),
        "logged_step": torch.tensor(trainer._globalstep_last_logged),
        "seconds": torch.tensor(trainer.stopwatch.seconds(), dtype=torch.float64),
        "elapsed": torch.tensor(trainer.clock.elapsed(), dtype=torch.float64),
    }
    for name, values in trainer._metrics["train"].items():
        if values:  # float64 holds every float32 and count exactly
            state[_METRIC + name] = torch.stack([value.detach().cpu().double() for value in values])
    state |= {_SAMPLES + name: value for name, value in trainer.samples.state().items()}
    save_tensors(state, _file(folder, trainer.args.process_index))


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): resume from another checkpoint.") from error
    return state


def _of_other_ranks(states: list[dict[str, torch.Tensor]], rank: int) -> dict[str, torch.Tensor]:
    """One rank's part of what another number of ranks has summed: over all ranks the same sums and means."""
    own = {name: value for name, value in states[0].items() if not name.startswith(_METRIC)}
    own["loss"] = torch.stack([state["loss"] for state in states]).mean(0)
    for name in {name for state in states for name in state if name.startswith(_METRIC)}:
        if name.removeprefix(_METRIC) in SAME_ON_ALL_RANKS:
            own[name] = states[0][name]
        elif rank == 0:
            own[name] = torch.cat([state[name] for state in states if name in state])
    return own


class RestoreUnlogged(TrainerCallback):
    """Puts the sums of a checkpoint back where they were, before the first step of a resumed run."""

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self.checkpoint: str | None = None
        """The checkpoint that training is about to resume from."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder, self.checkpoint = self.checkpoint, None
        self._trainer.clock.begin(state.global_step)
        if folder is None:
            return
        found = len(list(Path(folder).glob("unlogged_*.safetensors")))
        if not found:  # another tool's, or an earlier version's
            logger.warning("%s holds no unlogged sums: the first record covers the steps from here on only.", folder)
            return
        trainer = self._trainer
        if found == args.world_size:
            state = _read(_file(folder, args.process_index))
        else:
            state = _of_other_ranks([_read(_file(folder, rank)) for rank in range(found)], args.process_index)
        trainer._tr_loss = state.pop("loss").to(trainer.args.device)
        trainer._total_loss_scalar = state.pop("logged_loss").item()
        trainer._globalstep_last_logged = int(state.pop("logged_step"))
        trainer.summed_from = 0
        trainer.stopwatch.resume(state.pop("seconds").item())
        trainer.clock.earlier = state.pop("elapsed", torch.zeros(())).item()  # an earlier version has not written it
        samples = [name for name in state if name.startswith(_SAMPLES)]
        trainer.samples.restore({name.removeprefix(_SAMPLES): state.pop(name) for name in samples})
        for name, values in state.items():
            trainer._metrics["train"][name.removeprefix(_METRIC)].extend(values.to(trainer.args.device).unbind())
