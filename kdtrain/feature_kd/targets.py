"""What messages call a feature target and its options: the one place that knows the section of the config."""

from __future__ import annotations

from typing import Literal

SECTION = "custom.visual_kd"
Side = Literal["student", "teacher"]


def named(target: str) -> str:
    """The subject of a message about a target."""
    return f"visual_kd target {target!r}"


def option(target: str, name: str) -> str:
    """The full key of a target's option."""
    return f"{SECTION}.targets.{target}.{name}"
