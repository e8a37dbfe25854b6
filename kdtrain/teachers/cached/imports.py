"""Targets that other tools have stored, row by row, for a cache of ours (`kdtrain cache --from`).

Which format a file has is told by its columns:

| columns | format |
|---|---|
| `bytepacked_indices`, `compressed_logprobs` | DistillKit, quantised |
| `packed_indices`, `exact_values`, `coeffs` | DistillKit, its older format |
| `token_ids`, `top_values` | DistillKit, top-k as it is |
| `target_token_ids`, `target_logprobs` | axolotl, prepared for its trainer |
| `…logprobs`, of `{token, logprob}` or with `target_token_ids` | axolotl, for its `kd.chat_template` |

Here numbers are read and nothing is judged: whether they stand at the right tokens is seen where the rows are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdtrain.data.errors import show
from kdtrain.errors import DataError
from kdtrain.teachers.cached import import_axolotl, import_distillkit
from kdtrain.teachers.cached.import_files import read_tables
from kdtrain.teachers.cached.imported import ImportedRow, Reader, UnreadableRow


@dataclass(frozen=True)
class ImportFile:
    """A file or folder of another tool's, and how it is read."""

    path: Path
    reader: Reader

    def rows(self) -> Iterator[ImportedRow]:
        """Every row, with what it holds or why it cannot be read.

        Raises:
            DataError: a file that cannot be read at all.
        """
        for place, row in read_tables(self.path):
            try:
                yield from (ImportedRow(place, found) for found in self.reader.read(row))
            except UnreadableRow as error:
                yield ImportedRow(error.at(place), None, str(error))


def open_import(path: Path) -> ImportFile:
    """Find out what a file or folder holds.

    Raises:
        DataError: it is missing, empty, or of no format that is known, or something of it is not supported.
    """
    if not path.exists():
        raise DataError(f"--from {show(str(path), 400)} does not exist.")
    row = next((row for _, row in read_tables(path)), None)
    if row is None:
        raise DataError(f"--from {show(str(path), 400)} has no rows.")
    reader = import_distillkit.reader(path, row) or import_axolotl.reader(row)
    if reader is not None:
        return ImportFile(path, reader)
    raise DataError(
        f"--from {show(str(path), 400)} holds no targets of a format that is known: its columns are "
        f"{', '.join(show(name, 40) for name in row)}. Read are DistillKit's (bytepacked_indices and "
        "compressed_logprobs; packed_indices, exact_values and coeffs; token_ids and top_values) and axolotl's (a "
        "column that ends in logprobs, or target_token_ids and target_logprobs)."
    )
