"""Tiny language models of many families, made from their config classes, for what must hold of all of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

VOCABULARY = 320
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1, "max_position_embeddings": 256}
_HEADS = {**_GROUPED, "head_dim": 16}
_ENCODER = {**_COMMON, "max_position_embeddings": 64}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_DELTA = {f"linear_{kind}_head_dim": 16 for kind in ("key", "value")}
_DELTA |= {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
_BART |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
_BART |= {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}

# The config's class and what it is given.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    # They see later tokens.
    "bert": (hf.BertConfig, _ENCODER),
    "roberta": (hf.RobertaConfig, _ENCODER),
    "electra": (hf.ElectraConfig, {**_ENCODER, "embedding_size": 32}),
    "xlnet": (
        hf.XLNetConfig,
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "initializer_range": 0.1},
    ),
    "bigbird": (hf.BigBirdConfig, _ENCODER),
    "roformer": (hf.RoFormerConfig, {**_ENCODER, "embedding_size": 32}),
    # Learned positions, or positions that end in another way.
    "gpt2": (hf.GPT2Config, {**_COMMON, "n_positions": 64}),
    "opt": (hf.OPTConfig, {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "gpt_neo": (
        hf.GPTNeoConfig,
        {
            **_COMMON,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
        },
    ),
    "biogpt": (hf.BioGptConfig, {**_COMMON, "max_position_embeddings": 64}),
    "roberta_decoder": (hf.RobertaConfig, {**_ENCODER, "is_decoder": True}),
    "bart_decoder": (
        hf.BartConfig,
        {"vocab_size": VOCABULARY, **_BART, "is_decoder": True, "is_encoder_decoder": False, "init_std": 0.1},
    ),
    "mpt": (
        hf.MptConfig,
        {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    "ctrl": (hf.CTRLConfig, {**_COMMON, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "gptj": (
        hf.GPTJConfig,
        {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 64},
    ),
    # Positions without an end.
    "bloom": (hf.BloomConfig, {**_COMMON, "n_head": 2, "n_layer": 2}),
    "falcon": (hf.FalconConfig, {**_COMMON, "alibi": True}),
    "xglm": (
        hf.XGLMConfig,
        {**_COMMON, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 64},
    ),
    "llama": (hf.LlamaConfig, _GROUPED),
    "qwen3": (hf.Qwen3Config, _HEADS),
    "gemma2": (hf.Gemma2Config, _HEADS),
    "gemma3": (hf.Gemma3TextConfig, {**_HEADS, "sliding_window": 8}),
    "cohere2": (hf.Cohere2Config, {**_HEADS, "sliding_window": 8}),
    "gpt_neox": (hf.GPTNeoXConfig, _GROUPED),
    "phi3": (hf.Phi3Config, {**_GROUPED, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    "llama_dynamic": (
        hf.LlamaConfig,
        {
            **_GROUPED,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    # Experts.
    "mixtral": (hf.MixtralConfig, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (hf.Qwen3MoeConfig, {**_HEADS, **_EXPERTS}),
    "gpt_oss": (hf.GptOssConfig, {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        hf.DeepseekV3Config,
        {
            **_GROUPED,
            "num_key_value_heads": 2,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4": (
        hf.Llama4TextConfig,
        {
            **_HEADS,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8,
        },
    ),
    # Recurrent layers, convolutions, linear attention.
    "rwkv": (hf.RwkvConfig, {**_COMMON, "attention_hidden_size": 32, "context_length": 64}),
    "minimax": (
        hf.MiniMaxConfig,
        {
            **_HEADS,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "mamba": (hf.MambaConfig, {**_COMMON, "state_size": 4}),
    "mamba2": (
        hf.Mamba2Config,
        {**_COMMON, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    ),
    "falcon_mamba": (hf.FalconMambaConfig, {**_COMMON, "state_size": 4}),
    "falcon_h1": (hf.FalconH1Config, {**_HEADS, **_MAMBA, "mamba_d_ssm": 64}),
    "bamba": (hf.BambaConfig, {**_GROUPED, **_MAMBA, "attn_layer_indices": [1]}),
    "zamba2": (
        hf.Zamba2Config,
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "num_mem_blocks": 1,
            "chunk_size": 4,
            "adapter_rank": 4,
            "attention_head_dim": 32,
            "attention_hidden_size": 64,
        },
    ),
    "nemotron_h": (
        hf.NemotronHConfig,
        {
            **_HEADS,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
    ),
    "recurrent_gemma": (
        hf.RecurrentGemmaConfig,
        {**_HEADS, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    ),
    "lfm2": (hf.Lfm2Config, {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "jamba": (
        hf.JambaConfig,
        {
            **_GROUPED,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": (
        hf.Qwen3NextConfig,
        {
            **_HEADS,
            **_EXPERTS,
            **_DELTA,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "granite_hybrid": (
        hf.GraniteMoeHybridConfig,
        {
            **_GROUPED,
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 32,
        },
    ),
}
SEE_THE_FUTURE = ("bert", "roberta", "electra", "xlnet", "bigbird", "roformer")


def make(family: str, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of some ten thousand parameters."""
    torch.manual_seed(seed)
    kind, settings = FAMILIES[family]
    return hf.AutoModelForCausalLM.from_config(kind(**{**settings, **changes})).eval()
