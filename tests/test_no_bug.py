"""What the world does to a run and is no bug of kdtrain's: each has its exit code and a message, and no traceback."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdtrain.runs.report.record import shown_path
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import test_cli, tiny

kdtrain = test_cli.kdtrain
WEIGHTS = "model.safetensors"


def refused(kdtrain, code, *parts, options=(), command="fit"):
    found, out, err = kdtrain(command, "config.yaml", *options)
    text = " ".join((out + err).split())
    assert found == code, text
    assert "bug" not in text
    assert "Traceback" not in text
    for part in parts:
        assert part in text


def change(path, tensors):
    """Other weights in a file: `tensors` changes the mapping in place."""
    found = load_file(path)
    tensors(found)
    save_file(found, path, metadata={"format": "pt"})


def zero_data(path):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + bytes(len(content) - start))


def without_a_shard(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    next(folder.glob("model-00002*")).unlink()


NORM = "model.norm.weight"
DAMAGES = {
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), 2, "is cut short"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), 2, "is empty"),
    "zeroed": (lambda f: (f / WEIGHTS).write_bytes(bytes(10_000)), 2, "holds zero bytes"),
    "another header": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:8] + bytes(10_000)),
        2,
        "holds zero bytes",
    ),
    "a missing shard": (without_a_shard, 2, "is missing"),
    "another shape": (
        lambda f: change(f / WEIGHTS, lambda found: found.update({NORM: torch.zeros(7)})),
        3,
        f"{NORM} of shape [7] in place of",
    ),
    "a missing weight": (lambda f: change(f / WEIGHTS, lambda found: found.pop(NORM)), 3, f"missing {NORM}"),
    "a renamed weight": (
        lambda f: change(f / WEIGHTS, lambda found: found.update({"model.nrm.weight": found.pop(NORM)})),
        3,
        f"missing {NORM}, unknown model.nrm.weight",
    ),
    "a link to nowhere": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("nowhere")),
        2,
        "save the model there by save_pretrained",
    ),
    "a config that is cut": (lambda f: (f / "config.json").write_text('{"a'), 2, "config.json"),
    "a tokenizer that is cut": (lambda f: (f / "tokenizer.json").write_text('{"a'), 3, "No tokenizer could be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_damaged_model_is_named(project, kdtrain, whose, damage):
    action, code, message = DAMAGES[damage]
    action(project / whose)
    option = {"student": "model.model", "teacher": "rlhf.teacher_model"}[whose]
    refused(kdtrain, code, option if code == 2 else str(project / whose), message)


@pytest.mark.parametrize("damage", ["cut", "zeroed", "another shape", "another rank"])
@pytest.mark.parametrize("whose", [tiny.slow("student"), "teacher"])
def test_a_damaged_adapter_is_named(project, kdtrain, whose, damage):
    base = AutoModelForCausalLM.from_pretrained(project / "student")
    adapted = get_peft_model(base, tiny.lora_config(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"]))
    adapted.save_pretrained(project / "adapter")
    file = project / "adapter" / "adapter_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "zeroed":
        file.write_bytes(bytes(1000))
    elif damage == "another shape":
        change(file, lambda found: found.update({next(iter(found)): torch.zeros(3, 3)}))
    else:
        config = project / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 4}))
    options = {
        "student": ["model.adapter=./adapter", "tuner.train_type=lora"],
        "teacher": ["rlhf.teacher.adapter=./adapter", "rlhf.teacher_model=./student"],
    }
    said = {"cut": ": adapter_model.safetensors is cut short", "zeroed": ": adapter_model.safetensors holds zero bytes"}
    message = f"The adapter {project}/adapter could not be loaded{said.get(damage, '')}"
    refused(kdtrain, 3, message, options=options[whose])


def zipped(content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return out.getvalue()


def table(name, end=None, flipped=False):
    def write(project):
        rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()] * 50
        found, path = pa.Table.from_pylist(rows), project / name
        if name.endswith("parquet"):
            pq.write_table(found, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, found.schema) as writer:
                writer.write_table(found)
        content = bytearray(path.read_bytes())
        if flipped:
            for place in (len(content) // 2, len(content) // 3):
                content[place] ^= 255
        path.write_bytes(bytes(content[:end]))
        return f"./{name}"

    return write


def packed(name, pack, share):
    def write(project):
        content = pack((project / "train.jsonl").read_bytes() * 50)
        (project / name).write_bytes(content[: int(len(content) * share)])
        return f"./{name}"

    return write


def named(name, make):
    def write(project):
        make(project)
        return f"./{name}"

    return write


DATA = {
    "gz": (packed("rows.jsonl.gz", gzip.compress, 0.5), 2, "rows.jsonl.gz"),
    "bz2": (packed("rows.jsonl.bz2", bz2.compress, 0.9), 2, "rows.jsonl.bz2"),
    "xz": (packed("rows.jsonl.xz", lzma.compress, 0.9), 2, "rows.jsonl.xz"),
    "zip": (packed("rows.jsonl.zip", zipped, 0.5), 2, "ZIP archive"),
    "zst": (packed("rows.jsonl.zst", lambda content: b"\x28\xb5\x2f\xfd" + content[:100], 1), 2, "Zstandard"),
    "a parquet that is cut": (table("rows.parquet", -50), 2, "rows.parquet"),
    "a parquet with other bits": (table("rows.parquet", flipped=True), 3, "rows.parquet: Corrupt snappy"),
    "an arrow that is cut": (table("rows.arrow", 2000), 2, "rows.arrow"),
    "a link to itself": (named("rows.jsonl", lambda f: (f / "rows.jsonl").symlink_to("rows.jsonl")), 2, "rows.jsonl"),
    "a pipe": (named("rows.jsonl", lambda f: os.mkfifo(f / "rows.jsonl")), 2, "rows.jsonl"),
}


@pytest.mark.parametrize("kind", DATA)
def test_damaged_data_is_named(project, kdtrain, kind):
    write, code, message = DATA[kind]
    refused(kdtrain, code, message, options=[f"data.train={write(project)}"])


@pytest.mark.parametrize(
    "option",
    [
        "training.output_dir",
        "model.model",
        "rlhf.teacher_model",
        "data.train",
        "data.cache_dir",
        "data.image_root",
        "launch.config_file",
    ],
)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"./a\\0b"', "holds a NUL character"),
        (f"./{'x' * 300}", "300 bytes, and 255 are the most"),
        (f"./{'/'.join(['y' * 100] * 45)}", "4,546 bytes, and 4,095 are the most"),
    ],
    ids=["NUL", "a long name", "a long path"],
)
def test_what_can_be_no_name_of_a_file_is_an_error_of_the_config(project, kdtrain, option, value, message):
    code, out, err = kdtrain("validate", "config.yaml", f"{option}={value}")
    assert code == 2
    assert message in out + err
    assert f"{option}" in out + err
    assert "1 error" in out + err, out + err


@pytest.mark.parametrize("name", tiny.one_in(3, ["-r", "CON", "a:b", "a\\nb", " ", "a\\e[31mb", "ü€😀", "..."]))
def test_names_that_are_odd_are_names(project, kdtrain, name):
    options = [f'training.output_dir="{name}"', "training.max_steps=1", "training.report=false", "data.eval=null"]
    code, out, err = kdtrain("fit", "config.yaml", *options, "training.eval_strategy=no")
    assert code == 0, err
    assert len(list(project.rglob(WEIGHTS))) == 3
    assert all(character.isprintable() or character == "\n" for character in out + err)


@pytest.mark.parametrize("arguments", [("validate", "config.yaml"), ("fit", "config.yaml"), ("init", "lora-chats")])
def test_a_working_folder_that_was_deleted_is_said(project, kdtrain, monkeypatch, arguments):
    (project / "gone").mkdir()
    monkeypatch.chdir(project / "gone")
    (project / "gone").rmdir()
    code, _, err = kdtrain(*arguments)
    monkeypatch.chdir(project)
    assert code == 2
    assert "The working directory was deleted, or moved away." in err


def test_a_working_folder_that_is_deleted_while_a_run_goes_on_is_no_business_of_it(project, kdtrain, monkeypatch):
    here, real = project / "here", GKDTrainerWithMetrics.training_step
    here.mkdir()
    monkeypatch.chdir(here)

    def training_step(trainer, *args, **kwargs):
        shutil.rmtree(here, ignore_errors=True)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(GKDTrainerWithMetrics, "training_step", training_step)
    code, out, err = kdtrain("fit", "../config.yaml", "training.max_steps=1")
    assert str(shown_path(project)) == str(project)
    monkeypatch.chdir(project)
    assert code == 0, err
    assert f"in {project}/run" in out
    assert (project / "run" / "report.html").exists()


def test_lines_of_stored_answers_that_are_none_are_left_out_and_asked_for_again(project, kdtrain):
    options = [
        "data.train=[{path: train.jsonl, answers: teacher}]",
        "rlhf.max_new_tokens=4",
        "training.max_steps=1",
        "training.report=false",
        "training.eval_strategy=no",
    ]
    assert kdtrain("fit", "config.yaml", *options)[0] == 0
    (file,) = (project / "run" / "teacher_answers").glob("*/rank0.jsonl")
    before = file.read_text().splitlines()
    foreign = ["[]", "5", "null", '{"prompt": 1}', '{"prompt": "x", "answer": "y"}', "no JSON}"]
    foreign += [f'{{"prompt": "x", "answer": {answer}}}' for answer in ("[1.5]", "[-1]", '[1], "cut": "yes"')]
    file.write_text("\n".join([*foreign, *before[2:], before[0][:30]]))
    (project / "run" / "status.json").write_text('{"state": "failed", "exit_code": 1, "rank": 0}')
    code, _, err = kdtrain("fit", "config.yaml", *options, "--resume", "auto")
    assert code == 0, err
    assert f"rank0.jsonl: {len(foreign)} lines are no answers of the teacher, and are left out" in err
    written = file.read_text()
    assert all(json.loads(line)["prompt"] in written for line in before)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.attn_implementation=flash_attention_2", "flash_attention_2 needs the package flash-attn"),
        ("rlhf.teacher_model_init_kwargs={attn_implementation: flash_attention_2}", "needs the package flash-attn"),
        ("training.optim=adamw_bnb_8bit", "adamw_bnb_8bit needs the package bitsandbytes"),
        ("training.optim=paged_adamw_32bit", "paged_adamw_32bit needs the package bitsandbytes"),
        ("training.optim=galore_adamw", "galore_adamw needs the package galore-torch"),
        ("training.optim=adamw_torch_8bit", "adamw_torch_8bit needs the package torchao"),
        ("training.report_to=mlflow", "mlflow needs the package mlflow"),
    ],
)
def test_a_package_that_is_missing_is_said_before_torch_is_imported(project, kdtrain, monkeypatch, option, message):
    import importlib.util

    real = importlib.util.find_spec
    missing = ("flash_attn", "kernels", "bitsandbytes", "galore_torch", "torchao", "mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else real(name, *rest))
    code, out, err = kdtrain("validate", "config.yaml", option)
    assert code == 2
    assert message in out + err


def test_an_optimizer_that_needs_nothing_is_let_through(kdtrain):
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"):
        assert kdtrain("validate", "config.yaml", f"training.optim={name}")[0] == 0
