"""Single files as people have them: packed, of other forms than their name says, with broken lines."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdtrain.data import Source
from kdtrain.data.sources import read_all
from kdtrain.errors import DataError

datasets.disable_progress_bars()
A, B, C = ({"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3))


@pytest.fixture
def read(tmp_path):
    """The rows of a file with this content, each with its line; a bad one as the reason."""

    def call(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        raw, _ = read_all([Source(str(path), **options)], tmp_path / "raw.arrow")
        return [(row["line"], row["problem"] or json.loads(row["text"])) for row in raw]

    return call


# ---- JSON ------------------------------------------------------------------------------------------------------------

LINES = json.dumps(A) + "\n" + json.dumps(B) + "\n"
PRETTY = json.dumps(A, indent=2) + "\n\n" + json.dumps(B, indent=2) + "\n"
JSON_FORMS = {
    "lines": (LINES, [1, 2]),
    "an array": (json.dumps([A, B]), [1, 2]),
    "an array, one row per line": (f"[\n{json.dumps(A)},\n{json.dumps(B)}\n]", [1, 2]),
    "a pretty array with a mark": ("\ufeff\n" + json.dumps([A, B], indent=1), [1, 2]),
    "pretty objects": (PRETTY, [1, 6]),
    "rows below a key": (json.dumps({"version": "1.0", "data": [A, B]}), [1, 2]),
    "rows below a key, pretty": (json.dumps({"version": "1.0", "rows": [A, B]}, indent=1), [1, 2]),
    "rows below the split": (json.dumps({"train": [A, B], "test": [C]}), [1, 2]),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_of_every_form_gives_the_same_rows_whatever_its_ending(form, name, read):
    content, lines = JSON_FORMS[form]
    assert read(name, content) == list(zip(lines, [A, B], strict=True))


def test_one_row_is_one_row_on_one_line_or_several(read):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    for text in (json.dumps(chat), json.dumps(chat, indent=2)):
        assert read("a.json", text) == [(1, chat)]
    mapped = {"talk": [{"role": "user", "content": "hi"}]}
    assert read("a.json", json.dumps(mapped), columns={"messages": "talk"}) == [(1, mapped)]


@pytest.fixture
def raw_rows(tmp_path):
    """As `read`, with the rows' texts as they are."""

    def call(name, content):
        (tmp_path / name).write_text(content)
        raw, _ = read_all([Source(str(tmp_path / name))], tmp_path / "raw.arrow")
        return list(zip(raw["line"], raw["text"], strict=True))

    return call


@pytest.mark.parametrize("broken", ['{"prompt": "x", "completion":', '{"prompt": "x",', "{", "[1]", "nonsense"])
def test_a_broken_line_among_good_ones_costs_that_line_only(broken, raw_rows):
    a, b = LINES.splitlines()
    assert raw_rows("first.jsonl", f"{broken}\n{a}\n{b}\n") == [(1, broken), (2, a), (3, b)]
    assert raw_rows("two.jsonl", f"{broken}\n{broken}\n{a}\n") == [(1, broken), (2, broken), (3, a)]
    assert raw_rows("last.jsonl", f"{a}\n\n{broken}\n") == [(1, a), (3, broken)]


def test_json_that_is_broken_as_a_whole_says_where(read):
    with pytest.raises(DataError, match=r"pretty\.json is not valid JSON: .* line 3 column"):
        read("pretty.json", '{\n "prompt": "x",\n "completion": y\n}')
    with pytest.raises(DataError, match=r"array\.jsonl is not valid JSON: .* line 3 column"):
        read("array.jsonl", f"[\n{json.dumps(A)}\n{json.dumps(B)}\n]")


BY_COLUMNS = [
    {"prompt": ["q0", "q1"], "completion": ["a0", "a1"]},
    {"prompt": {"0": "q0", "1": "q1"}, "completion": {"0": "a0", "1": "a1"}},
    {"messages": [[{"role": "user", "content": "hi"}]], "id": [1]},
]


@pytest.mark.parametrize("table", BY_COLUMNS)
def test_a_table_by_columns_says_how_to_write_rows(table, read):
    for text in (json.dumps(table), json.dumps(table, indent=1)):
        with pytest.raises(DataError, match=r'holds its columns as lists.*orient="records", lines=True'):
            read("a.json", text)


