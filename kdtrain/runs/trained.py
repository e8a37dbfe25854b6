"""The student that a run has made."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from kdtrain.config.adapters import is_adapter_folder
from kdtrain.models.loading import add_adapter, load_config, resolve_dtype, trust_policy
from kdtrain.models.merging import merge_adapter
from kdtrain.runs.open_run import TrainedRun, open_run
from kdtrain.runs.student import load_base, load_trained_weights, rounded, student_config

__all__ = ["TrainedRun", "load_alone", "load_trained", "open_run"]


def load_trained(run: TrainedRun, device: torch.device) -> PreTrainedModel | PeftModel:
    """The student that a run has made, as it was trained: its own weights, or its adapter on what it began with."""
    if is_adapter_folder(str(run.model)):
        return add_adapter(load_base(run.config, device), str(run.model))
    return rounded(run.config, load_trained_weights(run.config, device, run.model))


def load_alone(run: TrainedRun, dtype: str) -> PreTrainedModel:
    """The student that a run has made, without an adapter, on the CPU.

    Args:
        dtype: of the weights; "auto" is what the base of an adapter is stored in, and a student that was trained in
            full is saved in. An adapter is added to its base in float32, and the sum rounded to it.
    """
    cpu, options = torch.device("cpu"), run.config.model
    # Kernels of attention are not needed to save, and those of a GPU are not to be had here. An adapter of a quantised
    # model is merged into its weights as they were before: into quantised ones it would be rounded away.
    whole = options.model_copy(update={"attn_implementation": None, "quantization": None})
    config = run.config.model_copy(update={"model": whole})
    if not is_adapter_folder(str(run.model)):
        saved = load_config(str(run.model), trust_policy(options.trust_remote_code)).dtype
        return load_trained_weights(config, cpu, run.model, _named(saved) if dtype == "auto" else dtype)
    stored = student_config(config).dtype or torch.float32
    wanted = stored if dtype == "auto" else resolve_dtype(dtype, stored, False)
    trained_on = stored if options.dtype == "auto" else resolve_dtype(options.dtype, stored, False)
    base = load_base(config, cpu, _named(torch.promote_types(trained_on, wanted)))
    return merge_adapter(add_adapter(base, str(run.model)), wanted)


def _named(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")
