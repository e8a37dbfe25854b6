"""Images and sounds under other names, and text that stands for one: read, refused or noted, never passed over."""

import json

import datasets
import pytest

from kdtrain.data import RowError, Source, build_dataset, encode_row
from kdtrain.errors import DataError
from tests import tiny_processors as vision
from tests.test_data_dataset import write_lines
from tests.tiny_processors import png

ANSWER = {"role": "assistant", "content": "cat"}
IMAGE = {"type": "image"}


def chat(question="What?", answer="cat", **columns):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


@pytest.fixture(scope="module", params=vision.FAMILIES)
def processor(request):
    return vision.FAMILIES[request.param]()


@pytest.fixture(scope="module")
def qwen():
    return vision.make_qwen()


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(ord(name[0])))
    return tmp_path


@pytest.fixture
def build(folder, qwen):
    def call(path, processor=qwen, columns=None, **options):
        options = {"max_length": None, "on_overlength": "error", "train_on": "assistant", **options}
        source = Source(str(path), columns=columns)
        return build_dataset([source], processor, cache_dir=str(folder / "cache"), **options)

    return call


def images_of(row, processor, folder):
    encoded = encode_row(row, processor, train_on="assistant", folder=str(folder))
    return [image.path.rpartition("/")[2] for image in encoded.images]


# ---- text that stands for an image or a sound

PARTS = [IMAGE, {"type": "text", "text": "What is <image>?"}]
BLIND = [
    (chat("<image>What?"), "the text says <image> and the row has no image"),
    (chat("<image>What?", images=[]), "the row has no image"),
    (chat(answer="<image>cat"), "assistant message says <image>"),
    (chat(answer="<image>cat", images=["a.png"]), "assistant message says <image>"),
    (chat(PARTS, images=["a.png"]), "<image> beside image parts"),
    ({"prompt": "<image>What?", "completion": "cat"}, "the row has no image"),
    ({"prompt": [{"role": "user", "content": "<image>What?"}], "completion": [ANSWER]}, "the row has no image"),
    ({"text": "a <image> b"}, "<image>"),
    ({"conversations": [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]}, "has no image"),
    (chat("<audio>Transcribe"), "<audio>, and sounds and videos are not available yet"),
    (chat("<video>\nDescribe"), "<video>, and sounds"),
    (chat("<audio>Transcribe", audios=["a.wav"]), "sounds are not available yet"),
    (chat("Transcribe", audio="a.wav"), "sounds are not available yet"),
    (chat("<img>a.png</img>What?"), "<img>a.png</img>, which is not read"),
    (chat("<image>Find <ref-object>", "<bbox>", images=["a.png"]), "<ref-object>, and boxes"),
    (chat("<image>Find it", "<bbox>", images=["a.png"], objects={"bbox": [[1, 2, 3, 4]]}), "<bbox>, and boxes"),
]


@pytest.mark.parametrize(("row", "reason"), BLIND)
def test_a_model_with_images_is_never_trained_on_text_that_stands_for_one(row, reason, processor, folder):
    with pytest.raises(RowError, match=reason):
        encode_row(row, processor, train_on="assistant", folder=str(folder))


def test_a_model_without_images_reads_the_placeholder_as_text_and_says_so(tokenizer):
    encoded = encode_row(chat("<image>What?"), tokenizer, train_on="assistant")
    assert "<image>What?" in tokenizer.decode(encoded.input_ids)
    assert encoded.notes == ("the text says <image>, which is plain text for a model that reads no images",)


@pytest.mark.parametrize(
    "text", ['<img src="a.png"> and <video controls>', "<video><source></video>", "a < b", "<imag>"]
)
def test_html_is_text(text, qwen, folder):
    for row in (chat(text), chat(answer=text), chat(f"<image>{text}", images=["a.png"])):
        encode_row(row, qwen, train_on="assistant", folder=str(folder))


