"""The divergences that take no β: each against its definition in float64, in both ways of the loss, and its limits."""

import dataclasses
import itertools

import pytest
import torch

from kdtrain.losses import (
    DivergenceParams,
    SampledTargets,
    TopKLogprobs,
    dense_distillation_loss,
    fused_distillation_loss,
    generalized_jsd,
    topk_divergence,
)
from tests.test_losses import reference
from tests.test_losses_fused import make, trained

CASES = [
    ("skew_kl", {"skew_alpha": 0.1}),
    ("skew_kl", {"skew_alpha": 0.9}),
    ("skew_reverse_kl", {"skew_alpha": 0.1}),
    ("skew_reverse_kl", {"skew_alpha": 0.9}),
    ("alpha_beta", {}),
    ("alpha_beta", {"ab_alpha": 0.7, "ab_beta": 0.2}),
    ("alpha_beta", {"ab_alpha": 1.5, "ab_beta": -0.5}),
    ("alpha_beta", {"ab_alpha": 0.5, "ab_beta": 0.0}),
    ("alpha_beta", {"ab_alpha": 0.0, "ab_beta": 0.5}),
    ("alpha_beta", {"ab_alpha": 0.0, "ab_beta": 0.0}),
    ("alpha_beta", {"ab_alpha": 1.0, "ab_beta": -1.0}),
    ("entropy_aware", {"entropy_threshold": 4.0}),
    ("tvd", {}),
]
NAMES = [f"{name} {' '.join(map(str, params.values()))}".strip() for name, params in CASES]
# Teacher finite, in every divergence: at exponents of 0 or below, tokens that one model finds impossible cost without
# end, and no float32 holds that.
BOUNDED = [case for case in CASES if min(case[1].get("ab_alpha", 0.1), case[1].get("ab_beta", 0.1)) > 0]
INF = float("inf")


def by_definition(student, teacher, divergence, params, temperature=1.0):
    """As the papers write them, in float64 with probabilities."""
    log_s = torch.log_softmax(student.double() / temperature, -1)
    log_t = torch.log_softmax(teacher.double() / temperature, -1)
    s, t = log_s.exp(), log_t.exp()
    p = DivergenceParams(**params)
    if divergence == "tvd":
        return (s - t).abs().sum(-1) / 2
    if divergence == "skew_kl":
        return (t * (log_t - (p.skew_alpha * t + (1 - p.skew_alpha) * s).log())).sum(-1)
    if divergence == "skew_reverse_kl":
        return (s * (log_s - (p.skew_alpha * s + (1 - p.skew_alpha) * t).log())).sum(-1)
    if divergence == "entropy_aware":
        log_t1 = torch.log_softmax(teacher.double(), -1)
        uncertain = -(log_t1.exp() * log_t1).sum(-1) > p.entropy_threshold
        return (s * (log_s - log_t)).sum(-1) + uncertain * (t * (log_t - log_s)).sum(-1)
    a, b = p.ab_alpha, p.ab_beta
    if a == b == 0:
        return ((log_s - log_t) ** 2).sum(-1) / 2
    if a == 0:
        return (t**b - s**b + b * s**b * (log_s - log_t)).sum(-1) / b**2
    if b == 0:
        return (s**a - t**a + a * t**a * (log_t - log_s)).sum(-1) / a**2
    if a + b == 0:
        return ((t / s) ** a - 1 - a * (log_t - log_s)).sum(-1) / a**2
    return -(t**a * s**b - a / (a + b) * t ** (a + b) - b / (a + b) * s ** (a + b)).sum(-1) / (a * b)


@pytest.mark.parametrize(("divergence", "params"), CASES, ids=NAMES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_match_float64(divergence, params, temperature):
    for gap in (3.0, 0.3, 0.01):
        torch.manual_seed(0)
        teacher = 2 * torch.randn(7, 1000)
        student = (teacher + gap * torch.randn(7, 1000)).requires_grad_()
        value = generalized_jsd(student, teacher, 0.5, temperature, divergence, DivergenceParams(**params))
        (gradient,) = torch.autograd.grad(value.sum(), student)
        student64 = student.detach().double().requires_grad_()
        expected = by_definition(student64, teacher, divergence, params, temperature)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), student64)
        assert value.dtype == torch.float32
        # Of nearly equal models the rounding of the normalisers, which all tokens of a row share, is seen.
        tolerance = 1e-4 if gap == 0.01 else 1e-5
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
        assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()


