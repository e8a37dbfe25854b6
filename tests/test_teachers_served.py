"""A teacher on a server: what it is asked, when, and that its targets are those of the same model in this process."""

import dataclasses
import itertools
import random
import threading
import time

import httpx2
import pytest
import torch

from kdtrain.data.batch import Batch, TeacherTokens
from kdtrain.errors import PreflightError, TeacherError
from kdtrain.losses import TopKLogprobs
from kdtrain.teachers import ServedTeacher, Targets, Teacher
from kdtrain.teachers.served.http import Servers
from kdtrain.teachers.served.replies import read_scores, scoring_payload
from kdtrain.teachers.served.server import strict_json
from kdtrain.teachers.served.teacher import rows_to_score
from tests import tiny
from tests.stub_server import StubServer
from tests.test_trainer import make_batch, make_trainer

V, K = 320, 8


@pytest.fixture(scope="module")
def model():
    return tiny.make_qwen3(seed=2, hidden=48)


@pytest.fixture
def server(model):
    with StubServer(model) as server:
        yield server


@pytest.fixture
def connect(server):
    """Makes teachers on the stub."""
    made = []

    def connect(*urls, top_k=K, route="prompt_logprobs", lookahead=2, vocab_size=V, **options):
        servers = Servers(urls or [server.url], **{"timeout_s": 30.0, "max_retries": 0, **options})
        names = {"model": "teacher", "vocab_size": vocab_size, "top_k": top_k, "route": route}
        made.append(ServedTeacher(servers, **names, lookahead=lookahead))
        return made[-1]

    yield connect
    for teacher in made:
        teacher.close()


def rows_of(*lengths, seed=0):
    """Rows of (ids, which of them are supervised); never the first."""
    choose = random.Random(seed)
    return [
        ([choose.randrange(V) for _ in range(n)], [t > 0 and choose.random() < 0.6 for t in range(n)]) for n in lengths
    ]


