"""How much there is to learn from the teacher at each token: what `rlhf.token_selection` ranks tokens by.

Shapes: N tokens, C of them in a chunk, V vocabulary (the columns that both models share).

A first pass over the heads, without gradients and chunk by chunk in the buffers of the loss that follows: the logits of
all tokens are never there at once.
"""

from __future__ import annotations

import math

import torch

from kdtrain.losses.comparison import Scores
from kdtrain.losses.derivatives import dot
from kdtrain.losses.divergence import entropy, generalized_jsd
from kdtrain.losses.kinds import TokenScore
from kdtrain.losses.sizes import block_rows, chunk_sizes, default_chunk
from kdtrain.losses.tile import Buffers, log_z_ratio
from kdtrain.losses.topk import TopKLogprobs, coarse_grain


@torch.no_grad()
def token_scores(
    by: TokenScore,
    student: Scores,
    teacher: Scores | TopKLogprobs | None = None,
    *,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """The score of each token, [N] float32 (float64 of float64), nats.

    - `student_entropy`: H(S).
    - `disagreement`: (1 − H(S)/log V) · KL(T‖S), high where the student is sure and wrong. Of a teacher that is known
      by its top k, KL has one outcome for all others, whatever `tail` the loss has.

    S and T are the distributions at temperature 1, whatever that of the loss.

    Args:
        teacher: of the same tokens; `disagreement` needs one.
        chunk_tokens: C; None chooses. The result does not depend on it.

    Source: TIP, https://arxiv.org/abs/2604.14084: the tokens that teach are those where the student is unsure, and the
    few where it is sure and wrong.
    """
    if by == "disagreement" and teacher is None:
        raise ValueError("the score disagreement needs a teacher's distributions")
    device, columns = student.outputs.device, student.columns
    dtype = torch.promote_types(student.outputs.dtype, torch.float32)
    scores = torch.empty(len(student), dtype=dtype, device=device)
    exact = student.finite and (not isinstance(teacher, Scores) or teacher.finite)
    start = 0
    for size in chunk_sizes(len(student), chunk_tokens or default_chunk(columns, dtype, device)):
        rows = slice(start, start + size)
        logits = student.logits(rows, "student")
        of_teacher: torch.Tensor | TopKLogprobs | None = None
        if by == "disagreement" and isinstance(teacher, TopKLogprobs):
            of_teacher = teacher[rows]
        elif by == "disagreement" and isinstance(teacher, Scores):
            of_teacher = teacher.logits(rows, "teacher").to(device)
        scores[rows] = _of_chunk(logits, of_teacher, exact=exact)
        start += size
    return scores


def _of_chunk(student: torch.Tensor, teacher: torch.Tensor | TopKLogprobs | None, *, exact: bool) -> torch.Tensor:
    """[C]; logits that are in a buffer are overwritten.

    Args:
        exact: no logit is −inf, which the arithmetic of the tiles does not know.
    """
    if not exact or isinstance(teacher, TopKLogprobs):
        uncertain = entropy(student)
        if teacher is None:
            return uncertain
        if isinstance(teacher, TopKLogprobs):
            student_known, known = coarse_grain(student, teacher, "bucket")
            return _disagreement(uncertain, generalized_jsd(student_known, known, beta=0.0), student.shape[1])
        return _disagreement(uncertain, generalized_jsd(student, teacher, beta=0.0), student.shape[1])
    block = block_rows(student.shape[1], student.device, len(student))
    scratch, found = Buffers.like(student, block), []
    for first in range(0, len(student), block):
        own = student[first : first + block]
        found.append(
            _of_block(own, None if teacher is None else teacher[first : first + block], scratch.rows(len(own)))
        )
    return torch.cat(found).squeeze(1)


def _of_block(student: torch.Tensor, teacher: torch.Tensor | None, scratch: Buffers) -> torch.Tensor:
    """[R, 1], by the formulas of `tile_terms`; the student's logits are overwritten."""
    p, q, work = scratch.p, scratch.q, scratch.work
    largest = student.amax(-1, keepdim=True)
    torch.softmax(student, -1, out=p)
    p_largest = p.amax(-1, keepdim=True)
    uncertain = largest - p_largest.log() - dot(p, student, work)
    if teacher is None:
        return uncertain
    torch.softmax(teacher, -1, out=q)
    ratio = log_z_ratio(teacher.amax(-1, keepdim=True), largest, q.amax(-1, keepdim=True), p_largest)
    log_qp = torch.sub(teacher, student, out=student).sub_(ratio)
    return _disagreement(uncertain, dot(q, log_qp, work), student.shape[1])


def _disagreement(uncertain: torch.Tensor, kl: torch.Tensor, columns: int) -> torch.Tensor:
    # Roundings can leave either factor below 0.
    return (1 - uncertain / math.log(max(columns, 2))).clamp(min=0) * kl.clamp(min=0)
