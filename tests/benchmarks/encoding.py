"""`python -m tests.benchmarks.encoding`: chats become tokens, beside the least that `datasets` could do with them.

The rows are chats of about 200 tokens in JSON lines. Ours is `build_dataset`: reading, checking, rendering, masks, the
cache on disk. The other is `datasets.load_dataset` and a `map` over `apply_chat_template(…,
return_assistant_tokens_mask=True)`, in batches of a process as ours are, with as many processes. Each runs in a process
of its own, with an empty cache; the last line is ours again, from its cache.

    python -m tests.benchmarks.encoding                  100 thousand rows, two processes
    python -m tests.benchmarks.encoding --rows 1000000
    python -m tests.benchmarks.encoding --model DIR      tokenizer and template of a model; the template needs markers

Seconds of the processor are those of all processes: other work on the machine hardly moves them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALLOWED = 1.2
WARM_S = 15
_WORDS = 130  # of a row; about 200 tokens with the tokenizer of the tests
_TEXT = [
    "the",
    "path",
    "of",
    "the",
    "file",
    "it",
    "returns",
    "when",
    "they",
    "are",
    "equal",
    "a",
    "token",
    "and",
    "the",
    "student",
    "learns",
    "from",
    "a",
    "divergence",
    "between",
    "two",
    "distributions",
    "numbers",
    "predicts",
    "next",
    "function",
    "does",
    "what",
    "zero",
    "as",
    "well",
]


def main() -> None:
    options = _options()
    if options.child:
        print(json.dumps(_child(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "rows.jsonl", options.rows)
        found = {name: _measured(options, path, Path(folder), name) for name in ("theirs", "ours", "again")}
    print("| | seconds | of the processor | rows/s | peak of one process, MiB |\n|---|--:|--:|--:|--:|")
    for name, one in found.items():
        rate = options.rows / one["wall_s"]
        print(f"| {name} | {one['wall_s']:.1f} | {one['cpu_s']:.1f} | {rate:,.0f} | {one['peak_mib']:,.0f} |")
    ratio = found["ours"]["cpu_s"] / found["theirs"]["cpu_s"]
    tokens = found["ours"]["tokens"] / options.rows
    print(f"{tokens:.0f} tokens a row; {ratio:.2f} times the processor, allowed {ALLOWED}")
    print(f"again: {found['again']['wall_s']:.1f} s, allowed {WARM_S}")
    sys.exit(ratio > ALLOWED or found["again"]["wall_s"] > WARM_S)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.encoding", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", help="folder of a tokenizer with a chat template that has {% generation %}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, rows: int) -> Path:
    """Chats of a question and an answer, each its own."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            asked, said = (" ".join(draw.choices(_TEXT, k=_WORDS // 2)) for _ in range(2))
            chat = [{"role": "user", "content": f"{number}: {asked}"}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": chat}) + "\n")
    return path


def _measured(options: argparse.Namespace, path: Path, folder: Path, name: str) -> dict[str, float]:
    arguments = ["--child", name, "--path", str(path), "--rows", str(options.rows)]
    arguments += ["--processes", str(options.processes), *(["--model", options.model] if options.model else [])]
    cache = folder / ("theirs" if name == "theirs" else "ours")
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.encoding", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(options: argparse.Namespace) -> dict[str, float]:
    tokenizer = _tokenizer(options.model)
    import datasets

    datasets.disable_progress_bars()
    before = _processor()
    started = time.perf_counter()
    tokens = _theirs(options, tokenizer) if options.child == "theirs" else _ours(options, tokenizer)
    wall = time.perf_counter() - started
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"wall_s": wall, "cpu_s": _processor() - before, "peak_mib": max(peaks) / 1024, "tokens": tokens}


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _tokenizer(folder: str | None) -> Any:
    if folder is None:
        from tests import tiny

        return tiny.make_tokenizer(1000)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _ours(options: argparse.Namespace, tokenizer: Any) -> int:
    from kdtrain.data import Source, build_dataset

    _, report = build_dataset(
        [Source(options.path)],
        tokenizer,
        max_length=4096,
        on_overlength="error",
        train_on="assistant",
        num_proc=options.processes,
        cache_dir=str(Path(os.environ["HF_DATASETS_CACHE"]) / "rows"),
    )
    return report.total_tokens


def _theirs(options: argparse.Namespace, tokenizer: Any) -> int:
    import datasets

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    rows = datasets.load_dataset("json", data_files=options.path, split="train")
    found = rows.map(encode, batched=True, batch_size=500, remove_columns=rows.column_names, num_proc=options.processes)
    return sum(map(len, found[:10]["input_ids"])) * options.rows // 10


if __name__ == "__main__":
    main()
