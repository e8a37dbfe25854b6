"""How answers that were generated while training look: a table of a few of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtrain.cli.events import timed
from kdtrain.data.errors import show
from kdtrain.trainer.completions import Completion

_SHOWN = 4
_WIDTH = 120  # where the console is no terminal
_NUMBERS = 27  # width of the columns of numbers, with the spaces between all five
_LINES = 3  # of a text, about
_CHARACTERS = 400  # of a text, where programs read it


def some_of(found: Sequence[Completion]) -> Sequence[Completion]:
    """A few, from different prompts as far as there are."""
    return found[:: -(-len(found) // _SHOWN)]


def as_object(found: Sequence[Completion]) -> dict[str, Any]:
    """For programs; whole texts and the tokens are in `completions.parquet`."""
    names = ("row", "sample", "written_by", "stop_reason", "reverse_kl", "selected", "exact")
    samples = [
        {
            **{name: getattr(one, name) for name in names},
            "tokens": len(one.token_ids),
            "prompt": one.prompt[-_CHARACTERS:],
            "completion": one.completion[:_CHARACTERS],
        }
        for one in some_of(found)
    ]
    return timed("completions", step=found[0].step, kept=len(found), samples=samples)


def as_text(found: Sequence[Completion], console: Console) -> str:
    """A table as wide as `console`, without colours."""
    width = console.width if console.is_terminal else _WIDTH
    titles = ["KL(S‖T)", "tokens", "end"]
    if selects := not all(one.selected for one in found):
        titles.append("trains")
    texts = max(width - _NUMBERS - 8 * selects, 12)
    prompt, completion = texts * 2 // 5, texts - texts * 2 // 5
    table = Table(box=None, pad_edge=False)
    for title, columns in (("prompt", prompt), ("completion", completion)):
        table.add_column(title, width=columns, overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    shown = some_of(found)
    for one in shown:
        texts_of = end_of(one.prompt.rstrip(), _LINES * prompt), beginning_of(one.completion, _LINES * completion)
        table.add_row()
        trains = ["yes" if one.selected else "no"] if selects else []
        table.add_row(*map(Text, texts_of), _kl(one), str(len(one.token_ids)), one.stop_reason, *trains)
    text = io.StringIO()
    Console(file=text, width=width, no_color=True).print(table)
    title = f"step {found[0].step}: {len(shown)} of {len(found)} kept answers, written by the {found[0].written_by}"
    return "\n".join([title, *(line.rstrip() for line in text.getvalue().splitlines())])


def _kl(one: Completion) -> str:
    """Nats per token; of a teacher that is known by its top k a lower bound."""
    value = one.reverse_kl
    return "–" if value is None else f"{'' if one.exact else '≥'}{value:.3f}"


def end_of(text: str, cells: int) -> str:
    """The end of a text in one line that is at most so wide and safe to print."""
    kept = _one_line(text[-cells:])
    if len(text) <= cells and cell_len(kept) <= cells:
        return kept
    while cell_len(kept) > cells - 1:
        kept = kept[1:]
    return f"…{kept}"


def beginning_of(text: str, cells: int) -> str:
    """The same of its beginning."""
    kept = _one_line(text[:cells])
    if len(text) <= cells and cell_len(kept) <= cells:
        return kept
    while cell_len(kept) > cells - 1:
        kept = kept[:-1]
    return f"{kept}…"


def _one_line(text: str) -> str:
    return show(text.replace("\n", "⏎"), limit=len(text))
