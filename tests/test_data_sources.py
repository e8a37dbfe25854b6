"""Which rows a source gives: splits, slices, folders as people have them, single files."""

import json

import datasets
import pytest

from kdtrain.data import Source
from kdtrain.data.sources import read_all
from kdtrain.errors import DataError

datasets.disable_progress_bars()


@pytest.fixture
def read(tmp_path):
    """The prompts that a source gives."""

    def call(path, **options):
        raw, _ = read_all([Source(str(path), **options)], tmp_path / "raw.arrow")
        return [json.loads(text)["prompt"] for text in raw["text"]]

    return call


def write(path, *prompts):
    """A file of its suffix's format with these prompts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = datasets.Dataset.from_dict(
            {"prompt": list(prompts)}, datasets.Features({"prompt": datasets.Value("string")})
        )
        table.to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def folder_of(tmp_path, *names):
    """A folder whose files have one row each: their own name."""
    for name in names:
        write(tmp_path / "rows" / name, name)
    return tmp_path / "rows"


ULTRACHAT = [f"{split}-00000-of-00001-a3.parquet" for split in ("train_sft", "test_sft", "train_gen", "test_gen")]
CHOSEN = [
    (["train-00000.jsonl", "train-00001.jsonl", "test-00000.jsonl"], "train", [0, 1]),
    (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "train", [0]),
    (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "test", [1]),
    (["Train.jsonl", "Test.jsonl"], "train", [0]),
    (["training.jsonl", "testing.jsonl"], "train", [0]),
    (["training.jsonl", "testing.jsonl"], "test", [1]),
    (["train.jsonl", "val.jsonl"], "validation", [1]),
    (["train.jsonl", "dev.jsonl"], "val", [1]),
    (["train.jsonl", "validation.jsonl"], "dev", [1]),
    (["train0.jsonl", "train1.jsonl", "valid0.jsonl"], "valid", [2]),
    (["train.jsonl", "eval.jsonl", "test.jsonl"], "eval", [1]),
    (["train.en.jsonl", "train.de.jsonl", "test.en.jsonl"], "train", [1, 0]),
    (["part-0.jsonl", "part-1.jsonl"], "train", [0, 1]),
    (["part-0.jsonl", "part-1.jsonl"], "all", [0, 1]),
    (["train.jsonl", "test.jsonl"], "all", [1, 0]),
    (["train.jsonl", "test.jsonl"], "test+train", [1, 0]),
    (["gsm8k-train-00000-of-00001.parquet", "gsm8k-test-00000-of-00001.parquet"], "test", [1]),
    (["train-00000-of-00001.parquet", "train_sft-00000-of-00001.parquet"], "train", [0]),
    (["math_train-00000-of-00001.parquet", "math_test-00000-of-00001.parquet"], "train", [0]),
    (["train.jsonl", "val_from_train.jsonl"], "train", [0]),
    (ULTRACHAT, "train_sft", [0]),
    (ULTRACHAT, "test_gen", [3]),
    (["fold1.jsonl", "fold2.jsonl"], "fold2", [1]),
]


@pytest.mark.parametrize(("names", "split", "chosen"), CHOSEN)
def test_a_folder_gives_the_files_whose_names_say_the_split(names, split, chosen, read, tmp_path):
    assert read(folder_of(tmp_path, *names), split=split) == [names[i] for i in chosen]


REFUSED = [
    (ULTRACHAT, "train", "no files of the split train, but test_gen-00000"),
    (["train.jsonl", "test.jsonl"], "validation", r"no files of the split validation, but test\.jsonl, train\.jsonl"),
    (["test.jsonl", "validation.jsonl"], "train", "no files of the split train, but test"),
    (["a.jsonl", "b.jsonl"], "test", r"no files of the split test, but a\.jsonl, b\.jsonl\. Set split"),
    (["val_from_train.jsonl"], "train", "no files of the split train, but val_from_train"),
    (["en_train-00000-of-00001.parquet", "de_train-00000-of-00001.parquet"], "train", "the split train is not clear"),
]


@pytest.mark.parametrize(("names", "split", "reason"), REFUSED)
def test_a_split_that_no_file_has_lists_the_files_and_never_reads_the_others(names, split, reason, read, tmp_path):
    with pytest.raises(DataError, match=reason):
        read(folder_of(tmp_path, *names), split=split)


SLICES = [
    "train[:90%]",
    "train[90%:]",
    "[90%:]",
    "train[2:5]",
    "train[-3:]",
    "train[:-25%]",
    "train[10%:20%]+train[8:]",
]


@pytest.mark.parametrize("kind", ["file", "folder", "saved", "saved dict", "table at hand", "list at hand"])
@pytest.mark.parametrize("split", SLICES)
def test_slices_are_those_of_datasets_whatever_the_source_is(kind, split, read, tmp_path):
    rows = [str(i) for i in range(11)]
    table = datasets.Dataset.from_dict({"prompt": rows})
    source = {"path": tmp_path / "a.jsonl"}
    if kind == "file":
        write(source["path"], *rows)
    elif kind == "folder":
        write(tmp_path / "d" / "train-0.jsonl", *rows[:4])
        write(tmp_path / "d" / "train-1.jsonl", *rows[4:])
        write(tmp_path / "d" / "test-1.jsonl", "never")
        source["path"] = tmp_path / "d"
    elif kind.startswith("saved"):
        saved = datasets.DatasetDict({"train": table}) if kind == "saved dict" else table
        saved.save_to_disk(tmp_path / "saved")
        source["path"] = tmp_path / "saved"
    else:
        source["rows"] = table if kind == "table at hand" else table.to_list()
    table.to_parquet(tmp_path / "reference.parquet")
    full = "train" + split if split.startswith("[") else split
    cache = str(tmp_path / "cache")
    expected = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "reference.parquet"), split=full, cache_dir=cache
    )
    assert read(**source, split=split) == expected["prompt"][:]


def test_a_slice_comes_before_the_limit_and_keeps_the_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", *"abcdef")
    raw, _ = read_all([Source(str(path), split="train[3:]", limit=2)], tmp_path / "raw.arrow")
    assert raw["line"][:] == [4, 5]
    table = datasets.Dataset.from_dict({"prompt": list("abcdef")})
    raw, _ = read_all([Source("rows", rows=table, split="train[3:]", limit=2)], tmp_path / "other.arrow")
    assert raw["line"][:] == [4, 5]


@pytest.mark.parametrize(
    "split", ["train[:90%", "train[a:]", "train[10:20%]", "train[]", "", "train[:5%](down)", "train[0.5%:]"]
)
def test_what_is_no_split_is_refused_with_examples(split, read, tmp_path):
    with pytest.raises(DataError, match=r"split .* is not read: write a name, or a name with a slice"):
        read(write(tmp_path / "a.jsonl", "a"), split=split)


def test_an_empty_slice_says_so(read, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl has no rows in train\[5:\]"):
        read(write(tmp_path / "a.jsonl", "a"), split="train[5:]")


@pytest.mark.parametrize("name", ["train.jsonl", "gsm8k_test.jsonl", "test/rows.jsonl"])
def test_a_single_file_has_the_split_in_its_name_and_the_default_one(name, read, tmp_path):
    path = write(tmp_path / name, "a")
    assert read(path) == ["a"]
    assert read(path, split="train" if "train" in name else "test") == ["a"]


def test_a_split_or_configuration_of_a_single_file_is_refused_not_ignored(read, tmp_path):
    path = write(tmp_path / "data.jsonl", "a")
    with pytest.raises(DataError, match=r"data\.jsonl is a file .* there is no test: remove split, .* train\[90%:\]"):
        read(path, split="test")
    with pytest.raises(DataError, match="there is no test"):
        read(path, split="test[:50%]")
    with pytest.raises(DataError, match=r"data\.jsonl is a file and has no configuration main: remove name"):
        read(path, name="main")


def test_a_saved_data_set_has_the_split_that_it_was_saved_with(read, tmp_path):
    table = datasets.Dataset.from_dict({"prompt": ["a"]})
    table.save_to_disk(tmp_path / "plain")
    assert read(tmp_path / "plain") == ["a"]
    with pytest.raises(DataError, match="has no split test: it is one data set, saved as train"):
        read(tmp_path / "plain", split="test")
    datasets.DatasetDict({"validation": table}).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict", split="val") == read(tmp_path / "dict", split="all") == ["a"]
    with pytest.raises(DataError, match="has no split train: it has validation"):
        read(tmp_path / "dict")
    assert read(tmp_path / "dict" / "validation", split="validation") == ["a"]
