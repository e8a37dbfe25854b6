"""Whether vLLM can write the student's answers, asked before any weights are loaded."""

from __future__ import annotations

import logging
import time
from typing import Any

import httpx2
import torch

from kdtrain.config.generation import INSTEAD, server_root, why_no_vllm
from kdtrain.config.options import DistillationOptions, GenerationOptions
from kdtrain.config.server_urls import check_server_urls
from kdtrain.data.errors import show
from kdtrain.errors import ConfigError, NotAvailableError, PreflightError
from kdtrain.models.kinds import sees_images
from kdtrain.preflight.server import by_one_rank

logger = logging.getLogger(__name__)

START = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs"
)
"""How a server is started that can be given weights; MODEL is the student's folder or name."""
_OR = f"Or {INSTEAD}."
_PAUSE_S, _REPLY_S = 2.0, 60.0


def check_generation(options: DistillationOptions, config: Any, device: torch.device) -> None:
    """Refuse what would fail at the first window that the student writes; a collective.

    Args:
        config: of the student's model.

    Raises:
        ConfigError, PreflightError, NotAvailableError: with the way out.
    """
    generation = options.generation
    if not by_vllm(options):
        return
    if generation.backend == "vllm_server":
        _check_address(generation)
    missing = why_no_vllm()
    if missing is not None:
        raise PreflightError(f"{generation.backend} {missing}. Install it (pip install 'trl[vllm]'). {_OR}")
    _check_student(generation, config)
    if device.type != "cuda":
        served = generation.backend == "vllm_server"
        reason = "go to the server by NCCL alone" if served else "cannot be loaded over those that vLLM has packed away"
        raise PreflightError(
            f"{generation.backend} needs a CUDA device, and this run is on a {device.type.upper()}: there, the "
            f"student's new weights {reason}, and vLLM would go on writing with those that it began with. {_OR}"
        )
    if generation.backend == "vllm_server":
        columns = int(config.get_text_config().vocab_size)
        by_one_rank(lambda: _check_server(generation, str(getattr(config, "_name_or_path", "")), columns))


def _check_address(generation: GenerationOptions) -> None:
    """What the check of a config does; the class is given options without one."""
    if generation.base_url is None:
        raise ConfigError(f"generation.base_url is missing: backend vllm_server needs a server. {_OR}")
    for problem in check_server_urls((), [generation.base_url], with_key=False):
        if problem.level == "error":
            raise ConfigError(f"generation.base_url: {problem.message} ({problem.hint})")


def by_vllm(options: DistillationOptions) -> bool:
    """Whether vLLM writes answers in a run."""
    return options.generation.backend != "transformers" and options.lm_kd_active and options.lmbda > 0


def _check_student(generation: GenerationOptions, config: Any) -> None:
    if sees_images(config):
        raise NotAvailableError(f"{generation.backend}: vision-language students are not available there yet. {_OR}")
    if getattr(config, "quantization_config", None) is not None:
        raise NotAvailableError(f"{generation.backend}: quantised students are not available there yet. {_OR}")
    if generation.backend == "vllm_colocate" and not getattr(config, "_name_or_path", ""):
        raise ConfigError(f"vllm_colocate reads the student from its folder, and this one has none: save it. {_OR}")


def check_sharding(accelerator: Any) -> None:
    """Refuse weights in pieces that are not put together on their way to vLLM.

    Raises:
        NotAvailableError: FSDP 1, DeepSpeed ZeRO-3, tensor parallelism.
    """
    state = accelerator.state
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    parallel = accelerator.parallelism_config
    kind = None
    if fsdp is not None and getattr(fsdp, "fsdp_version", 2) == 1:
        kind = "FSDP 1"
    elif deepspeed is not None and deepspeed.zero_stage == 3:
        kind = "DeepSpeed ZeRO-3"
    elif parallel is not None and parallel.tp_enabled:
        kind = "tensor parallelism of the student"
    if kind is not None:
        raise NotAvailableError(f"Generation by vLLM under {kind} is not available yet. Use FSDP 2 or ZeRO-2. {_OR}")


def _check_server(options: GenerationOptions, student: str, columns: int) -> None:
    """Raise PreflightError unless the server can be given the student's weights, as far as it says."""
    assert options.base_url is not None, "_check_address has seen it"
    root = server_root(options.base_url)
    with httpx2.Client(timeout=_REPLY_S) as client:
        _wait(client, root, options.timeout_s)
        config = _server_config(client, root)
        if (config.get("weight_transfer_config") or {}).get("backend") != "nccl":
            raise PreflightError(
                f"The vLLM server at {show(root)} cannot be given weights. Start it so: {START}. {_OR}"
            )
        model = config.get("model_config") or {}
        if model.get("quantization"):
            raise PreflightError(
                f"The vLLM server at {show(root)} has a quantised model. Start it on the student. {_OR}"
            )
        if model.get("model") != student:
            logger.warning(
                "The vLLM server at %s was started on %s, and the student is %s: they have to be the same model.",
                show(root),
                show(model.get("model")),
                show(student),
            )
        _check_columns(client, root, columns)


def _wait(client: httpx2.Client, root: str, timeout_s: float) -> None:
    """Until the server is up."""
    until, said = time.monotonic() + timeout_s, False
    while True:
        try:
            if client.get(f"{root}/health").status_code == 200:
                return
            reason = "it is not ready"
        except httpx2.HTTPError as error:
            reason = show(" ".join(str(error).split()) or type(error).__name__)
        if time.monotonic() >= until:
            raise PreflightError(
                f"The vLLM server at {show(root)} does not answer after {timeout_s:g} s ({reason}). Start it so: "
                f"{START}. Or raise rlhf.generation.timeout_s. {_OR}"
            )
        if not said:
            logger.info("Waiting for the vLLM server at %s (up to %g s).", show(root), timeout_s)
        said = True
        time.sleep(min(_PAUSE_S, timeout_s))


def _server_config(client: httpx2.Client, root: str) -> dict[str, Any]:
    try:
        reply = client.get(f"{root}/server_info", params={"config_format": "json"})
        found = reply.json()["vllm_config"] if reply.status_code == 200 else None
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise PreflightError(
            f"The server at {show(root)} does not say how it was started: it is no vLLM server, or one without "
            f"VLLM_SERVER_DEV_MODE=1, which weights need. Start it so: {START}. {_OR}"
        )
    return found


def _check_columns(client: httpx2.Client, root: str, columns: int) -> None:
    """Compare the vocabularies' sizes: vLLM refuses a bias for a token that its model does not have."""

    def takes(token: int) -> bool:
        body = {"model": name, "prompt": [[0]], "max_tokens": 1, "logit_bias": {str(token): 1.0}}
        return client.post(f"{root}/v1/completions", json=body).status_code == 200

    try:
        name = client.get(f"{root}/v1/models").json()["data"][0]["id"]
        same = takes(columns - 1) and not takes(columns)
    except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
        raise PreflightError(
            f"The vLLM server at {show(root)} gives no answer that can be read ({show(error)}). {_OR}"
        ) from error
    if not same:
        raise PreflightError(
            f"The vLLM server at {show(root)} has another vocabulary than the student, whose logits have {columns} "
            f"columns: it serves another model. Start it on the student. {_OR}"
        )
