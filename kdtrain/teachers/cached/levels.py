"""Log-probabilities as whole numbers, with an error of at most 0.01 nats each, and less where it would count.

A log-probability is a level, the number of whole steps of ln 2/40 below 0, and for probabilities above 1/256 finer bits
within the step, one more for each doubling. So the error is half a step, 0.0087 nats, for small ones, and for large
ones 2⁻¹³ of probability at most: what a loss sees of it is the same for all.

Rounded probabilities add up to a little more or less than before, and what is missing to 1 is the tail, which may be
smaller than that. So the mass is stored beside them, and entries that are read are scaled to it.

What decides about bytes is computed in operations that are the same on every machine: + − × and rounding.

Shapes: N tokens, K entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ERROR = 0.01
"""Nats: what a log-probability that is read differs by at most."""
MASS_BITS = 24

_PER_HALVING = 40
_STEP = math.log(2) / _PER_HALVING
# Finer bits of a probability in (1/2, 1].
_FINEST = 8
# The mass is a float of 5 bits of exponent and 18 of mantissa, of the tail or of the rest, whichever is smaller.
_IS_KNOWN = 1 << 23
_DROPPED = 23 - 18  # bits of float32's mantissa
_LOWEST = (127 - 31) << 18  # 2⁻³¹, as float32 has it; less is 0


@dataclass(frozen=True)
class Levels:
    """N tokens; a missing entry has the level of the one before it, and no finer bits."""

    levels: np.ndarray
    """[N, K] int64, rising."""
    fine: np.ndarray
    """[N, K] int64: the finer bits, `fine_bits` of them."""
    present: np.ndarray
    """[N, K] bool: entries with a probability; the first ones of each token."""
    masses: np.ndarray
    """[N] int64 of 24 bits."""

    def logprobs(self) -> np.ndarray:
        """[N, K] float64: the middle of what each can be, scaled to the mass; −inf where missing."""
        fraction = np.ldexp(self.fine + 0.5, -fine_bits(self.levels, self.present))
        middle = (self.levels + fraction) * -_STEP
        middle[~self.present] = -np.inf
        sums, wanted = np.exp(middle).sum(1), _known_mass(self.masses)
        scaled = (sums > 0) & (wanted > 0)
        shift = np.log(np.where(scaled, wanted, 1) / np.where(scaled, sums, 1))
        return middle + shift[:, None]


def fine_bits(levels: np.ndarray, present: np.ndarray) -> np.ndarray:
    """[N, K]: how many finer bits each entry has."""
    return np.maximum(_FINEST - levels // _PER_HALVING, 0) * present


def quantise(logprobs: np.ndarray) -> Levels:
    """Levels of log-probabilities [N, K] float64 ≤ 0, falling within a token; −inf where missing."""
    present = np.isfinite(logprobs)
    x = np.where(present, np.minimum(logprobs, 0), 0.0)
    found = Levels(*_levels(x, present), present, _masses(np.where(present, _exp(x), 0.0)))
    # Scaling moves all entries of a token alike: by little, because the large ones are the exact ones. Where it is too
    # much they are moved by a part of a step before they are rounded. One of the 16 parts does: what scaling adds has
    # the mean 0 over a step, and rises by no more than the part by which they are moved.
    for part in [sign * i / 16 for i in range(1, 17) for sign in (1, -1)]:
        error = np.where(present, found.logprobs() - x, 0.0)
        wrong = np.flatnonzero((np.abs(error) > ERROR - 1e-5).any(1))
        if not len(wrong):
            break
        moved = np.minimum(x[wrong] + part * _STEP, 0)
        found.levels[wrong], found.fine[wrong] = _levels(moved, present[wrong])
    return found


def _levels(logprobs: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = logprobs * (-1 / _STEP)
    whole = np.floor(steps)
    levels = np.maximum.accumulate(np.where(present, whole, 0).astype(np.int64), axis=1)
    fine = np.floor(np.ldexp(steps - whole, fine_bits(levels, present))).astype(np.int64)
    return levels, fine


def _masses(probabilities: np.ndarray) -> np.ndarray:
    """[N]: 1 − Σ, or Σ with a bit of its own, as a float of 23 bits."""
    known = np.cumsum(probabilities, axis=1)[:, -1]  # in this order on every machine
    tail = np.maximum(1 - known, 0)
    smaller = np.minimum(known, tail).astype(np.float32).view(np.int32).astype(np.int64)
    code = np.maximum((smaller + (1 << _DROPPED - 1) >> _DROPPED) - _LOWEST, 0)
    return np.where(known < tail, code | _IS_KNOWN, code)


def _known_mass(masses: np.ndarray) -> np.ndarray:
    """[N] float64: Σ; 0 where it is too small to be stored."""
    code = masses & ~_IS_KNOWN
    smaller = np.where(code > 0, code + _LOWEST << _DROPPED, 0).astype(np.int32).view(np.float32).astype(np.float64)
    return np.where(masses & _IS_KNOWN, smaller, 1 - smaller)


def _exp(x: np.ndarray) -> np.ndarray:
    """exp of numbers ≤ 0, to 1e-15. Libraries' differ by processor in the last digit, which can become another byte."""
    x = np.maximum(x, -700)
    halvings = np.rint(x * 1.4426950408889634)
    rest = x - halvings * 0.693147180369123816490 - halvings * 1.90821492927058770002e-10
    value = np.ones_like(rest)
    for n in range(13, 0, -1):
        value = value * rest / n + 1
    return np.ldexp(value, halvings.astype(np.int64))
