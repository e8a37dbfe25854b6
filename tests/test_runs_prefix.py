"""Runs whose teacher reads more than the student: it learns from text that it is never given."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kdtrain
from kdtrain.config import ConfigLoader
from kdtrain.data import encode_row
from kdtrain.runs.preview import preview
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.stub_server import StubServer
from tests.test_data_encoder import tokenizer_with
from tests.test_data_teacher_view import CASES, HINTED, ROWS, SIZE, STUDENT, THINK, until_stop
from tests.test_generation_answers import answers_asked, asked, records, reply_with, say, served, trained_on
from tests.test_trainer import make_args

PIRATE = {"role": "system", "content": "say where the path is"}
OTHER = {"role": "system", "content": "two or three"}
SHOTS = [{"role": "user", "content": "a file"}, {"role": "assistant", "content": "a path"}]


def trained(folder, tokenizer, chats, case):
    args = make_args(
        folder, optim="sgd", learning_rate=0.3, lr_scheduler_type="constant", max_steps=3,
        train_sampling_strategy="sequential", **case,
    )  # fmt: skip
    args.chats = {"chat_template_kwargs": STUDENT, **chats}
    models = tiny.make_qwen3(SIZE, seed=1), tiny.make_qwen3(SIZE, seed=2, hidden=48)
    trainer = GKDTrainerWithMetrics(*models, args, train_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    return trainer.model.state_dict()


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[5]], ids=["data", "student's answers", "teacher's answers"])
def test_training_is_what_it_is_where_the_template_itself_writes_the_same_text_for_the_teacher(case, tmp_path):
    """That text is compared with a float64 loop, for every case, in `test_data_teacher_view`."""
    hinted = tokenizer_with(HINTED, added=THINK)
    by_template = {"teacher_chat_template_kwargs": {"hint": PIRATE["content"]}}
    prefixed, written, plain = (
        trained(tmp_path, hinted, chats, case) for chats in ({"teacher_prefix": [PIRATE]}, by_template, {})
    )
    assert all(torch.equal(prefixed[name], value) for name, value in written.items())
    assert any(not torch.equal(prefixed[name], value) for name, value in plain.items())


@pytest.fixture
def project(project):
    """With room for the prefix."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["data"]["max_length"] = 128
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return project


# ---- the teacher's answers -------------------------------------------------------------------------------------------


