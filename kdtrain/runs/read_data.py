"""The rows that a config names, and whether its losses can be computed on them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import datasets
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config import RunConfig
from kdtrain.config.schema import DataSource
from kdtrain.data import BuildReport, HeldOut, Source, build_dataset
from kdtrain.data.dataset import encode_sources, encoder_of, with_prefix_column
from kdtrain.data.multimodal import image_content, tokenizer_content
from kdtrain.data.row_key import row_keys
from kdtrain.data.sources import SourceContent
from kdtrain.data.stream.rows import StreamedRows
from kdtrain.errors import DataError
from kdtrain.preflight.findings import Together
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from kdtrain.runs.build import Given, Reporter

_ANY_NUMBER = 10**9
_FIRST_ROWS = 1000
"""Of each source that is streamed: what is looked at before training."""
# What was read, by all that it depends on; None outside of `reading_once`.
_read_before: dict[str, Any] | None = None
_Read = TypeVar("_Read")


@dataclass
class RunData:
    """Encoded rows, and what became of them."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    report: BuildReport
    evaluation_report: BuildReport | None = None
    stream: StreamedRows | None = None
    """The training rows where they are streamed; `train` and `report` are then of the first of them."""


def read_data(
    config: RunConfig,
    seed: int,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    reporter: Reporter,
    given: Given,
    *,
    all_rows: bool = False,
) -> RunData:
    """Read and encode the rows, in one process of a machine; the others read its cache.

    Args:
        all_rows: read a stream to its end as well.
    """
    most_bad = config.data.max_bad_rows
    evaluation = evaluation_report = stream = None
    together = Together()
    with PartialState().local_main_process_first():
        sources = sources_of(config.data.train, given.train_dataset)
        with together.check(("data", "train")):
            options = encoding_options(config, seed, "train")
            if config.data.streams and not all_rows:
                some = [first_of(source, _FIRST_ROWS) for source in sources]
                train, report = _read(some, processing, max_bad_rows=most_bad, **options)
                stream = _stream(config, seed, processing, sources, train, report)
            else:
                train, report = _read(sources, processing, new_parts=True, max_bad_rows=most_bad, **options)
        if config.data.eval_sources:
            sources = sources_of(config.data.eval_sources, given.eval_dataset)
        with together.check(("data", "eval")):
            if config.data.eval is not None:
                options = encoding_options(config, seed, "eval")
                evaluation, evaluation_report = _read(sources, processing, max_bad_rows=most_bad, **options)
        together.done()
    for name, one in (("train", report), ("eval", evaluation_report)):
        if is_main() and one is not None:
            reporter.data(name, one)
    check_losses(config, report)
    return RunData(train, evaluation, report, evaluation_report, stream)


def first_of(source: Source, rows: int) -> Source:
    """A source without all but its first rows."""
    return replace(source, limit=rows if source.limit is None else min(source.limit, rows))


def _stream(
    config: RunConfig,
    seed: int,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    sources: Sequence[Source],
    first: datasets.Dataset,
    report: BuildReport,
) -> StreamedRows:
    """The training rows, of which some of the first were read; the report says that it is of these."""
    options = encoding_options(config, seed, "train")
    encoder, limits = encoder_of(processing, **options)
    data_seed = config.training.get("data_seed")
    stream = StreamedRows(
        with_prefix_column(sources, encoder),
        encoder,
        limits,
        seed=seed if data_seed is None else data_seed,
        shuffle=config.training.get("train_sampling_strategy") != "sequential",
        first=first,
        max_bad_rows=config.data.max_bad_rows,
        keep=["chat"] * bool(options["keep_chats"]) + ["answer"] * bool(options["keep_answers"]),
    )
    report.streamed = True
    report.contents = [SourceContent(one.path, 0, name) for one, name in zip(sources, stream.identities(), strict=True)]
    return stream


@dataclass(frozen=True)
class EvaluationRows:
    """The rows of `data.eval`, encoded."""

    rows: datasets.Dataset
    """With a column `answer` where any row has one."""
    report: BuildReport
    shown: dict[str, str]
    """Some rows with a prompt, spread over all of them: `row_id` to the place it comes from, as `file:line`."""


