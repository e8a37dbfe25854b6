"""The visual terms of a batch: which modules are tapped, and how the terms share the window.

with tapped(visual, student, teacher) as (ours, theirs):
    ...                                     # both forwards, in any order
projectors = build_projectors(visual, ours, theirs, seed)      # once, on a first batch with images
terms = visual_terms(visual, ours, theirs, share, projectors=projectors,
                     grids=image_grids(visual, student, teacher, inputs))
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kdtrain.config.options import VisualKdConfig
from kdtrain.errors import PreflightError
from kdtrain.losses.visual import Grids, feature_distance
from kdtrain.vision.hooks import Features, capture
from kdtrain.vision.layouts import Tap, layout_of, model_type, taps, token_order

TargetGrids = Mapping[str, tuple[Grids | None, Grids | None]]
"""Target -> grids of the student's and the teacher's tokens."""


@contextmanager
def tapped(
    visual: VisualKdConfig | None, student: nn.Module, teacher: nn.Module | None
) -> Iterator[tuple[Features, Features]]:
    """Capture both models' features on the forward passes inside; nothing where visual KD is off.

    Raises:
        PreflightError: see `check_visual` and `capture`.
    """
    with contextlib.ExitStack() as hooks:
        if visual is None or teacher is None:
            yield {}, {}
            return
        student_taps, teacher_taps = check_visual(visual, student, teacher)
        ours = hooks.enter_context(capture(student, student_taps, "student"))
        theirs = hooks.enter_context(capture(teacher, teacher_taps, "teacher"))
        yield ours, theirs


def check_visual(
    visual: VisualKdConfig, student: nn.Module, teacher: nn.Module
) -> tuple[dict[str, list[Tap]], dict[str, list[Tap]]]:
    """Where every target is read from in both models, without running them: target -> one tap per level.

    The order of tokens is known for the table's modules only: those that a config names are compared as they come.

    Raises:
        PreflightError: a family or target that is not known, unequal numbers of deepstack levels, or tokens that are in
            another order in one model than in the other.
    """
    both: tuple[dict[str, list[Tap]], dict[str, list[Tap]]] = {}, {}
    for target, options in visual.targets.items():
        ours = taps(student, target, options.student_module, "student")
        theirs = taps(teacher, target, options.teacher_module, "teacher")
        if len(ours) != len(theirs):
            raise PreflightError(
                f"visual_kd target {target!r}: the student has {len(ours)} levels and the teacher {len(theirs)}, which "
                "cannot be paired. Remove the target, or name one module of each in "
                f"custom.visual_kd.targets.{target}.student_module and .teacher_module."
            )
        _check_order(visual, target, student, teacher)
        both[0][target], both[1][target] = ours, theirs
    return both


def _check_order(visual: VisualKdConfig, target: str, student: nn.Module, teacher: nn.Module) -> None:
    options = visual.targets[target]
    ours = token_order(student, target, options.student_module)
    theirs = token_order(teacher, target, options.teacher_module)
    where = f"visual_kd target {target!r}"
    if options.match == "exact" and None not in (ours, theirs) and ours != theirs:
        raise PreflightError(
            f"{where}: the tokens of the student ({model_type(student)}) are in the order {_say(ours)}, and those of "
            f"the teacher ({model_type(teacher)}) in the order {_say(theirs)}: one would be compared with another. "
            "Use the target aligner, whose tokens are row by row in both."
        )
    if options.match == "interpolate":
        for side, order in (("student", ours), ("teacher", theirs)):
            if order is None or order[0] == "windows":
                raise PreflightError(
                    f"{where}: match: interpolate needs tokens that lie in a grid, and those of the {side} are "
                    f"{_say(order)}. Use the target aligner without a module of your own, or match: exact."
                )


def _say(order: tuple[Any, ...] | None) -> str:
    names = {
        "rows": "row by row",
        "blocks": "blocks of {0} x {0}",
        "windows": "attention windows (window_size {0}, patch_size {1}, spatial_merge_size {2})",
    }
    return "in no order that is known" if order is None else names[order[0]].format(*order[1:])


def visual_terms(
    visual: VisualKdConfig,
    student: Features,
    teacher: Features,
    share: torch.Tensor | float,
    *,
    projectors: nn.ModuleDict | None = None,
    grids: TargetGrids | None = None,
) -> dict[str, torch.Tensor]:
    """weight · weight_t · distance_t per target and their sum, each scaled to the batch's share of the window.

    The distance of a target with several levels (deepstack) is the mean over them.

    Args:
        student, teacher: what `tapped` captured.
        share: this batch's part of the window's `visual_units`.
        projectors: of `build_projectors`, where widths differ.
        grids: of `image_grids`, where a target is interpolated.

    Returns:
        `vision_kd_loss_<target>` and `vision_kd_loss`, scalars.

    Raises:
        PreflightError: nothing captured, features that do not fit, or features of the student that carry no gradient.
    """
    terms = {}
    for target, options in visual.targets.items():
        ours, theirs = (None, None) if grids is None else grids.get(target, (None, None))
        levels = []
        for level, (s, t) in enumerate(zip(student[target], teacher[target], strict=True)):
            _check_gradient(target, s)
            projector = None if projectors is None else _projector(projectors, target, level, len(student[target]))
            levels.append(
                feature_distance(
                    s,
                    t,
                    options.distance or visual.distance,
                    target,
                    projector=projector,
                    match=options.match,
                    student_grids=ours,
                    teacher_grids=theirs,
                )
            )
        terms[f"vision_kd_loss_{target}"] = visual.weight * options.weight * share * torch.stack(levels).mean()
    terms["vision_kd_loss"] = torch.stack(list(terms.values())).sum()
    return terms


def _check_gradient(target: str, student: list[torch.Tensor]) -> None:
    """A term without a gradient would be logged, and teach nothing."""
    if torch.is_grad_enabled() and not all(features.requires_grad for features in student):
        raise PreflightError(
            f"visual_kd target {target!r}: the student's features carry no gradient, so this term cannot teach it. "
            "Everything before them is frozen (tuner.freeze_vit, tuner.freeze_aligner, or LoRA whose target_modules do "
            "not reach it): train some of it or remove the target. Or reentrant gradient checkpointing cuts the graph: "
            "set training.gradient_checkpointing_kwargs: {use_reentrant: false}."
        )


# ---- projectors ------------------------------------------------------------------------------------------------------


def feature_widths(features: Features) -> dict[str, list[int]]:
    """Target -> width of every level, as a forward produced them: configs do not say it for every family.

    Raises:
        PreflightError: nothing was captured.
    """
    for target, levels in features.items():
        if not all(levels):
            raise PreflightError(
                f"visual_kd target {target!r}: a batch with images fired no module of this target, so the width of its "
                "features is not known. Check the modules set in custom.visual_kd.targets."
            )
    return {target: [passes[0].shape[-1] for passes in levels] for target, levels in features.items()}


def build_projectors(visual: VisualKdConfig, student: Features, teacher: Features, seed: int) -> nn.ModuleDict:
    """A linear layer for every target whose widths differ, from the student's width to the teacher's; float32.

    They are to be trained with the student and saved beside it. Names are the targets', with the level behind it where
    a target has several. The weights depend on the seed and the name only, so all ranks have the same ones, and the
    global random state is left as it is.

    Args:
        student, teacher: captured on a forward with images.
    """
    ours, theirs = feature_widths(student), feature_widths(teacher)
    projectors = nn.ModuleDict()
    for target in visual.targets:
        for level, (width, wanted) in enumerate(zip(ours[target], theirs[target], strict=True)):
            if width != wanted:
                name = _projector_name(target, level, len(ours[target]))
                projectors[name] = _linear(width, wanted, seed, name, student[target][level][0].device)
    return projectors


def _linear(width: int, wanted: int, seed: int, name: str, device: torch.device) -> nn.Linear:
    linear: nn.Linear = torch.nn.utils.skip_init(nn.Linear, width, wanted, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(width)  # as nn.Linear's own
    with torch.no_grad():
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)
    return linear.to(device)


def _projector_name(target: str, level: int, levels: int) -> str:
    return target if levels == 1 else f"{target}_{level}"


def _projector(projectors: nn.ModuleDict, target: str, level: int, levels: int) -> nn.Module | None:
    name = _projector_name(target, level, levels)
    return dict(projectors.items()).get(name)


# ---- batches ---------------------------------------------------------------------------------------------------------


def image_grids(
    visual: VisualKdConfig,
    student: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    teacher_inputs: Mapping[str, Any] | None = None,
) -> TargetGrids:
    """How packed tokens lie in images, for the targets that are interpolated.

    Args:
        inputs: the student's batch.
        teacher_inputs: the teacher's, where it has one of its own.
    """
    theirs = inputs if teacher_inputs is None else teacher_inputs
    return {
        target: (
            _grids(student, target, options.student_module, inputs),
            _grids(teacher, target, options.teacher_module, theirs),
        )
        for target, options in visual.targets.items()
        if options.match == "interpolate"
    }


def _grids(model: nn.Module, target: str, path: str | None, inputs: Mapping[str, Any]) -> Grids | None:
    layout, order = layout_of(model), token_order(model, target, path)
    if layout is None or layout.sizes is None:
        return None
    if layout.sizes == "image_sizes":
        sizes = torch.as_tensor(inputs["image_sizes"])
        return Grids([torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1)])
    # The order in which these families' forwards encode them.
    passes = [inputs[key] for key in ("image_grid_thw", "video_grid_thw") if inputs.get(key) is not None]
    return Grids(passes, block=order[1] if order is not None and order[0] == "blocks" else 1)


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch carries pixels."""
    return any(key.startswith("pixel_values") and value is not None for key, value in inputs.items())


