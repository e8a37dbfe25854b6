"""What a teacher's distributions become before they are stored."""

import numpy as np
import pytest
import torch

from kdtrain.data import Collator
from kdtrain.errors import NonFiniteError, TeacherError
from kdtrain.losses.head import Head
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers import LocalTeacher
from kdtrain.teachers.base import DenseTargets, Targets, Teacher
from kdtrain.teachers.cached.store import Format
from kdtrain.teachers.cached.writing import Asking, Shard, draw, stored_targets, top_k
from tests import tiny


def logits(rows=7, columns=60, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3


def key(number):
    return number.to_bytes(16, "little")


# ---- topk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 59, 60, 80])
def test_top_k_is_that_of_float64_over_all_columns(k):
    found = logits()
    expected = torch.log_softmax(found.double(), -1).sort(dim=-1, descending=True, stable=True)
    ids, values = top_k(found.clone(), k)
    assert torch.equal(ids, expected.indices[:, :k])
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected.values[:, :k], atol=2e-6, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 7, 20])
def test_among_equal_tokens_the_lowest_ids_are_taken_and_come_first(k):
    """What `torch.topk` takes of them is chance."""
    values = torch.zeros(3, 400)
    values[0, [390, 17, 250, 3, 90]] = 5.0
    values[1, 399] = 1.0
    ids, logprobs = top_k(values.clone(), k)
    for row in range(3):
        order = sorted(range(400), key=lambda token, row=row: (-float(values[row, token]), token))
        assert ids[row].tolist() == order[:k]
        assert logprobs[row].tolist() == sorted(logprobs[row].tolist(), reverse=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["topk", "sample"])
def test_predictions_that_are_no_numbers_are_refused(bad, mode):
    found = logits()
    found[2, 5] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        stored_targets(Targets(found), Format(mode, 60, entries=4), [key(0)], [7])


# ---- sample ----------------------------------------------------------------------------------------------------------


def test_draws_are_those_of_inversion_in_float64():
    found, uniforms = logits(), torch.rand(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, weights = draw(found.clone(), uniforms)
    cumulative = np.exp(found.double().numpy()).cumsum(-1)
    for row in range(7):
        drawn = np.searchsorted(cumulative[row] / cumulative[row, -1], uniforms[row].numpy(), side="right")
        expected = {int(token): float((drawn == token).mean()) for token in set(drawn)}
        named = [(int(i), float(w)) for i, w in zip(ids[row], weights[row], strict=True) if i >= 0]
        assert dict(named) == pytest.approx(expected)
        assert [token for token, _ in named] == sorted(expected)
    assert torch.equal(weights[ids < 0], torch.zeros_like(weights[ids < 0]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))


def test_draws_have_the_frequencies_of_the_softened_distribution():
    found, temperature = logits(rows=1, columns=12), 2.0
    form = Format("sample", 12, entries=200_000, temperature=temperature)
    stored = stored_targets(Targets(found.clone()), form, [key(3)], [1])
    share = torch.zeros(12).scatter_add_(0, stored.indices[0].clamp(min=0), stored.weights[0])
    expected = torch.softmax(found[0] / temperature, -1)
    assert (share - expected).abs().max() < 0.005  # 4 standard errors of the most likely token
    assert (share - torch.softmax(found[0], -1)).abs().max() > 0.05


def test_a_draw_at_the_end_of_the_interval_is_of_a_token_that_can_be():
    found = torch.full((1, 50), -200.0)  # exp is 0 but for two
    found[0, [10, 20]] = 0.0
    ids, _ = draw(found, torch.tensor([[0.0, np.nextafter(1.0, 0.0)]], dtype=torch.float64))
    assert ids.tolist() == [[10, 20]]


def test_the_draws_of_a_row_depend_on_its_key_and_not_on_the_rows_beside_it():
    found, form = logits(rows=6), Format("sample", 60, entries=30)
    alone = stored_targets(Targets(found[2:5].clone()), form, [key(8)], [3])
    among = stored_targets(Targets(found.clone()), form, [key(7), key(8), key(9)], [2, 3, 1])
    assert torch.equal(among[2:5].indices, alone.indices)
    assert torch.equal(among[2:5].weights, alone.weights)
    other = stored_targets(Targets(found[2:5].clone()), form, [key(9)], [3])
    assert not torch.equal(other.indices, alone.indices)


# ---- from teachers ---------------------------------------------------------------------------------------------------


def test_columns_beyond_the_shared_vocabulary_take_no_part():
    found = logits()
    for scores in (found.clone(), DenseTargets(found, Head(torch.eye(60), None, 1.0, None))):
        stored = stored_targets(Targets(scores), Format("topk", 40, entries=40), [key(0)], [7])
        assert int(stored.indices.max()) < 40
        torch.testing.assert_close(stored.logprobs.exp().sum(-1), torch.ones(7))


def test_a_head_of_half_precision_and_one_with_more_to_it_give_their_own_logits():
    hidden = torch.randn(5, 16).bfloat16()
    head = Head(torch.randn(60, 16).bfloat16(), torch.randn(60), 0.5, 4.0)
    stored = stored_targets(Targets(DenseTargets(hidden, head)), Format("topk", 60, entries=60), [key(0)], [5])
    plain = 0.5 * (hidden.double() @ head.weight.double().T + head.bias.double())
    expected = torch.log_softmax(4.0 * torch.tanh(plain / 4.0), -1)
    torch.testing.assert_close(stored.logprobs.double(), expected.gather(1, stored.indices), atol=1e-5, rtol=0)


def test_targets_for_some_of_the_tokens_only_are_refused():
    covered = torch.tensor([True, False, True])
    with pytest.raises(TeacherError, match="some of the supervised tokens only"):
        stored_targets(Targets(logits(rows=2), covered), Format("topk", 60, entries=3), [key(0)], [3])


def test_a_batch_without_a_supervised_token_has_no_targets():
    for mode in ("topk", "sample"):
        stored = stored_targets(Targets(logits(rows=0)), Format(mode, 60, entries=3), [key(0)], [0])
        assert len(stored.indices) == 0


# ---- asking ----------------------------------------------------------------------------------------------------------


class Recorded(Teacher):
    """Notes what it is told of and asked for."""

    vocab_size, waits = 60, True

    def __init__(self):
        self.events = []

    def prepare(self, window):
        self.events += [("told", tuple(batch.rows.ids)) for batch in window]

    def targets(self, batch):
        self.events.append(("asked", tuple(batch.rows.ids)))
        return Targets(torch.zeros(int(batch.num_supervised), 60))


def encoded(number, length):
    ids = [5 + number % 50] * length
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "prompt_length": 1, "row_id": str(number)}


