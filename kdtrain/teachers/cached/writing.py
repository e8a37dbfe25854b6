"""Asking a teacher for what a cache holds.

Shapes: S supervised tokens, V vocabulary, K entries, D draws, H hidden width, C tokens of a chunk.

A shard is asked for by itself: its rows in batches by their length, and no batch with rows of two shards. So the
numbers in it are a function of its rows, whichever process writes it and whatever was written before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from kdtrain.data.batch import Batch
from kdtrain.errors import NonFiniteError, TeacherError
from kdtrain.host import on_host
from kdtrain.losses.gemm import one_dtype
from kdtrain.losses.mixture import MixedTopK
from kdtrain.losses.other_tokenizer import ChunkTargets
from kdtrain.losses.reduce import next_token_labels
from kdtrain.losses.sampled import SampledTargets
from kdtrain.losses.sizes import chunk_sizes, default_chunk
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.losses.workspace import workspace
from kdtrain.teachers.base import DenseTargets, MixedTargets, Targets, Teacher, targets_of
from kdtrain.teachers.cached.chunk_format import RowChunks
from kdtrain.teachers.cached.store import Format, RowTargets
from kdtrain.teachers.other_tokenizer import chunk_targets

_NOT_FINITE = (
    "The teacher's predictions are NaN or infinite, and were not stored. Load it in float32 or bfloat16 "
    "(rlhf.teacher.dtype), or look at its weights."
)
_VALUES_IN_CACHE = 1 << 20
_BLOCK = 64  # tokens whose probabilities are summed up together before something is drawn


@dataclass(frozen=True)
class Shard:
    """Rows that are written together."""

    number: int
    rows: Sequence[int]
    """Their numbers in the plan, in its order."""
    keys: Sequence[bytes]
    lengths: Sequence[int]
    """Tokens that the teacher reads of each."""

    def batches(self, size: int) -> list[list[int]]:
        """Places in `rows`, up to `size` at a time: the longest first, so that memory runs out at once or never."""
        order = sorted(range(len(self.rows)), key=lambda place: -self.lengths[place])
        return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Asking:
    """How the rows of shards become targets."""

    teacher: Teacher
    collate: Callable[[Sequence[int]], Batch]
    """Makes a batch, on the teacher's device, of rows by their numbers in the plan."""
    form: Format
    batch_size: int
    ahead: int = 0
    """Batches that the teacher is told of before it is asked for the first of them (`Teacher.prepare`)."""

    def shards(self, shards: Sequence[Shard], each: Callable[[int], None]) -> Iterator[tuple[Shard, list[RowTargets]]]:
        """The targets of shards, one after the other.

        Args:
            each: called with the number of rows of every batch that is done.

        Raises:
            TeacherError: no usable answer.
        """
        batches = [(shard, places) for shard in shards for places in shard.batches(self.batch_size)]
        found: dict[int, RowTargets] = {}
        for shard, places, batch in self._prepared(batches):
            rows = self.rows(batch, [shard.keys[place] for place in places])
            found |= dict(zip(places, rows, strict=True))
            each(len(places))
            if len(found) == len(shard.rows):
                yield shard, [found[place] for place in range(len(found))]
                found = {}

    def rows(self, batch: Batch, keys: Sequence[bytes]) -> list[RowTargets]:
        """The targets of each row of a batch, on the CPU, in the form in which they are stored but for rounding."""
        return rows_of_targets(targets_of(self.teacher, batch), batch, self.form, keys)

    def _prepared(self, batches: Sequence[tuple[Shard, list[int]]]) -> Iterator[tuple[Shard, list[int], Batch]]:
        waiting: deque[tuple[Shard, list[int], Batch]] = deque()
        for shard, places in batches:
            batch = self.collate([shard.rows[place] for place in places])
            self.teacher.prepare([batch])
            waiting.append((shard, places, batch))
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting


