"""How a split of a data source is written: a name, and slices as of `datasets`. `kdtrain.data.splits` reads it."""

from __future__ import annotations

import re

from kdtrain.config.section import wrong

_TERM = re.compile(r"(?P<name>[\w.-]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?(\((closest|pct1_dropremainder)\))?")


def check_split(value: str) -> str:
    """Refuses what is no split."""
    for term in value.split("+"):
        found = _TERM.fullmatch(term.strip())
        ends = [end for end in (found["start"], found["stop"]) if end] if found else []
        if not term.strip() or found is None or len({end.endswith("%") for end in ends}) > 1:
            raise wrong("expected a split, with a slice or without: train, train[:90%], train[100:200], train[-10%:]")
    return value


def share_rows(first: str, second: str) -> bool:
    """Whether two splits of one data set have rows in common, as far as this can be said without counting them."""
    return any(_overlap(one, other) for one in first.split("+") for other in second.split("+"))


def _overlap(first: str, second: str) -> bool:
    one, other = _TERM.fullmatch(first.strip()), _TERM.fullmatch(second.strip())
    if one is None or other is None or (one["name"] or "train") != (other["name"] or "train"):
        return False
    ends = [end for found in (one, other) for end in (found["start"], found["stop"]) if end]
    percent = {end.endswith("%") for end in ends}
    if len(percent) > 1 or (percent == {False} and any(end.startswith("-") for end in ends)):
        return first.strip() == second.strip()  # what they have in common depends on the number of rows
    (start, stop), (other_start, other_stop) = (_bounds(found["start"], found["stop"]) for found in (one, other))
    return max(start, other_start) < min(stop, other_stop)


def _bounds(start: str | None, stop: str | None) -> tuple[float, float]:
    """From where to where, in rows or percent."""
    end = 100.0 if "%" in f"{start}{stop}" else float("inf")
    first, last = (None if text is None else float(text.rstrip("%")) for text in (start, stop))
    bounds = (0.0 if first is None else first, end if last is None else last)
    begins, ends = (bound + end if bound < 0 else bound for bound in bounds)
    return begins, ends
