"""Answers kept to be looked at: what is measured of them, that nothing else changes, and the file that holds them."""

import copy
import functools
import io
import itertools
import json
import multiprocessing
import types

import pyarrow.parquet as pq
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from kdtrain.cli.completions import as_object, as_text, beginning_of, end_of
from kdtrain.cli.progress import ConsoleReporter
from kdtrain.config import ConfigLoader, check_config
from kdtrain.config.arguments import build_train_arguments
from kdtrain.config.json_schema import json_schema
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.runs.completions import SCHEMA, WriteCompletions, spread
from kdtrain.runs.fit import fit
from kdtrain.teachers import LocalTeacher, Targets
from kdtrain.trainer import construction
from kdtrain.trainer.completions import MOST, Completion
from tests import tiny
from tests.test_distributed import sharding_on_a_cpu
from tests.test_trainer import TopKTeacher, make_trainer

ROWS = tiny.CHATS * 4


class Collected(TrainerCallback):
    """What a callback of a user sees as each step begins."""

    def __init__(self):
        self.trainer, self.steps = None, []

    def on_step_begin(self, args, state, control, **_):
        self.steps.append(list(self.trainer.completions.newest))


def train(folder, every, student=None, teacher=None, **kwargs):
    """A trained trainer and the completions of each of its steps."""
    if "teacher" not in kwargs.get("extra", {}):
        teacher = teacher or tiny.make_qwen3(seed=2, hidden=48)
    trainer = make_trainer(
        folder, student or tiny.make_qwen3(seed=1), teacher,
        rows=kwargs.pop("rows", ROWS), **{"lmbda": 1.0, "max_steps": 3, "max_new_tokens": 5, **kwargs},
    )  # fmt: skip
    trainer.completions.every = every
    seen = Collected()
    seen.trainer = trainer
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.steps


def numbers(trainer):
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    records = [
        {k: v for k, v in record.items() if k not in tiny.MEASURED}
        for record in trainer.state.log_history
        if "loss" in record
    ]
    return weights, records


