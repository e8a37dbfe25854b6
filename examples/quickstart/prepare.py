"""Builds everything the quickstart trains on, offline, from what every Python installation carries.

    python examples/quickstart/prepare.py

Text: the docstrings of the standard library, as chat rows ("What does `json.dumps` do?" -> its docstring). They are
read from the source files with `ast`; nothing is imported, because importing a module runs it. Some packages are held
out whole: splitting by row would put two methods of one class on both sides, and measure memory instead of learning.

Written to `build/` beside this file, and left alone when nothing it depends on has changed:

    train_all.jsonl    every training row, for the teacher
    train_400.jsonl    400 of them: all that the student ever reads
    heldout.jsonl      rows of packages that neither has seen, for `compare.py`
    teacher_init/      a 2.5 M parameter Qwen3 with random weights, and the tokenizer
    student_init/      the same at a fifth of the size
    stamp.json         hashes of what went in and what came out
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BUILD = Path(__file__).resolve().parent / "build"

# Top-level packages that only `compare.py` reads. All of them exist in every CPython from 3.10 on.
HELD_OUT = frozenset(
    "argparse asyncio collections contextlib csv functools http json logging pathlib random shutil "  # noqa: SIM905
    "statistics subprocess tempfile zipfile".split()
)
NOT_LIBRARY = frozenset({"__pycache__", "idle_test", "test", "tests"})  # test code says little about the library

MAX_ANSWER_CHARS = 300
MIN_ANSWER_CHARS = 20  # "Docstring.", "See above": nothing to learn from
MAX_ROW_TOKENS = 96  # the data.max_length of base.yaml
STUDENT_ROWS = 400
VOCAB_SIZE = 2048
MAX_POSITIONS = 512
SEED = 0

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML. `generation` marks what is learnt: the assistant's words and the END after them, so that the model stops.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Qwen3 in small; 32 dimensions per head, one key-value head, input and output embedding shared.
TEACHER = {"hidden_size": 224, "num_hidden_layers": 4, "num_attention_heads": 7, "intermediate_size": 576}
STUDENT = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 256}


class Doc(NamedTuple):
    """One documented object of the standard library."""

    name: str  # dotted, as a user would write it: json.decoder.JSONDecoder.decode
    answer: str

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


# --- text ---


def stdlib_sources(root: Path | None = None) -> dict[str, Path]:
    """Source files of the standard library by module name, sorted, without tests and installed packages."""
    root = root or Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        # site-packages, lib-dynload and config-3.x are no identifiers, so no packages either
        if all(part.isidentifier() and part not in NOT_LIBRARY for part in parts):
            sources[".".join(parts).removesuffix(".__init__")] = path
    if not sources:
        raise SystemExit(
            f"No Python source files under {root}: this interpreter has its standard library without them."
        )
    return dict(sorted(sources.items()))


def documented_objects(module: str, source: bytes) -> Iterator[Doc]:
    """The module, its classes and its functions, methods included, that have a docstring worth answering with."""

    def visit(node: ast.AST, name: str) -> Iterator[Doc]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            answer = shorten(ast.get_docstring(node, clean=False) or "")
            if answer:
                yield Doc(name, answer)
        for child in ast.iter_child_nodes(node):
            # `if` and `try` blocks define names too; a function inside a function has no name one could ask about
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from visit(child, f"{name}.{child.name}")
            elif isinstance(child, ast.If | ast.Try):
                yield from visit(child, name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in sources that are not ours
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a template or another version's syntax
            return
    yield from visit(tree, module)


def shorten(docstring: str, limit: int = MAX_ANSWER_CHARS) -> str:
    """The first paragraphs that fit into `limit` characters; failing that, the first sentences; else nothing."""
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(docstring).splitlines()).strip()
    if len(text) > limit:
        # a blank line, or the end of a sentence: the last one that leaves a whole piece within the limit
        ends = [m.start() for m in re.finditer(r"\n\n", text[: limit + 2])]
        ends = ends or [m.end() for m in re.finditer(r"[.!?](?=\s)", text[: limit + 1])]
        text = text[: max((end for end in ends if end <= limit), default=0)].strip()
    return text if len(text) >= MIN_ANSWER_CHARS else ""


def split(docs: Iterable[Doc]) -> tuple[list[Doc], list[Doc]]:
    """Training and held-out docs by package. A text that occurs twice is kept once, and in training if it can be.

    Equal means equal but for case, spaces and punctuation. So no held-out answer has been read in training.
    """
    docs = list(docs)
    seen: set[str] = set()

    def fresh(doc: Doc) -> bool:
        key = re.sub(r"\W+", "", doc.answer.casefold())
        return not (key in seen or seen.add(key))

    train = [doc for doc in docs if doc.package not in HELD_OUT and fresh(doc)]
    heldout = [doc for doc in docs if doc.package in HELD_OUT and fresh(doc)]
    return train, heldout


def as_row(doc: Doc) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What does `{doc.name}` do?"},
            {"role": "assistant", "content": doc.answer},
        ]
    }


# --- tokenizer and models ---


def train_tokenizer(docs: Iterable[Doc]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, learnt from the training rows only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is out of vocabulary
        show_progress=False,
    )
    # every piece between special tokens, "assistant\n" too: what each row repeats should be one token
    messages = (message for doc in docs for message in as_row(doc)["messages"])
    bpe.train_from_iterator((piece for m in messages for piece in (f"{m['role']}\n", m["content"])), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def fit_rows(docs: Iterable[Doc], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Chat rows of at most MAX_ROW_TOKENS tokens: a longer answer is shortened, or the row left out."""
    rows = []
    for doc in docs:
        while doc.answer and len(tokenizer.apply_chat_template(as_row(doc)["messages"])["input_ids"]) > MAX_ROW_TOKENS:
            doc = doc._replace(answer=shorten(doc.answer, len(doc.answer) - 1))
        if doc.answer:
            rows.append(as_row(doc))
    return rows


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


