"""What of the student is trained: names of a PEFT config, tied weights, what PEFT refuses, and nothing at all."""

import logging

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from kdtrain.errors import PreflightError
from kdtrain.models.tuning import check_trained, drop_unsupported_checkpointing, fitted_adapter
from tests import tiny
from tests.tiny_families import make

CPU = torch.device("cpu")


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.fixture
def untied():
    return tiny.make_qwen3(tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_prjo"]},
            r"target_modules: \w+ has nothing called 'v_prjo' \(did you mean 'v_proj'",
        ),
        ({"target_modules": ["proj"]}, r"target_modules: \w+ has nothing called 'proj'"),
        (
            {"modules_to_save": ["lm_headd"]},
            r"modules_to_save: \w+ has nothing called 'lm_headd' \(did you mean 'lm_head'",
        ),
        ({"target_parameters": ["q_proj.wieght"]}, r"target_parameters: .*'q_proj.wieght'"),
        (
            {"target_modules": ["q_prjo", "k_prjo"], "modules_to_save": ["lm_headd"]},
            r"'k_prjo'.*'q_prjo'.*'lm_headd'",
        ),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.v_proj"},
            r"target_modules: 'v_proj' matches modules only that are left out",
        ),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest_one(untied, options, message):
    with pytest.raises(PreflightError, match=message):
        fitted_adapter(untied, lora(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*q_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "lm_head"]},
        {"modules_to_save": ["norm", "model.embed_tokens"]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]},
    ],
)
def test_names_that_match_are_let_through_as_they_are(untied, options):
    config = lora(**options)
    assert fitted_adapter(untied, config) is config


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"ensure_weight_tying": True}])
def test_an_adapter_on_one_of_two_tied_weights_is_refused_with_the_reason(name, options):
    config = lora(target_modules=["q_proj", name], **options)
    with pytest.raises(PreflightError, match=r"is tied to that of .*a merge would change both sides.*modules_to_save"):
        fitted_adapter(tiny.make_qwen3(), config)
    with pytest.raises(PreflightError, match="is tied to that of"):
        fitted_adapter(tiny.make_qwen3(), lora(target_modules=rf".*(q_proj|{name})", **options))


def test_a_trained_copy_of_a_tied_head_is_the_same_after_reload_and_merge(tmp_path):
    """Which is why it is not refused."""
    config = fitted_adapter(tiny.make_qwen3(seed=1), lora(modules_to_save=["lm_head"]))
    model = get_peft_model(tiny.make_qwen3(seed=1), config)
    ids = torch.tensor([[5, 9, 20, 7, 33]])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        trained = model.eval()(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        merged = PeftModel.from_pretrained(tiny.make_qwen3(seed=1), tmp_path / "adapter").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(merged.eval()(input_ids=ids).logits, trained, atol=1e-5)
        assert torch.allclose(again(input_ids=ids).logits, trained, atol=1e-5)


SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
SSM = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
MAMBAS = {
    "mamba": lambda: hf.MambaConfig(**SMALL),
    "mamba2": lambda: hf.Mamba2Config(**SMALL, num_heads=4, head_dim=16, n_groups=1, state_size=16),
    "falcon_mamba": lambda: hf.FalconMambaConfig(**SMALL),
    "falcon_h1": lambda: hf.FalconH1Config(**SMALL, **HEADS, **SSM),
    "nemotron_h": lambda: make("nemotron_h").config,
}


@pytest.mark.parametrize("family", MAMBAS)
def test_all_linear_leaves_out_what_peft_refuses_and_says_so(family, caplog):
    model, config = hf.AutoModelForCausalLM.from_config(MAMBAS[family]()), lora(target_modules="all-linear")
    with caplog.at_level(logging.WARNING):
        fitted = fitted_adapter(model, config)
    left_out = "dt_proj and out_proj" if family in ("mamba", "falcon_mamba") else "out_proj"
    assert f"all-linear leaves out {left_out}: {family} models" in caplog.text
    assert config.exclude_modules is None
    adapted = {
        name.split(".lora_")[0].rpartition(".")[2] for name, _ in get_peft_model(model, fitted).named_parameters()
    }
    assert "in_proj" in adapted
    assert not {"dt_proj", "out_proj"} & adapted
    both = fitted_adapter(model, lora(target_modules="all-linear", exclude_modules=r".*\.x_proj"))
    assert both.exclude_modules == rf"(?:.*\.x_proj)|(?:.*\.)?(?:{left_out.replace(' and ', '|')})"


def test_all_linear_leaves_out_weights_that_modules_share_so_that_a_merge_changes_nothing(caplog):
    """A Zamba2 repeats blocks; named, they are refused."""
    with pytest.raises(PreflightError, match="is tied to that of"):
        fitted_adapter(make("zamba2"), lora())
    for options in ({}, {"exclude_modules": r".*\.in_proj"}):
        caplog.clear()
        fitted = fitted_adapter(make("zamba2"), lora(target_modules="all-linear", init_lora_weights=False, **options))
        assert "leaves out 20 modules that share their weight with another (model.layers.1.shared_" in caplog.text
        model = get_peft_model(make("zamba2"), fitted).eval()
        adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
        assert adapted
        assert not [name for name in adapted if "shared" in name or ("in_proj" in name and options)]
        ids = torch.tensor([[5, 9, 20, 7, 33]])
        with torch.no_grad():
            before = model(input_ids=ids).logits
            assert torch.allclose(model.merge_and_unload()(input_ids=ids).logits, before, atol=1e-4)


def test_an_exclusion_that_matches_nothing_is_told_and_changes_nothing(untied, caplog):
    config = lora(exclude_modules=["vision_tower", "v_prjo"])
    assert fitted_adapter(untied, config) is config
    assert "exclude_modules: Qwen3ForCausalLM has nothing called 'vision_tower'" in caplog.text
    assert "'v_prjo' (did you mean 'v_proj'?): nothing is left out by it" in caplog.text


def test_a_student_without_a_trained_parameter_is_refused(untied):
    check_trained(untied, CPU)
    with pytest.raises(PreflightError, match=r"Not one parameter of the student \(Qwen3ForCausalLM\) is trained"):
        check_trained(untied.requires_grad_(False), CPU)


def test_attention_without_a_backward_pass_is_refused(untied):
    untied.config._attn_implementation = "flex_attention"
    with pytest.raises(PreflightError, match=r"flex_attention has no backward pass on a CPU"):
        check_trained(untied, CPU)
    check_trained(untied, torch.device("cuda"))


def test_checkpointing_is_off_where_a_class_has_none(untied, caplog, tmp_path):
    from trl.experimental.gkd import GKDConfig

    for model, expected in (
        (untied, True),
        (hf.CTRLLMHeadModel(hf.CTRLConfig(n_embd=32, dff=64, n_layer=1, n_head=2)), False),
    ):
        args = GKDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
        with caplog.at_level(logging.WARNING):
            drop_unsupported_checkpointing(model, args)
        assert args.gradient_checkpointing is expected
        assert getattr(args, "activation_checkpointing", expected) is expected  # not before transformers 5.23
        assert ("CTRLLMHeadModel does not support it" in caplog.text) is not expected
