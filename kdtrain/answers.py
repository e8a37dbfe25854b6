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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.batch import for_teacher
from kdtrain.data.chat import ChatTemplate
from kdtrain.data.multimodal import image_token_ids
from kdtrain.errors import NotAvailableError
from kdtrain.generation import generate_batch, generation_config, stop_token_ids
from kdtrain.losses.reduce import IGNORE_INDEX

logger = logging.getLogger(__name__)

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class TeacherAnswers:
    """Generates and remembers a teacher's answers.

    Args:
        teacher: a transformers model in this process; put on the device and into eval mode.
        processing_class: what the rows were encoded with.
        collate: rows to a batch.
        folder: where answers are kept; made when the first one is.
        identity: whatever names the teacher and its loading; other values are other answers.
        max_new_tokens: longest answer.
        vocabulary: token ids both models know; the teacher's further ones (padding) are never generated.
        batch_size: prompts at a time.
        progress: called with the number of answers there are, and how many are needed; on the main process only.
    """

    def __init__(
        self,
        teacher: nn.Module,
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
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        stops = stop_token_ids(getattr(teacher, "generation_config", None), tokenizer)
        if tokenizer.chat_template or getattr(processing_class, "chat_template", None):
            stops += sorted(ChatTemplate(processing_class).stop_ids - set(stops))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else 0
        own_size = teacher.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        forbidden = [*range(vocabulary, own_size), *image_token_ids(processing_class)]
        self._config = generation_config(stops, pad, None, max_new_tokens, forbidden)
        self._stops, self._collate, self._batch_size, self._progress = set(stops), collate, batch_size, progress
        self._state = PartialState()
        if getattr(teacher, "hf_device_map", None) is None:
            teacher.to(self._state.device)
        self._teacher = teacher.eval()
        settings = {**identity, "stops": stops, "max_new_tokens": max_new_tokens, "vocabulary": vocabulary}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self._folder = folder / digest[:16]

    def fill(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """The data set with an answer in every row whose column `answers` is true; without one, as it is.

        A collective: the ranks share the work, and all of them get all answers.

        Returns:
            Rows with new `input_ids` and `labels`: the answer is supervised, its stop token included. An answer that
            reached `max_new_tokens` gets no made-up stop token; such are counted in a warning.
        """
        if "answers" not in dataset.column_names:
            return dataset
        wanted = {_key(row): i for i, row in enumerate(dataset) if row["answers"]}
        # Together, before any rank writes: all have to see the same ones missing.
        known = dict(gather_object(list(self._stored().items())))
        missing = [i for key, i in wanted.items() if key not in known]
        made = self._generate(dataset, missing, len(wanted))
        known |= dict(gather_object(made))
        cut = sum(not self._stops & set(known[key]) for key in wanted)
        if cut and self._state.is_main_process:
            logger.warning("%d of the teacher's %d answers reached rlhf.max_new_tokens.", cut, len(wanted))
        return _with_answers(dataset, known)

    def _generate(self, dataset: datasets.Dataset, missing: Sequence[int], total: int) -> list[tuple[str, list[int]]]:
        """This rank's share of the missing answers, written down batch by batch."""
        # The longest first: if memory is short, that is known at once.
        order = sorted(missing, key=lambda i: -dataset[i]["prompt_length"])
        state, made = self._state, []
        own = order[state.process_index :: state.num_processes]
        if own:
            self._folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(own), self._batch_size):
            rows = [dataset[i] for i in own[start : start + self._batch_size]]
            answers = list(zip(map(_key, rows), self._answers(rows), strict=True))
            with open(self._folder / f"rank{state.process_index}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"prompt": key, "answer": ids}) + "\n" for key, ids in answers)
                file.flush()
                os.fsync(file.fileno())
            made += answers
            if state.is_main_process:
                self._progress(min(total - len(missing) + len(made) * state.num_processes, total), total)
        return made

    def _answers(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        inputs = for_teacher(self._collate(rows))
        inputs = {k: v.to(self._state.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        done = generate_batch(self._teacher, inputs, self._config, seed=0)
        return [
            ids[labels != IGNORE_INDEX].tolist() for ids, labels in zip(done["input_ids"], done["labels"], strict=True)
        ]

    def _stored(self) -> dict[str, list[int]]:
        """Answers of an earlier run that was stopped."""
        return {
            record["prompt"]: record["answer"]
            for file in sorted(self._folder.glob("rank*.jsonl"))
            for record in _lines(file)
        }


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # written only in part when the run was killed


def _key(row: Mapping[str, Any]) -> str:
    """What a row asks: its prompt and its images."""
    digest = hashlib.sha256(json.dumps([row["input_ids"][: row["prompt_length"]], row.get("text")]).encode())
    for image in row.get("images") or ():
        digest.update(_image_key(image))
    return digest.hexdigest()[:32]


def _image_key(image: Mapping[str, Any]) -> bytes:
    if image.get("bytes") is not None:
        return hashlib.sha256(image["bytes"]).digest()
    found = os.stat(image["path"])
    return f"{image['path']}:{found.st_size}:{found.st_mtime_ns}".encode()


def _with_answers(dataset: datasets.Dataset, answers: Mapping[str, Sequence[int]]) -> datasets.Dataset:
    def filled() -> Iterable[tuple[list[int], list[int]]]:
        for row in dataset:
            ids, labels = row["input_ids"], row["labels"]
            if row["answers"]:
                prompt, answer = ids[: row["prompt_length"]], list(answers[_key(row)])
                ids, labels = prompt + answer, [IGNORE_INDEX] * len(prompt) + answer
            yield ids, labels

    rows = list(filled())
    tokens = datasets.Features({name: dataset.features[name] for name in ("input_ids", "labels")})
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("input_ids", "labels"))}
    fresh = datasets.Dataset.from_dict(columns, features=tokens)
    rest = dataset.remove_columns(["input_ids", "labels"])
    return datasets.concatenate_datasets([rest, fresh], axis=1)
