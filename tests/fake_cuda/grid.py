"""Every variant of the loss on the stand-in: `python -m tests.fake_cuda.grid` prints what ran and what failed."""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import nullcontext
from typing import Any

from tests.fake_cuda.device import (
    Adapted,
    FakeTensorMode,
    Head,
    Watch,
    as_traced,
    gemm,
    generated,
    real_add_product,
    torch,
)

# isort: split
from kdtrain.losses import SampledTargets, TopKLogprobs
from kdtrain.losses.comparison import Scores
from kdtrain.losses.fused import head_distillation_loss
from kdtrain.losses.kinds import DivergenceParams
from kdtrain.losses.mixture import MixedHeads, MixedTopK
from kdtrain.losses.other_tokenizer import ChunkTargets, head_chunk_loss
from kdtrain.losses.tile import TileOptions
from kdtrain.losses.token_scores import token_scores

N, V, H, H_TEACHER, K = 10, 40, 6, 7, 8
BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
DIVERGENCES = [
    *itertools.product(("jsd", "jsd_scaled", "mixed_kl"), (0.0, 0.3, 0.9, 1.0)),
    *((name, 0.0) for name in ("skew_kl", "skew_reverse_kl", "alpha_beta", "entropy_aware", "tvd")),
]
KINDS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"softcap": 30.0, "scale": 0.5},
    {"frozen": True},
    {"targets": "topk"},
    {"targets": "topk", "tail": "renormalize"},
    {"targets": "sampled"},
    {"targets": "sampled", "temperature": 2.0},
    {"targets": "mixed topk"},
    {"targets": "mixed heads"},
    {"targets": "mixed heads", "temperature": 2.0},
    {"targets": "chunks"},
    {"targets": None},
    {"temperature": 2.0},
    {"ce_weights": torch.bool},
    {"ce_weight": 0.0},
    {"kd_weights": True},
    {"kd_weights": True, "ce_weight": 0.0, "num_kd_items": True},
    {"autocast": BF16, "weights": F32},
    {"autocast": FP16},
    {"weights": F32},
    {"num_items": 7},
    {"num_items": "tensor"},
    {"chunk": 3},
    {"chunk": 1},
    {"no kernels": True, "bias": True, "softcap": 30.0},
    {"no gradient": True},
    {"rank": 4},
    {"rank": 4, "softcap": 30.0, "autocast": BF16, "weights": F32, "kd_weights": True, "ce_weight": 0.0},
]


def main() -> None:
    """Each kind with each divergence, in one dtype after the other; with an argument, every so many of these alone."""
    as_traced()
    failed, elsewhere, ran = [], set(), 0
    step = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    pairs = list(itertools.product(DIVERGENCES, KINDS))[::step]
    for ((divergence, beta), kind), dtype in zip(pairs, itertools.cycle((BF16, F32, BF16, FP16)), strict=False):
        if kind.get("targets") in ("sampled", "chunks") and (divergence, beta) != ("jsd", 0.0):
            continue
        if kind.get("tail") and divergence in ("alpha_beta", "tvd"):
            continue
        ran += 1
        try:
            elsewhere |= run(dtype, divergence, beta, kind)
        except Exception as error:  # all that fail are shown together
            failed.append(f"{dtype} {divergence} {beta} {kind}: {type(error).__name__}: {str(error)[:400]}")
    for dtype in (F32, BF16):
        elsewhere |= values_only(dtype)
    elsewhere |= added_in_slices()
    print(json.dumps({"ran": ran, "failed": failed, "elsewhere": sorted(elsewhere)}))


