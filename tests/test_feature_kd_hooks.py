"""Features are captured on the forwards that run anyway: all of them, once, and nothing stays behind."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kdtrain.errors import PreflightError
from kdtrain.feature_kd.hooks import _keepers, capture, tapped
from kdtrain.feature_kd.term import feature_terms
from kdtrain.models.layouts import Tap
from tests.tiny import run_ranks
from tests.tiny_vision import gradients, make_inputs, make_vlm, reference_features, run_visual, visual_knobs

OUTPUT = {"aligner": [Tap("layer", "output")]}


class Net(torch.nn.Module):
    def __init__(self, returns=lambda x: x):
        super().__init__()
        self.first, self.layer, self.returns = torch.nn.Linear(4, 4), Layer(returns), returns

    def forward(self, x, repeat=1):
        for _ in range(repeat):
            x = self.first(x)
            self.layer(x)
        return x


class Layer(torch.nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.linear, self.returns = torch.nn.Linear(4, 4), returns

    def forward(self, x=None, keyword=None):
        return self.returns(self.linear(x if keyword is None else keyword))


def hooks_of(model):
    """How many hooks each module has. Transformers leaves some of its own behind after a first forward."""
    found = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    return {name: count for name, count in found.items() if count}


# ---- passes ----------------------------------------------------------------------------------------------------------


def test_several_passes_in_one_forward_are_kept_in_order():
    net = Net()
    with capture(net, OUTPUT, "student") as features:
        net(torch.randn(2, 4), repeat=3)
    assert len(features["aligner"]) == 1
    assert len(features["aligner"][0]) == 3
    assert not torch.equal(features["aligner"][0][0], features["aligner"][0][1])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_images_and_a_video_of_one_batch_are_both_compared(family):
    student, teacher = make_vlm(family, seed=1), make_vlm(family, seed=2)
    inputs = make_inputs(student, video=True)
    loss = run_visual(visual_knobs("aligner"), student, teacher, inputs)["vision_kd_loss"]
    passes = []
    for model in (student, teacher):
        images = reference_features(model, inputs)["aligner"][0]
        video = model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"]).pooler_output
        passes.append(torch.cat([images, video]))
    assert len(passes[0]) == 4 + 8 + 8  # merged tokens of two images, and of two frames
    assert loss.item() == pytest.approx((passes[0] - passes[1]).square().mean().item(), rel=1e-5)


def test_modules_inside_a_checkpointed_block_are_captured_once_even_when_backward_runs_inside():
    for reentrant in (False, True):
        net = Net()
        x = torch.randn(2, 4, requires_grad=True)
        with capture(net, OUTPUT, "student") as features:
            checkpoint(lambda x, net=net: net.layer(net.first(x)), x, use_reentrant=reentrant).sum().backward()
        assert len(features["aligner"][0]) == 1
        assert net.first.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "gemma3", "smolvlm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    found = []
    for checkpointing in (False, True):
        student, teacher = make_vlm(family, seed=1).train(), make_vlm(family, seed=2)
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": reentrant})
        visual = visual_knobs("vit", "aligner")
        inputs = make_inputs(teacher)
        with tapped(visual, student, teacher) as (ours, theirs):
            with torch.no_grad():
                teacher(**inputs)
            ce = student(**inputs, use_cache=False).loss
            terms = feature_terms(visual, ours, theirs, 1.0)
            (ce + terms["vision_kd_loss"]).backward()
            assert [len(passes) for levels in ours.values() for passes in levels] == [1, 1]
        found.append((terms["vision_kd_loss"].item(), gradients(student)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1].keys() == found[0][1].keys()
    for name, norm in found[0][1].items():
        assert found[1][1][name] == pytest.approx(norm, rel=1e-3, abs=1e-6), name


# ---- ways out --------------------------------------------------------------------------------------------------------


def test_hooks_are_gone_afterwards():
    student, teacher = make_vlm("qwen3_vl", seed=1), make_vlm("qwen3_vl", seed=2)
    visual = visual_knobs("vit", "aligner", "deepstack")
    with tapped(visual, student, teacher):
        mergers = ["model.visual.merger", *(f"model.visual.deepstack_merger_list.{i}" for i in (0, 1))]
        assert hooks_of(student) == hooks_of(teacher) == dict.fromkeys(mergers, 1)
    run_visual(visual, student, teacher, make_inputs(student))
    assert hooks_of(student) == hooks_of(teacher) == {}
    assert not len(_keepers)


def test_hooks_are_gone_after_an_exception_in_a_forward():
    student, teacher = make_vlm("llava", seed=1), make_vlm("llava", seed=2)
    inputs = make_inputs(student)
    student(**inputs)
    before = hooks_of(student)
    inputs["input_ids"][:, 5] = 5  # fewer image tokens than features: fails behind the vision path
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        run_visual(visual_knobs("aligner"), student, teacher, inputs)
    assert hooks_of(student) == before
    assert "model.multi_modal_projector" not in before | hooks_of(teacher)
    assert not len(_keepers)


def test_no_hook_stays_where_the_teacher_lacks_the_module():
    student, teacher = make_vlm("llava", seed=1), make_vlm("llava", seed=2)
    with (
        pytest.raises(PreflightError, match="teacher has no module 'nowhere'"),
        tapped(visual_knobs("aligner", teacher_module="nowhere"), student, teacher),
    ):
        pass
    assert not hooks_of(student)
    assert not len(_keepers)


# ---- what is no feature ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returns", "came"), [(lambda x: {"x": x}, "dict"), (lambda x: None, "NoneType"), (lambda x: ((x,),), "tuple")]
)
def test_an_output_without_a_tensor_is_an_error_that_says_what_came(returns, came):
    net = Net(returns)
    for explicit in (False, True):
        taps = {"aligner": [Tap("layer", "output", explicit)]}
        with (
            pytest.raises(PreflightError, match=rf"'aligner'.*student's module 'layer' \({came}\).*student_module"),
            capture(net, taps, "student"),
        ):
            net(torch.randn(2, 4))
    assert not hooks_of(net)


def test_of_an_explicit_module_that_returns_a_tuple_the_first_is_taken():
    net = Net(lambda x: (x, 2 * x))
    with capture(net, {"aligner": [Tap("layer", "output", True)]}, "student") as features:
        net(torch.randn(2, 4))
    assert features["aligner"][0][0].shape == (2, 4)


def test_an_input_that_came_as_a_keyword_is_an_error():
    net = Net()
    with (
        pytest.raises(PreflightError, match=r"'vit'.*input of the teacher's.*0 positional arguments"),
        capture(net, {"vit": [Tap("layer", "input")]}, "teacher"),
    ):
        net.layer(keyword=torch.randn(2, 4))


def test_one_module_in_both_models_is_an_error():
    model = make_vlm("llava")
    with (
        pytest.raises(PreflightError, match="same module in student and teacher"),
        tapped(visual_knobs("aligner"), model, model),
    ):
        pass
    assert not hooks_of(model)
    assert not len(_keepers)


# ---- terms that cannot teach -----------------------------------------------------------------------------------------


def test_a_frozen_encoder_cannot_be_taught():
    student, teacher = make_vlm("qwen3_vl", seed=1), make_vlm("qwen3_vl", seed=2)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("merger" in name)
    inputs = make_inputs(student)
    with pytest.raises(PreflightError, match=r"'vit'.*no gradient.*tuner.freeze_vit.*remove the target"):
        run_visual(visual_knobs("vit"), student, teacher, inputs)
    run_visual(visual_knobs("aligner", "deepstack"), student, teacher, inputs)["vision_kd_loss"].backward()
    assert gradients(student)
    with torch.no_grad():  # an evaluation teaches nothing, and need not
        run_visual(visual_knobs("vit"), student, teacher, inputs)


def test_a_graph_that_reentrant_checkpointing_cuts_is_an_error():
    student, teacher = make_vlm("llava", seed=1).train(), make_vlm("llava", seed=2)
    student.gradient_checkpointing_enable({"use_reentrant": True})
    path = "model.vision_tower.encoder.layers.0.mlp"
    visual = visual_knobs("vit", student_module=path, teacher_module=path)
    with pytest.raises(PreflightError, match=r"'vit'.*no gradient.*use_reentrant: false"):
        run_visual(visual, student, teacher, make_inputs(teacher))


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "compiled_before"), [("llava", True), ("qwen3_vl", False)])
def test_a_compiled_student_is_taught_on_every_step(family, compiled_before):
    """Also where its graph was made by a forward without hooks, and after steps with and without them."""
    torch._dynamo.reset()
    student, teacher = make_vlm(family, seed=1), make_vlm(family, seed=2)
    compiled = torch.compile(student, backend="aot_eager")
    visual = visual_knobs("vit", "aligner")
    if compiled_before:
        compiled(**make_inputs(student))
    for step in range(3):
        inputs = make_inputs(teacher, seed=step)
        student.zero_grad()
        expected = run_visual(visual, student, teacher, inputs)["vision_kd_loss"]
        expected.backward()
        wanted = gradients(student)
        student.zero_grad()
        loss = run_visual(visual, compiled, teacher, inputs)["vision_kd_loss"]
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        found = gradients(student)
        assert found.keys() == wanted.keys()
        assert all(found[name] == pytest.approx(norm, rel=1e-2, abs=1e-5) for name, norm in wanted.items())
        compiled(**inputs)  # without hooks: nothing is kept


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _rank_gradients(family):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    student, teacher = make_vlm(family, seed=1), make_vlm(family, seed=2)
    wrapped = torch.nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
    inputs = make_inputs(teacher, seed=rank)
    visual = visual_knobs("vit", "aligner")
    with tapped(visual, wrapped, teacher) as (ours, theirs):
        with torch.no_grad():
            teacher(**inputs)
        loss = wrapped(**inputs).loss
    (0 * loss + feature_terms(visual, ours, theirs, 1.0)["vision_kd_loss"]).backward()
    return gradients(student)


def test_features_of_ddp_ranks_are_taught_with_the_mean_gradient():
    found = run_ranks(_rank_gradients, 2, "llava")
    student, teacher = make_vlm("llava", seed=1), make_vlm("llava", seed=2)
    visual = visual_knobs("vit", "aligner")
    for seed in range(2):
        (run_visual(visual, student, teacher, make_inputs(teacher, seed=seed))["vision_kd_loss"] / 2).backward()
    expected = gradients(student)
    for of_rank in found:
        assert of_rank == pytest.approx(expected, rel=1e-4)
