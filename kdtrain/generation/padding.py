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
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kdtrain.errors import PreflightError
from kdtrain.generation.call import call_generate, is_sharded, seeded
from kdtrain.generation.loop import Decoding
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


@dataclass(frozen=True)
class Sharing:
    """What has been seen of a model's rows in one batch."""

    share: Share
    """Which prompts it answers beside others as it does alone."""
    may_leave: bool
    """Whether the others are answered as before when one has left the batch."""


_SEEN: weakref.WeakKeyDictionary[nn.Module, Sharing] = weakref.WeakKeyDictionary()


def who_shares_a_batch(model: nn.Module, device: torch.device) -> Share:
    """Which prompts a model answers beside others as it does alone; tried once for each model.

    A model in pieces is tried by all ranks together.
    """
    return _sharing(model, device).share


def rows_may_leave(model: nn.Module, device: torch.device) -> bool:
    """Whether a row that has stopped can be taken out of a batch that the others are still written in."""
    return _sharing(model, device).may_leave


def _sharing(model: nn.Module, device: torch.device) -> Sharing:
    if model not in _SEEN:
        _SEEN[model] = seen = _tried(model, device)
        if seen.share != "all" and is_main():
            logger.warning(
                "%s does not honour padding on the left of a prompt: %s, which takes longer.",
                name_of(model),
                "only prompts of equal length are generated together"
                if seen.share == "equally long"
                else "prompts are generated one by one",
            )
    return _SEEN[model]


def _tried(model: nn.Module, device: torch.device) -> Sharing:
    shares: tuple[tuple[Share, bool], ...] = (("all", True), ("equally long", False))
    for share, longer in shares:
        for leaves in (True, False):
            if _is_the_same_beside(model, device, longer, leaves):
                return Sharing(share, leaves)
    return Sharing("none", may_leave=False)


def _is_the_same_beside(model: Any, device: torch.device, longer: bool, leaves: bool) -> bool:
    """Whether a prompt beside it moves what is written behind another by no more than rounding does.

    Experts that are chosen in other groups round differently, and a tie may break the other way: but not for every
    text.
    """
    ids = few_tokens(model, device, 20)[0]
    return any(_is_the_same_text(model, device, ids.roll(shift).tolist(), longer, leaves) for shift in (0, 5, 10))


def _is_the_same_text(model: Any, device: torch.device, ids: list[int], longer: bool, leaves: bool) -> bool:
    """Whether the logits of three tokens are the same but for rounding, whether or not the neighbour `leaves`.

    Three, because some models read a padded prompt rightly and go on from a wrong state.
    """
    prompt, neighbour = ids[-5:], ids[:13] if longer else ids[:5]
    try:
        with (
            seeded(0, device),
            as_preflight_error(f"{name_of(model)} cannot write answers"),
            _noted_dtypes(model) as dtypes,
        ):
            beside, alone = (
                _logits_of_first(model, prompts, (ids[0], ids[-1]), device, leaves)
                for prompts in ([prompt, neighbour], [prompt])
            )
    except PreflightError:
        if leaves:  # with a cache that rows cannot be taken out of, maybe: it is tried without that
            return False
        raise
    tolerance = 3e-2 if dtypes & {torch.float16, torch.bfloat16} else 1e-4
    moved = (beside - alone).norm(dim=-1) / alone.norm(dim=-1)
    # What is not finite is not said here: whoever draws from it says where.
    return not alone.isfinite().all() or bool((moved <= tolerance).all())


def _logits_of_first(
    model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int], device: torch.device, leaves: bool
) -> torch.Tensor:
    """[3, V]: of the first prompt's next three tokens, which are all `tokens[0]`; the others write `tokens[1]`.

    A row that `leaves` stops at that.
    """
    seen: list[torch.Tensor] = []

    def choose(scores_BV: torch.Tensor, rows_B: torch.Tensor, step: int) -> torch.Tensor:
        seen.append(scores_BV[0].float())
        return torch.where(rows_B == 0, tokens[0], tokens[1])

    config = generation_config([tokens[1]], tokens[1], None, 3)
    loop = Decoding(model, len(prompts), config, choose, may_leave=leaves)
    call_generate(model, prompts, config, device, custom_generate=loop)
    return torch.stack(seen)


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
