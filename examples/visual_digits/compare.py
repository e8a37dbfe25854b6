"""Compares the five arms on held-out images.

    python examples/visual_digits/compare.py [--one-seed]

Accuracy is the share of questions whose generated answer is, to the letter, the right one: greedy generation with plain
transformers from the saved model and processor, stopped by the model itself; an answer that does not end is wrong.
Nothing is taken from kdtrain, so that a mistake in its loss or its masks would show.

Two arms are compared seed by seed, since equal seeds share their first weights. The interval is Student's t for the
mean of the paired differences, 95 %; an interval that contains 0 is called within noise. One seed alone has neither
intervals nor differences.

Writes `table.md`, `results.json` and `results.png` to `build/`.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HERE = Path(__file__).resolve().parent
BUILD, RUNS = HERE / "build", HERE / "runs"
ARMS = {
    "ce": "CE on the labels",
    "seq": "CE on the labels and the teacher's answers",
    "lm": "LM KD",
    "visual": "visual KD",
    "both": "LM and visual KD",
}
SEEDS = (0, 1, 2)
ONE_SEED = "--one-seed"
# First arm minus second.
PAIRS = (("seq", "ce"), ("lm", "ce"), ("visual", "ce"), ("both", "ce"), ("lm", "seq"), ("both", "seq"), ("both", "lm"))
T_95 = 4.303  # two-sided 95 % of Student's t with two degrees of freedom: three seeds
QUESTIONS = ("Which digit is this?", "Is it even or odd?", "How many closed loops does it have?")
BATCH_ROWS = 250


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question_of(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"][1]["text"]


def accuracy(model: PreTrainedModel, processor: Any, rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Share of right answers, by question and over all.

    Args:
        rows: with a question about one image and its answer.
        folder: what the images' paths are relative to.
    """
    right: dict[str, list[bool]] = {}
    for question in dict.fromkeys(map(question_of, rows)):  # one question at a time: all prompts are equally long
        asked = [row for row in rows if question_of(row) == question]
        right[question] = []
        for start in range(0, len(asked), BATCH_ROWS):
            some = asked[start : start + BATCH_ROWS]
            given = generate(model, processor, some, folder)
            right[question] += [a == row["messages"][1]["content"] for a, row in zip(given, some, strict=True)]
    of_question = {question: sum(of) / len(of) for question, of in right.items()}
    everything = [one for of in right.values() for one in of]
    return {"all": sum(everything) / len(everything), **of_question}


