"""Every option of the schema does something: changed alone, it changes an argument, a loss, a batch or a message.

The walk is the schema's own, so that a new option fails here until the table says where its effect is seen.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

import datasets
import pytest
import torch
from pydantic import BaseModel

from kdtrain.config import ConfigLoader, RunConfig, TrainArguments, check_config
from kdtrain.config.arguments import Hardware, build_train_arguments
from kdtrain.config.options import DistillationOptions, TrainingOptions
from kdtrain.data import BuildReport
from kdtrain.data.batch import Batch, Rows
from kdtrain.errors import PreflightError
from kdtrain.feature_kd.grids import image_grids
from kdtrain.feature_kd.hooks import tapped
from kdtrain.feature_kd.term import feature_terms
from kdtrain.generation import decode
from kdtrain.generation.vllm import VllmSampler
from kdtrain.models import tuning
from kdtrain.runs import build, fit, read_data, student
from kdtrain.runs.build import Given, build_trainer
from kdtrain.runs.launch import launch_command, wanted_processes
from kdtrain.runs.report.facts import FactsReporter
from kdtrain.teachers import SelfTeacher
from kdtrain.teachers import build as teachers
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.reliance_weights import weights_by
from tests import tiny
from tests.test_feature_kd_term import enlarged
from tests.test_trainer import TopKTeacher
from tests.tiny_vision import make_inputs, make_vlm

GOOD: dict[str, Any] = {
    "model": {"model": "org/student"},
    "data": {"train": [{"path": "org/rows"}], "eval": [{"path": "org/held_out"}]},
    "rlhf": {"teacher_model": "org/teacher", "lmbda": 0.0, "max_new_tokens": 5},
    "training": {"output_dir": "runs/x", "eval_strategy": "steps"},
}
Outcome = Any


# ---- the schema's own walk -------------------------------------------------------------------------------------------


def options(model: type[BaseModel] = RunConfig, path: str = "") -> Iterator[str]:
    """Every field by its path; `[]` stands for a place in a list, `*` for a name in a map.

    Left out: fields with one allowed value, and sections, which are walked. Lists and maps of sections are both, and so
    is a section that stands where a number may stand too.
    """
    for name, info in model.model_fields.items():
        here = f"{path}{info.alias or name}"
        inner = sections(info.annotation)
        one_value = get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1
        if not one_value and (not inner or is_union(info.annotation) or any(kind for kind, _ in inner)):
            yield here
        for kind, section in inner:
            yield from options(section, f"{here}{kind}.")


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def sections(annotation: Any) -> list[tuple[str, type[BaseModel]]]:
    """The models inside an annotation, and whether they stand in a list or in a map."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [("", annotation)]
    kind = {tuple: "[]", list: "[]", dict: ".*"}.get(get_origin(annotation), "")
    return [(kind + deeper, model) for part in get_args(annotation) for deeper, model in sections(part)]


# ---- where effects are seen ------------------------------------------------------------------------------------------


def findings(config: dict[str, Any]) -> Outcome:
    """What the static check says: places, errors ("not available yet"), warnings."""
    result = check_config(config)
    return [(found.level, found.path, found.message) for found in (*result.errors, *result.warnings)]


def arguments(config: dict[str, Any]) -> TrainArguments:
    return build_train_arguments(ConfigLoader.load(config), Hardware(None, bf16=False, fp16=False, tf32=False))


def argument(name: str) -> Callable[[dict[str, Any]], Outcome]:
    """A field of GKDConfig."""
    return lambda config: getattr(arguments(config).training_args, name)


def built(name: str) -> Callable[[dict[str, Any]], Outcome]:
    """What building a run passes to a function that loads or reads."""

    def observe(config: dict[str, Any]) -> Outcome:
        calls = getattr(_build(arguments(config)), name).call_args_list
        assert calls, f"nothing calls {name}"
        return [(call.args, call.kwargs) for call in calls]

    return observe


def taught_by(config: dict[str, Any]) -> Outcome:
    """The kind of teacher that the trainer gets, and what a self teacher is made with."""
    teacher = _build(arguments(config)).GKDTrainerWithMetrics.call_args.kwargs["teacher"]
    return type(teacher).__name__, vars(teacher) if isinstance(teacher, SelfTeacher) else None


