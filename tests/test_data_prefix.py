"""Messages that the teacher alone reads: where they stand, what of them is never trained on, which rows are refused."""

import csv
import json

import datasets
import pytest
import trl.chat_template_utils as trl_templates
from PIL import Image

from kdtrain.data import Collator, HeldOut, RowError, Source, TemplateOptions, build_dataset
from kdtrain.data.dataset import encode_sources
from kdtrain.data.encoded_row import truncate
from kdtrain.data.encoder import RowEncoder
from kdtrain.errors import DataError
from tests import tiny_processors
from tests.test_data_encoder import CHATML, ROW, tokenizer_with

datasets.disable_progress_bars()

SYSTEM = {"role": "system", "content": "say where the path is"}
SHOTS = [{"role": "user", "content": "a file"}, {"role": "assistant", "content": "a path"}]
OWN = {"role": "system", "content": "the student reads this"}
THINK = ("<think>", "</think>")


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(*texts, system=None, **columns):
    roles = ("user", "assistant") * len(texts)
    first = [] if system is None else [message("system", system)]
    return {"messages": first + [message(role, text) for role, text in zip(roles, texts, strict=False)], **columns}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(CHATML)


def encode(tokenizer, row, prefix=None, mode="prepend", column=None, train_on="assistant", **options):
    options |= {"teacher_prefix": prefix, "teacher_prefix_mode": mode, "teacher_prefix_column": column}
    (rows,) = RowEncoder(tokenizer, train_on, **options).encode([row], [None])
    if isinstance(rows, RowError):
        raise rows
    return rows


def teachers_text(tokenizer, row, *arguments, **options):
    (one,) = encode(tokenizer, row, *arguments, **options)
    return tokenizer.decode((one.teacher or one).input_ids)


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


