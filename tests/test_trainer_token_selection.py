"""`rlhf.token_selection`, and weights in the divergence that the data name, through whole optimizer steps."""

import copy
import logging
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from kdtrain.config import ConfigError
from kdtrain.config.options import TokenSelection
from kdtrain.data.batch import Batch, Rows
from kdtrain.losses import SampledTargets
from kdtrain.losses.comparison import Scores
from kdtrain.teachers import Targets
from kdtrain.trainer.token_selection import chosen_weights, num_kd_tokens
from tests import tiny
from tests.oracle import double
from tests.test_packing import SAME, WAYS, assert_same, skewed_rows, trained
from tests.test_trainer import TopKTeacher, make_trainer

BY = ["student_entropy", "disagreement"]
RATE = 100.0  # so that a step is the gradient, and not the rounding of weights


# ---- which tokens ----------------------------------------------------------------------------------------------------


def batch_of(counts, width=12, weights=None, of_tokens=None):
    """Rows of so many supervised tokens, each behind two that are not."""
    labels = torch.full((len(counts), width), -100)
    for row, count in enumerate(counts):
        labels[row, 2 : 2 + count] = torch.arange(count) % 5
    rows = Rows(kd_weights=None if weights is None else torch.tensor(weights))
    return Batch(
        model_inputs={"input_ids": labels.clamp(min=0)}, labels=labels, rows=rows,
        kd_token_weights=None if of_tokens is None else torch.tensor(of_tokens),
    )  # fmt: skip


def chosen(batch, sharpness, keep, covered=None):
    """Which tokens are chosen by the student's entropy, which falls with the sharpness of its logits."""
    logits = torch.zeros(len(batch.labels_S), 5)
    logits[:, 0] = torch.tensor(sharpness, dtype=torch.float32)
    targets = Targets(logits, None if covered is None else torch.tensor(covered))
    weights = chosen_weights(batch, Scores(logits, None, 5), targets, TokenSelection(keep=keep))
    assert int((weights > 0).sum()) <= int(num_kd_tokens(batch, TokenSelection(keep=keep)))
    return weights.tolist()


def test_of_each_row_the_tokens_of_the_highest_score_are_chosen_and_of_equal_ones_the_earlier():
    batch = batch_of([4, 1, 0, 5])
    sharp = [3, 1, 2, 0, 9, 1, 1, 1, 1, 1]
    assert chosen(batch, sharp, 0.5) == [0, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    assert chosen(batch, sharp, 1e-7) == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]  # at least one
    assert chosen(batch, sharp, 0.99) == [1] * 10
    assert [int(num_kd_tokens(batch, TokenSelection(keep=keep))) for keep in (0.5, 1e-7, 0.99, 1.0)] == [6, 3, 10, 10]


@pytest.mark.parametrize(("keep", "tokens"), [(0.07, 7), (0.29, 29), (0.5, 50), (1 / 3, 34), (0.995, 100)])
def test_a_share_is_rounded_up_as_on_paper(keep, tokens):
    """As floats 0.07 · 100 is above 7, and 0.29 · 100 below 29."""
    assert int(num_kd_tokens(batch_of([100], width=110), TokenSelection(keep=keep))) == tokens


def test_tokens_of_weight_zero_are_not_chosen_and_do_not_count_in_n():
    of_tokens = torch.ones(2, 12)
    of_tokens[0, 2], of_tokens[0, 3] = 0, 3
    batch = batch_of([4, 4], weights=[2.0, 0.0], of_tokens=of_tokens.tolist())
    assert chosen(batch, [0, 5, 1, 2, 0, 1, 2, 3], 0.5) == [0, 0, 2, 2, 0, 0, 0, 0]  # two of three
    assert chosen(batch, [0, 0, 1, 2, 0, 1, 2, 3], 0.3) == [0, 6, 0, 0, 0, 0, 0, 0]
    assert int(num_kd_tokens(batch, None)) == 3


def test_tokens_that_the_teacher_says_nothing_of_count_in_n_and_are_not_chosen():
    batch = batch_of([4, 4])
    covered = [True, False, True, True, False, False, False, True]
    assert chosen(batch, [1, 0, 2, 3, 0, 1, 2, 3], 0.5, covered) == [1, 0, 1, 0, 0, 0, 0, 1]
    assert int(num_kd_tokens(batch, TokenSelection(keep=0.5))) == 4


# ---- values and gradients --------------------------------------------------------------------------------------------


