"""Hidden-state KD: which layers, which positions, who learns, what is refused; `test_oracle.py` has its gradients."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from kdtrain.config import ConfigLoader
from kdtrain.config.hidden_kd import HiddenKdConfig, layer_number
from kdtrain.config.options import DistillationOptions
from kdtrain.errors import CheckpointError, ConfigError, NotAvailableError, PreflightError
from kdtrain.feature_kd.hidden import HiddenTerm
from kdtrain.feature_kd.hooks import _keepers
from kdtrain.feature_kd.layers import find_layers
from kdtrain.runs.fit import fit
from kdtrain.teachers import SelfTeacher, Teacher
from kdtrain.trainer import construction
from tests import tiny, tiny_families
from tests.test_trainer import ROWS, make_batch, make_trainer
from tests.test_vision_fit import Silent
from tests.tiny_vision import FAMILIES as VISION
from tests.tiny_vision import make_vlm

ON = {"targets": {"layer": [0.5, 1.0]}}
FAMILIES = sorted(tiny_families.FAMILIES.keys() - set(tiny_families.SEE_THE_FUTURE))


def hidden_of(model, ids, number):
    """[T, H]: the output of a layer, counted from 1, in float64."""
    model = model.double().eval()
    found = []
    layers = model.model.layers
    following = layers[number] if number < len(layers) else model.model.norm
    handle = following.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
    handle.remove()
    return found[0][0]


# ---- which layers ----------------------------------------------------------------------------------------------------


def test_a_depth_is_the_nearest_layer_a_half_upwards_and_at_least_the_first():
    assert [layer_number(depth, 12) for depth in (0.01, 0.33, 0.66, 0.7, 1.0)] == [1, 4, 8, 8, 12]
    assert [layer_number(0.5, layers) for layers in (1, 2, 3, 5)] == [1, 1, 2, 3]
    assert layer_number(0.285, 100) == 29  # 28.5, and a little less in floating point


@pytest.mark.parametrize("family", tiny.one_in(3, FAMILIES))
def test_the_layers_of_every_family_are_found_and_give_one_tensor_each(family):
    model = tiny_families.make(family)
    layers = find_layers(model, "student")
    shapes = []
    handles = [
        model.get_submodule(layers.tap(number + 1).path).register_forward_hook(
            lambda _, __, output: shapes.append((output[0] if isinstance(output, tuple) else output).shape)
        )
        for number in range(layers.count)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    for handle in handles:
        handle.remove()
    assert shapes == [(1, 4, layers.width)] * layers.count


@pytest.mark.parametrize("family", sorted(VISION))
def test_of_a_vision_language_model_they_are_those_of_the_language_model(family):
    layers = find_layers(make_vlm(family, vision=48), "student")
    assert (layers.count, layers.width) == (2, 64)
    assert "vis" not in layers.path


def test_a_model_whose_layers_cannot_be_told_is_refused_by_name():
    model = tiny.make_qwen3()
    model.config.num_hidden_layers = 7
    with pytest.raises(PreflightError, match=r"the teacher is a Qwen3ForCausalLM of model type 'qwen3'.*no list of 7"):
        find_layers(model, "teacher")


def test_layers_that_give_something_else_than_rows_of_hidden_states_are_refused(tmp_path, teacher):
    """XLNet's have tokens before rows: with as many of both, others would be compared than meant."""
    student = tiny_families.make("xlnet")
    term = HiddenTerm(HiddenKdConfig(targets={"layer": [1.0]}), student, teacher, Accelerator(cpu=True), 0)
    with pytest.raises(
        PreflightError, match=r"a layer of the student gave \[\(4, 1, 32\)\] in a forward, and one tensor"
    ):
        term.probe()
    assert student.training is False
    assert not len(_keepers)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": {"layer": []}}, "no layer to compare"),
        ({"targets": {"layer": [0.5, 0.5]}}, "listed twice"),
        ({"targets": {"layer": [0]}}, r"targets\.layer\[0\]: must be above 0"),
        ({"targets": {"layer": [1.5]}}, "must be at most 1"),
        ({"targets": {"layer": "all"}}, "expected depths"),
        ({"targets": {"layers": [1.0]}}, "unknown key 'layers'.*layer"),
        ({"distance": "l1"}, "expected one of mse, cosine"),
    ],
)
def test_a_wrong_option_is_an_error(wrong, message):
    with pytest.raises(ConfigError, match=message):
        DistillationOptions.from_args(type("Args", (), {"hidden_kd": wrong}))


def test_it_is_off_unless_it_is_switched_on_and_weighs_something():
    read = DistillationOptions.from_args
    for off in (HiddenKdConfig(), {"weight": 0}, {"enabled": False}, None):
        assert read(type("Args", (), {"hidden_kd": off})).hidden_kd is None
    options = read(type("Args", (), {"hidden_kd": {"targets": {"layer": 0.25}}, "llm_kd_weight": 0.0}))
    assert options.needs_teacher
    assert options.hidden_kd.names == ("hidden_kd_loss_layer_0.25",)
    assert not options.without_kd().needs_teacher


