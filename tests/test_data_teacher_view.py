"""A teacher that reads the conversations with template arguments of its own: the same answer, token by token."""

import dataclasses
import json

import datasets
import pytest
import torch
import trl.chat_template_utils as trl_templates
import yaml
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

import kdtrain
from kdtrain.config import ConfigLoader, check_config
from kdtrain.data import Collator, RowError, Source, TemplateOptions, build_dataset, cut_rows
from kdtrain.data.batch import TeacherTokens
from kdtrain.data.encoded_row import truncate
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.teacher_view import NO_EFFECT, OPTION, PROMPT_ALONE
from kdtrain.errors import DataError, PreflightError
from kdtrain.runs.preview import preview
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny, tiny_processors
from tests.oracle import Loss, Optimizer, Oracle, Window, _Float64, double
from tests.test_data_encoder import ROW, tokenizer_with
from tests.test_trainer import make_args

datasets.disable_progress_bars()

# A hint in front of the conversation, and a block that stands before every answer: both as the arguments say.
HINTED = (
    "{% if hint %}{{ '<|im_start|>system\n' + hint + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if block and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if block %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
STUDENT, TEACHER = {"block": False}, {"block": True, "hint": "say where the path is"}
THINK = ("<think>", "</think>")
SIZE = 328


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


ROWS = [
    chat("what is the path", "the path is a file"),
    chat("one", "two", "and then", "three", "what", "zero it is"),
    chat("where", "there"),
    ROW,
    chat("is the path a file", "a path", "why", "the path joins the file and the name of the path"),
]


@pytest.fixture(scope="module")
def hinted():
    return tokenizer_with(HINTED, added=THINK)


@pytest.fixture(scope="module")
def qwen3():
    return tokenizer_with(trl_templates.qwen3_chat_template, added=THINK)


def encode(tokenizer, row, own=None, other=None, train_on="assistant", **options):
    options |= {"chat_template_kwargs": own, "teacher_chat_template_kwargs": other}
    (rows,) = RowEncoder(tokenizer, train_on, **options).encode([row], [None])
    if isinstance(rows, RowError):
        raise rows
    for encoded in rows:
        if encoded.teacher is not None:
            assert encoded.teacher.supervised_ids == encoded.supervised_ids
            assert all(
                label in (-100, i) for i, label in zip(encoded.teacher.input_ids, encoded.teacher.labels, strict=True)
            )
    return rows


def texts(tokenizer, encoded):
    """Prompt, what follows it, and what is supervised, for the student and for the teacher."""
    return [
        tuple(tokenizer.decode(ids) for ids in (one.input_ids[:n], one.input_ids[n:], one.supervised_ids))
        for one in (encoded, encoded.teacher or encoded)
        for n in [one.prompt_length]
    ]


# ---- rows ------------------------------------------------------------------------------------------------------------

PLAIN = "<|im_start|>user\nfirst question<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


def test_qwen3_reads_an_answer_that_thinks_for_the_teacher_alone(qwen3):
    (row,) = encode(qwen3, chat("first question", "the one"), {"enable_thinking": False}, {"enable_thinking": True})
    student, teacher = texts(qwen3, row)
    assert student == (PLAIN + EMPTY, "the one<|im_end|>\n", "the one<|im_end|>")
    assert teacher == (PLAIN, EMPTY + "the one<|im_end|>\n", "the one<|im_end|>")


def test_where_the_generation_prompt_alone_differs_that_is_noted(qwen3, hinted):
    thinking = {"enable_thinking": False}, {"enable_thinking": True}
    assert PROMPT_ALONE in encode(qwen3, chat("first question", "the one"), *thinking)[0].notes
    assert encode(qwen3, chat("first question"), *thinking)[0].notes == ()
    assert encode(hinted, ROW, STUDENT, TEACHER)[0].notes == ()


def test_what_only_the_student_has_to_write_stands_in_the_teachers_prompt(qwen3):
    (row,) = encode(qwen3, chat("first question", "the one"), {}, {"enable_thinking": False})
    student, teacher = texts(qwen3, row)
    assert student == (PLAIN, EMPTY + "the one<|im_end|>\n", EMPTY + "the one<|im_end|>")
    assert teacher == (PLAIN + EMPTY, "the one<|im_end|>\n", EMPTY + "the one<|im_end|>")


def test_every_answer_of_a_conversation_is_found_in_the_teachers_text(hinted):
    (row,) = encode(hinted, ROW, STUDENT, TEACHER)
    student, teacher = texts(hinted, row)
    assert student[2] == teacher[2] == "the one<|im_end|>two it is<|im_end|>"
    assert teacher[0].startswith("<|im_start|>system\nsay where the path is<|im_end|>\n<|im_start|>user\nfirst")
    assert teacher[0].count(EMPTY) == 2
    assert EMPTY not in student[0]


def test_an_answer_that_begins_inside_a_token_of_the_teachers_text_begins_a_token_of_its_own():
    template = HINTED.replace("{% if block %}{{ '<think>\n\n</think>\n\n' }}{% endif %}", "")
    tokenizer = tokenizer_with(template.replace("{{ '<think>\n\n</think>\n\n' }}", "{{ 'h' }}"))
    assert len(tokenizer("he", add_special_tokens=False)["input_ids"]) == 1
    (row,) = encode(tokenizer, chat("what", "e file"), {}, {"block": True})
    prompt, behind, supervised = texts(tokenizer, row)[1]
    assert prompt.endswith("assistant\n")
    assert (behind, supervised) == ("he file<|im_end|>\n", "e file<|im_end|>")


def test_the_prompt_of_a_row_without_an_answer_is_the_generation_prompt_of_each(qwen3):
    (row,) = encode(qwen3, chat("first question"), {"enable_thinking": False}, {"enable_thinking": True})
    student, teacher = texts(qwen3, row)
    assert (student, teacher) == ((PLAIN + EMPTY, "", ""), (PLAIN, "", ""))
    assert row.prompt_only


def test_the_options_win_over_a_rows_own_arguments_for_the_teacher_and_what_they_lack_is_the_students(hinted):
    row = {**chat("what", "there"), "chat_template_kwargs": {"hint": "one", "block": True}}
    encoder = RowEncoder(hinted, "assistant", teacher_chat_template_kwargs={"block": False})
    parsed = dataclasses.replace(_chat(row), template_kwargs=row["chat_template_kwargs"])
    ((own, other),) = encoder._render(parsed)
    assert (EMPTY in own.text, EMPTY in other.rendered.text) == (True, False)
    assert "one" in own.text
    assert "one" in other.rendered.text


def _chat(row):
    from kdtrain.data.rows import parse_row

    return parse_row(row)


SPLITS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if keep and m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("own", "other"), [(False, True), (True, False)])
def test_where_one_of_the_two_texts_has_to_be_split_both_are(own, other):
    tokenizer = tokenizer_with(SPLITS, added=THINK)
    (alone,) = encode(tokenizer, ROW, {"keep": False})
    assert alone.supervised_ids
    assert len(encode(tokenizer, ROW, {"keep": True})) == 2
    if own:  # the student has to write the block, which the teacher's text does not have
        with pytest.raises(RowError, match="answer 1 is not at the end of the turn that the teacher reads"):
            encode(tokenizer, ROW, {"keep": own}, {"keep": other})
        return
    first, second = encode(tokenizer, ROW, {"keep": own}, {"keep": other})
    assert texts(tokenizer, first)[1][2] == "the one<|im_end|>"
    assert texts(tokenizer, second)[1][2] == texts(tokenizer, second)[0][2] == "two it is<|im_end|>"
    assert any("for the teacher: " in note for note in first.notes)
    with pytest.raises(RowError, match=f"for the teacher .{OPTION}.: .*data.turns is joint"):
        encode(tokenizer, ROW, {"keep": own}, {"keep": other}, turns="joint")


