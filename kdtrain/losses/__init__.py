"""Distillation losses. Each takes plain tensors and can be used without the trainer."""

from kdtrain.losses.dense import dense_distillation_loss
from kdtrain.losses.divergence import Divergence, generalized_jsd
from kdtrain.losses.fused import fused_distillation_loss
from kdtrain.losses.reduce import FusedLoss
from kdtrain.losses.topk import TopKLogprobs, topk_divergence

__all__ = [
    "Divergence",
    "FusedLoss",
    "TopKLogprobs",
    "dense_distillation_loss",
    "fused_distillation_loss",
    "generalized_jsd",
    "topk_divergence",
]
