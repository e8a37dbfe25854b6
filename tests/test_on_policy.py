"""On-policy steps: nothing but the prompts, the seed and the weights decides what is sampled, and how far a step goes.

Not the answers that the data have, not micro-batches, not ranks, not a stop and a resume; and no rank waits for ever.
"""

import pytest
import torch

from kdtrain.errors import NonFiniteError
from tests import tiny
from tests.test_distributed import sharding_on_a_cpu
from tests.test_trainer import make_trainer, windows
from tests.tiny import lora_config

STOPS = [2, *range(10, 70)]  # one of five tokens ends an answer: rows stop early, and each at another place


def make_student(stops=STOPS, **kwargs):
    student = tiny.make_qwen3(seed=1, **kwargs)
    student.generation_config.eos_token_id = list(stops)
    return student


def make_rows(count, prompt_lengths=range(1, 31, 3), completion=4, named=True):
    """Tokenised rows with prompts of other lengths, and as many tokens of an answer as are asked for."""
    generator = torch.Generator().manual_seed(0)
    lengths = list(prompt_lengths)
    rows = []
    for i in range(count):
        prompt = torch.randint(70, 320, (lengths[i % len(lengths)],), generator=generator).tolist()
        answer = torch.randint(70, 320, (40,), generator=generator).tolist()[:completion]
        row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "prompt_length": len(prompt)}
        rows.append({**row, "row_id": f"0:{i}"} if named else row)
    return rows


def trainer_of(folder, rows, **kwargs):
    defaults = {
        "lmbda": 1.0, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9,
        "train_sampling_strategy": "sequential", "max_new_tokens": 8,
    }  # fmt: skip
    student = kwargs.pop("student", None)
    student = make_student() if student is None else student
    return make_trainer(folder, student, tiny.make_qwen3(seed=2, hidden=48), rows=rows, **{**defaults, **kwargs})


def watched(trainer):
    """What each window of a trainer's training will hold, as lists: D, and the answers by the ids of their rows."""
    seen = []
    original = trainer.get_batch_samples

    def get_batch_samples(*args):
        batches, count = original(*args)
        seen.append((int(count), {name: answer for batch in batches for name, answer in answers_of(batch)}))
        return batches, count

    trainer.get_batch_samples = get_batch_samples
    return seen


def answers_of(batch):
    names = batch.rows.ids or [str(i) for i in range(len(batch))]
    samples = batch.rows.samples or [0] * len(batch)
    for name, sample, labels in zip(names, samples, batch.labels, strict=True):
        if (labels != -100).any():
            yield (name, sample), labels[labels != -100].tolist()


def numbers_of(trainer, *keys):
    records = [record for record in trainer.state.log_history if "loss" in record]
    return [[record[key] for key in keys or ("loss", "grad_norm")] for record in records]


def flat(numbers):
    return [value for some in numbers for value in some]


# ---- what the data's own answers and the way of cutting a window change: nothing -------------------------------------


