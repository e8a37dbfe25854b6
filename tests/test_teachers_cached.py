"""A teacher whose targets are read from a cache: the right ones for every row, in time, or an error that says why."""

import os
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from kdtrain.data import Collator, encode_row
from kdtrain.data.batch import Batch
from kdtrain.errors import DataError, PreflightError, TeacherError
from kdtrain.preflight.alignment import check_alignment
from kdtrain.teachers import CachedTeacher, LocalTeacher, Targets, Teacher
from kdtrain.teachers.cached.store import CacheReader
from tests import tiny
from tests import tiny_processors as vision
from tests.test_data_images import ANSWER, IMAGE, TURNS, user
from tests.test_distributed import sharding_on_a_cpu
from tests.test_preflight_alignment import trained
from tests.test_trainer import make_trainer
from tests.tiny_cache import MODES, form_of, write_cache

UNSUPERVISED = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100], "prompt_length": 3}


def make_rows(tokenizer):
    """Rows of other lengths, two of them the same, one that supervises nothing."""
    encoded = [encode_row(chat, tokenizer, train_on="assistant") for chat in [*tiny.CHATS, tiny.CHATS[0]]]
    rows = [{"input_ids": r.input_ids, "labels": r.labels, "prompt_length": r.prompt_length} for r in encoded]
    rows.insert(2, UNSUPERVISED)
    return [{**row, "row_id": f"0:{i}"} for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def own():
    """The teacher that the caches of this module are of."""
    return LocalTeacher(tiny.make_qwen3(seed=2, hidden=48))


@pytest.fixture(scope="module")
def rows(tokenizer):
    return make_rows(tokenizer)


@pytest.fixture(scope="module")
def collate(tokenizer):
    return Collator(tokenizer, row_keys=True)


@pytest.fixture(scope="module")
def caches(tmp_path_factory, own, rows, collate):
    """A cache of each mode; top-k with every token of the vocabulary."""
    folder = tmp_path_factory.mktemp("caches")
    forms = {mode: form_of(mode, own, entries=own.vocab_size) for mode in MODES}
    return {mode: write_cache(folder / mode, own, rows, collate, form, shard=3) for mode, form in forms.items()}


@pytest.fixture
def cached(caches):
    opened = []

    def open_cache(mode="topk", **options):
        opened.append(CachedTeacher(caches[mode], **options))
        return opened[-1]

    yield open_cache
    for teacher in opened:
        teacher.close()


def log_probabilities(targets):
    scores = targets.scores
    if hasattr(scores, "logprobs"):
        return torch.full((len(scores.indices), 320), -torch.inf).scatter(1, scores.indices, scores.logprobs)
    return torch.log_softmax(scores.logits(), -1)


ORDERS = [[0], [1, 0], [5, 2, 7, 0], [2, 2, 1], [6, 5, 4, 3, 2, 1, 0], [7, 0, 7]]


@pytest.mark.parametrize("mode", ["topk", "hidden"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_row_gets_the_targets_of_its_teacher_wherever_it_stands(cached, own, rows, collate, mode, order):
    batch = collate([rows[i] for i in order])
    found = cached(mode).targets(batch)
    assert found.covered_S is None
    expected = own.targets(batch).scores.logits()
    torch.testing.assert_close(log_probabilities(found), torch.log_softmax(expected, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_drawn_tokens_are_those_that_are_stored_of_each_row(cached, rows, collate, order):
    teacher = cached("sample")
    batch = collate([rows[i] for i in order])
    found = teacher.targets(batch).scores
    first = 0
    for key, count in zip(batch.rows.keys, batch.predicts_BT.sum(1).tolist(), strict=True):
        if count:
            stored, own = teacher.reader.read([key]), found[first : first + count]
            torch.testing.assert_close(own.weights.sum(1), torch.ones(count))
            for i in range(count):
                assert shares(own, i) == shares(stored, i)
        first += count
    assert first == len(found.indices) == int(batch.num_supervised)


def shares(targets, i):
    pairs = zip(targets.indices[i].tolist(), targets.weights[i].tolist(), strict=True)
    return {token: weight for token, weight in pairs if token >= 0}


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_supervised_tokens_has_targets_of_none(cached, rows, collate, mode):
    """A rank that only fills up an epoch goes through the same motions as the others."""
    repeated = replace(collate(rows[:2]).without_labels(), all_repeated=True)
    for batch in (repeated, collate([UNSUPERVISED])):
        scores = cached(mode).targets(batch).scores
        assert len(scores.hidden if mode == "hidden" else scores.indices) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_a_rank_that_only_fills_up_an_epoch_has_a_loss_of_zero(cached, tmp_path, rows, collate, mode):
    trainer = make_trainer(tmp_path, rows=rows, extra={"teacher": cached(mode)}, beta=0.0)
    batch = replace(collate(rows[:2]).without_labels(), all_repeated=True)
    assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5)).item() == 0


def test_targets_are_on_the_device_of_the_batch(cached, rows, collate):
    batch = collate(rows[:1])
    teacher = cached("topk")
    teacher.prepare([batch])
    moved = replace(batch, labels=batch.labels.to("meta"))  # whose values nobody can read: they are not needed again
    vars(moved)["predicts_BT"] = batch.predicts_BT
    assert teacher.targets(moved).scores.indices.device.type == "meta"


def test_a_cache_is_no_model(cached):
    teacher = cached()
    assert teacher.module is None
    assert (teacher.can_generate, teacher.has_features, teacher.has_targets) == (False, False, True)
    assert teacher.vocab_size == 320
    assert (teacher.waits, teacher.lookahead) == (True, 2)
    assert cached(lookahead=5).lookahead == 5
    assert (cached().drawn_at, cached("sample").drawn_at) == (None, 1.0)


def test_a_head_with_padding_columns_is_cut_to_those_that_the_cache_is_of(own, rows, collate, tmp_path):
    form = replace(form_of("hidden", own), vocab_size=300)
    teacher = CachedTeacher(write_cache(tmp_path / "cache", own, rows, collate, form))
    teacher.place(Accelerator(cpu=True))
    logits = teacher.targets(collate(rows[:1])).scores.logits()
    assert logits.shape[1] == teacher.vocab_size == 300
    teacher.close()


# ---- reading ahead ---------------------------------------------------------------------------------------------------


class SlowReader:
    """Makes every reading wait for a word; counts."""

    def __init__(self, monkeypatch):
        self.go, self.rows, read = threading.Event(), [], CacheReader.read

        def waiting(reader, keys):
            assert threading.current_thread() is not threading.main_thread()
            assert self.go.wait(30)
            self.rows.append(tuple(keys))
            return read(reader, keys)

        monkeypatch.setattr(CacheReader, "read", waiting)


def test_prepare_does_not_wait_and_what_is_waited_for_is_counted(cached, rows, collate, monkeypatch):
    slow = SlowReader(monkeypatch)
    teacher = cached()
    window = [collate(rows[:2]), collate(rows[2:4])]
    teacher.prepare(window)
    assert (slow.rows, teacher.waited_s) == ([], 0)
    threading.Timer(0.2, slow.go.set).start()
    teacher.wait(window)
    waited = teacher.waited_s
    assert 0.1 < waited < 10
    for batch in window:
        teacher.targets(batch)
    assert teacher.waited_s - waited < 0.05
    assert slow.rows == [
        tuple(batch.rows.keys[i] for i in kept) for batch, kept in zip(window, ([0, 1], [1]), strict=True)
    ]


def test_what_was_read_ahead_is_not_read_again_and_an_evaluation_between_leaves_it(cached, rows, collate, monkeypatch):
    slow = SlowReader(monkeypatch)
    slow.go.set()
    teacher = cached()
    windows = [[collate(rows[i : i + 1])] for i in (0, 1, 3)]
    for window in windows:
        teacher.prepare(window)
    same_rows = collate(rows[1:2])  # of an evaluation
    teacher.prepare([same_rows])
    teacher.targets(same_rows)
    for window in windows:
        teacher.targets(window[0])
    assert len(slow.rows) == 4
    assert not teacher._windows


def test_windows_that_are_never_asked_for_are_forgotten(cached, rows, collate):
    teacher = cached(lookahead=1)
    for _ in range(10):
        teacher.prepare([collate(rows[:1])])
    assert len(teacher._windows) == 3


def test_a_batch_that_nobody_prepared_is_read_when_it_is_asked_for(cached, rows, collate):
    teacher = cached()
    teacher.prepare([collate(rows[:1])])
    assert len(teacher.targets(collate(rows[3:5])).scores.indices)
    assert len(teacher._windows) == 1


def test_a_teacher_that_is_closed_says_so(caches, rows, collate, monkeypatch):
    slow = SlowReader(monkeypatch)
    teacher = CachedTeacher(caches["topk"])
    window = [collate(rows[:1]), collate(rows[1:2])]
    teacher.prepare(window)
    reads = [read for (read,) in zip(teacher._windows[0], strict=True)]
    threading.Timer(0.1, slow.go.set).start()
    teacher.close()
    teacher.close()
    with pytest.raises(TeacherError, match="closed before"):
        teacher._result(reads[1][1])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_row_that_is_not_there_is_an_error_with_its_name(cached, rows, collate):
    other = {**rows[0], "input_ids": [9, *rows[0]["input_ids"][1:]], "row_id": "2:17\x1b[31m"}
    batch = collate(
        [rows[1], other, {**other, "labels": rows[0]["labels"], "input_ids": [8, *rows[0]["input_ids"][1:]]}]
    )
    with pytest.raises(TeacherError) as caught:
        cached().targets(batch)
    text = str(caught.value)
    assert "no targets for row 2:17\\x1b[31m and 1 more of its batch" in text
    assert "kdtrain cache CONFIG --out DIR" in text


def test_a_row_with_another_number_of_tokens_in_the_cache_is_refused(cached, rows, collate, monkeypatch):
    counts = CacheReader.counts
    monkeypatch.setattr(CacheReader, "counts", lambda reader, keys: [count + 1 for count in counts(reader, keys)])
    with pytest.raises(TeacherError, match=r"targets for \d+ tokens of row 0:1, of which \d+ are supervised"):
        cached().targets(collate([rows[1]]))


def test_batches_without_keys_are_refused_with_what_to_use(cached, rows, tokenizer):
    with pytest.raises(PreflightError, match=r"Collator\(processing_class, row_keys=True\)"):
        cached().prepare([Collator(tokenizer)(rows[:2])])


def test_generated_answers_are_refused(cached, rows, collate):
    with pytest.raises(TeacherError, match="no targets for answers that are generated"):
        cached().targets(replace(collate(rows[:1]), generated_by="student"))


# ---- damaged folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(own, rows, collate, tmp_path):
    return write_cache(tmp_path / "cache", own, rows, collate, form_of("hidden", own), shard=3)


def shards(folder):
    return sorted(folder.glob("shard-*"))


def test_a_changed_byte_of_a_row_is_found_when_the_row_is_read(folder, rows, collate):
    path = shards(folder)[0]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # of the last row in it
    path.write_bytes(content)
    teacher = CachedTeacher(folder)
    key = bytes(teacher.reader._shards[0].keys[-1])
    damaged = [row for row in rows if collate([row]).rows.keys == [key]]
    assert teacher.targets(collate([row for row in rows[:1] if row not in damaged])).scores.hidden.shape[0]
    batch = collate(damaged[:1])
    teacher.prepare([batch])
    with pytest.raises(TeacherError, match=path.name):
        teacher.wait([batch])
    teacher.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:5]),
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        lambda path: path.write_bytes(path.read_bytes()[:20] + b"\0" + path.read_bytes()[21:]),
    ],
    ids=["cut", "empty", "almost empty", "length", "header"],
)
@pytest.mark.parametrize("name", ["shard-00001.safetensors", "head.safetensors"])
def test_a_file_that_is_damaged_is_named_when_the_cache_is_opened(folder, damage, name):
    damage(folder / name)
    with pytest.raises(DataError, match=name):
        CachedTeacher(folder)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "head.safetensors"])
