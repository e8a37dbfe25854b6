"""Memory that is exhausted: how libraries say it, how much there was at the peak; and the limit of open files. Imports
no torch by itself."""

from __future__ import annotations

import errno
import re
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Of torch on a CPU, of CUDA's libraries, of C++ and of Rust.
_SAID = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|can(?:'|no)t allocate memory|std::bad_alloc"
    r"|failed to allocate|CU\w+_STATUS_ALLOC_FAILED|\(os error 12\)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that there is no memory left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":  # torch's is a RuntimeError
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        said = isinstance(seen, RuntimeError) or type(seen).__name__ in ("SafetensorError", "ArrowMemoryError")
        if said and _SAID.search(str(seen)):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def peak_memory_gib(device: torch.device | None = None) -> float:
    """GiB at the peak so far: the resident size of this process, and for CUDA what it has allocated on a GPU.

    Of several GPUs that the process uses, as with a teacher on one of its own, that which took the most.
    """
    if device is not None and device.type == "cuda":
        import torch

        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB on Linux


def open_files_limit() -> int | None:
    """Files that this process may have open at a time; None where there is no limit."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def peak(device: torch.device | None = None) -> str:
    """The same in words, for the message of an error."""
    where = "on it" if device is not None and device.type == "cuda" else "of this process"
    return f"the peak {where} was {peak_memory_gib(device):.2f} GiB"