def rows_of_targets(targets: Targets, batch: Batch, form: Format, keys: Sequence[bytes]) -> list[RowTargets]:
    """The targets of each row of a batch; see `stored_targets`."""
    if form.mode == "chunks":
        return _chunks(targets, batch)
    counts = batch.predicts_BT.sum(1).tolist()
    stored = stored_targets(targets, form, keys, counts)
    assert not isinstance(stored, RowChunks)
    ends = np.cumsum(counts).tolist()
    return [stored[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _chunks(targets: Targets, batch: Batch) -> list[RowTargets]:
    """Of each row the likelihoods of its chunks, and which tokens make up each."""
    found, own, counts_B = chunk_targets(targets, batch, "alm").chunks, batch.student_chunks, batch.num_chunks
    assert isinstance(found, ChunkTargets)
    assert own is not None
    assert counts_B is not None
    logprobs_BT = found.logprobs.reshape(batch.labels.shape).float().cpu()
    numbers_BT = next_token_labels(on_host(own.numbers))
    if bool(logprobs_BT.isnan().any()):
        raise NonFiniteError(_NOT_FINITE)
    rows: list[RowTargets] = []
    for row, (count, *lengths) in enumerate(
        zip(counts_B.tolist(), own.aligned_bytes.tolist(), own.answer_bytes.tolist(), strict=True)
    ):
        rows.append(RowChunks(numbers_BT[row][batch.predicts_BT[row]], logprobs_BT[row, :count].clone(), *lengths))
    return rows


def stored_targets(targets: Targets, form: Format, keys: Sequence[bytes], counts: Sequence[int]) -> RowTargets:
    """A batch's targets in the form of a cache, one row's behind the other's, on the CPU.

    Args:
        targets: as a teacher gives them.
        keys: of the rows, which the draws of `sample` depend on.
        counts: S of each row.

    Raises:
        TeacherError: they are of another kind, or of other tokens.
        NonFiniteError: they are NaN or infinite.
    """
    scores = targets.scores
    if targets.covered_S is not None and not bool(targets.covered_S.all()):
        raise TeacherError("The teacher has targets for some of the supervised tokens only, which no cache can hold.")
    if isinstance(scores, TopKLogprobs):
        assert form.mode == "topk", "the other modes are refused for a teacher that gives its top k"
        return scores.to(torch.device("cpu"))
    if form.mode == "hidden":
        if not isinstance(scores, DenseTargets):
            raise TeacherError("The teacher gives logits, and a cache of mode hidden needs its last hidden states.")
        _check_finite(scores.hidden)
        return scores.hidden.cpu()
    assert not isinstance(scores, SampledTargets), "no teacher that is asked gives draws"
    assert not isinstance(scores, MixedTargets | MixedTopK), "a cache is of one teacher"
    uniforms = None if form.mode == "topk" else _uniforms(keys, counts, form.entries or 1)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tokens, logits_CV in _logits(scores, form.vocab_size):
        if uniforms is None:
            parts.append(top_k(logits_CV, form.entries or 1))
        else:
            parts.append(draw(logits_CV.div_(form.temperature), uniforms[tokens].to(logits_CV.device)))
    kind = TopKLogprobs if form.mode == "topk" else SampledTargets
    if not parts:
        return kind(torch.zeros(0, form.entries or 1, dtype=torch.int64), torch.zeros(0, form.entries or 1))
    return kind(torch.cat([ids.cpu() for ids, _ in parts]), torch.cat([values.cpu() for _, values in parts]))


def _logits(scores: DenseTargets | torch.Tensor, columns: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """float32 logits [C, V] of some tokens after others, over the first columns; each is overwritten by the next."""
    if isinstance(scores, DenseTargets):
        rows, weight = one_dtype(scores.hidden, scores.head.weight)
        head = replace(scores.head, weight=weight).first_columns(columns)
    else:
        rows, head = scores[:, :columns], None
    start = 0
    for size in chunk_sizes(len(rows), default_chunk(columns, torch.float32, rows.device)):
        chunk = slice(start, start + size)
        out = workspace.take("cache", size, columns, torch.float32, rows.device)
        with torch.no_grad():
            out.copy_(rows[chunk]) if head is None else head.logits(rows[chunk], out)
        # What comes next reads them several times: on a CPU a few at a time, which stay in its cache.
        few = max(1, _VALUES_IN_CACHE // columns) if out.device.type == "cpu" else size
        for part in out.split(few):
            yield slice(start, start + len(part)), part
            start += len(part)


def top_k(logits_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probabilities [C, K], normalised over all columns, and their ids.

    In falling order, and among equal ones the lowest id first, also where only some of the equal ones are taken.
    """
    total_C1 = _log_sum_exp(logits_CV)
    if k >= logits_CV.shape[1]:
        values, ids = logits_CV.sort(dim=-1, descending=True, stable=True)
        return ids, values.sub_(total_C1)
    # One more than is asked for shows whether the last one had equals that were left out, of which ones is chance.
    values, ids = logits_CV.topk(k + 1)
    tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
    values, ids = values[:, :k], ids[:, :k]
    if len(tied):
        some = logits_CV[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], ids[tied] = some.values[:, :k], some.indices[:, :k]
    ids, by_id = ids.sort(-1)
    values, order = (values.gather(1, by_id) - total_C1).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), values


def _log_sum_exp(logits_CV: torch.Tensor) -> torch.Tensor:
    """[C, 1]. As `torch.logsumexp`, which takes twice as long on a CPU: it fetches fresh memory for its steps."""
    largest_C1 = logits_CV.amax(-1, keepdim=True)
    _check_finite(largest_C1)
    rows, columns = logits_CV.shape
    spare = workspace.take("cache spare", rows, columns, logits_CV.dtype, logits_CV.device)
    return torch.sub(logits_CV, largest_C1, out=spare).exp_().sum(-1, keepdim=True).log_().add_(largest_C1)


def draw(logits_CV: torch.Tensor, uniforms_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens drawn from softmax(logits), each with its share of the draws: the fields of `SampledTargets`, K = D.

    By inversion: draw u is the first token whose cumulative probability is above u. Probabilities are float32, their
    sums float64, so that 150,000 small ones do not move the large. They are summed up in blocks, and token by token in
    the blocks that a draw falls into, a tenth of the work. The logits are overwritten.

    Args:
        uniforms_CD: float64 in [0, 1).
    """
    largest_C1 = logits_CV.amax(-1, keepdim=True)
    _check_finite(largest_C1)
    weights_CV = logits_CV.sub_(largest_C1).exp_()
    weights_CGB = nn.functional.pad(weights_CV, (0, -weights_CV.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    ends_CG = weights_CGB.sum(-1).double().cumsum(-1)
    wanted_CD = _below(uniforms_CD * ends_CG[:, -1:], ends_CG[:, -1:])
    block_CD = torch.searchsorted(ends_CG, wanted_CD, right=True)
    starts_CG = nn.functional.pad(ends_CG[:, :-1], (1, 0))
    inside_CDB = weights_CGB.gather(1, block_CD[..., None].expand(-1, -1, _BLOCK)).double().cumsum(-1)
    left_CD1 = _below((wanted_CD - starts_CG.gather(1, block_CD))[..., None], inside_CDB[..., -1:])
    return _shares(block_CD * _BLOCK + (inside_CDB <= left_CD1).sum(-1))


def _below(values: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The values, but for those that rounding has moved to the end of their interval or behind it."""
    return torch.minimum(values, torch.nextafter(end, torch.zeros_like(end)))


def _shares(drawn_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different tokens of each row, −1 where there are fewer than draws, and how often each was drawn."""
    drawn_CD = drawn_CD.sort(-1).values
    first = torch.ones_like(drawn_CD, dtype=torch.bool)
    first[:, 1:] = drawn_CD[:, 1:] != drawn_CD[:, :-1]
    place = first.cumsum(-1) - 1  # which of the different tokens each draw is
    counts = torch.zeros_like(drawn_CD).scatter_add_(1, place, torch.ones_like(drawn_CD))
    ids = torch.full_like(drawn_CD, -1).scatter_(1, place, drawn_CD)
    return ids, counts.to(torch.float32) / drawn_CD.shape[1]


def _uniforms(keys: Sequence[bytes], counts: Sequence[int], draws: int) -> torch.Tensor:
    """[S, D] float64 in [0, 1), of each row by its key alone."""
    rows = [
        np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random((count, draws))
        for key, count in zip(keys, counts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows)) if rows else torch.zeros(0, draws, dtype=torch.float64)


def _check_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(_NOT_FINITE)
