"""Tasks of lm-eval (EleutherAI's harness), run on each model of an evaluation through its own Python API.

Its package comes with the extra `eval`. Prompts are as the task writes them, without a chat template: so figures can be
compared with published ones.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdtrain.config.diagnose import clean
from kdtrain.errors import ConfigError, KdtrainError, PreflightError

Metrics = dict[str, float]
"""Of a task and a model, by name: `acc`, `acc_stderr`; with its filter where it has one, `exact_match,strict-match`."""


@dataclass(frozen=True)
class Tasks:
    """What is asked for on the command line."""

    names: Sequence[str]
    include_path: Path | None = None
    """A folder with further tasks, as YAML."""
    loaded: list[Any] = field(default_factory=list, compare=False)
    """The task manager, once `load` was called."""

    def check(self) -> None:
        """What can be said without importing anything.

        Raises:
            ConfigError: the package or the folder is missing.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("--tasks needs lm-eval, which is not installed: pip install 'kdtrain[eval]'")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(f"--include-path {self.include_path}: there is no such folder. Name one with task files.")

    def load(self) -> None:
        """Find the tasks and read their data, before any model is loaded.

        Raises:
            ConfigError: lm-eval knows no such task.
            PreflightError: a task cannot be loaded.
        """
        from lm_eval.tasks import TaskManager

        with _quiet():
            manager = None
            if self.include_path is not None:  # its own thousands of tasks take seconds to list
                manager = TaskManager(include_path=str(self.include_path), include_defaults=False)
            if manager is None or self._unknown(manager):
                manager = TaskManager(include_path=self.include_path and str(self.include_path))
            if unknown := self._unknown(manager):
                where = f", and there is none in {self.include_path}" if self.include_path else ""
                hint = "Its own are listed by lm-eval ls tasks; a folder with files of yours is --include-path DIR."
                raise ConfigError(f"--tasks {unknown[0]}: lm-eval knows no such task{where}. {hint}")
            with _readable(self.names):
                manager.load(list(self.names))
        self.loaded.append(manager)

    def _unknown(self, manager: Any) -> list[str]:
        return [name for name in self.names if name not in manager.all_tasks]

    def results(self, model: Any, tokenizer: Any, batch_size: int) -> dict[str, Metrics]:
        """The metrics of a model in each task, and in the parts of those that are groups.

        Raises:
            PreflightError: lm-eval fails.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _quiet(), _readable(self.names):
            harness = HFLM(pretrained=model.eval(), tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            found = lm_eval.simple_evaluate(
                model=harness, tasks=list(self.names), task_manager=self.loaded[0], log_samples=False
            )
        assert found is not None, "rank 0 gets results, and each process is one"
        return {name: _metrics(of_task) for name, of_task in found["results"].items()}


def _metrics(of_task: Mapping[str, Any]) -> Metrics:
    numbers = {name: value for name, value in of_task.items() if "," in name and isinstance(value, int | float)}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


@contextmanager
def _readable(names: Sequence[str]) -> Iterator[None]:
    """What goes wrong in a task is its own, or its data's: any exception may come."""
    try:
        yield
    except KdtrainError:
        raise
    except Exception as error:
        reason = clean(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
        raise PreflightError(
            f"--tasks {','.join(names)}: lm-eval failed: {reason}. --debug shows where. Data of its own tasks come "
            "from the hub; a task file (--include-path) may name local files."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Its loggers report every default of a task."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
