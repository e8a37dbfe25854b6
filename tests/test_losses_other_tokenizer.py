"""The loss against a teacher with another tokenizer, beside a float64 reference that is written out chunk by chunk."""

import pytest
import torch

from kdtrain.losses.chunk_likelihood import TAU, alm_terms
from kdtrain.losses.head import Head
from kdtrain.losses.other_tokenizer import ChunkTargets, dense_chunk_loss, head_chunk_loss
from kdtrain.losses.tile import TileOptions

V, H = 61, 12
NEAR_ONE, NEAR_ZERO, FLAT = 9.0, -9.0, 0.0


def options(kd=0.7, ce=0.3):
    return TileOptions(kd_weight=kd, ce_weight=ce, beta=0.5, temperature=2.0, divergence="jsd", tail="bucket")


def bernoulli_kl(teacher, student, tau=TAU):
    """As the paper writes it, of log-likelihoods in float64 that are not near 0."""
    p, q = (teacher / tau).exp(), (student / tau).exp()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


class Case:
    """Hidden states, labels that are likely or unlikely by `push`, and chunks of one to four tokens, some of none."""

    def __init__(self, tokens, push, seed=0, softcap=None):
        draw = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(V, H, generator=draw) * 0.6
        self.bias = torch.randn(V, generator=draw) * 0.3
        self.labels = torch.randint(0, V, (tokens,), generator=draw)
        self.hidden = torch.randn(tokens, H, generator=draw)
        direction = self.weight[self.labels] / self.weight[self.labels].square().sum(1, keepdim=True)
        self.hidden += push * direction * torch.rand(tokens, 1, generator=draw)
        sizes = torch.randint(1, 5, (tokens,), generator=draw)
        self.slots = torch.repeat_interleave(torch.arange(tokens), sizes)[:tokens]
        self.slots[torch.rand(tokens, generator=draw) < 0.2] = tokens + 3  # in no chunk
        self.teacher = -torch.rand(tokens + 3, generator=draw) * 6
        self.ce_mask = torch.rand(tokens, generator=draw) < 0.7
        self.kd_weights = torch.rand(tokens, generator=draw)
        self.scale, self.softcap = 1.3, softcap

    def head(self):
        return Head(self.weight, self.bias, self.scale, self.softcap)

    def leaves(self):
        return [self.hidden, self.weight, self.bias]

    def targets(self):
        return ChunkTargets(self.slots, self.teacher)

    def reference(self, kd, ce, num_items, num_kd_items, weighted):
        """Value and gradients in float64, by autograd through whole logits and a loop over chunks."""
        hidden, weight, bias = (leaf.detach().double().requires_grad_() for leaf in self.leaves())
        logits = self.scale * (hidden @ weight.T + bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logprobs = logits.log_softmax(-1).gather(1, self.labels[:, None])[:, 0]
        kl, chunks = logprobs.sum() * 0, 0
        for slot in range(len(self.teacher)):
            inside = self.slots == slot
            if inside.any():
                w = self.kd_weights[inside].double().mean() if weighted else 1.0
                kl, chunks = kl + w * bernoulli_kl(self.teacher[slot].double(), logprobs[inside].sum()), chunks + 1
        cross = -(logprobs * self.ce_mask).sum()
        loss = kd * kl / (num_kd_items or max(chunks, 1)) + ce * cross / (num_items or max(len(self.labels), 1))
        return loss.item(), kl.item(), torch.autograd.grad(loss, [hidden, weight, bias])


def apart(found, expected, least=1e-30):
    """The relative distance of gradients, of those smaller than `least` that to it."""
    size = sum(float(one.square().sum()) for one in expected) ** 0.5
    return sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5 / max(size, least)


@pytest.mark.parametrize("push", [FLAT, NEAR_ONE, NEAR_ZERO])
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("kd", "ce", "num_items", "num_kd_items", "weighted"), [
    (0.7, 0.3, None, None, False), (1.0, 0.0, 50, 31, True), (0.0, 1.0, 9, None, False), (100.0, 0.3, 50, 31, False),
])  # fmt: skip
def test_value_and_gradient_are_those_of_float64(tokens, push, softcap, kd, ce, num_items, num_kd_items, weighted):
    case = Case(tokens, push, softcap=softcap)
    value, kl, gradients = case.reference(kd, ce, num_items, num_kd_items, weighted)
    leaves = [leaf.requires_grad_() for leaf in case.leaves()]
    common = {
        "ce_mask": case.ce_mask,
        "kd_token_weights": case.kd_weights if weighted else None,
        "num_items": num_items,
        "num_kd_items": num_kd_items,
    }
    logits = case.head().differentiable_logits(case.hidden)
    for found in (
        head_chunk_loss(case.hidden, case.head(), case.labels, options(kd, ce), case.targets(), **common),
        head_chunk_loss(
            case.hidden, case.head(), case.labels, options(kd, ce), case.targets(), **common, chunk_tokens=3
        ),
        dense_chunk_loss(logits, case.labels, options(kd, ce), case.targets(), **common),
    ):
        assert found.loss.item() == pytest.approx(value, rel=1e-5, abs=1e-9)
        assert found.kd_sum.item() == pytest.approx(kl, rel=1e-5, abs=1e-9)
        assert found.num_tokens == tokens
        assert apart(torch.autograd.grad(found.loss, leaves), gradients) < 1e-5


