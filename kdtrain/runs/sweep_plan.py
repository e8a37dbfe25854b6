"""Which runs a sweep has: `rlhf.beta=0,0.1,1 training.seed=1,2` are six, each checked before the first one begins.

A value is split at commas outside quotes and brackets. Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdtrain.config import RunConfig, check_config
from kdtrain.config.diagnose import COMMAND_LINE, Diagnostic, InvalidConfigError
from kdtrain.data.errors import show
from kdtrain.errors import ConfigError
from kdtrain.preflight.files import all_files

logger = logging.getLogger("kdtrain")

_MOST = 1000
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_FOLDER = "training.output_dir"
_SAFE = re.compile(r"[A-Za-z0-9+-][A-Za-z0-9.+-]{0,39}")
_SAME = ("launch",)  # what holds for the process, and so for all runs


@dataclass(frozen=True)
class Axis:
    """An option with the values that it takes."""

    key: str
    values: tuple[str, ...]
    """As they were written."""

    @property
    def is_seed(self) -> bool:
        """Whether its values are repetitions of one setting."""
        return self.key.endswith("seed")


@dataclass(frozen=True)
class PlannedRun:
    """One combination of values."""

    name: str
    """Of its folder, such as `beta-0.1_seed-2`."""
    values: Mapping[str, str]
    """Of the axes."""
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.training["output_dir"])


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep, in their order."""

    folder: Path
    axes: tuple[Axis, ...]
    runs: tuple[PlannedRun, ...]

    @property
    def labels(self) -> dict[str, str]:
        """A short name of each axis: the last part of its key, where that says which."""
        return _labels([axis.key for axis in self.axes])


def plan_sweep(config: Path | Mapping[str, Any], overrides: Sequence[str]) -> SweepPlan:
    """Every combination of the values, as a checked config with a folder of its own in `training.output_dir`.

    Raises:
        ConfigError: no option has several values, a value cannot be read, or some of the configs are wrong: all
            mistakes at once.
    """
    fixed, axes = split_overrides(overrides)
    count = math.prod(len(axis.values) for axis in axes)
    if count > _MOST:
        raise ConfigError(f"--sweep: these are {count:,} runs, and {_MOST:,} is the limit. Give fewer values.")
    labels = _labels([axis.key for axis in axes])
    combinations = [dict(zip(labels, values, strict=True)) for values in itertools.product(*(a.values for a in axes))]
    configs = _checked(config, [[*fixed, *(f"{key}={value}" for key, value in one.items())] for one in combinations])
    folder = Path(configs[0].training["output_dir"])
    names = ["_".join(f"{labels[key]}-{_safe(value)}" for key, value in one.items()) for one in combinations]
    placed = [_placed(one, folder / name) for one, name in zip(configs, names, strict=True)]
    runs = tuple(PlannedRun(*parts) for parts in zip(names, combinations, placed, strict=True))
    _check_runs(runs)
    return SweepPlan(folder, tuple(axes), runs)


def with_sweep_named(error: InvalidConfigError, overrides: Sequence[str]) -> InvalidConfigError:
    """The mistakes of a config; of options with several values, which one run cannot have, `--sweep` is named."""
    several = {key for key, _, text in (override.partition("=") for override in overrides) if "," in text}
    hint = "several values, with commas between them, are for --sweep: a run for each"
    return InvalidConfigError(
        [
            replace(one, hint=hint) if one.file == COMMAND_LINE and one.path in several else one
            for one in error.diagnostics
        ]
    )


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """Options with one value, and those with several.

    Raises:
        ConfigError: none has several, or one is given twice.
    """
    fixed, axes = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        values = tuple(split_values(text, override)) if equals else ()
        if len(values) < 2:
            fixed.append(override)
        else:
            axes.append(Axis(key, values))
    if not axes:
        raise ConfigError(
            "--sweep needs an option with several values, such as rlhf.beta=0,0.1,0.5,1: one run for each of them."
        )
    for axis in axes:
        _check_axis(axis, [override.partition("=")[0] for override in overrides])
    return fixed, axes


def _check_axis(axis: Axis, keys: Sequence[str]) -> None:
    if keys.count(axis.key) > 1:
        raise ConfigError(f"--sweep: {axis.key} is given twice. Give all of its values at once, with commas.")
    if axis.key == _FOLDER:
        raise ConfigError(f"--sweep: {_FOLDER} has one value, in which each run gets a folder of its own.")
    if axis.key.partition(".")[0] in _SAME:
        raise ConfigError(f"--sweep: {axis.key} has one value: all runs are made by the same process.")
    twice = next((value for value in axis.values if axis.values.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"--sweep: {axis.key} has the value {show(twice)} twice.")


def split_values(text: str, override: str) -> list[str]:
    """The parts of a value between commas outside quotes and brackets.

    Args:
        override: what it stands in, for messages.
    """
    parts, closing, quote, before = [""], [], "", ","
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and before in ",[{(:":  # elsewhere it is an apostrophe
            quote = character
        elif character in _CLOSING:
            closing.append(_CLOSING[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == "," and not closing:
            parts.append("")
            before = ","
            continue
        parts[-1] += character
        before = before if character == " " else character
    if len(parts) > 1 and (closing or quote):
        raise ConfigError(f"--sweep: {show(override)}: {closing[-1] if closing else quote} is missing.")
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise ConfigError(f"--sweep: {show(override)}: there is no value between two commas, or before or behind one.")
    return [part.strip() for part in parts]


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, with the number of a list before it; the whole key where two would be the same."""
    short = {}
    for key in keys:
        *_, name = re.split(r"\.(?!\d)", key)
        short[key] = name
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def _safe(value: str) -> str:
    """A value as part of a folder's name: another one for every value, whatever the other values are."""
    if _SAFE.fullmatch(value):
        return value
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-.")[-30:].lstrip("-.")
    return f"{plain}-{hashlib.sha256(value.encode()).hexdigest()[:6]}".lstrip("-")


def _placed(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"training": {**config.training, "output_dir": str(folder)}})


def _checked(config: Path | Mapping[str, Any], runs: Sequence[Sequence[str]]) -> list[RunConfig]:
    """The config of each run; what is found in several of them is said once."""
    results = [check_config(config, overrides, files=all_files) for overrides in runs]
    if errors := _once(error for result in results for error in result.errors):
        raise InvalidConfigError(errors)
    for warning in _once(warning for result in results for warning in result.warnings):
        logger.warning("%s", warning.logged)
    return [result.config for result in results if result.config is not None]


def _once(found: Iterator[Diagnostic]) -> list[Diagnostic]:
    return list({diagnostic.render(): diagnostic for diagnostic in found}.values())


def _check_runs(runs: Sequence[PlannedRun]) -> None:
    """Refuse runs that are the same, and runs that nothing can rank."""
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        if run.config.data.eval is None:
            raise ConfigError(
                "--sweep compares runs on held-out rows, and data.eval is not set. Name a file that does not train, or "
                "a share of the training rows: data.eval=5%"
            )
        same = seen.setdefault(_placed(run.config, Path()).model_dump_json(), run)
        if same is not run:
            key = next(key for key in run.values if run.values[key] != same.values[key])
            raise ConfigError(f"--sweep: {key}: {same.values[key]} and {run.values[key]} are the same value.")
