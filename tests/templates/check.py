"""Rows of every kind through the encoder, and what the oracle says of the outcome."""

from __future__ import annotations

import json
from typing import Any

from kdtrain.data import RowError
from kdtrain.data.encoded_row import EncodedRow
from kdtrain.data.encoder import RowEncoder
from tests.templates.families import Template
from tests.templates.oracle import Encoded, Oracle, Verdict, judge
from tests.templates.rows import Row, kinds

TRAIN_ON = ("assistant", "last", "all")
FOR_ALL = ("single turn", "multi-turn", "call, tool, answer", "reasoning, multi-turn", "begins with newlines")


def judged(template: Template) -> dict[str, dict[str, Verdict]]:
    """Of each `train_on` and kind of row."""
    oracle, rows = Oracle(template), kinds(template.control_token)
    return {train_on: verdicts(template, rows, train_on, oracle) for train_on in TRAIN_ON}


def verdicts(template: Template, rows: dict[str, Row], train_on: str, oracle: Oracle) -> dict[str, Verdict]:
    encoder = RowEncoder(template.tokenizer, train_on)
    found = {}
    for kind, row in rows.items():
        if train_on == "all" and kind not in FOR_ALL:
            continue
        try:
            got, noted = _outcome(encoder, row)
        except Exception as error:  # a run that allows bad rows would end here
            found[kind] = Verdict("wrong", f"ends the run: {type(error).__name__}: {error}")
        else:
            found[kind] = judge(oracle, row, train_on, got, noted)
    return found


def _outcome(encoder: RowEncoder, row: Row) -> tuple[list[Encoded] | str, bool]:
    """The encoded rows, or the reason why there are none; and whether they carry a note."""
    result: Any = encoder.encode([json.loads(json.dumps(row))], [None])[0]
    if isinstance(result, RowError):
        return str(result), False
    encoded: list[EncodedRow] = [result] if isinstance(result, EncodedRow) else list(result)
    rows = [Encoded(one.input_ids, one.labels, one.prompt_length) for one in encoded]
    return rows, any(one.notes for one in encoded)
