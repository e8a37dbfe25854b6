"""A row's tokens as text, cut where supervision begins and ends."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kdtrain.data.segments import Segment, merged, segments, special_ids, token_texts
from tests.tiny_processors import make_llava


def supervised_from(ids, start, end=None):
    end = len(ids) if end is None else end
    return [token if start <= i < end else -100 for i, token in enumerate(ids)]


@pytest.fixture(scope="module")
def sentencepiece():
    """As Llama 2 has it: spaces are ▁, the first one is dropped in decoding, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁path"]
    model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_the_texts_make_up_the_decoded_row(tokenizer):
    ids = tokenizer("<|im_start|>What is it?<|im_end|>\n zero, é 😀<|im_end|>")["input_ids"]
    for start in range(len(ids)):
        for end in range(start, len(ids)):
            found = segments(tokenizer, ids, supervised_from(ids, start, end))
            assert "".join(part.text for part in found) == tokenizer.decode(ids)
            assert sum(part.tokens for part in found) == len(ids)
            assert sum(part.tokens for part in found if part.supervised) == end - start


def test_a_character_in_pieces_belongs_to_the_token_that_completes_it(tokenizer):
    ids = tokenizer("a😀b")["input_ids"]
    assert len(ids) == 6  # the bytes are 2nd to 5th
    assert segments(tokenizer, ids, supervised_from(ids, 3)) == [Segment("a", 3, False), Segment("😀b", 3, True)]
    assert segments(tokenizer, ids, supervised_from(ids, 0, 3)) == [Segment("a", 3, True), Segment("😀b", 3, False)]


def test_a_row_that_ends_within_a_character_shows_its_beginning_as_such(tokenizer):
    ids = tokenizer("a😀")["input_ids"][:-1]
    assert segments(tokenizer, ids, supervised_from(ids, 1)) == [Segment("a", 1, False), Segment("\ufffd", 3, True)]


def test_a_replacement_character_of_the_text_itself_stays_where_it_is(tokenizer):
    ids = tokenizer("a\ufffdb")["input_ids"]
    before = len(tokenizer("a\ufffd")["input_ids"])
    assert [part.text for part in segments(tokenizer, ids, supervised_from(ids, before))] == ["a\ufffd", "b"]


def test_sentencepiece_keeps_the_space_in_front_of_a_segment(sentencepiece):
    ids = sentencepiece.convert_tokens_to_ids(["▁the", "▁path", "<0xC3>", "<0xA9>", "</s>"])
    assert sentencepiece.decode(ids) == "the pathé</s>"
    assert [part.text for part in segments(sentencepiece, ids, supervised_from(ids, 1))] == ["the", " pathé</s>"]
    assert [part.text for part in segments(sentencepiece, ids, supervised_from(ids, 3))] == ["the path", "é</s>"]


def test_special_tokens_can_stand_alone_and_be_counted(tokenizer):
    ids = tokenizer("<|im_start|>a<|pad|><|pad|><|pad|><|im_end|>")["input_ids"]
    parts = segments(tokenizer, ids, supervised_from(ids, 2), special_ids(tokenizer))
    assert [(part.text, part.tokens, part.special) for part in parts] == [
        ("<|im_start|>", 1, True), ("a", 1, False), ("<|pad|>" * 3, 3, True), ("<|im_end|>", 1, True)
    ]  # fmt: skip
    assert merged(parts) == segments(tokenizer, ids, supervised_from(ids, 2))


def test_tokens_that_stand_for_images_are_special():
    processor = make_llava()
    assert processor.tokenizer.convert_tokens_to_ids("<image>") in special_ids(processor)


def test_the_texts_of_tokens_make_up_the_whole_and_no_character_is_torn(tokenizer):
    """A byte-level tokenizer that has never seen these characters writes each of them as several tokens."""
    text = "two ⊕ tokens, 中文 and é <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "" in texts  # a part of a character
    assert "".join(texts) == tokenizer.decode(ids)
    assert not any("�" in one for one in texts)
    assert "⊕" in texts
    assert token_texts(tokenizer, ids[: texts.index("⊕")])[-1].endswith("�")  # cut within a character: said, not hidden
    assert token_texts(tokenizer, []) == []
