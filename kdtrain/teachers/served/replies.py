"""What is asked of a server for the log-probabilities of given tokens, and what its reply says, checked.

Shapes: T tokens of a row, S of its positions that predict a supervised token, K tokens known at each, E entries of all
S positions together, V vocabulary.

Servers have two ways to score tokens. vLLM takes `prompt_logprobs`; others take `echo` with `logprobs`. In both, entry
t of a reply describes token t, so that it is the distribution which the tokens before t predict. It has the K most
likely tokens, and beside them the token that was sent, which makes K + 1 entries where that is none of the K.

A reply is taken as a whole or not at all: nothing is padded, cut or guessed. An off-by-one in it would train, and would
only make the student worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.served.http import ReplyError
from kdtrain.teachers.served.reply_parts import Asked, Choice, Entries, Scored, are_numbers, as_floats, is_no_number

__all__ = ["Route", "Scored", "read_scores", "scoring_payload"]

Route = Literal["prompt_logprobs", "echo"]

_ID = "token_id:"  # what vLLM puts before an id where a token's text would stand
_ROUNDING = 1e-6  # of a log-probability
_EXCESS_MASS = 1e-3  # as TopKLogprobs allows
# JSON has no infinity: vLLM sends this for it. As a number it would count as an extremely unlikely token.
_IMPOSSIBLE = -9999.0


def scoring_payload(route: Route, model: str, rows: Sequence[Scored], top_k: int) -> dict[str, Any]:
    """The body of `POST /completions` that scores some rows.

    Args:
        top_k: at most V: asked for more, vLLM's engine dies.
    """
    # At temperature 1, since some servers apply what they are asked to all that they return.
    payload = {"model": model, "prompt": [list(row.ids) for row in rows], "temperature": 1.0}
    if route == "prompt_logprobs":  # vLLM writes one token at least
        return {**payload, "max_tokens": 1, "prompt_logprobs": top_k, "return_token_ids": True}
    return {**payload, "max_tokens": 0, "echo": True, "logprobs": top_k, "return_tokens_as_token_ids": True}


def read_scores(
    route: Route, reply: Any, rows: Sequence[Scored], top_k: int, vocab_size: int, *, actual_alone: bool = False
) -> list[TopKLogprobs]:
    """The k most likely tokens at each asked position of every row, most likely first, equal ones by id.

    min(top_k, V) columns; float32 on the CPU. The actual token is among them only where it is one of the k. A token
    that the server calls impossible is a missing entry (see `TopKLogprobs`). With `actual_alone` the actual token is
    the only column, −inf where it is impossible.

    Raises:
        ReplyError: anything that is not as it must be: choices missing or twice, a position too few or too many, other
            ids than were sent, an actual token without entry, fewer than k entries, an id twice or out of range, NaN,
            a positive log-probability, probabilities that add up to more than 1.
    """
    read = _by_prompt_logprobs if route == "prompt_logprobs" else _by_echo
    entries = [
        read(Choice(number, content, row))
        for number, (content, row) in enumerate(zip(_in_order(reply, len(rows)), rows, strict=True))
    ]
    checked = [(_most_likely(found, min(top_k, vocab_size), vocab_size), found) for found in entries]
    return [_actual(found) if actual_alone else most_likely for most_likely, found in checked]


def _in_order(reply: Any, count: int) -> list[dict[str, Any]]:
    """The choices by the rows that they answer: servers may return them in any order."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ReplyError("it has no list of choices")
    numbers = [choice.get("index") for choice in choices]
    if len(choices) != count:
        raise ReplyError(f"it has {len(choices)} choices for {count} rows")
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(count)):
        raise ReplyError(f"its choices are not numbered 0 to {count - 1}, each once")
    return sorted(choices, key=lambda choice: choice["index"])


# ---- the two routes --------------------------------------------------------------------------------------------------


