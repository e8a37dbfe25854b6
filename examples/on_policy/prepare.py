"""Makes what the on-policy example trains on: numbers to sort, a tokenizer of single characters, untrained models.

    python examples/on_policy/prepare.py

A row asks for seven digits in ascending order, and its answer does it step by step: each list moves the smallest of
the digits that are not in place yet to the front of these.

    5281736:1528736,1258736,1235876,1235876,1235687,1235678

Written to `build/` beside this file:

    teacher.jsonl      rows for the teacher alone. In half of them the first lists stand in the prompt, with slips in
                       them, and the answer goes on with right ones: so it learns how to get back
    train.jsonl        512 other rows, without any slip: all that a student reads
    heldout.jsonl      other numbers, for `compare.py` and `kdtrain evaluate`
    teacher_init/      an untrained Qwen3 of 0.7 M parameters, and the tokenizer
    student_<seed>/    the same at less than a third of the size, one for each seed
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BUILD = Path(__file__).resolve().parent / "build"
SEEDS = (0, 1, 2)

DIGITS = 7
TEACHER_ROWS, TRAIN_ROWS, HELD_OUT_ROWS = 30_000, 512, 512
WITH_SLIPS = 0.5  # of the teacher's rows
PAD, END = "<pad>", "<end>"
CHARACTERS = "0123456789,:"
MAX_POSITIONS = 128

# Qwen3 in small; 32 dimensions per head, one key-value head, input and output embedding shared.
TEACHER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 320}
STUDENT = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 240}

Row = dict[str, str]


def steps(number: str) -> list[str]:
    """All lists of the answer: the smallest digit of the rest to the front of it, from left to right."""
    lists, digits = [], list(number)
    for i in range(len(digits) - 1):
        smallest = min(range(i, len(digits)), key=lambda at: digits[at])
        digits.insert(i, digits.pop(smallest))
        lists.append("".join(digits))
    return lists


def slip(digits: str, rng: random.Random) -> str:
    """The list with one mistake: a digit wrong, missing or twice, or two neighbours exchanged."""
    i = rng.randrange(len(digits))
    before, digit, after = digits[:i], digits[i], digits[i + 1 :]
    kind = rng.choice(("wrong", "missing", "twice", "exchanged"))
    if kind == "wrong":
        return before + rng.choice(CHARACTERS[:10]) + after
    if kind == "exchanged":
        return before + after[:1] + digit + after[1:]
    return before + ("" if kind == "missing" else 2 * digit) + after


def row(number: str) -> Row:
    return {"prompt": f"{number}:", "completion": ",".join(steps(number))}


def row_with_slips(number: str, rng: random.Random) -> Row:
    """A row whose prompt holds the first lists, the last one with a slip and perhaps others too."""
    lists = steps(number)
    at = rng.randrange(1, len(lists))
    first = rng.randrange(at)
    written = [
        slip(digits, rng) if i == at - 1 or (i >= first and rng.random() < 0.5) else digits
        for i, digits in enumerate(lists[:at])
    ]
    return {"prompt": f"{number}:" + "".join(f"{digits}," for digits in written), "completion": ",".join(lists[at:])}


def numbers(rng: random.Random) -> Iterator[str]:
    """Different ones in random order, without end."""
    seen: set[str] = set()
    while True:
        number = f"{rng.randrange(10**DIGITS):0{DIGITS}d}"
        if number not in seen:
            seen.add(number)
            yield number


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((PAD, END, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=PAD, eos_token=END, model_max_length=MAX_POSITIONS
    )


def save_model(path: Path, shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> int:
    """Saves an untrained Qwen3 with its tokenizer, and returns its number of parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **shape,
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.num_parameters()


def write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def build(out: Path = BUILD, teacher_rows: int = TEACHER_ROWS) -> dict[str, int]:
    """Writes everything into `out`, anew each time: it takes a few seconds.

    Returns:
        The number of parameters of each model.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rng = random.Random(0)
    different = numbers(rng)
    for name, count in (("heldout", HELD_OUT_ROWS), ("train", TRAIN_ROWS)):
        write(out / f"{name}.jsonl", (row(next(different)) for _ in range(count)))
    write(
        out / "teacher.jsonl",
        (
            row_with_slips(number, rng) if rng.random() < WITH_SLIPS else row(number)
            for number, _ in zip(different, range(teacher_rows), strict=False)
        ),
    )
    tokenizer = make_tokenizer()
    counts = {"teacher": save_model(out / "teacher_init", TEACHER, tokenizer, 0)}
    for seed in SEEDS:
        counts["student"] = save_model(out / f"student_{seed}", STUDENT, tokenizer, 1 + seed)
    return counts


def main() -> None:
    for name, parameters in build().items():
        print(f"{name:<8} {parameters:>8,} parameters")


if __name__ == "__main__":
    main()
