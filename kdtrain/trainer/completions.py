"""Answers that were generated while training, kept to be looked at, every `training.log_completions_steps`.

Shapes: B rows, T positions, S supervised tokens.

They are measured before the step trains on them, so by the student that wrote them: one more forward of student and
teacher, in eval mode and without gradients, which leaves no trace in weights, random states or metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import fsum
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate.utils import gather_object

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.data.stand_in import as_run
from kdtrain.generation.generate import prompts_of
from kdtrain.generation.sampling import stable_seed
from kdtrain.losses.comparison import Comparison, Scores, compare
from kdtrain.losses.head import Head
from kdtrain.models.experts import without_router_logits
from kdtrain.models.probe import own_random_state
from kdtrain.models.switching import evaluated
from kdtrain.teachers import teacher_autocast
from kdtrain.teachers.base import AnyTargets
from kdtrain.teachers.by_row import scored
from kdtrain.trainer.answers import writer_of
from kdtrain.trainer.evaluation import comparable

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

MOST = 64
"""Completions that are kept of a step, over all ranks."""


@dataclass(frozen=True)
class Completion:
    """One answer."""

    step: int
    """The optimizer step that it trains, as the log counts them."""
    row: str
    """The name of the row that its prompt is of, of `Rows.ids`."""
    sample: int
    """Which of the answers to this prompt it is, from 0."""
    written_by: Literal["student", "teacher"]
    prompt: str
    """As the student reads it, with special tokens; so is the completion."""
    completion: str
    stop_reason: Literal["stop", "length"]
    """Whether it ends with a token that ends an answer, or was cut at `max_new_tokens`."""
    token_ids: list[int]
    """Of the completion."""
    token_reverse_kl: list[float | None]
    """KL(S‖T) at each of them in nats, at temperature 1; None where it is not known."""
    selected: bool
    """Whether it trains. Of an answer that a selection has left out the divergence is not measured."""
    exact: bool
    """Whether each divergence is over the whole vocabulary; that of a teacher's top k is a lower bound."""

    @property
    def reverse_kl(self) -> float | None:
        """Mean KL(S‖T) of the tokens for which it is known, nats per token."""
        known = [value for value in self.token_reverse_kl if value is not None]
        return fsum(known) / len(known) if known else None


