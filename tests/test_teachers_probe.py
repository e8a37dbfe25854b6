"""A server that lies is found out before a step is taken on its answers, and one that does not is left alone."""

import functools
import json
import logging

import datasets
import pytest
import torch

from kdtrain.data import Collator
from kdtrain.errors import PreflightError, TeacherError
from kdtrain.losses import TopKLogprobs
from kdtrain.preflight.server import check_server, rows_to_ask_about
from kdtrain.teachers.served.http import Servers
from kdtrain.teachers.served.probe import probe
from kdtrain.teachers.served.probing.figures import difference, sampling_fit
from kdtrain.teachers.served.teacher import ServedTeacher
from tests import test_teachers_served_images as images
from tests import tiny, tiny_processors
from tests.stub_server import StubServer
from tests.vision_stub import VisionStub

ROUTES = ("prompt_logprobs", "echo")
K = 64


@functools.cache
def model(seed=1):
    return tiny.make_qwen3(seed=seed, hidden=48)


def rows(count=3):
    collate = Collator(tiny.make_tokenizer())
    return [collate([chat]).model_inputs["input_ids"][0].tolist() for chat in tiny.CHATS[:count]]


def teacher_on(*servers, k=K, **options):
    given = {"model": "teacher", "vocab_size": 320, "top_k": k, **options}
    return ServedTeacher(Servers([server.url for server in servers], max_retries=0, timeout_s=20), **given)


def probed(*servers, k=K, scores=True, writes=False, ids=None, tokenizer=None, **options):
    teacher = teacher_on(*servers, k=k, **options)
    try:
        return probe(teacher, ids or rows(), tokenizer or tiny.make_tokenizer(), scores=scores, writes=writes)
    finally:
        teacher.close()


def said(result, level):
    return [finding for finding in result.findings if finding.level == level]


# ---- servers that lie ------------------------------------------------------------------------------------------------


class Shifted(StubServer):
    """Every distribution stands one position too late, at its tokens' names: the ids are all right."""

    def _logprobs(self, ids):
        return super()._logprobs(ids)[[0, *range(len(ids) - 1)]]


class Early(StubServer):
    """… or one too early: it has read the token that it is about."""

    def _logprobs(self, ids):
        return super()._logprobs(ids)[[*range(1, len(ids)), -1]]


class Shuffled(StubServer):
    """Rows that share a request get the answers of others, at their own tokens' names."""

    def _complete(self, body):
        self.several = len(self._prompts(body["prompt"])) > 1
        return super()._complete(body)

    def _logprobs(self, ids):
        return super()._logprobs(ids[::-1] if self.several else ids)


class Tempered(StubServer):
    """What is reported is softer, or sharper, than what is drawn by."""

    temperature, reporting = 2.0, False

    def _scores(self, *args):
        self.reporting = True
        found = super()._scores(*args)
        self.reporting = False
        return found

    def _logprobs(self, ids):
        true = super()._logprobs(ids)
        return torch.log_softmax(true / self.temperature, -1) if self.reporting else true


class Sharpened(Tempered):
    temperature = 0.6


class Renormalised(StubServer):
    """What it reports is normalised over the tokens that it names, so that nothing is left for the others."""

    def _scores(self, ids, positions, k):
        found = super()._scores(ids, positions, k)
        for at in found:
            named = sorted((entry["logprob"] for entry in at.values()), reverse=True)[:k]
            rest = float(torch.logsumexp(torch.tensor(named), 0))
            for entry in at.values():
                entry["logprob"] -= rest
        return found


class Processed(StubServer):
    """What stands beside an answer is at the temperature that it was written at: vLLM's processed_logprobs."""

    def _choice(self, body, ids):
        self.temperature, self.prompt_length = body.get("temperature", 1.0), len(ids)
        return super()._choice(body, ids)

    def _scores(self, ids, positions, k):
        found = super()._scores(ids, positions, k)
        if positions and positions.start >= self.prompt_length:
            for at in found:
                values = torch.tensor([entry["logprob"] for entry in at.values()]) / self.temperature
                rest = torch.logsumexp(values, 0) if self.temperature != 1 else 0.0
                for entry, value in zip(at.values(), (values - rest).tolist(), strict=True):
                    entry["logprob"] = value
        return found


class Stale(StubServer):
    """A prefix cache that answers for what was asked before."""

    def _logprobs(self, ids):
        self.cache = getattr(self, "cache", {})
        return self.cache.setdefault((len(ids), tuple(ids[:8])), super()._logprobs(ids))


