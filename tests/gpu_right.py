"""Whether the loss is right on a GPU: parts of `python -m tests.gpu`."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

Found = dict[str, Any]


def tell(**found: Any) -> None:
    """One line of what is known so far: all that is left of a part that is ended."""
    print(json.dumps(found), flush=True)


def machine(device: str, small: bool, seconds: float) -> Found:
    """What is here."""
    import shutil

    import torch
    import transformers

    found: Found = {"torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"compiler": shutil.which("gcc") or shutil.which("cc") or "none"}
    if device == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "capability": list(torch.cuda.get_device_capability())}
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "triton": triton.__version__}
    return found


def products(device: str, small: bool, seconds: float) -> Found:
    """Which products of bfloat16 that end in float32 this torch has, and their relative errors."""
    import torch

    x, w = (torch.randn(*shape, device=device).bfloat16() for shape in ((40, 64), (64, 48)))
    exact, out = x.float() @ w.float(), torch.zeros(40, 48, device=device)
    f32 = torch.float32
    forms: dict[str, Callable[[], Any]] = {
        "mm": lambda: torch.mm(x, w, out_dtype=f32),
        "mm(out=)": lambda: torch.mm(x, w, out_dtype=f32, out=out),
        "addmm(out=)": lambda: torch.addmm(out.zero_(), x, w, out_dtype=f32, out=out),
        "baddbmm(out=)": lambda: torch.baddbmm(out.zero_()[None], x[None], w[None], out_dtype=f32, out=out[None])[0],
    }
    found = {}
    for name, form in forms.items():
        try:
            found[name] = f"{float((form() - exact).norm() / exact.norm()):.1e}"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:100]}"
    return found


# ---- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One problem of the loss."""

    dtype: str = "bfloat16"
    divergence: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    chunk: int | None = None
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    targets: str = "dense"
    tokens: int = 37
    vocabulary: int = 1003
    widths: tuple[int, int] = (24, 40)

    def __str__(self) -> str:
        plain = vars(Case())
        return ", ".join(f"{name} {value}" for name, value in vars(self).items() if value != plain[name]) or "plain"


TOLERANCES = {"float32": 2e-5, "bfloat16": 8e-3, "float16": 1e-3}
DIVERGENCES: list[Found] = [
    *({"divergence": "jsd", "beta": beta} for beta in (0.5, 0.0, 1.0)),
    {"divergence": "jsd_scaled", "beta": 0.9},
    {"divergence": "mixed_kl", "beta": 0.3},
    *({"divergence": name} for name in ("skew_kl", "skew_reverse_kl", "alpha_beta", "entropy_aware", "tvd")),
]
HEADS: list[Found] = [{}, {"softcap": 20.0}, {"scale": 0.5}, {"temperature": 2.0}, {"bias": True}, {"chunk": 8}]
TARGETS: list[Found] = [
    *({"targets": "topk", **one} for one in DIVERGENCES),
    *({"targets": "sampled", "beta": 0.0, "temperature": temperature} for temperature in (1.0, 2.0)),
]


def grid(vocabulary: int) -> list[Case]:
    """All dtypes, divergences and what heads do; and teachers that are known by some tokens."""
    pairs = [{**head, **one} for head, one in itertools.product(HEADS, DIVERGENCES)]
    return [
        Case(dtype=dtype, vocabulary=vocabulary, **options)
        for dtype, options in itertools.product(TOLERANCES, [*pairs, *TARGETS])
    ]


def with_kernels() -> list[Case]:
    """The same where each case is a kernel of its own, which takes seconds to compile: what most runs use first."""
    first = [Case(beta=beta) for beta in (0.5, 0.0, 1.0)]
    heads = [Case(**options) for options in HEADS[1:]]
    dtypes = [Case(dtype=dtype) for dtype in ("float32", "float16")]
    return [*first, *heads, *dtypes, *(Case(**one) for one in DIVERGENCES[3:])]


def error_of(case: Case, device: str) -> float:
    """The largest relative error of the loss and its gradients against float64, as a share of the tolerance."""
    import torch

    from kdtrain.losses import SampledTargets, TopKLogprobs
    from kdtrain.losses.by_chunks import dense_loss_by_chunks
    from kdtrain.losses.fused import head_distillation_loss
    from kdtrain.losses.head import Head
    from kdtrain.losses.mixture import Mixed
    from kdtrain.losses.tile import TileOptions

    dtype, n, v = getattr(torch, case.dtype), case.tokens, case.vocabulary
    g = torch.Generator(device).manual_seed(0)

    def made(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device).mul_(scale).to(dtype)

    own, other = case.widths
    scales = (2 / own**0.5, 2 / other**0.5)
    hidden, weight, teacher, head = made(n, own), made(v, own, scale=scales[0]), made(n, other), made(v, other)
    head.mul_(scales[1])
    labels = torch.randint(0, v, (n,), generator=g, device=device)
    labels[::5] = -100
    bias = made(v) if case.bias else None
    heads = [Head(one, bias, case.scale, case.softcap) for one in (weight, head)]
    options = TileOptions(1.0, 0.3, case.beta, case.temperature, case.divergence, "bucket")  # type: ignore[arg-type]
    targets: Any = None
    if case.targets != "dense":
        logprobs = heads[1].differentiable_logits(teacher).log_softmax(-1)
        values, ids = logprobs.topk(8)
        kinds = {"topk": TopKLogprobs(ids, values), "sampled": SampledTargets(ids, values.softmax(-1))}
        targets = kinds[case.targets]
    given = {"targets": targets} if targets is not None else {"teacher_hidden": teacher, "teacher": heads[1]}
    trained = [one for one in (hidden, weight, bias) if one is not None]
    for one in trained:
        one.requires_grad_()
    ours = head_distillation_loss(hidden, heads[0], labels, options, chunk_tokens=case.chunk, **given).loss
    found = torch.autograd.grad(ours, trained)

    exact = [one.detach().double().requires_grad_() for one in trained]
    wide = [replace(one, weight=one.weight.detach().double(), bias=None) for one in heads]
    wide = [replace(one, bias=exact[2].detach() if case.bias else None) for one in wide]
    student = replace(wide[0], weight=exact[1], bias=exact[2] if case.bias else None)

    def of_teacher(rows: slice) -> Mixed:
        with torch.no_grad():
            logits = wide[1].differentiable_logits(teacher[rows].double())
        return Mixed(logits, logits)

    wanted = dense_loss_by_chunks(
        exact[0], labels, options, None if targets is not None else of_teacher, head=student, targets=targets,
        chunk_tokens=512,
    ).loss  # fmt: skip
    pairs = [*zip(found, torch.autograd.grad(wanted, exact), strict=True), (ours, wanted)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs) / TOLERANCES[case.dtype]


