"""Rows with images: where images may stand, what is supervised, and how they come through a built data set."""

import base64
import copy
import io
import json
import os
import re
import struct
import unicodedata
import zlib

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import LlavaProcessor

from kdtrain.data import Collator, RowError, Source, build_dataset, encode_row
from kdtrain.data.alignment import Alignment
from kdtrain.data.encoded_row import truncate
from kdtrain.data.images import parse_image
from kdtrain.data.parts import count_images
from kdtrain.data.rows import parse_row
from kdtrain.errors import DataError
from tests import tiny_processors as vision
from tests.test_data_dataset import write_lines
from tests.tiny_processors import picture, png

datasets.disable_progress_bars()

QUESTION, ANSWER = {"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "the path"}
TURNS = [QUESTION, ANSWER, {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "two"}]
IMAGE = {"type": "image"}


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def row(*images, messages=TURNS):
    return {"messages": messages, "images": list(images)}


@pytest.fixture(scope="module", params=vision.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return vision.FAMILIES[family]()


@pytest.fixture(scope="module")
def llava():
    return vision.make_llava()


@pytest.fixture
def build(tmp_path, llava):
    def call(*sources, processor=llava, **options):
        sources = [source if isinstance(source, Source) else Source(str(source)) for source in sources]
        options = {"max_length": None, "on_overlength": "error", "train_on": "assistant", **options}
        return build_dataset(sources, processor, cache_dir=str(tmp_path / "cache"), **options)

    return call


def supervised(encoded, processor):
    return processor.tokenizer.decode([label for label in encoded.labels if label != -100])


# ---------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("markers", [True, False], ids=["markers", "prefixes"])
def test_the_answers_and_their_stop_tokens_are_supervised_and_nothing_else(family, markers):
    processor = vision.FAMILIES[family](markers=markers)
    data = row(picture(0), picture(1, 90, 60))
    assert supervised(encode_row(data, processor, train_on="assistant"), processor) == "the path<|im_end|>two<|im_end|>"
    last = encode_row(data, processor, train_on="last")
    assert supervised(last, processor) == "two<|im_end|>"
    assert processor.tokenizer.decode(last.input_ids[: last.prompt_length]).endswith("<|im_start|>assistant\n")
    everything = encode_row(data, processor, train_on="all")
    images = {processor.tokenizer.convert_tokens_to_ids(name) for name in (processor.image_token, vision._SOFT)}
    assert images & set(everything.input_ids)
    for token, label in list(zip(everything.input_ids, everything.labels, strict=True))[1:]:
        assert label == (-100 if token in images else token)


def test_the_ids_are_those_of_the_processor_itself(processor):
    messages = [user(IMAGE, "\nWhat\n", IMAGE), ANSWER, user("and\n\n", IMAGE), {"role": "assistant", "content": "two"}]
    images = [picture(i, 40 + 25 * i, 32 + 10 * i) for i in range(3)]
    encoded = encode_row(row(*images, messages=messages), processor, train_on="assistant")
    text = processor.apply_chat_template(messages, tokenize=False)
    expected = processor(text=[text], images=[images], add_special_tokens=False)["input_ids"][0]
    assert encoded.input_ids == list(expected)
    assert encoded.text == text
    assert supervised(encoded, processor) == "the path<|im_end|>two<|im_end|>"


def test_rows_of_text_get_the_same_tokens_through_a_processor_as_through_its_tokenizer(processor):
    alone = copy.deepcopy(processor.tokenizer)
    alone.chat_template = processor.chat_template
    texts = [{"messages": TURNS}, {"prompt": "the", "completion": " path"}, {"prompt": "the file"}, {"text": "zero"}]
    for data in texts:
        for train_on in ("assistant", "last", "all"):
            one, two = (encode_row(data, which, train_on=train_on) for which in (processor, alone))
            assert (one.input_ids, one.labels, one.prompt_length) == (two.input_ids, two.labels, two.prompt_length)
            assert one.text is None
            assert one.images == ()


def with_bos(processor):
    """A tokenizer that puts a token in front of what it is given, as Llama's does."""
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[bos])
    return processor


def test_special_tokens_are_left_to_the_chat_template():
    llava = with_bos(vision.make_llava())
    encoded = encode_row(row(picture()), llava, train_on="assistant")
    assert llava.tokenizer.bos_token_id not in encoded.input_ids
    assert Collator(llava)([row(picture())]).model_inputs["input_ids"][0].tolist() == encoded.input_ids


def test_a_processor_that_tokenises_otherwise_than_its_tokenizer_is_an_error_not_a_shifted_mask():
    class OwnWay(LlavaProcessor):
        def __call__(self, *args, add_special_tokens=True, **kwargs):
            return super().__call__(*args, add_special_tokens=True, **kwargs)

    llava = with_bos(vision.make_llava())
    llava.__class__ = OwnWay
    with pytest.raises(DataError, match=r"OwnWay gives a row with images \d+ tokens, and its tokenizer"):
        encode_row(row(picture()), llava, train_on="assistant")


def test_text_that_says_an_image_token_is_refused_and_never_becomes_an_image(processor):
    tokens = {processor.image_token, processor.tokenizer.convert_ids_to_tokens(processor.image_token_ids)[0]}
    for token in tokens:
        said = [{"role": "user", "content": f"What is {token} this?"}, ANSWER]
        answered = [QUESTION, {"role": "assistant", "content": f"the {token}"}]
        two_parts = [user(IMAGE, f"What is {token}?"), ANSWER]
        for data in ({"messages": said}, {"messages": answered}, row(picture(), messages=two_parts), {"text": token}):
            with pytest.raises(RowError, match=re.escape(token)):
                encode_row(data, processor, train_on="assistant")


def test_a_template_that_leaves_images_out_is_named(llava):
    text_only = "{% for m in messages %}{{ m.role }}{{ m.content[-1].text }}{% endfor %}"
    with pytest.raises(RowError, match=r"renders 0 image placeholders .* for 1 images"):
        encode_row(row(picture(), messages=[user(IMAGE, "a"), ANSWER]), llava, train_on="all", chat_template=text_only)


@pytest.mark.parametrize(
    ("text", "expanded", "places"),
    [
        ("ab<i>cd", "abIIIcd", {0: 0, 2: 2, 5: 5, 7: 7}),
        ("<i><i>cd<i>", "I,II,IcdI", {6: 6, 8: 8}),
        ("a<i>\nb<i>c", "a\n\nI\n\n\nbI\n\nIc", {4: 6, 6: 8, 10: 13}),
    ],
)
def test_text_between_images_is_found_again(text, expanded, places):
    alignment = Alignment(text, expanded, "<i>")
    assert {at: alignment.char(at) for at in places} == places


def test_an_expansion_that_cannot_be_followed_is_an_error_not_a_guess():
    with pytest.raises(DataError, match="found more than once"):
        Alignment("a<i>bc<i>d", "aIbcIbcId", "<i>").char(5)
    for changed, lost in (("xaIIbc", "a"), ("aIIb", "bc"), ("aIIcb", "bc"), ("abc", "bc")):
        with pytest.raises(DataError, match=f"changes text besides its images.*: {lost} is not where it was"):
            Alignment("a<i>bc", changed, "<i>")
    with pytest.raises(DataError, match="de is not where it was"):
        Alignment("a<i>de<i>bc", "aIedIbc", "<i>")


# ----------------------------------------------------------------------------------------- where images may stand


def test_images_take_their_places_in_order():
    column = [{"type": "image", "image": "c.png"}]
    cases = [
        (row("a.png", messages=[QUESTION, ANSWER]), [IMAGE, "What is this?"], "a"),
        ({"messages": [QUESTION, ANSWER], "image": "a.png"}, [IMAGE, "What is this?"], "a"),
        (row("a.png", "b.png", messages=[user("x", IMAGE, IMAGE, "y"), ANSWER]), ["x", IMAGE, IMAGE, "y"], "ab"),
        (row("a.png", messages=[user(IMAGE, "x", *column), ANSWER]), [IMAGE, "x", IMAGE], "ac"),
        (row("a.png", "b.png", messages=[user("<image>\nx<image>"), ANSWER]), [IMAGE, "x", IMAGE], "ab"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "d.png"}}, "x")]}, [IMAGE, "x"], "d"),
        (
            {"messages": [user({"type": "image", "path": "e.png"}, {"type": "image", "url": "f.png"})]},
            [IMAGE] * 2,
            "ef",
        ),
        ({"prompt": [QUESTION], "completion": [ANSWER], "images": ["a.png"]}, [IMAGE, "What is this?"], "a"),
        ({"conversations": [{"from": "human", "value": "<image>x"}], "image": "a.png"}, [IMAGE, "x"], "a"),
    ]
    for data, content, names in cases:
        chat = parse_row(data, "/data")
        assert [part.get("text", IMAGE) for part in chat.messages[0]["content"]] == content
        assert [image.path for image in chat.images] == [f"/data/{name}.png" for name in names]
        assert count_images(chat.messages) == len(names)


