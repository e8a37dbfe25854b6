"""Operations of a forward: as torch counts them on the real model; and which device can do how many."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, MixtralConfig

from kdtrain.models.flops import forward_flops, peak_flops
from tests import tiny
from tests.tiny import lora_config


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def adapted():
    return get_peft_model(
        tiny.make_qwen3(), lora_config(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", use_dora=False)
    )


MODELS = {
    "qwen3": tiny.make_qwen3,
    "qwen3, wide heads": lambda: tiny.make_qwen3(hidden=48, layers=3, head_dim=32, tie_word_embeddings=False),
    "llama": tiny.make_llama,
    "gpt2": gpt2,
    "lora": adapted,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_takes_what_torch_counts(name):
    model, rows, length = MODELS[name]().eval(), 3, 24
    model.set_attn_implementation("eager")  # of CPUs' own kernels it does not count the attention
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=torch.ones(rows, length, dtype=torch.long), use_cache=False)
    found = forward_flops(model).of(torch.full((rows,), length), rows * length)
    assert int(found) == pytest.approx(counted.get_total_flops(), rel=0.01)  # rotary positions are products too


def test_rows_count_by_their_own_lengths_and_the_head_by_what_is_supervised():
    flops = forward_flops(tiny.make_qwen3(layers=2, hidden=32, vocab_size=320))
    assert flops.per_pair == 2 * 4 * 2 * 16
    assert flops.per_supervised == 2 * 32 * 320
    found = flops.of(torch.tensor([10, 4]), 5)
    assert int(found) == flops.per_token * 14 + flops.per_pair * 116 + 5 * flops.per_supervised


def test_a_layer_with_a_window_compares_no_more_than_it():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    flops = forward_flops(MistralForCausalLM(config))
    assert int(flops.of(torch.tensor([100]), 0)) == flops.per_token * 100 + 2 * 4 * 32 * 100 * 8


def test_experts_are_not_guessed():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = tiny.make_qwen3()
    model.config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    assert forward_flops(model) is None


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5e12), ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "tf32", 494.7e12), ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A10", "float16", 125e12), ("NVIDIA A10G", "float16", None), ("Tesla T4", "float16", 65e12),
        ("Tesla T4", "bfloat16", None), ("NVIDIA L4", "bfloat16", 121e12), ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L40", "bfloat16", None), ("Tesla V100-SXM2-16GB", "float16", 125e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12), ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", None),
        ("AMD Instinct MI300X", "bfloat16", 1307.4e12), ("AMD Instinct MI250X", "bfloat16", 191.5e12),
        ("NVIDIA B200", "bfloat16", 2250e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA RTX A4000", "bfloat16", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_device_and_of_no_other_that_is_called_alike(name, dtype, expected):
    assert peak_flops(name, dtype) == expected


# ---- in a run --------------------------------------------------------------------------------------------------------


def train(folder, ranks, accumulation, monkeypatch_peak=1e9, **kwargs):
    """The records of two steps of the same eight rows; a step takes a second, whatever it does."""
    from unittest.mock import patch

    from kdtrain.trainer import metrics, throughput
    from tests.test_trainer import ROWS, make_trainer

    with (
        patch.object(throughput, "peak_of", lambda *_: monkeypatch_peak),
        patch.object(metrics.Stopwatch, "lap", lambda _: 1.0),
    ):
        trainer = make_trainer(
            folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), rows=ROWS, max_steps=2,
            per_device_train_batch_size=8 // ranks // accumulation, gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential", logging_steps=1, **kwargs,
        )  # fmt: skip
        trainer.train()
    batch = trainer.data_collator(list(ROWS))
    return [record for record in trainer.state.log_history if "loss" in record], batch


def by_hand(batch, student, teacher):
    """Operations of a window, from torch's own count of a forward of each row alone, without padding."""
    total = 0
    for ids, mask, labels in zip(batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"], batch.labels,
                                 strict=True):  # fmt: skip
        for model, times in ((student, 3), (teacher, 1)):
            model.set_attn_implementation("eager")
            with torch.no_grad(), FlopCounterMode(display=False) as counted:
                model.model(input_ids=ids[mask.bool()][None], use_cache=False)
            head = model.config.hidden_size * model.config.vocab_size
            total += times * (counted.get_total_flops() + 2 * head * int((labels[1:] != -100).sum()))
    return total


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_logged_of_one_process_is_what_its_models_do(tmp_path, accumulation):
    records, batch = train(tmp_path, 1, accumulation)
    expected = by_hand(batch, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48))
    supervised, seen = int((batch.labels[:, 1:] != -100).sum()), int(batch.model_inputs["attention_mask"].sum())
    for record in records:
        assert record["mfu"] * 1e9 == pytest.approx(expected, rel=0.01)
        assert record["supervised_tokens_per_second"] == supervised
        assert record["tokens_per_second"] == seen


def rates(folder, ranks, accumulation):
    records, _ = train(folder, ranks, accumulation)
    names = ("mfu", "supervised_tokens_per_second", "tokens_per_second")
    return [record[name] for record in records for name in names]


def test_of_two_ranks_tokens_are_summed_and_the_peak_is_that_of_both(tmp_path):
    one = rates(tmp_path / "one", 1, 2)
    for two in tiny.run_ranks(rates, 2, tmp_path / "two", 2, 2):
        assert two[0::3] == pytest.approx([mfu / 2 for mfu in one[0::3]], rel=1e-9)
        assert two[1::3] == one[1::3]
        assert two[2::3] == one[2::3]


def test_without_a_teacher_or_a_peak_nothing_is_made_up(tmp_path):
    records, batch = train(tmp_path / "ce", 1, 1, llm_kd_weight=0.0, sft_alpha=1.0)
    student = tiny.make_qwen3(seed=1)
    assert records[0]["mfu"] * 1e9 < by_hand(batch, student, tiny.make_qwen3(seed=2, hidden=48))
    records, _ = train(tmp_path / "cpu", 1, 1, monkeypatch_peak=None)
    assert "mfu" not in records[0]
