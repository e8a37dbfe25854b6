"""Small caches, written in process by the writer of the shards; `kdtrain cache` has tests of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kdtrain.config import ConfigLoader
from kdtrain.data import Collator, build_dataset
from kdtrain.losses.sampled import SampledTargets
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.models.processing import load_processing
from kdtrain.runs.made_from import made_from
from kdtrain.runs.read_data import encoding_options, sources_of
from kdtrain.teachers import DenseTargets, Teacher, build_teacher
from kdtrain.teachers.cached.manifest import Manifest
from kdtrain.teachers.cached.store import CacheWriter, Format

MODES = ("topk", "sample", "hidden")
_DRAWS = 12


def form_of(mode: str, teacher: Any, entries: int = 8) -> Format:
    """How the targets of a tiny teacher are stored, without any rounding."""
    size = teacher.vocab_size
    if mode == "hidden":
        hidden = teacher.module.config.get_text_config().hidden_size
        return Format("hidden", size, hidden_size=hidden, hidden_dtype="float32")
    return Format(mode, size, entries=entries, exact=True) if mode == "topk" else Format(mode, size, entries=_DRAWS)


def write_cache(
    folder: Path,
    teacher: Teacher,
    rows: Any,
    collator: Collator,
    form: Format,
    *,
    together: int = 4,
    shard: int = 8,
    made_from: dict[str, Any] | None = None,
    change: Callable[[Any], Any] = lambda targets: targets,
) -> Path:
    """A whole cache of `rows`.

    Args:
        together: rows of a batch that the teacher reads.
        shard: rows of a shard.
        change: applied to what is stored of each row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = CacheWriter(folder, form)
    known: dict[bytes, Any] = {}
    for start in range(0, len(rows), together):
        batch = collator([rows[i] for i in range(start, min(start + together, len(rows)))])
        scores = teacher.targets(batch).scores
        if form.mode == "hidden" and not known:
            writer.write_head(scores.head)
        counts = batch.predicts_BT.sum(1).tolist()
        for key, part in zip(batch.rows.keys, torch.arange(sum(counts)).split(counts), strict=True):
            if len(part):
                known.setdefault(key, change(_stored(scores, part, form)))
    keys = list(known)
    for number, start in enumerate(range(0, len(keys), shard)):
        some = keys[start : start + shard]
        writer.write_shard(number, some, [known[key] for key in some])
    manifest = Manifest(form, made_from or {}, {"kdtrain": "0"}, len(keys), shard, complete=True)
    manifest.write(folder)
    return folder


def _stored(scores: DenseTargets | torch.Tensor, rows: torch.Tensor, form: Format) -> Any:
    if form.mode == "hidden":
        return scores.hidden[rows]
    logits = (scores if isinstance(scores, torch.Tensor) else scores.logits())[rows] / form.temperature
    if form.mode == "topk":
        values, ids = torch.log_softmax(logits, -1).topk(form.entries)
        return TopKLogprobs(ids, values)
    drawn = torch.multinomial(torch.softmax(logits, -1), form.entries, replacement=True)
    distinct = [row.unique(return_counts=True) for row in drawn]
    pad = torch.nn.functional.pad
    return SampledTargets(
        torch.stack([pad(ids, (0, form.entries - len(ids)), value=-1) for ids, _ in distinct]),
        torch.stack([pad(counts / form.entries, (0, form.entries - len(counts))) for _, counts in distinct]),
    )


def cache_of(config: Path, folder: Path, mode: str = "topk", overrides: Sequence[str] = (), **options: Any) -> Path:
    """The cache of the rows of a config file, by its own teacher of `rlhf.teacher_model`."""
    arguments = ConfigLoader.load_training_config(str(config), overrides=list(overrides))
    run = arguments.config
    processing = load_processing(run.model.model, processor_kwargs=run.data.processor_kwargs, side="student")
    rows: list[Any] = []
    seed = arguments.training_args.seed
    for split, sources in (("train", run.data.train), ("eval", run.data.eval_sources or run.data.train)):
        if split == "train" or run.data.eval is not None:
            given = encoding_options(run, seed, split)
            new_parts = {"new_parts": True} if split == "train" else {}
            rows += list(build_dataset(sources_of(sources), processing, **new_parts, **given)[0])
    teacher = build_teacher(run.rlhf.teacher_model)
    entries = options.pop("entries", 8)
    form = options.pop("form", None) or form_of(mode, teacher, entries)
    found = made_from(run, processing, dtype="float32")
    collator = Collator(processing, row_keys=True)
    return write_cache(folder, teacher, rows, collator, form, made_from=found, **options)
