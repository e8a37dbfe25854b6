"""The columns that rows may have: which are read together, how they are renamed, and what is said of the others.

A column that means something for training and is not read is never lost without a word: it is a note, or a bad row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdtrain.data.errors import RowError, show, type_name
from kdtrain.data.kd_weights import WEIGHT
from kdtrain.data.parts import AUDIO_COLUMNS, VIDEO_COLUMNS
from kdtrain.data.turns import blank

# In this order: the first one that is present and not null says what kind of row it is. `messages` goes first because
# published chat sets (ultrachat_200k) repeat the first user turn in a `prompt` column; `text` goes last because it is
# often what somebody rendered from the others.
ROW_COLUMNS = ("messages", "conversations", "prompt", "instruction", "query", "text")
IMAGE_COLUMNS = ("images", "image")
# Where an image is under another name. Of these a web address is the poorest: it stands for the image's origin beside
# one that is there.
PATH_COLUMNS = ("image_path", "image_paths", "file_name", "file_names", "image_url", "image_urls")
BOX_COLUMN = "objects"  # of ms-swift
# Refused or noted by their name alone: videos and sounds are never decoded.
UNREAD_MEDIA = (*VIDEO_COLUMNS, *AUDIO_COLUMNS, BOX_COLUMN)
# What stands beside a conversation and is written by its chat template.
CONTEXT_COLUMNS = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs")
READ_WITH = {
    "messages": CONTEXT_COLUMNS,
    "conversations": CONTEXT_COLUMNS,
    "prompt": ("completion", *CONTEXT_COLUMNS),
    "instruction": ("input", "context", "output", "response", "history", *CONTEXT_COLUMNS),
    "query": ("response", "history", *CONTEXT_COLUMNS),
    "text": (),
}
KNOWN_COLUMNS = tuple(dict.fromkeys([*ROW_COLUMNS, *(c for read in READ_WITH.values() for c in read), *IMAGE_COLUMNS]))
# What a pair or a question loses if a mapping leaves it out.
_QUESTION_COLUMNS = ("instruction", "input", "context", "history")
_OPTIONAL = frozenset((*CONTEXT_COLUMNS, *_QUESTION_COLUMNS, *IMAGE_COLUMNS, "teacher")) - {"instruction"}
_ANSWER_COLUMN = {"prompt": "completion", "instruction": "output", "query": "response"}
# What a sample of the student is checked against, where the run asks for that.
ANSWER_COLUMN = "answer"
# Which of several teachers answers for the row, where the run has several.
ROUTE_COLUMN = "teacher"
_CHECKS = (ANSWER_COLUMN, "answers", "solution")
_ANSWERS = ("answer", "solution", "completion", "output", "response", "chosen", "label")
_PREFERENCES = ("label", "kto_tag", "chosen", "rejected", "rejected_response", "rejected_messages")
# Columns that are not read anywhere and whose names say that they are meant for training: the thoughts behind an
# answer, another answer, boxes in an image, retrieved documents, what is trained on. Not names such as source or score.
_MEANT = (
    *("reasoning", "reasoning_content", "thinking", "documents", *_CHECKS),
    *("weight", "loss", "loss_mask", "train", *_PREFERENCES),
)
NAMED_COLUMNS = (*KNOWN_COLUMNS, WEIGHT, *_MEANT)
_NAMED = frozenset(NAMED_COLUMNS) - {*IMAGE_COLUMNS, WEIGHT}  # every kind of row has a weight


def renamed(columns: Mapping[str, str | None] | None) -> dict[str, str]:
    """A mapping without the columns that it says are not read (`{input: null}`)."""
    return {canonical: name for canonical, name in (columns or {}).items() if name is not None}


def wanted_columns(columns: Mapping[str, str | None] | None) -> set[str]:
    """The columns of a table that are read, or looked at to say that they are not; without those of `unread_media`."""
    mapped = renamed(columns)
    if not mapped:
        return {*NAMED_COLUMNS, *PATH_COLUMNS, ROUTE_COLUMN}
    return {*mapped.values(), *_carried(columns or {}), *_watched(mapped)} - {*unread_media(columns)}


def unread_media(columns: Mapping[str, str | None] | None) -> list[str]:
    """The columns of videos, sounds and boxes that the mapping says nothing of."""
    return [name for name in UNREAD_MEDIA if name not in _settled(columns or {})]


def row_columns(columns: Mapping[str, str | None] | None) -> set[str]:
    """The columns of a file of which a row needs one."""
    mapped = renamed(columns)
    return {mapped[column] for column in ROW_COLUMNS if column in mapped} if mapped else set(ROW_COLUMNS)


def parse_json(text: str, columns: Mapping[str, str | None] | None, apart: str | None = None) -> dict[str, Any]:
    """A raw row's JSON text as columns under their canonical names.

    apart: a column that keeps its name and is nothing else, whatever it is called: that of the teacher's prefix.
    """
    try:
        row = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise RowError(f"invalid JSON: {show(str(error))}") from None
    except RecursionError:
        raise RowError("invalid JSON: nested too deeply") from None
    if isinstance(row, list) and row and isinstance(row[0], dict) and {"role", "from"} & row[0].keys():
        raise RowError('a list of messages: write it as an object with a column, {"messages": [...]}')
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object with columns, found {show(text, 40)}")
    own = {apart: row.pop(apart)} if apart in row else {}
    return {**(_mapped(row, columns) if columns else row), **own}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that says each key once: of several, json would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RowError(f"the key {show(next(name for name in found if names.count(name) > 1), 40)} stands there twice")
    return found


def _mapped(row: dict[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    mapped = renamed(columns)
    if not mapped:
        return {name: value for name, value in row.items() if name not in columns}
    # Columns that are not mapped are not read: one may happen to have a canonical name and mean something else.
    if missing := [name for canonical, name in mapped.items() if name not in row and canonical not in _OPTIONAL]:
        raise RowError(f"no column {', '.join(show(name, 40) for name in dict.fromkeys(missing))}")
    settled = {*mapped.values(), *(c for c, name in columns.items() if name is None or name in row)}
    for name in _watched(mapped):
        if name not in settled and not _empty(row.get(name)):
            raise RowError(_would_be_lost(name, row, mapped))
    found = {canonical: row.get(name) for canonical, name in mapped.items()}
    return {**found, **{name: row[name] for name in _carried(columns) if name in row}}


def _carried(columns: Mapping[str, str | None]) -> list[str]:
    """The columns that are the exception: without them a row would be trained on as text that speaks of what is not
    there. A mapping that says which column the images are means that one alone.
    """
    images = () if not renamed(columns).keys().isdisjoint(IMAGE_COLUMNS) else (*IMAGE_COLUMNS, *PATH_COLUMNS)
    return [name for name in (*images, *UNREAD_MEDIA) if name not in _settled(columns)]


def _settled(columns: Mapping[str, str | None]) -> set[str | None]:
    """The names that a mapping speaks of: columns it reads as something, or says are not read."""
    return {*columns, *columns.values()}


def _watched(mapped: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that rows of this kind would lose if they were not mapped."""
    kind = next((column for column in ROW_COLUMNS if column in mapped), None)
    if kind in (None, "text"):
        return () if kind is None else (WEIGHT,)
    of_chat = (WEIGHT, *CONTEXT_COLUMNS)
    return of_chat if kind in ("messages", "conversations") else (*of_chat, *_QUESTION_COLUMNS)


