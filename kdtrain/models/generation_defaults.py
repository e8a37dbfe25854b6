"""A model's own generation config, where transformers would refuse to save it with the model once it was changed."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def keep_savable(model: PreTrainedModel, name: str) -> None:
    """Repair a generation config that contradicts itself: published ones do, and a run would fail where it saves.

    One that names a temperature, or `top_p` and its like, without `do_sample` gets `do_sample: true`. Of any other that
    is invalid the special tokens alone are kept. A warning says so.
    """
    own = model.generation_config
    if own is None or _is_valid(own):
        return
    own.do_sample = True
    if _is_valid(own):
        done = "do_sample: true is saved with it, which its temperature or top_p is for"
    else:
        kept: dict[str, Any] = {token: getattr(own, token) for token in _TOKENS}
        model.generation_config = GenerationConfig(**kept)
        done = "the ids of its special tokens alone are saved with the student"
    logger.warning("The generation_config.json of %s contradicts itself; %s.", name, done)


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
