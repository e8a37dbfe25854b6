"""Seeded nonsense for what reads configs and data: whatever it is, the answer is one of the documented exit codes.

    python -m tests.fuzz config SEED COUNT
    python -m tests.fuzz data SEED COUNT

Each prints a line of JSON: how many ended how, the slowest, the memory. What ended otherwise is kept in the folder that
`failed` names, and makes the exit status 1.
"""

from __future__ import annotations

import base64
import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

SECONDS, MIB = 1.0, 200
"""What checking a config may take at most."""

# ---- nonsense --------------------------------------------------------------------------------------------------------

SCALARS: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ",
    "x", "null", "1e-5", "~", "~/x", "..", "/", "/dev/null", "a\0b", "{", "[", "*", "&", "%", "\u202e\u0000",
    "𝕏é\u0301", "\U0010ffff", "x" * 5000, "2024-01-01", "12:30:00", "!!str", "hf_" + "A" * 30, "http://u:p@h/v1",
    "${HOME}", "$(ls)", "{{ x }}", "%s %d {0}", "ya:ml", "- a", "file:///etc/passwd", "🤗" * 50, "\x1b[31m", "0o17",
    "0x1F", "1_000", ".5",
]  # fmt: skip
FRAGMENTS = [
    *"[]{}:,-|>'\"?#&*\t\n%@`!~ ", "\r", "\0", "\x1b", "\x85", "\u2028", "\ufeff", "- ", ": ", "? ", "&a ", "*a",
    "<<: *a\n", "<<: ", "!!str ", "!!python/object:os.system ", "!x ", "null", ".nan", ".inf", "1e999", "9" * 400,
    "2024-01-01",
    "---\n", "...\n", "{" * 200, "[" * 3000, "a: " * 300, "? [a]\n", "|+\n", ">-\n", "\\", "'" * 3, "=", "key.sub=1",
    "sk-a1b2c3d4e5f6g7", "&a [*a]", "\ud800", "x" * 20000, "\u202e", "extends: ./x.yaml\n", "model: {model: a}\n",
]  # fmt: skip


