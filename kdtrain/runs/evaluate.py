"""`kdtrain evaluate`: a student before and after training, its teacher, and other runs, on the evaluation's rows.

    runs -> the rows of data.eval -> the teacher -> before, after and others, one at a time beside it -> verdict

Figures are over all rows of `data.eval`; the verdict leaves out those that a run compared has been trained on. Nothing
here prints: an `EvaluationReporter` does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdtrain.config import RunConfig
from kdtrain.config.model_folder import read_map
from kdtrain.disk import writing
from kdtrain.errors import ConfigError
from kdtrain.ranks import is_main
from kdtrain.runs.against import Against, check_pairs, counted_rows, verdict_against
from kdtrain.runs.bench import Bench
from kdtrain.runs.compared import Compared, EvaluationReporter
from kdtrain.runs.folder import EVALUATION, REPORT, write_atomically
from kdtrain.runs.internalised import Internalised, internalised
from kdtrain.runs.intervals import intervals as intervals_of
from kdtrain.runs.nonfinite import nonfinite_kept
from kdtrain.runs.open_run import TrainedRun
from kdtrain.runs.reliance import visual_reliance
from kdtrain.runs.report.of_fit import renew_report
from kdtrain.runs.samples import Sample
from kdtrain.runs.tasks import Metrics, Tasks
from kdtrain.runs.verdict import LEVEL, gap_closed, gap_interval
from kdtrain.trainer.figures import ModelFigures, RowSums

logger = logging.getLogger(__name__)

_IN_GAP = ("before", "after", "teacher")

# What trains a model in several pieces; here it is whole.
_OF_TRAINING = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "torch_compile")


@dataclass(frozen=True)
class Evaluated:
    """What was found."""

    run: TrainedRun
    rows: int
    models: dict[str, ModelFigures | None]
    """`before`, `after`, `teacher` (None without one), and `against` where there is another run."""
    gap_closed: float | None
    internalised: Internalised | None
    """Where the teacher reads something that the student does not."""
    intervals: dict[str, Any]
    """Of `difference`, `gap_closed` and `internalised`; and as `models` those of each model's figures."""
    against: Against | None
    samples: list[Sample]
    tasks: dict[str, dict[str, Metrics]]
    """Of lm-eval, by model and task; empty where none were asked for."""
    other_tokens: list[str]
    """Models with another tokenizer than the student, of which only nats per byte can be compared."""

    def to_dict(self) -> dict[str, Any]:
        """What `evaluation.json` holds."""
        against = self.against
        return {
            "run": str(self.run.folder.resolve()),
            "checkpoint": self.run.checkpoint,
            "rows": self.rows,
            "models": {name: found and found.to_dict() for name, found in self.models.items()},
            "gap_closed": self.gap_closed,
            "internalised": self.internalised and self.internalised.share,
            "verdict": against and against.verdict.word,
            "intervals": {"level": LEVEL, **self.intervals},
            "context": self.internalised and self.internalised.to_dict(),
            "against": against
            and {
                "difference": against.verdict.difference,
                "unit": f"nats per {against.unit}",
                "method": against.verdict.method,
                "rows": against.rows,
                "repeated_in_train": against.repeated_in_train,
                "pairs": against.pairs,
            },
            "samples": [vars(sample) for sample in self.samples],
            "tasks": self.tasks or None,
        }


def evaluate(
    runs: Sequence[TrainedRun],
    others: Sequence[TrainedRun],
    reporter: EvaluationReporter,
    tasks: Tasks | None = None,
) -> Evaluated:
    """Evaluate the first run's student, and compare all runs with as many others; `evaluation.json` of the first.

    Args:
        runs: the first one's config says what is evaluated: the rows, the student before training, the teacher. More
            than one are repetitions with other seeds.
        others: of each the run that it is compared with, in the same order; or empty.
        tasks: of lm-eval, which the models of the first run are put to as well.

    Raises:
        ConfigError: there is no `data.eval`, or runs do not pair up.
        CheckpointError: the result cannot be written.
    """
    check_pairs(runs, others)
    run = runs[0]
    config = _for_evaluation(run)
    with ExitStack() as at_the_end:
        at_the_end.callback(reporter.close)
        at_the_end.enter_context(nonfinite_kept(run.folder, config, trains=False))
        if tasks is not None:
            tasks.load()
        bench = Bench(config, reporter, at_the_end, tasks)
        counted = counted_rows(bench, [*runs, *others]) if others else None
        found = bench.compared(run, others[:1])
        pairs = [(found.rows["after"], found.rows["against"])] if others else []
        for one, other in zip(runs[1:], others[1:], strict=True):
            pairs.append((bench.alone(one), bench.alone(other)))
        per_byte = bench.other_tokens  # of a run
        result = _result(run, found, bench)
        if counted is not None:
            against = verdict_against(runs, others, pairs, counted, bench.text_bytes if per_byte else None)
            intervals = {**result.intervals, "difference": against.verdict.interval}
            result = replace(result, intervals=intervals, against=against)
    _write(run.folder / EVALUATION, result.to_dict())
    if is_main() and (run.folder / REPORT).is_file():
        renew_report(run.folder)  # which said that nothing was evaluated
    return result


