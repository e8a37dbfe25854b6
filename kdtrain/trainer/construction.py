"""What the trainer's constructor does before upstream's (checks, loading) and after it (models, rows, objective)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.experimental.gkd import GKDConfig
from trl.trainer import sft_trainer

from kdtrain.config.options import DistillationOptions
from kdtrain.config.schema import Placement
from kdtrain.data import TemplateOptions
from kdtrain.data.aligned_batch import Aligner
from kdtrain.data.batch import Batch, forward_names
from kdtrain.data.collate import Collator
from kdtrain.data.kd_weights import WEIGHT
from kdtrain.data.other_tokenizer import OtherTokenizer
from kdtrain.data.with_images import first_batch_with_images
from kdtrain.errors import ConfigError, NotAvailableError, PreflightError
from kdtrain.feature_kd.hidden import HiddenTerm
from kdtrain.feature_kd.term import VisualTerm
from kdtrain.generation.sampler import Sampler
from kdtrain.generation.sampling import turn_ends
from kdtrain.generation.vllm import VllmSampler
from kdtrain.models import experts
from kdtrain.models.kinds import sees_images
from kdtrain.models.loading import load_with_adapter
from kdtrain.models.loss_head import add_loss_head, why_no_loss_head
from kdtrain.models.probe import Side
from kdtrain.models.processing import load_processing, load_tokenizer
from kdtrain.models.quantization import bits_of, settle
from kdtrain.models.text_only import check_reentrant
from kdtrain.models.tuning import check_trained, disable_dropout, fit_student, uses_reentrant_checkpointing
from kdtrain.models.vocabulary import Vocabulary, shared_vocabulary, vocabulary_size
from kdtrain.preflight.findings import report
from kdtrain.preflight.generation import by_vllm, check_generation, check_sharding
from kdtrain.preflight.model_checks import CheckedModel, both_sides, check_models, teacher_side_checks
from kdtrain.preflight.packing import packing_findings
from kdtrain.preflight.positions import rows_of_a_run
from kdtrain.preflight.token_ids import check_rows, embedding_rows
from kdtrain.ranks import world_size
from kdtrain.teachers import LocalTeacher, RoutedTeacher, Teacher, build_teacher
from kdtrain.trainer import argument_checks as checks
from kdtrain.trainer.given_rows import as_rows, check_stream_arguments, rows_to_look_at
from kdtrain.trainer.objective import Objective, warn_of_logits
from kdtrain.trainer.refused_fields import check_fields, check_supervision
from kdtrain.trainer.window import Receiver

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


# ---- before upstream's constructor -----------------------------------------------------------------------------------


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
    """Check what the constructor was given, cheapest first, and load what it was given by name."""
    check_fields(args, own_collator=not has_collator)
    checks.check_data_options(args)
    checks.check_config_is_followed(args, model, peft_config)
    if teacher_model is None and teacher is None and options.needs_teacher:
        teacher_model = args.teacher_model_name_or_path
    checks.check_teacher_arguments(teacher_model, teacher, args, options)
    if teacher is None:
        checks.check_teacher_is_another_model(model, teacher_model)
    for one in () if teacher is None else teacher.members:
        if not one.is_student:
            checks.check_teacher_is_another_model(model, one.module)
    train, evaluation = as_rows("train_dataset", train_dataset), as_rows("eval_dataset", eval_dataset)
    check_stream_arguments(train, args)
    if not has_collator:
        check_supervision(args, rows_to_look_at(train)[0], formatted=formatting_func is not None)
    elif formatting_func is not None:
        raise ConfigError("formatting_func and data_collator: the collator gets the rows as they are; format there.")
    if processing_class is None:
        processing_class = _processing_of(model, args)
    if options.needs_teacher and teacher is None:
        # Before the student is touched: a missing teacher should not cost the loading of a model.
        teacher = _local_teacher(teacher_model, args)
    if isinstance(model, str):
        model = _load_student(model, args, trained_in_full=peft_config is None)
    elif args.model_init_kwargs is not None:
        raise ConfigError("model_init_kwargs would be ignored: the model is loaded already. Remove them.")
    checks.check_parts_are_frozen(args, model)
    settle(model)
    check_generation(options, model.config, args.device)
    _set_arguments(args, model)
    peft_config = fit_student(model, peft_config, args)
    if peft_config is not None and bits_of(model) is not None and not is_peft_model(model):
        # Here, so that `around_upstream` can keep the adapter's weights as they are.
        given: Any = model
        model, peft_config = get_peft_model(given, peft_config), None
    teacher = teacher if options.needs_teacher else None
    assert isinstance(model, nn.Module)
    return Prepared(model, teacher, train, evaluation, processing_class, peft_config)


def _processing_of(model: nn.Module | str, args: GKDConfig) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer or processor of a model, by its name."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ConfigError("processing_class is None, and the model was built without a name: pass its tokenizer.")
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return load_processing(name, trust_remote_code=args.trust_remote_code, revision=revision)


def _local_teacher(teacher_model: nn.Module | str | None, args: GKDConfig) -> Teacher:
    placement: Placement = getattr(args, "teacher_placement", "auto")
    if isinstance(teacher_model, str):
        return build_teacher(
            teacher_model,
            init_kwargs=args.teacher_model_init_kwargs,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            quantization=getattr(args, "teacher_quantization", None),
            placement=placement,
        )
    assert teacher_model is not None
    return LocalTeacher(teacher_model, placement)


def _load_student(name: str, args: GKDConfig, trained_in_full: bool) -> nn.Module:
    """The student that a name stands for; an adapter's folder is trained on."""
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


