"""Rows to tokens: `input_ids` and the `labels` that say which of them the student is trained on.

Position t predicts label t + 1, so `labels[0]` is always -100. A rendered conversation (chat_template.py) is tokenised
once; spans of characters become spans of tokens through the offsets of that tokenisation. Only where an answer begins
inside of a token are prompt and answer tokenised apart: at inference the prompt is tokenised alone.

A conversation with images is expanded by its processor first (multimodal.py), and must come out with the very ids that
the processor gives it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdtrain.data.chat_template import (
    CONTROL_TOKENS,
    REASONING,
    TURNS,
    ChatTemplate,
    Rendered,
    TemplateOptions,
)
from kdtrain.data.columns import ANSWER_COLUMN, ROUTE_COLUMN, optional_answer, read_answer
from kdtrain.data.conversation import chat_text, pair_text
from kdtrain.data.encoded_row import EncodedRow
from kdtrain.data.errors import RowError, show
from kdtrain.data.media import parse_media_row
from kdtrain.data.multimodal import multimodal
from kdtrain.data.parts import count_images, texts_of
from kdtrain.data.prefix import PREFIX_MODES, PrefixedChat, refuse_text, row_prefix, with_prefix
from kdtrain.data.route import teacher_of
from kdtrain.data.row_notes import APART, OTHER_PROMPT, SPLIT, STRADDLED
from kdtrain.data.rows import Chat, Pair, PlainText, answered, prompt_of
from kdtrain.data.teacher_view import (
    TeacherText,
    rendered_twice,
    teacher_notes,
    teacher_option,
    teacher_options,
    with_teacher,
)
from kdtrain.data.tokens import Tokens, tokenize, tokenize_apart
from kdtrain.data.turns import Message
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX

# Characters of rendered text that are tokenised together.
_AT_ONCE = 2**21
TRAIN_ON = ("assistant", "last", "all")
_CHOICES = {
    "train_on": TRAIN_ON,
    "turns": TURNS,
    "reasoning": REASONING,
    "control_tokens": CONTROL_TOKENS,
    "teacher_prefix_mode": PREFIX_MODES,
}


def encode_row(
    row: Mapping[str, Any],
    processing_class: Any,
    *,
    train_on: str,
    chat_template: str | None = None,
    folder: str | None = None,
    **options: Any,
) -> EncodedRow:
    """Encodes one row, of any of the kinds in `kdtrain.data.rows`. For many rows keep a `RowEncoder`.

    Args:
        row: as of `kdtrain.data.rows.parse_row`.
        processing_class: a fast tokenizer, or a processor around one; rows with images need a processor.
        train_on: `assistant` supervises every assistant turn, `last` the last one, `all` every token but the first
            and those that stand for images. A completion is always supervised and never the messages of its prompt;
            text is supervised as a whole.
        chat_template: used in place of the tokenizer's own.
        folder: what the paths of images are relative to; by default the current directory.
        options: the other fields of `TemplateOptions`.

    Raises:
        RowError: the row cannot be trained on, or only as several: see `data.turns`.
        DataError: the tokenizer, its chat template or the processor cannot serve any row.
    """
    encoder = RowEncoder(processing_class, train_on, chat_template, **options)
    encoded = encoder.encode([row], [folder or os.getcwd()])[0]
    if isinstance(encoded, RowError):
        raise encoded
    if len(encoded) > 1:
        raise RowError(f"the conversation becomes {len(encoded)} rows, one for each of its answers: {SPLIT}")
    return encoded[0]


@dataclass(frozen=True)
class _Text:
    """A rendered conversation, or a part of it that is a row of its own."""

    row: int  # the number of the row that it is made of
    chat: Chat
    rendered: Rendered
    teacher: TeacherText | None
    prefixed: PrefixedChat | None


class RowEncoder:
    """Encodes batches of rows with one tokenizer or processor, as `encode_row` does one.

    `image_root` is what paths of images are relative to, instead of the folder of each row.
    `keep_pixels`: rows with images come with what the processor made of them. Not for a data set: it fills the memory.
    `prompts`: rows without an answer can be used, see `kdtrain.data.rows.answered`.
    `keep_chats`: rows come with their conversation, see conversation.py.
    `generated`: other answers take the place of the rows' own, so that what counts is the prompt: it is that at
        inference, and the row's answer is left out where the template writes another one in front of it.
    `keep_answers`: rows come with their column `answer`, and need one unless there are `optional_answers`.
    `teachers`: names of several teachers, of which each row has one: its column `teacher`, or its source's.
    """

    def __init__(
        self,
        processing_class: Any,
        train_on: str,
        chat_template: str | None = None,
        *,
        image_root: str | None = None,
        keep_pixels: bool = False,
        prompts: bool = True,
        keep_chats: bool = False,
        generated: bool = False,
        keep_answers: bool = False,
        optional_answers: bool = False,
        teachers: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.options = TemplateOptions(train_on, **options)
        for name, known in _CHOICES.items():
            if (value := getattr(self.options, name)) not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        self.processing_class = processing_class
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                f"{type(self.tokenizer).__name__} is no fast tokenizer, so its tokens cannot be mapped to characters: "
                "load it with AutoTokenizer and a tokenizer.json"
            )
        self.chat_template = chat_template
        self.multimodal = multimodal(processing_class)
        self.image_root = image_root
        self._keep_pixels = keep_pixels
        self.prompts = prompts
        self.keep_chats = keep_chats
        self.generated = generated
        self.keep_answers, self.optional_answers = keep_answers, optional_answers
        self.teachers = tuple(teachers)
        self._templates: dict[tuple[bool, bool], ChatTemplate] = {}
        self._bos: list[int] = []
        self._settings = ""
        self._follow_tokenizer()

    def _follow_tokenizer(self) -> None:
        """Reads the tokenizer again if it was changed: a trainer may set its template, special or added tokens.

        Templates are prepared by rendering probes, which is too slow to be done for every batch.
        """
        tokenizer = self.tokenizer
        templates = [self.processing_class.chat_template, tokenizer.chat_template]
        settings = json.dumps([templates, tokenizer.special_tokens_map, len(tokenizer)], default=str)
        if settings != self._settings:
            self._settings, self._templates, self._bos = settings, {}, self._default_bos()

    def template(self, tools: bool = False, teacher: bool = False) -> ChatTemplate:
        key = (tools, teacher)
        if key not in self._templates:
            options = teacher_options(self.options) if teacher else self.options
            self._templates[key] = ChatTemplate(self.processing_class, self.chat_template, tools, options)
        return self._templates[key]

    def encode(
        self,
        rows: Sequence[Mapping[str, Any]],
        folders: Sequence[str | None],
        teacher_answers: Sequence[bool] | None = None,
        of_sources: Sequence[str | None] | None = None,
    ) -> list[list[EncodedRow] | RowError]:
        """One result per row, in order: the rows that it becomes, or what is wrong with it.

        Several are those of a conversation whose turns cannot share one, see `ChatTemplate.render`. `folders` are what
        the paths of each row's images are relative to; `teacher_answers` says which rows lose their own answer, see
        `kdtrain.data.rows.prompt_of`; `of_sources` which teacher those have that name none themselves.
        """
        self._follow_tokenizer()
        results: list[list[EncodedRow] | RowError] = [[] for _ in rows]
        answers: list[str | None] = [None] * len(rows)
        weights = [1.0] * len(rows)
        routes: list[str | None] = [None] * len(rows)
        chats: list[_Text] = []
        characters = 0
        for i, row in enumerate(rows):
            try:
                row, routes[i] = self._route(row, of_sources[i] if of_sources else None)
                row, prefix = self._prefix(row)
                row, answers[i] = self._answer(row)
                parsed = self._parse(row, folders[i], bool(teacher_answers and teacher_answers[i]))
                weights[i] = parsed.kd_weight
                if prefix is not None and not isinstance(parsed, Chat):
                    refuse_text(parsed)
                if isinstance(parsed, PlainText):
                    results[i] = [self._verified(self._encode_text(parsed), parsed.notes)]
                elif isinstance(parsed, Pair):
                    encoded = self._verified(self._encode_pair(parsed), parsed.notes)
                    results[i] = [self._with_chat(encoded, pair_text, parsed)]
                else:
                    prefixed = None if prefix is None else with_prefix(parsed, prefix, self.options.teacher_prefix_mode)
                    rendered = self._render(parsed, prefixed)
                    texts = [_Text(i, parsed, own, teacher, prefixed) for own, teacher in rendered]
                    chats += texts
                    characters += sum(len(text.rendered.text) for text in texts)
            except RowError as error:
                results[i] = error
            # Conversations go to the tokenizer together: a call per row costs more than the tokenising itself. But not
            # too many: one whose turns are rows of their own becomes as many texts as it has turns.
            if characters > _AT_ONCE:
                self._encode_chats(chats, results)
                chats, characters = [], 0
        self._encode_chats(chats, results)
        for i, found in enumerate(results):
            if not isinstance(found, RowError) and (self.keep_answers or self.teachers or weights[i] != 1):
                results[i] = [replace(one, answer=answers[i], route=routes[i], kd_weight=weights[i]) for one in found]
        return results

    def _route(self, row: Mapping[str, Any], of_source: str | None) -> tuple[Mapping[str, Any], str | None]:
        """The row without the column that names its teacher, and that name."""
        if not self.teachers:
            return row, None
        rest = {name: value for name, value in row.items() if name != ROUTE_COLUMN}
        return rest, teacher_of(row.get(ROUTE_COLUMN), of_source, self.teachers)

    def _answer(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
        """The row without the column that samples are checked against, and what it says."""
        if not self.keep_answers:
            return row, None
        if self.optional_answers:
            return row, optional_answer(row.get(ANSWER_COLUMN))
        rest = {name: value for name, value in row.items() if name != ANSWER_COLUMN}
        return rest, read_answer(row.get(ANSWER_COLUMN))

    def _prefix(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[Message] | None]:
        """The row without the column of its prefix, and the messages that the teacher alone reads in front of it."""
        column, default = self.options.teacher_prefix_column, self.options.teacher_prefix
        if column is None:
            return row, default
        rest = {name: value for name, value in row.items() if name != column}
        return rest, row_prefix(row.get(column), column, default)

    def _parse(self, row: Mapping[str, Any], folder: str | None, teacher_answers: bool) -> Chat | Pair | PlainText:
        parsed = parse_media_row(row, self.image_root or folder, self.multimodal is not None)
        if teacher_answers:
            parsed = prompt_of(parsed)
        elif not self.prompts:
            parsed = answered(parsed)
        if isinstance(parsed, Chat) and parsed.unknown_keys:
            parsed = parsed.noting_keys(self.template(parsed.tools is not None).text)
        return parsed

    def _encode_chats(self, texts: Sequence[_Text], results: list[list[EncodedRow] | RowError]) -> None:
        """Puts the tokens of rendered conversations into the results of their rows."""
        of_students = iter(tokenize(self.tokenizer, [one.rendered.text for one in texts if not one.chat.images]))
        of_teachers = iter(tokenize(self.tokenizer, [one.teacher.rendered.text for one in texts if one.teacher]))
        for one in texts:
            tokens = None if one.chat.images else next(of_students)
            teacher_tokens = next(of_teachers) if one.teacher else None
            found = results[one.row]
            if isinstance(found, RowError):
                continue
            try:
                encoded = self._mask(one.rendered, tokens) if tokens else self._encode_images(one.chat, one.rendered)
                encoded = self._verified(encoded, (*one.chat.notes, *one.rendered.notes))
                if one.teacher and teacher_tokens:
                    encoded = self._add_teacher(encoded, one.teacher, teacher_tokens)
                about = (one.chat, one.rendered.messages, self.options, one.prefixed)
                found.append(self._with_chat(encoded, chat_text, *about))
            except RowError as error:
                results[one.row] = error

    def _with_chat(self, row: EncodedRow, text: Callable[..., str], *arguments: Any) -> EncodedRow:
        return replace(row, chat=text(*arguments)) if self.keep_chats else row

    def _render(self, chat: Chat, prefixed: PrefixedChat | None = None) -> list[tuple[Rendered, TeacherText | None]]:
        """The texts that a conversation becomes, each with the teacher's where that is another."""
        template = self._template_for(chat)
        if not teacher_option(self.options):
            rendered = template.render(chat)
            if self.generated:
                rendered = [template.asked(chat, one) if OTHER_PROMPT in one.notes else one for one in rendered]
            return [(one, None) for one in rendered]
        of_teacher = self.template(chat.tools is not None, teacher=True)
        return rendered_twice(chat, prefixed, template, of_teacher, self.options, generated=self.generated)

    def _add_teacher(self, row: EncodedRow, other: TeacherText, tokens: Tokens) -> EncodedRow:
        teacher = self._mask(other.rendered, tokens, edges=other.edges)
        notes = teacher_notes(row.notes, (*other.rendered.notes, *teacher.notes))
        row = with_teacher(row, teacher, teacher_option(self.options))
        return replace(row, notes=(*row.notes, *notes)) if notes else row

    def _template_for(self, chat: Chat) -> ChatTemplate:
        if chat.images:
            if self.multimodal is None:
                name = show(str(self.tokenizer.name_or_path or type(self.tokenizer).__name__))
                raise RowError(
                    f"the row has images and the model {name} has no processor for images: take a vision-language "
                    "model, or a text-only data set"
                )
            self.multimodal.refuse_text([text for message in chat.messages for text in texts_of(message["content"])])
        return self.template(chat.tools is not None)

    def _encode_images(self, chat: Chat, rendered: Rendered) -> EncodedRow:
        model = self.multimodal
        assert model is not None, "rows with images are refused without one"
        images = chat.images[: count_images(chat.messages[: rendered.messages])]
        expanded, after_images, processed = model.expand(rendered, images)
        # The processor gives ids without offsets. The same text tokenised here gives both, and the same ids, unless
        # the processor does more to the text than it hands to its tokenizer.
        tokens = tokenize(self.tokenizer, [expanded.text])[0]
        if tokens.ids != processed.ids:
            raise RowError(
                f"{type(self.processing_class).__name__} gives a row with images {len(processed.ids)} tokens, and its "
                f"tokenizer gives the same text {len(tokens.ids)} others, so the assistant's tokens cannot be told "
                "from the rest"
            )
        if rendered.cuts:
            raise RowError("the text has control tokens, which cannot be encoded as text beside images")
        row = self._mask(expanded, tokens, apart=False)  # the processor tokenises the text as a whole
        # `train_on: all` supervises the user's turns, too, but image tokens are never written by the model.
        labels = [IGNORE_INDEX if label in model.image_ids else label for label in row.labels]
        # Some families end an image with tokens that are no image ids (line breaks, an end marker): they reach as far
        # as the text after the last image.
        end = max(tokens.first_from(after_images), model.images_end(tokens.ids))
        kept = processed if self._keep_pixels else None
        row = replace(row, labels=labels, notes=row.notes + processed.notes, sizes=processed.sizes)
        return replace(row, text=rendered.text, images=images, images_end=end, processed=kept)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _default_bos(self) -> list[int]:
        """What the tokenizer puts in front of plain text on its own (Llama: BOS; Qwen: nothing)."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else []

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._bos else self._bos + ids

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _to_eos(self, text: str) -> str:
        """The text without white space behind an EOS that it ends with."""
        eos = self.tokenizer.eos_token
        return text.rstrip() if eos and text.rstrip().endswith(eos) else text

    def _encode_text(self, parsed: PlainText) -> EncodedRow:
        ids = self._with_eos(self._with_bos(self._ids(self._to_eos(parsed.text))))
        return EncodedRow(ids, [IGNORE_INDEX, *ids[1:]], 0, kind="text")

    def _encode_pair(self, pair: Pair) -> EncodedRow:
        """The prompt's ids are those of the prompt alone: what generation starts from.

        The joint tokenisation is taken where it begins with them, because a SentencePiece tokenizer puts a space in
        front of a completion tokenised alone; otherwise (a prompt that ends in the middle of a token) the two are
        tokenised apart.
        """
        prompt = self._ids(pair.prompt)
        if pair.completion is None:
            ids = self._with_bos(prompt)
            return EncodedRow(ids, [IGNORE_INDEX] * len(ids), len(ids), kind="completion", prompt_only=True)
        completion = self._to_eos(pair.completion)
        joint = self._ids(pair.prompt + completion)
        if joint[: len(prompt)] != prompt:
            joint = prompt + self._ids(completion)
        ids, start = self._with_eos(self._with_bos(joint)), len(self._with_bos(prompt))
        first = 1 if self.options.train_on == "all" else max(start, 1)
        unterminated = self.tokenizer.eos_token_id is None
        labels = [IGNORE_INDEX] * first + ids[first:]
        return EncodedRow(ids, labels, start, "completion", turn_starts=(start,), unterminated=unterminated)

    def _mask(
        self, rendered: Rendered, tokens: Tokens, apart: bool = True, edges: frozenset[int] = frozenset()
    ) -> EncodedRow:
        """The tokens of a text with the labels of its turns.

        apart: where a token has both the end of a prompt and the beginning of its answer, the two are tokenised apart:
            the prompt then has the tokens that it has at inference. Otherwise such a token is the answer's first one.
        edges: characters that begin a token of their own in any case.
        """
        straddled = tuple(turn.start for turn in rendered.turns if tokens.straddled(turn.start))
        within = tuple(edge for edge in edges if tokens.straddled(edge))
        if rendered.cuts or within or (straddled and apart):
            tokens = tokenize_apart(self.tokenizer, rendered.text, {*rendered.cuts, *straddled, *within})
        ids = list(tokens.ids)
        if not rendered.turns:
            return EncodedRow(ids, [IGNORE_INDEX] * len(ids), len(ids), prompt_only=True)
        labels = [IGNORE_INDEX] * len(ids)
        weights = [1.0] * len(ids)
        for turn in rendered.turns:
            for start, end in turn.spans:
                first = tokens.complete_before(start) if start in straddled else tokens.first_from(start)
                behind = tokens.end_of(end)
                labels[first:behind] = ids[first:behind]
                weights[first:behind] = [turn.kd_weight] * len(ids[first:behind])
        if self.options.train_on == "all":
            labels = list(ids)
            for start, end in rendered.excluded:
                first, behind = tokens.first_from(start), tokens.end_of(end)
                labels[first:behind] = [IGNORE_INDEX] * (behind - first)
        if rendered.stop is not None:
            ids.append(self.tokenizer.convert_tokens_to_ids(rendered.stop))
            labels.append(ids[-1] if rendered.turns[-1].spans else IGNORE_INDEX)
            weights.append(rendered.turns[-1].kd_weight)
        labels[:1] = [IGNORE_INDEX]
        starts = tuple(tokens.complete_before(turn.start) for turn in rendered.turns)
        return EncodedRow(
            ids,
            labels,
            starts[-1],
            "chat",
            turn_starts=starts,
            turn_messages=tuple(turn.messages for turn in rendered.turns),
            extended=any(turn.extended for turn in rendered.turns),
            unterminated=not all(turn.terminated for turn in rendered.turns),
            notes=(APART if apart else STRADDLED,) if straddled else (),
            kd_weights=weights if any(turn.kd_weight != 1 for turn in rendered.turns) else None,
        )

    def _verified(self, row: EncodedRow, notes: tuple[str, ...]) -> EncodedRow:
        if not row.input_ids:
            raise RowError("the row has no tokens")
        if not row.supervised and not row.prompt_only:
            raise RowError("no token is supervised: the answer is empty or the template leaves it out")
        if self.multimodal is not None and not row.images:
            self.multimodal.refuse_ids(row.input_ids)
        return replace(row, notes=(*notes, *row.notes)) if notes else row
