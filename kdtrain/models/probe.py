"""What one forward of a model shows before the first step: whether it sees the future, and how many positions it has.

Shapes: B rows, T positions, V vocabulary.

A model that attends to later tokens trains and teaches without a word, and its numbers are far too good: each label
stands in the input one position later. So one forward on a few tokens compares what must be equal, and notes how many
learned positions the model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.errors import KdtrainError, PreflightError
from kdtrain.memory import is_out_of_memory
from kdtrain.models.experts import without_router_logits
from kdtrain.models.kinds import WHAT_IS_NEEDED
from kdtrain.models.pieces import runs_on
from kdtrain.models.vocabulary import vocabulary_size

Side = Literal["student", "teacher"]
OPTION_OF: Mapping[Side, KeyPath] = {"student": ("model", "model"), "teacher": ("rlhf", "teacher_model")}
"""The option of a config that names the model of a side: where a finding about it belongs."""

_TOKENS, _CHANGED = 8, 3


@dataclass(frozen=True)
class TextLook:
    """What a forward on a few tokens has shown."""

    findings: tuple[Problem, ...] = ()
    positions: int | None = None
    """How many the table of learned positions has for the tokens of a row; None without a table."""
    looked: bool = True
    """False where the weights are in pieces, and nothing could be seen."""


def look_at_text(model: PreTrainedModel, side: Side) -> TextLook:
    """One forward on a few tokens: does an earlier position see later ones, or the padding behind it?

    The model is not wrapped (of a PEFT model its base), and its mode is left as it was.
    """
    if is_deepspeed_zero3_enabled():
        return TextLook(looked=False)
    texts = _texts(model)
    moved, positions = _compare(model, side, texts[0])
    # In another group of rows an expert's products round differently, and a tie between two experts may break the other
    # way: with one text, not with three.
    if moved is not None and all(_compare(model, side, text)[0] for text in texts[1:]):
        return TextLook((_sees_what_it_must_not(moved, model, side),), positions)
    return TextLook((), positions)


def _texts(model: PreTrainedModel) -> list[torch.Tensor]:
    """Three texts [T] without special tokens. In falling order: they must not look like a row of positions."""
    config = vars(model.config.get_text_config())
    named = [config.get(f"{name}_token_id") for name in ("pad", "bos", "eos")]
    special = {token for one in named for token in (one if isinstance(one, list) else [one])}
    ids = few_tokens(model, runs_on(model), 3 * _TOKENS + 8)[0]
    ids = ids[[token not in special for token in ids.tolist()]].flip(-1)
    return list(ids.split(_TOKENS)[:3])


def _compare(model: PreTrainedModel, side: Side, text: torch.Tensor) -> tuple[str | None, int | None]:
    """What moves a prediction that must not, and by how much; and the number of positions.

    Rows: the text, the same with other last tokens, and these once more, as padding on the right.
    """
    kept = len(text) - _CHANGED
    other = torch.cat([text[:kept], text[:_CHANGED]])
    mask = torch.ones(3, len(text), dtype=torch.long, device=text.device)
    mask[2, kept:] = 0
    cannot = as_preflight_error(f"The {side} ({name_of(model)}) cannot be run on a few tokens")
    with evaluating(model), own_random_state(text.device), without_router_logits(model), _Lookups() as lookups, cannot:
        logits = model(input_ids=torch.stack([text, other, other]), attention_mask=mask, use_cache=False).logits
    tolerance = 1e-4 if logits.dtype == model.dtype == torch.float32 else 3e-2
    rows = logits[:, :kept].float()
    return _what_moves(rows, tolerance), lookups.positions(len(text))


def _what_moves(rows: torch.Tensor, tolerance: float) -> str | None:
    text, changed, padded = rows
    if not text.isfinite().all():
        return None  # the loss says so
    cases = (
        (changed, "sees the tokens that it has to predict", "the tokens behind them are changed"),
        (padded, "does not honour the attention mask", "padding stands behind them"),
    )
    for other, what, when in cases:
        moved = float(((other - text).norm(dim=-1) / text.norm(dim=-1)).max())
        if not moved <= tolerance:
            return f"{what}: its predictions move by {moved:.2g} of their size when {when}."
    return None


def _sees_what_it_must_not(moved: str, model: PreTrainedModel, side: Side) -> Problem:
    config = model.config.get_text_config()
    switch = " Its config.json has is_decoder: false." if getattr(config, "is_decoder", None) is False else ""
    message = (
        f"The {side} ({name_of(model)}, {type(model).__name__}) {moved}{switch} Its losses and accuracies would mean "
        "nothing."
    )
    return Problem(OPTION_OF[side], message, WHAT_IS_NEEDED)


class _Lookups(TorchFunctionMode):
    """Notes the embedding tables that rows of consecutive numbers are looked up in: learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            indices, weight = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("input", "weight")))
            self._seen.append((indices.detach(), weight.shape[0]))
        return func(*args, **kwargs)

    def positions(self, width: int) -> int | None:
        """The fewest positions that any table has for the tokens of a row; None where there is no such table."""
        found = [
            size - int(row[0])
            for indices, size in self._seen
            if indices.dim() and indices.shape[-1] == width
            for row in indices.reshape(-1, width).cpu()
            if torch.equal(row, row[0] + torch.arange(width))
        ]
        return min(found, default=None)


# ---- running a model once --------------------------------------------------------------------------------------------


def few_tokens(model: PreTrainedModel, device: torch.device, count: int = 4) -> torch.Tensor:
    """[1, count] ids of text: the placeholder of an image stands for pixels that are not there."""
    placeholders = placeholder_ids(model)
    text = [i for i in range(min(64, vocabulary_size(model))) if i not in placeholders][:count]
    return torch.tensor([text or [0]], device=device)


def placeholder_ids(model: PreTrainedModel) -> set[int]:
    """Ids that stand for parts of images, videos or sounds, as a model's config names them; empty for a text model."""
    config = vars(model.config)
    named = [config[key] for key in config if re.fullmatch(r"(image|video|audio)\w*_token_(id|index)", key)]
    return {token for token in named if isinstance(token, int)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and with an attention that the model's device has; both are put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _attention_for_cpu(model):
            yield
    finally:
        model.train(was_training)


@contextmanager
def _attention_for_cpu(model: nn.Module) -> Iterator[None]:
    """Of a model that has not been placed yet: flash attention's kernels are for GPUs alone."""
    configs = {id(one.config): one.config for one in model.modules() if isinstance(one, PreTrainedModel)}
    named = [(config, str(config._attn_implementation)) for config in configs.values()]
    if runs_on(model).type != "cpu" or not any("flash" in name for _, name in named):
        yield
        return
    try:
        for config, name in named:
            config._attn_implementation = "sdpa" if "flash" in name else name
        yield
    finally:
        for config, name in named:  # setting one sets those below it
            config._attn_implementation = name


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Some models draw in their forward (Reformer's hashes): the run's own draws must not depend on a look at them."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def name_of(model: PreTrainedModel) -> str:
    """The folder or hub id that a model came from, or else its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


@contextmanager
def as_preflight_error(what: str) -> Iterator[None]:
    """Whatever a model fails with, as a PreflightError in one line behind `what`: each has its own ways to fail."""
    try:
        yield
    except KdtrainError:  # a signal
        raise
    except Exception as error:
        if is_out_of_memory(error):  # training says itself what to do about it
            raise
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        end = "" if text.endswith((".", "!")) else "."
        raise PreflightError(f"{what}: {type(error).__name__}: {text}{end}") from error
