"""The plan of several devices beside what two ranks hold and send: DDP, ZeRO-2, ZeRO-3 and FSDP 2 on gloo.

    python -m tests.benchmarks.spread [KIND ...]
    python -m tests.benchmarks.spread --trace    # the table of examples/accelerate/README.md, for 64 and 1,024 devices

Measured are the bytes of all tensors that are alive on a rank, each storage once, at their peak from the second step to
the last: resident memory of a process is too coarse for models that two ranks train here, and has no share of buffers
that a CPU gives out without touching them, which a GPU has to have. FSDP on a CPU is accelerate's own, under the name
of another device (see `tests/test_distributed.py`). ZeRO needs the extra `deepspeed`. Sent is what the collectives are
given, as a ring sends it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from tests.benchmarks.planned import PlanCase, _project

KINDS = ("ddp", "zero2", "zero3", "fsdp")
CASES = (
    PlanCase("full", rows=2, length=128, student=(256, 4), teacher=(256, 6)),
    PlanCase("full, one micro-batch", rows=2, length=128, student=(256, 4), teacher=(256, 6), accumulation=1),
    PlanCase(
        "LoRA, checkpointing", rows=2, length=128, student=(256, 4), teacher=(256, 6), lora=True, checkpointing=True
    ),
)
_AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


class AliveBytes(TorchDispatchMode):
    """All storages that an operation has made or used and that are still there, with the size that they have now."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.sent = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.sent += _sent(func.__name__.split(".")[0], args)
        for leaf in (*tree_leaves(args), *tree_leaves(out)):
            leaf = getattr(leaf, "_local_tensor", leaf)  # of a DTensor
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._alive:
                    key = id(storage)
                    self._alive[key] = weakref.ref(storage, lambda _, key=key: self._alive.pop(key, None))
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes; FSDP gives memory back by making a storage smaller, which is no operation."""
        found = (reference() for reference in list(self._alive.values()))
        return sum(storage.nbytes() for storage in found if storage is not None)


def _sent(name: str, args: Any) -> int:
    """Bytes that one of two ranks sends for a collective in a ring: f = 1/2."""
    tensors = [[x for x in tree_leaves(arg) if isinstance(x, torch.Tensor)] for arg in args[:2]]
    first, second = (sum(x.nbytes for x in found) for found in tensors)
    return {"allreduce_": first, "_allgather_base_": first // 2, "allgather_": first // 2, "broadcast_": first,
            "allgather_into_tensor_coalesced_": first // 2, "_reduce_scatter_base_": second // 2,
            "reduce_scatter_": second // 2, "reduce_scatter_tensor_coalesced_": second // 2}.get(name, 0)  # fmt: skip


class _FromTheFirstStep(TrainerCallback):
    def __init__(self, alive: AliveBytes) -> None:
        self._alive, self.peak, self.sent = alive, 0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:  # the optimizer's states are there, and the loss's buffers
            self._alive.peak, self._alive.sent = self._alive.now(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.peak, self.sent = self._alive.peak, self._alive.sent // max(state.global_step - 1, 1)


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's config as the built-in files lead to it, but with buffers in proportion to these models."""
    options = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3, "reduce_bucket_size": 500_000}
    return {"zero_optimization": options, "zero_allow_untested_optimizer": True, **dict.fromkeys(_AUTO, "auto")}


def measured(case: PlanCase, kind: str) -> dict[str, Any]:
    """Planned and measured bytes of one of two ranks: at the peak, and sent for a step."""
    from tests.tiny import run_ranks

    with tempfile.TemporaryDirectory(prefix="kdtrain-spread-") as folder:
        config = _project(Path(folder) / "run", case)
        training = {**config.training, **_options(kind)}
        config = config.model_copy(update={"training": training})
        peak, sent = max(run_ranks(_rank, 2, config, kind, timeout=500))
        plan, planned_sent = _plan(config, case)
    return {"case": str(case), "kind": kind, "measured": peak, "planned": plan.total,
            "ratio": round(plan.total / peak, 3), "sent": sent, "planned_sent": planned_sent,
            "ratio_sent": round(planned_sent / max(sent, 1), 3), "phase": plan.phase, "parts": plan.parts}  # fmt: skip


