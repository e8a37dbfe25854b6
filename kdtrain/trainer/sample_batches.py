"""The batches of a window's samples: those that the teacher is asked about, and those that train.

Samples have numbers: their place among all rows of this rank's batches with new rows, as they were generated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from kdtrain.data.batch import Batch
from kdtrain.data.regroup import by_length, row_lengths, rows_of
from kdtrain.data.visual_batch import CannotShareError
from kdtrain.losses.comparison import label_logprobs
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.teachers import DenseTargets, teacher_autocast
from kdtrain.teachers.base import AnyTargets
from kdtrain.teachers.by_row import by_row, in_one, nothing_of, scored, with_one_head
from kdtrain.trainer.evaluation import comparable
from kdtrain.trainer.teacher_failures import raised_on_all_ranks

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


@dataclass(frozen=True)
class Asked:
    """What the teacher says of the samples, by their number."""

    targets: list[AnyTargets]
    means: list[float]
    """Of the log-probabilities of the tokens that it has answered for, nats; −inf where it has for none."""
    of_repeated: list[AnyTargets]
    """Of the batches without new rows, whose forwards are the same motions."""


def ask(trainer: GKDTrainerWithMetrics, batches: Sequence[Batch], new: Sequence[Batch]) -> Asked:
    """Ask the teacher for the targets of all samples, in batches of like length."""
    teacher = trainer.teacher
    assert teacher is not None, "LM KD needs one"
    lengths = row_lengths(new)
    groups = by_length(range(len(lengths)), lengths, [len(batch) for batch in new])
    dealt = _dealt(trainer, new, groups)
    if dealt is None:
        groups, dealt = in_place(new), list(new)
    rest = [batch for batch in batches if batch.all_repeated]
    teacher.prepare([*dealt, *rest])
    if teacher.waits:
        with raised_on_all_ranks(trainer.accelerator), trainer.count_waiting():
            teacher.wait([*dealt, *rest])
    found: dict[int, tuple[AnyTargets, float]] = {}
    heads: dict[str | None, DenseTargets] = {}
    for rows, batch in zip(groups, dealt, strict=True):
        targets = with_one_head(trainer._run_teacher_forward(batch), heads)
        parts = by_row(targets, batch)
        found |= dict(zip(rows, zip(parts, _means(trainer, targets, batch), strict=True), strict=True))
    in_order = [found[i] for i in range(len(lengths))]
    of_repeated = [trainer._run_teacher_forward(batch) for batch in rest]
    return Asked([targets for targets, _ in in_order], [mean for _, mean in in_order], of_repeated)


def _means(trainer: GKDTrainerWithMetrics, targets: AnyTargets, batch: Batch) -> list[float]:
    """Of the log-probabilities that the teacher gives the tokens of each row, at temperature 1."""
    assert trainer.vocabulary is not None
    columns = trainer.vocabulary.shared
    logprobs_S = torch.zeros(len(batch.labels_S), dtype=torch.float64)
    known_S = torch.zeros(len(batch.labels_S), dtype=torch.bool)
    for one in scored(targets, batch):
        own_S = torch.ones_like(known_S) if one.tokens_S is None else one.tokens_S.cpu()
        scores = comparable(one.scores, columns)
        assert scores is not None, "drawn tokens are those of stored answers, of which there are no samples"
        with teacher_autocast(trainer.accelerator):
            labels = batch.labels_S[own_S.to(batch.labels.device)]
            logprobs_S[own_S] = label_logprobs(scores, labels, columns).double().cpu()
        known_S |= own_S
    counts = batch.predicts_BT.sum(1).tolist()
    rows = zip(logprobs_S.split(counts), known_S.split(counts), strict=True)
    return [float(values[known].mean()) if known.any() else -math.inf for values, known in rows]


def training_batches(
    trainer: GKDTrainerWithMetrics, new: Sequence[Batch], stays: Sequence[bool], asked: Asked | None
) -> list[Batch]:
    """The batches of the samples that stay, with what the teacher has said of them."""
    if not new:
        return []
    kept, lengths = [i for i, stay in enumerate(stays) if stay], row_lengths(new)
    sizes = [len(kept) // len(new) + (i < len(kept) % len(new)) for i in range(len(new))]
    own = by_length(kept, lengths, sizes)
    # A batch of which nothing is left has the shortest sample, without labels.
    shortest = min(range(len(stays)), key=lengths.__getitem__)
    rows = [group or [shortest] for group in own]
    dealt = _dealt(trainer, new, rows)
    if dealt is None:
        rows, dealt = in_place(new), list(new)
        own = [[i for i in group if stays[i]] for group in rows]
    return [_only(*one, asked) for one in zip(dealt, rows, own, strict=True)]


def _dealt(trainer: GKDTrainerWithMetrics, new: Sequence[Batch], groups: Sequence[Sequence[int]]) -> list[Batch] | None:
    """Batches of samples by their numbers; None where samples have to stay in their batch.

    Images do under FSDP and DeepSpeed, whose ranks have agreed on which batches have some.
    """
    if trainer.is_sharded and any(batch.has_images or batch.stand_in for batch in new):
        return None
    pad_id, multiple = trainer._tokenizer.pad_token_id, trainer.args.pad_to_multiple_of
    try:
        return [rows_of(new, rows, pad_id, multiple) for rows in groups]
    except CannotShareError:
        return None


def in_place(batches: Sequence[Batch]) -> list[list[int]]:
    """The numbers of the samples of each batch."""
    ends = accumulate(map(len, batches), initial=0)
    return [list(range(a, b)) for a, b in pairwise(ends)]


def _only(batch: Batch, rows: Sequence[int], own: Sequence[int], asked: Asked | None) -> Batch:
    """The batch with labels of some of its samples alone.

    Args:
        rows: the numbers of its samples.
        own: of those that train.
    """
    trains = [row in own for row in rows]
    targets = None
    if asked is not None:
        found = [asked.targets[row] for row in rows]
        targets = in_one([one if train else nothing_of(one) for one, train in zip(found, trains, strict=True)])
    if not own:
        batch = replace(batch.without_labels(), all_repeated=True)
    elif not all(trains):
        batch = _masked(batch, torch.tensor(trains, device=batch.labels.device)[:, None])
    return replace(batch, targets=targets)


def _masked(batch: Batch, trains_B1: torch.Tensor) -> Batch:
    tokens = batch.teacher_tokens
    if tokens is not None:
        kept = {name: value for name in ("labels", "chunks") if (value := getattr(tokens, name)) is not None}
        tokens = replace(tokens, **{name: one.masked_fill(~trains_B1, IGNORE_INDEX) for name, one in kept.items()})
    chunks = batch.student_chunks
    if chunks is not None:
        chunks = replace(chunks, numbers=chunks.numbers.masked_fill(~trains_B1, IGNORE_INDEX))
    labels = batch.labels.masked_fill(~trains_B1, IGNORE_INDEX)
    return replace(batch, labels=labels, teacher_tokens=tokens, student_chunks=chunks)
