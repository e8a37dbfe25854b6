"""A teacher that is the student itself: its own weights, with the adapter off, as they are, or averaged.

There is no second copy of the model. What makes it a teacher is what it reads (a prefix, other template arguments) or
which of its weights it has; see `rlhf.teacher.weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.config.schema import SelfWeights
from kdtrain.data.batch import Batch
from kdtrain.errors import ConfigError, NotAvailableError, PreflightError
from kdtrain.models.probe import look_at_text
from kdtrain.models.switching import evaluated, trained_beside_adapter, without_adapter
from kdtrain.models.vocabulary import vocabulary_size
from kdtrain.teachers.base import Targets, Teacher
from kdtrain.teachers.forward import ModelForward, base_model
from kdtrain.teachers.moving_average import MovingAverage

_NO_ADAPTER = (
    "weights: base is the student without its adapter, and this student has none: all its weights are trained, and no "
    "copy of what they were is kept. Train an adapter (tuner.train_type: lora, peft_config), take weights: live or "
    "ema, or name a teacher_model with backend: hf."
)
_BESIDE = (
    "weights: base is the student without its adapter, and {number} tensors are trained that are no part of it (the "
    "first is {first}): they would change the teacher. Set the adapter's bias to none and freeze them, or take "
    "weights: live or ema."
)
_FSDP1 = (
    "A self teacher is not available under FSDP 1, where the student runs inside its wrapper alone. Use FSDP 2 "
    "(fsdp_config: {version: 2})."
)
_ZERO3 = (
    "weights: ema is not available under DeepSpeed ZeRO-3, which keeps the weights in pieces of its own. Use ZeRO-2 or "
    "FSDP 2, or weights: base."
)
_NOT_LOADED = (
    "Under DeepSpeed ZeRO-3 a self teacher is asked before training, and this student was made whole: load it with "
    "from_pretrained after the GKDConfig with `deepspeed` is made, which then cuts it into pieces."
)


class SelfTeacher(Teacher):
    """The student's own weights as the teacher, in eval mode and without a gradient.

    Nothing of the student is another after a forward than it was before: weights, adapters, `requires_grad` and the
    modes of its modules come back, after an exception as well.

    Args:
        weights: `base`, the adapter off (modules that are trained in full with it are the original ones again); `live`,
            as they are; `ema`, a moving average of what is trained (`moving_average.py`).
        ema_decay: share of the average that stays at each step, in [0, 1).

    Raises:
        ConfigError: one of them is none of these.
    """

    is_student = True

    def __init__(self, weights: SelfWeights = "base", ema_decay: float = 0.999) -> None:
        if weights not in get_args(SelfWeights):
            raise ConfigError(f"weights: {weights!r} is none of {', '.join(get_args(SelfWeights))}.")
        if not 0 <= ema_decay < 1:
            raise ConfigError(f"ema_decay: {ema_decay} must be at least 0 and below 1.")
        self.weights, self.ema_decay = weights, ema_decay
        self._forward: ModelForward | None = None
        self._begun = False
        self._average: MovingAverage | None = None

    @property
    def can_generate(self) -> bool:
        return True

    @property
    def has_features(self) -> bool:
        """No: hooks would fire in the forwards of both, which are the same modules."""
        return False

    def follow(self, student: nn.Module) -> None:
        """See `Teacher.follow`."""
        self.module = student
        self.vocab_size = vocabulary_size(student)
        self._forward, self._average, self._begun = None, None, False  # of an earlier student
        with self.writing_model():
            self.look = look_at_text(base_model(student), "teacher")

    def place(self, accelerator: Accelerator) -> None:
        """Where the student is, and wrapped as it is.

        Raises:
            ConfigError: there is no adapter to switch off.
            NotAvailableError: the student will be in pieces that cannot be run by themselves.
        """
        if self.weights == "base":
            _check_base(self.module)
        if getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
            raise NotAvailableError(_FSDP1)
        if self.weights == "ema" and is_deepspeed_zero3_enabled():
            raise NotAvailableError(_ZERO3)
        assert self.module is not None, "follow is called before"
        if is_deepspeed_zero3_enabled() and not any(hasattr(p, "ds_id") for p in self.module.parameters()):
            raise PreflightError(_NOT_LOADED)
        has_fsdp = getattr(accelerator.state, "fsdp_plugin", None) is not None
        self.in_pieces = has_fsdp or is_deepspeed_zero3_enabled()
        with self.writing_model() as module:
            self._forward = ModelForward(module, keeps_head=self.weights == "base")

    def begin(self) -> None:
        """Let the average begin at the weights as they are, unless an earlier training has begun it."""
        self._begun = True
        if self.weights == "ema" and self._average is None:
            assert self.module is not None, "follow is called before"
            self._average = MovingAverage(self.module, self.ema_decay)

    def stepped(self) -> None:
        """See `Teacher.stepped`."""
        if self._average is not None:
            self._average.update()

    def save(self, folder: Path) -> None:
        """See `Teacher.save`."""
        if self._average is not None:
            self._average.save(folder)

    def load(self, folder: Path) -> None:
        """See `Teacher.load`."""
        self.begin()
        if self._average is not None:
            self._average.load(folder)

    def targets(self, batch: Batch) -> Targets:
        """Hidden states and head, or logits where the model has no head of its own; see `Teacher.targets`."""
        assert self._forward is not None, "place is called before"
        with self.writing_model() as module, self._whole(module):
            if not self._begun:  # DeepSpeed and FSDP take the student to the device when training begins
                batch = batch.to(next(module.parameters()).device)
            return self._forward(module, batch)

    def _whole(self, student: nn.Module) -> AbstractContextManager[Any]:
        """Until training begins, nothing puts the pieces of ZeRO-3 together in a forward."""
        if self._begun or not is_deepspeed_zero3_enabled():
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(student.parameters()))
        return gathered

    @contextmanager
    def writing_model(self) -> Iterator[nn.Module]:
        """See `Teacher.writing_model`; in eval mode as well."""
        assert self.module is not None, "follow is called before"
        with self._weights_in(self.module), evaluated(self.module):
            yield self.module

    def _weights_in(self, student: nn.Module) -> AbstractContextManager[None]:
        # Before training all three are the same: there is no adapter yet, or none that has learnt, and no average.
        if self.weights == "base" and is_peft_model(student):
            return without_adapter(student)
        return nullcontext() if self._average is None else self._average.in_the_model()


def _check_base(student: Any) -> None:
    """Refuse a student that is another one with its adapter off than it was before training."""
    if not is_peft_model(student):
        raise ConfigError(_NO_ADAPTER)
    if beside := trained_beside_adapter(student):
        raise ConfigError(_BESIDE.format(number=len(beside), first=beside[0]))
