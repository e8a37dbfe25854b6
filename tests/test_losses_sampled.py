"""Targets drawn from a teacher: value and gradient against float64, what is refused, and the mean over draws."""

import itertools

import pytest
import torch

from kdtrain.losses import (
    SampledTargets,
    dense_distillation_loss,
    fused_distillation_loss,
    generalized_jsd,
    sampled_divergence,
)
from kdtrain.losses.sampled import estimated_logprobs, most_drawn
from kdtrain.losses.sparse_tile import sampled_tile_terms
from kdtrain.losses.tile import Buffers, RowWeights, TileOptions
from tests.test_losses import DIVERGENCES
from tests.test_losses_fused import make, topk_of

N, V = 24, 40


def drawn(teacher_logits, draws, temperature=1.0, seed=0):
    """Tokens drawn from each row, with their shares; rows with fewer different ones are filled up with −1."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(teacher_logits.double() / temperature, -1)
    counts = torch.zeros_like(p)
    chosen = torch.multinomial(p, draws, replacement=True, generator=generator)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.double))
    k = int((counts > 0).sum(-1).max())
    shares, ids = counts.topk(k)
    return SampledTargets(ids.masked_fill(shares == 0, -1), (shares / draws).float())


def problem(draws=8, temperature=1.0, seed=0):
    """Student logits, labels of which a third is unsupervised, and draws of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    student = (2 * torch.randn(N, V, generator=generator)).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::3] = -100
    return student, labels, drawn(2 * torch.randn(N, V, generator=generator), draws, temperature, seed)


def reference(z, targets, temperature):
    """Σ w·log(w/p) and its gradient (p − w)/temperature, in float64 and by the formulas alone."""
    z = z.detach().double() / temperature
    p = (z - z.amax(-1, keepdim=True)).exp()
    p = p / p.sum(-1, keepdim=True)
    w = torch.zeros_like(p)
    for row, (ids, weights) in enumerate(zip(targets.indices, targets.weights.double(), strict=True)):
        for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if token >= 0:
                w[row, token] = weight
    return torch.xlogy(w, w / p).sum(-1), (p - w) / temperature


def whole_reference(student, labels, targets, kd, ce, temperature, mask, items):
    """Loss, its gradient with respect to the logits and the two sums."""
    keep = labels != -100
    values, gradients = reference(student, targets, temperature)
    p = torch.softmax(student.detach().double(), -1)
    rows = keep if mask is None else keep & mask
    ce_sum = -p[rows].gather(1, labels[rows, None]).log().sum()
    onehot = torch.zeros_like(p).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    divisor = items or int(keep.sum())
    kd_sum = values[keep].sum()
    gradient = (kd * gradients * keep[:, None] + ce * (p - onehot) * rows[:, None]) / divisor
    return (kd * kd_sum + ce * ce_sum) / divisor, gradient, kd_sum, ce_sum


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("draws", [1, 8, 500])
def test_value_and_gradient_are_those_of_the_formula(draws, temperature):
    student, _, targets = problem(draws, temperature)
    value = sampled_divergence(student, targets, temperature)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    expected, wanted = reference(student, targets, temperature)
    assert (targets.indices < 0).any() == (draws > 1)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert (gradient.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("draws", [1, 8, 500])
@pytest.mark.parametrize("kd_weight", [0.0, 0.7])
def test_the_loss_from_logits_and_the_fused_one_are_those_of_the_formula(draws, temperature, kd_weight):
    inputs = make(n=N, vocab=V, bias=True)
    hidden, weight, bias = (inputs[name] for name in ("student_hidden", "student_weight", "student_bias"))
    _, labels, targets = problem(draws, temperature)
    mask = torch.arange(N) % 4 != 1
    for ce, ce_mask, items in itertools.product([0.0, 0.3], [None, mask], [None, 100]):
        options = {
            "kd_weight": kd_weight, "ce_weight": ce, "ce_token_weights": ce_mask, "num_items": items, "beta": 0.0,
            "temperature": temperature, "targets": targets,
        }  # fmt: skip
        logits = hidden @ weight.t() + bias
        expected, wanted, kd_sum, ce_sum = whole_reference(
            logits, labels, targets, kd_weight, ce, temperature, ce_mask, items
        )
        dense = dense_distillation_loss(logits, labels, **options)
        fused = fused_distillation_loss(hidden, weight, labels, student_bias=bias, **options)
        from_dense = torch.autograd.grad(dense.loss, (hidden, weight, bias), retain_graph=True)
        from_fused = torch.autograd.grad(fused.loss, (hidden, weight, bias))
        from_formula = torch.autograd.grad(logits, (hidden, weight, bias), wanted.float())
        for result in (dense, fused):
            assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
            assert result.ce_sum.item() == pytest.approx(ce_sum.item(), rel=1e-5)
            assert result.teacher_entropy_sum is None
            assert (result.kd_sum is None) == (kd_weight == 0)
            if kd_weight:
                assert result.kd_sum.item() == pytest.approx(kd_sum.item(), rel=1e-5)
        for one, other, third in zip(from_dense, from_fused, from_formula, strict=True):
            torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(other, third, rtol=1e-4, atol=1e-6)
        for name in ("num_tokens", "num_correct", "num_agree", "student_entropy_sum"):
            torch.testing.assert_close(getattr(dense, name), getattr(fused, name), rtol=1e-5, atol=1e-5)


def test_the_result_does_not_depend_on_the_chunk():
    inputs = make(n=N, vocab=V)
    _, labels, targets = problem()
    found = []
    for chunk in (None, 1, 5):
        result = fused_distillation_loss(
            inputs["student_hidden"], inputs["student_weight"], labels, targets=targets, beta=0.0, ce_weight=0.2,
            temperature=1.5, chunk_tokens=chunk,
        )  # fmt: skip
        found.append((result.loss, *torch.autograd.grad(result.loss, inputs["student_hidden"])))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-7)


