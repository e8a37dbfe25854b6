"""What an optimizer keeps for each trained weight, by the names of `training.optim`."""

from __future__ import annotations

# By a part of the name: tensors as large as the weights. The first that fits counts; two where none does.
_STATES = {
    "ademamix": 3, "schedule_free_sgd": 1, "sgd": 0, "adafactor": 0, "adalomo": 0, "lomo": 0, "rmsprop": 1,
    "adagrad": 1, "lion": 1,
}  # fmt: skip
# By a part of the name: bytes of a number in them. The first that fits counts; without one they have the weights' type.
# Those of bitsandbytes are float32 where they are not 8 bit.
_BYTES = {"4bit": 0.5, "8bit": 1.0, "32bit": 4.0, "paged": 4.0, "bnb": 4.0, "lion": 4.0, "ademamix": 4.0}
_SCALES = {"4bit": 4 / 128, "8bit": 4 / 256}
"""Beside each number: a block has a scale of four bytes."""


def bytes_per_weight(optimizer: str, of_weight: int) -> float:
    """Bytes that an optimizer keeps for a trained weight of `of_weight` bytes.

    Tensors of fewer than 4,096 weights, such as norms, have float32 states in the 8-bit optimizers too: a part too
    small to count. What pages of a `paged_` optimizer have been moved to the CPU is not known ahead: all are counted.
    """
    count = next((count for part, count in _STATES.items() if part in optimizer), 2)
    number = next((size for part, size in _BYTES.items() if part in optimizer), float(of_weight))
    scale = next((size for part, size in _SCALES.items() if part in optimizer), 0.0)
    return count * (number + scale)
