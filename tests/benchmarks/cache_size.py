"""What a supervised token takes in a cache, on the disk with everything, and what storing it costs the loss.

No time is measured: the bytes are the same on every machine.

Shapes: S tokens of a row, V vocabulary, H hidden width.
"""

from __future__ import annotations

import dataclasses
import gzip
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdtrain.losses import TopKLogprobs, topk_divergence
from kdtrain.losses.head import Head
from kdtrain.losses.sampled import SampledTargets
from kdtrain.teachers.cached.hidden_format import exact_kl, kl_bound
from kdtrain.teachers.cached.store import CacheReader, CacheWriter, Format, HiddenDtype, Mode, RowTargets

_ROW = 100
_WIDE_CHANNEL = 25.0
"""Of hidden states, in units of the usual one: SmolLM2's widest channels have as much."""


@dataclass(frozen=True)
class SizeCase:
    """Rows of 100 tokens of a teacher whose probabilities fall as a power of their rank, in one shard."""

    mode: Mode
    vocab: int = 1024
    entries: int = 50
    """k of `topk`, draws of `sample`."""
    power: float = 1.0
    hidden: int = 576
    hidden_dtype: HiddenDtype = "int8"
    rows: int = 10

    def __str__(self) -> str:
        if self.mode == "hidden":
            return f"hidden, {self.hidden_dtype}, H {self.hidden}"
        number = f"k {self.entries}" if self.mode == "topk" else f"{self.entries} draws"
        return f"{self.mode}, {number}, V {self.vocab:,}, 1/rank^{self.power:g}"

    @property
    def form(self) -> Format:
        """The format of the cache."""
        if self.mode == "hidden":
            return Format("hidden", self.vocab, hidden_size=self.hidden, hidden_dtype=self.hidden_dtype)
        return Format(self.mode, self.vocab, self.entries)


_ROWS = {1024: 10, 49152: 3, 151936: 3}
CASES = [
    *(SizeCase("topk", vocab, k, rows=rows) for vocab, rows in _ROWS.items() for k in (20, 50, 100)),
    *(SizeCase("topk", vocab, power=3.0, rows=rows) for vocab, rows in _ROWS.items()),
    *(SizeCase("sample", vocab, power=power) for power in (3.0, 1.0) for vocab in _ROWS),
    *(SizeCase("hidden", hidden=width, hidden_dtype="int8", rows=20) for width in (256, 576, 2048)),
    SizeCase("hidden", hidden_dtype="bfloat16", rows=20),
]


def measure_size(case: SizeCase) -> dict[str, Any]:
    """Bytes a token, plain and by gzip, and errors."""
    head = _head(case) if case.mode == "hidden" else None
    rows = [_targets(case, row) for row in range(case.rows)]
    keys = [row.to_bytes(16, "little") for row in range(case.rows)]
    with tempfile.TemporaryDirectory() as name:
        writer = CacheWriter(Path(name), case.form)
        if head is not None:
            writer.write_head(head)
        writer.write_shard(0, keys, rows)
        content = (Path(name) / "shard-00000.safetensors").read_bytes()
        stored = [CacheReader(Path(name)).read([key]) for key in keys]
    tokens = _ROW * case.rows
    found = {"bytes": len(content) / tokens, "gzip": len(gzip.compress(content, 6, mtime=0)) / tokens}
    return {"case": dataclasses.asdict(case), "title": str(case)} | found | _errors(case, rows, stored, head)


def _logits(case: SizeCase, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a teacher [S, V], and of a student half a nat from it."""
    generator = torch.Generator().manual_seed(row)
    by_rank = -case.power * torch.log(torch.randperm(case.vocab, generator=generator) + 1.0)
    # Other tokens are likely at every position: gzip would find the ids again.
    begin = torch.randint(case.vocab, (_ROW, 1), generator=generator)
    noise = torch.randn(2, _ROW, case.vocab, generator=generator)
    teacher = by_rank[(begin + torch.arange(case.vocab)) % case.vocab] + 0.3 * noise[0]
    return teacher, teacher + 0.5 * noise[1]


def _head(case: SizeCase) -> Head:
    generator = torch.Generator().manual_seed(0)
    return Head(torch.randn(case.vocab, case.hidden, generator=generator) * 0.13, None, 1.0, None)


def _targets(case: SizeCase, row: int) -> RowTargets:
    if case.mode == "hidden":
        channels = torch.exp(torch.randn(case.hidden, generator=torch.Generator().manual_seed(0)))
        channels[:: case.hidden // 8] = _WIDE_CHANNEL
        states = torch.randn(_ROW, case.hidden, generator=torch.Generator().manual_seed(row)) * channels
        return states.to(torch.bfloat16)
    teacher, _ = _logits(case, row)
    if case.mode == "topk":
        logprobs, ids = torch.log_softmax(teacher, -1).topk(case.entries)
        return TopKLogprobs(ids, logprobs)
    generator = torch.Generator().manual_seed(row)
    drawn = torch.multinomial(teacher.softmax(-1), case.entries, replacement=True, generator=generator)
    return _shares(drawn, case.entries)


def _shares(drawn: torch.Tensor, draws: int) -> SampledTargets:
    """[S, draws] ids as different ids and their shares."""
    ids = drawn.sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = torch.zeros(ids.shape).scatter_add_(1, first.cumsum(1) - 1, torch.ones(ids.shape))
    indices = torch.full_like(ids, -1)
    indices[counts > 0] = ids[first]
    return SampledTargets(indices, counts / draws)


def _errors(case: SizeCase, rows: list[RowTargets], stored: list[Any], head: Head | None) -> dict[str, float | None]:
    if case.mode == "sample":
        return {"unique": sum(float((row.indices >= 0).sum()) for row in stored) / (_ROW * case.rows)}
    if head is not None:
        pairs = [(row.float(), found.hidden.float()) for row, found in zip(rows, stored, strict=True)]
        kl = torch.cat([exact_kl(head, *pair) for pair in pairs])
        bound = torch.cat([kl_bound(head, *pair) for pair in pairs])
        assert bool((kl <= bound + 1e-12).all())
        return {"kl": kl.mean().item(), "kl_max": kl.max().item(), "bound_max": bound.max().item()}
    error = max(float((row.logprobs - found.logprobs).abs().max()) for row, found in zip(rows, stored, strict=True))
    online, cached = zip(*_losses(case, rows, stored), strict=True)
    mean = sum(online) / len(online)
    return {"error": error, "loss": mean, "difference": abs(sum(cached) / len(cached) - mean) / max(mean, 0.05)}


def _losses(case: SizeCase, rows: list[Any], stored: list[Any]) -> Iterator[tuple[float, float]]:
    for number, (row, found) in enumerate(zip(rows, stored, strict=True)):
        _, student = _logits(case, number)
        yield tuple(topk_divergence(student, targets).double().mean().item() for targets in (row, found))