BAD = [
    (row("a.png", "b.png", messages=[user(IMAGE, "x"), ANSWER]), "2 images in its column and 1 places"),
    (row(messages=[user(IMAGE, "x"), ANSWER]), "0 images in its column and 1 places"),
    (row("a.png", messages=[user("<image> and <image>"), ANSWER]), "says <image> 2 times and the row has 1 images"),
    (row("a.png", messages=[QUESTION, {"role": "assistant", "content": [IMAGE]}]), "assistant's and has an image"),
    (row("a.png", messages=[user({"type": "image", "index": 1}, "x"), ANSWER]), "index 1 where 0 is due"),
    ({"prompt": "the", "completion": "path", "images": ["a.png"]}, "images need a conversation"),
    ({"text": "the", "image": "a.png"}, "images need a conversation"),
    ({**row("a.png"), "image": "b.png"}, "both images and image"),
    (row("https://example.org/a.png"), "images are not downloaded"),
    (row("s3://bucket/a.png"), "images are not downloaded"),
    (row("data:image/png,abc"), "must be base64"),
    (row("data:image/png;base64,%%"), "not valid base64"),
    (row({"path": None, "bytes": None}), "neither path nor bytes"),
    (row(3), "an image is a number"),
    ({"messages": TURNS, "images": "a.png"}, "images must be a list, not text"),
    (row(None), "images holds a null"),
    (row("missing.png"), r"no such image file: /data/missing\.png"),
    (row(b"GIF89a and then nothing"), "given as bytes cannot be read"),
    ({"messages": [user({"type": "video", "video": "a.mp4"}, "x"), ANSWER]}, "videos are not available yet"),
    ({"messages": TURNS, "videos": ["a.mp4"]}, "videos are not available yet"),
    ({"messages": [user({"type": "audio", "audio": "a.wav"}, "x"), ANSWER]}, "sounds are not available yet"),
    ({"messages": [user({"type": "text", "text": "x", "image": "a.png"}), ANSWER]}, "text and an image in one"),
    ({"messages": [user({"type": "image", "text": "x", "image": "a.png"}), ANSWER]}, "an image and text in one"),
    ({"messages": [user({"type": "image", "image": "a.png", "path": "b.png"}, "x"), ANSWER]}, "has two images"),
    ({"messages": [user({"type": "image", "image": "a.png", "base64": "iVBO"}, "x"), ANSWER]}, "has two images"),
    ({"messages": [user({"type": "image", "image": "a.png", "image_url": "b.png"}), ANSWER]}, "image and image_url"),
    (row({"path": "a.png", "url": "b.png"}), "path and url: keep the one"),
    (row({"bytes": b"x", "url": "b.png"}), "bytes and another source"),
    (row({"path": "a.png", "max_pixels": 200}), "max_pixels: the sizes of single images are not read"),
    (row({"path": "a.png", "min_pixels": 200}), "min_pixels: the sizes of single images are not read"),
    ({"messages": [user({"type": "image", "image": "a.png", "resized_height": 28}), ANSWER]}, "resized_height"),
    ({"messages": [user({"type": "image", "image": "a.png", "resized_width": 28}), ANSWER]}, "resized_width"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}), ANSWER]}, "detail"),
    (row("/8j/" + "4AAQ" * 2000), "8004 characters of text, /8j/4AAQ.*neither a path nor an image"),
    (row("iVBORw0K" + "!" * 300), "308 characters of text"),
    (row("/9j/" + "4AAQ" * 2000), "given as bytes cannot be read: its format is unknown"),
]


