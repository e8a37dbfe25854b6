"""The log-likelihoods of labels without the logits, and the gradient of a weighted sum of them: two chunked passes.

Shapes: S supervised tokens, R rows of a block, V vocabulary.

A loss of the labels' likelihoods alone, L(log p_1, …, log p_S), is made in two passes over the same tiles. The first
finds the log-likelihoods; from them follow the loss and w_i = ∂L/∂(−log p_i), numbers of no size. The second turns
Σ w_i·(−log p_i) into gradients, whose closed form is w_i·(p − onehot).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kdtrain.losses.chunks import ChunkedPass
from kdtrain.losses.derivatives import dot
from kdtrain.losses.tile import Buffers, TileOptions, TileSums


def label_logprobs_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p(label) of each row [S] of logits [S, V], by operations that autograd knows."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at_label = logits.gather(1, labels[:, None])
    # −log(1 + Σ_others e^(z − z_label)): near p = 1 it keeps the digits that z_label − log Z has lost.
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(-1, keepdim=True)
    return -functional.softplus(others - at_label).squeeze(1)


class LabelPass(ChunkedPass):
    """The first pass: `logprobs()` of the labels, and the metrics of the tile."""

    generates = False

    def _terms(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        scratch: Buffers,
        options: TileOptions,
        with_gradient: bool,
    ) -> None:
        p, labels = scratch.p, self.labels[rows]
        largest = student.amax(-1, keepdim=True)
        torch.softmax(student, -1, out=p)
        log_z = largest - p.amax(-1, keepdim=True).log()
        at_label = student.gather(1, labels[:, None])
        entropy = (log_z - dot(p, student, scratch.work)).sum()
        # As in `label_logprobs_of_logits`, in place.
        student.scatter_(1, labels[:, None], -torch.inf)
        logprobs = -functional.softplus(torch.logsumexp(student, -1, keepdim=True) - at_label).squeeze(1)
        self._found.append(logprobs)
        correct = (at_label == largest).sum()
        self.sums.append(TileSums(None, -logprobs.sum(), correct, None, entropy, None))

    @property
    def _found(self) -> list[torch.Tensor]:
        return self.__dict__.setdefault("found", [])

    def logprobs(self) -> torch.Tensor:
        """log p(label), [S]; after `all_chunks`."""
        return torch.cat(self._found) if self._found else torch.zeros(0, dtype=self.dtype, device=self.labels.device)


class WeightedLabelPass(ChunkedPass):
    """The second pass: gradients of Σ w·(−log p(label)), the weights being those of the cross-entropy (`ce_mask`).

    `logprobs` [S] are those of the first pass.
    """

    generates = False

    logprobs: torch.Tensor

    def _terms(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        scratch: Buffers,
        options: TileOptions,
        with_gradient: bool,
    ) -> None:
        assert self.row_weights.ce is not None
        weights = (options.ce_weight * self.row_weights.ce[rows])[:, None]
        torch.softmax(student, -1, out=scratch.p)
        torch.mul(scratch.p, weights, out=student)
        # p(label) − 1, which rounds to 0 long before it is.
        student.scatter_(1, self.labels[rows][:, None], weights * torch.expm1(self.logprobs[rows])[:, None])
