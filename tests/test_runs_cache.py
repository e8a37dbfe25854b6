"""`kdtrain cache` as a whole: what is on the disk, whoever wrote it and however often it was killed."""

import hashlib
import json
import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.state import PartialState

from kdtrain.config import ConfigLoader
from kdtrain.config.arguments import build_train_arguments
from kdtrain.data import Collator
from kdtrain.data.row_key import row_key
from kdtrain.errors import CheckpointError, ConfigError, DataError, Interrupted, PreflightError
from kdtrain.errors import TeacherError as NoAnswer
from kdtrain.models.processing import load_processing
from kdtrain.runs import cache
from kdtrain.runs.build import Given
from kdtrain.runs.cache import write_cache
from kdtrain.runs.cache_folder import lock
from kdtrain.runs.cache_options import Wanted
from kdtrain.runs.cache_plan import plan_rows
from kdtrain.runs.read_data import read_data
from kdtrain.teachers.cached.manifest import Manifest
from kdtrain.teachers.cached.store import CacheReader
from tests import tiny
from tests.stub_server import StubServer


class Silent:
    """A reporter that notes what it is told."""

    def __init__(self, on_rows=lambda done, total: None):
        self.tables, self.progress, self.on_rows = [], [], on_rows

    def data(self, name, report):
        pass

    def answers(self, done, total):
        pass

    def plan(self, rows):
        self.tables.append(rows)

    def rows(self, done, total):
        self.progress.append((done, total))
        self.on_rows(done, total)

    def callbacks(self):
        return []

    def close(self):
        pass


def write(project, out="cache", *overrides, reporter=None, **wanted):
    config = ConfigLoader.load(project / "config.yaml", ["training.use_cpu=true", *overrides])
    return write_cache(build_train_arguments(config), project / out, Wanted(**wanted), reporter or Silent())


def edit(project, **sections):
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        config.setdefault(section, {}).update(values)
    path.write_text(yaml.safe_dump(config))


def many_rows(project, count=200):
    """Different rows, one a batch, in shards of eight."""
    words = ["the", "path", "a", "token", "and", "student", "zero", "file", "it", "returns", "when", "they", "two"]
    draw = random.Random(0)
    rows = [{"prompt": f"What is {i}?", "completion": " ".join(draw.choices(words, k=draw.randint(1, 9)))}
            for i in range(count)]  # fmt: skip
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit(project, data={"eval": None}, training={"eval_strategy": "no", "per_device_eval_batch_size": 1})
    edit(project, training={"eval_steps": None})


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def rows_of(project, *overrides):
    """Encoded rows, as `fit` has them."""
    config = ConfigLoader.load(project / "config.yaml", list(overrides))
    processing = load_processing(config.model.model)
    data = read_data(config, 42, processing, Silent(), Given())
    return processing, [row for dataset in (data.train, data.evaluation) if dataset is not None for row in dataset]


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_every_row_that_fit_trains_or_evaluates_on_has_the_targets_of_the_teacher(project):
    result = write(project, top_k=20)
    assert (result.rows, result.written) == (6, 6)
    reader, teacher = CacheReader(project / "cache"), tiny.make_qwen3(seed=2, hidden=48)
    processing, rows = rows_of(project)
    assert len(rows) == 48
    for row in rows:
        batch = Collator(processing)([row])
        with torch.no_grad():
            logits = teacher(**batch.model_inputs).logits[:, :-1][batch.predicts_BT]
        expected = torch.log_softmax(logits.double(), -1).topk(20)
        stored = reader.read([row_key(row)])
        assert stored.indices.tolist() == expected.indices.tolist()
        torch.testing.assert_close(stored.logprobs.double(), expected.values, atol=0.0101, rtol=0)
    assert result.tokens == sum(reader.counts([row_key(row)])[0] for row in rows[:6])
    assert result.bytes == sum(path.stat().st_size for path in (project / "cache").iterdir())


def test_all_tokens_are_stored_exactly(project):
    write(project, top_k=1000)
    reader = CacheReader(project / "cache")
    assert (reader.form.entries, reader.form.exact) == (320, True)
    _, rows = rows_of(project)
    stored = reader.read([row_key(rows[0])])
    torch.testing.assert_close(stored.logprobs.exp().sum(-1), torch.ones(len(stored.logprobs)), atol=1e-5, rtol=0)


