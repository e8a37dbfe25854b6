"""The options of loss and sampling: their names, bounds and defaults, and the one object that the trainer reads.

`schema` builds the sections of the file from these models. On their way into the trainer the options are attributes of
a GKDConfig; its constructor reads them from there, and from then on they live in `DistillationOptions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from kdtrain.config.diagnose import dotted
from kdtrain.config.hidden_kd import HiddenKdConfig
from kdtrain.config.section import Count, Flag, NonNegative, Number, Positive, Section, Share, Text, Whole, wrong
from kdtrain.config.token_weights import TokenWeights
from kdtrain.errors import ConfigError
from kdtrain.losses.kinds import (
    DEFAULT_PARAMS,
    VISUAL_TARGETS,
    WITH_BETA,
    Distance,
    Divergence,
    DivergenceParams,
    Match,
    Tail,
    TokenScore,
)

if TYPE_CHECKING:
    from trl.experimental.gkd import GKDConfig

DEFAULT_TAIL: Tail = "bucket"
# The figures are those of `make bench` (tests/benchmarks/results.md), and a test holds them to it.
RENORMALIZED = (
    "turns the gradient away from that of the full distributions by 28 degrees at beta 0.5, and bucket by 18; near "
    "convergence by 19 and 10 (make bench: top 20 of 32,768 random tokens whose probabilities fall as 1/rank)"
)


class GenerationOptions(Section):
    """How the student's own answers are written."""

    backend: Literal["transformers", "vllm_server", "vllm_colocate"] = "transformers"
    """`transformers`: the student as it is in this process; `vllm_server`: a vLLM server that is given its weights at
    each step; `vllm_colocate`: vLLM in this process, on the same devices."""
    batch_size: Count | None = None
    """Answers that a process writes at a time. null: those of all prompts of the step, as far as their keys and values
    and what drawing a token takes have room in 4 GiB."""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Draw only from the most likely tokens that have this probability together; null draws from all. Samples are then
    not of the student's distribution, and the loss does not correct for that: likewise for the next two."""
    top_k: Count | None = None
    """Draw only from the k most likely tokens."""
    min_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Draw only from tokens with at least this share of the most likely one's probability."""
    base_url: Text | None = None
    """vllm_server: address of the server, such as `http://127.0.0.1:8000`. It is given the student's weights, so it can
    be no teacher's."""
    timeout_s: NonNegative = 240.0
    """vllm_server: seconds to wait for a server that is still starting."""
    group_port: Annotated[Whole, Field(ge=1, le=65535)] = 51216
    """vllm_server: port of this machine that the weights are sent from; another one for each run on it."""
    gpu_memory_utilization: Annotated[Number, Field(gt=0, le=1)] = 0.3
    """vllm_colocate: share of each GPU's memory that vLLM takes, weights and cache together."""
    tensor_parallel_size: Count = 1
    """vllm_colocate: GPUs that share one copy of the student in vLLM; the number of processes is a multiple of it."""
    max_model_length: Count | None = None
    """vllm_colocate: longest prompt with its answer, in tokens. null: the model's own context, for which vLLM needs
    room in its cache."""
    enable_sleep_mode: Flag = False
    """vllm_colocate: give vLLM's memory back while the student trains, at the price of waking it in every step."""


class LengthSchedule(Section):
    """A limit that grows with the steps: short answers first cost less."""

    model_config = ConfigDict(serialize_by_alias=True)

    from_: Annotated[Count, Field(alias="from")]
    """Longest generation of the first step, in tokens."""
    to: Count
    """That of the steps after it has grown; at least `from`."""
    over: Annotated[Number, Field(gt=0, le=1)]
    """Share of all steps over which it grows, by the same amount at each one."""

    @field_validator("to")
    @classmethod
    def _grows(cls, value: int, info: ValidationInfo) -> int:
        first = info.data.get("from_")
        if first is not None and value < first:
            raise wrong(f"must be at least from ({first}), got {value}: the limit grows from one to the other")
        return value

    def at(self, step: int, max_steps: int) -> int:
        """The limit of the step that follows `step` steps; rounded down, and in whole numbers on every machine."""
        span = Fraction(str(self.over)) * max_steps
        if step >= span:
            return self.to
        return self.from_ + int((self.to - self.from_) * step / span)