def reverse_kl(student, teacher, prompt, completion):
    """KL(S‖T) at each token of a completion, from its definition, in float64; one row, no padding."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        s, t = (copy.deepcopy(model).double().eval()(input_ids=ids).logits[0, :, :320] for model in (student, teacher))
    log_s, log_t = (torch.log_softmax(logits[len(prompt) - 1 : -1], -1) for logits in (s, t))
    return (log_s.exp() * (log_s - log_t)).sum(-1).tolist()


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_the_divergence_of_each_token_is_that_of_the_student_that_wrote_it(tmp_path, teacher, tokenizer):
    student = tiny.make_qwen3(seed=1, attention_dropout=0.3)
    before = copy.deepcopy(student)
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "disable_dropout": False}
    _, steps = train(tmp_path, 1, student, teacher, **options)
    assert [len(found) for found in steps] == [4, 4]
    for one in steps[0]:  # of ragged prompts, in one batch
        expected = reverse_kl(before, teacher, tokenizer(one.prompt).input_ids, one.token_ids)
        assert one.token_reverse_kl == pytest.approx(expected, rel=1e-4)
        assert one.reverse_kl == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        assert one.exact
        assert one.completion == tokenizer.decode(one.token_ids)
        assert (one.step, one.written_by) == (1, "student")
    one = steps[1][0]
    moved = reverse_kl(before, teacher, tokenizer(one.prompt).input_ids, one.token_ids)
    assert one.token_reverse_kl != pytest.approx(moved, rel=1e-4), "the student of the first step"


def test_padding_of_the_vocabulary_takes_no_part(tmp_path, tokenizer):
    student, teacher = tiny.make_qwen3(seed=1, vocab_size=384), tiny.make_qwen3(seed=2)
    extra = {"shared_vocab_size": 320}
    _, steps = train(tmp_path, 1, student, teacher, max_steps=1, learning_rate=0.0, extra=extra)
    for one in steps[0]:
        expected = reverse_kl(student, teacher, tokenizer(one.prompt).input_ids, one.token_ids)
        assert one.token_reverse_kl == pytest.approx(expected, rel=1e-4)


def test_a_teacher_that_names_its_most_likely_tokens_gives_a_lower_bound(tmp_path, student, teacher):
    _, (whole, *_) = train(tmp_path, 1, copy.deepcopy(student), teacher, max_steps=1)
    _, (some, *_) = train(tmp_path, 1, student, extra={"teacher": TopKTeacher(teacher, 5)}, max_steps=1)
    for bound, exact in zip(some, whole, strict=True):
        assert (bound.token_ids, bound.exact, exact.exact) == (exact.token_ids, False, True)
        assert all(0 < a < b for a, b in zip(bound.token_reverse_kl, exact.token_reverse_kl, strict=True))


class FirstTokenOnly(TopKTeacher):
    """Answers for the first supervised token of a batch."""

    def targets(self, batch):
        known = super().targets(batch).scores
        covered_S = torch.arange(len(batch.labels_S)) == 0
        return Targets(TopKLogprobs(known.indices[:1], known.logprobs[:1]), covered_S)


def test_a_token_that_the_teacher_does_not_answer_for_has_no_divergence(tmp_path, student, teacher):
    alone = {"per_device_train_batch_size": 1, "max_steps": 1, "extra": {"teacher": FirstTokenOnly(teacher, 5)}}
    _, ((one,),) = train(tmp_path, 1, student, **alone)
    first, *others = one.token_reverse_kl
    assert first > 0
    assert set(others) == {None}
    assert one.reverse_kl == first


def test_a_student_without_a_loss_head_is_measured_by_its_logits(tmp_path, student, teacher, monkeypatch):
    _, by_head = train(tmp_path, 1, copy.deepcopy(student), teacher, max_steps=1)
    monkeypatch.setattr(construction, "why_no_loss_head", lambda model, **_: "a test")
    trainer, by_logits = train(tmp_path, 1, student, teacher, max_steps=1)
    assert not trainer.student_takes_loss_head(trainer.model)
    for one, same in zip(by_head[0], by_logits[0], strict=True):
        assert one.token_reverse_kl == pytest.approx(same.token_reverse_kl, rel=1e-5)


class Counted(LocalTeacher):
    """Counts the batches that it was asked about."""

    asked = 0

    def targets(self, batch):
        self.asked += 1
        return super().targets(batch)


def test_of_several_answers_all_are_kept_and_those_that_train_are_measured(tmp_path, student, teacher):
    rows = [{**chat, "row_id": f"0:{i}"} for i, chat in enumerate(ROWS)]
    options = {"rows": rows, "max_steps": 1, "samples_per_prompt": 3, "train_sampling_strategy": "sequential"}
    _, (found,) = train(tmp_path, 1, copy.deepcopy(student), teacher, **options)
    assert [(one.row, one.sample) for one in found] == [(row, i) for row in ("0:0", "0:1") for i in range(3)]
    asked = []
    for every in (None, 1):
        counted = Counted(teacher)
        _, (best,) = train(
            tmp_path, every, copy.deepcopy(student), extra={"teacher": counted}, select="best", **options
        )
        asked.append(counted.asked)
    assert [(one.row, one.sample, one.token_ids) for one in best] == [
        (one.row, one.sample, one.token_ids) for one in found
    ]
    assert all(one.selected for one in found)
    left_out, best = ([one for one in best if one.selected is chosen] for chosen in (False, True))
    assert [one.row for one in best] == ["0:0", "0:1"]
    assert len(left_out) == 4
    assert all(one.reverse_kl is None and len(one.token_reverse_kl) == len(one.token_ids) for one in left_out)
    assert asked[0] == asked[1], "what the teacher has said for the selection is known"
    measured = {(one.row, one.sample): one.token_reverse_kl for one in found}
    for one in best:
        assert one.token_reverse_kl == pytest.approx(measured[one.row, one.sample], rel=1e-4)


def test_answers_of_a_step_that_trains_on_none_are_kept(tmp_path, student, teacher):
    rows = [{**chat, "row_id": f"0:{i}", "answer": "no such text"} for i, chat in enumerate(ROWS)]
    _, (found,) = train(tmp_path, 1, student, teacher, rows=rows, max_steps=1, select_regex="(.*)")
    assert found
    assert not any(one.selected for one in found)


def test_answers_of_the_teacher_are_kept_as_its_own(tmp_path, student, teacher):
    _, steps = train(tmp_path, 1, student, teacher, lmbda=0.0, seq_kd=True, max_steps=1)
    assert {one.written_by for one in steps[0]} == {"teacher"}


def test_an_answer_that_ends_by_itself_is_told_from_one_that_was_cut(tmp_path, student, teacher):
    with torch.no_grad():  # <|im_end|> is about as likely as all others together
        student.lm_head.weight[2] = 0
        student.config.tie_word_embeddings = False
    _, steps = train(tmp_path, 1, student, teacher, rows=ROWS * 2, max_steps=4, per_device_train_batch_size=8)
    found = [one for step in steps for one in step]
    for one in found:
        assert one.stop_reason == ("stop" if one.token_ids[-1] == 2 else "length")
        assert one.stop_reason == "stop" or len(one.token_ids) == 5


# ---- when ------------------------------------------------------------------------------------------------------------


def test_the_first_generated_step_at_or_after_each_multiple_is_kept(tmp_path):
    _, steps = train(tmp_path, 3, max_steps=10, lmbda=0.3)
    _, every = train(tmp_path, 1, max_steps=10, lmbda=0.3)
    generated = [number for number, found in enumerate(every, start=1) if found]
    expected, due = [], 0
    for step in generated:
        if step >= due:
            expected.append(step)
            due = (step // 3 + 1) * 3
    assert [number for number, found in enumerate(steps, start=1) if found] == expected
    assert len(expected) < len(generated) < 10


def test_none_is_kept_of_answers_of_the_data_or_where_it_is_not_asked_for(tmp_path):
    for every, lmbda in ((1, 0.0), (None, 1.0)):
        _, steps = train(tmp_path, every, lmbda=lmbda)
        assert steps == [[], [], []]


def test_a_resumed_run_keeps_the_steps_that_the_uninterrupted_one_kept(tmp_path):
    options = {"max_steps": 6, "lmbda": 0.6, "save_strategy": "steps", "save_steps": 1}
    _, whole = train(tmp_path, 3, **options)
    kept = [found[0].step for found in whole if found]
    assert kept == [1, 5]
    for checkpoint in (1, 2):  # between them is a generated step that is not kept
        trainer = make_trainer(
            tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), rows=ROWS, max_new_tokens=5,
            **{**options, "save_strategy": "no"},
        )  # fmt: skip
        trainer.completions.every = 3
        seen = Collected()
        seen.trainer = trainer
        trainer.add_callback(seen)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert [found[0].step for found in seen.steps if found] == [step for step in kept if step > checkpoint]


def test_at_most_64_are_kept_whichever_way_rows_are_batched(tmp_path):
    rows = [{**chat, "row_id": f"0:{i}"} for i, chat in enumerate(tiny.CHATS * 12)]
    options = {"rows": rows, "max_steps": 1, "max_new_tokens": 1, "train_sampling_strategy": "sequential"}
    _, (one,) = train(tmp_path, 1, per_device_train_batch_size=72, **options)
    _, (several,) = train(tmp_path, 1, per_device_train_batch_size=8, gradient_accumulation_steps=9, **options)
    assert len(one) == MOST == 64
    assert [answer.row for answer in one] == [answer.row for answer in several]
    assert len({answer.row for answer in one}) == 64


# ---- that nothing else changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [tiny.slow({}), {"disable_dropout": False}, tiny.slow({"seq_kd": True, "lmbda": 0.5})]
)
def test_a_run_that_keeps_answers_equals_one_that_does_not(tmp_path, options):
    def student():
        return tiny.make_qwen3(seed=1, attention_dropout=0.3)

    torch.manual_seed(0)
    plain, _ = train(tmp_path, None, student(), gradient_accumulation_steps=2, **options)
    torch.manual_seed(0)
    kept, steps = train(tmp_path, 1, student(), gradient_accumulation_steps=2, **options)
    assert any(steps)
    (weights, records), (same_weights, same_records) = numbers(plain), numbers(kept)
    assert torch.equal(weights, same_weights)
    assert records == same_records


def test_mode_random_state_and_metrics_are_as_before(tmp_path, student, teacher, monkeypatch):
    trainer = make_trainer(tmp_path, student, teacher, lmbda=1.0, rows=ROWS)
    rows = iter([next(iter(trainer.get_train_dataloader()))])
    batches, _ = trainer.get_batch_samples(rows, 1, torch.device("cpu"))
    trainer.model.train()
    trainer.model.model.layers[1].eval()
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    monkeypatch.setattr(teacher, "forward", drawing(teacher.forward))
    before = torch.get_rng_state()
    trainer.completions.every = 1
    trainer.completions.note(batches, trainer.options)
    assert trainer.completions.newest
    assert torch.equal(before, torch.get_rng_state())
    assert modes == {name: module.training for name, module in trainer.model.named_modules()}
    assert metrics == trainer._metrics["train"]


def drawing(forward):
    """A forward that draws random numbers, as Reformer's does."""

    @functools.wraps(forward)
    def drawn(*args, **kwargs):
        torch.rand(1)
        return forward(*args, **kwargs)

    drawn.takes_loss_head = True
    return drawn


