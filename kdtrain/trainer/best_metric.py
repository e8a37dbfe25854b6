"""Whether more or less of the metric that chooses the best step is better.

Upstream asks whether its name ends in "loss": it would keep the step with the largest `vision_kd_loss_aligner`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from transformers import EarlyStoppingCallback

from kdtrain.config.hidden_kd import HIDDEN_TERM
from kdtrain.data.with_images import first_batch_with_images
from kdtrain.errors import PreflightError
from kdtrain.trainer.metrics import HIGHER_IS_BETTER, TOKEN_METRICS

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

_SCHEDULERS_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# What every evaluation has and nobody wants to be small or large.
_NEITHER = {*TOKEN_METRICS, "runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time"}


def set_direction(trainer: GKDTrainerWithMetrics, asked: bool | None = None) -> None:
    """Set `greater_is_better`, and the mode of a scheduler that follows the metric, from `HIGHER_IS_BETTER`.

    A metric of the caller's own `compute_metrics` keeps upstream's.

    Args:
        asked: `greater_is_better` as the config has it; on the arguments it may be upstream's guess.
    """
    args = trainer.args
    name = _metric(trainer)
    if name is None:
        return
    bare = _without_prefix(name, trainer.eval_dataset)
    directions = HIGHER_IS_BETTER | dict.fromkeys(trainer.loss_terms, False)
    if bare not in directions and bare not in _NEITHER and trainer.compute_metrics is not None:
        return
    present = sorted(_present(trainer, bare))
    if bare not in present:
        why = "has no better and worse" if bare in _NEITHER else f"no evaluation has {bare!r}"
        raise PreflightError(f"training.metric_for_best_model: {name}: {why}. There are {', '.join(present)}.")
    higher = directions[bare]
    if asked is not None and asked is not higher:
        raise PreflightError(
            f"training.greater_is_better: {str(asked).lower()} would keep the worst step: of {bare} "
            f"{'more' if higher else 'less'} is better. Remove the option."
        )
    args.greater_is_better, mode = higher, "max" if higher else "min"
    if args.lr_scheduler_type in _SCHEDULERS_BY_METRIC:
        options = dict(args.lr_scheduler_kwargs or {})
        if options.setdefault("mode", mode) != mode:
            raise PreflightError(
                f"training.lr_scheduler_kwargs: mode {options['mode']} goes the wrong way for {bare}, which should be "
                f"{mode}. Remove it."
            )
        args.lr_scheduler_kwargs = options


def _metric(trainer: GKDTrainerWithMetrics) -> str | None:
    """The metric that steps will be compared by; None if nothing compares them."""
    name = trainer.args.metric_for_best_model
    evaluates = trainer.args.eval_strategy != "no"
    if trainer.best_step.patience is not None and not evaluates:
        raise PreflightError("training.early_stopping_patience needs evaluation: set training.eval_strategy: steps.")
    if any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks):
        if name is None:
            raise PreflightError("EarlyStoppingCallback needs training.metric_for_best_model, such as loss.")
        if not evaluates:
            raise PreflightError("EarlyStoppingCallback needs evaluation: set training.eval_strategy: steps.")
    return name if evaluates else None


def _without_prefix(name: str, evaluation: object) -> str:
    """`eval_chats_loss` as `loss`, where `chats` is one of several evaluation sets."""
    bare = name.removeprefix("eval_")
    sets = evaluation if isinstance(evaluation, Mapping) else {}
    return next((bare.removeprefix(f"{key}_") for key in sets if bare.startswith(f"{key}_")), bare)


def _present(trainer: GKDTrainerWithMetrics, wanted: str) -> Iterator[str]:
    """Metrics with a direction that this run's evaluations will have."""
    options = trainer.options if trainer.options.eval_kd else trainer.options.without_kd()
    yield from ("loss", "token_accuracy")
    if options.lm_kd_active:
        yield from ("llm_kd_loss", "teacher_agreement")
    if options.ce_weight > 0:
        yield "sft_loss"
    if trainer.has_aux_loss:
        yield "aux_loss"
    if options.visual_kd is not None and (not wanted.startswith("vision_kd_loss") or _has_images(trainer)):
        yield from ("vision_kd_loss", *(f"vision_kd_loss_{target}" for target in options.visual_kd.targets))
    if options.hidden_kd is not None:
        yield from (HIDDEN_TERM, *options.hidden_kd.names)


def _has_images(trainer: GKDTrainerWithMetrics) -> bool:
    sets = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, Mapping) else [trainer.eval_dataset]
    return all(first_batch_with_images(one, trainer.data_collator) is not None for one in sets)
