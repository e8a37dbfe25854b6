"""A teacher behind a server: vLLM, or any that speaks OpenAI's API and gives log-probabilities of given tokens.

Shapes: B rows, T positions, S supervised tokens, K known tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kdtrain.data.batch import Batch
from kdtrain.errors import PreflightError, TeacherError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.ranks import rank, world_size
from kdtrain.teachers.base import Prompt, Sampling, Targets, Teacher, Written
from kdtrain.teachers.served.chat_writing import write_chat
from kdtrain.teachers.served.http import Servers
from kdtrain.teachers.served.images import ImageRow, score_images, with_images
from kdtrain.teachers.served.replies import Route, Scored, read_scores, scoring_payload
from kdtrain.teachers.served.writing import Budget, Each, answers, read_answer_scores, write_completion

Row = Scored | ImageRow


class ServedTeacher(Teacher):
    """Top-k targets from `POST /completions`, and of rows with images from `POST /chat/completions`.

    Args:
        servers: where the model runs.
        model: its name there.
        vocab_size: ids that the student can be taught; a reply with others is refused.
        top_k: K.
        route: how tokens are scored; None until the probe has found out.
        lookahead: see `Teacher.lookahead`.
        api: how answers are written, see `rlhf.teacher.api`; the probe decides where it is `auto`.
        max_requests: requests for answers that may be sent; None is no limit.
        actual_alone: whether targets are the log-probabilities of the tokens that were sent, and of no others: all that
            counts where the student has another tokenizer.
    """

    waits = True

    def __init__(
        self,
        servers: Servers,
        *,
        model: str,
        vocab_size: int,
        top_k: int,
        route: Route | None = None,
        lookahead: int = 2,
        api: str = "auto",
        max_requests: int | None = None,
        actual_alone: bool = False,
    ) -> None:
        self.actual_alone = actual_alone
        self.servers, self.model, self.route = servers, model, route
        self.vocab_size, self.top_k, self.lookahead = vocab_size, top_k, lookahead
        self.writes_targets = False
        """Whether the log-probabilities of an answer that the server writes are its targets; the probe decides."""
        self.api = api
        share = None if max_requests is None else max_requests // world_size() + (rank() < max_requests % world_size())
        self.budget = Budget(share)
        self._windows: deque[_Window] = deque()
        self._written: dict[Scored, _Score] = {}

    def prepare(self, window: Sequence[Batch]) -> None:
        """Send the requests for a window's rows, each once; none for rows that are on their way already.

        Raises:
            PreflightError: batches that a server cannot be asked about.
        """
        batches = [rows_to_score(batch) for batch in window]
        wanted = list(dict.fromkeys(row for rows in batches for row in rows if row is not None))
        scores = {row: found for row in wanted if (found := self._sent(row)) is not None}
        scores |= self._send([row for row in wanted if row not in scores])
        if batches:
            self._windows.append(_Window(batches, scores))
        # The one that trains, those ahead of it, and a batch of an evaluation: more are never asked for again.
        while len(self._windows) > self.lookahead + 2:
            self._windows.popleft()

    def targets(self, batch: Batch) -> Targets:
        """The k most likely tokens at each supervised position; waits for those that are not there yet.

        Raises:
            TeacherError: no usable reply.
            PreflightError: as `prepare`.
        """
        rows = rows_to_score(batch)
        window = self._window_of(batch, rows)
        found = [self._wait(window.scores[row]) for row in rows if row is not None]
        window.unanswered.remove(rows)
        if not window.unanswered:
            self._windows.remove(window)
        return Targets(_joined(found, 1 if self.actual_alone else self._columns).to(batch.labels.device))

    def wait(self, window: Sequence[Batch]) -> None:
        """See `Teacher.wait`."""
        for batch in window:
            rows = rows_to_score(batch)
            scores = self._window_of(batch, rows).scores
            for row in rows:
                if row is not None:
                    self._wait(scores[row])

    def _window_of(self, batch: Batch, rows: tuple[Row | None, ...]) -> _Window:
        """The newest: an evaluation may come upon rows of windows that are prepared ahead, which stay as they are."""
        if not any(rows in window.unanswered for window in self._windows):
            self.prepare([batch])
        return next(window for window in reversed(self._windows) if rows in window.unanswered)

    @property
    def can_generate(self) -> bool:
        """See `Teacher.can_generate`."""
        return True

    @property
    def has_targets(self) -> bool:
        """See `Teacher.has_targets`: text has none."""
        return self.api != "chat"

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, each: Each | None = None) -> list[Written]:
        """Answers through the same server, as many asked for at a time as it may be asked.

        Where the server gives the targets of what it writes, they are kept until answers are written again.
        """
        self._written = {}
        with_targets = sampling.targets and self.writes_targets
        slots = self.servers.concurrency * len(self.servers.urls)
        ask = partial(self._ask_chat, sampling) if self.api == "chat" else partial(self._ask, sampling, with_targets)
        begun = time.perf_counter()
        try:
            return self.servers.run(answers(prompts, ask, slots, each))
        finally:
            self.waited_s += time.perf_counter() - begun

    async def _ask_chat(self, sampling: Sampling, prompt: Prompt) -> Written:
        return await write_chat(self.servers, self.model, prompt, sampling, self.budget)

    async def _ask(self, sampling: Sampling, with_targets: bool, prompt: Prompt) -> Written:
        top_k = min(self.top_k, self.vocab_size)

        def keep(reply: Any, ids: list[int]) -> None:
            if with_targets and ids:
                found = read_answer_scores(reply, prompt.ids, ids, top_k, self.vocab_size)
                start, row = len(prompt.ids), (*prompt.ids, *ids)
                future: Future[list[TopKLogprobs]] = Future()
                future.set_result([found])
                self._written[Scored(row, tuple(range(start, len(row))))] = _Score(future, 0)

        return await write_completion(
            self.servers,
            self.model,
            prompt,
            sampling,
            vocab_size=self.vocab_size,
            logprobs=top_k if with_targets else 0,
            keep=keep,
            budget=self.budget,
        )

    def close(self) -> None:
        """See `Teacher.close`."""
        self._windows.clear()
        self._written = {}
        self.servers.close()

    @property
    def _columns(self) -> int:
        return min(self.top_k, self.vocab_size)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _sent(self, row: Row) -> _Score | None:
        """The request that asks for a row, of any window that is still wanted, or that has written it."""
        if row in self._written:
            return self._written[row]
        return next((window.scores[row] for window in self._windows if row in window.scores), None)

    def _send(self, rows: Sequence[Row]) -> dict[Row, _Score]:
        """Ask for rows in as many requests as may be in flight; several rows share one only where there are more."""
        in_flight = self.servers.concurrency * len(self.servers.urls)
        of_text = [row for row in rows if isinstance(row, Scored)]
        size = max(1, -(-len(of_text) // in_flight))
        scores: dict[Row, _Score] = {
            row: _Score(self.servers.start(self._score_images(row)), 0) for row in rows if isinstance(row, ImageRow)
        }
        for start in range(0, len(of_text), size):
            shared = of_text[start : start + size]
            reply = self._request(shared)
            scores |= {row: _Score(reply, place) for place, row in enumerate(shared)}
        return scores

    def _request(self, rows: Sequence[Scored]) -> Future[list[TopKLogprobs]]:
        if self.route is None:
            raise PreflightError("It is not known how this server scores tokens: probe it first, or give a route.")
        alone, route, vocab_size = self.actual_alone, self.route, self.vocab_size
        top_k = 1 if alone else self._columns
        payload = scoring_payload(route, self.model, rows, top_k)
        read = lambda reply: read_scores(route, reply, rows, top_k, vocab_size, actual_alone=alone)  # noqa: E731
        return self.servers.start(self.servers.post("/completions", payload, read))

    async def _score_images(self, row: ImageRow) -> list[TopKLogprobs]:
        top_k = min(self.top_k, self.vocab_size)
        return [await score_images(self.servers, self.model, row, top_k=top_k, vocab_size=self.vocab_size)]

    def _wait(self, score: _Score) -> TopKLogprobs:
        begun = time.perf_counter()
        try:
            return score.reply.result()[score.place]
        except CancelledError:
            raise TeacherError("The teacher was closed before it had answered.") from None
        finally:
            self.waited_s += time.perf_counter() - begun


@dataclass(frozen=True)
class _Score:
    """Where the targets of a row will be."""

    reply: Future[list[TopKLogprobs]]
    place: int


@dataclass(frozen=True)
class _Window:
    """What `prepare` was called for."""

    unanswered: list[tuple[Row | None, ...]]
    """The rows of each batch that `targets` was not called for yet."""
    scores: dict[Row, _Score]
    """By what was asked, so that no answer can belong to another row."""


# ---- batches ---------------------------------------------------------------------------------------------------------


def rows_to_score(batch: Batch) -> tuple[Row | None, ...]:
    """The rows as the teacher reads them, without padding and what stands behind the last supervised token.

    None for a row without supervised tokens.

    Raises:
        PreflightError: the batch holds what cannot be sent as tokens.
    """
    seen = batch.as_teacher_sees_it()
    _check_only_tokens(seen)
    ids_BT = seen.model_inputs["input_ids"]
    mask_BT = seen.model_inputs.get("attention_mask")
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    if mask_BT.shape != ids_BT.shape:
        raise PreflightError("A served teacher needs an attention_mask [B, T] that says which tokens are padding.")
    rows = zip(ids_BT.tolist(), mask_BT.bool().tolist(), seen.predicts_BT.tolist(), strict=True)
    scored = tuple(_row_to_score(*row) for row in rows)
    return with_images(seen, scored) if seen.has_images else scored


def _check_only_tokens(batch: Batch) -> None:
    if unknown := batch.unknown_inputs:
        raise PreflightError(
            f"Batches carry {', '.join(unknown)}, which cannot be sent to a served teacher: it would read other rows "
            "than the student. Use a collator without them, or rlhf.teacher.backend: hf."
        )


def _row_to_score(ids: list[int], mask: list[bool], predicts: list[bool]) -> Scored | None:
    supervised = [i + 1 for i, predicted in enumerate(predicts) if predicted]
    if not supervised:
        return None
    start, end = mask.index(True), supervised[-1] + 1  # padding may stand on either side
    if not all(mask[start:end]) or supervised[0] <= start:
        raise PreflightError(
            "The attention_mask hides tokens within a row, or the one before a supervised token. A served teacher "
            "would read them: leave them out of the row."
        )
    return Scored(tuple(ids[start:end]), tuple(t - start for t in supervised))


def _joined(parts: Sequence[TopKLogprobs], columns: int) -> TopKLogprobs:
    """The targets of some rows as those of their batch, [S, K]."""
    if not parts:
        return TopKLogprobs(torch.zeros(0, columns, dtype=torch.int64), torch.zeros(0, columns))
    return TopKLogprobs(torch.cat([part.indices for part in parts]), torch.cat([part.logprobs for part in parts]))
