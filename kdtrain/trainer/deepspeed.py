"""DeepSpeed: what it needs beside its config, and what would otherwise go wrong silently.

transformers and accelerate hand the config over. What is here: the process group that ZeRO-3 looks for before the first
model is loaded, settings under which a run would end without its weights, and the optimizer step, which DeepSpeed takes
within `backward`, before transformers has seen the gradient norm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.errors import NotAvailableError, PreflightError
from kdtrain.ranks import under_launcher

logger = logging.getLogger(__name__)

_GATHER = "stage3_gather_16bit_weights_on_model_save"


def prepare_deepspeed_run(args: TrainingArguments) -> None:
    """Join DeepSpeed's ranks and check its config; nothing of a run without DeepSpeed.

    The config is that of `training.deepspeed`, or what `accelerate launch` has made of accelerate's own file.

    To be called after `args.device`, which joins the process group, and before the first model is loaded: ZeRO-3 cuts
    models into pieces while they are loaded.
    """
    if args.deepspeed_plugin is None:
        return
    if not under_launcher():
        raise PreflightError(
            "training.deepspeed needs a launcher, for one process too: set launch.num_processes above 1, or start with "
            "`torchrun --nproc_per_node 1 -m kdtrain fit CONFIG`."
        )
    config = args.deepspeed_plugin.hf_ds_config
    if is_deepspeed_zero3_enabled() and not config.is_true(f"zero_optimization.{_GATHER}"):
        where = f'"{_GATHER}": true under "zero_optimization" of training.deepspeed'
        raise PreflightError(
            "ZeRO-3 would save its pieces and no model.safetensors, so that the run would end without a model. Set "
            f"{where if args.deepspeed else 'zero3_save_16bit_model: true in launch.config_file'}."
        )
    if args.device.type == "cpu" and torch.distributed.is_initialized():
        import deepspeed

        # On a GPU accelerate does this. Without it ZeRO-3 takes each process for the only one.
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def guard_steps(engine: Any, accelerator: Accelerator, refuse: Callable[[Any], BaseException]) -> None:
    """Raise `refuse(norm)` instead of an optimizer step whose gradient is not finite, on all ranks alike.

    Most of DeepSpeed's optimizers skip such a step themselves: with fp16 they lower their loss scale, which is not an
    error, and otherwise transformers gets the norm afterwards. Stage 0, and ZeRO-1 and 2 in bf16 with
    `check_grad_overflow` off, would take it.

    Args:
        engine: DeepSpeed's, of the student.
        refuse: makes the error, from the gradient norm or None.
    """
    if engine.basic_optimizer is None:  # transformers made the engine for the evaluation
        raise NotAvailableError(
            "evaluate() before train() is not available under DeepSpeed: transformers then trains without an "
            "optimizer. Set eval_on_start, or evaluate with another trainer."
        )
    if not hasattr(engine.optimizer, "_global_grad_norm"):
        logger.warning(
            "DeepSpeed's stage 0 tells no gradient norm: grad_norm is not logged. Without training.deepspeed the same "
            "training logs it."
        )

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        norm = getattr(engine.optimizer, "_global_grad_norm", None)
        if norm is not None:
            bad = bool(torch.as_tensor(not_a_norm(norm)))
        else:  # each rank may see a part of the gradients only
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            mine = any(not bool(torch.isfinite(gradient).all()) for gradient in gradients)
            bad = bool(accelerator.gather(torch.tensor([mine], device=accelerator.device)).any())
        if bad:
            raise refuse(norm)

    engine.basic_optimizer.register_step_pre_hook(before_step)


def not_a_norm(norm: torch.Tensor | float) -> torch.Tensor | bool:
    """Whether a norm stands for a gradient that is not finite; some of DeepSpeed's optimizers return −1 for it. A
    tensor where the norm is one."""
    if isinstance(norm, torch.Tensor):
        return ~torch.isfinite(norm) | (norm < 0)
    return not math.isfinite(norm) or norm < 0
