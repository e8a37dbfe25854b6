"""`kdtrain preview`: what it shows is what `fit` trains on, and every row that is not is named with its reason."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import yaml
from rich.console import Console

from kdtrain.cli import preview as printed
from kdtrain.config import ConfigLoader
from kdtrain.data import encoder
from kdtrain.errors import DataError, PreflightError
from kdtrain.runs import preview as module
from kdtrain.runs.build import Given
from kdtrain.runs.read_data import read_data
from tests import tiny
from tests.test_vision_fit import row as image_row
from tests.test_vision_fit import save_llava
from tests.tiny_processors import picture

MIXED = [
    {"messages": [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "a token"}]},
    "",
    "{broken",
    {"prompt": "What is é?", "completion": " zero 😀\n"},
    {"text": "The teacher predicts\nthe \x1b[31mtoken."},
    {"messages": 5},
    {
        "messages": [
            {"role": "system", "content": "the"},
            {"role": "user", "content": "one?"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "two?"},
            {"role": "assistant", "content": "2"},
        ]
    },
    {"messages": [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "the path"}]},
]
MIXED_TEXT = """\
What the student is trained to write is marked ⟦like this⟧.

train.jsonl:1  train, chat, 28 tokens, 3 supervised, a prompt of 24
  <|im_start|>user⏎
  What is 1?<|im_end|>⏎
  <|im_start|>assistant⏎
  ⟦a token<|im_end|>⟧⏎

train.jsonl:4  train, completion, 19 tokens, 11 supervised, a prompt of 8
  What is é?⟦ zero 😀⏎
  <|im_end|>⟧

