"""What a student continues: the prompt of a row's last answer, as the chat template has it at inference, and no more.

Checked on what both models read in the steps of a run, against the template's own rendering of the messages.
"""

import json

import pytest
import yaml

import kdtrain
from kdtrain.config import ConfigLoader
from kdtrain.runs.preview import preview
from tests import tiny
from tests.test_data_chat_template import THINKING
from tests.test_trainer import make_trainer, windows
from tests.tiny_processors import FAMILIES, make_model, picture

TOOLS = [{"type": "function", "function": {"name": "look", "description": "the path", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "content": "the file"}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def share(*turns):
    return [{"from": speaker, "value": text} for speaker, text in turns]


Q1, A1, Q2, A2 = user("one?"), answer("1"), user("two?"), answer("2")
SYSTEM = {"role": "system", "content": "Be kind."}
# By what the rows are: a row, and how many of its messages, brought to one form, each prompt consists of. Where turns
# are split, the prompts of the answers before come in front.
PROMPTS = {
    "a prompt column": ({"prompt": [Q1]}, [Q1], []),
    "with a system message": ({"prompt": [SYSTEM, Q1]}, [SYSTEM, Q1], []),
    "a user's turn at the end": ({"messages": [Q1, A1, Q2]}, [Q1, A1, Q2], []),
    "ShareGPT": ({"conversations": share(("human", "one?"), ("gpt", "1"), ("human", "two?"))}, [Q1, A1, Q2], []),
    "Alpaca": ({"instruction": "one?", "input": "two?"}, [user("one?\ntwo?")], []),
    "ms-swift": ({"query": "two?", "history": [["one?", "1"]]}, [Q1, A1, Q2], []),
}
ANSWERED = {
    "several turns": ({"messages": [Q1, A1, Q2, A2]}, [Q1, A1, Q2], [[Q1]]),
    "ShareGPT": (
        {"conversations": share(("human", "one?"), ("gpt", "1"), ("human", "two?"), ("gpt", "2"))},
        [Q1, A1, Q2],
        [[Q1]],
    ),
    "a system column": ({"messages": [Q1, A1], "system": "Be kind."}, [SYSTEM, Q1], []),
    "prompt and completion": ({"prompt": [Q1, A1, Q2], "completion": [A2]}, [Q1, A1, Q2], []),
    "the last answer is context": ({"messages": [Q1, A1, Q2, answer("2", weight=0)]}, [Q1], []),
    "the first answer is context": ({"messages": [Q1, answer("1", weight=0), Q2, A2]}, [Q1, A1, Q2], []),
    "a result in the middle": ({"messages": [Q1, CALL, RESULT, A2], "tools": TOOLS}, [Q1, CALL, RESULT], [[Q1]]),
    "a call at the end": ({"messages": [Q1, A1, Q2, CALL], "tools": TOOLS}, [Q1, A1, Q2], [[Q1]]),
    "a completion of several messages": (
        {"prompt": [Q1], "completion": [CALL, RESULT, A2], "tools": TOOLS},
        [Q1, CALL, RESULT],
        [[Q1]],
    ),
}
MORE_PROMPTS = {
    "a question with tools": ({"prompt": [Q1], "tools": TOOLS}, [Q1], []),
    "a result at the end": ({"messages": [Q1, CALL, RESULT], "tools": TOOLS}, [Q1, CALL, RESULT], []),
}


@pytest.fixture
def thinking():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = THINKING
    return tokenizer


def write(project, tokenizer, rows, **sections):
    """A run of one step that holds all rows."""
    tokenizer.save_pretrained(project / "student")
    tokenizer.save_pretrained(project / "teacher")
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"model": "./student"},
        "data": {"train": "train.jsonl", "max_length": 256, **sections.pop("data", {})},
        "rlhf": {"teacher_model": "./teacher", "lmbda": 1.0, "max_new_tokens": 4, **sections.pop("rlhf", {})},
        "training": {
            "output_dir": "run", "max_steps": 1, "per_device_train_batch_size": 40, "save_strategy": "no",
            "train_sampling_strategy": "sequential", "gradient_checkpointing": False,
        },
    }  # fmt: skip
    assert not sections
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return str(project / "config.yaml")


