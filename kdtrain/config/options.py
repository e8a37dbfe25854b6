"""The options of loss and sampling: their names, bounds and defaults, and the one object that the trainer reads.

`schema` builds the sections of the file from these models. On their way into the trainer the options are attributes of
a GKDConfig; its constructor reads them from there, and from then on they live in `DistillationOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from kdtrain.config.diagnose import dotted
from kdtrain.config.section import Count, Flag, NonNegative, Number, Positive, Section, Share, Text, wrong
from kdtrain.errors import ConfigError
from kdtrain.losses.kinds import VISUAL_TARGETS, Distance, Divergence, Match, Tail

if TYPE_CHECKING:
    from trl.experimental.gkd import GKDConfig

DEFAULT_TAIL: Tail = "bucket"
# The figures are those of `make bench` (tests/benchmarks/results.md), and a test holds them to it.
RENORMALIZED = (
    "turns the gradient away from that of the full distributions by 28 degrees at beta 0.5, and bucket by 18; near "
    "convergence by 19 and 10 (make bench: top 20 of 32,768 random tokens whose probabilities fall as 1/rank)"
)


class LossAndSampling(Section):
    """What `rlhf` says of the loss and of the answers that are sampled."""

    llm_kd_weight: NonNegative = 1.0
    """Weight of the divergence from the teacher's token distribution. 0 trains on cross-entropy alone."""
    sft_alpha: NonNegative = 0.0
    """Weight of the cross-entropy beside the divergence. Ignored (1.0) when llm_kd_weight is 0."""
    beta: Share = 0.5
    """Interpolation between forward KL (0) and reverse KL (1)."""
    divergence: Divergence = "jsd"
    """`jsd`: generalised Jensen-Shannon; `jsd_scaled`: divided by beta(1-beta), so that it does not vanish near the
    ends; `mixed_kl`: (1-beta) forward + beta reverse KL."""
    kd_temperature: Positive = 1.0
    """Softens both distributions in the loss."""
    lmbda: Share = 0.5
    """Share of batches whose completions the student generates itself."""
    seq_kd: Flag = False
    """Where the student does not generate, the teacher does instead of the data."""
    temperature: Annotated[Number, Field(gt=0, le=1)] = 0.9
    """Sampling temperature of those generations."""
    max_new_tokens: Count = 128
    """Longest generation in tokens."""
    disable_dropout: Flag = True
    """Switch dropout of the student off."""
    eval_kd: Flag = True
    """Whether evaluation runs the teacher too; false reports cross-entropy only, as `eval_sft_loss` with
    weight 1, where training's `sft_loss` has weight `sft_alpha`."""


class VisualTarget(Section):
    """One pair of features that the student's vision path is pulled towards."""

    weight: NonNegative = 1.0
    """Weight of this target within the visual term."""
    distance: Distance | None = None
    """Mean squared error, or 1 - cosine; null takes `visual_kd.distance`."""
    module: Text | None = None
    """Module path on both models, where the layout table does not know the family."""
    student_module: Text | None = None
    """Module path on the student, where the two differ."""
    teacher_module: Text | None = None
    """Module path on the teacher, where the two differ."""
    match: Match = "exact"
    """What happens to feature grids of different size: an error, or the teacher's is resized. An image takes as many
    tokens of the language model in both models all the same: what may differ is the grid inside the vision path."""


