"""The doctor for distillation: planted faults are found before the first step, and healthy runs are left in peace."""

import logging
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from kdtrain.cli.app import app
from kdtrain.config import check_config
from kdtrain.errors import PreflightError
from kdtrain.runs.deep import deep_findings
from tests import planted, tiny
from tests.planted import chat, variant, write
from tests.stub_server import StubServer
from tests.test_teachers_probe import Early, Shifted

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = planted.make_world(tmp_path_factory.mktemp("planted"))
    planted.make_pictures(folder)
    return folder


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A folder of its own, in which the world's are seen."""
    for path in world.iterdir():
        os.symlink(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(world / "cache"))
    # What memory a run takes is none of its faults here, and takes longer to find than all the others together.
    monkeypatch.setattr("kdtrain.runs.resources.memory_findings", lambda setup, limit: [])
    return tmp_path


def found(config):
    """Everything that is said of a config before its first step."""
    result = check_config(config)
    return [*result.errors, *result.warnings, *(() if result.errors else result.placed(deep_findings(result.config)))]


def said(config):
    return [f"{one.level}: {one.path}: {one.message}. {one.hint}" for one in found(config) if one.level != "info"]


# ---- planted faults: what is changed, and what is said of it ---------------------------------------------------------


def teacher(name):
    return lambda config, folder: config["rlhf"].update(teacher_model=str(folder / name))


def student(name):
    return lambda config, folder: config["model"].update(model=str(folder / name))


def rlhf(**options):
    return lambda config, folder: config["rlhf"].update(options)


def data(**options):
    return lambda config, folder: config["data"].update(options)


def rows(made, split="train", **options):
    def plant(config, folder):
        write(folder / "planted.jsonl", made)
        config["data"].update({split: str(folder / "planted.jsonl"), **options})

    return plant


def template(side, text, **files):
    """Another chat template for one side, or other files in its folder."""

    def plant(config, folder):
        path = variant(folder, f"planted_{side}", side, chat_template=text, **files)
        config["model" if side == "student" else "rlhf"]["model" if side == "student" else "teacher_model"] = path

    return plant


def both(*plants):
    def plant(config, folder):
        for one in plants:
            one(config, folder)

    return plant


def without_evaluation(config, folder):
    del config["data"]["eval"], config["training"]["eval_strategy"]


def copied(config, folder):
    config["rlhf"]["teacher_model"] = variant(folder, "twin", "student")


def never_read(config, folder):
    model = tiny.make_qwen3(322, seed=1)
    model.get_output_embeddings().weight.data[2] = 0  # <|im_end|>
    tiny.save_model(model, planted.make_tokenizer(), folder / "base")
    config["model"]["model"] = str(folder / "base")
    config["tuner"] = {"train_type": "lora"}


def other_tokens(size):
    def plant(config, folder):
        tokenizer = tiny.make_tokenizer(size)
        vocab = 322 if size == 320 else size
        if size == 320:
            tokenizer.add_tokens(["<plan>", "</plan>"])
        tiny.save_model(tiny.make_qwen3(vocab, 48, seed=3), tokenizer, folder / "other")
        config["rlhf"]["teacher_model"] = str(folder / "other")

    return plant


def untrained(config, folder):
    tiny.save_model(tiny.make_qwen3(322, 48, seed=9), planted.make_tokenizer(), folder / "untrained")
    config["rlhf"]["teacher_model"] = str(folder / "untrained")


def worse(config, folder):
    config["model"]["model"] = str(folder / "teacher")
    teacher("weak")(config, folder)


def itself(**options):
    def plant(config, folder):
        del config["rlhf"]["teacher_model"]
        config["rlhf"].update(sft_alpha=0.0, teacher={"backend": "self", **options})
        config["tuner"] = {"train_type": "lora"}

    return plant


def pictures(teacher_name="vlm_teacher", **visual):
    def plant(config, folder):
        config["model"]["model"] = str(folder / "vlm_student")
        config["data"] = {"train": str(folder / "pictures.jsonl"), "max_length": 128}
        config["training"].update(eval_strategy="no")
        config["rlhf"]["teacher_model"] = str(folder / teacher_name)
        if visual:
            config["custom"] = {"visual_kd": {"enabled": True, "targets": ["aligner"], **visual}}

    return plant


