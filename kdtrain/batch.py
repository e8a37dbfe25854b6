"""What a batch holds, and which part of it goes where.

Shapes: B rows, T positions.

| keys | shape | for |
|---|---|---|
| `input_ids`, `attention_mask` | [B, T] | both models |
| `token_type_ids`, `mm_token_type_ids`, … | [B, T] | both models: what a processor says of every token |
| `pixel_values`, `image_grid_thw`, … | axis 0: images, patches or rows | both models: a processor's images |
| `labels` | [B, T] | the loss |
| `teacher_inputs` | as above | the teacher alone, in place of the same keys: its processor makes other pixels |
| the others in `NOT_FOR_THE_MODEL` | by row | the trainer |

A user's own collator may give further keys, and pad on the left, as trl's does: `received` brings that into this form.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

NOT_FOR_THE_MODEL = frozenset(
    {
        "labels",
        "prompt_lengths",
        "ce_rows",
        "row_ids",
        "prompts",
        "prompt_attention_mask",
        "student_generated",
        "all_repeated",
        "visual_sizes",
        "teacher_inputs",
        "teacher_visual_sizes",
        "visual_units",
        "truncated",
        "places",
    }
)
# Of trl's DataCollatorForChatML: offsets for a teacher with another tokenizer, and the texts behind them.
_OF_OTHER_TRAINERS = frozenset({"byte_offsets", "original_prompt_text", "original_completion_text"})
# What a forward hands on to the attention without naming it.
_FOR_ATTENTION = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
_TEXT = frozenset({"input_ids", "attention_mask"})


def forward_names(model: nn.Module) -> frozenset[str] | None:
    """What a model's forward takes by name; None where it takes anything."""
    parameters = inspect.signature(type(model).forward).parameters
    names = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return frozenset(names) if len(names) > 1 else None  # self alone: a wrapper


def received(batch: Mapping[str, Any], accepted: frozenset[str] | None) -> dict[str, Any]:
    """A batch of any collator without what the student's forward does not take, which is said once.

    Args:
        batch: as collated.
        accepted: of `forward_names`.
    """
    known = {"input_ids", "attention_mask"} | NOT_FOR_THE_MODEL | _FOR_ATTENTION | token_level(batch).keys()
    known |= visual(batch).keys()
    strange = [key for key in batch if key in _OF_OTHER_TRAINERS or not (accepted is None or key in accepted | known)]
    if told := tuple(key for key in strange if key not in _OF_OTHER_TRAINERS):
        _say_left_out(told)
    return {key: value for key, value in batch.items() if key not in strange}


@functools.cache
def _say_left_out(keys: tuple[str, ...]) -> None:
    logger.warning("Batches carry %s, which the student's forward does not take: left out.", ", ".join(keys))


def right_padded(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its padding moved behind the rows, where all its [B, T] tensors have it.

    On the left it shifts the positions of models that count them from the first column, and stands between the virtual
    tokens of prompt tuning and the row.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask[:, 0].all()):
        return batch
    columns = torch.arange(mask.shape[1], device=mask.device)
    empty = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    moved = (columns + empty) % mask.shape[1]
    keys = {"input_ids", "attention_mask", "labels", "position_ids"} | token_level(batch).keys()
    tensors = {key: batch[key] for key in keys if isinstance(batch.get(key), torch.Tensor)}
    return batch | {key: value.gather(1, moved) for key, value in tensors.items() if value.shape == mask.shape}


class TruncatedRows:
    """Rows that were cut at `max_length`: the first is told, and all are counted."""

    def __init__(self, max_length: int | None) -> None:
        self._max_length, self._rows, self._truncated = max_length, 0, 0

    def count(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Take account of the batches of a window."""
        self._rows += sum(len(batch["input_ids"]) for batch in batches)
        truncated = sum(sum(batch.get("truncated", ())) for batch in batches)
        if truncated and not self._truncated:
            logger.warning("Rows longer than max_length (%s tokens) are cut from the right.", self._max_length)
        self._truncated += truncated

    def say_total(self, accelerator: Any) -> None:
        """Say how many there were on all ranks; a collective."""
        own = torch.tensor([self._truncated, self._rows], device=accelerator.device)
        truncated, rows = accelerator.reduce(own).tolist()
        if truncated and accelerator.is_main_process:
            logger.warning("%d of %d rows were cut at max_length (%s tokens).", truncated, rows, self._max_length)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the student's forward takes."""
    return {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}


def teacher_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the teacher's forward takes: the student's inputs, but its own pixels where its processor makes others."""
    inputs = model_inputs(batch)
    if "teacher_inputs" in batch:
        students = batch.get("visual_sizes", {})
        inputs = {key: value for key, value in inputs.items() if key not in students} | batch["teacher_inputs"]
    return inputs


def for_teacher(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the teacher sees it, with what the trainer needs of it."""
    return {key: value for key, value in batch.items() if key in NOT_FOR_THE_MODEL} | teacher_inputs(batch)


def token_level(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a processor says of every token, [B, T]: 0 is text."""
    return {key: value for key, value in batch.items() if key.endswith("token_type_ids")}


def visual(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What describes images rather than tokens: by the collator's account, or by name where it gives none."""
    known = batch.get("visual_sizes", {})
    return {
        key: value for key, value in batch.items() if key in known or key.startswith(("pixel_", "image_", "video_"))
    }


def unknown(batch: Mapping[str, Any]) -> list[str]:
    """Inputs of the model of which nothing is known: neither tokens nor images."""
    known = _TEXT | token_level(batch).keys() | visual(batch).keys()
    return sorted(model_inputs(batch).keys() - known)
