"""Every field of trl's GKDConfig: honoured, refused with the reason, or without a say in training.

A field that trl adds breaks the first test: decide about it here, in `kdtrain/trainer/arguments.py` and, for YAML, in
`kdtrain/config/training_rules.py`.
"""

import dataclasses
import logging
import re
from types import SimpleNamespace

import datasets
import pytest
from trl.experimental.gkd import GKDConfig

from kdtrain.config import check_config
from kdtrain.config.suggest import known_keys
from kdtrain.config.training_fields import training_fields
from kdtrain.config.training_rules import REFUSED as REFUSED_IN_YAML
from kdtrain.errors import ConfigError, NotAvailableError
from kdtrain.trainer.argument_checks import check_parallelism
from kdtrain.trainer.refused_fields import REFUSED
from tests import tiny
from tests.test_trainer import make_trainer

# By upstream's trainer, past which nothing here goes.
UPSTREAM = """
    output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
    optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
    max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_train_batch_size
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps
    save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
    skip_memory_metrics router_aux_loss_coef chat_template_path eos_token activation_offloading"""

# By the trainer itself, where some values are refused.
OURS = """
    beta lmbda temperature max_new_tokens seq_kd disable_dropout teacher_model_name_or_path teacher_model_init_kwargs
    model_init_kwargs trust_remote_code max_length packing padding_free pad_token pad_to_multiple_of
    dataset_text_field dataset_kwargs
    completion_only_loss assistant_only_loss train_sampling_strategy parallelism_config hub_token"""

IRRELEVANT = {
    "remove_unused_columns": "always off: the collator reads columns that no forward takes",
    "logging_nan_inf_filter": "always off: a NaN stops the run",
    "dataset_num_proc": "a warning: rows are encoded when they are needed",
    "length_column_name": "the tokens of a row are counted",
    "do_train": "for scripts",
    "do_eval": "for scripts",
    "do_predict": "for scripts",
    "resume_from_checkpoint": "for scripts: train() takes it",
    "local_rank": "set by the launcher",
}

# A value of each refused field that changes something.
VALUES = {
    "eval_packing": True, "packing_strategy": "wrapped", "loss_type": "dft",
    "label_smoothing_factor": 0.1, "use_liger_kernel": True, "liger_kernel_config": {"rope": True},
    "truncation_mode": "keep_end", "shuffle_dataset": True, "average_tokens_across_devices": False,
    "auto_find_batch_size": True, "label_names": ["answers"], "use_cache": True,
}  # fmt: skip

PAIRS = [{"prompt": "What is it?", "completion": " the path"}, {"prompt": "And now?", "completion": " zero"}]
TEXTS = [{"text": text} for text in tiny.TEXT]


def test_every_field_is_decided_once():
    decided = [*UPSTREAM.split(), *OURS.split(), *IRRELEVANT, *REFUSED]
    fields = {field.name for field in dataclasses.fields(GKDConfig)}
    new = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # not before transformers 5.23
    assert sorted(decided) == sorted(fields | new)


def test_yaml_knows_every_field_or_sends_it_elsewhere():
    elsewhere = {key for section, keys in known_keys().items() if section != "training" for key in keys}
    fields = set(training_fields())
    assert fields == {field.name for field in dataclasses.fields(GKDConfig)}
    assert fields - set(known_keys()["training"]) - elsewhere == {"model_init_kwargs", "teacher_model_name_or_path"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_would_be_ignored_is_refused_with_the_reason(tmp_path, student, teacher, name):
    error = NotAvailableError if REFUSED[name].later else ConfigError
    with pytest.raises(error, match=f"{name}=.*{re.escape(REFUSED[name].reason)}"):
        make_trainer(tmp_path, student, teacher, **{name: VALUES[name]})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_yaml_refuses_it_too(tmp_path, name):
    (tmp_path / "train.jsonl").write_text("")
    config = {"model": {"model": "a/b"}, "data": {"train": "c/d"}, "rlhf": {"teacher_model": "e/f"}}
    found = check_config({**config, "training": {"output_dir": "x", name: VALUES[name]}}).errors
    assert [diagnostic.path for diagnostic in found] == [f"training.{name}"]
    assert name in REFUSED_IN_YAML or "move it to data." in found[0].hint


@pytest.mark.parametrize("name", ["label_names", "use_cache"])
def test_what_both_refuse_for_one_reason_is_said_in_the_same_words(name):
    ours, in_yaml = REFUSED[name], REFUSED_IN_YAML[name]
    assert (ours.reason, ours.instead, ours.harmless) == (in_yaml.reason, in_yaml.instead, in_yaml.harmless)


def test_harmless_values_of_refused_fields_pass(tmp_path, student, teacher):
    harmless = {"packing": False, "packing_strategy": "bfd", "loss_type": "nll", "label_smoothing_factor": 0.0,
                "eval_packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}  # fmt: skip
    make_trainer(tmp_path, student, teacher, **harmless)


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        (
            {"dataset_kwargs": {"add_special_tokens": False}},
            tiny.CHATS,
            "dataset_kwargs: add_special_tokens would be ign",
        ),
        ({"completion_only_loss": True}, tiny.CHATS, "completion_only_loss=True needs rows with a prompt"),
        ({"completion_only_loss": False}, PAIRS, "completion_only_loss=False would supervise prompts"),
        ({"assistant_only_loss": True}, TEXTS, "assistant_only_loss=True needs conversations"),
        ({"model_init_kwargs": {"dtype": "float32"}}, tiny.CHATS, "model_init_kwargs would be ignored"),
        ({}, [{"input_ids": [1, 5, 6]}], "Add a 'labels' column"),
        ({"pad_token": "<nothing>"}, tiny.CHATS, "pad_token '<nothing>' is no token"),
        ({"train_sampling_strategy": "batch_rebalance"}, tiny.CHATS, "not available yet"),
        ({"packing": True, "max_length": None}, tiny.CHATS, "which is None: set it"),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path, student, teacher, options, rows, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, student, teacher, rows=rows, **options)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"completion_only_loss": True}, PAIRS),
        ({"completion_only_loss": False}, TEXTS),
        ({"assistant_only_loss": True}, tiny.CHATS),
        ({"neftune_noise_alpha": 5.0}, tiny.CHATS),
    ],
)
def test_values_that_are_honoured_train(tmp_path, student, teacher, options, rows):
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, **options)
    trainer.train()
    assert {name: getattr(trainer.args, name) for name in options} == options


