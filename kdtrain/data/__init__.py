"""Data: rows of many kinds to padded batches with labels. Takes plain arguments and knows neither config nor trainer.

sources.py       files and hub data sets -> raw rows with their place
images.py        one image: path or bytes, and its pixels
parts.py         which image stands where in a conversation
rows.py          raw row -> conversation, prompt/completion or text; what a bad row is
chat.py          chat template -> text and the spans the assistant writes
tokens.py        spans of characters -> spans of tokens
template.py      row -> input_ids, labels, prompt_length
multimodal.py    what a processor makes of text and images
alignment.py     where the text between the images has gone
epochs.py        which rows make up an epoch
encoding.py      all rows, in parallel, cached by content
load.py          sources -> data set and report
collate.py       rows -> batch
visual_batch.py  the visual part of a batch
"""

from kdtrain.data.collate import Collator, cut_rows, pad_rows
from kdtrain.data.epochs import Epochs
from kdtrain.data.errors import RowError
from kdtrain.data.load import build_dataset
from kdtrain.data.report import BuildReport
from kdtrain.data.sources import Source
from kdtrain.data.template import EncodedRow, encode_row

__all__ = [
    "BuildReport",
    "Collator",
    "EncodedRow",
    "Epochs",
    "RowError",
    "Source",
    "build_dataset",
    "cut_rows",
    "encode_row",
    "pad_rows",
]
