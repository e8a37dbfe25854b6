"""`nonfinite.json`: where NaN or infinity came from, beside the message that ends the run.

| key | what |
|---|---|
| `step` | the step that was not taken; of an evaluation and of weights, the last one taken; null outside of training |
| `during` | training, generation (a step's answers), selection, weights, evaluation; answers, evaluate |
| `origin` | student, teacher, or both: whose numbers are not finite; absent or empty where it is not known |
| `gradient_norm` | of the step, where there is one |
| `ranks` | of each bad rank: `rank`, and its `rows`, or `micro_batches` with their `rows` and the value of each term |
| `sources` | of these rows: the file, and the row there, counted from 0 |
| `time` | in seconds since 1970 |

Numbers and names of rows, no text. What is not finite is written as text, which JSON has no numbers for.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdtrain.config import RunConfig
from kdtrain.config.model_folder import read_map
from kdtrain.config.schema import DataSource
from kdtrain.errors import NonFiniteError
from kdtrain.ranks import rank
from kdtrain.runs.folder import ANOTHER_FOLDER, NONFINITE, STATUS, write_atomically
from kdtrain.runs.resume import resume_command

_EVALUATING = ("evaluation", "evaluate")


@contextmanager
def nonfinite_kept(run_dir: Path, config: RunConfig, *, trains: bool) -> Iterator[None]:
    """Write `nonfinite.json` where a model gives no numbers, and add to the message where the rest is and how to go on.

    Of several ranks that raise together the first bad one writes.

    Args:
        trains: whether it is training that ends, which can be gone on with.
    """
    try:
        yield
    except NonFiniteError as error:
        if run_dir.is_dir():
            ranks = error.facts.get("ranks") or [{}]
            if error.facts and rank() == ranks[0].get("rank", rank()):
                _write(run_dir / NONFINITE, error.facts, _sources(config, error.facts))
            more = f" See {run_dir / NONFINITE}." if error.facts else ""
            error.args = (f"{error}{more}{_way_out(run_dir, config) if trains else ''}",)
        raise


def _write(path: Path, facts: dict[str, Any], sources: Sequence[DataSource]) -> None:
    found = {**_readable(facts), "sources": _places(_rows(facts), sources), "time": time.time()}
    with contextlib.suppress(OSError):  # a full disk does not hide what went wrong
        write_atomically(path, json.dumps(found, indent=2, allow_nan=False) + "\n")


def _way_out(run_dir: Path, config: RunConfig) -> str:
    last = read_map(run_dir / STATUS).get("last_checkpoint")
    if not last or not (run_dir / last).is_dir():
        return f" There is no checkpoint from before: begin anew in {ANOTHER_FOLDER}."
    if config.training.get("save_only_model"):
        return f" {last} is from before, and holds the model alone (training.save_only_model: true)."
    return f" {last} is from before. Go on from it with: {resume_command()}"


def _readable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _readable(one) for key, one in value.items()}
    return [_readable(one) for one in value] if isinstance(value, list | tuple) else value


def _rows(facts: dict[str, Any]) -> list[str]:
    rows = [row for found in facts.get("ranks", ()) for row in found.get("rows", ())]
    rows += [row for found in facts.get("ranks", ()) for one in found.get("micro_batches", ()) for row in one["rows"]]
    return list(dict.fromkeys(rows))


def _sources(config: RunConfig, facts: dict[str, Any]) -> Sequence[DataSource]:
    evaluates = facts.get("during") in _EVALUATING
    return (evaluates and config.data.eval_sources) or config.data.train


def _places(rows: Sequence[str], sources: Sequence[DataSource]) -> dict[str, dict[str, Any]]:
    """Of ids "source:row" and "source:row:turn"; a data set of the user's own has others."""
    found = {}
    for name in rows:
        with contextlib.suppress(ValueError, IndexError):
            source, row = map(int, name.split(":")[:2])
            found[name] = {"source": str(sources[source].path), "row": row}
    return found
