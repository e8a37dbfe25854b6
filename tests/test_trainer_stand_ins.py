"""Ranks of which some have images in a micro-batch and others none: they neither wait for ever nor train otherwise."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from kdtrain.errors import PreflightError
from kdtrain.models.parts import freeze_parts
from tests import tiny
from tests.strategies import ONE, STRATEGIES, marks_of, whole_weights
from tests.test_invariance import rows_with_images
from tests.test_trainer import make_args, make_trainer
from tests.tiny_processors import FAMILIES, make_model

pytestmark = pytest.mark.filterwarnings("ignore")


def cases(*names, quick=()):
    return [
        pytest.param(name, marks=[*([] if name in quick else [pytest.mark.slow]), *marks_of(name)]) for name in names
    ]


def build(strategy, folder, counts, *, family="llava", frozen=None, width=48, models=None, **options):
    """A trainer for windows of all rows, which have so many images each."""
    accumulation = options.get("gradient_accumulation_steps", 1)
    options = {
        "sft_alpha": 0.3, "optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 0.1, "log_level": "error",
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "max_steps": 2,
        "per_device_train_batch_size": len(counts) // strategy.ranks // accumulation,
        "per_device_eval_batch_size": len(counts) // strategy.ranks // 2,
        "visual_kd": {"weight": 0.1, "targets": ["vit", "aligner"]}, **strategy.begin(family), **options,
    }  # fmt: skip
    processor = FAMILIES[family]()
    if models is None:
        student, teacher = make_model(family, processor, 1), make_model(family, processor, 2, width=width)
    else:
        args = make_args(folder, **options)  # ZeRO-3 loads in pieces where it knows its config
        student, teacher = (AutoModelForImageTextToText.from_pretrained(models / name) for name in ("one", "two"))
        in_pieces = bool(args.deepspeed) and strategy.stage == 3
        assert all(hasattr(p, "ds_id") == in_pieces for model in (student, teacher) for p in model.parameters())
    if frozen:
        freeze_parts(student, **dict.fromkeys(frozen, True))
    extra = {"processing_class": processor}
    if "eval_strategy" in options:
        extra["eval_dataset"] = rows_with_images(counts)
    rows = rows_with_images(counts)
    return make_trainer(folder, student, teacher, rows=rows, extra=extra, **options)


KEYS = ("loss", "grad_norm", "eval_loss", "eval_vision_kd_loss", "eval_token_accuracy")


def outcome(strategy, trainer):
    strategy.check(trainer)
    logged = [{key: one[key] for key in KEYS if key in one} for one in trainer.state.log_history]
    return [one for one in logged if one], whole_weights(trainer)


def train(strategy, *args, **options):
    trainer = build(strategy, *args, **options)
    trainer.train()
    return outcome(strategy, trainer)


def assert_same(ours, expected):
    (records, weights), (wanted, expected_weights) = ours, expected
    assert len(records) == len(wanted) > 0
    for record, values in zip(records, wanted, strict=True):
        assert record == pytest.approx(values, rel=1e-5, abs=1e-7)
    assert weights.keys() == expected_weights.keys()
    for name, values in expected_weights.items():
        assert weights[name] == pytest.approx(values, rel=0, abs=1e-6), name


WRITTEN = {
    "student": {"lmbda": 1.0, "samples_per_prompt": 2, "select": "best", "log_completions_steps": 1},
    "teacher": {"seq_kd": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITTEN)
@pytest.mark.parametrize("name", cases("FSDP2", "ZeRO-3"))
def test_answers_to_images_and_evaluations_are_those_of_one_process(tmp_path, name, writer):
    options = {"max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": name == "FSDP2"}
    options |= WRITTEN[writer]
    counts = (1, 0, 0, 0, 2, 0, 0, 1)
    expected = train(ONE, tmp_path / "one", counts, **options)
    for rank in STRATEGIES[name].run(train, tmp_path / "two", counts, gradient_accumulation_steps=2, **options):
        assert_same(rank, expected)


# ---- no rank has an image --------------------------------------------------------------------------------------------

NONE = (0,) * 4
DECAY = {"weight_decay": 0.5}  # of weights whose gradient is 0, and not of those that have none


def train_texts_last(strategy, *args, **options):
    """A window of images, and then one without: what images alone train is left as it is."""
    counts = (1, 0, 1, 1, *NONE)
    options["per_device_train_batch_size"] = 4 // strategy.ranks
    return train(strategy, *args, counts, **DECAY, **options)


@pytest.mark.parametrize("frozen", tiny.first_quick([None, ("vit", "aligner")]), ids=["trained", "frozen"])
@pytest.mark.parametrize("name", cases("DDP, 2 ranks", "FSDP2", quick=("DDP, 2 ranks",)))
def test_windows_without_images_leave_the_vision_path_as_it_is(tmp_path, name, frozen):
    # Of LLaVA's tower the last layer is never used, which DDP would have to look for.
    options = {"frozen": frozen, "family": "qwen"} | ({"visual_kd": {"enabled": False}} if frozen else {})
    expected = train_texts_last(ONE, tmp_path / "one", **options)
    if name.startswith("DDP"):
        options["ddp_find_unused_parameters"] = False
    for rank in STRATEGIES[name].run(train_texts_last, tmp_path / "two", **options):
        assert_same(rank, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("DDP, 2 ranks", "FSDP2"))
def test_windows_without_images_are_no_steps_where_the_language_model_is_frozen(tmp_path, name):
    expected = train_texts_last(ONE, tmp_path / "one", frozen=("llm",))
    for rank in STRATEGIES[name].run(train_texts_last, tmp_path / "two", frozen=("llm",)):
        assert_same(rank, expected)


def refused(strategy, folder):
    with pytest.raises(PreflightError, match="No row of step 2 has an image, and the language model is frozen"):
        train_texts_last(strategy, folder, frozen=("llm",))


@pytest.mark.parametrize("name", cases("ZeRO-2"))
def test_deepspeed_would_take_a_step_with_nothing_to_train(tmp_path, name):
    STRATEGIES[name].run(refused, tmp_path)


# ---- projectors ------------------------------------------------------------------------------------------------------


def save_models(folder):
    processor = FAMILIES["qwen"]()
    for i, (name, width) in enumerate((("one", 32), ("two", 48)), start=1):
        make_model("qwen", processor, i, width=width).save_pretrained(folder / name)
        processor.tokenizer.save_pretrained(folder / name)


def train_saving(strategy, folder, models, steps, resume=None):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps, "optim": "adamw_torch"}
    trainer = build(strategy, folder, (1, 0, 0, 0), family="qwen", models=models, learning_rate=0.01, **options)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    return outcome(strategy, trainer)


def assert_close(ours, expected):
    """AdamW makes steps of a gradient that is rounding alone, which a key's bias has."""
    assert ours.keys() == expected.keys()
    for name in [name for name in expected if not name.endswith(("qkv.bias", "k_proj.bias"))]:
        difference = torch.as_tensor(ours[name]).flatten() - torch.as_tensor(expected[name]).flatten()
        assert difference.abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("FSDP2", "ZeRO-2", "ZeRO-3"))
