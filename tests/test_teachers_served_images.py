"""Targets for rows with images through the chat route, against a server on a real socket."""

import copy
import dataclasses

import pytest
import torch

from kdtrain.data import Collator, Source, build_dataset
from kdtrain.data.images import Image, blanked
from kdtrain.errors import DataError, PreflightError, TeacherError
from kdtrain.teachers.local import LocalTeacher
from kdtrain.teachers.served.http import Servers
from kdtrain.teachers.served.images import ImageRow, image_is_seen, read_image_scores
from kdtrain.teachers.served.teacher import ServedTeacher, rows_to_score
from tests import tiny_processors as vision
from tests.test_data_dataset import write_lines
from tests.test_data_images import ANSWER, IMAGE, QUESTION, TURNS, user
from tests.vision_stub import VisionStub

K = 8
TALK = [user("what is", IMAGE), ANSWER, user(IMAGE, "and then?"), {"role": "assistant", "content": "two"}]


@pytest.fixture(scope="module")
def processor():
    return vision.make_llava()


@pytest.fixture(scope="module")
def model(processor):
    return vision.make_llava_model(len(processor.tokenizer)).eval()


@pytest.fixture
def server(model, processor):
    with VisionStub(model, processor) as stub:
        yield stub


@pytest.fixture
def connect():
    """A teacher of a server; closed at the end."""
    open_servers = []

    def call(stub, vocab_size, **options):
        open_servers.append(Servers([stub.url], max_retries=0))
        return ServedTeacher(
            open_servers[-1], model="teacher", vocab_size=vocab_size, top_k=K, route="prompt_logprobs", **options
        )

    yield call
    for servers in open_servers:
        servers.close()


@pytest.fixture
def batch_of(tmp_path, processor):
    return lambda *rows, **options: make_batch(processor, tmp_path, rows, **options)


def make_batch(processor, folder, rows, **options):
    """One batch of rows that have been through a file, as a run reads them."""
    for i in range(3):
        (folder / f"{i}.png").write_bytes(vision.png(i))
    path = write_lines(folder / "rows.jsonl", list(rows))
    options = {"max_length": None, "on_overlength": "error", "train_on": "assistant", "keep_chats": True, **options}
    dataset, _ = build_dataset([Source(path)], processor, cache_dir=str(folder / "cache"), **options)
    return Collator(processor)(list(dataset))


def row(*images, messages=TALK):
    return {"messages": messages, "images": [f"{i}.png" for i in images]}


ROWS = (row(0, 1), {"messages": TURNS}, row(2, messages=[user(IMAGE), ANSWER]))


def image_row(batch):
    return next(one for one in rows_to_score(batch) if isinstance(one, ImageRow))


def in_process(model, batch):
    """[S, V] log-probabilities of the same model in this process."""
    targets = LocalTeacher(copy.deepcopy(model)).targets(batch).scores
    return targets.logits().log_softmax(-1)


# ---- right answers ---------------------------------------------------------------------------------------------------


def test_targets_of_rows_with_and_without_images_are_those_of_the_model_in_this_process(
    server, model, connect, batch_of, processor
):
    batch = batch_of(*ROWS)
    found = connect(server, len(processor.tokenizer)).targets(batch).scores
    expected = in_process(model, batch)
    assert found.indices.shape == (len(batch.labels_S), K)
    assert torch.allclose(found.logprobs, expected.gather(1, found.indices), atol=1e-5)
    assert torch.equal(found.indices.sort(1).values, expected.topk(K).indices.sort(1).values)
    assert len(server.asked("/chat/completions")) == 2
    assert len(server.asked("/v1/completions")) == 1


def test_a_row_in_two_batches_of_a_window_is_asked_for_once(server, connect, batch_of, processor):
    teacher, batch = connect(server, len(processor.tokenizer)), batch_of(ROWS[0])
    teacher.prepare([batch, batch])
    one, other = teacher.targets(batch).scores, teacher.targets(batch).scores
    assert torch.equal(one.logprobs, other.logprobs)
    assert len(server.asked("/chat/completions")) == 1


def test_only_the_messages_that_a_row_trains_are_sent(server, connect, batch_of, processor):
    connect(server, len(processor.tokenizer)).targets(batch_of(row(0, 1), turns="split"))
    sent = sorted(len(request.body["messages"]) for request in server.asked("/chat/completions"))
    assert sent == [2, 4]


def test_a_row_that_is_cut_gets_the_targets_of_what_is_left_of_it(server, model, connect, batch_of, processor):
    full = batch_of(ROWS[2]).model_inputs["input_ids"].shape[1]
    batch = batch_of(ROWS[2], max_length=full - 4, on_overlength="truncate")
    found = connect(server, len(processor.tokenizer)).targets(batch).scores
    assert torch.allclose(found.logprobs, in_process(model, batch).gather(1, found.indices), atol=1e-5)


