"""The term of hidden-state KD: outputs of layers of both language models, where a supervised token is predicted.

Shapes: B rows, T positions, S supervised tokens of a batch, H width of the hidden states, D supervised tokens of the
optimizer window.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.config.hidden_kd import HIDDEN_TERM, HiddenKdConfig
from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.errors import PreflightError
from kdtrain.feature_kd.distance import distances
from kdtrain.feature_kd.hooks import Features, capture
from kdtrain.feature_kd.layers import Layers, find_layers, pair_layers
from kdtrain.feature_kd.projected import FeatureTerm, NumItems, Predicting, check_gradient
from kdtrain.feature_kd.projectors import linear_projectors, projector_name
from kdtrain.feature_kd.taps import LAYER, named, section_of
from kdtrain.host import send
from kdtrain.losses.reduce import normaliser
from kdtrain.models.layouts import Tap, unwrapped
from kdtrain.models.pieces import runs_on
from kdtrain.models.probe import Side, few_tokens, own_random_state

logger = logging.getLogger(__name__)


class HiddenTerm(FeatureTerm):
    """Hidden-state KD of one run.

    term = weight · mean over the depths f of (1/D) · Σ over supervised tokens of distance(P_f s_f, t_f)

    with s_f and t_f the hidden states of both models at depth f, at the position that predicts the token, and P_f a
    learned linear layer where their widths differ, else the identity. The distance is a mean over the H features (mse),
    or 1 − cos. As the terms over tokens it does not depend on how rows are spread over batches, padding and ranks.

    The gradient reaches the student and P_f, never the teacher. TinyBERT (https://arxiv.org/abs/1909.10351, equation 8)
    has this for BERT, with P and mse and layers at equal depths; DistillKit has it for language models.

    Raises:
        PreflightError: a model whose layers cannot be told.
    """

    name = HIDDEN_TERM
    file = "hidden_projectors.safetensors"
    targets = "layers"
    section = "hidden_kd"
    in_model_name = "kdtrain_hidden_projectors"

    def __init__(
        self, options: HiddenKdConfig, student: nn.Module, teacher: nn.Module, accelerator: Accelerator, seed: int
    ) -> None:
        super().__init__(student, teacher, accelerator, seed)
        self.options = options
        self.layers: Mapping[Side, Layers] = {
            "student": find_layers(student, "student"),
            "teacher": find_layers(teacher, "teacher"),
        }
        self.pairs = pair_layers(options.targets.layer, self.layers["student"], self.layers["teacher"])
        widths = (self.layers["student"].width, self.layers["teacher"].width)
        projectors = linear_projectors(LAYER, [widths] * len(self.pairs), seed)
        self.projectors = projectors.to(accelerator.device)
        numbers = [pair.student for pair in self.pairs]
        if len(set(numbers)) < len(numbers):
            logger.warning(
                "custom.hidden_kd: the student has %d layers, so that several depths are the same layer of it: %s.",
                self.layers["student"].count,
                self.in_words,
            )

    @property
    def in_words(self) -> str:
        """Which layers are compared, and through what."""
        student, teacher = self.layers["student"], self.layers["teacher"]
        pairs = ", ".join(f"{pair.student} to {pair.teacher}" for pair in self.pairs)
        widths = f", projected from {student.width} to {teacher.width}" if self.projectors else ""
        return f"layers {pairs} (of {student.count} and {teacher.count}){widths}"

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def applies(self, options: DistillationOptions, batch: Batch) -> bool:
        """See `FeatureTerm.applies`: always, so that all ranks do the same."""
        return options.hidden_kd is not None

    def of_teacher(self) -> AbstractContextManager[Features]:
        """See `FeatureTerm.of_teacher`; ended before the student's begins, which may have the same modules."""
        return capture(self.teacher, self._taps("teacher"), "teacher")

    def of_student(self) -> AbstractContextManager[Features]:
        """See `FeatureTerm.of_student`."""
        return capture(self.student, self._taps("student"), "student")

    def _taps(self, side: Side) -> dict[str, list[Tap]]:
        return {LAYER: [self.layers[side].tap(getattr(pair, side)) for pair in self.pairs]}

    def taught(self, features: Features, batch: Batch) -> Features:
        """The supervised positions alone, [S, H] of each layer."""
        seen = batch.as_teacher_sees_it().for_forward(self.teacher)
        # The last forward: under ZeRO-3 the head is looked at on a few tokens in front of the first one.
        outputs = [self._single(passes[-1:], "teacher") for passes in features[LAYER]]
        return {LAYER: [[seen.predicting(output).detach()] for output in outputs]}

    def terms(
        self, student: Features, teacher: Features, batch: Batch, predicting: Predicting, num_items: NumItems
    ) -> dict[str, torch.Tensor]:
        """See `FeatureTerm.terms`: the parts of the layers add up to the sum."""
        projectors, levels = dict(self.projectors.items()), len(self.pairs)
        denominator = normaliser(num_items, send(batch.num_supervised, batch.labels.device))
        parts = {}
        for i, name in enumerate(self.options.names):
            check_gradient(LAYER, student[LAYER][i])
            student_SH = predicting(self._single(student[LAYER][i], "student"))
            projector = projectors.get(projector_name(LAYER, i, levels))
            total = self._sum(student_SH, teacher[LAYER][i][0], projector)
            parts[name] = self.options.weight / levels * total / denominator.to(total.device)
        return {HIDDEN_TERM: torch.stack(list(parts.values())).sum(), **parts}

    def _sum(self, student_SH: torch.Tensor, teacher_SH: torch.Tensor, projector: nn.Module | None) -> torch.Tensor:
        """Σ distance over tokens, in float32 also under autocast; 0 with a graph where there is none."""
        with torch.autocast(student_SH.device.type, enabled=False):
            student_SH = student_SH.float()
            projected = student_SH if projector is None else projector(student_SH)
            teacher_SH = teacher_SH.to(projected.device).float()
            return distances(projected, teacher_SH, self.options.distance).mean(-1).sum()

    def _single(self, passes: list[torch.Tensor], side: Side, rows: int | None = None) -> torch.Tensor:
        """The one output of a layer in a forward, if it is [rows, tokens, H] as its config says."""
        width = self.layers[side].width
        fits = len(passes) == 1 and passes[0].dim() == 3 and passes[0].shape[-1] == width
        if not fits or rows not in (None, len(passes[0])):
            found = [tuple(output.shape) for output in passes] or "nothing"
            raise PreflightError(
                f"{named(LAYER)}: a layer of the {side} gave {found} in a forward, and one tensor [rows, tokens, "
                f"{width}] can be compared. Disable {section_of(LAYER)}."
            )
        return passes[0]

    # ---- before training ---------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """Run both models on a few tokens: what does not fit is found before training.

        The models' modes and the random state are left as they were.
        """
        sides: list[Side] = ["student"] if self.teacher is self.student else ["teacher", "student"]
        for side in sides:
            model = self.student if side == "student" else self.teacher
            captured = self.of_student() if side == "student" else self.of_teacher()
            ids = few_tokens(unwrapped(model), runs_on(model))
            was_training = model.training
            try:
                with own_random_state(ids.device), captured as features:
                    self.run_once(side, {"input_ids": ids})
                    outputs = [self._single(passes, side, rows=1) for passes in features[LAYER]]
                    if side == "student" and not is_deepspeed_zero3_enabled():
                        check_gradient(LAYER, outputs)
            finally:
                model.train(was_training)
