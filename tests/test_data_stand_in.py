"""A stand-in runs through the whole model and changes neither loss nor gradient, nor what is said of a batch."""

from dataclasses import replace

import pytest
import torch

from kdtrain.data import Collator
from kdtrain.data.multimodal import Multimodal
from kdtrain.data.stand_in import as_run, counted_inputs, image_row
from kdtrain.data.visual_batch import CannotShareError
from tests.test_trainer import ROWS, make_trainer
from tests.tiny_processors import FAMILIES, make_model, make_qwen3

PROCESSORS = {**FAMILIES, "qwen3": make_qwen3}


def text_batch(processor, row=None):
    batch = Collator(processor)(ROWS[:3])
    return replace(batch, stand_in=row or image_row(Multimodal(processor), None))


@pytest.mark.parametrize("family", PROCESSORS)
def test_it_has_an_image_and_no_supervised_token(family):
    batch = text_batch(PROCESSORS[family]())
    run = as_run(batch)
    assert run.has_images
    assert not batch.has_images
    assert (len(batch), len(run)) == (3, 4)
    assert torch.equal(run.labels_S, batch.labels_S)
    assert run.image_units == 0
    assert as_run(run) is run
    assert counted_inputs(run)["attention_mask"].sum() == batch.model_inputs["attention_mask"].sum()


def gradients(trainer, batch):
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(40))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_the_gradient_are_those_without_it(tmp_path, family):
    processor = FAMILIES[family]()
    trainer = make_trainer(
        tmp_path, make_model(family, processor, 1), make_model(family, processor, 2), rows=ROWS[:3], sft_alpha=0.3,
        visual_kd={"targets": ["vit", "aligner"]}, extra={"processing_class": processor},
    )  # fmt: skip
    batch = text_batch(processor)
    expected, without = gradients(trainer, replace(batch, stand_in=None))
    loss, found = gradients(trainer, batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    reached = 0
    for name, gradient in found.items():
        if without[name] is not None:
            torch.testing.assert_close(gradient, without[name], rtol=1e-4, atol=1e-6)
        elif gradient is not None:  # the vision path: backward has come through, and has brought nothing
            assert not gradient.any()
            reached += 1
    assert reached > 10


def test_a_collator_whose_rows_cannot_share_a_batch_is_refused():
    processor = FAMILIES["llava"]()
    batch = text_batch(processor)
    batch = replace(batch, model_inputs={**batch.model_inputs, "position_ids": torch.arange(3)})
    with pytest.raises(CannotShareError, match="position_ids"):
        as_run(batch)
