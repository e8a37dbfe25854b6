"""Models whose weights bitsandbytes has quantised to 4 or 8 bit: how they are loaded, and what of them is trained.

4 bit is NF4 with its scales quantised as well, as in QLoRA (arXiv 2305.14314): about 0.52 bytes a weight. Products are
computed in the dtype of the weights that stay whole. 8 bit is LLM.int8() (arXiv 2208.07339): each product rounds
its input row by row to 8 bit, but for columns with a value above 6, which are found over all rows of a batch: a row's
numbers depend a little on the rows beside it.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.errors import NotAvailableError, PreflightError
from kdtrain.models.kinds import sees_images

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Bits = Literal["4bit", "8bit"]

BYTES: Mapping[Bits, float] = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Of a quantised weight. 4 bit: half a byte, a scale of one byte for 64 weights, and one of four for 256 scales."""


def bits_and_bytes(
    name: str, bits: Bits, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> BitsAndBytesConfig:
    """The `quantization_config` of `from_pretrained`.

    Args:
        name: of the model, for the message.
        config: of the model.
        dtype: of the weights that stay whole, and of the products.

    Raises:
        PreflightError: the model's weights are quantised already.
    """
    from transformers import BitsAndBytesConfig

    if getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None):
        raise PreflightError(
            f"The weights of {name} are quantised already (quantization_config in its config.json): they cannot be "
            f"quantised to {bits} once more. Remove the option quantization, or name the model before it was quantised."
        )
    whole = kept_whole(empty_model(config, dtype, trust_remote_code))
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,
    )


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False, **options: Any) -> Any:
    """A model on the meta device: its modules, and no numbers."""
    auto = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    config = copy.deepcopy(config)  # a class may write into it
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)


def kept_whole(model: PreTrainedModel) -> list[str]:
    """Modules that are not quantised: all with linear layers outside of the language model's own layers.

    These are the head, which the loss reads, and of a vision-language model the encoder and the projector: they are a
    small part of the weights, and what is lost in them is lost for every token.
    """
    decoder = model.get_decoder()
    return sorted(_outside(model, decoder, ""))


def _outside(module: nn.Module, decoder: nn.Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        if child is decoder:
            continue
        below = f"{path}{name}"
        if any(inner is decoder for inner in child.modules()):
            yield from _outside(child, decoder, f"{below}.")
        elif any(isinstance(inner, nn.Linear) for inner in child.modules()):
            yield below


def quantized_names(model: PreTrainedModel) -> set[str]:
    """Parameters of a model that is not quantised yet which would be."""
    skipped = kept_whole(model)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(name == one or name.startswith(f"{one}.") for one in skipped)
    }


def settle(model: nn.Module) -> None:
    """Keep away, once a model is loaded, what bitsandbytes does by the processor and what it says at every product."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        # Where a processor has bf16 instructions, a 4-bit layer would lay its weights out anew at its first forward
        # without gradients, compute in bf16 from then on, and have no backward pass any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    log = logging.getLogger("bitsandbytes.autograd._functions")
    if _is_news not in log.filters:
        log.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not the one line that 8-bit products log at every call, that they round their input to float16."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def bits_of(model: nn.Module | None) -> Bits | None:
    """What bitsandbytes has quantised a model to, adapter or not; None where it has not."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(base, "is_loaded_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(base, "is_loaded_in_8bit", False) else None


def weight_types(model: Any) -> str:
    """The dtype of a model's weights, for people; of a quantised one how many bits, and the dtype of the rest."""
    bits = bits_of(model)
    return str(model.dtype) if bits is None else f"{bits}, the rest {model.dtype}"


def bits_said(options: Any) -> Bits | None:
    """What a `quantization_config`, of `from_pretrained` or of a config.json, has bitsandbytes do; None for others."""
    said: Mapping[str, Any] = options if isinstance(options, Mapping) else {}
    if said.get("load_in_4bit"):
        return "4bit"
    return "8bit" if said.get("load_in_8bit") else None


def size_of(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds: two 4-bit ones lie in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def refuse_pieces(name: str, bits: str | None) -> None:
    """Refuse quantised weights where ZeRO-3 cuts every model into pieces as it is loaded.

    Raises:
        NotAvailableError: of a quantised model under ZeRO-3.
    """
    if bits is not None and is_deepspeed_zero3_enabled():
        raise NotAvailableError(
            f"{name} is quantised ({bits}), and DeepSpeed ZeRO-3 cannot cut such weights into pieces. Use ZeRO-2 or "
            "plain data parallelism, where each device holds them whole, or load it without quantisation."
        )


def refuse_fsdp(model: nn.Module, accelerator: Any) -> None:
    """Refuse a quantised student that FSDP would cut into pieces; a teacher stays whole.

    Raises:
        NotAvailableError: of a quantised student under FSDP.
    """
    bits = bits_of(model)
    if bits is not None and getattr(accelerator.state, "fsdp_plugin", None) is not None:
        raise NotAvailableError(
            f"A quantised student ({bits}) is not available under FSDP, which cannot cut such weights into pieces. Use "
            "plain data parallelism or ZeRO-2, where each device holds them whole, or load it without quantisation."
        )


def refuse_trained_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse `modules_to_save` that are quantised: a copy that is trained needs weights with gradients.

    Raises:
        PreflightError: a module is quantised, or has a quantised one in it.
    """
    quantized = {name for name, p in model.named_parameters() if not p.is_floating_point()}
    for name in names if bits_of(model) is not None else ():
        inside = re.compile(rf"(?:^|\.){re.escape(name)}\.")
        if any(inside.search(f"{parameter}.") for parameter in quantized):
            raise PreflightError(
                f"modules_to_save: {name!r} has quantised weights, which cannot be trained. Leave it out, and let an "
                "adapter reach it (target_modules), or load the student without quantisation."
            )


def require_adapter(model: nn.Module, has_adapter: bool) -> None:
    """Refuse to train quantised weights themselves.

    Raises:
        PreflightError: of a quantised model without an adapter.
    """
    bits = bits_of(model)
    if bits is not None and not has_adapter:
        raise PreflightError(
            f"The student's weights are quantised ({bits}) and have no gradients: only an adapter on them can be "
            "trained. Set tuner.train_type: lora (pass a peft_config), or load the model without quantisation."
        )
