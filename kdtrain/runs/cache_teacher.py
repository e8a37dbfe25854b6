"""The teacher of a cache: built without the student, checked on a few rows, and asked how its targets are stored."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.experimental.gkd import GKDConfig

from kdtrain.config import RunConfig
from kdtrain.config.model_folder import require_sound
from kdtrain.data import Collator
from kdtrain.data.batch import Batch
from kdtrain.errors import DataError, PreflightError, TeacherError
from kdtrain.losses.head import Head
from kdtrain.models.probe import OPTION_OF
from kdtrain.models.vocabulary import vocabulary_size
from kdtrain.preflight.alignment import check_alignment, few_rows
from kdtrain.preflight.findings import report
from kdtrain.preflight.other_tokenizer import look_at_rows, unaligned_rows
from kdtrain.preflight.server import check_server, row_with_image, rows_for_other, rows_to_ask_about
from kdtrain.runs.build import TeacherSide, teacher_side
from kdtrain.runs.cache_plan import CachePlan
from kdtrain.runs.deep import student_vocabulary
from kdtrain.runs.read_data import RunData
from kdtrain.runs.student import load_own_teacher
from kdtrain.teachers import LocalTeacher, ServedTeacher, Teacher, teacher_autocast
from kdtrain.teachers.base import DenseTargets, targets_of
from kdtrain.teachers.cached.shard_file import header_bytes
from kdtrain.teachers.cached.store import CacheWriter, Format, HiddenDtype, shard_path
from kdtrain.teachers.cached.writing import Asking, rows_of_targets
from kdtrain.trainer.teacher_failures import row_errors_on_all_ranks

if TYPE_CHECKING:
    from kdtrain.runs.cache_options import Wanted


logger = logging.getLogger(__name__)

_SHOWN = 3


@dataclass(frozen=True)
class CacheTeacher:
    """A teacher that is ready to be asked."""

    asking: Asking
    head: Head | None
    """Of mode `hidden`."""
    bytes_per_token: float
    """On disk, of a few rows."""
    accelerator: Accelerator

    @property
    def form(self) -> Format:
        return self.asking.form

    @property
    def dtype(self) -> str | None:
        """Of its weights; None where it runs elsewhere."""
        return dtype_of(self.asking.teacher)

    @property
    def half_precision(self) -> bool:
        """Whether its numbers may be those of half precision: of a server that is not known."""
        return self.dtype not in ("float32", "float64") or self.accelerator.mixed_precision != "no"


@dataclass(frozen=True)
class OpenTeacher:
    """A teacher that is built and placed, and what makes its batches."""

    side: TeacherSide
    collator: Collator
    accelerator: Accelerator

    @property
    def teacher(self) -> Teacher:
        assert self.side.teacher is not None, "the config is checked for it"
        return self.side.teacher

    @property
    def dtype(self) -> str | None:
        """Of its weights; None where it runs elsewhere."""
        return dtype_of(self.teacher)


def dtype_of(teacher: Teacher) -> str | None:
    return None if teacher.module is None else str(next(teacher.module.parameters()).dtype).removeprefix("torch.")


def open_teacher(
    config: RunConfig,
    args: GKDConfig,
    accelerator: Accelerator,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    data: RunData,
    wanted: Wanted,
    at_the_end: ExitStack,
) -> OpenTeacher:
    """The teacher of a config.

    Args:
        at_the_end: closes it.

    Raises:
        PreflightError: it cannot be had.
    """
    _refuse_pieces(accelerator)
    side = _build(config, args, processing)
    opened = OpenTeacher(
        side,
        Collator(
            processing,
            side.processing,
            pad_to_multiple_of=args.pad_to_multiple_of,
            other_tokenizer=side.other_tokenizer,
        ),
        accelerator,
    )
    teacher = opened.teacher
    at_the_end.callback(teacher.close)
    if isinstance(teacher, ServedTeacher):
        teacher.top_k = wanted.entries(config) or teacher.top_k
        _ask_server(config, data, teacher, opened.collator)
    teacher.place(accelerator)
    return opened


def cache_teacher(
    config: RunConfig, args: GKDConfig, opened: OpenTeacher, data: RunData, plan: CachePlan, wanted: Wanted
) -> CacheTeacher:
    """A teacher that is checked on a few rows, and how its targets are stored.

    Raises:
        PreflightError: it cannot do what is wanted of it.
    """
    teacher, collator, accelerator = opened.teacher, opened.collator, opened.accelerator
    if collator.other_tokenizer is not None:
        with row_errors_on_all_ranks(accelerator):
            _check_text(plan, collator, accelerator)
        looked = look_at_rows(data.train, collator)
        report([] if looked is None else [looked.finding()])
    batch = few_rows(data.train, collator, args.per_device_eval_batch_size)
    if batch is None:
        batch = collator([plan.row(0)])
    batch = batch.to(accelerator.device)
    with torch.no_grad(), teacher_autocast(accelerator):
        _check(config, teacher, batch)
        form, head = _form(config, teacher, batch, wanted, opened.side.shared_vocabulary)
        size = _bytes_per_token(teacher, batch, form)
    size_of_batch = args.per_device_eval_batch_size

    def collate(rows: Sequence[int]) -> Batch:
        made: Batch = collator([plan.row(row) for row in rows])
        return made.to(accelerator.device)

    asking = Asking(teacher, collate, form, size_of_batch, _ahead(teacher, size_of_batch))
    return CacheTeacher(asking, head, size, accelerator)


def _check_text(plan: CachePlan, collator: Collator, accelerator: Accelerator) -> None:
    """Whether all rows are the same text to both models: without a row that is not, it is another cache."""
    if accelerator.is_main_process:
        logger.info("Reading %s rows by both tokenizers, before the teacher is asked.", f"{len(plan):,}")
    own = range(accelerator.process_index, len(plan), accelerator.num_processes)
    if wrong := unaligned_rows(map(plan.row, own), collator):
        more = f"\nand {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
        listed = "\n".join(wrong[:_SHOWN])
        raise DataError(f"{len(wrong):,} of {len(own):,} rows cannot be compared with this teacher:\n{listed}{more}")


def _refuse_pieces(accelerator: Accelerator) -> None:
    """Shards have other numbers of batches, and a teacher in pieces needs all processes in each of its forwards."""
    for plugin, name in (("fsdp_plugin", "FSDP"), ("deepspeed_plugin", "DeepSpeed")):
        if getattr(accelerator.state, plugin, None) is not None:
            raise PreflightError(
                f"kdtrain cache was launched with {name}, which cuts the teacher into pieces, and each process asks "
                "the teacher by itself. Launch it without; rlhf.teacher.device_map: auto spreads one that is too large "
                "for a device."
            )


def _build(config: RunConfig, args: GKDConfig, processing: PreTrainedTokenizerBase | ProcessorMixin) -> TeacherSide:
    if config.rlhf.teacher.backend != "self":
        if not config.rlhf.teacher.is_served and config.rlhf.teacher_model:
            require_sound(Path(config.rlhf.teacher_model), "teacher")
        return teacher_side(config, args, processing, student_vocabulary(config))
    student = load_own_teacher(config, args.device)
    return TeacherSide(LocalTeacher(student), processing, vocabulary_size(student))


def _ask_server(config: RunConfig, data: RunData, teacher: ServedTeacher, collator: Collator) -> None:
    """Find out what the server really does, before it is asked for all rows."""
    other = collator.other_tokenizer is not None
    check_server(
        teacher,
        rows_for_other(data.train, collator) if other else rows_to_ask_about(data.train),
        collator.teacher_processing_class if other else collator.processing_class,
        scores=True,
        writes=config.answers_from_teacher,
        tokens=data.report.total_tokens,
        chat_template_kwargs={**config.data.chat_template_kwargs, **config.rlhf.teacher.chat_template_kwargs},
        teacher_processing=collator.teacher_processing_class,
        image_row=row_with_image(data.train, collator),
    )
    if not teacher.has_targets:
        raise PreflightError("This server gives no log-probabilities of given tokens, and a cache is made of them.")


def _check(config: RunConfig, teacher: Teacher, batch: Batch) -> None:
    """Whether its targets stand at the right tokens: the wrong ones would be stored without a word."""
    option = ("rlhf", "teacher", "base_url") if config.rlhf.teacher.is_served else OPTION_OF["teacher"]
    look = getattr(teacher, "look", None)
    report([*([] if look is None else look.findings), *_of_alignment(teacher, batch, option)])


def _of_alignment(teacher: Teacher, batch: Batch, option: Any) -> Sequence[Any]:
    try:
        return check_alignment(teacher, batch, option=option)
    except TeacherError as error:
        raise PreflightError(str(error)) from error  # nothing is written yet


def _form(config: RunConfig, teacher: Teacher, batch: Batch, wanted: Wanted, shared: int) -> tuple[Format, Head | None]:
    """How its targets will be stored, and its head where that is stored."""
    entries = wanted.entries(config)
    if wanted.mode == "chunks":
        return Format("chunks", 0), None
    if wanted.mode == "topk":
        k = min(entries or 1, shared)
        return Format("topk", shared, entries=k, exact=k == shared), None
    if wanted.mode == "sample":
        return Format("sample", shared, entries=entries, temperature=config.rlhf.kd_temperature), None
    scores = targets_of(teacher, batch).scores
    if not isinstance(scores, DenseTargets):
        raise PreflightError(
            "--mode hidden stores the teacher's last hidden states and its head, and the head of this teacher cannot "
            "be read (a message above says why). Use --mode topk or sample."
        )
    dtype: HiddenDtype = "int8"
    if wanted.hidden_dtype != "int8":
        dtype = str(scores.hidden.dtype).removeprefix("torch.")  # type: ignore[assignment]
    return Format(
        "hidden", len(scores.head.weight), hidden_size=scores.hidden.shape[1], hidden_dtype=dtype
    ), scores.head


def _bytes_per_token(teacher: Teacher, batch: Batch, form: Format) -> float:
    """What a token takes on the disk, by storing a few rows."""
    counts = batch.predicts_BT.sum(1).tolist()
    keys = [number.to_bytes(16, "little") for number in range(len(counts))]
    rows = rows_of_targets(targets_of(teacher, batch), batch, form, keys)
    with tempfile.TemporaryDirectory() as folder:
        CacheWriter(Path(folder), form).write_shard(0, keys, rows)
        path = shard_path(Path(folder), 0)  # the header of a few rows would count too much
        return (path.stat().st_size - header_bytes(path)) / max(sum(counts), 1)


def _ahead(teacher: Teacher, batch_size: int) -> int:
    """Batches that are asked for ahead: enough that a server has as many requests as it may have at a time, twice."""
    if not isinstance(teacher, ServedTeacher):
        return 0
    requests = teacher.servers.concurrency * len(teacher.servers.urls)
    teacher.lookahead = 2 * -(-requests // batch_size)
    return teacher.lookahead
