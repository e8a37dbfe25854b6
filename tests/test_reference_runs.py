"""The comparison behind `python -m tests.reference_runs` finds what it is there for."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.reference_runs import first_difference

RECORD = {"step": 1, "loss": 2.5, "grad_norm": float("nan"), "tokens_per_second": 100.0, "peak_memory_gib": 0.5}


def write(folder, weights=None, **changes):
    (folder / "run").mkdir(parents=True)
    record = {key: value for key, value in (RECORD | changes).items() if value is not None}
    (folder / "run" / "logging.jsonl").write_text(json.dumps(record) + "\n")
    save_file({"bias": torch.zeros(3), "scale": torch.tensor(1.0)} | (weights or {}), folder / "run/model.safetensors")
    return folder


def test_times_rates_and_memory_may_differ(tmp_path):
    before = write(tmp_path / "before", eval_runtime=1.0)
    after = write(tmp_path / "after", tokens_per_second=90.0, peak_memory_gib=0.6, eval_steps_per_second=2.0)
    assert first_difference(before, after) is None


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"loss": 2.5000000000000004}, "record 1, loss: 2.5 before, 2.5000000000000004 after"),
        ({"loss": None}, "record 1, loss: 2.5 before, nothing after"),
        ({"sft_loss": 0.0}, "record 1, sft_loss: nothing before, 0.0 after"),
        ({"weights": {"bias": torch.tensor([0.0, -0.0, 0.0])}}, "bias: largest difference 0.0e+00"),
        ({"weights": {"scale": torch.tensor(1.0000001)}}, "scale: largest difference 1.2e-07"),
        ({"weights": {"bias": torch.zeros(3, dtype=torch.bfloat16)}}, "bias: (torch.float32, (3,)) before"),
        ({"weights": {"more": torch.zeros(1)}}, "tensors: only before [], only after ['more']"),
    ],
)
def test_the_first_difference_is_named(tmp_path, changes, found):
    assert found in first_difference(write(tmp_path / "before"), write(tmp_path / "after", **changes))


@pytest.mark.parametrize("name", ["logging.jsonl", "model.safetensors"])
def test_a_file_that_is_missing_is_a_difference_and_in_both_as_well(tmp_path, name):
    before, after = write(tmp_path / "before"), write(tmp_path / "after")
    (after / "run" / name).unlink()
    assert first_difference(before, after) == f"files: only before ['run/{name}'], only after []"
    (before / "run" / name).unlink()
    assert "nothing to compare" in first_difference(before, after)


def test_a_record_that_is_missing_is_a_difference(tmp_path):
    before, after = write(tmp_path / "before"), write(tmp_path / "after")
    with (after / "run" / "logging.jsonl").open("a") as file:
        file.write(json.dumps(RECORD) + "\n")
    assert "1 records before, 2 after" in first_difference(before, after)
