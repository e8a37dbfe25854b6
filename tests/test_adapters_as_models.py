"""Folders of adapters where a model is asked for: gone on with, merged, taught by, evaluated; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdtrain.config.load import check_config
from kdtrain.models import loading
from kdtrain.models.loading import add_adapter, load_merged
from kdtrain.models.merging import merge_adapter
from tests import tiny
from tests.test_cli import kdtrain  # noqa: F401 - a fixture
from tests.test_trainer import make_trainer
from tests.tiny_vision import make_vlm

IDS = torch.arange(4, 24)[None]
PLAIN = {"target_modules": "all-linear"}
KINDS = {
    "lora": PLAIN,
    "dora": {**PLAIN, "use_dora": True},
    "a trained copy of the tied head": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "a trained copy of the tied embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "new tokens": {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [4, 9]}},
}


def save_adapter(base, folder, *, seed=0, scale=0.1, **options):
    """An adapter on a model's folder, all of whose weights are far from what they begin with."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        tiny.lora_config(rank=4, alpha=8, dropout=0.0, **(options or PLAIN)),
    )
    model.save_pretrained(folder)
    file = Path(folder) / "adapter_model.safetensors"
    save_file({name: w + scale * torch.randn_like(w) for name, w in load_file(file).items()}, file)
    return str(folder)


@pytest.fixture
def base(tmp_path, tokenizer):
    return tiny.save_model(tiny.make_qwen3(seed=1), tokenizer, tmp_path / "base")


@torch.no_grad()
def logits(model, ids=IDS):
    return model.double().eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_base_and_adapter_and_its_saved_form_too(base, tmp_path, kind):
    folder = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    before, expected = logits(plain), logits(PeftModel.from_pretrained(plain, folder))
    merged = load_merged(folder, dtype="float32")
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (expected - before).abs().max() > 0.1
    for model in (merged, again):
        assert not isinstance(model, PeftModel)
        assert (logits(model) - expected).abs().max() < 1e-5


# The adapter, and whether embedding and head are one weight.
OF_NEW_TOKENS = {
    "lora": (PLAIN, True),
    "dora": ({**PLAIN, "use_dora": True}, False),
    "copies of embedding and head": ({**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "a copy of the tied embedding": ({**PLAIN, "modules_to_save": ["embed_tokens"]}, True),
    "the new rows alone": (
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [320, 321]}},
        True,
    ),
    "on the embedding": ({"target_modules": ["v_proj", "embed_tokens"]}, False),
    "on the head": ({"target_modules": ["v_proj", "lm_head"]}, False),
}


@pytest.mark.parametrize("kind", OF_NEW_TOKENS)
def test_a_model_with_new_tokens_computes_the_same_trained_reloaded_and_merged(tmp_path, kind):
    """`resize_token_embeddings` before LoRA, as for tokens of tools: PEFT saves more or less of it by its own rules."""
    options, tied = OF_NEW_TOKENS[kind]
    tokenizer, model = tiny.make_tokenizer(), tiny.make_qwen3(seed=1, layers=1, tie_word_embeddings=tied)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    model.resize_token_embeddings(len(tokenizer))
    base, ids = tiny.save_model(model, tokenizer, tmp_path / "base"), torch.tensor([[4, 320, 9, 321, 7]])
    turns = [{"role": "user", "content": "<tool>"}, {"role": "assistant", "content": "</tool>the path"}]
    adapter = tiny.lora_config(rank=4, alpha=8, dropout=0.0, **options)
    trainer = make_trainer(
        tmp_path / "run", AutoModelForCausalLM.from_pretrained(base), tiny.make_qwen3(322, layers=1, seed=2),
        [{"messages": turns}] * 4, tokenizer, {"peft_config": adapter}, learning_rate=0.1, max_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    expected, run = logits(trainer.model, ids), str(tmp_path / "run")
    assert (expected - logits(model, ids)).abs().max() > 0.1
    merged = load_merged(run, dtype="float32")
    merged.save_pretrained(tmp_path / "merged")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
    for found in (reloaded, merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        assert (logits(found, ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_a_sum_is_taken_in_float32_and_rounded_once(base, tmp_path, dora):
    folder = save_adapter(base, tmp_path / "adapter", scale=0.02, **PLAIN, use_dora=dora)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16"), folder)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    parts = (layer.base_layer.weight, layer.lora_B.default.weight, layer.lora_A.default.weight)
    weight, up, down = (one.detach().double() for one in parts)
    expected = weight + 2.0 * up @ down
    if dora:
        magnitude = layer.lora_magnitude_vector.default.weight.detach().double()
        expected = magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    found = merge_adapter(model).model.layers[0].self_attn.q_proj.weight
    assert found.dtype == torch.bfloat16
    rounded, rounded_twice = expected.float().bfloat16(), weight.bfloat16() + (2.0 * up @ down).bfloat16()
    # A tie of the rounding apart.
    assert (found != rounded).sum() <= 1 < (rounded_twice != rounded).sum()


def test_quantised_weights_take_no_adapter(base, tmp_path):
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base), save_adapter(base, tmp_path / "adapter"))
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(loading.PreflightError, match="Name the model before it was quantised"):
        merge_adapter(model)


def test_a_head_that_is_a_copy_is_tied_no_more_in_any_config():
    model = make_vlm("gemma3")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    merged = merge_adapter(get_peft_model(model, tiny.lora_config(rank=2, alpha=4, dropout=0.0, **options)))
    assert merged.config.tie_word_embeddings is merged.config.text_config.tie_word_embeddings is False


def test_an_adapter_on_an_adapter_stands_on_the_two_merged(base, tmp_path):
    lower = save_adapter(base, tmp_path / "lower", seed=1)
    merged = load_merged(lower, dtype="float32")
    merged.save_pretrained(tmp_path / "merged")
    upper = save_adapter(tmp_path / "merged", tmp_path / "upper", seed=2)
    expected = logits(PeftModel.from_pretrained(merged, upper))
    _name_base(upper, lower)
    assert (logits(load_merged(upper, dtype="float32")) - expected).abs().max() < 1e-5
    assert (logits(loading.load_with_adapter(upper, dtype="float32")) - expected).abs().max() < 1e-5


def test_an_adapter_that_stands_on_itself_is_refused(base, tmp_path):
    folder = save_adapter(base, tmp_path / "adapter")
    _name_base(folder, folder)
    with pytest.raises(loading.PreflightError, match=r"stands on itself\. Correct base_model_name_or_path"):
        load_merged(folder)


def _name_base(folder, base):
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))


