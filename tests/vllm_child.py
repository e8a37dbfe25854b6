"""What needs trl and vLLM in one process, run by the python of the environment with vLLM.

`python tests/vllm_child.py PACKAGES CASE …` adds the packages of the tests' own environment behind its own, runs a
case, and prints what it found as JSON in its last line.

vLLM for CPUs packs the weights of linear layers away as it loads them, so that nothing can be loaded over them later.
Here its layers keep them, which is all that is changed of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.path.append(sys.argv[1])
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")

import torch

from kdtrain.config import generation as rules
from kdtrain.config.options import GenerationOptions
from kdtrain.errors import KdtrainError
from kdtrain.generation.sampling import generation_config
from kdtrain.generation.vllm import VllmSampler

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [100, 101], [40, 41, 42]]
STOP, NEW = 2, 24


def student(folder: str, lora: bool = False) -> Any:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.tiny import lora_config

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if not lora:
        return model
    config = lora_config(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", modules_to_save=["lm_head"])
    return get_peft_model(model, config).eval()


def moved(model: Any, seed: int) -> None:
    """Other values in everything that trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def greedy(model: Any, new: int = NEW, forbidden: list[int] | None = None) -> list[list[int]]:
    """What transformers writes."""
    config = generation_config([STOP], 3, None, new, forbidden or ())
    made = [model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :] for ids in PROMPTS]
    return [ids.tolist() for ids in made]


def written(sampler: VllmSampler, new: int = NEW, temperature: float | None = None, **more: Any) -> list[list[int]]:
    prompts = more.pop("prompts", PROMPTS)
    config = generation_config([STOP], 3, temperature, new, more.pop("forbidden", ()), **more)
    return sampler.write(prompts, config, [0] * len(prompts), [()] * len(prompts))


def build(model: Any, **options: Any) -> VllmSampler:
    from accelerate import Accelerator

    return VllmSampler(GenerationOptions(**options), lambda: model, Accelerator(cpu=True), None, rows=64)


@contextmanager
def weights_stay() -> Iterator[None]:
    """Linear layers of vLLM that multiply by the weights as they are; loaded and computed in float32."""
    import vllm
    from vllm.model_executor.layers import utils

    def use_as_they_are(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    original, engine = utils.dispatch_cpu_unquantized_gemm, vllm.LLM
    utils.dispatch_cpu_unquantized_gemm = use_as_they_are
    from trl.generation import vllm_generation

    vllm_generation.LLM = lambda **kwargs: engine(**kwargs, dtype="float32", enforce_eager=True)
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def colocated(folder: str) -> dict[str, Any]:
    """An adapter that moves between windows, and the student's own weights after."""
    model = student(folder, lora=True)
    before = {name: value.clone() for name, value in model.named_parameters() if "base_layer" in name}
    launched = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ]
    options = {"backend": "vllm_colocate", "gpu_memory_utilization": 0.05, "max_model_length": 128}
    with weights_stay():
        sampler = build(model, **options)
    left = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ]
    found: dict[str, Any] = {"same_environment": left == launched, "steps": []}
    for step in range(3):
        moved(model, seed=step)
        found["steps"].append((written(sampler), greedy(model)))
    found["same_base"] = all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in before.items())
    sampler._vllm.sync_weights = lambda: None
    moved(model, seed=9)
    found["stale"] = (written(sampler), greedy(model))
    sampler._checked = False
    found["refused"] = refusal(lambda: written(sampler))
    return found


def served(folder: str, url: str) -> dict[str, Any]:
    """A server that has the student already: what it writes, with other weights, and how trl gives it weights."""
    from trl.generation.vllm_client import VLLMClient

    options = {"backend": "vllm_server", "base_url": url, "timeout_s": 5.0}
    model = student(folder)
    found: dict[str, Any] = {"connecting": refusal(lambda: build(model, **options))}
    VLLMClient.init_communicator = lambda self, device: None
    sampler = build(model, **options)
    sampler._vllm.sync_weights = lambda: None
    found["greedy"] = written(sampler), greedy(model)
    found["shorter"] = written(sampler, new=3), greedy(model, new=3)
    taken = {ids[0] for ids in greedy(model)}
    found["forbidden"] = written(sampler, forbidden=sorted(taken)), greedy(model, forbidden=sorted(taken))
    same = {"prompts": [PROMPTS[0]] * 2000 + [PROMPTS[1]] * 2000, "new": 1, "temperature": 0.7}
    found["drawn"] = [ids[0] for ids in written(sampler, **same)]
    found["drawn of five"] = [ids[0] for ids in written(sampler, top_k=5, **same)]
    found["beyond the context"] = refusal(lambda: written(sampler, new=256))
    moved(model, seed=3)
    sampler._checked = False
    found["other weights"] = refusal(lambda: written(sampler))
    return found


def refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except KdtrainError as error:
        return f"{type(error).__name__}: {error}"
    return ""


CASES: dict[str, Callable[..., dict[str, Any]]] = {"colocated": colocated, "served": served}

if __name__ == "__main__":
    rules.VERSIONS = ("0.22.0", "0.32.0")
    print(json.dumps(CASES[sys.argv[2]](*sys.argv[3:])))
