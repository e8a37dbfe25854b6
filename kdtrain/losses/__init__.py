"""Distillation losses. Each takes plain tensors and can be used without the trainer."""

from kdtrain.losses.dense import dense_distillation_loss
from kdtrain.losses.divergence import Divergence, generalized_jsd
from kdtrain.losses.reduce import FusedLoss

__all__ = ["Divergence", "FusedLoss", "dense_distillation_loss", "generalized_jsd"]
