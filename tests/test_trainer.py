"""GKDTrainerWithMetrics: what enters the loss, what is logged, and that neither depends on how the work is split."""

import dataclasses
import json
import re
import types

import datasets
import pytest
import torch
from peft import LoraConfig
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdtrain.data import Collator
from kdtrain.errors import NonFiniteError, PreflightError, VocabularyError
from kdtrain.losses import TopKLogprobs
from kdtrain.teachers import Targets, Teacher
from kdtrain.trainer import GKDTrainerWithMetrics, objective
from tests import tiny
from tests.test_losses import reference

KNOBS = ("llm_kd_weight", "sft_alpha", "divergence", "kd_temperature", "eval_kd", "tail", "visual_kd", "on_policy")
KNOBS += ("samples_per_prompt", "select", "select_regex", "generation", "disable_dropout", "log_completions_steps")
KNOBS += (
    "hidden_kd",
    "token_selection",
    "token_weights",
    "cross_tokenizer",
    "early_stopping_patience",
    "teacher_placement",
    "teacher_quantization",
    "per_device_train_tokens",
)


def make_args(folder, **kwargs):
    knobs = {name: kwargs.pop(name) for name in KNOBS if name in kwargs}
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "lmbda": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "max_new_tokens": 6,
    }
    args = GKDConfig(**{**defaults, **kwargs})
    for name, value in knobs.items():
        setattr(args, name, value)
    return args


def make_trainer(folder, student=None, teacher=None, rows=None, tokenizer=None, extra=None, **kwargs):
    return GKDTrainerWithMetrics(
        student if student is not None else tiny.make_qwen3(seed=1),
        teacher,
        make_args(folder, **kwargs),
        train_dataset=rows or tiny.CHATS,
        **({"processing_class": tokenizer or tiny.make_tokenizer()} | (extra or {})),
    )


def make_batch(trainer, rows=None, **inputs):
    batch = trainer.data_collator(rows or tiny.CHATS[:3])
    return dataclasses.replace(batch, model_inputs={**batch.model_inputs, **inputs})


