"""What a batch is: what the models' forwards take, what the loss compares with, and what is known of its rows.

Shapes: B rows, T positions, S supervised tokens.

Batches are padded on the right. What several places ask of one is found once and kept with it; whoever changes a batch
makes a new one by `dataclasses.replace`, which forgets that. A user's own collator may still give a plain dict, padded
on either side: `received` makes a batch of it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from kdtrain.data.images import Image
from kdtrain.data.packing import ForwardInputs, Layout, in_lines
from kdtrain.errors import DataError
from kdtrain.host import on_host, send, send_known
from kdtrain.losses.reduce import IGNORE_INDEX, next_token_labels

logger = logging.getLogger(__name__)

# Of trl's DataCollatorForChatML: offsets for a teacher with another tokenizer, and the texts behind them.
_OF_OTHER_TRAINERS = frozenset({"byte_offsets", "original_prompt_text", "original_completion_text"})
# What a forward hands on to the attention without naming it.
_FOR_ATTENTION = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
_TEXT = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is known of the B rows of a batch beside their tokens."""

    ids: Sequence[str] = ()
    """Their names, for messages and for what is stored by row; empty where the collator gives none."""
    keys: Sequence[bytes] = ()
    """Their names by what is in them, of `kdtrain.data.row_key`; empty where the collator was not asked for them."""
    prompt_lengths: torch.Tensor | None = None
    """[B] long: leading tokens that are the prompt, which an answer can be generated from."""
    prompts: tuple[torch.Tensor, torch.Tensor] | None = None
    """Ids and mask [B, P] of prompts padded on the left, in place of `prompt_lengths`: trl's collator gives them."""
    ce: torch.Tensor | None = None
    """[B] bool: rows that contribute cross-entropy; None is all."""
    truncated: Sequence[bool] = ()
    """Whether each row was cut at `max_length`; empty where none was."""
    places: Sequence[int] | None = None
    """Which of the rows to be collated each one comes from, in their order; None where each of them became one."""
    chats: Sequence[str | None] = ()
    """Their conversations as of `kdtrain.data.conversation`, for a teacher that reads messages; empty where the data
    set does not keep them."""
    answers: Sequence[str | None] = ()
    """The rows' column `answer`, what a sample is checked against; empty where it is not read."""
    samples: Sequence[int] = ()
    """Of generated rows: which of the answers to the same prompt each one is, from 0; empty where there is one each."""
    cut: Sequence[bool] = ()
    """Of generated rows: whether each answer reached `max_new_tokens` without a token that ends it."""
    kd_weights: torch.Tensor | None = None
    """[B] float32: what the divergence of each row counts; None is 1 for all. A row of weight 0 is not in its D. It is
    the answer's, whoever writes it; see `Batch.kd_token_weights` as well."""
    stream_place: Any = None
    """Of rows of a stream: the `kdtrain.data.stream.rows.Place` that reading can go on from, at or before the last."""
    images: Sequence[Sequence[Image]] = ()
    """Beside `chats`: the images of each row, in the order of its image parts, and maybe more of a row that was cut."""

    teachers: Sequence[str | None] = ()
    """Which of several teachers answers for each row, by its name in `rlhf.teachers`; empty where there is one."""
    pictured: Sequence[bool] = ()
    """Whether each row has an image, where the batch has `blank_images`; else empty."""
    losses: Sequence[tuple[Any, float | None]] = ()
    """`divergence` and `beta` of the source of each row, None where it says nothing; empty where none does."""

    def name(self, row: int) -> str:
        return self.ids[row] if row < len(self.ids) and self.ids[row] else str(row)


@dataclass(frozen=True, kw_only=True)
class TeacherImages:
    """The images as the teacher's processor makes them, where it makes others than the student's."""

    inputs: Mapping[str, torch.Tensor]
    sizes: Mapping[str, Sequence[int]]
    """As `Batch.visual_sizes`."""


