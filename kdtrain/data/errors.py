"""The error of a single row."""

from __future__ import annotations

from kdtrain.errors import DataError


class RowError(DataError):
    """One row that cannot be trained on; the message is the reason, without the place.

    Rows with one are counted and shown. Any other `DataError` means that no row could work (a tokenizer without a chat
    template), and stops the run at once.
    """
