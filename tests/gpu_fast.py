"""How fast a GPU is: parts of `python -m tests.gpu`. The loss, whole steps of this and other trainers, profiles."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tempfile
import time
from typing import Any

from tests.gpu_right import Found, tell

_TINY = {"tokens": 128, "vocab": 512, "student_hidden": 32, "teacher_hidden": 48, "dtype": "float32"}
"""Of the loss, where the script itself is tried."""


def speed(device: str, small: bool, seconds: float) -> Found:
    """The loss beside others and the four products alone."""
    from tests.benchmarks import gpu

    found: Found = {}
    for beta in (0.5, 0.0, 1.0):
        case = dataclasses.replace(gpu.CASE, beta=beta, **(_TINY if small else {}))
        row = gpu.measure(case, 2 if small else 3, device)
        found[f"beta {beta:g}"] = {
            name: {
                "ms": round(1000 * one["median_s"], 2) if "median_s" in one else one.get("note"),
                "extra_gib": round(one.get("memory", {}).get("bytes", 0) / 2**30, 2),
            }
            for name, one in row["peers"].items()
        }
        tell(**{f"beta {beta:g}": found[f"beta {beta:g}"]})
    return found


# ---- whole steps -----------------------------------------------------------------------------------------------------


def _sizes(small: bool) -> tuple[Found, Found, int, int]:
    """Of student and teacher (Qwen3-0.6B and 4B), vocabulary and tokens of a row."""
    if small:
        one = {"hidden": 32, "layers": 1}
        return one, {**one, "hidden": 48}, 320, 64
    common = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}
    student = {"hidden": 1024, "layers": 28, "intermediate_size": 3072, "num_attention_heads": 16, **common}
    teacher = {"hidden": 2560, "layers": 36, "intermediate_size": 9728, "num_attention_heads": 32, **common}
    return student, teacher, 151936, 2048


def _model(sizes: Found, vocabulary: int, device: str, small: bool) -> Any:
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
    torch.manual_seed(0)  # the same student for every trainer
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


ROWS, MICRO_BATCHES = 2, 2
OURS, DISTILLATION = "kdtrain", "TRL DistillationTrainer's loss"
OTHERS = ("TRL GKDTrainer", DISTILLATION, "TRL GKDTrainer, Liger")


def make_trainer(name: str, student: Any, teacher: Any, folder: str, device: str, small: bool, steps: int) -> Any:
    """A trainer of the case, and how many tokens of a row of it are trained on."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDTrainer

    from kdtrain.trainer import GKDTrainerWithMetrics
    from tests import tiny
    from tests.test_trainer import make_args

    length, tokenizer = _sizes(small)[3], tiny.make_tokenizer()
    # A quarter less than fits, in the tests' tokenizer.
    answer = "the path " * (3 * length // 16)
    tokens = len(tokenizer(answer).input_ids)
    common = {
        "use_cpu": device == "cpu", "max_steps": steps, "logging_steps": steps, "bf16": not small,
        "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": MICRO_BATCHES,
    }  # fmt: skip
    count = ROWS * MICRO_BATCHES * steps
    if name == DISTILLATION:
        return _given_answers(student, teacher, tokenizer, answer, folder, count, common), tokens
    args = make_args(folder, max_length=length, use_liger_kernel="Liger" in name, **common)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    rows = Dataset.from_list([{"messages": chat}] * count)
    of_class = GKDTrainerWithMetrics if name == OURS else GKDTrainer
    trainer = of_class(student, teacher, args, train_dataset=rows, processing_class=tokenizer)
    if hasattr(trainer, "startup_checked"):
        trainer.startup_checked = trainer.alignment_checked = True
    return trainer, tokens


def _given_answers(
    student: Any, teacher: Any, tokenizer: Any, answer: str, folder: str, count: int, common: Found
) -> Any:
    """TRL's DistillationTrainer, which trains on what the student writes alone: here it has written the data's answer.

    Its loss, its forwards and its step are its own; nothing is generated.
    """
    import torch
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    chat = [{"role": "user", "content": "a"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)]

    class Given(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            device = self.accelerator.device
            found: dict[str, Any] = {}
            for name, own in zip(("prompt", "completion"), ids, strict=True):
                found[f"{name}_ids"] = torch.tensor([own] * len(inputs), device=device)
                found[f"{name}_mask"] = torch.ones_like(found[f"{name}_ids"])
            return found | {"num_items_in_batch": found["completion_mask"].sum()}

    args = DistillationConfig(
        output_dir=folder, beta=0.5, gradient_checkpointing=False, report_to="none", save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True, max_completion_length=len(ids[1]), **common,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": prompt}] * count)
    return Given(student, teacher, args=args, train_dataset=rows, processing_class=tokenizer)


def _clock(trainer: Any, device: str, skipped: int) -> list[float]:
    """Where the times of the steps' ends will be, from the last of the first `skipped` on: those compile kernels."""
    import torch
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= skipped:
                if device == "cuda":
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    return ends


def _measured(name: str, student: Any, teacher: Any, device: str, small: bool, rate: float) -> Found:
    """Tokens a second, utilisation and peak of one trainer, without its first two steps."""
    import torch

    steps, skipped = (3, 1) if small else (8, 2)
    of_token = 6 * _weights(student) + 2 * _weights(teacher)
    with tempfile.TemporaryDirectory() as folder:
        trainer, tokens = make_trainer(name, student, teacher, folder, device, small, steps)
        ends = _clock(trainer, device, skipped)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    a_second = ROWS * MICRO_BATCHES * tokens * (len(ends) - 1) / (ends[-1] - ends[0])
    found: Found = {"tokens_per_second": round(a_second), "utilisation": round(a_second * of_token / rate, 3)}
    found["loss"] = next(one["loss"] for one in trainer.state.log_history if "loss" in one)
    if device == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return found


def end_to_end(device: str, small: bool, seconds: float) -> Found:
    """Tokens a second of a training with random weights, of kdtrain and of TRL's trainers, also with Liger.

    Utilisation is what the products of 3 forwards of the student and one of the teacher take, of the rate of one large
    product. `loss` is the mean of all steps: of the same rows, but for the terms that mark an answer's end.
    """
    of_student, of_teacher, vocabulary, _ = _sizes(small)
    teacher = _model(of_teacher, vocabulary, device, small)
    rate = _matrix_rate(device, small)
    found: Found = {"matrix rate, TFLOP/s": round(rate / 1e12, 3)}
    until = time.perf_counter() + seconds
    for name in (OURS, *OTHERS):
        if "Liger" in name and importlib.util.find_spec("liger_kernel") is None:
            found[name] = "liger_kernel is not installed"
            continue
        if time.perf_counter() > until:
            found[name] = "no time for it"
            continue
        student = _model(of_student, vocabulary, device, small)
        try:
            found[name] = _measured(name, student, teacher, device, small, rate)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        del student
        tell(**{name: found[name]})
    return found


# ---- where the time goes ---------------------------------------------------------------------------------------------


def profile(device: str, small: bool, seconds: float) -> Found:
    """Where the time of the loss and of a whole step goes: products, everything else, and what stands still between."""
    from transformers import TrainerCallback

    from tests.benchmarks import gpu
    from tests.benchmarks.cases import forward_backward, make_inputs
    from tests.benchmarks.peers import OURS as OUR_LOSS
    from tests.benchmarks.peers import PEERS

    case = dataclasses.replace(gpu.CASE, **(_TINY if small else {}))
    inputs = make_inputs(case, device)
    call = forward_backward(PEERS[OUR_LOSS], case, inputs)
    for _ in range(2):
        inputs.forget_gradients()
        call()
    inputs.forget_gradients()
    watch = _Watch(device)
    watch.start()
    call()
    found = {"loss": watch.stop()}
    tell(**found)
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
        trainer, _ = make_trainer(OURS, student, teacher, folder, device, small, steps)
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
        self._run = torch.profiler.profile(activities=self._activities)
        self._run.__enter__()
        self._began = time.perf_counter()  # to begin to record takes longer than a step

    def stop(self) -> Found:
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
