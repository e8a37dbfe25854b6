"""A teacher whose targets are off by one is refused before the first step, and no other teacher is."""

import dataclasses
import functools
import logging

import pytest
import torch

from kdtrain.data import Collator
from kdtrain.errors import PreflightError
from kdtrain.losses import SampledTargets, TopKLogprobs
from kdtrain.preflight.alignment import (
    Alignment,
    Gap,
    alignment_findings,
    check_alignment,
    compare_with_neighbours,
    few_rows,
    neighbours,
)
from kdtrain.teachers import LocalTeacher, Targets, Teacher
from kdtrain.teachers.dependence import with_changed_tokens
from tests import tiny
from tests.benchmarks.draws import drawn
from tests.test_trainer import make_trainer

BESIDE = {1: "before", -1: "after"}


class ShiftedTeacher(Teacher):
    """Targets of a model, moved by some rows; `stored`: the answers to the first question, whatever is asked later."""

    def __init__(self, model, by=0, k=None, stored=False, skip=None):
        self.inner = LocalTeacher(model)
        self.vocab_size, self.by, self.k, self.stored, self.skip = self.inner.vocab_size, by, k, stored, skip
        self.asked, self.kept = 0, None

    def targets(self, batch):
        self.asked += 1
        if self.stored and self.kept is not None:
            return self.kept
        logits = self.inner.targets(batch).scores.logits().roll(self.by, 0)
        covered_S = None if self.skip is None else torch.arange(len(logits)) % self.skip != 0
        if covered_S is not None:
            logits = logits[covered_S]
        if self.k is not None:
            logprobs, indices = torch.log_softmax(logits, -1).topk(self.k)
            logits = TopKLogprobs(indices, logprobs)
        self.kept = Targets(logits, covered_S)
        return self.kept


@functools.cache
def trained():
    """A model that knows tiny.CHATS, and a batch of them."""
    model, batch = small(tiny.make_qwen3(seed=1, hidden=48)), rows()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch.model_inputs, labels=batch.labels).loss.backward()
        optimizer.step()
    return model


def small(model):
    """With weights of the usual size: 0.02."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(0.1)
    return model


def untrained():
    return [
        *(tiny.make_qwen3(seed=seed) for seed in range(3)),
        small(tiny.make_qwen3(seed=1)),
        tiny.make_qwen3(seed=1, tie_word_embeddings=False),
        tiny.make_llama(),
        tiny.make_gemma2(),
    ]


def rows(chats=tiny.CHATS):
    return Collator(tiny.make_tokenizer())(list(chats))


def answers(*texts):
    return rows(
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": x}]} for x in texts
    )


def random_rows(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(4, 320, (4, 40))
    return dataclasses.replace(rows(), model_inputs={"input_ids": ids, "attention_mask": ids * 0 + 1}, labels=ids)


def written_by(model, count=4, length=60):
    """Rows that a model has drawn itself: nobody knows them better."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 320, (count, 1), generator=generator)
    with torch.no_grad():
        while ids.shape[1] < length:
            logits = model(input_ids=ids).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return dataclasses.replace(rows(), model_inputs={"input_ids": ids, "attention_mask": ids * 0 + 1}, labels=ids)


def levels(teacher, batch):
    return [finding.level for finding in check_alignment(teacher, batch)]


@pytest.mark.parametrize("k", [None, 1, 8, 320])
def test_a_trained_teacher_is_found_right(k):
    (finding,) = check_alignment(ShiftedTeacher(trained(), k=k), rows())
    assert finding.level == "info"
    assert "fit the tokens that they are for" in finding.message