AnswerLimit = Annotated[
    Annotated[Count, Tag("[number]")] | Annotated[LengthSchedule, Tag("[schedule]")],
    Discriminator(lambda value: "[schedule]" if isinstance(value, Mapping | LengthSchedule) else "[number]"),
]


class TokenSelection(Section):
    """Which tokens the divergence is taken at (TIP, https://arxiv.org/abs/2604.14084)."""

    by: TokenScore = "student_entropy"
    """What tokens are ranked by, at temperature 1. `student_entropy`: how unsure the student is; `disagreement`:
    (1 - H(S)/log V) · KL(T||S), the few tokens at which it is sure and wrong."""
    keep: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Share of each row's supervised tokens that count in the divergence, rounded up; 1 is all of them."""

    @property
    def ratio(self) -> tuple[int, int]:
        """`keep` as a fraction, to six digits: a product of floats is rounded up too far, 0.07 · 100 to 8."""
        return Fraction(str(self.keep)).limit_denominator(10**6).as_integer_ratio()


class OnPolicyLoss(Section):
    """How answers that the student writes itself are compared, where that is another way than for other rows."""

    divergence: Divergence | None = None
    """As `rlhf.divergence`; null is as for other rows of the same source."""
    beta: Share | None = None
    """As `rlhf.beta`; null is as for other rows of the same source."""


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
    ends; `mixed_kl`: (1-beta) forward + beta reverse KL. Those that take no beta: `skew_kl` and `skew_reverse_kl`
    (forward and reverse KL to a mixture with a little of the first distribution), `alpha_beta` (powers of both),
    `entropy_aware` (reverse KL, and forward KL added where the teacher is uncertain), `tvd` (total variation)."""
    skew_alpha: Annotated[Number, Field(ge=0, lt=1)] = DEFAULT_PARAMS.skew_alpha
    """Of `skew_kl` and `skew_reverse_kl`: the share of the first distribution in the mixture; 0 is KL itself."""
    ab_alpha: Number = DEFAULT_PARAMS.ab_alpha
    """Of `alpha_beta`: the exponent of the teacher's probabilities. ab_alpha + ab_beta must not be negative."""
    ab_beta: Number = DEFAULT_PARAMS.ab_beta
    """Of `alpha_beta`: the exponent of the student's probabilities."""
    entropy_threshold: NonNegative = DEFAULT_PARAMS.entropy_threshold
    """Of `entropy_aware`: forward KL is added where the teacher's entropy, at temperature 1, is above so many nats."""
    on_policy: OnPolicyLoss = OnPolicyLoss()
    """Divergence and beta of answers that the student writes itself (lmbda above 0), such as `{divergence:
    skew_reverse_kl}` beside `divergence: skew_kl` for the data's (DistiLLM-2). A source may have its own as well."""
    kd_temperature: Positive = 1.0
    """Softens both distributions in the loss."""
    token_selection: TokenSelection | None = None
    """While training, take the divergence at some of each row's tokens alone, such as
    `{by: student_entropy, keep: 0.5}`. null takes all. Evaluation does in any case."""
    token_weights: TokenWeights | None = None
    """While training, let the tokens of a row with images count by how much the teacher reads them off these, such as
    `{by: visual_reliance}`. null: all count alike, as in evaluation. For hf teachers."""
    cross_tokenizer: Literal["alm", "uld"] | None = None
    """For a teacher with another tokenizer, which reads the student's answers as text behind its own chat template.
    `alm`: the likelihoods of chunks of text that tokens of both make up are compared, in place of distributions over
    tokens, so that divergence, beta and kd_temperature have no effect; `uld`: the sorted probabilities at the last
    token of each chunk, without what they are of (hf teachers; for comparison). null: one tokenizer for both. With a
    cache (`alm`) the teacher's tokenizer need not be there."""
    lmbda: Share = 0.5
    """Share of batches whose completions the student generates itself."""
    seq_kd: Flag = False
    """Where the student does not generate, the teacher does instead of the data."""
    temperature: Annotated[Number, Field(gt=0, le=1)] = 0.9
    """Sampling temperature of those generations."""
    max_new_tokens: AnswerLimit = 128
    """Longest generation in tokens; or a limit that grows with the steps, `{from: 64, to: 512, over: 0.3}`. Answers
    that the teacher writes before training may have `to` tokens."""
    generation: GenerationOptions = GenerationOptions()
    """What writes the student's own answers, and what they are drawn from."""
    samples_per_prompt: Count = 1
    """Answers that the student writes to each prompt. All are scored by the teacher (with select: best or weighted) in
    forwards of per_device_train_batch_size times as many rows, and with select: all or weighted trained in such."""
    select: Literal["all", "best", "weighted"] = "all"
    """Which of them train. `best`: of each prompt's the one that is most likely to the teacher, by the mean of its
    log-probability per token at temperature 1; `weighted`: all, their divergence weighted by n times the softmax of
    that mean over the n samples of a prompt."""
    select_regex: Text | None = None
    """A regular expression with one group: an answer of the student trains only if what the group matches in it equals
    the row's column `answer` (or what the group matches there), but for white space around. Before `select`."""
    disable_dropout: Flag = True
    """Switch dropout of the student off."""
    eval_kd: Flag = True
    """Whether evaluation runs the teacher too; false reports cross-entropy only, as `eval_sft_loss` with
    weight 1, where training's `sft_loss` has weight `sft_alpha`."""

    @field_validator("select_regex")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise wrong(f"is no regular expression: {error}") from None
        if groups != 1:
            raise wrong(
                f"has {groups} groups, and needs one, whose text is compared: put round brackets around that part, "
                "and (?:…) around others"
            )
        return value

    @property
    def divergence_params(self) -> DivergenceParams:
        """The numbers of single divergences, as the losses take them."""
        return DivergenceParams(self.skew_alpha, self.ab_alpha, self.ab_beta, self.entropy_threshold)

    @property
    def student_mass_counts(self) -> bool:
        """Whether what the student finds likely counts by itself, as in reverse KL, and not only at the teacher's."""
        return self.beta > 0 if self.divergence in WITH_BETA else self.divergence != "skew_kl"

    @property
    def loss_numbers(self) -> str:
        """What the divergence is at, such as `beta 0.5, temperature 1`."""
        numbers = self.divergence_params.numbers(self.divergence, self.beta)
        found, selection = self.token_selection, ""
        if found is not None and found.keep < 1:
            selection = f", {found.keep:.3g} of the tokens by {found.by}"
        if self.token_weights is not None:
            selection += f", tokens weighed by {self.token_weights.by}"
        return f"{numbers}, temperature {self.kd_temperature:g}{selection}".removeprefix(", ")

    @property
    def most_new_tokens(self) -> int:
        """The largest limit that a generation of the run has."""
        limit = self.max_new_tokens
        return limit.to if isinstance(limit, LengthSchedule) else limit

    def new_tokens(self, step: int, max_steps: int) -> int:
        """The limit of what is generated for the step that follows `step` of `max_steps` steps."""
        limit = self.max_new_tokens
        return limit.at(step, max_steps) if isinstance(limit, LengthSchedule) else limit


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
    """`visual_kd`, `hidden_kd` as Python code writes them: a mapping or an object with attributes is switched on."""
    if value is None or isinstance(value, VisualKdConfig | HiddenKdConfig):
        return value
    given = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    return value if given is None else {"enabled": True, **given}


