"""Pictures of every format reach a model as a person sees them: upright, on white, with 8 bits; for every family."""

import gc
import json
import tracemalloc

import pytest
import torch
from PIL import Image, ImageOps

from kdtrain.data import Collator, RowError, Source, build_dataset
from kdtrain.errors import DataError
from kdtrain.models.layouts import LAYOUTS
from kdtrain.models.processing import load_processing
from tests import tiny_processors as vision
from tests.layout_processors import BY_MODEL_TYPE, MAKERS, make_paligemma
from tests.tiny_processors import picture

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": "cat"}
TURNED = 0x0112  # EXIF: how a picture is to be turned
# A picture is brought to RGB before any processor sees it: every format is shown to two of them, which keep the shape
# of an image and cut it into tiles, and to each of the others what they may take otherwise.
OF_EVERY_FORMAT = ("qwen3", "llava_next")
SOME = ("transparent and turned", "16 bits and turned", "one pixel", "a line", "large")


def noise(mode="RGB", width=40, height=32):
    return picture(5, width, height).convert(mode)


def half_transparent(mode):
    image = noise("RGBA")
    image.putalpha(noise("L"))
    return image.convert(mode)


def on_white(image):
    """By hand, in floating-point numbers: what is transparent lets white through."""
    pixels = torch.tensor(list(image.convert("RGBA").get_flattened_data()), dtype=torch.float64)
    alpha = pixels[:, 3:] / 255
    seen = (pixels[:, :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return Image.fromarray(seen.reshape(image.height, image.width, 3).numpy(), "RGB")


def deep(values):
    return Image.fromarray(values.to(torch.int32).numpy().astype("uint16"))


def sixteen_bits():
    values = torch.arange(0, 65536, 51).reshape(-1)[: 32 * 40].reshape(32, 40)
    seen = Image.fromarray((values // 256).to(torch.uint8).numpy(), "L").convert("RGB")
    return deep(values), seen


def palette_with_alpha():
    image = half_transparent("RGBA").quantize(8)
    return image, on_white(image)


def one_colour_is_transparent():
    """As PNG's tRNS: pixels of that colour are not there."""
    image = Image.new("RGB", (40, 32), (200, 10, 10))
    image.paste((1, 2, 3), (0, 0, 20, 32))
    seen = image.copy()
    seen.paste("white", (0, 0, 20, 32))
    return image, seen


def turned(how):
    image = noise()
    image.getexif()[TURNED] = how
    return image, ImageOps.exif_transpose(image)


def transparent_and_turned():
    image = half_transparent("RGBA")
    image.getexif()[TURNED] = 6
    return image, on_white(ImageOps.exif_transpose(image))


def deep_and_turned():
    values = torch.arange(32 * 40).reshape(32, 40) * 51
    image, upright = deep(values), deep(values.flip(0).T.contiguous())
    image.getexif()[TURNED] = 6
    seen = torch.tensor(list(upright.get_flattened_data())).reshape(40, 32) // 256
    return image, Image.fromarray(seen.to(torch.uint8).numpy(), "L").convert("RGB")


def as_it_is(mode, width=40, height=32):
    image = noise(mode, width, height)
    return image, image.convert("RGB")


def palette():
    image = noise().quantize(8)
    return image, image.convert("RGB")


# What is saved as which kind of file, and what a person sees.
PICTURES = {
    "RGBA": ("png", lambda: (half_transparent("RGBA"), on_white(half_transparent("RGBA")))),
    "RGBA WebP": ("webp", lambda: (half_transparent("RGBA"), on_white(half_transparent("RGBA")))),
    "LA": ("png", lambda: (half_transparent("LA"), on_white(half_transparent("LA")))),
    "palette with alpha": ("png", palette_with_alpha),
    "one transparent colour": ("png", one_colour_is_transparent),
    "16-bit PNG": ("png", sixteen_bits),
    "16-bit TIFF": ("tiff", sixteen_bits),
    "turned by 90": ("png", lambda: turned(6)),
    "mirrored": ("png", lambda: turned(5)),
    "transparent and turned": ("png", transparent_and_turned),
    "16 bits and turned": ("png", deep_and_turned),
    "CMYK": ("tiff", lambda: as_it_is("CMYK")),
    "1 bit": ("png", lambda: as_it_is("1")),
    "palette": ("png", palette),
    "grey": ("png", lambda: as_it_is("L")),
    "one pixel": ("png", lambda: as_it_is("RGB", 1, 1)),
    "a line": ("png", lambda: as_it_is("RGB", 200, 2)),
    "large": ("png", lambda: as_it_is("RGB", 150, 110)),
}
SAVED = {"webp": {"lossless": True, "exact": True}}


def save(image, path, name):
    options = SAVED.get(path.suffix[1:], {})
    if TURNED in image.getexif():
        options["exif"] = image.getexif()
    image.save(path, **options, **({"transparency": (1, 2, 3)} if name == "one transparent colour" else {}))


def by_hand(processor, image):
    text = processor.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    return processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")


def assert_same(batch, expected):
    assert set(batch) == set(expected)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@pytest.fixture(scope="module", params=OF_EVERY_FORMAT)
def processor(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_reaches_the_model_as_a_person_sees_it(processor, tmp_path, name):
    suffix, make = PICTURES[name]
    image, seen = make()
    path = tmp_path / f"a.{suffix}"
    save(image, path, name)
    expected = by_hand(processor, seen)
    given = [str(path), path.read_bytes()]
    if name != "one transparent colour":  # which only its file knows
        given.append(image)
    for one in given:
        batch = Collator(processor)([{"messages": [QUESTION, ANSWER], "images": [one]}])
        assert_same(dict(batch.model_inputs), expected)


def test_every_family_of_the_layout_table_has_its_processor_here():
    assert BY_MODEL_TYPE.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("family", [name for name in MAKERS if name != "paligemma"])
def test_pictures_of_a_data_file_reach_the_model_of_every_family_so(family, tmp_path):
    """The rows that training reads: encoded, stored and collated."""
    processor, rows, expected = MAKERS[family](), [], []
    for i, name in enumerate(PICTURES if family in OF_EVERY_FORMAT else SOME):
        suffix, make = PICTURES[name]
        image, seen = make()
        save(image, tmp_path / f"{i}.{suffix}", name)
        rows.append({"messages": [QUESTION, ANSWER], "images": [f"{i}.{suffix}"]})
        try:
            expected.append(by_hand(processor, seen))
        except ValueError:  # Pixtral's cannot make a line larger
            assert (family, name) in (("pixtral", "a line"), ("mistral3", "a line"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, report = build_dataset(
        [Source(str(tmp_path / "a.jsonl"))], processor, cache_dir=str(tmp_path / "cache"),
        max_length=None, on_overlength="error", train_on="assistant", max_bad_rows=1,
    )  # fmt: skip
    assert len(dataset) == len(expected) == len(rows) - report.bad_rows
    for row, one in zip(dataset, expected, strict=True):
        assert_same(dict(Collator(processor)([row]).model_inputs), one)


def test_a_processor_that_takes_prompt_and_answer_apart_is_refused_by_name():
    """PaliGemma's, which also marks the answer: all of it would be read as prompt, and see its own later tokens."""
    with pytest.raises(DataError, match="PaliGemmaProcessor takes prompt and answer apart") as error:
        Collator(make_paligemma())([{"messages": [QUESTION, ANSWER], "images": [picture()]}])
    assert not isinstance(error.value, RowError)  # no row could work: the first one ends the run


def test_settings_reach_the_processor_of_each_side(tmp_path):
    """`data.processor_kwargs` the student's, `rlhf.teacher.processor_kwargs` the teacher's: pixels as by hand."""
    normal = vision.make_llava()
    vision.make_model("llava", normal).config.save_pretrained(tmp_path / "llava")
    normal.save_pretrained(tmp_path / "llava")
    settings = {"student": {"image_mean": [0.1, 0.2, 0.3]}, "teacher": {"image_mean": [0.9, 0.8, 0.7]}}
    folder = str(tmp_path / "llava")
    sides = {side: load_processing(folder, processor_kwargs=kwargs) for side, kwargs in settings.items()}
    row = {"messages": [QUESTION, ANSWER], "images": [picture(1)]}
    batch = Collator(sides["student"], sides["teacher"])([row])
    expected = {side: by_hand(vision.make_llava(**kwargs), picture(1)) for side, kwargs in settings.items()}
    assert_same(dict(batch.model_inputs), expected["student"])
    assert torch.equal(batch.teacher_images.inputs["pixel_values"], expected["teacher"]["pixel_values"])
    assert not torch.equal(expected["student"]["pixel_values"], expected["teacher"]["pixel_values"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "onevision"])
def test_many_sizes_of_images_take_no_more_memory(family):
    """240 sizes: nothing is kept for a size that comes once."""
    collate = Collator(MAKERS[family]())

    def collate_sizes(sizes):
        for i in sizes:
            collate([{"messages": [QUESTION, ANSWER], "images": [picture(0, 20 + i % 16, 20 + i // 16)]}])
        gc.collect()

    collate_sizes(range(40))
    tracemalloc.start()
    try:
        collate_sizes(range(40, 240))
        assert tracemalloc.get_traced_memory()[0] < 500_000
    finally:
        tracemalloc.stop()
