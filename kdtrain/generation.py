"""Completions generated for training: by the student (on-policy) or by the teacher (`seq_kd`, `answers: teacher`).

Shapes: B rows, T positions, P prompt positions, C generated positions. Rows come out as the collator makes them, padded
on the right: left padding would shift the positions of models that do not derive them from the mask.

Within a generation prompts are padded on the left, so that all end where the answers begin. Some models do not honour
that (RecurrentGemma reads the padding, MiniMax decays with it, BART's decoder counts it as positions), and RWKV mixes
the rows of a batch: they would answer another question. What a model does is tried before its first generation, and
prompts that it cannot answer together are generated apart.
"""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.batch import token_level, unknown, visual
from kdtrain.data.collate import pad_rows
from kdtrain.errors import DataError, NotAvailableError, PreflightError
from kdtrain.experts import without_router_logits
from kdtrain.lm_head import few_tokens
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.probe import as_preflight_error, name_of
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)


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
        PreflightError: the model cannot generate from prompts of unequal length.
    """
    prompts = _prompts(batch)
    device = batch["input_ids"].device
    if strange := unknown(batch):
        raise DataError(
            f"Batches carry {', '.join(strange)}, which generation does not know how to continue. "
            "Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
    images, per_token = visual(batch), token_level(batch)
    if "token_type_ids" in per_token:
        refuse_marked_answers(model)
    if images:
        _check_images_in_prompts(model, batch, prompts)
    groups = _groups(model, prompts, device, bool(images))
    completions: list[list[int]] = [[] for _ in prompts]
    with _seeded(seed, device):
        for group in groups:
            extra = {
                key: _left_padded([values[i, : len(prompts[i])].tolist() for i in group], 0, device)
                for key, values in per_token.items()
            }
            sequences, width = _generate(model, [prompts[i] for i in group], config, device, **extra, **images)
            for i, row in zip(group, sequences[:, width:].tolist(), strict=True):
                completions[i] = _until_stop(row, config.eos_token_id)
    rows = [
        (prompt + completion, [IGNORE_INDEX] * len(prompt) + completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    fresh = {key: value.to(device) for key, value in pad_rows(rows, config.pad_token_id, multiple).items()}
    for key, values in per_token.items():
        # What is generated is text, which is 0 in every processor's account of its tokens.
        grown = values.new_zeros(fresh["input_ids"].shape)
        for row, value, prompt in zip(grown, values, prompts, strict=True):
            row[: len(prompt)] = value[: len(prompt)]
        fresh[key] = grown
    return {**batch, **fresh}


def refuse_marked_answers(model: nn.Module) -> None:
    """Refuse a model that is told which tokens are prompt: what it generates would count as prompt, and see its future.

    Raises:
        NotAvailableError: it is PaliGemma.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "paligemma":
        raise NotAvailableError(
            "PaliGemma reads from token_type_ids what is prompt and what is answer: generating for it is not available "
            "yet. Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, device: torch.device, **more: Any
) -> tuple[Any, int]:
    """What `model.generate` returns for prompts, and the number of positions P that it begins with."""
    input_ids_BP = _left_padded(prompts, config.pad_token_id, device)
    mask_BP = _left_padded([[1] * len(prompt) for prompt in prompts], 0, device)
    with torch.no_grad(), _evaluating(model), _only(model, config), without_router_logits(model):
        made = model.generate(
            input_ids=input_ids_BP,
            attention_mask=mask_BP,
            generation_config=config,
            synced_gpus=_in_pieces(model),
            **more,
        )
    return made, input_ids_BP.shape[1]


def _in_pieces(model: nn.Module) -> bool:
    """Sharded, every forward is a collective: all ranks must run as many as the one with the longest answer."""
    return isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled()


def _groups(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device, images: bool) -> list[list[int]]:
    """Rows that are generated together: as many as get the answers that each would get alone.

    Raises:
        PreflightError: they cannot be generated apart.
    """
    everyone = list(range(len(prompts)))
    share = who_shares_a_batch(model, device)
    if share == "all":
        return [everyone]
    apart = (
        f"{name_of(model)} writes other answers to a prompt that shares a batch than to the prompt alone, and {{}}. "
        "{} rlhf.lmbda: 0 and rlhf.seq_kd: false."
    )
    if _in_pieces(model):  # ranks with other lengths would wait for each other's forwards
        reason = "under FSDP and ZeRO-3 prompts cannot be generated apart"
        raise PreflightError(apart.format(reason, "Train it with plain data parallelism, or set"))
    by_length: dict[int, list[int]] = {}
    for i in everyone:
        by_length.setdefault(len(prompts[i]) if share == "equally long" else i, []).append(i)
    if images and len(by_length) > 1:
        reason = "prompts with images cannot be generated apart"
        raise PreflightError(apart.format(reason, "Set training.per_device_train_batch_size: 1, or"))
    return list(by_length.values())


Share = Literal["all", "equally long", "none"]
_SHARES: weakref.WeakKeyDictionary[nn.Module, Share] = weakref.WeakKeyDictionary()


def who_shares_a_batch(model: nn.Module, device: torch.device) -> Share:
    """Which prompts a model answers beside others as it does alone; tried once for each model.

    A model in pieces is tried by all ranks together.

    Raises:
        PreflightError: it cannot generate.
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
        _seeded(0, device),
        as_preflight_error(f"{name_of(model)} cannot write answers"),
        _noted_dtypes(model) as dtypes,
    ):
        beside, alone = (
            torch.stack(_generate(model, prompts, config, device, logits_processor=[same_token])[0].logits)[:, 0]
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
