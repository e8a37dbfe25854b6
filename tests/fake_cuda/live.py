"""Live bytes of a call at full size: `python -m tests.fake_cuda.live CASE …` prints MiB beside the head's gradient."""

from __future__ import annotations

import gc
import json
import sys
from contextlib import nullcontext
from typing import Any

from tests.fake_cuda.device import Adapted, FakeTensorMode, Head, Watch, as_allocated, generated, torch

# isort: split
from kdtrain.losses import TopKLogprobs
from kdtrain.losses.fused import head_distillation_loss
from kdtrain.losses.tile import TileOptions

N, V = 8192, 151936
BF16 = torch.bfloat16
CASES: dict[str, dict[str, Any]] = {
    "trained": {},
    "frozen": {"frozen": True},
    "forward KL": {"beta": 0.0},
    "temperature": {"temperature": 2.0},
    "bias and soft-cap": {"bias": True, "softcap": 30.0},
    "token weights": {"kd_weights": True},
    "top-k": {"topk": 64},
    "top-k, frozen": {"topk": 64, "frozen": True},
    "no kernels": {"no kernels": True},
    "odd vocabulary": {"vocab": 151935},
    "float32 weights under autocast": {"weights": torch.float32},
    "narrow": {"widths": (1024, 2560)},
    "adapter on the head": {"frozen": True, "rank": 16},
}


def measure(kind: dict[str, Any]) -> dict[str, Any]:
    generated._without.clear()
    gc.collect()
    width, teacher_width = kind.get("widths", (2048, 4096))
    vocab, weights = kind.get("vocab", V), kind.get("weights", BF16)
    with FakeTensorMode(allow_non_fake_inputs=False):

        def made(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> torch.Tensor:
            return torch.empty(*shape, device="cuda", dtype=dtype, requires_grad=grad)

        hidden, weight = made(N, width, grad=True), made(vocab, width, dtype=weights, grad="frozen" not in kind)
        head = Head(weight, made(vocab, grad=True) if "bias" in kind else None, 1.0, kind.get("softcap"))
        adapter = Adapted(weight, kind["rank"]) if "rank" in kind else None
        if adapter is not None:
            head = Head.of_module(adapter, (vocab, width), hidden.detach(), 1.0, None)
        teacher = Head(made(vocab, teacher_width, dtype=weights), None, 1.0, kind.get("softcap"))
        teacher_hidden, labels = made(N, teacher_width), made(N, dtype=torch.long)
        kd_weights = made(N, dtype=torch.float32) if "kd_weights" in kind else None
        given: dict[str, Any] = {"teacher_hidden": teacher_hidden, "teacher": teacher}
        known = [hidden, weight, head.bias, teacher.weight, teacher_hidden, labels, kd_weights]
        known += () if adapter is None else adapter.parameters()
        if "topk" in kind:
            ids = made(N, kind["topk"], dtype=torch.long)
            given = {"targets": TopKLogprobs(ids, made(N, kind["topk"], dtype=torch.float32))}
            known += [ids, given["targets"].logprobs]
        if "no kernels" in kind:
            generated._without[hidden.device] = "not asked for"
        options = TileOptions(1.0, 0.1, kind.get("beta", 0.5), kind.get("temperature", 1.0), "jsd", "bucket")
        with Watch(*known) as watch:
            with torch.autocast("cuda", dtype=BF16) if "weights" in kind else nullcontext():
                out = head_distillation_loss(hidden, head, labels, options, kd_token_weights=kd_weights, **given)
            forward = watch.peak
            out.loss.backward()
        of_head = 0 if weight.grad is None else weight.grad.untyped_storage().nbytes()
    mib = 2**20
    return {
        "beside": round((watch.peak - of_head) / mib),
        "forward": round((forward - of_head) / mib),
        "at_peak": [round(size / mib) for size in watch.at_peak],
    }


if __name__ == "__main__":
    as_allocated()
    print(json.dumps({name: measure(CASES[name]) for name in sys.argv[1:] or CASES}))
