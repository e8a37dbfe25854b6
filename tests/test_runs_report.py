"""The report of a run: what the page says, that it loads nothing, and that any state of a run folder has one."""

import importlib.metadata
import json
import logging
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdtrain.data import BuildReport
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.runs.completions import SCHEMA
from kdtrain.runs.report import of_fit, png, write, write_report
from kdtrain.runs.report.changes import as_yaml, changes
from kdtrain.runs.report.charts import SIZE, charts_of_run
from kdtrain.runs.report.curves import MOST_POINTS, moving_mean, panels_of, thinned
from kdtrain.runs.report.record import read_runs
from kdtrain.runs.report.summary import duration

CONFIG = {
    "model": {"model": "org/student", "dtype": "auto"},
    "data": {"train": [{"path": "org/rows", "split": "train", "weight": 1.0}], "eval": [{"path": "org/held_out"}]},
    "rlhf": {"teacher_model": "org/teacher", "llm_kd_weight": 1.0, "sft_alpha": 0.3, "beta": 0.1, "divergence": "jsd"},
    "training": {"output_dir": "runs/x", "max_steps": 100, "learning_rate": 0.001},
}
FINISHED = {"state": "finished", "exit_code": 0, "message": "", "rank": 0, "time": 1.0}


def record(step, **more):
    return {"step": step, "loss": 2.0 / step, "llm_kd_loss": 1.5 / step, "sft_loss": 0.5 / step, **more}


def figures(ce, kl, **more):
    bins = [{"count": 0, "confidence": None, "accuracy": None}] * 13 + [
        {"count": 30, "confidence": 0.9, "accuracy": 0.8},
        {"count": 10, "confidence": 0.97, "accuracy": 1.0},
    ]
    named = {"ce": ce, "perplexity": math.exp(ce), "forward_kl": kl, "reverse_kl": kl, "agreement": 0.5, "ece": 0.02}
    return {**named, "tokens": 40, "calibration": bins, **more}


