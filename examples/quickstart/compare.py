"""Compares the students and the teacher on packages that none of them has read.

    python examples/quickstart/compare.py [RUN_DIR ...]

Further runs are further rows of the table. Every number is a mean over the same supervised tokens: the held-out
answers, each with the token that ends it.

    CE          -log p(token), nats per token; perplexity is e to that power
    KL          KL(teacher || model), nats per token: what distillation minimises
    agreement   share of tokens where the model and the teacher have the same first choice

The maths is written out here and not taken from kdtrain, so that a mistake in its loss would show: logits in float32,
log-softmax and sums in float64, one row of a batch like any other however long it is.

Prints the table, and writes it to `build/table.md` and `build/results.json`.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
TEACHER = HERE / "runs" / "teacher"
# What to call it, the model, and what it was trained on.
MODELS = (
    ("student before training", HERE / "build" / "student_init", None),
    ("student, CE only", HERE / "runs" / "ce", "train_400"),
    ("student, distilled", HERE / "runs" / "distill", "train_400"),
    ("teacher", TEACHER, "train_all"),
)
BATCH_ROWS = 32


@dataclass(frozen=True)
class Score:
    """Means over the supervised tokens of the held-out rows."""

    ce: float
    kl: float
    agreement: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.ce)


@dataclass(frozen=True)
class Batch:
    """B rows, padded on the right to T positions."""

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    predicts_BT: torch.Tensor  # True where the next token is one to predict
    targets_N: torch.Tensor  # those tokens, row by row


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def batches(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Rows of similar length together; the order changes nothing in sums over tokens."""
    encoded = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for row in rows
    ]
    encoded.sort(key=lambda row: len(row["input_ids"]))
    for start in range(0, len(encoded), BATCH_ROWS):
        some = encoded[start : start + BATCH_ROWS]
        ids_BT = torch.zeros(len(some), max(len(row["input_ids"]) for row in some), dtype=torch.long)
        attention_BT, supervised_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
        for i, row in enumerate(some):
            length = len(row["input_ids"])
            ids_BT[i, :length] = torch.tensor(row["input_ids"])
            attention_BT[i, :length] = 1
            supervised_BT[i, :length] = torch.tensor(row["assistant_masks"], dtype=torch.bool)
        # position t predicts token t + 1
        predicts_BT = torch.zeros_like(supervised_BT)
        predicts_BT[:, :-1] = supervised_BT[:, 1:]
        yield Batch(ids_BT, attention_BT, predicts_BT, ids_BT[:, 1:][supervised_BT[:, 1:]])


@torch.inference_mode()
def log_probs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary at each supervised token, [N, V]."""
    logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits
    return torch.log_softmax(logits_BTV[batch.predicts_BT].double(), dim=-1)


def score(
    models: list[PreTrainedModel],
    teacher: PreTrainedModel,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Score], int]:
    """The score of each model on the rows, and the number of tokens that it is a mean over."""
    sums = torch.zeros(len(models), 3, dtype=torch.float64)
    tokens = 0
    for batch in batches(rows, tokenizer):
        tokens += len(batch.targets_N)
        teacher_NV = log_probs(teacher, batch)
        for i, model in enumerate(models):
            model_NV = teacher_NV if model is teacher else log_probs(model, batch)
            ce = -model_NV.gather(1, batch.targets_N[:, None]).sum()
            kl = (teacher_NV.exp() * (teacher_NV - model_NV)).sum()
            agreeing = (teacher_NV.argmax(-1) == model_NV.argmax(-1)).sum()
            sums[i] += torch.stack([ce, kl, agreeing.double()])
    return [Score(*row) for row in (sums / tokens).tolist()], tokens


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | parameters | rows read | CE | perplexity | KL from the teacher | agreement |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for m in results["models"]:
        lines.append(
            f"| {m['name']} | {m['parameters']:,} | {m['rows']:,} | {m['ce']:.3f} | {m['perplexity']:,.0f} "
            f"| {m['kl']:.3f} | {m['agreement']:.1%} |"
        )
    heldout = results["heldout"]
    lines += ["", f"On {heldout['tokens']:,} tokens of {heldout['rows']:,} held-out rows; CE and KL in nats per token."]
    return "\n".join(lines)


def reading(results: dict[str, Any]) -> str:
    """What the table shows, and what it does not."""
    _, plain, distilled, teacher = results["models"][:4]
    if distilled["ce"] >= plain["ce"]:
        return "Distillation did not help here: the student that learnt from the text alone predicts better."
    ahead = plain["ce"] - teacher["ce"]
    closed = f"{(plain['ce'] - distilled['ce']) / ahead:.0%} of the gap" if ahead > 0 else "more than the gap"
    return (
        f"Both students began with the same weights and read the same {distilled['rows']:,} rows in as many steps. "
        "From the text alone a student learns which token came next; from the teacher, how likely every other was. "
        f"That closes {closed} in CE between the plain student and the teacher.\n\n"
        f"What is passed on is text: the teacher has read {teacher['rows'] / distilled['rows']:.0f} times as many rows."
        " The table does not show that a bigger model is better: a student of this size that reads as much as the "
        "teacher comes close to it by itself. And at these perplexities no model writes anything worth showing; what "
        "is measured is how well they predict."
    )


def rows_read(run_dir: Path, data: str) -> int:
    """How many different rows a run has been trained on, to the nearest ten: its last record counts in epochs."""
    epochs = max(record.get("epoch", 0.0) for record in read_rows(run_dir / "logging.jsonl"))
    return 10 * round(min(epochs, 1.0) * len(read_rows(HERE / "build" / f"{data}.jsonl")) / 10)


def trained_on(run_dir: Path) -> str:
    """The name of the data of a run, out of those in build/."""
    config = json.loads((run_dir / "run_config.json").read_text(encoding="utf-8"))
    return Path(config["data"]["train"][0]["path"]).stem


def compare(further: list[Path]) -> dict[str, Any]:
    """Scores all models, and those of `further` runs, on `build/heldout.jsonl`."""
    models = [*MODELS, *((path.name, path, trained_on(path)) for path in further)]
    rows = read_rows(HERE / "build" / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    loaded = {path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _, path, _ in models}
    for path in loaded:
        assert AutoTokenizer.from_pretrained(path).get_vocab() == tokenizer.get_vocab(), f"{path}: other token ids"
    scores, tokens = score(list(loaded.values()), loaded[TEACHER], rows, tokenizer)
    return {
        "heldout": {"rows": len(rows), "tokens": tokens},
        "models": [
            {
                "name": name,
                "parameters": loaded[path].num_parameters(),
                "rows": rows_read(path, data) if data else 0,
                "perplexity": one.perplexity,
                **asdict(one),
            }
            for (name, path, data), one in zip(models, scores, strict=True)
        ],
    }


def main() -> None:
    further = [Path(argument) for argument in sys.argv[1:]]
    missing = [
        str(path) for path in [*(path for _, path, _ in MODELS), *further] if not (path / "config.json").exists()
    ]
    if missing:
        sys.exit(f"No model in {', '.join(missing)}. Run {HERE / 'demo.py'} first.")
    transformers.utils.logging.disable_progress_bar()
    results = compare(further)
    text = f"{table(results)}\n\n{reading(results)}\n"
    (HERE / "build" / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "build" / "table.md").write_text(text, encoding="utf-8")
    print("\n".join(line if line.startswith("|") else textwrap.fill(line, 100) for line in text.splitlines()))


if __name__ == "__main__":
    main()
