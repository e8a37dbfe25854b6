"""Top-k targets: the loss from logits and the fused one against float64, whatever the mass, K and the student."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdtrain.losses import TopKLogprobs, dense_distillation_loss, fused_distillation_loss, topk_divergence
from tests.test_losses import DIVERGENCES, reference
from tests.test_losses_fused import coarse_reference, make, topk_of
from tests.tiny import slow

INF = float("inf")
N, V = 24, 40


def problem(k, mass=None, missing=0, seed=0):
    """Student logits, labels, and a teacher's `k` tokens; `missing` of them are named nowhere."""
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(N, V, generator=generator)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::3] = -100
    # One token left to the bucket: of a flat teacher, since 1 − Σ of float32 has few digits where it is small.
    scale = 0.3 if k == V - 1 else 2
    targets = topk_of(scale * torch.randn(N, V, generator=generator), k)
    if mass is not None:
        logprobs = torch.log_softmax(targets.logprobs.double(), -1) + torch.tensor(mass).double().log()
        targets = TopKLogprobs(targets.indices, logprobs.float())
    if missing:
        targets.indices[1::2, k - missing :], targets.logprobs[1::2, k - missing :] = -1, -INF
        targets.indices[2, :missing], targets.logprobs[2, :missing] = -1, -INF
    return student.requires_grad_(), labels, targets


def by_definition(student, labels, targets, kd, ce, beta, temperature, divergence, tail, mask, items):
    """Value and gradient in float64, and the sums that the loss reports."""
    keep = labels != -100
    z = student.detach().double().requires_grad_()
    log_p = torch.log_softmax(z[keep], -1)
    rows = torch.ones(int(keep.sum()), dtype=torch.double) if mask is None else mask[keep].double()
    ce_sum = -(log_p.gather(1, labels[keep, None]).squeeze(1) * rows).sum()
    kd_sum = coarse_reference(z[keep], targets[keep], beta, temperature, divergence, tail).sum()
    loss = (kd * kd_sum + ce * ce_sum) / max(items or int(keep.sum()), 1)
    return loss.detach(), torch.autograd.grad(loss, z)[0], kd_sum.detach(), ce_sum.detach()


def entropy_of_known(targets, tail):
    """Σ entropy of what is known of the teacher, float64."""
    q = targets.logprobs.double().exp()
    if tail == "renormalize":
        q = q / q.sum(-1, keepdim=True)
    elif targets.indices.shape[1] < V:
        q = torch.cat([q, (1 - q.sum(-1, keepdim=True)).clamp(min=1e-8)], 1)
    return -torch.xlogy(q, q).sum()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize(("k", "missing"), [(1, 0), (6, 0), (6, 2), (V - 1, 0), (V, 0)])