LONG = [chat(i, 10**12 + j) for i in range(4) for j in range(4)]
TEXTS = [{"text": f"What is {i}? It is {i}."} for i in range(32)]
COMPLETIONS = [{"prompt": f"What is {i}? ", "completion": f"It is {i} in all, as the teacher says."} for i in range(32)]
QUESTIONS = [{"messages": row["messages"][:1]} for row in planted.ROWS]
SWITCHED_OFF = [
    {"messages": [row["messages"][0], {**row["messages"][1], "weight": 0}]} for row in planted.ROWS
]  # fmt: skip

FAULTS = {
    # the rows
    "evaluates on the file that it trains on": (
        lambda config, folder: config["data"].update(eval=config["data"]["train"]),
        "warning: data.eval[0]: names rows of data.train",
    ),
    "evaluates on a copy of what it trains on": (
        rows(planted.ROWS, "eval"), "warning: data.eval: 64 of 64 rows of data.eval (100.0%) are rows of data.train",
    ),
    "a few rows are on both sides": (
        rows(planted.HELD_OUT + planted.ROWS[:2], "eval"), "warning: data.eval: 2 of 10 rows of data.eval (20.0%)",
    ),
    "max_length cuts the answers": (
        data(max_length=32, on_overlength="truncate"), "warning: data.max_length: data.max_length (32) takes",
    ),
    "max_length drops most rows": (
        rows(planted.ROWS[:4] + LONG, max_length=56, on_overlength="drop"),
        "That is what data.on_overlength: drop asks for.",
    ),
    "rows are longer than max_length": (rows(LONG, max_length=40), "error: data.train: 16 of 16 rows are longer than"),
    "rows have no answers": (rows(QUESTIONS), "error: data.train: 64 of 64 rows cannot be used"),
    "the loss is switched off in all turns": (rows(SWITCHED_OFF), "(weight, loss, loss_mask, train or trainable)"),
    "no row contributes cross-entropy": (
        lambda config, folder: config["data"].update(train=[{"path": config["data"]["train"], "ce": False}]),
        "warning: rlhf.sft_alpha: The cross-entropy hardly moves the student: 0.00%",
    ),
    "answers are to be sampled for plain text": (
        both(rows(TEXTS), rlhf(lmbda=0.5)), "error: data.train: 32 rows are plain text, without a prompt to generate",
    ),
    # chat templates
    "a base student without a template, and chats": (template("student", None), "error: data.train: "),
    "a base student and a chat teacher on plain text": (
        both(without_evaluation, rows(COMPLETIONS), template("student", None)),
        "warning: rlhf.teacher_model: The teacher is a chat model",
    ),
    "a base teacher for a chat student": (
        template("teacher", None), "warning: rlhf.teacher_model: The teacher's tokenizer has no chat template",
    ),
    "the teacher knows another template": (
        template("teacher", planted.OTHER), "warning: rlhf.teacher_model: The teacher has another chat template",
    ),
    "the teacher's template adds a system message": (
        template("teacher", planted.WITH_SYSTEM), "The teacher's: <|im_start|>system\\nYou count.<|im_end|>",
    ),
    "the teacher was trained to think": (
        template("teacher", planted.ALWAYS_THINKS),
        "Thinking is on one side only: the student reads prompts without a block of reasoning, the teacher was",
    ),
    "the student thinks and the teacher does not": (
        template("student", planted.ALWAYS_THINKS),
        "the student reads prompts that begin with a block of reasoning, the teacher was trained on prompts without",
    ),
    "thinking is switched off for one side": (
        both(
            template("student", planted.THINKING),
            template("teacher", planted.THINKING),
            data(chat_template_kwargs={"enable_thinking": False}),
            rlhf(teacher={"chat_template_kwargs": {"enable_thinking": True}}),
        ),
        "warning: rlhf.teacher.chat_template_kwargs: Thinking is on one side only",
    ),
    "the template ends no turn": (
        both(template("student", planted.ENDLESS), template("teacher", planted.ENDLESS)),
        "The teacher does not end an answer where your rows do: to <|im_start|> it gives",
    ),
    "a base student that cannot learn to end a turn": (
        never_read, "warning: model.model: The student has never read what ends a turn (<|im_end|>: ",
    ),
    # the teacher
    "the teacher has not learnt anything": (untrained, "hardly better than the tokens beside them"),
    "the teacher is worse than the student": (worse, "The teacher knows your rows less well than the student does"),
    "the teacher is a copy of the student": (copied, "Student and teacher say the same of every token"),
    "the teacher wants to think first": (teacher("thinker"), "the teacher begins its answers with <think>"),
    "the teacher never ends a turn": (
        teacher("endless"), "to <|im_end|> it gives 0.0% (8 answers); it would write <|endoftext|>",
    ),
    "another vocabulary": (other_tokens(300), "error: rlhf.teacher_model: Student and teacher have different vocab"),
    "as many tokens, and other ones": (other_tokens(320), "error: rlhf.teacher_model: "),
    "the teacher is the student as it is": (
        itself(weights="live"), "error: rlhf.teacher.weights: live teaches nothing",
    ),
    "the teacher is the student without its adapter": (
        itself(weights="base"), "warning: rlhf.teacher.backend: teaches nothing: the teacher is the student without",
    ),
    # the terms
    "hardly any cross-entropy": (rlhf(sft_alpha=1e-3), "warning: rlhf.sft_alpha: The cross-entropy hardly moves"),
    "hardly any divergence": (rlhf(llm_kd_weight=1e-2), "warning: rlhf.llm_kd_weight: The divergence from the teacher"),
    "a temperature that flattens everything": (rlhf(kd_temperature=50.0), "warning: rlhf.llm_kd_weight: "),
    "a divergence that vanishes at its ends": (rlhf(beta=0.999), "warning: rlhf.llm_kd_weight: "),
    "on-policy alone, and cross-entropy": (
        both(rlhf(lmbda=1.0), without_evaluation),
        "warning: rlhf.sft_alpha: has no effect",
    ),
    "hardly any visual KD": (pictures(weight=1e-4), "warning: custom.visual_kd.weight: Visual KD hardly moves"),
    # images
    "a teacher that does not see the image": (pictures("blind"), "error: rlhf.teacher_model: The teacher does not see"),
    "a teacher of text for rows with images": (pictures("teacher"), "error: "),
    "visual KD without images": (
        both(
            pictures(weight=1.0),
            rows([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]),
        ),
        "error: data.train: custom.visual_kd is enabled, but no row of data.train has an image",
    ),
}  # fmt: skip