def test_an_adapter_on_the_hub_is_downloaded(base, tmp_path, monkeypatch):
    folder = save_adapter(base, tmp_path / "adapter")
    asked = []
    monkeypatch.setattr(loading, "snapshot_download", lambda name, **_: asked.append(name) or folder)
    add_adapter(AutoModelForCausalLM.from_pretrained(base), "org/adapter")
    assert asked == ["org/adapter"]


# ---- runs ------------------------------------------------------------------------------------------------------------

FAST = ("training.learning_rate=1e-2", "training.eval_strategy=no")


def adapter_weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_run_folder_with_an_adapter_is_gone_on_with_taught_by_and_trained_in_full(project, kdtrain):  # noqa: F811
    lora = ("tuner.train_type=lora", *FAST)
    assert kdtrain("fit", "config.yaml", *lora, "tuner.lora_rank=4", "training.output_dir=first")[0] == 0
    first = adapter_weights(project / "first")

    # The same adapter goes on: its rank, its base, and where it begins.
    code, _, err = kdtrain(
        "fit", "config.yaml", *lora, "model.model=first", "tuner.lora_rank=8", "training.output_dir=second",
        "training.learning_rate=1e-9",
    )  # fmt: skip
    assert code == 0, err
    assert "tuner.lora_rank: has no effect" in err
    second = adapter_weights(project / "second")
    assert second.keys() == first.keys()
    assert all(torch.allclose(second[name], weight, atol=1e-6) for name, weight in first.items())
    names = json.loads((project / "second" / "adapter_config.json").read_text())
    assert names["base_model_name_or_path"] == str(project / "student")

    # model.adapter on a base that is named is the same.
    code, _, err = kdtrain("fit", "config.yaml", *lora, "model.adapter=first", "training.output_dir=third",
                           "training.learning_rate=1e-9")  # fmt: skip
    assert code == 0, err
    assert all(torch.equal(weight, second[name]) for name, weight in adapter_weights(project / "third").items())

    # In full, and as a teacher.
    more = ("model.model=second", "rlhf.teacher_model=first", "training.output_dir=full", "training.max_steps=1")
    code, _, err = kdtrain("fit", "config.yaml", *more, "training.learning_rate=1e-9")
    assert code == 0, err
    trained = AutoModelForCausalLM.from_pretrained(project / "full")
    merged = load_merged(str(project / "second"), dtype="float32")
    assert (logits(trained) - logits(merged)).abs().max() < 1e-4

    # What a run made of an adapter is evaluated against the adapter before.
    code, out, err = kdtrain("evaluate", "second", "--json")
    assert code == 0, err
    models = json.loads(out)["models"]
    assert models["before"]["ce"] == pytest.approx(models["after"]["ce"], abs=1e-5)


def found(project, *overrides):
    return [(one.path, f"{one.message} {one.hint}") for one in check_config(project / "config.yaml", overrides).errors]


def test_model_adapter_needs_lora_and_a_folder_that_is_there(project):
    (project / "adapter").mkdir()
    (project / "adapter" / "adapter_config.json").write_text("{}")
    ((path, text),) = found(project, "model.adapter=adapter")
    assert (path, "set tuner.train_type: lora" in text) == ("model.adapter", True)
    ((path, text),) = found(project, "model.adapter=./gone", "tuner.train_type=lora")
    assert (path, "no such folder" in text) == ("model.adapter", True)


def test_an_adapter_without_its_base_is_found_without_torch(project, base):
    folder = save_adapter(base, project / "adapter")
    _name_base(folder, project / "gone")
    ((path, text),) = found(project, f"model.model={folder}")
    assert path == "model.model"
    assert "gone is not there. Correct base_model_name_or_path" in text
