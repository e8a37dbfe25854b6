"""The fused loss does not remember: a call gives the same numbers whatever the process computed before it.

Sizes lie around those where matrix kernels change. Every order of calls runs in a process of its own, forked from one
that has computed nothing. `python -m tests.test_losses_history` prints what every call gave, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kdtrain.losses import fused_distillation_loss

SIZES = (16, 17, 24, 31, 32, 33, 61, 252, 507)
# N tokens, H width, V vocabulary: every size in every place, every pair of N and H. The last two come with a history:
# the second made products of the first come out in bfloat16 on a processor with matrix units.
SHAPES = [(n, h, SIZES[(i + 2 * j) % len(SIZES)]) for i, n in enumerate(SIZES) for j, h in enumerate(SIZES)]
SHAPES += [(252, 61, 507), (128, 32, 256)]
RUNS = [
    *((order, 1) for order in ("forward", "backward", "shuffled")),
    *((order, 2) for order in ("forward", "backward")),
]
# Kinds of calls that alternate with the shape: what the head does.
HEADS = ("trained", "frozen", "biased")

Case = tuple[int, int, int, str, int | None, str]
"""N, H, V, dtype, chunk_tokens, head."""


def cases() -> list[Case]:
    return [
        (n, h, v, dtype, chunk, HEADS[(i + k) % len(HEADS)])
        for i, (n, h, v) in enumerate(SHAPES)
        for k, (dtype, chunk) in enumerate(
            [("float32", None), ("float32", 17), ("bfloat16", None), ("bfloat16", 17)][i % 2 :: 2]
        )
    ] + [(252, 61, 507, "float32", 17, "trained"), (128, 32, 256, "float32", None, "trained")]


def inputs(case: Case) -> dict[str, Any]:
    n, h, v, dtype, _, head = case
    generator = torch.Generator().manual_seed(n + 1000 * h + 1000000 * v)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(getattr(torch, dtype))

    teacher_width = h + 3
    return {
        "hidden": normal(n, h).requires_grad_(),
        "weight": normal(v, h, scale=2 / h**0.5).requires_grad_(head != "frozen"),
        "bias": normal(v).requires_grad_() if head == "biased" else None,
        "labels": torch.randint(v, (n,), generator=generator),
        "teacher_hidden": normal(n, teacher_width),
        "teacher_weight": normal(v, teacher_width, scale=2 / teacher_width**0.5),
    }


def call(case: Case) -> list[torch.Tensor]:
    """Loss, its sums, and all gradients."""
    x = inputs(case)
    out = fused_distillation_loss(
        x["hidden"], x["weight"], x["labels"], x["teacher_hidden"], x["teacher_weight"], student_bias=x["bias"],
        kd_weight=0.7, ce_weight=0.3, chunk_tokens=case[4],
    )  # fmt: skip
    out.loss.backward()
    assert out.kd_sum is not None
    assert out.num_agree is not None
    assert out.teacher_entropy_sum is not None
    sums = [out.kd_sum, out.ce_sum, out.num_correct, out.num_agree, out.student_entropy_sum, out.teacher_entropy_sum]
    trained = (x["hidden"], x["weight"], x["bias"])
    return [out.loss.detach(), *sums, *(p.grad for p in trained if p is not None and p.grad is not None)]


def reference(case: Case) -> list[torch.Tensor]:
    """Loss and gradients in float64: definitions, and autograd."""
    x = {key: value.detach().double() if torch.is_tensor(value) and value.is_floating_point() else value
         for key, value in inputs(case).items()}  # fmt: skip
    trained = [
        x["hidden"],
        *([x["weight"]] if case[5] != "frozen" else []),
        *([x["bias"]] if x["bias"] is not None else []),
    ]
    for parameter in trained:
        parameter.requires_grad_()
    student_NV = x["hidden"] @ x["weight"].T + (0 if x["bias"] is None else x["bias"])
    teacher_NV = x["teacher_hidden"] @ x["teacher_weight"].T
    s, t = student_NV.softmax(-1), teacher_NV.softmax(-1)
    m = (s + t) / 2
    jsd = 0.5 * (t * (t / m).log()).sum(-1) + 0.5 * (s * (s / m).log()).sum(-1)
    ce = -s.log().gather(1, x["labels"][:, None]).squeeze(1)
    loss = (0.7 * jsd + 0.3 * ce).mean()
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def fingerprint(values: list[torch.Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for value in values:
        digest.update(value.contiguous().view(torch.uint8 if value.dim() else value.dtype).numpy().tobytes())
    return digest.hexdigest()


def error(case: Case, values: list[torch.Tensor]) -> float:
    """The largest relative error of the loss and of each gradient, by their norms."""
    expected = reference(case)
    ours = [values[0], *values[7:]]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True))


def in_order(order: str, threads: int) -> dict[str, Any]:
    """What every call gives in one order: fingerprint, and in float32 its error. Every call is made twice."""
    torch.set_num_threads(threads)
    todo = cases()
    if order == "backward":
        todo.reverse()
    elif order != "forward":
        random.Random(order).shuffle(todo)
    first = [call(case) for case in todo]
    found: dict[str, Any] = {}
    for case, values in zip(todo, first, strict=True):
        again = fingerprint(call(case)) == fingerprint(values)
        wrong = error(case, values) if case[3] == "float32" else 0.0
        found[str(case)] = [fingerprint(values), again, wrong]
    return found


def _forked(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fork of this process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with os.fdopen(write, "w") as pipe:
                json.dump(function(*args), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(text)


def main() -> None:
    json.dump({f"{order}, {threads} threads": _forked(in_order, order, threads) for order, threads in RUNS}, sys.stdout)


@pytest.fixture(scope="module")
def histories() -> dict[str, dict[str, tuple[str, bool, float]]]:
    """Order and threads -> case -> (fingerprint, whether the second call gave the same, relative error)."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_losses_history"], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_call_gives_the_same_bits_after_any_other_calls(histories):
    different = []
    for threads in (1, 2):
        runs = [found for run, found in histories.items() if run.endswith(f" {threads} threads")]
        different += [
            (case, threads)
            for case, (bits, _, _) in runs[0].items()
            if any(run[case][0] != bits or not run[case][1] for run in runs)
        ]
    assert different == []


