"""Fields of GKDConfig that the trainer does not honour: refused with the reason, never ignored without a word.

All other fields are honoured, by the trainer or by what it inherits, or have no say in training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdtrain.config.training_rules import REFUSED as REFUSED_IN_YAML
from kdtrain.data.tokenised import MASKS
from kdtrain.errors import ConfigError, NotAvailableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refused:
    """Why a field may not be set, and what does instead."""

    reason: str
    instead: str
    harmless: tuple[Any, ...] = (None, False)
    """Values that change nothing."""
    later: bool = False
    """Whether a later version will honour it."""


_LOSS = "the loss is llm_kd_weight · divergence + sft_alpha · cross-entropy"
_PACKING = Refused("packing and padding-free training are not available yet", "remove it", later=True)

REFUSED: dict[str, Refused] = {
    "packing": _PACKING,
    "eval_packing": _PACKING,
    "padding_free": _PACKING,
    "packing_strategy": Refused("packing is not available yet", "remove it", (None, "bfd"), later=True),
    "loss_type": Refused(_LOSS, "set args.llm_kd_weight = 0 for plain cross-entropy", (None, "nll")),
    "label_smoothing_factor": Refused("the loss does not smooth labels", "remove it", (None, 0)),
    "use_liger_kernel": Refused("Liger kernels replace parts of the model's forward that the loss uses", "remove it"),
    "liger_kernel_config": Refused("Liger kernels replace parts of the model's forward", "remove it", (None,)),
    "truncation_mode": Refused("rows are cut from the right", "remove it, or raise max_length", (None, "keep_start")),
    "shuffle_dataset": Refused("rows are shuffled in every epoch anyway", "remove it"),
    "average_tokens_across_devices": Refused("the loss would depend on the number of processes", "remove it", (True,)),
    "auto_find_batch_size": Refused("the batch would change during the run", "set per_device_train_batch_size"),
}
for _name in ("label_names", "use_cache"):  # for the reasons that a config is told
    _refused = REFUSED_IN_YAML[_name]
    REFUSED[_name] = Refused(_refused.reason, _refused.instead, _refused.harmless)

_WITHOUT_EFFECT = {
    "dataset_num_proc": "rows are encoded when they are needed; dataloader_num_workers does that in parallel",
}


def check_fields(args: Any, *, own_collator: bool) -> None:
    """Refuse the fields that would be ignored.

    Args:
        args: a GKDConfig.
        own_collator: whether batches are made by the trainer's own.

    Raises:
        NotAvailableError: packing and its kin.
        ConfigError: the others; one error names them all.
    """
    wrong = {name: refused for name, refused in REFUSED.items() if not _harmless(refused, getattr(args, name, None))}
    lines = [f"{name}={getattr(args, name)!r}: {r.reason}; {r.instead}." for name, r in wrong.items()]
    if lines:
        error = NotAvailableError if all(refused.later for refused in wrong.values()) else ConfigError
        raise error("The GKDConfig sets what this trainer does not do. " + " ".join(lines))
    _check_dataset_kwargs(args.dataset_kwargs)
    for name, reason in _WITHOUT_EFFECT.items():
        if own_collator and getattr(args, name, None) is not None:
            logger.warning("%s has no effect: %s.", name, reason)


def _harmless(refused: Refused, value: Any) -> bool:
    # `True == 1` and `False == 0`: a boolean is harmless only where a boolean is listed.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in refused.harmless)


def _check_dataset_kwargs(given: Mapping[str, Any] | None) -> None:
    unknown = sorted(set(given or {}) - {"skip_prepare_dataset"})
    if unknown:
        raise ConfigError(
            f"dataset_kwargs: {', '.join(unknown)} would be ignored: the collator prepares the rows. Remove it, or "
            "pass rows with input_ids and labels."
        )


def check_supervision(args: Any, row: Mapping[str, Any], formatted: bool) -> None:
    """Refuse masks that are not those of the default collator, judged by the first row.

    It supervises the completion of a prompt, the assistant's turns of a conversation, and the whole of a text.

    Raises:
        ConfigError: `completion_only_loss` or `assistant_only_loss` ask for something else.
    """
    pair, text = (
        "prompt" in row and not formatted,
        formatted or not row.keys() & {"prompt", "messages", "conversations"},
    )
    tokenised = "input_ids" in row
    if tokenised and not row.keys() & {"labels", *MASKS}:
        raise ConfigError(
            "The rows have input_ids and no labels. Add a 'labels' column (-100 where nothing is supervised; the "
            f"input_ids themselves for all tokens), or {' or '.join(MASKS)}."
        )
    if args.completion_only_loss is True and not (pair or tokenised):
        raise ConfigError("completion_only_loss=True needs rows with a prompt and a completion; the first has none.")
    if args.completion_only_loss is False and not (text or tokenised):
        raise ConfigError(
            "completion_only_loss=False would supervise prompts, which is not available: answers are distilled. Remove "
            "it, pass rows of text, or rows with input_ids and labels."
        )
    if args.assistant_only_loss and text and not tokenised:
        raise ConfigError("assistant_only_loss=True needs conversations (messages); the first row has none.")
