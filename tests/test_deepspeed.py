"""DeepSpeed on two gloo ranks: every ZeRO stage equals one process, in what is logged and in every weight.

Skipped without the `deepspeed` extra; `make test-deepspeed` installs it. About a minute on two free cores.
"""

import json
import math
import os

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdtrain.config import ConfigLoader
from kdtrain.errors import NonFiniteError, NotAvailableError, PreflightError
from kdtrain.models.parts import count_parameters
from kdtrain.runs.fit import fit
from kdtrain.teachers import SelfTeacher
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.strategies import zero
from tests.test_trainer import ROWS, make_args
from tests.tiny import lora_config

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
deepspeed = pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.deepspeed, pytest.mark.filterwarnings("ignore")]


def build(
    folder,
    config=None,
    tied=False,
    models=None,
    lora=None,
    accumulation=1,
    prepare=None,
    rows=ROWS,
    itself=None,
    **kwargs,
):
    """A trainer for windows of all rows, on the ranks there are; `prepare(student)` comes before it is wrapped.

    `itself` are the weights of the student that teach it, in place of another model.
    """
    ranks = 2 if "RANK" in os.environ else 1
    if config is not None:
        kwargs["deepspeed"] = config
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    defaults = {
        "sft_alpha": 0.3, "optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", "max_steps": 2, "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": len(rows) // ranks // accumulation, "log_level": "error",
    }  # fmt: skip
    args = make_args(folder, **defaults | kwargs)
    if models is None:
        student, teacher = (tiny.make_qwen3(seed=1, tie_word_embeddings=tied), tiny.make_qwen3(seed=2, hidden=48))
    else:
        student, teacher = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("student", "teacher"))
        is_sharded = config is not None and config["zero_optimization"]["stage"] == 3
        assert all(hasattr(p, "ds_id") == is_sharded for model in (student, teacher) for p in model.parameters())
        assert count_parameters(student)[0] > 10_000
    if prepare is not None:
        prepare(student)
    if lora is not None:
        torch.manual_seed(0)  # of the adapters
        lora = lora_config(rank=4, alpha=8, dropout=0.0, use_dora=False, **lora)
    return GKDTrainerWithMetrics(
        student, None if itself else teacher, args, train_dataset=datasets.Dataset.from_list(list(rows)),
        eval_dataset=datasets.Dataset.from_list(tiny.CHATS[:5]) if "eval_strategy" in kwargs else None,
        processing_class=tiny.make_tokenizer(), peft_config=lora,
        teacher=SelfTeacher(itself, 0.5) if itself else None,
    )  # fmt: skip


def outcome(trainer):
    """What was logged and every weight, as plain numbers; and under DeepSpeed that it really was."""
    if trainer.args.deepspeed:
        assert trainer.accelerator.num_processes == 2
        teacher = trainer.model_wrapped if trainer.teacher.is_student else trainer.teacher_model
        assert type(trainer.model_wrapped).__name__ == type(teacher).__name__ == "DeepSpeedEngine"
        assert trainer.model_wrapped.zero_optimization_stage() == trainer.args.deepspeed["zero_optimization"]["stage"]
    times = (*tiny.MEASURED, "padding_fraction")
    records = [  # before training nothing is asked of models that DeepSpeed wraps
        {key: value for key, value in record.items() if key not in times and not key.startswith("grad_norm_")}
        for record in trainer.state.log_history
        if "loss" in record
    ]
    return records, weights(trainer)


def weights(trainer):
    parameters = dict(trainer.model.named_parameters())
    sharded = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return {name: p.detach().flatten().tolist() for name, p in parameters.items()}


def train(folder, *args, **kwargs):
    trainer = build(folder, *args, **kwargs)
    trainer.train()
    return outcome(trainer)


def in_two_ranks(function, *args, **kwargs):
    def call():
        return function(*args, **kwargs)

    return tiny.run_ranks(call, 2, timeout=60)


def assert_same(ours, expected, without=()):
    (records, parameters), (expected_records, expected_parameters) = ours, expected
    assert len(records) == len(expected_records) > 0
    for record, wanted in zip(records, expected_records, strict=True):
        wanted = {key: value for key, value in wanted.items() if key not in without}
        assert record == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert parameters.keys() == expected_parameters.keys()
    for name, values in expected_parameters.items():
        assert parameters[name] == pytest.approx(values, rel=0, abs=1e-6), name


