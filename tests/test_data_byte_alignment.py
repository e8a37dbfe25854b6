"""Chunks of two tokenisations: the same bytes on both sides, and none that could be shorter."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdtrain.data.byte_alignment import NONE, TokenBytes, align
from kdtrain.errors import DataError
from tests import tiny, tiny_other


def cut(text: bytes, at: set[int]) -> list[bytes]:
    places = sorted({0, len(text), *(place for place in at if place < len(text))})
    return [text[a:b] for a, b in pairwise(places)]


def texts_of(tokens: list[bytes], chunks: list[int]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for token, chunk in zip(tokens, chunks, strict=True):
        found[chunk] = found.get(chunk, b"") + token
    found.pop(NONE, None)
    return found


CUTS = st.sets(st.integers(1, 60))


@given(st.text(min_size=1, max_size=25), CUTS, CUTS)
def test_chunks_lie_between_the_edges_that_both_have(text, own_cuts, other_cuts):
    whole = text.encode("utf-8", "surrogatepass")
    own, other = cut(whole, own_cuts), cut(whole, other_cuts)
    found = align(own, other)
    assert texts_of(own, found.student) == texts_of(other, found.teacher)
    edges = sorted(set(accumulate(map(len, own))) & set(accumulate(map(len, other))))
    expected = [whole[a:b] for a, b in zip([0, *edges], edges, strict=False)]
    assert list(texts_of(own, found.student).values()) == expected
    assert (found.chunks, found.covered) == (len(expected), len(whole))


@given(st.text(min_size=8, max_size=20), st.text(max_size=9), st.text(max_size=9), CUTS, CUTS)
def test_texts_that_differ_have_chunks_in_what_they_share(text, before, behind, own_cuts, other_cuts):
    own = cut((text + behind).encode("utf-8", "surrogatepass") or b"x", own_cuts)
    other = cut((before + text).encode("utf-8", "surrogatepass") or b"x", other_cuts)
    found = align(own, other)
    assert texts_of(own, found.student) == texts_of(other, found.teacher)
    assert found.chunks == len(texts_of(own, found.student))


def test_a_character_that_one_side_splits_has_no_edge_within_it():
    whole = "aé日b".encode()
    found = align([b"a", whole[1:2], whole[2:4], whole[4:]], [b"a", whole[1:3], whole[3:6], b"b"])
    assert (found.student, found.teacher) == ([0, 1, 1, 1], [0, 1, 1, 1])
    both = align([whole[:2], whole[2:]], [b"a", whole[1:2], whole[2:]])
    assert (both.student, both.teacher) == ([0, 1], [0, 0, 1])


def test_an_answer_behind_text_that_only_one_side_has_is_aligned():
    found = align([b"<think>", b"\n\n</think>", b"\n\n", b"Hel", b"lo"], [b"Hello"])
    assert (found.student, found.teacher, found.covered) == ([NONE, NONE, NONE, 0, 0], [0], 5)


@pytest.mark.parametrize("make", [tiny.make_tokenizer, tiny_other.byte_level, tiny_other.with_byte_fallback])
@pytest.mark.parametrize("text", ["The path  of é, 日本 and 👩‍👧.\n\tEnd", "numbers 1 22\u00a0333", "x"])
def test_the_bytes_of_tokens_are_those_of_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(TokenBytes(tokenizer)(ids)) == text.encode()
    assert TokenBytes(tokenizer)([len(tokenizer) + 3]) == [b""]


def test_a_tokenizer_that_loses_spaces_is_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="keep every byte"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words))
