"""A device with memory of its own, for tests without one: it counts what the host has to wait for.

Its tensors hold real numbers, which the CPU computes, so that everything can be trained on it. What makes it another
device is what a GPU has too: tensors of it and of the CPU cannot be mixed, and numbers come to the host by a copy that
waits. Written down is every operation at which CUDA would wait, `torch.cuda.set_sync_debug_mode` calls the same ones:

- a number is read (`item`, `tolist`, `if tensor:`, `.cpu()`, `torch.equal`);
- the size of a result is one (`nonzero`, `masked_select`, a bool mask as an index, `repeat_interleave` without a size);
- a copy from the host that is not `non_blocking`, such as `torch.tensor(1, device=…)`.

It is registered once in a process and stays: use it in a process of its own, see `in_own_process`.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"
ROOT = Path(__file__).resolve().parent.parent
_READS = {"_local_scalar_dense", "equal", "is_nonzero"}
_HAS_SIZE_OF_VALUES = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount"}
_COPIES = {"_to_copy", "copy_", "copy"}
_MAY_MIX = {"_to_copy", "copy_", "copy", "index", "index_put_", "index_put", "_index_put_impl_"}


class OnCard(torch.Tensor):
    """A tensor of the device; `raw` has its numbers."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnCard:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: Waits | None) -> Any:
    values, form = tree_flatten((args, kwargs))
    of_card = {id(value.raw): value for value in values if isinstance(value, OnCard)}
    asked = kwargs.get("device")
    if not of_card and not _is_card(asked):
        return func(*args, **kwargs)
    name = func.__name__.split(".")[0]
    others = [v for v in values if isinstance(v, torch.Tensor) and not isinstance(v, OnCard) and v.dim()]
    if others and of_card and name not in _MAY_MIX:
        raise RuntimeError(f"{name}: tensors on {NAME} and on the CPU")
    if waits is not None and (kind := _waits(name, args, kwargs, bool(of_card))):
        waits.add(kind)
    stays = _is_card(asked) if asked is not None else bool(of_card)
    if name == "copy_":
        stays = isinstance(args[0], OnCard)
    if name == "histc":  # of integers the CPU has none
        return OnCard(func(args[0].raw.float(), *args[1:], **kwargs).to(args[0].dtype))
    raw = [v.raw if isinstance(v, OnCard) else torch.device("cpu") if _is_device(v) else v for v in values]
    own_args, own_kwargs = tree_unflatten(raw, form)
    if name == "_to_copy" and bool(of_card) != stays:  # to the other memory: never the same tensor
        found = func(*own_args, **{**own_kwargs, "device": None}).clone()
    else:
        found = func(*own_args, **own_kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not stays:
            return value
        return of_card[id(value)] if id(value) in of_card else OnCard(value)

    return tree_map(wrapped, found)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == NAME


def _waits(name: str, args: Any, kwargs: dict[str, Any], of_card: bool) -> str | None:
    """What the host waits for in an operation of the device, if it does."""
    if name in _READS or name in _HAS_SIZE_OF_VALUES:
        return name
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, OnCard) for index in indices):
            return "index of the host"
        filled = name != "index" and not isinstance(args[2], OnCard)
        return "bool index" if not filled and any(i.dtype == torch.bool for i in indices) else None
    if name in _COPIES:
        source, target = (args[1], args[0]) if name != "_to_copy" else (args[0], kwargs.get("device"))
        to = isinstance(target, OnCard) if isinstance(target, torch.Tensor) else target is None or _is_card(target)
        came = isinstance(source, OnCard)
        if came and not to:
            return "to the host"
        if to and not came and not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] and args[2])):
            return "from the host"
    return None


class Waits(TorchDispatchMode):
    """Inside it tensors can be made on the device; `found` has what the host has waited for, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.on = True

    def add(self, kind: str) -> None:
        if self.on:
            self.found[kind, _place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self)

    def take(self) -> Counter[tuple[str, str]]:
        """What was found since the last call."""
        found, self.found = self.found, Counter()
        return found


def _place() -> str:
    """The innermost line outside torch, and the innermost of the package where that is another one."""
    frames = [f for f in traceback.extract_stack()[:-3] if "/torch/" not in f.filename and f.filename != __file__]
    ours = [f for f in frames if str(ROOT / "kdtrain") in f.filename]
    lines = [f"{_short(f.filename)}:{f.lineno} {f.line}" for f in (*ours[-1:], *frames[-1:])]
    return " <- ".join(reversed(dict.fromkeys(lines)))


def _short(path: str) -> str:
    return path.split("site-packages/")[-1].removeprefix(f"{ROOT}/")


class _Functions(TorchFunctionMode):
    """Of what torch does below its dispatcher, or has no kernel for: attention is its plain formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_card(kwargs.get("device")):
            made = func(*args, **{**kwargs, "device": None}) if not isinstance(args[0], OnCard) else args[0]
            return made.to(kwargs["device"])
        if func is torch.Tensor.__format__ and isinstance(args[0], OnCard):
            return format(args[0].item() if not args[0].dim() else args[0].cpu(), args[1])
        if func is torch.Tensor.__repr__ and isinstance(args[0], OnCard):
            return repr(args[0].cpu())
        if func == torch.Tensor.data.__set__ and isinstance(args[0], OnCard):
            args[0].raw = args[1].raw
            return None
        if func == torch.Tensor.data.__get__ and isinstance(args[0], OnCard):
            return OnCard(args[0].raw)
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        if func is torch.Tensor.tolist and isinstance(args[0], OnCard):
            return args[0].cpu().tolist()
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnCard) and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1])
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], OnCard):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    plain = torch.ops.aten._scaled_dot_product_attention_math
    return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]


class _Module:
    """What torch asks of a device's module."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = manual_seed = set_device = synchronize = empty_cache = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda *_: torch.zeros(0))
    set_rng_state = staticmethod(lambda *_: None)


@contextmanager
def waiting() -> Iterator[Waits]:
    """The device, and what the host waits for inside."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, _Module())
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied weights stay tied
    try:
        # Backward in this thread: a forked process has none for a new device.
        with torch.autograd.set_multithreading_enabled(False), _Functions(), Waits() as waits:
            yield waits
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
