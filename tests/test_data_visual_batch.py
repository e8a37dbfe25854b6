"""Batches with images: what the model gets, for every family, and the teacher's own tensors."""

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from kdtrain.data import Collator, Source, build_dataset, cut_rows, encode_row
from kdtrain.data.batch import received
from kdtrain.data.multimodal import Multimodal, multimodal
from kdtrain.errors import DataError
from tests import tiny
from tests import tiny_processors as vision
from tests.test_data_dataset import write_lines
from tests.test_data_images import ANSWER, IMAGE, QUESTION, TURNS, row, user
from tests.tiny_processors import picture, png

TWO = row(picture(0), picture(1, 90, 60), messages=[user(IMAGE, "What", IMAGE), ANSWER])
NONE = {"messages": TURNS}
ONE = row(picture(2, 33, 64), messages=[QUESTION, ANSWER])
ROWS = [TWO, NONE, ONE]


@pytest.fixture(scope="module", params=vision.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return vision.FAMILIES[family]()


@pytest.fixture(scope="module")
def llava():
    return vision.make_llava()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch.model_inputs).logits


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_row_in_a_mixed_batch_is_computed_as_on_its_own(family, processor, mode):
    model = vision.make_model(family, processor)
    model.train(mode == "train")  # Gemma3 wants its token types in training only
    collate = Collator(processor, pad_to_multiple_of=16)
    for rows in (ROWS, [NONE, TWO], [ONE, NONE, NONE]):
        together = logits(model, collate(rows))
        for i, data in enumerate(rows):
            alone = collate([data])
            length = int(alone.model_inputs["attention_mask"].sum())
            expected = logits(model, alone)[0, :length]
            torch.testing.assert_close(together[i, :length], expected, atol=2e-5, rtol=1e-4)


def test_the_pixels_are_seen(family, processor):
    model = vision.make_model(family, processor).eval()
    collate = Collator(processor)
    other = {**ONE, "images": [picture(7, 33, 64)]}
    one, two = logits(model, collate([ONE])), logits(model, collate([other]))
    assert one.shape == two.shape
    assert (one - two).abs().max() > 1e-3


def test_what_the_processor_makes_of_a_row_is_what_the_batch_holds(processor):
    batch = Collator(processor)([ONE])
    text = encode_row(ONE, processor, train_on="assistant").text
    expected = processor(text=[text], images=ONE["images"], add_special_tokens=False, return_tensors="pt")
    assert set(expected) == set(batch.model_inputs)
    for name, value in expected.items():
        assert torch.equal(batch.model_inputs[name], value), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_come_out_as_the_chat_template_of_the_processor_makes_them(processor, count):
    """Ids and pixels of a row as at inference, where a template is applied to parts that hold their images."""
    images = [picture(i, 40 + 25 * i, 32 + 10 * i) for i in range(count)]
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What?"}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True, processor_kwargs={"add_special_tokens": False},
    )  # fmt: skip
    batch = Collator(processor)([{"messages": [user(*parts)]}])
    assert set(expected) == set(batch.model_inputs)
    for name, value in expected.items():
        assert torch.equal(batch.model_inputs[name], value), name


SIZES = {
    "llava": {"pixel_values": [2, 0, 1]},
    "gemma3": {"pixel_values": [2, 0, 1]},
    "idefics3": {"pixel_values": [1, 1, 1], "pixel_attention_mask": [1, 1, 1]},
    "onevision": {"pixel_values": [2, 0, 1], "image_sizes": [2, 0, 1], "batch_num_images": [1, 1, 1]},
    # Rounded to multiples of 16 pixels, 40 × 32 takes 6 × 4 or 4 × 4 patches of 8 × 8, and so on: see the grid.
    "qwen": {"pixel_values": [112, 0, 32], "image_grid_thw": [2, 0, 1]},
}


def test_each_row_owns_its_part_of_the_visual_tensors(family, processor):
    batch = Collator(processor)(ROWS)
    assert batch.visual_sizes == SIZES[family]
    for name, owned in batch.visual_sizes.items():
        assert len(batch.model_inputs[name]) == sum(owned)
    if family == "qwen":
        patches = batch.model_inputs["image_grid_thw"].prod(1).tolist()
        assert batch.visual_sizes["pixel_values"] == [sum(patches[:2]), 0, patches[2]]


def test_a_batch_of_raw_rows_looks_at_its_processor_once(llava, monkeypatch):
    looks, look = [], Multimodal.__init__
    monkeypatch.setattr(Multimodal, "__init__", lambda self, one: looks.append(one) or look(self, one))
    collate = Collator(llava, vision.make_llava())
    looks.clear()
    collate([row(picture(i)) for i in range(4)])
    assert len(looks) <= 1
    collate([row(picture(i)) for i in range(4)])
    assert len(looks) <= 1


