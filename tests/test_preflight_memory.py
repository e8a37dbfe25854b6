"""The memory plan: what is simulated is what real tensors take, what is counted is what a formula says, and the changes
that are named do what is said of them."""

import dataclasses
import json

import pytest
import torch
from peft import get_peft_model
from transformers.integrations import deepspeed as hf_deepspeed

from kdtrain.config import ConfigLoader
from kdtrain.config.arguments import build_train_arguments
from kdtrain.config.schema import TunerConfig
from kdtrain.disk import in_units
from kdtrain.generation.batching import CALL_BYTES, DRAW_BYTES
from kdtrain.losses.fused import head_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.losses.tile import TileOptions
from kdtrain.losses.workspace import workspace
from kdtrain.models.loss_head import add_loss_head
from kdtrain.models.tuning import adapter_config
from kdtrain.preflight import memory, resources, run_setup, simulated
from kdtrain.preflight.memory import Setup, Writing, plan_memory
from kdtrain.preflight.remedies import remedies
from kdtrain.preflight.resources import disk_findings, memory_findings, surely_fits
from kdtrain.preflight.run_setup import setup_of
from kdtrain.preflight.sharding import Sharding
from kdtrain.preflight.simulated import ModelSetup, NotSimulated, Shape, simulate_step
from tests import tiny

FULL, LORA = TunerConfig(), TunerConfig(train_type="lora", lora_rank=4)
MIB = 2**20


def model_setup(**sizes):
    return ModelSetup(tiny.make_qwen3(**{"hidden": 64, "layers": 2, **sizes}).config, torch.float32)


def setup(tuner=FULL, **changes):
    """A run of small models, whose numbers stand in `changes` where they matter."""
    shape = Shape(4, 48, micro_batches=2, teacher_width=48, on_cpu=True)
    made = Setup(model_setup(), model_setup(hidden=48), tuner, shape, per_device_rows=4, teacher_rows=4)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def linear(monkeypatch):
    """In place of simulations: a step that takes so much a token, half with checkpointing, and a forward that does."""

    def step(student, tuner, shape):
        weights, trained = simulated.student_sizes(student, tuner)
        activations = shape.rows * shape.length * (2**12 if shape.checkpointing else 2**13)
        return simulated.Step(weights, trained, weights, activations, activations + trained, 0, ())

    monkeypatch.setattr(memory, "simulate_step", step)
    monkeypatch.setattr(memory, "simulate_inference", lambda model, shape: shape.rows * shape.length * 2**9)


# ---- what is simulated -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [tiny.slow(False), True], ids=["", "checkpointing"])
def test_a_simulated_step_takes_what_a_real_one_takes(tuner, checkpointing):
    shape = Shape(4, 48, micro_batches=2, teacher_width=48, checkpointing=checkpointing, on_cpu=True)
    step = simulate_step(model_setup(), tuner, shape)
    weights, peak = real_step(tuner, checkpointing, shape)
    assert step.weights == weights
    assert step.peak == pytest.approx(peak, rel=0.05)
    assert step.forward < step.peak


