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
    """Encoded rows, and what became of those for training."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    report: BuildReport


def read_data(
    config: RunConfig,
    seed: int,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    reporter: Reporter,
    given: Given,
) -> RunData:
    """Read and encode the rows, in one process of a machine; the others read its cache."""
    common = {**encoding_options(config, seed), "max_bad_rows": config.data.max_bad_rows}
    evaluation = evaluation_report = None
    with PartialState().local_main_process_first():
        sources = sources_of(config.data.train, given.train_dataset)
        train, report = build_dataset(sources, processing, new_parts=True, **common)
        if config.data.eval:
            sources = sources_of(config.data.eval, given.eval_dataset)
            evaluation, evaluation_report = build_dataset(sources, processing, **common)
    for name, one in (("train", report), ("eval", evaluation_report)):
        if is_main() and one is not None:
            reporter.data(name, one)
    check_losses(config, train, report)
    if evaluation_report is not None:
        check_evaluation(evaluation, evaluation_report)
    return RunData(train, evaluation, report)


def encoding_options(config: RunConfig, seed: int) -> dict[str, Any]:
    """What a config says about reading and encoding rows, as arguments of `build_dataset` and `encode_sources`."""
    return {
        "max_length": config.data.max_length,
        "on_overlength": config.data.on_overlength,
        **config.data.chats,
        "sample_limit": config.custom.sample_limit,
        "seed": seed,
        "num_proc": config.training.get("dataset_num_proc"),
    }


def sources_of(sources: Sequence[DataSource], rows: Any = None) -> list[Source]:
    """The sources of one split; `rows` were handed over and stand in for those that its path names."""
    # Streaming is not available yet, which the config's own checks say.
    return [Source(**source.model_dump(exclude={"streaming"}), rows=rows) for source in sources]


def check_losses(config: RunConfig, train: datasets.Dataset, report: BuildReport) -> None:
    """Refuse training rows that the losses of the config cannot be computed on."""
    _check_terms(config, report)
    _check_generation(config, train, report)


def check_evaluation(evaluation: datasets.Dataset, report: BuildReport) -> None:
    """Refuse rows to evaluate on that have no answer."""
    if report.prompt_only_rows:
        raise DataError(
            f"data.eval: rows with a prompt and no answer: {report.prompt_only_rows}, the first is number "
            f"{_first_prompt(evaluation)}. Evaluation does not generate: give rows with answers."
        )


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


def _check_generation(config: RunConfig, train: datasets.Dataset, report: BuildReport) -> None:
    """Rows without a prompt cannot be generated from, and rows without an answer need to be."""
    lmbda, seq_kd = config.rlhf.lmbda, config.rlhf.seq_kd
    generates = config.options.lm_kd_active and (lmbda > 0 or seq_kd)
    if generates and report.plain_text_rows:
        raise DataError(
            f"{report.plain_text_rows} rows are plain text, without a prompt to generate from (rlhf.lmbda is {lmbda}, "
            f"rlhf.seq_kd {seq_kd}). Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
    always = config.options.lm_kd_active and (lmbda == 1 or seq_kd)
    if report.prompt_only_rows and not always:
        raise DataError(
            f"Rows with a prompt and no answer: {report.prompt_only_rows}, the first is number {_first_prompt(train)}. "
            "Give it an answer; let the teacher write one (answers: teacher in its source); or have every batch "
            f"generated by rlhf.lmbda: 1 or rlhf.seq_kd: true (now {lmbda} and {seq_kd})."
        )


def _first_prompt(data: datasets.Dataset) -> str:
    """Where the first row without an answer stands, as "source:row", both from 0."""
    return next((row["row_id"] for row in data if row["prompt_length"] == len(row["input_ids"])), "unknown")
