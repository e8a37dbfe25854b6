"""Questions and answers in columns of their own, as conversations: Alpaca, Dolly, ms-swift.

Unlike a prompt and its completion they have roles, so the model's chat template writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdtrain.data.errors import RowError
from kdtrain.data.turns import Message, blank, from_json, is_list, nonempty


def instruction_messages(row: Mapping[str, Any]) -> list[Message]:
    """Alpaca and Dolly: the input, or the context, stands on the line after the instruction."""
    asked = [_optional(row, column) for column in ("instruction", "input", "context")]
    question = "\n".join(text for text in asked if text)
    return _asked(row, nonempty(question, "instruction"), ("output", "response"))


def query_messages(row: Mapping[str, Any]) -> list[Message]:
    return _asked(row, nonempty(row["query"], "query"), ("response",))


def _asked(row: Mapping[str, Any], question: str, columns: tuple[str, ...]) -> list[Message]:
    """A question with its history before it; the answer is the first of the columns that has one."""
    given = [column for column in columns if row.get(column) is not None]
    filled = [column for column in given if not blank(row[column])] or given
    answers = [nonempty(row[column], column) for column in filled]
    if len(set(answers)) > 1:
        raise RowError(f"{' and '.join(filled)} are two different answers: keep one of the two columns")
    asked = {"role": "user", "content": question}
    return [*_history(row), asked, *({"role": "assistant", "content": answer} for answer in answers[:1])]


def _history(row: Mapping[str, Any]) -> list[Message]:
    """Earlier rounds, [[question, answer], …]."""
    history = from_json(row.get("history"), "history") or []
    if not is_list(history) or not all(is_list(turn) and len(turn) == 2 for turn in history):
        raise RowError("history must be a list of pairs, each a question and its answer")
    messages = []
    for i, turn in enumerate(history):
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": nonempty(text, f"history[{i}]")})
    return messages


def _optional(row: Mapping[str, Any], column: str) -> str:
    return "" if blank(row.get(column)) else nonempty(row[column], column)
