"""A head that is a module (an adapter on it, quantised): the loss a chunk at a time against float64."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from kdtrain.losses import SampledTargets, TopKLogprobs, dense_distillation_loss
from kdtrain.losses.fused import head_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.losses.kinds import DivergenceParams
from kdtrain.losses.mixture import MixedHeads, mix_logits
from kdtrain.losses.tile import TileOptions
from tests import tiny
from tests.test_losses_fused import make

V, H = 301, 16


def adapted(weight, *, bias=False, dora=False, dropout=0.0, dtype=torch.float32):
    """A frozen head with a LoRA adapter on it, whose B is not 0."""
    torch.manual_seed(3)
    holder = nn.Sequential(nn.Linear(H, V, bias=bias))
    holder[0].weight.data = weight.detach().clone().to(dtype)
    lora = tiny.lora_config(rank=4, alpha=8, dropout=dropout, target_modules=["0"], use_dora=dora)
    layer = inject_adapter_in_model(lora, holder)[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return layer


def parameters(module):
    return [p for p in module.parameters() if p.requires_grad]


def head_of(layer, problem, scale=1.0, cap=None):
    return Head.of_module(layer, (V, H), problem["student_hidden"].detach(), scale, cap)


def teacher_of(problem, scale=1.0, cap=None):
    return Head(problem["teacher_weight"], None, scale, cap)


def given(problem, kind, double=False):
    """The teacher of a problem; with `double` as the definition takes it."""
    logits = problem["teacher_hidden"].double() @ problem["teacher_weight"].double().t()
    if kind == "dense":
        own = {"teacher_hidden": problem["teacher_hidden"], "teacher": teacher_of(problem)}
        return {"teacher_logits": logits} if double else own
    if kind == "mixed":
        other = make(seed=5)
        heads, hidden = (teacher_of(problem), teacher_of(other)), (problem["teacher_hidden"], other["teacher_hidden"])
        second = other["teacher_hidden"].double() @ other["teacher_weight"].double().t()
        mean = mix_logits([logits, second], (0.3, 0.7), 1.0).at_one
        return {"teacher_logits": mean} if double else {"mixed": MixedHeads(hidden, heads, (0.3, 0.7))}
    values, ids = logits.log_softmax(-1).topk(8)
    if kind is None:
        return {}
    drawn = SampledTargets(ids, values.softmax(-1).float())
    return {"targets": TopKLogprobs(ids, values.float()) if kind == "topk" else drawn}


CASES = {
    "plain": {},
    "forward KL": {"beta": 0.0},
    "reverse KL at a temperature": {"beta": 1.0, "temperature": 2.0},
    "soft-cap and scale": {"cap": 3.0, "scale": 0.5},
    "a bias": {"bias": True},
    "DoRA": {"dora": True},
    "top-k": {"kind": "topk"},
    "drawn": {"kind": "sampled", "beta": 0.0},
    "several teachers": {"kind": "mixed"},
    "cross-entropy": {"kind": None, "kd": 0.0},
    "weights, some of them 0": {"weights": True, "ce": 0.0},
    "tvd": {"divergence": "tvd"},
    "one chunk": {"chunk": None},
}


def both(case, dtype=torch.float32, layer=None):
    """Loss and gradients of hidden state and adapter, ours and the definition's."""
    problem = make(dtype=dtype)
    scale, cap, kind = case.get("scale", 1.0), case.get("cap"), case.get("kind", "dense")
    layer = layer or adapted(
        problem["student_weight"], bias=case.get("bias", False), dora=case.get("dora", False), dtype=dtype
    )
    kd, ce, beta, temperature = (
        case.get(k, d) for k, d in (("kd", 0.7), ("ce", 0.3), ("beta", 0.4), ("temperature", 1.0))
    )
    divergence = case.get("divergence", "jsd")
    weights = torch.arange(37) % 3 / 2 if "weights" in case else None
    hidden = problem["student_hidden"]
    ours = head_distillation_loss(
        hidden, head_of(layer, problem, scale, cap), problem["labels"],
        TileOptions(kd, ce, beta, temperature, divergence, "bucket", DivergenceParams()),
        **given(problem, kind), kd_token_weights=weights, num_items=50, num_kd_items=20 if "weights" in case else None,
        chunk_tokens=case.get("chunk", 7),
    )  # fmt: skip
    found = torch.autograd.grad(ours.loss, [hidden, *parameters(layer)])
    wide, exact = copy.deepcopy(layer).double(), hidden.detach().double().requires_grad_()
    logits = wide(exact) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    wanted = dense_distillation_loss(
        logits, problem["labels"], **given(problem, kind, double=True), kd_weight=kd, ce_weight=ce, beta=beta,
        temperature=temperature, divergence=divergence, kd_token_weights=weights, num_items=50,
        num_kd_items=20 if "weights" in case else None,
    )  # fmt: skip
    return ours, found, wanted, torch.autograd.grad(wanted.loss, [exact, *parameters(wide)])


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_match_float64(name):
    ours, found, wanted, exact = both(CASES[name])
    for field, value in vars(wanted).items():
        mine = getattr(ours, field)
        assert (mine is None) == (value is None), field
        if value is not None:
            assert mine.item() == pytest.approx(value.item(), rel=2e-5), field
    assert len(found) == (4 if "DoRA" in name else 3)
    for mine, right in zip(found, exact, strict=True):
        assert right.norm() > 1e-4
        assert (mine - right).norm() <= 2e-5 * right.norm()