# ---- the term --------------------------------------------------------------------------------------------------------


def test_the_value_is_the_mean_over_supervised_tokens_and_layers(tmp_path, student):
    teacher = tiny.make_qwen3(seed=2, hidden=48, layers=5)
    trainer = make_trainer(tmp_path, student, teacher, llm_kd_weight=0.0, hidden_kd={"weight": 0.5, **ON})
    batch = make_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    logged = {name: values[-1].item() for name, values in trainer._metrics["train"].items() if "_kd" in name}
    ids, mask = batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"].bool()
    expected, tokens = [0.0, 0.0], int((batch.labels[:, 1:] != -100).sum())
    for level, (ours, theirs) in enumerate([(1, 3), (2, 5)]):
        linear = trainer.hidden.projectors[f"layer_{level}"]
        weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
        for row in range(len(ids)):
            s_TH, t_TH = (hidden_of(m, ids[row][mask[row]], n) for m, n in ((student, ours), (teacher, theirs)))
            for position in range(len(s_TH) - 1):
                if batch.labels[row, position + 1] != -100:
                    difference = weight @ s_TH[position] + bias - t_TH[position]
                    expected[level] += 0.5 / 2 * float(difference.square().mean()) / tokens
    assert logged == pytest.approx(
        {
            "hidden_kd_loss": sum(expected),
            "hidden_kd_loss_layer_0.5": expected[0],
            "hidden_kd_loss_layer_1": expected[1],
        },
        rel=1e-5,
    )
    ce = trainer._metrics["train"]["sft_loss"][-1].item()
    assert loss.item() == pytest.approx(ce + sum(expected), rel=1e-5)
    assert not len(_keepers)


def test_the_gradient_reaches_student_and_projectors_and_never_the_teacher(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, llm_kd_weight=0.0, hidden_kd=ON)
    trainer.compute_loss(trainer.model, make_batch(trainer)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.hidden.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    below = {name for name, p in student.named_parameters() if "layers.0" in name and p.grad.abs().sum() > 0}
    assert len(below) == len([name for name, _ in student.named_parameters() if "layers.0" in name])


def test_layers_of_models_that_checkpoint_the_whole_call_are_captured_once(tmp_path, student, teacher):
    """Some recompute a layer with its hooks: they fire again within backward."""
    plain = make_trainer(tmp_path / "a", student, teacher, llm_kd_weight=0.0, hidden_kd=ON)
    batch = make_batch(plain)
    plain.compute_loss(plain.model, batch).backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    for layer in student.model.layers:
        call = type(layer).__call__
        recomputing = type(
            "Recomputing",
            (type(layer),),
            {"__call__": lambda self, *a, call=call, **k: checkpoint(call, self, *a, use_reentrant=False, **k)},
        )
        layer.__class__ = recomputing
    plain.compute_loss(plain.model, batch).backward()
    for name, parameter in student.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


@pytest.mark.parametrize("weights", ["base", "ema"])
def test_the_student_itself_can_be_the_teacher(tmp_path, weights):
    """Its modules are those of the student: each forward's features are its own."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, None, extra={"teacher": SelfTeacher(weights), "peft_config": lora}, rows=ROWS,
        llm_kd_weight=0.0, hidden_kd=ON, max_steps=2,
    )  # fmt: skip
    assert not trainer.hidden.projectors
    trainer.train()
    first, second = (record["hidden_kd_loss"] for record in trainer.state.log_history if "hidden_kd_loss" in record)
    assert second > 0
    assert (first > 0) == (weights == "base")  # an average begins as the student itself
    assert not len(_keepers)


def test_layers_that_nothing_trained_leads_to_are_refused(tmp_path, student, teacher):
    top = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    with pytest.raises(PreflightError, match=r"hidden_kd: the student's features carry no gradient.*LoRA whose"):
        make_trainer(tmp_path, student, teacher, hidden_kd=ON, extra={"peft_config": top})


def test_several_depths_in_one_layer_are_warned_of(tmp_path, student, teacher, caplog):
    make_trainer(tmp_path, student, teacher, hidden_kd={})
    assert (
        "the student has 2 layers, so that several depths are the same layer of it: layers 1 to 1, 1 to 1, 2 to 2"
        in (caplog.text)
    )


# ---- a run -----------------------------------------------------------------------------------------------------------


def run(project, *changes, resume=None):
    """Train the project's config with hidden-state KD, and its records of training."""
    hidden = ["custom.hidden_kd.enabled=true", "custom.hidden_kd.targets.layer=[0.5,1.0]"]
    saving = ["training.save_strategy=steps", "training.save_steps=2"]
    arguments = ConfigLoader.load_training_config(project / "config.yaml", [*hidden, *saving, *changes])
    result = fit(arguments, Silent(), resume=resume)
    records = [json.loads(line) for line in (result.run_dir / "logging.jsonl").read_text().splitlines()]
    return result.run_dir, records


def test_a_run_trains_projectors_saves_them_beside_the_model_and_exports_the_student_alone(project):
    folder, records = run(project)
    first, last = (record for record in records if "loss" in record and record["step"] in (1, 4))
    assert last["hidden_kd_loss"] < first["hidden_kd_loss"]
    parts = [first["hidden_kd_loss_layer_0.5"], first["hidden_kd_loss_layer_1"]]
    assert first["hidden_kd_loss"] == pytest.approx(sum(parts), rel=1e-6)
    terms = ("llm_kd_loss", "sft_loss", "hidden_kd_loss")
    assert first["loss"] == pytest.approx(sum(first[term] for term in terms), rel=1e-6)
    assert first["grad_norm_hidden_kd"] > 0
    [evaluation] = [record for record in records if "eval_loss" in record]
    assert evaluation["eval_loss"] == pytest.approx(sum(evaluation[f"eval_{term}"] for term in terms), rel=1e-6)
    assert {
        name: tuple(value.shape) for name, value in load_file(folder / "hidden_projectors.safetensors").items()
    } == {f"layer_{level}.{name}": shape for level in (0, 1) for name, shape in (("weight", (48, 32)), ("bias", (48,)))}
    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())


