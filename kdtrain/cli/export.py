"""What `kdtrain export` prints."""

from __future__ import annotations

from kdtrain.runs.export import Exported


def as_text(found: Exported, public: bool) -> str:
    """A line for the folder, one for who can read it, and the address on the hub."""
    model = found.model
    merged = "adapter merged" if found.merged else "all weights, as trained"
    lines = [
        f"{found.folder}: {model.architecture}, {model.parameters:,} parameters in {model.dtype}, "
        f"{found.size / 2**20:,.1f} MiB; {merged}",
        "for transformers 4 and 5" if model.version == 4 else "for transformers 5 (--transformers 4 writes for 4 too)",
    ]
    if found.address is not None:
        lines.append(f"pushed to {found.address} ({'public' if public else 'private'})")
    return "\n".join(lines) + "\n"
