"""`kdtrain export`: a run's student as a model folder that stands alone.

    weights (an adapter merged) -> tokenizer or processor -> tokens that end an answer -> licence files -> model card
    -> the hub

What visual and hidden-state KD train beside the student, their projectors, is no part of it.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config.adapters import has_file, is_adapter_folder, model_below
from kdtrain.disk import as_other_files, writing
from kdtrain.errors import PreflightError
from kdtrain.generation.sampling import turn_ends
from kdtrain.models.licences import licence_files
from kdtrain.models.parts import count_parameters
from kdtrain.models.processing import load_processing
from kdtrain.models.transformers4 import check_known, write_for_transformers_4
from kdtrain.runs.hub import Repository
from kdtrain.runs.model_card import Saved, model_card
from kdtrain.runs.new_folder import new_folder, require_new
from kdtrain.runs.open_run import TrainedRun
from kdtrain.runs.student import student_config
from kdtrain.runs.trained import load_alone

logger = logging.getLogger(__name__)

_CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    model: Saved
    size: int
    """Bytes of the weights."""
    merged: bool
    """Whether the run had an adapter."""
    address: str | None
    """On the hub."""


def export(
    run: TrainedRun, out: Path, *, dtype: str = "auto", version: int = 5, repository: Repository | None = None
) -> Exported:
    """Write the student into a new folder, and push it where a repository is named.

    Args:
        dtype: see `load_alone`.
        version: of transformers, that has to read the folder: 5, or 4 (which 5 reads as well).

    Raises:
        ConfigError: the repository's name is none, or the architecture was not tried with transformers 4.
        PreflightError: the folder is not new, too little is free, or what the run was made from is not there.
        CheckpointError: writing or pushing failed; of a folder that could not be written nothing is left.
    """
    require_new(out)
    _check_base(run)
    if version == 4:
        check_known(student_config(run.config).model_type)
    if repository is not None:
        repository = repository.checked()
    model = load_alone(run, dtype)
    processing = _processing(run, model)
    _end_where_turns_end(model, processing)
    licences, unread = licence_files(model_below(run.config.model.model), run.config.model.revision)
    if unread:
        logger.warning(unread)
    size = model.get_memory_footprint()
    _check_space(out, size)
    saved = Saved(
        name=repository.name if repository else out.absolute().name,
        architecture=type(model).__name__,
        parameters=count_parameters(model)[0],
        dtype=str(model.dtype).removeprefix("torch."),
        version=version,
        reads_images=isinstance(processing, ProcessorMixin),
        chats=bool(processing.chat_template),
    )
    with writing(out, "Nothing of it is left."), new_folder(out) as folder:
        model.save_pretrained(folder)
        as_other_files(folder)
        processing.save_pretrained(folder)
        if version == 4:
            write_for_transformers_4(folder)
        for path in licences:
            shutil.copyfile(path, folder / path.name)
        (folder / _CARD).write_text(model_card(run, saved), encoding="utf-8")
    address = None if repository is None else repository.push(out)
    return Exported(out, saved, size, is_adapter_folder(str(run.model)), address)


def _check_base(run: TrainedRun) -> None:
    name = run.config.model.model
    if is_adapter_folder(str(run.model)) and os.path.isabs(name) and not os.path.isdir(name):
        raise PreflightError(
            f"The student of this run is an adapter, and its base is not there any more: {name}. Say where it is now: "
            "model.model=FOLDER behind the command."
        )


def _processing(run: TrainedRun, model: PreTrainedModel) -> PreTrainedTokenizerBase | ProcessorMixin:
    """As the run has saved it, with its chat template and settings; of an adapter that is alone, its base's."""
    is_saved = has_file(str(run.model), "tokenizer_config.json")
    return load_processing(
        str(run.model) if is_saved else run.config.model.model,
        trust_remote_code=run.config.model.trust_remote_code,
        revision=None if is_saved else run.config.model.revision,
        processor_kwargs=None if is_saved else run.config.data.processor_kwargs,
        model_config=model.config,
    )


def _end_where_turns_end(model: PreTrainedModel, processing: Any) -> None:
    """Let generation stop where the student was taught to: a base model's own config names its end of text only."""
    own: Any = model.generation_config
    if own is None:
        return
    ends = turn_ends(processing, own)
    if ends:
        own.eos_token_id = ends[0] if len(ends) == 1 else ends
    pad = getattr(processing, "tokenizer", processing).pad_token_id
    if own.pad_token_id is None and pad is not None:
        own.pad_token_id = pad
    own._from_model_config = False  # or transformers would take these from the model's config again


def _check_space(out: Path, size: int) -> None:
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise PreflightError(
            f"{out} would take {size / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free there. Name a folder on "
            "another disk, or take half of it by --dtype bfloat16."
        )