# --- build, once ---


def fingerprint(sources: dict[str, Path]) -> str:
    """A hash of everything that decides what is built: this file, the sources it reads, the versions it runs on."""
    digest = hashlib.sha256()
    versions = [f"{name} {version(name)}" for name in ("tokenizers", "torch", "transformers")]
    digest.update(repr([platform.python_version(), *versions]).encode())
    for name, path in {"prepare": Path(__file__), **sources}.items():
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that `build` has written into the folder."""
    written = [*folder.glob("*.jsonl"), *folder.glob("*_init/*")]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(written)}


def is_current(out: Path, inputs: str) -> bool:
    """Whether an earlier build finished, from the same inputs, and its files are still what it wrote."""
    try:
        stamp = json.loads((out / "stamp.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return stamp.get("inputs") == inputs and stamp.get("files") == file_hashes(out)


def build(out: Path = BUILD, limit: int | None = None) -> dict[str, int]:
    """Builds data, tokenizer and untrained models into `out`, or returns at once if they are there and current.

    Args:
        out: the folder to write to.
        limit: read only the first `limit` source files of each side of the split; for tests.

    Returns:
        Counts: rows, tokens and supervised tokens of each file, parameters of each model.
    """
    sources = stdlib_sources()
    if limit is not None:
        sides = [[m for m in sources if (m.partition(".")[0] in HELD_OUT) is held_out] for held_out in (False, True)]
        sources = {module: sources[module] for side in sides for module in side[:limit]}
    inputs = fingerprint(sources)
    if is_current(out, inputs):
        print(f"{out}: up to date", file=sys.stderr)
        return json.loads((out / "stamp.json").read_text(encoding="utf-8"))["counts"]

    (out / "stamp.json").unlink(missing_ok=True)  # first, so that a build cut short is not taken for a whole one
    out.mkdir(parents=True, exist_ok=True)
    docs = (doc for module, path in sources.items() for doc in documented_objects(module, path.read_bytes()))
    train, heldout = split(docs)
    tokenizer = train_tokenizer(train)

    rows = {"train_all": fit_rows(train, tokenizer), "heldout": fit_rows(heldout, tokenizer)}
    rows["train_400"] = random.Random(SEED).sample(rows["train_all"], min(STUDENT_ROWS, len(rows["train_all"])))
    counts: dict[str, int] = {}
    for name, some in rows.items():
        with (out / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)
        counts |= {f"{name}_{what}": count for what, count in count_tokens(some, tokenizer).items()}
    for name, shape, seed in (("teacher", TEACHER, SEED), ("student", STUDENT, SEED + 1)):
        shutil.rmtree(out / f"{name}_init", ignore_errors=True)
        counts[f"{name}_parameters"] = save_model(out / f"{name}_init", shape, tokenizer, seed)

    stamp = {"inputs": inputs, "counts": counts, "files": file_hashes(out)}
    (out / "stamp.json").write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    return counts


def count_tokens(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Rows, tokens in them, and the tokens among those that the loss is computed on."""
    encoded = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for row in rows
    ]
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in encoded),
        "supervised": sum(sum(row["assistant_masks"]) for row in encoded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=BUILD, help="folder to write to (default: build/ beside this file)")
    parser.add_argument("--limit", type=int, help="read only so many source files of each side, for a quick try")
    args = parser.parse_args()

    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # one bar per saved model, for files of a few MB
    counts = build(args.out, args.limit)
    for name, what in (
        ("train_all", "for the teacher"),
        ("train_400", "for the student"),
        ("heldout", "packages that neither has seen"),
    ):
        rows, tokens, supervised = (counts[f"{name}_{key}"] for key in ("rows", "tokens", "supervised"))
        print(f"{name:<10} {rows:>6,} rows {tokens:>8,} tokens, {supervised:>8,} of them learnt from: {what}")
    for name in ("teacher", "student"):
        print(f"{name:<10} {counts[f'{name}_parameters']:>10,} parameters")


if __name__ == "__main__":
    main()
