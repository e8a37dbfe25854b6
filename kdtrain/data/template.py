"""Rows to tokens: `input_ids` and the `labels` that say which of them the student is trained on.

Position t predicts label t + 1, so `labels[0]` is always -100. A conversation is rendered once as a whole and
tokenised once; spans of characters become spans of tokens through the offsets of that one tokenisation. Tokenising the
turns apart and gluing them would give ids that the model never sees at inference.

A token that straddles the edge of a span counts as supervised only if it begins inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from kdtrain.data.chat import ChatTemplate, Rendered
from kdtrain.data.rows import Pair, Plain, RowError, parse_row
from kdtrain.data.tokens import Tokens
from kdtrain.errors import DataError

TRAIN_ON = ("assistant", "last", "all")
IGNORE = -100


@dataclass(frozen=True)
class EncodedRow:
    """One row as tokens.

    `labels` has the length of `input_ids`, -100 where nothing is supervised. `prompt_length` leading tokens are the
    prompt to generate from, up to and including the generation prompt of the last assistant turn: all of them in a
    prompt-only row, 0 in plain text.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    kind: str = "chat"  # chat | completion | text
    prompt_only: bool = False
    turn_starts: tuple[int, ...] = ()  # prompt lengths of the supervised turns, for truncated rows
    extended: bool = False  # the stop token was outside the template's markers and was added to the mask
    unterminated: bool = False  # a supervised turn ends without a token that would make the model stop

    @property
    def supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)


def encode_row(
    row: Mapping[str, Any], tokenizer: Any, *, train_on: str, chat_template: str | None = None
) -> EncodedRow:
    """Encodes one row, of any of the kinds in `kdtrain.data.rows`.

    Args:
        row: `messages`, `conversations`, `prompt` (with `completion`) or `text`.
        tokenizer: a fast tokenizer, or a processor around one.
        train_on: `assistant` supervises every assistant turn, `last` the last one, `all` every token but the first.
            A completion is always supervised and never the messages of its prompt; text is supervised as a whole.
        chat_template: used in place of the tokenizer's own.

    Raises:
        RowError: the row cannot be trained on.
        DataError: the tokenizer or its chat template cannot serve any row.
    """
    own = json.dumps(getattr(tokenizer, "chat_template", None))
    encoded = _encoder(tokenizer, train_on, chat_template, own).encode([row])[0]
    if isinstance(encoded, RowError):
        raise encoded
    return encoded


@lru_cache(maxsize=4)
def _encoder(tokenizer: Any, train_on: str, chat_template: str | None, own: str) -> RowEncoder:
    """Preparing an encoder renders a few probes. `own` makes a changed template miss the cache."""
    return RowEncoder(tokenizer, train_on, chat_template)


