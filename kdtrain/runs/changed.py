"""What a resumed run does otherwise than the one that made the checkpoint: refused, unless it may change or is allowed.

Compared are the facts in the checkpoint's manifest (`resume_facts.py`). A checkpoint without them, of an earlier
version, is compared by the config in its run folder: then an option that names something else counts as a change, and
what is in files is not compared. First options, before torch is imported; then what was read; until then nothing is
written.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtrain.config import RunConfig
from kdtrain.config.changes import (
    CONTENT,
    DATA_CONTENT,
    NEVER,
    REFUSED,
    SAID,
    Change,
    config_changes,
    is_allowed,
    training_changes,
)
from kdtrain.config.diagnose import clean
from kdtrain.config.model_folder import read_map
from kdtrain.errors import CheckpointError
from kdtrain.ranks import is_main
from kdtrain.runs.folder import ANOTHER_FOLDER, CHECKPOINT, CONFIG, MANIFEST
from kdtrain.runs.resume import insisting_command

logger = logging.getLogger(__name__)

_LONGEST_VALUE = 160
_SHOWN = 20

# What `content` names, and the option that names it.
_OPTIONS = {
    "student": "model.model",
    "student's adapter": "model.adapter",
    "tokenizer": "model.model",
    "chat template": "model.model",
    "image processor": "model.model",
    "teacher": "rlhf.teacher_model",
    "teacher's adapter": "rlhf.teacher.adapter",
    "teacher's cache": "rlhf.teacher.path",
}
# Options that name something, by what they name: where that is known, it is compared and they are not.
_NAMES = {
    "model.model": "student",
    "model.revision": "student",
    "model.adapter": "student's adapter",
    "rlhf.teacher_model": "teacher",
    "rlhf.teacher.revision": "teacher",
    "rlhf.teacher.adapter": "teacher's adapter",
    "rlhf.teacher.path": "teacher's cache",
}


_OF_SEVERAL = {"teacher_model": "", "revision": "", "adapter": "'s adapter", "path": "'s cache"}


def option_of(name: str) -> str:
    """The option that names something of `content`: of several teachers, `teacher math's adapter` as well."""
    if (found := re.fullmatch(r"teacher ([\w-]+)('s adapter|'s cache)?", name)) is None:
        return _OPTIONS[name]
    options = {what: option for option, what in reversed(_OF_SEVERAL.items())}
    return f"rlhf.teachers.{found[1]}.{options[found[2] or '']}"


def named_by(option: str) -> str | None:
    """What of `content` an option names; None where it is none of these."""
    if (found := re.fullmatch(r"rlhf\.teachers\.([\w-]+)\.(\w+)", option)) is None:
        return _NAMES.get(option)
    return f"teacher {found[1]}{_OF_SEVERAL[found[2]]}" if found[2] in _OF_SEVERAL else None


class ChangedRunError(CheckpointError):
    """A resumed run is another one than the checkpoint is of; nothing was written."""


class Comparison:
    """A run that goes on from a checkpoint, compared with the one that made it; step by step, as it becomes known."""

    def __init__(self, checkpoint: Path | None, allowed: Sequence[str] = ()) -> None:
        """
        Args:
            checkpoint: None is a clean start, which nothing is compared with.
            allowed: of `checked_names`.
        """
        self._checkpoint, self._allowed = checkpoint, allowed
        self._before = {} if checkpoint is None else _facts_of(checkpoint)
        self._named: dict[str, Change] = {}
        """Options that name other things than then, until it is known what those are."""
        self._going_on: dict[str, Change] = {}

    def options(self, now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        """Compare the options.

        Args:
            now: `config`, and where it is known `training`, of `resume_facts.facts_of`.
            defaults: of GKDConfig, for what only one of the two configs sets; None leaves that out.

        Raises:
            ChangedRunError: some may not change.
        """
        then = self._before.get("config")
        if not isinstance(then, Mapping):
            return
        found = list(config_changes(then, now["config"]))
        named = [change for change in found if change.kind is CONTENT]
        self._named = {change.key: change for change in named}
        if isinstance(filled := self._before.get("training"), Mapping) and "training" in now:
            found = [change for change in found if not change.key.startswith("training.")]
            found += training_changes(filled, now["training"])
        elif defaults is not None:
            one, other = then.get("training") or {}, now["config"]["training"]
            alone = {name: value for name, value in defaults.items() if (name in one) != (name in other)}
            found += training_changes({**alone, **_only(one, alone)}, {**alone, **_only(other, alone)})
        unknown = [] if "content" in self._before else named
        self._judge([*(change for change in found if change.kind is not CONTENT), *map(_by_name, unknown)])

    def content(self, content: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Compare models, tokenizer and rows; then say, once, what changes and may.

        Args:
            content, data: as of `resume_facts`.
        """
        then = self._before.get("content")
        if isinstance(then, Mapping):
            known = {name for name in content if then.get(name) and content[name]}
            found = [change for name in content if name in known for change in _other(name, then[name], content[name])]
            by_name = [(one, named_by(key)) for key, one in self._named.items()]
            found += [_by_name(one) for one, name in by_name if name is not None and name not in known]
            found += _other_rows(self._before.get("data") or {}, data)
            self._judge(found)
        self._say()

    @property
    def fields(self) -> list[str]:
        """The fields of GKDConfig that are others now."""
        keys = (change.key.partition(".") for change in self._going_on.values())
        return [name for section, _, name in keys if section == "training"]

    def _judge(self, found: Sequence[Change]) -> None:
        assert self._checkpoint is not None or not found
        refused = [one for one in found if one.kind is NEVER or (one.kind is REFUSED and not self._allows(one))]
        if refused:
            raise ChangedRunError(_refusal(self._checkpoint, refused, self._allowed))
        self._going_on |= {f"{one.key} {one.note}": one for one in found}

    def _allows(self, change: Change) -> bool:
        return is_allowed(change, self._allowed)

    def _say(self) -> None:
        if self._checkpoint is None or not is_main():
            return
        if not self._before:
            logger.warning(
                "%s does not say what it was made from, and its folder has no %s: options, models and data are not "
                "compared with those of now.",
                self._checkpoint,
                CONFIG,
            )
        elif "content" not in self._before:
            logger.warning(
                "%s is of an earlier version: its options were compared, what is in models and data was not.",
                self._checkpoint,
            )
        if self._going_on:
            listed = "; ".join(_line(change) for change in self._going_on.values())
            logger.warning("Going on otherwise than %s was made: %s.", self._checkpoint.name, listed)


