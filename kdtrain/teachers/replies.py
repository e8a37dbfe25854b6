"""What is asked of a server for the log-probabilities of given tokens, and what its reply says, checked.

Shapes: T tokens of a row, S of its positions that predict a supervised token, K tokens known at each.

Servers have two ways to score tokens. vLLM takes `prompt_logprobs`; others take `echo` with `logprobs`. In both, entry
t of a reply describes token t, so that it is the distribution which the tokens before t predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdtrain.losses.topk import TopKLogprobs

Route = Literal["prompt_logprobs", "echo"]


@dataclass(frozen=True)
class Scored:
    """One row to be scored."""

    ids: tuple[int, ...]
    """All T tokens that the server is to read, without padding."""
    predicted: tuple[int, ...]
    """S positions t >= 1 of `ids`: the supervised tokens. The row of targets for t is what ids[:t] predict."""


def scoring_payload(route: Route, model: str, rows: Sequence[Scored], top_k: int) -> dict[str, Any]:
    """The body of `POST /completions` that scores some rows."""
    raise NotImplementedError


def read_scores(route: Route, reply: Any, rows: Sequence[Scored], top_k: int, vocab_size: int) -> list[TopKLogprobs]:
    """The k most likely tokens at each asked position of every row, most likely first.

    min(top_k, V) columns; float32 on the CPU. The actual token is among them only where it is one of the k.

    Raises:
        ReplyError: anything that is not as it must be: choices missing or twice, a position too few or too many, other
            ids than were sent, an actual token without entry, fewer than k entries, an id twice or out of range, NaN,
            a positive log-probability, probabilities that add up to more than 1.
    """
    raise NotImplementedError
