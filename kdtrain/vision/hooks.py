"""Capturing features on a forward pass that runs anyway.

A module gets one hook, the same function each time, which looks up what is to be kept. That and the setting below make
it work under torch.compile: a hook of its own for every step would be compiled into the first step's graph and feed
that step's list for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kdtrain.errors import PreflightError
from kdtrain.vision.layouts import Side, Tap, submodule

Features = Mapping[str, Sequence[list[torch.Tensor]]]
"""Target -> level (one but for deepstack) -> one tensor per visual pass, in the order of the passes."""

# Otherwise a graph that was compiled without hooks is used with them too, and nothing is ever captured.
torch._dynamo.config.skip_nnmodule_hook_guards = False

_keepers: WeakKeyDictionary[nn.Module, list[Callable[[Any, Any], None]]] = WeakKeyDictionary()


@contextmanager
def capture(model: nn.Module, taps: Mapping[str, Sequence[Tap]], side: Side) -> Iterator[Features]:
    """Collect features, one tensor per call of a tapped module, in the order of the calls.

    A forward that gradient checkpointing repeats within backward is not collected again.

    Args:
        model: wrapped or not; paths are those of the plain model.
        taps: target -> where to read, one tap per level.
        side: for messages.

    Raises:
        PreflightError: no module at a path, no tensor where a tap looks for one, or a module that is tapped already
            because both models are the same object.

    The hooks are removed on every way out.
    """
    captured: dict[str, list[list[torch.Tensor]]] = {target: [[] for _ in levels] for target, levels in taps.items()}
    modules: dict[nn.Module, list[Callable[[Any, Any], None]]] = {}
    for target, levels in taps.items():
        for tap, kept in zip(levels, captured[target], strict=True):
            module = submodule(model, tap.path, target, side)
            if module in _keepers:
                raise PreflightError(
                    f"visual_kd target {target!r}: {tap.path!r} is the same module in student and teacher, so their "
                    "features cannot be told apart. Use a teacher of its own, or disable custom.visual_kd."
                )
            modules.setdefault(module, []).append(_keeper(kept, tap, target, side))
    handles = []
    try:
        for module, keepers in modules.items():
            _keepers[module] = keepers
            handles.append(module.register_forward_hook(_keep))
        yield captured
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            _keepers.pop(module, None)


@torch.compiler.disable
def _keep(module: nn.Module, args: Any, output: Any) -> None:
    if torch._C._current_graph_task_id() != -1:  # within backward: gradient checkpointing repeats the forward
        return
    for keeper in _keepers.get(module, ()):
        keeper(args, output)


def _keeper(kept: list[torch.Tensor], tap: Tap, target: str, side: Side) -> Callable[[Any, Any], None]:
    def keep(args: Any, output: Any) -> None:
        value = args[0] if tap.what == "input" and args else None if tap.what == "input" else output
        if tap.what in ("pooler_output", "last_hidden_state"):
            value = getattr(output, tap.what, None)
        elif tap.explicit and not isinstance(value, torch.Tensor):
            value = _main_tensor(output)
        if not isinstance(value, torch.Tensor):
            came = f"called with {len(args)} positional arguments" if tap.what == "input" else type(output).__name__
            raise PreflightError(
                f"visual_kd target {target!r}: no tensor as {tap.what} of the {side}'s module {tap.path!r} ({came}). "
                f"Set custom.visual_kd.targets.{target}.{side}_module to a module that returns one."
            )
        kept.append(value)

    return keep


def _main_tensor(output: Any) -> Any:
    """What a module that is no layer returns first: `last_hidden_state` of an object, the first of a tuple."""
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output[0] if isinstance(output, tuple | list) and output else None
