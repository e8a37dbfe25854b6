"""Completions generated for training: by the student (on-policy) or by the teacher (`seq_kd`, `answers: teacher`).

Shapes: B rows, T positions. Rows come out as the collator makes them, padded on the right: left padding would shift the
positions of models that do not derive them from the mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import GenerationConfig

from kdtrain.data.batch import Batch
from kdtrain.data.collate import pad_rows
from kdtrain.errors import DataError, NotAvailableError
from kdtrain.generation.batching import PromptInputs, Room, calls
from kdtrain.generation.call import is_sharded, left_padded
from kdtrain.generation.decode import NonFiniteLogits, sample
from kdtrain.generation.sampling import stable_seed
from kdtrain.host import send_known
from kdtrain.losses.reduce import IGNORE_INDEX


def completions(model: nn.Module, batch: Batch, config: GenerationConfig, *, seeds: Sequence[int]) -> list[list[int]]:
    """`completions_of_window` of a single batch, in one call."""
    (written,) = completions_of_window(model, [batch], config, seeds=[seeds], room=Room(rows=len(batch)))
    return written


def completions_of_window(
    model: nn.Module, batches: Sequence[Batch], config: GenerationConfig, *, seeds: Sequence[Sequence[int]], room: Room
) -> list[list[list[int]]]:
    """What `model` writes behind each prompt of each batch, up to the first stop token, that included.

    One that reached `max_new_tokens` gets no made-up stop token. Sharded, all ranks call this together.

    Args:
        model: not wrapped.
        batches: as this model sees them; at least one.
        seeds: of each row of each batch, so that a resumed run samples what the uninterrupted one did.

    Raises:
        NonFiniteLogits: with the row's name, when all are done.
    """
    device = batches[0].model_inputs["input_ids"].device
    groups = _groups([_inputs(model, *pair) for pair in zip(batches, seeds, strict=True)], is_sharded(model))
    written: list[list[list[int]]] = [[[] for _ in range(len(batch))] for batch in batches]
    failures = []
    prompts = [[prompt for _, _, prompt in group] for group in groups]
    for call in calls(model, prompts, config.max_new_tokens, room, device):
        rows = [groups[g][i] for g, i in call]
        try:
            done = _sampled(model, [prompt for _, _, prompt in rows], config, device)
        except NonFiniteLogits as error:
            failures.append(error)  # the other ranks of a sharded model go on with the next call
            continue
        for (b, i, _), answer in zip(rows, done, strict=True):
            written[b][i] = answer
    if failures:
        raise failures[0]
    return written


_Numbered = tuple[int, int, PromptInputs]
"""A prompt with the number of its batch and its row there."""


def _groups(batches: Sequence[Sequence[PromptInputs]], apart: bool) -> list[list[_Numbered]]:
    """Prompts whose images can be laid behind each other.

    Args:
        apart: keep batches with images apart. A vision encoder in pieces is put together by all ranks or by none, and
            they have agreed on that batch by batch.
    """
    found: dict[Any, list[_Numbered]] = {}
    for b, prompts in enumerate(batches):
        for i, prompt in enumerate(prompts):
            shapes = frozenset((name, value.shape[1:]) for name, value in prompt.visual.items())
            key = (shapes, b if apart and shapes else None)
            found.setdefault(key, []).append((b, i, prompt))
    return list(found.values())


def _inputs(model: nn.Module, batch: Batch, seeds: Sequence[int]) -> list[PromptInputs]:
    """What the model is given to write behind each prompt of a batch.

    Raises:
        DataError: it has inputs that nobody knows how to continue, or to divide among its rows.
    """
    prompts = prompts_of(batch)
    if batch.unknown_inputs:
        raise DataError(
            f"Batches carry {', '.join(batch.unknown_inputs)}, which generation does not know how to continue. "
            "Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
    if "token_type_ids" in batch.token_level:
        refuse_marked_answers(model)
    visual = _visual_by_row(batch)
    if batch.visual:
        _check_images_in_prompts(model, batch, prompts)
    return [
        PromptInputs(
            ids=prompt,
            seed=seed,
            name=batch.rows.name(i),
            per_token={key: values[i, : len(prompt)].tolist() for key, values in batch.token_level.items()},
            visual=visual[i],
        )
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def _visual_by_row(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """The entries that each row owns of the tensors of images."""
    rows: list[dict[str, torch.Tensor]] = [{} for _ in range(len(batch))]
    for name, value in batch.visual.items():
        sizes = batch.visual_sizes.get(name)
        if sizes is None:
            if len(batch) > 1:
                raise DataError(
                    f"It is not known which entries of {name} belong to which row of a batch, and answers are "
                    "generated in batches of their own. Let the collator say so in `visual_sizes` (see Batch), or use "
                    "training.per_device_train_batch_size: 1."
                )
            sizes = [len(value)]
        for row, part in zip(rows, value.split(list(sizes)), strict=True):
            row[name] = part
    return rows


def _sampled(
    model: nn.Module, prompts: Sequence[PromptInputs], config: GenerationConfig, device: torch.device
) -> list[list[int]]:
    per_token = {
        key: left_padded([prompt.per_token[key] for prompt in prompts], 0, device) for key in prompts[0].per_token
    }
    names = prompts[0].visual if any(prompt.has_image for prompt in prompts) else ()
    visual = {name: torch.cat([prompt.visual[name] for prompt in prompts]) for name in names}
    ids, seeds = [prompt.ids for prompt in prompts], [prompt.seed for prompt in prompts]
    try:
        return sample(model, ids, config, seeds, device, per_token=per_token, visual=visual)
    except NonFiniteLogits as error:
        raise NonFiniteLogits(error.row, error.position, prompts[error.row].name) from None


def with_completions(
    batch: Batch,
    written: Sequence[Sequence[int]],
    pad_id: int,
    multiple: int | None = None,
    *,
    cut: Sequence[bool] = (),
) -> Batch:
    """The batch with each prompt followed by a completion, which is supervised, in place of its answers.

    The same for a teacher that reads other tokens: its own prompt, and the same completion.

    Args:
        multiple: pad the result to a multiple of this length.
        cut: see `Rows.cut`.
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
    rows = replace(batch.rows, keys=(), cut=cut)  # keys: they name what the rows were
    return replace(
        batch,
        model_inputs={**batch.model_inputs, **tokens},
        labels=labels,
        kd_token_weights=None,  # of the answers that are gone
        rows=rows,
        teacher_tokens=teacher,
    )


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
    return {key: send_known(value, device) for key, value in pad_rows(rows, pad_id, multiple).items()}


def row_seeds(batches: Sequence[Batch], seed: str) -> list[list[int]]:
    """A seed for each row of each batch: of what it is called, or of what it asks where it has no name; a collective.

    So a row gets the same sample wherever it lies. One that is there more than once, on any ranks, gets others each
    time.
    """

    def key(batch: Batch, row: int, prompt: Sequence[int]) -> str:
        sample = batch.rows.samples[row] if batch.rows.samples else 0
        return f"{seed}:{(batch.rows.ids[row] if batch.rows.ids else '') or list(prompt)}:{sample}"

    keys = [[key(batch, row, prompt) for row, prompt in enumerate(prompts_of(batch))] for batch in batches]
    by_rank = gather_object([[key for own in keys for key in own]])
    seen = Counter(key for own in by_rank[: PartialState().process_index] for key in own)

    def of_key(key: str) -> int:
        seen[key] += 1
        return stable_seed(f"{key}:{seen[key]}")

    return [[of_key(key) for key in own] for own in keys]


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
            f"Row {name} has no prompt to generate from (plain text, or a prompt that max_length cuts?). Set "
            "rlhf.lmbda: 0 and rlhf.seq_kd: false, or give rows with a prompt."
        )
    return rows
