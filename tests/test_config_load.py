"""Files that extend files, the command line, paths, and the Python API. Names of scenarios follow the requirements."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import kdtrain.config
from kdtrain.config import ConfigError, ConfigLoader, RunConfig, check_config

COMPLETE = """\
model:
  model: Qwen/Qwen3-0.6B
  revision: null
  dtype: auto
  attn_implementation: null
  trust_remote_code: false
  quantization: null
  init_kwargs: {}
tuner:
  train_type: full
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.0
  target_modules: all-linear
  modules_to_save: null
  use_dora: false
  freeze_llm: false
  freeze_vit: false
  freeze_aligner: false
data:
  train: data/train.jsonl
  eval: null
  max_length: 1024
  on_overlength: error
  train_on: assistant
  packing: false
  padding_free: false
rlhf:
  rlhf_type: gkd
  teacher_model: Qwen/Qwen3-4B
  teacher_model_init_kwargs: {dtype: auto}
  teacher: {backend: hf}
  llm_kd_weight: 1.0
  sft_alpha: 0.0
  beta: 0.5
  divergence: jsd
  kd_temperature: 1.0
  lmbda: 0.5
  seq_kd: false
  temperature: 0.9
  max_new_tokens: 128
  disable_dropout: true
  eval_kd: true
custom:
  trainer_variant: gkd_monitor
  sample_limit: null
  visual_kd:
    enabled: false
    weight: 1.0
    distance: mse
    targets: [aligner]
training:
  output_dir: runs/qwen
  max_steps: 1000
launch: {num_processes: null, config_file: null}
"""

BASE = """\
model: {model: org/student}
data: {train: rows.jsonl}
rlhf: {teacher_model: org/teacher, beta: 0.1}
training: {output_dir: runs/x, learning_rate: 1e-4}
"""


def write(folder: Path, **files: str) -> Path:
    """Writes NAME.yaml for each; returns the path of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(text)
    return path


def test_the_complete_example_loads_with_the_defaults_it_shows(tmp_path: Path) -> None:
    config = ConfigLoader.load(write(tmp_path, run=COMPLETE))
    minimal = ConfigLoader.load(
        {
            "model": {"model": "Qwen/Qwen3-0.6B"},
            "data": {"train": str(tmp_path / "data/train.jsonl")},
            "rlhf": {"teacher_model": "Qwen/Qwen3-4B", "teacher_model_init_kwargs": {"dtype": "auto"}},
            "training": {"output_dir": str(tmp_path / "runs/qwen"), "max_steps": 1000},
        }
    )
    assert config == minimal
    assert config.training["output_dir"] == str(tmp_path / "runs/qwen")


def test_maps_merge_scalars_and_lists_replace_and_the_later_file_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        base=BASE + "tuner: {train_type: lora, target_modules: [q_proj, v_proj]}\n",
        over="rlhf: {beta: 0.2, lmbda: 0.0}\n",
        run="extends: [base.yaml, over.yaml]\nrlhf: {lmbda: 1}\ntuner: {target_modules: [o_proj]}\n",
    )
    config = ConfigLoader.load(path)
    assert (config.rlhf.teacher_model, config.rlhf.beta, config.rlhf.lmbda) == ("org/teacher", 0.2, 1)
    assert config.tuner.target_modules == ("o_proj",)
    assert config.training["learning_rate"] == 1e-4


def test_a_mistake_in_an_extended_file_is_placed_there(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE.replace("beta: 0.1", "bta: 0.1"), run="extends: base.yaml\n")
    (error,) = check_config(path).errors
    assert error.location == f"{tmp_path / 'base.yaml'}:3:36"


def test_a_circle_of_files_is_an_error_that_prints_the_chain(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a="extends: b.yaml\n", b="extends: [c.yaml]\n", c="extends: a.yaml\n")
    (error,) = check_config("a.yaml").errors
    assert "a.yaml -> b.yaml -> c.yaml -> a.yaml" in error.message
    assert error.location == "c.yaml:1:10"


