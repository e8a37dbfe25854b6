"""A chat template with what is found out about it by rendering probes: how it begins and ends a turn, what it wants."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta
from transformers.utils.chat_template_utils import _compile_jinja_template
from trl.chat_template_utils import has_generation_markers

from kdtrain.data.control_tokens import ControlTokens
from kdtrain.data.errors import RowError, said, show
from kdtrain.data.messages import Message, with_text_arguments
from kdtrain.errors import DataError

# What the caller of a template passes by itself.
RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "conversation"}
)
# What a template is probed with: words that no template says by itself.
_USER, _ANSWER, _NEXT = "kdprobeuser", "kdprobeanswer", "kdprobenext"
_QUESTION = [{"role": "user", "content": _USER}]
_SYSTEM = "kdprobesystem"
_CALLED = "kdprobecalled"
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "kdprobe00", "type": "function", "function": {"name": _CALLED, "arguments": {"kdprobekey": 1}}}
    ],
}


@dataclass(frozen=True)
class Ends:
    """Tokens that end an assistant's turn, as text."""

    all: tuple[str, ...]
    user: str | None = None  # the one that only the next message writes, a user's
    tool: str | None = None  # or a tool's


_FAILURES = (TemplateError, TypeError, LookupError, ValueError, ArithmeticError, AttributeError, RecursionError)


