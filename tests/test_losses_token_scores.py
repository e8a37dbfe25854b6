"""What tokens are ranked by, against float64; and tokens of weight 0, which cost no gradient and keep their metrics."""

import math

import pytest
import torch

from kdtrain.losses import TopKLogprobs, dense_distillation_loss, fused_distillation_loss
from kdtrain.losses.chunks import ChunkedPass
from kdtrain.losses.comparison import Scores
from kdtrain.losses.head import Head
from kdtrain.losses.token_scores import token_scores

N, V = 37, 41


def make(scale=1.0, softcap=None, bias=None):
    """Hidden states and heads of both models, and their log-probabilities in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    models = [(draw(N, 8), Head(draw(V, 8), bias, scale, softcap)), (draw(N, 6), Head(draw(V, 6), None, 1.0, None))]
    log_p = [head.differentiable_logits(hidden.double()).log_softmax(-1) for hidden, head in models]
    return *(Scores(hidden, head, V) for hidden, head in models), *log_p


def expected(by, log_s, log_t):
    entropy = -(log_s.exp() * log_s).nan_to_num(0).sum(-1)
    if by == "student_entropy":
        return entropy
    return (1 - entropy / math.log(V)) * (log_t.exp() * (log_t - log_s)).sum(-1)


def assert_near(found, wanted):
    assert found.shape == (N,)
    assert (found - wanted).abs().max() <= 1e-5 * max(1, float(wanted.abs().max()))


@pytest.mark.parametrize("by", ["student_entropy", "disagreement"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 3.0}, {"bias": torch.linspace(-1, 1, V)}])
def test_scores_are_those_of_float64_however_they_are_made(by, options):
    student, teacher, log_s, log_t = make(**options)
    wanted = expected(by, log_s, log_t)
    for chunk in (None, 1, 7):
        assert_near(token_scores(by, student, teacher, chunk_tokens=chunk), wanted)
    logits = Scores(log_s.float(), None, V)
    assert_near(token_scores(by, logits, teacher), wanted)
    assert_near(token_scores(by, student, Scores(log_t.float(), None, V)), wanted)
    logprobs, indices = log_t.float().topk(V)
    assert_near(token_scores(by, student, TopKLogprobs(indices, logprobs)), wanted)
    assert torch.equal(logits.outputs, log_s.float())  # they are the caller's


def test_padding_beyond_the_shared_vocabulary_takes_no_part():
    student, teacher, log_s, log_t = make()
    wider = Head(torch.cat([student.head.weight, torch.ones(3, 8)]), None, 1.0, None)
    found = token_scores("disagreement", Scores(student.outputs, wider, V), teacher)
    assert_near(found, expected("disagreement", log_s, log_t))


def test_a_masked_column_is_no_nan():
    bias = torch.zeros(V)
    bias[3] = -torch.inf
    student, _, log_s, _ = make(bias=bias)
    assert_near(token_scores("student_entropy", student), expected("student_entropy", log_s, None))


def test_of_a_top_k_teacher_the_divergence_has_its_tail():
    student, _, log_s, log_t = make()
    logprobs, indices = log_t.float().topk(4)
    rest = lambda log_p: torch.cat(  # noqa: E731
        [log_p.gather(1, indices), (1 - log_p.gather(1, indices).exp().sum(-1, keepdim=True)).log()], 1
    )
    s, t = rest(log_s), rest(log_t)
    wanted = (1 - expected("student_entropy", log_s, None) / math.log(V)) * (t.exp() * (t - s)).sum(-1)
    assert_near(token_scores("disagreement", student, TopKLogprobs(indices, logprobs)), wanted)


# ---- weights of 0 ----------------------------------------------------------------------------------------------------


def teacher_of(kind, hidden, weight, temperature):
    if kind == "dense":
        return {"teacher_hidden": hidden, "teacher_weight": weight}
    logprobs, indices = torch.log_softmax(hidden.float() @ weight.float().t(), -1).topk(9)
    return {"targets": TopKLogprobs(indices, logprobs)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "top-k"])
def test_without_cross_entropy_tokens_of_weight_zero_cost_no_gradient_and_keep_their_metrics(kind, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(dtype).requires_grad_() for n in (N, V))
    of_teacher = [torch.randn(n, 6, generator=generator).to(dtype) for n in (N, V)]
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = -100
    some = torch.arange(N) % 3 > 0
    products = []
    original = ChunkedPass._chunk
    monkeypatch.setattr(
        ChunkedPass,
        "_chunk",
        lambda self, chunk, *rest: (products.append((self.taught, chunk)), original(self, chunk, *rest)),
    )
    for temperature, chunk in ((1.0, None), (2.0, 4)):
        shared = {
            **teacher_of(kind, *of_teacher, temperature), "temperature": temperature, "beta": 0.3, "num_items": 50,
            "chunk_tokens": chunk,
        }  # fmt: skip
        weighted = fused_distillation_loss(hidden, weight, labels, kd_token_weights=2.0 * some, **shared)
        masked = labels.masked_fill(~some, -100)
        of_weighted = list(products)
        of_some = fused_distillation_loss(hidden, weight, masked, kd_token_weights=torch.full((N,), 2.0), **shared)
        of_all = fused_distillation_loss(hidden, weight, labels, **shared)
        assert weighted.loss.item() == pytest.approx(of_some.loss.item(), rel=1e-6)
        gradients = [torch.autograd.grad(one.loss, [hidden, weight]) for one in (weighted, of_some)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        for name in ("num_tokens", "num_correct", "num_agree", "student_entropy_sum", "teacher_entropy_sum", "ce_sum"):
            assert getattr(weighted, name).item() == pytest.approx(getattr(of_all, name).item(), rel=1e-5), name
        taught = int((some & (labels != -100)).sum())
        assert {found for found, _ in of_weighted} == {taught}
        assert all(part.stop <= taught or part.start >= taught for _, part in of_weighted)
        products.clear()


def test_nothing_is_taught_where_all_weights_are_zero():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        found = fused_distillation_loss(
            hidden.to(dtype), weight.to(dtype), torch.arange(5), torch.randn(5, 6), torch.randn(V, 6),
            kd_token_weights=torch.zeros(5),
        )  # fmt: skip
        assert found.loss.item() == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(found.loss, [hidden, weight]))


def test_the_cross_entropy_of_each_token_counts_by_its_weight_and_d_stays():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (N, V))
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = -100
    weights, keep = torch.rand(N, generator=generator) * (torch.arange(N) % 4 > 0), labels != -100
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)[keep]
    sums = -(log_p.gather(1, labels[keep][:, None]).squeeze(1) * weights.double()[keep]).sum()
    wanted = 0.3 * sums / keep.sum()
    gradients = torch.autograd.grad(wanted, [hidden, weight])
    shared = {"kd_weight": 0.0, "ce_weight": 0.3, "ce_token_weights": weights}
    for found in (
        fused_distillation_loss(hidden, weight, labels, chunk_tokens=7, **shared),
        dense_distillation_loss(hidden @ weight.t(), labels, **shared),
    ):
        assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert found.ce_sum.item() == pytest.approx(sums.item(), rel=1e-5)
        for ours, theirs in zip(torch.autograd.grad(found.loss, [hidden, weight]), gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    with pytest.raises(ValueError, match="ce_token_weights must be finite and not negative"):
        fused_distillation_loss(hidden, weight, labels, kd_weight=0.0, ce_weight=1.0, ce_token_weights=-weights)
