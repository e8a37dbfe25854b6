"""What a row should become, from the template's own renderings alone, and whether it did.

The prompt of turn i is `apply_chat_template(messages[:i], add_generation_prompt=True)`, the answer what
`apply_chat_template(messages[:i + 1])` writes behind it, up to the end of the turn. kdtrain's way to the same is not
looked at: only rows go in, and rows of a data set come out.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise, product
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from tests.templates.families import Template
from tests.templates.rows import Row

Messages = list[dict[str, Any]]
_SWITCHES = ("weight",)
IGNORED = -100


class Refusal(Exception):
    """Why a row cannot be trained on: `kind` for people, `detail` for the reader of a table."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


# What a true reason speaks of; {detail} is the refusal's.
TRUE_REASONS = {
    "raises": "{detail}|renders",
    "tools": "tools",
    "tool_calls": "tool_calls|tools",
    "reasoning": "reasoning",
    "role": "messages.*role",
    "control token": "control token {detail}",
    "rewrites": "renders .* differently",
    "nothing trained": "loss|weight|train|supervis",
}


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    labels: list[int]
    prompt_length: int


@dataclass(frozen=True)
class Way:
    """Encoded rows that are right; `noted`: if a note says that prompt and answer differ from the rendering."""

    rows: list[Encoded]
    noted: bool = False


@dataclass(frozen=True)
class Turn:
    """One assistant turn: `text` up to its end, of which `prompt` characters are the prompt. `after` is what follows.

    `noted`: prompt and answer together are not what the model is given at inference, or not what the template renders.
    """

    text: str
    prompt: int
    after: str
    noted: bool


# Where the model's own generation prompt goes on differently than the answer (it opens a thinking block), the prompt
# may be what both share, in tokens or in characters, or the model's own if only white space comes in between.
STYLES = ("tokens", "characters", "own")


@dataclass
class Oracle:
    template: Template
    _memory: dict[str, str | Refusal] = field(default_factory=dict)

    def expected(self, row: Row, train_on: str, style: str) -> list[Way]:
        """Each way is right. Raises Refusal where the row cannot be trained on."""
        messages, first = _messages(row)
        self._refuse_control_tokens(messages)
        refusals = []
        for form in self._forms(messages, row):
            try:
                return form.expected(first, train_on, style)
            except Refusal as refusal:
                refusals.append(refusal)
        # A form that raises says less than one that renders too little.
        raise min(refusals, key=lambda refusal: refusal.kind == "raises")

    @cached_property
    def _special(self) -> set[str]:
        """Thinking tags are what people write into content, special or not."""
        tokens = self.template.tokenizer.added_tokens_decoder.values()
        return {str(token) for token in tokens if token.special} - {"<think>", "</think>"}

    def _refuse_control_tokens(self, messages: Messages) -> None:
        for message in messages:
            for text in (message.get("content"), message.get("reasoning_content")):
                if found := [token for token in self._special if token in (text or "")]:
                    raise Refusal("control token", found[0])

    def _forms(self, messages: Messages, row: Row) -> Iterator[Conversation]:
        """The same messages as templates of different makers want them; the first that renders everything counts."""
        calls = any(message.get("tool_calls") for message in messages)
        for as_text, none in product((False, True), repeat=2) if calls else [(False, False)]:
            shaped = [self._shaped(message, as_text, none) for message in messages]
            yield Conversation(self, shaped, messages, row.get("tools"), row.get("chat_template_kwargs", {}))

    def _shaped(self, message: dict[str, Any], arguments_as_text: bool, empty_as_none: bool) -> dict[str, Any]:
        shaped = copy.deepcopy(message)
        if "reasoning_content" in shaped:
            shaped[self.template.family.reasoning] = shaped.pop("reasoning_content")
        for call in shaped.get("tool_calls", []) if arguments_as_text else []:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if shaped.get("tool_calls") and not shaped["content"] and empty_as_none:
            shaped["content"] = None
        elif self.template.family.parts:
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        return shaped

    def render(self, messages: Messages, generation_prompt: bool, tools: Any, arguments: dict[str, Any]) -> str:
        key = json.dumps([messages, generation_prompt, tools, arguments])
        if key not in self._memory:
            try:
                self._memory[key] = self._rendered(copy.deepcopy(messages), generation_prompt, tools, arguments)
            except Exception as error:  # a template may fail in any way
                self._memory[key] = Refusal("raises", str(error))
        found = self._memory[key]
        if isinstance(found, Refusal):
            raise Refusal(found.kind, found.detail)
        return found

    def _rendered(self, messages: Messages, generation_prompt: bool, tools: Any, arguments: dict[str, Any]) -> str:
        tokenizer = self.template.tokenizer
        options = {"tools": tools, "add_generation_prompt": generation_prompt, **arguments}
        if any(message["content"] is None for message in messages):
            # `apply_chat_template` removes a content of None, which DeepSeek's templates ask for.
            tokens = tokenizer.special_tokens_map
            texts, _ = render_jinja_template([messages], chat_template=tokenizer.chat_template, **options, **tokens)
            return texts[0]
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def ids(self, text: str) -> list[int]:
        return self.template.tokenizer(text, add_special_tokens=False)["input_ids"]

    def header(self) -> str:
        """What the generation prompt adds behind a question."""
        question = [self._shaped({"role": "user", "content": "quux"}, False, False)]
        without, text = (self.render(question, prompted, None, {}).rsplit("quux", 1)[1] for prompted in (False, True))
        return text[self.common(text, without) :]

    def common(self, text: str, other: str) -> int:
        """Characters at the beginning of `text` that make the same tokens in both."""
        tokens = self.template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        same = 0
        for (_, end), mine, theirs in zip(tokens["offset_mapping"], tokens["input_ids"], self.ids(other), strict=False):
            if mine != theirs or not other.startswith(text[:end]):
                break
            same = end
        return same