def test_several_lists_below_keys_that_are_no_split_are_named(read):
    content = json.dumps({"easy": [A], "hard": [B]})
    with pytest.raises(DataError, match="has lists of rows below easy, hard: set split"):
        read("a.json", content)


# ---- packing and encoding --------------------------------------------------------------------------------------------

PACKERS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(("name", "text"), [("a.jsonl", LINES), ("a.json", f"[{json.dumps(A)}, {json.dumps(B)}]")])
def test_what_is_packed_is_known_by_its_content(packer, name, text, read):
    for ending in ("", ".gz", ".bz2"):
        assert [row for _, row in read(name + ending, PACKERS[packer](text.encode()))] == [A, B]
    assert [row for _, row in read("plain.jsonl.gz", LINES)] == [A, B]
    assert read("a.csv.xz", PACKERS[packer](b"prompt,completion\nq0,a0\n")) == [(2, A)]


@pytest.mark.parametrize("packer", PACKERS)
def test_a_packed_file_that_is_cut_or_damaged_says_so(packer, read):
    packed = PACKERS[packer](LINES.encode() * 1000)
    for content in (packed[:-20], packed[:50] + b"\x00" * 20 + packed[70:], packed[:12]):
        with pytest.raises(DataError, match=r"cannot read .*a\.jsonl"):
            read("a.jsonl", content)


OTHER_CONTENT = [
    (LINES.encode("utf-16"), r"UTF-16, not UTF-8: .*iconv"),
    (LINES.encode("utf-16-le"), r"UTF-16, not UTF-8: .*iconv"),
    (LINES.encode("utf-16-be"), r"UTF-16, not UTF-8: .*iconv"),
    (b"\x28\xb5\x2f\xfd\x00", "packed by Zstandard.*zstd -d"),
    (b"PK\x03\x04rest", "a ZIP archive"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a git-lfs pointer.*git lfs pull"),
    (b"<!DOCTYPE html>\n<html>", "a web page"),
    (b"PAR1....", "a Parquet file: name it"),
]


@pytest.mark.parametrize(("content", "reason"), OTHER_CONTENT)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_content_that_is_no_text_is_named_with_what_to_do(name, content, reason, read):
    with pytest.raises(DataError, match=rf"{name} is {reason}"):
        read(name, content)


def test_a_parquet_file_that_is_a_git_lfs_pointer_says_so(read):
    with pytest.raises(DataError, match=r"a\.parquet is a git-lfs pointer.*git lfs pull"):
        read("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")


# ---- CSV -------------------------------------------------------------------------------------------------------------

HEADER = "prompt,completion\n"
GOOD_CSV = {
    "plain": HEADER + "q0,a0\n",
    "with a mark and CRLF": "\ufeffprompt,completion\r\nq0,a0\r\n\r\n",
    "blanks around names": "prompt, completion \nq0,a0\n",
    "an index without a name": ",prompt,completion\n0,q0,a0\n",
    "surplus blank cells": "prompt,completion,,\nq0,a0,,\nq1,a1, ,,\n",
    "cells that lines leave out": "prompt,completion,\nq0,a0\n",
    "lines of blanks": HEADER + "   \n\nq0,a0\n \t\n",
    "a blank line on top": "\n" + HEADER + "q0,a0\n",
}


@pytest.mark.parametrize("form", GOOD_CSV)
def test_csv_as_spreadsheets_and_pandas_write_it(form, read):
    rows = [row for _, row in read("a.csv", GOOD_CSV[form])]
    assert rows == [A, B][: len(rows)]
    assert rows


def test_cells_stay_text_and_empty_ones_are_null(read):
    rows = read("a.csv", HEADER + 'NA,None\nnull,\n"say ""hi"", ok","two\nlines"\n5" disk,42\n')
    assert [row for _, row in rows] == [
        {"prompt": "NA", "completion": "None"},
        {"prompt": "null", "completion": None},
        {"prompt": 'say "hi", ok', "completion": "two\nlines"},
        {"prompt": '5" disk', "completion": "42"},
    ]


BAD_LINES = [
    ("hi,hello, world", "3 fields, the header has 2: put cells that hold a comma in quotes"),
    ("only", "1 field, the header has 2"),
    ('"say \\"hi\\", ok",yo', "text follows a closing quote"),
    ('hi,"He said "yes" and left"', "text follows a closing quote"),
    (b"caf\xe9,yo", "not UTF-8: byte 0xe9"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_line_of_csv_that_does_not_fit_is_a_bad_row_and_the_next_one_is_read(line, reason, read):
    line = line if isinstance(line, bytes) else line.encode()
    (first, found), *others = read("a.csv", HEADER.encode() + line + b"\nq1,a1\n")
    assert (first, others) == (2, [(3, B)])
    assert found.startswith(reason)


def test_tsv_is_held_to_the_same(read):
    header = "prompt\tcompletion\n"
    (line, problem), good = read("a.tsv", header + 'hi\t"Yes" she said\nq1\ta1\n')
    assert (line, good) == (2, (3, B))
    assert problem.startswith("text follows a closing quote")
    assert "3 fields, the header has 2: put cells that hold a tab" in read("a.tsv", header + "a\tb\tc\n")[0][1]


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (HEADER + 'q1,"hello\nq2,b\nq3,d\n', 2, "never closed"),
        (HEADER + 'q0,a0\nq1,"hello\nq2,"b"\nq3,d\n', 3, "followed by text in line 4"),
        (HEADER + 'q0,"one "two\nthree",four\n', 2, "closed in line 3 or before"),
        (HEADER + 'q0,"one "two\nq1, a1\nthree",four\n', 2, "closed in line 4 or before"),
        (HEADER + 'q0,"one "two" x\nq1,a1\n', 2, "followed by text in line 2"),
        (HEADER + '"a\nb",c\nq1,"open\n', 4, "never closed"),
    ],
)
def test_a_quote_that_would_swallow_lines_is_an_error_where_it_opens(content, place, reason, read):
    with pytest.raises(DataError, match=rf"a\.csv:{place}: a quote is opened here and {reason}"):
        read("a.csv", content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("prompt,completion,completion\nhi,first,second\n", "the header has completion twice"),
        ("prompt;completion\nhi;yo\n", "the header is one column, prompt;completion: .* separated by ';'"),
        ("prompt\tcompletion\nhi\tyo\n", r"the header is one column, prompt\\tcompletion: .* separated by '\\t'"),
        ('"prompt"x,completion\nhi,yo\n', "the header cannot be read"),
    ],
)
def test_a_header_that_is_unclear_is_an_error(content, reason, read):
    with pytest.raises(DataError, match=reason):
        read("a.csv", content)


