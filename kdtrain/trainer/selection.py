"""Which of several samples of a prompt train (`rlhf.samples_per_prompt`, `select`, `select_regex`).

The student writes n samples to each prompt. Those whose text does not match the row's answer are left out; of the
others the best by the teacher's mean log-probability per token trains, or all of them, weighted by it. What is left out
is out before D is counted. The teacher is asked once: what it said of a sample that trains is kept for the loss.

Samples have numbers, see `sample_batches.py`; those of a prompt follow each other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.data.checked_answers import says as _says
from kdtrain.data.regroup import taken
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.ranks import is_main
from kdtrain.trainer.guard import nonfinite_scores
from kdtrain.trainer.sample_batches import ask, in_place, training_batches

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

_NONE_LEFT = (
    "None of the %d samples of step %d matches its row's answer (rlhf.select_regex): the step trains on nothing. "
    "Look at the samples (training.log_completions_steps) and the expression, raise samples_per_prompt, or begin with "
    "a better student."
)


def selects(options: DistillationOptions) -> bool:
    """Whether some samples train and others do not, or not as much."""
    return options.select_regex is not None or _ranks(options)


def _ranks(options: DistillationOptions) -> bool:
    """Whether the teacher is asked which samples of a prompt are likely; of a single one it need not be."""
    return options.select != "all" and options.samples_per_prompt > 1


def repeated(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """The batches with each row `samples` times in a row, to be answered as often."""
    if samples == 1:
        return list(batches)
    return [batch if batch.all_repeated else _repeated(batch, samples) for batch in batches]


def _repeated(batch: Batch, samples: int) -> Batch:
    found = taken(batch, [row for row in range(len(batch)) for _ in range(samples)])
    return replace(found, rows=replace(found.rows, samples=list(range(samples)) * len(batch)))


def select(trainer: GKDTrainerWithMetrics, batches: Sequence[Batch], options: DistillationOptions) -> list[Batch]:
    """The batches of an on-policy window with the samples that train, before D is counted; a collective.

    As many batches as there were, so that all ranks go through the same motions: one of which nothing is left has a
    sample without labels.

    Args:
        batches: of `repeated`, with answers.

    Raises:
        DataError: a row has no answer to compare with.
        NonFiniteError: the teacher's log-probabilities of a sample are no numbers.
    """
    new = [batch for batch in batches if not batch.all_repeated]
    stays = [True] * sum(map(len, new))
    if options.select_regex is not None:
        stays = [text for batch in new for text in _matches(trainer, batch, options.select_regex)]
    asked = None
    if _ranks(options):
        asked = ask(trainer, batches, new)
        stays, weights = _by_likelihood(asked.means, stays, options)
        if options.select == "weighted":
            new = [_weighted(batch, [weights[i] for i in own]) for batch, own in zip(new, in_place(new), strict=True)]
    _note(trainer, new, stays, [] if asked is None else asked.means)
    dealt = iter(training_batches(trainer, new, stays, asked))
    rest = iter(() if asked is None else asked.of_repeated)
    return [replace(b, targets=next(rest, None)) if b.all_repeated else next(dealt) for b in batches]


# ---- by text ---------------------------------------------------------------------------------------------------------


def _matches(trainer: GKDTrainerWithMetrics, batch: Batch, expression: str) -> list[bool]:
    """Whether the text of each sample says what its row's answer is."""
    answers = batch.rows.answers or [None] * len(batch)
    if None in answers:
        raise DataError(
            f"rlhf.select_regex compares samples with the answer of their row, and row "
            f"{batch.rows.name(answers.index(None))} has none: give rows a column `answer`."
        )
    ids = [labels[labels != IGNORE_INDEX].tolist() for labels in batch.labels]
    texts = trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [_says(text, str(answer), expression) for text, answer in zip(texts, answers, strict=True)]


# ---- by the teacher --------------------------------------------------------------------------------------------------


def _by_likelihood(
    means: Sequence[float], stays: Sequence[bool], options: DistillationOptions
) -> tuple[list[bool], list[float]]:
    """Which samples stay, of those that do already, and what they weigh."""
    kept, weights = [False] * len(stays), [1.0] * len(stays)
    for start in range(0, len(stays), options.samples_per_prompt):
        group = [i for i in range(start, start + options.samples_per_prompt) if stays[i]]
        if options.select == "best":
            group = [max(group, key=means.__getitem__)] if group else []  # of equal ones the first
        for i, weight in zip(group, _softmax([means[i] for i in group]), strict=True):
            kept[i], weights[i] = True, weight * len(group)
    return kept, weights


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values, default=0.0)
    if top == -math.inf:  # all are impossible alike
        return [1 / len(values)] * len(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def _weighted(batch: Batch, weights: Sequence[float]) -> Batch:
    """The batch with these weights of its rows, times those that they have in the data."""
    found, own = torch.tensor(weights, device=batch.labels.device), batch.rows.kd_weights
    return replace(batch, rows=replace(batch.rows, kd_weights=found if own is None else found * own.to(found.device)))


# ---- what is said of it ----------------------------------------------------------------------------------------------


def _note(trainer: GKDTrainerWithMetrics, new: Sequence[Batch], stays: Sequence[bool], means: Sequence[float]) -> None:
    """Count the samples, for the log; a collective."""
    names = [batch.rows.name(row) for batch in new for row in range(len(batch))]
    bad_rows = [name for name, mean in zip(names, means, strict=False) if math.isnan(mean) or mean == math.inf]
    own = [len(stays), sum(stays), len(bad_rows)]
    for name, value in zip(("written_samples", "selected_samples"), own, strict=False):
        trainer._metrics["train"][name].append(torch.tensor(value))
    device, step = trainer.accelerator.device, trainer.state.global_step + 1
    samples, selected, bad = trainer.accelerator.gather(torch.tensor([own], device=device)).sum(0).tolist()
    if bad:
        rank = trainer.accelerator.process_index
        ranks = gather_object([{"rank": rank, "rows": list(dict.fromkeys(bad_rows))}] if bad_rows else [])
        raise nonfinite_scores(trainer, ranks, f"{bad} of {samples} samples")
    if samples and not selected and not trainer.warned_of_no_samples and is_main():
        trainer.warned_of_no_samples = True
        logger.warning(_NONE_LEFT, samples, step)
