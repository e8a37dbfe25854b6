"""From files to a data set: reading, mixing, bad rows, lengths, the cache."""

import dataclasses
import gzip
import json
import os

import datasets
import pytest

from kdtrain.config.schema import DataSource
from kdtrain.data import Collator, Source, build_dataset, encode_row
from kdtrain.data import cache as encoding_module
from kdtrain.data.cache_folder import default_cache_folder
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.epochs import _shares
from kdtrain.data.row_notes import SPLIT
from kdtrain.errors import CheckpointError, DataError
from tests.test_data_encoder import FORGETFUL, LLAMA3, ROW, tokenizer_with

datasets.disable_progress_bars()


def pair(i):
    return {"prompt": f"the {i}", "completion": f" path {i}"}


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def build(tmp_path, tokenizer):
    def call(*sources, tokenizer=tokenizer, **options):
        sources = [source if isinstance(source, Source) else Source(str(source)) for source in sources]
        options = {"max_length": None, "on_overlength": "error", "train_on": "assistant", **options}
        return build_dataset(sources, tokenizer, cache_dir=str(tmp_path / "cache"), **options)

    return call


def prompts(dataset, tokenizer):
    return [tokenizer.decode(row["input_ids"][: row["prompt_length"]]) for row in dataset]


def test_rows_come_out_in_order_with_all_columns(build, tmp_path, tokenizer):
    rows = [ROW, pair(1), {"prompt": "what"}, {"text": "zero"}]
    dataset, report = build(write_lines(tmp_path / "a.jsonl", rows))
    assert dataset.column_names == ["input_ids", "labels", "prompt_length", "ce", "row_id"]
    assert dataset["row_id"][:] == ["0:0", "0:1", "0:2", "0:3"]
    assert dataset["ce"][:] == [True] * 4
    for row, encoded in zip(rows, dataset, strict=True):
        expected = encode_row(row, tokenizer, train_on="assistant")
        assert encoded["input_ids"] == expected.input_ids
        assert encoded["labels"] == expected.labels
        assert encoded["prompt_length"] == expected.prompt_length
    assert (report.rows_read, report.rows_kept, report.rows_per_epoch, report.bad_rows) == (4, 4, 4, 0)
    assert (report.prompt_only_rows, report.plain_text_rows) == (1, 1)
    assert report.total_tokens == sum(len(ids) for ids in dataset["input_ids"])
    assert report.supervised_tokens == sum(label != -100 for labels in dataset["labels"] for label in labels)
    assert report.longest == max(len(ids) for ids in dataset["input_ids"])
    assert "4 of 4 rows" in report.summary()
    assert "1 rows with a prompt only" in report.summary()


def write_table(rows, path):
    {".parquet": datasets.Dataset.to_parquet, ".csv": datasets.Dataset.to_csv}[path.suffix](
        datasets.Dataset.from_list(rows), str(path)
    )


def as_saved_folder(rows, folder):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder)


FORMATS = {
    "a.jsonl": lambda rows, path: write_lines(path, rows),
    "with-bom.jsonl": lambda rows, path: path.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode() + b"\r\n\r\n"
    ),
    "a.jsonl.gz": lambda rows, path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "array.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1)),
    "lines.json": lambda rows, path: write_lines(path, rows),
    "a.parquet": write_table,
    "a.csv": write_table,
    "a.tsv": lambda rows, path: path.write_text(
        "\n".join(["prompt\tcompletion", *(f"{r['prompt']}\t{r['completion']}" for r in rows)])
    ),
    "saved": as_saved_folder,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, build, tmp_path, tokenizer):
    rows = [pair(i) for i in range(3)] + [
        {"prompt": "1 and 1", "completion": "2"},
        {"prompt": "n/a?", "completion": "NA"},
    ]
    FORMATS[name](rows, tmp_path / name)
    dataset, report = build(tmp_path / name)
    expected = [encode_row(row, tokenizer, train_on="assistant").input_ids for row in rows]
    assert dataset["input_ids"][:] == expected
    assert report.bad_rows == 0


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_messages_survive_arrow(name, build, tmp_path, tokenizer):
    FORMATS.get(name, write_table)([ROW, ROW], tmp_path / name)
    dataset, _ = build(tmp_path / name)
    assert dataset[1]["labels"] == encode_row(ROW, tokenizer, train_on="assistant").labels


