"""`rlhf.token_weights`: the tokens of a row count by how much the teacher reads them off its images."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kdtrain.config import ConfigError
from kdtrain.config.token_weights import TokenWeights
from kdtrain.data import Collator
from kdtrain.data.batch import Batch, Rows
from kdtrain.data.regroup import taken
from kdtrain.data.visual_batch import cut_rows
from kdtrain.teachers import LocalTeacher, Teacher
from kdtrain.trainer.reliance_weights import weights_by
from tests import tiny
from tests.oracle import double
from tests.test_invariance import IMAGES, given_samples, rows_with_images
from tests.test_trainer import make_trainer
from tests.tiny_processors import FAMILIES, make_model

RATE = 1.0
LONG = " and more than that, for there is a lot to say of it"


# ---- which weights ---------------------------------------------------------------------------------------------------


def batch_of(counts, pictured, weights=None, width=12):
    """Rows of so many supervised tokens, each behind two that are not."""
    labels = torch.full((len(counts), width), -100)
    for row, count in enumerate(counts):
        labels[row, 2 : 2 + count] = 7
    rows = Rows(pictured=pictured, kd_weights=None if weights is None else torch.tensor(weights))
    return Batch(model_inputs={"input_ids": labels.clamp(min=0)}, labels=labels, rows=rows)


def weights(batch, reliance, **options):
    return weights_by(torch.tensor(reliance, dtype=torch.float64), batch, TokenWeights(**options)).tolist()


def test_the_top_fifth_of_a_row_counts_as_much_as_the_rest():
    batch = batch_of([6, 1, 5, 5], [True, True, False, True])
    found = weights(batch, [0.1, 0.9, 0.2, 0.9, -5, 0.3, 3.0, 9.0, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    top, rest = 6 / 2 / 2, 6 / 2 / 4  # two of six
    assert found[:6] == pytest.approx([rest, top, rest, top, rest, rest])
    assert found[6:12] == [1.0] * 6  # a token by itself, and a row without an image
    assert found[12:] == pytest.approx([2.5, *[0.625] * 4])  # of equal ones the first


def test_share_top_and_the_weights_of_the_data():
    batch = batch_of([4, 4], [True, True], weights=[2.0, 0.0])
    found = weights(batch, [4.0, 3, 2, 1, 1, 1, 1, 1], top=0.5, share=0.75)
    assert found == pytest.approx([3.0, 3, 1, 1, 0, 0, 0, 0])
    of_tokens = torch.ones(2, 12)
    of_tokens[0, 2], of_tokens[0, 3] = 0, 3  # the first token of four does not count, and is none of n
    batch = replace(batch_of([4, 4], [True, False]), kd_token_weights=of_tokens)
    found = weights(batch, [4.0, 3, 2, 1, 1, 1, 1, 1], top=0.3)
    assert found == pytest.approx([0, 4.5, 0.75, 0.75, 1, 1, 1, 1])


def test_labels_that_are_impossible_do_not_make_nan():
    found = weights(batch_of([5], [True]), [math.nan, -math.inf, math.inf, 0.0, -1])
    assert found == pytest.approx([0.625, 0.625, 2.5, 0.625, 0.625])


# ---- a whole step against the definition -----------------------------------------------------------------------------


def pair(family="qwen"):
    processor = FAMILIES[family]()
    return make_model(family, processor, 1), make_model(family, processor, 2, width=48), processor


def image_rows():
    rows = rows_with_images(IMAGES)
    for i, row in enumerate(rows):
        row["messages"][-1] = {"role": "assistant", "content": row["messages"][-1]["content"] + LONG[: 9 * i]}
    rows[2]["kd_weight"] = 3.0
    return rows


def in_mean_colour(row):
    """By numpy, in place of Pillow's statistics."""
    means = [np.asarray(one.convert("RGB"), dtype=np.float64).reshape(-1, 3).mean(0) for one in row.get("images", ())]
    images = [
        Image.new("RGB", one.size, tuple(int(value) for value in np.rint(mean)))
        for one, mean in zip(row.get("images", ()), means, strict=True)
    ]
    return {**row, "images": images} if images else row


