"""NaN and infinity: what ends the run, what is said of it, and what is left. And batches that supervise nothing."""

import json
import math

import pytest
import torch
from accelerate import PartialState
from transformers import TrainerCallback

import kdtrain as api
from kdtrain.data import Collator, Source, build_dataset
from kdtrain.data.batch import Batch
from kdtrain.errors import NonFiniteError, TeacherError
from kdtrain.generation.answers import TeacherAnswers
from kdtrain.generation.writers import LocalWriter
from kdtrain.losses import TopKLogprobs
from kdtrain.runs.checkpoints import missing_files
from kdtrain.teachers import Targets, Teacher
from tests import tiny
from tests.test_on_policy_errors import ANSWERED_BY_TEACHER, kdtrain  # noqa: F401
from tests.test_trainer import make_batch, make_trainer, visual_trainer

ROWS = ["0:0", "0:1", "0:2", "0:3"]


def broken(project, name):
    """A model that is NaN from its last norm on."""
    model = tiny.make_qwen3(seed=1) if name == "student" else tiny.make_qwen3(seed=2, hidden=48)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    tiny.save_model(model, tiny.make_tokenizer(), project / name)


def facts_of(project):
    return json.loads((project / "run" / "nonfinite.json").read_text())


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_file_has_step_rank_terms_rows_and_their_source(project, kdtrain, side):  # noqa: F811
    broken(project, side)
    code, err = kdtrain("fit", "rlhf.sft_alpha=0.5")
    assert code == 5, err
    facts = facts_of(project)
    assert (facts["step"], facts["during"]) == (1, "training")
    # A student that is NaN has no entropy; the teacher's is what it is.
    assert facts["origin"] == [side]
    (found,) = facts["ranks"]
    (micro_batch,) = found["micro_batches"]
    assert (found["rank"], micro_batch["rows"]) == (0, ROWS)
    assert found["terms"] == ["llm_kd_loss"] + ["sft_loss"] * (side == "student")
    assert micro_batch["terms"]["llm_kd_loss"] == "nan"
    assert side == "student" or micro_batch["terms"]["sft_loss"] > 0
    assert facts["gradient_norm"] == "nan"
    assert facts["sources"]["0:3"] == {"source": str(project / "train.jsonl"), "row": 3}
    assert "What is" not in json.dumps(facts), "no text of the data"
    assert "step 1, rank 0" in err
    assert "rows 0:0, 0:1, 0:2, 0:3" in err
    assert f"the {side}'s" in err
    assert "nonfinite.json" in err
    assert "There is no checkpoint from before" in err


WRITING = {
    "student, on-policy": ("student", ["rlhf.lmbda=1"], "generation"),
    "teacher, seq_kd": ("teacher", ["rlhf.lmbda=0", "rlhf.seq_kd=true"], "generation"),
    "teacher, answers": ("teacher", ["rlhf.lmbda=0", ANSWERED_BY_TEACHER], "answers"),
    "teacher, selection": ("teacher", ["rlhf.lmbda=1", "rlhf.samples_per_prompt=2", "rlhf.select=best"], "selection"),
    "teacher, completions shown": ("teacher", ["rlhf.lmbda=1", "training.log_completions_steps=1"], "training"),
}


@pytest.mark.parametrize("name", tiny.one_in(2, WRITING))
def test_a_model_that_writes_or_judges_samples_is_named_with_the_rows(project, kdtrain, name):  # noqa: F811
    side, overrides, during = WRITING[name]
    broken(project, side)
    code, err = kdtrain("fit", *overrides)
    assert code == 5, err
    facts = facts_of(project)
    assert (facts["during"], facts["origin"]) == (during, [side])
    assert facts["sources"].keys() <= set(ROWS) | {f"0:{i}" for i in range(24)}
    assert facts["sources"]
    assert "rank 0" in err or during == "answers"
    assert "Traceback" not in err
    for file in (project / "run").rglob("*.jsonl"):  # answers that a next run would train on
        assert file.name == "logging.jsonl" or file.read_text() == ""
    assert not (project / "run" / "model.safetensors").exists()