def test_a_folder_is_read_by_split(build, tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, i in (("train-00000.jsonl", 0), ("train-00001.jsonl", 1), ("test-00000.jsonl", 2)):
        write_lines(folder / name, [pair(i)])
    assert prompts(build(folder)[0], tokenizer) == ["the 0", "the 1"]
    assert prompts(build(Source(str(folder), split="test"))[0], tokenizer) == ["the 2"]


def test_rows_with_different_keys_and_types_live_in_one_file(build, tmp_path):
    rows = [
        {**pair(0), "meta": 1},
        {**pair(1), "meta": {"a": [1, "x"]}},
        {"messages": ROW["messages"], "meta": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "what"}]}], "score": float("nan")},
    ]
    assert len(build(write_lines(tmp_path / "a.jsonl", rows))[0]) == 4


def broken_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(
        path, [pair(0), "", '{"prompt": "x", "completion":', "[1]", pair(1), {"prompt": "x\x1b", "completion": 3}]
    )
    with path.open("ab") as file:
        file.write(b'{"text": "\xff"}\n{"prompt": "\\ud800"}\n' + b'{"text":' * 100_000 + b"\n")
    return path


def test_bad_rows_are_counted_and_the_first_three_shown_with_their_lines(build, tmp_path):
    path = broken_file(tmp_path)
    dataset, report = build(path, max_bad_rows=6)
    assert dataset["row_id"][:] == ["0:0", "0:3"]
    assert (report.rows_read, report.rows_kept, report.bad_rows) == (8, 2, 6)
    places, reasons = zip(*(bad.split(": ", 1) for bad in report.first_bad), strict=True)
    assert places == (f"{path}:3", f"{path}:4", f"{path}:6")
    assert "invalid JSON" in reasons[0]
    assert "expected a JSON object" in reasons[1]
    assert "completion is a number" in reasons[2]
    assert report.first_bad[0] in report.summary()


def test_more_bad_rows_than_allowed_stop_the_run_and_are_listed(build, tmp_path):
    path = broken_file(tmp_path)
    with pytest.raises(DataError, match=r"6 of 8 rows cannot be used, and data.max_bad_rows is 5") as caught:
        build(path, max_bad_rows=5)
    assert f"{path}:3: invalid JSON" in str(caught.value)
    assert f"{path}:6" in str(caught.value)


@pytest.mark.parametrize("name", ["array.json", "a.parquet", "a.csv"])
def test_rows_of_other_formats_are_counted_from_one(name, build, tmp_path):
    FORMATS[name]([pair(0), {"prompt": "", "completion": "x"}], tmp_path / name)
    line = 3 if name == "a.csv" else 2  # the header is the first line of a CSV file
    with pytest.raises(DataError, match=rf"{name}:{line}: "):
        build(tmp_path / name)


