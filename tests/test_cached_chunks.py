"""A cache of what a teacher with another tokenizer says of chunks of text: what is in it, what is learnt from it."""

import json
import pickle
from dataclasses import replace

import datasets
import pytest
import torch
import yaml

from kdtrain.data import Collator, Source, build_dataset
from kdtrain.data.byte_alignment import NONE
from kdtrain.data.other_tokenizer import OtherTokenizer
from kdtrain.data.row_key import row_key, row_keys
from kdtrain.errors import ConfigError, DataError, PreflightError, TeacherError
from kdtrain.losses.reduce import next_token_labels
from kdtrain.runs import build
from kdtrain.teachers import CachedTeacher, LocalTeacher
from kdtrain.teachers.cached import chunk_format
from kdtrain.teachers.cached.chunk_format import RowChunks
from kdtrain.teachers.cached.manifest import Manifest
from kdtrain.teachers.cached.store import CacheReader, CacheWriter, Format
from kdtrain.teachers.cached.writing import rows_of_targets
from tests import tiny, tiny_other
from tests.stub_server import StubServer
from tests.test_cli import kdtrain as command  # noqa: F401 - a fixture
from tests.test_runs_cache import Silent, files, rows_of, write
from tests.test_runs_cached import fit, from_cache, write_rows
from tests.test_runs_served import status
from tests.test_teachers_cached import losses
from tests.test_trainer import make_trainer
from tests.test_trainer_other_tokenizer import ROWS, WAYS, log_likelihoods, weights_after

FORM = Format("chunks", 0)


# ---- the trainer -----------------------------------------------------------------------------------------------------


def stored(folder, rows=ROWS):
    """A cache of raw rows, written two at a time."""
    own, of_teacher = tiny.make_tokenizer(), tiny_other.byte_level()
    collator = Collator(own, other_tokenizer=OtherTokenizer(own, of_teacher), row_keys=True)
    teacher, known = LocalTeacher(tiny_other.make_teacher(of_teacher)), {}
    for start in range(0, len(rows), 2):
        batch = collator(rows[start : start + 2])
        with torch.no_grad():
            found = rows_of_targets(teacher.targets(batch), batch, FORM, batch.rows.keys)
        known |= dict(zip(batch.rows.keys, found, strict=True))
    folder.mkdir(parents=True)
    CacheWriter(folder, FORM).write_shard(0, list(known), list(known.values()))
    return folder


