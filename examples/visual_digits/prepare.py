"""Builds what the visual example trains on, offline: real handwritten digits as chats about an image.

    python examples/visual_digits/prepare.py

The images are the 1797 digits that scikit-learn carries, 8 x 8 pixels from 13 writers, scaled to 32 x 32. Each is asked
three questions, and each answer is one word. The images are split at random, all questions of an image together:

    teacher.jsonl      650 images with answers, for the teacher alone
    labelled.jsonl     150 images with answers, for the student
    unlabelled.jsonl   497 images without answers; the teacher gives its own, when a config says `answers: teacher`
    heldout.jsonl      500 images that nothing is trained on, for `compare.py`

No image is in two of them. Beside them in `build/`: the images, `teacher_init/` (an untrained LLaVA of 0.5 M parameters
with its processor) and `student_0/`, `student_1/`, `student_2/` (a quarter of that, each from another seed).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from transformers import LlavaProcessor

BUILD = Path(__file__).resolve().parent / "build"

SPLIT = {"teacher": 650, "labelled": 150, "unlabelled": 497, "heldout": 500}  # images
SEEDS = (0, 1, 2)
SIDE, PATCH = 32, 8  # pixels
MAX_POSITIONS = 64

# In this handwriting nearly all fours are open at the top, so that a four has no loop.
LOOPS = {0: "one", 6: "one", 8: "two", 9: "one"}
QUESTIONS = {
    "digit": "Which digit is this?",
    "parity": "Is it even or odd?",
    "loops": "How many closed loops does it have?",
}

PAD, START, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"

# ChatML over content parts. `generation` marks what is learnt: the answer and the END after it.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- text(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- text(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# (vision encoder, language model). The widths differ, so that visual KD learns a projector from 32 to 64.
TEACHER = (
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
    {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
)
STUDENT = (
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
)
# Models this narrow hardly learn from the usual 0.02: their features begin as good as equal.
INITIALIZER_RANGE = 0.08


def answers(digit: int) -> dict[str, str]:
    """What is right for an image of this digit, by the name of the question."""
    return {"digit": str(digit), "parity": "odd" if digit % 2 else "even", "loops": LOOPS.get(digit, "none")}


def split(count: int, sizes: dict[str, int], seed: int = 0) -> dict[str, list[int]]:
    """Numbers below `count` at random into disjoint parts of the given sizes, each in ascending order."""
    numbers = random.Random(seed).sample(range(count), sum(sizes.values()))
    parts = {}
    for name, size in sizes.items():
        parts[name], numbers = sorted(numbers[:size]), numbers[size:]
    return parts


def rows(images: Sequence[int], digits: Sequence[int], with_answers: bool) -> list[dict[str, Any]]:
    """One chat row per image and question; without answers, nothing in it says which digit it is."""
    out = []
    for i in images:
        for name, question in QUESTIONS.items():
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if with_answers:
                messages.append({"role": "assistant", "content": answers(int(digits[i]))[name]})
            out.append({"messages": messages, "images": [f"images/{i:04d}.png"]})
    return out


def save_images(images: np.ndarray, folder: Path) -> None:
    """Grey 8 x 8 images of values 0 to 16 as PNG files of SIDE x SIDE."""
    from PIL import Image

    folder.mkdir()
    for i, pixels in enumerate(images):
        grey = Image.fromarray((pixels * (255 / 16)).round().astype("uint8"), "L")
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")


def make_processor() -> LlavaProcessor:
    """Tokenizer and image processor: an image becomes (SIDE / PATCH)² tokens, an answer one and the END after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["user\n", "assistant\n", *QUESTIONS.values(), *(word for d in range(10) for word in answers(d).values())]
    bpe.train_from_iterator(words * 2, trainer)  # a pair of letters is merged when it occurs at least twice
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, IMAGE],
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_model(path: Path, shape: tuple[dict[str, int], dict[str, int]], processor: LlavaProcessor, seed: int) -> int:
    """Saves an untrained LLaVA with its processor, and returns its number of parameters."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, text = shape
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(
            **text,
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_POSITIONS,
            initializer_range=INITIALIZER_RANGE,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,  # the default, -2, leaves the last layer without use
        initializer_range=INITIALIZER_RANGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model.num_parameters()


def build(out: Path = BUILD) -> dict[str, int]:
    """Builds everything anew into `out`; the same bytes each time on one machine.

    Returns:
        Images in each part, and parameters of both models.
    """
    from sklearn.datasets import load_digits

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    data = load_digits()
    save_images(data.images, out / "images")
    parts = split(len(data.target), SPLIT)
    for name, images in parts.items():
        with (out / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            some = rows(images, data.target, with_answers=name != "unlabelled")
            file.writelines(json.dumps(row) + "\n" for row in some)
    processor = make_processor()
    counts = {name: len(images) for name, images in parts.items()}
    counts["teacher_parameters"] = save_model(out / "teacher_init", TEACHER, processor, seed=100)
    for seed in SEEDS:
        counts["student_parameters"] = save_model(out / f"student_{seed}", STUDENT, processor, seed)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=BUILD, help="folder to write to (default: build/ beside this file)")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name, count in build(parser.parse_args().out).items():
        print(f"{name.replace('_', ' '):<20} {count:>8,}{'' if name.endswith('parameters') else ' images'}")


if __name__ == "__main__":
    main()
