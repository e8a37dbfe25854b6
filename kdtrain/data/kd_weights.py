"""Weights in the divergence that the data name: `kd_weight` of a row, of a message, or of every token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdtrain.data.errors import RowError, show, type_name

WEIGHT = "kd_weight"
"""The column, and the key of a message."""


def read_weight(value: Any, where: str = WEIGHT) -> float:
    """A weight of a row or a message; 1 where it is missing, null or empty. Tables may write the number as text.

    Raises:
        RowError: no number, negative, NaN or infinite.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return 1.0
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise RowError(f"{where} is the text {show(value, 40)}: {_NUMBER}") from None
    if isinstance(number, list | tuple):
        raise RowError(f"{where} is a list: {_NUMBER}. One for each token is for rows with input_ids")
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise RowError(f"{where} is {type_name(value)}: {_NUMBER}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise RowError(f"{where} is {number:g}: {_NUMBER}")
    return number


def read_weights(values: Sequence[Any], tokens: int, where: str = WEIGHT) -> list[float] | None:
    """A weight for each token; None where all are 1.

    Raises:
        RowError: another number of them than of tokens, and as `read_weight`.
    """
    if len(values) != tokens:
        raise RowError(
            f"{where} has {len(values)} weights, and the row {tokens} tokens: give one for each of input_ids"
        )
    weights = [read_weight(value, f"{where}[{i}]") for i, value in enumerate(values)]
    return weights if any(weight != 1 for weight in weights) else None


def refuse_in_part(part: Mapping[str, Any], where: str) -> None:
    """Raises RowError for a weight of a part of a message's content."""
    if part.get(WEIGHT) is not None:
        raise RowError(f"{where}.content has a part with {WEIGHT}: a message has a weight, not a part of it")


_NUMBER = "it must be a finite number of 0 or more"