def reference(student, teacher, processor, rows, top, share):
    """Σ w·KL(T‖S)/D and its gradient, row by row and in float64."""
    student, teacher, collate = double(student), double(teacher), Collator(processor)
    total, tokens, reliances = 0.0, 0, []
    for row in rows:
        seen, blanked = collate([row]), collate([in_mean_colour(row)])
        at = [t for t in range(seen.labels.shape[1] - 1) if seen.labels[0, t + 1] != -100]
        labels = seen.labels[0, [t + 1 for t in at]]
        logits = {}
        for name, batch in (("seen", seen), ("blanked", blanked)):
            inputs = {
                key: value.double() if value.is_floating_point() else value for key, value in batch.model_inputs.items()
            }
            with torch.no_grad():
                logits[name] = teacher(**inputs).logits[0, at].log_softmax(-1)
            if name == "seen":
                own = student(**inputs).logits[0, at].log_softmax(-1)
        weights = torch.ones(len(at), dtype=torch.float64)
        n, k = len(at), math.ceil(top * len(at) - 1e-9)
        if row.get("images") and k < n:
            relies = [float((logits["seen"] - logits["blanked"])[i, label]) for i, label in enumerate(labels)]
            best = sorted(range(n), key=lambda i: (-relies[i], i))[:k]
            weights[:] = (1 - share) * n / (n - k)
            weights[best] = share * n / k
            reliances += relies
        kl = (logits["seen"].exp() * (logits["seen"] - own)).sum(-1)
        total = total + row.get("kd_weight", 1.0) * (weights * kl).sum()
        tokens += n
    assert len({round(value, 6) for value in reliances}) > 20, "images are looked at"
    loss = total / tokens
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])


def step(folder, student, teacher, processor, rows, **options):
    """The record of a window, and the gradient of all weights by way of an SGD step."""
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "beta": 0.0, **options}
    extra = {"processing_class": processor, **options.pop("extra", {})}
    trainer = make_trainer(
        folder, copy.deepcopy(student), teacher, rows=rows, optim="sgd", max_grad_norm=1e9, learning_rate=RATE,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", max_steps=1, log_level="error",
        extra=extra, **options,
    )  # fmt: skip
    trainer.startup_checked = trainer.alignment_checked = True
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    with given_samples():
        trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return trainer.state.log_history[0], (before - after) / RATE


