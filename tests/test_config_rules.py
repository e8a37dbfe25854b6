"""Single options and how they go together: types, ranges, unknown keys, conflicts, options without effect."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from kdtrain.config import Diagnostic, check_config, json_schema
from kdtrain.config.suggest import known_keys
from kdtrain.config.training_fields import training_fields
from kdtrain.config.training_rules import REFUSED

GOOD: dict[str, Any] = {
    "model": {"model": "org/student"},
    "data": {"train": "rows.jsonl"},
    "rlhf": {"teacher_model": "org/teacher"},
    "training": {"output_dir": "runs/x"},
}


def config(**changes: Any) -> dict[str, Any]:
    """GOOD with changes given as `section__option=value`."""
    result = copy.deepcopy(GOOD)
    for name, value in changes.items():
        *sections, option = name.split("__")
        holder = result
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[option] = value
    return result


def errors(source: Any) -> dict[str, str]:
    return {error.path: f"{error.message} | {error.hint}" for error in check_config(source).errors}


def warnings(source: Any) -> list[Diagnostic]:
    result = check_config(source)
    assert not result.errors, [error.headline for error in result.errors]
    return result.warnings


def test_a_plain_config_has_neither_errors_nor_warnings() -> None:
    assert warnings(GOOD) == []


def test_a_learning_rate_that_lacks_its_minus_is_told() -> None:
    (warning,) = warnings(config(training__learning_rate=1e4))
    assert (warning.path, warning.hint) == ("training.learning_rate", "the minus may be missing: 1e-4 is 0.0001")
    assert not warnings(config(training__learning_rate=0.6))


WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("rlhf__beta", True, "expected a number, got the boolean true"),
    ("rlhf__beta", "0.5", "expected a number, got text '0.5' | remove the quotes"),
    ("rlhf__beta", "nan", "expected a number, got text 'nan' | give a finite number"),
    ("rlhf__beta", 1.1, "at most 1, got 1.1"),
    ("rlhf__beta", -0.1, "non-negative, got -0.1"),
    ("rlhf__beta", float("nan"), "not a finite number"),
    ("rlhf__beta", 10**400, "too large"),
    ("rlhf__lmbda", 2, "at most 1"),
    ("rlhf__llm_kd_weight", -0.1, "must be non-negative, got -0.1"),
    ("rlhf__llm_kd_weight", float("inf"), "not a finite number"),
    ("rlhf__sft_alpha", -1, "must be non-negative"),
    ("rlhf__kd_temperature", 0, "above 0"),
    ("rlhf__temperature", 0, "above 0"),
    ("rlhf__temperature", 1.5, "at most 1"),
    ("rlhf__max_new_tokens", 0, "at least 1"),
    (
        "rlhf__max_new_tokens",
        [4, 8],
        "expected a whole number, got a list | or write a limit that grows",
    ),
    ("rlhf__max_new_tokens", 12.5, "expected a whole number, got the number 12.5"),
    (
        "rlhf__divergence",
        "jsd_scale",
        "entropy_aware, tvd, got text 'jsd_scale' | did you mean",
    ),
    ("rlhf__rlhf_type", "dpo", "expected gkd, got text 'dpo'"),
    ("rlhf__token_selection", "student_entropy", "expected a map, got text 'student_entropy'"),
    ("rlhf__token_selection__by", "entropy", "expected one of student_entropy, disagreement, got text 'entropy'"),
    ("rlhf__token_selection__keep", 0, "must be above 0"),
    ("rlhf__token_selection__keep", 1.5, "at most 1"),
    ("rlhf__token_weights__by", "entropy", "expected visual_reliance, got text 'entropy'"),
    ("rlhf__token_weights__top", 1, "below 1"),
    ("rlhf__token_weights__share", 0, "must be above 0"),
    ("rlhf__seq_kd", "no", "expected true or false, got text 'no' | write false"),
    ("rlhf__seq_kd", 1, "expected true or false, got the number 1"),
    ("rlhf__teacher", 3, "expected a map"),
    ("rlhf__teacher_model", "", "must not be empty"),
    ("model__model", 3, "expected text, got the number 3"),
    ("model__dtype", "bf16", "expected one of auto, float32"),
    ("tuner__lora_rank", 0, "at least 1"),
    ("tuner__lora_dropout", 1, "below 1"),
    ("tuner__target_modules", 3, "a name or a list of names"),
    ("tuner__modules_to_save", "lm_head", "expected a list of names"),
    ("data__max_length", "long", "expected a whole number"),
    ("data__max_bad_rows", -1, "non-negative"),
    ("data__train", 5, "expected a path, a hub id"),
    ("data__train", [], "at least one"),
    ("data__on_overlength", "cut", "expected one of error, truncate, drop"),
    ("custom__sample_limit", 0, "at least 1"),
    ("custom__visual_kd__targets", ["vit", "lm"], "the targets are vit, aligner, deepstack"),
    ("custom__visual_kd__targets", ["vit", "vit"], "twice"),
    ("custom__visual_kd__weight", -1, "non-negative"),
    ("launch__num_processes", 0, "at least 1"),
    ("training__learning_rate", "abc", "expected a number, got text 'abc'"),
    ("training__learning_rate", True, "got the boolean true"),
    ("training__learning_rate", -1.0, "non-negative"),
    ("training__max_steps", 1000.0, "expected a whole number, got the number 1000.0 | write 1000"),
    ("training__max_steps", 0, "-1 for no limit"),
    ("training__max_steps", -2, "-1 for no limit"),
    ("training__per_device_train_batch_size", 0, "at least 1"),
    ("training__optim", "adamw", "did you mean 'adamw_torch'"),
    ("training__lr_scheduler_type", "cosin", "did you mean 'cosine'"),
    ("training__eval_strategy", "step", "expected one of no, steps, epoch"),
    ("training__save_strategy", False, "expected text, got the boolean false"),
    ("training__bf16", "yes", "write true"),
    ("training__report_to", 3, "expected text or a list"),
    ("training", [1], "expected a map, got a list"),
    ("data", "rows.jsonl", "expected a map, got text"),
]


@pytest.mark.parametrize(("option", "value", "expected"), WRONG_VALUES)
def test_a_wrong_value_is_one_error_that_says_what_was_expected(option: str, value: Any, expected: str) -> None:
    found = errors(config(**{option: value}))
    assert list(found) == [option.replace("__", ".")]
    assert expected in found[option.replace("__", ".")]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rlhf__beta", 1),
        ("rlhf__llm_kd_weight", 0.25),
        ("tuner__lora_alpha", 8),
        ("training__warmup_steps", 0.1),
        ("training__num_train_epochs", 3),
        ("training__report_to", ["tensorboard"]),
        ("training__bf16", None),
        ("training__lr_scheduler_kwargs", {"num_cycles": 2}),
        ("rlhf", {"teacher_model": "org/t", "teacher": {"backend": "hf", "dtype": "bfloat16"}}),
        ("tuner", None),
        ("tuner", {"freeze_llm": True, "freeze_vit": True}),
        ("data__train", [{"path": "a.jsonl", "weight": 2, "ce": False, "limit": 5}, "org/rows"]),
    ],
)
def test_right_values_pass(option: str, value: Any) -> None:
    assert errors(config(**{option: value})) == {}


UNKNOWN: list[tuple[str, str]] = [
    ("rlhf__lambda", "did you mean rlhf.lmbda?"),
    ("rlhf__learning_rate", "move it to training.learning_rate"),
    ("data__beta", "move it to rlhf.beta"),
    ("beta", "move it to rlhf.beta"),
    ("model__lora_rank", "move it to tuner.lora_rank"),
    ("tuner__teacher_model", "move it to rlhf.teacher_model"),
    ("rlhf__num_processes", "move it to launch.num_processes"),
    ("training__llm_kd_weight", "move it to rlhf.llm_kd_weight"),
    ("training__learning_rat", "did you mean training.learning_rate?"),
    ("training__lr", "use training.learning_rate"),
    ("training__warmup_ratio", "warmup_steps"),
    ("data__lerning_rate", "did you mean training.learning_rate?"),
    ("modle", "did you mean model?"),
    ("rlhf.beta", "nest it, one level per dot: rlhf: {beta: ...}"),
    ("rlhf__teacher__base_ulr", "did you mean rlhf.teacher.base_url?"),
    ("custom__visual_kd__wieght", "did you mean custom.visual_kd.weight?"),
    ("training__teacher_model_name_or_path", "use rlhf.teacher_model"),
    ("training__model_init_kwargs", "use model.init_kwargs"),
    ("training__trust_remote_code", "move it to model.trust_remote_code"),
    *((f"training__{key}", f"move it to data.{key}") for key in ("max_length", "packing", "padding_free")),
    *(
        (f"training__{key}", f"move it to rlhf.{key}")
        for key in (
            "beta",
            "lmbda",
            "temperature",
            "seq_kd",
            "max_new_tokens",
            "disable_dropout",
            "teacher_model_init_kwargs",
        )
    ),
]


@pytest.mark.parametrize(("option", "hint"), UNKNOWN)
def test_an_unknown_or_misplaced_key_is_an_error_that_names_the_right_one(option: str, hint: str) -> None:
    found = errors(config(**{option: 1}))
    assert list(found) == [option.replace("__", ".")]
    assert hint in found[option.replace("__", ".")]


def test_a_key_like_nothing_known_is_still_an_error() -> None:
    assert "unknown key" in errors(config(rlhf__zzz=1))["rlhf.zzz"]
    assert "unknown key" in errors(config(data__train=[{"path": "a.jsonl", "zzz": 1}]))["data.train[0].zzz"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_breaks_a_run_is_refused_with_the_reason(name: str) -> None:
    value = {True: False, False: True}.get(REFUSED[name].harmless[0], "x")
    found = errors(config(**{f"training__{name}": value}))
    assert list(found) == [f"training.{name}"]
    assert REFUSED[name].reason in found[f"training.{name}"]
    for harmless in REFUSED[name].harmless:
        assert errors(config(**{f"training__{name}": harmless})) == {}


def test_a_boolean_is_not_the_harmless_number() -> None:
    assert "training.label_smoothing_factor" in errors(config(training__label_smoothing_factor=False))


def test_every_refused_field_is_a_field_of_the_installed_trl() -> None:
    assert set(REFUSED) <= set(training_fields())


STREAM = {"path": "a.jsonl", "streaming": True}
STEPS = {"training__max_steps": 5}


@pytest.mark.parametrize(
    ("changed", "where", "message"),
    [
        ({}, "training.max_steps", "nobody knows how many rows and epochs"),
        ({"training__num_train_epochs": 2}, "training.num_train_epochs", "set training.max_steps"),
        ({**STEPS, "data__train": [STREAM, "b.jsonl"]}, "data.train[1]", "for all sources of data.train, or for none"),
        ({**STEPS, "data__train": [STREAM | {"split": "train[:9]"}]}, "data.train[0].split", "use limit"),
        ({**STEPS, "data__train": [STREAM | {"answers": "teacher"}]}, "data.train[0].answers", "rlhf.seq_kd: true"),
        ({**STEPS, "data__eval": [{"path": "c.jsonl", "streaming": True}]}, "data.eval[0].streaming", "use limit"),
        ({**STEPS, "data__eval": "5%"}, "data.eval", "name rows of their own"),
        ({**STEPS, "training__save_strategy": "epoch"}, "training.save_strategy", "has no epochs"),
        (
            {**STEPS, "training__train_sampling_strategy": "group_by_length"},
            "training.train_sampling_strategy",
            "rows of like length",
        ),
        ({**STEPS, "custom__sample_limit": 5}, "custom.sample_limit", "use limit of the source"),
    ],
)
def test_what_counts_on_the_number_of_rows_is_refused_beside_a_stream(
    changed: dict[str, Any], where: str, message: str
) -> None:
    found = errors(config(**{"data__train": [STREAM], **changed}))
    assert list(found) == [where]
    assert message in found[where]
    assert not errors(config(data__train=[STREAM], **STEPS))


QLORA = {"model__quantization": "4bit", "tuner__train_type": "lora"}
AWARE = {"model__quantization_aware": "int4"}
OF_TEACHER = "rlhf.teacher_model_init_kwargs.quantization_config"
WEIGHTS = "rlhf.token_weights"
RELIANCE = {"rlhf__token_weights": {"by": "visual_reliance"}}
CONFLICTS: list[tuple[dict[str, Any], str, str]] = [
    ({"model__quantization": "8bit"}, "model.quantization", "8bit needs tuner.train_type: lora"),
    ({**QLORA, "training__fsdp": "full_shard"}, "training.fsdp", "a quantised student cannot be cut into pieces"),
    ({**AWARE, "tuner__train_type": "lora"}, "model.quantization_aware", "needs tuner.train_type: full"),
    ({**AWARE, "training__fsdp": "full_shard"}, "training.fsdp", "not available yet beside model.quantization_aware"),
    (
        {**AWARE, "rlhf__lmbda": 0.5, "rlhf__generation__backend": "vllm_colocate"},
        "model.quantization_aware",
        "vLLM gets weights, and they are rounded here alone",
    ),
    (
        {"rlhf__teacher__quantization": "4bit", "rlhf__teacher_model_init_kwargs": {"quantization_config": {}}},
        OF_TEACHER,
        "given together with rlhf.teacher.quantization",
    ),
    (
        {"rlhf__teacher": {"placement": "sharded", "quantization": "4bit"}},
        "rlhf.teacher.placement",
        "sharded cannot be combined with rlhf.teacher.quantization",
    ),
    (
        {"rlhf__teacher": {"placement": "replicated", "device_map": "auto"}},
        "rlhf.teacher.placement",
        "replicated cannot be combined with rlhf.teacher.device_map",
    ),
    (
        {"rlhf__teacher__placement": "cpu_offload", "training__use_cpu": True},
        "rlhf.teacher.placement",
        "moves weights between CPU and GPU, and training.use_cpu is true",
    ),
    (
        {"rlhf__teacher__placement": "sharded", "data__train": [{"path": "a.jsonl", "answers": "teacher"}]},
        "rlhf.teacher.placement",
        "cannot be combined with answers: teacher yet",
    ),
    (
        {"data__packing": True, "training__neftune_noise_alpha": 5.0},
        "data.packing",
        "cannot be beside training.neftune_noise_alpha",
    ),
    (
        {"data__padding_free": True, "custom__visual_kd": {"enabled": True, "targets": {"vit": {"weight": 1.0}}}},
        "data.padding_free",
        "is for text, and custom.visual_kd needs rows with images",
    ),
    ({"rlhf": {}}, "rlhf.teacher_model", "a teacher is needed, because rlhf.llm_kd_weight is 1"),
    ({"rlhf": {"llm_kd_weight": 0.25}}, "rlhf.teacher_model", "llm_kd_weight is 0.25"),
    ({"model": {}}, "model.model", "is required"),
    ({"data": {}}, "data.train", "is required"),
    ({"training": {}}, "training.output_dir", "is required"),
    ({"training__eval_strategy": "steps"}, "training.eval_strategy", "without data"),
    ({"training__bf16": True, "training__fp16": True}, "training.fp16", "cannot be combined"),
    ({"training__load_best_model_at_end": True}, "training.load_best_model_at_end", "needs evaluation"),
    ({"training__dataloader_prefetch_factor": 2}, "training.dataloader_prefetch_factor", "dataloader_num_workers"),
    ({"model__init_kwargs": {"dtype": "auto"}}, "model.init_kwargs.dtype", "use model.dtype"),
    ({"model__init_kwargs": {"trust_remote_code": True}}, "model.init_kwargs.trust_remote_code", "one place"),
    ({"model__init_kwargs": {"torch_dtype": "auto"}}, "model.init_kwargs.torch_dtype", "use model.dtype"),
    (
        {"model__init_kwargs": {"ignore_mismatched_sizes": True}},
        "model.init_kwargs.ignore_mismatched_sizes",
        "random numbers",
    ),
    ({"model__init_kwargs": {"config": {}}}, "model.init_kwargs.config", "named in its own option"),
    (
        {"rlhf__teacher_model_init_kwargs": {"dtype": "bfloat17"}},
        "rlhf.teacher_model_init_kwargs.dtype",
        "expected one of auto, float32, bfloat16, float16, got text 'bfloat17' | did you mean 'bfloat16'?",
    ),
    (
        {"rlhf__teacher_model_init_kwargs": {"dtype": ""}},
        "rlhf.teacher_model_init_kwargs.dtype",
        "expected one of auto, float32, bfloat16, float16, got text ''",
    ),
    (
        {"rlhf__teacher_model_init_kwargs": {"torch_dtype": 16}},
        "rlhf.teacher_model_init_kwargs.torch_dtype",
        "expected one of auto, float32, bfloat16, float16, got the number 16",
    ),
    (
        {"rlhf__teacher_model_init_kwargs": {"dtype": "auto", "torch_dtype": "auto"}},
        "rlhf.teacher_model_init_kwargs.torch_dtype",
        "given twice",
    ),
    (
        {"rlhf__teacher_model_init_kwargs": {"torch_dtype": "auto"}, "rlhf__teacher": {"dtype": "float32"}},
        "rlhf.teacher_model_init_kwargs.torch_dtype",
        "given twice, here and in rlhf.teacher.dtype",
    ),
    ({"model__init_kwargs": {"use_safetensors": False}}, "model.init_kwargs.use_safetensors", "safetensors only"),
    (
        {"rlhf__teacher_model_init_kwargs": {"trust_remote_code": True}},
        "rlhf.teacher_model_init_kwargs.trust_remote_code",
        "use model.trust_remote_code",
    ),
    (
        {"rlhf__teacher_model_init_kwargs": {"dtype": "auto"}, "rlhf__teacher": {"dtype": "float32"}},
        "rlhf.teacher_model_init_kwargs.dtype",
        "given twice",
    ),
]

ITSELF = {"backend": "self"}
_SERVED = {"backend": "vllm", "base_url": "http://127.0.0.1:9/v1", "model": "teacher", "tail": "renormalize"}
CONFLICTS += [
    (
        {"rlhf__divergence": "alpha_beta", "rlhf__ab_alpha": -1, "rlhf__ab_beta": 0.5},
        "rlhf.ab_alpha",
        "plus rlhf.ab_beta must not be negative, and is -0.5",
    ),
    (
        {"rlhf__divergence": "tvd", "rlhf__teacher": _SERVED},
        "rlhf.teacher.tail",
        "must be bucket: tvd cannot do without the tail",
    ),
    ({"rlhf": {"teacher": ITSELF}}, "rlhf.teacher.weights", "base needs tuner.train_type: lora"),
    ({"rlhf": {"teacher": {**ITSELF, "weights": "live"}}}, "rlhf.teacher.weights", "their divergence is 0"),
    (
        {"rlhf": {"teacher": {**ITSELF, "weights": "live"}, "llm_kd_weight": 0}, "custom__hidden_kd__enabled": True},
        "rlhf.teacher.weights",
        "live teaches nothing",
    ),
    ({"rlhf": {"llm_kd_weight": 0}, "custom__hidden_kd__enabled": True}, "rlhf.teacher_model", "hidden_kd is enabled"),
    (
        {"rlhf": {"teacher": ITSELF}, "tuner__train_type": "lora", "custom__visual_kd__enabled": True},
        "rlhf.teacher.backend",
        "features are those of the same modules",
    ),
    ({"rlhf": {"teacher": {**ITSELF, "weights": "ema", "ema_decay": 1}}}, "rlhf.teacher.ema_decay", "must be below 1"),
    ({**RELIANCE, "rlhf__token_selection": {"keep": 0.5}}, WEIGHTS, "one weighs all tokens of a row, the other leaves"),
    ({**RELIANCE, "data__packing": True}, WEIGHTS, "is for rows with images, and data.packing for text"),
    ({**RELIANCE, "rlhf__cross_tokenizer": "alm"}, WEIGHTS, "not available yet beside rlhf.cross_tokenizer"),
    (
        {"rlhf": {"teachers": {"a": {"teacher_model": "org/a"}, "b": {"teacher_model": "org/b"}}, "token_weights": {}}},
        WEIGHTS,
        "not available yet beside rlhf.teachers",
    ),
    (
        {"rlhf": {"teacher": {"backend": "vllm", "base_url": "http://h/v1", "model": "m"}, "token_weights": {}}},
        WEIGHTS,
        "not available yet with rlhf.teacher.backend: vllm: a server is not asked about other images yet",
    ),
    (
        {"rlhf": {"teacher": {**ITSELF, "weights": "ema"}, "token_weights": {}}},
        WEIGHTS,
        "the student itself is not asked",
    ),
]


@pytest.mark.parametrize(("changes", "path", "expected"), CONFLICTS)
def test_options_that_cannot_go_together_are_an_error(changes: dict[str, Any], path: str, expected: str) -> None:
    found = errors(config(**changes))
    assert list(found) == [path]
    assert expected in found[path]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"from": 8, "to": 8, "over": 1}, {}),
        (
            {"from": 64, "to": 8, "over": 0.3},
            {"to": "must be at least from (64), got 8: the limit grows from one to the"},
        ),
        ({"from": 64, "to": 512}, {"over": "is required | the share of all steps over which it grows, such as 0.3"}),
        ({"from": 0, "to": 2, "over": 0}, {"from": "must be at least 1, got 0", "over": "must be above 0, got 0"}),
        ({"from": 1, "to": 2.5, "over": 30}, {"to": "whole number, got the number 2.5", "over": "at most 1, got 30"}),
        ({"form": 1, "to": 2, "over": 1}, {"form": "did you mean rlhf.max_new_tokens.from?", "from": "is required"}),
        ({}, {"from": "is required", "to": "is required", "over": "is required"}),
    ],
)
def test_each_part_of_a_growing_limit_is_checked_where_it_stands(value: Any, expected: dict[str, str]) -> None:
    found = errors(config(rlhf__max_new_tokens=value))
    assert set(found) == {f"rlhf.max_new_tokens.{name}" for name in expected}
    for name, text in expected.items():
        assert text in found[f"rlhf.max_new_tokens.{name}"]


def test_the_schema_for_editors_knows_both_forms_of_the_limit() -> None:
    schema = json_schema()
    number, growing = schema["$defs"]["RlhfConfig"]["properties"]["max_new_tokens"]["oneOf"]
    assert number == {"type": "integer", "minimum": 1}
    parts = schema["$defs"][growing["$ref"].rsplit("/", 1)[1]]
    assert sorted(parts["required"]) == ["from", "over", "to"]
    assert all(part["description"] for part in parts["properties"].values())


def test_answers_from_the_teacher_need_one_though_the_loss_does_not() -> None:
    asking: dict[str, Any] = {"data__train": {"path": "a.jsonl", "answers": "teacher"}, "rlhf__llm_kd_weight": 0}
    found = errors(config(**asking, rlhf__teacher_model=None))
    assert "a data source has answers: teacher" in found["rlhf.teacher_model"]
    options = {"rlhf__max_new_tokens": 5, "training__per_device_eval_batch_size": 2}
    assert not errors(config(**asking, **options))
    assert not warnings(config(**asking, **options))


GROWING = {"from": 4, "to": 8, "over": 0.5}
IDLE: list[tuple[dict[str, Any], str, str]] = [
    ({"rlhf__divergence": "tvd", "rlhf__beta": 0.1}, "rlhf.beta", "rlhf.divergence is tvd"),
    ({"rlhf__skew_alpha": 0.2}, "rlhf.skew_alpha", "rlhf.divergence is jsd"),
    ({"rlhf__divergence": "skew_kl", "rlhf__ab_beta": 0.2}, "rlhf.ab_beta", "rlhf.divergence is skew_kl"),
    ({"rlhf__llm_kd_weight": 0}, "rlhf.teacher_model", "none is loaded"),
    ({"rlhf": {"llm_kd_weight": 0, "sft_alpha": 0.5}}, "rlhf.sft_alpha", "cross-entropy has weight 1.0"),
    ({"rlhf": {"llm_kd_weight": 0, "seq_kd": True}}, "rlhf.seq_kd", "rlhf.llm_kd_weight is 0"),
    ({"rlhf": {"llm_kd_weight": 0, "lmbda": 0.5}}, "rlhf.lmbda", "rlhf.llm_kd_weight is 0"),
    ({"rlhf": {"llm_kd_weight": 0, "beta": 0.1}}, "rlhf.beta", "rlhf.llm_kd_weight is 0"),
    ({"rlhf": {"llm_kd_weight": 0, "eval_kd": True}}, "rlhf.eval_kd", "nothing asks the teacher"),
    ({"rlhf__lmbda": 0, "rlhf__temperature": 0.5}, "rlhf.temperature", "nothing is sampled"),
    (
        {"rlhf__lmbda": 0, "rlhf__samples_per_prompt": 4, "rlhf__select_regex": "(a)"},
        "rlhf.samples_per_prompt",
        "no effect: rlhf.lmbda is 0, the student writes no answers (the same goes for select_regex)",
    ),
    ({"rlhf": {"llm_kd_weight": 0, "select": "best"}}, "rlhf.select", "rlhf.llm_kd_weight is 0"),
    ({"rlhf": {"llm_kd_weight": 0, "token_weights": {}}}, "rlhf.token_weights", "rlhf.llm_kd_weight is 0"),
    ({"rlhf__select": "best"}, "rlhf.select", "no effect: rlhf.samples_per_prompt is 1"),
    ({"rlhf__token_selection": {"keep": 1}}, "rlhf.token_selection", "no effect: its keep is 1, which is every token"),
    ({"rlhf__lmbda": 0, "rlhf__max_new_tokens": 5}, "rlhf.max_new_tokens", "nothing is sampled"),
    ({"rlhf__lmbda": 0, "rlhf__max_new_tokens": GROWING}, "rlhf.max_new_tokens", "nothing is sampled"),
    (
        {
            "rlhf": {"teacher_model": "org/teacher", "lmbda": 0, "max_new_tokens": GROWING},
            "data__train": {"path": "a.jsonl", "answers": "teacher"},
        },
        "rlhf.max_new_tokens.from",
        "no effect: no step samples, and answers that are written before training may have `to` tokens (the same goes",
    ),
    ({"rlhf__lmbda": 0, "rlhf__generation": {"top_k": 5}}, "rlhf.generation.top_k", "the student writes no answers"),
    (
        {"rlhf__lmbda": 0, "rlhf__generation": {"top_p": 0.9, "min_p": 0.1, "batch_size": 5}},
        "rlhf.generation.top_p",
        "(rlhf.lmbda is 0) (the same goes for min_p, batch_size)",
    ),
    (
        {"rlhf__lmbda": 0, "rlhf__seq_kd": True, "rlhf__generation": {"min_p": 0.1, "batch_size": 5}},
        "rlhf.generation.min_p",
        "(rlhf.lmbda is 0)",
    ),
    ({"rlhf__eval_kd": False}, "rlhf.eval_kd", "no data.eval"),
    ({"rlhf__teacher": {"base_url": "http://h/v1"}}, "rlhf.teacher.base_url", "no effect: rlhf.teacher.backend is hf"),
    ({"rlhf__teacher": {"top_k": 5}}, "rlhf.teacher.top_k", "no effect: rlhf.teacher.backend is hf"),
    ({"tuner__lora_rank": 8}, "tuner.lora_rank", "tuner.train_type is full"),
    ({"tuner__use_dora": True, "tuner__lora_alpha": 3}, "tuner.use_dora", "the same goes for lora_alpha"),
    ({"custom__visual_kd__weight": 2}, "custom.visual_kd.weight", "enabled is false"),
    ({"custom__hidden_kd__distance": "cosine"}, "custom.hidden_kd.distance", "enabled is false"),
    ({"custom__hidden_kd": {"enabled": True, "weight": 0}}, "custom.hidden_kd.enabled", "weight is 0"),
    ({"custom__visual_kd": {"enabled": True, "weight": 0}}, "custom.visual_kd.enabled", "weight is 0"),
    ({"training__eval_steps": 5}, "training.eval_steps", "no data.eval"),
    ({"training__per_device_eval_batch_size": 5}, "training.per_device_eval_batch_size", "no data.eval"),
    ({"data__eval": "e.jsonl"}, "data.eval", "training.eval_strategy is no"),
    ({"training__max_steps": 5, "training__num_train_epochs": 1}, "training.num_train_epochs", "max_steps is set"),
    ({"training__save_strategy": "no", "training__save_steps": 5}, "training.save_steps", "save_strategy is no"),
    ({"training__save_total_limit": 1}, "training.save_total_limit", "2 checkpoints are kept"),
    ({"training__disable_tqdm": False}, "training.disable_tqdm", "its own progress"),
    (
        {"rlhf": {"teacher": {**ITSELF, "weights": "ema"}, "teacher_model": "org/teacher"}},
        "rlhf.teacher_model",
        "backend is self",
    ),
    (
        {"rlhf": {"teacher": {**ITSELF, "ema_decay": 0.9}, "sft_alpha": 0.1}, "tuner__train_type": "lora"},
        "rlhf.teacher.ema_decay",
        "weights is base",
    ),
]


SAME_WORDS: list[tuple[dict[str, Any], bool]] = [
    ({"sft_alpha": 0.0}, True),
    ({"sft_alpha": 0.1, "lmbda": 1.0}, True),  # the student's own answers take no cross-entropy
    ({"sft_alpha": 0.1, "lmbda": 0.5}, False),
    ({"sft_alpha": 0.0, "teacher": {**ITSELF, "chat_template_kwargs": {"enable_thinking": True}}}, False),
    ({"sft_alpha": 0.0, "teacher": {**ITSELF, "prefix": [{"role": "system", "content": "Be brief."}]}}, False),
]


@pytest.mark.parametrize(("rlhf", "warned"), SAME_WORDS)
def test_a_base_that_reads_the_same_and_nothing_beside_it_is_warned_of(rlhf: dict[str, Any], warned: bool) -> None:
    found = warnings(config(rlhf={"teacher": ITSELF, **rlhf}, tuner__train_type="lora"))
    assert any("teaches nothing" in warning.message for warning in found) == warned


def test_a_prefix_without_a_teacher_offers_the_student_itself() -> None:
    prefix = [{"role": "system", "content": "Be brief."}]
    (found,) = check_config(config(rlhf={"teacher": {"prefix": prefix}})).errors
    assert found.path == "rlhf.teacher_model"
    assert "set rlhf.teacher.backend: self" in (found.hint or "")


@pytest.mark.parametrize(("changes", "path", "expected"), IDLE)
def test_an_option_without_effect_gets_one_warning(changes: dict[str, Any], path: str, expected: str) -> None:
    (warning,) = warnings(config(**changes))
    assert warning.path == path
    assert expected in warning.message


@pytest.mark.parametrize(
    "changes",
    [
        {"rlhf": {"llm_kd_weight": 0}},
        {"rlhf": {"llm_kd_weight": 0, "seq_kd": False, "lmbda": 0, "sft_alpha": 0}},
        {"rlhf__lmbda": 0, "rlhf__seq_kd": True, "rlhf__temperature": 0.5},
        {"tuner": {"train_type": "lora", "lora_rank": 8}},
        {"rlhf": {"teacher": ITSELF, "sft_alpha": 0.1}, "tuner": {"train_type": "lora"}},
        {"rlhf": {"teacher": {**ITSELF, "weights": "ema", "ema_decay": 0.9}}},
        {"rlhf": {"teacher": {**ITSELF, "weights": "live", "prefix": [{"role": "system", "content": "x"}]}}},
        {"rlhf": {"teacher": {**ITSELF, "weights": "live", "chat_template_kwargs": {"enable_thinking": True}}}},
        {
            "data__eval": "e.jsonl",
            "training__eval_strategy": "steps",
            "training__eval_steps": 5,
            "rlhf__eval_kd": False,
        },
        {  # how many answers the teacher writes at a time
            "data__train": {"path": "a.jsonl", "answers": "teacher"},
            "training__per_device_eval_batch_size": 5,
        },
    ],
)
def test_an_option_with_effect_gets_no_warning(changes: dict[str, Any]) -> None:
    assert warnings(config(**changes)) == []


def test_a_rule_is_silent_about_an_option_that_is_wrong_in_itself() -> None:
    found = errors(config(rlhf={"llm_kd_weight": -1}))
    assert list(found) == ["rlhf.llm_kd_weight"]


def test_wrong_types_unknown_keys_bad_choices_and_conflicts_come_in_one_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {model: org/a, dtype: bf16}\n"
        "data: {train: rows.jsonl, max_length: true}\n"
        "rlhf: {lambda: 0.5, beta: 3}\n"
        "training: {beta: 1, learning_rate: abc, fp16: true, bf16: true, output_dir: x}\n"
    )
    result = check_config(path)
    assert [(e.path, e.line) for e in result.errors] == [
        ("model.dtype", 1),
        ("data.max_length", 2),
        ("rlhf.teacher_model", 3),
        ("rlhf.lambda", 3),
        ("rlhf.beta", 3),
        ("training.beta", 4),
        ("training.learning_rate", 4),
        ("training.fp16", 4),
    ]
    assert all(error.col and error.source_line for error in result.errors)
    assert result.config is None


def test_the_json_schema_knows_every_key_and_describes_it() -> None:
    schema = json_schema()
    training = schema["properties"]["training"]["properties"]
    assert set(schema["properties"]) == set(known_keys()[""])
    assert training["learning_rate"]["type"] == ["number"]
    assert "cosine" in training["lr_scheduler_type"]["enum"]
    assert "beta" not in training
    assert "hub_token" not in training
    for name, definition in schema["$defs"].items():
        assert definition["additionalProperties"] is False, name
        for key, option in definition["properties"].items():
            assert option.get("description"), f"{name}.{key}"
    assert {"type": "string"} in schema["$defs"]["DataConfig"]["properties"]["train"]["anyOf"]


FROZEN: list[tuple[dict[str, Any], str | None]] = [
    ({"tuner": {"freeze_llm": True, "freeze_vit": True, "freeze_aligner": True}}, "tuner.freeze_llm"),
    ({"tuner": {"freeze_vit": True}, "custom__visual_kd__targets": ["vit"]}, "custom.visual_kd.targets.vit"),
    ({"tuner": {"freeze_vit": True}, "custom__visual_kd__targets": ["aligner"]}, None),
    (
        {"tuner": {"freeze_vit": True, "freeze_aligner": True}, "custom__visual_kd__targets": ["aligner"]},
        "custom.visual_kd.targets.aligner",
    ),
    ({"tuner": {"freeze_vit": True}, "custom__visual_kd__targets": {"vit": {"module": "somewhere"}}}, None),
]


@pytest.mark.parametrize(("changes", "path"), FROZEN)
def test_freezing_that_leaves_nothing_to_teach_is_an_error(changes: dict[str, Any], path: str | None) -> None:
    visual = {"custom__visual_kd__enabled": True} if "custom__visual_kd__targets" in changes else {}
    assert list(errors(config(**changes, **visual))) == ([path] if path else [])


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"rlhf__sft_alpha": 0.1}, "rlhf.sft_alpha"),
        ({"rlhf__seq_kd": True}, "rlhf.seq_kd"),
        ({"data__train": {"path": "a.jsonl", "answers": "teacher"}}, "data.train[0].answers"),
    ],
)
def test_what_only_the_datas_answers_would_use_is_idle_where_the_student_writes_all(
    changes: dict[str, Any], path: str
) -> None:
    assert path in [found.path for found in warnings(config(**changes, rlhf__lmbda=1))]


SERVER: dict[str, Any] = {
    "rlhf__teacher__backend": "vllm",
    "rlhf__teacher__base_url": "http://127.0.0.1:8000/v1",
    "rlhf__teacher__model": "teacher",
}


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_a_teacher_on_a_server_needs_its_address_and_its_name_there(backend: str) -> None:
    found = errors(config(rlhf={"teacher": {"backend": backend}}))
    assert list(found) == ["rlhf.teacher.base_url", "rlhf.teacher.model"]
    assert errors(config(**SERVER, rlhf__teacher_model=None)) == {}


def test_several_servers_are_a_list_and_each_address_is_checked() -> None:
    two = ["http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/v1"]
    assert errors(config(**{**SERVER, "rlhf__teacher__base_url": two})) == {}
    found = errors(config(**{**SERVER, "rlhf__teacher__base_url": [two[0], "ftp://127.0.0.1/v1"]}))
    assert list(found) == ["rlhf.teacher.base_url[1]"]
    found = errors(config(**{**SERVER, "rlhf__teacher__base_url": [two[0], two[0]]}))
    assert "twice" in found["rlhf.teacher.base_url"]


@pytest.mark.parametrize("term", ["visual_kd", "hidden_kd"])
def test_a_server_has_no_features_to_compare(term: str) -> None:
    found = errors(config(**SERVER, **{f"custom__{term}__enabled": True}))
    assert f"no features to compare (vllm is a server), which custom.{term} needs" in found["rlhf.teacher.backend"]


def idle_options(source: Any) -> str:
    return " ".join(f"{found.path} {found.message}" for found in warnings(source) if "no effect" in found.message)


def test_options_of_targets_or_answers_that_nobody_asks_for_are_idle() -> None:
    answers = {"data__train": [{"path": "org/rows", "answers": "teacher"}]}
    idle = idle_options(config(**SERVER, rlhf__teacher__api="completions", rlhf__teacher__max_requests=3))
    assert "api" in idle
    assert "max_requests" in idle
    written = {**SERVER, **answers, "rlhf__llm_kd_weight": 0.0, "rlhf__teacher__api": "chat"}
    idle = idle_options(config(**written, rlhf__teacher__top_k=3, rlhf__teacher__lookahead=1))
    assert "top_k" in idle
    assert "lookahead" in idle
    assert "api" not in idle


def test_the_tokenizer_of_a_teacher_on_a_server_must_be_there(tmp_path: Any) -> None:
    found = errors(config(**SERVER, rlhf__teacher_model=str(tmp_path / "missing")))
    assert "no such folder" in found["rlhf.teacher_model"]
    found = errors(config(**SERVER, rlhf__teacher_model=str(tmp_path)))
    assert "has no tokenizer" in found["rlhf.teacher_model"]


SERVED_TEACHER = {"backend": "vllm", "base_url": "http://127.0.0.1:8000/v1", "model": "teacher"}


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"beta": 0.5, "tail": "renormalize"}, True),
        ({"beta": 0.0, "tail": "renormalize"}, False),
        ({"beta": 0.5, "tail": "bucket"}, False),
        ({"beta": 0.5, "tail": "renormalize", "backend": "hf"}, False),  # its targets are no top k
    ],
)
def test_a_tail_that_is_renormalized_beside_beta_is_warned_of_with_the_measured_angle(options, warned):
    teacher = {**SERVED_TEACHER, "tail": options["tail"], "backend": options.get("backend", "vllm")}
    found = check_config(config(rlhf__beta=options["beta"], rlhf__teacher=teacher)).warnings
    about = [warning for warning in found if "28 degrees at beta 0.5" in warning.message]
    assert len(about) == warned
    if warned:
        assert (about[0].path, about[0].hint) == ("rlhf.teacher.tail", "use tail: bucket")
