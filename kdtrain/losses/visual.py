"""Distance between student and teacher features of images.

Shapes: n images (or crops, or frames), L tokens of one, T·H·W a grid of tokens, N = Σ T·H·W, F feature width.
Features of one visual pass are [n, L, F], each image a square grid in rows, or packed [N, F] with a grid per image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kdtrain.errors import PreflightError
from kdtrain.losses.kinds import Distance, Match

# Feature vectors that are shorter have no direction to compare.
_SHORTEST = 1e-8


@dataclass(frozen=True)
class Grids:
    """How the packed tokens of each visual pass lie in images.

    Args:
        passes: one [n, 3] tensor of (t, h, w) per pass, in units that may be finer than the tokens by one factor, which
            follows from the counts: patches where the tokens are merged patches.
        block: side of the square blocks that tokens are stored in; 1 is row by row.
    """

    passes: Sequence[torch.Tensor]
    block: int = 1


def feature_distance(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    distance: Distance,
    target: str,
    *,
    projector: nn.Module | None = None,
    match: Match = "exact",
    student_grids: Grids | None = None,
    teacher_grids: Grids | None = None,
) -> torch.Tensor:
    """Scalar distance over all visual passes, in float32 also under autocast.

    - `mse`: mean over elements of (s − t)².
    - `cosine`: mean over tokens of 1 − cos(s, t), as ½·|s/|s| − t/|t||², which is 0 for equal features and not only
      nearly so; 1 where one of the two is zero.

    The gradient reaches the student's features and the projector, never the teacher's features.

    Args:
        student, teacher: one tensor per visual pass, [..., F]; of equal shapes but for what follows.
        distance: one of the two.
        target: name for messages.
        projector: applied to the student's features, where widths differ.
        match: "interpolate" resizes the teacher's grid of tokens to the student's, bilinearly, where they differ.
        student_grids, teacher_grids: needed to resize packed features.

    Raises:
        PreflightError: nothing was captured, shapes do not fit, or there is no grid to resize.
    """
    if not student or len(student) != len(teacher):
        raise PreflightError(
            f"visual_kd target {target!r}: {len(student)} student and {len(teacher)} teacher activations in a batch "
            f"with images. Set custom.visual_kd.targets.{target}.student_module or .teacher_module to a module that "
            "every image goes through."
        )
    device = student[0].device
    with torch.autocast(device.type, enabled=False):
        pairs = []
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            s, t = s.to(device), t.detach().to(device)
            if match == "interpolate" and (
                s.shape[:-1] != t.shape[:-1] or not _same_grids(student_grids, teacher_grids, i)
            ):
                t = _resized(s, t, target, i, student_grids, teacher_grids)
                s = s.reshape(-1, s.shape[-1])
            projected = s.float() if projector is None else projector(s.float())
            if projected.shape != t.shape:
                raise PreflightError(_misfit(s, t, target, match, projector))
            pairs.append((projected.flatten(0, -2), t.flatten(0, -2).float()))
        student_NF, teacher_NF = (torch.cat(side) for side in zip(*pairs, strict=True))
        if distance == "mse":
            return (student_NF - teacher_NF).square().mean()
        return _cosine_distance(student_NF, teacher_NF)


def _cosine_distance(student_NF: torch.Tensor, teacher_NF: torch.Tensor) -> torch.Tensor:
    """Mean of ½·|s/|s| − t/|t||². A vector of zeros has no direction: its distance is 1, without a gradient.

    Divided by a small number instead, one such token would give a gradient of 1e8, and clipping would take the rest of
    the step away.
    """
    lengths = [x.norm(dim=-1, keepdim=True) for x in (student_NF, teacher_NF)]
    directed = (lengths[0] > _SHORTEST) & (lengths[1] > _SHORTEST)
    both = (lengths[0] <= _SHORTEST) & (lengths[1] <= _SHORTEST)
    ours, theirs = (
        x / torch.where(directed, length, 1.0) for x, length in zip((student_NF, teacher_NF), lengths, strict=True)
    )
    distances = torch.where(directed, (ours - theirs).square().sum(-1, keepdim=True) / 2, (~both).float())
    return distances.mean()


def _misfit(s: torch.Tensor, t: torch.Tensor, target: str, match: Match, projector: nn.Module | None) -> str:
    message = (
        f"visual_kd target {target!r}: student features are {tuple(s.shape)} and teacher features {tuple(t.shape)}"
    )
    if s.shape[:-1] != t.shape[:-1]:
        counts = f"{math.prod(s.shape[:-1])} and {math.prod(t.shape[:-1])} tokens"
        return (
            f"{message}: {counts}. Set custom.visual_kd.targets.{target}.match: interpolate to resize the teacher's "
            "grid, or name modules of one shape."
        )
    reason = "without a projector between them" if projector is None else "which the projector does not lead to"
    return (
        f"{message}: widths {s.shape[-1]} and {t.shape[-1]}, {reason}. Set custom.visual_kd.targets.{target}."
        "student_module or .teacher_module to modules of one width, or let a projector be built for these."
    )


# ---- grids -----------------------------------------------------------------------------------------------------------

Shape = tuple[int, int, int]  # frames, rows and columns of tokens


def _same_grids(student: Grids | None, teacher: Grids | None, visual_pass: int) -> bool:
    """Whether tokens in equal numbers lie alike: 2 × 6 and 4 × 3 are as many."""
    if student is None or teacher is None:
        return _block(student) == _block(teacher)
    first, second = student.passes[visual_pass], teacher.passes[visual_pass]
    return student.block == teacher.block and torch.equal(first, second.to(first.device))


def _block(grids: Grids | None) -> int:
    return 1 if grids is None else grids.block


def _resized(
    s: torch.Tensor,
    t: torch.Tensor,
    target: str,
    pass_index: int,
    student_grids: Grids | None,
    teacher_grids: Grids | None,
) -> torch.Tensor:
    """The teacher's features on the student's grid: [N of the student, F of the teacher], in the student's order."""
    found = f"visual_kd target {target!r}: student features are {tuple(s.shape)} and teacher features {tuple(t.shape)}"
    wanted = _images(s, student_grids, pass_index, f"{found}; match: interpolate", target, "student")
    own = _images(t, teacher_grids, pass_index, f"{found}; match: interpolate", target, "teacher")
    if [shape[0] for shape in wanted] != [shape[0] for shape in own]:
        raise PreflightError(
            f"{found}; match: interpolate resizes grids, and here the student has {len(wanted)} images (or crops) and "
            f"the teacher {len(own)}, with {sum(w[0] for w in wanted)} and {sum(o[0] for o in own)} frames. Let both "
            "models' processors cut images and sample videos alike."
        )
    rows = t.reshape(-1, t.shape[-1]).float().split([math.prod(shape) for shape in own])
    resized = []
    for tokens, own_shape, wanted_shape in zip(rows, own, wanted, strict=True):
        grid_TFHW = _to_rows(tokens, own_shape, _block(teacher_grids)).movedim(-1, 1)
        grid_TFHW = nn.functional.interpolate(grid_TFHW, wanted_shape[1:], mode="bilinear", align_corners=False)
        resized.append(_from_rows(grid_TFHW.movedim(1, -1), _block(student_grids)))
    return torch.cat(resized)


