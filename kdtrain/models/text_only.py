"""Batches without images where images alone train the student: its language model is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from kdtrain.errors import PreflightError
from kdtrain.models.layouts import layout_of
from kdtrain.models.parts import part_of
from kdtrain.models.tuning import uses_reentrant_checkpointing


def trained_by_images_alone(model: nn.Module) -> bool:
    """Whether nothing of the language model is trained, so that a text-only batch has no gradient at all."""
    return layout_of(model) is not None and not any(p.requires_grad for p in part_of(model, "llm").values())


def keep_a_path(model: nn.Module) -> None:
    """Give the model's output a gradient path of zeros, for batches without images.

    Without one `backward` fails on a rank that has no image, while the others wait for it. The path is made within the
    forward, since DDP finds the gradients to wait for from a forward's outputs. The model's output is a tuple of
    tensors (a loss head's), or has `logits`.
    """
    first = next(p for p in model.parameters() if p.requires_grad)

    def add_zero(module: nn.Module, args: Any, output: Any) -> Any:
        if not (torch.is_grad_enabled() and module.training):
            return None
        zero = first.reshape(-1)[:0].sum()  # of nothing: 0 even where a weight is not finite
        if isinstance(output, tuple):
            return (output[0] + zero.to(output[0]), *output[1:])
        output.logits = output.logits + zero.to(output.logits)
        return output

    model.register_forward_hook(add_zero)


def check_reentrant(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse reentrant checkpointing of a vision encoder that is trained in parts (LoRA): most would not be.

    Its first layers' input needs no gradient, and the reentrant kind then makes no graph inside them.
    """
    if not uses_reentrant_checkpointing(args) or layout_of(model) is None:
        return
    trained = [p.requires_grad for p in part_of(model, "vit").values()]
    if any(trained) and not all(trained):
        raise PreflightError(
            "training.gradient_checkpointing_kwargs: {use_reentrant: true} cuts most of a vision encoder that is "
            f"trained in parts ({sum(trained)} of its {len(trained)} tensors) off from the graph. Set "
            "use_reentrant: false, gradient_checkpointing: false (PEFT under ZeRO-3 needs the reentrant kind), "
            "or tuner.freeze_vit: true."
        )
