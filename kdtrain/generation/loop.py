"""The loop that writes the tokens of a batch, in place of transformers' own.

`generate` prepares a cache, positions, images and the processors of logits as it does for its own loop, and runs this
one. What is other here: who uses it says how a token is found, and rows that have stopped leave the batch.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers import Cache, GenerationConfig
from transformers.utils import ModelOutput

from kdtrain.generation.call import is_sharded
from kdtrain.generation.preallocated import preallocate

_LEAVE_AT = 8
"""Stopped rows leave when they are one in so many of the batch: that copies the cache of the others, which is about
what their next token costs."""

ROOM_AT_FIRST = 512
"""New tokens that a cache has room for at first, each time a quarter more after that: where answers may be very long,
most end long before, and all of their memory at once may be more than there is."""


class Choose(Protocol):
    """Finds the next token of each row."""

    def __call__(self, scores_BV: torch.Tensor, rows_B: torch.Tensor, step: int) -> torch.Tensor:
        """[B] long: tokens of the rows of that number, −1 where the scores are NaN or infinite."""


class Decoding:
    """A loop for `generate(custom_generate=…)`: one forward for each new token of the rows that go on.

    Args:
        may_leave: whether rows that have stopped leave the batch.
        fixed: inputs of the model that are not by row, whatever their shape looks like.
    """

    def __init__(
        self, model: Any, rows: int, config: GenerationConfig, choose: Choose, *, may_leave: bool, fixed: Any = ()
    ) -> None:
        ids = config.eos_token_id
        self._stops = frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
        self._choose, self._new_tokens, self._synced = choose, config.max_new_tokens, is_sharded(model)
        self._may_leave, self._fixed = may_leave, frozenset(fixed)
        self._going_on = set(range(rows))
        self.written: list[list[int]] = [[] for _ in range(rows)]
        """What each row got."""
        self.failed: set[int] = set()
        """Rows whose logits were not finite."""

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> None:
        """What `generate` calls; `model` is the one that has a cache of its own kind, beneath PEFT."""
        length, rows = input_ids.shape[1], list(range(len(input_ids)))
        rows_B = torch.arange(len(rows), device=input_ids.device)
        ids_BT = torch.nn.functional.pad(input_ids, (0, self._new_tokens))
        for cache in _caches(kwargs):
            preallocate(cache, length + min(self._new_tokens, ROOM_AT_FIRST))
        outputs: Any = model._prefill(input_ids, generation_config, kwargs)
        with model._optimize_model_for_decode():
            for step in range(self._new_tokens):
                kwargs = model._update_model_kwargs_for_generation(
                    outputs, kwargs, is_encoder_decoder=model.config.is_encoder_decoder
                )
                logits_BV = outputs.logits[:, -1]
                logits_BV = logits_BV.to(input_ids.device, torch.promote_types(logits_BV.dtype, torch.float32))
                outputs = None  # maybe the logits of whole prompts
                tokens_B = self._choose(logits_processor(ids_BT[:, :length], logits_BV), rows_B, step)
                self._take(rows, tokens_B.tolist())
                finished = not self._going_on or step + 1 == self._new_tokens
                if not model._has_unfinished_sequences(finished, self._synced, device=input_ids.device):
                    return
                ids_BT[:, length] = tokens_B.clamp(min=0)
                length += 1
                if kept := self._kept(rows, kwargs):
                    kept_B = torch.tensor(kept, device=input_ids.device)
                    kwargs = self._selected(kwargs, kept_B, len(rows))
                    rows, rows_B, ids_BT = [rows[i] for i in kept], rows_B[kept_B], ids_BT[kept_B]
                inputs = model.prepare_inputs_for_generation(
                    ids_BT[:, :length], next_sequence_length=1 if kwargs["use_cache"] else None, **kwargs
                )
                outputs = model(**inputs, return_dict=True)

    def _take(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            if row not in self._going_on:
                continue
            if token >= 0:
                self.written[row].append(token)
            else:
                self.failed.add(row)
            if token < 0 or token in self._stops:
                self._going_on.remove(row)

    def _kept(self, rows: Sequence[int], kwargs: Mapping[str, Any]) -> list[int] | None:
        """Places in the batch of the rows that stay in it; None where all do.

        One has to stay while another rank's rows go on.
        """
        stopped = len(rows) - len(self._going_on)
        if not self._may_leave or stopped * _LEAVE_AT < len(rows) or len(rows) == 1 or not _is_by_row(kwargs):
            return None
        return [i for i, row in enumerate(rows) if row in self._going_on] or [0]

    def _selected(self, kwargs: Mapping[str, Any], kept_B: torch.Tensor, rows: int) -> dict[str, Any]:
        return {
            name: value if name in self._fixed else _rows_of(name, value, kept_B, rows)
            for name, value in kwargs.items()
        }


def _is_by_row(kwargs: Mapping[str, Any]) -> bool:
    """Whether rows can be taken out of what the model has kept: a cache of transformers knows how, others need not."""
    return bool(_caches(kwargs))


def _caches(kwargs: Mapping[str, Any]) -> list[Cache]:
    """By what they are: their names differ between models and between releases of transformers."""
    return [value for value in kwargs.values() if isinstance(value, Cache)]


def _rows_of(name: str, value: Any, kept_B: torch.Tensor, rows: int) -> Any:
    if isinstance(value, Cache):
        value.reorder_cache(kept_B)  # in place
    elif isinstance(value, torch.Tensor):
        axis = 1 if "position_ids" in name and value.dim() == 3 else 0  # of Qwen-VL: [3 or 4, B, T]
        if value.dim() > axis and value.shape[axis] == rows:
            return value.index_select(axis, kept_B.to(value.device))
    elif isinstance(value, ModelOutput):
        return type(value)(**{key: _rows_of(key, part, kept_B, rows) for key, part in value.items()})
    return value
