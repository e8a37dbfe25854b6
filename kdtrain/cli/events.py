"""The JSON objects of `--log-format json`: one on a line, each with its kind and its time."""

from __future__ import annotations

import datetime
import math
from typing import Any


def timed(event: str, **values: Any) -> dict[str, Any]:
    """An object for `json.dumps`: `event`, `time` (UTC, to the millisecond), and its values."""
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    return {
        "event": event,
        "time": time.replace("+00:00", "Z"),
        **{key: _strict(value) for key, value in values.items()},
    }


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no number."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
