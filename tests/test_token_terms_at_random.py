"""The token terms of random batches against a loop over their tokens, in float64.

Each option has a grid of its own. Here they meet: several teachers, divergences by row, weights, chosen tokens, rows
without cross-entropy, tokens that a teacher says nothing of, both ways to make the loss.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, field

import pytest
import torch

from kdtrain.config.options import DistillationOptions, OnPolicyLoss, TokenSelection
from kdtrain.data.batch import Batch, Rows
from kdtrain.losses.head import Head
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.models.vocabulary import Vocabulary
from kdtrain.teachers.base import DenseTargets, RoutedPart, RoutedTargets, Targets
from kdtrain.trainer.objective import Objective, StudentForward, own_kd_items

V, H, K = 13, 5, 4
WITH_BETA, OTHERS = ("jsd", "jsd_scaled", "mixed_kl"), ("skew_kl", "skew_reverse_kl", "tvd", "entropy_aware")


@dataclass
class Case:
    """A batch, what is said of it, and how it is compared."""

    options: DistillationOptions
    batch: Batch
    targets: Targets | RoutedTargets
    hidden_SH: torch.Tensor
    weight_VH: torch.Tensor
    whole_logits: bool
    num_items: torch.Tensor | None
    num_kd_items: torch.Tensor | None
    row_S: list[int]
    of_token: dict[int, tuple[str | None, torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    """Teacher, its log-probabilities [V] in float64, and which of them it has named; None is all."""


def draw(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, length = rng.randint(1, 6), rng.randint(3, 9)
    labels = torch.randint(0, V, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    labels[rng.randrange(rows), : length * (rng.random() < 0.3)] = -100

    def way():
        return rng.choice([*WITH_BETA, *OTHERS]), rng.choice([0.0, 0.2, 0.7, 1.0])

    divergence, beta = way()
    of_rows = {
        "losses": [rng.choice([(None, None), way(), (way()[0], None), (None, way()[1])]) for _ in range(rows)],
        "ce": torch.rand(rows, generator=generator) < 0.7,
        "kd_weights": torch.tensor([rng.choice([0.0, 1.0, 1.0, 2.5]) for _ in range(rows)]),
    }
    batch = Batch(
        model_inputs={"input_ids": labels.clamp(min=0), "attention_mask": torch.ones_like(labels)},
        labels=labels,
        rows=Rows(**{name: value for name, value in of_rows.items() if rng.random() < 0.6}),
        generated_by=rng.choice([None, None, "student"]),
    )
    options = DistillationOptions(
        llm_kd_weight=rng.choice([1.0, 0.7]), sft_alpha=rng.choice([0.0, 0.3]), divergence=divergence, beta=beta,
        kd_temperature=rng.choice([1.0, 1.0, 2.0]), lmbda=0.5,
        on_policy=OnPolicyLoss(**dict(zip(("divergence", "beta"), rng.choice([way(), (None, None)]), strict=True))),
        token_selection=rng.choice([None, TokenSelection(by="student_entropy", keep=0.5)]),
    )  # fmt: skip
    predicts = labels[:, 1:] != -100
    tokens, row_S = int(predicts.sum()), torch.arange(rows)[:, None].expand_as(predicts)[predicts].tolist()
    window = rng.random() < 0.7  # D and D_kd are those of a window
    counts_alike = batch.kd_weights_BT is None and options.token_selection is None
    case = Case(
        options, batch, Targets(torch.empty(0)), torch.randn(tokens, H, generator=generator),
        0.6 * torch.randn(V, H, generator=generator), rng.random() < 0.3, torch.tensor(37) if window else None,
        (None if counts_alike else torch.tensor(23)) if window else own_kd_items(options, batch), row_S,
    )  # fmt: skip
    named, top_k = rng.random() < 0.6, rng.random() < 0.4
    owner = [rng.choice("abc") if named else None for _ in range(rows)]
    answers = {
        name: _answers(case, name, [k for k, row in enumerate(row_S) if owner[row] == name], top_k, rng, generator)
        for name in dict.fromkeys(owner)
    }
    case.targets = answers[None] if not named else RoutedTargets(
        tuple(
            RoutedPart(name, tuple(row for row in range(rows) if owner[row] == name), targets)
            for name, targets in answers.items()
        )
    )  # fmt: skip
    return case


def _answers(case, name, tokens, top_k, rng, generator):
    """What one teacher says of its tokens, of some of them where it is known by its top k; noted in the case."""
    covered = None
    if top_k and rng.random() < 0.5:
        covered = torch.rand(len(tokens), generator=generator) < 0.6
        tokens = [token for token, known in zip(tokens, covered.tolist(), strict=True) if known]
    hidden = torch.randn(len(tokens), H, generator=generator)
    weight = 0.7 * torch.randn(V, H, generator=generator)
    logprobs = (hidden.double() @ weight.double().t()).log_softmax(-1)
    values, ids = logprobs.topk(K)
    for i, token in enumerate(tokens):
        case.of_token[token] = name, logprobs[i], ids[i] if top_k else None
    scores = TopKLogprobs(ids, values.float()) if top_k else DenseTargets(hidden, Head(weight, None, 1.0, None))
    return Targets(scores, covered)


def compute(case):
    """Loss, Σ w·divergence, tokens by teacher, and gradients of hidden states and weight."""
    hidden, weight = case.hidden_SH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    vocabulary, head = Vocabulary(V, V, V), Head(weight, None, 1.0, None)
    objective = Objective(vocabulary, True, None, 0.0, None, None, dict.fromkeys("abc", vocabulary))
    weights = case.batch.kd_weights_S
    forward = StudentForward(
        objective, case.options, case.batch, None, case.targets, weights, case.num_items, case.num_kd_items, None
    )
    if case.whole_logits:
        logits = head.differentiable_logits(hidden)
        chosen = forward.at_chosen_tokens(logits, None)
        sums = chosen.sums(logits, chosen.loss_from_logits)
    else:
        chosen = forward.at_chosen_tokens(hidden, head)
        sums = chosen.sums(hidden, functools.partial(chosen.loss_from_hidden, head))
    gradients = torch.autograd.grad(sums.loss, (hidden, weight), allow_unused=True)
    return sums, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, (hidden, weight), strict=True)]


def kl(p, q):
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def divergence_of(name, beta, t, s, entropy, params):
    """The definitions."""
    a = params.skew_alpha
    if name in WITH_BETA:
        if name == "mixed_kl":
            return (1 - beta) * kl(t, s) + beta * kl(s, t)
        if beta in (0, 1):
            return kl(s, t) if beta else kl(t, s)
        m = beta * t + (1 - beta) * s
        return (beta * kl(t, m) + (1 - beta) * kl(s, m)) / (beta * (1 - beta) if name == "jsd_scaled" else 1)
    if name == "tvd":
        return 0.5 * (t - s).abs().sum()
    if name == "entropy_aware":
        return kl(s, t) + (kl(t, s) if entropy > params.entropy_threshold else 0.0)
    return kl(t, a * t + (1 - a) * s) if name == "skew_kl" else kl(s, a * s + (1 - a) * t)


def expected(case):
    """The same, token by token."""
    options, batch, rows = case.options, case.batch, case.batch.rows
    hidden, weight = case.hidden_SH.double().requires_grad_(), case.weight_VH.double().requires_grad_()
    logits, labels = hidden @ weight.t(), batch.labels[:, 1:][batch.labels[:, 1:] != -100]
    weighs = [1.0 if rows.kd_weights is None else float(rows.kd_weights[row]) for row in case.row_S]
    if options.token_selection is not None:
        weighs = _chosen(case, logits.detach(), weighs)
    loss, kd_sum, count = 0.0 * logits.sum(), 0.0, dict.fromkeys("abc", 0)
    items = max(len(labels), 1) if case.num_items is None else int(case.num_items)
    kd_items = items if case.num_kd_items is None else max(int(case.num_kd_items), 1)
    for token, row in enumerate(case.row_S):
        if batch.generated_by != "student" and (rows.ce is None or rows.ce[row]):
            loss = loss - options.ce_weight * logits[token].log_softmax(-1)[labels[token]] / items
        if token not in case.of_token or not weighs[token]:
            continue
        name, divergence = case.of_token[token][0], _divergence(case, token, row, logits[token])
        loss = loss + options.llm_kd_weight * weighs[token] * divergence / kd_items
        kd_sum += float(weighs[token] * divergence)
        if name is not None:
            count[name] += 1
    return loss, kd_sum, count, torch.autograd.grad(loss, (hidden, weight))


def _chosen(case, logits, weighs):
    """Of each row the half of the tokens at which the student is least sure, among those of weight above 0."""
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    found = [0.0] * len(weighs)
    for row in set(case.row_S):
        may = [k for k, own in enumerate(case.row_S) if own == row and weighs[k] > 0]
        known = sorted((k for k in may if k in case.of_token), key=lambda k: -entropy[k])
        for k in known[: math.ceil(len(may) / 2)]:
            found[k] = weighs[k]
    return found


def _divergence(case, token, row, logits):
    options = case.options
    name, beta = options.divergence, options.beta
    of_row = case.batch.rows.losses[row] if case.batch.rows.losses else (None, None)
    own = options.on_policy if case.batch.generated_by == "student" else OnPolicyLoss()
    for other, number in (of_row, (own.divergence, own.beta)):
        name, beta = other or name, beta if number is None else number
    _, logprobs, ids = case.of_token[token]
    t, s = logprobs.exp(), logits.softmax(-1)
    if ids is not None:  # and all the others as one
        rest = torch.ones(V, dtype=torch.bool)
        rest[ids] = False
        t, s = (torch.cat([p[ids], p[rest].sum()[None]]) for p in (t, s))
    entropy = -torch.special.xlogy(t, t).sum()
    t, s = (p ** (1 / options.kd_temperature) for p in (t, s))
    return divergence_of(name, beta, t / t.sum(), s / s.sum(), entropy, options.divergence_params)


def check(seeds):
    for seed in seeds:
        case = draw(seed)
        sums, gradients = compute(case)
        loss, kd_sum, count, exact = expected(case)
        assert float(sums.loss) == pytest.approx(float(loss), rel=2e-5, abs=2e-6), seed
        assert float(sums.kd_sum or 0.0) == pytest.approx(kd_sum, rel=2e-5, abs=1e-5), seed
        assert int(sums.num_teacher_tokens) == len(case.of_token), seed
        for name, (_, tokens) in sums.of_teachers.items():
            assert int(tokens) == count[name], seed
        for found, wanted in zip(gradients, exact, strict=True):
            assert (found.double() - wanted).norm() <= 3e-5 * wanted.norm() + 1e-7, seed


def test_loss_and_gradients_are_those_of_a_loop_over_tokens():
    check(range(60))


@pytest.mark.slow
def test_of_many_more_batches():
    check(range(60, 4000))
