"""`python -m tests.benchmarks.encoding`: chats become tokens, beside the least that `datasets` could do with them.

The rows are chats of about 200 tokens in JSON lines. Ours is `build_dataset`: reading, checking, rendering, masks, the
cache on disk. The other is `datasets.load_dataset` and a `map` over `apply_chat_template(…,
return_assistant_tokens_mask=True)`, in batches of a process as ours are, with as many processes. Each runs in a process
of its own, with an empty cache; the last line is ours again, from its cache. They take turns, and medians are printed.

    python -m tests.benchmarks.encoding                              12 thousand rows three times; a minute of one core
    python -m tests.benchmarks.encoding --rows 100000 --rounds 1
    python -m tests.benchmarks.encoding --template qwen3_training    one of trl's templates with its tokenizer, from npm
    python -m tests.benchmarks.encoding --model DIR                  a model's own; its template needs markers

Seconds of the processor are those of all processes: other work on the machine hardly moves them. The peak is the memory
of all processes at once, without files that are mapped: the system takes those pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

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
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "rows.jsonl", options.rows)
        for number in range(options.rounds):
            with tempfile.TemporaryDirectory(dir=folder) as caches:
                names = ("theirs", "ours") if number % 2 else ("ours", "theirs")
                rounds.append({name: _measured(options, path, Path(caches), name) for name in (*names, "again")})
    print("| | seconds | of the processor | rows/s | peak, MiB |\n|---|--:|--:|--:|--:|")
    for name in ("theirs", "ours", "again"):
        wall, cpu, peak = (_median([one[name][key] for one in rounds]) for key in ("wall_s", "cpu_s", "peak_mib"))
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {options.rows / wall:,.0f} | {peak:,.0f} |")
    ratios = {key: _median([one["ours"][key] / one["theirs"][key] for one in rounds]) for key in ("cpu_s", "wall_s")}
    again = _median([one["again"]["wall_s"] for one in rounds])
    print(f"{options.rows:,} rows of {rounds[0]['ours']['tokens'] / options.rows:.0f} tokens, {options.rounds} rounds")
    print(f"{ratios['cpu_s']:.2f} times the processor, allowed {ALLOWED}; {ratios['wall_s']:.2f} times the seconds")
    print(f"again: {again:.1f} s, allowed {WARM_S}")
    sys.exit(ratios["cpu_s"] > ALLOWED or again > WARM_S)


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.encoding", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", help="folder of a tokenizer with a chat template that has {% generation %}")
    parser.add_argument("--template", help="a name of tests/templates/families.py whose template has {% generation %}")
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
    arguments += ["--processes", str(options.processes)]
    arguments += [f"--{key}={value}" for key in ("model", "template") if (value := getattr(options, key))]
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
    tokenizer = _tokenizer(options)
    import datasets

    datasets.disable_progress_bars()
    done, peaks, spent = threading.Event(), [_memory_mib()], [0.0]
    watch = threading.Thread(target=_watch, args=(done, peaks, spent))
    before = _processor()
    watch.start()
    started = time.perf_counter()
    tokens = _theirs(options, tokenizer) if options.child == "theirs" else _ours(options, tokenizer)
    wall = time.perf_counter() - started
    done.set()
    watch.join()
    return {"wall_s": wall, "cpu_s": _processor() - before - spent[0], "peak_mib": max(peaks), "tokens": tokens}


def _watch(done: threading.Event, peaks: list[float], spent: list[float]) -> None:
    """Looks at the memory until `done`, and says what looking took of the processor."""
    while not done.wait(1):
        peaks.append(_memory_mib())
    peaks.append(_memory_mib())
    spent[0] = time.thread_time()


def _memory_mib() -> float:
    """Memory of this process and its children that is no mapped file; what they share counts once."""
    total = 0
    for one in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total / 1024


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _tokenizer(options: argparse.Namespace) -> Any:
    if options.model:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(options.model)
    if options.template:
        from tests.templates.families import named_template

        return named_template(options.template).tokenizer
    from tests import tiny

    return tiny.make_tokenizer(1000)


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