def read_evaluation(
    config: RunConfig, seed: int, processing: PreTrainedTokenizerBase | ProcessorMixin, shown: int = 0
) -> EvaluationRows:
    """The rows of `data.eval` alone, as `read_data` reads them, and the answers that they are checked against.

    Args:
        shown: of how many rows the place is wanted.
    """
    with PartialState().local_main_process_first():
        sources = sources_of(config.data.eval_sources or config.data.train)  # a share of them
        options = encoding_options(config, seed, "eval") | {"keep_answers": True, "optional_answers": True}
        most_bad = config.data.max_bad_rows
        key = _key(sources, processing, {**options, "shown": shown, "max_bad_rows": most_bad})
        found = _once(key, lambda: _evaluation_rows(sources, processing, options, most_bad, shown))
    return replace(found, report=deepcopy(found.report))


def _evaluation_rows(
    sources: list[Source],
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    options: Mapping[str, Any],
    most_bad: int,
    shown: int,
) -> EvaluationRows:
    with encode_sources(sources, processing, **options) as encoded:
        encoded.refuse(most_bad)
        rows = encoded.dataset()
        places = {rows[i]["row_id"]: encoded.place(int(encoded.rows[i])) for i in _spread(rows, shown)}
    if not any(answer is not None for answer in rows["answer"]):
        rows = rows.remove_columns("answer")
    return EvaluationRows(rows, encoded.report, places)


