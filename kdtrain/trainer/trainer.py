"""GKDTrainerWithMetrics: where the student, the teacher and the terms of the loss meet.

Shapes: B rows, T positions, N supervised tokens, V vocabulary, D supervised tokens of the whole optimizer window.

What is overridden, and why:

| upstream method | why |
|---|---|
| `GKDTrainer.__init__` | needs a teacher, refuses padded vocabularies, leaves the teacher trainable |
| `Trainer.get_batch_samples` | sees a whole window before its first forward: generate there, then count |
| `Trainer._get_train_sampler`, `_get_dataloader` | other rows in every epoch; evaluation drops none |
| `Trainer._get_num_items_in_batch` | D counts what is trained on, and never the first label of a row |
| `GKDTrainer.training_step` | draws on-policy per rank and micro-batch; here the window is already drawn |
| `GKDTrainer.compute_loss` | the loss itself: upstream's is 1/world_size, ignores temperature and has no CE |
| `SFTTrainer.prediction_step`, `Trainer.evaluation_loop` | a mean over tokens, not of batch means; no row twice |
| `SFTTrainer.log` | metrics reduced across ranks |
| `Trainer.train` | metrics of an earlier call that were never logged do not count |
| `Trainer._get_grad_norm` | the last place before the optimizer step (DeepSpeed's: `deepspeed.py`): NaN stops here |
| `Trainer.create_optimizer`, `_clip_grad_norm` | the projectors of visual KD belong to the run, not to the student |
| `Trainer._save`, `_load_from_checkpoint`, `_load_best_model` | their file; and no pickle of the arguments |
| `Trainer._issue_warnings_after_load` | a checkpoint that was not loaded is no matter for a warning |
| `Trainer.save_model` | weights that are not finite are not saved |
| `SFTTrainer._save_checkpoint` | its time is not training time |
| `Trainer._save_rng_state`, `_prepare_for_training` | a record that a checkpoint falls in the middle of stays whole |
| `_BaseTrainer.create_model_card` | no card that says that a student from a folder derives from None |
| `_BaseTrainer._send_telemetry` | nothing is sent anywhere |
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdtrain.config.options import DistillationOptions, LiveOption
from kdtrain.data.batch import Batch, received
from kdtrain.data.collate import Collator
from kdtrain.data.epochs import Epochs
from kdtrain.errors import CheckpointError, NonFiniteError
from kdtrain.feature_kd.term import VisualTerm
from kdtrain.losses.reduce import IGNORE_INDEX, world_scale
from kdtrain.models.load_report import load_weights
from kdtrain.models.loss_head import why_wrapped_head_differs
from kdtrain.models.text_only import check_reentrant, keep_a_path, trained_by_images_alone
from kdtrain.models.vocabulary import Vocabulary
from kdtrain.preflight.positions import refuse_width
from kdtrain.ranks import is_main
from kdtrain.teachers import Targets, Teacher, teacher_autocast
from kdtrain.trainer import metrics
from kdtrain.trainer.argument_checks import (
    check_arguments,
    check_parallelism,
    check_same_on_all_ranks,
    check_teacher_can,
)
from kdtrain.trainer.assembly import (
    build_objective,
    build_receiver,
    check_prompt_learning_of,
    compared_vocabularies,
    finish_student,
)
from kdtrain.trainer.construction import (
    adapters_on_the_head,
    default_collator,
    prepare,
    set_pad_token,
    without_what_is_done_here,
)
from kdtrain.trainer.deepspeed import guard_steps, not_a_norm
from kdtrain.trainer.given_rows import check_raw_rows, check_stream, placeholder
from kdtrain.trainer.guard import describe_non_finite, some_loss_is_not_finite
from kdtrain.trainer.objective import warn_of_logits
from kdtrain.trainer.rehearsal import readable_beginning, rehearse
from kdtrain.trainer.row_order import EpochSampler, SetEpoch
from kdtrain.trainer.unlogged import RestoreUnlogged, save_unlogged
from kdtrain.trainer.watch import WatchGradients, WatchRounding, check_weights
from kdtrain.trainer.window import Window, check_images_on_all_ranks, collect, num_supervised

if TYPE_CHECKING:
    from datasets import IterableDataset
    from peft import PeftConfig

logger = logging.getLogger(__name__)

_SUMMARY_NAMES = {"train_loss": "mean_loss"}  # "loss" is the name of a step's


class GKDTrainerWithMetrics(GKDTrainer):
    """Generalised knowledge distillation with cross-entropy, visual-feature KD and metrics that can be trusted.

    The constructor is GKDTrainer's, with two more keywords. The options that GKDConfig has no field for are read from
    `args` as attributes, by the names of `kdtrain.config.options.DistillationOptions`. A callback may set `beta`,
    `kd_temperature`, `llm_kd_weight`, `sft_alpha`, `lmbda`, `temperature`, `max_new_tokens` and `seq_kd` of the
    trainer, on all ranks alike: the next window uses them, and evaluation at once. They are not part of a checkpoint:
    a resumed run begins with those of `args`.

    Args:
        model: the student, or its name; a PeftModel or the folder of an adapter, which is trained further.
        teacher_model: the teacher, or its name; with an adapter, or an adapter's folder. None where no KD is active,
            and where `args.teacher_model_name_or_path` names it.
        args: GKDConfig. Fields that the trainer does not honour are refused (see `arguments.py`).
        train_dataset: a `datasets.Dataset`, a list of rows, or a torch data set with a length; eval_dataset as well, or
            a dict of them.
        processing_class: None is what is saved with the model.
        data_collator: None is `kdtrain.data.Collator`, which cuts rows at `args.max_length`; rows hold `input_ids` and
            `labels`, or are still `messages`, `prompt` and `completion`, or `text`. A batch is `input_ids` [B, T],
            `attention_mask` [B, T], `labels` [B, T] and whatever else the model's forward takes (see `data/batch.py`);
            optionally `prompt_lengths` [B] (needed to generate) and `ce_rows` [B] bool (rows that contribute
            cross-entropy; all where absent).
        teacher: a `kdtrain.teachers.Teacher` instead of `teacher_model`.
        shared_vocab_size: leading logit columns that both models share, where the caller has compared the tokenizers;
            None finds out.

    Raises:
        ValueError: KD is active without a teacher, a knob is out of range, vocabularies differ, or an argument is of a
            wrong kind (`ConfigError`, `PreflightError`).
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
        shared_vocab_size: int | None = None,
    ) -> None:
        check_arguments(args, model, teacher_model, teacher, processing_class, callbacks)
        assert args is not None
        assert model is not None
        self.options = DistillationOptions.from_args(args)
        self._window: Window | None = None  # the one that is being trained
        own_collator = data_collator is None
        given = prepare(
            args,
            self.options,
            model=model,
            teacher_model=teacher_model,
            teacher=teacher,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            has_collator=not own_collator,
            formatting_func=formatting_func,
        )
        # SFTTrainer's constructor, past GKDTrainer's: see the table above.
        with adapters_on_the_head(), without_what_is_done_here(args):
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
        check_parallelism(self.accelerator)
        self.train_dataset, self.eval_dataset = given.train, given.evaluation
        set_pad_token(self._tokenizer, args)
        if own_collator:  # not before: upstream may have changed the template or the special tokens
            self.data_collator = default_collator(self.processing_class, args, formatting_func)
            check_raw_rows(self.data_collator, "train_dataset", self.train_dataset)
            check_raw_rows(self.data_collator, "eval_dataset", self.eval_dataset)
        finish_student(self, given)
        self.teacher = given.teacher
        self.teacher_model: nn.Module | None = None
        self.vocabulary: Vocabulary | None = None
        if self.teacher is not None:
            check_teacher_can(self.teacher, self.options)
            self.vocabulary = compared_vocabularies(self, self.teacher, shared_vocab_size)
            self.teacher.place(self.accelerator)
            self.teacher_model = self.teacher.module
        check_prompt_learning_of(self, self.options)
        self.receiver = build_receiver(self, train_dataset, eval_dataset)
        self._objective, self._head_unchecked, self._positions = build_objective(self)
        self.stopwatch = metrics.Stopwatch()
        check_reentrant(self.model, args)
        self.by_images_alone = trained_by_images_alone(self.model)
        if self.by_images_alone:
            keep_a_path(self.model)
        self._sampler: EpochSampler | None = None
        self.begun = self.rehearsed = False
        self.summed_from = 0
        self._unlogged = RestoreUnlogged(self)
        for callback in (self._unlogged, WatchGradients(self), WatchRounding(self)):
            self.add_callback(callback)
        self._loading_from: str | None = None
        self._guarded_engine: nn.Module | None = None

    # ---- what it is made of ------------------------------------------------------------------------------------------

    @property
    def visual(self) -> VisualTerm | None:
        """The term of visual KD, where there is one."""
        return self._objective.visual

    @property
    def has_aux_loss(self) -> bool:
        """Whether experts' load-balancing loss is a term."""
        return bool(self._objective.router_logits)

    @property
    def window_has_images(self) -> bool:
        """Whether a row of the window that is being trained has an image that is new."""
        return self._window is not None and self._window.has_new_images

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; what an earlier call left unlogged does not count for this one."""
        self._metrics["train"].clear()
        self._unlogged.checkpoint = None
        self.begun = False
        self._window = None
        self.receiver.start_counting()
        with readable_beginning(self):
            if not self.rehearsed:
                rehearse(self)
            self.rehearsed = False  # options may change before another call
            output = super().train(*args, **kwargs)
        self.receiver.warn_of_truncated()
        return output

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As upstream, which goes on by setting all sums to 0: `RestoreUnlogged` is told where they are."""
        self._unlogged.checkpoint = resume_from_checkpoint
        self.summed_from = self.state.global_step
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    # ---- rows --------------------------------------------------------------------------------------------------------

    def read_epochs(self, epochs: Epochs) -> None:
        """Read other rows of the training data in every epoch."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(epochs, self.args.train_sampling_strategy != "sequential", seed)
        self.add_callback(SetEpoch(self._sampler))

    def rows_per_epoch(self) -> int:
        """Rows of the training data that an epoch reads."""
        return len(self.train_dataset if self._sampler is None else self._sampler)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Upstream's, but evaluation never leaves out rows."""
        check_stream(dataset, self.data_collator, self.accelerator)
        wanted = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = wanted and is_training
        if self.accelerator.num_processes == 1:  # a stream's batches, which accelerate would take apart to send them on
            self.accelerator.dataloader_config.dispatch_batches = False
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = wanted

    # ---- the optimizer window ----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """Collect one window, replace its answers where it is generated, and count D on what will be trained on."""
        self.stopwatch.start()
        self.begun = True
        options = self._checked_options()
        given = [self._receive(batch, train=True) for batch in itertools.islice(epoch_iterator, num_batches)]
        batches, self._window = collect(self, given, options, device)
        for name, value in (("windows", 1.0), ("on_policy_windows", float(self._window.on_policy))):
            self._metrics["train"][name].append(torch.tensor(value))
        num_items = self._get_num_items_in_batch(batches, device)
        if self.teacher is not None and options.needs_teacher:
            self.teacher.prepare(batches)
        return batches, num_items

    def _receive(self, batch: Batch | Mapping[str, Any], *, train: bool, rows: int | None = None) -> Batch:
        """A batch on the device, without the rows repeated to fill up an epoch of `rows` (None: training's)."""
        args = self.args
        size = self._train_batch_size if train else args.eval_batch_size
        rows = self.rows_per_epoch() if rows is None else rows
        return self.receiver.receive(
            self._prepare_inputs(batch),
            rows,
            size,
            drop_last=train and args.dataloader_drop_last,
            may_pad_left=not isinstance(self.data_collator, Collator),  # a caller may replace it at any time
        )

    def _prepare_inputs(self, inputs: Batch | Mapping[str, Any]) -> Batch:
        """As upstream, which knows mappings only: onto the device, and under DeepSpeed into its dtype."""
        batch = inputs if isinstance(inputs, Batch) else received(inputs, None)
        return batch.map_tensors(self._prepare_input)

    def _checked_options(self) -> DistillationOptions:
        """The options as they are now, fit to be used.

        Raises:
            ValueError: a value that was set since is out of range, asks for what this trainer lacks, or is not the same
                on all ranks.
        """
        options = self.options.checked()
        check_teacher_can(self.teacher, options)
        check_prompt_learning_of(self, options)
        check_same_on_all_ranks(options, self.accelerator)
        return options

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | None:
        """D: the supervised tokens of the window's micro-batches on all ranks."""
        if not batch_samples:
            return None
        return num_supervised(batch_samples, self.accelerator, device) // self.get_tp_size()

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch. The window was drawn and generated in `get_batch_samples`."""
        if self.is_deepspeed_enabled and model is not self._guarded_engine:
            guard_steps(model, self.accelerator, lambda norm: NonFiniteError(self._describe_non_finite(norm)))
            self._guarded_engine = model
        loss = super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss
        if self._window is not None:
            self._window = replace(self._window, options=None)
        if self.visual is not None:
            self.visual.synchronise()
        if self.by_images_alone and not self.window_has_images and self.accelerator.scaler is None:
            self.model.zero_grad()  # zeros would be decayed, and moved by the optimizer's momentum
        return loss

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch | Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """total = llm_kd_weight · jsd + c · ce + Σ visual, for one micro-batch.

        Args:
            num_items_in_batch: D; None (evaluation, a call of its own) is the batch's own supervised tokens.

        Returns:
            The micro-batch's share of the window's loss, times the world size where D is given; with the student's
            outputs, of a forward of their own, if `return_outputs`.
        """
        if self._head_unchecked:
            self._check_head(model)
        training = self.model.training
        batch = self.receiver.accept(inputs)
        refuse_width(self._positions, batch)
        terms = self._objective(
            model,
            batch,
            self._options_of(training),
            self._run_teacher_forward,
            num_items_in_batch,
            1.0 if self._window is None else self._window.aux_share,
        )
        metrics.record(self._metrics["train" if training else "eval"], terms, batch)
        if training and self.is_deepspeed_enabled and self._some_loss_is_not_finite():
            # DeepSpeed takes the optimizer step within backward: this is the last place before it.
            raise NonFiniteError(self._describe_non_finite(None))
        loss = terms.total * world_scale(num_items_in_batch, self.accelerator.num_processes // self.get_tp_size())
        if return_outputs:  # for compute_metrics: the loss itself makes no logits
            with torch.no_grad():
                return loss, model(**batch.model_inputs, use_cache=False)
        return loss

    def _options_of(self, training: bool) -> DistillationOptions:
        """Those of the window; evaluation uses what is set now, and no teacher where `eval_kd` is off."""
        if training and self._window is not None and self._window.options is not None:
            return self._window.options
        options = self.options.checked()
        return options if training or options.eval_kd else options.without_kd()

    def _run_teacher_forward(self, batch: Batch) -> Targets:
        """The teacher's targets for the supervised tokens; also fires the hooks of visual KD."""
        assert self.teacher is not None, "the loss asks for a teacher that was never built"
        with teacher_autocast(self.accelerator):
            return self.teacher.targets(batch)

    def _check_head(self, model: nn.Module) -> None:
        """What could not be looked at before the model was wrapped: see `why_no_loss_head`."""
        reason = why_wrapped_head_differs(model)
        self._head_unchecked = False
        if reason is not None:
            warn_of_logits(reason)
            self._objective = replace(self._objective, fused=False)

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def window_metrics(self) -> dict[str, float]:
        """The metrics since the last record, `loss` as the sum of its terms; a collective."""
        reduced = metrics.reduce_metrics(self._metrics["train"], self.accelerator, token_weighted=False)
        found = metrics.training_metrics(reduced, 0.0)
        return {"loss": sum(found.get(name, 0.0) for name in metrics.TOTAL_TERMS), **found}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the reduced training metrics to a training record, and hand it to the callbacks and trackers."""
        if "loss" in logs:
            reduced = metrics.reduce_metrics(self._metrics["train"], self.accelerator, token_weighted=False)
            logs |= metrics.training_metrics(reduced, self.stopwatch.lap())
            self._metrics["train"].clear()
            if not reduced.sums["num_tokens"] and is_main():
                logger.warning(
                    "Nothing was supervised since the last record (step %d): rows without an answer, or with an answer "
                    "that max_length (%s) cuts off, teach nothing.",
                    self.state.global_step,
                    self.args.max_length,
                )
        elif "train_runtime" in logs:
            # The mean of the whole run, of which upstream has counted the steps since a resume.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self.summed_from, 1)
            # The summary at the end: trackers put "train/" before every key, and once is enough.
            logs = {_SUMMARY_NAMES.get(key, key.removeprefix("train_")): value for key, value in logs.items()}
        Trainer.log(self, logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm, or an error: neither a NaN gradient nor the weights after a NaN loss are worth having."""
        if grad_norm is None and self._projectors():
            grad_norm = self._clip_with_projectors(model, math.inf)
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler skips steps whose fp16 gradients overflowed, and lowers its scale: that is its job.
        engine: Any = model
        scaled = engine.fp16_enabled() if self.is_deepspeed_enabled else self.accelerator.scaler is not None
        if (norm is not None and not scaled and not_a_norm(norm)) or self._some_loss_is_not_finite():
            raise NonFiniteError(self._describe_non_finite(norm))
        return norm

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._projectors():
            return self._clip_with_projectors(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _clip_with_projectors(self, model: nn.Module, largest: float) -> Any:
        """One norm over the student and the projectors: they share the loss, and so the clipping."""
        return self.accelerator.clip_grad_norm_([*model.parameters(), *self._projectors()], largest)

    def _projectors(self) -> list[nn.Parameter]:
        return [] if self.visual is None else self.visual.parameters()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The student's optimizer, with parameter groups of their own for the projectors of visual KD."""
        optimizer = super().create_optimizer(model)
        if self.visual is not None:
            self.visual.add_to(optimizer, self.args.weight_decay)
        return optimizer

    def _some_loss_is_not_finite(self) -> bool:
        recorded, newest = self._metrics["train"], self.args.gradient_accumulation_steps
        return some_loss_is_not_finite(recorded, newest, self.accelerator)

    def _describe_non_finite(self, norm: Any) -> str:
        step, rank = self.state.global_step + 1, self.accelerator.process_index
        return describe_non_finite(self._metrics["train"], step, rank, norm)

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
        batch = self._receive(given, train=False, rows=rows)
        check_images_on_all_ranks(self, [batch])
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, batch), None, None
            loss, outputs = self.compute_loss(model, batch, return_outputs=True)
        # As many rows on every rank, for upstream to gather; it leaves out those that were repeated.
        return loss, _filled_up(outputs.logits, len(given)), _filled_up(batch.labels, len(given))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Upstream's loop, with its mean of batch means replaced by means over the tokens of the whole set."""
        self._metrics["eval"].clear()
        self.begun = True
        with self.stopwatch.pause():
            output = super().evaluation_loop(*args, **kwargs)
            reduced = metrics.reduce_metrics(self._metrics["eval"], self.accelerator, token_weighted=True)
        if not output.num_samples:  # of a stream upstream counts the rows of batches that are mappings only
            output = output._replace(num_samples=int(sum(self._metrics["eval"]["rows"])))
        self._metrics["eval"].clear()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}": v for k, v in metrics.evaluation_metrics(reduced).items()})
        return output

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As upstream, if all trained weights are finite: a step is looked at by the next one only.

        Raises:
            NonFiniteError: nothing is written.
        """
        # Whole models are the same on every rank, and a caller may save on one rank alone.
        together = _internal_call or self.is_fsdp_enabled or self.is_deepspeed_enabled
        check_weights(self, together)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.stopwatch.pause():
            super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_unlogged(self, output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights, config and tokenizer; never the pickled arguments, which nothing reads back."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            if self.visual is not None:
                self.visual.save(output_dir or self.args.output_dir)
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(output_dir or self.args.output_dir, TRAINING_ARGS_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"Optimizer and scheduler of {checkpoint} cannot be loaded: {reason} Resume with the options that the "
                "run began with, or from another checkpoint."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loading_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.visual is not None:
            self.visual.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._loading_from = self.state.best_model_checkpoint
        super()._load_best_model()
        if self.visual is not None and self.state.best_model_checkpoint:
            self.visual.load(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that found no place by name are loaded properly; upstream warns and goes on with the first ones.

        transformers saves vision-language models under the names of their first release, and loads them by the names of
        the day: a resumed run would begin anew, with the optimizer of an old one.
        """
        if load_result.missing_keys or load_result.unexpected_keys:
            assert self._loading_from is not None
            load_weights(self.model, self._loading_from)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Only for a student with a name on the hub: of one from a folder upstream's card says it derives from None."""
        if not os.path.isdir(getattr(self.unwrap(self.model).config, "_name_or_path", None) or "."):
            super().create_model_card(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere; TRL reports trainer and model type to the hub by default."""

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def unwrap(self, model: nn.Module | None) -> Any:
        """A model without what trains it in parallel."""
        return None if model is None else self.accelerator.unwrap_model(model)

    @property
    def in_pieces(self) -> bool:
        """Whether FSDP or DeepSpeed keeps the models in pieces."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled


def _filled_up(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` with rows of -100 behind them, `count` in all."""
    return torch.cat([rows, rows.new_full((count - len(rows), *rows.shape[1:]), IGNORE_INDEX)])
