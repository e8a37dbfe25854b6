"""`kdtrain init --from`: a student cut out of its teacher, as a model folder that is there whole or not at all.

    config: can it be done? -> rows -> the teacher reads them -> cut -> save -> load again, compare -> in its place

What is saved is loaded again before it gets its name: it has to have all of its weights, and to compute what the cut
model in memory did. So there is one model in memory at a time.
"""

from __future__ import annotations

import gc
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdtrain.config.adapters import model_below
from kdtrain.config.model_folder import require_sound
from kdtrain.config.schema import DataConfig, DataSource
from kdtrain.data import Source, build_dataset
from kdtrain.disk import as_other_files, writing
from kdtrain.errors import ConfigError, NotAvailableError, PreflightError
from kdtrain.memory import is_out_of_memory, peak
from kdtrain.models.importance import Importance, Row, Seen, look
from kdtrain.models.kinds import sees_images
from kdtrain.models.licences import licence_files
from kdtrain.models.loading import load_config, load_merged, load_model, trust_policy
from kdtrain.models.parts import count_parameters
from kdtrain.models.probe import as_preflight_error, evaluating, few_tokens
from kdtrain.models.processing import load_tokenizer
from kdtrain.models.pruned_config import check_layers, check_width, require_known
from kdtrain.models.pruning import Axes, keep_layers, layers_of, most_important, narrow, width_axes
from kdtrain.runs.new_folder import new_folder, require_new

logger = logging.getLogger(__name__)

MAX_LENGTH = 512
"""Tokens that are read of a row."""
_FEW = 32  # tokens on which the saved model is compared


@dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    source: str
    """The teacher: a folder, a hub id, or a run of kdtrain."""
    layers: int
    width: int | None
    data: str
    """Rows that the teacher reads: a file, a folder, or a data set's id on the hub, as `data.train` takes them."""
    rows: int
    """How many of them, from the first."""
    revision: str | None = None
    """Of a model on the hub."""


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    layers: int
    hidden: int
    inner: int
    parameters: int
    perplexity: float
    """On the rows; NaN where none of their tokens is to be predicted."""


@dataclass(frozen=True)
class Pruned:
    """What has been written, and why."""

    folder: Path
    before: Size
    after: Size
    scores: list[float]
    """Of each of the teacher's layers, see `Importance`."""
    kept: list[int]
    rows: int
    tokens: int
    notes: list[str]


def prune(wanted: Wanted, out: Path) -> Pruned:
    """Write a model with fewer layers, or a narrower one, into a new folder: a student to be healed by distillation.

    Layers are kept by block influence, channels and neurons by activations; see `Importance` and `narrow`.

    Raises:
        ConfigError: so many layers, or that width, cannot be had of this model.
        PreflightError: the model or the rows cannot be used, or the folder is not new.
        CheckpointError: writing failed; nothing is left.
    """
    require_new(out)
    config = _checked_config(wanted)
    tokenizer = load_tokenizer(wanted.source, revision=wanted.revision)
    rows, notes = _rows(wanted, tokenizer)
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_merged(wanted.source, revision=wanted.revision, dtype=dtype).to(device)
    axes = width_axes(model) if wanted.width is not None else Axes({}, {})
    logger.info("%s reads %d rows …", wanted.source, len(rows))
    seen = _look(model, axes, rows)
    before = _size(model, seen.ce)
    kept = most_important(seen.layers, wanted.layers)
    if wanted.width is not None:
        narrow(model, wanted.width, seen, axes)
    keep_layers(model, kept)
    expected = _few_logits(model)
    notes += _notes(config, kept, wanted.width)
    licences, note = licence_files(model_below(wanted.source), wanted.revision)
    notes += [note] if note else []
    with writing(out, "Nothing of it is left."), new_folder(out) as folder:
        model.save_pretrained(folder)
        as_other_files(folder)
        tokenizer.save_pretrained(folder)
        for path in licences:
            shutil.copyfile(path, folder / path.name)
        del model
        gc.collect()
        saved = load_model(str(folder), dtype=dtype).to(device)
        _check_same(saved, expected)
        after = _size(saved, look(saved, rows))
    tokens = sum(len(row.input_ids) for row in rows)
    return Pruned(out, before, after, seen.layers, kept, len(rows), tokens, notes)


