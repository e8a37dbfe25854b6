"""What a server answers when it is asked for the log-probabilities of given tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kdtrain.errors import TeacherError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.dependence import Dependence, dependence_of_row
from kdtrain.teachers.served.probing.ask import Asker, ProbeOver
from kdtrain.teachers.served.probing.figures import difference
from kdtrain.teachers.served.replies import Route, Scored, read_scores, scoring_payload
from kdtrain.teachers.served.teacher import ServedTeacher

_ROUTES: tuple[Route, ...] = ("prompt_logprobs", "echo")
_LIMIT = re.compile(r"(?:max(?:imum)?(?: allowed)?|at most|up to)\D{0,20}(\d+)", re.IGNORECASE)
_GUESSES = (20, 5, 1)  # limits of vLLM and of OpenAI, where a refusal names none
_BETWEEN = "is anything between kdtrain and the server?"
_DEPENDS: dict[Dependence | None, str] = {
    "before": "are those of the token before: they do not depend on the token right before the one they are for",
    "after": "are those of the token after, or of another row: they depend on the token that they predict",
    None: "do not depend on the tokens that were sent: they come from a cache, or are those of another row",
}


def find_route(asker: Asker, *, needed: bool) -> TopKLogprobs | None:
    """Score one row by the first way that the server knows; its targets."""
    reasons: dict[str, list[str]] = {}
    for route in _ROUTES if asker.rows else ():
        asker.route = route
        try:
            targets = _within_limit(asker, needed)
        except TeacherError as error:
            reasons.setdefault(str(error).removesuffix("."), []).append(f"by {route}")
            continue
        mass = float(targets.logprobs.double().exp().sum(-1).mean())
        how = f"the {asker.top_k} most likely at each have {mass:.0%} of the probability in the mean"
        asker.say("info", "base_url", f"Tokens are scored by {route}, as ids; {how}")
        return targets
    asker.route = None
    if needed:
        why = [f"{' and '.join(ways).capitalize()}: {reason}" for reason, ways in reasons.items()]
        message = ". ".join(["The server gives no usable log-probabilities of given tokens", *why])
        hint = "use a vLLM server; or set rlhf.llm_kd_weight: 0, and let this one write answers (answers: teacher)"
        asker.say("error", "base_url", message, hint)
    return None


def _within_limit(asker: Asker, needed: bool) -> TopKLogprobs:
    """Targets of the first row with as many tokens as were asked for, or as the server gives."""
    wanted = asker.top_k
    try:
        return asker.score(asker.rows[:1])[0]
    except TeacherError as error:
        limits, refusal = _limits(str(error), wanted), error
    for limit in limits:
        asker.top_k = limit
        try:
            targets = asker.score(asker.rows[:1])[0]
        except TeacherError:
            continue
        message = f"The server gives at most {limit} tokens at a position, and {wanted} are asked for: {refusal}"
        hint = f"start it with --max-logprobs {wanted}, or set rlhf.teacher.top_k: {limit}"
        asker.say("error" if needed else "info", "top_k", message, hint)
        return targets
    asker.top_k = wanted
    raise refusal


def _limits(message: str, wanted: int) -> list[int]:
    """Values of k to try: the one that a refusal names, as vLLM's `… is greater than max allowed: 20`."""
    if "logprobs" not in message and "most likely" not in message:
        return []
    named = [int(number) for number in _LIMIT.findall(message) if 0 < int(number) < wanted]
    return named[:1] or [guess for guess in _GUESSES if guess < wanted]


class Speed(NamedTuple):
    """How fast rows are scored, one request at a time."""

    tokens_per_second: float = 0.0
    latency: float = 0.0
    """Seconds for a request with one row."""


