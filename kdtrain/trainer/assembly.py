"""What the trainer is put together of, once upstream's constructor has run: student, teacher, receiver, objective."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import forward_names
from kdtrain.feature_kd.images import first_batch_with_images
from kdtrain.feature_kd.term import VisualTerm
from kdtrain.generation.sampling import turn_ends
from kdtrain.models.experts import asks_for_router_logits, check_experts
from kdtrain.models.loss_head import add_loss_head, why_no_loss_head
from kdtrain.models.tuning import check_trained, disable_dropout
from kdtrain.models.vocabulary import Vocabulary, shared_vocabulary, vocabulary_size
from kdtrain.preflight.model_checks import both_sides, check_models
from kdtrain.preflight.positions import rows_of_a_run
from kdtrain.preflight.token_ids import check_rows, embedding_rows
from kdtrain.teachers import Teacher
from kdtrain.trainer.argument_checks import check_prompt_learning
from kdtrain.trainer.construction import Prepared, tokenizer_or_none
from kdtrain.trainer.objective import Objective, warn_of_logits
from kdtrain.trainer.window import Receiver

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


def finish_student(trainer: GKDTrainerWithMetrics, given: Prepared) -> None:
    """Do, or undo, what upstream's constructor leaves to be done with the student."""
    check_trained(trainer.model, trainer.args.device)
    if trainer.options.disable_dropout:
        disable_dropout(trainer.model)
    # Let its generation stop where its chat template ends a turn, here and after it is saved.
    own = getattr(trainer.model, "generation_config", None)
    if own is not None:
        stops = turn_ends(trainer.processing_class, own)
        own.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    given.restore_config(trainer.model)


def compared_vocabularies(trainer: GKDTrainerWithMetrics, teacher: Teacher, shared: int | None) -> Vocabulary:
    """The sizes of both models' logits and the range they share.

    Args:
        shared: that range, where the caller has compared the tokenizers.

    Raises:
        VocabularyError: they differ.
    """
    sizes = vocabulary_size(trainer.model), teacher.vocab_size
    if shared is None:
        name = getattr(getattr(teacher.module, "config", None), "_name_or_path", "")
        # Equal sizes do not mean equal vocabularies; but nothing is downloaded to find out.
        known = tokenizer_or_none(name) if sizes[0] != sizes[1] or os.path.isdir(name) else None
        shared = shared_vocabulary(*sizes, trainer._tokenizer, known)
    return Vocabulary(*sizes, shared)


def check_prompt_learning_of(trainer: GKDTrainerWithMetrics, options: DistillationOptions) -> None:
    """Refuse kinds of prompt learning that the options cannot be had with; see `check_prompt_learning`."""
    kd = options.lm_kd_active
    check_prompt_learning(trainer.model, "student", kd and options.lmbda > 0, trainer.aux_loss_enabled)
    if trainer.teacher_model is not None:
        check_prompt_learning(trainer.unwrap(trainer.teacher_model), "teacher", kd and options.seq_kd)


def build_receiver(trainer: GKDTrainerWithMetrics, train: Any, evaluation: Any) -> Receiver:
    """What takes in batches. Rows with ids that a model has no embedding for are refused here, or batch by batch.

    Args:
        train, evaluation: as the constructor got them.
    """
    models = {"student": trainer.model, "teacher": trainer.teacher_model}
    embeddings = {side: embedding_rows(model) for side, model in models.items() if model is not None}
    seen = [
        check_rows(data, name, embeddings)
        for name, data in (("data.train", train), ("data.eval", evaluation))
        if data is not None
    ]
    largest = max(trainer._tokenizer.get_vocab().values(), default=-1)  # some leave ids out
    ids_may_exceed = not all(seen) or largest >= min(embeddings.values())
    return Receiver(
        trainer.accelerator,
        forward_names(_base(trainer.model)),
        trainer.args.max_length,
        embeddings=embeddings if ids_may_exceed else None,
    )


def build_objective(trainer: GKDTrainerWithMetrics) -> tuple[Objective, bool, dict[str, int]]:
    """The loss, without the student's logits where that gives the same.

    Returns:
        The objective; whether its head is yet to be compared, in the first forward (under ZeRO-3 the model has to be
        wrapped for that); and the positions of each model that has a table of them.
    """
    router_logits = asks_for_router_logits(trainer.model, trainer.aux_loss_enabled)
    if router_logits:
        check_experts(trainer.model, trainer.args)
    base = _base(trainer.model)
    reason = why_no_loss_head(base)
    if reason is None:
        add_loss_head(base)
    else:
        warn_of_logits(reason)
    positions = _looked_at(trainer)  # before features are tried: what ends a run is said first
    objective = Objective(
        trainer.vocabulary,
        fused=reason is None,
        router_logits=router_logits,
        aux_weight=trainer.router_aux_loss_coef if router_logits else 0.0,
        visual=_visual_term(trainer),
    )
    return objective, reason is None and is_deepspeed_zero3_enabled(), positions


def _looked_at(trainer: GKDTrainerWithMetrics) -> dict[str, int]:
    """Warn of, or refuse, what a look at both models finds (see `model_checks.py`); the positions of each."""
    options = trainer.options
    teacher = trainer.unwrap(trainer.teacher_model)  # DeepSpeed's engine has a config of its own
    sides = both_sides(trainer.model, trainer.teacher, trainer.data_collator, teacher)
    chosen = [(trainer.model, options.lmbda > 0), (teacher, options.seq_kd)]
    generating = [model for model, is_chosen in chosen if is_chosen and options.lm_kd_active]
    collator, train = trainer.data_collator, trainer.train_dataset
    check_models(
        sides,
        rows_of_a_run(train, trainer.eval_dataset, trainer.args, collator, generates=bool(generating)),
        collator,
        train,
        generating=generating,
        in_pieces=trainer.in_pieces,
        autocast=trainer.compute_loss_context_manager,
    )
    return {side.name: side.look.positions for side in sides if side.look.positions is not None}


def _visual_term(trainer: GKDTrainerWithMetrics) -> VisualTerm | None:
    """Visual KD, tried on a row with images where there is one."""
    wanted = trainer.options.visual_kd
    if wanted is None:
        return None
    student, teacher = trainer.unwrap(trainer.model), trainer.unwrap(trainer.teacher_model)
    visual = VisualTerm(wanted, student, teacher, trainer.accelerator, trainer.args.seed)
    # In pieces, a model cannot be run before it is wrapped: what does not fit is found at the first step.
    if trainer.train_dataset is not None and not trainer.in_pieces:
        batch = first_batch_with_images(trainer.train_dataset, trainer.data_collator)
        if batch is not None:
            with trainer.compute_loss_context_manager():
                visual.probe(batch)
    return visual


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if is_peft_model(model) else model
