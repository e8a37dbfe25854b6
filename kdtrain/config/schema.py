"""The whole config file as Pydantic models: this module is the reference of every option.

Options of the loss and of the sampling are in `options.py`, which the trainer reads too.

The models check one value at a time (type, range, choice); `load.py` says who checks the rest: use `ConfigLoader` or
`check_config` rather than `RunConfig(...)`.

All models are frozen and refuse unknown keys. Booleans are not numbers, numbers are not text, whole numbers are
accepted where a fraction is asked for, NaN and infinity are refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from kdtrain.config.hidden_kd import HiddenKdConfig
from kdtrain.config.options import (
    DEFAULT_TAIL,
    DistillationOptions,
    LossAndSampling,
    TrainingOptions,
    VisualKdConfig,
)
from kdtrain.config.section import Count, Flag, Number, Positive, Section, Text, Whole, wrong
from kdtrain.config.section import Share as ShareOfOne
from kdtrain.config.splits import check_split
from kdtrain.losses.kinds import Divergence, Tail

_TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_SHARE = re.compile(r"[-+]?\d+(\.\d+)? ?%")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SelfWeights = Literal["base", "live", "ema"]
Placement = Literal["auto", "replicated", "sharded", "cpu_offload"]


def _names(value: Any) -> Any:
    """Checked here, for Pydantic's own message about a union names every member of it."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    if isinstance(value, str) and value:
        return value
    raise wrong("expected a name or a list of names")


def _name_list(value: Any) -> Any:
    if isinstance(value, str):
        raise wrong("expected a list of names, got text")
    return _names(value)


def _urls(value: Any) -> Any:
    """One address or several, as a tuple."""
    items = value if isinstance(value, (list, tuple)) else (value,)
    if not items or not all(isinstance(item, str) and item for item in items):
        raise wrong("expected an address such as http://127.0.0.1:8000/v1, or a list of them")
    if len(set(items)) < len(items):
        raise wrong("the same address is listed twice")
    return tuple(items)


Urls = Annotated[tuple[str, ...], BeforeValidator(_urls), Field(json_schema_extra={"type": ["string", "array"]})]
Names = Annotated[Any, BeforeValidator(_names), Field(json_schema_extra={"type": ["string", "array"]})]
NameList = Annotated[tuple[str, ...], BeforeValidator(_name_list)]


class ModelConfig(Section):
    """The student."""

    model: Text
    """Model folder (relative to the file that names it) or hub id of the student. Of an adapter's folder LoRA goes on
    training the adapter, on the base that it names; full fine-tuning begins with both merged."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null takes the default branch. No effect on a local folder."""
    dtype: Dtype = "auto"
    """Type of the weights in memory; `auto` fits the device."""
    attn_implementation: Text | None = None
    """Attention kernel by its transformers name, such as `sdpa` or `flash_attention_2`; null takes its default."""
    trust_remote_code: Flag = False
    """Whether Python code that ships with a model may run. Off unless you have read that code."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the weights quantised (bitsandbytes, extra `quant`); LoRA only, which makes it QLoRA. `4bit`: NF4, its
    scales quantised as well, products in `dtype` (under mixed precision in that); `8bit`: LLM.int8(), where what a row
    gets depends a little on the rows beside it. Whole stay the embedding, the head, and of a vision-language model the
    encoder and the projector. `kdtrain export` merges the adapter into the weights as they are on the disk."""
    quantization_aware: Literal["int8", "int4", "int3", "int2"] | None = None
    """Train for a quantised model: each forward rounds the linear layers' weights as torchao does (extra `quant`;
    symmetric, groups of 32), they are saved as they are, and torchao quantises them in the end. Full fine-tuning only;
    whole stays what `quantization` leaves whole. The teacher may be the same model: it is not rounded."""
    init_kwargs: dict[str, Any] = {}
    """Further keyword arguments of `from_pretrained`."""
    adapter: Text | None = None
    """Folder or hub id of an adapter to go on training, on top of `model`, whose tokenizer is used. LoRA only."""