def _would_be_lost(name: str, row: Mapping[str, Any], mapped: Mapping[str, str]) -> str:
    """Says how to map it: beside a prompt that is text, by the layout that becomes a conversation."""
    better = dict(mapped)
    if isinstance(row.get(mapped.get("prompt", "")), str) and name != WEIGHT:
        names = {"prompt": "input" if name == "instruction" else "instruction", "completion": "output"}
        better = {names.get(canonical, canonical): column for canonical, column in mapped.items()}
    return (
        f"the column {name} is not mapped and would be lost: map it (columns: {_yaml({**better, name: name})}), or say "
        f"that it is not to be read (columns: {_yaml({**mapped, name: None})})"
    )


def _yaml(columns: Mapping[str, str | None]) -> str:
    return "{" + ", ".join(f"{c}: {'null' if n is None else show(n, 40)}" for c, n in columns.items()) + "}"


def check_preference(row: Mapping[str, Any], kind: str, has_answer: bool) -> None:
    """Refuses an answer that is marked as bad (KTO), and pairs of a good and a bad one (DPO)."""
    if has_answer and kind != "text":
        for column in ("label", "kto_tag"):
            if row.get(column) is not None and _truth(row[column]) is False:
                raise RowError(
                    f"{column} is false (KTO): its answer is one not to be learnt. Leave such rows out, or say that "
                    f"the column means something else (columns: {{{column}: null}})"
                )
    if not has_answer and not blank(row.get("chosen")) and not blank(row.get("rejected")):
        raise RowError(
            f"chosen and rejected (DPO): preferences are not trained on. Map what is: columns: {{{kind}: {kind}}} for "
            f"the prompts alone{_chosen(row['chosen'], kind)}"
        )