def as_batch(rows, side="right", pad=3):
    """Padded on a side with a token that is not supervised, as user's collators do on either."""
    width = max(len(ids) for ids, _ in rows)

    def padded(values, filler):
        fill = [filler] * (width - len(values))
        return fill + values if side == "left" else values + fill

    labels = [
        [token if trained else -100 for token, trained in zip(ids, supervised, strict=True)] for ids, supervised in rows
    ]
    inputs = {
        "input_ids": torch.tensor([padded(ids, pad) for ids, _ in rows]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
    }
    return Batch(model_inputs=inputs, labels=torch.tensor([padded(row, -100) for row in labels]))


def in_process(model, rows):
    """[S, V]: of each row alone, what the tokens before a supervised one say of it; by a loop over positions."""
    found = []
    for ids, supervised in rows:
        with torch.no_grad():
            logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [logprobs_TV[t - 1] for t in range(1, len(ids)) if supervised[t]]
    return torch.stack(found) if found else torch.zeros(0, V)


def assert_targets(targets, expected_SV, k=K):
    values, ids = expected_SV.topk(k)
    assert targets.covered_S is None
    assert torch.equal(targets.scores.indices, ids)
    torch.testing.assert_close(targets.scores.logprobs, values, atol=1e-5, rtol=0)


def sent(server):
    """The rows that the server was asked about, in the order in which they came."""
    return [ids for request in server.asked("/completions") for ids in request.body["prompt"]]


# ---- what is asked and what comes of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_targets_are_those_of_the_model_at_the_supervised_positions_in_their_order(connect, model, route, side):
    rows = rows_of(12, 30, 7, 21)
    batch = as_batch(rows, side)
    teacher = connect(route=route)
    teacher.prepare([batch])
    targets = teacher.targets(batch)
    assert_targets(targets, in_process(model, rows))
    assert len(targets.scores.indices) == len(batch.labels_S)
    assert targets.scores.logprobs.dtype == torch.float32


def test_padding_and_what_stands_behind_the_last_supervised_token_is_not_sent(connect, server):
    ids = [5, 6, 7, 8, 9, 10]
    rows = [(ids, [False, False, True, False, False, False]), (ids, [False] * 5 + [True])]
    for side in ("left", "right"):
        connect().targets(as_batch(rows, side))
    assert sorted(sent(server)) == [[5, 6, 7], [5, 6, 7], ids, ids]


def test_a_server_without_prompt_logprobs_that_has_echo_gives_the_same_targets(model):
    rows = rows_of(9, 17)
    with StubServer(model, prompt_logprobs=False) as server:
        teacher = ServedTeacher(Servers([server.url]), model="teacher", vocab_size=V, top_k=K, route="echo")
        assert_targets(teacher.targets(as_batch(rows)), in_process(model, rows))
        teacher.close()


def test_a_teacher_that_reads_another_text_is_asked_about_that_one(connect, model, server):
    """Its prompt is longer; the answer's tokens, and their order, are the student's."""
    rows = [([7, 8, 20, 21], [False, False, True, True]), ([9, 30], [False, True])]
    longer = [([1, 2, *ids], [False, False, *supervised]) for ids, supervised in rows]
    of_teacher = as_batch(longer)
    tokens = TeacherTokens(**of_teacher.model_inputs, labels=of_teacher.labels)
    batch = dataclasses.replace(as_batch(rows), teacher_tokens=tokens)
    assert_targets(connect().targets(batch), in_process(model, longer))
    assert sorted(sent(server)) == [[1, 2, 7, 8, 20, 21], [1, 2, 9, 30]]


def test_rows_without_supervised_tokens_are_not_asked_about(connect, model, server):
    rows = [([5, 6, 7], [False] * 3), *rows_of(9), ([8, 9], [False] * 2)]
    teacher = connect()
    teacher.prepare([as_batch(rows), as_batch(rows[:1])])
    assert_targets(teacher.targets(as_batch(rows)), in_process(model, rows))
    empty = teacher.targets(as_batch(rows[:1])).scores
    assert tuple(empty.indices.shape) == tuple(empty.logprobs.shape) == (0, K)
    assert len(sent(server)) == 1


@pytest.mark.parametrize("top_k", [V, 4 * V])
def test_no_more_tokens_are_asked_for_than_there_are(connect, model, server, top_k):
    """vLLM's engine dies of more."""
    rows = rows_of(6)
    teacher = connect(top_k=top_k)
    assert teacher.targets(as_batch(rows)).scores.indices.shape[1] == V
    assert server.requests[0].body["prompt_logprobs"] == V
    assert teacher.targets(as_batch([([5, 6], [False] * 2)])).scores.indices.shape == (0, V)


def test_a_batch_without_a_mask_has_no_padding(connect, model):
    rows = rows_of(9, 9)
    batch = as_batch(rows)
    batch = dataclasses.replace(batch, model_inputs={"input_ids": batch.model_inputs["input_ids"]})
    assert_targets(connect().targets(batch), in_process(model, rows))


# ---- how often -------------------------------------------------------------------------------------------------------


def test_each_row_is_asked_about_once_in_a_window(connect, model, server):
    rows = rows_of(8, 11, 14)
    batches = [as_batch(rows[:2]), as_batch([rows[1], rows[2], rows[1]]), as_batch(rows[:2])]
    teacher = connect()
    teacher.prepare(batches)
    for batch, of_batch in zip(batches, [rows[:2], [rows[1], rows[2], rows[1]], rows[:2]], strict=True):
        assert_targets(teacher.targets(batch), in_process(model, of_batch))
    assert len(sent(server)) == 3


def test_the_same_tokens_with_other_supervised_ones_are_another_row(connect, model, server):
    ids = list(range(20, 30))
    rows = [(ids, [t in (3, 9) for t in range(10)]), (ids, [t in (5, 9) for t in range(10)])]
    teacher = connect()
    teacher.prepare([as_batch(rows[:1]), as_batch(rows[1:])])
    for row in reversed(rows):
        assert_targets(teacher.targets(as_batch([row])), in_process(model, [row]))
    assert len(sent(server)) == 2


def test_windows_ahead_are_asked_about_at_once_and_evaluations_between_them_repeat_nothing(connect, model, server):
    rows = rows_of(*range(6, 14))
    windows = [[rows[:1], rows[1:2]], [rows[2:3], rows[3:4]], [rows[4:5], rows[5:6]]]
    teacher = connect(lookahead=2)
    for window in windows:
        teacher.prepare([as_batch(of_batch) for of_batch in window])
    for of_batch in windows[0]:
        assert_targets(teacher.targets(as_batch(of_batch)), in_process(model, of_batch))
    for i in range(8):  # of an evaluation: rows that are on their way, and others
        batch = as_batch(rows[i : i + 1])
        teacher.prepare([batch])
        assert_targets(teacher.targets(batch), in_process(model, rows[i : i + 1]))
    asked = len(sent(server))
    assert asked == 10  # eight rows, and the two of the first window again
    for window in windows[1:]:
        for of_batch in window:
            assert_targets(teacher.targets(as_batch(of_batch)), in_process(model, of_batch))
    assert len(sent(server)) == asked


def test_what_a_window_needed_is_forgotten_when_all_its_batches_were_answered(connect, server):
    batches = [as_batch(rows_of(9, seed=seed)) for seed in range(2)]
    teacher = connect()
    for _ in range(3):
        teacher.prepare(batches)
        for batch in batches:
            teacher.targets(batch)
    assert len(sent(server)) == 6
    assert not teacher._windows


def test_windows_that_are_never_asked_for_do_not_pile_up(connect):
    teacher = connect(lookahead=1)
    for seed in range(20):
        teacher.prepare([as_batch(rows_of(6, seed=seed))])
        teacher.prepare([])
    assert len(teacher._windows) == 3


def test_without_being_prepared_it_asks_when_its_targets_are_wanted(connect, model, server):
    rows = rows_of(9, 12)
    teacher = connect()
    for _ in range(2):
        assert_targets(teacher.targets(as_batch(rows)), in_process(model, rows))
    assert len(sent(server)) == 4
    assert not teacher._windows


@pytest.mark.parametrize(("rows", "per_request"), [(3, [1] * 3), (4, [1] * 4), (5, [2, 2, 1]), (13, [4, 4, 4, 1])])
def test_rows_share_a_request_only_where_more_are_asked_than_may_be_in_flight(
    connect, model, server, rows, per_request
):
    of_batch = rows_of(*range(5, 5 + rows))
    teacher = connect(concurrency=4)
    assert_targets(teacher.targets(as_batch(of_batch)), in_process(model, of_batch))
    assert sorted((len(request.body["prompt"]) for request in server.requests), reverse=True) == per_request


def test_rows_are_spread_over_all_servers(connect, model, server):
    rows = rows_of(*range(5, 13))
    with StubServer(model) as other:
        teacher = connect(server.url, other.url, concurrency=4)
        assert_targets(teacher.targets(as_batch(rows)), in_process(model, rows))
        assert (len(sent(server)), len(sent(other))) == (4, 4)


def test_replies_may_come_in_any_order(connect, model, server):
    rows = rows_of(*range(6, 14))
    batches = [as_batch(rows[i : i + 2]) for i in range(0, 8, 2)]
    arrived = []

    def in_reverse(request):
        arrived.append(request)
        time.sleep(0.4 - 0.05 * len(arrived))

    expected = [in_process(model, rows[i : i + 2]) for i in range(0, 8, 2)]
    plain = connect()
    plain.prepare(batches)
    before = [plain.targets(batch).scores for batch in batches]
    server.on_request = in_reverse
    teacher = connect()
    teacher.prepare(batches)
    for batch, logprobs, same in zip(batches, expected, before, strict=True):
        targets = teacher.targets(batch)
        assert_targets(targets, logprobs)
        assert torch.equal(targets.scores.logprobs, same.logprobs)
    assert len(arrived) == 8


def test_it_says_how_long_it_has_waited(connect, server):
    server.delay_s = 0.3
    batch = as_batch(rows_of(9))
    teacher = connect()
    begun = time.perf_counter()
    teacher.prepare([batch])
    assert time.perf_counter() - begun < 0.2  # asking does not wait
    assert teacher.waited_s == 0
    teacher.targets(batch)
    assert 0.2 < teacher.waited_s < 5
    waited = teacher.waited_s
    teacher.prepare([batch])
    time.sleep(0.6)
    teacher.targets(batch)
    assert teacher.waited_s - waited < 0.1


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_request_that_fails_is_an_error_where_its_targets_are_wanted_and_there_alone(connect, model, server):
    good, bad = as_batch([([5, 6, 7], [False, True, True])]), as_batch([([50, 60, 70], [False, True, True])])

    def refuse(request):
        return (400, {}, b'{"error": {"message": "no"}}') if request.body["prompt"][0][0] == 50 else None

    server.on_request = refuse
    teacher = connect()
    teacher.prepare([good, bad])
    teacher.targets(good)
    with pytest.raises(TeacherError, match="400"):
        teacher.targets(bad)


def test_a_reply_that_is_wrong_twice_is_an_error_with_choice_position_and_reason(connect, server):
    def shifted(request, reply):
        scores = reply["choices"][0]["prompt_logprobs"]
        scores[1:] = [*scores[2:], scores[-1]]
        return reply

    server.on_reply = shifted
    with pytest.raises(TeacherError, match=r"choice 0, position 1 of 9: token .*, which was sent there, is not among"):
        connect().targets(as_batch([(list(range(40, 49)), [False] + [True] * 8)]))
    assert len(server.requests) == 2


def test_a_reply_that_is_wrong_once_is_asked_for_again(connect, model, server):
    replies = []

    def first_is_cut(request, reply):
        replies.append(reply)
        if len(replies) == 1:
            reply["choices"][0]["prompt_logprobs"].pop()
        return reply

    server.on_reply = first_is_cut
    rows = rows_of(12)
    assert_targets(connect().targets(as_batch(rows)), in_process(model, rows))


def test_ids_that_the_student_does_not_have_are_refused(connect, server):
    with pytest.raises(TeacherError, match="a token id is not below 100, the size of the vocabulary"):
        connect(vocab_size=100).targets(as_batch([(list(range(40, 49)), [False] + [True] * 8)]))


def test_without_a_route_it_cannot_be_asked(connect):
    with pytest.raises(PreflightError, match="not known how this server scores tokens"):
        connect(route=None).prepare([as_batch(rows_of(5))])


def with_inputs(batch, **inputs):
    return dataclasses.replace(batch, model_inputs={**batch.model_inputs, **inputs})


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "A batch has images"),
        ({"position_ids": torch.arange(9)[None]}, "carry position_ids, which cannot be sent"),
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, r"wants? an attention_mask|attention_mask \[B, T\]"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]])}, "hides tokens within a row"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1]])}, "hides tokens within a row"),
    ],
)
def test_batches_that_a_server_would_read_in_another_way_are_refused(connect, server, inputs, reason):
    batch = as_batch([(list(range(40, 49)), [False] + [True] * 8)])
    with pytest.raises(PreflightError, match=reason):
        connect().prepare([with_inputs(batch, **inputs)])
    assert not server.requests


