"""The one object of options: what it is read from, what it refuses, and what follows from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdtrain.config import ConfigError, RunConfig, arguments
from kdtrain.config.arguments import Hardware, build_train_arguments
from kdtrain.config.options import DistillationOptions

OTHER: dict[str, Any] = {
    "llm_kd_weight": 0.5,
    "sft_alpha": 0.25,
    "beta": 0.1,
    "divergence": "mixed_kl",
    "kd_temperature": 2.0,
    "lmbda": 0.75,
    "seq_kd": True,
    "temperature": 0.5,
    "max_new_tokens": 7,
    "disable_dropout": False,
    "eval_kd": False,
    "tail": "renormalize",
    "visual_kd": {"targets": ["vit"]},
}


def read(**attributes: Any) -> DistillationOptions:
    return DistillationOptions.from_args(SimpleNamespace(**attributes))  # type: ignore[arg-type]


def config(rlhf: dict[str, Any] | None = None, visual: dict[str, Any] | None = None) -> RunConfig:
    parts = {"model": {"model": "org/student"}, "data": {"train": "org/rows"}, "training": {"output_dir": "run"}}
    teacher = {"teacher_model": "org/teacher"}
    return RunConfig.model_validate({**parts, "rlhf": {**teacher, **(rlhf or {})}, "custom": {"visual_kd": visual}})


def test_every_option_is_an_attribute_of_the_arguments_by_its_own_name() -> None:
    assert list(OTHER) == list(DistillationOptions.model_fields)
    default, other = dict(read()), dict(read(**OTHER))
    assert not [name for name in OTHER if default[name] == other[name]]
    assert read(something_else=1) == DistillationOptions()


def test_what_a_config_says_is_what_the_trainer_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_gkd_config_class", lambda: SimpleNamespace)
    rlhf = {name: value for name, value in OTHER.items() if name not in ("tail", "visual_kd")}
    run = config({**rlhf, "teacher": {"tail": OTHER["tail"]}}, {"enabled": True, **OTHER["visual_kd"]})
    built = build_train_arguments(run, Hardware(None, bf16=False, fp16=False, tf32=False))
    assert run.options == DistillationOptions.from_args(built.training_args) == read(**OTHER)
    assert built.llm_kd_weight == 0.5


def test_numbers_of_numpy_are_numbers() -> None:
    options = read(beta=np.float32(0.25), max_new_tokens=np.int64(3), llm_kd_weight=2)
    assert (options.beta, options.max_new_tokens, options.llm_kd_weight) == (0.25, 3, 2.0)
    assert type(options.beta) is float


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 1.5}, "beta: must be at most 1, got 1.5"),
        ({"beta": True}, "beta: expected a number, got the boolean true"),
        ({"sft_alpha": float("inf")}, "sft_alpha: not a finite number"),
        ({"temperature": 1.5}, "temperature: must be at most 1, got 1.5"),
        ({"kd_temperature": 0}, "kd_temperature: must be above 0, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected a whole number, got the number 1.5"),
        ({"eval_kd": 1}, "eval_kd: expected true or false, got the number 1"),
        (
            {"tail": "renormalise"},
            "tail: expected one of bucket, renormalize, got text 'renormalise' (did you mean 'renormalize'?)",
        ),
        (
            {"lmbda": None, "seq_kd": "no"},
            "lmbda: expected a number, got nothing. seq_kd: expected true or false, got text 'no' (write false)",
        ),
        ({"visual_kd": {"targets": {"vit": 3}}}, "visual_kd.targets.vit: expected a map, got the number 3"),
    ],
)
def test_a_wrong_value_is_an_error_in_our_own_words(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**wrong)
    assert str(caught.value) == message


def test_nothing_asks_the_teacher_where_all_visual_targets_weigh_nothing() -> None:
    """The config and the trainer agree: none is asked for, and none is loaded in vain."""
    run = config({"llm_kd_weight": 0}, {"enabled": True, "targets": {"vit": {"weight": 0}}})
    assert not run.asks_teacher
    assert run.options.ce_weight == 1.0
    assert run.options.visual_kd is None


def test_without_kd_is_cross_entropy_alone() -> None:
    options = read(**OTHER).without_kd()
    assert not options.needs_teacher
    assert options.ce_weight == 1.0