TALK = turn("user", "what") + turn("assistant", "there")
SHOWN = turn("user", "a file") + turn("assistant", "a path")
OWN_TURN, BOTH = turn("system", OWN["content"]), turn("system", f"{OWN['content']}\n\n{SYSTEM['content']}")
PLACES = {
    "a system message stands first": (None, [SYSTEM], "prepend", turn("system", SYSTEM["content"])),
    "two system messages become one": (OWN["content"], [SYSTEM], "prepend", BOTH),
    "an empty one is none": ("", [SYSTEM], "prepend", turn("system", SYSTEM["content"])),
    "others stand behind the row's own": (OWN["content"], SHOTS, "prepend", OWN_TURN + SHOWN),
    "others stand first without one": (None, SHOTS, "prepend", SHOWN),
    "both": (OWN["content"], [SYSTEM, *SHOTS], "prepend", BOTH + SHOWN),
    "in place of the row's own": (OWN["content"], [SYSTEM], "system", turn("system", SYSTEM["content"])),
    "in its place where there is none": (None, [SYSTEM, *SHOTS], "system", turn("system", SYSTEM["content"]) + SHOWN),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_prefix_stands_where_its_mode_says_and_the_student_reads_nothing_of_it(case, tokenizer):
    system, prefix, mode, begins = PLACES[case]
    row = chat("what", "there", system=system)
    (plain,) = encode(tokenizer, row)
    (found,) = encode(tokenizer, row, prefix, mode)
    assert tokenizer.decode(found.teacher.input_ids) == begins + TALK
    assert (found.input_ids, found.labels, found.prompt_length) == (plain.input_ids, plain.labels, plain.prompt_length)
    assert found.teacher.supervised_ids == found.supervised_ids
    prompt = found.teacher.input_ids[: found.teacher.prompt_length]
    assert tokenizer.decode(prompt) == begins + turn("user", "what") + "<|im_start|>assistant\n"


def test_an_answer_of_the_prefix_is_never_trained_on(tokenizer):
    (row,) = encode(tokenizer, chat("a file", "a path", "what", "there"), SHOTS)
    labels = [label for label in row.teacher.labels if label != -100]
    assert tokenizer.decode(labels) == "a path<|im_end|>there<|im_end|>"
    shown = tokenizer(SHOWN, add_special_tokens=False)["input_ids"]
    assert set(row.teacher.labels[: len(shown)]) == {-100}


def test_the_system_prompt_that_a_template_writes_by_itself_gives_way_to_the_prefixs():
    qwen = tokenizer_with(trl_templates.qwen2_5_chat_template)
    (row,) = encode(qwen, chat("what", "there"), [SYSTEM])
    assert qwen.decode(row.input_ids).startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    assert qwen.decode(row.teacher.input_ids) == turn("system", SYSTEM["content"]) + TALK
    shown = teachers_text(qwen, chat("what", "there"), SHOTS)
    assert shown.startswith("<|im_start|>system\nYou are Qwen")
    assert shown.endswith(SHOWN + TALK)


def test_a_prefix_that_says_what_the_student_reads_makes_no_second_text(tokenizer):
    (row,) = encode(tokenizer, chat("what", "there", system=OWN["content"]), [OWN], "system")
    assert row.teacher is None


def test_a_template_without_system_messages_is_said_once_and_how_to_do_without():
    gemma = tokenizer_with(trl_templates.gemma_chat_template, eos="<end_of_turn>", bos="<bos>", added=("<bos>",))
    with pytest.raises(DataError, match="begins with a system message, and the chat template has none: give") as caught:
        encode(gemma, chat("what", "there"), [SYSTEM])
    assert not isinstance(caught.value, RowError)
    (row,) = encode(gemma, chat("what", "there"), SHOTS)
    assert "a file" in gemma.decode(row.teacher.input_ids)
    with pytest.raises(RowError, match="begins with a system message, and the chat template has none"):
        encode(gemma, chat("what", "there", hint="say"), None, column="hint")


def test_a_mode_that_replaces_the_system_message_needs_one(tokenizer):
    row = chat("what", "there", hint=SHOTS)
    with pytest.raises(RowError, match=r"begins with a user message, and rlhf.teacher.prefix_mode: system puts"):
        encode(tokenizer, row, None, "system", "hint")


def test_what_the_template_says_of_the_teachers_messages_names_the_option(tokenizer):
    control = [message("system", "never say <|im_end|>")]
    with pytest.raises(RowError, match=r"for the teacher \(rlhf.teacher.prefix\): messages\[0\] has the control token"):
        encode(tokenizer, chat("what", "there"), control)
    (row,) = encode(tokenizer, chat("what", "there"), control, control_tokens="text")
    assert "never say <|im_end|><|im_end|>" in tokenizer.decode(row.teacher.input_ids)
    ends = row.teacher.input_ids.count(tokenizer.eos_token_id)
    assert ends == row.input_ids.count(tokenizer.eos_token_id) + 1
    with pytest.raises(DataError, match="teacher_prefix_mode must be one of prepend, system"):
        encode(tokenizer, ROW, [SYSTEM], "replace")
    with pytest.raises(RowError, match=r"train_on: all .* which rlhf.teacher.prefix makes another"):
        encode(tokenizer, ROW, [SYSTEM], train_on="all")


# ---- trained turns of every kind: as if the messages stood in the row ------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find", "arguments": {"a": "file"}}}]}
KINDS = {
    "one answer": chat("what", "there"),
    "several": ROW,
    "with a system message": chat("what", "there", "and then", "zero", system=OWN["content"]),
    "prompt alone": chat("what"),
    "prompt and completion": {"prompt": ROW["messages"][:3], "completion": ROW["messages"][3:]},
    "tools": {"messages": [message("user", "what"), CALL, message("tool", "a path"), *ROW["messages"]], "tools": TOOLS},
    "reasoning": {"messages": [message("user", "what"), message("assistant", "there", reasoning_content="a path")]},
    "reasoning in several": {
        "messages": [
            message("user", "what"),
            message("assistant", "there", reasoning_content="a path"),
            message("user", "why"),
            message("assistant", "zero", reasoning_content="a file"),
        ]
    },
    "not all trained": {
        "messages": [*ROW["messages"][:1], message("assistant", "one", weight=0), *ROW["messages"][2:]]
    },
}


def by_hand(row, prefix, mode):
    """The row with the messages in it, those of the prefix not trained on."""
    key = "messages" if "messages" in row else "prompt"
    own = row[key][:1] if row[key][0]["role"] in ("system", "developer") else []
    rest = row[key][len(own) :]
    first = [{**one, "weight": 0} if one["role"] == "assistant" and key == "messages" else one for one in prefix]
    if mode == "prepend" and own:
        said = [text for text in (own[0]["content"], prefix[0]["content"]) if text.strip()]
        joined = {**own[0], "content": "\n\n".join(said)}
        first = [joined, *first[1:]] if prefix[0]["role"] == "system" else [*own, *first]
    return {**row, key: first + rest}


@pytest.mark.parametrize("turns", ["auto", "split"])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize(("prefix", "mode"), [([SYSTEM], "prepend"), ([SYSTEM, *SHOTS], "system"), (SHOTS, "prepend")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_reads_what_a_student_would_that_had_the_messages_in_its_row(kind, prefix, mode, train_on, turns):
    qwen = tokenizer_with(trl_templates.qwen3_chat_template, added=THINK)
    options = {"train_on": train_on, "turns": turns}
    found = encode(qwen, KINDS[kind], prefix, mode, **options)
    student = encode(qwen, KINDS[kind], **options)
    teacher = encode(qwen, by_hand(KINDS[kind], prefix, mode), **options)
    assert len(found) == len(student) == len(teacher)
    for one, own, other in zip(found, student, teacher, strict=True):
        assert (one.input_ids, one.labels, one.prompt_length) == (own.input_ids, own.labels, own.prompt_length)
        read = one.teacher
        assert (read.input_ids, read.labels, read.prompt_length) == (other.input_ids, other.labels, other.prompt_length)
        assert read.supervised_ids == one.supervised_ids


# Mistral's: the system message stands in front of the first question, or of the last, and then moves when another
# follows.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = "
    "messages[1:] %}{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + (system + '\n\n' "
    "if loop.WHERE and system is defined else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token "
    "}}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("first", ["<s>[INST] RULEwhat[/INST] there</s>[INST] why[/INST] zero</s>"]),
        (
            "last",
            ["<s>[INST] RULEwhat[/INST] there</s>", "<s>[INST] what[/INST] there</s>[INST] RULEwhy[/INST] zero</s>"],
        ),
    ],
)
def test_a_system_message_that_moves_with_the_questions_moves_for_the_teacher_alone(where, expected):
    added = ("<s>", "</s>", "[INST]", "[/INST]")
    mistral = tokenizer_with(MISTRAL.replace("WHERE", where), eos="</s>", bos="<s>", added=added)
    rows = encode(mistral, chat("what", "there", "why", "zero"), [SYSTEM])
    rule = f"{SYSTEM['content']}\n\n"
    assert [mistral.decode(row.teacher.input_ids) for row in rows] == [text.replace("RULE", rule) for text in expected]
    assert [mistral.decode(row.input_ids) for row in rows] == [text.replace("RULE", "") for text in expected]
    assert "".join(mistral.decode(row.supervised_ids) for row in rows) == " there</s> zero</s>"
    with pytest.raises(RowError, match=r"for the teacher \(rlhf.teacher.prefix\): .*roles must alternate"):
        encode(mistral, chat("what", "there"), SHOTS[:1])


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"text": "zero"}, "give messages"),
        ({"prompt": "the", "completion": " path"}, "instruction: prompt, output: co"),
    ],
)
def test_text_without_a_chat_is_a_bad_row(row, hint, tokenizer):
    with pytest.raises(RowError, match=rf"^rlhf.teacher.prefix: the row is text and gets no chat template.*{hint}"):
        encode(tokenizer, row, [SYSTEM])


