"""Loss values and gradients against an independent float64 reference, and the properties any divergence must have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtrain.losses import dense_distillation_loss, generalized_jsd
from kdtrain.losses.reduce import next_token_labels

BETAS = [0, 0.001, 0.1, 0.5, 0.9, 1]
DIVERGENCES = ["jsd", "jsd_scaled", "mixed_kl"]
INF = float("inf")


def reference(student, teacher, beta, temperature=1.0, divergence="jsd"):
    """The definitions of the SPEC, written down in float64 with probabilities instead of log-ratios."""
    s = torch.softmax(student.double() / temperature, -1)
    t = torch.softmax(teacher.double() / temperature, -1)

    def kl(p, q):
        return torch.special.xlogy(p, p).sum(-1) - torch.special.xlogy(p, q).sum(-1)

    if divergence == "mixed_kl":
        return (1 - beta) * kl(t, s) + beta * kl(s, t)
    if beta == 0:
        return kl(t, s)
    if beta == 1:
        return kl(s, t)
    m = beta * t + (1 - beta) * s
    value = beta * kl(t, m) + (1 - beta) * kl(s, m)
    return value / (beta * (1 - beta)) if divergence == "jsd_scaled" else value


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("gap", [3.0, 0.3, 0.01])
def test_value_and_gradient_match_float64(divergence, beta, temperature, gap):
    torch.manual_seed(0)
    teacher = 3 * torch.randn(7, 2000)
    student = (teacher + gap * torch.randn(7, 2000)).requires_grad_()
    value = generalized_jsd(student, teacher, beta, temperature, divergence)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    student64 = student.detach().double().requires_grad_()
    expected = reference(student64, teacher, beta, temperature, divergence)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student64)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize(
    ("student", "teacher", "values"),
    [
        ((0.1, 0.9), (0.9, 0.1), (1.757780, 0.146311, 0.368064, 1.757780)),
        ((0.2, 0.3, 0.5), (0.6, 0.3, 0.1), (0.498224, 0.044421, 0.125101, 0.584996)),
    ],
)
def test_golden_pairs(student, teacher, values):
    student, teacher = torch.tensor(student).log(), torch.tensor(teacher).log()
    for beta, value in zip((0, 0.1, 0.5, 1), values, strict=True):
        assert generalized_jsd(student, teacher, beta).item() == pytest.approx(value, abs=1.5e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_inputs_are_never_negative_and_a_model_with_itself_is_zero(beta, divergence):
    torch.manual_seed(0)
    teacher = torch.randn(256, 1000).bfloat16()
    student = (teacher.float() * (1 + 0.01 * torch.randn(256, 1000))).bfloat16()
    assert generalized_jsd(student, teacher, beta, divergence=divergence).min() >= 0
    assert generalized_jsd(teacher, teacher, beta, divergence=divergence).abs().max() == 0
    nearly = (teacher.float() + 1e-6 * torch.randn(256, 1000)).requires_grad_()
    value = generalized_jsd(nearly, teacher.float(), beta, divergence=divergence)
    assert value.min() >= 0


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["both", "student", "teacher", "disjoint"])
def test_minus_infinity_is_a_probability_of_zero(beta, divergence, side):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 40), torch.randn(5, 40)
    if side in ("both", "student"):
        student[:, 30:] = -INF
    if side in ("both", "teacher"):
        teacher[:, 30:] = -INF
    if side == "disjoint":
        student[:, 35:] = -INF
        teacher[:, :5] = -INF
    student.requires_grad_()
    value = generalized_jsd(student, teacher, beta, divergence=divergence)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    expected = reference(student.detach(), teacher, beta, divergence=divergence)
    if expected.isfinite().all():
        torch.testing.assert_close(value.detach().double(), expected, rtol=1e-5, atol=0)
    if side == "both":
        torch.testing.assert_close(
            value, generalized_jsd(student[:, :30], teacher[:, :30], beta, divergence=divergence), rtol=1e-6, atol=0
        )


def test_the_scaled_jsd_has_the_two_kls_as_limits():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 50).double(), torch.randn(4, 50).double()
    for beta, end in ((1e-6, 0), (1 - 1e-6, 1)):
        near = generalized_jsd(student, teacher, beta, divergence="jsd_scaled")
        torch.testing.assert_close(near, generalized_jsd(student, teacher, end), rtol=1e-4, atol=0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=20),
    st.integers(0, 2**31),
    st.sampled_from(BETAS),
    st.sampled_from(DIVERGENCES),
)
def test_divergence_is_nonnegative_finite_and_blind_to_a_shift_of_the_logits(logits, seed, beta, divergence):
    generator = torch.Generator().manual_seed(seed)
    student = torch.tensor(logits)
    teacher = 5 * torch.randn(len(logits), generator=generator)
    value = generalized_jsd(student, teacher, beta, divergence=divergence)
    shifted = generalized_jsd(student + 7, teacher - 3, beta, divergence=divergence)
    assert value >= 0
    assert value.isfinite()
    torch.testing.assert_close(value, shifted, rtol=1e-3, atol=1e-5)
    if divergence == "jsd" and 0 < beta < 1:
        assert value <= math.log(2) + 1e-6


@pytest.mark.parametrize(
    "arguments",
    [
        {"beta": -0.1},
        {"beta": 1.1},
        {"beta": float("nan")},
        {"temperature": 0},
        {"temperature": INF},
        {"divergence": "kl"},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        generalized_jsd(torch.zeros(2, 3), torch.zeros(2, 3), **arguments)


def test_shapes_that_differ_are_refused_and_named():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        generalized_jsd(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        dense_distillation_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="non-negative"):
        dense_distillation_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), kd_weight=-1)


def batch(n=12, vocab=50, dtype=torch.float32):
    torch.manual_seed(3)
    student = (2 * torch.randn(n, vocab)).to(dtype).requires_grad_()
    teacher = (2 * torch.randn(n, vocab)).to(dtype)
    labels = torch.randint(0, vocab, (n,))
    labels[::4] = -100
    return student, labels, teacher


@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.25)])
@pytest.mark.parametrize("masked_ce", [False, True])
def test_the_dense_loss_is_the_weighted_sums_over_d(num_items, kd_weight, ce_weight, masked_ce):
    student, labels, teacher = batch()
    ce_mask = torch.arange(12) % 2 == 0 if masked_ce else None
    result = dense_distillation_loss(
        student,
        labels,
        teacher,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ce_token_weights=ce_mask,
        num_items=num_items,
        beta=0.1,
    )
    (gradient,) = torch.autograd.grad(result.loss, student)

    student64 = student.detach().double().requires_grad_()
    keep = labels != -100
    log_p = torch.log_softmax(student64, -1)
    ce_tokens = keep & ce_mask if masked_ce else keep
    ce = -log_p[ce_tokens, labels[ce_tokens]].sum()
    kd = reference(student64[keep], teacher[keep], 0.1).sum()
    expected = (kd_weight * kd + ce_weight * ce) / (9 if num_items is None else 40)
    (expected_gradient,) = torch.autograd.grad(expected, student64)

    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()
    assert gradient[~keep].abs().max() == 0
    torch.testing.assert_close(result.ce_sum.double(), ce.detach(), rtol=1e-5, atol=0)
    assert (result.kd_sum is None) == (kd_weight == 0)
    assert result.num_tokens == 9


def test_the_dense_loss_counts_correct_agreeing_and_entropy():
    student = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 0, 4], [0, 4, 0]])
    teacher = torch.tensor([[4.0, 0, 0], [4, 0, 0], [0, 0, 4], [0, 0, 4]])
    labels = torch.tensor([0, 1, 0, -100])
    result = dense_distillation_loss(student, labels, teacher)
    assert (result.num_tokens, result.num_correct, result.num_agree) == (3, 2, 2)
    p = torch.softmax(student[0].double(), -1)
    h = -(p * p.log()).sum().item()
    assert result.student_entropy_sum.item() == pytest.approx(3 * h, rel=1e-5)
    assert result.teacher_entropy_sum.item() == pytest.approx(3 * h, rel=1e-5)


@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_no_supervised_token_is_a_zero_with_a_gradient_path(ce_weight):
    student, labels, teacher = batch()
    result = dense_distillation_loss(student, torch.full_like(labels, -100), teacher, ce_weight=ce_weight)
    assert result.loss.item() == 0
    (gradient,) = torch.autograd.grad(result.loss, student)
    assert gradient.abs().max() == 0
    assert result.num_tokens == 0


def test_the_dense_loss_survives_minus_infinity_in_tokens_that_do_not_count():
    student, labels, teacher = batch()
    poisoned = student.detach().clone()
    poisoned[labels == -100] = -INF
    poisoned.requires_grad_()
    result = dense_distillation_loss(poisoned, labels, teacher, ce_weight=1.0)
    (gradient,) = torch.autograd.grad(result.loss, poisoned)
    assert gradient.isfinite().all()
    assert result.loss == dense_distillation_loss(student, labels, teacher, ce_weight=1.0).loss


def test_bf16_logits_are_compared_in_float32():
    student, labels, teacher = batch(dtype=torch.bfloat16)
    result = dense_distillation_loss(student, labels, teacher, ce_weight=1.0)
    exact = dense_distillation_loss(student.detach().float(), labels, teacher.float(), ce_weight=1.0)
    assert result.loss.dtype == torch.float32
    assert result.loss == exact.loss


def test_the_first_label_is_never_used_and_the_last_position_predicts_nothing():
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    assert next_token_labels(labels).tolist() == [[6, 7], [-100, 9]]
