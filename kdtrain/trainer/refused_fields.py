"""Fields of GKDConfig that the trainer does not honour: refused with the reason, never ignored."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from trl.experimental.gkd import GKDConfig

from kdtrain.config.training_rules import REFUSED as REFUSED_IN_YAML
from kdtrain.config.training_rules import Refused
from kdtrain.data.encoded_row import MASKS
from kdtrain.errors import ConfigError, NotAvailableError

logger = logging.getLogger(__name__)

_SAME_IN_YAML = (
    "loss_type",
    "label_smoothing_factor",
    "use_liger_kernel",
    "liger_kernel_config",
    "truncation_mode",
    "shuffle_dataset",
    "average_tokens_across_devices",
    "auto_find_batch_size",
    "label_names",
    "use_cache",
)
REFUSED: dict[str, Refused] = {
    "eval_packing": Refused("rows of an evaluation are padded, which gives the same numbers", harmless=(None, False)),
    "packing_strategy": Refused("whole rows are packed, best fit decreasing", harmless=(None, "bfd")),
    **{name: REFUSED_IN_YAML[name] for name in _SAME_IN_YAML},
}


def check_fields(args: GKDConfig, *, own_collator: bool) -> None:
    """Refuse, in one error, the fields that would be ignored."""
    wrong = {name: refused for name, refused in REFUSED.items() if not refused.allows(getattr(args, name, None))}
    lines = [f"{name}={getattr(args, name)!r}: {r.reason}; {r.instead}." for name, r in wrong.items()]
    if lines:
        error = NotAvailableError if all(refused.later for refused in wrong.values()) else ConfigError
        raise error("The GKDConfig sets what this trainer does not do. " + " ".join(lines))
    if unknown := sorted(set(args.dataset_kwargs or {}) - {"skip_prepare_dataset"}):
        raise ConfigError(
            f"dataset_kwargs: {', '.join(unknown)} would be ignored: the collator prepares the rows. Remove it, or "
            "pass rows with input_ids and labels."
        )
    if own_collator and args.dataset_num_proc is not None:
        logger.warning(
            "dataset_num_proc has no effect: rows are encoded when they are needed; dataloader_num_workers does that "
            "in parallel."
        )


def check_supervision(args: GKDConfig, row: Mapping[str, Any], formatted: bool) -> None:
    """Refuse masks that are not those of the default collator, judged by the first row.

    It supervises the completion of a prompt, the assistant's turns of a conversation, and all of a text.
    """
    pair = "prompt" in row and not formatted
    text = formatted or not row.keys() & {"prompt", "messages", "conversations"}
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
