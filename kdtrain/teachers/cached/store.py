"""The files of a cache and what is in them; knows neither models nor configs.

    DIR/manifest.json          what it was made from (manifest.py), written first; `complete` is set last
    DIR/head.safetensors       of `hidden`: the teacher's head, once
    DIR/shard-00000.safetensors …   targets of `rows_per_shard` rows each, in the order of the plan

A shard appears complete, by one rename after an fsync, so that a killed writer leaves whole shards and no part of one.
What is in it depends on its rows alone: not on ranks, kills, or what was there before.

Shapes: S supervised tokens of a row, K entries, H hidden width, V vocabulary.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import xxhash

from kdtrain.errors import DataError
from kdtrain.losses.head import Head
from kdtrain.losses.sampled import SampledTargets
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.base import DenseTargets
from kdtrain.teachers.cached import bits, chunk_format, hidden_format, sample_format, topk_format
from kdtrain.teachers.cached.chunk_format import RowChunks
from kdtrain.teachers.cached.head_file import read_head_file, write_head_file
from kdtrain.teachers.cached.shard_file import Encoded, Index, damaged, read_index, write_shard_file

HEAD = "head.safetensors"
# Shards that are mapped at a time: each holds a file open, of which a process may have few.
_MAPPED = 8

Mode = Literal["topk", "sample", "hidden", "chunks"]
HiddenDtype = Literal["float32", "bfloat16", "float16", "int8"]
RowTargets = TopKLogprobs | SampledTargets | RowChunks | torch.Tensor
"""Of the S supervised tokens of one row; a plain tensor is hidden states [S, H]."""


@dataclass(frozen=True)
class Format:
    """How targets are stored: the same for a whole cache, and a part of its manifest."""

    mode: Mode
    vocab_size: int
    """V: logit columns of the teacher. Of `chunks` 0: they are text."""
    entries: int | None = None
    """Of `topk`: K. Of `sample`: draws at each position."""
    exact: bool = False
    """Of `topk`: log-probabilities as float32 rather than quantised."""
    temperature: float = 1.0
    """Of `sample`: the temperature of the distribution that was drawn from, `rlhf.kd_temperature`."""
    hidden_size: int | None = None
    """Of `hidden`: H."""
    hidden_dtype: HiddenDtype | None = None
    """Of `hidden`."""


class CacheWriter:
    """Writes shards. Several processes may write different shards of one folder at a time."""

    def __init__(self, folder: Path, form: Format) -> None:
        self.folder = folder
        self.form = form

    def write_head(self, head: Head) -> None:
        """Of `hidden`: the teacher's head, once."""
        write_head_file(self.folder / HEAD, head)

    def has_head(self) -> bool:
        """Whether the head is there, whole."""
        try:
            read_head_file(self.folder / HEAD)
        except DataError:
            return False
        return True

    def has_shard(self, number: int) -> bool:
        """Whether a shard is there, whole. One that is damaged is not: it is to be written again."""
        path = shard_path(self.folder, number)
        if not path.exists():
            return False
        try:
            return read_index(path).about["form"] == asdict(self.form)
        except DataError:
            return False

    def write_shard(self, number: int, keys: Sequence[bytes], rows: Sequence[RowTargets]) -> None:
        """Write the targets of some rows, by their keys of `row_key`, in this order.

        Raises:
            OSError: the disk is full, or read-only; nothing is left of the shard then.
        """
        counts = [len(row.indices) if isinstance(row, TopKLogprobs | SampledTargets) else len(row) for row in rows]
        encoded = _encode(self.form, rows)
        about = {"form": asdict(self.form), **encoded.about}
        write_shard_file(shard_path(self.folder, number), about, keys, counts, encoded.rows, encoded.shared)