def test_a_file_that_leads_into_a_circle_is_not_part_of_the_chain(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a="extends: b.yaml\n", b="extends: a.yaml\n", run="extends: a.yaml\n")
    (error,) = check_config("run.yaml").errors
    assert error.message.endswith(": a.yaml -> b.yaml -> a.yaml")


def test_mistakes_come_in_the_order_of_the_file_and_then_of_the_command_line(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, run="tunr: {}\n" + BASE.replace("0.1", "3"))
    locations = [error.location for error in check_config("run.yaml", ["rlhf.lmbda=2"]).errors]
    assert locations == ["run.yaml:1:1", "run.yaml:4:42", "command line"]


def test_a_missing_base_is_an_error_where_it_is_named_and_nothing_is_guessed_about_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, run="extends: bsae.yaml\nrlhf: {bta: 1}\n")
    first, second = check_config(path).errors
    assert first.location == f"{path}:1:10"
    assert "no such file" in first.message
    assert second.path == "rlhf.bta"


def test_files_that_multiply_by_extending_are_stopped(tmp_path: Path) -> None:
    files = {f"f{i}": f"extends: [f{i + 1}.yaml, f{i + 1}.yaml]\n" for i in range(30)}
    write(tmp_path, **files, f30=BASE)
    start = time.monotonic()
    result = check_config(tmp_path / "f0.yaml")
    assert time.monotonic() - start < 1
    assert any("64 files" in error.message for error in result.errors)


@pytest.mark.parametrize("value", ["3", "[base.yaml, 3]", "{a: b}"])
def test_extends_takes_names_of_files_only(value: str, tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE, run=f"extends: {value}\n")
    assert "expected the path" in check_config(path).errors[0].message


def test_the_command_line_wins_and_is_parsed_as_yaml(tmp_path: Path) -> None:
    overrides = ["rlhf.beta=1e-1", "training.report_to=[tensorboard]", "rlhf.teacher.dtype=float32", "data.eval=~"]
    config = ConfigLoader.load(write(tmp_path, run=BASE), overrides)
    assert config.rlhf.beta == 0.1
    assert config.training["report_to"] == ["tensorboard"]
    assert config.rlhf.teacher.dtype == "float32"
    assert config.rlhf.teacher_model == "org/teacher"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rlhf.beta", "expected key.sub=value"),
        ("=1", "expected key.sub=value"),
        ("rlhf..beta=1", "expected key.sub=value"),
        ("rlhf.teacher_model.limit=1", "rlhf.teacher_model is a value, not a map"),
        ("data.train.3.limit=1", "data.train is no list"),
        ("training.1=2", "training is no list"),
        ("extends=a.yaml", "belongs in a file"),
        ("rlhf.beta=[1", "not valid YAML"),
        ("rlhf.beta=!!python/name:os.system", "tag"),
        ("rlhf.beta=.nan", "not a finite number"),
        ("rlhf.bta=1", "unknown key"),
        ("rlhf.beta=3", "at most 1"),
        ("rlhf.beta=true", "got the boolean true"),
    ],
)
def test_a_mistake_on_the_command_line_is_placed_there(override: str, expected: str, tmp_path: Path) -> None:
    (error,) = check_config(write(tmp_path, run=BASE), [override]).errors
    assert expected in error.message
    assert error.location == "command line"
    assert error.render().split("\n")[1].endswith(override)


