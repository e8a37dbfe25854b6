"""The fused loss against an independent float64 reference, gradcheck, and what must not change its result."""

import itertools
import math

import pytest
import torch

from kdtrain.losses import TopKLogprobs, dense_distillation_loss, fused_distillation_loss, topk_divergence
from kdtrain.losses import gemm as gemm_module
from kdtrain.losses import workspace as workspace_module
from kdtrain.losses.sizes import chunk_sizes, default_chunk
from tests import tiny
from tests.test_losses import BETAS, DIVERGENCES, reference

INF = float("inf")


def make(n=37, vocab=301, dtype=torch.float32, bias=False, seed=0):
    """Hidden states, heads and labels of a problem whose logits are of the size of a real model's."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[::3] = -100
    return {
        "student_hidden": randn(n, 16).requires_grad_(),
        "student_weight": randn(vocab, 16, scale=0.5).requires_grad_(),
        "labels": labels,
        "teacher_hidden": randn(n, 24),
        "teacher_weight": randn(vocab, 24, scale=0.4),
        "student_bias": randn(vocab).requires_grad_() if bias else None,
        "teacher_bias": randn(vocab) if bias else None,
    }


def certain(n):
    """A top-k teacher that is certain of the first token, at `n` positions."""
    return TopKLogprobs(torch.zeros(n, 1).long(), torch.zeros(n, 1))


def trained(problem):
    return [problem[key] for key in ("student_hidden", "student_weight", "student_bias") if problem[key] is not None]


def reference_loss(problem, kd_weight, ce_weight, beta, temperature, divergence, scale, softcap, ce_mask):
    """Value and gradients of the definition, in float64, by autograd."""
    double = {
        key: value.detach().double().requires_grad_(value.requires_grad)
        for key, value in problem.items()
        if value is not None and value.is_floating_point()
    }

    def logits(side):
        z = double[f"{side}_hidden"] @ double[f"{side}_weight"].t() + double.get(f"{side}_bias", 0.0)
        z = z * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    keep = problem["labels"] != -100
    student, teacher, labels = logits("student")[keep], logits("teacher")[keep], problem["labels"][keep]
    ce = -torch.log_softmax(student, -1).gather(1, labels[:, None]).squeeze(1)
    ce = ce if ce_mask is None else ce * ce_mask[keep]
    loss = ce_weight * ce.sum() / keep.sum()
    if kd_weight:
        loss = loss + kd_weight * reference(student, teacher, beta, temperature, divergence).sum() / keep.sum()
    return loss.detach(), torch.autograd.grad(loss, trained(double | {"student_bias": double.get("student_bias")}))


GRID = list(
    itertools.product(
        [False, True],  # bias
        [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)],
        [1.0, 2.0],  # temperature
        [(1.0, None), (0.5, 3.0)],  # logit scale and soft-cap
        [None, 7],  # chunk
        [False, True],  # some rows without cross-entropy
    )
)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradients_match_float64(beta, divergence):
    """96 problems for each β and divergence: value and all gradients within 1e-5."""
    for seed, (bias, (kd, ce), temperature, (scale, cap), chunk, masked) in enumerate(GRID):
        problem = make(bias=bias, seed=seed)
        ce_mask = torch.arange(37) % 2 == 0 if masked else None
        expected, gradients = reference_loss(problem, kd, ce, beta, temperature, divergence, scale, cap, ce_mask)
        result = fused_distillation_loss(
            **problem, kd_weight=kd, ce_weight=ce, ce_token_weights=ce_mask, beta=beta, temperature=temperature,
            divergence=divergence, student_logit_scale=scale, teacher_logit_scale=scale, student_softcap=cap,
            teacher_softcap=cap, chunk_tokens=chunk,
        )  # fmt: skip
        where = (bias, kd, ce, temperature, scale, cap, chunk, masked)
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5), where
        for ours, theirs in zip(torch.autograd.grad(result.loss, trained(problem)), gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), where


@pytest.mark.parametrize("divergence", ["jsd", "jsd_scaled"])
@pytest.mark.parametrize("gap", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.01, 0.85, 0.86, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6])
def test_jsd_keeps_its_digits_near_the_ends_of_beta(beta, gap, divergence):
    """Where β is near 1, JSD_β is a small difference of two large sums. `gap`: how far the models' logits differ."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(64, 1000, generator=generator)
    student = (teacher + gap * torch.randn(64, 1000, generator=generator)).requires_grad_()
    double = student.detach().double().requires_grad_()
    log_s, log_t = torch.log_softmax(double, -1), torch.log_softmax(teacher.double(), -1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    expected = beta * (log_t.exp() * (log_t - log_m)).sum() + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum()
    expected = expected / (beta * (1 - beta) if divergence == "jsd_scaled" else 1) / 64
    eye = torch.eye(1000)
    result = fused_distillation_loss(
        student, eye, torch.zeros(64).long(), teacher, eye, beta=beta, divergence=divergence
    )
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (ours,), (exact,) = torch.autograd.grad(result.loss, student), torch.autograd.grad(expected, double)
    assert (ours - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", tiny.first_quick([0.3, 0, 1]))
def test_gradcheck(beta, divergence):
    problem = make(n=5, vocab=11, dtype=torch.float64, bias=True)
    rest = {key: value for key, value in problem.items() if not (value.requires_grad)}

    def loss(hidden, weight, bias):
        return fused_distillation_loss(
            student_hidden=hidden, student_weight=weight, student_bias=bias, **rest, kd_weight=0.6, ce_weight=0.4,
            beta=beta, temperature=1.5, divergence=divergence, student_softcap=5.0, chunk_tokens=2,
        ).loss  # fmt: skip

    class Anew(torch.autograd.Function):
        """gradcheck asks one graph for gradients many times; this makes a new one for each."""

        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return loss(*inputs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, scale):
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(loss(*inputs), inputs, scale)

    assert torch.autograd.gradcheck(Anew.apply, trained(problem))


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_bf16_is_computed_in_float32(beta):
    problem = make(dtype=torch.bfloat16)
    result = fused_distillation_loss(**problem, ce_weight=0.5, beta=beta)
    expected, gradients = reference_loss(problem, 1.0, 0.5, beta, 1.0, "jsd", 1.0, None, None)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)  # the inputs are exact, so the value is
    for ours, theirs, like in zip(
        torch.autograd.grad(result.loss, trained(problem)), gradients, trained(problem), strict=True
    ):
        assert ours.dtype == like.dtype
        assert (ours.double() - theirs).norm() <= 4e-3 * theirs.norm()  # rounded once, on return


def test_fp16_gradients_survive_a_large_denominator_under_a_loss_scale():
    """1/D is subnormal in fp16, and so are the gradients; times the scale of a GradScaler they are not."""
    problem = make(dtype=torch.float16)
    result = fused_distillation_loss(**problem, ce_weight=0.5, num_items=100_000)
    _, gradients = reference_loss(problem, 1.0, 0.5, 0.5, 1.0, "jsd", 1.0, None, None)
    (2.0**16 * result.loss).backward()
    factor = 2.0**16 * int(result.num_tokens) / 100_000
    for tensor, expected in zip(trained(problem), gradients, strict=True):
        assert (tensor.grad.double() - factor * expected).norm() <= 1e-3 * (factor * expected).norm()


def test_the_result_does_not_depend_on_the_chunk():
    results = []
    for chunk in (1, 7, 24, 25, 1000, None):
        problem = make()
        result = fused_distillation_loss(**problem, ce_weight=0.5, beta=0.3, chunk_tokens=chunk)
        results.append(
            (result.loss, torch.cat([g.flatten() for g in torch.autograd.grad(result.loss, trained(problem))]))
        )
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        assert (gradient - results[0][1]).norm() <= 1e-6 * results[0][1].norm()


@pytest.mark.parametrize("num_items", [None, 100, torch.tensor(100)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sums_and_metrics_are_those_of_the_dense_loss(num_items, temperature):
    problem = make()
    options = {"kd_weight": 0.7, "ce_weight": 0.3, "beta": 0.1, "temperature": temperature, "num_items": num_items}
    ours = fused_distillation_loss(**problem, **options)
    dense = dense_distillation_loss(
        problem["student_hidden"] @ problem["student_weight"].t(),
        problem["labels"],
        problem["teacher_hidden"] @ problem["teacher_weight"].t(),
        **options,
    )
    for name in vars(dense):
        torch.testing.assert_close(getattr(ours, name), getattr(dense, name), rtol=1e-5, atol=1e-6, check_dtype=False)


def test_without_kd_the_teachers_columns_are_none_and_ce_is_all():
    problem = make()
    alone = {key: problem[key] for key in ("student_hidden", "student_weight", "labels")}
    result = fused_distillation_loss(**alone, kd_weight=0.0, ce_weight=1.0)
    assert result.kd_sum is None
    assert result.num_agree is None
    assert result.loss.item() == pytest.approx((result.ce_sum / result.num_tokens).item(), rel=1e-6)


def test_no_supervised_token_is_a_zero_with_a_gradient_path():
    problem = make()
    problem["labels"] = torch.full_like(problem["labels"], -100)
    result = fused_distillation_loss(**problem, ce_weight=1.0)
    assert result.loss.item() == 0
    for gradient in torch.autograd.grad(result.loss, trained(problem)):
        assert gradient.abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else():
    problem, frozen = make(), make()
    frozen["student_weight"] = frozen["student_weight"].detach()
    losses = [fused_distillation_loss(**p, ce_weight=0.5) for p in (problem, frozen)]
    assert losses[0].loss == losses[1].loss
    for result in losses:
        result.loss.backward()
    assert frozen["student_weight"].grad is None
    assert torch.equal(problem["student_hidden"].grad, frozen["student_hidden"].grad)


def test_nothing_is_computed_for_a_gradient_that_nobody_wants(monkeypatch):
    monkeypatch.setattr("kdtrain.losses.gradients.hidden_gradient", lambda *_: pytest.fail("a gradient was computed"))
    problem = make()
    with torch.no_grad():
        fused_distillation_loss(**problem, ce_weight=0.5)


def test_the_loss_is_scaled_by_what_comes_after_it_and_refuses_a_second_backward():
    problem = make()
    result = fused_distillation_loss(**problem)
    (3 * result.loss).backward(retain_graph=True)
    tripled = problem["student_weight"].grad.clone()
    again = make()
    fused_distillation_loss(**again).loss.backward()
    torch.testing.assert_close(tripled, 3 * again["student_weight"].grad)
    with pytest.raises(RuntimeError, match="second"):
        result.loss.backward()


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_columns_of_a_bias_are_no_nan_and_equal_the_dense_loss(side, divergence):
    problem = make(bias=True)
    for one in ("student", "teacher"):
        if side in (one, "both"):
            with torch.no_grad():
                problem[f"{one}_bias"][290:] = -INF
    problem["labels"] = problem["labels"].clamp(max=200)
    result = fused_distillation_loss(**problem, ce_weight=0.5, beta=0.3, divergence=divergence)
    gradients = torch.autograd.grad(result.loss, trained(problem))
    assert all(gradient.isfinite().all() for gradient in gradients)
    dense = dense_distillation_loss(
        problem["student_hidden"] @ problem["student_weight"].t() + problem["student_bias"],
        problem["labels"],
        problem["teacher_hidden"] @ problem["teacher_weight"].t() + problem["teacher_bias"],
        ce_weight=0.5, beta=0.3, divergence=divergence,
    )  # fmt: skip
    torch.testing.assert_close(result.loss, dense.loss)


@pytest.mark.parametrize("k", [5, 290])  # with 290 the bucket holds masked columns alone
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_top_k_targets_beside_masked_columns_are_those_of_the_columns_that_are_left(k, tail, beta):
    problem = make(bias=True) | {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}
    problem["labels"] = torch.where(problem["labels"] < 0, -100, problem["labels"] % 290)
    targets = topk_of(torch.randn(37, 290, generator=torch.Generator().manual_seed(1)), k)
    options = {"targets": targets, "tail": tail, "ce_weight": 0.5, "beta": beta}
    short = {name: problem[f"student_{name}"].detach()[:290].clone().requires_grad_() for name in ("weight", "bias")}
    hidden = problem["student_hidden"].detach().clone().requires_grad_()
    expected = fused_distillation_loss(
        hidden, short["weight"], problem["labels"], student_bias=short["bias"], **options
    )
    with torch.no_grad():
        problem["student_bias"][290:] = -INF
    result = fused_distillation_loss(**problem, **options)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(result.loss, trained(problem))
    wanted = torch.autograd.grad(expected.loss, [hidden, *short.values()])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine[: len(theirs)], theirs, rtol=1e-4, atol=1e-6)
        assert not mine[len(theirs) :].any()
    assert result.num_agree == expected.num_agree


WRONG = {
    "hidden and head of different width": ({"student_weight": torch.zeros(301, 15)}, r"\(37, 16\), \(301, 15\)"),
    "labels of another length": ({"labels": torch.zeros(36, dtype=torch.long)}, r"\(36,\)"),
    "a label outside the vocabulary": ({"labels": torch.full((37,), 301)}, r"in \[0, 301\), got 301"),
    "a negative weight": ({"kd_weight": -1.0}, "non-negative"),
    "a weight that is no number": ({"ce_weight": float("nan")}, "non-negative"),
    "beta": ({"beta": 1.5}, r"beta must be in \[0, 1\]"),
    "a temperature of 0": ({"temperature": 0.0}, "temperature"),
    "no teacher": ({"teacher_hidden": None, "teacher_weight": None}, "there is no teacher"),
    "half a teacher": ({"teacher_weight": None}, "belong together"),
    "two teachers": ({"targets": certain(37)}, "not both"),
    "a teacher of other tokens": ({"teacher_hidden": torch.zeros(36, 24)}, r"same 37 tokens, got \(36, 24\)"),
    "a teacher of another vocabulary": ({"teacher_weight": torch.zeros(300, 24)}, "301 rows and the teacher's 300"),
    "a teacher's head of another width": ({"teacher_weight": torch.zeros(301, 23)}, r"\[V, 24\], got \(301, 23\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_with_the_shapes(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        fused_distillation_loss(**(make() | change))


def test_chunks_are_few_and_nearly_equal():
    assert chunk_sizes(1000, 512) == [500, 500]
    assert chunk_sizes(1001, 512) == [501, 500]
    assert chunk_sizes(5, 512) == [5]
    assert chunk_sizes(0, 512) == []
    assert default_chunk(32768, torch.float32, torch.device("cpu")) == 256
    assert default_chunk(151936, torch.float32, torch.device("cpu")) == 220
    assert default_chunk(10**7, torch.float32, torch.device("cpu")) == 64


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [15, 16, 17, 24, 31, 32, 33])
@pytest.mark.parametrize("size", [1, 16, 17, 24, 300])
def test_products_are_those_of_float32(size, inner):
    torch.manual_seed(0)
    hidden, weight, gradient = torch.randn(size, inner), torch.randn(500, inner), torch.randn(size, 500)
    total = torch.randn(500, inner)
    out = gemm_module.project(hidden, weight, torch.empty(size, 500))
    back = gemm_module.hidden_gradient(gradient, weight, 0.5)
    added = total.clone()
    gemm_module.add_weight_gradient(added, gradient, hidden, 0.5)
    for ours, exact in (
        (out, hidden.double() @ weight.double().t()),
        (back, 0.5 * gradient.double() @ weight.double()),
        (added, total.double() + 0.5 * gradient.double().t() @ hidden.double()),
    ):
        assert (ours - exact).norm() <= 1e-6 * exact.norm()


# ---- top-k -----------------------------------------------------------------------------------------------------------


def topk_of(teacher_logits, k):
    logprobs, indices = torch.log_softmax(teacher_logits.double(), -1).topk(k)
    return TopKLogprobs(indices, logprobs.float())


def coarse_reference(student, targets, beta, temperature, divergence, tail):
    """The definition in float64: coarse-grain, soften, compare."""
    p = torch.softmax(student.double(), -1)
    values = []
    for row in range(len(p)):
        known = targets.indices[row] >= 0
        ids = targets.indices[row][known]
        s, t = p[row, ids], targets.logprobs[row][known].double().exp()
        if tail == "bucket" and len(ids) < p.shape[1]:
            rest = torch.ones(p.shape[1], dtype=torch.bool)
            rest[ids] = False
            s, t = torch.cat([s, p[row, rest].sum()[None]]), torch.cat([t, (1 - t.sum()).clamp(min=1e-8)[None]])
        values.append(reference(s.log()[None], t.log()[None], beta, temperature, divergence))
    return torch.cat(values)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_matches_float64_and_the_fused_loss_computes_the_same(tail, divergence, beta, temperature):
    torch.manual_seed(0)
    problem = make(n=12, vocab=40)
    student_logits = (problem["student_hidden"] @ problem["student_weight"].t()).detach()
    targets = topk_of(problem["teacher_hidden"] @ problem["teacher_weight"].t(), 5)
    targets.indices[0, 4], targets.logprobs[0, 4] = -1, -INF  # a missing entry
    student = student_logits.clone().requires_grad_()
    value = topk_divergence(student, targets, beta, temperature, divergence, tail)
    expected = coarse_reference(student_logits, targets, beta, temperature, divergence, tail)
    torch.testing.assert_close(value.detach().double(), expected, rtol=2e-5, atol=1e-7)

    keep = problem["labels"] != -100
    loss = (0.7 * value[keep].sum() + 0.3 * torch.nn.functional.cross_entropy(
        student[keep], problem["labels"][keep], reduction="sum")) / keep.sum()  # fmt: skip
    (logit_gradient,) = torch.autograd.grad(loss, student)
    problem |= {"teacher_hidden": None, "teacher_weight": None}
    result = fused_distillation_loss(
        **problem, targets=targets, tail=tail, kd_weight=0.7, ce_weight=0.3, beta=beta, temperature=temperature,
        divergence=divergence, chunk_tokens=5,
    )  # fmt: skip
    hidden_gradient, weight_gradient = torch.autograd.grad(result.loss, trained(problem))
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        hidden_gradient, logit_gradient @ problem["student_weight"].detach(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        weight_gradient, logit_gradient.t() @ problem["student_hidden"].detach(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_topk_of_the_whole_vocabulary_is_the_full_divergence(tail, beta, divergence):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 30, requires_grad=True), 2 * torch.randn(6, 30)
    value = topk_divergence(student, topk_of(teacher, 30), beta, 1.5, divergence, tail)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    expected = reference(student.detach(), teacher, beta, 1.5, divergence)
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-4, atol=1e-7)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mass", [1.0, 1 - 1e-7, 0.5, 1e-6])
def test_topk_is_finite_and_not_negative_whatever_the_mass(tail, beta, mass):
    torch.manual_seed(0)
    student = (20 * torch.randn(8, 50)).requires_grad_()
    indices = torch.stack([torch.randperm(50)[:4] for _ in range(8)])
    logprobs = (torch.softmax(torch.randn(8, 4), -1) * mass).log()
    value = topk_divergence(student, TopKLogprobs(indices, logprobs), beta, tail=tail)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert (value >= 0).all()
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_the_bucket_gradient_is_nearer_to_the_full_one_than_renormalising():
    """Zipf-like logits, K = 20, forward KL: the angle to the full gradient."""
    torch.manual_seed(0)
    zipf = -1.1 * torch.log(torch.arange(1, 5001).float())
    teacher = torch.stack([zipf[torch.randperm(5000)] for _ in range(16)]) + 0.3 * torch.randn(16, 5000)
    student = (teacher + torch.randn(16, 5000)).requires_grad_()

    def gradient(value):
        return torch.autograd.grad(value.sum(), student)[0].flatten()

    full = gradient(topk_divergence(student, topk_of(teacher, 5000)))
    angle = {
        tail: torch.rad2deg(torch.acos(torch.cosine_similarity(
            gradient(topk_divergence(student, topk_of(teacher, 20), tail=tail)), full, dim=0)))
        for tail in ("bucket", "renormalize")
    }  # fmt: skip
    assert angle["bucket"] < angle["renormalize"] - 5


def test_a_top_k_teacher_without_a_tail_is_not_fooled():
    """All of the student's mass outside K: dropping the tail would show a loss of 0 at a large divergence."""
    student = torch.full((1, 100), 10.0)
    student[0, :4] = 0.0
    targets = TopKLogprobs(torch.arange(4)[None], torch.full((1, 4), 0.2499).log())
    assert topk_divergence(student, targets, tail="renormalize").item() == pytest.approx(0, abs=1e-6)
    assert topk_divergence(student, targets, tail="bucket").item() > 10


def test_wrong_topk_targets_are_refused():
    student = torch.zeros(3, 10)
    with pytest.raises(ValueError, match="2 rows of top-k targets for 3"):
        topk_divergence(student, certain(2))
    with pytest.raises(ValueError, match=r"\[0, 10\)"):
        topk_divergence(student, TopKLogprobs(torch.full((3, 1), 10), torch.zeros(3, 1)))
    with pytest.raises(ValueError, match=r"int64.*int64"):
        TopKLogprobs(torch.zeros(3, 1).long(), torch.zeros(3, 1).long())
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        TopKLogprobs(torch.zeros(3, 4).long(), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="tail"):
        topk_divergence(student, certain(3), tail="none")


NO_DISTRIBUTION = {
    "a token id twice": ([4, 7, 4], [-1.0, -2.0, -1.5], "a token id twice"),
    "NaN": ([4, 7, 1], [-1.0, INF - INF, -1.5], "NaN"),
    "probabilities above 1": ([4, 7, 1], [-0.5, -0.6, -3.0], "more than 1"),
    "a positive logprob": ([4, 7, 1], [0.1, -3.0, -4.0], "more than 1"),
    "infinity": ([4, 7, 1], [INF, -3.0, -4.0], "NaN or infinity"),
    "a filler": ([4, 7, 1], [-1.0, -1.2, -1e9], "not by a large negative number"),
    "a filler for a missing entry": ([4, 7, -1], [-1.0, -1.2, -1e9], "whose logprob is not −inf"),
    "a probability for a missing entry": ([4, -1, -1], [-1.0, -2.0, -INF], "whose logprob is not −inf"),
}


@pytest.mark.parametrize("name", NO_DISTRIBUTION)
def test_topk_targets_that_are_no_distribution_are_refused_with_their_position(name):
    ids, logprobs, message = NO_DISTRIBUTION[name]
    good_ids, good_logprobs = [1, 2, -1], [-1.0, -1.0, -INF]
    with pytest.raises(ValueError, match=f"position 1 of the top-k targets has.*{message}"):
        TopKLogprobs(torch.tensor([good_ids, ids]), torch.tensor([good_logprobs, logprobs]))


def test_topk_probabilities_a_rounding_above_1_are_divided_by_their_sum():
    logprobs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.1]]).log()
    targets = TopKLogprobs(torch.tensor([[0, 1, 2], [3, 4, 5]]), logprobs + torch.tensor([[8e-4], [0.0]]))
    torch.testing.assert_close(targets.logprobs, logprobs, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"more than 1\.001"):
        TopKLogprobs(targets.indices, logprobs + 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_topk_logprobs_in_half_precision_are_not_refused_for_its_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, 50, generator=generator) * torch.linspace(0, 6, 5000)[:, None]
    logprobs, indices = torch.log_softmax(logits, -1).topk(20)
    targets = TopKLogprobs(indices, logprobs.to(dtype))
    assert targets.logprobs.double().exp().sum(-1).max() <= 1 + 1e-6
    torch.testing.assert_close(
        targets.logprobs.float(), logprobs, rtol=2e-2 if dtype != torch.float32 else 1e-6, atol=1e-2
    )
    fifty_fifty = torch.tensor([[0.5, 0.5]]).log().to(dtype)
    TopKLogprobs(torch.tensor([[3, 4]]), fifty_fifty)