def with_positions(batch):
    """A batch with an input of the model that nothing is known of."""
    ids = batch.model_inputs["input_ids"]
    return dataclasses.replace(
        batch, model_inputs={**batch.model_inputs, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    )


def expected_terms(student, teacher, batch, beta=0.5, temperature=1.0):
    """jsd and ce per supervised token, in float64, aligned by an explicit loop over positions."""
    with torch.no_grad():
        inputs = dict(batch.model_inputs)
        student_logits, teacher_logits = student(**inputs).logits, teacher(**inputs).logits
    jsd, ce = [], []
    for row in range(batch.labels.shape[0]):
        for t in range(batch.labels.shape[1] - 1):
            label = batch.labels[row, t + 1]
            if label == -100:
                continue
            jsd.append(reference(student_logits[row, t], teacher_logits[row, t], beta, temperature))
            ce.append(-torch.log_softmax(student_logits[row, t].double(), -1)[label])
    return torch.stack(jsd).mean().item(), torch.stack(ce).mean().item(), len(ce)


def refuse_teacher(*args, **kwargs):
    raise AssertionError("the teacher's forward was run")


# ---- the gating of the terms: scenarios of the knob's specification --------------------------------------------------


def test_positive_weight_with_teacher_attached(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, llm_kd_weight=0.5, sft_alpha=0.3)
    batch = make_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    jsd, ce, _ = expected_terms(student, teacher, batch)
    assert loss.item() == pytest.approx(0.5 * jsd + 0.3 * ce, rel=1e-5)
    assert trainer._metrics["train"]["llm_kd_loss"][-1].item() == pytest.approx(0.5 * jsd, rel=1e-5)
    assert trainer._metrics["train"]["sft_loss"][-1].item() == pytest.approx(0.3 * ce, rel=1e-5)


def test_weighted_value_surfaces_in_the_logs_and_no_field_exposes_the_unweighted_term(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, llm_kd_weight=0.5, rows=tiny.CHATS[:2])
    batch = make_batch(trainer, tiny.CHATS[:2])
    jsd, _, _ = expected_terms(student, teacher, batch)
    trainer.train()
    record = trainer.state.log_history[0]
    assert record["llm_kd_loss"] == pytest.approx(0.5 * jsd, rel=1e-5)
    assert [key for key, value in record.items() if value == pytest.approx(jsd, rel=1e-4)] == []


def test_zero_weight_disables_lm_kd_and_ce_enters_with_weight_one(tmp_path, student, teacher, monkeypatch):
    trainer = make_trainer(tmp_path, student, teacher, llm_kd_weight=0.0, sft_alpha=0.3)
    monkeypatch.setattr(trainer, "_run_teacher_forward", refuse_teacher)
    batch = make_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    _, ce, _ = expected_terms(student, teacher, batch)
    assert loss.item() == pytest.approx(ce, rel=1e-5)
    assert "llm_kd_loss" not in trainer._metrics["train"]
    trainer.train()
    assert all("llm_kd_loss" not in record for record in trainer.state.log_history)


def test_teacher_forward_is_skipped_when_kd_is_inactive_and_no_teacher_is_kept(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, llm_kd_weight=0.0)
    assert trainer.teacher is None
    assert trainer.teacher_model is None


def test_a_named_teacher_is_not_loaded_when_kd_is_inactive(tmp_path, student, monkeypatch):
    monkeypatch.setattr("kdtrain.trainer.construction.build_teacher", refuse_teacher)
    trainer = make_trainer(tmp_path, student, "/no/such/teacher", llm_kd_weight=0.0)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_teacher_is_required_when_kd_is_requested(tmp_path, student):
    with pytest.raises(ValueError, match="needs a teacher"):
        make_trainer(tmp_path, student, None, llm_kd_weight=0.5)


def test_none_is_a_teacher_where_no_kd_is_active(tmp_path, student):
    make_trainer(tmp_path, student, None, llm_kd_weight=0.0).train()


def test_negative_weight_is_refused(tmp_path, student, teacher):
    with pytest.raises(ValueError, match="non-negative"):
        make_trainer(tmp_path, student, teacher, llm_kd_weight=-0.1)


def test_default_weight_is_one(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher)
    batch = make_batch(trainer)
    jsd, _, _ = expected_terms(student, teacher, batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(jsd, rel=1e-5)


def give_eyes(model, seed):
    """A vision path in the backbone: enough of a vision-language model to have features."""
    torch.manual_seed(seed)
    model.aligner = torch.nn.Linear(4, 8)
    original = model.model.forward

    def forward(self, *args, pixel_values=None, **inputs):
        if pixel_values is not None:
            model.aligner(pixel_values)
        return original(*args, **inputs)

    model.model.forward = types.MethodType(forward, model.model)


VISUAL = {"enabled": True, "weight": 0.1, "distance": "mse", "targets": {"aligner": {"module": "aligner"}}}


def visual_trainer(folder, **kwargs):
    student, teacher = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48)
    for seed, model in ((3, student), (4, teacher)):
        give_eyes(model, seed)
    return make_trainer(folder, student, teacher, **{"visual_kd": VISUAL, **kwargs})


def test_visual_kd_remains_active_when_lm_kd_is_disabled(tmp_path):
    trainer = visual_trainer(tmp_path, llm_kd_weight=0.0, sft_alpha=0.3)
    batch = make_batch(trainer, pixel_values=torch.randn(3, 5, 4))
    loss = trainer.compute_loss(trainer.model, batch)
    _, ce, _ = expected_terms(trainer.model, trainer.teacher_model, batch)
    features = [model.aligner(batch.model_inputs["pixel_values"]) for model in (trainer.model, trainer.teacher_model)]
    visual = 0.1 * (features[0] - features[1]).square().mean().item()
    assert visual > 0.01
    assert loss.item() == pytest.approx(ce + visual, rel=1e-5)
    metrics = trainer._metrics["train"]
    assert metrics["vision_kd_loss"][-1].item() == pytest.approx(visual, rel=1e-5)
    assert metrics["vision_kd_loss_aligner"][-1].item() == pytest.approx(visual, rel=1e-5)
    assert "llm_kd_loss" not in metrics
    loss.backward()
    assert trainer.model.aligner.weight.grad.abs().sum() > 0
    assert trainer.teacher_model.aligner.weight.grad is None


def test_a_text_only_batch_has_no_visual_term_and_leaves_no_hook(tmp_path):
    trainer = visual_trainer(tmp_path, llm_kd_weight=0.0)
    trainer.compute_loss(trainer.model, make_batch(trainer))
    assert "vision_kd_loss" not in trainer._metrics["train"]
    assert not trainer.model.aligner._forward_hooks


def test_hooks_are_gone_after_a_failing_forward(tmp_path, monkeypatch):
    trainer = visual_trainer(tmp_path, llm_kd_weight=0.0)
    monkeypatch.setattr(trainer, "_run_teacher_forward", refuse_teacher)
    with pytest.raises(AssertionError):
        trainer.compute_loss(trainer.model, make_batch(trainer, pixel_values=torch.randn(3, 5, 4)))
    assert not trainer.model.aligner._forward_hooks
    assert not trainer.teacher_model.aligner._forward_hooks


def test_an_unknown_module_and_unequal_features_are_errors_that_name_the_target(tmp_path):
    wrong = VISUAL | {"targets": {"aligner": {"student_module": "nowhere", "teacher_module": "aligner"}}}
    trainer = visual_trainer(tmp_path, llm_kd_weight=0.0, visual_kd=wrong)
    with pytest.raises(PreflightError, match=r"aligner.*student has no module 'nowhere'"):
        trainer.compute_loss(trainer.model, make_batch(trainer, pixel_values=torch.randn(3, 5, 4)))
    trainer = visual_trainer(tmp_path, llm_kd_weight=0.0)
    trainer.teacher_model.aligner = torch.nn.Linear(4, 9)
    with pytest.raises(PreflightError, match=r"aligner.*\(3, 5, 8\).*\(3, 5, 9\)"):
        trainer.compute_loss(trainer.model, make_batch(trainer, pixel_values=torch.randn(3, 5, 4)))


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_beta_and_kd_temperature_reach_the_loss(tmp_path, student, teacher, beta, temperature):
    trainer = make_trainer(tmp_path, student, teacher, beta=beta, kd_temperature=temperature)
    batch = make_batch(trainer)
    jsd, _, _ = expected_terms(student, teacher, batch, beta, temperature)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(jsd, rel=1e-5)


@pytest.mark.parametrize("make", [tiny.make_llama, tiny.make_gemma2])
def test_other_families_match_the_reference(tmp_path, make):
    student, teacher = make(seed=1), make(seed=2)
    trainer = make_trainer(tmp_path, student, teacher, sft_alpha=0.5)
    batch = make_batch(trainer)
    jsd, ce, _ = expected_terms(student, teacher, batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(jsd + 0.5 * ce, rel=1e-5)


def test_everything_a_forward_takes_reaches_both_models_and_our_own_keys_reach_neither(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher)
    seen = {}

    def recorder(name, original):
        def forward(self, *args, **kwargs):
            seen[name] = set(kwargs)
            return original(*args, **kwargs)

        return forward

    for name, model in (("student", student.model), ("teacher", teacher.model)):
        model.forward = types.MethodType(recorder(name, model.forward), model)
    batch = with_positions(make_batch(trainer))
    trainer.compute_loss(trainer.model, batch)
    assert seen["student"] == seen["teacher"] == {"input_ids", "attention_mask", "position_ids", "use_cache"}


def test_the_teacher_is_frozen_whatever_state_it_comes_in(tmp_path, student, teacher):
    teacher.train().requires_grad_(True)
    trainer = make_trainer(tmp_path, student, teacher)
    before = [p.clone() for p in teacher.parameters()]
    trainer.train()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_padding_does_not_change_loss_or_gradient(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, sft_alpha=0.5)
    batch = make_batch(trainer)
    results = []
    for extra in (0, 9):
        tensors = {**batch.model_inputs, "labels": batch.labels}
        padded = {
            key: torch.nn.functional.pad(tensors[key], (0, extra), value=fill)
            for key, fill in (("input_ids", 3), ("attention_mask", 0), ("labels", -100))
        }
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, padded)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert (results[0][1] - results[1][1]).norm() <= 1e-5 * results[0][1].norm()


def test_a_batch_without_supervised_tokens_is_zero_with_a_gradient_path(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, sft_alpha=0.5)
    batch = make_batch(trainer).without_labels()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in trainer.model.parameters())
    assert any(p.grad is not None for p in trainer.model.parameters())


