"""What the compiler makes of the loss for a GPU, as text: how often its kernels touch [R, V] in memory.

`python -m tests.fake_cuda.lowered CASE …` runs PyTorch's own way from Python to Triton's source, with dynamic rows, up
to where Triton would compile it. Loads and stores of a tile are counted once for each loop over the vocabulary.
"""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

from tests.fake_cuda.device import FakeTensorMode, Head, generated, torch

# isort: split
import torch._inductor.config
import torch._inductor.scheduler
import torch.utils._triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import get_interface_for_device
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V as virtual
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kdtrain.losses.kinds import DivergenceParams
from kdtrain.losses.tile import RowWeights, TileOptions

ROWS, VOCAB = 512, 151936
CASES: dict[str, dict[str, Any]] = {
    "0": {"beta": 0.0},
    "0.5": {"beta": 0.5},
    "0.9": {"beta": 0.9},
    "1": {"beta": 1.0},
    "mixed_kl": {"beta": 0.5, "divergence": "mixed_kl"},
    "skew_kl": {"divergence": "skew_kl"},
    "skew_reverse_kl": {"divergence": "skew_reverse_kl"},
    "alpha_beta": {"divergence": "alpha_beta"},
    "entropy_aware": {"divergence": "entropy_aware"},
    "tvd": {"divergence": "tvd"},
    "temperature": {"beta": 0.5, "temperature": 2.0},
    "bias and soft-cap": {"beta": 0.5, "bias": True, "softcap": 30.0},
    "token weights": {"beta": 0.0, "weights": True},
    "cross-entropy": {"teacher": False, "kd": 0.0},
    "no gradient": {"beta": 0.5, "gradient": False},
    "few rows": {"beta": 0.5, "rows": 40},
    "odd vocabulary": {"beta": 0.5, "vocab": 50257},
    "float32": {"beta": 0.5, "gradient": torch.float32},
}
# Of an H200.
DEVICE = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=2**37, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip
sources: list[str] = []


def lower(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """The compiler's steps behind tracing, and its text kept."""
    mode = detect_fake_mode(inputs)
    patched = torch._inductor.config.patch(generated._OPTIONS)
    with virtual.set_fake_mode(mode), virtual.set_debug_handler(DebugContext()), patched:
        _recursive_post_grad_passes(module, is_inference=True)
        graph = GraphLowering(module, example_inputs=inputs, is_inference=True, shape_env=mode.shape_env)
        with virtual.set_graph_handler(graph):
            graph.run(*inputs)
            found, _ = graph.codegen()
    sources.append(found if isinstance(found, str) else found.value)
    return make_boxed_func(module.forward)


def believe() -> None:
    """Without the device and without Triton, whose compiler is not asked for."""
    torch._inductor.scheduler.has_triton = lambda *_, **__: True
    torch.utils._triton.triton_hash_with_backend = lambda: ""
    torch.cuda.get_device_properties = lambda *_: DEVICE
    torch.cuda.get_device_capability = lambda *_: (DEVICE.major, DEVICE.minor)
    interface = get_interface_for_device("cuda")
    for where in (interface, interface.Worker):
        where.get_device_properties = staticmethod(lambda *_: DEVICE)  # type: ignore[method-assign,assignment]
    interface.get_compute_capability = staticmethod(lambda *_: 90)  # type: ignore[method-assign,assignment]
    backend = aot_autograd(
        fw_compiler=lower,
        inference_compiler=lower,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    compile_ = torch.compile
    torch.compile = lambda function, options, **rest: compile_(function, backend=backend, **rest)  # type: ignore[assignment]


def source_of(case: dict[str, Any]) -> str:
    rows, vocab, softcap = case.get("rows", ROWS), case.get("vocab", VOCAB), case.get("softcap")
    stride = -(-vocab // 64) * 64
    dtype = case.get("gradient", torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=False, shape_env=ShapeEnv()):

        def made(dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(rows, stride, device="cuda", dtype=dtype)[:, :vocab]

        student, teacher = made(), made() if case.get("teacher", True) else None
        bias = torch.empty(vocab, device="cuda") if "bias" in case else None
        head = Head(torch.empty(vocab, 4, device="cuda"), bias, 1.0, softcap)
        options = TileOptions(
            case.get("kd", 0.7), 0.3, case.get("beta", 0.0), case.get("temperature", 1.0),
            case.get("divergence", "jsd"), "bucket", DivergenceParams(),
        )  # fmt: skip
        weights = torch.empty(rows, device="cuda") if "weights" in case else None
        out = None if dtype is False else student if dtype == torch.float32 else made(dtype)
        labels = torch.empty(rows, device="cuda", dtype=torch.long)
        sources.clear()
        generated._compiled.cache_clear()  # fewer rows would be served by the kernels that there are
        sums = generated.generated_terms(
            student,
            teacher,
            labels,
            RowWeights(weights, weights),
            options,
            (head, head if teacher is not None else None),
            out,
        )
        assert sums is not None, "it was not compiled"
    (source,) = sources
    return source


def counted(source: str, vocab: int) -> dict[str, int]:
    """Transfers of a tile, and buffers of its size, in one graph."""
    # Every access in which both the row and the column run: row by row, or (XBLOCK over all of it) with one number.
    touched = re.compile(r"tl\.(?:load|store)\(\w*ptr\d+ \+ \((?:r0_\d+ \+ (?:\d+|ks\d+)\*x\d+|x\d+)\), [^)]*mask")
    of_tile = [found for found in touched.findall(source) if "r0_" in found]
    sizes = [size.split(", ") for size in re.findall(r"empty_strided_cuda\(\(([^)]*)\)", source)]
    return {
        "transfers": len(of_tile),
        "buffers": sum(str(vocab) in size for size in sizes),
        "kernels": len(re.findall(r"^def (triton_\w+)\(", source, re.MULTILINE)),
        "pointwise": len(re.findall(r"^def (triton_poi\w+)\(", source, re.MULTILINE)),
    }


if __name__ == "__main__":
    believe()
    names = sys.argv[1:] or list(CASES)
    print(json.dumps({name: counted(source_of(CASES[name]), CASES[name].get("vocab", VOCAB)) for name in names}))
