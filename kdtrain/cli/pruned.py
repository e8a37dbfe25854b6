"""What `kdtrain init --from` prints."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator

from kdtrain.runs.pruned import Pruned, Wanted


def as_text(found: Pruned, wanted: Wanted) -> str:
    """The layers with their scores, both sizes, and what comes next."""
    return "\n".join(
        [*_layers(found), "", *_sizes(found), *(f"note: {note}" for note in found.notes), *_next(found, wanted)]
    )


def _layers(found: Pruned) -> Iterator[str]:
    yield f"{'layer':>5}  {'influence':>9}"
    for number, score in enumerate(found.scores):
        yield f"{number:>5}  {score:>9.4f}{'' if number in found.kept else '  dropped'}"
    yield "influence: 1 - mean cosine between what a layer reads and what it hands on"


def _sizes(found: Pruned) -> Iterator[str]:
    for name, size in (("teacher", found.before), ("student", found.after)):
        parts = [
            f"{size.layers} layers",
            f"width {size.hidden}",
            f"MLP {size.inner}",
            f"{size.parameters:,} parameters",
        ]
        if not math.isnan(size.perplexity):
            parts.append(f"perplexity {size.perplexity:,.4g}")
        yield f"{name}: {', '.join(parts)}"
    yield f"On {found.rows} rows, {found.tokens:,} tokens. The student is not healed yet: distil it before you use it."


def _next(found: Pruned, wanted: Wanted) -> Iterator[str]:
    options = {"model.model": str(found.folder), "rlhf.teacher_model": wanted.source, "data.train": wanted.data}
    options |= {"data.eval": "5%", "rlhf.sft_alpha": "0"}
    if wanted.revision is not None:
        options["rlhf.teacher.revision"] = wanted.revision
    said = " ".join(f"{name}={shlex.quote(value)}" for name, value in options.items())
    yield "Next: kdtrain init forward-kl, then"
    yield f"  kdtrain fit forward-kl.yaml {said}"
