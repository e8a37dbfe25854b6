"""`kdtrain init --from`: a model folder as any other, or one clear error and nothing at all."""

import errno
import json
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kdtrain.cli import app as cli
from kdtrain.models import pruning
from kdtrain.models.licences import licence_files
from tests import tiny
from tests.tiny_vision import make_vlm


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """Where `rows.jsonl` and a teacher in bfloat16 lie."""
    monkeypatch.chdir(tmp_path)
    teacher = tiny.make_qwen3(layers=4, tie_word_embeddings=False).to(torch.bfloat16)
    teacher.generation_config.temperature, teacher.generation_config.do_sample = 0.6, True
    tiny.save_model(teacher, tokenizer, tmp_path / "teacher")
    for name, text in (("LICENSE.txt", "Do good."), ("notice", "By us."), ("README.md", "A teacher.")):
        (tmp_path / "teacher" / name).write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.CHATS))
    return tmp_path


@pytest.fixture
def init(folder, monkeypatch, capsys):
    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["kdtrain", "init", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        printed = capsys.readouterr()
        assert done.value.code == code, printed.err
        return printed.out if code == 0 else printed.err

    return run


ROWS = ("--data", "rows.jsonl")


def test_a_student_is_written_as_any_model_is(init, folder):
    out = init("--from", "teacher", "--layers", "3", "--width", "16", *ROWS, "student")
    assert "teacher: 4 layers, width 32, MLP 64, " in out
    assert "student: 3 layers, width 16, MLP 32, " in out
    assert out.count("perplexity") == 2
    assert "On 6 rows, " in out
    assert [line.endswith("dropped") for line in out.splitlines()[1:5]].count(True) == 1
    options = "model.model=student rlhf.teacher_model=teacher data.train=rows.jsonl data.eval=5% rlhf.sft_alpha=0"
    assert f"  kdtrain fit forward-kl.yaml {options}\n" in out
    assert "note" not in out
    model, found = AutoModelForCausalLM.from_pretrained("student", output_loading_info=True)
    assert not any(found.values()), found
    assert (model.dtype, model.config.num_hidden_layers, model.config.hidden_size) == (torch.bfloat16, 3, 16)
    assert (model.generation_config.temperature, model.generation_config.do_sample) == (0.6, True)
    assert AutoTokenizer.from_pretrained("student").chat_template == tiny.CHATML
    kept = {name: (folder / "student" / name).read_text() for name in ("LICENSE.txt", "notice")}
    assert kept == {"LICENSE.txt": "Do good.", "notice": "By us."}
    assert not (folder / "student" / "README.md").exists()
    assert str(folder) not in (folder / "student/config.json").read_text()
    init("--from", "teacher", "--layers", "3", "--width", "16", *ROWS, "again")
    assert (folder / "again/model.safetensors").read_bytes() == (folder / "student/model.safetensors").read_bytes()


def test_a_licence_that_cannot_be_read_is_said(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr("kdtrain.models.licences.snapshot_download", offline)
    found, note = licence_files("org/teacher")
    assert found == []
    assert "The licence of org/teacher was not copied" in note
    assert "no route to the hub" in note


def test_the_first_rows_are_read(init):
    assert "On 2 rows, " in init("--from", "teacher", "--layers", "2", *ROWS, "--rows", "2", "student")


REFUSED = [
    (["--layers", "2", "student"], 2, "--data PATH is missing: rows, by which is seen what to keep."),
    ([*ROWS, "student"], 2, "--layers N is missing"),
    (["--layers", "2", *ROWS], 2, "With --from there is one name, DIR"),
    (["--layers", "2", *ROWS, "one", "two"], 2, "With --from there is one name, DIR"),
    (["--layers", "4", *ROWS, "student"], 2, "--layers 4 are all that teacher has: that would be a copy."),
    (["--layers", "5", *ROWS, "student"], 2, "--layers 5: teacher has 4. Give 1 to 3."),
    (["--layers", "0", *ROWS, "student"], 2, "--layers 0: teacher has 4."),
    (["--layers", "4", "--width", "32", *ROWS, "student"], 2, "--width 32: teacher is 32 wide. Give 1 to 31"),
    (["--layers", "2", *ROWS, "--rows", "0", "student"], 2, "--rows 0: give at least 1."),
    (["--layers", "2", *ROWS, "teacher"], 3, "teacher is not empty"),
    (["--layers", "2", "--width", "-3", *ROWS, "student"], 2, "--width -3: teacher is 32 wide. Give 1 to 31"),
    (["--layers", "2", "--data", "missing.jsonl", "student"], 2, "--data missing.jsonl: no such file or folder: "),
    (["--layers", "2", "--data", "teacher/notice", "student"], 2, "--data teacher/notice: "),
    (["--layers", "2", *ROWS, "--revision", "v1", "student"], 2, "--revision v1: teacher is a folder"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(init, folder, arguments, code, message):
    before = sorted(path.name for path in folder.rglob("*"))
    error = init("--from", "teacher", *arguments, code=code)
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./techer", "--from ./techer: no such folder: {folder}/techer; did you mean {folder}/teacher?"),
        ("rows.jsonl", "--from rows.jsonl: a file, not a model folder"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused_before_anything_is_loaded(init, folder, source, message):
    error = init("--from", source, "--layers", "2", *ROWS, "student", code=2)
    assert error.startswith("kdtrain: " + message.format(folder=folder))


def test_rows_that_cannot_be_used_are_left_out_and_counted(init, folder):
    with (folder / "rows.jsonl").open("a") as file:
        file.write("nonsense\n")
    out = init("--from", "teacher", "--layers", "2", *ROWS, "student")
    assert "On 6 rows, " in out
    assert "note: unusable rows are left out: 1, the first " in out


def test_a_revision_is_that_of_all_that_is_read_of_a_model(init, folder, monkeypatch):
    """A hub is stood in for by the folder."""
    asked = {}
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def load(name, *rest, of=kind.from_pretrained, what=kind.__name__, **options):
            asked[what] = options.get("revision") if name == "org/teacher" else asked.get(what)
            return of(str(folder / "teacher") if name == "org/teacher" else name, *rest, **options)

        monkeypatch.setattr(kind, "from_pretrained", load)
    for module in ("loading", "processing"):
        monkeypatch.setattr(f"kdtrain.models.{module}.require_model", lambda *_: None)

    def download(name, revision, **_):
        asked["licence"] = revision
        return str(folder / "teacher")

    monkeypatch.setattr("kdtrain.models.licences.snapshot_download", download)
    out = init("--from", "org/teacher", "--revision", "v1", "--layers", "2", *ROWS, "student")
    names = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "licence")
    assert asked == dict.fromkeys(names, "v1")
    assert (
        "rlhf.teacher_model=org/teacher data.train=rows.jsonl data.eval=5% rlhf.sft_alpha=0 rlhf.teacher.revision=v1"
        in out
    )
    assert (folder / "student/notice").is_file()


def test_options_of_a_student_without_a_teacher_are_refused(init):
    assert "--width is about a student from a teacher" in init("--width", "8", "forward-kl", code=2)


def test_a_vision_language_model_is_refused(init, folder, tokenizer):
    tiny.save_model(make_vlm("qwen3_vl"), tokenizer, folder / "vision")
    assert "vision is a vision-language model (qwen3_vl)" in init(
        "--from", "vision", "--layers", "1", *ROWS, "student", code=2
    )


def test_quantised_weights_are_refused(init, folder):
    path = folder / "teacher/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    assert "are quantised" in init("--from", "teacher", "--layers", "2", *ROWS, "student", code=3)


def test_a_full_disk_leaves_nothing(init, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    error = init("--from", "teacher", "--layers", "2", *ROWS, "student", code=6)
    assert "No space left on device" in error
    assert "Nothing of it is left." in error
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "teacher"]


def test_a_config_that_says_another_model_is_found(init, folder, monkeypatch):
    real = pruning.shortened
    monkeypatch.setattr(pruning, "shortened", lambda config, kept: {**real(config, kept), "rms_norm_eps": 1.0})
    error = init("--from", "teacher", "--layers", "2", *ROWS, "student", code=2)
    assert "What the cut qwen3 model computes is not what its saved config says" in error
    assert not (folder / "student").exists()