def _chosen(chosen: Any, kind: str) -> str:
    first = chosen[0] if isinstance(chosen, (list, tuple)) else None
    if isinstance(first, Mapping) and first.get("role") in ("user", "system"):
        return ", columns: {messages: chosen} for the chosen answers"
    answer = _ANSWER_COLUMN.get(kind)
    return f", columns: {{{kind}: {kind}, {answer}: chosen}} for the chosen answers" if answer else ""


def read_answer(value: Any) -> str:
    """The text of the column `answer`; a number is as JSON writes it."""
    if _empty(value):
        raise RowError(
            f"no answer in the column {ANSWER_COLUMN}, which rlhf.select_regex compares samples with: name it by "
            f"columns: {{…, {ANSWER_COLUMN}: its name}}, also where that column has another name there already"
        )
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"{ANSWER_COLUMN} is {type_name(value)}, and has to be text or a number (rlhf.select_regex)")
    return str(value)


def optional_answer(value: Any) -> str | None:
    """The same, and None for what is no answer that a text can be compared with."""
    no_answer = _empty(value) or isinstance(value, bool) or not isinstance(value, str | int | float)
    return None if no_answer else str(value)


def _empty(value: Any) -> bool:
    """Says nothing, also as JSON text."""
    return blank(value) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


def _truth(value: Any) -> bool | None:
    """Booleans, also as a CSV file writes them; classes that are numbers or words are none."""
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else None


def unread_columns(row: Mapping[str, Any], kind: str) -> list[str]:
    """The columns that mean something and that a row of this kind does not read."""
    return [column for column in row if column in _NAMED and column != kind and column not in READ_WITH[kind]]


def unread_note(value: Any, column: str, kind: str, text: str, has_answer: bool) -> str:
    """What to say of such a column, if anything; `text` is all that the row does read."""
    # ultrachat's prompt is the first message, a response may be the last one: what the row says anyway is not lost.
    if _empty(value) or (isinstance(value, str) and value.strip() in text):
        return ""
    if column in ("label", "kto_tag") and (has_answer or not isinstance(value, str)):
        good = kind != "text" and has_answer and _truth(value)
        return f"rows whose {column} is true (KTO) are trained on" if good else ""
    if column in _CHECKS and has_answer:
        return ""  # what an answer is checked against
    meant = not has_answer and column in _ANSWERS and isinstance(value, str)
    answer = _ANSWER_COLUMN.get(kind) if meant else None
    mapping = f": columns: {{{kind}: {kind}, {answer}: {column}}} makes it the answer" if answer else ""
    return f"the column {column} is not read beside {kind}{mapping}"
