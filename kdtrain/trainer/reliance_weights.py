"""What tokens count in the divergence by how much the teacher reads them off the images (`rlhf.token_weights`).

    r = log p_T(label | image) − log p_T(label | image in its mean colour), at temperature 1, nats

In each row with an image the k = ⌈top·n⌉ tokens with the highest r, of equal ones the earlier, count share·n/k each,
and the others (1 − share)·n/(n − k), times their `kd_weight`; n counts its supervised tokens of weight above 0. Without
`kd_weight` the weights of a row add up to n, so that it counts as much as it did, and D_kd is the same. A row without
images, or of which all n are on top, is as it was.

Source: https://arxiv.org/abs/2605.21924: few tokens of an answer need the image, and all count alike in the mean.

Shapes: B rows, T positions, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kdtrain.config.token_weights import TokenWeights
from kdtrain.data.batch import Batch
from kdtrain.losses.comparison import label_logprobs
from kdtrain.teachers.base import AnyTargets
from kdtrain.teachers.by_row import scored
from kdtrain.trainer.evaluation import comparable
from kdtrain.trainer.token_selection import candidates, ranked, share_of


@torch.no_grad()
def reliance_weights(
    batch: Batch,
    targets: AnyTargets,
    teacher_forward: Callable[[Batch], AnyTargets],
    weighing: TokenWeights,
    columns: int,
) -> torch.Tensor:
    """[S] float32: what the divergence of each supervised token of a batch with `blank_images` counts.

    Args:
        targets: what the teacher says of the batch.
        teacher_forward: asked once more, about the images in their mean colour.
        columns: leading tokens of the vocabulary that take part.
    """
    blanked = batch.with_blank_images()
    own, without = (_label_logprobs(one, batch, columns) for one in (targets, teacher_forward(blanked)))
    return weights_by(own - without, batch, weighing)


def weights_by(reliance_S: torch.Tensor, batch: Batch, weighing: TokenWeights) -> torch.Tensor:
    """The weights [S] that follow from r [S]."""
    device, predicts_BT = reliance_S.device, batch.predicts_BT.to(reliance_S.device)
    may_BT = candidates(batch).to(device)
    # A label that is impossible with and without the image does not need it.
    ranks_BT = ranked(reliance_S.nan_to_num(nan=0.0), predicts_BT, may_BT)
    counts_B, most_B = may_BT.sum(1), share_of(may_BT, weighing.ratio)
    others_B = counts_B - most_B
    pictured_B = torch.tensor(batch.rows.pictured).to(device, non_blocking=True) & (others_B > 0)
    on_top_B = weighing.share * counts_B / most_B.clamp(min=1)
    below_B = (1 - weighing.share) * counts_B / others_B.clamp(min=1)
    weights_BT = torch.where(ranks_BT < most_B[:, None], on_top_B[:, None], below_B[:, None])
    weights_BT = torch.where(pictured_B[:, None], weights_BT, 1.0)
    given_BT = batch.kd_weights_BT
    weights_BT = weights_BT if given_BT is None else weights_BT * given_BT.to(device)
    return weights_BT[predicts_BT]


def _label_logprobs(targets: AnyTargets, batch: Batch, columns: int) -> torch.Tensor:
    """[S] float64 (float32 on MPS); 0 where the teacher says nothing, and has no divergence."""
    device = batch.labels.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    found_S = torch.zeros(len(batch.labels_S), dtype=dtype, device=device)
    for one in scored(targets, batch):
        scores = comparable(one.scores, columns)
        assert scores is not None, "a model in this process has all of its distribution"
        own_S = torch.ones_like(found_S, dtype=torch.bool) if one.tokens_S is None else one.tokens_S.to(found_S.device)
        labels = batch.labels_S[own_S]
        found_S = found_S.masked_scatter(own_S, label_logprobs(scores, labels, columns).to(found_S))
    return found_S
