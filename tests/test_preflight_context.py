"""Before a student learns to do without what its teacher reads, it is seen how much that changes the teacher."""

import dataclasses
import logging

import pytest
import torch
from datasets import Dataset

from kdtrain.data import Collator
from kdtrain.losses import TopKLogprobs
from kdtrain.preflight.context import NOTHING_TO_DISTIL, Context, context_findings, context_kl, look_at_context
from kdtrain.teachers import LocalTeacher
from tests import tiny
from tests.test_trainer import make_trainer

PREFIX = "You are a pirate. "


def encoded(tokenizer, prompt, answer, prefix=""):
    """A row whose teacher reads a prefix before the prompt."""
    ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"], tokenizer(prefix + prompt)["input_ids"]
    prompt_ids, answer_ids, teacher_ids = ids
    row = {
        "input_ids": prompt_ids + answer_ids,
        "labels": [-100] * len(prompt_ids) + answer_ids,
        "prompt_length": len(prompt_ids),
        "ce": True,
        "row_id": "0:0",
    }
    if prefix:
        row |= {
            "teacher_input_ids": teacher_ids + answer_ids,
            "teacher_labels": [-100] * len(teacher_ids) + answer_ids,
            "teacher_prompt_length": len(teacher_ids),
        }
    return row


def rows(prefixes=(PREFIX, PREFIX, PREFIX)):
    tokenizer = tiny.make_tokenizer()
    return [
        encoded(tokenizer, f"What is {i} and {i}?", f"It is {2 * i}, as you know.", prefix)
        for i, prefix in enumerate(prefixes)
    ]


def collated(some):
    return Collator(tiny.make_tokenizer())(some)


def float64_kl(model, batch):
    """Σ p·log(p/q) of the model behind both prompts, row by row and without padding."""
    found = []
    seen = batch.as_teacher_sees_it()
    for i in range(len(batch)):
        both = []
        for view in (seen, batch):
            length = int(view.model_inputs["attention_mask"][i].sum())
            with torch.no_grad():
                logits = model(view.model_inputs["input_ids"][i : i + 1, :length]).logits[0].double()
            both.append(torch.log_softmax(logits, -1)[:-1][view.labels[i, 1:length] != -100])
        log_p, log_q = both
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found)


def test_the_figure_is_the_mean_kl_of_the_teacher_with_its_prefix_from_the_teacher_without():
    model, batch = tiny.make_qwen3(seed=3), collated(rows())
    context = look_at_context(LocalTeacher(model), batch, tiny.make_tokenizer())
    expected = float64_kl(model, batch)
    assert context.kl == pytest.approx(float(expected.mean()), rel=1e-5)
    assert context.kl > 0.1
    assert (context.tokens, context.rows) == (len(expected), 3)


def test_both_prompts_are_shown_from_where_they_differ():
    context = look_at_context(LocalTeacher(tiny.make_qwen3()), collated(rows()), tiny.make_tokenizer())
    assert context.student_prompt == "What is 0 and 0?"
    assert context.teacher_prompt == "You are a pirate. What is 0 and 0?"


def test_a_long_common_beginning_is_left_out_and_control_characters_are_escaped():
    row = encoded(tiny.make_tokenizer(), "x" * 400 + "\n\x1b[31mred?", "Yes.", "")
    other = encoded(tiny.make_tokenizer(), "x" * 400 + "\n\x1b[31mblue and red?", "Yes.", "")
    row |= {f"teacher_{name}": other[name] for name in ("input_ids", "labels", "prompt_length")}
    context = look_at_context(LocalTeacher(tiny.make_qwen3()), collated([row]), tiny.make_tokenizer())
    assert context.student_prompt.startswith("…")
    assert context.student_prompt.endswith("xx\\n\\x1b[31mred?")
    assert "blue and red?" in context.teacher_prompt
    assert len(context.teacher_prompt) < 120


def test_rows_that_both_read_alike_say_nothing():
    assert look_at_context(LocalTeacher(tiny.make_qwen3()), collated(rows(["", ""])), tiny.make_tokenizer()) is None
    assert context_findings(None) == []