class Forgetful(StubServer):
    """Another answer each time."""

    def _logprobs(self, ids):
        true = super()._logprobs(ids)
        return torch.log_softmax(true + torch.randn(true.shape), -1)


def each_position(change):
    """A lie about what stands at every position, by either route."""

    def on_reply(request, reply):
        for choice in reply.get("choices", []) if request.path.endswith("/completions") else []:
            for at in choice.get("prompt_logprobs") or []:
                if at:
                    values = {name: entry["logprob"] for name, entry in at.items()}
                    kept = change(values)
                    for name in list(at):
                        if name in kept:
                            at[name]["logprob"] = kept[name]
                        else:
                            del at[name]
            tops = (choice.get("logprobs") or {}).get("top_logprobs") or []
            for number, at in enumerate(tops):
                tops[number] = at and change(at)
        return reply

    return {"on_reply": on_reply}


def each_list(change):
    """A lie about the positions of a prompt."""

    def on_reply(request, reply):
        for choice in reply.get("choices", []):
            if choice.get("prompt_logprobs"):
                choice["prompt_logprobs"] = change(choice["prompt_logprobs"])
            logprobs = choice.get("logprobs") or {}
            for name in ("tokens", "token_logprobs", "top_logprobs"):
                if logprobs.get(name) and request.body.get("echo"):
                    logprobs[name] = change(logprobs[name])
        return reply

    return {"on_reply": on_reply}


def without_the_last_two(values):
    return {name: values[name] for name in list(values)[:-2]}  # the one that was sent stands first


def half_the_body(request):
    if request.path.endswith("/completions"):
        return 200, {"Content-Type": "application/json"}, b'{"choices": [{"index": 0, "prompt_logpr'
    return None


def foreign():
    tokenizer = tiny.make_tokenizer(290)
    return tokenizer


# Lie -> the server's class, its options, and a word of what is said.
LIES = {
    "shifted by one": (Shifted, {}, "those of the token before"),
    "shifted by one, the other way": (Early, {}, "of the token after"),
    "positions shifted": (StubServer, each_list(lambda at: [at[0], *at[2:], at[-1]]), "which was sent|read another"),
    "shuffled": (Shuffled, {}, "rows that share its request"),
    "temperature applied": (Tempered, {}, "does not draw by the log-probabilities"),
    "temperature applied, the other way": (Sharpened, {}, "does not draw by the log-probabilities"),
    "top-k cut": (StubServer, each_position(without_the_last_two), f"fewer than the {K} most likely"),
    "mass over 1": (
        StubServer,
        each_position(lambda at: {name: min(value + 0.7, 0.0) for name, value in at.items()}),
        "add up to more than 1|not one of|differ for the token",
    ),
    "normalised over the k alone": (Renormalised, {}, "add up to more than 1"),
    "foreign tokenizer": (StubServer, {"tokenizer": foreign()}, "another tokenizer than the student"),
    "stale cache": (Stale, {}, "come from a cache"),
    "NaN": (StubServer, each_position(lambda at: dict.fromkeys(at, float("nan"))), "NaN|not a number|no JSON"),
    "truncated": (StubServer, each_list(lambda at: at[:-1]), "positions for"),
    "truncated JSON": (StubServer, {"on_request": half_the_body}, "JSON"),
    "another answer each time": (Forgetful, {}, "asked for twice"),
}


def by_one_route(names):
    """Each by one of the routes, and by the other in the slow tests."""
    quick = [(name, ROUTES[number % len(ROUTES)]) for number, name in enumerate(names)]
    return [*quick, *(tiny.slow(name, route) for name in names for route in ROUTES if (name, route) not in quick)]


@pytest.mark.parametrize(("lie", "route"), by_one_route(LIES))
def test_a_lie_is_found_before_a_step(lie, route, caplog):
    kind, options, word = LIES[lie]
    with kind(model(), **{"tokenizer": tiny.make_tokenizer(), "prompt_logprobs": route != "echo", **options}) as server:
        teacher = teacher_on(server)
        try:
            with caplog.at_level(logging.WARNING, "kdtrain"):
                check_server(teacher, rows(), tiny.make_tokenizer(), scores=True, writes=False)
            found = caplog.text  # by echo, a server that draws otherwise than it reports is a warning
        except PreflightError as error:
            found = str(error)
        finally:
            teacher.close()
    assert any(one in found for one in word.split("|")), found
    assert len(server.requests) < 40


