"""Which tokens the student is trained on: templates, masks, stop tokens, prompts."""

import pytest
import trl.chat_template_utils as trl_templates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from kdtrain.data import RowError, encode_row
from kdtrain.data.chat_template import ChatTemplate
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.row_notes import APART, SPLIT, STOP_ADDED
from kdtrain.errors import DataError
from tests import tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The end token is written by the template, but outside the markers.
MARKERS_WITHOUT_STOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The markers take the header and the white space behind the end token along.
MARKERS_TOO_WIDE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + m.content + "
    "'<|im_end|>\n' }}{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWO_BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}think{% "
    "endgeneration %}{{ '\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The end token is only written when another message follows.
STOP_IN_NEXT_MESSAGE = (
    "{% for m in messages %}{% if not loop.first %}{{ '<|im_end|>' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + "
    "m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|><|im_start|>assistant\n' }}{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Like Llama 3's, but unknown to trl.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' +m.content|trim "
    "+'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' "
    "}}{% endif %}"
)
# Turns before the last lose their first word, as thinking blocks do in Qwen3.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split(' ', 1)[1] }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>")
GPT_OSS_TOKENS = ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>")

MESSAGES = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "the one"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "two it is"},
]
ROW = {"messages": MESSAGES}


def tokenizer_with(template=CHATML, eos="<|im_end|>", pad="<|pad|>", bos=None, added=(), trim_offsets=None):
    fast = tiny.make_tokenizer()
    fast.add_tokens(list(added), special_tokens=True)
    if trim_offsets is not None:
        fast.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    fast.eos_token, fast.pad_token, fast.bos_token = eos, pad, bos
    fast.chat_template = template
    return fast


def encode(tokenizer, row, train_on="assistant", **options):
    """The rows that one row becomes, checking what holds for all of them."""
    (rows,) = RowEncoder(tokenizer, train_on, **options).encode([row], [None])
    if isinstance(rows, RowError):
        raise rows
    for encoded in rows:
        assert len(encoded.labels) == len(encoded.input_ids)
        assert encoded.labels[0] == -100
        assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    return rows


def supervised(tokenizer, row, train_on="assistant", **options):
    """The supervised tokens as text."""
    labels = [label for encoded in encode(tokenizer, row, train_on, **options) for label in encoded.labels]
    return tokenizer.decode([label for label in labels if label != -100])


def prompt(tokenizer, row, train_on="assistant", **options):
    encoded = encode(tokenizer, row, train_on, **options)[-1]
    return tokenizer.decode(encoded.input_ids[: encoded.prompt_length])


