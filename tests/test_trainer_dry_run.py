"""A dry run makes one window of each kind that the run will have, and changes nothing."""

import itertools

import pytest
import torch

from kdtrain.trainer import dry_run as dry_run_module
from kdtrain.trainer.dry_run import timed_windows, windows_without_a_step
from tests import tiny
from tests.test_distributed import sharding_on_a_cpu
from tests.test_trainer import make_trainer

KINDS = ("llm_kd_loss_on_policy", "llm_kd_loss_off_policy", "sft_loss_off_policy")


def dry_run(folder, ranks=1, **options):
    """Its metrics, and who wrote the answers of each window."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), gradient_accumulation_steps=2,
        **{"per_device_train_batch_size": 2 // ranks, "max_steps": 3, "sft_alpha": 0.3, **options},
    )  # fmt: skip
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    writers, original = [], trainer.get_batch_samples

    def noted(*args):
        batches, num_items = original(*args)
        assert len(batches) == 2
        writers.append(batches[0].generated_by)
        return batches, num_items

    trainer.get_batch_samples = noted
    metrics = windows_without_a_step(trainer)
    if ranks == 1:
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        assert trainer.state.global_step == 0
    assert trainer.lmbda == options["lmbda"]
    return metrics, writers


@pytest.mark.parametrize(
    ("options", "writers", "terms"),
    [
        ({"lmbda": 0.0}, [None], ()),
        ({"lmbda": 1.0}, ["student"], KINDS[:1]),
        ({"lmbda": 0.5}, ["student", None], KINDS),
        ({"lmbda": 0.5, "seq_kd": True}, ["student", "teacher"], KINDS),
        ({"lmbda": 0.0, "seq_kd": True}, ["teacher"], ()),
        ({"lmbda": 0.5, "llm_kd_weight": 0.0}, [None], ()),
        ({"lmbda": 0.5, "max_steps": 1}, ["student", None], KINDS),
    ],
)
def test_there_is_a_window_of_each_kind_that_the_run_will_have(tmp_path, options, writers, terms):
    metrics, found = dry_run(tmp_path, **options)
    assert found == writers
    assert tuple(name for name in KINDS if name in metrics) == terms
    assert metrics["on_policy_fraction"] == writers.count("student") / len(writers)


def test_the_windows_are_those_of_runs_of_one_kind_on_the_same_rows(tmp_path):
    both = dry_run(tmp_path, lmbda=0.5)[0]
    own, others = dry_run(tmp_path, lmbda=1.0)[0], dry_run(tmp_path, lmbda=0.0)[0]
    assert both["llm_kd_loss_on_policy"] == own["llm_kd_loss"]
    assert both["llm_kd_loss_off_policy"] == others["llm_kd_loss"]
    assert both["sft_loss_off_policy"] == others["sft_loss"]
    assert both["loss"] == pytest.approx((own["loss"] + others["loss"]) / 2, rel=1e-6)


def test_answers_may_be_as_long_as_they_ever_will_be(tmp_path):
    for limit, longest in ((3, 3), ({"from": 3, "to": 60, "over": 1.0}, 60)):
        metrics, _ = dry_run(tmp_path, lmbda=1.0, max_new_tokens=limit)
        assert 0 < metrics["completion_length"] <= longest
    assert metrics["completion_length"] > 3


def on_two_ranks(folder, sharded):
    return dry_run(folder, ranks=2, lmbda=0.5, **(sharding_on_a_cpu() if sharded else {}))


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_ranks_make_both_windows_together(tmp_path, sharded):
    expected = dry_run(tmp_path, lmbda=0.5)[0]
    first, second = tiny.run_ranks(on_two_ranks, 2, tmp_path, sharded, timeout=200)
    assert first[0] == pytest.approx(second[0])
    for metrics, writers in (first, second):
        assert writers == ["student", None]
        assert metrics["llm_kd_loss_off_policy"] == pytest.approx(expected["llm_kd_loss_off_policy"], rel=1e-5)
        assert metrics["llm_kd_loss_on_policy"] == pytest.approx(expected["llm_kd_loss_on_policy"], rel=1e-5)


def test_the_time_of_a_run_is_that_of_its_kinds_of_windows_and_of_the_optimizer(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), lmbda=0.25, max_steps=3, max_new_tokens=3
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    ticks = itertools.count()
    monkeypatch.setattr(dry_run_module, "clock", lambda: next(ticks))  # whatever is timed takes a second
    metrics, times = timed_windows(trainer, tokens_per_row=0)
    assert metrics["on_policy_fraction"] == 0.5  # of the windows that are not timed
    assert times.step_s == pytest.approx(0.25 + 0.75 + 1)
    assert times.run_s == pytest.approx(3 * times.step_s)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
