"""Tiny real models, a real tokenizer and real ranks for the tests. No network."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kdtrain.data.batch import Batch
from kdtrain.generation.generate import completions, with_completions
from kdtrain.generation.sampling import stable_seed

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = [
    "What does the function do? It returns the path of the file.",
    "The teacher predicts the next token and the student learns from it.",
    "A divergence between two distributions is zero when they are equal.",
    "Numbers such as 1, 2, 30 and 444 are tokens as well.",
]
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]}
    for i, answer in enumerate(
        ["the path", "a token and the student", "zero", "the file it returns when they are equal", "two", "1 and 30"]
    )
]


MEASURED = ("tokens_per_second", "supervised_tokens_per_second", "mfu", "peak_memory_gib")
MEASURED += ("elapsed_s", "remaining_s", "step_time_s")
"""What a record says of time and memory, which differs between equal runs."""


def slow(*values: Any) -> Any:
    """Parameters of a test that are for `make test-slow` alone, beside others that `make test` takes."""
    return pytest.param(*values, marks=pytest.mark.slow)


def first_quick(names: Iterable[str]) -> list[Any]:
    """The first one for `make test`, the others for `make test-slow`."""
    first, *others = names
    return [first, *map(slow, others)]


def one_in(every: int, names: Iterable[Any]) -> list[Any]:
    """One in `every` of them for `make test`, the others for `make test-slow`."""
    return [slow(name) if number % every else name for number, name in enumerate(names)]


def lora_config(*, rank: int, alpha: int, dropout: float, **options: Any) -> LoraConfig:
    """An adapter as a run has it."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", **options)


def make_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's tokens; pad is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHATML
    return fast


def make_qwen3(
    vocab_size: int = 320, hidden: int = 32, layers: int = 2, seed: int = 0, **kwargs: Any
) -> Qwen3ForCausalLM:
    """A Qwen3 of a few thousand parameters, large initial weights so that its distributions are not flat."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        **{
            "head_dim": 16,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "eos_token_id": 2,
            "pad_token_id": 3,
            "bos_token_id": None,
            **kwargs,
        },
    )
    return Qwen3ForCausalLM(config)


def make_llama(vocab_size: int = 320, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            initializer_range=0.2,
            eos_token_id=[2, 0],
            pad_token_id=3,
            bos_token_id=None,
        )
    )


def make_gemma2(vocab_size: int = 320, seed: int = 0) -> Gemma2ForCausalLM:
    """Soft-capped logits."""
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.2,
            final_logit_softcapping=3.0,
            eos_token_id=2,
            pad_token_id=3,
            bos_token_id=None,
        )
    )


def save_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """Save a model with its tokenizer and return the folder's name."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def generate_batch(model: PreTrainedModel, batch: Batch, config: GenerationConfig, *, seed: int) -> Batch:
    """The batch with answers that a model writes now."""
    seeds = [stable_seed(f"{seed}:{row}") for row in range(len(batch))]
    return with_completions(batch, completions(model, batch, config, seeds=seeds), config.pad_token_id)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Run `function(*args)` as `world_size` gloo ranks in forked processes; return what each one returned.

    The environment is what a launcher sets. Forking after the imports makes a two-rank job take seconds.
    """
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, port, queue, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world_size):
            rank, ok, value = queue.get(timeout=timeout)
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, queue: Any, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked, which is alone
    try:
        # Results travel as plain numbers and lists: a tensor in a queue needs the sending process to stay alive.
        queue.put((rank, True, function(*args)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_project(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with `student`, `teacher`, rows, and a `config.yaml` that trains for four steps into `run`."""
    save_model(make_qwen3(seed=1), tokenizer, folder / "student")
    save_model(make_qwen3(seed=2, hidden=48), tokenizer, folder / "teacher")
    for name in ("train.jsonl", "eval.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in CHATS * 4))
    config = {
        "model": {"model": "./student"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 64},
        "rlhf": {"teacher_model": "./teacher", "sft_alpha": 0.3, "lmbda": 0.0},
        "training": {
            "output_dir": "run",
            "max_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "no",
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def contents(batch):
    """All that a batch holds, by name; nothing where it holds nothing."""
    rows, images = batch.rows, batch.teacher_images
    named = {
        **batch.model_inputs,
        "labels": batch.labels,
        "weights of tokens": batch.kd_token_weights,
        "visual sizes": dict(batch.visual_sizes),
        **{f"rows.{field.name}": getattr(rows, field.name) for field in dataclasses.fields(rows)},
        **({} if images is None else {f"teacher's {name}": value for name, value in images.inputs.items()}),
        "teacher's sizes": None if images is None else dict(images.sizes),
        **(
            {} if batch.teacher_tokens is None else {f"teacher's {k}": v for k, v in vars(batch.teacher_tokens).items()}
        ),
        "generated by": batch.generated_by,
        "all repeated": batch.all_repeated,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}


def assert_same_batch(batch, expected):
    found, wanted = contents(batch), contents(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name
