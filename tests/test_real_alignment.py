"""Chunks of real tokenizers on 10,000 lines of mixed scripts, emoji and code. `make test-real`: fetched once."""

import os
import unicodedata
from itertools import accumulate

import pytest

from kdtrain.data.byte_alignment import NONE, TokenBytes, align
from tests.benchmarks.alignment import PAIRS, Statistics, aligned_rows, lines
from tests.templates.families import named_template
from tests.templates.real_tokenizers import INTEGRITY, CannotFetch, real_tokenizer

pytestmark = pytest.mark.real
TEXTS = list(lines(10_000))


@pytest.fixture(scope="module", autouse=True)
def tokenizers():
    try:
        return {name: real_tokenizer(name) for name in INTEGRITY}
    except CannotFetch as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(str(error))


def read_by(name):
    """The bytes of each text's tokens, and the text as the tokenizer has it."""
    tokenizer = named_template(name).tokenizer
    known, composes = TokenBytes(tokenizer), name == "qwen3"
    encoded = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    texts = [unicodedata.normalize("NFC", text) if composes else text for text in TEXTS]
    return [known(ids) for ids in encoded], [text.encode() for text in texts]


def joined(tokens, chunks):
    found = {}
    for token, chunk in zip(tokens, chunks, strict=True):
        found[chunk] = found.get(chunk, b"") + token
    found.pop(NONE, None)
    return found


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_chunks_agree_byte_for_byte_and_none_could_be_shorter(student, teacher):
    (own, own_texts), (other, other_texts) = read_by(student), read_by(teacher)
    for mine, theirs, text, other_text in zip(own, other, own_texts, other_texts, strict=True):
        assert (b"".join(mine), b"".join(theirs)) == (text, other_text)
        found = align(mine, theirs)
        assert joined(mine, found.student) == joined(theirs, found.teacher)
        if text == other_text:
            edges = sorted(set(accumulate(map(len, mine))) & set(accumulate(map(len, theirs))))
            expected = [text[a:b] for a, b in zip([0, *edges], edges, strict=False)]
            assert list(joined(mine, found.student).values()) == expected


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_answers_of_chats_are_aligned_as_they_are_trained_on(student, teacher):
    found = Statistics()
    for _, row, aligned, _ in aligned_rows(student, teacher, TEXTS[:1000]):
        supervised = sum(label != NONE for label in row.labels)
        assert sum(chunk != NONE for chunk in aligned.student_chunks) <= supervised
        found.add(aligned)
    assert found.aligned_bytes >= 0.98 * found.answer_bytes
    assert found.chunks > 0.75 * max(found.student, found.teacher)
