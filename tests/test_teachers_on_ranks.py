"""Several teachers, and teachers with another tokenizer, on two ranks: the numbers and weights of one process.

A forward of a model in pieces waits for all ranks, and with routing these have rows of different teachers: whatever a
rank's rows are, it runs each teacher in pieces as often as the others do.
"""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import pytest

from kdtrain.teachers import LocalTeacher, MixedTeacher, RoutedTeacher, SelfTeacher
from tests import tiny
from tests.strategies import ONE, STRATEGIES, Strategy, marks_of, whole_weights
from tests.test_invariance import given_samples
from tests.test_trainer import make_trainer
from tests.test_trainer_other_tokenizer import ROWS as TEXTS
from tests.test_trainer_other_tokenizer import other_trainer
from tests.test_trainer_several_teachers import NAMED, model_of

KEYS = ("loss", "grad_norm", "llm_kd_loss", "sft_loss", "aligned_share")
KEYS += ("llm_kd_loss_teacher_math", "llm_kd_loss_teacher_code")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
LAYOUT = ("padding_free", "packing", "max_length", "per_device_train_tokens", "gradient_checkpointing")
LAYOUT += ("teacher_placement",)
"""What changes no number, and one process is without."""


def numbers_and_weights(strategy: Strategy, make: Any, folder: Any, split: tuple[int, int], **options: Any) -> Any:
    """What is logged of some windows, every weight after them, and which teachers lie in pieces.

    Args:
        make: a trainer of a folder and options.
    """
    defaults = {
        "sft_alpha": 0.3, "optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 0.1, "max_steps": 2,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "log_level": "error",
        "per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1],
    }  # fmt: skip
    trainer = make(folder, **{**defaults, **strategy.begin(), **options})
    with given_samples():
        trainer.train()
    strategy.check(trainer)
    logged = [{k: r[k] for k in r if k.removeprefix("eval_") in KEYS} for r in trainer.state.log_history]
    pieces = [teacher.in_pieces for teacher in trainer.teacher.members]
    return [record for record in logged if record], whole_weights(trainer), pieces


def assert_as_one_process(
    tmp_path: Any, strategy: Strategy, make: Any, split: tuple[int, int], pieces: list[bool], **options: Any
) -> None:
    alone = {name: value for name, value in options.items() if name not in LAYOUT}
    expected, wanted, _ = numbers_and_weights(ONE, make, tmp_path / "one", (2 * split[0] * split[1], 1), **alone)
    assert all(record["llm_kd_loss"] > 1e-2 for record in expected if "loss" in record)
    for numbers, weights, in_pieces in strategy.run(numbers_and_weights, make, tmp_path / "two", split, **options):
        assert in_pieces == pieces
        assert numbers == [pytest.approx(one, rel=1e-5, abs=1e-6) for one in expected]
        assert weights.keys() == wanted.keys()
        for name, values in wanted.items():
            assert weights[name] == pytest.approx(values, rel=0, abs=1e-6), name


# ---- several teachers ------------------------------------------------------------------------------------------------


def several(kind: str, placements: tuple[str, str]) -> Any:
    def make(folder: Any, rows: Any = NAMED, student: Any = None, **options: Any) -> Any:
        made = {name: teacher_of(name, one) for name, one in zip(("math", "code"), placements, strict=True)}
        teacher = RoutedTeacher(made) if kind == "routed" else MixedTeacher(made, {"math": 0.7, "code": 0.3})
        extra = {"teacher": teacher}
        if "eval_strategy" in options:
            extra["eval_dataset"] = datasets.Dataset.from_list(NAMED[1:6])
        return make_trainer(folder, student, rows=datasets.Dataset.from_list(list(rows)), extra=extra, **options)

    return make


def teacher_of(name: str, placement: str) -> Any:
    is_student = placement in ("ema", "live")
    return SelfTeacher(placement, 0.5) if is_student else LocalTeacher(model_of(name), placement)


PLACEMENT = {"DDP, 2 ranks": "sharded", "FSDP2": "auto", "ZeRO-3": "auto"}
WINDOWS = {
    # Rows of a micro-batch and micro-batches of a rank. One row: no rank has both teachers' at a time.
    "one row": ((1, 4), {}),
    "two rows, recomputed": ((2, 2), {"gradient_checkpointing": True}),
    "packed": ((2, 2), {"packing": True, "max_length": 96}),
    "64 tokens a forward": ((4, 1), {"padding_free": True, "per_device_train_tokens": 64}),
    "rows that fill no batch, evaluated": ((1, 2), {"rows": NAMED[:5], "max_steps": 4, **EVALUATED}),
    "chosen tokens": ((2, 2), {"token_selection": {"by": "disagreement", "keep": 0.4}}),
    "best of three own answers, kept": (
        (1, 4), {"lmbda": 1.0, "samples_per_prompt": 3, "select": "best", "log_completions_steps": 1},
    ),
}  # fmt: skip
QUICK = {("FSDP2", "routed", "one row"), ("ZeRO-3", "routed", "one row"), ("ZeRO-3", "alm", "one row")}


