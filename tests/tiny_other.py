"""A tiny teacher with another tokenizer: its own vocabulary, its own template, a BOS, another end of turn."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '[' + m.role + ']\\n' + m.content + '</turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)
TEXT = ["The student reads a file of numbers.", "What is it? A token is the path to it.", *tiny.TEXT]
SPECIAL = ["<pad>", "<s>", "</turn>"]


def byte_level(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from other texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": SPECIAL}
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options))
    return _named(tokenizer)


def with_byte_fallback(vocab_size: int = 120) -> PreTrainedTokenizerFast:
    """As SentencePiece: ▁ for a space, and bytes of characters that are not in the vocabulary."""
    learnt = Tokenizer(models.BPE())
    learnt.normalizer = normalizers.Replace(" ", "▁")
    learnt.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    names = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = learnt.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return _named(tokenizer)


def _named(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</turn>", pad_token="<pad>", chat_template=TEMPLATE
    )


def make_teacher(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    """With some rows of its embedding that are padding."""
    return tiny.make_qwen3(vocab_size=len(tokenizer) + 5, **{"seed": 2, "hidden": 48, **options})
