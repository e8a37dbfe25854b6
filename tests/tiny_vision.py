"""Tiny real vision-language models of every family in the layout table, and inputs for them without a processor.

Images are 32×32 pixels in patches of 8: 16 patches each. Initial weights are large enough for features to differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from kdtrain.config.options import VisualKdConfig, VisualTarget
from kdtrain.feature_kd.hooks import tapped
from kdtrain.feature_kd.term import feature_terms

IMAGE, VIDEO, VISION_START = 300, 301, 302
VOCABULARY = 320
IMAGE_SIZE, PATCH = 32, 8
INIT = 0.15


def _text(width: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": INIT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _tower(width: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "initializer_range": INIT,
        **more,
    }


def _qwen_tower(width: int, **more: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": INIT,
        "hidden_size": width,
        **more,
    }


_QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START}
_QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}


def _qwen2_vl(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    vision_config = {**_qwen_tower(text), "embed_dim": vision, "mlp_ratio": 2, **tower}
    text_config = _text(text, num_attention_heads=4, **_QWEN_ROPE)
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text_config, vision_config=vision_config, **_QWEN_TOKENS)
    )


def _qwen2_5_vl(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    # A window of 16 pixels holds one block of 2 × 2 patches; the second layer looks at the whole image.
    own = {"intermediate_size": 2 * vision, "out_hidden_size": text, "window_size": 32, "fullatt_block_indexes": [1]}
    text_config = _text(text, num_attention_heads=4, **_QWEN_ROPE)
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=text_config, vision_config={**_qwen_tower(vision), **own, **tower}, **_QWEN_TOKENS
        )
    )


def _qwen3_tower(vision: int, text: int, tower: dict[str, Any]) -> dict[str, Any]:
    own = {
        "intermediate_size": 2 * vision,
        "out_hidden_size": text,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    return {**_qwen_tower(vision), **own, **tower}


def _qwen3_vl(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    text_config = _text(text, head_dim=16, **_QWEN_ROPE)
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config=text_config, vision_config=_qwen3_tower(vision, text, tower), **_QWEN_TOKENS)
    )


def _qwen3_vl_moe(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    text_config = _text(
        text, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=text, **_QWEN_ROPE
    )
    model = hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(text_config=text_config, vision_config=_qwen3_tower(vision, text, tower), **_QWEN_TOKENS)
    )
    model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def _qwen3_5_text(text: int) -> dict[str, Any]:
    linear = {f"linear_{kind}_head_dim": 16 for kind in ("key", "value")}
    linear |= {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
    rope = {"rope_parameters": {**_QWEN_ROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
    return _text(text, head_dim=16, layer_types=["linear_attention", "full_attention"], **linear, **rope)


def _qwen3_5(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    vision_config = _qwen3_tower(vision, text, tower)
    vision_config.pop("deepstack_visual_indexes")
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config=_qwen3_5_text(text), vision_config=vision_config, **_QWEN_TOKENS)
    )


def _qwen3_5_moe(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    vision_config = _qwen3_tower(vision, text, tower)
    vision_config.pop("deepstack_visual_indexes")
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": text}
    text_config = _qwen3_5_text(text) | experts | {"shared_expert_intermediate_size": text}
    model = hf.Qwen3_5MoeForConditionalGeneration(
        hf.Qwen3_5MoeConfig(text_config=text_config, vision_config=vision_config, **_QWEN_TOKENS)
    )
    model.set_experts_implementation("eager")
    return model


def _llava(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_tower(vision, **tower)),
            text_config=hf.LlamaConfig(**_text(text)),
            image_token_index=IMAGE,
        )
    )


def _llava_next(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**_tower(vision, **tower)),
            text_config=hf.LlamaConfig(**_text(text)),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[32, 64], [64, 32]],
        )
    )


def _llava_onevision(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**_tower(vision, vision_use_head=False, **tower)),
            text_config=hf.Qwen2Config(**_text(text)),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[32, 64], [64, 32]],
        )
    )


def _idefics2(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    perceiver = {
        "hidden_size": text,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
        "initializer_range": INIT,
    }
    return hf.Idefics2ForConditionalGeneration(
        hf.Idefics2Config(
            vision_config=_tower(vision, **tower),
            perceiver_config=perceiver,
            text_config=hf.MistralConfig(**_text(text)),
            image_token_id=IMAGE,
        )
    )


def _idefics3(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(
            vision_config=_tower(vision, **tower),
            text_config=hf.LlamaConfig(**_text(text)),
            image_token_id=IMAGE,
            scale_factor=2,
        )
    )


def _smolvlm(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(
            vision_config=_tower(vision, **tower),
            text_config=hf.LlamaConfig(**_text(text)),
            image_token_id=IMAGE,
            scale_factor=2,
        )
    )


def _gemma3(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    text_config = hf.Gemma3TextConfig(**_text(text, head_dim=16, sliding_window=64))
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**_tower(vision, vision_use_head=False, **tower)),
            text_config=text_config,
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
            initializer_range=INIT,
        )
    )


def _paligemma(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**_tower(vision, vision_use_head=False, **tower)),
            text_config=hf.GemmaConfig(**_text(text, head_dim=16)),
            image_token_index=IMAGE,
            projection_dim=text,
            hidden_size=text,
        )
    )


def _mistral3(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(**_tower(vision, head_dim=vision // 2, **tower)),
            text_config=hf.MistralConfig(**_text(text, head_dim=16)),
            image_token_index=IMAGE,
            spatial_merge_size=2,
        )
    )


def _internvl(vision: int, text: int, tower: dict[str, Any]) -> nn.Module:
    sizes = {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH] * 2, "layer_scale_init_value": 0.5}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config={**_tower(vision), **sizes, **tower},
            text_config=hf.Qwen2Config(**_text(text)),
            image_token_id=IMAGE,
            image_seq_length=4,
        )
    )


FAMILIES: dict[str, Callable[[int, int, dict[str, Any]], nn.Module]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "mistral3": _mistral3,
    "internvl": _internvl,
}


def make_vlm(family: str, seed: int = 0, vision: int = 32, text: int = 64, **tower: Any) -> Any:
    """A model of a family: `vision` and `text` are widths, further arguments go into its vision config."""
    torch.manual_seed(seed)
    model = FAMILIES[family](vision, text, tower)
    with torch.no_grad():
        # Some families start a position table or a bias at zero, where no gradient can be told from none.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def make_inputs(model: Any, images: int = 2, seed: int = 0, video: bool = False) -> dict[str, torch.Tensor]:
    """A batch of one image a row, as the family's processor would make it; `video` adds one to the first row (Qwen)."""
    family = model.config.model_type
    torch.manual_seed(seed)
    inputs = _pixels(family, images, model)
    kinds = [IMAGE] * images
    with torch.no_grad():
        counts = _token_counts(model.model.get_image_features(**inputs).pooler_output, images)
    rows = [[5, 6 + i, *[kind] * count, 7, 8, 9] for i, (kind, count) in enumerate(zip(kinds, counts, strict=True))]
    if video:
        inputs["video_grid_thw"] = torch.tensor([[2, 4, 4]])
        inputs["pixel_values_videos"] = torch.randn(32, _qwen_patch(model))
        # Qwen3-VL separates the frames of a video by their time stamps.
        rows[0] += [10, *[VIDEO] * 4, 11, *[VIDEO] * 4] if "qwen3" in family else [10, *[VIDEO] * 8]
        rows[0] += [12]
    return _text_side(family, rows) | inputs


