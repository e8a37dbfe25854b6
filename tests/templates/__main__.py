"""`python -m tests.templates`: templates × rows as a table.

python -m tests.templates                  trl's templates on real tokenizers: right, refused with a true reason, wrong
python -m tests.templates --wrong          and each wrong cell with what came out and what should have
python -m tests.templates --refused        and each reason for a refusal, with the oracle's beside it
python -m tests.templates qwen3 phi3       only templates whose names begin so
"""

from __future__ import annotations

import argparse
import os
from collections import Counter

from tests.templates.check import TRAIN_ON, judged
from tests.templates.families import named_template, names

OUTCOMES = ("right", "refused", "wrong")


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="the beginnings of templates' names; all by default")
    parser.add_argument("--table", action="store_true", help="the table, which is always printed")
    parser.add_argument("--wrong", action="store_true", help="what came out in each wrong cell")
    parser.add_argument("--refused", action="store_true", help="the reason of each refused cell")
    options = parser.parse_args()
    chosen = [name for name in names() if name.startswith(tuple(options.names) or "")]
    total: Counter[str] = Counter()
    print(f"{'template':34}" + "".join(f"{on:>24}" for on in TRAIN_ON))
    print(f"{'':34}" + f"{'right refused wrong':>24}" * len(TRAIN_ON))
    for name in chosen:
        found = judged(named_template(name))
        line, details = "", []
        for on, cells in found.items():
            count = Counter(verdict.outcome for verdict in cells.values())
            total += count
            line += f"{count['right']:>10}{count['refused']:>8}{count['wrong']:>6}"
            details += [(on, kind, verdict) for kind, verdict in cells.items()]
        print(f"{name:34}{line}", flush=True)
        for on, kind, verdict in details:
            if (verdict.outcome == "wrong" and options.wrong) or (verdict.outcome == "refused" and options.refused):
                print(f"    {verdict.outcome}: {name} | {kind} | {on} | {verdict.detail}")
    print(", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES), "of", sum(total.values()))


if __name__ == "__main__":
    main()
