"""A self teacher on two gloo ranks, under DDP and FSDP2: the numbers and weights of one process, and resumed ones."""

import pytest
import torch

from kdtrain.teachers import SelfTeacher
from tests import tiny
from tests.test_distributed import sharding_on_a_cpu
from tests.test_trainer import ROWS, make_trainer

CASES = {
    "base": ("base", True, {}),
    "base, its answers": ("base", True, {"seq_kd": True, "max_new_tokens": 5, "temperature": 1e-4}),
    "live": ("live", False, {}),
    "average of an adapter": ("ema", True, {}),
    "average of all weights": ("ema", False, {}),
    "average of all weights, accumulated": ("ema", False, {"accumulation": 2}),
}


def train(folder, weights, lora, *, accumulation=1, resume=False, **kwargs):
    """Three steps of the same eight rows, or the last two of them; what is logged, and every trained weight."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else kwargs.pop("ranks", 1)
    config = tiny.lora_config(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj"], modules_to_save=["lm_head"])
    extra = {"teacher": SelfTeacher(weights, 0.5), "peft_config": config if lora else None}
    torch.manual_seed(0)  # of the adapter
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1, tie_word_embeddings=False), None, rows=ROWS, sft_alpha=0.3,
        per_device_train_batch_size=8 // ranks // accumulation, gradient_accumulation_steps=accumulation,
        max_grad_norm=1e9, train_sampling_strategy="sequential", lr_scheduler_type="constant",
        max_steps=3, save_strategy="steps", save_steps=1, extra=extra,
        **{"optim": "sgd", "learning_rate": 1.0, **kwargs},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resume else None)
    records = [record for record in trainer.state.log_history if "loss" in record]
    names = ("loss", "llm_kd_loss", "grad_norm")
    numbers = [record[name] for record in records[-2:] for name in names]
    trained = [whole(p).flatten() for p in trainer.model.parameters() if p.requires_grad]
    before = [p.requires_grad for p in trainer.model.parameters()]
    assert sum(before) == len(trained)
    assert trainer.teacher.module is trainer.model
    return numbers, torch.cat(trained).tolist(), type(trainer.model_wrapped).__name__


def whole(parameter):
    tensor = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_fsdp2(folder, weights, lora, reshard=True, **kwargs):
    sharding = sharding_on_a_cpu()
    sharding["fsdp_config"]["reshard_after_forward"] = reshard
    return train(folder, weights, lora, ranks=2, **kwargs, **sharding)


def train_ddp(folder, weights, lora, **kwargs):
    return train(folder, weights, lora, ranks=2, **kwargs)


def in_two_ranks(function, folder, weights, lora, options):
    def call():
        return function(folder, weights, lora, **options)

    return tiny.run_ranks(call, 2, timeout=100)


@pytest.mark.parametrize("name", tiny.first_quick(CASES))
@pytest.mark.parametrize(("function", "wrapper"), [(train_ddp, "Distributed"), (train_fsdp2, "FSDP")])
def test_two_ranks_equal_one_process(tmp_path, name, function, wrapper):
    weights, lora, options = CASES[name]
    numbers, trained, _ = train(tmp_path / "one", weights, lora, **options)
    assert weights == "live" or numbers[1] > 5e-4  # the divergence of the second step
    for other, also_trained, wrapped in in_two_ranks(function, tmp_path / "two", weights, lora, options):
        assert wrapped.startswith(wrapper)
        assert other == pytest.approx(numbers, rel=1e-4, abs=1e-6)
        assert also_trained == pytest.approx(trained, rel=1e-5, abs=1e-6)


def test_weights_that_fsdp2_keeps_whole_after_a_forward_are_not_taken_for_the_others(tmp_path):
    numbers, trained, _ = train(tmp_path / "one", "ema", False)
    for other, also_trained, _ in in_two_ranks(train_fsdp2, tmp_path / "two", "ema", False, {"reshard": False}):
        assert other == pytest.approx(numbers, rel=1e-4, abs=1e-6)
        assert also_trained == pytest.approx(trained, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("function", [train_ddp, train_fsdp2])
def test_two_ranks_resume_the_average_bit_for_bit(tmp_path, function):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2}
    first = in_two_ranks(function, tmp_path, "ema", False, options)
    again = in_two_ranks(function, tmp_path, "ema", False, {**options, "resume": True})
    assert again == first
