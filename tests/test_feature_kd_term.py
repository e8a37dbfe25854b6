"""The visual terms as the trainer uses them: options, weights, projectors, grids and what a batch weighs."""

import random
import types

import pytest
import torch
import transformers
from transformers.vision_utils import get_vision_position_ids

from kdtrain.config.options import DistillationOptions, VisualKdConfig, VisualTarget
from kdtrain.data.batch import Batch
from kdtrain.errors import ConfigError, PreflightError
from kdtrain.feature_kd.grids import _from_rows, image_grids
from kdtrain.feature_kd.hooks import tapped
from kdtrain.feature_kd.projectors import build_projectors, feature_widths
from kdtrain.feature_kd.taps import taps_of_both
from kdtrain.feature_kd.term import feature_terms
from tests.tiny_vision import gradients, make_inputs, make_vlm, reference_features, run_visual, visual_knobs

# ---- options ---------------------------------------------------------------------------------------------------------


def read(visual):
    """What the trainer makes of `args.visual_kd`."""
    return DistillationOptions.from_args(types.SimpleNamespace(visual_kd=visual)).visual_kd


def test_targets_need_no_module_and_take_the_common_distance():
    visual = read({"weight": 0.5, "distance": "cosine", "targets": {"vit": {}, "aligner": {"weight": 2.0}}})
    found = {name: (target.weight, target.distance, target.student_module) for name, target in visual.targets.items()}
    assert visual.weight == 0.5
    assert found == {"vit": (1.0, "cosine", None), "aligner": (2.0, "cosine", None)}
    assert read({"targets": ["vit", "deepstack"]}).targets.keys() == {"vit", "deepstack"}
    assert read({}).targets.keys() == {"aligner"}
    assert read(types.SimpleNamespace(targets=["vit"])).targets.keys() == {"vit"}


def test_a_module_stands_for_both_models_and_one_of_a_side_wins():
    both = {"module": "a", "teacher_module": "b", "match": "interpolate"}
    target = read({"targets": {"vit": both}}).targets["vit"]
    assert (target.student_module, target.teacher_module, target.match) == ("a", "b", "interpolate")


def test_the_options_of_a_config_file_arrive():
    source = {"enabled": True, "targets": {"vit": {"module": "a", "match": "interpolate"}}}
    visual = read(VisualKdConfig.model_validate(source))
    assert visual == read(source)
    target = visual.targets["vit"]
    assert (target.weight, target.distance, target.match) == (1.0, "mse", "interpolate")
    assert target.student_module == target.teacher_module == "a"
    assert read(visual) == visual
    assert read(VisualKdConfig()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wieght": 1.0}, r"visual_kd\.wieght: unknown key 'wieght' .*did you mean custom.visual_kd.weight"),
        (
            {"targets": {"vit": {"mach": "exact"}}},
            r"targets\.vit\.mach: unknown key 'mach' .*did you mean custom.visual_kd.targets.match",
        ),
        ({"targets": ["projector"]}, r"visual_kd\.targets: .*the targets are vit, aligner, deepstack"),
        ({"targets": {"vit": {"match": "crop"}}}, r"visual_kd\.targets\.vit\.match: expected one of .*got text 'crop'"),
        ({"targets": {"vit": {"distance": "l1"}}}, r"distance: expected one of .*got text 'l1'"),
        ({"targets": {"vit": {"weight": -1}}}, r"targets\.vit\.weight: must be non-negative"),
        ({"weight": float("nan")}, r"visual_kd\.weight: not a finite number"),
        ({"targets": []}, r"no target to compare"),
        (True, r"visual_kd: expected a map"),
    ],
)
def test_an_option_that_is_not_known_or_out_of_range_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        read(options)


def test_a_weight_of_zero_switches_a_target_or_everything_off():
    assert read({"targets": {"vit": {"weight": 0}, "aligner": {}}}).targets.keys() == {"aligner"}
    assert read({"targets": {"vit": {"weight": 0}}}) is None
    assert read({"weight": 0}) is None
    assert read({"enabled": False}) is None


# ---- weights ---------------------------------------------------------------------------------------------------------


def constant(value):
    return [torch.full((2, 4, 8), value, requires_grad=True)]