def test_a_student_that_is_split_splits_the_teacher():
    template = SPLITS.replace("keep and m.role", "(keep or not keep) and m.role").replace(
        "loop.last", "(loop.last or not keep)"
    )
    template = template.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
    )
    tokenizer = tokenizer_with(template, added=THINK)
    assert len(encode(tokenizer, ROW, {"keep": False})) == 1
    rows = encode(tokenizer, ROW, {"keep": True}, {"keep": False})
    assert [texts(tokenizer, row)[1][2] for row in rows] == ["the one<|im_end|>", "two it is<|im_end|>"]
    assert rows[1].teacher.input_ids != rows[1].input_ids


def test_an_answer_that_the_template_cannot_render_for_the_teacher_alone_makes_the_row_bad():
    strict = "{% if strict and messages[0].role != 'user' %}{{ raise_exception('a user comes first') }}{% endif %}"
    tokenizer = tokenizer_with(strict.replace("messages[0].role != 'user'", "messages | length == 1") + HINTED)
    row = {"messages": [{"role": "assistant", "content": "hello"}, *ROW["messages"]]}
    assert len(encode(tokenizer, row, {}, {"strict": False})) == 1
    with pytest.raises(
        RowError, match="the chat template leaves out an answer for the teacher and not for the student"
    ):
        encode(tokenizer, row, {}, {"strict": True})


def test_an_answer_that_the_teachers_template_writes_otherwise_is_a_bad_row_that_says_how():
    ending = "{{ m.content + ('!' if block and m.role == 'assistant' else '') + '<|im_end|>"
    tokenizer = tokenizer_with(HINTED.replace("{{ m.content + '<|im_end|>", ending))
    shown = r"answer 1 .*for the student it has the one<.im_end.>, for the teacher .*the one!<.im_end.>\. Both"
    with pytest.raises(RowError, match=shown):
        encode(tokenizer, ROW, {}, {"block": True})


