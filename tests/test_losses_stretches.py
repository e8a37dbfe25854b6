"""Tokens of one call that several divergences compare: the sum of what each is by itself, in float64."""

from __future__ import annotations

import pytest
import torch

from kdtrain.losses import TopKLogprobs, dense_distillation_loss
from kdtrain.losses.by_chunks import dense_loss_by_chunks
from kdtrain.losses.fused import head_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.losses.kinds import Stretch
from kdtrain.losses.mixture import Mixed, MixedHeads, mix_logits
from kdtrain.losses.sampled import SampledTargets
from kdtrain.losses.tile import TileOptions

N, V, H = 23, 31, 8
OPTIONS = TileOptions(0.7, 0.3, 0.5, 1.5, "jsd", "bucket")
KINDS = (("skew_kl", 0.5, 7), ("jsd", 0.0, 0), ("jsd", 0.3, 11), ("tvd", 0.5, 5))
ITEMS, KD_ITEMS = 40, 30


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(0, V - 2, (N,), generator=generator)
    return randn(N, H), 0.5 * randn(V, H), randn(N, H), 0.5 * randn(V, H), labels


def weights_of(kind):
    """Some 0, some above 1; None is 1 for all."""
    if kind is None:
        return None
    weights = torch.tensor([0.0, 1.0, 2.5]).repeat(N)[:N]
    return torch.zeros(N) if kind == "none is taught" else weights


def stretches_of(weights, spare=0):
    found, first = [], 0
    for name, beta, size in KINDS:
        taught = size if weights is None else int((weights[first : first + size] > 0).sum())
        found.append(Stretch(size, min(taught + spare, size), name, beta))
        first += size
    return found


def expected_of(hidden, weight, bias, teacher_logits, labels, options, weights, targets=None, softened=None):
    """Value, sum of the divergences, and gradients of hidden states and weight: each kind by itself, in float64."""
    hidden, weight = (one.detach().double().requires_grad_() for one in (hidden, weight))
    logits = hidden @ weight.t() + (0.0 if bias is None else bias.double())
    total, kd, first = 0.0, 0.0, 0
    for name, beta, size in KINDS:
        own = slice(first, first + size)
        first += size
        if not size:
            continue
        one = dense_distillation_loss(
            logits[own], labels[own], None if teacher_logits is None else teacher_logits[own],
            softened_teacher_logits=None if softened is None else softened[own],
            targets=None if targets is None else targets[own], kd_weight=options.kd_weight,
            ce_weight=options.ce_weight, beta=beta, divergence=name, temperature=options.temperature,
            tail=options.tail, kd_token_weights=None if weights is None else weights[own].double(),
            num_items=ITEMS, num_kd_items=KD_ITEMS,
        )  # fmt: skip
        total, kd = total + one.loss, kd + one.kd_sum
    return total.detach(), kd.detach(), torch.autograd.grad(total, (hidden, weight))


