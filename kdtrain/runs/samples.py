"""What the models of an evaluation answer to its prompts: some answers side by side, and how many of all are right.

Every model answers greedily: rows that are shown, and rows with a column `answer` that theirs is checked against.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from accelerate.utils import gather_object

from kdtrain.config import RunConfig
from kdtrain.data import Collator
from kdtrain.data.checked_answers import says
from kdtrain.data.segments import token_texts
from kdtrain.errors import DataError
from kdtrain.generation.generate import refuse_marked_answers
from kdtrain.generation.writers import LocalWriter
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.models.merging import merged
from kdtrain.ranks import is_main
from kdtrain.runs.prompts import as_prompts, with_answers
from kdtrain.trainer.evaluation import Token

logger = logging.getLogger(__name__)

SHOWN = 8
"""Rows whose answers are shown."""

_ORDER = ("before", "after", "against", "teacher")

TokenText = tuple[str, float | None]
"""The text of a token and a divergence there, nats; None where the teacher says nothing of it."""


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers to it."""

    where: str
    """`file:line`."""
    prompt: str
    reference: str
    """The answer of the data."""
    answers: dict[str, str | None]
    """Of `before`, `after` and `teacher` (None where it writes nothing), and of `against`."""
    reference_tokens: list[TokenText]
    """KL(T‖S after) at each token of the reference."""
    after_tokens: list[TokenText]
    """KL(S after‖T) at each token of the answer of `after`."""


