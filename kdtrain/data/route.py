"""Which of several teachers answers for a row: its column `teacher`, else its source's `teacher`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdtrain.data.errors import RowError, show, suggestion


def teacher_of(value: Any, of_source: str | None, known: Sequence[str]) -> str:
    """The teacher that a row has.

    Args:
        value: of its column `teacher`; None or empty text says nothing.
        of_source: what its source says.
        known: the names of the teachers; of one alone no row needs to name it.

    Raises:
        RowError: it names none of them.
    """
    name = of_source if value is None or value == "" else value
    if name is None and len(known) == 1:
        return known[0]
    if isinstance(name, str) and name in known:
        return name
    raise RowError(wrong_name(name, known))


def wrong_name(name: Any, known: Sequence[str]) -> str:
    """What is said of a row whose teacher is not known."""
    listed = ", ".join(known)
    if name is None:
        return (
            f"the row names no teacher, and there are several ({listed}): give it a column teacher, or its source "
            "a teacher (data.train: {path: …, teacher: NAME})"
        )
    near = suggestion(name, known) if isinstance(name, str) else ""
    return f"the row names the teacher {show(str(name), 60)}, which is none of rlhf.teachers ({listed}){near}"