@pytest.mark.parametrize("options", [{}, {"lmbda": 0.0, "seq_kd": True, "sft_alpha": 0.3}], ids=["student", "seq_kd"])
@pytest.mark.parametrize("named", [True, tiny.slow(False)])
def test_a_generated_step_does_not_depend_on_the_answers_of_the_data(tmp_path, options, named):
    results = []
    for completion in (0, 4, 40):
        rows = make_rows(8, completion=completion, named=named)
        trainer = trainer_of(tmp_path, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
        seen = watched(trainer)
        trainer.train()
        results.append((numbers_of(trainer), seen))
    (expected, sampled), *others = results
    assert expected[0][1] > 0
    for numbers, seen in others:
        assert seen == sampled
        assert flat(numbers) == pytest.approx(flat(expected), rel=1e-6)


def cut(folder, micro_batch, accumulation, options):
    """Two windows of the same eight rows: numbers, D and answers of each."""
    trainer = trainer_of(
        folder, make_rows(8), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
        max_steps=2, **options,
    )  # fmt: skip
    seen = watched(trainer)
    trainer.train()
    return numbers_of(trainer), seen


CUT = {
    "student": {},
    "teacher": {"lmbda": 0.0, "seq_kd": True, "sft_alpha": 0.3},
    "the best of three samples": {"samples_per_prompt": 3, "select": "best"},
    "two samples weighted": {"samples_per_prompt": 2, "select": "weighted"},
}


@pytest.mark.parametrize("options", tiny.first_quick(CUT.values()), ids=CUT)
def test_samples_and_gradients_do_not_depend_on_micro_batches_or_ranks(tmp_path, options):
    expected, sampled = cut(tmp_path, 8, 1, options)
    assert len({len(answer) for answer in sampled[0][1].values()}) > 2  # they end at different places
    for micro_batch, accumulation in ((2, 4), (1, 8)):
        numbers, seen = cut(tmp_path, micro_batch, accumulation, options)
        # The weights of the second window differ by rounding, as do the samples' probabilities.
        assert seen == sampled
        assert flat(numbers) == pytest.approx(flat(expected), rel=1e-5)
    ranks = tiny.run_ranks(cut, 2, tmp_path, 2, 2, options)
    for window, (count, answers) in enumerate(sampled):
        assert [seen[window][0] for _, seen in ranks] == [count, count]
        assert {**ranks[0][1][window][1], **ranks[1][1][window][1]} == answers
    for numbers, _ in ranks:
        assert flat(numbers) == pytest.approx(flat(expected), rel=1e-5)


def test_equal_prompts_get_answers_of_their_own(tmp_path):
    row = make_rows(1, prompt_lengths=[5])[0]
    del row["row_id"]
    trainer = trainer_of(tmp_path, [row] * 8, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    loader = iter(trainer.get_train_dataloader())
    batches, _ = trainer.get_batch_samples(loader, 2, torch.device("cpu"))
    answers = [tuple(answer) for batch in batches for _, answer in answers_of(batch)]
    assert len(set(answers)) > 4


# ---- ranks -----------------------------------------------------------------------------------------------------------


def many_steps(folder, sharded, options):
    """Fifty steps of prompts and answers of other lengths on each rank; numbers, and the lengths of its answers."""
    sharding = sharding_on_a_cpu() if sharded else {}
    rows = make_rows(20, prompt_lengths=[1, 2, 30, 25, 3, 17, 9])
    trainer = trainer_of(
        folder,
        rows,
        student=make_student(layers=1),
        per_device_train_batch_size=2,
        max_steps=50,
        learning_rate=1e-3,
        **options,
        **sharding,
    )
    seen = watched(trainer)
    trainer.train()
    wrapped = type(trainer.model_wrapped).__name__
    return numbers_of(trainer), [max(map(len, answers.values())) for _, answers in seen], wrapped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "options"), [(False, {}), (True, {"lmbda": 0.5, "seq_kd": True})], ids=["ddp", "fsdp2"]
)
def test_ranks_whose_answers_end_at_different_places_take_fifty_steps_together(tmp_path, sharded, options):
    ranks = tiny.run_ranks(many_steps, 2, tmp_path, sharded, options, timeout=120)
    (numbers, first, wrapped), (others, second, _) = ranks
    assert wrapped.startswith("FSDP" if sharded else "Distributed")
    assert len(numbers) == 50
    assert numbers == others
    assert torch.tensor(numbers).isfinite().all()
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 10  # of the longest answer


BEST = {"samples_per_prompt": 2, "select": "best"}


def end_of_epochs(folder, world, sharded=False, options=None):
    """Two epochs of five rows in windows of four: at the end of each one rank of two has none of its own.

    Sharded, the ranks write a row at a time, so that the other one has as many calls to make.
    """
    sharding = {**sharding_on_a_cpu(), "generation": {"batch_size": 1}} if sharded else {}
    trainer = trainer_of(
        folder, make_rows(5), per_device_train_batch_size=4 // world, max_steps=4, learning_rate=1e-3,
        **sharding, **(options or {}),
    )  # fmt: skip
    seen = watched(trainer)
    trainer.train()
    return [count for count, _ in seen], [answers for _, answers in seen], numbers_of(trainer)


@pytest.mark.parametrize(
    ("sharded", "options"),
    [tiny.slow(False, {}), tiny.slow(False, BEST), tiny.slow(True, {}), (True, BEST)],
    ids=["ddp-all", "ddp-best", "fsdp2-all", "fsdp2-best"],
)
def test_a_rank_of_which_all_rows_are_repeated_at_the_end_of_an_epoch_counts_nothing(tmp_path, sharded, options):
    counts, answers, numbers = end_of_epochs(tmp_path, 1, options=options)
    assert [len(window) for window in answers] == [4, 1, 4, 1]
    first, second = tiny.run_ranks(end_of_epochs, 2, tmp_path, 2, sharded, options)
    assert first[0] == second[0] == counts
    assert [{**a, **b} for a, b in zip(first[1], second[1], strict=True)] == answers
    for rank in (first, second):
        assert flat(rank[2]) == pytest.approx(flat(numbers), rel=1e-5)