def weighted_rows(seed=0):
    """Rows of very different lengths: with a weight, with one of each token, and without any."""
    rows = []
    for i, row in enumerate(skewed_rows(8, longest=24, seed=seed)):
        if i in (1, 4):
            row["kd_weight"] = [0.0, 2.0][i == 4]
        if i in (2, 5, 7):
            row["kd_weights"] = [float((3 * t + i) % 4) / 2 for t in range(len(row["input_ids"]))]
        rows.append({"kd_weight": 1.0, "kd_weights": None, **row})
    return rows


def divergence_of(s, t, divergence, beta):
    kl = lambda p, q: (p.exp() * (p - q)).sum(-1)  # noqa: E731
    if divergence == "mixed_kl":
        return (1 - beta) * kl(t, s) + beta * kl(s, t)
    if beta in (0, 1):
        return kl(s, t) if beta else kl(t, s)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def reference(student, teacher, rows, selection, temperature, divergence, beta, kd, ce):
    """The loss of a window and its gradient, from the definitions, row by row and in float64."""
    student, teacher = double(student), double(teacher)
    kd_sum, ce_sum, tokens, kd_tokens = 0.0, 0.0, 0, 0
    for row in rows:
        at = [t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100]
        if not at:
            continue
        ids = torch.tensor([row["input_ids"]])
        s = student(input_ids=ids).logits[0, at]
        with torch.no_grad():
            t = teacher(input_ids=ids).logits[0, at]
        weights = torch.tensor([row["kd_weight"] * (row["kd_weights"] or [1.0] * 99)[p + 1] for p in at]).double()
        log_s, log_t = s.detach().log_softmax(-1), t.log_softmax(-1)
        scores = -(log_s.exp() * log_s).sum(-1)
        if selection and selection["by"] == "disagreement":
            scores = (1 - scores / math.log(s.shape[1])) * (log_t.exp() * (log_t - log_s)).sum(-1)
        may = [i for i in range(len(at)) if weights[i] > 0]
        keep = math.ceil(selection["keep"] * len(may) - 1e-9) if selection else len(may)
        best = sorted(may, key=lambda i: (-float(scores[i]), i))[:keep]
        value = divergence_of((s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1), divergence, beta)
        kd_sum = kd_sum + (weights[best] * value[best]).sum()
        if row["ce"]:
            ce_sum = ce_sum - s.log_softmax(-1).gather(1, ids[0, [p + 1 for p in at]][:, None]).sum()
        tokens, kd_tokens = tokens + len(at), kd_tokens + keep
    loss = kd * kd_sum / kd_tokens + ce * ce_sum / tokens
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])


@pytest.mark.parametrize(
    ("by", "keep", "temperature", "divergence", "beta", "ce"),
    [
        ("student_entropy", 0.5, 1.0, "jsd", 0.5, 0.3),
        ("disagreement", 0.25, 2.0, "jsd", 0.0, 0.0),
        tiny.slow("student_entropy", 0.1, 2.0, "jsd", 1.0, 0.0),
        tiny.slow("disagreement", 0.5, 1.0, "mixed_kl", 0.4, 0.3),
        tiny.slow(None, None, 1.0, "jsd", 0.5, 0.3),
        (None, None, 2.0, "jsd", 0.0, 0.0),
    ],
)
def test_loss_and_gradient_are_those_of_the_definition(tmp_path, by, keep, temperature, divergence, beta, ce):
    """In one window of two micro-batches; and the metrics are those of all supervised tokens."""
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48)
    selection = by and {"by": by, "keep": keep}
    options = {"temperature": temperature, "divergence": divergence, "beta": beta}
    loss, gradient = reference(copy.deepcopy(student), teacher, weighted_rows(), selection, kd=0.7, ce=ce, **options)
    run = {"rows": Dataset.from_list(weighted_rows()), "max_steps": 1, "train_sampling_strategy": "sequential"}
    run["learning_rate"] = RATE
    shared = {"divergence": divergence, "beta": beta, "kd_temperature": temperature, "sft_alpha": ce, **run}
    (record,), moved = trained(tmp_path, copy.deepcopy(student), teacher, token_selection=selection, **shared)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert (moved.double() + RATE * gradient).norm() <= 1e-5 * RATE * gradient.norm()
    (plain,), _ = trained(tmp_path, student, teacher, **shared)
    for name in ("token_accuracy", "teacher_agreement", "student_entropy", "teacher_entropy", "sft_loss"):
        assert (name in record) == (name in plain)
        assert name not in plain or record[name] == pytest.approx(plain[name], rel=1e-6), name


