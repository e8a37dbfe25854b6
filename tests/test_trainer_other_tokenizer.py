"""A teacher with another tokenizer in the trainer: one number however the window is split, and whose text is read."""

import dataclasses

import pytest
import torch

from kdtrain.data import Collator
from kdtrain.data.byte_alignment import NONE, TokenBytes
from kdtrain.data.other_tokenizer import OtherTokenizer
from kdtrain.errors import ConfigError, DataError
from kdtrain.teachers import LocalTeacher
from tests import tiny, tiny_other
from tests.test_losses_other_tokenizer import bernoulli_kl
from tests.test_trainer import make_trainer

TEXTS = ["the path é", "a token and the student", "zero, 日本", "the file it returns", "two", "1 and 30", "", "x y z"]
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": text or "nothing"}]}
    for i, text in enumerate(TEXTS)
]


def other_trainer(folder, rows=ROWS, student=None, teacher=None, extra=None, **options):
    own, of_teacher = tiny.make_tokenizer(), tiny_other.byte_level()
    collator = Collator(own, other_tokenizer=OtherTokenizer(own, of_teacher))
    defaults = {"cross_tokenizer": "alm", "sft_alpha": 0.3, "llm_kd_weight": 50.0}
    teacher = teacher or tiny_other.make_teacher(of_teacher)
    return make_trainer(
        folder, student, teacher, rows, own, {"data_collator": collator, **(extra or {})}, **{**defaults, **options}
    )


def log_likelihoods(model, ids, mask, labels, chunks):
    """Of each chunk of each row, in float64 and by a loop over positions."""
    with torch.no_grad():
        logprobs = model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
    found = {}
    for row in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if chunks[row, t] != NONE:
                key = row, int(chunks[row, t])
                found[key] = found.get(key, 0.0) + logprobs[row, t - 1, labels[row, t]]
    return found


def expected_alm(student, teacher, batch):
    """Mean over the batch's chunks."""
    tokens, inputs = batch.teacher_tokens, batch.model_inputs
    of_teacher = log_likelihoods(teacher, tokens.input_ids, tokens.attention_mask, tokens.labels, tokens.chunks)
    own = log_likelihoods(
        student, inputs["input_ids"], inputs["attention_mask"], batch.labels, batch.student_chunks.numbers
    )
    assert own.keys() == of_teacher.keys()
    return torch.stack([bernoulli_kl(of_teacher[key], own[key]) for key in own]).mean().item(), len(own)


def test_the_loss_is_that_of_the_chunks_of_both_models(tmp_path):
    trainer = other_trainer(tmp_path)
    batch = trainer.data_collator(ROWS[:3])
    loss = trainer.compute_loss(trainer.model, batch)
    alm, chunks = expected_alm(trainer.model, trainer.teacher_model, batch)
    assert int(batch.num_chunks.sum()) == chunks
    kd, ce = (trainer._metrics["train"][name][-1].item() for name in ("llm_kd_loss", "sft_loss"))
    assert kd == pytest.approx(50 * alm, rel=1e-5)
    assert loss.item() == pytest.approx(kd + ce, rel=1e-6)


def test_the_same_tokenizer_on_both_sides_is_one_chunk_a_token(tmp_path):
    own = tiny.make_tokenizer()
    collator = Collator(own, other_tokenizer=OtherTokenizer(own, tiny.make_tokenizer()))
    teacher = tiny.make_qwen3(seed=2, hidden=48)
    trainer = other_trainer(tmp_path, teacher=teacher, extra={"data_collator": collator}, sft_alpha=0.0)
    batch = trainer.data_collator(ROWS[:3])
    assert int(batch.num_chunks.sum()) == int(batch.num_supervised)
    with torch.no_grad():
        both = [
            model(**batch.model_inputs).logits[:, :-1].double().log_softmax(-1)[batch.predicts_BT]
            for model in (teacher, trainer.model)
        ]
    of_teacher, of_student = (one.gather(1, batch.labels_S[:, None])[:, 0] for one in both)
    expected = 50 * bernoulli_kl(of_teacher, of_student).mean().item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-5)


