"""Memory that is exhausted, wherever: no bug, but an error with the peak, what was tried, and three ways out."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from kdtrain.memory import is_out_of_memory
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import test_cli, tiny
from tests.test_trainer import make_batch, make_trainer

kdtrain = test_cli.kdtrain
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
WAYS = {
    "a GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "torch on a CPU": lambda: RuntimeError(f"{CPU} 4398046511104 bytes. Error code 12 (Cannot allocate memory)"),
    "python": lambda: MemoryError(),
    "the system": lambda: OSError(12, "Cannot allocate memory"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "safetensors": lambda: SafetensorError("Error: Cannot allocate memory (os error 12)"),
}


@pytest.mark.parametrize("way", ["a GPU", "torch on a CPU"])
def test_a_step_that_finds_no_memory_says_the_peak_rows_length_and_three_ways_out(project, kdtrain, monkeypatch, way):
    def step(*_, **__):
        raise WAYS[way]()

    monkeypatch.setattr(GKDTrainerWithMetrics, "compute_loss", step)
    code, _, err = kdtrain("fit", "config.yaml", "training.report=false")
    assert code == 3, err
    assert "Out of memory on cpu: the peak of this process was " in err
    assert "GiB, with 4 rows per device and data.max_length 64. Lower training.per_device_train_batch_size" in err
    assert "lower data.max_length, or set training.gradient_checkpointing: true" in err
    status = json.loads((project / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)


@pytest.mark.parametrize(("whose", "way"), [("student", "safetensors"), ("teacher", "a GPU")])
def test_a_model_that_finds_no_memory_while_it_is_loaded_is_named(project, kdtrain, monkeypatch, whose, way):
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def load(name, *args, **kwargs):
        if name.endswith(whose):
            raise WAYS[way]()
        return real(name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 3, err
    assert f"Out of memory while loading {project / whose}: the peak of this process was " in err
    for way_out in ("half precision", "a smaller model", "rlhf.teacher.device_map: auto"):
        assert way_out in err
    assert not (project / "run").exists()


def test_a_cache_that_finds_no_memory_says_how_to_go_on(project, kdtrain, monkeypatch):
    from kdtrain.runs import cache

    real = cache.CacheWriter.write_shard

    def write_shard(writer, *args):
        if writer.folder.name == "cache":  # a few targets are written before, into a folder of their own
            raise WAYS["torch on a CPU"]()
        return real(writer, *args)

    monkeypatch.setattr(cache.CacheWriter, "write_shard", write_shard)
    code, _, err = kdtrain("cache", "config.yaml", "--out", "cache")
    assert code == 3, err
    assert "Out of memory on cpu: the peak of this process was " in err
    assert "rows at a time. Lower training.per_device_eval_batch_size" in err
    assert "Whole shards stay, and the same command goes on." in " ".join(err.split())


def test_memory_that_really_runs_out_in_a_step(project, kdtrain, monkeypatch):
    """By a limit on addresses, as the first step begins; torch's allocator says it."""
    real, limits = GKDTrainerWithMetrics.compute_loss, resource.getrlimit(resource.RLIMIT_AS)

    def step(trainer, *args, **kwargs):
        if trainer.is_in_train:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
            torch.zeros(2**28)  # 1 GiB
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(GKDTrainerWithMetrics, "compute_loss", step)
    try:
        code, _, err = kdtrain("fit", "config.yaml", "training.report=false")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert code == 3, err
    assert "Out of memory on cpu: the peak of this process was " in err


def test_memory_that_runs_out_anywhere_else_is_no_bug_either(project, kdtrain, monkeypatch):
    def read(*_, **__):
        raise MemoryError

    monkeypatch.setattr("kdtrain.runs.build.read_data", read)
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 3
    assert "Out of memory: the peak of this process was" in err
    assert "bug" not in err


@pytest.mark.parametrize("way", WAYS)
def test_each_library_has_its_own_words_for_it(way):
    assert is_out_of_memory(WAYS[way]())


def test_other_errors_are_none_of_memory():
    for other in (RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), OSError(28, "No space")):
        assert not is_out_of_memory(other)
    outer = RuntimeError("a worker failed")
    outer.__cause__ = MemoryError()
    assert is_out_of_memory(outer)


def test_activations_that_lie_elsewhere_until_backward_give_the_same_gradients(tmp_path):
    """trl's own offloading wants an accelerator; this is its way, by hooks on what is saved for backward."""
    found, saved = [], []

    class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            super().__init__(lambda tensor: saved.append(tensor.shape) or tensor.clone(), lambda tensor: tensor.clone())

    for context in (None, Elsewhere()):
        trainer = make_trainer(tmp_path, teacher=tiny.make_qwen3(seed=2, hidden=48), sft_alpha=0.3)
        if context is not None:
            trainer.maybe_activation_offload_context = context
        trainer.create_optimizer()
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        trainer.training_step(trainer.model.train(), make_batch(trainer), torch.tensor(40))
        found.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert len(saved) > 20
    whole, offloaded = found
    assert all(torch.equal(whole[name], offloaded[name]) for name in whole)
