"""Charts as numbers for the page: curves in a box of SIZE × SIZE, ticks in percent of it.

The page stretches the box to any width, and sets the text of ticks and legends in its own size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdtrain.runs.report.curves import FROM_ZERO, Panel, Point, moving_mean, points_of, thinned
from kdtrain.runs.report.record import RunRecord

SIZE = 1000
_FLAT = 0.005
"""A curve that moves by less than this share of its height is drawn from 0: it is flat."""
_DOTS_UP_TO = 24
"""A curve of so few points shows each of them."""
RUN_COLOURS = ("blue", "red", "green", "purple", "orange", "sky", "ink", "olive")


@dataclass(frozen=True)
class Tick:
    """A line of the grid."""

    at: float
    """Percent, from the left or from the top."""
    label: str


@dataclass(frozen=True)
class Curve:
    """A curve, ready to be drawn."""

    label: str
    colour: str
    path: str
    """The records, or where there are many those that stand out."""
    mean_path: str
    """A moving mean; empty where there are few records."""
    dots: str
    """A dot for each record; empty where there are many."""
    last: str
    """The last value, in words."""
    points: list[list[float | None]]
    """[step, value], for the readings under the pointer."""


@dataclass(frozen=True)
class Chart:
    """A chart."""

    title: str
    unit: str
    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    more: int = 0
    """Runs that have no colour of their own left."""

    @property
    def has_mean(self) -> bool:
        """Whether a curve has a moving mean."""
        return any(curve.mean_path for curve in self.curves)

    @property
    def readings(self) -> list[list[list[float | None]]]:
        """Points of the curves that are in the legend."""
        return [curve.points for curve in self.curves if curve.colour != "grey"]

    @property
    def described(self) -> str:
        """For those who do not see it."""
        curves = "; ".join(f"{curve.label}, {curve.last} at the end" for curve in self.curves)
        return f"{self.title}: {curves}"


def charts_of_run(panels: Sequence[Panel], run: RunRecord) -> list[Chart]:
    """The charts of one run; panels of which no value is a number are left out."""
    x_range = _steps([run])
    charts = []
    for panel in panels:
        curves = [(c.label, c.colour, points_of(run.records, c.key)) for c in panel.curves]
        charts.append(_chart(panel.title, panel.unit, curves, x_range, from_zero=panel.from_zero))
    return [chart for chart in charts if chart.curves]


def charts_of_runs(wanted: Sequence[tuple[str, str, str]], runs: Sequence[RunRecord]) -> list[Chart]:
    """Charts with a curve of each run; the runs beyond the colours are drawn in grey."""
    x_range = _steps(runs)
    charts = []
    for key, title, unit in wanted:
        curves = []
        for i, run in enumerate(runs):
            curves.append((run.name, colour_of_run(i), points_of(run.records, key)))
        more = max(len(runs) - len(RUN_COLOURS), 0)
        charts.append(_chart(title, unit, curves, x_range, from_zero=key in FROM_ZERO, more=more))
    return [chart for chart in charts if chart.curves]


def colour_of_run(place: int) -> str:
    """Of several runs; those beyond the colours are grey."""
    return RUN_COLOURS[place] if place < len(RUN_COLOURS) else "grey"


def _steps(runs: Sequence[RunRecord]) -> tuple[float, float]:
    steps = [record["step"] for run in runs for record in run.records]
    return (0.0, float(max(steps, default=1)) or 1.0)


def _chart(
    title: str,
    unit: str,
    curves: Sequence[tuple[str, str, list[Point]]],
    x_range: tuple[float, float],
    *,
    from_zero: bool,
    more: int = 0,
) -> Chart:
    curves = [(label, colour, points) for label, colour, points in curves if any(v is not None for _, v in points)]
    values = [value for _, _, points in curves for _, value in points if value is not None]
    low, high, ticks = _y_axis(values, from_zero)
    drawn = [_curve(label, colour, points, x_range, (low, high)) for label, colour, points in curves]
    y_ticks = [Tick(_percent(high - value, high - low), text) for value, text in ticks]
    x_ticks = [Tick(_percent(value, x_range[1]), f"{value:,.0f}") for value in _x_values(x_range[1])]
    return Chart(title, unit, drawn, x_ticks, y_ticks, x_range, (low, high), more)


def _curve(
    label: str, colour: str, points: list[Point], x_range: tuple[float, float], y_range: tuple[float, float]
) -> Curve:
    kept, mean = thinned(points), thinned(moving_mean(points))

    def place(point: tuple[float, float]) -> str:
        x = SIZE * (point[0] - x_range[0]) / (x_range[1] - x_range[0])
        return f"{x:.0f} {SIZE * (y_range[1] - point[1]) / (y_range[1] - y_range[0]):.0f}"

    def path(points: Sequence[Point]) -> str:
        text, pen_down = "", False
        for step, value in points:
            if value is not None:
                text += f"{'L' if pen_down else 'M'}{place((step, value))}"
            pen_down = value is not None
        return text

    few = len(points) <= _DOTS_UP_TO
    dots = "".join(f"M{place((step, value))}h0" for step, value in points if value is not None) if few else ""
    last = next(value for _, value in reversed(points) if value is not None)
    readings: list[list[float | None]] = [[step, None if v is None else float(f"{v:.4g}")] for step, v in kept]
    return Curve(label, colour, path(kept), path(mean), dots, number(last), readings)


def _y_axis(values: Sequence[float], from_zero: bool) -> tuple[float, float, list[tuple[float, str]]]:
    """Lowest and highest value of the axis, and its ticks; it begins at 0 where that is not far off."""
    if not values:
        return 0.0, 1.0, []
    low, high = min(values), max(values)
    if low >= 0 and (from_zero or low < high / 2 or high - low < _FLAT * high):
        low = 0.0
    if low == high:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    step = _nice_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(-math.floor(math.log10(step) + 1e-9), 0)
    ticks = [(i * step, _tick(i * step, digits)) for i in range(first, last + 1)]
    return first * step, last * step, ticks


def _x_values(last: float) -> list[float]:
    step = max(_nice_step(last / 4), 1.0)
    return [i * step for i in range(int(last // step) + 1)]


def _nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _tick(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    return _power_of_ten(value) if digits > 3 else f"{value:,.{digits}f}"


def _power_of_ten(value: float) -> str:
    """0.000025 as 2.5e-5."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def number(value: float) -> str:
    """A value in a legend: four digits, as people write them."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return _power_of_ten(value) if abs(value) < 1e-3 else f"{value:.4g}"


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2)
