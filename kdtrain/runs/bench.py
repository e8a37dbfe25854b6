"""What students are put beside: the rows of an evaluation and the teacher, with one student in memory at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from kdtrain.config import RunConfig
from kdtrain.config.arguments import build_train_arguments
from kdtrain.data import Collator
from kdtrain.errors import DataError, NonFiniteError, NotAvailableError, PreflightError, TeacherError
from kdtrain.models.processing import load_processing
from kdtrain.models.vocabulary import vocabulary_size
from kdtrain.ranks import is_main
from kdtrain.runs.bench_teacher import check_teacher, other_tokenizer, side_of_evaluation
from kdtrain.runs.build import TeacherSide
from kdtrain.runs.compared import Compared, EvaluationReporter
from kdtrain.runs.failures import readable_evaluation
from kdtrain.runs.internalised import prompts_of
from kdtrain.runs.open_run import TrainedRun
from kdtrain.runs.other_tokens import InOwnTokens
from kdtrain.runs.prompts import rows_with_images
from kdtrain.runs.read_data import read_evaluation
from kdtrain.runs.samples import SHOWN, Asked, Sample
from kdtrain.runs.student import load_student
from kdtrain.runs.tasks import Metrics, Tasks
from kdtrain.runs.teacher_answers import answered
from kdtrain.runs.trained import load_trained
from kdtrain.teachers import Teacher
from kdtrain.trainer.evaluation import Evaluation
from kdtrain.trainer.figures import RowSums

if TYPE_CHECKING:
    from trl.experimental.gkd import GKDConfig

logger = logging.getLogger(__name__)

_PROMPTED, _ANSWERING, _BLANKED = "on the teacher's answers", "its answers", "without its images"


class Bench:
    """The rows and the teacher that students are put beside, one after the other."""

    def __init__(
        self, config: RunConfig, reporter: EvaluationReporter, at_the_end: ExitStack, tasks: Tasks | None = None
    ) -> None:
        self.config, self._reporter, self._tasks = config, reporter, tasks
        self.args: GKDConfig = build_train_arguments(config).training_args
        self.accelerator = Accelerator(cpu=self.args.use_cpu, mixed_precision=self.args.mixed_precision)
        self.processing = load_processing(
            config.model.model,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            processor_kwargs=config.data.processor_kwargs,
            side="student",
        )
        read = read_evaluation(config, self.args.seed, self.processing, shown=SHOWN)
        self.rows, report = read.rows, read.report
        if is_main():
            reporter.data("eval", report)
        self._before: PreTrainedModel | PeftModel | None = load_student(config, self.args.device)
        side = TeacherSide(None, None, vocabulary_size(self._before))
        of_other = None
        if config.options.needs_teacher or self._unanswered:
            several = bool(config.rlhf.teachers)  # of which none may have another
            of_other = None if self._unanswered or several else other_tokenizer(config, self.processing)
            if of_other is None:
                side = side_of_evaluation(
                    config, self.args, self.processing, side.shared_vocabulary, self.accelerator.device
                )
        self._shared = side.shared_vocabulary
        collator = self._collator(side)
        if side.teacher is not None:
            at_the_end.callback(side.teacher.close)
            check_teacher(side, config, self.rows, collator, report)
            side.teacher.place(self.accelerator)
        if self._unanswered:
            self.rows = self._answered(self.rows, side, collator)
        self._in_own = InOwnTokens(
            config, self.args, self.accelerator, self.rows, self.processing, cut=report.truncated
        )
        self.text_bytes = self._in_own.text_bytes
        """UTF-8 bytes of the labelled text of each row, [R]."""
        self.other_tokens = False
        """Whether a run was measured in tokens of its own, so that only nats per byte can be compared."""
        self._other_teacher = None
        if of_other is not None:
            with self._named_failures("teacher"):
                self._other_teacher = self._in_own.of_teacher(of_other, self._progress("teacher"))
        self._teacher = side.teacher if config.options.needs_teacher else None
        self._collate = collator
        self._beside, self._alone = (self._evaluation(self.rows, one) for one in (self._teacher, None))
        self._prompted = None if self._teacher is None else self._of_prompts(side, collator)
        self._image_rows = rows_with_images(self.rows)
        self._with_images = self.rows.select(self._image_rows)
        self._blanked: Evaluation | None = None
        if len(self._image_rows):
            looks = self._teacher is not None and self._teacher.module is not None
            self._blanked = self._evaluation(self._with_images, self._teacher if looks else None, blank=True)
        self._asked = self._to_ask(read.shown)
        if self._teacher is not None and self._asked is not None:
            self._ask_teacher(self._asked, side, collator)
        self._tasks_of_teacher: dict[str, dict[str, Metrics]] = {}
        if tasks is not None and self._teacher is not None and self._teacher.module is not None:
            with self._teacher.writing_model() as model:
                self._run_tasks(self._tasks_of_teacher, model, "teacher")

    @property
    def _unanswered(self) -> bool:
        """Whether the teacher writes the answers of some rows (`answers: teacher`)."""
        return "answers" in self.rows.column_names

    @property
    def teacher_sums(self) -> RowSums | None:
        """The teacher's own, once a student was evaluated beside it."""
        return self._other_teacher or self._beside.teacher_sums

    @property
    def other_teacher(self) -> bool:
        """Whether it has another tokenizer, so that it is compared with nobody token by token."""
        return self._other_teacher is not None

    def compared(self, run: TrainedRun, others: Sequence[TrainedRun]) -> Compared:
        """The student before and after training, and another run's, beside the teacher."""
        before, self._before = self._before, None
        assert before is not None, "called once"
        found = Compared(tasks=dict(self._tasks_of_teacher), image_rows=self._image_rows)
        self._compare(found, before, "before")
        del before
        for name, one in (("after", run), *(("against", other) for other in others)):
            if name == "against" and self._in_own.differs(one):
                found.rows[name] = self._other_run(one, name)
                continue
            model = self._load(one)
            self._compare(found, model, name)
            if name == "after" and self._asked is not None:
                found.samples.extend(self._samples(self._asked, model))
            del model
        if self._asked is not None:
            found.right.update((name, self._asked.right(name)) for name in (*found.rows, "teacher"))
        return found

    def _compare(self, found: Compared, model: PreTrainedModel | PeftModel, name: str) -> None:
        found.rows[name] = self._measured(self._beside, model, name)
        if self._prompted is not None:
            found.prompted[name] = self._measured(self._prompted, model, f"{name}, {_PROMPTED}")
        if self._asked is not None:
            with readable_evaluation(self.args):
                self._asked.ask(name, model)
        if self._blanked is not None:
            found.blanked[name] = self._measured(self._blanked, model, f"{name}, {_BLANKED}")
            if self._blanked.teacher_sums is not None:
                found.blanked["teacher"] = self._blanked.teacher_sums
                self._blanked = self._evaluation(self._with_images, None, blank=True)  # it is measured once
        self._run_tasks(found.tasks, model, name)

    def _run_tasks(self, found: dict[str, dict[str, Metrics]], model: Any, name: str) -> None:
        if self._tasks is None:
            return
        tokenizer = getattr(self.processing, "tokenizer", self.processing)
        with readable_evaluation(self.args):
            found[name] = self._tasks.results(model, tokenizer, self.args.per_device_eval_batch_size)

    def alone(self, run: TrainedRun) -> RowSums:
        """Another run's student, without the teacher."""
        if self._in_own.differs(run):
            return self._other_run(run, run.name)
        return self._measured(self._alone, self._load(run), run.name)

    def _other_run(self, run: TrainedRun, name: str) -> RowSums:
        """Of a student whose tokens are others."""
        self.other_tokens = True
        self._free()
        with self._named_failures(name):
            return self._in_own.of_run(run, self._progress(name))

    def _measured(self, evaluation: Evaluation, model: PreTrainedModel | PeftModel, name: str) -> RowSums:
        with self._named_failures(name):
            return evaluation.measure(model, self._progress(name))

    @contextmanager
    def _named_failures(self, name: str) -> Iterator[None]:
        try:
            with readable_evaluation(self.args):
                yield
        except NonFiniteError as error:
            raise NonFiniteError(f"{name}: {error}", error.facts) from error

    def _progress(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self._reporter.rows(name, done, total) if is_main() else None

    def _load(self, run: TrainedRun) -> PreTrainedModel | PeftModel:
        """A run's student. The one before it is gone by then: one is in memory at a time."""
        self._free()
        if self._in_own.differs(run):
            raise PreflightError(
                f"{run.name} has another tokenizer than {self.config.model.model}, which it was before training as its "
                "config says. Name the right one: model.model=…"
            )
        model = load_trained(run, self.args.device)
        if vocabulary_size(model) < self._shared:
            raise PreflightError(f"{run.name} predicts {vocabulary_size(model)} tokens, fewer than {self._shared}.")
        return model

    @staticmethod
    def _free() -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _evaluation(self, rows: datasets.Dataset, teacher: Teacher | None, blank: bool = False) -> Evaluation:
        return Evaluation(
            rows,
            replace(self._collate, blank_images=True) if blank else self._collate,
            teacher=teacher,
            columns=self._shared,
            batch_size=self.args.per_device_eval_batch_size,
            accelerator=self.accelerator,
        )

    def _collator(self, side: TeacherSide) -> Collator:
        return Collator(
            self.processing,
            side.processing,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            row_keys=side.teacher is not None and not side.teacher.answers_anything,
            teachers=bool(self.config.routes),
        )

    def _answered(self, rows: datasets.Dataset, side: TeacherSide, collator: Collator) -> datasets.Dataset:
        """Rows with what the teacher writes; the run folder keeps it."""
        assert self._before is not None
        return answered(self.config, self.args, rows, self._before, side, collator, self._reporter)

    def _of_prompts(self, side: TeacherSide, collator: Collator) -> Evaluation | None:
        """The teacher's own answers where it reads something that the student does not, and can write."""
        assert side.teacher is not None
        prompts = prompts_of(self.rows, images=side.teacher.module is not None)
        if prompts is None:
            return None
        if not side.teacher.can_generate:
            logger.warning("How much is internalised is not known: this teacher cannot write answers to compare on.")
            return None
        return self._evaluation(self._answered(prompts, side, collator), side.teacher)

    def _to_ask(self, shown: Mapping[str, str]) -> Asked | None:
        """The rows that all models answer; None without any."""
        asked = Asked(
            self.config,
            self.rows,
            shown,
            self._collate,
            vocabulary=self._shared,
            batch_size=self.args.per_device_eval_batch_size,
            device=self.accelerator.device,
            rank=(self.accelerator.process_index, self.accelerator.num_processes),
            progress=lambda name, done, total: self._reporter.rows(f"{name}, {_ANSWERING}", done, total),
        )
        if not len(asked):
            return None
        try:
            assert self._before is not None
            asked.check(self._before)
        except (DataError, NotAvailableError) as error:
            if is_main():
                logger.warning("No model is asked to answer, so that there are no samples and no accuracy: %s", error)
            return None
        return asked

    def _ask_teacher(self, asked: Asked, side: TeacherSide, collator: Collator) -> None:
        teacher = side.teacher
        assert teacher is not None
        if teacher.module is not None:
            with readable_evaluation(self.args), teacher.writing_model() as model:
                asked.ask("teacher", model, of_teacher=True)
        elif teacher.can_generate:
            self._ask_by_request(asked, side, collator)

    def _ask_by_request(self, asked: Asked, side: TeacherSide, collator: Collator) -> None:
        prompts = asked.prompts
        if "images" in prompts.column_names:  # it is asked by token ids, which have no images in them
            prompts = prompts.select([i for i, images in enumerate(prompts["images"][:]) if not images])
        try:
            asked.take("teacher", self._answered(prompts, side, collator) if len(prompts) else prompts)
        except TeacherError as error:
            logger.warning("The teacher's own answers are not among the samples: %s", error)

    def _samples(self, asked: Asked, after: PreTrainedModel | PeftModel) -> list[Sample]:
        """With tokens as the student after training and the teacher see them."""
        teacher = self._teacher
        reference = self._evaluation(asked.references(), teacher).tokens(after)
        beside = teacher if teacher is not None and teacher.answers_anything else None
        return asked.samples(reference, self._evaluation(asked.answered_by("after"), beside).tokens(after))
