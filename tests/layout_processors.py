"""For every family of the layout table the processor that its checkpoints name, with a tiny tokenizer. No network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from transformers import (
    GotOcr2ImageProcessorPil,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    InternVLProcessor,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PixtralImageProcessorPil,
    ProcessorMixin,
    Qwen2VLProcessor,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from tests import tiny_processors as vision
from tests.tiny_processors import images_only, make_tokenizer, parts_template

_LLAVA = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def make_qwen2_vl() -> Qwen2VLProcessor:
    return vision.make_qwen_of(images_only(Qwen2VLProcessor))


def make_padded_llava() -> LlavaProcessor:
    """LLaVA's own image processor, which pads to a square."""
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    template = parts_template("<image>\\n")
    images = LlavaImageProcessorPil(**sizes, do_pad=True)
    return LlavaProcessor(images, make_tokenizer("<image>"), **_LLAVA, chat_template=template)


def make_llava_next() -> LlavaNextProcessor:
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    images = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
    template = parts_template("<image>\\n")
    return LlavaNextProcessor(images, make_tokenizer("<image>"), **_LLAVA, chat_template=template)


def make_idefics2() -> Idefics2Processor:
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}, do_image_splitting=False)
    tokenizer = make_tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    return Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=parts_template("<image>"))


def make_smolvlm() -> SmolVLMProcessor:
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    grid = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tokenizer = make_tokenizer("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *grid)
    kind = images_only(SmolVLMProcessor)
    kind.apply_chat_template = ProcessorMixin.apply_chat_template  # its own asks the video processor
    with patch("transformers.models.smolvlm.processing_smolvlm.num2words", str):  # a package that names frames
        return kind(
            SmolVLMImageProcessorPil(**sizes), tokenizer, image_seq_len=4, chat_template=parts_template("<image>")
        )


def make_internvl() -> InternVLProcessor:
    tokens = {"start_image_token": "<img>", "end_image_token": "</img>"}
    tokens |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)
    template = parts_template("<IMG_CONTEXT>\\n")
    return images_only(InternVLProcessor)(images, make_tokenizer(**tokens), image_seq_length=4, chat_template=template)


def make_paligemma() -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 4
    tokenizer = make_tokenizer(image_token="<image>")
    tokenizer.bos_token = "<|endoftext|>"
    return PaliGemmaProcessor(images, tokenizer, chat_template=parts_template("<image>"))


def make_pixtral(merge: int = 1) -> Any:
    """`merge` patches along each side make a token: Pixtral's 1, that of Mistral 3 is 2."""
    from transformers.models.pixtral import image_processing_pil_pixtral

    # What its module takes of the other half, which wants torchvision, is there in this one as well.
    half = "transformers.models.pixtral.image_processing_pixtral"
    with patch.dict(sys.modules, {half: image_processing_pil_pixtral}):
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    return PixtralProcessor(
        PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        patch_size=8,
        spatial_merge_size=merge,
        chat_template=parts_template("[IMG]"),
    )


def make_mistral3() -> Any:
    return make_pixtral(2)


BY_MODEL_TYPE: dict[str, tuple[Callable[[], Any], ...]] = {
    "qwen2_vl": (make_qwen2_vl,),
    "qwen2_5_vl": (vision.make_qwen,),
    "qwen3_vl": (vision.make_qwen3,),
    "qwen3_vl_moe": (vision.make_qwen3,),
    "qwen3_5": (vision.make_qwen3,),
    "qwen3_5_moe": (vision.make_qwen3,),
    "llava": (vision.make_llava, make_padded_llava, make_pixtral),  # Pixtral is a LLaVA with another tower
    "llava_next": (make_llava_next,),
    "llava_onevision": (vision.make_onevision,),
    "idefics2": (make_idefics2,),
    "idefics3": (vision.make_idefics3,),
    "smolvlm": (make_smolvlm, vision.make_idefics3),  # the first SmolVLM's is Idefics3's
    "gemma3": (vision.make_gemma3,),
    "paligemma": (make_paligemma,),
    "mistral3": (make_mistral3,),
    "internvl": (make_internvl,),
}
"""`config.model_type` -> how the processors of its checkpoints are made here."""

MAKERS = {make.__name__.removeprefix("make_"): make for makers in BY_MODEL_TYPE.values() for make in makers}
