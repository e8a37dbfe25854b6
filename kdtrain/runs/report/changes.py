"""What the config of a run changes from the defaults, without secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from kdtrain.config import RunConfig
from kdtrain.config.diagnose import HIDDEN, clean, is_secret_name
from kdtrain.runs.report.record import RunRecord, shown_path

_MISSING = object()
PLACES = ("training.output_dir", "training.run_name")
"""Where a run lies, and what it is called, say nothing about what it is."""


@dataclass(frozen=True)
class Change:
    """An option that is not as it is by default."""

    path: str
    value: str
    default: str
    """Empty where the option has none."""


def changes(config: Mapping[str, Any]) -> list[Change]:
    """In the order of the file."""
    defaults, found = _defaults(), []
    for path, value in flat(config).items():
        default = defaults.get(path, _MISSING)
        if value != default:
            found.append(Change(path, shown_value(value), "" if default is _MISSING else shown_value(default)))
    return found


def differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Options in which runs differ, with the value of each run."""
    configs = [flat(run.config) for run in runs]
    paths = dict.fromkeys(path for config in configs for path in config if path not in PLACES)
    defaults = _defaults()
    found = {}
    for path in paths:
        values = [config.get(path, defaults.get(path)) for config in configs]
        if any(value != values[0] for value in values):
            found[path] = ["–" if value is None else shown_value(value) for value in values]
    return found


def as_yaml(config: Mapping[str, Any]) -> str:
    """What a config file would say to get the same run, without secrets."""
    defaults = _defaults()
    tree: dict[str, Any] = {}
    for path, value in flat(config).items():
        if value != defaults.get(path, _MISSING):
            *sections, name = path.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"rlhf": {"beta": 0.5}}` as `{"rlhf.beta": 0.5}`; secrets are hidden, paths below this folder made relative."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{path}.")
        else:
            found[path] = HIDDEN if is_secret_name(name) and isinstance(value, str) else _public(value, path)
    return found


def _public(value: Any, path: str) -> Any:
    if isinstance(value, str):
        return clean(shown_path(Path(value)) if value.startswith("/") else value)
    if isinstance(value, list):
        source = path in ("data.train", "data.eval")
        return [_source(item) if source and isinstance(item, Mapping) else _public(item, "") for item in value]
    if isinstance(value, Mapping):
        return {n: HIDDEN if is_secret_name(n) and isinstance(v, str) else _public(v, "") for n, v in value.items()}
    return value


def _source(source: Mapping[str, Any]) -> Any:
    """A source of rows by what is not as by default; its path alone where that is all."""
    defaults = _source_defaults()
    found = {name: _public(value, "") for name, value in source.items() if value != defaults.get(name, _MISSING)}
    return found["path"] if found.keys() == {"path"} else found


def shown_value(value: Any) -> str:
    """In one line, as YAML writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    config = RunConfig.model_validate({"model": {"model": "-"}, "data": {"train": [{"path": "-"}]}})
    found = flat(config.model_dump(mode="json"))
    return {path: value for path, value in found.items() if path not in ("model.model", "data.train")}


@lru_cache(maxsize=1)
def _source_defaults() -> dict[str, Any]:
    config = RunConfig.model_validate({"model": {"model": "-"}, "data": {"train": [{"path": "-"}]}})
    return {name: value for name, value in config.data.train[0].model_dump(mode="json").items() if name != "path"}
