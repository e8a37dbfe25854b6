"""A chat template, and which characters of what it renders the model has to write itself.

The text is always what the model's own template renders. For the assistant's message `i` it gives two of them:

    prompt    `messages[:i]` with a generation prompt: what the model is given at inference
    rendered  `messages[:i + 1]`: the same with the answer behind it

The answer is what the second has beyond the first, up to the token that ends the turn. Several turns share a row where
the longest rendering holds every one of them in just this form. Where it does not (thinking blocks that are dropped
from earlier turns, an end token of the last turn only), each turn is a row of its own.

Templates differ in how they begin and end a turn and in what they leave out; what is not known from the text is found
by rendering probes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers

from kdtrain.data.errors import RowError, show
from kdtrain.data.parts import count_images, texts_of
from kdtrain.data.rows import Chat
from kdtrain.errors import DataError

TURNS = ("auto", "split", "joint")
REASONING = ("error", "keep", "drop")
CONTROL_TOKENS = ("error", "text")
# What the caller of a template passes by itself.
RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "conversation"}
)

SPLIT = "the chat template renders earlier turns differently once others follow: each answer is a row of its own"
OPENS_THINKING = (
    "the generation prompt opens a thinking block that the answer does not have: the prompt ends before it, other than "
    "at inference. Give the answer reasoning_content, or set data.chat_template_kwargs (enable_thinking: false, where "
    "the template knows it)"
)
SPACE_KEPT = (
    "the template leaves out white space at the end of the generation prompt once the answer follows: it is kept, as "
    "at inference"
)
STOP_ADDED = "the template writes the token that ends a turn only with the next message: it is added to the last answer"
EARLIER_REASONING = "the template leaves the reasoning of earlier turns out, as at inference"
NAME_UNREAD = "messages have a name, which the chat template does not render"

# What a template is probed with: words that no template says by itself.
_USER, _ANSWER, _NEXT = "kdprobeuser", "kdprobeanswer", "kdprobenext"
_QUESTION = [{"role": "user", "content": _USER}]
_CALLED = "kdprobecalled"
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "kdprobe00", "type": "function", "function": {"name": _CALLED, "arguments": {"kdprobekey": 1}}}
    ],
}
# Stands inside a control token that is to be encoded as text: a character that Unicode keeps free for such uses.
_CUT = "\ufdd0"
_THINK_END = "</think>"

Message = dict[str, Any]


@dataclass(frozen=True)
class TemplateOptions:
    """How conversations are rendered, see `data` in the config: its fields have these names."""

    train_on: str = "assistant"
    turns: str = "auto"
    reasoning: str = "error"
    control_tokens: str = "error"
    chat_template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in a rendered text, in characters.

    `start` is where its prompt ends, `end` lies behind its stop token; `spans` are supervised, in order, half open.
    """

    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    terminated: bool = True  # it ends with a token that makes the model stop
    extended: bool = False  # that token stands outside of the template's own markers


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. Without `turns` all of it is a prompt."""

    text: str
    turns: tuple[Turn, ...] = ()
    messages: int = 0  # of the conversation that are in the text
    cuts: tuple[int, ...] = ()  # characters at which the text is tokenised apart
    stop: str | None = None  # the token that ends the last turn, where the text does not have it
    excluded: tuple[tuple[int, int], ...] = ()  # never supervised, not even where every token is
    notes: tuple[str, ...] = ()

    def moved(self, text: str, move: Callable[[int], int]) -> Rendered:
        """The same turns in another text; `move` says where a character of this one stands in it."""
        turns = tuple(
            replace(
                turn,
                start=move(turn.start),
                end=move(turn.end),
                spans=tuple((move(start), move(end)) for start, end in turn.spans),
            )
            for turn in self.turns
        )
        excluded = tuple((move(start), move(end)) for start, end in self.excluded)
        return replace(self, text=text, turns=turns, cuts=tuple(map(move, self.cuts)), excluded=excluded)


class ChatTemplate:
    """Renders conversations with the template of one tokenizer, or with `chat_template` in its place.

    Attributes:
        text: the template.
        stop_ids: tokens that end an assistant's turn: what the template puts behind the answer, and the EOS.
    """

    def __init__(
        self,
        processing_class: Any,
        chat_template: str | None = None,
        tools: bool = False,
        options: TemplateOptions | None = None,
    ) -> None:
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._options = options or TemplateOptions()
        self._specials = dict(self._tokenizer.special_tokens_map)
        self._kwargs = dict(self._options.chat_template_kwargs or {})
        self.text = chat_template or _own_template(processing_class, self._tokenizer, tools)
        self._check_kwargs()
        self._marked = has_generation_markers(self.text)
        self._as_parts = False
        self._as_parts = not self._renders_question() and self._renders_question(as_parts=True)
        self._added = {token: id_ for token, id_ in self._tokenizer.get_added_vocab().items() if token.strip()}
        self._added_pattern = _any_of(self._added)
        self._ends = self._find_ends()
        self.stop_ids = frozenset(self._tokenizer.convert_tokens_to_ids(list(self._ends.all)))
        self._stops_pattern = re.compile(rf"\s*(?:{_any_of(self._ends.all).pattern})")
        self._unrendered: dict[Any, _Unrendered] = {}

    # ---- one conversation --------------------------------------------------------------------------------------------

    def render(self, chat: Chat) -> list[Rendered]:
        """One text, or one for each trained turn where they cannot share it.

        Raises:
            RowError: the template cannot render the conversation as the model meets it, or leaves out a part of it.
        """
        chat = self._without_control_tokens(chat)
        notes, chat = self._check_rendered(chat)
        call = _Call(chat, {**self._kwargs, **chat.template_kwargs})
        if chat.prompt_only:
            rendered = [Rendered(self._prompt(call, len(chat.messages)), messages=len(chat.messages))]
        else:
            rendered = self._answered(call)
        rendered = [replace(one, notes=(*notes, *one.notes)) for one in rendered]
        if self._options.control_tokens == "text":
            rendered = [_without_cut_marks(one) for one in rendered]
        return rendered

    def _answered(self, call: _Call) -> list[Rendered]:
        wanted = call.chat.trained
        if not wanted:
            raise RowError("no turn is trained on: the loss is switched off in all of them")
        if self._options.train_on != "assistant":
            wanted = wanted[-1:]
        alone = [self._alone(call, i) for i in wanted]
        if self._options.train_on == "all":
            return [self._all(call, alone[-1])]
        if len(alone) == 1:
            return alone
        if self._options.turns != "split" and (joint := self._joint(alone)) is not None:
            return [joint]
        if self._options.turns == "joint":
            raise RowError(f"{SPLIT}, and data.turns is joint: set it to auto, or data.train_on to last")
        note = () if self._options.turns == "split" else (SPLIT,)
        return [replace(one, notes=(*note, *one.notes)) for one in alone]

    def _all(self, call: _Call, last: Rendered) -> Rendered:
        """Every token is supervised, those behind the last answer as well, but for turns that are switched off."""
        count = len(call.chat.messages)
        full = (
            last if last.messages == count else replace(last, text=self._render(call, count), messages=count, stop=None)
        )
        off = [self._alone(call, i) for i in sorted(call.chat.untrained)]
        for one in (last, *off):
            if not full.text.startswith(one.text[: one.turns[0].end]):
                raise RowError(f"{SPLIT}, which data.train_on: all cannot: set it to assistant or last")
        return replace(full, excluded=tuple((one.turns[0].start, one.turns[0].end) for one in off))

    def _alone(self, call: _Call, i: int) -> Rendered:
        """The conversation up to the answer `i`, which is its only turn."""
        prompt = self._prompt(call, i) if i else ""
        text, blocks = self._jinja(call, i + 1, spans=self._marked)
        notes: tuple[str, ...] = ()
        if text.startswith(prompt):
            start = self._behind_header(text, len(prompt), anywhere=not i)
        else:
            text, start, note = self._diverging(call, i, prompt, text)
            blocks, notes = [], (note,)  # positions of markers no longer hold
        turn, stop = self._turn(text, start, blocks, bool(call.chat.messages[i].get("tool_calls")))
        if stop is not None:
            notes = (*notes, STOP_ADDED)
        return Rendered(text, (turn,), i + 1, stop=stop, notes=notes)

    def _diverging(self, call: _Call, i: int, prompt: str, text: str) -> tuple[str, int, str]:
        """Where the answer starts in a text that does not begin with its prompt; the text, and what to say of it."""
        at = _common(prompt, text)
        if not prompt[at:].strip():
            return prompt + text[at:], len(prompt), SPACE_KEPT
        before = self._render(call, i)
        if prompt.startswith(before) and text.startswith(before):
            # The generation prompt is longer than what the template writes in front of this answer. It can be left
            # only where one of its tokens begins or ends.
            header = prompt[len(before) :]
            reached = at - len(before)
            ends = [end for end in _boundaries(header, self._added_pattern) if 0 < end <= reached]
            if ends:
                return text, len(before) + max(ends), OPENS_THINKING
        raise RowError(
            f"the chat template renders the messages before messages[{i}] differently once that answer follows: alone "
            f"…{_around(prompt, at)}…, with it …{_around(text, at)}…. What the student would be trained on is not what "
            "it is given at inference"
        )

    def _behind_header(self, text: str, start: int, *, anywhere: bool) -> int:
        """Some templates write no generation prompt after some messages, but a header in front of the answer.

        The header is what the generation prompt is after a user's message. The model is given it at inference, and
        never has to write it. `anywhere`: there is no message before the answer, so all up to the header is given.
        """
        for header in self._headers:
            at = text.find(header, start)
            if at >= 0 and (anywhere or not self._added_pattern.sub("", text[start:at]).strip()):
                return at + len(header)
        return start

    def _turn(self, text: str, start: int, blocks: Sequence[tuple[int, int]], calls: bool) -> tuple[Turn, str | None]:
        """The turn that ends a text, and the token that is missing at its end."""
        content_end = self._content_end(text, start)
        stop = self._stops_pattern.match(text, content_end)
        missing = None
        if stop is not None:
            end = stop.end()
        elif missing := self._ends.tool if calls else self._ends.user:
            content_end = end = len(text)
        else:  # a token that no probe shows ends the turn, or none
            end = len(text.rstrip())
            last = next((token for token in self._added if text.endswith(token, start, end)), "")
            content_end, end = (end - len(last), end) if last else (len(text), len(text))
        spans, extended = self._spans(text, start, content_end, end, blocks)
        return Turn(start, end, spans, content_end < end or missing is not None, extended), missing

    def _content_end(self, text: str, start: int) -> int:
        """Where the run of white space and stop tokens begins that a text ends with."""
        end = len(text.rstrip())
        while end > start and (stop := next((s for s in self._ends.all if text.endswith(s, start, end)), None)):
            end = start + len(text[start : end - len(stop)].rstrip())
        return max(end, start)

    def _spans(
        self, text: str, start: int, content_end: int, end: int, blocks: Sequence[tuple[int, int]]
    ) -> tuple[tuple[tuple[int, int], ...], bool]:
        """What is supervised of a turn: all of it, or what the template's own markers leave of it with its end."""
        if not self._marked or not blocks:
            return ((start, end),), False
        inside = [(max(start, a), min(end, b)) for a, b in blocks if min(end, b) > max(start, a)]
        if not inside:
            return (), False
        if not text[start : inside[0][0]].strip():
            inside[0] = (start, inside[0][1])
        extended = inside[-1][1] < end and not text[inside[-1][1] : content_end].strip()
        if extended:
            inside[-1] = (inside[-1][0], end)
        return tuple(inside), extended

    def _joint(self, alone: list[Rendered]) -> Rendered | None:
        """All turns in the last text; None where an earlier one has another form in it."""
        last, turns = alone[-1], []
        for one in alone[:-1]:
            (turn,) = one.turns
            if not last.text.startswith(one.text[: turn.end]):
                return None
            if one.stop is not None:  # the next message writes it
                behind = self._stops_pattern.match(last.text, turn.end)
                if behind is None:
                    return None
                spans = (*turn.spans[:-1], (turn.spans[-1][0], behind.end()))
                turn = replace(turn, end=behind.end(), spans=spans)
            turns.append(turn)
        notes = tuple(dict.fromkeys(note for one in alone for note in one.notes if one is last or note != STOP_ADDED))
        return replace(last, turns=(*turns, *last.turns), notes=notes)

    # ---- what is not rendered ----------------------------------------------------------------------------------------

    def _without_control_tokens(self, chat: Chat) -> Chat:
        """Refuses control tokens in what people wrote, or marks them for `Rendered.cuts`."""
        found: dict[int, str] = {}
        for i, message in enumerate(chat.messages):
            for text in _written(message):
                found.update((i, token) for _, token in self._control_tokens.find(text))
        if not found:
            return chat
        if self._options.control_tokens == "error":
            first, token = next(iter(found.items()))
            raise RowError(
                f"messages[{first}] has the control token {show(token, 60)} in its text, which the model would take "
                "for one of the chat template. Remove it, or set data.control_tokens: text"
            )
        cut = self._control_tokens.cut
        messages = [_rewritten(message, cut) if i in found else message for i, message in enumerate(chat.messages)]
        return replace(chat, messages=messages)

    def _check_rendered(self, chat: Chat) -> tuple[tuple[str, ...], Chat]:
        """Refuses what the template leaves out of a conversation of this form; reasoning goes by the option."""
        form = _form(chat)
        if form not in self._unrendered:
            self._unrendered[form] = self._find_unrendered(chat)
        found = self._unrendered[form]
        if found.problem:
            raise RowError(found.problem)
        notes = found.notes
        if not found.reasoning:
            return notes, chat
        first = found.reasoning[0]
        if self._options.reasoning == "error":
            raise RowError(
                f"the chat template does not render the reasoning of messages[{first}]: set data.reasoning to keep "
                "(writes <think>…</think> in front of the answer) or drop"
            )
        keep = self._options.reasoning == "keep"
        if keep and (unkept := [i for i in found.reasoning if _THINK_END in _text(chat.messages[i])]):
            raise RowError(
                f"the chat template cuts <think>…</think> out of messages[{unkept[0]}], so that its reasoning cannot "
                "be kept: set data.reasoning: drop"
            )
        messages = [
            _reasoning_moved(message, keep) if i in found.reasoning else message
            for i, message in enumerate(chat.messages)
        ]
        moved = replace(chat, messages=messages)
        if keep:
            more, moved = self._check_rendered(moved)
            notes = tuple(dict.fromkeys((*notes, *more)))
        return notes, moved

    def _find_unrendered(self, chat: Chat) -> _Unrendered:
        """Renders the conversation with another word in every place, and looks which are missing.

        A function of the conversation's form, `_form`: it is done once for each.
        """
        probe = replace(chat, messages=[_probe(message, i) for i, message in enumerate(chat.messages)])
        if chat.tools:
            probe = replace(probe, tools=[_named_tool(tool, f"kdprobetool{i}x") for i, tool in enumerate(chat.tools)])
        call = _Call(probe, {**self._kwargs, **chat.template_kwargs})
        last = len(chat.messages) - 1
        ends = [last] if chat.prompt_only else chat.trained or [last]
        reasoning, notes = [], []
        for end in ends if self._options.train_on == "assistant" else ends[-1:]:
            try:
                text = self._prompt(call, end + 1) if chat.prompt_only else self._render(call, end + 1)
            except RowError:
                return _Unrendered()  # the row itself says why
            for i, message in enumerate(chat.messages[: end + 1]):
                where, role = f"messages[{i}]", message["role"]
                if f"kdprobecontent{i}x" not in text and _has_text(message):
                    return _Unrendered(f"the chat template leaves out {where}, which has the role {role}")
                for j, _ in enumerate(message.get("tool_calls") or ()):
                    if f"kdprobecall{i}x{j}x" not in text:
                        return _Unrendered(f"the chat template leaves out {where}.tool_calls[{j}]")
                if _has_reasoning(message) and f"kdprobereasoning{i}x" not in text:
                    if i == end:
                        reasoning.append(i)
                    else:
                        notes.append(EARLIER_REASONING)
                if message.get("name") and role != "tool" and f"kdprobename{i}x" not in text:
                    notes.append(NAME_UNREAD)
            for j, _ in enumerate(chat.tools or ()):
                if f"kdprobetool{j}x" not in text:
                    return _Unrendered(f"the chat template leaves out tools[{j}]: it is not made for tools")
        return _Unrendered("", tuple(reasoning), tuple(dict.fromkeys(notes)))

    # ---- rendering ---------------------------------------------------------------------------------------------------

    def _prompt(self, call: _Call, count: int) -> str:
        return self._jinja(call, count, generation_prompt=True)[0]

    def _render(self, call: _Call, count: int) -> str:
        return self._jinja(call, count)[0]

    def _jinja(
        self, call: _Call, count: int, *, generation_prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The first `count` messages as text, and with `spans` those of its generation markers."""
        messages = self._as_it_wants(call.chat.messages[:count], self._arguments_as_text)
        return self._run(messages, call.chat.tools, generation_prompt, spans, call.kwargs)

    def _as_it_wants(self, messages: list[Message], arguments_as_text: bool) -> list[Message]:
        if arguments_as_text and any("tool_calls" in message for message in messages):
            messages = [_with_text_arguments(message) for message in messages]
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
        try:
            texts, indices = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=spans,
                add_generation_prompt=generation_prompt,
                **{**self._specials, **kwargs},
            )
        # Templates are programs: besides their own raise_exception they trip over missing keys and wrong types.
        except (TemplateError, TypeError, KeyError, IndexError, ValueError, AttributeError, RecursionError) as error:
            raise RowError(f"the chat template refuses the conversation: {show(str(error))}") from error
        return texts[0], indices[0] if spans else []

    # ---- probes ------------------------------------------------------------------------------------------------------

    def _probe_text(self, messages: list[Message], generation_prompt: bool = False) -> str:
        call = _Call(Chat(messages), self._kwargs)
        return self._jinja(call, len(messages), generation_prompt=generation_prompt)[0]

    def _renders_question(self, as_parts: bool = False) -> bool:
        """Templates of vision models that walk over content parts render nothing at all for a string."""
        self._as_parts = as_parts
        try:
            return _USER in self._probe_text(_QUESTION)
        except RowError:
            return False

    @cached_property
    def _generation_prompt(self) -> str:
        """What is added after a user's message for the model to answer."""
        try:
            without, full = self._probe_text(_QUESTION), self._probe_text(_QUESTION, generation_prompt=True)
        except RowError:
            return ""
        # It may stand in place of what the template ends a text with (the EOS of Phi-3).
        return full[max(edge for edge in _boundaries(full, self._added_pattern) if edge <= _common(without, full)) :]

    @cached_property
    def _headers(self) -> list[str]:
        """The generation prompt and its beginnings, the longest first: thinking models open the thinking block in it."""
        header = self._generation_prompt
        return [header[:end] for end in reversed(_boundaries(header, self._added_pattern)) if header[:end].strip()]

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether the template wants the arguments of tool calls as JSON text: it fails on an object, or prints it."""
        if "tool_calls" not in self.text:
            return False
        try:
            text = self._run(self._as_it_wants([*_QUESTION, _CALL], False), None, False, False, self._kwargs)[0]
        except RowError:
            return True
        return "'kdprobekey'" in text and '"kdprobekey"' not in text

    def _find_ends(self) -> _Ends:
        """Which tokens end a turn: what stands behind the answers of probes, and the EOS."""
        eos = [self._tokenizer.eos_token] if self._tokenizer.eos_token else []
        answered = [*_QUESTION, {"role": "assistant", "content": _ANSWER}]
        try:
            tail = self._leading_added(self._probe_text(answered).partition(_ANSWER)[2])
            followed = self._probe_text([*answered, {"role": "user", "content": _NEXT}])
            gap = self._leading_added(followed.partition(_ANSWER)[2].partition(_NEXT)[0])
        except RowError:
            return _Ends(tuple(eos))
        if tail:
            # Between two turns there has to be an end and a beginning: one token alone is the beginning.
            found = [*eos, tail[0], *gap[: len(gap) > 1], *self._end_of_call()]
            return _Ends(tuple(dict.fromkeys(found)))
        # The next message ends the turn: with a token of its own, or with the one of its role (GLM).
        user = gap[0] if gap else None
        tool = next(iter(self._beginning_of_tool()), user) if user else None
        return _Ends(tuple(dict.fromkeys(filter(None, [*eos, user, tool]))), user, tool)

    def _end_of_call(self) -> list[str]:
        """The token that ends a turn with a tool call."""
        try:
            text = self._probe_text([*_QUESTION, _CALL]).rstrip()
        except RowError:
            return []
        return [token for token in self._added if text.endswith(token)][:1] if _CALLED in text else []

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
        tokens = [match[0] for match in self._added_pattern.finditer(text)]
        return tokens if tokens and text.lstrip().startswith(tokens[0]) else []

    @cached_property
    def _control_tokens(self) -> _ControlTokens:
        """Tokens that are no text: special ones, and those that begin and end a turn in this template.

        Thinking tags are neither: answers have them, and system prompts speak of them.
        """
        special = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        header = {match[0] for match in self._added_pattern.finditer(self._generation_prompt)}
        found = special | header | set(self._ends.all)
        return _ControlTokens({token for token in found if token.strip() and "think" not in token})

    def _check_kwargs(self) -> None:
        for name in self._kwargs:
            if name in RESERVED_KWARGS or name not in self.text:
                raise DataError(
                    f"data.chat_template_kwargs has {show(name, 60)}, which the chat template of "
                    f"{_name(self._tokenizer)} does not read"
                )


@dataclass(frozen=True)
class _Call:
    """A conversation and the arguments that its template is called with."""

    chat: Chat
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class _Ends:
    """Tokens that end an assistant's turn, as text."""

    all: tuple[str, ...]
    user: str | None = None  # the one that only the next message writes, a user's
    tool: str | None = None  # or a tool's


class _ControlTokens:
    """Finds tokens in text. There may be thousands, more than a regular expression tries at every `<` in time."""

    def __init__(self, tokens: set[str]) -> None:
        self._tokens = tokens
        self._first = re.compile(
            "[" + "".join(sorted(re.escape(token[0]) for token in tokens)) + "]" if tokens else r"(?!)"
        )
        self._lengths = sorted({len(token) for token in tokens}, reverse=True)

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Where each of them begins, and the token."""
        for match in self._first.finditer(text):
            at = match.start()
            for length in self._lengths:
                if text[at : at + length] in self._tokens:
                    yield at, text[at : at + length]
                    break

    def cut(self, text: str) -> str:
        """The text with a mark inside each of them."""
        for at, _ in reversed(list(self.find(text))):
            text = text[: at + 1] + _CUT + text[at + 1 :]
        return text


@dataclass(frozen=True)
class _Unrendered:
    """What a template leaves out of conversations of one form."""

    problem: str = ""
    reasoning: tuple[int, ...] = ()  # messages whose reasoning is left out
    notes: tuple[str, ...] = ()


# ---- messages --------------------------------------------------------------------------------------------------------


def _form(chat: Chat) -> Any:
    """All that decides what a template leaves out, beside the words."""
    messages = tuple(
        (
            message["role"],
            _has_text(message),
            _THINK_END in _text(message),
            "reasoning_content" in message,
            bool(message.get("name")),
            len(message.get("tool_calls") or ()),
            isinstance(message["content"], str),
        )
        for message in chat.messages
    )
    kwargs = json.dumps(chat.template_kwargs, sort_keys=True, default=str) if chat.template_kwargs else ""
    return messages, len(chat.tools or ()), kwargs, tuple(chat.trained)


def _text(message: Message) -> str:
    return "".join(texts_of(message["content"]))


def _written(message: Message) -> list[str]:
    """The texts of a message that people or models wrote."""
    return [*texts_of(message["content"]), str(message.get("reasoning_content") or "")]


def _has_text(message: Message) -> bool:
    return bool(_text(message).rpartition(_THINK_END)[2].strip())


def _has_reasoning(message: Message) -> bool:
    return bool(message.get("reasoning_content")) or _THINK_END in _text(message)


def _probe(message: Message, i: int) -> Message:
    """The message with words of its own in every place."""
    text = f"kdprobe kdprobecontent{i}x kdprobe" if _has_text(message) else ""
    if _THINK_END in _text(message):
        text = f"<think>\nkdprobereasoning{i}x\n</think>\n\n{text}"
    content: Any = text
    if not isinstance(message["content"], str):
        images = [part for part in message["content"] if part["type"] == "image"]
        content = [*images, *([{"type": "text", "text": text}] if text else [])]
    probe = {**message, "content": content}
    if message.get("reasoning_content"):
        probe["reasoning_content"] = f"kdprobereasoning{i}x"
    if message.get("name") and message["role"] != "tool":
        probe["name"] = f"kdprobename{i}x"
    if message.get("tool_calls"):
        probe["tool_calls"] = [
            _named_tool(call, f"kdprobecall{i}x{j}x") for j, call in enumerate(message["tool_calls"])
        ]
    return probe


def _named_tool(tool: Message, name: str) -> Message:
    """A tool's schema, or a call of one, under another name."""
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), Mapping):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": text}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _reasoning_moved(message: Message, keep: bool) -> Message:
    """The message with its reasoning at the beginning of its content, or without it."""
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    reasoning, content = message.get("reasoning_content"), message["content"]
    if not keep and isinstance(content, str):
        content = content.rpartition(_THINK_END)[2].lstrip("\n")
    if keep and reasoning and isinstance(content, str):
        content = f"<think>\n{reasoning}\n{_THINK_END}\n\n{content}"
    return {**rest, "content": content}