# ---- ranks -----------------------------------------------------------------------------------------------------------


def on_ranks(folder, sharded):
    rows = [{**chat, "row_id": f"0:{i}"} for i, chat in enumerate(ROWS[:9])]
    _, steps = train(
        folder, 1, rows=rows, max_steps=2, per_device_train_batch_size=4, train_sampling_strategy="sequential",
        learning_rate=0.0, **(sharding_on_a_cpu() if sharded else {}),
    )  # fmt: skip
    return [[vars(one) for one in found] for found in steps]


@pytest.mark.parametrize("sharded", [tiny.slow(False), True], ids=["ddp", "fsdp2"])
def test_answers_of_all_ranks_are_kept_and_none_of_a_rank_that_has_no_new_row(
    tmp_path, sharded, student, teacher, tokenizer
):
    first, second = tiny.run_ranks(on_ranks, 2, tmp_path, sharded)
    assert first == second
    assert [[one["row"] for one in found] for found in first] == [[f"0:{i}" for i in range(8)], ["0:8"]]
    for one in [*first[0], *first[1]]:
        expected = reverse_kl(student, teacher, tokenizer(one["prompt"]).input_ids, one["token_ids"])
        assert one["token_reverse_kl"] == pytest.approx(expected, rel=1e-4)


# ---- the file --------------------------------------------------------------------------------------------------------