def recipes() -> list[str]:
    """The texts of the recipes, which hold every section."""
    folder = Path(__file__).parents[1] / "kdtrain" / "cli" / "recipes"
    return [path.read_text("utf-8") for path in sorted(folder.glob("*.yaml"))]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any value, of any kind."""
    kind = rng.random()
    if kind < 0.6 or depth > 4:
        return rng.choice(SCALARS)
    if kind < 0.8:
        return [value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 5, 60 if depth == 0 else 2]))]
    return {key(rng): value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 6]))}


def key(rng: random.Random) -> Any:
    """A key: mostly text."""
    known = [name for names in _known().values() for name in names]
    return rng.choice(
        [*rng.choices(known, k=12), *("x", "", "a.b", "0", "é", "model ", "MODEL", "__class__"), 1, None, 0.5]
    )


def _known() -> dict[str, tuple[str, ...]]:
    from kdtrain.config.suggest import known_keys

    return known_keys()


def _holders(tree: Any) -> list[Any]:
    found = [tree] if isinstance(tree, dict | list) and tree else []
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        found += _holders(child)
    return found


def change_tree(rng: random.Random, tree: Any) -> Any:
    """Puts in, replaces, removes, repeats or moves a value somewhere."""
    holders = _holders(tree)
    if not holders:
        return value(rng)
    holder = rng.choice(holders)
    place = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    kind = rng.randrange(5)
    if kind == 0:
        holder[place] = value(rng)
    elif kind == 1 and isinstance(holder, dict):
        holder[key(rng)] = value(rng)
    elif kind == 2:
        del holder[place]
    elif kind == 3:
        holder[place] = rng.choice([[holder[place]], {"x": holder[place]}, str(holder[place]), [holder[place]] * 3])
    else:
        section = rng.choice(list(_known()))
        made: Any = {name: value(rng) for name in rng.sample(_known()[section], min(3, len(_known()[section])))}
        for part in reversed([part for part in section.split(".") if part]):
            made = {part: made}
        if isinstance(tree, dict):
            tree.update(made)
    return tree


def change_text(rng: random.Random, text: str) -> str:
    """Inserts, cuts, repeats or shifts something somewhere."""
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(5)
        if kind == 0:
            text = text[:at] + rng.choice(FRAGMENTS) + text[at:]
        elif kind == 1:
            text = text[:at] + rng.choice(FRAGMENTS) + text[at + rng.choice([1, 5, 40]) :]
        elif kind == 2:
            text = text[:at]
        elif kind == 3:  # duplicate keys, mostly
            lines = text.splitlines(keepends=True) or [""]
            line = rng.randrange(len(lines))
            text = "".join([*lines[:line], lines[line], rng.choice(lines), *lines[line:]])
        else:
            text = text[:at] + text[at + rng.choice([1, 10, 200]) :]
    return text


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flips, cuts, or puts in bytes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at, kind = rng.randrange(len(changed) + 1), rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.choice([1, 2, 16]))
        elif kind == 2 and rng.random() < 0.4:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + rng.choice([1, 4, 64])]
    return bytes(changed)


def monsters() -> list[bytes]:
    """What a parser may choke on."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30))
    texts = [
        "model: !!python/object/apply:os.system ['touch ran']", bomb, merges, "a: &a [*a]", "a: *b",
        "a: " + "[" * 20_000 + "]" * 20_000, "a: " + "{a: " * 20_000, "".join(" " * i + "a:\n" for i in range(2000)),
        "a: " + "x" * 10_000_000, "a: [" + "1," * 500_000 + "]", "".join(f"k{i}: 1\n" for i in range(200_000)),
        "model: {model: a}\nmodel: {model: b}", "", "# nothing", "- model", "model:\n\tmodel: a", "\0", "---\n---\n",
        "a: " + "9" * 1_000_000, "a: 1e" + "9" * 1000, "a: 2024-13-45", "a: \"" + "\\x41" * 100_000 + "\"",
        "a: !!binary " + "A" * 100_000, "? " + "[" * 500 + "]" * 500, "extends: [x]", "extends: " + "../" * 5000 + "x",
        "%YAML 9.9\n---\na: 1", "%TAG ! tag:x\n---\na: !b c", "a: |\n" + " x\n" * 100_000, "key\n" * 100_000,
        "&a a: *a", "{" + "a: &x b, " * 5000 + "}", "a: '" + "'" * 100_000, "\u2028".join("abc" * 1000),
    ]  # fmt: skip
    return [text.encode("utf-8", "surrogatepass") for text in texts] + [
        b"model: caf\xe9", b"\xff\xfem\0o\0", b"\xfe\xff\0m", b"\x00" * 1000, bytes(range(256)), b"\xef\xbb\xbf",
        b"\x80" * 10_000,
    ]  # fmt: skip


def config_document(rng: random.Random) -> tuple[bytes, list[str]]:
    """A config file, and options of the command line."""
    text = rng.choice(recipes())
    kind = rng.random()
    if kind < 0.5:
        tree = yaml.safe_load(text)
        for _ in range(rng.randint(1, 4)):
            tree = change_tree(rng, tree)
        text = yaml.safe_dump(
            tree, allow_unicode=rng.random() < 0.5, default_flow_style=rng.choice([None, True, False])
        )
    elif kind < 0.9:
        text = change_text(rng, text)
    content = text.encode("utf-8", "surrogatepass")
    if kind >= 0.9:
        content = change_bytes(rng, content)
    overrides = []
    while rng.random() < 0.2:
        section = rng.choice(list(_known()))
        name = f"{section}.{rng.choice(_known()[section])}".removeprefix(".")
        made = rng.choice([str(value(rng)), change_text(rng, "[1, {a: b}]"), "1e-5"])
        overrides.append(f"{rng.choice([name, name.upper(), name + '.0', 'x'])}={made}".replace("\0", "0"))
    return content, [one.encode("utf-8", "replace").decode() for one in overrides]


