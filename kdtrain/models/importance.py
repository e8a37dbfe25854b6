"""What of a decoder does least, seen on text: its layers, the channels of its hidden states, the neurons of its MLPs.

Shapes: L layers, T positions of a row, H hidden width, I width of an MLP.

One pass over the rows, one row at a time: no padding, and nothing depends on how rows lie together. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from kdtrain.errors import DataError
from kdtrain.models.experts import without_router_logits
from kdtrain.models.probe import evaluating


@dataclass(frozen=True)
class Row:
    """A text: its tokens, and which of them are to be predicted (their id, or -100)."""

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class Seen:
    """What a pass over the rows has shown."""

    layers: list[float]
    """[L] block influence of each layer; see `Importance`."""
    channels: torch.Tensor
    """[H] importance of each channel of the hidden states."""
    neurons: Mapping[str, torch.Tensor]
    """Of each linear layer that reads an MLP's neurons, by its name, [I]: the importance of each."""
    ce: float
    """Mean cross-entropy of the labels, nats per token; NaN where no token has one."""


class Importance:
    """Hooks on a model that note, while it reads rows, what its parts do.

    Layers, by ShortGPT's block influence (arXiv 2403.03853, equation 1), over all tokens t:

        BI_l = 1 - mean_t cos(x_l,t, x_l+1,t)            x_l,t the hidden state before layer l, x_l+1,t the one after it

    Channels and neurons, by Minitron (arXiv 2407.14679, section 2.2), absolute values averaged over the tokens of a row
    and their squares summed over rows (its L2 over the batch of a mean over the sequence):

        channel i = Σ_norms sqrt(Σ_rows (mean_t |norm(x_t)_i|)²)
        neuron  i = sqrt(Σ_rows (mean_t |a_t,i|)²)        a the input of an MLP's last linear layer

    Args:
        norms: those of the hidden states, by name.
        readers: linear layers that read an MLP's neurons, by name.
    """

    def __init__(self, layers: Iterable[nn.Module], norms: Mapping[str, nn.Module], readers: Mapping[str, nn.Module]):
        self._angle: dict[int, float] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self._norms, self._readers = tuple(norms), tuple(readers)
        self._hooks = [
            *(layer.register_forward_hook(self._layer(i), with_kwargs=True) for i, layer in enumerate(layers)),
            *(norm.register_forward_hook(self._norm(name)) for name, norm in norms.items()),
            *(reader.register_forward_pre_hook(self._reader(name)) for name, reader in readers.items()),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def count(self, tokens: int) -> None:
        """Say that so many tokens have been read."""
        self._tokens += tokens

    def seen(self, ce: float) -> Seen:
        """What has been noted so far.

        Raises:
            DataError: the hidden states are not finite.
        """
        layers = [1 - self._angle[layer] / self._tokens for layer in sorted(self._angle)]
        if not all(map(math.isfinite, layers)):
            raise DataError(
                "The hidden states of the model are not finite on these rows (NaN or infinity), so that nothing can be "
                "said of its layers. Is it a float16 model that needs bfloat16?"
            )
        channels = [self._squares[name].sqrt() for name in self._norms]
        return Seen(
            layers,
            torch.stack(channels).sum(0) if channels else torch.empty(0),
            {name: self._squares[name].sqrt() for name in self._readers},
            ce,
        )

    def _layer(self, number: int) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = functional.cosine_similarity(before.double(), after.double(), dim=-1)
            self._angle[number] = self._angle.get(number, 0.0) + float(cosines.sum())

        return note

    def _norm(self, name: str) -> Callable[..., None]:
        return lambda _, args, output: self._note(name, output)

    def _reader(self, name: str) -> Callable[..., None]:
        return lambda _, args: self._note(name, args[0])

    def _note(self, name: str, activations: torch.Tensor) -> None:
        mean = activations.double().abs().flatten(0, -2).mean(0).cpu()
        self._squares[name] = self._squares.get(name, 0) + mean.square()


def look(model: PreTrainedModel, rows: Iterable[Row], importance: Importance | None = None) -> float:
    """Let a model read rows, and return the mean cross-entropy of their labels in nats per token.

    Of no label at all it is NaN.
    """
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with evaluating(model), without_router_logits(model):
        for row in rows:
            ids = torch.tensor([row.input_ids], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            labels = torch.tensor(row.labels[1:], device=device)
            asked = labels != -100
            total += float(functional.cross_entropy(logits[asked].float(), labels[asked], reduction="sum"))
            count += int(asked.sum())
            if importance is not None:
                importance.count(len(row.input_ids))
    return total / count if count else math.nan
