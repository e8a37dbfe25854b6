"""A chat template, and which characters of what it renders the model has to write itself.

Two ways, in this order:

1. **Markers.** The template has `{% generation %}` blocks, its own or those that trl adds to templates it recognises.
   One rendering gives text and spans.
2. **Prefixes.** The assistant turn `i` is what lies between the rendering of `messages[:i]` with a generation prompt
   and that of `messages[:i + 1]`. Both have to be prefixes of the full text: a template that renders a turn
   differently once another follows (dropped thinking, an end token on the last turn only) cannot be masked this way,
   and guessing would shift the mask silently.

Templates differ in where they put the end-of-turn token, so the tokens that end a turn are found by rendering a probe.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from kdtrain.data.errors import RowError, show
from kdtrain.data.rows import Chat
from kdtrain.errors import DataError

MARKER_HELP = (
    "Put {% generation %} and {% endgeneration %} around what the assistant writes, end-of-turn token included, in "
    "the tokenizer's chat template"
)
# What a template is probed with: words that no template says by itself.
_USER, _ANSWER, _NEXT = "kdprobeuser", "kdprobeanswer", "kdprobenext"
_QUESTION = [{"role": "user", "content": _USER}]

Message = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    `turns` are the half-open character spans of the supervised turns, in order. `prompt_end` is where the last
    assistant turn starts; None when all of the text is a prompt.
    """

    text: str
    turns: list[tuple[int, int]]
    prompt_end: int | None


