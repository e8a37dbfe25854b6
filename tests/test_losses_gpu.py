"""The way of a GPU, on a CPU: its formulas as they are traced, its buffers and its chunks, with emulated products.

What cannot run here is thin: `gemm.product` and `gemm.add_product`, half precision in and float32 out. In their place
stands the float32 product of the half-precision operands.
"""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from kdtrain.losses import chunks, fused_distillation_loss, gemm, generated, gradients
from kdtrain.losses.fused import head_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.losses.kinds import WITH_BETA, Stretch
from kdtrain.losses.mixture import MixedHeads
from kdtrain.losses.sizes import chunk_sizes, default_chunk, tile_bytes
from kdtrain.losses.tile import TileOptions
from kdtrain.losses.workspace import padded
from tests.test_losses import BETAS, DIVERGENCES
from tests.test_losses_fused import GRID, make, reference_loss, trained

CUDA = torch.device("cuda")


def add_product(total, a, b):
    assert a.dtype == b.dtype
    total.add_(a.to(total.dtype) @ b.to(total.dtype))


def product(a, b, out):
    assert a.dtype == b.dtype
    return out.copy_(a.to(out.dtype) @ b.to(out.dtype))


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(gemm, "on_gpu", lambda device: True)
    monkeypatch.setattr(gemm, "product", product)
    monkeypatch.setattr(gemm, "add_product", add_product)
    monkeypatch.setattr(generated, "_without", {})
    monkeypatch.setattr(generated, "_ran", set())


