"""What is drawn and how: whether a window is on-policy, and the tokens that end, fill up or never enter an answer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.data.chat_template import ChatTemplate
from kdtrain.data.multimodal import image_token_ids
from kdtrain.models.probe import placeholder_ids


def student_generates(seed: int, step: int, lmbda: float) -> bool:
    """Whether the optimizer window that begins at `step` is on-policy: one draw, the same on every rank.

    A function of seed and step alone, so that a resumed run draws what the uninterrupted one did. Never true at
    lmbda 0, always at 1.
    """
    return random.Random(f"on-policy:{seed}:{step}").random() < lmbda


def stable_seed(text: str) -> int:
    """63 bits of seed that are the same in every process; Python's own hash is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class TokenRoles:
    """Ids that mean something to a generation."""

    stop: list[int]
    """End an answer."""
    pad: int
    """Fills up the rows that stopped earlier."""
    forbidden: list[int]
    """Never written."""


def token_roles(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    model: PreTrainedModel,
    padding_ids: Iterable[int],
    *more_configs: GenerationConfig | None,
) -> TokenRoles:
    """The roles of token ids where a model, which is not wrapped, writes answers to rows of `processing_class`.

    Args:
        padding_ids: padding of the embedding, which is no token of both models.
        more_configs: stop tokens are those of the model's own generation config, and of these.
    """
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    stops = turn_ends(processing_class, getattr(model, "generation_config", None), *more_configs)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else 0
    # A model that reads a token which stands for an image looks for the image.
    images = {*image_token_ids(processing_class), *placeholder_ids(model)}
    return TokenRoles(stops, pad, sorted({*padding_ids, *images}))


def turn_ends(processing_class: Any, *configs: GenerationConfig | None) -> list[int]:
    """Ids that end an answer: those of the configs and the tokenizer, and what the chat template ends a turn with.

    A base model's own config names its end of text only: its answers would run on behind the end of the turn.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    stops = stop_token_ids(*configs, tokenizer)
    if tokenizer.chat_template or getattr(processing_class, "chat_template", None):
        stops += sorted(ChatTemplate(processing_class).stop_ids - set(stops))
    return stops


def stop_token_ids(*sources: Any) -> list[int]:
    """Ids that end a generation, without repetitions: the union over generation configs and tokenizers.

    A list in a config is kept whole (Llama 3 stops at two tokens), and a tokenizer's eos counts even where the model's
    generation config names another.
    """
    found = [getattr(source, "eos_token_id", None) for source in sources]
    tokens = [token for ids in found for token in (ids if isinstance(ids, list | tuple) else [ids])]
    return list(dict.fromkeys(int(token) for token in tokens if token is not None))


def generation_config(
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float | None,
    max_new_tokens: int,
    forbidden: Sequence[int] = (),
    *,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
) -> GenerationConfig:
    """Plain sampling at `temperature`, from the whole vocabulary unless one of the last three is given.

    Args:
        stop_ids, pad_id, forbidden: see `TokenRoles`.
        temperature: None takes the most likely token each time instead.
    """
    sampling: dict[str, Any] = {}
    if temperature is not None:
        sampling = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0, "min_p": min_p}
    return GenerationConfig(
        suppress_tokens=list(forbidden) or None,
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        **sampling,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(stop_ids) or None,
    )
