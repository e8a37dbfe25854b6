"""A teacher's answer that is a message, as the tokens that the student's chat template makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdtrain.data.encoder import RowEncoder
from kdtrain.data.errors import RowError
from kdtrain.losses.reduce import IGNORE_INDEX


class MessageEncoder:
    """Encodes answers behind the prompts of encoded rows, with the masks and stop tokens that data has.

    Args:
        processing_class: what the rows were encoded with.
        stops: tokens that end an answer.
        teacher_kwargs: template arguments of the teacher alone, which a row's conversation has in it.
        options: of `TemplateOptions`, as the rows were encoded with.
    """

    def __init__(
        self,
        processing_class: Any,
        stops: frozenset[int],
        *,
        teacher_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._encoder = RowEncoder(processing_class, "last", **options)
        self._stops, self._teacher_kwargs = stops, teacher_kwargs or {}

    def encode(self, row: Mapping[str, Any], message: Mapping[str, Any], cut: bool) -> tuple[list[int], list[int]]:
        """Ids and labels of an answer, up to its last supervised token.

        Args:
            row: encoded, with its `chat`.
            cut: whether the answer has no end: then the token that would end the turn is left out, not made up.

        Raises:
            RowError: an answer that would make a row of the data bad.
        """
        chat = json.loads(row["chat"])  # its prefix is the teacher's alone, and no column of a row
        kwargs = {k: v for k, v in chat["chat_template_kwargs"].items() if k not in self._teacher_kwargs}
        asked = {**chat, "messages": [*chat["messages"], message], "chat_template_kwargs": kwargs}
        if row.get("images"):
            asked["images"] = row["images"]
        (found,) = self._encoder.encode([asked], [None])
        if isinstance(found, RowError):
            raise RowError(f"the teacher's answer: {found}")
        start, last = row["prompt_length"], found[-1]
        if len(found) > 1 or last.prompt_length != start or last.input_ids[:start] != row["input_ids"][:start]:
            raise RowError("the chat template renders the conversation otherwise once the teacher's answer follows")
        end = max(i for i, label in enumerate(last.labels) if label != IGNORE_INDEX) + 1
        if cut and last.input_ids[end - 1] in self._stops:
            end -= 1
        if end <= start:
            raise RowError("the teacher's answer: no token of it is supervised")
        return last.input_ids[start:end], last.labels[start:end]