def test_a_pickle_in_place_of_a_file_is_refused_and_never_run(folder, name):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(folder / "was run"),)

    (folder / name).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(DataError, match=name):
        CachedTeacher(folder)
    torch.save(Runs(), folder / name)
    with pytest.raises(DataError, match=name):
        CachedTeacher(folder)
    assert not (folder / "was run").exists()


def test_scripts_and_other_files_in_a_cache_are_left_alone(folder, rows, collate):
    for name in ("shard-00000.py", "modeling.py", "__init__.py", "store.pkl", "shard-00000.pt"):
        (folder / name).write_text(f"import os; os.mkdir({str(folder / 'was run')!r})")
    teacher = CachedTeacher(folder)
    teacher.targets(collate(rows[:1]))
    teacher.close()
    assert not (folder / "was run").exists()


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(DataError, match="no cache"):
        CachedTeacher(tmp_path)


# ---- alignment -------------------------------------------------------------------------------------------------------


class Recorder(Teacher):
    """Another teacher, and the batches that it was asked about."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []
        self.vocab_size, self.waits = inner.vocab_size, inner.waits

    @property
    def answers_anything(self):
        return self.inner.answers_anything

    def targets(self, batch: Batch) -> Targets:
        self.asked.append(batch)
        return self.inner.targets(batch)


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_is_not_asked_about_rows_with_changed_tokens(cached, rows, collate, mode):
    teacher = Recorder(cached(mode))
    (finding,) = check_alignment(teacher, collate(rows))
    assert len(teacher.asked) == 1
    assert finding.level == "warning"  # its teacher has learnt nothing
    assert "Whether they are off by one cannot be seen" in finding.message


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", [0, 1, -1])
def test_a_cache_of_a_teacher_that_knows_the_rows_is_found_right_or_off_by_one(tmp_path, collate, mode, by):
    known = LocalTeacher(trained())

    class Shifted(Teacher):
        vocab_size, module = 320, known.module

        def targets(self, batch):
            scores = known.targets(batch).scores
            return Targets(replace(scores, hidden=scores.hidden.roll(by, 0)))

    form = form_of(mode, known, entries=50)
    teacher = CachedTeacher(write_cache(tmp_path / "cache", Shifted(), tiny.CHATS, collate, form))
    (finding,) = check_alignment(teacher, collate(tiny.CHATS))
    teacher.close()
    said = {0: "fit the tokens that they are for", 1: "those of the token before", -1: "those of the token after"}
    assert said[by] in finding.message
    assert finding.level == ("info" if by == 0 else "error")


# ---- in the trainer --------------------------------------------------------------------------------------------------


def train(folder, teacher, rows, callbacks=(), resume=None, **kwargs):
    """The records and the weights of a run."""
    extra = {"teacher": teacher, "callbacks": list(callbacks), "eval_dataset": rows[:3]}
    options = {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 4, "sft_alpha": 0.3, "beta": 0.0, **kwargs}
    trainer = make_trainer(folder, rows=rows, extra=extra, **options)
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return trainer.state.log_history, weights


def losses(records):
    return [record.get("loss", record.get("eval_loss")) for record in records if {"loss", "eval_loss"} & record.keys()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_same_however_far_it_reads_ahead(cached, rows, tmp_path, mode):
    """Shuffled, more than two epochs with a short last batch, evaluations in between."""
    runs = [train(tmp_path, cached(mode, lookahead=ahead), rows, per_device_train_batch_size=3) for ahead in (0, 1, 3)]
    for records, weights in runs[1:]:
        assert torch.equal(weights, runs[0][1])
        assert losses(records) == losses(runs[0][0])
    assert all("teacher_wait_fraction" in record for record in runs[0][0] if "loss" in record)


@pytest.mark.parametrize("mode", ["topk", "hidden"])
def test_shuffled_and_accumulated_training_is_that_of_the_teacher_itself(cached, own, rows, tmp_path, mode):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "beta": 0.5, "learning_rate": 1e-3}
    expected, weights = train(tmp_path, own, rows, **options)
    found, of_cache = train(tmp_path, cached(mode), rows, **options)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert (of_cache - weights).norm() < 1e-4 * weights.norm()


def _two_ranks(folder, cache, rows, optim):
    torch.manual_seed(0)
    teacher = CachedTeacher(cache) if cache else LocalTeacher(tiny.make_qwen3(seed=2, hidden=48))
    options = {"optim": optim, "learning_rate": 0.05, "per_device_train_batch_size": 3, "beta": 0.0}
    records, weights = train(folder, teacher, rows, **options)
    teacher.close()
    return losses(records), weights.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["topk", "hidden"])
def test_two_ranks_get_the_targets_of_their_own_rows(caches, rows, tmp_path, mode):
    """Eight rows, six of them a step: the last batch of an epoch is filled up, on one rank with nothing else."""
    expected = tiny.run_ranks(_two_ranks, 2, tmp_path / "own", None, rows, "sgd")
    found = tiny.run_ranks(_two_ranks, 2, tmp_path / "cache", caches[mode], rows, "sgd")
    for (loss, weights), (of_teacher, expected_weights) in zip(found, expected, strict=True):
        assert loss == pytest.approx(of_teacher, rel=1e-5)
        torch.testing.assert_close(torch.tensor(weights), torch.tensor(expected_weights), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("step", [2, tiny.slow(5)])
def test_a_resumed_run_equals_the_uninterrupted_one(cached, rows, tmp_path, step):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    expected, weights = train(tmp_path / "run", cached(), rows, **options)
    checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
    found, of_resumed = train(
        tmp_path / "other", cached(), rows, resume=checkpoint, save_strategy="no", per_device_train_batch_size=2
    )
    assert torch.equal(weights, of_resumed)
    assert losses(found)[-3:] == losses(expected)[-3:]


class Set(TrainerCallback):
    def __init__(self, **options):
        self.options = options

    def on_step_end(self, args, state, control, **kwargs):
        for name, value in self.options.items():
            setattr(self.trainer, name, value)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("topk", {"lmbda": 0.5}, "no targets for text that does not exist yet"),
        ("topk", {"seq_kd": True}, "no targets for text that does not exist yet"),
        ("sample", {"beta": 0.5}, "only forward KL can be learnt: set divergence to jsd and beta to 0"),
        ("sample", {"kd_temperature": 2.0}, "drawn at 1: set kd_temperature to 1"),
    ],
)
def test_what_a_cache_cannot_give_is_refused_when_the_trainer_is_built_or_a_callback_asks_for_it(
    cached, rows, tmp_path, mode, options, message
):
    good = {"lmbda": 0.0, "seq_kd": False, "beta": 0.0}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows=rows, extra={"teacher": cached(mode)}, **{**good, **options})
    callback = Set(**options)
    trainer = make_trainer(
        tmp_path, rows=rows, extra={"teacher": cached(mode), "callbacks": [callback]}, max_steps=3, **good
    )
    callback.trainer = trainer
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1


def test_raw_rows_of_the_python_class_are_found_too(own, collate, tmp_path):
    cache = write_cache(tmp_path / "cache", own, tiny.CHATS, collate, form_of("hidden", own))
    teacher = CachedTeacher(cache)
    found = make_trainer(tmp_path, extra={"teacher": teacher}, max_steps=3)
    assert found.data_collator.row_keys
    assert not make_trainer(tmp_path, teacher=own.module).data_collator.row_keys
    found.train()
    teacher.close()
    expected = make_trainer(tmp_path, teacher=own.module, max_steps=3)
    expected.train()
    assert losses(found.state.log_history) == pytest.approx(losses(expected.state.log_history), rel=1e-5)


def test_a_users_collator_without_keys_is_refused_before_training(cached, rows, tokenizer, tmp_path):
    trainer = make_trainer(
        tmp_path, rows=rows, extra={"teacher": cached(), "data_collator": Collator(tokenizer)}, max_steps=1
    )
    with pytest.raises(PreflightError, match="row_keys=True"):
        trainer.train()


def test_a_damaged_row_stops_the_run_between_two_steps(folder, rows, tmp_path):
    path = shards(folder)[-1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    teacher = CachedTeacher(folder)
    extra = {"teacher": teacher}
    trainer = make_trainer(tmp_path, rows=rows, extra=extra, max_steps=4, train_sampling_strategy="sequential")
    trainer.alignment_checked = True  # which reads the first rows
    with pytest.raises(TeacherError, match=path.name) as caught:
        trainer.train()
    assert caught.value.between_steps
    teacher.close()


# ---- images, and models in pieces ------------------------------------------------------------------------------------


def test_rows_with_images_get_the_targets_of_their_own_image(tmp_path):
    processor = vision.make_llava()
    images = [vision.picture(seed) for seed in (0, 1)]
    asked = {"messages": [user(IMAGE, "What"), ANSWER]}
    rows = [{**asked, "images": [image]} for image in images] + [{"messages": TURNS}]
    own = LocalTeacher(vision.make_llava_model(len(processor.tokenizer)))
    collate = Collator(processor, row_keys=True)
    form = form_of("hidden", own)
    teacher = CachedTeacher(write_cache(tmp_path / "cache", own, rows, collate, form, together=1))
    found = [teacher.targets(collate([row])).scores.hidden for row in rows]
    for row, hidden in zip(rows, found, strict=True):
        assert torch.equal(hidden, own.targets(collate([row])).scores.hidden)
    assert not torch.equal(found[0], found[1])
    with pytest.raises(TeacherError, match="no targets for row"):
        teacher.targets(collate([{**asked, "images": [vision.picture(2)]}]))
    teacher.close()


def _in_pieces(folder, cache, rows):
    teacher = CachedTeacher(cache)
    options = {"optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": 4, "max_steps": 3}
    trainer = make_trainer(folder, rows=rows, extra={"teacher": teacher}, **options, **sharding_on_a_cpu())
    trainer.train()
    teacher.close()
    return losses(trainer.state.log_history), type(trainer.model_wrapped).__name__


@pytest.mark.parametrize("mode", ["topk", tiny.slow("hidden")])
def test_a_student_in_pieces_is_trained_as_a_whole_one(cached, caches, rows, tmp_path, mode):
    options = {"optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": 8, "max_steps": 3}
    trainer = make_trainer(tmp_path, rows=rows, extra={"teacher": cached(mode)}, **options)
    trainer.train()
    for found, kind in tiny.run_ranks(_in_pieces, 2, tmp_path / "two", caches[mode], rows):
        assert kind.startswith("FSDP")
        assert found == pytest.approx(losses(trainer.state.log_history), rel=1e-5)
