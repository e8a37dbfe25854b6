"""Where a teacher's weights lie changes no number: in pieces over two gloo ranks, in CPU memory between forwards."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

from kdtrain.errors import PreflightError
from kdtrain.teachers import LocalTeacher
from kdtrain.teachers.placement import OffloadedWeights
from tests import tiny
from tests.test_distributed import sharding_on_a_cpu, train_images
from tests.test_trainer import ROWS, make_batch, make_trainer

CPU = torch.device("cpu")


def build(folder, placement="auto", tied=True, rows=ROWS, evaluation=None, **kwargs):
    """A trainer for windows of all rows, on the ranks there are."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else kwargs.pop("ranks", 1)
    teacher = tiny.make_qwen3(seed=2, hidden=48, tie_word_embeddings=tied)
    defaults = {
        "sft_alpha": 0.3, "optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 0.1, "max_steps": 2,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": -(-len(rows) // ranks), "teacher_placement": placement,
    }  # fmt: skip
    extra = {} if evaluation is None else {"eval_dataset": evaluation}
    return make_trainer(folder, tiny.make_qwen3(seed=1), teacher, rows=rows, extra=extra, **defaults | kwargs)


def numbers_of(trainer):
    keys = ("loss", "grad_norm", "llm_kd_loss", "eval_loss", "eval_llm_kd_loss")
    return [record[key] for record in trainer.state.log_history for key in keys if key in record]


def train(folder, placement, kwargs):
    trainer = build(folder, placement, ranks=2, **kwargs)
    trainer.train()
    weights = list(trainer.teacher_model.parameters())
    here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in weights)
    return numbers_of(trainer), type(trainer.model_wrapped).__name__, type(trainer.teacher_model).__name__, here


def in_two_ranks(function, *args):
    return tiny.run_ranks(function, 2, *args, timeout=60)


CASES = {
    "rows that fill no batch": {"rows": ROWS[:5], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "a head of its own, evaluated": {
        "tied": False,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "evaluation": tiny.CHATS[:5],
    },
    "on-policy, one of three answers": {"lmbda": 1.0, "samples_per_prompt": 3, "select": "best"},
    "the teacher writes": {"seq_kd": True},
    "answers are kept": {"lmbda": 1.0, "log_completions_steps": 1},
}


@pytest.mark.parametrize("case", [*tiny.first_quick(CASES)])
def test_a_teacher_in_pieces_beside_a_student_under_ddp_gives_the_same(tmp_path, case):
    kwargs = CASES[case]
    whole = in_two_ranks(train, tmp_path / "whole", "auto", kwargs)
    pieces = in_two_ranks(train, tmp_path / "pieces", "sharded", kwargs)
    for (numbers, student, teacher, here), (expected, _, _, all_of_it) in zip(pieces, whole, strict=True):
        assert student == "DistributedDataParallel"
        assert teacher == "FSDPQwen3ForCausalLM"
        assert numbers == pytest.approx(expected, rel=1e-6)
        assert here < 0.6 * all_of_it
    assert len(pieces[0][0]) >= 6


# ---- images ----------------------------------------------------------------------------------------------------------


def train_with_images(folder, placement, weight):
    return train_images(folder, "qwen", 2, 2, teacher_placement=placement, llm_kd_weight=weight)


@pytest.mark.parametrize("weight", [1.0, tiny.slow(0.0)])
def test_a_rank_without_an_image_asks_a_teacher_in_pieces_all_the_same(tmp_path, weight):
    """Of visual KD alone the teacher is asked for images: the others would wait for the rank that has none."""
    expected = in_two_ranks(train_with_images, tmp_path / "whole", "auto", weight)
    found = in_two_ranks(train_with_images, tmp_path / "pieces", "sharded", weight)
    for (numbers, _), (wanted, _) in zip(found, expected, strict=True):
        assert numbers == pytest.approx(wanted, rel=1e-6)


# ---- in CPU memory ---------------------------------------------------------------------------------------------------


def test_offloaded_weights_are_copies_while_the_model_runs_and_their_own_after(tokenizer):
    """On a CPU the copies lie beside the weights; where they go is a device like any other."""
    model = tiny.make_qwen3(seed=2).requires_grad_(False).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    offloaded = OffloadedWeights(model, CPU)
    at_home = {name: p.data_ptr() for name, p in (*model.named_parameters(), *model.named_buffers())}
    with contextlib.suppress(ZeroDivisionError), offloaded.on_device():
        here = {name: p.data_ptr() for name, p in (*model.named_parameters(), *model.named_buffers())}
        assert here.keys() == at_home.keys()
        assert not set(here.values()) & set(at_home.values())
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(), "tied weights go once"
        assert torch.equal(model(input_ids=ids).logits, expected)
        raise ZeroDivisionError  # an error in a forward leaves no copy behind
    assert {name: p.data_ptr() for name, p in (*model.named_parameters(), *model.named_buffers())} == at_home


def test_targets_of_an_offloaded_teacher_are_those_of_one_beside_the_student(tmp_path):
    """Their head is the copy that the forward used: what is kept of targets outlives it."""
    trainer = build(tmp_path)
    batch, teacher = trainer._prepare_inputs(make_batch(trainer)), trainer.teacher
    expected = teacher.targets(batch).scores
    home = teacher.module.lm_head.weight.data_ptr()
    teacher._offloaded = OffloadedWeights(teacher.module, CPU)
    found = teacher.targets(batch).scores
    assert torch.equal(found.logits(), expected.logits())
    assert found.head.weight.data_ptr() != home == teacher.module.lm_head.weight.data_ptr()
    with teacher.writing_model() as model:
        assert model.lm_head.weight.data_ptr() != home


# ---- what cannot be had ----------------------------------------------------------------------------------------------


def test_a_placement_that_cannot_be_had_is_refused_by_its_name(tmp_path):
    with pytest.raises(PreflightError, match=r"cpu_offload .*this run is on a CPU: remove it"):
        build(tmp_path, "cpu_offload")
    zero3 = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)), num_processes=2)
    for placement in ("replicated", "cpu_offload"):
        with pytest.raises(PreflightError, match=rf"{placement} is not available under DeepSpeed ZeRO-3.*Use auto"):
            LocalTeacher(tiny.make_qwen3(), placement).place(zero3)
    mapped = tiny.make_qwen3()
    mapped.hf_device_map = {"": "cpu"}
    with pytest.raises(PreflightError, match="the teacher has a device map, which has placed it already"):
        build_with(mapped, tmp_path)


def build_with(teacher, folder):
    return make_trainer(folder, tiny.make_qwen3(seed=1), teacher, teacher_placement="sharded")


def test_one_process_has_nothing_to_cut(tmp_path, caplog):
    assert not build(tmp_path, "sharded").teacher.in_pieces
    assert "sharded has no effect: there is one process" in caplog.text


def kinds_under_fsdp(folder, placement):
    """The wrapped student's and the teacher's class."""
    return train(folder, placement, sharding_on_a_cpu())[1:3]


@pytest.mark.slow
def test_a_teacher_stays_whole_beside_a_student_under_fsdp(tmp_path):
    assert in_two_ranks(kinds_under_fsdp, tmp_path, "replicated")[0] == ("FSDPQwen3ForCausalLM", "Qwen3ForCausalLM")