def test_a_student_in_bfloat16_is_computed_in_float32():
    inputs = make(n=N, vocab=V)
    hidden, weight = (
        inputs[name].detach().bfloat16().requires_grad_() for name in ("student_hidden", "student_weight")
    )
    _, labels, targets = problem()
    result = fused_distillation_loss(hidden, weight, labels, targets=targets, beta=0.0)
    gradients = torch.autograd.grad(result.loss, (hidden, weight))
    logits = hidden.detach().double() @ weight.detach().double().t()
    expected, wanted, *_ = whole_reference(logits, labels, targets, 1.0, 0.0, 1.0, None, None)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, exact in zip(gradients, (wanted @ weight.double(), wanted.t() @ hidden.double()), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() <= 5e-3 * exact.norm()  # one rounding to bfloat16


def test_a_soft_cap_and_a_scale_of_the_head_are_in_the_gradient():
    inputs = make(n=N, vocab=V)
    hidden, weight = inputs["student_hidden"], inputs["student_weight"]
    _, labels, targets = problem()
    fused = fused_distillation_loss(
        hidden, weight, labels, targets=targets, beta=0.0, student_softcap=2.0, student_logit_scale=1.5
    )
    dense = dense_distillation_loss(
        2.0 * torch.tanh(1.5 * (hidden @ weight.t()) / 2.0), labels, targets=targets, beta=0.0
    )
    torch.testing.assert_close(fused.loss, dense.loss, rtol=1e-5, atol=0)
    for one, other in zip(
        torch.autograd.grad(fused.loss, (hidden, weight)), torch.autograd.grad(dense.loss, (hidden, weight)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_draws_of_a_column_that_the_student_masks_count_for_the_others():
    inputs = make(n=N, vocab=V)
    hidden, weight = inputs["student_hidden"], inputs["student_weight"]
    _, labels, targets = problem()
    bias = torch.zeros(V)
    bias[targets.indices[1, 0]] = -torch.inf
    labels[labels == targets.indices[1, 0]] = (targets.indices[1, 0] + 1) % V
    result = fused_distillation_loss(hidden, weight, labels, targets=targets, beta=0.0, student_bias=bias)
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    assert result.loss.isfinite()
    assert gradient.isfinite().all()
    left = (weight.t() @ torch.eye(V))[:, bias == 0]
    w = torch.zeros(N, V).scatter_add_(1, targets.indices.clamp(min=0), targets.weights)[:, bias == 0]
    p = torch.log_softmax((hidden @ left).double(), -1)
    w = w.double() / w.sum(-1, keepdim=True)
    expected = (torch.xlogy(w, w) - w * p).sum(-1)[labels != -100].mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_gradient_that_nobody_wants_is_not_computed_and_the_value_is_the_same():
    student, labels, targets = problem()
    options = TileOptions(1.0, 0.3, 0.0, 2.0, "jsd", "bucket")
    labels = labels.clamp(min=0)
    values = []
    for with_gradient in (False, True):
        block = student.detach().clone()
        sums = sampled_tile_terms(block, targets, labels, RowWeights(), options, Buffers.like(block, N), with_gradient)
        values.append((sums.kd, sums.ce, sums.student_entropy, sums.agree))
    assert values[0] == values[1]


def test_no_supervised_token_is_a_zero_with_a_gradient_path():
    for rows in (0, 3):
        hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(V, 8)
        labels = torch.full((rows,), -100)
        targets = SampledTargets(torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1))
        fused = fused_distillation_loss(hidden, weight, labels, targets=targets, beta=0.0, ce_weight=1.0)
        dense = dense_distillation_loss(hidden @ weight.t(), labels, targets=targets, beta=0.0, ce_weight=1.0)
        for result in (fused, dense):
            result.loss.backward()
            assert result.loss == 0
            assert [result.kd_sum, result.num_agree] == [0, 0]
        assert not hidden.grad.any()


def test_the_mean_over_draws_of_the_gradient_is_that_of_the_full_distribution():
    generator = torch.Generator().manual_seed(1)
    teacher = 2 * torch.randn(8, V, generator=generator)
    student = (2 * torch.randn(8, V, generator=generator)).requires_grad_()
    for temperature in (1.0, 2.0):
        (full,) = torch.autograd.grad(generalized_jsd(student, teacher, 0.0, temperature).sum(), student)
        mean = torch.zeros_like(full)
        for seed in range(400):
            value = sampled_divergence(student, drawn(teacher, 50, temperature, seed), temperature).sum()
            mean += torch.autograd.grad(value, student)[0] / 400
        assert (mean - full).norm() < 0.05 * full.norm()  # 20,000 draws of each position
        truncated = drawn_as_topk(teacher, 3, temperature)  # and not just any targets would do
        (biased,) = torch.autograd.grad(sampled_divergence(student, truncated, temperature).sum(), student)
        assert (biased - full).norm() > 0.1 * full.norm()


def drawn_as_topk(teacher, k, temperature):
    known = topk_of(teacher / temperature, k)
    return SampledTargets(known.indices, torch.softmax(known.logprobs, -1))


def test_the_value_lies_above_the_full_divergence_by_what_the_draws_add_whatever_the_student():
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(1, 10, generator=generator).expand(4000, -1)
    added = []
    for scale in (0.5, 2.0):
        student = scale * torch.randn(1, 10, generator=generator).expand(4000, -1)
        targets = drawn(teacher, 200)
        added.append((sampled_divergence(student, targets) - generalized_jsd(student, teacher, 0.0)).mean().item())
    assert added == pytest.approx([9 / 400] * 2, rel=0.15)  # (V − 1)/2n, where every token is drawn now and then


def test_agreement_is_with_the_token_drawn_most_often_the_lowest_id_of_several():
    targets = SampledTargets(torch.tensor([[7, 3, 5], [2, 9, -1]]), torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.9, 0.0]]))
    assert most_drawn(targets).tolist() == [[3], [9]]
    student = torch.zeros(2, 12)
    student[0, 3] = student[1, 9] = 1.0
    for labels in (torch.tensor([0, 0]), torch.tensor([0, -100])):
        assert dense_distillation_loss(student, labels, targets=targets, beta=0).num_agree == (labels >= 0).sum()
        fused = fused_distillation_loss(student, torch.eye(12), labels, targets=targets, beta=0)
        assert fused.num_agree == (labels >= 0).sum()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.5, 1.0])
