"""What a chat template leaves out of a conversation: seen from a rendering with another word in every place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kdtrain.data.errors import RowError
from kdtrain.data.messages import form_of, has_reasoning, named_tool, probe, words_of
from kdtrain.data.probed_template import ProbedTemplate
from kdtrain.data.row_notes import EARLIER_REASONING, KWARGS_UNREAD, NAME_UNREAD
from kdtrain.data.rows import Chat


@dataclass(frozen=True)
class Unrendered:
    """What a template leaves out of conversations of one form."""

    problem: str = ""
    reasoning: tuple[int, ...] = ()  # messages whose reasoning is left out
    notes: tuple[str, ...] = ()


class UnrenderedFinder:
    """Finds it once for each form of a conversation, which is all that it depends on beside the template."""

    def __init__(self, template: ProbedTemplate, train_on: str) -> None:
        self._template = template
        self._train_on = train_on
        self._known: dict[Any, Unrendered] = {}

    def find(self, chat: Chat) -> Unrendered:
        """Raises RowError where it is more than reasoning."""
        read = {name: one for name, one in chat.template_kwargs.items() if not self._template.does_not_read(name)}
        form = form_of(chat, read)
        if form not in self._known:
            self._known[form] = self._probe(chat)
        if problem := self._known[form].problem:
            raise RowError(problem)
        return self._known[form]

    def _probe(self, chat: Chat) -> Unrendered:
        words = replace(chat, messages=[probe(message, i) for i, message in enumerate(chat.messages)])
        if chat.tools:
            words = replace(words, tools=[named_tool(tool, f"kdprobetool{i}x") for i, tool in enumerate(chat.tools)])
        last = len(chat.messages) - 1
        ends = [last] if chat.prompt_only else chat.trained or [last]
        reasoning: list[int] = []
        notes = [KWARGS_UNREAD] if any(map(self._template.does_not_read, chat.template_kwargs)) else []
        for end in ends if self._train_on == "assistant" else ends[-1:]:
            try:
                text = self._text(words, end + 1, chat.prompt_only)
                # What the model is given is rendered without the answer, which can change it.
                given = text if chat.prompt_only or not end else self._text(words, end, True)
            except RowError:
                continue  # the row itself says why
            if problem := next(_left_out(chat, end, given, text), ""):
                return Unrendered(problem)
            for i, message in enumerate(chat.messages[: end + 1]):
                thought = [f"kdprobereasoning{i}x"] * has_reasoning(message) + words_of(message, i, "thinking")
                if any(word not in (text if i == end else given) for word in thought):
                    if i == end:
                        reasoning.append(i)
                    else:
                        notes.append(EARLIER_REASONING)
                if message.get("name") and message["role"] != "tool" and f"kdprobename{i}x" not in given:
                    notes.append(NAME_UNREAD)
        return Unrendered("", tuple(reasoning), tuple(dict.fromkeys(notes)))

    def _text(self, words: Chat, count: int, generation_prompt: bool) -> str:
        messages = words.messages[:count]
        return self._template.render(messages, words.tools, words.template_kwargs, generation_prompt=generation_prompt)[
            0
        ]


def _left_out(chat: Chat, end: int, given: str, answered: str) -> Iterator[str]:
    for i, message in enumerate(chat.messages[: end + 1]):
        text = answered if i == end else given
        content = words_of(message, i, "content")
        if i != end and message["role"] == "assistant":
            content = content[-1:]  # what stands before the thinking of an earlier answer may go with it
        if any(word not in text for word in content):
            yield f"the chat template leaves out messages[{i}], which has the role {message['role']}"
        for j, _ in enumerate(message.get("tool_calls") or ()):
            if f"kdprobecall{i}x{j}x" not in text:
                yield f"the chat template leaves out messages[{i}].tool_calls[{j}]"
    for j, _ in enumerate(chat.tools or ()):
        if f"kdprobetool{j}x" not in given:
            yield f"the chat template leaves out tools[{j}]: it is not made for tools"
