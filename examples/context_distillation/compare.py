"""What has become of a run: answers side by side, how much of the prefix is internalised, and what was forgotten.

    python examples/context_distillation/compare.py runs/distill-0 [RUN_DIR ...]

`kdtrain evaluate` measures, twice for each run:

    heldout.jsonl   KL(prompted teacher || student) before and after, on the teacher's greedy answers. No student reads
                    the prefix. Internalised is 1 - after/before
    other.jsonl     arithmetic, code, lists, words: CE on right answers before and after, and KL(model before || after).
                    No teacher reads a prefix here: what has changed is what training has changed

Writes `build/table.md` and `build/results.json`, and prints the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = HERE / "build" / "smollm2"
# Held-out questions whose answers are shown, and prompts of another kind.
SHOWN = (
    "What is the capital of France?",
    "What should I cook tonight?",
    "Tell me about elephants.",
    "What is your greatest wish?",
)
SHOWN_OTHER = ("What is 12 plus 30?", "List three fruits.")
NEW_TOKENS = 40


def read_prompts(name: str) -> list[str]:
    rows = (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["messages"][0]["content"] for row in rows]


def evaluate(run: Path, *options: str) -> dict[str, Any]:
    """What `kdtrain evaluate --json` says of a run."""
    command = [sys.executable, "-m", "kdtrain", "evaluate", str(run), "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout) | {"run": run.name}  # the name alone: results.json is read elsewhere too


def measure(run: Path) -> dict[str, Any]:
    """The figures of one run."""
    heldout = evaluate(run, f"data.eval=[{{path: {HERE / 'heldout.jsonl'}, answers: teacher}}]")
    other = evaluate(run, f"data.eval={HERE / 'other.jsonl'}", "rlhf.teacher.prefix=null")
    return {"run": run.name, "heldout": heldout, "other": other}


def answers(run: Path) -> list[dict[str, str]]:
    """What the model says before and after training, and with the prefix, to the prompts that are shown."""
    import torch
    import transformers
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    trained = PeftModel.from_pretrained(model, run).eval()
    prefix = {"role": "system", "content": (HERE / "prefix.txt").read_text(encoding="utf-8").strip()}

    def answer(*messages: dict[str, str]) -> str:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            written = trained.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS)[
                0, ids["input_ids"].shape[1] :
            ]
        cut = "" if written[-1] == tokenizer.eos_token_id else " …"
        return tokenizer.decode(written, skip_special_tokens=True).strip() + cut

    rows = []
    for prompt in (*SHOWN, *SHOWN_OTHER):
        question = {"role": "user", "content": prompt}
        after = answer(question)
        with trained.disable_adapter():
            rows.append(
                {"prompt": prompt, "before": answer(question), "after": after, "teacher": answer(prefix, question)}
            )
    return rows


def results_of(runs: list[Path]) -> dict[str, Any]:
    return {
        "prefix": (HERE / "prefix.txt").read_text(encoding="utf-8").strip(),
        "runs": [measure(run) for run in runs],
        "answers": answers(runs[0]),
    }


def figures(run: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of the table."""
    context, other = run["heldout"]["context"], run["other"]["models"]
    return {
        "kl_before": context["kl_before"],
        "kl_after": context["kl_after"],
        "internalised": run["heldout"]["internalised"],
        "ce_before": other["before"]["ce"],
        "ce_after": other["after"]["ce"],
        "other_kl": other["after"]["forward_kl"],
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: figures of each run, then answers side by side."""
    lines = [
        "| run | KL before | KL after | internalised | other prompts: CE before | CE after | KL before to after |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    found = [(run["run"], figures(run)) for run in results["runs"]]
    if len(found) > 1:
        found.append(("mean", {name: mean(row[name] for _, row in found) for name in found[0][1]}))
    lines += [
        f"| {name} | {row['kl_before']:.3f} | {row['kl_after']:.3f} | {row['internalised']:.1%} "
        f"| {row['ce_before']:.3f} | {row['ce_after']:.3f} | {row['other_kl']:.3f} |"
        for name, row in found
    ]
    first = results["runs"][0]
    prompts, tokens = (first["heldout"]["context"][name] for name in ("prompts", "tokens"))
    lines += [
        "",
        f"KL and CE in nats per token: KL on {tokens:,} tokens of the prompted teacher's answers to {prompts} held-out "
        f"questions, the other prompts on {first['other']['models']['before']['tokens']:,} tokens of "
        f"{first['other']['rows']} right answers.",
        "",
        "| question | before | after | teacher, which reads the prefix |",
        "|---|---|---|---|",
    ]
    lines += [
        "| " + " | ".join(cell(row[name]) for name in ("prompt", "before", "after", "teacher")) + " |"
        for row in results["answers"]
    ]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text that breaks no table."""
    return " ".join(text.split()).replace("|", "\\|")


def spoken(results: dict[str, Any]) -> str:
    """The same for a terminal, where a table of answers is too wide."""
    figures_table, note, _ = table(results).split("\n\n")
    lines = [figures_table, "", textwrap.fill(note, 100)]
    for row in results["answers"]:
        lines += ["", row["prompt"]]
        lines += [
            textwrap.fill(cell(row[name]), 100, initial_indent=f"  {name:<8} ", subsequent_indent=" " * 11)
            for name in ("before", "after", "teacher")
        ]
    return "\n".join(lines)


def main() -> None:
    runs = [Path(argument).resolve() for argument in sys.argv[1:]]
    missing = [str(run) for run in runs if not (run / "adapter_config.json").exists()]
    if missing or not runs:
        sys.exit(f"No adapter in {', '.join(missing)}" if missing else "usage: compare.py RUN_DIR [RUN_DIR ...]")
    results = results_of(runs)
    (HERE / "build" / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "build" / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    print(spoken(results))


if __name__ == "__main__":
    main()
