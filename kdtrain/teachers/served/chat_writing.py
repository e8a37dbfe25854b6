"""Answers that a server writes by `POST /chat/completions`: messages in, a message out, one request for each.

That is all that most APIs offer. The answer comes as text, which becomes tokens by the student's own chat template:
not here, since what teachers are does not depend on how rows are encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdtrain.data.errors import show
from kdtrain.data.turns import REASONING, blank
from kdtrain.errors import TeacherError
from kdtrain.teachers.base import Prompt, Sampling, Written
from kdtrain.teachers.served.chat_messages import chat_payload
from kdtrain.teachers.served.http import ReplyError, Servers
from kdtrain.teachers.served.writing import SEEDS, Budget, only_choice, unknown_end

_ENDED = ("stop", "tool_calls", "function_call")


async def write_chat(servers: Servers, model: str, prompt: Prompt, sampling: Sampling, budget: Budget) -> Written:
    """One answer, as a message.

    Args:
        budget: what the request is taken from.

    Raises:
        TeacherError: no usable answer; one that the server refuses to give is `Written.refused`.
    """
    if prompt.chat is None or "messages" not in prompt.chat:
        raise TeacherError("A server that is asked by /chat/completions needs messages, and a row has none.")
    payload = {
        "model": model,
        **chat_payload(prompt.chat, prompt.chat.get("images") or ()),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature or 0.0,
        "top_p": 1.0,
        "seed": prompt.seed % SEEDS,
    }
    read = budget.reading(lambda reply: read_chat(reply, servers.hide))
    return await servers.post("/chat/completions", payload, read, before=budget.take)


def read_chat(reply: Any, hide: Callable[[str], str] = str) -> Written:
    """The answer in a reply. One without text or calls, or that a filter has stopped, is refused with the reason.

    Args:
        hide: takes the key out of a text that is shown and kept.

    Raises:
        ReplyError: no message, or an end that is not known.
    """
    choice = only_choice(reply)
    finish, message = choice.get("finish_reason"), choice.get("message")
    if finish == "content_filter":
        return _refused("the server's content filter refused the answer")
    if not isinstance(message, dict):
        raise ReplyError("the reply has no message")
    if not blank(message.get("refusal")):
        return _refused(f"the teacher refused to answer: {show(hide(str(message['refusal'])), 80)}")
    if finish != "length" and finish not in _ENDED:
        raise unknown_end(finish)
    return _answer(message, cut=finish == "length")


def _answer(message: dict[str, Any], cut: bool) -> Written:
    content, calls = message.get("content"), message.get("tool_calls") or message.get("function_call")
    if not (content is None or isinstance(content, str)):
        raise ReplyError("the message's content is no text")
    thoughts = {key: message[key] for key in REASONING if not blank(message.get(key))}
    if blank(content) and blank(calls):
        if not cut:
            return _refused("the answer is empty")
        where = "in its reasoning" if thoughts else "before it began"
        return _refused(f"the answer was cut {where}: raise rlhf.max_new_tokens")
    answer = {"role": "assistant", "content": content or "", **thoughts}
    if not blank(calls):
        if cut:  # half a call is none
            return _refused("the answer was cut in a tool call: raise rlhf.max_new_tokens")
        answer["tool_calls" if message.get("tool_calls") else "function_call"] = calls
    return Written([], cut, message=answer)


def _refused(reason: str) -> Written:
    return Written([], cut=False, refused=reason)
