"""Against a real vLLM server: its log-probabilities, and what is trained on them, are those of the model in process.

Run by `make test-server`; left out elsewhere.
"""

import random
import time

import pytest
import torch
from safetensors.torch import load_file

import kdtrain
from kdtrain.data.batch import Batch
from kdtrain.teachers import ServedTeacher
from kdtrain.teachers.served.http import Servers
from tests import tiny, vllm_server
from tests.test_trainer import make_trainer

pytestmark = pytest.mark.server
V = 320
ROUTES = ("prompt_logprobs", "echo")


@pytest.fixture(scope="session")
def model():
    return tiny.make_qwen3(seed=2, hidden=64, head_dim=32).eval()


@pytest.fixture(scope="session")
def url(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    with vllm_server.running(tiny.save_model(model, tokenizer, folder / "model"), folder / "server.log") as url:
        yield url


@pytest.fixture
def connect(url):
    made = []

    def connect(top_k, route, **options):
        servers = Servers([url], timeout_s=120, max_retries=0, **options)
        made.append(ServedTeacher(servers, model="teacher", vocab_size=V, top_k=top_k, route=route))
        return made[-1]

    yield connect
    for teacher in made:
        teacher.close()


@pytest.fixture
def say(capsys):
    """Print a figure that is to be seen."""

    def say(text):
        with capsys.disabled():
            print(f"\n    {text}")

    return say


def some_batch(lengths, seed=0):
    """Rows of random tokens, padded on the right, with about half of the tokens supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    supervised = mask & (torch.rand(ids.shape, generator=generator) < 0.5)
    supervised[:, 0] = False
    return Batch(
        model_inputs={"input_ids": ids.where(mask, 3), "attention_mask": mask.long()},
        labels=ids.where(supervised, -100),
    )


def in_process(model, batch):
    """[S, V], of each row alone."""
    found = []
    for ids, mask, labels in zip(*batch.model_inputs.values(), batch.labels, strict=True):
        with torch.no_grad():
            logprobs_TV = model(input_ids=ids[mask.bool()][None]).logits[0].log_softmax(-1)
        found += [logprobs_TV[t - 1] for t in range(1, len(labels)) if labels[t] != -100]
    return torch.stack(found)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("k", [1, 64])
def test_log_probabilities_are_those_of_the_model_in_process(connect, model, say, route, k):
    batch = some_batch([5, 250, 33, 120, 2, 64, 250, 90, 17, 200])  # more rows than requests at a time
    targets = connect(k, route).targets(batch).scores
    expected_SV = in_process(model, batch)
    values, ids = expected_SV.topk(k)
    of_ids = expected_SV.gather(1, targets.indices)
    worst = max(float((targets.logprobs - one).abs().max()) for one in (values, of_ids))
    same = float((targets.indices == ids).float().mean())
    say(f"{route}, k = {k}: {len(values)} positions, largest difference {worst:.1e}, same ids {same:.2%}")
    assert worst <= 1e-4
    assert same > 0.99  # the rest: two tokens within rounding of each other


def test_rows_that_run_at_the_same_time_and_again_get_the_same_answer(connect):
    """What the server keeps of earlier prompts must not show."""
    batches = [some_batch([60, 60, 60], seed=seed) for seed in range(4)]
    teacher = connect(64, "prompt_logprobs")
    teacher.prepare(batches)
    together = [teacher.targets(batch).scores for batch in batches]
    for batch, before in zip(batches, together, strict=True):
        torch.testing.assert_close(teacher.targets(batch).scores.logprobs, before.logprobs, atol=1e-5, rtol=0)


# ---- training --------------------------------------------------------------------------------------------------------


def train(folder, teacher=None, model=None):
    """Weights after 10 steps, the losses, and the seconds that the steps took."""
    extra = {} if teacher is None else {"extra": {"teacher": teacher}}
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), model, max_steps=10, learning_rate=2e-5, sft_alpha=0.1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, **extra,
    )  # fmt: skip
    begun = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - begun
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), losses, took


@pytest.mark.parametrize("route", ROUTES)
def test_ten_steps_with_all_tokens_named_end_at_the_weights_of_the_run_in_process(tmp_path, connect, model, say, route):
    teacher = connect(V, route)
    weights, losses, took = train(tmp_path, teacher)
    expected, expected_losses, alone = train(tmp_path, model=model)
    start = torch.cat([p.detach().flatten() for p in tiny.make_qwen3(seed=1).parameters()])
    apart, moved = ((one - expected).abs().max().item() for one in (weights, start))
    say(
        f"{route}, k = V: weights apart by {apart:.1e} after 10 steps that moved them by {moved:.1e}; waited "
        f"{teacher.waited_s / took:.0%} of {took:.1f} s (in process {alone:.1f} s)"
    )
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert moved > 1e-4
    assert apart <= 1e-4


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_kdtrain_fit_with_all_tokens_named_ends_at_the_weights_of_the_run_in_process(
    project, url, model, tokenizer, say, backend
):
    """From the same YAML, but for `rlhf.teacher`; the server is probed before."""
    local = tiny.save_model(model, tokenizer, project / "teacher")
    served = {"backend": backend, "base_url": url, "model": "teacher", "top_k": V, "timeout_s": 120}
    steps = ["training.max_steps=10", "training.learning_rate=2e-5", "data.eval=null", "training.eval_strategy=no"]
    teachers = {
        "run": [f"rlhf.teacher_model={local}"],
        "served": ["rlhf.teacher_model=null", *(f"rlhf.teacher.{key}={value}" for key, value in served.items())],
    }
    weights = []
    for run, overrides in teachers.items():
        overrides = [*overrides, *steps, f"training.output_dir={project / run}"]
        kdtrain.fit(project / "config.yaml", overrides, quiet=True)
        weights.append(load_file(project / run / "model.safetensors"))
    start = load_file(project / "student" / "model.safetensors")
    expected, found = weights
    apart, moved = (max(float((one[n] - expected[n]).abs().max()) for n in expected) for one in (found, start))
    say(f"kdtrain fit, {backend}, k = V: weights apart by {apart:.1e} after 10 steps that moved them by {moved:.1e}")
    assert moved > 1e-4
    assert apart <= 1e-4


def test_how_long_is_waited_at_64_tokens(connect, say):
    """Reported, not judged: server and training share the same two cores here."""
    choose = random.Random(0)
    windows = [[some_batch([250, 250], seed=choose.randrange(10**6))] for _ in range(8)]
    teacher = connect(64, "prompt_logprobs")
    for window in windows[: teacher.lookahead]:
        teacher.prepare(window)
    begun = time.perf_counter()
    for number, window in enumerate(windows):
        for later in windows[number + teacher.lookahead : number + teacher.lookahead + 1]:
            teacher.prepare(later)
        for batch in window:
            teacher.targets(batch)
        time.sleep(0.2)  # the step
    took = time.perf_counter() - begun
    say(f"2 rows of 250 tokens a step of 200 ms, k = 64: waited {teacher.waited_s / took:.0%} of {took:.1f} s")
