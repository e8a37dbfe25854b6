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
    nameless = bool(found and found["name"] and not _words(found["name"]))
    if found is None or not term or nameless or len(units) > 1 or (found["rounding"] and units != {True}):
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
    return [_first_synonym(word) for word in _words(first)] == [_first_synonym(word) for word in _words(second)]


def names_split(file: Path, split: str, root: Path) -> bool:
    """Whether the name of a file, or of the folders below `root` that it lies in, says that it is of this split."""
    words, is_shard = _label(file, root)
    if _says(words, split):
        return True
    wanted = len(_words(split))
    if len(_splits_in(words)) > 1:
        return False  # val_from_train.jsonl: of which one is not clear
    if is_shard:
        return _says(words[-wanted:], split)
    found = any(_says(words[i : i + wanted], split) for i in range(len(words)))
    return found or (not _splits_in(words) and any(_says(_words(name), split) for name in _folders(file, root)))


def splits_named(file: Path, root: Path) -> frozenset[str]:
    """The splits that the name of a file speaks of."""
    return _splits_in(_label(file, root)[0])


def is_split_name(name: str) -> bool:
    """Whether a name speaks of a split."""
    return bool(_splits_in(_words(name)))


def choose(files: Sequence[Path], split: str, root: Path) -> list[Path]:
    """Those of a folder's files that are of a split; all of them where none names one and the split is the default.

    Raises:
        DataError: none is, or it cannot be told which are.
    """
    if split == EVERY_SPLIT:
        return list(files)
    chosen = [file for file in files if names_split(file, split, root)]
    shards = {words for words, is_shard in (_label(file, root) for file in chosen) if is_shard}
    if exact := {words for words in shards if _says(words, split)}:
        return [file for file in chosen if _label(file, root)[0] not in shards - exact]
    if len(shards) > 1:
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
    folders = (_words(name) for name in _folders(file, root))
    by_folder = next((words for words in folders if _splits_in(words)), ())
    # train/part-0.jsonl is of train, and so is train/train-0.jsonl; train/test.jsonl speaks of two.
    return (own, shard is not None) if _splits_in(by_folder) <= _splits_in(own) else ((*own, *by_folder), False)


def _folders(file: Path, root: Path) -> list[str]:
    return [parent.name for parent in file.parents if root in parent.parents]


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in _SEPARATORS.split(name.lower()) if word)


def _says(words: Sequence[str], split: str) -> bool:
    """Whether words are the name of a split: train0 is a part of train, but train is none of train0."""
    asked = [_first_synonym(word) for word in _words(split)]
    return len(asked) == len(words) and all(
        one in (_first_synonym(word), _without_number(word)) for one, word in zip(asked, words, strict=True)
    )


def _splits_in(words: Sequence[str]) -> frozenset[str]:
    return frozenset(filter(None, map(_without_number, words)))


def _first_synonym(word: str) -> str:
    return _CANONICAL.get(word, word)


def _without_number(word: str) -> str | None:
    """The split that a word speaks of, with a number or without."""
    return _CANONICAL.get(word.strip("0123456789"))
