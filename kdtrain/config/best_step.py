"""Evaluating, saving and the best step: what does not fit together, found before torch is imported.

Upstream finds some of it too, in the words of its own command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from kdtrain.config.hidden_kd import HIDDEN_TERM
from kdtrain.config.schema import RunConfig
from kdtrain.config.training_fields import choice
from kdtrain.config.tree import Problem, Written

DEFAULT_STEPS = {"save_steps": 500, "logging_steps": 10}
"""Of trl's GKDConfig; where `eval_steps` is not given, `logging_steps` is taken."""
_HIGHER_IS_BETTER = ("token_accuracy", "teacher_agreement")


def best_step(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A best step that is never evaluated, never saved, or judged by what no evaluation has."""
    training = config.training
    evaluates = training.get("eval_strategy", "no")
    if evaluates == "no":
        return  # another rule says so
    if training.get("load_best_model_at_end") and training.get("save_strategy", "steps") != "best":
        yield from _saved_where_evaluated(training, evaluates)
    name = training.get("metric_for_best_model")
    if isinstance(name, str):
        yield from _metric(config, name)


def _saved_where_evaluated(training: Mapping[str, Any], evaluates: str) -> Iterator[Problem]:
    saves = training.get("save_strategy", "steps")
    path = ("training", "load_best_model_at_end")
    if saves != evaluates:
        message = f"the best step must have been saved: eval_strategy is {evaluates}, and save_strategy {saves}"
        yield Problem(path, message, f"set training.save_strategy: {evaluates}")
        return
    evaluation, saving = _steps(training, "eval_steps"), _steps(training, "save_steps")
    if evaluates != "steps" or saving is None or evaluation is None or _is_multiple(saving, evaluation):
        return
    where = next((name for name in ("save_steps", "eval_steps", "logging_steps") if name in training), path[1])
    message = (
        f"every saved step must be evaluated, for the best is chosen among them (load_best_model_at_end): save_steps "
        f"{saving:g} is no multiple of eval_steps {evaluation:g}"
    )
    nearest = max(1, round(saving / evaluation)) * evaluation
    yield Problem(("training", where), message, f"set training.save_steps: {nearest:g}", on_key=where == path[1])


def _steps(training: Mapping[str, Any], name: str) -> float | None:
    """An interval in steps, or as a share of all steps; None where it is neither."""
    value = training.get(name) or (training.get("logging_steps") if name == "eval_steps" else None)
    value = value or DEFAULT_STEPS["logging_steps" if name == "eval_steps" else name]
    return value if isinstance(value, int | float) and value > 0 else None


def _is_multiple(saving: float, evaluation: float) -> bool:
    if (saving < 1) != (evaluation < 1):
        return False  # one is a share of all steps, whose number is not known here
    return (Fraction(str(saving)) / Fraction(str(evaluation))).denominator == 1


def _metric(config: RunConfig, name: str) -> Iterator[Problem]:
    bare, present = name.removeprefix("eval_"), list(_present(config))
    if bare not in present:
        message, hint = choice(name, [f"eval_{one}" for one in present if one != "aux_loss"], "metric_for_best_model")
        yield Problem(("training", "metric_for_best_model"), f"cannot choose the best step: {message}", hint)
        return
    asked, higher = config.training.get("greater_is_better"), bare in _HIGHER_IS_BETTER
    if asked is not None and asked is not higher:
        message = f"{str(asked).lower()} would keep the worst step: of {bare} {'more' if higher else 'less'} is better"
        yield Problem(("training", "greater_is_better"), message, "remove the option")


def _present(config: RunConfig) -> Iterator[str]:
    """Metrics with a direction that the evaluations can have, as `trainer/best_metric.py` counts them."""
    options = config.options if config.rlhf.eval_kd else config.options.without_kd()
    yield from ("loss", "token_accuracy")
    if options.lm_kd_active:
        yield from ("llm_kd_loss", "teacher_agreement")
    if options.ce_weight > 0:
        yield "sft_loss"
    if options.visual_kd is not None:
        yield from ("vision_kd_loss", *(f"vision_kd_loss_{target}" for target in options.visual_kd.targets))
    if options.hidden_kd is not None:
        yield from (HIDDEN_TERM, *options.hidden_kd.names)
    yield "aux_loss"  # of a mixture of experts, which shows when it is loaded
