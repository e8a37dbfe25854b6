"""How the tokens of images lie in grids, and resizing the teacher's grid to the student's.

Shapes: n images (or crops, or frames), L tokens of one, T·H·W a grid of tokens, N = Σ T·H·W, F feature width.
Features of one visual pass are [n, L, F], each image a square grid in rows, or packed [N, F] with a grid per image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdtrain.config.options import VisualKdConfig
from kdtrain.errors import PreflightError
from kdtrain.feature_kd.taps import named, option, token_order
from kdtrain.host import on_host
from kdtrain.models.layouts import layout_of
from kdtrain.models.probe import Side

Shape = tuple[int, int, int]
"""Frames, rows and columns of tokens."""


@dataclass(frozen=True)
class Grids:
    """How the packed tokens of each visual pass lie in images.

    `passes`: one [n, 3] tensor of (t, h, w) per pass, in units that may be finer than the tokens by one factor, which
    follows from the counts: patches where the tokens are merged patches. `block`: side of the square blocks that tokens
    are stored in; 1 is row by row.
    """

    passes: Sequence[torch.Tensor] = ()
    block: int = 1

    def of_pass(self, number: int) -> torch.Tensor | None:
        return self.passes[number] if number < len(self.passes) else None


NOTHING_KNOWN = Grids()
TargetGrids = Mapping[str, tuple[Grids, Grids]]
"""Target -> grids of the student's and the teacher's tokens."""


# ---- what a batch says -----------------------------------------------------------------------------------------------


def image_grids(
    wanted: VisualKdConfig,
    student: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    teacher_inputs: Mapping[str, Any],
) -> TargetGrids:
    """How packed tokens lie in images, for the targets that are interpolated."""
    return {
        target: (
            _grids(student, target, options.student_module, inputs),
            _grids(teacher, target, options.teacher_module, teacher_inputs),
        )
        for target, options in wanted.targets.items()
        if options.match == "interpolate"
    }


def _grids(model: nn.Module, target: str, path: str | None, inputs: Mapping[str, Any]) -> Grids:
    layout = layout_of(model)
    if layout is None or layout.sizes is None:
        return NOTHING_KNOWN
    if layout.sizes == "image_sizes":
        sizes = on_host(torch.as_tensor(inputs["image_sizes"]))
        return Grids([torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1)])
    # The order in which these families' forwards encode them.
    passes = [inputs[key] for key in ("image_grid_thw", "video_grid_thw") if inputs.get(key) is not None]
    order = token_order(model, target, path)
    return Grids(passes, block=order.sizes[0] if order is not None and order.kind == "blocks" else 1)


# ---- resizing --------------------------------------------------------------------------------------------------------


def lie_alike(student: Grids, teacher: Grids, visual_pass: int) -> bool:
    """Whether tokens in equal numbers lie alike: 2 × 6 and 4 × 3 are as many."""
    first, second = student.of_pass(visual_pass), teacher.of_pass(visual_pass)
    if first is None or second is None:
        return student.block == teacher.block
    return student.block == teacher.block and torch.equal(on_host(first), on_host(second))


def resized(
    teacher: torch.Tensor,
    student: torch.Tensor,
    target: str,
    visual_pass: int,
    teacher_grids: Grids,
    student_grids: Grids,
) -> torch.Tensor:
    """The teacher's features on the student's grid: [N of the student, F of the teacher], in the student's order."""
    found = (
        f"{named(target)}: student features are {tuple(student.shape)} and teacher features {tuple(teacher.shape)}; "
        "match: interpolate"
    )
    wanted = _shapes(student, student_grids, visual_pass, found, target, "student")
    given = _shapes(teacher, teacher_grids, visual_pass, found, target, "teacher")
    if [frames for frames, *_ in wanted] != [frames for frames, *_ in given]:
        raise PreflightError(
            f"{found} resizes grids, and here the student has {len(wanted)} images (or crops) and the teacher "
            f"{len(given)}, with {sum(w[0] for w in wanted)} and {sum(g[0] for g in given)} frames. Let both models' "
            "processors cut images and sample videos alike."
        )
    images = teacher.reshape(-1, teacher.shape[-1]).float().split([math.prod(shape) for shape in given])
    results = []
    for tokens_NF, shape, wanted_shape in zip(images, given, wanted, strict=True):
        # The frames are the batch of the interpolation: bilinear within each, nothing across time.
        grid_TFHW = _to_rows(tokens_NF, shape, teacher_grids.block).movedim(-1, 1)
        grid_TFHW = nn.functional.interpolate(grid_TFHW, wanted_shape[1:], mode="bilinear", align_corners=False)
        results.append(_from_rows(grid_TFHW.movedim(1, -1), student_grids.block))
    return torch.cat(results)


def _shapes(features: torch.Tensor, grids: Grids, visual_pass: int, found: str, target: str, side: Side) -> list[Shape]:
    """The grid of tokens of every image of a pass."""
    grid = grids.of_pass(visual_pass)
    # One image a row. With a single row [1, N, F] the batch's grid decides: some towers pack all images into it.
    if features.dim() == 3 and (grid is None or len(features) > 1):
        tokens = features.shape[1]
        root = math.isqrt(tokens)
        if root * root != tokens:
            raise PreflightError(
                f"{found} needs a square grid, and {tokens} tokens of an image of the {side} are none (a class token "
                f"cannot be resized). Set {option(target, f'{side}_module')} to a module without one."
            )
        return [(1, root, root)] * len(features)
    if grid is None:
        raise PreflightError(
            f"{found} needs the grid of every image, and this family's batches do not say it. Choose modules with "
            "equally many tokens."
        )
    # The batch counts pixels or patches, of which factor × factor have become one token: so many times fewer in all.
    shapes, count = [tuple(shape) for shape in on_host(grid).tolist()], math.prod(features.shape[:-1])
    factor = math.isqrt(sum(map(math.prod, shapes)) // count)
    merged = [(t, h // factor, w // factor) for t, h, w in shapes] if factor else []
    if sum(map(math.prod, merged)) != count:
        raise PreflightError(
            f"{found}: the {side}'s {count} tokens do not lie on the grids of the batch, {shapes} (frames, rows, "
            "columns). Choose a module whose output has a token for every patch or merged patch."
        )
    return merged


# Tokens stored in blocks lie in the order [T, H/b, W/b, b, b]: a block's own rows and columns come last. Swapping the
# two middle axes makes whole rows of the image of them; the same swap leads back.


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