class ProbedTemplate:
    """Renders messages in the form that the template wants, and knows its habits.

    Attributes:
        text: the template.
        marked: it has generation markers.
        added: the tokenizer's added vocabulary, without white space; `added_pattern` finds it in text.
    """

    def __init__(
        self, processing_class: Any, chat_template: str | None, tools: bool, kwargs: Mapping[str, Any] | None
    ) -> None:
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._arguments = {**self._tokenizer.special_tokens_map, **(kwargs or {})}
        self.text = chat_template or _own_template(processing_class, self._tokenizer, tools)
        try:
            _ready(self.text)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template of {_name(self._tokenizer)} cannot be read: {error}") from error
        self.check_kwargs(kwargs, "data.chat_template_kwargs")
        self.marked = has_generation_markers(self.text)
        self.added = {token: id_ for token, id_ in self._tokenizer.get_added_vocab().items() if token.strip()}
        self.added_pattern = any_of(self.added)
        self._as_parts = False
        self._as_parts = not self._renders_question() and self._renders_question(as_parts=True)

    def render(
        self,
        messages: list[Message],
        tools: list[Message] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool = False,
        spans: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and with `spans` those of its generation markers.

        kwargs: the conversation's own arguments for the template, over those of all.

        Raises:
            RowError: the template refuses the conversation.
        """
        if any("tool_calls" in message for message in messages):
            messages = [self._as_it_wants_calls(message, *self._call_form) for message in messages]
        return self._run(self._as_it_wants_parts(messages), tools, generation_prompt, spans, kwargs or {})

    def _as_it_wants_calls(self, message: Message, as_text: bool, no_content: bool) -> Message:
        if not message.get("tool_calls"):
            return message
        if as_text:
            message = with_text_arguments(message)
        return {**message, "content": None} if no_content and not message["content"] else message

    def _as_it_wants_parts(self, messages: list[Message]) -> list[Message]:
        if not self._as_parts:
            return messages
        return [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
            for m in messages
        ]

    def _run(
        self,
        messages: list[Message],
        tools: list[Message] | None,
        generation_prompt: bool,
        spans: bool,
        kwargs: Mapping[str, Any],
    ) -> tuple[str, list[tuple[int, int]]]:
        template, names = _ready(self.text)
        given = {
            **names,
            "messages": [_with_thinking(message) for message in messages],
            "documents": None,
            "tools": tools,
            "add_generation_prompt": generation_prompt,
            **self._arguments,
            **kwargs,
        }
        try:
            return _rendered(template, given, spans)
        # Templates are programs: besides their own raise_exception they trip over missing keys and wrong types.
        except _FAILURES as error:
            raise RowError(f"the chat template refuses the conversation: {said(error)}") from error

    # ---- probes ------------------------------------------------------------------------------------------------------

    def _probe_text(self, messages: list[Message], generation_prompt: bool = False) -> str:
        return self.render(messages, generation_prompt=generation_prompt)[0]

    def _renders_question(self, as_parts: bool = False) -> bool:
        """Templates of vision models that walk over content parts render nothing at all for a string."""
        self._as_parts = as_parts
        try:
            return _USER in self._probe_text(_QUESTION)
        except RowError:
            return False

    @cached_property
    def takes_system(self) -> bool:
        """Whether it writes a system message; Gemma's first templates refuse one."""
        try:
            return _SYSTEM in self._probe_text([{"role": "system", "content": _SYSTEM}, *_QUESTION])
        except RowError:
            return False

    @cached_property
    def generation_prompt(self) -> str:
        """What is added after a user's message for the model to answer."""
        try:
            without, full = self._probe_text(_QUESTION), self._probe_text(_QUESTION, generation_prompt=True)
        except RowError:
            return ""
        # It may stand in place of what the template ends a text with (the EOS of Phi-3).
        return full[max(edge for edge in boundaries(full, self.added_pattern) if edge <= common(without, full)) :]

    @cached_property
    def headers(self) -> list[str]:
        """The generation prompt and its beginnings, the longest first: thinking models open a block in it."""
        header = self.generation_prompt
        return [header[:end] for end in reversed(boundaries(header, self.added_pattern)) if header[:end].strip()]

    @cached_property
    def _call_form(self) -> tuple[bool, bool]:
        """Whether the template wants the arguments of tool calls as JSON text, and null for the content beside them.

        It is seen from which of them it renders: some fail on an object or print it, and DeepSeek's looks for the null.
        """
        for as_text, no_content in itertools.product((False, True), (False, True)):
            call = self._as_it_wants_calls(_CALL, as_text, no_content)
            try:
                text = self._run(self._as_it_wants_parts([*_QUESTION, call]), None, False, False, {})[0]
            except RowError:
                continue
            if _CALLED in text and ('"kdprobekey"' in text or "'kdprobekey'" not in text):
                return as_text, no_content
        return False, False

    @cached_property
    def ends(self) -> Ends:
        """Which tokens end a turn: what stands behind the answers of probes, and the EOS."""
        eos = [self._tokenizer.eos_token] if self._tokenizer.eos_token else []
        answered = [*_QUESTION, {"role": "assistant", "content": _ANSWER}]
        try:
            tail = self._leading_added(self._probe_text(answered).partition(_ANSWER)[2])
            followed = self._probe_text([*answered, {"role": "user", "content": _NEXT}])
            gap = self._leading_added(followed.partition(_ANSWER)[2].partition(_NEXT)[0])
        except RowError:
            return Ends(tuple(eos))
        if tail:
            # What stands behind every answer, with or without a next message, is its end; the last of it stops the
            # model. Between two turns there has to be a beginning as well: one token alone is that.
            shared = tail[: common(tail, gap)]
            found = [*eos, *(shared[-1:] or [tail[0], *gap[: len(gap) > 1]]), *self._end_of_call()]
            return Ends(tuple(dict.fromkeys(found)))
        # The next message ends the turn: with a token of its own, or with the one of its role (GLM).
        user = gap[0] if gap else None
        tool = next(iter(self._beginning_of_tool()), user) if user else None
        return Ends(tuple(dict.fromkeys(filter(None, [*eos, user, tool]))), user, tool)

    def _end_of_call(self) -> list[str]:
        """The token that ends a turn with a tool call."""
        try:
            text = self._probe_text([*_QUESTION, _CALL]).rstrip()
        except RowError:
            return []
        return [token for token in self.added if text.endswith(token)][:1] if _CALLED in text else []

    def _beginning_of_tool(self) -> list[str]:
        """The token that begins the message of a tool."""
        try:
            call = self._probe_text([*_QUESTION, _CALL])
            answered = self._probe_text([*_QUESTION, _CALL, {"role": "tool", "content": _NEXT}])
        except RowError:
            return []
        return self._leading_added(answered[len(call) :])[:1] if answered.startswith(call) else []

    def _leading_added(self, text: str) -> list[str]:
        """Tokens of the added vocabulary in a text, if it starts with one after white space."""
        tokens = [match[0] for match in self.added_pattern.finditer(text)]
        return tokens if tokens and text.lstrip().startswith(tokens[0]) else []

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """Tokens that are no text: special ones, and those that begin and end a turn in this template.

        Thinking tags are neither: answers have them, and system prompts speak of them.
        """
        special = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        header = {match[0] for match in self.added_pattern.finditer(self.generation_prompt)}
        found = special | header | set(self.ends.all)
        return ControlTokens({token for token in found if token.strip() and "think" not in token})

    def does_not_read(self, argument: str) -> bool:
        """Whether an argument is one that the template does not look at, or that it gets anyway."""
        return argument in RESERVED_KWARGS or argument not in self._reads

    @cached_property
    def _reads(self) -> set[str]:
        return meta.find_undeclared_variables(_ready(self.text)[0].environment.parse(self.text))

    def check_kwargs(self, kwargs: Mapping[str, Any] | None, option: str) -> None:
        """Refuses arguments of an option that the template does not read."""
        for name in kwargs or ():
            if self.does_not_read(name):
                raise DataError(
                    f"{option} has {show(name, 60)}, which the chat template of {_name(self._tokenizer)} does not read"
                )


@lru_cache
def _ready(text: str) -> tuple[Template, dict[str, Any]]:
    """A template compiled, and the names that it knows by itself. Not kept in an object: that is sent to processes."""
    template = _compile_jinja_template(text)
    return template, dict(template.globals)


def _rendered(template: Template, given: dict[str, Any], spans: bool) -> tuple[str, list[tuple[int, int]]]:
    """What `render_jinja_template` gives, without the copies that it and jinja make of all of `given` at every call."""
    environment: Any = template.environment
    context = environment.context_class(environment, given, template.name, template.blocks)
    pieces: list[str] = []
    found: list[tuple[int, int]] = []
    if not spans:
        return "".join(template.root_render_func(context)), found
    with environment.activate_tracker(pieces, found):  # which reads in `pieces` how much stands there already
        for piece in template.root_render_func(context):
            pieces.append(piece)
    return "".join(pieces), found


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches one of the texts, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many leading characters two texts share, or items two lists."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def boundaries(header: str, added: re.Pattern[str]) -> list[int]:
    """Where a generation prompt can begin or end: beside its added tokens, behind its lines, before its tags."""
    found = {0, len(header)}
    for match in added.finditer(header):
        found |= {match.start(), match.end()}
    found |= {match.end() for match in re.finditer(r"\n", header)} | {
        match.start() for match in re.finditer("<", header)
    }
    return sorted(found)


def _with_thinking(message: Message) -> Message:
    """The message with its reasoning under the name that gpt-oss reads as well, as transformers gives it."""
    if "reasoning_content" not in message:
        return message
    return {"thinking": message["reasoning_content"], **message}


def _own_template(processing_class: Any, tokenizer: Any, tools: bool) -> str:
    template = processing_class.chat_template or tokenizer.chat_template
    if isinstance(template, dict):
        template = (template.get("tool_use") if tools else None) or template.get("default")
    if not template:
        raise DataError(
            f"{_name(tokenizer)} has no chat template, so rows with messages cannot be rendered: take the tokenizer of "
            "the instruction-tuned model, set tokenizer.chat_template, or give prompt/completion or text columns"
        )
    return str(template)


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {show(str(tokenizer.name_or_path or type(tokenizer).__name__))}"
