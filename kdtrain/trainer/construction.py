"""What a trainer is given, loaded and brought into the form that upstream's constructor takes."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.experimental.gkd import GKDConfig

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.data.collate import Collator
from kdtrain.errors import ConfigError, PreflightError
from kdtrain.models.experts import restore_router_settings, router_settings
from kdtrain.models.loading import load_with_adapter
from kdtrain.models.processing import load_processing, load_tokenizer
from kdtrain.models.tuning import fit_student
from kdtrain.teachers import LocalTeacher, Teacher, build_teacher
from kdtrain.trainer.argument_checks import (
    check_config_is_followed,
    check_data_options,
    check_parts_are_frozen,
    check_teacher_arguments,
    check_teacher_is_another_model,
)
from kdtrain.trainer.arguments import check_fields, check_supervision
from kdtrain.trainer.given_rows import as_rows

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


@contextmanager
def adapters_on_the_head() -> Iterator[None]:
    """Let SFTTrainer's constructor accept an adapter on `lm_head`.

    It refuses one because its own loss reads the weight of the head past it. Ours goes through the module there.
    """
    from trl.trainer import sft_trainer

    refused, sft_trainer.BaseTunerLayer = sft_trainer.BaseTunerLayer, ()
    try:
        yield
    finally:
        sft_trainer.BaseTunerLayer = refused


@dataclass
class Prepared:
    """What a trainer is built from, checked."""

    student: nn.Module
    teacher: Teacher | None
    """None where no term needs one, whatever was passed."""
    train: Any
    """Rows that can be indexed."""
    evaluation: Any
    """The same, a dict of them, or None."""
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    peft_config: PeftConfig | None
    use_cache: bool | None
    """What the student's config said before upstream's constructor changes it, as the next one."""
    router_settings: dict[str, Any]

    def restore_config(self, student: Any) -> None:
        """Write back what upstream's constructor sets for good, and so in what is saved as well."""
        if self.use_cache is not None:
            student.config.use_cache = self.use_cache
        restore_router_settings(student, self.router_settings)


def prepare(
    args: GKDConfig,
    options: DistillationOptions,
    *,
    model: nn.Module | str,
    teacher_model: nn.Module | str | None,
    teacher: Teacher | None,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    peft_config: PeftConfig | None,
    has_collator: bool,
    formatting_func: Callable[[Any], Any] | None,
) -> Prepared:
    """Check what the constructor was given, cheapest first, and load what it was given by name.

    Raises:
        KdtrainError, ValueError: see the checks.
    """
    check_fields(args, own_collator=not has_collator)
    check_data_options(args)
    check_config_is_followed(args, model, peft_config)
    if teacher_model is None and teacher is None and options.needs_teacher:
        teacher_model = args.teacher_model_name_or_path
    check_teacher_arguments(teacher_model, teacher, args, options)
    check_teacher_is_another_model(model, teacher_model if teacher is None else teacher.module)
    train, evaluation = as_rows("train_dataset", train_dataset), as_rows("eval_dataset", eval_dataset)
    if not has_collator:
        check_supervision(args, train[0], formatted=formatting_func is not None)
    elif formatting_func is not None:
        raise ConfigError("formatting_func and data_collator: the collator gets the rows as they are; format there.")
    if processing_class is None:
        processing_class = processing_of(model, args)
    if options.needs_teacher and teacher is None:
        # Before the student is touched: a missing teacher should not cost the loading of a model.
        teacher = local_teacher(teacher_model, args)
    if isinstance(model, str):
        model = load_student(model, args, trained_in_full=peft_config is None)
    elif args.model_init_kwargs is not None:
        raise ConfigError("model_init_kwargs would be ignored: the model is loaded already. Remove them.")
    check_parts_are_frozen(args, model)
    set_arguments(args, visual_kd=options.visual_kd is not None)
    use_cache, router = getattr(getattr(model, "config", None), "use_cache", None), router_settings(model)
    peft_config = fit_student(model, peft_config, args)
    teacher = teacher if options.needs_teacher else None
    return Prepared(model, teacher, train, evaluation, processing_class, peft_config, use_cache, router)