QWEN = "<|im_start|>user\nfirst question<|im_end|>\n<|im_start|>assistant\nthe one<|im_end|>\n"
QWEN_PROMPT = QWEN + "<|im_start|>user\nand then<|im_end|>\n<|im_start|>assistant\n"
TABLE = {
    "ChatML without markers": ({}, "the one<|im_end|>two it is<|im_end|>", QWEN_PROMPT),
    "ChatML whose eos is another token": (
        {"eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        "the one<|im_end|>two it is<|im_end|>",
        QWEN_PROMPT,
    ),
    "ChatML with markers": (
        {"template": tiny.CHATML},
        "the one<|im_end|>two it is<|im_end|>",
        "the one<|im_end|>\n<|im_start|>user\nand then<|im_end|>\n<|im_start|>assistant\n",
    ),
    "markers that leave the stop token out": (
        {"template": MARKERS_WITHOUT_STOP, "eos": "<|endoftext|>"},
        "the one<|im_end|>two it is<|im_end|>",
        QWEN_PROMPT,
    ),
    "markers that are too wide": ({"template": MARKERS_TOO_WIDE}, "the one<|im_end|>two it is<|im_end|>", QWEN_PROMPT),
    "two marked blocks per turn": (
        {"template": TWO_BLOCKS},
        "thinkthe one<|im_end|>thinktwo it is<|im_end|>",
        QWEN_PROMPT.replace("the one", "think\nthe one"),
    ),
    "Llama 2": (
        {"template": LLAMA2, "eos": "</s>", "bos": "<s>", "added": ("<s>", "</s>")},
        " the one </s> two it is </s>",
        "<s>[INST] first question [/INST] the one </s><s>[INST] and then [/INST]",
    ),
    "a Llama 3 template that trl does not know": (
        {"template": LLAMA3, "eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "added": LLAMA3_TOKENS},
        "the one<|eot_id|>two it is<|eot_id|>",
        "and then<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Llama 3": (
        {
            "template": trl_templates.llama3_chat_template,
            "eos": "<|eot_id|>",
            "bos": "<|begin_of_text|>",
            "added": LLAMA3_TOKENS,
        },
        "the one<|eot_id|>two it is<|eot_id|>",
        "and then<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Qwen2.5": (
        {"template": trl_templates.qwen2_5_chat_template},
        "the one<|im_end|>two it is<|im_end|>",
        QWEN_PROMPT,
    ),
    "Qwen3, which renders thinking blocks in the last turn only": (
        {"template": trl_templates.qwen3_chat_template, "added": ("<think>", "</think>")},
        "<think>\n\n</think>\n\nthe one<|im_end|><think>\n\n</think>\n\ntwo it is<|im_end|>",
        "and then<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Gemma 3, which stops with a token that is not its eos": (
        {
            "template": trl_templates.gemma3_chat_template,
            "eos": "<eos>",
            "bos": "<bos>",
            "added": ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        },
        "the one<end_of_turn>two it is<end_of_turn>",
        "and then<end_of_turn>\n<start_of_turn>model\n",
    ),
    "SmolVLM, which renders nothing for plain strings": (
        {"template": trl_templates.smolvlm_chat_template, "eos": "<eou>", "added": ("<eou>", "<end_of_utterance>")},
        " the one<end_of_utterance> two it is<end_of_utterance>",
        "User: and then<end_of_utterance>\nAssistant:",
    ),
    "gpt-oss, which ends the last turn with another token": (
        {"template": trl_templates.gptoss_chat_template, "eos": "<|return|>", "added": GPT_OSS_TOKENS},
        "<|channel|>final<|message|>the one<|return|><|channel|>final<|message|>two it is<|return|>",
        "and then<|end|><|start|>assistant",
    ),
    "DeepSeek, whose generation prompt opens a thinking block": (
        {"template": trl_templates.deepseekv3_chat_template, "eos": "<｜end▁of▁sentence｜>", "added": DEEPSEEK_TOKENS},
        "the one<｜end▁of▁sentence｜>two it is<｜end▁of▁sentence｜>",
        "<｜User｜>and then<｜Assistant｜>",
    ),
}


@pytest.mark.parametrize("trim_offsets", [None, False, True])
@pytest.mark.parametrize("name", TABLE)
def test_every_assistant_turn_is_supervised_up_to_its_stop_token(name, trim_offsets):
    options, expected, prompt_end = TABLE[name]
    tokenizer = tokenizer_with(**options, trim_offsets=trim_offsets)
    assert supervised(tokenizer, ROW) == expected
    assert prompt(tokenizer, ROW).endswith(prompt_end)


@pytest.mark.parametrize("name", TABLE)
def test_train_on_last_supervises_the_last_turn_with_the_same_prompt(name):
    options, expected, prompt_end = TABLE[name]
    tokenizer = tokenizer_with(**options)
    text = supervised(tokenizer, ROW, "last")
    assert expected.endswith(text)
    assert "the one" not in text
    assert "two it is" in text
    assert prompt(tokenizer, ROW, "last").endswith(prompt_end)


@pytest.mark.parametrize("name", TABLE)
def test_the_prompt_of_a_chat_is_that_of_the_same_chat_without_its_answer(name):
    tokenizer = tokenizer_with(**TABLE[name][0])
    asked = encode_row({"messages": MESSAGES[:3]}, tokenizer, train_on="assistant")
    assert asked.prompt_only
    assert asked.prompt_length == len(asked.input_ids)
    assert set(asked.labels) == {-100}
    whole = encode(tokenizer, ROW)[-1]
    if "DeepSeek" in name:  # its generation prompt opens a thinking block, which this answer does not have
        asked.input_ids[-2:] = []
        assert any("opens or closes a thinking block" in note for note in whole.notes)
    assert whole.input_ids[: whole.prompt_length] == asked.input_ids[: whole.prompt_length]
    assert whole.prompt_length == len(asked.input_ids)


def test_train_on_all_supervises_all_but_the_first_token():
    tokenizer = tokenizer_with()
    encoded = encode_row(ROW, tokenizer, train_on="all")
    assert encoded.labels == [-100, *encoded.input_ids[1:]]
    assert tokenizer.decode(encoded.input_ids[: encoded.prompt_length]) == QWEN_PROMPT


def test_a_stop_token_outside_the_markers_is_added_and_said():
    tokenizer = tokenizer_with(MARKERS_WITHOUT_STOP)
    assert encode_row(ROW, tokenizer, train_on="assistant").extended
    assert not encode_row(ROW, tokenizer_with(), train_on="assistant").extended


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_a_stop_token_that_the_next_message_writes_is_supervised_and_added_to_the_last_answer(train_on):
    tokenizer = tokenizer_with(STOP_IN_NEXT_MESSAGE, eos="<|endoftext|>")
    (encoded,) = encode(tokenizer, ROW, train_on)
    assert ("the one<|im_end|>" * (train_on == "assistant")) + "two it is<|im_end|>" == supervised(
        tokenizer, ROW, train_on
    )
    assert (encoded.unterminated, encoded.notes) == (False, (STOP_ADDED,))


def test_a_template_without_stop_tokens_is_trained_as_it_is_and_said():
    tokenizer = tokenizer_with(NO_STOP)
    assert encode_row(ROW, tokenizer, train_on="assistant").unterminated
    assert not encode_row(ROW, tokenizer_with(), train_on="assistant").unterminated


def test_a_turn_may_end_in_a_token_of_its_own_such_as_that_of_a_tool_call():
    written = "(m.tool_calls[0].function.name + '<|call|>\n' if m.tool_calls else '<|im_end|>\n')"
    tokenizer = tokenizer_with(CHATML.replace("'<|im_end|>\n'", written), added=["<|call|>"])
    calls = [{"function": {"name": "x", "arguments": {}}}]
    row = {"messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": calls}, *MESSAGES[2:]]}
    assert supervised(tokenizer, row) == "the onex<|call|>two it is<|im_end|>"
    assert not encode_row(row, tokenizer, train_on="assistant").unterminated
    assert "<|call|>" in tokenizer.convert_ids_to_tokens(list(ChatTemplate(tokenizer).stop_ids))


def test_the_stop_tokens_of_a_template_include_that_of_the_last_turn():
    tokenizer = tokenizer_with(trl_templates.gptoss_chat_template, eos="<|endoftext|>", added=GPT_OSS_TOKENS)
    stops = tokenizer.convert_ids_to_tokens(sorted(ChatTemplate(tokenizer).stop_ids))
    assert set(stops) == {"<|endoftext|>", "<|end|>", "<|return|>"}


def test_the_token_of_the_next_role_ends_a_turn_where_nothing_else_does():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    added = ["<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer = tokenizer_with(template, eos="<|endoftext|>", added=added)
    stops = tokenizer.convert_ids_to_tokens(list(ChatTemplate(tokenizer).stop_ids))
    assert set(stops) == {"<|endoftext|>", "<|user|>", "<|tool|>"}
    assert supervised(tokenizer, ROW) == "the one<|user|>two it is<|user|>"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    asked = {"messages": [MESSAGES[0], call]}
    assert supervised(tokenizer, asked) == "look<|tool|>"
    answered = {"messages": [*asked["messages"], {"role": "tool", "content": "rain"}, MESSAGES[3]]}
    assert supervised(tokenizer, answered) == "look<|tool|>two it is<|user|>"
    # Where turns have an end of their own, the beginning of the next one is none.
    closed = tokenizer_with(template.replace("m.content }}", "m.content + eos_token }}", 1), added=added)
    assert supervised(closed, ROW) == "the one<|im_end|>two it is<|im_end|>"


def test_the_real_eos_stays_supervised_when_it_is_also_the_padding_token():
    tokenizer = tokenizer_with(pad="<|im_end|>")
    assert supervised(tokenizer, ROW).count("<|im_end|>") == 2


def test_where_a_template_rewrites_earlier_turns_each_answer_is_a_row_as_the_model_meets_it():
    tokenizer = tokenizer_with(FORGETFUL)
    first, second = encode(tokenizer, ROW)
    assert first.notes == second.notes == (SPLIT,)
    assert tokenizer.decode(first.input_ids) == QWEN
    assert tokenizer.decode(second.input_ids) == QWEN_PROMPT.replace("the one", "one") + "two it is<|im_end|>\n"
    assert supervised(tokenizer, ROW) == "the one<|im_end|>two it is<|im_end|>"
    assert supervised(tokenizer, ROW, "last") == "two it is<|im_end|>"
    assert encode(tokenizer, ROW, "last")[0].notes == ()
    with pytest.raises(RowError, match="becomes 2 rows"):
        encode_row(ROW, tokenizer, train_on="assistant")
    with pytest.raises(RowError, match=r"data\.turns is joint: set it to auto, or data\.train_on to last"):
        encode(tokenizer, ROW, turns="joint")


def test_turns_can_be_split_where_they_need_not_be():
    tokenizer = tokenizer_with()
    rows = encode(tokenizer, ROW, turns="split")
    assert [tokenizer.decode(row.input_ids) for row in rows] == [QWEN, QWEN_PROMPT + "two it is<|im_end|>\n"]
    assert [row.notes for row in rows] == [(), ()]
    assert supervised(tokenizer, ROW, turns="split") == supervised(tokenizer, ROW)
    assert len(encode(tokenizer, ROW)) == 1


def test_a_changed_template_is_noticed_between_two_rows():
    tokenizer = tokenizer_with()
    supervised(tokenizer, ROW)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    assert supervised(tokenizer, ROW) == "the one<|endoftext|>two it is<|endoftext|>"
    assert supervised(tokenizer, ROW, chat_template=CHATML) == "the one<|im_end|>two it is<|im_end|>"


def test_messages_without_a_chat_template_name_the_tokenizer():
    tokenizer = tokenizer_with(None)
    tokenizer.name_or_path = "some/base-model"
    with pytest.raises(DataError, match=r"some/base-model has no chat template"):
        encode_row(ROW, tokenizer, train_on="assistant")
    assert supervised(tokenizer, {"prompt": "a", "completion": "b"}) == "b<|im_end|>"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_an_answer_that_begins_inside_a_token_is_tokenised_apart_from_its_prompt(trim_offsets):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template, trim_offsets=trim_offsets)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the path"}]}
    assert "Ġthe" in tokenizer.tokenize(": the path")
    assert supervised(tokenizer, row) == "the path<|im_end|>"
    assert prompt(tokenizer, row) == "user: hi<|im_end|>assistant: "
    asked = encode_row({"messages": row["messages"][:1]}, tokenizer, train_on="last")
    encoded = encode_row(row, tokenizer, train_on="last")
    assert encoded.input_ids[: encoded.prompt_length] == asked.input_ids
    assert encoded.notes == (APART,)


def test_messages_of_the_prompt_are_context_and_the_completion_is_trained_on():
    tokenizer = tokenizer_with()
    row = {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}
    assert supervised(tokenizer, row) == "two it is<|im_end|>"
    assert prompt(tokenizer, row) == QWEN_PROMPT
    assert encode_row({"prompt": MESSAGES[:3]}, tokenizer, train_on="assistant").prompt_only


@pytest.mark.parametrize("template", [TWO_BLOCKS, tiny.CHATML, CHATML])
def test_all_turns_of_a_completion_are_trained_on(template):
    messages = [*MESSAGES, {"role": "user", "content": "more"}, {"role": "assistant", "content": "three"}]
    text = supervised(tokenizer_with(template), {"prompt": messages[:3], "completion": messages[3:]})
    assert text.replace("think", "") == "two it is<|im_end|>three<|im_end|>"


EQUIVALENT = {
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "first question"},
            {"from": "gpt", "value": "the one"},
            {"from": "human", "value": "and then"},
            {"from": "gpt", "value": "two it is"},
        ]
    },
    "conversations with roles": {"conversations": MESSAGES},
    "text parts": {
        "messages": [
            {**m, "content": [{"type": "text", "text": m["content"][:3]}, {"type": "text", "text": m["content"][3:]}]}
            for m in MESSAGES
        ]
    },
    "nulls from Arrow": {
        "messages": [{**m, "tool_calls": None, "name": None} for m in MESSAGES],
        "prompt": None,
        "tools": None,
    },
    "a prompt column beside the messages": {**ROW, "prompt": "first question", "prompt_id": 3, "images": []},
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_the_same_conversation_in_another_form_gives_the_same_tokens(name):
    tokenizer = tokenizer_with()
    assert encode_row(EQUIVALENT[name], tokenizer, train_on="assistant") == encode_row(
        ROW, tokenizer, train_on="assistant"
    )


def test_tool_messages_and_schemas_reach_the_template_and_are_not_supervised():
    calls = "m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}{{ '<|im_end|>\n' }}"
    template = CHATML.replace("m.content + '<|im_end|>\n' }}", calls)
    template = "{% if tools %}{{ 'tools ' + tools[0].name }}{% endif %}" + template
    messages = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "it rains"},
    ]
    row = {"messages": messages, "tools": '[{"name": "look"}]'}
    tokenizer = tokenizer_with(template)
    assert supervised(tokenizer, row) == "look<|im_end|>it rains<|im_end|>"
    text = tokenizer.decode(encode_row(row, tokenizer, train_on="assistant").input_ids)
    assert text.startswith("tools look<|im_start|>user")
    assert "<|im_start|>tool\nrain" in text


