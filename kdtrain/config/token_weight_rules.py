"""What `rlhf.token_weights` needs, and what it cannot be beside."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem, Written

_PATH: KeyPath = ("rlhf", "token_weights")
_NO_MODEL = {
    "self": "the student itself is not asked about other images yet",
    "vllm": "a server is not asked about other images yet",
    "openai": "a server is not asked about other images yet",
    "cache": "a cache has nothing of rows with other images",
}


def token_weights(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Weights by visual reliance ask a teacher in this process about the row's images in their mean colour."""
    rlhf = config.rlhf
    if rlhf.token_weights is None or not config.options.lm_kd_active:
        return
    if (reason := _NO_MODEL.get(rlhf.teacher.backend)) is not None:
        message = f"not available yet with rlhf.teacher.backend: {rlhf.teacher.backend}: {reason}"
        yield Problem(_PATH, message, "use rlhf.teacher.backend: hf, or remove it", on_key=True)
    if rlhf.token_selection is not None:
        message = "cannot be beside rlhf.token_selection: one weighs all tokens of a row, the other leaves some out"
        yield Problem(_PATH, message, "keep one of the two", on_key=True)
    if config.options.crosses_tokenizers:
        message = "not available yet beside rlhf.cross_tokenizer, which compares chunks and not tokens"
        yield Problem(_PATH, message, "remove one of the two", on_key=True)
    for name in ("packing", "padding_free"):
        if getattr(config.data, name):
            message = f"is for rows with images, and data.{name} for text"
            yield Problem(_PATH, message, "remove one of the two", on_key=True)
