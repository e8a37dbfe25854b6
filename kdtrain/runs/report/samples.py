"""Answers side by side, and tokens shaded by their divergence: of `evaluation.json` and `completions.parquet`.

Texts come from data and models: here they lose secrets and characters that do not print, the page escapes the rest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from tokenizers import Tokenizer

from kdtrain.config.diagnose import redact
from kdtrain.runs.folder import CHECKPOINT, COMPLETIONS
from kdtrain.runs.report.record import RunRecord, is_number, shown_path

logger = logging.getLogger(__name__)

SHADES = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Nats from which on a token has the next deeper shade."""
_MOST_SAMPLES = 8
_MOST_OF_A_STEP = 4
_LONGEST_TEXT = 1500
_MOST_TOKENS = 300
_MANY_BREAKS = re.compile(r"\n{4,}")  # as a student writes that has learnt nothing
_LONGEST_CHARACTER = 4  # bytes, which may be a token each

Piece = tuple[str, float | None]
"""Text, and its divergence in nats."""

_MODELS = {"before": "student before", "after": "student after", "teacher": "teacher"}


@dataclass(frozen=True)
class Token:
    """A piece of text and its shade."""

    text: str
    shade: int
    """From 0, as `SHADES` begin; −1 where the divergence is not known."""
    value: str


@dataclass(frozen=True)
class Shaded:
    """A text, token by token."""

    title: str
    tokens: list[Token]
    left_out: int
    mean: str


@dataclass(frozen=True)
class Sample:
    """A prompt and what was answered to it."""

    where: str
    prompt: str
    answers: list[tuple[str, str]] = field(default_factory=list)
    """Whose, and the text."""
    shaded: list[Shaded] = field(default_factory=list)


def evaluated_samples(run: RunRecord) -> list[Sample]:
    """Those of `kdtrain evaluate`."""
    samples = run.evaluation.get("samples")
    found = [one for one in samples if isinstance(one, dict)] if isinstance(samples, list) else []
    return [_evaluated(one) for one in found[:_MOST_SAMPLES]]


def _evaluated(sample: dict[str, Any]) -> Sample:
    answers = sample.get("answers")
    answers = answers if isinstance(answers, dict) else {}
    listed = [
        ("in the data", sample.get("reference")),
        *((title, answers.get(name)) for name, title in _MODELS.items()),
    ]
    shaded = [
        _shaded("The data's answer, by KL(T‖S) of the student after training", sample.get("reference_tokens")),
        _shaded("The student's own answer, by KL(S‖T)", sample.get("after_tokens")),
    ]
    return Sample(
        where=printable(_place(str(sample.get("where") or ""))),
        prompt=printable(str(sample.get("prompt") or "").rstrip(), from_end=True),
        answers=[(whose, printable(text)) for whose, text in listed if isinstance(text, str)],
        shaded=[one for one in shaded if one is not None],
    )


def _place(where: str) -> str:
    return shown_path(Path(where)) if where.startswith("/") else where


