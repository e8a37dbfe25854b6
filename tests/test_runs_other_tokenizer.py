"""Whole runs with a teacher that has another tokenizer: in this process, on a server, and evaluated."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import kdtrain
from kdtrain.data import Collator
from kdtrain.data.byte_alignment import NONE
from kdtrain.data.other_tokenizer import OtherTokenizer
from tests import tiny, tiny_other
from tests.stub_server import StubServer
from tests.test_cli import kdtrain as command  # noqa: F401 - a fixture
from tests.test_losses_other_tokenizer import bernoulli_kl


@pytest.fixture
def two(project):
    """The project, whose teacher has another tokenizer."""
    of_teacher = tiny_other.byte_level()
    tiny.save_model(tiny_other.make_teacher(of_teacher), of_teacher, project / "teacher")
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["rlhf"] |= {"cross_tokenizer": "alm", "llm_kd_weight": 50.0}
    config["training"] |= {"learning_rate": 1e-3, "optim": "sgd", "eval_strategy": "no"}
    del config["data"]["eval"]
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return project


def fitted(project, name, **rlhf):
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["rlhf"] |= rlhf
    config["training"]["output_dir"] = str(project / name)
    (project / f"{name}.yaml").write_text(yaml.safe_dump(config))
    kdtrain.fit(str(project / f"{name}.yaml"))
    found = load_file(project / name / "model.safetensors")
    return torch.cat([found[key].flatten() for key in sorted(found)])


@pytest.mark.parametrize("lmbda", [0.0, tiny.slow(1.0)])
def test_a_served_teacher_teaches_what_the_same_model_does_in_this_process(two, lmbda):
    expected = fitted(two, "here", lmbda=lmbda, max_new_tokens=6)
    of_teacher = tiny_other.byte_level()
    with StubServer(tiny_other.make_teacher(of_teacher), tokenizer=of_teacher) as server:
        served = {"backend": "vllm", "base_url": server.url, "model": "teacher", "max_retries": 0}
        found = fitted(two, "served", lmbda=lmbda, max_new_tokens=6, teacher=served)
        scored = [request for request in server.asked("/v1/completions") if "prompt_logprobs" in request.body]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert {request.body["prompt_logprobs"] for request in scored} == {1, 5}  # in a run, and by the probe
    records = [json.loads(line) for line in (two / "served" / "logging.jsonl").read_text().splitlines()]
    shares = [record["aligned_share"] for record in records if "loss" in record]
    assert shares == [1.0] * 4 if lmbda == 0 else all(0 <= share <= 1 for share in shares)


def test_without_it_another_tokenizer_is_an_error_that_names_it(two, command):  # noqa: F811
    code, _, err = command("fit", str(two / "config.yaml"), "rlhf.cross_tokenizer=null")
    assert code == 3
    assert "set rlhf.cross_tokenizer: alm" in err


def test_a_teacher_that_reads_other_answers_ends_the_run_before_it_begins(two, command):  # noqa: F811
    other = tiny_other.byte_level()
    other.chat_template = tiny_other.TEMPLATE.replace("m.content", "m.content[:1] + 'Nothing of it' + m.content[1:1]")
    other.save_pretrained(two / "teacher")
    code, _, err = command("fit", str(two / "config.yaml"))
    assert code in (2, 3)
    assert "row 0:" in err
    assert not (two / "run" / "model.safetensors").exists()


def test_both_are_measured_in_their_own_tokens(two, command):  # noqa: F811
    assert command("fit", str(two / "config.yaml"))[0] == 0
    assert command("evaluate", str(two / "run"), f"data.eval={two / 'eval.jsonl'}")[0] == 0
    models = json.loads((two / "run" / "evaluation.json").read_text())["models"]
    assert models["teacher"]["nats_per_byte"] > 0
    assert models["after"]["nats_per_byte"] > 0
    assert models["after"]["forward_kl"] is None
    assert models["after"]["agreement"] is None


# ---- beside a computation of its own ---------------------------------------------------------------------------------


def chunk_tokens(batch):
    """Of each chunk of a batch that both models' tokens make up: its row, the student's positions, the teacher's."""
    both = batch.student_chunks.numbers.tolist(), batch.teacher_tokens.chunks.tolist()
    for row, sides in enumerate(zip(*both, strict=True)):
        for chunk in sorted({one for one in sides[0] if one != NONE}):
            yield row, *([t for t, one in enumerate(side) if one == chunk] for side in sides)


