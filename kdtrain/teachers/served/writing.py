"""Answers that a server writes by `POST /completions`: token ids in, token ids out, one request for each.

A server has sampling settings of its own (vLLM takes those of the model's generation config), so that all of them are
sent. vLLM's ids have the token that ends the answer as the last one, whatever `include_stop_str_in_output` says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from kdtrain.errors import TeacherError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.base import Prompt, Sampling, Written
from kdtrain.teachers.served.http import Counts, ReplyError, Servers, count_tokens
from kdtrain.teachers.served.replies import Scored, read_scores

T = TypeVar("T")

Each = Callable[[int, Written], None]
"""Called with the number of a prompt and its answer as soon as that is there, in the thread of the event loop."""

# Every sampler of the servers that are known, switched off.
_PLAIN_SAMPLING = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_ID = "token_id:"  # in front of the ids that stand where texts of tokens would
_SCORES = ("tokens", "token_logprobs", "top_logprobs")
SEEDS = 2**31  # some servers keep 32 bits


class Budget:
    """How many requests for answers may be sent, and what those that were have cost.

    Args:
        most: in this process; None is no limit.
    """

    def __init__(self, most: int | None) -> None:
        self.most, self.spent = most, Counts()

    def take(self) -> None:
        """Count one that is about to be sent.

        Raises:
            TeacherError: it would be one too many.
        """
        if self.most is not None and self.spent.requests >= self.most:
            raise TeacherError(
                f"rlhf.teacher.max_requests: {self.spent.requests} requests for answers were sent by this process, and "
                "no more may be. The answers that came are kept: raise max_requests, or go on with --resume auto."
            )
        self.spent.requests += 1

    def reading(self, read: Callable[[Any], T]) -> Callable[[Any], T]:
        """`read`, which also counts the tokens of the replies that it gets, usable or not: they are paid for."""

        def counted(reply: Any) -> T:
            count_tokens(self.spent, reply)
            return read(reply)

        return counted


async def answers(
    prompts: Sequence[Prompt], ask: Callable[[Prompt], Awaitable[Written]], slots: int, each: Each | None
) -> list[Written]:
    """An answer for every prompt, `slots` of them asked for at a time.

    `each` is done with an answer before the next one is asked for in its slot. Where one fails, those that were asked
    for already are waited for, since they are paid for; no other is asked for.
    """
    written: dict[int, Written] = {}
    failures: list[Exception] = []
    waiting = iter(range(len(prompts)))

    async def slot() -> None:
        for i in waiting:
            try:
                written[i] = await ask(prompts[i])
                if each is not None:
                    each(i, written[i])
            except Exception as error:  # whatever it is, it is raised below
                failures.append(error)
            if failures:
                return

    await asyncio.gather(*(slot() for _ in range(min(slots, len(prompts)))))
    if failures:
        raise failures[0]
    return [written[i] for i in range(len(prompts))]


async def write_completion(
    servers: Servers,
    model: str,
    prompt: Prompt,
    sampling: Sampling,
    *,
    vocab_size: int,
    logprobs: int = 0,
    keep: Callable[[Any, list[int]], None] = lambda reply, ids: None,
    budget: Budget,
) -> Written:
    """One answer.

    Args:
        model: its name there.
        vocab_size: an answer with other ids is refused.
        logprobs: how many of the most likely tokens come with each token of the answer.
        keep: called with the reply and the answer's ids; may raise `ReplyError` like anything that reads a reply.
        budget: what the request is taken from.

    Raises:
        TeacherError: no usable answer.
    """

    def read(reply: Any) -> Written:
        written = read_completion(reply, prompt.ids, sampling, vocab_size)
        keep(reply, written.ids)
        return written

    payload = completion_payload(model, prompt, sampling, logprobs)
    return await servers.post("/completions", payload, budget.reading(read), before=budget.take)


def completion_payload(model: str, prompt: Prompt, sampling: Sampling, logprobs: int) -> dict[str, Any]:
    """The body of the request for one answer."""
    return {
        "model": model,
        "prompt": list(prompt.ids),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature or 0.0,
        "seed": prompt.seed % SEEDS,
        **_PLAIN_SAMPLING,
        "stop_token_ids": list(sampling.stop_ids),
        **({"logit_bias": {str(i): -100 for i in sampling.forbidden_ids}} if sampling.forbidden_ids else {}),
        # Newer servers give the ids beside the text, older ones in place of it.
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logprobs": logprobs,
    }


def read_completion(reply: Any, prompt: Sequence[int], sampling: Sampling, vocab_size: int) -> Written:
    """The answer in a reply, checked.

    Raises:
        ReplyError: no ids, ids out of range, of another prompt or too many, a stop token before the end, or an end that
            is not what `finish_reason` says.
    """
    choice = only_choice(reply)
    finish = choice.get("finish_reason")
    if finish == "content_filter":
        return Written([], cut=False, refused="the server's content filter refused the answer")
    ids = _answer_ids(choice)
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and list(echoed) != list(prompt):
        raise ReplyError(f"the answer is to another prompt: {len(echoed)} tokens, and {len(prompt)} were sent")
    _check_ids(ids, sampling, vocab_size)
    ended = bool(ids) and (ids[-1] in sampling.stop_ids or ids[-1] == choice.get("stop_reason"))
    if finish == "stop" and not ended:
        last = f"its last token is {ids[-1]}" if ids else "it has no token"
        raise ReplyError(
            f"the answer ended (finish_reason: stop), and {last}, which is none of {list(sampling.stop_ids)}: the "
            "server leaves out the token that ends an answer, or ends answers with one that the student's tokenizer "
            "and generation config do not name"
        )
    if finish not in ("stop", "length"):
        raise unknown_end(finish)
    return Written(ids, cut=not ended)


def read_answer_scores(
    reply: Any, prompt: Sequence[int], answer: Sequence[int], top_k: int, vocab_size: int
) -> TopKLogprobs:
    """The targets of an answer's tokens, from the reply that has it; see `read_scores`.

    At temperature 1 whatever the sampling temperature: such are the log-probabilities of servers that are asked so.
    """
    scores = only_choice(reply).get("logprobs")
    if not isinstance(scores, dict) or not all(isinstance(scores.get(name), list) for name in _SCORES):
        raise ReplyError("the answer came without the log-probabilities that were asked for")
    # As an echo of the last token of the prompt and the answer.
    before = {"tokens": f"{_ID}{prompt[-1]}", "token_logprobs": None, "top_logprobs": None}
    echo = {"index": 0, "logprobs": {name: [before[name], *scores[name]] for name in _SCORES}}
    row = Scored((prompt[-1], *answer), tuple(range(1, len(answer) + 1)))
    return read_scores("echo", {"choices": [echo]}, [row], top_k, vocab_size)[0]


def unknown_end(finish: Any) -> ReplyError:
    """An error about a `finish_reason`; whole or not at all, for a key that is cut is not recognised as one."""
    shown = repr(finish)
    return ReplyError(f"finish_reason is {shown if len(shown) <= 40 else 'a long text'}, neither stop nor length")


def only_choice(reply: Any) -> dict[str, Any]:
    """The one choice of a reply."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        found = f"{len(choices)} choices" if isinstance(choices, list) else "no list of choices"
        raise ReplyError(f"the reply has {found} where one answer was asked for")
    return choices[0]


