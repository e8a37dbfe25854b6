"""From a config to what decides the memory of its run; the models' configs are read, and none of their weights."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from kdtrain.config import RunConfig
from kdtrain.config.adapters import continued_adapter, is_adapter_folder, model_below
from kdtrain.config.arguments import teacher_loading
from kdtrain.config.schema import Placement
from kdtrain.models.loading import load_config, resolve_dtype, trust_policy
from kdtrain.models.quantization import bits_said
from kdtrain.preflight.memory import Setup, Writing
from kdtrain.preflight.sharding import sharding_of
from kdtrain.preflight.simulated import ModelSetup, NotSimulated, Shape, weights_of

if TYPE_CHECKING:
    from trl.experimental.gkd import GKDConfig

_PLANNED = torch.device("meta")
"""A device that is not here: it is taken to compute in half precision."""


def setup_of(
    config: RunConfig,
    args: GKDConfig,
    *,
    world: int = 1,
    on_cpu: bool = True,
    longest: int | None = None,
    longest_prompt: int | None = None,
) -> Setup:
    """What decides the memory of a run.

    Args:
        args: of `build_train_arguments`, on whatever device this is.
        world: devices, one process each.
        on_cpu: whether the run is on the CPU, wherever this is asked.
        longest: tokens of the longest row; None is `data.max_length`.
        longest_prompt: tokens of the longest prompt; None is what leaves room for an answer in such a row.

    Raises:
        PreflightError: a model's config cannot be read.
    """
    options = config.options
    device = args.device if on_cpu or args.device.type != "cpu" else _PLANNED
    student = _student(config, device)
    views = list(config.by_teacher.values())
    models = [(one, view) for view in views if (one := _teacher(view, device)) is not None]
    if len(models) > 1:  # the largest first
        with suppress(NotSimulated):  # the findings say it
            models = sorted(models, key=lambda pair: -weights_of(pair[0])[0])
    teacher: ModelSetup | None = None
    placement: Placement = "auto"
    if models:
        teacher, placement = models[0][0], models[0][1].rlhf.teacher.placement
    asks_itself = any(view.rlhf.teacher.backend == "self" for view in views)
    row, prompt, new_tokens = longest or config.data.max_length, longest_prompt, options.most_new_tokens
    own = options.lm_kd_active and options.lmbda > 0 and options.generation.backend == "transformers"
    by_teacher = teacher is not None and options.lm_kd_active and options.seq_kd and options.lmbda < 1
    prompt = max(row - new_tokens, 1) if prompt is None else prompt
    if (options.lm_kd_active and options.lmbda > 0) or by_teacher:
        row = max(row, prompt + new_tokens)
    samples = options.samples_per_prompt if options.lm_kd_active and options.lmbda > 0 else 1
    rows, micro_batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    asked = teacher or (student if asks_itself and options.lm_kd_active else None)
    of_forward = rows * (1 if options.select == "best" else samples)
    forward_rows, length = _forward(config, of_forward, of_forward * micro_batches, max(row, 2), rows)
    shape = Shape(
        rows=forward_rows,
        length=length,
        micro_batches=micro_batches,
        checkpointing=bool(args.gradient_checkpointing),
        checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        autocast=_autocast(config, args, on_cpu),
        teacher_width=None if asked is None else asked.config.get_text_config().hidden_size,
        on_cpu=on_cpu,
        in_lines=config.data.packing or config.data.padding_free,
        joined=config.data.padding_free and not config.data.packing,
        parts=_parts(config, of_forward),
    )
    asked_rows = forward_rows * samples if options.select == "best" else forward_rows
    return Setup(
        student=student,
        teacher=teacher,
        tuner=config.tuner,
        shape=shape,
        per_device_rows=rows,
        teacher_rows=0 if asked is None else asked_rows,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        moving_average=asks_itself and any(view.rlhf.teacher.weights == "ema" for view in views),
        student_writes=_writing(options.generation.batch_size, rows * micro_batches * samples, prompt, new_tokens)
        if own
        else None,
        teacher_writes=_writing(None, rows * micro_batches, prompt, new_tokens) if by_teacher else None,
        world=world,
        sharding=sharding_of(config),
        placement=placement,
        other_teachers=tuple((one, view.rlhf.teacher.placement) for one, view in models[1:]),
        mixes=config.rlhf.mix is not None and len(models) + asks_itself > 1,
    )


def _forward(config: RunConfig, rows: int, of_step: int, longest: int, per_device: int) -> tuple[int, int]:
    """Rows, or lines, of the largest forward, and their length.

    Args:
        rows: of a micro-batch.
        of_step: on this device.
        longest: row, in tokens.
        per_device: `per_device_train_batch_size`, the lines of a forward.
    """
    most, length = config.training_options.per_device_train_tokens, longest
    if config.data.packing:
        length = min(max(config.data.max_length, longest), of_step * longest)
        rows = min(per_device, -(-of_step * longest // length))
    if most is not None:
        rows = max(most // length, 1)
    return rows, length


def _parts(config: RunConfig, rows: int) -> int:
    """Parts of a micro-batch's loss, see `trainer/parts.py`: rows of one teacher."""
    teachers = {source.teacher for source in config.data.train}
    if config.rlhf.teachers and config.rlhf.mix is None:  # any row may name one
        teachers = set(config.rlhf.teachers)
    elif config.rlhf.mix is not None:
        teachers = {None}
    return max(len(teachers) if config.data.packing else min(len(teachers), rows), 1)