def weights_from_cache(folder, rows=ROWS, steps=2, **options):
    """As `weights_after`, with no teacher but the cache, and the collator that the trainer makes."""
    teacher = CachedTeacher(folder / "cache")
    options = {"per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "max_steps": steps, **options}
    trainer = make_trainer(
        folder / "run", None, None, rows, extra={"teacher": teacher}, cross_tokenizer="alm", sft_alpha=0.3,
        llm_kd_weight=50.0, train_sampling_strategy="sequential", lr_scheduler_type="constant", max_grad_norm=1e9,
        **options,
    )  # fmt: skip
    trainer.train()
    teacher.close()
    records = [record for record in trainer.state.log_history if "loss" in record]
    numbers = [record[key] for record in records for key in ("loss", "llm_kd_loss", "grad_norm", "aligned_share")]
    return numbers, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()


@pytest.mark.parametrize("way", tiny.first_quick(WAYS))
def test_training_from_it_equals_training_with_its_teacher(tmp_path, way):
    stored(tmp_path / "cache")
    numbers, weights = weights_from_cache(tmp_path, **WAYS[way])
    expected, wanted = weights_after(tmp_path / "live")
    assert numbers == pytest.approx(expected, rel=1e-5)
    assert weights == pytest.approx(wanted, abs=2e-6)


def test_weights_of_rows_count_as_with_its_teacher(tmp_path):
    rows = [{**row, "kd_weight": weight} for row, weight in zip(ROWS, [0, 2, 1, 0.5, 1, 0, 3, 1], strict=True)]
    stored(tmp_path / "cache", rows)
    numbers, weights = weights_from_cache(tmp_path, rows)
    expected, wanted = weights_after(tmp_path / "live", rows=rows)
    assert numbers == pytest.approx(expected, rel=1e-5)
    assert weights == pytest.approx(wanted, abs=2e-6)


def test_two_ranks_train_from_it_as_one_process_with_its_teacher(tmp_path):
    stored(tmp_path / "cache")
    expected, wanted = weights_after(tmp_path / "one")
    for numbers, weights in tiny.run_ranks(_on_ranks, 2, tmp_path):
        assert numbers == pytest.approx(expected, rel=1e-5)
        assert weights == pytest.approx(wanted, abs=2e-6)


def _on_ranks(folder):
    return weights_from_cache(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_rows_with_the_same_tokens_and_other_conversations_have_their_own_targets(tmp_path):
    """A template may leave out what the teacher reads."""
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    options = {"max_length": 64, "on_overlength": "error", "train_on": "assistant", "keep_chats": True}
    (row,) = build_dataset([Source(str(tmp_path / "a.jsonl"))], tiny.make_tokenizer(), **options)[0]
    other = {**row, "chat": row["chat"].replace("What is", "Who was")}
    rows = datasets.Dataset.from_list([row, other])
    assert len(set(row_keys(rows))) == 1
    keys = list(row_keys(rows, chats=True))
    here, there = CacheReader(stored(tmp_path / "cache", list(rows))).read_chunks(keys)
    assert torch.equal(here.numbers, there.numbers)
    assert not torch.allclose(here.logprobs, there.logprobs, atol=1e-3)


def test_what_a_trainer_cannot_do_with_it_is_refused(tmp_path):
    teacher = CachedTeacher(stored(tmp_path / "cache"))
    own = {"extra": {"teacher": teacher}}
    with pytest.raises(ConfigError, match=r"likelihoods of chunks of text .*set cross_tokenizer to alm"):
        make_trainer(tmp_path, None, None, ROWS, **own)
    with pytest.raises(ConfigError, match="uld needs distributions"):
        make_trainer(tmp_path, None, None, ROWS, **own, cross_tokenizer="uld")
    collator = Collator(tiny.make_tokenizer(), row_keys=True)
    extra = {"teacher": teacher, "data_collator": collator}
    with pytest.raises(ConfigError, match="which tokens of student and teacher belong together"):
        make_trainer(tmp_path, None, None, ROWS, extra=extra, cross_tokenizer="alm")
    with pytest.raises(PreflightError, match=r"other_tokenizer=teacher\.aligner"):
        Collator(tiny.make_tokenizer(), other_tokenizer=teacher.aligner)(ROWS[:2])
    teacher.close()


def test_workers_of_a_data_loader_can_be_sent_the_collator(tmp_path):
    teacher = CachedTeacher(stored(tmp_path / "cache"))
    collator = Collator(tiny.make_tokenizer(), row_keys=True, other_tokenizer=teacher.aligner)
    expected = collator(ROWS[:3]).student_chunks
    found = pickle.loads(pickle.dumps(collator))(ROWS[:3]).student_chunks
    assert torch.equal(found.numbers, expected.numbers)
    assert expected.numbers.max() > 0
    teacher.close()


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(project, monkeypatch):
    """The project, whose teacher has another tokenizer: four steps on 40 different rows, evaluated on 8 others."""
    monkeypatch.chdir(project)
    of_teacher = tiny_other.byte_level()
    tiny.save_model(tiny_other.make_teacher(of_teacher), of_teacher, project / "teacher")
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["rlhf"] |= {"cross_tokenizer": "alm", "llm_kd_weight": 50.0, "sft_alpha": 0.3}
    config["training"] |= {"max_steps": 4, "eval_steps": 2, "gradient_accumulation_steps": 2}
    write_rows(project / "train.jsonl", range(40))
    write_rows(project / "eval.jsonl", range(100, 108))
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return project


def test_fit_from_what_the_command_writes_needs_nothing_of_the_teacher(two, monkeypatch):
    expected, of_teacher = fit(two / "config.yaml", output="own")
    write(two)
    (two / "teacher").rename(two / "gone")
    monkeypatch.setattr(build, "build_teacher", lambda *args, **kwargs: pytest.fail("a teacher is loaded"))
    found, of_cache = fit(two / "config.yaml", *from_cache(two / "cache"))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    torch.testing.assert_close(of_cache, of_teacher, rtol=0, atol=1e-5)
    evaluated = [[record[name] for record in records if name in record]
                 for records in (found, expected) for name in ("eval_llm_kd_loss", "eval_aligned_share")]  # fmt: skip
    assert len(evaluated[0]) == 2
    assert evaluated[:2] == [pytest.approx(one, rel=1e-5) for one in evaluated[2:]]


def test_it_holds_the_teachers_likelihood_of_each_chunk(two):
    result = write(two, verify=100)
    assert result.verified.largest < 1e-4
    reader, of_teacher = CacheReader(two / "cache"), tiny_other.byte_level()
    assert reader.form == FORM
    processing, rows = rows_of(two)
    collator = Collator(processing, other_tokenizer=OtherTokenizer(processing, of_teacher))
    for row in (rows[0], rows[7], rows[41]):
        batch = collator([row])
        tokens = batch.teacher_tokens
        expected = log_likelihoods(
            tiny_other.make_teacher(of_teacher), tokens.input_ids, tokens.attention_mask, tokens.labels, tokens.chunks
        )
        (found,) = reader.read_chunks([row_key(row, chats=True)])
        assert found.numbers.tolist() == next_token_labels(batch.student_chunks.numbers)[batch.predicts_BT].tolist()
        wanted = torch.stack([expected[0, chunk] for chunk in range(len(found.logprobs))])
        torch.testing.assert_close(found.logprobs.double(), wanted, rtol=1e-5, atol=1e-5)
        assert [found.aligned_bytes, found.answer_bytes] == [
            int(one) for one in (batch.student_chunks.aligned_bytes, batch.student_chunks.answer_bytes)
        ]
    assert result.bytes / result.tokens < 10  # 4 a token, and 48 a row of some 30


@pytest.mark.slow
def test_a_server_writes_what_the_same_model_does_here(two):
    write(two)
    of_teacher = tiny_other.byte_level()
    with StubServer(tiny_other.make_teacher(of_teacher), tokenizer=of_teacher) as server:
        served = ["backend=vllm", f"base_url={server.url}", "model=teacher", "max_retries=0"]
        write(two, "served", *(f"rlhf.teacher.{option}" for option in served))
        asked = [one for one in server.asked("/v1/completions") if "prompt_logprobs" in one.body]
    assert {one.body["prompt_logprobs"] for one in asked} == {1, 5}  # of the rows, and by the probe
    keys = list(row_keys_of(two))
    for here, there in zip(*(CacheReader(two / name).read_chunks(keys) for name in ("cache", "served")), strict=True):
        assert torch.equal(here.numbers, there.numbers)
        torch.testing.assert_close(here.logprobs, there.logprobs, rtol=1e-4, atol=1e-4)
    manifests = [Manifest.read(two / name).made_from for name in ("cache", "served")]
    for what in ("tokenizer of the teacher (rlhf.teacher_model)", "chat template of the teacher (rlhf.teacher_model)"):
        assert manifests[0][what] == manifests[1][what]


def row_keys_of(project):
    return (row_key(row, chats=True) for row in rows_of(project)[1])


@pytest.mark.slow
def test_a_stopped_one_goes_on_to_the_same_files(two):
    options = ["training.per_device_eval_batch_size=1"]
    write(two, "whole", *options)
    expected = files(two / "whole")

    def stop(done, total):
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(two, "cache", *options, reporter=Silent(stop))
    assert not Manifest.read(two / "cache").complete
    assert 0 < len(files(two / "cache")) < len(expected)
    assert write(two, "cache", *options).written < 48
    assert files(two / "cache") == expected


def test_all_rows_are_looked_at_before_the_teacher_is_asked(two):
    """Without a row that cannot be used it would be another cache, and what was written of it in vain."""
    other = tiny_other.byte_level()
    written = "('Nothing of it, not a word' if '1' in m.content[:2] and m.role == 'assistant' else m.content)"
    other.chat_template = tiny_other.TEMPLATE.replace("m.content", written)
    other.save_pretrained(two / "teacher")
    with pytest.raises(DataError, match=r"\d+ of 48 rows cannot be compared with this teacher:\nrow 0:1: ") as caught:
        write(two)
    assert "\nrow 0:10: " in str(caught.value)
    assert " more" in str(caught.value).splitlines()[-1]
    assert not (two / "cache").exists()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "wanted", "message"), [
    (["rlhf.cross_tokenizer=uld"], {}, "uld needs the teacher's distributions at its own tokens"),
    ([], {"mode": "topk"}, "--mode topk stores what the teacher says of the student's tokens"),
    ([], {"mode": "hidden"}, "leave --mode out, which is then chunks"),
    (["rlhf.cross_tokenizer=null"], {"mode": "chunks"}, "--mode chunks .* of a teacher with another tokenizer"),
])  # fmt: skip
def test_modes_that_do_not_fit_are_refused(two, overrides, wanted, message):
    with pytest.raises(ConfigError, match=message):
        write(two, "cache", *overrides, **wanted)
    assert not (two / "cache").exists()


