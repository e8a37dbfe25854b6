"""Token by token: each figure against a float64 reference that shares nothing with it, and what must not matter."""

import math

import pytest
import torch

from kdtrain.losses.comparison import BINS, Scores, calibration_error, calibration_sums, compare, label_logprobs
from kdtrain.losses.head import Head
from kdtrain.losses.topk import TopKLogprobs

N, V, H = 23, 41, 12


@pytest.fixture
def models():
    """(student's logits, teacher's logits, labels), float32."""
    torch.manual_seed(0)
    return 3 * torch.randn(N, V), 3 * torch.randn(N, V), torch.randint(0, V, (N,))


def scores(logits):
    return Scores(logits, None, logits.shape[1])


def topk(logits, k):
    """A teacher that is known by its k most likely tokens, in no order."""
    found = torch.log_softmax(logits.double(), -1).topk(k, -1)
    return TopKLogprobs(found.indices.flip(-1), found.values.flip(-1).float())


def reference(student, teacher, label):
    """Of one token, with plain Python floats."""
    p, q = ([math.exp(x) for x in logits.tolist()] for logits in (student, teacher))
    p, q = ([x / sum(values) for x in values] for values in (p, q))
    largest = [next(i for i, x in enumerate(values) if x == max(values)) for values in (p, q)]
    return {
        "ce": -math.log(p[label]),
        "correct": largest[0] == label,
        "confidence": max(p),
        "forward_kl": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b),
        "reverse_kl": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a),
        "agree": largest[0] == largest[1],
        "overlap": sum(min(a, b) for a, b in zip(p, q, strict=True)),
    }


def found_at(i, own, between):
    named = ("ce", "correct", "confidence", "forward_kl", "reverse_kl", "agree", "overlap")
    return {name: getattr(own if hasattr(own, name) else between, name)[i].item() for name in named}


def test_every_figure_of_dense_distributions_is_the_reference(models):
    student, teacher, labels = models
    labels[:5] = student[:5].argmax(-1)  # some are right
    teacher[3] = student[3]
    own, of_teacher, between = compare(scores(student), labels, scores(teacher))
    alone, none, nothing = compare(scores(teacher), labels)
    assert none is None
    assert nothing is None
    assert between.exact.all()
    for i in range(N):
        expected = reference(student[i].double(), teacher[i].double(), int(labels[i]))
        assert found_at(i, own, between) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name in ("ce", "correct", "confidence"):
        assert torch.equal(getattr(of_teacher, name), getattr(alone, name))
    assert own.correct.sum() >= 5


