"""Answers that a server writes."""

import copy
import json
import time

import pytest
import torch

from kdtrain.data.batch import Batch, Rows
from kdtrain.errors import TeacherError
from kdtrain.generation.generate import completions
from kdtrain.generation.sampling import generation_config
from kdtrain.teachers.base import Prompt, Sampling
from kdtrain.teachers.served.chat_writing import read_chat
from kdtrain.teachers.served.http import ReplyError, Servers
from kdtrain.teachers.served.teacher import ServedTeacher
from kdtrain.teachers.served.writing import completion_payload, read_completion
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.metrics import Stopwatch
from tests import tiny
from tests.stub_server import StubServer
from tests.test_trainer import make_trainer

PROMPTS = [[1, 20, 30], [40, 50, 60, 70, 80], [90], [33, 44]]


@pytest.fixture
def server(teacher, tokenizer):
    with StubServer(teacher, tokenizer) as server:
        yield server


def served(server, **options):
    options = {"concurrency": 2, "max_retries": 2, "timeout_s": 20, **options}
    return ServedTeacher(Servers([server.url], **options), model="teacher", vocab_size=320, top_k=8)


@pytest.fixture
def asked(server):
    teacher = served(server)
    yield teacher
    teacher.close()


def prompts(seed=0):
    return [Prompt(ids, seed + i) for i, ids in enumerate(PROMPTS)]


def sampling(**changes):
    return Sampling(**{"temperature": None, "max_new_tokens": 12, "stop_ids": [2, 0], **changes})


