"""A processor of transformers, as far as data needs it: how images lengthen a text, and the tensors they become.

A processor replaces each image placeholder of the rendered conversation by as many tokens as the image takes, and
tokenises the result. Families differ in everything about it (row and column tokens, line breaks that merge with their
neighbours, one token for text and another for ids), so nothing is rebuilt here: the processor runs, the text that it
hands to its tokenizer is recorded, and the turns are found again in it (alignment.py).
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import ProcessorMixin

from kdtrain.data.alignment import Alignment
from kdtrain.data.chat_template import Rendered
from kdtrain.data.errors import RowError, said, show
from kdtrain.data.images import Image, ImageError
from kdtrain.errors import DataError

_TEXT_TENSORS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Processed:
    """One row as its processor returns it."""

    ids: list[int]
    token_tensors: dict[str, torch.Tensor]  # the others with one entry per token, such as `token_type_ids`, [1, T, ...]
    visual: dict[str, torch.Tensor]  # such as `pixel_values`; what their first axis counts differs between families
    notes: tuple[str, ...] = ()  # what was changed of the images before the processor saw them
    sizes: tuple[int, ...] = ()  # width and height of each image in pixels, one behind the other


class Multimodal:
    """What a processor with images does.

    Attributes:
        placeholder: what a rendered conversation says where an image belongs; empty where the processor does not say.
        image_ids: ids of the tokens that stand for parts of images (or videos, or sounds): never text.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        placeholder = getattr(processor, "image_token", None)
        self.placeholder = placeholder if isinstance(placeholder, str) else ""
        self.image_ids = self._image_ids()
        names = self.tokenizer.convert_ids_to_tokens(sorted(self.image_ids))
        self._reserved = tuple(dict.fromkeys([self.placeholder, *names] if self.placeholder else names))

    def _image_ids(self) -> frozenset[int]:
        found: set[Any] = set()
        for holder in (self.processor, self.tokenizer):
            for name in (f"{modality}_token_id{s}" for modality in ("image", "video", "audio") for s in ("", "s")):
                ids = getattr(holder, name, None)
                # Lists and single ids: a tokenizer with an image token answers to the plural name with a number, too.
                found |= set(ids) if isinstance(ids, list | tuple | set | frozenset) else {ids}
        if self.placeholder:
            found.add(self.tokenizer.convert_tokens_to_ids(self.placeholder))
        return frozenset(i for i in found if isinstance(i, int) and i != self.tokenizer.unk_token_id)

    def refuse_text(self, texts: Sequence[str]) -> None:
        """Refuses text that literally says what stands for an image: the model would look for one there."""
        for text in texts:
            if name := next((name for name in self._reserved if name in text), None):
                raise RowError(
                    f"the text says {show(name, 60)}, which stands for an image in this model: remove it, or give the "
                    "row as many images as it has placeholders"
                )

    def refuse_ids(self, ids: Sequence[int]) -> None:
        """Refuses the same in the ids of a row without images."""
        if not self.image_ids.isdisjoint(ids):
            wrong = next(i for i in ids if i in self.image_ids)
            self.refuse_text([str(self.tokenizer.convert_ids_to_tokens(wrong))])

    def process(self, text: str, images: Sequence[Any], recorder: Recorder | None = None) -> Processed:
        """Runs the processor on one rendered conversation, with a placeholder in it for each of the PIL images."""
        processor = self.processor
        if recorder is not None:
            processor = copy.copy(processor)
            processor.tokenizer = recorder
        # The row's list in a list, as `apply_chat_template` gives it: in a flat one each image is a row of its own for
        # some families (LLaVA-OneVision), which make more of it then.
        arguments = {"images": [list(images)]} if images else {}
        try:
            # The chat template has written the special tokens already.
            out = processor(text=[text], add_special_tokens=False, return_tensors="pt", **arguments)
        except Exception as error:  # each processor has its own ways to refuse an image
            if missing := missing_setting(processor):
                name = type(processor).__name__
                raise DataError(f"{name} has no {missing}, without which it cannot count an image's tokens") from error
            raise ImageError(f"{type(self.processor).__name__} refuses the row: {said(error)}") from error
        if odd := [name for name, value in out.items() if not isinstance(value, torch.Tensor) or not value.dim()]:
            raise DataError(f"{type(self.processor).__name__} returns no tensor of rows or images for {', '.join(odd)}")
        ids = out["input_ids"][0].tolist()
        rest = {name: value for name, value in out.items() if name not in _TEXT_TENSORS}
        token = {name: value for name, value in rest.items() if tuple(value.shape[:2]) == (1, len(ids))}
        return Processed(ids, token, {name: value for name, value in rest.items() if name not in token})

    def expand(self, rendered: Rendered, images: Sequence[Image]) -> tuple[Rendered, int, Processed]:
        """The text that the processor tokenises, with the assistant's turns in it.

        Also the character after its last image, and what the processor made of it.
        """
        if not self.placeholder:
            raise DataError(
                f"{type(self.processor).__name__} does not say which token stands for an image (image_token), so rows "
                "with images cannot be encoded"
            )
        if "suffix" in inspect.signature(type(self.processor).__call__).parameters:  # PaliGemma's
            raise DataError(
                f"{type(self.processor).__name__} takes prompt and answer apart and adds tokens of its own to "
                "them, so rows with images are not available for it yet: take a vision-language model with a chat "
                "template"
            )
        placeholders = rendered.text.count(self.placeholder)
        if placeholders != len(images):
            raise RowError(
                f"the chat template renders {placeholders} image placeholders ({show(self.placeholder, 60)}) for "
                f"{len(images)} images: use the template of the vision model"
            )
        # The ids alone do not say which characters they stand for; the recorded text can be tokenised with offsets.
        recorder = Recorder(self.tokenizer)
        loaded = [image.load_noted() for image in images]
        pixels = [image for image, _ in loaded]
        processed = replace(
            self.process(rendered.text, pixels, recorder),
            notes=tuple(dict.fromkeys(note for _, notes in loaded for note in notes)),
            sizes=tuple(side for image in pixels for side in image.size),
        )
        if len(recorder.texts) != 1:
            raise DataError(
                f"{type(self.processor).__name__} tokenises a row in {len(recorder.texts)} pieces, so the assistant's "
                "tokens cannot be told from the rest"
            )
        expanded = recorder.texts[0]
        alignment = Alignment(rendered.text, expanded, self.placeholder)
        return rendered.moved(expanded, alignment.char), alignment.last_start, processed

    def images_end(self, ids: Sequence[int]) -> int:
        """How many leading tokens reach up to and including the last one that stands for a part of an image."""
        return next((i + 1 for i in range(len(ids) - 1, -1, -1) if ids[i] in self.image_ids), 0)

    @cached_property
    def text_tensors(self) -> tuple[str, ...]:
        """Names of the `token_tensors` that the processor makes for text alone."""
        try:
            return tuple(self.process("a", []).token_tensors)
        except RowError:  # some processors take no text without an image, and so make nothing for it
            return ()

    @cached_property
    def by_row(self) -> frozenset[str]:
        """Names of the visual tensors whose first axis counts rows, not images: of one row with two images."""
        from PIL import Image as Pillow

        images = [Pillow.new("RGB", (64, 64), color) for color in ("red", "blue")]
        try:
            visual = self.process(f"a{self.placeholder}b{self.placeholder}", images).visual
        except RowError as error:
            raise DataError(
                f"rows with and without images cannot share a batch: {error}. Keep them in separate runs, or use "
                "per_device_train_batch_size: 1"
            ) from error
        return frozenset(name for name, value in visual.items() if len(value) == 1)


