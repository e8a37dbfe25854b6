"""Completions generated for training: by the student (on-policy) or by the teacher (`seq_kd`, `answers: teacher`).

Shapes: B rows, T positions, P prompt positions, C generated positions. Rows come out as the collator makes them, padded
on the right: left padding would shift the positions of models that do not derive them from the mask.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.batch import token_level, unknown, visual
from kdtrain.data.collate import pad_rows
from kdtrain.errors import DataError
from kdtrain.experts import without_router_logits
from kdtrain.losses.reduce import IGNORE_INDEX


def student_generates(seed: int, step: int, lmbda: float) -> bool:
    """Whether the optimizer window that begins at `step` is on-policy: one draw, the same on every rank.

    A function of seed and step alone, so that a resumed run draws what the uninterrupted one did. Never true at
    lmbda 0, always at 1.
    """
    return random.Random(f"on-policy:{seed}:{step}").random() < lmbda


def stop_token_ids(*sources: Any) -> list[int]:
    """Ids that end a generation, without repetitions: the union over generation configs and tokenizers.

    A list in a config is kept whole (Llama 3 stops at two tokens), and a tokenizer's eos counts even where the model's
    generation config names another.
    """
    ids: dict[int, None] = {}
    for source in sources:
        found = getattr(source, "eos_token_id", None)
        for token in found if isinstance(found, list | tuple) else [found]:
            if token is not None:
                ids[int(token)] = None
    return list(ids)


def generation_config(
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float | None,
    max_new_tokens: int,
    forbidden: Sequence[int] = (),
) -> GenerationConfig:
    """Plain sampling at `temperature` from the whole vocabulary: top-k or top-p would bias the samples.

    Args:
        stop_ids: of `stop_token_ids`.
        pad_id: fills up the rows that stopped earlier.
        temperature: of the sampling; None takes the most likely token each time instead.
        forbidden: ids that are never written: padding of the embedding, which is no token of both models, and tokens
            that stand for images, since a model that reads one looks for its image.
    """
    sampling = {} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        suppress_tokens=list(forbidden) or None,
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        **sampling,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=list(stop_ids) or None,
    )


def generate_batch(
    model: nn.Module, batch: Mapping[str, Any], config: GenerationConfig, *, seed: int, multiple: int | None = None
) -> dict[str, Any]:
    """A copy of `batch` whose answers are sampled from `model`: prompt, then completion up to its first stop token.

    Args:
        model: an unwrapped transformers model; put into eval mode for the time.
        batch: `input_ids` [B, T], `attention_mask` [B, T] and `prompt_lengths` [B] (tokens of each row's prompt),
            and whatever else the model's forward takes, per token or per image.
        config: of `generation_config`.
        seed: of the sampling, so that a resumed run samples what the uninterrupted one did.
        multiple: pad the result to a multiple of this length.

    Returns:
        The batch with new input_ids, attention_mask and labels; the completion is supervised, its stop token included.
        A completion that reached `max_new_tokens` gets no made-up stop token.

    Raises:
        DataError: a row without a prompt, which nothing can be generated from, or with an image behind its prompt.
    """
    prompts = _prompts(batch)
    device = batch["input_ids"].device
    width = max(len(prompt) for prompt in prompts)
    pad_id = config.pad_token_id
    generate: Any = model.generate
    if strange := unknown(batch):
        raise DataError(
            f"Batches carry {', '.join(strange)}, which generation does not know how to continue. "
            "Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
    images, per_token = visual(batch), token_level(batch)
    if images:
        _check_images_in_prompts(model, batch, prompts)
    input_ids_BP = _left_padded(prompts, pad_id, device)
    mask_BP = _left_padded([[1] * len(prompt) for prompt in prompts], 0, device)
    extra = {
        key: _left_padded([row[: len(prompt)].tolist() for row, prompt in zip(values, prompts, strict=True)], 0, device)
        for key, values in per_token.items()
    }
    # Sharded, every forward is a collective: all ranks must run as many as the one with the longest answer.
    together = isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled()
    with torch.no_grad(), _evaluating(model), _only(model, config), without_router_logits(model), _seeded(seed, device):
        sequences = generate(
            input_ids=input_ids_BP,
            attention_mask=mask_BP,
            generation_config=config,
            synced_gpus=together,
            **extra,
            **images,
        )
    completions = [_until_stop(row, config.eos_token_id) for row in sequences[:, width:].tolist()]
    rows = [
        (prompt + completion, [IGNORE_INDEX] * len(prompt) + completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    fresh = {key: value.to(device) for key, value in pad_rows(rows, pad_id, multiple).items()}
    for key, values in per_token.items():
        # What is generated is text, which is 0 in every processor's account of its tokens.
        grown = values.new_zeros(fresh["input_ids"].shape)
        for row, value, prompt in zip(grown, values, prompts, strict=True):
            row[: len(prompt)] = value[: len(prompt)]
        fresh[key] = grown
    return {**batch, **fresh}


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> torch.Tensor:
    """[B, P]: generation goes on at the right end, so that is where all prompts have to end."""
    width = max(len(row) for row in rows)
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)


def _check_images_in_prompts(model: Any, batch: Mapping[str, Any], prompts: Sequence[Sequence[int]]) -> None:
    """The images of a row are handed over whole: a prompt that ends before one of them does not fit them."""
    config = getattr(model, "config", None)
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if image is None:
        return
    for i, prompt in enumerate(prompts):
        if list(prompt).count(image) != int((batch["input_ids"][i] == image).sum()):
            name = batch["row_ids"][i] if "row_ids" in batch else i
            raise DataError(
                f"Row {name} has an image behind the prompt that an answer is generated for (truncated?). Raise "
                "data.max_length, or set rlhf.lmbda: 0 and rlhf.seq_kd: false."
            )


def _prompts(batch: Mapping[str, Any]) -> list[list[int]]:
    """Each row's prompt without padding, from `prompt_lengths`, or from the left-padded `prompts` of TRL's collator."""
    if "prompt_lengths" in batch:
        lengths = batch["prompt_lengths"].tolist()
        rows = [row[:length].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)]
    elif "prompts" in batch:
        masks = batch["prompt_attention_mask"].bool()
        rows = [row[mask].tolist() for row, mask in zip(batch["prompts"], masks, strict=True)]
    else:
        raise DataError(
            "On-policy and seq_kd batches need prompts: the collator must give `prompt_lengths` [B]. "
            "Set rlhf.lmbda: 0 and rlhf.seq_kd: false to train on the data's own answers."
        )
    for i, row in enumerate(rows):
        if not row:
            name = batch["row_ids"][i] if "row_ids" in batch else i
            raise DataError(
                f"Row {name} has no prompt to generate from (plain text?). Set rlhf.lmbda: 0 and rlhf.seq_kd: false, "
                "or give rows with a prompt."
            )
    return rows


def _until_stop(tokens: list[int], stop_ids: int | Sequence[int] | None) -> list[int]:
    """Tokens up to and including the first stop token; all of them where none was generated."""
    stops = set(stop_ids if isinstance(stop_ids, list | tuple) else [stop_ids])
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[: i + 1]
    return tokens


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of sampling: dropout, a LoRA adapter's included, must not reach the samples."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's own generation config, from which `generate` fills in whatever ours leaves open.

    A checkpoint's repetition penalty would silently bias the samples that the student is judged on.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = owner.generation_config
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = own


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A fixed random state inside, the caller's own one again after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
