"""Sorted probabilities of two vocabularies, beside a float64 reference and beside TRL's own."""

from types import SimpleNamespace

import pytest
import torch
from trl.experimental.gold.gold_trainer import ULDLoss

from kdtrain.losses.head import Head
from kdtrain.losses.uld import UldTargets, dense_uld_loss, head_uld_loss
from tests.test_losses_other_tokenizer import FLAT, NEAR_ONE, NEAR_ZERO, Case, H, V, apart, options


class Uld(Case):
    """A case beside a teacher of another width and vocabulary."""

    def __init__(self, tokens, push, columns, seed=0, softcap=None):
        super().__init__(tokens, push, seed, softcap)
        draw = torch.Generator().manual_seed(seed + 1)
        self.count = len(self.teacher)
        self.teacher_head = Head(torch.randn(columns, H + 3, generator=draw) * 0.5, None, 0.9, None)
        found = []
        for slot in sorted({int(slot) for slot in self.slots if slot < self.count}):
            found += [slot] * int(torch.randint(1, 4, (1,), generator=draw))
        self.teacher_slots = torch.tensor([*found, self.count], dtype=torch.long)
        self.teacher_hidden = torch.randn(len(self.teacher_slots), H + 3, generator=draw)
        self.teacher_labels = torch.randint(0, columns, (len(self.teacher_slots),), generator=draw)

    def targets(self):
        return UldTargets(
            self.slots, self.count, self.teacher_hidden, self.teacher_head, self.teacher_labels, self.teacher_slots
        )

    def reference(self, kd, ce, num_items, num_kd_items, weighted):
        hidden, weight, bias = (leaf.detach().double().requires_grad_() for leaf in self.leaves())
        logits = self.scale * (hidden @ weight.T + bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        teacher = 0.9 * self.teacher_hidden.double() @ self.teacher_head.weight.double().T
        p, q = logits.softmax(-1), teacher.softmax(-1)
        total, chunks, width = logits.sum() * 0, 0, max(p.shape[1], q.shape[1])
        for slot in range(self.count):
            sides = []
            for slots, probabilities, labels in (
                (self.slots, p, self.labels),
                (self.teacher_slots, q, self.teacher_labels),
            ):
                inside = (slots == slot).nonzero()[:, 0].tolist()
                if inside:
                    row = probabilities[inside[-1]]
                    for token in inside[:-1]:
                        row = row * probabilities[token, labels[token]].clamp(min=1e-8)
                    row = row.sort(descending=True).values
                    sides.append(torch.nn.functional.pad(row, (0, width - len(row))))
            if len(sides) == 2:
                w = self.kd_weights[self.slots == slot].double().mean() if weighted else 1.0
                total, chunks = total + w * (sides[0] - sides[1]).abs().sum(), chunks + 1
        cross = -(logits.log_softmax(-1).gather(1, self.labels[:, None])[:, 0] * self.ce_mask).sum()
        loss = kd * total / (num_kd_items or max(chunks, 1)) + ce * cross / (num_items or max(len(self.labels), 1))
        return loss.item(), total.item(), torch.autograd.grad(loss, [hidden, weight, bias])


@pytest.mark.parametrize("push", [FLAT, NEAR_ONE, NEAR_ZERO])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 40), (7, V), (40, 90)])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("kd", "ce", "num_items", "num_kd_items", "weighted"), [
    (0.7, 0.3, None, None, False), (1.0, 0.0, 50, 31, True), (0.0, 1.0, 9, None, False),
])  # fmt: skip
def test_value_and_gradient_are_those_of_float64(
    tokens, columns, push, softcap, kd, ce, num_items, num_kd_items, weighted
):
    case = Uld(tokens, push, columns, softcap=softcap)
    value, distance, gradients = case.reference(kd, ce, num_items, num_kd_items, weighted)
    leaves = [leaf.requires_grad_() for leaf in case.leaves()]
    common = {
        "ce_mask": case.ce_mask,
        "kd_token_weights": case.kd_weights if weighted else None,
        "num_items": num_items,
        "num_kd_items": num_kd_items,
    }
    arguments = (case.labels, options(kd, ce), case.targets())
    logits = case.head().differentiable_logits(case.hidden)
    for found in (
        head_uld_loss(case.hidden, case.head(), *arguments, **common),
        head_uld_loss(case.hidden, case.head(), *arguments, **common, chunk_tokens=3),
        dense_uld_loss(logits, *arguments, **common),
    ):
        assert found.loss.item() == pytest.approx(value, rel=1e-5, abs=1e-7)
        assert found.kd_sum.item() == pytest.approx(distance, rel=1e-5, abs=1e-7)
        # All signs may be the same, and the gradient 0.
        assert apart(torch.autograd.grad(found.loss, leaves), gradients, least=1e-3) < 1e-5


def test_it_is_what_trl_computes_for_a_row():
    settings = {"uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0, "uld_skip_student_eos": False}
    settings |= {"uld_student_temperature": 1.0, "uld_teacher_temperature": 1.0, "uld_skip_teacher_eos": False}
    settings |= {"use_extended_uld": True, "uld_token_merge_strategy": "bayesian"}
    trl = ULDLoss(SimpleNamespace(**settings))
    draw = torch.Generator().manual_seed(3)
    own_ends, other_ends = [2, 3, 5, 9, 10, 12], [1, 2, 5, 6, 7, 10, 12]  # bytes at which tokens end
    slots, teacher_slots = torch.tensor([0, 1, 1, 2, 2, 3]), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    sides = []
    for ends, columns in ((own_ends, 30), (other_ends, 41)):
        logits = torch.randn(1, len(ends) + 1, columns, generator=draw) * 2
        labels = torch.randint(0, columns, (len(ends),), generator=draw)
        starts = [0, *ends[:-1]]
        offsets = torch.tensor([[[0, 0], *map(list, zip(starts, ends, strict=True))]])
        sides.append((logits, labels, offsets))
    (own, own_labels, own_offsets), (other, other_labels, other_offsets) = sides
    rows = [torch.cat([torch.tensor([-100]), labels])[None] for labels in (own_labels, other_labels)]
    ids = [row.clamp(min=0) for row in rows]
    expected = trl(own, other, *rows, *ids, own_offsets, other_offsets)
    targets = UldTargets(slots, 6, other[0, :-1], None, other_labels, teacher_slots)
    found = dense_uld_loss(own[0, :-1], own_labels, options(1.0, 0.0), targets)
    assert found.loss.item() == pytest.approx(float(expected), rel=1e-5)
