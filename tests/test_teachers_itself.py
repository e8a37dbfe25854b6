"""The student's own weights as the teacher: the same numbers as a second model, and nothing of the student changed."""

import copy
import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import TrainerCallback

import kdtrain
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.teachers import LocalTeacher, SelfTeacher
from kdtrain.teachers.moving_average import FILE
from kdtrain.trainer.answers import generated
from tests import tiny
from tests.test_trainer import make_batch, make_trainer

HEADS = {
    "tied head": ({"tie_word_embeddings": True}, {}),
    "trained copy of the head": ({"tie_word_embeddings": False}, {"modules_to_save": ["lm_head"]}),
    "adapter on the head": ({"tie_word_embeddings": False}, {"target_modules": ["lm_head", "q_proj"]}),
}


def adapted(model_options=None, **options):
    """A student, and the PEFT config of an adapter for it."""
    config = {"target_modules": "all-linear", "dropout": 0.0, **options}
    return tiny.make_qwen3(seed=1, **(model_options or {})), tiny.lora_config(rank=4, alpha=8, **config)


def moved(trainer):
    """Trained weights that are no longer what they began with, so that the adapter does something."""
    torch.manual_seed(7)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return trainer


def loss_and_gradient(trainer, batch):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", HEADS)
def test_the_student_without_its_adapter_teaches_like_a_second_model_with_the_same_weights(tmp_path, name):
    model_options, lora = HEADS[name]
    found = []
    for itself in (False, True):
        student, config = adapted(model_options, **lora)
        teacher = SelfTeacher() if itself else None
        extra = {"peft_config": config, "teacher": teacher}
        trainer = moved(
            make_trainer(tmp_path, student, None if itself else copy.deepcopy(student), sft_alpha=0.3, extra=extra)
        )
        found.append(loss_and_gradient(trainer, make_batch(trainer)))
    (loss, gradients), (own_loss, own_gradients) = found
    # A teacher's head that is no plain layer makes whole logits, which are rounded otherwise.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if name == "adapter on the head" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(loss, own_loss, **tolerance)
    assert loss > 0.1
    assert gradients.keys() == own_gradients.keys()
    for n, gradient in gradients.items():
        torch.testing.assert_close(gradient, own_gradients[n], **tolerance, msg=n)


# ---- nothing of the student changes ----------------------------------------------------------------------------------


def state_of(model):
    """All that a forward of the teacher could leave another way."""
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "off": {n: m.disable_adapters for n, m in model.named_modules() if hasattr(m, "disable_adapters")},
        "cache": model.config.use_cache,
    }


def assert_same_state(model, before):
    after = state_of(model)
    weights, expected = after.pop("weights"), before["weights"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[n], expected[n]) for n in expected)
    assert after == {name: value for name, value in before.items() if name != "weights"}


def trainer_with(tmp_path, weights, *, lora=True, rows=None, **kwargs):
    options = {"modules_to_save": ["lm_head"], "dropout": 0.5} if lora else {}
    student, config = adapted({"tie_word_embeddings": False}, **options)
    extra = {"peft_config": config if lora else None, "teacher": SelfTeacher(weights, 0.5)}
    return make_trainer(tmp_path, student, None, rows=rows, extra=extra, **kwargs)


@pytest.mark.parametrize(("weights", "lora"), [("base", True), ("live", True), ("ema", True), ("ema", False)])
def test_after_a_forward_of_the_teacher_and_after_one_that_fails_the_student_is_what_it_was(tmp_path, weights, lora):
    trainer = trainer_with(tmp_path, weights, lora=lora)
    trainer.teacher.begin()
    moved(trainer)
    model, batch = trainer.model, make_batch(trainer)
    model.train()
    frozen = next(n for n, m in model.named_modules() if n.endswith("mlp"))
    model.get_submodule(frozen).eval()  # a user's
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # neither is this PEFT's to switch on
    before = state_of(model)
    trainer.teacher.targets(batch)
    assert_same_state(model, before)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.get_submodule(frozen).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.teacher.targets(batch)
    handle.remove()
    assert_same_state(model, before)


