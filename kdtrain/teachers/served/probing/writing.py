"""How a server writes answers: whether it says their ids, and whether the log-probabilities beside them are targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdtrain.config.diagnose import Level
from kdtrain.errors import TeacherError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.served.http import ReplyError
from kdtrain.teachers.served.probing.ask import Asker
from kdtrain.teachers.served.probing.figures import sampling_fit
from kdtrain.teachers.served.replies import Scored

_ID = "token_id:"
_IMPOSSIBLE = -9999.0  # vLLM's, where JSON has no infinity
_ANSWER_TOKENS = 32
_FEWEST_DRAWN = 48  # tokens, to say something about how they are drawn
_SAME_TARGETS = 1e-3  # nats
_OTHER_TEMPERATURE = 0.5
_SURE, _CERTAIN = 5.0, 7.0  # standard deviations, of some 200 tokens


@dataclass(frozen=True)
class Writing:
    """How answers are to be asked for."""

    api: str = "completions"
    has_targets: bool = False


def check_writing(asker: Asker, *, scores: bool, writes: bool) -> Writing:
    """Have some answers written at temperature 1, and score them.

    Also where no answers are needed: they show whether the scores are those of the model that writes.
    """
    wanted = asker.teacher.api
    answers = None if wanted == "chat" or not asker.rows else _written(asker, writes=writes)
    if answers is None:
        if writes:
            _check_chat_api(asker)
        return Writing("chat" if writes and wanted != "completions" else "completions")
    if asker.route is None or not any(answer.ids for answer in answers):
        return Writing()
    return Writing(has_targets=_compare_with_scores(asker, [answer for answer in answers if answer.ids]))


def _written(asker: Asker, *, writes: bool) -> list[Answer] | None:
    """Two answers for each row, behind its beginning; None where the server says no ids."""
    prompts = [row.ids[: max(1, len(row.ids) * quarter // 4)] for row in asker.rows for quarter in (1, 2)]
    try:
        return [_answer_to(asker, prompt, seed) for seed, prompt in enumerate(prompts)]
    except TeacherError as error:
        needed = writes and asker.teacher.api == "completions"
        level: Level = "error" if needed else "info"
        hint = "set rlhf.teacher.api: chat" if needed else ""
        asker.say(level, "api", f"The server does not write answers to token ids: {error}", hint)
        return None


def _answer_to(asker: Asker, prompt: tuple[int, ...], seed: int) -> Answer:
    """One answer, in a request of its own: those that share a seed are drawn alike, and count as fewer."""
    payload = {**_payload(asker, [prompt]), "seed": seed}
    (answer,) = asker.post("/completions", payload, lambda reply: _read_answers(reply, [prompt]))
    return answer


def _check_chat_api(asker: Asker) -> None:
    payload = {"model": asker.teacher.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        asker.post("/chat/completions", payload, _has_choices)
        asker.say("info", "api", "Answers are asked for as chats (/chat/completions)")
    except TeacherError as error:
        asker.say("error", "base_url", f"The server writes no answers to chats either: {error}")


def _has_choices(reply: Any) -> None:
    if not (isinstance(reply, dict) and isinstance(reply.get("choices"), list) and reply["choices"]):
        raise ReplyError("it has no choices")


def _compare_with_scores(asker: Asker, answers: Sequence[Answer]) -> bool:
    """Whether answers come with their targets."""
    rows = [
        Scored((*one.prompt, *one.ids), tuple(range(len(one.prompt), len(one.prompt) + len(one.ids))))
        for one in answers
    ]
    try:
        scored = asker.score(rows)
    except TeacherError as error:
        asker.say("error", "base_url", f"The server does not score what it has written: {error}")
        return False
    _judge_drawing(asker, answers, scored)
    apart = _targets_apart(answers, scored)
    why: str | None
    if apart is None:
        why = "it gives no log-probabilities by ids beside them"
    elif apart > _SAME_TARGETS:
        why = f"the log-probabilities beside an answer differ by {apart:.2g} nats from its score"
    elif (why := _moved_by_temperature(asker, answers, scored)) is None:
        text = f"Answers come with their targets (they differ by {apart:.1g} nats from the scores)"
        asker.say("info", "base_url", text)
        return True
    asker.say("info", "base_url", f"Answers are scored in a second request: {why}")
    return False


def _moved_by_temperature(asker: Asker, answers: Sequence[Answer], scored: Sequence[TopKLogprobs]) -> str | None:
    """Why the log-probabilities beside answers are no targets, although they are at temperature 1; None: they are.

    A run has answers written at its own temperature. What the first token of an answer is drawn by depends on the
    prompt alone, so that the score which is known already tells it.
    """
    prompts = [answer.prompt for answer in answers]
    payload = {**_payload(asker, prompts), "temperature": _OTHER_TEMPERATURE, "max_tokens": 1}
    try:
        again = asker.post("/completions", payload, lambda reply: _read_answers(reply, prompts))
    except TeacherError as error:
        return f"it does not write them at another temperature: {error}"
    apart = _targets_apart(again, scored)
    if apart is not None and apart <= _SAME_TARGETS:
        return None
    return "the log-probabilities beside an answer change with the temperature that it is written at"


def _judge_drawing(asker: Asker, answers: Sequence[Answer], scored: Sequence[TopKLogprobs]) -> None:
    """Are the scores the distribution that the answers were drawn from?"""
    together = TopKLogprobs(torch.cat([one.indices for one in scored]), torch.cat([one.logprobs for one in scored]))
    fit = sampling_fit(together, [token for answer in answers for token in answer.ids])
    if fit.tokens < _FEWEST_DRAWN:
        message = f"Whether it applies a temperature of its own is not known: it wrote {fit.tokens} tokens only"
        asker.say("info", "base_url", message)
    elif abs(fit.z) <= _SURE:
        message = (
            f"What it writes at temperature 1 fits its log-probabilities ({fit.tokens} tokens, {fit.z:+.1f} sigma)"
        )
        asker.say("info", "base_url", message)
    else:
        # Other servers than vLLM may draw through filters that nobody can switch off: then the scores are right.
        certain = asker.route == "prompt_logprobs" and abs(fit.z) > _CERTAIN
        message = (
            f"The server does not draw by the log-probabilities that it reports: {fit.tokens} tokens, written at "
            f"temperature 1, come from something {'flatter' if fit.z > 0 else 'sharper'} ({abs(fit.z):.0f} standard "
            "deviations)"
        )
        hint = (
            "it applies a temperature or a filter of its own: start vLLM with --logprobs-mode raw_logprobs, and with "
            "--generation-config vllm"
        )
        asker.say("error" if certain else "warning", "base_url", message, hint)


@dataclass(frozen=True)
class Answer:
    """What was written behind a prompt."""

    prompt: tuple[int, ...]
    ids: list[int]
    logprobs: list[dict[int, float]] | None
    """Of each token, by id; None where the server gives none by ids."""


def _payload(asker: Asker, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The body of `POST /completions` that has answers written by the model's own distribution, and by nothing else.

    vLLM takes what it is not told from the model's generation_config.json: top_k: 20 and the like.
    """
    filters = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0} if asker.route != "echo" else {}
    return {
        "model": asker.teacher.model,
        "prompt": [list(prompt) for prompt in prompts],
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
        "logprobs": asker.top_k,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **filters,
    }