class TunerConfig(Section):
    """What is trained."""

    train_type: Literal["full", "lora"] = "full"
    """Train all weights, or a low-rank adapter."""
    lora_rank: Count = 16
    """Rank of the adapter matrices. LoRA only."""
    lora_alpha: Positive = 32.0
    """Scale of the adapter: its output is multiplied by lora_alpha / lora_rank. LoRA only."""
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Dropout probability before the adapter. LoRA only."""
    target_modules: Names = "all-linear"
    """Modules that get an adapter: `all-linear`, a regular expression, or a list of name endings. LoRA only."""
    modules_to_save: NameList | None = None
    """Modules trained in full and saved with the adapter, such as `[lm_head]`. LoRA only."""
    use_dora: Flag = False
    """Weight-decomposed LoRA: slower, often better at low rank. LoRA only."""
    freeze_llm: Flag = False
    """Keep the language model's weights as they are."""
    freeze_vit: Flag = False
    """Keep the vision encoder's weights as they are. Vision-language models only."""
    freeze_aligner: Flag = False
    """Keep the projector between vision encoder and language model as it is. Vision-language models only."""

    @property
    def frozen(self) -> dict[str, bool]:
        """For each part of a model, whether it is kept as it is."""
        return {"llm": self.freeze_llm, "vit": self.freeze_vit, "aligner": self.freeze_aligner}


class DataSource(Section):
    """One data set."""

    path: Text
    """File, folder or pattern such as `rows/*.jsonl` (absolute after loading), or hub id."""
    name: Text | None = None
    """Configuration (subset) of a data set on the hub, or of a clone: a folder in `path`."""
    split: Annotated[Text, AfterValidator(check_split)] = "train"
    """Split of a data set on the hub, of a saved one, or of a folder, where file names say it (`gsm8k_train.jsonl`; val
    is validation is dev) and `all` is every file. With a slice, `train[:90%]` or `[100:200]`, also of a single file."""
    columns: dict[str, Text | None] | None = None
    """Renames columns: the name kdtrain knows -> the name in the data, such as `{prompt: question}`. Other columns are
    then not read, but for those of images, videos and sounds; one that the rows would lose that way
    (`system`, `tools`, `input`) is an error. `{input: null}` says that a column is not to be read."""
    streaming: Flag = False
    """Read while training instead of before it, for data larger than memory or disk: files with a row in each line
    (also packed), Parquet, Arrow, CSV, folders of them, saved data sets and those of the hub. Rows are shuffled in
    blocks of 10,000, and files among themselves. All sources of data.train or none; needs training.max_steps."""
    limit: Count | None = None
    """Use the first n rows only."""
    weight: Positive = 1.0
    """How often each row appears in an epoch: 1 once, 2 twice, 0.5 a random half of the rows, from the seed. While
    training the next epoch takes the rows that came least, so that two of 0.5 are all rows once (all are encoded,
    and answered where the teacher writes); evaluation and `custom.sample_limit` keep to the same rows. Of sources that
    are streamed, whose rows are not counted, it is a source's part of the rows that are drawn: 3 beside 1 is three of
    four."""
    ce: Flag = True
    """Whether the rows' own labels count. false: the teacher alone supervises them."""
    answers: Literal["data", "teacher"] = "data"
    """Completions from the data, or the teacher's own greedy ones (of up to rlhf.max_new_tokens), generated once before
    training in place of the data's, training.per_device_eval_batch_size at a time, and kept in the run folder."""

    teacher: Text | None = None
    """Which of rlhf.teachers answers for its rows; a row's own column `teacher` wins."""
    divergence: Divergence | None = None
    """How its rows are compared with the teacher; null takes rlhf.divergence."""
    beta: ShareOfOne | None = None
    """As `divergence`; null takes rlhf.beta."""

    @property
    def is_local(self) -> bool:
        """A file or folder rather than a hub id; local paths are absolute once loaded."""
        return os.path.isabs(self.path)


