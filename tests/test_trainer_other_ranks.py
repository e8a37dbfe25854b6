"""Real trainers on real ranks that go on from one another's checkpoints, see `test_trainer_rows.py` for the grid."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from kdtrain.errors import CheckpointError
from kdtrain.trainer.resume_checks import check_can_be_loaded
from tests import tiny
from tests.test_distributed import sharding_on_a_cpu
from tests.test_trainer import make_trainer

ROWS = [
    {"input_ids": [4 + i % 3, 20 + i, *range(6, 7 + i % 4)], "labels": [-100, 20 + i, *range(6, 7 + i % 4)]}
    for i in range(13)
]
"""The second token says which it is."""
SUMS = ("loss", "sft_loss", "token_accuracy", "student_entropy", "on_policy_fraction")


def train(folder, resume=None, **options):
    """What one rank has trained: each step's rows, the epochs and learning rates of its log, its losses."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1, layers=1), rows=ROWS, llm_kd_weight=0, sft_alpha=1.0,
        **{"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, **options},
    )  # fmt: skip
    steps, upstream = [], trainer.get_batch_samples

    def noting(*args):
        batches, num_items = upstream(*args)
        new = [row for batch in batches for row in batch.labels.tolist() if any(label >= 20 for label in row)]
        steps.append([next(label for label in row if label >= 20) - 20 for row in new])
        return batches, num_items

    trainer.get_batch_samples = noting
    trainer.train(resume_from_checkpoint=resume)
    before = int(resume.rpartition("-")[2]) if resume else 0
    records = [record for record in trainer.state.log_history if "loss" in record and record["step"] > before]
    return {
        "steps": steps,
        "last": trainer.state.global_step,
        "planned": trainer.state.max_steps,
        "epochs": [record["epoch"] for record in records],
        "rates": [record["learning_rate"] for record in records],
        "decay": [group["weight_decay"] for group in trainer.optimizer.param_groups],
        "losses": {record["step"]: record["loss"] for record in records},
        "sums": {record["step"]: [record[name] for name in SUMS] for record in records},
    }


def on_ranks(ranks, folder, resume=None, **options):
    """The same of all ranks together, rows by rank and micro-batch as they were dealt."""
    if ranks == 1:
        return train(folder, resume, **options)
    own = tiny.run_ranks(_train, ranks, folder, resume, options)
    together = [[row for rank in step for row in rank] for step in zip(*(rank["steps"] for rank in own), strict=True)]
    return {**own[0], "steps": together}


def _train(folder, resume, options):
    sharding = sharding_on_a_cpu() if options.pop("sharded", False) else {}
    return train(folder, resume, **sharding, **options)


def batches(batch, accumulation):
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}


