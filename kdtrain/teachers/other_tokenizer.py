"""The targets of a teacher with another tokenizer: what it says of chunks of text that both models' tokens make up.

Shapes: B rows, T positions of the student, S supervised tokens of the student, S' of the teacher, C = B·T slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from kdtrain.data.batch import Batch
from kdtrain.errors import DataError, TeacherError
from kdtrain.host import on_host, rows_of, send
from kdtrain.losses.gemm import autocast_dtype
from kdtrain.losses.head import Head
from kdtrain.losses.label_pass import label_call, label_logprobs_of_logits, label_pass
from kdtrain.losses.other_tokenizer import ChunkTargets
from kdtrain.losses.reduce import IGNORE_INDEX, next_token_labels
from kdtrain.losses.slots import sums_of_slots
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.losses.uld import UldTargets
from kdtrain.teachers.base import DenseTargets, Scores, Targets


def chunk_targets(targets: Targets, batch: Batch, method: Literal["alm", "uld"] | None) -> Targets:
    """What a teacher says of a batch's chunks: their log-likelihoods, or the distributions at its tokens of them.

    Args:
        method: see `rlhf.cross_tokenizer`.
        targets: of the teacher's own supervised tokens, `batch.as_teacher_sees_it().labels_S`: distributions, or the
            log-probabilities of these tokens alone. Of stored ones the chunks are known already.

    Raises:
        DataError: the batch does not say which tokens make up a chunk.
        TeacherError: the log-probability of a token is not known.
    """
    if targets.chunks is not None:
        return targets
    own, tokens, scores = batch.student_chunks, batch.teacher_tokens, targets.scores
    if own is None or tokens is None or tokens.chunks is None:
        raise _without_chunks()
    seen, width, device = batch.as_teacher_sees_it(), batch.labels.shape[1], batch.labels.device
    own_S, of_teacher = _slots(own.numbers, batch.predicts_BT, width), _slots(tokens.chunks, seen.predicts_BT, width)
    slots_S, count = send(own_S, device), len(batch) * width
    if method == "uld":
        if not isinstance(scores, DenseTargets | torch.Tensor):
            raise TeacherError("rlhf.cross_tokenizer: uld needs a teacher's distributions over its whole vocabulary.")
        outputs, head = (scores.hidden, scores.head) if isinstance(scores, DenseTargets) else (scores, None)
        weighs_S = torch.ones_like(own_S) if batch.kd_weights_S is None else on_host(batch.kd_weights_S)
        filled = torch.zeros(2, count + 1, dtype=torch.bool)
        filled[0, own_S[weighs_S > 0]] = filled[1, of_teacher] = True
        filled = rows_of(filled.all(0)[:count], device)
        of_teacher = send(of_teacher, device)
        return Targets(scores, chunks=UldTargets(slots_S, count, outputs, head, seen.labels_S, of_teacher, filled))
    logprobs = _label_logprobs(scores, seen.labels_S)
    found = send(sums_of_slots(logprobs, send(of_teacher, logprobs.device), count), device)
    return Targets(scores, chunks=ChunkTargets(slots_S, found))


def targets_of_chunks(values: torch.Tensor, counts: Sequence[int], batch: Batch) -> ChunkTargets:
    """What is stored of the chunks of a batch, as the loss takes it.

    Args:
        values: log-likelihoods of the chunks of all rows with supervised tokens, in their order; nats.
        counts: how many chunks each of these rows has.

    Raises:
        DataError: the batch does not say which tokens make up a chunk.
        TeacherError: the batch has other chunks.
    """
    chunks, width, device = batch.student_chunks, batch.labels.shape[1], batch.labels.device
    if chunks is None or batch.num_chunks is None:
        raise _without_chunks()
    supervises_B, counts_R = batch.predicts_BT.any(1), torch.tensor(counts, dtype=torch.long)
    if not torch.equal(batch.num_chunks[supervises_B], counts_R):
        raise TeacherError("Targets are stored for other chunks of text than those of the batch.")
    starts_R = supervises_B.nonzero()[:, 0] * width - (counts_R.cumsum(0) - counts_R)
    found = values.new_zeros(len(batch) * width)
    found[starts_R.repeat_interleave(counts_R) + torch.arange(len(values))] = values
    return ChunkTargets(send(_slots(chunks.numbers, batch.predicts_BT, width), device), send(found, device))


def _without_chunks() -> DataError:
    return DataError(
        "rlhf.cross_tokenizer needs batches that say which tokens of student and teacher belong together: let "
        "kdtrain.data.Collator make them, with an `other_tokenizer`."
    )


def _slots(chunks_BT: torch.Tensor, predicts_BT: torch.Tensor, width: int) -> torch.Tensor:
    """The slot of each supervised token: T of them for each row, which has no more chunks than the student tokens. On
    the CPU."""
    chunks_BT = on_host(chunks_BT)
    first_B1 = torch.arange(len(chunks_BT), device=chunks_BT.device)[:, None] * width
    slots_BT = torch.where(chunks_BT != IGNORE_INDEX, chunks_BT + first_B1, len(chunks_BT) * width)
    return next_token_labels(slots_BT)[predicts_BT]


def _label_logprobs(scores: Scores, labels: torch.Tensor) -> torch.Tensor:
    if isinstance(scores, TopKLogprobs):
        if scores.indices.device.type == "cpu":
            labels = on_host(labels)
        at_label = scores.indices == labels[:, None].to(scores.indices.device)
        if not bool(at_label.any(-1).all()):
            raise TeacherError("The teacher has not given the log-probability of every token that it was sent.")
        return torch.where(at_label, scores.logprobs, -torch.inf).amax(-1)
    if isinstance(scores, DenseTargets):
        return _of_head(scores.hidden, scores.head, labels)
    if isinstance(scores, torch.Tensor):
        return label_logprobs_of_logits(scores, labels.to(scores.device))
    raise TeacherError(f"A teacher with another tokenizer cannot answer by {type(scores).__name__}.")


@torch.no_grad()
def _of_head(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """A chunk of tokens at a time, so that no logits are kept."""
    if head.masks_columns():
        return label_logprobs_of_logits(head.differentiable_logits(hidden), labels.to(hidden.device))
    half = autocast_dtype(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        return label_pass(hidden, labels.to(hidden.device), label_call(head), half).logprobs()