def test_columns_are_mapped_and_the_others_ignored(build, tmp_path, tokenizer):
    rows = [{"question": "the 0", "answer": " path", "messages": "not ours", "text": 3}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    dataset, report = build(Source(path, columns={"prompt": "question", "completion": "answer"}))
    assert tokenizer.decode(dataset[0]["input_ids"]) == "the 0 path<|im_end|>"
    assert report.notes == []
    with pytest.raises(DataError, match=r"columns question, answer, messages, text, not .*Did you mean question"):
        build(Source(path, columns={"prompt": "qestion"}))
    with pytest.raises(DataError, match=r"'promt', which is not one of .*did you mean prompt"):
        build(Source(path, columns={"promt": "question"}))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_a_file_without_a_known_column_lists_what_it_has(name, build, tmp_path):
    FORMATS[name]([{"question": "x", "answer": "y"}], tmp_path / name)
    with pytest.raises(DataError, match=r"none of the columns messages, .* but question, answer\. Write the source as"):
        build(tmp_path / name)


def test_a_missing_file_suggests_its_neighbour(build, tmp_path):
    write_lines(tmp_path / "train.jsonl", [pair(0)])
    with pytest.raises(DataError, match=r"no such file or folder: .*trian\.jsonl; did you mean train\.jsonl\?"):
        build(tmp_path / "trian.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", b"", "has no rows"),
        ("blank.jsonl", b"\n\n", "has no rows"),
        ("empty.json", b"[]", "has no rows"),
        ("broken.json", b'[{"text": "a"},', "is not valid JSON"),
        ("a.parquet", b"nonsense", "cannot read .*a.parquet"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "cannot read .*cut.jsonl.gz"),
        ("a.pkl", b"x", "can run code"),
        ("a.pt", b"x", "can run code"),
        ("load_me.py", b"x", "can run code"),
        ("a.docx", b"x", "unknown format .docx"),
        ("noise", b"x", "unknown format"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(name, content, reason, build, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        build(tmp_path / name)


def test_a_hub_data_set_that_is_out_of_reach_says_what_to_do(build):
    with pytest.raises(DataError, match=r"some/data.*HF_HUB_OFFLINE.*HF_ENDPOINT"):
        build("some/data")


def test_an_image_column_is_refused_not_ignored(build, tmp_path):
    write_table([{**ROW, "image": "a.png"}], tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no processor for images"):
        build(tmp_path / "a.parquet")


def test_sources_are_mixed_by_limit_weight_and_ce(build, tmp_path, tokenizer):
    a = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(10)])
    b = write_lines(tmp_path / "b.jsonl", [pair(i) for i in range(10, 20)])
    dataset, report = build(Source(a, limit=3, weight=2, ce=False), Source(b, weight=0.5), seed=1)
    assert dataset["row_id"][:6] == ["0:0", "0:1", "0:2"] * 2
    half = dataset["row_id"][6:]
    assert len(half) == len(set(half)) == 5
    assert set(half) < {f"1:{i}" for i in range(10)}
    assert dataset["ce"][:] == [False] * 6 + [True] * 5
    assert prompts(dataset, tokenizer)[6:] == [f"the {10 + int(row_id[2:])}" for row_id in half]
    assert (report.rows_read, report.rows_kept, report.rows_per_epoch) == (8, 8, 11)
    assert report.total_tokens == sum(len(ids) for ids in dataset["input_ids"])
    assert build(Source(b, weight=0.5), seed=1)[0]["row_id"][:] == build(Source(b, weight=0.5), seed=1)[0]["row_id"][:]
    assert build(Source(b, weight=0.5), seed=2)[0]["row_id"][:] != build(Source(b, weight=0.5), seed=3)[0]["row_id"][:]
    assert len(build(Source(b, weight=1.3))[0]) == 13


def test_repeated_rows_survive_dropped_ones(build, tmp_path, tokenizer):
    long = {"prompt": "the", "completion": " path" * 50}
    path = write_lines(tmp_path / "a.jsonl", [pair(0), long, pair(2)])
    dataset, report = build(Source(path, weight=2), max_length=20, on_overlength="drop")
    assert dataset["row_id"][:] == ["0:0", "0:2"] * 2
    assert prompts(dataset, tokenizer) == ["the 0", "the 2"] * 2
    assert (report.dropped, report.rows_kept) == (1, 2)
    assert report.total_tokens == sum(len(ids) for ids in dataset["input_ids"])


def test_a_source_of_the_config_is_one_of_the_data_with_the_same_fields_and_defaults():
    configured = {name: field.default for name, field in DataSource.model_fields.items()}
    ours = {field.name: field.default for field in dataclasses.fields(Source)}
    del configured["path"], ours["rows"], ours["path"]
    del ours["prefix_column"], ours["prefix_default"]  # of the teacher's options, the same for all sources
    assert configured == ours


@pytest.mark.parametrize("source", [{"weight": 0}, {"weight": -1}, {"weight": float("nan")}, {"limit": 0}])
def test_senseless_weights_and_limits_are_refused(source, build, tmp_path):
    with pytest.raises(DataError, match=next(iter(source))):
        build(Source(write_lines(tmp_path / "a.jsonl", [pair(0)]), **source))


def test_sample_limit_takes_from_every_source_and_encodes_no_more(build, tmp_path, monkeypatch):
    a = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(30)])
    b = write_lines(tmp_path / "b.jsonl", [pair(i) for i in range(10)])
    dataset, report = build(a, b, sample_limit=8)
    assert dataset["row_id"][:] == [f"0:{i}" for i in range(6)] + ["1:0", "1:1"]
    assert report.rows_read == 8
    assert len(build(a, b, sample_limit=1000)[0]) == 40


