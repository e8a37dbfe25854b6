"""`answers: teacher`: the completions of a data source, generated once by the teacher before training.

This is sequence-level knowledge distillation (Kim and Rush 2016, https://arxiv.org/abs/1606.07947) with the teacher's
greedy answer in place of its beam search. Answers go to the run folder as they are made, so that a run that was
stopped goes on where it was; they are keyed by the prompt, its images and everything that an answer depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.data.batch import Batch
from kdtrain.data.images import stored_image
from kdtrain.errors import NotAvailableError
from kdtrain.generation.generate import completions
from kdtrain.generation.sampling import generation_config, token_roles
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.models.vocabulary import vocabulary_size
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)

Answer = np.ndarray
"""Token ids, int32: as lists they would take ten times the memory."""
Collate = Callable[[list[dict[str, Any]]], Batch]


class TeacherAnswers:
    """Generates and remembers a teacher's answers.

    Args:
        teacher: put on the device and into eval mode.
        processing_class: what the rows were encoded with.
        folder: where answers are kept; made when the first one is.
        identity: whatever names the teacher and its loading; other values are other answers.
        vocabulary: token ids that both models know; the teacher's others (padding) are never generated.
        progress: called with the number of answers there are, and how many are needed; on the main process only.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        processing_class: Any,
        collate: Collate,
        folder: Path,
        *,
        identity: Mapping[str, Any],
        max_new_tokens: int,
        vocabulary: int,
        batch_size: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if is_deepspeed_zero3_enabled():
            raise NotAvailableError(
                "answers: teacher is not available under DeepSpeed ZeRO-3, which keeps the teacher in pieces until "
                "training begins: generate them in a run of its own (training.max_steps: 1) without it."
            )
        roles = token_roles(processing_class, teacher, range(vocabulary, vocabulary_size(teacher)))
        self._config = generation_config(roles.stop, roles.pad, None, max_new_tokens, roles.forbidden)
        self._stops, self._collate, self._batch_size, self._progress = set(roles.stop), collate, batch_size, progress
        self._state = PartialState()
        if getattr(teacher, "hf_device_map", None) is None:
            teacher.to(self._state.device)
        self._teacher = teacher.eval()
        settings = {**identity, "stops": roles.stop, "max_new_tokens": max_new_tokens, "vocabulary": vocabulary}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self._folder = folder / digest[:16]

    def fill(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """The data set with an answer in every row whose column `answers` is true, supervised as in `generate_batch`.

        A collective: the ranks share the work, and all of them get all answers.
        """
        if "answers" not in dataset.column_names:
            return dataset
        keys = _keys(dataset)
        wanted = {key: i for i, key in enumerate(keys) if key is not None}
        # Together, before any rank writes: all have to see the same ones missing.
        known = dict(gather_object(list(self._stored().items())))
        made = self._generate(dataset, keys, [i for key, i in wanted.items() if key not in known], len(wanted))
        known |= dict(gather_object(made))
        cut = sum(self._stops.isdisjoint(known[key].tolist()) for key in wanted)
        if cut and is_main():
            logger.warning("%d of the teacher's %d answers reached rlhf.max_new_tokens.", cut, len(wanted))
        return self._with_answers(dataset, keys, known)

    def _generate(
        self, dataset: datasets.Dataset, keys: Sequence[str | None], missing: Sequence[int], total: int
    ) -> list[tuple[str, Answer]]:
        """This rank's share of the missing answers, written down batch by batch."""
        lengths = dataset["prompt_length"][:]
        # The longest first: if memory is short, that is known at once.
        order = sorted(missing, key=lambda i: -lengths[i])
        state, made = self._state, []
        own = order[state.process_index :: state.num_processes]
        self._folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(own), self._batch_size):
            batch = own[start : start + self._batch_size]
            answers = [
                (str(keys[i]), ids) for i, ids in zip(batch, self._answers([dataset[i] for i in batch]), strict=True)
            ]
            with open(self._folder / f"rank{state.process_index}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"prompt": key, "answer": ids.tolist()}) + "\n" for key, ids in answers)
                file.flush()
                os.fsync(file.fileno())
            made += answers
            if is_main():
                self._progress(min(total - len(missing) + len(made) * state.num_processes, total), total)
        return made

    def _answers(self, rows: list[dict[str, Any]]) -> list[Answer]:
        batch = self._collate(rows).as_teacher_sees_it().to(self._state.device)
        return [np.array(ids, dtype=np.int32) for ids in completions(self._teacher, batch, self._config, seed=0)]

    def _stored(self) -> dict[str, Answer]:
        """Answers of an earlier run that was stopped."""
        return {
            record["prompt"]: np.array(record["answer"], dtype=np.int32)
            for file in sorted(self._folder.glob("rank*.jsonl"))
            for record in _lines(file)
        }

    def _with_answers(
        self, dataset: datasets.Dataset, keys: Sequence[str | None], answers: Mapping[str, Answer]
    ) -> datasets.Dataset:
        """The rows with their answers, in a file of this rank: text for a teacher may be larger than memory."""

        prefixes = ("", "teacher_") if "teacher_input_ids" in dataset.column_names else ("",)

        def answered(row: Mapping[str, Any], i: int) -> dict[str, Any]:
            key, tokens = keys[i], dict(row)
            for prefix in prefixes:
                length = tokens.pop(f"{prefix}prompt_length")
                if key is not None and length is not None:  # the teacher's are null where it reads the student's
                    prompt, answer = row[f"{prefix}input_ids"][:length], answers[key].tolist()
                    tokens[f"{prefix}input_ids"] = prompt + answer
                    tokens[f"{prefix}labels"] = [IGNORE_INDEX] * len(prompt) + answer
            return tokens

        names = [f"{prefix}{name}" for prefix in prefixes for name in ("input_ids", "labels")]
        lengths = [f"{prefix}prompt_length" for prefix in prefixes]
        tokens = dataset.select_columns([*names, *lengths]).map(
            answered,
            with_indices=True,
            remove_columns=lengths,
            features=datasets.Features({name: dataset.features[name] for name in names}),
            cache_file_name=str(self._folder / f"rows-{len(dataset)}-rank{self._state.process_index}.arrow"),
            load_from_cache_file=False,
            desc="Answers",
        )
        return datasets.concatenate_datasets([dataset.remove_columns(names), tokens], axis=1)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # written only in part when the run was killed


def _keys(dataset: datasets.Dataset) -> list[str | None]:
    """What each row asks, the teacher's prompt and its images; None where it has an answer."""
    columns = ["input_ids", "prompt_length", "answers"]
    more = ("text", "images", "teacher_input_ids", "teacher_prompt_length")
    columns += [name for name in more if name in dataset.column_names]
    return [_key(row) if row["answers"] else None for row in dataset.select_columns(columns)]


def _key(row: Mapping[str, Any]) -> str:
    prefix = "" if row.get("teacher_input_ids") is None else "teacher_"
    prompt = row[f"{prefix}input_ids"][: row[f"{prefix}prompt_length"]]
    digest = hashlib.sha256(json.dumps(prompt).encode())
    for image in row.get("images") or ():
        digest.update(stored_image(image).identity)
    return digest.hexdigest()[:32]
