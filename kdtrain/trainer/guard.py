"""Losses, gradients and weights that are not finite: they stop the run before they do harm.

What was found stands in the error (`NonFiniteError.facts`): the step, the terms, the ranks and the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from kdtrain.data.batch import Batch
from kdtrain.errors import NonFiniteError, NonFiniteTargetsError, TargetsError
from kdtrain.host import send
from kdtrain.trainer.deepspeed import guard_steps, not_a_norm
from kdtrain.trainer.objective import Terms

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

_SHOWN = 8
"""Rows of a message; `NonFiniteError.facts` has all of them."""
IN_FLOAT32 = {"teacher": "rlhf.teacher_model_init_kwargs: {dtype: float32}", "student": "model.dtype: float32"}
_ADVICE = {
    "student": "Lower training.learning_rate, train in float32, or look at these rows",
    "teacher": f"Load the teacher in float32 ({IN_FLOAT32['teacher']}), or look at its weights",
    "stored": "Compare what is stored with the teacher (kdtrain cache --verify), or write it anew",
    "given": "Look at what gives these targets",
}


@dataclass(frozen=True)
class _Measured:
    """A micro-batch, and what was made of it; tensors are looked at only when the ranks have agreed to."""

    rows: tuple[str, ...]
    terms: Mapping[str, torch.Tensor]
    entropies: Mapping[str, torch.Tensor]
    """Of the predictions of "student" and "teacher", where there are any: it is not finite where these are not."""


class NonFiniteGuard:
    """Checks what a trainer has recorded and trained; its errors are `NonFiniteError`s that say what and where."""

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self._engine: nn.Module | None = None
        self._measured: list[_Measured] = []
        self.flags: dict[str, Callable[[], torch.Tensor | float]] = {}
        """What else the ranks agree on at every check, by name: finite numbers, of which `agreed` has the largest. They
        are reduced and read together with it, so that the host waits for the device once a step."""
        self.agreed: dict[str, float] = {}

    def watch_steps(self, engine: nn.Module) -> None:
        """Check each optimizer step of DeepSpeed's where it takes them, within backward; from now on."""
        if engine is not self._engine:
            guard_steps(engine, self._trainer.accelerator, self._error)
            self._engine = engine

    def begin(self) -> None:
        """A window begins, or a batch of an evaluation."""
        self._measured.clear()

    def note(self, batch: Batch, terms: Terms) -> None:
        """Remember the numbers of a micro-batch; nothing waits for the device."""
        entropies = {"student": terms.tokens.student_entropy_sum, "teacher": terms.tokens.teacher_entropy_sum}
        self._measured.append(
            _Measured(
                _names(batch),
                terms.named,
                {name: value for name, value in entropies.items() if value is not None},
            )
        )

    def check_losses(self, norm: Any = None, *, bad_norm: torch.Tensor | bool = False) -> None:
        """Raise where a term of this window is not finite on any rank; a collective.

        An infinite loss can have a finite gradient, so that the norm of the gradient does not show it.
        """
        if self._is_bad_anywhere(bad_norm):
            raise self._error(norm)

    def check_step(self, engine: Any, norm: Any) -> None:
        """Raise before an optimizer step whose gradient or loss is not finite."""
        trainer = self._trainer
        # A gradient scaler skips steps whose fp16 gradients overflowed, and lowers its scale: that is its job.
        scaled = engine.fp16_enabled() if trainer.is_deepspeed_enabled else trainer.accelerator.scaler is not None
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.check_losses(norm, bad_norm=False if norm is None or scaled else not_a_norm(norm))

    def check_evaluation(self) -> None:
        """Raise where a term of the newest batch of an evaluation is not finite on any rank; a collective."""
        if self._is_bad_anywhere(False):
            raise self._error(None, "evaluation")

    def _is_bad_anywhere(self, bad_norm: torch.Tensor | bool) -> bool:
        """Whether this rank or another one has found something, and what all `agreed` on."""
        device = self._trainer.accelerator.device
        values = [send(value, device).float() for one in self._measured for value in one.terms.values()]
        found = [_as_number(bad_norm, device), *(_as_number(flag(), device) for flag in self.flags.values())]
        if values:
            found[0] = torch.maximum(found[0], (~torch.isfinite(torch.stack(values))).any().float())
        bad, *agreed = self._trainer.accelerator.gather(torch.stack(found)[None]).amax(0).tolist()
        self.agreed = dict(zip(self.flags, agreed, strict=True))
        return bool(bad)

    def check_weights(self, together: bool) -> None:
        """Raise where a trained weight is not finite, which else only the next step would show. Reads each once.

        Args:
            together: ask all ranks; a collective.
        """
        trainer = self._trainer
        bad = self._bad_weights("student")
        ranks = [trainer.accelerator.process_index]
        if together:
            found = gather_object([bad])
            ranks = [rank for rank, names in enumerate(found) if names]
            bad = bad or next((found[rank] for rank in ranks), [])
        if bad:
            raise self._of_weights(ranks, bad)

    def _of_weights(self, ranks: Sequence[int], bad: Sequence[str]) -> NonFiniteError:
        trainer = self._trainer
        return NonFiniteError(
            f"Not finite after step {trainer.state.global_step}{_on(ranks)}: trained weights, the first "
            f"{', '.join(bad[:3])}. They were not saved. Lower training.learning_rate.",
            _facts(trainer, "weights", [{"rank": rank} for rank in ranks], weights=list(bad[:_SHOWN])),
        )

    def _bad_weights(self, side: str) -> list[str]:
        """Names of the weights of the student that it trains, or of all of the teacher's, that are not finite here."""
        trainer = self._trainer
        if side == "student":
            weights = {name: local_part(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
            for term in (one for one in trainer.feature_terms if not one.in_model):
                named = term.projectors.named_parameters()
                weights |= {f"{term.section} projector {name}": p for name, p in named}
        else:
            weights = {}
            for teacher in () if trainer.teacher is None else trainer.teacher.members:
                if teacher.module is not None and not teacher.is_student:
                    prefix = "" if teacher.name is None else f"{teacher.name}: "
                    weights |= {f"{prefix}{name}": local_part(p) for name, p in teacher.module.named_parameters()}
            weights = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
        if not weights:
            return []
        device = trainer.accelerator.device
        good = torch.stack([torch.isfinite(weight).all().to(device) for weight in weights.values()]).tolist()
        return [name for name, is_good in zip(weights, good, strict=True) if not is_good]

    # ---- what is said of it ------------------------------------------------------------------------------------------

    def _error(self, norm: Any, during: str = "training") -> NonFiniteError:
        """What was found on all ranks, the same on each; a collective."""
        trainer = self._trainer
        ranks = gather_object([self._found()])
        if broken := [found for found in ranks if found["weights"]]:  # by the step before: no row has a part in it
            return self._of_weights([found["rank"] for found in broken], broken[0]["weights"])
        bad = [found for found in ranks if found["micro_batches"]] or ranks
        terms = _union(found["terms"] for found in bad)
        origin = _union(found["origin"] for found in bad)
        numbers, step = [found["rank"] for found in bad], trainer.state.global_step
        where = f"at step {step + 1}" if during == "training" else f"in the evaluation after step {step}"
        told = "" if norm is None else f" (gradient norm {float(norm):g})"
        cause = "all terms of the loss are finite, the gradient is not"
        if terms:
            batch = f"in the batch of {_named(_rows_of(bad))}{self._because(origin)}"
            cause = f"the loss term {', '.join(terms)} is not finite {batch}"
        after = " The optimizer step was not taken." if during == "training" else ""
        advice = ". ".join(_ADVICE[self._advised(side)] for side in origin or ["student"])
        facts = _facts(trainer, during, bad, gradient_norm=None if norm is None else float(norm), origin=origin)
        return NonFiniteError(f"Not finite {where}{_on(numbers)}{told}: {cause}.{after} {advice}.", facts)

    def _found(self) -> dict[str, Any]:
        """What this rank has found."""
        micro_batches, origin, terms = [], [], []
        for one in self._measured:
            values = {name: float(value) for name, value in one.terms.items()}
            bad = [name for name, value in one.terms.items() if not bool(torch.isfinite(value))]
            if bad:
                micro_batches.append({"rows": list(one.rows), "terms": values})
                terms += bad
                # The teacher first: a student that it has broken is not what to look at.
                sides = [side for side in ("teacher", "student") if side in one.entropies]
                origin += [side for side in sides if not bool(torch.isfinite(one.entropies[side]))]
        if terms and not origin:  # features, which have no entropy
            origin = [side for side in ("teacher", "student") if self._bad_weights(side)]
        return {
            "rank": self._trainer.accelerator.process_index,
            "terms": list(dict.fromkeys(terms)),
            "origin": list(dict.fromkeys(origin)),
            "micro_batches": micro_batches,
            # Those that a run begins with are what the rows show: its model, or what the user has made of it.
            "weights": self._bad_weights("student") if terms and self._trainer.state.global_step else [],
        }

    def _because(self, origin: Sequence[str]) -> str:
        said = {"student": "the student's predictions", "teacher": "the teacher's targets"}
        return f"; {' and '.join(said[side] for side in origin)} are not finite" if origin else ""

    def _advised(self, side: str) -> str:
        """The key of the advice: a teacher that is not in this process has no dtype to be loaded in."""
        teacher = self._trainer.teacher
        if side == "student" or teacher is None or all(one.is_student for one in teacher.members):
            return "student"
        if any(one.module is not None for one in teacher.members):
            return "teacher"
        return "given" if teacher.answers_anything else "stored"


def nonfinite_while_writing(
    trainer: GKDTrainerWithMetrics, side: Literal["student", "teacher"], ranks: Sequence[Mapping[str, Any]], what: str
) -> NonFiniteError:
    """The error of a model whose logits are not finite while it writes the answers of the next step.

    Args:
        ranks: of the bad ones, `rank` and `rows`.
        what: is not finite, on the first of them.
    """
    advice = {"student": "Lower training.learning_rate, or train in float32", "teacher": _ADVICE["teacher"]}[side]
    step = trainer.state.global_step + 1
    return NonFiniteError(
        f"Not finite at step {step}{_on([found['rank'] for found in ranks])}, while the {side} wrote answers: {what}. "
        f"Nothing was trained on them. {advice}.",
        _facts(trainer, "generation", ranks, origin=[side]),
    )


def nonfinite_scores(trainer: GKDTrainerWithMetrics, ranks: Sequence[Mapping[str, Any]], what: str) -> NonFiniteError:
    """The error of a teacher whose log-probabilities of samples are no numbers; `ranks` as above."""
    rows = _union(found["rows"] for found in ranks)
    return NonFiniteError(
        f"Not finite at step {trainer.state.global_step + 1}{_on([found['rank'] for found in ranks])}: the teacher's "
        f"log-probabilities of {what}, {_named(rows)}, are no numbers. {_ADVICE['teacher']}.",
        _facts(trainer, "selection", ranks, origin=["teacher"]),
    )


@contextmanager
def targets_named(trainer: GKDTrainerWithMetrics, batch: Batch) -> Iterator[None]:
    """Say of targets of a teacher that cannot be used of which rows they are, and of which class the teacher is.

    Of a teacher in this process the loss shows it; those of others are looked at when they come.
    """
    try:
        yield
    except TargetsError as error:
        raise TargetsError(f"{error} They are of {_named(_names(batch))}{_of_class(trainer)}.") from error
    except NonFiniteTargetsError as error:
        rank = trainer.accelerator.process_index
        where = f"step {trainer.state.global_step + 1}" if trainer.model.training else "an evaluation"
        raise NonFiniteTargetsError(
            f"Not finite at {where}{_on([rank])}. {error} They are of {_named(_names(batch))}{_of_class(trainer)}. "
            f"{_ADVICE['given']}.",
            _facts(
                trainer,
                "training" if trainer.model.training else "evaluation",
                [{"rank": rank, "rows": list(_names(batch))}],
                origin=["teacher"],
            ),
        ) from error


def _of_class(trainer: GKDTrainerWithMetrics) -> str:
    return "" if trainer.teacher is None else f", given by {type(trainer.teacher).__name__}"


def _names(batch: Batch) -> tuple[str, ...]:
    return tuple(batch.rows.name(row) for row in range(len(batch)))


def _facts(
    trainer: GKDTrainerWithMetrics, during: str, ranks: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """What `nonfinite.json` holds; numbers, names and ids, no text of the data."""
    taken = trainer.state.global_step
    step = taken if during in ("evaluation", "weights") else taken + 1
    return {"step": step, "during": during, **more, "ranks": [dict(found) for found in ranks]}


def _on(ranks: Sequence[int]) -> str:
    return f", {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _rows_of(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    return _union(one["rows"] for found in ranks for one in found["micro_batches"])


def _named(rows: Sequence[str]) -> str:
    return f"{'row' if len(rows) == 1 else 'rows'} {', '.join(rows[:_SHOWN])}{', …' if len(rows) > _SHOWN else ''}"


def _union(several: Any) -> list[str]:
    return list(dict.fromkeys(name for names in several for name in names))


def _as_number(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A float32 scalar on a device, without waiting for it."""
    if isinstance(value, torch.Tensor):
        return send(value.detach(), device).float().reshape(())
    return torch.full((), float(value), device=device)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that FSDP or ZeRO-3 keeps in pieces; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