@pytest.mark.parametrize(("data", "reason"), BAD)
def test_a_row_whose_images_cannot_be_used_says_why(data, reason, llava):
    with pytest.raises(RowError, match=reason):
        encode_row(data, llava, train_on="assistant", folder="/data")


def test_a_tokenizer_refuses_rows_with_images(tokenizer):
    with pytest.raises(RowError, match="no processor for images"):
        encode_row(row(picture()), tokenizer, train_on="assistant")


def test_an_image_is_the_same_however_it_is_given(llava, tmp_path):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a b.png"
    path.write_bytes(png(3))
    encoded = base64.b64encode(png(3)).decode()
    forms = [
        "sub/a b.png",
        str(path),
        "sub/../sub/a b.png",
        path.as_uri(),
        {"path": "sub/a b.png"},
        {"path": "elsewhere.png", "bytes": png(3)},
        png(3),
        f"data:image/png;base64,{encoded}",
        f"data:image/png;base64,{encoded[:70]}\n{encoded[70:]}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(png(3)).decode().rstrip('=')}",
        encoded,
        {"base64": encoded},
        {"bytes": {"base64": encoded}, "path": "sub/a b.png"},
        {"type": "base64", "media_type": "image/png", "data": encoded},
        {"type": "url", "url": "sub/a b.png"},
        "file://sub/a%20b.png",
        f"file://localhost{path}",
        picture(3),
        picture(3).convert("RGBA"),
    ]
    for form in forms:
        one = encode_row(row(form), llava, train_on="assistant", folder=str(tmp_path))
        loaded = one.images[0].load()
        assert loaded.mode == "RGB"
        assert loaded.tobytes() == picture(3).tobytes(), form


def test_an_image_part_of_anthropics_holds_its_own_image(llava):
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png(3)).decode()}
    messages = [user({"type": "image", "source": source}, "x"), ANSWER]
    assert encode_row({"messages": messages}, llava, train_on="assistant").images == (parse_image(png(3), None),)
    with pytest.raises(RowError, match="1 images in its column and 0 places"):
        encode_row(row("a.png", messages=messages), llava, train_on="assistant", folder="/data")


