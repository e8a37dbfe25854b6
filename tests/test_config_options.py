"""The one object of options: what it is read from, what it refuses, and what follows from it."""

from __future__ import annotations

import json
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
    "skew_alpha": 0.2,
    "ab_alpha": 0.5,
    "ab_beta": 0.5,
    "entropy_threshold": 1.5,
    "on_policy": {"divergence": "tvd"},
    "kd_temperature": 2.0,
    "token_selection": {"by": "disagreement", "keep": 0.25},
    "token_weights": {"top": 0.3, "share": 0.6},
    "cross_tokenizer": "alm",
    "lmbda": 0.75,
    "seq_kd": True,
    "temperature": 0.5,
    "max_new_tokens": 7,
    "generation": {"top_k": 5},
    "samples_per_prompt": 2,
    "select": "best",
    "select_regex": "([0-9]+)",
    "disable_dropout": False,
    "eval_kd": False,
    "tail": "renormalize",
    "visual_kd": {"targets": ["vit"]},
    "hidden_kd": {"targets": {"layer": [0.5]}},
}
CUSTOM = ("visual_kd", "hidden_kd")


def read(**attributes: Any) -> DistillationOptions:
    return DistillationOptions.from_args(SimpleNamespace(**attributes))  # type: ignore[arg-type]


def config(rlhf: dict[str, Any] | None = None, **custom: dict[str, Any] | None) -> RunConfig:
    parts = {"model": {"model": "org/student"}, "data": {"train": "org/rows"}, "training": {"output_dir": "run"}}
    teacher = {"teacher_model": "org/teacher"}
    return RunConfig.model_validate({**parts, "rlhf": {**teacher, **(rlhf or {})}, "custom": custom})


def test_every_option_is_an_attribute_of_the_arguments_by_its_own_name() -> None:
    assert list(OTHER) == list(DistillationOptions.model_fields)
    default, other = dict(read()), dict(read(**OTHER))
    assert not [name for name in OTHER if default[name] == other[name]]
    assert read(something_else=1) == DistillationOptions()


def test_what_a_config_says_is_what_the_trainer_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_gkd_config_class", lambda: SimpleNamespace)
    rlhf = {name: value for name, value in OTHER.items() if name not in ("tail", *CUSTOM)}
    custom = {name: {"enabled": True, **OTHER[name]} for name in CUSTOM}
    run = config({**rlhf, "teacher": {"tail": OTHER["tail"]}}, **custom)
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
        (
            {"max_new_tokens": {"from": 9, "to": 4, "over": 1}},
            "max_new_tokens.to: must be at least from (9), got 4: the limit grows from one to the other",
        ),
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


def test_nothing_asks_the_teacher_where_all_features_weigh_nothing() -> None:
    """The config and the trainer agree: none is asked for, and none is loaded in vain."""
    visual = {"enabled": True, "targets": {"vit": {"weight": 0}}}
    run = config({"llm_kd_weight": 0}, visual_kd=visual, hidden_kd={"enabled": True, "weight": 0})
    assert not run.asks_teacher
    assert run.options.ce_weight == 1.0
    assert not run.options.compares_features


def test_without_kd_is_cross_entropy_alone() -> None:
    options = read(**OTHER).without_kd()
    assert not options.needs_teacher
    assert options.ce_weight == 1.0


# ---- a limit that grows ----------------------------------------------------------------------------------------------


def limits(first: int, last: int, over: float, steps: int) -> list[int]:
    options = read(max_new_tokens={"from": first, "to": last, "over": over})
    return [options.new_tokens(step, steps) for step in range(steps)]


def test_a_limit_grows_by_equal_parts_rounded_down_and_then_stays() -> None:
    found = limits(64, 512, 0.3, 1000)
    assert found[0] == 64
    assert found == [64 + (512 - 64) * step // 300 if step < 300 else 512 for step in range(1000)]
    # 0.55 · 100 is above 55 in floating point: step 11 would have a token less, and step 55 not yet the last limit.
    assert limits(1, 11, 0.55, 100)[11] == 3
    assert limits(1, 8, 0.55, 100)[54:56] == [7, 8]
    assert limits(1, 8, 0.7, 10) == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    assert limits(5, 5, 1.0, 3) == [5, 5, 5]
    assert limits(1, 9, 0.3, 1) == [1]


def test_where_the_steps_are_not_known_yet_it_is_the_largest() -> None:
    growing = read(max_new_tokens={"from": 64, "to": 512, "over": 0.3})
    assert growing.new_tokens(0, 0) == growing.most_new_tokens == 512
    assert (read().new_tokens(7, 10), read().most_new_tokens) == (128, 128)


def test_a_config_hands_a_growing_limit_on_as_what_trackers_can_write() -> None:
    run = config({"max_new_tokens": {"from": 4, "to": 8, "over": 0.5}})
    args = build_train_arguments(run, Hardware(None, bf16=False, fp16=False, tf32=False)).training_args
    assert json.loads(args.to_json_string())["max_new_tokens"] == {"from": 4, "to": 8, "over": 0.5}
    assert DistillationOptions.from_args(args) == run.options
    written = RunConfig.model_validate_json(run.model_dump_json())  # of a run folder
    assert written == run
