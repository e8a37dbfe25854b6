"""What a trainer is given and what callbacks set later, checked: wrong kinds, and what does not go together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl.experimental.gkd import GKDConfig

from kdtrain.config import TrainArguments
from kdtrain.config.adapters import is_adapter_folder
from kdtrain.config.options import RENORMALIZED, DistillationOptions, LengthSchedule
from kdtrain.config.schema import TunerConfig
from kdtrain.config.training_rules import refused_loader_options
from kdtrain.errors import ConfigError, NotAvailableError, PreflightError
from kdtrain.generation.sampler import Sampler
from kdtrain.losses.kinds import WITH_BETA
from kdtrain.models.kinds import sees_images
from kdtrain.models.parts import freeze_parts
from kdtrain.preflight.generation import by_vllm
from kdtrain.teachers import Teacher

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

_FILLED_IN = {"dtype": "auto"}  # by the config's loader, where nothing was said
_WHOLE_CONFIG = "train the whole config with kdtrain.fit(config)"


def check_teacher_arguments(
    teacher_model: Any, teacher: Teacher | None, args: GKDConfig, options: DistillationOptions
) -> None:
    """Raise ValueError where a teacher is needed and missing, given twice, or to be loaded and loaded already."""
    if teacher_model is not None and teacher is not None:
        raise ValueError("Pass either teacher_model or teacher, not both.")
    is_loaded = teacher is not None or isinstance(teacher_model, nn.Module)
    if is_loaded and (args.teacher_model_init_kwargs or _FILLED_IN) != _FILLED_IN:
        raise ConfigError("teacher_model_init_kwargs would be ignored: the teacher is loaded already. Remove them.")
    if options.needs_teacher and teacher_model is None and teacher is None:
        raise ValueError(
            f"llm_kd_weight is {options.llm_kd_weight}, visual KD is {'on' if options.visual_kd else 'off'} and "
            f"hidden-state KD is {'on' if options.hidden_kd else 'off'}: this needs a teacher. Pass teacher_model "
            "(rlhf.teacher_model), or set llm_kd_weight to 0 for supervised training."
        )
    if not options.needs_teacher and (teacher_model is not None or teacher is not None):
        logger.warning("No KD is active (llm_kd_weight is 0, no features are compared): the teacher is not used.")
    # Of a config's own server the config's check has said it, with its place.
    gives_top_k = (
        teacher is not None
        and not hasattr(args, "chats")
        and any(not one.is_student and one.module is None for one in teacher.members)
    )
    if gives_top_k and options.lm_kd_active and options.tail == "renormalize" and options.student_mass_counts:
        logger.warning("tail: renormalize %s. Use tail: bucket.", RENORMALIZED)


def take_one_gpu(args: GKDConfig) -> None:
    """Train on one GPU in a process that sees several: transformers would make `nn.DataParallel` of the model.

    That averages batch means, copies the student at every step and knows no `loss_head`. The other GPUs stay free for
    what the process puts there itself, such as a teacher by `device_map`.
    """
    if args.n_gpu <= 1:
        return
    logger.warning(
        "%d GPUs are visible to this one process, which trains on %s. To train on all of them use one process each: "
        "`kdtrain fit` with --num-processes %d, or `accelerate launch --num_processes %d` with your own script. To "
        "hide the others set CUDA_VISIBLE_DEVICES.",
        args.n_gpu,
        args.device,
        args.n_gpu,
        args.n_gpu,
    )
    args._n_gpu = 1


def check_teacher_can(teacher: Teacher | None, options: DistillationOptions) -> None:
    """Raise ValueError where the options ask a teacher for what there is not."""
    if options.needs_teacher and teacher is None:
        raise ValueError(
            f"llm_kd_weight is now {options.llm_kd_weight:g}, and this trainer was built without a teacher: build it "
            "with args.llm_kd_weight above 0 and a teacher_model."
        )
    if teacher is None:
        return
    if options.lm_kd_active and not teacher.has_targets:
        raise ValueError(
            f"The teacher only writes answers, and llm_kd_weight is {options.llm_kd_weight:g}, which needs its "
            "log-probabilities. Set rlhf.llm_kd_weight: 0 (with answers: teacher in the data source this is "
            "sequence-level distillation), or use a server that gives log-probabilities of prompts, such as vLLM."
        )
    if options.lm_kd_active and not teacher.answers_anything and (options.lmbda > 0 or options.seq_kd):
        raise ValueError(
            f"lmbda is {options.lmbda:g} and seq_kd {str(options.seq_kd).lower()}, and the teacher is a cache, which "
            "has no targets for text that does not exist yet. Set lmbda to 0 and seq_kd to false, or use the teacher "
            "itself."
        )
    for one in teacher.members if options.lm_kd_active else ():
        if one.drawn_at is not None:
            _check_draws(one.drawn_at, options)
    if options.seq_kd and not teacher.can_generate:
        raise ValueError("seq_kd needs a teacher that is a model in this process, or one that can write answers.")
    if (options.visual_kd is not None or options.hidden_kd is not None) and len(teacher.members) > 1:
        name = "Visual KD" if options.visual_kd is not None else "Hidden-state KD"
        option = "visual_kd" if options.visual_kd is not None else "hidden_kd"
        raise ValueError(
            f"{name} compares the features of one teacher, and there are several: switch custom.{option} off, or "
            "take one teacher."
        )
    if options.visual_kd is not None and not teacher.has_features:
        own = "of its own: of the student itself the features are the same" if teacher.is_student else "in this process"
        raise ValueError(f"Visual KD needs a teacher that is a model {own}.")
    if options.hidden_kd is not None and teacher.module is None:
        raise ValueError("Hidden-state KD needs a teacher that is a model in this process.")


def _check_draws(drawn_at: float, options: DistillationOptions) -> None:
    """Tokens that were drawn serve the divergence and the temperature alone that they were drawn for."""
    if options.beta > 0 or options.divergence not in WITH_BETA:
        what = f"beta is {options.beta:g}" if options.divergence in WITH_BETA else f"divergence is {options.divergence}"
        raise ValueError(
            f"{what}, and the teacher's targets are drawn tokens (mode sample), from which only "
            "forward KL can be learnt: set divergence to jsd and beta to 0."
        )
    if options.kd_temperature != drawn_at:
        raise ValueError(
            f"kd_temperature is {options.kd_temperature:g}, and the teacher's targets were drawn at {drawn_at:g}: set "
            f"kd_temperature to {drawn_at:g}, or draw them anew."
        )


def check_options(trainer: GKDTrainerWithMetrics, options: DistillationOptions) -> None:
    """Refuse options that ask the trainer's models for what they cannot do."""
    check_teacher_can(trainer.teacher, options)
    _check_other_tokenizer(trainer, options)
    _check_token_weights(trainer, options)
    kd = options.lm_kd_active
    _check_prompt_learning(trainer.unwrap(trainer.model), "student", kd and options.lmbda > 0, trainer.aux_loss_enabled)
    for teacher in () if trainer.teacher is None else trainer.teacher.members:
        if teacher.module is not None:
            _check_prompt_learning(trainer.unwrap(teacher.module), "teacher", kd and options.seq_kd, False)