@pytest.fixture
def traced(emulated, monkeypatch):
    """The formulas that are compiled, operation by operation; counts its calls."""
    calls = []

    def run(kind, *arguments):
        calls.append(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return generated._tile(*arguments, kind=kind)

    monkeypatch.setattr(generated, "_run", run)
    return calls


@contextlib.contextmanager
def plain():
    """The way of a CPU, in a test of that of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "on_gpu", lambda device: False)
        yield


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradients_match_float64(beta, divergence, traced):
    for seed, (bias, (kd, ce), temperature, (scale, cap), chunk, masked) in list(enumerate(GRID))[::7]:
        problem = make(bias=bias, seed=seed)
        ce_mask = torch.arange(37) % 2 == 0 if masked else None
        expected, exact = reference_loss(problem, kd, ce, beta, temperature, divergence, scale, cap, ce_mask)
        result = fused_distillation_loss(
            **problem, kd_weight=kd, ce_weight=ce, ce_token_weights=ce_mask, beta=beta, temperature=temperature,
            divergence=divergence, student_logit_scale=scale, teacher_logit_scale=scale, student_softcap=cap,
            teacher_softcap=cap, chunk_tokens=chunk,
        )  # fmt: skip
        where = (bias, kd, ce, temperature, scale, cap, chunk, masked)
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5), where
        for ours, theirs in zip(torch.autograd.grad(result.loss, trained(problem)), exact, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), where
    assert traced


OTHERS = ("skew_kl", "skew_reverse_kl", "alpha_beta", "entropy_aware", "tvd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("divergence", "beta"), [*((d, 0.3) for d in WITH_BETA), *((d, 0.0) for d in OTHERS)])
def test_sums_metrics_and_weighted_gradients_are_those_of_a_cpu(divergence, beta, dtype, traced, monkeypatch):
    monkeypatch.setattr(gradients, "half_rows", lambda vocabulary: 16)  # several products of several chunks each
    weights = torch.arange(37) % 4 * 0.5
    found = []
    for way in (plain, contextlib.nullcontext):
        problem = make(bias=True, dtype=dtype)
        with way():
            result = fused_distillation_loss(
                **problem, kd_weight=0.7, ce_weight=0.3, kd_token_weights=weights, beta=beta, divergence=divergence,
                num_items=torch.tensor(50), num_kd_items=30, student_softcap=20.0, chunk_tokens=7,
            )  # fmt: skip
            found.append((result, torch.autograd.grad(result.loss, trained(problem))))
    (cpu, cpu_gradients), (gpu, gpu_gradients) = found
    for name in vars(cpu):
        torch.testing.assert_close(getattr(gpu, name), getattr(cpu, name), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gpu_gradients, cpu_gradients, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 6e-3) * theirs.norm()
    assert len(traced) == 4


@pytest.mark.parametrize("without", [None, "tvd", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_several_divergences_share_a_product(dtype, without, traced, monkeypatch):
    """Also where one of them has no kernels, and leaves its gradient over the logits."""
    monkeypatch.setattr(gradients, "half_rows", lambda vocabulary: 16)
    real = chunks.generated_terms

    def some_terms(*arguments):
        return None if arguments[4].divergence == without else real(*arguments)

    monkeypatch.setattr(chunks, "generated_terms", some_terms)
    stretches = [Stretch(9, 7, "skew_kl", 0.5), Stretch(15, 14, "tvd", 0.5), Stretch(13, 10, "jsd", 0.3)]
    weights, found = (torch.arange(37) % 4 > 0) * 0.5, []
    for way in (plain, contextlib.nullcontext):
        problem = make(bias=True, dtype=dtype)
        student, teacher = (
            Head(problem[f"{side}_weight"], problem[f"{side}_bias"], 1.0, None) for side in ("student", "teacher")
        )
        with way():
            result = head_distillation_loss(
                problem["student_hidden"], student, problem["labels"].clamp(min=0),
                TileOptions(0.7, 0.0, 0.5, 1.5, "jsd", "bucket"), problem["teacher_hidden"], teacher,
                kd_token_weights=weights, num_items=torch.tensor(50), num_kd_items=30, chunk_tokens=7,
                stretches=stretches,
            )  # fmt: skip
            found.append((result, torch.autograd.grad(result.loss, trained(problem))))
    (cpu, cpu_gradients), (gpu, gpu_gradients) = found
    torch.testing.assert_close(gpu.loss, cpu.loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gpu_gradients, cpu_gradients, strict=True):
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 6e-3) * theirs.norm()
    assert traced


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_several_teachers_are_one_mean_there_too(temperature, traced):
    problem = make()
    other = make(seed=3)
    heads = [Head(one["teacher_weight"], None, 1.0, None) for one in (problem, other)]
    mixed = MixedHeads((problem["teacher_hidden"], other["teacher_hidden"]), tuple(heads), (0.25, 0.75))
    options = TileOptions(0.7, 0.3, 0.3, temperature, "jsd", "bucket")
    losses = []
    for way in (plain, contextlib.nullcontext):
        hidden = problem["student_hidden"].detach().requires_grad_()
        with way():
            head = Head(problem["student_weight"].detach(), None, 1.0, None)
            loss = head_distillation_loss(hidden, head, problem["labels"], options, mixed=mixed, chunk_tokens=7).loss
            loss.backward()
        losses.append((loss, hidden.grad))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)


HEADS = {"plain": {}, "bias": {"bias": True}, "soft-cap": {"softcap": 3.0}, "scale": {"scale": 0.5}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("kd", "ce"), [(1.0, 0.1), (0.3, 0.7), (0.9, 0.0)])
def test_errors_are_at_most_twice_those_of_plain_half_precision(kd, ce, kind, dtype, traced):
    bias, scale, cap = HEADS[kind].get("bias", False), HEADS[kind].get("scale", 1.0), HEADS[kind].get("softcap")
    problem = make(n=90, vocab=801, dtype=dtype, bias=bias, seed=5)
    expected, exact = reference_loss(problem, kd, ce, 0.5, 1.0, "jsd", scale, cap, None)
    ours = fused_distillation_loss(
        **problem, kd_weight=kd, ce_weight=ce, student_logit_scale=scale, teacher_logit_scale=scale,
        student_softcap=cap, teacher_softcap=cap, chunk_tokens=23,
    )  # fmt: skip
    assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(ours.loss, trained(problem))
    usual = torch.autograd.grad(plain_loss(problem, kd, ce, scale, cap), trained(problem))
    for mine, theirs, right in zip(found, usual, exact, strict=True):
        assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm()
        assert (mine.double() - right).norm() <= 4 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize(("kd", "ce"), [(0.0, 1 / 3), (0.7, 0.1), (0.5, 0.3)])
def test_the_weight_of_the_labels_is_not_rounded(kd, ce, traced):
    """At a label that is found impossible the gradient is that weight, the same at every token: its error would add
    up. The head is float32, so that the sum is not rounded behind it."""
    problem = make(n=64, dtype=torch.bfloat16)
    with torch.no_grad():
        problem["labels"].fill_(7)
        problem["student_hidden"].fill_(1.0)
    for side in ("student", "teacher"):
        problem[f"{side}_weight"] = problem[f"{side}_weight"].detach().float()
        problem[f"{side}_weight"][7] = -3.0
    problem["teacher_hidden"].fill_(1.0)
    problem["student_weight"].requires_grad_()
    _, (_, exact) = reference_loss(problem, kd, ce, 0.0, 1.0, "jsd", 1.0, None, None)
    result = fused_distillation_loss(**problem, kd_weight=kd, ce_weight=ce, beta=0.0)
    found = torch.autograd.grad(result.loss, problem["student_weight"])[0][7]
    torch.testing.assert_close(found.double(), exact[7], rtol=1e-5, atol=0)


def test_small_probabilities_keep_their_digits_in_float16(traced):
    """All the same here, so that rounded ones err alike: a step of float16 near 0 is 0.3 % of 1/50,001."""
    tokens, vocabulary = 6, 50_001
    hidden = torch.ones(tokens, 2, dtype=torch.float16)
    weight = torch.zeros(vocabulary, 2, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.long)
    loss = fused_distillation_loss(hidden, weight, labels, ce_weight=1.0, kd_weight=0.0).loss
    (found,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found[1:], torch.full_like(found[1:], 1 / vocabulary), rtol=5e-4, atol=0)
    torch.testing.assert_close(found[0], torch.full((2,), 1 / vocabulary - 1), rtol=5e-4, atol=0)


def test_few_tokens_with_weights_in_a_large_window_do_not_overflow_float16(traced):
    problem = make(dtype=torch.float16)
    weights = torch.zeros(37)
    weights[torch.arange(37)[problem["labels"] >= 0][:2]] = 1.0
    result = fused_distillation_loss(
        **problem, ce_weight=0.5, kd_token_weights=weights, beta=0.0, num_items=200_000, num_kd_items=4
    )  # fmt: skip
    for one in torch.autograd.grad(result.loss, trained(problem)):
        assert one.isfinite().all()


def plain_loss(problem, kd, ce, scale, cap):
    """As a model and a loss written in PyTorch compute it: logits in the model's dtype, softmax in float32."""

    def logits(side):
        z = nn.functional.linear(problem[f"{side}_hidden"], problem[f"{side}_weight"], problem[f"{side}_bias"]) * scale
        return (z if cap is None else cap * torch.tanh(z / cap)).float()

    keep = problem["labels"] >= 0
    log_p, log_q = (torch.log_softmax(logits(side)[keep], -1) for side in ("student", "teacher"))
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    kl = (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m)).sum(-1) / 2
    return kd * kl.mean() + ce * nn.functional.nll_loss(log_p, problem["labels"][keep])


