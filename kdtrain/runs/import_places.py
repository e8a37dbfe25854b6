"""Which token each entry of another tool's file describes, and whether it does.

Formats do not say it, or say it differently from version to version, and a file that is off by one trains without a
word. So every place that a format allows is tried on some thousand tokens; one must fit clearly better than the others,
and better than the tokens on either side.

Shapes: S supervised tokens of a row, n entries of it, K tokens of an entry, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdtrain.errors import DataError, PreflightError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.preflight.alignment import FEW, Alignment, alignment_findings, alignment_with, gap
from kdtrain.preflight.findings import report
from kdtrain.runs.import_rows import NO_SUCH_ROW, Candidate, Candidates
from kdtrain.teachers.cached.imported import PLACES, Imported, UnreadableRow
from kdtrain.teachers.cached.store import Format
from kdtrain.teachers.dependence import log_probabilities

# Tokens by which it is decided, of so many rows at most.
_TOKENS, _ROWS = 20_000, 500
# Probabilities that add up to 1 this nearly, nearly everywhere, are normalised over the tokens that are named alone.
_ALL_OF_IT, _NEARLY_EVERYWHERE = 1e-3, 0.99
# Approximated log-probabilities may add up to this much: they are then divided by their sum.
_LOSSY_MASS = 1.03
_LEAST = -30.0


@dataclass(frozen=True)
class Stored:
    """The targets of a row's supervised tokens, as they will be stored."""

    targets: TopKLogprobs
    neighbours_S3: torch.Tensor
    """The token before each, itself, and the one after (−1 where the row ends)."""

    def require_aligned(self, vocab_size: int) -> None:
        """
        Raises:
            UnreadableRow: they fit the tokens on one side far better.
        """
        side = _nearer_side(alignment_with(self.targets, self.neighbours_S3, vocab_size))
        if side is not None:
            raise UnreadableRow(f"their targets fit the token {side} the one that they are for")


@dataclass(frozen=True)
class Survey:
    """What a file holds, as a whole."""

    place: str
    form: Format
    rows: int
    """That have a row of the config."""
    normalized: bool
    """Whether probabilities add up to 1 over the tokens that are named alone."""
    lossy: bool

    def stored(self, candidate: Candidate) -> Stored:
        """
        Raises:
            UnreadableRow: a supervised token has no entry, or what it has is no distribution.
        """
        assert candidate.found is not None
        assert self.form.entries is not None
        rows = _entries_of(candidate, self.place)
        ids, logprobs = candidate.found.ids[rows], candidate.found.logprobs[rows]
        missing = int((ids < 0).all(1).sum())
        if missing:
            raise UnreadableRow("supervised tokens have empty entries", f"{missing} of {len(rows)}")
        if ids.max() >= self.form.vocab_size:
            raise UnreadableRow(f"they name tokens beyond the student's {self.form.vocab_size:,}", f"{ids.max()}")
        targets = _distributions(ids, logprobs, self.form.entries, self.lossy)
        return Stored(targets, _neighbours(candidate))


def survey(candidates: Candidates, vocab_size: int) -> Survey:
    """Look at the whole file once.

    Raises:
        DataError: no row of it is one of the config's.
        PreflightError: where entries belong cannot be told, or they belong to the tokens beside.
    """
    chosen: list[Candidate] = []
    entries = rows = tokens = 0
    masses: list[np.ndarray] = []
    problems: dict[str, str] = {}
    for candidate in candidates:
        if candidate.problem or candidate.found is None:
            problems.setdefault(candidate.problem, candidate.place)
            continue
        rows += 1
        entries = max(entries, candidate.found.ids.shape[1])
        if len(chosen) < _ROWS and tokens < _TOKENS:
            chosen.append(candidate)
            tokens += len(candidate.supervised)
            masses.append(_masses(candidate.found))
    if not chosen:
        said = "".join(f"\n  {place}: {problem}" for problem, place in list(problems.items())[:3])
        advice = (
            "\nIts rows must be those of data.train and data.eval, token by token: the same conversations, tokenizer, "
            "chat template and arguments."
        )
        raise DataError(f"No row of the file can be used. The first ones:{said}{advice * (NO_SUCH_ROW in problems)}")
    place = _place(candidates.file.reader.places, chosen, vocab_size)
    mass = np.concatenate(masses)
    named_alone = entries < vocab_size and np.mean(np.abs(mass - 1) <= _ALL_OF_IT) >= _NEARLY_EVERYWHERE
    form = Format("topk", vocab_size, entries)
    found = Survey(place, form, rows, bool(named_alone), candidates.file.reader.lossy)
    _require_aligned(found, chosen)
    return found


def _entries_of(candidate: Candidate, place: str) -> np.ndarray:
    """[S] numbers of the entries of a row's supervised tokens.

    Raises:
        UnreadableRow: a token has none.
    """
    found = candidate.found
    assert found is not None
    rows = candidate.supervised - PLACES[place](len(candidate.tokens), len(found.ids), int(candidate.supervised[-1]))
    uncovered = int(((rows < 0) | (rows >= len(found.ids))).sum())
    if uncovered:
        raise UnreadableRow("supervised tokens have no entry", f"{uncovered} of {len(rows)}")
    return rows


