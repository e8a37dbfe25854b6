"""Rows as a teacher with another tokenizer and template reads them."""

import pytest

from kdtrain.data import Collator
from kdtrain.data.byte_alignment import NONE, TokenBytes
from kdtrain.data.encoded_row import truncate
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.other_tokenizer import OtherTokenizer
from kdtrain.errors import DataError
from tests import tiny, tiny_other

CHAT = {
    "messages": [
        {"role": "user", "content": "What is é?"},
        {"role": "assistant", "content": "A token, 日本."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "the student reads 1 and 30"},
    ]
}
THINKS = tiny.CHATML.replace(
    "{{ m.content + '<|im_end|>' }}{% endg", "{{ '<think>\\n\\n' + m.content + '<|im_end|>' }}{% endg"
)


@pytest.fixture(scope="module", params=["byte_level", "with_byte_fallback"])
def teacher(request):
    return getattr(tiny_other, request.param)()


def read(teacher, row, own=None, **options):
    own = own or tiny.make_tokenizer()
    (encoded,) = RowEncoder(own, "assistant", keep_chats=True).encode([row], [None])
    (found,) = OtherTokenizer(own, teacher, **options).read(encoded, [encoded[0].chat], ["7"])
    return encoded[0], found


def chunks_of(tokenizer, ids, chunks):
    """The bytes of each chunk, and what ends a turn as |."""
    found = {}
    for token, text, chunk in zip(ids, TokenBytes(tokenizer)(ids), chunks, strict=True):
        if chunk != NONE:
            found[chunk] = found.get(chunk, b"") + (b"|" if token == tokenizer.eos_token_id else text)
    return [found[chunk] for chunk in sorted(found)]


def joined(chunks):
    return b"".join(chunks).decode()


def test_answers_are_aligned_message_by_message_and_ends_by_their_role(teacher):
    own = tiny.make_tokenizer()
    row, found = read(teacher, CHAT)
    mine, theirs = chunks_of(own, row.input_ids, found.student_chunks), chunks_of(teacher, found.ids, found.chunks)
    assert mine == theirs
    assert joined(mine) == "A token, 日本.|the student reads 1 and 30|"
    assert mine.count(b"|") == 2
    assert teacher.decode(found.ids) == teacher.apply_chat_template(CHAT["messages"], tokenize=False)
    prompt = teacher.apply_chat_template(CHAT["messages"][:3], tokenize=False, add_generation_prompt=True)
    assert teacher.decode(found.ids[: found.prompt_length]) == prompt
    assert found.aligned_bytes == found.answer_bytes == len("A token, 日本.the student reads 1 and 30".encode())
    supervised = [label != NONE for label in row.labels]
    assert [chunk != NONE for chunk in found.student_chunks] == supervised


def test_a_row_that_was_cut_ends_for_the_teacher_where_its_last_chunk_does(teacher):
    own = tiny.make_tokenizer()
    (encoded,) = RowEncoder(own, "assistant", keep_chats=True).encode([CHAT], [None])
    cut = truncate(encoded[0], len(encoded[0].input_ids) - 6)
    (found,) = OtherTokenizer(own, teacher).read([cut], [cut.chat], ["7"])
    mine, theirs = chunks_of(own, cut.input_ids, found.student_chunks), chunks_of(teacher, found.ids, found.chunks)
    assert mine == theirs
    assert joined(theirs).startswith("A token, 日本.|the student")
    assert not joined(theirs).endswith(("30", "|"))
    assert found.chunks[-1] != NONE


def test_text_that_a_template_writes_in_front_of_every_answer_is_in_no_chunk_and_does_not_count():
    own, teacher = tiny.make_tokenizer(), tiny_other.byte_level()
    own.chat_template = THINKS
    row, found = read(teacher, {"messages": CHAT["messages"][:2]}, own)
    assert "<think>" in own.decode(row.input_ids)
    assert joined(chunks_of(own, row.input_ids, found.student_chunks)) == "A token, 日本.|"
    assert found.aligned_bytes == found.answer_bytes
    swapped, of_teacher = read(own, {"messages": CHAT["messages"][:2]}, teacher)
    assert joined(chunks_of(own, of_teacher.ids, of_teacher.chunks)) == "A token, 日本.|"
    assert swapped.input_ids != of_teacher.ids