def test_every_divergence_but_forward_kl_is_refused(beta, divergence):
    student, labels, targets = problem()
    options = {"targets": targets, "beta": beta, "divergence": divergence}

    def both():
        yield lambda: dense_distillation_loss(student, labels, **options)
        yield lambda: fused_distillation_loss(student, torch.eye(V), labels, **options)

    for loss in both():
        if beta == 0:
            assert loss().kd_sum.item() == pytest.approx(reference(student, targets, 1.0)[0][labels != -100].sum())
        else:
            with pytest.raises(ValueError, match=r"drawn from the teacher.*forward KL alone.*beta=0"):
                loss()


WRONG = {
    "expected indices": ([[1, 2]], [[1.0]]),
    "integer indices": ([[1.0]], [[1.0]]),
    "NaN": ([[1, 2]], [[float("nan"), 1.0]]),
    "a negative weight": ([[1, 2]], [[-0.5, 1.5]]),
    "a token id twice": ([[1, 1]], [[0.5, 0.5]]),
    "a missing entry": ([[1, -1]], [[0.5, 0.5]]),
    "do not add up to 1": ([[1, 2]], [[0.5, 0.4]]),
    "do not add up to 1 within": ([[1, 2]], [[0.5, 0.6]]),
    "do not add up": ([[-1, -1]], [[0.0, 0.0]]),
}


