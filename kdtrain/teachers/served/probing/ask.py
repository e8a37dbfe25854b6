"""How a probe asks, and keeps what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kdtrain.config.diagnose import Level, clean
from kdtrain.config.tree import Problem
from kdtrain.errors import TeacherError
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.served.http import StatusError
from kdtrain.teachers.served.replies import Route, Scored, read_scores, scoring_payload
from kdtrain.teachers.served.teacher import ServedTeacher

T = TypeVar("T")

# Answers to the same question differ by rounding: 1e-6 in float32, up to some hundredths in bfloat16, where it depends
# on what else is in the batch. Another model, or another row, is apart by tenths at least.
_SAME, _TIMES_NOISE, _NEVER_SAME = 0.05, 5.0, 0.3


class ProbeOver(Exception):
    """Nothing further can be asked."""


@dataclass
class Asker:
    """A server, and what is known of it so far."""

    teacher: ServedTeacher
    rows: list[Scored]
    """Up to three different ones, with all tokens but the first as asked for."""
    tokenizer: Any
    top_k: int
    route: Route | None = None
    noise: float = 0.0
    """Nats by which the same question's answers differ."""
    findings: list[Problem] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The server that is asked where nothing else is said."""
        return self.teacher.servers.urls[0]

    @property
    def tolerance(self) -> float:
        """Nats by which answers may differ and be the same."""
        return min(max(_SAME, _TIMES_NOISE * self.noise), _NEVER_SAME)

    def post(self, path: str, payload: Mapping[str, Any], read: Callable[[Any], T], server: str | None = None) -> T:
        """See `Servers.post`."""
        servers = self.teacher.servers
        return servers.run(servers.post(path, payload, read, server=server or self.url, verified=False))

    def score(self, rows: Sequence[Scored], server: str | None = None, **extra: Any) -> list[TopKLogprobs]:
        """Targets of some rows, in one request."""
        route, top_k, vocab_size = self.route, self.top_k, self.teacher.vocab_size
        assert route is not None
        payload = {**scoring_payload(route, self.teacher.model, rows, top_k), **extra}
        return self.post(
            "/completions", payload, lambda reply: read_scores(route, reply, rows, top_k, vocab_size), server
        )

    def say(self, level: Level, option: str, message: str, hint: str = "") -> None:
        """Keep a finding about `rlhf.teacher.<option>`."""
        self.findings.append(Problem(("rlhf", "teacher", option), clean(message), hint, level))


def is_not_there(error: TeacherError) -> bool:
    """Whether the server does not have what was asked for."""
    return isinstance(error, StatusError) and error.status in (404, 405, 501)