def test_a_row_with_images_is_refused(tmp_path):
    processor, path = tiny_processors.make_llava(), tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)
    row = {**chat("what", "there"), "images": [str(path)]}
    with pytest.raises(RowError, match=r"rlhf.teacher.prefix: rows with images are not supported yet"):
        encode(processor, row, SHOTS)


def test_a_cut_keeps_the_same_answer_for_both_and_counts_the_longer_text(tokenizer):
    (row,) = encode(tokenizer, ROW, [SYSTEM, *SHOTS])
    assert row.longest == len(row.teacher.input_ids) > len(row.input_ids)
    kept = set()
    for length in range(row.longest - 1, 1, -1):
        if (cut := truncate(row, length)) is not None:
            assert cut.supervised_ids == cut.teacher.supervised_ids == row.supervised_ids[: cut.supervised]
            assert len(cut.teacher.input_ids) <= length
            kept.add(cut.supervised)
    assert kept == set(range(1, row.supervised + 1))


# ---- a column --------------------------------------------------------------------------------------------------------

FORMS = {
    "text": (SYSTEM["content"], [SYSTEM]),
    "messages": ([SYSTEM, *SHOTS], [SYSTEM, *SHOTS]),
    "messages as JSON text": (json.dumps(SHOTS), SHOTS),
    "a mapping of lists": ({"role": ["system"], "content": [SYSTEM["content"]]}, [SYSTEM]),
    "ShareGPT": ([{"from": "system", "value": SYSTEM["content"]}], [SYSTEM]),
    "text that begins with a bracket": ("[say] where", [message("system", "[say] where")]),
    "a JSON list of no messages": ("[1, 2]", [message("system", "[1, 2]")]),
    "null": (None, SHOTS),
    "nothing": ("  ", SHOTS),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_rows_own_prefix_wins_over_the_default(form, tokenizer):
    value, expected = FORMS[form]
    found = teachers_text(tokenizer, chat("what", "there", hint=value), SHOTS, column="hint")
    assert found == teachers_text(tokenizer, chat("what", "there"), expected)


WRONG = {
    "null": (None, "the column hint has no value here, and there is no default"),
    "a number": (3, "the column hint must be text or a list of messages, not a number"),
    "a role": ([message("boss", "x")], r"the column hint\[0\] has the unknown role boss"),
    "no content": ([{"role": "system"}], r"the column hint\[0\] has no content"),
    "a second system message": ([SYSTEM, SYSTEM], r"\[1\] has the role system, which only the first message can have"),
    "an image": ([message("user", [{"type": "image"}])], r"the column hint\[0\] has an image: the prefix is text"),
    "a single mapping": ({"role": "system", "content": "x"}, "must be a list of messages"),
}


@pytest.mark.parametrize("form", WRONG)
def test_a_column_that_holds_no_messages_makes_its_row_bad(form, tokenizer):
    value, words = WRONG[form]
    with pytest.raises(RowError, match=f"^rlhf.teacher.prefix: .*{words}"):
        encode(tokenizer, chat("what", "there", hint=value), column="hint")


@pytest.mark.parametrize("column", ["system", "solution", "tools", "reasoning"])
def test_the_column_is_the_prefix_and_nothing_else(column, tokenizer):
    row = {**chat("what", "there"), column: "say"}
    (found,) = encode(tokenizer, row, column=column)
    assert tokenizer.decode(found.input_ids) == TALK
    assert tokenizer.decode(found.teacher.input_ids) == turn("system", "say") + TALK
    assert found.notes == ()


@pytest.fixture
def build(tmp_path, tokenizer):
    def call(*sources, column="hint", prefix=None, mode="prepend", **options):
        options = {"max_length": None, "on_overlength": "error", "train_on": "assistant", **options}
        options |= {"teacher_prefix_column": column, "teacher_prefix": prefix, "teacher_prefix_mode": mode}
        return build_dataset(list(sources), tokenizer, cache_dir=str(tmp_path / "cache"), **options)

    return call


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


ASKED = [{"q": "what", "a": "there", "hint": "say one"}, {"q": "why", "a": "zero", "hint": "say two"}]
MAPPED = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_the_column_is_read_although_others_are_renamed(suffix, build, tmp_path, tokenizer):
    source = Source(write(tmp_path / f"rows.{suffix}", ASKED), columns=MAPPED)
    data, report = build(source)
    for ids, hint in zip(data["teacher_input_ids"], ("say one", "say two"), strict=True):
        assert tokenizer.decode(ids).startswith(turn("system", hint))
    assert (report.teacher_text_rows, report.notes) == (2, [])
    assert "2 rows have another text for the teacher (rlhf.teacher.prefix)" in report.summary()


def test_where_no_row_can_be_used_nothing_is_said_of_the_prefix(tmp_path, tokenizer):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"messages": []}\n')
    limits = {"max_length": None, "on_overlength": "error", "train_on": "assistant"}
    with encode_sources([Source(str(source))], tokenizer, **limits, teacher_prefix=[SYSTEM]) as rows:
        assert rows.report.bad_rows == 1
        assert not rows.report.notes


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("prefix", [None, [SYSTEM]])
def test_a_column_that_is_nowhere_is_one_error(suffix, prefix, build, tmp_path):
    source = Source(write(tmp_path / f"rows.{suffix}", ASKED), columns=MAPPED)
    with pytest.raises(DataError) as caught:
        build(source, column="hints", prefix=prefix, max_bad_rows=5)
    assert "column hints, which rlhf.teacher.prefix names" in str(caught.value)
    assert ("did you mean hint?" in str(caught.value)) == (prefix is None)


