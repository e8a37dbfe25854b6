"""Distance between student and teacher features of images.

Shapes: F features of one capture, in any shape whose last axis is the feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from kdtrain.errors import PreflightError

Distance = Literal["mse", "cosine"]


def feature_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], distance: Distance, target: str
) -> torch.Tensor:
    """Scalar distance over all captured passes, float32; the gradient reaches the student's features only.

    - `mse`: mean over elements of (s − t)².
    - `cosine`: mean over feature vectors of 1 − cos(s, t).

    Args:
        student, teacher: one tensor per visual pass, [..., F], same shapes pairwise.
        distance: one of the two.
        target: name for messages.

    Raises:
        PreflightError: nothing was captured, or shapes differ.
    """
    if not student or len(student) != len(teacher):
        raise PreflightError(
            f"visual_kd target {target!r}: {len(student)} student and {len(teacher)} teacher activations in a batch "
            "with images. Check the module paths of that target."
        )
    for s, t in zip(student, teacher, strict=True):
        if s.shape != t.shape:
            raise PreflightError(
                f"visual_kd target {target!r}: student features are {tuple(s.shape)} and teacher features "
                f"{tuple(t.shape)}. Choose modules of one shape."
            )
    flat_student = torch.cat([s.flatten(0, -2).float() for s in student])
    flat_teacher = torch.cat([t.detach().flatten(0, -2).to(flat_student) for t in teacher])
    if distance == "mse":
        return (flat_student - flat_teacher).square().mean()
    return (1 - torch.nn.functional.cosine_similarity(flat_student, flat_teacher, dim=-1)).mean()
