"""`kdtrain cache`: the flow from a checked config to the teacher's targets of its rows on disk.

    rows, encoded as `fit` does -> what is there already -> the teacher -> space on the disk -> shards -> the manifest

Nothing here prints: a `CacheReporter` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import Accelerator, PartialState
from trl.experimental.gkd import GKDConfig

from kdtrain import __version__
from kdtrain.config import RunConfig, TrainArguments
from kdtrain.errors import DataError, NonFiniteError, PreflightError, TeacherError
from kdtrain.memory import is_out_of_memory, peak
from kdtrain.models.processing import load_processing
from kdtrain.preflight.server import by_one_rank
from kdtrain.ranks import is_main
from kdtrain.runs import cache_folder
from kdtrain.runs.build import Given, Reporter
from kdtrain.runs.cache_answers import answers_of_cache, write_answers_into
from kdtrain.runs.cache_options import Wanted, require_cachable
from kdtrain.runs.cache_plan import CachePlan, plan_rows
from kdtrain.runs.cache_teacher import CacheTeacher, OpenTeacher, cache_teacher, open_teacher
from kdtrain.runs.cache_verify import Verified, verify
from kdtrain.runs.launch import check_world
from kdtrain.runs.made_from import made_from
from kdtrain.runs.read_data import read_data
from kdtrain.runs.signals import interrupting
from kdtrain.teachers import teacher_autocast
from kdtrain.teachers.cached.manifest import Manifest, identified
from kdtrain.teachers.cached.store import CacheWriter
from kdtrain.teachers.cached.writing import Shard


@dataclass(frozen=True)
class CacheResult:
    """A cache that is complete."""

    folder: Path
    rows: int
    tokens: int
    """Supervised ones."""
    bytes: int
    """On disk, with everything."""
    seconds: float
    written: int
    """Rows that this command has written: 0 where all were there."""
    verified: Verified | None


class CacheReporter(Reporter, Protocol):
    """Shows how a cache is written."""

    def rows(self, done: int, total: int) -> None:
        """Rows of this process that are done, of those that were missing; 0 at the start."""


def write_cache(arguments: TrainArguments, folder: Path, wanted: Wanted, reporter: CacheReporter) -> CacheResult:
    """Write what is missing of a cache, and verify some of it."""
    started = time.perf_counter()
    config, args = arguments.config, arguments.training_args
    wanted = wanted.of(config)
    require_cachable(config, wanted)
    with interrupting(kept(folder)), ExitStack() as at_the_end:
        at_the_end.callback(reporter.close)
        args.device  # noqa: B018 - joins the process group
        by_one_rank(lambda: cache_folder.manifest_in(folder))  # refuses a folder before anything is made
        by_one_rank(lambda: cache_folder.lock(folder, at_the_end))
        manifest = by_one_rank(lambda: cache_folder.manifest_in(folder))
        processing = load_processing(
            config.model.model,
            processor_kwargs=config.data.processor_kwargs,
            side="student",
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
        )
        data = read_data(config, args.seed, processing, reporter, Given(), all_rows=True)
        known = wanted.identity(config)
        if manifest is not None:
            like = manifest.made_from
            here = by_one_rank(lambda: made_from(config, processing, like=like))
            cache_folder.require_same(folder, manifest, here | known)
        accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision)
        check_world(args, config)
        opening = partial(open_teacher, config, args, accelerator, processing, data, wanted, at_the_end)
        opened = None
        if config.answers_from_teacher and manifest is not None:
            known |= answers_of_cache(folder, manifest, config, data, at_the_end)
        elif config.answers_from_teacher:
            opened = teacher_of_answers = opening()
            here = by_one_rank(lambda: _made_from(config, processing, teacher_of_answers, wanted))
            known |= write_answers_into(folder, config, args, data, opened, here, reporter, at_the_end)
        parts = [data.train, *([] if data.evaluation is None else [data.evaluation])]
        plan = plan_rows(parts, chats=config.options.crosses_tokenizers)
        if not len(plan):
            raise DataError("No row has a supervised token, and so there is nothing to ask the teacher for.")
        known["rows"] = identified(f"{len(plan):,} rows", plan.identity)
        if (found := manifest) is not None:
            cache_folder.require_same(folder, found, known)
            manifest = by_one_rank(lambda: _reopened(folder, found, plan))
            if manifest.complete and not wanted.verify:
                return _result(folder, plan, started, 0, None)
        ready = opened or opening()
        here = by_one_rank(lambda: _made_from(config, processing, ready, wanted))
        teacher = cache_teacher(config, args, ready, data, plan, wanted)
        made = Making(folder, plan, teacher, _manifest(manifest, folder, plan, teacher, here | known), reporter)
        if is_main():
            reporter.plan(made.described())
        with made.readable_failures(args):
            written = 0 if made.manifest.complete else made.write()
            verified = verify(folder, plan, teacher, wanted.verify) if wanted.verify and is_main() else None
    return _result(folder, plan, started, written, verified)


def _made_from(config: RunConfig, processing: Any, teacher: OpenTeacher, wanted: Wanted) -> dict[str, Any]:
    precision = teacher.accelerator.mixed_precision if teacher.dtype else None
    return made_from(config, processing, dtype=teacher.dtype, precision=precision, drawn=wanted.mode == "sample")


def _reopened(folder: Path, manifest: Manifest, plan: CachePlan) -> Manifest:
    shards = [shard.number for shard in plan.shards(manifest.rows_per_shard)]
    return cache_folder.reopened(folder, manifest, shards)


def _manifest(
    found: Manifest | None, folder: Path, plan: CachePlan, teacher: CacheTeacher, made_from: dict[str, Any]
) -> Manifest:
    """That of the folder, if its teacher is the same, or a new one."""
    if found is not None:
        by_one_rank(lambda: cache_folder.require_same(folder, found, made_from))
        if found.form != teacher.form:
            raise PreflightError(
                f"--out {cache_folder.shown(folder)} holds another cache: {found.form}, and now {teacher.form}. Name "
                "another folder."
            )
        return found
    rows_per_shard = plan.rows_per_shard(teacher.bytes_per_token, teacher.asking.batch_size)
    return Manifest(teacher.form, made_from, versions(), len(plan), by_one_rank(lambda: rows_per_shard), False)


def kept(folder: Path) -> str:
    """What is said when a signal or the teacher ends it."""
    return f"Stopped. Whole shards stay in {cache_folder.shown(folder)}: the same command goes on from there."


def versions() -> dict[str, str]:
    return {"kdtrain": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


@dataclass(frozen=True)
class Making:
    """A cache that is written."""

    folder: Path
    plan: CachePlan
    teacher: CacheTeacher
    manifest: Manifest
    reporter: CacheReporter

    def described(self) -> dict[str, str]:
        """The table at the start."""
        form, plan = self.teacher.form, self.plan
        how = {
            "topk": f"the {form.entries} most likely tokens" + (", all of them" if form.exact else ""),
            "sample": f"{form.entries} draws at temperature {form.temperature:g}",
            "hidden": f"hidden states of width {form.hidden_size} as {form.hidden_dtype}, and the head",
            "chunks": "log-likelihoods of the chunks of text that both models' tokens make up",
        }[form.mode]
        of = f", of {form.vocab_size:,} tokens" if form.vocab_size else ""
        without = f"; {plan.left_out:,} rows without a supervised token are left out" if plan.left_out else ""
        return {
            "targets": f"{how}{of}",
            "rows": f"{len(plan):,} different ones, {plan.tokens:,} supervised tokens{without}",
            "size": f"about {cache_folder.in_bytes(self.expected_bytes(plan.tokens))}, "
            f"{self.teacher.bytes_per_token:.0f} bytes a token",
            "output": str(self.folder),
        }

    def expected_bytes(self, tokens: int) -> float:
        """What some supervised tokens take, with the head."""
        head = self.teacher.head
        of_head = 0 if head is None else head.weight.numel() * head.weight.element_size()
        return tokens * self.teacher.bytes_per_token + of_head

    def write(self) -> int:
        """Write this process's share of the missing shards, and say that all are there; the rows written by all."""
        writer = CacheWriter(self.folder, self.manifest.form)
        shards = self.plan.shards(self.manifest.rows_per_shard)
        missing = set(by_one_rank(lambda: self._begin(writer, shards)))
        todo = [shard for shard in shards if shard.number in missing]
        state = PartialState()
        own = todo[state.process_index :: state.num_processes]
        done, total = 0, sum(len(shard.rows) for shard in own)

        def each(rows: int) -> None:
            nonlocal done
            done += rows
            if state.is_main_process:
                self.reporter.rows(done, total)

        each(0)
        with torch.no_grad(), teacher_autocast(self.teacher.accelerator):
            for shard, targets in self.teacher.asking.shards(own, each):
                with cache_folder.disk_errors(self.folder):
                    writer.write_shard(shard.number, shard.keys, targets)
        state.wait_for_everyone()
        by_one_rank(lambda: cache_folder.finish(self.folder, self.manifest))
        return sum(len(shard.rows) for shard in todo)

    def _begin(self, writer: CacheWriter, shards: Sequence[Shard]) -> list[int]:
        """Of one process: what is missing, once there is room for it."""
        missing = cache_folder.begin(self.folder, self.manifest, writer, [shard.number for shard in shards])
        tokens = sum(sum(self.plan.supervised[row] for row in shards[number].rows) for number in missing)
        cache_folder.require_space(self.folder, self.expected_bytes(tokens))
        if self.teacher.head is not None:
            with cache_folder.disk_errors(self.folder):
                writer.write_head(self.teacher.head)
        return missing

    @contextmanager
    def readable_failures(self, args: GKDConfig) -> Iterator[None]:
        """Errors of the device's memory and of the teacher, with a way out."""
        try:
            yield
        except (TeacherError, NonFiniteError) as error:
            error.args = (f"{error} {kept(self.folder)}",)
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise PreflightError(
                f"Out of memory on {args.device}: {peak(args.device)}, with {self.teacher.asking.batch_size} rows at a "
                "time. Lower training.per_device_eval_batch_size or data.max_length, or give the teacher half "
                "precision (rlhf.teacher.dtype). Whole shards stay, and the same command goes on."
            ) from error


def _result(folder: Path, plan: CachePlan, started: float, written: int, verified: Verified | None) -> CacheResult:
    seconds = time.perf_counter() - started
    return CacheResult(folder, len(plan), plan.tokens, cache_folder.size_of(folder), seconds, written, verified)