def test_the_images_of_a_raw_row_are_read_and_processed_once_by_each_processor(llava, monkeypatch):
    seen, process = [], Multimodal.process
    counted = lambda self, text, images, *rest: seen.append(len(images)) or process(self, text, images, *rest)  # noqa: E731
    monkeypatch.setattr(Multimodal, "process", counted)
    rows = [row(picture(i)) for i in range(3)]
    alone, student = Collator(llava)(rows), [1, 1, 1]
    assert [count for count in seen if count] == student
    seen.clear()
    both = Collator(llava, vision.make_llava(image_mean=[0.1, 0.2, 0.3]))(rows)
    assert [count for count in seen if count] == student * 2
    assert both.teacher_images is not None
    assert torch.equal(alone.model_inputs["pixel_values"], both.model_inputs["pixel_values"])


def test_a_stored_row_may_end_a_turn_where_its_template_does_not(processor):
    """Only by one token: more is what the images or the processor no longer give."""
    one = encode_row(ONE, processor, train_on="assistant")
    stored = {"prompt_length": one.prompt_length, "text": one.text, "images": [image.record for image in one.images]}

    def collated(*added):
        ids, labels = [*one.input_ids, *added], [*one.labels, *added]
        return Collator(processor)([{**stored, "input_ids": ids, "labels": labels}])

    assert collated(2).model_inputs["input_ids"][0].tolist() == [*one.input_ids, 2]
    with pytest.raises(DataError, match="the processor gives it other tokens"):
        collated(2, 2)


def test_images_of_fewer_tiles_are_padded_with_zeros():
    processor = vision.make_idefics3()
    batch = Collator(processor)(ROWS)
    tiles = [5 * 2, 0, 5]
    assert batch.model_inputs["pixel_values"].shape == (3, 10, 3, 32, 32)
    for i, count in enumerate(tiles):
        assert (batch.model_inputs["pixel_values"][i].abs().flatten(1).sum(1) > 0).sum() == count
        assert (batch.model_inputs["pixel_attention_mask"][i].flatten(1).sum(1) > 0).sum() == count


def test_a_batch_without_images_has_no_visual_tensors(family, processor):
    model = vision.make_model(family, processor).train()
    batch = Collator(processor)([NONE, {"text": "zero"}])
    per_token = {"qwen": {"mm_token_type_ids"}, "gemma3": {"token_type_ids"}}.get(family, set())
    text_only = Collator(processor.tokenizer)([NONE, {"text": "zero"}])
    assert set(batch.model_inputs) == set(text_only.model_inputs) | per_token
    assert not batch.visual_sizes
    for name in per_token:
        assert batch.model_inputs[name].shape == batch.model_inputs["input_ids"].shape
        assert not batch.model_inputs[name].any()
    assert logits(model, batch).isfinite().all()


def test_token_types_are_zero_in_the_padding_and_for_rows_without_images():
    for name, key in (("qwen", "mm_token_type_ids"), ("gemma3", "token_type_ids")):
        processor = vision.FAMILIES[name]()
        batch = Collator(processor, pad_to_multiple_of=64)(ROWS)
        types = batch.model_inputs[key].bool()
        assert torch.equal(types, torch.isin(batch.model_inputs["input_ids"], torch.tensor(processor.image_token_ids)))
        assert types.sum(1).tolist()[1] == 0


@pytest.mark.parametrize("rows", [ROWS, [NONE, TWO], [ONE, TWO, NONE]], ids=["mixed", "text first", "text last"])
def test_the_first_rows_of_a_batch_are_those_rows_alone(processor, rows):
    collate = Collator(processor, pad_to_multiple_of=256)
    for kept in range(1, len(rows) + 1):
        assert_same_batch(cut_rows(collate(rows), kept), collate(rows[:kept]))


def test_the_teachers_tensors_are_cut_with_the_rows(llava):
    collate = Collator(llava, vision.make_llava(image_mean=[0.1, 0.2, 0.3]), pad_to_multiple_of=256)
    for kept in (1, 2, 3):
        assert_same_batch(cut_rows(collate(ROWS), kept), collate(ROWS[:kept]))
    assert_same_batch(cut_rows(collate([NONE, ONE]), 1), collate([NONE]))


def test_a_black_image_is_an_image():
    for make in (vision.make_llava, vision.make_idefics3):
        collate = Collator(make(do_normalize=False))
        black = row(Image.new("RGB", (32, 32)), messages=[QUESTION, ANSWER])
        for rows in ([black, ONE], [black, NONE, ONE]):
            batch = collate(rows)
            assert not batch.model_inputs["pixel_values"][:1].any()
            assert len(cut_rows(batch, 1).model_inputs["pixel_values"]) == 1


