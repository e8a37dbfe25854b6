"""Weights in the divergence that data name: of rows, messages, tokens; through everything that becomes of a row."""

import json
import math

import pytest
import torch

from kdtrain.data import Collator, Source, encode_row
from kdtrain.data.encoded_row import truncate
from kdtrain.data.errors import RowError
from kdtrain.data.prefix import OPTION as PREFIX
from kdtrain.data.regroup import rows_of, taken
from kdtrain.data.rows import parse_row
from kdtrain.data.visual_batch import cut_rows
from kdtrain.errors import DataError
from tests import tiny
from tests.test_data_dataset import FORGETFUL, build, tokenizer_with, write_lines, write_table  # noqa: F401
from tests.test_data_stream import stream  # noqa: F401
from tests.test_data_stream import taken as streamed

TURNS = ["What?", "zero", "And then?", "the path", "And?", "two"]


def chat(*weights, **columns):
    """A conversation of three answers with these weights."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TURNS)]
    for message, weight in zip(messages[1::2], weights, strict=False):
        if weight is not None:
            message["kd_weight"] = weight
    return {"messages": messages, **columns}


def by_answer(ids, labels, weights, tokenizer):
    """The text of each run of supervised tokens, and the weights in it."""
    found, before = [], -100
    for token, label, weight in zip(ids, labels, weights or [1.0] * len(ids), strict=True):
        if label != -100:
            if before == -100:
                found.append(([], set()))
            found[-1][0].append(token)
            found[-1][1].add(weight)
        before = label
    return [(tokenizer.decode(tokens), *own) for tokens, own in found]


ANSWERS = ["zero<|im_end|>", "the path<|im_end|>", "two<|im_end|>"]


# ---- rows ------------------------------------------------------------------------------------------------------------

KINDS = [
    {"messages": tiny.CHATS[0]["messages"]},
    {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "zero"}]},
    {"prompt": "What?", "completion": " zero"},
    {"prompt": "What?"},
    {"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "zero"}]},
    {"instruction": "What?", "output": "zero"},
    {"query": "What?", "response": "zero"},
    {"text": "zero"},
]


@pytest.mark.parametrize("row", KINDS, ids=lambda row: "-".join(row))
def test_rows_of_every_kind_have_a_weight(tokenizer, row):
    for weight, read in ((2, 2.0), (0, 0.0), ("0.5", 0.5), (None, 1.0), ("", 1.0)):
        encoded = encode_row({**row, "kd_weight": weight}, tokenizer, train_on="assistant")
        assert (encoded.kd_weight, encoded.kd_weights, encoded.notes) == (read, None, ())
    assert encode_row(row, tokenizer, train_on="assistant").kd_weight == 1


MISTAKES = [
    (-1, "is -1: it must be a finite number of 0 or more"),
    (math.nan, "is nan: it must be"),
    (math.inf, "is inf: it must be"),
    (10**400, "is inf: it must be"),
    ("high", "is the text high: it must be"),
    ("nan", "is nan: it must be"),
    (True, "is a boolean: it must be"),
    ({"a": 1}, "is a mapping: it must be"),
    ([1.0, 2.0], "is a list: it must be a finite number of 0 or more. One for each token is for rows with input_ids"),
]


@pytest.mark.parametrize(("value", "problem"), MISTAKES, ids=str)
def test_anything_but_a_number_of_zero_or_more_is_a_bad_row(value, problem):
    for row in KINDS[::3]:
        with pytest.raises(RowError, match=f"kd_weight {problem}"):
            parse_row({**row, "kd_weight": value})
    with pytest.raises(RowError, match=rf"messages\[3\].kd_weight {problem}"):
        parse_row(chat(None, value))


def test_bad_weights_are_counted_and_shown_with_file_and_line(build, tmp_path):  # noqa: F811
    lines = [json.dumps(chat()), json.dumps(chat(kd_weight=-1)), json.dumps(chat(kd_weight="high")),
             json.dumps(chat(None, math.nan)), json.dumps(chat(kd_weight=[1, 2]))]  # fmt: skip
    dataset, report = build(write_lines(tmp_path / "a.jsonl", lines), max_bad_rows=4)
    assert (len(dataset), report.bad_rows) == (1, 4)
    assert [bad.rpartition("/")[2] for bad in report.first_bad] == [
        "a.jsonl:2: kd_weight is -1: it must be a finite number of 0 or more",
        "a.jsonl:3: kd_weight is the text high: it must be a finite number of 0 or more",
        "a.jsonl:4: messages[3].kd_weight is nan: it must be a finite number of 0 or more",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_tables_have_weights_too(build, tmp_path, name):  # noqa: F811
    rows = [
        {"prompt": f"What is {i}?", "completion": " zero", "kd_weight": weight}
        for i, weight in enumerate([0.5, None, 2.0])
    ]
    write_table(rows, tmp_path / name)
    dataset, report = build(tmp_path / name)
    assert dataset["kd_weight"][:] == [0.5, 1.0, 2.0]
    assert report.weighted_rows == 2
    assert "2 rows have a weight in the divergence that is not 1 (kd_weight)" in report.summary()


def test_a_weight_that_a_mapping_would_lose_is_a_bad_row(build, tmp_path):  # noqa: F811
    rows = [{"q": "What?", "a": "zero", "importance": 2.0, "kd_weight": 3.0}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    mapped = {"instruction": "q", "output": "a"}
    with pytest.raises(DataError, match="the column kd_weight is not mapped and would be lost"):
        build(Source(path, columns=mapped))
    for columns, weight in (({"kd_weight": "importance"}, [2.0]), ({"kd_weight": None}, None)):
        dataset, _ = build(Source(path, columns={**mapped, **columns}))
        assert (dataset["kd_weight"][:] if "kd_weight" in dataset.column_names else None) == weight
    with pytest.raises(DataError, match="importance"):
        build(
            Source(
                write_lines(tmp_path / "b.jsonl", [{"q": "What?", "a": "zero"}]),
                columns={**mapped, "kd_weight": "importance"},
            )
        )


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"system": "Be brief."}], ids=["plain", "system column"])
def test_a_messages_weight_is_that_of_its_answers_tokens(tokenizer, kwargs):
    encoded = encode_row(chat(0.5, None, 2, **kwargs), tokenizer, train_on="assistant")
    found = by_answer(encoded.input_ids, encoded.labels, encoded.kd_weights, tokenizer)
    assert found == list(zip(ANSWERS, [0.5, 1.0, 2.0], strict=True))
    assert encode_row(chat(1, 1.0), tokenizer, train_on="assistant").kd_weights is None
    last = encode_row(chat(0.5, None, 2, **kwargs), tokenizer, train_on="last")
    assert by_answer(last.input_ids, last.labels, last.kd_weights, tokenizer) == [(ANSWERS[2], 2.0)]


def test_in_conversations_and_completions_too(tokenizer):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "zero", "kd_weight": 0.5}]
    pair = {
        "prompt": tiny.CHATS[0]["messages"],
        "completion": [{"role": "assistant", "content": "zero", "kd_weight": 0.5}],
    }
    pair["prompt"] = [*pair["prompt"], {"role": "user", "content": "And?"}]
    for row in ({"conversations": turns}, pair):
        encoded = encode_row(row, tokenizer, train_on="assistant")
        assert by_answer(encoded.input_ids, encoded.labels, encoded.kd_weights, tokenizer) == [(ANSWERS[0], 0.5)]


def test_where_each_answer_is_a_row_of_its_own_it_has_its_own_weight():
    forgetful = tokenizer_with(FORGETFUL)
    rows = Collator(forgetful)._encode([chat(0.5, None, 2, kd_weight=3)])[0]
    assert [row.kd_weight for row in rows] == [3.0, 3.0, 3.0]
    found = [by_answer(row.input_ids, row.labels, row.kd_weights, forgetful)[0][1] for row in rows]
    assert found == [0.5, 1.0, 2.0]


def test_what_is_no_answer_has_no_weight(tokenizer):
    row = chat(None)
    row["messages"][0]["kd_weight"] = 2.0
    encoded = encode_row(row, tokenizer, train_on="assistant")
    assert encoded.kd_weights is None
    assert encoded.notes == ("a user message has kd_weight, which is not read: only answers are trained on",)
    with pytest.raises(RowError, match="has a part with kd_weight"):
        parse_row({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "kd_weight": 2}]}]})
    with pytest.raises(RowError, match="train_on: all trains on more than answers"):
        encode_row(chat(0.5), tokenizer, train_on="all")


def test_a_teacher_that_reads_more_is_compared_at_the_same_weights(tokenizer):
    prefix = [{"role": "system", "content": "Be brief."}]
    encoded = encode_row(chat(0.5, 2), tokenizer, train_on="assistant", teacher_prefix=prefix)
    assert encoded.teacher is not None, PREFIX
    assert encoded.teacher.kd_weights is None
    assert [weight for _, weight in by_answer(encoded.input_ids, encoded.labels, encoded.kd_weights, tokenizer)] == [
        0.5,
        2,
        1,
    ]
    cut = truncate(encoded, len(encoded.teacher.input_ids) - 3)
    assert len(cut.kd_weights) == len(cut.labels) < len(encoded.labels)
    of_teacher = {
        f"teacher_{name}": getattr(encoded.teacher, name) for name in ("input_ids", "labels", "prompt_length")
    }
    own = {name: getattr(encoded, name) for name in ("input_ids", "labels", "prompt_length", "kd_weights")}
    batch = Collator(tokenizer)([own | of_teacher])
    assert batch.as_teacher_sees_it().kd_weights_S is None
    assert len(batch.kd_weights_S) == len(batch.as_teacher_sees_it().labels_S)


# ---- tokens, and batches ---------------------------------------------------------------------------------------------

TOKENS = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}


def test_tokenised_rows_have_a_weight_or_one_of_each_token(tokenizer):
    collator = Collator(tokenizer)
    batch = collator(
        [
            {**TOKENS, "kd_weight": 2},
            {**TOKENS, "kd_weight": [9, 9, 0.5, 0]},
            TOKENS,
            {"input_ids": [5, 6], "labels": [-100, 6]},
        ]
    )
    assert batch.rows.kd_weights.tolist() == [2, 1, 1, 1]
    assert batch.kd_weights_S.tolist() == [2, 2, 0.5, 0, 1, 1, 1]
    assert collator([{**TOKENS, "kd_weight": torch.tensor([1, 1, 1, 1])}]).kd_weights_S is None
    assert collator([{**TOKENS, "kd_weight": torch.tensor(3.0)}]).kd_weights_S.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        ([1, 2], "kd_weight has 2 weights, and the row 4 tokens: give one for each of input_ids"),
        ([1, 2, -1, 1], r"kd_weight\[2\] is -1"),
        ([1, 2, "high", 1], r"kd_weight\[2\] is the text high"),
        ([1, 2, math.nan, 1], r"kd_weight\[2\] is nan"),
        (-2, "kd_weight is -2"),
    ],
)
def test_mistakes_of_tokenised_rows_name_the_row(tokenizer, weight, problem):
    with pytest.raises(DataError, match=rf"a tokenised row \(row 7\): {problem}"):
        Collator(tokenizer)([{**TOKENS, "row_id": "row 7", "kd_weight": weight}])


def test_weights_go_where_their_tokens_go(build, tmp_path, tokenizer):  # noqa: F811
    """Through the cache, padding, truncation, cut and dealt rows, and a stream."""
    rows = [chat(0.5, None, 2), tiny.CHATS[0], chat(kd_weight=3), {**tiny.CHATS[1], "kd_weight": 0}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    dataset, report = build(path)
    again, _ = build(path)
    assert report.weighted_rows == 3
    assert dataset["kd_weights"][:] == again["kd_weights"][:]
    batch = Collator(tokenizer, pad_to_multiple_of=64)(list(dataset))
    assert batch.labels.shape[1] % 64 == 0
    by_row = [batch.kd_weights_BT[i][batch.predicts_BT[i]].tolist() for i in range(4)]
    assert [sorted(set(weights)) for weights in by_row] == [[0.5, 1, 2], [1], [3], [0]]
    raw = Collator(tokenizer, pad_to_multiple_of=64)(rows)
    assert torch.equal(raw.kd_weights_S, batch.kd_weights_S)
    halves = [Collator(tokenizer)(list(dataset)[:2]), Collator(tokenizer)(list(dataset)[2:])]
    dealt = rows_of(halves, [3, 0, 2, 1], 0, None)
    assert dealt.kd_weights_S.tolist() == [w for i in (3, 0, 2, 1) for w in by_row[i]]
    assert taken(batch, [2, 0, 0]).kd_weights_S.tolist() == by_row[2] + by_row[0] * 2
    assert cut_rows(batch, 1).kd_weights_S.tolist() == by_row[0]
    assert batch.map_tensors(lambda one: one.clone()).kd_weights_S.tolist() == batch.kd_weights_S.tolist()
    short, _ = build(path, max_length=26, on_overlength="truncate")
    cut = Collator(tokenizer, max_length=26, on_overlength="truncate")
    assert [row["kd_weights"] and len(row["kd_weights"]) for row in short] == [26, None, None, None]
    assert torch.equal(cut(list(short)).kd_weights_S, cut(rows).kd_weights_S)
    assert torch.equal(cut(list(dataset)).kd_weights_S, cut(rows).kd_weights_S)


def test_streamed_rows_keep_theirs(stream, tmp_path):  # noqa: F811
    path = write_lines(tmp_path / "a.jsonl", [chat(0.5), tiny.CHATS[0], {**tiny.CHATS[1], "kd_weight": 2}])
    first, second, third = streamed(stream(path), 3)
    assert set(first["kd_weights"]) == {0.5, 1.0}
    assert not {"kd_weight", "kd_weights"} & set(second)
    assert third["kd_weight"] == 2


def test_answers_of_the_teacher_keep_the_rows_weight_alone(build, tmp_path):  # noqa: F811
    path = write_lines(
        tmp_path / "a.jsonl", [chat(0.5, 2, 3, kd_weight=4), {"prompt": "What?", "completion": " a", "kd_weight": 5}]
    )
    dataset, _ = build(Source(path, answers="teacher"))
    assert dataset["kd_weight"][:] == [4, 5]
    assert dataset["kd_weights"][:] == [None, None]


def test_rows_that_differ_in_their_weight_fall_on_one_side(build, tmp_path):  # noqa: F811
    from kdtrain.data import HeldOut

    rows = [{**row, "kd_weight": weight} for row in tiny.CHATS for weight in (1, 2)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    sides = []
    for training in (True, False):
        try:
            sides.append(build(path, held_out=HeldOut(0.5, training=training))[0])
        except DataError:
            sides.append([])
    assert all(len(side) % 2 == 0 for side in sides)
    assert sum(map(len, sides)) == 12
