"""`kdtrain export` from the outside: a folder that stands alone, with the run's numbers, and says nothing of where."""

import json
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from kdtrain.cli.export import as_text
from kdtrain.config import ConfigLoader
from kdtrain.config.schema import RlhfConfig
from kdtrain.errors import CheckpointError, ConfigError, PreflightError
from kdtrain.models.transformers4 import write_for_transformers_4
from kdtrain.runs import export as exporting
from kdtrain.runs import model_card
from kdtrain.runs.export import export
from kdtrain.runs.fit import fit
from kdtrain.runs.model_card import public
from kdtrain.runs.new_folder import new_folder
from kdtrain.runs.open_run import open_run
from tests import tiny
from tests.stub_hub import StubHub
from tests.test_cli import kdtrain  # noqa: F401 - a fixture
from tests.test_vision_fit import Silent, models, write_config  # noqa: F401 - models is a fixture
from tests.test_vision_fit import run as train_vision

IDS = torch.arange(4, 24)[None]
FIGURES = {"ce": 2.5, "perplexity": 12.1825, "token_accuracy": 0.4, "accuracy": 0.5, "forward_kl": 0.25,
           "reverse_kl": None, "ece": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def original(tokenizer, tmp_path_factory):
    """A project with a LoRA run and a run of all weights, both with checkpoints; its base names no end of turn."""
    project = tiny.make_project(tmp_path_factory.mktemp("machine"), tokenizer)
    (project / "student" / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.6}))
    (project / "student" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (project / "student" / "LICENSE").write_text("Do good.")
    common = ("training.save_strategy=steps", "training.save_steps=2", "training.learning_rate=1e-2")
    for name, more in (("lora", ("tuner.train_type=lora", "tuner.use_dora=true")), ("full", ())):
        overrides = [*common, *more, f"training.output_dir={project / name}"]
        fit(ConfigLoader.load_training_config(project / "config.yaml", overrides), Silent())
    file = project / "lora" / "adapter_model.safetensors"
    torch.manual_seed(0)
    save_file({name: w + 0.05 * torch.randn_like(w) for name, w in load_file(file).items()}, file)
    return project


@torch.no_grad()
def logits(model):
    return model.double().eval()(input_ids=IDS).logits


def causal(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def names_of_this_machine(folder, place):
    return [file.name for file in folder.rglob("*") if file.is_file() and str(place).encode() in file.read_bytes()]


def test_an_adapter_is_merged_and_all_that_a_chat_needs_comes_along(original, tmp_path):
    out = tmp_path / "student"
    found = export(open_run(original / "lora"), out)
    expected = logits(PeftModel.from_pretrained(causal(original / "student"), original / "lora"))
    assert (expected - logits(causal(original / "student"))).abs().max() > 0.1
    assert (logits(causal(out)) - expected).abs().max() < 1e-5
    assert (found.merged, found.model.dtype, found.model.parameters) == (True, "float32", 28_896)
    assert as_text(found, public=False).splitlines()[1].startswith("for transformers 5 (--transformers 4 ")

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(original / "student").chat_template
    config = json.loads((out / "generation_config.json").read_text())
    # The ends of a text and of a turn. Published as it is here, without do_sample, it would fail where it is saved.
    assert (config["eos_token_id"], config["temperature"], config["do_sample"]) == ([0, 2], 0.6, True)
    for folder in (out, original / "lora", original / "full" / "checkpoint-2"):
        assert {"is_local", "local_files_only"}.isdisjoint(json.loads((folder / "tokenizer_config.json").read_text()))
    assert names_of_this_machine(out, original) == []
    assert not list(out.glob("adapter*"))
    assert (out / "LICENSE").read_text() == "Do good."
    assert not list(tmp_path.glob(".*"))
    assert len({stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}) == 1


def test_a_student_that_was_trained_in_full_is_exported_as_it_is_or_in_half(original, tmp_path):
    run = original / "full"
    export(open_run(run), tmp_path / "whole")
    saved, found = load_file(run / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in found.items())
    assert (tmp_path / "whole" / "LICENSE").read_text() == "Do good."
    half = export(open_run(run), tmp_path / "half", dtype="bfloat16")
    rounded = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(saved[name].bfloat16(), weight) for name, weight in rounded.items())
    assert half.size < 0.6 * sum(weight.numel() * 4 for weight in saved.values())
    assert causal(tmp_path / "half").dtype == torch.bfloat16


def test_a_checkpoint_is_exported_and_a_run_that_did_not_end_names_it(original, tmp_path):
    run = tmp_path / "stopped"
    shutil.copytree(original / "lora", run)
    for file in run.glob("adapter*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"not come to its end.*--checkpoint 4 \(there are 2, 4\)"):
        open_run(run)
    export(open_run(run, checkpoint="2"), tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(causal(original / "student"), run / "checkpoint-2"))
    assert (logits(causal(tmp_path / "out")) - expected).abs().max() < 1e-5
    assert "of which this is checkpoint-2" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_that_has_moved_is_exported_on_the_base_that_is_named(original, tmp_path):
    for name in ("lora", "student"):
        shutil.copytree(original / name, tmp_path / name)
    for name in ("adapter_config.json", "run_config.json"):
        file = tmp_path / "lora" / name
        text = file.read_text().replace(f"{original}/student", f"{original}/gone")
        file.write_text(text.replace(f"{original}/teacher", f"{original}/gone"))  # which is not needed
    moved = tmp_path / "lora"
    with pytest.raises(PreflightError, match=r"its base is not there any more: .*gone.*model\.model=FOLDER"):
        export(open_run(moved, only_student=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(open_run(moved, [f"model.model={tmp_path / 'student'}"], only_student=True), tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(causal(original / "student"), original / "lora"))
    assert (logits(causal(tmp_path / "out")) - expected).abs().max() < 1e-5


def test_a_vision_student_comes_with_its_processor_and_without_projectors(models, tmp_path):  # noqa: F811
    train_vision(models, tmp_path / "vision", tuner__train_type="lora", training__learning_rate=0.5)
    run, out = tmp_path / "vision" / "run", tmp_path / "out"
    assert (run / "visual_projectors.safetensors").exists()
    found = export(open_run(run), out)
    assert not (out / "visual_projectors.safetensors").exists()
    processor = AutoProcessor.from_pretrained(out)
    picture = torch.rand(3, 32, 32)
    batch = processor(images=picture, text="<image> what is this?", return_tensors="pt", do_rescale=False)
    base = AutoModelForImageTextToText.from_pretrained(models / "student")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, run).eval()(**batch).logits
        again = AutoModelForImageTextToText.from_pretrained(out).eval()(**batch).logits
    assert (again - expected).abs().max() < 1e-4
    assert found.model.reads_images
    assert names_of_this_machine(out, tmp_path) == names_of_this_machine(out, models) == []


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_there_whole_or_not_at_all(original, tmp_path, monkeypatch):
    run = open_run(original / "full")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "model_card", full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            export(run, tmp_path / "new")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="No space left"):
            export(run, tmp_path / "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    export(run, tmp_path / "empty")
    with pytest.raises(PreflightError, match=r"empty is not empty: it holds .* Name a new folder"):
        export(run, tmp_path / "empty")
    with pytest.raises(PreflightError, match=r"would take .* MiB"):
        exporting._check_space(tmp_path, 1 << 60)


def test_a_folder_that_is_filled_is_not_seen_before_its_end(tmp_path):
    out = tmp_path / "deep" / "new"

    def interrupted():
        with new_folder(out) as folder:
            (folder / "part").write_text("half")
            assert not out.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list((tmp_path / "deep").iterdir())


# ---- transformers 4 --------------------------------------------------------------------------------------------------


def test_what_is_written_for_transformers_4_has_its_words_and_the_same_numbers(original, tmp_path):
    found = export(open_run(original / "full"), tmp_path / "four", version=4)
    assert as_text(found, public=False).splitlines()[1] == "for transformers 4 and 5"
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert (config["torch_dtype"], config["rope_theta"], config["rope_scaling"]) == ("float32", 10000.0, None)
    assert {"dtype", "rope_parameters"}.isdisjoint(config)
    tokenizer = json.loads((tmp_path / "four" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert torch.equal(logits(causal(tmp_path / "four")), logits(causal(original / "full")))


def written_for_4(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    write_for_transformers_4(folder)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_words_of_transformers_4_for_scaled_local_and_partial_positions_tokens_and_processors(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    found = written_for_4(
        tmp_path,
        config={"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text", "rope_parameters": yarn}},
        tokenizer_config={"extra_special_tokens": ["<a>"], "backend": "tokenizers"},
        processor_config={"image_processor": {"image_processor_type": "CLIPImageProcessorPil"}, "processor_class": "P"},
    )
    text = found["config"]["text_config"]
    assert (text["rope_theta"], text["partial_rotary_factor"]) == (5e5, 0.5)
    assert text["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    assert found["tokenizer_config"] == {"additional_special_tokens": ["<a>"]}
    assert found["processor_config"] == {"processor_class": "P"}
    assert found["preprocessor_config"] == {"image_processor_type": "CLIPImageProcessor", "processor_class": "P"}
    local = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": yarn}
    gemma = written_for_4(tmp_path, config={"model_type": "gemma3_text", "rope_parameters": local})["config"]
    assert (gemma["rope_local_base_freq"], gemma["rope_theta"]) == (1e4, 5e5)


@pytest.mark.parametrize("model_type", ["llava", "a_model_of_tomorrow"])
def test_what_was_not_tried_with_transformers_4_is_refused(tmp_path, model_type):
    with pytest.raises(ConfigError, match=f"--transformers 4 of a {model_type} model is not available yet"):
        written_for_4(tmp_path, config={"model_type": model_type})


# ---- the card --------------------------------------------------------------------------------------------------------


def test_the_card_says_method_teacher_data_figures_verdict_config_and_licence(original, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(original / "lora", run)
    found = {
        "checkpoint": None, "rows": 24, "gap_closed": 0.75, "verdict": "BEATS", "against": {"difference": -0.125},
        "models": {"before": {**FIGURES, "ce": 3.5}, "after": FIGURES, "teacher": None},
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(found))
    export(open_run(run), tmp_path / "mine")
    _, front, text = (tmp_path / "mine" / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["library_name"], facts["pipeline_tag"]) == (
        "apache-2.0", "transformers", "text-generation",
    )  # fmt: skip
    assert "base_model" not in facts  # a folder of this machine
    for part in (
        "# mine", "distilled from teacher (a local folder)", "1 × jsd (beta 0.5, temperature 1)",
        "0.3 × cross-entropy",
        "Data: train.jsonl.", "| this model | 2.5000 | 12.18 | 40.0% | 50.0% | 0.2500 | – | – | 0.100 |",
        "| token accuracy | right answers |",
        "Share of the gap to the teacher closed in CE: 75.0%", "BEATS: CE -0.1250", "apache-2.0, as student",
    ):  # fmt: skip
        assert part in text
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["model"] == {"model": "student"}
    assert "output_dir" not in config["training"]


def test_a_section_that_is_on_with_its_defaults_is_on_the_card():
    whole = RlhfConfig(token_weights={}, beta=0.2).model_dump(mode="json")
    changed = RlhfConfig(token_weights={}, beta=0.2).model_dump(mode="json", exclude_defaults=True)
    assert changed == {"beta": 0.2, "token_weights": {}}
    shown = model_card._switched_on(changed, whole)
    assert shown == {"beta": 0.2, "token_weights": {"by": "visual_reliance", "top": 0.2, "share": 0.5}}


def test_the_code_on_the_card_runs(original, tmp_path, monkeypatch, capsys):
    export(open_run(original / "lora"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    exec((tmp_path / "mine" / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out


def test_figures_of_another_checkpoint_are_not_given_for_this_one(original, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(original / "lora", run)
    (run / "evaluation.json").write_text(json.dumps({"checkpoint": None, "rows": 24, "models": {"after": FIGURES}}))
    export(open_run(run, checkpoint="2"), tmp_path / "early")
    assert "Not evaluated." in (tmp_path / "early" / "README.md").read_text()
    export(open_run(run, checkpoint="4"), tmp_path / "late")
    assert "At the evaluation of step 4" in (tmp_path / "late" / "README.md").read_text()


def test_a_config_for_everybody_has_no_secret_and_no_path():
    config = {
        "training": {"output_dir": "/home/me/run", "hub_token": "x", "run_name": "at hf_AbCdEf0123456789"},
        "rlhf": {"teacher": {"base_url": ["http://10.0.0.7:8000/v1"], "api_key_env": "KEY", "model": "t"}},
        "data": {"train": [{"path": "/home/me/rows.jsonl"}, {"path": "org/rows"}], "image_root": "~/pictures"},
    }
    assert public(config) == {
        "training": {"run_name": "at ***"},
        "rlhf": {"teacher": {"model": "t"}},
        "data": {"train": [{"path": "rows.jsonl"}, {"path": "org/rows"}], "image_root": "pictures"},
    }


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    with StubHub() as stub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield stub


def test_a_model_is_pushed_to_a_private_repository(original, tmp_path, hub, kdtrain):  # noqa: F811
    code, out, err = kdtrain("export", str(original / "full"), str(tmp_path / "out"), "--push", "mine")
    assert code == 0, err
    assert out.splitlines()[-1] == f"pushed to {hub.address}/me/mine (private)"
    assert hub.created == [{"name": "mine", "private": True}]
    assert {name: len(content) for name, content in hub.files.items()} == {
        file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()
    }
    assert 'from_pretrained("me/mine")' in hub.files["README.md"].decode()


def test_a_repository_that_is_public_is_pushed_to_only_where_that_is_said(original, tmp_path, hub, kdtrain):  # noqa: F811
    hub.existing["me/mine"] = False
    target = (str(original / "full"), str(tmp_path / "out"), "--push", "me/mine")
    code, _, err = kdtrain("export", *target)
    assert (code, "already and public" in err, hub.files) == (3, True, {})
    assert not (tmp_path / "out").exists()
    assert kdtrain("export", *target, "--public")[0] == 0
    assert "config.json" in hub.files


def test_a_push_that_fails_keeps_the_folder_and_says_how_to_go_on(original, tmp_path, hub, kdtrain):  # noqa: F811
    hub.broken = True
    code, _, err = kdtrain("export", str(original / "full"), str(tmp_path / "out"), "--push", "mine")
    assert code == 6
    assert "could not be pushed to me/mine" in err
    assert "hf upload me/mine" in err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_a_push_needs_is_looked_at_before_a_model_is_loaded(original, tmp_path, hub, kdtrain, monkeypatch):  # noqa: F811
    monkeypatch.setattr(exporting, "load_alone", lambda *_: pytest.fail("the model is loaded"))
    target = ("export", str(original / "full"), str(tmp_path / "out"))
    code, _, err = kdtrain(*target, "--push", "a/b/c")
    assert (code, "is no name of a repository" in err) == (2, True)
    hub.token = "another"
    code, _, err = kdtrain(*target, "--push", "mine")
    assert (code, "hub does not let us in" in err) == (3, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = kdtrain(*target, "--push", "mine")
    assert (code, "HF_HUB_OFFLINE is set" in err) == (3, True)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "lora/checkpoint-2", "out"), 2, "is a checkpoint: name its run, lora, with --checkpoint 2"),
        (("export", "lora", "model.dtype=float32"), 2, "OUT, the folder to write, is missing"),
        (("export", "lora", "out", "--dtype", "fp16"), 2, "--dtype is one of auto, float32"),
        (("export", "lora", "out", "--transformers", "3"), 2, "--transformers is 5, or 4"),
        (("export", "lora", "out", "--public"), 2, "--public is about --push"),
        (("export", "student", "out"), 2, "student is no run folder"),
        (("export", "lora", "lora"), 3, "lora is not empty"),
        (("export", "lora", "train.jsonl"), 3, "train.jsonl is a file"),
    ],
)
def test_a_mistake_says_what_was_meant(original, kdtrain, monkeypatch, arguments, code, message):  # noqa: F811
    monkeypatch.chdir(original)
    found, _, err = kdtrain(*arguments)
    assert found == code
    assert re.search(message, err), err
    assert not Path("out").exists()