def weights_after(folder, steps=2, **options):
    options = {"per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "max_steps": steps, **options}
    trainer = other_trainer(
        folder, train_sampling_strategy="sequential", lr_scheduler_type="constant", max_grad_norm=1e9, **options
    )
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    numbers = [record[key] for record in records for key in ("loss", "llm_kd_loss", "grad_norm", "aligned_share")]
    return numbers, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()


WAYS = {
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "one row at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "padding-free": {"padding_free": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "packed": {"packing": True, "max_length": 96, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "by tokens": {"per_device_train_tokens": 90},
}


@pytest.mark.parametrize("way", tiny.first_quick(WAYS))
def test_a_window_is_one_number_however_it_is_split(tmp_path, way):
    (numbers, weights), (expected, wanted) = weights_after(tmp_path / "a", **WAYS[way]), weights_after(tmp_path / "b")
    assert numbers == pytest.approx(expected, rel=1e-4)
    assert weights == pytest.approx(wanted, abs=2e-6)


def test_two_ranks_equal_one_process(tmp_path):
    results = tiny.run_ranks(_on_ranks, 2, str(tmp_path / "two"))
    expected, wanted = weights_after(tmp_path / "one")
    for numbers, weights in results:
        assert numbers == pytest.approx(expected, rel=1e-4)
        assert weights == pytest.approx(wanted, abs=2e-6)


def _on_ranks(folder):
    return weights_after(folder, per_device_train_batch_size=4)


def test_the_teacher_reads_the_text_of_what_the_student_writes(tmp_path):
    trainer = other_trainer(
        tmp_path, lmbda=1.0, per_device_train_batch_size=3, samples_per_prompt=2, train_sampling_strategy="sequential"
    )
    seen = []
    compute = trainer.compute_loss

    def noted(model, batch, *args, **kwargs):
        seen.append(batch)
        return compute(model, batch, *args, **kwargs)

    trainer.compute_loss = noted
    student = tiny.make_qwen3(seed=1)
    trainer.train()
    batch = seen[-1]
    own, of_teacher, tokens = tiny.make_tokenizer(), tiny_other.byte_level(), batch.teacher_tokens
    prompts = [
        of_teacher.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        for row in ROWS[:3]
    ]
    assert len(batch) == 6
    for row, length in enumerate(batch.rows.prompt_lengths.tolist()):
        ids = tokens.input_ids[row][tokens.attention_mask[row].bool()].tolist()
        asked = own.decode(batch.model_inputs["input_ids"][row][:length])
        (prompt,) = [one for one, chat in zip(prompts, ROWS, strict=False) if chat["messages"][0]["content"] in asked]
        assert of_teacher.decode(ids).startswith(prompt)
        written = TokenBytes(own)([label for label in batch.labels[row].tolist() if label != NONE])
        read = b"".join(TokenBytes(of_teacher)(ids)).removeprefix(prompt.encode()).removesuffix(b"</turn>")
        assert b"".join(written).startswith(read)
    alm, _ = expected_alm(student, trainer.teacher_model, batch)
    record = trainer.state.log_history[0]
    assert record["llm_kd_loss"] == pytest.approx(50 * alm, rel=1e-4)
    assert record["sft_loss"] == 0


def test_a_student_whose_head_cannot_be_read_gets_the_same_loss_from_its_logits(tmp_path, monkeypatch):
    trainer = other_trainer(tmp_path)
    batch = trainer.data_collator(ROWS[:4])
    fused = trainer.compute_loss(trainer.model, batch)
    trainer._objective = dataclasses.replace(trainer._objective, fused=False)
    dense = trainer.compute_loss(trainer.model, batch)
    parameters = list(trainer.model.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (fused, dense)]
    assert fused.item() == pytest.approx(dense.item(), rel=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_evaluation_is_a_mean_over_the_chunks_of_the_whole_set(tmp_path):
    trainer = other_trainer(tmp_path, per_device_eval_batch_size=3)
    found = trainer.evaluate(ROWS)
    alm, _ = expected_alm(trainer.model, trainer.teacher_model, trainer.data_collator(ROWS))
    assert found["eval_llm_kd_loss"] == pytest.approx(50 * alm, rel=1e-5)
    assert found["eval_aligned_share"] == 1.0


def test_answers_are_kept_without_a_divergence_of_single_tokens(tmp_path):
    trainer = other_trainer(tmp_path, lmbda=1.0, log_completions_steps=1)
    trainer.train()
    assert trainer.completions.newest
    assert all(one.reverse_kl is None for one in trainer.completions.newest)


def test_the_teachers_tokenizer_is_that_of_its_folder_where_no_collator_is_passed(tmp_path):
    of_teacher = tiny_other.byte_level()
    folder = tiny.save_model(tiny_other.make_teacher(of_teacher), of_teacher, tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "run", None, folder, ROWS, cross_tokenizer="alm")
    batch = trainer.data_collator(ROWS[:2])
    assert batch.num_chunks.min() > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"seq_kd": True}, "seq_kd: not available yet beside cross_tokenizer"),
    ({"select": "best", "samples_per_prompt": 2, "lmbda": 1.0}, "select best: not available yet"),
])  # fmt: skip
def test_what_it_cannot_be_beside_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        other_trainer(tmp_path, **options)


def test_batches_that_do_not_say_what_belongs_together_are_refused(tmp_path):
    own = tiny.make_tokenizer()
    with pytest.raises(ConfigError, match="which tokens of student and teacher belong together"):
        other_trainer(tmp_path, extra={"data_collator": Collator(own)})
    trainer = other_trainer(tmp_path)
    with pytest.raises(DataError, match="which tokens of student and teacher belong together"):
        trainer.compute_loss(trainer.model, Collator(own)(ROWS[:2]))
    with pytest.raises(ConfigError, match="the teacher's tokenizer, and none is saved"):
        make_trainer(tmp_path, None, LocalTeacher(tiny.make_qwen3()).module, ROWS, cross_tokenizer="alm")


def test_what_a_source_says_of_divergences_has_no_effect_either(tmp_path):
    rows = [{**row, "kd_divergence": kind} for row, kind in zip(ROWS, ["tvd", None] * 4, strict=True)]
    found, expected = weights_after(tmp_path / "a", 1, rows=rows), weights_after(tmp_path / "b", 1)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
