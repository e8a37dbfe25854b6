"""What the loss must reach, each as a row: required, measured, yes or no. A measurement that is missing says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.angles import AngleCase
from tests.benchmarks.cases import GIB, LossCase
from tests.benchmarks.draws import CASES, DrawsCase
from tests.benchmarks.gpu import FOUR_GEMMS
from tests.benchmarks.itself import FORWARD, SFT, TITLES, ItselfCase
from tests.benchmarks.on_policy import BARE, CHECKPOINTED, CONTENDERS, OnPolicyCase
from tests.benchmarks.peers import OURS, PEERS
from tests.benchmarks.step import PATHS, StepCase
from tests.benchmarks.visual import VisualCase

SMALL = LossCase()
LARGE = LossCase(vocab=151936)
PARITY = 0.95
"""Equal within what medians of five rounds can tell apart."""

# Case, and for each peer how many times faster ours must be. "+ CE" without more is over supervised tokens, the harder.
FASTER: list[tuple[LossCase, dict[str, float]]] = [
    (
        SMALL,
        {
            "trl_dense": 3.5,
            "trl_dense_sup": 1.8,
            "trl_chunked_sup": 4.0,
            "liger_compiled": 2.2,
            "liger_compiled_sup": 1.1,
        },
    ),
    (LossCase(head_trains=False), {"trl_dense": 6.0, "liger_compiled_sup": 1.5}),
    (LossCase(beta=0.0), {"trl_dense": 2.5, "trl_chunked_sup": 3.5, "liger_compiled_sup": 1.05}),
    (LossCase(beta=1.0), {"trl_dense": 2.5, "trl_chunked_sup": 3.5, "liger_compiled_sup": 1.05}),
    (LossCase(dtype="bfloat16"), {"trl_dense": 5.0, "trl_chunked_sup": 10.0, "liger_compiled_sup": PARITY}),
]
BF16_ERRORS = (LossCase(dtype="bfloat16"), ["trl_dense", "trl_chunked_sup", "liger_compiled_sup"])
# Case, and the share of each peer's extra memory that ours may take.
SMALLER: list[tuple[LossCase, dict[str, float]]] = [
    (LossCase(tokens=4096), {"trl_dense": 35, "trl_chunked": 14, "liger_compiled": 5}),
    (LARGE, {"trl_dense": 16}),
]
AT_MOST = (LossCase(tokens=4096, vocab=151936), 0.6 * GIB, ["trl_dense", "trl_dense_sup"])
STEPS: list[tuple[StepCase, dict[str, tuple[float, float | None]]]] = [
    (StepCase(), {"trl_gkd": (2.5, 7), "trl_distillation": (3.5, None)}),
    (StepCase(dtype="bfloat16"), {"trl_gkd": (3.0, 6)}),
]
PARTS = [(LARGE, 0.10), (LossCase(vocab=151936, dtype="bfloat16"), 0.25)]
GEMM_RATE = 0.85
ITSELF = (ItselfCase(), 0.05)
VISUAL = (VisualCase(), 0.03)
# Case, for each contender how many times faster ours must be (for the bare parts, that share of their sum), and rounds.
_ALL = {"trl_distillation": 1.15, "trl_gkd": 1.6, BARE: 1 / 1.15}
_SMALL, _LARGE = ((128, 4), (256, 4)), ((512, 5), (768, 6))
ON_POLICY: list[tuple[OnPolicyCase, dict[str, float], int]] = [
    (OnPolicyCase(48), {**_ALL, CHECKPOINTED: 2.0}, 5),
    (OnPolicyCase(192), _ALL, 3),
    (OnPolicyCase(256), _ALL, 3),
    (OnPolicyCase(192, stopping=True), {"trl_distillation": 1.4, "trl_gkd": 1.6}, 3),
    (OnPolicyCase(48, student=_SMALL[0], teacher=_SMALL[1]), _ALL, 5),
    (OnPolicyCase(48, student=_LARGE[0], teacher=_LARGE[1]), _ALL, 3),
]
ANGLES = [(AngleCase(), 20.0), (AngleCase(gap=0.1), 20.0)]
CACHE_BYTES = {1024: 110, 49152: 155, 151936: 170}
MANIFEST_SHARE = 0.15
PACKING = 1.5
"""Tokens per second of rows behind each other over padded ones, on a set of very different lengths."""
# All at KL ≥ 0.5 nats: the error of the mean gradient, and the share of truncated top-12's angle.
DRAWS: tuple[list[DrawsCase], float, float] = (CASES, 0.02, 1 / 5)


@dataclass(frozen=True)
class Row:
    """One line of the table; `holds` is None where it could not be measured."""

    measured: str
    against: str
    required: str
    value: str
    holds: bool | None


def rows(results: dict[str, Any]) -> list[Row]:
    """Every requirement that the parts of `results` speak about."""
    if "cuda" in results:
        return list(_cuda(results))
    found: list[Row] = []
    judges = {
        "loss": _loss, "memory": _memory, "step": _step, "parts": _parts, "visual": _visual, "self": _self,
        "on-policy": _on_policy, "packing": _packing, "angles": _angles, "draws": _draws, "cache-size": _cache_size,
        "manifest": _manifest,
    }  # fmt: skip
    for part, judge in judges.items():
        if part in results:
            found.extend(judge(results))
    return found


def _loss(results: dict[str, Any]) -> Iterator[Row]:
    for case, required in FASTER:
        peers = _peers(results["loss"], case)
        for name, times in required.items():
            label = "parity" if times == PARITY else f"≥ {times:g}×"
            yield _at_least(f"loss, {case}", PEERS[name].title, times, peers.get(name, {}), "ratio", label)
    case, names = BF16_ERRORS
    peers = _peers(results.get("errors", []), case)
    for name in names:
        mine, theirs = _worst_gradient(peers.get(OURS, {})), _worst_gradient(peers.get(name, {}))
        known = mine is not None and theirs is not None
        value = f"{mine:.1e} against {theirs:.1e}" if known else _why(peers.get(name, {}))
        yield Row(f"gradient error, {case}", PEERS[name].title, "smaller", value, mine < theirs if known else None)


def _memory(results: dict[str, Any]) -> Iterator[Row]:
    for case, required in SMALLER:
        peers = _peers(results["memory"], case)
        for name, share in required.items():
            yield _share(f"extra memory, {case}", PEERS[name].title, share, peers.get(OURS, {}), peers.get(name, {}))
    case, limit, names = AT_MOST
    peers = _peers(results["memory"], case)
    mine = peers.get(OURS, {}).get("bytes")
    others = ", ".join(f"{PEERS[name].title}: {_memory_text(peers.get(name, {}))}" for name in names)
    value = _memory_text(peers.get(OURS, {}))
    yield Row(f"extra memory, {case}", others, f"≤ {limit / GIB:g} GiB", value, None if mine is None else mine <= limit)


def _step(results: dict[str, Any]) -> Iterator[Row]:
    for case, required in STEPS:
        peers = _peers(results["step"], case)
        for name, (times, share) in required.items():
            yield _at_least(f"step, {case}", PATHS[name], times, peers.get(name, {}), "ratio", f"≥ {times:g}×")
            if share is not None:
                mine, theirs = (peers.get(n, {}).get("memory", {}) for n in (OURS, name))
                yield _share(f"step's extra memory, {case}", PATHS[name], share, mine, theirs)


def _parts(results: dict[str, Any]) -> Iterator[Row]:
    for case, limit in PARTS:
        found = next((row for row in results["parts"] if row["case"] == vars(case)), None)
        share = found and found["elementwise_share"]
        value = f"{share:.0%}" if found else "not measured"
        yield Row(f"element-wise share, {case}", "the call", f"≤ {limit:.0%}", value, share <= limit if found else None)
        rate = found and found["gemm_rate"]
        value = f"{rate:.0%}" if found else "not measured"
        holds = rate >= GEMM_RATE if found else None
        yield Row(f"GEMM rate, {case}", "a bare `mm`", f"≥ {GEMM_RATE:.0%}", value, holds)


def _visual(results: dict[str, Any]) -> Iterator[Row]:
    case, limit = VISUAL
    found = next((row["overhead"] for row in results["visual"] if row["title"] == str(case)), None)
    value = "not measured" if found is None else f"{found:+.1%}"
    holds = None if found is None else found <= limit
    yield Row(f"overhead of visual KD, {case}", "the step without it", f"≤ {limit:.0%}", value, holds)


def _self(results: dict[str, Any]) -> Iterator[Row]:
    case, slack = ITSELF
    row = next((row for row in results["self"] if row["title"] == str(case)), {"peers": {}})
    found = {name: result.get("bytes") for name, result in row["peers"].items()}
    for name in ("base", "ema"):
        value, holds = "not measured", None
        if all(found.get(one) is not None for one in (SFT, FORWARD, name)):
            share = found[name] / (found[SFT] + found[FORWARD])
            value, holds = f"{share:.3f} ({found[name] / GIB:.2f} GiB)", share <= 1 + slack
        against = f"{TITLES[SFT]}, and {TITLES[FORWARD]}"
        yield Row(f"peak memory of a run, {TITLES[name]}, {case}", against, f"≤ {1 + slack:.2f}", value, holds)


def _on_policy(results: dict[str, Any]) -> Iterator[Row]:
    for case, required, _ in ON_POLICY:
        peers = next((row["peers"] for row in results["on-policy"] if row["title"] == str(case)), {})
        for name, times in required.items():
            measured, found = f"on-policy window, {case}", peers.get(name, {})
            if name != BARE:
                yield _at_least(measured, CONTENDERS[name], times, found, "ratio", f"≥ {times:g}×")
                continue
            share = found and found.get("ratio") and 1 / found["ratio"]
            value = f"{share:.2f}" if share else _why(found)
            yield Row(measured, CONTENDERS[BARE], f"≤ {1 / times:.2f}", value, share * times <= 1 if share else None)


def _angles(results: dict[str, Any]) -> Iterator[Row]:
    for case, limit in ANGLES:
        found = next((row["degrees"]["bucket"] for row in results["angles"] if row["title"] == str(case)), None)
        value = "not measured" if found is None else f"{found:.1f}°"
        holds = None if found is None else found < limit
        yield Row(f"gradient angle with the bucket, {case}", "full distributions", f"< {limit:g}°", value, holds)


def _draws(results: dict[str, Any]) -> Iterator[Row]:
    cases, most, share = DRAWS
    for case in cases:
        found = next((row for row in results["draws"] if row["title"] == str(case)), None)
        if found is None:
            yield Row(f"mean gradient, {case}", "full distributions", f"within {most:.0%}", "not measured", None)
            continue
        required, error = f"within {most:.0%}", found["error"]
        yield Row(f"mean gradient, {case}", "full distributions", required, f"{error:.1%}", error <= most)
        mine, theirs = found["degrees"]["mean of the sets"], found["degrees"]["truncate"]
        value = f"{mine:.1f}° of {theirs:.1f}°"
        yield Row(f"angle of the mean, {case}", "top-12, truncated", "≤ 1/5", value, mine <= share * theirs)


def _cache_size(results: dict[str, Any]) -> Iterator[Row]:
    for row in results["cache-size"]:
        title, case = row["title"], row["case"]
        if case["mode"] == "sample":
            yield _below(f"bytes a token, {title}", row["bytes"], 3 * row["unique"] + 1, "{:.1f}")
        elif case["mode"] == "topk" and case["entries"] == 50:
            yield _below(f"bytes a token, {title}", row["bytes"], CACHE_BYTES[case["vocab"]], "{:.1f}")
            yield _below(f"log-probability, {title}", row["error"], 0.01, "{:.4f}")
            yield _below(f"loss of what is stored, {title}", row["difference"], 1e-3, "{:.1e}")
        elif case["mode"] == "hidden" and case["hidden_dtype"] == "int8":
            yield _below(f"bytes a token, {title}", row["bytes"], 1.05 * case["hidden"], "{:.1f}")


def _manifest(results: dict[str, Any]) -> Iterator[Row]:
    for row in results["manifest"]:
        yield _below(f"manifest's share of a save, {row['title']}", row["share"], MANIFEST_SHARE, "{:.1%}")


def _below(measured: str, found: float, most: float, text: str) -> Row:
    return Row(measured, "", "≤ " + text.format(most), text.format(found), found <= most)


def _packing(results: dict[str, Any]) -> Iterator[Row]:
    row = results["packing"][0]
    for name in ("padding_free", "packing"):
        found = row["peers"][name]
        yield _at_least(f"tokens/s, {name}, {row['title']}", "padded", PACKING, found, "ratio", f"≥ {PACKING:g}×")


def _cuda(results: dict[str, Any]) -> Iterator[Row]:
    row = results["cuda"][0]
    peers, title = row["peers"], row["title"]
    floor = peers.get(FOUR_GEMMS, {}).get("ratio")
    yield Row(
        f"loss, {title}",
        "the four GEMMs alone",
        "≤ 1.35×",
        f"{1 / floor:.2f}×" if floor else "not measured",
        1 / floor <= 1.35 if floor else None,
    )
    for name, times in (("liger_compiled_sup", 1.3), ("trl_chunked_sup", 1.8)):
        yield _at_least(f"loss, {title}", PEERS[name].title, times, peers.get(name, {}), "ratio", f"≥ {times:g}×")
    memory = peers.get(OURS, {}).get("memory", {})
    mine = memory.get("bytes")
    yield Row(
        f"extra memory without the head's gradient, {title}",
        "",
        "≤ 1.5 GiB",
        _memory_text(memory),
        None if mine is None else mine <= 1.5 * GIB,
    )


def _peers(part: list[dict[str, Any]], case: Any) -> dict[str, Any]:
    return next((row["peers"] for row in part if row["case"] == vars(case)), {})


def _at_least(measured: str, against: str, times: float, found: dict[str, Any], key: str, label: str) -> Row:
    value = found.get(key)
    return Row(
        measured,
        against,
        label,
        _why(found) if value is None else f"{value:.2f}×",
        None if value is None else value >= times,
    )


def _share(measured: str, against: str, share: float, mine: dict[str, Any], theirs: dict[str, Any]) -> Row:
    required = f"≤ 1/{share:g}"
    if "bytes" not in mine or "bytes" not in theirs:
        return Row(measured, against, required, f"{_memory_text(mine)} of {_memory_text(theirs)}", None)
    ratio = theirs["bytes"] / max(mine["bytes"], 1)
    value = f"1/{ratio:.1f} ({_memory_text(mine)} of {_memory_text(theirs)})"
    return Row(measured, against, required, value, ratio >= share)


def _worst_gradient(found: dict[str, Any]) -> float | None:
    values = [found[key] for key in ("grad_hidden", "grad_weight") if key in found]
    return max(values) if values else None


def _memory_text(found: dict[str, Any]) -> str:
    return f"{found['bytes'] / GIB:.2f} GiB" if "bytes" in found else _why(found)


def _why(found: dict[str, Any]) -> str:
    return found.get("note", "not measured")
