"""Loading what turns rows into a model's inputs: tokenizers, and the processors of vision-language models."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Mapping
from typing import Any, Literal

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config.adapters import model_below, nearest_with
from kdtrain.data.multimodal import missing_setting
from kdtrain.errors import PreflightError
from kdtrain.models.hub import require_model
from kdtrain.models.kinds import sees_images
from kdtrain.models.loading import first_line, load_config, trust_policy

# What a processor is made of, and what only a single call of it may say: no settings.
_PARTS = frozenset({"self", "image_processor", "tokenizer", "video_processor", "feature_extractor", "chat_template"})
_PARTS |= {"args", "kwargs"}
_OF_ONE_CALL = frozenset({"device", "return_tensors", "data_format", "input_data_format", "disable_grouping"})


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; of an adapter without one, its base's."""
    name = nearest_with(name, "tokenizer_config.json")
    require_model(name, revision)
    try:
        return _without_places(AutoTokenizer.from_pretrained(name, **trust_policy(trust_remote_code, revision)))
    except Exception as error:  # the Rust half of tokenizers raises Exception itself
        raise PreflightError(f"No tokenizer could be loaded from {name}: {first_line(error)}") from error


def load_processing(
    name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
    side: Literal["student", "teacher"] | None = None,
    model_config: PreTrainedConfig | None = None,
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What turns rows into inputs: a vision-language model's processor, a text model's tokenizer.

    Args:
        processor_kwargs: settings in place of those saved with the processor, which has them from then on.
        side: whose it is, for messages.
        model_config: of the model, where that is loaded already: then an adapter's base is not looked for.
    """
    settings = dict(processor_kwargs or {})
    option = "rlhf.teacher.processor_kwargs" if side == "teacher" else "data.processor_kwargs"
    policy = trust_policy(trust_remote_code, revision)
    if not sees_images(model_config or load_config(model_below(name), policy)):
        if settings:
            raise PreflightError(
                f"{name} reads text alone, and there are settings of an image processor for it. Remove {option}"
                + (", or set it to {} where data.processor_kwargs is for the student." if side == "teacher" else ".")
            )
        return load_tokenizer(name, trust_remote_code=trust_remote_code, revision=revision)
    name = nearest_with(name, "preprocessor_config.json", "processor_config.json")
    try:
        processor = AutoProcessor.from_pretrained(name, **policy, **settings)
    except ImportError as error:
        raise PreflightError(
            f"The processor of {name} needs a package that is not installed: {first_line(error)} "
            "Install kdtrain[vision], and kdtrain[torchvision] in the version that fits your torch."
        ) from error
    except Exception as error:
        beside = f" with {option} {settings}" if settings else ""
        raise PreflightError(f"No processor could be loaded from {name}{beside}: {first_line(error)}") from error
    if not isinstance(processor, ProcessorMixin):
        raise PreflightError(
            f"{name} is a vision-language model without a processor: its folder lacks processor_config.json or "
            "preprocessor_config.json. Save the processor of the model it came from into it."
        )
    _without_places(processor.tokenizer)
    _check_settings(processor, name, settings, option)
    if missing := missing_setting(processor):
        whose = f"The {side}'s" if side else "The"
        raise PreflightError(
            f"{whose} processor has no {missing}, without which it cannot count an image's tokens. Write it into "
            f"{os.path.join(name, 'processor_config.json')}{_of_model(name, policy, missing)}."
        )
    return processor


def _without_places(tokenizer: Any) -> Any:
    """Without how it was loaded, which transformers would save as if it were the tokenizer's own."""
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _check_settings(processor: ProcessorMixin, name: str, settings: Mapping[str, Any], option: str) -> None:
    """Refuses what would change nothing, without a word: unknown names, and what the processor's class sets itself."""
    known = {*inspect.signature(type(processor).__init__).parameters} - _PARTS
    images = getattr(processor, "image_processor", None)
    valid = getattr(images, "valid_kwargs", None)
    known |= set(images.to_dict() if valid is None else valid.__annotations__) - _OF_ONE_CALL if images else set()
    for unknown in (one for one in settings if one not in known):
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(sorted(known))}."
        raise PreflightError(f"{option}: the {type(processor).__name__} of {name} has no setting {unknown}. {hint}")
    own = getattr(processor, "images_kwargs", {})
    for fixed in (one for one, value in settings.items() if own.get(one, value) != value):
        raise PreflightError(
            f"{option}: a {type(processor).__name__} sets {fixed} to {own[fixed]} at every call, whatever its settings "
            f"say, and once saved it would do so again. Remove {fixed}."
        )


def _of_model(name: str, policy: Mapping[str, Any], setting: str) -> str:
    value = getattr(getattr(load_config(model_below(name), policy), "vision_config", None), setting, None)
    return f" (the model's is {value})" if value else ""
