"""A model with another tokenizer on the rows of an evaluation: what they cost it in its own tokens, as nats per byte.

Cross-entropies per token are of other tokens, and say nothing of each other. What the same text costs in all does:
divided by its bytes, it can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from trl.experimental.gkd import GKDConfig

from kdtrain.config import RunConfig
from kdtrain.data import Collator
from kdtrain.errors import PreflightError
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.models.processing import load_tokenizer
from kdtrain.models.vocabulary import tokenizer_difference, vocabulary_size
from kdtrain.runs.open_run import TrainedRun
from kdtrain.runs.read_data import read_evaluation
from kdtrain.runs.trained import load_trained
from kdtrain.teachers import build_teacher
from kdtrain.trainer.evaluation import Evaluation
from kdtrain.trainer.figures import RowSums

Progress = Callable[[int, int], None]
"""Called with the number of rows that are done, and of all."""


def text_bytes(rows: datasets.Dataset, tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes of the supervised text of each row that contributes cross-entropy, [R]; 0 of the others.

    Without special tokens: what ends a turn is paid for by every model, and is text of none.
    """
    found = []
    for row in rows.select_columns(["labels", "ce"]):
        ids = [label for label in row["labels"][1:] if label != IGNORE_INDEX] if row["ce"] else []
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append(len(text.encode()))
    return np.array(found, dtype=np.float64)


class InOwnTokens:
    """Measures models with a tokenizer of their own on the rows of an evaluation.

    Args:
        rows: as the student's tokenizer encodes them, named by `row_id`.
        processing: the student's.
        cut: how many of the rows end at `data.max_length` there: with other tokens they end elsewhere.
    """

    def __init__(
        self,
        config: RunConfig,
        args: GKDConfig,
        accelerator: Accelerator,
        rows: datasets.Dataset,
        processing: Any,
        cut: int,
    ) -> None:
        self._cut = cut
        self._config, self._args, self._accelerator, self._rows = config, args, accelerator, rows
        self._tokenizer = getattr(processing, "tokenizer", processing)
        self.text_bytes = text_bytes(rows, self._tokenizer)

    def differs(self, run: TrainedRun) -> bool:
        """Whether a run's student has another tokenizer than the evaluation's."""
        if not (run.model / "tokenizer_config.json").is_file():
            return False
        return tokenizer_difference(self._tokenizer, load_tokenizer(str(run.model))) is not None

    def of_run(self, run: TrainedRun, progress: Progress) -> RowSums:
        """The sums of a run's student, nothing of which is compared; a collective, as `of_teacher` is.

        Raises:
            PreflightError: not all rows can be read with its tokenizer.
        """
        model = load_trained(run, self._args.device)
        return self._measured(model, load_tokenizer(str(run.model)), run.name, progress)

    def of_teacher(self, processing: Any, progress: Progress) -> RowSums:
        """The sums of the teacher that the config names, by its `processing`."""
        config, name = self._config, str(self._config.rlhf.teacher_model)
        teacher = build_teacher(
            name,
            init_kwargs=self._args.teacher_model_init_kwargs,
            device=self._args.device,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.rlhf.teacher.revision,
            adapter=config.rlhf.teacher.adapter,
        )
        return self._measured(teacher.module, processing, name, progress)

    def _measured(self, model: Any, processing: Any, name: str, progress: Progress) -> RowSums:
        evaluation = Evaluation(
            self._read_by(processing, name),
            Collator(processing, pad_to_multiple_of=self._args.pad_to_multiple_of),
            teacher=None,
            columns=vocabulary_size(model),
            batch_size=self._args.per_device_eval_batch_size,
            accelerator=self._accelerator,
        )
        return evaluation.measure(model, progress)

    def _read_by(self, processing: Any, name: str) -> datasets.Dataset:
        """The same rows, in the same order, as another tokenizer encodes them."""
        if "answers" in self._rows.column_names:
            raise PreflightError(
                f"{name} has another tokenizer, and rows that the teacher answers are tokens of the student's: give "
                "rows with answers (data.eval)."
            )
        read = read_evaluation(self._config, self._args.seed, processing)
        if cut := max(self._cut, read.report.truncated):
            raise PreflightError(
                f"{name} has another tokenizer, and {cut} rows of data.eval are cut at data.max_length "
                f"({self._config.data.max_length} tokens): the two would be measured on other text. Raise "
                "data.max_length, or leave these rows out."
            )
        own = read.rows
        places = {row_id: i for i, row_id in enumerate(own["row_id"][:])}
        names = self._rows["row_id"][:]
        if missing := [row_id for row_id in names if row_id not in places]:
            raise PreflightError(
                f"{name} has another tokenizer, with which {len(missing)} of {len(names)} rows of data.eval are too "
                f"long or bad (the first: row {missing[0]}). Raise data.max_length, or leave them out."
            )
        return own.select([places[row_id] for row_id in names])