def teachers_of(config: dict[str, Any]) -> Outcome:
    """The same of several."""
    several = _build(arguments(config)).GKDTrainerWithMetrics.call_args.kwargs["teacher"]
    members = {
        name: vars(one) if isinstance(one, SelfTeacher) else type(one).__name__ for name, one in several.by_name.items()
    }
    return type(several).__name__, members


def connected(config: dict[str, Any]) -> Outcome:
    """What a teacher on a server and its connections are made with; of several the first."""
    options = [one.rlhf.teacher for one in ConfigLoader.load(config).by_teacher.values()]
    with mock.patch.object(teachers, "Servers") as servers, mock.patch.object(teachers, "ServedTeacher") as teacher:
        teachers.connect_teacher(options[0], 320)
    return servers.call_args, teacher.call_args.kwargs


def vllm(config: dict[str, Any]) -> Outcome:
    """What trl's class is told of the vLLM that writes the student's answers."""
    options, student = ConfigLoader.load(config).rlhf.generation, _models()[0]
    with mock.patch("trl.generation.vllm_generation.VLLMGeneration") as made:
        VllmSampler(options, lambda: student, mock.Mock(), None, rows=4)
    return made.call_args.kwargs


def frozen(config: dict[str, Any]) -> Outcome:
    """The parts that are frozen."""
    return _build(arguments(config)).freeze_parts.call_args.kwargs


def continued(config: dict[str, Any]) -> Outcome:
    """The adapter that the student comes with."""
    with mock.patch.object(student, "load_model"), mock.patch.object(student, "add_adapter") as added:
        student.load_student(ConfigLoader.load(config), torch.device("cpu"))
    return [call.args[1:] for call in added.call_args_list]


def rounded(config: dict[str, Any]) -> Outcome:
    """How the student's weights are rounded in each forward."""
    with mock.patch.object(student, "load_model"), mock.patch.object(student, "fake_quantize") as made:
        student.load_student(ConfigLoader.load(config), torch.device("cpu"))
    return [call.args[1:] for call in made.call_args_list]


def adapter(config: dict[str, Any]) -> Outcome:
    """The adapter that the trainer is told to train."""
    return _build(arguments(config)).GKDTrainerWithMetrics.call_args.kwargs["peft_config"]


