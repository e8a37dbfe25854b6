"""Rows with images and a real vLLM server. Its LLaVA, Qwen-VL, Gemma3 want torchvision, which has no CPU build."""

import pytest
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from kdtrain.teachers.served.http import Servers
from kdtrain.teachers.served.images import image_is_seen
from kdtrain.teachers.served.teacher import ServedTeacher
from tests import tiny_processors as vision
from tests.test_data_images import ANSWER, IMAGE, TURNS, user
from tests.test_teachers_served_images import TALK, image_row, in_process, make_batch, row
from tests.vllm_server import running

pytestmark = pytest.mark.server
K = 16


@pytest.fixture(scope="module")
def processor():
    return vision.make_idefics3()


@pytest.fixture(scope="module")
def model(processor):
    """Heads of 32: vLLM has no CPU kernel for smaller ones."""
    torch.manual_seed(0)
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 384, "num_key_value_heads": 1, "initializer_range": 0.2, "max_position_embeddings": 512}
    config = Idefics3Config(
        vision_config={**shared, "model_type": "idefics3_vision", "image_size": 32, "patch_size": 8},
        text_config={**shared, **text, "model_type": "llama", "pad_token_id": 3, "eos_token_id": 2},
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return Idefics3ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def teacher(processor, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with running(str(folder / "model"), folder / "server.log") as url:
        servers = Servers([url])
        yield ServedTeacher(servers, model="teacher", vocab_size=384, top_k=K, route="prompt_logprobs")
        servers.close()


def test_targets_are_those_of_the_model_in_this_process(teacher, model, processor, tmp_path):
    """Images of several tiles, several of them, several turns, and a row of text beside them."""
    rows = [row(0, 1), {"messages": TURNS}, row(2, messages=[user("one", IMAGE, "two"), ANSWER])]
    batch = make_batch(processor, tmp_path, rows)
    found, expected = teacher.targets(batch).scores, in_process(model, batch)
    assert found.indices.shape == (len(batch.labels_S), K)
    assert torch.allclose(found.logprobs, expected.gather(1, found.indices), atol=1e-3)
    assert torch.equal(found.indices.sort(1).values, expected.topk(K).indices.sort(1).values)


def test_each_row_of_a_split_conversation_is_scored_by_itself(teacher, model, processor, tmp_path):
    batch = make_batch(processor, tmp_path, [row(0, 1, messages=TALK)], turns="split")
    found = teacher.targets(batch).scores
    assert torch.allclose(found.logprobs, in_process(model, batch).gather(1, found.indices), atol=1e-3)


def test_the_server_looks_at_the_image(teacher, processor, tmp_path):
    asked = image_row(make_batch(processor, tmp_path, [row(2, messages=[user(IMAGE), ANSWER])]))
    servers = teacher.servers
    assert servers.run(image_is_seen(servers, "teacher", asked, top_k=K, vocab_size=384))
