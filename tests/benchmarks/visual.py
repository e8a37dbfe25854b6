"""What visual KD adds to a step in which the teacher runs anyway: hooks, projectors, distances, their backward.

Qwen3-VL models whose widths differ, so that every target goes through a projector; language-model KD in both cases.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.peers import IGNORE_INDEX
from tests.benchmarks.timing import interleave, progress

WITHOUT, WITH = "kdtrain", "visual"  # the first one is what `interleave` takes ratios to
TARGETS = ["vit", "aligner", "deepstack"]


@dataclass(frozen=True)
class VisualCase:
    """Rows of one image and some text each."""

    rows: int = 2
    patches: int = 16
    """Along each side of an image; a token is 2 × 2 of them."""
    text_tokens: int = 64
    vocab: int = 32768
    layers: int = 4
    student_widths: tuple[int, int] = (256, 512)
    teacher_widths: tuple[int, int] = (384, 1024)

    def __str__(self) -> str:
        return (
            f"Qwen3-VL, {self.rows} × ({self.patches // 2}² image + {self.text_tokens} text tokens), V {self.vocab}, "
            f"{self.layers} layers, vision {self.student_widths[0]} and {self.teacher_widths[0]} wide, text "
            f"{self.student_widths[1]} and {self.teacher_widths[1]} wide, targets {', '.join(TARGETS)}"
        )


def measure_overhead(case: VisualCase, rounds: int) -> dict[str, Any]:
    """Times of a step without and with visual KD, interleaved; `overhead` is the median ratio less one."""
    batch = _batch(case)
    steps, models = {}, []
    for name in (WITHOUT, WITH):
        student, teacher = _model(case, case.student_widths, 1), _model(case, case.teacher_widths, 2)
        steps[name] = _step(student, teacher, batch, visual=name == WITH)
        models.append(student)

    def forget_gradients() -> None:
        for model in models:
            model.zero_grad(set_to_none=True)

    timings = interleave(steps, rounds=rounds, before=forget_gradients)
    peers = {name: timing.as_dict() for name, timing in timings.items()}
    overhead = peers[WITH]["ratio"] - 1
    progress(f"visual KD, {case}: {overhead:+.1%}")
    return {"case": dataclasses.asdict(case), "title": str(case), "peers": peers, "overhead": overhead}


def _model(case: VisualCase, widths: tuple[int, int], seed: int) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision, text = widths
    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        vision_config={
            "depth": case.layers, "hidden_size": vision, "intermediate_size": 3 * vision, "num_heads": vision // 64,
            "out_hidden_size": text, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "deepstack_visual_indexes": [0, 1], "num_position_embeddings": case.patches**2,
        },
        text_config={
            "vocab_size": case.vocab, "hidden_size": text, "intermediate_size": 3 * text,
            "num_hidden_layers": case.layers, "num_attention_heads": text // 64, "num_key_value_heads": text // 128,
            "head_dim": 64, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]
            },
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        image_token_id=300, video_token_id=301, vision_start_token_id=302,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config)


def _batch(case: VisualCase) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = (case.patches // 2) ** 2
    text = torch.randint(400, case.vocab, (case.rows, case.text_tokens), generator=generator)
    ids = torch.cat([torch.full((case.rows, image), 300), text], 1)
    labels = ids.clone()
    labels[:, : image + case.text_tokens // 2] = IGNORE_INDEX
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 300).long(),
        "labels": labels,
        "pixel_values": torch.randn(case.rows * case.patches**2, 3 * 2 * 16 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, case.patches, case.patches]] * case.rows),
    }


def _step(student: Any, teacher: Any, batch: dict[str, torch.Tensor], visual: bool) -> Callable[[], torch.Tensor]:
    import datasets
    from trl.experimental.gkd import GKDConfig

    from kdtrain.trainer import GKDTrainerWithMetrics
    from tests.tiny import make_tokenizer

    args = GKDConfig(
        output_dir=tempfile.mkdtemp(prefix="kdtrain-bench-"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", max_steps=1, disable_tqdm=True,
    )  # fmt: skip
    args.visual_kd = {"enabled": visual, "targets": TARGETS}  # type: ignore[attr-defined]
    trainer = GKDTrainerWithMetrics(
        student,
        teacher,
        args=args,
        data_collator=lambda rows: batch,  # the projectors' widths are read from it
        train_dataset=datasets.Dataset.from_list([{"row": 0}]),
        processing_class=make_tokenizer(),
    )
    projectors = 0 if trainer.visual is None else len(trainer.visual.projectors)
    assert projectors == (len(TARGETS) + 1 if visual else 0), "deepstack has two levels"

    def step() -> torch.Tensor:
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.detach()

    return step