def test_what_is_waited_for_when_it_is_closed_is_an_error_and_no_thread_is_left(connect, server):
    server.delay_s = 30
    teacher = connect()
    batch = as_batch(rows_of(9))
    teacher.prepare([batch])
    closing = threading.Timer(0.3, teacher.servers.close)
    closing.start()
    with pytest.raises(TeacherError, match="closed before it had answered"):
        teacher.targets(batch)
    closing.join()
    teacher.close()
    teacher.close()
    assert not [thread for thread in threading.enumerate() if "teacher" in thread.name]


# ---- the loss: K = V is the model in this process --------------------------------------------------------------------


class TopKOfModel(Teacher):
    """The same targets from a model in this process."""

    def __init__(self, model, k):
        self.model, self.k, self.vocab_size = model.eval(), k, model.config.vocab_size

    def targets(self, batch):
        with torch.no_grad():
            logits_BTV = self.model(**batch.teacher_inputs).logits[:, :-1]
        logprobs, indices = logits_BTV[batch.predicts_BT].log_softmax(-1).topk(self.k)
        return Targets(TopKLogprobs(indices, logprobs))


@pytest.mark.parametrize(
    "options", [*map(tiny.slow, ({"beta": 0.0}, {"beta": 0.5}, {"beta": 1.0})), {"beta": 0.5, "kd_temperature": 2.0}]
)
@pytest.mark.parametrize("route", ["prompt_logprobs", "echo"])
def test_with_all_tokens_named_loss_and_gradient_are_those_of_the_model_in_process(
    tmp_path, connect, model, route, options
):
    results = []
    for extra in ({"teacher": connect(top_k=V, route=route)}, {"teacher_model": model}):
        student = tiny.make_qwen3(seed=1)
        given = extra.pop("teacher_model", None)
        trainer = make_trainer(tmp_path, student, given, sft_alpha=0.3, extra=extra, **options)
        loss = trainer.compute_loss(student, make_batch(trainer))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])))
    (served, served_gradient), (dense, dense_gradient) = results
    assert dense > 0.01
    assert served == pytest.approx(dense, rel=1e-5)
    assert (served_gradient - dense_gradient).norm() <= 1e-4 * dense_gradient.norm()


