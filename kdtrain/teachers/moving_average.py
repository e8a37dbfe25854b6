"""A moving average of the trained weights: θ̄ ← d·θ̄ + (1 − d)·θ after each optimizer step, which starts at θ.

In float32, whatever the weights' dtype: at d = 0.999 a step would round away in bfloat16. It belongs to no optimizer
and is not exported. A checkpoint has it as `teacher_average.safetensors`, whole tensors by the parameters' names, so
that it can be read with any number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from kdtrain.disk import save_tensors
from kdtrain.errors import CheckpointError
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)

FILE = "teacher_average.safetensors"


class MovingAverage:
    """The average of what is trained of a model; of what FSDP2 has in pieces each rank averages its own.

    Args:
        model: wrapped as it is trained, for the parameters are those of the optimizer.
        decay: d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: _own(p).float().clone() for name, p in self._trained.items()}
        if is_main():
            count = sum(average.numel() for average in self._averages.values())
            logger.info("The teacher is a moving average of %s weights: %s in float32.", f"{count:,}", _size(4 * count))

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        for name, average in self._averages.items():
            average.mul_(self._decay).add_(_own(self._trained[name]).float(), alpha=1 - self._decay)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """The averages in place of the weights; bit for bit the same weights again at the end."""
        _release(self._model)
        weights: dict[str, torch.Tensor] = {}
        try:
            for name, parameter in self._trained.items():
                weights[name] = _put(parameter, self._averages[name])
            yield
        finally:
            for name, before in weights.items():
                _put(self._trained[name], before)
            _release(self._model)

    # ---- in a checkpoint ---------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write `FILE` on rank 0; all ranks call it, since some may hold pieces."""
        whole = {name: _whole(average, self._trained[name]).cpu() for name, average in self._averages.items()}
        if is_main():
            save_tensors(whole, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read it back, on all ranks.

        Raises:
            CheckpointError: the file is not there, cannot be read, or has other weights.
        """
        path = folder / FILE
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            reason = error if path.exists() else "it is not there"
            raise CheckpointError(_MISSING.format(path=path, reason=reason)) from error
        _check_shapes(path, found, self._trained)
        for name, parameter in self._trained.items():
            self._averages[name].copy_(_own_part(found[name], parameter))


_MISSING = (
    "{path} cannot be read ({reason}): the moving average that is the teacher would begin anew. Resume from a "
    "checkpoint of a run with rlhf.teacher.weights: ema."
)


def _check_shapes(path: Path, found: Mapping[str, torch.Tensor], trained: Mapping[str, nn.Parameter]) -> None:
    stored = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    differ = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if differ:
        raise CheckpointError(
            f"{path} is the average of other weights than those that are trained: {len(differ)} differ, the first is "
            f"{differ[0]}. Resume with the model and the tuner options that the run began with."
        )


# ---- parameters, whole or in pieces ----------------------------------------------------------------------------------


def _own(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's numbers of a parameter, not a copy."""
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _put(parameter: nn.Parameter, values: torch.Tensor) -> torch.Tensor:
    """Give a parameter other values; those that it had."""
    if isinstance(parameter, DTensor):
        # FSDP2 gathers from the memory of its piece, whatever the parameter points to: they change places with a copy.
        own = _own(parameter)
        before = own.clone()
        own.copy_(values)
        return before
    before = parameter.data
    parameter.data = values.to(before.dtype)
    return before


def _release(model: nn.Module) -> None:
    """Forget what was made of other weights: what FSDP2 has kept whole after a forward, and what autocast has cast."""
    torch.clear_autocast_cache()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(own: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return own
    mesh, own = parameter.device_mesh, own.to(parameter.device_mesh.device_type)
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(own, mesh, parameter.placements, shape=shape, stride=stride).full_tensor()


def _own_part(whole: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements).to_local()


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
