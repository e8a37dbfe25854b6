"""What is said and done of GPUs, as far as a machine without one shows it."""

from __future__ import annotations

import accelerate
import pytest
import torch

from kdtrain import memory
from kdtrain.models.pieces import runs_on
from kdtrain.teachers import LocalTeacher
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.test_trainer import ROWS, make_args, make_batch, make_trainer


def test_a_process_that_sees_several_gpus_trains_on_one_and_says_how_to_use_all(tmp_path, student, teacher, caplog):
    args = make_args(tmp_path)
    args._n_gpu = 4
    trainer = GKDTrainerWithMetrics(student, teacher, args, train_dataset=ROWS, processing_class=tiny.make_tokenizer())
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == trainer.args.per_device_train_batch_size
    assert "4 GPUs are visible to this one process, which trains on cpu" in caplog.text
    assert "--num-processes 4" in caplog.text
    assert "CUDA_VISIBLE_DEVICES" in caplog.text
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


def test_a_teacher_whose_weights_accelerate_keeps_elsewhere_gives_the_same_targets(tmp_path, student):
    wanted = LocalTeacher(tiny.make_qwen3(seed=2, hidden=48, tie_word_embeddings=False))
    module = tiny.make_qwen3(seed=2, hidden=48, tie_word_embeddings=False)
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    assert module.lm_head.weight.is_meta
    assert runs_on(module) == torch.device("cpu")
    module.hf_device_map = {"": "cpu"}
    trainer = make_trainer(tmp_path, student, module, rows=ROWS)
    batch = make_batch(trainer)
    found, expected = trainer.teacher.targets(batch).scores, wanted.targets(batch).scores
    assert not found.head.weight.is_meta
    assert torch.equal(found.logits(), expected.logits())
    trainer.train()


def test_flash_attention_is_not_asked_of_a_cpu_before_the_teacher_is_placed(teacher):
    plain = LocalTeacher(tiny.make_qwen3(seed=2, hidden=48))
    teacher.config._attn_implementation_internal = "flash_attention_2"  # as on a machine that has it
    looked = LocalTeacher(teacher)
    assert teacher.config._attn_implementation == "flash_attention_2"
    assert looked.look.looked
    assert looked.look == plain.look
    assert not looked._forward._from_logits


def test_the_peak_is_that_of_the_gpu_that_took_the_most(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: [2, 5, 0][device] * 2**30)
    assert memory.peak_memory_gib(torch.device("cuda", 0)) == pytest.approx(5)
