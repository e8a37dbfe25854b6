"""Models that cannot be loaded as asked: one error that names the model and the reason, whatever a library raises."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from kdtrain.errors import PreflightError
from kdtrain.models.loading import add_adapter, load_model
from kdtrain.models.processing import load_tokenizer
from kdtrain.teachers import build_teacher
from tests import tiny
from tests.tiny_vision import make_vlm


@pytest.fixture
def folder(tmp_path, tokenizer):
    return tmp_path / tiny.save_model(tiny.make_qwen3(seed=1), tokenizer, tmp_path / "model")


def quantised(folder, method, **options):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": method, **options}}))


UNLOADABLE = {
    "an attention that is not installed": ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
    "an attention that there is not": ({"attn_implementation": "flush"}, 'attn_implementation="flush"'),
    "an unknown argument": (
        {"init_kwargs": {"dtyp": "auto"}},
        "neither its class nor its config takes the argument 'dtyp'",
    ),
    "a dtype that there is not": ({"dtype": "bfloat17"}, "dtype 'bfloat17': there is auto"),
    "a dtype of whole numbers": ({"dtype": "int8"}, "dtype 'int8': there is auto"),
    "an empty dtype": ({"init_kwargs": {"torch_dtype": ""}}, "dtype '': there is auto"),
    "a variant that is not there": ({"init_kwargs": {"variant": "fp16"}}, r"model\.fp16\.safetensors"),
    "a value that a library stumbles over": ({"init_kwargs": {"rope_parameters": 5}}, "rope"),
}


@pytest.mark.parametrize("name", UNLOADABLE)
def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(folder, name):
    options, reason = UNLOADABLE[name]
    with pytest.raises(PreflightError, match=reason) as caught:
        load_model(str(folder), **options)
    assert str(folder) in str(caught.value) or "dtype" in name
    assert "\n" not in str(caught.value)
    assert r"\n" not in str(caught.value)


def test_a_broken_tokenizer_is_named_too(folder):
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 5}}')
    with pytest.raises(PreflightError, match="No tokenizer could be loaded from"):
        load_tokenizer(str(folder))


def test_the_old_name_of_dtype_counts(folder):
    assert build_teacher(str(folder), init_kwargs={"torch_dtype": "bfloat16"}).module.dtype == torch.bfloat16
    assert build_teacher(str(folder), init_kwargs={"torch_dtype": torch.float16}).module.dtype == torch.float16


def test_an_unknown_way_of_quantising_is_refused_not_ignored(folder):
    quantised(folder, "of_tomorrow")
    with pytest.raises(
        PreflightError, match=r"does not know: quant_method 'of_tomorrow' in config\.json\. It knows .*gptq"
    ):
        load_model(str(folder))


@pytest.fixture
def fp8(tmp_path):
    """A folder with weights in FP8, in blocks of 128 x 128."""
    model = tiny.make_qwen3(seed=1, hidden=128)
    model.save_pretrained(tmp_path / "fp8")
    weights, saved = load_file(tmp_path / "fp8" / "model.safetensors"), {}
    for name, weight in weights.items():
        if "proj" in name:
            scale = weight.abs().max() / 448
            blocks = [-(-size // 128) for size in weight.shape]
            saved |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.expand(blocks).clone()}
        else:
            saved[name] = weight.bfloat16()
    save_file(saved, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    quantised(tmp_path / "fp8", "fp8", activation_scheme="dynamic", weight_block_size=[128, 128])
    return str(tmp_path / "fp8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has kernels for FP8")
def test_fp8_weights_on_a_cpu_are_expanded_where_bfloat16_is_asked_and_refused_elsewhere(fp8, tmp_path, caplog):
    for options in ({}, {"trained_in_full": True}, {"dtype": "float32"}):
        with pytest.raises(
            PreflightError, match=r"quantised \(fp8\).*expanded to bfloat16 only, and torch.float32 is asked"
        ):
            load_model(fp8, **options)
    with caplog.at_level(logging.WARNING):
        model = load_model(fp8, dtype="bfloat16")
    assert "fp8 weights; they are expanded to bfloat16" in caplog.text
    plain, ids = tiny.make_qwen3(seed=1, hidden=128), torch.tensor([[5, 9, 20, 7]])
    assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() < 2
    model.save_pretrained(tmp_path / "again")
    again = load_model(str(tmp_path / "again"), dtype="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "old_name"), [("llava", "model.language_model.model"), ("qwen2_5_vl", "model.model")]
)
def test_an_adapter_with_old_names_is_refused_only_where_peft_would_lose_its_weights(tmp_path, family, old_name):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_vlm(family, seed=1), lora)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    saved = {name.replace("model.model.language_model", old_name): p for name, p in load_file(weights).items()}
    save_file(saved, weights)
    if family == "qwen2_5_vl":
        with pytest.raises(PreflightError, match=f"lacks {len(saved)} of its weights"):
            add_adapter(make_vlm(family, seed=1), str(tmp_path))
        return
    loaded = dict(add_adapter(make_vlm(family, seed=1), str(tmp_path), trained=True).named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters() if "lora_" in name)
    assert [name for name, p in loaded.items() if p.requires_grad] == [name for name in loaded if "lora_" in name]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_loaded_or_refused(tmp_path, kind):
    model = get_peft_model(tiny.make_qwen3(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path)
    loaded = add_adapter(tiny.make_qwen3(), str(tmp_path))
    assert torch.equal(loaded.prompt_encoder.default.embedding.weight, model.prompt_encoder.default.embedding.weight)
    save_file({"other": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PreflightError, match="could not be loaded"):
        add_adapter(tiny.make_qwen3(), str(tmp_path))
