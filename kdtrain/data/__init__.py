"""Data: rows of many kinds to padded batches with labels. Knows neither config nor models nor trainer.

sources.py       files and data sets -> raw rows with their place, in one Arrow file
source.py        one source: the files that it means, and whether they have the columns of rows
first_rows.py    its first row, looked at before torch is imported
files.py         what a file is packed with, its lines
json_files.py, csv_files.py, tables.py, hub.py   the rows of these
folders.py       which files a folder or a pattern means
splits.py        which files are of a split, and which rows a slice such as train[:90%] means
held_out.py      the share of the training rows that is kept to evaluate on
rows.py          raw row -> conversation, prompt and completion, or text
parts.py         which image stands where in a conversation
images.py        one image: path or bytes, and its pixels
chat_template.py chat template -> text and the spans the assistant writes
tokens.py        spans of characters -> spans of tokens
encoder.py       row -> input_ids, labels, prompt_length
multimodal.py    what a processor makes of text and images
alignment.py     where the text between the images is in what a processor makes of it
conversation.py  the messages of a row, kept beside its tokens
encoded_row.py   a row as tokens, rows that were tokens already, and what becomes of those that are too long
cache.py         all rows encoded, in parallel, cached by content
segments.py      the text of a row's tokens, cut where supervision begins and ends
cache_folder.py  where that is
stream/          rows that are read while training
epochs.py        which rows make up an epoch
dataset.py       sources -> data set and report
collate.py       rows -> batch
visual_batch.py  the visual part of a batch
with_images.py   the first rows with images, to try a run on
errors.py        the error of a single row, and how messages show values and suggest names
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdtrain.data.chat_template import TemplateOptions
    from kdtrain.data.collate import Collator, cut_rows, pad_rows
    from kdtrain.data.dataset import BuildReport, build_dataset
    from kdtrain.data.encoded_row import EncodedRow
    from kdtrain.data.encoder import encode_row
    from kdtrain.data.epochs import Epochs
    from kdtrain.data.errors import RowError
    from kdtrain.data.held_out import HeldOut
    from kdtrain.data.source import Source

__all__ = [
    "BuildReport",
    "Collator",
    "EncodedRow",
    "Epochs",
    "HeldOut",
    "RowError",
    "Source",
    "TemplateOptions",
    "build_dataset",
    "cut_rows",
    "encode_row",
    "pad_rows",
]
_MODULES = {
    "BuildReport": "dataset",
    "Collator": "collate",
    "EncodedRow": "encoded_row",
    "Epochs": "epochs",
    "HeldOut": "held_out",
    "RowError": "errors",
    "Source": "source",
    "TemplateOptions": "chat_template",
    "build_dataset": "dataset",
    "cut_rows": "collate",
    "encode_row": "encoder",
    "pad_rows": "collate",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: the static check looks at files, and must not wait seconds for torch and datasets.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
