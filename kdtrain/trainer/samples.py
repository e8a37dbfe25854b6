"""What the student's own answers look like as training goes on: figures for the log, and warnings of a collapse.

All figures are of a window over all ranks, before a selection leaves samples out; rows that only fill up an epoch are
none. A sample's tokens are all that the student wrote, the one that ends it included.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch

from kdtrain.data.batch import Batch
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.ranks import is_main

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

_STEPS = 10  # on-policy steps at either end that are compared
_GRAM, _SHORTEST = 4, 8  # tokens of what is counted as repeated, and of a sample that can repeat itself
_REPEATED = 0.5  # mean repetition that is worth a warning
_CUT = 0.1  # share of cut samples below which a doubling is chance
_NEARLY_ALL = 0.9  # share of cut samples in the first steps that is worth a warning
_KINDS = ("repetition", "length", "cut", "endless")
_NONE = -1  # in place of a sample on a rank that has fewer than another

_CALMER = (
    "lower training.learning_rate, or lower rlhf.lmbda and raise rlhf.sft_alpha, so that the data's answers teach more"
)
_REPEATS = (
    "The student repeats itself: %.0f%% of the 4-grams in its answers of the last %d on-policy steps are repetitions "
    f"(step %d). To stop it, {_CALMER}. A rlhf.beta nearer to 0 (forward KL) or fewer rlhf.max_new_tokens may help too."
)
_LONGER = (
    "The student's answers get longer: %.0f tokens in the mean of the last %d on-policy steps, %.0f in the first %d "
    f"(step %d). If that is not meant, {_CALMER}. rlhf.max_new_tokens (%d) limits what they cost."
)
_MORE_CUT = (
    "More of the student's answers never end: %.0f%% of those of the last %d on-policy steps were cut at "
    "rlhf.max_new_tokens (%d), and %.0f%% in the first %d (step %d). If they are meant to be long, raise "
    f"rlhf.max_new_tokens; if not, {_CALMER}."
)

_ENDLESS = (
    "Of the student's answers in its first %d on-policy steps %.0f%% were cut at rlhf.max_new_tokens (%d): they do not "
    "show it where an answer ends. If they are meant to be longer, raise rlhf.max_new_tokens; if the student has not "
    "learnt to end, train it on the data's answers first, or lower rlhf.lmbda."
)


@dataclass(frozen=True)
class SampleCounts:
    """Sums over the samples of one or several windows."""

    samples: float = 0
    tokens: float = 0
    cut: float = 0
    """Those that reached `max_new_tokens` without a token that ends them."""
    long: float = 0
    """Samples of at least 8 tokens."""
    repetition: float = 0
    """Sum over these of 1 − distinct/all 4-grams."""

    def __add__(self, other: SampleCounts) -> SampleCounts:
        return SampleCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def length(self) -> float:
        """Mean tokens of a sample; 0 without samples, as the next two."""
        return self.tokens / max(self.samples, 1)

    @property
    def cut_share(self) -> float:
        return self.cut / max(self.samples, 1)

    @property
    def mean_repetition(self) -> float:
        return self.repetition / max(self.long, 1)


def repetition(tokens: Sequence[int]) -> float:
    """1 − distinct/all 4-grams: 0 where none comes twice, near 1 where one token fills the sample."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