def visual_units(batch: Mapping[str, Any]) -> float:
    """What a mean over image features weighs a batch by, proportional to its tokens.

    Patches where the batch says how many, the area of images that are packed, crops or frames elsewhere. Crops that
    only fill up a batch, all zero, do not count: no model encodes them. Nothing where all its rows are repeated, to
    fill up an epoch. A batch that was counted carries its number: on a GPU, looking again would wait for the device.
    """
    if "visual_units" in batch:
        return float(batch["visual_units"])
    if batch.get("all_repeated", False):
        return 0.0
    units = 0.0
    for key in ("image_grid_thw", "video_grid_thw"):
        if batch.get(key) is not None:
            units += float(batch[key].prod(-1).sum())
    if units:
        return units
    images = {key: value for key, value in batch.items() if key.startswith("pixel_values") and value is not None}
    return float(sum(_images(value, batch.get("image_sizes")) for value in images.values()))


def _images(pixels: Any, sizes: Any) -> float:
    if not isinstance(pixels, torch.Tensor):
        return len(pixels)
    if pixels.dim() == 5:  # [rows, crops, channels, height, width]
        return float(pixels.flatten(2).any(-1).sum())
    if pixels.dim() == 4 and sizes is not None and len(sizes) == len(pixels):
        return float(torch.as_tensor(sizes).prod(-1).sum())
    return len(pixels)
