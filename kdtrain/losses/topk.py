"""Divergence from a teacher that is known by its k most likely tokens only.

Shapes: N supervised tokens, V vocabulary, K known tokens per position.

The distributions are first coarse-grained to the known tokens and what is left (`tail`), then softened by the
temperature, then compared by `generalized_jsd`: at K = V this is the divergence of the full distributions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, get_args

import torch

from kdtrain.errors import NonFiniteTargetsError, TargetsError
from kdtrain.host import send
from kdtrain.losses.divergence import generalized_jsd
from kdtrain.losses.kinds import BUCKET_ONLY, DEFAULT_PARAMS, Divergence, DivergenceParams, Tail

# The tail of a teacher whose known probabilities add up to 1 within float32: a bucket of exactly 0 would make the
# reverse KL infinite, although all that is known is that the tail is small.
_SMALLEST_TAIL = 1e-8
# Probabilities of one position may add up to this much more than 1 (rounding of whoever computed them); they are then
# divided by their sum. In half precision the logarithms themselves are rounded by more.
_EXCESS_MASS = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
_LEAST_EXCESS_MASS = 1e-3
# No model's log-probability. Such a number fills up a row, and would count as an extremely unlikely token.
_FILLER = -1e4


class NamesIds(Protocol):
    """What names tokens at each position."""

    @property
    def indices(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class TopKLogprobs:
    """A teacher's most likely tokens, at temperature 1 and normalised over the whole vocabulary.

    Log-probabilities that were normalised over the K tokens alone look the same as those of a teacher that is certain
    of these tokens. Nothing here can tell them apart: with `tail="bucket"` they teach that everything else is
    impossible. Give those of the whole vocabulary, or use `tail="renormalize"`.

    Args:
        indices: [N, K] int64, token ids, different within a row. −1 marks a missing entry; its logprob must be −inf.
        logprobs: [N, K] float, natural logarithms ≤ 0; Σ exp ≤ 1 per row. A sum of up to 1.001 (float16 1.004,
            bfloat16 1.03: they round logarithms by that much) is divided out.

    Raises:
        ValueError: shapes that differ; and, for tensors on a CPU, NaN (`NonFiniteTargetsError`), an id twice in a row,
            probabilities that add up to more, a missing entry with a logprob, or a number such as −1e9 in place of −inf
            (`TargetsError`). On another device the values are not looked at: the host would wait for it.
    """

    indices: torch.Tensor
    logprobs: torch.Tensor

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.indices.shape != self.logprobs.shape:
            raise TargetsError(
                f"expected indices [N, K] and logprobs [N, K], got {tuple(self.indices.shape)} "
                f"and {tuple(self.logprobs.shape)}"
            )
        if self.indices.dtype.is_floating_point or not self.logprobs.dtype.is_floating_point:
            raise TargetsError(
                "expected integer indices and floating point logprobs, got "
                f"{self.indices.dtype} and {self.logprobs.dtype}"
            )
        if self.indices.device.type == self.logprobs.device.type == "cpu" and self.indices.numel():
            object.__setattr__(self, "logprobs", _checked_logprobs(self.indices, self.logprobs))

    def __getitem__(self, rows: torch.Tensor | slice) -> TopKLogprobs:
        return self._of_checked(self.indices[rows], self.logprobs[rows])

    def to(self, device: torch.device) -> TopKLogprobs:
        """The same targets on a device."""
        return self._of_checked(send(self.indices, device), send(self.logprobs, device))

    @classmethod
    def _of_checked(cls, indices: torch.Tensor, logprobs: torch.Tensor) -> TopKLogprobs:
        """Parts and copies of targets need no second look: it sorts every row."""
        targets = object.__new__(cls)
        object.__setattr__(targets, "indices", indices)
        object.__setattr__(targets, "logprobs", logprobs)
        return targets


def _checked_logprobs(indices: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """The logprobs of a position, [N, K]; divided by their sum where that is above 1 by a rounding.

    Raises:
        TargetsError, NonFiniteTargetsError: naming the first position that holds no distribution.
    """
    missing = indices < 0
    mass = logprobs.double().exp().sum(-1)
    most = 1 + _EXCESS_MASS.get(logprobs.dtype, _LEAST_EXCESS_MASS)
    wrong = {
        "NaN or infinity among the logprobs": (logprobs.isnan() | (logprobs == torch.inf)).any(-1),
        "a token id twice": repeated_ids(indices),
        "a missing entry (id −1) whose logprob is not −inf": (missing & (logprobs != -torch.inf)).any(-1),
        f"a logprob below {_FILLER:g} that is not −inf: mark a missing entry by the id −1 and −inf, not by a large "
        "negative number": ((logprobs < _FILLER) & (logprobs != -torch.inf)).any(-1),
        f"probabilities that add up to more than {most:g}": mass > most,
    }
    refuse_wrong("top-k targets", "logprobs", wrong, indices, logprobs)
    excess = mass.log().clamp(min=0)
    if not excess.any():
        return logprobs
    return (logprobs.double() - excess[:, None]).to(torch.promote_types(logprobs.dtype, torch.float32))


def refuse_wrong(
    kind: str, of_what: str, wrong: Mapping[str, torch.Tensor], indices: torch.Tensor, values: torch.Tensor
) -> None:
    """Raise for the first problem, [N] bool, that a row of targets [N, K] has; NaN, where it is looked for, first.

    Raises:
        TargetsError, NonFiniteTargetsError: naming the first such position.
    """
    for problem, rows in wrong.items():
        if rows.any():
            first = int(rows.nonzero()[0])
            text = (
                f"position {first} of the {kind} has {problem} (ids {indices[first].tolist()[:8]}, "
                f"{of_what} {[round(x, 4) for x in values[first].tolist()[:8]]}; {int(rows.sum())} positions like it)"
            )
            if problem.startswith("NaN"):
                raise NonFiniteTargetsError(f"The teacher's targets are not finite: {text}.")
            raise TargetsError(f"The teacher's targets are no distributions: {text}.")


def repeated_ids(indices: torch.Tensor) -> torch.Tensor:
    """[N] bool: which rows of [N, K] name a token twice."""
    in_order = indices.sort(-1).values
    return ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(-1)


def topk_divergence(
    student_logits: torch.Tensor,
    targets: TopKLogprobs,
    beta: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = "jsd",
    tail: Tail = "bucket",
    params: DivergenceParams = DEFAULT_PARAMS,
) -> torch.Tensor:
    """Divergence between a top-k teacher and the student at every position.

    Args:
        student_logits: [N, V], any float dtype.
        targets: N rows.
        beta, temperature, divergence, params: as in `generalized_jsd`.
        tail: `bucket` keeps the mass outside K as one more outcome on both sides; `renormalize` drops it on both.

    Returns:
        [N], nats per token, float32, finite and never negative; at K = V the full divergence.

    The gradient flows to the student's logits, and with `bucket` to all of them. Of the two, the bucket's gradient is
    nearer to the full one: without it, mass that the student moves out of K is not noticed.

    Raises:
        ValueError: shapes or ids that do not fit, and what `generalized_jsd` refuses.
    """
    check_tail(tail, divergence)
    student_known, teacher_known = coarse_grain(student_logits, targets, tail)
    return generalized_jsd(student_known, teacher_known, beta, temperature, divergence, params)


def coarse_grain(student_logits: torch.Tensor, targets: TopKLogprobs, tail: Tail) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of both models over the known tokens, and with `bucket` one more column for all others.

    Returns:
        Two tensors [N, K] or [N, K + 1], float32; a missing entry is −inf on both sides.
    """
    check_targets(targets, len(student_logits), student_logits.shape[-1], tail)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    logits = student_logits.to(dtype)
    teacher = targets.logprobs.to(device=logits.device, dtype=dtype)
    indices = targets.indices.to(logits.device)
    missing = indices < 0
    ids = indices.clamp(min=0)
    log_p = torch.log_softmax(logits, -1)
    student = log_p.gather(1, ids).masked_fill(missing, -torch.inf)
    if tail == "renormalize":
        return student, teacher
    known = known_columns(targets, logits.shape[1], logits.device)
    everything = known.all(-1, keepdim=True)
    # A student may mask columns by −inf: then nothing can be left although there are more columns than known ones.
    impossible = known | (logits == -torch.inf)
    nothing_left = impossible.all(-1, keepdim=True)
    # By the logits that are left rather than as 1 − Σ, which has no digits where the tail is small. A row with nothing
    # left gets numbers to work on, whose result is not used: the gradient of log 0 would be NaN.
    left = torch.where(nothing_left, 0.0, log_p.masked_fill(impossible, -torch.inf))
    student_tail = torch.logsumexp(left, -1, keepdim=True).masked_fill(nothing_left, -torch.inf)
    return torch.cat([student, student_tail], 1), torch.cat([teacher, teacher_tail(teacher, everything)], 1)


