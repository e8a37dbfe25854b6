"""Capturing a module's output on a forward pass that runs anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kdtrain.errors import PreflightError


@contextmanager
def capture(model: nn.Module, paths: Mapping[str, str], side: str) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect the outputs of modules, one tensor per call, in the order of the calls.

    Args:
        model: unwrapped, so that the paths are those of its `named_modules()`.
        paths: target name -> module path.
        side: "student" or "teacher", for messages.

    Yields:
        Target name -> outputs. Several visual passes in one forward are all kept.

    Raises:
        PreflightError: no module at a path, or an output that is no tensor.

    The hooks are removed on every way out.
    """
    captured: dict[str, list[torch.Tensor]] = {target: [] for target in paths}
    handles = []
    try:
        for target, path in paths.items():
            handles.append(_module(model, path, target, side).register_forward_hook(_keeper(captured, target, side)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _module(model: nn.Module, path: str, target: str, side: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise PreflightError(
            f"visual_kd target {target!r}: the {side} has no module {path!r}. "
            f"Set custom.visual_kd.targets.{target}.{side}_module to one of its named_modules()."
        ) from None


def _keeper(captured: dict[str, list[torch.Tensor]], target: str, side: str) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            raise PreflightError(
                f"visual_kd target {target!r}: the {side}'s module returns {type(output).__name__}, not a tensor. "
                f"Set custom.visual_kd.targets.{target}.{side}_module to a module inside it."
            )
        captured[target].append(output)

    return keep
