"""Files with a teacher's targets as other tools write them, from what is known of their formats; no code of theirs.

A teacher here is a function of the row: it finds the next token likely, and is in doubt about the rest.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

V = 320


def logprobs_of(ids, seed=0, sure=4.0):
    """[L, V] float64: row t predicts token t + 1 of the row, the last one anything."""
    rng = np.random.default_rng([seed, *ids])
    logits = rng.normal(size=(len(ids), V))
    logits[np.arange(len(ids) - 1), ids[1:]] += sure + rng.normal(size=len(ids) - 1)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def top_k(logprobs, k):
    """Ids and log-probabilities, the largest first."""
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    return ids, np.take_along_axis(logprobs, ids, 1)


# ---- DistillKit ------------------------------------------------------------------------------------------------------

RECOMMENDED = {
    "d": V, "k": 24, "exact_k": 8, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False,
}  # fmt: skip
WITH_BINS = {
    **RECOMMENDED, "exact_dtype": "float32", "polynomial_terms": [0, 1], "term_dtype": "float16", "normalize_t": True,
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 8, "num_elements": 9},
        {"scale_dtype": "bfloat16", "element_bits": 3, "num_elements": 4},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
    ],
}  # fmt: skip
DELTAS = {**RECOMMENDED, "exact_dtype": "float32", "exact_k": 24, "polynomial_terms": None, "delta_encoding": True}
LEGACY = {"k": 24, "exact_k": 16, "polynomial_degree": 2, "with_sqrt_term": True, "vocab_size": V}


def floats(values, dtype):
    """Little-endian bytes; bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        bits = np.asarray(values, "<f4").view("<u4")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype("<u2").tobytes()
    return np.asarray(values, {"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]).tobytes()


def as_floats(raw, dtype):
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(float)
    return np.frombuffer(raw, {"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]).astype(float)


def bits_of(integers, width):
    """One behind the other, the highest bit first, filled up with 0 to whole bytes."""
    text = "".join(f"{int(x):0{width}b}" for x in integers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def coded(values, config):
    """The bytes of one token's log-probabilities, in falling order."""
    values = np.asarray(values, float)
    if config["delta_encoding"]:
        values = np.diff(values, prepend=0)
    exact, rest = values[: config["exact_k"]], values[config["exact_k"] :]
    out = floats(exact, config["exact_dtype"])
    if terms := config["polynomial_terms"]:
        t = np.linspace(0, 1, len(rest)) if config.get("normalize_t") else np.arange(len(rest), dtype=float)
        x = np.stack([np.sqrt(t) if term == "sqrt" else t**term for term in terms], 1)
        raw = floats(np.linalg.lstsq(x, rest, rcond=None)[0], config["term_dtype"])
        rest = rest - x @ as_floats(raw, config["term_dtype"])
        out += raw
    at = 0
    for part in config["residual_bins"]:
        some, bits = rest[at : at + part["num_elements"]], part["element_bits"]
        at += part["num_elements"]
        raw = floats([np.abs(some).max() / (1 if bits == 1 else 2 ** (bits - 1))], part["scale_dtype"])
        scaled = some / as_floats(raw, part["scale_dtype"])[0]
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        integers = (scaled > 0) if bits == 1 else np.clip(np.round(scaled), low, high) - low
        out += raw + bits_of(integers, bits)
    return out


def write_distillkit(folder: Path, rows, config=RECOMMENDED, *, pad=True, shift=0, packed=False, **columns):
    """`data_0.parquet` and `compression_config.yaml`; a padding token behind each row gives its last one an entry."""
    folder.mkdir(exist_ok=True)
    width = math.ceil(math.log2(config["d"]))
    table = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": [], "attention_mask": []}
    for number, ids in enumerate(rows):
        found, values = top_k(np.roll(logprobs_of(ids), shift, 0), config["k"])
        entries = len(ids) if pad and not packed else len(ids) - (not packed)
        table["input_ids"].append([*ids, 0] if pad and not packed else list(ids))
        table["compressed_logprobs"].append([list(coded(row, config)) for row in values[:entries]])
        table["bytepacked_indices"].append([list(bits_of(row, width)) for row in found[:entries]])
        table["attention_mask"].append([number + 1] * len(ids))
    if packed:
        table = {name: [list(itertools.chain(*column))] for name, column in table.items()}
    else:
        del table["attention_mask"]
    byte = pa.list_(pa.list_(pa.uint8()))
    kinds = {"input_ids": pa.list_(pa.uint64()), "attention_mask": pa.list_(pa.int64())}
    pq.write_table(pa.table({n: pa.array(c, kinds.get(n, byte)) for n, c in table.items()}), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def word(ids, width):
    return sum(int(x) << (width * i) for i, x in enumerate(ids))


def write_legacy(folder: Path, rows, config=LEGACY, *, logits=False):
    """Words of 64 bits with as many whole ids as fit, the first in the lowest bits; float16 values; coefficients."""
    folder.mkdir(exist_ok=True)
    width = math.ceil(math.log2(config["vocab_size"]))
    place = np.arange(1, config["k"] - config["exact_k"] + 1, dtype=float)
    x = np.stack([*(place**-i for i in range(config["polynomial_degree"] + 1)), np.sqrt(place)], 1)
    table = {"input_ids": [], "packed_indices": [], "exact_values": [], "coeffs": []}
    for ids in rows:
        logprobs = logprobs_of(ids)
        found, values = top_k(logprobs - logprobs.mean(1, keepdims=True) if logits else logprobs, config["k"])
        per_word = 64 // width
        words = [[word(row[at : at + per_word], width) for at in range(0, len(row), per_word)] for row in found]
        table["input_ids"].append(list(ids))
        table["packed_indices"].append(words)
        table["exact_values"].append(values[:, : config["exact_k"]].astype(np.float16).astype(np.float32).tolist())
        table["coeffs"].append([np.linalg.lstsq(x, row[config["exact_k"] :], rcond=None)[0].tolist() for row in values])
    kinds = {"input_ids": pa.list_(pa.uint64()), "packed_indices": pa.list_(pa.list_(pa.uint64()))}
    numbers = pa.list_(pa.list_(pa.float32()))
    pq.write_table(
        pa.table({n: pa.array(c, kinds.get(n, numbers)) for n, c in table.items()}), folder / "data_0.parquet"
    )
    (folder / "compression_config.yaml").write_text(yaml.safe_dump({"teacher": {"legacy_logit_compression": config}}))
    return folder


# ---- axolotl ---------------------------------------------------------------------------------------------------------


def write_axolotl_chats(file: Path, chats, rows, answers, *, k=8, column="llm_text_generation_vllm_logprobs", behind=1,
                        numbers=False, texts=False, whole=False):  # fmt: skip
    """Rows with the log-probabilities of their answers, one entry a token; `behind` tokens follow the answer.

    `whole`: those of a prompt as vLLM gives them, one entry for each token of the row, and nothing for the first.
    """
    lines = []
    for chat, ids, count in zip(chats, rows, answers, strict=True):
        start = 1 if whole else len(ids) - behind - count
        found, values = top_k(logprobs_of(ids)[start - 1 : len(ids) - 1 if whole else start - 1 + count], k)
        if numbers:
            extra = {column: values.tolist(), "target_token_ids": found.tolist()}
        else:
            name = (lambda x: f"word{x}") if texts else (lambda x: f"token_id:{x}")
            extra = {column: [
                [{"token": name(int(x)), "logprob": float(p), "bytes": None} for x, p in zip(*entry, strict=True)]
                for entry in zip(found, values, strict=True)
            ]}  # fmt: skip
        if whole:
            extra = {name: [None, *entries] for name, entries in extra.items()}
        lines.append(json.dumps({**chat, **extra}) + "\n")
    file.write_text("".join(lines))
    return file


def write_axolotl_prepared(file: Path, rows, *, k=8, legacy=False, normalized=True):
    """`current`: entry j is the prediction of token j + 1. `legacy`: entry j is that of token j."""
    table = {"input_ids": [], "target_token_ids": [], "target_logprobs": [], "target_mask": []}
    for ids in rows:
        found, values = top_k(logprobs_of(ids), k)
        if normalized:
            values = values - np.log(np.exp(values).sum(1, keepdims=True))
        if legacy:
            found, values = np.roll(found, 1, 0), np.roll(values, 1, 0)
        empty = 0 if legacy else len(ids) - 1
        found[empty], values[empty] = range(k), -np.inf if legacy else -1e9
        table["input_ids"].append(list(ids))
        table["target_token_ids"].append(found.tolist())
        table["target_logprobs"].append(values.tolist())
        table["target_mask"].append([[int(row != empty)] * k for row in range(len(ids))])
    pq.write_table(pa.table(table), file)
    return file
