"""What transformers found when it loaded weights: it fills what is missing with random numbers, and only warns."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from kdtrain.config.model_folder import require_sound
from kdtrain.errors import CheckpointError, PreflightError

_SHOWN = 5
# Constants that older versions of transformers saved with every layer: causal masks and their filler value, rotary
# frequencies, positions. They are computed today.
_CONSTANTS = re.compile(r"(^|\.)((attn|attention)\.bias|masked_bias|inv_freq|position_ids)$")
# Layers for multi-token prediction; the architectures in transformers have none of them.
_MULTI_TOKEN = re.compile(r"(^|\.)mtp\.")
_NOT_TIED = "so we will NOT tie them"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_CONVERSION = re.compile(r"^([^|\n]+?)\s*\|\s*CONVERSION\b", re.MULTILINE)


def wrong_weights(found: Mapping[str, Any], config: PreTrainedConfig) -> list[str]:
    """What of a model's weights would be random, or was left lying in the folder: one line for each.

    `found` is the loading info of `from_pretrained`, which leaves out what the architecture ties or ignores.
    """
    unexpected = sorted(name for name in found["unexpected_keys"] if not _is_ignored(name, config))
    lines = [f"missing {name}" for name in sorted(found["missing_keys"])]
    lines += [
        f"{name} of shape {list(saved)} in place of {list(wanted)}"
        for name, saved, wanted in sorted(found["mismatched_keys"])
    ]
    return lines + [f"unknown {name}" for name in unexpected]


def refuse_zeros(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that were never written: of a file whose header alone has come to the disk, the rest is zeros.

    A few matrices may be zeros, in blocks that were added to a model; embeddings, or most of them, are not.

    Raises:
        PreflightError: they are.
    """
    matrices = {
        key: weight
        for key, weight in model.named_parameters()
        if weight.ndim > 1 and weight.numel() and weight.is_floating_point() and not weight.is_meta
    }
    # The first row is enough of most of them.
    zeros = [key for key, weight in matrices.items() if not bool(weight[0].any()) and not bool(weight.any())]
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    if 2 * len(zeros) > len(matrices) or any(matrices[key] is embedding for key in zeros):
        raise PreflightError(
            f"The model {name} cannot be used: {len(zeros)} of its {len(matrices)} matrices hold nothing but zeros "
            f"({listed(zeros)}). A copy, a download or a disk that broke off leaves such files: copy or download the "
            "folder again."
        )


def listed(lines: list[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(lines[:_SHOWN]) + more


def _is_ignored(name: str, config: PreTrainedConfig) -> bool:
    if _CONSTANTS.search(name) or _MULTI_TOKEN.search(name):
        return True
    layer = _LAYER.search(name)
    if layer is None:
        return False
    text = config.get_text_config()
    ahead = getattr(text, "num_nextn_predict_layers", None) or 0
    return 0 <= int(layer[1]) - text.num_hidden_layers < ahead


@dataclass
class LoadingLog:
    """What transformers says in its log while it loads, and nowhere else."""

    unconverted: list[str] = field(default_factory=list)
    """Weights that could not be brought into the architecture's form: of the experts that become one tensor, one is
    missing or has another shape. An error without names follows."""
    not_tied: bool = False
    """The config says that two weights are one, and the folder holds two that differ: both are used."""


@contextmanager
def loading_log() -> Iterator[LoadingLog]:
    """Read transformers' log while it loads. Its table of wrong weights is not shown: they are our error."""
    found = LoadingLog()
    log = logging.getLogger("transformers.modeling_utils")
    level, shown_from = log.level, log.getEffectiveLevel()

    def read(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        found.unconverted.extend(_CONVERSION.findall(text))
        found.not_tied |= _NOT_TIED in text
        return record.levelno >= shown_from and "LOAD REPORT" not in text and _NOT_TIED not in text

    log.addFilter(read)
    # Just below WARNING: a level of its own from there on transformers takes for a wish to see more.
    log.setLevel(min(shown_from, logging.WARNING - 1))
    try:
        yield found
    finally:
        log.removeFilter(read)
        log.setLevel(level)


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load a checkpoint's weights as `from_pretrained` reads them: whatever names they were saved under."""
    try:
        require_sound(Path(folder), "checkpoint")
        saved, found = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        wrong = wrong_weights(found, saved.config)  # what is missing would be random numbers
        if wrong:
            raise ValueError(f"{len(wrong)} weights are wrong: {listed(wrong)}.")
        model.load_state_dict(saved.state_dict())
    except Exception as error:
        raise CheckpointError(
            f"The weights in {folder} do not fit {type(model).__name__}: {str(error).strip().splitlines()[0]} Resume "
            "with the model that the run began with, or start anew in another output_dir."
        ) from error
