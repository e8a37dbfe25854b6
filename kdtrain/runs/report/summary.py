"""What became of a run, in three sentences, and what to look at. Text in `backticks` is set as code."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kdtrain.config.diagnose import clean
from kdtrain.losses.kinds import WITH_BETA
from kdtrain.runs.report.charts import number
from kdtrain.runs.report.curves import points_of
from kdtrain.runs.report.record import Record, RunRecord, is_number

_TERMS = ("grad_norm_llm_kd", "grad_norm_sft", "grad_norm_vision_kd", "grad_norm_hidden_kd")
_LEAST_SHARE = 0.05
_LONGEST_MESSAGE = 600


@dataclass(frozen=True)
class Summary:
    """Of one run."""

    sentences: list[str]
    """What happened; what the student has learnt; whether it was worth it."""
    word: str
    """BEATS, NO BETTER, INCONCLUSIVE, or empty."""
    notes: list[str]
    """What to look at."""


def subtitle(run: RunRecord) -> str:
    """Who is taught by whom, by which loss."""
    student = _model(run.option("model.model"))
    weight, alpha = run.option("rlhf.llm_kd_weight"), run.option("rlhf.sft_alpha")
    features = [name for name in ("visual_kd", "hidden_kd") if run.option(f"custom.{name}.enabled")]
    if weight == 0 and not features:
        return f"{student}, without a teacher"
    backend = run.option("rlhf.teacher.backend") or "hf"
    teacher = {"self": "itself", "cache": "a cache"}.get(backend) or _model(
        run.option("rlhf.teacher_model") or run.option("rlhf.teacher.model")
    )
    if isinstance(several := run.option("rlhf.teachers"), dict):
        teacher = f"{'the mean of ' if run.option('rlhf.mix') else ''}{', '.join(map(str, several))}"
    parts = [f"{student}, taught by {teacher}"]
    if weight != 0:
        crossing = run.option("rlhf.cross_tokenizer")
        parts.append(clean(crossing) if crossing else _loss(run.option("rlhf.divergence"), run.option("rlhf.beta")))
    parts += [{"visual_kd": "visual features", "hidden_kd": "hidden states"}[name] for name in features]
    if alpha:
        parts.append(f"cross-entropy × {alpha}")
    if lmbda := run.option("rlhf.lmbda"):
        parts.append(f"{lmbda:.0%} on-policy" if is_number(lmbda) else "on-policy")
    return ", ".join(parts)


def _loss(divergence: object, beta: object) -> str:
    if divergence in WITH_BETA and beta in (0, 1):
        return "reverse KL" if beta else "forward KL"
    return clean(f"{divergence} at β {beta:g}" if divergence in WITH_BETA and is_number(beta) else str(divergence))


def _model(name: object) -> str:
    """A folder by its name, a hub's id as it is."""
    if not isinstance(name, str):
        return "a model"
    return clean(name.rstrip("/").split("/")[-1] if name.startswith("/") else name)


def summary(run: RunRecord) -> Summary:
    """The sentences of a run."""
    word = str(run.evaluation.get("verdict") or "")
    return Summary([_what_happened(run), _what_was_learnt(run), _worth_it(run)], word, list(_notes(run)))


# ---- what happened ---------------------------------------------------------------------------------------------------


def _what_happened(run: RunRecord) -> str:
    step, planned = run.step, run.planned_steps
    of = f"step {step:,}" + (f" of {planned:,}" if planned else "") if step else "before its first record"
    message = clean(str(run.status.get("message") or ""))
    if len(message) > _LONGEST_MESSAGE:
        message = message[:_LONGEST_MESSAGE] + "…"
    match run.state:
        case "finished":
            steps = f"{step:,} {'step' if step == 1 else 'steps'}" if step else "its steps"
            return f"The run has finished {steps}{_in_time(run)}."
        case "running":
            left = _newest(run, "remaining_s")
            until = f", about {duration(left)} left" if left is not None else ""
            return f"The run has not ended: it is at {of}{until}."
        case "died":
            return (
                f"The run was killed at {of}; `{command('fit', run)} --resume auto` goes on from its last checkpoint."
            )
        case "stopped":
            return message or f"The run was stopped at {of}."
        case "failed":
            return f"The run failed at {of}: {message or 'no message was left.'}"
    return f"How the run ended is not known, for it left no status; its last record is of {of}."


