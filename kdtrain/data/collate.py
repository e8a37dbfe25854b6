"""Rows to a batch: right padding, and a mask made from lengths.

Many tokenizers pad with the EOS token. A mask made by comparing ids with the padding erases the real EOS as well, and
the student never learns to stop; here neither mask nor labels ever look at the ids.

Images are decoded here, batch by batch: a data set of pixels would fill the disk. The public processor runs on each
row alone, so a row's tensors do not depend on its neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch

from kdtrain.data.aligned_batch import Aligner
from kdtrain.data.batch import Batch, Rows, TeacherImages, TeacherTokens
from kdtrain.data.chat_template import TemplateOptions
from kdtrain.data.columns import ANSWER_COLUMN, ROUTE_COLUMN, read_answer
from kdtrain.data.encoded_row import EncodedRow, Limits, tokenised_row, truncate
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.errors import RowError, show
from kdtrain.data.images import of_mean_colour, stored_image
from kdtrain.data.multimodal import Multimodal, Processed, image_content, multimodal, reads_images, tokenizer_content
from kdtrain.data.row_key import encoded_row_key
from kdtrain.data.rows import parse_row
from kdtrain.data.source import LOSS_COLUMNS
from kdtrain.data.stream.rows import PLACE
from kdtrain.data.visual_batch import cut_rows, pad_token_tensors, stack_visual
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX

__all__ = ["Collator", "cut_rows", "pad_rows"]


def pad_rows(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """Pads B pairs of ids and labels on the right, T rounded up to a `multiple`.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each [B, T] long. Labels are -100 in the padding and at position 0,
        which nothing predicts. Any `pad_id` will do: the mask is made from the lengths.
    """
    longest = max(len(ids) for ids, _ in rows)
    width = -(-longest // multiple) * multiple if multiple else longest
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.long)
    for i, (ids, row_labels) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.as_tensor(ids)
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = torch.as_tensor(row_labels)
    labels[:, :1] = IGNORE_INDEX
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _weights(rows: Sequence[EncodedRow], width: int) -> dict[str, torch.Tensor | None]:
    """Weights in the divergence, of the rows [B] and of their tokens [B, T]; None where all are 1."""
    of_rows = torch.tensor([row.kd_weight for row in rows])
    if all(row.kd_weights is None for row in rows):
        of_tokens = None
    else:
        of_tokens = torch.ones(len(rows), width)
        for i, row in enumerate(rows):
            if row.kd_weights is not None:
                of_tokens[i, : len(row.kd_weights)] = torch.tensor(row.kd_weights)
    return {"rows": of_rows if bool((of_rows != 1).any()) else None, "tokens": of_tokens}


@dataclass
class Collator:
    """Collates rows of `build_dataset`, or raw rows, which are encoded on the fly in the same way.

    Args:
        processing_class: a fast tokenizer, or a processor around one. Without a padding token its EOS pads; it is not
            changed.
        teacher_processing_class: the teacher's processor. Where its images come out differently from the student's,
            it runs as well; an equal one changes nothing.
        pad_to_multiple_of: rounds T up.
        max_length: limit in tokens; None for no limit.
        template: how raw conversations are rendered. One that becomes several rows makes the batch larger.
        on_overlength: `error`, `truncate` (from the right) or `drop`, for rows over `max_length`. A row that would lose
            a part of an image is dropped; one that loses its whole answer stays, with all its images, and supervises
            nothing.
        text_column: for raw rows, the column that holds plain text.
        image_root: for raw rows, the folder that relative paths of images are relative to; by default the current one.
        answers: whether rows have a column `answer`, which the student's samples are checked against.
        other_tokenizer: of a teacher with another tokenizer: what makes its tokens (`OtherTokenizer`), and says which
            belong to which; of one whose targets are stored, its `aligner`.
        blank_images: whether each image is replaced by one of its size in its mean colour.
        with_blanks: whether batches have these beside the images, for the teacher (`rlhf.token_weights`).
        teachers: whether rows name one of several teachers in a column `teacher`.
        row_keys: whether batches have the `row_key` of each row, by which a teacher's stored targets are found; with
            `other_tokenizer` its conversation is a part of it.

    Calling it returns a `Batch`: tokens [B, T] padded on the right, and what is known of the rows. With a processor its
    inputs also have the other tensors that it makes per token ([B, T], zero for rows without images and in the
    padding), and in batches with images its visual tensors, rows behind each other along axis 0.

    Raises DataError for a row that cannot be encoded or is too long, whose images cannot be read or no longer give
    the tokens that are stored, or whose images take another number of tokens for the teacher; and for a batch of which
    nothing is left.
    """

    processing_class: Any
    teacher_processing_class: Any = None
    _: KW_ONLY
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    template: TemplateOptions = field(default_factory=TemplateOptions)
    on_overlength: str = "error"
    text_column: str = "text"
    image_root: str | None = None
    answers: bool = False
    teachers: bool = False
    row_keys: bool = False
    blank_images: bool = False
    with_blanks: bool = False
    other_tokenizer: Aligner | None = None

    def __post_init__(self) -> None:
        Limits(self.max_length, self.on_overlength)  # checks both
        inner = getattr(self.processing_class, "tokenizer", self.processing_class)
        choices = (inner.pad_token_id, inner.eos_token_id, 0)
        self._pad_id: int = next(choice for choice in choices if choice is not None)
        self._model = multimodal(self.processing_class)
        self._teacher = multimodal(self.teacher_processing_class) if self._teacher_differs() else None
        self._encoder: RowEncoder | None = None

    def _teacher_differs(self) -> bool:
        """Whether the teacher's processor would make other tensors, or other ids, of the same images."""
        student, teacher = self.processing_class, self.teacher_processing_class
        if not (reads_images(student) and reads_images(teacher)):
            return False
        # Which tokens are special changes no ids.
        vocabularies = [tokenizer_content(one.tokenizer)["tokenizer"] for one in (student, teacher)]
        return image_content(student) != image_content(teacher) or vocabularies[0] != vocabularies[1]

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        given = len(rows)
        places, rows, encoded = self._encode_all(rows)
        fitting = [(i, row) for i, row in enumerate(map(self._fit, encoded)) if row is not None]
        if not fitting:
            raise DataError(
                f"every row of a batch of {len(rows)} is longer than max_length ({self.max_length} tokens), or has "
                "images that do not fit into it"
            )
        kept = [(rows[i], row) for i, row in fitting]
        places = [places[i] for i, _ in fitting]
        truncated = [row is not encoded[i] for i, row in fitting]
        pairs = [(row.input_ids, row.labels) for _, row in fitting]
        tokens = pad_rows(pairs, self._pad_id, self.pad_to_multiple_of)
        weights = _weights([row for _, row in fitting], tokens["labels"].shape[1])
        chats, spoken = _conversations([row for row, _ in kept]), [None] * len(kept)
        if self.other_tokenizer is not None:
            spoken = [row.get("chat", encoded.chat) for row, encoded in kept]
            chats = {"chats": spoken}
        batch = Batch(
            labels=tokens.pop("labels"),
            kd_token_weights=weights["tokens"],
            model_inputs=tokens,
            rows=Rows(
                ids=[str(row.get("row_id", "")) for row, _ in kept],
                keys=_keys([row for _, row in fitting], spoken) if self.row_keys else (),
                prompt_lengths=torch.tensor([row.prompt_length for _, row in fitting], dtype=torch.long),
                ce=torch.tensor([bool(row.get("ce", True)) for row, _ in kept]),
                kd_weights=weights["rows"],
                truncated=truncated if any(truncated) else (),
                places=None if places == list(range(given)) else places,
                answers=[_answer(row) for row, _ in kept] if self.answers else (),
                stream_place=kept[-1][0].get(PLACE),
                teachers=[row.get(ROUTE_COLUMN) or None for row, _ in kept] if self.teachers else (),
                losses=_losses([row for row, _ in kept]),
                **chats,
            ),
        )
        if self.other_tokenizer is not None:
            batch = self.other_tokenizer.aligned(batch, [row for _, row in fitting], self.pad_to_multiple_of)
        else:
            batch = replace(batch, teacher_tokens=self._teacher_tokens([row for _, row in fitting]))
        return batch if self._model is None else self._with_images(batch, kept, self._model)

    def _teacher_tokens(self, rows: Sequence[EncodedRow]) -> TeacherTokens | None:
        """The rows as the teacher reads them, where it reads any of them otherwise than the student."""
        if not any(row.teacher for row in rows):
            return None
        read = [row.teacher or row for row in rows]
        tokens = pad_rows([(row.input_ids, row.labels) for row in read], self._pad_id, self.pad_to_multiple_of)
        return TeacherTokens(**tokens, prompt_lengths=torch.tensor([row.prompt_length for row in read]))

    def _with_images(self, batch: Batch, rows: list[tuple[dict[str, Any], EncodedRow]], model: Multimodal) -> Batch:
        # Those of a raw row were read when it was encoded, a moment ago; only another processor has to see them again.
        again = self._teacher is not None or self.with_blanks
        images = [self._load(*row) if again or row[1].processed is None else [] for row in rows]
        width = batch.labels.shape[1]
        inputs, sizes = self._inputs(width, rows, images, model)
        batch = replace(batch, model_inputs={**batch.model_inputs, **inputs}, visual_sizes=sizes)
        if not sizes:
            return batch
        if self.teacher_processing_class is not None and not reads_images(self.teacher_processing_class):
            raise DataError(
                f"row {batch.rows.ids[0]!r} or one beside it has images, and the teacher's "
                f"{type(self.teacher_processing_class).__name__} has no processor for images: take a "
                "vision-language teacher, or a text-only data set"
            )
        if self._teacher is not None:
            batch = replace(batch, teacher_images=self._other_images(width, rows, images, self._teacher))
        if self.with_blanks:
            pictured = replace(batch.rows, pictured=[bool(encoded.images) for _, encoded in rows])
            blanks = [[of_mean_colour(image) for image in own] for own in images]
            unprocessed = [(row, replace(encoded, processed=None)) for row, encoded in rows]
            images_of_teacher = self._other_images(width, unprocessed, blanks, self._teacher or model)
            batch = replace(batch, rows=pictured, blank_images=images_of_teacher)
        return batch

    def _other_images(
        self, width: int, rows: list[tuple[dict[str, Any], EncodedRow]], images: list[list[Any]], model: Multimodal
    ) -> TeacherImages:
        """What a processor makes of images, but for what it says of the tokens, which are the student's."""
        inputs, sizes = self._inputs(width, rows, images, model)
        return TeacherImages(inputs={name: inputs[name] for name in sizes}, sizes=sizes)

    def _inputs(
        self,
        width: int,
        rows: list[tuple[dict[str, Any], EncodedRow]],
        images: list[list[Any]],
        model: Multimodal,
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
        processed = [
            self._process(row, encoded, loaded, model) if encoded.images else None
            for (row, encoded), loaded in zip(rows, images, strict=True)
        ]
        visual, sizes = stack_visual(processed, model)
        lengths = [len(encoded.input_ids) for _, encoded in rows]
        tokens = pad_token_tensors(list(zip(lengths, processed, strict=True)), width, model.text_tensors)
        return {**tokens, **visual}, sizes

    def _load(self, row: Mapping[str, Any], encoded: EncodedRow) -> list[Any]:
        with _naming(row):
            images = [image.load() for image in encoded.images]
        return [of_mean_colour(image) for image in images] if self.blank_images else images

    @property
    def of_teacher(self) -> Multimodal | None:
        """What makes the teacher's images, where these come out differently from the student's."""
        return self._teacher

    def has_images(self, row: Mapping[str, Any]) -> bool:
        return self._model is not None and bool(self._encode([row])[0][0].images)

    def prepared_by(self, processing_class: Any, row: Mapping[str, Any]) -> Processed:
        """A row with images as a processor by itself prepares it, whether or not that agrees with what is stored."""
        encoded = self._encode([row])[0][-1]
        with _naming(row):
            return Multimodal(processing_class).process(str(encoded.text), self._load(row, encoded))

    def _process(self, row: Mapping[str, Any], encoded: EncodedRow, images: list[Any], model: Multimodal) -> Processed:
        processed = encoded.processed if model is self._model else None
        if processed is None:
            with _naming(row):
                processed = model.process(str(encoded.text), images)
        # Ids and labels were made when the row was encoded, its pixels are made now: both belong together only if the
        # processor would still give these ids. They may be fewer than it gives, where the row was cut at max_length,
        # as long as no part of an image is cut off.
        stored = encoded.input_ids
        if row.get("answers"):  # the text is the prompt; what follows it was generated
            stored = stored[: encoded.prompt_length]
        elif len(stored) == len(processed.ids) + 1:  # the end of the last turn, which the template does not write
            stored = stored[:-1]
        if processed.ids[: len(stored)] == stored and model.images_end(processed.ids) <= len(stored):
            return processed
        now, before = (sum(i in model.image_ids for i in ids) for ids in (processed.ids, stored))
        if model is self._teacher:
            raise DataError(
                f"{_named(row)}: its images take {before} tokens for the student and {now} for the teacher, and "
                "distillation compares them token by token: give both processors the same image size, patch size and "
                "number of tokens per image, or take a teacher of the student's family"
                if now != before
                else f"{_named(row)}: the teacher's processor gives its text other tokens than the student's"
            )
        raise DataError(
            f"{_named(row)}: the processor gives it other tokens than when it was encoded ({before} of images then, "
            f"{now} now): its images or the processor have changed since. Start the run again"
        )

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuses a raw row whose columns have no form that can be encoded; makes no tokens."""
        if "input_ids" not in row:
            parse_row(self._with_text(row))

    def _with_text(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.text_column != "text" and self.text_column in row:
            return {**row, "text": row[self.text_column]}
        return row

    def _encode_all(self, rows: list[dict[str, Any]]) -> tuple[list[int], list[dict[str, Any]], list[EncodedRow]]:
        """The rows of the batch: a raw conversation may become several, which all carry it and its place."""
        encoded = self._encode(rows)
        places = [place for place, several in enumerate(encoded) for _ in several]
        return places, [rows[place] for place in places], [one for several in encoded for one in several]

    def _encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[EncodedRow]]:
        """Tokenised rows as they are, raw rows through the encoder together, in the order of `rows`."""
        raw = [self._with_text(row) for row in rows if "input_ids" not in row]
        encoded = iter(self._raw_encoder().encode(raw, [self.image_root or os.getcwd()] * len(raw)) if raw else ())
        results = []
        for row in rows:
            result = [self._tokenised(row)] if "input_ids" in row else next(encoded)
            if isinstance(result, RowError):
                raise result
            results.append(result)
        return results

    def _raw_encoder(self) -> RowEncoder:
        """Made for the first raw row, since tokenised rows do without a fast tokenizer, and kept."""
        if self._encoder is None or self._encoder.options != self.template:
            keep_chats = self.other_tokenizer is not None
            self._encoder = RowEncoder(
                self.processing_class, keep_pixels=True, keep_chats=keep_chats, **vars(self.template)
            )
        return self._encoder

    def _tokenised(self, row: Mapping[str, Any]) -> EncodedRow:
        encoded = tokenised_row(row)
        if not row.get("images"):
            return encoded
        if self._model is None:
            raise DataError(f"{_named(row)} has images, and the collator has a tokenizer only: give it the processor")
        images = tuple(stored_image(record) for record in row["images"])
        images_end = self._model.images_end(encoded.input_ids)
        return replace(encoded, text=row["text"], images=images, images_end=images_end)

    def _fit(self, row: EncodedRow) -> EncodedRow | None:
        if self.max_length is None or row.longest <= self.max_length:
            return row
        if self.on_overlength == "error":
            raise DataError(
                f"a row has {row.longest} tokens, max_length is {self.max_length}: raise it, or set "
                "on_overlength to truncate or drop"
            )
        if self.on_overlength == "drop":
            return None
        cut = truncate(row, self.max_length)
        if cut is None and row.images_end <= self.max_length:
            # `build_dataset` drops a row of which no answer is left. Here that could leave a batch without rows: it
            # stays, and supervises nothing.
            if row.teacher is None:
                return self._unsupervised(row, self.max_length)
            # One of the two texts may have some of an answer left, which is no prompt.
            own, teacher = (
                self._unsupervised(one, min([self.max_length, *(start for start in one.turn_starts[:1] if start)]))
                for one in (row, row.teacher)
            )
            return replace(own, teacher=teacher)
        return cut

    @staticmethod
    def _unsupervised(row: EncodedRow, length: int) -> EncodedRow:
        ids = row.input_ids[:length]
        return row.first_tokens(length, labels=[IGNORE_INDEX] * len(ids), prompt_length=len(ids))


def _keys(rows: Sequence[EncodedRow], chats: Sequence[str | None]) -> list[bytes]:
    return [encoded_row_key(row, chat=chat) for row, chat in zip(rows, chats, strict=True)]


def _losses(rows: Sequence[Mapping[str, Any]]) -> Sequence[tuple[Any, float | None]]:
    found = [(row.get(LOSS_COLUMNS[0]), row.get(LOSS_COLUMNS[1])) for row in rows]
    return found if any(one != (None, None) for one in found) else ()


def _answer(row: Mapping[str, Any]) -> str | None:
    """What samples are checked against; rows of an evaluation have no samples, and need none."""
    with _naming(row):
        return None if row.get(ANSWER_COLUMN) is None else read_answer(row[ANSWER_COLUMN])


def _conversations(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `chats` and `images` of rows whose data set keeps them, see `build_dataset`."""
    if not all("input_ids" in row and "chat" in row for row in rows):
        return {}
    images = [tuple(stored_image(record) for record in row.get("images") or ()) for row in rows]
    return {"chats": [row["chat"] for row in rows], "images": images}


@contextmanager
def _naming(row: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except RowError as error:
        raise DataError(f"{_named(row)}: {error}") from error


def _named(row: Mapping[str, Any]) -> str:
    return f"row {show(row['row_id'], 60)}" if row.get("row_id") else "a row"