def assert_same_batch(cut, alone):
    images = {}
    for name, value in cut.model_inputs.items():
        shared = alone.model_inputs[name].shape
        if len(shared) > 3:  # rows that are gone may have had more tiles, which padding stands for here
            assert not value[:, shared[1] :].any()
            images[name] = value[:, : shared[1]]
    tiny.assert_same_batch(replace(cut, model_inputs={**cut.model_inputs, **images}), alone)


def test_images_of_different_sizes_are_refused_where_padding_would_show():
    processor = vision.make_llava(do_center_crop=False)
    collate = Collator(processor)
    same = row(picture(0, 32, 32), messages=[QUESTION, ANSWER])
    wide = row(picture(1, 64, 32), messages=[QUESTION, ANSWER])
    assert len(collate([wide]).model_inputs["pixel_values"]) == 1
    with pytest.raises(DataError, match=r"pixel_values of the shapes .* cannot share a batch"):
        collate([same, wide])


def test_an_image_that_changed_after_encoding_is_noticed(tmp_path):
    processor = vision.make_qwen()
    (tmp_path / "a.png").write_bytes(png(0))
    source = Source(write_lines(tmp_path / "a.jsonl", [row("a.png")]))
    options = {"max_length": None, "on_overlength": "error", "train_on": "assistant", "cache_dir": str(tmp_path)}
    dataset, _ = build_dataset([source], processor, **options)
    collate = Collator(processor)
    assert collate(list(dataset)).rows.ids == ["0:0"]
    (tmp_path / "a.png").write_bytes(png(0, 90, 60))
    with pytest.raises(DataError, match=r"row 0:0: the processor gives it other tokens than when it was encoded"):
        collate(list(dataset))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"row 0:0: no such image file"):
        collate(list(dataset))
    with pytest.raises(DataError, match=r"row 0:0 has images, and the collator has a tokenizer only"):
        Collator(processor.tokenizer)(list(dataset))


# ---------------------------------------------------------------------------------------------------- the teacher


def test_an_equal_processor_for_the_teacher_changes_nothing(llava):
    assert Collator(llava, vision.make_llava())(ROWS).teacher_images is None
    other_template = vision.make_llava(markers=False)
    other_template.tokenizer.pad_token = "<|endoftext|>"
    assert Collator(llava, other_template)(ROWS).teacher_images is None


def test_a_teacher_with_another_normalisation_gets_its_own_pixels(llava):
    teacher = vision.make_llava(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5])
    batch = Collator(llava, teacher)(ROWS)
    alone = Collator(teacher)(ROWS)
    assert batch.teacher_images.inputs.keys() == {"pixel_values"}
    assert batch.teacher_images.sizes == batch.visual_sizes == {"pixel_values": [2, 0, 1]}
    assert torch.equal(batch.teacher_images.inputs["pixel_values"], alone.model_inputs["pixel_values"])
    assert not torch.equal(batch.teacher_images.inputs["pixel_values"], batch.model_inputs["pixel_values"])
    assert torch.equal(batch.model_inputs["input_ids"], alone.model_inputs["input_ids"])
    assert Collator(llava, teacher)([NONE]).teacher_images is None


def test_a_teacher_that_takes_other_numbers_of_image_tokens_is_refused(llava):
    collate = Collator(llava, vision.make_llava(size=48))
    with pytest.raises(DataError, match=re.escape("row 3:1: its images take 16 tokens for the student and 36 for")):
        collate([NONE, {**ONE, "row_id": "3:1"}])
    assert len(collate([NONE])) == 1
    with pytest.raises(DataError, match=r"row 3:1: .*(refuses the row|other tokens than)"):
        Collator(llava, vision.make_qwen())([{**ONE, "row_id": "3:1"}])


def test_a_teacher_without_images_serves_text_only(llava, tokenizer):
    collate = Collator(llava, tokenizer)
    assert collate([NONE]).teacher_images is None
    with pytest.raises(DataError, match="has no processor for images"):
        collate([NONE, ONE])


def test_a_tokenizer_has_no_images_and_a_processor_does(llava, tokenizer):
    assert multimodal(tokenizer) is None
    assert multimodal(llava).placeholder == "<image>"


def test_rows_of_another_collator_are_cut_only_where_it_is_known_what_they_own():
    tensors = {"input_ids": torch.ones(3, 4), "labels": torch.ones(3, 4), "pixel_values": torch.ones(3, 2)}
    given = {**tensors, "row_ids": ["a", "b", "c"], "flag": True}
    cut = cut_rows(received(given, None), 2)
    assert cut.model_inputs.keys() == {"input_ids", "pixel_values", "flag"}
    assert len(cut) == len(cut.model_inputs["input_ids"]) == len(cut.model_inputs["pixel_values"]) == 2
    assert (cut.rows.ids, cut.model_inputs["flag"]) == (["a", "b"], True)
    with pytest.raises(DataError, match="dataloader_drop_last"):
        cut_rows(received({**given, "pixel_values": torch.ones(7, 2)}, None), 2)