def test_rows_without_ce_are_supervised_by_the_teacher_alone(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, sft_alpha=1.0)
    rows = [{**row, "ce": i != 1} for i, row in enumerate(tiny.CHATS[:3])]
    batch = make_batch(trainer, rows)
    assert batch.rows.ce.tolist() == [True, False, True]
    loss = trainer.compute_loss(trainer.model, batch)
    jsd, _, n = expected_terms(student, teacher, batch)
    _, ce, m = expected_terms(student, teacher, make_batch(trainer, [rows[0], rows[2]]))
    assert loss.item() == pytest.approx(jsd + ce * m / n, rel=1e-5)


def test_mixture_of_experts_keeps_its_load_balancing_loss(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    student = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=320, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
            router_aux_loss_coef=0.1, decoder_sparse_step=1, eos_token_id=2, pad_token_id=3,
        )
    )  # fmt: skip
    trainer = make_trainer(tmp_path, student, tiny.make_qwen3(seed=2), router_aux_loss_coef=0.1, rows=tiny.CHATS[:2])
    trainer.train()
    record = trainer.state.log_history[0]
    assert record["aux_loss"] > 0.05
    assert record["loss"] == pytest.approx(record["llm_kd_loss"] + record["aux_loss"], rel=1e-5)


# ---- vocabulary ------------------------------------------------------------------------------------------------------


def test_padding_of_the_embedding_takes_no_part_on_either_side(tmp_path, tokenizer):
    student, wide = tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, vocab_size=384)
    folder = tiny.save_model(wide, tokenizer, tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "run", student, folder, tokenizer=tokenizer, sft_alpha=0.5)
    assert trainer.vocabulary.shared == 320
    batch = make_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    with torch.no_grad():
        wide.lm_head.weight[320:] = 50.0  # would dominate if it took part
        trainer.teacher_model.lm_head.weight[320:] = 50.0
    poisoned = trainer.compute_loss(trainer.model, batch)
    assert loss.isfinite()
    # The embedding is tied, so only the head's own columns are compared: no padding id occurs in the input.
    assert poisoned.item() == pytest.approx(loss.item(), rel=1e-6)


def test_unequal_vocabularies_are_refused_with_both_sizes(tmp_path, student):
    with pytest.raises(ValueError, match=r"320 logits and the teacher 400"):
        make_trainer(tmp_path, student, tiny.make_qwen3(seed=2, vocab_size=400))


def test_equal_sizes_do_not_pass_for_equal_vocabularies(tmp_path, student, tokenizer):
    other = tiny.make_tokenizer()
    other.add_tokens(["<extra>"])
    folder = tiny.save_model(tiny.make_qwen3(seed=2), other, tmp_path / "teacher")
    with pytest.raises(VocabularyError, match="1 token ids differ"):
        make_trainer(tmp_path / "run", student, folder, tokenizer=tokenizer)


class TopKTeacher(Teacher):
    """What a served teacher will be: no module here, the most likely tokens only."""

    def __init__(self, model, k):
        self.model, self.k, self.vocab_size = model.eval(), k, model.config.vocab_size

    def targets(self, batch):
        with torch.no_grad():
            logits = self.model(**batch.teacher_inputs).logits[:, :-1][batch.predicts_BT]
        logprobs, indices = torch.log_softmax(logits, -1).topk(self.k)
        return Targets(TopKLogprobs(indices, logprobs))


