"""`kdtrain cache --from`: targets that another tool has stored, checked and written as a cache of ours.

    rows, encoded as `fit` does -> which row of the file is which of them -> where its entries belong -> shards

Every row of the file is matched by its tokens, and every supervised token must have its entry; what does not fit is
left out, counted and named. Which token an entry describes is seen from the numbers: the targets of a teacher fit the
tokens that they are for, by nats, and not those beside them.

Shapes: S supervised tokens of a row, n entries of it, K tokens of an entry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdtrain.config import RunConfig, TrainArguments
from kdtrain.data.errors import show
from kdtrain.errors import ConfigError, DataError, PreflightError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.models.processing import load_processing
from kdtrain.ranks import under_launcher
from kdtrain.runs import cache_folder
from kdtrain.runs.build import Given
from kdtrain.runs.cache import CacheReporter, CacheResult, versions
from kdtrain.runs.cache_plan import CachePlan, plan_rows
from kdtrain.runs.deep import student_vocabulary
from kdtrain.runs.import_places import Survey, survey
from kdtrain.runs.import_rows import Candidates
from kdtrain.runs.made_from import made_from_text
from kdtrain.runs.read_data import read_data
from kdtrain.teachers.cached.imported import UnreadableRow
from kdtrain.teachers.cached.imports import open_import
from kdtrain.teachers.cached.manifest import Manifest, identified
from kdtrain.teachers.cached.store import CacheWriter

logger = logging.getLogger(__name__)

IMPORTED = "imported from"
_ROWS_PER_SHARD = 1000
_SHOWN = 3


@dataclass
class Counts:
    """What became of the rows of a file."""

    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why, and where they stand."""
    repeated: int = 0
    """Whose row had its targets already."""

    def leave_out(self, reason: str, place: str) -> None:
        self.left_out.setdefault(reason, []).append(place)

    def lines(self) -> Iterator[str]:
        """One for each reason."""
        for reason, places in self.left_out.items():
            more = f"; and {len(places) - _SHOWN:,} more" if len(places) > _SHOWN else ""
            yield f"Rows of the file that are left out: {len(places):,}, {reason} ({'; '.join(places[:_SHOWN])}{more})."
        if self.repeated:
            yield f"Rows of the file that are left out: {self.repeated:,}, the same tokens stand in it before."


def import_cache(arguments: TrainArguments, source: Path, folder: Path, reporter: CacheReporter) -> CacheResult:
    """Write a cache of the rows of a config that a file of another tool has targets for.

    Raises:
        DataError: the file cannot be read, or no row of it is one of the config's.
        PreflightError: which tokens its entries are for cannot be told, or the folder is taken.
    """
    started = time.perf_counter()
    config, args = arguments.config, arguments.training_args
    if under_launcher():
        raise ConfigError("--from reads files and asks no teacher: run it in one process, without accelerate launch.")
    if config.options.crosses_tokenizers:
        raise ConfigError(
            "rlhf.cross_tokenizer is set, and --from reads targets for the student's own tokens. Remove the option, or "
            "let the teacher write the cache (without --from)."
        )
    _require_free(folder)
    file = open_import(source)
    with ExitStack() as at_the_end:
        at_the_end.callback(reporter.close)
        cache_folder.lock(folder, at_the_end)
        _require_free(folder)  # as it is now that nobody else writes
        processing = load_processing(
            config.model.model,
            processor_kwargs=config.data.processor_kwargs,
            side="student",
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
        )
        data = read_data(config, args.seed, processing, reporter, Given(), all_rows=True)
        plan = plan_rows([data.train, *([] if data.evaluation is None else [data.evaluation])])
        candidates = Candidates(file, plan, config, processing, args.seed)
        found = survey(candidates, student_vocabulary(config))
        _require_tail(config, found)
        made_from = {
            **made_from_text(config, processing),
            IMPORTED: f"{file.reader.format}: {source} ({found.place}). Not known: {file.reader.unknown}",
            "--mode": "topk",
            "rows": identified(f"{len(plan):,} rows", plan.identity),
            **({"rlhf.teacher.tail": "renormalize"} if found.normalized else {}),
        }
        manifest = Manifest(found.form, made_from, versions(), found.rows, _ROWS_PER_SHARD, False)
        reporter.plan({
            "targets": f"{file.reader.format}, up to {found.form.entries} tokens at each position; {found.place}",
            "rows": f"{found.rows:,} of the {len(plan):,} different ones of the data",
            "output": str(folder),
        })  # fmt: skip
        writing = _Writing(folder, manifest, found, reporter)
        writing.write(candidates)
    for line in [*writing.counts.lines(), *_without_targets(plan, writing.done)]:
        logger.warning("%s", line)
    seconds = time.perf_counter() - started
    rows = len(writing.done)
    tokens = sum(plan.supervised[number] for number in writing.done)
    return CacheResult(folder, rows, tokens, cache_folder.size_of(folder), seconds, rows, None)