def answered_on_two_ranks(folder, rows):
    state = PartialState(cpu=True)
    tokenizer, teacher = tiny.make_tokenizer(), tiny.make_qwen3(seed=2)
    if state.process_index == 1:
        with torch.no_grad():
            teacher.model.norm.weight[0] = math.nan
    source = Source(str(rows), answers="teacher")
    options = {"max_length": 64, "on_overlength": "error", "train_on": "assistant"}
    data, _ = build_dataset([source], tokenizer, cache_dir=str(folder / f"cache{state.process_index}"), **options)
    writer = LocalWriter(
        teacher, tokenizer, Collator(tokenizer), max_new_tokens=2, vocabulary=320, batch_size=1, device="cpu"
    )
    try:
        TeacherAnswers(writer, folder / "answers", identity={}).fill(data)
    except NonFiniteError as error:
        return str(error), json.dumps(error.facts)


def test_a_rank_whose_teacher_writes_no_numbers_ends_both_and_what_the_other_has_written_is_kept(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.CHATS))
    first, second = tiny.run_ranks(answered_on_two_ranks, 2, tmp_path, rows)
    assert first == second
    assert "while the teacher wrote answers" in first[0]
    assert json.loads(first[1])["ranks"][0]["rank"] == 1
    written = {path.name: path.read_text().splitlines() for path in (tmp_path / "answers").rglob("*.jsonl")}
    assert {name: len(lines) for name, lines in written.items()} == {"rank0.jsonl": 3, "rank1.jsonl": 0}


class Given(Teacher):
    """Logits, one of them not finite."""

    vocab_size = 320

    def __init__(self, value):
        self._value = value

    def targets(self, batch: Batch) -> Targets:
        tokens = len(batch.labels_S)
        scores = torch.randn(tokens, self.vocab_size)
        scores[-1, 5] = self._value
        return Targets(scores)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_targets_that_are_handed_over_are_the_teachers(tmp_path, student, value):
    before = [p.clone() for p in student.parameters()]
    trainer = make_trainer(tmp_path, student, max_steps=2, extra={"teacher": Given(value)}, lmbda=0.0)
    trainer.alignment_checked = True
    with pytest.raises(NonFiniteError, match="the teacher's targets are not finite") as caught:
        trainer.train()
    assert caught.value.facts["origin"] == ["teacher"]
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


class GivenTopK(Given):
    """The two most likely tokens, one log-probability of which is not what it should be."""

    def targets(self, batch: Batch) -> Targets:
        tokens = len(batch.labels_S)
        logprobs = torch.full((tokens, 2), -1.0)
        logprobs[-1, 0] = self._value
        return Targets(TopKLogprobs(torch.tensor([[5, 6]]).repeat(tokens, 1), logprobs))


@pytest.mark.parametrize("begun", [True, False])
def test_a_users_top_k_targets_that_are_no_numbers_name_the_teacher_and_the_rows(tmp_path, student, begun):
    trainer = make_trainer(tmp_path, student, max_steps=2, extra={"teacher": GivenTopK(math.nan)}, lmbda=0.0)
    trainer.alignment_checked = begun  # else the look at a few rows finds it
    with pytest.raises(NonFiniteError, match=r"step 1, rank 0.*row.* 0, .*, given by GivenTopK") as caught:
        trainer.train()
    assert (caught.value.exit_code, caught.value.facts["origin"]) == (5, ["teacher"])
    assert "0" in caught.value.facts["ranks"][0]["rows"]


@pytest.mark.parametrize(("value", "said"), [(0.5, "add up to more than"), (-1e9, "a logprob below")])
def test_a_users_top_k_targets_that_are_no_distributions_are_the_teachers_fault(tmp_path, student, value, said):
    trainer = make_trainer(tmp_path, student, extra={"teacher": GivenTopK(value)}, lmbda=0.0)
    with pytest.raises(TeacherError, match=f"no distributions: .*{said}.*given by GivenTopK"):
        trainer.compute_loss(trainer.model, make_batch(trainer))


def bad_rank_of_two(folder):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=tiny.CHATS, max_steps=3,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    if torch.distributed.get_rank() == 1:
        poison_after(trainer.teacher_model, 1)
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error), json.dumps(error.facts)


