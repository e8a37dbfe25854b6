"""From a teacher's options to a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdtrain.config.schema import Placement, TeacherConfig
from kdtrain.models.loading import add_adapter, load_with_adapter
from kdtrain.models.quantization import Bits
from kdtrain.teachers.base import Teacher
from kdtrain.teachers.local import LocalTeacher
from kdtrain.teachers.served.http import Servers
from kdtrain.teachers.served.teacher import ServedTeacher

_PROBED = 5  # most likely tokens that every server gives


def build_teacher(
    model: str,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    adapter: str | None = None,
    quantization: Bits | None = None,
    placement: Placement = "auto",
    is_whole: bool = False,
) -> Teacher:
    """Load a transformers model as a teacher.

    Args:
        model: folder or hub id; the folder of an adapter stands for the adapter on its base.
        init_kwargs: arguments of `from_pretrained`; `dtype` is "auto" when missing. Never changed.
        device: where it will run, which dtype "auto" depends on.
        adapter: folder of an adapter that goes on top of `model`.
        quantization: what its weights are quantised to.
        placement: where its weights lie, see `rlhf.teacher.placement`.
        is_whole: whether `auto` is whole on the device. It is then looked at there, with the attention that it will
            run with.
    """
    kwargs = dict(init_kwargs or {})
    module = load_with_adapter(
        model,
        dtype=str(kwargs.pop("dtype", None) or "auto").removeprefix("torch."),
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
        quantization=quantization,
        init_kwargs=kwargs,
    )
    if adapter is not None:
        module = add_adapter(module, adapter)
    stays = placement == "replicated" or (placement == "auto" and is_whole)
    if stays and device is not None and getattr(module, "hf_device_map", None) is None:
        module = module.to(device)
    return LocalTeacher(module, placement)


def connect_teacher(options: TeacherConfig, vocab_size: int, *, actual_alone: bool = False) -> ServedTeacher:
    """A teacher on a server. Nothing is asked of it yet: see `served/probe.py`.

    Args:
        options: of the backends `vllm` and `openai`.
        vocab_size: leading token ids that the student can be taught; the server's model may have more.
        actual_alone: see `ServedTeacher`; the probe compares a few tokens all the same.

    Raises:
        PreflightError: the variable of `api_key_env` is not set.
    """
    assert options.base_url is not None, "the config is checked for it"
    assert options.model is not None
    servers = Servers(
        options.base_url,
        api_key_env=options.api_key_env,
        timeout_s=options.timeout_s,
        max_retries=options.max_retries,
        concurrency=options.concurrency,
    )
    return ServedTeacher(
        servers,
        model=options.model,
        vocab_size=vocab_size,
        top_k=min(_PROBED, options.top_k) if actual_alone else options.top_k,
        lookahead=options.lookahead,
        api=options.api,
        max_requests=options.max_requests,
        actual_alone=actual_alone,
    )
