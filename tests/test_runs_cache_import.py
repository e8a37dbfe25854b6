"""`kdtrain cache --from`: targets of other tools, in their real formats, at the tokens that they are for."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from kdtrain.config import ConfigLoader
from kdtrain.config.arguments import build_train_arguments
from kdtrain.data.row_key import row_key
from kdtrain.errors import ConfigError, DataError, PreflightError
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.runs.cache_folder import lock
from kdtrain.runs.cache_import import import_cache
from kdtrain.teachers.cached.import_distillkit import Quantized, _decoded
from kdtrain.teachers.cached.manifest import Manifest
from kdtrain.teachers.cached.store import CacheReader
from tests import tiny
from tests.foreign_targets import (
    DELTAS,
    LEGACY,
    RECOMMENDED,
    WITH_BINS,
    logprobs_of,
    top_k,
    write_axolotl_chats,
    write_axolotl_prepared,
    write_distillkit,
    write_legacy,
)
from tests.test_runs_cache import Silent, rows_of

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
ANSWERS = [
    "the path of the file that the function returns",
    "a token and the student that learns from the teacher",
    "a divergence is zero when the two distributions are equal: what the student has learnt is what the teacher knows",
    "numbers such as 1, 2, 30 and 444",
    "it returns the path, and a token",
    "the teacher predicts the next token",
]
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]}
    for i, answer in enumerate(ANSWERS)
]


@pytest.fixture
def project(tmp_path, tokenizer):
    tiny.make_project(tmp_path, tokenizer)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["rlhf"] = {"lmbda": 0.0, "teacher": {"backend": "cache", "path": "cache"}}
    config["data"]["max_length"] = 128
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def bring_in(project, source, *overrides, reporter=None):
    config = ConfigLoader.load(project / "config.yaml", ["training.use_cpu=true", *overrides], new_cache=True)
    return import_cache(build_train_arguments(config), source, project / "cache", reporter or Silent())


def encoded(project):
    """The rows of the config, and those of them alone that a file would have."""
    set_up = ConfigLoader.load(project / "config.yaml", new_cache=True)
    assert set_up.rlhf.teacher.backend == "cache"
    return rows_of(project, "rlhf.teacher.backend=hf", f"rlhf.teacher_model={project / 'teacher'}")[1][: len(CHATS)]


def require_right(project, rows, k, atol, normalized=False):
    """The cache has, for each row, what the teacher says of its supervised tokens."""
    reader = CacheReader(project / "cache")
    for row in rows:
        labels = np.asarray(row["labels"])
        at = np.flatnonzero(labels[1:] != IGNORE_INDEX) + 1
        ids, values = top_k(logprobs_of(row["input_ids"])[at - 1], k)
        if normalized:
            values = values - np.log(np.exp(values).sum(1, keepdims=True))
        stored = reader.read([row_key(row)])
        by_id = [
            dict(zip(i, v, strict=True)) for i, v in zip(stored.indices.tolist(), stored.logprobs.tolist(), strict=True)
        ]
        for found, wanted, numbers in zip(by_id, ids.tolist(), values.tolist(), strict=True):
            assert [found[token] for token in wanted] == pytest.approx(numbers, abs=atol)
    manifest = Manifest.read(project / "cache")
    assert manifest.complete
    assert manifest.rows == len(rows)
    return manifest


FORMATS = {"recommended": (RECOMMENDED, 0.15), "bins": (WITH_BINS, 0.5), "deltas": (DELTAS, 0.02)}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("pad", [True, tiny.slow(False)])
def test_distillkits_quantised_targets_are_those_of_the_tokens_that_they_are_for(name, pad, project):
    config, atol = FORMATS[name]
    rows = encoded(project)
    source = write_distillkit(project / "logits", [row["input_ids"] for row in rows], config, pad=pad)
    result = bring_in(project, source)
    assert result.rows == len(CHATS)
    manifest = require_right(project, rows, 24, atol)
    assert "DistillKit, quantised" in manifest.made_from["imported from"]
    assert "entry j describes token j + 1" in manifest.made_from["imported from"]
    assert "Not known: the teacher" in manifest.made_from["imported from"]


def test_the_bytes_are_those_of_distillkits_own_packing():
    from tests.foreign_targets import bits_of, coded

    # Worked out by hand: nine bits each, 5 = 000000101 and 300 = 100101100; then 1.0 and -1.0 as bfloat16.
    assert bits_of([5, 300], 9) == bytes([0b00000010, 0b11001011, 0b00000000])
    config = {**RECOMMENDED, "k": 2, "exact_k": 2, "polynomial_terms": None}
    assert coded([-0.5, -1.0], config) == bytes([0x00, 0xBF, 0x80, 0xBF])


def test_residuals_are_integers_times_a_scale():
    bins = [
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
        {"scale_dtype": "float32", "element_bits": 3, "num_elements": 2},
    ]
    config = Quantized(**{**RECOMMENDED, "k": 5, "exact_k": 1, "polynomial_terms": None, "residual_bins": bins})
    half = bytes([0, 0, 0, 0x3F])
    # -1 as bfloat16; then 0.5 times +1 and -1; then 0.5 times 7 - 4 and 1 - 4
    raw = bytes([0x80, 0xBF]) + half + bytes([0b10000000]) + half + bytes([0b11100100])
    assert _decoded(config, np.frombuffer(raw, np.uint8)[None]).tolist() == [[-1.0, 0.5, -0.5, 1.5, -1.5]]


def test_packed_rows_of_distillkit_are_taken_apart(project):
    rows = encoded(project)
    source = write_distillkit(project / "logits", [row["input_ids"] for row in rows], packed=True)
    assert pq.read_table(source / "data_0.parquet").num_rows == 1
    bring_in(project, source)
    require_right(project, rows, 24, 0.15)


def test_distillkits_older_format(project):
    rows = encoded(project)
    bring_in(project, write_legacy(project / "logits", [row["input_ids"] for row in rows]))
    assert "its older format" in require_right(project, rows, LEGACY["k"], 0.15).made_from["imported from"]


def test_distillkits_older_format_with_logits_says_why_it_cannot_be_read(project):
    source = write_legacy(project / "logits", [row["input_ids"] for row in encoded(project)], logits=True)
    with pytest.raises(DataError, match=r"values are above 0.*logits less their mean"):
        bring_in(project, source)


def tokens_of_answers(rows):
    return [sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows]


@pytest.mark.parametrize("numbers", [False, True])
def test_axolotls_rows_are_matched_by_their_conversation(numbers, project):
    rows = encoded(project)
    source = write_axolotl_chats(
        project / "rows.jsonl", CHATS, [row["input_ids"] for row in rows], tokens_of_answers(rows), numbers=numbers
    )
    bring_in(project, source)
    said = require_right(project, rows, 8, 0.02).made_from["imported from"]
    assert "the last entry describes the last supervised token" in said  # the template writes a newline behind it
    assert "and the temperature" in said


@pytest.mark.parametrize("numbers", [False, True])
def test_axolotls_rows_with_an_entry_for_every_token_of_the_prompt_too(numbers, project):
    rows = encoded(project)
    ids, counts = [row["input_ids"] for row in rows], tokens_of_answers(rows)
    bring_in(project, write_axolotl_chats(project / "r.jsonl", CHATS, ids, counts, numbers=numbers, whole=True))
    said = require_right(project, rows, 8, 0.02).made_from["imported from"]
    assert "the last entry describes the last token of the row" in said


def test_a_conversation_under_another_name_is_found_or_read_as_the_config_says(project):
    rows = encoded(project)
    chats = [{"messages_combined": chat["messages"], "id": i} for i, chat in enumerate(CHATS)]
    source = write_axolotl_chats(project / "r.jsonl", chats, [r["input_ids"] for r in rows], tokens_of_answers(rows))
    bring_in(project, source)
    require_right(project, rows, 8, 0.02)


@pytest.mark.parametrize("legacy", [False, True])
def test_axolotls_prepared_rows_are_read_by_the_convention_that_fits(legacy, project):
    rows = encoded(project)
    source = write_axolotl_prepared(project / "rows.parquet", [row["input_ids"] for row in rows], legacy=legacy)
    bring_in(project, source, "rlhf.teacher.tail=renormalize")
    manifest = require_right(project, rows, 8, 0.02, normalized=True)
    assert ("entry j describes token j)" in manifest.made_from["imported from"]) is legacy
    assert manifest.made_from["rlhf.teacher.tail"] == "renormalize"


def test_targets_that_are_normalised_over_the_k_alone_want_renormalize(project):
    source = write_axolotl_prepared(project / "rows.parquet", [row["input_ids"] for row in encoded(project)])
    with pytest.raises(PreflightError, match=r"add up to 1 over the 8 tokens.*rlhf.teacher.tail: renormalize"):
        bring_in(project, source)
    assert not (project / "cache").exists()


@pytest.mark.parametrize(("shift", "side"), [(1, "before"), (-1, "after")])
def test_distillkits_targets_that_are_off_by_one_are_refused_with_the_direction(shift, side, project):
    rows = [row["input_ids"] for row in encoded(project)]
    with pytest.raises(PreflightError, match=f"off by one: they are those of the token {side}"):
        bring_in(project, write_distillkit(project / "logits", rows, shift=shift))


def test_targets_that_fit_nowhere_are_refused_where_the_format_does_not_say(project):
    rows = [row["input_ids"] for row in encoded(project)]
    source = write_axolotl_prepared(project / "rows.parquet", rows, normalized=False)
    table = pq.read_table(source)
    ids = [np.random.default_rng(0).permutation(320)[:8].tolist() for _ in range(200)]
    shuffled = [
        [ids[(i + j) % 200] for j in range(len(row))] for i, row in enumerate(table["target_token_ids"].to_pylist())
    ]
    pq.write_table(table.set_column(1, "target_token_ids", [shuffled]), source)
    with pytest.raises(PreflightError, match=r"cannot be told: entry j describes.* or entry j describes"):
        bring_in(project, source)


def test_rows_that_fit_nothing_are_counted_and_named(project, caplog):
    rows = encoded(project)
    ids = [row["input_ids"] for row in rows]
    foreign = [[5, 6, 7, 8, 9] * 4, [9, 8, 7, 6] * 5]
    bring_in(project, write_distillkit(project / "logits", [*ids[:4], *foreign, ids[0]]))
    manifest = require_right(project, rows[:4], 24, 0.15)
    assert manifest.rows == 4
    said = caplog.text
    assert "left out: 2, no row of the config's data has these tokens (" in said
    assert "data_0.parquet, row 5; " in said
    assert "left out: 1, the same tokens stand in it before" in said
    assert "2 of 6 rows of the data have no targets in the file (source:row 0:4, 0:5): training from this" in said


def test_a_row_whose_own_targets_are_moved_is_left_out(project, caplog):
    found = encoded(project)
    rows, counts = [row["input_ids"] for row in found], tokens_of_answers(found)
    longest = counts.index(max(counts))
    assert counts[longest] > 36
    source = write_distillkit(project / "logits", rows)
    moved = pq.read_table(write_distillkit(project / "moved", rows, shift=1) / "data_0.parquet")
    table = pq.read_table(source / "data_0.parquet")
    columns = {
        name: [
            *table[name].to_pylist()[:longest],
            moved[name].to_pylist()[longest],
            *table[name].to_pylist()[longest + 1 :],
        ]
        for name in table.column_names
    }
    pq.write_table(type(table).from_pydict(columns, schema=table.schema), source / "data_0.parquet")
    bring_in(project, source)
    assert "their targets fit the token before the one that they are for" in caplog.text


def test_no_row_of_the_config_is_an_error_with_the_first_places(project):
    with pytest.raises(
        DataError, match=r"(?s)No row of the file can be used.*row 1: no row of the config.*token by token"
    ):
        bring_in(project, write_distillkit(project / "logits", [[5, 6, 7, 8, 9] * 4]))
    assert not (project / "cache").exists()


def change(name, value, message):
    return pytest.param({name: value}, message, id=f"{name} {value}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        change("k", 25, "bytes of ids and"),
        change("exact_k", 30, "compression_config.yaml: "),
        change("exact_dtype", "int8", "exact_dtype"),
        change("d", 100_000, "bytes of ids"),
        change("exponent", 3, "exponent"),
    ],
)
def test_a_compression_config_that_does_not_fit_is_named(changes, message, project):
    source = write_distillkit(project / "logits", [row["input_ids"] for row in encoded(project)])
    (source / "compression_config.yaml").write_text(yaml.safe_dump({**RECOMMENDED, **changes}))
    with pytest.raises(DataError, match=message):
        bring_in(project, source)


def test_a_missing_compression_config_is_asked_for(project):
    source = write_distillkit(project / "logits", [row["input_ids"] for row in encoded(project)])
    (source / "compression_config.yaml").unlink()
    with pytest.raises(DataError, match=r"compression_config.yaml is missing.*logprob_compressor as it stands in"):
        bring_in(project, source)


def test_tokens_as_text_are_refused(project):
    rows = encoded(project)
    source = write_axolotl_chats(
        project / "rows.jsonl", CHATS, [row["input_ids"] for row in rows], tokens_of_answers(rows), texts=True
    )
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: word\d+: its tokens are text and not ids.*return_tokens_as_token_ids"
    ):
        bring_in(project, source)


def test_what_is_no_file_of_targets_is_said(project):
    with pytest.raises(DataError, match="does not exist"):
        bring_in(project, project / "nowhere")
    with pytest.raises(DataError, match=r"no targets of a format that is known: its columns are messages\. Read are"):
        bring_in(project, project / "train.jsonl")
    (project / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"neither a \.parquet or \.jsonl file"):
        bring_in(project, project / "notes.txt")
    (project / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        bring_in(project, project / "broken.parquet")


def test_a_folder_with_a_cache_is_not_written_over_and_a_begun_import_is_begun_anew(project):
    rows = encoded(project)
    source = write_distillkit(project / "logits", [row["input_ids"] for row in rows])
    bring_in(project, source)
    with pytest.raises(PreflightError, match="holds a cache already"):
        bring_in(project, source)
    manifest = json.loads((project / "cache" / "manifest.json").read_text())
    (project / "cache" / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    bring_in(project, source)
    require_right(project, rows, 24, 0.15)


def test_nothing_stays_of_an_import_that_was_stopped(project):
    rows = encoded(project)
    bring_in(project, write_distillkit(project / "logits", [row["input_ids"] for row in rows]))
    cache = project / "cache"
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    (cache / "shard-00000.safetensors").rename(cache / "shard-00001.safetensors")  # of a file with more rows
    bring_in(project, project / "logits")
    assert [path.name for path in cache.glob("shard-*")] == ["shard-00000.safetensors"]
    require_right(project, rows, 24, 0.15)


def test_while_a_cache_is_written_nothing_is_imported_into_its_folder(project):
    source = write_distillkit(project / "logits", [row["input_ids"] for row in encoded(project)])
    with ExitStack() as other:
        lock(project / "cache", other)
        with pytest.raises(PreflightError, match=r"Another kdtrain cache is writing into --out .*/cache now"):
            bring_in(project, source)
    bring_in(project, source)


def test_a_cache_that_is_imported_is_trained_from(project):
    from kdtrain.runs.fit import fit
    from tests.test_models_probe import Silent as Quiet

    source = write_distillkit(project / "logits", [row["input_ids"] for row in encoded(project)])
    bring_in(project, source)
    fit(ConfigLoader.load_training_config(project / "config.yaml", ["training.use_cpu=true"]), Quiet())
    record = json.loads((project / "run" / "logging.jsonl").read_text().splitlines()[0])
    assert torch.isfinite(torch.tensor(record["llm_kd_loss"]))


def test_a_cache_normalised_over_the_k_is_not_trained_from_with_a_bucket(project):
    source = write_axolotl_prepared(project / "rows.parquet", [row["input_ids"] for row in encoded(project)])
    bring_in(project, source, "rlhf.teacher.tail=renormalize")
    from kdtrain.runs.fit import fit
    from tests.test_models_probe import Silent as Quiet

    with pytest.raises(PreflightError, match=r"another rlhf.teacher.tail: renormalize. This run has: bucket"):
        fit(ConfigLoader.load_training_config(project / "config.yaml", ["training.use_cpu=true"]), Quiet())


def test_under_a_launcher_it_is_refused(project, monkeypatch):
    monkeypatch.setattr("kdtrain.runs.cache_import.under_launcher", lambda: True)
    with pytest.raises(ConfigError, match="run it in one process"):
        bring_in(project, project / "train.jsonl")


def kdtrain(project, *arguments):
    command = [sys.executable, "-m", "kdtrain", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_on_the_command_line_a_config_of_the_cache_to_be_is_enough(project):
    rows = encoded(project)
    write_distillkit(project / "logits", [row["input_ids"] for row in rows])
    code, out, err = kdtrain(project, "cache", "config.yaml", "--from", "logits", "--out", "cache")
    assert code == 0, err
    assert "6 rows, 168 supervised tokens" in out
    assert "DistillKit, quantised" in err
    require_right(project, rows, 24, 0.15)


@pytest.mark.parametrize("option", [["--top-k", "5"], ["--verify", "3"]])
def test_options_of_a_teacher_have_no_effect_and_are_refused(option, project):
    code, _, err = kdtrain(project, "cache", "config.yaml", "--from", "logits", "--out", "c", *option)
    assert code == 2
    assert f"{option[0]} " in err
