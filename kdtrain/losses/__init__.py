"""Distillation losses. Each takes plain tensors and can be used without the trainer.

They are imported when they are first asked for, so that `kinds` can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdtrain.losses.kinds import Divergence, DivergenceParams

if TYPE_CHECKING:
    from kdtrain.losses.dense import dense_distillation_loss
    from kdtrain.losses.divergence import generalized_jsd
    from kdtrain.losses.fused import fused_distillation_loss
    from kdtrain.losses.reduce import FusedLoss
    from kdtrain.losses.sampled import SampledTargets, sampled_divergence
    from kdtrain.losses.topk import TopKLogprobs, topk_divergence

__all__ = [
    "Divergence",
    "DivergenceParams",
    "FusedLoss",
    "SampledTargets",
    "TopKLogprobs",
    "dense_distillation_loss",
    "fused_distillation_loss",
    "generalized_jsd",
    "sampled_divergence",
    "topk_divergence",
]

_MODULES = {
    "FusedLoss": "reduce",
    "SampledTargets": "sampled",
    "TopKLogprobs": "topk",
    "dense_distillation_loss": "dense",
    "fused_distillation_loss": "fused",
    "generalized_jsd": "divergence",
    "sampled_divergence": "sampled",
    "topk_divergence": "topk",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
