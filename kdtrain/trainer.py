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
| `Trainer._get_grad_norm` | the last place before the optimizer step (DeepSpeed's: see `zero.py`): NaN stops here |
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp, unwrap_model_for_generation

from kdtrain import telemetry
from kdtrain.batch import (
    TruncatedRows,
    for_teacher,
    forward_names,
    model_inputs,
    received,
    right_padded,
    teacher_inputs,
    token_level,
)
from kdtrain.construction import (
    adapters_on_the_head,
    as_rows,
    check_arguments,
    check_config_is_followed,
    check_data_options,
    check_parallelism,
    check_parts_are_frozen,
    check_prompt_learning,
    check_raw_rows,
    check_same_on_all_ranks,
    check_teacher_arguments,
    check_teacher_can,
    check_teacher_is_another_model,
    default_collator,
    hide_token,
    load_student,
    local_teacher,
    placeholder,
    processing_of,
    set_pad_token,
    tokenizer_or_none,
    without_what_is_done_here,
)
from kdtrain.data.chat import ChatTemplate
from kdtrain.data.collate import Collator, cut_rows
from kdtrain.data.epochs import Epochs
from kdtrain.data.multimodal import image_token_ids
from kdtrain.errors import CheckpointError, ConfigError, DataError, NonFiniteError, PreflightError
from kdtrain.experts import asks_for_router_logits, check_experts, restore_router_settings, router_settings
from kdtrain.generation import generate_batch, generation_config, stop_token_ids, student_generates
from kdtrain.gkd_fields import check_fields, check_supervision
from kdtrain.knobs import Knobs, LiveOption
from kdtrain.lm_head import add_loss_head, placeholder_ids, why_no_loss_head, why_wrapped_head_differs
from kdtrain.load_report import load_weights
from kdtrain.losses.reduce import IGNORE_INDEX, FusedLoss, count_supervised_in, next_token_labels, world_scale
from kdtrain.model_checks import both_sides, check_models
from kdtrain.models import disable_dropout, sees_images
from kdtrain.positions import refuse_width, rows_of_a_run
from kdtrain.ranks import is_main
from kdtrain.rehearsal import readable_beginning, rehearse
from kdtrain.sampling import EpochSampler, SetEpoch
from kdtrain.teachers import Targets, Teacher
from kdtrain.token_ids import check_batch, check_rows, embedding_rows
from kdtrain.token_loss import TokenLoss, Vocabulary
from kdtrain.tuning import check_trained, fit_student
from kdtrain.unlogged import RestoreUnlogged, save_unlogged
from kdtrain.vision.text_only import check_reentrant, keep_a_path, trained_by_images_alone
from kdtrain.visual_kd import has_images, visual_units
from kdtrain.visual_term import VisualTerm, first_batch_with_images
from kdtrain.vocabulary import shared_vocabulary, vocabulary_size
from kdtrain.watch import WatchGradients, WatchRounding, check_weights
from kdtrain.zero import guard_steps, not_a_norm

if TYPE_CHECKING:
    from datasets import IterableDataset
    from peft import PeftConfig

logger = logging.getLogger(__name__)

_SUMMARY_NAMES = {"train_loss": "mean_loss"}  # "loss" is the name of a step's


class GKDTrainerWithMetrics(GKDTrainer):
    """Generalised knowledge distillation with cross-entropy, visual-feature KD and metrics that can be trusted.

    The constructor is GKDTrainer's, with two more keywords. The knobs that GKDConfig has no field for are read from
    `args` as attributes: `llm_kd_weight` (1.0), `sft_alpha` (0.0), `divergence` ("jsd"), `kd_temperature` (1.0),
    `eval_kd` (True), `visual_kd` (None). A callback may set `beta`, `kd_temperature`, `llm_kd_weight`, `sft_alpha`,
    `lmbda`, `temperature` and `seq_kd` of the trainer, on all ranks alike: the next window uses them, and evaluation at
    once. They are not part of a checkpoint: a resumed run begins with those of `args`.

    Args:
        model: the student, or its name; a PeftModel or the folder of an adapter, which is trained further.
        teacher_model: the teacher, or its name; with an adapter, or an adapter's folder. None where no KD is active,
            and where `args.teacher_model_name_or_path` names it.
        args: GKDConfig. Fields that the trainer does not honour are refused (see `gkd_fields.py`).
        train_dataset: a `datasets.Dataset`, a list of rows, or a torch data set with a length; eval_dataset as well, or
            a dict of them.
        processing_class: None is what is saved with the model.
        data_collator: None is `kdtrain.data.Collator`, which cuts rows at `args.max_length`; rows hold `input_ids` and
            `labels`, or are still `messages`, `prompt` and `completion`, or `text`. A batch is `input_ids` [B, T],
            `attention_mask` [B, T], `labels` [B, T] and whatever else the model's forward takes (see `batch.py`);
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
    lmbda, temperature, seq_kd = LiveOption(), LiveOption(), LiveOption()

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: GKDConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
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
        self.knobs = Knobs.from_args(args)
        self._window_knobs: Knobs | None = None  # of the window that is being trained
        check_fields(args, own_collator=data_collator is None)
        check_data_options(args)
        check_config_is_followed(args, model, peft_config)
        if teacher_model is None and teacher is None and self.knobs.needs_teacher:
            teacher_model = args.teacher_model_name_or_path
        check_teacher_arguments(teacher_model, teacher, args, self.knobs)
        check_teacher_is_another_model(model, teacher_model if teacher is None else teacher.module)
        given = {
            "train_dataset": as_rows("train_dataset", train_dataset),
            "eval_dataset": as_rows("eval_dataset", eval_dataset),
        }
        if data_collator is None:
            check_supervision(args, given["train_dataset"][0], formatted=formatting_func is not None)
        elif formatting_func is not None:
            raise ConfigError(
                "formatting_func and data_collator: the collator gets the rows as they are; format there."
            )
        if processing_class is None:
            processing_class = processing_of(model, args)
        if self.knobs.needs_teacher and teacher is None:
            # Before the student is touched: a missing teacher should not cost the loading of a model.
            teacher = local_teacher(teacher_model, args)
        if isinstance(model, str):
            model = load_student(model, args, trained_in_full=peft_config is None)
        elif args.model_init_kwargs is not None:
            raise ConfigError("model_init_kwargs would be ignored: the model is loaded already. Remove them.")
        check_parts_are_frozen(args, model)
        args.remove_unused_columns = False  # the collator reads columns that no forward takes
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.logging_nan_inf_filter = False  # it shows a NaN run as loss 0.0
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        router = router_settings(model)
        hide_token(args)
        peft_config = fit_student(model, peft_config, args)
        if self.knobs.visual_kd is not None and args.ddp_find_unused_parameters is None:
            # A rank whose batch has no image leaves its vision path without a gradient; the others would wait for it.
            args.ddp_find_unused_parameters = True
        # SFTTrainer's constructor, past GKDTrainer's: see the table above.
        with adapters_on_the_head(), without_what_is_done_here(args):
            super(GKDTrainer, self).__init__(
                model,
                args=args,
                data_collator=data_collator or Collator(processing_class),
                train_dataset=placeholder(given["train_dataset"]),
                eval_dataset=placeholder(given["eval_dataset"]),
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                peft_config=peft_config,
            )
        check_parallelism(self.accelerator)
        self.train_dataset, self.eval_dataset = given["train_dataset"], given["eval_dataset"]
        set_pad_token(self._tokenizer, args)
        if data_collator is None:  # not before: upstream may have changed the template or the special tokens
            self.data_collator = default_collator(self.processing_class, args, formatting_func)
            for name, data in given.items():
                check_raw_rows(self.data_collator, name, data)
        self._forward_names = forward_names(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        check_trained(self.model, args.device)
        if args.disable_dropout:
            disable_dropout(self.model)
        self._teach_to_stop()
        if use_cache is not None:
            self.model.config.use_cache = use_cache  # upstream switches it off for good, in what is saved as well
        restore_router_settings(self.model, router)  # upstream switches them on for good
        self.teacher = teacher if self.knobs.needs_teacher else None
        self.teacher_model: nn.Module | None = None
        self.vocabulary: Vocabulary | None = None
        if self.teacher is not None:
            check_teacher_can(self.teacher, self.knobs)
            self.vocabulary = self._compare_vocabularies(self.teacher, shared_vocab_size)
            if self.teacher.module is not None:
                self.teacher_model = self.teacher.module = self._place_teacher(self.teacher.module)
        self._check_prompt_learning(self.knobs)
        router_logits = asks_for_router_logits(self.model, self.aux_loss_enabled)
        if router_logits:
            check_experts(self.model, args)
        self._token_loss = TokenLoss(self.knobs, self.vocabulary, fused=self._fuse_head(), router_logits=router_logits)
        self._aux_share: torch.Tensor | float = 1.0
        self._check_token_ids(train_dataset, eval_dataset)
        self.stopwatch = telemetry.Stopwatch()
        self._positions = self._check_models()
        self.visual = self._visual_term()
        self._sampler: EpochSampler | None = None
        check_reentrant(self.model, args)
        self._by_images_alone = trained_by_images_alone(self.model)
        if self._by_images_alone:
            keep_a_path(self.model)
        self.window_has_images = False
        self.begun = self.rehearsed = False
        self.summed_from = 0
        self._unlogged = RestoreUnlogged(self)
        self.add_callback(self._unlogged)
        self.add_callback(WatchGradients(self))
        self.add_callback(WatchRounding(self))
        self._truncated = TruncatedRows(args.max_length)
        self._loading_from: str | None = None
        self._guarded_engine: nn.Module | None = None

    # ---- construction ------------------------------------------------------------------------------------------------

    def _teach_to_stop(self) -> None:
        """Let the student's generation stop where its chat template ends a turn, here and after it is saved.

        A base model's own config names its end of text only: its samples would run on behind the end of the turn.
        """
        config = getattr(self.model, "generation_config", None)
        if config is None:
            return
        stops = stop_token_ids(config, self._tokenizer)
        if self._tokenizer.chat_template or getattr(self.processing_class, "chat_template", None):
            stops += sorted(ChatTemplate(self.processing_class).stop_ids - set(stops))
        config.eos_token_id = stops[0] if len(stops) == 1 else stops or None

    def _check_prompt_learning(self, knobs: Knobs) -> None:
        check_prompt_learning(self.model, "student", knobs.lm_kd_active and knobs.lmbda > 0, self.aux_loss_enabled)
        if self.teacher_model is not None:
            check_prompt_learning(self._unwrap(self.teacher_model), "teacher", knobs.lm_kd_active and knobs.seq_kd)

    def _compare_vocabularies(self, teacher: Teacher, shared: int | None) -> Vocabulary:
        sizes = vocabulary_size(self.model), teacher.vocab_size
        if shared is None:
            name = getattr(getattr(teacher.module, "config", None), "_name_or_path", "")
            # Equal sizes do not mean equal vocabularies; but nothing is downloaded to find out.
            known = tokenizer_or_none(name) if sizes[0] != sizes[1] or os.path.isdir(name) else None
            shared = shared_vocabulary(*sizes, self._tokenizer, known)
        return Vocabulary(*sizes, shared)

    def _check_token_ids(self, train: Any, evaluation: Any) -> None:
        """Refuse rows with ids that a model has no embedding for; those that are tokenised later are looked at then."""
        models = {"student": self.model, "teacher": self.teacher_model}
        self._embeddings = {side: embedding_rows(model) for side, model in models.items() if model is not None}
        seen = [
            check_rows(data, name, self._embeddings)
            for name, data in (("data.train", train), ("data.eval", evaluation))
            if data is not None
        ]
        largest = max(self._tokenizer.get_vocab().values(), default=-1)  # some leave ids out
        self._ids_may_exceed = not all(seen) or largest >= min(self._embeddings.values())

    def _fuse_head(self) -> bool:
        """Let the student's loss be computed without its logits, where that gives the same."""
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        reason = why_no_loss_head(base)
        self._head_unchecked = reason is None and is_deepspeed_zero3_enabled()
        if reason is None:
            add_loss_head(base)
        else:
            _tell_logits(reason)
        return reason is None

    def _visual_term(self) -> VisualTerm | None:
        """Visual KD, tried on a row with images where there is one."""
        if self.knobs.visual_kd is None:
            return None
        student, teacher = self._unwrap(self.model), self._unwrap(self.teacher_model)
        visual = VisualTerm(self.knobs.visual_kd, student, teacher, self.accelerator, self.args.seed)
        # In pieces, a model cannot be run before it is wrapped: what does not fit is found at the first step.
        if self.train_dataset is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            batch = first_batch_with_images(self.train_dataset, self.data_collator)
            if batch is not None:
                with self.compute_loss_context_manager():
                    visual.probe(batch)
        return visual

    def _check_models(self) -> dict[str, int]:
        """What a look at both models finds (see `model_checks.py`); the positions of each that has a table of them."""
        teacher = self._unwrap(self.teacher_model)  # DeepSpeed's engine has a config of its own
        sides = both_sides(self.model, self.teacher, self.data_collator, teacher)
        chosen = [(self.model, self.lmbda > 0), (teacher, self.seq_kd)]
        generating = [model for model, chosen in chosen if chosen and self._generates()]
        collator, train = self.data_collator, self.train_dataset
        check_models(
            sides,
            rows_of_a_run(train, self.eval_dataset, self.args, collator, generates=bool(generating)),
            collator,
            train,
            generating=generating,
            in_pieces=self.is_fsdp_enabled or self.is_deepspeed_enabled,
            autocast=self.compute_loss_context_manager,
        )
        return {side.name: side.look.positions for side in sides if side.look.positions is not None}

    def _check_head(self, model: nn.Module) -> None:
        """What could not be looked at before the model was wrapped: see `why_no_loss_head`."""
        reason = why_wrapped_head_differs(model)
        self._head_unchecked = False
        if reason is not None:
            _tell_logits(reason)
            self._token_loss = replace(self._token_loss, fused=False)

    def _place_teacher(self, module: nn.Module) -> nn.Module:
        """Put the teacher where it will run. Not wrapped by DDP: it has no gradients to average."""
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(module, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(module, self.accelerator)
        if getattr(module, "hf_device_map", None) is None:
            module.to(self.accelerator.device)
        return module

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; what an earlier call left unlogged does not count for this one."""
        self._metrics["train"].clear()
        self._unlogged.checkpoint = None
        self.begun = False
        self._window_knobs = None
        self._truncated = TruncatedRows(self.args.max_length)
        with readable_beginning(self):
            if not self.rehearsed:
                rehearse(self)
            self.rehearsed = False  # options may change before another call
            output = super().train(*args, **kwargs)
        self._truncated.say_total(self.accelerator)
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

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Upstream's, but evaluation never leaves out rows."""
        wanted = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = wanted and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = wanted

    # ---- the optimizer window ----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """Collect one window, replace its answers where it is generated, and count D on what will be trained on."""
        self.stopwatch.start()
        self.begun = True
        batches = [
            self._without_repeated_rows(
                self._received(batch), self.rows_per_epoch(), self._train_batch_size, self.args.dataloader_drop_last
            )
            for batch in itertools.islice(epoch_iterator, num_batches)
        ]
        for batch in batches if self._ids_may_exceed else ():
            check_batch(batch, self._embeddings)
        self._truncated.count(batches)
        knobs = self._window_knobs = self._checked_knobs()
        on_policy = self._generates() and student_generates(self.args.seed, self.state.global_step, knobs.lmbda)
        if on_policy:
            batches = self._generated(batches, self.model_wrapped, self.model, "student")
        elif self._generates() and knobs.seq_kd:
            batches = self._generated(batches, self.teacher_model, self.teacher_model, "teacher")
        for batch in batches:
            batch["student_generated"] = on_policy
        window = self._metrics["train"]
        window["windows"].append(torch.ones(()))
        window["on_policy_windows"].append(torch.tensor(float(on_policy)))
        self._check_images_on_all_ranks(batches)
        self.window_has_images = self._some_new_image(batches)
        if self.visual is not None:
            self.visual.count(batches)
            self.visual.projectors.zero_grad()  # upstream zeroes the model's gradients only
        if self.has_aux_loss:
            new = torch.tensor([sum(not batch.get("all_repeated", False) for batch in batches)], device=device)
            self._aux_share = self.get_tp_size() / self.accelerator.gather(new).sum().clamp(min=1)
        return batches, self._get_num_items_in_batch(batches, device)

    def _received(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch in the form of `batch.py`, whatever collator made it."""
        batch = received(batch, self._forward_names)
        if isinstance(self.data_collator, Collator):
            return batch
        return right_padded(batch)  # a look at the mask, which a GPU would have to wait for

    def _checked_knobs(self) -> Knobs:
        """The options as they are now, fit to be used.

        Raises:
            ValueError: a value that was set since is out of range, asks for what this trainer lacks, or is not the same
                on all ranks.
        """
        knobs = self.knobs.checked()
        check_teacher_can(self.teacher, knobs)
        self._check_prompt_learning(knobs)
        check_same_on_all_ranks(knobs, self.accelerator)
        return knobs

    def _check_images_on_all_ranks(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what would wait for ever: a vision encoder in pieces is put together by all ranks or by none.

        ZeRO-1 and 2 reduce gradients in buckets, which are others where the encoder has none.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled) or not sees_images(self._unwrap(self.model).config):
            return
        flags = torch.tensor([has_images(batch) for batch in batches], device=self.accelerator.device).int()
        ranks = self.accelerator.gather(flags[None])
        if not torch.equal(ranks.amin(0), ranks.amax(0)):
            raise PreflightError(
                f"A batch of step {self.state.global_step + 1} has images on some ranks and none on others, which FSDP "
                "and DeepSpeed cannot train: the ranks with images would wait for ever. Give every row an image, raise "
                "training.per_device_train_batch_size, or train with plain data parallelism."
            )
        if self._by_images_alone and not bool(ranks.all()):
            raise PreflightError(
                f"A batch of step {self.state.global_step + 1} has no image, and the language model is frozen: under "
                "FSDP and DeepSpeed every batch needs something to train. Give every row an image, or train with plain "
                "data parallelism."
            )

    def _some_new_image(self, batches: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a row of this window has an image that is not there only to fill up an epoch; on any rank, if asked.

        Asked where nothing else is trained: a window without one is then no step for the optimizer.
        """
        mine = any(has_images(batch) and not batch.get("all_repeated", False) for batch in batches)
        if not self._by_images_alone:
            return mine
        return bool(self.accelerator.gather(torch.tensor([mine], device=self.accelerator.device)).any())

    def _generates(self) -> bool:
        """Only LM KD can use generated answers: CE is not taught on the student's own, and visual KD sees no text."""
        return self.knobs.lm_kd_active

    def _generated(
        self, batches: list[dict[str, Any]], wrapped: nn.Module | None, model: nn.Module | None, side: str
    ) -> list[dict[str, Any]]:
        assert wrapped is not None, "LM KD without a module to generate from"
        assert model is not None
        tokenizer = self._tokenizer
        own = getattr(self._unwrap(model), "generation_config", None)
        stop_ids = stop_token_ids(own, tokenizer, self.model.generation_config)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0] if stop_ids else 0
        assert self.vocabulary is not None
        padding = range(self.vocabulary.shared, max(self.vocabulary.student, self.vocabulary.teacher))
        images = {*image_token_ids(self.processing_class), *placeholder_ids(self._unwrap(model))}
        forbidden = sorted({*padding, *images})
        config = generation_config(stop_ids, pad_id, self.temperature, self.args.max_new_tokens, forbidden)
        # Ranks hold other rows, so they sample from other states; the window and micro-batch make them new each time.
        base = f"{side}:{self.args.seed}:{self.state.global_step}:{self.accelerator.process_index}"
        generated = []
        with unwrap_model_for_generation(
            wrapped, self.accelerator, gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs
        ) as unwrapped:
            for i, batch in enumerate(batches):
                batch = self._prepare_inputs(batch)
                seed = _stable_seed(f"{base}:{i}")
                seen = for_teacher(batch) if side == "teacher" else batch
                done = generate_batch(unwrapped, seen, config, seed=seed, multiple=self.args.pad_to_multiple_of)
                tokens = {"input_ids", "attention_mask", "labels", *token_level(batch)}
                fresh = batch | {key: done[key] for key in tokens}  # the pixels remain the student's
                if batch.get("all_repeated", False):
                    fresh["labels"] = torch.full_like(fresh["labels"], IGNORE_INDEX)
                generated.append(fresh)
        return generated

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """D: the supervised tokens of the window's micro-batches on all ranks."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        local = count_supervised_in(batch_samples, device)
        return self.accelerator.gather(local[None]).sum() // self.get_tp_size()

    def _without_repeated_rows(
        self, batch: dict[str, Any], epoch_rows: int, batch_size: int, drop_last: bool
    ) -> dict[str, Any]:
        """Cut off the rows that accelerate repeats to fill the last batch of an epoch: no row may count twice.

        Ranks take the last rows in order, so only the first `remainder` of them, counted over the ranks, are new. A
        rank that has none of them keeps one row, without labels, to go through the same motions as the others.
        """
        ranks = self.accelerator.num_processes
        if ranks == 1 or not self.accelerator.gradient_state.end_of_dataloader or drop_last:
            return batch
        # Not gradient_state.remainder: accelerate does not know it in an epoch that is resumed in its middle.
        remainder = epoch_rows % (batch_size * ranks)
        new = min(max(remainder - self.accelerator.process_index * batch_size, 0), batch_size)
        if remainder == 0 or new == batch_size:
            return batch
        if "places" in batch:  # the collator has dropped rows, new ones or repeated ones
            new = sum(place < new for place in batch["places"])
        elif new > 0 and batch["labels"].shape[0] != batch_size:
            raise DataError(
                f"The last batch of an epoch has {batch_size - new} repeated rows of {batch_size} to leave out, and "
                f"the collator made {batch['labels'].shape[0]} of them (packing?): it is not known which they are. "
                f"Set training.dataloader_drop_last: true, or give a multiple of {batch_size * ranks} rows."
            )
        batch = cut_rows(batch, max(new, 1))
        if new == 0:
            batch |= {"labels": torch.full_like(batch["labels"], IGNORE_INDEX), "all_repeated": True}
        return batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch. The window was drawn and generated in `get_batch_samples`."""
        if self.is_deepspeed_enabled and model is not self._guarded_engine:
            guard_steps(model, self.accelerator, lambda norm: NonFiniteError(self._describe_non_finite(norm)))
            self._guarded_engine = model
        loss = super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._window_knobs = None
        if self.visual is not None and self.accelerator.sync_gradients:
            self.visual.synchronise()
        nothing = self._by_images_alone and not self.window_has_images and self.accelerator.scaler is None
        if nothing and self.accelerator.sync_gradients:
            self.model.zero_grad()  # zeros would be decayed, and moved by the optimizer's momentum
        return loss

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
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
        refuse_width(self._positions, inputs)
        mode = "train" if self.model.training else "eval"
        knobs = self._window_knobs if mode == "train" and self._window_knobs else self.knobs.checked()
        if mode == "eval" and not knobs.eval_kd:
            knobs = knobs.without_kd()
        inputs = received(inputs, self._forward_names)
        own_inputs = model_inputs(inputs)
        predicts_BT = next_token_labels(inputs["labels"]) != IGNORE_INDEX
        visual = self.visual if knobs.visual_kd is not None and has_images(own_inputs) else None
        with contextlib.nullcontext(({}, {})) if visual is None else visual.tapped() as (ours, theirs):

            def visual_terms() -> dict[str, torch.Tensor]:
                return {} if visual is None else visual.terms(ours, theirs, inputs, whole=num_items_in_batch is None)

            targets = None
            if knobs.lm_kd_active or visual is not None:
                targets = self._run_teacher_forward(teacher_inputs(inputs), predicts_BT)
            tokens, aux, further = replace(self._token_loss, knobs=knobs).forward(
                model,
                own_inputs,
                inputs,
                predicts_BT,
                targets if knobs.lm_kd_active else None,
                num_items_in_batch,
                further=visual_terms,
            )
        scale = world_scale(num_items_in_batch, self.accelerator.num_processes // self.get_tp_size())
        loss, terms = tokens.loss, self._weighted_terms(knobs, inputs, tokens, num_items_in_batch)
        if visual is not None:
            terms |= further
            loss = loss + further["vision_kd_loss"]
        if aux is not None and self.has_aux_loss:
            terms["aux_loss"] = self._aux_term(aux, inputs, whole=num_items_in_batch is None)
            loss = loss + terms["aux_loss"]
        self._record(mode, terms, tokens, inputs)
        if mode == "train" and self.is_deepspeed_enabled and self._some_loss_is_not_finite():
            # DeepSpeed takes the optimizer step within backward: this is the last place before it.
            raise NonFiniteError(self._describe_non_finite(None))
        loss = loss * scale
        if return_outputs:  # for compute_metrics: the loss itself makes no logits
            with torch.no_grad():
                return loss, model(**own_inputs, use_cache=False)
        return loss

    def _run_teacher_forward(self, inputs: Mapping[str, Any], predicts_BT: torch.Tensor) -> Targets:
        """The teacher's targets for the supervised tokens; also fires the hooks of visual KD."""
        assert self.teacher is not None, "the loss asks for a teacher that was never built"
        with self._teacher_autocast():
            return self.teacher.targets(inputs, predicts_BT)

    def _teacher_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast for the teacher's forward as for the student's; not under DeepSpeed, unless it asks for it."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if dtype is None:
            return contextlib.nullcontext()
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            if not config.get("torch_autocast", {}).get("enabled", False):
                return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=dtype)

    def _weighted_terms(
        self, knobs: Knobs, inputs: Mapping[str, Any], tokens: FusedLoss, num_items: torch.Tensor | int | None
    ) -> dict[str, torch.Tensor]:
        """The token terms as they enter the loss, detached, for the metrics. A term of weight 0 is absent."""
        denominator = tokens.num_tokens if num_items is None else torch.as_tensor(num_items)
        denominator = denominator.to(tokens.ce_sum.device).clamp(min=1)
        terms = {}
        if tokens.kd_sum is not None:
            terms["llm_kd_loss"] = knobs.llm_kd_weight * tokens.kd_sum / denominator
        if knobs.ce_weight > 0:
            own = inputs.get("student_generated", False)
            zero = torch.zeros_like(tokens.ce_sum)  # and not 0 · Σ, which may be infinite on the student's own samples
            terms["sft_loss"] = zero if own else knobs.ce_weight * tokens.ce_sum / denominator
        return terms

    def _aux_term(self, aux_loss: torch.Tensor, inputs: Mapping[str, Any], whole: bool) -> torch.Tensor:
        """The load-balancing loss of a mixture-of-experts model: a mean over the window's micro-batches on all ranks.

        One that only has rows which fill up an epoch is none of them.
        """
        if whole:
            return self.router_aux_loss_coef * aux_loss
        share = 0.0 if inputs.get("all_repeated", False) else self._aux_share
        return self.router_aux_loss_coef * share * aux_loss

    @property
    def has_aux_loss(self) -> bool:
        """Whether experts' load-balancing loss is a term."""
        return bool(self._token_loss.router_logits)

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def _record(
        self, mode: str, terms: Mapping[str, torch.Tensor], tokens: FusedLoss, inputs: Mapping[str, Any]
    ) -> None:
        metrics = self._metrics[mode]
        for key, value in terms.items():
            metrics[key].append(value.detach())
        metrics["num_tokens"].append(tokens.num_tokens)
        metrics["num_correct"].append(tokens.num_correct)
        metrics["student_entropy_sum"].append(tokens.student_entropy_sum)
        if tokens.num_agree is not None and tokens.teacher_entropy_sum is not None:
            metrics["num_teacher_tokens"].append(tokens.num_tokens)
            metrics["num_agree"].append(tokens.num_agree)
            metrics["teacher_entropy_sum"].append(tokens.teacher_entropy_sum)
        if "vision_kd_loss" in terms:
            units = torch.tensor(visual_units(inputs))
            for key in terms:
                if key.startswith("vision_kd_loss"):
                    metrics[f"{key}_weight"].append(units)
        mask = inputs.get("attention_mask")
        metrics["input_tokens"].append(
            mask.sum() if mask is not None else torch.tensor(float(inputs["input_ids"].numel()))
        )

    def window_metrics(self) -> dict[str, float]:
        """The metrics since the last record, `loss` as the sum of its terms; a collective."""
        reduced = telemetry.reduce_metrics(self._metrics["train"], self.accelerator, token_weighted=False)
        metrics = telemetry.training_metrics(reduced, 0.0)
        terms = ("llm_kd_loss", "sft_loss", "vision_kd_loss", "aux_loss")
        return {"loss": sum(metrics.get(name, 0.0) for name in terms), **metrics}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the reduced training metrics to a training record, and hand it to the callbacks and trackers."""
        if "loss" in logs:
            reduced = telemetry.reduce_metrics(self._metrics["train"], self.accelerator, token_weighted=False)
            logs |= telemetry.training_metrics(reduced, self.stopwatch.lap())
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
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self.visual is not None and not known.issuperset(map(id, self._projectors())):
            for group in self.visual.parameter_groups(self.args.weight_decay):
                optimizer.add_param_group(group)
        return optimizer

    def _some_loss_is_not_finite(self) -> bool:
        """Whether a term of this window is not finite on any rank: an infinite loss can have a finite gradient."""
        newest = [
            value
            for key in telemetry.LOSS_TERMS
            for value in self._metrics["train"].get(key, ())[-self.args.gradient_accumulation_steps :]
        ]
        # With a 0 in front, so that a rank without terms takes part in the collective like the others.
        values = torch.stack([torch.zeros((), device=self.accelerator.device), *(v.float() for v in newest)])
        bad = (~torch.isfinite(values)).any().float()
        return bool(self.accelerator.gather(bad[None]).max())

    def _describe_non_finite(self, norm: Any) -> str:
        where = f"at step {self.state.global_step + 1}, rank {self.accelerator.process_index}"
        bad = [
            key
            for key in telemetry.LOSS_TERMS
            if any(not torch.isfinite(value) for value in self._metrics["train"].get(key, ()))
        ]
        cause = f"the loss term {', '.join(bad)} is not finite" if bad else "all loss terms of this rank are finite"
        return (
            f"Not finite {where} (gradient norm {norm}): {cause}. The optimizer step was not taken. "
            "Lower training.learning_rate, train in float32, or look at the rows of this step."
        )

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One evaluation batch; logits only where `compute_metrics` asks for them."""
        dataset = self.callback_handler.eval_dataloader.dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else 0  # of a stream it is not known which are repeated
        inputs = self._received(self._prepare_inputs(inputs))
        if self._ids_may_exceed:
            check_batch(inputs, self._embeddings)
        given = inputs["labels"].shape[0]
        inputs = self._without_repeated_rows(inputs, rows, self.args.eval_batch_size, drop_last=False)
        self._check_images_on_all_ranks([inputs])
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        # As many rows on every rank, for upstream to gather; it leaves out those that were repeated.
        return loss, _filled_up(outputs.logits, given), _filled_up(inputs["labels"], given)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Upstream's loop, with its mean of batch means replaced by means over the tokens of the whole set."""
        self._metrics["eval"].clear()
        self.begun = True
        with self.stopwatch.pause():
            output = super().evaluation_loop(*args, **kwargs)
            reduced = telemetry.reduce_metrics(self._metrics["eval"], self.accelerator, token_weighted=True)
        self._metrics["eval"].clear()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}": v for k, v in telemetry.evaluation_metrics(reduced).items()})
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
        if not os.path.isdir(getattr(self._unwrap(self.model).config, "_name_or_path", None) or "."):
            super().create_model_card(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere; TRL reports trainer and model type to the hub by default."""

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _unwrap(self, model: nn.Module | None) -> Any:
        return None if model is None else self.accelerator.unwrap_model(model)


def _filled_up(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` with rows of -100 behind them, `count` in all."""
    return torch.cat([rows, rows.new_full((count - len(rows), *rows.shape[1:]), IGNORE_INDEX)])


def _tell_logits(reason: str) -> None:
    logger.warning("The student's logits are made in full, which takes more time and memory: %s.", reason)


def _stable_seed(text: str) -> int:
    """A 63-bit seed that is the same in every process; Python's own hash is not."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
