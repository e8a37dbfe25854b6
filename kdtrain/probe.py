"""What one look at a model finds before the first step: a wrong kind, a view of the future, images that do not fit.

Shapes: B rows, T positions, V vocabulary.

A model that attends to later tokens trains and teaches without a word, and its numbers are far too good: each label
stands in the input one position later. So one forward on a few tokens compares what must be equal, and notes how many
positions the model has (what is asked of them: `positions.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from kdtrain.data.multimodal import Processed, multimodal
from kdtrain.errors import KdtrainError, PreflightError
from kdtrain.experts import without_router_logits
from kdtrain.lm_head import evaluating, few_tokens
from kdtrain.ranks import is_main

if TYPE_CHECKING:
    from kdtrain.data.collate import Collator

logger = logging.getLogger(__name__)

_TOKENS, _CHANGED = 8, 3
# Heads that predict something else than the next token. Masked ones are found by their forward where a config says that
# the model was made a decoder since.
_OTHER_HEAD = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|NextSentencePrediction"
    r"|ImageClassification|MaskedLM|PreTraining)$|RewardModel$"
)
_WHAT_IS_NEEDED = (
    "Student and teacher have to predict the next token from those before it: a class that ends in ForCausalLM, or a "
    "vision-language model of that kind."
)


@dataclass(frozen=True)
class Finding:
    """Something that a look at a model has found."""

    level: Literal["error", "warning"]
    text: str


@dataclass(frozen=True)
class TextLook:
    """What a forward on a few tokens has shown.

    Attributes:
        findings: errors.
        positions: how many the model's table of learned positions has for the tokens of a row; None without a table.
        looked: False where the model's weights are in pieces, and nothing could be seen.
    """

    findings: tuple[Finding, ...] = ()
    positions: int | None = None
    looked: bool = True


def report_findings(findings: Iterable[Finding]) -> None:
    """Log the warnings, on the main process, and raise the errors, all in one.

    Raises:
        PreflightError: there is an error among them.
    """
    findings = list(dict.fromkeys(findings))
    for finding in findings:
        if finding.level == "warning" and is_main():
            logger.warning(finding.text)
    errors = [finding.text for finding in findings if finding.level == "error"]
    if errors:
        raise PreflightError("\n".join(errors))


# ---- the config ------------------------------------------------------------------------------------------------------


def refuse_other_kinds(name: str, config: Any) -> None:
    """Refuse a folder whose config says that its model predicts something else than the next token.

    transformers would load a classifier without its head, and with a random one for the vocabulary.

    Raises:
        PreflightError: naming the kind.
    """
    kind = _other_kind(config)
    if kind is not None:
        raise PreflightError(f"{name} is {kind}. {_WHAT_IS_NEEDED}")


def _other_kind(config: Any) -> str | None:
    architecture = next(iter(getattr(config, "architectures", None) or ()), type(config).__name__)
    try:
        text = config.get_text_config()
    except ValueError:  # it has several
        return f"a {config.model_type} model, which is neither one of text nor one of text and images"
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return f"an encoder-decoder model ({architecture})"
    head = _OTHER_HEAD.search(architecture)
    if head and not (head[1] in ("MaskedLM", "PreTraining") and getattr(config, "is_decoder", False)):
        return f"a model with another head than that of a language model ({architecture})"
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known and not has_own_code and text is config:
        return f"a {config.model_type} model, of which transformers has no causal language model"
    return None


# ---- text ------------------------------------------------------------------------------------------------------------


def look_at_text(model: Any, side: str) -> TextLook:
    """One forward on a few tokens: does an earlier position see later ones, or the padding behind it?

    Args:
        model: a transformers model that is not wrapped; of a PEFT model its base. Its mode is left as it was.
        side: "student" or "teacher", for the findings.

    Raises:
        PreflightError: it cannot be run at all.
    """
    if is_deepspeed_zero3_enabled():
        return TextLook(looked=False)
    texts = _texts(model)
    moved, positions = _look(model, side, texts[0])
    # Experts that are chosen in other groups round differently, and a tie may break the other way: but not for every
    # text.
    if moved is not None and all(_look(model, side, text)[0] for text in texts[1:]):
        return TextLook((Finding("error", _describe(moved, model, side)),), positions)
    return TextLook((), positions)


def _texts(model: Any) -> list[torch.Tensor]:
    """Three texts [T] without special tokens. In falling order: they must not look like a row of positions."""
    config = vars(model.config.get_text_config())
    named = [config.get(f"{name}_token_id") for name in ("pad", "bos", "eos")]
    special = {token for one in named for token in (one if isinstance(one, list) else [one])}
    ids = few_tokens(model, next(model.parameters()).device, 3 * _TOKENS + 8)[0]
    ids = ids[[token not in special for token in ids.tolist()]].flip(-1)
    return list(ids.split(_TOKENS)[:3])


def _look(model: Any, side: str, text: torch.Tensor) -> tuple[str | None, int | None]:
    """What moves a prediction that must not, and by how much; and the number of positions.

    Rows: the text, the same with other last tokens, and these once more, as padding on the right.
    """
    kept = len(text) - _CHANGED
    other = torch.cat([text[:kept], text[:_CHANGED]])
    mask = torch.ones(3, len(text), dtype=torch.long, device=text.device)
    mask[2, kept:] = 0
    cannot = as_preflight_error(f"The {side} ({name_of(model)}) cannot be run on a few tokens")
    with evaluating(model), _own_random_state(text.device), without_router_logits(model), _Lookups() as lookups, cannot:
        logits = model(input_ids=torch.stack([text, other, other]), attention_mask=mask, use_cache=False).logits
    full = torch.float32
    tolerance = 1e-4 if logits.dtype == full and model.dtype == full else 3e-2
    rows = logits[:, :kept].float()
    return _what_moves(rows, tolerance), lookups.positions(len(text))


def _what_moves(rows: torch.Tensor, tolerance: float) -> str | None:
    text, changed, padded = rows
    if not text.isfinite().all():
        return None  # that is told by the loss
    cases = (
        (changed, "sees the tokens that it has to predict", "the tokens behind them are changed"),
        (padded, "does not honour the attention mask", "padding stands behind them"),
    )
    for other, what, when in cases:
        moved = float(((other - text).norm(dim=-1) / text.norm(dim=-1)).max())
        if not moved <= tolerance:
            return f"{what}: its predictions move by {moved:.2g} of their size when {when}."
    return None


def _describe(moved: str, model: Any, side: str) -> str:
    config = model.config.get_text_config()
    switch = " Its config.json has is_decoder: false." if getattr(config, "is_decoder", None) is False else ""
    return (
        f"The {side} ({name_of(model)}, {type(model).__name__}) {moved}{switch} Its losses and accuracies would mean "
        f"nothing. {_WHAT_IS_NEEDED}"
    )


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


# ---- images ----------------------------------------------------------------------------------------------------------


def look_at_image(model: Any, side: str, processing: Any, collator: Collator, row: Mapping[str, Any]) -> list[Finding]:
    """One image through a model, as its own processor prepares it: what does not fit is named with its side.

    Args:
        model: a vision-language model; not wrapped.
        processing: its own processor; nothing is looked at with a tokenizer.
        collator: reads the images.
        row: of the data, with an image.
    """
    if multimodal(processing) is None:
        return []
    try:
        inputs = collator.prepared_by(processing, row)
    except PreflightError as error:
        return [Finding("error", f"The {side}'s processor ({name_of(model)}) cannot prepare an image: {error}")]
    device = next(model.parameters()).device
    ids = torch.tensor([inputs.ids])
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs.token_tensors, **inputs.visual}
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    try:
        with evaluating(model), _own_random_state(device), as_preflight_error("the model says"):
            model(**moved, use_cache=False)
    except PreflightError as error:
        return [Finding("error", _describe_misfit(model, side, inputs, processing, str(error)))]
    return []


def _describe_misfit(model: Any, side: str, inputs: Processed, processing: Any, said: str) -> str:
    image_ids = multimodal(processing).image_ids  # type: ignore[union-attr]
    tokens = sum(i in image_ids for i in inputs.ids)
    made = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.visual.items())
    vision = getattr(model.config, "vision_config", None)
    sizes = {name: getattr(vision, name, None) for name in ("image_size", "patch_size", "spatial_merge_size")}
    expected = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
    return (
        f"The {side}'s processor does not fit the {side} ({name_of(model)}): for a row with an image the processor "
        f"makes {made} and {tokens} image tokens, and {said} Its sizes: {expected or 'unknown'}. Put the processor "
        "files (preprocessor_config.json, processor_config.json) of the model that the folder came from into it."
    )


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _own_random_state(device: torch.device) -> Any:
    """Some models draw in their forward (Reformer's hashes): the run's own draws must not depend on the look."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def name_of(model: Any) -> str:
    """The folder or hub id that a model came from, or else its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


@contextmanager
def as_preflight_error(what: str) -> Iterator[None]:
    """Whatever a model fails with, in one line behind `what`: each has its own ways to fail.

    Raises:
        PreflightError: in place of the model's own error.
    """
    try:
        yield
    except (KdtrainError, torch.OutOfMemoryError):  # a signal, or what training has better words for
        raise
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        end = "" if text.endswith((".", "!")) else "."
        raise PreflightError(f"{what}: {type(error).__name__}: {text}{end}") from error