GRID = list(itertools.product([False, True], [1.0, 2.0], [(1.0, None), (0.5, 3.0)], [None, 7], [False, True]))


@pytest.mark.parametrize(("divergence", "params"), CASES, ids=NAMES)
def test_the_loss_without_logits_matches_float64_and_the_one_with_them(divergence, params):
    """32 problems: value and all gradients within 1e-5, with weights of the tokens and cross-entropy beside."""
    params_of_loss = DivergenceParams(**params)
    for seed, (bias, temperature, (scale, cap), chunk, weighted) in enumerate(GRID):
        problem = make(bias=bias, seed=seed)
        weights = torch.rand(37, generator=torch.Generator().manual_seed(seed)) * 2 if weighted else None
        double = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in problem.items() if v is not None
                  and v.is_floating_point()}  # fmt: skip

        def logits(side, of=double, scale=scale, cap=cap):
            z = scale * (of[f"{side}_hidden"] @ of[f"{side}_weight"].t() + (of.get(f"{side}_bias", 0.0)))
            return z if cap is None else cap * torch.tanh(z / cap)

        keep = problem["labels"] != -100
        kd = by_definition(logits("student")[keep], logits("teacher")[keep], divergence, params, temperature)
        kd = kd if weights is None else kd * weights.double()[keep]
        ce = torch.nn.functional.cross_entropy(logits("student")[keep], problem["labels"][keep], reduction="sum")
        expected = (0.7 * kd.sum() + 0.3 * ce) / keep.sum()
        gradients = torch.autograd.grad(expected, trained(double | {"student_bias": double.get("student_bias")}))
        options = {
            "kd_weight": 0.7, "ce_weight": 0.3, "kd_token_weights": weights, "temperature": temperature,
            "divergence": divergence, "params": params_of_loss, "num_items": int(keep.sum()),
        }  # fmt: skip
        ours = fused_distillation_loss(
            **problem, **options, student_logit_scale=scale, teacher_logit_scale=scale, student_softcap=cap,
            teacher_softcap=cap, chunk_tokens=chunk,
        )  # fmt: skip
        where = (bias, temperature, scale, cap, chunk, weighted)
        assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-5), where
        for gradient, other in zip(torch.autograd.grad(ours.loss, trained(problem)), gradients, strict=True):
            assert (gradient - other).norm() <= 1e-5 * other.norm(), where
        single = {key: value.detach().float() for key, value in double.items()}
        dense = dense_distillation_loss(
            logits("student", single), problem["labels"], logits("teacher", single), **options
        )
        assert ours.kd_sum.item() == pytest.approx(dense.kd_sum.item(), rel=1e-5), where


@pytest.mark.parametrize(
    ("divergence", "params"),
    [case for case in CASES if case[0] != "tvd"],  # whose derivative jumps
)
def test_gradients_are_those_of_small_differences_in_float64(divergence, params):
    problem = make(n=5, vocab=11, dtype=torch.float64, bias=True)
    options = {"ce_weight": 0.3, "divergence": divergence, "params": DivergenceParams(**params), "temperature": 1.5}
    gradients = torch.autograd.grad(fused_distillation_loss(**problem, **options).loss, trained(problem))
    with torch.no_grad():
        for tensor, gradient in zip(trained(problem), gradients, strict=True):
            direction = torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            ends = []
            for sign in (1, -1):
                tensor.add_(direction, alpha=sign * 1e-6)
                ends.append(fused_distillation_loss(**problem, **options).loss)
                tensor.sub_(direction, alpha=sign * 1e-6)
            slope = (ends[0] - ends[1]) / 2e-6
            assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


LIMITS = [
    ("skew_kl", {"skew_alpha": 0.0}, "jsd", 0),
    ("skew_kl", {"skew_alpha": 1e-13}, "jsd", 0),
    ("skew_reverse_kl", {"skew_alpha": 0.0}, "jsd", 1),
    ("skew_reverse_kl", {"skew_alpha": 1e-13}, "jsd", 1),
    ("alpha_beta", {"ab_alpha": 1.0, "ab_beta": 0.0}, "jsd", 0),
    ("alpha_beta", {"ab_alpha": 1.0, "ab_beta": 1e-9}, "jsd", 0),
    ("alpha_beta", {"ab_alpha": 0.0, "ab_beta": 1.0}, "jsd", 1),
    ("alpha_beta", {"ab_alpha": 1e-9, "ab_beta": 1.0}, "jsd", 1),
    ("entropy_aware", {"entropy_threshold": 100.0}, "jsd", 1),
]


