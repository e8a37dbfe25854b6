"""Loading what turns rows into a model's inputs: tokenizers, and the processors of vision-language models."""

from __future__ import annotations

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config.adapters import adapter_base, has_file, is_adapter_folder
from kdtrain.errors import PreflightError
from kdtrain.models.kinds import sees_images
from kdtrain.models.loading import first_line, load_config, trust_policy


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; of an adapter without one, its base's."""
    if is_adapter_folder(name) and not has_file(name, "tokenizer_config.json"):
        name = adapter_base(name)
    try:
        return AutoTokenizer.from_pretrained(name, **trust_policy(trust_remote_code, revision))
    except Exception as error:  # the Rust half of tokenizers raises Exception itself
        raise PreflightError(f"No tokenizer could be loaded from {name}: {first_line(error)}") from error


def load_processing(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What turns rows into inputs: a vision-language model's processor, a text model's tokenizer."""
    policy = trust_policy(trust_remote_code, revision)
    adapter = is_adapter_folder(name)
    if not sees_images(load_config(adapter_base(name) if adapter else name, policy)):
        return load_tokenizer(name, trust_remote_code=trust_remote_code, revision=revision)
    if adapter and not has_file(name, "preprocessor_config.json"):
        name = adapter_base(name)
    try:
        processor = AutoProcessor.from_pretrained(name, **policy)
    except ImportError as error:
        raise PreflightError(
            f"The processor of {name} needs a package that is not installed: {first_line(error)} "
            "Install kdtrain[vision], and kdtrain[torchvision] in the version that fits your torch."
        ) from error
    except Exception as error:
        raise PreflightError(f"No processor could be loaded from {name}: {first_line(error)}") from error
    if not isinstance(processor, ProcessorMixin):
        raise PreflightError(
            f"{name} is a vision-language model without a processor: its folder lacks processor_config.json or "
            "preprocessor_config.json. Save the processor of the model it came from into it."
        )
    return processor
