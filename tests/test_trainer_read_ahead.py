"""Windows that are read ahead for the teacher: nothing that is trained depends on it, and it is told in time."""

import hashlib

import pytest
import torch
from transformers import TrainerCallback

from kdtrain.generation.sampling import student_generates
from kdtrain.losses.head import Head
from kdtrain.teachers import DenseTargets, Targets, Teacher
from tests import tiny
from tests.test_trainer import make_trainer

TIMES = ("runtime", "_per_second", "teacher_wait_fraction", "step_time_s", "elapsed_s", "remaining_s")
NOT_COMPARED = ("tokens_per_second", "supervised_tokens_per_second", "peak_memory_gib", *TIMES)
SEED = 1  # at lmbda 0.5 the fourth and the sixth window are the student's
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": "zero " * (1 + i % 5)},
        ]
    }
    for i in range(11)
]


def name_of(batch):
    """What a batch holds, in short."""
    parts = (batch.model_inputs["input_ids"], batch.labels)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:8]


class Asked(Teacher):
    """Answers only for batches that it was told of; its answers do not depend on when."""

    waits = True

    def __init__(self, lookahead=0):
        self.model = tiny.make_qwen3(seed=2, hidden=48).eval()
        self.vocab_size, self.lookahead = 320, lookahead
        self.calls, self.told = [], []

    def prepare(self, window):
        names = tuple(name_of(batch) for batch in window)
        self.calls.append(("prepare", names))
        self.told += names

    def targets(self, batch):
        self.told.remove(name_of(batch))  # an error where it was not told of it
        self.calls.append(("targets", name_of(batch)))
        self.waited_s += 0.25
        with torch.no_grad():
            hidden_SH = self.model.model(**batch.teacher_inputs).last_hidden_state[:, :-1][batch.predicts_BT]
        return Targets(DenseTargets(hidden_SH, Head(self.model.lm_head.weight, None, 1.0, None)))


class Set(TrainerCallback):
    """Sets options of the trainer at the end of steps: {step: {name: value}}."""

    def __init__(self, options):
        self.options, self.epoch_goes_on = options, []

    def on_train_begin(self, args, state, control, **_):
        self.trainer.teacher.calls.clear()  # of the checks before the first step

    def on_step_end(self, args, state, control, **_):
        for name, value in self.options.get(state.global_step, {}).items():
            setattr(self.trainer, name, value)
        self.epoch_goes_on.append(self.trainer.accelerator.gradient_state.in_dataloader)
        control.should_epoch_stop = state.global_step in self.options.get("epochs end at", ())


def run(folder, lookahead, resume=None, changes=None, **kwargs):
    """All that a run leaves but its times, and what its teacher was asked."""
    teacher, callback = Asked(lookahead), Set(changes or {})
    extra = {"teacher": teacher, "eval_dataset": ROWS[:3], "callbacks": [callback]}
    options = {
        "sft_alpha": 0.3, "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "seed": SEED,
        **kwargs,
    }  # fmt: skip
    trainer = make_trainer(folder / f"ahead-{lookahead}", rows=ROWS, extra=extra, **options)
    callback.trainer = trainer
    trainer.train(resume_from_checkpoint=resume and str(folder / f"ahead-{lookahead}" / resume))
    records = [
        {key: value for key, value in record.items() if not any(name in key for name in NOT_COMPARED)}
        for record in trainer.state.log_history
    ]
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest()
    return {
        "records": records,
        "weights": weights,
        "calls": teacher.calls,
        "windows": windows_of(teacher.calls),
        "epoch goes on": callback.epoch_goes_on,  # for accelerate
    }


def windows_of(calls):
    """The batches that were trained and evaluated, in order."""
    return [name for kind, name in calls if kind == "targets"]


def runs(folder, ranks, lookahead, **kwargs):
    """What each rank leaves."""
    if ranks == 1:
        return [run(folder, lookahead, **kwargs)]
    return tiny.run_ranks(_run, ranks, folder, lookahead, kwargs)


def _run(folder, lookahead, kwargs):
    return run(folder, lookahead, **kwargs)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("windows", "records", "weights", "epoch goes on"):
            assert mine[name] == theirs[name], name


CASES = {
    "data": {},
    "on-policy mix": {"lmbda": 0.5},
    "workers": {"dataloader_num_workers": 2},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "three batches a window": {"gradient_accumulation_steps": 3},
    "dropped rows": {"dataloader_drop_last": True},
    "dropout": {"lmbda": 0.5, "disable_dropout": False},
}


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        *(("data", 1), ("on-policy mix", 1), ("workers", 1), ("on-policy mix", 2)),
        *(tiny.slow(case, 1) for case in list(CASES)[2:]),
        *(tiny.slow("data", 2), tiny.slow("dropped rows", 2)),
    ],
)
def test_nothing_that_is_trained_logged_or_saved_depends_on_it(tmp_path, ranks, case):
    """Some epochs and a piece of another, of rows that do not fill the last batch of an epoch."""
    expected = runs(tmp_path, ranks, 0, **CASES[case])
    for lookahead in (2, 9) if case == "data" else (2,):
        assert_same(runs(tmp_path, ranks, lookahead, **CASES[case]), expected)
    assert len(set(expected[0]["windows"])) > 4


@pytest.mark.slow
@pytest.mark.parametrize(("step", "ranks"), [(1, 1), (4, 1), (4, 2)])
def test_a_run_that_is_resumed_within_an_epoch_is_the_same_run(tmp_path, ranks, step):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = {ahead: runs(tmp_path, ranks, ahead, lmbda=0.5, **saving) for ahead in (0, 2)}
    assert_same(whole[2], whole[0])
    for ahead in (0, 2):
        resumed = runs(tmp_path, ranks, ahead, lmbda=0.5, resume=f"checkpoint-{step}")
        for mine, theirs in zip(resumed, whole[0], strict=True):
            assert mine["records"] == theirs["records"]
            assert mine["weights"] == theirs["weights"]
            assert mine["windows"] == theirs["windows"][-len(mine["windows"]) :]


