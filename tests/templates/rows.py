"""The kinds of rows that every template is asked to render. Words are unlike those of templates, to be found again."""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]

QUESTION = {"role": "user", "content": "Which harbour freezes first?"}
ANSWER = {"role": "assistant", "content": "Oulu, mostly in November."}
SECOND_QUESTION = {"role": "user", "content": "And which thaws last?"}
SECOND_ANSWER = {"role": "assistant", "content": "Kemi does, around May."}
SYSTEM = {"role": "system", "content": "Speak like a sailor."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "ice_chart",
            "description": "Thickness of ice in a harbour.",
            "parameters": {
                "type": "object",
                "properties": {"harbour": {"type": "string", "description": "Its name."}, "day": {"type": "integer"}},
                "required": ["harbour"],
            },
        },
    }
]
ARGUMENTS = {"harbour": "Tornio", "day": 3}
OBSERVED = {"role": "tool", "name": "ice_chart", "tool_call_id": "call00001", "content": "forty centimetres"}


def call(arguments: Any = ARGUMENTS, identity: str = "call00001") -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": "ice_chart", "arguments": arguments}}


def calling(*calls: dict[str, Any], content: str | None = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls or [call()]), **more}


def answering(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def asking(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def chat(*messages: dict[str, Any], **more: Any) -> Row:
    return {"messages": list(messages), **more}


def kinds(control_token: str) -> dict[str, Row]:
    """`control_token` is one of the template's own, for the rows that speak of it."""
    think = "<think>\nShallow water cools sooner.\n</think>\n\n"
    other_call = call({"harbour": "Raahe", "day": 4}, "call00002")
    other_observed = {**OBSERVED, "tool_call_id": "call00002", "content": "eleven inches"}
    return {
        "single turn": chat(QUESTION, ANSWER),
        "system": chat(SYSTEM, QUESTION, ANSWER),
        "empty system": chat({"role": "system", "content": ""}, QUESTION, ANSWER),
        "multi-turn": chat(QUESTION, ANSWER, SECOND_QUESTION, SECOND_ANSWER),
        "system, multi-turn": chat(SYSTEM, QUESTION, ANSWER, SECOND_QUESTION, SECOND_ANSWER),
        "assistant first": chat(answering("Ahoy, welcome aboard."), QUESTION, ANSWER),
        "system, assistant only": chat(SYSTEM, answering("Ahoy, welcome aboard.")),
        "two assistants": chat(QUESTION, ANSWER, SECOND_ANSWER),
        "two assistants, then more": chat(QUESTION, ANSWER, answering("Or Vaasa."), SECOND_QUESTION, SECOND_ANSWER),
        "two users": chat(QUESTION, asking("Quickly please!"), ANSWER),
        "ends with user": chat(QUESTION, ANSWER, SECOND_QUESTION),
        "prompt only": {"prompt": [SYSTEM, QUESTION]},
        "prompt and completion": {"prompt": [QUESTION, ANSWER, SECOND_QUESTION], "completion": [SECOND_ANSWER]},
        "weight 0": chat(QUESTION, {**ANSWER, "weight": 0}, SECOND_QUESTION, {**SECOND_ANSWER, "weight": 1}),
        "all weights 0": chat(QUESTION, {**ANSWER, "weight": 0}),
        "tools, no call": chat(QUESTION, ANSWER, tools=TOOLS),
        "tool call": chat(QUESTION, calling(), tools=TOOLS),
        "tool call, JSON text": chat(QUESTION, calling(call(json.dumps(ARGUMENTS))), tools=TOOLS),
        "tool call, content null": chat(QUESTION, calling(content=None), tools=TOOLS),
        "tool call beside content": chat(QUESTION, calling(content="Let us look."), tools=TOOLS),
        "tool call, no tools": chat(QUESTION, calling()),
        "call, tool, answer": chat(QUESTION, calling(), OBSERVED, answering("Too thick to sail."), tools=TOOLS),
        "two rounds of calls": chat(
            QUESTION,
            calling(),
            OBSERVED,
            calling(other_call),
            other_observed,
            answering("Neither is open."),
            tools=TOOLS,
        ),
        "calls in two turns": chat(
            QUESTION,
            calling(),
            OBSERVED,
            ANSWER,
            SECOND_QUESTION,
            calling(other_call),
            other_observed,
            SECOND_ANSWER,
            tools=TOOLS,
        ),
        "parallel calls": chat(QUESTION, calling(call(), other_call), OBSERVED, other_observed, ANSWER, tools=TOOLS),
        "reasoning": chat(QUESTION, answering("Oulu.", reasoning_content="Shallow water cools sooner.")),
        "reasoning, multi-turn": chat(
            QUESTION,
            answering("Oulu.", reasoning_content="Shallow water cools sooner."),
            SECOND_QUESTION,
            answering("Kemi.", reasoning_content="Northern sun rises later."),
        ),
        "reasoning, then a call": chat(
            QUESTION, calling(reasoning_content="Charts would tell."), OBSERVED, ANSWER, tools=TOOLS
        ),
        "think in content": chat(QUESTION, answering(think + "Oulu.")),
        "think in content, multi-turn": chat(
            QUESTION, answering(think + "Oulu."), SECOND_QUESTION, answering(think + "Kemi.")
        ),
        "begins with newlines": chat(QUESTION, answering("\n\nOulu."), SECOND_QUESTION, answering("\nKemi.")),
        "begins with a space": chat(QUESTION, answering(" Oulu."), SECOND_QUESTION, answering("  Kemi.")),
        "ends with a newline": chat(QUESTION, answering("Oulu.\n"), SECOND_QUESTION, answering("Kemi. ")),
        "white space in question": chat(asking("\n  Which harbour?\n\n"), answering("Oulu.")),
        "developer": chat({"role": "developer", "content": "Speak like a sailor."}, QUESTION, ANSWER),
        "system in the middle": chat(
            QUESTION, ANSWER, {"role": "system", "content": "Whisper from now on."}, SECOND_QUESTION, SECOND_ANSWER
        ),
        "unicode": chat(asking("¿Qué 港 凍る? 🧊❄️"), answering("أولو في نوفمبر 🚢 — 奥卢，十一月。\u200d né")),
        "code": chat(asking("Show `f`!"), answering('```python\ndef f(x):\n\treturn {"a": x}  # <b>&amp;</b>\n\n```')),
        "begins with a bracket": chat(QUESTION, answering("<b>Oulu</b>"), SECOND_QUESTION, answering("{Kemi}")),
        "control token in answer": chat(QUESTION, answering(f"It is {control_token} a token.")),
        "control token in question": chat(asking(f"What is {control_token} for?"), ANSWER),
        "thinking off": chat(QUESTION, ANSWER, chat_template_kwargs={"enable_thinking": False}),
        "long": chat(QUESTION, answering(" ".join(f"harbour {i} froze." for i in range(400)))),
    }
