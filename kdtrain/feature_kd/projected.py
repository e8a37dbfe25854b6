"""What the terms that compare features have in common: what both models are asked for, and their projectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.disk import save_tensors
from kdtrain.errors import CheckpointError, PreflightError
from kdtrain.feature_kd.hooks import Features
from kdtrain.feature_kd.taps import LAYER, named
from kdtrain.models.pieces import fill, put_together_by_module, runs_on
from kdtrain.models.probe import Side

NumItems = torch.Tensor | int | None
Predicting = Callable[[torch.Tensor], torch.Tensor]
"""From outputs [B, T, X] of the student's forward, as its rows lie there, to those that predict a supervised token."""


class FeatureTerm(ABC):
    """A term of a run that compares features of both models, over the unwrapped ones."""

    name: ClassVar[str]
    """Of the sum in the log."""
    file: ClassVar[str]
    """Where its projectors are kept, in a checkpoint and beside the model."""
    targets: ClassVar[str]
    """What messages call that which it compares."""
    section: ClassVar[str]
    """Of the config, without its `custom`."""
    in_model_name: ClassVar[str]
    """Where its projectors are in a student that is trained in pieces."""

    def __init__(self, student: nn.Module, teacher: nn.Module, accelerator: Accelerator, seed: int) -> None:
        self.student, self.teacher = student, teacher
        self.projectors = nn.ModuleDict()
        self.in_model = False
        """Whether the projectors are in the model that is trained; see `put_into`."""
        self._accelerator, self._seed = accelerator, seed

    # ---- one batch ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def applies(self, options: DistillationOptions, batch: Batch) -> bool:
        """Whether the batch has the term."""

    @abstractmethod
    def of_teacher(self) -> AbstractContextManager[Features]:
        """Captures the teacher's features, on its forward inside."""

    @abstractmethod
    def of_student(self) -> AbstractContextManager[Features]:
        """Captures the student's."""

    def taught(self, features: Features, batch: Batch) -> Features:
        """What is kept of the teacher's features until the student has run."""
        return features

    @abstractmethod
    def terms(
        self, student: Features, teacher: Features, batch: Batch, predicting: Predicting, num_items: NumItems
    ) -> dict[str, torch.Tensor]:
        """The weighted terms of a batch by the names of the log, their sum under `name`.

        Args:
            teacher: of `taught`.
            num_items: D, and the terms are the batch's share of the window's; None is a batch by itself.
        """

    def run_once(self, side: Side, inputs: Mapping[str, Any]) -> None:
        """One forward before training, in eval mode, without a gradient where there cannot be one."""
        model = self.student if side == "student" else self.teacher
        device = runs_on(model)
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        if side == "teacher":
            with torch.no_grad():
                model.eval()(**moved, use_cache=False)
            return
        with put_together_by_module(model), torch.set_grad_enabled(not is_deepspeed_zero3_enabled()):
            model.eval()(**moved, use_cache=False)

    # ---- projectors --------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        return list(self.projectors.parameters())

    def begin_window(self) -> None:
        """Forget the projectors' gradients: upstream zeroes those of the model only."""
        self.projectors.zero_grad()

    def put_into(self, model: nn.Module) -> None:
        """Make the projectors a part of the student as it is trained, before FSDP or DeepSpeed wrap it."""
        if self.projectors:
            model.add_module(self.in_model_name, self.projectors)
            self.in_model = True

    def taken_out(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a student's whole state holds of the projectors, by their own names; it is then no more in that."""
        names = [name for name in state if self.in_model_name in name.split(".")]
        return {name.split(f"{self.in_model_name}.")[1]: state.pop(name) for name in names}

    def add_to(self, optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
        """Have the projectors trained by the student's optimizer: their weights decay, their biases do not."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if known.issuperset(map(id, self.parameters())):
            return
        named = list(self.projectors.named_parameters())
        weights, biases = ([p for name, p in named if name.endswith("bias") is is_bias] for is_bias in (False, True))
        optimizer.add_param_group({"params": weights, "weight_decay": weight_decay})
        optimizer.add_param_group({"params": biases, "weight_decay": 0.0})

    def window_units(self) -> torch.Tensor | float:
        """What the window's mean is over, on all ranks; 0 where nothing of the window has the term.

        The projectors then have no gradient, so that the optimizer leaves them alone: with a zero it would decay them,
        and move them by its momentum.
        """
        return 1.0

    def synchronise(self) -> None:
        """Average the projectors' gradients over the ranks, as DDP does with the student's; a collective.

        A rank that has none brings zeros. In the model, the gradients are reduced with its own.
        """
        if self.in_model:
            return
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, reduction="mean")

    def save(self, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the projectors' file, of their `state` where they are in pieces themselves."""
        if self.projectors:
            whole = self.projectors.state_dict() if state is None else state
            save_tensors({k: v.detach().cpu().contiguous() for k, v in whole.items()}, Path(folder) / self.file)

    def load(self, folder: str | Path) -> None:
        """Read it back. What DeepSpeed has in its model it has loaded with that."""
        if not self.projectors or (self.in_model and self._accelerator.distributed_type == DistributedType.DEEPSPEED):
            return
        path = Path(folder) / self.file
        try:
            saved, parameters = load_file(path), dict(self.projectors.named_parameters())
            if saved.keys() != parameters.keys():
                raise RuntimeError(f"It holds {', '.join(saved) or 'none'}.")
            for name, parameter in parameters.items():
                fill(parameter, saved[name])
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} does not hold the projectors of this run's {self.targets} ({', '.join(self.projectors)}): "
                f"{str(error).splitlines()[0]} Resume with the {self.section} targets that the checkpoint was made "
                "with, or start anew."
            ) from error