@dataclass
class Conversation:
    """A row's messages in a form that the template takes; `said` are those of the row."""

    oracle: Oracle
    messages: Messages
    said: Messages
    tools: Any
    arguments: dict[str, Any]

    def expected(self, first: int, train_on: str, style: str) -> list[Way]:
        if self.said[-1]["role"] != "assistant":
            return self._prompt_only()
        trained = [i for i, message in enumerate(self.said) if message["role"] == "assistant" and i >= first]
        trained = [i for i in trained if self.said[i].get("weight", 1)]
        if not trained:
            raise Refusal("nothing trained", "every weight is 0")
        if train_on != "assistant":  # `all` supervises what is there, whoever wrote it
            trained = trained[-1:]
        context = [i for i in trained[:-1] if self._cannot_begin(i)]
        turns = [self._turn(i, style) for i in trained if i not in context]
        return [Way(way.rows, way.noted or bool(context)) for way in self._ways(turns, style, train_on)]

    def _cannot_begin(self, i: int) -> bool:
        """An answer before any question, which some templates render as context only."""
        if any(message["role"] == "user" for message in self.said[:i]):
            return False
        try:
            self._own(i + 1, False)
        except Refusal:
            return True
        return False

    def _ways(self, turns: list[Turn], style: str, train_on: str) -> list[Way]:
        """In one row where each turn is rendered before the last as it is alone, else each in a row of its own."""
        last = turns[-1]
        noted = any(turn.noted or self._apart(turn, style) for turn in turns)
        if not all(last.text.startswith(turn.text) for turn in turns):
            rows = [
                [self._encoded([turn], turn.after if after else "", style, train_on) for turn in turns]
                for after in (1, 0)
            ]
            return [Way(row, noted) for row in rows]
        whole = self._own(len(self.messages), False)
        rest = whole[len(last.text) :] if whole.startswith(last.text) else ""
        return [
            Way([self._encoded(turns, after, style, train_on)], noted)
            for after in dict.fromkeys((rest, last.after, ""))
        ]

    def _prompt_only(self) -> list[Way]:
        prompt = self._own(len(self.messages), True)
        self._refuse_lost(prompt, len(self.messages))
        ids = self.oracle.ids(prompt)
        return [Way([Encoded(ids, [IGNORED] * len(ids), len(ids))])]

    def _own(self, count: int, generation_prompt: bool) -> str:
        return self.oracle.render(self.messages[:count], generation_prompt, self.tools, self.arguments)

    def _turn(self, i: int, style: str) -> Turn:
        text = self._own(i + 1, False)
        self._refuse_lost((self._given(i) or text) + text, i + 1)
        prompt, begin, noted = self._prompt(i, text, style)
        family = self.oracle.template.family
        stops = family.stops
        if self.messages[i].get("tool_calls") and family.call_stops:
            stops = family.call_stops
        if family.next_role and not text.endswith(stops):
            return Turn(prompt + text[begin:] + stops[0], len(prompt), "", noted)
        ends = [text.rfind(stop, begin) + len(stop) for stop in stops if stop in text[begin:]]
        end = max(ends, default=len(text))
        return Turn(prompt + text[begin:end], len(prompt), text[end:], noted)

    def _given(self, i: int) -> str:
        try:
            return self._own(i, True)
        except Refusal:
            return ""

    def _prompt(self, i: int, text: str, style: str) -> tuple[str, int, bool]:
        """The prompt, where the answer begins in `text`, and whether a note must say how they differ from inference."""
        header = self.oracle.header()
        prompt = self._given(i)
        if prompt and text.startswith(prompt):
            # Some templates write a header behind the user's messages only.
            missing = self.oracle.common(header, text[len(prompt) :]) if not prompt.endswith(header) else 0
            return text[: len(prompt) + missing], len(prompt) + missing, False
        answer = self._answer_begins(i, text)
        if prompt:
            characters = _shared(prompt, text)
            common = min(characters if style == "characters" else self.oracle.common(prompt, text), answer)
            if common > len(prompt.removesuffix(header)):
                own = style == "own" and not prompt[common:].strip()
                return prompt if own else text[:common], common, True
            if i and (begin := self._goes_on(prompt, text, header, answer)) is not None:
                return prompt, begin, True
            if i:
                raise Refusal("rewrites", f"{prompt[common:][:80]!r} becomes {text[common:][:80]!r}")
        if not header:
            return "", 0, False
        # Nothing to generate from before a first answer: its header is what stands before other answers.
        shared = [(self.oracle.common(header, text[at:]), at) for at in range(answer) if text[at] == header[0]]
        length, at = max(shared, default=(0, 0))
        if not length:
            raise Refusal("rewrites", "no header before the answer")
        return text[: at + length], at + length, False

    def _goes_on(self, prompt: str, text: str, header: str, answer: int) -> int | None:
        """Where the answer begins in a text whose earlier messages are not those of the prompt, if both end alike."""
        if header:
            at = text.rfind(header, 0, answer)
            return at + len(header) if at >= 0 and prompt.endswith(header) else None
        ends = [
            text.rfind(token, 0, answer) + len(token)
            for token in self.oracle.template.tokenizer.get_added_vocab()
            if token in text[:answer] and prompt.endswith(token)
        ]
        return max((end for end in ends if not text[end:answer].strip()), default=None)

    def _answer_begins(self, i: int, text: str) -> int:
        message, start = self.said[i], 0
        if i:
            with suppress(Refusal):
                start = _shared(self._own(i, False), text)
        wanted = [*_words(message["content"]), *_words(message.get("reasoning_content", ""))]
        wanted += [call["function"]["name"] for call in message.get("tool_calls", [])]
        if "<b>" in message["content"]:
            wanted.append("<b>")
        places = [text.find(word, start) if i else text.rfind(word) for word in wanted]
        return min((place for place in places if place >= 0), default=len(text))

    def _refuse_lost(self, text: str, count: int) -> None:
        """Thinking of earlier turns may be gone: the model does not meet it at inference either."""
        wanted = []
        for i, message in enumerate(self.said[:count]):
            thinking, content = "", message["content"]
            if message["role"] == "assistant" and "</think>" in content:
                thinking, content = content.rsplit("</think>", 1)
            thinking += message.get("reasoning_content", "")
            calls = json.dumps([call["function"] for call in message.get("tool_calls", [])])
            calls = calls.replace("arguments", "").replace('"name"', "")
            wanted += [("role", message, content), ("tool_calls", message, calls)]
            if i + 1 == count:
                wanted.append(("reasoning", message, thinking))
        wanted += [("tools", {"role": "tools"}, tool["function"]["description"]) for tool in self.tools or []]
        for what, message, words in sorted(wanted, key=lambda one: one[0] == "reasoning"):
            if gone := [word for word in _words(words) if word not in text]:
                raise Refusal(what, f"{message['role']}: {gone[0]}")

    def _apart(self, turn: Turn, style: str) -> bool:
        """Whether a token reaches over the prompt's end: then its ids and the answer's are tokenised apart."""
        tokenizer, ids = self.oracle.template.tokenizer, self.oracle.ids(turn.text[: turn.prompt])
        tokens = tokenizer(turn.text, add_special_tokens=False, return_offsets_mapping=True)
        over = any(begin < turn.prompt < end for begin, end in tokens["offset_mapping"])
        return tokens["input_ids"][: len(ids)] != ids or (style == "characters" and over)

    def _encoded(self, turns: list[Turn], after: str, style: str, train_on: str) -> Encoded:
        cuts = [0, *(turn.prompt for turn in turns if self._apart(turn, style))]
        text = turns[-1].text + after
        ids = self._pieces(text, cuts)
        labels = [IGNORED] * len(ids)
        start = 0
        for turn in turns:
            start = len(self._pieces(text[: turn.prompt], cuts))
            end = len(self._pieces(turn.text, cuts))
            labels[start:end] = ids[start:end]
        if train_on == "all":
            labels = list(ids)
        labels[:1] = [IGNORED]
        return Encoded(ids, labels, start)

    def _pieces(self, text: str, cuts: list[int]) -> list[int]:
        edges = [*sorted(cut for cut in set(cuts) if cut < len(text)), len(text)]
        return [token for begin, end in pairwise(edges) for token in self.oracle.ids(text[begin:end])]