@pytest.mark.parametrize("family", tiny.first_quick(["qwen", "llava"]))
def test_loss_and_gradient_are_those_of_the_definition(tmp_path, family):
    student, teacher, processor = pair(family)
    rows, options = image_rows(), {"top": 0.3, "share": 0.6}
    loss, gradient = reference(student, teacher, processor, rows, **options)
    record, moved = step(tmp_path / "a", student, copy.deepcopy(teacher), processor, rows, token_weights=options)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert (moved.double() - gradient).norm() <= 2e-4 * gradient.norm()  # differences of rounded weights
    plain, unweighted = step(tmp_path / "b", student, teacher, processor, rows)
    assert abs(plain["loss"] - loss) > 1e-3 * loss
    assert (unweighted - moved).norm() > 0.01 * moved.norm()
    for name in ("token_accuracy", "student_entropy", "teacher_entropy"):
        assert plain[name] == pytest.approx(record[name], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_tokens": 128},
        {"pad_to_multiple_of": 64},
    ],
)
def test_the_loss_does_not_depend_on_how_rows_are_laid(tmp_path, changes):
    student, teacher, processor = pair()
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "token_weights": {}}
    given = (student, teacher, processor, image_rows())
    (record, gradient), (other, same) = (
        step(tmp_path / name, *given, **{**whole, **more}) for name, more in (("a", {}), ("b", changes))
    )
    assert other["loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert (same - gradient).norm() <= 2e-4 * gradient.norm()


@pytest.mark.parametrize("changes", [{"lmbda": 1.0, "samples_per_prompt": 2, "select": "best"}, {"seq_kd": True}])
def test_answers_that_are_generated_are_weighed_too(tmp_path, changes):
    student, teacher, processor = pair()
    given = (student, teacher, processor, image_rows()[:3])
    records = [step(tmp_path / str(weights), *given, token_weights=weights, **changes)[0] for weights in (None, {})]
    assert records[0]["token_accuracy"] == pytest.approx(records[1]["token_accuracy"])
    assert records[0]["loss"] != pytest.approx(records[1]["loss"], rel=1e-4)


def test_the_teacher_is_asked_with_its_own_processor_and_only_about_batches_with_images(tmp_path):
    student, teacher, processor = pair("llava")
    darker = FAMILIES["llava"]()
    darker.image_processor.image_mean = [0.1, 0.2, 0.3]
    seen = []

    class Noted(LocalTeacher):
        def targets(self, batch):
            seen.append(batch.as_teacher_sees_it().model_inputs.get("pixel_values"))
            return super().targets(batch)

    collate = Collator(processor, darker, with_blanks=True)
    extra = {"teacher": Noted(teacher), "data_collator": collate}
    rows = image_rows()[:2]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "token_weights": {}}
    step(tmp_path, student, None, processor, rows, extra=extra, **options)
    pictured, blanked, text = seen
    assert text is None
    assert torch.equal(pictured, Collator(darker)([rows[0]]).model_inputs["pixel_values"])
    assert torch.equal(blanked, Collator(darker)([in_mean_colour(rows[0])]).model_inputs["pixel_values"])
    assert not torch.equal(pictured, blanked)


@pytest.mark.parametrize("family", ["qwen", "llava", "idefics3"])
def test_rows_keep_their_blank_images_where_they_are_dealt_anew_or_cut(family):
    collate = Collator(FAMILIES[family](), with_blanks=True)
    rows = [{**row, "images": [one.resize((32, 32)) for one in row["images"]]} for row in image_rows()[:4]]
    batch, order = collate(rows), [2, 0, 1]
    for found, expected in ((taken(batch, order), [rows[i] for i in order]), (cut_rows(batch, 3), rows[:3])):
        one = collate(expected)
        assert list(found.rows.pictured) == list(one.rows.pictured)
        for name, values in one.blank_images.inputs.items():
            assert torch.equal(found.blank_images.inputs[name][: len(values)], values), name
    assert cut_rows(collate(rows[1::-1]), 1).blank_images is None  # a row of text alone
    assert collate(rows[1:2]).blank_images is None


def test_evaluation_weighs_all_alike(tmp_path):
    student, teacher, processor = pair()
    found = [
        make_trainer(
            tmp_path, student, teacher, rows=image_rows(), token_weights=weights,
            extra={"processing_class": processor, "eval_dataset": image_rows()},
        ).evaluate()["eval_llm_kd_loss"]
        for weights in (None, {})
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Elsewhere(Teacher):
    """No model of this process."""

    vocab_size = 320

    def targets(self, batch):
        raise AssertionError


def test_what_cannot_be_is_refused_by_name(tmp_path):
    student, teacher, processor = pair()
    common = {"rows": image_rows(), "token_weights": {}}

    def refused(message, *models, **options):
        extra = {"processing_class": processor, **options.pop("extra", {})}
        with pytest.raises(ConfigError, match=message):
            make_trainer(tmp_path, *models, extra=extra, **common, **options)

    refused("cannot be beside token_selection", student, teacher, token_selection={"keep": 0.5})
    refused("pass data_collator=Collator", student, teacher, extra={"data_collator": Collator(processor)})
    refused("a model of its own in this process", student, None, extra={"teacher": Elsewhere()})
    with pytest.raises(ConfigError, match="the student sees no images"):
        make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), token_weights={})
    make_trainer(tmp_path, tiny.make_qwen3(seed=1), llm_kd_weight=0.0, token_weights={})  # no divergence to weigh