def _read_answers(reply: Any, prompts: Sequence[tuple[int, ...]]) -> list[Answer]:
    """The answers in the order of their prompts."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != len(prompts):
        raise ReplyError("it does not have a choice for each prompt")
    by_number = {choice.get("index"): choice for choice in choices if isinstance(choice, dict)}
    if by_number.keys() != set(range(len(prompts))):
        raise ReplyError("its choices are not numbered in order, each once")
    return [_answer(by_number[number], prompt) for number, prompt in enumerate(prompts)]


def _answer(choice: dict[str, Any], prompt: tuple[int, ...]) -> Answer:
    logprobs = choice.get("logprobs") or {}
    ids = choice.get("token_ids")
    if ids is None:
        ids = [_id(token) for token in logprobs.get("tokens") or ()]
    if (not ids and choice.get("text")) or not all(type(token) is int for token in ids):
        raise ReplyError("it does not say the ids of what was written")
    tops = logprobs.get("top_logprobs")
    by_id = [{_id(name): value for name, value in top.items()} for top in tops or () if isinstance(top, dict)]
    complete = len(by_id) == len(ids) and all(None not in top for top in by_id)
    return Answer(prompt, list(ids), by_id if complete else None)  # type: ignore[arg-type]


def _id(token: Any) -> int | None:
    name = str(token).removeprefix(_ID)
    return int(name) if str(token).startswith(_ID) and name.isdecimal() else None


def _targets_apart(answers: Sequence[Answer], scored: Sequence[TopKLogprobs]) -> float | None:
    """How far the log-probabilities beside answers are from their scores, in nats; None where there are none."""
    apart = 0.0
    for answer, targets in zip(answers, scored, strict=True):
        if answer.logprobs is None:
            return None
        for place, named in enumerate(answer.logprobs):
            apart = max(apart, _apart(named, targets.indices[place].tolist(), targets.logprobs[place].tolist()))
    return apart


def _apart(named: dict[int, float], ids: Sequence[int], logprobs: Sequence[float]) -> float:
    """Of one token. One that only the score names must be as unlikely as the least likely that was named."""
    if any(value is None or math.isnan(value) for value in named.values()):
        return math.inf
    least = min(named.values(), default=-math.inf)
    gaps = [0.0]
    for token, logprob in zip(ids, logprobs, strict=True):
        if token < 0 or named.get(token, 0.0) <= _IMPOSSIBLE:
            continue
        gaps.append(abs(named[token] - logprob) if token in named else max(0.0, logprob - least))
    return max(gaps)