def _answer_ids(choice: dict[str, Any]) -> list[int]:
    """The answer's ids, from wherever the server has them; where it has them twice, they must be the same."""
    given, tokens = choice.get("token_ids"), (choice.get("logprobs") or {}).get("tokens")
    named = _named_ids(tokens)
    if given is None and named is None:
        raise ReplyError(
            "the reply has no token ids (neither token_ids nor tokens such as token_id:17): this server cannot write "
            "answers by /completions. Use a vLLM server, or rlhf.teacher.api: chat"
        )
    if given is not None and named is not None and list(given) != named:
        raise ReplyError("token_ids and the tokens of logprobs differ")
    ids = named if given is None else list(given)
    if not all(isinstance(i, int) for i in ids or ()):
        raise ReplyError("token_ids has something that is no id")
    return ids or []


def _named_ids(tokens: Any) -> list[int] | None:
    if not isinstance(tokens, list) or not all(isinstance(one, str) and one.startswith(_ID) for one in tokens):
        return None
    try:
        return [int(one.removeprefix(_ID)) for one in tokens]
    except ValueError:
        return None


def _check_ids(ids: Sequence[int], sampling: Sampling, vocab_size: int) -> None:
    if len(ids) > sampling.max_new_tokens:
        raise ReplyError(f"the answer has {len(ids)} tokens, and {sampling.max_new_tokens} were asked for at most")
    for at, one in enumerate(ids):
        if not 0 <= one < vocab_size:
            raise ReplyError(f"token {at} of the answer is {one}, and the student knows 0 to {vocab_size - 1}")
        if one in sampling.forbidden_ids:
            raise ReplyError(f"token {at} of the answer is {one}, which stands for an image: no answer can have it")
        if one in sampling.stop_ids and at < len(ids) - 1:
            raise ReplyError(
                f"token {at} of the answer's {len(ids)} is {one}, which ends an answer: the server does not follow "
                "stop_token_ids"
            )