@pytest.mark.parametrize("row", [{"text": "The path of é"}, {"prompt": "What? ", "completion": "the path é"}])
def test_text_and_pairs_end_as_they_do_for_each(teacher, row):
    own = tiny.make_tokenizer()
    encoded, found = read(teacher, row)
    mine, theirs = chunks_of(own, encoded.input_ids, found.student_chunks), chunks_of(teacher, found.ids, found.chunks)
    assert mine == theirs
    assert joined(mine).endswith("path é|" if "prompt" in row else "of é|")
    assert found.ids[0] == teacher.bos_token_id
    assert found.chunks[0] == NONE  # nothing predicts it


def test_a_row_whose_answers_are_other_texts_is_an_error_that_names_it(teacher):
    own = tiny.make_tokenizer()
    (encoded,) = RowEncoder(own, "assistant", keep_chats=True).encode([CHAT], [None])
    other = encoded[0].chat.replace("A token, \\u65e5\\u672c.", "Nothing").replace("the student reads 1", "no")
    with pytest.raises(DataError, match=r"row 7: \d+ of the \d+ bytes of its answer are the same"):
        OtherTokenizer(own, teacher).read(encoded, [other], ["7"])


def test_what_the_student_writes_is_text_for_the_teacher(teacher):
    own = tiny.make_tokenizer()
    other = OtherTokenizer(own, teacher)
    ids = own("the file </turn> é", add_special_tokens=False)["input_ids"]
    found = other.behind_prompt([1, 5, 6], [*ids, own.eos_token_id], 4, chat=True)
    assert found.ids[:3] == [1, 5, 6]
    assert found.ids[-1] == teacher.eos_token_id
    assert found.ids.count(teacher.eos_token_id) == 1  # what it spelt is text
    assert found.student_chunks[:4] == [NONE] * 4
    assert found.student_chunks[-1] == found.chunks[-1] == max(found.chunks)
    assert joined(chunks_of(teacher, found.ids, found.chunks)) == "the file </turn> é|"
    cut = other.behind_prompt([1, 5, 6], ids, 4, chat=True)
    assert (cut.ids, cut.student_chunks) == (found.ids[:-1], found.student_chunks[:-1])


def test_bytes_that_are_no_text_end_what_the_teacher_reads_and_count_as_unaligned():
    own, teacher = tiny.make_tokenizer(), tiny_other.byte_level()
    half = own("é", add_special_tokens=False)["input_ids"][:1]
    ids = own("a token", add_special_tokens=False)["input_ids"]
    found = OtherTokenizer(own, teacher).behind_prompt([1, 5], [*ids, *half, *ids, own.eos_token_id], 4, chat=True)
    assert teacher.decode(found.ids[2:]) == "a token"
    assert found.student_chunks[4 + len(ids) :] == [NONE] * (len(ids) + 2)
    assert (found.aligned_bytes, found.answer_bytes) == (7, 15)


def test_batches_have_the_chunks_of_both_padded(teacher):
    own = tiny.make_tokenizer()
    batch = Collator(own, other_tokenizer=OtherTokenizer(own, teacher))([CHAT, *tiny.CHATS[:2]])
    tokens = batch.teacher_tokens
    assert batch.student_chunks.numbers.shape == batch.labels.shape
    assert tokens.chunks.shape == tokens.input_ids.shape
    counts = [len({int(c) for c in row if c != NONE}) for row in tokens.chunks]
    assert (
        batch.num_chunks.tolist()
        == counts
        == [len({int(c) for c in row if c != NONE}) for row in batch.student_chunks.numbers]
    )
    assert ((tokens.labels != NONE) == (tokens.chunks != NONE)).all()
    assert batch.without_labels().num_chunks.tolist() == [0, 0, 0]