def test_the_command_line_names_the_mode_that_it_takes(two, command):  # noqa: F811
    code, _, err = command("cache", str(two / "config.yaml"), "--out", str(two / "c"), "--top-k", "5")
    assert code == 2
    assert "--top-k is an option of --mode topk, not of --mode chunks" in err
    code, _, err = command("cache", str(two / "config.yaml"), "--out", str(two / "c"))
    assert code == 0, err
    table = " ".join(err.split())
    assert "targets log-likelihoods of the chunks of text that both models' tokens make up rows" in table


def test_targets_of_other_tools_are_for_the_students_own_tokens(two, command):  # noqa: F811
    code, _, err = command("cache", str(two / "config.yaml"), "--out", str(two / "c"), "--from", str(two / "x.parquet"))
    assert code == 2
    assert "--from reads targets for the student's own tokens" in err


def test_a_run_that_differs_is_refused_with_all_that_differs(two):
    write(two)
    of_teacher = tiny_other.byte_level()
    of_teacher.chat_template = tiny_other.TEMPLATE.replace("[", "<")
    of_teacher.save_pretrained(two / "teacher")
    path = two / "student" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(PreflightError) as caught:
        fit(two / "config.yaml", *from_cache(two / "cache"), "data.train_on=last")
    text = str(caught.value)
    for part in ("another chat template: ", "another chat template of the teacher (rlhf.teacher_model): ",
                 "another data.train_on: assistant. This run has: last."):  # fmt: skip
        assert part in text, text
    assert "tokenizer of the teacher" not in text