def check_several_teachers(trainer: GKDTrainerWithMetrics) -> None:
    """Refuse what several teachers cannot be beside, once they are placed.

    Raises:
        NotAvailableError: under FSDP and DeepSpeed ranks would have to agree on more than they do.
    """
    teacher, options = trainer.teacher, trainer.options
    if teacher is None or len(teacher.members) == 1 or not (trainer.is_sharded or teacher.in_pieces):
        return
    where = "FSDP and DeepSpeed, or with a teacher in pieces"
    if options.seq_kd:
        raise NotAvailableError(
            f"rlhf.seq_kd with several teachers is not available yet under {where}: let each write its answers in a "
            "run of its own before (answers: teacher in a source of data.train), or use plain data parallelism with "
            "whole teachers."
        )
    if sees_images(trainer.unwrap(trainer.model).config):
        raise NotAvailableError(
            f"Several teachers of a vision-language student are not available yet under {where}: use plain data "
            "parallelism."
        )


def _check_other_tokenizer(trainer: GKDTrainerWithMetrics, options: DistillationOptions) -> None:
    """Refuse what a teacher with another tokenizer cannot do, and batches that do not say what belongs together."""
    teacher = trainer.teacher
    is_stored = teacher is not None and teacher.aligner is not None
    if not options.crosses_tokenizers:
        if is_stored and options.lm_kd_active:
            raise ConfigError(
                "The teacher is a cache of likelihoods of chunks of text (mode chunks): set cross_tokenizer to alm."
            )
        if trainer.other_tokenizer is not None and options.lm_kd_active:
            raise ConfigError("cross_tokenizer cannot be switched off while training: the teacher's tokens are others.")
        return
    if teacher is not None and (teacher.is_student or not (teacher.answers_anything or is_stored)):
        raise ConfigError(
            "cross_tokenizer is for a teacher with another tokenizer, and neither the student itself nor a cache of "
            "targets for its tokens is one: pass the teacher's model, or a cache of mode chunks."
        )
    if is_stored and options.cross_tokenizer == "uld":
        raise ConfigError("cross_tokenizer uld needs distributions, and the cache has likelihoods of chunks: take alm.")
    if trainer.other_tokenizer is None:
        raise ConfigError(
            "cross_tokenizer needs batches that say which tokens of student and teacher belong together: pass "
            "data_collator=Collator(tokenizer, other_tokenizer=OtherTokenizer(tokenizer, of_teacher)), or none."
        )
    ranks = options.select != "all" and options.samples_per_prompt > 1 and options.lmbda > 0
    beside = {"seq_kd": options.seq_kd, f"select {options.select}": ranks}
    beside |= {name: getattr(options, name) is not None for name in ("visual_kd", "hidden_kd")}
    if used := [name for name, is_used in beside.items() if is_used]:
        raise ConfigError(f"{', '.join(used)}: not available yet beside cross_tokenizer. Switch one of them off.")


