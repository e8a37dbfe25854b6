"""What a trainer is given, checked and brought into the form that upstream's constructor takes."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl.experimental.gkd import GKDConfig

from kdtrain.adapters import is_adapter_folder
from kdtrain.config import TrainArguments
from kdtrain.data.collate import Collator
from kdtrain.data.errors import RowError
from kdtrain.errors import ConfigError, DataError, NotAvailableError, PreflightError
from kdtrain.knobs import Knobs
from kdtrain.models import load_processing, load_tokenizer, load_with_adapter, sees_images
from kdtrain.row_order import refused_loader_options
from kdtrain.teachers import LocalTeacher, Teacher, build_teacher
from kdtrain.vision.parts import freeze_parts

logger = logging.getLogger(__name__)

_FILLED_IN = {"dtype": "auto"}  # by the config's loader, where nothing was said
_WHOLE_CONFIG = "train the whole config with kdtrain.fit(config)"


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


def check_teacher_arguments(teacher_model: Any, teacher: Teacher | None, args: GKDConfig, knobs: Knobs) -> None:
    """Raise ValueError where a teacher is needed and missing, given twice, or to be loaded and loaded already."""
    if teacher_model is not None and teacher is not None:
        raise ValueError("Pass either teacher_model or teacher, not both.")
    is_loaded = teacher is not None or isinstance(teacher_model, nn.Module)
    if is_loaded and (args.teacher_model_init_kwargs or _FILLED_IN) != _FILLED_IN:
        raise ConfigError("teacher_model_init_kwargs would be ignored: the teacher is loaded already. Remove them.")
    if knobs.needs_teacher and teacher_model is None and teacher is None:
        raise ValueError(
            f"llm_kd_weight is {knobs.llm_kd_weight} and visual KD is {'on' if knobs.visual_kd else 'off'}: this needs "
            "a teacher. Pass teacher_model (rlhf.teacher_model), or set llm_kd_weight to 0 for supervised training."
        )
    if not knobs.needs_teacher and (teacher_model is not None or teacher is not None):
        logger.warning("No KD is active (llm_kd_weight is 0, visual KD is off): the teacher is not used.")


def check_teacher_can(teacher: Teacher | None, knobs: Knobs) -> None:
    """Raise ValueError where the options ask a teacher for what there is not."""
    if knobs.needs_teacher and teacher is None:
        raise ValueError(
            f"llm_kd_weight is now {knobs.llm_kd_weight:g}, and this trainer was built without a teacher: build it "
            "with args.llm_kd_weight above 0 and a teacher_model."
        )
    if teacher is not None and teacher.module is None and (knobs.seq_kd or knobs.visual_kd is not None):
        raise ValueError("seq_kd and visual KD need a teacher that is a model in this process.")


def check_same_on_all_ranks(knobs: Knobs, accelerator: Any) -> None:
    """Raise ValueError where a callback has set an option on some ranks only: each would train on another loss."""
    if accelerator.num_processes == 1:
        return
    names = ("beta", "kd_temperature", "llm_kd_weight", "sft_alpha", "lmbda", "temperature", "seq_kd")
    own = torch.tensor([float(getattr(knobs, name)) for name in names], device=accelerator.device)
    ranks = accelerator.gather(own[None])
    differ = [name for name, same in zip(names, (ranks == ranks[0]).all(0).tolist(), strict=True) if not same]
    if differ:
        raise ValueError(
            f"{', '.join(differ)} of the trainer: not the same on all ranks. Let a callback set them on all, not "
            "only where state.is_world_process_zero."
        )


def hide_token(args: GKDConfig) -> None:
    """Move a hub token out of the arguments, which upstream pickles beside every checkpoint and pushes to the hub."""
    if args.hub_token is not None:
        os.environ.setdefault("HF_TOKEN", args.hub_token)
        args.hub_token = None


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as they were given: an Arrow table would want one type for all contents, and could not hold a PIL image."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        """Whether the rows are there, and not made when they are asked for."""
        return isinstance(self._rows, list | tuple)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index])


def check_arguments(
    args: Any, model: Any, teacher_model: Any, teacher: Any, processing_class: Any = None, callbacks: Any = None
) -> None:
    """Refuse what is of a wrong kind, in words that say what was meant.

    Raises:
        ConfigError: naming the argument.
    """
    if isinstance(args, TrainArguments):
        raise ConfigError(
            "args is what load_training_config returns: pass its .training_args, and model, tuner and data yourself "
            "(it knows nothing of them), or train the whole config with kdtrain.fit(config)."
        )
    if not isinstance(args, GKDConfig):
        what = "missing: its output_dir has no default" if args is None else f"a {type(args).__name__}"
        raise ConfigError(f"args must be a trl GKDConfig; it is {what}.")
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
    """The value, unless it is neither a model nor a name.

    Raises:
        ConfigError: naming the argument.
    """
    fits = isinstance(value, str) or (isinstance(value, nn.Module) and hasattr(value, "config"))
    if fits or (value is None and optional):
        return value
    raise ConfigError(
        f"{name} must be a transformers or PEFT model, or the name of one; it is a {type(value).__name__}."
    )


def check_config_is_followed(args: GKDConfig, model: Any, peft_config: Any) -> None:
    """Refuse to train in full where the config that `args` was read from asks for LoRA.

    Args:
        model: the student or its name.

    Raises:
        ConfigError: neither a peft_config nor an adapter here.
    """
    tuner = getattr(args, "tuner", None)
    has_adapter = is_adapter_folder(model) if isinstance(model, str) else is_peft_model(model)
    if tuner is not None and tuner.train_type == "lora" and peft_config is None and not has_adapter:
        raise ConfigError(
            "The config of these training_args has tuner.train_type: lora, and this trainer got neither a peft_config "
            f"nor a PeftModel: pass one, or {_WHOLE_CONFIG}."
        )


def check_parts_are_frozen(args: GKDConfig, model: nn.Module) -> None:
    """Refuse to train what the config that `args` was read from freezes; the trainer freezes nothing itself.

    Args:
        model: the student as it was given, or loaded by its name.

    Raises:
        ConfigError: parts are to be frozen, and not a weight is.
        PreflightError: of a text model, whose only part is to be frozen.
    """
    tuner = getattr(args, "tuner", None)
    wanted = {part: getattr(tuner, f"freeze_{part}", False) for part in ("llm", "vit", "aligner")}
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
    """Refuse a teacher that is the student: it would be frozen with it, and their divergence is 0.

    Raises:
        ConfigError: they are one object, or share weights.
    """
    if not isinstance(model, nn.Module) or not isinstance(teacher, nn.Module):
        return
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ConfigError(
            "teacher_model is the student itself or shares weights with it: the teacher would change with the student, "
            "and their divergence be 0. Pass a model of its own (load it a second time). The student without its "
            "adapter as teacher is rlhf.teacher.backend: self (`teacher: self`), which is not available yet."
        )


def check_prompt_learning(model: Any, side: str, generates: bool, experts: bool = False) -> None:
    """Refuse kinds of prompt learning whose virtual tokens cannot be told from the row's.

    Raises:
        NotAvailableError: naming the side and the reason.
    """
    config = model.active_peft_config if is_peft_model(model) else None
    if config is None or not config.is_prompt_learning:
        return
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    reason = None
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
) -> Callable[[list[Any]], dict[str, Any]]:
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


def _formatted(collator: Collator, formatting_func: Callable[[Any], Any], rows: list[Any]) -> dict[str, Any]:
    return collator([{"text": formatting_func(row)} for row in rows])


def as_rows(name: str, data: Any) -> Any:
    """A data set in a form that can be indexed.

    Raises:
        ConfigError: it is none, or of another kind.
        DataError: it has no rows, or they are no mappings.
        NotAvailableError: it cannot be counted.
    """
    if data is None and name == "train_dataset":
        raise ConfigError("`train_dataset` is required: a datasets.Dataset, or a list of rows.")
    if name != "train_dataset" and (data is None or isinstance(data, datasets.IterableDataset)):
        return data
    if isinstance(data, dict) and name != "train_dataset":
        return {key: as_rows(f"{name}[{key!r}]", rows) for key, rows in data.items()}
    if isinstance(data, dict):
        raise ConfigError(f"{name} is a dict with the keys {', '.join(map(str, data))}: pass one of its data sets.")
    if isinstance(data, torch.utils.data.IterableDataset | datasets.IterableDataset):
        raise NotAvailableError(
            "An IterableDataset (streaming) is not available yet: pass a datasets.Dataset, whose rows can be counted."
        )
    if not isinstance(data, list | tuple | Dataset | torch.utils.data.Dataset) or not hasattr(data, "__len__"):
        raise ConfigError(
            f"{name} must be a datasets.Dataset, a list of rows or a torch Dataset with a length; it is a "
            f"{type(data).__name__}. Files are read by kdtrain.fit (data.train)."
        )
    if len(data) == 0:
        raise DataError(f"{name} has no rows.")
    if not isinstance(data[0], Mapping):
        raise DataError(
            f"{name}: a row must be a mapping such as {{'messages': […]}}; the first is a {type(data[0]).__name__}."
        )
    return data if isinstance(data, Dataset) else Rows(data)


def check_raw_rows(collator: Any, name: str, data: Any) -> None:
    """Refuse raw rows that no batch can be made of, before one of them ends a run in its middle.

    Rows that are made when they are asked for, and pictures that would be decoded, are left to their batch.

    Raises:
        DataError: naming the first such row.
    """
    if isinstance(data, dict):
        for key, rows in data.items():
            check_raw_rows(collator, f"{name}[{key!r}]", rows)
    in_memory = data.in_memory if isinstance(data, Rows) else isinstance(data, Dataset)
    pictures = isinstance(data, Dataset) and {"image", "images"} & set(data.column_names)
    if not isinstance(collator, Collator) or not in_memory or pictures or "input_ids" in data[0]:
        return
    for number, row in enumerate(data):
        try:
            collator.check(row)
        except RowError as error:
            raise DataError(f"{name}: row {number}: {error}.") from error


def placeholder(data: Any) -> Any:
    """Upstream's constructor looks at the type and the length, and wants an Arrow table."""
    if isinstance(data, dict):
        return {key: placeholder(rows) for key, rows in data.items()}
    return Dataset.from_dict({"row": range(len(data))}) if isinstance(data, Rows) else data


def check_parallelism(accelerator: Any) -> None:
    """Refuse to train on pieces of rows: a label at the edge of a piece is predicted on another rank.

    Raises:
        NotAvailableError: context or sequence parallelism, from `parallelism_config` or from accelerate.
    """
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
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise NotAvailableError(
            f"training.train_sampling_strategy: {args.train_sampling_strategy} is not available yet: its order depends "
            "on the state of each rank, so that ranks would skip rows and a resumed run would see others."
        )


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
