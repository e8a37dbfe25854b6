"""Who writes the answers of `answers: teacher`: a model in this process, batch by batch, or a teacher of its own means.

A writer is given prompts and hands over answers as they come; what is kept of them, and where, is not its business.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import datasets
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.data.batch import Batch
from kdtrain.data.conversation import for_teacher
from kdtrain.data.images import stored_image
from kdtrain.errors import NonFiniteError, NotAvailableError
from kdtrain.generation.decode import NonFiniteLogits
from kdtrain.generation.generate import completions
from kdtrain.generation.message_answers import MessageEncoder
from kdtrain.generation.sampling import generation_config, stable_seed, token_roles
from kdtrain.models.probe import Side
from kdtrain.models.vocabulary import vocabulary_size
from kdtrain.ranks import rank
from kdtrain.teachers.base import Prompt, Sampling, Teacher, Written

logger = logging.getLogger(__name__)

Collate = Callable[[list[dict[str, Any]]], Batch]
Done = Callable[[Sequence[tuple[int, Written]]], None]
"""Called with the numbers of rows and their answers; perhaps in another thread, but never twice at a time."""


_IN_FLOAT32 = {"teacher": "rlhf.teacher_model_init_kwargs: {dtype: float32}", "student": "model.dtype: float32"}


class Writer(Protocol):
    """Writes answers."""

    settings: Mapping[str, Any]
    """What answers depend on beside the prompt and whatever names the teacher."""
    stops: frozenset[int]
    """Tokens that end an answer."""

    encoder: MessageEncoder | None
    """Makes tokens of answers that are messages, where they are."""

    def announce(self, dataset: datasets.Dataset, rows: Sequence[int]) -> None:
        """Say what answering some rows of a data set will take."""

    def write(self, dataset: datasets.Dataset, rows: Sequence[int], keys: Sequence[str | None], done: Done) -> None:
        """Answer some rows of a data set, in any order; `keys` names the prompts of all of its rows."""


class LocalWriter:
    """A model in this process, which writes greedily.

    Args:
        model: put on the device and into eval mode.
        processing_class: what the rows were encoded with.
        vocabulary: token ids that both models know; the model's others (padding) are never generated.
        side: whose prompts it reads, where student and teacher read other ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: Any,
        collate: Collate,
        *,
        max_new_tokens: int,
        vocabulary: int,
        batch_size: int,
        device: Any,
        side: Side = "teacher",
    ) -> None:
        if is_deepspeed_zero3_enabled():
            raise NotAvailableError(
                "answers: teacher is not available under DeepSpeed ZeRO-3, which keeps the teacher in pieces until "
                "training begins: generate them in a run of its own (training.max_steps: 1) without it."
            )
        roles = token_roles(processing_class, model, range(vocabulary, vocabulary_size(model)))
        self._config = generation_config(roles.stop, roles.pad, None, max_new_tokens, roles.forbidden)
        self._collate, self._batch_size, self._device = collate, batch_size, device
        if getattr(model, "hf_device_map", None) is None:
            model.to(device)
        self._model, self._side = model.eval(), side
        self.stops = frozenset(roles.stop)
        self.encoder: MessageEncoder | None = None
        self.settings: Mapping[str, Any] = {
            "stops": roles.stop,
            "max_new_tokens": max_new_tokens,
            "vocabulary": vocabulary,
        }

    def announce(self, dataset: datasets.Dataset, rows: Sequence[int]) -> None:
        """Nothing: it costs time alone, which the progress shows."""

    def write(self, dataset: datasets.Dataset, rows: Sequence[int], keys: Sequence[str | None], done: Done) -> None:
        """See `Writer.write`."""
        for start in range(0, len(rows), self._batch_size):
            some = rows[start : start + self._batch_size]
            batch = self._collate([dataset[i] for i in some])
            seen = batch.as_teacher_sees_it() if self._side == "teacher" else batch
            answers = self._completions(seen.to(self._device))
            done([(i, Written(ids, self.stops.isdisjoint(ids))) for i, ids in zip(some, answers, strict=True)])

    def _completions(self, batch: Batch) -> list[list[int]]:
        try:
            return completions(self._model, batch, self._config, seeds=[0] * len(batch))
        except NonFiniteLogits as error:
            what = str(error).removeprefix("not finite: ")
            raise NonFiniteError(
                f"Not finite while the {self._side} wrote answers: {what}. Load it in "
                f"float32 ({_IN_FLOAT32[self._side]}), or look at its weights.",
                {"step": None, "during": "answers", "origin": [self._side], "ranks": [{"rank": rank(), **error.facts}]},
            ) from error


class AskingWriter:
    """A teacher that writes by `Teacher.write`.

    Args:
        sampling: how it writes.
        seed: of the run, which the seed of each answer is made of.
        vocabulary: token ids that the student can be taught.
        encoder: for a teacher that answers in messages.
    """

    def __init__(
        self,
        teacher: Teacher,
        sampling: Sampling,
        *,
        seed: int,
        vocabulary: int,
        encoder: MessageEncoder | None = None,
    ) -> None:
        self._teacher, self._sampling, self._seed, self.encoder = teacher, sampling, seed, encoder
        self.stops = frozenset(sampling.stop_ids)
        settings: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens}
        if sampling.temperature is not None:  # what the most likely token is does not depend on a seed
            settings |= {"temperature": sampling.temperature, "seed": seed}
        if encoder is None:  # of messages, tokens are made later
            settings |= {"stops": list(sampling.stop_ids), "vocabulary": vocabulary}
        self.settings: Mapping[str, Any] = settings

    def announce(self, dataset: datasets.Dataset, rows: Sequence[int]) -> None:
        """Rows and tokens, which may cost money, before the first request."""
        names = [name for name in ("prompt_length", "teacher_prompt_length") if name in dataset.column_names]
        own, *teacher = dataset.select_columns(names)[:].values()
        lengths = [other or mine for mine, other in zip(own, *teacher or [own], strict=True)]
        logger.info(
            "The teacher is asked for %s answers: about %s prompt tokens, and up to %s tokens of answers.",
            f"{len(rows):,}",
            f"{sum(lengths[i] for i in rows):,}",
            f"{len(rows) * self._sampling.max_new_tokens:,}",
        )

    def write(self, dataset: datasets.Dataset, rows: Sequence[int], keys: Sequence[str | None], done: Done) -> None:
        """See `Writer.write`."""
        asked = [self._prompt(dataset[i], str(keys[i])) for i in rows]
        self._teacher.write(asked, self._sampling, lambda i, written: done([(rows[i], written)]))

    def _prompt(self, row: Mapping[str, Any], key: str) -> Prompt:
        chat = row.get("chat")
        if chat is not None:
            images = [stored_image(record) for record in row.get("images") or ()]
            chat = {**for_teacher(json.loads(chat)), "images": images}
        return Prompt(prompt_ids(row), seed=stable_seed(f"answer:{self._seed}:{key}"), chat=chat)


def prompt_ids(row: Mapping[str, Any]) -> list[int]:
    """The prompt of an encoded row as the teacher reads it."""
    prefix = "" if row.get("teacher_input_ids") is None else "teacher_"
    return list(row[f"{prefix}input_ids"][: row[f"{prefix}prompt_length"]])
