"""Between host and device without waiting: tensors are sent so that the host goes on, and what it has sent it knows.

On a GPU the host runs ahead and queues work. It waits for all of it wherever it reads a number, or learns the size of a
result from one (`nonzero`, a bool mask as an index). What a training step has to know of its batches, which tokens are
supervised and how many, is found in the tensors that the collator made on the CPU.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Tensor on a device -> the same on the CPU, and the version of the first: one that was written to is no longer known.
_KNOWN = WeakTensorKeyDictionary()


def send(tensor: torch.Tensor, device: torch.device | str | int) -> torch.Tensor:
    """The tensor on a device. From the CPU it is on its way when this returns, in order with all other work there."""
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    # Only from pinned memory does a copy of any size leave the host at once.
    source = tensor.pin_memory() if device.type == "cuda" and not tensor.is_pinned() else tensor
    return source.to(device, non_blocking=True)


def send_known(tensor: torch.Tensor, device: torch.device | str | int) -> torch.Tensor:
    """The same, and `on_host` of what is returned needs not wait."""
    sent = send(tensor, device)
    # Tensors of the inference mode have no version that would tell whether they were written to.
    if sent is not tensor and tensor.device.type == "cpu" and not sent.is_inference():
        _KNOWN[sent] = tensor, sent._version
    return sent


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's numbers on the CPU; the host waits for them once, where the tensor was not sent by `send_known`."""
    if tensor.device.type == "cpu":
        return tensor
    if tensor.is_inference():
        return tensor.cpu()
    known, version = _KNOWN.get(tensor, (None, 0))
    if known is None or version != tensor._version:
        known = tensor.detach().cpu()
        _KNOWN[tensor] = known, tensor._version
    return known


def rows_of(mask: torch.Tensor, device: torch.device | str | int) -> torch.Tensor:
    """[N] long on a device: where a mask on the host is true. `index_select` by it is the mask as an index."""
    return send(mask.nonzero().squeeze(1), device)