@pytest.mark.parametrize("message", WRONG)
def test_targets_that_are_no_draws_are_refused(message):
    with pytest.raises(ValueError, match=message):
        SampledTargets(*map(torch.tensor, WRONG[message]))


def test_integer_weights_are_refused():
    with pytest.raises(ValueError, match=r"floating point weights.*int64 and torch.int64"):
        SampledTargets(torch.tensor([[1]]), torch.tensor([[1]]))


def test_the_first_wrong_position_is_named():
    weights = torch.full((5, 2), 0.5)
    weights[3] = 0.25
    with pytest.raises(ValueError, match=r"position 3 .*ids \[1, 2\].*1 positions like it"):
        SampledTargets(torch.tensor([[1, 2]] * 5), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shares_that_are_rounded_are_divided_by_their_sum(dtype):
    counts = torch.tensor([[17.0, 13, 11, 7, 1, 1]])
    targets = SampledTargets(torch.arange(6)[None], (counts / 50).to(dtype))
    assert targets.weights.double().sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(targets.weights.float(), counts / 50, rtol=1e-2, atol=0)


def test_parts_and_copies_are_not_checked_again(monkeypatch):
    targets = problem()[2]
    monkeypatch.setattr("kdtrain.losses.sampled._checked_weights", lambda *_: pytest.fail("checked again"))
    part = targets[2:5].to(torch.device("cpu"))
    assert isinstance(part, SampledTargets)
    assert torch.equal(part.weights, targets.weights[2:5])
    assert torch.equal(targets[torch.tensor([4, 1])].indices, targets.indices[[4, 1]])


def test_rows_and_ids_that_do_not_fit_are_refused():
    student, labels, targets = problem()
    for loss in (
        lambda targets: sampled_divergence(student, targets),
        lambda targets: dense_distillation_loss(student, labels, targets=targets, beta=0.0),
        lambda targets: fused_distillation_loss(student, torch.eye(V), labels, targets=targets, beta=0.0),
    ):
        with pytest.raises(ValueError, match="23 rows of sampled targets for 24"):
            loss(targets[:23])
        with pytest.raises(ValueError, match=rf"ids of sampled targets must be in \[0, {V}\)"):
            loss(SampledTargets(torch.full((N, 1), V), torch.ones(N, 1)))
    with pytest.raises(ValueError, match="temperature"):
        sampled_divergence(student, targets, 0.0)


def test_what_was_not_drawn_is_estimated_by_what_was_drawn_once():
    targets = SampledTargets(torch.tensor([[1, 2, 3], [4, -1, -1]]), torch.tensor([[0.8, 0.1, 0.1], [1.0, 0, 0]]))
    estimate = estimated_logprobs(targets)
    assert estimate.indices.tolist() == targets.indices.tolist()
    # of ten draws two were of tokens drawn once: a fifth of the mass was not seen; of the other row half a draw's
    torch.testing.assert_close(estimate.logprobs.exp()[0], torch.tensor([0.64, 0.08, 0.08]))
    torch.testing.assert_close(estimate.logprobs.exp()[1], torch.tensor([0.95, 0.0, 0.0]))