def test_every_token_can_be_supervised_only_where_both_read_the_same_text(qwen3, hinted):
    thinking = {"enable_thinking": False}, {"enable_thinking": True}
    (row,) = encode(qwen3, chat("first question", "the one"), *thinking, train_on="all")
    assert row.teacher.labels == row.labels
    assert row.teacher.prompt_length != row.prompt_length
    with pytest.raises(RowError, match=r"data.train_on: all supervises the prompt as well"):
        encode(hinted, ROW, STUDENT, TEACHER, train_on="all")
    (last,) = encode(hinted, ROW, STUDENT, TEACHER, train_on="last")
    assert texts(hinted, last)[1][2] == "two it is<|im_end|>"


@pytest.mark.parametrize("row", [{"text": "zero"}, {"prompt": "the", "completion": " path"}, {"prompt": "the"}])
def test_rows_without_a_template_are_the_same_for_both(row, hinted):
    assert encode(hinted, row, STUDENT, TEACHER)[0].teacher is None


@pytest.mark.parametrize("other", [None, {}, {"block": False}])
def test_arguments_that_change_nothing_make_no_second_text(other, hinted):
    assert [one.teacher for one in encode(hinted, ROW, STUDENT, other)] == [None]


def test_an_argument_that_the_template_does_not_read_names_the_option(hinted):
    with pytest.raises(DataError, match=r"^rlhf.teacher.chat_template_kwargs has enable_thinking, which the chat"):
        encode(hinted, ROW, STUDENT, {"enable_thinking": True})


def test_a_row_with_images_is_refused_where_the_two_texts_differ(tmp_path):
    processor, path = tiny_processors.make_llava(), tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)
    processor.chat_template = "{{ hint }}" + processor.chat_template
    row = {**chat("what", "there"), "images": [str(path)]}
    with pytest.raises(RowError, match=f"{OPTION}: rows with images are not supported yet"):
        encode(processor, row, {}, {"hint": "one"})
    assert encode(processor, row, {}, {"hint": ""})[0].teacher is None
    assert encode(processor, chat("what"), {}, {"hint": "one"})[0].teacher is not None


# ---- too long --------------------------------------------------------------------------------------------------------


def test_a_cut_takes_the_same_tokens_from_both(hinted):
    (row,) = encode(hinted, ROW, STUDENT, TEACHER)
    longest, whole = len(row.teacher.input_ids), len(row.input_ids)
    assert row.longest == longest > whole
    assert truncate(row, longest) is row
    seen = set()
    for length in range(longest - 1, 1, -1):
        cut = truncate(row, length)
        if cut is None:
            continue
        kept = cut.supervised_ids
        seen.add(len(kept))
        assert kept == cut.teacher.supervised_ids == row.supervised_ids[: len(kept)]
        assert max(len(cut.input_ids), len(cut.teacher.input_ids)) <= length
        for one, full in ((cut, row), (cut.teacher, row.teacher)):
            assert one.input_ids == full.input_ids[: len(one.input_ids)]
            assert len(one.labels) == len(one.input_ids)
        turns = [one.turn_starts.index(one.prompt_length) if one.prompt_length else None for one in (cut, cut.teacher)]
        assert turns[0] == turns[1]
    assert seen == set(range(1, row.supervised + 1))
    assert truncate(row, len(hinted("say where the path is")["input_ids"])) is None


def test_a_prompt_that_is_too_long_for_the_teacher_alone_is_no_row(hinted):
    (row,) = encode(hinted, chat("what"), STUDENT, TEACHER)
    assert truncate(row, row.longest) is row
    assert truncate(row, len(row.input_ids)) is None


# ---- data sets and batches -------------------------------------------------------------------------------------------

COLUMNS = ["teacher_input_ids", "teacher_labels", "teacher_prompt_length"]


@pytest.fixture
def build(tmp_path, hinted):
    path = tmp_path / "rows.jsonl"

    def call(rows=ROWS, other=TEACHER, max_length=None, on_overlength="error", **source):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return build_dataset(
            [Source(str(path), **source)], hinted, max_length=max_length, on_overlength=on_overlength,
            train_on="assistant", cache_dir=str(tmp_path / "cache"), chat_template_kwargs=STUDENT,
            teacher_chat_template_kwargs=other,
        )  # fmt: skip

    return call


def test_a_data_set_has_the_teachers_rows_beside_the_students(build, hinted):
    rows = [*ROWS, {"text": "zero"}]
    for _ in range(2):  # the second is read from the cache
        dataset, report = build(rows)
        assert dataset.column_names[-3:] == COLUMNS
        for raw, row in zip(rows, dataset, strict=True):
            (expected,) = encode(hinted, raw, STUDENT, TEACHER)
            found = [row[name] for name in COLUMNS]
            other = expected.teacher
            assert found == ([None] * 3 if other is None else [other.input_ids, other.labels, other.prompt_length])
    assert report.teacher_text_rows == len(ROWS)
    assert "5 rows have another text for the teacher" in report.summary()
    plain, _ = build(rows, other=None)
    assert not set(COLUMNS) & set(plain.column_names)


