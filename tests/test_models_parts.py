"""What belongs to the vision encoder, the aligner and the language model, and taking each out of training."""

import itertools
import logging
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kdtrain.errors import PreflightError
from kdtrain.models.parts import adapter_exclusions, check_named_parts, freeze_parts, part_of, trained_parts
from tests import tiny
from tests.tiny import one_in, slow
from tests.tiny_vision import FAMILIES, make_inputs, make_vlm

PARTS = ("llm", "vit", "aligner")


def expected_parts(model):
    """By identity, from the attributes that the families' classes have."""
    core, parts = model.model, {}
    encoder = next(getattr(core, n) for n in ("visual", "vision_tower", "vision_model") if hasattr(core, n))
    if hasattr(core, "visual"):
        aligner = [core.visual.merger, *getattr(core.visual, "deepstack_merger_list", [])]
    else:
        aligner = [getattr(core, "multi_modal_projector", None) or core.connector]
    parts["aligner"] = {id(p) for module in aligner for p in module.parameters()}
    parts["aligner"] |= {id(core.image_newline)} if hasattr(core, "image_newline") else set()
    parts["vit"] = {id(p) for p in encoder.parameters()} - parts["aligner"]
    language = core.text_model if hasattr(core, "text_model") else core.language_model
    parts["llm"] = {id(p) for p in [*language.parameters(), *model.lm_head.parameters()]}
    return parts


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_part(family):
    model = make_vlm(family)
    expected = expected_parts(model)
    for part in PARTS:
        assert {id(p) for p in part_of(model, part).values()} == expected[part], part
    assert sum(len(part_of(model, part)) for part in PARTS) == len(list(model.parameters()))


@pytest.mark.parametrize("family", one_in(3, FAMILIES))
def test_frozen_parts_do_not_move_in_a_step_and_the_others_do(family):
    for frozen in [*itertools.combinations(PARTS, 1), *itertools.combinations(PARTS, 2)]:
        model = make_vlm(family, seed=1)
        before = {name: p.clone() for name, p in model.named_parameters()}
        expected = expected_parts(model)
        freeze_parts(model, **dict.fromkeys(frozen, True))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model(**make_inputs(model)).loss.backward()
        optimizer.step()
        moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        for part in PARTS:
            assert bool(moved & expected[part]) == (part not in frozen), (frozen, part)


def test_nothing_left_to_train_is_an_error_that_names_the_options():
    model = make_vlm("llava")
    with pytest.raises(PreflightError, match=r"freeze_llm and tuner.freeze_vit and tuner.freeze_aligner.*nothing"):
        freeze_parts(model, llm=True, vit=True, aligner=True)
    assert all(p.requires_grad for p in model.parameters())


def test_a_text_model_is_its_language_model(caplog):
    model = tiny.make_qwen3()
    with caplog.at_level(logging.WARNING):
        freeze_parts(model, vit=True)
    assert "freeze_vit has no effect" in caplog.text
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(PreflightError, match=r"freeze_llm.*text model"):
        freeze_parts(model, llm=True)
    assert adapter_exclusions(model, llm=True) is None


def test_a_family_that_is_not_known_cannot_be_frozen_in_part():
    model = make_vlm("llava")
    model.config.model_type = "llava_of_tomorrow"
    freeze_parts(model)
    for call in (freeze_parts, adapter_exclusions):
        with pytest.raises(PreflightError, match=r"'llava_of_tomorrow'.*Known are qwen2_vl.*target_modules"):
            call(model, vit=True)


@pytest.mark.parametrize("family", ["qwen3_vl", slow("qwen2_5_vl"), "llava_next", slow("smolvlm")])
@pytest.mark.parametrize("frozen", [*itertools.combinations(PARTS, 1), *itertools.combinations(PARTS, 2)])
def test_frozen_parts_get_no_adapter(family, frozen):
    """By exclusion before the adapters are made, and by freezing afterwards: the same parameters are trained."""
    model = make_vlm(family)
    options = dict.fromkeys(frozen, True)
    parts = {part: {name.removesuffix(".weight") for name in part_of(model, part)} for part in PARTS}
    config = {"r": 2, "target_modules": "all-linear"}
    excluded = get_peft_model(model, LoraConfig(**config, exclude_modules=adapter_exclusions(model, **options)))
    adapted = {
        n.split(".lora_")[0].removeprefix("base_model.model.") for n, _ in excluded.named_parameters() if "lora_" in n
    }
    for part in PARTS:
        assert bool(adapted & parts[part]) == (part not in frozen), part

    frozen_after = get_peft_model(make_vlm(family), LoraConfig(**config))
    freeze_parts(frozen_after, **options)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (excluded, frozen_after)]
    assert trained[0] == trained[1]


def test_freezing_all_parts_with_adapters_is_an_error_that_names_target_modules():
    model = get_peft_model(make_vlm("llava"), LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with pytest.raises(PreflightError, match="target_modules"):
        freeze_parts(model, llm=True)


def test_a_module_that_peft_trains_in_full_can_be_frozen():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    model = get_peft_model(make_vlm("llava"), config)
    freeze_parts(model, aligner=True)
    assert not [n for n, p in model.named_parameters() if "projector" in n and p.requires_grad]
    assert [n for n, p in model.named_parameters() if "vision_tower" in n and p.requires_grad]


def test_similar_names_are_not_the_same_part():
    model = make_vlm("llava")
    pattern = adapter_exclusions(model, vit=True)
    assert re.fullmatch(pattern, "model.vision_tower.encoder.layers.0.mlp.fc1")
    assert not re.fullmatch(pattern, "model.vision_tower_2.fc1")


@pytest.mark.parametrize(
    ("targets", "saved", "frozen", "message"),
    [
        (
            [],
            ["multi_modal_projector"],
            "aligner",
            r"modules_to_save: 'multi_modal_projector' .*tuner.freeze_aligner keep",
        ),
        ([], ["model"], "vit", r"modules_to_save: 'model' .*tuner.freeze_vit"),
        ([], ["lm_head"], "llm", r"modules_to_save: 'lm_head' .*tuner.freeze_llm"),
        (["multi_modal_projector.linear_1"], [], "aligner", r"target_modules: 'multi_modal.*tuner.freeze_aligner"),
        (["fc1"], [], "vit", r"target_modules: 'fc1' .*tuner.freeze_vit"),
    ],
)
def test_naming_a_frozen_part_for_training_is_an_error(targets, saved, frozen, message):
    with pytest.raises(PreflightError, match=message):
        check_named_parts(make_vlm("llava"), targets, saved, **{frozen: True})


def test_names_that_reach_other_parts_too_are_what_freezing_is_for():
    model = make_vlm("llava")
    check_named_parts(model, ["q_proj"], ["multi_modal_projector"], vit=True)
    check_named_parts(model, ["q_proj"], [], llm=True)
    check_named_parts(tiny.make_qwen3(), ["q_proj"], ["lm_head"], vit=True)


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl", "smolvlm"])
def test_trained_parameters_are_counted_by_part(family):
    model = make_vlm(family)
    parts = expected_parts(model)
    sizes = {part: sum(p.numel() for p in model.parameters() if id(p) in parts[part]) for part in PARTS}
    assert trained_parts(model) == sizes
    freeze_parts(model, vit=True)
    assert trained_parts(model) == {**sizes, "vit": 0}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    counts = trained_parts(adapted)
    assert counts["aligner"] == 0
    assert sum(counts.values()) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained_parts(tiny.make_qwen3()) == {}