def test_a_jpeg_in_base64_is_an_image_although_it_looks_like_a_path(tmp_path):
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG")
    assert parse_image(base64.b64encode(buffer.getvalue()).decode(), None).data == buffer.getvalue()


def test_bytes_that_differ_from_the_file_of_their_path_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    assert parse_image({"bytes": png(1), "path": "a.png"}, str(tmp_path)).data == png(1)
    with pytest.raises(RowError, match=r"its path .*a\.png is another image"):
        parse_image({"bytes": png(2), "path": "a.png"}, str(tmp_path))


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_is_found_in_either_form_of_unicode(tmp_path, stored):
    (tmp_path / unicodedata.normalize(stored, "é.png")).write_bytes(png())
    for form in ("NFC", "NFD"):
        assert parse_image(unicodedata.normalize(form, "é.png"), str(tmp_path)).load().size == (40, 32)


def test_a_path_through_a_link_opens_the_file_that_the_system_opens(tmp_path):
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "far" / "a.png").write_bytes(png(2))
    assert parse_image("link/../a.png", str(tmp_path)).load().tobytes() == picture(2).tobytes()


TRANSPARENT_ROUNDTRIPS = {
    "RGBA": lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 0)),
    "LA": lambda: Image.new("LA", (8, 8), (0, 0)),
    "half": lambda: Image.new("RGBA", (8, 8), (0, 0, 0, 128)),
    "palette": lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 0)).quantize(4),
    "tRNS": lambda: Image.new("RGB", (8, 8), (1, 2, 3)),
}


@pytest.mark.parametrize("kind", TRANSPARENT_ROUNDTRIPS)
def test_transparent_parts_are_white_and_counted(build, llava, tmp_path, kind):
    image = TRANSPARENT_ROUNDTRIPS[kind]()
    image.save(tmp_path / "a.png", **({"transparency": (1, 2, 3)} if kind == "tRNS" else {}))
    expected = (127, 127, 127) if kind == "half" else (255, 255, 255)
    in_memory = Image.open(tmp_path / "a.png") if kind == "tRNS" else image
    for given in (str(tmp_path / "a.png"), in_memory):
        assert parse_image(given, None).load().getpixel((4, 4)) == expected
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}, row("a.png"), row("a.png")])
    for _ in range(2):
        _, report = build(path)
        assert f"transparent parts of images were filled with white (2 rows, the first: {path}:2)" in report.notes