def _set_arguments(args: GKDConfig, student: Any) -> None:
    """Set what the trainer's promises rest on, whatever the arguments say."""
    args.remove_unused_columns = False  # the collator reads columns that no forward takes
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    args.logging_nan_inf_filter = False  # it shows a NaN run as loss 0.0
    if args.hub_token is not None:  # upstream pickles the arguments beside every checkpoint, and pushes them to the hub
        os.environ.setdefault("HF_TOKEN", args.hub_token)
        args.hub_token = None
    config = getattr(student, "config", None)
    is_of_several = world_size() > 1 and args.ddp_find_unused_parameters is None
    if is_of_several and config is not None and sees_images(config) and not uses_reentrant_checkpointing(args):
        # A rank whose batch has no image leaves its vision path without a gradient; DDP would wait for it.
        args.ddp_find_unused_parameters = True


@contextmanager
def around_upstream(args: GKDConfig, student: Any) -> Iterator[None]:
    """What SFTTrainer's constructor may not see or leave behind: fields of `args`, its check of the head, configs."""
    hidden: dict[str, Any] = {"model_init_kwargs": None, "assistant_only_loss": False, "report_to": []}  # honoured here
    hidden |= {"packing": False, "padding_free": False}
    before = {name: getattr(args, name) for name in hidden}
    vars(args).update(hidden)
    # It refuses an adapter on `lm_head`, because its own loss reads the weight past it. Here the loss goes through it.
    refused, sft_trainer.BaseTunerLayer = sft_trainer.BaseTunerLayer, ()
    # It brings an adapter on quantised weights to bfloat16, in which most of AdamW's updates are lost.
    is_quantized = bits_of(student) is not None
    trained = [p for p in student.parameters() if p.requires_grad and is_quantized]
    weights = [p.data for p in trained]
    # It sets these in the student's config for good, and so in what is saved as well.
    use_cache, router_settings = getattr(student.config, "use_cache", None), experts.router_settings(student)
    try:
        yield
    finally:
        vars(args).update(before)
        sft_trainer.BaseTunerLayer = refused
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.data = weight
        if use_cache is not None:
            student.config.use_cache = use_cache
        experts.restore_router_settings(student, router_settings)


