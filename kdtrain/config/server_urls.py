"""Which addresses a teacher may be asked at."""

from __future__ import annotations


def wrong_address(url: str, *, has_key: bool) -> str | None:
    """What is wrong with the base URL of a server; None where nothing is."""
    return None if url.startswith(("http://", "https://")) else "must begin with http:// or https://"