# ---- compiling -------------------------------------------------------------------------------------------------------


def windows():
    """What windows of a run change, after the first three: lengths, D, β and weights; an evaluation, own answers."""
    lengths = itertools.cycle((60, 37, 5, 90, 41, 2, 13))
    for number, length in zip(range(8), lengths, strict=False):
        for beta in (0.5, 0.2 + 0.05 * number):
            yield number, length, {"ce_weight": 0.5, "beta": beta, "num_items": 100 + number}, True
        yield number, length + 3, {"ce_weight": 0.0, "beta": 0.5, "kd_weight": 1 + number / 8}, True
        yield number, length + 1, {"ce_weight": 0.5, "beta": 0.5}, False


def test_nothing_is_compiled_after_the_third_window(emulated, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **rest: compile_(f, backend="eager", **rest))
    generated._compiled.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(generated, "_ran", set())
    stats = torch._dynamo.utils.counters["stats"]
    counts = {}
    for number, length, options, trains in windows():
        problem = make(n=length)
        with torch.set_grad_enabled(trains), torch._dynamo.config.patch(error_on_recompile=number > 2):
            fused_distillation_loss(**problem, **options, chunk_tokens=16)
        counts[number] = stats["unique_graphs"]
    assert not generated._without
    assert len(generated._ran) == 3  # trained with and without a cross-entropy, and evaluated
    assert counts[2] == counts[7]
    generated._compiled.cache_clear()
    torch._dynamo.reset()


def test_there_may_be_more_kinds_than_versions_of_one_function(emulated, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **rest: compile_(f, backend="eager", **rest))
    generated._compiled.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(generated, "_ran", set())
    with torch._dynamo.config.patch(recompile_limit=2):
        for divergence in ("jsd", "tvd", "skew_kl"):
            for ce_weight in (0.0, 0.5):
                problem = make()
                fused_distillation_loss(**problem, ce_weight=ce_weight, divergence=divergence).loss.backward()
    assert not generated._without
    assert len(generated._ran) == 6
    generated._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_compute_the_same(beta, dtype, emulated, monkeypatch):
    """The whole of it, compiled for this processor."""
    results = []
    for way in (plain, contextlib.nullcontext):
        problem = make(n=60, dtype=dtype)
        with way():
            result = fused_distillation_loss(**problem, ce_weight=0.5, beta=beta, chunk_tokens=13)
            results.append((result, torch.autograd.grad(result.loss, trained(problem))))
    assert not generated._without
    (cpu, expected), (compiled, found) = results
    for name in vars(cpu):
        torch.testing.assert_close(getattr(compiled, name), getattr(cpu, name), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 6e-3) * theirs.norm()