def read_by(config):
    """The rows, as lists of ids, that the student and the teacher read in the step of a run."""
    models = {"model": tiny.make_qwen3(seed=1), "teacher": tiny.make_qwen3(seed=2, hidden=48)}
    read = {"model": [], "teacher": []}

    def remember(name):
        def hook(module, args, kwargs):
            # Not what writes: that has a cache.
            if kwargs.get("use_cache") is False and kwargs.get("attention_mask") is not None:
                mask = kwargs["attention_mask"].bool()
                read[name].append([ids[own].tolist() for ids, own in zip(kwargs["input_ids"], mask, strict=True)])

        return hook

    for name, model in models.items():
        model.register_forward_pre_hook(remember(name), with_kwargs=True)
    kdtrain.fit(config, [], **models)
    return read["model"][-1], read["teacher"][-1]


def prompt_ids(tokenizer, messages, tools=None, **kwargs):
    """What the template makes of messages at inference; a tool's arguments and no key of ours."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    text = tokenizer.apply_chat_template(plain, tools=tools, add_generation_prompt=True, tokenize=False, **kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def continued(rows, prompts):
    """Whether each prompt is the beginning of a row of its own, with 1 to 4 tokens behind it."""
    left = list(rows)
    for prompt in prompts:
        row = next(row for row in left if row[: len(prompt)] == prompt and 1 <= len(row) - len(prompt) <= 4)
        left.remove(row)
    return not left


@pytest.mark.parametrize(
    "data",
    [{}, *map(tiny.slow, ({"train_on": "last"}, {"train_on": "all"}, {"turns": "joint"})), {"turns": "split"}],
    ids=str,
)
def test_the_student_continues_the_prompt_of_the_last_answer(project, thinking, data):
    cases = [*PROMPTS.values(), *ANSWERED.values(), *MORE_PROMPTS.values()]
    read, _ = read_by(write(project, thinking, [row for row, _, _ in cases], data=data))
    expected = []
    for row, messages, before in cases:
        alone = before if data == {"turns": "split"} else []
        expected += [prompt_ids(thinking, some, row.get("tools")) for some in (*alone, messages)]
    assert continued(read, expected)


def test_the_teacher_continues_the_same_prompts_under_seq_kd(project, thinking):
    cases = [*PROMPTS.values(), *ANSWERED.values(), *MORE_PROMPTS.values()]
    config = write(project, thinking, [row for row, _, _ in cases], rlhf={"lmbda": 0.0, "seq_kd": True})
    read, read_by_teacher = read_by(config)
    assert continued(read, [prompt_ids(thinking, messages, row.get("tools")) for row, messages, _ in cases])
    assert read == read_by_teacher


def test_answers_that_cannot_share_a_row_are_prompts_of_their_own(project, thinking):
    """The template drops the reasoning of earlier turns, so that what each answer follows differs."""
    first, second = answer("1", reasoning_content="first"), answer("2", reasoning_content="then")
    read, _ = read_by(write(project, thinking, [{"messages": [Q1, first, Q2, second]}]))
    assert continued(read, [prompt_ids(thinking, [Q1]), prompt_ids(thinking, [Q1, first, Q2])])


# As DeepSeek's: the generation prompt opens a thinking block, which no answer has in front of it.
OPENING = THINKING.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")


@pytest.mark.parametrize("data", [{}, {"turns": "split"}], ids=str)
def test_a_prompt_is_that_at_inference_also_where_the_answers_of_the_data_have_less_in_front(project, thinking, data):
    thinking.chat_template = OPENING
    cases = [*PROMPTS.values(), *ANSWERED.values(), *MORE_PROMPTS.values()]
    read, _ = read_by(write(project, thinking, [row for row, _, _ in cases], data=data))
    expected = []
    for row, messages, before in cases:
        alone = before if data == {"turns": "split"} else []
        expected += [prompt_ids(thinking, some, row.get("tools")) for some in (*alone, messages)]
    assert thinking.decode(expected[0]).endswith("<think>\n")
    assert continued(read, expected)


TEACHERS = {
    "arguments of its own": (
        {"chat_template_kwargs": {"enable_thinking": False}},
        lambda tokenizer, messages, tools: prompt_ids(tokenizer, messages, tools, enable_thinking=False),
    ),
    "a prefix": (
        {"prefix": [SYSTEM]},
        lambda tokenizer, messages, tools: prompt_ids(tokenizer, [SYSTEM, *messages], tools),
    ),
}


@pytest.mark.parametrize(
    "writer", [{"lmbda": 1.0}, tiny.slow({"lmbda": 0.0, "seq_kd": True})], ids=["student", "teacher"]
)
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_that_reads_more_reads_the_answer_behind_its_own_prompt(project, thinking, name, writer):
    options, prompt_of_teacher = TEACHERS[name]
    cases = [case for case in (*PROMPTS.values(), *ANSWERED.values(), *MORE_PROMPTS.values()) if SYSTEM not in case[1]]
    config = write(project, thinking, [row for row, _, _ in cases], rlhf={**writer, "teacher": options})
    own, others = read_by(config)
    expected = [
        (prompt_ids(thinking, messages, row.get("tools")), prompt_of_teacher(thinking, messages, row.get("tools")))
        for row, messages, _ in cases
    ]
    assert continued(own, [prompt for prompt, _ in expected])
    assert continued(others, [prompt for _, prompt in expected])
    for row, other in zip(own, others, strict=True):
        pair = next(pair for pair in expected if row[: len(pair[0])] == pair[0] and other[: len(pair[1])] == pair[1])
        assert row[len(pair[0]) :] == other[len(pair[1]) :]


def test_rows_with_images_are_continued_behind_their_images(tmp_path):
    processor = FAMILIES["qwen"]()
    image, what = {"type": "image"}, {"type": "text", "text": "what?"}
    asked = [{"role": "user", "content": [image, what]}]
    twice = [*asked, A1, {"role": "user", "content": [what, image]}]
    rows = [
        {"prompt": asked, "images": [picture(1)]},
        {"messages": twice, "images": [picture(1), picture(2)]},
        {"messages": [*twice, A2], "images": [picture(1), picture(2)]},
        {"messages": [*asked, A1, *twice[2:], answer("2", weight=0)], "images": [picture(1), picture(2)]},
        {"prompt": [Q1]},
    ]
    student, teacher = make_model("qwen", processor, 1), make_model("qwen", processor, 2)
    trainer = make_trainer(
        tmp_path, student, teacher, rows=rows, lmbda=1.0, max_new_tokens=4, per_device_train_batch_size=5,
        train_sampling_strategy="sequential", extra={"processing_class": processor},
    )  # fmt: skip
    ((batches, _),) = windows(trainer, 1)
    read = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"], strict=True)
    ]

    def ids(messages, *images):
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return processor(text=[text], images=list(images) or None, add_special_tokens=False)["input_ids"][0]

    both = ids(twice, picture(1), picture(2))
    one = ids(asked, picture(1))
    assert continued(read, [list(prompt) for prompt in (one, both, both, one, ids([Q1]))])


# ---- what a user sees before -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rlhf", "said"),
    [
        ({"lmbda": 1.0}, "the student writes every answer itself (rlhf.lmbda is 1)"),
        ({"lmbda": 0.0, "seq_kd": True}, "the teacher writes every answer (rlhf.seq_kd)"),
        ({"lmbda": 0.5, "seq_kd": True}, "the student and the teacher write every answer (rlhf.seq_kd)"),
        ({"lmbda": 0.5}, None),
    ],
    ids=str,
)
def test_a_preview_says_where_the_answers_of_the_data_are_not_trained_on(project, thinking, rlhf, said):
    rows = [row for row, _, _ in ANSWERED.values()]
    (split,) = preview(ConfigLoader.load(write(project, thinking, rows, rlhf=rlhf)), rows=20)
    notes = [note for note in split.report.notes if "not trained on" in note]
    assert len(notes) == (said is not None)
    assert all(said in note for note in notes)
    for shown, (row, messages, _) in zip(split.rows, ANSWERED.values(), strict=True):
        prompt = prompt_ids(thinking, messages, row.get("tools"))
        assert shown.student.input_ids[: shown.student.prompt_length] == prompt


def test_a_preview_of_prompts_alone_has_nothing_to_say_of_answers(project, thinking):
    rows = [row for row, _, _ in PROMPTS.values()]
    (split,) = preview(ConfigLoader.load(write(project, thinking, rows)), rows=20)
    assert not [note for note in split.report.notes if "trained on" in note]
    assert [shown.student.prompt_length for shown in split.rows] == [
        len(prompt_ids(thinking, messages)) for _, messages, _ in PROMPTS.values()
    ]
