"""GKDTrainerWithMetrics as TRL's users call it: what callbacks change, what the constructor takes, what it refuses."""

import copy
import logging

import datasets
import peft
import pytest
import torch
from transformers import TrainerCallback
from trl.experimental.utils import DataCollatorForChatML

from kdtrain.config import ConfigLoader
from kdtrain.data.batch import _warn_left_out
from kdtrain.errors import ConfigError, DataError, NotAvailableError, PreflightError
from kdtrain.runs.fit import fit
from kdtrain.teachers import LocalTeacher
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import tiny
from tests.test_data_encoder import FORGETFUL, ROW, tokenizer_with
from tests.test_models_probe import Silent
from tests.test_trainer import expected_terms, make_args, make_batch, make_trainer
from tests.tiny_vision import make_vlm


class Set(TrainerCallback):
    """Sets attributes of the trainer when a step has ended, as a schedule of β does; or in the middle of a window."""

    def __init__(self, trainer, at, event="step_end", **values):
        self.trainer, self.at, self.values = trainer, at, values
        setattr(self, f"on_{event}", self._set)

    def _set(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            for name, value in self.values.items():
                setattr(self.trainer, name, value)


def terms_at(trainer):
    """The `llm_kd_loss` that the models of now give for the rows of the next step, at β 0 and 1, float64."""
    batch = make_batch(trainer, tiny.CHATS[:2])
    return {beta: expected_terms(trainer.model, trainer.teacher_model, batch, beta)[0] for beta in (0.0, 0.5, 1.0)}


# ---- options that a callback changes ---------------------------------------------------------------------------------


def test_beta_set_by_a_callback_is_that_of_the_next_window_and_of_evaluation(tmp_path, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows=tiny.CHATS[:2], max_steps=2, learning_rate=0.0, beta=0.0,
        extra={"eval_dataset": tiny.CHATS[:2]},
    )  # fmt: skip
    expected = terms_at(trainer)
    trainer.add_callback(Set(trainer, at=1, beta=1.0))
    trainer.train()
    losses = [record["llm_kd_loss"] for record in trainer.state.log_history if "llm_kd_loss" in record]
    assert losses == pytest.approx([expected[0.0], expected[1.0]], rel=1e-5)
    trainer.beta = 0.5
    assert trainer.evaluate()["eval_llm_kd_loss"] == pytest.approx(expected[0.5], rel=1e-5)


def test_weights_and_the_temperature_of_the_loss_are_live_too(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, rows=tiny.CHATS[:2], max_steps=2, learning_rate=0.0)
    batch = make_batch(trainer, tiny.CHATS[:2])
    jsd, ce, _ = expected_terms(student, teacher, batch, 0.5, 2.0)
    trainer.add_callback(Set(trainer, at=1, llm_kd_weight=0.7, sft_alpha=0.2, kd_temperature=2.0))
    trainer.train()
    record = trainer.state.log_history[1]
    assert record["llm_kd_loss"] == pytest.approx(0.7 * jsd, rel=1e-5)
    assert record["sft_loss"] == pytest.approx(0.2 * ce, rel=1e-5)


def test_a_value_set_in_the_middle_of_a_window_does_not_split_it(tmp_path, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows=tiny.CHATS[:2], max_steps=2, learning_rate=0.0, beta=0.0,
        gradient_accumulation_steps=2, per_device_train_batch_size=1,
    )  # fmt: skip
    expected = terms_at(trainer)
    trainer.add_callback(Set(trainer, at=0, event="substep_end", beta=1.0))
    trainer.train()
    losses = [record["llm_kd_loss"] for record in trainer.state.log_history if "llm_kd_loss" in record]
    assert losses == pytest.approx([expected[0.0], expected[1.0]], rel=1e-5)


def test_lmbda_and_the_temperature_of_sampling_are_live(tmp_path, student, teacher, monkeypatch):
    seen = []
    from kdtrain.trainer import answers as module

    original = module.generation_config
    monkeypatch.setattr(module, "generation_config", lambda *args, **kw: seen.append(args[2]) or original(*args, **kw))
    trainer = make_trainer(tmp_path, student, teacher, rows=tiny.CHATS[:2], max_steps=3, lmbda=0.0)
    trainer.add_callback(Set(trainer, at=1, lmbda=1.0, temperature=0.3))
    trainer.add_callback(Set(trainer, at=2, lmbda=0.0, seq_kd=True, temperature=0.4))
    trainer.train()
    fractions = [record["on_policy_fraction"] for record in trainer.state.log_history if "loss" in record]
    assert fractions == [0.0, 1.0, 0.0]
    assert seen == [0.3, 0.4]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", 1.5, "beta: must be at most 1, got 1.5"),
        ("beta", "high", "beta: expected a number"),
        ("lmbda", -0.1, "lmbda: must be non-negative"),
        ("temperature", 0.0, "temperature: must be above 0"),
        ("kd_temperature", float("nan"), "temperature: not a finite number"),
        ("llm_kd_weight", -1, "llm_kd_weight: must be non-negative"),
    ],
)
def test_a_value_out_of_range_is_an_error_when_it_is_used(tmp_path, student, teacher, name, value, message):
    trainer = make_trainer(tmp_path, student, teacher, max_steps=2)
    trainer.add_callback(Set(trainer, at=1, **{name: value}))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_weight_above_zero_wants_the_teacher_that_the_trainer_was_built_without(tmp_path, student):
    trainer = make_trainer(tmp_path, student, None, llm_kd_weight=0.0)
    trainer.llm_kd_weight = 1.0
    with pytest.raises(ValueError, match="built without a teacher"):
        trainer.train()


