"""The on-policy example: its rows are what its page says, its runs train, and its figures measure what they claim."""

import importlib.util
import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.cli import app as cli
from tests.tiny import slow

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "on_policy"


def script(name):
    spec = importlib.util.spec_from_file_location(f"on_policy_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare, compare = script("prepare"), script("compare")
with pytest.MonkeyPatch.context() as patch:  # where demo.py finds its own compare.py
    patch.setitem(sys.modules, "compare", compare)
    demo = script("demo")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A copy of the example with its rows, few of them for the teacher."""
    folder = tmp_path_factory.mktemp("on_policy")
    for path in FOLDER.glob("*.yaml"):
        shutil.copy(path, folder)
    prepare.build(folder / "build", teacher_rows=200)
    return folder


@pytest.fixture
def fit(monkeypatch, capsys, example, tmp_path):
    """One run of a config of the example, in this process, into a folder of its own."""

    def run(config, *overrides):
        arguments = ["fit", str(example / f"{config}.yaml"), f"training.output_dir={tmp_path / config}", *overrides]
        monkeypatch.setattr(sys, "argv", ["kdtrain", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        said = capsys.readouterr().err
        assert done.value.code == 0, said
        return tmp_path / config

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_each_list_moves_the_smallest_of_the_rest_to_the_front_of_it():
    assert prepare.steps("5281736") == ["1528736", "1258736", "1235876", "1235876", "1235687", "1235678"]


def test_an_answer_ends_with_the_digits_in_order_and_has_the_tokens_that_the_demo_counts(example):
    tokenizer = AutoTokenizer.from_pretrained(example / "build" / "student_0")
    rows = compare.read_rows(example / "build" / "train.jsonl")
    assert len(rows) == prepare.TRAIN_ROWS
    for row in rows:
        assert row["completion"][-prepare.DIGITS :] == "".join(sorted(row["prompt"][:-1]))
        assert len(tokenizer(row["completion"])["input_ids"]) + 1 == demo.ANSWER < compare.NEW_TOKENS


def test_no_number_is_in_two_files(example):
    numbers = [
        row["prompt"].partition(":")[0]
        for name in ("teacher", "train", "heldout")
        for row in compare.read_rows(example / "build" / f"{name}.jsonl")
    ]
    assert len(set(numbers)) == len(numbers) == 200 + prepare.TRAIN_ROWS + prepare.HELD_OUT_ROWS


def test_behind_lists_with_slips_the_answer_goes_on_with_right_ones():
    rng, wrong = random.Random(0), 0
    for _ in range(100):
        row = prepare.row_with_slips("5281736", rng)
        written = row["prompt"].partition(":")[2].split(",")[:-1]
        right = prepare.steps("5281736")
        assert row["completion"].split(",") == right[len(written) :] != []
        wrong += written[-1] != right[len(written) - 1]
    assert wrong > 70  # two equal neighbours exchanged, or a digit by itself, change nothing


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_the_arms_differ_in_who_writes_alone(example):
    from kdtrain.config import ConfigLoader

    models = [f"model.model={example}/build/student_0", f"rlhf.teacher_model={example}/build/teacher_init"]
    found = {}
    for arm in ("off", "on", "mixed"):
        config = ConfigLoader.load_training_config(example / f"{arm}.yaml", models).config.model_dump()
        found[arm] = config["rlhf"].pop("lmbda")
        for name in ("temperature", "max_new_tokens"):  # of what the student writes
            config["rlhf"].pop(name)
        config["training"].pop("output_dir")
        found[f"{arm} else"] = config
    assert (found["off"], found["on"], found["mixed"]) == (0, 1, 0.5)
    assert found["off else"] == found["on else"] == found["mixed else"]


@pytest.mark.parametrize(
    ("config", "on_policy"),
    [*(slow(config, 0) for config in ("teacher", "start", "off")), slow("on", 1), ("mixed", None)],
)
def test_every_config_trains_two_steps(config, on_policy, example, fit):
    options = ["training.max_steps=2", "training.logging_steps=1", "training.per_device_train_batch_size=4"]
    if config not in ("teacher", "start"):
        build = example / "build"
        options += [f"model.model={build / 'student_0'}", f"rlhf.teacher_model={build / 'teacher_init'}"]
        options += ["training.save_steps=1", "rlhf.max_new_tokens=4"]
    run = fit(config, *options)
    records = [record for record in compare.read_rows(run / "logging.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2]
    assert all(("llm_kd_loss" in record) == (config not in ("teacher", "start")) for record in records)
    assert on_policy in (None, *(record["on_policy_fraction"] for record in records))
    saved = {path.name for path in run.glob("checkpoint-*")}
    assert saved == (set() if config in ("teacher", "start") else {"checkpoint-1", "checkpoint-2"})
    assert AutoModelForCausalLM.from_pretrained(run).num_parameters() > 0


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(example):
    """A student and a teacher with weights so large that they disagree, and their tokenizer."""
    torch.manual_seed(0)
    found = []
    for name in ("student_0", "teacher_init"):
        model = AutoModelForCausalLM.from_pretrained(example / "build" / name, dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.2)
        found.append(model)
    return *found, AutoTokenizer.from_pretrained(example / "build" / "student_0")


@torch.no_grad()
def test_divergence_counts_the_tokens_up_to_the_end_of_each_answer(models):
    student, teacher, tokenizer = models
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = torch.tensor([[5, 6, 13], [7, 2, 13]])
    answers = torch.tensor([[4, 12, end, pad], [3, 3, 8, 9]])  # one ends, one is cut
    found = compare.divergence(student, teacher, prompts, answers, end_id=end)
    kl = ce = 0.0
    for prompt, answer in zip(prompts.tolist(), ([4, 12, end], [3, 3, 8, 9]), strict=True):
        ids = torch.tensor([prompt + answer])
        log_s, log_t = (of(ids).logits[0].double().log_softmax(-1) for of in (student, teacher))
        for i, token in enumerate(answer):
            at = len(prompt) - 1 + i
            kl += sum(log_s[at, v].exp() * (log_s[at, v] - log_t[at, v]) for v in range(log_s.shape[1])).item()
            ce -= log_s[at, token].item()
    assert found["kl"] == pytest.approx(kl / 7, rel=1e-5)
    assert found["ce"] == pytest.approx(ce / 7, rel=1e-5)


def test_the_gap_is_that_of_own_answers_and_the_datas(models, example):
    student, teacher, tokenizer = models
    rows = compare.read_rows(example / "build" / "heldout.jsonl")[:8]
    found = compare.figures(student, teacher, tokenizer, rows)
    assert found["gap"] == pytest.approx(found["own_kl"] - found["data_kl"])
    assert found["own_kl"] > 0.1
    assert found == compare.figures(student, teacher, tokenizer, rows)  # the same draws again
    of_itself = compare.figures(teacher, teacher, tokenizer, rows, greedy=False)
    assert of_itself["own_kl"] == of_itself["data_kl"] == pytest.approx(0, abs=1e-6)


def test_an_answer_is_right_by_its_last_list_whatever_stands_before():
    rows = [{"completion": "132,123"}] * 4
    found = compare.correctness(["132,123", "133,123", "132,132", None], rows)
    assert found == {"right": 0.5, "slips": 0.75, "regained": pytest.approx(1 / 3)}


def test_an_answer_without_an_end_is_none(models):
    tokenizer = models[2]
    assert compare.ended(tokenizer, tokenizer("123")["input_ids"]) is None
    assert compare.ended(tokenizer, [*tokenizer("123")["input_ids"], tokenizer.eos_token_id, 0]) == "123"


def test_tokens_are_counted_from_what_was_logged(tmp_path, monkeypatch):
    records = [
        {"step": 1, "loss": 1.0, "on_policy_fraction": 1.0, "completion_length": 20.0},
        {"step": 5, "loss": 1.0, "on_policy_fraction": 0.25, "completion_length": 40.0},
        {"step": 7, "loss": 1.0, "on_policy_fraction": 0.0},
        {"step": 7, "eval_loss": 1.0},
    ]
    (tmp_path / "on_0").mkdir()
    (tmp_path / "on_0" / "logging.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr(demo, "RUNS", tmp_path)
    assert demo.tokens("on_0") == 32 * (20 + 40 + 3 * 48 + 2 * 48)


def test_the_interval_of_differences_is_students_t():
    mean, half = compare.difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])  # 1, 2, 3; t(0.975, 2) = 4.303
    assert (mean, half) == (2, pytest.approx(4.303 / 3**0.5))
    assert compare.difference([2.0], [1.0]) == (1, None)


# ---- demo and page ---------------------------------------------------------------------------------------------------


def test_the_demo_knows_every_arm_and_compares_what_there_is():
    assert {arm.removesuffix("_time") for arm in compare.ARMS} == {"off", "on", "mixed"}
    assert {arm for pair in compare.PAIRS for arm in pair[:2]} == set(compare.ARMS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (1, [])),
        (["--seeds", "3", "rlhf.beta=0.5"], (3, ["rlhf.beta=0.5"])),
        (["rlhf.beta=1"], (1, ["rlhf.beta=1"])),
    ],
)
def test_the_demo_takes_seeds_and_options(arguments, expected):
    assert demo.options(arguments) == expected


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--seeds"], ["--seeds", "4"], ["training.max_steps=1"], ["fast"], ["--fast"]])
def test_the_demo_refuses_other_words(arguments):
    ended = subprocess.run([sys.executable, FOLDER / "demo.py", *arguments], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.strip()) == (1, demo.USAGE)


def test_pages_show_what_was_measured():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    blocks = compare.table(results).strip().split("\n\n")
    assert len(blocks) == 4
    assert [block for block in blocks if block not in page] == []
    right = {arm: 100 * sum(one["right"] for one in of) / len(of) for arm, of in results["arms"].items()}
    gist = (ROOT / "README.md").read_text(encoding="utf-8").split("`make demo-on-policy`")[1]
    assert f"({right['on']:.1f} % and {right['off']:.1f} % at equal tokens" in gist
