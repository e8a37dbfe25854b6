"""`python -m tests.benchmarks.cache_writing`: what writing a cache takes beside the teacher's bare forward.

    python -m tests.benchmarks.cache_writing            a minute or two
    python -m tests.benchmarks.cache_writing --model DIR   another teacher than a random one of SmolLM2's width

Bare is the model's own forward over the same batches and, but for `hidden`, the product with its head at the supervised
tokens, in float32. Writing is everything else as well: batches, the most likely tokens or draws, encoding, the disk
with its fsync. Both take turns, and the ratio is that of one round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kdtrain.data import Collator
from kdtrain.data.batch import Batch
from kdtrain.losses.gemm import project
from kdtrain.teachers import LocalTeacher
from kdtrain.teachers.cached.store import CacheWriter, Format
from kdtrain.teachers.cached.writing import Asking, Shard
from tests import tiny
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.timing import interleave, seconds_of

REQUIRED = 1.15
BATCH, ROWS = 8, 16


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    module = _model(options.model)
    vocabulary, width = module.lm_head.weight.shape
    asking, shards = _asking(module, Format("topk", vocabulary, entries=50))
    batches = [asking.collate(places) for shard in shards for places in shard.batches(BATCH)]
    tokens = sum(int(batch.num_supervised) for batch in batches)
    print(
        f"{describe_machine()}\n{ROWS} rows, {tokens} supervised tokens, V {vocabulary}, width {width}, k and draws 50"
    )
    forms = {
        "topk": asking.form,
        "sample": Format("sample", vocabulary, entries=50),
        "hidden": Format("hidden", vocabulary, hidden_size=width, hidden_dtype="float32"),
        "hidden int8": Format("hidden", vocabulary, hidden_size=width, hidden_dtype="int8"),
    }
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], Any]] = {
            "bare": lambda: _bare(module, batches, head=True),
            "bare without the head": lambda: _bare(module, batches, head=False),
        }
        for name, form in forms.items():
            calls[name] = _writing(replace(asking, form=form), shards, Path(folder))
        clock = cpu_seconds_of if options.cpu_time else seconds_of
        timings = interleave(calls, rounds=options.rounds, before=lambda: None, clock=clock)
    print("| mode | seconds | bare | ratio | required |\n|---|---|---|---|---|")
    failed = False
    for name in forms:
        bare = timings["bare" if "hidden" not in name else "bare without the head"].seconds
        ratio = statistics.median(own / other for own, other in zip(timings[name].seconds, bare, strict=True))
        failed |= ratio > REQUIRED
        seconds = statistics.median(timings[name].seconds)
        print(f"| {name} | {seconds:.2f} | {statistics.median(bare):.2f} | {ratio:.3f} | <= {REQUIRED} |")
    sys.exit(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.cache_writing", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", help="folder of a teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the processor, where others use the machine as well"
    )
    return parser.parse_args()


def _model(folder: str | None) -> Any:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 15, "head_dim": 64}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = Qwen3Config(vocab_size=49152, tie_word_embeddings=True, initializer_range=0.08, **sizes, **heads)
    return Qwen3ForCausalLM(config).eval()


def _asking(module: Any, form: Format) -> tuple[Asking, list[Shard]]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(64, 256, (ROWS,), generator=draw).tolist()
    ids = [torch.randint(5, 40_000, (length,), generator=draw).tolist() for length in lengths]
    half = [(row, [-100] * (len(row) // 2) + row[len(row) // 2 :]) for row in ids]  # a prompt, and an answer as long
    rows = [{"input_ids": row, "labels": labels, "prompt_length": len(row) // 2} for row, labels in half]
    collator = Collator(tiny.make_tokenizer())
    teacher = LocalTeacher(module)
    keys = [number.to_bytes(16, "little") for number in range(ROWS)]
    shards = [Shard(0, range(ROWS), keys, lengths)]
    return Asking(teacher, lambda numbers: collator([rows[n] for n in numbers]), form, BATCH), shards


def cpu_seconds_of(call: Callable[[], Any]) -> float:
    """Without the waiting for a processor, but also without that for the disk."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _bare(module: Any, batches: Sequence[Batch], head: bool) -> None:
    for batch in batches:
        hidden = module.model(**batch.model_inputs, use_cache=False).last_hidden_state[:, :-1][batch.predicts_BT]
        if head:
            for some in hidden.split(256):
                project(some, module.lm_head.weight, torch.empty(len(some), len(module.lm_head.weight)))


def _writing(asking: Asking, shards: Sequence[Shard], folder: Path) -> Callable[[], None]:
    writer, number = CacheWriter(folder, asking.form), _counting()

    def write() -> None:
        for shard, targets in asking.shards(shards, lambda rows: None):
            writer.write_shard(next(number), shard.keys, targets)

    return write


def _counting() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


if __name__ == "__main__":
    main()