def half_ratio(dtype: str, head: str, device: str) -> float:
    """The error of gradients in half precision, of that of plain PyTorch in the same, both against float64."""
    import torch

    from kdtrain.losses import fused_distillation_loss
    from tests.test_losses_fused import make, reference_loss, trained
    from tests.test_losses_gpu import HEADS as KINDS
    from tests.test_losses_gpu import plain_loss

    bias, scale, cap = KINDS[head].get("bias", False), KINDS[head].get("scale", 1.0), KINDS[head].get("softcap")
    problem = make(n=90, vocab=801, dtype=getattr(torch, dtype), bias=bias, seed=5)
    for name, value in problem.items():
        if isinstance(value, torch.Tensor):
            problem[name] = value.detach().to(device).requires_grad_(value.requires_grad)
    _, exact = reference_loss(problem, 0.9, 0.1, 0.5, 1.0, "jsd", scale, cap, None)
    ours = fused_distillation_loss(
        **problem, kd_weight=0.9, ce_weight=0.1, student_logit_scale=scale, teacher_logit_scale=scale,
        student_softcap=cap, teacher_softcap=cap, chunk_tokens=23,
    )  # fmt: skip
    found = torch.autograd.grad(ours.loss, trained(problem))
    usual = torch.autograd.grad(plain_loss(problem, 0.9, 0.1, scale, cap), trained(problem))
    pairs = zip(found, usual, exact, strict=True)
    return max(float((mine.double() - right).norm() / (plain.double() - right).norm()) for mine, plain, right in pairs)


@contextmanager
def no_kernels() -> Iterator[None]:
    """The loss in operations alone: nothing is compiled."""
    from kdtrain.losses import chunks

    before = chunks.can_generate
    chunks.can_generate = lambda *_: False  # type: ignore[assignment]
    try:
        yield
    finally:
        chunks.can_generate = before


class Tally:
    """What ran, and what of it was wrong."""

    def __init__(self) -> None:
        self.ran, self.worst, self.bad = 0, 0.0, list[list[str]]()

    def add(self, name: str, compute: Callable[[], float], limit: float = 1.0) -> None:
        """`compute` gives a share of the tolerance, above `limit` of which it is wrong."""
        from kdtrain.losses import generated

        generated._without.clear()
        try:
            found = compute()
            self.ran, self.worst = self.ran + 1, max(self.worst, found)
            reasons = [] if found <= limit else [f"{found:.3g} of the tolerance"]
        except Exception as error:
            reasons = [f"{type(error).__name__}: {str(error)[:160]}"]
        reasons += [f"no kernels: {reason[:160]}" for reason in generated._without.values()]
        if reasons:
            self.bad.append([name, *reasons])

    def shown(self) -> Found:
        return {"ran": self.ran, "failed": len(self.bad), "largest error": round(self.worst, 3), "first": self.bad[:6]}


def oracle(device: str, small: bool, seconds: float) -> Found:
    """The fused loss against float64, in shares of the tolerance: over dtypes, divergences, heads and targets.

    First in operations alone, then with generated kernels, of which each takes seconds to compile: as many as there is
    time for. `half precision` is the error of the gradients beside that of plain PyTorch in the same: at most 2.
    """
    until = time.perf_counter() + seconds
    found: Found = {}
    halves = list(itertools.product(("bfloat16", "float16"), ("plain", "bias", "soft-cap", "scale")))
    with no_kernels():
        tally = Tally()
        for case in grid(103 if small else 1003)[:: 9 if small else 1]:
            tally.add(str(case), functools.partial(error_of, case, device))
        found["operations"] = tally.shown()
        tell(**found)
        tally = Tally()
        for dtype, head in halves:
            tally.add(f"{dtype}, {head}", functools.partial(half_ratio, dtype, head, device), 2.0)
        found["half precision"] = tally.shown()
        tell(**found)
    large = Case(tokens=8192, vocabulary=151936, widths=(2048, 4096))
    large = replace(large, tokens=300, vocabulary=2000, widths=(64, 96)) if small else large
    cases = with_kernels()
    cases = [*cases[:3], large, *cases[3:]]
    tally, left = Tally(), list[str]()
    for case in cases[:4] if small else cases:
        if time.perf_counter() > until:
            left.append(str(case))
            continue
        tally.add(str(case), functools.partial(error_of, case, device))
        tell(kernels=tally.shown())
    found["kernels"] = tally.shown() | {"no time for": left}
    if not left:
        tally = Tally()
        for head in ("plain", "bias", "soft-cap", "scale")[: 1 if small else None]:
            tally.add(head, functools.partial(half_ratio, "bfloat16", head, device), 2.0)
        found["half precision, kernels"] = tally.shown()
    return found
