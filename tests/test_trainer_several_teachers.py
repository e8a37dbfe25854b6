"""Several teachers, and a divergence by source: each row is trained as if its own teacher and divergence were the only
ones, however rows are batched."""

import dataclasses

import pytest
import torch

from kdtrain.errors import ConfigError, DataError
from kdtrain.losses.kinds import DivergenceParams
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers import LocalTeacher, MixedTeacher, RoutedTeacher, SelfTeacher, Targets, Teacher
from kdtrain.trainer import objective
from tests import tiny
from tests.test_invariance import given_samples
from tests.test_losses import reference
from tests.test_trainer import ROWS, make_trainer

NAMES = ["math", "code", "code", "math", "math", "code", "math", "code"]
NAMED = [{**row, "teacher": name} for row, name in zip(ROWS, NAMES, strict=True)]
# Two sources: one leaves both to the run, the other has its own.
OF_SOURCES = [
    {},
    {"kd_divergence": "skew_kl"},
    {"kd_beta": 0.9},
    {},
    {"kd_divergence": "tvd"},
    {},
    {},
    {"kd_beta": 0.9},
]
BOTH = [{**row, **own} for row, own in zip(NAMED, OF_SOURCES, strict=True)]
SEEDS = {"math": 2, "code": 7}


def model_of(name):
    return tiny.make_qwen3(seed=SEEDS[name], hidden=48)


class Spy(LocalTeacher):
    """Keeps what it was asked about."""

    def __init__(self, module):
        super().__init__(module)
        self.seen, self.prepared = [], []

    def prepare(self, window):
        self.prepared += [ids for batch in window for ids in answers_of(batch)]

    def targets(self, batch):
        self.seen += answers_of(batch)
        return super().targets(batch)


class TopK(Teacher):
    """A model that gives its most likely tokens alone, as a server does."""

    def __init__(self, module, k=20):
        self._inner, self._k = LocalTeacher(module), k
        self.vocab_size = self._inner.vocab_size

    def targets(self, batch):
        logprobs = torch.log_softmax(self._inner.targets(batch).scores.logits(), -1)
        values, ids = logprobs.topk(self._k, -1)
        return Targets(TopKLogprobs(ids, values))


def answers_of(batch):
    return [tuple(row[row != -100].tolist()) for row in batch.labels]


def routed(**kwargs):
    return RoutedTeacher({name: Spy(model_of(name)) for name in SEEDS}, **kwargs)


def trainer_of(folder, teacher, rows=None, **kwargs):
    extra = {"teacher": teacher} if teacher is not None else {}
    return make_trainer(folder, rows=rows or NAMED, extra=extra, **{"sft_alpha": 0.3, **kwargs})