def test_relative_paths_belong_to_the_file_that_names_them(tmp_path: Path, monkeypatch: Any) -> None:
    base = write(tmp_path / "shared", base=BASE + "launch: {config_file: fsdp.yaml}\n")
    path = write(tmp_path / "mine", run=f"extends: ../shared/{base.name}\ntraining: {{output_dir: out}}\n")
    monkeypatch.chdir(tmp_path)
    config = ConfigLoader.load(path, ["training.deepspeed=zero.json"])
    assert config.data.train[0].path == str(tmp_path / "shared/rows.jsonl")
    assert config.launch.config_file == str(tmp_path / "shared/fsdp.yaml")
    assert config.training["output_dir"] == str(tmp_path / "mine/out")
    assert config.training["deepspeed"] == str(tmp_path / "zero.json")


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("rows.jsonl", True),
        ("./rows", True),
        ("/data/rows", True),
        ("a/b/c", True),
        ("there", True),
        ("org/rows", False),
        ("rows", False),
    ],
)
def test_data_is_a_path_if_it_looks_like_one_or_is_there_and_a_hub_id_otherwise(
    text: str, local: bool, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    path = write(tmp_path, run=BASE.replace("rows.jsonl", f"[{text}, {{path: {text}}}]"))
    for source in ConfigLoader.load(path).data.train:
        assert source.is_local == local
        assert source.path == (str((tmp_path / text).resolve()) if local else text)


@pytest.mark.parametrize("section", ["model.model", "rlhf.teacher_model"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("./absent", "no such folder"),
        ("empty", "no config.json"),
        ("file.gguf", "a file, not a model folder"),
        ("a/b/c", "neither a folder"),
        ("https://host/model", "address"),
        ("mo del", "neither a folder"),
    ],
)
def test_a_local_model_must_be_a_model_folder(section: str, value: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.gguf").touch()
    names = {"model.model": "org/student", "rlhf.teacher_model": "org/teacher"}
    path = write(tmp_path, run=BASE.replace(names[section], value))
    (error,) = check_config(path).errors
    assert error.path == section
    assert expected in error.message
    with pytest.raises(ValueError, match=expected):
        ConfigLoader.load_training_config(path)


def test_model_folders_are_found_beside_the_config_and_only_those_in_use_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").touch()
    text = BASE.replace("org/student", "student").replace("org/teacher", "./absent")
    path = write(tmp_path, run=text.replace("beta: 0.1", "llm_kd_weight: 0"))
    config = ConfigLoader.load(path)
    assert config.model.model == str(tmp_path / "student")
    assert not config.asks_teacher


# Scenarios of the KD knobs.


@pytest.mark.parametrize("weight", [-0.1, -1])
def test_scenario_invalid_negative_weight(weight: float, tmp_path: Path) -> None:
    path = write(tmp_path, run=BASE)
    with pytest.raises(ValueError, match=r"rlhf\.llm_kd_weight: must be non-negative"):
        ConfigLoader.load_training_config(path, [f"rlhf.llm_kd_weight={weight}"])


def test_scenario_teacher_required_when_kd_requested(tmp_path: Path) -> None:
    path = write(tmp_path, run=BASE.replace("teacher_model: org/teacher, ", ""))
    with pytest.raises(ValueError, match="a teacher is needed"):
        ConfigLoader.load_training_config(path)


def test_scenario_teacher_skipped_when_kd_inactive(tmp_path: Path) -> None:
    config = ConfigLoader.load(write(tmp_path, run=BASE), ["rlhf={llm_kd_weight: 0}"])
    assert not config.asks_teacher
    assert config.options.ce_weight == 1.0
    assert config.options.visual_kd is None


@pytest.mark.parametrize(
    ("kd", "alpha", "enabled", "weight", "expected"),
    [
        (1.0, 0.3, False, 1.0, (True, 0.0, True, 0.3)),
        (0.0, 0.3, False, 1.0, (False, 0.0, False, 1.0)),
        (0.0, 0.3, True, 2.0, (False, 2.0, True, 1.0)),
        (0.5, 0.0, True, 0.0, (True, 0.0, True, 0.0)),
    ],
)
def test_the_weights_in_force(kd: float, alpha: float, enabled: bool, weight: float, expected: tuple[Any, ...]) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"model": "a"},
            "data": {"train": "b"},
            "rlhf": {"llm_kd_weight": kd, "sft_alpha": alpha},
            "custom": {"visual_kd": {"enabled": enabled, "weight": weight}},
        }
    )
    options = config.options
    visual_weight = options.visual_kd.weight if options.visual_kd else 0.0
    assert (options.lm_kd_active, visual_weight, options.needs_teacher, options.ce_weight) == expected