@pytest.mark.parametrize("weights", ["base", "live", "ema"])
def test_the_teacher_has_no_dropout_though_the_student_trains_with_it(tmp_path, weights):
    trainer = moved(trainer_with(tmp_path, weights, disable_dropout=False))
    batch = make_batch(trainer)
    trainer.model.train()
    hidden = [trainer.teacher.targets(batch).scores.hidden for _ in range(2)]
    assert torch.equal(*hidden)
    losses = [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]
    assert losses[0] != losses[1]  # the student has


def test_base_weights_are_bit_identical_after_training_and_the_adapter_has_learnt(tmp_path):
    trainer = trainer_with(tmp_path, "base", max_steps=3, sft_alpha=0.5, gradient_checkpointing=True)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    flags = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert {n: p.requires_grad for n, p in after.items()} == flags
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} == {n for n, flag in flags.items() if flag}
    assert trainer.model.training


def test_with_gradient_checkpointing_the_numbers_are_those_without(tmp_path):
    found = []
    for checkpointing in (False, True):
        trainer = moved(trainer_with(tmp_path, "base", gradient_checkpointing=checkpointing))
        found.append(loss_and_gradient(trainer, make_batch(trainer)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


# ---- live, and a moving average --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
def test_live_weights_that_read_what_the_student_reads_agree_with_it(tmp_path, lora):
    trainer = moved(trainer_with(tmp_path, "live", lora=lora))
    loss, gradients = loss_and_gradient(trainer, make_batch(trainer))
    assert loss.abs() < 1e-6
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-5


@pytest.mark.parametrize("lora", [True, False])
def test_the_average_is_that_of_the_weights_after_each_optimizer_step(tmp_path, lora):
    """d·θ̄ + (1 − d)·θ by hand in float64, with two micro-batches in a step."""
    trainer = trainer_with(
        tmp_path, "ema", lora=lora, max_steps=4, sft_alpha=0.5, learning_rate=1e-2, gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    expected = {n: p.detach().double() for n, p in trained.items()}
    steps = []

    class ByHand(TrainerCallback):
        def on_step_end(self, *_, **__):
            steps.append({n: p.detach().clone() for n, p in trained.items()})

    trainer.add_callback(ByHand())
    trainer.train()
    assert len(steps) == 4
    for step in steps:
        expected = {n: 0.5 * expected[n] + 0.5 * step[n].double() for n in expected}
    averages = trainer.teacher._average._averages
    assert averages.keys() == expected.keys()
    for name, average in averages.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=3e-7, atol=3e-7)
    last = steps[-1]
    assert max((expected[n] - last[n]).abs().max() for n in expected) > 1e-3
    # And it is what teaches: a model with these weights has the same targets.
    other = second_model(trainer)
    batch = make_batch(trainer)
    with torch.no_grad():
        logits = other(**batch.model_inputs).logits[:, :-1][batch.predicts_BT]
    torch.testing.assert_close(trainer.teacher.targets(batch).scores.logits(), logits, rtol=1e-5, atol=1e-5)
    assert not any("average" in name for name in trainer.model.state_dict())


def test_an_average_of_half_precision_weights_is_kept_in_float32_and_used_in_theirs(tmp_path):
    student = tiny.make_qwen3(seed=1).bfloat16()
    extra = {"teacher": SelfTeacher("ema", 0.999)}
    trainer = make_trainer(tmp_path, student, None, max_steps=3, sft_alpha=0.5, learning_rate=1e-2, extra=extra)
    before = student.lm_head.weight.detach().float().clone()
    trainer.train()
    average = trainer.teacher._average._averages["model.embed_tokens.weight"]
    assert average.dtype == torch.float32
    assert 0 < (average - before).abs().max() < 1e-3  # less than a step of bfloat16, for most
    assert trainer.teacher.targets(make_batch(trainer)).scores.head.weight.dtype == torch.bfloat16
    assert student.lm_head.weight.dtype == torch.bfloat16


def saving(**kwargs):
    return {
        "max_steps": 4,
        "sft_alpha": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
        **kwargs,
    }


@pytest.mark.parametrize("lora", [True, False])
def test_a_resumed_run_has_the_same_average_and_weights_bit_for_bit(tmp_path, lora):
    torch.manual_seed(0)
    whole = trainer_with(tmp_path, "ema", lora=lora, **saving())
    whole.train()
    torch.manual_seed(0)
    resumed = trainer_with(tmp_path / "other", "ema", lora=lora, **saving(save_strategy="no"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    averages, again = (trainer.teacher._average._averages for trainer in (whole, resumed))
    assert all(torch.equal(averages[n], again[n]) for n in averages)
    assert max((averages[n] - dict(whole.model.named_parameters())[n]).abs().max() for n in averages) > 1e-3


def test_a_checkpoint_without_the_average_or_with_another_one_is_an_error(tmp_path):
    trainer_with(tmp_path, "base", **saving()).train()
    resumed = trainer_with(tmp_path / "other", "ema", **saving())
    with pytest.raises(CheckpointError, match=r"teacher_average.safetensors cannot be read .*weights: ema"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    save_file({"something": torch.zeros(2)}, tmp_path / "checkpoint-2" / FILE)
    with pytest.raises(CheckpointError, match="the average of other weights"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_average_of_a_full_student_says_its_size_once_and_is_not_part_of_what_is_saved(tmp_path, caplog):
    trainer = trainer_with(tmp_path, "ema", lora=False, **saving())
    with caplog.at_level("INFO", logger="kdtrain"):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    said = [r.message for r in caplog.records if "moving average" in r.message]
    assert len(said) == 1
    assert "0.2 MiB in float32" in said[0] or "0.1 MiB in float32" in said[0]
    assert (tmp_path / "checkpoint-2" / FILE).exists()
    assert not (tmp_path / "saved" / FILE).exists()


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["base", "live", "ema"])
def test_the_students_own_answers_are_scored_by_its_other_weights(tmp_path, weights):
    trainer = trainer_with(tmp_path, weights, lmbda=1.0, max_steps=2, learning_rate=1e-2)
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["on_policy_fraction"] for record in records] == [1.0, 1.0]
    assert all(0 <= record["llm_kd_loss"] < 1 for record in records)


@pytest.mark.parametrize("weights", ["base", "ema"])
def test_answers_of_seq_kd_are_written_with_the_teachers_weights(tmp_path, weights):
    """Those of a second model with the same weights, and not the student's."""
    trainer = moved(trainer_with(tmp_path, weights, seq_kd=True))
    trainer.teacher.begin()
    if weights == "ema":
        for average in trainer.teacher._average._averages.values():
            average.mul_(-1)
    batch, before = make_batch(trainer), state_of(trainer.model)
    (answered,) = generated(trainer, [batch], "teacher", trainer.options)
    assert_same_state(trainer.model, before)
    trainer.teacher = LocalTeacher(second_model(trainer))
    trainer.teacher_model = trainer.teacher.module
    (expected,) = generated(trainer, [batch], "teacher", trainer.options)
    assert torch.equal(answered.labels, expected.labels)
    (own,) = generated(trainer, [batch], "student", trainer.options)
    assert not torch.equal(own.labels, answered.labels)


def second_model(trainer):
    """A model of its own with the weights of a self teacher: base, or an average."""
    model, config = adapted({"tie_word_embeddings": False}, modules_to_save=["lm_head"], dropout=0.5)
    if trainer.teacher.weights == "base":
        return model  # as it was loaded
    if any("lora" in name for name, _ in trainer.model.named_parameters()):
        model = get_peft_model(model, config)
    averages = trainer.teacher._average._averages
    model.load_state_dict({name: averages.get(name, p) for name, p in trainer.model.state_dict().items()})
    return model.eval()


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_a_student_without_an_adapter_cannot_be_its_own_base(tmp_path):
    with pytest.raises(ConfigError, match="the student without its adapter, and this student has none"):
        trainer_with(tmp_path, "base", lora=False)


def test_weights_that_are_trained_beside_the_adapter_would_change_the_base(tmp_path):
    _, config = adapted(bias="all", target_modules=["q_proj"])
    student = tiny.make_qwen3(seed=1, attention_bias=True)
    with pytest.raises(ConfigError, match=r"8 tensors are trained that are no part of it .the first is .*bias"):
        make_trainer(tmp_path, student, None, extra={"peft_config": config, "teacher": SelfTeacher()})
    tokens = tiny.lora_config(rank=4, alpha=8, dropout=0.0, trainable_token_indices=[5, 6], target_modules=["q_proj"])
    make_trainer(tmp_path, tiny.make_qwen3(seed=1), None, extra={"peft_config": tokens, "teacher": SelfTeacher()})


@pytest.mark.parametrize(("arguments", "message"), [(("old",), "none of base, live, ema"), (("ema", 1.0), "below 1")])
def test_arguments_that_are_none_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SelfTeacher(*arguments)


def test_features_of_the_same_modules_are_not_compared(tmp_path):
    visual = {"enabled": True, "weight": 0.1, "targets": {"aligner": {"module": "aligner"}}}
    with pytest.raises(ValueError, match="Visual KD needs a teacher that is a model of its own"):
        trainer_with(tmp_path, "base", visual_kd=visual)


# ---- answers before training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", tiny.first_quick(["ema", "base"]))
def test_answers_before_training_are_those_of_the_model_as_it_was_loaded(project, monkeypatch, weights):
    monkeypatch.chdir(project)
    options = [
        "data.train={path: train.jsonl, answers: teacher}", "rlhf.max_new_tokens=3", "training.max_steps=1",
        "tuner.train_type=lora", "training.save_strategy=steps",
    ]  # fmt: skip
    itself = ["rlhf.teacher.backend=self", f"rlhf.teacher.weights={weights}"]
    kept = []
    for run, teacher in (("one", ["rlhf.teacher_model=./student"]), ("two", itself)):
        kdtrain.fit("config.yaml", [*options, *teacher, f"training.output_dir={run}"], quiet=True)
        files = sorted((project / run / "teacher_answers").rglob("rank*.jsonl"))
        kept.append([json.loads(line)["answer"] for file in files for line in file.read_text().splitlines()])
    assert kept[0] == kept[1]
    assert len(kept[0]) == len(tiny.CHATS)
    told = []
    monkeypatch.setattr("kdtrain.cli.progress.ConsoleReporter.answers", lambda self, done, total: told.append(done))
    again = [*options, *itself, "training.output_dir=two", "training.max_steps=2"]
    kdtrain.fit("config.yaml", again, resume="auto", quiet=True)
    assert not told  # they are kept


def test_half_precision_changes_nothing_about_the_equality_with_a_second_model(tmp_path):
    found = []
    for itself in (False, True):
        student, config = adapted({"tie_word_embeddings": False}, modules_to_save=["lm_head"])
        extra = {"peft_config": config, "teacher": SelfTeacher() if itself else None}
        second = None if itself else copy.deepcopy(student)
        trainer = moved(make_trainer(tmp_path, student, second, sft_alpha=0.3, bf16=True, extra=extra))
        trainer.model = trainer.accelerator.prepare_model(trainer.model)  # autocast around its forward
        found.append(loss_and_gradient(trainer, make_batch(trainer)))
    (loss, gradients), (own_loss, own_gradients) = found
    assert torch.equal(loss, own_loss)
    assert all(torch.equal(gradients[n], own_gradients[n]) for n in gradients)


def test_what_autocast_has_cast_of_one_set_of_weights_is_not_used_for_the_other(tmp_path):
    trainer = trainer_with(tmp_path, "ema", lora=False, sft_alpha=0.3)
    trainer.teacher.begin()
    for average in trainer.teacher._average._averages.values():
        average.mul_(-0.5)
    batch, student = make_batch(trainer), trainer.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = student(**batch.model_inputs).logits
        trainer.teacher.targets(batch)
        assert torch.equal(student(**batch.model_inputs).logits, alone)