def test_value_gradient_and_sums_from_logits_are_those_of_the_definition(tail, divergence, beta, k, missing):
    student, labels, targets = problem(k, missing=missing)
    mask = torch.arange(N) % 4 != 1
    each_with_each = [(1.0, None, None), (1.0, mask, 100), (2.0, mask, None), (2.0, None, 100)]
    for temperature, ce_mask, items in each_with_each:
        result = dense_distillation_loss(
            student, labels, targets=targets, tail=tail, kd_weight=0.7, ce_weight=0.3, beta=beta,
            ce_token_weights=ce_mask, temperature=temperature, divergence=divergence, num_items=items,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(result.loss, student)
        expected, wanted, kd_sum, ce_sum = by_definition(
            student, labels, targets, 0.7, 0.3, beta, temperature, divergence, tail, ce_mask, items
        )
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert (gradient.double() - wanted).norm() <= 1e-5 * wanted.norm()
        assert result.kd_sum.item() == pytest.approx(kd_sum.item(), rel=1e-5, abs=1e-6)
        assert result.ce_sum.item() == pytest.approx(ce_sum.item(), rel=1e-5)
    keep = labels != -100
    top = targets.indices[keep].gather(1, targets.logprobs[keep].argmax(-1, keepdim=True)).squeeze(1)
    assert result.num_agree == (student[keep].argmax(-1) == top).sum()
    assert result.teacher_entropy_sum.item() == pytest.approx(entropy_of_known(targets[keep], tail).item(), rel=1e-4)


def test_a_position_at_which_the_teacher_names_nothing_is_all_tail():
    student, labels, targets = problem(4)
    targets.indices[1], targets.logprobs[1] = -1, -INF
    weight = torch.eye(V)
    found = fused_distillation_loss(student, weight, labels, targets=targets, beta=0.3)
    (gradient,) = torch.autograd.grad(found.loss, student)
    expected = by_definition(student, labels, targets, 1.0, 0.0, 0.3, 1.0, "jsd", "bucket", None, None)
    assert torch.allclose(found.loss.double(), expected[0], rtol=1e-5)
    assert torch.allclose(gradient.double(), expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("kd_weight", [0.0, 0.7])
@pytest.mark.parametrize(("k", "missing"), [(1, 0), (6, 2), (V, 0)])
def test_the_loss_from_logits_has_the_sums_of_the_fused_one(tail, kd_weight, k, missing):
    hidden = make(n=N, vocab=V)
    _, labels, targets = problem(k, missing=missing)
    weights = {"kd_weight": kd_weight, "ce_weight": 0.3, "beta": 0.4, "tail": tail, "targets": targets}
    logits = hidden["student_hidden"] @ hidden["student_weight"].t()
    dense = dense_distillation_loss(logits, labels, **weights)
    fused = fused_distillation_loss(hidden["student_hidden"], hidden["student_weight"], labels, **weights)
    for name, value in vars(dense).items():
        other = getattr(fused, name)
        assert (value is None) == (other is None), name
        if value is not None:
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("loss", ["logits", "fused"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_supervised_token_is_a_zero_with_a_gradient_path(loss, rows):
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(V, 8)
    labels = torch.full((rows,), -100)
    targets = topk_of(torch.randn(rows, V), 4)
    if loss == "logits":
        result = dense_distillation_loss(hidden @ weight.t(), labels, targets=targets, ce_weight=1.0)
    else:
        result = fused_distillation_loss(hidden, weight, labels, targets=targets, ce_weight=1.0)
    result.loss.backward()
    assert result.loss == 0
    assert not hidden.grad.any()
    assert [result.kd_sum, result.num_agree, result.teacher_entropy_sum] == [0, 0, 0]


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_tokens_known_is_the_full_divergence_by_either_way(tail, beta, divergence):
    hidden = make(n=N, vocab=V)
    _, labels, _ = problem(1)
    teacher = hidden["teacher_hidden"] @ hidden["teacher_weight"].t()
    options = {"beta": beta, "divergence": divergence}
    student = (hidden["student_hidden"] @ hidden["student_weight"].t()).detach().requires_grad_()
    full = dense_distillation_loss(student, labels, teacher, **options)
    (wanted,) = torch.autograd.grad(full.loss, student)
    known = dense_distillation_loss(student, labels, targets=topk_of(teacher, V), tail=tail, **options)
    (gradient,) = torch.autograd.grad(known.loss, student)
    fused = fused_distillation_loss(
        hidden["student_hidden"], hidden["student_weight"], labels, targets=topk_of(teacher, V), tail=tail, **options
    )
    assert known.loss.item() == pytest.approx(full.loss.item(), rel=1e-5)
    assert fused.loss.item() == pytest.approx(full.loss.item(), rel=1e-5)
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


STUDENTS = {
    "usual": lambda z: 2 * z,
    "certain of a known token": lambda z: z.index_fill(1, torch.tensor([0]), 1e4),
    "certain of an unknown token": lambda z: z.index_fill(1, torch.tensor([V - 1]), 1e4),
    "finds the known impossible": lambda z: z.index_fill(1, torch.arange(4), -1e4),
    "finds the unknown impossible": lambda z: z.index_fill(1, torch.arange(1, V), -1e4),
    "of both signs": lambda z: 1e4 * z.sign(),
}


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", [0, slow(1e-3), 0.5, 1])
@pytest.mark.parametrize("name", STUDENTS)
def test_it_is_finite_and_never_negative_whatever_mass_and_student(tail, divergence, beta, name):
    generator = torch.Generator().manual_seed(0)
    base = STUDENTS[name](torch.randn(6, V, generator=generator))
    labels = torch.zeros(6).long()
    for k, mass in itertools.product([1, 4, V], [0.2, 1 - 1e-7, 1 + 9e-4]):
        logprobs = torch.log_softmax(3 * torch.randn(6, k, generator=generator).double(), -1)
        targets = TopKLogprobs(torch.arange(k).expand(6, k), (logprobs + torch.tensor(mass).double().log()).float())
        student = base.clone().requires_grad_()
        value = topk_divergence(student, targets, beta, 1.0, divergence, tail)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        weight = base.t().contiguous().requires_grad_()  # logits by a head: the identity times the logits
        fused = fused_distillation_loss(
            torch.eye(6), weight, labels, targets=targets, beta=beta, divergence=divergence, tail=tail
        )
        (fused_gradient,) = torch.autograd.grad(fused.loss, weight)
        case = f"K {k}, mass {mass}: {value.tolist()}"
        assert value.isfinite().all(), case
        assert (value >= 0).all(), case
        assert gradient.isfinite().all(), case
        # Next to 1e4 the numbers of float32 are 1e-3 apart, and so are the log-probabilities of each of the six rows.
        rounding = 1e-4 if name == "usual" else 6e-3
        assert fused.kd_sum.item() == pytest.approx(value.sum().item(), rel=1e-4, abs=rounding), case
        assert fused_gradient.isfinite().all(), case


def test_float64_agrees_on_the_extremes():
    """Reverse KL of a student that is certain of a token outside a teacher's four of mass 0.9: log(1 / 0.1)."""
    student = STUDENTS["certain of an unknown token"](torch.zeros(1, V))
    targets = TopKLogprobs(torch.arange(4)[None], torch.full((1, 4), 0.9 / 4).log())
    assert topk_divergence(student, targets, 1.0).item() == pytest.approx(2.302585, rel=1e-5)
    known = torch.tensor([[0.0, 0.0, 0.0, 0.0, -1e3]], dtype=torch.double)
    teacher = torch.tensor([[0.225] * 4 + [0.1]], dtype=torch.double).log()
    student = STUDENTS["finds the unknown impossible"](torch.zeros(1, V))
    student[0, :4] = 0
    found = topk_divergence(student, targets, 0.5).item()
    assert found == pytest.approx(reference(known, teacher, 0.5, 1.0).item(), rel=1e-5)


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_fused_way_makes_no_tensor_of_all_tokens_and_all_words(tail):
    """Its largest is one chunk of tokens by the vocabulary (one column more, for entries that are missing)."""
    tokens, words, chunk = 64, 500, 8
    hidden = make(n=tokens, vocab=words)
    labels = torch.zeros(tokens).long()
    targets = topk_of(torch.randn(tokens, words), 20)
    with Largest() as fused:
        fused_distillation_loss(
            hidden["student_hidden"], hidden["student_weight"], labels, targets=targets, ce_weight=0.3, tail=tail,
            chunk_tokens=chunk,
        ).loss.backward()  # fmt: skip
    assert fused.elements <= max(chunk, 16) * (words + 1)  # 16 is the hidden width: the head's gradient
    logits = (hidden["student_hidden"] @ hidden["student_weight"].t()).detach()
    with Largest() as dense:
        dense_distillation_loss(logits, labels, targets=targets, tail=tail)
    assert dense.elements >= tokens * words


def test_a_teacher_is_given_once():
    student, labels, targets = problem(4)
    with pytest.raises(ValueError, match="not both"):
        dense_distillation_loss(student, labels, student.detach(), targets=targets)
    with pytest.raises(ValueError, match="23 rows of top-k targets for 24"):
        dense_distillation_loss(student, labels, targets=targets[:23])