@pytest.mark.parametrize(("weight", "of_target"), [(0.1, 1.0), (1.0, 0.1)])
def test_aligner_of_a_half_and_deepstack_of_a_quarter_at_a_tenth_are_0075(weight, of_target):
    target = VisualTarget(weight=of_target, distance="mse")
    visual = VisualKdConfig(enabled=True, weight=weight, targets={"aligner": target, "deepstack": target})
    # Distances: aligner 0.5; deepstack the mean of 0.36 and 0.14.
    ours = {"aligner": [constant(0.5**0.5)], "deepstack": [constant(0.6), constant(0.14**0.5)]}
    theirs = {"aligner": [constant(0.0)], "deepstack": [constant(0.0), constant(0.0)]}
    terms = feature_terms(visual, ours, theirs, 1.0)
    assert {name: round(value.item(), 6) for name, value in terms.items()} == {
        "vision_kd_loss_aligner": 0.05,
        "vision_kd_loss_deepstack": 0.025,
        "vision_kd_loss": 0.075,
    }
    assert feature_terms(visual, ours, theirs, 0.5)["vision_kd_loss"].item() == pytest.approx(0.0375)


def test_a_batch_with_images_that_fires_no_module_is_an_error():
    student, teacher = make_vlm("llava", seed=1), make_vlm("llava", seed=2)
    with tapped(visual_knobs("aligner"), student, teacher) as (ours, theirs):
        pass
    with pytest.raises(PreflightError, match="0 student and 0 teacher activations in a batch with images"):
        feature_terms(visual_knobs("aligner"), ours, theirs, 1.0)
    with pytest.raises(PreflightError, match="fired no module"):
        build_projectors(visual_knobs("aligner"), ours, theirs, seed=0)


# ---- projectors ------------------------------------------------------------------------------------------------------


