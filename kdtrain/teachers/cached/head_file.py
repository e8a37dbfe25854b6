"""The head of a teacher in a cache of its hidden states: one safetensors file, with a checksum.

Shapes: V vocabulary, H hidden width.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from kdtrain.errors import DataError
from kdtrain.losses.head import Head, first_masked
from kdtrain.teachers.cached.shard_file import replace_file, safetensors_header

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_AGAIN = "Delete it and run the same `kdtrain cache` again: it writes what is missing."


def write_head_file(path: Path, head: Head) -> None:
    """Write the head; it appears as a whole, or not at all."""
    said = json.dumps({"logit_scale": float(head.logit_scale), "softcap": head.softcap}, sort_keys=True)
    tensors = {"weight": head.weight, "bias": head.bias}
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
    data = [_bytes(tensor) for tensor in stored.values()]
    described = {n: (_DTYPES[t.dtype], list(t.shape), t.nbytes) for n, t in stored.items()}
    header = safetensors_header({"head": said, "xxh3_128": _checksum(said, data)}, described)
    replace_file(path, [header, *(part.data for part in data)])


def read_head_file(path: Path) -> Head:
    """The head, mapped into memory; its checksum is checked, which reads it once.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata()
            stored = {name: file.get_tensor(name) for name in sorted(file.keys(), reverse=True)}
        numbers = json.loads(said["head"])
        if _checksum(said["head"], [_bytes(tensor) for tensor in stored.values()]) != said["xxh3_128"]:
            raise ValueError("its checksum is another")
        bias = stored.get("bias")
        masked_from = None if bias is None else first_masked(bias)
        return Head(stored["weight"], bias, numbers["logit_scale"], numbers["softcap"], masked_from)
    except FileNotFoundError:
        raise DataError(f"{path}, the teacher's head, is missing. Run the same `kdtrain cache` again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}, the teacher's head, is damaged. {_AGAIN}") from error


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _checksum(said: str, data: list[np.ndarray]) -> str:
    digest = xxhash.xxh3_128(said.encode())
    for part in data:
        digest.update(part.data)
    return digest.hexdigest()