def _options(kind: str) -> dict[str, Any]:
    if kind == "fsdp":
        return {"fsdp": "full_shard", "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    return {"deepspeed": zero(int(kind[-1]))} if kind.startswith("zero") else {}


def _rank(config: Any, kind: str) -> tuple[int, int]:
    from rich.console import Console

    from kdtrain.cli.progress import ConsoleReporter
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.runs import fit as run
    from kdtrain.runs.build import Given

    if kind == "fsdp":
        from tests.test_distributed import sharding_on_a_cpu

        sharding_on_a_cpu()
        run.check_world = lambda *_: None  # which refuses FSDP on a CPU
    with AliveBytes() as alive:
        watch = _FromTheFirstStep(alive)
        reporter = ConsoleReporter(Console(stderr=True), quiet=True)
        arguments = build_train_arguments(config)
        assert arguments.training_args.device.type == "cpu"
        run.fit(arguments, reporter, given=Given(callbacks=[watch]))
    return watch.peak, watch.sent


def _plan(config: Any, case: PlanCase) -> Any:
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.preflight.memory import Simulations, plan_memory
    from kdtrain.preflight.run_setup import setup_of
    from kdtrain.preflight.strategies import sent_bytes

    plain = config.model_copy(update={"training": {k: v for k, v in config.training.items() if k != "deepspeed"}})
    args = build_train_arguments(plain).training_args
    setup = setup_of(config, args, world=2, longest=case.length, longest_prompt=case.length // 2)
    return plan_memory(setup), sent_bytes(setup, Simulations())


_ROWS, _LENGTH, _BATCHES = 2, 4096, 4
_MFU, _DEVICE = 0.4, "NVIDIA H100 80GB HBM3"
_SENDS = {64: 50e9, 1024: 25e9}


def _qwen3(width: int, layers: int, inner: int, heads: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(vocab_size=151_936, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
                       num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
                       max_position_embeddings=40_960)  # fmt: skip


def trace() -> None:
    """Print what the plan says of Qwen3-8B under Qwen3-32B on devices that are not here, as a table."""
    from transformers import AutoModelForCausalLM

    from kdtrain.config.schema import TunerConfig
    from kdtrain.disk import in_units
    from kdtrain.models.flops import forward_flops, peak_flops
    from kdtrain.preflight.memory import Setup, Simulations
    from kdtrain.preflight.simulated import ModelSetup, Shape
    from kdtrain.preflight.strategies import STRATEGIES, spreads, step_seconds

    configs = _qwen3(4096, 36, 12_288, 32), _qwen3(5120, 64, 25_600, 64)
    lengths, supervised = torch.full((_ROWS * _BATCHES,), _LENGTH), _ROWS * _BATCHES * (_LENGTH - 1)
    with torch.device("meta"):
        student, teacher = (forward_flops(AutoModelForCausalLM.from_config(config)) for config in configs)
    assert student is not None and teacher is not None  # noqa: PT018
    work = float(3 * student.of(lengths, supervised) + teacher.of(lengths, supervised))
    peak = peak_flops(_DEVICE, "bfloat16")
    assert peak is not None
    seconds = work / (peak * _MFU)
    shape = Shape(_ROWS, _LENGTH, _BATCHES, checkpointing=True, autocast=torch.bfloat16, teacher_width=5120)
    setup = Setup(ModelSetup(configs[0], torch.float32), ModelSetup(configs[1], torch.bfloat16), TunerConfig(), shape,
                  per_device_rows=_ROWS, teacher_rows=_ROWS)  # fmt: skip
    print(f"{work / 1e15:.1f} PFLOP a step and device, {seconds:.1f} s at {_MFU:.0%} of {peak / 1e12:.0f} TFLOP/s\n")
    print("| devices | strategy | teacher | a device | fits 80 GiB | sends a step | s a step | tokens/s |")
    print("|--:|---|---|--:|---|--:|--:|--:|")
    simulations = Simulations()
    for devices, bandwidth in _SENDS.items():
        for one in spreads(setup, devices, simulations):
            least, most = step_seconds(one, seconds, bandwidth)
            rates = (devices * _ROWS * _BATCHES * _LENGTH / time for time in (most, least))
            placed = "in pieces" if one.teacher_in_pieces else "on each"
            print(f"| {devices:,} | {STRATEGIES[one.kind]} | {placed} | {in_units(one.memory.total)} | "
                  f"{'yes' if one.memory.total <= 80 * 2**30 else 'no'} | {in_units(one.sent)} | "
                  f"{least:.1f} to {most:.1f} | {' to '.join(f'{rate / 1e3:,.0f} k' for rate in rates)} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--cases", type=int, default=len(CASES))
    parser.add_argument("--trace", action="store_true", help="the plan for 64 and 1,024 devices")
    options = parser.parse_args()
    if options.trace:
        trace()
        return
    torch.set_num_threads(1)
    if any(kind.startswith("zero") for kind in options.kinds):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    for case in CASES[: options.cases]:
        for kind in options.kinds:
            print(json.dumps(measured(case, kind)), flush=True)


if __name__ == "__main__":
    main()