def test_strings_in_place_of_ids_are_found():
    with StubServer(model(), tiny.make_tokenizer(), token_ids=False, prompt_logprobs=False) as server:
        (error,) = said(probed(server), "error")
    assert "no usable log-probabilities" in error.message
    assert "given as text, which does not tell their ids" in error.message
    assert "rlhf.llm_kd_weight: 0" in error.hint


def test_another_model_after_a_restart_is_found():
    with StubServer(model(), tiny.make_tokenizer()) as server:
        teacher = teacher_on(server)
        check_server(teacher, rows(), tiny.make_tokenizer(), scores=True, writes=False)
        batch = Collator(tiny.make_tokenizer())(tiny.CHATS[3:5])
        teacher.targets(batch)
        server.restart()
        other = Collator(tiny.make_tokenizer())(tiny.CHATS[4:6])
        teacher.targets(other)  # the same model
        server.restart(model(seed=7))
        with pytest.raises(TeacherError, match="answers otherwise than when the run began"):
            teacher.targets(Collator(tiny.make_tokenizer())(tiny.CHATS[:2]))
        teacher.close()


@pytest.mark.parametrize("blind", [False, True])
def test_a_server_that_does_not_look_at_images_is_found(tmp_path, blind):
    processor = tiny_processors.make_llava()
    vlm = tiny_processors.make_llava_model(len(processor.tokenizer)).eval()
    batch = images.make_batch(processor, tmp_path, images.ROWS)
    texts = [row[row != -100].tolist() * 3 for row in batch.labels]
    with VisionStub(vlm, processor, blind=blind) as server:
        teacher = teacher_on(server, k=8, vocab_size=len(processor.tokenizer))
        result = probe(teacher, texts, processor.tokenizer, scores=True, image_row=images.image_row(batch))
        teacher.close()
    assert ("The image of a row is seen" in [finding.message for finding in result.findings]) is not blind
    assert [error.message[:34] for error in said(result, "error")] == ["The server does not look at images"] * blind


# ---- servers that do not ---------------------------------------------------------------------------------------------


class Padded(StubServer):
    """Its head has columns beyond the tokenizer's, which training has made impossible."""

    def _logprobs(self, ids):
        return torch.nn.functional.pad(super()._logprobs(ids), (0, 64), value=-80.0)


class Noisy(StubServer):
    def _logprobs(self, ids):
        true = super()._logprobs(ids)
        return torch.log_softmax(true + 1e-3 * torch.randn(true.shape), -1)


def in_any_order(request, reply):
    for choice in reply.get("choices", []):
        entries = choice.get("prompt_logprobs") or []
        choice["prompt_logprobs"] = [at and dict(sorted(at.items())) for at in entries] or None
        logprobs = choice.get("logprobs") or {}
        if logprobs.get("top_logprobs"):
            logprobs["top_logprobs"] = [at and dict(sorted(at.items())) for at in logprobs["top_logprobs"]]
    if "choices" in reply:
        reply["choices"].reverse()
    return reply


def more_fields(request, reply):
    for choice in reply.get("choices", []):
        choice |= {"matched_stop": None, "weights_version": "default", "hidden_states": []}
    return {**reply, "service_tier": None, "kv_transfer_params": None}


HONEST = {
    "as it is": (StubServer, {}, {}),
    "k is the vocabulary": (StubServer, {}, {"k": 320}),
    "k above the vocabulary": (StubServer, {}, {"k": 1000}),
    "k is 1": (StubServer, {}, {"k": 1}),
    "a word at the edge of the vocabulary": (
        StubServer,
        {},
        {"ids": [[319, 0, 319, 5, 319, 318, 0, 317] * 3, *rows()[:2]]},
    ),
    "a padded vocabulary": (Padded, {}, {}),
    "rounding": (Noisy, {}, {}),
    "entries and choices in any order": (StubServer, {"on_reply": in_any_order}, {}),
    "more fields": (StubServer, {"on_reply": more_fields}, {}),
    "slow": (StubServer, {"delay_s": 0.05}, {}),
    "one row": (StubServer, {}, {"ids": rows()[:1]}),
}


@pytest.mark.parametrize(("name", "route"), by_one_route(HONEST))
def test_nothing_is_found_where_nothing_is_wrong(name, route):
    kind, options, asked = HONEST[name]
    with kind(model(), tiny.make_tokenizer(), prompt_logprobs=route != "echo", **options) as server:
        result = probed(server, **asked)
    assert [finding for finding in result.findings if finding.level != "info"] == []
    assert result.route == route
    assert len(server.requests) <= 25
    assert result.writes_targets == (name != "rounding")


