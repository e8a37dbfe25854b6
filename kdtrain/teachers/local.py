"""A teacher in this process: a transformers model, frozen and in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import nn
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp

from kdtrain.config.schema import Placement
from kdtrain.data.batch import Batch
from kdtrain.errors import PreflightError
from kdtrain.models.probe import look_at_text
from kdtrain.models.quantization import bits_of, settle
from kdtrain.models.vocabulary import vocabulary_size
from kdtrain.teachers.base import Targets, Teacher
from kdtrain.teachers.forward import ModelForward, base_model
from kdtrain.teachers.placement import OffloadedWeights, refuse_fixed, shard

logger = logging.getLogger(__name__)


class LocalTeacher(Teacher):
    """Teacher over a loaded transformers model with a language-model head, or a PEFT model of one.

    The model is frozen here: `requires_grad` off and eval mode, so that no optimizer, gradient or dropout ever reaches
    it, whatever state it was handed over in.

    Args:
        placement: see `rlhf.teacher.placement`.
    """

    def __init__(self, module: nn.Module, placement: Placement = "auto") -> None:
        self.module: nn.Module | None = module.requires_grad_(False).eval()
        settle(module)
        self.vocab_size = vocabulary_size(module)
        self.look = look_at_text(base_model(module), "teacher")
        self._forward = ModelForward(module, keeps_head=True)
        self._placement = placement
        self._offloaded: OffloadedWeights | None = None

    def place(self, accelerator: Accelerator) -> None:
        """To the device, into pieces, or to the CPU; not wrapped by DDP, since it has no gradients to average.

        Raises:
            PreflightError: the placement cannot be had for this model or this run.
        """
        assert self.module is not None
        deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
        has_fsdp = getattr(accelerator.state, "fsdp_plugin", None) is not None
        is_zero3 = deepspeed is not None and deepspeed.zero_stage == 3
        placement = self._placement
        if is_zero3 and placement in ("replicated", "cpu_offload"):
            raise PreflightError(
                f"rlhf.teacher.placement: {placement} is not available under DeepSpeed ZeRO-3, which cuts every model "
                "into pieces as it is loaded. Use auto (in pieces), or ZeRO-2, FSDP 2 or plain data parallelism."
            )
        if placement in ("sharded", "cpu_offload"):
            refuse_fixed(self.module, placement)
        self.in_pieces = placement == "sharded" or is_zero3 or (placement == "auto" and has_fsdp)
        if placement == "cpu_offload":
            self._offload(accelerator)
        elif deepspeed is not None and (is_zero3 or placement == "auto"):
            self.module = prepare_deepspeed(self.module, accelerator)
        elif has_fsdp and self.in_pieces and bits_of(self.module) is None:
            self.module = prepare_fsdp(self.module, accelerator)
        elif self.in_pieces and accelerator.num_processes > 1 and bits_of(self.module) is None:
            shard(self.module, accelerator.device, accelerator.num_processes)
        else:
            self.in_pieces = False
            if placement == "sharded":
                logger.warning("rlhf.teacher.placement: sharded has no effect: there is one process.")
            if getattr(self.module, "hf_device_map", None) is None:
                self.module.to(accelerator.device)

    def _offload(self, accelerator: Accelerator) -> None:
        if accelerator.device.type == "cpu":
            raise PreflightError(
                "rlhf.teacher.placement: cpu_offload keeps the teacher's weights in CPU memory between its forwards, "
                "and this run is on a CPU: remove it."
            )
        assert self.module is not None
        self._offloaded = OffloadedWeights(self.module, accelerator.device)

    def targets(self, batch: Batch) -> Targets:
        """Hidden states and head, or logits where the model has no head of its own; see `Teacher.targets`."""
        assert self.module is not None
        self.module.eval()  # a caller may have called .train() on a parent
        with self._on_device():
            return self._forward(self.module, batch)

    @contextmanager
    def writing_model(self) -> Iterator[nn.Module]:
        """See `Teacher.writing_model`."""
        assert self.module is not None
        with self._on_device():
            yield self.module

    def _on_device(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._offloaded is None else self._offloaded.on_device()