class ChatTemplate:
    """Renders conversations for one tokenizer, with `chat_template` in place of its own where it is given.

    Attributes:
        text: the template that is rendered.
        marked: it has generation markers.
        stop_ids: tokens that end an assistant turn: what the template puts after the answer, and the EOS.
        added_ids: the tokenizer's added vocabulary.
        replaced: the tokenizer's own template, when trl's training version stands in for it; else None.
    """

    def __init__(self, processing_class: Any, chat_template: str | None = None, tools: bool = False) -> None:
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._specials = dict(self._tokenizer.special_tokens_map)
        own = chat_template or _own_template(processing_class, self._tokenizer, tools)
        training = None if has_generation_markers(own) else _training_version(processing_class, own)
        self.text = training or own
        self.replaced = own if training else None
        self.marked = has_generation_markers(self.text)
        self._as_parts = False
        self._as_parts = not self._renders_question() and self._renders_question(as_parts=True)
        self.added_ids = frozenset(self._tokenizer.get_added_vocab().values())
        self.stop_ids = self._find_stop_ids()
        self._headers = self._find_generation_prompts() if self.marked else []

    def render(self, chat: Chat, train_on: str) -> Rendered:
        """Renders once per conversation with markers, and twice per supervised turn without."""
        if chat.prompt_only:
            return Rendered(self._text(chat.messages, chat.tools, generation_prompt=True), [], None)
        wanted = chat.trained if train_on == "assistant" else chat.trained[-1:]
        if self.marked:
            text, spans = self._marked_spans(chat)
            turns = self._spans_from(chat, text, spans, wanted[0])
            last = self._spans_from(chat, text, spans, wanted[-1])
            return Rendered(text, turns, last[0][0] if last else len(text))
        text = self._text(chat.messages, chat.tools)
        turns = [self._prefix_span(chat, text, i) for i in wanted]
        return Rendered(text, turns, turns[-1][0])

    def own_text(self, chat: Chat) -> str:
        """What the tokenizer's own template makes of the conversation, to compare with trl's training version."""
        return self._text(chat.messages, chat.tools, generation_prompt=chat.prompt_only, template=self.replaced)

    def _spans_from(self, chat: Chat, text: str, spans: list[tuple[int, int]], first: int) -> list[tuple[int, int]]:
        """Those of `spans` in the assistant messages from `messages[first]` on."""
        assistants = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(spans) == len(assistants):
            return spans[assistants.index(first) :]
        if first == assistants[0]:
            return spans
        # Turns of several marked blocks (thinking, then the answer), or of none: which block belongs to which turn is
        # seen from how far the text reaches without the turns from `first` on.
        boundary = self._prefix_end(chat, text, chat.messages[:first])
        return [span for span in spans if span[0] >= boundary]

    def _prefix_span(self, chat: Chat, text: str, i: int) -> tuple[int, int]:
        start = self._prefix_end(chat, text, chat.messages[:i], generation_prompt=True)
        if i == len(chat.messages) - 1:
            return start, len(text)
        return start, self._prefix_end(chat, text, chat.messages[: i + 1])

    def _prefix_end(self, chat: Chat, text: str, messages: list[Message], generation_prompt: bool = False) -> int:
        """How far the rendering of the first messages alone reaches into the full text."""
        prefix = self._text(messages, chat.tools, generation_prompt=generation_prompt)
        if text.startswith(prefix):
            return len(prefix)
        at = next(i for i, c in enumerate(prefix) if text[i : i + 1] != c)
        raise DataError(
            f"the chat template of {_name(self._tokenizer)} renders the first {len(messages)} messages of a "
            f"conversation of {len(chat.messages)} differently than on their own, so the assistant's tokens cannot be "
            f"told from the rest: on their own …{show(prefix[max(0, at - 20) : at + 40])}…, in the whole "
            f"…{show(text[max(0, at - 20) : at + 40])}…. {MARKER_HELP}, or train on the last turn only (train_on: last)"
        )

    def _marked_spans(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        text, marked = self._jinja(chat.messages, chat.tools, spans=True)
        spans = [(self._after_header(text, start), end) for start, end in marked]
        return text, [(start, end) for start, end in spans if start < end]

    def _after_header(self, text: str, start: int) -> int:
        """Some markers (trl's for Qwen2.5, gpt-oss, DeepSeek) start before the end of the generation prompt.

        The student never writes the generation prompt itself, so it is neither trained on nor missing from the prompt.
        """
        for header in self._headers:
            at = text.find(header, max(0, start - len(header)), start + len(header))
            if at >= 0:
                return at + len(header)
        return start

    def _text(self, messages: list[Message], tools: list[Message] | None = None, **options: Any) -> str:
        return self._jinja(messages, tools, **options)[0]

    def _jinja(
        self,
        messages: list[Message],
        tools: list[Message] | None,
        *,
        generation_prompt: bool = False,
        spans: bool = False,
        template: str | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and with `spans` those of its generation markers."""
        if self._as_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
                for m in messages
            ]
        try:
            texts, indices = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template or self.text,
                return_assistant_tokens_mask=spans,
                add_generation_prompt=generation_prompt,
                **self._specials,
            )
        # Templates are programs: besides their own raise_exception they trip over missing keys and wrong types.
        except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            raise RowError(f"the chat template refuses the conversation: {show(str(error))}") from error
        return texts[0], indices[0] if spans else []

    def _renders_question(self, as_parts: bool = False) -> bool:
        """Templates of vision models that walk over content parts render nothing at all for a string."""
        self._as_parts = as_parts
        try:
            return _USER in self._text(_QUESTION)
        except RowError:
            return False

    def _find_generation_prompts(self) -> list[str]:
        """The generation prompt and its beginnings up to an added token, longest first.

        Thinking models open the thinking block in it (`<|Assistant|><think>`), which an answer without one does not
        have: then the shorter one matches.
        """
        try:
            without, full = self._text(_QUESTION), self._text(_QUESTION, generation_prompt=True)
        except RowError:
            return []
        header = full[len(without) :] if full.startswith(without) else ""
        tokens = self._tokenizer(header, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ends = {end for token, (_, end) in pairs if token in self.added_ids} | {len(header)}
        return [header[:end] for end in sorted(ends - {0}, reverse=True)]

    def _find_stop_ids(self) -> frozenset[int]:
        found = {self._tokenizer.eos_token_id} - {None}
        chat = [*_QUESTION, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
        try:
            tail = self._text(chat[:2]).partition(_ANSWER)[2]
            gap = self._text(chat).partition(_ANSWER)[2].partition(_NEXT)[0]
        except RowError:
            return frozenset(found)
        if at_end := self._leading_markers(tail):
            found.add(at_end[0])
        # Between two turns there has to be an end and a beginning; one marker alone is the beginning of the next turn.
        if len(between := self._leading_markers(gap)) > 1:
            found.add(between[0])
        return frozenset(found)

    def _leading_markers(self, text: str) -> list[int]:
        """Added-vocabulary ids in `text`, if it starts with one after white space."""
        ids = self._tokenizer(text.lstrip(), add_special_tokens=False)["input_ids"]
        return [i for i in ids if i in self.added_ids] if ids and ids[0] in self.added_ids else []


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


def _training_version(processing_class: Any, template: str) -> str | None:
    """trl's version of a template it knows, with generation markers; None for the others."""
    if template != processing_class.chat_template:
        processing_class = copy.copy(processing_class)
        processing_class.chat_template = template
    try:
        return get_training_chat_template(processing_class)
    except (ValueError, TypeError, TemplateError, ImportError):
        return None  # unknown to trl, or too unlike a chat template for its probes


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {show(str(tokenizer.name_or_path or type(tokenizer).__name__))}"
