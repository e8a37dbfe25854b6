"""A real vLLM server on a CPU, in an environment of its own: see `make test-server`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PYTHON = Path(os.environ.get("KDTRAIN_VLLM_PYTHON", Path(__file__).parent.parent / ".venv-server/bin/python"))
_START_S = 240
_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def serve(folder: Path | str, log: Path, *options: str) -> Iterator[str]:
    """The base URL of a server of the model in `folder`, called `teacher`, in float32."""
    if not PYTHON.exists():
        pytest.skip(f"no vLLM at {PYTHON}: make test-server installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "400"]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _SETTINGS
    with open(log, "wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, cwd=log.parent, start_new_session=True
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its engine is a process of its own
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(health, timeout=5).close()
            return
        time.sleep(0.5)
    sys.stderr.write(log.read_text(errors="replace")[-4000:])
    raise AssertionError(f"the server did not start, see {log}")