def one_rank_stops_at_once(folder, sharded):
    """A window of which one rank's rows all stop at their first token, and the other's none.

    At that temperature each token is the most likely one, so that it is known where a row stops.
    """
    student = tiny.make_qwen3(seed=1)
    rows = make_rows(8, prompt_lengths=[1, 4, 2])
    greedy = []
    for row in rows:
        ids = torch.tensor([row["input_ids"][: row["prompt_length"]]])
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, student(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        greedy.append(ids[0, row["prompt_length"] :].tolist())
    stops = next(
        {greedy[i][0], greedy[j][0]} for i in range(8) for j in range(i) if greedy[i][0] != greedy[j][0]
    )  # fmt: skip
    stopping = [row for row, answer in zip(rows, greedy, strict=True) if answer[0] in stops][:2]
    others = [row for row, answer in zip(rows, greedy, strict=True) if stops.isdisjoint(answer)][:2]
    assert (len(stopping), len(others)) == (2, 2)
    trainer = trainer_of(
        folder, [*stopping, *others], student=make_student(stops), per_device_train_batch_size=2, max_new_tokens=6,
        temperature=1e-4, **(sharding_on_a_cpu() if sharded else {}),
    )  # fmt: skip
    seen = watched(trainer)
    trainer.train()
    return [len(answer) for answer in seen[0][1].values()], seen[0][0], numbers_of(trainer)


@pytest.mark.parametrize("sharded", [tiny.slow(False), True], ids=["ddp", "fsdp2"])
def test_a_rank_whose_rows_all_stop_at_the_first_token_waits_for_the_other(tmp_path, sharded):
    first, second = tiny.run_ranks(one_rank_stops_at_once, 2, tmp_path, sharded)
    assert (first[0], second[0]) == ([1, 1], [6, 6])
    assert first[1] == second[1] == 14
    assert first[2] == second[2]


def one_rank_fails(folder, sharded):
    """What the rank says when one of two has a token in a prompt that makes its logits NaN."""
    rows = make_rows(4, prompt_lengths=[3])
    rows[0]["input_ids"][0] = 69  # of the first rank; none of the others has it, and it ends an answer
    student = make_student()
    with torch.no_grad():
        student.model.embed_tokens.weight[69] = torch.nan
        student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.nan_to_num(-9.0))
    sharding = sharding_on_a_cpu() if sharded else {}
    trainer = trainer_of(folder, rows, student=student, per_device_train_batch_size=2, **sharding)
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error)
    return None


@pytest.mark.parametrize("sharded", [tiny.slow(False), True], ids=["ddp", "fsdp2"])
def test_a_rank_whose_student_is_not_finite_while_sampling_stops_both(tmp_path, sharded):
    first, second = tiny.run_ranks(one_rank_fails, 2, tmp_path, sharded, timeout=200)
    assert "Not finite at step 1, rank 0, while the student wrote answers: the logits" in first
    assert "of row 0:0" in first
    assert second == first


# ---- the same again, and resumed -------------------------------------------------------------------------------------

RESUMED = {
    "full, every step": ("full", {"lmbda": 1.0}),
    "full, half of the steps, the teacher the others": ("full", {"lmbda": 0.5, "seq_kd": True, "sft_alpha": 0.3}),
    "lora, half of the steps, two samples weighted": (
        "lora",
        {"lmbda": 0.5, "sft_alpha": 0.3, "samples_per_prompt": 2, "select": "weighted"},
    ),
    "lora, the teacher": ("lora", {"lmbda": 0.0, "seq_kd": True, "sft_alpha": 0.3}),
}
NOT_NUMBERS = (
    *tiny.MEASURED,
    "runtime",
    "samples_per_second",
    "steps_per_second",
)
STEPS = 7


