"""What may change when a run is resumed: every option has a class, and the classes are those that loading allows."""

import pytest

from kdtrain.config import RunConfig
from kdtrain.config.changes import (
    CLASSES,
    CONTENT,
    FREE,
    NEVER,
    REFUSED,
    SAID,
    checked_names,
    class_of,
    config_changes,
    is_allowed,
)
from kdtrain.config.options import TrainingOptions
from kdtrain.config.suggest import known_keys
from kdtrain.errors import ConfigError
from tests.test_every_option import changed, options

BEFORE = {
    "model": {"model": "/models/student"},
    "tuner": {"train_type": "lora"},
    "data": {"train": [{"path": "/data/a.jsonl"}, {"path": "/data/b.jsonl"}]},
    "rlhf": {"teacher_model": "/models/teacher"},
    "custom": {"visual_kd": {"targets": {"vit": {}}}},
    "training": {"output_dir": "/runs/x", "learning_rate": 1e-3, "save_steps": 5},
}


def dump(config):
    return RunConfig.model_validate(config).model_dump(mode="json")


def changes(**options):
    now = changed(BEFORE, {key.replace("__", "."): value for key, value in options.items()})
    return {change.key: change for change in config_changes(dump(BEFORE), dump(now))}


def test_every_option_has_a_class_and_no_other_name_has_one():
    walked = {*options(), *options(TrainingOptions, "training.")}
    known = walked | {f"training.{name}" for name in known_keys()["training"]}
    assert sorted(known - CLASSES.keys()) == [], "say in config/changes.py what a change of it does to a resumed run"
    assert sorted(CLASSES.keys() - known) == []


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("rlhf.beta", 0.25, REFUSED),
        ("rlhf.max_new_tokens", {"from": 1, "to": 9, "over": 0.5}, REFUSED),
        ("custom.visual_kd.weight", 0.5, REFUSED),
        ("data.max_length", 77, REFUSED),
        ("data.chat_template_kwargs", {"enable_thinking": False}, REFUSED),
        ("training.learning_rate", 2e-3, REFUSED),
        ("tuner.lora_rank", 8, NEVER),
        ("tuner.train_type", "full", NEVER),
        ("model.model", "/models/other", CONTENT),
        ("data.train", [{"path": "/data/a.jsonl"}], CONTENT),
        ("data.eval", "5%", SAID),
        ("model.attn_implementation", "eager", SAID),
    ],
)
def test_a_change_is_found_with_its_class(option, value, kind):
    (found,) = changes(**{option.replace(".", "__"): value}).values()
    assert (found.key, found.kind) == (option, kind)


@pytest.mark.parametrize(
    ("option", "value"),
    [("training.output_dir", "/runs/y"), ("training.save_steps", 7), ("launch.num_processes", 2)],
)
def test_paths_cadence_and_launching_change_without_a_word(option, value):
    assert class_of(option) is FREE
    assert not changes(**{option.replace(".", "__"): value})


def test_of_sources_and_of_targets_each_is_compared_by_itself():
    two = [{"path": "/data/a.jsonl", "weight": 2.0}, {"path": "/data/c.jsonl"}]
    assert list(changes(data__train=two)) == ["data.train[0].weight", "data.train[1].path"]
    more = {"vit": {"weight": 0.5}, "aligner": {}}
    found = changes(custom__visual_kd__targets=more)
    assert list(found) == ["custom.visual_kd.targets.vit.weight", "custom.visual_kd.targets.aligner"]
    for key, change in found.items():
        assert is_allowed(change, checked_names([key]))


def test_optimizers_with_the_same_state_may_follow_each_other_by_name_and_others_never():
    before = dump(changed(BEFORE, {"training.optim": "adamw_torch"}))
    for name, kind in (("adamw_torch_fused", REFUSED), ("adafactor", NEVER)):
        now = dump(changed(BEFORE, {"training.optim": name}))
        (found,) = config_changes(before, now)
        assert found.kind is kind


def test_an_option_that_is_not_known_is_refused():
    assert class_of("training.of_a_later_version") is REFUSED
    assert class_of("rlhf.of_a_later_version") is REFUSED


@pytest.mark.parametrize("names", [["rlhf"], ["rlhf.beta"], ["data.content,rlhf.beta"], ["tuner", "rlhf"]])
def test_a_section_allows_what_stands_in_it(names):
    (change,) = changes(rlhf__beta=0.25).values()
    assert is_allowed(change, checked_names(names))
    assert not is_allowed(change, checked_names(["custom", "rlhf.teacher", "data"]))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("rlhf.bta", "did you mean rlhf.beta?"), ("beta", "did you mean rlhf.beta?"), ("data.contents", "data.content")],
)
def test_an_unknown_name_is_a_mistake_of_the_command_line(name, hint):
    with pytest.raises(ConfigError, match="--allow-changes") as error:
        checked_names([name])
    assert hint in str(error.value)