# What is found by the same look as another fault above, or said by the same one of a healthy run.
LOOKED_AT_LIKE_ANOTHER = {
    "evaluates on a copy of what it trains on", "the student thinks and the teacher does not",
    "the teacher's template adds a system message", "a temperature that flattens everything",
    "a divergence that vanishes at its ends", "Jensen-Shannon", "reverse KL alone", "no divergence", "half learnt",
    "rows held out by content", "answers of the teacher", "quickstart/ce", "on_policy/off",
}  # fmt: skip


def cases(names):
    return [tiny.slow(name) if name in LOOKED_AT_LIKE_ANOTHER else name for name in names]


@pytest.mark.parametrize("fault", cases(FAULTS))
def test_a_planted_fault_is_found_before_the_first_step(folder, fault):
    plant, message = FAULTS[fault]
    config = planted.healthy(folder)
    plant(config, folder)
    assert any(message in line for line in said(config)), said(config)


def test_there_are_more_than_thirty_faults():
    assert len(FAULTS) + 2 > 30  # and the two servers below


@pytest.mark.parametrize(("server", "message"), [(Shifted, "those of the token before"), (Early, "of the token after")])
def test_a_server_with_the_targets_of_other_tokens_is_found(folder, server, message):
    config = planted.healthy(folder)
    del config["rlhf"]["teacher_model"]
    model, tokenizer = tiny.make_qwen3(322, 48, seed=2), planted.make_tokenizer()
    with server(model, tokenizer) as running:
        config["rlhf"]["teacher"] = {"backend": "vllm", "base_url": running.url, "model": "teacher", "top_k": 8}
        assert any(message in line for line in said(config)), said(config)


# ---- no false alarm --------------------------------------------------------------------------------------------------


