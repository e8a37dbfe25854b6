"""The same config gives the same numbers: again, with other threads, on a processor with other units."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests import tiny
from tests.test_trainer import make_trainer

OPTIONS = {"lmbda": 0.5, "seq_kd": True, "sft_alpha": 0.3, "max_new_tokens": 4, "max_steps": 4, "logging_steps": 1}


def trained(folder):
    """The losses, the gradient norms and the weights of a run with answers of the data, the teacher and the student."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), rows=tiny.CHATS * 2, learning_rate=1e-3,
        **OPTIONS,
    )  # fmt: skip
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    numbers = [[record["loss"], record["grad_norm"], record["on_policy_fraction"]] for record in records]
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return numbers, weights


def test_the_same_config_twice_gives_the_same_losses_and_weights(tmp_path):
    first, weights = trained(tmp_path / "a")
    torch.rand(7)  # what a process did before does not matter
    second, again = trained(tmp_path / "b")
    assert first == second
    assert {on_policy for _, _, on_policy in first} == {0.0, 1.0}
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def in_a_process(folder, **variables):
    """Losses and gradient norms, and the processor's units as torch sees them, with variables set before it starts."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_same_numbers", str(folder)],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


OTHERS = {
    "SSE": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}


@pytest.mark.faults
@pytest.mark.parametrize("name", OTHERS)
def test_another_processor_and_other_threads_give_the_same_numbers(tmp_path, name):
    here = in_a_process(tmp_path / "here", OMP_NUM_THREADS="1")
    other = in_a_process(tmp_path / "other", **{"OMP_NUM_THREADS": "1", **OTHERS[name]})
    assert other["threads"] == (2 if name == "two threads" else 1)
    for one, two in zip(here["numbers"], other["numbers"], strict=True):
        assert one == pytest.approx(two, rel=1e-5)  # sums in another order, in float32


@pytest.mark.slow
def test_two_threads_give_the_numbers_of_one(tmp_path):
    one, weights = trained(tmp_path / "one")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two, again = trained(tmp_path / "two")
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert all(torch.allclose(value, again[name], rtol=1e-3, atol=1e-5) for name, value in weights.items())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found, _ = trained(sys.argv[1])
    print(json.dumps({"numbers": found, "threads": torch.get_num_threads()}))