def test_the_terms_keep_their_digits_where_likelihoods_are_next_to_one_or_to_zero():
    from mpmath import mp, mpf

    mp.dps = 60
    logs = [-1e-7, -1e-6, -1e-4, -0.01, -1.0, -30.0, -1e3, -1e4]
    teacher, student = (
        torch.tensor(one, dtype=torch.float64) for one in zip(*[(a, b) for a in logs for b in logs], strict=True)
    )
    found = alm_terms(student, teacher)
    for a, b, value, slope in zip(teacher.tolist(), student.tolist(), *found, strict=True):
        p, q = mp.exp(mpf(a) / 100), mp.exp(mpf(b) / 100)
        exact = p * mp.log(p / q) + (1 - p) * mp.log((1 - p) / (1 - q))
        assert value.item() == pytest.approx(float(exact), rel=1e-6, abs=1e-15)
        assert slope.item() == pytest.approx(float((q - p) / (1 - q) / 100), rel=1e-9, abs=1e-30)


def test_likelihoods_at_the_ends_are_finite():
    ends = torch.tensor([0.0, -torch.inf, -1.0])
    value, slope = alm_terms(ends[[0, 2, 2]], ends[[1, 0, 1]])
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert alm_terms(ends, ends).value.tolist()[::2] == [0, 0]


def test_one_token_a_chunk_is_the_bernoulli_kl_of_each_token_and_its_own_gradient():
    """The same tokenizer on both sides: of token i, ∂/∂z = (q − p) / (1 − q) / τ · (onehot − softmax)."""
    case = Case(9, FLAT)
    hidden = case.hidden.double().requires_grad_()
    head = Head(case.weight.double(), None, 1.0, None)
    targets = ChunkTargets(torch.arange(9), case.teacher[:9].double())
    loss = head_chunk_loss(hidden, head, case.labels, options(1.0, 0.0), targets).loss
    logp = torch.log_softmax(hidden.detach() @ head.weight.T, -1)
    own = logp.gather(1, case.labels[:, None])
    p, q = (targets.logprobs[:, None] / TAU).exp(), (own / TAU).exp()
    onehot = torch.nn.functional.one_hot(case.labels, V)
    expected = ((q - p) / (1 - q) / TAU * (onehot - logp.exp())) @ head.weight / 9
    assert loss.item() == pytest.approx(bernoulli_kl(targets.logprobs, own[:, 0]).mean().item(), rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected, rtol=1e-9, atol=1e-14)
    same = head_chunk_loss(hidden, head, case.labels, options(1.0, 0.0), ChunkTargets(targets.slots, own[:, 0]))
    assert abs(same.loss.item()) < 1e-12


def test_no_chunk_and_no_token_are_exactly_zero_with_a_gradient_path():
    case = Case(5, FLAT)
    hidden = case.hidden.requires_grad_()
    nowhere = ChunkTargets(torch.full((5,), 8), case.teacher)
    found = head_chunk_loss(hidden, case.head(), case.labels, options(1.0, 0.0), nowhere)
    assert found.loss.item() == 0
    assert torch.autograd.grad(found.loss, hidden)[0].abs().max() == 0
    empty = head_chunk_loss(
        hidden[:0], case.head(), case.labels[:0], options(), ChunkTargets(nowhere.slots[:0], case.teacher)
    )
    assert empty.loss.item() == 0
    assert torch.autograd.grad(empty.loss, hidden)[0].abs().max() == 0


def test_half_precision_is_within_its_rounding_of_float32():
    case = Case(40, FLAT)
    leaves = [leaf.to(torch.bfloat16).requires_grad_() for leaf in (case.hidden, case.weight)]
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    found, expected = (
        head_chunk_loss(h, Head(w, None, 1.0, None), case.labels, options(100.0), case.targets(), num_items=50)
        for h, w in (leaves, wide)
    )
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    gradients = torch.autograd.grad(found.loss, leaves), torch.autograd.grad(expected.loss, wide)
    assert apart([one.float() for one in gradients[0]], gradients[1]) < 1e-2


def test_a_head_that_masks_columns_gives_the_same():
    case = Case(9, FLAT)
    case.bias[[1, 5]] = -torch.inf
    case.labels[(case.labels == 1) | (case.labels == 5)] = 0
    hidden = case.hidden.requires_grad_()
    found = head_chunk_loss(hidden, case.head(), case.labels, options(), case.targets())
    kept = [i for i in range(V) if i not in (1, 5)]
    small = Head(case.weight[kept], case.bias[kept], case.scale, None)
    labels = torch.tensor([kept.index(label) for label in case.labels.tolist()])
    expected = head_chunk_loss(hidden, small, labels, options(), case.targets())
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert apart([torch.autograd.grad(found.loss, hidden)[0]], [torch.autograd.grad(expected.loss, hidden)[0]]) < 1e-5