def test_hidden_states_and_head_are_the_teachers_own(project):
    write(project, mode="hidden")
    reader, teacher = CacheReader(project / "cache"), tiny.make_qwen3(seed=2, hidden=48)
    processing, rows = rows_of(project)
    batch = Collator(processing)([rows[3]])
    with torch.no_grad():
        logits = teacher(**batch.model_inputs).logits[:, :-1][batch.predicts_BT]
    torch.testing.assert_close(reader.read([row_key(rows[3])]).logits(), logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(reader.head.weight, teacher.lm_head.weight)
    assert reader.form.hidden_dtype == "float32"


def test_a_row_that_the_teacher_reads_otherwise_is_stored_by_what_it_reads(project, tokenizer):
    """The supervised tokens are the student's, the targets those behind the teacher's own prompt."""
    template = tiny.CHATML.replace("<|im_start|>assistant\\n'", "<|im_start|>assistant\\n' + ('!' if loud else '')")
    template = template.replace(
        "{{ '<|im_start|>' + m.role + '\\n' }}",
        "{{ '<|im_start|>' + m.role + '\\n' + ('!' if loud and m.role == 'assistant' else '') }}",
    )
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(project / name)
    override = "rlhf.teacher.chat_template_kwargs={loud: true}"
    write(project, "cache", override, top_k=320)
    reader, teacher = CacheReader(project / "cache"), tiny.make_qwen3(seed=2, hidden=48)
    processing, rows = rows_of(project, override)
    row = rows[1]
    assert row["teacher_input_ids"] != row["input_ids"]
    seen = Collator(processing)([row]).as_teacher_sees_it()
    with torch.no_grad():
        logits = teacher(**seen.model_inputs).logits[:, :-1][seen.predicts_BT]
    stored = reader.read([row_key(row)])
    expected = torch.log_softmax(logits.double(), -1).gather(1, stored.indices)
    torch.testing.assert_close(stored.logprobs.double(), expected, atol=1e-5, rtol=0)


def test_rows_without_a_supervised_token_are_left_out_and_counted():
    rows = {"input_ids": [[1, 2], [3, 4], [5]], "labels": [[-100, 2], [-100, -100], [5]]}
    rows |= {"teacher_input_ids": [[1, 1, 1, 2], None, None], "teacher_labels": [[-100] * 3 + [2], None, None]}
    plan = plan_rows([datasets.Dataset.from_dict(rows)])
    assert (plan.places, plan.left_out) == ([(0, 0)], 2)  # nothing predicts a first token
    assert (plan.lengths, plan.supervised) == ([4], [1])


def test_the_plan_has_every_content_once_in_the_order_of_the_data(project):
    _, rows = rows_of(project)
    config = ConfigLoader.load(project / "config.yaml", [])
    data = read_data(config, 42, load_processing(config.model.model), Silent(), Given())
    plan = plan_rows([data.train, data.evaluation])
    assert plan.keys == list(dict.fromkeys(map(row_key, rows)))
    assert [row_key(plan.row(i)) for i in range(len(plan))] == plan.keys
    assert plan.lengths == [len(rows[i]["input_ids"]) for i in range(6)]
    assert plan.supervised == [sum(label != -100 for label in rows[i]["labels"]) for i in range(6)]
    assert [list(shard.rows) for shard in plan.shards(4)] == [[0, 1, 2, 3], [4, 5]]
    assert plan.shards(4)[1].keys == plan.keys[4:]


def test_shards_are_small_for_wide_targets_and_never_less_than_a_batch(project):
    config = ConfigLoader.load(project / "config.yaml", [])
    plan = plan_rows([read_data(config, 42, load_processing(config.model.model), Silent(), Given()).train])
    assert plan.rows_per_shard(100, batch_size=8) == 64
    assert plan.rows_per_shard(10**7, batch_size=2) == 2
    assert plan.rows_per_shard(10**12, batch_size=8) == 8


# ---- killed, stopped, resumed ----------------------------------------------------------------------------------------


def killed_after(project, seen, pause):
    """Write in a process of its own, which is killed a moment after it has written some more shards."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            write(project)
        finally:
            os._exit(0)
    while len(list((project / "cache").glob("shard-*.safetensors"))) < seen:
        finished, _ = os.waitpid(child, os.WNOHANG)
        assert not finished, "it ended before it was killed"
        time.sleep(0.001)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@pytest.mark.slow
def test_killed_ten_times_while_it_writes_the_cache_is_the_one_that_was_written_in_one_go(project):
    many_rows(project, 480)
    write(project, "whole")
    expected = files(project / "whole")
    assert len(expected) == 61
    draw, counts = random.Random(1), [0]
    for _ in range(10):
        status = killed_after(project, counts[-1] + 3, draw.uniform(0, 0.03))
        assert os.WIFSIGNALED(status), "it was to be killed"
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not Manifest.read(project / "cache").complete
        counts.append(len(list((project / "cache").glob("shard-*.safetensors"))))
    assert counts == sorted(counts)
    result = write(project)
    assert 0 < result.written < 480 - 10 * 3 * 8 + 1
    assert files(project / "cache") == expected


def test_two_commands_do_not_write_into_one_folder_at_a_time(project):
    taken = []

    def other_command(done, total):
        with ExitStack() as at_the_end, pytest.raises(PreflightError, match="Another kdtrain cache is writing into"):
            lock(project / "cache", at_the_end)
        taken.append(done)

    write(project, reporter=Silent(other_command))
    assert taken[0] == 0
    with ExitStack() as other:
        lock(project / "cache", other)
        with pytest.raises(PreflightError, match=r"is writing into --out .*/cache now\. Wait until it has ended"):
            write(project)
    assert write(project).written == 0


def test_a_command_that_is_refused_leaves_no_folder(project):
    (project / "train.jsonl").write_text("")
    with pytest.raises(DataError):
        write(project)
    assert not (project / "cache").exists()


def on_ranks(project, out, mode):
    result = write(project, out, mode=mode)
    return result.written, PartialState().num_processes


@pytest.mark.parametrize("mode", tiny.first_quick(["topk", "sample", "hidden"]))
def test_two_ranks_write_the_same_bytes_as_one(project, mode):
    many_rows(project, 60)
    write(project, "one", mode=mode)
    results = tiny.run_ranks(on_ranks, 2, project, "two", mode)
    assert results == [(60, 2), (60, 2)]
    assert files(project / "two") == files(project / "one")


@pytest.mark.parametrize(("mode", "name"), [("topk", "shard-00002"), ("hidden", "head")])
@pytest.mark.parametrize("end", [tiny.slow(None), -7], ids=["deleted", "damaged"])
def test_a_file_of_a_finished_cache_that_is_deleted_or_damaged_is_written_again(project, mode, name, end):
    many_rows(project, 60)
    write(project, mode=mode)
    expected = files(project / "cache")
    path = project / "cache" / f"{name}.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if end is not None:
        path.write_bytes(whole[:end])
    assert write(project, mode=mode).written == (8 if mode == "topk" else 0)
    assert files(project / "cache") == expected


def test_a_finished_cache_is_left_alone_and_no_teacher_is_loaded(project, monkeypatch):
    write(project)
    expected = files(project / "cache")
    monkeypatch.setattr("kdtrain.runs.build.build_teacher", lambda *args, **kwargs: pytest.fail("a teacher was loaded"))
    assert write(project).written == 0
    assert files(project / "cache") == expected


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_one_line_and_whole_shards_stay(project, signum):
    many_rows(project, 60)

    def stop(done, total):
        if done == 20:
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=r"Whole shards stay in .*cache: the same command goes on") as stopped:
        write(project, reporter=Silent(stop))
    assert stopped.value.exit_code == 128 + signum
    assert sorted(files(project / "cache")) == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    reporter = Silent()
    write(project, reporter=reporter)
    assert reporter.progress[-1] == (44, 44)


def test_a_disk_that_is_full_is_an_error_of_the_disk_and_whole_shards_stay(project, monkeypatch):
    many_rows(project, 60)
    writer = cache.CacheWriter.write_shard

    def fails(self, number, keys, rows):
        if number == 3 and self.folder == project / "cache":
            raise OSError(28, "No space left on device")
        writer(self, number, keys, rows)

    monkeypatch.setattr(cache.CacheWriter, "write_shard", fails)
    with pytest.raises(CheckpointError, match="No space left on device") as full:
        write(project)
    assert full.value.exit_code == 6
    assert len(files(project / "cache")) == 4
    monkeypatch.undo()
    assert write(project).written == 60 - 24


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_begun(project, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("kdtrain.runs.cache_folder.shutil.disk_usage", lambda path: usage)
    with pytest.raises(PreflightError, match=r"will take about .* kB, and .* has 1.0 kB left") as refused:
        write(project)
    assert refused.value.exit_code == 3
    assert not list((project / "cache").glob("shard*"))


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_another_config_over_a_cache_is_refused_by_what_differs(project):
    write(project)
    before = files(project / "cache")
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(project / "student")
    with pytest.raises(PreflightError) as refused:
        write(project, "cache", f"rlhf.teacher_model={project}/student", top_k=20)
    message = str(refused.value)
    assert "This cache was made with another chat template: 299 characters. This run has: 300 characters." in message
    assert "another teacher (rlhf.teacher_model): " in message
    assert "another --top-k: 50. This run has: 20." in message
    assert "another tokenizer" not in message
    assert files(project / "cache") == before


def test_another_file_of_the_same_name_is_another_teacher(project):
    write(project)
    tiny.make_qwen3(seed=5, hidden=48).save_pretrained(project / "teacher")
    with pytest.raises(PreflightError, match=r"another teacher .*content .* This run has: .*content"):
        write(project)


def test_other_rows_over_a_cache_are_refused(project):
    write(project)
    with (project / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "What?", "completion": "zero"}) + "\n")
    with pytest.raises(PreflightError, match=r"other rows: 6 rows\. This run has: 7 rows"):
        write(project)


def test_the_order_and_the_number_of_batches_are_no_part_of_it(project):
    """How a run trains can be changed while its cache is written."""
    write(project)
    result = write(project, "cache", "training.learning_rate=1e-3", "training.per_device_eval_batch_size=3")
    assert result.written == 0


@pytest.mark.parametrize("what", ["a folder of something else", "a file"])
def test_what_is_no_cache_is_refused_and_left_alone(project, what):
    out = "student" if what.startswith("a folder") else "config.yaml"
    before = files(project / "student")
    with pytest.raises(PreflightError, match="Name a"):
        write(project, out)
    assert files(project / "student") == before


@pytest.mark.parametrize(
    ("overrides", "wanted", "message"),
    [
        (["rlhf.lmbda=1"], {}, "answers are generated while training"),
        (["rlhf.seq_kd=true"], {}, "rlhf.seq_kd is true"),
        (["rlhf.llm_kd_weight=0"], {}, "no targets of a teacher are used"),
        (["rlhf.teacher.backend=vllm", "rlhf.teacher.base_url=http://127.0.0.1:1/v1", "rlhf.teacher.model=t"],
         {"mode": "hidden"}, "a server gives its top k"),
    ],
)  # fmt: skip
def test_what_has_no_targets_that_could_be_stored_is_an_error_of_the_config(project, overrides, wanted, message):
    with pytest.raises(ConfigError, match=message) as refused:
        write(project, "cache", *overrides, **wanted)
    assert refused.value.exit_code == 2
    assert not (project / "cache").exists()


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [{}, {"mode": "sample"}, {"mode": "hidden"}, {"mode": "hidden", "hidden_dtype": "int8"}]
)
def test_verify_finds_what_it_has_written(project, wanted):
    result = write(project, verify=100, **wanted)
    assert result.verified.rows == 6
    assert result.verified.largest <= result.verified.allowed


@pytest.mark.parametrize("mode", ["topk", "sample", "hidden"])
def test_verify_finds_targets_of_another_teacher(project, mode):
    """The manifest says one thing, and the shards are of another cache."""
    write(project, mode=mode)
    write(project, "other", f"rlhf.teacher_model={project}/student", mode=mode)
    for path in (project / "other").glob("[sh]*.safetensors"):
        if mode != "hidden":  # of another width
            path.rename(project / "cache" / path.name)
    if mode == "hidden":
        tiny.make_qwen3(seed=9, hidden=48).save_pretrained(project / "teacher")
        write(project, "third", mode=mode)
        for path in (project / "third").glob("*.safetensors"):
            path.rename(project / "cache" / path.name)
        tiny.make_qwen3(seed=2, hidden=48).save_pretrained(project / "teacher")
    with pytest.raises(DataError, match="differs from what the teacher says by") as refused:
        write(project, mode=mode, verify=2)
    assert refused.value.exit_code == 3


# ---- other teachers --------------------------------------------------------------------------------------------------


def served(project, server, **options):
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["rlhf"].pop("teacher_model", None)
    defaults = {"backend": "vllm", "base_url": server.url, "model": "teacher", "top_k": 8, "max_retries": 0}
    config["rlhf"]["teacher"] = {**defaults, **options}
    path.write_text(yaml.safe_dump(config))


def test_a_server_gives_its_own_top_k(project, teacher, tokenizer):
    with StubServer(teacher, tokenizer=tokenizer) as server:
        served(project, server)
        write(project, verify=6)
        write(project, "wider", top_k=12)
    reader, wider = CacheReader(project / "cache"), CacheReader(project / "wider")
    assert (reader.form.entries, wider.form.entries) == (8, 12)
    processing, rows = rows_of(project)
    batch = Collator(processing)([rows[3]])
    with torch.no_grad():
        logits = teacher(**batch.model_inputs).logits[:, :-1][batch.predicts_BT]
    expected = torch.log_softmax(logits.double(), -1).topk(12)
    for some, k in ((reader, 8), (wider, 12)):
        stored = some.read([row_key(rows[3])])
        assert stored.indices.tolist() == expected.indices[:, :k].tolist()
        torch.testing.assert_close(stored.logprobs.double(), expected.values[:, :k], atol=0.0101, rtol=0)


def test_a_server_that_fails_ends_it_and_whole_shards_stay(project, teacher, tokenizer):
    many_rows(project, 60)
    with StubServer(teacher, tokenizer=tokenizer) as server:
        served(project, server, concurrency=2)
        write(project, "whole")

        def fails(done, total):
            if done == 30:
                server.on_request = lambda request: (503, {}, b"no")

        with pytest.raises(NoAnswer, match=r"Whole shards stay in .*cache: the same command goes on") as failed:
            write(project, reporter=Silent(fails))
        assert failed.value.exit_code == 4
        kept = len(files(project / "cache")) - 1
        assert 3 <= kept < 7  # of 8: the 30 rows that were there, and what had been answered ahead of them
        server.on_request = None
        assert write(project).written == 60 - 8 * kept
    assert files(project / "cache") == files(project / "whole")


def test_a_server_has_requests_for_the_next_batches_while_one_is_waited_for(project, teacher, tokenizer):
    many_rows(project, 60)
    with StubServer(teacher, tokenizer=tokenizer, delay_s=0.01) as server:
        served(project, server, concurrency=4)
        write(project)
        assert server.most_in_flight == 4  # of batches of one row


def test_the_student_is_its_own_teacher_without_the_adapter(project):
    edit(project, rlhf={"teacher_model": None, "teacher": {"backend": "self"}}, tuner={"train_type": "lora"})
    write(project, top_k=320)
    reader, student = CacheReader(project / "cache"), tiny.make_qwen3(seed=1)
    processing, rows = rows_of(project)
    batch = Collator(processing)([rows[2]])
    with torch.no_grad():
        logits = student(**batch.model_inputs).logits[:, :-1][batch.predicts_BT]
    stored = reader.read([row_key(rows[2])])
    expected = torch.log_softmax(logits.double(), -1).gather(1, stored.indices)
    torch.testing.assert_close(stored.logprobs.double(), expected, atol=1e-5, rtol=0)
    assert "student that is its own teacher (model.model)" in Manifest.read(project / "cache").made_from


def test_a_teacher_that_learns_with_the_student_cannot_be_stored(project):
    prefix = "rlhf.teacher.prefix=[{role: system, content: Be brief.}]"
    edit(project, rlhf={"teacher_model": None, "teacher": {"backend": "self", "weights": "live"}})
    with pytest.raises(ConfigError, match="this teacher learns with the student"):
        write(project, "cache", prefix)


def test_a_prefix_is_a_part_of_the_rows_and_of_what_a_cache_is_made_from(project):
    first = "rlhf.teacher.prefix=[{role: system, content: Be brief.}]"
    edit(project, data={"max_length": 128})
    write(project, "cache", first)
    _, rows = rows_of(project, first)
    assert all(row_key(row) in CacheReader(project / "cache") for row in rows)
    with pytest.raises(PreflightError, match=r"another rlhf.teacher.prefix: .*Be brief.*This run has: .*Be loud"):
        write(project, "cache", "rlhf.teacher.prefix=[{role: system, content: Be loud.}]")
    (project / "prefix.json").write_text('[{"role": "system", "content": "Be brief."}]')
    assert write(project, "cache", f"rlhf.teacher.prefix={project}/prefix.json").written == 0


# ---- answers: teacher ------------------------------------------------------------------------------------------------


def prompts_alone(project, count=6):
    rows = [{"prompt": f"What is {i}?"} for i in range(count)]
    (project / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": "prompts.jsonl", "answers": "teacher"}
    edit(project, data={"train": source, "eval": None}, rlhf={"max_new_tokens": 8})
    edit(project, training={"eval_strategy": "no", "eval_steps": None})


def test_answers_of_the_teacher_are_written_with_their_targets_and_no_teacher_is_needed_to_train(project):
    from kdtrain.runs.fit import fit

    prompts_alone(project)
    result = write(project, top_k=320)
    assert result.rows == 6
    assert 6 <= result.tokens <= 48
    config = ConfigLoader.load(
        project / "config.yaml", ["training.use_cpu=true", f"training.output_dir={project}/online"]
    )
    online = fit(build_train_arguments(config), Silent())
    (project / "teacher").rename(project / "gone")
    words = ["rlhf.teacher.backend=cache", f"rlhf.teacher.path={project}/cache", "training.use_cpu=true"]
    cached = fit(build_train_arguments(ConfigLoader.load(project / "config.yaml", words)), Silent())
    assert cached.metrics["llm_kd_loss"] == pytest.approx(online.metrics["llm_kd_loss"], rel=1e-3)
    assert cached.metrics["sft_loss"] == pytest.approx(online.metrics["sft_loss"], rel=1e-3)
    assert not list((project / "cache").rglob("*.arrow"))


def test_answers_that_are_there_are_not_asked_for_again(project, monkeypatch):
    prompts_alone(project)
    write(project)
    before = {path: path.read_bytes() for path in (project / "cache").rglob("*") if path.is_file()}
    monkeypatch.setattr("kdtrain.runs.build.build_teacher", lambda *args, **kwargs: pytest.fail("a teacher was loaded"))
    assert write(project).written == 0
    assert {path: path.read_bytes() for path in (project / "cache").rglob("*") if path.is_file()} == before
    with pytest.raises(PreflightError, match=r"another rlhf.max_new_tokens \(answers: teacher\): 8. This run has: 9"):
        write(project, "cache", "rlhf.max_new_tokens=9")
    with (project / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "And this?"}\n')
    with pytest.raises(DataError, match="1 of 7 rows with answers: teacher have no answer in"):
        write(project)


def test_a_kill_while_the_teacher_answers_leaves_a_folder_to_go_on_with(project):
    prompts_alone(project)

    class Stops(Silent):
        def answers(self, done, total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(project, "cache", "training.per_device_eval_batch_size=2", reporter=Stops())
    assert [path.name for path in (project / "cache").iterdir()] == ["teacher_answers"]
    kept = next((project / "cache").rglob("rank0.jsonl")).read_bytes()
    write(project)
    assert next((project / "cache").rglob("rank0.jsonl")).read_bytes().startswith(kept)
