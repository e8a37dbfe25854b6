"""What rows may look like, and what is said of all in them that is not read."""

import json

import pytest

from kdtrain.data.columns import parse_json
from kdtrain.data.errors import RowError
from kdtrain.data.rows import Chat, parse_row


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


HI = [user("hi"), assistant("yo")]
TWO = [user("hi"), assistant("BAD"), user("again"), assistant("GOOD")]
SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Paris"}}'
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def parsed(row, columns=None):
    return parse_row(parse_json(json.dumps(row), columns))


def refused(row, reason, columns=None):
    with pytest.raises(RowError, match=reason) as caught:
        parsed(row, columns)
    assert "\n" not in str(caught.value)


def calling(*calls):
    return {"messages": [user("weather?"), assistant("", tool_calls=list(calls))]}


SAME = {
    "a system column": ({"system": "Be brief.", "messages": HI}, {"messages": [system("Be brief."), *HI]}),
    "OpenOrca's system_prompt": ({"system_prompt": "Be.", "messages": HI}, {"messages": [system("Be."), *HI]}),
    "a system column as Anthropic's parts": (
        {"system": [{"type": "text", "text": "Be brief."}], "messages": HI},
        {"messages": [system("Be brief."), *HI]},
    ),
    "a system column that the messages repeat": (
        {"system": "Be brief.", "messages": [system("Be brief."), *HI]},
        {"messages": [system("Be brief."), *HI]},
    ),
    "an empty system column": ({"system": "", "messages": HI, "tools": "[]"}, {"messages": HI}),
    "a system column beside conversations": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"messages": [system("Be brief."), *HI]},
    ),
    "a system column beside prompt and completion": (
        {"system": "Be brief.", "prompt": HI[:1], "completion": HI[1:]},
        {"prompt": [system("Be brief."), *HI[:1]], "completion": HI[1:]},
    ),
    "Alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, {"messages": HI}),
    "Alpaca with input": (
        {"instruction": "Translate", "input": "chat", "output": "cat"},
        {"messages": [user("Translate\nchat"), assistant("cat")]},
    ),
    "Alpaca with system and history": (
        {"instruction": "again", "input": None, "output": "GOOD", "system": "Be brief.", "history": [["hi", "BAD"]]},
        {"messages": [system("Be brief."), *TWO]},
    ),
    "Alpaca's rendered text beside it": (
        {"instruction": "hi", "output": "yo", "text": "### hi ### yo"},
        {"messages": HI},
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Ann was here.", "response": "Ann", "category": "closed_qa"},
        {"messages": [user("Who?\nAnn was here."), assistant("Ann")]},
    ),
    "ms-swift": (
        {"query": "again", "response": "GOOD", "system": "Be brief.", "history": [["hi", "BAD"]]},
        {"messages": [system("Be brief."), *TWO]},
    ),
    "an instruction alone": ({"instruction": "hi"}, {"messages": HI[:1]}),
    "messages as JSON text": ({"messages": json.dumps(HI)}, {"messages": HI}),
    "messages as a mapping of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["hi", "yo"], "name": None}},
        {"messages": HI},
    ),
    "conversations as a mapping of lists": (
        {"conversations": {"from": ["human", "gpt"], "value": ["hi", "yo"]}},
        {"messages": HI},
    ),
    "speakers in any case": (
        {"conversations": [{"from": "Human", "value": "hi"}, {"from": "GPT", "value": "yo"}]},
        {"messages": HI},
    ),
    "other speakers in any case": (
        {"conversations": [{"from": "User", "value": "hi"}, {"from": "Assistant", "value": "yo"}]},
        {"messages": HI},
    ),
    "roles in any case": ({"messages": [user("hi"), {"role": "Assistant", "content": "yo"}]}, {"messages": HI}),
    "from and value in messages": ({"messages": [{"from": "human", "value": "hi"}, HI[1]]}, {"messages": HI}),
    "ids of messages": ({"messages": [user("hi", id="1"), assistant("yo", uuid="2")]}, {"messages": HI}),
    "tools as JSON text": ({**calling(CALL), "tools": json.dumps([TOOL])}, {**calling(CALL), "tools": [TOOL]}),
    "tools as a list of JSON texts": (
        {**calling(CALL), "tools": [json.dumps(TOOL)]},
        {**calling(CALL), "tools": [TOOL]},
    ),
    "the older functions": ({**calling(CALL), "functions": [SCHEMA]}, {**calling(CALL), "tools": [TOOL]}),
    "the older function_call": (
        {"messages": [
            user("weather?"),
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'},
            },
            {"role": "function", "name": "weather", "content": "rain"},
        ]},
        {"messages": [
            user("weather?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "content": "rain"},
        ]},
    ),
    "ShareGPT's calls": (
        {"conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": CALL_TEXT},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "it rains"},
        ]},
        {"messages": [
            user("weather?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "rain"},
            assistant("it rains"),
        ]},
    ),
    "ShareGPT's calls one after the other": (
        {"conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": CALL_TEXT},
            {"from": "function_call", "value": f"[{CALL_TEXT}]"},
        ]},
        calling(CALL, CALL),
    ),
    "arguments as JSON text": (
        calling({"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}),
        calling({"id": "1", **CALL}),
    ),
    "a bare function as a call": (calling({"name": "weather", "arguments": '{"city": "Paris"}'}), calling(CALL)),
    "calls as JSON text": (
        {"messages": [user("weather?"), {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}]},
        calling(CALL),
    ),
    "reasoning": (
        {"messages": [user("hi"), assistant("yo", reasoning="because")]},
        {"messages": [user("hi"), assistant("yo", reasoning_content="because")]},
    ),
    "thinking, and the same once more": (
        {"messages": [user("hi"), assistant("yo", thinking="because", reasoning_content="because", reasoning="")]},
        {"messages": [user("hi"), assistant("yo", reasoning_content="because")]},
    ),
    "all switches on": ({"messages": [user("hi", weight=0), assistant("yo", weight=1, train=True)]}, {"messages": HI}),
    "template arguments as JSON text": (
        {"messages": HI, "chat_template_kwargs": '{"enable_thinking": false}'},
        {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_conversation_in_another_layout_is_the_same(name):
    row, plain = SAME[name]
    found, expected = parsed(row), parsed(plain)
    assert isinstance(found, Chat)
    if "text" not in row:
        assert found.notes == ()
    for field in ("messages", "tools", "first_trained", "untrained", "template_kwargs", "trained", "unknown_keys"):
        assert getattr(found, field) == getattr(expected, field)


@pytest.mark.parametrize(
    "switch",
    [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss_mask": 0}, {"train": False}, {"trainable": False}],
)
def test_an_answer_that_is_switched_off_is_context(switch):
    row = {"messages": [user("hi"), assistant("BAD", **switch), user("again"), assistant("GOOD", weight=1)]}
    chat = parsed(row)
    assert chat.messages == TWO
    assert (chat.untrained, chat.trained) == ({1}, [3])


def test_switches_stand_in_sharegpt_turns_and_in_completions_too():
    turns = [("human", "hi", 1), ("gpt", "BAD", 0), ("human", "again", 0), ("gpt", "GOOD", 1)]
    chat = parsed({"conversations": [{"from": f, "value": v, "weight": w} for f, v, w in turns]})
    assert (chat.messages, chat.trained) == (TWO, [3])
    assert chat.notes == ("a user message has weight, which is not read: only answers are trained on",)
    row = {"system": "s", "prompt": HI, "completion": [user("hi"), assistant("BAD", loss=0), *HI]}
    assert parsed(row).trained == [6]
    assert (
        "a message of prompt says that it is trained on"
        in parsed({**row, "prompt": [HI[0], assistant("x", loss=1), HI[0]]}).notes[0]
    )