def check(found, hidden, weight, expected, tolerance=1e-5):
    total, kd, gradients = expected
    torch.testing.assert_close(found.loss.double(), total, rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(found.kd_sum.double(), kd, rtol=tolerance, atol=1e-6)
    assert int(found.num_tokens) == N
    for own, exact in zip(torch.autograd.grad(found.loss, (hidden, weight)), gradients, strict=True):
        assert (own.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("chunk", [None, 1, 5, 8])
@pytest.mark.parametrize("weighs", [None, "some", "none is taught"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("teacher", ["dense", "top-k", "two mixed", "a masked column"])
def test_each_token_has_its_own_divergence(teacher, ce_weight, weighs, chunk):
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    hidden, weight, weights = hidden.requires_grad_(), weight.requires_grad_(), weights_of(weighs)
    options = TileOptions(0.7, ce_weight, 0.5, 1.5, "jsd", "bucket")
    bias, given, softened, targets = None, {}, None, None
    logits = teacher_hidden.double() @ teacher_weight.double().t()
    if teacher == "a masked column":
        bias = torch.zeros(V)
        bias[-1] = logits[:, -1] = -torch.inf
        given = {"teacher_hidden": teacher_hidden, "teacher": Head(teacher_weight, bias, 1.0, None)}
    elif teacher == "dense":
        given = {"teacher_hidden": teacher_hidden, "teacher": Head(teacher_weight, None, 1.0, None)}
    elif teacher == "top-k":
        values, ids = logits.log_softmax(-1).topk(5)
        targets = TopKLogprobs(ids, values.float())
        given, logits = {"targets": targets}, None
    else:
        heads = tuple(Head(one, None, 1.0, None) for one in (teacher_weight, teacher_weight.flip(0)))
        given = {"mixed": MixedHeads((teacher_hidden, teacher_hidden), heads, (0.4, 0.6))}
        logits, softened = mix_logits([logits, logits.flip(1)], [0.4, 0.6], options.temperature)
    stretches = stretches_of(weights, spare=1)
    found = head_distillation_loss(
        hidden, Head(weight, bias, 1.0, None), labels, options, stretches=stretches, kd_token_weights=weights,
        num_items=ITEMS, num_kd_items=KD_ITEMS, chunk_tokens=chunk, **given,
    )  # fmt: skip
    check(found, hidden, weight, expected_of(hidden, weight, bias, logits, labels, options, weights, targets, softened))


@pytest.mark.parametrize("spare", [0, 3, N])
def test_more_tokens_may_be_said_to_be_taught_than_are(spare):
    """Of those that were chosen on the device, as many as of the whole batch may be of one kind."""
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    hidden, weight, weights = hidden.requires_grad_(), weight.requires_grad_(), weights_of("some")
    options = TileOptions(0.7, 0.0, 0.5, 1.5, "jsd", "bucket")
    found = head_distillation_loss(
        hidden, Head(weight, None, 1.0, None), labels, options, teacher_hidden, Head(teacher_weight, None, 1.0, None),
        stretches=stretches_of(weights, spare), kd_token_weights=weights, num_items=ITEMS, num_kd_items=KD_ITEMS,
    )  # fmt: skip
    teacher = teacher_hidden.double() @ teacher_weight.double().t()
    check(found, hidden, weight, expected_of(hidden, weight, None, teacher, labels, options, weights))


@pytest.mark.parametrize("chunk", [None, 1, 4, 50])
@pytest.mark.parametrize("weighs", [None, "some"])
def test_of_logits_as_well(weighs, chunk):
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    hidden, weight, weights = hidden.requires_grad_(), weight.requires_grad_(), weights_of(weighs)
    teacher = teacher_hidden @ teacher_weight.t()
    found = dense_loss_by_chunks(
        hidden @ weight.t(), labels, OPTIONS, lambda rows: Mixed(teacher[rows], teacher[rows]),
        kd_token_weights=weights, num_items=ITEMS, num_kd_items=KD_ITEMS, chunk_tokens=chunk,
        stretches=stretches_of(weights),
    )  # fmt: skip
    check(found, hidden, weight, expected_of(hidden, weight, None, teacher.double(), labels, OPTIONS, weights))


@pytest.mark.parametrize("weighs", [None, "some"])
def test_half_precision_is_as_near_as_it_is_with_one(weighs):
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.bfloat16)
    hidden, weight, weights = hidden.requires_grad_(), weight.requires_grad_(), weights_of(weighs)
    teacher = teacher_hidden.double() @ teacher_weight.double().t()
    found = head_distillation_loss(
        hidden, Head(weight, None, 1.0, None), labels, OPTIONS, teacher_hidden, Head(teacher_weight, None, 1.0, None),
        stretches=stretches_of(weights), kd_token_weights=weights, num_items=ITEMS, num_kd_items=KD_ITEMS,
    )  # fmt: skip
    _, _, exact = expected_of(hidden, weight, None, teacher, labels, OPTIONS, weights)
    for own, gradient in zip(torch.autograd.grad(found.loss, (hidden, weight)), exact, strict=True):
        assert (own.double() - gradient).norm() <= 2**-7 * gradient.norm()


def test_drawn_tokens_are_for_forward_kl_in_each_of_them():
    hidden, weight, _, _, labels = inputs()
    drawn = SampledTargets(labels[:, None], torch.ones(N, 1))
    stretches = [Stretch(10, 10, "jsd", 0.0), Stretch(N - 10, N - 10, "jsd", 0.5)]
    with pytest.raises(ValueError, match="forward KL"):
        head_distillation_loss(
            hidden, Head(weight, None, 1.0, None), labels, OPTIONS, targets=drawn, stretches=stretches
        )