def test_what_stands_beside_an_answer_is_no_target_where_it_follows_the_temperature_of_the_answer():
    with Processed(model(), tiny.make_tokenizer()) as server:
        result = probed(server, writes=True)
    assert not result.writes_targets
    assert any("change with the temperature" in finding.message for finding in said(result, "info"))
    assert said(result, "error") == said(result, "warning") == []


@pytest.mark.parametrize("seed", [1, 2])
def test_two_servers_of_one_model_are_fine_and_of_two_models_are_not(seed):
    tokenizer = tiny.make_tokenizer()
    with StubServer(model(), tokenizer) as one, StubServer(model(seed), tokenizer) as other:
        result = probed(one, other)
    errors = said(result, "error")
    assert bool(errors) == (seed == 2)
    assert all("answers otherwise than" in error.message and other.url in error.message for error in errors)


# ---- the rest of what is found out -----------------------------------------------------------------------------------


def test_a_limit_of_the_server_is_named_with_both_ways_out():
    with StubServer(model(), tiny.make_tokenizer(), max_logprobs=20) as server:
        (error,) = said(probed(server), "error")
    assert error.path == ("rlhf", "teacher", "top_k")
    assert "at most 20 tokens" in error.message
    assert error.hint == "start it with --max-logprobs 64, or set rlhf.teacher.top_k: 20"


def test_a_server_that_is_not_there_and_a_model_that_it_does_not_have_are_named():
    with StubServer(model(), tiny.make_tokenizer(), name="other") as server:
        (error,) = probed(server).findings
        assert error.path == ("rlhf", "teacher", "model")
        assert "no model named teacher. It has: other" in error.message
    (error,) = probed(server).findings
    assert error.path == ("rlhf", "teacher", "base_url")
    assert server.url in error.message


def test_what_is_wrong_is_said_once_in_whole_sentences():
    with StubServer(model(), tiny.make_tokenizer(), completions=False) as server:
        teacher = teacher_on(server)
        with pytest.raises(PreflightError) as no_scores:
            check_server(teacher, rows(), tiny.make_tokenizer(), scores=True, writes=False)
    with pytest.raises(PreflightError) as not_there:
        check_server(teacher, rows(), tiny.make_tokenizer(), scores=True, writes=False)
    teacher.close()
    text = str(no_scores.value)
    assert ".." not in text.replace("/..", "")
    assert text.count("status 404") == 1
    assert "By prompt_logprobs and by echo: " in text
    assert text.endswith(
        "Use a vLLM server; or set rlhf.llm_kd_weight: 0, and let this one write answers (answers: teacher)."
    )
    assert str(not_there.value).endswith("Check that the server runs and that rlhf.teacher.base_url is its address.")


@pytest.mark.parametrize(("count", "said"), [(60, "seconds at most"), (60_000_000, "hours at most")])
def test_the_time_of_a_run_is_told_in_units_that_fit_it(count, said):
    with StubServer(model(), tiny.make_tokenizer()) as server:
        teacher = teacher_on(server)
        result = probe(teacher, rows(), tiny.make_tokenizer(), scores=True, tokens=count)
        teacher.close()
    assert any(said in finding.message for finding in result.findings)


def test_a_server_without_completions_writes_answers_to_chats_and_gives_no_targets():
    with StubServer(model(), tiny.make_tokenizer(), completions=False) as server:
        result = probed(server, scores=False, writes=True)
        assert (result.api, result.route, result.writes_targets) == ("chat", None, False)
        assert not said(result, "error")
        assert probed(server, scores=False, writes=True, api="completions").findings[0].level == "error"
        (error,) = said(probed(server), "error")
    assert "no usable log-probabilities" in error.message
    assert "use a vLLM server; or set rlhf.llm_kd_weight: 0" in error.hint


def test_another_chat_template_is_a_warning_that_names_the_end_of_turn():
    other = tiny.make_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_end|>", "<|endoftext|>")
    with StubServer(model(), other) as server:
        (warning,) = said(probed(server), "warning")
    assert "renders chats otherwise" in warning.message
    assert "a turn ends with '<|endoftext|>" in warning.message
    with StubServer(model(), tiny.make_tokenizer()) as server:
        base = tiny.make_tokenizer()
        base.chat_template = None
        (warning,) = said(probed(server, tokenizer=base), "warning")
    assert "a chat teacher of a base student" in warning.message


