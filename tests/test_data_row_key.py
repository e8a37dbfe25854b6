"""The name of a row by what is in it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import datasets
import pytest
import torch

from kdtrain.data import Collator, Source, build_dataset, cut_rows
from kdtrain.data.row_key import row_key, row_keys
from kdtrain.generation.answers import TeacherAnswers
from kdtrain.generation.generate import with_completions
from kdtrain.generation.writers import LocalWriter
from tests import tiny
from tests import tiny_processors as vision
from tests.test_data_dataset import write_lines
from tests.test_data_images import ANSWER, QUESTION, TURNS, row
from tests.tiny_processors import png

ROW = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "prompt_length": 2, "ce": True, "row_id": "0:0"}
FOR_TEACHER = {"teacher_input_ids": [9, 6, 7, 8], "teacher_labels": [-100, -100, 7, 8], "teacher_prompt_length": 2}
TEACHER = {**ROW, **FOR_TEACHER}

CHANGES = {
    "an id": {"input_ids": [5, 4, 7, 8]},
    "a token more": {"input_ids": [5, 6, 7, 8, 0], "labels": [-100, -100, 7, 8, -100]},
    "a token less": {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
    "a label that is none": {"labels": [-100, -100, -100, 8]},
    "a label": {"labels": [-100, -100, 7, 9]},
    "ids and labels exchanged": {"input_ids": ROW["labels"], "labels": ROW["input_ids"]},
    "a teacher that reads other tokens": FOR_TEACHER,
    "an id of the teacher": {**FOR_TEACHER, "teacher_input_ids": [9, 4, 7, 8]},
    "where the teacher's labels stand": {
        **FOR_TEACHER,
        "teacher_input_ids": [9, 6, 7, 8, 0],
        "teacher_labels": [-100, 7, 8, -100, -100],
    },
    "an image": {"images": [{"path": None, "bytes": b"a"}]},
    "a byte of an image": {"images": [{"path": None, "bytes": b"b"}]},
    "two images": {"images": [{"path": None, "bytes": b"a"}, {"path": None, "bytes": b"b"}]},
    "the order of two images": {"images": [{"path": None, "bytes": b"b"}, {"path": None, "bytes": b"a"}]},
    "where one of two images ends": {"images": [{"path": None, "bytes": b"ab"}, {"path": None, "bytes": b""}]},
}


def test_a_key_is_16_bytes_and_differs_for_any_change_of_what_a_row_is():
    keys = {name: row_key({**ROW, **change}) for name, change in {"nothing": {}, **CHANGES}.items()}
    assert {len(key) for key in keys.values()} == {16}
    assert len(set(keys.values())) == len(keys)


def test_where_the_text_of_the_student_ends_and_that_of_the_teacher_begins_counts():
    def key(own, of_teacher):
        row = {"input_ids": [-100] * own, "labels": [-100] * own, "prompt_length": own}
        other = {"teacher_input_ids": [-100] * of_teacher, "teacher_labels": [-100] * of_teacher}
        return row_key({**row, **other, "teacher_prompt_length": of_teacher})

    assert key(4, 2) != key(5, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"row_id": "3:17:1"},
        {"ce": False},
        {"prompt_length": 1},
        {"answers": True},
        {"chat": '{"messages": []}'},
        {"images": None},
        {"teacher_input_ids": None, "teacher_labels": None, "teacher_prompt_length": None},
        {"teacher_input_ids": ROW["input_ids"], "teacher_labels": ROW["labels"], "teacher_prompt_length": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_depends_on_nothing_that_targets_do_not_depend_on(change):
    assert row_key({**ROW, **change}) == row_key(ROW)


@pytest.mark.slow
def test_a_key_is_the_same_in_every_process_and_for_every_form_of_numbers():
    code = f"from kdtrain.data.row_key import row_key; print(row_key({TEACHER!r}).hex())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert other.stdout.strip() == row_key(TEACHER).hex()
    names = ("input_ids", "labels", "teacher_input_ids", "teacher_labels")
    tensors = {**TEACHER, **{name: torch.tensor(TEACHER[name]) for name in names}}
    assert row_key(tensors) == row_key(TEACHER)
    masked = {"input_ids": ROW["input_ids"], "completion_mask": [0, 0, 1, 1]}
    assert row_key(masked) == row_key(ROW)


def test_an_image_counts_by_its_content_wherever_it_lies(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(png(1))
    shutil.copy(first, second)
    as_files = [row_key({**ROW, "images": [{"path": str(path), "bytes": None}]}) for path in (first, second)]
    assert as_files == [row_key({**ROW, "images": [{"path": None, "bytes": png(1)}]})] * 2
    second.write_bytes(png(2))
    assert row_key({**ROW, "images": [{"path": str(second), "bytes": None}]}) not in as_files


# ---- many rows -------------------------------------------------------------------------------------------------------


def built(rows, tokenizer, folder, name="rows.jsonl", **options):
    """A data set of these rows in a file of this name, and how the file was read."""
    source = options.pop("source", {})
    options = {"max_length": 64, "on_overlength": "error", "train_on": "assistant", **options}
    return build_dataset([Source(write_lines(folder / name, rows), **source)], tokenizer, **options)


def test_keys_of_a_data_set_are_those_of_its_rows(tokenizer, tmp_path):
    rows, _ = built(tiny.CHATS * 3, tokenizer, tmp_path)
    for some in (
        rows,
        rows.select([7, 3, 3, 11]),
        rows.select(range(4, 9)),
        datasets.concatenate_datasets([rows, rows]),
    ):
        assert list(row_keys(some)) == [row_key(one) for one in some]
    assert len(set(row_keys(rows))) == len(tiny.CHATS)


@pytest.mark.parametrize(
    "rows",
    [
        [ROW, {**ROW, "input_ids": [5, 6, 9, 8]}],
        [{**ROW, **dict.fromkeys(FOR_TEACHER)}, TEACHER],
        [{**TEACHER, "images": None}, {**TEACHER, "images": [{"path": None, "bytes": b"a"}]}],
        [{"input_ids": [5, 6], "completion_mask": [0, 1]}, {"input_ids": [5, 6], "completion_mask": [1, 1]}],
    ],
    ids=["tokens", "teacher", "images", "masks"],
)
@pytest.mark.parametrize("kind", ["int32", "int64", "large", "fixed"])
def test_keys_of_a_data_set_do_not_depend_on_how_its_columns_are_stored(rows, kind):
    made = datasets.Dataset.from_list(rows)
    number = datasets.Value("int64" if kind == "int64" else "int32")
    lists = {
        "large": lambda values: datasets.LargeList(number),
        "fixed": lambda values: datasets.Sequence(number, length=len(values[-1])),
    }.get(kind, lambda values: datasets.List(number))
    for name in {"input_ids", "labels", "teacher_input_ids", "teacher_labels"} & set(made.column_names):
        if kind != "fixed" or all(made[name]):  # a list of fixed length is never missing
            made = made.cast_column(name, lists(made[name]))
    assert list(row_keys(made)) == [row_key(one) for one in rows]
    assert list(row_keys(made.with_format("torch"))) == [row_key(one) for one in rows]


# ---- data sets and batches -------------------------------------------------------------------------------------------


def test_a_batch_names_its_rows_as_their_data_set_does_only_when_it_is_asked_to(tokenizer, tmp_path):
    rows, _ = built(tiny.CHATS, tokenizer, tmp_path)
    keys = list(row_keys(rows))
    assert Collator(tokenizer)([rows[0]]).rows.keys == ()
    collate = Collator(tokenizer, row_keys=True, pad_to_multiple_of=32)
    for places in ([0, 1, 2], [2, 0], [5]):
        assert collate([rows[i] for i in places]).rows.keys == [keys[i] for i in places]
    assert collate(tiny.CHATS[:3]).rows.keys == keys[:3]  # raw rows


def test_a_row_has_one_key_whatever_file_source_order_epoch_and_run_it_comes_from(tokenizer, tmp_path):
    chats = tiny.CHATS
    keys = dict(zip(map(json.dumps, chats), row_keys(built(chats, tokenizer, tmp_path)[0]), strict=True))
    turned, _ = built(chats[::-1], tokenizer, tmp_path, "turned.jsonl", source={"ce": False})
    assert list(row_keys(turned)) == list(keys.values())[::-1]
    sources = [Source(str(tmp_path / name), weight=2.0) for name in ("rows.jsonl", "turned.jsonl")]
    mixed, _ = build_dataset(sources, tokenizer, max_length=50, on_overlength="error", train_on="assistant")
    assert len(mixed) == 4 * len(chats)
    assert set(row_keys(mixed)) == set(keys.values())
    some, _ = built(chats, tokenizer, tmp_path, source={"limit": 2})
    assert list(row_keys(some)) == list(keys.values())[:2]


def test_a_row_that_is_cut_has_the_key_of_what_is_left_of_it(tokenizer, tmp_path):
    whole, _ = built(tiny.CHATS, tokenizer, tmp_path)
    longest = max(range(len(whole)), key=lambda i: len(whole[i]["input_ids"]))
    limit = len(whole[longest]["input_ids"]) - 3
    options = {"max_length": limit, "on_overlength": "truncate"}
    cut, _ = built(tiny.CHATS, tokenizer, tmp_path, **options)
    collated = Collator(tokenizer, row_keys=True, **options)
    assert collated([whole[longest]]).rows.keys == [row_key(cut[longest])] != [row_key(whole[longest])]
    assert collated([tiny.CHATS[longest]]).rows.keys == [row_key(cut[longest])]
    dropping = Collator(tokenizer, row_keys=True, max_length=limit, on_overlength="drop")
    others = [i for i in range(len(whole)) if len(whole[i]["input_ids"]) <= limit]
    assert dropping(list(whole)).rows.keys == [row_key(whole[i]) for i in others]


@pytest.fixture(scope="module")
def llava():
    return vision.make_llava()


def test_rows_with_images_have_the_same_key_in_the_data_set_and_in_a_batch(llava, tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    chats = [
        {"messages": [QUESTION, ANSWER], "images": ["a.png"]},
        {"messages": TURNS, "images": None},
        {"messages": [QUESTION, ANSWER], "images": ["b.png"]},
    ]
    (tmp_path / "b.png").write_bytes(png(2))
    rows, _ = built(chats, llava, tmp_path, max_length=256)
    keys = list(row_keys(rows))
    assert keys == [row_key(one) for one in rows]
    assert len(set(keys)) == 3  # the first and the last differ in their image alone
    collate = Collator(llava, row_keys=True, image_root=str(tmp_path))
    assert collate(list(rows)).rows.keys == collate(chats).rows.keys == keys
    assert Collator(llava, row_keys=True)([row(png(1), messages=[QUESTION, ANSWER])]).rows.keys == keys[:1]


def test_a_row_that_the_teacher_has_answered_has_the_key_of_its_answer(tokenizer, tmp_path):
    rows, _ = built(tiny.CHATS[:2], tokenizer, tmp_path, source={"answers": "teacher"})
    options = {"max_new_tokens": 3, "vocabulary": 320, "batch_size": 2, "device": "cpu"}
    writer = LocalWriter(tiny.make_qwen3(seed=2).eval(), tokenizer, Collator(tokenizer), **options)
    answered = TeacherAnswers(writer, tmp_path / "answers", identity={}).fill(rows)
    keys = list(row_keys(answered))
    assert keys == [row_key(one) for one in answered]
    assert not set(keys) & set(row_keys(rows))
    assert Collator(tokenizer, row_keys=True)(list(answered)).rows.keys == keys


def test_a_batch_that_is_cut_or_answered_anew_has_no_key_of_a_row_that_is_not_in_it(tokenizer, tmp_path):
    rows, _ = built(tiny.CHATS, tokenizer, tmp_path)
    batch = Collator(tokenizer, row_keys=True)(list(rows)[:3])
    assert cut_rows(batch, 2).rows.keys == batch.rows.keys[:2]
    assert batch.to("meta").rows.keys == replace(batch, all_repeated=True).rows.keys == batch.rows.keys
    assert with_completions(batch, [[5], [6], [7]], 3).rows.keys == ()
