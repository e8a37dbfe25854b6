"""Two versions of the code, run and compared bit for bit: for a change of the code's shape that must change no number.

    python -m tests.reference_runs --against COMMIT [--only NAME …] [--keep DIR]

COMMIT is checked out into a temporary work tree. Every run is started as a user would, once with that tree and once
with this one, on the CPU, with the same models and rows. Compared are the records of `logging.jsonl`, without times,
rates and memory, and every tensor of the weights that a run leaves, those in its checkpoints included. One line per
run says `equal` or the first difference; the exit code is 1 if there is any. `--keep` leaves inputs and runs in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from tests.reference_inputs import make_inputs

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "visual_projectors.safetensors")
FIT = [sys.executable, "-m", "kdtrain", "fit"]
CLASS = [sys.executable, str(Path(__file__).with_name("reference_class.py"))]
TWO_RANKS = ["launch.num_processes=2", "training.per_device_train_batch_size=1"]
LORA = ["tuner.train_type=lora", "tuner.lora_rank=4"]
HALF_ON_POLICY = ["rlhf.lmbda=0.5", "training.max_steps=6"]
MIXED_DATA = """data.train=[
    {path: INPUTS/train.jsonl, weight: 0.5},
    {path: INPUTS/completions.jsonl, ce: false},
    {path: INPUTS/questions.jsonl, answers: teacher},
]"""

# name -> (base config, overrides on the command line)
FITS: dict[str, tuple[str, list[str]]] = {
    "text": ("text", []),
    "forward_kl": (
        "text",
        ["rlhf.beta=0", "rlhf.kd_temperature=2", "rlhf.divergence=jsd_scaled", "data.train_on=last"],
    ),
    "reverse_kl": ("text", ["rlhf.beta=1", "rlhf.divergence=mixed_kl", "model.model=INPUTS/capped_student"]),
    "sft": ("text", ["rlhf.llm_kd_weight=0", "training.weight_decay=0.1"]),
    "lora": ("text", [*LORA, "tuner.lora_dropout=0.1", "rlhf.disable_dropout=false", "rlhf.eval_kd=false"]),
    "lora_head": ("text", [*LORA, "tuner.modules_to_save=[lm_head]", "model.model=INPUTS/experts"]),
    "on_policy": ("text", ["rlhf.lmbda=1", "rlhf.sft_alpha=0.3"]),
    "half_on_policy": ("text", [*HALF_ON_POLICY, "training.gradient_checkpointing=true"]),
    "seq_kd": ("text", ["rlhf.seq_kd=true", "training.optim=sgd", "training.learning_rate=0.1"]),
    "answers": ("text", [MIXED_DATA, "data.max_length=48", "data.on_overlength=truncate"]),
    "padded_vocabulary": ("text", ["rlhf.teacher_model=INPUTS/padded_teacher"]),
    "half_precision_teacher": ("text", ["rlhf.teacher.dtype=bfloat16"]),
    "experts": ("text", ["model.model=INPUTS/experts", "training.router_aux_loss_coef=0.2", *HALF_ON_POLICY]),
    "vision": ("vision", []),
    "vision_on_policy": ("vision", [*HALF_ON_POLICY, "custom.visual_kd.distance=cosine"]),
    "vision_lora": ("vision", [*LORA, "tuner.freeze_vit=true", "custom.visual_kd.targets=[aligner]"]),
    "vision_only": ("vision", ["rlhf.llm_kd_weight=0", "tuner.freeze_llm=true"]),
    "two_ranks": ("text", TWO_RANKS),
    "two_ranks_on_policy": ("text", [*TWO_RANKS, *HALF_ON_POLICY]),
    "two_ranks_vision": ("vision", TWO_RANKS),
}
# Records of two steps and a checkpoint after the third: one record begins before it and ends after it.
IN_BETWEEN = [
    "training.max_steps=6",
    "training.logging_steps=2",
    "training.save_strategy=steps",
    "training.save_steps=3",
]
RESUMED: dict[str, tuple[str, list[str]]] = {
    "resume": ("text", [*IN_BETWEEN, "rlhf.lmbda=0.5"]),
    "resume_vision_lora": ("vision", [*IN_BETWEEN, *LORA]),
}
CLASS_PARTS = ("messages", "collators", "images")
NAMES = [*FITS, *RESUMED, *(f"class_{part}" for part in CLASS_PARTS)]


# ---- running ---------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A run did not end well; the message has what it said last."""