def asking(teacher, lengths, **options):
    rows = [encoded(number, length) for number, length in enumerate(lengths)]
    collator = Collator(tiny.make_tokenizer())
    defaults = {"form": Format("topk", 60, entries=2), "batch_size": 2}
    return Asking(teacher, lambda numbers: collator([rows[n] for n in numbers]), **{**defaults, **options})


def shards(lengths, size):
    numbers = range(0, len(lengths), size)
    return [
        Shard(n, range(i, min(i + size, len(lengths))), [key(j) for j in range(i, i + size)], lengths[i : i + size])
        for n, i in enumerate(numbers)
    ]


def test_no_batch_has_rows_of_two_shards_and_rows_come_back_in_their_order():
    lengths, teacher = [3, 9, 4, 8, 5, 2, 7], Recorded()
    found = list(asking(teacher, lengths).shards(shards(lengths, 4), lambda rows: None))
    asked = [rows for event, rows in teacher.events if event == "asked"]
    assert asked == [("1", "3"), ("2", "0"), ("6", "4"), ("5",)]
    assert [shard.number for shard, _ in found] == [0, 1]
    counts = [len(row.indices) for _, rows in found for row in rows]
    assert counts == [length - 1 for length in lengths]


def test_a_teacher_elsewhere_is_told_of_batches_ahead_over_the_ends_of_shards():
    lengths, teacher = [4] * 8, Recorded()
    for _ in asking(teacher, lengths, ahead=2).shards(shards(lengths, 4), lambda rows: None):
        pass
    kinds = [event for event, _ in teacher.events]
    assert kinds == ["told", "told", "told", "asked", "told", "asked", "asked", "asked"]


def test_progress_is_told_in_rows():
    done = []
    lengths = [4] * 7
    list(asking(Recorded(), lengths).shards(shards(lengths, 4), done.append))
    assert done == [2, 2, 2, 1]


def test_what_is_stored_of_a_row_is_what_the_teacher_says_of_it_alone():
    module = tiny.make_qwen3(vocab_size=60, seed=2)
    teacher, lengths = LocalTeacher(module), [3, 9, 4, 8, 5, 2, 7]
    found = asking(teacher, lengths, form=Format("topk", 60, entries=5), batch_size=3)
    stored = {}
    for shard, rows in found.shards(shards(lengths, 4), lambda rows: None):
        stored |= dict(zip(shard.rows, rows, strict=True))
    assert len(stored) == len(lengths)
    for number, length in enumerate(lengths):
        ids = torch.tensor([encoded(number, length)["input_ids"]])
        with torch.no_grad():
            expected = torch.log_softmax(module(input_ids=ids).logits[0, :-1].double(), -1).topk(5).values
        assert isinstance(stored[number], TopKLogprobs)
        torch.testing.assert_close(stored[number].logprobs.double(), expected, atol=1e-5, rtol=0)
