"""From a teacher's options to a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdtrain.errors import NotAvailableError
from kdtrain.models.loading import add_adapter, load_with_adapter
from kdtrain.teachers.base import Teacher
from kdtrain.teachers.local import LocalTeacher


def build_teacher(
    model: str,
    *,
    backend: str = "hf",
    init_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    adapter: str | None = None,
) -> Teacher:
    """Load or connect to a teacher.

    Args:
        model: folder or hub id (`hf`); the folder of an adapter stands for the adapter on its base.
        backend: `hf`, a transformers model in this process; the others are not available yet.
        init_kwargs: arguments of `from_pretrained`; `dtype` is "auto" when missing. Never changed.
        device: where it will run, which dtype "auto" depends on.
        adapter: folder of an adapter that goes on top of `model`.
    """
    if backend != "hf":
        raise NotAvailableError(f"rlhf.teacher.backend: {backend} is not available yet; use hf.")
    kwargs = dict(init_kwargs or {})
    module = load_with_adapter(
        model,
        dtype=str(kwargs.pop("dtype", None) or "auto").removeprefix("torch."),
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
        init_kwargs=kwargs,
    )
    return LocalTeacher(module if adapter is None else add_adapter(module, adapter))