@pytest.mark.slow
def test_float32_is_float32_after_any_other_calls(histories):
    wrong = {
        (case, run): relative
        for run, found in histories.items()
        for case, (_, _, relative) in found.items()
        if not relative < 1e-5
    }
    assert wrong == {}


# ---- settings of the process -----------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """Every precision setting of the process that PyTorch has."""
    backends = torch.backends
    found: dict[str, Any] = {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    for name in ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        found[name] = getattr(backends.cuda.matmul, name)
    for backend, op in [(b, o) for b in ("generic", "mkldnn", "cuda") for o in ("all", "matmul", "conv", "rnn")]:
        if (backend, op) not in {("generic", o) for o in ("matmul", "conv", "rnn")}:
            found[f"{backend}.{op}"] = torch._C._get_fp32_precision_getter(backend, op)
    return found


def _setters() -> Iterator[str]:
    """Names of what changes how products are computed."""
    words = ("precision", "allow_", "mkldnn", "onednn", "preferred_backend", "deterministic", "accumulation")
    return (name for name in dir(torch._C) if name.startswith("_set_") and any(word in name for word in words))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(252, 61, 507), (16, 24, 33), (128, 32, 256)])
def test_no_precision_setting_of_the_process_is_touched_even_for_a_moment(monkeypatch, dtype, sizes):
    names = list(_setters())
    assert "_set_fp32_precision_setter" in names
    touched = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def setter(*args: Any) -> Any:
            touched.append((name, *args))
            return original(*args)

        return setter

    for name in names:
        monkeypatch.setattr(torch._C, name, watched(name, getattr(torch._C, name)))
    before = settings()
    for chunk in (None, 17):
        for head in HEADS:
            call((*sizes, dtype, chunk, head))
    assert settings() == before
    assert touched == []


if __name__ == "__main__":
    main()
