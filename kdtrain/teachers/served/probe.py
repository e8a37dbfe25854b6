"""What a server really does, found out with a few requests before anything is trained on its answers.

Each reply is also read as in a run, which refuses wrong ids, counts and ranks, NaN, and mass above 1 (`replies.py`).

| asked | what it shows |
|---|---|
| the models, of each server | whether it is there, the key, the name |
| one row, by `prompt_logprobs`, else by `echo` | whether given tokens are scored, by ids, and with how many at each |
| three rows together, in another order, and the first again | answers that get mixed up, or change |
| the row with one token changed | targets off by one; a cache that answers for another row |
| the row, asked for at another temperature | whether the server applies it; in a run it is asked at 1 |
| the row, of each further server | another model |
| a text | another tokenizer |
| answers, written at temperature 1, and their scores | whether an answer has ids, and comes with its targets |
| their first tokens, written at another temperature | whether what comes with an answer is at temperature 1 then too |
| a chat | another template, or end of turn |
| a row with its image, and with a blank one | whether the image is seen |

A temperature that the server applies on its own to what it reports shows in its answers: they are not drawn by these
log-probabilities. One that it applies to both cannot be found out: such a server is another model, a consistent one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdtrain.config.tree import Problem
from kdtrain.errors import TeacherError
from kdtrain.teachers.served.images import ImageRow
from kdtrain.teachers.served.probing.ask import Asker, ProbeOver, is_not_there
from kdtrain.teachers.served.probing.images import check_images
from kdtrain.teachers.served.probing.scores import Fingerprint, Speed, compare_answers, compare_servers, find_route
from kdtrain.teachers.served.probing.text import check_chats, check_tokenizer
from kdtrain.teachers.served.probing.writing import Writing, check_writing
from kdtrain.teachers.served.replies import Route, Scored
from kdtrain.teachers.served.teacher import ServedTeacher

_MOST_TOKENS = 96  # of a row that is asked about


@dataclass(frozen=True)
class ProbeResult:
    """What was found out."""

    findings: list[Problem]
    """Errors, warnings, and level "info" for what is as it should be."""
    route: Route | None = None
    """How tokens are scored; None where the server cannot."""
    api: str = "completions"
    """`completions` or `chat`: how answers are written."""
    writes_targets: bool = False
    """Whether an answer comes with its targets."""
    tokens_per_second: float = 0.0
    """Of rows that are scored, three in one request and nothing beside it."""
    fingerprint: Fingerprint | None = None
    """What the server is asked again when a connection to it is opened anew; None where tokens are not scored."""


def probe(
    teacher: ServedTeacher,
    rows: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    scores: bool,
    writes: bool = False,
    tokens: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    teacher_tokenizer: Any = None,
    image_row: ImageRow | None = None,
) -> ProbeResult:
    """Ask the server for what is known already, and compare; 19 requests, and two for each further server.

    Args:
        rows: token ids of three rows or so of the user's data, as the teacher reads them.
        tokenizer: the one they were encoded with.
        scores: whether targets are needed.
        writes: whether answers are needed.
        tokens: of all rows that a run will ask about, for the time that this takes.
        chat_template_kwargs: as conversations are rendered for the teacher.
        teacher_tokenizer: what the config names as the teacher's, for a server that renders no chats.
        image_row: a row with images, where the data have one.
    """
    asker = Asker(teacher, _short(rows), tokenizer, min(teacher.top_k, teacher.vocab_size))
    speed, fingerprint, writing = Speed(), None, Writing()
    try:
        _check_models(asker)
        first = find_route(asker, needed=scores)
        if first is not None:
            speed = compare_answers(asker, first)
            compare_servers(asker, first)
            assert asker.route is not None
            fingerprint = Fingerprint(asker.rows[0], first, asker.route, asker.top_k, asker.tolerance)
        check_tokenizer(asker)
        writing = check_writing(asker, scores=scores, writes=writes)
        check_chats(asker, chat_template_kwargs or {}, teacher_tokenizer)
        if image_row is not None and scores:
            check_images(asker, image_row)
        _estimate(asker, speed, tokens)
    except ProbeOver:
        pass
    speed_found = speed.tokens_per_second
    return ProbeResult(asker.findings, asker.route, writing.api, writing.has_targets, speed_found, fingerprint)


def _short(rows: Sequence[Sequence[int]]) -> list[Scored]:
    """Different rows, cut, the longest first."""
    cut = dict.fromkeys(tuple(map(int, row[:_MOST_TOKENS])) for row in rows if len(row) > 1)
    return [Scored(row, tuple(range(1, len(row)))) for row in sorted(cut, key=len, reverse=True)[:3]]


def _check_models(asker: Asker) -> None:
    """Is anybody there, and is the model one of theirs? Not every server has such a list."""
    servers = asker.teacher.servers
    for url in servers.urls:
        try:
            names = servers.run(servers.get("/models", _names, server=url))
        except TeacherError as error:
            if is_not_there(error):
                continue
            asker.say("error", "base_url", str(error).removesuffix("."))
            raise ProbeOver from None
        if names and asker.teacher.model not in names:
            shown = ", ".join(servers.hide(name)[:80] for name in names[:5])
            asker.say("error", "model", f"{url} has no model named {asker.teacher.model}. It has: {shown}")
            raise ProbeOver


def _names(reply: Any) -> list[str]:
    data = reply.get("data") if isinstance(reply, dict) else None
    return [str(one.get("id")) for one in data if isinstance(one, dict)] if isinstance(data, list) else []


def _estimate(asker: Asker, speed: Speed, tokens: int | None) -> None:
    """How long a run waits for the server, at most."""
    if not speed.tokens_per_second:
        return
    text = f"It answers for a row in {1000 * speed.latency:,.0f} ms, and scores {speed.tokens_per_second:,.0f} tokens/s"
    if tokens is not None:
        took = _duration(tokens / speed.tokens_per_second)
        text += f" one request at a time: {took} at most for the {tokens:,} tokens of this run; they run side by side"
    asker.say("info", "base_url", text)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
