"""How many tokens the loss takes at a time, and the bytes of its buffers."""

from __future__ import annotations

import math

import torch

from kdtrain.losses import gemm
from kdtrain.losses.gradients import GPU_ROWS, half_rows
from kdtrain.losses.workspace import padded

# Bytes of the two logit tiles of a chunk together: on a GPU 512 tokens at 152k words. There what comes after them are
# the half-precision gradients of several chunks (`gradients.py`).
_TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 600 * 2**20}
_MOST_TOKENS = {"cpu": 256, "cuda": 1024}
_LEAST_TOKENS = {"cpu": 64, "cuda": GPU_ROWS}
# Values of one element-wise block: its buffers stay in a CPU's cache; on a GPU, where this is the way of those terms
# that have no generated kernels, a pass over one takes longer than to start it.
_BLOCK_VALUES = {"cpu": 2**20, "cuda": 2**23}


def default_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a chunk: as many as two logit tiles of the budget hold, on a GPU a multiple of its products' rows."""
    kind = _kind(device)
    tokens = _TILE_BYTES[kind] // (2 * padded(vocabulary, device) * dtype.itemsize)
    rows = rows_of_products(device)
    return min(max(tokens // rows * rows, _LEAST_TOKENS[kind]), _MOST_TOKENS[kind])


def rows_of_products(device: torch.device) -> int:
    """Rows that a product's tile has on a device: fewer take as long."""
    return GPU_ROWS if gemm.on_gpu(device) else 1


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" and not gemm.on_gpu(device) else "cuda"


def tile_bytes(
    tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_teacher: bool,
    half: bool,
    mixing_tiles: int = 0,
) -> int:
    """Bytes of the buffers of one pass over so many supervised tokens: the logits' tiles, what is kept of their
    gradients in half precision, and the scratch.

    Args:
        dtype: of the logits.
        half: whether the model's hidden states are of half precision.
        mixing_tiles: further tiles, where the mean of several teachers is made: 1, or 2 at another temperature than 1.
    """
    columns = padded(vocabulary, device)
    chunk = max(chunk_sizes(tokens, default_chunk(vocabulary, dtype, device), rows_of_products(device)), default=0)
    block = block_rows(vocabulary, device, chunk)
    scratch = 5 if mixing_tiles else 3
    kept = min(max(half_rows(vocabulary), chunk), tokens) * 2 * columns if half and gemm.on_gpu(device) else 0
    return dtype.itemsize * columns * (((2 if with_teacher else 1) + mixing_tiles) * chunk + scratch * block) + kept


def block_rows(vocabulary: int, device: torch.device, chunk: int) -> int:
    """Rows of a chunk whose element-wise passes are made together."""
    return min(max(1, _BLOCK_VALUES[_kind(device)] // vocabulary), chunk)


def chunk_sizes(tokens: int, chunk: int, multiple: int = 1) -> list[int]:
    """`tokens` in as few chunks as are needed, the larger ones first: as equal as they can be, or as multiples of a
    number can, with the rest at the end; `multiple` is left alone where a chunk has no room for it."""
    count = math.ceil(tokens / chunk)
    size = math.ceil(tokens / count / multiple) * multiple if count else 0
    if multiple > 1 and size <= chunk:
        return [size] * (tokens // size) + [tokens % size] * (tokens % size > 0) if size else []
    return [tokens // count + (i < tokens % count) for i in range(count)]
