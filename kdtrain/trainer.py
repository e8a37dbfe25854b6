"""GKDTrainerWithMetrics: where the student, the teacher and the terms of the loss meet.

Shapes: B rows, T positions, N supervised tokens, V vocabulary, D supervised tokens of the whole optimizer window.

What is overridden, and why:

| upstream method | why |
|---|---|
| `GKDTrainer.__init__` | needs a teacher, refuses padded vocabularies, leaves the teacher trainable |
| `Trainer.get_batch_samples` | sees a whole window before its first forward: generate there, then count |
| `Trainer._get_num_items_in_batch` | D counts what is trained on, and never the first label of a row |
| `GKDTrainer.training_step` | draws on-policy per rank and micro-batch; here the window is already drawn |
| `GKDTrainer.compute_loss` | the loss itself: upstream's is 1/world_size, ignores temperature and has no CE |
| `SFTTrainer.prediction_step`, `Trainer.evaluation_loop` | a mean over tokens, not of batch means; no row twice |
| `SFTTrainer.log` | metrics reduced across ranks |
| `Trainer._get_grad_norm` | the last place before the optimizer step: NaN stops here |
| `Trainer._save` | no pickle of the arguments, which holds the hub token |
| `_BaseTrainer._send_telemetry` | nothing is sent anywhere |
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import disable_dropout_in_model

from kdtrain import telemetry
from kdtrain.data.collate import Collator
from kdtrain.errors import NonFiniteError, VocabularyError
from kdtrain.generation import generate_batch, generation_config, stop_token_ids, student_generates
from kdtrain.knobs import Knobs
from kdtrain.losses.dense import dense_distillation_loss
from kdtrain.losses.reduce import (
    IGNORE_INDEX,
    FusedLoss,
    count_supervised_in,
    next_token_labels,
    world_scale,
)
from kdtrain.losses.visual import feature_distance
from kdtrain.teachers import LocalTeacher, Teacher, build_teacher
from kdtrain.vision.hooks import capture
from kdtrain.vocabulary import shared_vocabulary, vocabulary_size

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig

logger = logging.getLogger(__name__)

# What a batch carries for the trainer and no model's forward takes.
_NOT_FOR_THE_MODEL = frozenset(
    {"labels", "prompt_lengths", "ce_rows", "row_ids", "prompts", "prompt_attention_mask", "student_generated"}
)

_SUMMARY_NAMES = {"train_loss": "mean_loss"}  # "loss" is the name of a step's


class GKDTrainerWithMetrics(GKDTrainer):
    """Generalised knowledge distillation with cross-entropy, visual-feature KD and metrics that can be trusted.

    The constructor is GKDTrainer's, with two more keywords. The knobs that GKDConfig has no field for are read from
    `args` as attributes: `llm_kd_weight` (1.0), `sft_alpha` (0.0), `divergence` ("jsd"), `kd_temperature` (1.0),
    `eval_kd` (True), `visual_kd` (None).

    Args:
        model: the student, or its name.
        teacher_model: the teacher, or its name; None where no KD is active.
        args: GKDConfig.
        data_collator: None is `kdtrain.data.Collator`; rows hold `input_ids` and `labels`, or are still `messages`,
            `prompt` and `completion`, or `text`. A batch is `input_ids` [B, T], `attention_mask` [B, T], `labels`
            [B, T] and whatever else the model's forward takes; optionally `prompt_lengths` [B] (needed to generate)
            and `ce_rows` [B] bool (rows that contribute cross-entropy; all where absent).
        teacher: a `kdtrain.teachers.Teacher` instead of `teacher_model`.
        shared_vocab_size: leading logit columns that both models share, where the caller has compared the tokenizers;
            None finds out.

    Raises:
        ValueError: KD is active without a teacher, a knob is out of range, or vocabularies differ.
    """

    _tag_names = ("trl", "gkd", "kdtrain")
    # compute_loss divides by the whole window's tokens: Trainer must not divide by the accumulation steps again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: GKDConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
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
        if args is None:
            raise ValueError("GKDTrainerWithMetrics needs args, a trl GKDConfig: its output_dir has no default.")
        self.knobs = Knobs.from_args(args)
        _check_teacher_arguments(teacher_model, teacher, self.knobs)
        if self.knobs.needs_teacher and teacher is None:
            # Before the student is touched: a missing teacher should not cost the loading of a model.
            teacher = _local_teacher(teacher_model, args)
        args.remove_unused_columns = False  # the collator reads columns that no forward takes
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.logging_nan_inf_filter = False  # it shows a NaN run as loss 0.0
        args.average_tokens_across_devices = True
        if data_collator is None:
            data_collator = Collator(processing_class, max_length=args.max_length)
        # SFTTrainer's constructor, past GKDTrainer's: see the table above.
        super(GKDTrainer, self).__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        self.teacher = teacher if self.knobs.needs_teacher else None
        self.teacher_model: nn.Module | None = None
        self.shared_vocab_size: int | None = None
        if self.teacher is not None:
            self._vocab_sizes = vocabulary_size(self.model), self.teacher.vocab_size
            self.shared_vocab_size = shared_vocab_size or self._compare_vocabularies(self.teacher)
            if self.teacher.module is not None:
                self.teacher_model = self.teacher.module = self._place_teacher(self.teacher.module)
        self._stopwatch = telemetry.Stopwatch()
        self._window_visual_units: torch.Tensor | None = None

    # ---- construction ------------------------------------------------------------------------------------------------

    def _compare_vocabularies(self, teacher: Teacher) -> int:
        student_size, teacher_size = self._vocab_sizes
        if student_size == teacher_size:
            return student_size
        name = getattr(getattr(teacher.module, "config", None), "_name_or_path", "")
        return shared_vocabulary(student_size, teacher_size, self._tokenizer, _tokenizer_or_none(name))

    def _place_teacher(self, module: nn.Module) -> nn.Module:
        """Put the teacher where it will run. Not wrapped by DDP: it has no gradients to average."""
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(module, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(module, self.accelerator)
        if getattr(module, "hf_device_map", None) is None:
            module.to(self.accelerator.device)
        return module

    # ---- the optimizer window ----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """Collect one window, replace its answers where it is generated, and count D on what will be trained on."""
        self._stopwatch.start()
        batches = [self._drop_repeated_rows(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        on_policy = self._generates() and student_generates(self.args.seed, self.state.global_step, self.lmbda)
        if on_policy:
            batches = self._generated(batches, self.model_wrapped, self.model, "student")
        elif self._generates() and self.seq_kd:
            batches = self._generated(batches, self.teacher_model, self.teacher_model, "teacher")
        for batch in batches:
            batch["student_generated"] = on_policy
        window = self._metrics["train"]
        window["windows"].append(torch.ones(()))
        window["on_policy_windows"].append(torch.tensor(float(on_policy)))
        self._window_visual_units = self._count_visual_units(batches, device)
        return batches, self._get_num_items_in_batch(batches, device)

    def _generates(self) -> bool:
        """Only LM KD can use generated answers: CE is not taught on the student's own, and visual KD sees no text."""
        return self.knobs.lm_kd_active

    def _generated(
        self, batches: list[dict[str, Any]], wrapped: nn.Module | None, model: nn.Module | None, side: str
    ) -> list[dict[str, Any]]:
        assert wrapped is not None, "LM KD without a module to generate from"
        assert model is not None
        tokenizer = self._tokenizer
        stop_ids = stop_token_ids(getattr(self._unwrap(model), "generation_config", None), tokenizer)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0] if stop_ids else 0
        config = generation_config(stop_ids, pad_id, self.temperature, self.args.max_new_tokens)
        # Ranks hold other rows, so they sample from other states; the window and micro-batch make them new each time.
        base = f"{side}:{self.args.seed}:{self.state.global_step}:{self.accelerator.process_index}"
        generated = []
        with unwrap_model_for_generation(
            wrapped, self.accelerator, gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs
        ) as unwrapped:
            for i, batch in enumerate(batches):
                batch = self._prepare_inputs(batch)
                generated.append(generate_batch(unwrapped, batch, config, seed=_stable_seed(f"{base}:{i}")))
        return generated

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """D: the supervised tokens of the window's micro-batches on all ranks."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        local = count_supervised_in(batch_samples, device)
        return self.accelerator.gather(local[None]).sum() // self.get_tp_size()

    def _drop_repeated_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Mask the rows that accelerate repeats to fill the last batch of an epoch: no row may count twice.

        Ranks take the last rows in order, so only the first `remainder` of them, counted over the ranks, are new.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        rows = batch["labels"].shape[0]
        new = min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
        if new == rows:
            return batch
        labels = batch["labels"].clone()
        labels[new:] = IGNORE_INDEX
        return {**batch, "labels": labels}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch. The window was drawn and generated in `get_batch_samples`."""
        return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)

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
            outputs if `return_outputs`.
        """
        mode = "train" if self.model.training else "eval"
        knobs = self.knobs if mode == "train" or self.knobs.eval_kd else self.knobs.without_kd()
        student_inputs = {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_MODEL}
        predicts_BT = next_token_labels(inputs["labels"]) != IGNORE_INDEX

        visual = knobs.visual_kd if _has_images(student_inputs) else None
        with contextlib.ExitStack() as hooks:
            student_features = teacher_features = None
            if visual is not None and self.teacher_model is not None:
                student_features = hooks.enter_context(
                    capture(self._unwrap(model), visual.module_paths("student"), "student")
                )
                teacher_features = hooks.enter_context(
                    capture(self._unwrap(self.teacher_model), visual.module_paths("teacher"), "teacher")
                )
            outputs = self._run_student_forward(model, student_inputs)
            teacher_logits_NV = None
            if knobs.lm_kd_active or visual is not None:
                teacher_logits_NV = self._run_teacher_forward(student_inputs, predicts_BT)

        tokens = self._token_loss(knobs, inputs, outputs.logits, predicts_BT, teacher_logits_NV, num_items_in_batch)
        scale = world_scale(num_items_in_batch, self.accelerator.num_processes // self.get_tp_size())
        terms = self._weighted_terms(knobs, inputs, tokens, num_items_in_batch)
        loss = tokens.loss * scale
        if student_features is not None and teacher_features is not None:
            visual_terms = self._visual_terms(visual, student_features, teacher_features, inputs, num_items_in_batch)
            loss = loss + visual_terms["vision_kd_loss"] * scale
            terms |= visual_terms
        if self.aux_loss_enabled:
            terms["aux_loss"] = self._aux_term(outputs, num_items_in_batch)
            loss = loss + terms["aux_loss"] * scale
        self._record(mode, terms, tokens, inputs)
        return (loss, outputs) if return_outputs else loss

    def _run_student_forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        # Without a cache: with one, models let packed documents attend to each other, and it costs memory.
        return model(**inputs, use_cache=False, **extra)

    def _run_teacher_forward(self, inputs: Mapping[str, Any], predicts_BT: torch.Tensor) -> torch.Tensor:
        """Teacher logits [N, V] on the student's device; also fires the hooks of visual KD."""
        assert self.teacher is not None, "the loss asks for a teacher that was never built"
        with self._teacher_autocast():
            logits_NV = self.teacher.targets(inputs, predicts_BT)
        return logits_NV.to(predicts_BT.device)

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

    def _token_loss(
        self,
        knobs: Knobs,
        inputs: Mapping[str, Any],
        logits_BTV: torch.Tensor,
        predicts_BT: torch.Tensor,
        teacher_logits_NV: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
    ) -> FusedLoss:
        student_logits_NV = logits_BTV[:, :-1][predicts_BT]
        if teacher_logits_NV is not None and knobs.lm_kd_active:
            student_logits_NV, teacher_logits_NV = self._same_vocabulary(student_logits_NV, teacher_logits_NV)
        else:
            teacher_logits_NV = None
        ce_weight = 0.0 if inputs.get("student_generated", False) else knobs.ce_weight
        return dense_distillation_loss(
            student_logits_NV,
            next_token_labels(inputs["labels"])[predicts_BT],
            teacher_logits_NV,
            kd_weight=knobs.llm_kd_weight,
            ce_weight=ce_weight,
            ce_mask=_ce_mask(inputs, predicts_BT),
            beta=self.beta,
            temperature=knobs.kd_temperature,
            divergence=knobs.divergence,
            num_items=num_items,
        )

    def _same_vocabulary(
        self, student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both logits over the shared range of the vocabulary; padding beyond it takes no part."""
        sizes = student_logits_NV.shape[-1], teacher_logits_NV.shape[-1]
        if sizes != self._vocab_sizes:
            raise VocabularyError(
                f"Vocabulary sizes differ at this step: the student has {sizes[0]} logits and the teacher {sizes[1]}. "
                f"When the trainer was built they had {self._vocab_sizes[0]} and {self._vocab_sizes[1]}: "
                "do not resize a model after that."
            )
        shared = self.shared_vocab_size
        return student_logits_NV[:, :shared], teacher_logits_NV[:, :shared]

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
            terms["sft_loss"] = (0.0 if own else knobs.ce_weight) * tokens.ce_sum / denominator
        return terms

    # ---- visual KD and regularisers ----------------------------------------------------------------------------------

    def _visual_terms(
        self,
        visual: Any,
        student: Mapping[str, list[torch.Tensor]],
        teacher: Mapping[str, list[torch.Tensor]],
        inputs: Mapping[str, Any],
        num_items: torch.Tensor | int | None,
    ) -> dict[str, torch.Tensor]:
        """weight · weight_t · distance_t per target and their sum, each scaled to the batch's share of the window."""
        share: torch.Tensor | float = 1.0
        if num_items is not None and self._window_visual_units is not None:
            share = _visual_units(inputs) / self._window_visual_units.clamp(min=1)
        terms = {}
        for target, options in visual.targets.items():
            distance = feature_distance(student[target], teacher[target], options.distance, target)
            terms[f"vision_kd_loss_{target}"] = visual.weight * options.weight * share * distance
        terms["vision_kd_loss"] = torch.stack(list(terms.values())).sum()
        return terms

    def _count_visual_units(self, batches: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """Visual units of the window on all ranks: what the mean over features is taken over."""
        if self.knobs.visual_kd is None:
            return None
        local = torch.tensor(float(sum(_visual_units(batch) for batch in batches)), device=device)
        return self.accelerator.gather(local[None]).sum()

    def _aux_term(self, outputs: Any, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """The load-balancing loss of a mixture-of-experts model: a mean over micro-batches and ranks."""
        ranks = 1 if num_items is None else self.accelerator.num_processes
        steps = self.current_gradient_accumulation_steps if num_items is not None else 1
        return self.router_aux_loss_coef * outputs.aux_loss / (steps * ranks)

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
        mask = inputs.get("attention_mask")
        metrics["input_tokens"].append(
            mask.sum() if mask is not None else torch.tensor(float(inputs["input_ids"].numel()))
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the reduced training metrics to a training record, and hand it to the callbacks and trackers."""
        if "loss" in logs:
            reduced = telemetry.reduce_metrics(self._metrics["train"], self.accelerator, token_weighted=False)
            logs |= telemetry.training_metrics(reduced, self._stopwatch.lap())
            self._metrics["train"].clear()
        elif "train_runtime" in logs:
            # The summary at the end: trackers put "train/" before every key, and once is enough.
            logs = {_SUMMARY_NAMES.get(key, key.removeprefix("train_")): value for key, value in logs.items()}
        Trainer.log(self, logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm, or an error: a NaN must not reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler skips steps whose fp16 gradients overflowed, and lowers its scale: that is its job.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise NonFiniteError(self._describe_non_finite(float(norm)))
        return norm

    def _describe_non_finite(self, norm: float) -> str:
        where = f"at step {self.state.global_step + 1}, rank {self.accelerator.process_index}"
        bad = [
            key
            for key in telemetry.LOSS_TERMS
            if any(not torch.isfinite(value) for value in self._metrics["train"].get(key, ()))
        ]
        cause = f"the loss term {', '.join(bad)} is not finite" if bad else "all loss terms of this rank are finite"
        return (
            f"Non-finite gradient (norm {norm}) {where}: {cause}. The optimizer step was not taken. "
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
        inputs = self._drop_repeated_rows(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs.logits, inputs.get("labels")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Upstream's loop, with its mean of batch means replaced by means over the tokens of the whole set."""
        self._metrics["eval"].clear()
        with self._stopwatch.pause():
            output = super().evaluation_loop(*args, **kwargs)
            reduced = telemetry.reduce_metrics(self._metrics["eval"], self.accelerator, token_weighted=True)
        self._metrics["eval"].clear()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}": v for k, v in telemetry.evaluation_metrics(reduced).items()})
        return output

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._stopwatch.pause():
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights, config and tokenizer; never the pickled arguments, which nothing reads back."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(output_dir or self.args.output_dir, TRAINING_ARGS_NAME))

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere; TRL reports trainer and model type to the hub by default."""

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _unwrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model)


def _check_teacher_arguments(teacher_model: Any, teacher: Teacher | None, knobs: Knobs) -> None:
    if teacher_model is not None and teacher is not None:
        raise ValueError("Pass either teacher_model or teacher, not both.")
    if knobs.needs_teacher and teacher_model is None and teacher is None:
        raise ValueError(
            f"llm_kd_weight is {knobs.llm_kd_weight} and visual KD is {'on' if knobs.visual_kd else 'off'}: this needs "
            "a teacher. Pass teacher_model (rlhf.teacher_model), or set llm_kd_weight to 0 for supervised training."
        )
    if not knobs.needs_teacher and (teacher_model is not None or teacher is not None):
        logger.warning("No KD is active (llm_kd_weight is 0, visual KD is off): the teacher is not used.")


def _local_teacher(teacher_model: PreTrainedModel | nn.Module | str | None, args: GKDConfig) -> Teacher:
    if isinstance(teacher_model, str):
        return build_teacher(
            teacher_model,
            init_kwargs=args.teacher_model_init_kwargs,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
    assert teacher_model is not None
    return LocalTeacher(teacher_model)


def _tokenizer_or_none(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, where it can be had; its absence is reported by the comparison."""
    from kdtrain.errors import PreflightError
    from kdtrain.models import load_tokenizer

    if not name:
        return None
    try:
        return load_tokenizer(name)
    except PreflightError:
        return None


def _ce_mask(inputs: Mapping[str, Any], predicts_BT: torch.Tensor) -> torch.Tensor | None:
    """[N] bool: supervised tokens of rows that contribute cross-entropy; None is all."""
    rows = inputs.get("ce_rows")
    if rows is None:
        return None
    return rows.to(predicts_BT.device)[:, None].expand_as(predicts_BT)[predicts_BT]


def _has_images(inputs: Mapping[str, Any]) -> bool:
    return any(key.startswith("pixel_values") and value is not None for key, value in inputs.items())


def _visual_units(batch: Mapping[str, Any]) -> float:
    """What a mean over image features weighs a batch by: patches where the batch says how many, images elsewhere."""
    units = 0.0
    for key in ("image_grid_thw", "video_grid_thw"):
        if batch.get(key) is not None:
            units += float(batch[key].prod(-1).sum())
    if units:
        return units
    return float(
        sum(len(value) for key, value in batch.items() if key.startswith("pixel_values") and value is not None)
    )


def _stable_seed(text: str) -> int:
    """A 63-bit seed that is the same in every process; Python's own hash is not."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