def trained(calls):
    """Windows in the order in which they were prepared, each with the number of targets that were asked before."""
    asked, found = 0, []
    for kind, names in calls:
        if kind == "targets":
            asked += 1
        else:
            found.append((names, asked))
    return found


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_the_teacher_is_told_of_each_window_once_in_order_and_so_many_ahead(tmp_path, lookahead):
    """Eleven rows in batches of 2 and windows of 2 of these: three windows an epoch; the last one has 3 rows."""
    (result,) = runs(tmp_path, 1, lookahead, eval_strategy="no", max_steps=7)
    told = trained(result["calls"])
    assert [name for names, _ in told for name in names] == result["windows"]  # none twice, none for nothing
    # At the beginning of which step: so many before its own, but of the same epoch.
    steps = [max(step - lookahead, 3 * (step // 3)) for step in range(7)]
    assert [(len(names), asked) for names, asked in told] == [(2, 2 * step) for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lmbda": 0.5}, {"lmbda": 1.0}])
def test_of_windows_that_are_generated_it_is_told_when_they_have_their_answers(tmp_path, options):
    (result,) = runs(tmp_path, 1, 2, eval_strategy="no", **options)
    draws = [student_generates(SEED, step, options["lmbda"]) for step in range(8)]
    assert True in draws
    assert (False in draws) == (options["lmbda"] < 1)
    when = [step if own else max(step - 2, 3 * (step // 3)) for step, own in enumerate(draws)]
    told = trained(result["calls"])
    assert sorted(name for names, _ in told for name in names) == sorted(result["windows"])
    assert sorted(asked for _, asked in told) == sorted(2 * step for step in when)
    for step, asked in enumerate(when):
        assert (tuple(result["windows"][2 * step : 2 * step + 2]), 2 * asked) in told


CHANGES = {
    "to its own answers": {1: {"lmbda": 1.0}},
    "and back": {1: {"lmbda": 1.0}, 3: {"lmbda": 0.0}, 6: {"lmbda": 0.5}},
    "beta": {1: {"beta": 1.0}, 4: {"beta": 0.0}},
    "off and on": {1: {"llm_kd_weight": 0.0}, 3: {"llm_kd_weight": 1.0}},
    "epochs that end early": {"epochs end at": (1, 3)},
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_callback_changes_holds_from_the_next_window_whatever_was_read_ahead(tmp_path, ranks, name):
    kwargs = {"changes": CHANGES[name], "lmbda": 0.0}
    assert_same(runs(tmp_path, ranks, 2, **kwargs), runs(tmp_path, ranks, 0, **kwargs))


def test_a_second_call_of_train_begins_anew(tmp_path):
    results = []
    for lookahead in (0, 2):
        teacher = Asked(lookahead)
        trainer = make_trainer(tmp_path, rows=ROWS, extra={"teacher": teacher}, max_steps=3)
        trainer.train()
        trainer.train()
        results.append(windows_of(teacher.calls))
    assert results[0] == results[1]


# ---- waiting ---------------------------------------------------------------------------------------------------------


def wait_fractions(folder, lookahead=2, resume=None, teacher=None, **kwargs):
    """The logged share of each training record."""
    extra = {"teacher": teacher or Asked(lookahead), "eval_dataset": ROWS[:3]}
    trainer = make_trainer(
        folder, rows=ROWS, extra=extra, max_steps=6, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1,
        logging_steps=3, save_strategy="steps", save_steps=1, **kwargs,
    )  # fmt: skip
    trainer.stopwatch.lap = lambda: 10.0
    trainer.train(resume_from_checkpoint=resume)
    return [record.get("teacher_wait_fraction") for record in trainer.state.log_history if "loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_share_of_waiting_is_logged_without_that_of_evaluations_and_survives_a_resume(tmp_path, ranks):
    """A quarter of a second for each batch; records of three steps, in laps of ten seconds.

    An epoch has six batches on one rank, and on each of two it has three: windows of two and of one.
    """
    expected = [batches * 0.25 / 10 for batches in {1: (6, 6), 2: (2 + 1 + 2, 1 + 2 + 1)}[ranks]]

    def fractions(resume=None):
        if ranks == 1:
            return [wait_fractions(tmp_path, resume=resume)]
        return tiny.run_ranks(wait_fractions, 2, tmp_path, 2, resume)

    for found in fractions():
        assert found == pytest.approx(expected)
    for found in fractions(str(tmp_path / "checkpoint-2")):
        assert found == pytest.approx(expected)


def test_the_share_of_waiting_is_absent_for_a_teacher_that_never_waits(tmp_path):
    never = Asked()
    never.waits = False
    assert wait_fractions(tmp_path, teacher=never) == [None, None]


class Ready(Asked):
    """May wait, and never had to."""

    waited_s = property(lambda self: 0.0, lambda self, value: None)


def test_it_is_zero_for_one_that_could_have_waited(tmp_path):
    assert wait_fractions(tmp_path, teacher=Ready()) == [0.0, 0.0]


class Waited(Asked):
    """Waits before each window, a second."""

    waited_s = 0.0

    def wait(self, window):
        self.waited_s += 1.0


def test_waiting_before_a_window_counts_behind_an_evaluation_too(tmp_path):
    """Three windows of six batches in all, which wait a quarter of a second each as well."""
    assert wait_fractions(tmp_path, teacher=Waited()) == pytest.approx([(3 + 6 * 0.25) / 10] * 2)