def local(model, ids, max_new_tokens=12, stops=(2, 0)):
    tokens = torch.tensor([ids])
    batch = Batch(
        model_inputs={"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        labels=torch.full_like(tokens, -100),
        rows=Rows(prompt_lengths=torch.tensor([len(ids)])),
    )
    return completions(model, batch, generation_config(list(stops), 3, None, max_new_tokens), seeds=[0])[0]


# ---- what is asked and what comes ------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_the_same_model_in_this_process(asked, teacher):
    written = asked.write(prompts(), sampling())
    assert [one.ids for one in written] == [local(teacher, ids) for ids in PROMPTS]


def test_an_answer_ends_with_its_stop_token_or_is_cut(asked, teacher):
    plain = local(teacher, PROMPTS[1], stops=())
    stop = next(token for token in plain[2:] if plain.index(token) >= 2)
    ended, cut = (asked.write([prompts()[1]], sampling(stop_ids=stops))[0] for stops in ([stop], []))
    assert (ended.ids, ended.cut) == (plain[: plain.index(stop) + 1], False)
    assert (cut.ids, cut.cut) == (plain, True)


def test_no_setting_of_the_server_reaches_an_answer(asked, server):
    asked.write(prompts()[:1], sampling(temperature=0.5))
    sent = server.requests[-1].body
    plain = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    plain |= {"presence_penalty": 0, "frequency_penalty": 0}
    assert {name: sent[name] for name in plain} == plain
    assert (sent["temperature"], sent["stop_token_ids"], sent["max_tokens"]) == (0.5, [2, 0], 12)


def test_a_sampled_answer_depends_on_its_seed_alone(server):
    together, alone = served(server, concurrency=4), served(server, concurrency=1)
    first = together.write(prompts(), sampling(temperature=1.0))
    assert first == [alone.write([one], sampling(temperature=1.0))[0] for one in prompts()]
    assert first != together.write(prompts(seed=100), sampling(temperature=1.0))


def test_as_many_answers_are_asked_for_at_a_time_as_may_be(server):
    server.delay_s = 0.1
    served(server, concurrency=3).write([*prompts(), *prompts()], sampling(max_new_tokens=2))
    assert server.most_in_flight == 3


def test_an_answer_is_handed_over_before_the_next_one_is_asked_for(server):
    seen = []
    each = lambda i, written: seen.append((i, len(server.requests)))  # noqa: E731
    served(server, concurrency=1).write(prompts(), sampling(), each)
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_what_was_asked_for_when_another_request_failed_is_handed_over(server):
    """It is paid for."""

    def fail_the_first(request):
        if request.body["prompt"] == PROMPTS[0]:
            return 401, {}, b"{}"
        server.stopping.wait(0.3)
        return None

    server.on_request = fail_the_first
    seen = []
    with pytest.raises(TeacherError, match="401"):
        served(server, concurrency=2).write(prompts(), sampling(), lambda i, written: seen.append(i))
    assert seen == [1]
    assert len(server.requests) == 2


def test_a_server_without_ids_cannot_write_and_says_so(server, asked):
    server.token_ids = False
    with pytest.raises(TeacherError, match=r"no token ids.*cannot write"):
        asked.write(prompts()[:1], sampling())


def test_ids_may_stand_in_place_of_the_texts_of_tokens(server, asked, teacher):
    """As older servers have them."""

    def without(request, reply):
        del reply["choices"][0]["token_ids"], reply["choices"][0]["prompt_token_ids"]
        return reply

    server.on_reply = without
    assert asked.write(prompts()[:1], sampling())[0].ids == local(teacher, PROMPTS[0])


# ---- replies that are refused ----------------------------------------------------------------------------------------

REPLY = {
    "choices": [
        {
            "index": 0,
            "token_ids": [5, 6, 2],
            "prompt_token_ids": [1, 20, 30],
            "logprobs": {"tokens": ["token_id:5", "token_id:6", "token_id:2"]},
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
}


def read(**changes):
    reply = copy.deepcopy(REPLY)
    ids = changes.get("token_ids")
    if isinstance(ids, list):
        changes = {"logprobs": {"tokens": [f"token_id:{i}" for i in ids]}, **changes}
    reply["choices"][0] |= changes
    return read_completion(reply, [1, 20, 30], sampling(max_new_tokens=4, forbidden_ids=[9]), 320)


def test_a_good_reply_is_read():
    assert (read().ids, read().cut) == ([5, 6, 2], False)
    assert read(finish_reason="length", token_ids=[5, 6, 7, 8]).cut
    assert read(finish_reason="length", token_ids=[5]).cut  # the server's own limit
    assert not read(token_ids=[5, 7], stop_reason=7).cut  # a stop token of the server's model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [5, 320, 2]}, "token 1 of the answer is 320"),
        ({"token_ids": [5, -1, 2]}, "token 1 of the answer is -1"),
        ({"token_ids": [5, 2, 6, 2]}, "does not follow stop_token_ids"),
        ({"token_ids": [5, 6]}, "its last token is 6"),
        ({"token_ids": []}, "it has no token"),
        ({"token_ids": [5, 6, 7, 8, 2]}, "5 tokens, and 4 were asked for"),
        ({"token_ids": [5, 9, 2]}, "stands for an image"),
        ({"token_ids": [5, "6", 2], "logprobs": None}, "no id"),
        ({"token_ids": [5, 7, 2], "logprobs": REPLY["choices"][0]["logprobs"]}, "differ"),
        ({"token_ids": None, "logprobs": {"tokens": ["a", "b", "c"]}}, "no token ids"),
        ({"token_ids": None, "logprobs": None}, "no token ids"),
        ({"prompt_token_ids": [1, 20]}, "another prompt"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort'"),
        ({"finish_reason": None}, "finish_reason is None"),
    ],
)
def test_a_reply_that_is_not_as_it_must_be_is_refused(changes, message):
    with pytest.raises(ReplyError, match=message):
        read(**changes)


@pytest.mark.parametrize("reply", [None, [], {}, {"choices": None}, {"choices": []}, {"choices": [1]}])
def test_a_reply_without_one_choice_is_refused(reply):
    with pytest.raises(ReplyError, match="where one answer was asked for"):
        read_completion(reply, [1], sampling(), 320)


def test_a_content_filter_is_a_refusal_and_no_answer():
    found = read(finish_reason="content_filter")
    assert (found.ids, "content filter" in found.refused) == ([], True)


def test_seeds_fit_the_32_bits_that_some_servers_keep():
    seeds = [completion_payload("m", Prompt([1], seed), sampling(), 0)["seed"] for seed in (7, 2**62 + 5)]
    assert seeds == [7, 5]
    assert json.dumps(seeds)
    assert torch.Generator().manual_seed(seeds[1])


# ---- seq_kd ----------------------------------------------------------------------------------------------------------

ROWS = [{**row, "row_id": f"0:{i}"} for i, row in enumerate(tiny.CHATS * 2)]


def train(folder, url, *, ranks=1, accumulate=1, writes_targets=False, resume=None, steps=3, **options):
    """Losses and answers of some steps; what a rank answered comes in the order of its batches."""
    servers = Servers([url], concurrency=4, timeout_s=20)
    teacher = ServedTeacher(
        servers, model="teacher", vocab_size=320, top_k=options.pop("top_k", 320), route="prompt_logprobs"
    )
    teacher.writes_targets = writes_targets
    trainer = make_trainer(
        folder, None, None, rows=ROWS, extra={"teacher": teacher}, seq_kd=True, lmbda=0.0, max_new_tokens=6,
        temperature=1.0, max_steps=steps, per_device_train_batch_size=4 // ranks // accumulate,
        gradient_accumulation_steps=accumulate, train_sampling_strategy="sequential", logging_steps=1,
        save_strategy="steps", save_steps=1, learning_rate=1e-3, **options,
    )  # fmt: skip
    answers = []
    original = teacher.write

    def write(prompts, sampling, each=None):
        written = original(prompts, sampling, each)
        answers.extend((list(prompt.ids), one.ids) for prompt, one in zip(prompts, written, strict=True))
        return written

    teacher.write = write
    trainer.train(resume_from_checkpoint=resume)
    teacher.close()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, answers


def scored_rows(server, answers):
    """Those with the answers. Before a training some rows of the data are scored as well."""
    written = [prompt + ids for prompt, ids in answers]
    asked = (request.body["prompt"] for request in server.requests if "prompt_logprobs" in request.body)
    return [ids for prompt in asked for ids in prompt if ids in written]


def test_seq_kd_trains_on_answers_of_a_server(tmp_path, server):
    losses, answers = train(tmp_path, server.url)
    assert len(answers) == 12
    assert all(1 <= len(ids) <= 6 for _, ids in answers)
    sent = [request.body for request in server.requests if "stop_token_ids" in request.body]
    assert sorted(body["prompt"] for body in sent) == sorted(prompt for prompt, _ in answers)
    # What is scored is what was written, at all of its positions.
    assert sorted(scored_rows(server, answers)) == sorted(prompt + ids for prompt, ids in answers)
    assert all(loss > 0 for loss in losses)


def test_waiting_for_answers_counts_in_the_share_of_waiting(tmp_path, server, monkeypatch):
    """Replies take a fifth of a second, four at a time, and each record is of one step, in a lap of ten seconds."""
    logged, original = [], GKDTrainerWithMetrics.log

    def log(self, logs, *args):
        logged.append(logs)
        original(self, logs, *args)

    monkeypatch.setattr(GKDTrainerWithMetrics, "log", log)
    monkeypatch.setattr(Stopwatch, "lap", lambda self: 10.0)
    server.on_request = lambda request: time.sleep(0.2 if "stop_token_ids" in request.body else 0)
    train(tmp_path, server.url, writes_targets=True, top_k=8, steps=2)
    shares = [logs["teacher_wait_fraction"] for logs in logged if "loss" in logs]
    assert len(shares) == 2
    assert min(shares) >= 0.2 / 10


@pytest.mark.slow
def test_answers_do_not_depend_on_micro_batches_nor_on_ranks(tmp_path, server):
    losses, answers = train(tmp_path / "one", server.url)
    accumulated, same = train(tmp_path / "accumulated", server.url, accumulate=2)
    assert same == answers
    assert accumulated == pytest.approx(losses, rel=1e-4)
    ranks = tiny.run_ranks(train_rank, 2, tmp_path / "ranks", server.url)
    assert sorted(answer for _, own in ranks for answer in own) == sorted(answers)
    for found, _ in ranks:
        assert found == pytest.approx(losses, rel=1e-4)


def train_rank(folder, url):
    return train(folder, url, ranks=2)


def test_a_resumed_run_asks_for_the_same_answers(tmp_path, server):
    losses, answers = train(tmp_path, server.url)
    again, rest = train(tmp_path, server.url, resume=str(tmp_path / "checkpoint-1"))
    assert rest == answers[4:]
    assert again[-2:] == losses[-2:]


def test_targets_that_came_with_the_answers_are_not_asked_for_again(tmp_path, server):
    expected, answers = train(tmp_path / "scored", server.url, top_k=8)
    server.requests.clear()
    losses, same = train(tmp_path / "written", server.url, top_k=8, writes_targets=True)
    assert same == answers
    assert losses == pytest.approx(expected, rel=1e-5)
    assert not scored_rows(server, answers)
    asked = [request.body for request in server.requests if "stop_token_ids" in request.body]
    assert len(asked) == len(answers)
    assert all(body["logprobs"] == 8 for body in asked)


def test_a_teacher_that_only_writes_is_refused_where_its_distributions_are_needed(tmp_path, server):
    teacher = served(server)
    teacher.api = "chat"
    for options in ({}, {"seq_kd": True}):
        with pytest.raises(ValueError, match="only writes answers, and llm_kd_weight is 1"):
            make_trainer(tmp_path, None, None, extra={"teacher": teacher}, **options)


# ---- answers in messages ---------------------------------------------------------------------------------------------


def message(content="Yes.", finish_reason="stop", **more):
    return {"choices": [{"index": 0, "message": {"content": content, **more}, "finish_reason": finish_reason}]}


def test_a_message_is_asked_for_as_the_row_has_it(server):
    teacher = served(server)
    teacher.api = "chat"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    server.on_request = lambda request: message()
    chat = {"messages": messages, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    written = teacher.write([Prompt([1], 2**40 + 3, chat)], sampling(temperature=0.7))
    assert written[0].message == {"role": "assistant", "content": "Yes."}
    (sent,) = server.requests
    assert sent.path == "/v1/chat/completions"
    assert (sent.body["tools"], sent.body["chat_template_kwargs"]) == (tools, {"enable_thinking": False})
    assert sent.body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"at": 1}'
    assert {name: sent.body[name] for name in ("temperature", "max_tokens", "seed")} == {
        "temperature": 0.7, "max_tokens": 12, "seed": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "cut", "expected"),
    [
        (message(), False, {"content": "Yes."}),
        (message("Ye", "length"), True, {"content": "Ye"}),
        (message(reasoning_content="hm", reasoning=None), False, {"content": "Yes.", "reasoning_content": "hm"}),
        (message(reasoning="hm"), False, {"content": "Yes.", "reasoning": "hm"}),
        (message(None, "tool_calls", tool_calls=[{"id": "1"}]), False, {"content": "", "tool_calls": [{"id": "1"}]}),
        (message(tool_calls=[], function_call=None, refusal=""), False, {"content": "Yes."}),
    ],
)
def test_what_a_message_says_is_kept(reply, cut, expected):
    found = read_chat(reply)
    assert (found.cut, found.refused, found.message) == (cut, None, {"role": "assistant", **expected})


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (message(None, "content_filter"), "the server's content filter refused the answer"),
        (message(None, refusal="I can't\x1b[2J help."), "the teacher refused to answer: I can't\\x1b[2J help."),
        (message(""), "the answer is empty"),
        (message(" \n"), "the answer is empty"),
        (message(None, "length", reasoning="hm"), "the answer was cut in its reasoning: raise rlhf.max_new_tokens"),
        (message(None, "length"), "the answer was cut before it began: raise rlhf.max_new_tokens"),
        (message("", "length", tool_calls=[{}]), "the answer was cut in a tool call: raise rlhf.max_new_tokens"),
    ],
)
def test_a_message_without_a_usable_answer_is_refused_with_the_reason(reply, reason):
    found = read_chat(reply)
    assert (found.ids, found.message) == ([], None)
    assert found.refused == reason


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ({"choices": [{"finish_reason": "stop"}]}, "has no message"),
        (message(finish_reason="error"), "finish_reason is 'error'"),
        (message(["a"]), "content is no text"),
        ({"choices": []}, "where one answer was asked for"),
    ],
)
def test_a_reply_that_is_no_message_is_refused(reply, problem):
    with pytest.raises(ReplyError, match=problem):
        read_chat(reply)