def test_of_an_animation_the_first_frame_is_read_and_noted(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        image, notes = parse_image(name, str(tmp_path)).load_noted()
        assert image.getpixel((4, 4))[0] > 250
        assert notes == ("of images with several frames or pages the first one is read",)
    frames[0].save(tmp_path / "b.gif")
    assert parse_image("b.gif", str(tmp_path)).load_noted()[1] == ()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_greyscale_of_16_bits_is_scaled_and_noted(tmp_path, file_format):
    deep = Image.fromarray(torch.arange(0, 65536, 1024, dtype=torch.int32).reshape(8, 8).numpy().astype("uint16"))
    deep.save(tmp_path / "a", file_format)
    for given in (str(tmp_path / "a"), deep):
        image, notes = parse_image(given, None).load_noted()
        assert [image.getpixel((x, 7))[0] for x in range(8)] == list(range(224, 256, 4))
        assert notes == ("greyscale images of 16 bits were brought to 8",)


def test_pixels_without_a_known_white_are_refused(tmp_path):
    for name, image in (
        ("floating-point", Image.new("F", (8, 8), 0.5)),
        ("32-bit", Image.new("I", (8, 8), 2**20)),
    ):
        image.save(tmp_path / "a.tiff")
        with pytest.raises(RowError, match=f"a.tiff cannot be used: its pixels are {name} numbers"):
            parse_image("a.tiff", str(tmp_path)).load()
    with pytest.raises(RowError, match="floating-point"):
        parse_image(Image.new("F", (8, 8), 0.5), None)


@pytest.mark.parametrize(
    ("mode", "white"), [("CMYK", (0, 0, 0, 0)), ("1", 1), ("P", 255), ("L", 255), ("YCbCr", (255, 128, 128))]
)
def test_other_modes_stay_as_they_were(tmp_path, mode, white):
    image = Image.new("L", (8, 8), 255).quantize(4) if mode == "P" else Image.new(mode, (8, 8), white)
    image.save(tmp_path / "a.tiff")
    assert parse_image("a.tiff", str(tmp_path)).load_noted()[0].getpixel((4, 4)) == (255, 255, 255)
    assert parse_image("a.tiff", str(tmp_path)).load_noted()[1] == ()


LINE_BREAKS = ["<image>\nWhat?", "What?\n<image>", "<image>\r\nWhat?", "<image>What?"]


@pytest.mark.parametrize("text", LINE_BREAKS)
def test_the_line_break_beside_a_placeholder_is_not_part_of_the_question(processor, text):
    marked = row(picture(), messages=[{"role": "user", "content": text}, ANSWER])
    parts = [IMAGE, "What?"] if text.startswith("<") else ["What?", IMAGE]
    as_at_inference = row(picture(), messages=[user(*parts), ANSWER])
    one, two = (encode_row(data, processor, train_on="assistant") for data in (marked, as_at_inference))
    assert (one.input_ids, one.labels) == (two.input_ids, two.labels)
    note = "the line break beside <image> belongs to it and is left out"
    assert one.notes == ((note,) if "\n" in text else ())


def test_images_are_turned_upright_as_for_inference(llava, tmp_path):
    turned = picture(1, 40, 32)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by 90°
    turned.save(tmp_path / "a.png", exif=exif)
    encoded = encode_row(row("a.png"), llava, train_on="assistant", folder=str(tmp_path))
    assert encoded.images[0].load().size == (32, 40)
    as_object = encode_row(row(Image.open(tmp_path / "a.png")), llava, train_on="assistant")
    assert as_object.images[0].load().size == (32, 40)


def test_pillow_images_of_a_source_in_memory_are_those_of_a_batch_whatever_their_mode(build, llava, tmp_path):
    picture(1, 40, 32).convert("CMYK").save(tmp_path / "a.jpg")  # a mode that PNG does not have
    turned = picture(1, 40, 32)
    turned.getexif()[0x0112] = 6
    for image in (Image.open(tmp_path / "a.jpg"), turned):
        dataset, _ = build(Source("in memory", rows=[row(image)]))
        expected = encode_row(row(image), llava, train_on="assistant")
        assert dataset[0]["images"] == [expected.images[0].record]
        assert dataset[0]["input_ids"] == expected.input_ids


# --------------------------------------------------------------------------------------------------- over-length


def test_no_length_cuts_an_image(processor):
    data = row(picture(0), picture(1, 90, 60))
    whole = encode_row(data, processor, train_on="all")
    last = max(i for i, token in enumerate(whole.input_ids) if token in set(processor.image_token_ids))
    assert last < whole.images_end < whole.prompt_length
    for limit in range(2, len(whole.input_ids) + 1):
        cut = truncate(whole, limit)
        assert (cut is None) == (limit < whole.images_end), limit
        assert cut is None or cut.input_ids == whole.input_ids[:limit]


def test_a_cut_row_is_not_generated_from_where_its_prompt_lacks_an_image(llava):
    messages = [
        QUESTION,
        ANSWER,
        user(IMAGE, "and then, when they are equal?"),
        {"role": "assistant", "content": "two"},
    ]
    whole = encode_row(row(picture(), messages=messages), llava, train_on="assistant")
    cut = truncate(whole, whole.images_end + 2)
    assert cut.supervised > 0
    assert cut.prompt_length == 0
    assert truncate(whole, len(whole.input_ids) - 1).prompt_length == whole.prompt_length


def ends_of(stored, processor):
    return max(i for i, token in enumerate(stored[0]["input_ids"]) if token == processor.image_token_id) + 1


def test_rows_that_would_lose_image_tokens_or_their_answer_are_dropped_and_counted(build, llava, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    two, none = row("a.png", "a.png"), {"messages": TURNS}
    path = write_lines(tmp_path / "a.jsonl", [two, row("a.png"), none])
    ends = encode_row(row("a.png"), llava, train_on="assistant", folder=str(tmp_path)).images_end
    limit = ends + 25
    dataset, report = build(path, max_length=limit, on_overlength="truncate")
    assert (report.dropped, report.truncated, report.image_rows, report.images) == (1, 2, 1, 1)
    assert dataset["row_id"][:] == ["0:1", "0:2"]
    with pytest.raises(DataError, match=f"longer than max_length \\({limit} tokens\\)"):
        build(path, max_length=limit)
    batch = Collator(llava)(list(dataset))
    assert batch.model_inputs["input_ids"].shape == (2, limit)
    full, _ = build(path)
    late = [QUESTION, ANSWER, user(IMAGE, "and then?"), ANSWER]
    stored, _ = build(write_lines(tmp_path / "b.jsonl", [row("a.png", messages=late), row("a.png", messages=late)]))
    for short, kept in ((-1, 0), (0, 2)):
        collate = Collator(llava, max_length=ends_of(stored, llava) + short, on_overlength="truncate")
        assert len(collate([*stored, full[2]]).rows.ids) == kept + 1


def test_of_a_batch_rows_that_lose_image_tokens_are_left_out_and_those_that_lose_answers_stay(build, llava, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    full, _ = build(write_lines(tmp_path / "a.jsonl", [row("a.png", "a.png"), row("a.png")]))
    ends = ends_of(full, llava)
    cut = Collator(llava, max_length=ends, on_overlength="truncate")(list(full))
    assert cut.visual_sizes == {"pixel_values": [2, 1]}
    assert (cut.model_inputs["input_ids"] == llava.image_token_id).sum(1).tolist() == [
        row["input_ids"].count(llava.image_token_id) for row in full
    ]
    assert (cut.labels == -100).all(1).tolist() == [True, True]
    assert cut.rows.truncated == [True, True]
    assert cut.rows.places is None
    cut = Collator(llava, max_length=ends - 1, on_overlength="truncate")(list(full))
    assert (cut.rows.ids, cut.rows.places, cut.visual_sizes) == (["0:1"], [1], {"pixel_values": [1]})
    with pytest.raises(DataError, match="images that do not fit"):
        Collator(llava, max_length=ends - 1, on_overlength="truncate")([full[0]])


# --------------------------------------------------------------------------------------------------- built data


def test_a_data_set_with_images_keeps_text_and_paths_and_counts_them(build, llava, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    rows = [row("pictures/0.png", "pictures/1.png"), {"messages": TURNS}, row("pictures/2.png")]
    dataset, report = build(write_lines(tmp_path / "a.jsonl", rows), num_proc=2)
    assert dataset.column_names == ["input_ids", "labels", "prompt_length", "ce", "row_id", "text", "images"]
    assert (report.image_rows, report.images) == (2, 3)
    assert "2 rows with images (3 in all)" in report.summary()
    names = [[os.path.relpath(image["path"], tmp_path) for image in images] for images in dataset["images"]]
    assert names == [["pictures/0.png", "pictures/1.png"], [], ["pictures/2.png"]]
    assert dataset[0]["text"].count("<image>") == 2
    assert dataset[1]["text"] is None
    direct = Collator(llava)([row(picture(0), picture(1)), {"messages": TURNS}, row(picture(2))])
    built = Collator(llava)(list(dataset))
    assert built.visual_sizes == direct.visual_sizes == {"pixel_values": [2, 0, 1]}
    assert torch.equal(built.labels, direct.labels)
    for key in ("input_ids", "pixel_values"):
        assert torch.equal(built.model_inputs[key], direct.model_inputs[key]), key


def test_a_data_set_without_images_has_no_columns_for_them(build, tmp_path):
    dataset, report = build(write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}]))
    assert dataset.column_names == ["input_ids", "labels", "prompt_length", "ce", "row_id"]
    assert report.images == 0
    assert "images" not in report.summary()


def as_structs():
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}),
        }
    )
    return datasets.Dataset.from_list([row({"bytes": png(i), "path": "x.png"}) for i in range(2)], features=features)