def test_another_prompt_in_front_of_the_same_answer_is_matched_from_the_end(server, connect, batch_of, processor):
    """A teacher whose images take other numbers of tokens, or whose template says more before them."""
    batch = batch_of(row(0, messages=[user(IMAGE, "one"), ANSWER]))
    longer = batch_of(row(0, messages=[user(IMAGE, "one and one"), ANSWER]))
    server.on_request = None
    teacher = connect(server, len(processor.tokenizer))
    told = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, chats=longer.rows.chats))
    found, expected = (teacher.targets(one).scores for one in (told, longer))
    assert torch.equal(found.indices, expected.indices)
    assert torch.allclose(found.logprobs, expected.logprobs)
    assert not torch.allclose(teacher.targets(batch).scores.logprobs, found.logprobs)


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_the_server_reads_in_other_tokens_is_refused_with_the_row_and_never_trained_on(
    server, connect, batch_of, processor
):
    batch = batch_of(ROWS[2])
    chats = [batch.rows.chats[0].replace("the path", "the poth")]
    other = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, chats=chats))
    with pytest.raises(TeacherError, match=r"row 0:0: the server has read other tokens than the student"):
        connect(server, len(processor.tokenizer)).targets(other)
    assert len(server.asked("/chat/completions")) == 2  # a wrong reply is asked for once more


def test_one_of_several_turns_in_other_tokens_refuses_the_row(server, connect, batch_of, processor):
    batch = batch_of(row(0, 1))
    chats = [batch.rows.chats[0].replace("the path", "a path")]
    other = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, chats=chats))
    with pytest.raises(TeacherError, match="other tokens than the student"):
        connect(server, len(processor.tokenizer)).targets(other)


def reply_to(tokens, wrong=None, **changes):
    """What a server would say that has read these tokens; all of them are equally likely."""
    entries = {str(i): {"logprob": -3.0, "rank": i + 1, "decoded_token": ""} for i in range(3)}
    scores = [None, *({**entries, str(t): entries.get(str(t), {"logprob": -4.0, "rank": 9})} for t in tokens[1:])]
    return {"prompt_token_ids": list(tokens), "prompt_logprobs": scores, **changes}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids: {"prompt_logprobs": None}, "no prompt_logprobs: this server scores no chats"),
        (lambda ids: {"prompt_token_ids": None}, "no prompt_token_ids"),
        (lambda ids: {"prompt_logprobs": reply_to(ids)["prompt_logprobs"][:-1]}, "positions"),
        (lambda ids: {"prompt_logprobs": [None, *reply_to(ids)["prompt_logprobs"]][:-1]}, "position|tokens|sent"),
        (lambda ids: reply_to(ids[:-1]), "does not write the token that ends an answer"),
        (lambda ids: reply_to([*ids[:-2], ids[-2] + 1, ids[-1]]), "counted from the end, token 2 is"),
    ],
)
def test_a_reply_that_does_not_say_what_it_must_is_refused(batch_of, processor, change, reason):
    asked = image_row(batch_of(ROWS[2]))
    asked = dataclasses.replace(asked, rest=())
    ids = list(asked.tokens.ids)
    assert read_image_scores(reply_to(ids), asked, 3, 400).indices.shape == (len(asked.tokens.predicted), 3)
    with pytest.raises(ValueError, match=reason):
        read_image_scores({**reply_to(ids), **change(ids)}, asked, 3, 400)


def test_rows_whose_messages_are_not_known_are_refused(server, connect, batch_of, processor):
    teacher = connect(server, len(processor.tokenizer))
    with pytest.raises(PreflightError, match="no messages"):
        teacher.targets(batch_of(*ROWS, keep_chats=False))
    assert not server.requests


def test_an_answer_that_was_generated_is_refused(server, connect, batch_of, processor):
    teacher = connect(server, len(processor.tokenizer))
    with pytest.raises(PreflightError, match="an answer that was generated"):
        teacher.prepare([dataclasses.replace(batch_of(ROWS[0]), generated_by="student")])
    text = dataclasses.replace(batch_of({"messages": [QUESTION, ANSWER]}), generated_by="student")
    teacher.prepare([text])  # tokens alone are sent as they are


def test_a_picture_that_is_gone_names_its_row(server, connect, batch_of, processor, tmp_path):
    batch = batch_of(ROWS[2])
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"row 0:0: .*no such image file"):
        connect(server, len(processor.tokenizer)).targets(batch)


# ---- whether images are seen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blind", [False, True])
def test_it_is_found_out_whether_a_server_looks_at_images(model, processor, batch_of, connect, blind):
    asked = image_row(batch_of(ROWS[0]))
    with VisionStub(model, processor, blind=blind) as stub:
        servers, size = connect(stub, len(processor.tokenizer)).servers, len(processor.tokenizer)
        seen = servers.run(image_is_seen(servers, "teacher", asked, top_k=K, vocab_size=size))
    assert seen is not blind


def test_a_blank_image_has_one_colour_and_another_one_than_a_blank_image():
    blank = blanked(Image(data=vision.png(0)))
    assert blank.load().size == vision.picture(0).size
    assert all(low == high for low, high in blank.load().getextrema())
    assert blanked(blank).load().getpixel((0, 0)) != blank.load().getpixel((0, 0))
