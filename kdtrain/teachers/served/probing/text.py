"""Whether a server reads text and chats as the student's tokenizer does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdtrain.errors import TeacherError
from kdtrain.teachers.served.http import ReplyError
from kdtrain.teachers.served.probing.ask import Asker, is_not_there

_ID = "token_id:"
_CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}]
_LONGEST_TEXT = 200  # characters


def check_tokenizer(asker: Asker) -> None:
    """Does a text get the same ids there as here?"""
    if asker.route is None:
        return
    text = str(asker.tokenizer.decode(list(asker.rows[0].ids), skip_special_tokens=True))[:_LONGEST_TEXT]
    try:
        found = asker.post("/completions", _text_payload(asker, text), _ids_of_text)
    except TeacherError:
        found = None
    if found is None:
        message = "Whether it has the student's tokenizer is not known: it does not say which ids a text becomes"
        asker.say("info", "model", message)
    elif (problem := _difference(asker.tokenizer, text, found)) is None:
        asker.say("info", "model", "A text becomes the same token ids there and here")
    else:
        hint = "distillation by tokens needs a teacher and a student of one tokenizer family"
        asker.say("error", "model", f"The server has another tokenizer than the student: {problem}", hint)


def _text_payload(asker: Asker, text: str) -> dict[str, Any]:
    payload = {"model": asker.teacher.model, "prompt": text, "temperature": 1.0, "return_token_ids": True}
    if asker.route == "prompt_logprobs":
        return {**payload, "max_tokens": 1}
    return {**payload, "max_tokens": 0, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}


def _ids_of_text(reply: Any) -> list[int] | None:
    """None where the server does not say."""
    try:
        choice = reply["choices"][0]
        found = choice.get("prompt_token_ids")
        names = (choice.get("logprobs") or {}).get("tokens") or ()
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ReplyError("it has no choices as they should be") from None
    if found is None:
        found = [int(name[len(_ID) :]) for name in names if str(name).startswith(_ID) and name[len(_ID) :].isdecimal()]
    return found if found and all(type(token) is int for token in found) else None


def _difference(tokenizer: Any, text: str, found: Sequence[int]) -> str | None:
    """In words; None where the ids are the tokenizer's, with or without its special tokens."""
    own = [list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (False, True)]
    if list(found) in own:
        return None
    return f"{text[:30]!r}… becomes {len(found)} tokens there and {len(own[0])} here{_first(found, own[0])}"


def _first(theirs: Sequence[int], own: Sequence[int]) -> str:
    for place, (one, other) in enumerate(zip(theirs, own, strict=False)):
        if one != other:
            return f", token {place} is id {one} there and {other} here"
    return ""


def check_chats(asker: Asker, chat_template_kwargs: Mapping[str, Any], teacher_tokenizer: Any = None) -> None:
    """Is a chat rendered there as here, up to the token that ends a turn?

    Args:
        teacher_tokenizer: says how the server renders chats, where it does not say so itself.
    """
    payload: dict[str, Any] = {"model": asker.teacher.model, "messages": _CHAT}  # with a generation prompt
    if chat_template_kwargs:
        payload["chat_template_kwargs"] = dict(chat_template_kwargs)
    has_template = bool(getattr(asker.tokenizer, "chat_template", None))
    try:
        theirs = asker.post("/../tokenize", payload, _tokens)
    except TeacherError as error:
        if is_not_there(error) and getattr(teacher_tokenizer, "chat_template", None):
            theirs = _rendered(teacher_tokenizer, chat_template_kwargs)
        elif is_not_there(error) or not has_template:
            asker.say("info", "model", "Its chat template is not known: it does not render chats (/tokenize)")
            return
        else:
            asker.say("warning", "model", f"The server cannot render a chat, and the student can: {error}", _SENT_AS)
            return
    if not has_template:
        message = "The teacher has a chat template, and the student's tokenizer none: a chat teacher of a base student"
        asker.say("warning", "model", message, _SENT_AS)
        return
    own = _rendered(asker.tokenizer, chat_template_kwargs)
    if theirs == own:
        asker.say("info", "model", "A chat is rendered there as here, and a turn ends with the same token")
        return
    ends = _end_of_turn(asker.tokenizer, theirs), _end_of_turn(asker.tokenizer, own)
    turn = "" if ends[0] == ends[1] else f"; a turn ends with {ends[0]!r} there and with {ends[1]!r} here"
    message = f"The teacher renders chats otherwise than the student{_first(theirs, own)}{turn}"
    asker.say("warning", "model", message, _SENT_AS)


def _rendered(tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> list[int]:
    options = {"add_generation_prompt": True, **chat_template_kwargs}
    text = tokenizer.apply_chat_template(_CHAT, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


_SENT_AS = (
    "the teacher reads chats as the student's template renders them, which it may not know: is it the right teacher?"
)


def _end_of_turn(tokenizer: Any, ids: Sequence[int]) -> str:
    """What stands behind the answer."""
    return str(tokenizer.decode(list(ids))).rpartition("Yes.")[2][:40]


def _tokens(reply: Any) -> list[int]:
    tokens = reply.get("tokens") if isinstance(reply, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ReplyError("it has no list of token ids")
    return tokens
