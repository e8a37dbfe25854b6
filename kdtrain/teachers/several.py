"""Several teachers (`rlhf.teachers`): each row has one of them, or all answer for every row and their mean teaches.

Each is loaded once and goes through everything a single one does, under its own name.

Shapes: B rows, S supervised tokens of a batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from kdtrain.data.batch import Batch
from kdtrain.data.regroup import taken
from kdtrain.data.route import wrong_name
from kdtrain.data.visual_batch import CannotShareError
from kdtrain.errors import ConfigError, DataError, NotAvailableError
from kdtrain.losses.mixture import MixedTopK
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.ranks import is_main
from kdtrain.teachers.base import (
    AnyTargets,
    DenseTargets,
    MixedTargets,
    Prompt,
    RoutedPart,
    RoutedTargets,
    Sampling,
    Scores,
    Targets,
    Teacher,
    Written,
)


class SeveralTeachers(Teacher):
    """What holds for teachers by name, however their answers are used.

    Args:
        teachers: by name; each is given its name.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        if not teachers:
            raise ConfigError("teachers: none is given.")
        self.by_name = dict(teachers)
        for name, teacher in self.by_name.items():
            teacher.name = name
        ahead = max(teacher.lookahead for teacher in self.members)
        for teacher in self.members:
            if teacher.waits:  # windows come to all of them as far ahead, and none may be forgotten meanwhile
                teacher.lookahead = ahead
        self.rows_asked: Counter[str] = Counter()
        """Rows that each one was asked about, while training and in evaluations."""

    @property
    def members(self) -> Sequence[Teacher]:
        """See `Teacher.members`."""
        return list(self.by_name.values())

    @property
    def vocab_size(self) -> int:  # type: ignore[override]  # of models that may come later, see `follow`
        """Of the one with the most columns."""
        return max(teacher.vocab_size for teacher in self.members)

    @property
    def in_pieces(self) -> bool:  # type: ignore[override]
        """Whether one of them is."""
        return any(teacher.in_pieces for teacher in self.members)

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        """Of the one that is asked the furthest ahead."""
        return max(teacher.lookahead for teacher in self.members)

    @property
    def waits(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return any(teacher.waits for teacher in self.members)

    @property
    def waited_s(self) -> float:  # type: ignore[override]
        """Of all of them."""
        return sum(teacher.waited_s for teacher in self.members)

    @property
    def can_generate(self) -> bool:
        """Whether each can: a row's own teacher writes."""
        return all(teacher.can_generate for teacher in self.members)

    @property
    def has_targets(self) -> bool:
        """Whether each has."""
        return all(teacher.has_targets for teacher in self.members)

    @property
    def answers_anything(self) -> bool:
        """Whether each does."""
        return all(teacher.answers_anything for teacher in self.members)

    @property
    def has_features(self) -> bool:
        """No: those of one teacher are compared."""
        return False

    def follow(self, student: nn.Module) -> None:
        """See `Teacher.follow`."""
        for teacher in self.members:
            teacher.follow(student)

    def place(self, accelerator: Accelerator) -> None:
        """See `Teacher.place`."""
        for teacher in self.members:
            teacher.place(accelerator)

    def begin(self) -> None:
        """See `Teacher.begin`."""
        for teacher in self.members:
            teacher.begin()

    def stepped(self) -> None:
        """See `Teacher.stepped`."""
        for teacher in self.members:
            teacher.stepped()

    def save(self, folder: Path) -> None:
        """Each into a folder of its own name in the checkpoint, where it has something to keep."""
        for name, teacher in self.by_name.items():
            own = state_folder(folder, name)
            if is_main():
                own.mkdir(exist_ok=True)
            teacher.save(own)
            if is_main() and not any(own.iterdir()):
                own.rmdir()

    def load(self, folder: Path) -> None:
        """See `Teacher.load`."""
        for name, teacher in self.by_name.items():
            teacher.load(state_folder(folder, name))

    def prepare(self, window: Sequence[Batch]) -> None:
        """Tell each of its rows; one that has none in the window is not told."""
        for teacher, batches in self._own(window):
            if batches:
                teacher.prepare(batches)

    def wait(self, window: Sequence[Batch]) -> None:
        """See `Teacher.wait`."""
        for teacher, batches in self._own(window):
            if teacher.waits and batches:
                teacher.wait(batches)

    def _own(self, window: Sequence[Batch]) -> Iterator[tuple[Teacher, list[Batch]]]:
        found: dict[int, list[Batch]] = {id(teacher): [] for teacher in self.members}
        for batch in window:
            for teacher, own in self.asked_about(batch):
                found[id(teacher)].append(own)
        for teacher in self.members:
            yield teacher, found[id(teacher)]

    @abstractmethod
    def rows(self, batch: Batch) -> dict[str, list[int]]:
        """The rows whose answers each teacher writes, of those that have some, in the order of the teachers."""

    @abstractmethod
    def asked_about(self, batch: Batch) -> list[tuple[Teacher, Batch]]:
        """See `Teacher.asked_about`."""

    def write(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        each: Callable[[int, Written], None] | None = None,
    ) -> list[Written]:
        """Not here: a prompt does not say whose it is. See `answered`, which asks each about its own rows."""
        raise NotImplementedError("each of several teachers is asked by itself")

    def close(self) -> None:
        """See `Teacher.close`; all of them, whatever one of them says."""
        failed: Exception | None = None
        for teacher in self.members:
            try:
                teacher.close()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _asked(self, teacher: Teacher, batch: Batch) -> Targets:
        self.rows_asked[str(teacher.name)] += len(batch)
        found = teacher.targets(batch)
        assert isinstance(found, Targets), "teachers of teachers are not built"
        return found


def state_folder(folder: Path, name: str) -> Path:
    """Where a checkpoint has the state of one of several teachers."""
    return folder / f"teacher-{name}"


class RoutedTeacher(SeveralTeachers):
    """Each row is answered for by the teacher that it names, and no teacher is asked about another row.

    The name is the row's column `teacher`, or its source's `teacher` (`Rows.teachers`). Of a single teacher no row
    needs one.
    """

    def route(self, batch: Batch) -> list[str | None]:
        """The name of the teacher of each row; None of rows that supervise nothing and name none.

        Raises:
            DataError: a row with supervised tokens names none of the teachers.
        """
        names = list(batch.rows.teachers) or [None] * len(batch)
        if len(self.by_name) == 1:
            names = [name or next(iter(self.by_name)) for name in names]
        for row, name in enumerate(names):
            if name not in self.by_name and (name is not None or bool(batch.predicts_BT[row].any())):
                raise DataError(f"Row {batch.rows.name(row)}: {wrong_name(name, list(self.by_name))}.")
        return names

    def asked_about(self, batch: Batch) -> list[tuple[Teacher, Batch]]:
        """See `Teacher.asked_about`."""
        return [(self.by_name[name], rows_of_batch(batch, rows)) for name, rows in self.rows(batch).items()]

    def rows(self, batch: Batch) -> dict[str, list[int]]:
        """See `SeveralTeachers.rows`."""
        names = self.route(batch)
        found = {name: [row for row, own in enumerate(names) if own == name] for name in self.by_name}
        return {name: rows for name, rows in found.items() if rows}

    def targets(self, batch: Batch) -> AnyTargets:
        """The targets of each row by its own teacher.

        One whose weights lie in pieces runs on every rank, or the others would wait: where it has no row, on one of
        another teacher's, of which nothing is kept.

        Raises:
            DataError: as `route`.
        """
        of_each = self.rows(batch)
        parts = []
        for name, teacher in self.by_name.items():
            rows = of_each.get(name)
            if rows is not None:
                parts.append(RoutedPart(name, tuple(rows), self._asked(teacher, rows_of_batch(batch, rows))))
            elif teacher.in_pieces:
                teacher.targets(rows_of_batch(batch, [0]).without_labels())
        return RoutedTargets(tuple(parts))


class MixedTeacher(SeveralTeachers):
    """All teachers answer for every row, and the mean of their distributions teaches: T = Σ share · T_i.

    Args:
        shares: by name, > 0; they add up to 1.

    Raises:
        ConfigError: shares that do not fit the teachers.
    """

    def __init__(self, teachers: Mapping[str, Teacher], shares: Mapping[str, float]) -> None:
        super().__init__(teachers)
        if shares.keys() != self.by_name.keys():
            raise ConfigError(f"mix has shares of {', '.join(shares)}, and the teachers are {', '.join(self.by_name)}.")
        if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6) or min(shares.values()) <= 0:
            raise ConfigError(f"mix has shares {list(shares.values())}: they must be above 0 and add up to 1.")
        self.shares = tuple(shares[name] / sum(shares.values()) for name in self.by_name)

    @property
    def can_generate(self) -> bool:
        """No: an answer has one writer."""
        return False

    def rows(self, batch: Batch) -> dict[str, list[int]]:
        """See `SeveralTeachers.rows`: none, since none of them writes."""
        return {}

    def asked_about(self, batch: Batch) -> list[tuple[Teacher, Batch]]:
        """See `Teacher.asked_about`: each about all rows."""
        return [(teacher, batch) for teacher in self.members]

    def targets(self, batch: Batch) -> AnyTargets:
        """The distributions of all teachers, which the loss takes the mean of.

        Raises:
            NotAvailableError: they are of kinds that have no mean here.
        """
        found = [self._asked(teacher, batch) for teacher in self.members]
        if any(one.covered_S is not None for one in found):
            raise NotAvailableError("rlhf.mix: a teacher does not answer for every token: not available yet.")
        return Targets(self._mixed([one.scores for one in found]))

    def _mixed(self, scores: Sequence[Scores]) -> Scores:
        top = tuple(one for one in scores if isinstance(one, TopKLogprobs))
        if len(top) == len(scores):
            return MixedTopK(top, self.shares)
        dense = tuple(one for one in scores if isinstance(one, DenseTargets | torch.Tensor))
        if len(dense) == len(scores):
            return MixedTargets(dense, self.shares)
        raise NotAvailableError(
            "rlhf.mix: the mean of full distributions and of top-k or drawn ones is not available yet. Take teachers "
            "of one kind: all in this process (hf, self, a cache of hidden states), or all with their top k (vllm, "
            "openai, a cache of mode topk)."
        )


def rows_of_batch(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, as a teacher is asked about them.

    Raises:
        DataError: it is not known what of the batch's images is theirs.
    """
    if len(rows) == len(batch):
        return batch
    try:
        own = taken(batch, rows)
    except CannotShareError as error:
        raise DataError(f"The rows of a batch cannot be asked of several teachers: {error}") from error
    return replace(own, stand_in=None, layout=None if batch.layout is None else batch.layout.part(rows))
