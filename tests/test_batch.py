"""What a batch is made of, how it is changed, and what is known of it once."""

import dataclasses
import logging

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from kdtrain.data import Collator, cut_rows
from kdtrain.data import batch as module
from kdtrain.data.batch import Batch, Rows, TeacherImages, received
from kdtrain.data.images import Image
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX
from tests import tiny

FACTS = ("predicts_BT", "labels_S", "num_supervised", "image_units")


def make_batch(**changes):
    """Three rows of four tokens; row 0 owns two images, row 2 one."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 3], [12, 13, 3, 3]])
    fields = {
        "model_inputs": {
            "input_ids": ids,
            "attention_mask": (ids != 3).long(),
            "mm_token_type_ids": torch.zeros_like(ids),
            "pixel_values": torch.arange(6.0).view(3, 2),
        },
        "labels": torch.tensor([[-100, -100, 7, 8], [-100, 10, 11, -100], [12, 13, -100, -100]]),
        "rows": Rows(
            ids=["a", "b", "c"],
            prompt_lengths=torch.tensor([2, 1, 1]),
            ce=torch.tensor([True, False, True]),
            truncated=[False, True, False],
            places=[0, 2, 3],
            chats=['{"messages": []}', None, '{"prompt": "a"}'],
            images=[(Image("/a.png"), Image(data=b"b")), (), (Image("/c.png"),)],
        ),
        "visual_sizes": {"pixel_values": [2, 0, 1]},
        "teacher_images": TeacherImages(
            inputs={"pixel_values": torch.arange(12.0).view(6, 2)}, sizes={"pixel_values": [4, 0, 2]}
        ),
    }
    return Batch(**{**fields, **changes})


# ---- batches of other collators --------------------------------------------------------------------------------------


def test_every_key_of_a_users_batch_comes_to_its_place():
    expected = make_batch()
    prompts, mask = torch.ones(3, 2), torch.ones(3, 2).bool()
    given = {
        **expected.model_inputs,
        "labels": expected.labels,
        "row_ids": expected.rows.ids,
        "prompt_lengths": expected.rows.prompt_lengths,
        "prompts": prompts,
        "prompt_attention_mask": mask,
        "ce_rows": expected.rows.ce,
        "truncated": expected.rows.truncated,
        "places": expected.rows.places,
        "visual_sizes": expected.visual_sizes,
        "teacher_inputs": expected.teacher_images.inputs,
        "teacher_visual_sizes": expected.teacher_images.sizes,
    }
    keys = list(given)
    batch = received(given, frozenset({"input_ids"}))
    assert batch.rows.prompts == (prompts, mask)
    assert list(given) == keys  # the user's own stays as it was
    rows = dataclasses.replace(batch.rows, prompts=None, chats=expected.rows.chats, images=expected.rows.images)
    tiny.assert_same_batch(dataclasses.replace(batch, rows=rows), expected)


def test_a_batch_of_tokens_and_labels_alone_says_nothing_of_its_rows():
    inputs = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3).long()}
    labels = torch.ones(2, 3).long()
    tiny.assert_same_batch(received({**inputs, "labels": labels}, None), Batch(model_inputs=inputs, labels=labels))


def test_inputs_that_the_forward_does_not_take_are_left_out_and_warned_of_once(caplog):
    module._warn_left_out.cache_clear()
    known = {"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1, 2).long(), "position_ids": torch.ones(1, 2)}
    strange = {"difficulty": torch.ones(1), "source": ["a"], "byte_offsets": [[0]], "original_prompt_text": ["x"]}
    accepted = frozenset({"input_ids", "position_ids"})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert received({**known, **strange}, accepted).model_inputs.keys() == accepted
        assert received({**known, "byte_offsets": [[0]]}, None).model_inputs.keys() == accepted
    told = "Batches carry difficulty, source, which the student's forward does not take: left out."
    assert [record.message for record in caplog.records] == [told]
    assert received({**known, "difficulty": 1}, None).model_inputs["difficulty"] == 1  # a forward that takes anything


@pytest.mark.parametrize("labels", [{}, {"labels": None}])
def test_a_batch_without_labels_is_refused_with_what_it_has(labels):
    with pytest.raises(DataError, match=r"no labels \(they have input_ids, pixel_values"):
        received({"input_ids": torch.ones(1, 2), "pixel_values": torch.ones(1), **labels}, None)


# ---- what is known of it ---------------------------------------------------------------------------------------------


def test_the_supervised_tokens_of_a_batch_are_those_after_the_first_of_each_row():
    batch = make_batch()
    assert batch.labels_S.tolist() == [7, 8, 10, 11, 13]
    assert batch.predicts_BT.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 1], [2, 0]]
    assert batch.num_supervised == 5
    assert batch.ce_mask_S.tolist() == [True, True, False, False, True]
    assert batch.num_input_tokens == 9
    assert batch.image_units == 3
    assert dataclasses.replace(batch, all_repeated=True).image_units == 0
    assert dataclasses.replace(batch, rows=Rows()).ce_mask_S is None


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_is_found_once_for_each_batch_and_never_kept_for_another(fact):
    batch = make_batch()
    found = getattr(batch, fact)
    assert getattr(batch, fact) is found
    assert fact in vars(batch)
    for other in (batch.without_labels(), batch.as_teacher_sees_it(), cut_rows(batch, 2), dataclasses.replace(batch)):
        assert fact not in vars(other)
    assert batch.without_labels().num_supervised == 0
    assert cut_rows(batch, 2).labels_S.tolist() == [7, 8, 10, 11]


# ---- other forms of it -----------------------------------------------------------------------------------------------


def test_a_batch_that_is_where_it_should_be_stays_the_same_object_with_all_that_is_known():
    batch = make_batch()
    facts = {fact: getattr(batch, fact) for fact in FACTS}
    for same in (batch.to("cpu"), batch.to(torch.device("cpu"), non_blocking=True), batch.map_tensors(lambda t: t)):
        assert same is batch
        assert all(getattr(same, fact) is value for fact, value in facts.items())


def test_mapping_reaches_every_tensor_and_forgets_nothing():
    prompts = (torch.ones(3, 2).long(), torch.ones(3, 2).bool())
    batch = make_batch(generated_by="student", all_repeated=True)
    batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, prompts=prompts))
    assert batch.labels_S.device.type == "cpu"
    moved = batch.to("meta")
    tensors = [moved.labels, *moved.model_inputs.values(), *moved.teacher_images.inputs.values(), *moved.rows.prompts]
    tensors += [moved.rows.prompt_lengths, moved.rows.ce]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert "labels_S" not in vars(moved)
    # A copy of each tensor on the same device: equal in everything, and another object.
    copy = batch.map_tensors(torch.clone)
    assert copy is not batch
    assert copy.rows.prompts[0] is not prompts[0]
    for a, b in zip(copy.rows.prompts, prompts, strict=True):
        assert torch.equal(a, b)
    without = [dataclasses.replace(b, rows=dataclasses.replace(b.rows, prompts=None)) for b in (copy, batch)]
    tiny.assert_same_batch(*without)


def test_the_teacher_sees_its_own_images_in_place_of_the_students():
    batch = make_batch(
        model_inputs={**make_batch().model_inputs, "image_mask": torch.ones(3)},
        visual_sizes={"pixel_values": [2, 0, 1], "image_mask": [2, 0, 1]},
    )
    seen = batch.as_teacher_sees_it()
    # The student's mask is no tensor of the teacher's processor.
    assert seen.model_inputs.keys() == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}
    assert seen.model_inputs["pixel_values"] is batch.teacher_images.inputs["pixel_values"]
    assert seen.model_inputs == batch.teacher_inputs
    assert seen.visual_sizes == {"pixel_values": [4, 0, 2]}
    assert (seen.teacher_images, seen.rows, seen.labels) == (None, batch.rows, batch.labels)
    alone = make_batch(teacher_images=None)
    assert alone.as_teacher_sees_it() is alone
    assert alone.teacher_inputs is alone.model_inputs


def test_the_first_rows_of_a_batch_keep_all_that_is_theirs():
    batch = make_batch()
    batch = dataclasses.replace(
        batch,
        rows=dataclasses.replace(batch.rows, prompts=(torch.ones(3, 2), torch.ones(3, 2))),
        generated_by="teacher",
    )
    assert cut_rows(batch, 3) is batch
    cut = cut_rows(batch, 2)
    assert len(cut) == 2
    assert (cut.labels == batch.labels[:2]).all()
    assert {len(value) for name, value in cut.model_inputs.items()} == {2}
    assert (cut.rows.ids, cut.rows.truncated, cut.rows.places) == (["a", "b"], [False, True], [0, 2])
    assert (cut.rows.prompt_lengths.tolist(), cut.rows.ce.tolist()) == ([2, 1], [True, False])
    assert (cut.rows.chats, cut.rows.images) == (['{"messages": []}', None], batch.rows.images[:2])
    assert [len(tensor) for tensor in cut.rows.prompts] == [2, 2]
    assert (cut.visual_sizes, cut.teacher_images.sizes) == ({"pixel_values": [2, 0]}, {"pixel_values": [4, 0]})
    assert len(cut.teacher_images.inputs["pixel_values"]) == 4
    assert cut.generated_by == "teacher"
    text = make_batch(
        model_inputs={**make_batch().model_inputs, "pixel_values": torch.ones(1, 2)},
        visual_sizes={"pixel_values": [0, 0, 1]},
        teacher_images=TeacherImages(inputs={"pixel_values": torch.ones(2, 2)}, sizes={"pixel_values": [0, 0, 2]}),
    )
    assert not cut_rows(text, 2).has_images
    assert cut_rows(text, 2).teacher_images is None


# ---- data loaders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True])
def test_batches_come_through_workers_and_accelerates_loader_as_they_were(prepared):
    collate = Collator(tiny.make_tokenizer(), max_length=40, on_overlength="truncate")
    loader = DataLoader(tiny.CHATS, batch_size=2, collate_fn=collate, num_workers=2)
    if prepared:
        loader = Accelerator(cpu=True).prepare_data_loader(loader)
    batches = list(loader)
    assert len(batches) == 3
    for i, batch in enumerate(batches):
        assert isinstance(batch, Batch)
        tiny.assert_same_batch(batch, collate(tiny.CHATS[2 * i : 2 * i + 2]))


def test_torch_pins_a_batch_by_its_own_method(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: pinned.append(self) or self.clone())
    batch = make_batch()
    done = pin_memory(batch)
    assert len(pinned) == 1 + len(batch.model_inputs) + 1 + 2  # labels, inputs, the teacher's, prompt lengths and ce
    tiny.assert_same_batch(done, batch)
    assert done is not batch


def test_a_batch_answers_what_transformers_asks_of_one():
    batch = make_batch()
    assert len(batch) == 3
    assert "input_ids" in batch
    assert "pixels" not in batch
    assert batch["input_ids"] is batch.model_inputs["input_ids"]
    assert batch["labels"] is batch.labels
    assert (batch.without_labels().labels == IGNORE_INDEX).all()
