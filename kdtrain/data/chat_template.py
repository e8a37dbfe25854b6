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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdtrain.data.errors import RowError, show
from kdtrain.data.messages import (
    PROBE_WORDS,
    THINK,
    THINK_END,
    probe,
    reasoning_moved,
    reasoning_of,
    rewritten,
    with_messages,
    written,
)
from kdtrain.data.probed_template import RESERVED_KWARGS, ProbedTemplate, any_of, boundaries, common
from kdtrain.data.rendered import Rendered, Turn
from kdtrain.data.row_notes import (
    FIRST_LEFT,
    MARKED_OUT,
    OTHER_HISTORY,
    OTHER_PROMPT,
    SPACE_KEPT,
    SPLIT,
    STOP_ADDED,
    THOUGHT,
)
from kdtrain.data.rows import Chat
from kdtrain.data.unrendered import UnrenderedFinder

TURNS = ("auto", "split", "joint")
REASONING = ("error", "keep", "drop")
CONTROL_TOKENS = ("error", "text")


@dataclass(frozen=True)
class TemplateOptions:
    """How conversations are rendered, see `data` in the config: its fields have these names."""

    train_on: str = "assistant"
    turns: str = "auto"
    reasoning: str = "error"
    control_tokens: str = "error"
    chat_template_kwargs: Mapping[str, Any] | None = None
    teacher_chat_template_kwargs: Mapping[str, Any] | None = None
    """`rlhf.teacher.chat_template_kwargs`: what the teacher's rendering has instead; see `teacher_view.py`."""
    teacher_prefix: Sequence[dict[str, Any]] | None = None
    """`rlhf.teacher.prefix`: messages that the teacher alone reads; see `prefix.py`."""
    teacher_prefix_column: str | None = None
    """The column with a row's own, which win over `teacher_prefix`; it is not read as anything else."""
    teacher_prefix_mode: str = "prepend"


