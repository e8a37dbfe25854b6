"""Which prompts a model can answer together.

Within a generation prompts are padded on the left, so that all end where the answers begin. Some models do not honour
that (RecurrentGemma reads the padding, MiniMax decays with it, BART's decoder counts it as positions), and RWKV mixes
the rows of a batch: they would answer another question. What a model does is tried before its first generation, and
prompts that it cannot answer together are generated apart.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from kdtrain.errors import PreflightError
from kdtrain.generation.call import call_generate, is_sharded, seeded
from kdtrain.generation.sampling import generation_config
from kdtrain.models.probe import as_preflight_error, few_tokens, name_of
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)


def answered_together(
    model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device, images: bool
) -> list[list[int]]:
    """Rows that are generated together: as many as get the answers that each would get alone."""
    share = who_shares_a_batch(model, device)
    if share == "all":
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt) if share == "equally long" else i, []).append(i)
    refusal = None
    if is_sharded(model):  # ranks with other lengths would wait for each other's forwards
        refusal = "under FSDP and ZeRO-3 prompts", "Train it with plain data parallelism, or set"
    elif images and len(by_length) > 1:
        refusal = "prompts with images", "Set training.per_device_train_batch_size: 1, or"
    if refusal is not None:
        raise PreflightError(
            f"{name_of(model)} writes other answers to a prompt that shares a batch than to the prompt alone, and "
            f"{refusal[0]} cannot be generated apart. {refusal[1]} rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
    return list(by_length.values())


Share = Literal["all", "equally long", "none"]
_SHARES: weakref.WeakKeyDictionary[nn.Module, Share] = weakref.WeakKeyDictionary()


def who_shares_a_batch(model: nn.Module, device: torch.device) -> Share:
    """Which prompts a model answers beside others as it does alone; tried once for each model.

    A model in pieces is tried by all ranks together.
    """
    if model not in _SHARES:
        difference = _difference_beside(model, device, longer=True)
        if difference == 0.0:
            _SHARES[model] = "all"
            return "all"
        equal = _difference_beside(model, device, longer=False) == 0.0
        _SHARES[model] = "equally long" if equal else "none"
        if is_main():
            logger.warning(
                "%s does not honour padding on the left of a prompt (what it writes moves by %.2g): %s, which takes "
                "longer.",
                name_of(model),
                difference,
                "only prompts of equal length are generated together" if equal else "prompts are generated one by one",
            )
    return _SHARES[model]


def _difference_beside(model: Any, device: torch.device, longer: bool) -> float:
    """How far a prompt beside it moves what is written behind another, relative to its size; 0 if it is rounding.

    Experts that are chosen in other groups round differently, and a tie may break the other way: but not for every
    text.
    """
    ids = few_tokens(model, device, 20)[0]
    for shift in (0, 5, 10):
        moved, tolerance = _difference_of_text(model, device, ids.roll(shift).tolist(), longer)
        if moved <= tolerance:
            return 0.0
    return moved


def _difference_of_text(model: Any, device: torch.device, ids: list[int], longer: bool) -> tuple[float, float]:
    """The largest relative change of the logits of three tokens, and what rounding may make of it.

    Three, because some models read a padded prompt rightly and go on from a wrong state.
    """
    prompt, neighbour = ids[-5:], ids[:13] if longer else ids[:5]
    config = generation_config([], ids[-1], None, 3)
    config.output_logits = config.return_dict_in_generate = True

    def same_token(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([ids[0]], device=scores.device), 0.0)

    with (
        seeded(0, device),
        as_preflight_error(f"{name_of(model)} cannot write answers"),
        _noted_dtypes(model) as dtypes,
    ):
        beside, alone = (
            torch.stack(call_generate(model, prompts, config, device, logits_processor=[same_token])[0].logits)[:, 0]
            for prompts in ([prompt, neighbour], [prompt])
        )
    tolerance = 3e-2 if dtypes & {torch.float16, torch.bfloat16} else 1e-4
    moved = (beside.float() - alone.float()).norm(dim=-1) / alone.float().norm(dim=-1)
    return float(moved.nan_to_num(torch.inf).max()) if alone.isfinite().all() else 0.0, tolerance


@contextmanager
def _noted_dtypes(model: Any) -> Iterator[set[torch.dtype]]:
    """The dtypes that a model computes in: of its weights, and of its head's output where autocast or FSDP cast them.

    Neither can be asked for outside its forward: accelerate wraps that, and makes float32 of what comes out.
    """
    dtypes = {model.dtype}
    head = model.get_output_embeddings()
    if head is None:
        yield dtypes
        return
    handle = head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    try:
        yield dtypes
    finally:
        handle.remove()