def selected(folder, way=None, rows=None, keep=0.5, **options):
    return trained(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48),
        rows=Dataset.from_list(rows or weighted_rows()), train_sampling_strategy="sequential", max_steps=1,
        **{"token_selection": {"by": "disagreement", "keep": keep}, **options, **(way or {})},
    )  # fmt: skip


WAYS_TO_LAY = {
    **WAYS,
    "one micro-batch": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "a row each": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "padded to 64": {"pad_to_multiple_of": 64},
}


@pytest.mark.parametrize("way", tiny.one_in(4, WAYS_TO_LAY))
def test_the_loss_does_not_depend_on_how_rows_are_laid(tmp_path, way):
    assert_same(selected(tmp_path / "a"), selected(tmp_path / "b", WAYS_TO_LAY[way]))


def test_nor_on_the_order_of_the_rows(tmp_path):
    one, other = selected(tmp_path / "a"), selected(tmp_path / "b", rows=weighted_rows()[::-1])
    assert_same(one, other)


def test_keeping_all_tokens_is_no_selection(tmp_path):
    """0.99 of up to 24 tokens, rounded up."""
    assert_same(selected(tmp_path / "a", keep=0.99), selected(tmp_path / "b", {"token_selection": None}))
    assert_same(selected(tmp_path / "a", keep=1.0), selected(tmp_path / "b", {"token_selection": None}))


def on_ranks(folder, ranks):
    way = {"per_device_train_batch_size": 8 // (2 * ranks), "gradient_accumulation_steps": 2}
    (record,), moved = selected(folder, way, sft_alpha=0.3)
    return {name: record[name] for name in SAME}, moved.tolist()


@pytest.mark.slow
def test_two_ranks_choose_and_train_as_one_process(tmp_path):
    (alone, moved), *_ = tiny.run_ranks(on_ranks, 1, str(tmp_path / "one"), 1)
    for numbers, weights in tiny.run_ranks(on_ranks, 2, str(tmp_path / "two"), 2):
        assert numbers == pytest.approx(alone, rel=1e-5)
        assert weights == pytest.approx(moved, rel=0, abs=2e-7)


# ---- targets of every kind -------------------------------------------------------------------------------------------


class LogitsTeacher(TopKTeacher):
    """Gives whole logits, so that the student's are made as well."""

    def targets(self, batch):
        return Targets(super().targets(batch).scores.logprobs)


def loss_with(tmp_path, student, teacher, by, **options):
    trainer = make_trainer(
        tmp_path, copy.deepcopy(student), token_selection={"by": by, "keep": 0.4}, sft_alpha=0.2,
        extra={"teacher": teacher}, **options,
    )  # fmt: skip
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(tiny.CHATS))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("by", BY)
def test_hidden_states_logits_and_all_of_the_top_give_the_same(tmp_path, student, teacher, by, monkeypatch):
    from kdtrain.teachers import LocalTeacher

    teachers = [LocalTeacher(copy.deepcopy(teacher)), TopKTeacher(teacher, k=320)]
    (loss, gradient), *others = [loss_with(tmp_path, student, one, by) for one in teachers]
    monkeypatch.setattr("kdtrain.trainer.objective.StudentForward.can_fuse", lambda self: False)
    others += [loss_with(tmp_path, student, LocalTeacher(copy.deepcopy(teacher)), by)]
    for other, other_gradient in others:
        assert other == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() <= 2e-5 * gradient.norm()


class Half(TopKTeacher):
    """Answers for every second token."""

    def targets(self, batch):
        scores = super().targets(batch).scores
        covered = torch.arange(len(scores.indices)) % 2 == 0
        return Targets(scores[covered], covered)


@pytest.mark.parametrize("by", BY)
def test_of_a_teacher_that_covers_some_tokens_only_these_are_chosen(tmp_path, student, teacher, by):
    """As with weights of 0 at the others, but for D_kd, in whose n they count."""
    trainer = make_trainer(
        tmp_path, student, token_selection={"by": by, "keep": 0.9}, extra={"teacher": Half(teacher, k=5)}
    )
    batch = trainer.data_collator(tiny.CHATS)
    found = trainer._objective(trainer.model, batch, trainer.options, trainer._run_teacher_forward, None, 1.0)
    covered = (torch.arange(int(batch.num_supervised)) % 2 == 0).float()
    weights = torch.ones(batch.labels.shape)
    weights[:, 1:][batch.predicts_BT] = covered
    by_weight = replace(batch, kd_token_weights=weights)
    whole = TopKTeacher(teacher, k=5)
    options = trainer.options.model_copy(update={"token_selection": None})
    same = trainer._objective(trainer.model, by_weight, options, whole.targets, None, 1.0)
    assert found.tokens.kd_sum.item() == pytest.approx(same.tokens.kd_sum.item(), rel=1e-5)  # 0.9 of all is all of half
    assert found.named["llm_kd_loss"] < same.named["llm_kd_loss"]


