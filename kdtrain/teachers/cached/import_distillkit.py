"""DistillKit's stored teachers: top-k log-probabilities, as they are or approximated by a polynomial and bins.

As of https://github.com/arcee-ai/DistillKit, `distillkit/compression` and `sample_logits_vllm.py`. Rows have
`input_ids`, and entry j describes token j + 1: there is none for the first token, and where vLLM was asked, a padding
token behind the row gives one to the last. Packed rows have the number of the document, from 1, in `attention_mask`.

`compression_config.yaml` beside the files says how numbers are packed; published data sets have it on their page
instead (`teacher.logprob_compressor` or `teacher.legacy_logit_compression` of a training config).

Shapes: L tokens of a row, n entries, K tokens of an entry, A of them approximated, W bytes or words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdtrain.data.errors import show
from kdtrain.errors import DataError
from kdtrain.teachers.cached.import_files import as_array
from kdtrain.teachers.cached.imported import AS_LOGITS, Imported, Reader, UnreadableRow

CONFIG = "compression_config.yaml"
_UNKNOWN = "the teacher, its revision and its chat template"
_MOST_BYTES = 2**16
FloatDtype = Literal["float16", "bfloat16", "float32", "float64"]
Decode = Callable[[Mapping[str, Any]], tuple[np.ndarray, np.ndarray]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Bin(_Part):
    """Residuals of some approximated values, as integers times a scale."""

    scale_dtype: FloatDtype
    element_bits: int = Field(ge=1, le=32)
    num_elements: int = Field(ge=1)


class Quantized(_Part):
    """`logprob_compressor`."""

    d: int = Field(ge=1)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: FloatDtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: FloatDtype = "float32"
    residual_bins: list[Bin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Quantized:
        if sum(part.num_elements for part in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("exact_k and the elements of residual_bins are more than k")
        return self


class Legacy(_Part):
    """`legacy_logit_compression`."""

    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0)
    vocab_size: int = Field(ge=2)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: FloatDtype = "float32"

    @model_validator(mode="after")
    def _fits(self) -> Legacy:
        if self.exact_k > self.k:
            raise ValueError("exact_k is more than k")
        return self


def reader(path: Path, row: Mapping[str, Any]) -> Reader | None:
    """How rows with these columns are read; None where they are not DistillKit's.

    Raises:
        DataError: the config that says how they are packed is missing, or wrong.
    """
    columns = row.keys()
    decode: Decode
    if {"bytepacked_indices", "compressed_logprobs"} <= columns:
        config = _config(path, "logprob_compressor", Quantized)
        name, decode, lossy = "DistillKit, quantised", partial(_quantized, config), True
    elif {"packed_indices", "exact_values", "coeffs"} <= columns:
        legacy = _config(path, "legacy_logit_compression", Legacy)
        name, decode, lossy = "DistillKit, its older format", partial(_legacy, legacy), True
    elif {"token_ids", "top_values", "input_ids"} <= columns:
        name, decode, lossy = "DistillKit, top-k as it is", _as_it_is, False
    else:
        return None
    return Reader(name, partial(_documents, decode), [AS_LOGITS], _UNKNOWN, lossy)


def _config(path: Path, below: str, model: type[Any]) -> Any:
    """What says how numbers are packed: of the file by itself, or as a part of a training config."""
    file = (path if path.is_dir() else path.parent) / CONFIG
    advice = (
        f"Write there what its numbers were packed with: {below} as it stands in DistillKit's training config, or on "
        "the page of the data set."
    )
    if not file.is_file():
        raise DataError(
            f"{show(str(file), 400)} is missing, and nothing else says how these targets are packed. {advice}"
        )
    try:
        found = yaml.safe_load(file.read_bytes()[:_MOST_BYTES])
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{show(str(file), 400)} cannot be read: {show(str(error))}. {advice}") from error
    for key in ("teacher", below):
        found = found.get(key, found) if isinstance(found, dict) else found
    try:
        config = model.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or below
        raise DataError(f"{show(str(file), 400)}: {show(where)}: {show(first['msg'])}. {advice}") from error
    return config


def _documents(decode: Decode, row: Mapping[str, Any]) -> Sequence[Imported]:
    """The documents of a row, each with its own entries."""
    tokens = as_array(row, "input_ids", 1, np.int64)
    if tokens is None:
        raise UnreadableRow("input_ids is no list of token ids")
    ids, logprobs = decode(row)
    if len(ids) not in (len(tokens), len(tokens) - 1):
        raise UnreadableRow("there are not as many entries as tokens, nor one less", f"{len(ids)} for {len(tokens)}")
    if row.get("attention_mask") is None:
        return [Imported(tokens, ids, logprobs)]
    mask = as_array(row, "attention_mask", 1, np.int64)
    if mask is None or len(mask) != len(tokens):
        raise UnreadableRow("attention_mask is no list with the number of its document for each token")
    parts = [np.flatnonzero(mask == number) for number in np.unique(mask[mask > 0])]
    return [Imported(tokens[part], ids[part[part < len(ids)]], logprobs[part[part < len(ids)]]) for part in parts]


def _as_it_is(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    ids, values = as_array(row, "token_ids", 2, np.int64), as_array(row, "top_values", 2, np.float32)
    if ids is None or values is None or ids.shape != values.shape:
        raise UnreadableRow("token_ids and top_values are no lists of one shape")
    return _known(ids, values)


def _known(ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without entries of −inf, whose ids mean nothing.

    Raises:
        UnreadableRow: values that are no log-probabilities.
    """
    if np.isnan(values).any():
        raise UnreadableRow("there is NaN among the log-probabilities")
    if (values > 0.05).any():
        raise UnreadableRow(
            "its values are above 0, and so no log-probabilities: DistillKit's older format stores logits less their "
            "mean where it was given logits, and then nothing says how much probability the other tokens have"
        )
    return np.where(np.isneginf(values), -1, ids), values.astype(np.float32)


