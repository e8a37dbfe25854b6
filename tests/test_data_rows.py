"""What rows may look like, and what is said of all in them that is not read."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdtrain.data import Source, build_dataset, encode_row
from kdtrain.data.columns import parse_json
from kdtrain.data.errors import RowError
from kdtrain.data.rows import Chat, Pair, answered, parse_row, prompt_of
from kdtrain.errors import DataError
from tests.test_data_dataset import write_lines
from tests.test_data_encoder import CHATML, prompt, supervised, tokenizer_with

datasets.disable_progress_bars()


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
    "a function without parameters": (
        {**calling(CALL), "functions": [{"name": "x"}]},
        {**calling(CALL), "tools": [{"type": "function", "function": {"name": "x"}}]},
    ),
    "the older functions": ({**calling(CALL), "functions": [SCHEMA]}, {**calling(CALL), "tools": [TOOL]}),
    "bare functions as tools": ({**calling(CALL), "tools": json.dumps([SCHEMA])}, {**calling(CALL), "tools": [TOOL]}),
    "flat tools": (
        {**calling(CALL), "tools": [{"type": "function", **SCHEMA}], "functions": [SCHEMA]},
        {**calling(CALL), "tools": [TOOL]},
    ),
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
    "Llama's parameters of a call": (calling({"name": "weather", "parameters": {"city": "Paris"}}), calling(CALL)),
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


def test_a_call_without_arguments_has_an_empty_object_of_them():
    for call in ({"name": "x"}, {"name": "x", "arguments": ""}, {"function": {"name": "x", "arguments": None}}):
        assert parsed(calling(call)).messages[1]["tool_calls"][0]["function"] == {"name": "x", "arguments": {}}


@pytest.mark.parametrize(
    "switch",
    [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss_mask": 0}, {"train": False}, {"trainable": False}],
)
def test_an_answer_that_is_switched_off_is_context(switch):
    row = {"messages": [user("hi"), assistant("BAD", **switch), user("again"), assistant("GOOD", weight=1)]}
    chat = parsed(row)
    assert chat.messages == TWO
    assert (chat.untrained, chat.trained) == ({1}, [3])


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_the_last_turn_is_the_last_that_may_be_trained_on(train_on):
    row = {"messages": [user("hi"), assistant("GOOD"), user("again"), assistant("BAD", weight=0)]}
    assert supervised(tokenizer_with(), row, train_on) == "GOOD<|im_end|>"
    assert prompt(tokenizer_with(), row, train_on).endswith("hi<|im_end|>\n<|im_start|>assistant\n")


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


def test_only_a_last_answer_that_may_be_trained_on_is_asked_for_anew():
    chat = prompt_of(parsed({"messages": [*TWO, user("bye"), assistant("BAD", weight=0)]}))
    assert (chat.messages, chat.untrained) == (TWO[:3], frozenset())
    row = {"prompt": HI[:1], "completion": [assistant("BAD", weight=0), user("again"), assistant("GOOD")]}
    assert prompt_of(parsed(row)).messages == TWO[:3]
    assert prompt_of(parsed({"prompt": HI[:1], "completion": TWO[1:]})).messages == HI[:1]


BAD = {
    "a system column against a system message": (
        {"system": "a", "messages": [system("b"), *HI]},
        r"column system and the system message have different texts: .*\{system: null\}",
    ),
    "two system columns": ({"system": "a", "system_prompt": "b", "messages": HI}, r"system and system_prompt have"),
    "a system column beside text": (
        {"system_prompt": "a", "prompt": "hi", "completion": "yo"},
        r"system_prompt beside a prompt that is text .*output: completion, system_prompt: system_prompt\}.*null\}",
    ),
    "tools beside text": ({"tools": [TOOL], "prompt": "hi", "completion": "yo"}, r"tools beside a prompt that is text"),
    "a system column that is a number": ({"system": 3, "messages": HI}, r"system.content must be text"),
    "tools and other functions": ({"tools": [TOOL], "functions": [{"name": "x"}], "messages": HI}, r"are different"),
    "tools that are no JSON": ({"tools": ["def f(): pass"], "messages": HI}, r"tools\[0\] is not valid JSON"),
    "tools that are text": ({"tools": [3], "messages": HI}, r"tools\[0\] must be a JSON schema, not a number"),
    "tools that are one mapping": ({"tools": TOOL, "messages": HI}, r"tools must be a list of JSON schemas"),
    "tools of half a character": ({"tools": [{"name": "\ud800"}], "messages": HI}, r"half a surrogate pair"),
    "template arguments in a list": ({"chat_template_kwargs": [1], "messages": HI}, r"must be a mapping, not a list"),
    "an empty output": ({"instruction": "hi", "output": ""}, r"output is empty"),
    "an empty instruction": ({"instruction": "", "input": "", "output": "yo"}, r"instruction is empty"),
    "two answers": ({"instruction": "hi", "output": "a", "response": "b"}, r"output and response are two different"),
    "an input that is no text": (
        {"instruction": "hi", "input": ["a"], "output": "b"},
        r"input must be text, not a list",
    ),
    "a history that is no list of pairs": (
        {"query": "hi", "history": ["a"], "response": "b"},
        r"history must be a list",
    ),
    "a history with a gap": ({"query": "hi", "history": [["a", None]], "response": "b"}, r"history\[0\] must be text"),
    "a bad answer of KTO": ({"prompt": "hi", "completion": "insult", "label": False}, r"label is false \(KTO\)"),
    "a bad answer of KTO in a CSV file": (
        {"prompt": "hi", "completion": "insult", "label": "False"},
        r"label is false",
    ),
    "a bad conversation of KTO": ({"messages": HI, "label": False}, r"label is false .*\{label: null\}"),
    "LLaMA-Factory's KTO": ({"instruction": "hi", "output": "yo", "kto_tag": False}, r"kto_tag is false"),
    "DPO": (
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        r"\(DPO\).*\{prompt: prompt\} for the prompts alone, .*\{prompt: prompt, completion: chosen\} for the chosen",
    ),
    "DPO with whole conversations": (
        {"prompt": "hi", "chosen": HI, "rejected": HI},
        r"\{messages: chosen\} for the chosen answers",
    ),
    "DPO of LLaMA-Factory": (
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"value": "a"}, "rejected": {"value": "b"}},
        r"\(DPO\).*\{conversations: conversations\} for the prompts alone",
    ),
    "messages that are one message": ({"messages": HI[0]}, r"not a single mapping: put it into a list"),
    "messages that are Python's text": ({"messages": "[{'role': 'user'}]"}, r"not text that is no JSON"),
    "messages as the JSON text of a number": ({"messages": "3"}, r"must be a list of messages, not a number"),
    "lists of different lengths": ({"messages": {"role": ["user"], "content": []}}, r"lengths: 1 role, 0 content"),
    "half a switch": ({"messages": [HI[0], assistant("yo", weight=0.5)]}, r"messages\[1\].weight is 0.5"),
    "a switch that is a word": ({"messages": [HI[0], assistant("yo", train="yes")]}, r"train is text: a message is"),
    "switches that differ": ({"messages": [HI[0], assistant("yo", train=True, loss=0)]}, r"says both"),
    "no turn that is trained on": ({"messages": [HI[0], assistant("yo", weight=0)]}, r"no turn is trained on"),
    "no turn of a completion": (
        {"prompt": HI[:1], "completion": [assistant("yo", weight=0)]},
        r"no turn is trained on",
    ),
    "arguments that are no JSON": (
        calling(CALL, {"function": {"name": "x", "arguments": "city=Paris"}}),
        r"messages\[1\].tool_calls\[1\].function.arguments must be a JSON object, or its text: city=Paris",
    ),
    "arguments that are the text of a list": (
        calling({"function": {"name": "x", "arguments": "[1]"}}),
        r"tool_calls\[0\].function.arguments must be",
    ),
    "arguments that are a list": (calling({"name": "x", "arguments": [1]}), r"arguments must be .*: a list"),
    "a call without a function": (calling({"id": "1"}), r"tool_calls\[0\] has no function"),
    "a call without a name": (calling({"function": {"arguments": {}}}), r"tool_calls\[0\].function has no name"),
    "a call that is text": (calling("weather()"), r"tool_calls\[0\] is not valid JSON"),
    "calls that are a number": ({"messages": [HI[0], assistant("", tool_calls=3)]}, r"must be a list of calls"),
    "a call of half a character": (calling({"name": "x", "arguments": {"a": "\ud800"}}), r"half a surrogate pair"),
    "a ShareGPT call that is no JSON": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "weather()"}]},
        r"conversations\[1\] is not valid JSON",
    ),
    "a user who calls": ({"messages": [user("hi", tool_calls=[CALL]), HI[1]]}, r"user message with tool_calls"),
    "both spellings of a call": (
        {"messages": [HI[0], assistant("", tool_calls=[CALL], function_call={"name": "x"})]},
        r"both tool_calls and function_call",
    ),
    "reasoning that is no text": (
        {"messages": [HI[0], assistant("yo", reasoning={"a": 1})]},
        r"reasoning must be text",
    ),
    "different reasonings": (
        {"messages": [HI[0], assistant("yo", reasoning="a", thinking="b")]},
        r"different texts in reasoning and thinking",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_meant_is_bad_with_the_reason(name):
    refused(*BAD[name])


NOTES = {
    "rows of KTO that are good": (
        {"prompt": "hi", "completion": "yo", "label": True},
        ["rows whose label is true (KTO) are trained on"],
    ),
    "a class": ({"messages": HI, "label": 0}, []),
    "a word": ({"prompt": "hi", "completion": "yo", "label": "entailment"}, []),
    "the class of a text": ({"text": "buy this", "label": False}, []),
    "metadata": ({"messages": HI, "id": 1, "source": "web", "score": 0.5, "category": "qa"}, []),
    "ultrachat's prompt": ({"messages": HI, "prompt": "hi", "prompt_id": "x"}, []),
    "another prompt": ({"messages": HI, "prompt": "hello"}, ["the column prompt is not read beside messages"]),
    "ultrafeedback's pairs": (
        {"prompt": "hi", "messages": HI, "chosen": HI, "rejected": HI},
        [f"the column {column} is not read beside messages" for column in ("chosen", "rejected")],
    ),
    "ms-swift's other answer": (
        {"query": "hi", "response": "yo", "rejected_response": "no"},
        ["the column rejected_response is not read beside query"],
    ),
    "a solution to check against": ({"messages": HI, "solution": "42", "answer": "42"}, []),
    "an answer that is not the completion": (
        {"prompt": "hi", "answer": "42"},
        [
            "the column answer is not read beside prompt: "
            "columns: {prompt: prompt, completion: answer} makes it the answer"
        ],
    ),
    "a response that is not the completion": (
        {"query": "hi", "output": "42"},
        ["the column output is not read beside query: columns: {query: query, response: output} makes it the answer"],
    ),
    "a label that is the answer": (
        {"instruction": "hi", "label": "positive"},
        [
            "the column label is not read beside instruction: "
            "columns: {instruction: instruction, output: label} makes it the answer"
        ],
    ),
    "xLAM's calls": (
        {"query": "hi", "answers": [CALL_TEXT], "tools": [TOOL]},
        ["the column answers is not read beside query"],
    ),
    "the thoughts of a completion": (
        {"prompt": "hi", "completion": "yo", "reasoning": "because", "thinking": ""},
        ["the column reasoning is not read beside prompt"],
    ),
    "a history beside messages": (
        {"messages": HI, "history": [["a", "b"]]},
        ["the column history is not read beside messages"],
    ),
    "an input beside a prompt": (
        {"prompt": "hi", "completion": "yo", "input": "chat"},
        ["the column input is not read beside prompt"],
    ),
    "a row's own switch": ({"messages": HI, "weight": 0}, ["the column weight is not read beside messages"]),
    "a system prompt that the text has": ({"system": "Be brief.", "text": "<s>Be brief. hi"}, []),
    "a system prompt that the text lacks": (
        {"system": "Be brief.", "text": "hi"},
        ["the column system is not read beside text"],
    ),
    "a system prompt that the prompt has": ({"system": "Be brief.", "prompt": "Be brief. hi", "completion": "yo"}, []),
    "template arguments beside text": (
        {"prompt": "hi", "completion": "yo", "chat_template_kwargs": {"a": 1}},
        ["chat_template_kwargs is not read beside a prompt that is text"],
    ),
    "a question that says it is trained on": (
        {"messages": [user("hi", weight=1), HI[1]]},
        ["a user message has weight, which is not read: only answers are trained on"],
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_is_not_read_and_means_something_is_a_note(name):
    row, notes = NOTES[name]
    assert list(parsed(row).notes) == notes


def test_keys_of_messages_that_neither_kdtrain_nor_the_template_reads_are_notes():
    row = {"messages": [user("hi", id="1", country="DE"), assistant("yo", tool_plan="ask", refusal=None, tags=[])]}
    notes = [f"messages have the key {key}, which is not read" for key in ("country", "tool_plan")]
    assert list(encode_row(row, tokenizer_with(), train_on="assistant").notes) == notes
    for reading in ("m.tool_plan", "m['tool_plan']", 'm.get("tool_plan")'):
        tokenizer = tokenizer_with(CHATML.replace("m.content", f"({reading} or '') + m.content"))
        encoded = encode_row(row, tokenizer, train_on="assistant")
        assert list(encoded.notes) == notes[:1]
        assert "askyo<|im_end|>" in tokenizer.decode(encoded.input_ids)


LOST = {
    "Alpaca's input": (
        {"instruction": "Translate", "input": "chat", "output": "cat"},
        {"prompt": "instruction", "completion": "output"},
        r"column input is not mapped .*\{instruction: instruction, output: output, input: input\}.*input: null\}",
    ),
    "the instruction": (
        {"instruction": "Translate", "input": "chat", "output": "cat"},
        {"prompt": "input", "completion": "output"},
        r"column instruction is not mapped .*\{input: input, output: output, instruction: instruction\}",
    ),
    "OpenOrca's system prompt": (
        {"system_prompt": "Be brief.", "question": "hi", "response": "yo"},
        {"prompt": "question", "completion": "response"},
        r"\{instruction: question, output: response, system_prompt: system_prompt\}",
    ),
    "a system column beside conversations": (
        {"system": "Be brief.", "conversations": HI},
        {"conversations": "conversations"},
        r"column system is not mapped .*\{conversations: conversations, system: system\}",
    ),
    "tools": ({"tools": [TOOL], "chat": HI}, {"messages": "chat"}, r"column tools is not mapped"),
    "a history": (
        {"query": "hi", "response": "yo", "history": [["a", "b"]]},
        {"instruction": "query", "output": "response"},
        r"column history is not mapped",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_mapping_that_loses_a_column_says_how_to_map_it_or_to_leave_it_out(name):
    row, columns, reason = LOST[name]
    refused(row, reason, columns)
    lost = reason.split("column ")[1].split(" is")[0] if "column " in reason else "system_prompt"
    assert not parsed(row, {**columns, lost: None}).notes
    for nothing in ("", "[]", None, {}):
        assert not parsed({**row, lost: nothing}, columns).notes


def test_a_column_that_only_some_rows_have_may_be_mapped_and_a_misspelt_one_is_found(tmp_path):
    rows = [{"q": "hi", "a": "yo"}, {"q": "hi", "a": "yo", "sys": "Be brief."}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    columns = {"instruction": "q", "output": "a", "system": "sys"}
    assert [len(parsed(row, columns).messages) for row in rows] == [2, 3]
    assert build(path, tmp_path, columns)[1].rows_kept == 2
    with pytest.raises(DataError, match=r"has the columns q, a, sys, not those of .*Did you mean sys"):
        build(path, tmp_path, {**columns, "system": "syss"})
    refused({"q": "hi", "a": "yo", "system": "Be brief."}, r"column system is not mapped", columns)
    refused(rows[0], r"no column answer", {"instruction": "q", "output": "answer"})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (user("hi", image="a.png"), r"messages\[0\] has image beside its content"),
        (user("hi", video="a.mp4"), r"messages\[0\] has video beside its content"),
        (user([{"type": "text", "text": "hi", "weight": 0}]), r"messages\[0\]\.content has a part with weight"),
    ],
)
def test_what_a_message_says_in_the_wrong_place_is_refused(message, reason):
    with pytest.raises(RowError, match=reason):
        parsed({"messages": [message, HI[1]]})


@pytest.mark.parametrize(
    "text", ['{"prompt": "hi", "completion": "A", "completion": "B"}', '{"messages": [{"role": "user", "role": "x"}]}']
)
def test_a_key_that_stands_twice_is_a_bad_row(text):
    with pytest.raises(RowError, match=r"the key (completion|role) stands there twice"):
        parse_json(text, None)


def test_a_null_for_one_image_column_leaves_the_other(tmp_path):
    row = {"messages": HI, "images": ["a.png"], "image": "b.png"}
    for columns in ({"image": None}, {"messages": "messages", "image": None}):
        assert parse_json(json.dumps(row), columns) == {"messages": HI, "images": ["a.png"]}


def test_the_mapping_that_is_proposed_keeps_everything():
    row, *_ = LOST["OpenOrca's system prompt"]
    columns = {"instruction": "question", "output": "response", "system_prompt": "system_prompt"}
    assert parsed(row, columns).messages == [system("Be brief."), *HI]


def test_preferences_are_usable_where_the_mapping_says_as_what():
    row = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    assert parsed(row, {"prompt": "prompt"}) == Pair("hi")
    assert parsed(row, {"prompt": "prompt", "completion": "chosen"}) == Pair("hi", "yo")
    assert parsed({"messages": HI, "label": False}, {"label": None}).messages == HI


def build(path, tmp_path, columns=None, prompts=True, **options):
    source = Source(str(path), columns=columns)
    options = {"max_length": None, "on_overlength": "error", "train_on": "assistant", **options}
    return build_dataset([source], tokenizer_with(JSON), cache_dir=str(tmp_path / "cache"), prompts=prompts, **options)


JSON = "{{ tools | tojson }}" + CHATML.replace(
    "m.content", "m.content + (m.tool_calls | tojson if m.tool_calls else '')"
)


def test_tools_and_calls_of_a_table_are_those_of_the_same_rows_as_json(tmp_path):
    other = {"name": "add", "arguments": {"a": 1, "b": None}}
    rows = [
        {**calling(CALL), "tools": [TOOL], "chat_template_kwargs": {"fast": True}},
        {**calling({"type": "function", "function": other}), "tools": [{**TOOL, "strict": True}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    tokenizer = tokenizer_with(JSON)
    del other["arguments"]["b"]  # Arrow cannot tell it from what it fills in itself
    expected = [encode_row(row, tokenizer, train_on="assistant").input_ids for row in rows]
    for name in ("a.parquet", "saved"):
        assert build(tmp_path / name, tmp_path)[0]["input_ids"][:] == expected
    at_hand = Source("rows", rows=datasets.load_from_disk(tmp_path / "saved"))
    options = {"max_length": None, "on_overlength": "error", "train_on": "assistant"}
    dataset, _ = build_dataset([at_hand], tokenizer, cache_dir=str(tmp_path / "cache"), **options)
    assert dataset["input_ids"][:] == expected


def test_nulls_that_somebody_wrote_stay(tmp_path):
    row = {**calling({"function": {"name": "add", "arguments": {"a": None}}}), "tools": [{"name": "add", "x": None}]}
    texts = {"messages": json.dumps(row["messages"]), "tools": json.dumps(row["tools"])}
    pq.write_table(pa.Table.from_pylist([texts]), tmp_path / "text.parquet")
    as_json = datasets.Features({name: datasets.List(datasets.Json()) for name in row})
    datasets.Dataset.from_list([row], features=as_json).save_to_disk(tmp_path / "json")
    write_lines(tmp_path / "a.jsonl", [row])
    for name in ("text.parquet", "json", "a.jsonl"):
        dataset, _ = build(tmp_path / name, tmp_path)
        text = tokenizer_with().decode(dataset[0]["input_ids"])
        assert '"a": null' in text
        assert '"x": null' in text


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_mapping_that_loses_a_column_is_found_in_every_kind_of_file(suffix, tmp_path):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "input": "c", "output": "b"}]
    path = tmp_path / f"a.{suffix}"
    write_lines(path, rows) if suffix == "jsonl" else datasets.Dataset.from_list(rows).to_parquet(path)
    columns = {"prompt": "instruction", "completion": "output"}
    with pytest.raises(DataError, match=r"1 of 2 rows .*\n.*:2: the column input is not mapped"):
        build(path, tmp_path, columns)
    assert build(path, tmp_path, {**columns, "input": None})[1].rows_kept == 2
    assert build(path, tmp_path, {"input": None})[1].rows_kept == 2
    with pytest.raises(DataError, match=r"columns maps to 'inputt', .*did you mean input"):
        build(path, tmp_path, {**columns, "inputt": None})


def test_a_note_is_counted_with_the_place_of_the_first(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": HI}, *[{"messages": HI, "history": [["a", "b"]]}] * 2])
    _, report = build(path, tmp_path)
    assert report.notes == [f"the column history is not read beside messages (2 rows, the first: {path}:2)"]


ENDING = [
    {"messages": HI},
    {"messages": [*HI, user("thanks")]},
    {"messages": [user("weather?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "rain"}]},
    {"messages": [user("hi")]},
    {"prompt": [*HI, user("hi")]},
    {"prompt": "hi"},
    {"messages": [user("hi"), assistant("BAD", weight=0), user("again")]},
    {"text": "hi"},
]


def test_where_prompts_are_useless_the_answers_before_them_are_trained_on_and_the_rest_is_bad(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ENDING)
    dataset, report = build(path, tmp_path, prompts=False, max_bad_rows=4)
    assert (report.rows_kept, report.bad_rows, report.prompt_only_rows) == (4, 4, 0)
    assert dataset[1]["labels"] == dataset[0]["labels"]
    assert [bad.split(":")[1] for bad in report.first_bad] == ["4", "5", "6"]
    assert "answers: teacher" in report.first_bad[0]
    assert report.notes == [f"what follows the last answer of a conversation is left out (2 rows, the first: {path}:2)"]
    with pytest.raises(DataError, match=r"4 of 8 rows cannot be used"):
        build(path, tmp_path, prompts=False, max_bad_rows=3)


def test_where_all_is_generated_a_row_without_an_answer_stays_a_prompt(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ENDING)
    for _ in range(2):  # encoded again, and not read from what was stored for the other kind of run
        _, report = build(path, tmp_path)
        assert (report.bad_rows, report.prompt_only_rows, report.notes) == (0, 6, [])
        assert build(path, tmp_path, prompts=False, max_bad_rows=4)[1].bad_rows == 4


def test_a_row_without_an_answer_says_which_column_may_be_meant():
    with pytest.raises(RowError, match=r"no answer: give one, .*; the column response is not read beside prompt"):
        answered(parsed({"prompt": "hi", "response": "yo"}))
    with pytest.raises(RowError, match=r"no turn is trained on"):
        answered(parsed(ENDING[6]))


def test_an_instruction_with_a_base_model_says_what_to_do():
    with pytest.raises(DataError, match=r"has no chat template, .* prompt/completion or text columns"):
        encode_row({"instruction": "hi", "output": "yo"}, tokenizer_with(None), train_on="assistant")
