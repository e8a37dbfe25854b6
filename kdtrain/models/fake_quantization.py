"""Training for a quantised model: weights that are rounded in every forward, as torchao will round them in the end.

torchao replaces the linear layers by layers that compute with rounded weights w = s·round(w/s), and hand the gradient
on to the weights as they are (straight-through estimator, arXiv 1308.3432). They are saved as they are, in their own
dtype: quantised by torchao's `IntxWeightOnlyConfig` of the same kind (32 weights in a row share a scale, symmetric)
they compute bit for bit what was trained. With a teacher that is the model before, this is quantisation-aware
distillation (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from kdtrain.errors import NotAvailableError, PreflightError
from kdtrain.models.quantization import quantized_names

Weights = Literal["int8", "int4", "int3", "int2"]

GROUP = 32
"""Weights of a row that share a scale."""
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def torchao_config(weights: Weights) -> Any:
    """How torchao quantises the weights in the end: its `IntxWeightOnlyConfig`."""
    with _quiet_import():
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, weights), granularity=PerGroup(GROUP))


@contextmanager
def _quiet_import() -> Iterator[None]:
    """torchao complains of libraries for other GPUs when it is imported, and torch of torchao: without harm."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except ImportError as error:
        raise PreflightError(
            f"model.quantization_aware needs torchao: {error}. Install it (pip install torchao, the extra quant)."
        ) from error
    finally:
        logging.disable(before)


def fake_quantize(model: PreTrainedModel, weights: Weights) -> None:
    """Round the weights of a model's linear layers in every forward, in place; the weights themselves stay as they are.

    Whole stay what `model.quantization` leaves whole: embedding, head, a vision encoder and its projector.

    Raises:
        PreflightError: torchao is missing, or there is no layer whose rows can be cut into groups.
        NotAvailableError: the model is trained in pieces.
    """
    if PartialState().distributed_type not in _WHOLE:
        raise NotAvailableError(
            "model.quantization_aware is not available yet under FSDP and DeepSpeed. Use plain data parallelism."
        )
    names = {name.removesuffix(".weight") for name in quantized_names(model)}
    uneven = [name for name in sorted(names) if _columns(model, name) % GROUP]
    if uneven or not names:
        what = f"{uneven[0]} has {_columns(model, uneven[0])} columns" if uneven else "it has no linear layers"
        raise PreflightError(
            f"model.quantization_aware rounds weights in groups of {GROUP} of a row, and of "
            f"{model.config.name_or_path or type(model).__name__} {what}. Remove the option."
        )
    config = torchao_config(weights)
    with _quiet_import():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(config, step="prepare"), filter_fn=lambda _, name: name in names)


def _columns(model: nn.Module, name: str) -> int:
    return int(model.get_submodule(name).get_parameter("weight").shape[1])
