"""Capturing features on a forward pass that runs anyway.

    with tapped(wanted, student, teacher) as (student_features, teacher_features):
        ...                                                         # both forwards, in any order

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

from kdtrain.config.options import VisualKdConfig
from kdtrain.errors import PreflightError
from kdtrain.feature_kd.taps import LAYER, named, option, section_of, tapped_module, taps_of_both
from kdtrain.models.layouts import Tap
from kdtrain.models.probe import Side

Features = Mapping[str, Sequence[list[torch.Tensor]]]
"""Target -> level (one but for deepstack and layers) -> one tensor per pass, in the order of the passes."""

# Otherwise a graph that was compiled without hooks is used with them too, and nothing is ever captured.
torch._dynamo.config.skip_nnmodule_hook_guards = False

_Keeper = Callable[[Any, Any], None]
_keepers: WeakKeyDictionary[nn.Module, list[tuple[Side, _Keeper]]] = WeakKeyDictionary()


@contextmanager
def tapped(wanted: VisualKdConfig, student: nn.Module, teacher: nn.Module) -> Iterator[tuple[Features, Features]]:
    """Capture (student's, teacher's) features on the forward passes inside."""
    student_taps, teacher_taps = taps_of_both(wanted, student, teacher)
    with (
        capture(student, student_taps, "student") as student_features,
        capture(teacher, teacher_taps, "teacher") as teacher_features,
    ):
        yield student_features, teacher_features


@contextmanager
def capture(model: nn.Module, taps: Mapping[str, Sequence[Tap]], side: Side) -> Iterator[Features]:
    """Collect features, one tensor per call of a tapped module, in the order of the calls.

    A forward that gradient checkpointing repeats within backward is not collected again. The hooks are removed on every
    way out.
    """
    captured: dict[str, list[list[torch.Tensor]]] = {target: [[] for _ in levels] for target, levels in taps.items()}
    modules: dict[nn.Module, list[tuple[Side, _Keeper]]] = {}
    for target, levels in taps.items():
        for tap, kept in zip(levels, captured[target], strict=True):
            module = tapped_module(model, tap.path, target, side)
            if any(other != side for other, _ in _keepers.get(module, ())):
                raise PreflightError(
                    f"{named(target)}: {tap.path!r} is the same module in student and teacher, so their features "
                    f"cannot be told apart. Use a teacher of its own, or disable {section_of(target)}."
                )
            modules.setdefault(module, []).append((side, _keeper(kept, tap, target, side)))
    handles = []
    try:
        for module, keepers in modules.items():
            if module not in _keepers:  # another term may have its hook there
                handles.append(module.register_forward_hook(_keep))
            _keepers.setdefault(module, []).extend(keepers)
        yield captured
    finally:
        for handle in handles:
            handle.remove()
        for module, keepers in modules.items():
            left = [one for one in _keepers.pop(module, []) if one not in keepers]
            if left:
                _keepers[module] = left


@torch.compiler.disable
def _keep(module: nn.Module, args: Any, output: Any) -> None:
    if torch._C._current_graph_task_id() != -1:  # within backward: gradient checkpointing repeats the forward
        return
    for _, keeper in _keepers.get(module, ()):
        keeper(args, output)


def _keeper(kept: list[torch.Tensor], tap: Tap, target: str, side: Side) -> _Keeper:
    def keep(args: Any, output: Any) -> None:
        value = _value(tap, args, output)
        if not isinstance(value, torch.Tensor):
            came = f"called with {len(args)} positional arguments" if tap.what == "input" else type(output).__name__
            way_out = f"Set {option(target, f'{side}_module')} to a module that returns one."
            if target == LAYER:
                way_out = f"Disable {section_of(target)}."
            raise PreflightError(
                f"{named(target)}: no tensor as {tap.what} of the {side}'s module {tap.path!r} ({came}). {way_out}"
            )
        kept.append(value)

    return keep


def _value(tap: Tap, args: Any, output: Any) -> Any:
    if tap.what == "input":
        return args[0] if args else None
    if tap.what == "pooler_output":
        return getattr(output, "pooler_output", None)
    if not tap.explicit or isinstance(output, torch.Tensor):
        return output
    # The config may name a whole encoder: it returns an object with the tokens, or a tuple that begins with them.
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output[0] if isinstance(output, tuple | list) and output else None
