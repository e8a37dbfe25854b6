"""The visual term over a run: what it is compared through, its share of the optimizer window, and its projectors.

Projectors (see `visual_kd.build_projectors`) belong to the run, not to the student: they are trained by the same
optimizer and saved beside the model, and never become a part of what is exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdtrain.batch import model_inputs, teacher_inputs
from kdtrain.errors import CheckpointError, PreflightError
from kdtrain.visual_kd import (
    build_projectors,
    feature_widths,
    has_images,
    image_grids,
    tapped,
    visual_terms,
    visual_units,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdtrain.config.options import VisualKdConfig
    from kdtrain.data.collate import Collator
    from kdtrain.vision.hooks import Features

PROJECTORS = "visual_projectors.safetensors"


class VisualTerm:
    """Visual KD of one run.

    Args:
        knobs: weights and targets.
        student, teacher: unwrapped.
        accelerator: of the trainer.
        seed: of the projectors' first weights.
    """

    def __init__(
        self, knobs: VisualKdConfig, student: nn.Module, teacher: nn.Module, accelerator: Accelerator, seed: int
    ) -> None:
        self.knobs, self.student, self.teacher = knobs, student, teacher
        self.projectors = nn.ModuleDict()
        self._accelerator, self._seed = accelerator, seed
        self._window_units: torch.Tensor | None = None
        self._probed = False

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def tapped(self) -> AbstractContextManager[tuple[Features, Features]]:
        """Capture (student's, teacher's) features on the forwards inside."""
        return tapped(self.knobs, self.student, self.teacher)

    def terms(self, ours: Features, theirs: Features, batch: Mapping[str, Any], whole: bool) -> dict[str, torch.Tensor]:
        """The weighted terms of a batch with images, see `visual_terms`.

        Args:
            batch: as collated.
            whole: the batch stands for itself (evaluation); else it is a part of the window that was counted.
        """
        share: torch.Tensor | float = 1.0
        if not whole and self._window_units is not None:
            share = visual_units(batch) / self._window_units.clamp(min=1)
        if not self._probed:
            self._check_widths(ours, theirs)
        grids = image_grids(self.knobs, self.student, self.teacher, batch, teacher_inputs(batch))
        return visual_terms(self.knobs, ours, theirs, share, projectors=self.projectors, grids=grids)

    def count(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take note of the window's image features on all ranks, over which the terms are means; a collective.

        Each batch keeps its own number.
        """
        for batch in batches:
            batch["visual_units"] = visual_units(batch)
        local = torch.tensor(float(sum(b["visual_units"] for b in batches)), device=self._accelerator.device)
        self._window_units = self._accelerator.gather(local[None]).sum()

    def probe(self, batch: Mapping[str, Any]) -> None:
        """Run both models on a batch with images, as they will be run: what does not fit is found before training.

        Where widths differ this makes the projectors: widths are read from features, since configs do not say them for
        every family. The models' modes and the random state are left as they were.

        Raises:
            PreflightError: a module is missing, features do not fit, or the term could not teach.
        """
        modes = {module: module.training for module in (self.student, self.teacher)}
        try:
            with torch.random.fork_rng(), self.tapped() as (ours, theirs):
                with torch.no_grad():
                    self._on_own_device(self.teacher, teacher_inputs(batch))
                self._on_own_device(self.student, model_inputs(batch))
        finally:
            for module, mode in modes.items():
                module.train(mode)
        self._probed = True
        self.projectors = build_projectors(self.knobs, ours, theirs, self._seed).to(self._accelerator.device)
        self.terms(ours, theirs, batch, whole=True)

    @staticmethod
    def _check_widths(ours: Features, theirs: Features) -> None:
        """Without a probe there are no projectors, which FSDP and DeepSpeed would have to know of."""
        widths, wanted = feature_widths(ours), feature_widths(theirs)
        for target in (target for target in widths if widths[target] != wanted[target]):
            shapes = " and the teacher's ".join(str(tuple(side[target][0][0].shape)) for side in (ours, theirs))
            raise PreflightError(
                f"visual_kd target {target!r}: the student's features are {shapes}, and a projector between the widths "
                "is not available here: either no row of the training data had an image when the trainer was built, or "
                "the run is in pieces (FSDP, DeepSpeed). Use plain data parallelism, or name modules of one width in "
                f"custom.visual_kd.targets.{target}.student_module and .teacher_module."
            )

    @staticmethod
    def _on_own_device(model: nn.Module, inputs: Mapping[str, Any]) -> None:
        device = next(model.parameters()).device
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        model.eval()(**moved, use_cache=False)

    # ---- projectors --------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The projectors' parameters; none where the widths are equal."""
        return list(self.projectors.parameters())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer: weights decay, biases do not, as those of the student."""
        named = list(self.projectors.named_parameters())
        weights, biases = ([p for name, p in named if name.endswith("bias") is is_bias] for is_bias in (False, True))
        return [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]

    def synchronise(self) -> None:
        """Average the projectors' gradients over the ranks, as DDP does with the student's; a collective.

        A rank whose window had no image brings zeros. Where none had one there is no gradient, so that the optimizer
        leaves them alone: with a zero it would decay them, and move them by its momentum.
        """
        if self._window_units is not None and not self._window_units:
            self.projectors.zero_grad()
            return
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, reduction="mean")

    def save(self, folder: str | Path) -> None:
        """Write the projectors beside a model."""
        if self.projectors:
            state = {name: value.detach().cpu().contiguous() for name, value in self.projectors.state_dict().items()}
            save_file(state, Path(folder) / PROJECTORS)

    def load(self, folder: str | Path) -> None:
        """Read the projectors of a checkpoint.

        Raises:
            CheckpointError: it has none, or others.
        """
        if not self.projectors:
            return
        path = Path(folder) / PROJECTORS
        try:
            self.projectors.load_state_dict(load_file(path))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} does not hold the projectors of this run's visual targets "
                f"({', '.join(self.projectors)}): {str(error).splitlines()[0]} Resume with the visual_kd targets that "
                "the checkpoint was made with, or start anew."
            ) from error


def first_batch_with_images(dataset: Any, collator: Any, tries: int = 32) -> Mapping[str, Any] | None:
    """A batch of the first row with images; None if there is none.

    Args:
        dataset: rows with an `images` or `image` column, or with images inside their messages: of those only the first
            `tries` are looked at.
    """
    for row in _candidates(dataset, tries):
        batch = collator([row])
        if has_images(batch):
            return batch
    return None


def first_row_with_images(dataset: Any, collator: Collator, tries: int = 32) -> Any | None:
    """The row that `first_batch_with_images` collates, as it stands in the data set."""
    return next((row for row in _candidates(dataset, tries) if collator.has_images(row)), None)


def _candidates(dataset: Any, tries: int) -> Iterator[Any]:
    columns = {"images", "image"} & set(getattr(dataset, "column_names", None) or ())
    for i in range(len(dataset) if columns else min(tries, len(dataset))):
        row = dataset[i]
        if not columns or any(row[name] for name in columns):
            yield row
