"""The error of a single row, and how messages show values and suggest names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from kdtrain.errors import DataError


class RowError(DataError):
    """One row that cannot be trained on; the message is the reason, without the place.

    Rows with one are counted and shown. Any other `DataError` means that no row could work (a tokenizer without a chat
    template), and stops the run at once.
    """


def show(value: object, limit: int = 160) -> str:
    """One line that is safe to print: control, bidirectional and other invisible characters are escaped."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def said(error: BaseException, limit: int = 400) -> str:
    """What another program's error says, on one line without its last full stop; its type where it says nothing."""
    return show(" ".join(str(error).split()) or type(error).__name__, limit).rstrip(".")


def type_name(value: object) -> str:
    """The type of a value, in the words of someone who writes JSON."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "a mapping"}
    return names.get(type(value), "a list" if isinstance(value, (list, tuple)) else type(value).__name__)


def suggestion(name: str, known: Sequence[str]) -> str:
    """What was probably meant by a name, as the end of a message."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {show(close[0])}?" if close else ""