def _in_time(run: RunRecord) -> str:
    elapsed = _newest(run, "elapsed_s")
    return "" if elapsed is None else f" in {duration(elapsed)}"


def _newest(run: RunRecord, key: str) -> float | None:
    return next((record[key] for record in reversed(run.training) if is_number(record.get(key))), None)


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if n]
    return " ".join(parts[:2]) or "0 s"


# ---- what was learnt -------------------------------------------------------------------------------------------------


def figure(run: RunRecord, model: str, name: str) -> float | None:
    """A figure of `evaluation.json`."""
    models = run.evaluation.get("models")
    figures = models.get(model) if isinstance(models, dict) else None
    value = figures.get(name) if isinstance(figures, dict) else None
    return float(value) if is_number(value) else None


def _what_was_learnt(run: RunRecord) -> str:
    before, after = figure(run, "before", "ce"), figure(run, "after", "ce")
    if before is None or after is None:
        return _from_the_log(run)
    fell = "fell" if after < before else "rose" if after > before else "stayed"
    rows = run.evaluation.get("rows")
    where = f"On {rows:,} held-out rows" if isinstance(rows, int) else "On held-out rows"
    checkpoint = run.evaluation.get("checkpoint")
    whose = f"the cross-entropy of {clean(str(checkpoint))}" if checkpoint else "the student's cross-entropy"
    what = f"{where} {whose} {fell} from {before:.3f} to {after:.3f} nats per token"
    teacher, closed = figure(run, "teacher", "ce"), run.evaluation.get("gap_closed")
    if teacher is not None and figure(run, "teacher", "agreement") is None:  # only with tokens of its own
        share = f", and {closed:.1%} of the gap to it is closed" if is_number(closed) else ""
        return f"{what}; the teacher's tokens are others{share}, in nats per byte."
    if is_number(closed) and teacher is not None:
        interval = between(_interval(run, "gap_closed"), ".1%")
        return f"{what}; the teacher's is {teacher:.3f}, so {closed:.1%} of the gap is closed{interval}."
    if teacher is not None:
        return f"{what}; the teacher's is {teacher:.3f}, which is no better than the student's was."
    kl_before, kl_after = figure(run, "before", "forward_kl"), figure(run, "after", "forward_kl")
    if kl_before is not None and kl_after is not None:
        return f"{what}; its KL from the teacher went from {kl_before:.3f} to {kl_after:.3f}."
    return f"{what}."


def _from_the_log(run: RunRecord) -> str:
    for records, key, whose in ((run.evaluations, "eval_loss", "Evaluation"), (run.training, "loss", "Training")):
        points = [(step, value) for step, value in points_of(records, key) if value is not None]
        if len(points) > 1:
            (first, start), (last, end) = points[0], points[-1]
            went = "fell" if end < start else "rose"
            return (
                f"{whose} loss {went} from {number(start)} at step {first:,.0f} to {number(end)} at step {last:,.0f}."
            )
    return "There are too few records to say what the student has learnt."


# ---- whether it was worth it -----------------------------------------------------------------------------------------


def _worth_it(run: RunRecord) -> str:
    if not run.evaluation:
        return _how_to_evaluate(run)
    against = run.evaluation.get("against")
    word = run.evaluation.get("verdict")
    if not isinstance(against, dict) or not word or not is_number(against.get("difference")):
        return (
            f"It was not compared with another run: `{command('evaluate', run)} --against OTHER_RUN` says whether it "
            "is better, for example than one with cross-entropy alone."
        )
    difference, other = against["difference"], compared_with(run)
    unit = clean(str(against.get("unit") or "nats per token"))
    how = f"its cross-entropy is {abs(difference):.3f} {unit} {'lower' if difference < 0 else 'higher'}"
    interval = _of_difference(_interval(run, "difference"))
    rows = f" on {against['rows']:,} rows" if isinstance(against.get("rows"), int) else ""
    method = f" ({clean(str(against['method']))})" if against.get("method") else ""
    return f"Against {other}: {how}{interval}{rows}{method}."


def _of_difference(interval: Sequence[float] | None) -> str:
    """Without signs where both ends say the same, lower or higher, as the sentence does."""
    if interval is None or interval[0] * interval[1] > 0:
        return between(interval and sorted(map(abs, interval)), ".3f")
    return between(interval, "+.3f").replace("interval ", "interval of the difference ").replace("-", "−")


