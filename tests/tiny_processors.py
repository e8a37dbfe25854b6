"""Real processors of vision-language families, built without a network, with a tiny tokenizer and pictures for them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
)

from tests import tiny

_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_SOFT = "<image_soft_token>"


def parts_template(image: str, markers: bool = True) -> str:
    """ChatML over content parts, as templates of vision models are written; plain strings render as well."""
    begin, end = ("{% generation %}", "{% endgeneration %}") if markers else ("", "")
    content = (
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'image' %}{{ '" + image + "' }}{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    )
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        + begin
        + content
        + "{{ '<|im_end|>' }}"
        + end
        + "{% else %}"
        + content
        + "{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def make_tokenizer(*added: str, **tokens: str) -> PreTrainedTokenizerFast:
    """The tiny one with more special tokens, those of `tokens` also as attributes of these names."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([*added, *tokens.values()], special_tokens=True)
    # What a tokenizer class names its model's inputs; the generic one would add token_type_ids for every family.
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=tokens,
        model_input_names=names,
        chat_template=tokenizer.chat_template,
    )


def make_llava(size: int = 32, patch: int = 8, markers: bool = True, **image: Any) -> LlavaProcessor:
    """(size / patch)² tokens per image; `image` are settings of the image processor."""
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **image),
        make_tokenizer("<image>"),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=parts_template("<image>\\n", markers),
    )


def images_only(kind: Any) -> Any:
    """A processor's class without its video processor, whose import wants torchvision; images go the same way."""

    def __init__(self: Any, image_processor: Any, tokenizer: Any, chat_template: Any = None, **settings: Any) -> None:
        kind.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **settings)

    return type(f"{kind.__name__}ImagesOnly", (kind,), {"__init__": __init__})


_Qwen3VLImagesOnly = images_only(Qwen3VLProcessor)


class _OnlyForRegistering(PreTrainedConfig):
    """A processor is registered with a config; `AutoProcessor` finds it by its name."""


AutoProcessor.register(_OnlyForRegistering, _Qwen3VLImagesOnly)


def make_qwen_of(kind: Any, markers: bool = True) -> Any:
    return kind(
        Qwen2VLImageProcessorPil(
            patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
        ),
        make_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        chat_template=parts_template(_QWEN_IMAGE, markers),
    )


def make_qwen(markers: bool = True) -> Qwen2_5_VLProcessor:
    """A token per 16 × 16 pixels, so that larger images take more of them."""
    return make_qwen_of(images_only(Qwen2_5_VLProcessor), markers)


def make_qwen3(markers: bool = True) -> Qwen3VLProcessor:
    """The same for Qwen3-VL."""
    return make_qwen_of(_Qwen3VLImagesOnly, markers)


def make_idefics3(split: bool = True, markers: bool = True, **image: Any) -> Idefics3Processor:
    """With `split`, images are cut into tiles of 32 × 32 pixels and one global view, of four tokens each."""
    grid = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    try:
        tiles = Idefics3ImageProcessorPil(do_image_splitting=split, **sizes, **image)
    except ImportError as error:  # transformers before 5.18 wants torchvision even for the one without it
        pytest.skip(str(error))
    return Idefics3Processor(
        tiles,
        make_tokenizer("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *grid),
        image_seq_len=4,
        chat_template=parts_template("<image>", markers),
    )


def make_gemma3(markers: bool = True) -> Gemma3Processor:
    """The expansion begins and ends with line breaks, and contains the placeholder again."""
    tokenizer = make_tokenizer(
        "\n\n", "\n\n\n", image_token=_SOFT, boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=parts_template("<start_of_image>", markers),
        image_seq_length=4,
    )


def make_onevision(markers: bool = True) -> LlavaOnevisionProcessor:
    """A row's only image is cut into tiles; of several each is one tile."""
    grid = [[32, 64], [64, 32], [64, 64]]
    return images_only(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grid),
        make_tokenizer("<image>", "<video>"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=parts_template("<image>\\n", markers),
    )


FAMILIES = {
    "llava": make_llava,
    "qwen": make_qwen,
    "idefics3": make_idefics3,
    "gemma3": make_gemma3,
    "onevision": make_onevision,
}


def make_llava_model(vocab_size: int, seed: int = 0, vision: int = 32, text: int = 32) -> LlavaForConditionalGeneration:
    """Fits `make_llava()`: 32 × 32 pixels in patches of 8; `vision` and `text` are the widths of its two parts."""
    torch.manual_seed(seed)
    vision_config = CLIPVisionConfig(
        hidden_size=vision,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text_config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=text,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=2,
        pad_token_id=3,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=320, image_token_id=320
    )
    return LlavaForConditionalGeneration(config)


def picture(seed: int = 0, width: int = 40, height: int = 32) -> Image.Image:
    """Noise: no two alike, and none that an image processor could take for padding."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy(), "RGB")


def png(seed: int = 0, width: int = 40, height: int = 32) -> bytes:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, "PNG")
    return buffer.getvalue()


def make_model(family: str, processor: Any, seed: int = 0, width: int = 32) -> Any:
    """A model of some ten thousand parameters that fits `FAMILIES[family]()`; `width` is that of both its parts."""
    torch.manual_seed(seed)
    vocabulary, heads = len(processor.tokenizer), width // 16
    if family == "llava":
        return make_llava_model(vocabulary, seed, width, width)
    text = {"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": 1, "hidden_size": width}
    text |= {"intermediate_size": 64, "initializer_range": 0.2, "vocab_size": vocabulary, "pad_token_id": 3}
    tower = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": heads, "image_size": 32}
    tower |= {"patch_size": 8}
    if family == "idefics3":
        image = processor.image_token_id
        vision = {**tower, "model_type": "idefics3_vision", "num_hidden_layers": 2}
        config = Idefics3Config(
            vision_config=vision, text_config={"model_type": "llama", **text}, image_token_id=image, scale_factor=2
        )
        return Idefics3ForConditionalGeneration(config)
    if family == "onevision":
        config = LlavaOnevisionConfig(
            vision_config={**tower, "model_type": "siglip_vision_model", "num_hidden_layers": 2},
            text_config={"model_type": "qwen2", **text, "max_position_embeddings": 1024},
            image_token_index=processor.image_token_id,
            image_token_id=processor.image_token_id,
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
        return LlavaOnevisionForConditionalGeneration(config)
    if family == "gemma3":
        vision = {**tower, "model_type": "siglip_vision_model", "num_hidden_layers": 2, "vision_use_head": False}
        config = Gemma3Config(
            vision_config=vision,
            text_config={**text, "head_dim": 16, "sliding_window": 64},
            mm_tokens_per_image=4,
            image_token_index=processor.tokenizer.image_token_id,
            image_token_id=processor.tokenizer.image_token_id,
        )
        model = Gemma3ForConditionalGeneration(config)
        # transformers starts it at zero, and every image would look the same.
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
        return model
    vision = {"depth": 2, "hidden_size": width, "intermediate_size": 64, "num_heads": heads, "patch_size": 8}
    vision |= {"out_hidden_size": width, "window_size": 32, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**text, "rope_parameters": rope, "max_position_embeddings": 512},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)
