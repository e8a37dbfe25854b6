"""The loss and whole trainings on a GPU; `python -m tests.gpu` runs them with the rest of a first look, and here that
script is tried without one."""

from __future__ import annotations

import json

import pytest
import torch

from kdtrain.losses.fused_function import Fused
from tests import gpu
from tests import gpu_fast as fast
from tests.gpu_right import Case, error_of, grid, no_kernels, with_kernels
from tests.gpu_trainings import RESUMED, compared, resumed
from tests.test_waits import ALL_KINDS

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("divergence", sorted({case.divergence for case in grid(1003)}))
def test_the_loss_is_that_of_float64(divergence):
    with no_kernels():
        for case in grid(1003):
            if case.divergence == divergence:
                assert error_of(case, "cuda") <= 1, case


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("case", with_kernels(), ids=str)
def test_generated_kernels_compute_it_too(case):
    assert error_of(case, "cuda") <= 1


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_gpu_trains_as_a_cpu_does_and_is_waited_for_once_a_step(tmp_path, kind):
    found = compared(kind, "cuda", tmp_path)
    assert found["device"] == pytest.approx(found["cpu"], rel=1e-3)
    assert not found["waits in micro-batches"]
    assert found["waits of a step"] <= 1


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_training_is_the_one_that_was_not_interrupted(tmp_path, kind):
    found = resumed(kind, "cuda", tmp_path)
    assert found["resumed"] == pytest.approx(found["straight"], rel=1e-4)
    assert found["difference"] <= 1e-4


@pytest.mark.slow
def test_every_part_of_the_script_runs_on_a_cpu(tmp_path):
    assert gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == list(gpu.PARTS) == list(gpu.LIMITS)
    assert all(one["failed"] == 0 < one["ran"] for one in found["oracle"]["result"].values())
    assert set(found["trainings"]["result"].values()) == {"equal"}
    assert {"KD and CE, resumed", "images, qwen"} <= found["trainings"]["result"].keys()
    ends = found["end_to_end"]["result"]
    names = (fast.OURS, *fast.OTHERS[:2])
    assert all(ends[name]["tokens_per_second"] > 0 < ends[name]["utilisation"] for name in names)
    # They train on the same tokens, those behind the answer apart.
    assert ends[fast.DISTILLATION]["loss"] == pytest.approx(ends[fast.OURS]["loss"], rel=0.1)
    for shares in found["profile"]["result"].values():
        assert shares["products"] + shares["everything else"] == pytest.approx(1)
    assert list(found["profile"]["result"]) == ["loss", "step"]
    assert sum(gpu.LIMITS.values()) <= 480
    holds = {what: held for what, _, held in gpu.demands(found)}
    assert holds["training: KD and CE"]
    assert "| tokens a second, at least 1.5 × TRL GKDTrainer |" in (tmp_path / "gpu.md").read_text()


def test_a_wrong_gradient_is_seen(monkeypatch):
    case = Case(dtype="float32")
    assert error_of(case, "cpu") <= 1
    backward = Fused.backward
    monkeypatch.setattr(Fused, "backward", lambda ctx, grad, *rest: backward(ctx, 1.001 * grad, *rest))
    assert error_of(case, "cpu") > 1


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.LIMITS, "machine", 0.2)
    assert gpu.main(["--device", "cpu", "--small", "--only", "machine,products", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["error"] == "over 0.2 s"
    assert set(found["products"]["result"]) == {"mm", "mm(out=)", "addmm(out=)", "baddbmm(out=)"}
    assert "## machine: over 0.2 s" in (tmp_path / "gpu.md").read_text()
