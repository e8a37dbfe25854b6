"""Distance between student and teacher features.

Shapes: n images (or crops, or frames), L tokens of one, N tokens of all, F feature width.
Features of one visual pass are [n, L, F] or packed [N, F].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from kdtrain.errors import PreflightError
from kdtrain.feature_kd.grids import NOTHING_KNOWN, Grids, lie_alike, resized
from kdtrain.feature_kd.taps import named, option
from kdtrain.losses.kinds import Distance, Match

# Feature vectors that are shorter have no direction to compare.
_SHORTEST = 1e-8


def feature_distance(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    distance: Distance,
    target: str,
    *,
    projector: nn.Module | None = None,
    match: Match = "exact",
    student_grids: Grids = NOTHING_KNOWN,
    teacher_grids: Grids = NOTHING_KNOWN,
) -> torch.Tensor:
    """Scalar distance over all visual passes, in float32 also under autocast.

    - `mse`: mean over elements of (s − t)².
    - `cosine`: mean over tokens of 1 − cos(s, t), as ½·|s/|s| − t/|t||², which is 0 for equal features and not only
      nearly so; 1 where one of the two is zero.

    The gradient reaches the student's features and the projector (applied to them where widths differ), never the
    teacher's features. `match="interpolate"` resizes the teacher's grid of tokens to the student's, bilinearly, where
    they differ. `target` is for messages.
    """
    if not student or len(student) != len(teacher):
        raise PreflightError(
            f"{named(target)}: {len(student)} student and {len(teacher)} teacher activations in a batch with images. "
            f"Set {option(target, 'student_module')} or .teacher_module to a module that every image goes through."
        )
    device = student[0].device
    with torch.autocast(device.type, enabled=False):
        pairs = []
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            s, t = s.to(device), t.detach().to(device)
            if match == "interpolate" and (
                s.shape[:-1] != t.shape[:-1] or not lie_alike(student_grids, teacher_grids, i)
            ):
                t = resized(t, s, target, i, teacher_grids, student_grids)
                s = s.reshape(-1, s.shape[-1])
            projected = s.float() if projector is None else projector(s.float())
            if projected.shape != t.shape:
                raise PreflightError(_misfit(s, t, target, projector))
            pairs.append((projected.flatten(0, -2), t.flatten(0, -2).float()))
        # All passes in one mean: an image weighs by its tokens, whichever pass it came with.
        student_NF, teacher_NF = (torch.cat(of_model) for of_model in zip(*pairs, strict=True))
        return distances(student_NF, teacher_NF, distance).mean()


def distances(student_NF: torch.Tensor, teacher_NF: torch.Tensor, distance: Distance) -> torch.Tensor:
    """What the distance of a token is the mean of: (s − t)² of `mse`, [N, F], or 1 − cos of `cosine`, [N, 1]."""
    if distance == "mse":
        return (student_NF - teacher_NF).square()
    return _cosine_distances(student_NF, teacher_NF)


def _cosine_distances(student_NF: torch.Tensor, teacher_NF: torch.Tensor) -> torch.Tensor:
    """[N, 1]: ½·|s/|s| − t/|t||². A vector of zeros has no direction: its distance is 1, without a gradient.

    Divided by a small number instead, one such token would give a gradient of 1e8, and clipping would take the rest of
    the step away.
    """
    lengths = [x.norm(dim=-1, keepdim=True) for x in (student_NF, teacher_NF)]
    directed = (lengths[0] > _SHORTEST) & (lengths[1] > _SHORTEST)
    both_zero = (lengths[0] <= _SHORTEST) & (lengths[1] <= _SHORTEST)
    s, t = (x / torch.where(directed, length, 1.0) for x, length in zip((student_NF, teacher_NF), lengths, strict=True))
    return torch.where(directed, (s - t).square().sum(-1, keepdim=True) / 2, (~both_zero).float())


def _misfit(s: torch.Tensor, t: torch.Tensor, target: str, projector: nn.Module | None) -> str:
    found = f"{named(target)}: student features are {tuple(s.shape)} and teacher features {tuple(t.shape)}"
    if s.shape[:-1] != t.shape[:-1]:
        return (
            f"{found}: {math.prod(s.shape[:-1])} and {math.prod(t.shape[:-1])} tokens. Set {option(target, 'match')}: "
            "interpolate to resize the teacher's grid, or name modules of one shape."
        )
    widths = f"{found}: widths {s.shape[-1]} and {t.shape[-1]}"
    modules = f"name modules of one width in {option(target, 'student_module')} and .teacher_module"
    if projector is not None:
        return f"{widths}, which the projector does not lead to. To compare them, {modules}."
    return (
        f"{widths}, without a projector between them: either no row of the training data had an image when the trainer "
        f"was built, or the models could not be run then (FSDP 1, weights that one rank loads for all). Use plain data "
        f"parallelism, or {modules}."
    )