TURNS_AS_PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS[1:]]
PART = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
PART_MESSAGE = {"role": datasets.Value("string"), "content": datasets.List(PART)}
TABLES = {
    "images": lambda: datasets.Dataset.from_list([row(picture(i)) for i in range(2)]).cast_column(
        "images", datasets.List(datasets.Image())
    ),
    "bytes": as_structs,
    "one": lambda: datasets.Dataset.from_list([{"messages": TURNS, "image": picture(i)} for i in range(2)]),
    "binary": lambda: datasets.Dataset.from_list([{"messages": TURNS, "image": png(i)} for i in range(2)]),
    "parts": lambda: datasets.Dataset.from_list(
        [
            {"messages": [user({"type": "image", "image": picture(i)}, "What is this?"), *TURNS_AS_PARTS]}
            for i in (0, 1)
        ],
        features=datasets.Features({"messages": datasets.List(PART_MESSAGE)}),
    ),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("stored", ["parquet", "folder"])
def test_images_inside_tables_are_read(build, llava, tmp_path, kind, stored):
    table, path = TABLES[kind](), tmp_path / f"a.{stored}"
    if stored == "parquet":
        table.to_parquet(str(path))
    else:
        table.save_to_disk(str(path))
    dataset, report = build(path)
    assert (report.image_rows, report.bad_rows) == (2, 0)
    batch = Collator(llava)(list(dataset))
    expected = Collator(llava)([row(picture(i)) for i in range(2)])
    assert (batch.model_inputs["pixel_values"] == expected.model_inputs["pixel_values"]).all()


def test_a_missing_file_is_a_bad_row_with_its_place(build, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = write_lines(tmp_path / "a.jsonl", [row("a.png"), row("b.png"), {"messages": TURNS, "image": "a.png"}])
    _, report = build(path, max_bad_rows=1)
    assert (report.bad_rows, report.rows_kept, report.images) == (1, 2, 2)
    assert report.first_bad == [f"{path}:2: no such image file: {tmp_path / 'b.png'}"]
    with pytest.raises(DataError, match=r"1 of 3 rows cannot be used"):
        build(path)


def test_rows_are_encoded_again_when_an_image_or_the_processor_changes(build, tmp_path, llava):
    image = tmp_path / "a.png"
    image.write_bytes(png(0))
    path = write_lines(tmp_path / "a.jsonl", [row("a.png")])

    def entries(**options):
        build(path, **options)
        return {entry.name for entry in (tmp_path / "cache").iterdir()}

    first = entries()
    assert entries() == first
    os.utime(image, (1, 1))
    second = entries()
    assert len(second) == 2
    image.write_bytes(png(1, 80, 60))
    assert len(entries()) == 3
    assert len(entries(processor=vision.make_llava(patch=4))) == 4
    assert len(entries(processor=vision.make_llava(image_mean=[0.1, 0.2, 0.3]))) == 5
    image.unlink()
    with pytest.raises(DataError, match="no such image file"):
        build(path)


# ------------------------------------------------------------------------------------------------ answers: teacher


def test_rows_for_the_teacher_end_before_their_answer(build, llava, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        row("a.png"),
        {"prompt": [user(IMAGE, "a")], "completion": [ANSWER, user(IMAGE, "b"), ANSWER], "images": ["a.png", "a.png"]},
        {"prompt": "the file", "completion": " path"},
        {"prompt": "the file"},
        {"messages": [QUESTION]},
    ]
    asked = Source(write_lines(tmp_path / "a.jsonl", rows), answers="teacher")
    own = Source(write_lines(tmp_path / "b.jsonl", [{"messages": TURNS}, {"prompt": "the file"}]))
    dataset, report = build(asked, own)
    assert dataset["answers"][:] == [True] * 5 + [False] * 2
    assert (report.teacher_answer_rows, report.prompt_only_rows) == (5, 1)
    assert "5 rows get their answer from the teacher" in report.summary()
    prompts = [
        {**row("a.png"), "messages": TURNS[:3]},
        row("a.png", messages=[user(IMAGE, "a")]),
        {"prompt": "the file"},
        {"prompt": "the file"},
        {"messages": [QUESTION]},
    ]
    for got, prompt in zip(dataset, prompts, strict=False):
        expected = encode_row(prompt, llava, train_on="assistant", folder=str(tmp_path))
        assert got["input_ids"] == expected.input_ids
        assert got["prompt_length"] == len(got["input_ids"])
        assert set(got["labels"]) == {-100}
    assert "answers" not in build(own)[0].column_names


def test_rows_that_leave_the_teacher_nothing_to_answer_are_bad(build, tmp_path):
    for data, reason in [
        ({"text": "zero"}, "plain text has no prompt"),
        ({"messages": [ANSWER]}, "nothing before its answer"),
        ({"messages": [QUESTION, ANSWER, ANSWER]}, "two assistant messages at its end"),
    ]:
        with pytest.raises(DataError, match=reason):
            build(Source(write_lines(tmp_path / "a.jsonl", [data]), answers="teacher"))
    with pytest.raises(DataError, match="answers must be one of data, teacher, not teachers"):
        build(Source(write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}]), answers="teachers"))


