"""A run on N devices by each strategy: what is sent is the formula, what a device holds is the plan's, in pieces."""

import dataclasses

import pytest
import torch

from kdtrain.cli.commands.validate import _seconds
from kdtrain.config.schema import TunerConfig
from kdtrain.errors import ConfigError
from kdtrain.preflight.memory import Simulations
from kdtrain.preflight.sharding import DEEPSPEED_BUCKET, Sharding
from kdtrain.preflight.strategies import sent_bytes, spreads, step_seconds, strategy_findings
from tests import tiny
from tests.test_preflight_memory import FULL, setup

LORA = TunerConfig(train_type="lora", lora_rank=4)
W = 4 * sum(p.numel() for p in tiny.make_qwen3(hidden=64).parameters())
T = 4 * sum(p.numel() for p in tiny.make_qwen3(hidden=48).parameters())
N, A = 8, 2  # of `setup`: two micro-batches
F = (N - 1) / N
SENT = {
    ("ddp", False): 2 * F * W,
    ("ddp", True): 2 * F * W + A * F * T,
    ("fsdp", False): F * W + 2 * A * F * W,
    ("fsdp", True): F * W + 2 * A * F * W + A * F * T,
    ("zero2", False): 2 * A * F * W + F * W,
    ("zero2", True): 2 * A * F * W + F * W + A * F * T,
    ("zero3", False): A * F * W + 2 * A * F * W,
    ("zero3", True): A * F * W + 2 * A * F * W + A * F * T,
}


def test_each_strategy_sends_what_the_formula_says():
    found = {(one.kind, one.teacher_in_pieces): one for one in spreads(setup(), N)}
    assert found.keys() == SENT.keys()
    for key, expected in SENT.items():
        assert found[key].sent == pytest.approx(expected, abs=2), key


def test_each_part_is_in_as_many_pieces_as_the_strategy_makes():
    parts = {(one.kind, one.teacher_in_pieces): one.memory.parts for one in spreads(setup(), N)}
    assert parts["ddp", False]["student"] == parts["zero2", False]["student"] == W
    assert parts["zero3", False]["student"] == parts["fsdp", False]["student"] == W // N
    assert parts["ddp", False]["optimizer"] == 2 * W
    assert parts["fsdp", True]["optimizer"] == 2 * W // N
    assert parts["zero2", True]["optimizer"] == 3 * W // N, "and DeepSpeed's float32 copy"
    assert {
        parts[kind, in_pieces]["teacher"] for kind in ("ddp", "fsdp", "zero2", "zero3") for in_pieces in (False,)
    } == {T}
    assert parts["ddp", True]["teacher"] == T // N
    assert parts["fsdp", False]["gradients"] == W, "whole between the micro-batches of a step"
    assert parts["zero2", False]["gradients"] == W // N
    assert parts["zero3", False]["DeepSpeed's buffer"] == 4 * DEEPSPEED_BUCKET
    one_batch = setup(shape=dataclasses.replace(setup().shape, micro_batches=1))
    assert next(one for one in spreads(one_batch, N) if one.kind == "fsdp").memory.parts["gradients"] == W // N


def test_an_adapter_sends_its_own_gradients_alone():
    lora, simulations = setup(LORA, world=N), Simulations()
    trained = simulations.step(lora).trained
    assert 0 < trained < W / 4
    assert sent_bytes(lora, simulations) == int(2 * F * trained)
    gathered = dataclasses.replace(lora, sharding=Sharding("fsdp"), teacher=None)
    assert sent_bytes(gathered, simulations) == int(F * trained + 2 * A * F * simulations.step(lora).weights)


def test_a_step_lasts_between_all_hidden_and_nothing_hidden():
    one = next(iter(spreads(setup(), N)))
    assert step_seconds(one, 2.0, one.sent / 0.5) == (2.0, 2.5)
    assert step_seconds(one, 0.25, one.sent / 0.5) == (0.5, 0.75)


def test_without_a_teacher_in_memory_there_is_one_line_for_each():
    lines = strategy_findings(setup(FULL, teacher=None), N, 2**20, 50e9, 0.5)
    assert len(lines) == 5
    assert "8 devices, DDP: " in lines[0].message
    assert "of 1.0 MiB, does not fit" in lines[0].message
    assert lines[0].message.endswith("0.50 to 0.50 s a step")
    assert "50 GB/s" in lines[-1].message
    assert "--step-time" in strategy_findings(setup(), N, None, 50e9, None)[-1].message


def test_half_precision_under_deepspeed_sends_half():
    half = setup(shape=dataclasses.replace(setup().shape, autocast=torch.bfloat16), world=N)
    zero, plain = (dataclasses.replace(half, sharding=Sharding(kind), teacher=None) for kind in ("zero3", "fsdp"))
    simulations = Simulations()
    assert sent_bytes(zero, simulations) == pytest.approx(0.5 * SENT["zero3", False], abs=2)
    assert sent_bytes(plain, simulations) == pytest.approx(SENT["fsdp", False], abs=2)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_is_seconds_above_zero(text):
    with pytest.raises(ConfigError, match="--step-time: expected seconds above 0"):
        _seconds(text)
    assert _seconds("1.5") == 1.5
    assert _seconds("here") == "here"
