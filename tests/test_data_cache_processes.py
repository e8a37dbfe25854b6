"""Several processes that encode the same rows into one cache at once, and what those that are killed leave behind."""

import multiprocessing
import os
import signal
import time

import datasets
import pytest

from kdtrain.data import Source, build_dataset, scratch
from kdtrain.data import cache as encoding_module
from tests.test_data_dataset import pair, write_lines

datasets.disable_progress_bars()
FORK = multiprocessing.get_context("fork")


def build(path, tokenizer, cache):
    return build_dataset(
        [Source(path)],
        tokenizer,
        max_length=None,
        on_overlength="error",
        train_on="assistant",
        num_proc=1,
        cache_dir=str(cache),
    )[0]


def encode(path, tokenizer, folders, barrier, results):
    """In a process: encode the rows into each cache, at the same moment as the other one."""
    try:
        for folder in folders:
            barrier.wait(60)
            results.put((folder, build(path, tokenizer, folder)[:]))
    except BaseException as error:
        results.put((None, repr(error)))
        barrier.abort()
        raise


def both_succeed(tmp_path, tokenizer, times):
    path = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(40)])
    expected = build(path, tokenizer, tmp_path / "expected")[:]
    folders = [tmp_path / f"cache-{number}" for number in range(times)]
    barrier, results = FORK.Barrier(2), FORK.Queue()
    processes = [FORK.Process(target=encode, args=(path, tokenizer, folders, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in range(2 * times)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], found
    assert sorted(folder for folder, _ in found) == sorted([*folders, *folders])
    assert all(rows == expected for _, rows in found)
    for folder in folders:
        assert [entry.name[:8] for entry in folder.iterdir()] == ["encoded-"]


def test_two_processes_that_encode_the_same_rows_at_once_both_succeed(tmp_path, tokenizer):
    both_succeed(tmp_path, tokenizer, 3)


@pytest.mark.faults
def test_two_processes_that_encode_the_same_rows_at_once_both_succeed_50_times(tmp_path, tokenizer):
    both_succeed(tmp_path, tokenizer, 50)


def test_an_entry_that_another_process_has_just_stored_stays(tmp_path, tokenizer, monkeypatch):
    """The other one stores the same rows between our look into the cache and our own storing."""
    path, cache = write_lines(tmp_path / "a.jsonl", [pair(0)]), tmp_path / "cache"
    real, theirs = encoding_module.encode_batch, []

    def slower(*arguments, **options):
        monkeypatch.setattr(encoding_module, "encode_batch", real)
        build(path, tokenizer, cache)
        theirs.extend(file.stat().st_ino for file in cache.glob("encoded-*/rows*.arrow"))
        return real(*arguments, **options)

    monkeypatch.setattr(encoding_module, "encode_batch", slower)
    found = build(path, tokenizer, cache)
    assert len(theirs) == 1
    assert [file.stat().st_ino for file in cache.glob("encoded-*/rows*.arrow")] == theirs
    assert found.cache_files[0]["filename"].startswith(str(next(cache.glob("encoded-*"))))


def _encode_and_wait(path, tokenizer, cache, reached, go_on):
    real = encoding_module.encode_batch

    def waiting(*arguments, **options):
        reached.set()
        assert go_on.wait(60)
        return real(*arguments, **options)

    encoding_module.encode_batch = waiting
    build(path, tokenizer, cache)


@pytest.mark.parametrize("killed", [True, False])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path, tokenizer, killed):
    path, cache = write_lines(tmp_path / "a.jsonl", [pair(0)]), tmp_path / "cache"
    reached, go_on = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_encode_and_wait, args=(path, tokenizer, cache, reached, go_on))
    process.start()
    assert reached.wait(60)
    written = {entry.name for entry in cache.iterdir()}
    assert sorted(name.partition("-")[0] for name in written) == ["encoding", "reading"]
    if killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    build(path, tokenizer, cache)
    assert {entry.name for entry in cache.iterdir()} & written == (set() if killed else written)
    if not killed:
        go_on.set()
        process.join(60)
        assert process.exitcode == 0
    assert [entry.name[:8] for entry in cache.iterdir()] == ["encoded-"]


def test_of_another_machine_only_what_is_old_is_removed(tmp_path, monkeypatch):
    for name in ("encoding-elsewhere-a", "encoding-elsewhere-b"):
        (tmp_path / name).mkdir()
    old = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / "encoding-elsewhere-b", (old, old))
    with scratch.scratch_folder(tmp_path, "encoding-") as folder:
        assert {entry.name for entry in tmp_path.iterdir()} == {"encoding-elsewhere-a", folder.name}