def test_what_a_server_says_is_shown_without_control_characters():
    def refuse(request):
        if request.path.endswith("/completions"):
            return 400, {}, json.dumps({"error": {"message": "\x1b[31mno\x07"}}).encode()
        return None

    with StubServer(model(), tiny.make_tokenizer(), on_request=refuse) as server:
        result = probed(server)
    assert not any("\x1b" in finding.message or "\x07" in finding.message for finding in result.findings)


def test_the_run_is_set_by_what_was_found(caplog):
    with StubServer(model(), tiny.make_tokenizer(), prompt_logprobs=False) as server:
        teacher = teacher_on(server)
        with caplog.at_level(logging.INFO, "kdtrain"):
            check_server(teacher, rows(), tiny.make_tokenizer(), scores=True, writes=False)
        assert (teacher.route, teacher.api, teacher.writes_targets) == ("echo", "completions", True)
        assert teacher.servers.verify is not None
        assert "Teacher teacher: scored by echo" in caplog.text
        teacher.close()


def _on_two_ranks(url, fails):
    from accelerate import PartialState

    PartialState(cpu=True)
    teacher = ServedTeacher(Servers([url], max_retries=0), model="teacher", vocab_size=320, top_k=500 if fails else 8)
    try:
        check_server(teacher, rows(), tiny.make_tokenizer(), scores=True, writes=False)
    except PreflightError as error:
        return "--max-logprobs" in str(error)
    finally:
        teacher.close()
    return teacher.route, teacher.servers.verify is not None


@pytest.mark.parametrize("fails", [False, True])
def test_one_rank_asks_for_all(fails):
    with StubServer(model(), tiny.make_tokenizer(), max_logprobs=100) as server:
        results = tiny.run_ranks(_on_two_ranks, 2, server.url, fails)
        assert len(server.asked("/models")) == 1
    assert results == [True, True] if fails else [("prompt_logprobs", True)] * 2


def test_rows_are_asked_about_as_the_teacher_reads_them_and_of_those_with_images_the_answers():
    data = datasets.Dataset.from_dict(
        {
            "input_ids": [[1] * 20, [2] * 20, [3] * 40, [4] * 2],
            "labels": [[-100] * 20, [2] * 20, [-100] * 20 + [3] * 20, [4] * 2],
            "teacher_input_ids": [[9] * 20, None, [8] * 40, None],
            "images": [None, None, ["an image"], None],
        }
    )
    assert rows_to_ask_about(data) == [[9] * 20, [2] * 20, [3] * 20]


def test_the_difference_of_answers_counts_by_probability():
    def targets(*rows):
        ids, p = zip(*rows, strict=True)
        return TopKLogprobs(torch.tensor(ids), torch.tensor(p).log())

    one = targets(([1, 2], [0.9, 0.05]))
    assert difference(one, one) == 0
    assert difference(one, targets(([2, 1], [0.05, 0.9]))) == 0
    assert difference(one, targets(([1, 3], [0.9, 0.05]))) == 0  # as unlikely as the least likely that was named
    assert difference(one, targets(([3, 4], [0.9, 0.05]))) == pytest.approx(0.9 * torch.tensor(18.0).log().item())


@pytest.mark.parametrize("k", [4, 32, 300])
@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 1.25, 2.0])
def test_what_is_drawn_tells_the_temperature_that_it_was_drawn_at(temperature, k):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 300, generator=generator)
    drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
    logprobs, ids = torch.log_softmax(logits, -1).topk(k)
    fit = sampling_fit(TopKLogprobs(ids, logprobs), drawn)
    assert fit.tokens == 400
    if temperature == 1:
        assert abs(fit.z) < 3
    else:
        assert abs(fit.z) > 4
        assert (fit.z > 0) == (temperature > 1)


def test_what_is_drawn_tells_that_nothing_was_left_for_the_tokens_that_are_not_named():
    torch.manual_seed(0)
    known = torch.randn(200, 64).log_softmax(-1)
    drawn = torch.multinomial(torch.cat([known.exp() * 0.9, torch.full((200, 1), 0.1)], 1), 1)[:, 0].tolist()
    fit = sampling_fit(TopKLogprobs(torch.arange(64).expand(200, -1).contiguous(), known), drawn)
    assert fit.z > 7