EVALUATION = {
    "rows": 1234,
    "models": {"before": figures(7.5, 2.5), "after": figures(5.25, 0.125), "teacher": figures(5.0, 0.0)},
    "gap_closed": 0.9,
    "verdict": "BEATS",
    "intervals": {"level": 0.95, "gap_closed": [0.85, 0.95], "difference": [-0.5, -0.3]},
    "against": {"difference": -0.4, "method": "bootstrap over rows", "rows": 1200, "pairs": [{"against": "a/ce"}]},
    "samples": [
        {
            "where": "held_out.jsonl:3",
            "prompt": "Which path?",
            "reference": "The next one.",
            "answers": {"before": "one one", "after": "The next.", "teacher": "The next one."},
            "reference_tokens": [["The", 0.01], [" next", 0.3], [" one", 2.5], [".", None]],
            "after_tokens": [["The", 0.0], [" next", 0.1], [".", 1.2]],
        }
    ],
}  # fmt: skip


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """Write a run folder, and return it."""
    monkeypatch.chdir(tmp_path)

    def make(name="run", *, records=(), tail="", status=FINISHED, config=CONFIG, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, content in (("run_config", config), ("status", status), *files.items()):
            (folder / f"{file}.json").write_text(json.dumps(content))
        (folder / "logging.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records) + tail)
        return folder

    return make


class Page(HTMLParser):
    """What a browser would see of a page: its elements, its text, and the addresses in it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self._hidden = [], [], [], 0
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attributes if name.startswith("on")], "a handler in the page"
        self._hidden += tag in ("style", "script")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)


def page_of(*folders):
    out = write_report(folders, folders[0].parent / "page.html")
    return Page(out.read_text(encoding="utf-8"))


# ---- what the page says ----------------------------------------------------------------------------------------------


def test_an_evaluated_run_has_its_verdict_in_three_sentences(run_folder):
    page = page_of(run_folder(records=[record(1), record(100, elapsed_s=3725.0)], evaluation=EVALUATION))
    assert "The run has finished 100 steps in 1 h 2 min." in page.text
    learnt = (
        "On 1,234 held-out rows the student's cross-entropy fell from 7.500 to 5.250 nats per token; the teacher's is "
        "5.000, so 90.0% of the gap is closed (95% interval 85.0% to 95.0%)."
    )
    assert learnt in page.text
    assert "Against ce: its cross-entropy is 0.400 nats per token lower" in page.text
    assert "(95% interval 0.300 to 0.500) on 1,200 rows" in page.text
    assert "BEATS" in page.text


def test_figures_of_a_checkpoint_and_of_other_tokens_are_called_so(run_folder):
    other = figures(9.0, None, agreement=None, reverse_kl=None)
    found = {**EVALUATION, "checkpoint": "checkpoint-50", "models": {**EVALUATION["models"], "teacher": other}}
    found["against"] = {**EVALUATION["against"], "unit": "nats per byte"}
    page = page_of(run_folder(records=[record(100)], evaluation=found))
    assert (
        "the cross-entropy of checkpoint-50 fell from 7.500 to 5.250 nats per token; the teacher's tokens" in page.text
    )
    assert "tokens are others, and 90.0% of the gap to it is closed, in nats per byte." in page.text
    assert "Against ce: its cross-entropy is 0.400 nats per byte lower" in page.text


def test_a_run_that_was_not_evaluated_says_which_command_does_it(run_folder):
    folder = run_folder("my run", records=[record(1), record(2)])
    assert "kdtrain evaluate 'my run' compares the student" in page_of(folder).text
    without_rows = {**CONFIG, "data": {**CONFIG["data"], "eval": None}}
    other = run_folder("other", records=[record(1)], config=without_rows)
    assert "kdtrain evaluate other data.eval=eval.jsonl" in page_of(other).text


STATES = {
    "died": ({"state": "running"}, "The run was killed at step 40 of 100; kdtrain fit "),
    "failed": ({"state": "failed", "message": "Out of memory."}, "The run failed at step 40 of 100: Out of memory."),
    "stopped": ({"state": "stopped", "message": "Stopped by SIGTERM."}, "Stopped by SIGTERM."),
    "without a status": ({}, "How the run ended is not known"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state_has_a_report(run_folder, state):
    status, said = STATES[state]
    page = page_of(run_folder(records=[record(1), record(40, remaining_s=90)], status=status))
    assert said in page.text
    assert page.tags.count("svg") > 2


def test_a_run_before_its_first_record_has_a_report(run_folder):
    folder = run_folder(status={"state": "running"})
    (folder / "logging.jsonl").unlink()
    assert "no record yet" in page_of(folder).text


def test_a_torn_last_line_is_left_out_and_counted(run_folder):
    page = page_of(run_folder(records=[record(1), record(2)], tail='{"step": 3, "lo\xff'))
    assert "1 line of logging.jsonl is torn" in page.text
    assert "2 steps" in page.text


def test_what_is_not_a_number_is_a_gap_and_a_note(run_folder):
    folder = run_folder(records=[record(1), {**record(2), "loss": None}, record(3)])
    assert "first at step 2" in page_of(folder).text
    (run,) = read_runs([folder])
    loss = charts_of_run(panels_of(run), run)[0].curves[0]
    assert loss.label == "loss"
    assert re.findall("[ML]", loss.path) == ["M", "M"]


def test_a_term_that_moves_less_than_a_twentieth_of_the_gradient_is_noted(run_folder):
    norms = {"grad_norm_llm_kd": 1.0, "grad_norm_sft": 0.04}
    at_evaluation = {f"eval_{name}": norm for name, norm in norms.items()}
    page = page_of(
        run_folder(records=[record(1, grad_norm_llm_kd=9.0), {"step": 2, "eval_loss": 1.0, **at_evaluation}])
    )
    assert "grad_norm_sft is 3.8% of the gradients of all terms" in page.text
    assert "grad_norm_llm_kd is" not in page.text
    assert "Gradient of each term L2 norm at the last hidden states grad_norm_llm_kd 1 " in page.text


def test_the_step_with_the_lowest_evaluation_loss_is_named_where_the_last_is_worse(run_folder):
    evaluations = [{"step": step, "eval_loss": loss} for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5))]
    assert "The lowest evaluation loss was 1, at step 20" in page_of(run_folder(records=evaluations)).text
    better = run_folder("better", records=[*evaluations[:2], {"step": 30, "eval_loss": 0.9}])
    assert "lowest evaluation loss" not in page_of(better).text


def test_the_terms_of_an_image_run_and_unknown_keys_are_drawn(run_folder):
    more = {"vision_kd_loss": 0.4, "vision_kd_loss_vit": 0.1, "vision_kd_loss_aligner": 0.3, "brand_new_key": 7.0}
    (run,) = read_runs([run_folder(records=[record(1, **more), record(2, **more)])])
    drawn = {panel.title: [curve.key for curve in panel.curves] for panel in panels_of(run)}
    assert "vision_kd_loss" in drawn["Loss and its terms"]
    assert drawn["Visual targets"] == ["vision_kd_loss_vit", "vision_kd_loss_aligner"]
    assert drawn["brand_new_key"] == ["brand_new_key"]


def test_only_changes_from_the_defaults_are_listed_with_the_default(run_folder):
    found = {change.path: (change.value, change.default) for change in changes(CONFIG)}
    assert found["rlhf.beta"] == ("0.1", "0.5")
    assert found["data.train"] == ("org/rows", "")
    assert "rlhf.llm_kd_weight" not in found
    assert "model.dtype" not in found
    assert "beta: 0.1" in as_yaml(CONFIG)


def test_results_of_tasks_are_a_table_each(run_folder):
    tasks = {"before": {"gsm<k>": {"exact_match": 0.125}}, "teacher": {"gsm<k>": {"exact_match": 0.5, "f1": 0.25}}}
    page = page_of(run_folder(records=[record(1)], evaluation={**EVALUATION, "tasks": tasks}))
    assert "lm-eval, gsm<k> exact_match f1 student before 0.1250 – teacher 0.5000 0.2500" in page.text


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_samples_are_side_by_side_with_their_tokens_shaded(run_folder):
    folder = run_folder(records=[record(1)], evaluation=EVALUATION)
    html = write_report([folder], folder / "report.html").read_text(encoding="utf-8")
    whose = re.findall("<h4>([a-z ]+)</h4>", html)
    assert whose == ["in the data", "student before", "student after", "teacher"]
    assert '<span title="0.01">The</span><span class="k2" title="0.30"> next</span>' in html
    assert '<span class="k5" title="2.50"> one</span>.' in html  # of the last token nothing is known


def completion(step, text, ids, kls):
    fixed = {"row": "0:1", "sample": 0, "written_by": "student", "stop_reason": "stop", "selected": True, "exact": True}
    known = [kl for kl in kls if kl is not None]
    mean = sum(known) / len(known) if known else None
    own = {"step": step, "prompt": "Q <|x|>", "completion": text, "tokens": len(ids), "reverse_kl": mean}
    return {**fixed, **own, "token_ids": ids, "token_reverse_kl": kls}


def write_completions(folder, *steps):
    with pq.ParquetWriter(folder / "completions.parquet", SCHEMA) as writer:
        for rows in steps:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def test_answers_of_the_first_and_last_logged_step_are_shaded_by_token(run_folder, tokenizer):
    folder = run_folder(records=[record(1)])
    tokenizer.save_pretrained(folder)
    ids = tokenizer("Grüße, 你好", add_special_tokens=False)["input_ids"]
    answers = [completion(step, "Grüße, 你好", ids, [0.5] * len(ids)) for step in (1, 50, 100)]
    write_completions(folder, *[[one] for one in answers])
    page = page_of(folder)
    assert "step 1" in page.text
    assert "step 100" in page.text
    assert "step 50" not in page.text
    tokens = "".join(page.words)
    assert "Grüße, 你好" in tokens  # characters of several tokens are whole
    assert "�" not in tokens


def test_answers_without_a_tokenizer_are_shown_as_text(run_folder):
    folder = run_folder(records=[record(1)])
    write_completions(folder, [completion(1, "an answer", [5, 6], [0.1, None])])
    assert "an answer" in page_of(folder).text


def test_a_broken_completions_file_costs_a_warning_alone(run_folder, caplog):
    folder = run_folder(records=[record(1)])
    (folder / "completions.parquet").write_bytes(b"no parquet")
    assert "1 step" in page_of(folder).text
    assert "completions.parquet cannot be read" in caplog.text


# ---- hostile content -------------------------------------------------------------------------------------------------

HOSTILE = '<script>alert(1)</script><img src="http://evil/x.png" onerror=alert(1)>"\' \x1b[31m\x00 \u202e `code` '
KEY = "hf_" + "aB3" * 10
SK = "sk-" + "a1b2c3d4" * 4


def test_markup_control_characters_and_secrets_of_data_stay_text(run_folder):
    text = f"{HOSTILE} {KEY}"
    sample = {
        "where": text,
        "prompt": text,
        "reference": text,
        "answers": {"after": text},
        "reference_tokens": [[HOSTILE, 0.3], ["hf_", 0.1], ["aB3" * 10, 0.2]],
        "after_tokens": [[HOSTILE, 3.0]],
    }
    config = {**CONFIG, "training": {"run_name": HOSTILE, "hub_token": "secret-value", "note": SK}}
    config["rlhf"] = {**CONFIG["rlhf"], "teacher": {"base_url": "https://me:pass-word@host/v1"}}
    folder = run_folder(
        records=[record(1, **{HOSTILE: 1.0})],
        config=config,
        status={"state": "failed", "message": text},
        evaluation={**EVALUATION, "samples": [sample]},
    )
    write_completions(folder, [completion(1, text, [1], [None])])
    html = write_report([folder, run_folder(f"{HOSTILE[:8]}b", records=[record(1)])], folder / "a.html").read_text()
    html += write_report([folder], folder / "b.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("script") == 2  # our own, of both pages
    assert "img" not in page.tags
    assert set(page.addresses) == {"data:,"}
    assert "\\x1b[31m\\x00" in page.text
    assert "\u202e" not in html
    for secret in (KEY, SK, "secret-value", "pass-word"):
        assert secret not in html
        assert secret not in "".join(page.words)  # nor in pieces, token by token
        assert secret not in (folder / "b.json").read_text(encoding="utf-8")


def test_the_page_names_nothing_to_load(run_folder):
    folder = run_folder(records=[record(1)], evaluation=EVALUATION)
    html = write_report([folder], folder / "report.html").read_text(encoding="utf-8")
    assert Page(html).addresses == ["data:,"]
    assert not re.search(r"https?:|@import|url\(|import\(|fetch\(|XMLHttp", html.replace("http-equiv", ""))


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_a_curve_goes_through_its_values(run_folder):
    values = {1: 1.25, 10: 4.0, 55: 2.5, 100: 3.0}
    (run,) = read_runs([run_folder(records=[{"step": step, "loss": value} for step, value in values.items()])])
    (chart,) = charts_of_run(panels_of(run), run)
    (curve,) = chart.curves
    low, high = chart.y_range
    x_low, x_high = chart.x_range
    drawn = [(float(x), float(y)) for x, y in re.findall(r"[ML](\d+) (\d+)", curve.path)]
    steps = [x_low + x / SIZE * (x_high - x_low) for x, _ in drawn]
    read = [high - y / SIZE * (high - low) for _, y in drawn]
    assert steps == pytest.approx(list(values), abs=(x_high - x_low) / SIZE)
    assert read == pytest.approx(list(values.values()), abs=(high - low) / SIZE)
    for tick in chart.y_ticks:
        assert float(tick.label.replace(",", "")) == pytest.approx(high - tick.at / 100 * (high - low), abs=1e-6)


@pytest.mark.parametrize("values", [[0.0] * 5, [3.0] * 5, [-2.0] * 5, [1e-9, 2e-9], [1e12, 2e12], [5.0001, 5.0002]])
def test_every_range_of_values_has_an_axis_around_it(run_folder, values):
    (run,) = read_runs([run_folder(records=[{"step": i + 1, "loss": value} for i, value in enumerate(values)])])
    (chart,) = charts_of_run(panels_of(run), run)
    low, high = chart.y_range
    assert low <= min(values) <= max(values) <= high
    assert low < high
    labels = [tick.label for tick in chart.y_ticks]
    assert 2 <= len(labels) == len(set(labels)) <= 8


def test_thinning_keeps_every_peak_the_ends_and_gaps():
    points = [(float(i), math.sin(i / 50)) for i in range(10_000)]
    points[4321], points[7000] = (4321.0, 99.0), (7000.0, None)
    points[5555] = (5555.0, -99.0)
    kept = thinned(points)
    assert len(kept) < 2 * MOST_POINTS
    assert {points[0], points[-1], points[4321], points[5555], points[7000]} <= set(kept)
    assert kept == sorted(kept)


def test_the_moving_mean_is_the_mean_of_what_is_around():
    points = [(float(i), float(i % 7)) for i in range(500)]
    points[250] = (250.0, None)
    mean = dict(moving_mean(points))
    assert mean[250.0] is None
    assert mean[100.0] == pytest.approx(sum(i % 7 for i in range(95, 106)) / 11)
    around = [i % 7 for i in range(244, 255) if i != 250]
    assert mean[249.0] == pytest.approx(sum(around) / len(around))
    assert moving_mean(points[:50]) == []


@pytest.mark.slow
def test_thousands_of_steps_make_a_page_below_a_megabyte(run_folder):
    more = {"teacher_agreement": 0.5, "student_entropy": 1.0, "teacher_entropy": 0.9, "tokens_per_second": 1e3}
    records = [record(step, token_accuracy=step % 97 / 97, grad_norm=step % 89, **more) for step in range(1, 20_001)]
    folders = [run_folder(name, records=records, evaluation=EVALUATION) for name in ("a", "b")]
    long = [["token" * 3, 0.5]] * 5_000
    sample = {**EVALUATION["samples"][0], "reference_tokens": long, "after_tokens": long, "prompt": "x" * 10**6}
    (folders[0] / "evaluation.json").write_text(json.dumps({**EVALUATION, "samples": [sample] * 50}))
    assert write_report(folders[:1], folders[0] / "report.html").stat().st_size < 1_000_000
    assert write_report(folders, folders[0].parent / "both.html").stat().st_size < 1_000_000


# ---- several runs ----------------------------------------------------------------------------------------------------


def evaluated(ce, **more):
    return {**EVALUATION, "models": {**EVALUATION["models"], "after": figures(ce, ce / 10)}, **more}


def with_beta(beta):
    training = {**CONFIG["training"], "output_dir": f"runs/{beta}"}
    return {**CONFIG, "rlhf": {**CONFIG["rlhf"], "beta": beta}, "training": training}


def test_runs_are_ranked_by_what_does_not_depend_on_beta(run_folder):
    folders = [
        run_folder("b0", records=[record(1)], config=with_beta(0.0), evaluation=evaluated(5.5)),
        run_folder("new", records=[record(1)], config=with_beta(0.2)),
        run_folder("b1", records=[record(1)], config=with_beta(1.0), evaluation=evaluated(5.25)),
    ]
    out = write_report(folders, folders[0].parent / "sweep.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert "Ordered by CE." in page.text
    rows = re.findall(r'<tr><td>(.)</td><th class="text" scope="row">.*</svg>\s*(\w+)', out.read_text(encoding="utf-8"))
    assert rows == [("1", "b1"), ("2", "b0"), ("–", "new")]
    assert "kdtrain evaluate new" in page.text
    figures = json.loads(out.with_suffix(".json").read_text())
    assert figures["ranked_by"] == "CE"
    assert [run["name"] for run in figures["runs"]] == ["b1", "b0", "new"]
    assert "rlhf.beta" in page.text
    assert "training.output_dir" not in page.text  # where runs lie is no difference


def test_runs_that_differ_in_their_seed_alone_are_averaged(run_folder):
    ces = {(0.0, 1): 5.0, (0.0, 2): 5.5, (1.0, 1): 5.125, (1.0, 2): 5.25, (1.0, 3): 5.75}
    folders = []
    for (beta, seed), ce in ces.items():
        config = {**with_beta(beta), "training": {**CONFIG["training"], "seed": seed, "output_dir": f"{beta} {seed}"}}
        folders.append(run_folder(f"{beta}-{seed}", records=[record(1)], config=config, evaluation=evaluated(ce)))
    text = page_of(*folders).text
    assert "beta 0.0 2 5.2500 (5.0000 to 5.5000)" in text
    assert "beta 1.0 3 5.3750 (5.1250 to 5.7500)" in text
    assert "Over seeds" not in page_of(folders[0], folders[2]).text


def test_runs_that_were_evaluated_on_other_rows_are_not_compared_in_silence(run_folder):
    folders = [
        run_folder("a", records=[record(1)], evaluation=evaluated(5.5)),
        run_folder("b", records=[record(1)], evaluation=evaluated(5.0, rows=7)),
    ]
    assert "evaluated on different rows" in page_of(*folders).text


def test_runs_without_evaluations_are_ranked_by_the_agreement_in_the_log(run_folder):
    names = {"low": 0.2, "high": 0.6}
    folders = [
        run_folder(name, records=[record(1), {"step": 1, "eval_loss": 1.0, "eval_teacher_agreement": value}])
        for name, value in names.items()
    ]
    out = write_report(folders, folders[0].parent / "two.html")
    assert [run["name"] for run in json.loads(out.with_suffix(".json").read_text())["runs"]] == ["high", "low"]


def test_more_runs_than_colours_are_all_drawn(run_folder):
    folders = [run_folder(f"sweep/{i}", records=[record(1), record(2)]) for i in range(12)]
    page = page_of(*folders)
    assert "4 more runs" in page.text
    assert "12 runs" in page.text


def test_runs_of_equal_name_are_told_apart_by_their_parents(run_folder):
    folders = [run_folder(f"{parent}/run", records=[record(1)]) for parent in "ab"]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run"]


def test_the_picture_is_there_with_matplotlib_and_left_out_without(run_folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(write, "write_png", png.write_png)
    folder = run_folder("a_$b", records=[record(1), {**record(2), "loss": None}])
    write_report([folder], tmp_path / "with.html")
    assert (tmp_path / "with.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(png, "has_matplotlib", lambda: False)
    write_report([folder], tmp_path / "without.html")
    assert not (tmp_path / "without.png").exists()


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def test_what_is_no_run_folder_is_refused_with_what_to_name(run_folder, tmp_path):
    folder = run_folder("runs/one", records=[record(1)])
    (folder / "checkpoint-5").mkdir()
    (tmp_path / "config.yaml").write_text("")
    for path, said in {
        tmp_path / "nothing": "there is no such folder",
        tmp_path / "config.yaml": "is a file. Name the folder that a run writes into",
        tmp_path / "runs": "Name its runs: kdtrain report runs/one",
        tmp_path: "is no run folder",
        folder / "checkpoint-5": "is a checkpoint. Name its run: runs/one",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            write_report([path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_an_error_of_the_disk(run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Writing .*file"):
        write_report([run_folder(records=[record(1)])], tmp_path / "file" / "report.html")


def test_a_report_that_fails_does_not_fail_the_run(run_folder, monkeypatch, caplog):
    folder = run_folder(records=[record(1)])
    monkeypatch.setattr(of_fit, "write_report", lambda *_, **__: 1 / 0)
    with of_fit.reported(folder, None) as noting:
        noting.facts["plan"] = {"student": "x"}
    assert "The report could not be written (division by zero); try again with kdtrain report run" in caplog.text


def test_what_was_warned_of_is_in_the_report_with_the_other_facts(run_folder):
    folder = run_folder(records=[record(1)])
    with of_fit.reported(folder, mock.Mock()) as noting:
        noting.data("train", BuildReport(rows_read=1234, rows_kept=1200, notes=["a note of the data"]))
        noting.plan({"student": "a student of 5 parameters"})
        logging.getLogger("kdtrain.somewhere").warning("Only %s tokens of a row are <b>supervised</b>. %s", 3, KEY)
        logging.getLogger("kdtrain.somewhere").warning("Only %s tokens of a row are <b>supervised</b>. %s", 3, KEY)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("Only 3 tokens of a row are <b>supervised</b>. ***") == 1
    assert "a student of 5 parameters" in page.text
    assert "rows read 1,234 rows kept 1,200" in page.text
    assert "a note of the data" in page.text
    assert f"torch {importlib.metadata.version('torch')}" in page.text
    assert KEY not in (folder / "report.json").read_text(encoding="utf-8")
    again = Page(write_report([folder], folder / "report.html").read_text(encoding="utf-8"))
    assert "a student of 5 parameters" in again.text  # facts outlive the file that is written anew


def test_whoever_stops_a_run_does_not_wait_for_a_picture(run_folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(write, "write_png", lambda *given: drawn.append(given))
    folder = run_folder(records=[record(1)])

    def stopped():
        with of_fit.reported(folder, mock.Mock()) as noting:
            noting.plan({"student": "x"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (folder / "report.html").is_file()
    assert drawn == []
    with of_fit.reported(folder, mock.Mock()) as noting:
        noting.plan({"student": "x"})
    assert len(drawn) == 1


def test_a_run_that_never_began_leaves_the_report_of_an_earlier_one(run_folder):
    folder = run_folder(records=[record(1)])
    with pytest.raises(OSError, match="no data"), of_fit.reported(folder, None):
        raise OSError("no data")
    assert not (folder / "report.html").exists()


def test_durations_are_in_the_two_largest_units():
    assert [duration(s) for s in (0.4, 59.6, 3600, 90_061)] == ["0 s", "1 min", "1 h", "1 d 1 h"]


# ---- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_opens_it_without_a_request_or_a_message_on_its_console(run_folder, tmp_path):
    folder = run_folder(records=[record(step) for step in range(1, 300)], evaluation=EVALUATION)
    page = write_report([folder], folder / "report.html")
    log = tmp_path / "net.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    flags += ["--enable-logging=stderr", f"--log-net-log={log}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "90.0% of the gap is closed" in done.stdout
    assert "CONSOLE" not in done.stderr
    asked = set(re.findall(r'"url":"((?:https?|file|ftp|ws)[^"]*)"', log.read_text(errors="replace")))
    own = {url for url in asked if not re.search(r"\.(google|gvt1|googleapis)\.", url)}  # the browser's updates
    assert own <= {page.as_uri()}