# ---- data ------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "the path"}]},
    {"prompt": "What is 2?", "completion": "two"},
    {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"text": "A divergence is zero."},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        ],
        "images": ["picture.png"],
    },
    {
        "messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "4"}],
        "image": "IMAGE",
    },
]


def picture() -> bytes:
    """A small PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (20, 12), (200, 30, 60)).save(file, "PNG")
    return file.getvalue()


def data_row(rng: random.Random) -> Any:
    """A row, mostly a changed one."""
    row = json.loads(json.dumps(rng.choice(ROWS)))
    if row.get("image") == "IMAGE":
        content = picture() if rng.random() < 0.5 else change_bytes(rng, picture())
        row["image"] = rng.choice(["", "data:image/png;base64,"]) + base64.b64encode(content).decode()
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        row = change_tree(rng, row)
    return row


def _named(row: Any) -> Any:
    """With keys that are text, which tables need."""
    if isinstance(row, dict):
        return {str(name): _named(one) for name, one in row.items()}
    return [_named(one) for one in row] if isinstance(row, list) else row


def data_file(rng: random.Random) -> tuple[str, bytes]:
    """A file's name and content."""
    rows = [data_row(rng) for _ in range(rng.choice([0, 1, 2, 5]))] or [{}]
    kind = rng.choice(["jsonl", "jsonl", "json", "csv", "parquet", "txt"])
    if kind == "jsonl":
        content = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows).encode(
            "utf-8", "surrogatepass"
        )
    elif kind == "json":
        content = json.dumps(rng.choice([rows, {"data": rows}, rows[0]])).encode()
    elif kind == "csv":
        file = io.StringIO()
        flat = [{str(k): v if isinstance(v, str) else json.dumps(v) for k, v in _mapping(row).items()} for row in rows]
        writer = csv.DictWriter(file, sorted({name for row in flat for name in row}) or ["x"])
        writer.writeheader()
        writer.writerows(flat)
        content = file.getvalue().encode("utf-8", "surrogatepass")
    elif kind == "parquet":
        content = _parquet(rows)
    else:
        content = "\n".join(map(str, rows)).encode("utf-8", "surrogatepass")
    name = f"rows.{kind}"
    if rng.random() < 0.4:
        content = change_bytes(rng, content)
    if kind != "parquet" and rng.random() < 0.3:
        ending = rng.choice([".gz", ".bz2", ".xz", ".zst"])
        pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        content, name = pack.get(ending, bytes)(content), name + ending
        if rng.random() < 0.5:
            content = change_bytes(rng, content)
    return name, content


def _mapping(row: Any) -> dict[Any, Any]:
    return row if isinstance(row, dict) else {"row": row}