HEALTHY = {
    "as it is": lambda config, folder: None,
    "Jensen-Shannon": rlhf(beta=0.5, sft_alpha=0.05),
    "reverse KL alone": rlhf(beta=1.0, sft_alpha=0.0),
    "no divergence": lambda config, folder: (
        config["rlhf"].update(llm_kd_weight=0), config["rlhf"].pop("teacher_model"), config["rlhf"].pop("beta"),
        config["rlhf"].pop("sft_alpha"), config["rlhf"].pop("lmbda"),
    ),
    "LoRA": lambda config, folder: config.update(tuner={"train_type": "lora"}),
    "on-policy": rlhf(lmbda=0.5, max_new_tokens=16),
    "answers of the teacher": rlhf(seq_kd=True, max_new_tokens=32),
    "rows held out by content": data(eval="10%"),
    "both think, or neither": both(
        template("student", planted.THINKING), template("teacher", planted.THINKING),
        data(chat_template_kwargs={"enable_thinking": False}),
    ),
    "half learnt": teacher("weak"),
    "the student is taught by what it does not read": both(
        student("weak"), data(max_length=96),
        itself(weights="live", prefix=[{"role": "system", "content": "Say a number."}]),
    ),
    "the student is the average that teaches it": both(student("weak"), itself(weights="ema"), rlhf(sft_alpha=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", cases(HEALTHY))
def test_nothing_is_said_of_a_healthy_run(folder, name):
    config = planted.healthy(folder)
    HEALTHY[name](config, folder)
    assert said(config) == []


@pytest.mark.parametrize("name", cases(["quickstart/distill", "quickstart/ce", "on_policy/off", "on_policy/mixed"]))
def test_nothing_is_said_of_an_example_with_models_that_know_its_rows(folder, name):
    own = [f"model.model={folder / 'student'}", f"data.train={folder / 'train.jsonl'}"]
    taught = [] if name == "quickstart/ce" else [f"rlhf.teacher_model={folder / 'teacher'}"]
    result = check_config(EXAMPLES / f"{name}.yaml", [*own, *taught, f"training.output_dir={folder / 'run'}"])
    assert not result.errors, result.errors
    assert not result.warnings, result.warnings
    assert [one.message for one in deep_findings(result.config) if one.level != "info"] == []


def test_a_teacher_that_sees_the_image_is_said_to(folder):
    config = planted.healthy(folder)
    pictures(weight=1.0)(config, folder)
    messages = [one.message for one in found(config)]
    assert any("The teacher sees the images" in message for message in messages)
    assert not any("hardly moves" in message for message in messages)


# ---- where it is said ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(folder, monkeypatch):
    """Runs a command on a config file; (exit code, stdout, the error)."""

    def run(name, config, *arguments):
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        result = CliRunner().invoke(app, [name, "config.yaml", *arguments])
        return result.exit_code, result.stdout, result.exception

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


def test_fit_stops_with_every_error_in_one_numbered_list_before_anything_is_trained(folder, command):
    config = planted.healthy(folder)
    config["training"].update(lr_scheduler_type="cosine_with_min_lr")
    pictures("blind")(config, folder)
    _, _, error = command("fit", config)
    assert isinstance(error, PreflightError)
    assert error.exit_code == 3
    lines = str(error).splitlines()
    assert lines[0].endswith("things stop this run before it begins:")
    assert [line[:3] for line in lines[1:] if line[:1].isdigit()] == ["1. ", "2. "]
    assert "training.lr_scheduler_type: cosine_with_min_lr" in str(error)
    assert "The teacher does not see the images" in str(error)
    assert not list((folder / "run").glob("*.safetensors"))


def test_rows_of_both_splits_are_read_before_either_is_refused(folder, command):
    config = planted.healthy(folder)
    for split in ("train", "eval"):
        write(folder / f"bad_{split}.jsonl", [planted.ROWS[0], {}])
        config["data"][split] = str(folder / f"bad_{split}.jsonl")
    _, _, error = command("fit", config)
    assert "1. " in str(error)
    assert "bad_train.jsonl:2" in str(error)
    assert "bad_eval.jsonl:2" in str(error)


def test_fit_warns_once_and_trains(folder, caplog):
    from kdtrain.config import ConfigLoader
    from kdtrain.runs.fit import fit
    from tests.test_vision_fit import Silent

    config = planted.healthy(folder)
    config["rlhf"]["sft_alpha"] = 1e-3
    config["training"]["max_steps"] = 1
    with caplog.at_level(logging.WARNING, logger="kdtrain"):
        fit(ConfigLoader.load_training_config(config), Silent())
    assert sum("hardly moves the student" in record.message for record in caplog.records) == 1


def test_a_server_is_healthy_too(folder):
    from transformers import AutoModelForCausalLM

    config = planted.healthy(folder)
    model = AutoModelForCausalLM.from_pretrained(config["rlhf"].pop("teacher_model"))
    with StubServer(model, planted.make_tokenizer()) as running:
        config["rlhf"]["teacher"] = {"backend": "vllm", "base_url": running.url, "model": "teacher", "top_k": 16}
        assert said(config) == []