def generated_samples(run: RunRecord) -> list[tuple[int, list[Sample]]]:
    """Answers of the first and of the last logged step, step by step, that the student wrote while training."""
    groups = _first_and_last(run.folder / COMPLETIONS)
    tokenizer = _tokenizer(run) if groups else None
    found = []
    for rows in groups:
        chosen = rows[:: -(-len(rows) // _MOST_OF_A_STEP)]
        found.append((int(rows[0]["step"]), [_generated(row, tokenizer) for row in chosen]))
    return found


def _first_and_last(path: Path) -> list[list[dict[str, Any]]]:
    """Rows of the first and the last row group; none where there is no file that can be read."""
    if not path.is_file():
        return []
    try:
        with pq.ParquetFile(path) as file:
            groups = sorted({0, file.num_row_groups - 1} - {-1})
            return [rows for i in groups if (rows := file.read_row_group(i).to_pylist())]
    except (pa.ArrowException, OSError) as error:
        logger.warning("%s cannot be read, and is left out of the report: %s", path, str(error).splitlines()[0])
        return []


def _generated(row: dict[str, Any], tokenizer: Tokenizer | None) -> Sample:
    kls = row.get("token_reverse_kl") or []
    sign = "" if row.get("exact") else "≥ "
    title = f"{row['written_by']}, {row['tokens']} tokens, {'cut' if row['stop_reason'] == 'length' else 'ended'}"
    title += "" if row.get("selected", True) else ", left out by the selection"
    if tokenizer is None or not any(is_number(kl) for kl in kls):
        pieces: list[Any] = [[row["completion"], None]]
    else:
        pieces = [list(piece) for piece in _pieces(tokenizer, row["token_ids"], kls)]
    shaded = _shaded(title, pieces)
    assert shaded is not None
    mean = "" if row["reverse_kl"] is None else f"{sign}{row['reverse_kl']:.3f}"
    shaded = Shaded(shaded.title, shaded.tokens, shaded.left_out, mean)
    return Sample(printable(f"row {row['row']}"), printable(row["prompt"].rstrip(), from_end=True), shaded=[shaded])


def _tokenizer(run: RunRecord) -> Tokenizer | None:
    """The student's, as the run or a checkpoint has saved it, or as it stands in the folder of the model."""
    folders = [run.folder, *run.folder.glob(f"{CHECKPOINT}*")]
    if isinstance(model := run.option("model.model"), str):
        folders.append(Path(model))
    for folder in folders:
        if (file := folder / "tokenizer.json").is_file():
            try:
                return Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises nothing narrower
                logger.warning("%s cannot be read: %s", file, error)
    return None


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], kls: Sequence[float | None]) -> Iterator[Piece]:
    """Each token's text and divergence; tokens that make up one character are one piece, with their sum."""
    told, waiting, total = "", 0, 0.0
    for i, kl in enumerate(kls[: len(ids)]):
        text = tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
        waiting, total = waiting + 1, total + (kl or 0.0)
        if text.endswith("\ufffd") and waiting < _LONGEST_CHARACTER:
            continue
        yield text[len(told) :], None if kl is None else total
        told, waiting, total = text, 0, 0.0
    if waiting:
        yield tokenizer.decode(list(ids), skip_special_tokens=False)[len(told) :], total


def _shaded(title: str, tokens: Any) -> Shaded | None:
    """[[text, nats], …] as the page shows it; None where there is nothing of the kind."""
    if not isinstance(tokens, list) or not tokens:
        return None
    pieces = [(str(t[0]), t[1] if is_number(t[1]) else None) for t in tokens if isinstance(t, list) and len(t) == 2]
    whole = "".join(text for text, _ in pieces)
    known = [value for _, value in pieces if value is not None]
    mean = f"{sum(known) / len(known):.3f}" if known else ""
    if redact(whole) != whole:  # a secret may stand across tokens
        return Shaded(f"{title} (not shaded: it holds what looks like a secret)", [_plain(whole)], 0, mean)
    if len(pieces) == 1 and not known:
        return Shaded(title, [_plain(whole)], 0, mean)
    shown = [_token(text, value) for text, value in pieces[:_MOST_TOKENS]]
    return Shaded(title, shown, len(pieces) - len(shown), mean)


def _plain(text: str) -> Token:
    return Token(printable(text), -1, "")


def _token(text: str, value: float | None) -> Token:
    shade = -1 if value is None else sum(value >= least for least in SHADES)
    return Token(_visible(text) if text.strip() else text, shade, "" if value is None else f"{value:.2f}")


def printable(value: object, *, from_end: bool = False) -> str:
    """A text without secrets and without characters that do not print, at most so long; of a prompt the end counts."""
    text = _MANY_BREAKS.sub(lambda found: f"⏎ × {len(found[0])}\n", redact(str(value)))
    if len(text) > _LONGEST_TEXT:
        text = f"…{text[-_LONGEST_TEXT:]}" if from_end else f"{text[:_LONGEST_TEXT]}…"
    return _visible(text)


def _visible(text: str) -> str:
    """Line breaks and tabs stay, but where there is nothing else; the rest of what does not print is escaped."""
    if not text.strip():
        return text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)
