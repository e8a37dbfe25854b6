"""Figures and warnings about the student's own answers: what is counted, over ranks, and what survives a resume."""

import logging
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from kdtrain.data.batch import Batch, Rows
from kdtrain.trainer import metrics
from kdtrain.trainer.samples import SampleWatch, repetition
from tests import tiny
from tests.test_trainer import make_trainer

FIGURES = ("completion_length", "cut_fraction", "repetition", "distinct_first_tokens")
# Samples of three windows; those that end with 2 were not cut.
WINDOWS = [
    [[5, 6, 7, 2], [5] * 9 + [2], [8, 9, 8, 9, 8, 9, 8, 9, 8, 9], [6, 2]],
    [list(range(10, 22)), [5, 2], [5, 2], [7] * 12],
    [[9, 2], [8, 2], [7, 2], [6, 2]],
]


def batch_of(samples, all_repeated=False):
    """A batch as generation makes it: a prompt of two tokens, the sample, padding."""
    width = 2 + max(map(len, samples), default=0)
    labels = torch.full((len(samples), width), -100)
    for row, sample in zip(labels, samples, strict=True):
        row[2 : 2 + len(sample)] = torch.tensor(sample)
    cut = [sample[-1] != 2 for sample in samples]
    inputs = {"input_ids": labels.clamp(min=0)}
    return Batch(
        model_inputs=inputs, labels=labels, rows=Rows(cut=cut), generated_by="student", all_repeated=all_repeated
    )


def make_watch():
    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=True), state=SimpleNamespace(global_step=0), _metrics={"train": defaultdict(list)}
    )
    return SampleWatch(trainer), trainer


def figures_of(windows, dealt):
    """The record of windows whose samples are dealt to the batches of this rank by `dealt(samples, rank)`."""
    watch, trainer = make_watch()
    for samples in windows:
        watch.note([*dealt(samples, trainer.accelerator.process_index), batch_of([[5, 2]], all_repeated=True)], 12)
    for name in ("windows", "on_policy_windows"):
        trainer._metrics["train"][name] += [torch.tensor(1.0)] * len(windows)
    reduced = metrics.reduce_metrics(trainer._metrics["train"], trainer.accelerator, token_weighted=False)
    record = metrics.training_metrics(reduced, 0.0)
    return {name: record[name] for name in FIGURES if name in record}


def on_two_ranks(windows):
    """The first rank has one sample of each window, and the second one the others, in batches of two."""

    def dealt(samples, rank):
        own = samples[:1] if rank == 0 else samples[1:]
        return [batch_of(own[i : i + 2]) for i in range(0, len(own), 2)]

    return figures_of(windows, dealt)


def expected_figures(windows):
    """From the definitions, one by one."""
    every = [sample for window in windows for sample in window]
    shares = []
    for sample in every:
        if len(sample) >= 8:
            grams = Counter(" ".join(map(str, sample[i : i + 4])) for i in range(len(sample) - 3))
            shares.append(1 - len(grams) / grams.total())
    return {
        "completion_length": sum(map(len, every)) / len(every),
        "cut_fraction": sum(sample[-1] != 2 for sample in every) / len(every),
        "repetition": sum(shares) / len(shares),
        "distinct_first_tokens": sum(len({sample[0] for sample in window}) for window in windows) / len(windows),
    }


