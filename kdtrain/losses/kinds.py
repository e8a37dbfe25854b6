"""What the losses can be told by name. Free of torch, so that the config reads its choices here."""

from __future__ import annotations

from typing import Literal, get_args

Divergence = Literal["jsd", "jsd_scaled", "mixed_kl"]
Tail = Literal["bucket", "renormalize"]
Distance = Literal["mse", "cosine"]
Match = Literal["exact", "interpolate"]
VisualTargetName = Literal["vit", "aligner", "deepstack"]

VISUAL_TARGETS: tuple[VisualTargetName, ...] = get_args(VisualTargetName)