def test_a_teacher_that_names_its_most_likely_tokens_works_through_the_trainer(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, None, sft_alpha=0.3, extra={"teacher": TopKTeacher(teacher, 320)})
    batch = make_batch(trainer)
    jsd, ce, _ = expected_terms(student, teacher, batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(jsd + 0.3 * ce, rel=1e-4)
    values = {}
    for tail in ("bucket", "renormalize"):
        trainer = make_trainer(tmp_path, student, None, tail=tail, extra={"teacher": TopKTeacher(teacher, 5)})
        values[tail] = trainer.compute_loss(trainer.model, batch).item()
    assert values["bucket"] != values["renormalize"]
    with pytest.raises(ValueError, match="seq_kd"):
        make_trainer(tmp_path, student, None, seq_kd=True, extra={"teacher": TopKTeacher(teacher, 5)})


def test_a_teacher_resized_later_is_refused_at_the_step(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher)
    trainer.teacher_model.resize_token_embeddings(400)
    with pytest.raises(VocabularyError, match=r"student has 320 logits and the teacher 400"):
        trainer.compute_loss(trainer.model, make_batch(trainer))


# ---- generation ------------------------------------------------------------------------------------------------------


def windows(trainer, count):
    """The batches of `count` windows as get_batch_samples prepares them."""
    trainer.model.train()
    loader = iter(trainer.get_train_dataloader())
    result = []
    for step in range(count):
        trainer.state.global_step = step
        result.append(trainer.get_batch_samples(loader, 1, torch.device("cpu")))
    return result


def test_lmbda_one_generates_every_window_and_zero_none(tmp_path, student, teacher):
    for lmbda, expected in ((0.0, None), (1.0, "student")):
        trainer = make_trainer(tmp_path, student, teacher, lmbda=lmbda, rows=tiny.CHATS * 4)
        assert [batches[0].generated_by for batches, _ in windows(trainer, 10)] == [expected] * 10


def test_the_denominator_counts_the_generated_tokens(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, lmbda=1.0)
    ((batches, num_items),) = windows(trainer, 1)
    assert num_items == sum((batch.labels != -100).sum() for batch in batches)
    original = make_batch(trainer, tiny.CHATS[:2])
    assert not torch.equal(batches[0].labels, original.labels)


def test_generated_rows_keep_their_prompt_and_supervise_the_completion_only(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, lmbda=1.0, train_sampling_strategy="sequential")
    ((batches, _),) = windows(trainer, 1)
    original = make_batch(trainer, tiny.CHATS[:2])
    batch = batches[0]
    for row in range(2):
        n = original.rows.prompt_lengths[row]
        length = batch.model_inputs["attention_mask"][row].sum()
        assert torch.equal(batch.model_inputs["input_ids"][row, :n], original.model_inputs["input_ids"][row, :n])
        assert (batch.labels[row, :n] == -100).all()
        assert torch.equal(batch.labels[row, n:length], batch.model_inputs["input_ids"][row, n:length])
        assert (batch.labels[row, length:] == -100).all()
        assert 1 <= length - n <= 6


def test_ce_is_left_out_on_the_students_own_samples_and_kept_on_the_teachers(tmp_path, student, teacher):
    own = make_trainer(tmp_path, student, teacher, lmbda=1.0, sft_alpha=1.0)
    own.train()
    record = own.state.log_history[0]
    assert record["sft_loss"] == 0
    assert record["loss"] == pytest.approx(record["llm_kd_loss"], rel=1e-6)
    assert record["on_policy_fraction"] == 1
    taught = make_trainer(tmp_path, tiny.make_qwen3(seed=1), teacher, lmbda=0.0, seq_kd=True, sft_alpha=1.0)
    taught.train()
    assert taught.state.log_history[0]["sft_loss"] > 0
    assert taught.state.log_history[0]["on_policy_fraction"] == 0


def test_seq_kd_trains_on_what_the_teacher_says(tmp_path, student, teacher):
    with torch.no_grad():  # a teacher that only ever says token 70, with certainty
        for p in teacher.parameters():
            p.zero_()
        teacher.lm_head.weight = torch.nn.Parameter(torch.zeros_like(teacher.lm_head.weight))
        teacher.model.norm.weight.fill_(1)
        teacher.model.embed_tokens.weight = torch.nn.Parameter(torch.ones_like(teacher.model.embed_tokens.weight))
        teacher.lm_head.weight[70] = 10
    trainer = make_trainer(tmp_path, student, teacher, lmbda=0.0, seq_kd=True)
    ((batches, _),) = windows(trainer, 1)
    said = batches[0].labels[batches[0].labels != -100]
    assert (said == 70).all()
    assert batches[0].generated_by == "teacher"


def test_generation_is_the_same_when_it_is_repeated_and_differs_between_steps(tmp_path, student, teacher):
    first, again = (
        windows(make_trainer(tmp_path, student, teacher, lmbda=1.0, train_sampling_strategy="sequential"), 2)
        for _ in range(2)
    )
    for (a, _), (b, _) in zip(first, again, strict=True):
        assert torch.equal(a[0].model_inputs["input_ids"], b[0].model_inputs["input_ids"])
    trainer = make_trainer(tmp_path, student, teacher, lmbda=1.0, rows=tiny.CHATS[:1] * 4)
    (a, _), (b, _) = windows(trainer, 2)
    assert a[0].model_inputs["input_ids"].tolist() != b[0].model_inputs["input_ids"].tolist()


def test_generation_leaves_the_global_random_state_and_the_mode_alone(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, lmbda=1.0)
    loader = iter(trainer.get_train_dataloader())
    batch = next(loader)
    trainer.model.train()
    before = torch.get_rng_state()
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    assert trainer.model.training


def test_samples_are_not_bent_by_the_models_own_generation_config(tmp_path, student, teacher):
    plain = make_trainer(tmp_path, student, teacher, lmbda=1.0, train_sampling_strategy="sequential")
    ((expected, _),) = windows(plain, 1)
    bent = tiny.make_qwen3(seed=1)
    bent.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, min_p=0.9, do_sample=True)
    trainer = make_trainer(tmp_path, bent, teacher, lmbda=1.0, train_sampling_strategy="sequential")
    ((batches, _),) = windows(trainer, 1)
    assert torch.equal(batches[0].model_inputs["input_ids"], expected[0].model_inputs["input_ids"])
    assert bent.generation_config.repetition_penalty == 5.0  # the model keeps its own


def test_samples_stop_where_the_chat_template_ends_a_turn(tmp_path, teacher):
    student = tiny.make_qwen3(seed=1, eos_token_id=0)
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # a base model with a chat template
    trainer = make_trainer(tmp_path, student, teacher, tokenizer=tokenizer, lmbda=1.0)
    assert set(student.generation_config.eos_token_id) == {0, 2}
    with torch.no_grad():  # says <|im_end|> whatever it is asked
        student.model.norm.weight.zero_()
        student.lm_head = torch.nn.Linear(32, 320)
        student.lm_head.bias.zero_()
        student.lm_head.bias[2] = 100
    ((batches, _),) = windows(trainer, 1)
    assert batches[0].labels[batches[0].labels != -100].tolist() == [2, 2]


def test_padding_of_the_embedding_is_never_sampled(tmp_path, tokenizer):
    wide = tiny.make_qwen3(seed=1, vocab_size=4000)
    folder = tiny.save_model(tiny.make_qwen3(seed=2), tokenizer, tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "run", wide, folder, lmbda=1.0, tokenizer=tokenizer)
    ((batches, _),) = windows(trainer, 1)
    assert batches[0].model_inputs["input_ids"].max() < 320
    trainer.train()


def test_answers_that_reached_the_limit_are_known_as_cut(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, lmbda=1.0, rows=tiny.CHATS * 4, gradient_accumulation_steps=4)
    loader = iter(trainer.get_train_dataloader())
    batches, _ = trainer.get_batch_samples(loader, 4, torch.device("cpu"))
    seen = set()
    for batch in batches:
        for labels, cut in zip(batch.labels, batch.rows.cut, strict=True):
            answer = labels[labels != -100].tolist()
            assert cut == (answer[-1] != 2)
            assert len(answer) == 6 if cut else len(answer) <= 6
            seen.add(cut)
    assert True in seen


def test_a_sampler_writes_the_students_answers_in_its_place(tmp_path, student, teacher):
    class Sampler:
        def write(self, prompts, config, seeds, images):
            self.asked = prompts, config.max_new_tokens, seeds, images
            return [[70 + i, 2] for i in range(len(prompts))]

    trainer = make_trainer(
        tmp_path, student, teacher, lmbda=1.0, train_sampling_strategy="sequential", gradient_accumulation_steps=2
    )
    trainer.sampler = Sampler()
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    prompts, most, seeds, images = trainer.sampler.asked
    assert (len(prompts), most, len(set(seeds)), images) == (4, 6, 4, [()] * 4)
    given = [(ids, labels) for b in batches for ids, labels in zip(b.model_inputs["input_ids"], b.labels, strict=True)]
    written = {tuple(ids[labels == -100].tolist()): labels[labels != -100].tolist() for ids, labels in given}
    for i, prompt in enumerate(prompts):
        assert any(key[: len(prompt)] == tuple(prompt) and one == [70 + i, 2] for key, one in written.items())


