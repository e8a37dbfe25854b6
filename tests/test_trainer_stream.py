"""Real trainers that read a stream: the same rows in the same steps, whatever deals them, and after a resume."""

import datasets
import pytest
import torch

from kdtrain.data import Source
from kdtrain.data.dataset import encoder_of
from kdtrain.data.stream import order, rows
from kdtrain.data.stream.rows import StreamedRows
from kdtrain.errors import ConfigError, DataError
from tests import tiny
from tests.test_data_dataset import write_lines
from tests.test_trainer import make_trainer

STEPS = 6


def make_stream(folder, bad=100):
    """Two sources of several files, with rows that are too long or bad; every block and chunk ends within a step."""
    folder = folder / "data"
    if not folder.exists():
        for name, sizes in (("a", (9, 5)), ("b", (6, 7))):
            (folder / name).mkdir(parents=True)
            for number, size in enumerate(sizes):
                some = [
                    {"prompt": f"the {i}", "completion": " path" * (1 + i % 5) + f" {name}{i}"} for i in range(size)
                ]
                write_lines(folder / name / f"{number}.jsonl", [*some, {"prompt": 3}, {"prompt": "the " * 40}])
    order.BLOCK_ROWS, rows._AT_ONCE = 10, 3
    encoder, limits = encoder_of(tiny.make_tokenizer(), max_length=40, on_overlength="drop", train_on="assistant")
    sources = [Source(str(folder / name), weight=weight, streaming=True) for name, weight in (("a", 2), ("b", 1))]
    first = datasets.Dataset.from_list([{"input_ids": [4, 5], "labels": [-100, 5]}])
    return StreamedRows(sources, encoder, limits, seed=3, shuffle=True, first=first, max_bad_rows=bad)


@pytest.fixture(autouse=True)
def _as_they_were(monkeypatch):
    monkeypatch.setattr(order, "BLOCK_ROWS", order.BLOCK_ROWS)
    monkeypatch.setattr(rows, "_AT_ONCE", rows._AT_ONCE)


def train(folder, resume=None, data=None, bad=100, out="run", **options):
    """The rows of each step by micro-batch, the losses by step, and the student's weights."""
    trainer = make_trainer(
        folder / out, tiny.make_qwen3(seed=1, layers=1), rows=data or make_stream(folder, bad), llm_kd_weight=0,
        sft_alpha=1.0,
        **{"max_steps": STEPS, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None,
           "learning_rate": 1e-3, "train_sampling_strategy": "random", **options},
    )  # fmt: skip
    steps, upstream = [], trainer.get_batch_samples

    def noting(*args):
        batches, num_items = upstream(*args)
        steps.append([list(batch.rows.ids) for batch in batches])
        return batches, num_items

    trainer.get_batch_samples = noting
    trainer.train(resume_from_checkpoint=resume and str(folder / out / f"checkpoint-{resume}"))
    records = [one for one in trainer.state.log_history if "loss" in one and one["step"] > (resume or 0)]
    weights = {name: value.tolist() for name, value in trainer.unwrap(trainer.model).state_dict().items()}
    return steps, [one["loss"] for one in records], weights, [one["epoch"] for one in records]


def on_ranks(ranks, folder, resume=None, **options):
    """The same of several ranks, a step's rows in the order in which they were dealt, and the losses."""
    alone = ranks == 1
    found = [train(folder, resume, **options)] if alone else tiny.run_ranks(_train, ranks, folder, resume, options)
    steps = zip(*(one[0] for one in found), strict=True)
    return [[row for batch in zip(*step, strict=True) for own in batch for row in own] for step in steps], found[0][1]


def _train(folder, resume, options):
    return train(folder, resume, **options)


def batches(batch, accumulation):
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}


def close(losses):
    return pytest.approx(losses, rel=1e-5)


def test_steps_have_the_same_rows_whatever_deals_them_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    steps, losses, weights, epochs = train(tmp_path, **batches(4, 1))
    flat = [row for step in steps for batch in step for row in batch]
    assert len(flat) == 4 * STEPS
    assert epochs == pytest.approx([(i + 1) / STEPS for i in range(STEPS)])
    for dealt in (batches(2, 2), {**batches(4, 1), "dataloader_num_workers": 2}):
        other, same, *_ = train(tmp_path, out="other", **dealt)
        assert [row for step in other for batch in step for row in batch] == flat
        assert same == close(losses)
    for resume in (1, 4):
        rest, resumed, again, _ = train(tmp_path, resume, **batches(4, 1))
        assert (rest, resumed, again) == (steps[resume:], losses[resume:], weights)


def test_a_run_that_goes_on_with_other_batches_and_more_steps_begins_at_the_next_row(tmp_path):
    steps, *_ = train(tmp_path, **batches(4, 1))
    rest, *_ = train(tmp_path, 2, max_steps=10, **batches(2, 1))
    found = [row for step in rest for batch in step for row in batch]
    assert found == [row for step in steps[2:] for batch in step for row in batch]
    more, *_ = train(tmp_path, 10, max_steps=12, **batches(2, 1))
    assert [len(batch) for step in more for batch in step] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "now"), [((2, (2, 1)), (1, (4, 1))), ((1, (4, 1)), (2, (1, 2)))])
def test_ranks_have_rows_of_their_own_and_others_go_on_at_the_next_one(before, now, tmp_path):
    wanted, losses, *_ = on_ranks(1, tmp_path, out="alone", **batches(4, 1))
    ranks, dealt = before
    steps, found = on_ranks(ranks, tmp_path, **batches(*dealt))
    assert steps == wanted
    assert found == close(losses)
    ranks, dealt = now
    rest, resumed = on_ranks(ranks, tmp_path, 3, **batches(*dealt))
    assert rest == wanted[3:]
    assert resumed == close(losses[3:])


def _fails(folder):
    try:
        train(folder, bad=0, **batches(2, 1))
    except DataError as error:
        return str(error)
    return "trained"


def test_a_bad_row_of_one_rank_ends_both_in_the_same_step(tmp_path):
    make_stream(tmp_path)
    found = tiny.run_ranks(_fails, 2, tmp_path)
    assert any("data.max_bad_rows is 0" in one for one in found)
    assert all("data.max_bad_rows is 0" in one or "A row of another process" in one for one in found)


# ---- handed over -----------------------------------------------------------------------------------------------------


def rows_of(count):
    return datasets.Dataset.from_list([
        {"input_ids": [4 + i % 3, 20 + i, *range(6, 7 + i % 4)], "labels": [-100, 20 + i, *range(6, 7 + i % 4)],
         "row_id": str(i)} for i in range(count)
    ])  # fmt: skip


def test_an_iterable_data_set_is_read_in_its_order_and_again_behind_its_end(tmp_path):
    steps, losses, weights, _ = train(tmp_path, data=rows_of(9).to_iterable_dataset(), **batches(2, 2))
    flat = [row for step in steps for batch in step for row in batch]
    assert flat == [str(i % 9) for i in range(4 * STEPS)]
    rest, resumed, again, _ = train(tmp_path, 3, data=rows_of(9).to_iterable_dataset(), **batches(2, 2))
    assert (rest, resumed, again) == (steps[3:], losses[3:], weights)


class Plain(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows_of(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1, "num_train_epochs": 1}, "set max_steps, not num_train_epochs"),
        ({"save_strategy": "epoch"}, "set save_strategy to steps"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers to 0"),
    ],
)
def test_what_counts_on_the_number_of_rows_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, data=Plain(), **options)
