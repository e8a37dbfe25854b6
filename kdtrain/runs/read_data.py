"""The rows that a config names, and whether its losses can be computed on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import datasets
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config import RunConfig
from kdtrain.config.schema import DataSource
from kdtrain.data import BuildReport, HeldOut, Source, build_dataset
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
    most_bad = config.data.max_bad_rows
    evaluation = evaluation_report = None
    with PartialState().local_main_process_first():
        sources = sources_of(config.data.train, given.train_dataset)
        options = encoding_options(config, seed, "train")
        train, report = build_dataset(sources, processing, new_parts=True, max_bad_rows=most_bad, **options)
        if config.data.eval_sources:
            sources = sources_of(config.data.eval_sources, given.eval_dataset)
        if config.data.eval is not None:
            options = encoding_options(config, seed, "eval")
            evaluation, evaluation_report = build_dataset(sources, processing, max_bad_rows=most_bad, **options)
    for name, one in (("train", report), ("eval", evaluation_report)):
        if is_main() and one is not None:
            reporter.data(name, one)
    check_losses(config, report)
    return RunData(train, evaluation, report, evaluation_report)


def encoding_options(config: RunConfig, seed: int, split: Literal["train", "eval"]) -> dict[str, Any]:
    """What a config says about reading and encoding rows, as arguments of `build_dataset` and `encode_sources`."""
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
        "prompts": split == "train" and _all_generated(config),
        # Only messages carry images to a server, and some servers read nothing else.
        "keep_chats": config.asks_teacher and config.rlhf.teacher.is_served,
    }


def sources_of(sources: Sequence[DataSource], rows: Any = None) -> list[Source]:
    """The sources of one split; `rows` were handed over and stand in for those that its path names."""
    # Streaming is not available yet, which the config's own checks say.
    return [Source(**source.model_dump(exclude={"streaming"}), rows=rows) for source in sources]


def check_losses(config: RunConfig, report: BuildReport) -> None:
    """Refuse training rows that the losses of the config cannot be computed on."""
    _check_terms(config, report)
    _check_generation(config, report)


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
