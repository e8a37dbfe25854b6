"""How `kdtrain preview` looks: text with what the student is trained on highlighted, or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from kdtrain.data.segments import Segment, merged
from kdtrain.runs.preview import BadRow, ShownRow, Split, View

_SUPERVISED, _SPECIAL, _OTHER = "black on green", "cyan", "dim"
# Characters that are shown of consecutive tokens; of supervised ones, which one has come to see, more.
_MOST, _MOST_SUPERVISED = 800, 4000
_MOST_BAD_ROWS = 20


def as_json(splits: Sequence[Split]) -> str:
    """A list with an object per row, one a line, and what is known of all rows as its last element."""
    rows = [_row_object(row) for split in splits for row in split.rows]
    of_all = {
        "bad_rows": [vars(bad) for split in splits for bad in split.bad_rows],
        "notes": [note for split in splits for note in split.report.notes],
        "summaries": {split.name: split.report.summary() for split in splits},
        "first_rows": {split.name: split.first_rows for split in splits},
        "refusals": {split.name: split.refusal for split in splits},
    }
    return "[\n" + ",\n".join(json.dumps(one) for one in [*rows, of_all]) + "\n]\n"


def _row_object(row: ShownRow) -> dict[str, Any]:
    return {
        "where": row.where,
        "split": row.split,
        "kind": row.kind,
        "ce": row.ce,
        "length": row.length,
        "answers": "teacher" if row.answered_by_teacher else "data",
        **({} if row.teacher_name is None else {"teacher_name": row.teacher_name}),
        "images": row.images,
        "notes": row.notes,
        "kd_weight": row.kd_weight,
        "kd_weights": row.kd_weights,
        **_view_object(row.student),
        "teacher": row.teacher and _view_object(row.teacher),
    }


def _view_object(view: View) -> dict[str, Any]:
    parts = [{"text": part.text, "supervised": part.supervised} for part in merged(view.segments)]
    return {
        "input_ids": view.input_ids,
        "labels": view.labels,
        "prompt_length": view.prompt_length,
        "segments": parts,
    }


def as_text(splits: Sequence[Split], console: Console) -> str:
    """For people; in colours where the console has them, otherwise with ⟦ ⟧ around what is supervised."""
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    pages = [Text.assemble(*_page(split, coloured)) for split in splits]
    sign = Text("like this", _SUPERVISED) if coloured else "⟦like this⟧"
    legend = Text.assemble("What the student is trained to write is marked ", sign, ".\n")
    page = Text("\n").join([legend, *pages] if any(split.rows for split in splits) else pages)
    if not coloured:
        return page.plain
    with console.capture() as captured:
        console.print(page, soft_wrap=True, end="")
    return captured.get()


def _page(split: Split, coloured: bool) -> Iterator[Text | str]:
    for row in split.rows:
        yield from _row(row, coloured)
    yield from _summary(split)


def _row(row: ShownRow, coloured: bool) -> Iterator[Text | str]:
    yield Text(f"{_short(row.where)}  {', '.join(_facts(row))}\n", "bold")
    for image in row.images:
        yield Text(f"  image: {_short(image)}\n", _OTHER)
    for note in row.notes:
        yield Text(f"  note: {note}\n", _OTHER)
    yield _indented(_view(row.student, coloured))
    if row.teacher is not None:
        yield Text(f"  the teacher reads {len(row.teacher.input_ids)} tokens:\n", _OTHER)
        yield _indented(_view(row.teacher, coloured))
    yield "\n"


def _facts(row: ShownRow) -> Iterator[str]:
    tokens, prompt = len(row.student.input_ids), row.student.prompt_length
    supervised = sum(part.tokens for part in row.student.segments if part.supervised)
    yield f"{row.split}, {row.kind}"
    yield f"{tokens} tokens" + (f" of {row.length} (truncated)" if row.length > tokens else "")
    if row.answered_by_teacher:
        yield "the teacher writes the answer"
    elif prompt == tokens:
        yield "a prompt without an answer"
    else:
        yield f"{supervised} supervised"
        if prompt:
            yield f"a prompt of {prompt}"
    if row.teacher_name is not None:
        yield f"teacher {row.teacher_name}"
    if not row.ce:
        yield "no cross-entropy"
    if row.kd_weight != 1:
        yield f"kd_weight {row.kd_weight:g}"
    if row.kd_weights is not None:
        yield "kd_weight " + " and ".join(
            f"{weight:g} of {count} tokens" for weight, count in row.weighted_tokens.items()
        )


def _view(view: View, coloured: bool) -> Text:
    out = Text()
    for supervised, parts in groupby(view.segments, key=lambda part: part.supervised):
        text = _shortened(Text.assemble(*map(_part, parts)), _MOST_SUPERVISED if supervised else _MOST)
        if supervised and not coloured and text.plain:
            # The closing mark stands where the text ends, and not on a line of its own.
            broken = text.plain.endswith("\n")
            text = Text.assemble("⟦", text[:-1] if broken else text, "⟧", "\n" if broken else "")
        out.append_text(text)
    return out


def _part(part: Segment) -> Text:
    style = _SUPERVISED if part.supervised else _SPECIAL if part.special else ""
    if part.special and part.tokens > 2:
        once = part.text[: len(part.text) // part.tokens]
        return Text(f"{visible(once)} ×{part.tokens}", style)
    return Text(visible(part.text), style)


def _shortened(text: Text, most: int) -> Text:
    """Without its middle where it is long."""
    left_out = len(text) - most
    if left_out <= 0:
        return text
    return Text.assemble(text[: most // 2], (f" … {left_out:,} characters … ", _OTHER), text[-(most // 2) :])


def visible(text: str) -> str:
    """Line breaks as ⏎ and a break; what would not be seen, or would drive the terminal, as an escape."""
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(shown).replace("\n", "⏎\n")


def _indented(text: Text) -> Text:
    lines = text.split("\n", allow_blank=not text.plain.endswith("\n"))
    return Text.assemble(*(Text.assemble("  ", line, "\n") for line in lines))


def _summary(split: Split) -> Iterator[Text | str]:
    if split.first_rows is not None:
        yield f"{split.name}: only the first {split.first_rows:,} rows of a source were read; --all reads every row\n"
    yield f"{split.name}: {_counts(split)}\n"
    for bad in split.bad_rows[:_MOST_BAD_ROWS]:
        yield f"  {_name(bad)}: {_short(bad.where)}: {bad.reason}\n"
    if len(split.bad_rows) > _MOST_BAD_ROWS:
        yield f"  and {len(split.bad_rows) - _MOST_BAD_ROWS:,} more, which --json lists\n"
    if split.refusal is not None:
        yield Text(f"  kdtrain fit would stop: {_without_places(split.refusal)}\n", "bold")


def _counts(split: Split) -> str:
    """The report's summary without its bad rows, all of which follow."""
    shown = {f"  bad: {bad}" for bad in split.report.first_bad}
    return "\n".join(line for line in split.report.summary().split("\n") if line not in shown)


def _without_places(message: str) -> str:
    """What an error says beside its list of the first rows: all of them were listed."""
    lines = [line for line in message.split("\n") if not line.startswith("  ")]
    return " ".join(lines).replace(" The first:", "")


def _name(bad: BadRow) -> str:
    return {"bad": "bad", "long": "too long", "dropped": "dropped"}[bad.status]


def _short(place: str) -> str:
    """A file below the current folder by its relative path."""
    return place.removeprefix(os.getcwd() + os.sep)