def with_prefix(project, prefix, **changes):
    """The project with answers of the teacher in its process, which reads a prefix."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["data"]["train"] = {"path": "train.jsonl", "answers": "teacher"}
    config["data"].pop("eval", None)
    for name in ("eval_strategy", "eval_steps"):
        config["training"].pop(name, None)
    config["rlhf"] = {"teacher_model": "./teacher", "max_new_tokens": 6, "lmbda": 0.0, "teacher": {"prefix": prefix}}
    for section, values in changes.items():
        config[section] |= values
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return str(project / "config.yaml")


def test_answers_are_written_behind_the_prefix_and_trained_behind_the_students_prompt(project, tokenizer, monkeypatch):
    rows = trained_on(monkeypatch)
    kdtrain.fit(with_prefix(project, [PIRATE]))
    teacher = tiny.make_qwen3(seed=2, hidden=48).double().eval()
    questions = [json.loads(line)["messages"][0] for line in (project / "train.jsonl").read_text().splitlines()]
    differ = 0
    for question, (ids, labels, start) in zip(questions, rows, strict=False):
        plain, prefixed = (
            tokenizer(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
                add_special_tokens=False,
            )["input_ids"]
            for messages in ([question], [PIRATE, question])
        )
        answer = until_stop(greedy(teacher, prefixed, 6))
        assert ids == plain + answer
        assert (labels[start:], start) == (answer, len(plain))
        differ += answer != until_stop(greedy(teacher, plain, 6))
    assert differ


def greedy(model, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[3] = -torch.inf  # padding is never written
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
def test_another_prefix_asks_for_other_answers_and_the_same_one_for_none(project, tmp_path):
    def answers():
        return {record["prompt"] for record in records(project)}

    kdtrain.fit(with_prefix(project, [PIRATE]))
    first = answers()
    (project / "pirate.txt").write_text(f"{PIRATE['content']}\n")
    kdtrain.fit(with_prefix(project, "pirate.txt"), resume="auto")
    assert answers() == first
    kdtrain.fit(with_prefix(project, [OTHER]), resume="auto")
    assert len(answers()) == 2 * len(first)


# ---- a server --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tokenizer):
    with StubServer(tiny.make_qwen3(seed=2, hidden=48), tokenizer) as server:
        yield server


@pytest.mark.slow
def test_a_server_is_sent_the_prefix_in_messages_and_the_student_reads_nothing_of_it(
    project, server, tokenizer, monkeypatch
):
    rows = trained_on(monkeypatch)
    reply_with(server, lambda request: say(f"It is {asked(request)}"))
    config = served(project, server, api="chat", prefix=[PIRATE, *SHOTS])
    kdtrain.fit(config)
    sent = [request.body["messages"] for request in answers_asked(server)]
    assert len(sent) == 6
    for messages in sent:
        assert [{key: one[key] for key in ("role", "content")} for one in messages[:-1]] == [PIRATE, *SHOTS]
        assert messages[-1]["role"] == "user"
    for chat, (ids, labels, start) in zip(tiny.CHATS, rows, strict=False):
        question = chat["messages"][0]
        answered = {"messages": [question, {"role": "assistant", "content": f"It is {question['content']}"}]}
        data = encode_row(answered, tokenizer, train_on="last")
        assert (ids, labels, start) == (data.input_ids[: len(ids)], data.labels[: len(ids)], data.prompt_length)
    kdtrain.fit(config, resume="auto")
    assert len(answers_asked(server)) == 6
    kdtrain.fit(config, ["rlhf.teacher.prefix_mode=system"], resume="auto")
    assert len(answers_asked(server)) == 6  # no row has a system message: the messages are the same
    kdtrain.fit(config, ['rlhf.teacher.prefix=[{role: system, content: "two or three"}]'], resume="auto")
    assert len(answers_asked(server)) == 12


@pytest.mark.slow
def test_a_server_that_is_asked_by_token_ids_answers_behind_the_prefix(project, server, tokenizer, monkeypatch):
    of_server = trained_on(monkeypatch)
    config = served(project, server, prefix=[PIRATE])
    kdtrain.fit(config)
    shown = tokenizer(f"<|im_start|>system\n{PIRATE['content']}<|im_end|>\n", add_special_tokens=False)["input_ids"]
    prompts = [request.body["prompt"] for request in answers_asked(server)]
    assert len(prompts) == 6
    assert all(prompt[: len(shown)] == shown for prompt in prompts)
    rows = of_server.copy()
    of_server.clear()
    kdtrain.fit(
        with_prefix(project, [PIRATE], rlhf={"llm_kd_weight": 0, "max_new_tokens": 8}, training={"output_dir": "local"})
    )
    assert of_server == rows


@pytest.mark.slow
def test_targets_of_a_server_are_those_of_the_same_model_in_this_process_behind_the_same_prefix(project, server):
    def weights(teacher, folder):
        config = yaml.safe_load((project / "config.yaml").read_text())
        config["rlhf"] = {"lmbda": 0.0, "teacher": {"prefix": [PIRATE], **teacher}}
        config["rlhf"] |= {} if "base_url" in teacher else {"teacher_model": "./teacher"}
        config["training"] |= {"output_dir": folder, "learning_rate": 2e-5}
        (project / "config.yaml").write_text(yaml.safe_dump(config))
        kdtrain.fit(str(project / "config.yaml"))
        found = load_file(project / folder / "model.safetensors")
        return torch.cat([found[name].flatten() for name in sorted(found)])

    of_server = {"backend": "vllm", "base_url": server.url, "model": "teacher", "top_k": 320}
    first, local = weights(of_server, "served"), weights({}, "local")
    plain = weights({"prefix": None}, "plain")
    assert (first - local).abs().max() < 1e-6
    assert (plain - local).abs().max() > 1e-5


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_a_preview_shows_both_texts_and_a_run_how_many_there_are(project, tokenizer, capfd):
    config = with_prefix(project, [PIRATE], data={"train": "train.jsonl"})
    shown, *_ = preview(ConfigLoader.load(config), rows=100)
    for row in shown.rows:
        student, teacher = (tokenizer.decode(view.input_ids) for view in (row.student, row.teacher))
        assert teacher == f"<|im_start|>system\n{PIRATE['content']}<|im_end|>\n{student}"
    kdtrain.fit(config)
    assert "24 rows have another text for the teacher (rlhf.teacher.prefix)" in capfd.readouterr().err