def poison_after(model, good):
    """NaN hidden states from the forward after so many of a training trainer on."""
    count = []

    def poison(module, args, output):
        count.append(1)
        if len(count) > good:
            output.last_hidden_state = output.last_hidden_state * math.nan
        return output

    model.model.register_forward_hook(poison)
    return count


def test_all_ranks_say_the_same_and_only_the_bad_micro_batch_is_listed(tmp_path):
    first, second = tiny.run_ranks(bad_rank_of_two, 2, tmp_path)
    assert first == second
    message, facts = first[0], json.loads(first[1])
    assert "step 1, rank 1" in message
    assert [found["rank"] for found in facts["ranks"]] == [1]
    assert [len(one["rows"]) for found in facts["ranks"] for one in found["micro_batches"]] in ([1], [1, 1])
    assert facts["origin"] == ["teacher"]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_features_that_are_not_finite_are_told_by_their_models_weights(tmp_path, side):
    trainer = visual_trainer(tmp_path, llm_kd_weight=0.0)
    model = trainer.model if side == "student" else trainer.teacher_model
    with torch.no_grad():
        model.aligner.weight[0, 0] = math.nan
    batch = make_batch(trainer, pixel_values=torch.randn(3, 5, 4))
    trainer.compute_loss(trainer.model, batch)
    with pytest.raises(NonFiniteError, match="vision_kd_loss") as caught:
        trainer._guard.check_losses()
    assert caught.value.facts["origin"] == [side]


def test_a_cache_of_a_teacher_that_is_not_finite_is_not_written(project, kdtrain):  # noqa: F811
    broken(project, "teacher")
    code, err = kdtrain("cache", "--out", "targets")
    assert code == 5, err
    assert "The teacher's predictions are NaN or infinite" in err
    assert not [path for path in (project / "targets").rglob("*.safetensors") if "shard" in path.name]


# ---- what is left ----------------------------------------------------------------------------------------------------


