"""An oracle: what training should give, by a plain loop in float64 that shares no code with kdtrain.

Rows go through the models one by one and unpadded; the loss is written from its definition, over one optimizer window
at a time; gradients are autograd's; clipping and optimizers are written out. Only the models are transformers'.

Shapes: T tokens of a row, S supervised ones, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Row = dict[str, Any]
"""`input_ids` and `labels` of a row; `ce` (True) and `inputs` (what else the forward takes, a batch of one)."""


@dataclass(frozen=True)
class Window:
    """Rows of one optimizer step, by micro-batch, over all ranks; with the answers that it was trained on."""

    micro_batches: Sequence[Sequence[Row]]
    student_generated: bool = False

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self.micro_batches for row in batch]


@dataclass(frozen=True)
class Loss:
    """Weights and options of the loss; see the formulas in `Oracle`."""

    kd: float = 1.0
    ce: float = 0.0
    beta: float = 0.5
    divergence: str = "jsd"
    temperature: float = 1.0
    aux: float = 0.0
    features: Callable[[nn.Module, nn.Module, Sequence[Row]], torch.Tensor] | None = None
    prefix: Sequence[int] = ()
    """What the teacher reads in front of each row."""


@dataclass(frozen=True)
class Optimizer:
    """SGD with momentum or AdamW, after clipping by the norm of all gradients together."""

    rates: Sequence[float]
    """Learning rate of every step."""
    name: str = "sgd"
    momentum: float = 0.0
    eps: float = 1e-2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class _Float64(TorchFunctionMode):
    """Models ask for float32 in their norms and routers: in here they get float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if arg is torch.float32 else arg for arg in args]
        return func(*wide, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@dataclass
class Oracle:
    """Trains a copy of `student` in float64.

    total = kd · Σ divergence / D + ce · Σ −log p(label) / D + aux · mean over micro-batches + features
    with sums over the supervised tokens of the whole window, and D their number.
    """

    student: nn.Module
    teacher: nn.Module
    loss: Loss
    optimizer: Optimizer
    extra: Sequence[nn.Parameter] = ()
    state: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Of the optimizer, by parameter."""
    taught: dict[int, torch.Tensor] = field(default_factory=dict)
    """The teacher's logits of rows, which come back in every epoch."""

    def train(self, windows: Sequence[Window]) -> None:
        """One step for every window."""
        with _Float64():
            for step, window in enumerate(windows):
                for parameter in self._trained():
                    parameter.grad = None
                self.window_loss(window).backward()
                self._step(step)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in (*self.student.parameters(), *self.extra) if p.requires_grad]

    def window_loss(self, window: Window) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        supervised = sum(len(_supervised(row)) for row in window.rows)
        for row in window.rows:
            kd, ce = self._row(row)
            own = window.student_generated or not row.get("ce", True)
            total = total + (self.loss.kd * kd + (0.0 if own else self.loss.ce) * ce) / max(supervised, 1)
        if self.loss.aux:
            terms = [_load_balancing(self.student, batch) for batch in window.micro_batches]
            total = total + self.loss.aux * torch.stack(terms).mean()
        if self.loss.features is not None:
            total = total + self.loss.features(self.student, self.teacher, window.rows)
        return total

    def _row(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the divergence and of the cross-entropy over the supervised tokens of a row."""
        positions = _supervised(row)
        student_SV = _logits(self.student, row)[positions]
        labels = torch.tensor([row["labels"][t + 1] for t in positions], dtype=torch.long)
        ce = -(student_SV.log_softmax(-1).gather(1, labels[:, None])).sum()
        if self.loss.kd == 0:
            return torch.zeros((), dtype=torch.float64), ce
        if id(row) not in self.taught:
            with torch.no_grad():
                seen = row | {"input_ids": [*self.loss.prefix, *row["input_ids"]]}
                self.taught[id(row)] = _logits(self.teacher, seen)[len(self.loss.prefix) :]
        teacher_SV = self.taught[id(row)][positions]
        shared = min(student_SV.shape[1], teacher_SV.shape[1])
        tau = self.loss.temperature
        s = (student_SV[:, :shared] / tau).log_softmax(-1)
        t = (teacher_SV[:, :shared] / tau).log_softmax(-1)
        return self._divergence(s, t).sum(), ce

    def _divergence(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        beta, name = self.loss.beta, self.loss.divergence
        if name == "mixed_kl":
            return (1 - beta) * _kl(t, s) + beta * _kl(s, t)
        if beta in (0, 1):
            return _kl(s, t) if beta else _kl(t, s)
        m = (beta * t.exp() + (1 - beta) * s.exp()).log()
        jsd = beta * _kl(t, m) + (1 - beta) * _kl(s, m)
        return jsd / (beta * (1 - beta)) if name == "jsd_scaled" else jsd

    @torch.no_grad()
    def _step(self, step: int) -> None:
        trained, options = self._trained(), self.optimizer
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        factor = min(1.0, options.max_grad_norm / (norm + 1e-6))
        rate = options.rates[step]
        for i, (p, g) in enumerate(zip(trained, gradients, strict=True)):
            g = g * factor
            first, second = self.state.setdefault(i, [torch.zeros_like(p), torch.zeros_like(p)])
            # Matrices decay; biases and norms do not.
            decay = options.weight_decay if p.dim() > 1 else 0.0
            if options.name == "sgd":
                first.mul_(options.momentum).add_(g)
                p.sub_(rate * first)
                continue
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            p.mul_(1 - rate * decay)
            p.sub_(
                rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + options.eps)
            )


def double(model: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode: nothing in a run of kdtrain may depend on dropout."""
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        if hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def _supervised(row: Row) -> list[int]:
    """Positions that predict a supervised token: t predicts t + 1."""
    return [t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100]


def _logits(model: nn.Module, row: Row, **kwargs: Any) -> torch.Tensor:
    """[T, V]."""
    inputs = {
        key: value.double() if value.is_floating_point() else value for key, value in row.get("inputs", {}).items()
    }
    logits = model(input_ids=torch.tensor([row["input_ids"]]), **inputs, **kwargs, use_cache=False).logits
    assert logits.dtype == torch.float64
    return logits[0]


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) per token, from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _load_balancing(model: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Switch Transformer's loss over the real tokens of a micro-batch, all layers as one: E · Σ_k Σ_e f_ke · P_e."""
    seen: list[torch.Tensor] = []
    config: Any = model.config
    gates = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    hooks = [
        g.register_forward_hook(lambda m, args, _: seen.append(args[0].reshape(-1, args[0].shape[-1]) @ m.weight.T))
        for g in gates
    ]
    for row in rows:
        _logits(model, row)
    for hook in hooks:
        hook.remove()
    probabilities = torch.cat(seen).softmax(-1)
    chosen = probabilities.topk(config.num_experts_per_tok, dim=-1).indices
    total = torch.zeros((), dtype=torch.float64)
    for k in range(chosen.shape[1]):
        shares = torch.nn.functional.one_hot(chosen[:, k], config.num_experts).double().mean(0)
        total = total + (shares * probabilities.mean(0)).sum()
    return config.num_experts * total