class SampleWatch:
    """Counts over the answers of on-policy windows.

    It warns once of each of four: repetition of the last 10 on-policy steps above 0.5 in the mean; a mean length, and
    a share of cut samples, that is twice that of the first 10; nine of ten samples cut in these. Lengths are compared
    between steps of one `max_new_tokens` alone, so that a limit which grows warns of nothing: the first 10 are those
    since it has changed.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self.begin()

    def begin(self) -> None:
        """Forget an earlier training."""
        self._limit = 0  # of the last samples
        self._first: list[SampleCounts] = []  # by window, since it is this
        self._last: list[SampleCounts] = []  # by window, whatever it was
        self._warned: set[str] = set()

    def note(self, batches: Sequence[Batch], limit: int) -> None:
        """The generated batches of one window, of this rank; a collective.

        Args:
            limit: tokens that its samples could have.
        """
        new = [batch for batch in batches if not batch.all_repeated]
        samples = [tokens for batch in new for tokens in _samples(batch)]
        counts, distinct = self._of_all_ranks(samples, [cut for batch in new for cut in batch.rows.cut])
        if not counts.samples:
            return
        self._record(counts, distinct)
        if limit != self._limit:
            self._limit, self._first = limit, []
        if len(self._first) < _STEPS:
            self._first.append(counts)
        self._last = [*self._last, counts][-_STEPS:]
        self._warn()

    def _of_all_ranks(self, samples: Sequence[Sequence[int]], cut: Sequence[bool]) -> tuple[SampleCounts, int]:
        """The counts, and how many different first tokens there are."""
        accelerator, own = self._trainer.accelerator, _counts(samples, cut)
        first = [tokens[0] for tokens in samples if tokens]
        if accelerator.num_processes == 1:
            return own, len(set(first))
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        ranks = accelerator.gather(torch.tensor([astuple(own)], dtype=dtype, device=accelerator.device))
        if not ranks[:, 0].any():  # an epoch may end with a window of no rows
            return SampleCounts(), 0
        # Two ranks may have the same first tokens, which their numbers alone do not tell.
        most = int(ranks[:, 0].max())
        padded = first + [_NONE] * (most - len(first))
        ids = accelerator.gather(torch.tensor(padded, dtype=torch.int64, device=accelerator.device))
        return SampleCounts(*ranks.sum(0).tolist()), len(set(ids.tolist()) - {_NONE})

    def _record(self, counts: SampleCounts, distinct: int) -> None:
        """Into the record, by all ranks alike: it is made of ratios."""
        values = {
            "samples": counts.samples,
            "sample_tokens": counts.tokens,
            "cut_samples": counts.cut,
            "long_samples": counts.long,
            "repetition_sum": counts.repetition,
            "distinct_first_tokens": distinct,
        }
        for name, value in values.items():
            self._trainer._metrics["train"][name].append(torch.tensor(value, dtype=torch.float64))

    # ---- warnings ----------------------------------------------------------------------------------------------------

    def _warn(self) -> None:
        step, most = self._trainer.state.global_step + 1, self._limit
        last = sum(self._last, SampleCounts())
        if len(self._last) == _STEPS and last.mean_repetition > _REPEATED:
            self._once("repetition", _REPEATS, 100 * last.mean_repetition, _STEPS, step)
        if len(self._first) < _STEPS:
            return
        first = sum(self._first, SampleCounts())  # of the same limit as the last ones, which are no fewer
        if first.cut_share >= _NEARLY_ALL:
            self._once("endless", _ENDLESS, _STEPS, 100 * first.cut_share, most)
        if last.length >= 2 * first.length:
            self._once("length", _LONGER, last.length, _STEPS, first.length, _STEPS, step, most)
        if last.cut_share >= max(2 * first.cut_share, _CUT):
            shares = 100 * last.cut_share, 100 * first.cut_share
            self._once("cut", _MORE_CUT, shares[0], _STEPS, most, shares[1], _STEPS, step)

    def _once(self, kind: str, message: str, *values: float) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            if is_main():
                logger.warning(message, *values)

    # ---- its part of a checkpoint ------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """What the warnings depend on, the same on all ranks."""
        return {
            "limit": torch.tensor(self._limit),
            "warned": torch.tensor([kind in self._warned for kind in _KINDS]),
            "first": _packed(self._first),
            "last": _packed(self._last),
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave; it is empty where an earlier version wrote the checkpoint."""
        if not state:
            return
        self._limit = int(state["limit"])
        self._warned = {kind for kind, warned in zip(_KINDS, state["warned"].tolist(), strict=True) if warned}
        self._first, self._last = ([SampleCounts(*row) for row in state[name].tolist()] for name in ("first", "last"))


def _packed(windows: Sequence[SampleCounts]) -> torch.Tensor:
    return torch.tensor([astuple(counts) for counts in windows], dtype=torch.float64)


def _samples(batch: Batch) -> Iterator[list[int]]:
    """The tokens of each sample."""
    for labels in batch.labels.tolist():
        yield [token for token in labels if token != IGNORE_INDEX]


def _counts(samples: Sequence[Sequence[int]], cut: Sequence[bool]) -> SampleCounts:
    repeated = [repetition(tokens) for tokens in samples if len(tokens) >= _SHORTEST]
    return SampleCounts(
        samples=len(samples),
        tokens=sum(map(len, samples)),
        cut=sum(cut),
        long=len(repeated),
        repetition=sum(repeated),
    )
