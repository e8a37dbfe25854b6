"""Student and teacher side by side: the same model twice, or the larger one as the student."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from kdtrain.config.model_folder import read_header, read_map, weight_files
from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import Problem, Written

_PATH = ("rlhf", "teacher_model")


def same_model(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A teacher that is the student, reads the same, and so has nothing to teach."""
    rlhf, teacher = config.rlhf, config.rlhf.teacher
    differs = (
        config.model.adapter
        or config.model.quantization_aware
        or teacher.prefix
        or teacher.chat_template_kwargs
        or teacher.adapter
        or rlhf.teacher_model_init_kwargs
    )
    if teacher.backend != "hf" or not config.options.lm_kd_active or not rlhf.teacher_model or differs:
        return
    if not _same_place(config.model.model, rlhf.teacher_model) or config.model.revision != teacher.revision:
        return
    hint = "name the larger model that is to teach; for a prefix that only the teacher reads use backend: self"
    message = "is the student itself (model.model)"
    if rlhf.sft_alpha > 0 and rlhf.lmbda < 1:
        message += ": it holds the student back to what it was, and teaches nothing new"
        yield Problem(_PATH, message, hint, level="warning")
    else:
        yield Problem(_PATH, f"{message}: their divergence is 0, and nothing would be learnt", hint)


def _same_place(first: str, second: str) -> bool:
    if os.path.isabs(first) and os.path.isabs(second):
        return os.path.realpath(first) == os.path.realpath(second)
    return first.lower() == second.lower()  # ids of the hub ignore case


def swapped_models(config: RunConfig) -> Iterator[Problem]:
    """A student that is larger than its teacher, as the headers of their weights say."""
    rlhf = config.rlhf
    if rlhf.teacher.backend != "hf" or not config.options.lm_kd_active or not rlhf.teacher_model:
        return
    student, teacher = (parameters(Path(name)) for name in (config.model.model, rlhf.teacher_model))
    if student is not None and teacher is not None and student > teacher:
        message = f"is smaller than the student: {short(teacher)} parameters, and {short(student)}"
        yield Problem(_PATH, message, "are rlhf.teacher_model and model.model swapped?", level="warning")


def parameters(folder: Path) -> int | None:
    """Parameters in the weight files of a local folder; None where there are none, or quantised ones."""
    if not folder.is_absolute() or "quantization_config" in read_map(folder / "config.json"):
        return None
    try:
        headers = [read_header(path) for path in weight_files(folder)]
        shapes = [entry["shape"] for header in headers for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(shape) for shape in shapes) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, json.JSONDecodeError):
        return None  # another rule says what is wrong with the file


def short(count: int) -> str:
    """`600M`, `4.02B`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
