"""Targets for rows with images: a server takes images within messages alone, so that such a row is sent as a chat.

The server renders the chat and expands its images by itself. Its `prompt_token_ids` say what the model has read, and
only what is identical to the student's tokens is taken:

    the student's   [prompt, image tokens][answer … last supervised token][rest]
    the server's    the same ids; or another prompt in front of the same ids from the first supervised token to the end

Shapes: T tokens of a row, S of its positions that predict a supervised token, K tokens known at each.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdtrain.data.batch import Batch
from kdtrain.data.errors import RowError
from kdtrain.data.images import Image, blanked
from kdtrain.errors import DataError, PreflightError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.served.chat_messages import chat_payload
from kdtrain.teachers.served.http import ReplyError, Servers
from kdtrain.teachers.served.replies import Scored, read_scores


@dataclass(frozen=True)
class ImageRow:
    """One row with images to be scored."""

    name: str
    """For messages."""
    chat: str
    """As of `kdtrain.data.conversation`, with messages."""
    images: tuple[Image, ...]
    tokens: Scored
    """As the student reads it, up to its last supervised token."""
    rest: tuple[int, ...]
    """The tokens behind that one."""


def with_images(batch: Batch, rows: Sequence[Scored | None]) -> tuple[Scored | ImageRow | None, ...]:
    """The rows of a batch to be scored, those that have images as `ImageRow`.

    Raises:
        PreflightError: a row whose messages are not known, or whose answer is not in them.
    """
    known = batch.rows
    if len(known.images) != len(rows):
        raise PreflightError(
            "A batch has images, and its rows no messages (column chat), in which alone a served teacher takes images. "
            "Give data.train the rows as messages, or use rlhf.teacher.backend: hf."
        )
    return tuple(
        _with_images(batch, number, row) if row is not None and known.images[number] else row
        for number, row in enumerate(rows)
    )


def _with_images(batch: Batch, number: int, tokens: Scored) -> ImageRow:
    name, chat = batch.rows.name(number), batch.rows.chats[number]
    messages = json.loads(chat).get("messages") if chat else None
    if not messages:
        raise PreflightError(
            f"Row {name} has images and no messages that could carry them to a server (it is cut within its prompt, or "
            "its prompt is text). Raise data.max_length, or use rlhf.teacher.backend: hf."
        )
    if batch.generated_by is not None or messages[-1]["role"] != "assistant":
        raise PreflightError(
            f"Row {name} has images and an answer that was generated. A server takes images within messages alone, and "
            "would cut the text of that answer into other tokens than were generated. Set rlhf.lmbda: 0 and "
            "rlhf.seq_kd: false, or use rlhf.teacher.backend: hf."
        )
    assert chat is not None, "it has messages"
    return ImageRow(name, chat, tuple(batch.rows.images[number]), tokens, _rest(batch, number, tokens))


def _rest(batch: Batch, number: int, tokens: Scored) -> tuple[int, ...]:
    """What stands in the row behind the tokens that are scored; without its padding on either side."""
    ids_T, mask_T = (batch.model_inputs[name][number] for name in ("input_ids", "attention_mask"))
    return tuple(ids_T[mask_T.bool()].tolist()[len(tokens.ids) :])


async def score_images(
    servers: Servers,
    model: str,
    row: ImageRow,
    *,
    top_k: int,
    vocab_size: int,
    server: str | None = None,
    verified: bool = True,
) -> TopKLogprobs:
    """Targets [S, K] of a row with images, as `read_scores` gives them.

    Args:
        model: its name there.
        vocab_size: ids that the student can be taught; a reply with others is refused.
        server, verified: see `Servers.post`.

    Raises:
        DataError: an image that cannot be read.
        TeacherError: no usable reply, or one to other tokens than the student's.
    """
    payload = await asyncio.to_thread(_payload, model, row, top_k)  # pictures are compressed, which takes time

    def read(reply: Any) -> TopKLogprobs:
        return read_image_scores(reply, row, top_k, vocab_size)

    return await servers.post("/chat/completions", payload, read, server=server, verified=verified)


def _payload(model: str, row: ImageRow, top_k: int) -> dict[str, Any]:
    try:
        chat = chat_payload(json.loads(row.chat), row.images)
    except RowError as error:
        raise DataError(f"row {row.name}: {error}") from error
    # The whole conversation is the prompt; vLLM writes one token at least. At temperature 1 as in `scoring_payload`.
    return {
        "model": model,
        **chat,
        "add_generation_prompt": False,
        "temperature": 1.0,
        "max_tokens": 1,
        "prompt_logprobs": top_k,
        "return_token_ids": True,
    }


def read_image_scores(reply: Any, row: ImageRow, top_k: int, vocab_size: int) -> TopKLogprobs:
    """The targets in a reply to a chat.

    Raises:
        ReplyError: it has no targets, or the server has read other supervised tokens than the student; or as
            `read_scores`.
    """
    reply = reply if isinstance(reply, dict) else {}
    read = reply.get("prompt_token_ids")
    if not isinstance(reply.get("prompt_logprobs"), list):
        raise ReplyError(
            "it has no prompt_logprobs: this server scores no chats, in which alone it takes images. Use a vLLM "
            "server, or rlhf.teacher.backend: hf"
        )
    if not isinstance(read, list) or not all(type(one) is int for one in read):
        raise ReplyError("it has no prompt_token_ids, so that it is not known which tokens the server has read")
    moved = _moved(read, row)
    tokens = Scored(tuple(read), tuple(t + moved for t in row.tokens.predicted))
    choice = {"index": 0, "prompt_logprobs": reply["prompt_logprobs"], "prompt_token_ids": read}
    (found,) = read_scores("prompt_logprobs", {"choices": [choice]}, [tokens], top_k, vocab_size)
    return found


def _moved(read: list[int], row: ImageRow) -> int:
    """How much further on the student's supervised tokens stand in what the server has read.

    A row that both read alike from its beginning may be shorter here, cut at max_length: what stands behind a token
    does not count for it.
    """
    ids, first = list(row.tokens.ids), row.tokens.predicted[0]
    if read[: len(ids)] == ids:
        return 0
    whole = [*ids, *row.rest]
    if read[first - len(whole) :] == whole[first:]:
        return len(read) - len(whole)
    raise ReplyError(_difference(read, whole, row))


def _difference(read: list[int], whole: list[int], row: ImageRow) -> str:
    what = f"row {row.name}: the server has read other tokens than the student, {len(read)} for {len(whole)}"
    if whole[: len(read)] == read and len(whole) - len(read) == 1:
        return (
            f"{what}: its chat template does not write the token that ends an answer ({whole[-1]}), which the student "
            "is trained on"
        )
    pairs = enumerate(zip(reversed(read), reversed(whole), strict=False), start=1)
    back, (theirs, own) = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (0, (None, None)))
    at = f"; counted from the end, token {back} is {theirs} there and {own} here" if back else ""
    return (
        f"{what}{at}. Serve the model with the student's chat template (--chat-template) and tokenizer, or use "
        "rlhf.teacher.backend: hf"
    )


async def image_is_seen(
    servers: Servers,
    model: str,
    row: ImageRow,
    *,
    top_k: int,
    vocab_size: int,
    server: str | None = None,
) -> bool:
    """Whether the images of a row change what the server answers.

    The row is asked about as it is, with each image filled with one colour, and as it is once more: the first two must
    differ by more than the first and the last, in the probabilities of the k most likely tokens.
    """
    without = replace(row, images=tuple(await asyncio.to_thread(lambda: [blanked(image) for image in row.images])))
    options: dict[str, Any] = {"top_k": top_k, "vocab_size": vocab_size, "server": server, "verified": False}
    found = [await score_images(servers, model, one, **options) for one in (row, without, row)]
    return _apart(found[0], found[1]) > 3 * _apart(found[0], found[2]) + _ROUNDING


_ROUNDING = 1e-5  # of a probability


def _apart(one: TopKLogprobs, other: TopKLogprobs) -> float:
    """The largest difference of a probability, where a token that only one of them names has none in the other."""
    pairs = zip(*(_by_id(found) for found in (one, other)), strict=True)
    return max(abs(a.get(i, 0.0) - b.get(i, 0.0)) for a, b in pairs for i in {*a, *b})


def _by_id(found: TopKLogprobs) -> list[dict[int, float]]:
    rows = zip(found.indices.tolist(), found.logprobs.exp().tolist(), strict=True)
    return [dict(zip(ids, probabilities, strict=True)) for ids, probabilities in rows]
