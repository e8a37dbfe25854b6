"""Reading `logging.jsonl` back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a `logging.jsonl`, and how many lines are none.

    A process that is killed, or still writes, leaves its last line torn.
    """
    records, torn = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # UnicodeDecodeError is one
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            torn += 1
    return records, torn
