"""axolotl's rows with a teacher's log-probabilities, for the knowledge distillation of its KD plugin.

As of https://github.com/axolotl-ai-cloud/axolotl, `src/axolotl/integrations/kd`. Three kinds:

- rows of a conversation and a column such as `llm_text_generation_vllm_logprobs`: for each token of the answer (or of
  the whole row, the first ones empty) a list of {token: "token_id:123", logprob};
- the same with `target_token_ids` and lists of numbers alone;
- rows that were prepared for its trainer: `input_ids`, `target_token_ids`, `target_logprobs`, `target_mask`. In those
  up to its version 0.18 entry j describes token j, later token j + 1; nothing in the file says which. Their
  log-probabilities are normalised over the K tokens, at the temperature of the loss.

Shapes: n entries of a row, K tokens of an entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kdtrain.data.errors import show
from kdtrain.errors import DataError
from kdtrain.teachers.cached.import_files import as_array
from kdtrain.teachers.cached.imported import (
    AS_ECHO,
    AS_LOGITS,
    AT_THE_END,
    AT_THE_LAST_SUPERVISED,
    Imported,
    Reader,
    UnreadableRow,
    side_by_side,
)

_UNKNOWN = "the teacher, its revision, its chat template and the temperature"
_FILLER = -1e4  # its collator fills up with −1e9
_IDS = "target_token_ids"
_PREFIX = "token_id:"
_CHAT_PLACES = (AT_THE_END, AT_THE_LAST_SUPERVISED, AS_LOGITS)


def reader(row: Mapping[str, Any]) -> Reader | None:
    """How rows with these columns are read; None where they are not axolotl's.

    Raises:
        DataError: several columns may be the log-probabilities.
    """
    if {"input_ids", _IDS, "target_logprobs"} <= row.keys():
        return Reader("axolotl, prepared for its trainer", _prepared, (AS_LOGITS, AS_ECHO), _UNKNOWN)
    columns = [name for name in row if name.endswith("logprobs") and _is_nested(row[name])]
    if not columns:
        return None
    if len(columns) > 1:
        raise DataError(
            f"--from: the columns {' and '.join(show(name, 60) for name in columns)} may both be the teacher's "
            "log-probabilities. Leave one of them in the file."
        )
    if _IDS in row:
        return Reader("axolotl, rows with target_token_ids", partial(_numbers, columns[0]), _CHAT_PLACES, _UNKNOWN)
    return Reader("axolotl, rows with tokens and logprobs", partial(_mappings, columns[0]), _CHAT_PLACES, _UNKNOWN)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | np.ndarray) and any(isinstance(x, list | tuple | np.ndarray) for x in value)


def _prepared(row: Mapping[str, Any]) -> Sequence[Imported]:
    tokens = as_array(row, "input_ids", 1, np.int64)
    if tokens is None:
        raise UnreadableRow("input_ids is no list of token ids")
    ids, logprobs = _lists(row[_IDS], row["target_logprobs"])
    if len(ids) != len(tokens):
        raise UnreadableRow("there are not as many entries as tokens", f"{len(ids)} for {len(tokens)}")
    return [Imported(tokens, ids, logprobs)]


def _numbers(column: str, row: Mapping[str, Any]) -> Sequence[Imported]:
    return [_of_chat(row, (column, _IDS), *_lists(row.get(_IDS), row.get(column)))]


def _mappings(column: str, row: Mapping[str, Any]) -> Sequence[Imported]:
    entries = row.get(column)
    if not isinstance(entries, list):
        raise UnreadableRow(f"{column} is no list")
    parts = [_entry(entry) for entry in entries]
    return [_of_chat(row, (column,), *_known(*side_by_side(parts)))]


def _of_chat(row: Mapping[str, Any], taken: Sequence[str], ids: np.ndarray, logprobs: np.ndarray) -> Imported:
    tokens = as_array(row, "input_ids", 1, np.int64) if "input_ids" in row else None
    return Imported(tokens, ids, logprobs, {name: value for name, value in row.items() if name not in taken})


def _entry(entry: Any) -> tuple[list[int], list[float]]:
    """The ids and log-probabilities of one position; nothing where the server gave none."""
    if entry is None:
        return [], []
    try:
        return [_token_id(one) for one in entry], [float(one["logprob"]) for one in entry]
    except UnreadableRow:
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UnreadableRow("an entry is no list of {token, logprob}", show(entry, 80)) from error


def _token_id(one: Mapping[str, Any]) -> int:
    given = one.get("token_id", one.get("token"))
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    text = str(given).removeprefix(_PREFIX)
    if not text.isdigit() or not str(given).startswith(_PREFIX):
        raise UnreadableRow(
            "its tokens are text and not ids: which id a text stands for cannot be told. Ask the server for ids "
            '("token_id:123", return_tokens_as_token_ids of vLLM)',
            show(given, 40),
        )
    return int(text)


def _lists(ids: Any, logprobs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two lists of lists of numbers, of one shape; null and empty ones name nothing."""
    try:
        pairs = [(_listed(a), _listed(b)) for a, b in zip(ids, logprobs, strict=True)]
        arrays = side_by_side(pairs)
        fits = all(len(a) == len(b) for a, b in pairs)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UnreadableRow("the ids and the log-probabilities are no lists of numbers of one shape")
    return _known(*arrays)


def _listed(entry: Any) -> list[Any]:
    return [] if entry is None else list(entry)


def _known(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """With what only fills up marked as missing."""
    if np.isnan(logprobs).any():
        raise UnreadableRow("there is NaN among the log-probabilities")
    filler = logprobs < _FILLER
    return np.where(filler, -1, ids), np.where(filler, -np.inf, logprobs)