@pytest.mark.parametrize(
    "lie",
    [
        lambda key: message(None, refusal=f"not for {key}"),
        lambda key: message(None, refusal="x" * 60 + key),
        lambda key: message(finish_reason=key),
        lambda key: message(finish_reason="x" * 20 + key),
    ],
)
def test_a_key_that_a_server_sends_back_is_neither_kept_nor_shown(server, monkeypatch, lie):
    key = "sk-0123456789abcdefghij"
    monkeypatch.setenv("TEACHER_KEY", key)
    teacher = served(server, api_key_env="TEACHER_KEY")
    teacher.api = "chat"
    server.on_request = lambda request: lie(key)
    try:
        (written,) = teacher.write([Prompt([1], 0, {"messages": [{"role": "user", "content": "Hi"}]})], sampling())
        said = str(written)
    except TeacherError as error:
        said = str(error)
    teacher.close()
    assert key[:6] not in said


def test_no_more_requests_are_sent_than_max_requests(server):
    """Those that are repeated count: some APIs have them paid."""
    busy = iter([True, False, False, False, False])
    server.on_request = lambda request: (429, {"Retry-After": "0"}, b"{}") if next(busy) else None
    teacher = ServedTeacher(
        Servers([server.url], concurrency=1), model="teacher", vocab_size=320, top_k=8, max_requests=3
    )
    seen = []
    with pytest.raises(TeacherError, match="max_requests: 3 requests") as caught:
        teacher.write(prompts(), sampling(), lambda i, written: seen.append(i))
    assert caught.value.exit_code == 4
    assert (seen, len(server.requests)) == ([0, 1], 3)


def test_ranks_share_max_requests(server, monkeypatch):
    budgets = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        teacher = ServedTeacher(Servers([server.url]), model="t", vocab_size=320, top_k=8, max_requests=5)
        budgets.append(teacher.budget.most)
    assert budgets == [3, 2]