class DistillationOptions(LossAndSampling):
    """All options of the loss and of the sampling, as the trainer uses them; replaced, never changed (`LiveOption`)."""

    tail: Tail = DEFAULT_TAIL
    """See `rlhf.teacher.tail`."""
    visual_kd: Annotated[VisualKdConfig | None, BeforeValidator(_as_given)] = None
    """See `custom.visual_kd`; None where it is switched off."""
    hidden_kd: Annotated[HiddenKdConfig | None, BeforeValidator(_as_given)] = None
    """See `custom.hidden_kd`; None where it is switched off."""

    @field_validator("visual_kd", "hidden_kd")
    @classmethod
    def _in_force(cls, value: VisualKdConfig | HiddenKdConfig | None) -> VisualKdConfig | HiddenKdConfig | None:
        return None if value is None else value.in_force()

    @classmethod
    def from_args(cls, args: GKDConfig | DistillationOptions) -> DistillationOptions:
        """Read and check the attributes that have the name of a field; absent ones have their default.

        Raises:
            ConfigError: a ValueError; a value is of a wrong type or out of range.
        """
        return _read(cls, args)

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
        return self.lm_kd_active or self.compares_features

    @property
    def compares_features(self) -> bool:
        """Whether a term compares what is inside both models: the teacher then has to run in this process."""
        return self.visual_kd is not None or self.hidden_kd is not None

    @property
    def ce_weight(self) -> float:
        """c: `sft_alpha` beside LM KD; 1 without it, where CE is the only thing the language model learns from."""
        return self.sft_alpha if self.lm_kd_active else 1.0

    @property
    def selection(self) -> TokenSelection | None:
        """`token_selection` where it leaves anything out."""
        found = self.token_selection
        return None if found is None or found.keep == 1 or not self.lm_kd_active or self.crosses_tokenizers else found

    @property
    def weighing(self) -> TokenWeights | None:
        """`token_weights` where there is a divergence that they weigh."""
        return self.token_weights if self.lm_kd_active else None

    def at_all_tokens(self) -> DistillationOptions:
        """The same without `token_selection` and `token_weights`."""
        own = [name for name in ("token_selection", "token_weights") if getattr(self, name) is not None]
        return self.model_copy(update=dict.fromkeys(own)) if own else self

    @property
    def crosses_tokenizers(self) -> bool:
        """Whether the teacher is compared with as one that has another tokenizer."""
        return self.cross_tokenizer is not None and self.lm_kd_active

    def without_kd(self) -> DistillationOptions:
        """The same run with every teacher term off: CE only."""
        return self.model_copy(update={"llm_kd_weight": 0.0, "visual_kd": None, "hidden_kd": None})