# ---- what makes it fast on a CPU must not be seen in the numbers -----------------------------------------------------


def as_bf16(problem):
    """The problem with its numbers rounded to bfloat16, as leaves."""
    return {
        key: value.detach().to(torch.bfloat16).requires_grad_(value.requires_grad)
        if value is not None and value.is_floating_point()
        else value
        for key, value in problem.items()
    }


@pytest.mark.parametrize("held", [1, 5, 100])
@pytest.mark.parametrize("chunk", [None, 3])
def test_bf16_gradients_are_those_of_float64_however_many_products_they_take(held, chunk, monkeypatch):
    """Tokens whose gradient is held for one product of the head: one, a few, all."""
    problem = as_bf16(make(n=90, vocab=301, bias=True))
    monkeypatch.setattr("kdtrain.losses.gradients._CPU_BYTES", held * 301 * 2)
    expected, gradients = reference_loss(problem, 0.7, 0.3, 0.5, 1.5, "jsd", 0.5, 3.0, None)
    result = fused_distillation_loss(
        **problem, kd_weight=0.7, ce_weight=0.3, beta=0.5, temperature=1.5, student_logit_scale=0.5,
        teacher_logit_scale=0.5, student_softcap=3.0, teacher_softcap=3.0, chunk_tokens=chunk,
    )  # fmt: skip
    found = torch.autograd.grad(result.loss, trained(problem))
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(found, gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        # Two or three roundings to bfloat16, of 1.65e-3 by norm each.
        assert (ours.double() - theirs).norm() <= 3.5e-3 * theirs.norm()


def test_one_loss_does_not_change_the_gradients_of_another():
    """Buffers are kept between calls: nothing that is handed out may live in them."""
    for cast in (lambda problem: problem, as_bf16):
        first, second = cast(make(seed=1)), cast(make(n=60, seed=2))
        alone = torch.autograd.grad(fused_distillation_loss(**first).loss, trained(first))
        kept = fused_distillation_loss(**first)
        fused_distillation_loss(**second).loss.backward()
        for ours, theirs in zip(torch.autograd.grad(kept.loss, trained(first)), alone, strict=True):
            assert torch.equal(ours, theirs)


def test_a_loss_in_inference_mode_leaves_no_buffers_that_training_cannot_use():
    problem = make(vocab=997)
    workspace_module.workspace._kept.clear()
    with torch.inference_mode():
        fused_distillation_loss(**problem)
    fused_distillation_loss(**problem).loss.backward()


@pytest.mark.parametrize("items", [256, 300, 383])
@pytest.mark.parametrize("options", [{"kd_weight": 0.0, "ce_weight": 1.0}, {"kd_weight": 0.7, "ce_weight": 0.3}])
def test_bf16_gradients_err_in_no_common_direction(items, options):
    """What is the same at every token, 1/D at its label, must not be rounded the same way at every token.

    Rows of the head with a common part make it visible: in the sum over tokens errors of 0.4 % became 3 % (and are in
    PyTorch's own bfloat16).
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 64, generator=generator) / 8 + torch.randn(1, 64, generator=generator) / 8
    problem = as_bf16({
        "student_hidden": torch.randn(256, 64, generator=generator).requires_grad_(),
        "student_weight": weight.requires_grad_(),
        "student_bias": None,
        "labels": torch.randint(0, 4096, (256,), generator=generator),
        "teacher_hidden": torch.randn(256, 64, generator=generator),
        "teacher_weight": torch.randn(4096, 64, generator=generator),
    })  # fmt: skip
    expected = reference_loss(problem, *options.values(), 0.5, 1.0, "jsd", 1.0, None, None)[1][0].sum(0) * 256 / items
    fused_distillation_loss(**problem, **options, num_items=items).loss.backward()
    found = problem["student_hidden"].grad.double().sum(0)
    assert (found - expected).norm() <= 8e-3 * expected.norm()


@pytest.mark.parametrize("scale", [-1.0, 0.0, -0.3])
def test_a_logit_scale_below_zero_changes_no_weight(scale):
    problem = make(bias=True)
    expected, gradients = reference_loss(problem, 0.7, 0.3, 0.5, 1.0, "jsd", scale, None, None)
    result = fused_distillation_loss(
        **problem, kd_weight=0.7, ce_weight=0.3, student_logit_scale=scale, teacher_logit_scale=scale
    )
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(result.loss, trained(problem)), gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-12


# ---- probabilities that are 0 in float32 -----------------------------------------------------------------------------


def impossible(gap):
    """Two tokens: the student is certain of the second one by `gap` nats, the teacher of the first by 20."""
    return {
        "student_hidden": torch.tensor([[0.0, gap]], requires_grad=True),
        "student_weight": torch.eye(2).requires_grad_(),
        "labels": torch.tensor([0]),
        "teacher_hidden": torch.tensor([[20.0, 0.0]]),
        "teacher_weight": torch.eye(2),
        "student_bias": None,
        "teacher_bias": None,
    }


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("gap", [80.0, 85.0, 88.0, 95.0, 150.0])
def test_what_the_student_finds_impossible_costs_what_the_definition_says(gap, beta, divergence):
    """Below e^-87 a probability is 0, but its logarithm is known. Terms of a hundred nats cancel: 2e-5 is left."""
    problem = impossible(gap)
    expected, gradients = reference_loss(problem, 1.0, 0.0, beta, 1.0, divergence, 1.0, None, None)
    result = fused_distillation_loss(**problem, beta=beta, divergence=divergence)
    assert result.loss.item() == pytest.approx(expected.item(), rel=3e-5)
    for ours, theirs in zip(torch.autograd.grad(result.loss, trained(problem)), gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-5  # the divergence is at its largest: no slope


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_peaked_logits_are_no_other_value(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (30 * temperature * torch.randn(16, 500, generator=generator) for _ in range(2))
    expected = reference(student.double(), teacher.double(), 0.5, temperature, "jsd").sum()
    found = fused_distillation_loss(
        student, torch.eye(500), torch.arange(16), teacher, torch.eye(500), beta=0.5, temperature=temperature
    )
    assert found.kd_sum.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gap", [50.0, 88.0, 95.0, 150.0])
def test_a_tail_that_the_student_finds_impossible_keeps_its_gradient(gap, beta):
    """Eight known tokens hold 0.7 of the teacher; the student puts the other 42 at e^-gap."""
    logits = torch.cat([torch.linspace(0, 1, 8), torch.linspace(-1, 0, 42) - gap]).requires_grad_()
    targets = TopKLogprobs(torch.arange(8)[None], torch.full((1, 8), 0.7 / 8).log())
    double = logits.detach().double().requires_grad_()
    known = torch.log_softmax(double, -1)[:8]
    tail = torch.logsumexp(double[8:], 0) - torch.logsumexp(double, 0)
    student = torch.cat([known, tail[None]])[None]
    teacher = torch.tensor([0.7 / 8] * 8 + [0.3], dtype=torch.float64).log()[None]
    expected = reference(student, teacher, beta, 1.0, "jsd").sum()
    expected.backward()
    result = fused_distillation_loss(logits[None], torch.eye(50), torch.tensor([0]), targets=targets, beta=beta)
    result.loss.backward()
    assert result.kd_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (logits.grad - double.grad).norm() <= 1e-5 * double.grad.norm()


def test_an_unknown_tail_is_refused_by_the_fused_loss_too():
    targets = topk_of(torch.randn(4, 30), 5)
    hidden, weight, labels = torch.randn(4, 8), torch.randn(30, 8), torch.arange(4)
    with pytest.raises(ValueError, match="tail must be bucket or renormalize, got 'renormalise'"):
        topk_divergence(hidden @ weight.T, targets, tail="renormalise")
    with pytest.raises(ValueError, match="tail must be bucket or renormalize, got 'renormalise'"):
        fused_distillation_loss(hidden, weight, labels, targets=targets, tail="renormalise")