@torch.inference_mode()
def generate(model: PreTrainedModel, processor: Any, rows: Sequence[dict[str, Any]], folder: Path) -> list[str | None]:
    """The model's greedy answer to every row; None for one that it did not end."""
    prompts = [processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True) for row in rows]
    images = [[Image.open(folder / row["images"][0]).convert("RGB")] for row in rows]
    inputs = processor(text=prompts, images=images, return_tensors="pt")
    assert inputs["attention_mask"].all(), "prompts of one question are equally long"
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    end = processor.tokenizer.eos_token_id
    answers = []
    for ids in generated.tolist():
        answers.append(processor.tokenizer.decode(ids[: ids.index(end)]) if end in ids else None)
    return answers


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Mean of the paired differences, half the width of its 95 % interval, and how many of them are above 0."""
    pairs = [a - b for a, b in zip(first, second, strict=True)]
    half = T_95 * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return {"mean": statistics.mean(pairs), "half_interval": half, "above_0": sum(pair > 0 for pair in pairs)}


def compare(seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Scores the teacher and all students on `build/heldout.jsonl`."""
    rows = read_rows(BUILD / "heldout.jsonl")

    def score(run: str) -> dict[str, float]:
        model = AutoModelForImageTextToText.from_pretrained(RUNS / run, dtype=torch.float32).eval()
        return accuracy(model, AutoProcessor.from_pretrained(RUNS / run), rows, BUILD)

    arms = {arm: [score(f"{arm}_{seed}") for seed in seeds] for arm in ARMS}
    overall = {arm: [scores["all"] for scores in of] for arm, of in arms.items()}
    return {
        "heldout": {"rows": len(rows), "images": len({row["images"][0] for row in rows})},
        "teacher": score("teacher"),
        "arms": arms,
        "differences": {f"{a} − {b}": difference(overall[a], overall[b]) for a, b in PAIRS if len(seeds) > 1},
    }


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    keys = ("all", *QUESTIONS)
    lines = ["| arm | all | digit | parity | loops |", "|---|--:|--:|--:|--:|"]
    for arm, name in ARMS.items():
        cells = (spread([scores[key] for scores in results["arms"][arm]]) for key in keys)
        lines.append(f"| `{arm}`: {name} | {' | '.join(cells)} |")
    teacher = " | ".join(f"{100 * results['teacher'][key]:.1f}" for key in keys)
    lines.append(f"| teacher | {teacher} |")
    heldout, seeds = results["heldout"], len(results["arms"]["ce"])
    told = f"Right answers in percent, {heldout['rows']:,} questions about {heldout['images']} held-out images; "
    lines += ["", told + ("one seed." if seeds == 1 else f"mean and standard deviation over {seeds} seeds.")]
    if not results["differences"]:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "| difference | percentage points, 95 % interval | above 0 | |",
        "|---|--:|--:|---|",
    ]
    for name, of in results["differences"].items():
        verdict = "" if abs(of["mean"]) > of["half_interval"] else "within noise"
        interval = f"{100 * of['mean']:+.1f} ± {100 * of['half_interval']:.1f}"
        lines.append(f"| {name} | {interval} | {of['above_0']} of {seeds} seeds | {verdict} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy of every run, and the visual term while training."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, arm in enumerate(ARMS):
        values = [100 * scores["all"] for scores in results["arms"][arm]]
        left.plot([i - 0.12, i, i + 0.12][: len(values)], values, "o", color=f"C{i}", zorder=3)
        if len(values) == 1:
            continue
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        left.errorbar(i + 0.28, mean, deviation, fmt="_", color="0.3", markersize=12, capsize=4)
    teacher = 100 * results["teacher"]["all"]
    left.axhline(teacher, color="0.5", linestyle="--")
    left.annotate("teacher", (0, teacher), (0, -4), textcoords="offset points", va="top", color="0.4")
    left.set(
        title="Held-out accuracy of every seed, mean ± standard deviation",
        xticks=range(len(ARMS)),
        xticklabels=list(ARMS),
        ylabel="right answers, %",
    )
    for i, arm in enumerate(ARMS):
        for seed in range(len(results["arms"][arm])):
            log = read_rows(RUNS / f"{arm}_{seed}" / "logging.jsonl")
            points = [(record["step"], record["vision_kd_loss"]) for record in log if "vision_kd_loss" in record]
            if points:
                right.plot(*zip(*points, strict=True), color=f"C{i}", alpha=0.7, label=arm if seed == 0 else None)
    right.set(title="Visual term: squared error of features", xlabel="step", yscale="log")
    right.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    if sys.argv[1:] not in ([], [ONE_SEED]):
        sys.exit(f"usage: compare.py [{ONE_SEED}]")
    seeds = SEEDS[:1] if sys.argv[1:] else SEEDS
    runs = ["teacher", *(f"{arm}_{seed}" for arm in ARMS for seed in seeds)]
    missing = [run for run in runs if not (RUNS / run / "config.json").exists()]
    if missing:
        sys.exit(f"No model in runs/ for {', '.join(missing)}. Run {HERE / 'demo.py'} first.")
    transformers.utils.logging.disable_progress_bar()
    results = compare(seeds)
    (BUILD / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (BUILD / "table.md").write_text(table(results), encoding="utf-8")
    draw(results, BUILD / "results.png")
    print(table(results))


if __name__ == "__main__":
    main()
