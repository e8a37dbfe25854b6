"""Students and teachers that bitsandbytes has quantised to 4 and 8 bit: their loss, gradients and targets are those of
a plain loop over the same weights, and what a run keeps of them can be read back.

Skipped without the `quant` extra, which `dev` has.
"""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from kdtrain import fit
from kdtrain.config.schema import TunerConfig
from kdtrain.errors import NotAvailableError, PreflightError
from kdtrain.models import quantization
from kdtrain.models.loading import load_model
from kdtrain.models.parts import count_parameters
from kdtrain.models.quantization import bits_of, kept_whole, quantized_names, refuse_fsdp
from kdtrain.preflight.optimizers import bytes_per_weight
from kdtrain.preflight.simulated import ModelSetup, Shape, simulate_step, weights_of
from kdtrain.teachers import build_teacher
from tests import test_cli, tiny
from tests.test_trainer import ROWS, make_args, make_batch, make_trainer
from tests.tiny_vision import make_vlm

bitsandbytes = pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
kdtrain = test_cli.kdtrain
BITS = ("4bit", "8bit")
QUANTIZED_HEAD = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["model.embed_tokens"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Folders of a student and a teacher, with heads of their own."""
    made = {
        "student": tiny.make_qwen3(seed=1, tie_word_embeddings=False),
        "teacher": tiny.make_qwen3(seed=2, hidden=64, tie_word_embeddings=False),
    }
    folder = tmp_path_factory.mktemp("quantized")
    return {name: tiny.save_model(model, tokenizer, folder / name) for name, model in made.items()}


def load(folder, bits=None, **kwargs):
    return load_model(folder, quantization=bits, dtype="float32", device=CPU, init_kwargs=kwargs)


def trainer_of(folder, student, teacher, **kwargs):
    torch.manual_seed(0)  # of the adapter
    adapter = tiny.lora_config(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    trainer = make_trainer(folder, student, teacher, extra={"peft_config": adapter}, sft_alpha=0.3, **kwargs)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # 0 at first, and then nothing of A would have a gradient
            nn.init.normal_(parameter, std=0.1)
    return trainer


def by_hand(student, teacher, batch):
    """0.3 · CE + JSD per supervised token, from the logits that both models give by themselves."""
    inputs, labels = batch.model_inputs, batch.labels
    with torch.no_grad():
        teacher_logits = teacher(**inputs, use_cache=False).logits
    logits, losses = student(**inputs, use_cache=False).logits, []
    for row in range(len(labels)):
        for t in range(labels.shape[1] - 1):
            if labels[row, t + 1] != -100:
                s, q = (x[row, t].double().log_softmax(-1) for x in (logits, teacher_logits))
                m = torch.logaddexp(s, q) - torch.log(torch.tensor(2.0).double())
                jsd = 0.5 * ((q.exp() * (q - m)).sum() + (s.exp() * (s - m)).sum())
                losses.append(jsd - 0.3 * s[labels[row, t + 1]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [
        (("4bit", {}), ("8bit", {})),
        (("8bit", {}), ("4bit", {})),
        ((None, {"quantization_config": QUANTIZED_HEAD}), (None, {"quantization_config": QUANTIZED_HEAD})),
        ((None, {"quantization_config": QUANTIZED_HEAD}), ("4bit", {})),
    ],
    ids=["4bit", "8bit", "heads that are quantised as well", "the student's head as well"],
)
def test_loss_and_gradients_are_those_of_a_plain_loop_over_the_same_weights(tmp_path, folders, of_student, of_teacher):
    bits, kwargs = of_student
    student = load(folders["student"], bits, **kwargs)
    teacher = load(folders["teacher"], of_teacher[0], **of_teacher[1])
    trainer = trainer_of(tmp_path, student, teacher)
    has_head = isinstance(student.get_output_embeddings(), bitsandbytes.nn.Linear4bit)
    assert has_head == bool(kwargs)
    assert trainer._objective.fused
    batch, model = trainer._prepare_inputs(make_batch(trainer)), trainer.model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}, "AdamW's updates are lost in bfloat16"
    loss = trainer.compute_loss(model, batch)
    gradients = torch.autograd.grad(loss, trained.values())
    expected = by_hand(model, teacher, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, found, wanted in zip(trained, gradients, torch.autograd.grad(expected, trained.values()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("bits", BITS)
def test_targets_of_a_quantised_teacher_are_what_the_model_says_by_itself(tmp_path, folders, bits):
    teacher = build_teacher(folders["teacher"], init_kwargs={"dtype": "float32"}, device=CPU, quantization=bits)
    assert bits_of(teacher.module) == bits
    whole = load(folders["teacher"])
    batch = make_batch(make_trainer(tmp_path, teacher=whole))
    found = teacher.targets(batch).scores.logits()
    own, of_whole = (
        model(**batch.model_inputs).logits[:, :-1][batch.labels[:, 1:] != -100] for model in (teacher.module, whole)
    )
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    assert (found - of_whole).norm() > 1e-3 * of_whole.norm(), "it is not quantised"
    assert count_parameters(teacher.module)[0] == count_parameters(whole)[0]


def test_bitsandbytes_does_nothing_by_the_processor_and_does_not_talk_at_every_product(folders, caplog, monkeypatch):
    """On processors with bf16 instructions a 4-bit layer that was evaluated would have no backward any more."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = load(folders["student"], "4bit")
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert {layer.weight.quant_state.nested for layer in layers} == {True}
    with caplog.at_level(logging.WARNING):
        load(folders["student"], "8bit")(input_ids=torch.tensor([[5, 6]]))
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert [record.message for record in caplog.records if "MatMul8bitLt" in record.message] == []
    assert "something else" in caplog.text


def test_the_vision_encoder_the_projector_and_the_head_stay_whole():
    model = make_vlm("llava")
    assert kept_whole(model) == ["lm_head", "model.multi_modal_projector", "model.vision_tower"]
    assert quantized_names(model) == {
        name
        for name, _ in model.named_parameters()
        if name.startswith("model.language_model.layers.") and name.endswith("proj.weight")
    }


# ---- runs ------------------------------------------------------------------------------------------------------------

QLORA = (
    "model.quantization=4bit", "tuner.train_type=lora", "rlhf.teacher.quantization=8bit", "training.report=false",
    "training.learning_rate=1e-2", "training.save_strategy=steps", "training.save_steps=2",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_is_resumed_bit_by_bit_evaluated_and_exported_into_whole_weights(project, kdtrain):
    fit("config.yaml", [*QLORA, "training.output_dir=whole"])
    shutil.copytree("whole", "half")
    shutil.rmtree("half/checkpoint-4")
    fit("config.yaml", [*QLORA, "training.output_dir=half"], resume="half/checkpoint-2")
    ours, resumed = (load_file(f"{run}/adapter_model.safetensors") for run in ("whole", "half"))
    assert ours.keys() == resumed.keys()
    assert all(torch.equal(ours[name], resumed[name]) for name in ours)
    assert kdtrain("evaluate", "whole")[0] == 0
    assert kdtrain("export", "whole", "out")[0] == 0
    exported = AutoModelForCausalLM.from_pretrained("out")
    merged = AutoModelForCausalLM.from_pretrained("student")
    merged.load_adapter("whole")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(exported(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert not hasattr(exported.config, "quantization_config")
    assert "4bit" in (project / "out" / "README.md").read_text()


def train_ddp(folder, folders, ranks):
    student, teacher = load(folders["student"], "4bit"), load(folders["teacher"], "4bit")
    trainer = trainer_of(
        folder, student, teacher, rows=ROWS, optim="sgd", max_grad_norm=1e9, learning_rate=0.1, max_steps=2,
        train_sampling_strategy="sequential", per_device_train_batch_size=len(ROWS) // ranks,
    )  # fmt: skip
    trainer.train()
    return [record[key] for record in trainer.state.log_history if "loss" in record for key in ("loss", "grad_norm")]


def test_quantised_models_on_two_ranks_equal_one_process(tmp_path, folders):
    expected = train_ddp(tmp_path / "one", folders, 1)
    for numbers in tiny.run_ranks(train_ddp, 2, tmp_path / "two", folders, 2):
        assert numbers == pytest.approx(expected, rel=1e-5)


# ---- what is planned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_the_plan_counts_quantised_weights_as_they_lie_in_memory(tmp_path, tokenizer, bits):
    model = tiny.make_qwen3(hidden=128, layers=3)
    folder = tiny.save_model(model, tokenizer, tmp_path / "model")
    found = load(folder, bits)
    states = [p.quant_state for p in found.parameters() if hasattr(p, "quant_state")]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    planned, _ = weights_of(ModelSetup(model.config, torch.float32, quantization=bits))
    assert planned == pytest.approx(sum(p.nbytes for p in found.parameters()) + scales, rel=0.01)


def test_the_plan_of_a_qlora_step_is_what_one_takes():
    """Adapters and their gradients are those on whole weights."""
    config = tiny.make_qwen3(hidden=128, layers=2).config
    lora, shape = TunerConfig(train_type="lora", lora_rank=4), Shape(2, 32, on_cpu=True)
    whole, quantized = (
        simulate_step(ModelSetup(config, torch.float32, quantization=bits), lora, shape) for bits in (None, "4bit")
    )
    assert quantized.trained == whole.trained
    largest = 2 * 128 * 128 * 4
    assert quantized.peak == whole.peak + largest, "one weight is expanded at a time"
    assert quantized.weights < 0.5 * whole.weights
    assert quantized.adapted == ()


OPTIMIZERS = ("adamw_bnb_8bit", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit", "rmsprop_bnb_8bit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_what_an_optimizer_keeps(tmp_path, dtype):
    for name in (*OPTIMIZERS, "adamw_torch", "sgd", "adagrad", "rmsprop"):
        layer = nn.Linear(128, 128, bias=False).to(dtype)
        made, kwargs = Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, optim=name))
        optimizer = made(layer.parameters(), **kwargs)
        layer(torch.ones(2, 128, dtype=dtype)).sum().backward()
        optimizer.step()
        kept = optimizer.state[layer.weight].items()
        found = sum(v.nbytes for key, v in kept if isinstance(v, torch.Tensor) and not key.startswith("qmap"))
        assert found / layer.weight.numel() == pytest.approx(bytes_per_weight(name, dtype.itemsize), abs=1e-3), name


# ---- what cannot be had ----------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_or_quantised_is_refused(tmp_path, folders, monkeypatch):
    quantized = load(folders["student"], "4bit")
    with pytest.raises(PreflightError, match=r"quantised \(4bit\) and have no gradients.*tuner.train_type: lora"):
        make_trainer(tmp_path, quantized, load(folders["teacher"]))
    copy = tiny.lora_config(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(PreflightError, match="modules_to_save: 'up_proj' has quantised weights"):
        make_trainer(tmp_path, quantized, load(folders["teacher"]), extra={"peft_config": copy})
    under_fsdp = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=object()))
    with pytest.raises(NotAvailableError, match=r"under FSDP, which cannot cut such weights.* Use plain data paral"):
        refuse_fsdp(quantized, under_fsdp)
    monkeypatch.setattr(quantization, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(NotAvailableError, match=r"ZeRO-3 cannot cut such weights into pieces. Use ZeRO-2"):
        load(folders["student"], "4bit")
    monkeypatch.undo()
    quantized.save_pretrained(tmp_path / "quantized")
    with pytest.raises(PreflightError, match=r"are quantised already .* Remove the option quantization"):
        load(str(tmp_path / "quantized"), "8bit")
