"""What `kdtrain.fit` does before a run: models and rows that were handed over take the place of names in a config."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdtrain.config import ConfigLoader
from kdtrain.config.changes import checked_names
from kdtrain.config.diagnose import dotted
from kdtrain.config.sources import Composer, FileOrMapping
from kdtrain.config.tree import KeyPath, Node, Written, get, plain
from kdtrain.errors import ConfigError
from kdtrain.ranks import under_launcher

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from kdtrain.config import TrainArguments
    from kdtrain.runs.build import Given

logger = logging.getLogger(__name__)

# Options without effect: what was handed over, section, options, reason.
_IDLE: tuple[tuple[str, KeyPath, tuple[str, ...], str], ...] = (
    (
        "model",
        ("model",),
        ("dtype", "attn_implementation", "quantization_aware", "init_kwargs"),
        "the model is loaded already",
    ),
    ("teacher", ("rlhf",), ("teacher_model_init_kwargs",), "the teacher is loaded already"),
    ("teacher", ("rlhf", "teacher"), ("dtype", "device_map", "adapter", "revision"), "the teacher is loaded already"),
    ("teacher", ("rlhf", "teacher"), ("backend", "base_url", "model", "top_k"), "the teacher was handed over"),
    ("train", ("data", "train", 0), ("name", "split"), "the rows were handed over"),
    ("eval", ("data", "eval", 0), ("name", "split"), "the rows were handed over"),
)


def prepare(
    config: FileOrMapping,
    overrides: Sequence[str],
    *,
    train_dataset: Any,
    eval_dataset: Any,
    model: Any,
    teacher: Any,
    callbacks: Sequence[TrainerCallback],
) -> tuple[TrainArguments, Given]:
    """The config with the names of what is handed over in its place, and what is handed over, checked."""
    if not isinstance(config, str | Path | Mapping):
        raise ConfigError(
            f"config must be the path of a YAML file or a mapping of the same form; it is a {type(config).__name__}."
        )
    if isinstance(overrides, str | Mapping):
        raise ConfigError('overrides must be a list such as ["rlhf.beta=0.1"].')
    root = Composer().compose(config, overrides)
    handed_over = {"model": model, "teacher": teacher, "train": train_dataset, "eval": eval_dataset}
    from kdtrain.preflight.files import all_files

    # What was handed over is in no file.
    loaded = any(value is not None and not isinstance(value, str) for value in handed_over.values())
    checked = ConfigLoader.load(config, [*overrides, *_names(root, handed_over)], files=None if loaded else all_files)
    wanted = checked.launch.num_processes
    if wanted and wanted > 1 and not under_launcher():
        logger.warning("launch.num_processes: %s has no effect on kdtrain.fit, which stays in its process.", wanted)
    _warn_of_idle_options(Written(root), handed_over)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.runs.build import Given
    from kdtrain.teachers import Teacher
    from kdtrain.trainer.argument_checks import check_callbacks, check_model
    from kdtrain.trainer.given_rows import as_rows, is_iterated

    check_callbacks(callbacks)
    if train_dataset is not None and (checked.data.streams or is_iterated(train_dataset)):
        raise ConfigError(
            "train_dataset is a stream, or data.train says so: kdtrain.fit streams the files, folders and data sets "
            "that data.train names, with streaming: true. An IterableDataset is taken by "
            "kdtrain.trainer.GKDTrainerWithMetrics."
        )
    given = Given(
        train_dataset=None if train_dataset is None else as_rows("train_dataset", train_dataset),
        eval_dataset=None if eval_dataset is None else as_rows("eval_dataset", eval_dataset),
        model=None if isinstance(model, str) else check_model("model", model),
        teacher=None if isinstance(teacher, str) else teacher,
        callbacks=callbacks,
    )
    if not isinstance(given.teacher, Teacher):
        check_model("teacher", given.teacher)
    return build_train_arguments(checked), given


def checked_changes(allow_changes: Sequence[str], resume: str | None) -> tuple[str, ...]:
    """The names of `allow_changes`."""
    if isinstance(allow_changes, str) or not all(isinstance(name, str) for name in allow_changes):
        raise ConfigError('allow_changes must be a list such as ["rlhf.beta", "data.content"].')
    if allow_changes and resume is None:
        raise ConfigError('allow_changes is of a run that is resumed: add resume="auto", or leave it out.')
    return checked_names(allow_changes)


def _names(root: Node, given: Mapping[str, Any]) -> list[str]:
    """Overrides that name what was handed over. A loaded model's name is needed only where the config gives none.

    Rows always replace the config's path: a run folder must not name a file that was not read.
    """
    found = [_rows_in_place(root, name) for name in ("train", "eval") if given[name] is not None]
    backend = get(root, ("rlhf", "teacher", "backend"))
    named = backend is None or backend.value == "hf"  # other teachers need no teacher_model
    for key, path in (("model", ("model", "model")), ("teacher", ("rlhf", "teacher_model"))):
        value = given[key]
        if isinstance(value, str):
            found.append(f"{'.'.join(path)}={json.dumps(value)}")
        elif value is not None and get(root, path) is None and (key == "model" or named):
            inner = getattr(value, "module", value) if key == "teacher" else value
            name = getattr(getattr(inner, "config", None), "_name_or_path", "")
            if not name and key == "model":
                raise ConfigError("model was built without a name: say in model.model where its tokenizer is.")
            found.append(f"{'.'.join(path)}={json.dumps(name or key)}")
    return found


def _rows_in_place(root: Node, name: str) -> str:
    """The one source of `data.<name>` with rows in place of its path: its other options hold for them."""
    node = get(root, ("data", name))
    sources = node.value if node and isinstance(node.value, list) else [node] if node else []
    if len(sources) > 1:
        raise ConfigError(
            f"{name}_dataset takes the place of a source, and data.{name} has {len(sources)} of them: leave one, whose "
            "options then hold for these rows, or none."
        )
    options = plain(sources[0]) if sources and isinstance(sources[0].value, dict) else {}
    return f"data.{name}={json.dumps({**options, 'path': f'{name}_dataset'})}"


def _warn_of_idle_options(written: Written, given: Mapping[str, Any]) -> None:
    """Warn of options about loading or reading what was handed over instead."""
    for key, section, options, reason in _IDLE:
        loaded = given[key] is not None and not isinstance(given[key], str)
        for option in options:
            node = get(written.root, (*section, option))
            sliced = option == "split" and node is not None and "[" in str(node.value)  # of rows at hand too
            if loaded and written.has(*section, option) and not sliced:
                logger.warning("%s has no effect: %s.", dotted((*section, option)), reason)