def test_a_tokenizer_that_is_gone_from_the_teachers_folder_is_not_compared(two):
    write(two)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (two / "teacher" / name).unlink()
    assert fit(two / "config.yaml", *from_cache(two / "cache"), "training.max_steps=1", "training.eval_strategy=no")


def test_other_rows_and_other_conversations_are_refused(two):
    write(two)
    write_rows(two / "train.jsonl", [*range(20), 50])
    with pytest.raises(DataError, match=r"1 of 21 rows of data.train have no targets there(.|\n)*train.jsonl, row 20 "):
        fit(two / "config.yaml", *from_cache(two / "cache"))


def test_a_cache_of_the_students_own_tokens_does_not_serve_it_and_the_other_way_round(two):
    write(two, "chunks")
    with pytest.raises(ConfigError, match="must be alm: the cache has likelihoods of chunks of text"):
        fit(two / "config.yaml", *from_cache(two / "chunks"), "rlhf.cross_tokenizer=null")
    manifest = two / "chunks" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "form": {**content["form"], "mode": "topk", "entries": 5}}))
    with pytest.raises(ConfigError, match=r"has targets for the student's own tokens \(mode topk\)"):
        fit(two / "config.yaml", *from_cache(two / "chunks"))


def test_a_row_that_is_damaged_on_the_disk_ends_the_run_between_two_steps(two):
    options = ["training.per_device_eval_batch_size=1"]  # eight rows a shard
    write(two, "cache", *options)
    path = sorted((two / "cache").glob("shard-*"))[3]  # rows 24 to 31: of the fourth step
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=r"The state of step 3 is saved") as caught:
        fit(two / "config.yaml", *from_cache(two / "cache"), "training.train_sampling_strategy=sequential")
    assert path.name in str(caught.value)
    assert status(two)["exit_code"] == 4