def _neighbours(candidate: Candidate) -> torch.Tensor:
    after = np.append(candidate.tokens, -1)
    at = candidate.supervised
    return torch.from_numpy(np.stack([candidate.tokens[at - 1], candidate.tokens[at], after[at + 1]], 1))


def _masses(found: Imported) -> np.ndarray:
    named = (found.ids >= 0).any(1)
    masses: np.ndarray = np.exp(found.logprobs[named].astype(np.float64)).sum(1)
    return masses


def _distributions(ids: np.ndarray, logprobs: np.ndarray, width: int, lossy: bool) -> TopKLogprobs:
    """Targets of K = `width`.

    Raises:
        UnreadableRow: probabilities that add up to more than 1, an id twice, and the like.
    """
    logprobs = logprobs.astype(np.float64)
    if lossy:
        excess = np.log(np.exp(logprobs).sum(1, keepdims=True)).clip(min=0)
        logprobs = logprobs - np.where(excess <= np.log(_LOSSY_MASS), excess, 0)
    wide_ids, wide = np.full((len(ids), width), -1, np.int64), np.full((len(ids), width), -np.inf, np.float32)
    wide_ids[:, : ids.shape[1]], wide[:, : ids.shape[1]] = ids, logprobs
    wide[wide_ids < 0] = -np.inf
    try:
        return TopKLogprobs(torch.from_numpy(wide_ids), torch.from_numpy(wide))
    except ValueError as error:
        raise UnreadableRow("the probabilities of a position are no distribution", str(error)) from None


# ---- where they belong -----------------------------------------------------------------------------------------------


def _place(places: Sequence[str], chosen: Sequence[Candidate], vocab_size: int) -> str:
    """The place at which entries fit the tokens that they would be for.

    Raises:
        PreflightError: several do.
    """
    nlls = {place: np.concatenate(list(_nlls(place, chosen, vocab_size))) for place in places}
    distinct: dict[bytes, str] = {}
    for place, nll in nlls.items():
        if not np.isnan(nll).all():
            distinct.setdefault(nll.tobytes(), place)  # of a file in which both are the same
    best, *others = sorted(distinct.values(), key=lambda place: float(np.nanmean(nlls[place]))) or [places[0]]
    for other in others:
        both = ~np.isnan(nlls[best]) & ~np.isnan(nlls[other])
        clear = gap(torch.from_numpy(nlls[other][both]), torch.from_numpy(nlls[best][both]))
        if both.any() and not (clear.is_far and both.sum() >= FEW):
            raise PreflightError(
                f"Which token the entries of the file describe cannot be told: {best} "
                f"({np.nanmean(nlls[best]):.2f} nats per token), or {other} ({np.nanmean(nlls[other]):.2f}). A teacher "
                "that knows such text fits one of them by nats; is the file that of these rows?"
            )
    return best


def _nlls(place: str, chosen: Iterable[Candidate], vocab_size: int) -> Iterator[np.ndarray]:
    """−log p of the supervised tokens, NaN for those of rows that do not fit there."""
    for candidate in chosen:
        found = candidate.found
        assert found is not None
        try:
            rows = _entries_of(candidate, place)
            targets = _distributions(found.ids[rows], found.logprobs[rows], found.ids.shape[1], lossy=True)
        except UnreadableRow:
            yield np.full(len(candidate.supervised), np.nan)
            continue
        labels = torch.from_numpy(candidate.tokens[candidate.supervised])[:, None]
        yield -log_probabilities(targets, labels, vocab_size).clamp(min=_LEAST)[:, 0].numpy()


def _require_aligned(found: Survey, chosen: Sequence[Candidate]) -> None:
    """As before a training; the rows that cannot be read are named when they are written."""
    some = []
    for candidate in chosen:
        try:
            some.append(found.stored(candidate))
        except UnreadableRow:
            continue
    if some:
        together = TopKLogprobs(
            torch.cat([one.targets.indices for one in some]), torch.cat([one.targets.logprobs for one in some])
        )
        beside = torch.cat([one.neighbours_S3 for one in some])
        alignment = alignment_with(together, beside, found.form.vocab_size)
        side = _nearer_side(alignment)
        if side is not None:
            raise PreflightError(
                f"The targets of the file are off by one: they are those of the token {side} the one that they are for "
                f"({found.place}). On your rows: {alignment}."
            )
        report(alignment_findings(alignment, None, found.form.vocab_size))


def _nearer_side(alignment: Alignment) -> str | None:
    """The side that targets fit far better: not even random models do, and nobody stores their targets."""
    sides = {"before": alignment.before, "after": alignment.after}
    return next((side for side, beside in sides.items() if alignment.tokens >= FEW and beside.is_reversed), None)