def test_an_answer_may_speak_of_a_tag(qwen):
    encode_row(chat(answer="The tag is <video>"), qwen, train_on="assistant")


# ---- images under other names

NAMES = [
    ({"image_path": "a.png"}, ["a.png"]),
    ({"image_paths": ["a.png", "b.png"]}, ["a.png", "b.png"]),
    ({"image_path": ["a.png"]}, ["a.png"]),
    ({"file_name": "a.png"}, ["a.png"]),
    ({"image_url": "a.png"}, ["a.png"]),
    ({"image_path": "a.png", "image_url": "https://example.org/a.png"}, ["a.png"]),
    ({"image_path": "a.png", "file_name": "a.png"}, ["a.png"]),
    ({"image_path": "a.png", "image": "b.png"}, ["b.png"]),
    ({"image_path": None, "file_name": "main.py"}, []),
    ({"image_path": ""}, []),
    ({"image_paths": []}, []),
    ({"audio": None, "objects": None}, []),
]


@pytest.mark.parametrize(("columns", "names"), NAMES)
def test_images_under_other_names_are_those_of_images(columns, names, processor, folder):
    assert images_of(chat(**columns), processor, folder) == names
    if names:
        marked = chat("<image>" * len(names) + "What?", **columns)
        assert images_of(marked, processor, folder) == names


def test_a_part_with_its_own_image_does_without_the_name_beside_it(qwen, folder):
    row = chat([{"type": "image", "image": "b.png"}, {"type": "text", "text": "What?"}], image_path="a.png")
    assert images_of(row, qwen, folder) == ["b.png"]
    assert images_of(chat([IMAGE, {"type": "text", "text": "What?"}], image_path="a.png"), qwen, folder) == ["a.png"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(image_path="a.png", file_name="b.png"), "image_path and file_name: keep one"),
        (chat(image_url="https://example.org/a.png"), "images are not downloaded"),
        (chat(image_path="missing.png"), "no such image file"),
        ({"file_name": "a.png", "text": "a cat"}, "images need a conversation"),
    ],
)
def test_what_other_names_cannot_give_is_refused(row, reason, qwen, folder):
    with pytest.raises(RowError, match=reason):
        encode_row(row, qwen, train_on="assistant", folder=str(folder))


def test_a_model_of_text_notes_the_media_that_it_does_not_read(tokenizer):
    encoded = encode_row(chat(image_path="a.png", audio="a.wav", file_name="x.py"), tokenizer, train_on="assistant")
    assert encoded.notes == (
        "the column image_path is not read: the model reads text alone",
        "the column audio is not read: the model reads text alone",
    )
    with pytest.raises(RowError, match="no processor for images"):
        encode_row(chat(images=["a.png"]), tokenizer, train_on="assistant")


def test_boxes_beside_an_image_are_noted(qwen, folder):
    row = chat("<image>What?", images=["a.png"], objects={"bbox": [[1, 2, 3, 4]]})
    (note,) = encode_row(row, qwen, train_on="assistant", folder=str(folder)).notes
    assert note.startswith("objects (boxes) is not read")


