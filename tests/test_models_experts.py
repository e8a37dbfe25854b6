"""Mixture-of-experts students: sampling, what is saved, and a load-balancing loss that is what it says."""

import pytest
import torch
import transformers as hf

from kdtrain.errors import PreflightError
from kdtrain.models.experts import has_experts
from tests import tiny
from tests.test_trainer import make_trainer

COMMON = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.2, "eos_token_id": 2,
    "pad_token_id": 3, "bos_token_id": None, "router_aux_loss_coef": 0.1, "num_experts_per_tok": 2,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def qwen3_moe(**kwargs):
    options = {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, **kwargs}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**COMMON, **options}))


def mixtral(**kwargs):
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**COMMON, "num_local_experts": 4, **kwargs}))


def qwen3_next(**kwargs):
    options = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 16}
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**{**COMMON, **LINEAR, **options, **kwargs}))


def jamba(**kwargs):
    options = {
        "num_experts": 4, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2,
        "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 4,
        "use_mamba_kernels": False, "bos_token_id": 1,
    }  # fmt: skip
    return hf.JambaForCausalLM(hf.JambaConfig(**{**COMMON, **options, **kwargs}))


def granite_hybrid(**kwargs):
    options = {
        "num_local_experts": 4, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32,
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1,
        "bos_token_id": 1,
    }  # fmt: skip
    return hf.GraniteMoeHybridForCausalLM(hf.GraniteMoeHybridConfig(**{**COMMON, **options, **kwargs}))


FAMILIES = {f.__name__: f for f in (qwen3_moe, mixtral, qwen3_next, jamba, granite_hybrid)}
WITHOUT = {
    "qwen3_moe": {"mlp_only_layers": [0, 1]},
    "qwen3_next": {"num_experts": 0},
    "jamba": {"num_experts": 1, "num_experts_per_tok": 1},
    "granite_hybrid": {"num_local_experts": 0},
}


def make(family, **kwargs):
    torch.manual_seed(0)
    model = FAMILIES[family](**kwargs)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", tiny.one_in(3, FAMILIES))
def test_an_on_policy_run_with_experts_trains_and_what_it_saves_generates(tmp_path, family):
    trainer = make_trainer(
        tmp_path, make(family), tiny.make_qwen3(seed=2), rows=tiny.CHATS[:2], lmbda=1.0, max_steps=1, max_new_tokens=3
    )
    trainer.train()
    record = trainer.state.log_history[0]
    assert record["on_policy_fraction"] == 1
    assert record["aux_loss"] > 0.01
    assert record["loss"] == pytest.approx(record["llm_kd_loss"] + record["aux_loss"], rel=1e-5)
    trainer.save_model()
    saved = hf.AutoConfig.from_pretrained(tmp_path)
    assert saved.output_router_logits is False
    assert saved.router_aux_loss_coef == 0.1
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.generate(torch.tensor([[70, 71, 72]]), max_new_tokens=3, do_sample=False).shape[1] >= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_balancing_loss_is_the_models_own(tmp_path, family):
    trainer = make_trainer(tmp_path, make(family), tiny.make_qwen3(seed=2), router_aux_loss_coef=0.5)
    assert trainer._objective.fused
    batch = trainer.data_collator(tiny.CHATS[:3])
    trainer.compute_loss(trainer.model.eval(), batch)
    own = trainer.model(**batch.model_inputs, output_router_logits=True).aux_loss
    assert trainer._metrics["eval"]["aux_loss"][-1].item() == pytest.approx(0.5 * own.item(), rel=1e-5)


def test_a_config_that_asks_for_router_logits_keeps_its_word_and_still_samples(tmp_path):
    student = make("mixtral", output_router_logits=True)
    trainer = make_trainer(tmp_path, student, tiny.make_qwen3(seed=2), lmbda=1.0, router_aux_loss_coef=0.0)
    assert (student.config.output_router_logits, student.config.router_aux_loss_coef) == (True, 0.1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]
    assert student.config.output_router_logits is True


def test_a_student_given_by_its_name_is_saved_as_its_folder_says(tmp_path, tokenizer):
    folder = tiny.save_model(make("mixtral"), tokenizer, tmp_path / "student")
    trainer = make_trainer(tmp_path / "run", folder, tiny.make_qwen3(seed=2), router_aux_loss_coef=0.7)
    assert trainer.router_aux_loss_coef == 0.7
    assert trainer.model.config.output_router_logits is False
    assert trainer.model.config.router_aux_loss_coef == 0.1


@pytest.mark.parametrize("family", WITHOUT)
@pytest.mark.parametrize("asked", [tiny.slow(False), True])
def test_a_mixture_class_without_experts_has_no_load_balancing_loss(tmp_path, family, asked):
    student = make(family, output_router_logits=asked, **WITHOUT[family])
    assert not has_experts(student)
    trainer = make_trainer(tmp_path, student, tiny.make_qwen3(seed=2), lmbda=1.0, max_new_tokens=2, sft_alpha=0.1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]


@pytest.mark.parametrize("lora", [False, True])
def test_reentrant_checkpointing_of_experts_is_refused(tmp_path, lora):
    from tests.tiny import lora_config

    peft = lora_config(rank=2, alpha=4, dropout=0, target_modules=["q_proj"], modules_to_save=None, use_dora=False)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    extra = {"peft_config": peft} if lora else None
    with pytest.raises(PreflightError, match="use_reentrant: false"):
        make_trainer(tmp_path, make("mixtral"), tiny.make_qwen3(seed=2), extra=extra, **options)
    make_trainer(tmp_path, make("mixtral"), tiny.make_qwen3(seed=2), extra=extra, router_aux_loss_coef=0.0, **options)


def train_uneven(folder, world):
    """Five rows in batches of two: with two ranks, one of them has only repeated rows at the end of the epoch."""
    trainer = make_trainer(
        folder, make("mixtral"), tiny.make_qwen3(seed=2), rows=tiny.CHATS[:5], sft_alpha=0.3, optim="sgd",
        per_device_train_batch_size=1, gradient_accumulation_steps=6 // world, max_steps=1, learning_rate=0.1,
        train_sampling_strategy="sequential", max_grad_norm=1e9, router_aux_loss_coef=1.0,
    )  # fmt: skip
    trainer.train()
    record = trainer.state.log_history[0]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {key: record[key] for key in ("loss", "aux_loss", "grad_norm")}, weights.tolist()


def test_a_row_repeated_at_an_epochs_end_is_balanced_once(tmp_path):
    expected, weights = train_uneven(tmp_path / "one", 1)
    for record, its_weights in tiny.run_ranks(train_uneven, 2, tmp_path / "two", 2):
        assert record == pytest.approx(expected, rel=1e-5)
        assert its_weights == pytest.approx(weights, abs=1e-6)
