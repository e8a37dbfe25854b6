"""Which samples of a prompt train: by their text, by the teacher's view, and what that costs."""

import logging
import math
import os
from dataclasses import replace

import pytest
import torch

from kdtrain.errors import DataError, NonFiniteError
from kdtrain.teachers import LocalTeacher, Targets
from kdtrain.trainer.selection import repeated, select
from tests import tiny
from tests.test_distributed import sharding_on_a_cpu
from tests.test_trainer import TopKTeacher, make_trainer

TEXTS = ["the path", "zero", "a token and the student", "two", "the file it returns when they are equal", "1 and 30"]
BEST = {"samples_per_prompt": 3, "select": "best"}
WEIGHTED = {"samples_per_prompt": 3, "select": "weighted"}


def sampled(trainer, per_batch=6, answers=None):
    """Two prompts with three samples each."""
    chats = [
        {"messages": [{"role": "user", "content": f"What is {i // 3}?"}, {"role": "assistant", "content": text}]}
        for i, text in enumerate(TEXTS)
    ]
    batches = [trainer.data_collator(chats[i : i + per_batch]) for i in range(0, 6, per_batch)]
    names = [[f"{i + j}" for j in range(per_batch)] for i in range(0, 6, per_batch)]
    return [
        replace(
            batch,
            generated_by="student",
            rows=replace(
                batch.rows,
                ids=own,
                samples=[int(name) % 3 for name in own],
                answers=[answers[int(name)] for name in own] if answers else (),
            ),
        )
        for batch, own in zip(batches, names, strict=True)
    ]


def expected_means(teacher, batches):
    """By the name of each row, token by token in float64."""
    means = {}
    for batch in batches:
        with torch.no_grad():
            log_p = teacher(**batch.model_inputs).logits.double().log_softmax(-1)
        for row, name in enumerate(batch.rows.ids):
            places = [t for t in range(1, batch.labels.shape[1]) if batch.labels[row, t] != -100]
            means[name] = sum(float(log_p[row, t - 1, batch.labels[row, t]]) for t in places) / len(places)
    return means


def chosen(trainer, batches):
    """The selected batches, and the rows that have labels."""
    found = select(trainer, batches, trainer.options)
    rows = {
        name: batch
        for batch in found
        for name, labels in zip(batch.rows.ids, batch.labels, strict=True)
        if (labels != -100).any()
    }
    return found, rows


# ---- by the teacher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_batch", [6, 3, 2, 1])
def test_of_each_prompt_the_sample_that_is_likeliest_to_the_teacher_trains(tmp_path, student, teacher, per_batch):
    trainer = make_trainer(tmp_path, student, teacher, **BEST)
    batches = sampled(trainer, per_batch)
    means = expected_means(teacher, batches)
    found, rows = chosen(trainer, batches)
    assert set(rows) == {max("012", key=means.get), max("345", key=means.get)}
    assert len(found) == len(batches)
    assert sum(len(batch) for batch in found if not batch.all_repeated) == 2
    assert [batch.all_repeated for batch in found] == sorted((b.all_repeated for b in found), reverse=True)


def test_samples_are_weighted_by_a_softmax_over_those_of_their_prompt(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, **WEIGHTED)
    batches = sampled(trainer, 3)
    means = expected_means(teacher, batches)
    _, rows = chosen(trainer, batches)
    for group in ("012", "345"):
        total = sum(math.exp(means[name]) for name in group)
        for name in group:
            batch = rows[name]
            weight = float(batch.rows.kd_weights[batch.rows.ids.index(name)])
            assert weight == pytest.approx(3 * math.exp(means[name]) / total, rel=1e-4)


def test_weights_of_samples_are_not_rounded_where_inputs_are(tmp_path, student, teacher, monkeypatch):
    """As DeepSpeed does with all inputs that are no whole numbers."""
    trainer = make_trainer(tmp_path, student, teacher)
    monkeypatch.setattr(trainer, "_prepare_input", lambda one: one.bfloat16() if one.is_floating_point() else one)
    batch = trainer.data_collator(tiny.CHATS[:2])
    weights = torch.tensor([1.2345, 0.7655])
    batch = replace(batch, rows=replace(batch.rows, kd_weights=weights))
    assert torch.equal(trainer._prepare_inputs(batch).rows.kd_weights, weights)