def completion(step, row="0:0", **changes):
    values = {
        "step": step, "row": row, "sample": 0, "written_by": "student", "prompt": "What is 1?", "completion": "one",
        "stop_reason": "stop", "token_ids": [5, 6, 2], "token_reverse_kl": [0.5, None, 1.5], "selected": True,
        "exact": True,
    }  # fmt: skip
    return Completion(**{**values, **changes})


def writer(folder, every=1):
    """A callback, and what writes a step through it."""
    log = types.SimpleNamespace(newest=[], every=every)
    callback = WriteCompletions(types.SimpleNamespace(completions=log), folder / "completions.parquet")

    def write(*found):
        log.newest = list(found)
        callback.on_step_begin(None, TrainerState(global_step=found[0].step - 1), TrainerControl())

    return callback, write


def test_each_answer_is_a_row_with_its_tokens(tmp_path):
    callback, write = writer(tmp_path)
    callback.on_train_begin(None, TrainerState(), TrainerControl())
    write(completion(1), completion(1, "0:1", token_reverse_kl=[None] * 3, exact=False))
    write(completion(2, token_ids=[], token_reverse_kl=[]))
    table = pq.read_table(tmp_path / "completions.parquet")
    assert table.schema.equals(SCHEMA)
    first, second, third = table.to_pylist()
    assert first == {**vars(completion(1)), "tokens": 3, "reverse_kl": 1.0}
    assert (second["row"], second["reverse_kl"]) == ("0:1", None)
    assert (third["step"], third["tokens"], third["reverse_kl"]) == (2, 0, None)
    assert [file.name for file in tmp_path.iterdir()] == ["completions.parquet"]


