"""The collector of reference cycles while many objects are made."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from kdtrain.data.heap import frozen_heap


class _Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    """`conftest.py` has frozen the libraries for all tests."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_is_there_is_not_looked_at_and_comes_back() -> None:
    gc.collect()
    with frozen_heap():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_cycles_made_meanwhile_are_collected() -> None:
    with frozen_heap():
        gone = weakref.ref(_Node())
        gc.collect()
        assert gone() is None


def test_an_error_leaves_nothing_frozen() -> None:
    with pytest.raises(ValueError, match="a row"), frozen_heap():
        raise ValueError("a row")
    assert gc.get_freeze_count() == 0


def test_what_another_froze_stays_so() -> None:
    gc.freeze()
    try:
        with frozen_heap():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