def compared_with(run: RunRecord) -> str:
    """The other run, in short."""
    against = run.evaluation.get("against")
    pairs = against.get("pairs") if isinstance(against, dict) else None
    return _other(pairs if isinstance(pairs, list) else [])


def _other(pairs: Sequence[Any]) -> str:
    named = [clean(str(pair["against"])).rstrip("/").split("/")[-1] for pair in pairs if isinstance(pair, dict)]
    return "another run" if not named else named[0] if len(named) == 1 else f"{len(named)} runs ({', '.join(named)})"


def _how_to_evaluate(run: RunRecord) -> str:
    rows = "" if run.option("data.eval") else " data.eval=eval.jsonl"
    if run.state in ("finished", "unknown"):
        return (
            f"Whether it was worth it is not known yet: `{command('evaluate', run)}{rows}` compares the student with "
            "what it was before, and with its teacher, on held-out rows."
        )
    checkpoint = "" if run.state == "finished" else " --checkpoint STEP"
    return (
        f"It has no student to be evaluated yet; `{command('evaluate', run)}{checkpoint}{rows}` evaluates one of its "
        "checkpoints."
    )


def command(name: str, run: RunRecord) -> str:
    """A command about a run, as one types it."""
    return f"kdtrain {name} {shlex.quote(run.shown)}"


def _interval(run: RunRecord, name: str) -> Sequence[float] | None:
    intervals = run.evaluation.get("intervals")
    found = intervals.get(name) if isinstance(intervals, dict) else None
    return found if isinstance(found, list) and len(found) == 2 and all(map(is_number, found)) else None


def between(interval: Sequence[float] | None, form: str) -> str:
    """An interval in words, with the space before it; empty where there is none."""
    return "" if interval is None else f" (95% interval {interval[0]:{form}} to {interval[1]:{form}})"


# ---- what to look at -------------------------------------------------------------------------------------------------


def _notes(run: RunRecord) -> Iterator[str]:
    if not run.records:
        yield "`logging.jsonl` has no record yet: there is no curve to draw."
    if run.torn_lines:
        lines = "line of `logging.jsonl` is" if run.torn_lines == 1 else "lines of `logging.jsonl` are"
        yield f"{run.torn_lines} {lines} torn, as a process that is killed leaves the last one; left out here."
    if steps := [record["step"] for record in run.records if any(value is None for value in record.values())]:
        yield f"Some values are no finite numbers, first at step {steps[0]:,}: they are gaps in the curves."
    yield from _best_note(run)
    yield from _gradient_notes(run)
    yield from _sample_notes(run)


def _best_note(run: RunRecord) -> Iterator[str]:
    """Where the last evaluation is clearly not the best one."""
    best = run.status.get("best")
    if isinstance(best, dict) and is_number(best.get("value")) and isinstance(best.get("step"), int):
        if best["step"] == run.step:
            return
        yield f"The best step by `{clean(str(best.get('metric')))}` was {best['step']:,}, with {number(best['value'])}."
        return
    points = [(value, step) for step, value in points_of(run.evaluations, "eval_loss") if value is not None]
    if len(points) > 2 and points[-1][0] > min(points)[0] * 1.02:
        lowest, step = min(points)
        yield (
            f"The lowest evaluation loss was {number(lowest)}, at step {step:,.0f}; at the end it is "
            f"{number(points[-1][0])}. `training.load_best_model_at_end` keeps the best."
        )


def _gradient_notes(run: RunRecord) -> Iterator[str]:
    norms = {name: value for name in _TERMS if (value := _last_of(run.records, name)) is not None}
    total = sum(norms.values())
    for name, value in norms.items():
        if len(norms) > 1 and total > 0 and value < _LEAST_SHARE * total:
            yield (
                f"`{name}` is {value / total:.1%} of the gradients of all terms: this term hardly moves the student. "
                "Raise its weight, or leave it out."
            )


def _sample_notes(run: RunRecord) -> Iterator[str]:
    repetition, cut = _last_of(run.training, "repetition"), _last_of(run.training, "cut_fraction")
    if repetition is not None and repetition > 0.5:
        yield f"The student's answers repeat themselves (`repetition` {repetition:.2f}): look at them below."
    if cut is not None and cut > 0.9:
        yield f"{cut:.0%} of the student's answers were cut at `rlhf.max_new_tokens`."


def _last_of(records: Sequence[Record], key: str) -> float | None:
    return next((float(record[key]) for record in reversed(records) if is_number(record.get(key))), None)