@pytest.mark.parametrize(("side", "advice"), [("student", "training.learning_rate"), ("teacher", "dtype: float32")])
def test_a_model_that_is_not_finite_while_it_writes_is_named_with_the_row(tmp_path, student, teacher, side, advice):
    with torch.no_grad():
        {"student": student, "teacher": teacher}[side].model.norm.weight[3] = torch.nan
    options = {"lmbda": 1.0} if side == "student" else {"lmbda": 0.0, "seq_kd": True}
    trainer = make_trainer(tmp_path, student, teacher, train_sampling_strategy="sequential", **options)
    message = rf"Not finite at step 1, rank 0, while the {side} wrote answers: .* behind the prompt of row .*{advice}"
    with pytest.raises(NonFiniteError, match=message) as caught:
        trainer.train()
    assert caught.value.exit_code == 5


def test_batches_that_generation_cannot_continue_are_refused(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, lmbda=1.0)
    batch = with_positions(make_batch(trainer))
    with pytest.raises(PreflightError, match="position_ids"):
        trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))


# ---- telemetry -------------------------------------------------------------------------------------------------------


def test_metrics_are_token_sums_over_the_window(tmp_path, student, teacher):
    rows = tiny.CHATS[:4]
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        rows=rows,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        sft_alpha=0.3,
    )
    batch = make_batch(trainer, rows)
    jsd, ce, _n = expected_terms(student, teacher, batch)
    with torch.no_grad():
        inputs = dict(batch.model_inputs)
        s, t = (m(**inputs).logits[:, :-1][batch.labels[:, 1:] != -100].double() for m in (student, teacher))
    labels = batch.labels[:, 1:][batch.labels[:, 1:] != -100]
    trainer.train()
    record = trainer.state.log_history[0]
    entropy = [-(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean().item() for x in (s, t)]
    assert record["loss"] == pytest.approx(jsd + 0.3 * ce, rel=1e-5)
    assert record["llm_kd_loss"] == pytest.approx(jsd, rel=1e-5)
    assert record["sft_loss"] == pytest.approx(0.3 * ce, rel=1e-5)
    assert record["token_accuracy"] == pytest.approx((s.argmax(-1) == labels).double().mean().item())
    assert record["teacher_agreement"] == pytest.approx((s.argmax(-1) == t.argmax(-1)).double().mean().item())
    assert record["student_entropy"] == pytest.approx(entropy[0], rel=1e-5)
    assert record["teacher_entropy"] == pytest.approx(entropy[1], rel=1e-5)
    assert record["tokens_per_second"] > 0
    assert record["peak_memory_gib"] > 0.05
    assert not any("/" in key for key in record)


def test_a_record_over_several_steps_is_the_mean_of_the_steps(tmp_path):
    def run(logging_steps):
        trainer = make_trainer(
            tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), sft_alpha=0.3, max_steps=4,
            logging_steps=logging_steps, rows=tiny.CHATS * 2,
        )  # fmt: skip
        trainer.train()
        return [record for record in trainer.state.log_history if "loss" in record]

    single, joint = run(1), run(4)
    for key in ("loss", "llm_kd_loss", "sft_loss"):
        assert joint[0][key] == pytest.approx(sum(record[key] for record in single) / 4, rel=1e-5)


def evaluate(folder, batch_size, rows, **kwargs):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), per_device_eval_batch_size=batch_size, **kwargs
    )
    return trainer.evaluate(datasets.Dataset.from_list(rows))


def test_evaluation_is_a_mean_over_tokens_whatever_the_batch_size(tmp_path, student):
    results = [evaluate(tmp_path, size, tiny.CHATS, sft_alpha=0.3) for size in (1, 4, 6)]
    trainer = make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2))
    jsd, ce, _ = expected_terms(trainer.model, trainer.teacher_model, make_batch(trainer, tiny.CHATS))
    for result in results:
        assert result["eval_loss"] == pytest.approx(jsd + 0.3 * ce, rel=1e-5)
        assert result["eval_llm_kd_loss"] == pytest.approx(jsd, rel=1e-5)
        assert result["eval_sft_loss"] == pytest.approx(0.3 * ce, rel=1e-5)
        assert "eval_teacher_agreement" in result


@pytest.mark.parametrize("as_a_user", [False, True])
def test_a_stream_of_rows_is_evaluated_as_the_rows_are(tmp_path, as_a_user):
    trainer = make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), per_device_eval_batch_size=4)
    rows, own = datasets.Dataset.from_list(tiny.CHATS), trainer.data_collator
    expected = trainer.evaluate(rows)
    if as_a_user:
        trainer.data_collator = lambda rows: {**own(rows).model_inputs, "labels": own(rows).labels}
    result = trainer.evaluate(rows.to_iterable_dataset())
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert result["eval_samples_per_second"] > result["eval_steps_per_second"] > 0


def test_eval_kd_false_reports_ce_only_without_the_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(GKDTrainerWithMetrics, "_run_teacher_forward", refuse_teacher)
    result = evaluate(tmp_path, 4, tiny.CHATS, eval_kd=False)
    assert "eval_llm_kd_loss" not in result
    assert result["eval_loss"] == result["eval_sft_loss"] > 1


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_nan_stops_the_run_before_the_optimizer_step(tmp_path, student, teacher, where):
    trainer = make_trainer(tmp_path, student, teacher, max_steps=3, rows=tiny.CHATS * 2)
    before = [p.clone() for p in student.parameters()]

    def poison(module, args, output):
        output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    (student if where == "student" else teacher).model.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match=r"step 1, rank 0.*llm_kd_loss"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def make_terms_infinite(monkeypatch):
    original = objective._token_terms
    monkeypatch.setattr(objective, "_token_terms", lambda *args: {k: v / 0 for k, v in original(*args).items()})


def test_an_infinite_loss_with_a_finite_gradient_stops_the_run_too(tmp_path, student, teacher, monkeypatch):
    trainer = make_trainer(tmp_path, student, teacher, max_steps=3)
    make_terms_infinite(monkeypatch)
    with pytest.raises(NonFiniteError, match="llm_kd_loss is not finite"):
        trainer.train()
    assert trainer.state.global_step == 0


