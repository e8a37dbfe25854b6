"""Requests to servers on real sockets: faults 17 to 20 and 22 to 24, several servers, forks, signals, the end."""

import asyncio
import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from email.utils import formatdate

import pytest
import torch

from kdtrain.errors import ConfigError, PreflightError, TeacherError
from kdtrain.teachers.served import http, pool, server
from kdtrain.teachers.served.http import NoAnswerError, ReplyError, Servers, StatusError
from tests import tiny
from tests.stub_server import HANG, RESET, StubServer

KEY = "canary-5f1e8a77c0"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(scope="module")
def model():
    return tiny.make_qwen3(seed=2)


@pytest.fixture
def stub(model):
    with StubServer(model) as running:
        yield running


@pytest.fixture
def two(model):
    with StubServer(model) as first, StubServer(model) as second:
        yield first, second


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE_S", 0.01)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def connect():
    """Servers that are closed after the test."""
    made = []

    def connect(*stubs, **options):
        made.append(Servers([each.url for each in stubs], **{"timeout_s": 5.0, "concurrency": 4, **options}))
        return made[-1]

    yield connect
    for each in made:
        each.close()


def greedy(*ids):
    return {"model": "teacher", "prompt": list(ids), "max_tokens": 1, "temperature": 0, "return_token_ids": True}


def first_token(reply):
    return reply["choices"][0]["token_ids"][0]


def ask(servers, *ids, **options):
    return servers.run(servers.post("/completions", greedy(*(ids or (1, 2, 3))), first_token, **options))


def ask_many(servers, count):
    async def all_of_them():
        return await asyncio.gather(*(servers.post("/completions", greedy(1, n), first_token) for n in range(count)))

    return servers.run(all_of_them())


def in_turn(*faults):
    """For `on_request`: one fault after the other, then none."""
    left = list(faults)
    return lambda request: left.pop(0) if left else None


def drip(request):
    def pieces():
        while True:
            yield b" "
            time.sleep(0.05)

    return 200, {"Content-Length": "1000000"}, pieces()


def stuck_on(stub, within_s=200):
    """Wait until a request has come in."""
    until = time.monotonic() + within_s
    while not stub.requests:
        assert time.monotonic() < until, "no request came"
        time.sleep(0.01)


# --- what is retried ---


def test_a_busy_a_failing_and_a_broken_server_change_nothing_but_the_counts(stub, connect):
    servers = connect(stub)
    expected = ask(servers)
    stub.on_request = in_turn((429, {"Retry-After": "1"}, b"{}"), (503, {}, b"x"), (503, {}, b""), RESET)
    began = time.monotonic()
    assert ask(servers) == expected
    assert time.monotonic() - began >= 1.0
    assert (servers.counts.requests, servers.counts.retries) == (6, 4)
    assert (servers.counts.prompt_tokens, servers.counts.completion_tokens) == (6, 2)


@pytest.mark.parametrize("fault", [RESET, (500, {}, b""), (502, {}, b""), (429, {}, b"")], ids=str)
def test_a_fault_that_lasts_ends_after_the_retries_with_exit_code_4(stub, connect, fault):
    stub.on_request = lambda request: fault
    with pytest.raises(NoAnswerError, match="asked 3 times") as caught:
        ask(connect(stub, max_retries=2))
    assert caught.value.exit_code == 4
    assert stub.url in str(caught.value)
    assert "POST /completions" in str(caught.value)
    assert len(stub.requests) == 3


@pytest.mark.parametrize("fault", [lambda request: HANG, drip], ids=["silent", "drip"])
def test_a_silent_and_a_dripping_server_end_within_the_total_limit(stub, connect, fault):
    stub.on_request = fault
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"no complete reply within 0\.\d+ s"):
        ask(connect(stub, timeout_s=0.3, max_retries=2))
    assert 0.6 < time.monotonic() - began < 1.5


def test_a_server_without_tls_that_is_asked_for_it_is_told_apart_from_one_that_is_not_there(stub):
    servers = Servers([stub.url.replace("http:", "https:")], max_retries=0)
    with pytest.raises(NoAnswerError, match="does not speak https"):
        servers.run(servers.get("/models", dict))
    servers.close()


def test_a_reply_that_comes_too_late_once_is_asked_for_again(stub, connect):
    servers = connect(stub, timeout_s=0.5)
    expected = ask(servers)
    stub.on_request = in_turn(HANG)
    assert ask(servers) == expected
    assert servers.counts.retries == 1


