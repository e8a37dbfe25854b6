"""Rows that are read while training: one order, each row once, and going on from any place of it."""

import gzip
import json
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdtrain.data import Source, build_dataset
from kdtrain.data.dataset import encoder_of
from kdtrain.data.stream import order, rows, shards
from kdtrain.data.stream.order import StreamOrder
from kdtrain.data.stream.rows import PLACE, StreamedRows
from kdtrain.errors import CheckpointError, DataError
from tests.benchmarks import stream_memory
from tests.test_data_dataset import FORGETFUL, tokenizer_with, write_lines

datasets.disable_progress_bars()


def chat(i, answer="zero"):
    return {"messages": [{"role": "user", "content": f"the {i}"}, {"role": "assistant", "content": f"{answer} {i}"}]}


OTHERS = [None, {"a": 1}, {"b": "2"}]  # a table fills in what the other rows have
CHATS = [{**chat(i), "chat_template_kwargs": OTHERS[i % 3]} for i in range(25)]


@pytest.fixture
def stream(tokenizer):
    def call(*sources, tokenizer=tokenizer, seed=0, shuffle=False, bad=0, length=10**6, **options):
        options = {"max_length": None, "on_overlength": "error", "train_on": "assistant", **options}
        found = [one if isinstance(one, Source) else Source(str(one), streaming=True) for one in sources]
        encoder, limits = encoder_of(tokenizer, **options)
        made = StreamedRows(found, encoder, limits, seed=seed, shuffle=shuffle, first=[{}], max_bad_rows=bad)
        made.length = length
        return made

    return call


def taken(stream, count, begin=0):
    return [{name: value for name, value in stream[i].items() if name != PLACE} for i in range(begin, begin + count)]


def names(stream, count, begin=0):
    return [row["row_id"] for row in taken(stream, count, begin)]


# ---- files -----------------------------------------------------------------------------------------------------------


def _lines(folder, some):
    write_lines(folder / "a-1.jsonl", some[:10])
    with gzip.open(folder / "a-2.jsonl.gz", "wt") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n\n" for row in some[10:]))


def _plain_lines(folder, some):
    write_lines(folder / "a-1.jsonl", some[:10])
    write_lines(folder / "a-2.jsonl", some[10:])


def _parquet(folder, some):
    pq.write_table(datasets.Dataset.from_list(some[:10]).data.table, folder / "a.parquet", row_group_size=4)
    datasets.Dataset.from_list(some[10:]).to_parquet(folder / "b.parquet")


def _csv(folder, some):
    plain = [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in some]
    datasets.Dataset.from_list(plain[:10]).to_csv(folder / "a.csv")
    datasets.Dataset.from_list(plain[10:]).to_csv(folder / "b.csv")


def _saved(folder, some):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(some)}).save_to_disk(folder)


def _arrow(folder, some):
    for name, part, opened in (("a", some[:10], pa.ipc.new_file), ("b", some[10:], pa.ipc.new_stream)):
        table = datasets.Dataset.from_list(part).data.table
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("write", [_lines, _parquet, _csv, _saved, _arrow])
def test_files_give_the_rows_that_they_give_without_streaming_and_go_on_behind_each(write, stream, tmp_path, tokenizer):
    (folder := tmp_path / "data").mkdir()
    write(folder, CHATS)
    counted, _ = build_dataset(
        [Source(str(folder))],
        tokenizer,
        max_length=None,
        on_overlength="error",
        train_on="assistant",
        cache_dir=str(tmp_path / "cache"),
    )
    wanted = [{name: value for name, value in row.items() if name != "row_id"} for row in counted]
    found = taken(stream(folder), 25)
    assert [{name: value for name, value in row.items() if name != "row_id"} for row in found] == wanted
    parts = shards.shards_of(Source(str(folder), streaming=True))
    for part in parts:
        read = list(part.rows())
        for number, (_, cursor) in enumerate(read, start=1):
            assert list(part.rows(cursor)) == read[number:]
    assert sum(len(list(part.rows())) for part in parts) == 25