@dataclass(frozen=True, kw_only=True)
class TeacherTokens:
    """The rows as the teacher reads them, padded on the right, where it reads another text than the student.

    Their supervised tokens are the student's: as many in every row, the same ids in the same order. Of a teacher with
    another tokenizer they are its own tokens of the student's answers, and `chunks` say which belong to which.
    """

    input_ids: torch.Tensor
    """[B, T'] long, like the next two."""
    attention_mask: torch.Tensor
    labels: torch.Tensor
    """−100 where nothing is supervised."""
    prompt_lengths: torch.Tensor | None = None
    """[B] long: leading tokens that are the teacher's prompt."""
    chunks: torch.Tensor | None = None
    """[B, T'] long, of another tokenizer: the number of each token's chunk in its row (see byte_alignment.py), −100
    without one. `labels` are of the tokens that have one."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


@dataclass(frozen=True, kw_only=True)
class StudentChunks:
    """The chunks of text that the student's tokens and those of a teacher with another tokenizer make up."""

    numbers: torch.Tensor
    """[B, T] long: the number of each token's chunk in its row, from 0 on, −100 without one. A chunk has tokens of
    both models."""
    aligned_bytes: torch.Tensor
    """[B] long: bytes of the student's answers that are in chunks."""
    answer_bytes: torch.Tensor
    """[B] long: bytes of its answers."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch."""

    model_inputs: Mapping[str, Any]
    """What the student's forward takes: `input_ids` and `attention_mask` [B, T], what a processor says of every token
    (`…token_type_ids` [B, T]), and its images, whose first axis counts images, patches or rows."""
    labels: torch.Tensor
    """[B, T] long: −100 where nothing is supervised."""
    kd_token_weights: torch.Tensor | None = None
    """[B, T] float32, as the labels: what the divergence of each token of the data's answers counts, times the row's
    weight; None is 1 for all."""
    rows: Rows = field(default_factory=Rows)
    visual_sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Per tensor of images: how many entries along its first axis each of the B rows owns."""
    teacher_images: TeacherImages | None = None
    blank_images: TeacherImages | None = None
    """The teacher's images once more, each in its mean colour (`rlhf.token_weights`)."""
    teacher_tokens: TeacherTokens | None = None
    student_chunks: StudentChunks | None = None
    """Of a teacher with another tokenizer; beside `teacher_tokens`, unless what it says of them is stored."""
    generated_by: Literal["student", "teacher"] | None = None
    """Who wrote the answers; None are those of the data."""
    all_repeated: bool = False
    """Whether no row is new: the batch only fills up an epoch, or a window of which too few samples train, so that all
    ranks go through the same motions."""
    stand_in: Batch | None = None
    """A row with an image, see `stand_in.py`: the batch has no images, and another rank's has some. Of a batch as it is
    run it is the last row."""
    targets: Any = None
    """The `kdtrain.teachers.Targets` of its supervised tokens, where the teacher was asked for them already."""
    layout: Layout | None = None
    """How its rows lie in the forward of a model in this process; None is beside each other, with padding. The batch
    itself is padded in any case: what is asked by row, and what is sent to a server, does not depend on it."""

    # ---- the supervised tokens ---------------------------------------------------------------------------------------

    # Found on the host, in the tensors that the collator made there: no device is waited for, see `kdtrain/host.py`.

    @cached_property
    def predicts_BT(self) -> torch.Tensor:
        """[B, T−1] bool, on the CPU: positions whose next token is supervised. Those of student and teacher are
        selected by it."""
        return next_token_labels(on_host(self.labels)) != IGNORE_INDEX

    @cached_property
    def positions_S(self) -> torch.Tensor:
        """[S] long: where the supervised tokens are predicted, b·T + t."""
        rows_S, columns_S = self.predicts_BT.nonzero(as_tuple=True)
        return send_known(rows_S * self.labels.shape[1] + columns_S, self.labels.device)

    @cached_property
    def labels_S(self) -> torch.Tensor:
        """[S]: the supervised tokens, row by row."""
        return send_known(next_token_labels(on_host(self.labels))[self.predicts_BT], self.labels.device)

    @cached_property
    def num_supervised(self) -> torch.Tensor:
        """S, a scalar int64 tensor on the CPU."""
        return self.predicts_BT.sum()

    def tokens_of_rows(self, rows: Sequence[int]) -> torch.Tensor:
        """[S] bool, on the CPU: which of the supervised tokens are those of some rows."""
        own = set(rows)
        chosen_B = torch.tensor([row in own for row in range(len(self))])
        return chosen_B[:, None].expand_as(self.predicts_BT)[self.predicts_BT]

    @property
    def num_chunks(self) -> torch.Tensor | None:
        """[B], on the CPU: chunks that both models' tokens make up, of a teacher with another tokenizer; None of
        others."""
        chunks = self.student_chunks
        return None if chunks is None else on_host(chunks.numbers).amax(1).clamp(min=-1) + 1

    @property
    def ce_mask_S(self) -> torch.Tensor | None:
        """[S] bool: supervised tokens of rows that contribute cross-entropy; None is all."""
        if self.rows.ce is None:
            return None
        chosen_S = on_host(self.rows.ce)[:, None].expand_as(self.predicts_BT)[self.predicts_BT]
        return send_known(chosen_S, self.labels.device)

    @cached_property
    def kd_weights_BT(self) -> torch.Tensor | None:
        """[B, T−1] float32, on the CPU: what the divergence of each token that is predicted counts; None is 1 for
        all."""
        of_rows, of_tokens = self.rows.kd_weights, self.kd_token_weights
        if of_rows is None and of_tokens is None:
            return None
        weights_BT = torch.ones(self.predicts_BT.shape)
        if of_rows is not None:
            weights_BT = weights_BT * on_host(of_rows)[:, None]
        return weights_BT if of_tokens is None else weights_BT * next_token_labels(on_host(of_tokens))

    @cached_property
    def kd_weights_S(self) -> torch.Tensor | None:
        """[S] float32: what the divergence of each supervised token counts; None is 1 for all."""
        weights_BT = self.kd_weights_BT
        return None if weights_BT is None else send_known(weights_BT[self.predicts_BT], self.labels.device)

    # ---- tokens and images -------------------------------------------------------------------------------------------

    @property
    def num_input_tokens(self) -> torch.Tensor:
        """Tokens that are not padding, a scalar tensor."""
        mask = self.model_inputs.get("attention_mask")
        return mask.sum() if mask is not None else torch.tensor(float(self.model_inputs["input_ids"].numel()))

    @property
    def token_level(self) -> dict[str, torch.Tensor]:
        """What a processor says of every token, [B, T]: 0 is text."""
        return {key: value for key, value in self.model_inputs.items() if key.endswith("token_type_ids")}

    @property
    def visual(self) -> dict[str, Any]:
        """What describes images rather than tokens: by the collator's account, or by name where it gives none."""
        by_name, sizes = ("pixel_", "image_", "video_"), self.visual_sizes
        return {key: value for key, value in self.model_inputs.items() if key in sizes or key.startswith(by_name)}

    @property
    def unknown_inputs(self) -> list[str]:
        """Inputs of the model that are neither tokens nor images."""
        return sorted(self.model_inputs.keys() - _TEXT - self.token_level.keys() - self.visual.keys())

    @property
    def has_images(self) -> bool:
        return any(key.startswith("pixel_values") and value is not None for key, value in self.model_inputs.items())

    @cached_property
    def image_units(self) -> torch.Tensor:
        """What a mean over image features weighs the batch by, proportional to its image tokens.

        Patches where the batch says how many, the area of images that are packed, crops or frames elsewhere. Crops that
        only fill up a batch, all zero, do not count: no model encodes them. A scalar float64 tensor, on the device of
        what was counted.
        """
        found = torch.zeros((), dtype=torch.float64)
        if self.all_repeated or self.stand_in is not None:
            return found
        inputs = self.model_inputs
        grids = [inputs[key] for key in ("image_grid_thw", "video_grid_thw") if inputs.get(key) is not None]
        if patches := sum(int(on_host(grid).prod(-1).sum()) for grid in grids):
            return found + patches
        images = {key: value for key, value in inputs.items() if key.startswith("pixel_values") and value is not None}
        for value in images.values():
            found = found + _count_images(value, inputs.get("image_sizes"))
        return found

    # ---- other forms of it -------------------------------------------------------------------------------------------

    def for_forward(self, model: nn.Module) -> ForwardInputs:
        """What the forward of a model takes, and where in its outputs the supervised tokens are predicted.

        Args:
            model: one that reads this batch's tokens (of a teacher: `as_teacher_sees_it`), wrapped or not.
        """
        if self.layout is None:
            mask = self.model_inputs.get("attention_mask")
            return ForwardInputs(self.model_inputs, mask, self.positions_S, self.labels.shape[1])
        tokens = {"input_ids": self.model_inputs["input_ids"], **self.token_level}
        config = getattr(getattr(model, "module", model), "config", None)
        # transformers looks for documents in the positions of a single line there.
        flat = "flash" in str(getattr(config, "_attn_implementation", ""))
        return in_lines(tokens, self.predicts_BT, self.layout, flat=flat)

    @property
    def teacher_inputs(self) -> Mapping[str, Any]:
        """What the teacher's forward takes: its own images replace all of the student's, which it may not know.

        Raises:
            DataError: it reads other tokens, in which `predicts_BT` would select others than the supervised ones.
        """
        if self.teacher_tokens is not None:
            raise DataError(
                "The teacher reads other tokens than the student (rlhf.teacher: prefix, chat_template_kwargs), whose "
                "positions are not its own: take model_inputs and predicts_BT of batch.as_teacher_sees_it()."
            )
        if self.teacher_images is None:
            return self.model_inputs
        students = {key: value for key, value in self.model_inputs.items() if key not in self.visual_sizes}
        return students | dict(self.teacher_images.inputs)

    def as_teacher_sees_it(self) -> Batch:
        """The batch with the teacher's inputs, and with its own labels and prompts where it reads other tokens.

        The supervised tokens, `labels_S`, are the same, in the same order, but for a teacher with another tokenizer.

        Raises:
            DataError: they are not.
        """
        seen = self if self.teacher_tokens is None else self._with_teacher_tokens(self.teacher_tokens)
        if seen.teacher_images is None:
            return seen
        sizes = seen.teacher_images.sizes
        return replace(seen, model_inputs=seen.teacher_inputs, visual_sizes=sizes, teacher_images=None)

    def _with_teacher_tokens(self, tokens: TeacherTokens) -> Batch:
        per_token = {}  # of rows with images, which both read alike; those of text are 0
        for name, values in self.token_level.items():
            per_token[name] = values.new_zeros(*tokens.labels.shape, *values.shape[2:])
            width = min(values.shape[1], tokens.labels.shape[1])
            per_token[name][:, :width] = values[:, :width]
        seen = replace(
            self,
            model_inputs={**self.model_inputs, **per_token, **tokens.inputs},
            labels=tokens.labels,
            kd_token_weights=None,  # of the student's tokens
            rows=replace(self.rows, prompt_lengths=tokens.prompt_lengths, prompts=None),
            teacher_tokens=None,
            student_chunks=None,
            layout=self.layout and replace(self.layout, lengths=self.layout.teacher_lengths, teacher_lengths=()),
        )
        if tokens.chunks is not None:
            return seen
        # By row as well: a token more in one and less in the next would be the same tokens in all.
        same_counts = torch.equal(seen.predicts_BT.sum(1), self.predicts_BT.sum(1))
        if not same_counts or not torch.equal(on_host(seen.labels_S), on_host(self.labels_S)):
            raise DataError(
                "A batch has other supervised tokens for the teacher than for the student, and distillation compares "
                "them one by one: give both the same, in the same order."
            )
        return seen

    def with_blank_images(self) -> Batch:
        """The batch as the teacher would see it without what is on its images; what it has said is forgotten."""
        return replace(self, teacher_images=self.blank_images, blank_images=None, targets=None)

    def without_labels(self) -> Batch:
        tokens = self.teacher_tokens
        if tokens is not None:
            kept = {name: value for name in ("labels", "chunks") if (value := getattr(tokens, name)) is not None}
            tokens = replace(tokens, **{name: torch.full_like(value, IGNORE_INDEX) for name, value in kept.items()})
        chunks = self.student_chunks
        if chunks is not None:
            chunks = replace(chunks, numbers=torch.full_like(chunks.numbers, IGNORE_INDEX))
        labels = torch.full_like(self.labels, IGNORE_INDEX)
        return replace(self, labels=labels, teacher_tokens=tokens, student_chunks=chunks, targets=None)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Batch:
        """Accelerate's data loaders call this; no copy from the host is waited for."""

        def sent(tensor: torch.Tensor) -> torch.Tensor:
            # Pixels are read by the models alone.
            is_known = not tensor.is_floating_point() or tensor.dim() < 2 or tensor.shape == self.labels.shape
            return send_known(tensor, device) if is_known else send(tensor, device)

        return self.map_tensors(sent)

    def pin_memory(self) -> Batch:
        """Torch's data loader calls this."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with every tensor changed; the same object, and what is known of it, where none is another."""
        changes: list[bool] = []

        def noted(tensor: torch.Tensor) -> torch.Tensor:
            changed = change(tensor)
            changes.append(changed is not tensor)
            return changed

        rows, tokens, chunks = self.rows, self.teacher_tokens, self.student_chunks
        mapped = replace(
            self,
            model_inputs=_mapped(self.model_inputs, noted),
            labels=noted(self.labels),
            kd_token_weights=_mapped(self.kd_token_weights, noted),
            rows=replace(
                rows,
                prompt_lengths=_mapped(rows.prompt_lengths, noted),
                prompts=_mapped(rows.prompts, noted),
                ce=_mapped(rows.ce, noted),
                kd_weights=_mapped(rows.kd_weights, noted),
            ),
            teacher_images=_mapped_images(self.teacher_images, noted),
            blank_images=_mapped_images(self.blank_images, noted),
            teacher_tokens=None if tokens is None else TeacherTokens(**_mapped(vars(tokens), noted)),
            student_chunks=None if chunks is None else StudentChunks(**_mapped(vars(chunks), noted)),
            stand_in=None if self.stand_in is None else self.stand_in.map_tensors(noted),
        )
        return mapped if any(changes) else self

    # What transformers' Trainer asks of a batch by itself: whether there is one, its tokens to count them, its inputs
    # for a user's `compute_metrics`.

    def __len__(self) -> int:
        return len(self.labels)

    def __contains__(self, name: object) -> bool:
        return name == "labels" or name in self.model_inputs

    def __getitem__(self, name: str) -> Any:
        return self.labels if name == "labels" else self.model_inputs[name]