@pytest.mark.parametrize(("divergence", "params", "known", "beta"), LIMITS)
def test_limits_are_the_divergences_that_are_known(divergence, params, known, beta):
    """To 1e-6, value and gradient, and in the loss without logits as well."""
    problem = make(dtype=torch.float64)
    results = []
    for kind, b, p in ((divergence, 0.5, DivergenceParams(**params)), (known, beta, DivergenceParams())):
        result = fused_distillation_loss(**problem, beta=b, divergence=kind, params=p)
        results.append((result.loss.detach(), *torch.autograd.grad(result.loss, trained(problem))))
        student, teacher = (problem[f"{s}_hidden"].detach() @ problem[f"{s}_weight"].detach().t() for s in ("student", "teacher"))  # fmt: skip  # noqa: E501
        results[-1] += (generalized_jsd(student, teacher, b, 1.0, kind, p),)
    for ours, other in zip(*results, strict=True):
        assert (ours - other).norm() <= 1e-6 * other.norm()


def test_near_exponents_of_0_the_alpha_beta_divergence_has_no_jump():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 100), torch.randn(5, 100)

    def value(a, b):
        return generalized_jsd(student, teacher, 0.5, 1.0, "alpha_beta", DivergenceParams(ab_alpha=a, ab_beta=b))

    for a, b in ((0, 0), (0, 0.5), (0.5, 0), (1, -1), (0.3, 0.3)):
        for near in ((a + 1e-7, b), (a, b + 1e-7), (a + 1e-7, b + 1e-7)):
            torch.testing.assert_close(value(*near), value(a, b), rtol=1e-5, atol=0)