def _check_token_weights(trainer: GKDTrainerWithMetrics, options: DistillationOptions) -> None:
    """Refuse token weights of a teacher that cannot be asked about other images, and batches without these."""
    if options.weighing is None:
        return
    teacher, name = trainer.teacher, f"token_weights by {options.weighing.by}"
    if teacher is not None and (teacher.module is None or teacher.is_student or len(teacher.members) > 1):
        raise ConfigError(f"{name}: not available yet but with one teacher that is a model of its own in this process.")
    beside = {"token_selection": options.selection is not None, "cross_tokenizer": options.crosses_tokenizers}
    if used := [option for option, is_used in beside.items() if is_used]:
        raise ConfigError(f"{name} cannot be beside {', '.join(used)}: switch one of them off.")
    if not sees_images(trainer.unwrap(trainer.model).config):
        raise ConfigError(f"{name} is for vision-language models, and the student sees no images: remove it.")
    if not getattr(trainer.data_collator, "with_blanks", False):
        raise ConfigError(
            f"{name} needs batches that have the images in their mean colour too: pass data_collator=Collator("
            "processor, with_blanks=True), or none."
        )


def check_sampler(sampler: Sampler | None, options: DistillationOptions) -> None:
    """Refuse answers of the student that vLLM was to write, where a callback has switched them on later."""
    if by_vllm(options) and sampler is None:
        raise ConfigError(
            f"generation.backend is {options.generation.backend}, and this trainer was built without vLLM, because "
            "nothing was to be generated then: build it with lmbda and llm_kd_weight above 0."
        )


def check_same_on_all_ranks(options: DistillationOptions, accelerator: Any) -> None:
    """Raise ValueError where a callback has set an option on some ranks only: each would train on another loss."""
    if accelerator.num_processes == 1:
        return
    numbers = {name: float(value) for name, value in options if isinstance(value, (int, float))}
    limit = options.max_new_tokens  # as many numbers on every rank, whatever each of them has
    parts = (limit.from_, limit.to, limit.over) if isinstance(limit, LengthSchedule) else (limit, limit, 0.0)
    numbers |= zip(("max_new_tokens", "max_new_tokens.to", "max_new_tokens.over"), map(float, parts), strict=True)
    own = torch.tensor(list(numbers.values()), device=accelerator.device)
    ranks = accelerator.gather(own[None])
    differ = [name for name, same in zip(numbers, (ranks == ranks[0]).all(0).tolist(), strict=True) if not same]
    if differ:
        raise ValueError(
            f"{', '.join(differ)} of the trainer: not the same on all ranks. Let a callback set them on all, not "
            "only where state.is_world_process_zero."
        )


def check_arguments(
    args: Any, model: Any, teacher_model: Any, teacher: Any, processing_class: Any, callbacks: Any
) -> None:
    """Refuse what is of a wrong kind, in words that say what was meant."""
    if isinstance(args, TrainArguments):
        raise ConfigError(
            "args is what load_training_config returns: pass its .training_args, and model, tuner and data yourself "
            f"(it knows nothing of them), or {_WHOLE_CONFIG}."
        )
    if not isinstance(args, GKDConfig):
        what = "missing: its output_dir has no default" if args is None else f"a {type(args).__name__}"
        raise ConfigError(f"args must be a trl GKDConfig; it is {what}.")
    take_one_gpu(args)
    check_model("model", model, optional=False)
    check_model("teacher_model", teacher_model)
    if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | None):
        raise ConfigError(
            f"processing_class must be a tokenizer or a processor; it is a {type(processing_class).__name__}. "
            "None takes the model's own."
        )
    check_callbacks(callbacks)
    if teacher is not None and not isinstance(teacher, Teacher):
        raise ConfigError(
            f"teacher must be a kdtrain.teachers.Teacher; it is a {type(teacher).__name__}. A model is a teacher_model."
        )


def check_callbacks(callbacks: Any) -> None:
    """Raise `ConfigError` unless it is a list of transformers' callbacks, as objects or classes, or None."""
    if callbacks is None:
        return
    if not isinstance(callbacks, list | tuple):
        raise ConfigError(f"callbacks must be a list; it is a {type(callbacks).__name__}.")
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ConfigError(f"callbacks must be transformers.TrainerCallbacks; one is a {kind.__name__}.")


