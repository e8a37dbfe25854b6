"""What has become of the students, on held-out numbers: plain transformers, nothing taken from kdtrain.

`figures` measures one model:

    right      share of rows whose greedy answer ends, and with the right list: the digits in ascending order
    slips      share whose greedy answer has a wrong list in it; `regained` is the share of these that end right
    ce         nats per token of the data's answers
    data_kl    KL(S‖T), nats per token of the data's answers: student S and teacher T on text
               that they are given
    own_kl     the same on answers that the student draws itself, temperature 1, to the same prompts
    gap        own_kl - data_kl: the exposure gap

`table` and `plot` show what `demo.py` has collected.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
NEW_TOKENS = 56  # as in on.yaml: a right answer has 48
ARMS = {
    "off": "off-policy",
    "on": "on-policy",
    "mixed": "mixed",
    "off_time": "off-policy, as long as on-policy took",
    "mixed_time": "mixed, as long as on-policy took",
}
# What is compared: a run, the one that it is compared with, and what the two have in common.
PAIRS = (
    ("on", "off", "tokens"),
    ("mixed", "off", "tokens"),
    ("on", "off_time", "time"),
    ("mixed_time", "off_time", "time"),
)
T_95 = 4.303  # two-sided 95 % of Student's t with two degrees of freedom: three seeds

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def figures(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    greedy: bool = True,
) -> dict[str, float]:
    """All figures of a model; without `greedy` those of the exposure gap alone."""
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")["input_ids"]
    end = torch.full((len(rows), 1), tokenizer.eos_token_id)
    answers = tokenizer([row["completion"] for row in rows], return_tensors="pt")["input_ids"]
    data = divergence(model, teacher, prompts, torch.cat([answers, end], 1), end_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        written = generate(model, prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    own = divergence(model, teacher, prompts, written, end_id=tokenizer.eos_token_id)
    found = {"ce": data["ce"], "data_kl": data["kl"], "own_kl": own["kl"], "gap": own["kl"] - data["kl"]}
    if greedy:
        texts = [ended(tokenizer, ids) for ids in generate(model, prompts, do_sample=False).tolist()]
        found |= correctness(texts, rows)
    return found


def generate(model: PreTrainedModel, prompts: torch.Tensor, **sampling: Any) -> torch.Tensor:
    """Answers to prompts that are equally long, [rows, tokens]; behind an end stands padding."""
    mask = torch.ones_like(prompts)
    return model.generate(prompts, attention_mask=mask, max_new_tokens=NEW_TOKENS, **sampling)[:, prompts.shape[1] :]


def divergence(
    model: PreTrainedModel, teacher: PreTrainedModel, prompts: torch.Tensor, answers: torch.Tensor, end_id: int
) -> dict[str, float]:
    """Means over the answers' tokens, their ends included: KL(S‖T) over the whole vocabulary, and CE of the tokens."""
    counted = (answers == end_id).int().cumsum(1).roll(1, 1)
    counted[:, 0] = 0  # what comes before an answer's first token is no end
    counted = counted == 0
    ids, first = torch.cat([prompts, answers], 1), prompts.shape[1] - 1
    log_s, log_t = (F.log_softmax(of(ids).logits[:, first:-1].float(), -1) for of in (model, teacher))
    kl = (log_s.exp() * (log_s - log_t)).sum(-1)
    ce = -log_s.gather(-1, answers[..., None])[..., 0]
    return {"kl": kl[counted].mean().item(), "ce": ce[counted].mean().item()}


def ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str | None:
    """The text of an answer; None of one that does not end."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)]) if end in ids else None


def correctness(texts: Sequence[str | None], rows: Sequence[Row]) -> dict[str, float]:
    """Shares of answers that end right, that have a slip, and of these those that end right all the same."""
    right = [
        text is not None and text.rsplit(",", 1)[-1] == row["completion"].rsplit(",", 1)[-1]
        for text, row in zip(texts, rows, strict=True)
    ]
    slips = [text != row["completion"] for text, row in zip(texts, rows, strict=True)]
    regained = sum(a and b for a, b in zip(right, slips, strict=True))
    return {
        "right": sum(right) / len(rows),
        "slips": sum(slips) / len(rows),
        "regained": regained / max(sum(slips), 1),
    }


class Measure:
    """Figures of saved models, beside one teacher on the same rows.

    Args:
        teacher: its folder.
        rows: a file of rows with answers.
    """

    CURVE_ROWS = 256

    def __init__(self, teacher: Path, rows: Path) -> None:
        import transformers
        from transformers import AutoTokenizer

        transformers.utils.logging.disable_progress_bar()

        self.rows = read_rows(rows)
        self._tokenizer = AutoTokenizer.from_pretrained(teacher)
        self._teacher = self._load(teacher)
        self._points: dict[Path, dict[str, float]] = {}

    def __call__(self, folder: Path) -> dict[str, float]:
        return figures(self._load(folder), self._teacher, self._tokenizer, self.rows)

    def curve(self, run: Path, start: Path, tokens_per_step: float) -> list[dict[str, float]]:
        """The exposure gap before training and at each checkpoint, over the tokens trained so far."""
        steps = {int(folder.name.rpartition("-")[2]): folder for folder in run.glob("checkpoint-*")}
        return [
            {"step": step, "tokens": round(step * tokens_per_step), **self._point(folder)}
            for step, folder in sorted({0: start, **steps}.items())
        ]

    def _point(self, folder: Path) -> dict[str, float]:
        if folder not in self._points:  # the start is one of every arm
            some = self.rows[: self.CURVE_ROWS]
            self._points[folder] = figures(self._load(folder), self._teacher, self._tokenizer, some, greedy=False)
        return self._points[folder]

    @staticmethod
    def _load(folder: Path) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the differences seed by seed, and half the width of its 95 % interval; None of fewer than three."""
    pairs = [a - b for a, b in zip(first, second, strict=True)]
    if len(pairs) < 3:
        return statistics.mean(pairs), None
    return statistics.mean(pairs), T_95 * statistics.stdev(pairs) / math.sqrt(len(pairs))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: figures of each arm, then differences and verdicts."""
    seeds = len(results["start"])
    lines = [
        "| | tokens | CPU s | right | with a slip | of these right in the end | CE | KL on data | KL on own | gap |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        _line("start", results["start"]),
        *(_line(what, results["arms"][arm]) for arm, what in ARMS.items()),
        _line("teacher", [results["teacher"]]),
        "",
        f"On {results['heldout']} held-out numbers, mean of {seeds} seed{'s' if seeds > 1 else ''}. CE on the data's "
        "answers; KL is KL(S‖T), of student S and teacher T, on the data's answers and on answers drawn from the "
        "student; gap is the second minus the first. All in nats per token.",
        "",
        "| compared | equal | right, points | CE | verdict by CE |",
        "|---|---|--:|--:|---|",
        *(_verdict(found, results["arms"]) for found in results["verdicts"]),
        "",
        f"First minus second. {_intervals(results['verdicts'][0]['method'], seeds)}",
    ]
    return "\n".join(lines)


def _line(what: str, found: Sequence[dict[str, float]]) -> str:
    def mean(name: str) -> float:
        return statistics.mean(one[name] for one in found)

    cost = f"{mean('tokens'):,.0f} | {mean('cpu_seconds'):.0f}" if "tokens" in found[0] else " | "
    right = f"{100 * mean('right'):.1f}"
    if len(found) > 1:
        right += f" ± {100 * statistics.stdev(one['right'] for one in found):.1f}"
    shares = f"{right} | {100 * mean('slips'):.1f} | {100 * mean('regained'):.1f}"
    nats = " | ".join(f"{mean(name):.4f}" for name in ("ce", "data_kl", "own_kl", "gap"))
    return f"| {what} | {cost} | {shares} | {nats} |"


def _verdict(found: dict[str, Any], arms: dict[str, list[dict[str, float]]]) -> str:
    right = [[100 * one["right"] for one in arms[found[side]]] for side in ("arm", "against")]
    mean, half = difference(*right)
    points = f"{mean:+.1f}" + ("" if half is None else f" ± {half:.1f}")
    ce = f"{found['ce']:+.4f}"
    if found["interval"] is not None:
        ce += f", {found['interval'][0]:+.4f} to {found['interval'][1]:+.4f}"
    first, second = (ARMS[found[side]].partition(",")[0] for side in ("arm", "against"))
    return f"| {first} − {second} | {found['equal']} | {points} | {ce} | {found['word']} |"


def _intervals(method: str, seeds: int) -> str:
    if seeds < 3:
        return f"The interval of CE is by {method}; of accuracy there is none below three seeds."
    return "Intervals of 95 %: Student's t over the seeds, for accuracy as for CE."


def plot(results: dict[str, Any], path: Path) -> None:
    """The exposure gap and its two sides over the tokens trained, one line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = {"gap": "exposure gap", "own_kl": "KL(S‖T) on own answers", "data_kl": "KL(S‖T) on the data's answers"}
    for axes, (name, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.axhline(0, color="lightgrey", linewidth=1)
        for arm, colour in (("off", "tab:blue"), ("on", "tab:orange"), ("mixed", "tab:green")):
            for i, one in enumerate(results["arms"][arm]):
                points = [(point["tokens"] / 1000, point[name]) for point in one["curve"]]
                axes.plot(*zip(*points, strict=True), color=colour, marker=".", label=None if i else ARMS[arm])
        axes.set(title=title, xlabel="thousand tokens trained")
    figure.axes[0].set_ylabel("nats per token")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
