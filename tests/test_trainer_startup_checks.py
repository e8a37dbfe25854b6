"""What upstream finds out while training begins is found out before, and the best step is the best."""

import json
import resource

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from transformers import EarlyStoppingCallback, TrainerCallback

from kdtrain.errors import CheckpointError, DataError, PreflightError
from kdtrain.preflight.token_ids import check_rows
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.metrics import HIGHER_IS_BETTER
from kdtrain.trainer.startup_checks import check_startup
from tests import tiny
from tests.test_trainer import make_args, make_trainer


def make(folder, student, teacher, callbacks=(), compute_metrics=None, evaluation=None, **kwargs):
    rows = datasets.Dataset.from_list(tiny.CHATS)
    return GKDTrainerWithMetrics(
        student, teacher, make_args(folder, **{"eval_strategy": "steps", "eval_steps": 1, "sft_alpha": 0.3, **kwargs}),
        train_dataset=rows, eval_dataset=evaluation or rows, processing_class=tiny.make_tokenizer(),
        callbacks=list(callbacks), compute_metrics=compute_metrics,
    )  # fmt: skip


# ---- the best step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "eval_llm_kd_loss", "sft_loss", "token_accuracy"])
def test_the_best_step_is_the_one_with_the_best_value(tmp_path, student, teacher, name):
    trainer = make(
        tmp_path, student, teacher, metric_for_best_model=name, max_steps=6, learning_rate=0.3, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, eval_on_start=True,
    )  # fmt: skip
    trainer.train()
    bare = name.removeprefix("eval_")
    values = {r["step"]: r[f"eval_{bare}"] for r in trainer.state.log_history if f"eval_{bare}" in r and r["step"]}
    best = max(values.values()) if HIGHER_IS_BETTER[bare] else min(values.values())
    assert len(set(values.values())) > 1
    assert trainer.state.best_metric == best
    assert values[trainer.state.best_global_step] == best


def test_every_term_and_metric_has_a_direction_or_is_known_to_have_none():
    from kdtrain.trainer.metrics import LOSS_TERMS, TOKEN_METRICS

    neither = {"student_entropy", "teacher_entropy", "aligned_share"}
    assert {*LOSS_TERMS, *TOKEN_METRICS} - HIGHER_IS_BETTER.keys() == neither
    assert [name for name, higher in HIGHER_IS_BETTER.items() if higher] == ["token_accuracy", "teacher_agreement"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "student_entropy"}, "student_entropy: has no better and worse. There are llm_kd"),
        ({"metric_for_best_model": "eval_runtime"}, "has no better and worse"),
        ({"metric_for_best_model": "vision_kd_loss"}, "no evaluation has 'vision_kd_loss'"),
        ({"metric_for_best_model": "llm_kd_loss", "eval_kd": False}, "There are loss, sft_loss, token_accuracy"),
        (
            {"metric_for_best_model": "token_accuracy", "lr_scheduler_type": "reduce_lr_on_plateau",
             "lr_scheduler_kwargs": {"mode": "min"}},
            "mode min goes the wrong way for token_accuracy",
        ),
    ],
)  # fmt: skip
def test_a_metric_without_a_direction_or_that_evaluations_lack_is_refused(tmp_path, student, teacher, options, message):
    trainer = make(tmp_path, student, teacher, **options)
    with pytest.raises(PreflightError, match=message):
        trainer.train()


def test_early_stopping_and_schedulers_follow_the_direction_of_the_metric(tmp_path, student, teacher):
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make(
        tmp_path, student, teacher, callbacks=[stop], metric_for_best_model="vision_kd_loss_aligner", max_steps=4
    )
    with pytest.raises(PreflightError, match="no evaluation has"):
        trainer.train()
    trainer = make(tmp_path, student, teacher, callbacks=[stop], max_steps=4)
    with pytest.raises(PreflightError, match=r"EarlyStoppingCallback needs training.metric_for_best_model"):
        trainer.train()
    trainer = make(tmp_path, student, teacher, callbacks=[stop], metric_for_best_model="loss", eval_strategy="no")
    with pytest.raises(PreflightError, match="EarlyStoppingCallback needs evaluation"):
        trainer.train()
    trainer = make(
        tmp_path, student, teacher, metric_for_best_model="token_accuracy", lr_scheduler_type="reduce_lr_on_plateau",
        load_best_model_at_end=True, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.lr_scheduler.mode == "max"


def test_metrics_of_ones_own_keep_upstreams_direction_and_several_sets_have_their_names(tmp_path, student, teacher):
    rows = datasets.Dataset.from_list(tiny.CHATS)
    make(
        tmp_path, student, teacher, compute_metrics=lambda _: {"bleu": 0.1}, metric_for_best_model="bleu"
    ).train()  # fmt: skip
    trainer = make(
        tmp_path, student, teacher, metric_for_best_model="eval_chats_token_accuracy",
        evaluation={"chats": rows, "others": rows},
    )  # fmt: skip
    trainer.train()
    assert trainer.args.greater_is_better is True


# ---- what upstream builds when training begins -----------------------------------------------------------------------


def test_what_a_callback_requires_is_an_error_of_the_set_up_and_what_happens_later_is_not(tmp_path, student, teacher):
    class Refuses(TrainerCallback):
        def __init__(self, when):
            self.when = when

        def on_train_begin(self, args, state, control, **kwargs):
            assert self.when != "begin", "I need a tracker"

        def on_step_end(self, args, state, control, **kwargs):
            assert self.when != "step", "I need a tracker"

    with pytest.raises(PreflightError, match=r"Training could not begin: I need a tracker[\s\S]*callback"):
        make(tmp_path, student, teacher, callbacks=[Refuses("begin")]).train()
    with pytest.raises(AssertionError, match="I need a tracker"):
        make(tmp_path, student, teacher, callbacks=[Refuses("step")]).train()


def test_a_rehearsal_keeps_nothing_and_leaves_the_run_as_it_is(tmp_path):
    records = []
    for times in (0, 3):
        trainer = make_trainer(
            tmp_path, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), max_steps=3, lr_scheduler_type="cosine"
        )
        for _ in range(times):
            check_startup(trainer)
        assert trainer.optimizer is None
        assert trainer.lr_scheduler is None
        trainer.train()
        records.append(
            [(r["loss"], r["grad_norm"], r["learning_rate"]) for r in trainer.state.log_history if "loss" in r]
        )
    assert records[0] == records[1]


