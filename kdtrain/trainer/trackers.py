"""The trackers of `training.report_to`, none of which may end a run: their servers, logins and disks are not its own.

Upstream's callbacks are called as they are, but for two things. What one raises is a warning, once. And at the end they
come behind the saved model: a tracker that uploads for minutes, or waits for a network, must not keep it from being
saved. Callbacks that a caller has passed are none of these: what they raise is theirs to say.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from kdtrain.data.errors import said
from kdtrain.ranks import is_main

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
_MOST_FAILURES = 3
"""So often in a row a tracker may fail until nothing more is sent to it: each time it may wait for a network."""
LONGEST_S = {"on_save": 3600.0, "on_train_end": 3600.0}
"""How long a call may take: these upload models."""
LONGEST_OTHER_S = 300.0


class Trackers:
    """Adds the trackers that the trainer's arguments name, before other callbacks.

    Raises:
        RuntimeError: a tracker's package is not installed.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self.time_limit: Callable[[float], AbstractContextManager[None]] = lambda seconds: nullcontext()
        """Raises `TimeoutError` inside after so many seconds, where the process lets us."""
        self._held: list[Callable[[], None]] | None = None
        names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
        made = []
        for kind in get_reporting_integration_callbacks(trainer.args.report_to):
            callback = kind()
            _Guard(self, callback, names[kind])
            made.append(callback)
        handler = trainer.callback_handler
        handler.callbacks[1:1] = made  # behind upstream's own, which decides what is due
        for callback in made:
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put off the end of training, for the trackers, to the end of this block."""
        held = self._held = []
        try:
            yield
        finally:
            self._held = None
            for call in held:
                call()

    def is_held(self, call: Callable[[], None]) -> bool:
        """Whether the end is put off; `call` is then made later."""
        if self._held is None:
            return False
        self._held.append(call)
        return True


class _Guard:
    """Stands before the hooks of one tracker."""

    def __init__(self, trackers: Trackers, callback: TrainerCallback, name: str) -> None:
        self._trackers, self._name = trackers, name
        self._failures, self._warned = Counter[str](), False
        """Of each hook, in a row."""
        for event in _EVENTS:
            if getattr(type(callback), event) is not getattr(TrainerCallback, event):
                setattr(callback, event, partial(self._call, event, getattr(callback, event)))

    def _call(self, event: str, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if event == "on_train_end" and self._trackers.is_held(partial(self._guarded, event, hook, *args, **kwargs)):
            return
        self._guarded(event, hook, *args, **kwargs)

    def _guarded(self, event: str, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if any(count >= _MOST_FAILURES for count in self._failures.values()):
            return
        try:
            with self._trackers.time_limit(LONGEST_S.get(event, LONGEST_OTHER_S)):
                hook(*args, **kwargs)
        except (Exception, SystemExit) as error:  # each has its own, and some end the process for want of a login
            # One that cannot begin would try again, and wait again, with every record.
            self._failures[event] += _MOST_FAILURES if event in ("on_init_end", "on_train_begin") else 1
            if is_main() and not self._warned:
                self._warned = True
                reason = f"{type(error).__name__}: {said(error, 200)}"
                logger.warning(
                    "The tracker %s has failed (%s). Training goes on, and its own log misses nothing.",
                    self._name,
                    reason,
                )
        else:
            self._failures[event] = 0
