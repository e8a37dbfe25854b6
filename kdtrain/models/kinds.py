"""What kind of model a config describes, before a weight is read: which are refused, and which read images."""

from __future__ import annotations

import re

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from kdtrain.errors import NotAvailableError, PreflightError

WHAT_IS_NEEDED = (
    "Student and teacher have to predict the next token from those before it: a class that ends in ForCausalLM, or a "
    "vision-language model of that kind."
)
# Heads that predict something else than the next token. Masked ones are found by their forward where a config says that
# the model was made a decoder since.
_OTHER_HEAD = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|NextSentencePrediction"
    r"|ImageClassification|MaskedLM|PreTraining)$|RewardModel$"
)


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a config is that of a vision-language model, which reads images beside text."""
    if config.get_text_config() is config:
        return False
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return True
    raise NotAvailableError(
        f"A {config.model_type} model is neither a text model nor a vision-language model that transformers loads as "
        "AutoModelForImageTextToText: not available yet."
    )


def refuse_other_kinds(name: str, config: PreTrainedConfig) -> None:
    """Refuse a head that is no language model's: transformers would put a random one for the vocabulary there."""
    kind = _other_kind(config)
    if kind is not None:
        raise PreflightError(f"{name} is {kind}. {WHAT_IS_NEEDED}")


def _other_kind(config: PreTrainedConfig) -> str | None:
    architecture = next(iter(getattr(config, "architectures", None) or ()), type(config).__name__)
    try:
        text = config.get_text_config()
    except ValueError:  # it has several
        return f"a {config.model_type} model, which is neither one of text nor one of text and images"
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return f"an encoder-decoder model ({architecture})"
    head = _OTHER_HEAD.search(architecture)
    if head and not (head[1] in ("MaskedLM", "PreTraining") and getattr(config, "is_decoder", False)):
        return f"a model with another head than that of a language model ({architecture})"
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known and not has_own_code and text is config:
        return f"a {config.model_type} model, of which transformers has no causal language model"
    return None
