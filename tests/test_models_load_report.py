"""Weights that a folder lacks, has too many of, or in another shape: never random numbers, and no false alarm."""

import logging
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from kdtrain.errors import CheckpointError, PreflightError
from kdtrain.models.load_report import load_weights
from kdtrain.models.loading import load_model
from kdtrain.teachers import build_teacher
from tests import tiny, tiny_vision

UP = "model.layers.0.mlp.up_proj.weight"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SMALL, **experts, head_dim=16))


MODELS = {
    "tied": lambda: tiny.make_qwen3(seed=1),
    "untied": lambda: tiny.make_qwen3(seed=1, tie_word_embeddings=False),
    "soft-capped": tiny.make_gemma2,
    "experts": qwen3_moe,
    "further ahead": lambda: hf.Glm4ForCausalLM(
        hf.Glm4Config(**SMALL, head_dim=16, pad_token_id=0, num_nextn_predict_layers=1)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2)),
    "llama": tiny.make_llama,
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2)),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every model in a folder of its name."""
    root = tmp_path_factory.mktemp("saved")
    for name in MODELS:
        make(name).save_pretrained(root / name)
    return root


def changed(saved, name, target, change):
    """A copy of a model folder with other weights in it."""
    folder = shutil.copytree(saved / name, target / "changed")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


WRONG = {
    "no head": ("untied", lambda w: w.pop("lm_head.weight"), r"1 weight does not fit.*missing lm_head\.weight"),
    "no tied embedding": (
        "tied",
        lambda w: w.pop("model.embed_tokens.weight"),
        r"missing lm_head\.weight, missing model\.embed_tokens\.weight",
    ),
    "one weight dropped": ("tied", lambda w: w.pop(UP), rf"missing {UP}"),
    "one weight renamed": (
        "tied",
        lambda w: w.__setitem__(UP + "_", w.pop(UP)),
        rf"2 weights do.*missing {UP}, unknown {UP}_",
    ),
    "one weight too many": ("tied", lambda w: w.__setitem__("v_head.weight", torch.ones(2)), r"unknown v_head\.weight"),
    "another shape": ("llama", lambda w: w.__setitem__(UP, torch.ones(5, 32)), rf"{UP} of shape \[5, 32\] in place of"),
    "an expert dropped": (
        "experts",
        lambda w: w.pop(EXPERT),
        r"another shape: model\.layers\.0\.mlp\.experts\.gate_up",
    ),
    "an expert of another shape": (
        "experts",
        lambda w: w.__setitem__(EXPERT, torch.ones(3, 32)),
        r"another shape: model\.layers\.0\.mlp\.experts\.gate_up",
    ),
    "the last expert of all layers dropped": (
        "experts",
        lambda w: [w.pop(name) for name in list(w) if ".experts.3." in name],
        r"4 weights do.*experts\.down_proj of shape \[3, ",
    ),
    "many weights dropped": (
        "tied",
        lambda w: [w.pop(name) for name in list(w) if "mlp" in name],
        r"6 weights do.* and 1 more\. Copy",
    ),
    "a header whose data was never written": (
        "tied",
        lambda w: [value.zero_() for value in w.values()],
        r"15 of its 15 matrices hold nothing but zeros",
    ),
    "an embedding that was never written": (
        "untied",
        lambda w: w["model.embed_tokens.weight"].zero_(),
        r"1 of its 16 matrices hold nothing but zeros \(model\.embed_tokens\.weight\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("load", [load_model, build_teacher], ids=["student", "teacher"])
def test_weights_that_do_not_fit_the_architecture_are_refused_by_name(saved, tmp_path, load, name):
    model, change, message = WRONG[name]
    with pytest.raises(PreflightError, match=message):
        load(changed(saved, model, tmp_path, change))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_text_model_saves_is_loaded_as_it_was(saved, name, dtype):
    again = load_model(str(saved / name), dtype=dtype)
    for saved_parameter, parameter in zip(make(name).parameters(), again.parameters(), strict=True):
        assert torch.equal(saved_parameter.to(getattr(torch, dtype)), parameter.to(getattr(torch, dtype)))


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_what_a_vision_language_model_saves_is_no_false_alarm(tmp_path, family):
    tiny_vision.make_vlm(family).save_pretrained(tmp_path)
    load_model(str(tmp_path))


OLD = {
    "rotary frequencies": ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    "masks": ("gpt2", {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}),
    "a head that predicts further ahead": ("llama", {"mtp.fc.weight": torch.ones(2, 2)}),
    "a layer that predicts further ahead": ("further ahead", {"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}),
}


def test_blocks_that_begin_with_zeros_are_no_false_alarm(saved, tmp_path):
    def added(weights):
        for name in weights:
            if "layers.1" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name].zero_()

    load_model(changed(saved, "tied", tmp_path, added))


@pytest.mark.parametrize("name", OLD)
def test_what_older_versions_saved_beside_the_weights_is_no_false_alarm(saved, tmp_path, name):
    model, more = OLD[name]
    load_model(changed(saved, model, tmp_path, lambda weights: weights.update(more)))


def test_a_checkpoint_whose_weights_do_not_fit_names_them_too(saved, tmp_path):
    folder = changed(saved, "tied", tmp_path, lambda w: w.__setitem__(UP, torch.ones(5, 32)))
    with pytest.raises(CheckpointError, match=rf"{UP} of shape \[5, 32\]"):
        load_weights(tiny.make_qwen3(), folder)


def test_two_weights_that_the_config_calls_one_are_both_used_and_told(saved, tmp_path, caplog):
    embedding = "model.embed_tokens.weight"
    folder = changed(saved, "tied", tmp_path, lambda w: w.__setitem__("lm_head.weight", w[embedding] + 1))
    with caplog.at_level(logging.WARNING):
        model = load_model(folder)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)
    assert caplog.text.count("embedding and head are one weight") == 1
    assert "we will NOT tie" not in caplog.text
