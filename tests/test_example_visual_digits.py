"""The visual example: its data is what its page says, its arms train, and its comparison measures what it claims."""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from kdtrain.cli import app as cli
from kdtrain.data import Source, build_dataset
from tests import tiny

FOLDER = Path(__file__).parent.parent / "examples" / "visual_digits"


def script(name):
    spec = importlib.util.spec_from_file_location(f"visual_digits_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare, demo, compare = script("prepare"), script("demo"), script("compare")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A copy of the example with its data."""
    folder = tmp_path_factory.mktemp("visual_digits")
    for path in FOLDER.glob("*.yaml"):
        shutil.copy(path, folder)
    prepare.build(folder / "build")
    return folder


@pytest.fixture
def fit(monkeypatch, capsys, example, tmp_path):
    """One run of a config of the example, in this process, into a folder of its own."""

    def run(config, *overrides):
        arguments = ["fit", str(example / f"{config}.yaml"), f"training.output_dir={tmp_path / config}", *overrides]
        monkeypatch.setattr(sys, "argv", ["kdtrain", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        run.said = " ".join(capsys.readouterr().err.split())
        assert done.value.code == 0, run.said
        return tmp_path / config

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


def rows(example, part):
    return compare.read_rows(example / "build" / f"{part}.jsonl")


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digit", "parity", "loops"),
    [
        (0, "even", "one"),
        (1, "odd", "none"),
        (2, "even", "none"),
        (3, "odd", "none"),
        (4, "even", "none"),
        (5, "odd", "none"),
        (6, "even", "one"),
        (7, "odd", "none"),
        (8, "even", "two"),
        (9, "odd", "one"),
    ],
)
def test_the_answers_are_right(digit, parity, loops):
    assert prepare.answers(digit) == {"digit": str(digit), "parity": parity, "loops": loops}


def test_every_row_with_answers_has_those_of_its_image(example):
    from sklearn.datasets import load_digits

    digits = load_digits().target
    for part in ("teacher", "labelled", "heldout"):
        for row in rows(example, part):
            digit = int(digits[int(Path(row["images"][0]).stem)])
            (name,) = [name for name, text in prepare.QUESTIONS.items() if text == compare.question_of(row)]
            assert row["messages"][1] == {"role": "assistant", "content": prepare.answers(digit)[name]}


def test_no_image_is_in_two_parts(example):
    pixels, files = {}, {}
    for part, size in prepare.SPLIT.items():
        files[part] = {row["images"][0] for row in rows(example, part)}
        pixels[part] = {(example / "build" / name).read_bytes() for name in files[part]}
        assert len(files[part]) == len(pixels[part]) == size
        assert len(rows(example, part)) == 3 * size
    assert len(set().union(*files.values())) == len(set().union(*pixels.values())) == sum(prepare.SPLIT.values())


def test_rows_without_answers_say_nothing_about_their_digit(example):
    for row in rows(example, "unlabelled"):
        assert row.keys() == {"messages", "images"}
        question = {"type": "text", "text": compare.question_of(row)}
        assert row["messages"] == [{"role": "user", "content": [{"type": "image"}, question]}]
        assert question["text"] in prepare.QUESTIONS.values()


def test_what_is_learnt_of_a_row_is_one_token_and_the_end(example):
    processor = AutoProcessor.from_pretrained(example / "build" / "student_0")
    source = Source(str(example / "build" / "labelled.jsonl"))
    data, report = build_dataset([source], processor, max_length=64, on_overlength="error", train_on="assistant")
    end = processor.tokenizer.eos_token_id
    for row, raw in zip(data, rows(example, "labelled"), strict=True):
        supervised = [label for label in row["labels"] if label != -100]
        assert len(supervised) == 2
        assert supervised[1] == end
        assert processor.tokenizer.decode(supervised[:1]) == raw["messages"][1]["content"]
    assert report.longest <= prepare.MAX_POSITIONS


def test_students_of_different_seeds_begin_with_different_weights(example):
    first, second = (
        AutoModelForImageTextToText.from_pretrained(example / "build" / f"student_{seed}").state_dict()
        for seed in (0, 1)
    )
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


# ---- runs ------------------------------------------------------------------------------------------------------------

TERMS = {
    "teacher": {"sft_loss"},
    "ce": {"sft_loss"},
    "seq": {"sft_loss"},
    "lm": {"sft_loss", "llm_kd_loss"},
    "visual": {"sft_loss", "vision_kd_loss", "vision_kd_loss_vit"},
    "both": {"sft_loss", "llm_kd_loss", "vision_kd_loss", "vision_kd_loss_vit"},
}


def test_demo_and_comparison_know_all_arms_and_seeds():
    configs = {path.stem for path in FOLDER.glob("*.yaml")} - {"base"}
    assert configs == {"teacher", *demo.ARMS} == {"teacher", *compare.ARMS} == set(TERMS)
    assert demo.SEEDS == compare.SEEDS == prepare.SEEDS


@pytest.mark.parametrize("config", [name if name in ("teacher", "both") else tiny.slow(name) for name in TERMS])
def test_every_config_trains_two_steps(config, example, fit):
    small = ["training.max_steps=2", "custom.sample_limit=12", "training.per_device_train_batch_size=4"]
    teacher = [f"rlhf.teacher_model={example / 'build' / 'teacher_init'}"] if config not in ("teacher", "ce") else []
    run = fit(config, *small, "training.logging_steps=1", *teacher)
    records = compare.read_rows(run / "logging.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert {key for key in records[0] if key.endswith("_loss") or "_loss_" in key} == TERMS[config]
    kept = [json.loads(line) for file in run.glob("teacher_answers/*/*.jsonl") for line in file.open()]
    # 12 rows out of 450 labelled and 1491 unlabelled ones, in proportion.
    assert len(kept) == (9 if teacher else 0)
    assert ("answers from the data, and the teacher's where a source says so" in fit.said) == bool(teacher)
    assert (run / "visual_projectors.safetensors").exists() == ("vision_kd_loss" in TERMS[config])
    names = [name for name in ("teacher_init", "student_0") if (config == "teacher") == (name == "teacher_init")]
    before = AutoModelForImageTextToText.from_pretrained(example / "build" / names[0])
    after = AutoModelForImageTextToText.from_pretrained(run)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


# ---- comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_is_that_of_generated_answers(example, fit):
    """A model that has learnt nine rows by heart answers them, and is wrong where their answers are exchanged."""
    limits = ["custom.sample_limit=9", "training.per_device_train_batch_size=9", "training.max_steps=100"]
    run = fit("ce", *limits)
    model, processor = AutoModelForImageTextToText.from_pretrained(run).eval(), AutoProcessor.from_pretrained(run)
    learnt = rows(example, "labelled")[:9]
    assert set(compare.accuracy(model, processor, learnt, example / "build").values()) == {1.0}
    learnt[0]["messages"][1]["content"] += "0"
    scores = compare.accuracy(model, processor, learnt, example / "build")
    assert [round(score, 3) for score in scores.values()] == [0.889, 0.667, 1.0, 1.0]


def test_an_answer_without_an_end_is_none(example):
    folder = example / "build" / "student_0"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer.eos_token_id] = 0  # never the likeliest of 320
    assert compare.generate(model, processor, rows(example, "heldout")[:1], example / "build") == [None]


def test_the_interval_of_paired_differences_is_students_t():
    # 1, 2, 3: mean 2, standard error 1/√3; t(0.975, 2) = 4.303.
    found = compare.difference([0.2, 0.4, 0.6], [0.1, 0.2, 0.3])
    assert found["mean"] == pytest.approx(0.2)
    assert found["half_interval"] == pytest.approx(0.1 * 4.303 / 3**0.5)
    assert found["above_0"] == 3


def test_pages_show_what_the_comparison_measured():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    blocks = compare.table(results).strip().split("\n\n")
    assert len(blocks) == 3
    assert [block for block in blocks if block not in page] == []
    means = {arm: 100 * sum(one["all"] for one in of) / len(of) for arm, of in results["arms"].items()}
    gist = (FOLDER.parent.parent / "README.md").read_text(encoding="utf-8").split("## Vision-language models")[1]
    assert "| " + " | ".join(f"{mean:.1f}" for mean in means.values()) in gist


def test_one_seed_alone_has_neither_spread_nor_differences(tmp_path):
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    results["arms"] = {arm: of[:1] for arm, of in results["arms"].items()}
    table = compare.table(results | {"differences": {}})
    assert "±" not in table
    assert f"LM KD | {100 * results['arms']['lm'][0]['all']:.1f} |" in table
    assert table.endswith("images; one seed.\n")
