"""From the config to trl's GKDConfig: which values it is given, which are attached, and what the device changes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from kdtrain.config import ConfigError, ConfigLoader, arguments
from kdtrain.config.arguments import Hardware, build_train_arguments
from kdtrain.config.options import DistillationOptions
from kdtrain.config.training_fields import training_fields

CPU = Hardware(None, bf16=False, fp16=False, tf32=False)
AMPERE = Hardware("cuda", bf16=True, fp16=True, tf32=True)
TURING = Hardware("cuda", bf16=False, fp16=True, tf32=False)
APPLE = Hardware("mps", bf16=False, fp16=False, tf32=False)


def source(tmp_path: Any, rlhf: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    return {
        "model": {"model": "org/student"},
        "data": {"train": "rows.jsonl", "max_length": 77},
        "rlhf": {"teacher_model": "org/teacher", **(rlhf or {})},
        "training": {"output_dir": str(tmp_path), **training},
    }


class Recorder(SimpleNamespace):
    """Stands for GKDConfig and keeps what its constructor was given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(given=kwargs)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_gkd_config_class", lambda: Recorder)


def given(config: dict[str, Any], hardware: Hardware = CPU) -> dict[str, Any]:
    built = build_train_arguments(ConfigLoader.load(config), hardware)
    return built.training_args.given  # type: ignore[attr-defined, no-any-return]


# Scenarios of the KD weight, with the real GKDConfig.


def test_scenario_default_weight_attachment(tmp_path: Any) -> None:
    args = ConfigLoader.load_training_config(source(tmp_path))
    assert args.llm_kd_weight == 1.0
    assert args.training_args.llm_kd_weight == 1.0
    assert type(args.training_args).__name__ == "GKDConfig"
    assert "llm_kd_weight" not in args.training_args.to_dict()


def test_scenario_positive_weight_supplied(tmp_path: Any) -> None:
    rlhf = {"llm_kd_weight": 0.25, "beta": 0.1, "sft_alpha": 0.3, "lmbda": 0.7, "seq_kd": True}
    args = ConfigLoader.load_training_config(source(tmp_path, rlhf))
    assert args.llm_kd_weight == args.training_args.llm_kd_weight == 0.25
    built = args.training_args
    assert (built.beta, built.sft_alpha, built.lmbda, built.seq_kd) == (0.1, 0.3, 0.7, True)


@pytest.mark.usefixtures("recorded")
def test_scenario_the_constructor_never_sees_our_knobs(tmp_path: Any) -> None:
    rlhf = {"llm_kd_weight": 0.25, "sft_alpha": 0.3, "divergence": "mixed_kl", "kd_temperature": 2, "eval_kd": False}
    args = build_train_arguments(ConfigLoader.load(source(tmp_path, {**rlhf, "teacher": {"tail": "renormalize"}})), CPU)
    kwargs = args.training_args.given  # type: ignore[attr-defined]
    ours = {**rlhf, "tail": "renormalize", "visual_kd": None, "hidden_kd": None}
    assert not set(ours) & set(kwargs)
    assert {name: getattr(args.training_args, name) for name in ours} == ours
    attached = {"generation", "samples_per_prompt", "select", "skew_alpha", "ab_alpha", "ab_beta", "entropy_threshold"}
    attached |= {"cross_tokenizer"}
    fields = set(DistillationOptions.model_fields)
    without = attached | {"select_regex", "token_selection", "token_weights", "on_policy"}
    assert set(kwargs) & fields == fields - set(ours) - without


def test_the_defaults_reach_the_real_class_on_this_machine(tmp_path: Any) -> None:
    built = ConfigLoader.load_training_config(source(tmp_path, max_steps=3, learning_rate=1e-5)).training_args
    assert (built.max_steps, built.learning_rate, built.max_length) == (3, 1e-5, 77)
    assert built.teacher_model_name_or_path == "org/teacher"
    assert built.teacher_model_init_kwargs == {"dtype": "auto"}
    assert built.remove_unused_columns is False
    assert built.dataset_kwargs == {"skip_prepare_dataset": True}
    assert built.logging_nan_inf_filter is False
    assert built.average_tokens_across_devices is True
    assert built.report_to == []


def test_what_the_real_class_refuses_is_a_config_error(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"training: .*logging_steps"):
        ConfigLoader.load_training_config(source(tmp_path, logging_steps=2.5))


