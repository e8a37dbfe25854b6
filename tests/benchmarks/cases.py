"""What is computed in a measurement: sizes, inputs, one forward and backward, and what they should give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.benchmarks.peers import IGNORE_INDEX, Peer

GIB = 2**30
MIB = 2**20
MEMORY_LIMIT = 13 * GIB
"""What a process of the benchmark may use: a dense peer that needs more fails instead of taking the machine down."""


@dataclass(frozen=True)
class LossCase:
    """One call of the loss: CE + KD over `tokens` rows, every second one supervised."""

    tokens: int = 1024
    vocab: int = 32768
    beta: float = 0.5
    dtype: str = "float32"
    head_trains: bool = True
    student_hidden: int = 512
    teacher_hidden: int = 1024
    kd_weight: float = 1.0
    ce_weight: float = 0.5

    def __str__(self) -> str:
        head = "head trains" if self.head_trains else "head frozen"
        return f"N {self.tokens}, V {self.vocab}, β {self.beta:g}, {self.dtype}, {head}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Inputs:
    """Leaves with gradients on the student's side; the teacher has none."""

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    labels: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor

    def forget_gradients(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None


def make_inputs(case: LossCase, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random hidden states and heads whose logits have a standard deviation of 2, as a trained model's roughly do."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device) * scale
        return values.to(case.torch_dtype)

    labels = torch.randint(0, case.vocab, (case.tokens,), generator=generator, device=device)
    labels[::2] = IGNORE_INDEX
    return Inputs(
        student_hidden=normal(case.tokens, case.student_hidden, 1.0).requires_grad_(),
        student_weight=normal(case.vocab, case.student_hidden, 2.0 * case.student_hidden**-0.5).requires_grad_(
            case.head_trains
        ),
        labels=labels,
        teacher_hidden=normal(case.tokens, case.teacher_hidden, 1.0),
        teacher_weight=normal(case.vocab, case.teacher_hidden, 2.0 * case.teacher_hidden**-0.5),
    )


def forward_backward(peer: Peer, case: LossCase, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A call that leaves the gradients in `inputs` and returns the detached loss."""

    def call() -> torch.Tensor:
        loss = peer.loss(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.labels,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            case.beta,
            case.kd_weight,
            case.ce_weight,
        )
        loss.backward()
        return loss.detach()

    return call


@dataclass
class Expected:
    """Value and gradients in float64, of the inputs as they were rounded to their dtype."""

    loss: float
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor


def expected(case: LossCase, inputs: Inputs, block: int = 64) -> Expected:
    """The formulas of the loss in float64 with autograd, a block of tokens at a time; shares no code with kdtrain."""
    rows = (inputs.labels != IGNORE_INDEX).nonzero().squeeze(1)
    weight = inputs.student_weight.detach().double().requires_grad_()
    hidden = inputs.student_hidden.detach().double().requires_grad_()
    teacher_weight = inputs.teacher_weight.double()
    total = 0.0
    for some in rows.split(block):
        log_s = torch.log_softmax(hidden[some] @ weight.t(), -1)
        log_t = torch.log_softmax(inputs.teacher_hidden[some].double() @ teacher_weight.t(), -1)
        loss = case.kd_weight * _divergence(log_s, log_t, case.beta).sum()
        loss = loss - case.ce_weight * log_s.gather(1, inputs.labels[some, None]).sum()
        loss = loss / len(rows)
        loss.backward()
        total += loss.item()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Expected(total, hidden.grad, weight.grad)


def _divergence(log_s: torch.Tensor, log_t: torch.Tensor, beta: float) -> torch.Tensor:
    s, t = log_s.exp(), log_t.exp()
    if beta == 0:
        return t * (log_t - log_s)
    if beta == 1:
        return s * (log_s - log_t)
    log_m = (beta * t + (1 - beta) * s).log()
    return beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)


def errors(inputs: Inputs, loss: torch.Tensor, exact: Expected) -> dict[str, float]:
    """Relative errors of the value and, by norm, of the gradients that `inputs` hold."""
    found = {"loss": abs(loss.item() - exact.loss) / abs(exact.loss)}
    for name, grad, want in (
        ("grad_hidden", inputs.student_hidden.grad, exact.grad_hidden),
        ("grad_weight", inputs.student_weight.grad, exact.grad_weight),
    ):
        if grad is not None:
            found[name] = ((grad.double() - want).norm() / want.norm()).item()
    return found


def estimated_bytes(peer: Peer, case: LossCase) -> float:
    """What a dense peer will need: its logits, whatever their dtype, since the cross-entropy is in float32."""
    return peer.full_logits * case.tokens * case.vocab * 4
