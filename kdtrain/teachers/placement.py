"""Where the weights of a teacher in this process lie: whole on each device, in pieces over them, or in CPU memory.

A frozen model needs no wrapper that trains it: it can be cut into pieces though the student is whole on each device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kdtrain.errors import PreflightError
from kdtrain.models.quantization import bits_of


def refuse_fixed(module: nn.Module, placement: str) -> None:
    """Refuse to place anew what loading has placed already.

    Raises:
        PreflightError: of quantised weights, and of a device map.
    """
    bits = bits_of(module)
    if bits is not None:
        raise PreflightError(
            f"rlhf.teacher.placement: {placement} is not available for a quantised teacher ({bits}), whose weights "
            "stay whole on each device. Remove one of the two options."
        )
    if getattr(module, "hf_device_map", None) is not None:
        raise PreflightError(
            f"rlhf.teacher.placement: {placement}, and the teacher has a device map, which has placed it already. "
            "Remove one of the two options."
        )


def shard(module: nn.Module, device: torch.device, ranks: int) -> None:
    """Cut a frozen model into pieces by FSDP 2, one for each rank; each layer is put together for its own forward.

    What is outside of the language model's layers (embedding, head, a vision encoder) is put together for the whole
    forward: whether a rank's batch has images then makes no difference to what it waits for. All ranks have to run as
    many forwards.
    """
    base: Any = module.get_base_model() if isinstance(module, PeftModel) else module
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in base.get_decoder().modules():
        if type(layer).__name__ in (base._no_split_modules or ()):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # or the root would stay whole between forwards


class OffloadedWeights:
    """Weights that lie in CPU memory, and on a device only while they are used.

    They are frozen, so nothing is copied back: the copies on the device are dropped. What still refers to one, such as
    the head of targets that wait for the loss, keeps it as long.

    Args:
        module: moved to the CPU, into pinned memory where the device is a GPU.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        module.to("cpu")
        self._device = device
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        if device.type == "cuda":
            for tensor in tensors.values():
                tensor.data = tensor.data.pin_memory()
        self._at_home = [(tensor, tensor.data) for tensor in tensors.values()]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the module can run on the device."""
        try:
            for tensor, weights in self._at_home:
                tensor.data = weights.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor, weights in self._at_home:
                tensor.data = weights