def _writing(per_call: int | None, rows: int, prompt: int, new_tokens: int) -> Writing:
    return Writing(rows, per_call, prompt, new_tokens)


def _student(config: RunConfig, device: torch.device) -> ModelSetup:
    options = config.model
    found = load_config(model_below(options.model), trust_policy(options.trust_remote_code, options.revision))
    requested = str(options.init_kwargs.get("dtype") or options.dtype).removeprefix("torch.")
    dtype = resolve_dtype(requested, _checkpoint(found), config.tuner.train_type == "full", device)
    return ModelSetup(
        found,
        dtype,
        options.attn_implementation,
        options.trust_remote_code,
        continued_adapter(config),
        options.quantization or bits_said(getattr(found, "quantization_config", None)),
    )


def _teacher(config: RunConfig, device: torch.device) -> ModelSetup | None:
    """The model that is loaded beside the student while it trains."""
    options, name = config.rlhf.teacher, config.rlhf.teacher_model
    if not config.options.needs_teacher or options.backend != "hf" or name is None or options.device_map is not None:
        return None
    kwargs = teacher_loading(config)
    adapter = options.adapter or (name if is_adapter_folder(name) else None)
    found = load_config(
        model_below(name), trust_policy(config.model.trust_remote_code, kwargs.get("revision") or options.revision)
    )
    dtype = resolve_dtype(str(kwargs.get("dtype") or "auto").removeprefix("torch."), _checkpoint(found), False, device)
    said = kwargs.get("quantization_config") or getattr(found, "quantization_config", None)
    return ModelSetup(
        found,
        dtype,
        kwargs.get("attn_implementation"),
        config.model.trust_remote_code,
        adapter,
        options.quantization or bits_said(said),
    )


def _checkpoint(config: PreTrainedConfig) -> torch.dtype | None:
    return config.dtype or config.get_text_config().dtype


def _autocast(config: RunConfig, args: GKDConfig, on_cpu: bool) -> torch.dtype | None:
    """Of a GPU that is not here, what the config says of it: bf16 unless it says otherwise."""
    here = {"bf16": args.bf16, "fp16": args.fp16}
    if not on_cpu and args.device.type == "cpu":
        fp16 = bool(config.training.get("fp16"))
        here = {"fp16": fp16, "bf16": bool(config.training.get("bf16", not fp16))}
    return torch.bfloat16 if here["bf16"] else torch.float16 if here["fp16"] else None