def test_waiting_for_a_turn_is_not_time_of_the_request(stub, connect):
    stub.delay_s = 0.2
    assert len(ask_many(connect(stub, timeout_s=0.5, max_retries=0, concurrency=1), 5)) == 5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_request_that_is_refused_is_not_sent_again(stub, connect, status):
    stub.on_request = lambda request: (status, {}, b'{"error": {"message": "no such thing"}}')
    with pytest.raises(StatusError, match=f"status {status}: 'no such thing'") as caught:
        ask(connect(stub))
    assert caught.value.status == status
    assert caught.value.exit_code == 4
    assert f"{stub.url} gave" in str(caught.value)
    assert len(stub.requests) == 1


def test_a_refused_key_and_a_missing_one_name_the_variable_to_look_at(stub, connect, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    stub.api_key = "another"
    with pytest.raises(StatusError, match="check the variable TEACHER_KEY"):
        ask(connect(stub, api_key_env="TEACHER_KEY"))
    with pytest.raises(StatusError, match="Name the variable that holds its key"):
        ask(connect(stub))


UNUSABLE = {
    "truncated": b'{"choices": [{"token_ids": [1',
    "HTML": b"<html><body>Welcome</body></html>",
    "empty": b"",
    "not UTF-8": b'{"choices": "\xff"}',
    "NaN": b'{"choices": [{"token_ids": [NaN]}]}',
    "-Infinity": b"[-Infinity]",
    "a key twice": b'{"choices": [], "choices": [{"token_ids": [1]}]}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("body", UNUSABLE.values(), ids=UNUSABLE)
def test_a_reply_that_cannot_be_read_is_asked_for_once_more(stub, connect, body):
    servers = connect(stub)
    expected = ask(servers)
    stub.on_request = in_turn((200, {}, body))
    assert ask(servers) == expected
    assert servers.counts.retries == 1
    stub.on_request = lambda request: (200, {}, body)
    with pytest.raises(TeacherError, match=r"asked 2 times: a reply that (is no|has)") as caught:
        ask(servers)
    assert not isinstance(caught.value, NoAnswerError)
    assert len(stub.requests) == 5


@pytest.mark.parametrize("reply", [b"null", b'{"choices": null}', b"[]", b'{"choices": []}'])
def test_a_reply_of_another_shape_is_asked_for_once_more_and_says_what_the_reader_said(stub, connect, reply):
    def read(found):
        if not (isinstance(found, dict) and found.get("choices")):
            raise ReplyError("choices are \x1b[31mmissing")
        return first_token(found)

    servers = connect(stub)
    stub.on_request = in_turn((200, {}, reply))
    assert isinstance(servers.run(servers.post("/completions", greedy(1, 2), read)), int)
    stub.on_request = lambda request: (200, {}, reply)
    with pytest.raises(TeacherError, match=r"a reply in which choices are \\x1b\[31mmissing"):
        servers.run(servers.post("/completions", greedy(1, 2), read))
    assert len(stub.requests) == 4


def test_a_bug_in_the_reader_is_no_fault_of_the_server(stub, connect):
    servers = connect(stub)
    with pytest.raises(KeyError):
        servers.run(servers.post("/completions", greedy(1, 2), lambda reply: reply["no such key"]))
    assert len(stub.requests) == 1


def test_a_body_cut_short_is_a_broken_connection(stub, connect):
    stub.on_request = lambda request: (200, {"Content-Length": "1000"}, b'{"choices": ')
    with pytest.raises(NoAnswerError, match="the connection broke"):
        ask(connect(stub, max_retries=1))


def test_a_reply_without_end_is_cut_off(stub, connect, monkeypatch):
    monkeypatch.setattr(server, "LONGEST_REPLY", 2**20)
    sent = []

    def endless():
        while True:
            sent.append(1)
            yield b" " * 2**16

    stub.on_request = lambda request: (200, {}, endless())
    with pytest.raises(TeacherError, match="the reply is longer than 1 MiB"):
        ask(connect(stub))
    assert len(sent) < 1000


def test_what_a_server_says_is_shown_short_and_escaped(stub, connect):
    stub.on_request = lambda request: (400, {}, b"\x1b]0;evil\x07 \xe2\x80\xae" + b"x" * 5000)
    with pytest.raises(StatusError) as caught:
        ask(connect(stub))
    shown = str(caught.value).partition("status 400: '")[2].partition("'.")[0]
    assert shown.startswith(r"\x1b]0;evil\x07 \u202exxx")
    assert len(shown) == 80
    assert str(caught.value).isprintable()


# --- Retry-After ---


def test_retry_after_may_be_a_date(stub, connect):
    servers = connect(stub)
    expected = ask(servers)
    stub.on_request = in_turn((503, {"Retry-After": formatdate(time.time() + 2, usegmt=True)}, b""))
    began = time.monotonic()
    assert ask(servers) == expected
    assert 0.5 < time.monotonic() - began < 3


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", "1e999", "Wed, 99 Foo 2026"])
def test_a_retry_after_that_says_nothing_is_a_short_pause(stub, connect, value):
    servers = connect(stub)
    stub.on_request = in_turn((429, {"Retry-After": value}, b""))
    began = time.monotonic()
    ask(servers)
    assert time.monotonic() - began < 1


def test_a_wait_longer_than_the_total_limit_is_refused_at_once(stub, connect):
    stub.on_request = lambda request: (429, {"Retry-After": "3600"}, b"")
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match="it asks to wait 3600 s"):
        ask(connect(stub))
    assert time.monotonic() - began < 1


def test_all_requests_keep_to_what_one_was_told(stub, connect):
    servers = connect(stub, concurrency=1)
    ask(servers)
    stub.on_request = in_turn((429, {"Retry-After": "1"}, b""))
    ask_many(servers, 4)
    told, *others = [request.time for request in stub.requests[1:]]
    assert min(others) - told >= 1.0


def test_pauses_draw_from_no_generator_that_training_uses(stub, connect):
    servers = connect(stub)
    before = random.getstate(), torch.get_rng_state()
    stub.on_request = in_turn((503, {}, b""), RESET, (200, {}, b""))
    ask(servers)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# --- where requests go ---


def test_a_redirect_is_not_followed_and_its_host_gets_nothing(two, connect, monkeypatch):
    first, second = two
    monkeypatch.setenv("TEACHER_KEY", KEY)
    for status in (301, 302, 307, 308):
        first.on_request = lambda request, status=status: (status, {"Location": f"{second.url}/x?{KEY}"}, b"")
        with pytest.raises(StatusError, match=f"status {status}, a redirect to host '127.0.0.1'"):
            ask(connect(first, api_key_env="TEACHER_KEY"))
    assert len(first.requests) == 4
    assert second.connections == 0


def test_the_key_goes_to_the_server_with_every_request(stub, connect, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")
    stub.api_key = KEY
    ask(connect(stub, api_key_env="TEACHER_KEY"))


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_server_on_this_machine_is_never_asked_through_a_proxy(two, connect, monkeypatch, variable):
    stub, proxy = two
    monkeypatch.setenv(variable, proxy.url.removesuffix("/v1"))
    ask(connect(stub))
    assert proxy.connections == 0


def test_another_host_is_asked_through_the_proxy_of_the_environment(stub, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", stub.url.removesuffix("/v1"))
    stub.on_request = lambda request: {"through": request.path}
    servers = Servers(["http://teacher.invalid/v1"], timeout_s=5)
    assert servers.run(servers.get("/models", dict)) == {"through": "http://teacher.invalid/v1/models"}
    servers.close()


def test_a_proxy_that_cannot_be_used_is_an_error_without_its_password(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"nonsense://user:{KEY}@127.0.0.1:1")
    servers = Servers(["http://teacher.invalid/v1"])
    with pytest.raises(PreflightError, match="NO_PROXY") as caught:
        servers.run(servers.get("/models", dict))
    servers.close()
    assert KEY not in everything_about(caught.value)


def test_a_name_that_leads_to_a_metadata_address_gets_no_request(stub, connect, monkeypatch):
    monkeypatch.setattr(server, "is_metadata_address", lambda address: str(address) == "127.0.0.1")
    with pytest.raises(TeacherError, match="clouds hand out credentials"):
        ask(connect(stub))
    assert stub.requests == []


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://u:canary@host/v1", "http://169.254.169.254/v1"])
def test_an_address_that_is_refused_makes_no_servers(url):
    with pytest.raises(ConfigError, match=r"base_url\[1\]: ") as caught:
        Servers(["http://127.0.0.1:1/v1", url])
    assert "canary" not in str(caught.value)


def test_a_key_is_not_sent_unencrypted_to_another_machine(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with pytest.raises(ConfigError, match="unencrypted"):
        Servers(["http://10.0.0.1:8000/v1"], api_key_env="TEACHER_KEY")


@pytest.mark.parametrize("value", [None, "", "  ", f"{KEY}\nX: y", f"{KEY} {KEY}", f"{KEY}é"])
def test_a_variable_without_a_usable_key_is_refused_and_not_repeated(monkeypatch, value):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(PreflightError, match="the variable TEACHER_KEY") as caught:
        Servers(["http://127.0.0.1:1/v1"], api_key_env="TEACHER_KEY")
    assert KEY not in str(caught.value)


# --- the key appears nowhere ---


def everything_about(error):
    """The error and its causes, with what reporters that show local variables would print; not those of the tests."""
    found = []
    while error is not None:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        assert frames is not None
        shown = traceback.TracebackException(type(error), error, frames, capture_locals=True)
        found += [str(error), repr(error), "".join(shown.format())]
        error = error.__context__
    return "\n".join(found)


FAULTS = {
    "reset": RESET,
    "silent": HANG,
    "echo in an error": (401, {}, json.dumps({"error": {"message": "x" * 74 + KEY}}).encode()),
    "echo in a page": (200, {}, f"<html>Bearer {KEY}</html>".encode()),
    "echo across the cut": (500, {}, b"y" * 70 + KEY.encode()),
    "redirect": (302, {"Location": f"http://{KEY}@{KEY}.example/{KEY}"}, b""),
    "bad header": (200, {"X\x00": "y"}, b"{}"),
    "bad length": (200, {"Content-Length": "-1"}, b"{}"),
    "busy": (429, {"Retry-After": "9999"}, KEY.encode()),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_key_is_in_no_error_no_local_variable_and_no_log(stub, connect, monkeypatch, caplog, fault):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    servers = connect(stub, api_key_env="TEACHER_KEY", timeout_s=0.3, max_retries=1)
    ask(servers)
    stub.on_request = lambda request: fault
    with pytest.raises(TeacherError) as caught:
        ask(servers)
    assert stub.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert KEY[:8] not in everything_about(caught.value)
    records = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records if sent_by_us(record))
    assert "httpcore2" in records
    assert KEY not in records
    assert KEY not in repr(vars(servers))


def sent_by_us(record):
    """Not what the server put into its own headers, which httpcore logs as it is."""
    return not record.getMessage().startswith("receive_response_headers.complete")


def test_a_connection_refused_says_nothing_of_the_key(model, connect, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with StubServer(model) as stub:
        servers = connect(stub, api_key_env="TEACHER_KEY", max_retries=1)
    with pytest.raises(NoAnswerError, match="no connection") as caught:
        ask(servers)
    assert KEY not in everything_about(caught.value) + caplog.text


# --- several servers ---


def test_requests_are_spread_and_no_server_gets_more_than_its_share_at_a_time(two, connect):
    for each in two:
        each.delay_s = 0.02
    servers = connect(*two, concurrency=3)
    found = ask_many(servers, 40)
    alone = ask_many(connect(two[0]), 40)
    assert found == alone
    first, second = two
    assert abs(len(first.requests) - 40 - len(second.requests)) <= 6
    assert second.most_in_flight == 3


def test_a_slow_server_gets_less(two, connect):
    first, second = two
    first.delay_s, second.delay_s = 0.2, 0.01
    ask_many(connect(first, second, concurrency=2), 40)
    assert len(first.requests) < 10 < len(second.requests)


def test_a_request_may_ask_one_server_alone(two, connect):
    servers = connect(*two)
    for _ in range(3):
        ask(servers, server=two[1].url)
    assert (len(two[0].requests), len(two[1].requests)) == (0, 3)


def test_a_dead_server_is_left_out_with_one_warning_and_comes_back(two, connect, monkeypatch, caplog):
    monkeypatch.setattr(pool, "_LEFT_OUT_S", 0.3)
    first, _ = two
    servers = connect(*two)
    expected = ask_many(servers, 12)
    first.stop()
    assert ask_many(servers, 12) == expected
    assert ask_many(servers, 12) == expected
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"{first.url} is left out" in warnings[0]
    first.start()
    before = len(first.requests)
    time.sleep(0.4)
    assert ask_many(servers, 12) == expected
    assert ask_many(servers, 12) == expected
    assert len(first.requests) > before + 1
    assert f"{first.url} answers again" in caplog.text


def test_a_server_that_was_left_out_is_tried_by_one_request(two, connect, monkeypatch):
    monkeypatch.setattr(pool, "_LEFT_OUT_S", 1.0)
    first, _ = two
    servers = connect(*two, timeout_s=2.0)
    first.stop()
    ask_many(servers, 12)
    first.on_request = lambda request: HANG
    first.start()
    time.sleep(1.1)
    ask_many(servers, 12)
    assert len(first.requests) == 1


def test_a_failing_server_does_not_cost_a_pause_while_another_one_answers(two, connect, monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE_S", 5.0)
    first, _ = two
    first.on_request = lambda request: (500, {}, b"")
    began = time.monotonic()
    ask_many(connect(*two, max_retries=2), 8)
    assert time.monotonic() - began < 3


def test_servers_that_all_fail_are_not_asked_without_a_pause(two, connect, monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE_S", 0.2)
    for each in two:
        each.on_request = in_turn((503, {}, b""), (503, {}, b""))
    began = time.monotonic()
    ask(connect(*two))
    assert time.monotonic() - began > 0.3


def test_when_all_servers_are_dead_the_run_ends(two, connect):
    servers = connect(*two, max_retries=3)
    for each in two:
        each.stop()
    with pytest.raises(NoAnswerError, match=r"the last one asked of 2 servers.*asked 4 times: no connection"):
        ask(servers)


# --- a server that was restarted ---


def watch_models(servers, wanted):
    """A check such as the probe makes: the server must still give the first answer."""
    calls = []

    async def verify(url):
        calls.append(url)
        found = await servers.post("/completions", greedy(5, 6, 7), first_token, server=url, verified=False)
        if found != wanted:
            raise TeacherError(f"{url} has another model")

    servers.verify = verify
    return calls


def test_a_server_that_comes_back_with_the_same_model_is_checked_and_used(stub, connect):
    servers = connect(stub)
    expected = ask(servers)
    calls = watch_models(servers, ask(servers, 5, 6, 7))
    for _ in range(3):
        assert ask(servers) == expected
    checked = len(calls)
    assert 1 <= checked <= 2
    for _ in range(3):
        assert ask(servers) == expected
    assert len(calls) == checked  # the connection is the same
    stub.restart()
    assert ask(servers) == expected
    assert len(calls) > checked


def test_a_server_that_comes_back_with_another_model_is_noticed_before_its_reply_is_used(stub, connect):
    servers = connect(stub)
    watch_models(servers, ask(servers, 5, 6, 7))
    ask_many(servers, 8)
    stub.restart(tiny.make_qwen3(seed=77))
    read = []
    with pytest.raises(TeacherError, match="has another model"):
        servers.run(servers.post("/completions", greedy(1, 2), read.append))
    assert read == []


def test_requests_share_a_check_of_the_same_server(stub, connect):
    servers = connect(stub, concurrency=8)
    calls = watch_models(servers, ask(servers, 5, 6, 7))
    stub.close_connections()
    ask_many(servers, 40)
    assert 1 <= len(calls) <= 4


def test_a_connection_that_only_a_check_opened_is_checked_too(stub, connect):
    servers = connect(stub)
    wanted = ask(servers, 5, 6, 7)
    calls = watch_models(servers, wanted)
    ask(servers)
    stub.restart()
    ask(servers, 5, 6, 7, verified=False)  # opens the new connection
    before = len(calls)
    ask(servers)
    assert len(calls) > before


def test_a_connection_opened_during_a_check_needs_another_one(stub, connect):
    servers = connect(stub)
    watch_models(servers, ask(servers, 5, 6, 7))
    check = servers.verify

    async def restarted_right_after(url):
        await check(url)
        stub.restart(tiny.make_qwen3(seed=77))
        await servers.get("/models", dict, server=url, verified=False)

    servers.verify = restarted_right_after
    ask(servers)
    with pytest.raises(TeacherError, match="has another model"):
        ask(servers)


def test_a_server_that_dies_before_its_check_is_one_that_does_not_answer(two, connect):
    first, _ = two
    servers = connect(*two, max_retries=1)
    expected = ask(servers)
    watch_models(servers, ask(servers, 5, 6, 7))
    first.on_request = lambda request: RESET if request.body["prompt"] == [5, 6, 7] else None
    assert [ask(servers) for _ in range(4)] == [expected] * 4
    assert first.asked("/completions")


# --- threads, processes, the end ---


def test_closing_cancels_what_is_in_flight_and_may_be_done_twice(stub, connect):
    servers = connect(stub, timeout_s=60)
    ask(servers)
    stub.on_request = lambda request: HANG
    future = servers.start(servers.post("/completions", greedy(1, 2), first_token))
    while len(stub.requests) < 2:
        time.sleep(0.01)
    began = time.monotonic()
    servers.close()
    servers.close()
    assert time.monotonic() - began < 2
    assert future.cancelled()
    assert not any(thread.name == "teacher-http" and thread.is_alive() for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        ask(servers)


def test_servers_that_are_dropped_end_their_thread(stub):
    servers = Servers([stub.url])
    ask(servers)
    gone = weakref.ref(servers)
    del servers
    gc.collect()
    assert gone() is None
    assert not any(thread.name == "teacher-http" and thread.is_alive() for thread in threading.enumerate())


def test_what_a_handler_raises_while_run_waits_cancels_the_request(stub, connect):
    servers = connect(stub, timeout_s=60)
    stub.on_request = lambda request: HANG
    cancelled = threading.Event()

    async def request():
        try:
            await servers.post("/completions", greedy(1, 2), first_token)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    previous = signal.signal(signal.SIGUSR1, raise_interrupted)
    threading.Thread(target=lambda: (stuck_on(stub), os.kill(os.getpid(), signal.SIGUSR1))).start()
    try:
        with pytest.raises(InterruptedError):
            servers.run(request())
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert cancelled.wait(1)


def raise_interrupted(signum, frame):
    raise InterruptedError


def started(code, *arguments):
    """A real process; `Servers` are made by it."""
    head = "import sys, threading, asyncio\nfrom kdtrain.teachers.served.http import Servers\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


@pytest.mark.slow
def test_ctrl_c_while_waiting_ends_a_process_long_before_its_request(stub):
    stub.on_request = lambda request: HANG
    process = started(
        """
        servers = Servers([sys.argv[1]], timeout_s=60)
        try:
            servers.run(servers.get("/models", dict))
        except KeyboardInterrupt:
            servers.close()
            print("interrupted", flush=True)
        """,
        stub.url,
    )
    stuck_on(stub)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    assert time.monotonic() - began < 20  # a machine may be busy; the request would wait for 60
    assert process.communicate(timeout=200) == ("", "")
    assert process.returncode == 0


@pytest.mark.slow
def test_an_interpreter_ends_quietly_with_requests_in_flight(stub):
    stub.on_request = lambda request: HANG
    process = started(
        """
        servers = Servers([sys.argv[1]], timeout_s=60)
        for _ in range(20):
            future = servers.start(servers.get("/models", dict))
        sys.stdin.readline()
        """,
        stub.url,
    )
    stuck_on(stub)
    out, err = process.communicate(timeout=200)
    assert (out, err, process.returncode) == ("", "", 0)


def test_workers_of_the_data_loader_leave_the_connections_alone(stub, connect):
    servers = connect(stub)
    expected = ask(servers)
    before = stub.connections
    loader = torch.utils.data.DataLoader(Rows(servers), num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        closing_s = torch.cat(list(loader))
        assert len(closing_s) == 8
        assert closing_s.max() < 3  # nothing waits for the parent's thread, which is not there
        assert ask(servers) == expected
    assert stub.connections == before
    assert servers.counts.retries == 0


class Rows(torch.utils.data.Dataset):
    """Rows in a process that has servers, collects its garbage and closes what it has."""

    def __init__(self, servers):
        self.servers = servers

    def __len__(self):
        return 8

    def __getitem__(self, index):
        gc.collect()
        began = time.monotonic()
        if index == 7:
            self.servers.close()
        return time.monotonic() - began


def test_a_forked_process_may_ask_over_connections_of_its_own(stub, connect):
    servers = connect(stub)
    expected = ask(servers)
    before = stub.connections
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        right = False
        try:
            right = ask(servers) == expected
            servers.close()
        finally:
            os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert stub.connections == before + 1
    assert ask(servers) == expected
    assert stub.connections == before + 1