def infinite_on_one_rank(folder):
    trainer = make_trainer(folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=tiny.CHATS * 2, max_steps=3)
    if torch.distributed.get_rank() == 1:
        make_terms_infinite(pytest.MonkeyPatch())
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(tmp_path):
    first, second = tiny.run_ranks(infinite_on_one_rank, 2, tmp_path)
    assert first == second  # also the rank that has found nothing knows which it was
    assert "step 1, rank 1" in first
    assert "llm_kd_loss is not finite" in first


def test_evaluation_weighs_images_by_images_and_tokens_by_tokens(tmp_path):
    trainer = visual_trainer(tmp_path, llm_kd_weight=0.0, per_device_eval_batch_size=2)
    rows = trainer.data_collator
    pixels = torch.randn(3, 5, 4)
    inputs = [{"pixel_values": pixels[:2]}, {}, {"pixel_values": pixels[2:]}]
    batches = [make_batch(trainer, tiny.CHATS[i : i + 2], **inputs[i // 2]) for i in (0, 2, 4)]
    trainer.model.eval()
    trainer._metrics["eval"].clear()
    for batch in batches:
        trainer.compute_loss(trainer.model, batch)
    from kdtrain.trainer import metrics

    reduced = metrics.reduce_metrics(trainer._metrics["eval"], trainer.accelerator, token_weighted=True)
    result = metrics.evaluation_metrics(reduced)
    expected = 0.1 * (trainer.model.aligner(pixels) - trainer.teacher_model.aligner(pixels)).square().mean()
    assert result["vision_kd_loss"] == pytest.approx(expected.item(), rel=1e-5)
    _, ce, _ = expected_terms(trainer.model, trainer.teacher_model, rows(tiny.CHATS))
    assert result["sft_loss"] == pytest.approx(ce, rel=1e-5)


def test_tensorboard_shows_each_prefix_once(tmp_path, student, teacher):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = datasets.Dataset.from_list(tiny.CHATS)
    trainer = GKDTrainerWithMetrics(
        student, teacher,
        make_args(tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=1, sft_alpha=0.1),
        train_dataset=rows, eval_dataset=rows, processing_class=tiny.make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    tags = set()
    for file in tmp_path.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert {"train/llm_kd_loss", "eval/llm_kd_loss", "train/loss", "eval/loss", "train/token_accuracy"} <= tags
    assert not [tag for tag in tags if tag.count("/") != 1 or "eval_" in tag or "train/train" in tag]


# ---- DeepSpeed's rule about autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deepspeed", "config", "expected"),
    [(False, {}, True), (True, {}, False), (True, {"torch_autocast": {"enabled": True}}, True)],
)
def test_autocast_surrounds_the_teacher_only_where_deepspeed_allows(
    tmp_path, student, teacher, monkeypatch, deepspeed, config, expected
):
    trainer = make_trainer(tmp_path, student, teacher)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "bf16")
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", deepspeed)
    plugin = types.SimpleNamespace(deepspeed_config=config) if deepspeed else None
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    seen = []
    teacher.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    batch = make_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert seen == [expected]
    assert loss.dtype == torch.float32


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_the_saved_model_loads_and_holds_no_pickle(tmp_path, student, teacher):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make_trainer(tmp_path, student, teacher)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[70, 71, 72]])
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tiny.CHATML
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_a_hub_token_reaches_no_file(tmp_path, student, teacher, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    trainer = make_trainer(tmp_path, student, teacher, hub_token="hf_secretsecret", save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.args.hub_token is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secretsecret" in path.read_bytes()]


def test_dropout_is_off_in_modules_and_in_functions(tmp_path, teacher):
    student = tiny.make_qwen3(seed=1, attention_dropout=0.5)
    trainer = make_trainer(tmp_path, student, teacher)
    batch = make_batch(trainer)
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch) == trainer.compute_loss(trainer.model, batch)


def test_what_would_count_rows_wrongly_is_refused(tmp_path, student, teacher):
    with pytest.raises(ValueError, match="not available yet"):
        make_trainer(tmp_path, student, teacher, train_sampling_strategy="batch_rebalance")


# ---- with and without logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.make_qwen3, tiny.make_llama, tiny.make_gemma2])
@pytest.mark.parametrize("lora", [None, "all-linear", ["q_proj", "lm_head"]])
def test_the_loss_without_logits_is_the_loss_with_them(tmp_path, make, lora):
    from tests.tiny import lora_config

    options = {"rank": 4, "alpha": 8, "dropout": 0.0, "modules_to_save": None, "use_dora": False}
    extra = lora and {"peft_config": lora_config(**options, target_modules=lora)}
    results = []
    for fused in (True, False):
        torch.manual_seed(0)  # of the adapter
        student = make(seed=1)
        if isinstance(lora, list):  # an adapter on one of two tied matrices is refused
            student.config.tie_word_embeddings = False
            student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
        trainer = make_trainer(tmp_path, student, make(seed=2), sft_alpha=0.3, beta=0.1, extra=extra)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        assert trainer._objective.fused
        trainer._objective = dataclasses.replace(trainer._objective, fused=fused)
        loss = trainer.compute_loss(trainer.model, make_batch(trainer))
        loss.backward()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert (results[0][1] - results[1][1]).norm() <= 1e-5 * results[1][1].norm()


def test_a_head_that_does_more_than_its_config_says_keeps_its_logits(tmp_path, teacher):
    class Odd(type(teacher)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    torch.manual_seed(1)
    student = Odd(teacher.config)
    trainer = make_trainer(tmp_path, student, teacher, sft_alpha=0.3)
    assert not trainer._objective.fused
    batch = make_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    jsd, ce, _ = expected_terms(student, teacher, batch)
    assert loss.item() == pytest.approx(jsd + 0.3 * ce, rel=1e-5)


def test_a_trained_copy_of_the_head_is_the_one_that_is_used(tmp_path, student, teacher):
    from tests.tiny import lora_config

    peft = lora_config(
        rank=4, alpha=8, dropout=0.0, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=False
    )
    trainer = make_trainer(tmp_path, student, teacher, extra={"peft_config": peft}, learning_rate=0.1, max_steps=2)
    assert trainer._objective.fused
    trainer.train()
    batch = make_batch(trainer)
    jsd, _, _ = expected_terms(trainer.model, teacher, batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(jsd, rel=1e-5)


def test_an_adapter_on_the_head_is_trained_through_the_head(tmp_path, teacher, caplog):
    from tests.tiny import lora_config

    student = tiny.make_qwen3(seed=1, tie_word_embeddings=False)
    peft = lora_config(
        rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "lm_head"], modules_to_save=None, use_dora=False
    )
    trainer = make_trainer(tmp_path, student, teacher, extra={"peft_config": peft}, learning_rate=0.1, max_steps=2)
    assert "logits are made in full" not in caplog.text
    assert trainer._objective.fused
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lm_head.lora" in name}
    trainer.train()
    assert len(before) == 2
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name
    batch = make_batch(trainer)
    jsd, _, _ = expected_terms(trainer.model, teacher, batch)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(jsd, rel=1e-5)
    # The same by the definition, on logits that went through the adapter.
    trainer.model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    ids = dict(batch.model_inputs)
    keep = batch.labels[:, 1:] != -100
    ours, theirs = (model(**ids).logits[:, :-1][keep].double() for model in (trainer.model, teacher))
    (reference(ours, theirs.detach(), 0.5, 1.0, "jsd").sum() / keep.sum()).backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_a_quantised_teacher_gives_its_logits(tmp_path, student, caplog):
    """int8 weights of torch's own, head included: no weight that could be multiplied by."""
    teacher = tiny.make_qwen3(seed=2, hidden=48)
    quantised = torch.ao.quantization.quantize_dynamic(teacher, {torch.nn.Linear}, dtype=torch.qint8)
    trainer = make_trainer(tmp_path, student, quantised)
    batch = make_batch(trainer)
    jsd, _, _ = expected_terms(student, quantised, batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(jsd, rel=1e-5)


# ---- invariance ------------------------------------------------------------------------------------------------------

ROWS = [
    *tiny.CHATS,
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "it is " * 9}]},
    tiny.CHATS[2],
]