@pytest.mark.parametrize("k", [None, 64, 320])
def test_a_teacher_that_knows_such_text_is_asked_once(k):
    model = tiny.make_qwen3(seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    teacher = ShiftedTeacher(model, k=k)
    assert levels(teacher, written_by(model)) == ["info"]
    assert teacher.asked == 1


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("k", [None, 8])
@pytest.mark.parametrize("by", [1, -1])
def test_a_trained_teacher_that_is_off_by_one_is_an_error_that_names_the_direction(by, k, stored):
    (finding,) = check_alignment(ShiftedTeacher(trained(), by, k, stored), rows())
    assert finding.level == "error"
    assert f"off by one: they are those of the token {BESIDE[by]} the one" in finding.message
    assert "entry t of an echo" in finding.hint


@pytest.mark.parametrize("batch", [rows(), random_rows(), answers("zero"), answers("aaaa aaaa aaaa aaaa aaaa")])
@pytest.mark.parametrize("k", [tiny.slow(None), 8])
def test_no_untrained_teacher_and_no_odd_rows_are_an_error(batch, k):
    for model in [*untrained(), trained()]:
        for stored in (False, True):
            assert "error" not in levels(ShiftedTeacher(model, k=k, stored=stored), batch)


def test_an_untrained_teacher_is_a_warning_with_the_figures():
    (finding,) = check_alignment(ShiftedTeacher(tiny.make_qwen3(seed=1)), rows())
    assert finding.level == "warning"
    assert "hardly better than the tokens beside them" in finding.message
    assert "They depend on the right tokens" in finding.message
    assert "nats per token, against" in finding.message


@pytest.mark.parametrize("batch", [rows(), random_rows()])
@pytest.mark.parametrize("by", [1, -1])
def test_an_untrained_teacher_that_is_off_by_one_is_an_error_as_well(by, batch):
    for seed in range(3):
        teacher = ShiftedTeacher(tiny.make_qwen3(seed=seed), by)
        (finding,) = check_alignment(teacher, batch)
        assert finding.level == "error"
        assert f"token {BESIDE[by]} the one" in finding.message
        assert teacher.asked == 2


def test_rows_of_one_repeated_token_say_nothing():
    ids = torch.full((2, 20), 7)
    batch = dataclasses.replace(rows(), model_inputs={"input_ids": ids, "attention_mask": ids * 0 + 1}, labels=ids)
    assert check_alignment(ShiftedTeacher(trained()), batch) == []


def test_tokens_that_the_teacher_does_not_cover_are_left_out():
    teacher = ShiftedTeacher(trained(), skip=3)
    alignment = compare_with_neighbours(teacher.targets(rows()), rows(), 320)
    everything = compare_with_neighbours(ShiftedTeacher(trained()).targets(rows()), rows(), 320)
    assert 0 < alignment.tokens < everything.tokens
    assert alignment.nll < alignment.before.nll - 1


def test_a_token_that_is_not_named_has_its_share_of_the_rest():
    batch = rows()
    exact = torch.log_softmax(ShiftedTeacher(trained()).targets(batch).scores, -1)
    top = exact.topk(8)
    expected = []
    for i, (before, label, after) in enumerate(neighbours(batch).tolist()):
        if after >= 0 and label not in (before, after):
            rest = (1 - top.values[i].exp().sum()) / (320 - 8)
            expected.append(-(exact[i, label] if label in top.indices[i] else rest.log()).item())
    found = compare_with_neighbours(ShiftedTeacher(trained(), k=8).targets(batch), batch, 320)
    assert found.nll == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_one_token_of_each_row_is_changed_for_both_models():
    batch = rows()
    changed = with_changed_tokens(batch)
    same = batch.model_inputs["input_ids"] == changed.batch.model_inputs["input_ids"]
    assert (~same).sum(1).tolist() == [int(j is not None) for j in changed.changed]
    assert torch.equal(batch.labels == changed.batch.labels, same)
    assert (batch.labels != -100).equal(changed.batch.labels != -100)


def test_a_teacher_that_has_no_answer_for_a_changed_row_is_judged_by_its_first(teacher):
    class Stored(ShiftedTeacher):
        def targets(self, batch):
            if self.kept is not None:
                raise KeyError("not stored")
            return super().targets(batch)

    assert levels(Stored(trained(), by=1), rows()) == ["error"]
    assert levels(Stored(teacher), rows()) == ["warning"]


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [0, 1])
def test_training_does_not_begin_with_a_teacher_that_is_off_by_one(tmp_path, by, caplog):
    teacher = ShiftedTeacher(trained(), by)
    trainer = make_trainer(tmp_path, None, None, max_steps=1, extra={"teacher": teacher})
    if by:
        with pytest.raises(PreflightError, match="off by one"):
            trainer.train()
        assert trainer.state.global_step == 0
    else:
        with caplog.at_level(logging.INFO, "kdtrain"):
            trainer.train()
            trainer.train()  # asked once
        assert sum("fit the tokens that they are for" in record.message for record in caplog.records) == 1
        assert not any(record.levelno >= logging.WARNING and "targets" in record.message for record in caplog.records)


