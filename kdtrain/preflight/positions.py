"""Whether the rows of a run fit the positions of its models, asked before the first step.

A model with learned positions has no more of them than its table: a longer row ends the run where it comes up. A model
with rotary positions (RoPE) takes rows of any length, but was trained on some only. And two kinds of RoPE depend on the
whole batch: on its longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from transformers import PreTrainedModel

from kdtrain.config.options import DistillationOptions
from kdtrain.config.tree import Problem
from kdtrain.data.batch import Batch
from kdtrain.data.collate import Collator
from kdtrain.errors import ConfigError, DataError
from kdtrain.memory import is_out_of_memory
from kdtrain.models.pieces import runs_on
from kdtrain.models.probe import OPTION_OF, Side, evaluating, few_tokens

if TYPE_CHECKING:
    from kdtrain.preflight.model_checks import CheckedModel

# What configs call the number of positions that a model was made for.
_DECLARED = ("max_position_embeddings", "max_seq_len")


@dataclass(frozen=True)
class RowLengths:
    """Rows of a run, as far as their lengths are known."""

    what: str
    """In words, for messages."""
    lengths: np.ndarray
    """Tokens of each row; not empty."""
    batch_size: int
    """Rows that share a forward."""
    way_out: str
    """How they are made shorter, in words."""
    side: Side | None = None
    """The model that reads them; None is both."""
    generated: bool = False
    """Whether they are prompts with the longest answer that a model may write behind them while training."""

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def width(self, multiple: int | None) -> int:
        """Of the batch that holds the longest row."""
        return -(-self.longest // multiple) * multiple if multiple else self.longest


def rows_of_a_run(train: Any, evaluation: Any, args: Any, collator: Any, generates: bool) -> list[RowLengths]:
    """The rows that both models will see, where their lengths can be known without encoding them.

    Left out are rows that are encoded batch by batch (see `refuse_width`), and those of a user's own collator: what it
    does to their lengths is not known.

    Args:
        evaluation: a data set, a dict of such, or None.
        generates: answers of up to `max_new_tokens` take the place of those in the training rows.
    """
    if not isinstance(collator, Collator):
        return []
    # Arguments read from a config carry its tuner section: then the options are named as they stand in the config.
    in_data, in_rlhf = ("data.", "rlhf.") if hasattr(args, "tuner") else ("args.", "args.")
    shorter = f"lower {in_data}max_length"
    if hasattr(args, "tuner"):
        shorter += " (with data.on_overlength: truncate or drop)"
    evaluations = evaluation.values() if isinstance(evaluation, Mapping) else [evaluation]
    sets = [("training rows", train, args.train_batch_size)]
    sets += [("evaluation rows", data, args.eval_batch_size) for data in evaluations]
    found = [
        RowLengths(_named(what, side), _collated(lengths, lengths, collator), size, shorter, side)
        for what, data, size in sets
        for side, lengths in _lengths(data).items()
    ]
    if generates and "prompt_length" in (getattr(train, "column_names", None) or ()):
        most = DistillationOptions.from_args(args).most_new_tokens
        what = f"prompts with an answer of {in_rlhf}max_new_tokens ({most})"
        way_out = f"lower {in_rlhf}max_new_tokens or {in_data}max_length"
        for side, lengths in _lengths(train).items():
            prompts = _collated(_prompt_lengths(train, side), lengths, collator) + most
            found.append(RowLengths(_named(what, side), prompts, args.train_batch_size, way_out, side, generated=True))
    return [rows for rows in found if len(rows.lengths)]


def _collated(lengths: np.ndarray, row_lengths: np.ndarray, collator: Collator) -> np.ndarray:
    """Lengths, of rows or of their prompts, as they come out of the collator: cut, or without rows that are dropped."""
    if collator.max_length is None or collator.on_overlength == "error":
        return lengths
    if collator.on_overlength == "drop":
        return lengths[row_lengths <= collator.max_length]
    return np.minimum(lengths, collator.max_length)


def answered_rows(data: Any, args: Any) -> list[RowLengths]:
    """Rows whose answers a teacher is about to write (`answers: teacher`), with the longest that it may write."""
    if data is None or "answers" not in data.column_names:
        return []
    side: Side | None = "teacher" if "teacher_prompt_length" in data.column_names else None
    prompts = _prompt_lengths(data, side)[np.asarray(data["answers"][:], dtype=bool)]
    most = DistillationOptions.from_args(args).most_new_tokens
    what = f"prompts with the teacher's answer of rlhf.max_new_tokens ({most})"
    rows = RowLengths(what, prompts + most, args.eval_batch_size, "lower rlhf.max_new_tokens")
    return [rows] if len(prompts) else []


def _named(what: str, side: Side | None) -> str:
    return f"{what} (as the teacher reads them)" if side == "teacher" else what


def _lengths(data: Any) -> dict[Side | None, np.ndarray]:
    """Tokens of each row, by the model that reads them: None is both. Nothing where they are not known."""
    columns = getattr(data, "column_names", None) or ()
    if "input_ids" not in columns or not hasattr(data, "with_format") or not len(data):
        return {}
    own = _counts_of(data, "input_ids")
    if "teacher_input_ids" not in columns:
        return {None: own}
    other = _counts_of(data, "teacher_input_ids")
    return {"student": own, "teacher": np.where(other > 0, other, own)}


def tokens_of_rows(data: Any) -> np.ndarray:
    """Tokens of each row, as the student reads it.

    Raises:
        ConfigError: rows that are tokenised only as they are read.
    """
    found = _lengths(data)
    if not found:
        raise ConfigError(
            "training.train_sampling_strategy: group_by_length has to know how long rows are before they are read: "
            "pass a datasets.Dataset of rows with input_ids and labels, or remove it."
        )
    return found.get("student", next(iter(found.values())))


def _counts_of(data: Any, column: str) -> np.ndarray:
    """Counted in Arrow: as Python lists the tokens of a large data set would fill the memory. Null is 0."""
    tables = data.select_columns(column).with_format("arrow").iter(batch_size=4096)
    return np.concatenate([np.asarray(pc.fill_null(pc.list_value_length(table.column(column)), 0)) for table in tables])


def _prompt_lengths(data: Any, side: Side | None) -> np.ndarray:
    own = np.asarray(data["prompt_length"][:])
    if side != "teacher":
        return own
    return np.array(
        [
            length if other is None else other
            for other, length in zip(data["teacher_prompt_length"][:], own, strict=True)
        ]
    )


# ---- how many positions there are ------------------------------------------------------------------------------------


def length_findings(side: CheckedModel, rows: Sequence[RowLengths], multiple: int | None) -> list[Problem]:
    """An error for rows that a model cannot take, a warning for those beyond what it was made for.

    Args:
        multiple: batches are padded to a multiple of this length.
    """
    if side.look.positions is not None:
        wide = [some for some in rows if some.width(multiple) > side.look.positions]
        return [_too_long(side, side.look.positions, wide, multiple)] if wide else []
    config = side.model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in _DECLARED]
    declared = min((size for size in sizes if isinstance(size, int) and size > 0), default=None)  # XLNet says -1
    if declared is None or "dynamic" in _rope_kinds(side.model):
        return []
    declared -= side.virtual
    long = [some for some in rows if some.longest > declared]
    if not long:
        return []
    if side.look.looked and not getattr(config, "rope_parameters", None):
        refusal = _refusal(side.model, max(some.width(multiple) for some in long) + side.virtual)
        if refusal is not None:
            found = _too_long(side, declared, long, multiple)
            return [replace(found, hint=f"{found.hint} The model says: {refusal}")]
    made_for = f"The {side.name} was made for {declared} positions (its config.json), and {_counts(long, declared)}"
    # One long prompt is no reason to end a run. That every answer may run on where the model knows nothing is.
    if any(some.generated and some.lengths.min() > declared for some in long):
        message = f"{made_for}: answers would run on where it has learnt nothing."
        return [Problem(OPTION_OF[side.name], message, f"To keep within {declared} tokens, {_ways_out(long)}.")]
    message = f"{made_for}: what it predicts there may be poor."
    return [Problem(OPTION_OF[side.name], message, f"If that is not meant, {_ways_out(long)}.", "warning")]


def _too_long(side: CheckedModel, positions: int, rows: Sequence[RowLengths], multiple: int | None) -> Problem:
    behind = f" behind its {side.virtual} virtual tokens" if side.virtual else ""
    if any(some.longest > positions for some in rows):
        what = _counts(rows, positions)
    else:
        padded = max(some.width(multiple) for some in rows)
        what = f"batches are padded to {padded} (training.pad_to_multiple_of)"
    return Problem(
        OPTION_OF[side.name],
        f"The {side.name} has {positions} positions{behind}, and {what}: the run would end where such a row comes up.",
        f"To keep within {positions} tokens, {_ways_out(rows)}; or take a {side.name} with more positions.",
    )


def _counts(rows: Sequence[RowLengths], limit: int) -> str:
    """How many rows of each set are longer than a limit, and how long they get."""
    counts = [
        f"{more} of {len(some.lengths)} {some.what}" for some in rows if (more := int((some.lengths > limit).sum()))
    ]
    return f"{' and '.join(counts)} have more tokens (up to {max(some.longest for some in rows)})"


def _ways_out(rows: Sequence[RowLengths]) -> str:
    return " and ".join(dict.fromkeys(some.way_out for some in rows))


def _refusal(model: PreTrainedModel, width: int) -> str | None:
    """What a model without a table of positions (ALiBi, sines) says to a row as long as this; None if it takes it."""
    ids = few_tokens(model, runs_on(model))
    row = ids.repeat(1, -(-width // ids.shape[1]))[:, :width]
    backbone = getattr(model, "base_model", model)  # without logits, which would take the most memory
    try:
        with evaluating(model):
            backbone(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    except (IndexError, RuntimeError, ValueError, MemoryError) as error:
        if is_out_of_memory(error):
            return None  # training says so in better words
        return str(error).strip().splitlines()[0]
    return None


def refuse_width(limits: Mapping[Side, int], batch: Batch) -> None:
    """Refuse a batch that is wider than a model's table of positions: of rows whose lengths nobody knew before.

    Before the forward, which on a GPU would leave an error that names nothing.
    """
    tokens = batch.teacher_tokens
    widths: dict[Side, int] = {"student": batch.labels.shape[1], "teacher": (tokens or batch).labels.shape[1]}
    for side, positions in limits.items():
        if (width := widths[side]) > positions:
            raise DataError(
                f"A batch is {width} tokens long, and the {side} has {positions} positions. Lower max_length (of a "
                "config data.max_length, with data.on_overlength: truncate or drop; of the trainer's class that of "
                f"args, or of its collator), or take a {side} with more positions."
            )


# ---- RoPE that depends on the batch ----------------------------------------------------------------------------------

_HOW_ROPE_DEPENDS = {
    "longrope": "The {side}'s positions look at the batch: rope_type longrope has other frequencies for all rows of a "
    "batch once one has more than {original} tokens, and {counts}. The numbers of the shorter rows depend on whether "
    "such a row stands beside them, and loss and gradient on the batch size; not so at a batch size of 1.",
    "dynamic": "The {side}'s positions look at other rows: the frequencies of rope_type dynamic grow with every row of "
    "more than {original} tokens, for the rows beside and after it, and {counts}. The numbers of a row depend on the "
    "order of the data and the batch size, and a resumed run may differ.",
}


def rope_findings(side: CheckedModel, rows: Sequence[RowLengths]) -> list[Problem]:
    """A warning where the numbers of a row depend on the rows beside it (longrope) or before it (dynamic)."""
    findings = []
    for kind, original in _rope_kinds(side.model).items():
        long = [some for some in rows if some.longest > original]
        if kind == "longrope":
            long = [some for some in long if some.batch_size > 1 and some.lengths.min() <= original]
        if long:
            how = _HOW_ROPE_DEPENDS[kind].format(side=side.name, original=original, counts=_counts(long, original))
            way_out = f"To keep within {original} tokens, {_ways_out(long)}."
            findings.append(Problem(OPTION_OF[side.name], how, way_out, "warning"))
    return findings


def _rope_kinds(model: PreTrainedModel) -> dict[str, int]:
    """The kinds of RoPE that depend on the batch, each with the length up to which it does nothing."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, Mapping)]
    kinds = {}
    for one in layers:
        kind = one.get("rope_type", "default")
        if kind == "longrope":
            kinds[kind] = int(one["original_max_position_embeddings"])
        elif "dynamic" in kind:
            kinds["dynamic"] = int(config.max_position_embeddings)
    return kinds