def _by_prompt_logprobs(choice: Choice) -> Entries:
    """`prompt_logprobs`: for each token null, or {"id": {"logprob": …, "rank": …}}."""
    asked = choice.entries(choice.content.get("prompt_logprobs"), "prompt_logprobs")
    read = choice.content.get("prompt_token_ids")  # older versions do not say
    if read is not None:
        _check_same_tokens(choice, choice.per_token(read, "prompt_token_ids"), list(choice.row.ids))
    items = asked.values
    if set(map(type, items)) - {dict}:
        asked.refuse_first([type(item) is not dict for item in items], "an entry of prompt_logprobs is no object")
    logprobs_E = _logprobs(asked, [item.get("logprob") for item in items])
    ranks = [item.get("rank") for item in items]
    known = not set(map(type, ranks)) - {int} and max(ranks, default=0) < 2**31
    return Entries(asked, asked.read_ids(asked.names), logprobs_E, np.array(ranks, np.int64) if known else None)


def _by_echo(choice: Choice) -> Entries:
    """`logprobs`: for each token its name, its log-probability, and {name: log-probability} of the most likely ones."""
    content = choice.content.get("logprobs")
    if not isinstance(content, dict):
        choice.refuse("it has no logprobs")
    tokens = choice.per_token(content.get("tokens"), "tokens")
    if not all(isinstance(token, str) and token.startswith(_ID) for token in tokens):
        choice.refuse(
            "tokens are given as text, which does not tell their ids: the server ignores return_tokens_as_token_ids"
        )
    _check_same_tokens(choice, tokens, [f"{_ID}{actual}" for actual in choice.row.ids])
    asked = choice.entries(content.get("top_logprobs"), "top_logprobs", _ID)
    names = asked.names
    asked.refuse_first([not name.startswith(_ID) for name in names], "an entry of top_logprobs is named by text")
    logprobs_E = _logprobs(asked, asked.values)
    _check_actual(asked, choice.per_token(content.get("token_logprobs"), "token_logprobs"))
    return Entries(asked, asked.read_ids([name[len(_ID) :] for name in names]), logprobs_E)


def _logprobs(asked: Asked, values: list[Any]) -> np.ndarray:
    if not are_numbers(values):
        asked.refuse_first(list(map(is_no_number, values)), "a log-probability is not a number")
    return as_floats(values)


def _check_same_tokens(choice: Choice, read: list[Any], sent: list[Any]) -> None:
    if read != sent:
        first = next(t for t, (one, other) in enumerate(zip(read, sent, strict=True)) if one != other)
        choice.refuse(f"the server read another token than {choice.row.ids[first]}, which was sent", first)


def _check_actual(asked: Asked, token_logprobs: list[Any]) -> None:
    """The sent token's log-probability stands in two places: they are apart where one of them is shifted."""
    choice = asked.choice
    alone = [token_logprobs[t] for t in choice.row.predicted]
    named = [at[f"{_ID}{choice.row.ids[t]}"] for at, t in zip(asked.at_S, choice.row.predicted, strict=True)]
    if not are_numbers(alone):
        choice.refuse_first(np.array(list(map(is_no_number, alone))), "a log-probability is not a number")
    with np.errstate(invalid="ignore"):  # −inf − −inf
        apart = np.abs(as_floats(alone) - as_floats(named)) > 1e-4
    choice.refuse_first(apart, "token_logprobs and top_logprobs differ for the token that was sent")


# ---- the k most likely -----------------------------------------------------------------------------------------------


def _most_likely(found: Entries, k: int, vocab_size: int) -> TopKLogprobs:
    """The checked entries as [S, k]."""
    asked, choice, counts = found.asked, found.asked.choice, found.asked.counts_S
    choice.refuse_first(
        counts < k, f"it has fewer than the {k} most likely tokens that were asked for (a limit of the server?)"
    )
    choice.refuse_first(counts > k + 1, f"it has more than {k} most likely tokens and the one that was sent")
    _check_entries(found, vocab_size)
    places = asked.places_E
    actual_S = np.fromiter((choice.row.ids[t] for t in choice.row.predicted), np.int64, len(counts))
    is_actual_E = found.ids_E == actual_S[places]
    is_extra_E = is_actual_E & (counts > k)[places]
    # By position, then the most likely first, then by id: the same reply in another order gives the same targets.
    order = np.lexsort((found.ids_E, -found.logprobs_E, is_extra_E, places))
    order = order[~is_extra_E[order]]
    ids_SK, logprobs_SK = found.ids_E[order].reshape(-1, k), found.logprobs_E[order].reshape(-1, k)
    extra_S = np.full(len(counts), -np.inf)
    extra_S[counts > k] = found.logprobs_E[is_extra_E]
    choice.refuse_first(
        extra_S > logprobs_SK.min(1, initial=0.0) + _ROUNDING,
        f"the token that was sent is more likely than another, and yet not one of the {k} most likely",
    )
    if found.ranks_E is not None:
        ranks_SK = _ranks(found.ranks_E, places, is_actual_E, k)[order].reshape(-1, k)
        _check_ranks(choice, ranks_SK, logprobs_SK)
    return _as_targets(choice, ids_SK, logprobs_SK, extra_S)


