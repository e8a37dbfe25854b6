"""Vision-language runs from YAML to a saved student: real tiny LLaVA models, real pictures, real processors."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from kdtrain.config import ConfigLoader
from kdtrain.data import Collator, Source, build_dataset
from kdtrain.errors import DataError, PreflightError
from kdtrain.generation.sampling import generation_config
from kdtrain.models.loading import load_model
from kdtrain.models.processing import load_processing
from kdtrain.runs.fit import fit
from tests import tiny
from tests.tiny import run_ranks
from tests.tiny_processors import FAMILIES, make_llava, make_model, picture

TOLERANCE = 1e-6


class Silent:
    """A reporter that keeps what it hears."""

    def __init__(self):
        self.answered = []

    def data(self, name, report):
        pass

    def plan(self, rows):
        self.rows = rows

    def answers(self, done, total):
        self.answered.append((done, total))

    def callbacks(self):
        return []

    def close(self):
        pass


def save_llava(folder, vision, text, seed, **image):
    """A LLaVA model of the given widths with its processor."""
    processor = make_llava(**image)
    torch.manual_seed(seed)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=image.get("size", 32), patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer), hidden_size=text, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=512, initializer_range=0.1, eos_token_id=2, pad_token_id=3,
            bos_token_id=None,
        ),
        image_token_id=token,
        image_token_index=token,
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def row(i, answer):
    question = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    return {
        "images": [f"pictures/{i}.png"],
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("vision"))


def make_models(folder):
    """Student, teacher and rows with pictures."""
    save_llava(folder / "student", 32, 32, 1)
    save_llava(folder / "teacher", 48, 64, 2)
    (folder / "pictures").mkdir()
    for i in range(6):
        picture(i).save(folder / "pictures" / f"{i}.png")
    rows = [row(i, "a thing" + " big" * (i % 3)) for i in range(6)]
    rows.insert(1, {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]})
    rows.append({"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]})
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def write_config(models, path, **changes):
    config = {
        "model": {"model": str(models / "student")},
        "data": {"train": str(models / "train.jsonl"), "max_length": 128},
        "rlhf": {"teacher_model": str(models / "teacher"), "sft_alpha": 0.3, "lmbda": 0.0},
        "custom": {"visual_kd": {"enabled": True, "targets": ["vit", "aligner"]}},
        "training": {
            "output_dir": str(path / "run"),
            "max_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
        },
    }
    for name, value in changes.items():
        *sections, option = name.split("__")
        holder = config
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[option] = value
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def run(models, path, resume=None, reporter=None, **changes):
    path.mkdir(exist_ok=True)
    arguments = ConfigLoader.load_training_config(write_config(models, path, **changes))
    result = fit(arguments, reporter or Silent(), resume=resume)
    lines = (path / "run" / "logging.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(first, second, tolerance=TOLERANCE):
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) <= tolerance


def test_a_run_trains_student_and_projectors_and_exports_the_student_alone(models, tmp_path):
    result, records = run(models, tmp_path)
    assert records[-1]["vision_kd_loss"] < records[0]["vision_kd_loss"]
    parts = [records[0][f"vision_kd_loss_{target}"] for target in ("vit", "aligner")]
    assert records[0]["vision_kd_loss"] == pytest.approx(sum(parts), rel=1e-6)
    terms = sum(records[0][key] for key in ("llm_kd_loss", "sft_loss", "vision_kd_loss"))
    assert records[0]["loss"] == pytest.approx(terms, rel=1e-6)
    projectors = load_file(result.run_dir / "visual_projectors.safetensors")
    assert {name: tuple(value.shape) for name, value in projectors.items()} == {
        "vit.weight": (48, 32), "vit.bias": (48,), "aligner.weight": (64, 32), "aligner.bias": (64,),
    }  # fmt: skip
    assert not (result.run_dir / "README.md").exists()  # upstream's would call it a version of None
    # Loads as the same architecture, with every weight and no other, and with its processor.
    _, found = AutoModelForImageTextToText.from_pretrained(result.run_dir, output_loading_info=True)
    assert not any(found.values())
    assert type(load_processing(str(result.run_dir))).__name__ == "LlavaProcessor"


def test_the_gradient_norm_and_its_clipping_are_over_student_and_projectors(models, tmp_path):
    options = {"training__max_steps": 1, "training__learning_rate": 0.25}
    result, records = run(models, tmp_path / "clipped", training__max_grad_norm=0.5, **options)
    free, unclipped = run(models, tmp_path / "free", training__max_grad_norm=0.0, **options)
    assert records[0]["grad_norm"] == pytest.approx(unclipped[0]["grad_norm"], rel=1e-5)
    projector = ({}, {})
    for where, norm in ((result, 0.5), (free, unclipped[0]["grad_norm"])):
        after = weights(where.run_dir)
        steps = [after[name] - value for name, value in weights(models / "student").items()]
        projector[0 if where is result else 1].update(load_file(where.run_dir / "visual_projectors.safetensors"))
        squares = sum(step.square().sum().item() for step in steps) / 0.25**2
        assert squares < 0.99 * norm**2  # a part of the norm is the projectors'
    # The rest: both runs start from the same projectors w, so w − 0.25·g·f for two known factors f.
    factor = 0.5 / unclipped[0]["grad_norm"]
    apart = [(projector[0][name] - projector[1][name]) / (0.25 * (1 - factor)) for name in projector[0]]
    student = [
        (after - before) / 0.25
        for after, before in zip(weights(free.run_dir).values(), weights(models / "student").values(), strict=True)
    ]
    whole = sum(value.square().sum().item() for value in (*apart, *student)) ** 0.5
    assert whole == pytest.approx(unclipped[0]["grad_norm"], rel=1e-4)


def test_a_resumed_run_has_the_weights_optimizer_and_projectors_of_its_checkpoint(models, tmp_path):
    """transformers saves LLaVA under other names than it resumes it by: the weights would be those of the beginning."""
    options = {"training__optim": "adamw_torch", "training__save_strategy": "steps", "training__save_steps": 2}
    whole, records = run(models, tmp_path / "whole", **options)
    part = tmp_path / "part"
    part.mkdir()
    (part / "run").mkdir()
    (whole.run_dir / "checkpoint-2").rename(part / "run" / "checkpoint-2")
    resumed, again = run(models, part, resume="auto", **options)
    assert [record["step"] for record in again] == [3, 4]
    for key in ("loss", "vision_kd_loss", "grad_norm"):
        assert again[-1][key] == pytest.approx(records[3][key], rel=1e-6)
    assert_same_weights(weights(whole.run_dir), weights(resumed.run_dir), 1e-9)
    for name, value in load_file(resumed.run_dir / "visual_projectors.safetensors").items():
        assert torch.equal(value, load_file(whole.run_dir / "visual_projectors.safetensors")[name])


def test_the_plan_says_what_is_trained_of_each_part_and_a_frozen_part_is_not_named_for_training(models, tmp_path):
    lora = {"tuner__train_type": "lora", "custom__visual_kd": {}, "training__max_steps": 1}
    reporter = Silent()
    arguments = ConfigLoader.load_training_config(
        write_config(models, tmp_path, **lora, tuner__target_modules=["q_proj"], tuner__freeze_vit=True)
    )
    fit(arguments, reporter, dry_run=True)
    assert reporter.rows["trained"] == "language model 2,048, vision encoder 0, aligner 0"
    config = write_config(
        models, tmp_path, **lora, tuner__modules_to_save=["multi_modal_projector"], tuner__freeze_aligner=True
    )
    with pytest.raises(
        PreflightError, match=r"'multi_modal_projector' is to be trained, and tuner.freeze_aligner keep"
    ):
        fit(ConfigLoader.load_training_config(config), Silent())


def _fit_rank(folder):
    arguments = ConfigLoader.load_training_config(folder / "config.yaml")
    fit(arguments, Silent())


@pytest.mark.parametrize("lm_weight", tiny.first_quick([1.0, 0.0]))
def test_two_ranks_of_which_one_has_no_image_train_as_one_process(models, tmp_path, lm_weight):
    """Rows 0 and 1, of a window of two, and 7 (text) lie on different ranks; projectors are averaged as well."""
    options = {"rlhf__llm_kd_weight": lm_weight, "data__train": str(models / "train.jsonl")}
    one, _ = run(models, tmp_path / "one", training__per_device_train_batch_size=2, **options)
    (tmp_path / "two").mkdir()
    write_config(models, tmp_path / "two", training__per_device_train_batch_size=1, **options)
    run_ranks(_fit_rank, 2, tmp_path / "two")
    assert_same_weights(weights(one.run_dir), weights(tmp_path / "two" / "run"))
    assert_same_weights(
        *(load_file(where / "visual_projectors.safetensors") for where in (one.run_dir, tmp_path / "two" / "run"))
    )
    first, second = ((where / "logging.jsonl").read_text() for where in (one.run_dir, tmp_path / "two" / "run"))
    for a, b in zip(map(json.loads, first.splitlines()), map(json.loads, second.splitlines()), strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "vision_kd_loss", "sft_loss", "grad_norm"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-5), key


def test_a_window_without_images_has_no_visual_key(models, tmp_path):
    _, records = run(models, tmp_path, training__per_device_train_batch_size=1, training__max_steps=2)
    assert "vision_kd_loss" in records[0]
    assert not any(key.startswith("vision_kd") for key in records[1])  # row 1 is text


def test_accumulation_and_micro_batches_do_not_change_a_vision_run(models, tmp_path):
    whole, _ = run(models, tmp_path / "whole", training__max_steps=2)
    for size, steps in ((1, 4), (2, 2)):
        options = {"training__per_device_train_batch_size": size, "training__gradient_accumulation_steps": steps}
        parts, _ = run(models, tmp_path / f"of{size}", training__max_steps=2, **options)
        assert_same_weights(weights(whole.run_dir), weights(parts.run_dir))


@pytest.mark.parametrize("changes", [{"rlhf__lmbda": 1.0}, {"rlhf__seq_kd": True}])
def test_generation_sees_the_images(models, tmp_path, changes):
    _, records = run(models, tmp_path, rlhf__max_new_tokens=4, training__max_steps=2, **changes)
    assert records[0]["on_policy_fraction"] == float("rlhf__lmbda" in changes)
    assert "vision_kd_loss" in records[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_generates_what_each_of_its_rows_does(family):
    """Left padding, images that belong to rows, and what a processor says of every token."""
    processor = FAMILIES[family]()
    model = make_model(family, processor).eval()
    question = [{"type": "image"}, {"type": "text", "text": "what?"}]
    longer = [{"type": "text", "text": "please say what this is, in a few words: "}, *question]
    rows = [
        {"images": [picture(1)], "messages": [{"role": "user", "content": question}]},
        {"messages": [{"role": "user", "content": "hello there"}]},
        {"images": [picture(2, 48, 40)], "messages": [{"role": "user", "content": longer}]},
    ]
    collate = Collator(processor)
    config = generation_config([2], 3, None, 5)
    together = tiny.generate_batch(model, collate(rows), config, seed=0)
    answers = []
    for i, one in enumerate(rows):
        alone = tiny.generate_batch(model, collate([one]), config, seed=0)
        supervised = together.labels[i] != -100
        answers.append(alone.model_inputs["input_ids"][0][alone.labels[0] != -100].tolist())
        assert together.model_inputs["input_ids"][i][supervised].tolist() == answers[-1]
    # And the continuation is what a forward over the grown batch predicts, with the grown per-token inputs.
    with torch.no_grad():
        predicted = model(**together.model_inputs, use_cache=False).logits.argmax(-1)
    for i, answer in enumerate(answers):
        places = (together.labels[i] != -100).nonzero().squeeze(1)
        assert predicted[i][places - 1].tolist() == answer


def test_an_image_changes_the_answer_that_is_generated():
    """The test above would hold for a model that is blind."""
    processor = make_llava()
    model = make_model("llava", processor).eval()
    question = [{"type": "image"}, {"type": "text", "text": "what?"}]
    images = [Image.new("RGB", (32, 32), color) for color in ("black", "white")]
    rows = [{"images": [image], "messages": [{"role": "user", "content": question}]} for image in images]
    done = tiny.generate_batch(model, Collator(processor)(rows), generation_config([2], 3, None, 8), seed=0)
    assert done["input_ids"][0].tolist() != done["input_ids"][1].tolist()


def test_freezing_the_language_model_and_the_aligner_trains_the_vision_encoder_alone(models, tmp_path):
    before = weights(models / "student")
    result, _ = run(models, tmp_path, tuner__freeze_llm=True, tuner__freeze_aligner=True)
    changed = {name for name, value in weights(result.run_dir).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("vision_tower.") for name in changed)


def test_a_target_that_cannot_teach_is_refused_before_the_first_step(models, tmp_path):
    with pytest.raises(PreflightError, match=r"'vit'.*no gradient"):
        run(models, tmp_path, tuner__train_type="lora", tuner__target_modules=".*language_model.*q_proj")
    assert not (tmp_path / "run" / "logging.jsonl").exists()


def test_adapters_leave_frozen_parts_alone(models, tmp_path):
    result, _ = run(models, tmp_path, tuner__train_type="lora", tuner__freeze_llm=True)
    names = load_file(result.run_dir / "adapter_model.safetensors")
    assert names
    assert not any("language_model" in name or "lm_head" in name for name in names)
    assert (result.run_dir / "visual_projectors.safetensors").exists()


def test_visual_kd_without_an_image_in_the_data_is_refused(models, tmp_path):
    text = [json.loads(line) for line in (models / "train.jsonl").read_text().splitlines() if "images" not in line]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(one) + "\n" for one in text))
    with pytest.raises(DataError, match="has an image"):
        run(models, tmp_path, data__train=str(tmp_path / "text.jsonl"))
    weights = {"custom__visual_kd__enabled": False, "rlhf__token_weights": {}}
    with pytest.raises(DataError, match=r"rlhf\.token_weights .* no row of data\.train has one"):
        run(models, tmp_path, data__train=str(tmp_path / "text.jsonl"), **weights)


@pytest.mark.slow
def test_a_teacher_with_other_normalisation_sees_its_own_pixels(models, tmp_path):
    save_llava(tmp_path / "teacher", 48, 64, 2, image_mean=[0.1, 0.2, 0.3])
    _, same = run(models, tmp_path / "a", training__max_steps=1)
    theirs = {"rlhf__teacher_model": str(tmp_path / "teacher")}
    _, other = run(models, tmp_path / "b", training__max_steps=1, **theirs)
    assert other[0]["sft_loss"] == pytest.approx(same[0]["sft_loss"], rel=1e-6)  # the student's pixels are its own
    assert other[0]["llm_kd_loss"] != pytest.approx(same[0]["llm_kd_loss"], rel=1e-4)
    # Also in what the teacher writes; afterwards the student's pixels are its own again.
    options = {"rlhf__seq_kd": True, "rlhf__max_new_tokens": 4, "training__max_steps": 1, "rlhf__sft_alpha": 0.0}
    _, written = run(models, tmp_path / "c", **theirs, **options)
    assert written[0]["vision_kd_loss"] == pytest.approx(other[0]["vision_kd_loss"], rel=1e-6)


def test_a_teacher_whose_images_take_other_tokens_is_refused(models, tmp_path):
    save_llava(tmp_path / "teacher", 48, 64, 2, size=64)
    with pytest.raises(DataError, match="16 tokens for the student and 64 for the teacher"):
        run(models, tmp_path, rlhf__teacher_model=str(tmp_path / "teacher"))


def test_a_text_teacher_of_rows_with_images_is_refused(models, tmp_path):
    from tests.tiny import make_qwen3

    tokenizer = make_llava().tokenizer
    make_qwen3(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    changes = {"rlhf__teacher_model": str(tmp_path / "teacher"), "custom__visual_kd__enabled": False}
    with pytest.raises(PreflightError, match="no processor for images"):
        run(models, tmp_path, **changes)


# ---- answers of the teacher ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(models):
    """The rows' questions: those with an answer keep a wrong one, which must not be used."""
    rows = [json.loads(line) for line in (models / "train.jsonl").read_text().splitlines()]
    for i, one in enumerate(rows):
        one["messages"] = one["messages"][:1] + [{"role": "assistant", "content": "WRONG"}] * (i % 2)
    file = models / "prompts.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


