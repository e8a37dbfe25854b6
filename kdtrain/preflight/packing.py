"""Whether a model keeps documents of one line apart (`data.padding_free`, `data.packing`).

transformers finds the ends of documents in the positions, and builds its masks by them, for models that ask it to. One
that does not would let a row attend to the one before it, or carry a state over to it, and nothing would say so: the
loss falls all the same. So a few documents are run in lines and alone, and must give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, masking_utils

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data.packing import Layout, in_lines
from kdtrain.errors import KdtrainError, PreflightError
from kdtrain.memory import is_out_of_memory
from kdtrain.models.experts import has_experts, without_router_logits
from kdtrain.models.kinds import sees_images
from kdtrain.models.pieces import runs_on
from kdtrain.models.probe import evaluating, few_tokens, name_of, own_random_state
from kdtrain.preflight.model_checks import CheckedModel

_LENGTHS = (9, 5, 12)
_LAYOUT = Layout(((0, 1), (2,)), _LENGTHS)
_TEXTS = 3
"""In another group of rows an expert's products round differently: with one text, not with three."""
_OTHERS = ("sdpa", "eager")

Run = Callable[[Mapping[str, Any]], torch.Tensor]
"""What a forward takes -> logits."""


def packing_findings(side: CheckedModel, option: KeyPath) -> list[Problem]:
    """An error where a model cannot be trained, or asked, on several documents in one line.

    Args:
        option: that asks for it.
    """
    model = side.model
    who = f"The {side.name} ({name_of(model)}, {type(model).__name__})"
    if sees_images(model.config):
        message = f"{who} reads images, and rows of such models cannot share a line: not available yet."
        return [Problem(option, message, "Remove the option, or take a text model.")]
    if side.virtual:
        message = f"{who} has {side.virtual} virtual tokens before each row, which a line has once: not available."
        return [Problem(option, message, "Remove the option, or train LoRA.")]
    attention = str(getattr(model.config, "_attn_implementation", None))
    reason = why_documents_mix(model)
    if reason is None:
        return []
    others = [name for name in _OTHERS if name != attention and _keeps_apart_with(model, name, attention)]
    hint = "Remove the option"
    if others:
        hint += f", or set attn_implementation: {' or '.join(others)}, with which the model keeps them apart"
    elif attention in _OTHERS:
        hint += "; of the attention implementations here (sdpa, eager) none keeps them apart"
    return [Problem(option, f"{who} does not keep rows of one line apart with {attention} attention: {reason}.", hint)]


def why_documents_mix(model: PreTrainedModel) -> str | None:
    """Why a model must not be given several documents in one line; None where it may.

    The model is not wrapped; its mode and the random state stay as they were.
    """
    device = runs_on(model)

    def run(inputs: Mapping[str, Any]) -> torch.Tensor:
        logits = model(**inputs, use_cache=False).logits
        assert isinstance(logits, torch.Tensor)
        return logits

    with evaluating(model), own_random_state(device), without_router_logits(model):
        return _why_mixed(run, model, device)


def check_wrapped(wrapped: Any, side: str, device: torch.device) -> None:
    """The same of a model whose weights are in pieces, which runs only when it is wrapped. A collective.

    Raises:
        PreflightError: it does not keep documents apart, on any rank.
    """
    inner = getattr(wrapped, "module", wrapped)
    with evaluating(wrapped), own_random_state(device), without_router_logits(inner):
        reason = _why_mixed(lambda inputs: wrapped(**inputs, use_cache=False).logits, inner, device)
    mixed = torch.tensor([reason is not None], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(mixed, torch.distributed.ReduceOp.MAX)
    if mixed.item():
        raise PreflightError(
            f"The {side} does not keep rows of one line apart: {reason or 'seen on another rank'}. Switch data.packing "
            "and data.padding_free off."
        )


def _why_mixed(run: Run, model: PreTrainedModel, device: torch.device) -> str | None:
    chunks = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if chunks and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        return "its layers attend within chunks, which this version of transformers counts over the whole line"
    flat = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    ids = few_tokens(model, device, _TEXTS * max(_LENGTHS))[0]
    ids = ids.repeat(-(-_TEXTS * max(_LENGTHS) // len(ids)))
    exact = not has_experts(model)
    reasons = [_compared(run, text, flat, exact) for text in ids.split(max(_LENGTHS))[:_TEXTS]]
    return reasons[0] if all(reasons) else None


def _compared(run: Run, text: torch.Tensor, flat: bool, exact: bool) -> str | None:
    """Three documents of one text in two lines, the second one with padding: what they say in other company."""
    documents = [text.roll(i)[:length] for i, length in enumerate(_LENGTHS)]
    try:
        in_line = _in_lines(run, documents, flat)
        beside_another = _in_lines(run, [documents[0].roll(1), *documents[1:]], flat)
    except KdtrainError:
        raise
    except Exception as error:  # each model has its own ways
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"it cannot be run on them ({said})"
    alone = [run({"input_ids": one[None]})[0] for one in documents]
    if not all(one.isfinite().all() for one in alone):
        return None  # the loss says so
    half = alone[0].dtype != torch.float32 or torch.is_autocast_enabled(text.device.type)
    moved = max(map(_moved, in_line, alone))
    if not moved <= (3e-2 if half else 1e-4):
        return f"predictions of a row move by {moved:.2g} of their size when others are in front of it"
    # Of the same shapes, and so rounded alike: what is carried over from a row to the next shows below rounding.
    moved = _moved(in_line[1], beside_another[1])
    if not moved <= (1e-4 if exact or not half else 3e-2):
        return f"predictions of a row move by {moved:.2g} of their size when the one in front of it is another"
    return None


def _in_lines(run: Run, documents: Sequence[torch.Tensor], flat: bool) -> list[torch.Tensor]:
    """The logits of each document's tokens but its last."""
    width = max(_LENGTHS)
    ids = torch.stack([functional.pad(one, (0, width - len(one))) for one in documents])
    every = torch.ones(len(ids), width - 1, dtype=torch.bool)
    seen = in_lines({"input_ids": ids}, every, _LAYOUT, flat=flat)
    logits = seen.predicting(run(seen.model_inputs)).unflatten(0, every.shape)
    return [one[: length - 1] for one, length in zip(logits, _LENGTHS, strict=True)]


def _moved(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest change of a position, as a share of its size."""
    found, wanted = found.float(), wanted[: len(found)].float()
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def _keeps_apart_with(model: PreTrainedModel, attention: str, before: str) -> bool:
    """Whether a model does with another attention implementation; it has its own again afterwards."""
    try:
        model.set_attn_implementation(attention)
        return why_documents_mix(model) is None
    except Exception:  # it has none of this kind
        return False
    finally:
        model.set_attn_implementation(before)