def _only(values: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def refuse_changed_options(config: RunConfig, resume: str | None, allowed: Sequence[str]) -> None:
    """Refuse before torch is imported what would be refused whichever checkpoint is meant: which one, is seen later.

    Raises:
        ChangedRunError: options may not change.
    """
    if resume is None:
        return
    run_dir = Path(config.training["output_dir"])
    refusal: ChangedRunError | None = None
    for checkpoint in _candidates(run_dir) if resume == "auto" else [Path(resume).absolute()]:
        if not checkpoint.is_dir():
            return  # said when it is looked for
        try:
            Comparison(checkpoint, allowed).options({"config": config.model_dump(mode="json")})
        except ChangedRunError as error:
            refusal = refusal or error
        else:
            return
    if refusal is not None:
        raise refusal


def _candidates(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    steps = {path: path.name.removeprefix(CHECKPOINT) for path in run_dir.glob(f"{CHECKPOINT}*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: -int(steps[path]))


def _facts_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made from, as far as it or its folder says it."""
    facts = read_map(checkpoint / MANIFEST).get("facts")
    if isinstance(facts, dict) and "config" in facts:
        return facts
    config = read_map(checkpoint.absolute().parent / CONFIG)
    return {"config": config} if "rlhf" in config else {}


def _by_name(change: Change) -> Change:
    """Of an option whose name counts, since what it names is not known."""
    return Change(change.key, change.before, change.now, REFUSED)


def _other(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    if then.get("content") == now.get("content"):
        return
    before, here = _short(then.get("name")), _short(now.get("name"))
    note = f"{before} then, {here} now" if before != here else f"{here}, and other content"
    yield Change(option_of(name), before, here, REFUSED, f"the {name} is another ({note})")


def _other_rows(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """Rows that are not those of then; of the training data refused, of the evaluation's said."""
    for part, key, kind in (("train", DATA_CONTENT, REFUSED), ("eval", "data.eval", SAID)):
        before, here = then.get(part) or [], now.get(part) or []
        notes = [
            _rows_note(f"data.{part}[{number}]" if len(here) > 1 else f"data.{part}", *pair)
            for number, pair in enumerate(zip(before, here, strict=False))
            if pair[0]["content"] != pair[1]["content"]
        ]
        if len(before) != len(here):
            notes.append(f"data.{part} has {len(here)} sources, and had {len(before)}")
        if notes:
            yield Change(key, None, None, kind, "; ".join(notes))


def _rows_note(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    where = (
        _short(now["path"]) if then["path"] == now["path"] else f"{_short(now['path'])}, {_short(then['path'])} then"
    )
    rows = f"{then['rows']:,} rows then, {now['rows']:,} now" if then["rows"] != now["rows"] else "rows are others"
    return f"{name} ({where}): {rows}"


def _refusal(checkpoint: Path | None, refused: Sequence[Change], allowed: Sequence[str]) -> str:
    lines = [f"  {_line(change)}" for change in refused[:_SHOWN]]
    if len(refused) > _SHOWN:
        lines.append(f"  and {len(refused) - _SHOWN} more")
    never = [change for change in refused if change.kind is NEVER]
    if never:
        lines += [
            "This cannot be allowed: the checkpoint cannot be loaded then. Take it back, or begin another run with the "
            f"weights alone: model.model={checkpoint}, in {ANOTHER_FOLDER}."
        ]
    else:
        names = dict.fromkeys(change.key for change in refused)
        lines += [
            f"Take it back, or begin anew in {ANOTHER_FOLDER}. If it is meant:",
            f"  {insisting_command([*allowed, *names])}",
        ]
    return "\n".join([f"{checkpoint} was made by a run that differs from this one:", *lines])


def _line(change: Change) -> str:
    if change.before is None and change.now is None:
        return f"{change.key}: {change.note}"
    if change.note and change.kind is not NEVER:
        return f"{change.key}: {change.note}"
    why = f" ({change.note})" if change.note else ""
    return f"{change.key}: {_short(change.before)} -> {_short(change.now)}{why}"


def _short(value: Any) -> str:
    text = clean(value if isinstance(value, str) else repr(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