def resumable(folder, tuner, options, checkpoint, save=False):
    """Seven steps over epochs of three and a half; all that is logged, sampled and trained but times."""
    adapters = lora_config(rank=4, alpha=8, dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    trainer = trainer_of(
        folder / ("run" if save else "other"), make_rows(14), student=make_student(layers=1), max_steps=STEPS,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="adamw_torch", logging_steps=3,
        train_sampling_strategy="random", lr_scheduler_type="cosine", disable_dropout=False,
        save_strategy="steps" if save else "no", save_steps=1,
        extra={"peft_config": adapters} if tuner == "lora" else None, **{"learning_rate": 3e-3, **options},
    )  # fmt: skip
    seen = watched(trainer)
    trainer.train(resume_from_checkpoint=checkpoint and str(folder / "run" / f"checkpoint-{checkpoint}"))
    records = [
        {key: value for key, value in record.items() if key not in NOT_NUMBERS} for record in trainer.state.log_history
    ]
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return records, seen, weights


@pytest.mark.parametrize("name", tiny.first_quick(RESUMED))
def test_a_run_resumed_at_any_step_samples_and_trains_on_bit_for_bit(tmp_path, name):
    records, seen, weights = resumable(tmp_path, *RESUMED[name], None, save=True)
    for checkpoint in [None, *range(1, STEPS)]:
        again, resampled, trained = resumable(tmp_path, *RESUMED[name], checkpoint)
        assert resampled == seen[checkpoint or 0 :], checkpoint
        assert again == records, checkpoint
        for key, value in weights.items():
            assert torch.equal(trained[key], value), (checkpoint, key)


def test_another_seed_samples_other_answers(tmp_path):
    answers = []
    for seed in (1, 2):
        trainer = trainer_of(tmp_path, make_rows(4), per_device_train_batch_size=4, seed=seed)
        seen = watched(trainer)
        trainer.train()
        answers.append(seen[0][1])
    assert answers[0].keys() == answers[1].keys()
    assert answers[0] != answers[1]


# ---- how the student generates ---------------------------------------------------------------------------------------


def given_cache(kwargs):
    """transformers 5.24 calls it `cache`."""
    return kwargs.get("past_key_values", kwargs.get("cache"))


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_generation_uses_its_cache_where_gradient_checkpointing_trains(tmp_path, tuner):
    adapters = lora_config(rank=4, alpha=8, dropout=0.0)
    trainer = trainer_of(
        tmp_path, make_rows(4), student=make_student([2]), gradient_checkpointing=True, max_steps=2,
        extra={"peft_config": adapters} if tuner == "lora" else None,
    )  # fmt: skip
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if tuner == "lora" else model
    calls, modes, hooks = [], [], []

    def forward(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        calls.append((torch.is_grad_enabled(), module.training, ids.shape[1], given_cache(kwargs)))
        modes.append((module.is_gradient_checkpointing, module.config.use_cache))
        hooks.append(len(module.embed_tokens._forward_hooks))

    model.model.register_forward_pre_hook(forward, with_kwargs=True)
    trainer.train()
    sampling = [call for call in calls if not call[0]]
    assert sum(width == 1 and cache is not None for _, _, width, cache in sampling) >= 2 * 7
    assert not any(training for _, training, _, _ in sampling)
    assert sum(width > 1 for _, _, width, _ in sampling) <= 4  # the prompts once in each window
    training = [call for call in calls if call[0]]
    assert training
    assert all(is_training and cache is None for _, is_training, _, cache in training)
    assert model.is_gradient_checkpointing
    assert all(checkpoints is call[0] for (checkpoints, _), call in zip(modes, calls, strict=True))
    assert len({count for count, call in zip(hooks, calls, strict=True) if call[0]}) == 1, (
        "each window would make every forward slower"
    )
    assert len({use_cache for _, use_cache in modes}) == 1


ADAPTERS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "a trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def sampled_with(folder, dropout, adapter):
    torch.manual_seed(5)
    config = lora_config(rank=4, alpha=8, dropout=dropout, init_lora_weights=False, **adapter)
    student = make_student(tie_word_embeddings="modules_to_save" not in adapter, attention_dropout=dropout)
    trainer = trainer_of(folder, make_rows(6), student=student, disable_dropout=False, extra={"peft_config": config})
    ((batches, _),) = windows(trainer, 1)
    assert trainer.model.training
    return {name: answer for batch in batches for name, answer in answers_of(batch)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_with_dropout_samples_as_one_without(tmp_path, name):
    without = sampled_with(tmp_path, 0.0, ADAPTERS[name])
    assert sampled_with(tmp_path, 0.5, ADAPTERS[name]) == without
    assert len({len(answer) for answer in without.values()}) > 1