def set_arguments(args: GKDConfig, *, visual_kd: bool) -> None:
    """Set what the trainer's promises rest on, whatever the arguments say."""
    args.remove_unused_columns = False  # the collator reads columns that no forward takes
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    args.logging_nan_inf_filter = False  # it shows a NaN run as loss 0.0
    hide_token(args)
    if visual_kd and args.ddp_find_unused_parameters is None:
        # A rank whose batch has no image leaves its vision path without a gradient; the others would wait for it.
        args.ddp_find_unused_parameters = True


def hide_token(args: GKDConfig) -> None:
    """Move a hub token out of the arguments, which upstream pickles beside every checkpoint and pushes to the hub."""
    if args.hub_token is not None:
        os.environ.setdefault("HF_TOKEN", args.hub_token)
        args.hub_token = None


def load_student(name: str, args: GKDConfig, trained_in_full: bool) -> nn.Module:
    """The student that a name stands for, loaded with `args.model_init_kwargs`; an adapter's folder is trained on."""
    kwargs = dict(args.model_init_kwargs or {})
    return load_with_adapter(
        name,
        trained=True,
        dtype=str(kwargs.pop("dtype", None) or "auto").removeprefix("torch."),
        trained_in_full=trained_in_full,
        device=args.device,
        trust_remote_code=kwargs.pop("trust_remote_code", args.trust_remote_code),
        revision=kwargs.pop("revision", None),
        init_kwargs=kwargs,
    )


def processing_of(model: nn.Module | str, args: GKDConfig) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer or processor of a model, by its name.

    Raises:
        ConfigError: the model has no name.
        PreflightError: nothing is saved under it.
    """
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ConfigError("processing_class is None, and the model was built without a name: pass its tokenizer.")
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return load_processing(name, trust_remote_code=args.trust_remote_code, revision=revision)


@contextmanager
def without_what_is_done_here(args: GKDConfig) -> Iterator[None]:
    """Hide fields from upstream's constructor that this project honours itself."""
    hidden = {"model_init_kwargs": None, "assistant_only_loss": False}
    before = {name: getattr(args, name) for name in hidden}
    vars(args).update(hidden)
    try:
        yield
    finally:
        vars(args).update(before)


def set_pad_token(tokenizer: Any, args: GKDConfig) -> None:
    """Give the tokenizer the padding token that the arguments name, as they do its end of sequence."""
    if args.pad_token is None:
        return
    if args.pad_token not in tokenizer.get_vocab():
        raise ConfigError(f"pad_token {args.pad_token!r} is no token of the tokenizer.")
    tokenizer.pad_token = args.pad_token


def default_collator(
    processing_class: Any, args: GKDConfig, formatting_func: Callable[[Any], Any] | None
) -> Callable[[list[Any]], Batch]:
    """What makes batches of rows where no collator is passed."""
    collator = Collator(
        processing_class,
        max_length=args.max_length,
        on_overlength=getattr(args, "on_overlength", "truncate"),
        train_on=getattr(args, "train_on", "assistant"),
        pad_to_multiple_of=args.pad_to_multiple_of,
        text_column=args.dataset_text_field,
    )
    if formatting_func is None:
        return collator
    return functools.partial(_formatted, collator, formatting_func)


def _formatted(collator: Collator, formatting_func: Callable[[Any], Any], rows: list[Any]) -> Batch:
    return collator([{"text": formatting_func(row)} for row in rows])


def local_teacher(teacher_model: PreTrainedModel | nn.Module | str | None, args: GKDConfig) -> Teacher:
    """A teacher over a model, or over the one that a name stands for."""
    if isinstance(teacher_model, str):
        return build_teacher(
            teacher_model,
            init_kwargs=args.teacher_model_init_kwargs,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
    assert teacher_model is not None
    return LocalTeacher(teacher_model)


def tokenizer_or_none(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, where it can be had; its absence is reported by the comparison."""
    if not name:
        return None
    try:
        return load_tokenizer(name)
    except PreflightError:
        return None
