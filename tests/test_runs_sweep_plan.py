"""A sweep before and behind its runs: splitting values into runs, and ranking what came out. No torch, no models."""

import json
import logging

import pytest

from kdtrain.errors import ConfigError
from kdtrain.runs.sweep_plan import Axis, plan_sweep, split_overrides, split_values
from kdtrain.runs.sweep_ranking import Scored, rank

BETA = Axis("rlhf.beta", ("0", "1"))
RATE = Axis("training.learning_rate", ("1e-4", "1e-3"))
SEED = Axis("training.seed", ("1", "2", "3"))


@pytest.mark.parametrize(
    ("text", "parts"),
    {
        "0,0.1, 1": ["0", "0.1", "1"],
        "[q_proj,v_proj]": ["[q_proj,v_proj]"],
        "[q_proj, v_proj],all-linear": ["[q_proj, v_proj]", "all-linear"],
        "{from: 1, to: 2},64": ["{from: 1, to: 2}", "64"],
        "'a,b',c": ["'a,b'", "c"],
        '"a,b"': ['"a,b"'],
        "[{path: 'a,b]', limit: 3}],x": ["[{path: 'a,b]', limit: 3}]", "x"],
        "it's,them": ["it's", "them"],  # an apostrophe opens nothing
        "": [""],
    }.items(),
    ids=str,
)
def test_a_value_is_split_at_commas_outside_quotes_and_brackets(text, parts):
    assert split_values(text, f"key={text}") == parts


@pytest.mark.parametrize("text", ["0,", ",1", "0,,1", "0, ,1"])
def test_a_comma_without_a_value_beside_it_is_refused(text):
    with pytest.raises(ConfigError, match="no value between two commas"):
        split_values(text, f"rlhf.beta={text}")