def test_drawn_tokens_are_chosen_among_by_the_student_alone(tmp_path, student, teacher):
    class Drawn(TopKTeacher):
        def targets(self, batch):
            indices = super().targets(batch).scores.indices
            return Targets(SampledTargets(indices, torch.full(indices.shape, 1 / indices.shape[1])))

    loss, _ = loss_with(tmp_path, student, Drawn(teacher, k=5), "student_entropy", beta=0.0)
    assert loss > 0
    with pytest.raises(ConfigError, match="drawn tokens: choosing tokens by what was drawn"):
        loss_with(tmp_path, student, Drawn(teacher, k=5), "disagreement", beta=0.0)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluated(folder, student, teacher, **options):
    trainer = make_trainer(
        folder, student, teacher, rows=tiny.CHATS, extra={"eval_dataset": Dataset.from_list(weighted_rows())}, **options
    )
    return trainer.evaluate()


def test_evaluation_is_over_all_tokens_by_their_weights_however_rows_are_batched(tmp_path, student, teacher):
    rows = [{**row, "ce": True} for row in weighted_rows()]
    loss, _ = reference(student, teacher, rows, None, 1.0, "jsd", 0.5, kd=1.0, ce=0.0)
    for size in (1, 3, 8):
        found = evaluated(
            tmp_path,
            student,
            teacher,
            per_device_eval_batch_size=size,
            token_selection={"by": "disagreement", "keep": 0.1},
        )
        assert found["eval_llm_kd_loss"] == pytest.approx(loss, rel=1e-5)


# ---- weights of the data ---------------------------------------------------------------------------------------------


def gradient_of(folder, student, teacher, weights, **options):
    rows = [
        {**row, **({} if weight is None else {"kd_weight": weight})}
        for row, weight in zip(tiny.CHATS, weights, strict=True)
    ]
    (record,), moved = trained(
        folder, copy.deepcopy(student), teacher, rows=rows, max_steps=1, gradient_accumulation_steps=1,
        learning_rate=RATE, per_device_train_batch_size=len(rows), **options,
    )  # fmt: skip
    return record, moved