def test_arguments_without_effect_are_noted_and_cost_no_column(build):
    dataset, report = build(other={"block": False})
    assert not set(COLUMNS) & set(dataset.column_names)
    assert report.notes == [NO_EFFECT.format(option=OPTION)]
    assert build(other=None)[1].notes == []


def test_a_row_is_too_long_where_either_text_is(build, hinted):
    rows = [encode(hinted, row, STUDENT, TEACHER)[0] for row in ROWS]
    fits = max(len(row.input_ids) for row in rows)
    long = [row.longest for row in rows if row.longest > fits]
    shown = rf"longer than max_length .{fits} tokens.; the longest has {max(long)}.*\n.*: {long[0]} tokens .as the"
    with pytest.raises(DataError, match=shown):
        build(max_length=fits)
    dataset, report = build(max_length=fits, on_overlength="drop")
    assert len(dataset) == sum(row.longest <= fits for row in rows) == len(ROWS) - report.dropped < len(ROWS)
    dataset, report = build(max_length=fits, on_overlength="truncate")
    assert report.truncated == sum(row.longest > fits for row in rows)
    for row in dataset:
        assert max(len(row["input_ids"]), len(row["teacher_input_ids"])) <= fits
        own, other = ([label for label in row[name] if label != -100] for name in ("labels", "teacher_labels"))
        assert own == other


def collator(tokenizer, own=STUDENT, other=TEACHER, **options):
    template = TemplateOptions(chat_template_kwargs=own, teacher_chat_template_kwargs=other)
    return Collator(tokenizer, template=template, **options)


def test_a_row_of_which_a_batch_can_keep_no_answer_is_a_prompt_for_both(hinted):
    row = chat("what is the path", "the path is a file")
    (encoded,) = encode(hinted, row, STUDENT, TEACHER)
    prompt = encoded.input_ids[: encoded.prompt_length]
    length = encoded.teacher.prompt_length
    assert length > len(prompt) + 1  # the student's text has some of the answer left
    batch = collator(hinted, max_length=length, on_overlength="truncate")([row])
    assert batch.num_supervised == batch.as_teacher_sees_it().num_supervised == 0
    assert batch.model_inputs["input_ids"].tolist() == [prompt]
    assert batch.teacher_tokens.input_ids.tolist() == [encoded.teacher.input_ids[:length]]
    assert (batch.rows.prompt_lengths.tolist(), batch.teacher_tokens.prompt_lengths.tolist()) == (
        [len(prompt)],
        [length],
    )


def test_raw_rows_and_those_of_a_data_set_make_the_same_batch(build, hinted):
    rows = [*ROWS, {"text": "zero"}, chat("what")]
    built = Collator(hinted, pad_to_multiple_of=8)(list(build(rows)[0]))
    raw = collator(hinted, pad_to_multiple_of=8)(rows)
    raw = dataclasses.replace(raw, rows=dataclasses.replace(raw.rows, ids=built.rows.ids))
    tiny.assert_same_batch(raw, built)
    tokens = built.teacher_tokens
    assert tokens.labels.shape[1] % 8 == 0
    assert tokens.labels.shape != built.labels.shape
    assert tokens.prompt_lengths[-1] == tokens.attention_mask[-1].sum()


def test_the_teacher_sees_its_own_tokens_with_the_same_supervised_ones(hinted):
    batch = collator(hinted)([*ROWS, {"text": "zero"}])
    seen = batch.as_teacher_sees_it()
    assert torch.equal(seen.labels_S, batch.labels_S)
    assert torch.equal(seen.model_inputs["input_ids"], batch.teacher_tokens.input_ids)
    assert torch.equal(seen.rows.prompt_lengths, batch.teacher_tokens.prompt_lengths)
    assert seen.as_teacher_sees_it() is seen
    for i, row in enumerate(seen.predicts_BT):
        following = seen.model_inputs["input_ids"][i, 1:][row]
        assert torch.equal(following, batch.model_inputs["input_ids"][i, 1:][batch.predicts_BT[i]])
    with pytest.raises(DataError, match=r"take model_inputs and predicts_BT of batch.as_teacher_sees_it"):
        _ = batch.teacher_inputs


def test_the_teachers_batch_is_that_of_a_student_with_its_arguments(hinted):
    seen = collator(hinted)(ROWS).as_teacher_sees_it()
    tiny.assert_same_batch(seen, collator(hinted, {**STUDENT, **TEACHER}, None)(ROWS))


