"""Records of a resumed run are those of the uninterrupted one, wherever the checkpoint falls."""

import pytest

from kdtrain.errors import CheckpointError
from kdtrain.trainer import metrics
from tests import tiny
from tests.test_trainer import make_trainer

NOT_COMPARED = {
    *tiny.MEASURED,
    "runtime",
    "samples_per_second",
    "steps_per_second",
}


def run(folder, world, resume=None, **kwargs):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=tiny.CHATS, sft_alpha=0.3, lmbda=0.5,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=7, logging_steps=3, save_steps=1,
        save_strategy="steps", logging_first_step=True, **kwargs,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    records = [{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in trainer.state.log_history]
    rates = [r["tokens_per_second"] for r in trainer.state.log_history if "tokens_per_second" in r]
    return records, rates


@pytest.mark.slow
@pytest.mark.parametrize(("world", "steps"), [(1, (1, 2, 3, 4, 5)), (2, (2, 5))])
def test_records_of_a_resumed_run_are_those_of_the_uninterrupted_one_bit_for_bit(tmp_path, world, steps):
    def records(resume):
        return [run(tmp_path, 1, resume)] if world == 1 else tiny.run_ranks(run, 2, tmp_path, 2, resume)

    whole = records(None)
    assert [record["step"] for record in whole[0][0]] == [1, 3, 6, 7]
    assert "mean_loss" in whole[0][0][-1]
    for step in steps:
        for (resumed, rates), (expected, usual) in zip(
            records(str(tmp_path / f"checkpoint-{step}")), whole, strict=True
        ):
            assert resumed == expected
            assert max(rates) < 10 * max(usual)  # its seconds are those of all its steps


def test_a_second_call_of_train_begins_with_no_sums(tmp_path, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, max_steps=2, logging_steps=5, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.train()
    assert trainer._globalstep_last_logged == 0
    assert len(trainer._metrics["train"]["windows"]) == 2


def test_sums_that_cannot_be_read_end_the_run_and_their_absence_is_told(tmp_path, caplog):
    run(tmp_path, 1)
    sums = tmp_path / "checkpoint-2" / "unlogged_0.safetensors"
    sums.unlink()
    run(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert "holds no unlogged sums" in caplog.text
    sums.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"unlogged_0\.safetensors cannot be read"):
        run(tmp_path, 1, str(tmp_path / "checkpoint-2"))


def test_sums_are_there_before_a_checkpoint_counts_as_complete(tmp_path, student, teacher, monkeypatch):
    from kdtrain.runs.checkpoints import missing_files
    from kdtrain.trainer import trainer as module

    seen = []
    monkeypatch.setattr(
        module, "save_unlogged", lambda _, folder: seen.append(missing_files(tmp_path / "checkpoint-1"))
    )
    make_trainer(tmp_path, student, teacher, save_strategy="steps", save_steps=1).train()
    assert seen == [["trainer_state.json"]]


def test_the_time_of_a_running_pause_is_no_training_time(monkeypatch):
    """A checkpoint notes the seconds of its record while it is being saved."""
    clock = iter([10.0, 12.0, 15.0, 16.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    stopwatch = metrics.Stopwatch()
    stopwatch.start()
    with stopwatch.pause():
        assert stopwatch.seconds() == 2.0
    assert stopwatch.lap() == 3.0
