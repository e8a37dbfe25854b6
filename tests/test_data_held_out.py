"""`data.eval: 5%`: which of the training rows are kept to evaluate on."""

import json
import random

import datasets
import pytest

from kdtrain.data import Source
from kdtrain.data.held_out import HeldOut
from kdtrain.data.sources import read_all
from kdtrain.errors import DataError
from tests.tiny import slow

datasets.disable_progress_bars()
ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(2000)]


@pytest.fixture
def sides(tmp_path):
    """The rows of both sides, as (source, row, content)."""

    def call(*sources, share=0.05):
        found = []
        for training in (True, False):
            raw, _ = read_all(sources, tmp_path / f"{training}.arrow", HeldOut(share, training))
            found.append([(row["source"], row["row"], json.loads(row["text"])) for row in raw])
        return found

    return call


def in_memory(rows, **options):
    return Source("rows", rows=rows, **options)


def prompts(rows):
    return {row["prompt"] for *_, row in rows}


def test_each_row_is_on_one_side_with_the_number_that_it_has_among_all(sides):
    train, held_out = sides(in_memory(ROWS))
    assert sorted(train + held_out, key=lambda row: row[1]) == [(0, i, row) for i, row in enumerate(ROWS)]
    assert 60 < len(held_out) < 140  # 100 on average


@pytest.mark.parametrize("share", [slow(0.005), 0.3, slow(0.9)])
def test_about_the_share_is_held_out_and_more_of_it_holds_out_the_same_rows_and_others(share, sides):
    held_out = sides(in_memory(ROWS), share=share)[1]
    assert abs(len(held_out) - share * 2000) < 4 * (2000 * share * (1 - share)) ** 0.5
    assert prompts(held_out) <= prompts(sides(in_memory(ROWS), share=min(share + 0.05, 0.99))[1])


def test_a_rows_side_depends_on_what_it_says_alone(sides, tmp_path):
    _, held_out = sides(in_memory(ROWS))
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert prompts(sides(in_memory(shuffled))[1]) == prompts(held_out)
    assert prompts(sides(in_memory(ROWS[:500]), in_memory(ROWS[500:]))[1]) == prompts(held_out)
    others = [
        {"id": i, "completion": row["completion"], "prompt": row["prompt"], "text": None} for i, row in enumerate(ROWS)
    ]
    assert prompts(sides(in_memory(others))[1]) == prompts(held_out)
    datasets.Dataset.from_list(others[1:]).to_parquet(tmp_path / "a.parquet")
    found = sides(Source(str(tmp_path / "a.parquet")), in_memory(ROWS[:1]))[1]
    assert prompts(found) == prompts(held_out)
    renamed = [{"q": row["prompt"], "a": row["completion"], "prompt": "other"} for row in ROWS]
    mapped = in_memory(renamed, columns={"prompt": "q", "completion": "a"})
    assert {row["q"] for *_, row in sides(mapped)[1]} == prompts(held_out)


def test_equal_rows_are_never_on_both_sides(sides):
    twice = [{**row, "id": i} for i, row in enumerate(ROWS[:300] * 3)]
    train, held_out = sides(in_memory(twice), in_memory(ROWS[:300]), share=0.3)
    assert not prompts(train) & prompts(held_out)
    assert len(train) + len(held_out) == 1200


def test_limit_and_slices_come_first(sides):
    train, held_out = sides(in_memory(ROWS, split="train[500:]", limit=400), share=0.2)
    assert prompts(train) | prompts(held_out) == {row["prompt"] for row in ROWS[500:900]}


@pytest.mark.parametrize("columns", [None, {"query": "query", "response": "response"}])
@pytest.mark.parametrize("column", ["images", "image", "image_path", "image_paths", "file_name", "image_url"])
def test_rows_that_differ_by_their_image_alone_are_not_all_on_one_side(column, columns, sides):
    """They were with image_path and the like: of each answer all rows, or none, were held out."""
    rows = [{"query": "Which digit?", "response": "Three", column: f"{i}.png"} for i in range(200)]
    for answers in ("data", "teacher"):
        held_out = sides(in_memory(rows, columns=columns, answers=answers), share=0.3)[1]
        assert 30 < len(held_out) < 90


def test_a_file_name_that_is_no_image_does_not_part_equal_rows(sides):
    rows = [{**row, "file_name": f"{j}.py"} for row in ROWS[:100] for j in range(3)]
    train, held_out = sides(in_memory(rows), share=0.3)
    assert not prompts(train) & prompts(held_out)


