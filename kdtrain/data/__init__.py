"""Data: rows of many kinds to padded batches with labels. Knows neither config nor models nor trainer.

sources.py       files and hub data sets -> raw rows with their place, in one Arrow file (files.py: text files)
rows.py          raw row -> conversation, prompt and completion, or text
parts.py         which image stands where in a conversation
images.py        one image: path or bytes, and its pixels
chat_template.py chat template -> text and the spans the assistant writes
tokens.py        spans of characters -> spans of tokens
encoder.py       row -> input_ids, labels, prompt_length
multimodal.py    what a processor makes of text and images
alignment.py     where the text between the images is in what a processor makes of it
encoded_row.py   a row as tokens, rows that were tokens already, and what becomes of those that are too long
cache.py         all rows encoded, in parallel, cached by content
epochs.py        which rows make up an epoch
dataset.py       sources -> data set and report
collate.py       rows -> batch
visual_batch.py  the visual part of a batch
with_images.py   the first rows with images, to try a run on
errors.py        the error of a single row, and how its message shows values
"""

from kdtrain.data.chat_template import TemplateOptions
from kdtrain.data.collate import Collator, cut_rows, pad_rows
from kdtrain.data.dataset import BuildReport, build_dataset
from kdtrain.data.encoded_row import EncodedRow
from kdtrain.data.encoder import encode_row
from kdtrain.data.epochs import Epochs
from kdtrain.data.errors import RowError
from kdtrain.data.sources import Source

__all__ = [
    "BuildReport",
    "Collator",
    "EncodedRow",
    "Epochs",
    "RowError",
    "Source",
    "TemplateOptions",
    "build_dataset",
    "cut_rows",
    "encode_row",
    "pad_rows",
]
