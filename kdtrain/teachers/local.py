"""A teacher in this process: a transformers model, frozen and in eval mode."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp

from kdtrain.data.batch import Batch
from kdtrain.models.probe import look_at_text
from kdtrain.models.vocabulary import vocabulary_size
from kdtrain.teachers.base import Targets, Teacher
from kdtrain.teachers.forward import ModelForward, base_model


class LocalTeacher(Teacher):
    """Teacher over a loaded transformers model with a language-model head, or a PEFT model of one.

    The model is frozen here: `requires_grad` off and eval mode, so that no optimizer, gradient or dropout ever reaches
    it, whatever state it was handed over in.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module | None = module.requires_grad_(False).eval()
        self.vocab_size = vocabulary_size(module)
        self.look = look_at_text(base_model(module), "teacher")
        self._forward = ModelForward(module, keeps_head=True)

    def place(self, accelerator: Accelerator) -> None:
        """To the device, or into pieces; not wrapped by DDP, since it has no gradients to average."""
        assert self.module is not None
        if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
            self.module = prepare_deepspeed(self.module, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.module = prepare_fsdp(self.module, accelerator)
        elif getattr(self.module, "hf_device_map", None) is None:
            self.module.to(accelerator.device)

    def targets(self, batch: Batch) -> Targets:
        """Hidden states and head, or logits where the model has no head of its own; see `Teacher.targets`."""
        assert self.module is not None
        self.module.eval()  # a caller may have called .train() on a parent
        return self._forward(self.module, batch)
