"""Who writes the student's answers where that is not the model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import GenerationConfig

from kdtrain.data.batch import Batch
from kdtrain.data.images import Image
from kdtrain.generation.generate import prompts_of


class Sampler(Protocol):
    """Writes with the student's weights as they are now."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        seeds: Sequence[int],
        images: Sequence[Sequence[Image]],
    ) -> list[list[int]]:
        """What the student writes behind each prompt, up to and including the first stop token; a collective.

        Called once for each on-policy window, on all ranks, with this rank's prompts (maybe none).

        Args:
            config: how it is sampled, with stop tokens and `max_new_tokens`.
            seeds: one for each prompt.
            images: of each prompt, in the order of its image parts.
        """


def written_by(
    sampler: Sampler, batches: Sequence[Batch], config: GenerationConfig, seeds: Sequence[Sequence[int]]
) -> list[list[list[int]]]:
    """What it writes to each row of each batch."""
    prompts = [prompts_of(batch) for batch in batches]
    images = [image for batch in batches for image in (batch.rows.images or [()] * len(batch))]
    written = iter(
        sampler.write(
            [ids for rows in prompts for ids in rows], config, [seed for rows in seeds for seed in rows], images
        )
    )
    return [[next(written) for _ in rows] for rows in prompts]