def _messages(row: Row) -> tuple[Messages, int]:
    """A row's messages with arguments as objects and null content as none, and the first that may be trained on."""
    messages = copy.deepcopy(row.get("messages") or [*row["prompt"], *row.get("completion", [])])
    for message in messages:
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls", []):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages, len(row["prompt"]) if row.get("completion") else 0


def _shared(text: str, other: str) -> int:
    """Characters at the beginning of both."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]{3,}", re.sub(r"</?think>", " ", text))


@dataclass(frozen=True)
class Verdict:
    outcome: str  # right | refused | wrong
    detail: str = ""


def judge(oracle: Oracle, row: Row, train_on: str, got: list[Encoded] | str, noted: bool) -> Verdict:
    """`got`: the rows of the data set, or the reason why there is none."""
    try:
        first, *others = (partial(oracle.expected, row, train_on, style) for style in STYLES)
        ways = first()
        if isinstance(got, str):
            return Verdict("wrong", f"refused: {got} | expected {show(oracle, ways[0].rows)}")
        # The others are asked for where the first does not fit: they take as long again.
        fitting = [way for way in ways if way.rows == got]
        fitting = fitting or [way for other in others for way in other() if way.rows == got]
    except Refusal as refusal:
        if not isinstance(got, str):
            return Verdict("wrong", f"accepted, though {refusal}: {show(oracle, got)}")
        detail = " ".join(refusal.detail.split()).rstrip(".")  # on one line, as messages are
        true = re.search(TRUE_REASONS[refusal.kind].format(detail=re.escape(detail)), got)
        return Verdict("refused", f"{refusal} | {got}") if true else Verdict("wrong", f"untrue: {got} | {refusal}")
    if not fitting:
        return Verdict("wrong", f"{show(oracle, got)} | expected {show(oracle, ways[0].rows)}")
    if not noted and all(way.noted for way in fitting):
        return Verdict("wrong", f"no note: {show(oracle, got)}")
    return Verdict("right")


def show(oracle: Oracle, rows: list[Encoded], length: int = 300) -> str:
    """The rows' last characters: what is supervised in ⟦ ⟧, the prompt's end as ‖."""
    shown = []
    for row in rows:
        text, on = "", False
        decode = oracle.template.tokenizer.decode
        for i, (token, label) in enumerate(zip(row.ids, row.labels, strict=True)):
            if on != (label != IGNORED):
                text, on = text + ("⟧" if on else "⟦"), not on
            text += ("‖" if i == row.prompt_length else "") + decode([token])
        shown.append(repr((text + "⟧" * on)[-length:]))
    return " AND ".join(shown)