def gradient(trainer, batch, **kwargs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch, **kwargs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("kind", ["hidden states", "top k"])
def test_two_teachers_by_column_equal_two_runs_row_by_row(tmp_path, kind):
    made = LocalTeacher if kind == "hidden states" else TopK
    several = trainer_of(tmp_path / "both", RoutedTeacher({name: made(model_of(name)) for name in SEEDS}))
    alone = {name: trainer_of(tmp_path / name, made(model_of(name))) for name in SEEDS}
    expected, total, tokens = 0.0, 0.0, 0
    for row in NAMED:
        batch = several.data_collator([row])
        count = int(batch.num_supervised)
        loss, own = gradient(alone[row["teacher"]], batch)
        assert gradient(several, batch)[0] == pytest.approx(loss, rel=1e-6)
        expected, total, tokens = expected + count * own, total + count * loss, tokens + count
    loss, found = gradient(several, several.data_collator(NAMED))
    assert loss == pytest.approx(total / tokens, rel=1e-5)
    assert (found - expected / tokens).norm() <= 1e-5 * found.norm()


def test_chosen_tokens_of_two_teachers_teach_row_by_row_what_they_teach_together(tmp_path):
    """Without cross-entropy: the host does not know how many of each teacher's tokens were chosen."""
    options = {"sft_alpha": 0.0, "token_selection": {"keep": 0.5}}
    trainer = trainer_of(tmp_path, RoutedTeacher({name: LocalTeacher(model_of(name)) for name in SEEDS}), **options)
    expected, total = 0.0, 0
    for row in NAMED:
        batch = trainer.data_collator([row])
        count = -(-int(batch.num_supervised) // 2)
        expected, total = expected + count * gradient(trainer, batch)[1], total + count
    _, found = gradient(trainer, trainer.data_collator(NAMED))
    assert (found - expected / total).norm() <= 1e-5 * found.norm()


def test_rows_without_an_answer_and_a_teacher_make_no_more_parts(tmp_path, monkeypatch):
    """Each makes a gradient of the head, and the memory plan has one for each teacher."""
    trainer, made = trainer_of(tmp_path, routed(), sft_alpha=0.3), []
    compute = objective.head_distillation_loss
    monkeypatch.setattr(objective, "head_distillation_loss", lambda *a, **k: made.append(len(a[0])) or compute(*a, **k))
    loss, found = gradient(trainer, trainer.data_collator(NAMED))
    batch = trainer.data_collator([*NAMED, {**NAMED[0], "teacher": None}])
    batch.labels[-1] = -100
    more, also = gradient(trainer, batch)
    assert len(made) == 2 * len(SEEDS)
    assert more == pytest.approx(loss, rel=1e-6)
    assert (also - found).norm() <= 1e-5 * found.norm()
    nothing = trainer.data_collator([{**NAMED[0], "teacher": None}])
    nothing.labels[:] = -100
    assert gradient(trainer, nothing)[0] == 0
    assert made[2 * len(SEEDS) :] == [0]


def test_no_teacher_is_asked_about_a_row_that_is_not_its_own(tmp_path):
    trainer = trainer_of(
        tmp_path, teacher := routed(), per_device_train_batch_size=4, max_steps=2, eval_strategy="no",
    )  # fmt: skip
    own = {
        name: [a for row in NAMED if row["teacher"] == name for a in answers_of(trainer.data_collator([row]))]
        for name in SEEDS
    }
    trainer.alignment_checked = True  # which changes a token of its rows
    trainer.train()
    for name, spy in teacher.by_name.items():
        assert set(spy.seen) == set(own[name])
        assert set(spy.prepared) <= set(own[name])
    assert teacher.rows_asked == {"math": 4, "code": 4}


def train(folder, split, rows=BOTH, teacher=None, **kwargs):
    """One window of eight rows, and every weight after its step."""
    trainer = trainer_of(
        folder, teacher or routed(), rows, optim="sgd", max_grad_norm=1e9, learning_rate=0.1, max_steps=1,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", log_level="error",
        per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1], **kwargs,
    )  # fmt: skip
    trainer.startup_checked = trainer.alignment_checked = True
    with given_samples():
        trainer.train()
    [record] = [record for record in trainer.state.log_history if "loss" in record]
    names = ("loss", "grad_norm", "llm_kd_loss", "sft_loss", "teacher_agreement", "teacher_entropy")
    names += tuple(f"llm_kd_loss_teacher_{name}" for name in SEEDS)
    weights = torch.cat([p.detach().float().flatten() for p in trainer.model.parameters()])
    return {name: record[name] for name in names if name in record}, weights.tolist()


LAYOUTS = {
    "two at a time": ((2, 4), {}),
    "one at a time": ((1, 8), {}),
    "padding-free": ((4, 2), {"padding_free": True}),
    "packed": ((2, 4), {"packing": True, "max_length": 96}),
    "64 tokens a forward": ((4, 2), {"per_device_train_tokens": 64}),
    "in another order": ((4, 2), {"rows": BOTH[::-1]}),
    "its own answers": ((2, 4), {"lmbda": 1.0, "on_policy": {"divergence": "skew_reverse_kl"}}),
    "its own answers, packed": ((2, 4), {"lmbda": 1.0, "on_policy": {"beta": 0.1}, "packing": True, "max_length": 96}),
    "two samples to each prompt": ((2, 4), {"lmbda": 1.0, "samples_per_prompt": 2, "select": "weighted"}),
}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    ours, theirs = (torch.tensor(one[1]) for one in (found, expected))
    assert (ours - theirs).abs().max() <= 2e-6


@pytest.mark.parametrize("name", LAYOUTS)
def test_how_rows_lie_changes_neither_loss_nor_gradient(tmp_path, name):
    split, options = LAYOUTS[name]
    whole = {
        key: value for key, value in options.items() if key in ("lmbda", "on_policy", "samples_per_prompt", "select")
    }
    expected = train(tmp_path / "whole", (8, 1), **whole)
    assert {f"llm_kd_loss_teacher_{name}" for name in SEEDS} <= expected[0].keys()
    assert_same(train(tmp_path / "other", split, **options), expected)


PACKED_AND_CHOSEN = {"packing": True, "max_length": 96, "token_selection": {"by": "disagreement", "keep": 0.4}}


def train_two(folder, options):
    return train(folder, (2, 2), **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lmbda": 1.0}, {"packing": True, "max_length": 96}, PACKED_AND_CHOSEN])
def test_two_ranks_equal_one_process(tmp_path, options):
    expected = train(
        tmp_path / "one", (8, 1), **{k: v for k, v in options.items() if k in ("lmbda", "token_selection")}
    )
    for found in tiny.run_ranks(train_two, 2, tmp_path / "two", options):
        assert_same(found, expected)


def divergence_of(student, teacher, name, beta):
    """The definitions in float64."""
    if name == "jsd":
        return reference(student, teacher, beta)
    s, t = (torch.softmax(x.double(), -1) for x in (student, teacher))
    if name == "tvd":
        return 0.5 * (s - t).abs().sum(-1)
    p, q = (t, s) if name == "skew_kl" else (s, t)
    mixture = DivergenceParams().skew_alpha * p + (1 - DivergenceParams().skew_alpha) * q
    return (p * (p / mixture).log()).sum(-1)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch.model_inputs).logits[:, :-1][batch.predicts_BT]


def expected_kd(trainer, rows, teachers, losses):
    """Σ divergence of each row, by its own teacher and divergence."""
    total, tokens = 0.0, 0
    for row, loss in zip(rows, losses, strict=True):
        batch = trainer.data_collator([row])
        student, teacher = logits(trainer.model, batch), logits(teachers[row["teacher"]], batch)
        total += divergence_of(student, teacher, *loss).sum().item()
        tokens += int(batch.num_supervised)
    return total / tokens


def test_each_source_has_its_divergence_and_own_samples_that_of_on_policy(tmp_path):
    models = {name: model_of(name) for name in SEEDS}
    trainer = trainer_of(tmp_path, routed(), BOTH, sft_alpha=0.0, beta=0.3)
    of_rows = [(own.get("kd_divergence", "jsd"), own.get("kd_beta", 0.3)) for own in OF_SOURCES]
    batch = trainer.data_collator(BOTH)
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(expected_kd(trainer, BOTH, models, of_rows), rel=1e-5)
    written = dataclasses.replace(batch, generated_by="student")
    assert trainer.compute_loss(trainer.model, written).item() == pytest.approx(loss, rel=1e-6)  # it says nothing
    own = trainer_of(tmp_path, routed(), BOTH, sft_alpha=0.0, beta=0.3, on_policy={"divergence": "skew_reverse_kl"})
    loss = own.compute_loss(own.model, written).item()
    assert loss == pytest.approx(expected_kd(own, BOTH, models, [("skew_reverse_kl", 0.3)] * 8), rel=1e-5)
    assert own.compute_loss(own.model, batch).item() == pytest.approx(expected_kd(own, BOTH, models, of_rows), rel=1e-5)


@pytest.mark.parametrize("kind", ["hidden states", "top k"])
def test_the_mean_of_all_teachers_teaches_every_row(tmp_path, kind):
    models, shares = {name: model_of(name) for name in SEEDS}, {"math": 0.7, "code": 0.3}
    whole = models["math"].config.vocab_size
    made = LocalTeacher if kind == "hidden states" else (lambda module: TopK(module, whole))
    teacher = MixedTeacher({name: made(model) for name, model in models.items()}, shares)
    trainer = trainer_of(tmp_path, teacher, sft_alpha=0.0, beta=0.3, kd_temperature=2.0)
    batch = trainer.data_collator(NAMED)
    softened = [share * torch.softmax(logits(models[name], batch).double() / 2, -1) for name, share in shares.items()]
    student = logits(trainer.model, batch).double()
    expected = reference(student, 2 * sum(softened).log(), 0.3, 2.0).mean().item()
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert_same(
        train(tmp_path / "two", (2, 4), teacher=MixedTeacher({n: made(model_of(n)) for n in SEEDS}, shares)),
        train(tmp_path / "one", (8, 1), teacher=MixedTeacher({n: made(model_of(n)) for n in SEEDS}, shares)),
    )


def test_rows_without_a_teacher_are_named(tmp_path):
    trainer = trainer_of(tmp_path, routed())
    batch = trainer.data_collator([NAMED[0], ROWS[1]])
    batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, ids=["a", "b"]))
    with pytest.raises(DataError, match=r"Row b: the row names no teacher, and there are several \(math, code\)"):
        trainer.compute_loss(trainer.model, batch)
    batch = trainer.data_collator([{**ROWS[1], "teacher": "maths"}])
    with pytest.raises(DataError, match=r"names the teacher maths, .* did you mean math\?"):
        trainer.compute_loss(trainer.model, batch)


