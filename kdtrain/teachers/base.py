"""What the trainer expects of a teacher.

Shapes: B rows, T positions, S supervised tokens, H hidden width, V vocabulary, K known tokens. Row i of a target is the
distribution that predicts supervised token i of the batch, in the order of `Batch.labels_S`. Where the teacher reads
another text than the student (`rlhf.teacher`: `prefix`, `chat_template_kwargs`), that token stands at another position
of it: `Batch.as_teacher_sees_it` has both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from kdtrain.data.aligned_batch import Aligner
from kdtrain.data.batch import Batch
from kdtrain.losses.head import Head
from kdtrain.losses.mixture import Mixed, MixedHeads, MixedTopK, mix_logits
from kdtrain.losses.other_tokenizer import ChunkTargets
from kdtrain.losses.sampled import SampledTargets
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.losses.uld import UldTargets


@dataclass(frozen=True)
class DenseTargets:
    """Full distributions, as the hidden states and the head that give their logits."""

    hidden: torch.Tensor
    """[S, H]."""
    head: Head

    def logits(self) -> torch.Tensor:
        """[S, V], float32."""
        with torch.no_grad():
            return self.head.differentiable_logits(self.hidden)


@dataclass(frozen=True)
class MixedTargets:
    """Full distributions of several teachers, whose mean is the teacher (`rlhf.mix`)."""

    parts: tuple[DenseTargets | torch.Tensor, ...]
    """Of each teacher, for the same S tokens; a plain tensor is logits [S, V]."""
    shares: tuple[float, ...]
    """Of each one in the mean; they add up to 1."""

    @property
    def heads(self) -> MixedHeads | None:
        """The same as hidden states and heads; None where a teacher gives logits."""
        dense = [part for part in self.parts if isinstance(part, DenseTargets)]
        if len(dense) < len(self.parts):
            return None
        return MixedHeads(tuple(part.hidden for part in dense), tuple(part.head for part in dense), self.shares)

    def logits(self) -> torch.Tensor:
        """[S, V] of the mean at temperature 1, float32, over what all of them have."""
        return self.mixed(columns_of(self), 1.0).at_one

    def mixed(self, columns: int, temperature: float) -> Mixed:
        """The mean over the first columns of the vocabulary, [S, columns], in full."""
        logits = [part if isinstance(part, torch.Tensor) else part.logits() for part in self.parts]
        return mix_logits([one[:, :columns] for one in logits], self.shares, temperature)


def columns_of(scores: DenseTargets | MixedTargets | torch.Tensor) -> int:
    """Columns of full distributions: of several teachers those that all of them have."""
    if isinstance(scores, MixedTargets):
        return min(map(columns_of, scores.parts))
    return scores.shape[1] if isinstance(scores, torch.Tensor) else len(scores.head.weight)


Scores = DenseTargets | TopKLogprobs | SampledTargets | MixedTargets | MixedTopK | torch.Tensor


@dataclass(frozen=True)
class Targets:
    """A teacher's answer for a batch."""

    scores: Scores
    """One distribution at temperature 1 for each token that is covered; a plain tensor is logits [S, V]. Drawn tokens
    (`SampledTargets`) are of the distribution at `kd_temperature`, and serve forward KL (beta 0) alone."""
    covered_S: torch.Tensor | None = None
    """[S] bool: the batch's supervised tokens that the distributions are for; None is all of them. The others have
    cross-entropy only, and count in D like all."""
    chunks: ChunkTargets | UldTargets | None = None
    """Of a teacher with another tokenizer, what takes part in the loss: `scores` are of its own tokens of the text, or
    name no token (K = 0) where this alone is stored. See other_tokenizer.py."""


@dataclass(frozen=True)
class RoutedPart:
    """One teacher's answer for the rows of a batch that are its own."""

    teacher: str
    """Its name in `rlhf.teachers`."""
    rows: tuple[int, ...]
    """Which rows of the batch."""
    targets: Targets
    """Of a batch of these rows, in their order."""


