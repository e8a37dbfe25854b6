"""How hard each term pulls: gradient norms against a float64 reference, in the log and without a trace in the run."""

import json

import pytest
import torch

from kdtrain.config import ConfigLoader
from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.models.loss_head import add_loss_head
from kdtrain.models.vocabulary import Vocabulary
from kdtrain.teachers import DenseTargets, LocalTeacher, Targets
from kdtrain.trainer.objective import Objective
from kdtrain.trainer.term_gradients import term_gradients
from tests import tiny
from tests.test_trainer import make_trainer
from tests.tiny_vision import make_inputs, make_vlm, visual_knobs


def make_batch(rows=3, width=12):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 320, (rows, width), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    labels[0, 9:] = -100
    return Batch(model_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels)


def log_softmax(hidden, model):
    return torch.log_softmax(hidden @ model.lm_head.weight.double().T, -1)


def reference(student, teacher, batch, options):
    """‖∂ term / ∂ hidden‖ by autograd over the dense definition, all in float64."""
    with torch.no_grad():
        hidden, of_teacher = (
            model.double().model(**batch.model_inputs).last_hidden_state[:, :-1][batch.predicts_BT]
            for model in (student, teacher)
        )
        log_q = log_softmax(of_teacher, teacher)
    hidden.requires_grad_()
    log_p = log_softmax(hidden, student)
    beta, count = options.beta, len(hidden)
    log_m = torch.log(beta * log_q.exp() + (1 - beta) * log_p.exp())
    kl = lambda a, b: (a.exp() * (a - b)).sum()  # noqa: E731
    terms = {
        "grad_norm_llm_kd": options.llm_kd_weight * (beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)) / count,
        "grad_norm_sft": -options.sft_alpha * log_p.gather(1, batch.labels_S[:, None]).sum() / count,
    }
    return {name: float(torch.autograd.grad(term, hidden, retain_graph=True)[0].norm()) for name, term in terms.items()}


OPTIONS = DistillationOptions(llm_kd_weight=0.7, sft_alpha=0.2, beta=0.3)


def objective(fused, visual=None):
    return Objective(Vocabulary(320, 320, 320), fused=fused, router_logits=None, aux_weight=0.0, visual=visual)


@pytest.mark.parametrize("fused", [True, False])
def test_the_norms_are_those_of_the_weighted_terms_at_the_last_hidden_states(student, teacher, fused):
    batch, local = make_batch(), LocalTeacher(teacher)
    if fused:
        add_loss_head(student)
    found = term_gradients(objective(fused), student.eval(), batch, OPTIONS, local.targets)
    assert found.norms == pytest.approx(reference(student, teacher, batch, OPTIONS), rel=1e-4)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_they_scale_with_the_weights_and_a_term_of_weight_0_has_none(student, teacher):
    add_loss_head(student)
    batch, local = make_batch(), LocalTeacher(teacher)

    def norms(**weights):
        options = OPTIONS.model_copy(update=weights)
        return term_gradients(objective(True), student.eval(), batch, options, local.targets).norms

    assert norms(sft_alpha=0.6)["grad_norm_sft"] == pytest.approx(3 * norms()["grad_norm_sft"], rel=1e-5)
    assert norms(sft_alpha=0.6)["grad_norm_llm_kd"] == pytest.approx(norms()["grad_norm_llm_kd"], rel=1e-5)
    assert norms(sft_alpha=0.0).keys() == {"grad_norm_llm_kd"}
    assert norms(llm_kd_weight=0.0).keys() == {"grad_norm_sft"}


def test_a_batch_without_a_supervised_token_has_none(student, teacher):
    add_loss_head(student)
    batch = make_batch().without_labels()
    assert term_gradients(objective(True), student.eval(), batch, OPTIONS, LocalTeacher(teacher).targets).norms == {}