def _for_evaluation(run: TrainedRun) -> RunConfig:
    """The config of a run without what only training needs."""
    config = run.config
    if config.data.eval is None:
        raise ConfigError(
            f"There is nothing to evaluate on: data.eval of {run.name} is not set. Name rows that the run has not been "
            f"trained on, for example: kdtrain evaluate {run.name} data.eval=eval.jsonl"
        )
    training = {name: value for name, value in config.training.items() if name not in _OF_TRAINING}
    return _in_own_tokens(config.model_copy(update={"training": training}))


def _in_own_tokens(config: RunConfig) -> RunConfig:
    """A teacher with another tokenizer is measured in its own tokens, see `InOwnTokens`; not on a server or stored."""
    rlhf = config.rlhf
    if rlhf.cross_tokenizer is None:
        return config
    alone: dict[str, Any] = {"cross_tokenizer": None}
    if rlhf.teacher.is_served:
        logger.warning("The teacher is not measured: it has another tokenizer, and is on a server.")
        alone["llm_kd_weight"] = 0.0
    elif rlhf.teacher.backend == "cache":
        logger.warning(
            "The teacher is not measured: the cache has what it says of chunks of text, and of no token. "
            "rlhf.teacher.backend=hf measures the model itself."
        )
        alone["llm_kd_weight"] = 0.0
    return config.model_copy(update={"rlhf": rlhf.model_copy(update=alone)})


# ---- what is made of it ----------------------------------------------------------------------------------------------


def _result(run: TrainedRun, compared: Compared, bench: Bench) -> Evaluated:
    teacher, other_teacher = bench.teacher_sums, bench.other_teacher
    found, prompted = compared.rows, compared.prompted
    answered = None if teacher is None else teacher.column("tokens").sum()
    # A teacher that does not answer for all tokens has no sum over the text.
    part = {"teacher"} if not other_teacher and answered != found["before"].column("tokens").sum() else set()
    sums = found if teacher is None else {**found, "teacher": teacher}
    own, of_models = dict[str, ModelFigures](), dict[str, Any]()
    for name, of_model in sums.items():
        right, blanked = compared.right.get(name), compared.blanked.get(name)
        reliance, of_reliance = (
            (None, None) if blanked is None else visual_reliance(of_model, blanked, compared.image_rows)
        )
        own[name] = replace(
            of_model.figures(),
            nats_per_byte=None if name in part else _per_byte(of_model, bench.text_bytes),
            accuracy=_share(right),
            visual_reliance=reliance,
        )
        of_models[name] = intervals_of(of_model, own[name], right)
        if reliance is not None:
            of_models[name]["visual_reliance"] = of_reliance
    models: dict[str, ModelFigures | None] = {**own}
    if teacher is not None and not other_teacher:
        models["teacher"] = own["teacher"].as_own_teacher()
    models.setdefault("teacher", None)
    unit = "nats_per_byte" if other_teacher else "ce"
    before, after, of_teacher = (getattr(models[name], unit, None) for name in _IN_GAP)
    closed = None if part else gap_closed(before, after, of_teacher)
    interval = None
    if closed is not None and teacher is not None:
        interval = gap_interval(*(one.column("ce") for one in (found["before"], found["after"], teacher)))
    learnt = internalised(prompted["before"], prompted["after"]) if prompted else None
    of_learnt = None if learnt is None else learnt.interval
    found_intervals = {"difference": None, "gap_closed": interval, "internalised": of_learnt, "models": of_models}
    rows = len(found["after"].by_row)
    others = ["against"] * bench.other_tokens + ["teacher"] * other_teacher
    shown = (compared.samples, compared.tasks, others)
    return Evaluated(run, rows, models, closed, learnt, found_intervals, None, *shown)


def _per_byte(sums: RowSums, text_bytes: np.ndarray) -> float | None:
    known = sums.column("ce_known").sum() == sums.column("labelled").sum() > 0
    return float(sums.column("ce").sum() / text_bytes.sum()) if known and text_bytes.sum() else None


def _share(right: np.ndarray | None) -> float | None:
    return None if right is None else float(right.mean())


def _write(path: Path, found: Mapping[str, Any]) -> None:
    """On rank 0, in one move."""
    if not is_main():
        return
    before = read_map(path)
    if before and before.get("checkpoint") != found["checkpoint"]:
        of = [one.get("checkpoint") or "the saved model" for one in (before, found)]
        logger.warning("%s had the figures of %s, and has those of %s now.", path, *of)
    with writing(path):
        write_atomically(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