def _targets(value: Any) -> Any:
    """`[vit, aligner]` as `{vit: {}, aligner: {}}`."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        if len(set(value)) != len(value):
            raise wrong("the same target is listed twice")
        value = {item: {} for item in value}
    if not isinstance(value, Mapping):
        raise wrong(f"expected a list of targets, or a map of them, out of {', '.join(VISUAL_TARGETS)}")
    unknown = [name for name in value if name not in VISUAL_TARGETS]
    if unknown:
        raise wrong(f"unknown target; the targets are {', '.join(VISUAL_TARGETS)}")
    return {name: {} if target is None else target for name, target in value.items()}


class VisualKdConfig(Section):
    """Feature distillation of the vision path. Vision-language models only."""

    enabled: Flag = False
    """Whether the visual term is computed at all."""
    weight: NonNegative = 1.0
    """Multiplies the sum over the targets."""
    distance: Distance = "mse"
    """Distance of every target that names none."""
    targets: Annotated[dict[str, VisualTarget], BeforeValidator(_targets), Field(validate_default=True)] = {
        "aligner": VisualTarget()
    }
    """Features to compare: `vit` (before the aligner), `aligner` (after it), `deepstack`."""

    @field_validator("targets")
    @classmethod
    def _fill_distance(cls, value: dict[str, VisualTarget], info: ValidationInfo) -> dict[str, VisualTarget]:
        if not value and info.data.get("enabled"):
            raise wrong(f"no target to compare: name some of {', '.join(VISUAL_TARGETS)}, or set enabled: false")
        default = info.data.get("distance", "mse")
        return {k: t if t.distance else t.model_copy(update={"distance": default}) for k, t in value.items()}

    def in_force(self) -> VisualKdConfig | None:
        """What is computed: None where it is switched off or weighs nothing, else without targets of weight 0 and with
        `module` written out for either model that has none of its own."""
        targets = {}
        for name, target in self.targets.items():
            if target.weight > 0:
                student, teacher = target.student_module or target.module, target.teacher_module or target.module
                targets[name] = target.model_copy(update={"student_module": student, "teacher_module": teacher})
        return self.model_copy(update={"targets": targets}) if self.enabled and self.weight > 0 and targets else None


def _builtin(value: Any) -> Any:
    """A number of numpy and its like as Python's own."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _as_given(value: Any) -> Any:
    """`visual_kd` as Python code writes it: a mapping, or an object with attributes, means that it is switched on."""
    if value is None or isinstance(value, VisualKdConfig):
        return value
    given = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    return value if given is None else {"enabled": True, **given}


class DistillationOptions(LossAndSampling):
    """All options of the loss and of the sampling, as the trainer uses them; replaced, never changed (`LiveOption`)."""

    tail: Tail = DEFAULT_TAIL
    """See `rlhf.teacher.tail`."""
    visual_kd: Annotated[VisualKdConfig | None, BeforeValidator(_as_given)] = None
    """See `custom.visual_kd`; None where it is switched off."""

    @field_validator("visual_kd")
    @classmethod
    def _in_force(cls, value: VisualKdConfig | None) -> VisualKdConfig | None:
        return None if value is None else value.in_force()

    @classmethod
    def from_args(cls, args: GKDConfig | DistillationOptions) -> DistillationOptions:
        """Read and check the attributes that have the name of a field; absent ones have their default.

        Raises:
            ConfigError: a ValueError; a value is of a wrong type or out of range.
        """
        values = {name: _builtin(getattr(args, name)) for name in cls.model_fields if hasattr(args, name)}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            from kdtrain.config.translate import to_problem  # which knows the whole schema, and so this module

            problems = [to_problem(detail) for detail in error.errors(include_url=False)]
        hints = [f" ({problem.hint})" if problem.hint else "" for problem in problems]
        found = [f"{dotted(p.path)}: {p.message}{hint}" for p, hint in zip(problems, hints, strict=True)]
        raise ConfigError(". ".join(found))

    def checked(self) -> DistillationOptions:
        """These options; raises as `from_args` does, for what a callback has set."""
        return self.from_args(self)

    @property
    def lm_kd_active(self) -> bool:
        """Whether the divergence from the teacher is part of the loss."""
        return self.llm_kd_weight > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether anything asks the teacher; if not, none is loaded even where one is configured."""
        return self.lm_kd_active or self.visual_kd is not None

    @property
    def ce_weight(self) -> float:
        """c: `sft_alpha` beside LM KD; 1 without it, where CE is the only thing the language model learns from."""
        return self.sft_alpha if self.lm_kd_active else 1.0

    def without_kd(self) -> DistillationOptions:
        """The same run with every teacher term off: CE only."""
        return self.model_copy(update={"llm_kd_weight": 0.0, "visual_kd": None})
