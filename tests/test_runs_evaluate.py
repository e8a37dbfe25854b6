"""`kdtrain evaluate` from the outside: what it reads of a run, what it writes, and what it refuses."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM

from kdtrain.config import ConfigLoader
from kdtrain.generation.writers import LocalWriter
from kdtrain.runs.evaluate import evaluate
from kdtrain.runs.fit import fit
from kdtrain.runs.trained import open_run
from tests import tiny
from tests.stub_server import StubServer
from tests.test_cli import kdtrain  # noqa: F401 - a fixture
from tests.test_runs_served import served, with_status
from tests.test_vision_fit import Silent, models, run  # noqa: F401 - models is a fixture

HELD_OUT = [
    {"messages": [{"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": answer}]}
    for i, answer in enumerate(["two tokens", "the student learns", "zero", "the file", "a path it returns"] * 3)
]
FIGURES = {"ce", "nats_per_byte", "perplexity", "accuracy", "token_accuracy", "forward_kl", "reverse_kl", "agreement",
           "ece", "calibration", "acceptance_rate", "visual_reliance", "tokens"}  # fmt: skip
NUMBERS = FIGURES - {"accuracy", "calibration", "visual_reliance"}


class Quiet(Silent):
    """An evaluation's reporter that keeps what it hears."""

    def rows(self, model, done, total):
        self.measured = [*getattr(self, "measured", ()), (model, done, total)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(project, **sections):
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        config[section].update(values)
    path.write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def original(tokenizer, tmp_path_factory):
    """A project with a run in `run`, evaluated on rows that it was not trained on."""
    project = tiny.make_project(tmp_path_factory.mktemp("original"), tokenizer)
    write_rows(project / "eval.jsonl", HELD_OUT)
    change(project, training={"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2})
    change(project, rlhf={"max_new_tokens": 16})  # of samples, which take longer than all the rest
    fit(ConfigLoader.load_training_config(project / "config.yaml"), Silent())
    return project


@pytest.fixture
def project(original, tmp_path):
    """A copy of it, in which a test may do what it wants: also of the models and rows that the config names."""
    copy = tmp_path / "project"
    shutil.copytree(original, copy)
    file = copy / "run" / "run_config.json"
    file.write_text(file.read_text().replace(str(original), str(copy)))
    return copy


@pytest.fixture
def trained(project):
    return project


def found_in(folder):
    return json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)


def last_evaluation(folder):
    records = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return next(record for record in reversed(records) if "eval_loss" in record)


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_by_its_folder_alone(trained, kdtrain):  # noqa: F811
    code, out, err = kdtrain("evaluate", "run")
    assert code == 0, err
    found = found_in(trained / "run")
    assert found["run"] == str(trained / "run")
    assert set(found["models"]) == {"before", "after", "teacher"}
    assert all(set(model) == FIGURES for model in found["models"].values())
    before, after, teacher = found["models"].values()
    assert after["ce"] == pytest.approx(last_evaluation(trained / "run")["eval_sft_loss"] / 0.3, rel=1e-6)
    assert after["perplexity"] == pytest.approx(math.exp(after["ce"]))
    assert before["ce"] > after["ce"]
    assert [teacher[name] for name in ("forward_kl", "reverse_kl", "agreement", "acceptance_rate")] == [0, 0, 1, 1]
    assert found["verdict"] is found["internalised"] is found["against"] is found["checkpoint"] is None
    drafted = [(1 - model["acceptance_rate"] ** 5) / (1 - model["acceptance_rate"]) for model in (before, after)]
    assert f"drafts of 4 tokens: {drafted[0]:.2f} tokens a forward of the teacher before, {drafted[1]:.2f} after" in out
    lines = out.splitlines()
    assert " ".join(lines[0].split()) == "model CE perplexity top-1 KL(T‖S) KL(S‖T) agree accept ECE"
    assert [line.split()[0] for line in lines[1:4]] == ["before", "after", "teacher"]
    assert max(map(len, lines[:4])) <= 80
    assert f"{after['ce']:.4f}" in lines[2]
    assert "run, on " in out
    assert "after: 15 of 15 rows" in err


def test_json_is_what_the_file_holds_and_nothing_else_is_on_stdout(trained, kdtrain):  # noqa: F811
    code, out, _ = kdtrain("evaluate", "run", "--json")
    assert code == 0
    assert json.loads(out) == found_in(trained / "run")


def test_the_gap_closed_is_the_share_of_the_teachers_lead(trained, kdtrain):  # noqa: F811
    """With the trained student as the teacher of the one before."""
    shutil.copytree(trained / "run", trained / "better")
    _, out, _ = kdtrain("evaluate", "run", "rlhf.teacher_model=./better", "--checkpoint", "2")
    found = found_in(trained / "run")
    ce = {name: model["ce"] for name, model in found["models"].items()}
    assert ce["teacher"] < ce["after"] < ce["before"]
    assert found["gap_closed"] == pytest.approx((ce["before"] - ce["after"]) / (ce["before"] - ce["teacher"]))
    low, high = found["intervals"]["gap_closed"]
    assert low < found["gap_closed"] < high
    assert f"Gap to the teacher closed in CE: {found['gap_closed']:.1%}" in out


def test_the_config_of_a_run_stands_for_its_folder(trained, kdtrain):  # noqa: F811
    _, by_folder, _ = kdtrain("evaluate", "run", "--json")
    code, by_config, _ = kdtrain("evaluate", "config.yaml", "--json")
    assert code == 0
    assert by_config == by_folder


def test_a_run_that_was_moved_is_evaluated_where_it_is(trained, kdtrain):  # noqa: F811
    (trained / "runs").mkdir()
    shutil.move(trained / "run", trained / "runs" / "first")
    code, _, err = kdtrain("evaluate", "runs/first")
    assert code == 0, err
    assert found_in(trained / "runs" / "first")["run"] == str(trained / "runs" / "first")
    assert not (trained / "run").exists()


def test_options_win_and_their_paths_are_relative_to_where_one_stands(trained, kdtrain, monkeypatch):  # noqa: F811
    (trained / "elsewhere").mkdir()
    write_rows(trained / "elsewhere" / "few.jsonl", HELD_OUT[:3])
    monkeypatch.chdir(trained / "elsewhere")
    code, _, err = kdtrain("evaluate", "../run", "data.eval=few.jsonl")
    assert code == 0, err
    assert found_in(trained / "run")["rows"] == 3


@pytest.mark.parametrize("named", ["2", "run/checkpoint-2"])
def test_a_checkpoint_is_named_by_its_step_or_its_path(trained, kdtrain, named):  # noqa: F811
    code, out, err = kdtrain("evaluate", "run", "--checkpoint", named)
    assert code == 0, err
    found = found_in(trained / "run")
    assert found["checkpoint"] == "checkpoint-2"
    assert "checkpoint-2 of run, on" in out
    _, end, err = kdtrain("evaluate", "run", "--json")
    assert "evaluation.json had the figures of checkpoint-2, and has those of the saved model now." in err
    assert found["models"]["before"] == json.loads(end)["models"]["before"]
    assert found["models"]["after"]["ce"] != json.loads(end)["models"]["after"]["ce"]


def test_an_adapter_is_evaluated_on_its_base(trained, kdtrain):  # noqa: F811
    options = ("tuner.train_type=lora", "training.output_dir=lora", "--quiet")
    assert kdtrain("fit", "config.yaml", *options)[0] == 0
    code, _, err = kdtrain("evaluate", "lora")
    assert code == 0, err
    found = found_in(trained / "lora")["models"]
    assert found["after"]["ce"] == pytest.approx(last_evaluation(trained / "lora")["eval_sft_loss"] / 0.3, rel=1e-6)
    assert kdtrain("evaluate", "run")[0] == 0
    assert found["before"] == found_in(trained / "run")["models"]["before"]


def test_without_a_kd_weight_no_teacher_is_loaded_and_before_stands_beside_after(trained, kdtrain, monkeypatch):  # noqa: F811
    options = ("rlhf.llm_kd_weight=0", "training.output_dir=ce", "--quiet")
    assert kdtrain("fit", "config.yaml", *options)[0] == 0
    monkeypatch.setattr("kdtrain.runs.build.build_teacher", lambda *args, **kwargs: pytest.fail("a teacher was loaded"))
    code, out, err = kdtrain("evaluate", "ce")
    assert code == 0, err
    found = found_in(trained / "ce")
    assert found["models"]["teacher"] is found["gap_closed"] is None
    assert found["models"]["after"]["forward_kl"] is found["models"]["after"]["agreement"] is None
    assert found["models"]["after"]["ce"] == pytest.approx(last_evaluation(trained / "ce")["eval_sft_loss"], rel=1e-6)
    assert "–" in out
    assert "Gap" not in out


def test_before_is_the_student_that_the_config_names(trained, kdtrain):  # noqa: F811
    kdtrain("evaluate", "run")
    before = found_in(trained / "run")["models"]["before"]
    student, tokenizer = AutoModelForCausalLM.from_pretrained(trained / "student"), tiny.make_tokenizer()
    total, count = 0.0, 0
    for row in HELD_OUT:
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, mask = encoded["input_ids"][0], torch.as_tensor(encoded["assistant_masks"]).flatten()[1:].bool()
        with torch.no_grad():
            log_p = torch.log_softmax(student(input_ids=ids[None]).logits[0, :-1].double(), -1)
        total -= float(log_p.gather(1, ids[1:, None])[:, 0][mask].sum())
        count += int(mask.sum())
    assert before["tokens"] == count
    assert before["ce"] == pytest.approx(total / count, rel=1e-5)


def test_it_leaves_the_run_as_it_was_but_for_its_file_and_the_report(trained, kdtrain):  # noqa: F811
    def contents():
        renewed = ("evaluation.json", "report.html", "report.json", "report.png")
        files = (path for path in (trained / "run").rglob("*") if path.is_file() and path.name not in renewed)
        return {path: path.read_bytes() for path in files}

    before = contents()
    assert kdtrain("evaluate", "run")[0] == 0
    assert contents() == before
    assert not list((trained / "run").glob(".*"))  # no temporary file either


def test_of_drawn_or_missing_figures_json_has_null(trained, kdtrain):  # noqa: F811
    """A perplexity that no float can hold."""
    head = AutoModelForCausalLM.from_pretrained(trained / "run")
    with torch.no_grad():
        head.model.norm.weight.mul_(1e4)
    head.save_pretrained(trained / "run")
    code, out, err = kdtrain("evaluate", "run")
    assert code == 0, err
    after = found_in(trained / "run")["models"]["after"]
    assert after["ce"] > 800
    assert after["perplexity"] is None
    assert "–" in out


@pytest.mark.slow
def test_runs_of_fsdp_and_zero_are_evaluated_whole(trained, kdtrain):  # noqa: F811
    """By what they have saved at their end: nothing of their sharding is set up again."""
    _, expected, _ = kdtrain("evaluate", "run", "--json")
    file = trained / "run" / "run_config.json"
    config = json.loads(file.read_text())
    for sharding in (
        {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}},
        {"deepspeed": {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}},
    ):
        file.write_text(json.dumps({**config, "training": {**config["training"], **sharding}}))
        code, out, err = kdtrain("evaluate", "run", "--json")
        assert code == 0, err
        assert json.loads(out) == json.loads(expected)


# ---- answers side by side --------------------------------------------------------------------------------------------


def double_kl(first, second, tokens, start):
    """KL(first‖second) in float64 at each token from `start` on, in nats."""
    with torch.no_grad():
        p, q = (
            torch.log_softmax(model.double()(torch.tensor([tokens])).logits[0, start - 1 : -1], -1)
            for model in (first, second)
        )
    return (p.exp() * (p - q)).sum(-1).tolist()


def test_samples_are_greedy_answers_with_their_divergences_token_by_token(trained, kdtrain):  # noqa: F811
    code, _, err = kdtrain("evaluate", "run", "rlhf.max_new_tokens=6")
    assert code == 0, err
    samples, tokenizer = found_in(trained / "run")["samples"], tiny.make_tokenizer()
    folders = {"before": "student", "after": "run", "teacher": "teacher"}
    loaded = {name: AutoModelForCausalLM.from_pretrained(trained / folder) for name, folder in folders.items()}
    assert [one["where"].rsplit(":", 1)[1] for one in samples] == ["1", "2", "4", "6", "8", "10", "12", "14"]
    for one in samples:
        row = HELD_OUT[int(one["where"].rsplit(":", 1)[1]) - 1]
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
        assert one["prompt"] == tokenizer.decode(prompt)
        assert one["reference"].startswith(row["messages"][1]["content"] + "<|im_end|>")
        written = {
            name: model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
            for name, model in loaded.items()
        }
        assert one["answers"] == {name: tokenizer.decode(ids) for name, ids in written.items()}
        reference = tokenizer(one["reference"])["input_ids"]
        for key, ids, pair in (
            ("reference_tokens", reference, ("teacher", "after")),
            ("after_tokens", written["after"], ("after", "teacher")),
        ):
            kl = double_kl(*(loaded[name] for name in pair), [*prompt, *ids], len(prompt))
            assert "".join(text for text, _ in one[key]) == tokenizer.decode(ids)
            assert [value for _, value in one[key]] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        for model in loaded.values():
            model.float()


def test_rows_without_a_prompt_have_no_samples(trained, kdtrain):  # noqa: F811
    """Plain text: there is nothing to answer."""
    write_rows(trained / "text.jsonl", [{"text": "One and one is two"}, {"text": "The path of the file"}])
    code, _, err = kdtrain("evaluate", "run", "data.eval=text.jsonl")
    assert code == 0, err
    found = found_in(trained / "run")
    assert found["samples"] == []
    assert found["models"]["after"]["accuracy"] is None
    assert found["models"]["after"]["ce"] > 0


def test_calibration_bins_and_intervals_are_in_the_file(trained, kdtrain):  # noqa: F811
    assert kdtrain("evaluate", "run")[0] == 0
    found = found_in(trained / "run")
    for name, model in found["models"].items():
        bins = model["calibration"]
        assert len(bins) == 15
        assert sum(one["count"] for one in bins) == model["tokens"]
        full = [one for one in bins if one["count"]]
        gaps = [one["count"] * abs(one["accuracy"] - one["confidence"]) for one in full]
        assert sum(gaps) / model["tokens"] == pytest.approx(model["ece"])
        assert all(one["accuracy"] is one["confidence"] is None for one in bins if not one["count"])
        intervals = found["intervals"]["models"][name]
        for figure in ("ce", "perplexity"):
            low, high = intervals[figure]
            assert low < model[figure] < high
    assert found["intervals"]["models"]["after"].keys() == {
        "ce", "perplexity", "token_accuracy", "forward_kl", "reverse_kl", "agreement", "acceptance_rate"
    }  # fmt: skip


def test_rows_with_an_answer_are_checked_as_a_whole_or_by_a_regular_expression(trained, kdtrain):  # noqa: F811
    """Of what the student writes the first character is the answer of the odd rows, by construction."""
    assert kdtrain("evaluate", "run", "rlhf.max_new_tokens=6")[0] == 0
    assert found_in(trained / "run")["models"]["after"]["accuracy"] is None
    answers = {
        int(one["where"].rsplit(":", 1)[1]): one["answers"]["after"] for one in found_in(trained / "run")["samples"]
    }
    rows = [HELD_OUT[line - 1] for line in answers]
    whole = [text if i % 4 == 0 else "no" for i, text in enumerate(answers.values())]
    write_rows(trained / "answered.jsonl", [{**row, "answer": one} for row, one in zip(rows, whole, strict=True)])
    code, out, err = kdtrain("evaluate", "run", "rlhf.max_new_tokens=6", "data.eval=answered.jsonl")
    assert code == 0, err
    found = found_in(trained / "run")
    assert found["models"]["after"]["accuracy"] == 2 / 8
    low, high = found["intervals"]["models"]["after"]["accuracy"]
    assert low <= 2 / 8 <= high
    assert out.splitlines()[0].split()[-1] == "answers"
    first = [f"say {text[0]}" if i % 2 else "say ~" for i, text in enumerate(answers.values())]
    write_rows(trained / "answered.jsonl", [{**row, "answer": one} for row, one in zip(rows, first, strict=True)])
    options = ("rlhf.max_new_tokens=6", "data.eval=answered.jsonl", "rlhf.select_regex='^(?:say )?(.)'")
    code, out, err = kdtrain("evaluate", "run", *options)
    assert code == 0, err
    assert found_in(trained / "run")["models"]["after"]["accuracy"] == 4 / 8
    assert "select_regex" not in err


# ---- what it refuses -------------------------------------------------------------------------------------------------

REFUSED = {
    "nothing there": (["nothere"], 2, "nothere: there is no such file or folder"),
    "a model that is no run": (["student"], 2, "student is no run folder: it has no run_config.json"),
    "a config whose run is not there": (["config.yaml", "training.output_dir=no"], 2, "holds no run: train it first"),
    "a step that is not there": (["run", "--checkpoint", "3"], 6, "--checkpoint 4 (there are 2, 4)"),
    "a path that is not there": (["run", "--checkpoint", "no/where"], 6, "--checkpoint no/where: there is no such"),
    "a path without weights": (["run", "--checkpoint", "empty"], 6, "has neither model.safetensors nor"),
    "an unknown key": (["run", "rlhf.betta=1"], 2, "did you mean rlhf.beta?"),
    "rows that are not there": (["run", "data.eval=no.jsonl"], 2, "no such file or folder: "),
    "a student that is not there": (["run", "model.model=./no"], 2, "no such folder: "),
    "a folder that is no model": (["run", "model.model=./empty"], 2, "not a model folder, it has no config.json"),
    "a teacher that is not there": (["run", "rlhf.teacher_model=./no"], 2, "no such folder: "),
    "another that is no run": (["run", "--against", "student"], 2, "student is no run folder"),
    "runs that do not pair up": (["run", "second", "--against", "second"], 2, "runs are compared in pairs"),
    "runs without others": (["run", "second"], 2, "2 runs and 0 to compare them with (--against)"),
    "a run that is named twice": (["run", "run", "--against", "second", "--against", "third"], 2, "is named twice"),
    "a checkpoint's path for two": (
        ["run", "second", "--against", "third", "--checkpoint", "run/checkpoint-2"], 2, "--checkpoint PATH is of one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_get_their_exit_code_and_a_way_out(trained, kdtrain, mistake):  # noqa: F811
    arguments, code, words = REFUSED[mistake]
    (trained / "empty").mkdir()
    for name in ("second", "third"):
        shutil.copytree(trained / "run", trained / name)
    found, out, err = kdtrain("evaluate", *arguments)
    assert (found, out) == (code, ""), err
    assert words in err
    assert "Traceback" not in err
    assert not (trained / "run" / "evaluation.json").exists()


def test_a_run_without_evaluation_rows_says_how_to_name_some(trained, kdtrain):  # noqa: F811
    change(trained, data={"eval": None}, training={"eval_strategy": "no", "output_dir": "without"})
    assert kdtrain("fit", "config.yaml", "--quiet")[0] == 0
    code, _, err = kdtrain("evaluate", "without")
    assert code == 2
    assert "kdtrain evaluate without data.eval=eval.jsonl" in err
    assert kdtrain("evaluate", "without", "data.eval=eval.jsonl")[0] == 0


def test_a_run_that_did_not_come_to_its_end_offers_its_checkpoints(trained, kdtrain):  # noqa: F811
    (trained / "run" / "model.safetensors").unlink()
    code, _, err = kdtrain("evaluate", "run")
    assert code == 2
    assert "has no trained model" in err
    assert "--checkpoint 4 (there are 2, 4)" in err
    assert kdtrain("evaluate", "run", "--checkpoint", "4")[0] == 0


def test_weights_that_are_no_numbers_end_it_with_5(trained, kdtrain):  # noqa: F811
    broken = AutoModelForCausalLM.from_pretrained(trained / "run")
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    broken.save_pretrained(trained / "run")
    code, _, err = kdtrain("evaluate", "run")
    assert code == 5
    assert "kdtrain: after: The model gives no number for a token of row 0:" in err
    assert not (trained / "run" / "evaluation.json").exists()


def test_a_disk_that_is_full_ends_it_with_6_and_the_old_file_stays(trained, kdtrain, monkeypatch):  # noqa: F811
    kdtrain("evaluate", "run")
    before = found_in(trained / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = kdtrain("evaluate", "run", "--checkpoint", "2")
    assert code == 6
    assert "evaluation.json failed: No space left on device" in err
    assert found_in(trained / "run") == before


@pytest.mark.slow
def test_figures_of_a_model_that_is_written_over_are_not_kept(trained, kdtrain):  # noqa: F811
    file, resume = trained / "run" / "evaluation.json", ("fit", "config.yaml", "--resume", "auto", "--quiet")
    assert kdtrain("evaluate", "run")[0] == 0
    assert kdtrain(*resume)[0] == 0  # nothing is left to train: the model is the same
    assert file.exists()
    code, _, err = kdtrain(*resume, "training.max_steps=5")
    assert code == 0
    assert "evaluation.json was of the model before: evaluate again" in err
    assert not file.exists()
    kdtrain("evaluate", "run", "--checkpoint", "4")
    assert kdtrain(*resume, "training.max_steps=6")[0] == 0
    assert file.exists()


# ---- against another run ---------------------------------------------------------------------------------------------


@pytest.fixture
def ce_run(trained, kdtrain):  # noqa: F811
    """A run in `ce` beside the one in `run`, trained less."""
    options = ("rlhf.llm_kd_weight=0", "training.max_steps=1", "training.eval_steps=1", "training.output_dir=ce")
    assert kdtrain("fit", "config.yaml", *options, "--quiet")[0] == 0
    return trained


def test_the_verdict_is_on_the_same_rows_with_its_interval(ce_run, kdtrain):  # noqa: F811
    code, out, err = kdtrain("evaluate", "run", "--against", "ce")
    assert code == 0, err
    found = found_in(ce_run / "run")
    ce, (pair,) = {name: model["ce"] for name, model in found["models"].items()}, found["against"]["pairs"]
    assert found["against"]["difference"] == pytest.approx(ce["after"] - ce["against"], rel=1e-9)
    assert (pair["ce"], pair["ce_against"]) == pytest.approx((ce["after"], ce["against"]))
    assert (pair["run"], pair["against"]) == (str(ce_run / "run"), str(ce_run / "ce"))
    assert ce["against"] == pytest.approx(last_evaluation(ce_run / "ce")["eval_sft_loss"], rel=1e-6)
    low, high = found["intervals"]["difference"]
    assert low < found["against"]["difference"] < high
    assert found["verdict"] == ("BEATS" if high < 0 else "NO BETTER" if low > -0.01 * ce["against"] else "INCONCLUSIVE")
    assert f"Verdict: {found['verdict']}" in out
    assert "on 15 rows (paired bootstrap over rows, which knows nothing of other seeds)" in out
    assert "against ce" in out
    assert "warning" not in err


@pytest.mark.slow
def test_two_ways_round_have_opposite_differences(ce_run, kdtrain):  # noqa: F811
    kdtrain("evaluate", "run", "--against", "ce")
    kdtrain("evaluate", "ce", "--against", "run")
    first, second = found_in(ce_run / "run"), found_in(ce_run / "ce")
    assert first["against"]["difference"] == pytest.approx(-second["against"]["difference"], rel=1e-9)
    assert second["models"]["teacher"] is None


def test_rows_that_either_run_was_trained_on_are_left_out_and_counted(ce_run, kdtrain):  # noqa: F811
    """The one that is compared with has read rows of its own."""
    write_rows(ce_run / "more.jsonl", [*tiny.CHATS, HELD_OUT[0]])
    options = ("data.train=more.jsonl", "training.max_steps=1", "training.eval_steps=1", "training.output_dir=more")
    assert kdtrain("fit", "config.yaml", *options, "--quiet")[0] == 0
    write_rows(ce_run / "mixed.jsonl", [*HELD_OUT, *tiny.CHATS[:2]])
    code, out, err = kdtrain("evaluate", "run", "data.eval=mixed.jsonl", "--against", "more")
    assert code == 0, err
    found = found_in(ce_run / "run")
    repeats = HELD_OUT.count(HELD_OUT[0])
    assert found["rows"] == 17
    assert found["against"]["rows"] == 15 - repeats
    assert found["against"]["repeated_in_train"] == 2 + repeats
    assert f"{2 + repeats} of 17 rows are also in data.train" in err
    assert f"on {15 - repeats} rows, {2 + repeats} left out that are in data.train" in out
    write_rows(ce_run / "clean.jsonl", [row for row in HELD_OUT if row != HELD_OUT[0]])
    kdtrain("evaluate", "run", "data.eval=clean.jsonl", "--against", "more")
    clean = found_in(ce_run / "run")
    assert clean["against"]["difference"] == pytest.approx(found["against"]["difference"], rel=1e-6)
    assert clean["intervals"]["difference"] == pytest.approx(found["intervals"]["difference"], rel=1e-4)


@pytest.mark.slow
def test_rows_that_only_another_seed_has_drawn_are_left_out_too(trained, kdtrain):  # noqa: F811
    """Of half the rows each seed draws others, and the verdict is over those that no run has read."""
    options = ("data.train=[{path: train.jsonl, weight: 0.5}]", "custom.sample_limit=100", "training.max_steps=1")
    options += ("training.eval_steps=1", "training.per_device_train_batch_size=1", "--quiet")
    write_rows(trained / "train.jsonl", tiny.CHATS)
    names = [f"{kind}-{seed}" for kind in ("kd", "ce") for seed in (1, 2)]
    for name in names:
        own = (f"training.seed={name[-1]}", f"training.output_dir={name}")
        assert kdtrain("fit", "config.yaml", *options, *own)[0] == 0
    write_rows(trained / "mixed.jsonl", [*HELD_OUT, *tiny.CHATS])

    def left_out(*runs):
        code, _, err = kdtrain("evaluate", *runs, "data.eval=mixed.jsonl")
        assert code == 0, err
        return found_in(trained / runs[0])["against"]["repeated_in_train"]

    one, two = left_out("kd-1", "--against", "ce-1"), left_out("kd-2", "--against", "ce-2")
    both = left_out("kd-1", "kd-2", "--against", "ce-1", "--against", "ce-2")
    assert one > 0
    assert max(one, two) < both <= one + two


def test_with_nothing_but_training_rows_there_is_no_verdict(ce_run, kdtrain):  # noqa: F811
    code, _, err = kdtrain("evaluate", "run", "data.eval=train.jsonl", "--against", "ce")
    assert code == 3
    assert "Every row of data.eval is also in data.train" in err


@pytest.mark.slow
def test_a_share_of_the_training_rows_that_was_held_out_is_not_repeated(trained, kdtrain):  # noqa: F811
    write_rows(trained / "train.jsonl", [*tiny.CHATS, *HELD_OUT])
    for name in ("one", "two"):
        options = ("data.eval=30%", "training.max_steps=1", "training.eval_steps=1", f"training.output_dir={name}")
        assert kdtrain("fit", "config.yaml", *options, "--quiet")[0] == 0
    code, _, err = kdtrain("evaluate", "one", "--against", "two")
    assert code == 0, err
    assert found_in(trained / "one")["against"]["repeated_in_train"] == 0


@pytest.mark.slow
def test_three_pairs_of_runs_are_compared_over_their_seeds(trained, kdtrain):  # noqa: F811
    names = [f"{kind}-{seed}" for kind in ("kd", "ce") for seed in (1, 2, 3)]
    for name in names:
        kind, seed = name.split("-")
        options = ["training.max_steps=2", "training.eval_steps=2", f"training.seed={seed}"]
        options += ["rlhf.llm_kd_weight=0"] if kind == "ce" else ["training.learning_rate=0.02"]
        options += ["training.train_sampling_strategy=random", f"training.output_dir={name}", "--quiet"]
        assert kdtrain("fit", "config.yaml", *options)[0] == 0
    others = [part for name in names[3:] for part in ("--against", name)]
    code, out, err = kdtrain("evaluate", *names[:3], *others)
    assert code == 0, err
    found = found_in(trained / "kd-1")
    pairs = found["against"]["pairs"]
    assert [(pair["run"][-4:], pair["against"][-4:], pair["seeds"]) for pair in pairs] == [
        (f"kd-{seed}", f"ce-{seed}", [seed, seed]) for seed in (1, 2, 3)
    ]
    for pair, name in zip(pairs, names, strict=False):
        assert pair["ce"] == pytest.approx(last_evaluation(trained / name)["eval_sft_loss"] / 0.3, rel=1e-6)
    d = torch.tensor([pair["ce"] - pair["ce_against"] for pair in pairs], dtype=torch.float64)
    half = 4.302653 * float(d.std()) / 3**0.5
    assert found["against"]["difference"] == pytest.approx(float(d.mean()))
    assert found["intervals"]["difference"] == pytest.approx([float(d.mean()) - half, float(d.mean()) + half], abs=1e-6)
    assert "Against 3 runs" in out
    assert "seed" not in err
    assert not (trained / "kd-2" / "evaluation.json").exists()
    code, out, err = kdtrain("evaluate", "kd-1", "kd-2", "--against", "ce-1", "--against", "ce-3")
    assert "Verdict: INCONCLUSIVE" in out
    assert "Pairs are runs of one seed, and these have 1 and 1, 2 and 3." in err


def test_pairs_of_one_seed_are_no_repetitions(trained, kdtrain):  # noqa: F811
    for name in ("two", "three", "four"):
        shutil.copytree(trained / "run", trained / name)
    code, _, err = kdtrain("evaluate", "run", "two", "--against", "three", "--against", "four")
    assert code == 0, err
    assert "Some of the pairs have the same training.seed (42, 42): they say nothing of other seeds" in err


def total_nats(model, tokenizer, rows=HELD_OUT):
    """What the answers cost a model in its own tokens, in float64, and how many bytes of text they have."""
    model, nats, size = model.double(), 0.0, 0
    for row in rows:
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor(encoded["input_ids"]), torch.as_tensor(encoded["assistant_masks"]).flatten()[1:].bool()
        with torch.no_grad():
            log_p = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
        nats -= float(log_p.gather(1, ids[1:, None])[:, 0][mask].sum())
        size += len(tokenizer.decode(ids[1:][mask], skip_special_tokens=True).encode())
    return nats, size


def save_with_other_tokens(folder):
    """A model of a smaller vocabulary, with its tokenizer."""
    tiny.save_model(tiny.make_qwen3(vocab_size=290, seed=7), tiny.make_tokenizer(290), folder)
    return AutoModelForCausalLM.from_pretrained(folder), tiny.make_tokenizer(290)


def test_a_run_with_another_tokenizer_is_compared_per_byte_of_the_same_text(ce_run, kdtrain):  # noqa: F811
    other, tokenizer = save_with_other_tokens(ce_run / "ce")
    code, out, err = kdtrain("evaluate", "run", "--against", "ce")
    assert code == 0, err
    found = found_in(ce_run / "run")
    nats, size = total_nats(other, tokenizer)
    own_nats, own_size = total_nats(AutoModelForCausalLM.from_pretrained(ce_run / "run"), tiny.make_tokenizer())
    assert size == own_size
    per_byte = {name: found["models"][name]["nats_per_byte"] for name in ("after", "against")}
    assert per_byte == {
        "after": pytest.approx(own_nats / size, rel=1e-5),
        "against": pytest.approx(nats / size, rel=1e-5),
    }
    assert found["models"]["against"]["forward_kl"] is None
    assert found["against"]["difference"] == pytest.approx((own_nats - nats) / size, rel=1e-5)
    assert found["against"]["unit"] == "nats per byte"
    low, high = found["intervals"]["difference"]
    assert low < found["against"]["difference"] < high
    assert "Against ce: nats per byte " in out
    assert "nats/byte" in out.splitlines()[0]
    assert max(map(len, out.splitlines()[:5])) <= 120


def test_a_teacher_with_another_tokenizer_has_a_gap_in_nats_per_byte(trained, kdtrain):  # noqa: F811
    teacher, tokenizer = save_with_other_tokens(trained / "foreign")
    code, out, err = kdtrain("evaluate", "run", "rlhf.teacher_model=./foreign")
    assert code == 0, err
    found, nats = found_in(trained / "run"), {}
    nats["teacher"], size = total_nats(teacher, tokenizer)
    for name, folder in (("before", "student"), ("after", "run")):
        nats[name] = total_nats(AutoModelForCausalLM.from_pretrained(trained / folder), tiny.make_tokenizer())[0]
    gap = (nats["before"] - nats["after"]) / (nats["before"] - nats["teacher"])
    assert found["models"]["teacher"]["nats_per_byte"] == pytest.approx(nats["teacher"] / size, rel=1e-5)
    assert found["gap_closed"] == (pytest.approx(gap, rel=1e-4) if nats["teacher"] < nats["before"] else None)
    assert found["models"]["after"]["forward_kl"] is found["models"]["teacher"]["forward_kl"] is None
    assert "Tokens of the teacher are others" in out


def test_rows_that_another_tokenizer_makes_too_long_are_named(ce_run, kdtrain):  # noqa: F811
    save_with_other_tokens(ce_run / "ce")
    longest = max(len(tiny.make_tokenizer().apply_chat_template(row["messages"])["input_ids"]) for row in HELD_OUT)
    options = (f"data.max_length={longest}", "data.on_overlength=drop")
    code, _, err = kdtrain("evaluate", "run", "--against", "ce", *options)
    assert code == 3
    assert "ce has another tokenizer, with which " in err
    assert "Raise data.max_length" in err


@pytest.mark.slow
def test_rows_that_are_cut_are_other_text_to_another_tokenizer_and_not_compared_per_byte(ce_run, kdtrain):  # noqa: F811
    save_with_other_tokens(ce_run / "ce")
    own, others = (
        max(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in HELD_OUT)
        for tokenizer in (tiny.make_tokenizer(), tiny.make_tokenizer(290))
    )
    assert own < others
    for longest in (own - 1, own):  # both are cut, or the other's rows alone
        options = (f"data.max_length={longest}", "data.on_overlength=truncate")
        code, _, err = kdtrain("evaluate", "run", "--against", "ce", *options)
        assert code == 3
        assert f"rows of data.eval are cut at data.max_length ({longest} tokens)" in err
    assert kdtrain("evaluate", "run", "--against", "ce", f"data.max_length={others}", options[1])[0] == 0


# ---- teachers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_teacher_on_a_server_gives_bounds_that_the_table_marks(trained, kdtrain, teacher, tokenizer):  # noqa: F811
    with StubServer(teacher, tokenizer=tokenizer) as server:
        served(trained, server)
        options = yaml.safe_load((trained / "config.yaml").read_text())["rlhf"]["teacher"]
        code, out, err = kdtrain("evaluate", "run", f"rlhf.teacher={json.dumps(options)}", "rlhf.teacher_model=null")
        assert code == 0, err
        found = found_in(trained / "run")
        # A failure in the middle: nothing is written over.
        server.on_request = lambda request: with_status(400) if request.path == "/v1/completions" else None
        code, _, err = kdtrain("evaluate", "run", f"rlhf.teacher={json.dumps(options)}", "rlhf.teacher_model=null")
        assert code in (3, 4), err
        assert found_in(trained / "run") == found
    assert kdtrain("evaluate", "run")[0] == 0
    full = found_in(trained / "run")
    for name in ("before", "after"):
        part, whole = found["models"][name], full["models"][name]
        assert part["bounds"] == {"forward_kl": "lower", "reverse_kl": "lower", "acceptance_rate": "upper"}
        assert part["forward_kl"] <= whole["forward_kl"] + 1e-6
        assert part["ce"] == pytest.approx(whole["ce"], rel=1e-6)
        assert part["agreement"] == pytest.approx(whole["agreement"])
    assert found["models"]["teacher"]["ce"] is found["gap_closed"] is None
    assert f"≥{found['models']['after']['forward_kl']:.4f}" in out
    assert "≥ and ≤ are bounds" in out


@pytest.mark.slow
def test_a_cache_of_hidden_states_gives_the_figures_of_the_teacher_itself(trained, kdtrain):  # noqa: F811
    assert kdtrain("cache", "config.yaml", "--out", "cache", "--mode", "hidden", "--quiet")[0] == 0
    assert kdtrain("evaluate", "run")[0] == 0
    expected, options = found_in(trained / "run"), ("rlhf.teacher.backend=cache", "rlhf.teacher.path=cache")
    code, _, err = kdtrain("evaluate", "run", *options)
    assert code == 0, err
    for name, model in found_in(trained / "run")["models"].items():
        assert {key: model[key] for key in NUMBERS} == pytest.approx(
            {key: expected["models"][name][key] for key in NUMBERS}, rel=1e-5
        )
    write_rows(trained / "others.jsonl", tiny.CHATS[:1] * 2 + [{"prompt": "What is", "completion": " the path"}])
    code, out, err = kdtrain("evaluate", "run", "data.eval=others.jsonl", *options)
    assert (code, out) == (3, "")
    assert "1 of 3 rows of data.eval have no targets there" in err
    assert "rlhf.teacher.backend=hf" in err


def test_of_drawn_tokens_only_what_needs_no_teacher_is_known(trained, kdtrain):  # noqa: F811
    options = ("--mode", "sample", "rlhf.beta=0", "--quiet")
    assert kdtrain("cache", "config.yaml", "--out", "cache", *options)[0] == 0
    options = ("rlhf.teacher.backend=cache", "rlhf.teacher.path=cache", "rlhf.beta=0")
    code, out, err = kdtrain("evaluate", "run", *options)
    assert code == 0, err
    after = found_in(trained / "run")["models"]["after"]
    assert after["ce"] is not None
    assert after["forward_kl"] is after["reverse_kl"] is after["agreement"] is after["acceptance_rate"] is None
    assert "of which only drawn tokens are known" in out


SELF = {
    "backend": "self",
    "prefix": [{"role": "system", "content": "The teacher predicts the path of the student."}],
}


@pytest.fixture
def prompted(trained, kdtrain):  # noqa: F811
    """A run that distils a system prompt into an adapter."""
    change(trained, rlhf={"teacher": SELF, "teacher_model": None, "max_new_tokens": 6, "sft_alpha": 0.0},
           training={"output_dir": "prompted", "max_steps": 12, "eval_steps": 12},
           data={"max_length": 128})  # fmt: skip
    config = yaml.safe_load((trained / "config.yaml").read_text())
    (trained / "config.yaml").write_text(yaml.safe_dump({**config, "tuner": {"train_type": "lora", "lora_rank": 8}}))
    code, _, err = kdtrain("fit", "config.yaml", "--quiet")
    assert code == 0, err
    return trained


def test_what_is_internalised_is_measured_on_the_prompted_teachers_own_answers(prompted, kdtrain):  # noqa: F811
    code, out, err = kdtrain("evaluate", "prompted")
    assert code == 0, err
    found, tokenizer = found_in(prompted / "prompted"), tiny.make_tokenizer()
    before = AutoModelForCausalLM.from_pretrained(prompted / "student").eval()
    base = AutoModelForCausalLM.from_pretrained(prompted / "student")
    after = PeftModel.from_pretrained(base, prompted / "prompted").eval()
    sums, tokens = [0.0, 0.0], 0
    for row in HELD_OUT:
        own, other = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            for messages in (row["messages"][:1], [*SELF["prefix"], *row["messages"][:1]])
        )
        answer = before.generate(torch.tensor([other]), max_new_tokens=6, do_sample=False)[0, len(other) :].tolist()
        with torch.no_grad():
            of_teacher, *of_students = (
                torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double(), -1)
                for model, prompt in ((before, other), (before, own), (after, own))
            )
        for i, of_student in enumerate(of_students):
            sums[i] += float((of_teacher.exp() * (of_teacher - of_student)).sum())
        tokens += len(answer)
    assert found["context"] == {
        "kl_before": pytest.approx(sums[0] / tokens, rel=1e-4),
        "kl_after": pytest.approx(sums[1] / tokens, rel=1e-4),
        "prompts": 15,
        "tokens": tokens,
    }
    assert found["internalised"] == pytest.approx(1 - sums[1] / sums[0], rel=1e-4)
    low, high = found["intervals"]["internalised"]
    assert low < found["internalised"] < high
    assert f"Internalised of what the teacher alone reads: {found['internalised']:.1%}" in out
    assert "the teacher's answers" in err


@pytest.mark.slow
def test_a_prompted_teacher_on_a_server_gives_the_same_share(prompted, kdtrain, tokenizer):  # noqa: F811
    """The student's weights behind a server, with a prefix that is the server's to read."""
    kdtrain("evaluate", "prompted")
    expected = found_in(prompted / "prompted")
    with StubServer(AutoModelForCausalLM.from_pretrained(prompted / "student"), tokenizer=tokenizer) as server:
        options = {
            "backend": "vllm",
            "base_url": server.url,
            "model": "teacher",
            "top_k": 320,
            "prefix": SELF["prefix"],
        }
        code, _, err = kdtrain("evaluate", "prompted", f"rlhf.teacher={json.dumps(options)}")
    assert code == 0, err
    found = found_in(prompted / "prompted")
    assert found["internalised"] == pytest.approx(expected["internalised"], rel=1e-3)
    assert found["context"] == pytest.approx(expected["context"], rel=1e-3)


def test_answers_are_kept_in_the_run_folder_and_not_written_twice(prompted, kdtrain, monkeypatch):  # noqa: F811
    _, first, _ = kdtrain("evaluate", "prompted", "--json")
    kept = list((prompted / "prompted" / "teacher_answers").glob("*/rank0.jsonl"))
    assert len(kept) == 1
    assert len(kept[0].read_text().splitlines()) == len({json.dumps(row["messages"][:1]) for row in HELD_OUT})

    class Silent(LocalWriter):
        def write(self, *_):
            pytest.fail("written again")

    monkeypatch.setattr("kdtrain.runs.teacher_answers.LocalWriter", Silent)
    code, second, err = kdtrain("evaluate", "prompted", "--json")
    assert code == 0, err
    assert second == first


def test_a_student_that_has_learnt_nothing_has_internalised_nothing(prompted, kdtrain):  # noqa: F811
    (prompted / "prompted" / "adapter_model.safetensors").unlink()
    shutil.copytree(prompted / "student", prompted / "prompted", dirs_exist_ok=True)
    (prompted / "prompted" / "adapter_config.json").unlink()
    assert kdtrain("evaluate", "prompted")[0] == 0
    found = found_in(prompted / "prompted")
    assert found["internalised"] == pytest.approx(0, abs=1e-9)
    assert found["models"]["before"] == found["models"]["after"]


def test_what_is_measured_on_the_teachers_answers_has_a_name_of_its_own(prompted, kdtrain):  # noqa: F811
    _, _, err = kdtrain("evaluate", "prompted")
    for name in ("before", "after"):
        assert f"{name}: " in err
        assert f"{name}, on the teacher's answers: " in err


def test_a_prefix_that_moves_nothing_leaves_nothing_to_internalise(prompted, kdtrain, monkeypatch):  # noqa: F811
    monkeypatch.setattr("kdtrain.runs.internalised.NOTHING_TO_DISTIL", 1e3)
    _, out, _ = kdtrain("evaluate", "prompted")
    found = found_in(prompted / "prompted")
    assert found["internalised"] is None
    assert found["context"]["kl_before"] > 0
    assert "there was nothing to distil" in out


def test_answers_of_the_teacher_are_rows_to_evaluate_on_too(trained, kdtrain):  # noqa: F811
    """With prompts alone, as a run that distils answers has them."""
    write_rows(trained / "prompts.jsonl", [{"messages": row["messages"][:1]} for row in HELD_OUT[:4]])
    source = "data.eval={path: prompts.jsonl, answers: teacher}"
    options = (source, "rlhf.max_new_tokens=5", "training.max_steps=1", "training.eval_steps=1", "--quiet")
    assert kdtrain("fit", "config.yaml", "training.output_dir=answers", *options)[0] == 0
    kept = {path: path.read_bytes() for path in (trained / "answers").rglob("rank0.jsonl")}
    code, _, err = kdtrain("evaluate", "answers")
    assert code == 0, err
    found = found_in(trained / "answers")
    assert found["rows"] == 4
    assert found["models"]["after"]["ce"] == pytest.approx(
        last_evaluation(trained / "answers")["eval_sft_loss"] / 0.3, rel=1e-6
    )
    assert {path: path.read_bytes() for path in (trained / "answers").rglob("rank0.jsonl")} == kept  # the run's own


# ---- images ----------------------------------------------------------------------------------------------------------


def test_rows_with_images_are_evaluated_as_in_training(models, tmp_path):  # noqa: F811
    result, records = run(
        models, tmp_path, data__eval=str(models / "train.jsonl"), training__eval_strategy="steps",
        training__eval_steps=4, rlhf__beta=0.0, rlhf__sft_alpha=1.0, custom__visual_kd__enabled=False,
        training__per_device_eval_batch_size=3, rlhf__max_new_tokens=8,
    )  # fmt: skip
    reporter = Quiet()
    found = evaluate([open_run(result.run_dir)], [], reporter)
    after, logged = found.models["after"], records[-1]
    assert after.ce == pytest.approx(logged["eval_sft_loss"], rel=1e-5)
    assert after.forward_kl == pytest.approx(logged["eval_llm_kd_loss"], rel=1e-4)
    assert ("after", 8, 8) in reporter.measured
    # What the images help, beside the same rows with pictures of one colour, the mean of each.
    lines = [line + "\n" for line in (models / "train.jsonl").read_text().splitlines() if "images" in line]
    means = {}
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        picture = Image.open(models / "pictures" / f"{i}.png").convert("RGB")
        colour = np.asarray(picture, dtype=np.float64).reshape(-1, 3).mean(0).round().astype(int)
        Image.new("RGB", picture.size, tuple(colour.tolist())).save(tmp_path / "pictures" / f"{i}.png")
    for name, folder in (("seen", models), ("blanked", tmp_path)):
        (folder / f"{name}.jsonl").write_text("".join(lines))
        means[name] = evaluate(
            [open_run(result.run_dir, [f"data.eval={folder / f'{name}.jsonl'}"])], [], Quiet()
        ).models
    for name, model in found.models.items():
        assert model.visual_reliance == pytest.approx(means["blanked"][name].ce - means["seen"][name].ce, rel=1e-3)
        assert abs(model.visual_reliance) > 1e-5
        assert means["blanked"][name].visual_reliance == pytest.approx(0, abs=1e-7)
    low, high = found.intervals["models"]["after"]["visual_reliance"]
    assert low <= after.visual_reliance <= high


@pytest.mark.slow
def test_several_processes_find_what_one_finds(trained):
    run_dir, file = trained / "run", trained / "run" / "evaluation.json"
    evaluate([open_run(run_dir)], [], Quiet())
    alone = file.read_text()
    file.unlink()
    tiny.run_ranks(evaluated_on_rank, 2, str(run_dir))
    found, expected = json.loads(file.read_text()), json.loads(alone)
    for name, model in expected["models"].items():
        own = {key: found["models"][name][key] for key in NUMBERS}
        assert own == pytest.approx({key: model[key] for key in NUMBERS}, rel=1e-6), name
    for one, other in zip(found["samples"], expected["samples"], strict=True):
        assert (one["where"], one["answers"]) == (other["where"], other["answers"])
        assert [kl for _, kl in one["after_tokens"]] == pytest.approx([kl for _, kl in other["after_tokens"]], abs=1e-5)


def evaluated_on_rank(run_dir):
    evaluate([open_run(Path(run_dir))], [], Quiet())