def test_of_equal_samples_the_first_trains(tmp_path, student, teacher, monkeypatch):
    trainer = make_trainer(tmp_path, student, teacher, **BEST)
    equal = lambda trainer, targets, batch: [-1.0] * len(batch)  # noqa: E731
    monkeypatch.setattr("kdtrain.trainer.sample_batches._means", equal)
    assert set(chosen(trainer, sampled(trainer))[1]) == {"0", "3"}


@pytest.mark.parametrize("kind", ["hidden states", "logits", "top k", "some tokens"])
@pytest.mark.parametrize("options", [BEST, WEIGHTED], ids=["best", "weighted"])
def test_the_loss_of_kept_targets_is_that_of_targets_asked_for_anew(tmp_path, student, teacher, kind, options):
    kinds = {"hidden states": LocalTeacher, "logits": Logits, "top k": lambda m: TopKTeacher(m, 7), "some tokens": Some}
    trainer = make_trainer(tmp_path, student, None, extra={"teacher": kinds[kind](teacher)}, **options)
    found, _ = chosen(trainer, sampled(trainer, 2))
    for batch in found:
        assert batch.targets is not None
        anew = replace(batch, targets=None)
        if kind == "some tokens":  # of a batch, by where it stands
            continue
        losses = [trainer.compute_loss(trainer.model, one) for one in (batch, anew)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)
    assert sum(trainer.compute_loss(trainer.model, batch).item() for batch in found) > 0.01


class Logits(TopKTeacher):
    def __init__(self, model):
        super().__init__(model, 1)

    def targets(self, batch):
        with torch.no_grad():
            return Targets(self.model(**batch.model_inputs).logits[:, :-1][batch.predicts_BT])


class Some(Logits):
    """Answers for every token but the last of each row."""

    def targets(self, batch):
        logits = super().targets(batch).scores
        row_S = batch.predicts_BT.nonzero()[:, 0]
        covered_S = row_S == torch.cat([row_S[1:], row_S.new_tensor([-1])]) if len(row_S) else row_S.bool()
        return Targets(logits[covered_S], covered_S)


def test_the_teacher_is_asked_once_for_each_sample(tmp_path, student, teacher):
    asked = []

    class Counting(LocalTeacher):
        def targets(self, batch):
            asked.extend(batch.rows.ids)
            return super().targets(batch)

    trainer = make_trainer(tmp_path, student, None, extra={"teacher": Counting(teacher)}, **BEST)
    for batch in chosen(trainer, sampled(trainer, 2))[0]:
        trainer.compute_loss(trainer.model, batch)
    assert sorted(asked) == list("012345")


def test_a_teacher_on_a_server_is_asked_for_all_samples_before_any_is_waited_for(tmp_path, student, teacher):
    calls = []

    class Served(TopKTeacher):
        waits = True

        def prepare(self, window):
            calls.append(("prepare", sorted(name for batch in window for name in batch.rows.ids)))

        def wait(self, window):
            calls.append(("wait", sorted(name for batch in window for name in batch.rows.ids)))

    trainer = make_trainer(
        tmp_path, student, None, lmbda=1.0, max_steps=1, extra={"teacher": Served(teacher, 7)},
        **{**BEST, "samples_per_prompt": 2},
    )  # fmt: skip
    trainer.train()
    at = [name for name, _ in calls].index("wait")
    (first, rows), (_, waited_for) = calls[at - 1 : at + 1]
    assert first == "prepare"
    assert rows == waited_for
    assert len(rows) == 4
    assert [call for call in calls[at + 1 :] if call[1]] == []  # those that train are not asked for again


def test_a_teacher_without_numbers_ends_the_run(tmp_path, student, teacher):
    with torch.no_grad():
        teacher.model.norm.weight.fill_(math.nan)
    trainer = make_trainer(tmp_path, student, teacher, **BEST)
    with pytest.raises(
        NonFiniteError, match=r"step 1, rank 0: the teacher's log-probabilities of 6 of 6 samples, rows 0, 1"
    ):
        select(trainer, sampled(trainer), trainer.options)


