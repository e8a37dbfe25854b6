"""Every family of the layout table: the taps give the features that the model uses, and their term teaches."""

import pytest
import torch

from kdtrain.errors import PreflightError
from kdtrain.feature_kd.hooks import tapped
from kdtrain.feature_kd.taps import taps, taps_of_both, token_order
from kdtrain.models.layouts import LAYOUTS, Tap, unwrapped, unwrapped_name
from tests import gradient_table, tiny
from tests.tiny import one_in
from tests.tiny_vision import FAMILIES, gradients, make_inputs, make_vlm, reference_features, run_visual, visual_knobs

CASES = [(family, target) for family, layout in LAYOUTS.items() for target in layout.taps]


def reference_loss(student, teacher, inputs, target):
    """Mean squared error of features that no hook has seen."""
    ours = reference_features(student, inputs)[target]
    with torch.no_grad():
        theirs = reference_features(teacher, inputs)[target]
    return torch.stack([(s - t).square().mean() for s, t in zip(ours, theirs, strict=True)]).mean()


def test_there_is_a_tiny_model_for_every_family():
    assert {make_vlm(family).config.model_type for family in FAMILIES} == set(LAYOUTS)


@pytest.mark.parametrize(("family", "target"), CASES)
def test_a_target_teaches_exactly_what_lies_before_it(family, target):
    student, teacher = make_vlm(family, seed=1), make_vlm(family, seed=2)
    inputs = make_inputs(student)
    expected = reference_loss(student, teacher, inputs, target)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    loss = run_visual(visual_knobs(target), student, teacher, inputs)["vision_kd_loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() > 1e-3
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name
    assert not gradients(teacher)


@pytest.mark.parametrize("family", one_in(3, FAMILIES))
def test_parameters_with_a_gradient_are_those_that_move_the_features(family):
    """By changing one parameter after another: no autograd in the expectation."""
    student, teacher = make_vlm(family, seed=1).double(), make_vlm(family, seed=2).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make_inputs(student.float()).items()}
    student.double()
    with torch.no_grad():
        before = reference_features(student, inputs)
        moved = {target: set() for target in before}
        for name, parameter in student.named_parameters():
            old = parameter.clone()
            parameter.add_(0.1 * torch.randn_like(parameter))
            for target, features in reference_features(student, inputs).items():
                # A key's bias moves nothing but rounding: the softmax does not see it. Its gradient is as good as 0.
                if any((a - b).abs().max() > 1e-9 for a, b in zip(features, before[target], strict=True)):
                    moved[target].add(name)
            parameter.copy_(old)
    for target, names in moved.items():
        student.zero_grad()
        run_visual(visual_knobs(target), student, teacher, inputs)["vision_kd_loss"].backward()
        assert {name for name, norm in gradients(student).items() if norm > 1e-9} == names, target


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_models_have_no_distance(family, distance):
    student, teacher = make_vlm(family, seed=1), make_vlm(family, seed=1)
    visual = visual_knobs(*LAYOUTS[family].taps, distance=distance)
    terms = run_visual(visual, student, teacher, make_inputs(student))
    assert {name: value.item() for name, value in terms.items()} == dict.fromkeys(terms, 0.0)


def test_the_gradient_table_has_a_row_with_a_gradient_for_every_target():
    rows = list(gradient_table.rows())
    assert [(family, target) for family, target, *_ in rows] == [
        (family, target) for family in FAMILIES for target in LAYOUTS[family].taps
    ]
    for _, _, counts, _, norm, teacher in rows:
        assert counts["vit"][0] > 0
        assert counts["llm"][0] == 0
        assert norm > 1e-3
        assert teacher == 0


# ---- what is not in the table ----------------------------------------------------------------------------------------


def test_a_family_that_is_not_known_is_named_with_those_that_are_and_what_to_set():
    student = make_vlm("qwen2_vl")
    with pytest.raises(PreflightError) as caught:
        taps_of_both(visual_knobs("aligner"), student, tiny.make_qwen3())
    message = str(caught.value)
    for part in (
        "'aligner'",
        "the teacher",
        "'qwen3'",
        "qwen2_5_vl",
        "custom.visual_kd.targets.aligner.teacher_module",
    ):
        assert part in message


def test_deepstack_of_a_family_without_it_is_an_error():
    llava = make_vlm("llava")
    with pytest.raises(PreflightError, match=r"'deepstack': the student .*'llava'.*with 'deepstack': qwen3_vl"):
        taps_of_both(visual_knobs("deepstack"), llava, make_vlm("llava"))


def test_unequal_numbers_of_deepstack_levels_are_an_error():
    teacher = make_vlm("qwen3_vl", deepstack_visual_indexes=[1])
    with pytest.raises(PreflightError, match=r"deepstack.*student has 2 levels and the teacher 1"):
        taps_of_both(visual_knobs("deepstack"), make_vlm("qwen3_vl"), teacher)


def test_window_order_is_compared_only_between_equal_windows():
    student, teacher = make_vlm("qwen2_5_vl"), make_vlm("qwen2_5_vl", window_size=16)
    with pytest.raises(PreflightError, match=r"'vit'.*window_size 32.*window_size 16.*aligner"):
        taps_of_both(visual_knobs("vit"), student, teacher)
    taps_of_both(visual_knobs("aligner"), student, teacher)
    taps_of_both(visual_knobs("vit"), student, make_vlm("qwen2_5_vl", depth=3))


