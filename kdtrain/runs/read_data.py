"""The rows that a config names, and whether its losses can be computed on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config import RunConfig
from kdtrain.config.schema import DataSource
from kdtrain.data import BuildReport, Source, build_dataset
from kdtrain.errors import DataError
from kdtrain.ranks import is_main

if TYPE_CHECKING:
    from kdtrain.runs.build import Given, Reporter


@dataclass
class RunData:
    """Encoded rows, and what became of them."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    report: BuildReport
    evaluation_report: BuildReport | None = None


def read_data(
    config: RunConfig,
    seed: int,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    reporter: Reporter,
    given: Given,
) -> RunData:
    """Read and encode the rows, in one process of a machine; the others read its cache."""
    common: dict[str, Any] = {
        "max_length": config.data.max_length,
        "on_overlength": config.data.on_overlength,
        **config.data.chats,
        "max_bad_rows": config.data.max_bad_rows,
        "sample_limit": config.custom.sample_limit,
        "seed": seed,
        "num_proc": config.training.get("dataset_num_proc"),
        "image_root": config.data.image_root,
    }
    evaluation = evaluation_report = None
    with PartialState().local_main_process_first():
        sources = _sources(config.data.train, given.train_dataset)
        train, report = build_dataset(sources, processing, new_parts=True, prompts=_all_generated(config), **common)
        if config.data.eval:
            sources = _sources(config.data.eval, given.eval_dataset)
            evaluation, evaluation_report = build_dataset(sources, processing, prompts=False, **common)
    for name, one in (("train", report), ("eval", evaluation_report)):
        if is_main() and one is not None:
            reporter.data(name, one)
    _check_terms(config, report)
    _check_generation(config, report)
    return RunData(train, evaluation, report, evaluation_report)


def _sources(sources: Sequence[DataSource], rows: Any) -> list[Source]:
    # Streaming is not available yet, which the config's own checks say.
    return [Source(**source.model_dump(exclude={"streaming"}), rows=rows) for source in sources]


def _check_terms(config: RunConfig, report: BuildReport) -> None:
    """Refuse a loss that is 0 for every row, and visual KD without an image."""
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


def _all_generated(config: RunConfig) -> bool:
    """Whether every batch is generated, so that a prompt is all that a row needs."""
    return config.options.lm_kd_active and (config.rlhf.lmbda == 1 or config.rlhf.seq_kd)


def _check_generation(config: RunConfig, report: BuildReport) -> None:
    """Rows without a prompt cannot be generated from."""
    lmbda, seq_kd = config.rlhf.lmbda, config.rlhf.seq_kd
    generates = config.options.lm_kd_active and (lmbda > 0 or seq_kd)
    if generates and report.plain_text_rows:
        raise DataError(
            f"{report.plain_text_rows} rows are plain text, without a prompt to generate from (rlhf.lmbda is {lmbda}, "
            f"rlhf.seq_kd {seq_kd}). Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