def test_what_follows_the_step_resumed_from_is_dropped(tmp_path):
    _, write = writer(tmp_path)
    for step in (1, 2, 4):
        write(completion(step), completion(step, "0:1"))
    (tmp_path / ".completions.parquet.17.tmp").write_bytes(b"left by a process that was killed")
    callback, write = writer(tmp_path)
    callback.on_train_begin(None, TrainerState(global_step=2), TrainerControl())
    assert [file.name for file in tmp_path.iterdir()] == ["completions.parquet"]
    assert steps_in(tmp_path) == [1, 1, 2, 2]
    write(completion(4))
    assert steps_in(tmp_path) == [1, 1, 2, 2, 4]
    callback.on_train_begin(None, TrainerState(global_step=0), TrainerControl())
    assert not list(tmp_path.iterdir())


def steps_in(folder):
    return pq.read_table(folder / "completions.parquet").column("step").to_pylist()


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None], ids=["empty", "torn", "other columns"])
def test_a_file_that_cannot_be_gone_on_with_is_an_error_and_stays(tmp_path, content):
    path = tmp_path / "completions.parquet"
    if content is None:
        pq.write_table(pq.read_table(io.BytesIO(parquet_of_something())), path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    callback, _ = writer(tmp_path)
    with pytest.raises(CheckpointError, match=r"completions\.parquet cannot be gone on with .*: move it away"):
        callback.on_train_begin(None, TrainerState(global_step=3), TrainerControl())
    assert path.read_bytes() == before


def parquet_of_something():
    import pyarrow as pa

    out = io.BytesIO()
    pq.write_table(pa.table({"step": [1]}), out)
    return out.getvalue()


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    _, write = writer(tmp_path)
    write(completion(1))
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full_disk)
    with pytest.raises(CheckpointError, match="No space"):
        write(completion(2))
    assert steps_in(tmp_path) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["completions.parquet"]


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_steps_that_are_too_many_stay_spread_over_the_run():
    steps, kept = list(range(10, 1010, 10)), []
    for step in steps:
        kept = spread([*kept, step], 10, most=8)
        assert len(kept) <= 8
        assert kept[-1] == step
    assert max(after - before for before, after in itertools.pairwise([0, *kept])) == 160
    assert spread([1, 12, 20], 10, most=8) == [1, 12, 20]


def test_steps_stay_spread_where_a_resumed_run_logs_less_often():
    kept = list(range(1, 101))
    for step in range(1000, 20_000, 1000):
        kept = spread([*kept, step], 1000, most=8)
        assert len(kept) <= 8
        assert kept[-1] == step
    assert spread([*range(1, 101), 1000], 1000, most=8) == [1, 16, 31, 46, 61, 76, 91, 1000]


@pytest.fixture
def on_policy(project):
    """The config of a run that keeps answers."""
    words = ["rlhf.lmbda=1.0", "rlhf.max_new_tokens=5", "training.log_completions_steps=2", "data.eval=null"]
    words += ["training.eval_strategy=no", "training.save_strategy=steps", "training.save_steps=1"]
    return lambda *more: ConfigLoader.load(project / "config.yaml", [*words, *more])


