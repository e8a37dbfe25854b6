"""Weights of single tokens in the divergence: kd_weight · Σ w · divergence / D_kd, against float64 autograd."""

import itertools

import pytest
import torch

from kdtrain.losses import (
    TopKLogprobs,
    dense_distillation_loss,
    fused_distillation_loss,
    generalized_jsd,
    topk_divergence,
)
from kdtrain.losses.sampled import SampledTargets, sampled_divergence

N, V, H = 23, 40, 8
WEIGHTS = torch.tensor([0.0, 0.25, 1.0, 3.0]).repeat(6)[:N]
KD = [("jsd", 0.0), ("jsd", 0.3), ("jsd", 0.95), ("jsd", 1.0), ("jsd_scaled", 0.5), ("mixed_kl", 0.4)]


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = -100
    return draw(N, H).requires_grad_(), draw(V, H).requires_grad_(), labels, draw(N, 6), draw(V, 6)


def topk(teacher_logits, k=9):
    logprobs, indices = torch.log_softmax(teacher_logits, -1).topk(k)
    return TopKLogprobs(indices, logprobs)


def drawn(teacher_logits, temperature):
    probabilities = torch.softmax(teacher_logits / temperature, -1)
    indices = torch.multinomial(probabilities, 12, generator=torch.Generator().manual_seed(1))
    return SampledTargets(indices, torch.full(indices.shape, 1 / 12))


def expected_loss(hidden, weight, labels, values_of, kd, ce, num_items, num_kd_items):
    """The definition, in float64. `values_of`: student logits -> divergence of each token."""
    keep, w = labels != -100, WEIGHTS.double()
    z = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (z[0] @ z[1].t())[keep]
    items = int(keep.sum()) if num_items is None else num_items
    kd_items = num_kd_items or (int((WEIGHTS[keep] > 0).sum()) if num_items is None else items)
    loss = kd * (w[keep] * values_of(logits, keep)).sum() / kd_items
    loss = loss - ce * torch.log_softmax(logits, -1).gather(1, labels[keep][:, None]).sum() / items
    return loss.detach(), torch.autograd.grad(loss, z)


