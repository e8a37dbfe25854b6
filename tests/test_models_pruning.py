"""A student cut out of its teacher: what is dropped did nothing, what stays is as it was, the folder says it all."""

import pytest
import torch
import transformers as hf

from kdtrain.errors import ConfigError, NotAvailableError
from kdtrain.models.importance import Importance, Row, look
from kdtrain.models.loading import load_model
from kdtrain.models.pruned_config import NARROWED, SHORTENED, check_layers, check_width, require_known
from kdtrain.models.pruning import keep_layers, layers_of, most_important, narrow, width_axes
from tests import tiny

HIDDEN, INNER, LAYERS, WIDTH = 48, 96, 4, 32
BASE = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
    "bos_token_id": None,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-12,  # which is not scaled with the width
}
HEADS = {**BASE, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXED = {"sliding_window": 8, "sliding_window_pattern": 2}
FAMILIES = {
    "qwen3": (hf.Qwen3Config, {**HEADS, "tie_word_embeddings": True}),
    "gemma3_text": (hf.Gemma3TextConfig, {**HEADS, **MIXED}),
    "phi3": (hf.Phi3Config, BASE),
    "qwen2": (hf.Qwen2Config, {**BASE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "llama": (hf.LlamaConfig, {**BASE, "attention_bias": True, "mlp_bias": True}),
    "gemma": (hf.GemmaConfig, {**HEADS, "tie_word_embeddings": False}),
    "gemma2": (hf.Gemma2Config, {**HEADS, "sliding_window": 8}),
    "granite": (hf.GraniteConfig, {**BASE, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "mistral": (hf.MistralConfig, {**BASE, "sliding_window": 8}),
    "olmo2": (hf.Olmo2Config, BASE),
    "smollm3": (hf.SmolLM3Config, {**BASE, "no_rope_layer_interval": 2}),
    "gpt_oss": (hf.GptOssConfig, {**HEADS, **LOCAL, "sliding_window": 8}),
    "mixtral": (hf.MixtralConfig, {**BASE, **LOCAL}),
    "qwen2_moe": (hf.Qwen2MoeConfig, {**BASE, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": (hf.Qwen3MoeConfig, {**HEADS, **EXPERTS, "decoder_sparse_step": 2}),
}
IDS = torch.randint(4, 128, (1, 24), generator=torch.Generator().manual_seed(0))
ROWS = [
    Row(ids, [-100] * 3 + ids[3:])
    for ids in (torch.randint(4, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 24))
]


def make(family):
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(kind(**settings)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0.0 if weight.ndim > 1 else 1.0, 0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def seen_by(model, axes):
    importance = Importance(layers_of(model), axes.norms(model), axes.readers(model))
    ce = look(model, ROWS, importance)
    importance.remove()
    return importance.seen(ce)


def empty(model, axes):
    """Write zeros into a third of the channels and of each MLP's neurons, and return what is computed then."""
    channels, neurons = torch.randperm(HIDDEN)[: HIDDEN - WIDTH], torch.randperm(INNER)[: INNER // 3]
    weights = dict(model.named_parameters())
    for name, of in axes.hidden.items():
        for axis in of:
            weights[name].data.index_fill_(axis, channels, 0.0)
    for name, of in axes.inner.items():
        for axis in of:
            for start in range(0, weights[name].shape[axis], INNER):
                weights[name].data.index_fill_(axis, neurons + start, 0.0)
    return logits(model)


def test_the_families_are_those_that_are_known():
    assert set(FAMILIES) == {*NARROWED, *SHORTENED}


@pytest.mark.parametrize("family", tiny.one_in(3, [name for name in FAMILIES if name in NARROWED]))
def test_channels_and_neurons_that_are_zero_are_found_and_not_missed(family):
    model = make(family)
    axes = width_axes(model)
    expected, heads = empty(model, axes), model.config.num_attention_heads
    narrow(model, WIDTH, seen_by(model, axes), axes)
    assert (model.config.hidden_size, model.config.intermediate_size, model.config.num_attention_heads) == (
        32,
        64,
        heads,
    )
    assert model.get_input_embeddings().weight.shape == (128, WIDTH)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.one_in(3, FAMILIES))
def test_the_folder_of_a_model_without_a_layer_computes_the_same(family, tmp_path):
    model = make(family)
    if family in NARROWED:
        axes = width_axes(model)
        narrow(model, WIDTH, seen_by(model, axes), axes)
    keep_layers(model, [0, 2, 3])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype="float32").eval()
    assert torch.equal(logits(again), expected)
    assert len(layers_of(again)) == again.config.num_hidden_layers == 3
    written = [again.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*written)


def test_all_layers_are_the_model_itself():
    model = make("qwen3")
    expected = logits(model)
    keep_layers(model, range(LAYERS))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_layer_that_changes_nothing_is_found_and_not_missed(family):
    model = make(family)
    idle = layers_of(model)[2]
    writers = (idle.self_attn.o_proj, idle.mlp.down_proj)
    for weight in (writer.weight for writer in writers):
        weight.data.zero_()
    expected = logits(model)
    kept = most_important(seen_by(model, width_axes(model)).layers, 3)
    assert kept == [0, 1, 3]
    keep_layers(model, kept)
    assert torch.equal(logits(model), expected)


def test_scores_are_those_of_a_plain_loop_in_float64():
    model = make("qwen3").double()
    axes = width_axes(model)
    found = seen_by(model, axes)
    cosines, tokens, loss, labelled = torch.zeros(LAYERS), 0, 0.0, 0
    channels, neurons = {}, {}
    for row in ROWS:
        ids = torch.tensor([row.input_ids])
        x = model.model.embed_tokens(ids)[0]
        position = torch.arange(len(x))[None]
        rotary = model.model.rotary_emb(x[None], position)
        causal = torch.full((len(x), len(x)), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        for number, layer in enumerate(model.model.layers):
            normed = layer.input_layernorm(x)
            written, _ = layer.self_attn(normed[None], position_embeddings=rotary, attention_mask=causal)
            middle = x + written[0]
            second = layer.post_attention_layernorm(middle)
            mlp = layer.mlp
            inner = torch.nn.functional.silu(mlp.gate_proj(second)) * mlp.up_proj(second)
            after = middle + mlp.down_proj(inner)
            for t in range(len(x)):
                cosines[number] += x[t] @ after[t] / (x[t] @ x[t] * (after[t] @ after[t])).sqrt()
            for name, value in ((number, normed), (number + 0.5, second)):
                channels[name] = channels.get(name, 0) + value.abs().mean(0) ** 2
            neurons[number] = neurons.get(number, 0) + inner.abs().mean(0) ** 2
            x = after
        last = model.model.norm(x)
        channels["last"] = channels.get("last", 0) + last.abs().mean(0) ** 2
        tokens += len(x)
        for t in range(len(x) - 1):
            if (label := row.labels[t + 1]) != -100:
                loss -= torch.log_softmax(model.lm_head(last[t]), -1)[label].item()
                labelled += 1
    torch.testing.assert_close(torch.tensor(found.layers), (1 - cosines / tokens).float())
    expected = sum(value.sqrt() for value in channels.values())
    torch.testing.assert_close(found.channels, expected, rtol=1e-9, atol=0)
    for number, value in neurons.items():
        name = f"model.layers.{number}.mlp.down_proj.weight"
        torch.testing.assert_close(found.neurons[name], value.sqrt(), rtol=1e-9, atol=0)
    assert found.ce == pytest.approx(loss / labelled, rel=1e-6)


def test_of_equal_scores_the_first_layers_stay():
    assert most_important([0.5, 0.1, 0.1, 0.1, 0.9], 3) == [0, 1, 4]


def test_lists_of_single_layers_are_cut_with_them():
    kind, settings = FAMILIES["smollm3"]
    config = kind(**{**settings, "no_rope_layers": [1, 0, 0, 1]})
    model = hf.AutoModelForCausalLM.from_config(config)
    keep_layers(model, [1, 3])
    assert (config.no_rope_layers, len(config.layer_types)) == ([0, 1], 2)
    mixture = make("qwen3_moe")  # layers 1 and 3 have experts
    keep_layers(mixture, [1, 2, 3])
    assert (mixture.config.decoder_sparse_step, mixture.config.mlp_only_layers) == (1, [1])


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(NotAvailableError, match="m is a gpt2 model: dropping layers of those is not available yet"):
        require_known("m", "gpt2", narrowed=False)
    with pytest.raises(
        NotAvailableError, match=r"mixtral model: cutting the width .*Leave --width out: its layers can"
    ):
        require_known("m", "mixtral", narrowed=True)
    config = make("llama").config
    config.layer_scales = [1.0] * LAYERS
    with pytest.raises(NotAvailableError, match="a list of 4 values, as many as layers: layer_scales"):
        check_layers("m", config)


def test_a_width_that_cannot_be_had_is_refused_with_one_that_can():
    config = make("llama").config
    with pytest.raises(ConfigError, match="--width 48: m is 48 wide"):
        check_width("m", config, 48, 24)
    with pytest.raises(ConfigError, match=r"--width 33 is not a multiple of the 2 attention heads of m.* Take 32"):
        check_width("m", config, 33, 24)
    factors = {"short_factor": [1.0] * 12, "long_factor": [4.0] * 12}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors, "original_max_position_embeddings": 32}
    long = hf.Phi3Config(**{**BASE, "rope_parameters": rope, "original_max_position_embeddings": 32})
    with pytest.raises(NotAvailableError, match=r"takes no other width beside heads of 24 .*short_factor"):
        check_width("m", long, 32, 24)