def test_a_source_may_be_without_the_column_where_there_is_a_default(build, tmp_path, tokenizer):
    with_hint = Source(write(tmp_path / "a.jsonl", [chat("what", "there", hint="say")]))
    for name in ("b.jsonl", "b.parquet"):
        without = Source(write(tmp_path / name, [chat("why", "zero")]))
        data, _ = build(with_hint, without, prefix=SHOTS)
        assert tokenizer.decode(data[0]["teacher_input_ids"]).startswith(turn("system", "say"))
        assert tokenizer.decode(data[1]["teacher_input_ids"]).startswith(SHOWN)
        with pytest.raises(DataError, match=f"{name} has no column hint, which rlhf.teacher.prefix names"):
            build(with_hint, without)


@pytest.mark.parametrize("columns", [{**MAPPED, "system": "hint"}, {"instruction": "q", "output": "hint"}])
def test_a_column_that_is_mapped_as_well_is_an_error(columns, build, tmp_path):
    source = Source(write(tmp_path / "rows.jsonl", ASKED), columns=columns)
    with pytest.raises(DataError, match=r"the column hint is that of rlhf.teacher.prefix and stands in columns"):
        build(source)


def test_rows_that_differ_in_the_prefix_alone_are_never_on_both_sides_of_a_held_out_share(build, tmp_path):
    rows = [{**chat(f"what {i % 12}", "there"), "system": f"say {i}"} for i in range(48)]
    source = Source(write(tmp_path / "rows.jsonl", rows))
    train, held = (
        {tuple(ids) for ids in build(source, column="system", held_out=HeldOut(0.4, training=side))[0]["input_ids"]}
        for side in (True, False)
    )
    assert train and held  # noqa: PT018
    assert not train & held