def test_the_same_rows_for_the_teacher_are_other_rows_in_the_cache(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}])
    assert len(build(path)[0][0]["input_ids"]) > len(build(Source(path, answers="teacher"))[0][0]["input_ids"])


def test_json_rows_keep_their_bytes_as_base64(llava):
    data = json.loads(json.dumps(row({"base64": base64.b64encode(png(2)).decode()})))
    assert encode_row(data, llava, train_on="assistant").images[0].data == png(2)


def test_a_column_mapping_that_does_not_speak_of_images_keeps_them(tmp_path):
    """They were dropped, and the row trained on blind."""
    question = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
    vision.picture(1).save(tmp_path / "1.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"dialog": question, "images": ["1.png"]}) + "\n")
    source = Source(str(tmp_path / "d.jsonl"), columns={"messages": "dialog"})
    _, report = build_dataset([source], vision.make_llava(), max_length=None, on_overlength="error", train_on="last")
    assert report.images == 1


def test_an_image_that_could_not_be_read_is_tried_again(build, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    path = write_lines(tmp_path / "a.jsonl", [row("a.png"), {"messages": TURNS}])
    allowed = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # as a limit, a right or a library that is put right later
    for _ in range(2):
        _, report = build(path, max_bad_rows=1)
        assert report.bad_rows == 1
        assert "a.png cannot be read: Image size (1280 pixels) exceeds limit" in report.first_bad[0]
        (entry,) = (tmp_path / "cache").iterdir()
        written = entry.stat().st_ctime_ns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", allowed)
    assert build(path, max_bad_rows=1)[1].bad_rows == 0
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.stat().st_ctime_ns > written
    assert build(path)[1].images == 1


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(kind):
    """A small file that says it is 20,000 × 20,000 pixels, or whose text becomes far longer when it is unpacked."""
    if kind == "BMP":
        header = struct.pack("<IiiHHIIiiII", 40, 20000, 20000, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54 + len(header), 0, 0, 54) + header
    side = 8 if kind == "text" else 20000
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20))) if kind == "text" else b""
    pixels = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
    size = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + text + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "text"])
