"""From a checked config to what the trainer takes: trl's GKDConfig with our options attached. Imports torch and trl
only when something is built."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdtrain.config.diagnose import clean
from kdtrain.config.options import LengthSchedule
from kdtrain.config.schema import RunConfig
from kdtrain.config.training_fields import training_fields
from kdtrain.errors import ConfigError

if TYPE_CHECKING:
    from trl.experimental.gkd import GKDConfig

logger = logging.getLogger("kdtrain")

# What the loss, the data and the guarantees of a run rest on; the config refuses anything else.
_ALWAYS: dict[str, Any] = {
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "logging_nan_inf_filter": False,
    "average_tokens_across_devices": True,
    "disable_tqdm": True,
}


@dataclass
class TrainArguments:
    """A run, ready to be trained."""

    config: RunConfig
    training_args: GKDConfig
    """Carries the fields of `DistillationOptions` and `TrainingOptions` too, which `dataclasses.replace` and `to_dict`
    do not see."""

    @property
    def llm_kd_weight(self) -> float:
        """Weight of the divergence, as on `training_args`."""
        return self.training_args.llm_kd_weight


@dataclass(frozen=True)
class Hardware:
    """What the device of this process can do."""

    accelerator: str | None  # `cuda`, `mps`, `xpu`, ...; None on a CPU
    bf16: bool
    fp16: bool
    tf32: bool


def detect_hardware() -> Hardware:
    """The device that training would use."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    kind = device.type if device else None
    if kind == "cuda":
        ampere = torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 8
        return Hardware(kind, torch.cuda.is_bf16_supported(including_emulation=False), fp16=True, tf32=ampere)
    if kind == "xpu":
        return Hardware(kind, torch.xpu.is_bf16_supported(), fp16=True, tf32=False)
    return Hardware(kind, bf16=False, fp16=False, tf32=False)


def build_train_arguments(config: RunConfig, hardware: Hardware | None = None) -> TrainArguments:
    """Builds the GKDConfig of a run, fitted to `hardware` or to the device that is found.

    Raises:
        ConfigError: GKDConfig refuses the values.
    """
    own = dict(config.training_options)
    of_trl = {name: value for name, value in config.training.items() if name not in own}
    kwargs = {**of_trl, **_from_sections(config), **_ALWAYS}
    kwargs.setdefault("report_to", "none")
    kwargs.setdefault("save_total_limit", 2)  # the newest, and the best or the one before
    if kwargs.get("eval_strategy", "no") != "no":
        kwargs.setdefault("metric_for_best_model", "loss")  # for its best checkpoint to be kept
    if kwargs["save_total_limit"] is not None:
        kwargs["save_total_limit"] = max(2, kwargs["save_total_limit"])
    hardware = hardware or detect_hardware()
    _fit_to_device(kwargs, hardware)
    if hardware.accelerator is None:  # else DeepSpeed looks for a device as it is imported, and takes some CPUs for one
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with warnings.catch_warnings():
            # trl's own defaults use names that transformers has deprecated; no user can change that.
            warnings.simplefilter("ignore", FutureWarning)
            training_args = _gkd_config_class()(**kwargs)
    except (ValueError, TypeError, ImportError, OSError) as error:
        said = " ".join(str(error).split())  # upstream's messages have lines of their own
        raise ConfigError(f"training: {clean(said)}") from error
    attached = own | {name: value for name, value in config.options if name not in training_fields()}
    # What the trainer's constructor cannot do by itself, so that it notices, and what its own collator does.
    attached |= {"tuner": config.tuner, "chats": config.chats, "on_overlength": config.data.on_overlength}
    of_teacher = config.rlhf.teacher
    attached |= {"teacher_placement": of_teacher.placement, "teacher_quantization": of_teacher.quantization}
    for name, value in attached.items():
        setattr(training_args, name, value)
    return TrainArguments(config, training_args)


def _gkd_config_class() -> type[GKDConfig]:
    with warnings.catch_warnings():
        # trl warns that the module is experimental; its version is bounded for that reason.
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDConfig
    return GKDConfig


def _from_sections(config: RunConfig) -> dict[str, Any]:
    """GKDConfig's fields that a config sets outside `training`."""
    rlhf = config.rlhf
    kwargs = {name: value for name, value in config.options if name in training_fields()}
    if isinstance(rlhf.max_new_tokens, LengthSchedule):
        kwargs["max_new_tokens"] = rlhf.max_new_tokens.model_dump()  # trackers write the arguments as JSON
    kwargs["teacher_model_init_kwargs"] = teacher_loading(config)
    kwargs |= {name: getattr(config.data, name) for name in ("max_length", "packing", "padding_free")}
    if config.options.needs_teacher and rlhf.teacher_model and rlhf.teacher.backend == "hf":
        kwargs["teacher_model_name_or_path"] = rlhf.teacher_model
    return kwargs


def teacher_loading(config: RunConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the teacher; a copy, the caller's dict stays as it is."""
    loading = dict(config.rlhf.teacher_model_init_kwargs or {})
    loading.setdefault("dtype", loading.pop("torch_dtype", config.rlhf.teacher.dtype))
    return loading


def _fit_to_device(kwargs: dict[str, Any], hardware: Hardware) -> None:
    """Lets a config written for one device run on another: float32 where a faster type is not there."""
    on_cpu = hardware.accelerator is None or bool(kwargs.get("use_cpu"))
    if on_cpu:
        kwargs.setdefault("use_cpu", True)
        kwargs.setdefault("dataloader_pin_memory", False)
    supported = {name: getattr(hardware, name) and not on_cpu for name in ("bf16", "fp16", "tf32")}
    supported |= {f"{name}_full_eval": supported[name] for name in ("bf16", "fp16")}
    device = "cpu" if on_cpu else hardware.accelerator
    for name, is_supported in supported.items():
        if kwargs.get(name) and not is_supported:
            logger.warning("training.%s: not supported on this device (%s), float32 is used instead", name, device)
            del kwargs[name]
    if kwargs.get("bf16") is None:  # trl's own default is true whatever the device
        kwargs["bf16"] = supported["bf16"] and not kwargs.get("fp16")