@pytest.mark.parametrize(
    ("sizes", "limit", "shares"),
    [([30, 10], 8, [6, 2]), ([1, 1, 1], 2, [1, 1, 0]), ([5, 5], 100, [5, 5]), ([100, 1], 2, [2, 0])],
)
def test_shares_add_up(sizes, limit, shares):
    assert _shares(sizes, limit) == shares


def over_long_file(tmp_path):
    return write_lines(tmp_path / "a.jsonl", [pair(0), ROW, {"prompt": "the " * 90, "completion": "path"}])


def test_over_long_rows_are_an_error_by_default(build, tmp_path, tokenizer):
    longest = len(encode_row({"prompt": "the " * 90, "completion": "path"}, tokenizer, train_on="last").input_ids)
    with pytest.raises(DataError, match=rf"2 of 3 rows .*\(20 tokens\); the longest has {longest}") as caught:
        build(over_long_file(tmp_path), max_length=20)
    assert "a.jsonl:2: " in str(caught.value)
    assert "truncate" in str(caught.value)


def test_truncation_cuts_from_the_right_and_drops_rows_without_supervision(build, tmp_path, tokenizer):
    whole = encode_row(ROW, tokenizer, train_on="assistant")
    first_prompt = encode_row({"messages": ROW["messages"][:1]}, tokenizer, train_on="assistant").input_ids
    limit = len(first_prompt) + 5
    dataset, report = build(over_long_file(tmp_path), max_length=limit, on_overlength="truncate")
    assert dataset["row_id"][:] == ["0:0", "0:1"]
    cut = dataset[1]
    assert cut["input_ids"] == whole.input_ids[:limit]  # the beginning stays, no end token is made up
    assert cut["labels"] == whole.labels[:limit]
    assert cut["prompt_length"] == len(first_prompt)  # the last turn whose prompt still fits
    assert (report.truncated, report.dropped, report.bad_rows) == (1, 1, 0)
    assert report.total_tokens == sum(len(ids) for ids in dataset["input_ids"])
    assert "1 rows truncated" in report.summary()


def test_over_long_prompts_without_an_answer_are_dropped_not_cut(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [pair(0), {"prompt": "the " * 90}])
    dataset, report = build(path, max_length=20, on_overlength="truncate")
    assert (len(dataset), report.dropped, report.truncated) == (1, 1, 0)


