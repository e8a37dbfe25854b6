"""A teacher of one's own: what it is asked, when, and that tokens it does not answer for are trained on data alone."""

import dataclasses

import pytest
import torch

from kdtrain.config.options import DistillationOptions
from kdtrain.losses import TopKLogprobs, dense_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.teachers import DenseTargets, Targets, Teacher
from kdtrain.trainer.argument_checks import check_teacher_can
from tests import tiny
from tests.benchmarks.draws import drawn
from tests.test_losses import reference
from tests.test_trainer import make_batch, make_trainer

K = 5
KINDS = ("logits", "hidden states", "top-k")


class OwnTeacher(Teacher):
    """Answers for every token, or for those whose number in the batch's rows is no multiple of `skip`."""

    def __init__(self, model, kind="top-k", skip=None):
        self.model, self.kind, self.skip, self.vocab_size = model.eval(), kind, skip, model.config.vocab_size
        self.calls, self.temperature = [], 1.0

    def place(self, accelerator):
        self.calls.append(("place", accelerator.device.type))

    def prepare(self, window):
        self.calls.append(("prepare", [batch.labels.clone() for batch in window]))

    def targets(self, batch):
        self.calls.append(("targets", batch.labels.clone()))
        covered_S = self.covered(batch)
        with torch.no_grad():
            hidden_SH = self.model.model(**batch.teacher_inputs).last_hidden_state[:, :-1][batch.predicts_BT]
            scores = DenseTargets(
                hidden_SH if covered_S is None else hidden_SH[covered_S],
                Head(self.model.lm_head.weight, None, 1.0, None),
            )
            if self.kind == "logits":
                scores = scores.logits()
            if self.kind == "top-k":
                logprobs, indices = torch.log_softmax(scores.logits(), -1).topk(K)
                scores = TopKLogprobs(indices, logprobs)
            if self.kind == "drawn":
                scores = drawn(self.softened(scores.logits()), 20, torch.Generator().manual_seed(0))
        return Targets(scores, covered_S)

    def softened(self, logits):
        return torch.softmax(logits.double() / self.temperature, -1)

    def covered(self, batch):
        if self.skip is None:
            return None
        return batch.labels_S % self.skip != 0


class StoredTeacher(Teacher):
    """Looks its answers up by the rows' names, as a file of them is read."""

    def __init__(self, stored, vocab_size):
        self.stored, self.vocab_size, self.asked = stored, vocab_size, []

    def targets(self, batch):
        self.asked += batch.rows.ids
        logprobs, indices = zip(*(self.stored[name] for name in batch.rows.ids), strict=True)
        return Targets(TopKLogprobs(torch.cat(indices), torch.cat(logprobs)))


def test_a_teacher_that_looks_its_answers_up_by_row_trains_as_the_model_that_gave_them(tmp_path, teacher):
    rows = [{**row, "row_id": f"0:{i}"} for i, row in enumerate(tiny.CHATS)]
    own = OwnTeacher(teacher)
    collate = make_trainer(tmp_path, None, None, rows=rows, extra={"teacher": own}).data_collator
    stored = {}
    for row in rows:
        scores = own.targets(collate([row])).scores
        stored[row["row_id"]] = (scores.logprobs, scores.indices)
    results = []
    for one in (own, StoredTeacher(stored, 320)):
        trainer = make_trainer(tmp_path, None, None, rows=rows, max_steps=3, extra={"teacher": one})
        trainer.train()
        results.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert set(one.asked) == set(stored)
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0][0] > 0


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_teacher_is_placed_once_and_told_of_each_window_before_it_is_asked(tmp_path, teacher, lmbda):
    own = OwnTeacher(teacher)
    trainer = make_trainer(
        tmp_path, None, None, lmbda=lmbda, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=3,
        extra={"teacher": own},
    )  # fmt: skip
    assert own.calls == [("place", "cpu")]
    trainer.train()
    # First come the two questions of `preflight/alignment.py`.
    assert [name for name, _ in own.calls[:5]] == ["place", *["prepare", "targets"] * 2]
    del own.calls[1:5]
    assert [name for name, _ in own.calls] == ["place", *["prepare", *["targets"] * 3] * 2]
    for i in (1, 5):
        window, asked = own.calls[i][1], [labels for _, labels in own.calls[i + 1 : i + 4]]
        for told, labels in zip(window, asked, strict=True):
            assert torch.equal(told, labels)  # with the answers that are trained on
    longest = max(int((labels != -100).sum()) for name, labels in own.calls if name == "targets")
    assert (longest <= 6) == (lmbda == 1.0)  # max_new_tokens; those of the data are longer


