"""A run that was made before: its folder, the config it was made by, and where the weights of its student lie.

Needs no torch: mistakes are said before that is imported.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdtrain.config import RunConfig
from kdtrain.config.diagnose import COMMAND_LINE, InvalidConfigError
from kdtrain.config.load import FileCheck, check_config
from kdtrain.config.model_folder import ADAPTER_WEIGHTS, INDEX, WEIGHTS, read_map
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.runs.folder import CHECKPOINT, CONFIG, STATUS
from kdtrain.runs.manifest import is_of_the_model, why_damaged

logger = logging.getLogger(__name__)

# Without effect in a training, maybe, and named for an evaluation.
_FOR_THIS_ALONE = ("data.eval", "rlhf.select_regex", "rlhf.max_new_tokens")


@dataclass(frozen=True)
class TrainedRun:
    """A run, and the student that is meant."""

    folder: Path
    config: RunConfig
    model: Path
    """The folder of its weights or adapter: the run's own, or a checkpoint's."""
    name: str
    """The run as it was named."""
    checkpoint: str | None = None
    """Of that, the folder's name; None for the student at the end."""


def open_run(
    target: Path,
    overrides: Sequence[str] = (),
    checkpoint: str | None = None,
    *,
    files: FileCheck | None = None,
    only_student: bool = False,
) -> TrainedRun:
    """The run that a folder holds, or that a config has made into its `training.output_dir`.

    Args:
        overrides: `key.sub=value`, over what the run was made by.
        checkpoint: its step, or its folder; None is the student at the end.
        files: what looks at the files that its config names, see `check_config`.
        only_student: teacher and data need not be there any more.

    Raises:
        ConfigError: there is no run, it has not come to its end, or a file is not there.
        CheckpointError: there is no such checkpoint, or it has no weights.
    """
    if target.is_dir():
        folder, config = target, _config_of(target, overrides, files, only_student)
    elif target.exists():
        config = _checked(target, overrides, files, only_student)
        folder = Path(config.training["output_dir"])
        if not (folder / CONFIG).is_file():
            raise ConfigError(
                f"{folder}, the training.output_dir of {target}, holds no run: train it first, by kdtrain fit {target}."
            )
    else:
        raise ConfigError(f"{target}: there is no such file or folder. Name a run folder, or the config of a run.")
    if checkpoint is not None:
        chosen = _checkpoint(folder, checkpoint)
        return TrainedRun(folder, config, chosen, str(target), chosen.name)
    if not _has_weights(folder):
        state = read_map(folder / STATUS).get("state", "unknown")
        way_out = _of_others(folder, "Go on with it, by kdtrain fit CONFIG --resume auto.")
        raise ConfigError(
            f"{folder} has no trained model: the run has not come to its end (its state: {state}). {way_out}"
        )
    return TrainedRun(folder, config, folder, str(target))


def _config_of(folder: Path, overrides: Sequence[str], files: FileCheck | None, only_student: bool) -> RunConfig:
    """What a run folder says that it was made by."""
    file = folder / CONFIG
    if "model" not in read_map(file):
        if folder.name.startswith(CHECKPOINT) and (folder.parent / CONFIG).is_file():
            step = folder.name.removeprefix(CHECKPOINT)
            raise ConfigError(f"{folder} is a checkpoint: name its run, {folder.parent}, with --checkpoint {step}.")
        raise ConfigError(
            f"{folder} is no run folder: it has no {CONFIG}. Name the training.output_dir of a run, or its config file."
        )
    here = f"training.output_dir={json.dumps(str(folder.resolve()))}"  # it may have been moved since
    return _checked(file, [*overrides, here], files, only_student)


def _checked(file: Path, overrides: Sequence[str], files: FileCheck | None, only_student: bool) -> RunConfig:
    """A config, with warnings of the command line alone: those of the file were given when it was trained by."""
    result = check_config(file, overrides, files=files, rules=not only_student)
    if result.config is None:
        raise InvalidConfigError(result.errors)
    for warning in result.warnings:
        if warning.file == COMMAND_LINE and warning.path not in _FOR_THIS_ALONE:
            logger.warning("%s", warning.logged)
    return result.config


def _checkpoint(folder: Path, named: str) -> Path:
    path = folder / f"{CHECKPOINT}{named}" if named.isdecimal() else Path(named)
    if not path.is_dir():
        way_out = _of_others(folder, "The run has none: leave --checkpoint out.")
        raise CheckpointError(f"--checkpoint {named}: there is no such checkpoint. {way_out}")
    if not _has_weights(path):
        raise CheckpointError(
            f"--checkpoint {named}: {path} has neither {WEIGHTS} nor {ADAPTER_WEIGHTS}. Name another one: a checkpoint "
            "in pieces (FSDP, DeepSpeed ZeRO-3) is no model that can be loaded."
        )
    if reason := why_damaged(path, only=is_of_the_model):
        raise CheckpointError(f"--checkpoint {named}: {path} {reason}. Name another one.")
    return path


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, ADAPTER_WEIGHTS))


def _of_others(folder: Path, without: str) -> str:
    """Which checkpoints there are, as a way out; `without` is one where there are none."""
    steps = (path.name.removeprefix(CHECKPOINT) for path in folder.glob(f"{CHECKPOINT}*") if _has_weights(path))
    known = sorted((step for step in steps if step.isdecimal()), key=int)
    if not known:
        return without
    return f"Name one of its checkpoints: --checkpoint {known[-1]} (there are {', '.join(known)})."