class CompletionsLog:
    """Keeps the completions of the window that is being trained, where it is one that is logged.

    That is the first generated window, and the first one at or after each multiple of `every` steps.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics, every: int | None) -> None:
        self._trainer, self.every = trainer, every
        self._from: int | None = None  # the step from which the next generated window is logged; None: to be found
        self._written: Sequence[Batch] = ()
        self.newest: list[Completion] = []
        """Of the window that is being trained, on every rank the same; empty where it is not logged. There from
        `on_step_begin` on."""

    def begin(self) -> None:
        """Training begins, or goes on from a checkpoint."""
        self._from, self.newest = None, []

    def will_select(self, batches: Sequence[Batch]) -> None:
        """Remember the answers of a window, of this rank, before a selection leaves some out."""
        self._written = batches if self.every is not None else ()

    def note(self, batches: Sequence[Batch], options: DistillationOptions) -> None:
        """Keep completions of a window that is about to train, if it is logged; a collective then.

        Args:
            batches: of this rank, with the answers that it trains on.
            options: of this window.
        """
        self.newest, written, self._written = [], self._written, ()
        if self.every is None:
            return
        step = self._trainer.state.global_step + 1
        if writer_of(self._trainer, options, step - 1) is not None and self._is_due(step, self.every, options):
            with self._trainer.stopwatch.pause():
                self.newest = self._of_all_ranks(step, batches, _left_out(written, batches))

    def _is_due(self, step: int, every: int, options: DistillationOptions) -> bool:
        if self._from is None:
            self._from = self._first(step, every, options)
        if step < self._from:
            return False
        self._from = (step // every + 1) * every
        return True

    def _first(self, step: int, every: int, options: DistillationOptions) -> int:
        """The multiple that is next, where training begins with `step`: the one before may be logged already."""
        last = step // every * every
        earlier = range(max(last - 1, 0), step - 1)  # steps that were taken before each window since that multiple
        logged = any(writer_of(self._trainer, options, taken) for taken in earlier)
        return last + every if logged else last

    def _of_all_ranks(
        self, step: int, batches: Sequence[Batch], left_out: Sequence[tuple[Batch, list[int]]]
    ) -> list[Completion]:
        trained = [(batch, _supervised_rows(batch)) for batch in batches]
        chosen = self._chosen(step, [*trained, *left_out])
        trainer = self._trainer
        # Each forward of a model in pieces is a collective, and all ranks have as many batches.
        together = trainer.is_sharded or trainer.asks_teacher_together
        wanted = {n: batch for n, batch in enumerate(batches) if n in chosen or together}
        assert trainer.teacher is not None, "LM KD is active where answers are generated"
        # Once more, as before an evaluation: the loss will ask for the same targets.
        trainer.teacher.prepare([batch for batch in wanted.values() if batch.targets is None])
        found: list[Completion] = []
        for number, batch in wanted.items():
            measured = _measured(trainer, batch)
            if number in chosen:
                found += _completions(trainer, step, batch, chosen[number], measured)
        for number, (batch, _) in enumerate(left_out, start=len(batches)):
            found += _completions(trainer, step, batch, chosen.get(number, []), None)
        return sorted(gather_object(found), key=lambda one: (one.row, one.sample))

    def _chosen(self, step: int, rows_of: Sequence[tuple[Batch, list[int]]]) -> Mapping[int, list[int]]:
        """Rows that are kept, by the number of their batch: at random, and the same however rows are dealt.

        Args:
            rows_of: batches, and those of their rows that there is a choice of.
        """
        rank = self._trainer.accelerator.process_index
        own = [
            (stable_seed(f"{step}:{batch.rows.name(row)}:{_sample(batch, row)}"), rank, number, row)
            for number, (batch, some) in enumerate(rows_of)
            for row in some
        ]
        rows: dict[int, list[int]] = {}
        for _, owner, number, row in sorted(gather_object(own))[:MOST]:
            if owner == rank:
                rows.setdefault(number, []).append(row)
        return rows


def _supervised_rows(batch: Batch) -> list[int]:
    """Those that are new and train."""
    return [] if batch.all_repeated else batch.predicts_BT.any(1).nonzero()[:, 0].tolist()


def _left_out(written: Sequence[Batch], batches: Sequence[Batch]) -> list[tuple[Batch, list[int]]]:
    """The batches as they were written, each with the rows that are not trained on."""
    trained = Counter(
        (batch.rows.name(row), _sample(batch, row)) for batch in batches for row in _supervised_rows(batch)
    )
    found = []
    for batch in written:
        rows = []
        for row in _supervised_rows(batch):
            name = batch.rows.name(row), _sample(batch, row)
            if trained[name]:
                trained[name] -= 1
            else:
                rows.append(row)
        found.append((batch, rows))
    return found


_Found = TypeVar("_Found")


@dataclass(frozen=True)
class _Measured:
    """The student beside the teacher at the S supervised tokens of a batch."""

    reverse_kl_S: list[float | None]
    exact: bool


def _measured(trainer: GKDTrainerWithMetrics, batch: Batch) -> _Measured:
    assert trainer.teacher is not None
    assert trainer.vocabulary is not None
    batch = as_run(batch)
    labels_S, columns = batch.labels_S, trainer.vocabulary.shared
    if batch.num_chunks is not None:  # another tokenizer: there is no divergence token by token
        return _Measured([None] * len(labels_S), exact=False)
    with torch.no_grad(), own_random_state(trainer.accelerator.device):
        with teacher_autocast(trainer.accelerator):
            targets: AnyTargets = trainer.teacher.targets(batch) if batch.targets is None else batch.targets
        # Of drawn tokens nothing can be said of one of them.
        both = [(one, comparable(one.scores, columns)) for one in scored(targets, batch)]
        known = [(one, teacher) for one, teacher in both if teacher is not None]
        found: list[float | None] = [None] * len(labels_S)
        if not known:
            return _Measured(found, exact=False)

        def beside(outputs_S: torch.Tensor, head: Head | None) -> list[Comparison | None]:
            device, all_S = outputs_S.device, torch.ones(len(labels_S), dtype=torch.bool)
            compared = []
            for one, teacher in known:
                chosen_S = (all_S if one.tokens_S is None else one.tokens_S).to(device)
                student = Scores(outputs_S[chosen_S], head, columns)
                compared.append(compare(student, labels_S.to(device)[chosen_S], teacher)[2])
            return compared

        compared = _of_student(trainer, batch, beside)
    exact = True
    for (one, _), of_one in zip(known, compared, strict=True):
        if of_one is not None:  # else no token is covered
            places = range(len(found)) if one.tokens_S is None else one.tokens_S.nonzero()[:, 0].tolist()
            for place, value in zip(places, of_one.reverse_kl.tolist(), strict=True):
                found[place] = value
            exact = exact and bool(of_one.exact.all())
    return _Measured(found, exact)


def _of_student(
    trainer: GKDTrainerWithMetrics, batch: Batch, beside: Callable[[torch.Tensor, Head | None], _Found]
) -> _Found:
    """What `beside` makes of the student's hidden states and head, or logits, within its own forward.

    There autocast is in force, and a head in pieces is whole.
    """
    model, found = trainer.model, []
    seen = replace(batch, layout=None).for_forward(model)
    inputs = {**seen.model_inputs, "use_cache": False}

    def loss_head(hidden_BTH: torch.Tensor, head: Head, outputs: Any) -> tuple[torch.Tensor]:
        hidden_SH = seen.predicting(hidden_BTH)
        found.append(beside(hidden_SH, head))
        return (hidden_SH[:0],)

    with ExitStack() as around:
        for context in (evaluated(model), without_router_logits(model), trainer.compute_loss_context_manager()):
            around.enter_context(context)
        if trainer.student_takes_loss_head(model):
            model(**inputs, loss_head=loss_head)
        else:
            found.append(beside(seen.predicting(model(**inputs).logits), None))
    return found[0]


def _completions(
    trainer: GKDTrainerWithMetrics, step: int, batch: Batch, rows: Sequence[int], measured: _Measured | None
) -> list[Completion]:
    """Those of some rows of a batch; without divergences where these are not measured, since the rows do not train."""
    assert batch.generated_by is not None
    counts = batch.predicts_BT.sum(1).tolist()
    ids_S, prompts = batch.labels_S.tolist(), prompts_of(batch)
    found = []
    for row in rows:
        start = sum(counts[:row])
        own = slice(start, start + counts[row])
        found.append(
            Completion(
                step=step,
                row=batch.rows.name(row),
                sample=_sample(batch, row),
                written_by=batch.generated_by,
                prompt=_text(trainer, prompts[row]),
                completion=_text(trainer, ids_S[own]),
                stop_reason="length" if batch.rows.cut[row] else "stop",
                token_ids=ids_S[own],
                token_reverse_kl=[None] * counts[row] if measured is None else measured.reverse_kl_S[own],
                selected=measured is not None,
                exact=measured is not None and measured.exact,
            )
        )
    return found


def _sample(batch: Batch, row: int) -> int:
    return batch.rows.samples[row] if batch.rows.samples else 0


def _text(trainer: GKDTrainerWithMetrics, ids: Sequence[int]) -> str:
    return str(trainer._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
