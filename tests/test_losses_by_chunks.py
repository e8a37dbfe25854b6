"""The dense loss chunk by chunk: the value and gradients of the whole, without its memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kdtrain.losses import TopKLogprobs, dense_distillation_loss
from kdtrain.losses.by_chunks import dense_loss_by_chunks
from kdtrain.losses.head import Head
from kdtrain.losses.kinds import Stretch
from kdtrain.losses.mixture import Mixed, mix_logits
from kdtrain.losses.sampled import SampledTargets
from kdtrain.losses.tile import TileOptions

N, V, H = 11, 23, 7
OPTIONS = {"kd_weight": 0.7, "ce_weight": 0.3, "beta": 0.3, "temperature": 1.5, "divergence": "jsd", "tail": "bucket"}
FIELDS = ("loss", "kd_sum", "ce_sum", "num_tokens", "num_correct", "num_agree", "student_entropy_sum")


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(0, V, (N,), generator=generator), torch.rand(N, generator=generator)


def topk(teacher):
    values, ids = teacher.log_softmax(-1).topk(5)
    return TopKLogprobs(ids, values.float())


CASES = {
    "JSD": {},
    "KL alone": {"beta": 0.0, "ce_weight": 0.0},
    "CE alone": {"kd_weight": 0.0},
    "entropy-aware": {"divergence": "entropy_aware"},
    "top-k": {"topk": True},
    "drawn": {"drawn": True, "beta": 0.0},
    "weights": {"weights": True},
    "weights, KD alone": {"weights": True, "ce_weight": 0.0},
    "D of the window": {"num_items": 40, "num_kd_items": torch.tensor(30), "weights": True},
    "the mean of two": {"mixed": True},
}


def losses(case, dtype, chunk, labels_left_out):
    """The whole loss in float64, and the one by chunks in `dtype`, with the gradients of their logits."""
    case = {**OPTIONS, **case}
    student, teacher, labels, weights = inputs()
    weights[::4] = 0
    if labels_left_out:
        labels[::3] = -100
    more = {name: case.pop(name) for name in ("num_items", "num_kd_items") if name in case}
    targets = topk(teacher) if case.pop("topk", False) else None
    if case.pop("drawn", False):
        targets = SampledTargets(topk(teacher).indices, topk(teacher).logprobs.softmax(-1))
    if case.pop("weights", False):
        more |= {"kd_token_weights": weights, "ce_token_weights": torch.arange(N) % 2 == 0}
    given = Mixed(teacher, teacher)
    if case.pop("mixed", False):
        given = mix_logits([teacher, teacher.flip(0)], [0.4, 0.6], case["temperature"])
    soft = None if given.softened is given.at_one else given.softened
    whole, own = student.clone().requires_grad_(), student.to(dtype).requires_grad_()
    teaching = {} if targets is not None else {"teacher_logits": given.at_one, "softened_teacher_logits": soft}
    expected = dense_distillation_loss(whole, labels, targets=targets, **teaching, **more, **case)
    stretches = None if labels_left_out else [Stretch(N, N, case["divergence"], case["beta"])]
    found = dense_loss_by_chunks(
        own, labels, TileOptions(**case),
        None if targets is not None else lambda rows: Mixed(*(one[rows].to(dtype) for one in given)),
        targets=targets, chunk_tokens=chunk, stretches=stretches, **more,
    )  # fmt: skip
    (3 * expected.loss).backward()
    (3 * found.loss).backward()
    return expected, found, whole.grad, own.grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_value_and_gradient_are_those_of_the_whole_in_float64(case, chunk):
    expected, found, gradient, own = losses(CASES[case], torch.float32, chunk, labels_left_out=True)
    for name in FIELDS:
        value, wanted = getattr(found, name), getattr(expected, name)
        assert (value is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(value.double(), wanted.double(), rtol=2e-6, atol=1e-6, msg=name)
    torch.testing.assert_close(own.double(), gradient, rtol=1e-5, atol=1e-7)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("case", CASES)
def test_where_all_are_supervised_nothing_has_to_be_looked_up(case):
    expected, found, gradient, own = losses(CASES[case], torch.float64, 4, labels_left_out=False)
    torch.testing.assert_close(found.loss, expected.loss.double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_token_of_weight_0_may_have_a_teacher_that_is_not_finite(beta):
    student = torch.randn(4, 6, requires_grad=True)
    teacher = torch.randn(4, 6)
    teacher[1] = torch.nan
    weights, labels = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1, 2, 3, 4])
    more = {"kd_token_weights": weights, "beta": beta, "kd_weight": 1.0, "ce_weight": 0.5, "num_items": 4}
    found = dense_distillation_loss(student, labels, teacher, all_supervised=True, **more)
    wanted = dense_distillation_loss(student, labels, teacher, **more)
    torch.testing.assert_close(found.loss, wanted.loss)
    (gradient,), (expected,) = (torch.autograd.grad(one.loss, student) for one in (found, wanted))
    torch.testing.assert_close(gradient, expected)
    assert gradient.isfinite().all()


def test_half_precision_is_rounded_twice_at_most():
    _, _, gradient, own = losses({}, torch.bfloat16, 4, labels_left_out=True)
    _, _, rounded, _ = losses({}, torch.float32, 50, labels_left_out=True)
    assert (own.double() - gradient).norm() / gradient.norm() < 2**-7
    assert (rounded - gradient).norm() == 0


def test_of_a_head_that_masks_columns_hidden_states_weight_and_bias_have_their_gradients():
    _, teacher, labels, _ = inputs()
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, H), (V, H), (V,)))
    bias[-2:], teacher[:, -2:] = -torch.inf, -torch.inf
    labels = labels.clamp(max=V - 3)
    given = Mixed(teacher.float(), teacher.float())
    exact = [one.double().requires_grad_() for one in (hidden, weight, bias)]
    own = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].t() + exact[2]
    dense_distillation_loss(logits, labels, teacher, **OPTIONS).loss.backward()
    found = dense_loss_by_chunks(
        own[0], labels, TileOptions(**OPTIONS), lambda rows: Mixed(*(one[rows] for one in given)),
        head=Head(own[1], own[2], 1.0, None), chunk_tokens=4,
    )  # fmt: skip
    found.loss.backward()
    for one, wanted in zip(own, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), wanted.grad, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="one backward pass"):
        found.loss.backward()


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made inside, and the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in tree_iter(found):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen[key] = size
                    self.now += size
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, key):
        self.now -= self.seen.pop(key, 0)


def peak_of(make, rows):
    """The most bytes beside the logits themselves, in sizes of these."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, 2000, generator=generator) for _ in range(2))
    student.requires_grad_()
    with Live() as live:
        live.seen |= {one.untyped_storage()._cdata: 0 for one in (student, teacher)}
        make(student, teacher, torch.zeros(rows, dtype=torch.long)).loss.backward()
    return live.peak / (rows * 2000 * 4)


def test_beside_the_gradient_a_chunk_is_all_that_it_takes():
    options = TileOptions(**OPTIONS)
    whole = peak_of(lambda s, t, labels: dense_distillation_loss(s, labels, t, **OPTIONS), 96)
    ours = peak_of(
        lambda s, t, labels: dense_loss_by_chunks(
            s, labels, options, lambda rows: Mixed(t[rows], t[rows]), chunk_tokens=2
        ),
        96,
    )
    assert whole > 20
    assert ours < 2.2