def test_rows_with_images_stand_beside_texts_that_the_teacher_reads_otherwise():
    processor = tiny_processors.make_qwen3()
    processor.chat_template = "{% if messages[0].content is string %}{{ hint }}{% endif %}" + processor.chat_template
    hint = {"hint": "the name of the path, and of what is in the file"}
    image = {**chat("what", "there"), "images": [{"bytes": tiny_processors.png()}]}
    rows = [chat("one", "two"), image, chat("where is the file", "the path")]
    batch = collator(processor, {}, hint)(rows)
    expected = collator(processor, hint, None)(rows)
    assert batch.teacher_tokens.labels.shape != batch.labels.shape
    tiny.assert_same_batch(batch.as_teacher_sees_it(), expected)


@pytest.mark.parametrize("change", ["shifted", "one less", "moved to the next row"])
def test_supervised_tokens_that_differ_are_an_error_and_no_gradient(change, hinted):
    batch = collator(hinted)([chat("what", "a a"), chat("what", "a a")])
    labels = batch.teacher_tokens.labels.clone()
    if change == "shifted":
        labels = labels.roll(1, 1)
        labels[labels != -100] = batch.teacher_tokens.input_ids[labels != -100]
    elif change == "one less":
        labels[1, int((labels[1] != -100).nonzero()[0])] = -100
    else:
        labels = batch.labels_S.new_full(labels.shape, -100)
        places = (batch.teacher_tokens.labels != -100).nonzero()
        labels[tuple(places.T)] = batch.labels_S
        labels[0, int((labels[0] != -100).nonzero()[-1])] = -100
        labels[1, int((labels[1] != -100).nonzero()[0]) - 1] = batch.labels_S[0]
    wrong = dataclasses.replace(batch, teacher_tokens=dataclasses.replace(batch.teacher_tokens, labels=labels))
    with pytest.raises(DataError, match="other supervised tokens for the teacher"):
        wrong.as_teacher_sees_it()


def present(teacher_tokens):
    """Its tensors, without those that only a teacher with another tokenizer has."""
    return {name: value for name, value in vars(teacher_tokens).items() if value is not None}


def test_the_teachers_tokens_come_along_wherever_a_batch_goes(hinted):
    batch = collator(hinted)(ROWS)
    tensors = present(batch.teacher_tokens)
    assert {value.device.type for value in present(batch.to("meta").teacher_tokens).values()} == {"meta"}
    assert batch.to("cpu") is batch
    cut = cut_rows(batch, 2)
    for name, value in present(cut.teacher_tokens).items():
        assert torch.equal(value, tensors[name][:2])
    assert torch.equal(cut.as_teacher_sees_it().labels_S, cut.labels_S)
    assert batch.without_labels().as_teacher_sees_it().num_supervised == 0
    given = {
        **batch.model_inputs,
        "labels": batch.labels,
        "prompt_lengths": batch.rows.prompt_lengths,
        "teacher_inputs": tensors,
    }
    from kdtrain.data.batch import received, right_padded

    found = received(given, None)
    assert present(found.teacher_tokens) == tensors
    assert found.teacher_images is None
    left = {name: value.flip(1) if value.dim() == 2 else value for name, value in tensors.items()}
    for i, mask in enumerate(batch.teacher_tokens.attention_mask):
        for name in ("input_ids", "attention_mask", "labels"):
            left[name][i] = tensors[name][i].roll(int((mask == 0).sum()))
    moved = right_padded(received({**given, "teacher_inputs": left}, None)).teacher_tokens
    for name in ("attention_mask", "labels"):
        assert torch.equal(vars(moved)[name], tensors[name])
    with pytest.raises(DataError, match="teacher_inputs have input_ids and no labels"):
        received({**given, "teacher_inputs": {**tensors, "labels": None}}, None)
    with pytest.raises(DataError, match="carry position_ids for the student's tokens"):
        received({**given, "position_ids": batch.labels}, frozenset({"input_ids", "position_ids"}))


# ---- training --------------------------------------------------------------------------------------------------------


def plain_text(messages, hint, block):
    """The text by the template's rule, and the characters of the answers."""
    text = f"<|im_start|>system\n{hint}<|im_end|>\n" if hint else ""
    spans, prompt = [], ""
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            text += EMPTY if block else ""
            prompt = text
            spans.append((len(text), len(text) + len(message["content"]) + len("<|im_end|>")))
        text += message["content"] + "<|im_end|>\n"
    return text, spans, prompt