def test_hidden_states_and_a_head_give_what_their_logits_give(models):
    *_, labels = models
    torch.manual_seed(1)
    hidden, weight, bias = torch.randn(N, H), torch.randn(V + 7, H), torch.randn(V + 7)
    head = Head(weight, bias, logit_scale=0.5, softcap=4.0)
    logits = (4.0 * torch.tanh(((hidden @ weight.T + bias) * 0.5) / 4.0))[:, :V]
    of_head, of_logits = (
        compare(one, labels, scores(logits.flip(-1))) for one in (Scores(hidden, head, V), scores(logits))
    )
    for left, right in zip(of_head, of_logits, strict=True):
        for name, values in vars(left).items():
            torch.testing.assert_close(values, getattr(right, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("known", [None, 6], ids=["dense", "topk"])
def test_how_tokens_are_cut_into_chunks_changes_nothing(models, chunk, known):
    student, teacher, labels = models
    target = scores(teacher) if known is None else topk(teacher, known)
    whole = compare(scores(student), labels, target)
    cut = compare(scores(student), labels, target, chunk_tokens=chunk)
    for left, right in zip(whole, cut, strict=True):
        for name, values in vars(left).items():
            torch.testing.assert_close(values, getattr(right, name), rtol=1e-6, atol=1e-7)


def test_logits_of_all_tokens_are_never_there_at_once(models, monkeypatch):
    *_, labels = models
    sizes, made = [], Head.logits
    monkeypatch.setattr(Head, "logits", lambda *args: sizes.append(len(args[1])) or made(*args))
    head = Head(torch.randn(V, H), None, 1.0, None)
    compare(Scores(torch.randn(N, H), head, V), labels, Scores(torch.randn(N, H), head, V), chunk_tokens=4)
    assert max(sizes) <= 4
    assert sum(sizes) == 2 * N


def test_columns_beyond_the_shared_ones_take_no_part(models):
    student, teacher, labels = models
    padded = [torch.cat([logits, torch.full((N, 3), 50.0)], 1) for logits in (student, teacher)]
    expected = compare(scores(student), labels, scores(teacher))
    found = compare(Scores(padded[0], None, V), labels, Scores(padded[1], None, V))
    for left, right in zip(found, expected, strict=True):
        for name, values in vars(left).items():
            assert torch.equal(values, getattr(right, name)), name


def test_impossible_tokens_make_no_nan(models):
    student, teacher, labels = models
    student[:, -1] = teacher[:, -1] = -torch.inf
    labels = labels.clamp(max=V - 2)
    for target in (scores(teacher), topk(teacher, 5)):
        for part in compare(scores(student), labels, target):
            assert all(values.float().isfinite().all() for values in vars(part).values())


def test_models_that_are_equal_have_no_divergence(models):
    student, _, labels = models
    _, _, between = compare(scores(student), labels, scores(student.clone()))
    assert not between.forward_kl.any()
    assert not between.reverse_kl.any()
    assert between.agree.all()
    torch.testing.assert_close(between.overlap, torch.ones(N))


def test_models_that_nearly_agree_have_the_small_divergence_that_they_have():
    torch.manual_seed(2)
    student = 3 * torch.randn(50, 2000)
    teacher = student + 3e-3 * torch.randn(50, 2000)
    p, q = (torch.softmax(logits.double(), -1) for logits in (student, teacher))
    expected = (q * (q / p).log()).sum(-1)
    _, _, between = compare(scores(student), torch.zeros(50, dtype=torch.long), scores(teacher))
    assert expected.mean() < 1e-5
    assert (between.forward_kl - expected).abs().max() < 3e-7
    assert between.forward_kl.double().mean() == pytest.approx(float(expected.mean()), rel=0.02)
    assert between.reverse_kl.double().mean() == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=0.02)


def test_of_several_most_likely_tokens_it_is_the_lowest_id():
    student, teacher = torch.zeros(1, V), torch.zeros(1, V)
    student[0, [7, 3]] = 2.0
    teacher[0, [9, 3]] = 2.0
    own, of_teacher, between = compare(scores(student), torch.tensor([3]), scores(teacher))
    assert own.correct.item() is of_teacher.correct.item() is between.agree.item() is True
    named = TopKLogprobs(torch.tensor([[9, 3]]), torch.log(torch.tensor([[0.2, 0.2]])))
    _, of_teacher, between = compare(scores(student), torch.tensor([9]), named)
    assert of_teacher.correct.item() is False
    assert between.agree.item() is True


def test_half_precision_is_computed_in_float32(models):
    student, teacher, labels = models
    narrow = [logits.bfloat16() for logits in (student, teacher)]
    expected = compare(scores(narrow[0].float()), labels, scores(narrow[1].float()))
    for left, right in zip(compare(scores(narrow[0]), labels, scores(narrow[1])), expected, strict=True):
        for name, values in vars(left).items():
            assert torch.equal(values, getattr(right, name)), name


def test_no_tokens_are_no_figures():
    own, of_teacher, between = compare(scores(torch.zeros(0, V)), torch.zeros(0, dtype=torch.long), None)
    assert len(own.ce) == len(own.correct) == 0
    assert of_teacher is between is None


# ---- a teacher that is known by its top k ----------------------------------------------------------------------------


def test_what_the_top_k_leaves_out_is_one_outcome(models):
    student, teacher, labels = models
    named = topk(teacher, 4)
    _, _, between = compare(scores(student), labels, named)
    assert not between.exact.any()
    for i in range(N):
        ids = named.indices[i].tolist()
        p, q = ([math.exp(x) for x in logits[i].double().tolist()] for logits in (student, teacher))
        p, q = ([x / sum(values) for x in values] for values in (p, q))
        p, q = ([values[j] for j in ids] + [1 - sum(values[j] for j in ids)] for values in (p, q))
        pairs = list(zip(p, q, strict=True))
        assert between.forward_kl[i].item() == pytest.approx(sum(b * math.log(b / a) for a, b in pairs), rel=1e-4)
        assert between.reverse_kl[i].item() == pytest.approx(sum(a * math.log(a / b) for a, b in pairs), rel=1e-4)
        assert between.overlap[i].item() == pytest.approx(sum(min(pair) for pair in pairs), rel=1e-4)


def test_top_k_figures_are_bounds_of_the_full_ones_and_equal_them_where_all_tokens_are_named(models):
    student, teacher, labels = models
    _, _, full = compare(scores(student), labels, scores(teacher))
    for k in (1, 3, 10):
        _, _, part = compare(scores(student), labels, topk(teacher, k))
        assert (part.forward_kl <= full.forward_kl + 1e-6).all()
        assert (part.reverse_kl <= full.reverse_kl + 1e-6).all()
        assert (part.overlap >= full.overlap - 1e-6).all()
        assert torch.equal(part.agree, full.agree)
    _, of_teacher, whole = compare(scores(student), labels, topk(teacher, V))
    assert whole.exact.all()
    assert of_teacher.ce_known.all()
    torch.testing.assert_close(whole.forward_kl, full.forward_kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.overlap, full.overlap, rtol=1e-4, atol=1e-5)


def test_nothing_is_made_up_for_a_label_that_the_teacher_has_not_named(models):
    student, teacher, _ = models
    order = teacher.argsort(-1, descending=True)
    named, unnamed = order[:, 1], order[:, 8]
    _, of_named, _ = compare(scores(student), named, topk(teacher, 3))
    _, of_unnamed, _ = compare(scores(student), unnamed, topk(teacher, 3))
    expected = -torch.log_softmax(teacher.double(), -1).gather(1, named[:, None])[:, 0]
    torch.testing.assert_close(of_named.ce.double(), expected, rtol=1e-5, atol=1e-6)
    assert of_named.ce_known.all()
    assert not of_unnamed.ce_known.any()
    assert not of_unnamed.ce.any()
    torch.testing.assert_close(of_named.confidence, torch.softmax(teacher, -1).amax(-1), rtol=1e-5, atol=1e-6)


def test_a_row_that_names_fewer_tokens_counts_those_that_it_names(models):
    student, teacher, labels = models
    two = topk(teacher, 2)
    padded = TopKLogprobs(
        torch.cat([two.indices, torch.full((N, 2), -1)], 1),
        torch.cat([two.logprobs, torch.full((N, 2), -torch.inf)], 1),
    )
    for left, right in zip(
        compare(scores(student), labels, padded), compare(scores(student), labels, two), strict=True
    ):
        for name, values in vars(left).items():
            torch.testing.assert_close(values, getattr(right, name), rtol=1e-6, atol=1e-7)


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_the_calibration_error_is_the_mean_gap_over_fifteen_equal_bins():
    torch.manual_seed(3)
    confidence, correct = torch.rand(500), torch.rand(500) < 0.4
    expected = 0.0
    for k in range(15):
        inside = [i for i in range(500) if k / 15 <= confidence[i] < (k + 1) / 15]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(accuracy - mean)
    sums = calibration_sums(confidence, correct)
    assert sums.shape == (3, BINS) == (3, 15)
    assert calibration_error(sums) == pytest.approx(expected, rel=1e-6)
    parts = calibration_sums(confidence[:200], correct[:200]) + calibration_sums(confidence[200:], correct[200:])
    assert calibration_error(parts) == pytest.approx(expected, rel=1e-12)


def test_a_certain_model_is_calibrated_when_it_is_right_and_off_by_one_when_it_is_wrong():
    certain = torch.ones(4)
    assert calibration_error(calibration_sums(certain, torch.ones(4, dtype=torch.bool))) == 0
    assert calibration_error(calibration_sums(certain, torch.zeros(4, dtype=torch.bool))) == 1


# ---- log-probabilities of labels -------------------------------------------------------------------------------------


def test_the_log_probability_of_each_label_is_that_of_the_reference(models):
    _, logits, labels = models
    expected = torch.tensor([logits[i].double().log_softmax(-1)[label] for i, label in enumerate(labels)])
    torch.testing.assert_close(label_logprobs(scores(logits), labels, V).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(label_logprobs(topk(logits, V), labels, V).double(), expected, rtol=1e-5, atol=1e-5)
    hidden, weight = torch.randn(N, H), torch.randn(V + 3, H)  # three columns are padding
    head = Scores(hidden, Head(weight, None, 1.0, None), V)
    expected = (hidden.double() @ weight[:V].double().T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(label_logprobs(head, labels, V).double(), expected, rtol=1e-5, atol=1e-5)
    assert label_logprobs(scores(logits[:0]), labels[:0], V).shape == (0,)


def test_a_label_that_was_not_named_gets_its_part_of_what_is_left():
    p = torch.tensor([[0.5, 0.3], [0.5, 0.3], [0.6, 0.01]])
    known = TopKLogprobs(torch.tensor([[4, 1], [4, 1], [4, 1]]), p.log())
    found = label_logprobs(known, torch.tensor([1, 0, 0]), 10).exp()
    # 0.2 in equal parts on eight tokens; 0.39 on eight would be more than the least likely that was named.
    torch.testing.assert_close(found, torch.tensor([0.3, 0.2 / 8, 0.01]))
    missing = TopKLogprobs(torch.tensor([[4, -1]]), torch.tensor([[math.log(0.5), -math.inf]]))
    torch.testing.assert_close(label_logprobs(missing, torch.tensor([0]), 10).exp(), torch.tensor([0.5 / 9]))