def test_a_data_set_of_the_hub_is_streamed_file_by_file_also_in_a_worker(stream, tmp_path, monkeypatch):
    """By the loader of `datasets` itself, with files that lie here in place of the hub's."""
    upstream = datasets.load_dataset_builder
    for kind, write in (("json", _plain_lines), ("parquet", _parquet)):
        (folder := tmp_path / kind).mkdir()
        write(folder, [{**row, "images": []} for row in CHATS])
        files = sorted(map(str, folder.iterdir()))
        monkeypatch.setattr(
            datasets,
            "load_dataset_builder",
            lambda name, *_, files=files, kind=kind, **__: upstream(kind, data_files=files),
        )
        source = Source("org/rows", streaming=True)
        found, local = stream(source), stream(folder)
        wanted = [row["input_ids"] for row in taken(local, 50)]
        assert [row["input_ids"] for row in taken(found, 50)] == wanted
        parts = shards.shards_of(source)
        assert len(parts) == 2
        for part in parts:
            read = list(part.rows())
            assert [list(part.rows(cursor)) for _, cursor in read] == [read[n:] for n in range(1, len(read) + 1)]
        loader = torch.utils.data.DataLoader(stream(source, length=20), batch_size=5, num_workers=2, collate_fn=list)
        assert [row["input_ids"] for batch in loader for row in batch] == wanted[:20]
    monkeypatch.setattr(datasets, "load_dataset_builder", upstream)
    with pytest.raises(DataError, match=r"cannot load the data set org/none"):
        stream(Source("org/none", streaming=True))


def test_a_file_without_a_row_in_each_line_is_refused(stream, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CHATS, indent=1))
    with pytest.raises(DataError, match=r"not one row in each line"):
        stream(tmp_path / "a.json")


# ---- the order -------------------------------------------------------------------------------------------------------


def _shards(folder, sizes, begin=0):
    folder.mkdir()
    for number, size in enumerate(sizes):
        write_lines(folder / f"{number}.jsonl", [chat(begin + i) for i in range(size)])
        begin += size
    return Source(str(folder), streaming=True)


def test_each_reading_has_every_row_once_in_another_order(stream, tmp_path):
    source = _shards(tmp_path / "a", [7, 5, 8])
    found = names(stream(source, shuffle=True), 60)
    readings = [found[i : i + 20] for i in (0, 20, 40)]
    assert [sorted(one) for one in readings] == [sorted(names(stream(source), 20))] * 3
    assert len({tuple(one) for one in readings}) == 3
    assert names(stream(source, shuffle=True, seed=1), 60) != found
    assert names(stream(source, shuffle=True), 60) == found