def _sources(value: Any) -> Any:
    """`a.jsonl`, `{path: a.jsonl}` and lists of either, as a tuple of sources."""
    if isinstance(value, (list, tuple)) and not value:
        raise wrong("expected at least one data source, got an empty list")
    items = value if isinstance(value, (list, tuple)) else (value,)
    for item in items:
        if not isinstance(item, (str, Mapping, DataSource)):
            raise wrong("expected a path, a hub id, a source such as {path: a.jsonl}, or a list of them")
        if is_share(item.get("path") if isinstance(item, Mapping) else getattr(item, "path", item)):
            raise wrong("a share of the training rows is the whole of data.eval, data.eval: 5%, beside no other source")
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


def is_share(value: Any) -> bool:
    """Whether this is a percentage rather than a path."""
    return isinstance(value, str) and bool(_SHARE.fullmatch(value))


def _share(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 1:
        raise wrong(f"a share of the training rows has a percent sign: {100 * value:g}%")
    if not isinstance(value, str):
        raise wrong("expected a path, a hub id, a source, a list of these, or a share of the training rows such as 5%")
    if not 0 < float(value.rstrip("% ")) < 100:
        raise wrong("must be above 0% and below 100% of the training rows")
    return value


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_sources)]
# Told apart by what is there: Pydantic's message about a union would name every member.
Evaluation = Annotated[
    Annotated[Sources, Tag("[sources]")] | Annotated[str, BeforeValidator(_share), Tag("[share]")],
    Discriminator(lambda value: "[share]" if is_share(value) or isinstance(value, int | float) else "[sources]"),
]


class DataConfig(Section):
    """What is trained on."""

    train: Sources
    """Path, hub id, source, or a list of these to be mixed."""
    eval: Evaluation | None = None
    """Held-out data in the same forms, or a share of the rows of data.train such as `5%`, which then do not train:
    chosen by what the rows say, so that equal rows fall on one side, whatever the seed. null: no evaluation."""
    max_length: Annotated[Whole, Field(ge=2)] = 1024
    """Longest row of the data in tokens, prompt and completion together. A generated row may be longer: its prompt
    and up to rlhf.max_new_tokens."""
    on_overlength: Literal["error", "truncate", "drop"] = "error"
    """What happens to a longer row; each is counted and reported."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Supervised tokens of a chat: every assistant turn, the last one, or everything. Prompt/completion rows always
    train on the completion."""
    turns: Literal["auto", "split", "joint"] = "auto"
    """Rows that a chat with several trained turns becomes. `joint`: one. `split`: one for each turn, with what the
    model is given before it. `auto`: one, and several where the chat template renders earlier turns differently once
    others follow (Qwen3 drops their thinking), which is said."""
    reasoning: Literal["error", "keep", "drop"] = "error"
    """What becomes of `reasoning_content` that the chat template does not render: the row is bad, it is written as
    <think>…</think> in front of the answer, or it is left out."""
    control_tokens: Literal["error", "text"] = "error"
    """Tokens such as <|im_end|> in the text of a message: the row is bad, or they are encoded as ordinary text."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the chat template, such as `{enable_thinking: false}`. A row's own `chat_template_kwargs` win."""
    max_bad_rows: Annotated[Whole, Field(ge=0)] = 0
    """Rows that may be unusable before the run stops; they are left out and the first three shown."""
    image_root: Text | None = None
    """Folder that relative paths of images are relative to; null: that of the data file."""
    processor_kwargs: dict[str, Any] = {}
    """Settings of the image processor in place of those saved with the model, such as `{max_pixels: 200704}`, for the
    student and, unless it has its own, the teacher. The student's are saved with it."""
    packing: Flag = False
    """Lay the rows of a step behind each other in as few lines of max_length as fit, per_device_train_batch_size lines
    in a forward, without attention between rows. Which rows a step has stays as it is, and so does the loss (TRL's
    packing puts more rows into a step)."""
    padding_free: Flag = False
    """Lay the rows of a micro-batch behind each other in one line instead of padding them, without attention between
    rows. The loss stays as it is."""
    cache_dir: Text | None = None
    """Folder for encoded rows, which later runs read again; null: below HF_HOME, or a temporary folder where that
    cannot be written, which a line then says."""

    @property
    def streams(self) -> bool:
        """Whether the training rows are read while training: all sources of them or none, see `rules_of_streams`."""
        return any(source.streaming for source in self.train)

    @property
    def eval_sources(self) -> tuple[DataSource, ...]:
        """What `eval` names; empty where there is no evaluation, or on a share of the training rows."""
        return () if self.eval is None or isinstance(self.eval, str) else self.eval

    @property
    def eval_share(self) -> float | None:
        """The part of the training rows that `eval` holds out, between 0 and 1; None where it is no share."""
        return float(self.eval.rstrip("% ")) / 100 if isinstance(self.eval, str) else None

    @property
    def chats(self) -> dict[str, Any]:
        """Those of its options that say how conversations become tokens; see `RunConfig.chats`."""
        names = ("train_on", "turns", "reasoning", "control_tokens", "chat_template_kwargs")
        return {name: getattr(self, name) for name in names}