def test_projectors_are_saved_beside_the_model_and_read_back(tmp_path, name):
    save_models(tmp_path)
    one, two = tmp_path / "first", tmp_path / "second"
    _, expected = train_saving(ONE, one, tmp_path, 2)
    STRATEGIES[name].run(train_saving, two, tmp_path, 1)
    for _, weights in STRATEGIES[name].run(train_saving, two, tmp_path, 2, resume=str(two / "checkpoint-1")):
        assert_close(weights, expected)
    for folder in ("checkpoint-2", "final"):
        projectors, model = "visual_projectors.safetensors", "model.safetensors"
        assert_close(load_file(two / folder / projectors), load_file(one / folder / projectors))
        ours, wanted = load_file(two / folder / model), load_file(one / folder / model)
        if name == "ZeRO-3":  # transformers names the weights of a model that it has loaded in pieces otherwise
            assert len(ours) == len(wanted)
        else:
            assert_close(ours, wanted)


# ---- what cannot have one --------------------------------------------------------------------------------------------


def train_without_processor(strategy, folder):
    trainer = build(strategy, folder, (1, 1, 0, 0))
    trainer.processing_class = trainer.processing_class.tokenizer
    with pytest.raises(PreflightError, match=r"here they cannot: the processing class \(.*\) makes no images"):
        trainer.train()


@pytest.mark.parametrize("name", cases("FSDP2"))
def test_ranks_that_cannot_make_a_stand_in_say_so_instead_of_waiting(tmp_path, name):
    STRATEGIES[name].run(train_without_processor, tmp_path)
