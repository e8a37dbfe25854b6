"""The mean of several teachers' distributions against its definition in float64, written without kdtrain's code."""

import itertools

import pytest
import torch

from kdtrain.errors import TargetsError
from kdtrain.losses.dense import dense_distillation_loss
from kdtrain.losses.fused import head_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.losses.kinds import DivergenceParams
from kdtrain.losses.mixture import MixedHeads, MixedTopK, mix_logits
from kdtrain.losses.tile import TileOptions
from kdtrain.losses.topk import TopKLogprobs
from tests.test_losses import reference

SHARES = (0.5, 0.2, 0.3)
PARAMS = DivergenceParams(entropy_threshold=3.0)


def make(n=29, vocab=131, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[::4] = -100
    hidden, weight = randn(n, 16).requires_grad_(), randn(vocab, 16, scale=0.5).requires_grad_()
    teachers = [(randn(n, width), randn(vocab, width, scale=0.4)) for width in (24, 16, 8)]
    heads = tuple(Head(w, None, 1.0, cap) for (_, w), cap in zip(teachers, (None, 4.0, None), strict=True))
    return hidden, weight, labels, MixedHeads(tuple(h for h, _ in teachers), heads, SHARES)


def options(divergence="jsd", beta=0.5, temperature=1.0, ce=0.3):
    return TileOptions(0.7, ce, beta, temperature, divergence, "bucket", PARAMS)


def softened(logits, temperature):
    return torch.softmax(logits / temperature, -1)


def divergence_of(student, mean, at_one, name, beta, temperature):
    """The definition, of a mean that is softened already."""
    if name != "entropy_aware":
        return reference(student, temperature * mean.log(), beta, temperature, name)
    entropy = -(at_one * at_one.log()).sum(-1)
    forward, reverse = (reference(student, temperature * mean.log(), b, temperature, "jsd") for b in (0.0, 1.0))
    return reverse + (entropy > PARAMS.entropy_threshold) * forward


def expected_loss(hidden, weight, labels, of_teachers, of):
    """Value and gradients in float64; `of_teachers`: T -> the probabilities of each teacher at T, [S, X].

    The student's outcomes are the teacher's: all tokens, or those of `outcomes`.
    """
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    keep = labels != -100
    student = (hidden @ weight.t())[keep]
    at_one, mean = (
        sum(share * p for share, p in zip(SHARES, of_teachers(t), strict=False)) for t in (1.0, of.temperature)
    )
    ce = -torch.log_softmax(student, -1).gather(1, labels[keep][:, None]).sum()
    return student, mean, at_one, ce, (hidden, weight), keep.sum()


GRID = list(
    itertools.product(
        [("jsd", 0.0), ("jsd", 0.5), ("jsd", 1.0), ("mixed_kl", 0.3), ("entropy_aware", 0.5)],
        [1.0, 2.0, 0.7],
        [None, 7],
    )
)


@pytest.mark.parametrize(("kind", "temperature", "chunk"), GRID)
def test_the_mean_of_dense_teachers_is_their_mean_in_probability_space(kind, temperature, chunk):
    hidden, weight, labels, mixed = make()
    of = options(*kind, temperature)

    def of_teachers(t):
        keep = labels != -100
        logits = [
            (h.double() @ head.weight.double().t())[keep] for h, head in zip(mixed.hidden, mixed.heads, strict=True)
        ]
        capped = [x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
                  for x, head in zip(logits, mixed.heads, strict=True)]  # fmt: skip
        return [softened(x, t) for x in capped]

    student, mean, at_one, ce, leaves, count = expected_loss(hidden, weight, labels, of_teachers, of)
    kd = divergence_of(student, mean, at_one, *kind, temperature).sum()
    expected = (0.7 * kd + 0.3 * ce) / count
    wanted = torch.autograd.grad(expected, leaves)
    result = head_distillation_loss(hidden, Head(weight, None, 1.0, None), labels, of, mixed=mixed, chunk_tokens=chunk)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    entropy = -(at_one * at_one.log()).sum().item()
    assert result.teacher_entropy_sum.item() == pytest.approx(entropy, rel=1e-5)
    assert result.num_agree == (mean.argmax(-1) == student.argmax(-1)).sum() or temperature != 1
    for ours, theirs in zip(torch.autograd.grad(result.loss, (hidden, weight)), wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    # And from whole logits.
    teachers = [head.differentiable_logits(h) for h, head in zip(mixed.hidden, mixed.heads, strict=True)]
    at_one, soft = mix_logits(teachers, SHARES, temperature)
    whole = dense_distillation_loss(
        hidden @ weight.t(), labels, at_one, softened_teacher_logits=soft, kd_weight=0.7, ce_weight=0.3, beta=of.beta,
        temperature=temperature, divergence=of.divergence, params=PARAMS,
    )  # fmt: skip
    assert whole.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def topk(logits, k, missing=0):
    """The k most likely tokens; of the second row the last `missing` are not named."""
    logprobs, ids = torch.log_softmax(logits, -1).topk(k, -1)
    if missing:
        ids[1, -missing:], logprobs[1, -missing:] = -1, -torch.inf
    return TopKLogprobs(ids, logprobs)


def spread(part, union, vocab):
    """One row of the rule, token by token: probabilities of the union's ids and of the bucket."""
    named = {int(i): float(p) for i, p in zip(part.indices, part.logprobs.double().exp(), strict=True) if i >= 0}
    tail = 1 - sum(named.values())
    each = min(tail / max(vocab - len(named), 1), min(named.values()))
    found = [named.get(i, each) for i in union]
    return [*found, tail - sum(p for i, p in zip(union, found, strict=True) if i not in named)]


@pytest.mark.parametrize(("kind", "temperature", "chunk"), GRID)
def test_top_k_teachers_are_mixed_over_the_union_of_what_they_name(kind, temperature, chunk):
    hidden, weight, labels, _ = make()
    generator = torch.Generator().manual_seed(1)
    vocab, of = len(weight), options(*kind, temperature)
    shares = (0.6, 0.4)
    parts = tuple(topk(3 * torch.randn(len(labels), vocab, generator=generator), k, 2) for k in (5, 9))
    mixed = MixedTopK(parts, shares)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    student_NV = wide[0] @ wide[1].t()
    kd, entropy = torch.zeros((), dtype=torch.float64), 0.0
    rows = [n for n in range(len(labels)) if labels[n] != -100]
    for n in rows:
        union = sorted({int(i) for part in parts for i in part.indices[n] if i >= 0})
        each = torch.tensor([spread(part[n : n + 1][0], union, vocab) for part in parts], dtype=torch.float64)
        assert (each > 0).all()
        assert each.sum(1).tolist() == pytest.approx([1, 1])
        means = []
        for t in (1.0, temperature):
            powers = each ** (1 / t)
            means.append((torch.tensor(shares)[:, None].double() * powers / powers.sum(1, keepdim=True)).sum(0))
        log_p = torch.log_softmax(student_NV[n], -1)
        others = [i for i in range(vocab) if i not in union]
        coarse = torch.cat([log_p[union], torch.logsumexp(log_p[others], -1)[None]])
        kd = kd + divergence_of(coarse[None], means[1][None], means[0][None], *kind, temperature).sum()
        entropy -= float((means[0] * means[0].log()).sum())
    ce = -torch.log_softmax(student_NV[rows], -1).gather(1, labels[rows][:, None]).sum()
    expected = (0.7 * kd + 0.3 * ce) / len(rows)
    wanted = torch.autograd.grad(expected, wide)
    fused = head_distillation_loss(hidden, Head(weight, None, 1.0, None), labels, of, targets=mixed, chunk_tokens=chunk)
    whole = dense_distillation_loss(
        hidden @ weight.t(), labels, targets=mixed, kd_weight=0.7, ce_weight=0.3, beta=of.beta,
        temperature=temperature, divergence=of.divergence, params=PARAMS,
    )  # fmt: skip
    for result in (fused, whole):
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert result.teacher_entropy_sum.item() == pytest.approx(entropy, rel=1e-5)
        for ours, theirs in zip(torch.autograd.grad(result.loss, (hidden, weight)), wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_is_the_mean_of_the_full_distributions(temperature):
    hidden, weight, labels, mixed = make(vocab=31)
    teachers = [head.differentiable_logits(h) for h, head in zip(mixed.hidden, mixed.heads, strict=True)]
    of = options(temperature=temperature)
    sparse = MixedTopK(tuple(topk(one, 31) for one in teachers), SHARES)
    results = [
        head_distillation_loss(hidden, Head(weight, None, 1.0, None), labels, of, **given)
        for given in ({"mixed": mixed}, {"targets": sparse})
    ]
    assert results[0].loss.item() == pytest.approx(results[1].loss.item(), rel=1e-5)
    gradients = [torch.autograd.grad(result.loss, (hidden, weight)) for result in results]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_one_teacher_with_the_whole_share_is_that_teacher():
    hidden, weight, labels, mixed = make()
    of, head = options(temperature=2.0), Head(weight, None, 1.0, None)
    alone = head_distillation_loss(hidden, head, labels, of, mixed.hidden[0], mixed.heads[0])
    mean = head_distillation_loss(hidden, head, labels, of, mixed=MixedHeads(mixed.hidden[:1], mixed.heads[:1], (1.0,)))
    assert mean.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)


def test_a_teacher_of_other_tokens_is_refused():
    hidden, weight, labels, mixed = make()
    wrong = MixedHeads((mixed.hidden[0], mixed.hidden[1][1:]), mixed.heads[:2], (0.5, 0.5))
    with pytest.raises(TargetsError, match="the same 29 tokens"):
        head_distillation_loss(hidden, Head(weight, None, 1.0, None), labels, options(), mixed=wrong)