def test_other_names_are_read_from_tables_and_lines_and_count_for_the_cache(build, folder):
    rows = [chat(image_path="a.png"), chat("<image>What?", image_path="b.png")]
    write_lines(folder / "a.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "a.parquet"))
    for path in (folder / "a.jsonl", folder / "a.parquet"):
        dataset, report = build(path)
        assert (report.images, report.bad_rows) == (2, 0)
        (folder / "a.png").write_bytes(png(7, 90, 90))
        changed, _ = build(path)
        assert len(changed[0]["input_ids"]) > len(dataset[0]["input_ids"])
        (folder / "a.png").write_bytes(png(ord("a")))


MAPPED = {"query": "question", "response": "answer"}
BESIDE = {
    "image_path": ({"image_path": "a.png"}, 1, "", ""),
    "image_paths": ({"image_paths": ["a.png", "b.png"]}, 2, "", ""),
    "file_name": ({"file_name": "a.png"}, 1, "", ""),
    "image_url": ({"image_url": "https://example.org/a.png"}, 0, "images are not downloaded", ""),
    "videos": ({"videos": ["a.mp4"]}, 0, "videos are not available yet", ""),
    "audio": ({"audio": "a.wav"}, 0, "sounds are not available yet", ""),
    "objects": ({"objects": {"bbox": [[1, 2]]}}, 0, "", "objects (boxes) is not read"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", BESIDE)
def test_a_mapping_that_does_not_speak_of_media_keeps_them(column, suffix, build, folder):
    """They were dropped, and the row trained on blind."""
    beside, images, bad, note = BESIDE[column]
    path, row = folder / f"a{suffix}", {"question": "What?", "answer": "cat", **beside}
    write_lines(path, [row]) if suffix == ".jsonl" else datasets.Dataset.from_list([row]).to_parquet(str(path))
    if bad:
        with pytest.raises(DataError, match=bad):
            build(path, columns=MAPPED)
    else:
        report = build(path, columns=MAPPED)[1]
        assert report.images == images
        assert [text.startswith(note) for text in report.notes] == [True] * bool(note)
    report = build(path, columns={**MAPPED, column: None})[1]
    assert (report.rows_kept, report.images, list(report.notes)) == (1, 0, [])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_mapping_of_the_image_means_that_one_alone_and_of_other_columns_what_it_says(suffix, build, folder):
    row = {"question": "What?", "answer": "cat", "picture": "b.png", "image_path": "missing.png", "system": "x"}
    path = folder / f"a{suffix}"
    write_lines(path, [row]) if suffix == ".jsonl" else datasets.Dataset.from_list([row]).to_parquet(str(path))
    assert build(path, columns={**MAPPED, "image": "picture", "system": None})[1].images == 1
    assert build(path, columns={**MAPPED, "system": "image_path"})[1].images == 0
    write_lines(folder / "b.jsonl", [{**row, "videos": ["a.mp4"]}])
    with pytest.raises(DataError, match="videos are not available yet"):
        build(folder / "b.jsonl", columns={**MAPPED, "image": "picture", "system": None})


def test_a_mapping_that_leaves_out_a_column_keeps_the_media_of_a_table(build, folder):
    path = folder / "a.parquet"
    datasets.Dataset.from_list([chat(videos=["a.mp4"], system="x")]).to_parquet(str(path))
    with pytest.raises(DataError, match="videos are not available yet"):
        build(path, columns={"system": None})
    assert build(path, columns={"system": None, "videos": None})[1].rows_kept == 1


def test_sounds_and_boxes_of_tables_are_not_decoded_and_not_forgotten(build, folder):
    rows = [chat("<image>What?", image="a.png", objects={"bbox": [[1, 2, 3, 4]]})]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "boxes.parquet"))
    (note,) = build(folder / "boxes.parquet")[1].notes
    assert note.startswith("objects (boxes) is not read")
    (folder / "a.wav").write_bytes(b"no sound that could be decoded")
    sounds = datasets.Dataset.from_list([chat(audio=str(folder / "a.wav")), chat(audio=None)])
    sounds.cast_column("audio", datasets.Audio()).save_to_disk(str(folder / "sounds"))
    _, report = build(folder / "sounds", max_bad_rows=1)
    assert (report.bad_rows, report.rows_kept) == (1, 1)
    assert report.first_bad[0].endswith("sounds:1: sounds are not available yet: remove the sound, or the row")


def test_an_image_folder_is_not_trained_on_as_captions_alone(build, folder):
    metadata = folder / "set" / "metadata.jsonl"
    metadata.parent.mkdir()
    metadata.write_text(json.dumps({"file_name": "0001.png", "text": "a dog"}) + "\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl:1: images need a conversation"):
        build(folder / "set")