def test_fewer_rows_than_a_batch_are_refused_with_both_numbers(tmp_path, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, per_device_train_batch_size=8, dataloader_drop_last=True)
    with pytest.raises(PreflightError, match=r"An epoch has 6 rows, and a batch takes 8"):
        trainer.train()


def test_workers_that_need_more_open_files_than_there_may_be_are_refused(tmp_path, student, teacher):
    """Without this Python printed the same traceback without an end, and the run hung."""
    trainer = make_trainer(tmp_path, student, teacher, dataloader_num_workers=2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, limits[1]))
    try:
        with pytest.raises(
            PreflightError, match=r"40 files open, and 2 workers .* need about 112 .*ulimit -n 4096, or"
        ):
            check_startup(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    trainer.args.dataloader_num_workers = 0
    check_startup(trainer)


def test_an_optimizer_file_that_does_not_fit_is_a_matter_of_the_checkpoint(tmp_path, student, teacher):
    make_trainer(tmp_path, student, teacher, save_strategy="steps", save_steps=1, max_steps=2).train()
    file = tmp_path / "checkpoint-1" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    trainer = make_trainer(tmp_path, student, teacher, max_steps=2)
    with pytest.raises(CheckpointError, match=r"Optimizer and scheduler of .*checkpoint-1 cannot be loaded"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---- token ids -------------------------------------------------------------------------------------------------------

GOOD, BAD = ({"input_ids": [5, last, 7], "labels": [-100, last, 7], "row_id": f"0:{last}"} for last in (319, 320))


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
def test_ids_beyond_an_embedding_are_refused_with_their_row_before_training(tmp_path, form, student, teacher):
    sizes = {"student": 320, "teacher": 400}
    check_rows(form([GOOD, GOOD]), "data.train", sizes)
    with pytest.raises(DataError, match=r"data.train: row 0:320 has token id 320, and the student's embedding has 320"):
        check_rows(form([GOOD, BAD]), "data.train", sizes)
    with pytest.raises(DataError, match=r"data.eval \(a\): row 0:320 .* the teacher's embedding has 320"):
        check_rows({"a": form([GOOD, BAD])}, "data.eval", {"student": 400, "teacher": 320})
    with pytest.raises(DataError, match="token id 320"):
        make_trainer(tmp_path, student, None, rows=[GOOD, BAD], llm_kd_weight=0.0)


def test_ids_of_rows_that_were_not_chosen_do_not_count():
    check_rows(datasets.Dataset.from_list([GOOD, BAD]).select([0]), "data.train", {"student": 320})


@pytest.mark.parametrize("gap", [False, True])
def test_a_tokenizer_larger_than_the_embedding_is_fine_until_a_row_uses_it(tmp_path, student, gap):
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    if gap:  # fewer tokens than the embedding has rows, and an id beyond them
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = {token: i for token, i in state["model"]["vocab"].items() if i < 310}
        state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "".join(merge) in kept]
        state["model"]["vocab"] = kept | {"<extra>": 320}
        tokenizer = type(tokenizer)(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)),
            chat_template=tokenizer.chat_template,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
        )
        assert len(tokenizer) <= 320
    make_trainer(tmp_path, student, None, llm_kd_weight=0.0, tokenizer=tokenizer).train()
    rows = [{"messages": [{"role": "user", "content": "<extra>"}, {"role": "assistant", "content": "the path"}]}]
    trainer = make_trainer(tmp_path, student, None, llm_kd_weight=0.0, tokenizer=tokenizer, rows=rows)
    with pytest.raises(DataError, match=r"has token id 320, and the student's embedding has 320 rows"):
        trainer.train()
    with pytest.raises(DataError, match="token id 320"):
        trainer.evaluate(datasets.Dataset.from_list(rows))


class Made(torch.utils.data.Dataset):
    """Rows that are made when they are asked for."""

    def __init__(self, rows):
        self.rows, self.made = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.made += 1
        return self.rows[index]


def test_rows_that_are_made_on_access_are_looked_at_batch_by_batch(tmp_path, student):
    data = Made([GOOD] * 200 + [BAD])
    trainer = make_trainer(tmp_path, student, None, rows=data, llm_kd_weight=0.0, max_steps=-1,
                           per_device_train_batch_size=100, train_sampling_strategy="sequential")  # fmt: skip
    assert data.made < 50
    with pytest.raises(DataError, match=r"a batch \(rows 0:320\) has token id 320, and the student's embedding"):
        trainer.train()
    assert trainer.state.global_step == 2
