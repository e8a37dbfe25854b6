"""Code for a GPU on a machine without one: shapes, dtypes, devices and live bytes, and no numbers.

`stand_in.cpp` gives a CPU build of PyTorch a CUDA device on which tensors without data live. It has to be loaded before
torch, and stays, so what uses it runs in a process of its own: `run("grid")` runs `python -m tests.fake_cuda.grid`, and
`device.py` is what that begins with.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARY = "KDTRAIN_FAKE_CUDA"
"""Environment variable with the path of the compiled stand-in."""


def compiler() -> str | None:
    """The C++ compiler of this machine, if it has one."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compile the stand-in, some three seconds."""
    import torch

    root, out = Path(torch.__file__).parent, folder / "stand_in.so"
    libraries = root / "lib"
    include = [root / "include", root / "include/torch/csrc/api/include"]
    command = [compiler(), "-O0", "-shared", "-fPIC", "-std=c++20", *(f"-I{path}" for path in include)]
    subprocess.run(
        [
            *map(str, command),
            str(HERE / "stand_in.cpp"),
            "-o",
            str(out),
            f"-L{libraries}",
            f"-Wl,-rpath,{libraries}",
            "-lc10",
            "-ltorch_cpu",
        ],
        check=True,
    )
    return out


def run(name: str, library: Path, *arguments: str) -> Any:
    """What the script of this folder prints, as JSON in its last line."""
    root = HERE.parent.parent
    environment = os.environ | {LIBRARY: str(library), "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    # Ended at once: what torch takes down at the end of a process knows no such device.
    main = f"import os, runpy; runpy.run_module('tests.fake_cuda.{name}', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", f"{main}; os.sys.stdout.flush(); os._exit(0)", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])