def check_model(name: str, value: Any, *, optional: bool = True) -> Any:
    """The value, unless it is neither a model nor a name."""
    fits = isinstance(value, str) or (isinstance(value, nn.Module) and hasattr(value, "config"))
    if fits or (value is None and optional):
        return value
    raise ConfigError(
        f"{name} must be a transformers or PEFT model, or the name of one; it is a {type(value).__name__}."
    )


def check_config_is_followed(args: GKDConfig, model: Any, peft_config: Any) -> None:
    """Refuse to train in full where the config that `args` was read from asks for LoRA."""
    tuner = getattr(args, "tuner", None)
    has_adapter = is_adapter_folder(model) if isinstance(model, str) else is_peft_model(model)
    if tuner is not None and tuner.train_type == "lora" and peft_config is None and not has_adapter:
        raise ConfigError(
            "The config of these training_args has tuner.train_type: lora, and this trainer got neither a peft_config "
            f"nor a PeftModel: pass one, or {_WHOLE_CONFIG}."
        )


def check_parts_are_frozen(args: GKDConfig, model: nn.Module) -> None:
    """Refuse to train what the config that `args` was read from freezes; the trainer freezes nothing itself."""
    tuner: TunerConfig | None = getattr(args, "tuner", None)
    wanted = {} if tuner is None else tuner.frozen
    if not any(wanted.values()) or not all(parameter.requires_grad for parameter in model.parameters()):
        return
    if not sees_images(model.config):
        freeze_parts(model, **wanted)  # which has no effect, and says so
        return
    option = next(part for part in wanted if wanted[part])
    raise ConfigError(
        f"The config of these training_args has tuner.freeze_{option}: true, and no weight of the model is frozen: "
        f"load it, freeze it and pass the model itself (not its name), or {_WHOLE_CONFIG}."
    )


def check_teacher_is_another_model(model: Any, teacher: Any) -> None:
    """Refuse a teacher that is the student: it would be frozen with it, and their divergence is 0."""
    if not isinstance(model, nn.Module) or not isinstance(teacher, nn.Module):
        return
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ConfigError(
            "teacher_model is the student itself or shares weights with it: the teacher would change with the student, "
            "and their divergence be 0. Pass a model of its own (load it a second time). For the student without its "
            "adapter pass teacher=kdtrain.teachers.SelfTeacher() instead (rlhf.teacher.backend: self)."
        )


def _check_prompt_learning(model: Any, side: str, generates: bool, experts: bool) -> None:
    """Refuse kinds of prompt learning whose virtual tokens cannot be told from the row's."""
    # By its class: accelerate's own question looks into the installed packages, 7 ms each time, for every window.
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if config is None or not config.is_prompt_learning:
        return
    kind, reason = str(getattr(config.peft_type, "value", config.peft_type)), None
    if kind not in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        reason = "its inputs are not those of other models"
    elif sees_images(model.get_base_model().config):
        reason = "a vision-language model looks for its images among the tokens, which virtual ones push aside"
    elif experts:
        reason = "the load-balancing loss of its experts would count the virtual tokens"
    if reason is not None:
        raise NotAvailableError(f"{kind} on the {side} is not available yet: {reason}. Use LoRA.")
    if generates:
        raise NotAvailableError(
            f"{kind} on the {side} is not available yet where it generates answers: virtual tokens come before the "
            "padding of shorter prompts, which changes what they say. Set lmbda=0 and seq_kd=False, or use LoRA."
        )


def check_parallelism(accelerator: Any) -> None:
    """Refuse to train on pieces of rows: a label at the edge of a piece is predicted on another rank."""
    config = accelerator.parallelism_config
    if config is not None and (config.cp_enabled or config.sp_enabled):
        raise NotAvailableError("parallelism_config: context and sequence parallelism are not available yet.")


def check_data_options(args: GKDConfig) -> None:
    """Refuse what would count rows twice, lose some, or train ranks on different things."""
    if args.activation_offloading and args.device.type == "cpu":
        raise PreflightError(
            "training.activation_offloading moves activations from the accelerator to the CPU, and this run is on a "
            "CPU: remove it."
        )
    for name, reason, instead in refused_loader_options(args.accelerator_config.to_dict()):
        raise NotAvailableError(f"training.accelerator_config: {name} cannot be had: {reason}. To do: {instead}.")
    if args.train_sampling_strategy == "batch_rebalance":
        raise NotAvailableError(
            "training.train_sampling_strategy: batch_rebalance is not available yet: its order depends on the state of "
            "each rank, so that ranks would skip rows and a resumed run would see others. Use group_by_length."
        )
    if args.packing and args.max_length is None:
        raise ConfigError("packing lays rows into lines of max_length tokens, which is None: set it.")
