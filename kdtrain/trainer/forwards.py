"""From the micro-batches of a window to its forwards: rows behind each other, and as many as fit.

Which rows a window holds is decided before, and D is that of the window: loss and gradient are the same (but for the
load balancing of experts, a mean over forwards by its definition). All ranks make as many forwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from kdtrain.data.batch import Batch
from kdtrain.data.packing import Dealing, Layout, Line, split_up
from kdtrain.data.regroup import rows_of
from kdtrain.data.visual_batch import CannotShareError
from kdtrain.errors import DataError, NotAvailableError
from kdtrain.host import on_host, send
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.teachers.by_row import by_row, in_one, nothing_of

if TYPE_CHECKING:
    from trl.experimental.gkd import GKDConfig

    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


@dataclass(frozen=True)
class LayoutOptions:
    """What the options say of it."""

    padding_free: bool = False
    packing: bool = False
    tokens: int | None = None
    """`per_device_train_tokens`."""

    @classmethod
    def from_args(cls, args: GKDConfig, tokens: int | None) -> LayoutOptions:
        """Of a GKDConfig; `packing` alone where both are set."""
        return cls(bool(args.padding_free) and not args.packing, bool(args.packing), tokens)

    @property
    def in_lines(self) -> bool:
        """Whether rows lie behind each other."""
        return self.padding_free or self.packing

    @property
    def deals_anew(self) -> bool:
        """Whether rows may come into another forward than their micro-batch was."""
        return self.packing or self.tokens is not None

    @property
    def changes(self) -> bool:
        """Whether there is anything to be done."""
        return self.in_lines or self.deals_anew


@dataclass(frozen=True)
class Forwards:
    """What upstream takes for one micro-batch: any number of forwards, none included."""

    batches: Sequence[Batch]

    # Upstream looks at ids and mask to count operations and tokens.

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def __contains__(self, name: object) -> bool:
        return name in ("input_ids", "attention_mask")

    def __getitem__(self, name: str) -> Any:
        found = [batch.model_inputs.get(name) for batch in self.batches]
        return torch.cat([one.flatten() for one in found if one is not None] or [torch.zeros(0, dtype=torch.long)])


def as_micro_batches(batches: Sequence[Batch], count: int) -> list[Forwards]:
    """So many micro-batches of these forwards in all: the last has one, in which gradients are synchronised, and those
    that are empty come first."""
    before, last = batches[:-1], batches[-1:]
    if count == 1:
        return [Forwards(batches)]
    sizes = [len(before) // (count - 1) + (i >= count - 1 - len(before) % (count - 1)) for i in range(count - 1)]
    ends = list(accumulate(sizes, initial=0))
    return [*(Forwards(before[a:b]) for a, b in pairwise(ends)), Forwards(last)]


@contextmanager
def unsynchronised(trainer: GKDTrainerWithMetrics, model: nn.Module) -> Iterator[None]:
    """Backward inside adds to this rank's gradients alone, though the micro-batch is the last of its window."""
    accelerator = trainer.accelerator
    in_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED  # which looks at `sync_gradients`
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        with nullcontext() if in_deepspeed else accelerator.no_sync(model):
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


def laid_out(trainer: GKDTrainerWithMetrics, batches: Sequence[Batch]) -> list[Batch]:
    """The forwards of a window; a collective where rows are dealt anew.

    Raises:
        DataError: rows that cannot lie behind each other, or cannot be told apart.
        NotAvailableError: rows with images.
    """
    options = trainer.layout
    if not batches or not options.changes:
        return list(batches)
    if options.in_lines:
        _check(batches)
    if options.deals_anew:
        return _dealt(trainer, batches)
    multiple = trainer.args.pad_to_multiple_of
    return [_joined(batch, own, multiple) for batch, own in zip(batches, _lengths(batches), strict=True)]


def _joined(batch: Batch, lengths: _Lengths, multiple: int | None) -> Batch:
    """All rows of a batch in one line."""
    line = tuple(range(len(batch)))
    return replace(batch, layout=Layout((line,), lengths.student, lengths.teacher, multiple))


def _dealt(trainer: GKDTrainerWithMetrics, batches: Sequence[Batch]) -> list[Batch]:
    options, args, ranks = trainer.layout, trainer.args, trainer.accelerator
    if trainer.is_sharded and any(batch.has_images for batch in batches):
        raise NotAvailableError(
            "per_device_train_tokens deals rows to other forwards, and under FSDP and DeepSpeed ranks have agreed on "
            "which have images: not available yet. Remove it."
        )
    new = [batch for batch in batches if not batch.all_repeated]
    of_batches = _lengths(new)
    lengths = _Lengths.joined(of_batches)
    line = args.max_length if options.packing else None
    dealing = Dealing(trainer._train_batch_size, line, options.tokens, joined=options.padding_free)
    groups = dealing.forwards(lengths.student)
    count = max(len(groups), 1)
    if ranks.num_processes > 1:
        count = int(ranks.gather(send(torch.tensor([count]), ranks.device)).max())
    groups = split_up(groups, count)
    targets = _targets(new)
    fill = _without_new_rows(trainer, batches, new, lengths, targets)
    found = [_forward(trainer, new, lines, lengths, targets) for lines in groups]
    return [fill] * (count - len(found)) + found if fill is not None else found


