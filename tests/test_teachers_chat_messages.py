"""Conversations as OpenAI's chat API is given them."""

import base64
import io
import json

import pytest
from PIL import Image as Pillow

from kdtrain.data.images import Image, ImageError
from kdtrain.teachers.served.chat_messages import chat_payload, data_uri
from tests.tiny_processors import picture, png


def decoded(uri):
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return Pillow.open(io.BytesIO(base64.b64decode(content)))


def test_images_stand_where_their_parts_do():
    text = {"type": "text", "text": "and"}
    messages = [
        {"role": "user", "content": [{"type": "image"}, text, {"type": "image"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    images = [Image(data=png(i)) for i in range(4)]  # the last one belongs to a message that was cut
    payload = chat_payload({"messages": messages, "tools": None, "chat_template_kwargs": {}}, images)
    assert payload.keys() == {"messages"}
    first, answer, last = payload["messages"]
    assert answer == messages[1]
    assert [part["type"] for part in first["content"]] == ["image_url", "text", "image_url"]
    assert first["content"][1] == text
    parts = [first["content"][0], first["content"][2], last["content"][0]]
    for i, part in enumerate(parts):
        assert decoded(part["image_url"]["url"]).tobytes() == picture(i).tobytes()
    assert messages[0]["content"][0] == {"type": "image"}  # the row's own stays as it was


def test_a_picture_is_sent_as_a_person_sees_it(tmp_path):
    turned = picture(0, 40, 32)
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert decoded(data_uri(Image(str(tmp_path / "turned.png")))).size == (32, 40)
    Pillow.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    clear = decoded(data_uri(Image(str(tmp_path / "clear.png"))))
    assert (clear.mode, clear.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    with pytest.raises(ImageError, match="no such image file"):
        data_uri(Image(str(tmp_path / "lost.png")))


def test_tools_template_arguments_and_calls_go_along():
    call = {"type": "function", "function": {"name": "count", "arguments": {"to": 3}}}
    chat = {
        "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    payload = chat_payload(chat)
    assert payload["tools"] == chat["tools"]
    assert payload["chat_template_kwargs"] == {"enable_thinking": False}
    arguments = payload["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"to": 3}  # text, as the API has it
