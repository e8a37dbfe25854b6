"""The first word of every answer is supervised, in the forms of templates that put a space in front of it.

SentencePiece writes a space into the word behind it. Where a prompt ends before, behind or without that space decides
whose the token is; a one-word answer about an image would otherwise train nothing but its end.
"""

import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from kdtrain.data import encode_row
from kdtrain.data.row_notes import APART, STRADDLED
from tests import tiny_processors as vision

ENDS = ("</s>", "<end_of_utterance>", "<|im_end|>", "<end_of_turn>")
_BEGINS = ("<s>", "<|begin_of_text|>", "<|im_start|>", "<bos>", "<start_of_turn>", "<start_of_image>")


def from_trl(name):
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def selected(kind, text):
    return (
        "{% for content in message['content'] | selectattr('type', 'equalto', '"
        + kind
        + "') %}"
        + text
        + "{% endfor %}"
    )


# As published with LLaVA 1.5, 1.6 of Vicuna, and Idefics 2.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    + selected("image", "{{ '<image>\\n' }}")
    + "{% if message['role'] != 'assistant' %}"
    + selected("text", "{{ content['text'] + ' '}}")
    + "{% else %}"
    + selected("text", "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}")
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WITHOUT_MARKERS = LLAVA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
IDEFICS2 = (
    "{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}{% for p in m.content %}{{ '<image>' if p.type == "
    "'image' else p.text }}{% endfor %}{{ ' [/INST] ' }}{% else %}{{ m.content[0].text + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# Where the end of a turn is a token, and where the prompt ends: before the space, or behind it.
TEMPLATES = {
    "LLaVA": (LLAVA, "", "before"),
    "LLaVA without markers": (WITHOUT_MARKERS, "", "before"),
    "LLaVA whose prompt ends with the space": (LLAVA.replace("'ASSISTANT:' }}", "'ASSISTANT: ' }}"), "", "behind"),
    "without markers, with the space": (WITHOUT_MARKERS.replace("'ASSISTANT:' }}", "'ASSISTANT: ' }}"), "", "behind"),
    "LLaVA 1.6 of Mistral": (from_trl("llava_next"), "</s>", "before"),
    "LLaVA 1.6 of Mistral, with markers": (from_trl("llava_next_training"), "</s>", "before"),
    "Mistral whose prompt ends with the space": (MISTRAL, "</s>", "behind"),
    "Idefics 2": (IDEFICS2, "<end_of_utterance>", "before"),
    "Idefics 3": (from_trl("idefics3"), "<end_of_utterance>", "before"),
    "Idefics 3, with markers": (from_trl("idefics3_training"), "<end_of_utterance>", "before"),
    "SmolVLM": (from_trl("smolvlm"), "<end_of_utterance>", "before"),
    "SmolVLM, with markers": (from_trl("smolvlm_training"), "<end_of_utterance>", "before"),
    "ChatML": (vision.parts_template("<image>"), "<|im_end|>", "no space"),
    "ChatML without markers": (vision.parts_template("<image>", markers=False), "<|im_end|>", "no space"),
}


def sentencepiece():
    """As Llama's: a space is a part of the word behind it, and one is written in front of every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    texts = ["the file of the path it is What?", "USER: ASSISTANT: User: Assistant: [INST] [/INST] user assistant"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<unk>", *ENDS, *_BEGINS, "<image>", "<|pad|>"],
        initial_alphabet=sorted({"\n", *"".join(texts)}),
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<|pad|>"
    )


def byte_level():
    tokenizer = vision.make_tokenizer("<image>", *ENDS, *_BEGINS)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


@pytest.fixture(scope="module", params=[sentencepiece, byte_level])
def processor(request):
    llava = vision.make_llava()
    return LlavaProcessor(
        llava.image_processor, request.param(), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def letters(tokenizer, ids):
    """What tokens say, without white space in any of its forms."""
    return re.sub(r"[\s▁ĠĊ]", "", "".join(tokenizer.convert_ids_to_tokens(ids)))


def conversation(*answers, image=True):
    asked = {"type": "text", "text": "What?"}
    turns = []
    for i, answer in enumerate(answers):
        turns += [
            {"role": "user", "content": [{"type": "image"}, asked] if image and not i else [asked]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return {"messages": turns, **({"images": [vision.picture()]} if image else {})}


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_all_words_of_the_answers_are_supervised_and_no_others(processor, name, image):
    template, stop, space = TEMPLATES[name]
    tokenizer = processor.tokenizer
    for answers in (["the"], ["the", "the file it is"]):
        row = conversation(*answers, image=image)
        encoded = encode_row(row, processor, chat_template=template, train_on="assistant")
        expected = "".join(answer.replace(" ", "") + stop for answer in answers)
        assert letters(tokenizer, [label for label in encoded.labels if label != -100]) == expected
        # Before its last answer the row is what a model is given to answer, and no part of that answer.
        given = letters(tokenizer, encoded.input_ids[: encoded.prompt_length])
        assert letters(tokenizer, encoded.input_ids).startswith(given + answers[-1].replace(" ", "") + stop)
        first = encoded.labels[encoded.prompt_length]
        assert "".join(answers[-1].split()).startswith(letters(tokenizer, [first]))
        # Which way was taken is said where a word's token holds the end of the prompt.
        straddled = space == "behind"
        assert (STRADDLED in encoded.notes, APART in encoded.notes) == (straddled and image, straddled and not image)