def _checked_config(wanted: Wanted) -> PreTrainedConfig:
    """The teacher's config, of which what is wanted can be made."""
    name = model_below(wanted.source)
    require_sound(Path(name), "teacher")
    config = load_config(name, trust_policy(revision=wanted.revision))
    if sees_images(config):
        raise NotAvailableError(
            f"{wanted.source} is a vision-language model ({config.model_type}): a student from one is not available "
            "yet. Take a smaller model of its family as the student."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise PreflightError(f"The weights of {wanted.source} are quantised. Name the model before it was quantised.")
    require_known(wanted.source, config.model_type, narrowed=wanted.width is not None)
    check_layers(wanted.source, config)
    layers = config.num_hidden_layers
    if not 1 <= wanted.layers <= layers:
        raise ConfigError(f"--layers {wanted.layers}: {wanted.source} has {layers}. Give 1 to {layers - 1}.")
    if wanted.width is not None:
        check_width(wanted.source, config, wanted.width, _head_dim(config))
    elif wanted.layers == layers:
        raise ConfigError(
            f"--layers {layers} are all that {wanted.source} has: that would be a copy. Give fewer, or a --width "
            f"below {config.hidden_size}."
        )
    return config


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rows(wanted: Wanted, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Row], list[str]]:
    """The first rows of the data, as a run would read them, each cut at `MAX_LENGTH` tokens; and notes on them."""
    source = Source(wanted.data, limit=wanted.rows)
    chats = DataConfig(train=(DataSource(path=wanted.data),)).chats
    rows, report = build_dataset(
        [source], tokenizer, max_length=MAX_LENGTH, on_overlength="truncate", max_bad_rows=wanted.rows, **chats
    )
    notes = (
        [f"unusable rows are left out: {report.bad_rows}, the first {report.first_bad[0]}"] if report.bad_rows else []
    )
    columns = zip(rows["input_ids"][:], rows["labels"][:], strict=True)
    return [Row(ids, labels) for ids, labels in columns], notes


def _look(model: PreTrainedModel, axes: Axes, rows: Sequence[Row]) -> Seen:
    importance = Importance(layers_of(model), axes.norms(model), axes.readers(model))
    try:
        with as_preflight_error("The teacher cannot read the rows"):
            ce = look(model, rows, importance)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise PreflightError(
            f"Out of memory while the teacher reads rows of {MAX_LENGTH} tokens: {peak(model.device)}. On the CPU "
            "there may be more: CUDA_VISIBLE_DEVICES= in front of the command."
        ) from error
    finally:
        importance.remove()
    return importance.seen(ce)


def _size(model: PreTrainedModel, ce: float) -> Size:
    config = model.config
    parameters, _ = count_parameters(model)
    return Size(config.num_hidden_layers, config.hidden_size, config.intermediate_size, parameters, math.exp(ce))


def _few_logits(model: PreTrainedModel) -> torch.Tensor:
    """[T, V] of a few tokens."""
    with evaluating(model):
        ids = few_tokens(model, next(model.parameters()).device, _FEW)
        return model(input_ids=ids, use_cache=False).logits[0].float()


def _check_same(saved: PreTrainedModel, expected: torch.Tensor) -> None:
    """Refuse a folder that says another model than the one that was cut: its config left something out."""
    tolerance = 1e-3 if saved.dtype == torch.float32 else 3e-2
    if not (_few_logits(saved) - expected).norm() <= tolerance * expected.norm():
        raise NotAvailableError(
            f"What the cut {saved.config.model_type} model computes is not what its saved config says: something in it "
            "goes by the number of a layer, and is not known here. Nothing was written."
        )


def _notes(config: PreTrainedConfig, kept: Sequence[int], width: int | None) -> list[str]:
    """What others that read the folder may not expect."""
    notes = []
    if len(set(getattr(config, "layer_types", None) or ())) > 1 and len(kept) < config.num_hidden_layers:
        notes.append(
            "layer_types in config.json says of which kind each layer is; who goes by a fixed pattern reads it wrongly."
        )
    if width is not None and "head_dim" not in type(config)().to_dict():
        notes.append(
            f"config.json has a head_dim, which {config.model_type} models usually have not: transformers reads it, "
            "try it with your server."
        )
    return notes