def test_half_precision_errs_as_pytorch_does():
    problem = make(dtype=torch.bfloat16)
    layer = adapted(problem["student_weight"], dtype=torch.bfloat16).to(torch.bfloat16)
    _, found, _, exact = both({}, torch.bfloat16, layer)
    hidden = problem["student_hidden"]
    teacher = problem["teacher_hidden"].float() @ problem["teacher_weight"].float().t()
    usual = dense_distillation_loss(
        layer(hidden).float(), problem["labels"], teacher,
        kd_weight=0.7, ce_weight=0.3, beta=0.4, num_items=50,
    )  # fmt: skip
    usual = torch.autograd.grad(usual.loss, [hidden, *parameters(layer)])
    for mine, theirs, right in zip(found, usual, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm()


def test_autocast_is_as_in_the_model():
    problem = make()
    layer = adapted(problem["student_weight"])
    head, seen = head_of(layer, problem), []
    layer.register_forward_hook(lambda module, args, out: seen.append((len(out), out.dtype)))
    options = TileOptions(1.0, 0.3, 0.4, 1.0, "jsd", "bucket")

    def loss():
        return head_distillation_loss(
            problem["student_hidden"], head, problem["labels"], options, **given(problem, "dense"), chunk_tokens=7
        ).loss

    trained = [problem["student_hidden"], *parameters(layer)]
    exact = torch.autograd.grad(loss(), trained)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():  # whose cast weights have no graph
            loss()
        found = torch.autograd.grad(loss(), trained)
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        assert 0 < (mine - right).norm() <= 0.03 * right.norm()


def test_each_parameter_gets_one_gradient_a_micro_batch_and_logits_are_those_of_a_chunk():
    problem = make()
    layer = adapted(problem["student_weight"], dropout=0.0)
    rows, calls = [], []
    layer.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    for parameter in parameters(layer):
        parameter.register_hook(lambda gradient: calls.append(gradient.shape))
    options = TileOptions(1.0, 0.3, 0.4, 1.0, "jsd", "bucket")

    def backward(labels):
        loss = head_distillation_loss(
            problem["student_hidden"], head_of(layer, problem), labels, options, **given(problem, "dense"),
            num_items=24, chunk_tokens=5,
        ).loss  # fmt: skip
        loss.backward()
        return loss

    labels, (first, second) = problem["labels"], (problem["labels"].clone() for _ in range(2))
    first[20:], second[:20] = -100, -100
    for part in (first, second):
        calls.clear()
        loss = backward(part)
        assert len(calls) == 2
    assert max(rows) <= 5
    with pytest.raises(RuntimeError, match="backward"):
        loss.backward()
    in_two = [p.grad.clone() for p in parameters(layer)]
    layer.zero_grad()
    backward(labels)
    for one, whole in zip(in_two, parameters(layer), strict=True):
        torch.testing.assert_close(one, whole.grad, rtol=1e-5, atol=1e-7)


def test_its_weight_is_no_number():
    """Whoever multiplied by it would have no plausible result."""
    problem = make()
    head = head_of(adapted(problem["student_weight"]), problem).first_columns(200)
    assert head.weight.shape == (200, H)
    assert head.weight.isnan().all()
    assert head.weight.untyped_storage().nbytes() == 4
    assert head.differentiable_logits(problem["student_hidden"]).shape == (37, 200)


def test_a_frozen_module_and_masked_columns_of_a_teacher():
    """A quantised head without an adapter has no parameter that wants a gradient."""
    problem = make()
    layer = adapted(problem["student_weight"]).requires_grad_(False)
    bias = torch.zeros(V)
    bias[-3:] = -torch.inf
    results, options = [], TileOptions(1.0, 0.3, 0.4, 1.0, "jsd", "bucket")
    for chunk in (5, None):
        teacher = Head(problem["teacher_weight"], bias if chunk is None else None, 1.0, None)
        head = head_of(layer, problem).first_columns(V)
        loss = head_distillation_loss(
            problem["student_hidden"], head, problem["labels"].clamp(max=V - 4), options,
            problem["teacher_hidden"], teacher, chunk_tokens=chunk,
        ).loss  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, problem["student_hidden"])
        assert gradient.isfinite().all()
        results.append(gradient)
    assert 0 < (results[0] - results[1]).norm() < 0.5 * results[0].norm()
