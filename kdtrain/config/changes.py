"""What may change when a run is resumed: each option's class, and what differs between two configs.

| class | what | of |
|---|---|---|
| `NEVER` | refused, whatever is allowed | what the state of a checkpoint cannot be loaded into |
| `REFUSED` | refused unless named in `--allow-changes` | loss, model, how rows are encoded, optimizer, order of rows |
| `CONTENT` | what it names is compared, not the name | folders, files, hub ids |
| `SAID` | may change, and a line says so | precision, kernels, what evaluations are made on |
| `FREE` | may change | paths, cadence, steps, batch, launching, the network, logs |

Every option has a class, and a test holds that it has; one that is not known here is refused. Needs no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kdtrain.config.training_rules import REFUSED as NOT_TO_BE_SET
from kdtrain.errors import ConfigError

DATA_CONTENT = "data.content"


class Kind(Enum):
    """What becomes of a change."""

    NEVER = "never"
    REFUSED = "refused"
    CONTENT = "content"
    SAID = "said"
    FREE = "free"


NEVER, REFUSED, CONTENT, SAID, FREE = Kind

_ADAPTERS = "the checkpoint's adapters have other shapes, or stand at other modules"
_PARAMETERS = "the checkpoint's optimizer has the state of other parameters"
_REASONS = {
    "tuner.train_type": "an adapter and full weights cannot be loaded into each other",
    "tuner.lora_rank": _ADAPTERS,
    "tuner.target_modules": _ADAPTERS,
    "tuner.modules_to_save": _ADAPTERS,
    "tuner.use_dora": _ADAPTERS,
    "tuner.freeze_llm": _PARAMETERS,
    "tuner.freeze_vit": _PARAMETERS,
    "tuner.freeze_aligner": _PARAMETERS,
    "training.optim": "the checkpoint's optimizer has another state",
    "training.optim_target_modules": _PARAMETERS,
}


def _classes(kind: Kind, section: str, names: str) -> dict[str, Kind]:
    return {f"{section}.{name}": kind for name in names.split()}


def _teacher(section: str) -> dict[str, Kind]:
    return {
        **_classes(CONTENT, section, "adapter revision path"),
        **_classes(REFUSED, section, "backend weights ema_decay dtype quantization processor_kwargs model api"),
        **_classes(REFUSED, section, "chat_template_kwargs prefix prefix_mode top_k tail"),
        **_classes(FREE, section, "device_map placement base_url api_key_env max_requests timeout_s max_retries"),
        **_classes(FREE, section, "concurrency lookahead"),
    }


def _several(section: str) -> dict[str, Kind]:
    own = _classes(CONTENT, section, "teacher_model") | _classes(REFUSED, section, "teacher_model_init_kwargs")
    return _teacher(section) | own


_SOURCE = {"columns": REFUSED, "streaming": REFUSED, "weight": REFUSED, "ce": REFUSED, "answers": REFUSED}
_SOURCE |= {"teacher": REFUSED, "divergence": REFUSED, "beta": REFUSED}
_SOURCE |= {"path": CONTENT, "name": CONTENT, "split": CONTENT, "limit": CONTENT}

# By option, as the schema nests them: `[]` stands for a place in a list, `*` for a name in a map.
CLASSES: dict[str, Kind] = {
    **_classes(CONTENT, "model", "model revision adapter"),
    **_classes(REFUSED, "model", "dtype trust_remote_code quantization quantization_aware init_kwargs"),
    **_classes(SAID, "model", "attn_implementation"),
    **_classes(NEVER, "tuner", "train_type lora_rank target_modules modules_to_save use_dora"),
    **_classes(NEVER, "tuner", "freeze_llm freeze_vit freeze_aligner"),
    **_classes(REFUSED, "tuner", "lora_alpha lora_dropout"),
    "data.train": CONTENT,
    **{f"data.train[].{name}": kind for name, kind in _SOURCE.items()},
    "data.eval": SAID,
    **{f"data.eval[].{name}": SAID for name in _SOURCE},
    **_classes(REFUSED, "data", "max_length on_overlength train_on turns reasoning control_tokens"),
    **_classes(REFUSED, "data", "chat_template_kwargs processor_kwargs"),
    **_classes(CONTENT, "data", "image_root"),
    **_classes(FREE, "data", "max_bad_rows packing padding_free cache_dir"),
    **_classes(CONTENT, "rlhf", "teacher_model"),
    **_classes(REFUSED, "rlhf", "teacher_model_init_kwargs"),
    **_teacher("rlhf.teacher"),
    **_classes(REFUSED, "rlhf", "llm_kd_weight sft_alpha beta divergence kd_temperature lmbda seq_kd temperature"),
    **_several("rlhf.teachers.*"),
    **_classes(REFUSED, "rlhf", "teachers mix"),
    **_classes(REFUSED, "rlhf.on_policy", "divergence beta"),
    **_classes(REFUSED, "rlhf", "skew_alpha ab_alpha ab_beta entropy_threshold cross_tokenizer"),
    **_classes(REFUSED, "rlhf", "token_selection token_selection.by token_selection.keep"),
    **_classes(REFUSED, "rlhf", "token_weights token_weights.top token_weights.share"),
    **_classes(REFUSED, "rlhf", "max_new_tokens max_new_tokens.from max_new_tokens.to max_new_tokens.over"),
    **_classes(REFUSED, "rlhf", "samples_per_prompt select select_regex disable_dropout eval_kd"),
    **_classes(REFUSED, "rlhf.generation", "backend top_p top_k min_p"),
    **_classes(FREE, "rlhf.generation", "batch_size base_url timeout_s group_port gpu_memory_utilization"),
    **_classes(FREE, "rlhf.generation", "tensor_parallel_size max_model_length enable_sleep_mode"),
    **_classes(REFUSED, "custom", "sample_limit"),
    **_classes(REFUSED, "custom.visual_kd", "enabled weight distance targets"),
    **_classes(REFUSED, "custom.visual_kd.targets.*", "weight distance module student_module teacher_module match"),
    **_classes(REFUSED, "custom.hidden_kd", "enabled weight distance targets.layer"),
    **_classes(FREE, "launch", "num_processes config_file num_machines machine_rank main_process_ip main_process_port"),
    "training": REFUSED,
    **_classes(NEVER, "training", "optim optim_target_modules"),
    **_classes(REFUSED, "training", "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args"),
    **_classes(REFUSED, "training", "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm"),
    **_classes(REFUSED, "training", "neftune_noise_alpha router_aux_loss_coef"),
    **_classes(REFUSED, "training", "seed data_seed train_sampling_strategy dataloader_drop_last"),
    **_classes(SAID, "training", "bf16 fp16 bf16_full_eval fp16_full_eval tf32"),
    **_classes(SAID, "training", "torch_compile torch_compile_backend torch_compile_mode use_cpu"),
    **_classes(FREE, "training", "output_dir max_steps num_train_epochs per_device_train_batch_size"),
    **_classes(FREE, "training", "gradient_accumulation_steps per_device_eval_batch_size"),
    **_classes(FREE, "training", "logging_strategy logging_steps logging_first_step log_on_each_node log_level"),
    **_classes(FREE, "training", "log_level_replica include_num_input_tokens_seen disable_tqdm skip_memory_metrics"),
    **_classes(FREE, "training", "report_to run_name project trackio_space_id trackio_bucket_id"),
    **_classes(FREE, "training", "trackio_static_space_id report log_completions_steps debug per_device_train_tokens"),
    **_classes(FREE, "training", "eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches"),
    **_classes(FREE, "training", "eval_use_gather_object eval_accumulation_steps early_stopping_patience"),
    **_classes(FREE, "training", "load_best_model_at_end metric_for_best_model greater_is_better"),
    **_classes(FREE, "training", "save_only_model save_strategy save_steps save_on_each_node save_total_limit"),
    **_classes(FREE, "training", "push_to_hub hub_private_repo hub_model_id hub_strategy hub_always_push"),
    **_classes(FREE, "training", "hub_revision ignore_data_skip restore_callback_states_from_checkpoint"),
    **_classes(FREE, "training", "activation_checkpointing activation_checkpointing_kwargs activation_offloading"),
    **_classes(FREE, "training", "gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps"),
    **_classes(FREE, "training", "full_determinism accelerator_config pad_to_multiple_of dataset_num_proc"),
    **_classes(FREE, "training", "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers"),
    **_classes(FREE, "training", "dataloader_prefetch_factor dataloader_multiprocessing_context"),
    **_classes(FREE, "training", "dataloader_in_order remove_unused_columns length_column_name"),
    **_classes(FREE, "training", "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers"),
    **_classes(FREE, "training", "ddp_static_graph ddp_backend ddp_timeout do_train do_eval do_predict"),
    # Whether the state can be loaded is seen from the checkpoint: `trainer/resume_checks.py`.
    **_classes(FREE, "training", "fsdp fsdp_config deepspeed"),
}
# Fields of GKDConfig that a config can set to harmless values alone.
CLASSES |= {f"training.{name}": FREE for name in NOT_TO_BE_SET if f"training.{name}" not in CLASSES}

# Whose state is the same, so that one goes on with the other's.
_SAME_OPTIMIZER = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Change:
    """Something that is another thing than it was."""

    key: str
    """The option, or `data.content`."""
    before: Any
    now: Any
    kind: Kind
    note: str = ""
    """In words, where the values alone do not say it; of `NEVER`, why."""


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """The options of two configs, as `RunConfig.model_dump(mode="json")`, that differ, in the order of the schema.

    Left out is what may change without a word, what only one of them sets in `training` (the other's default may be the
    same, see `training_changes`), and options that another version did not have.
    """
    for key, then, here in _differences(before, now):
        if (kind := class_of(key)) is not FREE:
            yield _change(key, then, here, kind)


def training_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """The fields of GKDConfig that differ, defaults filled in; names without their section."""
    for name, value in now.items():
        if name in before and not _same(before[name], value) and (kind := class_of(f"training.{name}")) is not FREE:
            yield _change(f"training.{name}", before[name], value, kind)


def compared_fields() -> list[str]:
    """The fields of GKDConfig whose changes are not free."""
    named = (key.partition(".") for key, kind in CLASSES.items() if kind is not FREE)
    return [name for section, _, name in named if section == "training" and name]


def class_of(key: str) -> Kind:
    """The class of an option by its key, such as `data.train[0].weight`; `REFUSED` where it is not known."""
    option = _option(key)
    while option not in CLASSES and "." in option:
        option = option.rpartition(".")[0]  # a name in a map that the schema does not look into
    return CLASSES.get(option, REFUSED)


def checked_names(text: Sequence[str]) -> tuple[str, ...]:
    """The names of `--allow-changes`: options, sections, or `data.content`.

    Args:
        text: each with one name, or several with commas between them.

    Raises:
        ConfigError: a name is none of them.
    """
    names = [name.strip() for part in text for name in part.split(",") if name.strip()]
    known = allowable()
    for name in names:
        if _option(name) not in known:
            near = difflib.get_close_matches(name, known, n=1) or [one for one in known if one.endswith(f".{name}")]
            hint = f"did you mean {near[0]}?" if near else "an option such as rlhf.beta, a section, or data.content"
            raise ConfigError(f"--allow-changes: there is no option {name!r}: {hint}")
    return tuple(dict.fromkeys(names))


def allowable() -> list[str]:
    """Every option, what options stand in, and `data.content`."""
    names: dict[str, None] = {DATA_CONTENT: None}
    for option in CLASSES:
        parts = option.split(".")
        names |= {".".join(parts[:count]).removesuffix("[]"): None for count in range(1, len(parts) + 1)}
    return list(names)


def is_allowed(change: Change, names: Sequence[str]) -> bool:
    """Whether a change is named, by its option or by a section that it stands in."""
    keys = {change.key, _option(change.key)}
    if change.key == DATA_CONTENT or (class_of(change.key) is CONTENT and change.key.startswith("data.")):
        keys |= {DATA_CONTENT, "data.train"}
    return any(name in keys or change.key.startswith((f"{name}.", f"{name}[")) for name in names)


def _change(key: str, before: Any, now: Any, kind: Kind) -> Change:
    if key == "training.optim" and {before, now} <= set(_SAME_OPTIMIZER):
        kind = REFUSED
    note = _REASONS.get(_option(key), "its state cannot be loaded") if kind is NEVER else ""
    return Change(key, before, now, kind, note)


def _option(key: str) -> str:
    """`data.train[0].path` as `data.train[].path`, `custom.visual_kd.targets.vit.weight` with `*` for the name."""
    option = re.sub(r"\[\d+\]", "[]", key)
    return re.sub(r"^(custom\.visual_kd\.targets|rlhf\.teachers)\.[^.]+", r"\1.*", option)


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys that have a class, with their values in both, where those differ: `rlhf.beta`, 0.5, 0.3."""
    option = _option(key)
    if isinstance(before, Mapping) and isinstance(now, Mapping) and (not key or _has_parts(option)):
        for name in {**now, **before}:
            path = f"{key}.{name}".lstrip(".")
            if name in before and name in now:
                yield from _differences(before[name], now[name], path)
            elif _has_parts(f"{option}.*"):  # a map of names: one more, or one less
                yield path, before.get(name), now.get(name)
    elif isinstance(before, list | tuple) and isinstance(now, list | tuple) and f"{option}[].path" in CLASSES:
        if len(before) != len(now):
            yield key, f"{len(before)} sources", f"{len(now)} sources"
        for number, pair in enumerate(zip(before, now, strict=False)):
            yield from _differences(*pair, f"{key}[{number}]")
    elif not _same(before, now):
        yield key, before, now


def _has_parts(option: str) -> bool:
    return any(one.startswith((f"{option}.", f"{option}[")) for one in CLASSES)


def _same(before: Any, now: Any) -> bool:
    """A tuple of a config is a list in JSON; true is not 1."""
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        return len(before) == len(now) and all(map(_same, before, now))
    return bool(before == now) and isinstance(before, bool) == isinstance(now, bool)