def _rewritten(message: Message, change: Callable[[str], str]) -> Message:
    """The message with another text in every place."""
    content = message["content"]
    if isinstance(content, str):
        content = change(content)
    else:
        content = [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in content]
    changed = {**message, "content": content}
    if message.get("reasoning_content"):
        changed["reasoning_content"] = change(message["reasoning_content"])
    return changed


def _without_cut_marks(rendered: Rendered) -> Rendered:
    marks = [i for i, character in enumerate(rendered.text) if character == _CUT]
    if not marks:
        return rendered

    def move(char: int) -> int:
        return char - sum(mark < char for mark in marks)

    cuts = replace(rendered, cuts=(*rendered.cuts, *marks))
    return cuts.moved(rendered.text.replace(_CUT, ""), move)


# ---- texts -----------------------------------------------------------------------------------------------------------


def _any_of(texts: Any) -> re.Pattern[str]:
    """Matches one of the texts, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _common(one: str, other: str) -> int:
    """How many leading characters two texts share."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _boundaries(header: str, added: re.Pattern[str]) -> list[int]:
    """Where a generation prompt can begin or end: beside its added tokens, behind its lines, before its tags."""
    found = {0, len(header)}
    for match in added.finditer(header):
        found |= {match.start(), match.end()}
    found |= {match.end() for match in re.finditer(r"\n", header)} | {
        match.start() for match in re.finditer("<", header)
    }
    return sorted(found)


def _around(text: str, at: int) -> str:
    return show(text[max(0, at - 20) : at + 40])


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


def images_in(chat: Chat, rendered: Rendered) -> int:
    """How many of the conversation's images are in the text."""
    return count_images(chat.messages[: rendered.messages])