def test_nothing_left_is_an_error(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(DataError, match="no row is left of 1: 0 are bad and 1 too long"):
        build(path, max_length=4, on_overlength="drop")
    with pytest.raises(DataError, match="there is no data source"):
        build()


@pytest.fixture
def encoded_rows(monkeypatch):
    """Counts the rows that are really encoded."""
    counted = []
    encode = RowEncoder.encode

    def counting(self, rows, *args):
        counted.extend(rows)
        return encode(self, rows, *args)

    monkeypatch.setattr(RowEncoder, "encode", counting)
    return counted


def test_the_same_rows_are_encoded_once(build, tmp_path, encoded_rows):
    path = write_lines(tmp_path / "a.jsonl", [ROW, pair(0)])
    first, first_report = build(path)
    again, again_report = build(path)
    moved, _ = build(write_lines(tmp_path / "elsewhere.jsonl", [ROW, pair(0)]))
    other_use, _ = build(Source(path, weight=3, ce=False))
    assert len(encoded_rows) == 2
    assert first[:] == again[:] == moved[:]
    assert first_report == again_report
    assert other_use["ce"][:] == [False] * 6
    assert not list((tmp_path / "cache").glob("*ing-*"))  # nothing half-done stays behind


def test_rows_that_a_sample_chooses_are_stored_for_that_sample(build, tmp_path, encoded_rows):
    path = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(8)])
    whole = {row["row_id"]: row for row in build(path)[0]}
    encoded_rows.clear()
    samples = [build(Source(path, weight=0.5), seed=seed)[0] for seed in (0, 1, 0)]
    assert samples[0]["row_id"][:] == samples[2]["row_id"][:] != samples[1]["row_id"][:]
    assert all(row == whole[row["row_id"]] for sample in samples for row in sample)
    assert len(encoded_rows) == 8  # four of each; the third time they are there