def test_a_prefix_of_its_own_in_every_row_is_told_from_one_that_all_share():
    def differs(prefixes):
        batch = collated(rows(prefixes))
        return look_at_context(LocalTeacher(tiny.make_qwen3()), batch, tiny.make_tokenizer()).differs_by_row

    assert not differs([PREFIX, PREFIX, PREFIX])
    assert not differs([PREFIX, "", PREFIX])
    assert not differs([PREFIX, PREFIX, "Be a pirate. ", "Be a pirate. "])
    assert differs(["The answer is 0. ", "The answer is 2. "])


def test_top_k_answers_give_the_kl_over_named_tokens_and_the_rest():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.log_softmax(3 * torch.randn(7, 40, generator=generator), -1) for _ in range(2))
    full = context_kl(log_p, log_q, 40)

    def top(log_probabilities, k):
        values, indices = log_probabilities.topk(k)
        return TopKLogprobs(indices, values)

    assert torch.allclose(context_kl(top(log_p, 40), top(log_q, 40), 40), full, rtol=1e-4, atol=1e-5)
    p, q = log_p.exp().double(), log_q.exp().double()
    ids = log_p.topk(5).indices
    p5, q5 = p.gather(1, ids), q.gather(1, ids)
    p_rest, q_rest = 1 - p5.sum(-1), 1 - q5.sum(-1)
    bucket = (p5 * (p5 / q5).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
    found = context_kl(top(log_p, 5), top(log_q, 40), 40)
    assert torch.allclose(found, bucket.float(), rtol=1e-4, atol=1e-5)
    assert (found <= full + 1e-5).all()


def test_an_impossible_token_makes_no_nan():
    log_p = torch.log_softmax(torch.tensor([[0.0, 1.0, -torch.inf]]), -1)
    assert context_kl(log_p, log_p, 3).tolist() == [0.0]


def test_less_than_the_threshold_is_nothing_to_distil_and_a_warning():
    little = Context(NOTHING_TO_DISTIL / 2, 100, 8, False, "Hi", "Be brief. Hi")
    (finding,) = context_findings(little)
    assert finding.level == "warning"
    assert "nothing to distil" in finding.message
    assert "0.01 nats per token" in finding.message
    (finding,) = context_findings(dataclasses.replace(little, kl=NOTHING_TO_DISTIL))
    assert finding.level == "info"
    assert "The student reads: Hi\nThe teacher reads: Be brief. Hi" in finding.message


def test_a_hint_for_each_row_is_said_to_be_learnt_less_often():
    findings = context_findings(Context(0.5, 100, 8, True, "Hi", "It is 4. Hi"))
    assert "arXiv 2605.11182" in findings[1].message


# ---- before training -------------------------------------------------------------------------------------------------


def started(folder, caplog, dataset, **options):
    """What is logged of a context when a run begins."""
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=dataset, max_steps=1, max_new_tokens=4, **options
    )
    trainer.data_collator = Collator(trainer.processing_class)
    with caplog.at_level(logging.INFO, logger="kdtrain"):
        trainer.train()
        trainer.train()
    return [record.message for record in caplog.records if "alone reads" in record.message]


def with_some_prefixes(count=40):
    """Rows of which the last ones alone have a prefix."""
    made = rows([*[""] * (count - 2), PREFIX, PREFIX])
    names = sorted({name for row in made for name in row})
    return Dataset.from_list([{name: row.get(name) for name in names} for row in made])


def test_a_run_shows_both_prompts_and_the_kl_once_before_its_first_step(tmp_path, caplog):
    (message,) = started(tmp_path, caplog, with_some_prefixes())
    assert "nats per token (KL" in message
    assert "of 2 rows" in message
    assert "The teacher reads: You are a pirate. What is 38 and 38?" in message


def test_rows_without_answers_are_looked_at_on_answers_that_are_written_for_them(tmp_path, caplog):
    dataset = with_some_prefixes(4)
    prompts = dataset.map(
        lambda row: {
            "input_ids": row["input_ids"][: row["prompt_length"]],
            "labels": [-100] * row["prompt_length"],
            "teacher_input_ids": row["teacher_input_ids"] and row["teacher_input_ids"][: row["teacher_prompt_length"]],
            "teacher_labels": row["teacher_labels"] and [-100] * row["teacher_prompt_length"],
        }
    )
    (message,) = started(tmp_path, caplog, prompts, lmbda=1.0)
    assert "of 2 rows" in message


def test_no_word_where_both_read_the_same(tmp_path, caplog):
    assert started(tmp_path, caplog, Dataset.from_list(rows(["", ""]))) == []
