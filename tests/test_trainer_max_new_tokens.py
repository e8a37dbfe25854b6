"""A limit of generated answers that grows with the steps: what each step may write, and who may change it."""

import pytest

from tests import tiny
from tests.test_python_class import Set
from tests.test_trainer import make_trainer

GROWING = {"from": 2, "to": 12, "over": 0.5}
LIMITS = [2, 4, 7, 9, 12, 12, 12, 12]  # 2 + 10 · step / 4, rounded down


def longest_by_step(folder, resume=None, callback=None, **options):
    """Tokens of the longest answer of each step, of a student that hardly ever ends one."""
    student = tiny.make_qwen3(seed=1)
    trainer = make_trainer(
        folder, student, tiny.make_qwen3(seed=2), save_strategy="steps", save_steps=4,
        **{"lmbda": 1.0, "max_steps": 8, "max_new_tokens": GROWING, "learning_rate": 0.0, **options},
    )  # fmt: skip
    if callback is not None:
        trainer.add_callback(callback(trainer))
    found, original = [], trainer.get_batch_samples

    def noted(*args):
        batches, num_items = original(*args)
        found.append(max(int((batch.labels != -100).sum(1).max()) for batch in batches))
        return batches, num_items

    trainer.get_batch_samples = noted
    trainer.train(resume_from_checkpoint=resume)
    return found


@pytest.mark.parametrize("options", [{}, {"lmbda": 0.0, "seq_kd": True}], ids=["student", "teacher"])
def test_each_step_writes_up_to_its_own_limit_and_a_resumed_run_goes_on_with_it(tmp_path, options):
    found = longest_by_step(tmp_path, **options)
    assert all(length <= limit for length, limit in zip(found, LIMITS, strict=True))
    assert sum(length == limit for length, limit in zip(found, LIMITS, strict=True)) >= 6
    assert longest_by_step(tmp_path, str(tmp_path / "checkpoint-4"), **options) == found[4:]


def set_at(step, value):
    return lambda trainer: Set(trainer, at=step, max_new_tokens=value)


def test_a_callback_may_set_a_number_or_another_schedule(tmp_path):
    assert max(longest_by_step(tmp_path, callback=set_at(2, 3))[2:]) == 3
    found = longest_by_step(tmp_path, max_new_tokens=3, callback=set_at(4, {"from": 5, "to": 5, "over": 1.0}))
    assert max(found[:4]) == 3
    assert max(found[4:]) == 5
    with pytest.raises(ValueError, match=r"max_new_tokens\.to: must be at least from \(5\), got 4"):
        longest_by_step(tmp_path, callback=set_at(2, {"from": 5, "to": 4, "over": 1.0}))


def train_with_a_schedule_on_one_rank(folder):
    trainer = make_trainer(folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), lmbda=1.0, max_new_tokens=4)
    if trainer.is_world_process_zero():
        trainer.max_new_tokens = {"from": 4, "to": 4, "over": 0.5}
    with pytest.raises(ValueError, match=r"max_new_tokens\.over of the trainer: not the same on all ranks"):
        trainer.train()


def test_one_rank_alone_may_not_have_a_schedule(tmp_path):
    tiny.run_ranks(train_with_a_schedule_on_one_rank, 2, tmp_path)