def _build(arguments: TrainArguments) -> mock.Mock:
    """`build_trainer` with a stand-in for everything that takes time."""
    rows = datasets.Dataset.from_list([{"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}])
    calls = mock.Mock()
    calls.load_model.return_value, teacher = _models()
    calls.load_processing.return_value = _tokenizer()
    calls.build_dataset.return_value = rows, BuildReport(images=1, rows_kept=1, supervised_tokens=2)
    calls.build_teacher.return_value = mock.Mock(vocab_size=320, module=teacher)
    names = ("load_processing", "build_teacher", "write_answers", "freeze_parts")
    names += ("Collator", "check_images", "GKDTrainerWithMetrics", "check_startup")
    with (
        mock.patch.multiple(build, **{name: getattr(calls, name) for name in names}),
        mock.patch.object(read_data, "build_dataset", calls.build_dataset),
        mock.patch.object(student, "load_model", calls.load_model),
        mock.patch.object(tuning, "check_named_parts"),
        mock.patch.object(build, "resource_findings", return_value=[]),
    ):
        build_trainer(arguments.config, arguments.training_args, mock.Mock(), True, Given(), ExitStack())
    return calls


def launched(config: dict[str, Any]) -> Outcome:
    run = ConfigLoader.load(config)
    return launch_command(run, wanted_processes(run, 1), ["fit"], on_cpu=False)


@functools.cache
def _tokenizer() -> Any:
    return tiny.make_tokenizer()


def _models() -> tuple[Any, Any]:
    return tiny.make_qwen3(seed=1), tiny.make_qwen3(seed=2, hidden=48)


def trainer(config: dict[str, Any], top_k: int | None = None) -> GKDTrainerWithMetrics:
    """The Python class, given the arguments of a config."""
    student, teacher = _models()
    student.model.layers[0].self_attn.attention_dropout = 0.5
    return GKDTrainerWithMetrics(
        student,
        args=arguments(config).training_args,
        train_dataset=tiny.CHATS,
        eval_dataset=tiny.CHATS,
        processing_class=_tokenizer(),
        **({"teacher_model": teacher} if top_k is None else {"teacher": TopKTeacher(teacher, top_k)}),
    )


def loss(config: dict[str, Any]) -> Outcome:
    """The loss of a batch."""
    return _loss(trainer(config), train=True)


def loss_of_samples(config: dict[str, Any]) -> Outcome:
    """The loss of a batch that the student has written itself."""
    built = trainer(config)
    batch = dataclasses.replace(built.data_collator(tiny.CHATS), generated_by="student")
    return built.compute_loss(built.model, batch).item()


def loss_of_top_k(config: dict[str, Any]) -> Outcome:
    """The loss of a batch whose teacher names five tokens."""
    return _loss(trainer(config, top_k=5), train=True)


def evaluation_loss(config: dict[str, Any]) -> Outcome:
    """The loss of a batch in evaluation."""
    return _loss(trainer(config), train=False)


def _loss(trainer: GKDTrainerWithMetrics, train: bool) -> float:
    trainer.model.train(train)
    return trainer.compute_loss(trainer.model, trainer.data_collator(tiny.CHATS)).item()


def window(config: dict[str, Any]) -> Outcome:
    """The rows of an optimizer window as they are trained on."""
    built = trainer(config)
    batches, _ = built.get_batch_samples(iter([built.data_collator(tiny.CHATS)]), 1, torch.device("cpu"))
    return batches[0].model_inputs["input_ids"].tolist()


def kept_answers(config: dict[str, Any]) -> Outcome:
    """The answers of an optimizer window that are kept to be looked at."""
    built = trainer(config)
    built.get_batch_samples(iter([built.data_collator(tiny.CHATS)]), 1, torch.device("cpu"))
    return built.completions.newest


def reported(config: dict[str, Any]) -> Outcome:
    """Whether a run notes what its report will say."""
    building = mock.patch.object(fit, "build_trainer", side_effect=KeyboardInterrupt)
    with building as build_run, pytest.raises(KeyboardInterrupt):
        fit.fit(arguments(config), mock.Mock())
    return isinstance(build_run.call_args.args[2], FactsReporter)


def forwards(config: dict[str, Any]) -> Outcome:
    """Rows of each forward of a window."""
    built = trainer(config)
    batches, _ = built.get_batch_samples(iter([built.data_collator(tiny.CHATS)]), 1, torch.device("cpu"))
    return [len(batch) for one in batches for batch in getattr(one, "batches", [one])]


def lying(config: dict[str, Any]) -> Outcome:
    """What the student's forward takes."""
    built = trainer(config)
    with mock.patch.object(built, "compute_loss", side_effect=built.compute_loss) as called:
        batches, num_items = built.get_batch_samples(iter([built.data_collator(tiny.CHATS)]), 1, torch.device("cpu"))
        built.create_optimizer()
        built.training_step(built.model, batches[0], num_items)
    return [call.args[1].for_forward(built.model).model_inputs["input_ids"].tolist() for call in called.call_args_list]


def third_window(config: dict[str, Any]) -> Outcome:
    """The same of the third of ten steps."""
    built = trainer(config)
    built.state.global_step, built.state.max_steps = 2, 10
    batches, _ = built.get_batch_samples(iter([built.data_collator(tiny.CHATS)]), 1, torch.device("cpu"))
    return batches[0].model_inputs["input_ids"].tolist()


def written_together(config: dict[str, Any]) -> Outcome:
    """How many answers are written in each call."""
    with mock.patch.object(decode, "call_generate", side_effect=decode.call_generate) as call:
        window(config)
    return [len(one.args[1]) for one in call.call_args_list]


def dropout(config: dict[str, Any]) -> Outcome:
    """The probability of dropout in the student's attention."""
    return trainer(config).model.model.layers[0].self_attn.attention_dropout


@functools.cache
def _qwen3_vl() -> tuple[Any, Any, Any]:
    student, teacher = make_vlm("qwen3_vl", seed=1), make_vlm("qwen3_vl", seed=2)
    return student, teacher, make_inputs(student)


@functools.cache
def _gemma3() -> tuple[Any, Any, Any]:
    student, teacher = make_vlm("gemma3", seed=1), make_vlm("gemma3", seed=2, image_size=64)
    return student, teacher, make_inputs(student)


def visual(config: dict[str, Any]) -> Outcome:
    """The visual terms of a batch with images."""
    student, teacher, inputs = _qwen3_vl()
    return _visual(config, student, teacher, inputs, inputs)


def weights(config: dict[str, Any]) -> Outcome:
    """What the tokens of a row with an image count."""
    weighing = DistillationOptions.from_args(arguments(config).training_args).weighing
    labels = torch.tensor([[-100, *range(10)]])
    batch = Batch(model_inputs={"input_ids": labels}, labels=labels, rows=Rows(pictured=[True]))
    return weighing and weights_by(torch.arange(10.0), batch, weighing).tolist()


def visual_on_a_finer_grid(config: dict[str, Any]) -> Outcome:
    """The same where the teacher's vision encoder sees twice as many pixels a side, or why they cannot be compared."""
    student, teacher, inputs = _gemma3()
    try:
        return _visual(config, student, teacher, inputs, enlarged(inputs, 2))
    except PreflightError as error:
        return str(error)


def _visual(config: dict[str, Any], student: Any, teacher: Any, ours: Any, theirs: Any) -> Outcome:
    options = DistillationOptions.from_args(arguments(config).training_args).visual_kd
    if options is None:
        return None
    with tapped(options, student, teacher) as features, torch.no_grad():
        teacher(**theirs)
        student(**ours)
        terms = feature_terms(options, *features, 1.0, grids=image_grids(options, student, teacher, ours, theirs))
    return {name: term.item() for name, term in terms.items()}


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Another value of an option, and where it is seen."""

    value: Any
    seen: Callable[[dict[str, Any]], Outcome]
    beside: dict[str, Any] = field(default_factory=dict)
    """What else is set, before and after."""


LORA = {"tuner.train_type": "lora"}
VISUAL = {"custom.visual_kd.enabled": True}
HIDDEN = {"custom.hidden_kd.enabled": True}
VIT = {**VISUAL, "custom.visual_kd.targets": {"vit": {}, "aligner": {}}}

ITSELF = {**LORA, "rlhf.teacher.backend": "self", "rlhf.teacher.chat_template_kwargs": {"enable_thinking": True}}
PREFIX = {"rlhf.teacher.prefix": [{"role": "system", "content": "Think."}]}
SERVED = {
    "rlhf.teacher.backend": "vllm",
    "rlhf.teacher.base_url": "http://127.0.0.1:9/v1",
    "rlhf.teacher.model": "teacher",
}

VLLM_SERVER = {"rlhf.generation.backend": "vllm_server", "rlhf.generation.base_url": "http://127.0.0.1:8"}
COLOCATED = {"rlhf.generation.backend": "vllm_colocate"}
CACHE = {"rlhf.teacher.backend": "cache", "rlhf.teacher.path": "/targets", "rlhf.lmbda": 0.0}

SEVERAL = {"rlhf.teacher_model": None, "rlhf.teachers": {"vit": {"teacher_model": "org/teacher"}}}
ITSELF_OF_SEVERAL = {**LORA, "rlhf.teacher_model": None, "rlhf.teachers": {"vit": {"backend": "self"}}}
SERVED_OF_SEVERAL = {
    "rlhf.teacher_model": None,
    "rlhf.teachers": {"vit": {name.removeprefix("rlhf.teacher."): value for name, value in SERVED.items()}},
}

GROWING = {"rlhf.lmbda": 1.0, "rlhf.max_new_tokens": {"from": 4, "to": 20, "over": 0.5}}

CHANGES: dict[str, Change] = {
    "model.model": Change("org/other", built("load_model")),
    "model.revision": Change("v2", built("load_model")),
    "model.dtype": Change("bfloat16", built("load_model")),
    "model.attn_implementation": Change("sdpa", built("load_model")),
    "model.trust_remote_code": Change(True, built("load_model")),
    "model.quantization": Change("4bit", built("load_model"), LORA),
    "model.quantization_aware": Change("int4", rounded),
    "model.init_kwargs": Change({"subfolder": "best"}, built("load_model")),
    "model.adapter": Change("org/adapter", continued, LORA),
    "tuner.train_type": Change("lora", adapter),
    "tuner.lora_rank": Change(4, adapter, LORA),
    "tuner.lora_alpha": Change(8.0, adapter, LORA),
    "tuner.lora_dropout": Change(0.5, adapter, LORA),
    "tuner.target_modules": Change(["q_proj"], adapter, LORA),
    "tuner.modules_to_save": Change(["lm_head"], adapter, LORA),
    "tuner.use_dora": Change(True, adapter, LORA),
    "tuner.freeze_llm": Change(True, frozen),
    "tuner.freeze_vit": Change(True, frozen),
    "tuner.freeze_aligner": Change(True, frozen),
    "data.train": Change("org/other", built("build_dataset")),
    "data.eval": Change(None, built("build_dataset"), {"training.eval_strategy": "no"}),
    "data.max_length": Change(77, argument("max_length")),
    "data.on_overlength": Change("drop", built("build_dataset")),
    "data.train_on": Change("last", built("build_dataset")),
    "data.turns": Change("split", built("build_dataset")),
    "data.reasoning": Change("drop", built("build_dataset")),
    "data.control_tokens": Change("text", built("build_dataset")),
    "data.chat_template_kwargs": Change({"enable_thinking": False}, built("build_dataset")),
    "data.max_bad_rows": Change(3, built("build_dataset")),
    "data.image_root": Change("/pictures", built("build_dataset")),
    "data.processor_kwargs": Change({"max_pixels": 4096}, built("load_processing")),
    "data.packing": Change(True, lying),
    "data.padding_free": Change(True, lying),
    "data.cache_dir": Change("/somewhere", built("build_dataset")),
    "rlhf.teacher_model": Change("org/other", built("build_teacher")),
    "rlhf.teacher_model_init_kwargs": Change({"subfolder": "best"}, built("build_teacher")),
    "rlhf.teacher.backend": Change("self", taught_by, LORA),
    "rlhf.teacher.weights": Change("live", taught_by, ITSELF),
    "rlhf.teacher.ema_decay": Change(0.5, taught_by, {**ITSELF, "rlhf.teacher.weights": "ema"}),
    "rlhf.teacher.dtype": Change("float32", built("build_teacher")),
    "rlhf.teacher.device_map": Change("auto", built("build_teacher")),
    "rlhf.teacher.placement": Change("sharded", built("build_teacher")),
    "rlhf.teacher.quantization": Change("8bit", built("build_teacher")),
    "rlhf.teacher.adapter": Change("org/adapter", built("build_teacher")),
    "rlhf.teacher.revision": Change("v2", built("build_teacher")),
    "rlhf.teacher.processor_kwargs": Change({"max_pixels": 4096}, built("load_processing")),
    "rlhf.teacher.chat_template_kwargs": Change({"enable_thinking": True}, built("build_dataset")),
    "rlhf.teacher.prefix": Change([{"role": "system", "content": "Think."}], built("build_dataset")),
    "rlhf.teacher.prefix_mode": Change("system", built("build_dataset"), PREFIX),
    "rlhf.teacher.base_url": Change(["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"], connected, SERVED),
    "rlhf.teacher.model": Change("other", connected, SERVED),
    "rlhf.teacher.api_key_env": Change("KEY", connected, SERVED),
    "rlhf.teacher.top_k": Change(5, connected, SERVED),
    "rlhf.teacher.tail": Change("renormalize", loss_of_top_k),
    "rlhf.teacher.timeout_s": Change(5.0, connected, SERVED),
    "rlhf.teacher.max_retries": Change(1, connected, SERVED),
    "rlhf.teacher.concurrency": Change(2, connected, SERVED),
    "rlhf.teacher.lookahead": Change(0, connected, SERVED),
    "rlhf.teacher.api": Change("completions", connected, SERVED),
    "rlhf.teacher.max_requests": Change(7, connected, SERVED),
    "rlhf.generation.backend": Change("vllm_server", findings),
    "rlhf.generation.base_url": Change("http://127.0.0.1:9", vllm, VLLM_SERVER),
    "rlhf.generation.timeout_s": Change(5.0, vllm, VLLM_SERVER),
    "rlhf.generation.group_port": Change(50000, vllm, VLLM_SERVER),
    "rlhf.generation.gpu_memory_utilization": Change(0.5, vllm, COLOCATED),
    "rlhf.generation.tensor_parallel_size": Change(2, vllm, COLOCATED),
    "rlhf.generation.max_model_length": Change(512, vllm, COLOCATED),
    "rlhf.generation.enable_sleep_mode": Change(True, vllm, COLOCATED),
    "rlhf.generation.batch_size": Change(4, written_together, {"rlhf.lmbda": 1.0}),
    "rlhf.generation.top_p": Change(0.1, window, {"rlhf.lmbda": 1.0}),
    "rlhf.generation.top_k": Change(1, window, {"rlhf.lmbda": 1.0}),
    "rlhf.generation.min_p": Change(0.9, window, {"rlhf.lmbda": 1.0}),
    "rlhf.samples_per_prompt": Change(2, window, {"rlhf.lmbda": 1.0}),
    "rlhf.select": Change("best", window, {"rlhf.lmbda": 1.0, "rlhf.samples_per_prompt": 2}),
    "rlhf.select_regex": Change(r"(\d+)", built("build_dataset"), {"rlhf.lmbda": 1.0}),
    "rlhf.teacher.path": Change("/other", findings, CACHE),
    "rlhf.teachers": Change({"other": {"teacher_model": "org/teacher"}}, teachers_of, SEVERAL),
    "rlhf.mix": Change({"vit": 1.0}, teachers_of, SEVERAL),
    "rlhf.teachers.*.backend": Change("self", teachers_of, {**SEVERAL, **LORA}),
    "rlhf.teachers.*.weights": Change("ema", teachers_of, ITSELF_OF_SEVERAL),
    "rlhf.teachers.*.ema_decay": Change(
        0.5, teachers_of, {**ITSELF_OF_SEVERAL, "rlhf.teachers": {"vit": {"backend": "self", "weights": "ema"}}}
    ),
    "rlhf.teachers.*.teacher_model": Change("org/other", built("build_teacher"), SEVERAL),
    "rlhf.teachers.*.teacher_model_init_kwargs": Change({"subfolder": "best"}, built("build_teacher"), SEVERAL),
    "rlhf.teachers.*.tail": Change("renormalize", loss_of_top_k, SERVED_OF_SEVERAL),
    "rlhf.teachers.*.path": Change(
        "/other", findings, {**SEVERAL, "rlhf.teachers": {"vit": {"backend": "cache", "path": "/targets"}}}
    ),
    "rlhf.on_policy.divergence": Change("tvd", loss_of_samples, {"rlhf.lmbda": 1.0}),
    "rlhf.on_policy.beta": Change(0.1, loss_of_samples, {"rlhf.lmbda": 1.0}),
    "rlhf.llm_kd_weight": Change(0.5, loss),
    "rlhf.sft_alpha": Change(0.5, loss),
    "rlhf.cross_tokenizer": Change("alm", built("build_dataset")),
    "rlhf.beta": Change(0.1, loss),
    "rlhf.divergence": Change("mixed_kl", loss),
    "rlhf.skew_alpha": Change(0.5, loss, {"rlhf.divergence": "skew_kl"}),
    "rlhf.ab_alpha": Change(0.5, loss, {"rlhf.divergence": "alpha_beta"}),
    "rlhf.ab_beta": Change(0.5, loss, {"rlhf.divergence": "alpha_beta"}),
    "rlhf.entropy_threshold": Change(100.0, loss, {"rlhf.divergence": "entropy_aware"}),
    "rlhf.kd_temperature": Change(2.0, loss),
    "rlhf.token_selection": Change({"keep": 0.25}, loss),
    "rlhf.token_selection.by": Change("disagreement", loss, {"rlhf.token_selection.keep": 0.25}),
    "rlhf.token_selection.keep": Change(0.25, loss, {"rlhf.token_selection.by": "student_entropy"}),
    "rlhf.token_weights": Change({}, weights),
    "rlhf.token_weights.top": Change(0.5, weights, {"rlhf.token_weights.by": "visual_reliance"}),
    "rlhf.token_weights.share": Change(0.75, weights, {"rlhf.token_weights.by": "visual_reliance"}),
    "rlhf.lmbda": Change(1.0, window),
    "rlhf.seq_kd": Change(True, window),
    "rlhf.temperature": Change(0.1, window, {"rlhf.lmbda": 1.0}),
    "rlhf.max_new_tokens": Change(3, window, {"rlhf.lmbda": 1.0}),
    "rlhf.max_new_tokens.from": Change(2, third_window, GROWING),
    "rlhf.max_new_tokens.to": Change(40, third_window, GROWING),
    "rlhf.max_new_tokens.over": Change(0.2, third_window, GROWING),
    "rlhf.disable_dropout": Change(False, dropout),
    "rlhf.eval_kd": Change(False, evaluation_loss),
    "custom.sample_limit": Change(3, built("build_dataset")),
    "custom.hidden_kd.enabled": Change(True, loss),
    "custom.hidden_kd.weight": Change(0.5, loss, HIDDEN),
    "custom.hidden_kd.distance": Change("cosine", loss, HIDDEN),
    "custom.hidden_kd.targets.layer": Change([0.5], loss, HIDDEN),
    "custom.visual_kd.enabled": Change(True, visual),
    "custom.visual_kd.weight": Change(0.5, visual, VISUAL),
    "custom.visual_kd.distance": Change("cosine", visual, VISUAL),
    "custom.visual_kd.targets": Change(["vit"], visual, VISUAL),
    "custom.visual_kd.targets.*.weight": Change(0.5, visual, VIT),
    "custom.visual_kd.targets.*.distance": Change("cosine", visual, VIT),
    "custom.visual_kd.targets.*.module": Change("model.visual.blocks.0", visual, VIT),
    "custom.visual_kd.targets.*.student_module": Change("model.visual.blocks.0", visual, VIT),
    "custom.visual_kd.targets.*.teacher_module": Change("model.visual.blocks.0", visual, VIT),
    "custom.visual_kd.targets.*.match": Change("interpolate", visual_on_a_finer_grid, VIT),
    "training": Change({"output_dir": "runs/x", "max_steps": 7}, argument("max_steps")),
    "training.per_device_train_tokens": Change(40, forwards),
    "training.report": Change(False, reported),
    "training.early_stopping_patience": Change(2, argument("early_stopping_patience")),
    "training.log_completions_steps": Change(1, kept_answers, {"rlhf.lmbda": 1.0}),
    "launch.num_processes": Change(2, launched),
    "launch.config_file": Change("fsdp2", launched),
    "launch.num_machines": Change(3, launched, {"launch.num_processes": 6}),
    "launch.machine_rank": Change(1, launched, {"launch.num_machines": 2}),
    "launch.main_process_ip": Change("10.0.0.1", launched, {"launch.num_machines": 2}),
    "launch.main_process_port": Change(7000, launched, {"launch.num_machines": 2}),
}
for _name in ("chat_template_kwargs", "prefix", "prefix_mode"):  # the first two are not available for several yet
    CHANGES[f"rlhf.teachers.*.{_name}"] = Change(CHANGES[f"rlhf.teacher.{_name}"].value, findings, SEVERAL)
for _name, _change in list(CHANGES.items()):
    if _name.startswith("rlhf.teacher.") and (_own := _name.replace("teacher.", "teachers.*.", 1)) not in CHANGES:
        CHANGES[_own] = Change(_change.value, _change.seen, SERVED_OF_SEVERAL if _change.beside is SERVED else SEVERAL)
SOURCE = {
    "path": Change("org/other", built("build_dataset")),
    "name": Change("subset", built("build_dataset")),
    "split": Change("test", built("build_dataset")),
    "columns": Change({"prompt": "question"}, built("build_dataset")),
    "streaming": Change(True, findings),  # of data.train that max_steps is missing
    "limit": Change(3, built("build_dataset")),
    "weight": Change(2.0, built("build_dataset")),
    "ce": Change(False, built("build_dataset")),
    "answers": Change("teacher", built("build_dataset")),
    "teacher": Change("math", findings),
    "divergence": Change("tvd", built("build_dataset")),
    "beta": Change(0.1, built("build_dataset")),
}
for _part in ("train", "eval"):
    CHANGES |= {f"data.{_part}[].{name}": change for name, change in SOURCE.items()}


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with options set by their paths."""
    result = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.replace("[]", ".0").replace("*", "vit").split(".")
        holder = result
        for parent in parents:
            holder = holder[0] if isinstance(holder, list) else holder.setdefault(parent, {})
        holder[last] = copy.deepcopy(value)
    return result


def test_the_table_has_every_option_of_the_schema() -> None:
    walked = [*options(), *options(TrainingOptions, "training.")]
    print(f"\n{len(walked)} options")
    assert sorted(CHANGES) == sorted(walked)


@pytest.mark.parametrize("option", sorted(CHANGES))
def test_an_option_does_something(option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    change = CHANGES[option]
    before = changed(GOOD, change.beside)
    found = change.seen(before)
    assert found == change.seen(before), "what is looked at changes by itself"
    assert found != change.seen(changed(before, {option: change.value}))
