"""The trainer: windows of rows to terms, gradients and metrics."""

from kdtrain.trainer.trainer import GKDTrainerWithMetrics

__all__ = ["GKDTrainerWithMetrics"]
