"""From targets to the modules that features are read from, in both models, and whether their tokens can be paired."""

from __future__ import annotations

from torch import nn

from kdtrain.config.options import VisualKdConfig, VisualTarget
from kdtrain.errors import PreflightError
from kdtrain.models.layouts import (
    LAYOUTS,
    Tap,
    TokenOrder,
    find_module,
    layout_of,
    model_type,
    unwrapped,
    vision_config,
)
from kdtrain.models.probe import Side

Taps = dict[str, list[Tap]]
"""Target -> one tap per level: one, but for deepstack."""

SECTION = "custom.visual_kd"
LAYER = "layer"
"""The target of hidden-state KD, of which each depth is a level; see `layers.py`."""


def named(target: str) -> str:
    """The subject of a message about a target."""
    return "hidden_kd" if target == LAYER else f"visual_kd target {target!r}"


def option(target: str, name: str) -> str:
    """What messages call a target's option."""
    return f"{SECTION}.targets.{target}.{name}"


def section_of(target: str) -> str:
    """The section of the config that a target belongs to."""
    return "custom.hidden_kd" if target == LAYER else SECTION


def taps_of_both(wanted: VisualKdConfig, student: nn.Module, teacher: nn.Module) -> tuple[Taps, Taps]:
    """Where every target is read from in the student and in the teacher, without running them.

    The order of tokens is known for the table's modules only: those that a config names are compared as they come.
    """
    student_taps: Taps = {}
    teacher_taps: Taps = {}
    for target, options in wanted.targets.items():
        student_taps[target] = taps(student, target, options.student_module, "student")
        teacher_taps[target] = taps(teacher, target, options.teacher_module, "teacher")
        levels = len(student_taps[target]), len(teacher_taps[target])
        if levels[0] != levels[1]:
            raise PreflightError(
                f"{named(target)}: the student has {levels[0]} levels and the teacher {levels[1]}, which cannot be "
                f"paired. Remove the target, or name one module of each in {option(target, 'student_module')} and "
                ".teacher_module."
            )
        _check_order(target, options, student, teacher)
    return student_taps, teacher_taps


def taps(model: nn.Module, target: str, path: str | None, side: Side) -> list[Tap]:
    """One tap per level of a target. The output of a `path` that the config names replaces the table."""
    if path is not None:
        return [Tap(path, "output", explicit=True)]
    layout, module_option = layout_of(model), option(target, f"{side}_module")
    kind = f"{named(target)}: the {side} is a {type(unwrapped(model)).__name__} of model type {model_type(model)!r}"
    if layout is None:
        raise PreflightError(
            f"{kind}, whose features are not known here. Known are {', '.join(LAYOUTS)}. "
            f"Set {module_option} to the module whose output is to be compared."
        )
    tap = layout.taps.get(target)
    if tap is None:
        have = ", ".join(name for name, other in LAYOUTS.items() if target in other.taps) or "none"
        raise PreflightError(
            f"{kind}, which does not have it (it has {', '.join(layout.taps)}). Families with {target!r}: {have}. "
            f"Remove the target, or set {module_option} to the module whose output is to be compared."
        )
    if "{i}" not in tap.path:
        return [tap]
    levels = len(list(tapped_module(model, tap.path.removesuffix(".{i}"), target, side).children()))
    if not levels:
        raise PreflightError(f"{kind}, built without any. Remove the target.")
    return [Tap(tap.path.format(i=i), tap.what) for i in range(levels)]


def tapped_module(model: nn.Module, path: str, target: str, side: Side) -> nn.Module:
    module = find_module(model, path)
    if module is None:
        raise PreflightError(
            f"{named(target)}: the {side} has no module {path!r}. Set {option(target, f'{side}_module')} to one of its "
            "named_modules()."
        )
    return module


# ---- the order of tokens ---------------------------------------------------------------------------------------------


def token_order(model: nn.Module, target: str, path: str | None) -> TokenOrder | None:
    """None where it is not known: at a module that the config names, inside an encoder that has an order of its own."""
    layout = layout_of(model)
    if layout is None or layout.vit_order == "rows" or (path is None and target != "vit"):
        return TokenOrder("rows")
    if path is not None:
        return None
    vision = vision_config(model)
    merge = vision.spatial_merge_size
    if layout.vit_order == "windows":
        return TokenOrder("windows", (vision.window_size, vision.patch_size, merge))
    return TokenOrder("blocks", (merge,)) if merge > 1 else TokenOrder("rows")


def _check_order(target: str, options: VisualTarget, student: nn.Module, teacher: nn.Module) -> None:
    orders = {
        "student": token_order(student, target, options.student_module),
        "teacher": token_order(teacher, target, options.teacher_module),
    }
    if options.match == "exact" and None not in orders.values() and orders["student"] != orders["teacher"]:
        raise PreflightError(
            f"{named(target)}: the tokens of the student ({model_type(student)}) are in the order "
            f"{_in_words(orders['student'])}, and those of the teacher ({model_type(teacher)}) in the order "
            f"{_in_words(orders['teacher'])}: one would be compared with another. Use the target aligner, whose tokens "
            "are row by row in both."
        )
    if options.match == "interpolate":
        for side, order in orders.items():
            if order is None or order.kind == "windows":
                raise PreflightError(
                    f"{named(target)}: match: interpolate needs tokens that lie in a grid, and those of the {side} are "
                    f"{_in_words(order)}. Use the target aligner without a module of your own, or match: exact."
                )


_ORDERS = {
    "rows": "row by row",
    "blocks": "blocks of {0} x {0}",
    "windows": "attention windows (window_size {0}, patch_size {1}, spatial_merge_size {2})",
}


def _in_words(order: TokenOrder | None) -> str:
    return "in no order that is known" if order is None else _ORDERS[order.kind].format(*order.sizes)