def test_fields_of_the_data_reach_the_default_collator(tmp_path, student, teacher, tokenizer):
    rows = [{"body": row["text"]} for row in TEXTS]
    options = {"pad_to_multiple_of": 32, "dataset_text_field": "body", "pad_token": "<|endoftext|>"}
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, tokenizer=tokenizer.__class__.from_pretrained(
        tokenizer.save_pretrained(tmp_path / "tokenizer") and tmp_path / "tokenizer"), **options)  # fmt: skip
    batch = make_batch_of(trainer, rows)
    assert batch.model_inputs["input_ids"].shape[1] % 32 == 0
    assert set(batch.model_inputs["input_ids"][batch.model_inputs["attention_mask"] == 0].tolist()) == {0}
    trainer.train()


def make_batch_of(trainer, rows):
    return trainer.data_collator([dict(row) for row in rows[:2]])


def test_a_formatting_function_makes_the_text_of_a_row(tmp_path, student, teacher):
    rows = [{"question": "What?", "answer": "zero"}, {"question": "Where?", "answer": "the path"}]
    extra = {"formatting_func": lambda row: f"{row['question']} {row['answer']}"}
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, extra=extra)
    labels = make_batch_of(trainer, rows).labels[0]
    assert trainer.processing_class.decode(labels[labels != -100]).endswith("at? zero<|im_end|>")
    trainer.train()
    with pytest.raises(ConfigError, match="formatting_func and data_collator"):
        make_trainer(tmp_path, student, teacher, rows=rows, extra=extra | {"data_collator": trainer.data_collator})


def test_a_chat_template_by_path_is_that_of_the_batches(tmp_path, student, teacher):
    (tmp_path / "template.jinja").write_text(tiny.CHATML.replace("m.role +", "'the ' + m.role +"))
    trainer = make_trainer(tmp_path, student, teacher, chat_template_path=str(tmp_path / "template.jinja"))
    ids = make_batch_of(trainer, tiny.CHATS).model_inputs["input_ids"][0]
    assert trainer.processing_class.decode(ids).startswith("<|im_start|>the user")


def test_an_eos_token_ends_texts_and_generation(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, rows=TEXTS, eos_token="<|endoftext|>")
    batch = make_batch_of(trainer, TEXTS)
    assert batch.labels[0][batch.model_inputs["attention_mask"][0] == 1][-1] == 0
    assert 0 in trainer.model.generation_config.eos_token_id


def test_a_number_of_processes_for_the_data_is_told_to_have_no_effect(tmp_path, student, teacher, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, student, teacher, dataset_num_proc=2)
    assert any("dataset_num_proc has no effect" in record.message for record in caplog.records)


@pytest.mark.parametrize("kind", ["cp_enabled", "sp_enabled"])
def test_sequences_cut_over_ranks_are_refused(kind):
    config = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, kind: True})
    with pytest.raises(NotAvailableError, match="parallelism_config"):
        check_parallelism(SimpleNamespace(parallelism_config=config))


def test_rows_of_a_data_set_with_other_columns_are_judged_by_the_first(tmp_path, student, teacher):
    rows = datasets.Dataset.from_list(PAIRS)
    make_trainer(tmp_path, student, teacher, rows=rows, completion_only_loss=True).train()


def test_the_masks_of_trls_tokenised_rows_are_labels(tmp_path, student, teacher):
    rows = [
        {"input_ids": [1, 5, 6, 7, 8], "completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [0, 0, 0, 1, 1]},
        {"input_ids": [1, 9, 10], "completion_mask": [0, 0, 1], "assistant_masks": [0, 0, 1]},
    ]
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, lmbda=1.0)
    batch = make_batch_of(trainer, rows)
    assert batch.labels.tolist() == [[-100, -100, -100, 7, 8], [-100, -100, 10, -100, -100]]
    assert batch.rows.prompt_lengths.tolist() == [2, 2]
    trainer.train()
