"""Documented options that this version does not implement yet: each is refused, never silently ignored.

Implementing one means removing its line.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem

# Option -> what it is called in the message, and the values there are so far.
NOT_AVAILABLE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "rlhf.teacher.backend": ("a teacher of this kind", ("hf", "self", "vllm", "openai", "cache")),
}


def check_available(config: RunConfig) -> list[Problem]:
    """One error for each use of an option that is not available yet."""
    used: list[tuple[KeyPath, str]] = [
        (tuple(option.split(".")), what)
        for option, (what, available) in NOT_AVAILABLE.items()
        if attrgetter(option)(config) not in available
    ]
    hint = "remove it, or wait for a later version"
    return [Problem(path, f"not available yet: {what}", hint) for path, what in used]