ASKED = {
    "messages as JSON text": lambda q, a: {"messages": json.dumps(talk(q, a))},
    "messages in lists": lambda q, a: {"messages": {"role": ["user", "assistant"], "content": [q, a]}},
    "conversations as JSON text": lambda q, a: {
        "conversations": json.dumps([{"from": "human", "value": q}, {"from": "gpt", "value": a}])
    },
    "conversations in lists": lambda q, a: {"conversations": {"from": ["human", "gpt"], "value": [q, a]}},
    "a completion of messages": lambda q, a: {"prompt": talk(q), "completion": talk(q, a)[1:]},
    "alpaca": lambda q, a: {"instruction": "Answer.", "input": q, "output": a, "text": f"Answer. {q} {a}"},
    "query": lambda q, a: {"query": q, "response": a, "text": f"{q} {a}"},
    "two of the forms": lambda q, a: {"messages": json.dumps(talk(q, a))} if a < "a1" else {"messages": talk(q)},
    "a column that is not read": lambda q, a: {"messages": talk(q, a), "prompt": a},
}


def talk(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]


@pytest.mark.parametrize("form", ASKED)
def test_where_the_teacher_answers_the_form_of_the_same_prompt_does_not_matter(form, sides):
    rows = [ASKED[form](f"q{i}", f"a{j} {i}") for i in range(100) for j in range(3)]
    train, held_out = sides(in_memory(rows, answers="teacher"), share=0.3)
    assert not {number // 3 for _, number, _ in train} & {number // 3 for _, number, _ in held_out}
    assert 30 < len(held_out) < 150


@pytest.mark.parametrize("form", ["pair", "messages", "conversations"])
def test_where_the_teacher_answers_the_same_prompt_is_on_one_side(form, sides):
    def row(question, answer):
        if form == "pair":
            return {"prompt": question, "completion": answer}
        if form == "messages":
            talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return {"messages": talk}
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    rows = [row(f"q{i}", f"a{i} {j}") for i in range(100) for j in range(3)]
    train, held_out = sides(in_memory(rows, answers="teacher"), share=0.3)
    assert not {number // 3 for _, number, _ in train} & {number // 3 for _, number, _ in held_out}
    train, held_out = sides(in_memory(rows), share=0.3)
    assert {number // 3 for _, number, _ in train} & {number // 3 for _, number, _ in held_out}


def test_what_cannot_be_read_is_counted_on_the_training_side_alone(sides, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + "".join(f"q{i},a{i}\n" for i in range(200)) + "one,two,three\n")
    bad = [
        [row["problem"] for row in read_all([Source(str(path))], tmp_path / "raw.arrow", HeldOut(0.5, training))[0]]
        for training in (True, False)
    ]
    assert [sum(map(bool, side)) for side in bad] == [1, 0]


def test_a_side_without_rows_is_an_error(sides, tmp_path):
    for share, training, purpose in ((0.001, False, "evaluate on"), (0.999, True, "train on")):
        with pytest.raises(DataError, match=rf"{100 * share}% of the 4 rows of data\.train leaves none to {purpose}"):
            read_all([in_memory(ROWS[:4])], tmp_path / "raw.arrow", HeldOut(share, training))


@pytest.mark.parametrize("column", ["image", "image_path", "file_name"])
def test_rows_that_differ_in_their_image_alone_fall_on_both_sides(sides, column):
    rows = [{"query": "Which digit?", "response": str(i % 2), column: f"{i}.png"} for i in range(200)]
    train, held_out = sides(in_memory(rows), share=0.2)
    for side in (train, held_out):
        assert {row["response"] for *_, row in side} == {"0", "1"}
    assert 20 < len(held_out) < 60


def test_a_question_is_on_one_side_in_whatever_layout_where_the_teacher_answers(sides):
    def messages(i, answer):
        return [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]

    rows = []
    for i in range(60):
        rows.append({"messages": messages(i, "one")})
        rows.append({"messages": json.dumps(messages(i, "two"))})
        rows.append({"messages": {"role": ["user", "assistant"], "content": [f"question {i}", "three"]}})
        rows.append({"instruction": f"question {i}", "output": "four"})
    train, held_out = sides(in_memory(rows, answers="teacher"), share=0.3)
    questions = [{number // 4 for _, number, _ in side} for side in (train, held_out)]
    assert questions[1]
    assert not questions[0] & questions[1]
