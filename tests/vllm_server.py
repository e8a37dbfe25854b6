"""A real vLLM server on a CPU, in an environment of its own: `make test-server` builds it and names its python."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2
import pytest

from tests import tiny

VARIABLE = "KDTRAIN_VLLM_PYTHON"
_STARTS_WITHIN_S = 280.0


def python() -> str:
    """Of the environment with vLLM."""
    found = os.environ.get(VARIABLE)
    if not found:
        pytest.fail(f"{VARIABLE} does not name the python of an environment with vLLM: run make test-server")
    return found


@contextlib.contextmanager
def running(
    model: str, log: Path, *, max_logprobs: int = 400, more: Sequence[str] = (), **environment: str
) -> Iterator[str]:
    """The base URL of a server that has answered a request; it is ended with all its processes.

    Args:
        model: folder of a model whose head_dim vLLM has a kernel for, such as 32: others die at the first request.
        log: file for what it prints.
        more: arguments.
    """
    port = tiny.free_port()
    command = [
        python(), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "teacher",
        "--host", "127.0.0.1", "--port", str(port), "--max-logprobs", str(max_logprobs), "--enforce-eager",
        "--dtype", "float32", *more,
    ]  # fmt: skip
    own = environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=inherited | own, stdout=output, stderr=output, start_new_session=True, cwd=log.parent
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _wait(url, process, log)
        yield url
    finally:
        _end(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it completes a prompt: `/v1/models` answers even where every request would kill the engine."""
    until = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx2.TransportError):
            body = {"model": "teacher", "prompt": [[5, 6, 7]], "max_tokens": 1}
            reply = httpx2.post(f"{url}/completions", json=body, timeout=60)
            assert reply.status_code == 200, f"the server's first reply has status {reply.status_code}; see {log}"
            return
        time.sleep(0.5)
    pytest.fail(f"the vLLM server did not start:\n{log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The engine and its workers are processes of their own, in the group of the server."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