def test_forward_kl_is_added_at_the_rows_alone_whose_teacher_is_uncertain():
    teacher = torch.stack([torch.zeros(50), 20 * torch.eye(50)[0]])  # log 50 = 3.9 nats, and almost 0
    student = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 3.0):
        value = generalized_jsd(student, teacher, 0.5, temperature, "entropy_aware")
        reverse, forward = (reference(student, teacher, beta, temperature) for beta in (1, 0))
        torch.testing.assert_close(value.double(), reverse + forward * torch.tensor([1, 0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("divergence", "params"), CASES, ids=NAMES)
def test_a_model_with_itself_is_0_and_none_is_negative(divergence, params):
    torch.manual_seed(0)
    params = DivergenceParams(**params)
    teacher = torch.randn(64, 500).bfloat16()
    near = (teacher.float() * (1 + 0.01 * torch.randn(64, 500))).bfloat16()
    assert generalized_jsd(near, teacher, divergence=divergence, params=params).min() >= 0
    assert generalized_jsd(teacher, teacher, divergence=divergence, params=params).abs().max() == 0
    problem = make()
    for side in ("hidden", "weight"):
        problem[f"teacher_{side}"] = problem[f"student_{side}"].detach().clone()
    result = fused_distillation_loss(**problem, divergence=divergence, params=params)
    assert 0 <= result.loss <= 1e-6
    assert all(gradient.norm() <= 1e-5 for gradient in torch.autograd.grad(result.loss, trained(problem)))


@pytest.mark.parametrize(("divergence", "params"), CASES, ids=NAMES)
@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
def test_columns_that_a_model_masks_are_no_nan(divergence, params, masked):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 40), torch.randn(6, 40)
    for side, logits in (("student", student), ("teacher", teacher)):
        if masked in (side, "both"):
            logits[:, 30:] = -INF
    student.requires_grad_()
    value = generalized_jsd(student, teacher, 0.5, 1.0, divergence, DivergenceParams(**params))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    if masked == "both":  # as if the columns were not there
        left = by_definition(student[:, :30], teacher[:, :30], divergence, params)
        torch.testing.assert_close(value.double(), left, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("divergence", "params"), BOUNDED)
@pytest.mark.parametrize("gap", [80.0, 95.0, 150.0])
def test_what_a_model_finds_impossible_costs_what_the_definition_says(divergence, params, gap):
    """Gaps at which a probability or a ratio is no float32 any more."""
    for sign in (1, -1):
        student = torch.zeros(3, 20)
        student[:, 0] = sign * gap
        teacher = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
        problem = {
            "student_hidden": torch.eye(3, requires_grad=True), "student_weight": student.t().contiguous(),
            "labels": torch.zeros(3).long(), "teacher_hidden": torch.eye(3), "teacher_weight": teacher.t().contiguous(),
        }  # fmt: skip
        result = fused_distillation_loss(**problem, divergence=divergence, params=DivergenceParams(**params))
        student64 = student.double().requires_grad_()
        expected = by_definition(student64, teacher, divergence, params).sum() / 3
        (gradient,) = torch.autograd.grad(expected, student64)
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (ours,) = torch.autograd.grad(result.loss, problem["student_hidden"])
        theirs = gradient @ student.double().t()
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 3e-7 * gap


def some_targets(teacher, k):
    logprobs, ids = torch.log_softmax(teacher, -1).topk(k, -1)
    return TopKLogprobs(ids, logprobs)


@pytest.mark.parametrize(("divergence", "params"), CASES, ids=NAMES)
def test_top_k_targets_are_coarse_grained_first(divergence, params):
    problem = make(vocab=60)
    student, teacher = (
        problem[f"{s}_hidden"].detach() @ problem[f"{s}_weight"].detach().t() for s in ("student", "teacher")
    )
    chosen = DivergenceParams(**params)
    everything = topk_divergence(student, some_targets(teacher, 60), divergence=divergence, params=chosen)
    torch.testing.assert_close(
        everything, generalized_jsd(student, teacher, divergence=divergence, params=chosen), rtol=1e-4, atol=1e-6
    )
    targets = some_targets(teacher, 8)
    log_p = torch.log_softmax(student.double(), -1).gather(1, targets.indices)
    sides = [
        torch.cat([known, torch.log1p(-known.exp().sum(-1, keepdim=True))], 1)
        for known in (log_p, targets.logprobs.double())
    ]
    value = topk_divergence(student, targets, divergence=divergence, params=chosen)
    expected = by_definition(*sides, divergence, params)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    assert value.min() >= 0
    given = {key: tensor for key, tensor in problem.items() if not key.startswith("teacher")}
    fused = fused_distillation_loss(**given, targets=targets, divergence=divergence, params=chosen)
    keep = problem["labels"] != -100
    assert fused.kd_sum.item() == pytest.approx(expected[keep].sum().item(), rel=1e-4)
    dense = dense_distillation_loss(
        problem["student_hidden"] @ problem["student_weight"].t(), problem["labels"], targets=targets,
        divergence=divergence, params=chosen,
    )  # fmt: skip
    for ours, other in zip(*(torch.autograd.grad(r.loss, trained(problem)) for r in (fused, dense)), strict=True):
        assert (ours - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("name", ["tvd", "alpha_beta"])
def test_without_a_tail_they_are_refused(name):
    problem = make(vocab=60)
    targets = some_targets(torch.randn(37, 60), 5)
    given = {key: tensor for key, tensor in problem.items() if not key.startswith("teacher")}
    with pytest.raises(ValueError, match=f"tail is renormalize, which {name} cannot have: use bucket"):
        fused_distillation_loss(**given, targets=targets, divergence=name, tail="renormalize")
    with pytest.raises(ValueError, match="cannot have"):
        topk_divergence(torch.randn(37, 60), targets, divergence=name, tail="renormalize")


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_drawn_targets_are_refused(name):
    problem = make(vocab=60)
    draws = SampledTargets(torch.zeros(37, 1).long(), torch.ones(37, 1))
    given = {key: tensor for key, tensor in problem.items() if not key.startswith("teacher")}
    with pytest.raises(ValueError, match=f"the divergence is {name}, and the targets are tokens drawn"):
        fused_distillation_loss(**given, targets=draws, beta=0.0, divergence=name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"skew_alpha": 1.0}, "skew_alpha must be in"),
        ({"skew_alpha": float("nan")}, "skew_alpha must be in"),
        ({"ab_alpha": -1.0, "ab_beta": 0.5}, "must not be negative"),
        ({"ab_beta": INF}, "must be finite"),
        ({"entropy_threshold": -0.1}, "entropy_threshold must be"),
    ],
)
def test_numbers_outside_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DivergenceParams(**wrong)


def test_the_defaults_are_those_of_the_papers():
    assert dataclasses.astuple(DivergenceParams()) == (0.1, 0.2, 0.7, 0.8)