def test_a_partly_covered_batch_has_both_terms_over_their_own_tokens(student, teacher):
    add_loss_head(student)
    batch, local = make_batch(), LocalTeacher(teacher)
    covered_S = torch.arange(int(batch.num_supervised)) % 2 == 0

    def partly(rows):
        scores = local.targets(rows).scores
        return Targets(DenseTargets(scores.hidden[covered_S], scores.head), covered_S)

    found = term_gradients(objective(True), student.eval(), batch, OPTIONS, partly).norms
    whole = term_gradients(objective(True), student.eval(), batch, OPTIONS, local.targets).norms
    assert found["grad_norm_sft"] == pytest.approx(whole["grad_norm_sft"], rel=1e-5)
    assert 0 < found["grad_norm_llm_kd"] < whole["grad_norm_llm_kd"]


def test_the_visual_norm_is_that_at_the_students_features():
    from accelerate import Accelerator

    from kdtrain.feature_kd.term import VisualTerm

    student, teacher = make_vlm("llava", seed=1), make_vlm("llava", seed=2)
    inputs = make_inputs(student)
    labels = inputs["input_ids"].clone()
    batch = Batch(model_inputs=inputs, labels=labels)
    knobs = visual_knobs("aligner", weight=0.5)
    term = VisualTerm(knobs, student, teacher, Accelerator(cpu=True), 0)
    options = DistillationOptions(llm_kd_weight=0.0, visual_kd=knobs)
    local = LocalTeacher(teacher)
    add_loss_head(student)
    found = term_gradients(objective(True, term), student.eval(), batch, options, local.targets).norms
    features = [model.double().get_image_features(inputs["pixel_values"].double()) for model in (student, teacher)]
    own, other = (torch.cat(list(getattr(one, "pooler_output", one))) for one in features)
    # weight · mean (s − t)², whose gradient is 2 · weight · (s − t) / count
    expected = float((2 * 0.5 * (own - other) / own.numel()).norm())
    assert found["grad_norm_vision_kd"] == pytest.approx(expected, rel=1e-3)
    assert found.keys() == {"grad_norm_sft", "grad_norm_vision_kd"}


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_records_them_at_its_beginning_and_at_each_evaluation(project):
    from kdtrain.runs.fit import fit
    from tests.test_vision_fit import Silent

    names = {"grad_norm_llm_kd", "grad_norm_sft"}
    overrides = ["training.max_steps=2", "training.eval_steps=1", f"training.output_dir={project / 'run'}"]
    fit(ConfigLoader.load_training_config(project / "config.yaml", overrides), Silent())
    first, *rest = [json.loads(line) for line in (project / "run" / "logging.jsonl").read_text().splitlines()]
    assert first["step"] == 1
    assert names <= first.keys()
    assert not any(names & record.keys() for record in rest if "loss" in record)
    evaluations = [record for record in rest if "eval_loss" in record]
    assert len(evaluations) == 2
    for record in evaluations:
        assert names <= record.keys()
        assert record["grad_norm_sft"] != first["grad_norm_sft"] > 0


def test_looking_at_them_changes_no_number_of_the_run(tmp_path):
    losses = []
    for looked in (False, True):
        trainer = make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), max_steps=2, sft_alpha=0.3)
        trainer.alignment_checked = not looked
        trainer.train()
        assert bool(trainer.first_gradients) is looked
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0] == losses[1]


def test_evaluating_changes_no_dropout_of_the_steps_behind_it(tmp_path):
    losses = []
    for evaluated in ("no", "steps"):
        trainer = make_trainer(
            tmp_path,
            tiny.make_qwen3(seed=1, attention_dropout=0.5),
            tiny.make_qwen3(seed=2),
            max_steps=3,
            disable_dropout=False,
            eval_strategy=evaluated,
            eval_steps=1,
            extra={"eval_dataset": tiny.CHATS},
        )
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0] == losses[1]


def test_an_evaluation_asks_its_teacher_for_every_batch_once(tmp_path, student):
    class Counting(LocalTeacher):
        asked = 0

        def targets(self, batch):
            self.asked += 1
            return super().targets(batch)

    teacher = Counting(tiny.make_qwen3(seed=2))
    extra = {"teacher": teacher, "eval_dataset": tiny.CHATS}
    trainer = make_trainer(tmp_path, student, extra=extra, per_device_eval_batch_size=2)
    before = teacher.asked
    metrics = trainer.evaluate()
    assert teacher.asked - before == 3
    assert metrics["grad_norm_llm_kd"] > 0
