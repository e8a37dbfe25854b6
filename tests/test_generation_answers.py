"""Answers of the teacher, written before training."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import datasets
import psutil
import pytest
import torch
import yaml

import kdtrain
from kdtrain.data import Collator, Source, build_dataset, encode_row
from kdtrain.data.epochs import Epochs
from kdtrain.errors import ConfigError, DataError, TeacherError
from kdtrain.generation.answers import TeacherAnswers
from kdtrain.generation.writers import LocalWriter
from kdtrain.runs.build import TeacherSide
from kdtrain.runs.teacher_answers import _identity, check_askable
from kdtrain.teachers import ServedTeacher
from kdtrain.teachers.served.http import Servers
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.stub_server import StubServer
from tests.tiny_processors import make_llava, make_llava_model, png


def test_a_teacher_never_writes_a_token_that_stands_for_an_image(tmp_path):
    """The next forward would look for its image, and find none."""
    llava = make_llava()
    (tmp_path / "a.png").write_bytes(png())
    content = [{"type": "image"}, {"type": "text", "text": "What is the file?"}]
    row = {"messages": [{"role": "user", "content": content}], "images": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    source = Source(str(tmp_path / "rows.jsonl"), answers="teacher")
    data, _ = build_dataset([source], llava, max_length=128, on_overlength="error", train_on="assistant")
    teacher = make_llava_model(len(llava.tokenizer)).eval()
    image = llava.tokenizer.convert_tokens_to_ids("<image>")

    collate = Collator(llava)
    batch = collate([data[0]])
    inputs = batch.model_inputs
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    with torch.no_grad():
        logits = teacher(**inputs).logits[0, -1]
        assert logits.max() > 0
        teacher.lm_head.weight[image] = 2 * teacher.lm_head.weight[logits.argmax()]
        assert teacher(**inputs).logits[0, -1].argmax() == image

    writer = LocalWriter(
        teacher, llava, collate, max_new_tokens=4, vocabulary=len(llava.tokenizer), batch_size=1, device="cpu"
    )
    answers = TeacherAnswers(writer, tmp_path / "answers", identity={})
    filled = answers.fill(data)
    written = [label for label in filled[0]["labels"] if label != -100]
    assert written
    assert image not in written
    assert written[0] == logits.argmax()
    with torch.no_grad():
        teacher(**collate([filled[0]]).model_inputs)


# ---- through a server ------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tokenizer):
    with StubServer(tiny.make_qwen3(seed=2, hidden=48), tokenizer) as server:
        yield server


def served(project, server, *, rlhf=None, **teacher):
    """The project with answers of a server in place of its own, and nothing else that is asked of it."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["data"]["train"] = {"path": "train.jsonl", "answers": "teacher"}
    config["data"].pop("eval", None)
    for name in ("eval_strategy", "eval_steps"):
        config["training"].pop(name, None)
    options = {"backend": "vllm", "base_url": server.url, "model": "teacher", "concurrency": 2, **teacher}
    config["rlhf"] = {"llm_kd_weight": 0, "max_new_tokens": 8, **(rlhf or {}), "teacher": options}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return str(project / "config.yaml")


def is_for_an_answer(request):
    """Rather than what the server is asked before the run."""
    body = request.body or {}
    return "stop_token_ids" in body or (request.path == "/v1/chat/completions" and body["max_tokens"] > 1)


def answers_asked(server):
    return [request for request in server.requests if is_for_an_answer(request)]


def reply_with(server, reply):
    """Answer by `reply`, which gets the request."""
    server.on_request = lambda request: reply(request) if is_for_an_answer(request) else None