def train(folder, teacher=None, model=None, steps=4, **kwargs):
    """Losses of a training, and the weights after it."""
    extra = {"extra": {"teacher": teacher, "eval_dataset": tiny.CHATS[:3]}} if teacher is not None else {}
    trainer = make_trainer(folder, tiny.make_qwen3(seed=1), model, max_steps=steps, **extra, **kwargs)
    trainer.alignment_checked = True  # which asks about a few rows as well
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("k", [K, tiny.slow(V)])
def test_a_training_with_accumulation_and_evaluations_is_that_of_the_same_targets_in_process(
    tmp_path, connect, model, server, k
):
    options = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "steps": 5, "learning_rate": 1e-3,
        "eval_strategy": "steps", "eval_steps": 2, "sft_alpha": 0.3,
    }  # fmt: skip
    teacher = connect(top_k=k)
    losses, weights = train(tmp_path, teacher, **options)
    expected, expected_weights = train(tmp_path, TopKOfModel(model, k), **options)
    assert losses == pytest.approx(expected, rel=1e-4)
    # AdamW turns rounding of a gradient near 0 into a step of the learning rate.
    assert (weights - expected_weights).norm() <= 1e-3 * (expected_weights - initial_weights()).norm()
    # Rows of the steps and of three evaluations; some of these are on their way for a step that comes.
    assert 5 * 2 < len(sent(server)) <= 5 * 2 + 3 * 3


