"""Completions generated for training: by the student (on-policy) or by the teacher (`seq_kd`, `answers: teacher`).

Shapes: B rows, T positions. Rows come out as the collator makes them, padded on the right: left padding would shift the
positions of models that do not derive them from the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from kdtrain.data.batch import Batch
from kdtrain.data.collate import pad_rows
from kdtrain.errors import DataError, NotAvailableError
from kdtrain.generation.call import call_generate, left_padded, seeded
from kdtrain.generation.padding import answered_together
from kdtrain.losses.reduce import IGNORE_INDEX


def generate_batch(
    model: nn.Module, batch: Batch, config: GenerationConfig, *, seed: int, multiple: int | None = None
) -> Batch:
    """A copy of `batch` whose answers are sampled from `model`: `with_completions` of its `completions`."""
    written = completions(model, batch, config, seed=seed)
    return with_completions(batch, written, config.pad_token_id, multiple)


def completions(model: nn.Module, batch: Batch, config: GenerationConfig, *, seed: int) -> list[list[int]]:
    """What `model` writes behind each prompt of a batch, up to the first stop token, that included.

    One that reached `max_new_tokens` gets no made-up stop token.

    Args:
        model: not wrapped.
        batch: as this model sees it.
        seed: of the sampling, so that a resumed run samples what the uninterrupted one did.
    """
    prompts = prompts_of(batch)
    device = batch.model_inputs["input_ids"].device
    if batch.unknown_inputs:
        raise DataError(
            f"Batches carry {', '.join(batch.unknown_inputs)}, which generation does not know how to continue. "
            "Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
    images, per_token = batch.visual, batch.token_level
    if "token_type_ids" in per_token:
        refuse_marked_answers(model)
    if images:
        _check_images_in_prompts(model, batch, prompts)
    groups = answered_together(model, prompts, device, bool(images))
    written: list[list[int]] = [[] for _ in prompts]
    with seeded(seed, device):
        for group in groups:
            extra = {
                key: left_padded([values[i, : len(prompts[i])].tolist() for i in group], 0, device)
                for key, values in per_token.items()
            }
            sequences, width = call_generate(model, [prompts[i] for i in group], config, device, **extra, **images)
            for i, row in zip(group, sequences[:, width:].tolist(), strict=True):
                written[i] = _until_stop(row, config.eos_token_id)
    return written


def with_completions(batch: Batch, written: Sequence[Sequence[int]], pad_id: int, multiple: int | None = None) -> Batch:
    """The batch with each prompt followed by a completion, which is supervised, in place of its answers.

    The same for a teacher that reads other tokens: its own prompt, and the same completion.

    Args:
        multiple: pad the result to a multiple of this length.
    """
    prompts, device = prompts_of(batch), batch.model_inputs["input_ids"].device
    tokens = _answered(prompts, written, pad_id, multiple, device)
    labels = tokens.pop("labels")
    for key, values in batch.token_level.items():
        # What is generated is text, which is 0 in every processor's account of its tokens.
        grown = values.new_zeros(labels.shape)
        for row, value, prompt in zip(grown, values, prompts, strict=True):
            row[: len(prompt)] = value[: len(prompt)]
        tokens[key] = grown
    teacher = batch.teacher_tokens
    if teacher is not None:
        of_teacher = prompts_of(batch.as_teacher_sees_it())
        teacher = replace(teacher, **_answered(of_teacher, written, pad_id, multiple, device))
    return replace(batch, model_inputs={**batch.model_inputs, **tokens}, labels=labels, teacher_tokens=teacher)


def _answered(
    prompts: Sequence[list[int]],
    written: Sequence[Sequence[int]],
    pad_id: int,
    multiple: int | None,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Ids, mask and labels of prompts with their completions."""
    rows = [
        ([*prompt, *completion], [IGNORE_INDEX] * len(prompt) + [*completion])
        for prompt, completion in zip(prompts, written, strict=True)
    ]
    return {key: value.to(device) for key, value in pad_rows(rows, pad_id, multiple).items()}


def refuse_marked_answers(model: nn.Module) -> None:
    """Refuse a model whose inputs mark what is prompt: answers that it writes would count as prompt."""
    if getattr(getattr(model, "config", None), "model_type", None) == "paligemma":
        raise NotAvailableError(
            "PaliGemma reads from token_type_ids what is prompt and what is answer: generating for it is not available "
            "yet. Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )


def _check_images_in_prompts(model: Any, batch: Batch, prompts: Sequence[Sequence[int]]) -> None:
    """The images of a row are handed over whole: a prompt that ends before one of them does not fit them."""
    config = getattr(model, "config", None)
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if image is None:
        return
    for i, prompt in enumerate(prompts):
        if list(prompt).count(image) != int((batch.model_inputs["input_ids"][i] == image).sum()):
            raise DataError(
                f"Row {batch.rows.name(i)} has an image behind the prompt that an answer is generated for "
                "(truncated?). Raise data.max_length, or set rlhf.lmbda: 0 and rlhf.seq_kd: false."
            )


def prompts_of(batch: Batch) -> list[list[int]]:
    """Each row's prompt without padding."""
    ids = batch.model_inputs["input_ids"]
    if batch.rows.prompt_lengths is not None:
        lengths = batch.rows.prompt_lengths.tolist()
        rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    elif batch.rows.prompts is not None:
        padded, mask = batch.rows.prompts
        rows = [row[is_token].tolist() for row, is_token in zip(padded, mask.bool(), strict=True)]
    else:
        raise DataError(
            "On-policy and seq_kd batches need prompts: the collator must give `prompt_lengths` [B]. "
            "Set rlhf.lmbda: 0 and rlhf.seq_kd: false to train on the data's own answers."
        )
    if [] in rows:
        name = batch.rows.name(rows.index([]))
        raise DataError(
            f"Row {name} has no prompt to generate from (plain text?). Set rlhf.lmbda: 0 and "
            "rlhf.seq_kd: false, or give rows with a prompt."
        )
    return rows


def _until_stop(tokens: list[int], stop_ids: int | Sequence[int] | None) -> list[int]:
    """Tokens up to and including the first stop token; all of them where none was generated."""
    stops = set(stop_ids if isinstance(stop_ids, list | tuple) else [stop_ids])
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]