def greedy_answers(models, prompts, tokens):
    """What the teacher says to each row alone, by transformers."""
    processor, model = load_processing(str(models / "teacher")), load_model(str(models / "teacher")).eval()
    found = []
    for one in map(json.loads, prompts.read_text().splitlines()):
        images = [Image.open(models / name) for name in one.get("images", ())]
        text = processor.apply_chat_template(one["messages"][:1], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
        done = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=[2], pad_token_id=3)
        found.append(done[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def test_answers_are_the_teachers_greedy_ones_and_replace_those_of_the_data(models, prompts, tmp_path):
    tokens = 5
    source = {"path": str(prompts), "answers": "teacher"}
    options = {"data__train": source, "rlhf__max_new_tokens": tokens, "rlhf__llm_kd_weight": 0.0}
    options |= {"custom__visual_kd__enabled": False, "training__max_steps": 2}
    reporter = Silent()
    result, records = run(models, tmp_path, reporter=reporter, **options)
    (file,) = (result.run_dir / "teacher_answers").glob("*/rank0.jsonl")
    written = [json.loads(line)["answer"] for line in file.read_text().splitlines()]
    assert sorted(written) == sorted(greedy_answers(models, prompts, tokens))
    assert reporter.answered[-1] == (8, 8)
    assert reporter.rows["teacher"] == "none"  # it is not needed after that
    assert records[0]["sft_loss"] > 0


@pytest.mark.slow
def test_answers_that_were_stored_are_not_generated_again(models, prompts, tmp_path):
    source = {"path": str(prompts), "answers": "teacher"}
    options = {"data__train": source, "rlhf__max_new_tokens": 5, "training__per_device_eval_batch_size": 2}
    whole, records = run(models, tmp_path / "whole", **options)
    (file,) = (whole.run_dir / "teacher_answers").glob("*/rank0.jsonl")
    # Stopped after three answers, in the middle of writing the fourth.
    lines = file.read_text().splitlines(keepends=True)
    part = tmp_path / "part" / "run" / "teacher_answers" / file.parent.name
    part.mkdir(parents=True)
    (part / "rank0.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    shutil.copy(whole.run_dir / "status.json", tmp_path / "part" / "run")  # by which the folder is a run's
    resumed, again = run(models, tmp_path / "part", resume="auto", **options)
    now = (part / "rank0.jsonl").read_text().splitlines()
    assert len(now) == 3 + 1 + len(lines) - 3  # the broken line, and one for each that was missing
    assert [record["loss"] for record in again] == [record["loss"] for record in records]
    assert_same_weights(weights(whole.run_dir), weights(resumed.run_dir), 0.0)


@pytest.mark.slow
def test_two_ranks_share_the_answers(models, prompts, tmp_path):
    source = {"path": str(prompts), "answers": "teacher"}
    options = {"data__train": source, "rlhf__max_new_tokens": 4}
    one, _ = run(models, tmp_path / "one", training__per_device_train_batch_size=4, **options)
    (tmp_path / "two").mkdir()
    write_config(models, tmp_path / "two", training__per_device_train_batch_size=2, **options)
    run_ranks(_fit_rank, 2, tmp_path / "two")
    files = sorted((tmp_path / "two" / "run" / "teacher_answers").glob("*/rank*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in files] == [4, 4]
    assert_same_weights(weights(one.run_dir), weights(tmp_path / "two" / "run"))


def test_a_prepared_row_with_an_answer_is_collated_with_its_image(models, prompts):
    """Its stored text is the prompt: what follows was generated."""
    processor = load_processing(str(models / "student"))
    rows, report = build_dataset(
        [Source(str(prompts), answers="teacher")], processor, max_length=None, on_overlength="error", train_on="last"
    )
    assert report.teacher_answer_rows == len(rows) == 8
    prompt = rows[0]["input_ids"]
    answered = {**rows[0], "input_ids": [*prompt, 7, 2], "labels": [-100] * len(prompt) + [7, 2]}
    batch = Collator(processor)([answered])
    assert batch.model_inputs["pixel_values"].shape[0] == 1
    assert batch.labels[0][-2:].tolist() == [7, 2]


# ---- rows that fill up an epoch --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 6])
def test_images_of_rows_that_accelerate_repeats_count_once(models, tmp_path, rows):
    """5 = 4 + 1: of the last window one rank has no new row; it runs a repeated one, whose image must not count."""
    lines = [line for line in (models / "train.jsonl").read_text().splitlines(keepends=True) if "images" in line]
    data = models / f"images-{rows}.jsonl"
    data.write_text("".join(lines[:rows]))
    options = {"data__train": str(data), "data__eval": str(data), "training__eval_strategy": "steps"}
    options |= {"training__eval_steps": 1, "training__max_steps": 3, "training__eval_on_start": True}
    sizes = [f"training__per_device_{kind}_batch_size" for kind in ("train", "eval")]
    one, _ = run(models, tmp_path / "one", **options, **dict.fromkeys(sizes, 4))
    (tmp_path / "two").mkdir()
    write_config(models, tmp_path / "two", **options, **dict.fromkeys(sizes, 2))
    run_ranks(_fit_rank, 2, tmp_path / "two")
    first, second = ((where / "logging.jsonl").read_text() for where in (one.run_dir, tmp_path / "two" / "run"))
    for a, b in zip(map(json.loads, first.splitlines()), map(json.loads, second.splitlines()), strict=True):
        for key in (
            "loss",
            "vision_kd_loss",
            "grad_norm",
            "eval_loss",
            "eval_vision_kd_loss",
            "eval_vision_kd_loss_vit",
        ):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-5), key
    assert_same_weights(weights(one.run_dir), weights(tmp_path / "two" / "run"))


def test_a_tokenizer_that_names_its_image_token_is_read(models, tmp_path):
    """transformers then answers with one number where it is asked for several."""
    shutil.copytree(models / "student", tmp_path / "student")
    file = tmp_path / "student" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": {"image_token": "<image>"}}))
    assert isinstance(load_processing(str(tmp_path / "student")).tokenizer.image_token_ids, int)
    _, records = run(models, tmp_path, model__model=str(tmp_path / "student"), training__max_steps=1)
    assert "vision_kd_loss" in records[0]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_while_the_teacher_answers_keeps_the_answers(models, prompts, tmp_path, number, code):
    options = {"data__train": {"path": str(prompts), "answers": "teacher"}, "rlhf__max_new_tokens": 400}
    file = write_config(models, tmp_path, training__per_device_eval_batch_size=1, training__max_steps=1, **options)
    command = [sys.executable, "-m", "kdtrain", "fit", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    written = tmp_path / "run" / "teacher_answers"
    while not any(path.stat().st_size for path in written.glob("*/rank0.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "kept in" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    (kept,) = written.glob("*/rank0.jsonl")
    before = kept.read_text()
    assert 1 <= before.count("\n") < 8
    done = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert kept.read_text().startswith(before)
    assert kept.read_text().count("\n") == 8


def test_a_dry_run_answers_one_window_and_leaves_nothing(models, prompts, tmp_path):
    options = {"data__train": {"path": str(prompts), "answers": "teacher"}, "rlhf__max_new_tokens": 4}
    arguments = ConfigLoader.load_training_config(
        write_config(models, tmp_path, training__per_device_train_batch_size=2, **options)
    )
    reporter = Silent()
    fit(arguments, reporter, dry_run=True)
    assert reporter.answered[-1] == (2, 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_answers_beyond_max_length_and_the_students_positions_are_told(models, prompts, tmp_path, caplog):
    options = {"data__train": {"path": str(prompts), "answers": "teacher"}, "rlhf__max_new_tokens": 500}
    run(models, tmp_path, training__max_steps=1, **options)
    assert "rows are longer than data.max_length (128)" in caplog.text
    assert "The student was made for 512 positions (its config.json), and 8 of 8 training rows have more" in caplog.text
    assert "prompts with the teacher's answer" not in caplog.text  # which is no error, and known better afterwards


@pytest.mark.slow
def test_a_student_that_teaches_itself_reads_the_images_as_a_second_model_does(models, tmp_path):
    changes = {"custom__visual_kd": {"enabled": False}, "tuner__train_type": "lora", "training__learning_rate": 1.0}
    records = []
    for name, itself in (("hf", {}), ("self", {"rlhf__teacher": {"backend": "self"}})):
        torch.manual_seed(0)  # of the adapter
        _, log = run(models, tmp_path / name, rlhf__teacher_model=str(models / "student"), **itself, **changes)
        records.append([(one["loss"], one["llm_kd_loss"], one["grad_norm"]) for one in log if "loss" in one])
    assert records[0] == records[1]
    assert records[0][-1][1] > 1e-6