def test_without_a_compiler_it_runs_without_kernels_and_says_so_once(emulated, monkeypatch, caplog):
    tried = []

    def none(kind):
        tried.append(kind)
        raise RuntimeError("backend='inductor' raised:\nRuntimeError: Failed to find C compiler.") from None

    monkeypatch.setattr(generated, "_compiled", none)
    problem, again = make(dtype=torch.bfloat16), make(dtype=torch.bfloat16)
    result = fused_distillation_loss(**problem, ce_weight=0.5, chunk_tokens=7)
    with plain():
        expected = fused_distillation_loss(**again, ce_weight=0.5, chunk_tokens=7)
    assert len(tried) == 1
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(result.loss, trained(problem)),
        torch.autograd.grad(expected.loss, trained(again)),
        strict=True,
    ):
        assert (ours - theirs).norm() <= 6e-3 * theirs.norm()
    (line,) = [record.getMessage() for record in caplog.records if "kernels" in record.getMessage()]
    assert "Failed to find C compiler" in line
    assert "\n" not in line


def test_a_kind_that_cannot_be_compiled_leaves_the_others_their_kernels(emulated, monkeypatch, caplog):
    tried = []

    def some(kind):
        tried.append(kind)
        if kind.options.divergence == "tvd":
            raise RuntimeError("out of registers")
        return lambda *arguments: generated._tile(*arguments, kind=kind)

    monkeypatch.setattr(generated, "_compiled", some)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for divergence in ("jsd", "tvd", "jsd", "tvd"):
        fused_distillation_loss(**make(), divergence=divergence)
    assert [kind.options.divergence for kind in tried] == ["jsd", "tvd", "jsd"]
    (line,) = [record.getMessage() for record in caplog.records if "kernels" in record.getMessage()]
    assert "with tvd" in line
    assert "out of registers" in line


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_no_lack_of_a_compiler_is_raised(wrapped, emulated, monkeypatch):
    def full(kind):
        error = torch.OutOfMemoryError("CUDA out of memory")
        if wrapped:
            raise RuntimeError("backend='inductor' raised:") from error
        raise error

    monkeypatch.setattr(generated, "_compiled", full)
    with pytest.raises(RuntimeError, match="backend" if wrapped else "out of memory"):
        fused_distillation_loss(**make(), chunk_tokens=7)
    assert not generated._without


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_chunks_fill_the_tiles_of_a_gpus_products():
    sizes = {v: default_chunk(v, torch.float32, CUDA) for v in (32001, 50257, 128256, 151936, 262144, 10**7)}
    assert sizes == {32001: 1024, 50257: 1024, 128256: 512, 151936: 512, 262144: 256, 10**7: 128}
    assert [gradients.half_rows(v) for v in (32001, 151936, 262144, 10**7)] == [2048, 1536, 896, 128]
    assert chunk_sizes(1300, 512, 128) == [512, 512, 276]
    assert chunk_sizes(1100, 512, 128) == [384, 384, 332]
    assert chunk_sizes(1024, 512, 128) == [512, 512]
    assert chunk_sizes(5, 512, 128) == [5]
    assert chunk_sizes(10, 3, 128) == [3, 3, 2, 2]
    assert chunk_sizes(0, 512, 128) == []
    assert padded(50257, CUDA) == 50304
    assert padded(50257, torch.device("cpu")) == 50257


def test_rows_begin_at_aligned_places_and_what_is_between_them_is_no_number(traced):
    problem = make(vocab=301)
    assert len(problem["student_weight"]) % 64
    expected, _ = reference_loss(problem, 1.0, 0.5, 0.5, 1.0, "jsd", 1.0, None, None)
    result = fused_distillation_loss(**problem, ce_weight=0.5)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (kind,) = traced
    (_, stride, _) = kind.shapes[1]
    assert stride == (320, 1)


def test_the_planned_bytes_are_those_of_the_buffers():
    half, wide = (tile_bytes(8192, 151936, torch.float32, CUDA, with_teacher=True, half=half) for half in (True, False))
    tile, kept = 512 * 151936 * 4, 1536 * 151936 * 2
    assert 0 <= half - 2 * tile - kept < 2**27  # and a few rows where there are no kernels
    assert half - wide == kept