def run(dtype: torch.dtype, divergence: Any, beta: float, kind: dict[str, Any]) -> set[str]:
    """One call and its backward; what was made elsewhere than on the device."""
    generated._without.clear()
    with FakeTensorMode(allow_non_fake_inputs=False):
        weights = kind.get("weights", dtype)

        def made(*shape: int, like: torch.dtype = dtype, grad: bool = False) -> torch.Tensor:
            return torch.empty(*shape, device="cuda", dtype=like, requires_grad=grad)

        hidden, weight = made(N, H, grad=True), made(V, H, like=weights, grad="frozen" not in kind)
        bias = made(V, like=weights, grad=True) if "bias" in kind else None
        head = Head(weight, bias, kind.get("scale", 1.0), kind.get("softcap"))
        trained = [hidden, weight, bias]
        if "rank" in kind:
            adapter = Adapted(weight.detach(), kind["rank"])
            head = Head.of_module(adapter, (V, H), hidden.detach(), head.logit_scale, head.softcap)
            trained = [hidden, adapter.a, adapter.b]
        teacher = Head(made(V, H_TEACHER, like=weights), bias, head.logit_scale, head.softcap)
        labels, ids = made(N, like=torch.long), made(N, K, like=torch.long)
        topk = TopKLogprobs(ids, made(N, K, like=F32))
        kd_weight = 0.0 if kind.get("targets", "dense") is None else 0.7
        options = TileOptions(
            kd_weight, kind.get("ce_weight", 0.1), beta, kind.get("temperature", 1.0), divergence,
            kind.get("tail", "bucket"), DivergenceParams(),
        )  # fmt: skip
        given: dict[str, Any] = {
            "dense": lambda: {"teacher_hidden": made(N, H_TEACHER), "teacher": teacher},
            "topk": lambda: {"targets": topk},
            "sampled": lambda: {"targets": SampledTargets(ids, made(N, K, like=F32))},
            "mixed topk": lambda: {"targets": MixedTopK((topk, topk), (0.5, 0.5))},
            "mixed heads": lambda: {"mixed": MixedHeads((made(N, H_TEACHER),) * 2, (teacher,) * 2, (0.5, 0.5))},
        }.get(kind.get("targets", "dense"), dict)()
        items = kind.get("num_items")
        common = {
            "num_items": torch.empty((), device="cuda", dtype=torch.long) if items == "tensor" else items,
            "num_kd_items": torch.empty((), device="cuda", dtype=torch.long) if "num_kd_items" in kind else None,
            "kd_token_weights": made(N, like=F32) if "kd_weights" in kind else None,
            "chunk_tokens": kind.get("chunk"),
        }
        ce_weights = made(N, like=kind["ce_weights"]) if "ce_weights" in kind else None
        if "no kernels" in kind:
            generated._without[hidden.device] = "not asked for"
        watch = Watch()
        autocast = torch.autocast("cuda", dtype=kind["autocast"]) if "autocast" in kind else nullcontext()
        with watch, autocast, torch.set_grad_enabled("no gradient" not in kind):
            if kind.get("targets") == "chunks":
                chunks = ChunkTargets(made(N, like=torch.long), made(3, like=F32))
                out = head_chunk_loss(hidden, head, labels, options, chunks, ce_mask=ce_weights, **common)
            else:
                out = head_distillation_loss(
                    hidden, head, labels, options, **given, ce_token_weights=ce_weights, **common
                )
        assert out.loss.device.type == "cuda"
        assert out.loss.dtype == F32
        if "no gradient" not in kind:
            with watch:
                out.loss.backward()
            for one in trained:
                if one is not None and one.requires_grad:
                    assert one.grad is not None, "a gradient is missing"
                    assert (one.grad.dtype, one.grad.shape, one.grad.device) == (one.dtype, one.shape, one.device)
        left = generated._without.keys() - ({hidden.device} if "no kernels" in kind else set())
        assert not left, "the kernels' way was left"
    return watch.elsewhere


def values_only(dtype: torch.dtype) -> set[str]:
    """What is made of the heads without a gradient: scores of tokens."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        outputs, weight = (torch.empty(rows, H, device="cuda", dtype=dtype) for rows in (N, V))
        scores = Scores(outputs, Head(weight, None, 1.0, None), V)
        with Watch() as watch:
            for by in ("student_entropy", "disagreement"):
                found = token_scores(by, scores, scores)
                assert (found.shape, found.device.type, found.dtype) == ((N,), "cuda", F32)
    return watch.elsewhere


def added_in_slices() -> set[str]:
    """The sum of products where PyTorch has no form that adds within: without a temporary of the total's size."""
    gemm._ADDS_IN_PRODUCT = False
    with FakeTensorMode(allow_non_fake_inputs=False):
        total = torch.empty(100_000, H, device="cuda")
        a, b = torch.empty(100_000, N, device="cuda", dtype=BF16), torch.empty(N, H, device="cuda", dtype=BF16)
        with Watch(total, a, b) as watch:
            real_add_product(total, a, b)
    gemm._ADDS_IN_PRODUCT = True
    assert 0 < watch.peak <= total.nbytes / 3
    return watch.elsewhere


if __name__ == "__main__":
    main()