def test_an_image_that_would_fill_the_memory_is_a_bad_row_however_it_is_given(build, tmp_path, kind):
    data = bomb(kind)
    assert len(data) < 100_000
    (tmp_path / "a.img").write_bytes(data)
    encoded = base64.b64encode(data).decode()
    rows = [row(one) for one in ("a.img", f"data:image/png;base64,{encoded}", {"bytes": {"base64": encoded}})]
    (tmp_path / "b.png").write_bytes(png())
    path = write_lines(tmp_path / "a.jsonl", [*rows, row("b.png")])
    dataset, report = build(path, max_bad_rows=3)
    assert (len(dataset), report.bad_rows) == (1, 3)
    said = "too large" if kind == "text" else r"Image size \(400000000 pixels\) exceeds limit"
    assert all(re.search(rf"image .* cannot be read: .*{said}", one) for one in report.first_bad[:3]), report.first_bad
    with pytest.raises(DataError, match=said):
        build(path)


def test_other_bad_rows_stay_as_they_were_stored(build, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": []}, {"messages": TURNS}])
    build(path, max_bad_rows=1)
    monkeypatch.setattr("kdtrain.data.cache.encode_batch", None)
    assert build(path, max_bad_rows=1)[1].bad_rows == 1


def test_an_image_that_was_replaced_without_a_trace_in_size_and_time_is_encoded_anew(build, llava, tmp_path):
    """As copies do that keep the times: before the run, and between two of its starts."""
    image = tmp_path / "a.png"
    small, large = (io.BytesIO() for _ in range(2))
    Image.new("RGB", (16, 16)).save(small, "BMP")
    Image.new("RGB", (64, 64)).save(large, "BMP")
    image.write_bytes(small.getvalue().ljust(20000, b"\0"))
    os.utime(image, (1, 1))
    path = write_lines(tmp_path / "a.jsonl", [row("a.png")])
    qwen = vision.make_qwen()
    before, _ = build(path, processor=qwen)
    image.write_bytes(large.getvalue().ljust(20000, b"\0"))
    os.utime(image, (1, 1))
    with pytest.raises(DataError, match=r"row 0:0: the processor gives it other tokens .* Start the run again"):
        Collator(qwen)(list(before))
    after, _ = build(path, processor=qwen)
    assert len(Collator(qwen)(list(after)).rows.ids) == 1


def test_the_most_unusual_images_of_each_source_are_known_with_their_places(build, tmp_path):
    sizes = [(40, 40), (48, 40), (16, 60), (90, 90), (20, 20), (20, 120)]
    for i, (width, height) in enumerate(sizes):
        picture(i, width, height).save(tmp_path / f"{i}.png")
    rows = [{"messages": TURNS}, row("0.png", "3.png"), *(row(f"{i}.png") for i in (1, 2, 4, 5, 0))]
    one = write_lines(tmp_path / "one.jsonl", rows)
    two = write_lines(tmp_path / "two.jsonl", [row("missing.png"), row("1.png")])
    _, report = build(one, Source(str(two), weight=2), processor=vision.make_qwen(), max_bad_rows=1)
    smallest, largest, narrowest, longest = 4, 1, 3, 5
    assert report.image_extremes == [
        *((at, f"{one}:{at + 1}") for at in (smallest, largest, narrowest, longest)),
        (7, f"{two}:2"),
    ]
    assert build(write_lines(tmp_path / "text.jsonl", [{"messages": TURNS}]))[1].image_extremes == []


def test_a_row_that_is_cut_behind_a_later_image_carries_the_turns_that_begin_in_it(build, tmp_path, llava):
    messages = [user("one"), ANSWER, user(IMAGE, "two"), ANSWER, user("three"), ANSWER]
    image = "data:image/png;base64," + base64.b64encode(png(1)).decode()
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages, "images": [image]}])
    whole, _ = build(path)
    labels = whole[0]["labels"]
    answers = [i for i in range(1, len(labels)) if labels[i - 1] == -100 != labels[i]]
    for turns, start in enumerate(answers[1:], start=2):  # the first one stands before the image
        options = {"keep_chats": True, "max_length": start + 1, "on_overlength": "truncate"}
        dataset, report = build(path, **options)
        assert report.truncated == 1
        assert len(json.loads(dataset["chat"][0])["messages"]) == 2 * turns


def test_a_row_with_images_carries_its_messages_and_a_batch_the_pictures(build, tmp_path, llava):
    (tmp_path / "a.png").write_bytes(png(1))
    messages = [user("one", IMAGE, "and", IMAGE), ANSWER, user(IMAGE, "last"), ANSWER]
    data = [base64.b64encode(png(i)).decode() for i in (2, 3)]
    rows = [
        {"messages": messages, "images": ["a.png", *(f"data:image/png;base64,{text}" for text in data)]},
        {"messages": TURNS},
    ]
    dataset, _ = build(write_lines(tmp_path / "a.jsonl", rows), keep_chats=True)
    chats = [json.loads(text)["messages"] for text in dataset["chat"][:]]
    assert chats == [messages, TURNS]
    images = Collator(llava)(list(dataset)).rows.images
    assert [image.content() for image in images[0]] == [png(1), png(2), png(3)]
    assert images[1] == ()
