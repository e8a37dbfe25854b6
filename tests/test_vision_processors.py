"""Processors of the two models: their settings, and images that one of them takes otherwise."""

import json

import pytest

from kdtrain.data import Collator, Source, build_dataset
from kdtrain.errors import DataError
from kdtrain.runs.read_data import RunData
from kdtrain.runs.teacher_answers import check_images
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
    def call(path, processor):
        options = {"max_length": None, "on_overlength": "error", "train_on": "assistant"}
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