def _require_free(folder: Path) -> None:
    """Refuse a folder with anything but an import that was not finished."""
    found = cache_folder.manifest_in(folder)
    if found is not None and (found.complete or IMPORTED not in found.made_from):
        raise PreflightError(f"--out {cache_folder.shown(folder)} holds a cache already. Name another folder.")


def _require_tail(config: RunConfig, found: Survey) -> None:
    if found.normalized and config.rlhf.teacher.tail != "renormalize":
        raise PreflightError(
            f"The probabilities of the file add up to 1 over the {found.form.entries} tokens that it names: they are "
            "normalised over these alone, and with rlhf.teacher.tail: bucket they would teach that every other token "
            "is impossible. Set rlhf.teacher.tail: renormalize, here and for the training."
        )


def _without_targets(plan: CachePlan, done: dict[int, None]) -> Iterator[str]:
    """Rows of the config that the file has nothing for."""
    missing = [number for number in range(len(plan)) if number not in done]
    if missing:
        names = ", ".join(show(str(plan.row(number)["row_id"]), 40) for number in missing[:_SHOWN])
        yield (
            f"{len(missing):,} of {len(plan):,} rows of the data have no targets in the file (source:row {names}"
            f"{', …' if len(missing) > _SHOWN else ''}): training from this cache refuses them. Leave them out of the "
            "data."
        )


@dataclass
class _Writing:
    """Rows of a file on their way into shards."""

    folder: Path
    manifest: Manifest
    found: Survey
    reporter: CacheReporter
    counts: Counts = field(default_factory=Counts)
    done: dict[int, None] = field(default_factory=dict)
    """Rows of the plan that have their targets."""

    def write(self, candidates: Candidates) -> None:
        """All of them, and the manifest last."""
        writer, shard, waiting = CacheWriter(self.folder, self.manifest.form), 0, []
        with cache_folder.disk_errors(self.folder):
            self.manifest.write(self.folder)
            for path in self.folder.glob("shard-*.safetensors"):  # of an import that was stopped, of another file maybe
                path.unlink()
            self.reporter.rows(0, self.found.rows)
            for key, targets in self._checked(candidates):
                waiting.append((key, targets))
                if len(waiting) == _ROWS_PER_SHARD:
                    writer.write_shard(shard, *zip(*waiting, strict=True))
                    shard, waiting = shard + 1, []
            if waiting:
                writer.write_shard(shard, *zip(*waiting, strict=True))
            if self.done:
                replace(self.manifest, rows=len(self.done), complete=True).write(self.folder)
        if not self.done:
            raise DataError("\n".join(["No row of the file can be used.", *self.counts.lines()]))

    def _checked(self, candidates: Candidates) -> Iterator[tuple[bytes, TopKLogprobs]]:
        for candidate in candidates:
            if candidate.problem:
                self.counts.leave_out(candidate.problem, candidate.place)
            elif candidate.number in self.done:
                self.counts.repeated += 1
            else:
                try:
                    stored = self.found.stored(candidate)
                    stored.require_aligned(self.found.form.vocab_size)
                except UnreadableRow as error:
                    self.counts.leave_out(str(error), error.at(candidate.place))
                    continue
                self.done[candidate.number] = None
                self.reporter.rows(len(self.done), max(self.found.rows, len(self.done)))
                yield candidates.plan.keys[candidate.number], stored.targets
