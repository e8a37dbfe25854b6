"""The rows of a run: those to train on and those to evaluate on."""

import collections
from unittest import mock

import datasets
import pytest

from kdtrain.config import ConfigLoader
from kdtrain.errors import DataError
from kdtrain.runs.build import Given
from kdtrain.runs.read_data import read_data
from kdtrain.trainer.given_rows import RowsInMemory

ROWS = [{"prompt": f"the {i}", "completion": f" path {i}"} for i in range(60)]


@pytest.fixture
def read(project, tokenizer, monkeypatch):
    """The rows of a run with these options, decoded: those to train on, and those to evaluate on."""

    monkeypatch.chdir(project)

    def call(*overrides, given=None):
        (project / "pairs.csv").write_text(
            "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS)
        )
        options = ["data.train=pairs.csv", f"data.cache_dir={project}/cache", *overrides]
        data = read_data(
            ConfigLoader.load(project / "config.yaml", options), 0, tokenizer, mock.Mock(), given or Given()
        )
        decoded = [[tokenizer.decode(ids) for ids in side["input_ids"]] for side in (data.train, data.evaluation)]
        return (*decoded, data)

    return call


def test_a_share_of_the_training_rows_is_evaluated_on_and_not_trained_on(read, project):
    train, held_out, data = read("data.eval=20%")
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len({*train, *held_out}) == 60
    assert not set(data.train["row_id"]) & set(data.evaluation["row_id"])
    assert list((project / "cache").glob("encoded-*"))


def test_the_share_is_taken_of_every_source_after_its_limit_and_before_its_weight(read):
    sources = "data.train=[{path: pairs.csv, limit: 40}, {path: pairs.csv, split: 'train[40:]', weight: 2}]"
    train, held_out, data = read(sources, "data.eval=30%")
    assert not set(train) & set(held_out)
    assert len({*train, *held_out}) == 60
    for rows in (train, held_out):
        counted = collections.Counter(rows)
        assert {counted[row] for row in rows if int(row.split()[1]) >= 40} == {2}
    assert {row_id[0] for row_id in data.evaluation["row_id"]} == {"0", "1"}


@pytest.mark.parametrize("rows", [RowsInMemory(ROWS), datasets.Dataset.from_list(ROWS)])
def test_rows_that_are_handed_over_are_shared_out_and_sliced_as_those_of_files(rows, read):
    train, held_out, _ = read("data.eval=20%", given=Given(train_dataset=rows))
    assert (train, held_out) == read("data.eval=20%")[:2]
    sliced = "data.train={path: train_dataset, split: 'train[:30]'}"
    train, held_out, _ = read(sliced, "data.eval=20%", given=Given(train_dataset=rows))
    assert len(train) + len(held_out) == 30


def test_a_share_that_leaves_a_side_empty_ends_the_run_before_it_begins(read):
    with pytest.raises(DataError, match=r"0\.01% of the 60 rows of data\.train leaves none to evaluate on"):
        read("data.eval=0.01%")
