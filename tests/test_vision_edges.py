"""Vision runs in which images are rare: what is not trained by a window is left alone, and what is, is trained."""

import json
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from kdtrain.data.batch import Batch, Rows
from kdtrain.errors import NotAvailableError, PreflightError
from kdtrain.generation.sampling import generation_config
from kdtrain.models.probe import placeholder_ids
from tests import tiny
from tests.test_trainer import ROWS, make_trainer
from tests.test_vision_fit import _fit_rank, models, row, run, write_config  # noqa: F401  (a fixture)
from tests.tiny import lora_config
from tests.tiny_processors import FAMILIES, make_model, picture
from tests.tiny_vision import IMAGE, make_inputs, make_vlm

TEXT = {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]}

# ---- projectors ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_projectors_stand_still_in_windows_without_images(models, tmp_path, world):  # noqa: F811
    """Rows 0 and 1 have one image, the others none; on two ranks, the second never has one."""
    data = models / "rare.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in [row(0, "a thing"), TEXT, TEXT, TEXT]))
    options = {
        "data__train": str(data), "training__max_steps": 2, "training__optim": "adamw_torch",
        "training__learning_rate": 0.01, "training__weight_decay": 0.5, "training__save_strategy": "steps",
        "training__save_steps": 1, "training__per_device_train_batch_size": 2 // world,
    }  # fmt: skip
    if world == 1:
        run(models, tmp_path, **options)
    else:
        write_config(models, tmp_path, **options)
        tiny.run_ranks(_fit_rank, world, tmp_path)
    first, second = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "visual_projectors.safetensors")
                     for step in (1, 2))  # fmt: skip
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_biases_of_projectors_do_not_decay(models, tmp_path):  # noqa: F811
    from kdtrain.config import ConfigLoader
    from kdtrain.runs.build import Given, build_trainer
    from tests.test_vision_fit import Silent

    file = write_config(models, tmp_path, training__weight_decay=0.5, training__optim="adamw_torch")
    arguments = ConfigLoader.load_training_config(file)
    trainer, _ = build_trainer(arguments.config, arguments.training_args, Silent(), False, Given(), ExitStack())
    decay = {id(p): g["weight_decay"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    named = dict(trainer.visual.projectors.named_parameters())
    assert {name: decay[id(p)] for name, p in named.items()} == {
        "vit.weight": 0.5, "vit.bias": 0.0, "aligner.weight": 0.5, "aligner.bias": 0.0,
    }  # fmt: skip


# ---- a frozen language model -----------------------------------------------------------------------------------------


def image_rows(pattern):
    """Rows of which those marked `i` have an image."""
    question = [{"type": "image"}, {"type": "text", "text": "what?"}]
    return [
        {"messages": [{"role": "user", "content": question}, *ROWS[i]["messages"][-1:]], "images": [picture(i)]}
        if kind == "i"
        else {**ROWS[i], "images": []}
        for i, kind in enumerate(pattern)
    ]


def frozen_student(family):
    from kdtrain.models.parts import freeze_parts

    processor = FAMILIES[family]()
    student = make_model(family, processor, 1)
    freeze_parts(student, llm=True)
    for name, parameter in student.named_parameters():
        if name.endswith(("k_proj.bias", "qkv.bias")):  # no gradient but noise, which AdamW would make steps of
            parameter.requires_grad_(False)
    return student, processor


def train_frozen(folder, family, pattern, world, fused=True, **kwargs):
    """Windows of two rows each; the records, and the trained weights."""
    student, processor = frozen_student(family)
    trainer = make_trainer(
        folder, student, make_model(family, processor, 2), rows=image_rows(pattern), sft_alpha=0.3,
        per_device_train_batch_size=1, gradient_accumulation_steps=2 // world, max_steps=len(pattern) // 2,
        train_sampling_strategy="sequential", learning_rate=0.01, lr_scheduler_type="constant",
        max_grad_norm=1e9, adam_epsilon=1e-2, extra={"processing_class": processor},
        ddp_find_unused_parameters=True, **kwargs,
    )  # fmt: skip
    if not fused:
        import dataclasses

        trainer._objective = dataclasses.replace(trainer._objective, fused=False)
    trainer.train()
    records = [[r["loss"], r["grad_norm"], r["token_accuracy"]] for r in trainer.state.log_history if "loss" in r]
    trained = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return records, trained.tolist()


def by_hand(family, pattern):
    """The same in float64: CE and KL of both rows over their tokens, one AdamW step where there is a gradient."""
    student, processor = frozen_student(family)
    teacher = make_model(family, processor, 2)
    from kdtrain.data import Collator

    student, teacher = student.double().eval(), teacher.double().eval()
    collate = Collator(processor)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-2, weight_decay=0)
    rows, losses = image_rows(pattern), []
    for i in range(0, len(rows), 2):
        batches = [collate([one]) for one in rows[i : i + 2]]
        count = sum((b.labels[:, 1:] != -100).sum() for b in batches)
        loss = 0
        for batch in batches:
            keep = batch.labels[:, 1:] != -100
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.model_inputs.items()}
            s = student(**inputs).logits[:, :-1][keep].log_softmax(-1)
            t = teacher(**inputs).logits[:, :-1][keep].log_softmax(-1).detach()
            m = torch.logsumexp(torch.stack([s, t]), 0) - torch.tensor(2.0).double().log()
            jsd = 0.5 * (t.exp() * (t - m) + s.exp() * (s - m)).sum()
            ce = -s.gather(-1, batch.labels[:, 1:][keep][:, None]).sum()
            loss = loss + (jsd + 0.3 * ce) / count
        losses.append(loss.item())
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    return losses, torch.cat([p.detach().flatten() for p in trained]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_rows_without_images_count_and_teach_nothing_where_the_language_model_is_frozen(tmp_path, family):
    """A window of text alone is no step; beside an image text adds to D only, on one rank as on two."""
    pattern = "iittitti"
    losses, weights = by_hand(family, pattern)
    runs = [train_frozen(tmp_path / "one", family, pattern, 1, fused=family == "llava"),
            *tiny.run_ranks(train_frozen, 2, tmp_path / "two", family, pattern, 2)]  # fmt: skip
    for records, trained in runs:
        assert [record[0] for record in records] == pytest.approx(losses, rel=1e-5)
        assert records[1][1] == 0
        assert trained == pytest.approx(weights, abs=1e-5)


def test_a_frozen_language_model_with_checkpointing_trains_the_same(tmp_path):
    expected, weights = train_frozen(tmp_path / "a", "llava", "itti", 1)
    records, trained = train_frozen(tmp_path / "b", "llava", "itti", 1, gradient_checkpointing=True)
    assert records == [pytest.approx(record, rel=1e-5) for record in expected]
    assert trained == pytest.approx(weights, abs=1e-6)


# ---- LoRA in the tower -----------------------------------------------------------------------------------------------


def tower_adapter(targets=r".*(vision|visual).*(q_proj|k_proj|v_proj|qkv|fc1|fc2|proj)"):
    return lora_config(
        rank=2, alpha=4, dropout=0, target_modules=targets, modules_to_save=None, use_dora=False,
    )  # fmt: skip


def adapted(folder, family, pattern="iiii", **kwargs):
    processor = FAMILIES[family]()
    torch.manual_seed(0)  # of the adapters
    return make_trainer(
        folder, make_model(family, processor, 1), make_model(family, processor, 2), rows=image_rows(pattern),
        extra={"processing_class": processor, "peft_config": tower_adapter()}, gradient_checkpointing=True,
        **{"max_steps": 4, "learning_rate": 1e-3, **kwargs},
    )  # fmt: skip


def train_adapted(folder, world):
    trainer = adapted(
        folder, "qwen", "iittit", per_device_train_batch_size=2 // world, max_steps=3, learning_rate=0.1, optim="sgd",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]).tolist()


def test_an_adapter_on_the_tower_alone_trains_beside_rows_without_images(tmp_path):
    expected = train_adapted(tmp_path, 1)
    for weights in tiny.run_ranks(train_adapted, 2, tmp_path, 2):
        assert weights == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_reentrant_checkpointing_of_a_tower_trained_in_parts_is_refused(tmp_path, family, caplog):
    with pytest.raises(PreflightError, match=r"use_reentrant: true.*trained in parts"):
        adapted(tmp_path, family, gradient_checkpointing_kwargs={"use_reentrant": True})
    adapted(tmp_path, family).train()
    unused = [r.getMessage() for r in caplog.records if "had no gradient" in r.getMessage()]
    # LLaVA reads its tower's last layer but one.
    assert len(unused) == (family == "llava")
    assert all("in the first 3 windows with images" in one and "layers.1." in one for one in unused)


def adapted_on_ranks(folder, caplog):
    """What is refused, and what is said of tensors without a gradient."""
    options = {"per_device_train_batch_size": 1, "ddp_find_unused_parameters": True, "max_steps": 3}
    try:
        adapted(folder, "llava", gradient_checkpointing_kwargs={"use_reentrant": True}, **options)
    except PreflightError as error:
        refused = str(error)
    adapted(folder, "llava", pattern="titi", train_sampling_strategy="sequential", **options).train()
    return refused, [r.getMessage() for r in caplog.records if "had no gradient" in r.getMessage()]


def test_two_ranks_refuse_reentrant_checkpointing_and_name_tensors_without_a_gradient_once(tmp_path, caplog):
    (refused, unused), (others, none) = tiny.run_ranks(adapted_on_ranks, 2, tmp_path, caplog)
    assert refused == others
    assert "trained in parts" in refused
    assert len(unused) == 1
    assert "in the first 3 windows with images" in unused[0]
    assert none == []


def test_a_tower_without_an_image_is_no_alarm(tmp_path, caplog):
    processor = FAMILIES["qwen"]()
    make_trainer(
        tmp_path, make_model("qwen", processor, 1), make_model("qwen", processor, 2), rows=ROWS, max_steps=5,
        extra={"processing_class": processor},
    ).train()  # fmt: skip
    assert not [r for r in caplog.records if "had no gradient" in r.getMessage()]


def generated_in_pieces(folder):
    """A window of five rows on two ranks: the last batch, with an image, only fills the epoch up on the second one."""
    from tests.test_distributed import sharding_on_a_cpu

    processor = FAMILIES["qwen"]()
    trainer = make_trainer(
        folder, make_model("qwen", processor, 1), make_model("qwen", processor, 2), rows=image_rows("iitti"),
        max_steps=1, lmbda=1.0, max_new_tokens=4, per_device_train_batch_size=1, gradient_accumulation_steps=3,
        train_sampling_strategy="sequential", extra={"processing_class": processor}, **sharding_on_a_cpu(),
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history[0]["llm_kd_loss"]


def test_in_pieces_ranks_write_to_images_and_to_text_at_the_same_time(tmp_path):
    first, second = tiny.run_ranks(generated_in_pieces, 2, tmp_path, timeout=200)
    assert first == second > 0


def test_the_best_step_of_a_visual_term_is_its_smallest_and_needs_images(models, tmp_path):  # noqa: F811
    text = models / "text.jsonl"
    text.write_text(json.dumps(TEXT) + "\n")
    options = {
        "data__eval": str(models / "train.jsonl"), "training__eval_strategy": "steps", "training__eval_steps": 1,
        "training__metric_for_best_model": "vision_kd_loss_aligner", "training__save_strategy": "best",
    }  # fmt: skip
    result, records = run(models, tmp_path / "a", **options)
    values = {r["step"]: r["eval_vision_kd_loss_aligner"] for r in records if "eval_loss" in r}
    saved = max(int(path.name.split("-")[1]) for path in result.run_dir.glob("checkpoint-*"))
    assert len(set(values.values())) == 4
    assert values[saved] == min(values.values())
    with pytest.raises(PreflightError, match="no evaluation has 'vision_kd_loss_aligner'"):
        run(models, tmp_path / "b", **{**options, "data__eval": str(text)})


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "idefics2", "qwen2_5_vl", "gemma3"])
def test_the_placeholders_of_images_are_known_from_the_model_alone(family):
    """A student may be given a tokenizer in place of its processor, and must not write them all the same."""
    model = make_vlm(family)
    assert IMAGE in make_inputs(model)["input_ids"]
    assert IMAGE in placeholder_ids(model)
    assert min(placeholder_ids(model)) > 12  # text
    assert placeholder_ids(tiny.make_qwen3()) == set()


def test_a_model_that_is_told_what_is_prompt_does_not_generate():
    """Answers marked as prompt would see their own later tokens."""
    model = make_vlm("paligemma")
    inputs = make_inputs(model)
    inputs.pop("labels")
    rows = Rows(prompt_lengths=torch.tensor([2, 2]))
    batch = Batch(model_inputs=inputs, labels=torch.full_like(inputs["input_ids"], -100), rows=rows)
    with pytest.raises(NotAvailableError, match=r"rlhf\.lmbda: 0"):
        tiny.generate_batch(model, batch, generation_config([2], 0, None, 3), seed=0)


def test_a_students_samples_hold_no_placeholder_that_its_config_names(tmp_path):
    from kdtrain.trainer import answers as module

    student, forbidden = tiny.make_qwen3(seed=1), []
    student.config.image_token_id = 17
    trainer = make_trainer(tmp_path, student, tiny.make_qwen3(seed=2), lmbda=1.0, max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generation_config",
                      lambda *args, **kw: forbidden.extend(args[4]) or generation_config(*args, **kw))  # fmt: skip
        trainer.train()
    assert forbidden == [17]
