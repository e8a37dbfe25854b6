"""The evaluation loop of `kdtrain evaluate`: sums over each row, of one student beside one teacher.

Shapes: R rows, B of them in a batch, S supervised tokens of a batch.

Every figure is a sum over supervised tokens, kept by row: a mean over tokens depends neither on how rows are batched,
padded, ordered or dealt to ranks, and what is drawn from rows (the intervals) has them. A student goes through the same
forward as in training, to hidden states and a head; it is not wrapped, since it gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from kdtrain.data.batch import Batch
from kdtrain.errors import NonFiniteError
from kdtrain.losses.comparison import (
    Comparison,
    MeanScores,
    Predictions,
    Scores,
    calibration_sums,
    compare,
)
from kdtrain.losses.mixture import MixedTopK
from kdtrain.losses.sampled import SparseTargets
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers import DenseTargets, Targets, Teacher, teacher_autocast
from kdtrain.teachers.base import AnyTargets, MixedTargets, RoutedTargets
from kdtrain.teachers.base import Scores as TargetScores
from kdtrain.teachers.by_row import Scored, scored
from kdtrain.teachers.forward import ModelForward
from kdtrain.trainer.figures import RowSums


class Token(NamedTuple):
    """A supervised token."""

    id: int
    forward_kl: float | None
    """KL(T‖S) where it is predicted, nats; None where the teacher says nothing of it, or it is infinite."""
    reverse_kl: float | None
    """KL(S‖T)."""


class Evaluation:
    """Rows that students are evaluated on, beside a teacher or alone.

    Args:
        rows: encoded, as of `kdtrain.data.build_dataset`.
        collate: makes batches of them.
        teacher: placed; None compares with nobody.
        columns: leading tokens of the vocabulary that student and teacher share; the student's own without a teacher.
        batch_size: rows of a forward; figures do not depend on it.
    """

    def __init__(
        self,
        rows: Dataset,
        collate: Callable[[list[dict[str, Any]]], Batch],
        *,
        teacher: Teacher | None,
        columns: int,
        batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        self._rows, self._collate, self._teacher, self._columns = rows, collate, teacher, columns
        self._accelerator = accelerator
        # The longest first: if memory is short, that is known at once; and rows of a length have little padding.
        lengths = [len(ids) for ids in rows["input_ids"]]
        order = sorted(range(len(rows)), key=lambda i: -lengths[i])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self._batches = batches[accelerator.process_index :: accelerator.num_processes]
        self._asked: dict[int, AnyTargets] = {}
        """What is small enough to keep and dear to ask for again: targets that are no hidden states."""
        self.teacher_sums: RowSums | None = None
        """The teacher's own, once a student was measured beside it."""

    def measure(self, model: nn.Module, progress: Callable[[int, int], None] = lambda done, total: None) -> RowSums:
        """The sums of a student, on all rows; a collective.

        Args:
            progress: called with the number of rows that are done, about, and of all rows.

        Raises:
            NonFiniteError: its predictions are no numbers.
            TeacherError: the teacher gives no answer.
        """
        sums, of_teacher = (RowSums.empty(len(self._rows)) for _ in range(2))
        done = 0
        for one in self._predicted(model):
            _add_predictions(sums, one.row_S, one.own, one.labelled_S)
            if one.beside is not None:
                covered_S = one.beside.covered_S
                row_C = one.row_S[covered_S.numpy()]
                _add_comparison(sums, row_C, one.beside.between)
                _add_predictions(of_teacher, row_C, one.beside.teacher, one.labelled_S[covered_S])
            done += one.rows * self._accelerator.num_processes
            progress(min(done, len(self._rows)), len(self._rows))
        if self._teacher is not None and self.teacher_sums is None:
            self.teacher_sums = of_teacher.over_ranks()
        return sums.over_ranks()

    def tokens(self, model: nn.Module) -> list[list[Token]]:
        """The supervised tokens of each row, and how a student and the teacher differ there; a collective.

        Raises: as `measure`.
        """
        found: dict[int, list[Token]] = {}
        for one in self._predicted(model):
            kls: list[list[float | None]] = [[None] * len(one.row_S) for _ in range(2)]
            if one.beside is not None:
                places = one.beside.covered_S.nonzero()[:, 0].tolist()
                of_both = (one.beside.between.forward_kl, one.beside.between.reverse_kl)
                for own, values in zip(kls, of_both, strict=True):
                    for place, value in zip(places, values.tolist(), strict=True):
                        own[place] = value if math.isfinite(value) else None
            for row, *token in zip(one.row_S.tolist(), one.ids_S, *kls, strict=True):
                found.setdefault(row, []).append(Token(*token))
        for other in gather_object([found]):
            found |= other
        return [found.get(row, []) for row in range(len(self._rows))]

    def _predicted(self, model: nn.Module) -> Iterator[_Predicted]:
        """The batches of this rank, with what a student predicts there."""
        if getattr(model, "hf_device_map", None) is None:
            model.to(self._accelerator.device)
        student = partial(ModelForward(model, keeps_head=True), model.eval())
        for number, batch in self._prepared():
            rows = self._batches[number]
            row_S = np.array(rows)[batch.predicts_BT.nonzero()[:, 0].cpu().numpy()]
            labelled_S = batch.ce_mask_S
            labelled_S = torch.ones(len(row_S), dtype=torch.bool) if labelled_S is None else labelled_S.cpu()
            own, beside = self._compared(student, number, batch)
            rank, names = self._accelerator.process_index, self._names(rows, batch)
            _check_finite("student", own.ce.isfinite(), row_S, names, rank)
            if beside is not None:  # of what a top-k teacher does not name, its cross-entropy is infinite
                _check_finite("teacher", ~beside.teacher.ce.isnan(), row_S[beside.covered_S.numpy()], names, rank)
            yield _Predicted(len(rows), row_S, batch.labels_S.tolist(), labelled_S, own, beside)

    def _prepared(self) -> Iterator[tuple[int, Batch]]:
        """The batches on the device; the teacher hears of each one batch before its targets are wanted."""
        waiting: list[tuple[int, Batch]] = []
        for number, rows in enumerate(self._batches):
            batch = self._collate([self._rows[i] for i in rows]).to(self._accelerator.device)
            if self._teacher is not None and number not in self._asked:
                self._teacher.prepare([batch])
            waiting.append((number, batch))
            if len(waiting) == 2:
                yield waiting.pop(0)
        yield from waiting

    def _compared(
        self, student: Callable[[Batch], Targets], number: int, batch: Batch
    ) -> tuple[Predictions, _Beside | None]:
        """The student's predictions of all supervised tokens, and how those that the teacher answers for compare."""
        with torch.no_grad(), teacher_autocast(self._accelerator):
            targets = self._targets(number, batch)
            # What the student reads, where the teacher reads something else.
            seen = replace(batch, teacher_tokens=None, teacher_images=None)
            scores, labels_S = comparable(student(seen).scores, self._columns), batch.labels_S
            assert isinstance(scores, Scores), "a model in this process has all of its distribution"
            known = [] if targets is None else scored(targets, batch)
            both = [(one, comparable(one.scores, self._columns)) for one in known]
            of_teachers = [(one, teacher) for one, teacher in both if teacher is not None]
            if not of_teachers:
                return compare(scores, labels_S)[0], None
            if len(of_teachers) == 1 and of_teachers[0][0].tokens_S is None:
                own, teacher, between = compare(scores, labels_S, of_teachers[0][1])
                all_S = torch.ones(len(labels_S), dtype=torch.bool)
                return own, None if teacher is None or between is None else _Beside(all_S, teacher, between)
            return compare(scores, labels_S)[0], _beside(scores, labels_S, of_teachers)

    def _targets(self, number: int, batch: Batch) -> AnyTargets | None:
        """The teacher's, asked for once where they are dear and small: of several students, all see the same."""
        if self._teacher is None:
            return None
        if number in self._asked:
            return self._asked[number]
        targets, again = (
            self._teacher.targets(batch),
            not self._teacher.answers_anything,
        )  # what is stored is read again
        if not again and all(isinstance(one.scores, SparseTargets) for one in scored(targets, batch)):
            self._asked[number] = _on_cpu(targets)
        return targets

    def _names(self, rows: Sequence[int], batch: Batch) -> dict[int, str]:
        return {row: batch.rows.name(i) for i, row in enumerate(rows)}