def test_verify_finds_another_number_and_other_chunks(two):
    write(two)
    (path,) = (two / "cache").glob("shard-*")
    reader, keys = CacheReader(two / "cache"), list(dict.fromkeys(row_keys_of(two)))
    rows = reader.read_chunks(keys)
    changed = [replace(row, logprobs=row.logprobs + 0.01) for row in rows]
    CacheWriter(two / "cache", FORM).write_shard(0, keys, changed)
    with pytest.raises(DataError, match=r"by 0\.01 nats a chunk, and 0\.002 is"):
        write(two, verify=1)
    others = [replace(row, numbers=row.numbers.masked_fill(row.numbers == row.numbers.max(), NONE),
                      logprobs=row.logprobs[:-1]) for row in rows]  # fmt: skip
    CacheWriter(two / "cache", FORM).write_shard(0, keys, others)
    with pytest.raises(DataError, match="by inf nats a chunk"):
        write(two, verify=1)
    assert path.exists()


@pytest.mark.slow
def test_evaluation_after_it_measures_the_student_and_not_the_teacher(two, command):  # noqa: F811
    write(two)
    (two / "teacher").rename(two / "gone")
    code, out, err = command("validate", str(two / "config.yaml"), "--deep", *from_cache(two / "cache"))
    assert code == 0, out + err
    assert "100.0% of the answers' bytes are the same text to student and teacher" in " ".join((out + err).split())
    fit(two / "config.yaml", *from_cache(two / "cache"))
    code, _, err = command("evaluate", str(two / "run"))
    assert code == 0, err
    assert "the cache has what it says of chunks of text, and of no token" in " ".join(err.split())
    models = json.loads((two / "run" / "evaluation.json").read_text())["models"]
    assert models["teacher"] is None
    assert models["after"]["ce"] > 0
    assert "taught by a cache, alm, cross-entropy" in (two / "run" / "report.html").read_text()
    code, _, err = command("export", str(two / "run"), str(two / "out"))
    assert code == 0, err
    card = (two / "out" / "README.md").read_text()
    assert "- Loss: 50 × `alm` from the teacher, which has another tokenizer, and 0.3 × cross-entropy." in card


# ---- the format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[0, 0, 1, 2, NONE, NONE, 3, 3, 3], [NONE], [], [0]])
def test_what_is_stored_is_read_again(numbers):
    count = max(numbers, default=NONE) + 1 if numbers else 0
    row = RowChunks(torch.tensor(numbers, dtype=torch.long), torch.arange(max(count, 0)) * -1.5, 7, 300_000)
    blob = chunk_format.encode([row]).rows[0]
    found = chunk_format.decode(blob, len(numbers))
    assert found.numbers.tolist() == numbers
    assert found.logprobs.tolist() == row.logprobs.tolist()
    assert (found.aligned_bytes, found.answer_bytes) == (7, 300_000)
    assert len(blob) == 12 + -(-len(numbers) // 4) + 4 * len(row.logprobs)


@pytest.mark.parametrize("numbers", [[1, 0], [0, 1, 0], [0, NONE, 0, 1], [0, 1, 2]])
def test_chunks_out_of_order_are_not_stored(numbers):
    with pytest.raises(ValueError, match="in the order of their tokens"):
        chunk_format.encode([RowChunks(torch.tensor(numbers), torch.zeros(2), 0, 0)])