def _images(
    features: torch.Tensor, grids: Grids | None, pass_index: int, found: str, target: str, side: str
) -> list[Shape]:
    """The grid of tokens of every image of a pass."""
    grid = grids.passes[pass_index] if grids is not None and pass_index < len(grids.passes) else None
    if features.dim() == 3 and (grid is None or len(features) > 1):
        tokens = features.shape[1]
        root = math.isqrt(tokens)
        if root * root != tokens:
            raise PreflightError(
                f"{found} needs a square grid, and {tokens} tokens of an image of the {side} are none (a class token "
                f"cannot be resized). Set custom.visual_kd.targets.{target}.{side}_module to a module without one."
            )
        return [(1, root, root)] * len(features)
    if grid is None:
        raise PreflightError(
            f"{found} needs the grid of every image, and this family's batches do not say it. Choose modules with "
            "equally many tokens."
        )
    shapes, count = [tuple(shape) for shape in grid.tolist()], math.prod(features.shape[:-1])
    factor = math.isqrt(sum(map(math.prod, shapes)) // count)
    merged = [(t, h // factor, w // factor) for t, h, w in shapes] if factor else []
    if sum(map(math.prod, merged)) != count:
        raise PreflightError(
            f"{found}: the {side}'s {count} tokens do not lie on the grids of the batch, {shapes} (frames, rows, "
            "columns). Choose a module whose output has a token for every patch or merged patch."
        )
    return merged


def _to_rows(tokens_NF: torch.Tensor, shape: Shape, block: int) -> torch.Tensor:
    """Tokens of one image, stored block by block -> [T, H, W, F]."""
    t, h, w = shape
    blocks = tokens_NF.reshape(t, h // block, w // block, block, block, -1)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(t, h, w, -1)


def _from_rows(grid_THWF: torch.Tensor, block: int) -> torch.Tensor:
    """[T, H, W, F] -> tokens [N, F], stored block by block."""
    t, h, w, f = grid_THWF.shape
    blocks = grid_THWF.reshape(t, h // block, block, w // block, block, f)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(-1, f)
