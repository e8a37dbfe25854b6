"""Buffers that are kept from one call of the loss to the next.

On a CPU large tensors come from the system and go back to it, page by page: touching fresh memory takes ten times as
long as writing to it. On a GPU PyTorch's allocator keeps memory itself.
"""

from __future__ import annotations

import threading

import torch

from kdtrain.losses import gemm

# Values that rows of a GPU's buffers begin at multiples of: its loads and its matrix products want aligned rows, and
# vocabularies are odd numbers (50257).
_ALIGNED = 64
# Larger ones are not kept: somebody asked for a chunk of his own.
_LARGEST = 256 * 2**20


class Workspace(threading.local):
    """Named buffers on the CPU, the largest of each name so far; every thread has its own."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def take(
        self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device, stride: int | None = None
    ) -> torch.Tensor:
        """An uninitialised [rows, columns], valid until `name` is taken again.

        Args:
            stride: from one row to the next, see `padded`; None is `columns`.
        """
        if stride is not None and stride != columns:
            return self.take(name, rows, stride, dtype, device)[:, :columns]
        count = rows * columns
        if device.type != "cpu" or count * dtype.itemsize > _LARGEST:
            return torch.empty(rows, columns, dtype=dtype, device=device)
        kept = self._kept.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < count:
            self._kept.pop(name, None)
            with torch.inference_mode(False):  # a buffer made in inference mode could be used there only
                kept = self._kept[name] = torch.empty(count, dtype=dtype, device=device)
        return kept[:count].view(rows, columns)


workspace = Workspace()


def padded(columns: int, device: torch.device) -> int:
    """Values from one row of a buffer to the next. There are never more columns than were asked for."""
    return columns if not gemm.on_gpu(device) else -(-columns // _ALIGNED) * _ALIGNED