CHANGES = {
    "rows": lambda call, path: call(write_lines(path, [ROW, pair(1)])),
    "template": lambda call, path: call(path, tokenizer=tokenizer_with(LLAMA3)),
    "tokenizer": lambda call, path: call(path, tokenizer=tokenizer_with(added=["<|new|>"])),
    "stop token": lambda call, path: call(path, tokenizer=tokenizer_with(eos="<|endoftext|>")),
    "train_on": lambda call, path: call(path, train_on="last"),
    "max_length": lambda call, path: call(path, max_length=500),
    "on_overlength": lambda call, path: call(path, on_overlength="drop"),
    "columns": lambda call, path: call(Source(str(path), columns={"text": "prompt"}), max_bad_rows=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_are_encoded_again_when_something_they_depend_on_changes(change, build, tmp_path, encoded_rows):
    path = tmp_path / "a.jsonl"
    write_lines(path, [ROW, pair(0)])
    build(path, tokenizer=tokenizer_with())
    encoded_rows.clear()
    build(path, tokenizer=tokenizer_with())
    assert encoded_rows == []
    CHANGES[change](lambda *a, **k: build(*a, **{"tokenizer": tokenizer_with(), **k}), path)
    assert encoded_rows


def test_a_new_version_of_the_encoding_and_a_damaged_entry_encode_again(build, tmp_path, encoded_rows, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [pair(0)])
    expected = build(path)[0][:]
    for file in (tmp_path / "cache").rglob("*.arrow"):
        file.write_bytes(b"damaged")
    assert build(path)[0][:] == expected
    assert len(encoded_rows) == 2
    monkeypatch.setattr(encoding_module, "VERSION", -1)
    build(path)
    assert len(encoded_rows) == 3


def test_padding_with_the_tokenizer_does_not_invalidate_the_cache(build, tmp_path, encoded_rows):
    path = write_lines(tmp_path / "a.jsonl", [pair(0)])
    tokenizer = tokenizer_with()
    build(path, tokenizer=tokenizer)
    tokenizer(["a", "the path"], padding=True, truncation=True, max_length=3)
    build(path, tokenizer=tokenizer)
    assert len(encoded_rows) == 1


def test_several_processes_give_the_same_as_one(build, tmp_path):
    rows = [pair(i) for i in range(30)] + [{"prompt": "x", "completion": ""}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    parallel, parallel_report = build(path, num_proc=2, max_bad_rows=1)
    for entry in (tmp_path / "cache").iterdir():
        entry.rename(tmp_path / "aside")
    single, single_report = build(path, num_proc=1, max_bad_rows=1)
    assert parallel[:] == single[:]
    assert parallel_report == single_report


def test_a_tokenizer_without_a_chat_template_stops_at_once_even_in_workers(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROW] * 4)
    with pytest.raises(DataError, match="has no chat template"):
        build(path, tokenizer=tokenizer_with(None), max_bad_rows=100, num_proc=2)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_conversation_may_become_several_rows_which_are_counted_and_told(build, tmp_path, num_proc):
    path = write_lines(tmp_path / "a.jsonl", [pair(0), ROW, {"messages": []}, ROW, pair(1)])
    dataset, report = build(path, tokenizer=tokenizer_with(FORGETFUL), max_bad_rows=1, num_proc=num_proc)
    assert dataset["row_id"][:] == ["0:0", "0:1:0", "0:1:1", "0:3:0", "0:3:1", "0:4"]
    assert (report.rows_read, report.rows_kept, report.bad_rows, report.rows_per_epoch) == (5, 4, 1, 6)
    assert report.notes == [f"{SPLIT} (2 rows, the first: {path}:2)"]
    assert report.notes[0] in report.summary()
    assert build(path, max_bad_rows=1)[1].notes == []


def test_all_rows_of_a_conversation_follow_its_weight_and_limit(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROW, pair(0)])
    dataset, _ = build(Source(str(path), weight=2.0), tokenizer=tokenizer_with(FORGETFUL))
    assert sorted(dataset["row_id"][:]) == ["0:0:0", "0:0:0", "0:0:1", "0:0:1", "0:1", "0:1"]
    dataset, report = build(Source(str(path), limit=1), tokenizer=tokenizer_with(FORGETFUL))
    assert (dataset["row_id"][:], report.rows_read) == (["0:0:0", "0:0:1"], 1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_where_the_usual_cache_cannot_be_written_a_temporary_folder_serves_and_a_note_says_so(
    name, tokenizer, tmp_path, monkeypatch, encoded_rows
):
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "datasets"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    FORMATS[name]([pair(0)], tmp_path / name)
    options = {"max_length": None, "on_overlength": "error", "train_on": "last"}
    for _ in range(2):
        dataset, report = build_dataset([Source(str(tmp_path / name))], tokenizer, **options)
        assert len(dataset) == 1
        (note,) = report.notes
        assert note.startswith(f"encoded rows are kept in {tmp_path / 'temporary' / 'kdtrain-'}")
        assert "file/datasets/kdtrain cannot be written (Not a directory). Or set cache_dir" in note
    assert len(encoded_rows) == 1
    assert (
        build_dataset([Source(str(tmp_path / name))], tokenizer, cache_dir=str(tmp_path / "own"), **options)[1].notes
        == []
    )


def test_a_temporary_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "datasets"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert default_cache_folder()[0] == tmp_path / f"kdtrain-{os.getuid()}"
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    (tmp_path / "kdtrain-4321").mkdir()
    assert default_cache_folder()[0].name not in ("kdtrain-4321", f"kdtrain-{os.getuid()}")


def test_files_beside_those_of_a_split_that_name_none_are_noted(build, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl", "extra.jsonl", "val_from_train.jsonl", "README.md"):
        write_lines(folder / name, [pair(0)])
    assert build(folder)[1].notes == [f"{folder}: the split train is read, and not extra.jsonl, val_from_train.jsonl"]
    assert build(Source(str(folder), split="all"))[1].notes == []
    assert build(folder / "train.jsonl")[1].notes == []


def test_an_unwritable_cache_says_so(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    source = Source(write_lines(tmp_path / "a.jsonl", [pair(0)]))
    with pytest.raises(CheckpointError, match=r"Writing \S+/file/cache failed: .*data\.cache_dir"):
        build_dataset(
            [source],
            tokenizer,
            max_length=None,
            on_overlength="error",
            train_on="last",
            cache_dir=str(tmp_path / "file" / "cache"),
        )


# ---- rows that carry their conversation ------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is zero"},
    {"role": "assistant", "content": "the zero path"},
    {"role": "user", "content": "and one"},
    {"role": "assistant", "content": "the one path"},
]
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}]


def chats_of(dataset):
    return [text and json.loads(text) for text in dataset["chat"][:]]


def test_rows_carry_their_conversation_only_where_it_is_asked_for(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROW, pair(1)])
    assert "chat" not in build(path)[0].column_names
    kept, _ = build(path, keep_chats=True)  # stored under another key than the rows without
    assert "chat" in kept.column_names
    assert "chat" not in build(path)[0].column_names
    assert chats_of(kept)[0]["messages"] == ROW["messages"]


