"""What the first steps do to the weights, and that no weights are saved that are not numbers."""

import pytest
import torch

from kdtrain.errors import NonFiniteError
from tests import tiny
from tests.test_trainer import make_trainer
from tests.tiny import lora_config

# ---- weights that are not finite -------------------------------------------------------------------------------------


def ends_badly(folder, save_steps):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), learning_rate=1e38, rows=tiny.CHATS[:4],
        per_device_train_batch_size=1, save_strategy="steps", save_steps=save_steps,
    )  # fmt: skip
    try:
        trainer.train()
        trainer.save_model()
    except NonFiniteError as error:
        return str(error), [path.name for path in folder.rglob("*.safetensors")]


@pytest.mark.parametrize("save_steps", [1, 10])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, save_steps):
    message, saved = ends_badly(tmp_path, save_steps)
    assert "Not finite after step 1, rank 0: trained weights, the first model.embed_tokens.weight" in message
    assert saved == []
    for its_message, its_saved in tiny.run_ranks(ends_badly, 2, tmp_path / "two", save_steps):
        # Before a checkpoint all ranks are asked; a caller may save a whole model on one of them.
        assert its_message == message.replace("rank 0", "ranks 0, 1")
        assert its_saved == []


def broken_on_one_rank(folder):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), save_strategy="steps", save_steps=1,
        per_device_train_batch_size=1,
    )  # fmt: skip
    original = trainer.create_scheduler

    def create_scheduler(*args, **kwargs):
        if torch.distributed.get_rank() == 1:
            trainer.optimizer.optimizer.register_step_post_hook(
                lambda *_: trainer.model.model.norm.weight.data.fill_(float("nan"))
            )
        return original(*args, **kwargs)

    trainer.create_scheduler = create_scheduler
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error)


def test_a_checkpoint_is_not_written_where_one_ranks_weights_are_not_finite(tmp_path):
    first, second = tiny.run_ranks(broken_on_one_rank, 2, tmp_path)
    assert first == second
    assert "rank 1: trained weights, the first model.norm.weight" in second
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- updates that round away -----------------------------------------------------------------------------------------


def train_in(folder, dtype, caplog, **kwargs):
    caplog.clear()
    make_trainer(folder, tiny.make_qwen3(seed=1).to(dtype), tiny.make_qwen3(seed=2), max_steps=2, **kwargs).train()
    return [record.getMessage() for record in caplog.records if "rounded away" in record.getMessage()]


def test_updates_that_bfloat16_weights_cannot_take_are_told_with_their_share(tmp_path, caplog):
    (message,) = train_in(tmp_path, torch.bfloat16, caplog, learning_rate=1e-5)
    share = int(message.split("%")[0])
    assert 90 <= share <= 100
    assert "of step 1 (learning rate 1.0e-05)" in message
    assert "model.dtype: auto" in message
    (message,) = train_in(tmp_path, torch.bfloat16, caplog, learning_rate=1e-5, warmup_steps=1)
    assert "of step 2 " in message  # the first has learning rate 0
    assert not train_in(tmp_path, torch.bfloat16, caplog, learning_rate=1.0)
    assert not train_in(tmp_path, torch.float32, caplog, learning_rate=1e-5)


def train_on_ranks(folder, caplog, **kwargs):
    return train_in(folder, torch.bfloat16, caplog, learning_rate=1e-5, per_device_train_batch_size=2, **kwargs)


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
def test_two_ranks_are_told_once_of_updates_that_round_away(tmp_path, caplog, pieces):
    from tests.test_distributed import sharding_on_a_cpu

    sharding = sharding_on_a_cpu() if pieces else {}
    first, second = tiny.run_ranks(lambda: train_on_ranks(tmp_path, caplog, **sharding), 2)
    assert (len(first), second) == (1, [])
    assert 90 <= int(first[0].split("%")[0]) <= 100
    assert "of step 1 (learning rate 1.0e-05)" in first[0]


# ---- trained tensors without a gradient ------------------------------------------------------------------------------


def without_gradient(caplog):
    return [record.getMessage() for record in caplog.records if "had no gradient" in record.getMessage()]


def test_trained_tensors_that_never_get_a_gradient_are_named_once(tmp_path, student, teacher, caplog):
    student.model.unused = torch.nn.Linear(4, 4)
    make_trainer(tmp_path, student, teacher, max_steps=8).train()
    (message,) = without_gradient(caplog)
    total = len(list(student.parameters()))
    assert message.startswith(f"2 of {total} trained tensors had no gradient in the first 3 windows")
    assert "model.unused.weight, model.unused.bias. Leave them out (tuner.target_modules)," in message


@pytest.mark.parametrize("lora", [False, True])
def test_no_tensor_is_named_where_all_are_trained(tmp_path, student, teacher, caplog, lora):
    peft = lora_config(rank=2, alpha=4, dropout=0, target_modules="all-linear", modules_to_save=None, use_dora=False)
    make_trainer(tmp_path, student, teacher, max_steps=4, extra={"peft_config": peft} if lora else None).train()
    assert not without_gradient(caplog)


def test_experts_that_no_token_was_sent_to_are_no_alarm(tmp_path, student, teacher, caplog):
    student.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    make_trainer(tmp_path, student, teacher, max_steps=4).train()
    assert not without_gradient(caplog)