def test_a_teacher_is_prepared_for_each_batch_of_an_evaluation(tmp_path, teacher):
    own = OwnTeacher(teacher)
    extra = {"teacher": own, "eval_dataset": tiny.CHATS[:5]}
    trainer = make_trainer(tmp_path, None, None, per_device_eval_batch_size=2, extra=extra)
    trainer.evaluate()
    assert [name for name, _ in own.calls] == ["place", *["prepare", "targets"] * 3]
    for (_, (window,)), (_, asked) in zip(own.calls[1::2], own.calls[2::2], strict=True):
        assert torch.equal(window, asked)


# ---- tokens that the teacher does not answer for ---------------------------------------------------------------------


def by_hand(student, own, batches, count, beta=0.5):
    """JSD over the covered tokens and CE over all, both divided by all; in float64 and with autograd."""
    total, agree, entropy, covered = 0.0, [], [], 0
    for batch in batches:
        keep = batch.predicts_BT
        inputs = dict(batch.model_inputs)
        s = student(**inputs).logits[:, :-1][keep].double()
        with torch.no_grad():
            t = own.model(**inputs).logits[:, :-1][keep].double()
        rows = own.covered(batch)
        covered += int(rows.sum())
        total = total - torch.log_softmax(s, -1).gather(1, batch.labels_S[:, None]).sum() * 0.3 / count
        for i in rows.nonzero().flatten().tolist():
            if own.kind == "top-k":
                q, p = torch.log_softmax(t[i], -1), torch.log_softmax(s[i], -1)
                top = q.topk(K)
                bucket = torch.cat([top.values, (1 - top.values.exp().sum()).log()[None]])
                mine = torch.cat([p[top.indices], (1 - p[top.indices].exp().sum()).log()[None]])
                total = total + reference(mine, bucket, beta, 1.0) / count
            else:
                total = total + reference(s[i], t[i], beta, 1.0) / count
            agree.append(float(s[i].argmax() == t[i].argmax()))
            q = torch.log_softmax(t[i], -1)
            entropy.append(-(q.exp() * q).sum().item())
    return total, sum(agree) / max(covered, 1), sum(entropy) / max(covered, 1), covered


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("kind", "fused"), [(kind, True) for kind in KINDS] + [("hidden states", False), ("top-k", False)]
)
def test_tokens_without_an_answer_have_cross_entropy_alone_and_count_in_the_mean(
    tmp_path, teacher, kind, fused, accumulation
):
    student = tiny.make_qwen3(seed=1)
    own = OwnTeacher(teacher, kind, skip=3)
    trainer = make_trainer(tmp_path, student, None, sft_alpha=0.3, extra={"teacher": own})
    trainer._objective = dataclasses.replace(trainer._objective, fused=fused)
    rows = tiny.CHATS[:4]
    batches = [make_batch(trainer, rows[i::accumulation]) for i in range(accumulation)]
    count = sum(int(batch.num_supervised) for batch in batches)
    student.train()
    loss = sum(trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(count)) for batch in batches)
    loss.backward()
    found = torch.cat([p.grad.flatten().double() for p in student.parameters()])
    student.zero_grad()
    expected, agree, entropy, covered = by_hand(student, own, batches, count)
    assert 0 < covered < count
    expected.backward()
    wanted = torch.cat([p.grad.flatten().double() for p in student.parameters()])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    record = trainer.window_metrics()
    assert record["teacher_agreement"] == pytest.approx(agree)
    if kind != "top-k":  # of which only the bucketed distribution is known
        assert record["teacher_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert sum(v.item() for v in trainer._metrics["train"]["num_teacher_tokens"]) == covered
    assert sum(v.item() for v in trainer._metrics["train"]["num_tokens"]) == count


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("skip", [None, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_tokens_drawn_from_a_teacher_are_learnt_by_forward_kl_at_their_temperature(
    tmp_path, teacher, fused, skip, temperature
):
    student = tiny.make_qwen3(seed=1)
    own = OwnTeacher(teacher, "drawn", skip)
    own.temperature = temperature
    options = {"beta": 0.0, "kd_temperature": temperature, "sft_alpha": 0.3, "extra": {"teacher": own}}
    trainer = make_trainer(tmp_path, student, None, **options)
    trainer._objective = dataclasses.replace(trainer._objective, fused=fused)
    batch = make_batch(trainer)
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    found = torch.cat([p.grad.flatten().double() for p in student.parameters()])
    student.zero_grad()

    targets, count = own.targets(batch), int(batch.num_supervised)
    z = student(**batch.model_inputs).logits[:, :-1][batch.predicts_BT].double()
    covered_S = torch.ones(len(z), dtype=torch.bool) if skip is None else targets.covered_S
    w = torch.zeros(int(covered_S.sum()), z.shape[1]).double()
    w.scatter_add_(1, targets.scores.indices.clamp(min=0), targets.scores.weights.double())
    kl = (torch.xlogy(w, w) - w * torch.log_softmax(z[covered_S] / temperature, -1)).sum()
    ce = torch.nn.functional.cross_entropy(z, batch.labels_S, reduction="sum")
    expected = (kl + 0.3 * ce) / count
    expected.backward()
    wanted = torch.cat([p.grad.flatten().double() for p in student.parameters()])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    record = trainer.window_metrics()
    assert record["llm_kd_loss"] == pytest.approx(kl.item() / count, rel=1e-5)
    assert record["teacher_agreement"] == pytest.approx(agreement(z[covered_S], w))
    assert "teacher_entropy" not in record  # of twenty draws it would be at most log 20


def agreement(z, w):
    return (z.argmax(-1) == w.argmax(-1)).double().mean().item()


def test_a_run_with_drawn_tokens_logs_no_entropy_of_the_teacher_and_one_of_another_divergence_stops(tmp_path, teacher):
    extra = {"teacher": OwnTeacher(teacher, "drawn"), "eval_dataset": tiny.CHATS[:5]}
    trainer = make_trainer(tmp_path / "a", None, None, beta=0.0, max_steps=2, logging_steps=1, extra=extra)
    trainer.train()
    trainer.evaluate()
    records = [record for record in trainer.state.log_history if any("llm_kd_loss" in key for key in record)]
    assert len(records) == 3
    for record in records:
        assert any(key.endswith("teacher_agreement") for key in record)
        assert not any("teacher_entropy" in key for key in record)
    trainer = make_trainer(tmp_path / "b", None, None, beta=0.5, max_steps=2, extra=extra)
    with pytest.raises(ValueError, match=r"beta is 0.5, and the targets are tokens drawn from the teacher"):
        trainer.train()


@pytest.mark.parametrize(("skip", "covers"), [(1, "nothing"), (10**6, "everything")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_single_answer_and_one_with_all_are_edges_of_the_same(tmp_path, teacher, skip, covers, kind):
    student = tiny.make_qwen3(seed=1)
    trainer = make_trainer(tmp_path, student, None, sft_alpha=0.3, extra={"teacher": OwnTeacher(teacher, kind, skip)})
    batch = make_batch(trainer)
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in student.parameters()])
    student.zero_grad()
    kwargs = {"llm_kd_weight": 0.0, "sft_alpha": 0.0} if covers == "nothing" else {"sft_alpha": 0.3}
    extra = {} if covers == "nothing" else {"extra": {"teacher": OwnTeacher(teacher, kind)}}
    plain = make_trainer(tmp_path, student, None, **kwargs, **extra).compute_loss(student, batch)
    plain.backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    factor = 0.3 if covers == "nothing" else 1.0
    assert loss.item() == pytest.approx(factor * plain.item(), rel=1e-5)
    assert (found - factor * wanted).norm() <= 1e-5 * found.norm()
    assert ("teacher_agreement" in trainer.window_metrics()) == (covers == "everything")


@pytest.mark.parametrize("kind", KINDS)
def test_in_an_evaluation_they_count_in_the_batchs_own_mean(tmp_path, teacher, kind):
    student = tiny.make_qwen3(seed=1)
    own = OwnTeacher(teacher, kind, skip=3)
    trainer = make_trainer(tmp_path, student, None, sft_alpha=0.3, extra={"teacher": own})
    batch = make_batch(trainer)
    student.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(student, batch)
        expected, _, _, covered = by_hand(student, own, [batch], int(batch.num_supervised))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    logged = {name: sum(value.item() for value in values) for name, values in trainer._metrics["eval"].items()}
    assert logged["llm_kd_loss"] + logged["sft_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert (logged["num_tokens"], logged["num_teacher_tokens"]) == (batch.num_supervised.item(), covered)


@pytest.mark.parametrize("fused", [True, False])
def test_top_k_targets_leave_the_padding_of_a_longer_student_alone(tmp_path, teacher, fused):
    """The student's head has 16 columns that are no tokens: they take no part in its distribution."""
    student = tiny.make_qwen3(vocab_size=336, seed=1, tie_word_embeddings=False)
    own = OwnTeacher(teacher)
    extra = {"teacher": own, "shared_vocab_size": 320}
    trainer = make_trainer(tmp_path, student, None, sft_alpha=0.3, extra=extra)
    trainer._objective = dataclasses.replace(trainer._objective, fused=fused)
    batch = make_batch(trainer)
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    head = student.lm_head.weight.grad
    assert head[:320].any()
    assert not head[320:].any()
    with torch.no_grad():
        logits = student(**batch.model_inputs).logits[:, :-1][batch.predicts_BT][:, :320]
        expected = dense_distillation_loss(
            logits, batch.labels_S, targets=own.targets(batch).scores, ce_weight=0.3, beta=0.5
        ).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_top_k_targets_teach_a_student_with_an_adapter_on_its_head(tmp_path, teacher):
    """Its head is no plain linear layer, and is called in pieces; the adapter learns."""
    lora = tiny.lora_config(rank=4, alpha=8, dropout=0.0, target_modules=["lm_head"])
    student = tiny.make_qwen3(seed=1, tie_word_embeddings=False)
    extra = {"teacher": OwnTeacher(teacher), "peft_config": lora}
    trainer = make_trainer(tmp_path, student, None, max_steps=30, lmbda=0.0, learning_rate=1e-2, extra=extra)
    assert trainer._objective.fused
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("tail", "beta", "warned"), [("renormalize", 0.5, 1), ("renormalize", 0.0, 0), ("bucket", 0.5, 0)]
)
def test_the_class_too_warns_of_a_tail_that_is_renormalized(tmp_path, teacher, caplog, tail, beta, warned):
    for one in ({"extra": {"teacher": OwnTeacher(teacher)}}, {"teacher": teacher}):  # the second one gives no top k
        make_trainer(tmp_path, None, **{"teacher": None, **one}, tail=tail, beta=beta)
    assert sum("by 28 degrees at beta 0.5" in record.message for record in caplog.records) == warned


# ---- what a teacher cannot do ----------------------------------------------------------------------------------------

VISUAL = {"enabled": True, "weight": 0.1, "targets": {"aligner": {"module": "aligner"}}}


@pytest.mark.parametrize("options", [{"seq_kd": True}, {"visual_kd": VISUAL}])
def test_a_teacher_that_is_no_model_cannot_write_answers_nor_show_features(tmp_path, teacher, options):
    with pytest.raises(ValueError, match=r"needs? a teacher that is a model in this process"):
        make_trainer(tmp_path, None, None, extra={"teacher": OwnTeacher(teacher)}, **options)


def test_what_a_teacher_says_it_can_do_is_what_it_is_asked_for(teacher):
    options = DistillationOptions(seq_kd=True)
    writes = type("Writes", (OwnTeacher,), {"can_generate": True})(teacher)
    check_teacher_can(writes, options)
    options = options.model_copy(update={"visual_kd": VISUAL})
    with pytest.raises(ValueError, match="needs a teacher"):
        check_teacher_can(writes, options)
