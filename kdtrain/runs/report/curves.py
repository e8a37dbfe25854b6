"""Which curves are drawn of the records of a run, or of several, and how they are thinned for a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdtrain.runs.report.record import Record, RunRecord, is_number

MOST_POINTS = 240
"""Of a curve, about: more than a screen can show."""
_SMOOTHED_FROM = 120
"""Curves with more points get a moving mean beside them."""

FROM_ZERO = {
    "learning_rate",
    "tokens_per_second",
    "step_time_s",
    "peak_memory_gib",
    "completion_length",
    "cut_fraction",
}
"""Keys of which a part says nothing: half as high must look half as high."""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Wanted:
    """A curve of a chart: a key of the log, what it is called, its colour."""

    key: str
    label: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """A chart of a single run."""

    title: str
    unit: str
    curves: tuple[Wanted, ...]

    @property
    def from_zero(self) -> bool:
        """Whether its axis begins at 0."""
        return any(curve.key in FROM_ZERO for curve in self.curves)


def _panel(title: str, unit: str, *curves: str) -> Panel:
    """Curves as `key label colour`; the label may have spaces."""
    return Panel(title, unit, tuple(_wanted(curve) for curve in curves))


def _wanted(text: str) -> Wanted:
    key, *label, colour = text.split(" ")
    return Wanted(key, " ".join(label) or key, colour)


# Colours by meaning, the same in all charts: see style.css.
PANELS = (
    _panel(
        "Loss and its terms",
        "as weighted in the total",
        "loss ink",
        "llm_kd_loss blue",
        "sft_loss red",
        "vision_kd_loss green",
        "hidden_kd_loss sky",
        "aux_loss purple",
    ),
    _panel(
        "Evaluation loss and its terms",
        "as weighted in the total",
        "eval_loss ink",
        "eval_llm_kd_loss blue",
        "eval_sft_loss red",
        "eval_vision_kd_loss green",
        "eval_hidden_kd_loss sky",
        "eval_aux_loss purple",
    ),
    _panel(
        "Terms by whose answers they are on",
        "as weighted in the total",
        "llm_kd_loss_on_policy blue",
        "llm_kd_loss_off_policy sky",
        "sft_loss_off_policy red",
    ),
    _panel(
        "Visual targets",
        "as weighted in the total",
        "vision_kd_loss_vit blue",
        "vision_kd_loss_aligner red",
        "vision_kd_loss_deepstack green",
    ),
    _panel(
        "Visual targets, evaluation",
        "as weighted in the total",
        "eval_vision_kd_loss_vit blue",
        "eval_vision_kd_loss_aligner red",
        "eval_vision_kd_loss_deepstack green",
    ),
    _panel(
        "Gradient of each term",
        "L2 norm at the last hidden states",
        "grad_norm_llm_kd blue",
        "grad_norm_sft red",
        "grad_norm_vision_kd green",
        "grad_norm_hidden_kd sky",
    ),
    _panel("Gradient norm", "of all weights, before clipping", "grad_norm ink"),
    _panel(
        "Agreement with the teacher",
        "share of tokens with the same top-1",
        "teacher_agreement training blue",
        "eval_teacher_agreement evaluation red",
    ),
    _panel(
        "Entropy",
        "nats per token",
        "student_entropy student blue",
        "teacher_entropy teacher red",
    ),
    _panel(
        "Token accuracy",
        "share of tokens that are the top-1",
        "token_accuracy training blue",
        "eval_token_accuracy evaluation red",
    ),
    _panel("Length of the student's answers", "tokens", "completion_length blue"),
    _panel(
        "The student's answers",
        "shares",
        "cut_fraction cut blue",
        "repetition red",
        "selected_fraction selected green",
    ),
    _panel("Learning rate", "", "learning_rate ink"),
    _panel(
        "Throughput",
        "tokens per second",
        "tokens_per_second all but padding ink",
        "supervised_tokens_per_second supervised blue",
    ),
    _panel("Waiting for the teacher", "share of the time", "teacher_wait_fraction ink"),
    _panel("Step time", "seconds", "step_time_s ink"),
    _panel("Peak memory", "GiB, largest of all processes", "peak_memory_gib ink"),
)
# Of each run one curve, where several runs are compared. The total is not among them: it depends on the weights.
COMPARED = (
    ("eval_sft_loss", "Cross-entropy, evaluation", "times its weight"),
    ("eval_llm_kd_loss", "Divergence, evaluation", "times its weight; not comparable over β"),
    ("eval_teacher_agreement", "Agreement with the teacher, evaluation", "share of tokens"),
    ("eval_token_accuracy", "Token accuracy, evaluation", "share of tokens"),
    ("eval_student_entropy", "Entropy of the student, evaluation", "nats per token"),
    ("loss", "Training loss", "not comparable over β and weights"),
    ("llm_kd_loss", "Divergence, training", "times its weight; not comparable over β"),
    ("sft_loss", "Cross-entropy, training", "times its weight"),
    ("vision_kd_loss", "Visual term, training", "times its weight"),
    ("hidden_kd_loss", "Hidden states, training", "times its weight"),
    ("teacher_agreement", "Agreement with the teacher, training", "share of tokens"),
    ("token_accuracy", "Token accuracy, training", "share of tokens"),
    ("student_entropy", "Entropy of the student, training", "nats per token"),
    ("completion_length", "Length of the student's answers", "tokens"),
    ("cut_fraction", "Answers that were cut", "share"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("learning_rate", "Learning rate", ""),
    ("tokens_per_second", "Throughput", "tokens per second"),
    ("peak_memory_gib", "Peak memory", "GiB"),
)
# Not drawn: they say where a record stands, or are no figures of the run itself.
_SKIPPED = {
    "step",
    "epoch",
    "elapsed_s",
    "remaining_s",
    "num_input_tokens_seen",
    "distinct_first_tokens",
    "early_stop_metric",
    "on_policy_fraction",
    "eval_student_entropy",
    "eval_teacher_entropy",
    "padding_fraction",
    "mfu",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_model_preparation_time",
}


def panels_of(run: RunRecord) -> list[Panel]:
    """The panels of what a run has logged, and one for each key that none of them knows."""
    logged = dict.fromkeys(key for record in run.records for key, value in record.items() if is_number(value))
    known = {curve.key for panel in PANELS for curve in panel.curves} | _SKIPPED
    own = [Panel(p.title, p.unit, _without_equal_total([c for c in p.curves if c.key in logged])) for p in PANELS]
    return [p for p in own if p.curves] + [_panel(key, "", f"{key} ink") for key in logged if key not in known]


def _without_equal_total(curves: Sequence[Wanted]) -> tuple[Wanted, ...]:
    """Without the loss where it has one term, which is drawn."""
    is_total = len(curves) == 2 and curves[0].key in ("loss", "eval_loss")
    return tuple(curves[1:] if is_total else curves)


def points_of(records: Iterable[Record], key: str) -> list[Point]:
    """Step and value of each record that has the key; None where the value was no finite number."""
    points = {}  # a step that was logged twice, as before and after a crash: the later one counts
    for record in records:
        if key in record:
            value = record[key]
            points[float(record["step"])] = float(value) if is_number(value) else None
    return sorted(points.items())


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many, about: of each stretch its lowest and its highest, so that no peak is lost, and every gap."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        numbers = sorted((value, step) for step, value in stretch if value is not None)
        steps = {numbers[0][1], numbers[-1][1]} if numbers else set()
        gap = next((step for step, value in stretch if value is None), None)
        kept += [point for point in stretch if point[0] in steps or point[0] == gap]
    return list(dict.fromkeys([*kept, points[-1]]))


def moving_mean(points: Sequence[Point]) -> list[Point]:
    """The mean of a fiftieth of the curve around each point; nothing of a curve of few points."""
    if len(points) < _SMOOTHED_FROM:
        return []
    half = max(len(points) // 100, 2)
    sums, counts = [0.0], [0]
    for _, value in points:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    found: list[Point] = []
    for i, (step, value) in enumerate(points):
        low, high = max(i - half, 0), min(i + half + 1, len(points))
        count = counts[high] - counts[low]
        found.append((step, None if value is None or not count else (sums[high] - sums[low]) / count))
    return found