def test_the_conversation_of_a_row_ends_with_the_last_answer_that_it_trains(build, tmp_path):
    later = [{"role": "user", "content": "thanks"}]
    off = [*TALK[:4], {**TALK[4], "weight": 0}]
    rows = [
        {"messages": TALK},
        {"messages": TALK + later},
        {"messages": off},
        {"messages": TALK[:2]},
        {"prompt": TALK[:2], "completion": TALK[2:3]},
    ]
    dataset, _ = build(write_lines(tmp_path / "a.jsonl", rows), keep_chats=True)
    assert [len(chat["messages"]) for chat in chats_of(dataset)] == [5, 6, 3, 2, 3]  # the second is a prompt
    assert chats_of(dataset)[4]["messages"] == TALK[:3]
    prompts, _ = build(Source(str(tmp_path / "a.jsonl"), answers="teacher"), keep_chats=True)
    assert [chat["messages"] for chat in chats_of(prompts)] == [(TALK + later)[:n] for n in (4, 6, 2, 2, 2)]
    answered, _ = build(write_lines(tmp_path / "b.jsonl", rows[:2]), keep_chats=True, prompts=False)
    assert [chat["messages"] for chat in chats_of(answered)] == [TALK, TALK]


def test_each_row_of_a_split_conversation_carries_its_own_part(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}])
    dataset, _ = build(path, keep_chats=True, turns="split")
    assert [chat["messages"] for chat in chats_of(dataset)] == [TALK[:3], TALK]


def test_text_rows_carry_their_prompt_and_answer_and_plain_text_nothing(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [pair(1), {"prompt": "what"}, {"text": "zero"}])
    dataset, _ = build(path, keep_chats=True)
    assert chats_of(dataset) == [
        {"prompt": "the 1", "completion": " path 1"},
        {"prompt": "what", "completion": None},
        None,
    ]


def test_a_row_that_is_cut_carries_the_turns_that_begin_in_it(build, tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}])
    second = encode_row({"messages": TALK}, tokenizer, train_on="assistant").turn_starts[1]
    for max_length, messages in ((second + 1, 5), (second, 3), (second - 1, 3)):
        dataset, report = build(path, keep_chats=True, max_length=max_length, on_overlength="truncate")
        assert report.truncated == 1
        assert len(chats_of(dataset)[0]["messages"]) == messages
        assert dataset[0]["labels"][-1] != -100 or messages == 3
    both = {"keep_chats": True, "max_length": 4, "on_overlength": "truncate", "train_on": "all"}
    assert chats_of(build(path, **both)[0]) == [None]  # within the first prompt
    assert chats_of(build(write_lines(tmp_path / "b.jsonl", [pair("one and one and one")]), **both)[0]) == [None]


def test_a_dropped_row_leaves_its_conversation_with_it(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK[:3]}, "broken", pair(3)])
    dataset, report = build(path, keep_chats=True, max_length=60, on_overlength="drop", max_bad_rows=1)
    assert (report.dropped, report.bad_rows) == (1, 1)
    assert dataset["row_id"][:] == ["0:1", "0:3"]
    assert chats_of(dataset)[0]["messages"] == TALK[:3]
    assert chats_of(dataset)[1]["prompt"] == "the 3"