train.jsonl:5  train, text, 23 tokens, 22 supervised
  The⟦ teacher predicts⏎
  the \\x1b[31mtoken.<|im_end|>⟧

train.jsonl:7  train, chat, 60 tokens, 4 supervised, a prompt of 57
  <|im_start|>system⏎
  the<|im_end|>⏎
  <|im_start|>user⏎
  one?<|im_end|>⏎
  <|im_start|>assistant⏎
  ⟦1<|im_end|>⟧⏎
  <|im_start|>user⏎
  two?<|im_end|>⏎
  <|im_start|>assistant⏎
  ⟦2<|im_end|>⟧⏎

train: 4 of 7 rows, 4 per epoch; 40 of 130 tokens supervised (31%); longest row 324 tokens; 2 bad rows
  1 rows of plain text (nothing is generated from them)
  bad: train.jsonl:3: invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
  bad: train.jsonl:6: messages must be a list of messages, not a number
  too long: train.jsonl:8: 324 tokens, and max_length is 128
  kdtrain fit would stop: 2 of 7 rows cannot be used, and data.max_bad_rows is 0. Repair them, or raise \
data.max_bad_rows to leave them out

eval.jsonl:1  eval, chat, 31 tokens, 6 supervised, a prompt of 24
  <|im_start|>user⏎
  What is 0?<|im_end|>⏎
  <|im_start|>assistant⏎
  ⟦the path<|im_end|>⟧⏎

eval: 1 of 1 rows, 1 per epoch; 6 of 31 tokens supervised (19%); longest row 31 tokens; 0 bad rows
"""


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    return folder / "kdtrain"


@pytest.fixture
def mixed(tmp_path, tokenizer, cache, monkeypatch):
    """A project whose models have a config and a tokenizer, and no weights; the current folder."""
    folder = tmp_path / "mixed"
    tiny.make_project(folder, tokenizer)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    write_rows(folder / "train.jsonl", MIXED)
    write_rows(folder / "eval.jsonl", tiny.CHATS[:1])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] = {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(folder)
    return folder


def command(folder, *arguments, **options):
    line = [sys.executable, "-m", "kdtrain", "preview", "config.yaml", *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False, **options)


def splits_of(folder, *overrides, rows=100, all_rows=False):
    return module.preview(ConfigLoader.load(folder / "config.yaml", overrides), rows=rows, all_rows=all_rows)


def train_of(folder, *overrides, **options):
    return splits_of(folder, *overrides, **options)[0]


def text_of(splits, **options):
    return printed.as_text(splits, Console(**{"force_terminal": False, **options}))


# ---- from the outside ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mixed_file_as_a_person_sees_it(mixed):
    before = {path: path.stat().st_mtime_ns for path in mixed.rglob("*")}
    done = command(mixed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == MIXED_TEXT
    assert done.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in mixed.rglob("*")} == before


@pytest.mark.slow
def test_a_mixed_file_as_a_program_sees_it(mixed, tokenizer):
    done = command(mixed, "--json", "--rows", "50")
    assert (done.returncode, done.stderr) == (0, "")
    *rows, of_all = json.loads(done.stdout)
    assert [(row["where"], row["split"], row["kind"]) for row in rows] == [
        (f"{mixed}/train.jsonl:1", "train", "chat"),
        (f"{mixed}/train.jsonl:4", "train", "completion"),
        (f"{mixed}/train.jsonl:5", "train", "text"),
        (f"{mixed}/train.jsonl:7", "train", "chat"),
        (f"{mixed}/eval.jsonl:1", "eval", "chat"),
    ]
    for row, source in zip(rows, [MIXED[0], MIXED[3], MIXED[4], MIXED[6], tiny.CHATS[0]], strict=True):
        expected = encoder.encode_row(source, tokenizer, train_on="assistant")
        assert row["input_ids"] == expected.input_ids
        assert row["labels"] == expected.labels
        assert row["prompt_length"] == expected.prompt_length
        assert "".join(part["text"] for part in row["segments"]) == tokenizer.decode(row["input_ids"])
        assert (row["ce"], row["teacher"], row["length"]) == (True, None, len(row["input_ids"]))
    assert [part["text"] for part in rows[3]["segments"] if part["supervised"]] == ["1<|im_end|>", "2<|im_end|>"]
    assert [(bad["where"], bad["split"], bad["status"]) for bad in of_all["bad_rows"]] == [
        (f"{mixed}/train.jsonl:3", "train", "bad"),
        (f"{mixed}/train.jsonl:6", "train", "bad"),
        (f"{mixed}/train.jsonl:8", "train", "long"),
    ]
    assert of_all["bad_rows"][1]["reason"] == "messages must be a list of messages, not a number"
    assert of_all["bad_rows"][2]["reason"] == "324 tokens, and max_length is 128"
    assert of_all["notes"] == []


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it_without_a_word(mixed):
    write_rows(mixed / "train.jsonl", tiny.CHATS * 40)  # more than stdout keeps in memory
    # `true` has long gone when the first line is written, as `head` would be at a later one.
    reader = f"{sys.executable} -m kdtrain preview config.yaml --rows 240 | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", reader], cwd=mixed, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_alone_still_gets_all_of_it(mixed):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = command(mixed, "--rows", "2", env=environment)
    assert done.returncode == 0, done.stderr
    assert r"What is \xe9?\u27e6 zero \U0001f600\u23ce" in done.stdout


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_rows_are_those_that_fit_trains_on_and_share_its_cache(mixed, cache, tokenizer):
    write_rows(mixed / "train.jsonl", [row for i, row in enumerate(MIXED) if i not in (2, 5, 7)])
    shown = train_of(mixed).rows
    assert len(list(cache.glob("encoded-*"))) == 2
    config, reports = ConfigLoader.load(mixed / "config.yaml"), {}
    reporter = SimpleNamespace(data=lambda name, report: reports.update({name: report.summary()}))
    data = read_data(config, 42, tokenizer, reporter, Given())
    assert len(list(cache.glob("encoded-*"))) == 2
    assert [row.student.input_ids for row in shown] == data.train["input_ids"][:]
    assert [row.student.labels for row in shown] == data.train["labels"][:]
    assert {split.name: split.report.summary() for split in splits_of(mixed)} == reports


def test_rows_of_no_epoch_are_not_shown(mixed):
    write_rows(mixed / "train.jsonl", tiny.CHATS)
    half = "{path: train.jsonl, weight: 0.5}"
    train, evaluation = splits_of(mixed, f"data.train={half}", f"data.eval={half}")
    assert (len(train.rows), train.report.rows_per_epoch) == (6, 3)  # the other half comes in the next epoch
    assert len(evaluation.rows) == 3
    assert [row.where[-2:] for row in train_of(mixed, "custom.sample_limit=2").rows] == [":1", ":2"]
    assert len(train_of(mixed, "data.train={path: train.jsonl, weight: 2}").rows) == 6


def test_a_few_rows_are_of_as_many_kinds_as_there_are(mixed):
    rows = tiny.CHATS * 3 + [{"text": "zero"}, MIXED[6], {"prompt": "the", "completion": " path"}]
    write_rows(mixed / "train.jsonl", rows)
    write_rows(mixed / "more.jsonl", tiny.CHATS)
    two = "data.train=[train.jsonl, more.jsonl]"
    assert [row.where.rpartition("/")[2] for row in train_of(mixed, two, rows=5).rows] == [
        "train.jsonl:1", "train.jsonl:19", "train.jsonl:20", "train.jsonl:21", "more.jsonl:1"
    ]  # fmt: skip
    assert [row.kind for row in train_of(mixed, two, rows=2).rows] == ["chat", "text"]
    assert len(train_of(mixed, two, rows=8).rows) == 8
    assert len(train_of(mixed, two, rows=1000).rows) == len(rows) + 6
    assert train_of(mixed, two, rows=0).rows == []
    assert text_of([train_of(mixed, two, rows=0)]).startswith("train: 27 of 27 rows")


def test_of_large_data_the_first_rows_are_read_and_that_is_said(mixed, monkeypatch):
    monkeypatch.setattr(module, "FIRST_ROWS", 3)
    write_rows(mixed / "train.jsonl", [*tiny.CHATS[:3], "{broken"])
    part, whole = splits_of(mixed), splits_of(mixed, all_rows=True)
    assert (part[0].first_rows, whole[0].first_rows) == (3, None)
    assert part[1].first_rows is None  # it has one row
    assert (len(part[0].bad_rows), len(whole[0].bad_rows)) == (0, 1)
    said = "train: only the first 3 rows of a source were read; --all reads every row\n"
    assert said in text_of(part)
    assert said not in text_of(whole)
    assert train_of(mixed, "data.train={path: train.jsonl, limit: 3}").first_rows is None
    assert len(train_of(mixed, "data.train={path: train.jsonl, limit: 2}").rows) == 2


def test_of_the_first_rows_only_what_holds_for_all_is_refused(mixed, monkeypatch):
    monkeypatch.setattr(module, "FIRST_ROWS", 3)
    write_rows(mixed / "train.jsonl", [*["{broken"] * 3, tiny.CHATS[0]])
    assert train_of(mixed, "data.max_bad_rows=3").refusal is None  # a good one may follow
    assert "3 of 3 rows cannot be used" in train_of(mixed, "data.max_bad_rows=2").refusal
    write_rows(mixed / "train.jsonl", [*[MIXED[7]] * 3, tiny.CHATS[0]])
    assert "3 of 3 rows are longer than max_length" in train_of(mixed).refusal


def test_sources_say_what_they_are_used_for(mixed):
    write_rows(mixed / "train.jsonl", tiny.CHATS)
    sources = "[{path: train.jsonl, ce: false, limit: 1}, {path: eval.jsonl, answers: teacher}]"
    splits = splits_of(mixed, f"data.train={sources}", "rlhf.lmbda=0")
    rows, text = splits[0].rows, text_of(splits)
    assert [(row.ce, row.answered_by_teacher) for row in rows] == [(False, False), (True, True)]
    assert "chat, 31 tokens, 6 supervised, a prompt of 24, no cross-entropy\n" in text
    assert "chat, 24 tokens, the teacher writes the answer\n" in text
    assert [row["answers"] for row in json.loads(printed.as_json(splits))[:2]] == ["data", "teacher"]


def test_what_becomes_of_long_rows_is_said(mixed):
    cut = train_of(mixed, "data.on_overlength=truncate", "data.max_length=55")
    assert [bad.status for bad in cut.bad_rows] == ["bad", "bad", "dropped"]
    assert "chat, 55 tokens of 60 (truncated), 2 supervised, a prompt of 33\n" in text_of([cut])
    dropped = train_of(mixed, "data.on_overlength=drop")
    assert [bad.reason for bad in dropped.bad_rows if bad.status == "dropped"] == ["324 tokens, and max_length is 128"]


def test_notes_stand_at_their_row_and_with_their_count(mixed, monkeypatch):
    parse = encoder.parse_media_row

    def noted(row, *rest):
        parsed = parse(row, *rest)
        return dataclasses.replace(parsed, notes=("the name is not rendered",)) if "prompt" in row else parsed

    monkeypatch.setattr(encoder, "parse_media_row", noted)
    splits = splits_of(mixed)
    note = f"the name is not rendered (1 rows, the first: {mixed}/train.jsonl:4)"
    assert f"  note: {note}\n" in text_of(splits)
    *rows, of_all = json.loads(printed.as_json(splits))
    assert [row["notes"] for row in rows] == [[], ["the name is not rendered"], [], [], []]
    assert of_all["notes"] == [note]


REFUSALS = {
    "bad rows": ([MIXED[0], "{broken"], [], "1 of 2 rows cannot be used"),
    "bad rows that are allowed": ([MIXED[0], "{broken"], ["data.max_bad_rows=1"], None),
    "long rows": ([MIXED[0], MIXED[7]], [], "1 of 2 rows are longer than max_length (128 tokens)"),
    "no good row": (["{broken"], ["data.max_bad_rows=1"], "no row is left of 1"),
    "prompts that nobody answers": ([MIXED[0], {"prompt": "What?"}], [], "1 of 2 rows cannot be used"),
    "prompts that are answered": ([{"prompt": "What?"}], ["rlhf.lmbda=1"], None),
    "text where something is generated": ([{"text": "zero"}], ["rlhf.lmbda=0.5"], "Set rlhf.lmbda: 0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_fit_would_refuse_is_said_and_nothing_else_is(mixed, name):
    rows, overrides, expected = REFUSALS[name]
    write_rows(mixed / "train.jsonl", rows)
    split = train_of(mixed, *overrides)
    if expected is None:
        assert split.refusal is None
        assert "kdtrain fit would stop" not in text_of([split])
    else:
        assert expected in split.refusal
        last = text_of([split]).splitlines()[-1]
        assert last.startswith("  kdtrain fit would stop: ")
        assert expected in last


def test_evaluation_rows_without_an_answer_are_refused_there_only(mixed):
    write_rows(mixed / "eval.jsonl", [{"prompt": "What?"}])
    _, evaluation = splits_of(mixed, "data.max_bad_rows=2")
    assert "there is no answer" in evaluation.refusal


def test_what_the_readme_shows_is_what_is_printed(mixed):
    section = (
        (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split("## What the student reads")[1]
    )
    rows, shown = (section.split(f"```{language}\n")[1].split("```")[0] for language in ("jsonl", "text"))
    (mixed / "train.jsonl").write_text(rows)
    assert text_of([train_of(mixed, "data.max_length=48")]) == shown


# ---- how it looks ----------------------------------------------------------------------------------------------------


def test_colours_stand_in_for_the_marks_where_there_are_any(mixed):
    splits = splits_of(mixed)
    text = text_of(splits, force_terminal=True, color_system="standard")
    assert "\x1b[30;42ma token\x1b[0m" in text
    assert "⟦" not in text
    assert "\x1b[31mtoken" not in text  # the row's own escape sequence
    for options in ({"no_color": True}, {"color_system": None}):
        assert text_of(splits, force_terminal=True, **options) == text_of(splits)


def test_no_color_is_followed(mixed):
    terminal = {"force_terminal": True, "color_system": "standard", "_environ": {"NO_COLOR": "1"}}
    assert "⟦a token<|im_end|>⟧" in text_of(splits_of(mixed), **terminal)


def test_of_long_text_the_middle_is_left_out_and_the_answer_is_not(mixed):
    answer = "the path " * 100
    chat = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": answer}]
    write_rows(mixed / "train.jsonl", [{"messages": chat}])
    splits = splits_of(mixed, "data.max_length=20000")
    text = text_of(splits)
    assert "x" * 300 in text
    assert "x" * 500 not in text
    assert " … 4,253 characters … " in text
    assert f"⟦{answer}<|im_end|>⟧" in text
    assert "x" * 5000 in json.loads(printed.as_json(splits))[0]["segments"][0]["text"]


def test_of_very_long_answers_the_middle_is_left_out_too(mixed):
    write_rows(mixed / "train.jsonl", [{"text": "x" * 9000}])
    text = text_of(splits_of(mixed, "data.max_length=20000"))
    assert " … 5,009 characters … " in text
    assert max(map(len, text.splitlines())) < 4100


def test_many_bad_rows_are_counted_and_all_of_them_in_the_json(mixed):
    write_rows(mixed / "train.jsonl", [MIXED[0], *["{broken"] * 50])
    splits = splits_of(mixed)
    assert text_of(splits).count("  bad: train.jsonl:") == 20
    assert "  and 30 more, which --json lists\n" in text_of(splits)
    assert len(json.loads(printed.as_json(splits))[-1]["bad_rows"]) == 50


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def vision(mixed):
    for side in ("student", "teacher"):
        shutil.rmtree(mixed / side)
        save_llava(mixed / side, 32, 32, 1)
        (mixed / side / "model.safetensors").unlink()
    (mixed / "pictures").mkdir()
    picture(1).save(mixed / "pictures" / "1.png")
    missing = image_row(2, "nothing")
    write_rows(mixed / "train.jsonl", [MIXED[0], image_row(1, "a thing"), missing])
    return mixed


def test_images_are_named_and_their_places_counted(vision):
    splits = splits_of(vision)
    assert (
        "train.jsonl:2  train, chat, 51 tokens, 7 supervised, a prompt of 43\n"
        "  image: pictures/1.png\n"
        "  <|im_start|>user⏎\n"
        "  <image> ×16⏎\n"
        "  what is this?<|im_end|>⏎\n"
        "  <|im_start|>assistant⏎\n"
        "  ⟦a thing<|im_end|>⟧⏎\n"
    ) in text_of(splits)
    assert "  bad: train.jsonl:3: no such image file: " in text_of(splits)
    row = json.loads(printed.as_json(splits))[1]
    assert row["images"] == [str(vision / "pictures" / "1.png")]
    assert "<image>" * 16 in row["segments"][0]["text"]


def test_of_rows_with_images_fewer_are_read(vision, monkeypatch):
    monkeypatch.setattr(module, "FIRST_ROWS_WITH_IMAGES", 2)
    assert train_of(vision).first_rows == 2
    assert train_of(vision).bad_rows == []
    # Images may stand in the rows that were not read.
    visual = "custom.visual_kd={enabled: true, targets: [aligner]}"
    write_rows(vision / "train.jsonl", [MIXED[0]] * 2)
    assert train_of(vision, visual).refusal is None
    assert "no row of data.train has an image" in train_of(vision, visual, all_rows=True).refusal


# ---- what cannot be shown --------------------------------------------------------------------------------------------


def test_what_cannot_be_read_at_all_is_an_error_as_in_fit(mixed, tokenizer):
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        splits_of(mixed, "data.train=nowhere.jsonl")
    tokenizer_file = mixed / "student" / "tokenizer_config.json"
    settings = json.loads(tokenizer_file.read_text())
    settings.pop("chat_template", None)
    tokenizer_file.write_text(json.dumps(settings))
    (mixed / "student" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DataError, match="chat template"):
        splits_of(mixed)
    (mixed / "student" / "tokenizer.json").unlink()
    with pytest.raises(PreflightError, match="No tokenizer could be loaded from"):
        splits_of(mixed)


def test_weights_in_the_divergence_are_shown_where_they_are_not_one(mixed):
    answer = {**tiny.CHATS[1]["messages"][1], "kd_weight": 0.5}
    two = [*tiny.CHATS[0]["messages"], tiny.CHATS[1]["messages"][0], answer]
    write_rows(mixed / "train.jsonl", [tiny.CHATS[2], {**tiny.CHATS[3], "kd_weight": 2}, {"messages": two}])
    splits = splits_of(mixed)
    lines = [line.partition("of 24")[2] for line in text_of(splits).split("\n") if line.startswith("train.jsonl")]
    assert lines[:2] == ["", ", kd_weight 2"]
    assert "kd_weight 1 of 6 tokens and 0.5 of 9 tokens" in text_of(splits)
    assert "2 rows have a weight in the divergence that is not 1 (kd_weight)" in text_of(splits)
    rows = json.loads(printed.as_json(splits))
    assert [row["kd_weight"] for row in rows[:3]] == [1.0, 2.0, 1.0]
    assert rows[0]["kd_weights"] is None
    assert set(rows[2]["kd_weights"]) == {1.0, 0.5}
