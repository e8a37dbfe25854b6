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
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

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
    }
)
_TEXT = frozenset({"input_ids", "attention_mask"})


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


def token_level(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs beside ids and mask that have one entry per token, [B, T]."""
    shape = inputs["input_ids"].shape
    return {
        key: value
        for key, value in inputs.items()
        if key not in _TEXT and isinstance(value, torch.Tensor) and value.shape == shape
    }


def visual(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that describe images rather than tokens."""
    tokens = token_level(inputs)
    return {key: value for key, value in inputs.items() if key not in _TEXT and key not in tokens}