def test_rows_stay_together_in_blocks_and_files_change_places(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(order, "BLOCK_ROWS", 5)
    found = names(stream(_shards(tmp_path / "a", [5, 5, 5, 5]), shuffle=True), 40)
    blocks = [found[i : i + 5] for i in range(0, 40, 5)]
    files = [{name.split(":")[1] for name in block} for block in blocks]
    assert all(len(one) == 1 for one in files)
    readings = ["".join(one.pop()[0] for one in files[:4]), "".join(one.pop()[0] for one in files[4:])]
    assert sorted(readings[0]) == sorted(readings[1]) == list("0123")
    assert readings[0] != readings[1]
    assert any(sorted(block) != block for block in blocks)


def test_sources_are_drawn_by_their_weights_and_a_limit_takes_the_first_rows(stream, tmp_path):
    one, two = _shards(tmp_path / "a", [30]), _shards(tmp_path / "b", [3, 3])
    many = Source(one.path, weight=3, streaming=True), Source(two.path, limit=4, ce=False, streaming=True)
    for shuffle in (False, True):
        found = taken(stream(*many, shuffle=shuffle), 800)
        of_second = [row for row in found if row["row_id"].startswith("1:")]
        assert len(of_second) == pytest.approx(200, abs=41)  # 3.3 standard deviations
        assert {row["row_id"] for row in of_second} == {"1:0.jsonl:1", "1:0.jsonl:2", "1:0.jsonl:3", "1:1.jsonl:1"}
        assert {row["ce"] for row in of_second} == {False}


def test_a_long_row_ends_a_block_early_and_none_is_lost(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(order, "BLOCK_BYTES", 500)
    source = _shards(tmp_path / "a", [40])
    assert sorted(names(stream(source, shuffle=True), 40)) == sorted(names(stream(source), 40))
    blocks = StreamOrder([source], 0, True)
    sizes = [len(drawn) for _, drawn in islice(blocks.blocks(blocks.begin), 8)]
    assert max(sizes) < 10


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_from_every_place_the_same_rows_follow(shuffle, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(order, "BLOCK_ROWS", 11)
    monkeypatch.setattr(rows, "_AT_ONCE", 3)
    sources = [
        _shards(tmp_path / "a", [7, 5]),
        Source(_shards(tmp_path / "b", [4, 9], begin=50).path, weight=0.5, limit=10, streaming=True),
    ]
    whole = stream(*sources, shuffle=shuffle)
    wanted = taken(whole, 60)
    for number in range(0, 50, 3):
        place = json.loads(json.dumps(whole[number][PLACE].as_json()))
        assert place["row"] <= number
        resumed = stream(*sources, shuffle=shuffle)
        resumed.start_at(place)
        assert taken(resumed, 60 - number, number) == wanted[number:]


def test_a_place_is_gone_to_without_reading_what_is_before_it(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(order, "BLOCK_ROWS", 10)
    source = _shards(tmp_path / "a", [200])
    place, read = stream(source)[150][PLACE], []
    upstream = shards.lines_from
    monkeypatch.setattr(shards, "lines_from", lambda *args: (read.append(row) or row for row in upstream(*args)))
    resumed = stream(source)
    resumed.start_at(place.as_json())
    assert resumed[150]["row_id"] == "0:0.jsonl:151"
    assert len(read) <= 11  # a block, and the row behind it


def test_other_files_are_refused(stream, tmp_path):
    source = _shards(tmp_path / "a", [7, 5])
    place = stream(source)[3][PLACE].as_json()
    write_lines(tmp_path / "a/2.jsonl", [chat(100)])
    with pytest.raises(CheckpointError, match=r"files of data.train are others"):
        stream(source).start_at(place)


# ---- rows that cannot be used ----------------------------------------------------------------------------------------


def test_bad_rows_stop_with_their_place_or_are_counted(stream, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat(0), "{broken", chat(1), {"messages": []}, chat(2)])
    with pytest.raises(DataError, match=r"2 of the 4 rows .* data.max_bad_rows is 1[\s\S]*a.jsonl:4: "):
        names(stream(path, bad=1), 3)
    allowed = stream(path, bad=2)
    assert names(allowed, 7)[:4] == ["0:a.jsonl:1", "0:a.jsonl:3", "0:a.jsonl:5", "0:a.jsonl:1"]
    assert names(stream(path), 1) == ["0:a.jsonl:1"]  # the second row is not asked for


def test_long_rows_stop_or_are_left_out(stream, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat(0), chat(1, "the path " * 9), chat(2)])
    with pytest.raises(DataError, match=r"a.jsonl:2: \d+ tokens, and max_length is 40"):
        names(stream(path, max_length=40), 2)
    assert names(stream(path, max_length=40, on_overlength="drop"), 2) == ["0:a.jsonl:1", "0:a.jsonl:3"]


def test_a_stream_of_which_nothing_is_left_ends(stream, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": []}] * 3)
    with pytest.raises(DataError, match=r"no row is left of 3: 3 are bad"):
        names(stream(path, bad=10**9), 1)


def test_a_conversation_that_becomes_several_rows_has_a_number_for_each(stream, tmp_path):
    several = {"messages": [*chat(0)["messages"], *chat(1)["messages"]]}
    path = write_lines(tmp_path / "a.jsonl", [several, chat(2)])
    found = names(stream(path, tokenizer=tokenizer_with(FORGETFUL)), 3)
    assert found == ["0:a.jsonl:1:0", "0:a.jsonl:1:1", "0:a.jsonl:2"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_does_not_grow_with_the_rows(workers, tmp_path):
    few, many = (stream_memory.measure(tmp_path, count, workers)["peak_mib"] for count in (20_000, 100_000))
    assert many < few + 15