def plain_row(tokenizer, messages, hint=None, block=False):
    text, spans, prompt = plain_text(messages, hint, block)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(a <= start and end <= b for a, b in spans) else -100
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    prompt_ids = [
        token
        for token, (_, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        if end <= len(prompt)
    ]
    return {"input_ids": tokens["input_ids"], "labels": labels, "prompt": prompt_ids}


def both(tokenizer, row, completion=None):
    """The row for the student and for the teacher, with another answer where there is one."""
    views = [plain_row(tokenizer, row["messages"]), plain_row(tokenizer, row["messages"], **TEACHER)]
    if completion is None:
        return views
    return [
        {"input_ids": v["prompt"] + completion, "labels": [-100] * len(v["prompt"]) + completion, "prompt": v["prompt"]}
        for v in views
    ]


def taught(oracle, student_row, teacher_row):
    """The teacher's logits on its own text, at the places of the student's tokens."""
    with torch.no_grad(), _Float64():
        logits = oracle.teacher(input_ids=torch.tensor([teacher_row["input_ids"]]), use_cache=False).logits[0]
    at = {
        name: [t for t, label in enumerate(row["labels"][1:]) if label != -100]
        for name, row in (("s", student_row), ("t", teacher_row))
    }
    assert [student_row["input_ids"][t + 1] for t in at["s"]] == [teacher_row["input_ids"][t + 1] for t in at["t"]]
    placed = torch.full((len(student_row["labels"]), logits.shape[1]), torch.nan, dtype=torch.float64)
    placed[at["s"]] = logits[at["t"]]
    oracle.taught[id(student_row)] = placed


def run(folder, tokenizer, rows=ROWS, other=TEACHER, steps=3, **options):
    """Train with the class; the trainer, and what it saw in each window."""
    args = make_args(
        folder, optim="sgd", learning_rate=0.3, lr_scheduler_type="constant", max_steps=steps,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    args.chats = {"chat_template_kwargs": STUDENT, "teacher_chat_template_kwargs": other}
    models = tiny.make_qwen3(SIZE, seed=1), tiny.make_qwen3(SIZE, seed=2, hidden=48)
    trainer = GKDTrainerWithMetrics(*models, args, train_dataset=rows, processing_class=tokenizer)
    seen, collect = [], trainer.get_batch_samples

    def remember(*given):
        batches, items = collect(*given)
        seen.append(batches)
        return batches, items

    trainer.get_batch_samples = remember
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    return trainer, start, seen


CASES = [
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "sft_alpha": 0.4},
    {"per_device_train_batch_size": 1},
    {"per_device_train_batch_size": 5, "pad_to_multiple_of": 16, "beta": 0.0},
    {"per_device_train_batch_size": 2, "lmbda": 0.0, "seq_kd": True, "sft_alpha": 0.3},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lmbda": 1.0, "pad_to_multiple_of": 8},
    {"per_device_train_batch_size": 3, "lmbda": 1.0, "beta": 1.0},
]


@pytest.mark.parametrize("case", tiny.one_in(2, CASES), ids=str)
def test_weights_equal_those_of_a_float64_loop_that_feeds_each_model_its_own_text(case, tmp_path, hinted):
    trainer, start, seen = run(tmp_path, hinted, **case)
    oracle = Oracle(
        double(tiny.make_qwen3(SIZE, seed=1)),
        double(tiny.make_qwen3(SIZE, seed=2, hidden=48)),
        Loss(beta=case.get("beta", 0.5), ce=case.get("sft_alpha", 0.0)),
        Optimizer([0.3] * 3),
    )
    size = case["per_device_train_batch_size"]
    epoch = [ROWS[i : i + size] for i in range(0, len(ROWS), size)]
    accumulated = case.get("gradient_accumulation_steps", 1)
    planned = [epoch[i : i + accumulated] for i in range(0, len(epoch), accumulated)]
    windows, own, keep = [], case.get("lmbda", 0.0) == 1.0, []
    generated = own or case.get("seq_kd", False)
    for step in range(3):
        left, batches = [row for rows in planned[step % len(planned)] for row in rows], []
        for batch in seen[step]:
            pairs = []
            for ids, mask, labels in zip(
                batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"], batch.labels, strict=True
            ):
                completion = labels[labels != -100].tolist() if generated else None
                # Trained on these tokens. A generated window deals its rows anew.
                made = [(row, both(hinted, row, completion)) for row in left]
                row, pair = next(one for one in made if one[1][0]["input_ids"] == ids[mask.bool()].tolist())
                left.remove(row)
                taught(oracle, *pair)
                pairs.append(pair)
            batches.append([student_row for student_row, _ in pairs])
            keep.append(pairs)  # ids of rows are keys
        assert not left
        windows.append(Window(batches, own))
    oracle.train(windows)
    errors, moved = [], []
    for name, value in oracle.student.named_parameters():
        errors.append(float((trainer.model.state_dict()[name] - value.detach()).abs().max()))
        moved.append(float((start[name] - value.detach()).abs().max()))
    assert max(moved) > 5e-3
    assert max(errors) < 1e-5
    unlike = run(tmp_path, hinted, other=None, **case)[0].model.state_dict()
    assert (
        max(float((unlike[name] - value.detach()).abs().max()) for name, value in oracle.student.named_parameters())
        > 1e-3
    )


def test_an_answer_of_the_teacher_is_what_it_writes_behind_its_own_prompt(tmp_path, hinted):
    _, _, seen = run(tmp_path, hinted, steps=1, seq_kd=True, temperature=1e-4, per_device_train_batch_size=5)
    teacher, (batch,) = double(tiny.make_qwen3(SIZE, seed=2, hidden=48)), seen[0]
    differ = 0
    for row, labels in zip(ROWS, batch.labels, strict=True):
        found = labels[labels != -100].tolist()
        expected = [greedy(teacher, view["prompt"], len(found)) for view in both(hinted, row)]
        assert found == expected[1]
        differ += expected[0] != expected[1]
    assert differ


def greedy(model, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[[3, *range(322, SIZE)]] = -torch.inf  # padding is never written
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_evaluation_compares_with_the_teachers_own_text(tmp_path, hinted):
    losses = []
    for size in (1, 2, 5):
        args = make_args(tmp_path, per_device_eval_batch_size=size)
        args.chats = {"chat_template_kwargs": STUDENT, "teacher_chat_template_kwargs": TEACHER}
        models = tiny.make_qwen3(SIZE, seed=1), tiny.make_qwen3(SIZE, seed=2, hidden=48)
        trainer = GKDTrainerWithMetrics(*models, args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=hinted)
        losses.append(trainer.evaluate()["eval_loss"])
    models = tiny.make_qwen3(SIZE, seed=1), tiny.make_qwen3(SIZE, seed=2, hidden=48)
    oracle = Oracle(*(double(model) for model in models), Loss(), Optimizer([0.1]))
    pairs = [both(hinted, row) for row in ROWS]
    for pair in pairs:
        taught(oracle, *pair)
    with torch.no_grad(), _Float64():
        expected = float(oracle.window_loss(Window([[student for student, _ in pairs]])))
    assert losses == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_where_both_read_the_same_nothing_changes_by_a_bit(lmbda, tmp_path, hinted, monkeypatch):
    options = {"per_device_train_batch_size": 2, "lmbda": lmbda}
    runs = [run(tmp_path, hinted, other=other, **options) for other in (None, {"block": False})]
    assert all(batch.teacher_tokens is None for _, _, seen in runs for batches in seen for batch in batches)
    collate = Collator.__call__

    def with_the_same(self, rows):
        batch = collate(self, rows)
        inputs = {name: value.clone() for name, value in batch.model_inputs.items()}
        tokens = TeacherTokens(**inputs, labels=batch.labels.clone(), prompt_lengths=batch.rows.prompt_lengths)
        return dataclasses.replace(batch, teacher_tokens=tokens)

    monkeypatch.setattr(Collator, "__call__", with_the_same)
    runs.append(run(tmp_path, hinted, other=None, **options))
    assert all(batch.teacher_tokens is not None for batches in runs[-1][2] for batch in batches)
    first, *others = (trainer.model.state_dict() for trainer, _, _ in runs)
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.parametrize("generates", [False, True])
def test_a_text_that_is_too_long_for_the_teacher_alone_is_refused_before_training(generates, build, hinted, tmp_path):
    dataset, _ = build()
    positions = max(map(len, dataset["input_ids"])) + 6 * generates
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=positions, vocab_size=SIZE))
    args = make_args(tmp_path, max_length=None, lmbda=float(generates))
    given = {"train_dataset": dataset, "processing_class": hinted, "data_collator": Collator(hinted)}
    with pytest.raises(PreflightError, match=r"The teacher has \d+ positions.* \(as the teacher reads them\)"):
        GKDTrainerWithMetrics(tiny.make_qwen3(SIZE), teacher, args, **given)
    plain, _ = build(other=None)
    GKDTrainerWithMetrics(tiny.make_qwen3(SIZE), teacher, args, **{**given, "train_dataset": plain})


