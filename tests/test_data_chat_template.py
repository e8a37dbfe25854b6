"""What a chat template makes of a conversation beyond plain turns: reasoning, tool calls, what it leaves out."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from kdtrain.data import RowError, encode_row, encoder
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.row_notes import (
    EARLIER_REASONING,
    FIRST_LEFT,
    KWARGS_UNREAD,
    MARKED_OUT,
    NAME_UNREAD,
    OTHER_HISTORY,
    OTHER_PROMPT,
    SPACE_KEPT,
    THOUGHT,
)
from kdtrain.errors import DataError
from tests.test_data_encoder import CHATML, encode, prompt, supervised, tokenizer_with

QUESTION = {"role": "user", "content": "first question"}
ANSWER = {"role": "assistant", "content": "the one"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"path": "a", "n": 1}}}],
}
# Knows roles, reasoning, tools and calls; thinking blocks stay in the last turn alone.
THINKING = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls %}{{ call.function.name + call.function.arguments | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# As DeepSeek's: a thinking block is opened in the generation prompt, and cut out of every answer.
OPENING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
USERS_AND_ASSISTANTS = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows_of(*messages, **columns):
    return {"messages": list(messages), **columns}


# ---- what is left out ------------------------------------------------------------------------------------------------

LEFT_OUT = {
    "a developer's message": (
        rows_of({"role": "developer", "content": "first question"}, QUESTION, ANSWER),
        "developer",
    ),
    "a system message in the middle": (
        rows_of(QUESTION, ANSWER, {"role": "system", "content": "x"}, QUESTION, ANSWER),
        "system",
    ),
    "a tool's message": (
        rows_of(QUESTION, ANSWER, {"role": "tool", "content": "rain"}, ANSWER),
        r"messages\[2\].*tool",
    ),
    "a call": (rows_of(QUESTION, CALL), r"messages\[1\]\.tool_calls\[0\]"),
    "a call beside text": (rows_of(QUESTION, {**CALL, "content": "let me look"}), r"messages\[1\]\.tool_calls\[0\]"),
    "tools": (rows_of(QUESTION, ANSWER, tools=[{"type": "function", "function": {"name": "look"}}]), r"tools\[0\]"),
    "a system prompt of a row without an answer": (rows_of({"role": "system", "content": "x"}, QUESTION), "system"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_row_of_which_the_template_leaves_out_a_part_is_bad(name):
    row, reason = LEFT_OUT[name]
    with pytest.raises(RowError, match=f"the chat template leaves out .*{reason}"):
        encode(tokenizer_with(USERS_AND_ASSISTANTS), row)
    assert encode(tokenizer_with(THINKING), row)


def test_a_name_that_is_not_rendered_is_a_note_but_for_that_of_a_tool():
    named = rows_of({**QUESTION, "name": "Ada"}, ANSWER)
    assert encode(tokenizer_with(), named)[0].notes == (NAME_UNREAD,)
    assert encode(tokenizer_with(CHATML.replace("m.content", "(m.name or '') + m.content")), named)[0].notes == ()
    of_a_tool = rows_of(QUESTION, CALL, {"role": "tool", "name": "look", "content": "rain"}, ANSWER)
    assert encode(tokenizer_with(THINKING), of_a_tool, "last")[0].notes == ()


def test_words_of_the_data_do_not_decide_what_is_rendered():
    # "the one" stands in the question, too: that it is found in the text says nothing of the developer's message.
    row = rows_of({"role": "developer", "content": "the one"}, {"role": "user", "content": "the one"}, ANSWER)
    with pytest.raises(RowError, match="developer"):
        encode(tokenizer_with(USERS_AND_ASSISTANTS), row)


# ---- reasoning -------------------------------------------------------------------------------------------------------

REASONED = {**ANSWER, "reasoning_content": "zero"}


def test_reasoning_that_the_template_renders_is_trained_whatever_the_option():
    for reasoning in ("error", "keep", "drop"):
        text = supervised(tokenizer_with(THINKING), rows_of(QUESTION, REASONED), reasoning=reasoning)
        assert text == "<think>\nzero\n</think>\n\nthe one<|im_end|>"


def test_reasoning_that_the_template_does_not_render_is_refused_written_or_left_out():
    row = rows_of(QUESTION, REASONED)
    with pytest.raises(RowError, match=r"does not render the reasoning of messages\[1\]: set data.reasoning to keep"):
        supervised(tokenizer_with(), row)
    assert supervised(tokenizer_with(), row, reasoning="keep") == "<think>\nzero\n</think>\n\nthe one<|im_end|>"
    assert supervised(tokenizer_with(), row, reasoning="drop") == "the one<|im_end|>"


@pytest.mark.parametrize("answer", [REASONED, {**ANSWER, "content": "<think>\nzero\n</think>\n\nthe one"}])
def test_reasoning_goes_where_the_generation_prompt_opens_a_thinking_block(answer):
    tokenizer, row = tokenizer_with(OPENING), rows_of(QUESTION, answer)
    with pytest.raises(RowError, match="does not render the reasoning"):
        supervised(tokenizer, row)
    assert supervised(tokenizer, row, reasoning="keep") == "zero\n</think>\n\nthe one<|im_end|>"
    assert prompt(tokenizer, row, reasoning="keep").endswith("assistant\n<think>\n")
    assert encode(tokenizer, row, reasoning="keep")[0].notes == (THOUGHT,)
    assert supervised(tokenizer, row, reasoning="drop") == "the one<|im_end|>"
    assert encode(tokenizer, row, reasoning="drop")[0].notes == (OTHER_PROMPT,)


def test_reasoning_that_cannot_be_kept_is_refused_with_the_other_way():
    cutting = OPENING.replace("<think>\\n' }}{% endif %}", "' }}{% endif %}").replace("<think>\n' }}", "' }}")
    with pytest.raises(RowError, match=r"cuts <think>…</think> out of messages\[1\].*data.reasoning: drop"):
        supervised(tokenizer_with(cutting), rows_of(QUESTION, REASONED), reasoning="keep")


def test_reasoning_of_earlier_turns_that_the_template_leaves_out_is_said():
    row = rows_of(QUESTION, REASONED, QUESTION, ANSWER)
    assert encode(tokenizer_with(THINKING), row, "last")[0].notes == (EARLIER_REASONING,)


# ---- arguments of templates ------------------------------------------------------------------------------------------


def test_arguments_for_the_template_are_the_configs_and_a_rows_own_win():
    tokenizer = tokenizer_with(THINKING)
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    plain, closed = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    asked = rows_of(QUESTION)
    assert prompt(tokenizer, asked).endswith(plain)
    assert prompt(tokenizer, asked, chat_template_kwargs=off).endswith(closed)
    assert prompt(tokenizer, {**asked, "chat_template_kwargs": off}).endswith(closed)
    assert prompt(tokenizer, {**asked, "chat_template_kwargs": on}, chat_template_kwargs=off).endswith(plain)


def test_a_template_that_is_no_template_names_the_tokenizer():
    tokenizer = tokenizer_with("{% for m in messages %}")
    tokenizer.name_or_path = "some/model"
    with pytest.raises(DataError, match=r"of the tokenizer some/model cannot be read: Unexpected end"):
        encode(tokenizer, rows_of(QUESTION, ANSWER))


def test_arguments_that_the_template_does_not_read_are_an_error_of_the_config_and_a_note_of_the_row():
    for name in ("thinking_budget", "messages", "im"):  # which stands in the template, in <|im_start|>
        with pytest.raises(DataError, match=f"data.chat_template_kwargs has {name}"):
            encode(tokenizer_with(), rows_of(QUESTION, ANSWER), chat_template_kwargs={name: 3})
    row = rows_of(QUESTION, ANSWER, chat_template_kwargs={"enable_thinking": False})
    assert encode(tokenizer_with(), row)[0].notes == (KWARGS_UNREAD,)


# ---- tool calls ------------------------------------------------------------------------------------------------------

WANTS = {
    "an object": "call.function.name + call.function.arguments | tojson",
    "items": "call.function.name }}{% for k, v in call.function.arguments.items() %}{{ k ~ '=' ~ v }}{% endfor %}{{ ''",
    "text": "call.function.name + call.function.arguments",
    "whatever can be printed": "call.function.name ~ call.function.arguments",
}
WRITES = {
    "an object": 'look{"path": "a", "n": 1}',
    "items": "lookpath=an=1",
    "text": 'look{"path": "a", "n": 1}',
    "whatever can be printed": 'look{"path": "a", "n": 1}',
}


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("wants", WANTS)
def test_calls_come_in_the_form_that_the_template_wants(wants, null):
    calls = f"{{% for call in m.tool_calls %}}{{{{ {WANTS[wants]} }}}}{{% endfor %}}"
    written = f"{{% if m.content is none %}}{calls}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    body = written if null else "{{ m.content }}" + calls
    template = CHATML.replace("+ m.content + '<|im_end|>\n' }}", "}}" + body + "{{ '<|im_end|>\n' }}")
    tokenizer = tokenizer_with(template)
    text = '{"path": "a", "n": 1}'
    as_text = {**CALL, "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": text}}]}
    for call in (CALL, as_text, {**CALL, "content": None}):
        assert supervised(tokenizer, rows_of(QUESTION, call)) == WRITES[wants] + "<|im_end|>"


# ---- control tokens --------------------------------------------------------------------------------------------------

WROTE = rows_of({"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "the <|im_start|> one"})


def test_control_tokens_in_what_people_wrote_are_refused_or_text():
    tokenizer = tokenizer_with()
    with pytest.raises(RowError, match=r"messages\[0\] has the control token <\|im_end\|>.*data.control_tokens: text"):
        supervised(tokenizer, WROTE)
    (encoded,) = encode(tokenizer, WROTE, control_tokens="text")
    assert tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>user\na <|im_end|> b<|im_end|>\n<|im_start|>assistant\nthe <|im_start|> one<|im_end|>\n"
    )
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (encoded.input_ids.count(start), encoded.input_ids.count(end)) == (2, 2)
    assert supervised(tokenizer, WROTE, control_tokens="text") == "the <|im_start|> one<|im_end|>"
    plain = rows_of(QUESTION, ANSWER)
    assert encode(tokenizer, plain, control_tokens="text") == encode(tokenizer, plain)


def test_thinking_tags_are_no_control_tokens_and_a_role_of_the_template_is():
    tokenizer = tokenizer_with(added=("<think>", "</think>"))
    row = rows_of({"role": "user", "content": "Use <think> tags"}, {**ANSWER, "content": "<think>zero</think>one"})
    assert supervised(tokenizer, row) == "<think>zero</think>one<|im_end|>"
    template = CHATML.replace("<|im_start|>", "<turn>")
    tokenizer = tokenizer_with(template)
    tokenizer.add_tokens(["<turn>"])  # as DeepSeek's roles, which its tokenizer does not call special
    with pytest.raises(RowError, match="<turn>"):
        supervised(tokenizer, rows_of({"role": "user", "content": "a <turn> b"}, ANSWER))


# ---- where an answer begins and ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trim_offsets", [None, False, True])
def test_an_answer_that_begins_with_a_line_break_keeps_it_and_the_prompt_its_own(trim_offsets):
    tokenizer = tokenizer_with(trim_offsets=trim_offsets)
    tokenizer.add_tokens(["\n\n", "\n\n\n"])
    row = rows_of(QUESTION, {"role": "assistant", "content": "\n\nthe one"})
    assert supervised(tokenizer, row) == "\n\nthe one<|im_end|>"
    assert prompt(tokenizer, row).endswith("<|im_start|>assistant\n")
    asked = encode_row(rows_of(QUESTION), tokenizer, train_on="last").input_ids
    assert encode(tokenizer, row)[0].input_ids[: len(asked)] == asked


def test_a_stop_token_that_takes_the_white_space_behind_it_is_supervised():
    tokenizer = tokenizer_with()
    tokenizer.add_tokens([AddedToken("<|done|>", rstrip=True, special=True)])  # as those of Phi-3
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|done|>")
    row = rows_of(QUESTION, ANSWER, QUESTION, ANSWER)
    assert supervised(tokenizer, row) == "the one<|done|>the one<|done|>"
    assert prompt(tokenizer, row) == prompt(tokenizer, rows_of(QUESTION, ANSWER, QUESTION))


def test_a_token_that_goes_on_into_the_next_turn_is_not_supervised():
    template = (
        "{% for m in messages %}{{ m.content if m.role == 'assistant' else 'the [INST] ' + m.content }}{{ ' ' }}"
        "{% endfor %}"
    )
    tokenizer = tokenizer_with(template, eos=None)
    assert "Ġthe" in tokenizer.tokenize("a the")
    text = supervised(tokenizer, rows_of(QUESTION, ANSWER, QUESTION, ANSWER))
    assert text == "the onethe one "


def test_the_tokenizer_is_as_it_was_when_rows_are_encoded():
    tokenizer = tokenizer_with(bos="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    before = tokenizer("the")["input_ids"]
    encode(tokenizer, rows_of(QUESTION, ANSWER))
    assert tokenizer("the")["input_ids"] == before


def test_an_eos_behind_the_end_of_the_turn_is_not_supervised():
    template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = tokenizer_with(template, eos="<|endoftext|>")
    row = rows_of(QUESTION, ANSWER, QUESTION, ANSWER)
    assert supervised(tokenizer, row) == "the one<|im_end|>the one<|im_end|>"
    assert len(encode(tokenizer, row)) == 1
    without_gap = tokenizer_with(template.replace("<|im_end|>\n", "<|im_end|>"), eos="<|endoftext|>")
    assert supervised(without_gap, row) == "the one<|im_end|>the one<|im_end|>"


def test_the_stop_token_is_the_last_of_what_stands_behind_every_answer():
    tokenizer = tokenizer_with(CHATML.replace("m.content +", "m.content + '<|done|>' +"), added=["<|done|>"])
    assert supervised(tokenizer, rows_of(QUESTION, ANSWER)) == "the one<|done|><|im_end|>"


def test_an_answer_that_nothing_comes_before_begins_behind_its_header():
    row = rows_of(ANSWER, QUESTION, ANSWER)
    assert supervised(tokenizer_with(), row) == "the one<|im_end|>the one<|im_end|>"
    assert supervised(tokenizer_with(OPENING), row) == "the one<|im_end|>the one<|im_end|>"
    refusing = "{% if messages[0].role != 'user' and messages | length == 1 %}{{ raise_exception('no') }}{% endif %}"
    (encoded,) = encode(tokenizer_with(refusing + CHATML), row)
    assert encoded.notes == (FIRST_LEFT,)
    assert supervised(tokenizer_with(refusing + CHATML), row) == "the one<|im_end|>"
    with pytest.raises(RowError, match="refuses the conversation: no"):
        encode(tokenizer_with(refusing + CHATML), rows_of(ANSWER))


def test_a_header_without_a_generation_prompt_is_given_not_written():
    # Behind an assistant's message the template writes no generation prompt, as Granite 3.0 and GigaChat 3.
    template = CHATML.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role == 'user' %}"
    )
    assert (
        supervised(tokenizer_with(template), rows_of(QUESTION, ANSWER, ANSWER)) == "the one<|im_end|>the one<|im_end|>"
    )


def test_an_answer_goes_on_from_the_prompt_at_inference_where_the_template_forgets_a_part_of_it():
    forgetting = CHATML.replace(
        "{{ '<|im_start|>'", "{% if m.role != 'system' or messages[-1].role == 'user' %}{{ '<|im_start|>'", 1
    )
    forgetting = forgetting.replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    row = rows_of({"role": "system", "content": "zero"}, QUESTION, ANSWER)
    tokenizer = tokenizer_with(forgetting)
    (encoded,) = encode(tokenizer, row)
    assert encoded.notes == (OTHER_HISTORY,)
    assert tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>system\nzero<|im_end|>\n<|im_start|>user\nfirst question<|im_end|>\n"
        "<|im_start|>assistant\nthe one<|im_end|>\n"
    )
    assert supervised(tokenizer, row) == "the one<|im_end|>"


def test_an_answer_whose_prompt_ends_otherwise_is_refused_with_both():
    numbered = "{% for m in messages %}{{ messages | length ~ m.content + ';' }}{% endfor %}"
    with pytest.raises(
        RowError, match=r"the messages before messages\[1\] differently .* alone …1first.*with it …2first"
    ):
        encode(tokenizer_with(numbered), rows_of(QUESTION, ANSWER))


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


def sentencepiece(template):
    """A tokenizer that writes a space in front of every text, as those of Llama 2 and LLaVA."""
    words = ["▁Yes", "▁No", "▁USER:", "▁ASSISTANT:", "▁hi", "ASSISTANT", ":", "▁", "Yes", "No", "hi", "USER", "\n"]
    pieces = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    from tokenizers import Regex, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+:?|▁|\n|:"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


LLAVA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' }}"
    "{% generation %}{{ m.content + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def test_what_is_tokenised_apart_gets_no_space_that_the_text_does_not_have():
    tokenizer = sentencepiece(LLAVA)
    (encoded,) = encode(tokenizer, rows_of({"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes"}))
    prompt_tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids[: encoded.prompt_length])
    assert prompt_tokens[-2:] == ["▁ASSISTANT:", "▁"]
    tokens = tokenizer.convert_ids_to_tokens([label for label in encoded.labels if label != -100])
    assert tokens == ["Yes", "▁"]


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "<|endoftext|>the path"}, "<|endoftext|>the path<|im_end|>"),
        ({"prompt": "<|endoftext|>the", "completion": " path"}, "<|endoftext|>the path<|im_end|>"),
        ({"prompt": "the", "completion": " path"}, "<|endoftext|>the path<|im_end|>"),
        ({"text": "the path<|im_end|>\n"}, "<|endoftext|>the path<|im_end|>"),
        ({"prompt": "the", "completion": " path<|im_end|>\n"}, "<|endoftext|>the path<|im_end|>"),
    ],
)
def test_text_has_one_bos_and_one_eos(row, text):
    tokenizer = tokenizer_with(bos="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer.decode(encode_row(row, tokenizer, train_on="assistant").input_ids) == text


# ---- switched off ----------------------------------------------------------------------------------------------------


def test_a_turn_whose_loss_is_switched_off_is_supervised_by_no_train_on():
    off = {**ANSWER, "content": "zero", "weight": 0}
    row = rows_of(QUESTION, off, QUESTION, ANSWER)
    assert supervised(tokenizer_with(), row) == "the one<|im_end|>"
    assert "zero" not in supervised(tokenizer_with(), row, "all")
    assert supervised(tokenizer_with(), row, "all").endswith("the one<|im_end|>\n")
    assert supervised(tokenizer_with(), rows_of(QUESTION, ANSWER, QUESTION, off), "last") == "the one<|im_end|>"


# ---- parts that are lost, or said by those who may not ---------------------------------------------------------------

CUTTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if '</think>' in m.content %}"
    "{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip() + '\n</think>\n\n' }}"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("text", ["Use <think> and </think> tags.", "<think>a</think>one<think>b</think>two"])
def test_an_answer_of_which_the_template_cuts_a_part_with_the_tags_is_bad(text):
    with pytest.raises(RowError, match=r"leaves out messages\[1\]"):
        encode(tokenizer_with(CUTTING), rows_of(QUESTION, {**ANSWER, "content": text}))
    good = {**ANSWER, "content": "<think>\nzero\n</think>\n\nthe one"}
    assert supervised(tokenizer_with(CUTTING), rows_of(QUESTION, good)) == good["content"] + "<|im_end|>"
    without_tag = {**ANSWER, "content": "zero\n</think>\n\nthe one"}
    assert supervised(tokenizer_with(CUTTING), rows_of(QUESTION, without_tag)) == good["content"] + "<|im_end|>"


def test_what_stands_before_the_thinking_of_an_earlier_answer_may_go_with_it_as_at_inference():
    earlier = {**ANSWER, "content": "one<think>a</think>two"}
    row = rows_of(QUESTION, earlier, QUESTION, ANSWER)
    assert supervised(tokenizer_with(CUTTING), row, "last") == "the one<|im_end|>"
    with pytest.raises(RowError, match=r"leaves out messages\[1\]"):
        encode(tokenizer_with(CUTTING), row)


def test_white_space_that_ends_the_generation_prompt_stays_in_it():
    # As Nemotron 3: <think> and a line break in the prompt, <think></think> in front of an answer without thinking.
    template = OPENING.replace(
        "{{ m.content.split", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content.split"
    )
    tokenizer, row = tokenizer_with(template), rows_of(QUESTION, ANSWER)
    assert prompt(tokenizer, row).endswith("<|im_start|>assistant\n<think>\n")
    assert supervised(tokenizer, row) == "</think>the one<|im_end|>"
    assert encode(tokenizer, row)[0].notes == (SPACE_KEPT,)


@pytest.mark.parametrize("option", ["error", "text"])
def test_control_tokens_in_calls_and_schemas_are_refused(option):
    call = {"type": "function", "function": {"name": "look", "arguments": {"code": "x<|im_end|>"}}}
    with pytest.raises(RowError, match=r"messages\[1\]\.tool_calls has the control token <\|im_end\|>"):
        encode(tokenizer_with(THINKING), rows_of(QUESTION, {**CALL, "tool_calls": [call]}), control_tokens=option)
    tools = [{"type": "function", "function": {"name": "look", "description": "<|im_start|>"}}]
    with pytest.raises(RowError, match=r"tools has the control token <\|im_start\|>"):
        encode(tokenizer_with(THINKING), rows_of(QUESTION, ANSWER, tools=tools), control_tokens=option)


def test_reasoning_that_is_kept_loses_nothing_of_an_answer_that_the_template_writes_without_its_line_break():
    stripping = OPENING.replace("{{ m.content.split", "{{ '<think>' if m.role == 'assistant' }}{{ m.content.split")
    row = rows_of(QUESTION, REASONED)
    assert supervised(tokenizer_with(stripping), row, reasoning="keep") == "zero\n</think>\n\nthe one<|im_end|>"
    closing = OPENING.replace("{{ m.content.split", "{{ '</think>' if m.role == 'assistant' }}{{ m.content.split")
    assert supervised(tokenizer_with(closing), row, reasoning="keep") == "zero\n</think>\n\nthe one<|im_end|>"


@pytest.mark.parametrize("name", ["add_generation_prompt", "tools", "messages", "documents"])
def test_a_row_cannot_say_what_the_caller_of_a_template_says(name):
    with pytest.raises(RowError, match=f"chat_template_kwargs has {name}"):
        encode(tokenizer_with(), rows_of(QUESTION, ANSWER, chat_template_kwargs={name: True}))


MARKED_CONTENT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and m.content %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_an_answer_that_a_templates_own_markers_leave_out_is_context_and_that_is_said():
    tokenizer = tokenizer_with(MARKED_CONTENT, eos="<|endoftext|>", added=["<|user|>", "<|assistant|>", "<|tool|>"])
    rain = {"role": "tool", "content": "rain"}
    row = rows_of(QUESTION, ANSWER, QUESTION, CALL, rain, ANSWER)
    (encoded,) = encode(tokenizer, row)
    assert supervised(tokenizer, row) == "the one<|user|>the one<|user|>"
    assert MARKED_OUT in encoded.notes
    assert supervised(tokenizer, rows_of(QUESTION, ANSWER, QUESTION, CALL)) == "the one<|user|>"


def test_a_template_that_divides_by_zero_costs_its_row_alone():
    failing = "{% if messages[0].content == 'zero' %}{{ 1 // 0 }}{% endif %}" + CHATML
    with pytest.raises(RowError, match="refuses the conversation"):
        encode(tokenizer_with(failing), rows_of({"role": "user", "content": "zero"}, ANSWER))


def test_an_answer_that_begins_like_its_header_keeps_it():
    vicuna = (
        "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}"
        "{% endif %}"
    )
    answer = {"role": "assistant", "content": "ASSISTANT: hi"}
    assert supervised(tokenizer_with(vicuna), rows_of(QUESTION, answer)) == "ASSISTANT: hi<|im_end|>"


def test_what_is_tokenised_apart_loses_nothing_where_line_breaks_are_merged():
    tokenizer = sentencepiece(LLAVA.replace("'ASSISTANT: '", "'ASSISTANT: \n'"))
    tokenizer.add_tokens(["\n\n", "\n\n\n"])
    row = rows_of({"role": "user", "content": "hi"}, {"role": "assistant", "content": "\nYes"})
    labels = [label for label in encode(tokenizer, row)[0].labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(labels) == ["\n", "Yes", "▁"]


def test_rows_are_the_same_however_many_are_tokenised_together(monkeypatch):
    tokenizer = tokenizer_with()
    rows = [
        rows_of(QUESTION, ANSWER),
        {"text": "zero"},
        rows_of(QUESTION, CALL),
        rows_of(QUESTION, ANSWER, QUESTION, ANSWER),
    ]
    together = RowEncoder(tokenizer, "assistant").encode(rows, [None] * 4)
    monkeypatch.setattr(encoder, "_AT_ONCE", 1)
    alone = RowEncoder(tokenizer, "assistant").encode(rows, [None] * 4)
    assert [str(row) for row in together] == [str(row) for row in alone]