def _spread(rows: datasets.Dataset, count: int) -> list[int]:
    """So many of the rows that have a prompt, evenly spaced, of equal ones the first."""
    lengths, first = rows["prompt_length"][:], dict[str, int]()
    for i, row_id in enumerate(rows["row_id"][:]):
        first.setdefault(row_id, i)
    asked = [i for i in first.values() if lengths[i]]
    return [asked[i * len(asked) // count] for i in range(count)] if len(asked) > count else asked


def repeated_rows(
    rows: datasets.Dataset,
    config: RunConfig,
    trained: RunConfig,
    seed: int,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
) -> list[bool]:
    """Which of the evaluation's rows a run has been trained on as well, word for word.

    Args:
        rows: of `read_evaluation`.
        config: the one that they were encoded by: the training rows are encoded alike.
        trained: the run's own, which names its training rows.
    """
    if trained.data.streams:
        logger.warning("Rows of data.eval that are also in data.train are not looked for: data.train is streamed.")
        return [False] * len(rows)
    own = {name: getattr(trained.data, name) for name in ("train", "eval", "image_root")}
    data = config.data.model_copy(update=own)
    alike = config.model_copy(update={"data": data, "custom": trained.custom})
    with PartialState().local_main_process_first():
        # Rows that this run could not have used are in none of its evaluation's either.
        options = encoding_options(alike, seed, "train") | {
            "on_overlength": "truncate",
            "generated": False,
            "keep_answers": False,  # one without would be a bad row, and not found
        }
        train, _ = build_dataset(
            sources_of(data.train), processing, max_bad_rows=_ANY_NUMBER, new_parts=True, **options
        )
    seen = set(row_keys(train))
    return [key in seen for key in row_keys(rows)]


@contextmanager
def reading_once() -> Iterator[None]:
    """Inside, rows that were read are given out again, for the next run of a sweep."""
    global _read_before
    _read_before = {}
    try:
        yield
    finally:
        _read_before = None


def _read(
    sources: list[Source], processing: PreTrainedTokenizerBase | ProcessorMixin, **options: Any
) -> tuple[datasets.Dataset, BuildReport]:
    """As `build_dataset`. Rows are never changed in place; of the report, which is, everybody gets a copy."""
    rows, report = _once(_key(sources, processing, options), lambda: build_dataset(sources, processing, **options))
    return rows, deepcopy(report)


def _once(key: str | None, read: Callable[[], _Read]) -> _Read:
    if _read_before is None or key is None:
        return read()
    if key not in _read_before:
        _read_before[key] = read()
    found: _Read = _read_before[key]
    return found


def _key(
    sources: list[Source], processing: PreTrainedTokenizerBase | ProcessorMixin, options: Mapping[str, Any]
) -> str | None:
    """Of all that encoded rows depend on; None where that is not asked for, or rows were handed over."""
    if _read_before is None or any(source.rows is not None for source in sources):
        return None
    tokenizer = getattr(processing, "tokenizer", processing)
    # A seed draws rows only where a weight takes a part of them.
    drawn = {} if any(source.weight % 1 for source in sources) else {"seed": None}
    templates = processing.chat_template, tokenizer.chat_template
    parts = [
        *map(vars, sources),
        {**options, **drawn},
        templates,
        tokenizer_content(tokenizer),
        image_content(processing),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def encoding_options(config: RunConfig, seed: int, split: Literal["train", "eval"]) -> dict[str, Any]:
    """What a config says about reading and encoding rows, as arguments of `build_dataset` and `encode_sources`."""
    generated = split == "train" and config.all_generated
    return {
        "max_length": config.data.max_length,
        "on_overlength": config.data.on_overlength,
        **config.chats,
        "sample_limit": config.custom.sample_limit,
        "seed": seed,
        "num_proc": config.training.get("dataset_num_proc"),
        "image_root": config.data.image_root,
        "cache_dir": config.data.cache_dir,
        "held_out": HeldOut(share, training=split == "train") if (share := config.data.eval_share) else None,
        "prompts": generated,
        "generated": generated,
        # Only messages carry images to a server, and some servers read nothing else; and a teacher with another
        # tokenizer has its own template.
        "keep_chats": config.asks_server or config.options.crosses_tokenizers,
        "teachers": config.routes,
        "keep_answers": split == "train" and config.checks_answers,
    }


def sources_of(sources: Sequence[DataSource], rows: Any = None) -> list[Source]:
    """The sources of one split; `rows` were handed over and stand in for those that its path names."""
    return [Source(**source.model_dump(), rows=rows) for source in sources]


def check_losses(config: RunConfig, report: BuildReport) -> None:
    """Refuse training rows that the losses of the config cannot be computed on."""
    _check_terms(config, report)
    _check_generation(config, report)


def _check_terms(config: RunConfig, report: BuildReport) -> None:
    """Refuse a loss that is 0 for every row, and terms about images without one."""
    if not config.options.needs_teacher and not any(source.ce for source in config.data.train):
        raise DataError(
            "Nothing supervises this run: every source has ce: false, and rlhf.llm_kd_weight is 0. Give it a teacher, "
            "or remove ce: false."
        )
    if config.options.visual_kd is not None and not report.images:
        raise DataError(
            "custom.visual_kd is enabled, but no row of data.train has an image. Give rows with images (images, image, "
            "or image parts in messages), or set custom.visual_kd.enabled: false."
        )
    if config.options.weighing is not None and not report.images:
        raise DataError(
            "rlhf.token_weights weighs tokens by how much they need the image, and no row of data.train has one. Give "
            "rows with images, or remove it."
        )


def unread_answers(config: RunConfig, report: BuildReport) -> str:
    """What to say where training rows have answers that the run replaces by others; empty where it does not."""
    if not config.all_generated or report.prompt_only_rows == report.rows_kept:
        return ""
    if config.rlhf.lmbda == 1:
        return "the student writes every answer itself (rlhf.lmbda is 1): those of the data are not trained on"
    writers = "the student and the teacher write" if config.rlhf.lmbda else "the teacher writes"
    return f"{writers} every answer (rlhf.seq_kd): those of the data are not trained on"


def _check_generation(config: RunConfig, report: BuildReport) -> None:
    """Rows without a prompt cannot be generated from."""
    lmbda, seq_kd = config.rlhf.lmbda, config.rlhf.seq_kd
    generates = config.options.lm_kd_active and (lmbda > 0 or seq_kd)
    if generates and report.plain_text_rows:
        raise DataError(
            f"{report.plain_text_rows} rows are plain text, without a prompt to generate from (rlhf.lmbda is {lmbda}, "
            f"rlhf.seq_kd {seq_kd}). Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
    if generates and report.promptless_rows:
        raise DataError(
            f"{report.promptless_rows} rows have no prompt to generate from (rlhf.lmbda is {lmbda}, rlhf.seq_kd "
            f"{seq_kd}): it is longer than data.max_length ({config.data.max_length} tokens) and was cut, or an image "
            "stands behind it. Raise data.max_length, set data.on_overlength: drop, or set rlhf.lmbda: 0 and "
            "rlhf.seq_kd: false."
        )