def _parquet(rows: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    try:
        table = pa.Table.from_pylist([_named(_mapping(row)) for row in rows])
        pq.write_table(table, file)
    except Exception:  # of mixed kinds: no table
        pq.write_table(pa.table({"text": [json.dumps(_named(row), default=str) for row in rows]}), file)
    return file.getvalue()


# ---- trying it -------------------------------------------------------------------------------------------------------


class Tally:
    """What came out."""

    def __init__(self) -> None:
        self.codes: Counter[str] = Counter()
        self.slowest = 0.0
        self.folder = Path(tempfile.mkdtemp(prefix="kdtrain-fuzz-"))
        self.failed: list[str] = []

    def fail(self, number: int, why: str, content: bytes, more: str = "") -> None:
        self.failed.append(f"{number}: {why}")
        (self.folder / f"{number}.input").write_bytes(content)
        (self.folder / f"{number}.why").write_text(f"{why}\n{more}", "utf-8", "backslashreplace")

    def summary(self, **more: Any) -> dict[str, Any]:
        self.folder.rmdir() if not self.failed else None
        return {
            "tried": sum(self.codes.values()),
            "ended": dict(sorted(self.codes.items())),
            "slowest_s": round(self.slowest, 3),
            **more,
            "failed": self.failed[:20] and [str(self.folder), *self.failed[:20]],
        }


def _memory() -> int:
    """Bytes of this process's addresses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak() -> int:
    """Bytes that this process had in memory at most; getrusage begins with those of the process that started it."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def fuzz_config(seed: int, count: int) -> dict[str, Any]:
    """`kdtrain validate` on the monsters and on `count` documents, in this process, whose memory is limited."""
    from kdtrain.cli import app

    rng, tally = random.Random(seed), Tally()
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "run.yaml"
    documents = [(content, []) for content in monsters()]
    _validated(app, path, b"model: {model: a}", [])  # what is imported once
    limit = _memory() + MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = _peak()
    for number in range(len(documents) + count):
        content, overrides = documents[number] if number < len(documents) else config_document(rng)
        began = time.process_time()
        code, said = _validated(app, path, content, overrides)
        took = time.process_time() - began
        tally.slowest = max(tally.slowest, took)
        tally.codes[str(code)] += 1
        if code not in (0, 2) or "Traceback" in said or took > SECONDS:
            tally.fail(number, f"exit {code} after {took:.2f} s, {overrides}", content, said)
    folder.cleanup()
    return tally.summary(memory_mib=round((_peak() - before) / 2**20, 1), ran=Path("ran").exists())


def _validated(app: Any, path: Path, content: bytes, overrides: list[str]) -> tuple[Any, str]:
    path.write_bytes(content)
    sys.argv = ["kdtrain", "validate", str(path), *overrides]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            app.main()
        return "no exit", out.getvalue()
    except SystemExit as done:
        return done.code or 0, out.getvalue()
    except BaseException:
        return "raised", out.getvalue() + traceback.format_exc()


def fuzz_data(seed: int, count: int) -> dict[str, Any]:
    """Each file through the static check, and where that finds nothing, read, encoded and put into batches."""
    import datasets

    from kdtrain.config import check_config
    from kdtrain.data import Collator, Source, build_dataset
    from kdtrain.errors import KdtrainError
    from kdtrain.preflight.files import data_files
    from tests.tiny_processors import make_llava

    datasets.disable_progress_bars()
    rng, tally = random.Random(seed), Tally()
    processor = make_llava()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "picture.png").write_bytes(picture())
        for number in range(count):
            file, content = data_file(rng)
            if rng.random() < 0.1:
                (folder / "picture.png").write_bytes(change_bytes(rng, picture()))
            (folder / file).write_bytes(content)
            began = time.perf_counter()
            config = {
                "model": {"model": "org/a"},
                "data": {"train": str(folder / file), "max_bad_rows": rng.choice([0, 2, 9])},
                "rlhf": {"llm_kd_weight": 0.0, "sft_alpha": 1.0},
                "training": {"output_dir": str(folder / "run")},
            }
            code = "raised"
            try:
                result = check_config(config, files=data_files)
                code = "2"
                if result.config is not None:
                    source = Source(**result.config.data.train[0].model_dump())
                    rows, _ = build_dataset(
                        [source], processor, max_length=96, on_overlength="truncate", train_on="assistant",
                        max_bad_rows=config["data"]["max_bad_rows"], cache_dir=str(folder / "cache"), num_proc=1,
                    )  # fmt: skip
                    for row in rows:
                        Collator(processor)([row])
                    code = "0"
            except KdtrainError as error:
                code = str(error.exit_code)
                if code not in ("2", "3"):
                    tally.fail(number, f"exit {code}: {error}", content, traceback.format_exc())
            except BaseException as error:
                tally.fail(
                    number, f"{file}: {type(error).__name__}: {str(error)[:200]}", content, traceback.format_exc()
                )
            (folder / file).unlink()
            tally.codes[code] += 1
            tally.slowest = max(tally.slowest, time.perf_counter() - began)
    return tally.summary()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = {"config": fuzz_config, "data": fuzz_data}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found))
    sys.exit(bool(found["failed"]))
