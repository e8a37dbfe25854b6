"""Which rows a source gives: splits, slices, folders as people have them, single files."""

import json
import os
import pathlib

import datasets
import pytest

from kdtrain.data import Source
from kdtrain.data import sources as sources_module
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
    (["train1.jsonl", "train2.jsonl", "test1.jsonl"], "train2", [1]),
    (["train1.jsonl", "train2.jsonl", "test1.jsonl"], "train", [0, 1]),
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
    full = "train" + split if split.startswith("[") else split
    expected = datasets.ReadInstruction.from_spec(full).to_absolute({"train": 11})
    assert read(**source, split=split) == [row for part in expected for row in rows[part.from_ : part.to]]


def test_a_slice_comes_before_the_limit_and_keeps_the_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", *"abcdef")
    raw, _ = read_all([Source(str(path), split="train[3:]", limit=2)], tmp_path / "raw.arrow")
    assert raw["line"][:] == [4, 5]
    table = datasets.Dataset.from_dict({"prompt": list("abcdef")})
    raw, _ = read_all([Source("rows", rows=table, split="train[3:]", limit=2)], tmp_path / "other.arrow")
    assert raw["line"][:] == [4, 5]


@pytest.mark.parametrize(
    "split",
    ["train[:90%", "train[a:]", "train[10:20%]", "train[]", "", "-", "_[1:]", "train[:5%](down)", "train[0.5%:]"],
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


# ---- folders as people have them -------------------------------------------------------------------------------------

LAYOUTS = [
    # files, name, split, those that are read
    (["README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], None, "test", [2]),
    (["main/train-00000-of-00001.parquet", "main/test.jsonl", "socratic/train.jsonl"], "main", "train", [0]),
    (["data/main/train.jsonl", "data/socratic/train.jsonl"], "socratic", "train", [1]),
    (["train/part-0.jsonl", "train/part-1.jsonl", "test/part-0.jsonl"], None, "train", [0, 1]),
    (["train/part-0.jsonl", "test/part-0.jsonl"], None, "test", [1]),
    (["data/train/a.jsonl", "data/val/a.jsonl"], None, "dev", [1]),
    (["sft/a.jsonl", "gen/a.jsonl"], None, "gen", [1]),
    (["rows/a.jsonl", "rows/b.jsonl", ".cache/train.jsonl", "__MACOSX/a.jsonl"], None, "train", [0, 1]),
    (["train.jsonl", "dataset_infos.json", "metadata.json", "dataset_info.json", "._train.jsonl"], None, "train", [0]),
    (["train.jsonl", "sub/train.jsonl"], None, "train", [0]),
    (["TRAIN.JSONL", "notes.txt"], None, "train", [0]),
    (["rows.jsonl"], "default", "train", [0]),
]


@pytest.mark.parametrize(("names", "name", "split", "chosen"), LAYOUTS)
def test_a_clone_and_other_folders_are_read_as_they_are_meant(names, name, split, chosen, read, tmp_path):
    assert read(folder_of(tmp_path, *names), name=name, split=split) == [names[i] for i in chosen]


UNCLEAR = [
    (["main/train.jsonl", "socratic/train.jsonl"], None, "train", "its folders main, socratic have: set name"),
    (
        ["main/train.jsonl", "socratic/train.jsonl"],
        "other",
        "train",
        "no configuration other: its folders are main, soc",
    ),
    (["train.jsonl"], "main", "train", "no configuration main: it has no folders with data"),
    (["test/a.jsonl"], None, "train", r"no files of the split train, but test/a\.jsonl"),
    (["train/x/test/a.jsonl", "dev/a.jsonl"], None, "train", "no files of the split train, but"),
    (["train/test.jsonl"], None, "train", r"no files of the split train, but train/test\.jsonl"),
    (["notes.txt", ".hidden.jsonl"], None, "train", r"has no data files\. Use \.json, "),
]


@pytest.mark.parametrize(("names", "name", "split", "reason"), UNCLEAR)
def test_a_folder_that_may_mean_several_things_lists_them(names, name, split, reason, read, tmp_path):
    with pytest.raises(DataError, match=reason):
        read(folder_of(tmp_path, *names), name=name, split=split)


README = """---
license: mit
configs:
- config_name: chat
  data_files:
  - split: train
    path: raw/a-*
  - split: heldout
    path: [raw/b.jsonl]
- config_name: code
  data_dir: code
- config_name: flat
  data_files: raw/b.jsonl
---
# A data set
"""
DESCRIBED = ["raw/a-0.jsonl", "raw/a-1.jsonl", "raw/b.jsonl", "code/train.jsonl", "code/test.jsonl"]


@pytest.mark.parametrize(
    ("name", "split", "chosen"),
    [("chat", "train", [0, 1]), ("chat", "heldout", [2]), ("chat", "all", [0, 1, 2]), ("code", "test", [4]),
     ("flat", "train", [2])],
)  # fmt: skip
def test_a_readme_that_names_the_files_is_followed(name, split, chosen, read, tmp_path):
    folder = folder_of(tmp_path, *DESCRIBED)
    (folder / "README.md").write_text(README)
    assert read(folder, name=name, split=split) == [DESCRIBED[i] for i in chosen]


def test_a_readme_that_does_not_fit_says_what_it_names(read, tmp_path):
    folder = folder_of(tmp_path, *DESCRIBED)
    readme = folder / "README.md"
    readme.write_text(README)
    with pytest.raises(DataError, match="has the configurations chat, code, flat: set name"):
        read(folder)
    with pytest.raises(DataError, match="has no configuration math, but chat, code, flat"):
        read(folder, name="math")
    with pytest.raises(DataError, match="has no split test: its README names train, heldout"):
        read(folder, name="chat", split="test")
    for path, reason in (("gone-*", r"no file gone-\*, which its README names"), ("../x", "not in the folder")):
        readme.write_text(README.replace("raw/a-*", path))
        with pytest.raises(DataError, match=reason):
            read(folder, name="chat")
    for text in ("---\nconfigs: [\n---\n", "---\nconfigs: none\n---\n", "# No head\n", "---\nlicense: mit\n---\n"):
        readme.write_text(text)
        with pytest.raises(DataError, match="its folders code, raw have"):
            read(folder)


def test_a_pattern_gives_its_files_in_order(read, tmp_path):
    folder = folder_of(tmp_path, "b.jsonl", "a.jsonl", "c.txt", "deep/d.jsonl")
    assert read(folder / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert read(folder / "*") == ["a.jsonl", "b.jsonl"]
    assert read(folder / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "deep/d.jsonl"]
    assert read(folder / "[b-z].jsonl", split="train[:1]") == ["b.jsonl"]
    with pytest.raises(DataError, match=r"no file matches .*\*\.csv"):
        read(folder / "*.csv")
    with pytest.raises(DataError, match="is a pattern and has no configuration main"):
        read(folder / "*.jsonl", name="main")
    with pytest.raises(DataError, match=r"c\.txt: unknown format"):
        read(folder / "*.txt")


def test_a_pattern_over_several_splits_needs_one(read, tmp_path):
    folder = folder_of(tmp_path, "train.jsonl", "test-0.jsonl", "test-1.jsonl", "sub[1]/x.parquet")
    assert read(folder / "test*.jsonl") == ["test-0.jsonl", "test-1.jsonl"]
    assert read(folder / "*.jsonl", split="test") == ["test-0.jsonl", "test-1.jsonl"]
    assert len(read(folder / "*.jsonl", split="all")) == 3
    assert read(folder / "sub[1]" / "x.parquet") == ["sub[1]/x.parquet"]
    with pytest.raises(DataError, match=r"matches several splits: test-0\.jsonl, test-1\.jsonl, train\.jsonl\. Narrow"):
        read(folder / "*.jsonl")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("https://example.com/a.jsonl", "is an address.* download it"),
        ("s3://bucket/a.jsonl", "is an address"),
        ("hf://datasets/org/name", "is an address.* such as org/name"),
        ("org/name:test", r"write \{path: org/name, split: test\}"),
        ("org/name@v1.0", "has a revision behind it. For that, clone it"),
        ("rows/none/at/all", "no such file or folder"),
    ],
)
def test_addresses_and_ids_with_more_behind_them_say_what_to_write(path, reason, read):
    with pytest.raises(DataError, match=reason):
        read(path)


def test_what_is_no_file_and_what_may_not_be_read_say_so(read, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder: a pipe"):
        read(tmp_path / "pipe.jsonl")

    def refused(folder):
        raise PermissionError(13, "Permission denied")

    folder = folder_of(tmp_path, "a.jsonl")
    monkeypatch.setattr(pathlib.Path, "iterdir", refused)
    with pytest.raises(DataError, match=r"cannot read .*rows: .*Permission denied"):
        read(folder)


def test_links_to_files_and_folders_are_followed_and_circles_end(read, tmp_path):
    folder = folder_of(tmp_path, "train/deep/a.jsonl", "test/a.jsonl")
    (folder / "train" / "circle").symlink_to(folder)
    (folder / "train" / "deep" / "other").symlink_to(folder / "train" / "deep")
    write(tmp_path / "elsewhere" / "b.jsonl", "b")
    (folder / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "c.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    assert sorted(read(folder)) == ["b", "b", "train/deep/a.jsonl"]


def test_a_slice_of_tables_with_images_decodes_none_of_them_to_count(read, tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "train-0.parquet", "train-1.parquet", "test.jsonl")
    decoded = []
    rows = sources_module.table_rows
    monkeypatch.setattr(sources_module, "table_rows", lambda *a: decoded.append(a) or rows(*a))
    assert read(folder, split="train[50%:]") == ["train-1.parquet"]
    assert len(decoded) == 2


LONG = "a" * 400


@pytest.mark.parametrize("path", [f"none{'*' * 300}", f"/{LONG}", f"./{LONG}/b", f"{LONG}/b:test", "\0*"])
def test_what_is_too_long_or_no_name_of_a_file_is_not_there(path, read):
    with pytest.raises(DataError, match=r"no file matches|no such file|not the id of a data set"):
        read(path)
