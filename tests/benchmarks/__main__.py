"""`python -m tests.benchmarks`: our loss beside its peers, as a table.

    python -m tests.benchmarks                    what the requirements speak about, 25 to 30 minutes; writes results.*
    python -m tests.benchmarks --quick            small sizes, about a minute: does everything run?
    python -m tests.benchmarks --full             the whole grid of sizes, β, heads and dtypes; takes hours
    python -m tests.benchmarks --only loss        loss, memory, step, parts, visual, self, on-policy (8 minutes),
                                                  packing (4 minutes), selection, angles, draws, cache-size,
                                                  plan (10 minutes) or manifest, printed;
                                                  --out DIR writes it. angles, draws, cache-size and plan, which no
                                                  machine changes, on-policy, packing, selection and manifest,
                                                  which say where they were measured, into the results that are
                                                  there

On a machine with CUDA the loss is measured there instead; `--cpu` measures the CPU all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import (
    angles,
    cache_size,
    draws,
    gpu,
    itself,
    manifest,
    on_policy,
    packing,
    parts,
    planned,
    report,
    requirements,
    selection,
    step,
    visual,
)
from tests.benchmarks.cases import LossCase, errors, expected, forward_backward, make_inputs
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.memory import limit_memory, memory_of_losses
from tests.benchmarks.peers import OURS, PEERS
from tests.benchmarks.timing import describe, progress, time_loss

# Read by libraries that are imported later, here and in child processes.
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONWARNINGS": "ignore",
}
PARTS = (
    "loss", "memory", "step", "parts", "visual", "self", "on-policy", "packing", "selection", "angles", "draws",
    "cache-size", "plan", "manifest",
)  # fmt: skip
KEPT_WITH_OTHERS = ("on-policy", "packing", "selection", "angles", "draws", "cache-size", "plan", "manifest")
"""Parts that may stand beside results of another day: no machine changes them, or they say when they were measured."""
EAGER = [name for name, peer in PEERS.items() if not peer.compiled]


def main() -> None:
    options = _options()
    os.environ |= _ENVIRONMENT
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    started = time.monotonic()
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "settings": {"threads": options.threads, "rounds": options.rounds, "quick": options.quick},
    }
    if torch.cuda.is_available() and not options.cpu:
        results |= _on_cuda(options)
    else:
        limit_memory()
        measure = {
            "loss": _loss, "memory": _memory, "step": _step, "parts": _parts, "visual": _visual, "self": _self,
            "on-policy": _on_policy, "packing": _packing, "selection": _selection, "angles": _angles,
            "draws": _draws, "cache-size": _cache_size, "plan": _plan, "manifest": _manifest,
        }  # fmt: skip
        for name in [options.only] if options.only else PARTS:
            results |= measure[name](options)
    results["settings"]["minutes"] = round((time.monotonic() - started) / 60, 1)
    if options.only in KEPT_WITH_OTHERS and options.out is not None and (options.out / report.DATA).exists():
        results = json.loads((options.out / report.DATA).read_text()) | {options.only: results[options.only]}
    if not options.quick:
        results["required"] = [dataclasses.asdict(row) for row in requirements.rows(results)]
    print(report.as_markdown(results))
    # The files of the repository are those of a whole run.
    folder = options.out or (None if options.quick or options.only else Path(__file__).parent)
    if folder is not None:
        progress("wrote " + ", ".join(map(str, report.write(results, folder))))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small sizes: shows that everything runs")
    size.add_argument("--full", action="store_true", help="the whole grid, and every implementation in every case")
    parser.add_argument("--only", choices=PARTS, help="one part; printed, and written only with --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results.md and results.json go")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case (5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU measurements (1)")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU although there is a GPU")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def _loss(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        case = LossCase(tokens=128, vocab=2048, student_hidden=64, teacher_hidden=128)
        timed = [time_loss(case, [*EAGER, "liger_compiled_sup"], options.rounds)]
        return {"loss": timed, "errors": [_errors(dataclasses.replace(case, dtype="bfloat16"), EAGER)]}
    timed = [time_loss(case, list(PEERS if options.full else names), options.rounds) for case, names in _cases(options)]
    case, names = requirements.BF16_ERRORS
    return {"loss": timed, "errors": [_errors(c, [OURS, *names]) for c in (case, LossCase())]}


def _cases(options: argparse.Namespace) -> list[tuple[LossCase, list[str]]]:
    required = [(case, list(names)) for case, names in requirements.FASTER]
    if not options.full:
        return required
    grid = itertools.product((1024, 4096), (32768, 151936), (0.5, 0.0, 1.0), ("float32", "bfloat16"), (True, False))
    return [(LossCase(*sizes), []) for sizes in grid]


def _errors(case: LossCase, names: list[str]) -> dict[str, Any]:
    torch._dynamo.reset()
    inputs = make_inputs(case)
    exact = expected(case, inputs)
    found: dict[str, Any] = {}
    for name in names:
        inputs.forget_gradients()
        if not PEERS[name].installed:
            found[name] = {"note": f"{PEERS[name].package} is not installed"}
            continue
        try:
            found[name] = errors(inputs, forward_backward(PEERS[name], case, inputs)(), exact)
        except Exception as error:  # a peer that fails is a result
            found[name] = {"note": describe(error)}
    progress(f"errors, {case}: done")
    return {"case": vars(case), "title": str(case), "peers": found}


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        quick = [(LossCase(tokens=256, vocab=8192), [OURS, "trl_dense"])]
        return {"memory": [memory_of_losses(case, names, options.threads) for case, names in quick]}
    wanted = [(case, [OURS, *names]) for case, names in requirements.SMALLER]
    # Beside what is required: the peers on supervised tokens only, the comparison that is harder for us.
    wanted[0] = (wanted[0][0], [*wanted[0][1], "trl_dense_sup", "trl_chunked_sup", "liger_compiled_sup"])
    wanted.append((requirements.AT_MOST[0], [OURS, *requirements.AT_MOST[2]]))
    if options.full:
        wanted = [(case, list(PEERS)) for case, _ in wanted]
    return {"memory": [memory_of_losses(case, names, options.threads) for case, names in wanted]}


def _step(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        cases = [(step.StepCase(vocab=4096, length=64, layers=2), ["trl_gkd"])]
    else:
        cases = [(case, list(names)) for case, names in requirements.STEPS]
        cases[0] = (cases[0][0], [*cases[0][1], "liger_compiled_sup"])
        if options.full:
            cases = [
                (dataclasses.replace(case, tied=tied), list(step.PATHS)) for case, _ in cases for tied in (True, False)
            ]
    return {"step": [step.measure_step(case, names, options.rounds, options.threads) for case, names in cases]}


def _parts(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        return {"parts": [parts.where_time_goes(LossCase(tokens=128, vocab=8192), 2)]}
    return {"parts": [parts.where_time_goes(case, 3) for case, _ in requirements.PARTS]}


def _visual(options: argparse.Namespace) -> dict[str, Any]:
    case = requirements.VISUAL[0]
    if options.quick:
        case = dataclasses.replace(case, vocab=2048, layers=2, student_widths=(64, 128), teacher_widths=(128, 256))
    # A step is short beside the noise that the limit must be told from.
    return {"visual": [visual.measure_overhead(case, 4 * options.rounds)]}


def _self(options: argparse.Namespace) -> dict[str, Any]:
    case = requirements.ITSELF[0]
    if options.quick:
        case = dataclasses.replace(case, layers=2, width=128, length=64)
    return {"self": [itself.measure(case, options.threads)]}


def _on_policy(options: argparse.Namespace) -> dict[str, Any]:
    cases = [(case, list(names), rounds) for case, names, rounds in requirements.ON_POLICY]
    if options.quick:
        small = on_policy.OnPolicyCase(16, student=(128, 2), teacher=(128, 2), vocab=512)
        cases = [(case, list(on_policy.CONTENDERS), 2) for case in (small, dataclasses.replace(small, stopping=True))]
    return {"on-policy": [on_policy.measure(case, [OURS, *names], rounds) for case, names, rounds in cases]}


def _packing(options: argparse.Namespace) -> dict[str, Any]:
    cases = packing.CASES
    if options.quick:
        cases = [packing.PackingCase(1, 4, 2, longest=64, median=16, student=(128, 2), teacher=(128, 2))]
    return {"packing": [packing.measure(case, options.rounds) for case in cases]}


def _selection(options: argparse.Namespace) -> dict[str, Any]:
    cases = selection.CASES
    if options.quick:
        cases = [dataclasses.replace(case, step=step.StepCase(vocab=4096, length=64, layers=2)) for case in cases]
    return {"selection": [selection.measure(case, options.rounds) for case in cases]}


def _angles(options: argparse.Namespace) -> dict[str, Any]:
    cases = [dataclasses.replace(case, vocab=2048) for case in angles.CASES] if options.quick else angles.CASES
    return {"angles": [angles.measure_angles(case) for case in cases]}


def _draws(options: argparse.Namespace) -> dict[str, Any]:
    cases = [dataclasses.replace(case, sets=50) for case in draws.CASES] if options.quick else draws.CASES
    return {"draws": [draws.measure_draws(case) for case in cases]}


def _cache_size(options: argparse.Namespace) -> dict[str, Any]:
    cases = [case for case in cache_size.CASES if case.vocab == 1024] if options.quick else cache_size.CASES
    return {"cache-size": [cache_size.measure_size(case) for case in cases]}


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    small = dataclasses.replace(planned.CASES[0], name="small", rows=2, length=64, student=(256, 2), teacher=(256, 2))
    cases = [small] if options.quick else planned.CASES
    return {"plan": [planned.measure(case, options.threads) for case in cases]}


def _manifest(options: argparse.Namespace) -> dict[str, Any]:
    cases = [manifest.ManifestCase(2**24)] if options.quick else manifest.CASES
    return {"manifest": [manifest.measure(case, options.rounds) for case in cases]}


def _on_cuda(options: argparse.Namespace) -> dict[str, Any]:
    case = dataclasses.replace(gpu.CASE, tokens=512, vocab=8192) if options.quick else gpu.CASE
    errors_case = dataclasses.replace(case, tokens=min(case.tokens, 1024), vocab=min(case.vocab, 32768))
    return {"cuda": [gpu.measure(case, max(options.rounds, 5))], "errors": [gpu.measure_errors(errors_case)]}


if __name__ == "__main__":
    sys.exit(main())
