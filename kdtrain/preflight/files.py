"""The files that a config names, looked at before torch is imported: `validate` finds the same as the start of `fit`.

Each check is handed to `check_config`, which places what it yields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from kdtrain.config import RunConfig
from kdtrain.config.folders import broken_models
from kdtrain.config.model_folder import has_chat_template
from kdtrain.config.model_pair import swapped_models
from kdtrain.config.run_files import run_files
from kdtrain.config.schema import DataSource
from kdtrain.config.several import each_teacher
from kdtrain.config.tree import KeyPath, Problem
from kdtrain.config.versions import unfit_versions
from kdtrain.data.first_rows import is_chat, wrong_with
from kdtrain.data.source import Source


def all_files(config: RunConfig) -> Iterator[Problem]:
    """Everything that a run needs."""
    yield from unfit_versions()
    yield from _of_each(config, run_files)
    yield from cache_files(config)


def _of_each(config: RunConfig, *checks: Callable[[RunConfig], Iterable[Problem]]) -> Iterator[Problem]:
    """What checks of files find, of each of several teachers; what is about none of them, once."""
    found: dict[Problem, None] = {}
    for one in each_teacher(config):
        for check in checks:
            found |= dict.fromkeys(one.placed(check(one.config)))
    yield from found


def cache_files(config: RunConfig) -> Iterator[Problem]:
    """What `kdtrain cache` needs, which launches without the files of `run_files`."""
    yield from _of_each(config, broken_models, swapped_models)
    yield from data_files(config)


def evaluation_files(config: RunConfig) -> Iterator[Problem]:
    """What `kdtrain evaluate` needs of a run: its models, and rows to evaluate on."""
    yield from _of_each(config, broken_models)
    if config.data.eval is not None:
        yield from data_files(config, splits=("eval",) if config.data.eval_sources else ("train",))


def compared_files(config: RunConfig) -> Iterator[Problem]:
    """What it needs of a run that is compared: the rows that it was trained on, which the verdict leaves out."""
    yield from data_files(config, splits=("train",))


def preview_files(config: RunConfig) -> Iterator[Problem]:
    """Data alone; bad rows are what `kdtrain preview` is there to show."""
    yield from data_files(config, tolerant=True)


def data_files(
    config: RunConfig, tolerant: bool | None = None, splits: Sequence[str] = ("train", "eval")
) -> Iterator[Problem]:
    """Files of rows that are missing, or whose first row is none; hub data sets are not looked at.

    Args:
        tolerant: whether a bad first row is let through; None: where the config lets some rows be bad.
    """
    prefix = config.chats["teacher_prefix_column"]
    has_default = config.chats["teacher_prefix"] is not None
    for path, given, prompts in _sources(config, splits):
        source = Source(**given.model_dump(), prefix_column=prefix, prefix_default=has_default)
        lets = config.data.max_bad_rows > 0 if tolerant is None else tolerant
        teachers = config.routes
        found = wrong_with(source, prompts=prompts, root=config.data.image_root, tolerant=lets, teachers=teachers)
        if found:
            yield Problem(path, *found)
        elif _lacks_template(config) and is_chat(source):
            yield Problem(("model", "model"), *_NO_TEMPLATE)
            return


def _sources(config: RunConfig, splits: Sequence[str]) -> Iterator[tuple[KeyPath, DataSource, bool]]:
    """Option and options of each local source, and whether its rows may be prompts alone."""
    for part, sources in (("train", config.data.train), ("eval", config.data.eval_sources)):
        for number, source in enumerate(sources if part in splits else ()):
            if source.is_local:
                path: KeyPath = ("data", part, number) if len(sources) > 1 else ("data", part)
                yield path, source, part == "train" and config.all_generated


_NO_TEMPLATE = (
    "has no chat template, and the rows are conversations, which nothing could write as text",
    "copy the tokenizer's files, chat_template.jinja among them, from the instruction-tuned model; or give rows with "
    "prompt and completion as text (columns: {prompt: …, completion: …}), which need none",
)


def _lacks_template(config: RunConfig) -> bool:
    folder = Path(config.model.model)
    return folder.is_absolute() and (folder / "config.json").is_file() and not has_chat_template(folder)
