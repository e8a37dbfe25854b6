"""The rows of a window, joined, taken and dealt anew: nothing is lost, nothing moves, and less is padding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtrain.data import Collator
from kdtrain.data.batch import Batch, Rows, TeacherImages, TeacherTokens
from kdtrain.data.images import Image
from kdtrain.data.regroup import dealt_by_length, rows_of, taken
from kdtrain.data.visual_batch import CannotShareError
from kdtrain.losses.reduce import IGNORE_INDEX
from tests import tiny
from tests import tiny_processors as vision
from tests.test_data_visual_batch import NONE, ONE, TWO
from tests.test_trainer import make_trainer

PAD = 3


def make_rows(lengths, first=0, ids=True):
    numbers = range(first, first + len(lengths))
    return Rows(
        ids=[f"r{i}" for i in numbers] if ids else (),
        keys=[bytes([i]) for i in numbers],
        prompt_lengths=torch.tensor([max(1, n // 2) for n in lengths]),
        ce=torch.tensor([i % 2 == 0 for i in numbers]),
        truncated=[i % 3 == 0 for i in numbers],
        chats=[f'{{"messages": [{i}]}}' for i in numbers],
        images=[(Image(f"/{i}.png"),) * (i % 3) for i in numbers],
        answers=[str(i) for i in numbers],
        samples=[i % 4 for i in numbers],
        cut=[i % 5 == 0 for i in numbers],
        kd_weights=torch.tensor([1.0 + i for i in numbers]),
    )


def padded(rows, fill, multiple=1):
    width = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def make_batch(lengths, first=0, multiple=1, **changes):
    """Rows of these lengths, which own no, one or two images; the teacher reads two tokens more of each."""
    ids = [[10 + (first + i) % 40 + j for j in range(n)] for i, n in enumerate(lengths)]
    labels = [[IGNORE_INDEX] * (len(row) // 2 or 1) + row[len(row) // 2 or 1 :] for row in ids]
    read = [[7, 8, *row] for row in ids]
    images = [(first + i) % 3 for i in range(len(ids))]
    pixels = torch.arange(1.0 * sum(images) * 2).view(-1, 2) + 100 * first + 1
    fields = {
        "model_inputs": {
            "input_ids": padded(ids, PAD, multiple),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, multiple),
            "mm_token_type_ids": padded([[0, *[1] * (len(row) - 1)] for row in ids], 0, multiple),
            **({"pixel_values": pixels} if len(pixels) else {}),
        },
        "labels": padded(labels, IGNORE_INDEX, multiple),
        "rows": make_rows(lengths, first),
        "visual_sizes": {"pixel_values": images} if len(pixels) else {},
        "teacher_tokens": TeacherTokens(
            input_ids=padded(read, PAD, multiple),
            attention_mask=padded([[1] * len(row) for row in read], 0, multiple),
            labels=padded([[IGNORE_INDEX] * 2 + row for row in labels], IGNORE_INDEX, multiple),
            prompt_lengths=torch.tensor([max(1, n // 2) + 2 for n in lengths]),
        ),
        "generated_by": "student",
    }
    return Batch(**{**fields, **changes})


WINDOWS = st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=4), min_size=1, max_size=5)


def joined(batches, pad_id):
    """One batch of the rows of several, in their order."""
    return rows_of(batches, range(sum(map(len, batches))), pad_id, None)


def window(lengths, multiple=1):
    starts = [sum(map(len, lengths[:i])) for i in range(len(lengths))]
    return [make_batch(part, first, multiple) for part, first in zip(lengths, starts, strict=True)], starts


@settings(deadline=None, max_examples=30)
@given(WINDOWS)
def test_batches_that_are_joined_can_be_taken_apart_again(lengths):
    batches, starts = window(lengths)
    whole = joined(batches, PAD)
    assert len(whole) == sum(map(len, lengths))
    for batch, start in zip(batches, starts, strict=True):
        tiny.assert_same_batch(taken(whole, range(start, start + len(batch))), batch)


@settings(deadline=None, max_examples=30)
@given(WINDOWS, st.randoms())
def test_rows_are_taken_in_any_order_and_more_than_once(lengths, random):
    batches, _ = window(lengths)
    whole = joined(batches, PAD)
    order = [random.randrange(len(whole)) for _ in range(random.randint(1, 6))]
    found = taken(whole, order)
    alone = [taken(whole, [row]) for row in order]
    tiny.assert_same_batch(found, joined(alone, PAD))
    assert found.rows.ids == [whole.rows.ids[row] for row in order]


@settings(deadline=None, max_examples=30)
@given(WINDOWS, st.sampled_from([1, 4]))
def test_dealing_keeps_every_row_and_pads_no_more(lengths, multiple):
    batches, _ = window(lengths, multiple)
    dealt = dealt_by_length(batches, PAD, multiple)
    assert sorted(map(len, dealt)) == sorted(map(len, batches))
    before, after = (
        sorted((batch.rows.ids[i], batch, i) for batch in part for i in range(len(batch))) for part in (batches, dealt)
    )
    for (name, batch, i), (same, other, j) in zip(before, after, strict=True):
        assert name == same
        tiny.assert_same_batch(taken(other, [j]), taken(batch, [i]))
    areas = [[(b.labels.numel(), b.teacher_tokens.labels.numel()) for b in part] for part in (batches, dealt)]
    assert sum(map(sum, areas[1])) <= sum(map(sum, areas[0]))
    for before, after in zip(*(zip(*part, strict=True) for part in areas), strict=True):
        assert max(after) <= max(before)
    assert all(batch.labels.shape[1] % multiple == 0 for batch in dealt)


# ---- what is of no batch ---------------------------------------------------------------------------------------------


def test_what_a_batch_does_not_say_of_its_rows_stays_unsaid():
    bare = [replace(make_batch([4, 3], 2 * i), rows=Rows(), teacher_tokens=None) for i in range(2)]
    whole = joined(bare, PAD)
    assert whole.rows == Rows()
    assert whole.teacher_tokens is None
    some = joined([replace(bare[0], rows=make_rows([4, 3])), bare[1]], PAD).rows
    assert some.ids == ["r0", "r1", "", ""]
    assert some.keys == ()  # nothing stands for a key
    assert some.ce.tolist() == [True, False, True, True]
    assert some.kd_weights.tolist() == [1, 2, 1, 1]
    assert some.prompt_lengths is None


def test_a_batch_that_the_teacher_reads_alike_joins_those_that_it_does_not():
    batches = [make_batch([6, 3]), replace(make_batch([5], 2), teacher_tokens=None)]
    seen = taken(joined(batches, PAD), [2]).as_teacher_sees_it()
    tiny.assert_same_batch(seen, batches[1].as_teacher_sees_it())


def test_prompts_that_are_padded_on_the_left_stay_there():
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    long, short = (make_batch([4, 4]), make_batch([3], 2))
    long = replace(long, rows=replace(long.rows, prompts=(ids, mask)))
    short = replace(short, rows=replace(short.rows, prompts=(torch.tensor([[4]]), torch.tensor([[1]]))))
    found = taken(joined([long, short], PAD), [2, 0]).rows.prompts
    assert found[0].tolist() == [[0, 4], [5, 6]]
    assert found[1].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: {"visual_sizes": {}},
        lambda batch: {"model_inputs": {**batch.model_inputs, "position_ids": torch.zeros_like(batch.labels)}},
        lambda batch: {"teacher_images": TeacherImages(inputs={"pixel_values": torch.ones(2, 2)}, sizes={})},
    ],
    ids=["whose images", "what is it", "whose images for the teacher"],
)
def test_a_batch_whose_tensors_are_not_known_to_belong_to_rows_is_left_as_it_is(change):
    batches = [make_batch([9, 3]), make_batch([2, 8], 2)]
    assert dealt_by_length(batches, PAD)[0].rows.ids == ["r0", "r3"]
    odd = [replace(batch, **change(batch)) for batch in batches]
    for found, given_ in zip(dealt_by_length(odd, PAD), odd, strict=True):
        assert found is given_
    with pytest.raises(CannotShareError, match=r"which entries of (pixel_values|position_ids)"):
        joined(odd, PAD)


def test_rows_that_only_fill_up_an_epoch_keep_their_place():
    repeated = replace(make_batch([12]).without_labels(), all_repeated=True)
    dealt = dealt_by_length([make_batch([2, 9], 1), repeated, make_batch([8, 3], 3)], PAD)
    assert dealt[1] is repeated
    assert [batch.rows.ids for batch in dealt] == [["r2", "r3"], ["r0"], ["r4", "r1"]]


def test_what_would_save_nothing_is_left_as_it_is():
    batches = [make_batch([7, 6]), make_batch([3, 2], 2)]
    assert all(found is batch for found, batch in zip(dealt_by_length(batches, PAD), batches, strict=True))
    assert dealt_by_length([], PAD) == []


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=vision.FAMILIES)
def processor(request):
    made = vision.FAMILIES[request.param]()
    made.family = request.param
    return made


def of_images(processor, *windows):
    """Batches of rows with two images, one and none, by their letter, each row under a name of its own."""
    kinds, collate = {"2": TWO, "1": ONE, "0": NONE}, Collator(processor)
    rows = [[{**kinds[kind], "row_id": f"{i}:{kind}{j}"} for j, kind in enumerate(w)] for i, w in enumerate(windows)]
    return [collate(part) for part in rows]


@pytest.mark.parametrize("windows", [("20", "1", "00"), ("00", "12"), ("1", "0"), ("21", "0")], ids=str)
def test_rows_with_images_are_computed_wherever_they_are(processor, windows):
    """In batches that had no row with an image as well, and the other way round."""
    model = vision.make_model(processor.family, processor).double()
    batches = of_images(processor, *windows)
    alone = {}
    for batch in batches:
        for row in range(len(batch)):
            alone[batch.rows.ids[row]] = logits_of(model, taken(batch, [row]))[0]
    whole = joined(batches, PAD)
    for batch in (whole, taken(whole, range(len(whole))[::-1]), *dealt_by_length(batches, PAD)):
        for name, found in zip(batch.rows.ids, logits_of(model, batch), strict=True):
            torch.testing.assert_close(found[: len(alone[name])], alone[name], atol=1e-9, rtol=1e-7)


def logits_of(model, batch):
    inputs = {n: v.double() if torch.is_floating_point(v) else v for n, v in batch.model_inputs.items()}
    with torch.no_grad():
        return model(**inputs).logits


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_and_gradient_of_a_window_do_not_change_by_dealing(tmp_path):
    student, teacher = tiny.make_qwen3(seed=1).double(), tiny.make_qwen3(seed=2).double()
    trainer = make_trainer(tmp_path, student, teacher, sft_alpha=0.5)
    batches = [trainer.data_collator(tiny.CHATS[i : i + 2]) for i in (0, 2, 4)]
    weights = iter(range(6))
    batches = [
        replace(b, rows=replace(b.rows, ce=torch.tensor([next(weights) % 3 > 0 for _ in range(2)]))) for b in batches
    ]
    dealt = dealt_by_length(batches, PAD)
    assert [batch.labels.shape for batch in dealt] != [batch.labels.shape for batch in batches]

    def of_window(window):
        student.zero_grad()
        num_items = sum(batch.num_supervised for batch in window)
        total = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items) for batch in window)
        total.backward()
        return total.detach(), {name: p.grad.clone() for name, p in student.named_parameters()}

    (loss, gradients), (found, of_dealt) = of_window(batches), of_window(dealt)
    assert loss > 0.1
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_dealt[name], gradient, rtol=1e-9, atol=1e-12)
