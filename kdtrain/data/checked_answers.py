"""Whether a text that a model wrote says what the column `answer` of its row says."""

from __future__ import annotations

import re


def says(text: str, answer: str, expression: str | None) -> bool:
    """Whether what the group of a regular expression matches in the text is the answer, or what it matches in that.

    Args:
        expression: with one group; None compares the whole text.
    """
    if expression is None:
        return text.strip() == answer.strip()
    found, wanted = _group(text, expression), _group(answer, expression)
    return found is not None and found == (answer.strip() if wanted is None else wanted)


def _group(text: str, expression: str) -> str | None:
    found = re.search(expression, text)
    return None if found is None or found[1] is None else found[1].strip()
