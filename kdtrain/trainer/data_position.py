"""Where in its data a run stands, in rows of an order that depends on neither batch, accumulation nor ranks.

`data_position.json` of a checkpoint says it, so that a run goes on at the next row with any other of the three.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from kdtrain.errors import CheckpointError

FILE = "data_position.json"


@dataclass(frozen=True, order=True)
class Position:
    """Before row `row` of epoch `epoch`, both counted from 0."""

    epoch: int
    row: int = 0


@dataclass(frozen=True)
class Dealing:
    """How the rows of an epoch become micro-batches and steps."""

    rows: int
    """Of an epoch."""
    batch: int
    """Rows of a micro-batch on all ranks together."""
    accumulation: int
    """Micro-batches of a step."""
    drop_last: bool
    """Whether rows that do not fill the last micro-batch of an epoch are left out."""

    @property
    def step(self) -> int:
        """Rows of a step."""
        return self.batch * self.accumulation

    def batches(self, rows: int) -> int:
        """Micro-batches of so many rows, up to the end of what is read."""
        return rows // self.batch if self.drop_last else math.ceil(rows / self.batch)

    def steps(self, rows: int) -> int:
        """Steps of so many rows, up to the end of what is read; the last one may have fewer."""
        return math.ceil(self.batches(rows) / self.accumulation)

    def trained(self, rows: int, steps: int) -> int:
        """Rows that the first steps of so many rows train."""
        return min(steps * self.step, self.batches(rows) * self.batch, rows)

    def end(self, num_train_epochs: float) -> Position:
        """Where a run of so many epochs ends that is dealt like this all along."""
        per_epoch = max(self.steps(self.rows), 1)
        epochs, steps = divmod(math.ceil(num_train_epochs * per_epoch), per_epoch)
        return Position(epochs, self.trained(self.rows, steps))

    def steps_between(self, start: Position, end: Position) -> int:
        """Steps from one position to another; no step has rows of two epochs."""
        if end <= start:
            return 0
        if end.epoch == start.epoch:
            return self.steps(end.row - start.row)
        whole = end.epoch - start.epoch - 1
        return self.steps(self.rows - start.row) + whole * self.steps(self.rows) + self.steps(end.row)


@dataclass(frozen=True)
class SavedPosition:
    """What a checkpoint says of the run that wrote it."""

    position: Position
    """Of the next row."""
    rows_per_epoch: int
    seed: int | None
    """Of the order; None where it is not known."""
    rows_per_step: int | None
    processes: int
    step: int
    """Steps that were taken."""
    end: Position | None = None
    """Where it would have ended; None where `max_steps` says it, or where it is not known."""
    num_train_epochs: float | None = None
    """What `end` comes from."""
    stream: dict[str, Any] | None = None
    """Where a stream is read on from, at or before the next row."""
    rows_per_group: int | None = None
    """Of the order, where rows are grouped by length."""

    def write(self, folder: str | Path) -> None:
        """Write `data_position.json` of a checkpoint."""
        values = asdict(self)
        written = {"version": 1, **values.pop("position"), **values}
        (Path(folder) / FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def read_position(checkpoint: str | Path, dealing: Dealing) -> SavedPosition:
    """Where a checkpoint stands. Of one without the file (another tool's, or an earlier version's) it is worked out.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = Path(checkpoint) / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        del found["version"]
        end = found.pop("end")
        position = Position(found.pop("epoch"), found.pop("row"))
        return SavedPosition(position, end=end and Position(**end), **found)
    except FileNotFoundError:
        return _worked_out(Path(checkpoint), dealing)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): resume from another checkpoint.") from error


def processes_of(checkpoint: Path) -> int:
    """Those that wrote a checkpoint: each of several has left its random numbers."""
    return max(len(list(checkpoint.glob("rng_state_*.pth"))), 1)


def _worked_out(checkpoint: Path, dealing: Dealing) -> SavedPosition:
    """From the part of its epoch that transformers has written: a number of micro-batches."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    processes = processes_of(checkpoint)
    batch = (state.get("train_batch_size") or 0) * processes or dealing.batch
    before = Dealing(dealing.rows, batch, 1, dealing.drop_last)
    part, epoch = math.modf(state.get("epoch") or 0.0)
    row = before.trained(dealing.rows, round(part * before.batches(dealing.rows)))
    return SavedPosition(Position(int(epoch), row), dealing.rows, None, None, processes, int(state["global_step"]))
