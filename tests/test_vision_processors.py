"""Processors of the two models: their settings, and images that one of them takes otherwise."""

import json
import shutil

import pytest
import torch
from transformers import AutoProcessor
from trl.experimental.gkd import GKDConfig

from kdtrain.config import check_config
from kdtrain.data import Collator, Source, build_dataset
from kdtrain.errors import DataError, PreflightError
from kdtrain.models.processing import load_processing
from kdtrain.runs.failures import readable_failures
from kdtrain.runs.read_data import RunData
from kdtrain.runs.teacher_answers import check_images
from tests import tiny
from tests import tiny_processors as vision


def qwen(least=16, most=128):
    """Images of less than least² pixels are enlarged, of more than most² made smaller."""
    processor = vision.make_qwen()
    processor.image_processor.size = {"shortest_edge": least**2, "longest_edge": most**2}
    return processor


def write_rows(path, sizes):
    rows = []
    for i, size in enumerate(sizes):
        vision.picture(i, *size).save(path.parent / f"{path.stem}{i}.png")
        turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "cat"}]
        rows.append({"messages": turns, "image": f"{path.stem}{i}.png"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def build(tmp_path):
    def call(path, processor, **options):
        options |= {"max_length": None, "on_overlength": "error", "train_on": "assistant"}
        return build_dataset([Source(str(path))], processor, cache_dir=str(tmp_path / "cache"), **options)

    return call


USUAL = [(40, 40)] * 20


@pytest.mark.parametrize("unusual", [(8, 8), (128, 120)], ids=["small", "large"])
@pytest.mark.parametrize("where", ["train", "eval"])
def test_an_unusual_image_that_does_not_fit_the_teacher_is_found_before_the_first_step(tmp_path, build, unusual, where):
    """Before, only the longest rows for training were tried: the run ended at the first small image."""
    sizes = {"train": USUAL, "eval": USUAL}
    sizes[where] = [*USUAL[:13], unusual, *USUAL]
    student, teacher = qwen(), qwen(least=32, most=64)
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", size) for name, size in sizes.items()}
    (train, report), (evaluation, its_report) = (build(path, student) for path in paths.values())
    data = RunData(train, evaluation, report, its_report)
    with pytest.raises(DataError) as error:
        check_images(data, Collator(student, teacher))
    assert str(error.value).startswith(f"{paths[where]}:14: row 0:13: its images take ")
    check_images(data, Collator(student, qwen()))


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models that are their configs alone, with their processors."""
    root = tmp_path_factory.mktemp("models")
    processors = {"qwen": vision.make_qwen3(), "llava": vision.make_llava(), "gemma3": vision.make_gemma3()}
    for name, processor in processors.items():
        vision.make_model(name, processor).config.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


def grid(processor, side=128):
    return processor(text=["<|image_pad|>"], images=[[vision.picture(0, side, side)]])["image_grid_thw"][0].tolist()


def test_settings_of_a_run_reach_the_processor_and_stay_with_what_it_saves(folders, tmp_path):
    assert grid(load_processing(str(folders / "qwen"))) == [1, 16, 16]
    for settings in ({"max_pixels": 4096}, {"size": {"shortest_edge": 256, "longest_edge": 4096}}):
        processor = load_processing(str(folders / "qwen"), processor_kwargs=settings)
        assert grid(processor) == [1, 8, 8]
        processor.save_pretrained(tmp_path)
        assert grid(AutoProcessor.from_pretrained(tmp_path)) == [1, 8, 8]
    assert load_processing(str(folders / "llava"), processor_kwargs={"patch_size": 4}).patch_size == 4


def test_settings_are_part_of_what_rows_are_stored_by(folders, tmp_path, build):
    path = write_rows(tmp_path / "a.jsonl", [(128, 128)])
    lengths = []
    for settings in ({}, {"max_pixels": 4096}):
        processor = load_processing(str(folders / "qwen"), processor_kwargs=settings)
        dataset, _ = build(path, processor)
        lengths.append(dataset[0]["input_ids"].count(processor.image_token_id))
    assert lengths == [64, 16]


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("qwen", {"max_pixel": 1}, "data.processor_kwargs: .* has no setting max_pixel. Did you mean max_pixels"),
        ("llava", {"max_pixels": 1}, "the LlavaProcessor of .*llava has no setting max_pixels. It has crop_size,"),
        ("llava", {"device": "cuda"}, "has no setting device"),
        ("llava", {"size": "large"}, "with data.processor_kwargs {'size': 'large'}"),
    ],
)
def test_a_setting_that_a_processor_does_not_have_is_refused(folders, name, settings, says):
    with pytest.raises(PreflightError, match=says):
        load_processing(str(folders / name), processor_kwargs=settings)


def test_a_setting_that_a_processors_class_overrides_is_refused(folders):
    """Gemma 3's crops, InternVL's tiles: said in the settings they would change nothing, without a word."""
    folder = str(folders / "gemma3")
    own = getattr(load_processing(folder), "images_kwargs", None)
    if own is None:  # an earlier transformers
        pytest.skip("processors keep what they set themselves in another place")
    assert own["do_pan_and_scan"] is False
    load_processing(folder, processor_kwargs={"do_pan_and_scan": False})
    with pytest.raises(PreflightError, match=r"a Gemma3Processor sets do_pan_and_scan to False at every call"):
        load_processing(folder, processor_kwargs={"do_pan_and_scan": True})


def test_a_model_of_text_has_no_settings_for_images(tmp_path):
    tiny.make_qwen3().config.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PreflightError, match=r"reads text alone.* Remove rlhf\.teacher\.processor_kwargs, or set it"):
        load_processing(str(tmp_path), processor_kwargs={"max_pixels": 1}, side="teacher")


def test_a_processor_without_its_patch_size_is_named_with_its_file_and_side(folders, tmp_path):
    shutil.copytree(folders / "llava", tmp_path / "llava")
    file = tmp_path / "llava" / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": None}))
    with pytest.raises(PreflightError) as error:
        load_processing(str(tmp_path / "llava"), side="teacher")
    assert str(error.value) == (
        "The teacher's processor has no patch_size, without which it cannot count an image's tokens. Write it into "
        f"{file} (the model's is 8)."
    )
    processor = vision.make_llava()
    processor.patch_size = None
    row = {"messages": [{"role": "user", "content": "<image>What?"}], "image": vision.picture()}
    with pytest.raises(DataError, match="LlavaProcessor has no patch_size"):
        Collator(processor)([row])


@pytest.mark.parametrize("section", ["model", "teacher"])
@pytest.mark.parametrize("name", ["max_pixels", "min_pixels", "do_resize"])
def test_settings_of_a_processor_among_those_of_its_model_are_refused_before_anything_is_loaded(folders, section, name):
    folder = str(folders / "qwen")
    config = {
        "model": {"model": folder, "init_kwargs": {name: 1} if section == "model" else {}},
        "data": {"train": "rows.jsonl"},
        "rlhf": {"teacher_model": folder, "teacher_model_init_kwargs": {name: 1} if section == "teacher" else {}},
        "training": {"output_dir": "runs/x"},
    }
    found = [problem for problem in check_config(config).errors if problem.path.endswith(name)]
    assert ["use data.processor_kwargs" in problem.hint for problem in found] == [True]


def test_what_has_an_option_of_its_own_is_no_setting_of_a_processor():
    config = {
        "model": {"model": "org/a"},
        "data": {"train": "org/rows", "processor_kwargs": {"trust_remote_code": True}},
    }
    (found,) = [problem for problem in check_config(config).errors if "processor_kwargs" in problem.path]
    assert found.hint == "use model.trust_remote_code"


def test_paths_of_images_may_be_relative_to_another_folder(tmp_path, build):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "rows").mkdir()
    vision.picture(1).save(tmp_path / "pictures" / "a.png")
    row = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "cat"}]}
    row["image"] = "a.png"
    path = tmp_path / "rows" / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    qwen, root = vision.make_qwen(), str(tmp_path / "pictures")
    with pytest.raises(DataError, match="no such image file"):
        build(path, qwen)
    built, _ = build(path, qwen, image_root=root)
    batch = Collator(qwen, image_root=root)([row])
    assert torch.equal(batch.model_inputs["pixel_values"], Collator(qwen)(list(built)).model_inputs["pixel_values"])
    with pytest.raises(DataError, match="image_root is no folder: /nowhere"):
        build(path, qwen, image_root="/nowhere")


def test_an_image_lost_in_a_worker_is_one_line(tmp_path, build):
    path = write_rows(tmp_path / "a.jsonl", [(40, 40)])
    qwen = vision.make_qwen()
    dataset, _ = build(path, qwen)
    (tmp_path / "a0.png").unlink()
    loader = torch.utils.data.DataLoader(list(dataset), collate_fn=Collator(qwen), num_workers=1)
    with pytest.raises(DataError) as error, readable_failures(GKDConfig(str(tmp_path), use_cpu=True)):
        next(iter(loader))
    assert str(error.value) == f"row 0:0: no such image file: {tmp_path / 'a0.png'}"
