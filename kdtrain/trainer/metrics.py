"""Metrics over micro-batches and ranks: recorded, reduced, and made into the records of a log.

The trainer appends one detached scalar tensor per micro-batch to lists under fixed names, with no device
synchronisation. When a log is due every rank packs all names, present or not, as (sum, count) into one vector, and one
gather brings the ranks together: a rank that never saw an image or a teacher sends zeros instead of skipping a
collective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.host import send
from kdtrain.losses.kinds import VISUAL_TARGETS
from kdtrain.memory import peak_memory_gib
from kdtrain.trainer.objective import Terms

# Terms of the loss, already weighted. Training: each entry is the micro-batch's share of its window's loss, so that the
# sum over micro-batches and ranks is the window's value. Evaluation: each entry is the batch's mean.
LOSS_TERMS = (
    "llm_kd_loss",
    "sft_loss",
    "vision_kd_loss",
    *(f"vision_kd_loss_{target}" for target in VISUAL_TARGETS),
    "aux_loss",
    "hidden_kd_loss",  # and its layers, of which each run has its own: `loss_terms`
)
# The same of the steps of one kind alone: whose answers they are on -> a term -> its name.
TERMS_OF_KIND = {
    True: {"llm_kd_loss": "llm_kd_loss_on_policy"},
    False: {"llm_kd_loss": "llm_kd_loss_off_policy", "sft_loss": "sft_loss_off_policy"},
}
# Plain sums over supervised tokens (`input_tokens`: over all tokens that are not padding, `positions`: those as well;
# the last two are of a teacher with another tokenizer).
TOKEN_SUMS = (
    "num_tokens",
    "num_correct",
    "num_teacher_tokens",
    "num_agree",
    "num_entropy_tokens",
    "student_entropy_sum",
    "teacher_entropy_sum",
    "input_tokens",
    "positions",
    "aligned_bytes",
    "answer_bytes",
)
# Plain sums over the student's own answers, see `samples.py`; the last one is by window.
SAMPLE_SUMS = (
    "samples",
    "sample_tokens",
    "cut_samples",
    "long_samples",
    "repetition_sum",
    "distinct_first_tokens",
)
# Of one micro-batch before training and at evaluations, see `term_gradients.py`.
GRADIENT_NORMS = ("grad_norm_llm_kd", "grad_norm_sft", "grad_norm_vision_kd", "grad_norm_hidden_kd")
# What is made of the sums over tokens.
TOKEN_METRICS = ("token_accuracy", "teacher_agreement", "student_entropy", "teacher_entropy", "aligned_share")
# Terms whose sum is the loss; the others are parts of one of these.
TOTAL_TERMS = ("llm_kd_loss", "sft_loss", "vision_kd_loss", "aux_loss", "hidden_kd_loss")
# In evaluations of a run that may stop early: the metric that decides, whatever its name.
EARLY_STOP_METRIC = "early_stop_metric"
# Which way an evaluation's metrics get better; entropies are neither good nor bad.
HIGHER_IS_BETTER = {
    "loss": False,
    **dict.fromkeys(LOSS_TERMS, False),
    "token_accuracy": True,
    "teacher_agreement": True,
}
_OF_KIND = [name for terms in TERMS_OF_KIND.values() for name in terms.values()]
# Answers that were written to a window's prompts, and those of them that train, where not all do.
_SELECTED = ("written_samples", "selected_samples")
_WINDOWS = ("windows", "on_policy_windows", "teacher_wait_s")
# Every rank has as many entries as there were windows: they are divided by the number of ranks, or by one another.
SAME_ON_ALL_RANKS = frozenset((*SAMPLE_SUMS, *_WINDOWS))
# Of one of several teachers: llm_kd_weight · Σ divergence, and the supervised tokens, of its own rows.
_OF_TEACHER = ("kd_of_teacher_{}", "tokens_of_teacher_{}")
# Of the models' work, see `throughput.py`; only where the device's peak is known.
MODEL_FLOPS = "model_flops"
_KEYS = (*_OF_KIND, *TOKEN_SUMS, *SAMPLE_SUMS, *_SELECTED, *_WINDOWS, MODEL_FLOPS)

Metrics = Mapping[str, Sequence[torch.Tensor]]


def loss_terms(options: DistillationOptions) -> tuple[str, ...]:
    """The loss terms that a run can have, the same on all ranks."""
    return LOSS_TERMS if options.hidden_kd is None else (*LOSS_TERMS, *options.hidden_kd.names)


def record(metrics: Mapping[str, list[torch.Tensor]], terms: Terms, batch: Batch, *, by_kind: bool) -> None:
    """Append the numbers of one micro-batch to the lists of `metrics`, a defaultdict.

    Args:
        by_kind: whether steps may be on-policy: their terms are then told apart from those of the others.
    """
    tokens, of_kind = terms.tokens, TERMS_OF_KIND[batch.generated_by == "student"] if by_kind else {}
    for key, value in terms.named.items():
        if key.startswith("vision_kd_loss") and batch.stand_in is not None:  # 0, and of no image of the data
            continue
        metrics[key].append(value)
        if key in of_kind:
            metrics[of_kind[key]].append(value)
        if key == "llm_kd_loss":
            metrics[f"{key}_weight"].append(terms.num_kd_items)
        if key.startswith("vision_kd_loss"):
            metrics[f"{key}_weight"].append(batch.image_units)
    metrics["num_tokens"].append(tokens.num_tokens)
    metrics["num_correct"].append(tokens.num_correct)
    metrics["student_entropy_sum"].append(tokens.student_entropy_sum)
    if tokens.num_agree is not None:
        metrics["num_teacher_tokens"].append(tokens.num_teacher_tokens)
        metrics["num_agree"].append(tokens.num_agree)
    if (chunks_B := batch.num_chunks) is not None and "llm_kd_loss" in terms.named:
        assert batch.student_chunks is not None
        metrics["llm_kd_loss_weight"][-1] = chunks_B.sum()  # in place of tokens, of an evaluation's mean
        for name in ("aligned_bytes", "answer_bytes"):
            metrics[name].append(getattr(batch.student_chunks, name).sum())
    for name, values in terms.of_teachers.items():
        for key, value in zip(_OF_TEACHER, values, strict=True):
            metrics[key.format(name)].append(value)
    if tokens.teacher_entropy_sum is not None:
        metrics["num_entropy_tokens"].append(tokens.num_entropy_tokens)
        metrics["teacher_entropy_sum"].append(tokens.teacher_entropy_sum)
    metrics["input_tokens"].append(batch.num_input_tokens)
    metrics["positions"].append(torch.tensor(float(terms.num_positions)))


@dataclass(frozen=True)
class Reduced:
    """Sums and counts over all ranks."""

    terms: Sequence[str]
    """The loss terms among them."""
    sums: dict[str, float]
    counts: dict[str, float]
    num_processes: int
    peak_memory_gib: float
    """Largest over the ranks."""
    teachers: Sequence[str] = ()
    """Names of several teachers."""


def reduce_metrics(
    metrics: Metrics,
    accelerator: Accelerator,
    *,
    token_weighted: bool,
    terms: Sequence[str] = LOSS_TERMS,
    teachers: Sequence[str] = (),
) -> Reduced:
    """Sums over the micro-batches of all ranks; a collective.

    Args:
        metrics: name -> scalar tensors, one per micro-batch; names outside the fixed list are ignored.
        token_weighted: weight the loss terms by the batch's supervised tokens (evaluation: batch means become a sum).
            A term that not every batch has, a visual one, needs its own weights under `<term>_weight`.
        terms: see `loss_terms`.
        teachers: names of several, the same on all ranks.
    """
    keys = (*terms, *_KEYS, *(key.format(name) for name in teachers for key in _OF_TEACHER))
    device = accelerator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    packed = torch.zeros(2 * len(keys) + 1, dtype=dtype, device=device)
    weights = _stack(metrics.get("num_tokens", ()), dtype, device)
    for i, key in enumerate(keys):
        if not (found := metrics.get(key)):
            continue
        values = _stack(found, dtype, device)
        count: float | torch.Tensor = len(values)
        if token_weighted and key in terms:
            own = metrics.get(f"{key}_weight")
            weight = weights if own is None else _stack(own, dtype, device)
            values, count = values * weight, weight.sum()
        packed[2 * i] = values.sum()
        packed[2 * i + 1] = count
    packed[-1] = peak_memory_gib(device)
    ranks = accelerator.gather(packed[None])
    total = ranks[:, :-1].sum(0).tolist()
    return Reduced(
        terms=terms,
        sums={key: total[2 * i] for i, key in enumerate(keys)},
        counts={key: total[2 * i + 1] for i, key in enumerate(keys)},
        num_processes=accelerator.num_processes,
        peak_memory_gib=ranks[:, -1].max().item(),
        teachers=teachers,
    )


def _stack(values: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if not values:
        return torch.zeros(0, dtype=dtype, device=device)
    if len({value.dtype for value in values}) > 1:
        values = [value.to(dtype) for value in values]
    if all(value.device.type == "cpu" for value in values):  # in one copy
        return send(torch.stack(list(values)).to(dtype), device)
    return torch.stack([send(value, device) for value in values]).to(dtype)


def training_metrics(reduced: Reduced, seconds: float, peak_flops: float | None = None) -> dict[str, float]:
    """One training record: terms averaged over the steps since the last one, as `loss` is; the rest over tokens.

    Args:
        peak_flops: operations a second that each device can do at most; None where it is not known.
    """
    steps = max(reduced.sums["windows"] / reduced.num_processes, 1)
    record = {key: reduced.sums[key] / steps for key in reduced.terms if reduced.counts[key]}
    record |= _terms_of_kind(reduced)
    record |= _terms_of_teachers(reduced)
    record |= _token_metrics(reduced)
    record["on_policy_fraction"] = reduced.sums["on_policy_windows"] / max(reduced.sums["windows"], 1)
    record |= _sample_metrics(reduced)
    if reduced.sums["written_samples"]:
        record["selected_fraction"] = reduced.sums["selected_samples"] / reduced.sums["written_samples"]
    if positions := reduced.sums["positions"]:
        record["padding_fraction"] = 1 - reduced.sums["input_tokens"] / positions
    if seconds > 0:
        record["tokens_per_second"] = reduced.sums["input_tokens"] / seconds
        record["supervised_tokens_per_second"] = reduced.sums["num_tokens"] / seconds
        if peak_flops is not None:
            record["mfu"] = reduced.sums[MODEL_FLOPS] / (peak_flops * reduced.num_processes * seconds)
        record["step_time_s"] = seconds / steps
        if reduced.counts["teacher_wait_s"]:
            record["teacher_wait_fraction"] = reduced.sums["teacher_wait_s"] / reduced.num_processes / seconds
    record["peak_memory_gib"] = reduced.peak_memory_gib
    return record


def evaluation_metrics(reduced: Reduced) -> dict[str, float]:
    """One evaluation record: token terms are means over the supervised tokens of the whole set, `loss` the total.

    Visual terms are means over its images.
    """
    terms = {key: reduced.sums[key] / reduced.counts[key] for key in reduced.terms if reduced.counts[key]}
    total = sum(terms[key] for key in TOTAL_TERMS if key in terms)
    return {"loss": total, **terms, **_terms_of_teachers(reduced), **_token_metrics(reduced)}


def _terms_of_kind(reduced: Reduced) -> dict[str, float]:
    """Means over the steps of their own kind; absent where there was none."""
    on_policy = reduced.sums["on_policy_windows"]
    windows = {True: on_policy, False: reduced.sums["windows"] - on_policy}
    return {
        name: reduced.sums[name] * reduced.num_processes / windows[kind]
        for kind, terms in TERMS_OF_KIND.items()
        for name in terms.values()
        if reduced.counts[name] and windows[kind]
    }


def _terms_of_teachers(reduced: Reduced) -> dict[str, float]:
    """The divergence from each of several teachers: the mean over the supervised tokens of its own rows, weighted."""
    pairs = {name: [reduced.sums[key.format(name)] for key in _OF_TEACHER] for name in reduced.teachers}
    return {f"llm_kd_loss_teacher_{name}": total / tokens for name, (total, tokens) in pairs.items() if tokens}


def _sample_metrics(reduced: Reduced) -> dict[str, float]:
    """Means over the samples; of first tokens over the on-policy steps. Absent where there was none to tell from."""
    ratios = {
        "completion_length": ("sample_tokens", reduced.sums["samples"]),
        "cut_fraction": ("cut_samples", reduced.sums["samples"]),
        "repetition": ("repetition_sum", reduced.sums["long_samples"]),
        "distinct_first_tokens": ("distinct_first_tokens", reduced.counts["distinct_first_tokens"]),
    }
    return {name: reduced.sums[total] / number for name, (total, number) in ratios.items() if number}


def _token_metrics(reduced: Reduced) -> dict[str, float]:
    record: dict[str, float] = {}
    if tokens := reduced.sums["num_tokens"]:
        record["token_accuracy"] = reduced.sums["num_correct"] / tokens
        record["student_entropy"] = reduced.sums["student_entropy_sum"] / tokens
    if teacher_tokens := reduced.sums["num_teacher_tokens"]:
        record["teacher_agreement"] = reduced.sums["num_agree"] / teacher_tokens
        if reduced.counts["teacher_entropy_sum"]:  # drawn tokens do not tell it
            entropy_tokens = max(reduced.sums["num_entropy_tokens"], 1)
            record["teacher_entropy"] = reduced.sums["teacher_entropy_sum"] / entropy_tokens
    if answer_bytes := reduced.sums["answer_bytes"]:
        record["aligned_share"] = reduced.sums["aligned_bytes"] / answer_bytes
    return record


class Stopwatch:
    """Seconds spent training since the last `lap`, without evaluation and saving."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None  # when it began to run; None while it stands

    def start(self) -> None:
        """Run, unless it does."""
        if self._since is None:
            self._since = time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what runs inside."""
        running, self._seconds, self._since = self._since is not None, self.seconds(), None
        try:
            yield
        finally:
            if running:
                self.start()

    def seconds(self) -> float:
        """Of the lap so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def resume(self, seconds: float) -> None:
        """Count the seconds of an earlier process to the first lap."""
        self._seconds = seconds

    def lap(self) -> float:
        """End the lap and return its seconds; 0 when none was running."""
        seconds, self._seconds, self._since = self.seconds(), 0.0, None
        return seconds


class RunClock:
    """Seconds of a whole run, evaluation and saving included; what a resumed run took before counts as well."""

    def __init__(self) -> None:
        self.earlier = 0.0
        """Seconds of earlier processes."""
        self._began, self._first_step = time.perf_counter(), 0

    def begin(self, step: int) -> None:
        """Training begins in this process, at `step`."""
        self.earlier, self._began, self._first_step = 0.0, time.perf_counter(), step

    def elapsed(self) -> float:
        """Seconds so far."""
        return self.earlier + time.perf_counter() - self._began

    def times(self, step: int, max_steps: int) -> dict[str, float]:
        """What has passed, and what is left at the pace of this process."""
        done, elapsed = step - self._first_step, self.elapsed()
        times = {"elapsed_s": elapsed}
        if done > 0:
            times["remaining_s"] = (elapsed - self.earlier) / done * max(max_steps - step, 0)
        return times
