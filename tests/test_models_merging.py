"""A merged adapter computes what it computed unmerged, and leaves the weights as they were, bit by bit."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from kdtrain.generation.decode import sample
from kdtrain.generation.sampling import generation_config
from kdtrain.models.merging import WEIGHTS_PER_TOKEN, merged
from tests import tiny
from tests.test_trainer import make_batch, make_trainer

ENOUGH = 10**6
ALL_LINEAR = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def make_student(dtype=torch.float32, **options):
    """An adapter far from zero, dropout included."""
    config = tiny.lora_config(rank=4, alpha=8, dropout=0.1, **(ALL_LINEAR | options))
    model = get_peft_model(tiny.make_qwen3(seed=1), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "modules_to_save" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_as_before(model, before):
    """Down to the bits, which 0.0 == -0.0 would not see, and as the same parameters."""
    after = model.state_dict()
    same = all(value.numpy().tobytes() == after[name].numpy().tobytes() for name, value in before.items())
    return same and not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))


def layers_merged_in(model, new_tokens=ENOUGH):
    with merged(model, new_tokens):
        return sum(module.merged for module in model.modules() if isinstance(module, LoraLayer))


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 30)[None]).logits


def samples_of(model, seeds=range(6)):
    config = generation_config([2], 3, 1.0, 24)
    return sample(model.eval(), [[5 + seed, 9, 11 + seed] for seed in seeds], config, list(seeds), torch.device("cpu"))


def test_weights_are_the_same_to_the_bit_after_a_merge():
    model = make_student()
    before = weights_of(model)
    assert layers_merged_in(model) == 8
    assert is_as_before(model, before)


def test_weights_are_put_back_after_an_exception():
    model = make_student()
    before = weights_of(model)
    with pytest.raises(KeyboardInterrupt), merged(model, ENOUGH):
        raise KeyboardInterrupt
    assert is_as_before(model, before)


def test_weights_are_put_back_when_a_layer_cannot_be_merged(monkeypatch):
    model = make_student()
    before = weights_of(model)
    last = [module for module in model.modules() if isinstance(module, LoraLayer)][-1]

    def fail(adapter):
        raise MemoryError

    monkeypatch.setattr(last, "get_delta_weight", fail)
    with pytest.raises(MemoryError), merged(model, ENOUGH):
        pass
    assert is_as_before(model, before)


def test_gradients_flow_as_before_after_a_merge():
    model = make_student()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers_merged_in(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    model(input_ids=torch.arange(4, 20)[None]).logits.sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)


def test_merged_samples_are_the_unmerged_ones():
    model = make_student(torch.float64)
    unmerged = samples_of(model)
    with merged(model, ENOUGH):
        assert samples_of(model) == unmerged
    with model.disable_adapter():
        assert samples_of(model) != unmerged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=str,
)
def test_merged_logits_are_the_unmerged_ones(options):
    model = make_student(torch.float64, **options)
    before, unmerged = weights_of(model), logits_of(model)
    with merged(model, ENOUGH):
        torch.testing.assert_close(logits_of(model), unmerged, rtol=1e-10, atol=1e-10)
    assert is_as_before(model, before)


def test_two_active_adapters_are_merged_together():
    model = make_student(torch.float64)
    model.add_adapter("second", tiny.lora_config(rank=2, alpha=4, dropout=0.0, **ALL_LINEAR))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            nn.init.normal_(parameter, std=0.2)
    model = model.to(torch.float64)
    model.base_model.set_adapter(["default", "second"])
    unmerged = logits_of(model)
    with merged(model, ENOUGH):
        torch.testing.assert_close(logits_of(model), unmerged, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_not_merged(dtype):
    assert layers_merged_in(make_student(dtype)) == 0


def test_dora_is_not_merged():
    assert layers_merged_in(make_student(use_dora=True)) == 0


def test_a_weight_that_another_module_reads_is_not_merged():
    model = make_student(target_modules=["lm_head"])  # tied to the embedding
    assert layers_merged_in(model) == 0


def test_an_adapter_that_is_off_stays_off():
    model = make_student(torch.float64)
    with model.disable_adapter():
        off = logits_of(model)
        with merged(model, ENOUGH):
            assert torch.equal(logits_of(model), off)


def test_too_few_tokens_do_not_pay_for_a_merge():
    model = make_student()
    smallest = min(m.get_base_layer().weight.numel() for m in model.modules() if isinstance(m, LoraLayer))
    assert smallest <= WEIGHTS_PER_TOKEN  # the models of tests are tiny
    assert layers_merged_in(model, new_tokens=1) == 8
    assert layers_merged_in(model, new_tokens=0) == 0


def test_a_model_without_an_adapter_is_left_alone():
    model = tiny.make_qwen3(seed=1)
    before = weights_of(model)
    with merged(model, ENOUGH):
        assert is_as_before(model, before)


def merged_while_writing(folder, **options):
    """For each forward of an adapter's layer while a window's answers are written: whether it was merged."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), lmbda=1.0, max_new_tokens=4,
        extra={"peft_config": tiny.lora_config(rank=4, alpha=8, dropout=0.1, **ALL_LINEAR)}, **options,
    )  # fmt: skip
    layer = next(module for module in trainer.model.modules() if isinstance(module, LoraLayer))
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.merged))
    before = weights_of(trainer.model)
    batches, _ = trainer.get_batch_samples(iter([make_batch(trainer)]), 1, torch.device("cpu"))
    assert batches[0].generated_by == "student"
    assert is_as_before(trainer.model, before)
    return seen


def test_the_answers_of_a_window_are_written_by_the_merged_student(tmp_path):
    assert all(merged_while_writing(tmp_path)[-4:])


def test_under_autocast_nothing_is_merged(tmp_path):
    assert not any(merged_while_writing(tmp_path, bf16=True))
