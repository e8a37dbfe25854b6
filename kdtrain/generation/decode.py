"""Sampling from a model, each row from a random stream of its own.

So a sample depends neither on the rows beside it nor on their number, and a run whose batches are cut another way gets
the same ones.

Shapes: B rows, P positions of their prompts, V vocabulary, N new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from kdtrain.errors import NonFiniteError
from kdtrain.generation.call import call_generate, seeded
from kdtrain.generation.loop import Decoding
from kdtrain.generation.padding import rows_may_leave


class NonFiniteLogits(NonFiniteError):
    """NaN or infinity where the next token was to be drawn.

    Args:
        row: of the prompts, the first one of those that it happened to.
        position: how many tokens it had got by then.
        name: of the row, where it is known.
    """

    def __init__(self, row: int, position: int, name: str | None = None) -> None:
        behind = f"{position} new tokens behind the prompt" if position else "right behind the prompt"
        named = name or str(row)
        super().__init__(f"not finite: the logits {behind} of row {named}", {"rows": [named], "new_tokens": position})
        self.row, self.position = row, position


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    device: torch.device,
    *,
    per_token: Mapping[str, torch.Tensor] | None = None,
    visual: Mapping[str, torch.Tensor] | None = None,
) -> list[list[int]]:
    """What a model writes behind each prompt, up to and including the first stop token.

    Args:
        model: not wrapped. Sharded, all ranks call this together.
        seeds: one for each row. What a row gets depends on its own seed and prompt alone, not on the rows beside it
            (but for rounding: the products of a batch may round otherwise than those of one row).
        per_token: what the model takes for every token of the prompts beside their ids, [B, P], padded on the left.
        visual: the images of all rows.

    Raises:
        NonFiniteLogits: after all rows are done, so that the ranks of a sharded model have run as many forwards.
    """
    choose = Draws(seeds, config.max_new_tokens, device) if config.do_sample else most_likely
    loop = Decoding(model, len(prompts), config, choose, may_leave=rows_may_leave(model, device), fixed=visual or ())
    with seeded(seeds[0], device):  # of models that draw in their forward
        call_generate(model, prompts, config, device, custom_generate=loop, **(per_token or {}), **(visual or {}))
    if loop.failed:
        row = min(loop.failed)
        raise NonFiniteLogits(row, len(loop.written[row]))
    return loop.written


class Draws:
    """Draws each row's tokens by the inverse of its cumulative distribution, from random numbers of its own."""

    def __init__(self, seeds: Sequence[int], max_new_tokens: int, device: torch.device) -> None:
        # On the CPU and in float64: the same numbers on every device, and fine enough for the rarest token.
        numbers = [np.random.default_rng(seed).random(max_new_tokens) for seed in seeds]
        self._device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self._uniform_NB = torch.from_numpy(np.stack(numbers, axis=1)).to(self._device)

    def __call__(self, scores_BV: torch.Tensor, rows_B: torch.Tensor, step: int) -> torch.Tensor:
        """See `Choose`. A token of probability 0 is never drawn: the first one is taken whose sum is above the number.

        The number is scaled by the sum of all, which rounding keeps from being 1.
        """
        cumulative_BV = scores_BV.softmax(-1).to(self._device).cumsum(-1, dtype=torch.float64)
        total_B1 = cumulative_BV[:, -1:]
        number_B1 = self._uniform_NB[step][rows_B.to(self._device), None]
        drawn_B1 = torch.searchsorted(cumulative_BV, number_B1 * total_B1, right=True)
        return torch.where(total_B1.isfinite(), drawn_B1, -1)[:, 0].to(scores_BV.device)


def most_likely(scores_BV: torch.Tensor, rows_B: torch.Tensor, step: int) -> torch.Tensor:
    """See `Choose`: greedily."""
    best = scores_BV.max(-1)
    return torch.where(best.values.isfinite(), best.indices, -1)
