"""The curves as one picture, for those who have matplotlib (the extra `report`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kdtrain.runs.folder import replaced
from kdtrain.runs.report.charts import Chart

_COLUMNS, _WIDTH, _HEIGHT = 2, 5.5, 2.4  # inches, of each chart
_TITLE = 0.4  # inches, of the picture's title
# As style.css has them.
_STYLES = {
    "ink": ("#1b1d21", "-"),
    "blue": ("#0063b1", "-"),
    "red": ("#c24a00", "--"),
    "green": ("#00795c", ":"),
    "purple": ("#93447f", "-."),
    "orange": ("#a86a00", "-"),
    "sky": ("#2f8fcb", (0, (12, 3))),
    "olive": ("#6e6e00", (0, (4, 2, 1, 2))),
    "grey": ("#b4b9bf", "-"),
}


def write_png(charts: Sequence[Chart], title: str, path: Path) -> None:
    """Write the picture, or nothing where there is no matplotlib or nothing to draw."""
    if not charts or not has_matplotlib():
        return
    from matplotlib.figure import Figure  # no pyplot: it would keep the figure, and ask for a display

    rows = -(-len(charts) // _COLUMNS)
    width, height = _COLUMNS * _WIDTH, rows * _HEIGHT + _TITLE
    figure = Figure(figsize=(width, height), dpi=100)
    # Fixed margins: the layouts that measure every label draw all of it twice.
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.2 / width, bottom=0.3 / height, top=1 - (_TITLE + 0.3) / height,
        wspace=0.8 / (_WIDTH - 0.8), hspace=0.6 / (_HEIGHT - 0.6),
    )  # fmt: skip
    figure.suptitle(_literal(title), y=1 - 0.1 / height, fontsize=12, fontweight="bold")
    for i, chart in enumerate(charts):
        axes = figure.add_subplot(rows, _COLUMNS, i + 1)
        for curve in chart.curves:
            colour, dashes = _STYLES[curve.colour]
            steps, values = zip(*((step, value) for step, value in curve.points), strict=True)
            label = None if curve.colour == "grey" else _literal(curve.label)
            marker = "o" if len(steps) == 1 else ""  # a line of one point cannot be seen
            axes.plot(
                steps, values, color=colour, linestyle=dashes, marker=marker, markersize=4, linewidth=1.3, label=label
            )
        axes.set_title(f"{chart.title}{', ' if chart.unit else ''}{chart.unit}", fontsize=9, loc="left")
        axes.set_xlim(*chart.x_range)
        axes.set_ylim(*chart.y_range)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", linewidth=0.5, color="#e4e6e9")
        axes.spines[["top", "right"]].set_visible(False)
        if len(chart.curves) > 1:
            axes.legend(fontsize=7, frameon=False)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png")


def has_matplotlib() -> bool:
    """Whether the extra is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _literal(text: str) -> str:
    """matplotlib takes what stands between dollars for a formula, and a leading underscore for a wish to hide it."""
    return text.replace("$", r"\$").lstrip("_")