def train_split(folder, micro_batch, accumulation, **kwargs):
    """One window of all eight rows; the loss terms, the gradient's norm and the weights after an SGD step."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), rows=ROWS, sft_alpha=0.3, optim="sgd",
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation, max_grad_norm=1e9,
        train_sampling_strategy="sequential", learning_rate=0.1, lr_scheduler_type="constant", **kwargs,
    )  # fmt: skip
    trainer.train()
    record = trainer.state.log_history[0]
    wrapped = type(trainer.model_wrapped).__name__
    keys = ("loss", "grad_norm", "llm_kd_loss", "sft_loss", "token_accuracy", "teacher_agreement", "student_entropy")
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {key: record[key] for key in keys} | {
        "world": trainer.accelerator.num_processes,
        "wrapped": wrapped,
        "weights": [weights.double().norm().item(), weights.double().sum().item()],
    }


def test_loss_gradient_and_metrics_do_not_depend_on_how_the_window_is_split(tmp_path):
    expected = train_split(tmp_path / "a", 8, 1)
    results = [train_split(tmp_path / "b", 4, 2), train_split(tmp_path / "c", 1, 8)]
    for micro_batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        ranks = tiny.run_ranks(train_split, 2, tmp_path / f"r{micro_batch}", micro_batch, accumulation)
        for rank in ranks:
            assert rank["world"] == 2
            assert rank["wrapped"] == "DistributedDataParallel"
        results += ranks
    for result in results:
        for key, value in expected.items():
            if key in ("world", "wrapped"):
                continue
            assert result[key] == pytest.approx(value, rel=1e-5), key


def train_uneven(folder, world):
    """Five rows on two ranks: the last batch is filled up by accelerate with rows that were already there."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=tiny.CHATS[:5], sft_alpha=0.3, optim="sgd",
        per_device_train_batch_size=8 // world, per_device_eval_batch_size=2, train_sampling_strategy="sequential",
        max_grad_norm=1e9,
    )  # fmt: skip
    trainer.train()
    record = trainer.state.log_history[0]
    evaluation = trainer.evaluate(datasets.Dataset.from_list(tiny.CHATS[:5]))
    return {key: record[key] for key in ("loss", "grad_norm")} | {
        key: evaluation[key] for key in ("eval_loss", "eval_token_accuracy", "eval_student_entropy")
    }


def test_rows_repeated_to_fill_the_last_batch_do_not_count_twice(tmp_path):
    expected = train_uneven(tmp_path / "one", 1)
    for rank in tiny.run_ranks(train_uneven, 2, tmp_path / "two", 2):
        assert rank == pytest.approx(expected, rel=1e-5)


