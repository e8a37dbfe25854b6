"""What was found, as a table in markdown: the one in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
_NAMES = {"kdtrain": "kdtrain", "trl": "TRL", "swift": "ms-swift", "oumi": "oumi", "distillkit": "DistillKit"}
_NOT_RUN = "not run"
NO_END = "no end within"
"""Of a run that was ended for its time: it says nothing of the tool."""


def table(results: dict[str, Any]) -> str:
    """A column for each tool, a row for each question; `results` as `results.json` has them."""
    heads = ["", *(f"{_NAMES[tool]} {found['version']}" for tool, found in results.items())]
    rows = [
        heads,
        ["---"] * len(heads),
        ["KL(T‖S) on held-out answers, nats per token", *(_quality(found) for found in results.values())],
        ["gradient norm at 4 × 4, and on two ranks, over that at 1 × 16", *map(_gradient, results.values())],
        ["a teacher with other tokens", *(_mistake(found, "other_tokens", "refused") for found in results.values())],
        ["`learing_rate`", *(_mistake(found, "learning_rate", "found") for found in results.values())],
        ["`temprature` of the loss", *(_mistake(found, "temperature", "found") for found in results.values())],
        ["Ctrl-C between two checkpoints: steps that are kept", *(_kept(found) for found in results.values())],
        ["and on by its own option", *(_resumed(found) for found in results.values())],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _quality(found: dict[str, Any]) -> str:
    return f"{found['quality']['kl']:.2f}" if "kl" in found.get("quality", {}) else _NOT_RUN


def _gradient(found: dict[str, Any]) -> str:
    norms = found.get("gradient")
    if not norms:
        return _NOT_RUN
    whole, *others = norms.values()
    return ", ".join(_ratio(norm, whole) for norm in others)


def _ratio(norm: float | str | None, whole: float | str | None) -> str:
    if isinstance(norm, float) and isinstance(whole, float):
        return f"{norm / whole:.2f}"
    return _NOT_RUN if NO_END in f"{norm} {whole}" else "fails"


def _mistake(found: dict[str, Any], name: str, seen: str) -> str:
    result = found.get("faults", {}).get(name)
    if result is None or result["said"].startswith(NO_END):
        return _NOT_RUN
    return seen if result["exit"] else "trains"


def _kept(found: dict[str, Any]) -> str:
    result = found.get("interruption")
    return f"{result['step_kept']} of {result['steps_done']}" if result else _NOT_RUN


def _resumed(found: dict[str, Any]) -> str:
    """Where the second run began, by the number of steps that it logged."""
    result = found.get("interruption")
    if not result:
        return _NOT_RUN
    if (result["resume_said"] or "").startswith(NO_END):
        return _NOT_RUN
    if result["resume_exit"]:
        return "fails"
    return f"from step {result['resumed_to'] - result['steps_then']}"
