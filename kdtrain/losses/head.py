"""A language-model head as numbers: from a hidden state to logits, and what the model does to them.

Shapes: C tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kdtrain.losses.gemm import project


def first_masked(bias: torch.Tensor) -> int:
    """`Head.masked_from` of a bias; on a GPU the host waits for it."""
    masked = torch.isinf(bias.detach())
    return int(masked.to(torch.uint8).argmax()) if bool(masked.any()) else len(bias)


@dataclass(frozen=True)
class Head:
    """A language-model head and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    masked_from: int | None = None
    """The first column whose bias is −inf; the vocabulary's size where none is. None is not known."""

    def first_columns(self, count: int) -> Head:
        """The head over the first tokens of the vocabulary only; the same object where that is all of them."""
        if count == len(self.weight):
            return self
        return replace(self, weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])

    def masks_columns(self) -> bool:
        """Whether some logits are always −inf, which the tile's arithmetic does not know. On a GPU the host waits for
        the answer, unless `masked_from` is known."""
        if self.bias is None:
            return False
        if self.masked_from is not None:
            return self.masked_from < len(self.bias)
        return bool(torch.isinf(self.bias).any())

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """[C, V] in the dtype of `out`, which is overwritten."""
        return finish(project(hidden, self.weight, out), self.bias, self.logit_scale, self.softcap)

    def differentiable_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same for any head, in operations that autograd knows."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        out = hidden.to(dtype) @ self.weight.to(dtype).t()
        out = (out if self.bias is None else out + self.bias) * self.logit_scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def finish(
    product_CV: torch.Tensor, bias: torch.Tensor | None, logit_scale: float, softcap: float | None
) -> torch.Tensor:
    """The logits of hidden · weightᵀ, in its place."""
    if bias is not None:
        product_CV.add_(bias)
    if logit_scale != 1:
        product_CV.mul_(logit_scale)
    if softcap is not None:
        product_CV.div_(softcap).tanh_().mul_(softcap)
    return product_CV
