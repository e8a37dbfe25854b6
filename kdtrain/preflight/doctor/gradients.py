"""A term of the loss that hardly moves the student: its share of the gradient at the last hidden states."""

from __future__ import annotations

from collections.abc import Mapping

from kdtrain.config.options import DistillationOptions
from kdtrain.config.tree import KeyPath, Problem

LITTLE = 0.05
"""Share of the sum of the norms below which a term hardly counts."""
_NAMES: Mapping[str, tuple[str, KeyPath]] = {
    "grad_norm_llm_kd": ("The divergence from the teacher", ("rlhf", "llm_kd_weight")),
    "grad_norm_sft": ("The cross-entropy", ("rlhf", "sft_alpha")),
    "grad_norm_vision_kd": ("Visual KD", ("custom", "visual_kd", "weight")),
    "grad_norm_hidden_kd": ("Hidden-state KD", ("custom", "hidden_kd", "weight")),
}
_FIFTH = 0.25  # of the others' norm makes a fifth of the sum


def gradient_findings(norms: Mapping[str, float], options: DistillationOptions, *, itself: bool) -> list[Problem]:
    """Terms whose gradient is under 5 % of the sum of all.

    Args:
        norms: of the weighted terms, on one micro-batch before training.
        itself: whether the student's own weights are the teacher: these two begin equal.
    """
    if options.lm_kd_active and options.lmbda == 1:  # on its own samples there is no cross-entropy
        norms = {name: norm for name, norm in norms.items() if name != "grad_norm_sft"}
    total = sum(norms.values())
    if len(norms) < 2 or not total:
        return []
    weights = {
        "grad_norm_llm_kd": options.llm_kd_weight,
        "grad_norm_sft": options.ce_weight,
        "grad_norm_vision_kd": 0.0 if options.visual_kd is None else options.visual_kd.weight,
        "grad_norm_hidden_kd": 0.0 if options.hidden_kd is None else options.hidden_kd.weight,
    }
    small = [name for name, norm in norms.items() if norm < LITTLE * total]
    return [_finding(name, norms, weights[name]) for name in small if not (itself and name == "grad_norm_llm_kd")]


def _finding(name: str, norms: Mapping[str, float], weight: float) -> Problem:
    term, option = _NAMES[name]
    own, total = norms[name], sum(norms.values())
    others = ", ".join(f"{other} {norm:.3g}" for other, norm in norms.items() if other != name)
    message = (
        f"{term} hardly moves the student: {own / total:.2%} of the gradient ({name} {own:.3g} beside {others}, at "
        "the weights that the run begins with)."
    )
    if not own:
        return Problem(option, message, "On these rows it has no gradient at all.", level="warning")
    fifth = weight * _FIFTH * (total - own) / own
    hint = f"{'.'.join(map(str, option))}: {fifth:.2g} would make it a fifth; or lower the other's, or switch it off."
    return Problem(option, message, hint, level="warning")