# ---- after it --------------------------------------------------------------------------------------------------------


def finish_student(trainer: GKDTrainerWithMetrics) -> None:
    """What upstream's constructor leaves to be done with the student."""
    check_trained(trainer.model, trainer.args.device)
    check_reentrant(trainer.model, trainer.args)
    if trainer.options.disable_dropout:
        disable_dropout(trainer.model)
    # Let its generation stop where its chat template ends a turn, here and after it is saved.
    own = getattr(trainer.model, "generation_config", None)
    if own is not None:
        stops = turn_ends(trainer.processing_class, own)
        own.eos_token_id = stops[0] if len(stops) == 1 else stops or None


def set_pad_token(tokenizer: Any, args: GKDConfig) -> None:
    """Give the tokenizer the padding token that the arguments name, as upstream does their end of sequence."""
    if args.pad_token is None:
        return
    if args.pad_token not in tokenizer.get_vocab():
        raise ConfigError(f"pad_token {args.pad_token!r} is no token of the tokenizer.")
    tokenizer.pad_token = args.pad_token


def default_collator(
    processing_class: Any,
    args: GKDConfig,
    formatting_func: Callable[[Any], Any] | None,
    teacher: Teacher | None = None,
) -> Callable[[list[Any]], Batch]:
    """What makes batches of rows where no collator is passed."""
    crosses = teacher is not None and DistillationOptions.from_args(args).crosses_tokenizers
    collator = Collator(
        processing_class,
        other_tokenizer=_aligner(processing_class, teacher, args) if crosses else None,
        max_length=args.max_length,
        on_overlength=getattr(args, "on_overlength", "truncate"),
        template=TemplateOptions(**getattr(args, "chats", {})),
        pad_to_multiple_of=args.pad_to_multiple_of,
        text_column=args.dataset_text_field,
        answers=getattr(args, "select_regex", None) is not None,
        row_keys=teacher is not None and not teacher.answers_anything,
        teachers=teacher is not None and isinstance(teacher, RoutedTeacher),
        with_blanks=DistillationOptions.from_args(args).weighing is not None,
    )
    if formatting_func is None:
        return collator
    return functools.partial(_formatted, collator, formatting_func)


def _aligner(processing_class: Any, teacher: Any, args: GKDConfig) -> Aligner:
    """The teacher's own, or by the tokenizer that is saved with it."""
    if teacher.aligner is not None:
        known: Aligner = teacher.aligner
        return known
    name = getattr(getattr(teacher.module, "config", None), "_name_or_path", "")
    tokenizer = _tokenizer_or_none(name)
    if tokenizer is None:
        raise ConfigError(
            "cross_tokenizer needs the teacher's tokenizer, and none is saved with it: pass data_collator=Collator("
            "tokenizer, other_tokenizer=OtherTokenizer(tokenizer, of_teacher)), or save it in the teacher's folder."
        )
    return OtherTokenizer(processing_class, tokenizer, TemplateOptions(**getattr(args, "chats", {})))


def _formatted(collator: Collator, formatting_func: Callable[[Any], Any], rows: list[Any]) -> Batch:
    return collator([{"text": formatting_func(row), WEIGHT: row.get(WEIGHT)} for row in rows])


def compared_vocabularies(
    trainer: GKDTrainerWithMetrics, teacher: Teacher, shared: int | Mapping[str, int] | None
) -> dict[str, Vocabulary]:
    """The sizes of both models' logits and the range they share, by the name of each of several teachers."""
    by_name = shared if isinstance(shared, Mapping) else {}
    return {
        one.name or "": _compared(trainer, one, by_name.get(one.name or "") if isinstance(shared, Mapping) else shared)
        for one in teacher.members
    }