def known_columns(targets: TopKLogprobs, vocabulary: int, device: torch.device) -> torch.Tensor:
    """[N, V] bool: which tokens a teacher has named."""
    indices = targets.indices.to(device)
    # Missing entries go to a column of their own, which is cut off.
    ids = torch.where(indices < 0, vocabulary, indices)
    known = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=device).scatter_(1, ids, True)
    return known[:, :vocabulary]


def teacher_tail(logprobs: torch.Tensor, everything: torch.Tensor) -> torch.Tensor:
    """log of the teacher's mass outside the known tokens, [N, 1]; −inf where every token is known."""
    left = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=_SMALLEST_TAIL)
    return left.log().masked_fill(everything, -torch.inf)


def check_targets(targets: NamesIds, tokens: int, vocabulary: int, tail: str, divergence: Divergence = "jsd") -> None:
    """Raise `ValueError` for a tail that does not fit, a wrong number of rows, or ids outside the vocabulary.

    Ids are looked at on a CPU only.
    """
    check_tail(tail, divergence)
    check_ids(targets.indices, "top-k targets", tokens, vocabulary)


def check_tail(tail: str, divergence: str) -> None:
    """Raise `ValueError` for an unknown tail, and for one that the divergence cannot have.

    `renormalize` compares conditional distributions; total variation and the α-β divergence are made of probabilities
    as they are, and would be of another size.
    """
    if tail not in get_args(Tail):
        raise ValueError(f"tail must be {' or '.join(get_args(Tail))}, got {tail!r}")
    if tail == "renormalize" and divergence in BUCKET_ONLY:
        raise ValueError(f"tail is renormalize, which {divergence} cannot have: use bucket")


def check_ids(indices: torch.Tensor, kind: str, tokens: int, vocabulary: int) -> None:
    """Raise `TargetsError` for a wrong number of rows [N, K], or, on a CPU, for ids outside the vocabulary."""
    if len(indices) != tokens:
        raise TargetsError(f"The teacher gave {len(indices)} rows of {kind} for {tokens} supervised tokens.")
    if indices.device.type != "cpu":  # reading them would make the host wait for the device
        return
    if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < vocabulary:
        raise TargetsError(f"The teacher's ids of {kind} must be in [0, {vocabulary}), or -1 where missing.")
