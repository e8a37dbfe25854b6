"""Ways to spread a run over ranks, each of which has to give the numbers of one process."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import pytest

from tests import tiny
from tests.test_distributed import LAYERS, sharding_on_a_cpu

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
if HAS_DEEPSPEED:
    import deepspeed

    # Faster collectives for CPUs are compiled at first use, which takes a minute and a compiler. Without, it is gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config. No parameter is so small that ZeRO-3 leaves it whole."""
    options: dict[str, Any] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    if stage == 3:
        options["stage3_param_persistence_threshold"] = 0
    return {"zero_optimization": options, "zero_allow_untested_optimizer": True} | dict.fromkeys(_AUTO, "auto") | more


@dataclass(frozen=True)
class Strategy:
    """One of them."""

    ranks: int
    distributed_type: str
    """accelerate's."""
    wrapped: str
    """How the name of the wrapped student's class begins."""
    stage: int | None = None
    """Of ZeRO."""

    def begin(self, family: str | None = None) -> dict[str, Any]:
        """Arguments of a trainer; called in the rank, before a model is made. `family` is one of vision models."""
        if self.stage is not None:
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
            return {"deepspeed": zero(self.stage)}
        if self.wrapped != "FSDP":
            return {}
        sharding = sharding_on_a_cpu()
        if family in LAYERS:
            sharding["fsdp_config"]["transformer_layer_cls_to_wrap"] = LAYERS[family]
        return sharding

    def check(self, trainer: Any) -> None:
        """That the run really was spread so: most launches that go wrong are silent."""
        assert trainer.accelerator.num_processes == self.ranks
        assert trainer.accelerator.distributed_type.value == self.distributed_type
        assert type(trainer.model_wrapped).__name__.startswith(self.wrapped)
        if self.stage is not None:
            assert trainer.model_wrapped.zero_optimization_stage() == self.stage

    def run(self, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """What `function(self, …)` returns on each rank."""

        def call() -> Any:
            return function(self, *args, **kwargs)

        return [call()] if self.ranks == 1 else tiny.run_ranks(call, self.ranks, timeout=280)


ONE = Strategy(1, "NO", "")
STRATEGIES = {
    "one process": ONE,
    "DDP, 2 ranks": Strategy(2, "MULTI_CPU", "DistributedDataParallel"),
    "DDP, 4 ranks": Strategy(4, "MULTI_CPU", "DistributedDataParallel"),
    "FSDP2": Strategy(2, "FSDP", "FSDP"),
    "ZeRO-1": Strategy(2, "DEEPSPEED", "DeepSpeedEngine", 1),
    "ZeRO-2": Strategy(2, "DEEPSPEED", "DeepSpeedEngine", 2),
    "ZeRO-3": Strategy(2, "DEEPSPEED", "DeepSpeedEngine", 3),
}


def marks_of(name: str) -> list[Any]:
    """Of a test of a strategy."""
    if STRATEGIES[name].stage is None:
        return []
    return [pytest.mark.deepspeed, pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs the deepspeed extra")]


def whole_weights(trainer: Any) -> dict[str, list[float]]:
    """Every weight that is trained, the projectors of features included, as plain numbers on every rank."""
    named = dict(trainer.model.named_parameters())
    for term in (one for one in trainer.feature_terms if not one.in_model):
        named |= {f"{term.in_model_name}.{k}": p for k, p in term.projectors.named_parameters()}
    sharded = [p for p in named.values() if hasattr(p, "ds_id")]
    if sharded:
        with deepspeed.zero.GatheredParameters(sharded):
            return {name: p.detach().flatten().tolist() for name, p in named.items()}
    full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in named.items()}
    return {name: p.detach().flatten().tolist() for name, p in full.items()}