def test_a_resumed_run_goes_on_with_its_projectors(project, tmp_path):
    whole, records = run(project)
    first = load_file(whole / "checkpoint-2" / "hidden_projectors.safetensors")
    (tmp_path / "part").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "part" / "checkpoint-2")
    part, again = run(project, f"training.output_dir={tmp_path / 'part'}", resume="auto")
    steps = {record["step"]: record for record in records if "loss" in record}
    resumed = {record["step"]: record for record in again if "loss" in record}
    assert resumed.keys() == {3, 4}
    for key in ("loss", "hidden_kd_loss", "grad_norm"):
        assert resumed[4][key] == pytest.approx(steps[4][key], rel=1e-6)
    for name, value in load_file(part / "hidden_projectors.safetensors").items():
        assert torch.equal(value, load_file(whole / "hidden_projectors.safetensors")[name])
        assert not torch.equal(value, first[name])


def test_a_checkpoint_without_the_projectors_is_refused(project, tmp_path):
    trainer = make_trainer(tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48), hidden_kd=ON)
    with pytest.raises(
        CheckpointError, match=r"projectors of this run's layers \(layer_0, layer_1\).*hidden_kd targets"
    ):
        trainer.hidden.load(tmp_path)


def test_depths_are_no_others_when_a_run_is_resumed(project):
    run(project, "training.max_steps=2")
    with pytest.raises(CheckpointError, match=r"custom\.hidden_kd\.targets\.layer"):
        run(project, "custom.hidden_kd.targets.layer=[1.0]", resume="auto")


def test_the_plan_names_the_layers(project):
    arguments = ConfigLoader.load_training_config(project / "config.yaml", ["custom.hidden_kd.enabled=true"])
    reporter = Silent()
    fit(arguments, reporter, dry_run=True)
    assert reporter.rows["loss"].endswith(
        "1 x hidden states, mse of layers 1 to 1, 1 to 1, 2 to 2 (of 2 and 2), projected from 32 to 48"
    )


@pytest.mark.parametrize("layout", [{"padding_free": True}, {"packing": True, "max_length": 96}])
def test_rows_behind_each_other_have_the_same_term(tmp_path, student, teacher, layout):
    found = []
    for options in ({}, layout):
        trainer = make_trainer(
            tmp_path, tiny.make_qwen3(seed=1), teacher, rows=ROWS, hidden_kd=ON, per_device_train_batch_size=4,
            train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        trainer.train()
        found.append([trainer.state.log_history[0][key] for key in ("hidden_kd_loss", "loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_evaluation_without_kd_has_no_such_term(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, hidden_kd=ON, eval_kd=False)
    trainer.eval_dataset = trainer.train_dataset
    assert not [key for key in trainer.evaluate() if "hidden" in key]


def test_a_teacher_that_is_no_model_here_is_refused(tmp_path, student, teacher):
    class Elsewhere(Teacher):
        vocab_size = 320

        def targets(self, batch):
            raise AssertionError

    with pytest.raises(ValueError, match="Hidden-state KD needs a teacher that is a model in this process"):
        make_trainer(tmp_path, student, hidden_kd=ON, extra={"teacher": Elsewhere()})


def test_fsdp_1_is_refused(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, hidden_kd=ON)
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    try:
        with pytest.raises(NotAvailableError, match="not available under FSDP 1"):
            construction.build_objective(trainer)
    finally:
        del trainer.accelerator.state.fsdp_plugin
