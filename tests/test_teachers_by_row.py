"""Targets by row: a batch's are those of its rows, whatever they are made of, and can be put together anew."""

import pytest
import torch

from kdtrain.data.batch import Batch
from kdtrain.losses.head import Head
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers import DenseTargets, Targets
from kdtrain.teachers.by_row import by_row, in_one, nothing_of, tokens_of

COUNTS = [2, 0, 3]
HEAD = Head(torch.randn(7, 4), None, 1.0, None)


def make_batch():
    labels = torch.full((3, 5), -100)
    for row, count in enumerate(COUNTS):
        labels[row, 1 : 1 + count] = 1
    return Batch(model_inputs={"input_ids": labels.clamp(min=0)}, labels=labels)


def make_scores(kind, tokens):
    values = torch.arange(tokens * 4.0).view(tokens, 4)
    if kind == "hidden states":
        return DenseTargets(values, HEAD)
    if kind == "logits":
        return values
    return TopKLogprobs(torch.arange(tokens)[:, None] + torch.tensor([[0, 90]]), -values[:, :2] - 1)


def values_of(scores):
    if isinstance(scores, DenseTargets):
        assert scores.head is HEAD
        return scores.hidden.tolist()
    if isinstance(scores, torch.Tensor):
        return scores.tolist()
    return [scores.indices.tolist(), scores.logprobs.tolist()]


@pytest.mark.parametrize("kind", ["hidden states", "logits", "top k"])
def test_the_targets_of_the_rows_are_those_of_the_batch(kind):
    whole = Targets(make_scores(kind, 5))
    rows = by_row(whole, make_batch())
    assert [tokens_of(row.scores) for row in rows] == COUNTS
    assert values_of(in_one(rows).scores) == values_of(whole.scores)
    assert in_one(rows).covered_S is None
    turned = in_one([rows[2], rows[1], rows[0]])
    assert values_of(by_row(turned, Batch(model_inputs={}, labels=make_batch().labels.flip(0)))[2].scores) == values_of(
        rows[0].scores
    )


@pytest.mark.parametrize("kind", ["hidden states", "logits", "top k"])
def test_tokens_that_the_teacher_has_not_answered_for_stay_so(kind):
    whole = Targets(make_scores(kind, 3), torch.tensor([True, False, False, True, True]))
    rows = by_row(whole, make_batch())
    assert [row.covered_S.tolist() for row in rows] == [[True, False], [], [False, True, True]]
    assert values_of(in_one(rows).scores) == values_of(whole.scores)
    all_of_it = Targets(make_scores(kind, 1))
    assert in_one([rows[0], all_of_it]).covered_S.tolist() == [True, False, True]
    assert tokens_of(nothing_of(rows[2]).scores) == len(nothing_of(rows[2]).covered_S) == 0


def test_teachers_may_name_other_numbers_of_tokens_for_other_rows():
    one = Targets(TopKLogprobs(torch.tensor([[5]]), torch.tensor([[-1.0]])))
    found = in_one([Targets(make_scores("top k", 1)), one]).scores
    assert found.indices.tolist() == [[0, 90], [5, -1]]
    assert found.logprobs[1].tolist() == [-1.0, -torch.inf]