def test_windows_and_blocks_are_two_orders():
    with pytest.raises(PreflightError, match=r"attention windows.*blocks of 2 x 2"):
        taps_of_both(visual_knobs("vit"), make_vlm("qwen2_5_vl"), make_vlm("qwen3_vl"))
    assert token_order(make_vlm("qwen2_vl"), "vit", None) == token_order(make_vlm("qwen3_vl"), "vit", None)


def test_the_aligner_of_qwen2_5_is_in_image_order_whatever_the_window():
    """The raw merger's output is not: its rows change places with the window size."""
    student = make_vlm("qwen2_5_vl", seed=1, fullatt_block_indexes=[0, 1])
    teacher = make_vlm("qwen2_5_vl", seed=1, fullatt_block_indexes=[0, 1], window_size=16)
    inputs = make_inputs(student)
    loss = run_visual(visual_knobs("aligner"), student, teacher, inputs)["vision_kd_loss"]
    assert loss.item() < 1e-9
    raw = visual_knobs("aligner", student_module="model.visual.merger", teacher_module="model.visual.merger")
    assert run_visual(raw, student, teacher, inputs)["vision_kd_loss"].item() > 1e-3


# ---- modules of one's own --------------------------------------------------------------------------------------------


def test_a_module_of_ones_own_replaces_the_table():
    student, teacher = make_vlm("llava", seed=1), make_vlm("llava", seed=2)
    inputs = make_inputs(student)
    path = "model.vision_tower.encoder.layers.0"
    visual = visual_knobs("vit", student_module=path, teacher_module=path)
    loss = run_visual(visual, student, teacher, inputs)["vision_kd_loss"]
    ours, theirs = (m.model.vision_tower(inputs["pixel_values"], output_hidden_states=True) for m in (student, teacher))
    expected = (ours.hidden_states[1] - theirs.hidden_states[1]).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_of_a_model_as_module_the_last_hidden_state_is_taken():
    student, teacher = make_vlm("gemma3", seed=1), make_vlm("gemma3", seed=2)
    inputs = make_inputs(student)
    whole = visual_knobs("vit", student_module="model.vision_tower", teacher_module="model.vision_tower")
    values = [run_visual(v, student, teacher, inputs)["vision_kd_loss"].item() for v in (whole, visual_knobs("vit"))]
    assert values[0] == values[1]


def test_a_module_of_one_side_only_is_compared_with_the_table_of_the_other():
    student, teacher = make_vlm("gemma3", seed=1), make_vlm("gemma3", seed=2)
    inputs = make_inputs(student)
    mixed = visual_knobs("vit", student_module="model.vision_tower")
    values = [run_visual(v, student, teacher, inputs)["vision_kd_loss"].item() for v in (mixed, visual_knobs("vit"))]
    assert values[0] == values[1]


def test_a_missing_module_is_named_with_the_option_to_set():
    student, teacher = make_vlm("llava"), make_vlm("llava", seed=1)
    visual = visual_knobs("aligner", student_module="model.projector")
    option = r"custom\.visual_kd\.targets\.aligner\.student_module"
    with (
        pytest.raises(PreflightError, match=rf"aligner.*student has no module 'model.projector'.*{option}"),
        tapped(visual, student, teacher),
    ):
        pass


# ---- wrapped models --------------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def with_lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options})
    return get_peft_model(model, config)


@pytest.mark.parametrize("wrap", [Wrapped, torch.compile, lambda m: torch.compile(Wrapped(m)), with_lora])
def test_the_layout_is_found_through_wrappers(wrap):
    model = make_vlm("qwen3_vl")
    wrapped = wrap(model)
    assert taps(wrapped, "vit", None, "student") == [Tap("model.visual.merger", "input")]
    assert unwrapped(wrapped) is model


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "llava", "idefics3"])
def test_lora_adapters_before_a_target_are_taught(family):
    student, teacher = with_lora(make_vlm(family, seed=1)), make_vlm(family, seed=2)
    inputs = make_inputs(teacher)
    loss = run_visual(visual_knobs("vit", "aligner"), Wrapped(student), teacher, inputs)["vision_kd_loss"]
    ours = reference_features(student.get_base_model(), inputs)
    theirs = reference_features(teacher, inputs)
    expected = sum((ours[t][0] - theirs[t][0]).square().mean().item() for t in ("vit", "aligner"))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    reached = gradients(student)
    assert reached
    assert all("lora_" in name for name in reached)
    assert any("lora_A" in name and "vis" in name for name in reached)
    assert not any("language_model" in name or "text_model" in name for name in reached)


def test_an_aligner_that_peft_trains_in_full_is_the_one_that_is_taught():
    student = with_lora(make_vlm("llava", seed=1), target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    teacher = make_vlm("llava", seed=2)
    inside = "model.multi_modal_projector.linear_2"
    for path in (None, inside, "base_model.model.model.multi_modal_projector"):
        visual = visual_knobs("aligner", student_module=path)
        student.zero_grad()
        run_visual(visual, student, teacher, make_inputs(teacher))["vision_kd_loss"].backward()
        reached = {name for name in gradients(student) if "projector" in name}
        assert len(reached) == 4
        assert all("modules_to_save.default" in name for name in reached)


def test_names_of_wrapped_parameters_are_those_of_the_plain_model():
    model = make_vlm("llava", seed=1)
    names = {name for name, _ in model.named_parameters()}
    wrapped = torch.compile(Wrapped(with_lora(model, modules_to_save=["multi_modal_projector"])))
    found = {unwrapped_name(name, ("default",)).replace(".base_layer", "") for name, _ in wrapped.named_parameters()}
    assert {name for name in found if "lora_" not in name} == names