def train_ragged(folder, world, resume, lmbda):
    """Two epochs of five rows with a checkpoint in the middle of the second; the weights and D of each window."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=tiny.CHATS[:5], sft_alpha=0.3, lmbda=lmbda,
        per_device_train_batch_size=2 // world, max_steps=6, save_strategy="steps", save_steps=5,
        train_sampling_strategy="sequential", max_new_tokens=1,
    )  # fmt: skip
    counted = []
    original = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *args: (result := original(*args), counted.append(int(result[1])))[0]
    trainer.train(resume_from_checkpoint=resume)
    last = [record for record in trainer.state.log_history if "loss" in record][-1]
    return {"D": counted[-1], "loss": last["loss"], "norm": last["grad_norm"]}


def test_repeated_rows_do_not_count_after_resuming_in_the_middle_of_an_epoch(tmp_path):
    expected = train_ragged(tmp_path / "one", 1, None, 0.0)
    tiny.run_ranks(train_ragged, 2, tmp_path / "two", 2, None, 0.0)
    for rank in tiny.run_ranks(train_ragged, 2, tmp_path / "two", 2, str(tmp_path / "two" / "checkpoint-5"), 0.0):
        assert rank == pytest.approx(expected, rel=1e-4)


def test_repeated_rows_do_not_count_in_generated_windows(tmp_path):
    assert train_ragged(tmp_path / "one", 1, None, 1.0)["D"] == 1  # one row, one new token
    for rank in tiny.run_ranks(train_ragged, 2, tmp_path / "two", 2, None, 1.0):
        assert rank["D"] == 1


def collate_behind_each_other(rows):
    """All rows of a batch as documents of one."""
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[token for row in rows for token in [-100, *row["labels"][1:]]]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row["input_ids"]))]]),
    }


def train_packed(folder, count, world):
    """Two epochs of rows of 2, 3, 4 … tokens in packs of two rows; D of every window."""
    rows = [{"input_ids": list(range(5, 7 + i)), "labels": list(range(5, 7 + i))} for i in range(count)]
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=rows, per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // world, num_train_epochs=2, max_steps=-1,
        train_sampling_strategy="sequential", extra={"data_collator": collate_behind_each_other},
    )  # fmt: skip
    counted = []
    original = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *args: (result := original(*args), counted.append(int(result[1])))[0]
    trainer.train()
    return counted


def test_repeated_rows_do_not_count_where_a_collator_packs_them(tmp_path):
    expected = [1 + 2 + 3 + 4, 5 + 6] * 2
    assert train_packed(tmp_path, 6, 1) == expected
    assert tiny.run_ranks(train_packed, 2, tmp_path, 6, 2) == [expected] * 2
    with pytest.raises(AssertionError, match=r"DataError: .*1 repeated rows of 2 .*made 1 of them"):
        tiny.run_ranks(train_packed, 2, tmp_path, 5, 2, timeout=60)


def train_dropping(folder, world, longest):
    """An epoch of seven rows, of which the collator drops those of more than 8 tokens; D of every window."""
    lengths = [4, 20, 5, 6, *longest]
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n)), "row_id": str(n)} for n in lengths]
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=rows, per_device_train_batch_size=4 // world,
        num_train_epochs=1, max_steps=-1, train_sampling_strategy="sequential",
        extra={"data_collator": Collator(tiny.make_tokenizer(), max_length=8, on_overlength="drop")},
    )  # fmt: skip
    counted = []
    original = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *args: (result := original(*args), counted.append(int(result[1])))[0]
    trainer.train()
    return counted


@pytest.mark.parametrize("longest", [(7, 8, 20), (20, 7, 8)])
def test_rows_that_a_collator_drops_are_not_those_that_are_repeated(tmp_path, longest):
    expected = [3 + 4 + 5, 6 + 7]
    assert train_dropping(tmp_path, 1, longest) == expected
    assert tiny.run_ranks(train_dropping, 2, tmp_path, 2, longest) == [expected] * 2


def generate_on_ranks(folder):
    trainer = make_trainer(
        folder,
        tiny.make_qwen3(seed=1),
        tiny.make_qwen3(seed=2),
        rows=tiny.CHATS * 4,
        lmbda=0.5,
        max_steps=8,
        sft_alpha=1.0,
    )
    trainer.train()
    return [
        (r["on_policy_fraction"], r["loss"], r["llm_kd_loss"] + r["sft_loss"]) for r in trainer.state.log_history[:8]
    ]


def test_ranks_agree_on_which_windows_are_on_policy(tmp_path):
    first, second = tiny.run_ranks(generate_on_ranks, 2, tmp_path)
    assert first == second
    assert {fraction for fraction, _, _ in first} == {0.0, 1.0}
    for _, loss, terms in first:
        assert loss == pytest.approx(terms, rel=1e-5)


def one_rank_has_no_tokens(folder):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, {"input_ids": [9, 10, 11], "labels": [-100] * 3}]
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=rows, per_device_train_batch_size=1,
        train_sampling_strategy="sequential", sft_alpha=0.5,
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_a_rank_without_supervised_tokens_neither_hangs_nor_changes_the_loss(tmp_path):
    losses = tiny.run_ranks(one_rank_has_no_tokens, 2, tmp_path)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}]
    trainer = make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=rows, sft_alpha=0.5)
    trainer.train()
    assert losses == pytest.approx([trainer.state.log_history[0]["loss"]] * 2, rel=1e-5)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, lmbda):
    def run(resume=None):
        trainer = make_trainer(
            tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=tiny.CHATS * 2, lmbda=lmbda, max_steps=8,
            save_strategy="steps", save_steps=3, sft_alpha=0.3,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8


def test_lora_trains_only_its_adapter_and_loads_again(tmp_path, student, teacher, tokenizer):
    from peft import AutoPeftModelForCausalLM

    from tests.tiny import lora_config

    base = tiny.save_model(student, tokenizer, tmp_path / "base")
    peft_config = lora_config(
        rank=4, alpha=8, dropout=0.1, target_modules="all-linear", modules_to_save=None, use_dora=False
    )
    loaded = type(student).from_pretrained(base)
    trainer = make_trainer(
        tmp_path / "run", loaded, teacher, max_steps=2, lmbda=0.5, extra={"peft_config": peft_config}
    )
    assert {name.split(".")[-2] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"default"}
    trainer.train()
    trainer.save_model()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.tensor([[70, 71, 72]])
    trainer.model.eval()
    torch.testing.assert_close(again.eval()(ids).logits, trainer.model(ids).logits)
    assert not torch.equal(again(ids).logits, student(ids).logits)


def test_a_student_that_cannot_be_trained_as_asked_is_refused_at_construction(tmp_path, student, teacher):
    with pytest.raises(PreflightError, match="has nothing called 'q_prjo'"):
        make_trainer(tmp_path, student, teacher, extra={"peft_config": LoraConfig(target_modules=["q_prjo"])})
    with pytest.raises(PreflightError, match="Not one parameter of the student"):
        make_trainer(tmp_path, student.requires_grad_(False), teacher)


def test_the_head_of_the_file_names_every_method_that_is_overridden():
    from kdtrain.trainer import trainer as module

    rows = [line.split("|")[1] for line in module.__doc__.splitlines() if line.startswith("| `")]
    named = [name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", " ".join(rows))]
    own = {name for name, value in vars(GKDTrainerWithMetrics).items() if isinstance(value, types.FunctionType)}
    assert sorted(named) == sorted(name for name in own if hasattr(GKDTrainer, name))


def test_a_call_between_windows_does_not_count_by_the_weights_of_the_last_one(tmp_path):
    trainer = make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), lmbda=0.0, max_steps=1)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    before = trainer.compute_loss(trainer.model, batch)
    trainer._window = dataclasses.replace(trainer._window, weighs_tokens=True, num_kd_items=torch.tensor(1))
    assert trainer.compute_loss(trainer.model, batch) == before
