"""What every script of this folder imports first: the stand-in, torch made to believe in it, and the loss upon it."""

from __future__ import annotations

import traceback
import weakref
from typing import Any

import tests.fake_cuda.loaded  # noqa: F401

# isort: split
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdtrain.losses import gemm, generated
from kdtrain.losses.head import Head

FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[method-assign,assignment]
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
torch.cuda._lazy_init = lambda: None
torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
torch.cuda.set_rng_state = lambda *_: None  # type: ignore[assignment]


class Watch(TorchDispatchMode):
    """Bytes of the tensors that were made on the device while it is on, and tensors that were made elsewhere."""

    def __init__(self, *known: torch.Tensor | None) -> None:
        """`known` are there before: they do not count."""
        super().__init__()
        self._live: dict[int, int] = {}
        self.bytes = self.peak = 0
        self.at_peak: list[int] = []
        self.elsewhere: set[str] = set()
        for one in known:
            if one is not None:
                self._live[one.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if not isinstance(one, torch.Tensor):
                continue
            if one.device.type == "cuda":
                self._count(one)
            elif one.device.type != "meta":
                self.elsewhere.add(f"{func} {tuple(one.shape)} at {_place()}")
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = size
        self.bytes += size
        weakref.finalize(storage, self._gone, key, size)
        if self.bytes > self.peak:
            self.peak, self.at_peak = self.bytes, sorted(self._live.values(), reverse=True)[:12]

    def _gone(self, key: int, size: int) -> None:
        if self._live.pop(key, None) is not None:
            self.bytes -= size


def _place() -> str:
    frames = [f for f in traceback.extract_stack(limit=60) if "/kdtrain/" in f.filename and "fake_cuda" not in f.name]
    return "?" if not frames else f"{frames[-1].filename.rpartition('/kdtrain/')[2]}:{frames[-1].lineno}"


# Numbers that are not there decide nothing: every token is supervised, and no column is masked.
_nonzero = torch.Tensor.nonzero


def _all(self: torch.Tensor, **options: Any) -> Any:
    if isinstance(self, FakeTensor) and self.ndim == 1:
        return torch.arange(len(self), device=self.device)[:, None]
    return _nonzero(self, **options)


torch.Tensor.nonzero = _all  # type: ignore[method-assign,assignment]
Head.masks_columns = lambda self: False  # type: ignore[method-assign]


class Adapted(torch.nn.Module):
    """A frozen head with an adapter on it, as PEFT's LoRA computes it."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.a = torch.nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.b = torch.nn.Parameter(torch.empty(len(weight), rank, device=weight.device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        made = linear(hidden, self.weight)
        return (made + linear(linear(hidden.to(self.a.dtype), self.a), self.b) * 2.0).to(made.dtype)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`gemm.add_product`, whose `baddbmm` has no shape function of its own for a result of another dtype."""
    assert a.dtype == b.dtype
    assert a.dtype.itemsize == 2
    assert total.dtype == torch.float32
    assert a.device == b.device == total.device
    assert total.shape == (a.shape[0], b.shape[1])
    assert len(b) == a.shape[1]


real_add_product = gemm.add_product
gemm.add_product = _add_product


def as_traced() -> None:
    """Run what would be compiled as it is, operation by operation."""
    torch.compiler.is_compiling = lambda: True
    generated._compiled = lambda kind: lambda *arguments: generated._tile(*arguments, kind=kind)  # type: ignore[assignment]


def as_allocated() -> None:
    """What generated kernels leave on the device: scalars. That there is nothing beside is what `lowered.py` shows."""

    def ran(kind: generated._Kind, student: torch.Tensor, teacher: torch.Tensor | None, *_: Any) -> generated.TileSums:
        sums = [student.new_zeros(()) for _ in range(6)]
        of_teacher = teacher is not None
        return generated.TileSums(
            sums[0] if of_teacher else None, *sums[1:3], sums[3] if of_teacher else None, *sums[4:]
        )

    generated._run = ran  # type: ignore[assignment]