def probe(visual, student, teacher, inputs):
    with tapped(visual, student, teacher) as (ours, theirs), torch.no_grad():
        teacher(**inputs)
        student(**inputs)
    return ours, theirs


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "internvl"])
def test_models_of_other_widths_are_compared_through_projectors(family):
    student, teacher = make_vlm(family, seed=1), make_vlm(family, seed=2, vision=48, text=96)
    inputs = make_inputs(student)
    targets = ("vit", "aligner", *(("deepstack",) if family == "qwen3_vl" else ()))
    visual = visual_knobs(*targets)
    with pytest.raises(
        PreflightError, match=r"'vit': student features are .*teacher features .*widths \d+ and \d+"
    ) as caught:
        run_visual(visual, student, teacher, inputs)
    for way_out in ("no row of the training data had an image", "FSDP", "custom.visual_kd.targets.vit.student_module"):
        assert way_out in str(caught.value)
    projectors = build_projectors(visual, *probe(visual, student, teacher, inputs), seed=7)
    names = {"vit", "aligner", *(("deepstack_0", "deepstack_1") if family == "qwen3_vl" else ())}
    assert set(projectors) == names
    terms = run_visual(visual, student, teacher, inputs, projectors=projectors)
    ours, theirs = reference_features(student, inputs), reference_features(teacher, inputs)
    expected = 0.0
    for target in targets:
        levels = []
        for i, (s, t) in enumerate(zip(ours[target], theirs[target], strict=True)):
            linear = projectors[f"{target}_{i}" if target == "deepstack" else target]
            levels.append((s @ linear.weight.T + linear.bias - t).square().mean().item())
        expected += sum(levels) / len(levels)
    assert terms["vision_kd_loss"].item() == pytest.approx(expected, rel=1e-4)
    terms["vision_kd_loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in projectors.parameters())
    assert any("vis" in name for name in gradients(student))
    assert not gradients(teacher)


def test_only_targets_of_unequal_width_have_a_projector():
    student, teacher = make_vlm("llava", seed=1), make_vlm("llava", seed=2, vision=48)
    visual = visual_knobs("vit", "aligner")
    features = probe(visual, student, teacher, make_inputs(student))
    assert feature_widths(features[0]) == {"vit": [32], "aligner": [64]}
    projectors = build_projectors(visual, *features, seed=0)
    assert {name: (p.in_features, p.out_features) for name, p in projectors.items()} == {"vit": (32, 48)}


def test_a_width_is_what_the_forward_gives_not_what_the_config_says():
    """Two layers side by side are twice as wide."""
    student, teacher = make_vlm("llava", seed=1), make_vlm("llava", seed=2)
    config = transformers.LlavaConfig(**(teacher.config.to_dict() | {"vision_feature_layer": [-2, -1]}))
    teacher = transformers.LlavaForConditionalGeneration(config).eval()
    visual = visual_knobs("vit")
    projectors = build_projectors(visual, *probe(visual, student, teacher, make_inputs(student)), seed=0)
    assert (projectors["vit"].in_features, projectors["vit"].out_features) == (32, 64)


def test_projectors_depend_on_the_seed_and_the_name_and_leave_the_global_random_state():
    visual = visual_knobs("vit", "aligner")
    ours = {"vit": [[torch.zeros(2, 8)]], "aligner": [[torch.zeros(2, 8)]]}
    theirs = {"vit": [[torch.zeros(2, 16)]], "aligner": [[torch.zeros(2, 16)]]}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = build_projectors(visual, ours, theirs, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    random.seed(1)
    second = build_projectors(visual, ours, theirs, seed=3)
    for name in ("vit", "aligner"):
        assert torch.equal(first[name].weight, second[name].weight)
        assert torch.equal(first[name].bias, second[name].bias)
    assert not torch.equal(first["vit"].weight, first["aligner"].weight)
    assert not torch.equal(first["vit"].weight, build_projectors(visual, ours, theirs, seed=4)["vit"].weight)
    assert first["vit"].weight.abs().max() <= 8**-0.5
    assert first["vit"].weight.std().item() == pytest.approx((1 / 8 / 3) ** 0.5, rel=0.2)


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_patches_of_qwen_lie_in_the_blocks_that_are_merged(family):
    model = make_vlm(family)
    inputs = make_inputs(model)
    visual = visual_knobs("vit", "aligner", match="interpolate")
    grids = image_grids(visual, model, model, inputs, inputs)
    assert [grids[t][0].block for t in ("vit", "aligner")] == [2, 1]
    positions = get_vision_position_ids(inputs["image_grid_thw"], 2)
    expected = []
    for _, height, width in inputs["image_grid_thw"].tolist():
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        expected.append(_from_rows(torch.stack([rows, columns], dim=-1)[None], grids["vit"][0].block))
    assert torch.equal(torch.cat(expected), positions)


def enlarged(inputs, factor):
    """The same images for a model that sees `factor` times as many pixels a side: every pixel repeated."""
    return inputs | {"pixel_values": inputs["pixel_values"].repeat_interleave(factor, -1).repeat_interleave(factor, -2)}


def test_towers_of_other_resolution_are_compared_on_the_students_grid():
    student, teacher = make_vlm("gemma3", seed=1), make_vlm("gemma3", seed=2, image_size=64)
    ours = make_inputs(student)
    theirs = enlarged(ours, 2)
    for match in ("exact", "interpolate"):
        visual = visual_knobs("vit", match=match)
        with tapped(visual, student, teacher) as features:
            with torch.no_grad():
                teacher(**theirs)
            student(**ours)
        grids = image_grids(visual, student, teacher, ours, theirs)
        if match == "exact":
            with pytest.raises(PreflightError, match=r"\(2, 16, 32\).*\(2, 64, 32\).*32 and 128 tokens"):
                feature_terms(visual, *features, 1.0, grids=grids)
        else:
            loss = feature_terms(visual, *features, 1.0, grids=grids)["vision_kd_loss"]
    s, t = reference_features(student, ours)["vit"][0], reference_features(teacher, theirs)["vit"][0]
    # Half the size, bilinear: the mean of 2 × 2 tokens.
    expected = (s - t.view(2, 4, 2, 4, 2, -1).mean((2, 4)).flatten(1, 2)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("target", ["vit", "aligner", "deepstack"])
def test_qwen_features_of_finer_images_are_compared_on_the_students_grid(target):
    student, teacher = make_vlm("qwen3_vl", seed=1), make_vlm("qwen3_vl", seed=2)
    ours, theirs = make_inputs(student), make_inputs(student, seed=1)
    theirs["image_grid_thw"] = ours["image_grid_thw"] * torch.tensor([1, 2, 2])
    theirs["pixel_values"] = torch.randn(4 * len(ours["pixel_values"]), ours["pixel_values"].shape[1])
    visual = visual_knobs(target, match="interpolate")
    with tapped(visual, student, teacher) as features:
        with torch.no_grad():
            teacher.model.visual(theirs["pixel_values"], grid_thw=theirs["image_grid_thw"])
        student(**ours)
    grids = image_grids(visual, student, teacher, ours, theirs)
    loss = feature_terms(visual, *features, 1.0, grids=grids)["vision_kd_loss"]

    positions, finer = (
        get_vision_position_ids(grid, 2) if target == "vit" else merged_positions(grid)
        for grid in (ours["image_grid_thw"], theirs["image_grid_thw"])
    )
    images, finer_images = (
        torch.repeat_interleave(torch.arange(2), grid.prod(-1) // (1 if target == "vit" else 4))
        for grid in (ours["image_grid_thw"], theirs["image_grid_thw"])
    )
    levels = []
    for s, t in zip(*(reference_features(m, x)[target] for m, x in ((student, ours), (teacher, theirs))), strict=True):
        # Every token of the student beside the mean of the four of the teacher that lie in its place.
        means = [
            t[(finer_images == image) & (finer // 2 == place).all(-1)].mean(0)
            for image, place in zip(images, positions, strict=True)
        ]
        levels.append((s - torch.stack(means)).square().mean().item())
    assert loss.item() == pytest.approx(sum(levels) / len(levels), rel=1e-4)


def merged_positions(grid):
    return torch.cat([torch.cartesian_prod(torch.arange(h // 2), torch.arange(w // 2)) for _, h, w in grid.tolist()])


def test_packed_images_of_mistral_are_resized_by_their_sizes():
    model = make_vlm("mistral3")
    inputs = make_inputs(model)
    grids = image_grids(visual_knobs("vit", match="interpolate"), model, model, inputs, inputs)
    assert grids["vit"][0].passes[0].tolist() == [[1, 32, 32], [1, 32, 32]]


def make_pixtral_llava(seed):
    """Pixtral: a LLaVA whose tower packs the tokens of images of any shape."""
    mistral = make_vlm("mistral3").config
    torch.manual_seed(seed)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=mistral.vision_config,
            text_config=mistral.text_config,
            image_token_index=mistral.image_token_index,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )


def test_packed_images_of_pixtral_are_compared_image_by_image():
    student, teacher = make_pixtral_llava(1), make_pixtral_llava(2)
    # 2 × 6 and 4 × 3 patches: 24 tokens, and 96 of the teacher, neither of them a square.
    sizes = torch.tensor([[16, 48], [32, 24]])
    visual = visual_knobs("vit", match="interpolate")
    with tapped(visual, student, teacher) as features:
        for model, factor in ((student, 1), (teacher, 2)):
            pixels = torch.randn(2, 3, 32 * factor, 48 * factor)
            with torch.set_grad_enabled(model is student):
                model.model.get_image_features(pixels, image_sizes=sizes * factor)
    assert features[0]["vit"][0][0].shape[:2] == (1, 24)
    grids = image_grids(visual, student, teacher, {"image_sizes": sizes}, {"image_sizes": 2 * sizes})
    loss = feature_terms(visual, *features, 1.0, grids=grids)["vision_kd_loss"]
    t = features[1]["vit"][0][0][0]
    halved = [
        t[:48].view(2, 2, 6, 2, -1).mean((1, 3)).flatten(0, 1),
        t[48:].view(4, 2, 3, 2, -1).mean((1, 3)).flatten(0, 1),
    ]
    expected = (features[0]["vit"][0][0][0] - torch.cat(halved)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_tokens_that_are_in_no_grid_are_not_interpolated():
    qwen2_5, qwen3 = make_vlm("qwen2_5_vl"), make_vlm("qwen3_vl")
    with pytest.raises(PreflightError, match=r"interpolate.*student.*attention windows.*aligner"):
        taps_of_both(visual_knobs("vit", match="interpolate"), qwen2_5, qwen3)
    own = visual_knobs("vit", match="interpolate", teacher_module="model.visual.blocks.0")
    with pytest.raises(PreflightError, match=r"interpolate.*teacher.*no order that is known"):
        taps_of_both(own, qwen3, qwen3)


# ---- what a batch weighs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "llava_next", "idefics3", "mistral3", "gemma3"])
def test_a_batch_weighs_in_proportion_to_its_tokens(family):
    """The mean over a window is the mean of its batches, weighed by their units."""
    student, teacher = make_vlm(family, seed=1), make_vlm(family, seed=2)
    batches = [make_inputs(student, images=n, seed=n) for n in (1, 3)]
    if family == "idefics3":  # a second place for images, which one row leaves empty
        pixels = torch.randn(3, 2, 3, 32, 32)
        pixels[1, 1] = 0
        batches[1] = make_inputs(student, images=3) | {"pixel_values": pixels}
        batches[1].pop("pixel_attention_mask")
        row = batches[1]["input_ids"][0].tolist()
        images = [row[:2] + row[2:6] * (1 if i == 1 else 2) + row[6:] + [0] * (4 * (i == 1)) for i in range(3)]
        batches[1] = {"input_ids": torch.tensor(images), "pixel_values": pixels}
    units = [Batch(model_inputs=batch, labels=batch["input_ids"]).image_units for batch in batches]
    visual = visual_knobs("vit")
    errors, tokens, total = [], [], 0.0
    for batch, weight in zip(batches, units, strict=True):
        with tapped(visual, student, teacher) as (ours, theirs):
            teacher(**batch)
            student(**batch)
        error = (ours["vit"][0][0] - theirs["vit"][0][0]).square().flatten(0, -2).mean(-1)
        errors.append(error)
        tokens.append(len(error))
        total += feature_terms(visual, ours, theirs, weight / sum(units))["vision_kd_loss"].item()
    assert units[1] / units[0] == tokens[1] / tokens[0] != 1
    assert total == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)
