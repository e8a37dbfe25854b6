"""The recipes for Qwen3-VL, trained with tiny models of its architecture and its own options.

Replaced are the models, the data and the number of steps, and the processor by its part for images: videos want
torchvision. Not covered: half precision, the real sizes of models and images, and the processor saved on the hub.
"""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from kdtrain.cli import app as cli
from kdtrain.config import ConfigLoader
from tests.tiny_processors import make_qwen3, png

RECIPES = Path(cli.__file__).parent / "recipes"
STUDENT, TEACHER = {"vision": 32, "text": 64}, {"vision": 48, "text": 96}


def save_model(path, processor, vision, text, seed):
    """Tower, merger, three levels of deepstack and a language model, as in the real ones."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text,
            "intermediate_size": 2 * text,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 4,
            "hidden_size": vision,
            "intermediate_size": 2 * vision,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": text,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
            "initializer_range": 0.1,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)


@pytest.fixture
def twin(tmp_path):
    """A folder with models and data; the overrides that put them in the place of the recipe's."""
    processor = make_qwen3()
    save_model(tmp_path / "student", processor, **STUDENT, seed=1)
    save_model(tmp_path / "teacher", processor, **TEACHER, seed=2)
    for part, count in (("train", 32), ("eval", 2)):
        with (tmp_path / f"{part}.jsonl").open("w") as file:
            for i in range(count):
                (tmp_path / f"{part}_{i}.png").write_bytes(png(i, width=32 + 16 * (i % 3), height=48))
                content = [{"type": "image"}, {"type": "text", "text": "What is the file?"}]
                messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"the path {i}"}]
                file.write(json.dumps({"messages": messages, "images": [f"{part}_{i}.png"]}) + "\n")
    return tmp_path, [
        f"model.model={tmp_path / 'student'}",
        f"rlhf.teacher_model={tmp_path / 'teacher'}",
        f"data.train={tmp_path / 'train.jsonl'}",
        f"data.eval={tmp_path / 'eval.jsonl'}",
        f"training.output_dir={tmp_path / 'run'}",
        "training.max_steps=2",
        "training.logging_steps=1",
        "training.eval_steps=2",
        # for a CPU
        "model.dtype=float32",
        "rlhf.teacher.dtype=float32",
        "training.use_cpu=true",
        "training.bf16=false",
        "training.dataloader_num_workers=0",
        "rlhf.max_new_tokens=8",
        "launch.num_processes=1",
    ]


@pytest.fixture
def fit(twin, monkeypatch, capsys):
    def run(*more, code=0, recipe="qwen3-vl.yaml"):
        folder, overrides = twin
        monkeypatch.setattr(sys, "argv", ["kdtrain", "fit", str(RECIPES / recipe), *overrides, *more])
        with pytest.raises(SystemExit) as done:
            cli.main()
        err = capsys.readouterr().err
        assert done.value.code == code, err
        if code:
            return err
        records = [json.loads(line) for line in (folder / "run" / "logging.jsonl").read_text().splitlines()]
        return folder / "run", records

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


def test_the_recipe_trains_two_steps_with_tiny_models(fit):
    run, records = fit("rlhf.lmbda=0")
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [1, 2]
    for record in training:
        terms = [record[name] for name in ("llm_kd_loss", "sft_loss", "vision_kd_loss")]
        assert record["loss"] == pytest.approx(sum(terms), rel=1e-5)
        targets = [record[f"vision_kd_loss_{target}"] for target in ("aligner", "deepstack")]
        assert record["vision_kd_loss"] == pytest.approx(sum(targets), rel=1e-5)
        # 0.1 times a cosine distance
        assert all(0 < value < 0.2 for value in targets)
    assert any("eval_loss" in record for record in records)
    projectors = load_file(run / "visual_projectors.safetensors")
    shapes = {name: tuple(value.shape) for name, value in projectors.items() if name.endswith("weight")}
    wide = (TEACHER["text"], STUDENT["text"])
    assert shapes == {f"{name}.weight": wide for name in ("aligner", "deepstack_0", "deepstack_1", "deepstack_2")}


@pytest.mark.slow
def test_its_adapter_reaches_the_vision_encoder_and_the_mergers_and_learns_there(fit):
    run, _ = fit("rlhf.lmbda=0")
    adapter = load_file(run / "adapter_model.safetensors")
    # B begins at zero: what is not zero has been trained.
    trained = {name for name, value in adapter.items() if "lora_B" in name and value.abs().max() > 0}
    for part in ("visual.blocks.0.", "visual.merger.", "visual.deepstack_merger_list.2.", "language_model.layers.3."):
        assert any(part in name for name in trained), part


@pytest.mark.slow
def test_an_adapter_in_the_language_model_alone_cannot_follow_the_visual_term(fit):
    err = " ".join(fit("rlhf.lmbda=0", "tuner.target_modules=[q_proj, v_proj]", code=3).split())
    assert "the student's features carry no gradient" in err


@pytest.mark.slow
def test_with_a_frozen_encoder_the_mergers_still_learn(fit):
    run, _ = fit("rlhf.lmbda=0", "tuner.freeze_vit=true")
    adapter = load_file(run / "adapter_model.safetensors")
    assert not [name for name in adapter if "visual.blocks" in name]
    assert [name for name in adapter if "visual.deepstack_merger_list" in name]


def test_the_visual_only_recipe_teaches_the_vision_path_alone(fit, twin):
    run, records = fit(recipe="visual-only.yaml")
    training = [record for record in records if "loss" in record]
    assert all(record["vision_kd_loss"] > 0 and "llm_kd_loss" not in record for record in training)
    before, after = (load_file(path / "model.safetensors") for path in (twin[0] / "student", run))
    trained = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert trained
    assert all("visual." in name for name in trained)


def test_its_student_answers_about_images_itself(fit):
    _, records = fit("rlhf.lmbda=1")
    assert [record["on_policy_fraction"] for record in records if "loss" in record] == [1.0, 1.0]
    assert all(record["vision_kd_loss"] > 0 and record["llm_kd_loss"] > 0 for record in records if "loss" in record)


def test_the_recipe_says_what_its_comments_say():
    config = ConfigLoader.load_training_config(RECIPES / "qwen3-vl.yaml").config
    assert config.tuner.train_type == "lora"
    assert set(config.custom.visual_kd.targets) == {"aligner", "deepstack"}
    assert {target.distance for target in config.custom.visual_kd.targets.values()} == {"cosine"}
    training = config.training
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 16
