"""The cheapest changes to a run that make it fit into memory, in the order of what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdtrain.preflight.memory import Setup, Simulations, plan_memory
from kdtrain.preflight.sharding import Sharding


@dataclass(frozen=True)
class Remedy:
    """A change, and what a device needs with it and all before it."""

    text: str
    total: int


def remedies(setup: Setup, limit: int, simulations: Simulations) -> list[Remedy]:
    """Changes that together bring a run below `limit` bytes per device, or, where they cannot, all that help.

    First those that change nothing of what is learned but cost time, then what rounds more, then what asks for another
    device or folder, then what trains other rows or other weights. One that spares less than a hundredth is left out.
    """
    found: list[Remedy] = []
    total = plan_memory(setup, simulations).total
    for change in (
        _checkpointing, _fewer_answers_at_a_time, _smaller_micro_batches, _attention, _teacher_in_half, _teacher_pieces,
        _in_pieces, _teacher_offloaded, _small_states, _teacher_quantized, _teacher_elsewhere, _shorter_rows, _adapter,
        _quantized,
    ):  # fmt: skip
        best: tuple[str, Setup, int] | None = None
        for text, changed in change(setup):
            new = plan_memory(changed, simulations).total
            if new > 0.99 * (total if best is None else best[2]):
                break  # the memory goes elsewhere
            best = text, changed, new
            if new <= limit:
                break
        if best is not None:
            text, setup, total = best
            found.append(Remedy(text, total))
        if total <= limit:
            break
    return found


Changes = Iterator[tuple[str, Setup]]
"""One kind of change, each stronger than the one before it."""


def _with_shape(setup: Setup, **changes: Any) -> Setup:
    return replace(setup, shape=replace(setup.shape, **changes))


def _checkpointing(setup: Setup) -> Changes:
    if not setup.shape.checkpointing:
        text = "training.gradient_checkpointing: true (a third more time)"
        yield text, _with_shape(setup, checkpointing=True)


def _fewer_answers_at_a_time(setup: Setup) -> Changes:
    writing = setup.student_writes
    rows = writing.rows if writing is not None else 1
    while writing is not None and rows > 1:
        rows = (rows + 1) // 2
        text = f"rlhf.generation.batch_size: {rows}"
        yield text, replace(setup, student_writes=replace(writing, rows_per_call=rows))


def _smaller_micro_batches(setup: Setup) -> Changes:
    """The same rows in a step."""
    rows, batches = setup.per_device_rows, setup.shape.micro_batches
    while rows > 1 and rows % 2 == 0:
        rows, batches = rows // 2, batches * 2
        share = setup.per_device_rows // rows
        changed = _with_shape(setup, rows=max(setup.shape.rows // share, 1), micro_batches=batches)
        changed = replace(changed, teacher_rows=setup.teacher_rows // share, per_device_rows=rows)
        yield (
            f"training.per_device_train_batch_size: {rows} with gradient_accumulation_steps: {batches} (the same step)",
            changed,
        )


def _attention(setup: Setup) -> Changes:
    if setup.student.attention == "eager":
        yield "model.attn_implementation: sdpa", replace(setup, student=replace(setup.student, attention="sdpa"))


def _teacher_in_half(setup: Setup) -> Changes:
    if setup.teacher is not None and setup.teacher.dtype == torch.float32 and not setup.shape.on_cpu:
        half = replace(setup.teacher, dtype=torch.bfloat16)
        yield "rlhf.teacher.dtype: bfloat16", replace(setup, teacher=half)


def _teacher_pieces(setup: Setup) -> Changes:
    if _can_place_teacher(setup) and setup.world > 1 and setup.sharding.kind not in ("fsdp", "zero3"):
        text = "rlhf.teacher.placement: sharded (in pieces over the devices, the student stays whole)"
        yield text, replace(setup, placement="sharded")


def _teacher_offloaded(setup: Setup) -> Changes:
    if _can_place_teacher(setup) and not setup.shape.on_cpu and setup.sharding.kind != "zero3":
        text = "rlhf.teacher.placement: cpu_offload (its weights are copied to the device for each of its forwards)"
        yield text, replace(setup, placement="cpu_offload")


def _can_place_teacher(setup: Setup) -> bool:
    return setup.teacher is not None and setup.teacher.quantization is None and setup.placement == "auto"


def _small_states(setup: Setup) -> Changes:
    if setup.optimizer.startswith("adamw_torch") and "bit" not in setup.optimizer:
        yield "training.optim: adamw_8bit (needs bitsandbytes)", replace(setup, optimizer="adamw_8bit")


def _teacher_quantized(setup: Setup) -> Changes:
    if setup.teacher is not None and setup.teacher.quantization is None and setup.sharding.kind != "zero3":
        small = replace(setup.teacher, quantization="4bit")
        text = "rlhf.teacher.quantization: 4bit (needs bitsandbytes; its targets are rounded)"
        yield text, replace(setup, teacher=small, placement="auto")


def _in_pieces(setup: Setup) -> Changes:
    if setup.world > 1 and setup.sharding.kind not in ("fsdp", "zero3"):
        text = "the models in pieces over the devices (launch.config_file: fsdp2, or zero3)"
        yield text, replace(setup, sharding=Sharding("fsdp"))


def _teacher_elsewhere(setup: Setup) -> Changes:
    if setup.teacher is None or setup.teacher_writes is not None:
        return
    without = replace(setup, teacher=None, teacher_rows=0)
    if setup.student_writes is None:
        yield "the teacher from a cache (kdtrain cache, rlhf.teacher.backend: cache) or a server (vllm)", without
    else:
        yield "the teacher on a server (rlhf.teacher.backend: vllm)", without


def _shorter_rows(setup: Setup) -> Changes:
    length = setup.shape.length
    while length > 256:
        length //= 2
        yield f"data.max_length: {length} with on_overlength: drop", _with_shape(setup, length=length)


def _adapter(setup: Setup) -> Changes:
    if setup.tuner.train_type == "full":
        lora = setup.tuner.model_copy(update={"train_type": "lora"})
        yield "tuner.train_type: lora (trains an adapter)", replace(setup, tuner=lora)


def _quantized(setup: Setup) -> Changes:
    can = setup.tuner.train_type == "lora" and setup.sharding.kind not in ("fsdp", "zero3")
    if can and setup.student.quantization is None:
        small = replace(setup.student, quantization="4bit")
        yield "model.quantization: 4bit (QLoRA; needs bitsandbytes)", replace(setup, student=small)