def _forward(
    trainer: GKDTrainerWithMetrics, new: Sequence[Batch], lines: Sequence[Line], lengths: _Lengths, targets: list[Any]
) -> Batch:
    """One forward of some rows of the window, by their numbers in all batches."""
    order = [row for line in lines for row in line]
    multiple = trainer.args.pad_to_multiple_of
    try:
        batch = rows_of(new, order, trainer._tokenizer.pad_token_id, multiple)
    except CannotShareError as error:
        raise DataError(f"The rows of a window cannot be dealt to other forwards: {error}") from error
    batch = replace(batch, targets=in_one([targets[row] for row in order]) if targets else None)
    if not trainer.layout.in_lines:
        return batch
    numbers = iter(range(len(order)))
    own = tuple(tuple(next(numbers) for _ in line) for line in lines)
    return replace(batch, layout=Layout(own, *lengths.of(order), multiple))


def _without_new_rows(
    trainer: GKDTrainerWithMetrics,
    batches: Sequence[Batch],
    new: Sequence[Batch],
    lengths: _Lengths,
    targets: list[Any],
) -> Batch | None:
    """A forward for a rank that has fewer rows than others have forwards: the same motions, and nothing learnt."""
    if not new:
        filled = batches[0]
        return _joined(filled, _lengths([filled])[0], None) if trainer.layout.in_lines else filled
    if trainer.accelerator.num_processes == 1:
        return None
    shortest = min(range(len(lengths.student)), key=lengths.student.__getitem__)
    nothing = [nothing_of(one) for one in targets]
    batch = _forward(trainer, new, [(shortest,)], lengths, nothing)
    return replace(batch.without_labels(), all_repeated=True, targets=batch.targets)


def _targets(new: Sequence[Batch]) -> list[Any]:
    """What the teacher has said already of each row; nothing where it was not asked."""
    if not new or any(batch.targets is None for batch in new):
        return []
    return [row for batch in new for row in by_row(batch.targets, batch)]


# ---- what is known of the rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lengths:
    """Tokens of rows, as the student and as the teacher reads them; the latter empty where it reads the same."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    def of(self, rows: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = list(rows)
        teacher = tuple(self.teacher[row] for row in rows) if self.teacher else ()
        return tuple(self.student[row] for row in rows), teacher

    @classmethod
    def joined(cls, parts: Sequence[_Lengths]) -> _Lengths:
        """Of all batches; one that both models read alike may stand beside others."""
        several = any(part.teacher for part in parts)
        student = tuple(length for part in parts for length in part.student)
        teacher = tuple(length for part in parts for length in part.teacher or part.student)
        return cls(student, teacher if several else ())


def _lengths(batches: Sequence[Batch]) -> list[_Lengths]:
    """Of each batch.

    Raises:
        DataError: a mask leaves out tokens in the middle of a row, which nothing would hide in a line.
    """
    read: list[torch.Tensor] = []
    for batch in batches:
        seen = [batch.model_inputs.get("attention_mask")]
        labels = [batch.labels]
        if batch.teacher_tokens is not None:
            seen.append(batch.teacher_tokens.attention_mask)
            labels.append(batch.teacher_tokens.labels)
        for mask, own in zip(seen, map(on_host, labels), strict=True):
            mask = torch.ones_like(own) if mask is None else on_host(mask)
            used = (mask != 0) | (own != IGNORE_INDEX)
            ends = (used * torch.arange(1, used.shape[1] + 1)).amax(1)
            read.append(torch.stack([ends, (mask != 0).sum(1)]))
    if not read:
        return []
    ends, counts = torch.cat(read, 1).tolist()
    if ends != counts:
        raise DataError(
            "A row's attention_mask leaves out tokens in front of its last one, which cannot be kept from it where "
            "rows lie in one line (data.padding_free, data.packing) or are dealt anew (per_device_train_tokens): leave "
            "these tokens out of the row, or switch the option off."
        )
    at, found = iter(ends), []
    for batch in batches:
        student = tuple(next(at) for _ in range(len(batch)))
        teacher = tuple(next(at) for _ in range(len(batch))) if batch.teacher_tokens is not None else ()
        found.append(_Lengths(student, teacher))
    return found


def _check(batches: Sequence[Batch]) -> None:
    """Refuse what has no place in a line."""
    for batch in batches:
        if batch.has_images:
            raise NotAvailableError(
                f"Row {batch.rows.name(0)} or one beside it has images: padding_free and packing are for text. Switch "
                "them off."
            )
        if unknown := batch.unknown_inputs:
            raise DataError(
                f"Batches carry {', '.join(unknown)}, which cannot lie in one line with other rows (data.padding_free, "
                "data.packing): leave it out, or switch the option off."
            )
