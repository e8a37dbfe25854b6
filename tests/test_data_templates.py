"""Templates in the shapes of those that trl does not ship, on a tiny tokenizer, against the real ones' oracle."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kdtrain.data import encode_row
from kdtrain.data.probed_template import ProbedTemplate
from tests import tiny
from tests.templates.check import judged
from tests.templates.families import FOLDER, Family, Template, with_template, with_tokens
from tests.templates.oracle import Encoded, Oracle, judge
from tests.templates.rows import ANSWER, QUESTION, SECOND_ANSWER, SYSTEM, TOOLS, calling, chat

_THINK = "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
SHAPES = {
    # What is written behind the last message, generation prompt or end token, depends on who goes on.
    "Phi-3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|end|>",),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "Phi-4-mini": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|end|>",),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    # The system's text stands in the last user's message while that is the last of all, and is gone afterwards.
    "Mistral-Nemo": (
        "{% set s = '' %}{% set ms = messages %}{% if messages and messages[0].role == 'system' %}"
        "{% set s = messages[0].content + '\n\n' %}{% set ms = messages[1:] %}{% endif %}{{ '<s>' }}"
        "{% for m in ms %}{% if m.role == 'user' %}{{ '[INST]' + (s if loop.last else '') + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}",
        ("</s>",),
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    # The header is written in the loop: there is none for no messages.
    "Granite 3.0": (
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
        "'<|end_of_text|>\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
        "{% endfor %}",
        ("<|end_of_text|>",),
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
    "QwQ": (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + _THINK + "{{ '<|im_start|>assistant\n' + c + "
        "'<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        ("<|im_end|>",),
        ("<think>", "</think>"),
    ),
    "DeepSeek-R1": (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'assistant' %}" + _THINK + "{{ '<|Assistant|>' + c "
        "+ '</s>' }}"
        "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        ("</s>",),
        ("<s>", "</s>", "<|User|>", "<|Assistant|>", "<think>", "</think>"),
    ),
    # Behind the last question every answer has a thinking block, before it none has.
    "Qwen3.5": (
        "{% set n = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}"
        "{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<th"
        "ink>')[-1].strip() %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\n' }}"
        "{% if loop.index0 > n.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}"
        "{% else %}" + _TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        ("<|im_end|>",),
        ("<think>", "</think>"),
    ),
    "Nemotron-3": (
        "{{ '<|im_start|>system\n<|im_end|>\n' if not messages or messages[0].role != 'system' }}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% if '</think>' not in m.content %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        ("<|im_end|>",),
        ("<think>", "</think>"),
    ),
    # No generation prompt where the assistant spoke last.
    "GigaChat3": (
        "{{ '<s>' }}{% for m in messages %}{{ m.role + '<|role_sep|>\n' + m.content + '<|message_sep|>\n\n' }}"
        "{% endfor %}{% if add_generation_prompt and messages and messages[-1].role != 'assistant' %}"
        "{{ 'assistant<|role_sep|>\n' }}{% endif %}",
        ("<|message_sep|>",),
        ("<s>", "<|role_sep|>", "<|message_sep|>"),
    ),
    "Kimi-K2": (
        "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
        "{{ '<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>' }}{% endif %}"
        "{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}",
        ("<|im_end|>",),
        ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"),
    ),
    # The next role's token ends a turn.
    "GLM-4": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<|user|>",),
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
}


def template(name):
    text, stops, added = SHAPES[name]
    eos = "<|endoftext|>" if stops[0] in ("<|end|>", "<|user|>") else stops[0]
    family = Family("tiny", stops, added=added, eos=eos, next_role=name == "GLM-4")
    return Template(name, family, with_template(with_tokens(tiny.make_tokenizer(), family), text))


@pytest.mark.parametrize("name", SHAPES)
def test_every_kind_of_row_comes_out_as_the_template_renders_it_or_is_refused_with_a_true_reason(name):
    wrong = [
        f"{kind}, train_on {train_on}: {verdict.detail}"
        for train_on, cells in judged(template(name)).items()
        for kind, verdict in cells.items()
        if verdict.outcome == "wrong"
    ]
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong])


def prompt_and_answer(name, row):
    tokenizer = template(name).tokenizer
    encoded = encode_row(row, tokenizer, train_on="last")
    text = tokenizer.decode([label for label in encoded.labels if label != -100])
    return tokenizer.decode(encoded.input_ids[: encoded.prompt_length]), text


def test_what_the_oracle_says_is_said_once_without_it():
    assert prompt_and_answer("Phi-3", chat(QUESTION, ANSWER, QUESTION, SECOND_ANSWER)) == (
        "<|user|>\nWhich harbour freezes first?<|end|>\n<|assistant|>\nOulu, mostly in November.<|end|>\n"
        "<|user|>\nWhich harbour freezes first?<|end|>\n<|assistant|>\n",
        "Kemi does, around May.<|end|>",
    )
    assert prompt_and_answer("GigaChat3", chat(QUESTION, ANSWER, SECOND_ANSWER)) == (
        "<s>user<|role_sep|>\nWhich harbour freezes first?<|message_sep|>\n\n"
        "assistant<|role_sep|>\nOulu, mostly in November.<|message_sep|>\n\nassistant<|role_sep|>\n",
        "Kemi does, around May.<|message_sep|>",
    )
    assert prompt_and_answer("GLM-4", chat(QUESTION, ANSWER))[1] == "Oulu, mostly in November.<|user|>"
    assert prompt_and_answer("QwQ", chat(QUESTION, ANSWER)) == (
        "<|im_start|>user\nWhich harbour freezes first?<|im_end|>\n<|im_start|>assistant\n",
        "Oulu, mostly in November.<|im_end|>",
    )
    assert prompt_and_answer("Mistral-Nemo", chat(SYSTEM, QUESTION, ANSWER)) == (
        f"<s>[INST]{SYSTEM['content']}\n\nWhich harbour freezes first?[/INST]",
        "Oulu, mostly in November.</s>",
    )


def test_the_oracle_sees_a_mask_a_prompt_and_a_reason_that_are_wrong():
    shape = template("QwQ")
    row = chat(QUESTION, ANSWER)
    right = encode_row(row, shape.tokenizer, train_on="last")
    start, ids, labels = right.prompt_length, right.input_ids, right.labels
    header_too = [*labels[: start - 1], ids[start - 1], *labels[start:]]
    without_stop = [*labels[:-2], -100, labels[-1]]
    wrong = [
        [Encoded(ids, header_too, start)],
        [Encoded(ids, without_stop, start)],
        [Encoded(ids, labels, start - 1)],
        [Encoded(ids[1:], labels[1:], start - 1)],
        "the row is bad",
    ]
    oracle = Oracle(shape)
    assert judge(oracle, row, "last", [Encoded(ids, labels, start)], noted=True).outcome == "right"
    assert "no note" in judge(oracle, row, "last", [Encoded(ids, labels, start)], noted=False).detail
    assert {judge(oracle, row, "last", got, noted=True).outcome for got in wrong} == {"wrong"}
    untrue = judge(oracle, chat(QUESTION, calling(), tools=TOOLS), "last", "the row is too long", noted=False)
    assert untrue.outcome == "wrong"


@pytest.mark.parametrize("name", ["qwen3_training", "gptoss_training", "gemma3_training", "llama3_training"])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_text_and_markers_are_those_that_transformers_renders(name, generation_prompt):
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = with_template(tiny.make_tokenizer(), text)
    thinking = {**ANSWER, "reasoning_content": "Shallow water cools sooner."}
    messages = [SYSTEM, QUESTION, thinking, QUESTION, SECOND_ANSWER]
    texts, spans = render_jinja_template(
        [messages],
        tools=TOOLS,
        chat_template=text,
        return_assistant_tokens_mask=True,
        add_generation_prompt=generation_prompt,
        **tokenizer.special_tokens_map,
    )
    template = ProbedTemplate(tokenizer, None, True, None)
    for with_spans in (False, True):
        rendered = template.render(messages, TOOLS, generation_prompt=generation_prompt, spans=with_spans)
        assert rendered == (texts[0], spans[0] if with_spans else [])
    assert spans[0]
