"""What a divergence, its numbers and the targets of the teacher must be to each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kdtrain.config.options import RENORMALIZED, OnPolicyLoss
from kdtrain.config.schema import DataSource, RunConfig
from kdtrain.config.tree import KeyPath, Problem, Written
from kdtrain.losses.kinds import BUCKET_ONLY, WITH_BETA, Divergence


class UsedLoss(NamedTuple):
    """How some rows are compared with their teacher."""

    divergence: Divergence
    beta: float

    def with_own(self, own: DataSource | OnPolicyLoss) -> UsedLoss:
        """With what a source, or `on_policy`, says of its rows."""
        return UsedLoss(own.divergence or self.divergence, self.beta if own.beta is None else own.beta)

    @property
    def student_mass_counts(self) -> bool:
        """Whether what the student finds likely counts by itself, as in reverse KL, and not only at the teacher's."""
        return self.beta > 0 if self.divergence in WITH_BETA else self.divergence != "skew_kl"


def used_losses(config: RunConfig) -> list[tuple[KeyPath, UsedLoss]]:
    """All the ways in which rows of a run are compared, and the section that says so."""
    rlhf = config.rlhf
    base = UsedLoss(rlhf.divergence, rlhf.beta)
    found: dict[KeyPath, UsedLoss] = {("rlhf",): base}
    for number, source in enumerate(config.data.train):
        of_source = base.with_own(source)
        if of_source != base and rlhf.lmbda < 1:
            found["data", "train", number] = of_source
        if rlhf.lmbda > 0 and (own := of_source.with_own(rlhf.on_policy)) not in found.values():
            found["rlhf", "on_policy"] = own
    for number, source in enumerate(config.data.eval_sources if config.options.eval_kd else ()):
        if (of_source := base.with_own(source)) != base:
            found["data", "eval", number] = of_source
    return list(found.items())


def renormalized_tail(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Top-k targets without their tail, where the student's own mass counts in the divergence."""
    rlhf, path = config.rlhf, ("rlhf", "teacher", "tail")
    from kdtrain.config.cached import gives_top_k  # which reads the losses that are used here

    if config.options.crosses_tokenizers:  # which has a rule of its own
        return
    if not (config.options.lm_kd_active and rlhf.teacher.tail == "renormalize" and gives_top_k(config)):
        return
    used = [loss for _, loss in used_losses(config)]
    if without := [loss.divergence for loss in used if loss.divergence in BUCKET_ONLY]:
        yield Problem(path, f"must be bucket: {without[0]} cannot do without the tail", "set tail: bucket")
    elif any(loss.student_mass_counts for loss in used):
        yield Problem(path, RENORMALIZED, "use tail: bucket", level="warning")


# Numbers that single divergences have, and which those are.
NUMBERS_OF: dict[str, tuple[str, ...]] = {
    "beta": WITH_BETA,
    "skew_alpha": ("skew_kl", "skew_reverse_kl"),
    "ab_alpha": ("alpha_beta",),
    "ab_beta": ("alpha_beta",),
    "entropy_threshold": ("entropy_aware",),
}


def divergence_numbers(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Numbers of another divergence, and exponents that do not go together."""
    rlhf = config.rlhf
    if not config.options.lm_kd_active or config.options.crosses_tokenizers:
        return
    used = list(dict.fromkeys(loss.divergence for _, loss in used_losses(config)))
    others = [name for name, divergences in NUMBERS_OF.items() if not set(used) & set(divergences)]
    yield from written.idle(others, f"rlhf.divergence is {rlhf.divergence}", "rlhf")
    if "alpha_beta" in used and rlhf.ab_alpha + rlhf.ab_beta < 0:
        message = f"plus rlhf.ab_beta must not be negative, and is {rlhf.ab_alpha + rlhf.ab_beta:g}"
        yield Problem(("rlhf", "ab_alpha"), message, "raise one of the two")
