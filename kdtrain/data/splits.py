"""Which part of a source is read: files by the split that their names say, and slices such as `train[:90%]`.

Nothing is guessed where rows to evaluate on could be trained on: what names another split is never read for this one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdtrain.data.errors import show
from kdtrain.errors import DataError

DEFAULT_SPLIT = "train"
EVERY_SPLIT = "all"
_SAME = (
    ("train", "training", "trainset"),
    ("validation", "valid", "val", "dev", "valset", "devset"),
    ("test", "testing", "testset"),
    ("eval", "evaluation"),
)
_CANONICAL = {word: words[0] for words in _SAME for word in words}
_SPLITS = set(_CANONICAL.values())
_SEPARATORS = re.compile(r"[-_. ]+")
# As `datasets` writes them: train_sft-00000-of-00004-1a2b3c.parquet, gsm8k-train-00000-of-00001.arrow.
_SHARD = re.compile(r"(?:.*-)?(?P<split>[^-]+)-\d{5}-of-\d{5}\b.*")
_TERM = re.compile(
    r"(?P<name>[\w.-]*)(?P<slice>\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?(?P<rounding>\((closest|pct1_dropremainder)\))?"
)


@dataclass(frozen=True)
class Part:
    """One term of a split: its name, and the slice of its rows; None is from the beginning, or to the end."""

    name: str
    text: str  # in full, as `datasets` takes it
    start: int | None = None
    stop: int | None = None
    percent: bool = False
    multiples: bool = False  # of the rows that 1 % are, rounded down

    @property
    def whole(self) -> bool:
        return self.start is None and self.stop is None

    def bounds(self, size: int) -> tuple[int, int]:
        """From which to which of `size` rows, as `datasets` counts."""

        def position(value: int) -> int:
            if self.percent:
                value = value * (size // 100) if self.multiples else round(value * size / 100)
            return min(max(size + value if value < 0 else value, 0), size)

        start = 0 if self.start is None else position(self.start)
        return start, size if self.stop is None else position(self.stop)

    @property
    def needs_size(self) -> bool:
        """Whether the number of rows must be known to find the slice."""
        return self.percent or (self.start or 0) < 0 or (self.stop or 0) < 0


def parse_split(text: str) -> list[Part]:
    """The terms of `train`, `train[:90%]`, `[90%:]` (of train), `train[:10]+test`."""
    return [_part(term.strip(), text) for term in text.split("+")]


def _part(term: str, text: str) -> Part:
    found = _TERM.fullmatch(term)
    ends = [found["start"], found["stop"]] if found else []
    units = {end.endswith("%") for end in ends if end}
    if found is None or not term or len(units) > 1 or (found["rounding"] and units != {True}):
        raise DataError(
            f"split {show(text)!r} is not read: write a name, or a name with a slice: train, train[:90%], "
            "train[100:200], train[-10%:]"
        )
    start, stop = (int(end.rstrip("%")) if end else None for end in ends)
    name = found["name"] or DEFAULT_SPLIT
    in_full = name + term.removeprefix(found["name"])
    return Part(name, in_full, start, stop, units == {True}, found["rounding"] == "(pct1_dropremainder)")


def same_split(first: str, second: str) -> bool:
    """Whether two names mean one split: `val` is `validation`."""
    return _words(first) == _words(second)


def names_split(file: Path, split: str, root: Path) -> bool:
    """Whether the name of a file, or of the folders below `root` that it lies in, says that it is of this split."""
    wanted, (words, is_shard) = _words(split), _label(file, root)
    if len(_SPLITS & set(words)) > 1 and words != wanted:
        return False  # val_from_train.jsonl: of which one is not clear
    if is_shard:
        return words[-len(wanted) :] == wanted
    found = any(words[i : i + len(wanted)] == wanted for i in range(len(words)))
    return found or (not _SPLITS & set(words) and any(_words(name) == wanted for name in _folders(file, root)))


def splits_named(file: Path, root: Path) -> frozenset[str]:
    """The splits that the name of a file speaks of."""
    return frozenset(_SPLITS & set(_label(file, root)[0]))


def is_split_name(name: str) -> bool:
    """Whether a name speaks of a split."""
    return bool(_SPLITS & set(_words(name)))


def choose(files: Sequence[Path], split: str, root: Path) -> list[Path]:
    """Those of a folder's files that are of a split; all of them where none names one and the split is the default.

    Raises:
        DataError: none is, or it cannot be told which are.
    """
    if split == EVERY_SPLIT:
        return list(files)
    chosen = [file for file in files if names_split(file, split, root)]
    labels = {_label(file, root) for file in chosen}
    if (exact := (_words(split), True)) in labels:
        return [file for file in chosen if _label(file, root) == exact or not _label(file, root)[1]]
    if sum(is_shard for _, is_shard in labels) > 1:
        raise DataError(f"{_of(root)}: the split {show(split)} is not clear: {listed(chosen, root)}. {_remedy(chosen)}")
    if chosen:
        return chosen
    if split == DEFAULT_SPLIT and not any(splits_named(file, root) for file in files):
        return list(files)
    raise DataError(f"{_of(root)} has no files of the split {show(split)}, but {listed(files, root)}. {_remedy(files)}")


def _remedy(files: Sequence[Path]) -> str:
    shards = [_SHARD.fullmatch(file.name) for file in files]
    known = sorted({show(shard["split"], 40) for shard in shards if shard})
    return f"Set split to {', '.join(known) if all(shards) else 'the one that is meant'}, or name the files"


def _of(root: Path) -> str:
    return show(str(root), 400)


def listed(files: Sequence[Path], root: Path, most: int = 8) -> str:
    """The names of files for a message."""
    names = [show(str(file.relative_to(root)), 80) for file in files[:most]]
    return ", ".join(names) + (f" and {len(files) - most} more" if len(files) > most else "")


def _label(file: Path, root: Path) -> tuple[tuple[str, ...], bool]:
    """The words that say a file's split, and whether `datasets` wrote it, with the split's whole name.

    Words are those of the file, and of the nearest folder below `root` that names a split.
    """
    shard = _SHARD.fullmatch(file.name)
    own = _words(shard["split"] if shard else file.name)
    by_folder = next((words for name in _folders(file, root) if _SPLITS & set(words := _words(name))), ())
    # train/part-0.jsonl is of train, and so is train/train-0.jsonl; train/test.jsonl speaks of two.
    return (own, shard is not None) if set(by_folder) <= set(own) else ((*own, *by_folder), False)


def _folders(file: Path, root: Path) -> list[str]:
    return [parent.name for parent in file.parents if root in parent.parents]


def _words(name: str) -> tuple[str, ...]:
    """The words of a name, in small letters; a word for a split as its first synonym, also with a number behind it."""
    words = (word for word in _SEPARATORS.split(name.lower()) if word)
    return tuple(_CANONICAL.get(word) or _CANONICAL.get(word.strip("0123456789")) or word for word in words)