# ---- quantised -------------------------------------------------------------------------------------------------------


def _quantized(config: Quantized, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    packed, coded = as_array(row, "bytepacked_indices", 2, np.uint8), as_array(row, "compressed_logprobs", 2, np.uint8)
    if packed is None or coded is None or len(packed) != len(coded):
        raise UnreadableRow("bytepacked_indices and compressed_logprobs are no lists of bytes for each token")
    bits = index_bits(config.d)
    wanted = [-(-config.k * bits // 8), coded_bytes(config)]
    if [packed.shape[1], coded.shape[1]] != wanted:
        raise UnreadableRow(
            f"a token has {packed.shape[1]} bytes of ids and {coded.shape[1]} of log-probabilities, and with the "
            f"{CONFIG} that is there it has {wanted[0]} and {wanted[1]}"
        )
    return _known(unpacked(packed, bits, config.k), _decoded(config, coded))


def index_bits(vocabulary: int) -> int:
    """Bits of an id; in float32, as there."""
    return max(int(torch.tensor(float(vocabulary)).log2().ceil()), 1)


def coded_bytes(config: Quantized) -> int:
    """Bytes of the log-probabilities of one token."""
    size = config.exact_k * _size(config.exact_dtype) + len(config.polynomial_terms or ()) * _size(config.term_dtype)
    return size + sum(_size(b.scale_dtype) + -(-b.element_bits * b.num_elements // 8) for b in config.residual_bins)


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """[n, count] integers of so many bits, the highest bit first, one behind the other."""
    flat = np.unpackbits(packed, axis=1)[:, : count * bits].reshape(len(packed), count, bits)
    found: np.ndarray = flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    return found


def _decoded(config: Quantized, coded: np.ndarray) -> np.ndarray:
    """[n, K] log-probabilities: the exact ones, then a polynomial of the place in the order plus what it misses."""
    at = 0

    def floats(count: int, dtype: FloatDtype) -> torch.Tensor:
        nonlocal at
        part = coded[:, at : at + count * _size(dtype)].tobytes()
        at += count * _size(dtype)
        if not part:
            return torch.zeros(len(coded), 0)
        return torch.frombuffer(bytearray(part), dtype=getattr(torch, dtype)).reshape(len(coded), count)

    exact = floats(config.exact_k, config.exact_dtype).float()
    terms, approximated = config.polynomial_terms or [], config.k - config.exact_k
    # In the dtype of the terms, as the residuals were taken.
    coefficients = floats(len(terms), config.term_dtype)
    rest = (coefficients[:, None, :] * _terms(config, approximated)).sum(-1).float()
    first = 0
    for part in config.residual_bins:
        scale = floats(1, part.scale_dtype).float()
        width = -(-part.element_bits * part.num_elements // 8)
        integers = torch.from_numpy(unpacked(coded[:, at : at + width], part.element_bits, part.num_elements))
        at += width
        signed = 2 * integers - 1 if part.element_bits == 1 else integers - 2 ** (part.element_bits - 1)
        rest[:, first : first + part.num_elements] += signed * scale
        first += part.num_elements
    values = torch.cat([exact, rest], 1)
    return (values.cumsum(1) if config.delta_encoding else values).numpy()


def _terms(config: Quantized, count: int) -> torch.Tensor:
    """[A, terms]: the powers and functions of the place."""
    dtype = getattr(torch, config.term_dtype)
    if not config.polynomial_terms:
        return torch.zeros(count, 0, dtype=dtype)
    t = torch.linspace(0, 1, count, dtype=dtype) if config.normalize_t else torch.arange(count, dtype=dtype)
    functions = {"sqrt": torch.sqrt, "exp": torch.exp}
    return torch.stack([t**x if isinstance(x, int) else functions[x](t) for x in config.polynomial_terms], -1)


def _size(dtype: FloatDtype) -> int:
    return int(getattr(torch, dtype).itemsize)


# ---- the older format ------------------------------------------------------------------------------------------------


def _legacy(config: Legacy, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    packed = as_array(row, "packed_indices", 2, np.uint64)
    exact = as_array(row, "exact_values", 2, np.float32)
    coefficients = as_array(row, "coeffs", 2, np.float32)
    if coefficients is None and packed is not None and config.exact_k == config.k:
        coefficients = np.zeros((len(packed), 0), np.float32)  # lists of nothing
    if packed is None or exact is None or coefficients is None or not len(packed) == len(exact) == len(coefficients):
        raise UnreadableRow("packed_indices, exact_values and coeffs are no lists of numbers for each token")
    bits, approximated = index_bits(config.vocab_size), config.k - config.exact_k
    terms = (config.polynomial_degree + 1 + config.with_sqrt_term) if approximated else 0
    wanted = [-(-config.k // (64 // bits)), config.exact_k, terms]
    found = [packed.shape[1], exact.shape[1], coefficients.shape[1]]
    if found != wanted:
        raise UnreadableRow(
            f"a token has {found[0]} words of ids, {found[1]} exact values and {found[2]} coefficients, and with the "
            f"{CONFIG} that is there it has {wanted[0]}, {wanted[1]} and {wanted[2]}"
        )
    # As many whole ids as fit into a word, the first in its lowest bits.
    shifts = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)
    ids = ((packed[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)).reshape(len(packed), -1)[:, : config.k]
    place = np.arange(1, approximated + 1, dtype=np.float64)
    sign = -1 if config.invert_polynomial else 1
    powers = [place ** (sign * power) for power in range(config.polynomial_degree + 1)]
    powers += [np.sqrt(place)] * config.with_sqrt_term
    rest = coefficients @ np.stack(powers) if approximated else np.zeros((len(packed), 0))
    return _known(ids.astype(np.int64), np.concatenate([exact, rest], 1))