def _actual(found: Entries) -> TopKLogprobs:
    """The tokens that were sent, of entries that are checked, [S, 1]."""
    row, counts = found.asked.choice.row, found.asked.counts_S
    actual_S = np.fromiter((row.ids[t] for t in row.predicted), np.int64, len(counts))
    is_actual_E = found.ids_E == actual_S[found.asked.places_E]
    logprobs_S1 = np.minimum(found.logprobs_E[is_actual_E], 0.0).astype(np.float32)[:, None]
    possible = np.where(logprobs_S1 <= _IMPOSSIBLE, -np.inf, logprobs_S1)
    return TopKLogprobs(torch.from_numpy(actual_S)[:, None], torch.from_numpy(possible.astype(np.float32)))


def _check_entries(found: Entries, vocab_size: int) -> None:
    asked, logprobs_E = found.asked, found.logprobs_E
    asked.refuse_first(found.ids_E >= vocab_size, f"a token id is not below {vocab_size}, the size of the vocabulary")
    asked.refuse_first(np.isnan(logprobs_E), "a log-probability is NaN")
    asked.refuse_first(logprobs_E > _ROUNDING, "a log-probability is positive")
    keys = np.sort(asked.places_E * vocab_size + found.ids_E)
    twice = keys[1:][keys[1:] == keys[:-1]] // vocab_size
    if len(twice):
        asked.choice.refuse("a token id stands there twice", asked.choice.row.predicted[int(twice[0])])


def _ranks(ranks_E: np.ndarray, places_E: np.ndarray, is_actual_E: np.ndarray, k: int) -> np.ndarray:
    """The ranks, those of the tokens that were sent as the others leave them.

    Servers count these in other ways where tokens are equally likely: by those above, or by those not below.
    """
    others = np.bincount(places_E[~is_actual_E], ranks_E[~is_actual_E], minlength=int(is_actual_E.sum()))
    ranks_E = ranks_E.copy()
    ranks_E[is_actual_E] = k * (k + 1) // 2 - others
    return ranks_E


def _check_ranks(choice: Choice, ranks_SK: np.ndarray, logprobs_SK: np.ndarray) -> None:
    """Ranks say the same as the log-probabilities: a missing entry shows as a hole in them."""
    by_rank = np.argsort(ranks_SK, 1)
    holes = np.take_along_axis(ranks_SK, by_rank, 1) != np.arange(1, ranks_SK.shape[1] + 1)
    logprobs_SK = np.take_along_axis(logprobs_SK, by_rank, 1)
    rising = logprobs_SK[:, 1:] > logprobs_SK[:, :-1] + _ROUNDING
    choice.refuse_first(
        holes.any(1) | rising.any(1), "the ranks are not those of the most likely tokens, by their log-probabilities"
    )


def _as_targets(choice: Choice, ids_SK: np.ndarray, logprobs_SK: np.ndarray, extra_S: np.ndarray) -> TopKLogprobs:
    impossible = logprobs_SK <= _IMPOSSIBLE
    logprobs = np.where(impossible, -np.inf, np.minimum(logprobs_SK, 0.0)).astype(np.float32)
    # With the token that was sent: it shows where a server normalises over the k most likely alone.
    mass_S = np.exp(logprobs.astype(np.float64)).sum(1) + np.exp(extra_S)
    choice.refuse_first(mass_S > 1 + _EXCESS_MASS, "its probabilities add up to more than 1")
    return TopKLogprobs(torch.from_numpy(np.where(impossible, -1, ids_SK)), torch.from_numpy(logprobs))
