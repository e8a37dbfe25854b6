"""What a run folder holds, read as far as it is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from kdtrain.config.diagnose import escape
from kdtrain.config.model_folder import read_map
from kdtrain.errors import ConfigError
from kdtrain.runs.folder import CHECKPOINT, CONFIG, EVALUATION, LOG, REPORT_DATA, STATUS, is_run_folder
from kdtrain.runs.records import read_records
from kdtrain.runs.status import read_status

Record = dict[str, Any]

_MOST_NAMED = 4
_NAME_IT = "Name the folder that a run writes into: its training.output_dir"


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    folder: Path
    name: str
    """As short as tells it from the others."""
    config: dict[str, Any]
    status: dict[str, Any]
    records: list[Record]
    """Of `logging.jsonl`, in order."""
    torn_lines: int
    evaluation: dict[str, Any]
    """`evaluation.json`; empty without one."""
    facts: dict[str, Any]
    """What `fit` has noted as it began: `plan`, `data`, `environment`, `steps`; empty where it has not."""

    @property
    def state(self) -> str:
        """running, finished, stopped, failed; died where it was killed; or unknown."""
        return str(self.status.get("state") or "unknown")

    @property
    def shown(self) -> str:
        """The folder as one would type it from here."""
        return shown_path(self.folder)

    @cached_property
    def training(self) -> list[Record]:
        """Records of training steps."""
        return [record for record in self.records if "loss" in record]

    @cached_property
    def evaluations(self) -> list[Record]:
        """Records of evaluations."""
        return [record for record in self.records if any(key.startswith("eval_") for key in record)]

    @property
    def step(self) -> int | None:
        """The last step that is known of."""
        steps = [step for record in (*self.records, self.status) if is_number(step := record.get("step"))]
        return int(max(steps)) if steps else None

    @property
    def planned_steps(self) -> int | None:
        """How many it is to have."""
        steps = self.facts.get("steps") or self.option("training.max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    def option(self, path: str) -> Any:
        """An option of the config by its path; None also where the config has none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def shown_path(path: Path) -> str:
    """A path as one would type it from here."""
    here = working_folder()
    if here is not None and (path := path.absolute()).is_relative_to(here) and path != here:
        path = path.relative_to(here)
    return escape(str(path))


def working_folder() -> Path | None:
    """Where one stands; None where that was deleted while a run went on."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs of these folders, each folder once.

    Raises:
        ConfigError: a folder is none, or no run has written into it.
    """
    folders = list(dict.fromkeys(folder.absolute() for folder in folders))
    if not folders:
        raise ConfigError("No run is named: kdtrain report RUN_DIR…")
    for folder in folders:
        _require_run(folder)
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _require_run(folder: Path) -> None:
    if not folder.exists():
        raise ConfigError(f"{shown_path(folder)}: there is no such folder. {_NAME_IT}.")
    if not folder.is_dir():
        raise ConfigError(f"{shown_path(folder)} is a file. {_NAME_IT}.")
    if folder.name.startswith(CHECKPOINT) and (folder.parent / CONFIG).is_file():
        raise ConfigError(f"{shown_path(folder)} is a checkpoint. Name its run: {shown_path(folder.parent)}.")
    # A folder of checkpoints alone may be a run's too, and has nothing to show.
    if not (folder / CONFIG).is_file() and not ((folder / STATUS).is_file() and is_run_folder(folder)):
        inside = [shown_path(path.parent) for path in sorted(folder.glob(f"*/{CONFIG}"))]
        more = " …" if len(inside) > _MOST_NAMED else ""
        way_out = f"Name its runs: kdtrain report {' '.join(inside[:_MOST_NAMED])}{more}" if inside else _NAME_IT
        raise ConfigError(f"{shown_path(folder)} is no run folder: it has no {CONFIG}. {way_out}.")


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read_run(folder: Path, name: str) -> RunRecord:
    log = folder / LOG
    records, torn = read_records(log) if log.is_file() else ([], 0)
    records = [_named(record) for record in records if is_number(record.get("step"))]
    return RunRecord(
        folder=folder,
        name=name,
        config=read_map(folder / CONFIG),
        status=read_status(folder),
        records=records,
        torn_lines=torn,
        evaluation=read_map(folder / EVALUATION),
        facts=_facts(folder),
    )


def _named(record: Record) -> Record:
    """Gradient norms of terms under one name: they are logged before training too, and mean the same."""
    prefix = "eval_grad_norm_"
    return {f"grad_norm_{k.removeprefix(prefix)}" if k.startswith(prefix) else k: v for k, v in record.items()}


def _facts(folder: Path) -> dict[str, Any]:
    """Of this run; a report of several may have been written into its folder."""
    runs = read_map(folder / REPORT_DATA).get("runs")
    runs = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    own = runs if len(runs) == 1 else [run for run in runs if run.get("folder") == str(folder)]
    facts = own[0].get("facts") if own else None
    return facts if isinstance(facts, dict) else {}
