"""`python -m tests.benchmarks.stream_memory`: the peak of the memory while rows are streamed, few of them and many.

Each number of rows is read to its end by a process of its own, as a run reads them: files of JSON lines, shuffled,
encoded, dealt by the sampler and the data loader, collated in batches of 64; without a model. A worker of the data
loader counts too.

    python -m tests.benchmarks.stream_memory                  20 thousand and 2 million rows; 10 minutes of one core
    python -m tests.benchmarks.stream_memory --rows 200000    another number than 2 million
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEW, MANY = 20_000, 2_000_000
ALLOWED_MIB = 50
_OF_FILE = 100_000


def main() -> None:
    options = _options()
    if options.child:
        print(json.dumps(_stream(Path(options.child), options.rows, options.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(Path(folder), rows, options.workers) for rows in (FEW, options.rows)]
    grown = found[1]["peak_mib"] - found[0]["peak_mib"]
    print("| rows | peak, MiB | rows/s of the processor |\n|--:|--:|--:|")
    for one in found:
        print(f"| {one['rows']:,} | {one['peak_mib']:.0f} | {one['rows'] / one['cpu_s']:,.0f} |")
    print(f"grown by {grown:.0f} MiB, allowed are {ALLOWED_MIB}")
    sys.exit(grown > ALLOWED_MIB)


def measure(folder: Path, rows: int, workers: int = 0) -> dict[str, float]:
    """Rows, the peak of the resident size in MiB (of a worker: the sum of both), and seconds of the processor."""
    own = folder / str(rows)
    own.mkdir()
    for first in range(0, rows, _OF_FILE):
        with (own / f"{first:09}.jsonl").open("w") as file:
            for number in range(first, min(first + _OF_FILE, rows)):
                file.write(json.dumps({"prompt": f"What is {number}?", "completion": f" It is {number}."}) + "\n")
    arguments = ["--child", str(own), "--rows", str(rows), "--workers", str(workers)]
    command = [sys.executable, "-m", "tests.benchmarks.stream_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.stream_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=MANY)
    parser.add_argument("--workers", type=int, default=0, help="of the data loader")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _stream(folder: Path, rows: int, workers: int) -> dict[str, float]:
    import torch
    from torch.utils.data import DataLoader

    from kdtrain.data import Collator, Source
    from kdtrain.data.dataset import encoder_of
    from kdtrain.data.stream.rows import StreamedRows
    from kdtrain.trainer.row_order import EpochSampler, StreamOrder
    from tests import tiny

    torch.set_num_threads(1)
    tokenizer = tiny.make_tokenizer()
    encoder, limits = encoder_of(tokenizer, max_length=64, on_overlength="error", train_on="assistant")
    source = Source(str(folder), streaming=True)
    stream = StreamedRows([source], encoder, limits, seed=0, shuffle=True, first=[{}])
    stream.length = rows
    sampler = EpochSampler(StreamOrder(rows, 0), 1)
    loader = DataLoader(stream, 64, sampler=sampler, collate_fn=Collator(tokenizer), num_workers=workers)
    started, seen = time.process_time(), 0
    for batch in loader:
        seen += len(batch)
    assert seen == rows
    peaks = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = time.process_time() - started + peaks[1].ru_utime
    return {"rows": rows, "peak_mib": sum(one.ru_maxrss for one in peaks) / 1024, "cpu_s": seconds}


if __name__ == "__main__":
    main()