def initial_weights():
    return torch.cat([p.detach().flatten() for p in tiny.make_qwen3(seed=1).parameters()])


def train_on_ranks(folder, url, ranks):
    teacher = ServedTeacher(Servers([url]), model="teacher", vocab_size=V, top_k=K, route="prompt_logprobs")
    losses, weights = train(
        folder, teacher, per_device_train_batch_size=4 // ranks, learning_rate=0.1, optim="sgd", steps=3,
        train_sampling_strategy="sequential", max_grad_norm=1e9,
    )  # fmt: skip
    teacher.close()
    return losses, weights.tolist()


def test_two_ranks_ask_for_their_own_rows_and_train_as_one(tmp_path, server):
    expected, weights = train_on_ranks(tmp_path, server.url, 1)
    asked = sorted(sent(server))
    server.requests.clear()
    for losses, found in tiny.run_ranks(train_on_ranks, 2, tmp_path, server.url, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert found == pytest.approx(weights, rel=1e-4, abs=1e-6)
    # With windows asked for ahead, one process has rows on their way that a rank alone has not.
    assert {tuple(ids) for ids in sent(server)} == {tuple(ids) for ids in asked}
    assert len(asked) <= len(sent(server)) <= 3 * 4


# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("lookahead", "k"), [(2, 64), (2, 4), (0, 4)])
def test_windows_asked_for_ahead_hide_replies_of_50_ms_behind_steps_of_200(connect, server, lookahead, k):
    """2 rows of 512 tokens a step, as the trainer asks. Asked for when they train, they are waited for."""
    server.restart(tiny.make_qwen3(seed=2, max_position_embeddings=1024))
    windows = [[as_batch(rows_of(512, 512, seed=seed))] for seed in range(8)]
    replies = {}
    for (batch,) in windows:  # made before: the stub's model and its JSON are no part of a server's 50 ms
        for row in rows_to_score(batch):
            reply = httpx2.post(
                server.url + "/completions", json=scoring_payload("prompt_logprobs", "teacher", [row], k)
            )
            replies[row.ids] = (200, {"Content-Type": "application/json"}, reply.content)
    begun = time.perf_counter()
    for row in rows_to_score(windows[0][0]):
        read_scores("prompt_logprobs", strict_json(replies[row.ids][2]), [row], k, V)
    reading = time.perf_counter() - begun
    if reading > 0.12:
        pytest.skip(f"reading the replies of a step takes {reading:.2f} s: this machine is too busy to tell")
    server.on_request = lambda request: replies[tuple(request.body["prompt"][0])]
    server.delay_s = 0.05
    teacher = connect(lookahead=lookahead, top_k=k)
    steps, ahead = [], iter(windows)
    for later in itertools.islice(ahead, lookahead):
        teacher.prepare(later)
    for window in windows:
        begun, waited = time.perf_counter(), teacher.waited_s
        for later in itertools.islice(ahead, 1):
            teacher.prepare(later)
        for batch in window:
            teacher.targets(batch)
        time.sleep(0.2)
        steps.append((teacher.waited_s - waited, time.perf_counter() - begun))
    waited, took = (sum(column) for column in zip(*steps[1:], strict=True))
    print(f"lookahead {lookahead}, k = {k}: waited {waited / took:.1%} of {took:.2f} s")
    assert (waited < 0.05 * took) == (lookahead > 0), steps
