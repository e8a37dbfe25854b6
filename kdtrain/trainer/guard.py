"""Losses, gradients and weights that are not finite: they stop the run before they do harm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kdtrain.errors import NonFiniteError
from kdtrain.trainer.deepspeed import guard_steps, not_a_norm
from kdtrain.trainer.metrics import LOSS_TERMS

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


class NonFiniteGuard:
    """Checks what a trainer has recorded and trained; its errors are `NonFiniteError`s that say what and where."""

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self._engine: nn.Module | None = None

    def watch_steps(self, engine: nn.Module) -> None:
        """Check each optimizer step of DeepSpeed's where it takes them, within backward; from now on."""
        if engine is not self._engine:
            guard_steps(engine, self._trainer.accelerator, self._error)
            self._engine = engine

    def check_losses(self, norm: Any = None) -> None:
        """Raise where a term of this window is not finite on any rank; a collective.

        An infinite loss can have a finite gradient, so that the norm of the gradient does not show it.
        """
        recorded, newest = self._trainer._metrics["train"], self._trainer.args.gradient_accumulation_steps
        accelerator = self._trainer.accelerator
        values = [value.float() for key in LOSS_TERMS for value in recorded.get(key, ())[-newest:]]
        # With a 0 in front, so that a rank without terms takes part in the collective like the others.
        stacked = torch.stack([torch.zeros((), device=accelerator.device), *values])
        bad = (~torch.isfinite(stacked)).any().float()
        if accelerator.gather(bad[None]).max():
            raise self._error(norm)

    def check_step(self, engine: Any, norm: Any) -> None:
        """Raise before an optimizer step whose gradient or loss is not finite."""
        trainer = self._trainer
        # A gradient scaler skips steps whose fp16 gradients overflowed, and lowers its scale: that is its job.
        scaled = engine.fp16_enabled() if trainer.is_deepspeed_enabled else trainer.accelerator.scaler is not None
        if norm is not None and not scaled and not_a_norm(norm):
            raise self._error(norm)
        self.check_losses(norm)

    def check_weights(self, together: bool) -> None:
        """Raise where a trained weight is not finite, which else only the next step would show. Reads each once.

        Args:
            together: ask all ranks; a collective.
        """
        trainer = self._trainer
        trained = {name: local_part(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
        if trainer.visual is not None:
            trained |= {f"visual projector {name}": p for name, p in trainer.visual.projectors.named_parameters()}
        device = trainer.accelerator.device
        good = torch.tensor([True], device=device)
        if trained:
            good = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in trained.values()])
        bad = [name for name, is_good in zip(trained, good.tolist(), strict=False) if not is_good]
        if together and not bool(trainer.accelerator.gather(good.all()[None]).all()):
            bad = bad or ["those of another rank"]
        if bad:
            raise NonFiniteError(
                f"Not finite after step {trainer.state.global_step}: trained weights, the first {', '.join(bad[:3])}. "
                "They were not saved. Lower training.learning_rate, or go on from an earlier checkpoint with --resume "
                "PATH."
            )

    def _error(self, norm: Any) -> NonFiniteError:
        trainer = self._trainer
        recorded = trainer._metrics["train"]
        bad = [key for key in LOSS_TERMS if any(not torch.isfinite(value) for value in recorded.get(key, ()))]
        cause = f"the loss term {', '.join(bad)} is not finite" if bad else "all loss terms of this rank are finite"
        return NonFiniteError(
            f"Not finite at step {trainer.state.global_step + 1}, rank {trainer.accelerator.process_index} (gradient "
            f"norm {norm}): {cause}. The optimizer step was not taken. Lower training.learning_rate, train in float32, "
            "or look at the rows of this step."
        )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that FSDP or ZeRO-3 keeps in pieces; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