class BatchFeatures:
    """The features of one batch, for the terms that it has: the teacher's first, then the student's."""

    def __init__(self, terms: Sequence[FeatureTerm], batch: Batch) -> None:
        self.of_terms, self._batch = terms, batch
        self.student: list[Features] = []
        """By term."""
        self._teacher: list[Features] = []

    @contextmanager
    def of_teacher(self) -> Iterator[None]:
        """Around the teacher's forward."""
        with ExitStack() as stack:
            found = [stack.enter_context(term.of_teacher()) for term in self.of_terms]
            yield
        pairs = zip(self.of_terms, found, strict=True)
        self._teacher = [term.taught(features, self._batch) for term, features in pairs]

    @contextmanager
    def of_student(self) -> Iterator[None]:
        """Around the student's forward, and what is made of it inside."""
        with ExitStack() as stack:
            self.student = [stack.enter_context(term.of_student()) for term in self.of_terms]
            yield

    def terms(self, predicting: Predicting, num_items: NumItems) -> dict[str, torch.Tensor]:
        """All terms; see `FeatureTerm.terms`."""
        found: dict[str, torch.Tensor] = {}
        for i, student in enumerate(self.student):
            found |= self.term(i, student, predicting, num_items)
        return found

    def term(
        self, number: int, student: Features, predicting: Predicting, num_items: NumItems
    ) -> dict[str, torch.Tensor]:
        """One of them, from other features of the student."""
        return self.of_terms[number].terms(student, self._teacher[number], self._batch, predicting, num_items)


def check_gradient(target: str, student: list[torch.Tensor]) -> None:
    """A term without a gradient would be logged, and teach nothing."""
    if torch.is_grad_enabled() and not all(features.requires_grad for features in student):
        frozen = "tuner.freeze_vit, tuner.freeze_aligner, or LoRA whose target_modules do not reach it"
        if target == LAYER:
            frozen = "LoRA whose target_modules reach no layer up to the first depth"
        raise PreflightError(
            f"{named(target)}: the student's features carry no gradient, so this term cannot teach it. Everything "
            f"before them is frozen ({frozen}): train some of it or remove the target. Or reentrant gradient "
            "checkpointing cuts the graph: set training.gradient_checkpointing_kwargs: {use_reentrant: false}."
        )
