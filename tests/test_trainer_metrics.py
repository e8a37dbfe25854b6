"""Records that can be read where some steps are on the student's own answers and others on the data's."""

from pathlib import Path

import pytest

from tests import tiny
from tests.test_trainer import make_trainer

SEED = 1  # at lmbda 0.5 the fourth and the sixth of eight steps are the student's
ON_POLICY = {4, 6}
ROWS = [  # no prompt twice: samples of equal ones would be others on two ranks
    {
        "messages": [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": "zero " * (1 + i % 5)},
        ]
    }
    for i in range(12)
]
KINDS = ("llm_kd_loss_on_policy", "llm_kd_loss_off_policy", "sft_loss_off_policy")


def records(folder, logging_steps, ranks=1, **options):
    """By step; the rows of a window are the same for any number of ranks, and so are the samples."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), rows=ROWS, seed=SEED,
        **{"lmbda": 0.5, "sft_alpha": 0.3, "max_steps": 8, "logging_steps": logging_steps, "max_grad_norm": 1e9,
           "per_device_train_batch_size": 2 // ranks, "gradient_accumulation_steps": 2, **options},
    )  # fmt: skip
    trainer.train()
    return {record["step"]: record for record in trainer.state.log_history if "loss" in record}


@pytest.fixture(scope="module")
def step_by_step(tmp_path_factory):
    found = records(tmp_path_factory.mktemp("steps"), 1)
    assert {step for step, record in found.items() if record["on_policy_fraction"]} == ON_POLICY
    return found


def expected(step_by_step, steps):
    """Means of what was logged of each step, over those of one kind."""
    own, others = ([step_by_step[s] for s in steps if (s in ON_POLICY) is kind] for kind in (True, False))
    groups = {
        "llm_kd_loss_on_policy": [record["llm_kd_loss"] for record in own],
        "llm_kd_loss_off_policy": [record["llm_kd_loss"] for record in others],
        "sft_loss_off_policy": [record["sft_loss"] for record in others],
    }
    return {name: pytest.approx(sum(values) / len(values), rel=1e-6) for name, values in groups.items() if values}


def test_a_step_has_the_terms_of_its_own_kind_alone(step_by_step):
    for step, record in step_by_step.items():
        kind = "on_policy" if step in ON_POLICY else "off_policy"
        assert {name for name in KINDS if name in record} == {name for name in KINDS if name.endswith(kind)}
        assert record[f"llm_kd_loss_{kind}"] == record["llm_kd_loss"]
        assert (record["sft_loss"] == 0) == (step in ON_POLICY)


@pytest.mark.parametrize("every", [3, 8])
def test_terms_of_a_kind_are_means_over_its_own_steps_and_the_others_add_up_to_the_loss(tmp_path, step_by_step, every):
    found, first = records(tmp_path, every), 1
    for step, record in found.items():
        own = {name: record[name] for name in KINDS if name in record}
        assert own == expected(step_by_step, range(first, step + 1))
        assert record["loss"] == pytest.approx(record["llm_kd_loss"] + record["sft_loss"], rel=1e-6)
        first = step + 1


def on_two_ranks(folder):
    return records(folder, 8, ranks=2)


def test_on_two_ranks_they_are_those_of_one(tmp_path, step_by_step):
    for found in tiny.run_ranks(on_two_ranks, 2, tmp_path):
        own = {name: found[8][name] for name in KINDS}
        for name, value in expected(step_by_step, range(1, 9)).items():
            assert own[name] == pytest.approx(value.expected, rel=1e-4), name


def test_every_key_of_a_record_is_in_the_readme(step_by_step):
    table = (Path(__file__).parents[1] / "README.md").read_text("utf-8").split("## What is logged")[1].split("## ")[0]
    assert not [key for record in step_by_step.values() for key in record if f"`{key}`" not in table]


@pytest.mark.parametrize("options", [{"llm_kd_weight": 0.0}, {"lmbda": 0.0}])
def test_where_no_step_can_be_on_policy_the_terms_are_not_told_apart(tmp_path, options):
    (record,) = records(tmp_path, 8, **options).values()
    assert record.keys().isdisjoint(KINDS)