def test_the_template_arguments_of_a_conversation_are_the_teachers(build, tmp_path):
    template = (
        "{% if a or b %}{% endif %}{% if tools %}{{ tools|tojson }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [{"messages": TALK[:3], "chat_template_kwargs": {"b": 2}}, {"messages": TALK[:3], "tools": TOOLS}]
    options = {"chat_template_kwargs": {"a": 0, "b": 0}, "teacher_chat_template_kwargs": {"a": 1}}
    path = write_lines(tmp_path / "a.jsonl", rows)
    dataset, _ = build(path, tokenizer=tokenizer_with(template), keep_chats=True, **options)
    chats = chats_of(dataset)
    assert [chat["chat_template_kwargs"] for chat in chats] == [{"a": 1, "b": 2}, {"a": 1, "b": 0}]
    assert [chat["tools"] for chat in chats] == [None, TOOLS]


def test_a_batch_has_the_conversations_of_its_rows(build, tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}, {"text": "zero"}])
    collate = Collator(tokenizer)
    dataset, _ = build(path, keep_chats=True)
    batch = collate(list(dataset))
    assert list(batch.rows.chats) == dataset["chat"][:]
    assert batch.rows.chats[1] is None
    assert list(batch.rows.images) == [(), ()]
    without = collate(list(build(path)[0]))
    assert (without.rows.chats, without.rows.images) == ((), ())


# ---- what samples are checked against --------------------------------------------------------------------------------


def test_rows_carry_their_answer_only_where_it_is_asked_for(build, tmp_path):
    rows = [{**ROW, "answer": " 18 "}, {"prompt": TALK[:2], "answer": 7}, {"prompt": TALK[:2], "answer": 0.5}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    plain, report = build(path)
    assert "answer" not in plain.column_names
    assert any("the column answer is not read" in note for note in report.notes)
    kept, report = build(path, keep_answers=True)
    assert kept["answer"][:] == [" 18 ", "7", "0.5"]
    assert not any("answer is not read" in note for note in report.notes)
    assert kept.remove_columns("answer").to_list() == plain.to_list()


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_row_without_an_answer_to_check_is_bad(build, tmp_path, value):
    path = write_lines(tmp_path / "a.jsonl", [{**ROW, "answer": "18"}, {**ROW, "answer": value}, ROW])
    _, report = build(path, keep_answers=True, max_bad_rows=2)
    assert report.bad_rows == 2
    assert "a.jsonl:2: no answer in the column answer, which rlhf.select_regex compares" in report.first_bad[0]


def test_an_answer_that_is_no_text_is_bad(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{**ROW, "answer": ["18"]}])
    with pytest.raises(DataError, match="answer is a list, and has to be text or a number"):
        build(path, keep_answers=True)


def test_a_column_may_be_the_completion_and_what_samples_are_checked_against(build, tmp_path, tokenizer):
    """As of GSM8K, whose answers end with #### and the number."""
    rows = [{"question": "what is zero", "answer": "the zero path #### 0", "other": 1}]
    columns = {"instruction": "question", "output": "answer", "answer": "answer"}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    for source in (
        Source(str(path), columns=columns),
        Source(str(write_lines(tmp_path / "a.jsonl", rows)), columns=columns),
    ):
        dataset, _ = build(source, keep_answers=True)
        assert dataset["answer"][:] == ["the zero path #### 0"]
        assert "the zero path #### 0" in tokenizer.decode([t for t in dataset[0]["labels"] if t != -100])
    unmapped = Source(str(path), columns={"instruction": "question", "output": "answer"})
    with pytest.raises(DataError, match=r"name it by columns: {…, answer: its name}, also"):
        build(unmapped, keep_answers=True)


def test_batches_have_the_answers_of_encoded_and_of_raw_rows(build, tmp_path, tokenizer):
    rows = [{**ROW, "answer": "18"}, {"prompt": TALK[:2], "answer": 7}]
    dataset, _ = build(write_lines(tmp_path / "a.jsonl", rows), keep_answers=True)
    assert Collator(tokenizer, answers=True)(list(dataset)).rows.answers == ["18", "7"]
    assert Collator(tokenizer, answers=True)([*rows, ROW]).rows.answers == ["18", "7", None]
    assert Collator(tokenizer)(list(dataset)).rows.answers == ()