def test_visual_targets_take_the_distance_of_the_whole_unless_they_name_one() -> None:
    visual = {"distance": "cosine", "targets": {"vit": {"distance": "mse"}, "aligner": None}}
    config = RunConfig.model_validate(
        {"model": {"model": "a"}, "data": {"train": "b"}, "custom": {"visual_kd": visual}}
    )
    assert {k: t.distance for k, t in config.custom.visual_kd.targets.items()} == {"vit": "mse", "aligner": "cosine"}


# The API.


def test_loading_raises_every_mistake_at_once_as_a_value_error(tmp_path: Path) -> None:
    path = write(tmp_path, run=BASE + "tunr: {}\n")
    with pytest.raises(ConfigError) as caught:
        ConfigLoader.load(path, ["rlhf.beta=2"])
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2
    assert [d.path for d in caught.value.diagnostics] == ["tunr", "rlhf.beta"]  # type: ignore[attr-defined]
    assert str(caught.value) == "\n".join(d.render() for d in check_config(path, ["rlhf.beta=2"]).errors)


def test_loading_logs_warnings_and_returns_the_config(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "kdtrain")
    ConfigLoader.load(write(tmp_path, run=BASE + "tuner: {lora_rank: 4}\n"))
    assert [record.name for record in caplog.records] == ["kdtrain"]
    assert "tuner.lora_rank: has no effect" in caplog.text


def test_a_mapping_is_loaded_like_a_file_and_left_alone(tmp_path: Path) -> None:
    kwargs = {"attn_implementation": "eager"}
    source = {
        "model": {"model": "org/a"},
        "data": {"train": tmp_path / "x.jsonl"},
        "rlhf": {"teacher_model": "org/b", "teacher_model_init_kwargs": kwargs},
        "training": {"output_dir": "out"},
    }
    config = ConfigLoader.load(source)
    assert config.data.train[0].path == str(tmp_path / "x.jsonl")
    assert config.training["output_dir"] == str(Path.cwd() / "out")
    assert kwargs == {"attn_implementation": "eager"}
    assert source["training"] == {"output_dir": "out"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({1: 2}, "keys are text"),
        ({"model": {"model": object()}}, "expected plain data, got object"),
        ({"rlhf": {"beta": float("nan")}}, "not a finite number"),
    ],
)
def test_a_mapping_holds_plain_data_only(source: Any, expected: str) -> None:
    assert any(expected in error.message for error in check_config(source).errors)


def test_a_mapping_that_contains_itself_is_an_error() -> None:
    source: dict[str, Any] = {}
    source["model"] = source
    assert any("more than 64 levels" in error.message for error in check_config(source).errors)


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = ConfigLoader.load(write(tmp_path, run=BASE))
    with pytest.raises(ValueError, match="frozen"):
        config.rlhf.beta = 0.9  # type: ignore[misc]


def test_what_the_package_exports_is_there() -> None:
    assert set(kdtrain.config.__all__) >= {
        "CheckResult",
        "ConfigError",
        "ConfigLoader",
        "Diagnostic",
        "RunConfig",
        "TrainArguments",
        "check_config",
        "json_schema",
    }
    assert all(hasattr(kdtrain.config, name) for name in kdtrain.config.__all__)


def test_a_check_imports_no_torch_and_takes_a_moment(tmp_path: Path) -> None:
    path = write(tmp_path, run=COMPLETE)
    code = (
        "import sys, time; start = time.process_time()\n"
        "from kdtrain.config import check_config, json_schema\n"
        f"assert check_config({str(path)!r}).config; json_schema()\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate'} & {*sys.modules}\n"
        "print(time.process_time() - start, heavy)"
    )
    # The fastest of three: a busy machine is no defect.
    outputs = [subprocess.check_output([sys.executable, "-c", code], text=True).split(maxsplit=1) for _ in range(3)]
    assert {heavy.strip() for _, heavy in outputs} == {"set()"}
    assert min(float(seconds) for seconds, _ in outputs) < 1.5