class CacheReader:
    """Reads targets by the keys of their rows. Files are mapped into memory, and read as they are needed.

    Raises:
        DataError: a file is missing, damaged or of another version: which one, and what to do.
    """

    form: Format
    head: Head | None
    """Of `hidden`."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("shard-*.safetensors"))
        if not self._paths:
            raise DataError(f"{folder} has no shard-*.safetensors, so it is no cache: write one with `kdtrain cache`.")
        self._shards = [read_index(path) for path in self._paths]
        self.form = _form(self._paths, self._shards)
        self.head = read_head_file(folder / HEAD) if self.form.mode == "hidden" else None
        self._places = {
            key: (number, row) for number, shard in enumerate(self._shards) for row, key in enumerate(_keys(shard))
        }
        if len(self._places) != sum(len(shard.counts) for shard in self._shards):
            raise DataError(
                f"{folder} has a row twice, in two of its shards: files of two caches lie there. Write the cache anew "
                "into an empty folder."
            )
        self._map_anew()

    def _map_anew(self) -> None:
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()
        self._mapping = threading.Lock()

    # A copy, and what a worker of a data loader is sent, maps files for itself.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_mapped", "_mapping")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map_anew()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        """Rows."""
        return len(self._places)

    def counts(self, keys: Sequence[bytes]) -> list[int]:
        """S of each row."""
        return [int(self._shards[shard].counts[row]) for shard, row in map(self._places.__getitem__, keys)]

    def read(self, keys: Sequence[bytes]) -> TopKLogprobs | SampledTargets | DenseTargets:
        """The targets of rows, one behind the other; of mode `chunks` see `read_chunks`.

        Raises:
            KeyError: a row is not there.
            DataError: its data are damaged.
        """
        assert self.form.mode != "chunks"
        counts = np.array(self.counts(keys), np.int64)
        starts = np.cumsum(counts) - counts
        groups = self._groups(keys)
        decoded = [self._decode(shard, [keys[i] for i in rows], counts[rows]) for shard, rows in groups]
        tokens = [bits.ranges(starts[rows], counts[rows]) for _, rows in groups]
        parts = [_in_order([part[i] for part in decoded], tokens) for i in range(len(decoded[0]))]
        if self.form.mode == "topk":
            # They were checked when they were written, and the bytes are the same: to look again is to sort every row.
            return TopKLogprobs._of_checked(*parts)
        if self.form.mode == "sample":
            return SampledTargets(*parts)
        assert self.head is not None
        return DenseTargets(parts[0], self.head)

    def read_chunks(self, keys: Sequence[bytes]) -> list[RowChunks]:
        """Of mode `chunks` the targets of each row.

        Raises: as `read`.
        """
        counts = self.counts(keys)
        return [
            chunk_format.decode(self._row(*self._places[key]), count) for key, count in zip(keys, counts, strict=True)
        ]

    def _groups(self, keys: Sequence[bytes]) -> list[tuple[Index, list[int]]]:
        """Which of the rows are decoded in the same way, and by the index of which shard."""
        groups: dict[Any, tuple[Index, list[int]]] = {}
        for i, key in enumerate(keys):
            shard = self._shards[self._places[key][0]]
            groups.setdefault(shard.way, (shard, []))[1].append(i)
        return list(groups.values()) or [(self._shards[0], [])]

    def _decode(self, shard: Index, keys: Sequence[bytes], counts: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The targets of rows that are stored in the same way."""
        form, blobs = self.form, [self._row(*self._places[key]) for key in keys]
        if form.mode == "hidden":
            assert form.hidden_size is not None
            assert form.hidden_dtype is not None
            return (hidden_format.decode(blobs, counts, shard.shared, form.hidden_size, form.hidden_dtype),)
        assert form.entries is not None
        if form.mode == "sample":
            found = sample_format.decode(blobs, counts, form.vocab_size, form.entries)
        else:
            decode = topk_format.decode_exact if form.exact else topk_format.decode
            found = decode(blobs, counts, shard.about, form.vocab_size, form.entries)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def _row(self, shard: int, row: int) -> np.ndarray:
        """The bytes of a row, checked."""
        begin, end = self._shards[shard].place(row)
        data = self._map(shard)[begin:end]
        if xxhash.xxh3_64_intdigest(data.data) != int(self._shards[shard].sums[row]):
            raise damaged(self._paths[shard], f"the checksum of its row {row} is another")
        return data

    def _map(self, shard: int) -> np.ndarray:
        """A file in memory; those that were read last stay there."""
        with self._mapping:
            if shard not in self._mapped:
                self._mapped[shard] = _map_file(self._paths[shard])
                if len(self._mapped) > _MAPPED:
                    self._mapped.popitem(last=False)
            self._mapped.move_to_end(shard)
            return self._mapped[shard]


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{number:05d}.safetensors"


def _encode(form: Format, rows: Sequence[RowTargets]) -> Encoded:
    if form.mode == "hidden":
        assert form.hidden_dtype is not None
        return hidden_format.encode(cast(Sequence[torch.Tensor], rows), form.hidden_dtype)
    if form.mode == "chunks":
        return chunk_format.encode(cast(Sequence[RowChunks], rows))
    assert form.entries is not None
    if form.mode == "sample":
        return sample_format.encode(cast(Sequence[SampledTargets], rows), form.vocab_size, form.entries)
    return topk_format.encode(cast(Sequence[TopKLogprobs], rows), form.vocab_size, form.entries, form.exact)


def _in_order(parts: Sequence[torch.Tensor], tokens: Sequence[np.ndarray]) -> torch.Tensor:
    """Parts [·, K] by the places of their tokens; what is narrower than others is filled up as missing."""
    if len(parts) == 1:
        return parts[0]
    first, width = parts[0], max(part.shape[1] for part in parts)
    missing = -1 if first.dtype == torch.int64 else 0
    whole = first.new_full((sum(map(len, parts)), width), missing)
    for part, places in zip(parts, tokens, strict=True):
        whole[torch.from_numpy(places), : part.shape[1]] = part
    return whole


def _map_file(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read any more ({error}).") from error


def _keys(shard: Index) -> list[bytes]:
    return [key.tobytes() for key in shard.keys]


def _form(paths: Sequence[Path], shards: Sequence[Index]) -> Format:
    """The format of all shards.

    Raises:
        DataError: they differ.
    """
    first: dict[str, Any] = shards[0].about["form"]
    for path, shard in zip(paths, shards, strict=True):
        found = shard.about["form"]
        if differing := [name for name in first if found[name] != first[name]]:
            other = ", ".join(f"{name} {found[name]} and not {first[name]}" for name in differing)
            raise DataError(f"{path} is of another cache than {paths[0].name}: {other}. Delete the foreign one.")
    return Format(**first)