def train_with_another_beta_on_one_rank(folder, guarded):
    trainer = make_trainer(folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), max_steps=2, beta=0.0)
    if not guarded or trainer.is_world_process_zero():
        trainer.add_callback(Set(trainer, at=1, beta=1.0))
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return trainer.beta


def test_all_ranks_use_the_new_value_and_one_rank_alone_may_not_change_it(tmp_path):
    assert tiny.run_ranks(train_with_another_beta_on_one_rank, 2, tmp_path, False) == [1.0, 1.0]
    for message in tiny.run_ranks(train_with_another_beta_on_one_rank, 2, tmp_path, True):
        assert message.startswith("beta of the trainer: not the same on all ranks")


# ---- adapters --------------------------------------------------------------------------------------------------------


def with_lora(model, seed=5, targets="all-linear", **kwargs):
    """A LoRA whose two matrices are both random: one at zero would change nothing."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **kwargs)
    return peft.get_peft_model(model, config)


@pytest.fixture
def adapter_folder(tmp_path, tokenizer):
    """An adapter alone, which names its base: (folder, what it gives with its base)."""
    base = tiny.make_qwen3(seed=2, hidden=48)
    tiny.save_model(base, tokenizer, tmp_path / "base")
    model = with_lora(type(base).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), model.eval()


def test_a_teacher_with_an_adapter_teaches_with_it(tmp_path, student, teacher):
    plain = copy.deepcopy(teacher)
    trainer = make_trainer(tmp_path, student, with_lora(teacher))
    batch = make_batch(trainer)
    jsd, _, _ = expected_terms(student, trainer.teacher_model, batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(jsd, rel=1e-5)
    assert jsd != pytest.approx(expected_terms(student, plain, batch)[0], rel=1e-2)
    trainer.train()


def test_a_teacher_by_the_name_of_an_adapters_folder_is_loaded_on_its_base(tmp_path, student, adapter_folder):
    folder, model = adapter_folder
    trainer = make_trainer(tmp_path / "run", student, folder)
    batch = make_batch(trainer)
    jsd, _, _ = expected_terms(student, model, batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(jsd, rel=1e-5)


def test_a_student_by_the_name_of_an_adapters_folder_goes_on_training_it(tmp_path, teacher, adapter_folder):
    folder, model = adapter_folder
    trainer = make_trainer(
        tmp_path / "run", folder, teacher, tokenizer=None, max_steps=2, extra={"processing_class": None}
    )
    own = dict(trainer.model.named_parameters())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert all(torch.equal(own[name].float(), value) for name, value in before.items())
    trainer.train()
    moved = {name for name, parameter in own.items() if not torch.equal(parameter.float(), before[name])}
    assert moved == {name for name in before if "lora_" in name}
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("weight", "lacks 1 of its weights"),
        ("base", "is not there. Correct base_model_name_or_path"),
        ("file", "has no adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_whole_is_refused(tmp_path, student, adapter_folder, spoil, message):
    from safetensors.torch import load_file, save_file

    folder, _ = adapter_folder
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    if spoil == "weight":
        tensors = load_file(weights)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, weights)
    elif spoil == "file":
        weights.unlink()
    else:
        (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(PreflightError, match=message):
        make_trainer(tmp_path / "run", student, folder)


def shares_a_weight(student):
    other = tiny.make_qwen3(seed=9)
    other.model.embed_tokens = student.get_input_embeddings()
    return other


@pytest.mark.parametrize(
    "pair",
    [
        lambda student: (student, student),
        lambda student: (lora := with_lora(student), lora),
        lambda student: (lora := with_lora(student), lora.get_base_model()),
        lambda student: (student, shares_a_weight(student)),
    ],
    ids=["one model", "one model with an adapter", "its base", "shared weights"],
)
def test_a_teacher_that_is_the_student_is_an_error_that_names_the_way(tmp_path, student, pair):
    own, other = pair(student)
    grads = [parameter.requires_grad for parameter in own.parameters()]
    with pytest.raises(ConfigError, match="backend: self"):
        make_trainer(tmp_path, own, other)
    assert [parameter.requires_grad for parameter in own.parameters()] == grads


VIRTUAL = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_no_positions_of_a_row(tmp_path, student, teacher, kind):
    trainer = make_trainer(tmp_path, student, teacher, sft_alpha=0.5, extra={"peft_config": VIRTUAL[kind]()})
    batch = make_batch(trainer)
    with torch.no_grad():
        own = trainer.model.eval()(**batch.model_inputs, use_cache=False).logits[:, -batch.labels.shape[1] :]
    answer = type("Answer", (), {"logits": own})
    jsd, ce, _ = expected_terms(lambda **_: answer, teacher, batch)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert loss.item() == pytest.approx(jsd + 0.5 * ce, rel=1e-5)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("prompt_encoder")}


def test_prompt_tuning_where_answers_are_generated_is_refused_with_the_reason(tmp_path, student, teacher):
    make_config = VIRTUAL["prompt tuning"]
    with pytest.raises(NotAvailableError, match=r"PROMPT_TUNING on the student .* padding of shorter prompts"):
        make_trainer(tmp_path, student, teacher, lmbda=0.5, extra={"peft_config": make_config()})
    tuned = peft.get_peft_model(teacher, make_config())
    make_trainer(tmp_path, tiny.make_qwen3(seed=1), tuned).train()
    with pytest.raises(NotAvailableError, match="on the teacher"):
        make_trainer(tmp_path, tiny.make_qwen3(seed=1), tuned, seq_kd=True)


# ---- batches of other collators --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_collator_of_trl_trains_on_and_off_policy(tmp_path, student, teacher, tokenizer, lmbda, caplog):
    trainer = make_trainer(
        tmp_path, student, teacher, lmbda=lmbda, max_steps=2, learning_rate=0.0,
        extra={"data_collator": DataCollatorForChatML(tokenizer, max_length=64)},
    )  # fmt: skip
    trainer.train()
    assert [record["on_policy_fraction"] for record in trainer.state.log_history[:2]] == [lmbda, lmbda]
    assert not any("byte_offsets" in record.message for record in caplog.records)  # known, and no matter of the user's


def test_a_batch_padded_on_the_left_has_the_loss_of_one_padded_on_the_right(tmp_path, teacher, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2)
    student = GPT2LMHeadModel(config)  # its positions count from the first column
    own = make_trainer(tmp_path, student, teacher).data_collator

    def on_the_right(rows):
        batch = own(rows)
        return {**batch.model_inputs, "labels": batch.labels}

    def on_the_left(rows):
        batch = on_the_right(rows)
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            for key in ("input_ids", "attention_mask", "labels"):
                batch[key][row] = batch[key][row].roll(batch["input_ids"].shape[1] - length)
        return batch

    assert 0 in on_the_left(tiny.CHATS[2:4])["attention_mask"][:, 0]
    losses = []
    for collator in (own, on_the_right, on_the_left):
        trainer = make_trainer(
            tmp_path, student, teacher, rows=tiny.CHATS[2:4], learning_rate=0.0, extra={"data_collator": collator}
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["llm_kd_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_collator_that_is_set_later_may_pad_on_the_left_too(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher)
    own = trainer.data_collator

    def on_the_left(rows):
        batch = own(rows)
        tensors = {**batch.model_inputs, "labels": batch.labels}
        width, lengths = batch.labels.shape[1], batch.model_inputs["attention_mask"].sum(1).tolist()
        return {
            name: torch.stack([row.roll(width - length) for row, length in zip(value, lengths, strict=True)])
            for name, value in tensors.items()
        }

    trainer.data_collator = on_the_left
    expected, given = own(tiny.CHATS[2:4]), on_the_left(tiny.CHATS[2:4])
    assert not torch.equal(given["labels"], expected.labels)
    ((batch,), _) = trainer.get_batch_samples(iter([given]), 1, torch.device("cpu"))
    assert torch.equal(batch.labels, expected.labels)
    assert torch.equal(batch.model_inputs["input_ids"][batch.labels != -100], batch.labels_S)


def test_keys_that_no_forward_takes_are_left_out_and_told_once(tmp_path, student, teacher, caplog):
    def collate(rows):
        batch = own(rows)
        tensors = {**batch.model_inputs, "labels": batch.labels, "prompt_lengths": batch.rows.prompt_lengths}
        return tensors | {"difficulty": torch.ones(len(rows)), "source": ["a"] * len(rows)}

    trainer = make_trainer(tmp_path, student, teacher, max_steps=2, lmbda=1.0, extra={"data_collator": collate})
    own = make_trainer(tmp_path, student, teacher).data_collator
    _warn_left_out.cache_clear()  # another test may have collated the same keys
    with caplog.at_level(logging.WARNING):
        trainer.train()
    told = [record.message for record in caplog.records if "difficulty" in record.message]
    assert told == ["Batches carry difficulty, source, which the student's forward does not take: left out."]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_longer_than_max_length_are_cut_told_once_and_counted(tmp_path, student, teacher, caplog):
    long = [{"messages": [*tiny.CHATS[0]["messages"][:1], {"role": "assistant", "content": "the file " * 40}]}]
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, student, teacher, rows=[*tiny.CHATS[:3], *long], max_length=64, max_steps=4)
        trainer.train()
    told = [record.message for record in caplog.records if "max_length" in record.message]
    assert told == [
        "Rows longer than max_length (64 tokens) are cut from the right.",
        "2 of 8 rows were cut at max_length (64 tokens).",
    ]
    assert trainer.data_collator([*long]).labels.shape == (1, 64)


def test_conversations_that_become_several_rows_are_told_once(tmp_path, student, teacher, caplog):
    tokenizer = tokenizer_with(FORGETFUL)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, student, teacher, tokenizer=tokenizer, max_steps=2).train()
        assert "become several rows" not in caplog.text
        make_trainer(tmp_path, student, teacher, rows=[ROW] * 4, tokenizer=tokenizer, max_steps=2).train()
    told = [record.message for record in caplog.records if "become several rows" in record.message]
    assert len(told) == 1
    assert "per_device_train_batch_size (2)" in told[0]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_batch_whose_rows_have_lost_their_answers_does_not_end_the_run(tmp_path, student, teacher, lmbda):
    long = [{"messages": [{"role": "user", "content": "the file " * 40}, tiny.CHATS[0]["messages"][1]]}] * 2
    trainer = make_trainer(tmp_path, student, teacher, rows=[*long, *tiny.CHATS[:2]], max_length=48, lmbda=lmbda,
                           train_sampling_strategy="sequential", max_steps=2)  # fmt: skip
    trainer.train()
    losses = [record["llm_kd_loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[1] > 0
    assert (losses[0] == 0) == (lmbda == 0)


class Torch(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_a_torch_data_set_with_a_length_trains(tmp_path, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows=Torch(tiny.CHATS), extra={"eval_dataset": {"a": tiny.CHATS}}
    )
    trainer.train()
    assert "eval_a_loss" in trainer.evaluate()


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], DataError, "train_dataset has no rows"),
        (datasets.Dataset.from_dict({"text": []}), DataError, "train_dataset has no rows"),
        (None, ConfigError, "`train_dataset` is required"),
        ("train.jsonl", ConfigError, r"it is a str\. Files are read by kdtrain\.fit"),
        (["a row"], DataError, "the first is a str"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(tiny.CHATS)), ConfigError, "keys train: pass one of"),
    ],
)
def test_what_is_no_training_data_is_an_error_that_says_so(tmp_path, student, teacher, tokenizer, rows, error, message):
    with pytest.raises(error, match=message):
        GKDTrainerWithMetrics(student, teacher, make_args(tmp_path), train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("formatting_func", [None, lambda row: row["messages"][1]["content"]])
def test_a_stream_to_evaluate_on_is_for_one_process(tmp_path, student, teacher, monkeypatch, formatting_func):
    stream = datasets.Dataset.from_list(tiny.CHATS).to_iterable_dataset()
    extra = {"eval_dataset": stream, "formatting_func": formatting_func}
    trainer = make_trainer(tmp_path, student, teacher, lmbda=0.0, extra=extra)
    assert trainer.get_eval_dataloader() is not None
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(NotAvailableError, match=r"IterableDataset .* on several processes"):
        trainer.get_eval_dataloader()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "model must be a transformers or PEFT model, or the name of one; it is a NoneType"),
        ({"model": torch.nn.Linear(2, 2)}, "it is a Linear"),
        ({"teacher_model": 3}, "teacher_model must be .* it is a int"),
        ({"teacher": tiny.make_qwen3()}, "teacher must be a kdtrain.teachers.Teacher; .* A model is a teacher_model"),
        ({"args": None}, "its output_dir has no default"),
        ({"args": {"beta": 0.1}}, "args must be a trl GKDConfig; it is a dict"),
        ({"processing_class": None}, "the model was built without a name"),
        ({"processing_class": "models/student"}, "must be a tokenizer or a processor; it is a str"),
        ({"callbacks": TrainerCallback()}, "callbacks must be a list; it is a TrainerCallback"),
        ({"callbacks": [print]}, "one is a builtin_function_or_method"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(tmp_path, student, teacher, tokenizer, given, message):
    arguments = {"model": student, "teacher_model": teacher, "args": make_args(tmp_path), "processing_class": tokenizer}
    if "teacher" in given:
        arguments.pop("teacher_model")
    with pytest.raises(ConfigError, match=message):
        GKDTrainerWithMetrics(train_dataset=tiny.CHATS, **arguments | given)


@pytest.mark.parametrize("by_name", [True, False])
def test_without_a_processing_class_the_models_own_is_loaded(tmp_path, teacher, tokenizer, by_name):
    folder = tiny.save_model(tiny.make_qwen3(seed=1), tokenizer, tmp_path / "student")
    model = folder if by_name else type(teacher).from_pretrained(folder)
    trainer = make_trainer(tmp_path / "run", model, teacher, extra={"processing_class": None})
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    trainer.train()


def test_the_teacher_may_be_named_in_the_arguments_alone(tmp_path, student, teacher, tokenizer):
    folder = tiny.save_model(teacher, tokenizer, tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "run", student, None, teacher_model_name_or_path=folder)
    assert torch.equal(trainer.teacher_model.lm_head.weight, teacher.lm_head.weight)


# ---- a config that asks for more than its training_args hold ---------------------------------------------------------


def test_train_arguments_in_place_of_their_training_args_name_both_ways(project, student, teacher):
    arguments = ConfigLoader.load_training_config(project / "config.yaml")
    with pytest.raises(ConfigError, match=r"pass its \.training_args.*kdtrain\.fit\(config\)"):
        GKDTrainerWithMetrics(student, teacher, arguments, train_dataset=tiny.CHATS)


@pytest.fixture
def of_config(project, tokenizer):
    """A trainer with the training_args of a config with other settings."""

    def build(model, overrides, **given):
        args = ConfigLoader.load_training_config(project / "config.yaml", overrides).training_args
        given = {"teacher_model": str(project / "teacher"), "processing_class": tokenizer, **given}
        return GKDTrainerWithMetrics(model, args=args, train_dataset=tiny.CHATS, eval_dataset=tiny.CHATS, **given)

    return build


@pytest.mark.parametrize("by_name", [False, True])
def test_lora_of_the_config_is_not_dropped(of_config, project, student, adapter_folder, by_name):
    lora, plain = ["tuner.train_type=lora"], str(project / "student")
    of_config(plain if by_name else student, [])
    with pytest.raises(ConfigError, match=r"tuner\.train_type: lora"):
        of_config(plain if by_name else student, lora)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for trainer in (
        of_config(plain if by_name else student, lora, peft_config=config),
        of_config(adapter_folder[0] if by_name else with_lora(tiny.make_qwen3()), lora),
    ):
        assert isinstance(trainer.model, peft.PeftModel)


@pytest.mark.parametrize("by_name", [False, True])
def test_frozen_parts_of_the_config_are_what_they_are_for_fit(of_config, project, student, tokenizer, by_name, caplog):
    text = str(project / "student") if by_name else student
    of_config(text, ["tuner.freeze_vit=true"])
    assert "tuner.freeze_vit has no effect: Qwen3ForCausalLM is a text model" in caplog.text
    with pytest.raises(PreflightError, match=r"tuner\.freeze_llm: Qwen3ForCausalLM is a text model"):
        of_config(text, ["tuner.freeze_llm=true"])
    seeing = make_vlm("llava")
    seeing.save_pretrained(project / "seeing")
    with pytest.raises(ConfigError, match=r"tuner.freeze_vit: true, and no weight of the model is frozen: load it"):
        of_config(str(project / "seeing") if by_name else seeing, ["tuner.freeze_vit=true"])


def test_a_student_that_is_frozen_in_part_is_let_through(of_config, student):
    student.lm_head.requires_grad_(False)
    of_config(student, ["tuner.freeze_llm=true"])


@pytest.mark.parametrize("form", ["teacher_model", "teacher"])
def test_options_for_loading_a_teacher_that_is_loaded_are_refused_unless_filled_in(of_config, student, teacher, form):
    given = {"teacher_model": None} | {form: LocalTeacher(teacher) if form == "teacher" else teacher}
    of_config(student, [], **given)
    with pytest.raises(ConfigError, match="teacher_model_init_kwargs would be ignored: the teacher is loaded already"):
        of_config(student, ["rlhf.teacher.dtype=float32"], **given)
    if form == "teacher_model":
        of_config(student, ["rlhf.teacher.dtype=float32"])  # by its name


def test_fit_loads_its_teacher_and_freezes_its_student_itself(project, caplog):
    overrides = ["rlhf.teacher_model_init_kwargs={dtype: float32}", "tuner.freeze_vit=true", "training.max_steps=1"]
    fit(ConfigLoader.load_training_config(project / "config.yaml", overrides), Silent())
    assert caplog.text.count("tuner.freeze_vit has no effect") == 1


def test_options_of_the_data_reach_the_trainers_own_collator(project, student, teacher, tokenizer):
    overrides = ["data.train_on=last", "data.on_overlength=drop", "training.pad_to_multiple_of=16"]
    arguments = ConfigLoader.load_training_config(project / "config.yaml", overrides)
    given = {"train_dataset": tiny.CHATS, "eval_dataset": tiny.CHATS, "processing_class": tokenizer}
    collator = GKDTrainerWithMetrics(student, teacher, arguments.training_args, **given).data_collator
    assert (collator.template.train_on, collator.on_overlength, collator.pad_to_multiple_of) == ("last", "drop", 16)


def test_steps_that_supervise_nothing_are_told(tmp_path, student, teacher, caplog):
    """All answers are cut off: losses of 0 look like a student that has learnt everything."""
    trainer = make_trainer(tmp_path, student, teacher, max_length=3, max_steps=1)
    trainer.train()
    assert "Nothing was supervised since the last record (step 1)" in caplog.text


def test_seq_kd_is_true_or_false(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, max_steps=1)
    trainer.seq_kd = "yes"
    with pytest.raises(ValueError, match="seq_kd: expected true or false, got text 'yes'"):
        trainer.train()


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
@pytest.mark.parametrize("side", ["train_dataset", "eval_dataset"])
def test_a_row_that_no_batch_can_be_made_of_is_refused_at_construction(tmp_path, student, teacher, make, side):
    rows = make([*tiny.CHATS, {"messages": []}, *tiny.CHATS])
    data = {"train_dataset": tiny.CHATS} | {side: rows}
    with pytest.raises(DataError, match=f"{side}: row 6: messages is empty"):
        GKDTrainerWithMetrics(student, teacher, make_args(tmp_path), processing_class=tiny.make_tokenizer(), **data)


def test_tools_of_a_data_set_reach_the_batch_without_the_keys_of_other_rows(tmp_path, student, teacher):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    rows = [{**tiny.CHATS[0], "tools": [{"function": {"name": name, name: 1}}]} for name in ("a", "b")]
    args = make_args(tmp_path)
    made = []
    for data in (rows, datasets.Dataset.from_list(rows)):
        trainer = GKDTrainerWithMetrics(student, teacher, args, processing_class=tokenizer, train_dataset=data)
        made.append(trainer.data_collator([trainer.train_dataset[i] for i in range(2)]).model_inputs["input_ids"])
    assert torch.equal(*made)
    assert "null" not in tokenizer.decode(made[0][1])