class TeacherConfig(Section):
    """How the teacher answers. Which options apply depends on `backend`."""

    backend: Literal["hf", "self", "vllm", "openai", "cache"] = "hf"
    """`hf`: a model in this process; `self` (alias `local-toggle`): the student's own weights; `vllm`, `openai`: a
    server; `cache`: targets written by `kdtrain cache`."""
    weights: SelfWeights = "base"
    """self: the student with its adapter off (LoRA only), as it is now, or a moving average of its trained weights.
    With `live` and `ema` the teacher learns with the student."""
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    """self with weights: ema: share of the average that stays at each step."""
    dtype: Dtype = "auto"
    """hf: type of the weights in memory."""
    device_map: Annotated[Any, Field(json_schema_extra={"type": ["string", "object", "null"]})] = None
    """hf: placement over devices, as in `from_pretrained`; null puts it beside the student."""
    placement: Placement = "auto"
    """hf: where the weights lie. `auto`: whole on each device, and in pieces where FSDP or ZeRO-3 cuts the student into
    pieces; `replicated`: whole on each device, under FSDP too; `sharded`: in pieces over all processes (FSDP 2), also
    where the student is whole on each; `cpu_offload`: in CPU memory, and on the GPU during the teacher's forward
    alone, to which they are copied each time. One whose weights `device_map` or `quantization` places has `auto`."""
    quantization: Literal["4bit", "8bit"] | None = None
    """hf: load the weights quantised, whatever the student's are; as `model.quantization`. Other settings of
    bitsandbytes can be given as `teacher_model_init_kwargs: {quantization_config: {load_in_4bit: true, …}}`."""
    adapter: Text | None = None
    """hf: folder of a LoRA adapter to put on the teacher. `teacher_model` may also be such a folder itself."""
    revision: Text | None = None
    """hf: branch, tag or commit on the hub."""
    processor_kwargs: dict[str, Any] | None = None
    """hf: settings of the teacher's image processor; null takes data.processor_kwargs, `{}` those saved with it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """hf, vllm, openai: arguments for the chat template of the conversations as the teacher reads them, such as
    `{enable_thinking: true}` where the student's are `{enable_thinking: false}`. They win over
    `data.chat_template_kwargs` and over a row's own; what they lack is as for the student. Both models are compared on
    the same answer: a row in which it has other tokens for the teacher is bad. Answers that are generated stand behind
    the generation prompt of each."""
    prefix: Annotated[Any, Field(json_schema_extra={"type": ["array", "string", "object", "null"]})] = None
    """Messages that the teacher alone reads (context distillation): a list such as
    `[{role: system, content: "Answer briefly."}]`; a file, JSON or YAML with such a list, or text, which is one system
    message; or `{column: name}`, a column of the data with text (one system message) or messages, which is then read as
    nothing else. A row without a value there is bad, or gets the `default` of `{column: name, default: …}`."""
    prefix_mode: Literal["prepend", "system"] = "prepend"
    """Where the prefix stands: behind the conversation's own system message, with which a system message of the prefix
    becomes one, a blank line between; or in its place."""
    base_url: Urls | None = None
    """vllm, openai: address of the API, such as `http://127.0.0.1:8000/v1`, or a list of servers of the same model,
    over which requests are spread."""
    model: Text | None = None
    """vllm, openai: the server's name for the teacher. `teacher_model` may name its tokenizer, by default the
    student's."""
    api_key_env: Text | None = None
    """vllm, openai: name of the environment variable that holds the API key; never the key itself."""
    api: Literal["auto", "completions", "chat"] = "auto"
    """vllm, openai: how the teacher is asked to write answers: token ids to `/completions`, messages to
    `/chat/completions` (all that most APIs offer; only for answers, without a KD weight), or the first where it
    works."""
    max_requests: Count | None = None
    """vllm, openai: requests for answers after which the run stops, with all answers kept; null: no limit."""
    top_k: Count = 64
    """vllm, openai: most likely tokens asked for per position. A vLLM server gives up to its `--max-logprobs`, 20
    unless raised."""
    tail: Tail = DEFAULT_TAIL
    """vllm, openai, cache: probability outside the top k as one bucket, or dropped by renormalising both sides."""
    timeout_s: Positive = 60.0
    """vllm, openai: seconds to wait for one reply."""
    max_retries: Annotated[Whole, Field(ge=0)] = 5
    """vllm, openai: further attempts after a failed connection, a 429 or a 5xx."""
    concurrency: Count = 8
    """vllm, openai: requests in flight at a time, per server and process."""
    lookahead: Annotated[Whole, Field(ge=0)] = 2
    """vllm, openai, cache: optimizer steps whose targets are fetched ahead, while earlier ones train; not of answers
    that are generated for the step."""
    path: Text | None = None
    """cache: folder written by `kdtrain cache`. No teacher is loaded then; the options that say which teacher wrote it
    and what it read (teacher_model, revision, dtype, prefix, …) may stay, and are compared with what the cache was made
    from. Needs rlhf.lmbda: 0 and seq_kd: false."""

    @property
    def is_served(self) -> bool:
        """Whether the teacher runs on a server."""
        return self.backend in ("vllm", "openai")

    @field_validator("backend", mode="before")
    @classmethod
    def _alias(cls, value: Any) -> Any:
        return "self" if value == "local-toggle" else value

    @field_validator("device_map")
    @classmethod
    def _device_map(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, (str, dict)):
            raise wrong("expected text or a map")
        return value

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, value: Any) -> Any:
        # `prefix.py` has checked it where it stands, and read it if it was a file.
        is_column = isinstance(value, dict) and isinstance(value.get("column"), str)
        if value is not None and not isinstance(value, list) and not is_column:
            raise wrong("expected a list of messages, a file, or {column: name}")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _variable_name(cls, value: str | None) -> str | None:
        # In capitals, as such names are: most keys have small letters, and one that is taken for a name would be kept.
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise wrong("expected the name of an environment variable, in capitals, not a key")
        return value


