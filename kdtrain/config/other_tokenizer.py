"""A teacher with another tokenizer (`rlhf.cross_tokenizer`): what it cannot be asked for, and what has no effect."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.divergence import NUMBERS_OF
from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem, Written

_PATH: KeyPath = ("rlhf", "cross_tokenizer")


def cross_tokenizer(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Options beside `cross_tokenizer` that contradict it, are not available with it, or have no effect."""
    rlhf = config.rlhf
    if rlhf.cross_tokenizer is None:
        return
    if not config.options.lm_kd_active:
        yield from written.idle(["cross_tokenizer"], "rlhf.llm_kd_weight is 0", "rlhf")
        return
    yield from _teacher(config)
    for path, what in _unavailable(config):
        message = f"not available yet beside rlhf.cross_tokenizer: {what}"
        yield Problem(path, message, "remove one of the two", on_key=True)
    if config.data.train_on == "all":
        message = "all supervises the prompt as well, which another chat template writes otherwise for the teacher"
        yield Problem(("data", "train_on"), message, "set data.train_on to assistant or last")
    reason = "rlhf.cross_tokenizer compares likelihoods of text, not distributions over tokens"
    yield from written.idle(["divergence", *NUMBERS_OF, "kd_temperature", "token_selection"], reason, "rlhf")
    if rlhf.teacher.is_served:
        yield from written.idle(["top_k", "tail"], reason, "rlhf", "teacher")


def _teacher(config: RunConfig) -> Iterator[Problem]:
    teacher = config.rlhf.teacher
    if teacher.backend == "self":
        message = "is for a teacher with another tokenizer, and rlhf.teacher.backend is self: the student has its own"
        yield Problem(_PATH, message, "remove it", on_key=True)
    if teacher.backend == "cache" and config.rlhf.cross_tokenizer == "uld":
        message = "uld needs distributions over the teacher's whole vocabulary, and a cache has likelihoods of chunks"
        yield Problem(_PATH, message, "use alm, or rlhf.teacher.backend: hf")
    if teacher.is_served and config.rlhf.cross_tokenizer == "uld":
        message = "uld needs distributions over the teacher's whole vocabulary, and a server gives its likeliest tokens"
        yield Problem(_PATH, message, "use alm, or rlhf.teacher.backend: hf")
    if teacher.is_served and config.rlhf.teacher_model is None:
        message = "needs the tokenizer of the teacher on the server"
        yield Problem(_PATH, message, "name it, rlhf.teacher_model: a model folder or hub id", on_key=True)


def _unavailable(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    rlhf = config.rlhf
    if rlhf.seq_kd:
        yield ("rlhf", "seq_kd"), "the teacher's answers would be of its own tokens"
    for name, sources in (("train", config.data.train), ("eval", config.data.eval_sources)):
        for number, source in enumerate(sources):
            if source.answers == "teacher":
                yield ("data", name, number, "answers"), "the teacher's answers would be of its own tokens"
    if rlhf.select != "all" and rlhf.samples_per_prompt > 1 and rlhf.lmbda > 0:
        yield ("rlhf", "select"), "samples that are ranked by their likelihood per token"
    if rlhf.teacher.prefix is not None:
        yield ("rlhf", "teacher", "prefix"), "messages that the teacher alone reads"
    if config.options.visual_kd is not None:
        yield ("custom", "visual_kd"), "images, whose tokens the two models count otherwise"
    if config.options.hidden_kd is not None:
        yield ("custom", "hidden_kd"), "hidden states, which the two models have at other tokens"
