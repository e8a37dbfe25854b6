"""The calibration plot: how often a model's most likely token is right, by how likely it says that it is."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.runs.report.charts import SIZE
from kdtrain.runs.report.record import RunRecord, is_number

_MODELS = (("before", "student before"), ("after", "student after"), ("teacher", "teacher"))


@dataclass(frozen=True)
class Bar:
    """A bin, in a box of SIZE × SIZE."""

    x: float
    width: float
    accuracy: float
    opacity: float
    """By the share of the tokens that it holds."""
    title: str


@dataclass(frozen=True)
class Plot:
    """Of one model."""

    title: str
    ece: str
    bars: list[Bar]


def calibration(run: RunRecord) -> list[Plot]:
    """A plot of each model whose bins `evaluation.json` has."""
    models = run.evaluation.get("models")
    found = []
    for key, title in _MODELS:
        model = models.get(key) if isinstance(models, dict) else None
        model = model if isinstance(model, dict) else {}
        bins = model.get("calibration")
        if isinstance(bins, list) and (bars := _bars(bins)):
            ece = model.get("ece")
            found.append(Plot(title, f"{ece:.3f}" if is_number(ece) else "", bars))
    return found


def _bars(bins: list[object]) -> list[Bar]:
    counts = [one["count"] for one in bins if isinstance(one, dict) and is_number(one.get("count"))]
    total, most = sum(counts), max(counts, default=0)
    width, bars = SIZE / len(bins), []
    for i, one in enumerate(bins):
        if not isinstance(one, dict) or not all(is_number(one.get(k)) for k in ("count", "confidence", "accuracy")):
            continue
        count, confidence, accuracy = one["count"], one["confidence"], one["accuracy"]
        if count:
            title = f"{count:,.0f} tokens ({count / total:.1%}): says {confidence:.1%}, right {accuracy:.1%}"
            opacity = 0.15 + 0.85 * (count / most) ** 0.5
            bars.append(Bar(round(i * width, 1), round(width - 4, 1), round(accuracy * SIZE), round(opacity, 2), title))
    return bars
