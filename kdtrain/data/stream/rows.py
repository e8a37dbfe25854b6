"""A stream as a data set whose rows have numbers: those that can be trained on, in the order of the stream.

Row n is the same one for every process, batch size and number of workers, so that all that deals rows to steps, ranks
and workers does with a stream what it does with rows that were counted. Behind the last row it goes back to nothing: a
run asks for as many rows as its `max_steps` take.

Which number a row has is known once those before it are encoded: some are bad, some too long, and a conversation may
be several. So every process encodes all rows, and not only its own: with W processes each of them does W times the
work. One busy core encodes 1,300 rows of 180 tokens a second: eight processes that take 8 rows each in half a second
use a tenth of one each, and 64 most of one, which a worker (`training.dataloader_num_workers: 1`) does beside the
model. To deal the raw rows instead would make steps of fewer rows where some are left out, and larger ones where some
are several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from kdtrain.data.cache import encode_batch
from kdtrain.data.columns import ROUTE_COLUMN
from kdtrain.data.encoded_row import Limits
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.errors import show
from kdtrain.data.source import Source, source_loss
from kdtrain.data.stream.order import BlockPlace, Drawn, SourcePlace, StreamOrder
from kdtrain.data.stream.shards import identity_of
from kdtrain.errors import CheckpointError, DataError

PLACE = "stream_place"
"""The key of a row that holds its `Place`."""
_AT_ONCE = 64


@dataclass(frozen=True)
class Counts:
    """What became of the rows so far, each counted once."""

    read: int = 0
    bad: int = 0
    dropped: int = 0

    def with_one(self, status: str) -> Counts:
        """And one more."""
        return Counts(self.read + 1, self.bad + (status == "bad"), self.dropped + (status == "dropped"))


@dataclass(frozen=True)
class Place:
    """Where reading can begin again: before some rows that are encoded together."""

    row: int
    """The number of the first one that can be used."""
    block: BlockPlace
    begin: int
    """Rows of the block before it."""
    counts: Counts
    seed: int
    shuffle: bool
    identity: str
    """Of the files, whose order everything depends on."""
    so_far: Counts = field(default_factory=Counts)
    """What became of the rows up to the one that this place comes with."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Place:
        """What `as_json` gave."""
        block = values["block"]
        sources = tuple(
            SourcePlace(reading, shard, (cursor[0], cursor[1]), taken)
            for reading, shard, cursor, taken in block["sources"]
        )
        counts = {name: Counts(**values[name]) for name in ("counts", "so_far")}
        return cls(**{**values, "block": BlockPlace(block["number"], sources), **counts})


class StreamedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of a stream by their number.

    They are read in their order; going back reads from the beginning, or from where it was told to `start_at`.

    Args:
        first: some of the first rows in the order of the files, for what is looked at before training.
        max_bad_rows: more than this end the run.
        keep: further columns of a row, see `build_dataset`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: RowEncoder,
        limits: Limits,
        *,
        seed: int,
        shuffle: bool,
        first: Any,
        max_bad_rows: int = 0,
        keep: Sequence[str] = (),
    ) -> None:
        self.sources, self._encoder, self._limits = list(sources), encoder, limits
        self._max_bad_rows, self._keep, self.first = max_bad_rows, keep, first
        self._order = StreamOrder(sources, seed, shuffle)
        self.identity = identity_of([shard for shards in self._order.shards for shard in shards])
        self.length = len(first)
        """Rows that a run takes; set by who knows how many."""
        self._start = Place(0, self._order.begin, 0, Counts(), seed, shuffle, self.identity)
        self._rows: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._next = -1  # the number of what `_rows` gives next; -1 where it was not begun

    def __len__(self) -> int:
        return self.length

    def identities(self) -> list[str]:
        """What tells the rows of each source from those of another time."""
        pairs = zip(self.sources, self._order.shards, strict=True)
        return [f"{identity_of(shards)}, limit {source.limit}" for source, shards in pairs]

    def start_at(self, values: dict[str, Any] | None) -> None:
        """Begin at a `Place`, in JSON, from now on; None is the first row.

        Its order is gone on with, whatever seed is given now.

        Raises:
            CheckpointError: it is of other files.
        """
        self._next = -1
        if values is None:
            return
        place = Place.from_json(values)
        if place.identity != self.identity:
            raise CheckpointError(
                "The files of data.train are others than when the checkpoint was written, and a stream cannot be gone "
                "on with in them: the place of its next row is one in those files. Begin anew from its weights, with "
                "model.model=CHECKPOINT and another training.output_dir."
            )
        self._start = place
        self._order.seed, self._order.shuffle = place.seed, place.shuffle

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self._next < 0 or index < self._next:
            self._rows, self._next = self._read(), self._start.row
        assert index >= self._start.row, "what was trained is not asked for again"
        while True:
            number, row = next(self._rows)
            self._next = number + 1
            if number == index:
                return row

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows that can be used, with their numbers.

        Raises:
            DataError: a row is too long, one more is bad than may be, or none can be used.
        """
        start, counts = self._start, self._start.counts
        number, begin = start.row, start.begin
        for block, drawn in self._order.blocks(start.block):
            for at in range(begin, len(drawn), _AT_ONCE):
                some = drawn[at : at + _AT_ONCE]
                place = replace(start, row=number, block=block, begin=at, counts=counts)
                for one, status, row in self._encoded(some):
                    # What comes a second time was counted the first time.
                    counts = counts.with_one(status) if one.first else counts
                    if status == "ok":
                        yield number, {**row, PLACE: replace(place, so_far=counts)}
                        number += 1
                    elif status != "dropped":
                        self._refuse(row, one, counts)
                if not number and all(source.reading for source in block.sources):
                    raise DataError(
                        f"no row is left of {counts.read:,}: {counts.bad:,} are bad and {counts.dropped:,} too long"
                    )
            begin = 0

    def _encoded(self, drawn: Sequence[Drawn]) -> Iterator[tuple[Drawn, str, dict[str, Any]]]:
        """Some rows with what became of them, and as they are trained or with the reason why not."""
        batch: dict[str, list[Any]] = {
            "problem": [one.row.problem for one in drawn],
            "text": [one.row.text for one in drawn],
            "file": [one.row.file for one in drawn],
            "source": [one.source for one in drawn],
        }
        found = encode_batch(batch, list(range(len(drawn))), self._encoder, self.sources, self._limits)
        made_of = found["raw"]
        for i, status in enumerate(found["status"]):
            one = drawn[made_of[i]]
            if status == "ok":
                turn = made_of[:i].count(made_of[i]) if made_of.count(made_of[i]) > 1 else None
                yield one, status, self._row(found, i, one, turn)
            else:
                yield one, status, {"problem": found["problem"][i], "length": found["length"][i], "status": status}

    def _refuse(self, row: Mapping[str, Any], drawn: Drawn, counts: Counts) -> None:
        """End the run where a row that cannot be used is one too many."""
        where = f"{show(drawn.row.file, 400)}:{drawn.row.line}"
        if row["status"] == "long":
            raise DataError(
                f"{where}: {row['length']} tokens{row['problem']}, and max_length is {self._limits.max_length}. Raise "
                "data.max_length, or set data.on_overlength to truncate (cuts from the right) or drop"
            )
        if counts.bad > self._max_bad_rows:
            raise DataError(
                f"{counts.bad:,} of the {counts.read:,} rows that were read cannot be used, and data.max_bad_rows is "
                f"{self._max_bad_rows}. The last one:\n  {where}: {row['problem']}\nRepair it, or raise "
                "data.max_bad_rows to leave such rows out"
            )

    def _row(self, found: dict[str, list[Any]], i: int, drawn: Drawn, turn: int | None) -> dict[str, Any]:
        """A row as `build_dataset` has it."""
        file = drawn.row.file.rpartition("/")[2]
        name = f"{drawn.source}:{file}:{drawn.row.line}"
        row = {column: found[column][i] for column in ("input_ids", "labels", "prompt_length", *self._keep)}
        row |= {"ce": self.sources[drawn.source].ce, "row_id": name if turn is None else f"{name}:{turn}"}
        row |= source_loss(self.sources[drawn.source])
        if self._encoder.teachers:
            row[ROUTE_COLUMN] = found["route"][i]
        if found["images"][i]:
            row |= {"text": found["text"][i], "images": found["images"][i]}
        row |= {name: found[name][i] for name in _WEIGHTS if found[name][i] not in (None, 1.0)}
        if found["teacher_input_ids"][i] is not None:
            row |= {f"teacher_{column}": found[f"teacher_{column}"][i] for column in _TOKENS}
        return row


_TOKENS = ("input_ids", "labels", "prompt_length")
_WEIGHTS = ("kd_weight", "kd_weights")
