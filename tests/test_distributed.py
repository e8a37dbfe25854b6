"""FSDP2, adapters under DDP, chats that become several rows: two gloo ranks equal one process."""

from types import SimpleNamespace

import datasets
import pytest
import torch

from kdtrain.data import Collator
from kdtrain.trainer.window import _without_repeated_rows
from tests import tiny
from tests.test_data_encoder import FORGETFUL, tokenizer_with
from tests.test_trainer import ROWS, make_trainer
from tests.tiny_processors import FAMILIES, make_model, picture

CASES = {
    "tied head": (True, None),
    "head of its own": (False, None),
    "lora, tied head": (True, "all-linear"),
    "lora, head of its own": (False, "all-linear"),
    "lora and a trained copy of the head": (False, ["lm_head"]),
    "lora on the head": (False, ("q_proj", "lm_head")),
}

LORA = "lora and a trained copy of the head"


def train(folder, tied, lora, with_weights=False, **kwargs):
    """Two windows of the same eight rows; loss and gradient norm of each (and trained weights), and what it ran on."""
    from tests.tiny import lora_config

    extra = {}
    if lora is not None:
        copies = lora if isinstance(lora, list) else None
        targets = {str: lora, tuple: list(lora), list: ["q_proj"]}[type(lora)]
        extra["peft_config"] = lora_config(
            rank=4, alpha=8, dropout=0.0, target_modules=targets, modules_to_save=copies, use_dora=False
        )
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else kwargs.pop("ranks", 1)
    batches = ranks * kwargs.get("gradient_accumulation_steps", 1)
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1, tie_word_embeddings=tied),
        tiny.make_qwen3(seed=2, hidden=48, tie_word_embeddings=tied), rows=ROWS, sft_alpha=0.3, optim="sgd",
        per_device_train_batch_size=8 // batches, max_grad_norm=1e9, train_sampling_strategy="sequential",
        learning_rate=0.1, lr_scheduler_type="constant", max_steps=2, extra=extra, **kwargs,
    )  # fmt: skip
    trainer.train()
    numbers = [record[key] for record in trainer.state.log_history if "loss" in record for key in ("loss", "grad_norm")]
    if with_weights:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        numbers += torch.cat([p.detach().flatten() for p in trained]).tolist()
    return numbers, type(trainer.model_wrapped).__name__, type(trainer.teacher_model).__name__


def sharding_on_a_cpu():
    """Arguments of a run that shards by FSDP2, which it does not on a CPU without this."""
    from accelerate import state

    original = state.AcceleratorState.__init__

    def init(self, *args, **kwargs):
        # accelerate takes FSDP on a CPU for plain DDP without a word; under another device's name it shards.
        shared = state.PartialState._shared_state
        if kwargs.get("fsdp_plugin") is not None and shared.get("distributed_type") == state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = state.DistributedType.MULTI_XPU
        original(self, *args, **kwargs)

    state.AcceleratorState.__init__ = init
    return {"fsdp": "full_shard", "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def train_fsdp2(folder, tied, lora, **kwargs):
    return train(folder, tied, lora, ranks=2, **kwargs, **sharding_on_a_cpu())


@pytest.mark.parametrize("name", [name if name in ("tied head", LORA) else tiny.slow(name) for name in CASES])
def test_fsdp2_equals_one_process(tmp_path, name):
    tied, lora = CASES[name]
    expected, _, _ = train(tmp_path / "one", tied, lora)
    for numbers, student, teacher in tiny.run_ranks(train_fsdp2, 2, tmp_path / "two", tied, lora):
        assert student.startswith("FSDP")
        assert teacher.startswith("FSDP")
        assert numbers == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", [LORA, "lora on the head", *map(tiny.slow, ("lora, tied head", "lora, head of its own"))]
)
def test_adapters_under_ddp_equal_one_process(tmp_path, name):
    tied, lora = CASES[name]
    torch.manual_seed(0)  # of the adapters; forked ranks begin with it too
    expected, _, _ = train(tmp_path / "one", tied, lora, with_weights=True)
    torch.manual_seed(0)
    for numbers, student, _ in tiny.run_ranks(train_ddp, 2, tmp_path / "two", tied, lora):
        assert student == "DistributedDataParallel"
        assert len(numbers) > 1000
        assert numbers == pytest.approx(expected, rel=1e-5, abs=1e-6)


def train_ddp(folder, tied, lora):
    return train(folder, tied, lora, with_weights=True, ranks=2, gradient_accumulation_steps=2)


def generate_fsdp2(folder, options):
    return train_fsdp2(folder, True, None, max_new_tokens=12, **options)[0]


@pytest.mark.parametrize("options", [tiny.slow({"lmbda": 1.0}), {"seq_kd": True}], ids=["student", "teacher"])
def test_sharded_ranks_whose_answers_end_at_different_lengths_wait_for_each_other(tmp_path, options):
    first, second = tiny.run_ranks(generate_fsdp2, 2, tmp_path, options, timeout=90)
    assert first == second
    assert all(torch.isfinite(torch.tensor(first)))


# ---- images ----------------------------------------------------------------------------------------------------------


LAYERS = {
    # transformers' own lists name layers that these towers do not have.
    "llava": ["LlamaDecoderLayer", "CLIPEncoderLayer"],
    "gemma3": ["Gemma3DecoderLayer", "SiglipEncoderLayer"],
    "onevision": ["Qwen2DecoderLayer", "SiglipEncoderLayer"],
}


def conversation(*answers):
    """One whose answers are a row each with a template that forgets."""
    turns = [(("user", f"What is {i}?"), ("assistant", answer)) for i, answer in enumerate(answers)]
    return {"messages": [{"role": role, "content": content} for turn in turns for role, content in turn]}