class Break(TrainerCallback):
    """Makes a weight NaN at the beginning of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                model.model.norm.weight[0] = math.nan


def test_the_checkpoint_before_is_intact_named_and_gone_on_from(project, monkeypatch):
    monkeypatch.chdir(project)
    options = ["training.save_strategy=steps", "training.save_steps=1", "training.eval_strategy=no"]
    with pytest.raises(NonFiniteError, match=r"checkpoint-2 is from before\. Go on from it with") as caught:
        api.fit("config.yaml", options, callbacks=[Break(2)], quiet=True)
    assert (caught.value.facts["step"], caught.value.facts["during"]) == (2, "weights")
    assert sorted(path.name for path in (project / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert missing_files(project / "run" / "checkpoint-2") == []
    status = json.loads((project / "run" / "status.json").read_text())
    assert (status["exit_code"], status["last_checkpoint"]) == (5, "checkpoint-2")
    assert "checkpoint-2" in status["message"]
    assert api.fit("config.yaml", options, resume="auto", quiet=True).steps == 4


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_evaluation_stops_at_its_first_bad_batch(tmp_path, student, teacher, side):
    trainer = make_trainer(
        tmp_path, student, teacher, max_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=1,
        extra={"eval_dataset": tiny.CHATS, "processing_class": tiny.make_tokenizer()},
    )  # fmt: skip
    count = []

    class Poison(TrainerCallback):
        def on_step_end(self, *_, **__):
            count.extend([poison_after({"student": student, "teacher": teacher}[side], 2)])

    trainer.add_callback(Poison())
    with pytest.raises(NonFiniteError, match="in the evaluation after step 1, rank 0") as caught:
        trainer.train()
    forwards = len(count[0])
    assert 3 <= forwards <= 4, "of six batches"  # one more of the student's where the gradients are measured
    assert caught.value.facts["origin"] == [side]
    assert not list(tmp_path.rglob("*.safetensors"))


def evaluated_on_two_ranks(folder):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), max_steps=1, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=1, extra={"eval_dataset": tiny.CHATS, "processing_class": tiny.make_tokenizer()},
    )  # fmt: skip

    class Poison(TrainerCallback):
        def on_step_end(self, *_, **__):
            if torch.distributed.get_rank() == 1:
                poison_after(trainer.teacher_model, 0)

    trainer.add_callback(Poison())
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error)


def test_a_bad_rank_ends_the_evaluation_of_both(tmp_path):
    first, second = tiny.run_ranks(evaluated_on_two_ranks, 2, tmp_path)
    assert first == second
    assert "in the evaluation after step 1, rank 1" in first


@pytest.mark.parametrize("side", ["student", tiny.slow("teacher")])
def test_the_command_evaluate_names_the_model_and_the_row(project, kdtrain, monkeypatch, side):  # noqa: F811
    code, err = kdtrain("fit", "data.eval=eval.jsonl", "training.max_steps=1")
    assert code == 0, err
    if side == "teacher":
        broken(project, side)
    else:
        broken(project, side)
        (project / side / "model.safetensors").replace(project / "run" / "model.safetensors")
        tiny.save_model(tiny.make_qwen3(seed=1), tiny.make_tokenizer(), project / side)
    monkeypatch.setattr("sys.argv", ["kdtrain", "evaluate", "run"])
    with pytest.raises(SystemExit) as done:
        api.cli.main()
    assert done.value.code == 5
    facts = facts_of(project)
    assert (facts["during"], facts["origin"]) in [("evaluate", [side]), ("answers", [side])]
    assert facts["ranks"][0]["rows"]
    assert not (project / "run" / "evaluation.json").exists()


# ---- nothing supervised ----------------------------------------------------------------------------------------------

GOOD = [
    {"input_ids": [40 + i, 50, 60 + i, 70, 2], "labels": [-100, -100, 60 + i, 70, 2], "prompt_length": 2}
    for i in range(4)
]
MASKED = [{**row, "labels": [-100] * 5} for row in GOOD]


def weights_after(folder, rows, **options):
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), rows=rows, sft_alpha=0.5, lmbda=0.0,
        per_device_train_batch_size=1, train_sampling_strategy="sequential", learning_rate=1e-2, **options,
    )  # fmt: skip
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, {name: value.tolist() for name, value in trainer.unwrap(trainer.model).state_dict().items()}


def test_a_masked_micro_batch_among_good_ones_changes_nothing(tmp_path):
    good, bad = GOOD, MASKED
    mixed = [good[0], bad[0], bad[1], good[1]]
    expected = weights_after(tmp_path / "good", good[:2], max_steps=1, gradient_accumulation_steps=2)
    found = weights_after(tmp_path / "mixed", mixed, max_steps=1, gradient_accumulation_steps=4)
    assert found == expected


def test_a_masked_micro_batch_of_one_rank_changes_nothing(tmp_path):
    good, bad = GOOD, MASKED
    mixed = [good[0], bad[0], good[1], bad[1]]  # rank 1 has the masked ones
    (losses, expected) = weights_after(tmp_path / "good", good[:2], max_steps=1, gradient_accumulation_steps=2)
    for its_losses, weights in tiny.run_ranks(weights_after_two, 2, tmp_path / "mixed", mixed, timeout=120):
        assert its_losses == pytest.approx(losses, rel=1e-5)
        for name, value in expected.items():
            assert torch.allclose(torch.tensor(weights[name]), torch.tensor(value), atol=1e-6), name


def weights_after_two(folder, rows):
    return weights_after(folder, rows, max_steps=1, gradient_accumulation_steps=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_window_that_is_all_masked_is_a_step_of_loss_0(tmp_path, ranks, caplog):
    rows = [*MASKED[: 2 * ranks], *GOOD[: 2 * ranks]]
    found = tiny.run_ranks(two_windows, ranks, tmp_path, rows)
    for losses, weights in found:
        assert losses[0] == 0
        assert losses[1] > 1
        assert all(math.isfinite(number) for values in weights.values() for number in torch.tensor(values).reshape(-1))
        assert weights == found[0][1]


def two_windows(folder, rows):
    return weights_after(folder, rows, max_steps=2, gradient_accumulation_steps=2, logging_steps=1)


def test_data_that_supervises_nothing_is_an_error_before_training(project, kdtrain):  # noqa: F811
    rows = [
        {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "more " * 200}, {"role": "assistant", "content": "y"}]},
    ]
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, err = kdtrain("fit")
    assert code == 3, err
    assert "max_length" in err
    assert not (project / "run").exists()
