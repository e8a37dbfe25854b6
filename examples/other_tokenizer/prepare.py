"""Builds a teacher-to-be with another tokenizer and another chat template than the quickstart's student.

    python examples/other_tokenizer/prepare.py

The text is the quickstart's, which is built first where it is not there. Written to `build/` beside this file:

    teacher_init/   the quickstart's untrained teacher, with a vocabulary of 1,024 in place of 2,048, a BOS, and a
                    template whose turns end with a token of another name
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"

VOCAB_SIZE = 1024
BOS, PAD, TURN_END = "<s>", "<pad>", "</turn>"
CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
{{- '## ' + message['role'] + '\\n\\n' + message['content'] + '</turn>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '## assistant\\n\\n' -}}{%- endif -%}
"""


def train_tokenizer(rows: list[dict[str, list[dict[str, str]]]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits digits one by one, which the student's does not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        pad_token=PAD,
        eos_token=TURN_END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def _quickstart() -> Any:
    """Its `prepare.py`, which has this one's name."""
    spec = importlib.util.spec_from_file_location("quickstart_prepare", QUICKSTART / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    quickstart = _quickstart()

    quickstart.build()
    rows = [json.loads(line) for line in (QUICKSTART / "build" / "train_all.jsonl").read_text("utf-8").splitlines()]
    tokenizer = train_tokenizer(rows)
    parameters = quickstart.save_model(HERE / "build" / "teacher_init", quickstart.TEACHER, tokenizer, quickstart.SEED)
    longest = max(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows)
    print(f"teacher {parameters:,} parameters, {len(tokenizer):,} tokens; longest row {longest} tokens")


if __name__ == "__main__":
    main()