def test_repetition_is_the_share_of_4_grams_that_were_there_before():
    assert repetition([5] * 8) == pytest.approx(1 - 1 / 5)
    assert repetition([1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert repetition([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(1 - 2 / 5)


def test_figures_are_those_of_all_samples_however_they_are_dealt_to_batches_and_ranks(tmp_path):
    expected = expected_figures(WINDOWS)
    assert figures_of(WINDOWS, lambda samples, _: [batch_of(samples)]) == pytest.approx(expected)
    assert figures_of(WINDOWS, lambda samples, _: [batch_of([one]) for one in samples]) == pytest.approx(expected)
    assert tiny.run_ranks(on_two_ranks, 2, WINDOWS) == [pytest.approx(expected)] * 2


def test_short_samples_have_no_repetition():
    found = figures_of(WINDOWS[2:], lambda samples, _: [batch_of(samples)])
    assert set(found) == set(FIGURES) - {"repetition"}


def test_a_record_has_the_figures_where_the_student_has_written(tmp_path, student, teacher):
    for lmbda in (0.0, 1.0):
        trainer = make_trainer(tmp_path, student, teacher, lmbda=lmbda, max_new_tokens=9)
        trainer.train()
        record = next(record for record in trainer.state.log_history if "loss" in record)
        assert set(FIGURES) & set(record) <= (set(FIGURES) if lmbda else set())
        assert ("completion_length" in record) == (lmbda > 0)
    assert 1 <= record["completion_length"] <= 9
    assert 0 <= record["cut_fraction"] <= 1
    assert record["distinct_first_tokens"] in (1, 2)


# ---- warnings --------------------------------------------------------------------------------------------------------


def told(caplog, steps, watch=None):
    """What is warned of, by the step that it is said at; each entry of `steps` is the samples of one, and its limit."""
    watch, trainer = watch or make_watch()
    found = {}
    for samples, limit in steps:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            watch.note([batch_of(samples)], limit)
        trainer.state.global_step += 1
        if caplog.messages:
            found[trainer.state.global_step] = caplog.messages[:]
    return found


def windows(length, count, limit=64, cut=0):
    """`count` windows of ten samples without repetition, some of them cut."""
    ended = [*range(100, 99 + length), 2]
    return [([[*range(100, 100 + length)]] * cut + [ended] * (10 - cut), limit)] * count


def test_a_student_that_repeats_itself_is_warned_of_once_with_what_to_change(caplog):
    repeated = [([[5] * 15 + [2]] * 10, 64)] * 15  # 11 of 13 4-grams
    found = told(caplog, [*windows(16, 5), *repeated])
    (step,) = found
    assert step == 11  # of the last ten, four are without and six with repetition: 0.6 · 11/13 > 0.5
    assert found[step] == [
        "The student repeats itself: 51% of the 4-grams in its answers of the last 10 on-policy steps are repetitions "
        "(step 11). To stop it, lower training.learning_rate, or lower rlhf.lmbda and raise rlhf.sft_alpha, so that "
        "the data's answers teach more. A rlhf.beta nearer to 0 (forward KL) or fewer rlhf.max_new_tokens may help "
        "too."
    ]


def test_answers_twice_as_long_as_in_the_first_steps_are_warned_of_once(caplog):
    found = told(caplog, [*windows(10, 12), *windows(19, 12), *windows(20, 12), *windows(40, 3)])
    assert list(found) == [34]  # when ten of 20 tokens are the last ones
    assert found[34] == [
        "The student's answers get longer: 20 tokens in the mean of the last 10 on-policy steps, 10 in the first 10 "
        "(step 34). If that is not meant, lower training.learning_rate, or lower rlhf.lmbda and raise "
        "rlhf.sft_alpha, so that the data's answers teach more. rlhf.max_new_tokens (64) limits what they cost."
    ]


def test_twice_as_many_cut_answers_are_warned_of_once(caplog):
    found = told(caplog, [*windows(20, 10, cut=2), *windows(20, 10, cut=3), *windows(20, 20, cut=4)])
    assert list(found) == [30]
    assert found[30] == [
        "More of the student's answers never end: 40% of those of the last 10 on-policy steps were cut at "
        "rlhf.max_new_tokens (64), and 20% in the first 10 (step 30). If they are meant to be long, raise "
        "rlhf.max_new_tokens; if not, lower training.learning_rate, or lower rlhf.lmbda and raise rlhf.sft_alpha, so "
        "that the data's answers teach more."
    ]


def test_answers_that_hardly_ever_end_from_the_start_are_warned_of_once(caplog):
    assert told(caplog, windows(20, 30, cut=8)) == {}
    assert told(caplog, windows(20, 30, cut=9)) == {
        10: [
            "Of the student's answers in its first 10 on-policy steps 90% were cut at rlhf.max_new_tokens (64): they "
            "do not show it where an answer ends. If they are meant to be longer, raise rlhf.max_new_tokens; if the "
            "student has not learnt to end, train it on the data's answers first, or lower rlhf.lmbda."
        ]
    }


def test_a_few_cut_answers_after_none_are_chance(caplog):
    some = [*windows(20, 9), *windows(20, 1, cut=9)]
    assert told(caplog, [*windows(20, 10), *some, *some]) == {}


def test_a_limit_that_grows_is_no_reason_to_warn_and_afterwards_steps_of_the_last_one_are_compared(caplog):
    """A student that always writes on to the limit, and then one whose answers end and get longer all the same."""
    growing = [step for limit in range(8, 64) for step in windows(limit, 1, limit, cut=10)]
    assert told(caplog, [*growing, *windows(64, 9, 64, cut=10)]) == {}
    slower = [step for limit in (8, 16, 32) for step in windows(limit, 9, limit, cut=10)]
    assert told(caplog, [*slower, *windows(20, 10, 64)]) == {}
    assert list(told(caplog, [*slower, *windows(20, 10, 64), *windows(40, 10, 64)])) == [47]


def test_what_the_warnings_need_survives_a_resume_and_none_is_given_twice(caplog, tmp_path):
    steps = [*windows(10, 12), *windows(20, 10, cut=5), *[([[5] * 16], 64)] * 20]
    whole = told(caplog, steps)
    assert sum(map(len, whole.values())) == 3
    for done in (0, 5, 15, 21, 30):
        before, after = make_watch(), make_watch()
        found = told(caplog, steps[:done], before)
        save_file(before[0].state(), tmp_path / "state.safetensors")
        after[0].restore(load_file(tmp_path / "state.safetensors"))
        after[1].state.global_step = done
        assert found | told(caplog, steps[done:], after) == whole
        assert all(
            torch.equal(value, before[0].state()[name])
            for name, value in load_file(tmp_path / "state.safetensors").items()
        )


def run_to(folder, steps, resume=None):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), lmbda=1.0, max_steps=steps, save_steps=2,
        save_strategy="steps",
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.tolist() for name, value in trainer.samples.state().items()}


def test_a_trainer_keeps_them_in_its_checkpoints_and_another_training_begins_anew(tmp_path):
    whole = run_to(tmp_path, 4)
    assert len(whole["first"]) == len(whole["last"]) == 4
    assert run_to(tmp_path, 4, str(tmp_path / "checkpoint-2")) == whole
    trainer = make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), lmbda=1.0, max_steps=2)
    trainer.train()
    trainer.train()
    assert len(trainer.samples.state()["first"]) == 2