def test_weight_two_pulls_twice_as_hard_and_weight_zero_leaves_the_row_to_the_cross_entropy(tmp_path, student, teacher):
    run = lambda weights, **options: gradient_of(tmp_path, student, teacher, weights, sft_alpha=0.0, **options)  # noqa: E731
    _, of_all = run([None] * 6)
    _, twice = run([2.0] * 6)
    assert (twice - 2 * of_all).norm() <= 1e-5 * twice.norm()
    zeros, left_out = run([0.0, 0.0, None, 1.0, 1.0, None])
    (record,), without = trained(
        tmp_path, copy.deepcopy(student), teacher, rows=tiny.CHATS[2:], max_steps=1, gradient_accumulation_steps=1,
        learning_rate=RATE, sft_alpha=0.0, per_device_train_batch_size=4,
    )  # fmt: skip
    assert zeros["loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert (left_out - without).norm() <= 1e-5 * without.norm()
    plain, _ = gradient_of(tmp_path, student, teacher, [None] * 6, sft_alpha=0.3)
    zeros, _ = gradient_of(tmp_path, student, teacher, [0.0] * 5 + [1.0], sft_alpha=0.3)
    assert zeros["sft_loss"] == pytest.approx(plain["sft_loss"], rel=1e-6)


def test_a_window_without_any_weight_trains_by_cross_entropy_alone(tmp_path, student, teacher):
    record, moved = gradient_of(tmp_path, student, teacher, [0.0] * 6, sft_alpha=0.3)
    assert record["llm_kd_loss"] == 0
    assert record["loss"] == pytest.approx(record["sft_loss"])
    assert moved.isfinite().all()
    assert moved.any()


@pytest.mark.parametrize("select", ["all", "weighted"])
def test_a_rows_weight_is_that_of_its_samples_and_those_of_its_answers_tokens_go_with_the_answer(
    tmp_path, student, teacher, select
):
    rows = [
        {"messages": [row["messages"][0], {**row["messages"][1], "kd_weight": 0.5}], "kd_weight": weight}
        for row, weight in zip(tiny.CHATS, [3.0, 0.0, 1.0, 1.0, 2.0, 1.0], strict=True)
    ]
    trainer = make_trainer(
        tmp_path, student, teacher, rows=rows, lmbda=1.0, samples_per_prompt=2, select=select,
        per_device_train_batch_size=6, train_sampling_strategy="sequential",
    )  # fmt: skip
    given = trainer.data_collator(rows)
    assert given.kd_weights_S.unique().tolist() == [0.0, 0.5, 1.0, 1.5]
    batches, _ = trainer.get_batch_samples(iter([given]), 1, torch.device("cpu"))
    (batch,) = batches
    assert batch.kd_token_weights is None
    weights = {}
    for name, sample, weight in zip(
        batch.model_inputs["input_ids"].tolist(), batch.rows.samples, batch.rows.kd_weights.tolist(), strict=True
    ):
        weights.setdefault(tuple(name[: int(batch.rows.prompt_lengths.min())]), []).append((sample, weight))
    total = sorted(sum(weight for _, weight in group) for group in weights.values()) if len(weights) == 6 else None
    mean = sorted(batch.rows.kd_weights.tolist())
    if select == "all":
        assert mean == sorted([3.0, 0.0, 1.0, 1.0, 2.0, 1.0] * 2)
    else:
        assert sum(mean) == pytest.approx(2 * 8.0, rel=1e-5)
        assert mean[:2] == [0.0, 0.0]
        assert total is None or total == pytest.approx([0.0, 2.0, 2.0, 2.0, 4.0, 6.0], rel=1e-5)
    counted = int(num_kd_tokens(batch, None))
    assert float(trainer._window.num_kd_items) == counted < int(batch.num_supervised)


def test_weights_without_a_divergence_are_warned_of(tmp_path, student, caplog):
    rows = [{**tiny.CHATS[0], "kd_weight": 2.0}, *tiny.CHATS[1:]]
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, student, rows=rows, llm_kd_weight=0.0)
        assert "kd_weight, which has no effect without a divergence" in caplog.text
        caplog.clear()
        make_trainer(tmp_path, student, rows=tiny.CHATS, llm_kd_weight=0.0)
        assert "kd_weight" not in caplog.text


def test_whether_rows_have_weights_is_known_before_they_train(tmp_path, student, teacher):
    plain = Dataset.from_list([{k: v for k, v in row.items() if "kd" not in k} for row in weighted_rows()])
    in_messages = [{"messages": [row["messages"][0], {**row["messages"][1], "kd_weight": 2.0}]} for row in tiny.CHATS]
    cases = [
        (tiny.CHATS, False), (in_messages, True), (plain, False), (Dataset.from_list(weighted_rows()), True),
        (Dataset.from_list(tiny.CHATS), True),  # of which nothing is known
    ]  # fmt: skip
    for rows, weighs in cases:
        assert make_trainer(tmp_path, student, teacher, rows=rows).rows_may_weigh == weighs


def test_weights_of_both_kinds_are_not_rounded_where_inputs_are(tmp_path, student, teacher, monkeypatch):
    """As DeepSpeed does with all inputs that are no whole numbers."""
    trainer = make_trainer(tmp_path, student, teacher)
    monkeypatch.setattr(trainer, "_prepare_input", lambda one: one.bfloat16() if one.is_floating_point() else one)
    batch = trainer.data_collator(tiny.CHATS[:2])
    weights = torch.full(batch.labels.shape, 1.2345)
    found = trainer._prepare_inputs(replace(batch, kd_token_weights=weights))
    assert torch.equal(found.kd_token_weights, weights)


@pytest.mark.parametrize("weights", [torch.tensor([1.0, -1.0]), torch.ones(3), torch.tensor([[1.0], [2.0]])])
def test_weights_of_a_users_collator_are_checked(tmp_path, student, teacher, weights):
    trainer = make_trainer(tmp_path, student, teacher)
    given = trainer.data_collator(tiny.CHATS[:2])
    mapping = {**given.model_inputs, "labels": given.labels}
    found = trainer.receiver.accept({**mapping, "kd_weights": [1.0, 0.5]})
    assert found.rows.kd_weights.tolist() == [1.0, 0.5]
    found = trainer.receiver.accept({**mapping, "kd_weights": torch.full(given.labels.shape, 2.0)})
    assert found.kd_weights_S.unique().tolist() == [2.0]
    with pytest.raises(ValueError, match=r"kd_weights .* must be a finite number of 0 or more"):
        trainer.receiver.accept({**mapping, "kd_weights": weights})
