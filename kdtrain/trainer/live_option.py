"""Options that a callback may change while training."""

from __future__ import annotations

from typing import Any


class LiveOption:
    """An attribute of a trainer that is a field of its `options`: what a callback sets, the next window uses."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type) -> Any:
        return self if trainer is None else getattr(trainer.options, self._name)

    def __set__(self, trainer: Any, value: Any) -> None:
        trainer.options = trainer.options.model_copy(update={self._name: value})
