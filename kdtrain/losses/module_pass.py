"""The chunked pass for a head that is a module: a quantised layer, or one with an adapter on it.

Shapes: C tokens of one chunk, S of all, H hidden width, V vocabulary.

Such a head's product is its own affair, and so is the way back through it. So for each chunk the module is called under
autograd, the terms and the gradient of its logits are made as for any head, and autograd takes that gradient to the
hidden states and the module's parameters at once: the graph of one chunk is there at a time. What the chunks find is
summed up, and each parameter gets one gradient in the backward pass, as hooks on it expect (DDP).
"""

from __future__ import annotations

import torch
from torch import nn

from kdtrain.losses.chunks import ChunkedPass
from kdtrain.losses.gradients import Gradients
from kdtrain.losses.head import Head


def trained_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a head that want a gradient, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class ModulePass(ChunkedPass):
    """One forward pass over the chunks, through the head's module.

    `wanted` says of the hidden state and each of `trained_of(module)` whether its gradient is.
    """

    _through: ModuleGradients

    def _operands(self, hidden_SH: torch.Tensor, half: torch.dtype | None) -> tuple[torch.Tensor, Head]:
        return hidden_SH, self.call.student  # the module sees to dtypes itself, and under autocast as in its model

    def _gradients(self, hidden_SH: torch.Tensor, wants: tuple[bool, ...]) -> Gradients:
        self._through = ModuleGradients(self.call.student, hidden_SH, wants)
        self._in_unit(hidden_SH.dtype)
        return self._through

    def _project(self, chunk: slice, out: torch.Tensor) -> None:
        taught = self.with_gradient and chunk.start < self.taught
        self._through.project(self.hidden[chunk], out, taught)

    def found_gradients(self) -> list[torch.Tensor | None]:
        return [self._through.hidden, *self._through.of_trained]


class ModuleGradients:
    """Takes the gradient of each chunk's logits back through the module; see `Gradients`.

    Args:
        hidden_SH: of the tokens that a term teaches.
        wanted: whether the gradients of the hidden state and of each trained parameter are.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def __init__(self, head: Head, hidden_SH: torch.Tensor, wanted: tuple[bool, ...]) -> None:
        assert head.module is not None
        self._head, self._kind = head, hidden_SH.device.type
        # The loss switches autocast off for what it computes itself.
        self._autocast = torch.is_autocast_enabled(self._kind), torch.get_autocast_dtype(self._kind)
        # Stand-ins: hooks on the parameters themselves would be called for each chunk.
        self._trained = {
            name: one.detach().requires_grad_(want)
            for (name, one), want in zip(trained_of(head.module).items(), wanted[1:], strict=True)
        }
        self.hidden = torch.empty_like(hidden_SH, dtype=_wide(hidden_SH)) if wanted[0] else None
        self.of_trained = [
            torch.zeros_like(one, dtype=_wide(one)) if one.requires_grad else None for one in self._trained.values()
        ]
        self._graph: tuple[torch.Tensor, torch.Tensor] | None = None

    def project(self, hidden_CH: torch.Tensor, out: torch.Tensor, taught: bool) -> None:
        """What the module makes of a chunk into `out`; its graph is kept until the next `add` where that comes."""
        enabled, dtype = self._autocast
        # Without its cache, which would keep a cast copy of each stand-in until the model's forward ends.
        autocast = torch.autocast(self._kind, dtype=dtype, enabled=enabled, cache_enabled=False)
        with torch.set_grad_enabled(taught), autocast:
            leaf = hidden_CH.detach().requires_grad_(taught)
            made = self._head.raw_logits(leaf, self._trained)
        out.copy_(made.detach())
        self._graph = (leaf, made) if taught else None

    def room(self, tokens: int) -> None:
        return None

    def add(self, chunk: slice, gradient_CV: torch.Tensor) -> None:
        assert self._graph is not None
        (leaf, made), self._graph = self._graph, None
        into = [None if self.hidden is None else self.hidden[chunk], *self.of_trained]
        pairs = [
            (one, total) for one, total in zip((leaf, *self._trained.values()), into, strict=True) if total is not None
        ]
        found = torch.autograd.grad(made, [one for one, _ in pairs], gradient_CV.to(made.dtype), allow_unused=True)
        for (one, total), gradient in zip(pairs, found, strict=True):
            if one is leaf:
                total.zero_() if gradient is None else total.copy_(gradient)
            elif gradient is not None:
                total.add_(gradient)

    def finish(self) -> None:
        return None


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
