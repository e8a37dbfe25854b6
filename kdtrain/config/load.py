"""Checks a config in one pass over everything, and loads it.

    file or mapping -> tree with places (`sources`) -> absolute paths (`paths`) and the messages of the teacher's prefix
    (`prefix`) -> models (`schema`, `training_rules`) -> how options go together (`rules`)

Each step goes on where the one before found mistakes, without what is wrong, so that all of them are reported at once.
Nothing here imports torch, and nothing reads an environment variable.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import ValidationError

from kdtrain.config import tree
from kdtrain.config.arguments import TrainArguments, build_train_arguments
from kdtrain.config.diagnose import COMMAND_LINE, Diagnostic, InvalidConfigError, dotted, looks_secret
from kdtrain.config.paths import resolve_paths
from kdtrain.config.prefix import read_prefix
from kdtrain.config.rules import check_rules
from kdtrain.config.schema import RunConfig
from kdtrain.config.sources import Composer, FileOrMapping
from kdtrain.config.training_rules import check_training
from kdtrain.config.translate import ALTERNATIVE, to_problem
from kdtrain.config.tree import Invalid, KeyPath, Node, Problem

logger = logging.getLogger("kdtrain")

_PLACEHOLDER = "missing"
_ATTEMPTS = 4
_MOST = 200
_LONGEST_NAME = 120
_CACHE = ("rlhf", "teacher", "path")
_NOT_SHOWN = Problem((), "further mistakes are not shown", "correct these first")


FileCheck = Callable[[RunConfig], Iterable[Problem]]


@dataclass(frozen=True)
class CheckResult:
    """What a static check found."""

    config: RunConfig | None
    """None where there are errors."""
    errors: list[Diagnostic] = field(default_factory=list)
    warnings: list[Diagnostic] = field(default_factory=list)
    root: Node | None = field(default=None, repr=False)
    """The config as it was written, for the places of what is found later."""

    def placed(self, problems: Iterable[Problem]) -> list[Diagnostic]:
        """Further findings, with their places in the config."""
        assert self.root is not None
        return [tree.to_diagnostic(problem, self.root) for problem in problems]


def check_config(
    source: FileOrMapping,
    overrides: Sequence[str] = (),
    *,
    files: FileCheck | None = None,
    new_cache: bool = False,
    rules: bool = True,
) -> CheckResult:
    """Checks a whole config without importing torch.

    Args:
        source: a YAML file, or a mapping of the same form.
        overrides: `key.sub=value`, the value in YAML.
        files: what looks at the files that the config names, such as `kdtrain.preflight.files.all_files`.
        new_cache: the cache that `rlhf.teacher.path` names is about to be written: it need not be there.
        rules: whether options have to fit each other, and what they name has to be there. Not so for what a run was
            made by, of which only the student counts.

    Returns:
        the config and all findings, in the order of the file; none is raised.
    """
    composer = Composer()
    root = composer.compose(source, overrides)
    problems = list(composer.problems)
    root, found = _hide_secrets(root)
    problems += found
    root, found = resolve_paths(root)
    problems += found
    root, found = read_prefix(root)
    problems += found
    config, found = _validate(root, [problem.path for problem in problems if problem.level == "error"], rules)
    if config is not None and files is not None:
        try:
            found += files(config)
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            name = str(error.filename)[:_LONGEST_NAME]
            found.append(Problem((), f"a file that is named here cannot be looked for: {error.strerror}: {name}"))
    if new_cache:
        found = [problem for problem in found if problem.path != _CACHE]
    if composer.incomplete:
        # What could not be read may hold what seems to be missing or to conflict: only single values can be judged.
        found = [problem for problem in found if problem.level == "error" and tree.get(root, problem.path)]
    problems = _without_consequences([*problems, *found])
    diagnostics = sorted((tree.to_diagnostic(problem, root) for problem in problems), key=_order)
    errors = [diagnostic for diagnostic in diagnostics if diagnostic.level == "error"]
    warnings = [diagnostic for diagnostic in diagnostics if diagnostic.level == "warning"]
    return CheckResult(None if errors else config, errors, warnings, root)


class ConfigLoader:
    """The way into kdtrain from Python."""

    @staticmethod
    def load(
        source: FileOrMapping, overrides: Sequence[str] = (), *, files: FileCheck | None = None, new_cache: bool = False
    ) -> RunConfig:
        """The checked config; warnings are logged. `files` and `new_cache` as in `check_config`.

        Raises:
            ConfigError: a `ValueError` whose text shows every mistake with its place; `.diagnostics` holds them.
        """
        result = check_config(source, overrides, files=files, new_cache=new_cache)
        if result.config is None:
            raise InvalidConfigError(result.errors)
        for warning in result.warnings:
            logger.warning("%s", warning.logged)
        return result.config

    @classmethod
    def load_training_config(cls, source: FileOrMapping, overrides: Sequence[str] = ()) -> TrainArguments:
        """The checked config with trl's GKDConfig built from it. Imports torch and trl.

        Raises:
            ConfigError: as `load`, or GKDConfig itself refuses the values; nothing is built.
        """
        return build_train_arguments(cls.load(source, overrides))


def _without_consequences(problems: list[Problem]) -> list[Problem]:
    """Without what is missing only because it stands under another name, which is reported with the right one."""
    renamed = {found.hint.removeprefix("use ") for found in problems if found.hint.startswith("use ")}
    return [found for found in problems if not (found.missing and dotted(found.path) in renamed)]


def _hide_secrets(root: Node) -> tuple[Node, list[Problem]]:
    """Takes values that look like credentials out, before anything can repeat them."""
    problems: list[Problem] = []
    for path, node in list(tree.scalars(root)):
        if isinstance(node.value, str) and looks_secret(node.value):
            hint = "put it into an environment variable; a config holds at most that variable's name"
            problems.append(Problem(path, "looks like a secret, and secrets do not belong in a config", hint))
            root = tree.put(root, path, Node(Invalid.VALUE, node.place))
    return root, problems


def _validate(root: Node, wrong: list[KeyPath], rules: bool) -> tuple[RunConfig | None, list[Problem]]:
    """The config as far as it can be built without its wrong values, and what is wrong with it."""
    values: dict[str, Any] = tree.plain(root)
    problems: list[Problem] = []
    training = values.get("training")
    if isinstance(training, Mapping):
        problems += islice(check_training(training), _MOST + 1)  # no config has thousands, each with its own search
        problems[_MOST:] = [_NOT_SHOWN] if len(problems) > _MOST else []
        for problem in problems:
            if problem.level == "error" and problem.path:
                _prune(values, problem.path)
    config, found = _build(values, root)
    problems += found
    if config is not None and rules:
        wrong = wrong + [problem.path for problem in problems if problem.level == "error"]
        problems += check_rules(config, root, wrong)
    return config, problems


def _build(values: dict[str, Any], root: Node) -> tuple[RunConfig | None, list[Problem]]:
    """Takes wrong values out until the models accept the rest, so that the rules can judge it."""
    problems: list[Problem] = []
    for attempt in range(_ATTEMPTS):
        try:
            return RunConfig.model_validate(copy.deepcopy(values)), problems
        except ValidationError as error:
            details = error.errors(include_url=False)
            if len(details) > _MOST:
                return None, [*problems, *map(to_problem, details[:_MOST]), _NOT_SHOWN]
            for detail in details:
                problem, missing = to_problem(detail), detail["type"] == "missing"
                # Missing only later, or invalid in the file: it was wrong, and was reported as that.
                written = tree.get(root, problem.path)
                if not missing or (attempt == 0 and (written is None or written.value is not Invalid.VALUE)):
                    problems.append(problem)
                if ALTERNATIVE in detail["loc"]:  # a map with a wrong part makes way for the option's default
                    _prune(values, detail["loc"][: detail["loc"].index(ALTERNATIVE)])
                else:
                    _prune(values, problem.path, missing)
    return None, problems


def _prune(values: dict[str, Any], path: KeyPath, missing: bool = False) -> None:
    """Takes a wrong value out of `values`, or puts a text where a required one is missing."""
    holder: Any = values
    *parents, last = path
    for part in parents:
        if part == 0 and not isinstance(holder, list):
            continue  # one source given where a list of them may stand
        if isinstance(holder, dict):
            holder = holder.setdefault(part, {})
        elif isinstance(holder, list) and isinstance(part, int):
            holder = holder[part]
    if not isinstance(holder, dict):
        values.pop(str(path[0]), None)
    elif missing:
        holder[last] = _PLACEHOLDER
    else:
        holder.pop(last, None)


def _order(diagnostic: Diagnostic) -> tuple[Any, ...]:
    """By file and position; the command line last, as it is read last."""
    return diagnostic.file == COMMAND_LINE, diagnostic.file or "", diagnostic.line or 0, diagnostic.col or 0