class Asked:
    """The rows that models answer, and what they have answered.

    Args:
        rows: of the evaluation.
        shown: of the rows that are shown their place, by `row_id`.
        vocabulary: token ids that all models know.
        progress: called with the model, the number of answers that there are, and of all.
    """

    def __init__(
        self,
        config: RunConfig,
        rows: datasets.Dataset,
        shown: Mapping[str, str],
        collator: Collator,
        *,
        vocabulary: int,
        batch_size: int,
        device: Any,
        rank: tuple[int, int],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._config, self._collator, self._shown, self._progress = config, collator, shown, progress
        self._vocabulary, self._batch_size, self._device, self._rank = vocabulary, batch_size, device, rank
        self._tokenizer: Any = getattr(collator.processing_class, "tokenizer", collator.processing_class)
        self.written: dict[str, list[list[int] | None]] = {}
        """Token ids that each model has written to each row; None where it has not."""
        lengths = rows["prompt_length"][:]
        answers = rows["answer"][:] if "answer" in rows.column_names else [None] * len(rows)
        first = {row_id: i for i, row_id in reversed(list(enumerate(rows["row_id"][:])))}
        own = {first[row_id] for row_id in shown if row_id in first}
        own |= {i for i, answer in enumerate(answers) if answer is not None and lengths[i]}
        self._numbers = sorted(own)
        self.rows = rows.select(self._numbers)
        self.prompts = as_prompts(self.rows)
        self._answers = [answers[i] for i in self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def check(self, model: Any) -> None:
        """Raise what keeps a model like the student from answering: a DataError or a NotAvailableError."""
        self._room(model)
        batch = self._collator([self.prompts[0]])
        if "token_type_ids" in batch.token_level:
            refuse_marked_answers(model)

    def ask(self, name: str, model: Any, *, of_teacher: bool = False) -> None:
        """Let a model in this process answer; a collective."""
        writer = LocalWriter(
            model,
            self._collator.processing_class,
            self._collator,
            max_new_tokens=self._room(model),
            vocabulary=self._vocabulary,
            batch_size=self._batch_size,
            device=self._device,
            side="teacher" if of_teacher else "student",
        )
        rank, ranks = self._rank
        lengths = self.prompts["prompt_length"][:]
        order = sorted(range(len(self)), key=lambda i: -lengths[i])[rank::ranks]
        found: dict[int, list[int]] = {}

        def keep(answers: Sequence[tuple[int, Any]]) -> None:
            found.update((i, list(one.ids)) for i, one in answers)
            self._progress(name, min(len(found) * ranks, len(self)), len(self))

        with merged(model, self._config.rlhf.most_new_tokens):
            writer.write(self.prompts, order, [None] * len(self), keep)
        for other in gather_object([found]):
            found |= other
        self.written[name] = [found[i] for i in range(len(self))]
        self._note_cut(name, writer.stops)

    def take(self, name: str, answered: datasets.Dataset) -> None:
        """Take over what a model has answered elsewhere: rows of `prompts` with answers, maybe not all of them."""
        ids = {row["row_id"]: row["input_ids"][row["prompt_length"] :] for row in answered}
        self.written[name] = [ids.get(row_id) for row_id in self.prompts["row_id"][:]]

    def _room(self, model: Any) -> int:
        """New tokens of an answer: those of the config, as far as the model has positions for them."""
        most, longest = self._config.rlhf.most_new_tokens, max(self.prompts["prompt_length"][:])
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is None or longest + most <= positions:
            return most
        if longest >= positions:
            raise DataError(f"a prompt has {longest} tokens, and a model {positions} positions")
        return int(positions) - longest

    def _note_cut(self, name: str, stops: frozenset[int]) -> None:
        checked = [ids for ids, answer in zip(self.written[name], self._answers, strict=True) if answer and ids]
        cut = sum(stops.isdisjoint(ids[-1:]) for ids in checked)
        if 10 * cut > len(checked) and is_main():
            logger.warning(
                "%s: %d of %d answers that are checked reached rlhf.max_new_tokens (%d) and were cut. If there is more "
                "to say, raise it: rlhf.max_new_tokens=…",
                name,
                cut,
                len(checked),
                self._config.rlhf.most_new_tokens,
            )

    def right(self, name: str) -> np.ndarray | None:
        """Of the rows with an answer, 1.0 where a model says the same; None without any, or without its answers."""
        checked = [i for i, answer in enumerate(self._answers) if answer is not None]
        if not checked or any(self.written.get(name, [None] * len(self))[i] is None for i in checked):
            return None
        texts = self._tokenizer.batch_decode([self.written[name][i] for i in checked], skip_special_tokens=True)
        expression = self._config.rlhf.select_regex
        pairs = zip(texts, (self._answers[i] for i in checked), strict=True)
        return np.array([float(says(text, str(answer), expression)) for text, answer in pairs])

    # ---- those that are shown ----------------------------------------------------------------------------------------

    @property
    def _shown_rows(self) -> list[int]:
        found: dict[str, int] = {}
        for i, row_id in enumerate(self.rows["row_id"][:]):
            if row_id in self._shown:
                found.setdefault(row_id, i)
        return list(found.values())

    def references(self) -> datasets.Dataset:
        """The shown rows as they are."""
        rows = self.rows.select(self._shown_rows)
        return rows.remove_columns("answer") if "answer" in rows.column_names else rows

    def answered_by(self, name: str) -> datasets.Dataset:
        """The shown rows with a model's answers."""
        own = self._shown_rows
        return with_answers(self.rows.select(own), [self.written[name][i] or [] for i in own])

    def samples(self, reference: Sequence[Sequence[Token]], after: Sequence[Sequence[Token]]) -> list[Sample]:
        """The shown rows.

        Args:
            reference: the tokens of `references`, by row.
            after: those of `answered_by("after")`.
        """
        found = []
        for i, own, of_after in zip(self._shown_rows, reference, after, strict=True):
            row = self.rows[i]
            start = row["prompt_length"]
            answer = [label for label in row["labels"][start:] if label != IGNORE_INDEX]
            last_turn = own[len(own) - len(answer) :]
            found.append(
                Sample(
                    where=self._shown[row["row_id"]],
                    prompt=self._text(row["input_ids"][:start]),
                    reference=self._text(answer),
                    answers=self._answers_to(i),
                    reference_tokens=self._texts(last_turn, [one.forward_kl for one in last_turn]),
                    after_tokens=self._texts(of_after, [one.reverse_kl for one in of_after]),
                )
            )
        return found

    def _answers_to(self, i: int) -> dict[str, str | None]:
        names = [name for name in _ORDER if name != "against" or name in self.written]
        found = {name: self.written[name][i] if name in self.written else None for name in names}
        return {name: None if ids is None else self._text(ids) for name, ids in found.items()}

    def _texts(self, tokens: Sequence[Token], values: Sequence[float | None]) -> list[TokenText]:
        return list(zip(token_texts(self._tokenizer, [one.id for one in tokens]), values, strict=True))

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