class Shown:
    """A `Reporter` that notes the answers it is shown."""

    def __init__(self):
        self.found = []

    def completions(self, found):
        self.found.append(found)

    def callbacks(self):
        return []

    def __getattr__(self, name):
        return lambda *_, **__: None


KEEP_ALL = "training.save_total_limit=9"


def test_a_run_writes_and_shows_them_and_a_resumed_one_has_no_row_twice(on_policy, project):
    shown = Shown()
    fit(build_train_arguments(on_policy(KEEP_ALL)), shown)
    file = project / "run" / "completions.parquet"
    whole = pq.read_table(file).to_pylist()
    assert [row["step"] for row in whole] == [1] * 4 + [2] * 4 + [4] * 4
    assert [found[0].step for found in shown.found] == [1, 2, 4]
    assert {row["row"].partition(":")[0] for row in whole} == {"0"}
    fit(build_train_arguments(on_policy(KEEP_ALL)), Shown(), resume=str(project / "run" / "checkpoint-2"))
    assert pq.read_table(file).to_pylist() == whole
    off = on_policy(KEEP_ALL, "training.log_completions_steps=null")
    fit(build_train_arguments(off), Shown(), resume=str(project / "run" / "checkpoint-1"))
    assert [row["step"] for row in pq.read_table(file).to_pylist()] == [1] * 4, "of the run that was resumed from"


def test_a_dry_run_shows_them_and_writes_nothing(on_policy, project):
    shown = Shown()
    fit(build_train_arguments(on_policy()), shown, dry_run=True)
    assert [found[0].step for found in shown.found] == [1]
    assert not (project / "run").exists()


def write_without_end(folder):
    _, write = writer(folder)
    for step in itertools.count(1):
        write(*[completion(step, f"0:{i}", prompt="long " * 1000) for i in range(20)])


def test_a_process_that_is_killed_while_it_writes_leaves_a_file_that_can_be_read(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=write_without_end, args=(tmp_path,))
    process.start()
    try:
        while not (tmp_path / "completions.parquet").exists():
            assert process.is_alive()
        for _ in range(30):
            assert steps_in(tmp_path)
    finally:
        process.kill()
        process.join()
    found = steps_in(tmp_path)
    assert found == [step for step in range(1, found[-1] + 1) for _ in range(20)]


# ---- on a terminal ---------------------------------------------------------------------------------------------------

NASTY = "[bold]漢字[/bold] \x1b[31m\u202e\x07\r\n" + "か" * 300


@pytest.mark.parametrize("width", [20, 33, 60, 80, 119, 200])
def test_the_table_is_as_wide_as_the_terminal_and_shows_no_control_characters(width):
    found = [completion(7, f"0:{i}", prompt=NASTY * 2 + "?", completion=NASTY) for i in range(6)]
    lines = as_text(found, Console(file=io.StringIO(), width=width, force_terminal=True)).split("\n")[1:]
    assert max(map(cell_len, lines)) <= width
    assert all(line.isprintable() for line in lines)


def test_the_table_says_what_there_is_to_see():
    console = Console(file=io.StringIO(), force_terminal=False)
    found = [
        completion(50, "0:1", prompt="x" * 500 + "What is [b]?", completion="\x1b[31mred\n" + "y" * 500),
        completion(50, "0:2", token_reverse_kl=[None] * 3, stop_reason="length"),
        completion(50, "0:3", exact=False),
    ]
    text = as_text(found, console)
    assert text.startswith("step 50: 3 of 3 kept answers, written by the student\n")
    assert "What is [b]?" in text
    assert "\\x1b[31mred⏎" in text
    rows = [line.split()[-3:] for line in text.split("\n") if line.endswith(("stop", "length"))]
    assert rows == [["1.000", "3", "stop"], ["–", "3", "length"], ["≥1.000", "3", "stop"]]


