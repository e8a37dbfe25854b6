"""An on-policy window end to end: the student writes 16 answers, the teacher scores them, gradients come out.

Four micro-batches of four rows, as each trainer takes them from its own data loader; the optimizer's step, which all of
them share, is left out. Beside the trainers stand the parts that none can do without, written bare, and their sum.

Which answers stop is a matter of the weights, the same for every contender: in the residual stream a token's own
channel outweighs the rest, and it decides what comes next. Behind one kind of token any of that kind may follow, and
never the end; a countdown token is followed by the next lower one, and the last by the end.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerFast

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers import IGNORE_INDEX, OURS, PEERS
from tests.benchmarks.timing import interleave, progress

BETA = 0.5
STOP, PAD, FIRST_COUNTDOWN, COUNTDOWNS = 0, 1, 2, 100
BARE, CHECKPOINTED = "bare parts", "trl_gkd_checkpointed"
CONTENDERS = {
    OURS: "kdtrain",
    "trl_distillation": "TRL DistillationTrainer",
    "trl_gkd": "TRL GKDTrainer, checkpointing off",
    CHECKPOINTED: "TRL GKDTrainer, its defaults",
    BARE: "sum of the bare parts",
}
PARTS = {
    "sampling": "sampling, one decode loop of all rows",
    "teacher": "teacher's forward, no head",
    "student": "student's forward and backward, no head",
    "loss": "heads and loss",
}


@dataclass(frozen=True)
class OnPolicyCase:
    """A window of Qwen3 models with untied heads; prompts of 24 to 40 tokens."""

    new_tokens: int
    stopping: bool = False
    """Whether half of the rows stop in the first quarter."""
    student: tuple[int, int] = (256, 4)
    """Width and layers."""
    teacher: tuple[int, int] = (384, 6)
    vocab: int = 4096
    rows: int = 4
    micro_batches: int = 4

    def __str__(self) -> str:
        sizes = ", ".join(f"{width}×{layers}" for width, layers in (self.student, self.teacher))
        stops = ", half stop in the first quarter" if self.stopping else ""
        return f"{self.micro_batches} × {self.rows} rows, {self.new_tokens} new tokens{stops}, {sizes}, V {self.vocab}"

    @property
    def all_rows(self) -> int:
        return self.rows * self.micro_batches


def answer_lengths(case: OnPolicyCase) -> list[int]:
    """Tokens that each row writes. The rows that stop do so between an eighth and a quarter of the limit."""
    quarter = min(case.new_tokens // 4, COUNTDOWNS)
    short = [quarter - i * (quarter // 2) // case.all_rows for i in range(case.all_rows)]
    return [short[i] if case.stopping and i % 2 else case.new_tokens for i in range(case.all_rows)]


def make_prompts(case: OnPolicyCase) -> list[list[int]]:
    """Ragged; the last token of each decides how long its answer becomes."""
    draw = random.Random(0)
    prompts = []
    for length in answer_lengths(case):
        ids = [draw.randrange(FIRST_COUNTDOWN + COUNTDOWNS, case.vocab) for _ in range(draw.randrange(24, 41))]
        if length < case.new_tokens:  # a countdown of n tokens writes n - 1 more and the end
            ids[-1] = FIRST_COUNTDOWN + length - 1
        prompts.append(ids)
    return prompts


def make_model(case: OnPolicyCase, size: tuple[int, int], seed: int) -> Any:
    """Random weights, but for the channels that say which token may follow."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    width, layers = size
    config = Qwen3Config(
        vocab_size=case.vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64, tie_word_embeddings=False,
        eos_token_id=STOP, pad_token_id=PAD, bos_token_id=None, max_position_embeddings=1024,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    read, write = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    read[FIRST_COUNTDOWN + COUNTDOWNS :, 0] = 16.0
    write[FIRST_COUNTDOWN + COUNTDOWNS :, 0] = 3.0
    for i in range(COUNTDOWNS):
        read[FIRST_COUNTDOWN + i, 1 + i] = 16.0
        write[STOP if i == 0 else FIRST_COUNTDOWN + i - 1, 1 + i] = 3.0
    return model


def make_words(case: OnPolicyCase) -> PreTrainedTokenizerFast:
    """A tokenizer that makes token i of the word "ti", but for the end and the padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{i}": i for i in range(2, case.vocab)} | {"<stop>": STOP, "<pad>": PAD}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<stop>", pad_token="<pad>")


# ---- the trainers ----------------------------------------------------------------------------------------------------


def make_trainer(name: str, case: OnPolicyCase, student: Any, teacher: Any) -> Any:
    import datasets
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from kdtrain.trainer import GKDTrainerWithMetrics

    words, prompts = make_words(case), make_prompts(case)
    common = {
        "output_dir": tempfile.mkdtemp(prefix="kdtrain-bench-"), "use_cpu": True, "bf16": False, "report_to": "none",
        "max_steps": 1000, "disable_tqdm": True, "beta": BETA, "temperature": 1.0,
        "per_device_train_batch_size": case.rows, "gradient_accumulation_steps": case.micro_batches,
    }  # fmt: skip
    if name == "trl_distillation":
        args = DistillationConfig(**common, max_completion_length=case.new_tokens, gradient_checkpointing=False)
        rows = datasets.Dataset.from_list([{"prompt": words.decode(ids)} for ids in prompts])
        return DistillationTrainer(student, teacher, args=args, train_dataset=rows, processing_class=words)
    # The default of gradient checkpointing is on.
    off = {} if name == CHECKPOINTED else {"gradient_checkpointing": False}
    args = GKDConfig(**common, lmbda=1.0, max_new_tokens=case.new_tokens, max_length=1024, **off)
    if name == OURS:
        given = [
            {"input_ids": [*ids, STOP], "labels": [IGNORE_INDEX] * len(ids) + [STOP], "prompt_length": len(ids)}
            for ids in prompts
        ]
        return GKDTrainerWithMetrics(student, teacher, args=args, train_dataset=given, processing_class=words)
    chats = [
        {
            "prompt": words.decode(ids),
            "messages": [{"role": "user", "content": words.decode(ids)}, {"role": "assistant", "content": "<stop>"}],
        }
        for ids in prompts
    ]
    words.chat_template = "{{ messages | map(attribute='content') | join(' ') }}"
    return GKDTrainer(
        student, teacher, args=args, train_dataset=datasets.Dataset.from_list(chats), processing_class=words
    )


def make_window(trainer: Any, case: OnPolicyCase) -> Callable[[], None]:
    """One optimizer window of a trainer as its training loop runs it, up to the optimizer's step."""
    if trainer.args.gradient_checkpointing:  # `train` switches it on
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    loader = trainer.get_train_dataloader()
    trainer.model.train()

    def window() -> None:
        batches, num_items = trainer.get_batch_samples(iter(loader), case.micro_batches, trainer.args.device)
        assert len(batches) == case.micro_batches
        trainer.current_gradient_accumulation_steps = len(batches)
        for i, inputs in enumerate(batches):
            trainer.accelerator.gradient_state._set_sync_gradients(i == len(batches) - 1)
            trainer.training_step(trainer.model, inputs, num_items)
        trainer.state.global_step += 1

    return window


# ---- the bare parts --------------------------------------------------------------------------------------------------


class BareParts:
    """What a window cannot do without. `seconds` has the time of each part, of all windows so far."""

    def __init__(self, case: OnPolicyCase, student: Any, teacher: Any, clock: Callable[[], float]) -> None:
        self._case, self._student, self._teacher, self._clock = case, student, teacher, clock
        self._prompts = make_prompts(case)
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}

    def window(self) -> None:
        answers = self._timed("sampling", self._sample)
        # Rows of like length share a batch.
        rows = sorted(
            ([*prompt, *answer] for prompt, answer in zip(self._prompts, answers, strict=True)), key=len, reverse=True
        )
        batches = [_right_padded(rows[i : i + self._case.rows]) for i in range(0, len(rows), self._case.rows)]
        self._timed("teacher", lambda: [self._run_teacher(*batch) for batch in batches])
        self._timed("student", lambda: [self._run_student(*batch) for batch in batches])
        self._timed("loss", lambda: self._losses(sum(map(len, answers))))

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = self._clock()
        result = call()
        self.seconds[name].append(self._clock() - start)
        return result

    @torch.no_grad()
    def _sample(self) -> list[list[int]]:
        case, model = self._case, self._student.eval()
        width = max(map(len, self._prompts))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in self._prompts])
        lengths = torch.tensor([len(row) for row in self._prompts])
        mask = (torch.arange(width + case.new_tokens) >= width - lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, step_ids, written = DynamicCache(), ids, []
        for i in range(case.new_tokens):
            start = 0 if i == 0 else width + i - 1
            hidden = model.model(
                input_ids=step_ids, attention_mask=mask[:, : width + i], past_key_values=cache, use_cache=True,
                position_ids=positions[:, start : width + i],
            ).last_hidden_state[:, -1]  # fmt: skip
            step_ids = torch.multinomial(model.lm_head(hidden).softmax(-1), 1)
            written.append(step_ids)
        return [_until_stop(row) for row in torch.cat(written, 1).tolist()]

    @torch.no_grad()
    def _run_teacher(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self._teacher.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def _run_student(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        hidden = self._student.train().model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    def _losses(self, tokens: int) -> None:
        """The loss of hidden states, which `--only loss` holds against other implementations."""
        per_batch = -(-tokens // self._case.micro_batches)
        for _ in range(self._case.micro_batches):
            states = torch.randn(per_batch, self._case.student[0], requires_grad=True)
            PEERS[OURS].loss(
                states, self._student.lm_head.weight, torch.zeros(per_batch, dtype=torch.long),
                torch.randn(per_batch, self._case.teacher[0]), self._teacher.lm_head.weight, BETA, 1.0, 0.0,
            ).backward()  # fmt: skip


def _right_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _until_stop(row: list[int]) -> list[int]:
    return row[: row.index(STOP) + 1] if STOP in row else row


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(case: OnPolicyCase, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Processor and wall time of each contender's window, and their ratios to ours within a round."""
    teacher = make_model(case, case.teacher, 2).requires_grad_(False).eval()
    student = make_model(case, case.student, 1)
    students = {name: copy.deepcopy(student) for name in names}  # trainers change theirs
    bare = BareParts(case, students.get(BARE), teacher, time.process_time)
    windows = {
        name: bare.window if name == BARE else make_window(make_trainer(name, case, own, teacher), case)
        for name, own in students.items()
    }
    wall: dict[str, list[float]] = {name: [] for name in names}

    def recorded(name: str) -> Callable[[], None]:
        def call() -> None:
            start = time.perf_counter()
            if wall[name]:
                windows[name]()
            else:  # the warm-up
                _check_work(name, windows[name], case, teacher)
            wall[name].append(time.perf_counter() - start)

        return call

    def forget_gradients() -> None:
        for model in students.values():
            model.zero_grad(set_to_none=True)

    timings = interleave(
        {name: recorded(name) for name in names}, rounds=rounds, before=forget_gradients, clock=_processor_seconds_of
    )
    found = {name: timing.as_dict() for name, timing in timings.items()}
    for name, row in found.items():
        if "ratio" in row:
            theirs, mine = wall[name][-rounds:], wall[OURS][-rounds:]
            row["wall_s"] = statistics.median(theirs)
            row["wall_ratio"] = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
    parts = {name: statistics.median(seconds[-rounds:]) for name, seconds in bare.seconds.items() if seconds}
    shown = ", ".join(f"{name} {row.get('ratio', float('nan')):.2f}" for name, row in found.items())
    progress(f"on-policy, {case}: {shown}")
    machine = describe_machine()
    measured = "Measured {date}, load average {load}, commit {commit}, on {cpu}.".format(**machine)
    return {
        "case": dataclasses.asdict(case), "title": str(case), "peers": found, "parts": parts, "measured": measured,
    }  # fmt: skip


def _check_work(name: str, window: Callable[[], None], case: OnPolicyCase, teacher: Any) -> None:
    """The teacher has scored the same tokens for everybody."""
    scored = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal scored
        scored += int(kwargs["attention_mask"].sum())

    handle = teacher.model.register_forward_pre_hook(count, with_kwargs=True)
    window()
    handle.remove()
    wanted = sum(map(len, make_prompts(case))) + sum(answer_lengths(case))
    assert scored == wanted, f"{CONTENDERS[name]} has scored {scored} tokens, not {wanted}"


def _processor_seconds_of(call: Callable[[], Any]) -> float:
    """Of all threads of this process: what others do on the same cores is not counted."""
    start = time.process_time()
    call()
    return time.process_time() - start
