"""Options of accelerate's data loader under which rows would count twice, be lost, or come in another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_REFUSED = {
    "split_batches": (
        True,
        "rows that fill up an epoch would count twice",
        "remove it, and divide per_device_train_batch_size by the number of processes",
    ),
    "dispatch_batches": (True, "the row ids of a batch cannot be sent to other processes", "remove it"),
    "even_batches": (False, "a process that runs out of rows would leave the others waiting", "remove it"),
    "use_seedable_sampler": (False, "a resumed run would read rows in another order", "remove it"),
}


def refused_loader_options(options: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, reason, what to do) of each option of an `accelerator_config` that cannot be had."""
    for name, (value, reason, instead) in _REFUSED.items():
        if options.get(name) is value:
            yield name, reason, instead