def test_a_bracket_that_does_not_close_is_named():
    with pytest.raises(ConfigError, match=r"\] is missing"):
        split_values("0,[1,2", "x=0,[1,2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "--sweep needs an option with several values, such as rlhf.beta=0,0.1"),
        (["rlhf.beta=0.1"], "--sweep needs an option with several values"),
        (["rlhf.beta=0,0"], "rlhf.beta has the value 0 twice"),
        (["rlhf.beta=0,1", "rlhf.beta=0.5"], "rlhf.beta is given twice"),
        (["training.output_dir=a,b"], "training.output_dir has one value, in which each run gets a folder"),
        (["launch.num_processes=1,2"], "all runs are made by the same process"),
    ],
)
def test_what_is_no_sweep_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        split_overrides(overrides)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return {
        "model": {"model": "Qwen/Qwen3-0.6B"},
        "data": {"train": str(tmp_path / "eval.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "rlhf": {"teacher_model": "Qwen/Qwen3-4B", "lmbda": 0},
        "training": {"output_dir": str(tmp_path / "runs" / "sweep")},
    }


def test_every_combination_is_a_checked_config_in_a_folder_of_its_own(config):
    plan = plan_sweep(config, ["rlhf.beta=0,0.1", "training.seed=1,2", "training.max_steps=5"])
    assert [run.name for run in plan.runs] == ["beta-0_seed-1", "beta-0_seed-2", "beta-0.1_seed-1", "beta-0.1_seed-2"]
    for run in plan.runs:
        assert str(run.config.rlhf.beta) in (f"{float(run.values['rlhf.beta'])}", run.values["rlhf.beta"])
        assert run.config.training["seed"] == int(run.values["training.seed"])
        assert run.config.training["max_steps"] == 5
        assert run.folder == plan.folder / run.name
    assert str(plan.folder) == config["training"]["output_dir"]


def test_values_that_are_no_names_of_folders_get_one_each(config, tmp_path):
    values = ["{from: 8, to: 16, over: 1}", "{from: 8, to: 32, over: 1}"]
    plan = plan_sweep(config, [f"rlhf.max_new_tokens={','.join(values)}", "rlhf.lmbda=0.5"])
    names = [run.name for run in plan.runs]
    assert len(set(names)) == 2
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for name in names)
    again = plan_sweep(config, [f"rlhf.max_new_tokens={values[1]},8", "rlhf.lmbda=0.5"])
    assert again.runs[0].name == names[1]  # whatever the other values are: --resume finds it


def test_axes_that_end_alike_are_named_in_full(config):
    plan = plan_sweep(config, ["rlhf.temperature=0.5,1", "rlhf.kd_temperature=1,2", "rlhf.lmbda=1"])
    assert list(plan.labels.values()) == ["temperature", "kd_temperature"]
    plan = plan_sweep(config, ["rlhf.teacher.dtype=auto,float32", "model.dtype=auto,float32"])
    assert list(plan.labels.values()) == ["rlhf.teacher.dtype", "model.dtype"]


def test_a_mistake_in_several_runs_is_shown_once_and_all_at_once(config):
    with pytest.raises(ConfigError) as found:
        plan_sweep(config, ["rlhf.beta=0,7", "training.seed=1,2", "training.learning_rat=1"])
    assert sorted(one.path for one in found.value.diagnostics) == ["rlhf.beta", "training.learning_rat"]


def test_a_warning_of_all_runs_is_said_once(config, caplog):
    with caplog.at_level(logging.WARNING, logger="kdtrain"):
        plan_sweep(config, ["training.seed=1,2,3", "rlhf.max_new_tokens=9"])
    assert len([record for record in caplog.records if "max_new_tokens" in record.message]) == 1


def test_two_spellings_of_one_value_are_no_two_runs(config):
    with pytest.raises(ConfigError, match=r"rlhf\.beta: 0\.1 and 0\.10 are the same value"):
        plan_sweep(config, ["rlhf.beta=0.1,0.10"])


def test_without_held_out_rows_there_is_nothing_to_rank_by(config):
    config["data"].pop("eval")
    with pytest.raises(ConfigError, match=r"data\.eval is not set.*data\.eval=5%"):
        plan_sweep(config, ["rlhf.beta=0,1"])


def scored(figures, *axes):
    """Runs in the order of a plan; None is one that failed."""
    import itertools

    combinations = itertools.product(*(axis.values for axis in axes))
    return [
        Scored(
            dict(zip([axis.key for axis in axes], values, strict=True)),
            {} if figure is None else {"ce": figure, "forward_kl": 1 - figure, "tokens": 10},
        )
        for values, figure in zip(combinations, figures, strict=True)
    ]


def test_runs_are_ranked_by_held_out_cross_entropy_and_failed_ones_come_last():
    ranking = rank([BETA, RATE], scored([2.0, None, 1.0, 3.0], BETA, RATE))
    assert ranking.metric == "ce"
    assert list(ranking.order) == [2, 0, 3, 1]


def test_the_axis_that_moves_most_comes_first_and_seeds_last():
    #                 rate 1e-4         rate 1e-3
    ce = [1.0, 1.4, 1.1, 2.0, 2.4, 2.1, 1.5, 1.9, 1.6, 2.5, 2.9, 2.6]
    ranking = rank([BETA, RATE, SEED], scored(ce, BETA, RATE, SEED))
    assert [effect.axis.key for effect in ranking.effects] == [RATE.key, BETA.key, SEED.key]
    first = ranking.effects[0]
    assert first.runs == 6
    assert list(first.means) == ["1e-4", "1e-3"]
    assert first.spread == pytest.approx(1.0)
    assert ranking.effects[1].spread == pytest.approx(0.5)
    assert ranking.effects[2].spread == pytest.approx(0.4)


def test_a_failed_run_takes_its_whole_group_out_of_a_mean():
    """Else the other value would be judged by an easier set of runs."""
    ranking = rank([BETA, RATE], scored([1.0, 5.0, 2.0, None], BETA, RATE))
    (of_beta,) = [effect for effect in ranking.effects if effect.axis is BETA]
    assert of_beta.means == {"0": 1.0, "1": 2.0}
    assert of_beta.runs == 1


def test_settings_are_compared_over_the_seeds_that_both_have():
    ranking = rank([BETA, SEED], scored([1.0, 1.1, 0.9, 2.0, 2.12, 1.9], BETA, SEED))
    assert [setting.values for setting in ranking.settings] == [{"rlhf.beta": "0"}, {"rlhf.beta": "1"}]
    assert [setting.mean for setting in ranking.settings] == pytest.approx([1.0, 2.00667], abs=1e-5)
    assert ranking.verdict.word == "BEATS"
    assert ranking.best_by["ce"].values == {"rlhf.beta": "0"}
    assert ranking.best_by["forward_kl"].values == {"rlhf.beta": "1"}  # where it says another thing
    assert set(ranking.best_by) == {"ce", "forward_kl"}
    assert rank([BETA], scored([1.0, 2.0], BETA)).verdict is None


def test_without_labels_runs_are_ranked_by_kl():
    runs = [
        Scored({"rlhf.beta": v}, {"ce": None, "forward_kl": kl, "tokens": 10}) for v, kl in (("0", 0.5), ("1", 0.2))
    ]
    ranking = rank([BETA], runs)
    assert ranking.metric == "forward_kl"
    assert list(ranking.order) == [1, 0]


def test_figures_of_other_tokens_are_not_ranked():
    runs = [Scored({"rlhf.beta": v}, {"ce": 1.0, "tokens": n}) for v, n in (("0", 100), ("1", 90))]
    ranking = rank([BETA], runs)
    assert ranking.metric is None
    assert "90 to 100" in ranking.reason
    json.dumps(list(ranking.order))