_Value = TypeVar("_Value")


def _mapped(value: _Value, change: Callable[[torch.Tensor], torch.Tensor]) -> _Value:
    """A tensor changed, or the tensors of a mapping or tuple; anything else as it is."""
    mapped: Any = value
    if isinstance(value, torch.Tensor):
        mapped = change(value)
    elif isinstance(value, Mapping):
        mapped = {key: _mapped(item, change) for key, item in value.items()}
    elif isinstance(value, tuple | list):
        mapped = type(value)(_mapped(item, change) for item in value)
    return mapped


def _mapped_images(images: TeacherImages | None, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return None if images is None else replace(images, inputs=_mapped(images.inputs, change))


def _count_images(pixels: Any, sizes: Any) -> torch.Tensor | float:
    if not isinstance(pixels, torch.Tensor):
        return len(pixels)
    if pixels.dim() == 5:  # [rows, crops, channels, height, width]
        return pixels.flatten(2).any(-1).sum()
    if pixels.dim() == 4 and sizes is not None and len(sizes) == len(pixels):
        return float(on_host(torch.as_tensor(sizes)).prod(-1).sum())
    return len(pixels)


# ---- batches of other collators --------------------------------------------------------------------------------------


def forward_names(model: nn.Module) -> frozenset[str] | None:
    """What a model's forward takes by name; None where it takes anything."""
    parameters = inspect.signature(type(model).forward).parameters
    names = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return frozenset(names) if len(names) > 1 else None  # self alone: a wrapper


def received(batch: Batch | Mapping[str, Any], accepted: frozenset[str] | None) -> Batch:
    """A batch of any collator, without what the student's forward does not take (see `forward_names`).

    A mapping has `input_ids`, `attention_mask`, `labels` and whatever else the model takes; optionally `prompt_lengths`
    [B] (or trl's `prompts`), `ce_rows` [B], `kd_weights` [B] or [B, T], `row_ids`, `teachers` and `losses` (see
    `Rows`), `visual_sizes`, `teacher_inputs` and `teacher_visual_sizes`.
    Where the teacher reads other tokens, `teacher_inputs` has `input_ids`, `attention_mask` and `labels` of its own as
    well, and `prompt_lengths` where answers are generated.
    """
    found = batch if isinstance(batch, Batch) else _from_mapping(batch)
    inputs = found.model_inputs
    known = _TEXT | _FOR_ATTENTION | found.token_level.keys() | found.visual.keys()
    left_out = [key for key in inputs if not (accepted is None or key in accepted | known)]
    if left_out:
        _warn_left_out(tuple(left_out))
        found = replace(found, model_inputs={key: value for key, value in inputs.items() if key not in left_out})
    if found.teacher_tokens is not None and accepted is not None and found.unknown_inputs:
        raise DataError(
            f"Batches carry {', '.join(found.unknown_inputs)} for the student's tokens, and the teacher reads other "
            "ones, which they do not fit."
        )
    return found


def _from_mapping(batch: Mapping[str, Any]) -> Batch:
    rest = {key: value for key, value in batch.items() if key not in _OF_OTHER_TRAINERS}
    labels = rest.pop("labels", None)
    if labels is None:
        raise DataError(
            f"The collator's batches have no labels (they have {', '.join(batch)}): give `labels` [B, T], with -100 "
            "where nothing is supervised."
        )
    prompts, mask = rest.pop("prompts", None), rest.pop("prompt_attention_mask", None)
    of_rows, of_tokens = _weights(rest.pop("kd_weights", None), labels)
    rows = Rows(
        ids=rest.pop("row_ids", ()),
        prompt_lengths=rest.pop("prompt_lengths", None),
        prompts=None if prompts is None or mask is None else (prompts, mask),
        ce=rest.pop("ce_rows", None),
        kd_weights=of_rows,
        truncated=rest.pop("truncated", ()),
        teachers=rest.pop("teachers", ()),
        losses=rest.pop("losses", ()),
        places=rest.pop("places", None),
    )
    tokens, images = _of_teacher(rest.pop("teacher_inputs", None))
    sizes = rest.pop("teacher_visual_sizes", {})
    return Batch(
        labels=labels,
        kd_token_weights=of_tokens,
        rows=rows,
        visual_sizes=rest.pop("visual_sizes", {}),
        teacher_images=None if images is None else TeacherImages(inputs=images, sizes=sizes),
        teacher_tokens=tokens,
        model_inputs=rest,
    )


def _weights(given: Any, labels: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weights in the divergence of the rows, and of their tokens: a user's collator gives one of the two."""
    if given is None:
        return None, None
    weights = torch.as_tensor(given, dtype=torch.float32)
    if weights.shape not in (labels.shape, labels.shape[:1]) or not bool((weights.isfinite() & (weights >= 0)).all()):
        raise DataError(
            f"The collator's kd_weights {tuple(weights.shape)} must be a finite number of 0 or more for each row "
            f"{tuple(labels.shape[:1])} or each token {tuple(labels.shape)}."
        )
    return (weights, None) if weights.dim() == 1 else (None, weights)


_TOKENS = ("input_ids", "attention_mask", "labels")


def _of_teacher(inputs: Mapping[str, Any] | None) -> tuple[TeacherTokens | None, Mapping[str, Any] | None]:
    """The tokens and the images that a user's collator gives for the teacher; None where it gives none."""
    if inputs is None or "input_ids" not in inputs:
        return None, inputs
    if missing := [name for name in _TOKENS if inputs.get(name) is None]:
        raise DataError(
            f"The collator's teacher_inputs have input_ids and no {' or '.join(missing)}: give labels [B, T] with the "
            "student's supervised tokens, and a mask, or leave the tokens out where both models read the same."
        )
    tokens = TeacherTokens(**{name: inputs[name] for name in _TOKENS}, prompt_lengths=inputs.get("prompt_lengths"))
    images = {name: value for name, value in inputs.items() if name not in (*_TOKENS, "prompt_lengths")}
    return tokens, images or None


@functools.cache
def _warn_left_out(keys: tuple[str, ...]) -> None:
    logger.warning("Batches carry %s, which the student's forward does not take: left out.", ", ".join(keys))


def right_padded(batch: Batch) -> Batch:
    """The batch with its padding moved behind the rows, where all its [B, T] tensors have it.

    On the left it shifts the positions of models that count them from the first column, and stands between the virtual
    tokens of prompt tuning and the row.
    """
    if (tokens := batch.teacher_tokens) is not None:
        of_teacher = right_padded(Batch(model_inputs=tokens.inputs, labels=tokens.labels))
        tokens = replace(tokens, **of_teacher.model_inputs, labels=of_teacher.labels)
        batch = replace(batch, teacher_tokens=tokens)
    mask = batch.model_inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask[:, 0].all()):
        return batch
    columns = torch.arange(mask.shape[1], device=mask.device)
    empty = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    moved = (columns + empty) % mask.shape[1]

    def shifted(name: str, value: Any) -> Any:
        per_token = name in ("input_ids", "attention_mask", "position_ids", "labels") or name in batch.token_level
        fits = isinstance(value, torch.Tensor) and value.shape == mask.shape
        return value.gather(1, moved) if per_token and fits else value

    return replace(
        batch,
        model_inputs={name: shifted(name, value) for name, value in batch.model_inputs.items()},
        labels=shifted("labels", batch.labels),
        kd_token_weights=None if batch.kd_token_weights is None else shifted("labels", batch.kd_token_weights),
    )
