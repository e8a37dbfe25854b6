"""Whole trainings on a GPU beside the same on the CPU; `python -m tests.gpu` runs them with the rest of a first
look, and here that script is tried without one."""

from __future__ import annotations

import json

import pytest
import torch

from tests import gpu
from tests.gpu import compared
from tests.test_waits import KINDS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_trains_as_a_cpu_does_and_is_waited_for_once_a_step(tmp_path, kind):
    found = compared(kind, "cuda", tmp_path)
    assert found["device"] == pytest.approx(found["cpu"], rel=1e-3)
    assert not found["waits in micro-batches"]
    assert found["waits of a step"] <= 1


@pytest.mark.slow
def test_every_part_of_the_script_runs_on_a_cpu(tmp_path):
    assert gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == list(gpu.PARTS) == list(gpu.LIMITS)
    assert found["oracle"]["result"]["failed"] == 0
    assert set(found["trainings"]["result"].values()) == {"equal"}
    ends = found["end_to_end"]["result"]
    assert all(
        ends[name]["tokens_per_second"] > 0 < ends[name]["utilisation"] for name in ("kdtrain", "TRL GKDTrainer")
    )
    for shares in found["profile"]["result"].values():
        assert shares["products"] + shares["everything else"] == pytest.approx(1)
    assert list(found["profile"]["result"]) == ["loss", "step"]
    assert sum(gpu.LIMITS.values()) <= 480


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.LIMITS, "machine", 0.2)
    assert gpu.main(["--device", "cpu", "--small", "--only", "machine,products", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["error"] == "over 0.2 s"
    assert set(found["products"]["result"]) == {"mm", "mm(out=)", "addmm(out=)", "baddbmm(out=)"}
    assert "## machine: over 0.2 s" in (tmp_path / "gpu.md").read_text()