def test_the_fields_read_from_source_are_those_of_the_real_class() -> None:
    from dataclasses import fields

    from trl.experimental.gkd import GKDConfig

    assert set(training_fields()) == {field.name for field in fields(GKDConfig) if not field.name.startswith("_")}
    learning_rate = training_fields()["learning_rate"]
    assert learning_rate.help == GKDConfig.__dataclass_fields__["learning_rate"].metadata["help"]


# The rest with a stand-in.


@pytest.mark.usefixtures("recorded")
def test_the_callers_dict_is_copied_before_dtype_is_filled_in(tmp_path: Any) -> None:
    kwargs = {"attn_implementation": "eager"}
    assert given(source(tmp_path, {"teacher_model_init_kwargs": kwargs}))["teacher_model_init_kwargs"] == {
        "dtype": "auto",
        "attn_implementation": "eager",
    }
    assert kwargs == {"attn_implementation": "eager"}
    config = ConfigLoader.load(source(tmp_path, {"teacher_model_init_kwargs": kwargs}))
    build_train_arguments(config, CPU)
    assert config.rlhf.teacher_model_init_kwargs == kwargs
    old_name = {"teacher_model_init_kwargs": {"torch_dtype": "bfloat16"}}
    assert given(source(tmp_path, old_name))["teacher_model_init_kwargs"] == {"dtype": "bfloat16"}
    explicit = {"teacher_model_init_kwargs": {"dtype": "float32"}}
    assert given(source(tmp_path, explicit))["teacher_model_init_kwargs"] == {"dtype": "float32"}


@pytest.mark.usefixtures("recorded")
def test_no_teacher_is_named_where_none_is_needed(tmp_path: Any) -> None:
    assert "teacher_model_name_or_path" not in given(source(tmp_path, {"llm_kd_weight": 0}))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("hardware", "asked", "expected"),
    [
        (CPU, {}, {"bf16": False, "use_cpu": True, "dataloader_pin_memory": False}),
        (CPU, {"bf16": True}, {"bf16": False}),
        (CPU, {"fp16": True}, {"fp16": None, "bf16": False}),
        (CPU, {"tf32": True}, {"tf32": None}),
        (CPU, {"bf16_full_eval": True}, {"bf16_full_eval": None}),
        (CPU, {"use_cpu": False, "dataloader_pin_memory": True}, {"use_cpu": False, "dataloader_pin_memory": True}),
        (AMPERE, {}, {"bf16": True, "use_cpu": None, "dataloader_pin_memory": None}),
        (AMPERE, {"bf16": False}, {"bf16": False}),
        (AMPERE, {"fp16": True}, {"bf16": False, "fp16": True}),
        (AMPERE, {"tf32": True}, {"tf32": True}),
        (AMPERE, {"use_cpu": True}, {"bf16": False, "dataloader_pin_memory": False}),
        (TURING, {"bf16": True}, {"bf16": False}),
        (TURING, {"fp16": True}, {"fp16": True, "bf16": False}),
        (APPLE, {"bf16": True}, {"bf16": False, "use_cpu": None}),
    ],
)
def test_number_formats_fit_the_device(
    hardware: Hardware, asked: dict[str, Any], expected: dict[str, Any], tmp_path: Any
) -> None:
    kwargs = given(source(tmp_path, **asked), hardware)
    assert {name: kwargs.get(name) for name in expected} == expected


@pytest.mark.usefixtures("recorded")
def test_a_format_the_device_lacks_is_a_warning_that_names_the_option(tmp_path: Any, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "kdtrain")
    given(source(tmp_path, bf16=True), CPU)
    (record,) = caplog.records
    assert "training.bf16" in record.getMessage()
    assert "float32" in record.getMessage()


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("limit", "expected"), [(None, None), (1, 2), (5, 5)])
def test_at_least_two_checkpoints_are_kept(limit: int | None, expected: int | None, tmp_path: Any) -> None:
    assert given(source(tmp_path, save_total_limit=limit))["save_total_limit"] == expected


@pytest.mark.usefixtures("recorded")
def test_trackers_are_used_only_where_they_are_asked_for(tmp_path: Any) -> None:
    assert given(source(tmp_path))["report_to"] == "none"
    assert given(source(tmp_path, report_to="tensorboard"))["report_to"] == "tensorboard"


def test_a_secret_in_an_error_of_the_real_class_is_hidden(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: Any) -> None:
        raise ValueError("bad token sk-abc123DEF456ghi")

    monkeypatch.setattr(arguments, "_gkd_config_class", lambda: refuse)
    with pytest.raises(ConfigError) as caught:
        build_train_arguments(ConfigLoader.load(source(tmp_path)), CPU)
    assert "abc123DEF456ghi" not in str(caught.value)