def test_another_prefix_is_encoded_anew(build, tmp_path):
    source = Source(write(tmp_path / "rows.jsonl", [chat("what", "there", system=OWN["content"])]))
    options = [{"prefix": [SYSTEM]}, {"prefix": [OWN]}, {"prefix": [SYSTEM], "mode": "system"}, {"prefix": [SYSTEM]}]
    first, second, third, again = (build(source, column=None, **one)[0][0]["teacher_input_ids"] for one in options)
    assert first == again
    assert len({tuple(ids) for ids in (first, second, third)}) == 3


def test_raw_rows_and_those_of_a_data_set_make_the_same_batch(build, tmp_path, tokenizer):
    rows = [chat("what", "there", hint="say"), chat("why", "zero", hint=None)]
    data, _ = build(Source(write(tmp_path / "rows.jsonl", rows)), prefix=SHOTS)
    template = TemplateOptions(teacher_prefix=SHOTS, teacher_prefix_column="hint")
    raw, built = Collator(tokenizer, template=template)(rows), Collator(tokenizer)(list(data))
    for name in ("input_ids", "labels", "prompt_lengths"):
        assert getattr(raw.teacher_tokens, name).tolist() == getattr(built.teacher_tokens, name).tolist()
    assert raw.labels_S.tolist() == built.as_teacher_sees_it().labels_S.tolist()


def test_the_tokens_that_the_teacher_reads_are_counted(build, tmp_path):
    data, report = build(Source(write(tmp_path / "rows.jsonl", [chat("what", "there", hint="say")] * 3)))
    assert report.teacher_tokens == sum(map(len, data["teacher_input_ids"])) > report.total_tokens
    plain, report = build(Source(write(tmp_path / "rows.jsonl", [chat("what", "there")] * 3)), column=None)
    assert report.teacher_tokens == report.total_tokens == sum(map(len, plain["input_ids"]))