# ---- by text ---------------------------------------------------------------------------------------------------------


ANSWERS = ["path", "0", "student", "2", "equal", " 30 "]


def test_samples_train_whose_text_is_the_answer_of_their_row(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, samples_per_prompt=3, select_regex=r"(\w+)\s*$")
    found, rows = chosen(trainer, sampled(trainer, 2, ANSWERS))
    assert set(rows) == {"0", "2", "4", "5"}
    assert all(batch.targets is None for batch in found)
    metrics = trainer._metrics["train"]
    assert [float(sum(metrics[name])) for name in ("written_samples", "selected_samples")] == [6, 4]


def test_an_answer_may_say_more_than_what_is_compared(tmp_path, student, teacher):
    """As GSM8K's, whose reasoning stands before it; one that the expression does not fit is taken as it is."""
    trainer = make_trainer(tmp_path, student, teacher, samples_per_prompt=3, select_regex=r"(?:and|the) (\w+)")
    answers = ["look at the path of it", "0", "the", "2", "file", "31"]
    assert set(chosen(trainer, sampled(trainer, 6, answers))[1]) == {"0", "2", "4"}


def test_the_text_is_compared_before_the_teacher_chooses(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, select_regex=r"(\w+)\s*$", **BEST)
    batches = sampled(trainer, 6, ANSWERS)
    means = expected_means(teacher, batches)
    assert set(chosen(trainer, batches)[1]) == {max("02", key=means.get), max("45", key=means.get)}


def test_weights_are_those_among_the_samples_that_are_left(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, select_regex=r"(\w+)\s*$", **WEIGHTED)
    batches = sampled(trainer, 6, ANSWERS)
    _, rows = chosen(trainer, batches)
    weights = {name: float(batch.rows.kd_weights[batch.rows.ids.index(name)]) for name, batch in rows.items()}
    assert weights["0"] + weights["2"] == pytest.approx(2)
    assert weights["4"] + weights["5"] == pytest.approx(2)


@pytest.mark.parametrize("options", [{"samples_per_prompt": 3}, BEST, WEIGHTED], ids=["all", "best", "weighted"])
def test_a_window_of_which_nothing_is_left_trains_on_nothing_and_says_so_once(
    tmp_path, student, teacher, caplog, options
):
    trainer = make_trainer(tmp_path, student, teacher, select_regex="(none of them)", **options)
    with caplog.at_level(logging.WARNING):
        found, rows = chosen(trainer, sampled(trainer, 2, ANSWERS))
        chosen(trainer, sampled(trainer, 2, ANSWERS))
    assert rows == {}
    assert [len(batch) for batch in found] == [1, 1, 1]
    assert caplog.text.count("None of the 6 samples of step 1 matches its row's answer") == 1
    for batch in found:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
        assert loss.item() == 0
        loss.backward()
    assert all(not parameter.grad.any() for parameter in student.parameters() if parameter.grad is not None)


def test_a_row_without_an_answer_is_named(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, samples_per_prompt=3, select_regex="(.)")
    with pytest.raises(DataError, match="row 1 has none: give rows a column `answer`"):
        select(trainer, sampled(trainer, 6, ["a", None, "c", "d", "e", "f"]), trainer.options)
    with pytest.raises(DataError, match="row 0 has none"):
        select(trainer, sampled(trainer), trainer.options)


def test_rows_whose_tensors_cannot_be_told_apart_lose_their_labels_instead(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, select_regex=r"(\w+)\s*$")
    batches = [
        replace(batch, model_inputs={**batch.model_inputs, "position_ids": torch.arange(batch.labels.shape[1])[None]})
        for batch in sampled(trainer, 3, ANSWERS)
    ]
    found, rows = chosen(trainer, batches)
    assert set(rows) == {"0", "2", "4", "5"}
    assert [len(batch) for batch in found] == [3, 3]


# ---- prompts and windows ---------------------------------------------------------------------------------------------


def test_a_prompt_is_there_as_often_as_it_is_answered(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher)
    batch = trainer.data_collator(tiny.CHATS[:2])
    filler = replace(batch.without_labels(), all_repeated=True)
    found, same = repeated([batch, filler], 2)
    assert same is filler
    assert found.rows.samples == [0, 1, 0, 1]
    assert found.model_inputs["input_ids"].tolist() == batch.model_inputs["input_ids"][[0, 0, 1, 1]].tolist()
    assert repeated([batch], 1) == [batch]