def real_step(tuner, checkpointing, shape):
    """Bytes of the weights, and beside them at the peak, of real forwards and backwards with the loss of a run."""
    model = tiny.make_qwen3(hidden=64)
    add_loss_head(model)
    adapter = adapter_config(tuner, model)
    model = model if adapter is None else get_peft_model(model, adapter)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = sum(p.nbytes for p in model.parameters())
    ids = torch.randint(4, 300, (shape.rows, shape.length))
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0  # a batch that has padding
    labels, rows = ids[:, 1:].reshape(-1), ids.shape[0] * (ids.shape[1] - 1)
    options = TileOptions(1.0, 0.0, 0.5, 1.0, "jsd", "bucket")
    of_teacher = tiny.make_qwen3(seed=2, hidden=48).get_output_embeddings().weight.detach()
    teacher = torch.randn(rows, 48), Head(of_teacher, None, 1.0, None)

    def loss_head(hidden, head, outputs):
        hidden_SH = hidden[:, :-1].flatten(0, 1)[torch.arange(rows)]
        return (head_distillation_loss(hidden_SH, head, labels, options, *teacher).loss,)

    def once():
        model(input_ids=ids, attention_mask=mask, use_cache=False, loss_head=loss_head)[0].backward()

    once()  # whose gradients stay, and the loss's buffers
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    there = [*model.parameters(), *model.buffers(), *gradients, *workspace._kept.values(), of_teacher, teacher[0], ids]
    with simulated._LiveBytes() as live:
        for tensor in there:
            live._add(tensor.untyped_storage())
        before = live.now
        once()
    return weights, live.peak - before + sum(gradient.nbytes for gradient in gradients)