@dataclass(frozen=True)
class RoutedTargets:
    """The answers of several teachers for a batch, each for its own rows."""

    parts: tuple[RoutedPart, ...]
    """No row is in two of them; a row without supervised tokens may be in none."""


AnyTargets = Targets | RoutedTargets


@dataclass(frozen=True)
class Prompt:
    """What an answer is asked for, as the teacher reads it."""

    ids: Sequence[int]
    """Token ids, up to and including its generation prompt."""
    seed: int
    """Of the sampling of this answer alone, so that answers do not depend on who shares a request."""
    chat: Mapping[str, Any] | None = None
    """`messages`, and `tools`, `chat_template_kwargs` and `images` where there are any: of a teacher that reads no
    token ids. None where the caller has only the ids."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is written."""

    temperature: float | None
    """None takes the most likely token each time."""
    max_new_tokens: int
    stop_ids: Sequence[int]
    """Tokens that end an answer."""
    forbidden_ids: Sequence[int] = ()
    """Tokens that no answer may have: they stand for images."""
    targets: bool = False
    """Whether the targets of the answers will be asked for next: a teacher that has them already keeps them."""


@dataclass(frozen=True)
class Written:
    """One answer."""

    ids: list[int]
    """Up to and including the stop token; without one where it was cut at `max_new_tokens`."""
    cut: bool
    """Whether it was cut."""
    refused: str | None = None
    """Why there is no usable answer (a content filter, an empty one): the row is bad. `ids` is then empty."""
    message: Mapping[str, Any] | None = None
    """The answer as a message, of a teacher that writes text. `ids` is then empty: they are those of the student's chat
    template."""