def records(project):
    """What is kept of answers."""
    files = sorted((project / "run" / "teacher_answers").rglob("rank*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line]


def status(project):
    return json.loads((project / "run" / "status.json").read_text())


def trained_on(monkeypatch):
    """Ids and labels of the rows that the trainer gets."""
    seen = []
    original = GKDTrainerWithMetrics.__init__

    def init(self, *args, train_dataset=None, **kwargs):
        seen.extend((row["input_ids"], row["labels"], row["prompt_length"]) for row in train_dataset)
        original(self, *args, train_dataset=train_dataset, **kwargs)

    monkeypatch.setattr(GKDTrainerWithMetrics, "__init__", init)
    return seen


def test_a_server_answers_as_the_same_model_in_this_process(project, server, monkeypatch):
    config = served(project, server)
    rows = trained_on(monkeypatch)
    kdtrain.fit(config)
    of_server = rows.copy()
    rows.clear()
    local = yaml.safe_load((project / "config.yaml").read_text())
    local["rlhf"] |= {"teacher_model": "./teacher", "teacher": {"backend": "hf"}}
    local["training"]["output_dir"] = "local"
    (project / "config.yaml").write_text(yaml.safe_dump(local))
    kdtrain.fit(config)
    assert of_server == rows
    assert len(rows) == 24
    # Nothing is scored where there is no KD, and of equal prompts one is asked.
    assert len(answers_asked(server)) == 6


def test_what_answers_cost_is_in_the_status_and_in_the_result(project, server, caplog):
    with caplog.at_level("INFO", logger="kdtrain"):
        result = kdtrain.fit(served(project, server))
    answers = records(project)
    cost = {
        "requests": 6,
        "prompt_tokens": 144,
        "completion_tokens": sum(len(a["answer"]) for a in answers),
    }
    assert result.teacher == status(project)["teacher"] == cost
    assert "asked for 6 answers: about 144 prompt tokens, and up to 48 tokens of answers" in caplog.text


def run(config, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "kdtrain", "fit", config, *arguments],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


TWO_RANKS = pytest.param(("launch.num_processes=2",), id="two ranks", marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [pytest.param((), id="one process"), TWO_RANKS])
def test_a_run_that_is_killed_pays_for_no_answer_twice(project, server, launch):
    """Every third reply is a 429, and the run dies by kill -9 when all of its slots wait for an answer."""
    config = served(project, server, concurrency=1 if launch else 2)
    paid, hanging, arrived = [], threading.Event(), itertools.count(1)
    hangs = True

    def reply(request):
        number = next(arrived)
        if hangs and number >= 5:
            hanging.set()
            return "hang"
        return (429, {"Retry-After": "0"}, b"{}") if number % 3 == 0 else None

    def pay(request, found):
        if is_for_an_answer(request):
            paid.append(tuple(request.body["prompt"]))
        return found

    reply_with(server, reply)
    server.on_reply = pay
    process = run(config, *launch)
    try:
        assert hanging.wait(timeout=90), process.stderr.read()
        time.sleep(1)  # the other slot has stored its answer, and asked for the next
    finally:
        ranks = psutil.Process(process.pid).children(recursive=True)  # in groups of their own under a launcher
        os.killpg(process.pid, signal.SIGKILL)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        psutil.wait_procs(ranks, timeout=30)
        process.wait()
    assert len(records(project)) == len(paid) == 3
    hangs = False
    again = run(config, *launch, "--resume", "auto")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert len(paid) == len(set(paid)) == 6
    assert len(records(project)) == 6


def test_a_torn_line_costs_its_own_answer_alone(project, server):
    config = served(project, server)
    kdtrain.fit(config)
    (file,) = (project / "run" / "teacher_answers").rglob("rank*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    kdtrain.fit(config, resume="auto")
    assert len(answers_asked(server)) == 7
    kdtrain.fit(config, resume="auto")
    assert len(answers_asked(server)) == 7


def test_answers_are_kept_whatever_the_address_and_the_pace(project, server):
    kdtrain.fit(served(project, server))
    with StubServer(server.model, server.tokenizer) as other:
        kdtrain.fit(served(project, other, concurrency=5, timeout_s=9, max_retries=1), resume="auto")
        assert not answers_asked(other)
        kdtrain.fit(served(project, other, rlhf={"max_new_tokens": 7}), resume="auto")
        assert len(answers_asked(other)) == 6


def test_answers_of_a_teacher_that_was_handed_over_are_kept_by_the_model_that_it_asks_for(server):
    config = SimpleNamespace(rlhf=SimpleNamespace(teacher=SimpleNamespace(model=None)))
    found = []
    for name in ("small", "large", "small"):
        teacher = ServedTeacher(Servers([server.url]), model=name, vocab_size=320, top_k=8)
        found.append(_identity(config, None, TeacherSide(teacher, None, 320)))
    assert found[0] == found[2] != found[1]


def test_max_requests_ends_the_run_with_the_answers_kept(project, server):
    config = served(project, server, max_requests=4, concurrency=1)
    with pytest.raises(TeacherError, match="max_requests"):
        kdtrain.fit(config)
    assert len(records(project)) == len(answers_asked(server)) == 4
    assert (status(project)["exit_code"], status(project)["teacher"]["requests"]) == (4, 4)
    kdtrain.fit(config, resume="auto")
    assert (len(answers_asked(server)), status(project)["teacher"]["requests"]) == (6, 6)


def test_a_server_that_is_asked_by_token_ids_is_asked_nothing_about_images(tmp_path):
    rows = datasets.Dataset.from_list([{"row_id": "0:0", "answers": True, "images": [{"path": "a", "bytes": None}]}])
    with pytest.raises(DataError, match=r"1 rows with answers: teacher .the first: 0:0. have images"):
        check_askable(rows, messages=False)


# ---- in messages -----------------------------------------------------------------------------------------------------


def say(text, finish_reason="stop", **more):
    message = {"role": "assistant", "content": text, **more}
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}


def asked(request):
    return request.body["messages"][-1]["content"]


def test_an_answer_in_words_becomes_what_the_same_answer_in_the_data_becomes(project, server, tokenizer, monkeypatch):
    reply_with(server, lambda request: say(f"It is {asked(request)}"))
    rows = trained_on(monkeypatch)
    kdtrain.fit(served(project, server, api="chat"))
    for chat, (ids, labels, start) in zip(tiny.CHATS, rows, strict=False):
        question = chat["messages"][0]
        answered = {"messages": [question, {"role": "assistant", "content": f"It is {question['content']}"}]}
        data = encode_row(answered, tokenizer, train_on="last")
        end = len(ids)
        assert (ids, labels, start) == (data.input_ids[:end], data.labels[:end], data.prompt_length)
        assert set(data.labels[end:]) <= {-100}
        assert ids[-1] == tokenizer.eos_token_id
    assert {request.path for request in answers_asked(server)} == {"/v1/chat/completions"}
    assert status(project)["teacher"] == {"requests": 6, "prompt_tokens": 60, "completion_tokens": 12}


def test_an_answer_that_was_cut_gets_no_end_of_turn(project, server, tokenizer, monkeypatch, caplog):
    reply_with(server, lambda request: say("It is the", "length"))
    rows = trained_on(monkeypatch)
    kdtrain.fit(served(project, server, api="chat"))
    assert all(tokenizer.decode(ids[start:]) == "It is the" for ids, _, start in rows)
    assert "6 of the teacher's 6 answers reached rlhf.max_new_tokens" in caplog.text


def test_refusals_and_empty_answers_are_bad_rows_and_paid_for_once(project, server, monkeypatch):
    replies = {"What is 0?": say(None, "content_filter"), "What is 1?": say("")}
    reply_with(server, lambda request: replies.get(asked(request), say("Yes.")))
    config = served(project, server, api="chat")
    with pytest.raises(DataError) as caught:
        kdtrain.fit(config)
    assert "8 rows got no usable answer" in str(caught.value)
    assert "train.jsonl, row 0:0: the server's content filter refused the answer" in str(caught.value)
    assert "train.jsonl, row 0:1: the answer is empty" in str(caught.value)
    rows = trained_on(monkeypatch)
    kdtrain.fit(config, ["data.max_bad_rows=8"], resume="auto")
    assert len(rows) == 16
    assert len(answers_asked(server)) == 6


def test_reasoning_of_the_teacher_goes_by_the_option_and_is_not_paid_for_again(project, server, tokenizer, monkeypatch):
    reply_with(server, lambda request: say("Yes.", reasoning_content="Hm."))
    config = served(project, server, api="chat")
    with pytest.raises(DataError, match="does not render the reasoning"):
        kdtrain.fit(config)
    rows = trained_on(monkeypatch)
    kdtrain.fit(config, ["data.reasoning=keep"], resume="auto")
    (ids, _, start), *_ = rows
    assert tokenizer.decode(ids[start:]).startswith("<think>\nHm.\n</think>\n\nYes.")
    rows.clear()
    kdtrain.fit(config, ["data.reasoning=drop"], resume="auto")
    (ids, _, start), *_ = rows
    assert tokenizer.decode(ids[start:]) == "Yes.<|im_end|>"
    assert len(answers_asked(server)) == 6


def test_sampled_answers_have_a_seed_each_and_the_temperature_of_the_config(project, server):
    reply_with(server, lambda request: say("Yes."))
    kdtrain.fit(served(project, server, api="chat", rlhf={"temperature": 0.3}))
    bodies = [request.body for request in answers_asked(server)]
    assert {body["temperature"] for body in bodies} == {0.3}
    assert len({body["seed"] for body in bodies}) == 6


def test_words_have_no_log_probabilities_to_learn_from(project, server):
    with pytest.raises(ConfigError, match=r"api.*only writes answers, and rlhf.llm_kd_weight is 1"):
        kdtrain.fit(served(project, server, api="chat", rlhf={"llm_kd_weight": 1.0}))
    assert not answers_asked(server)


def test_a_prompt_that_is_text_cannot_be_asked_in_messages(project, server):
    (project / "train.jsonl").write_text('{"prompt": "One and"}\n' * 8)
    with pytest.raises(DataError, match="a prompt that is text, and the teacher reads messages"):
        kdtrain.fit(served(project, server, api="chat"))
    assert not answers_asked(server)


def test_the_rows_of_an_epoch_stay_in_proportion_when_some_are_left_out():
    epochs = Epochs([4, 6], [1.0, 0.5], seed=0).without([1, 5, 9])
    assert len(epochs) == 3 + 2
    seen = [epochs.rows(epoch).tolist() for epoch in range(2)]
    assert [rows[:3] for rows in seen] == [[0, 1, 2]] * 2
    assert sorted(seen[0][3:] + seen[1][3:]) == [3, 4, 5, 6]
