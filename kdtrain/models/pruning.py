"""Cutting layers and width out of a decoder, in place: the weights that stay are the teacher's own.

H hidden width and W the one that is left, I width of an MLP.

Which axes of which weights are the hidden width, and which an MLP's, is not looked up by names: the same architecture
is built once more without memory, with that one size changed, and the axes that differ are those. Attention keeps its
heads and their size, so that grouped heads, their norms and rotary positions stay as they are.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kdtrain.errors import NotAvailableError
from kdtrain.models.importance import Seen
from kdtrain.models.pruned_config import inner_size, resized, shortened

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder."""
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList), "checked by the model's type"
    return layers


def head_dim_of(model: PreTrainedModel) -> int:
    """Size of an attention head."""
    attention: Any = layers_of(model)[0].get_submodule("self_attn")
    return int(attention.head_dim)


# ---- depth -----------------------------------------------------------------------------------------------------------


def most_important(scores: Sequence[float], count: int) -> list[int]:
    """The numbers of the `count` highest scores, in rising order; of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:count])


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Drop the other layers of a model, and write the rest into its config."""
    layers = layers_of(model)
    model.base_model.layers = nn.ModuleList([layers[layer] for layer in kept])
    for number, layer in enumerate(layers_of(model)):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number  # the place of its keys and values in a cache
    _take(model, shortened(model.config, kept))


def _take(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Change a model's config in place: its modules hold the same object."""
    for name, value in fields.items():
        setattr(model.config, name, value)


# ---- width -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """Which axes of a model's weights are cut with its width."""

    hidden: Mapping[str, tuple[int, ...]]
    """Weight -> the axes that are the hidden width."""
    inner: Mapping[str, tuple[int, ...]]
    """Weight -> the axes that are an MLP's width, or twice that: of a gate and what it gates in one."""

    def norms(self, model: nn.Module) -> dict[str, nn.Module]:
        """The norms of hidden states."""
        names = [name for name in self.hidden if name.endswith("norm.weight")]
        return {name: model.get_submodule(name.removesuffix(".weight")) for name in names}

    def readers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The linear layers that read an MLP's neurons, and write hidden states."""
        found = [name for name, axes in self.inner.items() if axes == (1,) and self.hidden.get(name) == (0,)]
        return {name: model.get_submodule(name.removesuffix(".weight")) for name in found}


def width_axes(model: PreTrainedModel) -> Axes:
    """The axes of a model's weights that are its hidden width, and those that are its MLPs'.

    Raises:
        NotAvailableError: a weight follows the width in another way than a whole axis.
    """
    config, head_dim = model.config, head_dim_of(model)
    # Larger by what the attention heads divide, which some configs want.
    hidden = {"hidden_size": config.hidden_size + config.num_attention_heads, "head_dim": head_dim}
    inner = {"intermediate_size": config.intermediate_size + 1, "head_dim": head_dim}
    return Axes(
        _changed_axes(model, hidden, "hidden_size", (1,)), _changed_axes(model, inner, "intermediate_size", (1, 2))
    )


def _changed_axes(
    model: PreTrainedModel, sizes: Mapping[str, int], name: str, allowed: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    config = resized(model.config, **sizes)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        other = dict(type(model)(config).named_parameters(remove_duplicate=False))
    old, new = getattr(model.config, name), sizes[name]
    found = {}
    for weight, parameter in model.named_parameters():
        pairs = list(zip(parameter.shape, other[weight].shape, strict=True))
        axes = tuple(axis for axis, (ours, theirs) in enumerate(pairs) if ours != theirs)
        times = [pairs[axis][0] // old for axis in axes]
        if any(pairs[axis] != (k * old, k * new) or k not in allowed for axis, k in zip(axes, times, strict=True)):
            raise NotAvailableError(
                f"{weight} of a {model.config.model_type} model follows its {name} in a way that is not known here: "
                "cutting the width is not available yet. Leave --width out."
            )
        if axes:
            found[weight] = axes
    return found


@torch.no_grad()
def narrow(model: PreTrainedModel, width: int, seen: Seen, axes: Axes) -> None:
    """Cut the hidden width of a model to the `width` most important channels, and its MLPs in proportion.

    A norm divides by the root mean square of its channels, which is a mean over fewer of them. So its weights are
    multiplied by sqrt(H/W): where the channels that go are zero it writes what it wrote (but for its eps). Without
    this, as Minitron cuts, the quickstart's teacher at half of its width begins at a perplexity of 318 in place of 227.
    Of embeddings that a model multiplies by sqrt(H) (Gemma) the weights make up for that.

    Args:
        seen: of the model as it is, before layers are dropped.
    """
    old, inner = model.config.intermediate_size, inner_size(model.config, width)
    channels = torch.tensor(most_important(seen.channels.tolist(), width))
    neurons = {_layer(name): torch.tensor(most_important(s.tolist(), inner)) for name, s in seen.neurons.items()}
    gain = _keep_scale_of_embeddings(model, width)
    _keep_scale_of_norms(model, axes, math.sqrt(model.config.hidden_size / width), gain)
    for name, parameter in model.named_parameters():
        for axis in axes.hidden.get(name, ()):
            parameter.data = parameter.data.index_select(axis, channels.to(parameter.device))
        for axis in axes.inner.get(name, ()):  # of a gate and what it gates in one, both halves
            starts = range(0, parameter.shape[axis], old)
            index = torch.cat([neurons[_layer(name)] + start for start in starts])
            parameter.data = parameter.data.index_select(axis, index.to(parameter.device))
    _take(model, {"hidden_size": width, "intermediate_size": inner, "head_dim": head_dim_of(model)})


def _layer(weight: str) -> int:
    found = _LAYER.search(weight)
    assert found is not None, "MLPs are in layers"
    return int(found[1])


def _keep_scale_of_embeddings(model: PreTrainedModel, width: int) -> float:
    """Make up for a model that multiplies embeddings by sqrt(H); by how much logits have grown with tied ones."""
    embeddings = model.get_input_embeddings()
    if not hasattr(embeddings, "scalar_embed_scale"):
        return 1.0
    factor = math.sqrt(model.config.hidden_size / width)
    embeddings.weight.mul_(factor)
    embeddings.scalar_embed_scale /= factor
    embeddings.embed_scale.div_(factor)
    return factor if model.get_output_embeddings().weight is embeddings.weight else 1.0


def _keep_scale_of_norms(model: PreTrainedModel, axes: Axes, factor: float, gain: float) -> None:
    """Multiply what norms write by `factor`; the last one by less, for the `gain` of the head behind it."""
    for norm in axes.norms(model).values():
        own = factor / gain if norm is model.base_model.norm else factor
        offset = _offset(norm)  # Gemma's multiply by 1 + weight
        weight = norm.get_parameter("weight")
        weight.copy_((weight.double() + offset) * own - offset)


def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weights before it multiplies by them: 0 or 1."""
    plain = copy.deepcopy(norm).float()
    plain.get_parameter("weight").zero_()
    ones = torch.ones_like(plain.get_parameter("weight"))
    return round(float(plain(ones).mean()))
