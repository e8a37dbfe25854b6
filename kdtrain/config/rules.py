"""What takes two options to see: conflicts, what is missing, and options that have no effect beside others.

Every rule gets what was written too: `temperature` without generation deserves a warning only where somebody set it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter

from kdtrain.config.adapters import continued_adapter
from kdtrain.config.best_step import best_step
from kdtrain.config.cached import cached_teacher, features_of
from kdtrain.config.divergence import NUMBERS_OF, divergence_numbers, renormalized_tail
from kdtrain.config.folders import model_folders, output_folder
from kdtrain.config.from_pretrained import loading_arguments, processor_arguments
from kdtrain.config.generation import generation_by_vllm
from kdtrain.config.model_pair import same_model
from kdtrain.config.other_tokenizer import cross_tokenizer
from kdtrain.config.placement import teacher_placement
from kdtrain.config.quantized import quantized_models
from kdtrain.config.schema import RunConfig, TeacherConfig
from kdtrain.config.server_urls import check_server_urls
from kdtrain.config.several import broken_of, each_teacher, is_about_teacher, losses_of_rows, several_teachers
from kdtrain.config.splits import share_rows
from kdtrain.config.streams import streamed_sources
from kdtrain.config.token_weight_rules import token_weights
from kdtrain.config.tree import KeyPath, Node, Problem, Written, dotted, get, locate

_SERVER = (
    "base_url",
    "model",
    "api_key_env",
    "api",
    "max_requests",
    "top_k",
    "tail",
    "timeout_s",
    "max_retries",
    "concurrency",
    "lookahead",
    "chat_template_kwargs",
    "prefix",
    "prefix_mode",
)
# By backend: the options of `rlhf.teacher` that it has, and which options name the teacher.
_TEACHER_OPTIONS: dict[str, tuple[str, ...]] = {
    "hf": (
        "dtype",
        "device_map",
        "placement",
        "quantization",
        "adapter",
        "revision",
        "chat_template_kwargs",
        "prefix",
        "prefix_mode",
        "processor_kwargs",
    ),
    "self": ("weights", "ema_decay", "chat_template_kwargs", "prefix", "prefix_mode"),
    "vllm": _SERVER,
    "openai": _SERVER,
    # A cache is trained from by the config that it was written by: what says how the teacher is asked stays there.
    "cache": tuple(TeacherConfig.model_fields),
}
_REQUIRED_BY: dict[str, tuple[str, ...]] = {
    "hf": ("rlhf.teacher_model",),
    "self": (),
    "vllm": ("rlhf.teacher.base_url", "rlhf.teacher.model"),
    "openai": ("rlhf.teacher.base_url", "rlhf.teacher.model"),
    "cache": ("rlhf.teacher.path",),
}
NO_MOVE = "teaches nothing"
# Arguments of from_pretrained that are options of `model`, and their name there.
_MODEL_OPTIONS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "revision",
    "attn_implementation": "attn_implementation",
    "quantization_config": "quantization",
}
_SCHEDULES = (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps"), ("logging_strategy", "logging_steps"))


Rule = Callable[[RunConfig, Written], Iterator[Problem]]


def teacher_is_named(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A run needs a teacher exactly when a KD weight is above 0, or it has to write answers."""
    if not config.asks_teacher:
        return
    rlhf = config.rlhf
    if config.options.lm_kd_active:
        reason = f"rlhf.llm_kd_weight is {rlhf.llm_kd_weight:g}"
        turn_off = "or rlhf.llm_kd_weight: 0 for plain fine-tuning"
    elif config.options.needs_teacher:
        name = "visual_kd" if config.options.visual_kd is not None else "hidden_kd"
        reason, turn_off = f"custom.{name} is enabled", f"or disable {name}"
    else:
        reason, turn_off = "a data source has answers: teacher", "or remove answers: teacher"
    backend = rlhf.teacher.backend
    for option in _REQUIRED_BY[backend]:
        if not attrgetter(option)(config):
            message, hint = f"a teacher is needed, because {reason}", f"set {option}, {turn_off}"
            if backend == "hf" and rlhf.teacher.prefix is not None and not written.has("rlhf", "teacher", "backend"):
                hint = f"set rlhf.teacher.backend: self to let the student teach itself with the prefix, or {hint}"
            yield Problem(tuple(option.split(".")), message, hint, on_key=True, missing=True)


