"""Students that compute with rounded weights: what is trained is what torchao makes of them in the end.

Skipped without the `quant` extra, which `dev` has.
"""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from kdtrain import fit
from kdtrain.config.quantized import missing_quantizers
from kdtrain.errors import ConfigError, PreflightError
from kdtrain.models.fake_quantization import GROUP, fake_quantize, torchao_config
from tests import test_cli, tiny
from tests.tiny_vision import make_vlm

torchao = pytest.importorskip("torchao")
kdtrain = test_cli.kdtrain
IDS = torch.randint(4, 320, (2, 12), generator=torch.Generator().manual_seed(0))
RANGE = {"int8": (-128, 127), "int4": (-8, 7), "int2": (-2, 1)}


def check_grid(weight, rounded, low, high):
    """Each group of 32 lies on a grid through 0 as wide as its largest value on both sides, at the nearest point."""
    groups, points = (one.double().unflatten(-1, (-1, GROUP)) for one in (weight, rounded))
    step = groups.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    steps = points / step
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert low <= steps.round().min() < steps.round().max() <= high
    assert ((points - groups).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("weights", RANGE)
def test_value_and_gradient_are_those_of_rounded_weights(weights):
    model, reference = (tiny.make_qwen3(tie_word_embeddings=False) for _ in range(2))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    torchao.quantization.quantize_(reference, torchao_config(weights), filter_fn=lambda _, name: name in linear)
    inner = {}
    for name in linear:
        module, own = reference.get_submodule(name), model.get_submodule(name).weight.detach()
        module.weight = nn.Parameter(module.weight.dequantize())
        check_grid(own, module.weight.detach(), *RANGE[weights])
        # The largest of a group may be cut at the grid's end, and then gets no gradient.
        groups = own.unflatten(-1, (-1, GROUP)).abs()
        inner[f"{name}.weight"] = (groups < groups.amax(-1, keepdim=True)).flatten(-2)
    reference.double()
    fake_quantize(model, weights)
    found, expected = model(IDS).logits, reference(IDS).logits
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    found.square().mean().backward()
    expected.square().mean().backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        gradients = [one.grad.double() * inner.get(name, 1) for one in (parameter, wanted[name])]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3, msg=name)
        assert gradients[1].abs().max() > 1e-3


def test_what_is_trained_is_what_torchao_makes_of_the_saved_weights(tmp_path):
    model = tiny.make_qwen3(hidden=64)
    names = set(model.state_dict())
    fake_quantize(model, "int4")
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    whole, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    options = TorchAoConfig(torchao_config("int4"))
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    with torch.no_grad():
        assert torch.equal(quantised(IDS).logits, model(IDS).logits)
        assert not torch.allclose(whole(IDS).logits, model(IDS).logits, atol=1e-2)
        quantised.save_pretrained(tmp_path / "int4")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "int4")(IDS).logits, model(IDS).logits)


def test_vision_tower_and_head_stay_whole():
    model = make_vlm("qwen3_vl")
    fake_quantize(model, "int4")
    names = [name for name, module in model.named_modules() if type(module).__name__ == "FakeQuantizedLinear"]
    assert names
    assert all("language_model.layers" in name for name in names)


def test_rows_that_no_group_fits_are_refused():
    with pytest.raises(PreflightError, match=r"groups of 32 of a row, and of .* model.layers.0.mlp.down_proj has 80"):
        fake_quantize(tiny.make_qwen3(hidden=40), "int4")


def test_without_torchao_the_config_is_refused(project, monkeypatch):
    from kdtrain.config import ConfigLoader, quantized

    config = ConfigLoader.load(project / "config.yaml", ["model.quantization_aware=int4"])
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    assert [found.message for found in missing_quantizers(config)] == [
        "needs the package torchao, which is not installed"
    ]


@pytest.mark.slow
def test_the_model_teaches_itself_rounded_and_evaluate_sees_the_rounding(project, kdtrain):
    """Before: quantised without training for it; after: with; the teacher is the model as it was."""
    options = ["rlhf.teacher_model=./student", "rlhf.sft_alpha=0", "rlhf.beta=0"]
    options += ["training.max_steps=12", "training.learning_rate=1e-3", "model.quantization_aware=int2"]
    result = fit(project / "config.yaml", options, quiet=True)
    losses = [json.loads(line).get("llm_kd_loss") for line in (result.run_dir / "logging.jsonl").open()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[0] > 0.1
    assert losses[-1] < 0.7 * losses[0]
    kdtrain("evaluate", str(result.run_dir))
    models = json.loads((result.run_dir / "evaluation.json").read_text())["models"]
    assert models["before"]["forward_kl"] == pytest.approx(losses[0], rel=0.3)
    assert models["after"]["forward_kl"] < 0.7 * models["before"]["forward_kl"]
    with pytest.raises(ConfigError, match="is the student itself"):
        fit(project / "config.yaml", [*options[:-1], "training.output_dir=other"], quiet=True)