class NamedTeacherConfig(TeacherConfig):
    """One of several teachers: the options of `rlhf.teacher`, and which model it is."""

    teacher_model: Text | None = None
    """As `rlhf.teacher_model`; for hf `model` says the same."""
    teacher_model_init_kwargs: dict[str, Any] | None = None
    """As `rlhf.teacher_model_init_kwargs`."""

    @model_validator(mode="before")
    @classmethod
    def _model_is_teacher_model(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("backend", "hf") != "hf" or value.get("model") is None:
            return value
        if value.get("teacher_model") is not None:
            return value  # both: a rule says that one of them is to go
        return {**{name: one for name, one in value.items() if name != "model"}, "teacher_model": value["model"]}


def _named_teachers(value: Any) -> Any:
    if isinstance(value, Mapping):
        if not value:
            raise wrong("expected teachers by name, got none")
        unusable = [name for name in value if not (isinstance(name, str) and _TEACHER_NAME.fullmatch(name))]
        if unusable:
            raise wrong("a teacher's name has letters, digits, - and _ alone, and begins with a letter or digit")
    return value


def _shares(value: Any) -> Any:
    if isinstance(value, Mapping):
        numbers = [one for one in value.values() if isinstance(one, (int, float)) and not isinstance(one, bool)]
        if len(numbers) < len(value) or not all(0 < one <= 1 for one in numbers):
            raise wrong("expected a share above 0 for each teacher, such as {math: 0.5, code: 0.5}")
        if not math.isclose(sum(numbers), 1, abs_tol=1e-6):
            raise wrong(f"the shares must add up to 1, and they add up to {sum(numbers):g}")
    return value


class _Teacher(Section):
    rlhf_type: Literal["gkd"] = "gkd"
    """Generalised knowledge distillation, the only method."""
    teacher_model: Text | None = None
    """Model folder or hub id of the teacher; needed when `teacher.backend` is hf and a KD weight is above 0."""
    teacher_model_init_kwargs: dict[str, Any] | None = None
    """Further keyword arguments of the teacher's `from_pretrained`; `dtype` is filled in when missing."""
    teacher: TeacherConfig = TeacherConfig()
    """How the teacher answers."""
    teachers: Annotated[dict[str, NamedTeacherConfig], BeforeValidator(_named_teachers)] | None = None
    """Several teachers by name, in place of `teacher` and `teacher_model`, each with their options: `{math: {backend:
    hf, teacher_model: …}, code: {backend: vllm, base_url: …, model: …}}`. A row is answered for by the one that its
    column `teacher` names, or its source's `teacher`; no other is asked about it."""
    mix: Annotated[dict[str, Number], BeforeValidator(_shares)] | None = None
    """Shares of `teachers` that add up to 1, such as `{math: 0.5, code: 0.5}`: all of them answer for every row, and
    the mean of their distributions (each at kd_temperature) is what the student learns."""


class RlhfConfig(LossAndSampling, _Teacher):  # Pydantic lists the fields of the last base first
    """The distillation: which teacher, which loss, whose answers."""


class CustomConfig(Section):
    """What trl does not have."""

    trainer_variant: Literal["gkd_monitor"] = "gkd_monitor"
    """Accepted for compatibility; there is one trainer."""
    sample_limit: Count | None = None
    """Use only the first n rows of all data (smoke tests)."""
    visual_kd: VisualKdConfig = VisualKdConfig()
    """Feature distillation of the vision path."""
    hidden_kd: HiddenKdConfig = HiddenKdConfig()
    """Distillation of the language model's hidden states."""


class LaunchConfig(Section):
    """Passed to `accelerate launch`."""

    num_processes: Count | None = None
    """Processes of all machines together; null takes one per visible device, on each machine."""
    config_file: Text | None = None
    """`ddp`, `fsdp2`, `zero2` or `zero3`, which come with kdtrain, or a YAML file of accelerate's own; a file of such a
    name is `./fsdp2`."""
    num_machines: Count | None = None
    """Machines of the run. The same command is given on each, but for its `machine_rank`."""
    machine_rank: Annotated[Whole, Field(ge=0)] | None = None
    """Which of the machines this one is, from 0."""
    main_process_ip: Text | None = None
    """Address of the machine of rank 0, as the others reach it."""
    main_process_port: Annotated[Whole, Field(ge=1, le=65535)] | None = None
    """Port there at which several machines meet; null takes 29500. One machine looks for a free one."""


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig
    """The student."""
    tuner: TunerConfig = TunerConfig()
    """What is trained."""
    data: DataConfig
    """What is trained on."""
    rlhf: RlhfConfig = RlhfConfig()
    """The distillation."""
    custom: CustomConfig = CustomConfig()
    """What trl does not have."""
    training: dict[str, Any] = {}
    """Any other field of trl's GKDConfig, by its own name, and those of `TrainingOptions`; only what the file sets is
    here."""
    launch: LaunchConfig = LaunchConfig()
    """Passed to `accelerate launch`."""

    @model_validator(mode="before")
    @classmethod
    def _every_section_is_there(cls, value: Any) -> Any:
        # So that a missing `data` is reported as the missing `data.train`, which is what has to be written.
        if isinstance(value, Mapping):
            return {**value, **{name: {} for name in ("model", "data", "training") if value.get(name) is None}}
        return value

    @property
    def options(self) -> DistillationOptions:
        """The options of loss and sampling, each from the section that has a field of its name."""
        sections = (self.rlhf, self._teacher_of_loss, self.custom)
        names = DistillationOptions.model_fields
        return DistillationOptions(**{n: next(getattr(s, n) for s in sections if hasattr(s, n)) for n in names})

    @property
    def _teacher_of_loss(self) -> TeacherConfig:
        """The one whose `tail` the loss has; of several the first with a top k, for they have to agree."""
        several = list((self.rlhf.teachers or {}).values())
        return next((one for one in several if one.is_served or one.backend == "cache"), self.rlhf.teacher)

    def of_teacher(self, name: str) -> RunConfig:
        """The config as if one of several teachers were the only one."""
        assert self.rlhf.teachers is not None
        named = self.rlhf.teachers[name]
        own = {field: getattr(named, field) for field in TeacherConfig.model_fields}
        rlhf = self.rlhf.model_copy(
            update={
                "teacher": TeacherConfig.model_construct(named.model_fields_set & own.keys(), **own),
                "teacher_model": named.teacher_model,
                "teacher_model_init_kwargs": named.teacher_model_init_kwargs,
                "teachers": None,
                "mix": None,
            }
        )
        return self.model_copy(update={"rlhf": rlhf})

    @property
    def by_teacher(self) -> dict[str, RunConfig]:
        """The config as if each of several teachers were the only one; itself under no name where there is one."""
        return {name: self.of_teacher(name) for name in self.rlhf.teachers} if self.rlhf.teachers else {"": self}

    @property
    def routes(self) -> tuple[str, ...]:
        """The names of the teachers that rows are dealt to; none where there is one, or all answer for every row."""
        return tuple(self.rlhf.teachers) if self.rlhf.teachers and not self.rlhf.mix and self.asks_teacher else ()

    @property
    def asks_server(self) -> bool:
        """Whether a teacher that is asked runs on a server."""
        return self.asks_teacher and any(one.rlhf.teacher.is_served for one in self.by_teacher.values())

    @property
    def training_options(self) -> TrainingOptions:
        """What `training` says that is no field of GKDConfig."""
        return TrainingOptions(**{n: v for n, v in self.training.items() if n in TrainingOptions.model_fields})

    @property
    def answers_from_teacher(self) -> bool:
        """Whether the teacher writes the answers of a data source before training."""
        return any(source.answers == "teacher" for source in (*self.data.train, *self.data.eval_sources))

    @property
    def all_generated(self) -> bool:
        """Whether every batch of training is generated, so that a prompt is all that a row needs."""
        return self.options.lm_kd_active and (self.rlhf.lmbda == 1 or self.rlhf.seq_kd)

    @property
    def checks_answers(self) -> bool:
        """Whether what the student writes is compared with the rows' column `answer`."""
        return self.rlhf.select_regex is not None and self.options.lm_kd_active and self.rlhf.lmbda > 0

    @property
    def chats(self) -> dict[str, Any]:
        """How conversations become tokens: the fields of `kdtrain.data.TemplateOptions`."""
        # A teacher with another tokenizer reads other texts altogether: see `kdtrain.data.other_tokenizer`.
        reads_them = self.asks_teacher and not self.options.crosses_tokenizers
        teacher = self.rlhf.teacher if reads_them else TeacherConfig()
        by_column = teacher.prefix if isinstance(teacher.prefix, dict) else {}
        return {
            **self.data.chats,
            "teacher_chat_template_kwargs": teacher.chat_template_kwargs or None,
            "teacher_prefix": by_column.get("default") if by_column else teacher.prefix,
            "teacher_prefix_column": by_column.get("column"),
            "teacher_prefix_mode": teacher.prefix_mode if teacher.prefix else "prepend",
        }

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher is loaded: for the loss, or only to write answers."""
        return self.options.needs_teacher or self.answers_from_teacher
