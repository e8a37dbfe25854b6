"""A teacher in this process: a transformers model, frozen and in eval mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kdtrain.vocabulary import vocabulary_size


class LocalTeacher:
    """Teacher over a loaded model.

    The model is frozen here: `requires_grad` off and eval mode, so that no optimizer, gradient or dropout ever reaches
    it, whatever state it was handed over in.

    Args:
        module: a transformers model with a language-model head.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module | None = module.requires_grad_(False).eval()
        self.vocab_size = vocabulary_size(module)

    def targets(self, inputs: Mapping[str, Any], predicts_BT: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] in the model's dtype, on its device; see `Teacher.targets`."""
        assert self.module is not None
        self.module.eval()  # a caller may have called .train() on a parent
        with torch.no_grad():
            outputs = self.module(**inputs, use_cache=False)
        logits_BTV = outputs.logits[:, :-1]
        return logits_BTV[predicts_BT.to(logits_BTV.device)]