@dataclass(frozen=True)
class Version:
    """One of the two versions: its code, the folder of its runs, and the inputs, which both read."""

    name: str
    tree: Path
    runs: Path
    inputs: Path

    def start(self, command: list[str], folder: Path) -> str:
        """Run a command with this version's code, in a folder; its standard output.

        Raises:
            Failed: the exit code is not 0.
        """
        done = subprocess.run(
            command, cwd=folder, env=self._environment(), capture_output=True, text=True, encoding="utf-8", check=False
        )
        if done.returncode:
            lines = done.stderr.splitlines()
            said = [line for line in lines if line.startswith("kdtrain: ")] or lines[-20:]
            raise Failed("\n".join([f"exit code {done.returncode} {self.name}", *said]))
        return done.stdout

    def _environment(self) -> dict[str, str]:
        launcher = ("ACCELERATE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
        return env | {
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Not shared: rows that one version has encoded would hide how the other one encodes them.
            "HF_DATASETS_CACHE": str(self.runs / "cache"),
        }

    def check(self) -> None:
        """Make sure that this tree's code is what its runs import, whatever is installed."""
        self.runs.mkdir(parents=True)
        found = self.start([sys.executable, "-c", "import kdtrain; print(kdtrain.__file__)"], self.runs).strip()
        if not Path(found).is_relative_to(self.tree):
            raise SystemExit(f"Runs with the code in {self.tree} would import {found}.")

    def run(self, name: str) -> Path:
        """One reference run; the folder with everything that it has left.

        Raises:
            Failed: the exit code is not 0.
        """
        folder = self.runs / name
        folder.mkdir()
        if name in FITS:
            self.start(self._fit(*FITS[name]), folder)
        elif name in RESUMED:
            command = self._fit(*RESUMED[name])
            self.start(command, folder)
            as_if_killed(folder / "run")
            self.start([*command, "--resume", "auto"], folder)
        else:
            self.start([*CLASS, str(self.inputs), name.removeprefix("class_")], folder)
        return folder

    def _fit(self, config: str, overrides: list[str]) -> list[str]:
        given = [text.replace("INPUTS", str(self.inputs)) for text in overrides]
        return [*FIT, str(self.inputs / f"{config}.yaml"), "training.output_dir=run", *given]


def as_if_killed(run_dir: Path) -> None:
    """Leave a run folder as a run that was killed after its first checkpoint would have."""
    for path in sorted(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[1:]:
        shutil.rmtree(path)
    for name in WEIGHTS:
        (run_dir / name).unlink(missing_ok=True)


# ---- comparing -------------------------------------------------------------------------------------------------------


def first_difference(before: Path, after: Path) -> str | None:
    """The first thing in which two runs' records or weights differ, as text; None if nothing does."""
    names = [_compared_files(folder) for folder in (before, after)]
    if names[0] != names[1]:
        return f"files: only before {sorted(names[0] - names[1])}, only after {sorted(names[1] - names[0])}"
    if not any(name.endswith("logging.jsonl") for name in names[0]) or not any(n.endswith(WEIGHTS) for n in names[0]):
        return "nothing to compare: records or weights are missing in both"
    for name in sorted(names[0]):
        compare = _records_difference if name.endswith(".jsonl") else _tensors_difference
        if difference := compare(before / name, after / name):
            return f"{name}: {difference}"
    return None


def _compared_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name in ("logging.jsonl", *WEIGHTS)}


def _records_difference(before: Path, after: Path) -> str | None:
    records = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (before, after)]
    if len(records[0]) != len(records[1]):
        return f"{len(records[0])} records before, {len(records[1])} after"
    for number, (old, new) in enumerate(zip(*records, strict=True), 1):
        for key in [*old, *(key for key in new if key not in old)]:
            # As text, so that NaN equals itself and 0.0 does not equal -0.0.
            values = [json.dumps(record[key]) if key in record else "nothing" for record in (old, new)]
            if not _measured(key) and values[0] != values[1]:
                return f"record {number}, {key}: {values[0]} before, {values[1]} after"
    return None


def _measured(key: str) -> bool:
    """Whether a value is a time, a rate or a memory, which no two runs have in common."""
    return key.endswith(("runtime", "per_second", "peak_memory_gib", "elapsed_s", "remaining_s", "step_time_s"))


def _tensors_difference(before: Path, after: Path) -> str | None:
    old, new = load_file(before), load_file(after)
    if old.keys() != new.keys():
        return f"tensors: only before {sorted(old.keys() - new.keys())}, only after {sorted(new.keys() - old.keys())}"
    for name, tensor in sorted(old.items()):
        kinds = [(value.dtype, tuple(value.shape)) for value in (tensor, new[name])]
        if kinds[0] != kinds[1]:
            return f"{name}: {kinds[0]} before, {kinds[1]} after"
        if not torch.equal(_bytes(tensor), _bytes(new[name])):
            largest = (tensor.double() - new[name].double()).abs().max()
            return f"{name}: largest difference {largest:.1e}"
    return None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# ---- the command -----------------------------------------------------------------------------------------------------


def compare(name: str, versions: list[Version]) -> str | None:
    """Run `name` with both versions at the same time; what differs, as text."""
    with ThreadPoolExecutor(len(versions)) as pool:
        jobs = [pool.submit(version.run, name) for version in versions]
    try:
        return first_difference(*(job.result() for job in jobs))
    except Failed as error:
        return str(error)


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary work tree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main() -> int:
    options = _options()
    disable_progress_bar()
    names, different = options.only or NAMES, 0
    with contextlib.ExitStack() as stack:
        work = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_inputs(work / "inputs")
        trees = {"before": stack.enter_context(checked_out(options.against)), "after": ROOT}
        versions = [Version(name, tree, work / name, work / "inputs") for name, tree in trees.items()]
        for version in versions:
            version.check()
        for name in names:
            started = time.monotonic()
            difference = compare(name, versions)
            different += difference is not None
            print(f"{name:24} {difference or 'equal'}  ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{different} of {len(names)} runs differ from {options.against}.")
    return int(different > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reference_runs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", required=True, metavar="COMMIT", help="the version to compare with")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"out of {', '.join(NAMES)}")
    parser.add_argument(
        "--keep", type=lambda text: Path(text).resolve(), metavar="DIR", help="a folder that is not there"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