def _qwen_patch(model: Any) -> int:
    config = model.config.vision_config
    return config.in_channels * config.temporal_patch_size * config.patch_size**2


def _pixels(family: str, images: int, model: Any) -> dict[str, torch.Tensor]:
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 4]] * images)[:images]
        return {"pixel_values": torch.randn(int(grid.prod(-1).sum()), _qwen_patch(model)), "image_grid_thw": grid}
    size = model.config.vision_config.image_size
    side = size if isinstance(size, int) else size[0]
    if family in ("llava_next", "llava_onevision"):  # the image once, and as two crops
        sizes = torch.tensor([[side, 2 * side]] * images)
        return {"pixel_values": torch.randn(images, 3, 3, side, side), "image_sizes": sizes}
    if family.startswith("idefics") or family == "smolvlm":
        pixels = torch.randn(images, 1, 3, side, side)
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(images, 1, side, side, dtype=torch.long)}
    pixels = torch.randn(images, 3, side, side)
    if family == "mistral3":
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]] * images)}
    return {"pixel_values": pixels}


def _token_counts(features: Any, images: int) -> list[int]:
    """Tokens of every image: of a sequence of features, or of equally many a row, which releases shape differently."""
    if isinstance(features, torch.Tensor):
        return [features.numel() // features.shape[-1] // images] * images
    return [len(of_image) for of_image in features]


def _text_side(family: str, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = input_ids.masked_fill((mask == 0) | (input_ids >= IMAGE) | (input_ids < 7), -100)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    kinds = (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = kinds
    if family in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = kinds if family == "gemma3" else (labels != -100).long()
    return inputs


# ---- features and terms ----------------------------------------------------------------------------------------------


def reference_features(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Features of the images by calling the vision path by hand, as each family's paper has it; no hooks."""
    family, core = model.config.model_type, model.model
    if family.startswith("qwen"):
        out = core.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        features = {"vit": [out.last_hidden_state], "aligner": [out.pooler_output]}
        return features | ({"deepstack": list(out.deepstack_features)} if "qwen3_vl" in family else {})
    pixels = inputs["pixel_values"].flatten(0, -4)
    if family in ("idefics2", "idefics3", "smolvlm"):
        patches = torch.ones(len(pixels), 4, 4, dtype=torch.bool)
        vit = core.vision_model(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state
        if family == "idefics2":
            return {"aligner": [core.connector(vit, attention_mask=patches.flatten(1))]}
        return {"vit": [vit], "aligner": [core.connector(vit)]}
    if family == "mistral3":
        vit = core.vision_tower(pixels, image_sizes=inputs["image_sizes"]).last_hidden_state[0]
        return {"vit": [vit], "aligner": [core.multi_modal_projector(vit, inputs["image_sizes"])]}
    if family in ("llava", "llava_next"):
        vit = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    elif family == "llava_onevision":
        vit = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    else:
        vit = core.vision_tower(pixels).last_hidden_state
    if family == "internvl":
        vit = core.pixel_shuffle(vit[:, 1:].reshape(len(pixels), 4, 4, -1)).flatten(1, 2)
    return {"vit": [vit], "aligner": [core.multi_modal_projector(vit)]}


def visual_knobs(*targets: str, weight: float = 1.0, **options: Any) -> VisualKdConfig:
    given = {target: VisualTarget(**options) for target in targets}
    visual = VisualKdConfig(enabled=True, weight=weight, targets=given).in_force()
    assert visual is not None
    return visual


def run_visual(
    visual: VisualKdConfig, student: nn.Module, teacher: nn.Module, inputs: dict[str, torch.Tensor], **more: Any
) -> dict[str, torch.Tensor]:
    """The visual terms of whole forwards of both models."""
    with tapped(visual, student, teacher) as (ours, theirs):
        with torch.no_grad():
            teacher(**inputs)
        student(**inputs)
    return feature_terms(visual, ours, theirs, 1.0, **more)


def gradients(model: nn.Module) -> dict[str, float]:
    """Name -> norm of the gradient, of the parameters that a backward reached."""
    return {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