def assert_equal(result, hidden, weight, expected):
    value, gradients = expected
    assert result.loss.item() == pytest.approx(value.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(result.loss, [hidden, weight]), gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(("divergence", "beta"), KD)
def test_each_token_counts_by_its_weight(divergence, beta):
    hidden, weight, labels, teacher_hidden, teacher_weight = make()
    teacher = (teacher_hidden @ teacher_weight.t()).double()
    cases = itertools.product([1.0, 2.0], [0.0, 0.3], [(None, None), (100, None), (100, 40)], [None, 4])
    for temperature, ce, (items, kd_items), chunk in cases:
        options = {"beta": beta, "temperature": temperature, "divergence": divergence}

        def values(logits, keep, options=options):
            return generalized_jsd(logits.double(), teacher[keep], **options).double()

        expected = expected_loss(hidden, weight, labels, values, 0.7, ce, items, kd_items)
        shared = {
            "kd_weight": 0.7, "ce_weight": ce, "kd_token_weights": WEIGHTS, "num_items": items,
            "num_kd_items": kd_items, **options,
        }  # fmt: skip
        fused = fused_distillation_loss(
            hidden, weight, labels, teacher_hidden, teacher_weight, chunk_tokens=chunk, **shared
        )
        dense = dense_distillation_loss(hidden @ weight.t(), labels, teacher.float(), **shared)
        for result in (fused, dense):
            assert_equal(result, hidden, weight, expected)
        assert fused.kd_sum.item() == pytest.approx(dense.kd_sum.item(), rel=1e-5)
        keep = labels != -100
        sum_of_all = (WEIGHTS[keep] * values((hidden @ weight.t())[keep], keep)).sum()
        assert fused.kd_sum.item() == pytest.approx(sum_of_all.item(), rel=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_with_a_top_k_teacher(beta, tail):
    hidden, weight, labels, teacher_hidden, teacher_weight = make(1)
    targets = topk(teacher_hidden @ teacher_weight.t())
    for temperature, (items, kd_items) in itertools.product([1.0, 2.0], [(None, None), (100, 40)]):
        options = {"beta": beta, "temperature": temperature, "divergence": "jsd", "tail": tail}

        def values(logits, keep, options=options):
            wide = TopKLogprobs(targets.indices[keep], targets.logprobs[keep].double())
            return topk_divergence(logits, wide, **options)

        expected = expected_loss(hidden, weight, labels, values, 0.7, 0.2, items, kd_items)
        shared = {
            "targets": targets, "kd_weight": 0.7, "ce_weight": 0.2, "kd_token_weights": WEIGHTS, "num_items": items,
            "num_kd_items": kd_items, **options,
        }  # fmt: skip
        assert_equal(fused_distillation_loss(hidden, weight, labels, **shared), hidden, weight, expected)
        assert_equal(dense_distillation_loss(hidden @ weight.t(), labels, **shared), hidden, weight, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_tokens_that_were_drawn(temperature):
    hidden, weight, labels, teacher_hidden, teacher_weight = make(2)
    targets = drawn(teacher_hidden @ teacher_weight.t(), temperature)

    def values(logits, keep):
        some = SampledTargets(targets.indices[keep], targets.weights[keep].double())
        return sampled_divergence(logits, some, temperature)

    expected = expected_loss(hidden, weight, labels, values, 0.7, 0.2, 100, 40)
    shared = {
        "targets": targets, "kd_weight": 0.7, "ce_weight": 0.2, "kd_token_weights": WEIGHTS, "num_items": 100,
        "num_kd_items": 40, "beta": 0.0, "temperature": temperature,
    }  # fmt: skip
    assert_equal(fused_distillation_loss(hidden, weight, labels, **shared), hidden, weight, expected)
    assert_equal(dense_distillation_loss(hidden @ weight.t(), labels, **shared), hidden, weight, expected)


def test_weights_of_one_change_nothing_but_rounding():
    hidden, weight, labels, teacher_hidden, teacher_weight = make(3)
    gradients = []
    for weights in (None, torch.ones(N)):
        result = fused_distillation_loss(
            hidden, weight, labels, teacher_hidden, teacher_weight, ce_weight=0.3, kd_token_weights=weights
        )
        gradients.append([result.loss, result.kd_sum, *torch.autograd.grad(result.loss, [hidden, weight])])
    for without, ones in zip(*gradients, strict=True):
        torch.testing.assert_close(ones, without, rtol=1e-6, atol=1e-7)


def test_a_weight_of_zero_leaves_a_token_out_of_the_divergence_and_its_denominator_alone():
    hidden, weight, labels, teacher_hidden, teacher_weight = make(4)
    some = torch.arange(N) % 3 > 0
    of_all = fused_distillation_loss(
        hidden, weight, labels, teacher_hidden, teacher_weight, kd_token_weights=some.float()
    )
    of_some = fused_distillation_loss(hidden, weight, labels.masked_fill(~some, -100), teacher_hidden, teacher_weight)
    assert of_all.loss.item() == pytest.approx(of_some.loss.item(), rel=1e-6)
    assert of_all.num_tokens == (labels != -100).sum()
    assert of_all.num_correct >= of_some.num_correct


@pytest.mark.parametrize("weights", [torch.ones(N + 1), -torch.ones(N), torch.full((N,), torch.inf)])
def test_weights_that_do_not_fit_are_refused(weights):
    hidden, weight, labels, teacher_hidden, teacher_weight = make()
    with pytest.raises(ValueError, match="kd_token_weights"):
        fused_distillation_loss(hidden, weight, labels, teacher_hidden, teacher_weight, kd_token_weights=weights)
    with pytest.raises(ValueError, match="kd_token_weights"):
        dense_distillation_loss(
            hidden @ weight.t(), labels, teacher_hidden @ teacher_weight.t(), kd_token_weights=weights
        )