def losses_of_rank(folder, tokenizer):
    trainer, _, seen = run(folder, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    return [record["loss"] for record in trainer.state.log_history if "loss" in record], len(seen)


def test_two_ranks_train_as_one_with_the_same_rows(tmp_path, hinted):
    ranks = tiny.run_ranks(losses_of_rank, 2, tmp_path, hinted)
    trainer, _, _ = run(tmp_path, hinted, per_device_train_batch_size=4)
    expected = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert ranks[0][0] == pytest.approx(expected, rel=1e-4)


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def thinking(tmp_path, qwen3):
    """A project whose student does not think and whose teacher does."""
    for name, hidden in (("student", 32), ("teacher", 48)):
        tiny.save_model(tiny.make_qwen3(SIZE, seed=hidden, hidden=hidden), qwen3, tmp_path / name)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {
        "model": {"model": "./student"},
        "data": {"train": "train.jsonl", "eval": "train.jsonl", "chat_template_kwargs": {"enable_thinking": False}},
        "rlhf": {
            "teacher_model": "./teacher", "lmbda": 0.0, "max_new_tokens": 5,
            "teacher": {"chat_template_kwargs": {"enable_thinking": True}},
        },
        "training": {
            "output_dir": "run", "max_steps": 2, "per_device_train_batch_size": 3, "gradient_checkpointing": False,
            "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "logging_steps": 1,
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "config.yaml"


def fit(config, tokenizer, overrides):
    """The texts that each model read in training, from a run."""
    models = {}
    for name, hidden in (("model", 32), ("teacher", 48)):
        models[name] = tiny.make_qwen3(SIZE, seed=hidden, hidden=hidden)
    read = {"model": [], "teacher": []}

    def remember(name):
        def hook(module, args, kwargs):
            if kwargs.get("use_cache") is False and kwargs.get("attention_mask") is not None:
                for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"].bool(), strict=True):
                    read[name].append(tokenizer.decode(ids[mask]))

        return hook

    for name, model in models.items():
        model.register_forward_pre_hook(remember(name), with_kwargs=True)
    result = kdtrain.fit(str(config), overrides, **models)
    return result, read


def test_a_run_on_the_students_own_answers_shows_them_to_a_teacher_that_may_think(thinking, qwen3):
    result, read = fit(thinking, qwen3, ["rlhf.lmbda=1.0", "training.eval_strategy=no", "data.eval=null"])
    assert result.steps == 2
    header = "<|im_start|>assistant\n"
    pairs = [
        (own.rpartition(header + EMPTY), other.rpartition(header))
        for own, other in zip(read["model"][-6:], read["teacher"][-6:], strict=True)
    ]
    for (before, mark, answer), (teacher_before, _, teacher_answer) in pairs:
        assert mark
        assert (teacher_before, teacher_answer) == (before, answer)


def test_a_run_whose_teacher_writes_the_answers_has_them_behind_its_own_prompt(thinking, qwen3, tmp_path):
    sources = json.dumps([{"path": str(tmp_path / "train.jsonl"), "answers": "teacher"}])
    overrides = [f"data.train={sources}", "training.eval_strategy=no", "data.eval=null"]
    _, read = fit(thinking, qwen3, overrides)
    teacher = double(tiny.make_qwen3(SIZE, seed=48, hidden=48))
    expected = {"model": [], "teacher": []}
    for row in ROWS:
        prompts = {
            name: qwen3.apply_chat_template(
                row["messages"][:-1], add_generation_prompt=True, tokenize=False, enable_thinking=name == "teacher"
            )
            for name in expected
        }
        ids = qwen3(prompts["teacher"], add_special_tokens=False)["input_ids"]
        answer = qwen3.decode(until_stop(greedy(teacher, ids, 5)))
        for name, texts_read in expected.items():
            texts_read.append(prompts[name] + answer)
    for name, texts_read in expected.items():
        assert sorted(read[name][-5:]) == sorted(texts_read)


def until_stop(ids):
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def test_a_run_on_the_data_says_how_many_rows_the_teacher_reads_otherwise(thinking, qwen3, capfd):
    result, read = fit(thinking, qwen3, [])
    assert result.steps == 2
    assert "5 rows have another text for the teacher (rlhf.teacher.chat_template_kwargs)" in capfd.readouterr().err
    assert sorted(read["teacher"][-5:]) == sorted(read["model"][-5:])  # the template thinks in front of each answer


def test_a_preview_shows_what_the_teacher_reads_where_it_is_another_text(thinking, qwen3):
    train, _ = preview(ConfigLoader.load(thinking), rows=100)
    assert train.rows
    for row in train.rows:
        student, teacher = ([label for label in view.labels if label != -100] for view in (row.student, row.teacher))
        assert student == teacher
        assert qwen3.decode(row.teacher.input_ids[: row.teacher.prompt_length]).endswith("<|im_start|>assistant\n")
    plain, _ = preview(ConfigLoader.load(thinking, ["rlhf.teacher.chat_template_kwargs={}"]), rows=100)
    assert {row.teacher for row in plain.rows} == {None}


# ---- the config ------------------------------------------------------------------------------------------------------


def config(**rlhf):
    return {
        "model": {"model": "a/b"},
        "data": {"train": "c/d"},
        "rlhf": {"teacher_model": "e/f", "lmbda": 0.0, "teacher": {"chat_template_kwargs": {"x": 1}}, **rlhf},
        "training": {"output_dir": "run"},
    }


def test_arguments_without_a_teacher_are_a_warning():
    found = check_config(config(llm_kd_weight=0.0))
    assert any("rlhf.teacher" in str(warning.path) for warning in found.warnings)
    assert not any("rlhf.teacher" in str(w.path) for w in check_config(config()).warnings)


def test_visual_features_of_another_text_are_refused():
    given = config() | {"custom": {"visual_kd": {"enabled": True}}}
    (error,) = check_config(given).errors
    assert str(error.path) == "rlhf.teacher.chat_template_kwargs"
    assert "custom.visual_kd" in error.message
