"""Which rows are trained on and evaluated, in every epoch, on any number of ranks, and after a resume."""

from contextlib import ExitStack

import datasets
import numpy as np
import pytest

from kdtrain.config import ConfigError, ConfigLoader
from kdtrain.data import Epochs
from tests import tiny
from tests.test_trainer import make_trainer

ROWS = [{"input_ids": [5, 6 + i, 7, 8], "labels": [-100, 6, 7, 8]} for i in range(20)]

# ---- parts of a source -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 10])
@pytest.mark.parametrize("weight", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_part_of_a_source_goes_through_all_of_it_before_a_row_comes_again(size, weight):
    epochs = Epochs([size], [weight], seed=3)
    seen = np.zeros(size, int)
    for epoch in range(40):
        rows = epochs.rows(epoch)
        assert len(rows) == len(set(rows)) == len(epochs) == max(round(size * weight), 1)
        np.add.at(seen, rows, 1)
        assert seen.max() - seen.min() <= 1


def test_whole_copies_come_in_every_epoch_beside_the_part(tmp_path):
    epochs = Epochs([4, 3, 10], [1.5, 2, 0.5], seed=0)
    first, second = epochs.rows(0), epochs.rows(1)
    assert len(first) == len(second) == len(epochs) == 6 + 6 + 5
    assert sorted(np.concatenate([first, second])) == sorted([*range(4)] * 3 + [*range(4, 7)] * 4 + [*range(7, 17)])
    assert Epochs([4, 3, 10], [1.5, 2, 0.5], seed=0).rows(7).tolist() == epochs.rows(7).tolist()
    assert Epochs([4, 3, 10], [1.5, 2, 0.5], seed=1).rows(0).tolist() != first.tolist()
    assert epochs.rows(1).tolist() == second.tolist()  # also when it is asked for an earlier one


def read_rows(folder, world, resume=None, strategy="random", save_steps=7):
    """The rows of every window of three epochs of ten of the twenty rows."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=ROWS, per_device_train_batch_size=4 // world,
        max_steps=-1, num_train_epochs=3, save_strategy="steps", save_steps=save_steps,
        train_sampling_strategy=strategy,
    )  # fmt: skip
    trainer.read_epochs(Epochs([20], [0.5], seed=5))
    seen = []
    original = trainer.get_batch_samples

    def collect(*args):
        batches, items = original(*args)
        supervised = [b.model_inputs["input_ids"][i, 1].item() - 6 for b in batches for i in range(len(b))
                      if (b.labels[i] != -100).any()]  # fmt: skip
        seen.append(supervised)
        return batches, items

    trainer.get_batch_samples = collect
    trainer.train(resume_from_checkpoint=resume)
    return seen, trainer.state.global_step


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_two_epochs_of_half_the_rows_read_all_of_them_on_any_number_of_ranks(tmp_path, strategy):
    windows, steps = read_rows(tmp_path / "one", 1, strategy=strategy)
    assert steps == len(windows) == 9
    epochs = [[row for window in windows[i : i + 3] for row in window] for i in (0, 3, 6)]
    assert sorted(epochs[0] + epochs[1]) == list(range(20))
    assert (epochs[0] == sorted(epochs[0])) == (strategy == "sequential")
    assert set(epochs[2]) not in (set(epochs[0]), set(epochs[1]))
    if strategy == "sequential":
        return
    first, second = tiny.run_ranks(read_rows, 2, tmp_path / "two", 2, None, strategy)
    assert [a + b for a, b in zip(first[0], second[0], strict=True)] == windows


@pytest.mark.parametrize(("world", "step"), [(1, 3), tiny.slow(1, 5), tiny.slow(2, 5)])
def test_a_resumed_run_reads_the_part_that_the_uninterrupted_one_read(tmp_path, world, step):
    def run(resume):
        if world == 1:
            return [read_rows(tmp_path, 1, resume, "random", step)[0]]
        return [windows for windows, _ in tiny.run_ranks(read_rows, 2, tmp_path, 2, resume, "random", step)]

    whole = run(None)
    for resumed, expected in zip(run(str(tmp_path / f"checkpoint-{step}")), whole, strict=True):
        assert resumed == expected[step:]


def test_a_config_with_half_a_source_trains_on_another_half_in_every_epoch(project):
    from rich.console import Console

    from kdtrain.cli.progress import ConsoleReporter
    from kdtrain.runs.build import Given, build_trainer

    half = f"[{{path: {project / 'train.jsonl'}, weight: 0.5}}]"
    overrides = [f"data.train={half}", f"data.eval={half}", "training.max_steps=-1", "training.num_train_epochs=2"]
    arguments = ConfigLoader.load_training_config(str(project / "config.yaml"), overrides=overrides)
    reporter = ConsoleReporter(Console(quiet=True), quiet=True)
    trainer, report = build_trainer(arguments.config, arguments.training_args, reporter, False, Given(), ExitStack())
    assert report.rows_per_epoch == 12
    assert len(trainer.train_dataset) == 24
    assert len(trainer.eval_dataset) == 12
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert report.total_tokens == sum(lengths[i] for i in report.epochs.rows(0))
    trainer.train()
    assert trainer.state.global_step == 6


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_leaves_out_no_rows_where_training_drops_its_last_batch(tmp_path):
    results = []
    for drop in (False, True):
        trainer = make_trainer(
            tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=ROWS, per_device_eval_batch_size=8,
            dataloader_drop_last=drop,
        )  # fmt: skip
        results.append(trainer.evaluate(datasets.Dataset.from_list(tiny.CHATS)))
        assert len(trainer.get_train_dataloader()) == 10
        assert trainer.args.dataloader_drop_last is drop
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-6)
    assert results[1]["eval_loss"] > 0


def evaluate_dropping(folder, world):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=ROWS, per_device_eval_batch_size=4 // world,
        dataloader_drop_last=True,
    )  # fmt: skip
    return trainer.evaluate(datasets.Dataset.from_list(tiny.CHATS[:5]))["eval_loss"]


def test_nor_does_it_count_rows_twice_on_two_ranks(tmp_path):
    expected = evaluate_dropping(tmp_path, 1)
    assert tiny.run_ranks(evaluate_dropping, 2, tmp_path, 2) == pytest.approx([expected] * 2, rel=1e-5)


def predictions(folder, world):
    """What `compute_metrics` is given for five rows: the labels, and a sum of the logits of each row's tokens."""
    seen = {}

    def compute_metrics(prediction):
        mask = prediction.label_ids != -100
        logits = np.where(mask[..., None], prediction.predictions, 0)
        seen["labels"], seen["logits"] = prediction.label_ids.tolist(), np.abs(logits).sum((1, 2)).tolist()
        return {"rows": len(mask)}

    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), per_device_eval_batch_size=8 // world,
        extra={"compute_metrics": compute_metrics},
    )  # fmt: skip
    return trainer.evaluate(datasets.Dataset.from_list(tiny.CHATS[:5]))["eval_rows"], seen


def test_compute_metrics_gets_every_row_once_on_two_ranks(tmp_path):
    rows, expected = predictions(tmp_path, 1)
    assert rows == 5
    for its_rows, seen in tiny.run_ranks(predictions, 2, tmp_path, 2):
        assert its_rows == 5
        assert [[t for t in row if t != -100] for row in seen["labels"]] == [
            [t for t in row if t != -100] for row in expected["labels"]
        ]
        assert seen["logits"] == pytest.approx(expected["logits"], rel=1e-4)


# ---- options of the loader -------------------------------------------------------------------------------------------

REFUSED = {"split_batches": True, "dispatch_batches": True, "even_batches": False, "use_seedable_sampler": False}


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_loader_options_that_would_count_rows_wrongly_are_refused(tmp_path, project, name, value):
    with pytest.raises(ValueError, match=f"accelerator_config: {name} cannot be had"):
        make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), accelerator_config={name: value})
    override = f"training.accelerator_config={{{name}: {str(value).lower()}}}"
    with pytest.raises(ConfigError, match=rf"{name}.*cannot be {str(value).lower()}"):
        ConfigLoader.load_training_config(str(project / "config.yaml"), overrides=[override])
    make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), accelerator_config={"non_blocking": True})
