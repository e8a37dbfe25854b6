"""A teacher behind a server: vLLM, or any that speaks OpenAI's API and gives log-probabilities of given tokens.

Shapes: S supervised tokens, K known tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdtrain.data.batch import Batch
from kdtrain.ranks import rank, world_size
from kdtrain.teachers.base import Prompt, Sampling, Targets, Teacher, Written
from kdtrain.teachers.chat_writing import write_chat
from kdtrain.teachers.http import Servers
from kdtrain.teachers.replies import Route
from kdtrain.teachers.served_writing import Budget, Each, answers, write_completion


class ServedTeacher(Teacher):
    """Top-k targets from `POST /completions`.

    Args:
        servers: where the model runs.
        model: its name there.
        vocab_size: ids that the student can be taught; a reply with others is refused.
        top_k: K.
        route: how tokens are scored; None until the probe has found out.
        lookahead: see `Teacher.lookahead`.
        api: how answers are written, see `rlhf.teacher.api`; the probe decides where it is `auto`.
        max_requests: requests for answers that may be sent; None is no limit.
    """

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
    ) -> None:
        self.servers, self.model, self.route = servers, model, route
        self.vocab_size, self.top_k, self.lookahead = vocab_size, top_k, lookahead
        self.writes_targets = False
        """Whether the log-probabilities of an answer that the server writes are its targets; the probe decides."""
        self.api = api
        share = None if max_requests is None else max_requests // world_size() + (rank() < max_requests % world_size())
        self.budget = Budget(share)

    def prepare(self, window: Sequence[Batch]) -> None:
        """Send the requests for a window's rows, each once."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> Targets:
        """The k most likely tokens at each supervised position."""
        raise NotImplementedError

    @property
    def can_generate(self) -> bool:
        """See `Teacher.can_generate`."""
        return True

    @property
    def has_targets(self) -> bool:
        """See `Teacher.has_targets`: text has none."""
        return self.api != "chat"

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, each: Each | None = None) -> list[Written]:
        """Answers through the same server, as many asked for at a time as it may be asked."""

        async def ask(prompt: Prompt) -> Written:
            server, before = (self.servers, self.model), self.budget.take
            if self.api == "chat":
                return await write_chat(*server, prompt, sampling, before)
            return await write_completion(*server, prompt, sampling, vocab_size=self.vocab_size, before=before)

        slots = self.servers.concurrency * len(self.servers.urls)
        return self.servers.run(answers(prompts, ask, slots, each))

    def close(self) -> None:
        """See `Teacher.close`."""
        self.servers.close()