class TrainingOptions(Section):
    """What `training` has beside the fields of trl's GKDConfig, which never sees these."""

    early_stopping_patience: Count | None = None
    """Stop when so many evaluations in a row are not better than the best one, by metric_for_best_model (loss, unless
    it names another). What is saved is the model of the last step; load_best_model_at_end: true makes it that of the
    best one. null trains to the end."""
    report: Flag = True
    """Write report.html and report.json into the run folder, as the run ends: one page with its curves, samples,
    options and data. `kdtrain report` writes it at any time."""
    per_device_train_tokens: Count | None = None
    """Most tokens of a forward, padding included, on each device: the rows of a step (per_device_train_batch_size ×
    gradient_accumulation_steps) are cut into as many forwards as that takes, rows of like length together. Which rows a
    step has stays as it is, and so does the loss: this bounds memory. A row that is longer by itself has a forward of
    its own. null: forwards of per_device_train_batch_size rows."""
    log_completions_steps: Count | None = None
    """Keep answers that were generated while training, to be looked at: of the first generated step, and of the first
    one at or after each multiple of this, up to 64 with their divergence from the teacher token by token, in
    completions.parquet of the run folder, and a few on the terminal. Student and teacher run once more for it, without
    gradients. null keeps none."""

    @classmethod
    def from_args(cls, args: GKDConfig) -> TrainingOptions:
        """As `DistillationOptions.from_args`."""
        return _read(cls, args)


_Options = TypeVar("_Options", DistillationOptions, TrainingOptions)


def _read(kind: type[_Options], args: Any) -> _Options:
    """Options from the attributes that have the name of a field."""
    values = {name: _builtin(getattr(args, name)) for name in kind.model_fields if hasattr(args, name)}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        from kdtrain.config.translate import to_problem  # which knows the whole schema, and so this module

        problems = [to_problem(detail) for detail in error.errors(include_url=False)]
    hints = [f" ({problem.hint})" if problem.hint else "" for problem in problems]
    found = [f"{dotted(p.path)}: {p.message}{hint}" for p, hint in zip(problems, hints, strict=True)]
    raise ConfigError(". ".join(found))