LONG = "the path " * 60
CONVERSATIONS = [
    conversation("the first one", "a token and the student"), conversation("zero"),
    conversation("the file it returns", "when they are equal", "two"), conversation("the path", "1 and 30"),
    conversation("a first", "a second one"), conversation("it returns", "the file", "zero"), conversation("equal"),
]  # fmt: skip


def train_conversations(folder, count, world):
    """An epoch of raw `messages` of which many become several rows; numbers of each window, weights, evaluation."""
    rows = datasets.Dataset.from_list(CONVERSATIONS[:count])
    trainer = make_trainer(
        folder, tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2), rows=rows,
        tokenizer=tokenizer_with(FORGETFUL), sft_alpha=0.3, optim="sgd", learning_rate=0.1, max_grad_norm=1e9,
        per_device_train_batch_size=4 // world, per_device_eval_batch_size=4 // world, num_train_epochs=1, max_steps=-1,
        train_sampling_strategy="sequential", lr_scheduler_type="constant",
    )  # fmt: skip
    numbers = []
    original = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *args: (result := original(*args), numbers.append(int(result[1])))[0]
    trainer.train()
    numbers += [
        record[key] for record in trainer.state.log_history if "loss" in record for key in ("loss", "grad_norm")
    ]
    evaluation = trainer.evaluate(trainer.train_dataset)
    numbers += [evaluation[key] for key in ("eval_loss", "eval_token_accuracy")]
    return numbers + torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]).tolist()


@pytest.mark.parametrize("count", [5, tiny.slow(6), tiny.slow(7)])
def test_conversations_that_become_several_rows_count_once_on_two_ranks(tmp_path, count):
    expected = train_conversations(tmp_path / "one", count, 1)
    for numbers in tiny.run_ranks(train_conversations, 2, tmp_path / "two", count, 2):
        assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("rank", "epoch_rows", "rows", "kept"),
    [
        (0, 1, [("a b", "c"), ("d e", "f")], ["a b", "c"]),
        (0, 1, [("a b", "c"), ("d e", LONG, "f")], ["a b", "c"]),  # as many rows in the batch as were drawn
        (0, 1, [("a b", LONG, "c"), ("d e", "f")], ["a b"]),
        (0, 1, [(LONG,), ("d e", "f")], []),
        (1, 3, [("a b", "c"), ("d",)], ["a b", "c"]),
        (1, 3, [("a",), ("d e", "f")], ["a"]),
        (1, 2, [("a b", "c"), ("d e", "f")], []),
        (1, 4, [("a b", "c"), ("d e", "f")], ["a b", "c", "d e", "f"]),
    ],
)
def test_all_rows_of_a_repeated_conversation_are_cut_off_and_none_of_a_new_one(rank, epoch_rows, rows, kept):
    tokenizer = tokenizer_with(FORGETFUL)
    collate = Collator(tokenizer, max_length=100, on_overlength="drop")
    batch = collate([conversation(*answers) for answers in rows])
    state = SimpleNamespace(end_of_dataloader=True)
    accelerator = SimpleNamespace(num_processes=2, process_index=rank, gradient_state=state)
    cut = _without_repeated_rows(batch, accelerator, epoch_rows, 2)
    answers = [tokenizer.decode(labels[labels != -100]).removesuffix("<|im_end|>") for labels in cut.labels]
    assert [answer for answer in answers if answer] == kept
    assert len(cut) == max(len(kept), 1)
    assert cut.all_repeated == (not kept)


def train_images(folder, family, ranks, images=4, **kwargs):
    """As `train`, for a vision-language model; `images` of the four rows have one, the first, of growing sizes."""
    processor = FAMILIES[family]()
    student, teacher = make_model(family, processor, 1), make_model(family, processor, 2)
    question = [{"type": "image"}, {"type": "text", "text": "what?"}]
    rows = [
        {
            "messages": [{"role": "user", "content": question}, *row["messages"][-1:]],
            "images": [picture(i, 40 + 32 * i)],
        }
        for i, row in enumerate(ROWS[:images])
    ]
    rows += ROWS[images:4]
    trainer = make_trainer(
        folder, student, teacher, rows=rows, sft_alpha=0.3, optim="sgd", per_device_train_batch_size=4 // ranks,
        max_grad_norm=1e9, train_sampling_strategy="sequential", learning_rate=0.01, lr_scheduler_type="constant",
        max_steps=2, visual_kd={"targets": ["vit", "aligner"]}, extra={"processing_class": processor}, **kwargs,
    )  # fmt: skip
    trainer.train()
    keys = ("loss", "grad_norm", "vision_kd_loss")
    records = [record for record in trainer.state.log_history if "loss" in record]
    return [record[key] for record in records for key in keys], type(trainer.model_wrapped).__name__


def train_images_fsdp2(folder, family, images):
    sharding = sharding_on_a_cpu()
    if family in LAYERS:
        sharding["fsdp_config"]["transformer_layer_cls_to_wrap"] = LAYERS[family]
    return train_images(folder, family, 2, images, **sharding)


@pytest.mark.parametrize(
    ("family", "images"),
    [("llava", 2), *(tiny.slow(name, 2) for name in FAMILIES if name != "llava"), tiny.slow("qwen", 3)],
)
def test_visual_kd_under_fsdp2_equals_one_process(tmp_path, family, images):
    """Two images: both on the first rank; three: one on the second rank, of another size."""
    expected, _ = train_images(tmp_path / "one", family, 1, images)
    for numbers, wrapped in tiny.run_ranks(train_images_fsdp2, 2, tmp_path / "two", family, images):
        assert wrapped.startswith("FSDP")
        assert numbers == pytest.approx(expected, rel=1e-5)