CASES = {
    "0": (0, {}),
    "1, accumulated": (1, {"accumulation": 2}),
    "2, tied head, accumulated": (2, {"tied": True, "accumulation": 2}),
    "2, head of its own, clipped": (2, {"max_grad_norm": 0.5}),
    "3, tied head": (3, {"tied": True}),
    "3, head of its own": (3, {}),
    "3, head of its own, accumulated, recomputed": (3, {"accumulation": 2, "gradient_checkpointing": True}),
    "3, lora": (3, {"tied": True, "lora": {"target_modules": "all-linear", "modules_to_save": None}}),
    "3, lora and a trained copy of the head": (
        3, {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_zero_equals_one_process(tmp_path, name):
    stage, options = CASES[name]
    expected = train(tmp_path / "one", **options)
    for rank in in_two_ranks(train, tmp_path / "two", zero(stage), **options):
        assert_same(rank, expected, without=() if stage else ("grad_norm",))  # stage 0 tells none


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A student with a head of its own and a teacher, saved: under ZeRO-3 they are loaded in pieces."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_model(tiny.make_qwen3(seed=1, tie_word_embeddings=False), tokenizer, folder / "student")
    tiny.save_model(tiny.make_qwen3(seed=2, hidden=48), tokenizer, folder / "teacher")
    return folder


def train_and_evaluate(*args, **kwargs):
    trainer = build(*args, eval_strategy="steps", eval_steps=1, eval_on_start=True, **kwargs)
    trainer.train()
    return outcome(trainer), [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]


def test_models_loaded_in_pieces_train_and_evaluate_as_in_one_process(tmp_path, models):
    expected, evaluations = train_and_evaluate(tmp_path / "one", models=models)
    for rank, ours in in_two_ranks(train_and_evaluate, tmp_path / "two", zero(3), models=models):
        assert_same(rank, expected)
        assert ours == pytest.approx(evaluations, rel=1e-5)


def train_half_supervised(*args, **kwargs):
    """The second half of the rows, those of the second rank, has no supervised token."""
    rows = [{**row, "supervised": i < len(ROWS) // 2} for i, row in enumerate(ROWS)]
    trainer = build(*args, rows=rows, **kwargs)
    collate = trainer.data_collator

    def collated(rows):
        batch = collate(rows)
        batch.labels[[not row["supervised"] for row in rows]] = -100
        return batch

    trainer.data_collator = collated
    trainer.train()
    return outcome(trainer)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_without_supervised_tokens_changes_nothing(tmp_path, stage):
    expected = train_half_supervised(tmp_path / "one")
    for rank in in_two_ranks(train_half_supervised, tmp_path / "two", zero(stage)):
        assert_same(rank, expected)


@pytest.mark.parametrize("options", [{"lmbda": 1.0}, {"seq_kd": True}], ids=["student", "teacher"])
def test_answers_generated_from_pieces_are_those_of_whole_models(tmp_path, models, options):
    options = {"models": models, "max_new_tokens": 12, "accumulation": 2, **options}
    expected = in_two_ranks(train, tmp_path / "ddp", **options)[0]
    for rank in in_two_ranks(train, tmp_path / "zero", zero(3), **options):
        assert_same(rank, expected)


# ---- the student as its own teacher ----------------------------------------------------------------------------------

ADAPTER = {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}
ITSELF = {
    "base, ZeRO-2": (2, "base", ADAPTER),
    "base, ZeRO-3": (3, "base", ADAPTER),
    "base, ZeRO-3, accumulated, recomputed": (
        3,
        "base",
        {**ADAPTER, "accumulation": 2, "gradient_checkpointing": True},
    ),
    "base, ZeRO-3, its answers": (3, "base", {**ADAPTER, "seq_kd": True, "max_new_tokens": 5, "temperature": 1e-4}),
    "live, ZeRO-3": (3, "live", {}),
    "average, ZeRO-2": (2, "ema", {}),
    "average of an adapter, ZeRO-1, accumulated": (1, "ema", {**ADAPTER, "accumulation": 2}),
}


@pytest.mark.parametrize("name", ITSELF)
def test_a_student_that_teaches_itself_under_zero_equals_one_process(tmp_path, models, name):
    stage, weights, options = ITSELF[name]
    options = {"models": models, "itself": weights, "learning_rate": 1.0, "max_steps": 3, **options}
    expected = train(tmp_path / "one", **options)
    assert weights == "live" or expected[0][-1]["llm_kd_loss"] > 1e-4
    for rank in in_two_ranks(train, tmp_path / "two", zero(stage), **options):
        assert_same(rank, expected)


def refused(folder):
    with pytest.raises(NotAvailableError, match="weights: ema is not available under DeepSpeed ZeRO-3"):
        build(folder, zero(3), itself="ema")


def test_an_average_of_weights_in_pieces_of_zero_3_is_refused(tmp_path):
    in_two_ranks(refused, tmp_path)


# ---- what must not go unseen -----------------------------------------------------------------------------------------


def spoil_gradient(student):
    """The second rank's gradient is NaN; losses are fine."""
    if os.environ["RANK"] == "1":
        student.model.norm.register_full_backward_hook(lambda module, ours, theirs: (ours[0] * math.nan,))


def spoil_loss(student):
    if os.environ["RANK"] == "1":
        student.model.norm.register_forward_hook(lambda module, inputs, output: output * math.nan)


def train_spoilt(folder, config, prepare, **kwargs):
    """The error, and whether the weights are as they were."""
    trainer = build(folder, config, prepare=prepare, **kwargs)
    before = weights(trainer)
    with pytest.raises(NonFiniteError, match="The optimizer step was not taken") as caught:
        trainer.train()
    after = weights(trainer)
    # Not Python's max, which passes over NaN.
    changed = max(torch.tensor(after[name]).sub(torch.tensor(before[name])).abs().max().item() for name in before)
    finite = all(math.isfinite(value) for values in after.values() for value in values)
    return str(caught.value), changed if finite else math.inf


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("prepare", [spoil_gradient, spoil_loss])
def test_nan_stops_every_rank_before_the_step(tmp_path, stage, prepare):
    for _, changed in in_two_ranks(train_spoilt, tmp_path, zero(stage), prepare):
        assert changed == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_nan_in_a_bf16_gradient_that_deepspeed_does_not_look_for_stops_before_the_step(tmp_path, stage):
    config = zero(stage, bf16={"enabled": True, "check_grad_overflow": False})
    for _, changed in in_two_ranks(train_spoilt, tmp_path, config, spoil_gradient, bf16=True):
        assert changed < 0.01  # the weights are rounded to bf16, and none is NaN


def double_logits(student):
    """What no config tells: read from the weights, the logits would be half of what they are."""
    student.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)


def train_doubled(*args, **kwargs):
    trainer = build(*args, prepare=double_logits, **kwargs)
    trainer.train()
    assert not trainer._objective.fused
    return outcome(trainer)


def test_a_head_that_does_more_than_its_config_says_is_seen_in_pieces(tmp_path, models):
    expected = train_doubled(tmp_path / "one", models=models)
    for rank in in_two_ranks(train_doubled, tmp_path / "two", zero(3), models=models):
        assert_same(rank, expected)


def evaluate_then_train(folder):
    trainer = build(folder, zero(3))
    trainer.evaluate(datasets.Dataset.from_list(tiny.CHATS[:4]))
    with pytest.raises(NotAvailableError, match="evaluate\\(\\) before train"):
        trainer.train()


def test_training_without_an_optimizer_is_refused(tmp_path):
    in_two_ranks(evaluate_then_train, tmp_path)


# ---- a whole run -----------------------------------------------------------------------------------------------------


class Silent:
    """A `Reporter`."""

    def data(self, name, report): ...
    def plan(self, rows): ...
    def close(self): ...
    def callbacks(self):
        return []


def fit_project(project, *overrides, resume=None):
    os.chdir(project)
    fit(ConfigLoader.load_training_config(project / "config.yaml", overrides=list(overrides)), Silent(), resume=resume)


def records(project, name):
    lines = (project / name / "logging.jsonl").read_text().splitlines()
    keys = ("step", "loss", "grad_norm", "llm_kd_loss", "sft_loss")
    return [{key: record[key] for key in keys} for record in map(json.loads, lines) if "loss" in record]


def test_a_run_in_pieces_resumed_from_a_checkpoint_saves_the_model_of_one_process(project):
    (project / "zero.json").write_text(json.dumps(zero(3)))
    every = ["training.save_strategy=steps", "training.save_steps=2", "training.lr_scheduler_type=constant"]
    fit_project(project, "training.output_dir=one", "training.per_device_train_batch_size=8", *every)
    ours = ["training.output_dir=two", "training.deepspeed=zero.json", "launch.num_processes=2", *every]
    in_two_ranks(fit_project, project, *ours, "training.max_steps=2")
    in_two_ranks(fit_project, project, *ours, resume="auto")
    for record, expected in zip(records(project, "two"), records(project, "one"), strict=True):
        assert record == pytest.approx(expected, rel=1e-4)
    model, expected = (load_file(project / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in expected.items():
        torch.testing.assert_close(model[name], weight, rtol=0, atol=1e-5)


def test_zero_3_that_would_save_no_model_is_refused(project):
    config = zero(3)
    del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    (project / "zero.json").write_text(json.dumps(config))

    def refused():
        with pytest.raises(PreflightError, match="stage3_gather_16bit_weights_on_model_save"):
            fit_project(project, "training.deepspeed=zero.json", "launch.num_processes=2")

    tiny.run_ranks(refused, 2)


def test_a_run_that_would_be_without_deepspeed_is_refused(project, monkeypatch):
    (project / "zero.json").write_text(json.dumps(zero(2)))

    def refused(message):
        with pytest.raises(PreflightError, match=message):
            fit_project(project, "training.deepspeed=zero.json")

    refused("needs a launcher")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny.run_ranks(refused, 2, "this run is without DeepSpeed")