@pytest.mark.parametrize("cells", [1, 2, 5, 20])
def test_a_text_is_cut_at_either_end_to_the_cells_there_are(cells):
    for text in ("", "ab", "漢字漢字漢字", "\x1b\x1b\x1b", "abcdefghijklmnopqrstuvwxyz", "\u0301" * 30):
        for cut, at in ((end_of, 0), (beginning_of, -1)):
            shown = cut(text, cells)
            assert cell_len(shown) <= cells
            assert shown.isprintable()
            assert shown == text or not text.isprintable() or shown[at] == "…"
    assert (end_of("one two", 4), beginning_of("one two", 4)) == ("…two", "one…")


def test_a_reporter_shows_text_or_json_or_nothing():
    def shown(log_format="text", quiet=False):
        out = io.StringIO()
        ConsoleReporter(Console(file=out, width=70), log_format, quiet).completions([completion(3)] * 9)
        return out.getvalue()

    assert shown().startswith("step 3: 3 of 9 kept answers")
    assert shown(quiet=True) == ""
    event = json.loads(shown("json"))
    expected = json.loads(json.dumps(as_object([completion(3)] * 9)))
    assert {**event, "time": 0} == {**expected, "time": 0}
    assert event["time"] <= expected["time"]
    assert (event["event"], event["step"], event["kept"], len(event["samples"])) == ("completions", 3, 9, 3)
    assert event["samples"][0]["reverse_kl"] == 1.0
    one = as_object([completion(3, prompt="x" * 500 + "\n", completion="\n" + "x" * 500)])["samples"][0]
    assert (one["prompt"], one["completion"]) == ("x" * 399 + "\n", "\n" + "x" * 399)


# ---- the option ------------------------------------------------------------------------------------------------------


def test_the_class_reads_the_option_from_its_arguments(tmp_path, student, teacher):
    args = {"lmbda": 1.0}
    assert make_trainer(tmp_path, copy.deepcopy(student), teacher, **args).completions.every is None
    for value, message in ((0, "at least 1, got 0"), (True, "expected a whole number")):
        with pytest.raises(ConfigError, match=f"log_completions_steps: .*{message}"):
            make_trainer(tmp_path, copy.deepcopy(student), teacher, log_completions_steps=value, **args)
    assert make_trainer(tmp_path, student, teacher, log_completions_steps=7, **args).completions.every == 7


def checked(**rlhf):
    training = {"output_dir": "runs/x", "log_completions_steps": rlhf.pop("every", 5)}
    rlhf = {"teacher_model": "org/teacher", **rlhf}
    return check_config(
        {"model": {"model": "org/student"}, "data": {"train": "org/rows"}, "rlhf": rlhf, "training": training}
    )


@pytest.mark.parametrize("rlhf", [{"lmbda": 0.0}, {"llm_kd_weight": 0.0}])
def test_where_no_answers_are_generated_the_option_has_no_effect(rlhf):
    (warning,) = (found for found in checked(**rlhf).warnings if found.path == "training.log_completions_steps")
    assert warning.message.startswith("has no effect")
    assert "training.log_completions_steps" not in [found.path for found in checked(every=None, **rlhf).warnings]


def test_an_option_of_training_that_is_ours_is_checked_and_never_reaches_the_arguments_of_trl():
    assert not checked().errors
    assert not checked(lmbda=0.0, seq_kd=True).warnings
    (error,) = checked(every=2.5).errors
    assert (error.path, error.message) == (
        "training.log_completions_steps", "expected a whole number, got the number 2.5"
    )  # fmt: skip
    training = json_schema()["properties"]["training"]["properties"]
    assert training["log_completions_steps"]["anyOf"] == [{"minimum": 1, "type": "integer"}, {"type": "null"}]
    assert training["log_completions_steps"]["description"]
    args = build_train_arguments(checked().config).training_args
    assert args.log_completions_steps == 5
    assert "log_completions_steps" not in args.to_dict()
