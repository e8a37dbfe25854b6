"""What a divergence, its numbers and the targets of the teacher must be to each other."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.cached import gives_top_k
from kdtrain.config.options import RENORMALIZED
from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import Problem, Written
from kdtrain.losses.kinds import BUCKET_ONLY, WITH_BETA


def renormalized_tail(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Top-k targets without their tail, where the student's own mass counts in the divergence."""
    rlhf, path = config.rlhf, ("rlhf", "teacher", "tail")
    if config.options.crosses_tokenizers:  # which has a rule of its own
        return
    if not (config.options.lm_kd_active and rlhf.teacher.tail == "renormalize" and gives_top_k(config)):
        return
    if rlhf.divergence in BUCKET_ONLY:
        yield Problem(path, f"must be bucket: {rlhf.divergence} cannot do without the tail", "set tail: bucket")
    elif config.options.student_mass_counts:
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
    others = [name for name, divergences in NUMBERS_OF.items() if rlhf.divergence not in divergences]
    yield from written.idle(others, f"rlhf.divergence is {rlhf.divergence}", "rlhf")
    if rlhf.divergence == "alpha_beta" and rlhf.ab_alpha + rlhf.ab_beta < 0:
        message = f"plus rlhf.ab_beta must not be negative, and is {rlhf.ab_alpha + rlhf.ab_beta:g}"
        yield Problem(("rlhf", "ab_alpha"), message, "raise one of the two")
