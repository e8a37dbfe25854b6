"""GKDTrainerWithMetrics: where the student, the teacher and the terms of the loss meet.

D: supervised tokens of the whole optimizer window, over all micro-batches and ranks.

What is overridden, and why:

| upstream method | why |
|---|---|
| `GKDTrainer.__init__` | needs a teacher, refuses padded vocabularies, leaves the teacher trainable |
| `Trainer.train` | metrics that an earlier call left unlogged are dropped |
| `Trainer._get_train_sampler`, `_get_dataloader` | an order of its own; evaluation drops none |
| `Trainer._inner_training_loop`, `_init_training_state`, `_run_epoch` | upstream skips batches, of today's size |
| `Trainer.set_initial_training_values` | and takes as many steps: see `row_progress.py` |
| `Trainer._load_rng_state` | processes that were not there have no states |
| `Trainer._prepare_inputs` | upstream moves mappings only to the device |
| `Trainer.get_batch_samples` | has a whole window before its first forward: generate there, then count D |
| `GKDTrainer.training_step` | draws on-policy per rank; here the window is drawn, and its forwards may be others |
| `GKDTrainer.compute_loss` | the loss itself: upstream's is 1/world_size, ignores temperature and has no CE |
| `SFTTrainer.log` | metrics reduced across ranks |
| `Trainer._get_grad_norm` | a gradient or loss that is not finite raises here, before the step (`guard.py`) |
| `Trainer.create_optimizer`, `_clip_grad_norm` | projectors of features belong to the run, not to the student |
| `SFTTrainer.prediction_step`, `Trainer.evaluation_loop` | a mean over tokens, not of batch means; no row twice |
| `Trainer.save_model` | weights that are not finite are not saved |
| `SFTTrainer._save_checkpoint` | the time it takes is left out of tokens per second; what a run does around it |
| `Trainer._push_from_checkpoint` | once the checkpoint is complete; a hub that is down does not end a run |
| `Trainer._save_optimizer_and_scheduler`, `_save_scaler` | an error of one rank is raised on all, see `saving.py` |
| `Trainer._save_rng_state`, `_prepare_for_training` | metrics since the last log, and a teacher's state, are kept |
| `Trainer._save`, `_load_from_checkpoint`, `_load_best_model` | the projectors' file; and no pickle of the arguments |
| `Trainer._load_optimizer_and_scheduler` | a file that does not fit is an error with a way out |
| `Trainer._issue_warnings_after_load` | upstream only warns of weights that were not loaded |
| `_BaseTrainer.create_model_card` | no card that says that a student from a folder derives from None |
| `_BaseTrainer._send_telemetry` | nothing is sent anywhere |
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdtrain.config.options import DistillationOptions, TrainingOptions
from kdtrain.data.aligned_batch import Aligner
from kdtrain.data.batch import Batch, received
from kdtrain.data.collate import Collator
from kdtrain.data.epochs import Epochs
from kdtrain.data.errors import said
from kdtrain.data.stand_in import as_run
from kdtrain.disk import as_other_files, failure_of
from kdtrain.errors import CheckpointError
from kdtrain.feature_kd.hidden import HiddenTerm
from kdtrain.feature_kd.projected import FeatureTerm
from kdtrain.feature_kd.term import VisualTerm
from kdtrain.generation.sampler import Sampler
from kdtrain.generation.sampling import stable_seed
from kdtrain.losses.reduce import IGNORE_INDEX, world_scale
from kdtrain.models.load_report import load_weights
from kdtrain.models.loss_head import why_wrapped_head_differs
from kdtrain.models.probe import own_random_state
from kdtrain.models.quantization import refuse_fsdp
from kdtrain.models.text_only import keep_a_path, trained_by_images_alone
from kdtrain.models.vocabulary import Vocabulary
from kdtrain.preflight.other_tokenizer import RowsAlignment
from kdtrain.preflight.packing import check_wrapped
from kdtrain.preflight.positions import refuse_width
from kdtrain.ranks import is_main
from kdtrain.teachers import RoutedTeacher, Teacher, teacher_autocast
from kdtrain.teachers.base import AnyTargets, targets_of
from kdtrain.teachers.other_tokenizer import chunk_targets
from kdtrain.trainer import argument_checks as checks
from kdtrain.trainer import construction, metrics
from kdtrain.trainer.best_step import BestStep, metric_name
from kdtrain.trainer.changed_options import check_can_change
from kdtrain.trainer.completions import CompletionsLog
from kdtrain.trainer.forwards import Forwards, LayoutOptions, as_micro_batches, unsynchronised
from kdtrain.trainer.given_rows import check_raw_rows, check_stream, placeholder, rows_weigh
from kdtrain.trainer.guard import NonFiniteGuard, targets_named
from kdtrain.trainer.live_option import LiveOption
from kdtrain.trainer.objective import warn_of_logits
from kdtrain.trainer.read_ahead import ReadAhead
from kdtrain.trainer.resume_checks import check_can_be_loaded
from kdtrain.trainer.row_progress import RowProgress
from kdtrain.trainer.samples import SampleWatch
from kdtrain.trainer.saving import Saving
from kdtrain.trainer.schedule import go_on, group_options, rates_of_beginning, set_group_options
from kdtrain.trainer.stand_ins import StandIns
from kdtrain.trainer.startup_checks import check_startup, readable_beginning
from kdtrain.trainer.teacher_failures import raised_on_all_ranks
from kdtrain.trainer.teacher_steps import TellTeacher
from kdtrain.trainer.term_gradients import note_at_evaluation
from kdtrain.trainer.throughput import model_flops
from kdtrain.trainer.trackers import Trackers
from kdtrain.trainer.unlogged import RestoreUnlogged, save_unlogged
from kdtrain.trainer.watch import WatchGradients, WatchRounding
from kdtrain.trainer.window import Window, collect, num_supervised, options_of_window

logger = logging.getLogger(__name__)

_SUMMARY_NAMES = {"train_loss": "mean_loss"}  # "loss" is the name of a step's
_NOTHING_SUPERVISED = (
    "Nothing was supervised since the last record (step %d): rows without an answer, or with an answer that max_length "
    "(%s) cuts off, teach nothing."
)


class GKDTrainerWithMetrics(GKDTrainer):
    """Generalised knowledge distillation with cross-entropy, visual-feature KD and metrics that can be trusted.

    The constructor is GKDTrainer's, with two more keywords. The options that GKDConfig has no field for are read from
    `args` as attributes, by the names of `kdtrain.config.options.DistillationOptions`. A callback may set `beta`,
    `kd_temperature`, `llm_kd_weight`, `sft_alpha`, `lmbda`, `temperature`, `max_new_tokens` and `seq_kd` of the
    trainer, on all ranks alike: the next window uses them, and evaluation at once. They are not part of a checkpoint:
    a resumed run begins with those of `args`.

    Args:
        model: the student, or its name; a PeftModel or the folder of an adapter is trained on.
        teacher_model: the teacher, or its name; with an adapter, or an adapter's folder. None where no KD is active,
            and where `args.teacher_model_name_or_path` names it.
        args: fields that the trainer does not honour are refused (see `refused_fields.py`).
        train_dataset: a `datasets.Dataset`, a list of rows, or a torch data set with a length; eval_dataset as well, or
            a dict of them. An IterableDataset needs `args.max_steps`, and to give the same rows on every process, each
            of which takes its own; see `kdtrain.data.stream.handed_over`.
        processing_class: None is what is saved with the model.
        data_collator: None is `kdtrain.data.Collator`, which cuts rows at `args.max_length`; rows hold `input_ids` and
            `labels`, or are still `messages`, `prompt` and `completion`, or `text`. A batch is `input_ids` [B, T],
            `attention_mask` [B, T], `labels` [B, T] and whatever else the model's forward takes (see `data/batch.py`);
            optionally `prompt_lengths` [B] (needed to generate), `ce_rows` [B] bool (rows that contribute
            cross-entropy; all where absent), `kd_weights` [B] or [B, T] (what the divergence of rows or tokens counts).
        teacher: a `kdtrain.teachers.Teacher` instead of `teacher_model`.
        shared_vocab_size: leading logit columns that both models share, where the caller has compared the tokenizers;
            None finds out. Of several teachers a number for each name.

    Raises:
        ValueError: KD is active without a teacher, an option is out of range, vocabularies differ, or an argument is of
            a wrong kind (`ConfigError`, `PreflightError`).
    """

    _tag_names = ("trl", "gkd", "kdtrain")
    # compute_loss divides by the whole window's tokens: Trainer must not divide by the accumulation steps again.
    loss_is_scaled_for_ga = True

    beta, kd_temperature, llm_kd_weight, sft_alpha = LiveOption(), LiveOption(), LiveOption(), LiveOption()
    lmbda, temperature, seq_kd, max_new_tokens = LiveOption(), LiveOption(), LiveOption(), LiveOption()

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: GKDConfig | None = None,
        data_collator: Callable[[list[Any]], Batch | Mapping[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | list[dict[str, Any]] | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | list[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        *,
        teacher: Teacher | None = None,
        shared_vocab_size: int | Mapping[str, int] | None = None,
    ) -> None:
        checks.check_arguments(args, model, teacher_model, teacher, processing_class, callbacks)
        assert args is not None
        assert model is not None
        self.options, training_options = DistillationOptions.from_args(args), TrainingOptions.from_args(args)
        self.loss_terms = metrics.loss_terms(self.options)
        self.layout = LayoutOptions.from_args(args, training_options.per_device_train_tokens)
        """How rows lie in forwards, and which of them share one."""
        self._window: Window | None = None  # the one that is being trained
        self.saving = Saving(self)
        self.changed_options: Collection[str] = ()  # fields of GKDConfig that a resumed run changes on purpose
        given = construction.prepare(
            args,
            self.options,
            model=model,
            teacher_model=teacher_model,
            teacher=teacher,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            has_collator=data_collator is not None,
            formatting_func=formatting_func,
        )
        # SFTTrainer's constructor, past GKDTrainer's: see the table above.
        with construction.around_upstream(args, given.student):
            super(GKDTrainer, self).__init__(
                given.student,
                args=args,
                data_collator=data_collator or Collator(given.processing_class),
                train_dataset=placeholder(given.train),
                eval_dataset=placeholder(given.evaluation),
                processing_class=given.processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                peft_config=given.peft_config,
            )
        self.trackers = Trackers(self)
        checks.check_parallelism(self.accelerator)
        refuse_fsdp(self.model, self.accelerator)
        self.train_dataset, self.eval_dataset = given.train, given.evaluation
        self._rows_weigh = None if given.train is None else rows_weigh(given.train)
        if self._rows_weigh and not self.options.lm_kd_active and is_main():
            logger.warning("Rows have kd_weight, which has no effect without a divergence (llm_kd_weight is 0).")
        construction.set_pad_token(self._tokenizer, args)
        if data_collator is None:  # not before: upstream may have changed the template or the special tokens
            self.data_collator = construction.default_collator(
                self.processing_class, args, formatting_func, given.teacher
            )
            check_raw_rows(self.data_collator, "train_dataset", self.train_dataset)
            check_raw_rows(self.data_collator, "eval_dataset", self.eval_dataset)
        construction.finish_student(self)
        self.teacher = given.teacher
        if self.teacher is not None:
            self.teacher.follow(self.model)
        self.teacher_model: nn.Module | None = None if self.teacher is None else self.teacher.module
        self.vocabulary: Vocabulary | None = None
        self.vocabularies: dict[str, Vocabulary] = {}  # by the teachers' names; of a single one under none
        checks.check_options(self, self.options)
        if self.teacher is not None:
            self.vocabularies = construction.compared_vocabularies(self, self.teacher, shared_vocab_size)
            self.vocabulary = construction.shared_by_all(list(self.vocabularies.values()))
            self.teacher.place(self.accelerator)
            self.teacher_model = self.teacher.module  # DeepSpeed's engine, or FSDP's module
            checks.check_several_teachers(self)
        self.sampler: Sampler | None = construction.build_sampler(self)
        self.receiver = construction.build_receiver(self, train_dataset, eval_dataset)
        self._positions = construction.check_both_models(self)
        self._objective = construction.build_objective(self)
        # Under ZeRO-3 the model has to be wrapped for the comparison.
        self._head_unchecked = self._objective.fused and is_deepspeed_zero3_enabled()
        self._packing_unchecked = self.layout.in_lines and is_deepspeed_zero3_enabled()
        self.by_images_alone = trained_by_images_alone(self.model)
        if self.by_images_alone:
            keep_a_path(self.model)
        for term in self.feature_terms if self.is_sharded else ():
            term.put_into(self.model)
        self.stand_ins = StandIns(self)
        self.read_ahead = ReadAhead(self)
        self.samples = SampleWatch(self)
        self.stopwatch, self.clock = metrics.Stopwatch(), metrics.RunClock()
        self.flops = model_flops(self)
        """What the models' work is counted by; None where the device's peak is not known."""
        self.best_step = BestStep(training_options.early_stopping_patience)
        if self.best_step.patience is not None and args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = "loss", False
        self.completions = CompletionsLog(self, training_options.log_completions_steps)
        self.before_saving: Callable[[], None] = lambda: None
        """Called before weights or a checkpoint are written, on every rank; may refuse by an error."""
        self._guard = NonFiniteGuard(self)
        self._guard.flags |= {f"units of term {i}": term.window_units for i, term in enumerate(self.feature_terms)}
        self.rows = RowProgress(self)
        self._random_from: str | None = None  # the checkpoint whose random numbers the next window begins with
        self.begun = False  # whether the first batch was read
        self.startup_checked = self.alignment_checked = False
        self.alignment_of_rows: RowsAlignment | None = None
        """Of the first rows, where the teacher has another tokenizer; see `first_look.py`."""
        self.first_gradients: dict[str, float] = {}
        """The gradient norms of the loss's terms before training, see `term_gradients.py`; in its first record."""
        self.summed_from = 0  # the step that upstream's sum of losses begins at
        self.warned_of_no_samples = self._warned_of_push = False
        self._unlogged = RestoreUnlogged(self)
        watching = (TellTeacher(self), WatchGradients(self), WatchRounding(self))
        for callback in (self._unlogged, self.best_step, *watching):
            self.add_callback(callback)
        self.callback_handler.callbacks.insert(0, self.rows)  # the others shall see its epoch
        self._loading_from: str | None = None

    # ---- what it is made of ------------------------------------------------------------------------------------------

    @property
    def visual(self) -> VisualTerm | None:
        """The term of visual KD, where there is one."""
        return self._objective.visual

    @property
    def hidden(self) -> HiddenTerm | None:
        """The term of hidden-state KD, where there is one."""
        return self._objective.hidden

    @property
    def feature_terms(self) -> list[FeatureTerm]:
        """Those of visual KD and of hidden-state KD, where there are any."""
        return self._objective.feature_terms

    @property
    def other_tokenizer(self) -> Aligner | None:
        """What reads rows as a teacher with another tokenizer does, where there is one."""
        found: Aligner | None = getattr(self.data_collator, "other_tokenizer", None)
        return found

    @property
    def has_aux_loss(self) -> bool:
        """Whether experts' load-balancing loss is a term."""
        return bool(self._objective.router_logits)

    @property
    def rows_may_weigh(self) -> bool:
        """Whether rows may have weights in the divergence; the same on all ranks."""
        return self._rows_weigh is not False or not isinstance(self.data_collator, Collator)

    @property
    def window_has_images(self) -> bool:
        """Whether a row of the window that is being trained has an image that is new."""
        return self._window is not None and self._window.has_new_images

    @property
    def agreements(self) -> dict[str, Callable[[], torch.Tensor | float]]:
        """What the ranks agree on before every step of the optimizer, by name; see `NonFiniteGuard.flags`."""
        return self._guard.flags

    @property
    def agreed(self) -> dict[str, float]:
        """The largest of each on any rank, as of the last step."""
        return self._guard.agreed

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As upstream, after the checks that need everything built; metrics of an earlier call are dropped."""
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, bool):
            check_can_be_loaded(self, Path(resume_from_checkpoint))
        self._metrics["train"].clear()
        self._unlogged.checkpoint = None
        self.begun = False
        self._window = None
        self.read_ahead.forget()
        self.receiver.start_counting()
        self.completions.begin()
        self.samples.begin()
        with readable_beginning(self):
            if not self.startup_checked:
                check_startup(self)
            self.startup_checked = False  # options may change before another call
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self.receiver.warn_of_truncated()
        return output

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As upstream, which sets all sums to 0 after this: `RestoreUnlogged` reads them back from the checkpoint."""
        self._unlogged.checkpoint = resume_from_checkpoint
        self.summed_from = self.state.global_step
        self.state.compute_steps(self.args, max_steps)  # upstream takes those of a checkpoint for this run's
        # Upstream makes the schedule of these steps, and nothing else.
        prepared = super()._prepare_for_training(self.rows.schedule_steps, train_dataloader, resume_from_checkpoint)
        if self.teacher is not None:  # not before: the student's weights are wrapped and loaded now
            if resume_from_checkpoint is None:
                self.teacher.begin()
            else:
                self.teacher.load(Path(resume_from_checkpoint))
        return prepared

    # ---- rows --------------------------------------------------------------------------------------------------------

    def read_epochs(self, epochs: Epochs) -> None:
        """Read other rows of the training data in every epoch."""
        self.rows.epochs = epochs

    def rows_per_epoch(self) -> int:
        """Rows of the training data that an epoch reads."""
        return len(self.rows.order)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.rows.new_sampler()

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self.rows.begin(resume_from_checkpoint)
        self._random_from = None
        return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; of a run that goes on, the step and epoch that it ends with from where it stands."""
        return self.rows.training_values(super().set_initial_training_values(*args, **kwargs))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As upstream; the first epoch is that of the next row, and no batches are skipped."""
        epoch, batches = super()._init_training_state(*args, **kwargs)
        return (epoch, batches) if self.rows.first_epoch is None else (self.rows.first_epoch, 0)

    def _run_epoch(self, **kwargs: Any) -> None:
        """As upstream, from where the run goes on."""
        kwargs |= self.rows.begin_epoch(kwargs["epoch"], kwargs["train_dataloader"])
        if self.rows.begins_within_an_epoch:  # upstream would restore random numbers before the loader draws its own
            self._random_from, kwargs["resume_from_checkpoint"] = kwargs["resume_from_checkpoint"], None
        super()._run_epoch(**kwargs)

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Upstream's, but evaluation never leaves out rows."""
        check_stream(dataset, self.data_collator, self.accelerator)
        wanted = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = wanted and is_training
        if self.accelerator.num_processes == 1:
            # accelerate would split the batches of a stream to send them to other processes, of which there are none.
            self.accelerator.dataloader_config.dispatch_batches = False
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = wanted

    # ---- the optimizer window ----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[Sequence[Batch | Forwards], torch.Tensor | None]:
        """Collect one window, replace its answers where it is generated, and count D on what will be trained on."""
        self.stopwatch.start()
        self.begun = True
        self._guard.begin()
        options = options_of_window(self)
        read = self.read_ahead.take(epoch_iterator, num_batches)
        self.rows.note_window(read)
        batches, self._window = collect(self, read, options, device)
        num_items = None
        if batches:
            counts = num_supervised(batches, options.selection, self.accelerator, device)
            num_items, kd_items = (n // self.get_tp_size() for n in counts)
            self._window = replace(self._window, num_kd_items=kd_items if self._window.weighs_tokens else None)
        if self.teacher is not None and options.needs_teacher:
            self.read_ahead.prepare(batches, options)
            if self.teacher.waits:
                with raised_on_all_ranks(self.accelerator), self.count_waiting():
                    self.teacher.wait([batch for batch in batches if batch.targets is None])
        self.completions.note(batches, options)
        given = as_micro_batches(batches, self.read_ahead.micro_batches) if self.layout.changes else batches
        for name, value in (("windows", 1.0), ("on_policy_windows", float(self._window.on_policy))):
            self._metrics["train"][name].append(torch.tensor(value))
        if self._random_from is not None:
            self._load_rng_state(self._random_from)
            self._random_from = None
        return given, num_items

    def _prepare_inputs(self, inputs: Batch | Mapping[str, Any]) -> Batch:
        """As upstream: onto the device, and under DeepSpeed into its dtype; but for weights of the loss."""
        batch = inputs if isinstance(inputs, Batch) else received(inputs, None)
        prepared, device = batch.map_tensors(self._prepare_input), self.args.device
        of_rows, of_tokens = batch.rows.kd_weights, batch.kd_token_weights
        if prepared is batch or (of_rows is None and of_tokens is None):
            return prepared
        return replace(
            prepared,
            kd_token_weights=None if of_tokens is None else of_tokens.to(device),
            rows=replace(prepared.rows, kd_weights=None if of_rows is None else of_rows.to(device)),
        )

    def training_step(
        self, model: nn.Module, inputs: Batch | Forwards, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch. The window was drawn and generated in `get_batch_samples`."""
        if self.is_deepspeed_enabled:
            self._guard.watch_steps(model)
        loss, batches = torch.zeros((), device=self.args.device), [inputs]
        if isinstance(inputs, Forwards):
            batches = list(inputs.batches)
        for i, batch in enumerate(batches):
            adds = self.accelerator.sync_gradients and i + 1 < len(batches)
            with unsynchronised(self, model) if adds else contextlib.nullcontext():
                loss = loss + super(GKDTrainer, self).training_step(model, batch, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss
        if self._window is not None:
            self._window = replace(self._window, options=None)
        for term in self.feature_terms:
            term.synchronise()
        if not self.window_has_images and self.accelerator.scaler is None:
            if self.by_images_alone:
                # To None: with gradients of 0, weight decay and momentum would still change the weights.
                self.model.zero_grad()
            elif self.stand_ins.may_be_needed:
                self.stand_ins.forget_zeros()
        return loss

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch | Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """total = llm_kd_weight · jsd + c · ce + Σ visual + Σ hidden, for one micro-batch.

        Args:
            num_items_in_batch: D, and the loss is the batch's share of the window's, times the world size; None
                (evaluation, a call of its own) is the batch's own supervised tokens.
            return_outputs: also the student's, of a forward of their own.
        """
        self.student_takes_loss_head(model)  # where it is not known yet, before it is asked for
        self._check_packing(model)
        training = self.model.training
        batch = self.receiver.accept(inputs)
        refuse_width(self._positions, batch)
        options = self._options_of(training)
        with targets_named(self, batch):
            terms = self._objective(
                model,
                batch,
                options,
                self._run_teacher_forward,
                num_items_in_batch,
                1.0 if self._window is None else self._window.aux_share,
                self._window.num_kd_items if training and self._window is not None else None,
            )
        by_kind = options.lm_kd_active and max(options.lmbda, self.args.lmbda) > 0
        metrics.record(self._metrics["train" if training else "eval"], terms, batch, by_kind=by_kind)
        if training and self.flops is not None:
            self._metrics["train"][metrics.MODEL_FLOPS].append(self.flops.of(batch, options.needs_teacher))
        self._guard.note(batch, terms)
        if training and self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._guard.check_losses()  # it takes the optimizer step within backward: this is the last place before it
        loss = terms.total * world_scale(num_items_in_batch, self.accelerator.num_processes // self.get_tp_size())
        if return_outputs:  # for compute_metrics: the loss itself makes no logits
            with torch.no_grad():
                return loss, model(**as_run(batch).model_inputs, use_cache=False)
        return loss

    def _options_of(self, training: bool, at_all_tokens: bool = True) -> DistillationOptions:
        """Those of the window; evaluation uses what is set now, no teacher where `eval_kd` is off, and all tokens."""
        if training and self._window is not None and self._window.options is not None:
            return self._window.options
        options = self.options.checked()
        if training:
            return options
        if at_all_tokens:
            options = options.at_all_tokens()
        return options if options.eval_kd else options.without_kd()

    def _run_teacher_forward(self, batch: Batch) -> AnyTargets:
        """The teacher's targets for the supervised tokens; also fires the hooks on its features."""
        assert self.teacher is not None, "the loss asks for a teacher that was never built"
        if self.teacher.module is not None:  # one that looks its answers up needs the rows as they are
            batch = as_run(batch)
        wants_features = self.visual is not None and (batch.has_images or self.asks_teacher_together)
        wants_features = wants_features or self.hidden is not None
        if batch.targets is not None and not wants_features:
            known: AnyTargets = batch.targets
            return known
        counted = self.count_waiting() if self.model.training else contextlib.nullcontext()
        with teacher_autocast(self.accelerator), counted:
            if not self.options.crosses_tokenizers:
                return self.teacher.targets(batch)
            return chunk_targets(targets_of(self.teacher, batch), batch, self.options.cross_tokenizer)

    @contextlib.contextmanager
    def count_waiting(self) -> Iterator[None]:
        """The time that training waits for the teacher, into the metrics."""
        assert self.teacher is not None
        before = self.teacher.waited_s
        yield
        if self.teacher.waits:
            waited = torch.tensor(self.teacher.waited_s - before, dtype=torch.float64)
            self._metrics["train"]["teacher_wait_s"].append(waited)

    def student_takes_loss_head(self, model: nn.Module) -> bool:
        """Whether its forward takes a `loss_head`.

        Under ZeRO-3 that is compared now, the first time; a collective then. See `why_no_loss_head`.
        """
        if self._head_unchecked:
            reason = why_wrapped_head_differs(model)
            self._head_unchecked = False
            if reason is not None:
                warn_of_logits(reason)
                self._objective = replace(self._objective, fused=False)
        return self._objective.fused

    def _check_packing(self, model: nn.Module) -> None:
        """Of models that ZeRO-3 has in pieces, the first time; a collective then. See `preflight/packing.py`."""
        if not self._packing_unchecked:
            return
        self._packing_unchecked = False
        check_wrapped(model, "student", self.args.device)
        for teacher in () if self.teacher is None else self.teacher.members:
            if teacher.module is not None and not teacher.is_student:
                check_wrapped(teacher.module, "teacher", self.args.device)

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def _reduced(self, mode: Literal["train", "eval"]) -> metrics.Reduced:
        """The metrics so far over all ranks; a collective."""
        return metrics.reduce_metrics(
            self._metrics[mode],
            self.accelerator,
            token_weighted=mode == "eval",
            terms=self.loss_terms,
            teachers=list(self.vocabularies) if isinstance(self.teacher, RoutedTeacher) else (),
        )

    def window_metrics(self) -> dict[str, float]:
        """The metrics since the last record, `loss` as the sum of its terms; a collective."""
        reduced = self._reduced("train")
        found = metrics.training_metrics(reduced, 0.0)
        return {"loss": sum(found.get(name, 0.0) for name in metrics.TOTAL_TERMS), **found}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the reduced training metrics to a training record, and hand it to the callbacks and trackers."""
        if "loss" in logs:
            reduced = self._reduced("train")
            logs |= metrics.training_metrics(
                reduced, self.stopwatch.lap(), None if self.flops is None else self.flops.peak
            )
            logs |= self.clock.times(self.state.global_step, self.state.max_steps)
            if not any("loss" in record for record in self.state.log_history):
                logs |= self.first_gradients
            self._metrics["train"].clear()
            if not reduced.sums["num_tokens"] and not reduced.sums["written_samples"] and is_main():
                logger.warning(_NOTHING_SUPERVISED, self.state.global_step, self.args.max_length)
        elif "train_runtime" in logs:
            # The mean of the whole run, of which upstream has counted the steps since a resume.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self.summed_from, 1)
            # The summary at the end: trackers put "train/" before every key, and once is enough.
            logs = {_SUMMARY_NAMES.get(key, key.removeprefix("train_")): value for key, value in logs.items()}
        elif self.best_step.patience is not None and (name := metric_name(self.args)) in logs:
            logs[f"eval_{metrics.EARLY_STOP_METRIC}"] = logs[name]
        Trainer.log(self, logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm, or an error: neither a NaN gradient nor the weights after a NaN loss are worth having."""
        if grad_norm is None and self._projectors():
            grad_norm = self._clip_with_projectors(model, math.inf)
        norm = super()._get_grad_norm(model, grad_norm)
        self._guard.check_step(model, norm)
        for i, term in enumerate(self.feature_terms):
            if not self._guard.agreed[f"units of term {i}"]:
                term.projectors.zero_grad()
        return norm

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._projectors():
            return self._clip_with_projectors(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _clip_with_projectors(self, model: nn.Module, largest: float) -> Any:
        """One norm over the student and the projectors: they share the loss, and so the clipping."""
        return self.accelerator.clip_grad_norm_([*model.parameters(), *self._projectors()], largest)

    def _projectors(self) -> list[nn.Parameter]:
        """Those that are not in the model."""
        return [p for term in self.feature_terms if not term.in_model for p in term.parameters()]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The student's optimizer, with parameter groups of their own for the projectors of features."""
        optimizer = super().create_optimizer(model)
        for term in self.feature_terms:
            term.add_to(optimizer, self.args.weight_decay)
        return optimizer

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch | Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One evaluation batch; logits only where `compute_metrics` asks for them."""
        dataset = self.callback_handler.eval_dataloader.dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else 0  # of a stream it is not known which are repeated
        given = self._prepare_inputs(inputs)
        self._metrics["eval"]["rows"].append(torch.tensor(len(given)))
        batch = self.receiver.receive(given, rows, train=False)
        (batch,) = self.stand_ins.give([batch], train=False)
        if self.teacher is not None and self._options_of(training=False).needs_teacher:
            self.teacher.prepare([batch])
        with torch.no_grad(), self.compute_loss_context_manager():
            batch = note_at_evaluation(self, model, batch)
            self._guard.begin()
            loss = self.compute_loss(model, batch, return_outputs=not prediction_loss_only)
            self._guard.check_evaluation()  # at once: what comes of it would be NaN
            if prediction_loss_only:
                return loss, None, None
            loss, outputs = loss
        # As many rows on every rank, for upstream to gather; it leaves out those that were repeated.
        kept, labels = len(batch), as_run(batch).labels
        return loss, _filled_up(outputs.logits[:kept], len(given)), _filled_up(labels[:kept], len(given))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Upstream's loop, with means over the tokens of the whole set in place of its mean of batch means."""
        self._metrics["eval"].clear()
        self.begun = True
        # A data loader draws a seed as it begins: dropout of the next steps must not depend on it.
        with self.stopwatch.pause(), own_random_state(self.args.device):
            output = super().evaluation_loop(*args, **kwargs)
            reduced = self._reduced("eval")
        norms = {name: float(v[0]) for name in metrics.GRADIENT_NORMS if (v := self._metrics["eval"][name])}
        [norms] = broadcast_object_list([norms])  # rank 0's batch: every rank has the same log
        if not output.num_samples:  # of a stream upstream counts the rows of batches that are mappings only
            output = output._replace(num_samples=int(sum(self._metrics["eval"]["rows"])))
        self._metrics["eval"].clear()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}": v for k, v in metrics.evaluation_metrics(reduced).items()})
        output.metrics.update(norms)  # without the prefix: one curve with those of the beginning
        return output

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As upstream, if all trained weights are finite: the last step is not followed by one that would notice."""
        self.before_saving()
        # Whole models are the same on every rank, and a caller may save on one rank alone.
        self._guard.check_weights(together=_internal_call or self.is_sharded)
        if _internal_call and output_dir is not None:
            self.saving.begin(output_dir)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.stopwatch.pause():
            self.saving.checkpoint(functools.partial(super()._save_checkpoint, *args, **kwargs))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.saving.part(super()._save_optimizer_and_scheduler, output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        self.saving.part(super()._save_scaler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self.saving.part(super()._save_rng_state, output_dir)
        if self.teacher is not None:
            self.saving.part(self.teacher.save, Path(output_dir))
        self.saving.part(save_unlogged, self, output_dir)
        if self.args.should_save:
            self.saving.part(self.rows.save, output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json comes next: with it a checkpoint is complete

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As upstream, but behind the manifest, and that a hub which cannot be reached does not end the run."""
        upstream = super()._push_from_checkpoint

        def push() -> None:
            try:
                upstream(checkpoint_folder)
            except Exception as error:  # of the network, and of the hub, which have many
                if failure_of(error):
                    raise
                if not self._warned_of_push:
                    logger.warning("A checkpoint could not be pushed to the hub (%s). Training goes on.", said(error))
                self._warned_of_push = True

        self.saving.push_when_complete(push)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As upstream; other processes than those that wrote it begin with numbers of seed, step and rank."""
        if checkpoint is None or self.rows.earlier_processes is None:
            super()._load_rng_state(checkpoint)
        else:
            set_seed(stable_seed(f"{self.args.seed}:{self.state.global_step}:{self.args.process_index}") % 2**32)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.saving.part(self._save_student, output_dir, state_dict)

    def _save_student(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """Weights, config and tokenizer; never the pickled arguments, which nothing reads back."""
        taken_out = [
            term.taken_out(state_dict) if term.in_model and state_dict is not None else None
            for term in self.feature_terms
        ]
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            for term, projectors in zip(self.feature_terms, taken_out, strict=True):
                term.save(output_dir or self.args.output_dir, projectors)
            as_other_files(Path(output_dir or self.args.output_dir))
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(output_dir or self.args.output_dir, TRAINING_ARGS_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        check_can_change(self, self.changed_options)
        rates, options = rates_of_beginning(self), group_options(self)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"Optimizer and scheduler of {checkpoint} cannot be loaded: {reason} Resume with the options that the "
                "run began with, or from another checkpoint."
            ) from error
        set_group_options(self, options)
        go_on(self, rates, self.rows.schedule_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loading_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for term in self.feature_terms:
            term.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.saving.check_model(self.state.best_model_checkpoint)
        self._loading_from = self.state.best_model_checkpoint
        super()._load_best_model()
        for term in self.feature_terms:
            term.load(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load weights whose names differ from the model's; upstream warns, and goes on with those it began with.

        transformers saves vision-language models under the names of their first release, and loads by those of today.
        """
        if load_result.missing_keys or load_result.unexpected_keys:
            assert self._loading_from is not None
            load_weights(self.model, self._loading_from)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Only for a student with a name on the hub."""
        if not os.path.isdir(getattr(self.unwrap(self.model).config, "_name_or_path", None) or "."):
            self.saving.part(functools.partial(super().create_model_card, *args, **kwargs))

    def _send_telemetry(self) -> None:
        """TRL would report trainer and model type to the hub."""

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def unwrap(self, model: nn.Module | None) -> Any:
        """A model without what trains it in parallel."""
        # accelerate looks at all modules and installed packages first: half a millisecond of every window.
        bare = model is None or isinstance(model, PreTrainedModel | PeftModel)
        return model if bare else self.accelerator.unwrap_model(model)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed keeps the models in pieces."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def asks_teacher_together(self) -> bool:
        """Whether all ranks have to ask the teacher equally often, which is in pieces on them."""
        return self.teacher is not None and self.teacher.in_pieces


def _filled_up(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` with rows of -100 behind them, `count` in all."""
    return torch.cat([rows, rows.new_full((count - len(rows), *rows.shape[1:]), IGNORE_INDEX)])
