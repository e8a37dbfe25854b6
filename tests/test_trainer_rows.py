"""A run goes on after the same rows, whatever batch, accumulation and ranks are when it is resumed."""

import functools
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, RandomSampler

from kdtrain.trainer.data_position import Dealing, Position, read_position
from kdtrain.trainer.row_order import ByLength, EpochSampler, RowOrder
from kdtrain.trainer.row_progress import RowProgress

ROWS, SEED, EPOCHS = 13, 7, 2
OPTIONS = list(itertools.product((1, 2, 4), range(1, 7), (1, 2, 3)))  # ranks, batch, accumulation
ORDER = [RowOrder(ROWS, True, SEED).of(epoch) for epoch in range(EPOCHS + 1)]
LENGTHS = [5, 30, 7, 31, 6, 29, 32, 8, 9, 28, 33, 27, 10]
DATA = Dataset.from_dict({"input_ids": [[1] * length for length in LENGTHS]})
ALL = [(epoch, row) for epoch in range(EPOCHS) for row in ORDER[epoch]]


# ---- the grid: real samplers and real shards, without models ---------------------------------------------------------


class Run:
    """What a trainer does with its rows, in upstream's order, on all of its ranks at once."""

    def __init__(self, ranks, batch, accumulation, **options):
        arguments = {"num_train_epochs": EPOCHS, "max_steps": -1, "dataloader_drop_last": False, **options}
        self.args = SimpleNamespace(
            **{"train_sampling_strategy": "random", **arguments}, seed=SEED, data_seed=None, world_size=ranks,
            ignore_data_skip=False, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        self.accelerator, self._train_batch_size = SimpleNamespace(num_processes=ranks), batch
        self.train_dataset, self.get_tp_size = DATA, lambda: 1
        self.state = SimpleNamespace(global_step=0, epoch=0.0, max_steps=0)
        self.control = SimpleNamespace(should_epoch_stop=False, should_training_stop=False)
        self.rows = RowProgress(self)
        self.windows, self.epochs = [], []

    def train(self, checkpoint=None, save_in=None):
        """Each step's rows, as (epoch, row); a checkpoint after each."""
        self.rows.begin(checkpoint)
        dealing, sampler = self.rows.dealing, self.rows.new_sampler()
        shards = [self._shard(sampler, rank) for rank in range(self.args.world_size)]
        batches, steps = len(shards[0]), dealing.steps(ROWS)
        planned = self.args.max_steps if self.args.max_steps > 0 else -int(-self.args.num_train_epochs * steps // 1)
        epochs = -(-planned // steps)
        epochs, self.state.max_steps = self.rows.training_values((epochs, planned))
        first = 0
        if checkpoint is not None:
            self.state.global_step, first = self.rows._start.saved.step, self.rows.first_epoch
        for epoch in range(first, epochs):
            loader = SimpleNamespace(batch_sampler=shards[0])
            told = self.rows.begin_epoch(epoch, loader)
            self._epoch(epoch, [list(shard) for shard in shards], told, batches, steps, save_in)
            if self.state.global_step >= self.state.max_steps:
                break
        assert self.state.global_step == self.state.max_steps
        return self.windows

    def _shard(self, sampler, rank):
        batches = BatchSampler(sampler, self._train_batch_size, self.args.dataloader_drop_last)
        return BatchSamplerShard(batches, self.args.world_size, rank) if self.args.world_size > 1 else batches

    def _epoch(self, epoch, shards, told, batches, steps, save_in):
        batches, steps = told.get("steps_in_epoch", batches), told.get("num_update_steps_per_epoch", steps)
        assert {len(shard) for shard in shards} == {batches}
        accumulation = self.args.gradient_accumulation_steps
        assert steps > 0  # upstream ends the training where an epoch has no batch
        left = self.rows.rows_being_read
        for step in range(steps):
            part = range(step * accumulation, min((step + 1) * accumulation, batches))
            dealt = [row for batch in part for shard in shards for row in shard[batch]]
            trained, left = dealt[:left], left - len(dealt)
            self.windows.append([(epoch, row) for row in trained])
            self.state.global_step += 1
            self.state.epoch = epoch + (part[-1] + 1) / batches
            self.rows.on_step_end(self.args, self.state, self.control)
            self.epochs.append(self.state.epoch)
            if save_in is not None:
                folder = save_in / f"checkpoint-{self.state.global_step}"
                folder.mkdir(parents=True)
                self.rows.save(folder)
            if self.state.global_step == self.state.max_steps:
                return


@functools.cache
def resumed(options, checkpoint, **arguments):
    run = Run(*options, **arguments)
    return run, run.train(checkpoint)


def flat(windows):
    return [row for window in windows for row in window]


def test_any_run_that_is_stopped_anywhere_goes_on_with_any_other_options_at_the_next_row(tmp_path):
    """54 options, stopped after each step, and gone on with each of the 54: each epoch's rows once, in order."""
    pairs = tried = 0
    standing = {}
    for options in OPTIONS:
        folder, run = tmp_path / "-".join(map(str, options)), Run(*options)
        windows = run.train(save_in=folder)
        ranks, batch, accumulation = options
        assert flat(windows) == ALL
        assert all(
            len(window) == ranks * batch * accumulation for window in windows[: ROWS // (ranks * batch * accumulation)]
        )
        for step in range(1, len(windows) + 1):
            saved = read_position(folder / f"checkpoint-{step}", run.rows.dealing)
            done = len(flat(windows[:step]))
            assert saved.position == Position(*divmod(done, ROWS))
            assert saved.end == Position(EPOCHS)
            pairs += len(OPTIONS)
            standing.setdefault(done, str(folder / f"checkpoint-{step}"))  # what is left depends on nothing else
    for done, checkpoint in standing.items():
        for options in OPTIONS:
            run, windows = resumed(options, checkpoint)
            tried += 1
            assert flat(windows) == ALL[done:], (checkpoint, options)
            assert run.epochs == sorted(run.epochs)
            assert not windows or run.epochs[-1] == EPOCHS
            for window in windows:  # no step of two epochs, none empty, and only an epoch's last one is not full
                (epoch,) = {epoch for epoch, _ in window}
                assert len(window) == run.rows.dealing.step or window[-1] == (epoch, ORDER[epoch][-1])
    assert pairs == 14_472
    assert tried == len(standing) * len(OPTIONS)


def test_options_may_change_at_every_resume(tmp_path):
    rng = random.Random(0)
    for attempt in range(60):
        checkpoint, trained = None, []
        while len(trained) < len(ALL):
            folder = tmp_path / f"{attempt}-{len(trained)}"
            run = Run(*rng.choice(OPTIONS))
            windows = run.train(checkpoint, save_in=folder)
            first = run.state.global_step - len(windows)
            stop = rng.randint(1, len(windows))
            trained += flat(windows[:stop])
            checkpoint = str(folder / f"checkpoint-{first + stop}")
        assert trained == ALL


@pytest.mark.parametrize("epochs", [0.5, 1.5, 1.34])
def test_a_part_of_an_epoch_ends_after_the_row_where_the_first_run_would_have(tmp_path, epochs):
    for options in ((1, 2, 1), (2, 1, 2), (1, 4, 1)):
        folder = tmp_path / "-".join(map(str, options))
        whole = flat(Run(*options, num_train_epochs=epochs).train(save_in=folder))
        for step, other in itertools.product((1, 2), OPTIONS):
            left = len(whole) - step * options[0] * options[1] * options[2]
            if left == 0:
                continue  # `fit` says that nothing is left to train
            rest = flat(Run(*other, num_train_epochs=epochs).train(str(folder / f"checkpoint-{step}")))
            assert rest == whole[-left:]


def test_rows_that_fill_no_batch_are_left_out_and_none_is_trained_twice(tmp_path):
    for options in ((1, 2, 1), (2, 2, 2), (1, 5, 1)):
        folder = tmp_path / "-".join(map(str, options))
        windows = Run(*options, dataloader_drop_last=True).train(save_in=folder)
        for step, other in itertools.product(range(1, len(windows)), OPTIONS):
            if other[0] * other[1] > ROWS:
                continue  # refused before the first step
            rest = flat(Run(*other, dataloader_drop_last=True).train(str(folder / f"checkpoint-{step}")))
            trained = flat(windows[:step]) + rest
            assert len(set(trained)) == len(trained)
            for epoch in range(EPOCHS):
                missing = ROWS - sum(row[0] == epoch for row in trained)
                assert missing < max(other[0] * other[1], options[0] * options[1])


def test_max_steps_stays_a_number_of_steps(tmp_path):
    first = Run(1, 2, 1, max_steps=6)
    trained = flat(first.train(save_in=tmp_path)[:4])
    run = Run(2, 2, 1, max_steps=6)
    rest = run.train(str(tmp_path / "checkpoint-4"))
    assert len(rest) == 2
    assert trained + flat(rest) == ALL[:13]  # 8 rows, then 4, then the one that is left of the epoch
    assert len(flat(Run(1, 1, 1, max_steps=30).train(str(tmp_path / "checkpoint-4")))) == 26


# ---- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_ranks_get_what_accelerate_gives_them_of_a_random_sampler(rows, drop_last):
    """As it was: rows that are repeated at an epoch's end, and the order itself."""
    from accelerate.data_loader import SeedableRandomSampler

    theirs, epoch = SeedableRandomSampler(RandomSampler(range(rows)).data_source, data_seed=SEED), 1
    for ranks, batch in itertools.product((1, 2, 4), range(1, 7)):
        fills_up = ranks > 1 and not drop_last
        ours = EpochSampler(RowOrder(rows, True, SEED), ranks * batch if fills_up else 1)
        for rank, begin in itertools.product(range(ranks), range(0, rows, ranks * batch)):
            ours.read(epoch, begin)
            theirs.set_epoch(epoch)
            found = [BatchSampler(sampler, batch, drop_last) for sampler in (ours, theirs)]
            own, expected = (list(BatchSamplerShard(one, ranks, rank) if ranks > 1 else one) for one in found)
            assert own == expected[begin // (ranks * batch) :]  # which is what upstream's skipping leaves


def test_another_tools_checkpoint_is_placed_by_its_batches(tmp_path):
    """transformers writes the part of its epoch, its batch, and a file of random numbers for each of several ranks."""
    import json

    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"global_step": 6, "epoch": 1 + 2 / 4, "train_batch_size": 2})
    )
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    saved = read_position(tmp_path, Dealing(ROWS, 3, 1, False))
    assert (saved.position, saved.processes, saved.step) == (Position(1, 8), 2, 6)


# ---- rows grouped by length ------------------------------------------------------------------------------------------

BY_LENGTH = {"train_sampling_strategy": "group_by_length"}


def test_steps_grouped_by_length_have_the_same_rows_however_they_are_dealt(tmp_path):
    by_step = {}
    for ranks, batch, accumulation in OPTIONS:
        windows = Run(ranks, batch, accumulation, **BY_LENGTH).train()
        by_step.setdefault(ranks * batch * accumulation, []).append(windows)
    for size, runs in by_step.items():
        assert all(windows == runs[0] for windows in runs)
        for epoch in range(EPOCHS):
            rows = [row for window in runs[0] for number, row in window if number == epoch]
            assert sorted(rows) == list(range(ROWS))
            assert size > ROWS or LENGTHS[rows[0]] == 33 or 33 in [LENGTHS[row] for row in rows[ROWS // size * size :]]
    of_4 = by_step[4][0]
    assert of_4[:3] != [[(0, row) for _, row in window] for window in of_4[4:7]]  # another order in each epoch
    widths = [max(LENGTHS[row] for _, row in window) * len(window) for window in of_4]
    random_widths = [max(LENGTHS[row] for _, row in window) * len(window) for window in Run(1, 4, 1).train()]
    assert sum(widths) < 0.9 * sum(random_widths)


def test_a_run_grouped_by_length_goes_on_with_other_options_at_the_next_row_of_its_order(tmp_path):
    windows = Run(1, 4, 1, **BY_LENGTH).train(save_in=tmp_path)
    for step in range(1, len(windows) + 1):
        for options in ((1, 4, 1), (2, 1, 2), (2, 3, 1), (1, 1, 1)):
            run = Run(*options, **BY_LENGTH)
            again = run.train(str(tmp_path / f"checkpoint-{step}"), save_in=tmp_path / f"{step}-{options}")
            assert flat(windows[:step]) + flat(again) == flat(windows)
            for later in (tmp_path / f"{step}-{options}").glob("checkpoint-*"):  # and once more
                saved = read_position(later, run.rows.dealing)
                assert saved.rows_per_group == 4


def test_groups_of_many_rows_have_little_padding_and_meet_other_rows_in_each_epoch():
    draw = random.Random(0)
    lengths = np.array([draw.randint(1, 500) for _ in range(3003)])
    order = RowOrder(len(lengths), True, SEED, ByLength(lengths, 8))
    first, second = order.of(0), order.of(1)
    assert sorted(first) == sorted(second) == list(range(3003))
    steps = [first[i : i + 8] for i in range(0, 3003, 8)]
    assert len(steps[-1]) == 3
    assert sum(max(lengths[step]) * 8 for step in steps[:-1]) < 1.05 * lengths.sum()
    assert lengths[first[0]] == max(lengths[first[:3000]])
    again = {frozenset(second[i : i + 8]) for i in range(0, 3003, 8)}
    assert len(again & set(map(frozenset, steps))) < 5
    longest = [max(lengths[step]) for step in steps[1:-1]]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2  # in any order
