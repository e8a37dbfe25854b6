"""A first look at a GPU: what breaks, then numbers. At most eight minutes, each part with a limit of its own.

    python -m tests.gpu [--device cpu] [--small] [--only machine,speed] [--out DIR]

Every part is a process: one that crashes the device or hangs does not take the others with it. Each prints a line when
it ends; everything is in `gpu.json` and `gpu.md` of DIR (by default $OUT, else the working directory), written anew
after each part. `--device cpu --small` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"machine": 30, "products": 40, "oracle": 90, "trainings": 110, "speed": 100, "end_to_end": 60, "profile": 50}
"""Seconds of each part, in their order; eight minutes in all."""


# ---- the parts -------------------------------------------------------------------------------------------------------


def machine(device: str, small: bool) -> dict[str, Any]:
    """What is here."""
    import shutil

    import torch
    import transformers

    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"compiler": shutil.which("gcc") or shutil.which("cc") or "none"}
    if device == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "capability": list(torch.cuda.get_device_capability())}
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "triton": triton.__version__}
    return found


def products(device: str, small: bool) -> dict[str, Any]:
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


def oracle(device: str, small: bool) -> dict[str, Any]:
    """The fused loss against float64, over dtypes, divergences and what heads do."""
    import torch

    from kdtrain.losses import dense_distillation_loss, fused_distillation_loss

    n, v, worst, bad, ran = 37, 103 if small else 1003, 0.0, [], 0
    dtypes = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    more: list[dict[str, Any]] = [{}, {"student_softcap": 20.0}, {"student_logit_scale": 0.5}, {"temperature": 2.0}]
    more += [{"chunk_tokens": 8}, {"student_bias": True}]
    for dtype, tolerance in dtypes.items():
        for divergence, beta in (("jsd", 0.0), ("jsd", 0.5), ("jsd", 1.0), ("mixed_kl", 0.3)):
            for case in more:
                options = dict(case)
                g = torch.Generator(device).manual_seed(0)
                hidden, weight, teacher, head = (
                    torch.randn(*shape, generator=g, device=device).mul(scale).to(dtype)
                    for shape, scale in (((n, 24), 1), ((v, 24), 0.4), ((n, 40), 1), ((v, 40), 0.3))
                )
                labels = torch.randint(0, v, (n,), generator=g, device=device)
                labels[::5] = -100
                bias = torch.randn(v, generator=g, device=device).to(dtype) if options.pop("student_bias", 0) else None
                common = {"kd_weight": 1.0, "ce_weight": 0.3, "beta": beta, "divergence": divergence}
                scale, cap = options.get("student_logit_scale", 1.0), options.get("student_softcap")
                try:
                    own = [one.clone().requires_grad_() for one in (hidden, weight)]
                    fused = fused_distillation_loss(
                        *own, labels, teacher, head, student_bias=bias, **common, **options
                    ).loss  # fmt: skip
                    fused.backward()
                    exact = [one.double().requires_grad_() for one in (hidden, weight)]
                    logits = (exact[0] @ exact[1].t() + (0 if bias is None else bias.double())) * scale
                    logits = logits if cap is None else cap * torch.tanh(logits / cap)
                    wanted = dense_distillation_loss(
                        logits, labels, teacher.double() @ head.double().t(),
                        temperature=options.get("temperature", 1.0), **common,
                    ).loss  # fmt: skip
                    wanted.backward()
                    pairs = [(a.grad.double(), b.grad) for a, b in zip(own, exact, strict=True)]
                    error = max(float((a - b).norm() / b.norm()) for a, b in [*pairs, (fused.double(), wanted)])
                    worst, ran = max(worst, error / tolerance), ran + 1
                    if not error < tolerance:
                        bad.append([str(dtype), divergence, beta, str(case), f"{error:.1e}"])
                except Exception as error:
                    bad.append([str(dtype), divergence, beta, str(case), f"{type(error).__name__}: {str(error)[:120]}"])
    return {"ran": ran, "failed": len(bad), "largest error, of the tolerance": round(worst, 3), "first": bad[:6]}


def compared(kind: str, device: str, folder: Path) -> dict[str, Any]:
    """The loss of a training of `tests.test_waits` on the CPU and on a device, and what the host waits for there."""
    import torch

    from tests import test_waits

    found: dict[str, Any] = {"cpu": test_waits.run(kind, folder / "cpu")["loss"]}
    waits: dict[str, list[list[str]]] = {"micro-batches": [], "steps": []}

    def seen(caught: list[warnings.WarningMessage]) -> list[str]:
        lines = [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
        caught.clear()
        return [line for line in lines if not any(f"/{part}" in line for part in test_waits.UPSTREAM.get(kind, ()))]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def on_event(event: str) -> None:
            if event == "begin":
                caught.clear()
            else:
                waits[event].append(seen(caught))

        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            found["device"] = test_waits.run(kind, folder / device, use_cpu=device == "cpu", on_event=on_event)["loss"]
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    # The first step has what a run does once, and the last one is logged.
    found["waits in micro-batches"] = sorted({line for one in waits["micro-batches"][1:] for line in one})
    found["waits of a step"] = sum(len(one) for one in waits["steps"][1:2])
    return found


def trainings(device: str, small: bool) -> dict[str, Any]:
    """Whole trainings on the device beside the CPU, with what the host waits for."""
    from tests.test_waits import KINDS

    found: dict[str, Any] = {}
    for kind in list(KINDS)[: 2 if small else None]:
        try:
            with tempfile.TemporaryDirectory() as folder:
                one = compared(kind, device, Path(folder))
            good = abs(one["device"] - one["cpu"]) <= 1e-3 * abs(one["cpu"])
            good = good and not one["waits in micro-batches"] and one["waits of a step"] <= 1
            found[kind] = "equal" if good else one
        except Exception as error:
            found[kind] = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps({kind: found[kind]}), flush=True)
    return found


def speed(device: str, small: bool) -> dict[str, Any]:
    """The loss beside others and the four products alone."""
    import dataclasses

    from tests.benchmarks import gpu

    tiny = {"tokens": 128, "vocab": 512, "student_hidden": 32, "teacher_hidden": 48, "dtype": "float32"}
    found = {}
    for beta in (0.0, 0.5, 1.0):
        case = dataclasses.replace(gpu.CASE, beta=beta, **(tiny if small else {}))
        row = gpu.measure(case, 2 if small else 3, device)
        found[f"beta {beta:g}"] = {
            name: {
                "ms": round(1000 * one["median_s"], 2) if "median_s" in one else one.get("note"),
                "extra_gib": round(one.get("memory", {}).get("bytes", 0) / 2**30, 2),
            }
            for name, one in row["peers"].items()
        }
        print(json.dumps({f"beta {beta:g}": found[f"beta {beta:g}"]}), flush=True)
    return found


def _sizes(small: bool) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """Of student and teacher (Qwen3-0.6B and 4B), vocabulary and tokens of a row."""
    if small:
        one = {"hidden": 32, "layers": 1}
        return one, {**one, "hidden": 48}, 320, 64
    common = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}
    student = {"hidden": 1024, "layers": 28, "intermediate_size": 3072, "num_attention_heads": 16, **common}
    teacher = {"hidden": 2560, "layers": 36, "intermediate_size": 9728, "num_attention_heads": 32, **common}
    return student, teacher, 151936, 2048


def _model(sizes: dict[str, Any], vocabulary: int, device: str, small: bool) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(sizes)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=sizes.pop("hidden"),
        num_hidden_layers=sizes.pop("layers"),
        **{"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, **sizes},
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def _matrix_rate(device: str, small: bool) -> float:
    """Operations a second of one large product in bfloat16, the best of some."""
    import torch

    side = 64 if small else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return float(2 * side**3 / best)


def _weights(model: Any) -> int:
    """Numbers that a token is multiplied with: all but the embedding, which is looked up."""
    return sum(p.numel() for p in model.parameters()) - int(model.get_input_embeddings().weight.numel())


def _trainer(name: str, student: Any, teacher: Any, folder: str, device: str, small: bool, steps: int) -> Any:
    """A trainer of the case, and how many tokens a row of it has."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDTrainer

    from kdtrain.trainer import GKDTrainerWithMetrics
    from tests import tiny
    from tests.test_trainer import make_args

    length = _sizes(small)[3]
    # A quarter less than fits, in the tests' tokenizer.
    answer = "the path " * (3 * length // 16)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    tokens = len(tiny.make_tokenizer()(answer).input_ids)
    args = make_args(
        folder, use_cpu=device == "cpu", max_steps=steps, logging_steps=steps, bf16=not small, max_length=length,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, use_liger_kernel="Liger" in name,
    )  # fmt: skip
    rows = Dataset.from_list([{"messages": chat}] * 4 * steps)
    of_class = GKDTrainerWithMetrics if name == "kdtrain" else GKDTrainer
    trainer = of_class(student, teacher, args, train_dataset=rows, processing_class=tiny.make_tokenizer())
    if hasattr(trainer, "startup_checked"):
        trainer.startup_checked = trainer.alignment_checked = True
    return trainer, tokens


def end_to_end(device: str, small: bool) -> dict[str, Any]:
    """Tokens a second of a training with random weights, of kdtrain and of TRL's GKDTrainer, also with Liger.

    Utilisation is what the products of 3 forwards of the student and one of the teacher take, of the rate of one large
    product.
    """
    import importlib.util

    import torch

    of_student, of_teacher, vocabulary, _ = _sizes(small)
    teacher = _model(of_teacher, vocabulary, device, small)
    steps, rate = 2 if small else 6, _matrix_rate(device, small)
    found: dict[str, Any] = {"matrix rate, TFLOP/s": round(rate / 1e12, 3)}
    names = ["kdtrain", "TRL GKDTrainer"]
    names += ["TRL GKDTrainer, Liger"] if importlib.util.find_spec("liger_kernel") else []
    for name in names:
        student = _model(of_student, vocabulary, device, small)
        of_token = 6 * _weights(student) + 2 * _weights(teacher)
        with tempfile.TemporaryDirectory() as folder:
            try:
                trainer, tokens = _trainer(name, student, teacher, folder, device, small, steps)
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                a_second = 4 * steps * tokens / trainer.train().metrics["train_runtime"]
                found[name] = {
                    "tokens_per_second": round(a_second),
                    "utilisation": round(a_second * of_token / rate, 3),
                }
                if device == "cuda":
                    found[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
                del trainer
            except Exception as error:
                found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        del student
        print(json.dumps({name: found[name]}), flush=True)
    return found


def profile(device: str, small: bool) -> dict[str, Any]:
    """Where the time of the loss and of a whole step goes: products, everything else, and what stands still between."""
    import dataclasses

    from transformers import TrainerCallback

    from tests.benchmarks import gpu
    from tests.benchmarks.cases import forward_backward, make_inputs
    from tests.benchmarks.peers import OURS, PEERS

    tiny = {"tokens": 128, "vocab": 512, "student_hidden": 32, "teacher_hidden": 48, "dtype": "float32"}
    case = dataclasses.replace(gpu.CASE, **(tiny if small else {}))
    inputs = make_inputs(case, device)
    call = forward_backward(PEERS[OURS], case, inputs)
    for _ in range(2):
        inputs.forget_gradients()
        call()
    inputs.forget_gradients()
    watch = _Watch(device)
    watch.start()
    call()
    found = {"loss": watch.stop()}
    print(json.dumps(found), flush=True)
    del inputs, call
    steps = 4

    class OfLastStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == steps - 1:
                watch.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == steps:
                found["step"] = watch.stop()

    of_student, of_teacher, vocabulary, _ = _sizes(small)
    student, teacher = (_model(sizes, vocabulary, device, small) for sizes in (of_student, of_teacher))
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = _trainer("kdtrain", student, teacher, folder, device, small, steps)
        trainer.add_callback(OfLastStep())
        trainer.train()
    return found


class _Watch:
    """Shares of the time between `start` and `stop`."""

    def __init__(self, device: str) -> None:
        from torch.profiler import ProfilerActivity

        self._device = device
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]

    def start(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        self._began = time.perf_counter()
        self._run = torch.profiler.profile(activities=self._activities)
        self._run.__enter__()

    def stop(self) -> dict[str, Any]:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        whole = 1e6 * (time.perf_counter() - self._began)
        self._run.__exit__(None, None, None)
        of = "self_device_time_total" if self._device == "cuda" else "self_cpu_time_total"
        times = {event.key: float(getattr(event, of)) for event in self._run.key_averages()}
        total = sum(times.values()) or 1.0
        marks = ("gemm", "::mm", "::addmm", "::linear", "cutlass", "nvjet", "matmul")
        products = sum(time for name, time in times.items() if any(mark in name.lower() for mark in marks))
        largest = sorted(times.items(), key=lambda pair: -pair[1])[:8]
        return {
            "products": round(products / total, 3),
            "everything else": round(1 - products / total, 3),
            "standing still": round(max(1 - total / whole, 0), 3),
            "largest": {name[:80]: round(time / total, 3) for name, time in largest},
        }


PARTS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    part.__name__: part for part in (machine, products, oracle, trainings, speed, end_to_end, profile)
}


# ---- running them ----------------------------------------------------------------------------------------------------


def run_part(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One part in a process of its own; what it had printed by then, where it fails or takes too long."""
    target = options.out / f".{name}.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu", "--part", name, "--device", options.device, "--out", str(options.out)]
    command += ["--small"] if options.small else []
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        limit = LIMITS[name]
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 9)
            process.wait()
        output.seek(0)
        said = output.read().splitlines()
    found = {"seconds": round(time.perf_counter() - began, 1)}
    if target.exists():
        return {**found, "result": json.loads(target.read_text())}
    why = f"over {limit} s" if code is None else f"ended with {code}"
    partly = [line for line in said if line.startswith("{")]
    return {**found, "error": why, "said": said[-6:], "until then": partly}


def write(found: dict[str, Any], out: Path) -> None:
    """Both files."""
    (out / "gpu.json").write_text(json.dumps(found, indent=1))
    lines = ["# A look at a GPU", ""]
    for name, one in found.items():
        lines += [f"## {name}: {one.get('error', 'ran')}, {one['seconds']} s", ""]
        if PARTS[name].__doc__:
            lines += [str(PARTS[name].__doc__), ""]
        shown = one.get("result", one)
        lines += [f"- {key}: {json.dumps(value)}" for key, value in shown.items()] + [""]
    (out / "gpu.md").write_text("\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """0 where every part ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        warnings.filterwarnings("ignore")
        result = PARTS[options.part](options.device, options.small)
        (options.out / f".{options.part}.json").write_text(json.dumps(result))
        return 0
    found: dict[str, Any] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        found[name] = run_part(name, options)
        (options.out / f".{name}.json").unlink(missing_ok=True)
        write(found, options.out)
        print(name, json.dumps(found[name]), flush=True)
    return int(any("error" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
