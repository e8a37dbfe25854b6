"""The model at the end: whole or not at all, and on the hub where that is asked for."""

import json

import huggingface_hub
import pytest
from safetensors import safe_open

from kdtrain.runs import final_model
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import test_cli, tiny
from tests.stub_hub import StubHub

kdtrain = test_cli.kdtrain
RUN = ["training.max_steps=1", "training.save_strategy=no", "training.eval_strategy=no", "training.report=false"]


def test_a_model_that_cannot_be_written_whole_leaves_the_one_before_it(project, kdtrain, monkeypatch):
    assert kdtrain("fit", "config.yaml", *RUN, "training.save_strategy=steps", "training.save_steps=1")[0] == 0
    run = project / "run"
    before = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    real = GKDTrainerWithMetrics._save

    def save(trainer, output_dir=None, state_dict=None):
        real(trainer, output_dir, state_dict)
        if output_dir and ".model" in output_dir:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(GKDTrainerWithMetrics, "_save", save)
    code, _, err = kdtrain("fit", "config.yaml", *RUN, "training.max_steps=2", "--resume", "auto")
    assert code == 6, err
    assert {path.name: path.read_bytes() for path in run.glob("*.safetensors")} == before
    assert not (run / ".model.tmp").exists()


def test_shards_of_an_earlier_model_do_not_stay_beside_the_new_one(project, tmp_path):
    run, staged = tmp_path / "run", tmp_path / "run" / ".model.tmp"
    staged.mkdir(parents=True)
    model = tiny.make_qwen3(seed=1)
    model.save_pretrained(run, max_shard_size="50KB")
    (run / "visual_projectors.safetensors").write_bytes(b"kept")
    assert len(list(run.glob("model-*.safetensors"))) > 1
    model.save_pretrained(staged)
    final_model._move(staged, run)
    assert {path.name for path in run.glob("*.safetensors*")} == {"model.safetensors", "visual_projectors.safetensors"}
    with safe_open(run / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 5


@pytest.fixture
def hub(monkeypatch):
    with StubHub() as stub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", stub.token)
        api = huggingface_hub.HfApi(endpoint=stub.address, token=stub.token)
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
        yield stub


def test_a_push_that_fails_at_the_end_leaves_the_saved_model_and_says_the_command(project, kdtrain, hub):
    hub.broken = True
    pushed = ["training.push_to_hub=true", "training.hub_model_id=me/mine", "training.hub_private_repo=true"]
    code, _, err = kdtrain("fit", "config.yaml", *RUN, *pushed)
    assert code == 6, err
    run = project / "run"
    assert f"The model is saved in {run}, and could not be pushed to me/mine: " in err
    assert err.rstrip().endswith(f"Push it later by: kdtrain export {run} {run}-export --push me/mine")
    assert (run / "model.safetensors").exists()
    assert json.loads((run / "status.json").read_text())["exit_code"] == 6
    hub.broken = False
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    assert kdtrain("fit", "config.yaml", *RUN, *pushed, "training.output_dir=again")[0] == 0
    assert "model.safetensors" in hub.files


def test_a_push_that_fails_in_the_middle_is_a_warning(project, kdtrain, hub, monkeypatch):
    def push(*_, **__):
        raise ConnectionError("the hub is \x1b[31mdown")

    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    code, _, err = kdtrain(
        "fit", "config.yaml", *RUN, "training.save_strategy=steps", "training.save_steps=1", "training.max_steps=2",
        "training.push_to_hub=true", "training.hub_model_id=me/mine",
    )  # fmt: skip
    assert code == 0, err
    assert err.count("could not be pushed to the hub") == 1
    assert r"\x1b[31mdown" in err