def idle_distillation(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Options of a term that is switched off."""
    rlhf = config.rlhf
    if not config.asks_teacher:
        names = ("teacher_model", "teacher_model_init_kwargs", "teacher")
        yield from written.idle(names, "nothing asks the teacher, so none is loaded", "rlhf")
    if not config.options.needs_teacher:
        yield from written.idle(["eval_kd"], "nothing asks the teacher", "rlhf")
    sampling = ["temperature"] if config.answers_from_teacher else ["temperature", "max_new_tokens"]
    teachers = [one.rlhf.teacher for one in config.by_teacher.values()]
    if config.answers_from_teacher and any(one.is_served and one.api != "completions" for one in teachers):
        sampling = []  # messages are answered at this temperature
    sampled = [name for name in ("lmbda", "seq_kd") if getattr(rlhf, name)]
    completions = ["log_completions_steps"] if config.training_options.log_completions_steps else []
    if not config.options.lm_kd_active:
        zero = "rlhf.llm_kd_weight is 0"
        generation = [*sampled, *sampling] if any(written.has("rlhf", name) for name in sampled) else []
        of_divergence = ["divergence", *NUMBERS_OF, "kd_temperature", "token_selection", "token_weights"]
        yield from written.idle([*of_divergence, *generation], zero, "rlhf")
        yield from written.idle(completions, f"{zero}, so no answers are generated while training", "training")
        if rlhf.sft_alpha > 0 and written.has("rlhf", "sft_alpha"):
            message = f"is ignored: {zero}, so cross-entropy has weight 1.0"
            yield Problem(("rlhf", "sft_alpha"), message, level="warning", on_key=True)
    elif not sampled:
        reason = "nothing is sampled (lmbda is 0 and seq_kd is false)"
        yield from written.idle(sampling, reason, "rlhf")
        yield from written.idle(completions, reason, "training")
    if config.answers_from_teacher and not (config.options.lm_kd_active and sampled):
        reason = "no step samples, and answers that are written before training may have `to` tokens"
        yield from written.idle(["from", "over"], reason, "rlhf", "max_new_tokens")
    if config.options.lm_kd_active and rlhf.token_selection is not None and rlhf.token_selection.keep == 1:
        yield from written.idle(["token_selection"], "its keep is 1, which is every token", "rlhf")


def rows_in_lines(config: RunConfig, written: Written) -> Iterator[Problem]:
    """What cannot be beside `padding_free` and `packing`, and what has no effect there."""
    data = config.data
    option: KeyPath = ("data", "packing" if data.packing else "padding_free")
    if not (data.packing or data.padding_free):
        return
    if data.packing:
        yield from written.idle(["padding_free"], "data.packing joins rows already", "data")
    if config.options.visual_kd is not None:
        message = "is for text, and custom.visual_kd needs rows with images"
        yield Problem(option, message, "remove one of them", on_key=True)
    if config.training.get("neftune_noise_alpha"):
        message = "cannot be beside training.neftune_noise_alpha, whose noise depends on how long a row is"
        yield Problem(option, message, "remove one of them", on_key=True)


def idle_selection(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A choice among answers of the student, where it writes none, or one to each prompt."""
    rlhf = config.rlhf
    if not config.options.lm_kd_active or rlhf.lmbda == 0:
        off = "rlhf.lmbda is 0, the student writes no answers" if rlhf.lmbda == 0 else "rlhf.llm_kd_weight is 0"
        yield from written.idle(["samples_per_prompt", "select", "select_regex"], off, "rlhf")
    elif rlhf.samples_per_prompt == 1 and rlhf.select != "all":
        yield from written.idle(["select"], "rlhf.samples_per_prompt is 1", "rlhf")


def commented_regex(config: RunConfig, written: Written) -> Iterator[Problem]:
    """`select_regex: #### (\\S+)`, of which YAML takes everything for a comment."""
    path = ("rlhf", "select_regex")
    node = get(written.root, path)
    place = locate(written.root, path, on_key=True)
    if node is None or node.value is not None or place.line is None:
        return
    if re.search(r"select_regex[\"']?\s*:\s+#", place.source.lines[place.line - 1]):
        message = "is empty: to YAML what begins with # is a comment"
        hint = "put the expression into single quotes, or write null where there is none"
        yield Problem(path, message, hint, level="warning", on_key=True)


def idle_generation(config: RunConfig, written: Written) -> Iterator[Problem]:
    """How answers are written, where nobody in this process writes any."""
    rlhf, path = config.rlhf, ("rlhf", "generation")
    reason = "rlhf.llm_kd_weight is 0" if not config.options.lm_kd_active else "rlhf.lmbda is 0"
    if rlhf.lmbda == 0 or not config.options.lm_kd_active:
        names = ["top_p", "top_k", "min_p"]
        if not (rlhf.seq_kd and config.options.lm_kd_active):
            names.append("batch_size")
        yield from written.idle(names, f"the student writes no answers ({reason})", *path)


def always_on_policy(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Options about answers of the data, where the student writes all of them."""
    if not config.options.lm_kd_active or config.rlhf.lmbda < 1:
        return
    reason = "rlhf.lmbda is 1, every answer in training is the student's own"
    if config.rlhf.sft_alpha > 0 and config.data.eval is None:
        yield from written.idle(["sft_alpha"], f"{reason}, without cross-entropy", "rlhf")
    if config.rlhf.seq_kd:
        yield from written.idle(["seq_kd"], reason, "rlhf")
    for number, source in enumerate(config.data.train):
        if source.answers == "teacher":
            yield from written.idle(["answers"], reason, "data", "train", number)


def frozen_parts(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Freezing that leaves nothing to train, or nothing for a visual target to teach."""
    frozen = {part for part, is_frozen in config.tuner.frozen.items() if is_frozen}
    if len(frozen) == 3:
        yield Problem(("tuner", "freeze_llm"), "nothing is left to train: all three parts are frozen", on_key=True)
        return
    visual = config.options.visual_kd
    for name, target in {} if visual is None else visual.targets.items():
        before = {"vit"} if name == "vit" else {"vit", "aligner"}
        if before <= frozen and target.student_module is None:
            options = " and ".join(f"tuner.freeze_{part}" for part in sorted(before, reverse=True))
            message = f"cannot teach: all that leads to it is frozen by {options}"
            path = ("custom", "visual_kd", "targets", name)
            yield Problem(path, message, "remove the target, or train some of it")


def teacher_options(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Options of another backend, and the dtype given twice."""
    backend = config.rlhf.teacher.backend
    reason = f"rlhf.teacher.backend is {backend}"
    for name in TeacherConfig.model_fields:
        if name not in ("backend", *_TEACHER_OPTIONS[backend]):
            yield from written.idle([name], reason, "rlhf", "teacher")
    yield from _prefix(config, written)
    if config.rlhf.teacher.is_served:
        yield from _served(config, written)
    if backend == "self" and config.asks_teacher:
        yield from _itself(config, written)
    kwargs = config.rlhf.teacher_model_init_kwargs or {}
    path = ("rlhf", "teacher_model_init_kwargs")
    if backend not in ("hf", "cache") and kwargs and config.asks_teacher:
        yield from written.idle(["teacher_model_init_kwargs"], reason, "rlhf")
    for name in ("dtype", "torch_dtype", "revision", "device_map"):
        option = name.removeprefix("torch_")
        if name in kwargs and written.has("rlhf", "teacher", option):
            message = f"given twice, here and in rlhf.teacher.{option}"
            yield Problem((*path, name), message, "keep one of them", on_key=True)
    yield from loading_arguments(path, kwargs, config.rlhf.teacher_model)


def _itself(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Weights of the student that cannot teach it, and options of another model."""
    teacher, path = config.rlhf.teacher, ("rlhf", "teacher")
    if teacher.weights == "base" and config.tuner.train_type != "lora":
        message = "needs tuner.train_type: lora: the teacher is the student without its adapter, and where all weights "
        hint = "train an adapter, or use weights: live or ema, or backend: hf with a teacher_model"
        yield Problem((*path, "weights"), f"base {message}are trained nothing is left of what they were", hint)
    reads_the_same = not teacher.chat_template_kwargs and teacher.prefix is None
    if teacher.weights == "live" and config.options.needs_teacher and reads_the_same:
        message = "live teaches nothing: the teacher is the student as it is and reads the same, so their divergence "
        hint = "give the teacher a prefix or chat_template_kwargs of its own, or use weights: base or ema"
        yield Problem((*path, "weights"), f"{message}is 0", hint)
    takes_no_ce = config.rlhf.sft_alpha == 0 or config.rlhf.lmbda == 1
    if teacher.weights == "base" and config.options.lm_kd_active and reads_the_same and takes_no_ce:
        message = f"{NO_MOVE}: the teacher is the student without its adapter and reads the same, and no "
        hint = "give the teacher a prefix or chat_template_kwargs of its own"
        message += "cross-entropy moves the student away from it, so their divergence is 0"
        yield Problem((*path, "backend"), message, hint, level="warning", on_key=True)
    if config.options.visual_kd is not None:
        message = "cannot be combined with custom.visual_kd: the teacher's features are those of the same modules"
        yield Problem((*path, "backend"), message, "use backend: hf, or set custom.visual_kd.enabled: false")
    if teacher.weights != "ema":
        yield from written.idle(["ema_decay"], f"rlhf.teacher.weights is {teacher.weights}", *path)
    if config.rlhf.teacher_model is not None:
        yield from written.idle(["teacher_model"], "rlhf.teacher.backend is self", "rlhf")


def _prefix(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A mode of no prefix, and a prefix without the system message that its mode is about."""
    teacher, path = config.rlhf.teacher, ("rlhf", "teacher")
    if teacher.prefix is None:
        yield from written.idle(["prefix_mode"], "there is no rlhf.teacher.prefix", *path)
        return
    is_column = isinstance(teacher.prefix, dict)
    messages = teacher.prefix.get("default") if is_column else teacher.prefix
    if teacher.prefix_mode == "system" and messages and messages[0]["role"] not in ("system", "developer"):
        message = "system puts a system message in place of the row's, and the prefix does not begin with one"
        yield Problem((*path, "prefix_mode"), message, "begin it with a system message, or use prepend")


def _served(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Addresses that a key or data must not be sent to, and options of targets or answers where there are none."""
    teacher, path = config.rlhf.teacher, ("rlhf", "teacher")
    with_key = teacher.api_key_env is not None
    yield from check_server_urls((*path, "base_url"), teacher.base_url or (), with_key=with_key)
    yield from features_of(config, f"{teacher.backend} is a server")
    if config.options.lm_kd_active and teacher.api == "chat":
        message = f"only writes answers, and rlhf.llm_kd_weight is {config.rlhf.llm_kd_weight:g}: text has no"
        hint = "set rlhf.llm_kd_weight: 0, or use a server with log-probabilities of prompts (vLLM) and api: auto"
        yield Problem((*path, "api"), f"{message} log-probabilities to learn from", hint, on_key=True)
    if not config.options.lm_kd_active:
        yield from written.idle(["top_k", "tail", "lookahead"], "rlhf.llm_kd_weight is 0", *path)
    if not (config.answers_from_teacher or config.rlhf.seq_kd):
        yield from written.idle(["api", "max_requests"], "the teacher writes no answers", *path)


def model_options(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Student options hidden in `init_kwargs`."""
    kwargs, path = config.model.init_kwargs, ("model", "init_kwargs")
    for name, option in _MODEL_OPTIONS.items():
        if name in kwargs:
            yield Problem((*path, name), "has its own option", f"use model.{option}", on_key=True)
    kwargs = {name: value for name, value in kwargs.items() if name not in _MODEL_OPTIONS}
    yield from loading_arguments(path, kwargs, config.model.model)


def processor_options(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Settings of processors that have their own option."""
    yield from processor_arguments(("data", "processor_kwargs"), config.data.processor_kwargs)
    own = config.rlhf.teacher.processor_kwargs or {}
    yield from processor_arguments(("rlhf", "teacher", "processor_kwargs"), own)


def idle_lora(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Adapter options of a run that trains all weights, or an adapter that is there already."""
    names = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora")
    if config.tuner.train_type == "full":
        yield from written.idle(names, "tuner.train_type is full", "tuner")
        if config.model.adapter is not None:
            message = "is gone on with by LoRA, and tuner.train_type is full"
            hint = "set tuner.train_type: lora; or for all weights name the adapter's folder as model.model"
            yield Problem(("model", "adapter"), message, hint)
    elif (adapter := continued_adapter(config)) is not None:
        yield from written.idle(names, f"the adapter {adapter} is gone on with as it is", "tuner")
    elif config.tuner.lora_dropout > 0 and config.rlhf.disable_dropout:
        yield from written.idle(["lora_dropout"], "rlhf.disable_dropout is true", "tuner")


def idle_ce(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Rows kept out of a cross-entropy that is not computed."""
    for number, source in enumerate(config.data.train):
        if config.options.ce_weight == 0 and not source.ce:
            reason = "rlhf.sft_alpha is 0, no row contributes cross-entropy"
            yield from written.idle(["ce"], reason, "data", "train", number)


def visual_options(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Options of a visual term that is off, or has nothing to compare."""
    path, visual = ("custom", "visual_kd"), config.custom.visual_kd
    if not visual.enabled:
        yield from written.idle(("weight", "distance", "targets"), "custom.visual_kd.enabled is false", *path)
        return
    if visual.weight == 0:
        yield from written.idle(["enabled"], "custom.visual_kd.weight is 0", *path)
    for name in ("chat_template_kwargs", "prefix"):
        if visual.weight and getattr(config.rlhf.teacher, name):
            message = "cannot be combined with custom.visual_kd yet: the teacher would read images among other tokens"
            yield Problem(("rlhf", "teacher", name), message, "remove one of them", on_key=True)
    for name, target in visual.targets.items():
        if target.module and (target.student_module or target.teacher_module):
            message = "given together with student_module or teacher_module"
            yield Problem((*path, "targets", name, "module"), message, "keep one of the two forms")


def hidden_options(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Options of a term over hidden states that is off."""
    path, hidden = ("custom", "hidden_kd"), config.custom.hidden_kd
    if not hidden.enabled:
        yield from written.idle(("weight", "distance", "targets"), "custom.hidden_kd.enabled is false", *path)
    elif hidden.weight == 0:
        yield from written.idle(["enabled"], "custom.hidden_kd.weight is 0", *path)


def evaluation(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Data without a schedule, and a schedule without data."""
    strategy = config.training.get("eval_strategy", "no")
    if config.data.eval is None:
        if strategy != "no":
            message = f"evaluation asked for ({strategy}) without data"
            yield Problem(("training", "eval_strategy"), message, "set data.eval, or eval_strategy: no")
        used = {"eval_strategy"} | ({"per_device_eval_batch_size"} if config.answers_from_teacher else set())
        names = [k for k in config.training if k not in used and (k.startswith("eval_") or "_eval" in k)]
        yield from written.idle(names, "there is no data.eval", "training")
        if config.options.needs_teacher:
            yield from written.idle(["eval_kd"], "there is no data.eval", "rlhf")
    elif strategy == "no" and not config.training.get("eval_on_start"):
        message = "is not used while training: training.eval_strategy is no"
        hint = "set training.eval_strategy: steps, unless it is for kdtrain evaluate alone"
        yield Problem(("data", "eval"), message, hint, level="warning", on_key=True)
    if strategy == "no":
        for key in ("load_best_model_at_end", "lr_scheduler_type", "early_stopping_patience"):
            value = config.training.get(key)
            if value in (True, "reduce_lr_on_plateau", "greedy") or (key == "early_stopping_patience" and value):
                yield Problem(("training", key), "needs evaluation", "set data.eval and training.eval_strategy: steps")
    elif config.training_options.early_stopping_patience and not config.training.get("load_best_model_at_end"):
        message = "will save the model of the last step, which is not the best one"
        hint = "set training.load_best_model_at_end: true, and save_strategy and save_steps like those of evaluation"
        yield Problem(("training", "early_stopping_patience"), message, hint, level="warning")


def evaluation_on_training_rows(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Rows of one file and split to train and to evaluate on, as far as their names and slices show it."""
    for number, source in enumerate(config.data.eval_sources):
        trained = [one for one in config.data.train if (one.path, one.name) == (source.path, source.name)]
        if any(share_rows(source.split, one.split) for one in trained):
            message = "names rows of data.train: evaluation would be on what was trained on"
            hint = "hold rows out, data.eval: 5%, or split both: train[:90%] and train[90%:]"
            yield Problem(("data", "eval", number), message, hint, level="warning")


def training_conflicts(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Fields of `training` that contradict or silence one another."""
    training = config.training
    if not training.get("output_dir"):
        message, hint = "is required: the folder that the run writes to", "for example training.output_dir: runs/first"
        yield Problem(("training", "output_dir"), message, hint, on_key=True)
    for pair in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if training.get(pair[0]) and training.get(pair[1]):
            yield Problem(("training", pair[1]), f"cannot be combined with {pair[0]}", "keep one of them", on_key=True)
    if (training.get("max_steps") or -1) > 0 and "num_train_epochs" in training:
        yield from written.idle(["num_train_epochs"], "training.max_steps is set", "training")
    steps, warmup = training.get("max_steps") or -1, training.get("warmup_steps") or 0
    if 0 < steps <= warmup and warmup >= 1:
        message = f"the learning rate never reaches its value: training.max_steps is {steps}"
        yield Problem(("training", "warmup_steps"), message, "a value below 1 is a share of all steps", level="warning")
    if training.get("dataloader_prefetch_factor") and not training.get("dataloader_num_workers"):
        yield Problem(("training", "dataloader_prefetch_factor"), "needs dataloader_num_workers above 0", on_key=True)
    if training.get("save_total_limit") == 1:
        message = "2 checkpoints are kept: while one is written, the older must stay"
        yield Problem(("training", "save_total_limit"), message, level="warning")
    if training.get("save_only_model") and training.get("save_strategy") != "no":
        message = "checkpoints hold the model alone: --resume cannot go on from them"
        yield Problem(
            ("training", "save_only_model"), message, "remove it, unless the run may be lost", level="warning"
        )
    for strategy, steps in _SCHEDULES:
        idle = steps in training and training.get(strategy, "steps") != "steps"
        if idle and (strategy != "eval_strategy" or config.data.eval is not None):
            yield from written.idle([steps], f"training.{strategy} is {training[strategy]}", "training")


_KD_SWITCHES = (
    "rlhf.llm_kd_weight",
    *(f"custom.{term}.{name}" for term in ("visual_kd", "hidden_kd") for name in ("enabled", "weight")),
    "data.train",
    "data.eval",
)

# A rule, and the options it reads: where one of them is wrong in itself, the rule would only guess.
RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (teacher_is_named, (*_KD_SWITCHES, "rlhf.teacher_model", "rlhf.teacher")),
    (idle_distillation, (*_KD_SWITCHES, "rlhf.lmbda", "rlhf.seq_kd", "rlhf.sft_alpha", "rlhf.token_selection")),
    (idle_generation, ("rlhf.llm_kd_weight", "rlhf.lmbda", "rlhf.seq_kd")),
    (teacher_options, (*_KD_SWITCHES, "rlhf.teacher", "rlhf.teacher_model_init_kwargs", "tuner.train_type")),
    (
        cached_teacher,
        (
            *_KD_SWITCHES,
            "rlhf.teacher",
            "rlhf.lmbda",
            "rlhf.seq_kd",
            "rlhf.beta",
            "rlhf.divergence",
            "rlhf.kd_temperature",
            "rlhf.token_selection",
            "rlhf.cross_tokenizer",
        ),
    ),
    (
        generation_by_vllm,
        ("rlhf.llm_kd_weight", "rlhf.lmbda", "rlhf.temperature", "rlhf.generation", "rlhf.teacher", "tuner.use_dora"),
    ),
    (renormalized_tail, (*_KD_SWITCHES, "rlhf.teacher", "rlhf.beta", "rlhf.divergence", "rlhf.on_policy")),
    (divergence_numbers, (*_KD_SWITCHES, "rlhf.divergence", "rlhf.ab_alpha", "rlhf.ab_beta", "rlhf.on_policy")),
    (
        cross_tokenizer,
        (
            *_KD_SWITCHES,
            "rlhf.cross_tokenizer",
            "rlhf.teacher",
            "rlhf.seq_kd",
            "rlhf.select",
            "rlhf.samples_per_prompt",
            "rlhf.lmbda",
            "data.train_on",
        ),
    ),
    (
        token_weights,
        (
            *(*_KD_SWITCHES, "rlhf.token_weights", "rlhf.teacher.backend", "rlhf.token_selection"),
            *("rlhf.cross_tokenizer", "data.packing", "data.padding_free"),
        ),
    ),
    (several_teachers, (*_KD_SWITCHES, "rlhf.teachers", "rlhf.mix", "rlhf.seq_kd", "rlhf.token_weights")),
    (
        losses_of_rows,
        (
            *(*_KD_SWITCHES, "rlhf.divergence", "rlhf.beta", "rlhf.on_policy", "rlhf.lmbda", "rlhf.eval_kd"),
            "rlhf.cross_tokenizer",
        ),
    ),
    (idle_selection, ("rlhf.llm_kd_weight", "rlhf.lmbda", "rlhf.samples_per_prompt", "rlhf.select")),
    (commented_regex, ()),
    (rows_in_lines, ("data.packing", "data.padding_free", "custom.visual_kd", "training.neftune_noise_alpha")),
    (model_options, ("model.init_kwargs", "model.model")),
    (processor_options, ("data.processor_kwargs", "rlhf.teacher.processor_kwargs")),
    (idle_lora, ("model.model", "model.adapter", "tuner.train_type", "tuner.lora_dropout", "rlhf.disable_dropout")),
    (
        quantized_models,
        (
            *(*_KD_SWITCHES, "model", "tuner.train_type", "training.fsdp", "training.deepspeed"),
            *("rlhf.lmbda", "rlhf.generation", "rlhf.teacher"),
        ),
    ),
    (
        teacher_placement,
        (*_KD_SWITCHES, "rlhf.teacher", "rlhf.teacher_model_init_kwargs", "training.use_cpu", "launch.num_processes"),
    ),
    (idle_ce, ("rlhf.llm_kd_weight", "rlhf.sft_alpha", "data.train")),
    (visual_options, ("custom.visual_kd", "rlhf.teacher.chat_template_kwargs", "rlhf.teacher.prefix")),
    (hidden_options, ("custom.hidden_kd",)),
    (
        always_on_policy,
        ("rlhf.llm_kd_weight", "rlhf.lmbda", "rlhf.sft_alpha", "rlhf.seq_kd", "data.train", "data.eval"),
    ),
    (frozen_parts, ("tuner.freeze_llm", "tuner.freeze_vit", "tuner.freeze_aligner", "custom.visual_kd")),
    (evaluation, (*_KD_SWITCHES, "training.eval_strategy")),
    (evaluation_on_training_rows, ("data.train", "data.eval")),
    (streamed_sources, ("data.train", "data.eval", "training", "custom.sample_limit")),
    (training_conflicts, ("training.output_dir", "training.max_steps", "training.dataloader_num_workers")),
    (best_step, (*_KD_SWITCHES, "training", "rlhf.eval_kd")),
    (same_model, ("model.model", "rlhf.teacher_model", "rlhf.teacher", "rlhf.llm_kd_weight", "rlhf.sft_alpha")),
    (
        output_folder,
        ("training.output_dir", "model.model", "model.adapter", "rlhf.teacher_model", "data.train", "data.eval"),
    ),
    (
        model_folders,
        (
            *_KD_SWITCHES,
            "model.model",
            "model.adapter",
            "rlhf.teacher_model",
            "rlhf.teacher.backend",
            "rlhf.teacher.adapter",
        ),
    ),
)


def check_rules(config: RunConfig, root: Node, wrong: Iterable[KeyPath] = ()) -> Iterator[Problem]:
    """All findings of all rules; rules that depend on an option that is `wrong` in itself are left out."""
    written = Written(root)
    broken = [dotted(path) for path in wrong]
    several = bool(config.rlhf.teachers) or any(name.startswith("rlhf.teachers") for name in broken)
    for rule, options in RULES:
        of_each = several and any(map(is_about_teacher, options))
        if not of_each and not any(_overlap(option, name) for option in options for name in broken):
            yield from rule(config, written)
    if config.rlhf.teachers:
        yield from _of_each_teacher(config, root, broken)


def _of_each_teacher(config: RunConfig, root: Node, broken: Sequence[str]) -> Iterator[Problem]:
    """What the rules about a teacher find about each of several; what is about none of them, once."""
    found: dict[Problem, None] = {}
    for one in each_teacher(config, root):
        written, of_one = Written(one.root(root)), broken_of(one, broken)
        for rule, options in RULES:
            if any(map(is_about_teacher, options)) and not any(
                _overlap(option, name) for option in options for name in of_one
            ):
                found |= dict.fromkeys(one.placed(rule(one.config, written)))
    several = len(config.by_teacher) > 1  # the others move the student away from what it was
    yield from (problem for problem in found if not (several and problem.message.startswith(NO_MOVE)))


def _overlap(first: str, second: str) -> bool:
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith((f"{first}.", f"{first}["))