SAVING = {"save_strategy": "steps", "save_steps": 1}
FIRST = {1: batches(2, 1), 2: batches(1, 2)}  # 2 and 4 rows a step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "other", "options", "stops"),
    [
        (1, 1, batches(3, 2), (1, 4, 9)),
        (1, 2, batches(2, 1), (4,)),
        (2, 1, batches(1, 3), (1, 5)),
        (2, 2, FIRST[2], (5,)),  # within the second epoch, whose order upstream did not find on several ranks
        (2, 4, batches(1, 2), (2,)),
    ],
)
def test_a_run_goes_on_with_the_next_row_on_other_ranks_in_other_batches(tmp_path, ranks, other, options, stops):
    whole = on_ranks(ranks, tmp_path, **FIRST[ranks], **SAVING)
    order = [row for step in whole["steps"] for row in sorted(step)]
    assert sorted(order[:13]) == sorted(order[13:]) == list(range(13))
    for stop in stops:
        rest = on_ranks(other, tmp_path / "other", str(tmp_path / f"checkpoint-{stop}"), **options)
        done = sum(map(len, whole["steps"][:stop]))
        rows = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] * other
        trained, sizes = [row for step in rest["steps"] for row in step], [len(step) for step in rest["steps"]]
        assert len(trained) == 26 - done
        ends = 13 - done % 13 if done < 13 else 26 - done  # of the epoch that it goes on within
        assert sorted(trained[:ends] + order[13 * (done // 13) : done]) == list(range(13))
        assert sorted(trained[ends:]) == list(range(13))[: len(trained) - ends]
        assert sizes[: ends // rows] == [rows] * (ends // rows)
        assert rest["last"] == rest["planned"] == stop + len(sizes)
        assert rest["epochs"][-1] == 2.0
        assert rest["epochs"] == sorted(rest["epochs"])
        if (other, options) == (ranks, FIRST[ranks]):
            assert rest["losses"].items() <= whole["losses"].items()
        if done % 13 % rows:
            assert rest["epochs"][0] == pytest.approx((done + sizes[0]) / 13)


@pytest.mark.slow
def test_a_record_covers_the_steps_before_a_resume_on_other_ranks(tmp_path):
    """Rows of a step are the same on one rank and on two, so its loss is too, but for rounding."""
    options = {"logging_steps": 4, "num_train_epochs": 1}
    whole = on_ranks(1, tmp_path / "one", **{**batches(4, 1), **SAVING, **options})
    for ranks, other in ((1, 2), (2, 1)):
        first, then = (batches(4 // number, 1) for number in (ranks, other))
        folder = tmp_path / f"from-{ranks}"
        on_ranks(ranks, folder, **first, **SAVING, **options)
        rest = on_ranks(other, tmp_path / "rest", str(folder / "checkpoint-2"), **then, **options)
        assert rest["sums"] == {step: pytest.approx(sums, rel=1e-5) for step, sums in whole["sums"].items()}


def test_max_steps_that_were_raised_give_the_rates_of_the_longer_run(tmp_path):
    """Linear to 0: the run that was to end at step 4 stood at 0, and would have taken a step with it."""
    options = {**batches(2, 1), "learning_rate": 0.008}
    first = train(tmp_path, max_steps=4, **options, **SAVING)
    assert first["rates"] == pytest.approx([0.008, 0.006, 0.004, 0.002])
    rest = train(tmp_path / "rest", str(tmp_path / "checkpoint-4"), max_steps=8, **options)
    assert rest["rates"] == pytest.approx([0.004, 0.003, 0.002, 0.001])
    options["learning_rate"] = 1e-3
    slower = train(tmp_path / "rest", str(tmp_path / "checkpoint-2"), max_steps=4, **options)
    assert slower["rates"] == pytest.approx([0.0005, 0.00025])
    assert slower["decay"] == [0.0, 0.0]
    decayed = train(tmp_path / "rest", str(tmp_path / "checkpoint-2"), max_steps=4, weight_decay=0.5, **options)
    assert decayed["decay"] == [0.5, 0.0]


def test_rates_of_other_batches_are_those_of_a_run_with_them_at_the_same_row(tmp_path):
    """Twelve of 26 rows with two a step: then four a step, which are eight steps in all, of which four are left."""
    train(tmp_path, **batches(2, 1), **SAVING)
    rest = train(tmp_path / "rest", str(tmp_path / "checkpoint-6"), **batches(4, 1))
    assert rest["rates"] == pytest.approx([1e-3 * left / 8 for left in (5, 4, 3, 2, 1)])
    saved = json.loads((tmp_path / "checkpoint-6" / "data_position.json").read_text())
    assert saved == {
        "version": 1, "epoch": 0, "row": 12, "rows_per_epoch": 13, "seed": 42, "rows_per_step": 2, "processes": 1,
        "step": 6, "end": {"epoch": 2, "row": 0}, "num_train_epochs": 2, "stream": None, "rows_per_group": None,
    }  # fmt: skip


class EndEpochs(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop = state.global_step in (2, 5)


def test_an_epoch_that_a_callback_has_ended_is_not_gone_on_with(tmp_path):
    options = {**batches(2, 1), "extra": {"callbacks": [EndEpochs()]}}
    whole = train(tmp_path, **options, **SAVING)
    assert len(whole["steps"]) == 5
    for stop in (1, 2, 3):
        rest = train(tmp_path / "rest", str(tmp_path / f"checkpoint-{stop}"), **options)
        assert rest["steps"] == whole["steps"][stop:]
        assert rest["losses"].items() <= whole["losses"].items()
        assert rest["rates"] == whole["rates"][stop:]


# ---- what cannot be loaded -------------------------------------------------------------------------------------------


def test_pieces_of_fsdp2_are_loaded_on_other_ranks_and_refused_where_nothing_is_sharded(tmp_path):
    options = {**batches(1, 1), "num_train_epochs": 1, "save_steps": 3, "sharded": True}
    whole = on_ranks(2, tmp_path, **options, save_strategy="steps")
    checkpoint = tmp_path / "checkpoint-3"
    rest = on_ranks(4, tmp_path / "rest", str(checkpoint), **options)
    trained = [row for step in whole["steps"][:3] + rest["steps"] for row in step]
    assert sorted(trained) == list(range(13))
    with pytest.raises(CheckpointError, match="saved with FSDP, and this run is without sharding"):
        train(tmp_path / "rest", str(checkpoint), **batches(1, 1))


@pytest.mark.parametrize(
    ("engine", "files", "processes", "message"),
    [
        ("deepspeed", ["global_step3"], 2, "in pieces for 2 processes, and there are 4.*Resume on 2, or begin anew"),
        ("deepspeed", ["optimizer.pt"], 4, "saved without sharding, and this run is with DeepSpeed"),
        ("fsdp", ["optimizer.pt"], 4, "saved without sharding, and this run is with FSDP"),
        (None, ["global_step3"], 4, "saved with DeepSpeed, and this run is without sharding"),
    ],
)
def test_an_optimizers_state_that_cannot_be_loaded_is_refused_with_a_way_out(
    tmp_path, engine, files, processes, message
):
    for name in files:
        (tmp_path / name).mkdir()
    for rank in range(processes):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    trainer = SimpleNamespace(
        is_deepspeed_enabled=engine == "deepspeed", is_fsdp_enabled=engine == "fsdp", args=SimpleNamespace(world_size=4)
    )
    with pytest.raises(CheckpointError, match=message):
        check_can_be_loaded(trainer, tmp_path)