def shared_by_all(vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    """What the student shares with all teachers."""
    return min(vocabularies, key=lambda one: one.shared)


def _compared(trainer: GKDTrainerWithMetrics, teacher: Teacher, shared: int | None) -> Vocabulary:
    """Of one teacher; its tokenizer is looked for where the caller has not compared it."""
    sizes = vocabulary_size(trainer.model), teacher.vocab_size
    if trainer.options.crosses_tokenizers:  # the teacher's are compared with nothing
        return Vocabulary(sizes[0], sizes[0], sizes[0])
    if shared is None:
        name = getattr(getattr(teacher.module, "config", None), "_name_or_path", "")
        # Equal sizes do not mean equal vocabularies; but nothing is downloaded to find out.
        known = _tokenizer_or_none(name) if sizes[0] != sizes[1] or os.path.isdir(name) else None
        shared = shared_vocabulary(*sizes, trainer._tokenizer, known)
    return Vocabulary(*sizes, shared)


def _tokenizer_or_none(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, where it can be had; its absence is reported by the comparison."""
    try:
        return load_tokenizer(name) if name else None
    except PreflightError:
        return None


def build_sampler(trainer: GKDTrainerWithMetrics) -> Sampler | None:
    """Who writes the student's answers in place of the model in this process; None where that does."""
    options, args = trainer.options, trainer.args
    if not by_vllm(options):
        return None
    check_sharding(trainer.accelerator)
    return VllmSampler(
        options.generation,
        lambda: trainer.unwrap(trainer.model),
        trainer.accelerator,
        trainer.processing_class,
        rows=args.per_device_train_batch_size * args.gradient_accumulation_steps * options.samples_per_prompt,
        trust_remote_code=args.trust_remote_code,
    )


def build_receiver(trainer: GKDTrainerWithMetrics, train: Any, evaluation: Any) -> Receiver:
    """What takes in batches. Rows with ids that a model has no embedding for are refused here, or batch by batch.

    Args:
        train, evaluation: as the constructor got them.
    """
    embeddings = {"student": embedding_rows(trainer.model)}
    of_teachers = [one.module for one in ([] if trainer.teacher is None else trainer.teacher.members)]
    if trainer.options.crosses_tokenizers:  # which gets ids of its own
        of_teachers = []
    if sizes := [embedding_rows(model) for model in of_teachers if model is not None]:
        embeddings["teacher"] = min(sizes)
    all_checked = [
        check_rows(data, name, embeddings)
        for name, data in (("data.train", train), ("data.eval", evaluation))
        if data is not None
    ]
    largest = max(trainer._tokenizer.get_vocab().values(), default=-1)  # some leave ids out
    ids_may_exceed = not all(all_checked) or largest >= min(embeddings.values())
    return Receiver(trainer, forward_names(_base(trainer.model)), embeddings if ids_may_exceed else None)


def check_both_models(trainer: GKDTrainerWithMetrics) -> dict[Side, int]:
    """Warn of, or refuse, what `check_models` finds; the positions of each model that has a table of them."""
    options, collator, train = trainer.options, trainer.data_collator, rows_to_look_at(trainer.train_dataset)
    members = [] if trainer.teacher is None else list(trainer.teacher.members)
    modules = [trainer.unwrap(one.module) for one in members]  # DeepSpeed's engine has a config of its own
    sides = both_sides(trainer.model, None, collator)
    for one, module in zip(members, modules, strict=True):
        sides += teacher_side_checks(one, collator, module)
    may_generate = [(trainer.model, options.lmbda > 0), *((module, options.seq_kd) for module in modules)]
    generating = [model for model, may in may_generate if may and options.lm_kd_active and model is not None]
    check_models(
        sides,
        rows_of_a_run(
            train,
            trainer.eval_dataset,
            trainer.args,
            collator,
            generates=any(may for _, may in may_generate) and options.lm_kd_active,
        ),
        collator,
        train,
        generating=generating,
        is_sharded=trainer.is_sharded,
        autocast=trainer.compute_loss_context_manager,
    )
    if trainer.layout.in_lines:
        with trainer.compute_loss_context_manager():
            _check_packing(trainer, sides)
    found: dict[Side, int] = {}
    for side in sides:
        if (positions := side.look.positions) is not None:
            found[side.name] = min(positions, found.get(side.name, positions))
    return found


def _check_packing(trainer: GKDTrainerWithMetrics, sides: Sequence[CheckedModel]) -> None:
    """Refuse models that do not keep rows of one line apart; of those in pieces see `compute_loss`."""
    option = ("data", "packing" if trainer.layout.packing else "padding_free")
    members = [] if trainer.teacher is None else trainer.teacher.members
    as_teacher = any(one.is_student for one in members)  # the student, which is looked at anyway
    report(
        finding
        for side in sides
        if side.look.looked and not (side.name == "teacher" and as_teacher and len(members) == 1)
        for finding in packing_findings(side, option)
    )


def build_objective(trainer: GKDTrainerWithMetrics) -> Objective:
    """The loss, without the student's logits where that gives the same."""
    router_logits = experts.asks_for_router_logits(trainer.model, trainer.aux_loss_enabled)
    if router_logits:
        experts.check_experts(trainer.model, trainer.args)
    base = _base(trainer.model)
    in_pieces = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    reason = why_no_loss_head(base, calls_head=not in_pieces)
    if reason is None:
        add_loss_head(base)
    else:
        warn_of_logits(reason)
    return Objective(
        trainer.vocabulary,
        fused=reason is None,
        router_logits=router_logits,
        aux_weight=trainer.router_aux_loss_coef if router_logits else 0.0,
        visual=_visual_term(trainer),
        hidden=_hidden_term(trainer),
        vocabularies=trainer.vocabularies,
        asks_together=trainer.asks_teacher_together,
    )


def _visual_term(trainer: GKDTrainerWithMetrics) -> VisualTerm | None:
    """Visual KD, tried on a row with images where there is one."""
    wanted = trainer.options.visual_kd
    if wanted is None:
        return None
    student, teacher = trainer.unwrap(trainer.model), trainer.unwrap(trainer.teacher_model)
    visual = VisualTerm(wanted, student, teacher, trainer.accelerator, trainer.args.seed)
    if trainer.train_dataset is not None and _can_be_probed(trainer):
        batch = first_batch_with_images(rows_to_look_at(trainer.train_dataset), trainer.data_collator)
        if batch is not None:
            with trainer.compute_loss_context_manager():
                visual.probe(batch)
    return visual


def _hidden_term(trainer: GKDTrainerWithMetrics) -> HiddenTerm | None:
    """Hidden-state KD, tried on a few tokens."""
    wanted = trainer.options.hidden_kd
    if wanted is None:
        return None
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
        raise NotAvailableError(
            "custom.hidden_kd is not available under FSDP 1, with which it was not tried. Use FSDP 2 (fsdp_config: "
            "{version: 2})."
        )
    student, teacher = trainer.unwrap(trainer.model), trainer.unwrap(trainer.teacher_model)
    hidden = HiddenTerm(wanted, student, teacher, trainer.accelerator, trainer.args.seed)
    if _can_be_probed(trainer):
        with trainer.compute_loss_context_manager():
            hidden.probe()
    return hidden


def _can_be_probed(trainer: GKDTrainerWithMetrics) -> bool:
    """Whether both models can be run now: else what does not fit is found at the first step."""
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is None:
        return True
    if getattr(fsdp, "fsdp_version", 1) == 1:  # its pieces run inside its wrapper alone
        return False
    missing = any(parameter.is_meta for parameter in trainer.model.parameters())  # where one rank loads for all
    return not trainer.accelerator.gather(torch.tensor([missing], device=trainer.accelerator.device)).any()


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if is_peft_model(model) else model
