"""A teacher behind a server: vLLM, or any that speaks OpenAI's API and gives log-probabilities of given tokens.

Shapes: S supervised tokens, K known tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdtrain.data.batch import Batch
from kdtrain.teachers.base import Prompt, Sampling, Targets, Teacher, Written
from kdtrain.teachers.http import Servers
from kdtrain.teachers.replies import Route


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
    ) -> None:
        self.servers, self.model, self.route = servers, model, route
        self.vocab_size, self.top_k, self.lookahead = vocab_size, top_k, lookahead
        self.writes_targets = False
        """Whether the log-probabilities of an answer that the server writes are its targets; the probe decides."""
        self.api, self.max_requests = api, max_requests

    def prepare(self, window: Sequence[Batch]) -> None:
        """Send the requests for a window's rows, each once."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> Targets:
        """The k most likely tokens at each supervised position."""
        raise NotImplementedError

    def write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Written]:
        """Answers through the same server."""
        raise NotImplementedError

    def close(self) -> None:
        """See `Teacher.close`."""
        self.servers.close()