def test_text_is_supervised_as_a_whole_with_one_eos_and_nothing_to_generate_from():
    tokenizer = tokenizer_with()
    encoded = encode_row({"text": "the path"}, tokenizer, train_on="assistant")
    assert tokenizer.decode(encoded.input_ids) == "the path<|im_end|>"
    assert encoded.labels == [-100, *encoded.input_ids[1:]]
    assert encoded.prompt_length == 0
    assert encode_row({"text": "the path<|im_end|>"}, tokenizer, train_on="last") == encoded


def test_text_starts_with_the_bos_token_where_the_tokenizer_writes_one():
    tokenizer = tokenizer_with(bos="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    for row in ({"text": "the path"}, {"prompt": "the", "completion": " path"}):
        encoded = encode_row(row, tokenizer, train_on="assistant")
        assert tokenizer.decode(encoded.input_ids) == "<|endoftext|>the path<|im_end|>"
    assert supervised(tokenizer, {"text": "the path"}) == "the path<|im_end|>"
    assert prompt(tokenizer, {"prompt": "the"}) == "<|endoftext|>the"


@pytest.mark.parametrize("text", ["of the", "of the ", "of t", "of the p"])
def test_the_prompt_tokens_of_a_text_pair_are_those_of_the_prompt_alone(text):
    tokenizer = tokenizer_with()
    row = {"prompt": text, "completion": "the path"}
    encoded = encode_row(row, tokenizer, train_on="assistant")
    alone = encode_row({"prompt": text}, tokenizer, train_on="assistant")
    assert alone.prompt_only
    assert encoded.input_ids[: encoded.prompt_length] == alone.input_ids
    assert supervised(tokenizer, row) == "the path<|im_end|>"
    assert supervised(tokenizer, {**row, "completion": "the path<|im_end|>"}) == "the path<|im_end|>"
    whole = encode_row(row, tokenizer, train_on="all")
    assert whole.labels == [-100, *whole.input_ids[1:]]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


BAD = [
    ({}, r"none of the columns .*nothing"),
    ({"question": "x", "answer": "y"}, r"none of the columns .*question, answer"),
    ({"messages": None}, r"none of the columns"),
    ({"messages": []}, r"messages is empty"),
    ({"messages": "hello"}, r"messages must be a list of messages, not text"),
    ({"messages": ["hello"]}, r"messages\[0\] must be a message .*not text"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, r"unknown role wizard .*assistant"),
    ({"messages": [{"role": 3, "content": "x"}]}, r"unknown role 3"),
    ({"messages": [{"role": "human", "content": "x"}]}, r"unknown role human .*; write user$"),
    ({"messages": [{"role": "Bot", "content": "x"}]}, r"unknown role Bot .*; write assistant$"),
    ({"messages": [user(None)]}, r"messages\[0\] has no content"),
    ({"messages": [user(7)]}, r"content must be text or a list of parts, not a number"),
    ({"messages": [user("  ")]}, r"messages\[0\] is an empty user message"),
    ({"messages": [user("x"), assistant("")]}, r"messages\[1\] is an empty assistant message"),
    ({"messages": [{"role": "system", "content": "x"}]}, r"ends with a system message"),
    ({"messages": [user([{"type": "image"}])]}, r"0 images in its column and 1 places"),
    ({"messages": [user([{"type": "image_url", "image_url": "x"}])]}, r"no processor for images"),
    ({"messages": [user([{"type": "text", "text": 3}])]}, r"a part that is a number"),
    ({**ROW, "images": ["a.png"]}, r"no processor for images"),
    ({**ROW, "tools": "{"}, r"tools is not valid JSON"),
    ({"messages": [user("\ud800"), assistant("x")]}, r"half a surrogate pair"),
    ({"conversations": [{"from": "wizard", "value": "x"}]}, r"unknown speaker wizard .*human"),
    ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\] has no content"),
    ({"prompt": "x", "completion": ""}, r"completion is empty"),
    ({"prompt": "", "completion": "x"}, r"prompt is empty"),
    ({"prompt": "x", "completion": [assistant("y")]}, r"both must be text or both messages"),
    ({"prompt": [user("x")], "completion": "y"}, r"both must be text or both messages"),
    ({"prompt": [user("x")], "completion": [user("y")]}, r"completion does not end with an assistant"),
    ({"prompt": [user("x"), assistant("y")]}, r"there is no completion"),
    ({"text": ""}, r"text is empty"),
    ({"text": 3}, r"text must be text, not a number"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_says_what_is_wrong_with_it(row, reason, tokenizer):
    with pytest.raises(RowError, match=reason):
        encode_row(row, tokenizer, train_on="assistant")


def test_a_conversation_that_the_template_refuses_is_a_bad_row():
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('start with \x1b[31muser') }}{% endif %}" + CHATML
    with pytest.raises(RowError, match=r"refuses the conversation: start with \\x1b\[31muser"):
        encode_row({"messages": [assistant("x")]}, tokenizer_with(template), train_on="assistant")


def test_control_characters_of_the_data_are_shown_escaped(tokenizer):
    with pytest.raises(RowError) as caught:
        encode_row({"messages": [{"role": "\x1b]0;\u202e", "content": "x"}]}, tokenizer, train_on="assistant")
    assert "\\x1b]0;\\u202e" in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_unknown_train_on_is_refused(tokenizer):
    with pytest.raises(DataError, match="assistant, last, all"):
        encode_row(ROW, tokenizer, train_on="every")


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=20).filter(str.strip)
_CHAT = st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=4)
_TOKENIZERS = [
    tokenizer_with(template, trim_offsets=trim) for template in (CHATML, tiny.CHATML) for trim in (None, True)
]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_CHAT, st.sampled_from(_TOKENIZERS), st.sampled_from(["", "be brief"]))
def test_supervised_tokens_are_the_assistant_contents_with_their_stop_tokens(turns, tokenizer, system):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
    expected = "".join(answer + "<|im_end|>" for _, answer in turns)
    assert supervised(tokenizer, {"messages": messages}) == expected
    assert supervised(tokenizer, {"messages": messages}, "last") == turns[-1][1] + "<|im_end|>"