def losses_of(folder, resume=None, **options):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), rows=tiny.CHATS * 2, lmbda=1.0,
        max_steps=4, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    records = [record for record in trainer.state.log_history if "loss" in record]
    return [(r["loss"], r["grad_norm"], r.get("selected_fraction")) for r in records], trainer


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"select": "best"}, {"select": "weighted"}], ids=["all", "best", "weighted"])
def test_a_resumed_run_selects_and_trains_as_one_that_was_not_interrupted(tmp_path, options):
    options = {"samples_per_prompt": 3, **options}
    whole, trainer = losses_of(tmp_path / "whole", **options)
    fraction = {"best": pytest.approx(1 / 3), "weighted": 1.0, None: None}[options.get("select")]
    assert all(record[2] == fraction for record in whole)
    resumed, other = losses_of(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert [record[:2] for record in resumed[2:]] == [record[:2] for record in whole[2:]]
    for own, same in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(own, same)


# ---- several ranks ---------------------------------------------------------------------------------------------------


def on_ranks(folder, select, expression, sharded=False):
    """Two windows of twelve prompts, of which those with the answer "yes" stay where there is an expression."""
    from kdtrain.trainer import selection

    selection._says = lambda text, answer, expression: answer == "yes"
    ranks = int(os.environ["WORLD_SIZE"])
    ask = lambda i: {"messages": [{"role": "user", "content": f"What is {i}? " * (1 + i % 3)}]}  # noqa: E731
    rows = [{**ask(i), "answer": "yes" if i in (1, 7) else "no"} for i in range(24)]
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), rows=rows, lmbda=1.0, max_steps=2,
        per_device_train_batch_size=6 // ranks, gradient_accumulation_steps=2, optim="sgd", max_grad_norm=1e9,
        train_sampling_strategy="sequential", samples_per_prompt=2, select=select, select_regex=expression,
        **(sharding_on_a_cpu() if sharded else {}),
    )  # fmt: skip
    trainer.train()
    assert type(trainer.model_wrapped).__name__.startswith("FSDP") == sharded
    names = ("loss", "grad_norm", "selected_fraction")
    return [record.get(name, 0.0) for record in trainer.state.log_history if "loss" in record for name in names]


@pytest.mark.parametrize("sharded", [False, tiny.slow(True)], ids=["whole", "FSDP2"])
@pytest.mark.parametrize(("select", "expression"), [("best", None), tiny.slow("weighted", None), ("best", "(.)")])
def test_two_ranks_select_and_train_as_one_process(tmp_path, select, expression, sharded):
    """With the expression one of the ranks has a window of which nothing is left, and then both have."""
    alone = tiny.run_ranks(on_ranks, 1, str(tmp_path / "one"), select, expression)[0]
    both = tiny.run_ranks(on_ranks, 2, str(tmp_path / "two"), select, expression, sharded)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, rel=1e-4)
    assert alone[1] > 0


# ---- batches of like length ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [{"lmbda": 1.0}, {"lmbda": 0.0, "seq_kd": True}], ids=["student", "teacher"])
def test_answers_that_were_generated_are_dealt_by_length(tmp_path, student, teacher, writer):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
        for text in ("?", "What is it that it returns, and where is the file? " * 2, "Why?", "Where is the path? " * 5)
    ]
    trainer = make_trainer(tmp_path, student, teacher, **writer)
    given = [trainer.data_collator(rows[i : i + 2]) for i in (0, 2)]
    found, _ = trainer.get_batch_samples(iter(given), 2, torch.device("cpu"))
    assert [len(batch) for batch in found] == [2, 2]
    lengths = [batch.rows.prompt_lengths.tolist() for batch in found]
    assert min(lengths[0]) > max(lengths[1])
    data, _ = make_trainer(tmp_path, student, teacher, lmbda=0.0).get_batch_samples(iter(given), 2, torch.device("cpu"))
    assert all(batch.labels is given_.labels for batch, given_ in zip(data, given, strict=True))