def uld(student, teacher):
    """Σ |sorted − sorted| of a chunk, of each model the probabilities [n, V] and the labels [n] at its tokens of it."""
    rows = []
    for probabilities, labels in (student, teacher):
        in_front = [p[label].clamp(min=1e-8) for p, label in zip(probabilities[:-1], labels[:-1], strict=True)]
        rows.append(torch.stack([*in_front, probabilities.new_ones(())]).prod() * probabilities[-1])
    width = max(map(len, rows))
    first, second = (functional.pad(row.sort(descending=True).values, (0, width - len(row))) for row in rows)
    return (first - second).abs().sum()


def alm(student, teacher):
    logs = [probabilities.gather(1, labels[:, None]).log().sum() for probabilities, labels in (student, teacher)]
    return bernoulli_kl(logs[1], logs[0])


@pytest.mark.parametrize(("method", "of_chunk"), [("uld", uld), tiny.slow("alm", alm)])
def test_a_step_is_that_of_a_computation_chunk_by_chunk_in_float64(two, method, of_chunk):
    """Of the models that lie in the folders: the loss that is logged, and each weight after the step."""
    own, of_teacher, rate = tiny.make_tokenizer(), tiny_other.byte_level(), 0.5
    rows = [json.loads(line) for line in (two / "train.jsonl").read_text().splitlines()[:4]]
    rows[1]["messages"][1]["content"] += ", é 日本 🤝"
    (two / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = Collator(own, other_tokenizer=OtherTokenizer(own, of_teacher))(rows)
    models = [AutoModelForCausalLM.from_pretrained(two / name, dtype=torch.float64) for name in ("student", "teacher")]
    ids = batch.model_inputs["input_ids"], batch.teacher_tokens.input_ids
    masks = batch.model_inputs["attention_mask"], batch.teacher_tokens.attention_mask
    predicted = [
        model(input_ids=own_ids, attention_mask=mask).logits.softmax(-1)
        for model, own_ids, mask in zip(models, ids, masks, strict=True)
    ]
    found = [
        of_chunk(*(
            (p[row, [t - 1 for t in at]], own_ids[row, at])
            for p, own_ids, at in zip(predicted, ids, positions, strict=True)
        ))
        for row, *positions in chunk_tokens(batch)
    ]  # fmt: skip
    assert len(found) == int(batch.num_chunks.sum()) > 20
    assert max(len(positions) for _, positions, _ in chunk_tokens(batch)) > 1
    expected = torch.stack(found).mean() * (weight := 50.0 if method == "alm" else 2.0)
    expected.backward()
    options = [f"training.learning_rate={rate}", "training.max_steps=1", "training.max_grad_norm=1e9"]
    options += ["training.lr_scheduler_type=constant", "rlhf.sft_alpha=0", f"rlhf.cross_tokenizer={method}"]
    kdtrain.fit(two / "config.yaml", [*options, f"rlhf.llm_kd_weight={weight}"], quiet=True)
    [record] = [one for one in map(json.loads, (two / "run" / "logging.jsonl").open()) if "loss" in one]
    assert record["llm_kd_loss"] == pytest.approx(expected.item(), rel=1e-5)
    weights, moved = load_file(two / "run" / "model.safetensors"), 0.0
    for name, parameter in models[0].named_parameters():
        step = rate * parameter.grad
        torch.testing.assert_close(weights[name].double(), parameter.detach() - step, rtol=0, atol=1e-6)
        moved = max(moved, step.abs().max().item())
    assert moved > 1e-3
