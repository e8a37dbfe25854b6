"""A trainer whose teacher is behind a socket: asking ahead changes nothing but the waiting."""

import time

import pytest
import torch
from transformers import TrainerCallback

from kdtrain.teachers import ServedTeacher
from kdtrain.teachers.served.http import Servers
from tests import tiny
from tests.stub_server import StubServer
from tests.test_trainer import make_trainer
from tests.test_trainer_read_ahead import SEED


@pytest.fixture
def server():
    with StubServer(tiny.make_qwen3(seed=2, hidden=48)) as server:
        yield server


def train(folder, server, lookahead, rows=tiny.CHATS, top_k=320, callbacks=(), writes_targets=False, **kwargs):
    """The records and weights of a run."""
    servers = Servers([server.url], timeout_s=30.0, max_retries=0)
    teacher = ServedTeacher(
        servers, model="teacher", vocab_size=320, top_k=top_k, route="prompt_logprobs", lookahead=lookahead
    )
    teacher.writes_targets = writes_targets
    extra = {"teacher": teacher, "callbacks": list(callbacks), "eval_dataset": rows[:2]}
    try:
        trainer = make_trainer(folder, rows=rows, extra=extra, seed=SEED, **kwargs)
        trainer.train()
    finally:
        teacher.close()
    return trainer.state.log_history, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class Begin(TrainerCallback):
    """Forgets what was asked before the first step: checks ask too."""

    def __init__(self, server):
        self.server = server

    def on_train_begin(self, args, state, control, **_):
        self.server.requests.clear()


@pytest.mark.slow
@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_training_is_the_same_however_far_it_asks_ahead_and_no_row_is_asked_about_twice(tmp_path, server, lmbda):
    """Two epochs of three windows; evaluations in between."""
    results, asked = [], []
    for lookahead in (0, 1, 2):
        options = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "lmbda": lmbda, "sft_alpha": 0.3}
        results.append(train(tmp_path, server, lookahead, callbacks=[Begin(server)], **options))
        asked.append(sorted(tuple(ids) for request in server.requests for ids in request.body["prompt"]))
    assert all(torch.equal(weights, results[0][1]) for _, weights in results)
    losses = [[(r.get("loss"), r.get("eval_loss")) for r in records] for records, _ in results]
    assert losses[0] == losses[1] == losses[2]
    trained = 6 * 2 + 3 * 2  # rows of the steps and of the evaluations
    assert len(asked[0]) == trained
    # A row of an evaluation that is on its way for training is not asked about again.
    assert set(asked[0]) == set(asked[1]) == set(asked[2])
    assert all(len(found) <= trained for found in asked)


@pytest.mark.slow
def test_answers_that_are_kept_to_be_looked_at_are_not_asked_about_twice(tmp_path, server):
    asked = {}
    for every in (None, 1):
        options = {"max_steps": 4, "lmbda": 0.5, "log_completions_steps": every}
        weights = train(tmp_path, server, 2, callbacks=[Begin(server)], **options)[1]
        rows = sorted(tuple(ids) for request in server.requests for ids in request.body["prompt"])
        asked[every] = rows, weights.tolist()
    assert asked[None] == asked[1]


class Sleep(TrainerCallback):
    """Makes a step last, once it has its targets."""

    def on_pre_optimizer_step(self, args, state, control, **_):
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("lookahead", "waits"), [(2, False), (0, True)])
def test_replies_that_take_50_ms_are_not_waited_for_by_steps_of_200(tmp_path, server, lookahead, waits):
    """From the second window of an epoch: nobody asks ahead for the first one."""
    server.delay_s = 0.05
    shown = {"max_steps": 8, "logging_first_step": True, "logging_steps": 8}
    rows = [{"prompt": f"What is {i}?", "completion": " the path of the file" * 8} for i in range(16)]
    records, _ = train(tmp_path, server, lookahead, rows, 8, [Sleep()], **shown)
    fractions = [record["teacher_wait_fraction"] for record in records if "loss" in record]
    print(f"lookahead {lookahead}: {fractions}")
    assert fractions[0] > 0.05
    assert (fractions[1] > 0.05) == waits


@pytest.mark.slow
def test_the_time_in_which_the_teacher_writes_is_waited(tmp_path, server):
    """Targets come with the answers: nothing else is asked of the server."""
    server.delay_s = 0.3
    options = {"seq_kd": True, "lmbda": 0.0, "max_new_tokens": 4, "max_steps": 2, "logging_steps": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1}  # which leaves the model in evaluation mode
    records, _ = train(tmp_path, server, 0, writes_targets=True, **options)
    fractions = [record["teacher_wait_fraction"] for record in records if "loss" in record]
    assert min(fractions) > 0.3