def test_memory_is_not_taken_and_no_weight_is_read():
    huge = tiny.make_qwen3().config
    huge.update({"hidden_size": 8192, "intermediate_size": 28672, "head_dim": 128})
    huge.update({"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 150_000})
    step = simulate_step(ModelSetup(huge, torch.bfloat16), FULL, Shape(8, 4096, checkpointing=True))
    per_layer = 8192 * (64 * 128 * 2 + 8 * 128 * 2 + 3 * 28672) + 2 * 8192 + 2 * 128
    assert step.weights == 2 * (2 * per_layer + 8192 * 150_000 + 8192)
    assert step.peak > step.trained


def test_code_that_needs_numbers_is_said_and_no_figure_is_made_up(monkeypatch):
    def reads(*_, **__):
        return torch.ones(3).sum().item()

    monkeypatch.setattr(simulated, "_loss", reads)
    with pytest.raises(NotSimulated):
        plan_memory(setup())
    (finding,) = memory_findings(setup(), 10 * MIB)
    assert finding.level == "info"
    assert "is not known" in finding.message
    assert "--dry-run" in finding.hint


# ---- what is counted -------------------------------------------------------------------------------------------------


class Zero3:
    """What transformers keeps of a run of ZeRO-3, which then cuts each model into pieces as it is made."""

    def is_zero3(self):
        return True


def test_a_run_of_zero_3_is_planned_too():
    made, running = setup(shape=Shape(2, 16, on_cpu=True)), Zero3()
    expected = plan_memory(made).parts
    hf_deepspeed.set_hf_deepspeed_config(running)
    try:
        assert plan_memory(made).parts == expected
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()


def test_weights_gradients_and_optimizer_are_those_of_the_parameters():
    student, teacher = tiny.make_qwen3(hidden=64), tiny.make_qwen3(hidden=48)
    plan = plan_memory(setup())
    size = 4 * sum(p.numel() for p in student.parameters())
    assert plan.parts["student"] == plan.parts["gradients"] == plan.parts["optimizer"] / 2 == size
    assert plan.parts["teacher"] == 4 * sum(p.numel() for p in teacher.parameters())
    assert plan.total == max(plan.phases.values())
    assert plan_memory(setup(optimizer="adafactor")).parts.get("optimizer") is None


def test_an_adapter_alone_has_gradients_and_states():
    plan = plan_memory(setup(LORA))
    adapted = get_peft_model(tiny.make_qwen3(hidden=64), adapter_config(LORA, tiny.make_qwen3()))
    own = 4 * sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert plan.parts["gradients"] == own
    assert plan.parts["optimizer"] == 2 * own
    assert plan_memory(setup(LORA, moving_average=True)).parts["moving average"] == own


def test_answers_take_keys_values_the_draw_and_a_copy_of_what_is_merged():
    writing = Writing(rows=8, rows_per_call=None, prompt=16, new_tokens=32)
    plan = plan_memory(setup(LORA, student_writes=writing))
    per_token = 2 * 2 * 1 * 16 * 4  # keys and values, layers, heads, their size, float32
    assert plan.parts["KV cache"] == 8 * 48 * per_token
    assert plan.parts["drawing tokens"] == 8 * DRAW_BYTES * 320
    linear = 4 * (64 * (2 * 16 * 2 + 2 * 16) + 3 * 64 * 128)  # q, o; k, v; the three of the MLP
    assert plan.parts["copy for merging"] == 2 * linear + 4 * 64 * 128  # and one layer's difference
    in_calls = dataclasses.replace(writing, rows_per_call=2)
    assert plan_memory(setup(LORA, student_writes=in_calls)).parts["KV cache"] == 2 * 48 * per_token
    many = dataclasses.replace(writing, rows=10**9)
    assert plan_memory(setup(LORA, student_writes=many)).parts["KV cache"] < CALL_BYTES


@pytest.mark.parametrize(
    ("kind", "weights", "gradients", "optimizer"),
    [("ddp", 1, 0.5, 1), ("zero1", 1, 1, 4), ("zero2", 1, 4, 4), ("zero3", 4, 4, 4), ("fsdp", 4, 1, 4)],
)
def test_devices_share_what_their_way_of_sharding_says(linear, kind, weights, gradients, optimizer):
    alone = plan_memory(setup()).parts
    each = plan_memory(setup(world=4, sharding=Sharding(kind))).parts
    assert each["student"] == alone["student"] // weights
    assert each["teacher"] == alone["teacher"] // weights
    # DDP has them once more, in buckets; FSDP whole, from the first of two micro-batches to the second.
    assert each["gradients"] == alone["gradients"] // gradients
    copy = alone["student"] if kind.startswith("zero") else 0  # DeepSpeed's, in float32
    assert each["optimizer"] == (alone["optimizer"] + copy) // optimizer


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_the_changes_are_the_cheapest_and_bring_it_below_the_limit(linear):
    run = setup(shape=Shape(8, 64, micro_batches=2, teacher_width=48), per_device_rows=8, teacher_rows=8)
    total = plan_memory(run).total
    (one,) = remedies(run, int(0.9 * total), memory.Simulations())
    assert one.text.startswith("training.gradient_checkpointing: true")
    checkpointed = dataclasses.replace(run, shape=dataclasses.replace(run.shape, checkpointing=True))
    assert one.total == plan_memory(checkpointed).total <= 0.9 * total
    found = remedies(run, 1, memory.Simulations())  # all that help
    assert [one.text.split(":")[0] for one in found] == [
        "training.gradient_checkpointing",
        "training.per_device_train_batch_size",
        "rlhf.teacher.dtype",
        "rlhf.teacher.placement",
        "training.optim",
        "the teacher from a cache (kdtrain cache, rlhf.teacher.backend",
        "tuner.train_type",
        "model.quantization",
    ]
    assert [one.total for one in found] == sorted((one.total for one in found), reverse=True)


def test_a_run_that_cannot_fit_is_an_error_on_a_gpu_and_a_warning_where_it_may(linear):
    on_gpu = setup(shape=dataclasses.replace(setup().shape, on_cpu=False))
    total = plan_memory(on_gpu).total
    for limit, level in ((total, "info"), (int(total / 1.1), "warning"), (int(total / 1.2), "error")):
        (finding,) = memory_findings(on_gpu, limit)
        assert finding.level == level
        assert in_units(total) in finding.message
        assert ("gradient_checkpointing: true" in finding.hint) == (level != "info")
    (finding,) = memory_findings(setup(), 1)
    assert finding.level == "warning"  # a CPU can swap
    assert finding.hint.startswith("Not enough")


@pytest.mark.parametrize(
    "changes", [tiny.slow({}), {"student_writes": Writing(8, None, 16, 32)}], ids=["", "on-policy"]
)
def test_what_surely_fits_is_more_than_what_is_planned(changes):
    run = setup(**changes, shape=Shape(4, 128, micro_batches=2, teacher_width=48, on_cpu=True))
    assert not surely_fits(run, plan_memory(run).total)
    assert surely_fits(run, 64 * 2**30)


def test_disk_for_checkpoints_is_compared_with_what_is_free(monkeypatch, tmp_path, project):
    def found(free, *overrides):
        monkeypatch.setattr(resources, "free_disk", lambda folder: free)
        config = ConfigLoader.load(project / "config.yaml", overrides)
        args = build_train_arguments(config).training_args
        (finding,) = disk_findings(setup(), args, tmp_path / "run", steps=100)
        return finding

    model = 4 * sum(p.numel() for p in tiny.make_qwen3(hidden=64).parameters())
    every = ["training.max_steps=100", "training.save_steps=10", "training.save_strategy=steps"]
    needed = 4 * 3 * model + model  # three that are kept and one that is written, with the optimizer's states
    kept = [*every, "training.save_total_limit=3"]
    assert found(needed, *kept).level == "info"
    finding = found(needed - 1, *kept)
    assert finding.level == "error"
    assert "4 checkpoints" in finding.message
    assert "save_total_limit: 1" in finding.hint
    assert found(4 * model + model, *kept, "training.save_only_model=true").level == "info"
    assert found(model, "training.save_strategy=no").level == "info"
    assert found(model - 1, "training.save_strategy=no").level == "error"
    # A run that is resumed: what its checkpoints take is its own.
    state = tmp_path / "run" / "checkpoint-90" / "global_step90" / "states.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(bytes(4096))
    assert found(needed - 4096, *kept).level == "info"
    assert found(needed - 4097, *kept).level == "error"


# ---- from a config ---------------------------------------------------------------------------------------------------


def setup_for(project, *overrides, **options):
    config = ConfigLoader.load(project / "config.yaml", list(overrides))
    return setup_of(config, build_train_arguments(config).training_args, **options)


def test_a_config_says_what_is_planned(project):
    made = setup_for(
        project, "rlhf.lmbda=0.5", "rlhf.max_new_tokens=8", "rlhf.samples_per_prompt=2", "rlhf.seq_kd=true",
        "training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=2", longest=40,
    )  # fmt: skip
    assert made.student.config.hidden_size == 32
    assert made.teacher.config.hidden_size == made.shape.teacher_width == 48
    assert made.shape == Shape(6, 40, 2, teacher_width=48, on_cpu=True)
    assert made.student_writes == Writing(12, None, 32, 8)
    assert made.teacher_writes == Writing(6, None, 32, 8)
    best = setup_for(project, "rlhf.lmbda=0.5", "rlhf.samples_per_prompt=2", "rlhf.select=best")
    assert best.shape.rows == best.teacher_rows / 2
    assert setup_for(project, "rlhf.llm_kd_weight=0").teacher is None


def test_the_largest_of_several_teachers_is_planned_with_and_one_that_cannot_be_built_is_no_error(
    project, tokenizer, monkeypatch
):
    tiny.save_model(tiny.make_qwen3(hidden=80), tokenizer, project / "large")
    teachers = {
        "small": {"teacher_model": str(project / "teacher")},
        "large": {"teacher_model": str(project / "large")},
    }
    several = ["rlhf.teacher_model=null", f"rlhf.teachers={json.dumps(teachers)}"]
    made = setup_for(project, *several)
    assert made.teacher.config.hidden_size == 80
    assert [one.config.hidden_size for one, _ in made.other_teachers] == [48]

    def refuse(*args, **kwargs):
        raise NotSimulated("its code needs numbers")

    monkeypatch.setattr(run_setup, "weights_of", refuse)
    assert len(setup_for(project, *several).other_teachers) == 1


def test_a_gpu_that_is_not_here_is_planned_in_half_precision(project):
    made = setup_for(project, on_cpu=False)
    assert made.shape.autocast == torch.bfloat16
    assert made.student.dtype == torch.float32  # all of its weights are trained
    assert setup_for(project, "training.bf16=false", on_cpu=False).shape.autocast is None


# ---- where the teacher lies ------------------------------------------------------------------------------------------


def test_the_plan_has_the_teacher_where_it_lies(linear):
    """In pieces a share, and its head whole; offloaded only in its own forward, and its head with the targets."""
    on_gpu = dataclasses.replace(setup().shape, on_cpu=False)
    plans = {
        placement: plan_memory(setup(world=4, shape=on_gpu, placement=placement))
        for placement in ("auto", "sharded", "cpu_offload")
    }
    whole = plans["auto"].parts["teacher"]
    head = 320 * 48 * 4
    assert plans["sharded"].parts["teacher"] == whole // 4
    assert plans["sharded"].parts["the teacher's head"] == head
    assert plans["cpu_offload"].parts["teacher"] == whole
    training = {placement: plan.phases["training"] for placement, plan in plans.items()}
    assert training["cpu_offload"] == training["auto"] - whole + head
    forward = {placement: plan.phases["the teacher's forward"] for placement, plan in plans.items()}
    assert forward["cpu_offload"] == forward["auto"]
    quantized = dataclasses.replace(setup().teacher, quantization="4bit")
    assert setup(world=4, teacher=quantized, sharding=Sharding("fsdp")).teacher_pieces == 1
    assert setup(world=4, sharding=Sharding("fsdp"), placement="replicated").teacher_pieces == 1


def test_a_teacher_that_is_too_large_is_cut_into_pieces_or_offloaded(linear):
    shape = dataclasses.replace(setup().shape, rows=1, length=2**14, checkpointing=True, on_cpu=False)
    large = setup(LORA, shape=shape, per_device_rows=1, teacher_rows=1, optimizer="adamw_8bit")
    large = dataclasses.replace(large, teacher=model_setup(hidden=512, layers=6))
    on_cpu = dataclasses.replace(large, shape=dataclasses.replace(shape, on_cpu=True))
    for run, way_out in (
        (dataclasses.replace(large, world=4), "rlhf.teacher.placement: sharded"),
        (large, "rlhf.teacher.placement: cpu_offload"),
        (on_cpu, "rlhf.teacher.quantization: 4bit"),
    ):
        # Half precision would do on a GPU: this teacher has it already.
        run = dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, dtype=torch.bfloat16))
        found = remedies(run, plan_memory(run).total - 2**20, memory.Simulations())
        assert [one.text.partition(" (")[0] for one in found] == [way_out]


def test_lines_are_planned_as_long_as_they_may_be(project):
    size = ["training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=2"]
    joined = setup_for(project, *size, "data.padding_free=true", longest=40).shape
    assert (joined.ids, joined.in_lines) == ((1, 120), True)
    packed = setup_for(project, *size, "data.packing=true", longest=40).shape
    assert packed.ids == (3, 64)  # six rows of 40 in lines of max_length: four lines, three at a time
    assert setup_for(project, *size, "data.packing=true", longest=8).shape.ids == (1, 48)
    bounded = setup_for(project, *size, "training.per_device_train_tokens=100", longest=40)
    assert bounded.shape.ids == (2, 40)
    assert bounded.teacher_rows == 2
    both = setup_for(project, *size, "training.per_device_train_tokens=100", "data.padding_free=true", longest=40).shape
    assert both.ids == (1, 80)


def test_attention_over_a_long_line_takes_more_than_over_its_rows(project):
    eager = ["training.per_device_train_batch_size=8", "model.attn_implementation=eager"]
    rows = plan_memory(setup_for(project, *eager, longest=64))
    line = plan_memory(setup_for(project, *eager, "data.padding_free=true", longest=64))
    assert line.parts["activations"] > 2 * rows.parts["activations"]
