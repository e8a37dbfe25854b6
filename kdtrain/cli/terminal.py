"""What a terminal can show, and text that is cut between its words."""

from __future__ import annotations

import os
import shutil
import textwrap
from typing import TYPE_CHECKING, TextIO

from kdtrain.config.diagnose import escape

if TYPE_CHECKING:
    from rich.console import Console


def is_live(console: Console) -> bool:
    """Whether lines can be written over: a terminal, not a file for which FORCE_COLOR asks for colours."""
    return not console.is_dumb_terminal and console.is_terminal and _is_terminal(console.file)


def wrapped(text: str, stream: TextIO) -> str:
    """Text with lines as wide as the terminal behind `stream`; as it is where that is none."""
    if not _is_terminal(stream):
        return text
    width = max(shutil.get_terminal_size().columns, 20)
    lines = (textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join("\n".join(parts) for parts in lines)


def printable(text: str) -> str:
    """Text whose lines are safe to print: names, data and servers' errors may hold a terminal's control characters."""
    return "\n".join(map(escape, text.split("\n")))


def _is_terminal(stream: object) -> bool:
    try:
        return os.isatty(stream.fileno())  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):  # no file, or one that is closed
        return False
