"""What people switch on in a run, and what stands in the folders of models, that is right: it stays so."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.config import ConfigLoader
from kdtrain.data import Source, build_dataset
from kdtrain.errors import PreflightError
from kdtrain.models.loading import load_merged, load_with_adapter
from kdtrain.models.processing import load_processing, load_tokenizer
from kdtrain.runs.fit import fit
from tests import tiny
from tests import tiny_processors as vision
from tests.test_models_probe import Silent, put
from tests.tiny_families import make


def run(project, resume=None, **changes):
    """`fit` with other settings; the records of its log."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    for section, options in changes.items():
        config.setdefault(section, {}).update(options)
    (project / "changed.yaml").write_text(yaml.safe_dump(config))
    fit(ConfigLoader.load_training_config(project / "changed.yaml"), Silent(), resume=resume)
    return [json.loads(line) for line in (project / "run" / "logging.jsonl").read_text().splitlines()]


def losses(records):
    return [record["loss"] for record in records if "loss" in record]


OPTIONS = {
    "adafactor": {"optim": "adafactor"},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "a plateau": {"lr_scheduler_type": "reduce_lr_on_plateau"},
    "warmup, stable, decay": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 2},
        "warmup_steps": 1,
    },
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "workers": {"dataloader_num_workers": 1},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer):
    """A run with none of them: its losses and learning rates."""
    records = run(tiny.make_project(tmp_path_factory.mktemp("plain"), tokenizer))
    return losses(records), [record["learning_rate"] for record in records if "loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_a_usual_option_learns_and_its_model_loads(project, plain, name):
    records = run(project, training=OPTIONS[name])
    rates = [record["learning_rate"] for record in records if "loss" in record]
    assert len(losses(records)) == 4
    if name in ("workers", "checkpointing", "checkpointing, reentrant"):
        assert losses(records) == pytest.approx(plain[0], rel=1e-6)
    elif name == "NEFTune":  # noise in training alone
        assert losses(records)[0] != pytest.approx(plain[0][0], rel=1e-6)
    else:
        assert losses(records)[0] == pytest.approx(plain[0][0], rel=1e-6)
    if name == "a plateau":
        assert len(set(rates)) == 1
    if name == "warmup, stable, decay":
        assert rates[0] < rates[1] == rates[2] > rates[3]
    before, after = (load_file(project / folder / "model.safetensors") for folder in ("student", "run"))
    assert set(before) == set(after)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    if name == "NEFTune":
        (evaluated,) = (record["eval_loss"] for record in records if "eval_loss" in record)
        assert run_evaluated(project) == pytest.approx(evaluated, rel=1e-5)


def run_evaluated(project):
    """The evaluation of the saved model, before a step that changes nothing: what was saved is what was evaluated."""
    shutil.rmtree(project / "student")
    (project / "run").rename(project / "student")
    for name in ("status.json", "run_config.json", "logging.jsonl"):
        (project / "student" / name).unlink(missing_ok=True)
    records = run(project, training={"max_steps": 1, "eval_steps": 1, "learning_rate": 0.0})
    return next(record["eval_loss"] for record in records if "eval_loss" in record)


@pytest.mark.slow
def test_a_run_with_workers_goes_on_bit_for_bit(project):
    saving = {"dataloader_num_workers": 1, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    run(project, training=saving)
    expected = load_file(project / "run" / "model.safetensors")
    shutil.rmtree(project / "run" / "checkpoint-4")
    (project / "run" / "model.safetensors").unlink()
    run(project, resume="auto", training=saving)
    for name, weight in load_file(project / "run" / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.slow
def test_an_adapter_on_the_transposed_layers_of_gpt2_is_merged_as_it_runs(project, tokenizer):
    put(project, tokenizer, "student", make("gpt2"))
    run(project, tuner={"train_type": "lora", "target_modules": ["c_attn", "c_fc"]}, training={"learning_rate": 0.1})
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        apart, merged = (load(str(project / "run"))(ids).logits for load in (load_with_adapter, load_merged))
        before = AutoModelForCausalLM.from_pretrained(project / "student")(ids).logits
    assert torch.allclose(apart, merged, atol=1e-5)
    assert not torch.allclose(apart, before, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_saved_once_in_the_students_type_and_load_as_one(project, tokenizer, dtype):
    put(project, tokenizer, "student", tiny.make_qwen3(seed=1, tie_word_embeddings=True).to(dtype))
    run(project, model={"dtype": str(dtype).removeprefix("torch.")})
    weights = load_file(project / "run" / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {weight.dtype for weight in weights.values()} == {dtype}
    model = AutoModelForCausalLM.from_pretrained(project / "run")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == dtype


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_code_in_a_model_folder_does_not_run(project, side):
    ran = project / "ran"
    (project / side / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    path = project / side / "config.json"
    own = {"model_type": "own", "auto_map": {
        "AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}}  # fmt: skip
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    with pytest.raises(PreflightError, match=rf"{side}.*trust_remote_code"):
        run(project)
    assert not ran.exists()


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def in_tokenizer_config(folder, template):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


PLACES = {
    "chat_template.jinja": lambda folder: (folder / "chat_template.jinja").write_text(tiny.CHATML),
    "tokenizer_config.json": lambda folder: in_tokenizer_config(folder, tiny.CHATML),
    "a list of named ones": lambda folder: in_tokenizer_config(
        folder, [{"name": "default", "template": tiny.CHATML}, {"name": "tool_use", "template": "{{ 'tools' }}"}]
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_chat_template_is_read_from_every_place(tmp_path, tokenizer, place):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    PLACES[place](tmp_path)
    dataset, _ = encoded(tmp_path, load_tokenizer(str(tmp_path)))
    expected, _ = encoded(tmp_path, tokenizer)
    assert dataset["input_ids"] == expected["input_ids"]


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_of_a_processor_is_read_from_every_place(tmp_path, file):
    processor = vision.make_llava()
    vision.make_model("llava", processor).config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    template = processor.chat_template
    (tmp_path / file).write_text(json.dumps({"chat_template": template}) if file.endswith("json") else template)
    assert load_processing(str(tmp_path)).chat_template == template


def encoded(folder, tokenizer):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.CHATS))
    return build_dataset(
        [Source(str(folder / "a.jsonl"))], tokenizer, cache_dir=str(folder / "cache"),
        max_length=None, on_overlength="error", train_on="assistant",
    )  # fmt: skip


def test_a_tokenizer_that_cuts_and_pads_by_itself_cuts_and_pads_no_row(tmp_path):
    tokenizer = tiny.make_tokenizer()
    expected, _ = encoded(tmp_path, tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.save_pretrained(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    state |= {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}}
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(state))
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert len(loaded.backend_tokenizer.encode("the path of a long file").ids) == 64
    dataset, _ = encoded(tmp_path, loaded)
    assert dataset["input_ids"] == expected["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_of_a_tokenizer_changes_no_number(project, plain, side):
    for folder in ("student", "teacher"):
        tokenizer = AutoTokenizer.from_pretrained(project / folder)
        tokenizer.padding_side = side
        tokenizer.save_pretrained(project / folder)
    assert losses(run(project)) == pytest.approx(plain[0], rel=1e-6)