def test_a_column_of_text_needs_no_delimiter(read):
    assert read("a.csv", "text\nhello there\n") == [(2, {"text": "hello there"})]


# ---- empty files -----------------------------------------------------------------------------------------------------

EMPTY = pa.table({"prompt": pa.array([], pa.string())})


def write_empty(folder):
    """Files without rows, of all kinds that programs leave behind."""
    pq.write_table(EMPTY, folder / "empty.parquet")
    pq.write_table(pa.table({"other": pa.nulls(0)}), folder / "nulls.parquet")
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as file, pa.ipc.new_stream(file, EMPTY.schema):
        pass
    with pa.OSFile(str(folder / "file.arrow"), "wb") as file, pa.ipc.new_file(file, EMPTY.schema):
        pass
    for name in ("zero.parquet", "zero.arrow", "zero.jsonl", "zero.json", "zero.csv", "zero.jsonl.gz"):
        (folder / name).write_bytes(b"")
    (folder / "header.csv").write_text(HEADER)
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "list.json").write_text("[]")


def test_empty_files_of_a_folder_are_passed_over(tmp_path, capfd):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_empty(folder)
    datasets.Dataset.from_list([A]).to_parquet(folder / "full.parquet")
    raw, (content,) = read_all([Source(str(folder))], tmp_path / "raw.arrow")
    assert (content.rows, json.loads(raw["text"][0])) == (1, A)
    assert "BatchSize" not in capfd.readouterr().err
    for file in folder.iterdir():
        if file.name != "full.parquet":
            with pytest.raises(DataError, match=rf"{file.name} has no rows"):
                read_all([Source(str(file))], tmp_path / "raw.arrow")