def compare_answers(asker: Asker, first: TopKLogprobs) -> Speed:
    """The same row in other company, with one token changed, at another temperature and again."""
    row = asker.rows[0]
    try:
        begun = time.perf_counter()
        together = asker.score(asker.rows)
        seconds = time.perf_counter() - begun
        reversed_ = asker.score(asker.rows[::-1])[::-1]
        changed = _with_one_changed(asker, row, first)
        tempered = asker.score([row], temperature=0.5)[0]
        begun = time.perf_counter()
        again = asker.score([row])[0]
        latency = time.perf_counter() - begun
    except TeacherError as error:
        asker.say("error", "base_url", f"The server answers for one row, and not for others: {error}")
        raise ProbeOver from None
    asker.noise = difference(first, again)
    mixed = max(difference(first, together[0]), *map(difference, together, reversed_))
    if asker.noise > asker.tolerance:
        message = f"The same tokens, asked for twice, differ by {asker.noise:.2g} nats"
        hint = "switch off what changes its answers: caches, or several models behind one address"
        asker.say("error", "base_url", message, hint)
    elif mixed > asker.tolerance:
        message = (
            f"The answer for a row changes by {mixed:.2g} nats with the rows that share its request, or their order: "
            "answers get mixed up, or come from a cache that is wrong"
        )
        asker.say("error", "base_url", message, f"start vLLM with --no-enable-prefix-caching; {_BETWEEN}")
    else:
        how = f"differ by {max(asker.noise, mixed):.1g} nats at most"
        asker.say(
            "info", "base_url", f"Answers for the same tokens, alone, together, in another order and again, {how}"
        )
    if changed is not None:
        _judge_change(asker, *changed)
    moved = difference(first, tempered) > asker.tolerance
    what = "changes these log-probabilities; it is asked at 1" if moved else "does not change these log-probabilities"
    asker.say("info", "base_url", f"The temperature of a request {what}")
    return Speed(sum(len(one.ids) for one in asker.rows) / max(seconds, 1e-6), latency)


def _with_one_changed(asker: Asker, row: Scored, first: TopKLogprobs) -> tuple[Dependence | None, float] | None:
    """What depends on a token in the middle, and how far what stands before it is from the first answer.

    Its beginning is that of a row which was asked about before: what a prefix cache keeps.
    """
    middle = len(row.ids) // 2
    other = next((token for token in row.ids if token != row.ids[middle]), None)
    if len(row.ids) < middle + 3 or other is None:
        return None
    second = asker.score([replace(row, ids=(*row.ids[:middle], other, *row.ids[middle + 1 :]))])[0]
    j = middle - 1  # targets begin at the second token
    found = dependence_of_row(first, second, torch.tensor(row.ids[1:]), j, asker.teacher.vocab_size)
    return found, difference(first[: j + 1], second[: j + 1])


def _judge_change(asker: Asker, found: Dependence | None, before: float) -> None:
    if found == "aligned" and before <= asker.tolerance:
        asker.say("info", "base_url", "Log-probabilities depend on the tokens before them, and on no others")
        return
    what = f"change by {before:.2g} nats before that token" if found == "aligned" else _DEPENDS[found]
    message = f"With one token of a row changed, its log-probabilities {what}"
    hint = f"entry t must describe token t, given the tokens before it; try --no-enable-prefix-caching; {_BETWEEN}"
    asker.say("error", "base_url", message, hint)


def compare_servers(asker: Asker, first: TopKLogprobs) -> None:
    """Several servers must run one model."""
    for url in asker.teacher.servers.urls[1:]:
        try:
            apart = difference(first, asker.score(asker.rows[:1], server=url)[0])
        except TeacherError as error:
            asker.say("error", "base_url", f"Another server of the list cannot be used: {error}")
            continue
        if apart > asker.tolerance:
            message = f"{url} answers otherwise than {asker.url}: the same tokens differ by {apart:.2g} nats"
            hint = "all servers of a teacher must run the same model, in the same way"
            asker.say("error", "base_url", message, hint)


@dataclass(frozen=True)
class Fingerprint:
    """A question, and the answer that tells this model from another."""

    row: Scored
    targets: TopKLogprobs
    route: Route
    top_k: int
    tolerance: float
    """Nats."""

    def verifier(self, teacher: ServedTeacher) -> Callable[[str], Awaitable[None]]:
        """For `Servers.verify`."""

        async def verify(server: str) -> None:
            found = await teacher.servers.post(
                "/completions",
                scoring_payload(self.route, teacher.model, [self.row], self.top_k),
                lambda reply: read_scores(self.route, reply, [self.row], self.top_k, teacher.vocab_size)[0],
                server=server,
                verified=False,
            )
            apart = difference(self.targets, found)
            if apart > self.tolerance:
                raise TeacherError(
                    f"{server} answers otherwise than when the run began: the same tokens differ by {apart:.2g} nats. "
                    "It was restarted with another model, or with other settings. Start it as it was."
                )

        return verify
