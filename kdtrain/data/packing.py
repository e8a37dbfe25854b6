"""How the rows of a batch lie in a forward: beside each other with padding, or behind each other in lines.

In a line each row is a document: its positions begin at 0, and attention does not cross its ends. There is no mask;
transformers finds the ends from the positions (`preflight/packing.py` tries whether a model does). Which rows a window
holds does not depend on it, and so neither do loss and gradient.

Shapes: B rows, T positions, L lines, W positions of a line, S supervised tokens, X whatever a model gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdtrain.host import send

Line = tuple[int, ...]
"""Rows of a batch, by number, in the order in which they lie."""


@dataclass(frozen=True)
class Layout:
    """How the B rows of a batch lie."""

    lines: tuple[Line, ...]
    """Every row is in one of them, once."""
    lengths: tuple[int, ...]
    """Tokens of each of the B rows."""
    teacher_lengths: tuple[int, ...] = ()
    """The same as the teacher reads them, where it reads other tokens."""
    multiple: int | None = None
    """Lines are as long as the longest, rounded up to a multiple of this."""

    def part(self, rows: Sequence[int]) -> Layout:
        """Of a batch of some of the rows: each in the line that it was in, without the others."""
        numbers = {row: number for number, row in enumerate(rows)}
        lines = [tuple(numbers[row] for row in line if row in numbers) for line in self.lines]
        return Layout(
            tuple(line for line in lines if line),
            tuple(self.lengths[row] for row in rows),
            tuple(self.teacher_lengths[row] for row in rows) if self.teacher_lengths else (),
            self.multiple,
        )


@dataclass(frozen=True)
class ForwardInputs:
    """A batch as the forward of a model takes it."""

    model_inputs: Mapping[str, Any]
    mask: torch.Tensor | None
    """What of it is no padding, in the shape of its ids; None where that is not known."""
    before_S: torch.Tensor
    """[S] long: where in its L·W positions those lie that predict a supervised token, in the order of `labels_S`."""
    width: int
    """W, positions of a row or line."""
    in_lines: bool = False
    """Whether rows lie behind each other."""
    one_each: bool = False
    """Whether each line is one row that fills it: attention is causal and nothing else, and needs no mask."""

    def predicting(self, outputs: torch.Tensor) -> torch.Tensor:
        """[S, X] of a model's outputs [L, W, X]: those that predict the supervised tokens, in the order of `labels_S`.

        Prompt tuning puts virtual tokens in front of each row, whose outputs are no positions of the batch.
        """
        virtual, before_S = outputs.shape[1] - self.width, send(self.before_S, outputs.device)
        if virtual:
            before_S = before_S + virtual * (before_S // self.width + 1)
        return outputs.flatten(0, 1).index_select(0, before_S)


def in_lines(
    tokens: Mapping[str, torch.Tensor], predicts_BT: torch.Tensor, layout: Layout, *, flat: bool
) -> ForwardInputs:
    """The rows behind each other, as `layout` has them.

    Args:
        tokens: `input_ids` and what else there is for every token, [B, T], padded on the right.
        predicts_BT: [B, T−1], on the CPU, see `Batch.predicts_BT`.
        flat: all lines as one, without padding: what flash attention needs, and all it costs there.
    """
    lines = (tuple(row for line in layout.lines for row in line),) if flat else layout.lines
    lengths, ids = layout.lengths, tokens["input_ids"]
    device, (_, columns) = ids.device, ids.shape
    longest = max(sum(lengths[row] for row in line) for line in lines)
    width = -(-longest // layout.multiple) * layout.multiple if layout.multiple else longest
    source = torch.zeros(len(lines), width, dtype=torch.long)
    position, mask = torch.zeros_like(source), torch.zeros_like(source)
    starts = torch.zeros(len(lengths), 1, dtype=torch.long)
    for number, line in enumerate(lines):
        at = 0
        for row in line:
            end, steps = at + lengths[row], torch.arange(lengths[row])
            source[number, at:end] = row * columns + steps
            position[number, at:end] = steps
            mask[number, at:end] = 1
            starts[row] = number * width + at
            at = end
    # Padding behind a line has position 0 all along: each is a document of its own, within any table of positions.
    before_S = send((starts + torch.arange(columns - 1))[predicts_BT], device)
    source, position, mask = (send(one, device) for one in (source, position, mask))
    taken = {name: _taken(values, source, mask) for name, values in tokens.items()}
    one_each = all(len(line) == 1 and lengths[line[0]] == width for line in lines)
    inputs = {**taken, "position_ids": position}
    return ForwardInputs(inputs, mask, before_S, width, in_lines=True, one_each=one_each)


def _taken(values_BT: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found = values_BT.flatten(0, 1)[source]
    return found * mask.reshape(*mask.shape, *(1,) * (found.dim() - 2)).to(found.dtype)


# ---- which rows share a line, and which lines a forward --------------------------------------------------------------


def best_fit(lengths: Sequence[int], room: int) -> list[Line]:
    """Items in as few bins as best fit decreasing finds: the longest first, each where the least room is left.

    An item that is larger than `room` has a bin of its own. Equal ones stay in their order.
    """
    lines: list[list[int]] = []
    left: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [i for i, free in enumerate(left) if free >= lengths[item]]
        if fitting:
            tightest = min(fitting, key=left.__getitem__)
            lines[tightest].append(item)
            left[tightest] -= lengths[item]
        else:
            lines.append([item])
            left.append(room - lengths[item])
    return [tuple(line) for line in lines]


@dataclass(frozen=True)
class Dealing:
    """How the rows of a window become forwards."""

    rows: int
    """Rows, or lines, of a forward."""
    line: int | None = None
    """Longest line in tokens, where short rows share one (`data.packing`)."""
    tokens: int | None = None
    """Most tokens of a forward, padding included, in place of `rows`."""
    joined: bool = False
    """Whether all rows of a forward lie in one line (`data.padding_free`)."""

    def forwards(self, lengths: Sequence[int]) -> list[list[Line]]:
        """The lines of each forward, by the numbers of their rows; without `line`, lines of one row each, or one line.

        The longest are in the first.
        """
        if self.line is None and self.joined and self.tokens is not None:
            return [[line] for line in best_fit(lengths, self.tokens)]
        items = [(i,) for i in range(len(lengths))] if self.line is None else best_fit(lengths, self.line)
        sizes = [sum(lengths[row] for row in item) for item in items]
        forwards: list[list[Line]] = []
        longest = 0
        for item in sorted(range(len(items)), key=lambda i: -sizes[i]):
            if not forwards or not self._has_room(len(forwards[-1]), longest):
                forwards.append([])
                longest = sizes[item]
            forwards[-1].append(items[item])
        return [[tuple(row for line in one for row in line)] for one in forwards] if self.joined else forwards

    def _has_room(self, lines: int, longest: int) -> bool:
        """Whether one more fits, padded to the longest."""
        return lines < self.rows if self.tokens is None else (lines + 1) * longest <= self.tokens


def split_up(forwards: Sequence[Sequence[Line]], count: int) -> list[list[Line]]:
    """At least `count` forwards, where there are as many rows: those with the most are halved."""
    found = [list(lines) for lines in forwards]
    while len(found) < count:
        at = max(range(len(found)), key=lambda i: sum(map(len, found[i])), default=None)
        if at is None or sum(map(len, found[at])) < 2:
            break
        found[at : at + 1] = _halves(found[at])
    return found


def _halves(lines: list[Line]) -> list[list[Line]]:
    if len(lines) > 1:
        return [lines[: len(lines) // 2], lines[len(lines) // 2 :]]
    (line,) = lines
    return [[line[: len(line) // 2]], [line[len(line) // 2 :]]]