def test_a_run_that_asks_for_no_distributions_does_not_ask_the_teacher(tmp_path):
    teacher = ShiftedTeacher(trained(), by=1)
    make_trainer(tmp_path, None, None, max_steps=1, llm_kd_weight=0.0, extra={"teacher": teacher}).train()
    assert teacher.asked == 0


def test_the_shortest_rows_that_say_enough_are_asked_about():
    import datasets

    labels = [[-100] * 50 + [5] * 40, [-100, 5], [-100] * 3 + [5] * 20, [-100] * 9]
    data = datasets.Dataset.from_list([{"input_ids": [5] * len(x), "labels": x} for x in labels])
    seen = []

    class Counting(Collator):
        def __call__(self, chosen):
            seen.extend(len(row["labels"]) for row in chosen)
            return super().__call__(chosen)

    few_rows(data, Counting(tiny.make_tokenizer()), 4)
    assert seen == [90, 23]


def _two_ranks(folder):
    from pathlib import Path

    from tests.tiny import make_qwen3

    teacher = ShiftedTeacher(make_qwen3(seed=1), by=1)
    try:
        make_trainer(Path(folder), None, None, max_steps=1, extra={"teacher": teacher}).train()
    except PreflightError as error:
        return teacher.asked, "off by one" in str(error)
    return teacher.asked, None


def test_all_ranks_ask_as_often_and_refuse_together(tmp_path):
    assert tiny.run_ranks(_two_ranks, 2, str(tmp_path)) == [(2, True), (2, True)]


def figures(**changes):
    """Of a teacher whose targets fit the token before as well as their entropy says."""
    given = {"tokens": 100, "nll": 6.0, "entropy": 2.0, "before": Gap(2.0, -4.0, 0.1), "after": Gap(7.0, 1.0, 0.1)}
    return Alignment(**{**given, **changes})


def test_a_few_tokens_prove_nothing_against_stored_targets():
    assert [finding.level for finding in alignment_findings(figures(), None, 320)] == ["error"]
    assert [finding.level for finding in alignment_findings(figures(tokens=5), None, 320)] == ["warning"]


def test_a_fit_that_is_better_than_the_entropy_allows_is_asked_about_again():
    right = figures(nll=2.0, before=Gap(7.0, 5.0, 0.1), after=Gap(7.0, 5.0, 0.1))
    assert right.settles_it(320)
    assert not dataclasses.replace(right, nll=1.0).settles_it(320)
    assert not dataclasses.replace(right, tokens=5).settles_it(320)


class DrawingTeacher(ShiftedTeacher):
    """Fifty tokens drawn at each position, other ones each time it is asked."""

    def targets(self, batch):
        targets = super().targets(batch)
        logits = targets.scores
        if isinstance(logits, SampledTargets):  # as they were stored
            return targets
        draws = drawn(torch.softmax(logits.double(), -1), 50, torch.Generator().manual_seed(self.asked))
        self.kept = Targets(draws, targets.covered_S)
        return self.kept


@pytest.mark.parametrize("stored", [False, True])
def test_a_trained_teacher_whose_tokens_are_drawn_is_found_right(stored):
    (finding,) = check_alignment(DrawingTeacher(trained(), stored=stored), rows())
    assert finding.level == "info"
    assert "fit the tokens that they are for" in finding.message


@pytest.mark.parametrize("by", [1, -1])
def test_drawn_tokens_that_are_off_by_one_are_an_error_that_names_the_direction(by):
    (finding,) = check_alignment(DrawingTeacher(trained(), by, stored=True), rows())
    assert finding.level == "error"
    assert f"off by one: they are those of the token {BESIDE[by]} the one" in finding.message


@pytest.mark.parametrize("stored", [False, True])
def test_drawn_tokens_of_no_untrained_teacher_are_an_error(stored):
    for model in untrained():
        assert "error" not in levels(DrawingTeacher(model, stored=stored), rows())


def test_the_nll_of_drawn_tokens_is_near_that_of_the_distribution_that_they_are_of():
    batch = rows()
    exact = compare_with_neighbours(ShiftedTeacher(trained()).targets(batch), batch, 320)
    found = compare_with_neighbours(DrawingTeacher(trained()).targets(batch), batch, 320)
    assert found.tokens == exact.tokens
    assert found.nll == pytest.approx(exact.nll, abs=0.15)
    assert exact.entropy <= found.entropy < exact.entropy + 0.6  # what was not drawn is spread evenly