def reads_images(processing_class: Any) -> bool:
    """False for a tokenizer, or a processor without images."""
    found = getattr(processing_class, "image_processor", None)
    return isinstance(processing_class, ProcessorMixin) and found is not None


def missing_setting(processor: Any) -> str | None:
    """What a processor counts an image's tokens by and does not know; saved folders may lack it."""
    takes = inspect.signature(type(processor).__init__).parameters
    names = (name for name in ("patch_size", "num_image_tokens") if name in takes)
    return next((name for name in names if getattr(processor, name, None) is None), None)


def multimodal(processing_class: Any) -> Multimodal | None:
    return Multimodal(processing_class) if reads_images(processing_class) else None


def image_token_ids(processing_class: Any) -> list[int]:
    """Ids that stand for parts of images, videos or sounds, which no model may write; none for a tokenizer."""
    model = multimodal(processing_class)
    return [] if model is None else sorted(model.image_ids)


def tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    """Everything about a fast tokenizer that changes ids."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None)  # both change with every call that pads or truncates
    content.pop("truncation", None)
    content["split_special_tokens"] = tokenizer.split_special_tokens
    return {"tokenizer": content, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}


def image_content(processing_class: Any) -> dict[str, Any]:
    """Everything about a processor that changes ids or tensors of images, which its chat template does not."""
    if not reads_images(processing_class):
        return {}
    settings = processing_class.to_dict()
    settings["image_processor"] = processing_class.image_processor.to_dict()
    settings.pop("chat_template", None)
    content: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True, default=str))
    return content


class Recorder:
    """Stands in for a processor's tokenizer and keeps the texts that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.texts += [text] if isinstance(text, str) else list(text or [])
        return self._tokenizer(text, *args, **kwargs)