def cases(*of: Any) -> list[Any]:
    """All combinations that begin with a strategy; for `make test-slow` and `make invariance`, but for the quick."""
    return [
        pytest.param(*case, id=", ".join(case), marks=[*marks_of(case[0]), *[pytest.mark.slow][case in QUICK :]])
        for case in itertools.product(*of)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "kind", "window"), cases(PLACEMENT, ("routed", "mix"), WINDOWS))
def test_several_teachers_in_pieces_teach_what_whole_ones_do(tmp_path, way, kind, window):
    split, options = WINDOWS[window]
    make = several(kind, (PLACEMENT[way],) * 2)
    assert_as_one_process(tmp_path, STRATEGIES[way], make, split, [True, True], **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["routed", "mix"])
def test_one_in_pieces_beside_a_whole_one(tmp_path, kind):
    make = several(kind, ("replicated", "sharded"))
    assert_as_one_process(tmp_path, STRATEGIES["DDP, 2 ranks"], make, (1, 4), [False, True])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "split"), [("routed", (1, 4)), tiny.slow("mix", (2, 2))])
def test_the_student_itself_among_them_is_asked_on_all_ranks_too(tmp_path, kind, split):
    """FSDP2 has it in pieces: its average's forwards wait for all ranks, whose rows are its own or another's."""
    make = several(kind, ("ema", "auto"))
    assert_as_one_process(tmp_path, STRATEGIES["FSDP2"], make, split, [True, True], max_steps=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param("ZeRO-3", marks=marks_of("ZeRO-3"))])
def test_the_student_itself_among_them_under_zero_3(tmp_path, tokenizer, name):
    """One that is loaded in pieces: a student that is made whole is refused, as it would be asked before training."""
    student = tiny.save_model(tiny.make_qwen3(seed=1), tokenizer, tmp_path / "student")
    make = several("routed", ("live", "auto"))
    assert_as_one_process(tmp_path, STRATEGIES[name], make, (1, 4), [True, True], student=student)
    with pytest.raises(AssertionError, match=r"PreflightError: Under DeepSpeed ZeRO-3 .* load it with from_pretrained"):
        STRATEGIES[name].run(numbers_and_weights, make, tmp_path / "refused", (1, 4))


@pytest.mark.slow
def test_answers_that_each_writes_while_training_are_refused_of_several_in_pieces(tmp_path):
    make = several("routed", ("sharded", "sharded"))
    with pytest.raises(AssertionError, match=r"NotAvailableError: rlhf\.seq_kd with several teachers is not available"):
        STRATEGIES["DDP, 2 ranks"].run(numbers_and_weights, make, tmp_path, (1, 4), seq_kd=True)


# ---- another tokenizer -----------------------------------------------------------------------------------------------


def crossing(method: str) -> Any:
    def make(folder: Any, **options: Any) -> Any:
        own = {"cross_tokenizer": method, "llm_kd_weight": 50.0 if method == "alm" else 1.0}
        extra = {"eval_dataset": datasets.Dataset.from_list(TEXTS[1:6])} if "eval_strategy" in options else None
        return other_trainer(folder, extra=extra, **{**own, **options})

    return make


CROSSING = {
    "one row": ((1, 4), {}),
    "two rows, recomputed": ((2, 2), {"gradient_checkpointing": True}),
    "packed": ((2, 2), {"packing": True, "max_length": 96}),
    "rows that fill no batch, evaluated": ((1, 2), {"rows": TEXTS[:5], "max_steps": 4, **EVALUATED}),
    "own answers, two to a prompt, kept": (
        (1, 4), {"lmbda": 1.0, "samples_per_prompt": 2, "log_completions_steps": 1},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "method", "window"), cases(PLACEMENT, ("alm", "uld"), CROSSING))
def test_a_teacher_with_another_tokenizer_in_pieces_teaches_what_a_whole_one_does(tmp_path, way, method, window):
    split, options = CROSSING[window]
    options |= {"teacher_placement": PLACEMENT[way]}
    assert_as_one_process(tmp_path, STRATEGIES[way], crossing(method), split, [True], **options)