@dataclass(frozen=True)
class _Predicted:
    """A batch of so many rows, and what a student predicts of its tokens."""

    rows: int
    row_S: np.ndarray
    ids_S: list[int]
    labelled_S: torch.Tensor
    own: Predictions
    beside: _Beside | None


@dataclass(frozen=True)
class _Beside:
    """What the teacher says of the tokens that it answers for, C of the batch's S, and how the student compares."""

    covered_S: torch.Tensor
    teacher: Predictions
    between: Comparison


def _beside(
    student: Scores, labels_S: torch.Tensor, of_teachers: Sequence[tuple[Scored, Scores | TopKLogprobs]]
) -> _Beside | None:
    """What several teachers say of the tokens of a batch, each of its own; in the order of the tokens."""
    parts, places = [], []
    for one, teacher in of_teachers:
        tokens_S = torch.ones(len(labels_S), dtype=torch.bool) if one.tokens_S is None else one.tokens_S.cpu()
        some = replace(student, outputs=student.outputs[tokens_S.to(student.outputs.device)])
        _, predictions, between = compare(some, labels_S[tokens_S.to(labels_S.device)], teacher)
        if predictions is not None and between is not None:
            parts.append((predictions, between))
            places.append(tokens_S.nonzero()[:, 0])
    if not parts:
        return None
    order = torch.cat(places).argsort()
    covered_S = torch.zeros(len(labels_S), dtype=torch.bool)
    covered_S[torch.cat(places)] = True
    joined = [_in_order(kind, order) for kind in zip(*parts, strict=True)]
    return _Beside(covered_S, *joined)