class ChatTemplate:
    """Renders conversations with the template of one tokenizer, or with `chat_template` in its place.

    Attributes:
        stop_ids: tokens that end an assistant's turn: what the template puts behind the answer, and the EOS.
    """

    def __init__(
        self,
        processing_class: Any,
        chat_template: str | None = None,
        tools: bool = False,
        options: TemplateOptions | None = None,
    ) -> None:
        self._options = options or TemplateOptions()
        kwargs = self._options.chat_template_kwargs
        self._template = ProbedTemplate(processing_class, chat_template, tools, kwargs)
        self._template.check_kwargs(self._options.teacher_chat_template_kwargs, "rlhf.teacher.chat_template_kwargs")
        self._unrendered = UnrenderedFinder(self._template, self._options.train_on)
        ends = self._template.ends.all
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.stop_ids = frozenset(tokenizer.convert_tokens_to_ids(list(ends)))
        self._stops_pattern = re.compile(rf"\s*(?:{any_of(ends).pattern})")

    # ---- one conversation --------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        return self._template.text

    @property
    def takes_system(self) -> bool:
        """Whether a conversation can have a system message."""
        return self._template.takes_system

    def render(self, chat: Chat, *, split: bool = False) -> list[Rendered]:
        """One text, or one for each trained turn where they cannot share it, or with `split`.

        Raises:
            RowError: the template cannot render the conversation as the model meets it, or leaves out a part of it.
        """
        if reserved := RESERVED_KWARGS & chat.template_kwargs.keys():
            raise RowError(f"chat_template_kwargs has {sorted(reserved)[0]}, which is not for a row to say")
        chat = self._without_control_tokens(chat)
        notes, chat, reasoning = self._check_rendered(chat)
        call = _Call(chat, reasoning)
        if chat.prompt_only:
            rendered = [Rendered(self._prompt(call, len(chat.messages)), messages=len(chat.messages))]
        else:
            rendered = self._answered(call, split)
        if notes:
            rendered = [replace(one, notes=(*notes, *one.notes)) for one in rendered]
        if self._options.control_tokens == "text":
            rendered = [one.without_marks() for one in rendered]
        return rendered

    def asked(self, chat: Chat, rendered: Rendered) -> Rendered:
        """What the last answer of a rendered conversation is to follow, as the model is given it at inference.

        The rendering with the answer may have less of it, see `OTHER_PROMPT`.
        """
        count = rendered.turns[-1].messages - 1
        _, chat, reasoning = self._check_rendered(self._without_control_tokens(chat))
        notes = tuple(note for note in rendered.notes if note != OTHER_PROMPT)
        prompt = Rendered(self._prompt(_Call(chat, reasoning), count), messages=count, notes=notes)
        return prompt.without_marks() if self._options.control_tokens == "text" else prompt

    def _answered(self, call: _Call, split: bool) -> list[Rendered]:
        wanted = call.chat.trained
        if not wanted:
            raise RowError("no turn is trained on: the loss is switched off in all of them")
        if self._options.train_on != "assistant":
            wanted = wanted[-1:]
        alone = self._each_alone(call, wanted)
        if self._options.train_on == "all":
            return [self._all(call, alone[-1])]
        if len(alone) == 1:
            return alone
        split = split or self._options.turns == "split"
        if not split and (joint := self._joint(alone)) is not None:
            return [joint]
        if self._options.turns == "joint":
            raise RowError(f"{SPLIT}, and data.turns is joint: set it to auto, or data.train_on to last")
        note = () if split else (SPLIT,)
        return [replace(one, notes=(*note, *one.notes)) for one in alone]

    def _each_alone(self, call: _Call, wanted: Sequence[int]) -> list[Rendered]:
        """Each answer, but for a first one that the template cannot render without a user's message."""
        messages, alone = call.chat.messages, []
        notes: tuple[str, ...] = ()
        for i in wanted:
            try:
                alone.append(self._alone(call, i))
            except RowError:
                if i == wanted[-1] or any(message["role"] == "user" for message in messages[:i]):
                    raise
                notes = (FIRST_LEFT,)
        return [replace(one, notes=(*notes, *one.notes)) for one in alone] if notes else alone

    def _all(self, call: _Call, last: Rendered) -> Rendered:
        """Every token is supervised, those behind the last answer as well, but for turns that are switched off."""
        count = len(call.chat.messages)
        if weighed := list(call.chat.message_weights):
            raise RowError(
                f"messages[{weighed[0]}] has kd_weight, and data.train_on: all trains on more than answers: give the "
                "row the weight, or set data.train_on to assistant or last"
            )
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
        text, blocks = self._jinja(call, i + 1, spans=self._template.marked)
        notes: tuple[str, ...] = ()
        if i in call.reasoning:
            text, start, blocks = self._with_reasoning(call, i, prompt, text)
        elif text.startswith(prompt):
            start = self._behind_header(text, len(prompt), anywhere=not i)
        else:
            text, start, note = self._diverging(call, i, prompt, text)
            blocks, notes = [], (note,)  # positions of markers no longer hold
        turn, stop = self._turn(text, start, blocks, i + 1, bool(call.chat.messages[i].get("tool_calls")))
        if stop is not None:
            notes = (*notes, STOP_ADDED)
        if not turn.spans:
            notes = (*notes, MARKED_OUT)
        if i in call.chat.message_weights:
            turn = replace(turn, kd_weight=call.chat.message_weights[i])
        return Rendered(text, (turn,), i + 1, stop=stop, notes=notes)

    def _with_reasoning(self, call: _Call, i: int, prompt: str, text: str) -> tuple[str, int, list[tuple[int, int]]]:
        """The answer with reasoning that the template does not render, in the block that its prompt opens."""
        start = len(prompt)
        if not text.startswith(prompt):
            text, start, _ = self._diverging(call, i, prompt, text)
        answer = text[start:].lstrip().removeprefix(THINK_END).lstrip()
        return f"{prompt}{call.reasoning[i]}\n{THINK_END}\n\n{answer}", len(prompt), []

    def _diverging(self, call: _Call, i: int, prompt: str, text: str) -> tuple[str, int, str]:
        """Where the answer starts in a text that does not begin with its prompt; the text, and what to say of it."""
        at = common(prompt, text)
        if not prompt[at:].strip():
            return prompt + text[at:], len(prompt), SPACE_KEPT
        before = self._render(call, i)
        if prompt.startswith(before) and text.startswith(before):
            # The generation prompt is longer than what the template writes in front of this answer. It can be left
            # only where one of its tokens begins or ends.
            header = prompt[len(before) :]
            reached = at - len(before)
            ends = [end for end in boundaries(header, self._template.added_pattern) if 0 < end <= reached]
            if ends:
                return text, len(before) + max(ends), OTHER_PROMPT
        start = self._answer_start(call, i, prompt, text)
        if start is not None:
            return prompt + text[start:], len(prompt), OTHER_HISTORY
        raise RowError(
            f"the chat template renders the messages before messages[{i}] differently once that answer follows: alone "
            f"…{_around(prompt, at)}…, with it …{_around(text, at)}…. What the student would be trained on is not what "
            "it is given at inference"
        )

    def _answer_start(self, call: _Call, i: int, prompt: str, text: str) -> int | None:
        """Where the answer `i` starts behind what is left of its prompt, seen from a rendering with other words in it.

        None where the two do not end alike: the answer would not go on from the prompt as the template has it.
        """
        words = with_messages(call.chat, [i], lambda message: probe(message, i))
        try:
            other = self._render(replace(call, chat=words), i + 1)
        except RowError:
            return None
        first = min((at for word in PROBE_WORDS if (at := other.find(word.format(i))) >= 0), default=-1)
        if first < 0 or not text.startswith(other[:first]):
            return None
        for header in self._template.headers:
            if prompt.endswith(header) and (at := other.rfind(header, 0, first)) >= 0:
                return at + len(header)
        ends = [match.end() for match in self._template.added_pattern.finditer(other, 0, first)]
        if not ends or other[ends[-1] : first].strip() or not prompt.endswith(other[: ends[-1]][-8:]):
            return None
        return ends[-1]

    def _behind_header(self, text: str, start: int, *, anywhere: bool) -> int:
        """Some templates write no generation prompt after some messages, but a header in front of the answer.

        The header is what the generation prompt is after a user's message. The model is given it at inference, and
        never has to write it. `anywhere`: there is no message before the answer, so all up to the header is given.
        """
        header = self._template.generation_prompt
        if header and text.endswith(header, 0, start):
            return start
        for header in self._template.headers:
            at = text.find(header, start)
            if at >= 0 and (anywhere or not self._template.added_pattern.sub("", text[start:at]).strip()):
                return at + len(header)
        return start

    def _turn(
        self, text: str, start: int, blocks: Sequence[tuple[int, int]], messages: int, calls: bool
    ) -> tuple[Turn, str | None]:
        """The turn that ends a text of so many messages, and the token that is missing at its end."""
        content_end = self._content_end(text, start)
        stop = self._stops_pattern.match(text, content_end)
        missing = None
        if stop is not None:
            end = stop.end()
        elif missing := self._template.ends.tool if calls else self._template.ends.user:
            content_end = end = len(text)
        else:  # a token that no probe shows ends the turn, or none
            end = len(text.rstrip())
            last = next((token for token in self._template.added if text.endswith(token, start, end)), "")
            content_end, end = (end - len(last), end) if last else (len(text), len(text))
        spans, extended = self._spans(text, start, content_end, end, blocks)
        return Turn(start, end, spans, content_end < end or missing is not None, extended, messages), missing

    def _content_end(self, text: str, start: int) -> int:
        """Where the run of white space and stop tokens begins that a text ends with."""
        end = len(text.rstrip())
        while end > start and (
            stop := next((s for s in self._template.ends.all if text.endswith(s, start, end)), None)
        ):
            end = start + len(text[start : end - len(stop)].rstrip())
        return max(end, start)

    def _spans(
        self, text: str, start: int, content_end: int, end: int, blocks: Sequence[tuple[int, int]]
    ) -> tuple[tuple[tuple[int, int], ...], bool]:
        """What is supervised of a turn: all of it, or what the template's own markers leave of it with its end."""
        if not self._template.marked or not blocks:
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
                spans = (*turn.spans[:-1], (turn.spans[-1][0], behind.end())) if turn.spans else ()
                turn = replace(turn, end=behind.end(), spans=spans)
            turns.append(turn)
        notes = tuple(dict.fromkeys(note for one in alone for note in one.notes if one is last or note != STOP_ADDED))
        return replace(last, turns=(*turns, *last.turns), notes=notes)

    def _prompt(self, call: _Call, count: int) -> str:
        return self._jinja(call, count, generation_prompt=True)[0]

    def _render(self, call: _Call, count: int) -> str:
        return self._jinja(call, count)[0]

    def _jinja(self, call: _Call, count: int, **options: bool) -> tuple[str, list[tuple[int, int]]]:
        """The first `count` messages."""
        chat = call.chat
        return self._template.render(chat.messages[:count], chat.tools, chat.template_kwargs, **options)

    # ---- what is not rendered ----------------------------------------------------------------------------------------

    def _without_control_tokens(self, chat: Chat) -> Chat:
        """Refuses control tokens in what people wrote, or marks them for `Rendered.cuts`."""
        find = self._template.control_tokens.find
        found: dict[int, str] = {}
        for i, message in enumerate(chat.messages):
            for text in written(message):
                for _, token in find(text):
                    found[i] = token
            if message.get("tool_calls"):
                self._refuse_control_tokens(message["tool_calls"], f"messages[{i}].tool_calls")
        if chat.tools:
            self._refuse_control_tokens(chat.tools, "tools")
        if not found:
            return chat
        if self._options.control_tokens == "error":
            first, token = next(iter(found.items()))
            raise RowError(
                f"messages[{first}] has the control token {show(token, 60)} in its text, which the model would take "
                "for one of the chat template. Remove it, or set data.control_tokens: text"
            )
        cut = self._template.control_tokens.mark
        messages = [rewritten(message, cut) if i in found else message for i, message in enumerate(chat.messages)]
        return replace(chat, messages=messages)

    def _refuse_control_tokens(self, value: Any, where: str) -> None:
        for _, token in self._template.control_tokens.find(json.dumps(value, ensure_ascii=False)):
            raise RowError(
                f"{where} has the control token {show(token, 60)}, which the model would take for one of the chat "
                "template. Remove it"
            )

    def _check_rendered(self, chat: Chat) -> tuple[tuple[str, ...], Chat, Mapping[int, str]]:
        """Refuses what the template leaves out of a conversation of this form; reasoning goes by the option.

        Returns what to say, the conversation to render, and reasoning that is to be written behind a prompt.
        """
        found = self._unrendered.find(chat)
        if not found.reasoning:
            return found.notes, chat, {}
        first = found.reasoning[0]
        if self._options.reasoning == "error":
            raise RowError(
                f"the chat template does not render the reasoning of messages[{first}]: set data.reasoning to keep "
                "(writes <think>…</think> in front of the answer) or drop"
            )
        without = with_messages(chat, found.reasoning, lambda message: reasoning_moved(message, keep=False))
        if self._options.reasoning == "drop":
            return found.notes, without, {}
        kept = with_messages(chat, found.reasoning, lambda message: reasoning_moved(message, keep=True))
        found_kept = self._unrendered.find(kept)
        if not found_kept.reasoning:
            return found_kept.notes, kept, {}
        if self._template.generation_prompt.rstrip().endswith(THINK):
            reasoning = {i: reasoning_of(chat.messages[i]) for i in found.reasoning}
            return (*found.notes, THOUGHT), without, reasoning
        raise RowError(
            f"the chat template cuts {THINK}…{THINK_END} out of messages[{first}], so that its reasoning cannot be "
            "kept: set data.reasoning: drop"
        )


@dataclass(frozen=True)
class _Call:
    """A conversation as it is rendered."""

    chat: Chat
    reasoning: Mapping[int, str] = field(default_factory=dict)  # by message, of answers whose template renders none


def _around(text: str, at: int) -> str:
    return show(text[max(0, at - 20) : at + 40])