class Teacher(ABC):
    """Turns batches into targets for their supervised tokens.

    A teacher of your own implements `targets` and sets `vocab_size`; the rest has defaults.
    """

    vocab_size: int
    """Logit columns, padding included."""
    name: str | None = None
    """In `rlhf.teachers`, of one of several."""
    module: nn.Module | None = None
    """The transformers model, where there is one in this process: it is what writes answers and has features."""

    is_student: bool = False
    """Whether `module` is the student itself, after `follow`: no model of its own, but the same with other weights."""

    in_pieces: bool = False
    """Whether, after `place`, its weights lie in pieces on several devices: every forward is then a collective, and all
    ranks have to ask it equally often."""
    lookahead: int = 0
    """Optimizer windows that `prepare` is called ahead of the one that trains, where their answers are the data's."""
    waits: bool = False
    """Whether `wait`, `targets` and `write` wait for answers, and count that in `waited_s`; it is then logged."""
    waited_s: float = 0.0
    """Seconds that they have waited for answers that were not there yet, since the teacher was made."""
    aligner: Aligner | None = None
    """Of one whose targets are stored log-likelihoods of chunks (`rlhf.cross_tokenizer: alm`): what says which tokens
    of a batch make up each, the collator's `other_tokenizer`."""
    drawn_at: float | None = None
    """The `kd_temperature` that its targets were drawn at, where they are `SampledTargets`."""

    @property
    def members(self) -> Sequence[Teacher]:
        """The teachers that it is made of: itself, or those of `rlhf.teachers`."""
        return (self,)

    def asked_about(self, batch: Batch) -> list[tuple[Teacher, Batch]]:
        """Its members, each with the rows of a batch that it would be asked about; without those that have none."""
        return [(self, batch)]

    @property
    def can_generate(self) -> bool:
        """Whether it can write answers (`seq_kd`, `answers: teacher`): by its module, or by `write`."""
        return self.module is not None

    @property
    def has_targets(self) -> bool:
        """Whether it has targets; without, it only writes answers."""
        return True

    @property
    def answers_anything(self) -> bool:
        """Whether it has targets for any text, and not for rows of the data alone, found by `batch.rows.keys`."""
        return True

    @property
    def has_features(self) -> bool:
        """Whether `targets` runs a model whose features can be captured (visual KD)."""
        return self.module is not None

    def follow(self, student: nn.Module) -> None:  # noqa: B027 - not every teacher has to
        """Get to know the student as it is trained (with its adapter), before `place`; called once by the trainer.

        Where a teacher `is_student` and writes answers before training, it is called before that as well, with the
        student as it was loaded.
        """

    def place(self, accelerator: Accelerator) -> None:  # noqa: B027
        """Go where it will run; called once, when the trainer is built."""

    def writing_model(self) -> AbstractContextManager[nn.Module]:
        """`module` with the teacher's weights in it, to write answers with; what it was comes back at the end."""
        assert self.module is not None, "can_generate is asked before"
        return nullcontext(self.module)

    def begin(self) -> None:  # noqa: B027
        """Training begins: the student is wrapped, and its weights are those of the first step."""

    def stepped(self) -> None:  # noqa: B027
        """The optimizer has taken a step."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write what a resumed run needs of it into a checkpoint; called on every rank, and rank 0 writes."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Read that back, on every rank; called in place of `begin` where training resumes.

        Raises:
            CheckpointError: the checkpoint has no such state, or one that does not fit.
        """

    def prepare(self, window: Sequence[Batch]) -> None:  # noqa: B027
        """Called once for every optimizer window before its first batch, and before each batch of an evaluation.

        The time to send requests, or to read ahead: it must not wait for them. Windows come in the order in which they
        train, up to `lookahead` of them before it is their turn; one whose answers are generated comes when it is its
        turn, and so after those that were read ahead. Now and then a window is never asked for: an epoch or the run
        ends early, or a callback has its answers generated after all; it then comes again, with these.

        Args:
            window: this rank's batches, with the answers that will be trained on.
        """

    def wait(self, window: Sequence[Batch]) -> None:  # noqa: B027
        """Wait until the targets of a window are there; called before its first forward where `waits` is true.

        A teacher that fails does so here: between two steps, where all ranks can stop and the state can be saved.

        Raises:
            TeacherError: no usable answer.
        """

    @abstractmethod
    def targets(self, batch: Batch) -> AnyTargets:
        """Targets at temperature 1 for the supervised tokens of a batch.

        A teacher that looks answers up finds the rows' names in `batch.rows.ids`. One in this process finds what its
        forward takes, and the positions that predict a supervised token, in `model_inputs` and `predicts_BT` of
        `batch.as_teacher_sees_it()`.

        Raises:
            TeacherError: no usable answer.
        """

    def write(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        each: Callable[[int, Written], None] | None = None,
    ) -> list[Written]:
        """Answers to prompts, where the teacher has no module that writes them.

        Args:
            each: called with the number of a prompt and its answer once that is there, perhaps in another thread. No
                more answers are asked for meanwhile than can be lost.

        Raises:
            TeacherError: no usable answer.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot write answers")

    def close(self) -> None:  # noqa: B027
        """Let go of threads and connections; may be called twice.

        `kdtrain fit` does at the end of a run, one way or another, with a teacher that it has made. One that was handed
        over may serve another run: closing it is up to who made it. The trainer never does, since it can train again.
        """


def targets_of(teacher: Teacher, batch: Batch) -> Targets:
    """What a teacher says that is one, and not several of which each has rows of its own."""
    found = teacher.targets(batch)
    assert isinstance(found, Targets), "several teachers are asked one by one: see `Teacher.asked_about`"
    return found


def teacher_autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Autocast as for the student's forward, which accelerate wraps; not under DeepSpeed, unless it asks for it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    asked = plugin is None or plugin.deepspeed_config.get("torch_autocast", {}).get("enabled", False)
    return torch.autocast(accelerator.device.type, dtype=dtype) if dtype is not None and asked else nullcontext()