def _in_order(parts: Sequence[Any], order: torch.Tensor) -> Any:
    """Predictions or comparisons of several parts as one, in the order of the tokens."""
    return type(parts[0])(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts])[order] for field in fields(parts[0])}
    )


def _on_cpu(targets: AnyTargets) -> AnyTargets:
    if isinstance(targets, Targets):
        scores = targets.scores
        return replace(targets, scores=scores.to(torch.device("cpu"))) if isinstance(scores, SparseTargets) else targets
    parts = []
    for part in targets.parts:
        own = _on_cpu(part.targets)
        assert isinstance(own, Targets)
        parts.append(replace(part, targets=own))
    return RoutedTargets(tuple(parts))


def comparable(found: TargetScores, columns: int) -> Scores | TopKLogprobs | None:
    """Targets as distributions that can be compared; None of those that cannot, such as drawn tokens.

    Args:
        columns: see `Scores`.
    """
    if isinstance(found, MixedTargets):
        parts = [one for part in found.parts if isinstance(one := comparable(part, columns), Scores)]
        return MeanScores.of(parts, found.shares)
    if isinstance(found, MixedTopK):
        return found.at_one(columns)
    if isinstance(found, DenseTargets):
        return Scores(found.hidden, found.head, columns)
    if isinstance(found, torch.Tensor):
        return Scores(found, None, columns)
    return found if isinstance(found, TopKLogprobs) else None


_WRONG = {
    "student": "The model gives no number",
    "teacher": "The teacher gives no number",
}
_REMEDY = {
    "student": "its weights hold NaN or infinities, or its dtype is too small for it. Evaluate an earlier checkpoint",
    "teacher": "its weights hold NaN or infinities, or its dtype is too small for it (rlhf.teacher.dtype)",
}


def _check_finite(
    side: Literal["student", "teacher"], good_S: torch.Tensor, row_S: np.ndarray, names: dict[int, str], rank: int
) -> None:
    wrong = (~good_S).nonzero()[:, 0].tolist()
    if wrong:
        rows = list(dict.fromkeys(names[int(row_S[i])] for i in wrong))
        raise NonFiniteError(
            f"{_WRONG[side]} for a token of row {rows[0]} ({len(wrong)} tokens of its batch are like it): "
            f"{_REMEDY[side]}.",
            {"step": None, "during": "evaluate", "origin": [side], "ranks": [{"rank": rank, "rows": rows}]},
        )


def _add(sums: RowSums, rows: np.ndarray, name: str, values: torch.Tensor) -> None:
    np.add.at(sums.column(name), rows, values.double().numpy())


def _add_predictions(sums: RowSums, row_S: np.ndarray, found: Predictions, labelled_S: torch.Tensor) -> None:
    _add(sums, row_S, "tokens", torch.ones(len(row_S)))
    _add(sums, row_S, "labelled", labelled_S)
    for name in ("ce", "ce_known", "correct"):
        _add(sums, row_S, name, getattr(found, name) * labelled_S)
    sums.bins += calibration_sums(found.confidence[labelled_S], found.correct[labelled_S]).numpy()


def _add_comparison(sums: RowSums, row_C: np.ndarray, found: Comparison) -> None:
    _add(sums, row_C, "compared", torch.ones(len(row_C)))
    for name in ("forward_kl", "reverse_kl", "agree", "overlap", "exact"):
        _add(sums, row_C, name, getattr(found, name))
