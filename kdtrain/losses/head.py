"""A language-model head as numbers: from a hidden state to logits, and what the model does to them.

Shapes: C tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

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
    module: nn.Module | None = None
    """What makes hidden · weightᵀ + bias where no weight says it: it is quantised, or an adapter is on it. `weight` is
    then a shape, a dtype and a device, and its numbers are NaN; `bias` is None."""

    @classmethod
    def of_module(
        cls, module: nn.Module, size: tuple[int, int], like: torch.Tensor, logit_scale: float, softcap: float | None
    ) -> Head:
        """The head that a module is.

        Args:
            size: V and H.
            like: hidden states; the module's results are of their device, and its weights take no memory here.
        """
        return cls(like.new_full((), torch.nan).expand(size), None, logit_scale, softcap, module=module)

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
        if self.module is not None:
            return finish(out.copy_(self.raw_logits(hidden)), None, self.logit_scale, self.softcap)
        return finish(project(hidden, self.weight, out), self.bias, self.logit_scale, self.softcap)

    def raw_logits(self, hidden: torch.Tensor, parameters: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """What the module makes, before scale and soft-cap, [C, V] in a dtype of its own.

        Args:
            parameters: what takes the place of its own, by name.
        """
        assert self.module is not None
        made: torch.Tensor = torch.func.functional_call(self.module, dict(parameters or {}), (hidden,))
        return made[..., : len(self.weight)]

    def differentiable_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same for any head, in operations that autograd knows."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if self.module is not None:
            out = self.raw_logits(hidden).to(dtype)
        else:
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