def test_of_a_single_teacher_no_row_needs_a_name(tmp_path):
    one = trainer_of(tmp_path, RoutedTeacher({"math": LocalTeacher(model_of("math"))}), ROWS)
    alone = trainer_of(tmp_path, LocalTeacher(model_of("math")), ROWS)
    batch = one.data_collator(ROWS)
    assert gradient(one, batch)[0] == gradient(alone, batch)[0]


def test_each_teacher_keeps_its_own_state_in_a_checkpoint(tmp_path):
    teachers = RoutedTeacher(
        {"slow": SelfTeacher("ema", 0.9), "fast": SelfTeacher("ema", 0.1), "math": Spy(model_of("math"))}
    )
    model = tiny.make_qwen3(seed=1)
    teachers.follow(model)
    teachers.begin()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    teachers.stepped()
    teachers.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher-fast", "teacher-slow"]
    again = RoutedTeacher({"slow": SelfTeacher("ema", 0.9), "fast": SelfTeacher("ema", 0.1)})
    again.follow(model)
    again.load(tmp_path)
    for name in again.by_name:
        ours, theirs = (one.by_name[name]._average._averages for one in (again, teachers))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not torch.equal(
        *(teachers.by_name[n]._average._averages["model.embed_tokens.weight"] for n in ("slow", "fast"))
    )


@pytest.mark.parametrize("shares", [{"math": 0.5, "other": 0.5}, {"math": 0.5, "code": 0.6}, {"math": 1.0}])
def test_shares_that_do_not_fit_are_refused(shares):
    with pytest.raises(ConfigError, match="mix has shares"):
        MixedTeacher({name: LocalTeacher(model_of(name)) for name in SEEDS}, shares)


def test_visual_kd_is_refused_beside_several(tmp_path):
    with pytest.raises(ValueError, match="features of one teacher, and there are several"):
        trainer_of(tmp_path, routed(), visual_kd={"targets": ["aligner"]})