class RowEncoder:
    """Encodes batches of rows with one tokenizer; see `encode_row` for the arguments and errors."""

    def __init__(self, tokenizer: Any, train_on: str, chat_template: str | None = None) -> None:
        if train_on not in TRAIN_ON:
            raise DataError(f"train_on must be one of {', '.join(TRAIN_ON)}, not {train_on!r}")
        self.processing_class = tokenizer
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                f"{type(self.tokenizer).__name__} is no fast tokenizer, so its tokens cannot be mapped to characters: "
                "load it with AutoTokenizer and a tokenizer.json"
            )
        self.train_on = train_on
        self.chat_template = chat_template
        self._templates: dict[bool, ChatTemplate] = {}
        self._bos = self._default_bos()

    def template(self, tools: bool = False) -> ChatTemplate:
        """The chat template of rows with or without tools; DataError when the tokenizer has none."""
        if tools not in self._templates:
            self._templates[tools] = ChatTemplate(self.processing_class, self.chat_template, tools)
        return self._templates[tools]

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[EncodedRow | RowError]:
        """One result per row, in order: the tokens, or what is wrong with the row."""
        results: list[EncodedRow | RowError | None] = [None] * len(rows)
        chats: list[tuple[int, ChatTemplate, Rendered]] = []
        for i, row in enumerate(rows):
            try:
                parsed = parse_row(row)
                if isinstance(parsed, Plain):
                    results[i] = _verified(self._encode_plain(parsed))
                elif isinstance(parsed, Pair):
                    results[i] = _verified(self._encode_pair(parsed))
                else:
                    template = self.template(parsed.tools is not None)
                    chats.append((i, template, template.render(parsed, self.train_on)))
            except RowError as error:
                results[i] = error
        # Conversations go to the tokenizer together: one call per row costs more than the tokenising itself.
        for (i, template, rendered), tokens in zip(chats, self._tokenize([c[2].text for c in chats]), strict=True):
            try:
                results[i] = _verified(self._mask(rendered, tokens, template))
            except RowError as error:
                results[i] = error
        return [result for result in results if result is not None]

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,  # the chat template writes them itself
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,  # lengths are checked and reported here
        )
        pairs = zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
        return [Tokens(self.tokenizer, text, ids, offsets) for text, ids, offsets in pairs]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _default_bos(self) -> list[int]:
        """What the tokenizer puts in front of plain text on its own (Llama: BOS; Qwen: nothing)."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else []

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _encode_plain(self, plain: Plain) -> EncodedRow:
        ids = self._with_eos(self._bos + self._ids(plain.text))
        return EncodedRow(ids, [IGNORE, *ids[1:]], 0, kind="text")

    def _encode_pair(self, pair: Pair) -> EncodedRow:
        """Prompt and completion as text. The prompt's ids are those of the prompt alone: what generation starts from.

        The joint tokenisation is taken where it begins with them, because a SentencePiece tokenizer puts a space in
        front of a completion tokenised alone; otherwise (a prompt that ends in the middle of a token) the two are
        tokenised apart.
        """
        prompt = self._ids(pair.prompt)
        if pair.completion is None:
            ids = self._bos + prompt
            return EncodedRow(ids, [IGNORE] * len(ids), len(ids), kind="completion", prompt_only=True)
        joint = self._ids(pair.prompt + pair.completion)
        if joint[: len(prompt)] != prompt:
            joint = prompt + self._ids(pair.completion)
        ids, start = self._with_eos(self._bos + joint), len(self._bos) + len(prompt)
        first = 1 if self.train_on == "all" else max(start, 1)
        unterminated = self.tokenizer.eos_token_id is None
        labels = [IGNORE] * first + ids[first:]
        return EncodedRow(ids, labels, start, "completion", turn_starts=(start,), unterminated=unterminated)

    def _mask(self, rendered: Rendered, tokens: Tokens, template: ChatTemplate) -> EncodedRow:
        ids = tokens.ids
        if rendered.prompt_end is None:
            return EncodedRow(ids, [IGNORE] * len(ids), len(ids), prompt_only=True)
        labels = [IGNORE] * len(ids)
        starts, extended, unterminated = [], False, False
        for start_char, end_char in rendered.turns:
            start, end = tokens.first_from(start_char), tokens.first_from(end_char)
            end, grew, stops = tokens.stop_at(start, end, template.stop_ids, template.added_ids)
            labels[start:end] = ids[start:end]
            starts.append(tokens.complete_before(start_char))
            extended, unterminated = extended or grew, unterminated or not stops
        if self.train_on == "all":
            labels, extended = list(ids), False
        labels[:1] = [IGNORE]
        prompt_length = tokens.complete_before(rendered.prompt_end)
        return EncodedRow(ids, labels, prompt_length, "chat", False, tuple(starts), extended, unterminated)


def _verified(row: EncodedRow) -> EncodedRow:
    if not row.input_ids:
        raise RowError("the row has no tokens")
    if not row.supervised and not row.prompt_only:
        raise RowError("no token is supervised: the answer is empty or the template leaves it out")
    return row


def truncate(row: EncodedRow, max_length: int) -> EncodedRow | None:
    """Cuts from the right: the system prompt stays, and no end token is made up for an answer without its end.

    The prompt to generate from becomes that of the last turn whose prompt still fits; there is none (0) if no turn's
    does. Returns None when nothing is left to train on or generate from.
    """
    if len(row.input_ids) <= max_length:
        return row
    labels = row.labels[:max_length]
    if row.prompt_only or labels.count(IGNORE) == max_length:
        return None
    fitting = [start for start in row.turn_starts if start < max_length]
    return replace(
        row, input_ids=row.input_ids[:max_length], labels=labels, prompt_length=fitting[-1] if fitting else 0
    )
