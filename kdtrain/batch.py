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
        "visual_units",
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
